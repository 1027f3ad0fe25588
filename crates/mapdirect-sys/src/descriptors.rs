//! close_range(2): a descriptor table for one thread alone; which descriptors
//! other processes get.

use crate::{Result, checked};
use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

/// `CLOSE_RANGE_UNSHARE`: first gives the caller a table that belongs to it
/// alone.
const UNSHARE: libc::c_uint = 1 << 1;

/// Gives the calling thread a descriptor table of its own. The table contains a
/// copy of `keep` under its old number and nothing else. What other threads of
/// the process close stays open here, and children of fork(2) do not get it.
///
/// # Errors
///
/// `ENOMEM`, `EMFILE`.
///
/// # Safety
///
/// After this the thread may use no descriptors but `keep` and those that it
/// opens itself. No other thread may use or close the latter.
pub unsafe fn unshare(keep: BorrowedFd<'_>) -> Result<()> {
    unshare_all_but(&[keep])
}

/// [`unshare`] for several descriptors, with the same promise.
fn unshare_all_but(keep: &[BorrowedFd<'_>]) -> Result<()> {
    let mut keep: Vec<_> = keep
        .iter()
        .map(|keep| keep.as_raw_fd().cast_unsigned())
        .collect();
    keep.sort_unstable();
    // This call comes first: descriptors that it closes are not even copied.
    let behind = keep.last().map_or(0, |last| last.saturating_add(1));
    close_range(behind, libc::c_uint::MAX, UNSHARE)?;
    let mut first = 0;
    for keep in keep {
        if let Some(last) = keep.checked_sub(1).filter(|last| *last >= first) {
            close_range(first, last, 0)?;
        }
        first = keep.saturating_add(1);
    }
    Ok(())
}

/// Lets go of the descriptors that this process was started with: everything
/// that is not close-on-exec is closed, and nothing stands in the places of
/// stdin, stdout and stderr.
///
/// Whatever this program opens itself is close-on-exec and stays. A descriptor
/// that somebody has made otherwise, and still uses, must not exist.
///
/// # Errors
///
/// `ENOENT` without proc(5), and what open(2) of `/dev/null` answers.
pub fn leave_inherited() -> Result<()> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let null = rustix::fs::open("/dev/null", flags, Mode::empty())?;
    for standard in 0..=2 {
        // SAFETY: two integers. The standard streams stay open, as something
        // else.
        checked(unsafe { libc::dup2(null.as_raw_fd(), standard) })?;
    }
    for number in crate::proc::numbers_in("/proc/self/fd")? {
        // SAFETY: an integer. If the number is not open, this fails.
        let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
        if number > 2 && flags >= 0 && flags & libc::FD_CLOEXEC == 0 {
            // SAFETY: inherited, so nothing in this process owns it: see above.
            unsafe { libc::close(number) };
        }
    }
    Ok(())
}

/// Has `command` inherit `file`, under the number that it has here.
pub fn inherit(command: &mut Command, file: OwnedFd) {
    let keep = move || {
        // SAFETY: clears close-on-exec of a descriptor that the closure owns,
        // in the child alone.
        checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) })?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes one async-signal-safe
    // call and neither allocates nor locks.
    unsafe { command.pre_exec(keep) };
}

/// Starts a thread that keeps no descriptor of the process open: its table
/// contains nothing but `keep`, under the same number.
///
/// A thread that may wait in the kernel for ever, deaf to SIGKILL, must be
/// started like this. When the process is killed, all its other threads end,
/// and the descriptors that they share go with the last of them. Descriptors in
/// a thread's own table stay until that thread can end.
///
/// `run` cannot use any other descriptor of the process: using one fails with
/// `EBADF`, or reaches a file that the thread has opened itself, and dropping
/// the last owner of one leaves it open in the other table. So `run` should
/// open by name what it needs. The thread ends at once, with `None`, if its
/// table cannot be created.
///
/// # Errors
///
/// When no thread can be started.
pub fn spawn_apart<T: Send + 'static>(
    builder: Builder,
    keep: Option<Arc<OwnedFd>>,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<Option<T>>> {
    builder.spawn(move || {
        let alone = match &keep {
            // SAFETY: the thread has not used any descriptor yet, `keep`
            // stays open because it is owned here as well, and what `run` may
            // do with others is said above.
            Some(keep) => unsafe { unshare(keep.as_fd()) },
            // No thread uses the numbers that are free in its new table.
            None => close_range(0, libc::c_uint::MAX, UNSHARE),
        };
        alone.is_ok().then(run)
    })
}

/// Runs something that may wait in the kernel for ever, deaf to SIGKILL, and
/// waits for it. It runs in a thread as [`spawn_apart`] makes it, so that the
/// descriptors of the process still go when the process is killed.
///
/// # Errors
///
/// When no such thread can be started.
pub fn apart<T: Send>(
    builder: Builder,
    keep: &[BorrowedFd<'_>],
    run: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = builder.spawn_scoped(scope, move || {
            // The promise of `unshare` is kept: the thread has not used any
            // descriptor yet, those of `keep` are borrowed for as long as it
            // runs, and what `run` may do with others is said at `spawn_apart`.
            unshare_all_but(keep).map(|()| run())
        })?;
        match thread.join() {
            Ok(result) => Ok(result?),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Closes descriptors of a table that belongs to the caller alone, or will with
/// [`UNSHARE`]; see [`unshare`].
fn close_range(first: libc::c_uint, last: libc::c_uint, flags: libc::c_uint) -> Result<()> {
    // SAFETY: by the promise made to `unshare` nobody uses them here.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    checked(libc::c_int::try_from(closed).unwrap_or(-1)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    #[test]
    fn a_thread_apart_has_nothing_or_what_it_keeps() {
        let kept = Arc::new(OwnedFd::from(File::open("/dev/zero").unwrap()));
        let other = File::open("/dev/zero").unwrap();
        let numbers = [kept.as_raw_fd(), other.as_raw_fd()];
        for keep in [None, Some(Arc::clone(&kept))] {
            let keeps = keep.is_some();
            let there = spawn_apart(Builder::new(), keep, move || {
                // SAFETY: asks about a number, which need not be open.
                numbers.map(|fd| unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0)
            });
            assert_eq!(there.unwrap().join().unwrap(), Some([keeps, false]));
        }
        assert!(rustix::io::fcntl_getfd(&other).is_ok());
    }

    #[test]
    fn a_thread_apart_keeps_several() {
        let files = [(); 6].map(|()| File::open("/dev/zero").unwrap());
        let numbers = [0, 1, 2, 3, 4, 5].map(|at: usize| files[at].as_raw_fd());
        let keep = [files[4].as_fd(), files[1].as_fd(), files[2].as_fd()];
        let there = apart(Builder::new(), &keep, || {
            // SAFETY: asks about a number, which need not be open.
            numbers.map(|fd| unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0)
        });
        assert_eq!(there.unwrap(), [false, true, true, false, true, false]);
    }

    #[test]
    fn a_thread_keeps_one_and_others_keep_theirs() {
        let one = File::open("/dev/zero").unwrap();
        let mut other = File::open("/dev/zero").unwrap();
        let number = other.as_raw_fd();
        let kept = std::thread::spawn(move || {
            // SAFETY: the thread uses nothing else from here on, and opens
            // nothing.
            unsafe { unshare(one.as_fd()) }.unwrap();
            // SAFETY: asks about a number, which need not be open.
            let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
            let here = rustix::io::fcntl_getfd(&one).is_ok();
            (flags, here)
        });
        assert_eq!(kept.join().unwrap(), (-1, true));
        other.read_exact(&mut [0; 8]).unwrap();
    }
}
