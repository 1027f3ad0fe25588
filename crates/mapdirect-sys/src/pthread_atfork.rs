//! pthread_atfork(3): what to do around fork(2).

use crate::{Errno, Result};

/// Has `child` called in the child of every fork(2). For good: there is no way
/// to take it back.
///
/// There is nothing here to call before the fork: whoever holds a lock from
/// then on while handlers of others wait for theirs hangs sooner or later.
///
/// The child of a process with several threads may call async-signal-safe
/// functions only.
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
