//! pthread_atfork(3): functions to run around fork(2).

use crate::{Errno, Result};

/// Makes every fork(2) call `child` in the child process. This is permanent: it
/// cannot be undone.
///
/// This module offers no function to call before the fork. A program that takes
/// a lock there hangs sooner or later, when the handlers of others wait for
/// their locks.
///
/// The child of a process with several threads may call only async-signal-safe
/// functions.
///
/// # Errors
///
/// `ENOMEM`.
pub fn pthread_atfork(child: extern "C" fn()) -> Result<()> {
    // SAFETY: a safe function, which lives as long as the program.
    let ret = unsafe { libc::pthread_atfork(None, None, Some(child)) };
    if ret == 0 {
        return Ok(());
    }
    Err(Errno::from_raw_os_error(ret))
}
