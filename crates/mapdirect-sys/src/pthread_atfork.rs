//! pthread_atfork(3): what to do around fork(2).

use crate::{Errno, Result};

/// Has `prepare` called in a thread before it forks, and `parent` and `child`
/// in the two threads that come of it. For good: there is no way to take it
/// back.
///
/// The child of a process with several threads may call async-signal-safe
/// functions only.
///
/// # Errors
///
/// `ENOMEM`.
pub fn pthread_atfork(
    prepare: extern "C" fn(),
    parent: extern "C" fn(),
    child: extern "C" fn(),
) -> Result<()> {
    // SAFETY: safe functions, which live as long as the program.
    let ret = unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    if ret == 0 {
        return Ok(());
    }
    Err(Errno::from_raw_os_error(ret))
}
