//! open_by_handle_at(2): finding an inode again, whatever its current name is.

use crate::{Errno, Result, checked};
use rustix::fs::OFlags;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// The most bytes of a handle (`MAX_HANDLE_SZ`, include/linux/exportfs.h).
pub const MAX_HANDLE: usize = 128;

/// Identifies an inode within its filesystem until the inode is deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileHandle {
    /// The kind of the handle, as the filesystem numbers kinds.
    pub kind: i32,
    /// The handle itself.
    pub bytes: Vec<u8>,
}

/// struct file_handle (include/linux/fs.h) with room for any handle.
#[repr(C)]
struct Raw {
    bytes: u32,
    kind: i32,
    handle: [u8; MAX_HANDLE],
}

/// The handle of an open file: `name_to_handle_at(2)`.
///
/// # Errors
///
/// `EOPNOTSUPP` when the filesystem has no handles.
pub fn of(file: BorrowedFd<'_>) -> Result<FileHandle> {
    let mut raw = Raw {
        bytes: 128,
        kind: 0,
        handle: [0; MAX_HANDLE],
    };
    let mut mount: libc::c_int = 0;
    // SAFETY: the path is a C string, `raw` has as much room as it says, and
    // both it and `mount` are ours for the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            file.as_raw_fd(),
            c"".as_ptr(),
            &raw mut raw,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    checked(i32::try_from(result).unwrap_or(-1))?;
    let length = usize::try_from(raw.bytes).unwrap_or(0).min(MAX_HANDLE);
    Ok(FileHandle {
        kind: raw.kind,
        bytes: raw.handle[..length].to_vec(),
    })
}

/// Opens the inode of a handle. `mount` is any file on its filesystem.
///
/// # Errors
///
/// `ESTALE` when the inode is gone. Needs `CAP_DAC_READ_SEARCH`.
pub fn open(mount: BorrowedFd<'_>, handle: &FileHandle, flags: OFlags) -> Result<OwnedFd> {
    let length = handle.bytes.len();
    if length > MAX_HANDLE {
        return Err(Errno::INVAL);
    }
    let mut raw = Raw {
        bytes: u32::try_from(length).map_err(|_| Errno::INVAL)?,
        kind: handle.kind,
        handle: [0; MAX_HANDLE],
    };
    raw.handle[..length].copy_from_slice(&handle.bytes);
    let flags = (flags | OFlags::CLOEXEC).bits().cast_signed();
    // SAFETY: `raw` holds as many bytes as it says.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_raw_fd(),
            &raw mut raw,
            flags,
        )
    };
    let fd = i32::try_from(fd).map_err(|_| Errno::IO)?;
    checked(fd)?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_handle_that_is_too_long_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let handle = FileHandle {
            kind: 1,
            bytes: vec![0; MAX_HANDLE + 1],
        };
        let opened = open(file.as_fd(), &handle, OFlags::RDONLY);
        assert_eq!(opened.unwrap_err(), Errno::INVAL);
    }
}
