//! fork(2) of a process with one thread.

use crate::{Errno, Result, checked, proc};

/// Which side of [`fork`] this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The process that called it. The number is the child's.
    Parent(i32),
    /// The new process.
    Child,
}

/// Makes a second process of this one.
///
/// # Errors
///
/// `EDEADLK` when the process has more than one thread: a lock that another
/// holds would stay locked in the child for ever. `EAGAIN` and `ENOMEM` as
/// fork(2).
pub fn fork() -> Result<Side> {
    let threads = proc::numbers_in("/proc/self/task")?;
    if threads.len() != 1 {
        return Err(Errno::DEADLK);
    }
    // SAFETY: no other thread exists, and nobody but this one could make one. So
    // the child finds memory and locks as a thread that goes on finds them.
    match checked(unsafe { libc::fork() })? {
        0 => Ok(Side::Child),
        child => Ok(Side::Parent(child)),
    }
}

/// Makes a child, which runs `run` and ends with the status that it returns;
/// returns the child's number.
///
/// # Errors
///
/// As [`fork`].
pub fn child(run: impl FnOnce() -> u8) -> Result<i32> {
    match fork()? {
        Side::Parent(child) => Ok(child),
        Side::Child => {
            let status = run();
            // SAFETY: ends the process; what its parent has registered with
            // atexit(3) is its parent's business.
            unsafe { libc::_exit(libc::c_int::from(status)) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The threads of the test runner are others.
    #[test]
    fn a_process_with_threads_is_not_forked() {
        let (send, receive) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || receive.recv());
        assert_eq!(fork(), Err(Errno::DEADLK));
        drop(send);
        other.join().unwrap().unwrap_err();
    }
}
