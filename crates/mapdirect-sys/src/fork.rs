//! fork(2), for processes with a single thread.

use crate::{Errno, Result, checked, last_errno};

/// Makes a child, which runs `run` and ends with the status that it returns;
/// returns the child's number. Only a process with one thread may do that:
/// then no lock is held by a thread that the child lacks.
///
/// # Errors
///
/// `EDEADLK` when the process has other threads; `EAGAIN`, `ENOMEM`.
pub fn child(run: impl FnOnce() -> u8) -> Result<i32> {
    let threads = crate::proc::numbers_in("/proc/self/task")?;
    if threads.len() != 1 {
        return Err(Errno::DEADLK);
    }
    // SAFETY: this is the only thread, so the child is in no half-done state.
    let pid = checked(unsafe { libc::fork() })?;
    if pid == 0 {
        let status = run();
        // SAFETY: ends the process; what the parent has registered with
        // atexit(3) is the parent's business.
        unsafe { libc::_exit(libc::c_int::from(status)) };
    }
    Ok(pid)
}

/// Makes orphans among the descendants of this process its children.
///
/// # Errors
///
/// None in practice.
pub fn adopt_orphans() -> Result<()> {
    // SAFETY: five integers.
    if unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) } < 0 {
        return Err(last_errno());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_process_with_threads_does_not_fork() {
        let _other = std::thread::spawn(|| std::thread::sleep(std::time::Duration::from_secs(1)));
        assert_eq!(super::child(|| 0), Err(crate::Errno::DEADLK));
    }
}
