//! dup(2): one description behind several descriptors.

use crate::{Result, checked};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Replaces the description of `old` by that of `new`. Descriptor `old` stays
/// open and keeps its number and its close-on-exec flag. From then on it refers
/// to the other description, for the whole process at once.
///
/// # Errors
///
/// `EBUSY` when another thread is opening a descriptor of that number,
/// `EINVAL` when both are the same descriptor.
pub fn replace(old: BorrowedFd<'_>, new: BorrowedFd<'_>) -> Result<()> {
    let flags = rustix::io::fcntl_getfd(old)?;
    let flags = if flags.contains(rustix::io::FdFlags::CLOEXEC) {
        libc::O_CLOEXEC
    } else {
        0
    };
    // SAFETY: both descriptors are borrowed, so both are open and stay so;
    // the borrower of `old` goes on with a valid descriptor.
    checked(unsafe { libc::dup3(new.as_raw_fd(), old.as_raw_fd(), flags) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    #[test]
    fn the_number_stays_and_the_file_changes() {
        let mut old = tempfile::tempfile().unwrap();
        let mut new = tempfile::tempfile().unwrap();
        new.write_all(b"new").unwrap();
        new.rewind().unwrap();
        let number = old.as_raw_fd();
        replace(old.as_fd(), new.as_fd()).unwrap();
        let mut text = String::new();
        old.read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), old.as_raw_fd()), ("new", number));
        let flags = rustix::io::fcntl_getfd(&old).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
}
