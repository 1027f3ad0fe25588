//! faccessat2(2): may the calling thread use an open file?
//!
//! Nothing is opened, so nobody is made to wait: no lease is broken, and no
//! listener to permission events is asked. The kernel decides by the mode, the
//! access control list, the flags of the inode and the mount, with the
//! filesystem ids and the effective capabilities of the thread.

use crate::{Result, checked};
use std::os::fd::{AsRawFd, BorrowedFd};

/// What to ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,
    /// Reading and writing.
    ReadWrite,
}

/// Asks whether the calling thread could open the file of a descriptor once
/// more. It does not matter how the descriptor itself was opened.
///
/// # Errors
///
/// `EACCES`; `EPERM` for writing to an immutable file, `EROFS` for writing on a
/// mount that is read-only.
pub fn may(file: BorrowedFd<'_>, access: Access) -> Result<()> {
    let mode = match access {
        Access::Read => libc::R_OK,
        Access::ReadWrite => libc::R_OK | libc::W_OK,
    };
    let flags = libc::AT_EMPTY_PATH | libc::AT_EACCESS;
    // SAFETY: the path is a C string, the rest are numbers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_faccessat2,
            file.as_raw_fd(),
            c"".as_ptr(),
            mode,
            flags,
        )
    };
    checked(i32::try_from(result).unwrap_or(-1)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Errno;
    use std::os::fd::AsFd;

    #[test]
    fn it_is_about_the_file_and_not_the_descriptor() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let read_only = std::fs::File::open(named.path()).unwrap();
        assert_eq!(may(read_only.as_fd(), Access::ReadWrite), Ok(()));
        let (reader, _) = rustix::pipe::pipe().unwrap();
        assert_eq!(may(reader.as_fd(), Access::Read), Ok(()));
        let proc = std::fs::File::open("/proc/self/stat").unwrap();
        assert_eq!(may(proc.as_fd(), Access::Read), Ok(()));
        let root = rustix::process::geteuid().is_root();
        let file = std::fs::File::open("/proc/version").unwrap();
        let expected = if root { Ok(()) } else { Err(Errno::ACCESS) };
        assert_eq!(may(file.as_fd(), Access::ReadWrite), expected);
    }
}
