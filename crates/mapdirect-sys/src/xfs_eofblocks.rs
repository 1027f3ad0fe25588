//! XFS_IOC_FREE_EOFBLOCKS (fs/xfs/libxfs/xfs_fs.h): freeing what XFS allocated
//! ahead of need.

use crate::{Result, checked};
use std::os::fd::{AsRawFd, BorrowedFd};

/// `struct xfs_fs_eofblocks`.
#[repr(C)]
struct EofBlocks {
    version: u32,
    flags: u32,
    uid: u32,
    gid: u32,
    project: u32,
    pad32: u32,
    min_file_size: u64,
    pad64: [u64; 12],
}

const _: () = assert!(size_of::<EofBlocks>() == 128);

const VERSION: u32 = 1;
/// Wait for locks and dirty pages instead of passing over the file.
const SYNC: u32 = 1 << 0;
const UID: u32 = 1 << 1;
const MIN_FILE_SIZE: u32 = 1 << 4;

/// `_IOR('X', 58, struct xfs_fs_eofblocks)`.
const XFS_IOC_FREE_EOFBLOCKS: libc::c_ulong = 0x8080_583A;

/// Frees the blocks that XFS allocated beyond the end of files for future
/// writes. This affects all files of user `uid` on the filesystem of `file`
/// that have at least `min_size` bytes. XFS does the same by itself after some
/// minutes.
///
/// # Errors
///
/// `EPERM` without `CAP_SYS_ADMIN`, `EROFS`, `ENOTTY` on other filesystems.
pub fn free(file: BorrowedFd<'_>, uid: u32, min_size: u64) -> Result<()> {
    let request = EofBlocks {
        version: VERSION,
        flags: SYNC | UID | MIN_FILE_SIZE,
        uid,
        gid: 0,
        project: 0,
        pad32: 0,
        min_file_size: min_size,
        pad64: [0; 12],
    };
    // SAFETY: the ioctl reads one structure of 128 bytes, which the assert
    // ties to the size in its number.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), XFS_IOC_FREE_EOFBLOCKS, &raw const request) })
        .map(drop)
}
