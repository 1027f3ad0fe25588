//! pidfd_open(2) of single threads, and what a pidfd provides.
//!
//! Unlike most of `/proc`, opening a pidfd and asking which user a thread
//! belongs to wait for nobody: the kernel looks into its own tables of
//! processes and credentials (`pidfd_info`, fs/pidfs.c) and takes no lock that
//! a program can hold. [`descriptor`] is different: see its documentation.

use crate::{Errno, Result, checked};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// `PIDFD_THREAD`: one thread, not its process (include/uapi/linux/pidfd.h,
/// Linux 6.9).
const THREAD: u32 = libc::O_EXCL.cast_unsigned();
/// `PIDFD_GET_INFO`, for the first published size of `struct pidfd_info`.
const GET_INFO: libc::Ioctl = 0xc040_ff0b_u32 as libc::Ioctl;
/// `PIDFD_INFO_CREDS`: return the credentials.
const CREDENTIALS: u64 = 1 << 1;

/// `struct pidfd_info` as Linux 6.13 published it.
#[repr(C)]
#[derive(Debug, Default)]
struct Info {
    mask: u64,
    cgroup: u64,
    pid: u32,
    tgid: u32,
    parent: u32,
    real_uid: u32,
    real_gid: u32,
    effective_uid: u32,
    effective_gid: u32,
    saved_uid: u32,
    saved_gid: u32,
    filesystem_uid: u32,
    filesystem_gid: u32,
    exit_code: i32,
}

const _: () = assert!(size_of::<Info>() == 64);

/// Opens a pidfd of a thread.
///
/// # Errors
///
/// `ESRCH` when the thread is gone, `EINVAL` before Linux 6.9 and for invalid
/// ids.
pub fn of_thread(tid: i32) -> Result<OwnedFd> {
    let tid = Pid::from_raw(tid).ok_or(Errno::INVAL)?;
    pidfd_open(tid, PidfdFlags::from_bits_retain(THREAD))
}

/// Opens a pidfd of a process.
///
/// # Errors
///
/// `ESRCH` when the process is gone, `EINVAL` for invalid ids.
pub fn of_process(pid: i32) -> Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(Errno::INVAL)?;
    pidfd_open(pid, PidfdFlags::empty())
}

/// The parent of a process, in the caller's PID namespace; 0 if it has none
/// there. This waits for nobody.
///
/// # Errors
///
/// `ESRCH` when the process is gone, or has no parent and is not the first;
/// `ENOTTY` before Linux 6.13.
pub fn parent(process: BorrowedFd<'_>) -> Result<i32> {
    Ok(info(process, 0)?.parent.cast_signed())
}

/// The process that a thread belongs to, in the caller's PID namespace. This
/// waits for nobody.
///
/// # Errors
///
/// As [`parent`].
pub fn process_of(thread: BorrowedFd<'_>) -> Result<i32> {
    Ok(info(thread, 0)?.tgid.cast_signed())
}

/// Sends a signal to a process, and to no other that has got its number since.
///
/// # Errors
///
/// `ESRCH` when it is gone, `EPERM`, `EINVAL` for a number that has no name.
pub fn signal(process: BorrowedFd<'_>, number: i32) -> Result<()> {
    let signal = rustix::process::Signal::from_named_raw(number).ok_or(Errno::INVAL)?;
    rustix::process::pidfd_send_signal(process, signal)
}

/// Whether the process of a pidfd has ended: it may still wait to be
/// collected.
#[must_use]
pub fn has_ended(process: BorrowedFd<'_>) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let now = Timespec::default();
    let mut fds = [PollFd::new(&process, PollFlags::IN)];
    // What cannot be asked has ended, to be on the safe side.
    !matches!(poll(&mut fds, Some(&now)), Ok(0))
}

/// The real user id of a thread, in the caller's user namespace. This is the
/// owner even while the thread runs a program with the set-user-id bit.
///
/// # Errors
///
/// `ESRCH` when the thread is gone, `ENOTTY` before Linux 6.13.
pub fn real_user(thread: BorrowedFd<'_>) -> Result<u32> {
    let info = info(thread, CREDENTIALS)?;
    if info.mask & CREDENTIALS == 0 {
        return Err(Errno::NOSYS);
    }
    Ok(info.real_uid)
}

fn info(of: BorrowedFd<'_>, mask: u64) -> Result<Info> {
    let mut info = Info {
        mask,
        ..Info::default()
    };
    // SAFETY: the request says how large the structure is (its size is part of
    // the number), and it is ours for the call.
    checked(unsafe { libc::ioctl(of.as_raw_fd(), GET_INFO, &raw mut info) })?;
    Ok(info)
}

/// A duplicate of descriptor `fd` of a thread (`pidfd_getfd(2)`).
///
/// This waits while the process is in the middle of `execve(2)`. Also, if the
/// original is closed first, dropping the duplicate does the work of the last
/// close. Both can take as long as the thread's owner likes.
///
/// # Errors
///
/// `EBADF` when there is no such descriptor, `EPERM` without
/// `CAP_SYS_PTRACE`, `ESRCH` when the thread is gone.
pub fn descriptor(thread: &impl AsFd, fd: i32) -> Result<OwnedFd> {
    pidfd_getfd(thread, fd, PidfdGetfdFlags::empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_thread_is_its_users() {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let Ok(thread) = of_thread(tid) else {
            return; // Linux before 6.9
        };
        match real_user(thread.as_fd()) {
            Ok(uid) => assert_eq!(uid, rustix::process::getuid().as_raw()),
            Err(errno) => assert!(matches!(errno, Errno::NOTTY | Errno::INVAL), "{errno}"),
        }
        assert_eq!(of_thread(i32::MAX).unwrap_err(), Errno::SRCH);
        assert_eq!(of_thread(0).unwrap_err(), Errno::INVAL);
    }

    #[test]
    fn a_descriptor_is_handed_out() {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let Ok(thread) = of_thread(tid) else {
            return; // Linux before 6.9
        };
        let file = File::open("/dev/zero").unwrap();
        let copy = descriptor(&thread, file.as_raw_fd()).unwrap();
        let inode = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).unwrap().st_ino;
        assert_eq!(inode(copy.as_fd()), inode(file.as_fd()));
        assert_eq!(descriptor(&thread, i32::MAX).unwrap_err(), Errno::BADF);
    }
}
