//! unshare(2) and close_range(2): a table of descriptors for one thread alone.

use crate::{Result, checked};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Gives the calling thread a table of descriptors of its own, with a copy of
/// `keep` under its old number and nothing else: what other threads of the
/// process close stays open here, and children of fork(2) do not get it.
///
/// # Errors
///
/// `ENOMEM`, `EMFILE`.
///
/// # Safety
///
/// From then on the thread may use no descriptor but `keep` and those it
/// opens itself, and no other thread may use or close the latter.
pub unsafe fn unshare(keep: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: only the calling thread's table changes hands.
    checked(unsafe { libc::unshare(libc::CLONE_FILES) })?;
    let keep = keep.as_raw_fd().cast_unsigned();
    if let Some(last) = keep.checked_sub(1) {
        close_range(0, last)?;
    }
    close_range(keep.saturating_add(1), libc::c_uint::MAX)
}

/// Closes descriptors of a table that only the caller has; see [`unshare`].
fn close_range(first: libc::c_uint, last: libc::c_uint) -> Result<()> {
    // SAFETY: by the promise made to `unshare` nobody uses them here.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    checked(libc::c_int::try_from(closed).unwrap_or(-1)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;

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
