//! open_tree(2): a mount that nobody else sees.

use crate::{Result, last_errno};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `OPEN_TREE_CLONE`: a copy of the mount, attached nowhere.
const CLONE: libc::c_uint = 1;

/// An `O_PATH` descriptor of an open file on a mount of its own. It keeps the
/// filesystem busy, but no mount that anybody could want to unmount.
///
/// # Errors
///
/// `EINVAL` for a file on a mount of another mount namespace, `EPERM` without
/// `CAP_SYS_ADMIN`.
pub fn detached(file: BorrowedFd<'_>) -> Result<OwnedFd> {
    let flags = CLONE | libc::AT_EMPTY_PATH.cast_unsigned() | libc::O_CLOEXEC.cast_unsigned();
    // SAFETY: the path is a C string; the rest are numbers.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, file.as_raw_fd(), c"".as_ptr(), flags) };
    if fd < 0 {
        return Err(last_errno());
    }
    // SAFETY: the kernel just gave us this descriptor, and nobody else knows
    // its number, which fits.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap_or(-1)) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn it_is_the_same_file() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        let Ok(path) = detached(file.as_fd()) else {
            return; // needs root
        };
        let inode = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).unwrap().st_ino;
        assert_eq!(inode(path.as_fd()), inode(file.as_fd()));
        let again = crate::proc::reopen(path.as_fd(), rustix::fs::OFlags::RDONLY).unwrap();
        assert_eq!(inode(again.as_fd()), inode(file.as_fd()));
    }
}
