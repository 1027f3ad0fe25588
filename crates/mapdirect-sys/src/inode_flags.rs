//! ioctl_iflags(2) and ioctl_xfs_fsgetxattr(2): the flags of an inode.

use crate::{Result, checked};
use std::os::fd::{AsRawFd, BorrowedFd};

/// `FS_IMMUTABLE_FL`.
pub const IMMUTABLE: u32 = 0x0000_0010;
/// `FS_COMPR_FL`.
pub const COMPRESSED: u32 = 0x0000_0004;
/// `FS_ENCRYPT_FL`.
pub const ENCRYPTED: u32 = 0x0000_0800;
/// `FS_JOURNAL_DATA_FL`: data goes through the journal (ext4).
pub const JOURNAL_DATA: u32 = 0x0000_4000;
/// `FS_EXTENT_FL`: the inode is mapped by extents (ext4).
pub const EXTENTS: u32 = 0x0008_0000;
/// `FS_INLINE_DATA_FL`: the data lies in the inode.
pub const INLINE_DATA: u32 = 0x1000_0000;

/// `_IOR('f', 1, long)`; but the kernel reads and writes an `int`.
const FS_IOC_GETFLAGS: libc::c_ulong = 0x8008_6601;
/// `_IOW('f', 2, long)`.
const FS_IOC_SETFLAGS: libc::c_ulong = 0x4008_6602;
/// `_IOR('X', 31, struct fsxattr)`.
const FS_IOC_FSGETXATTR: libc::c_ulong = 0x801C_581F;

/// The flags that `lsattr(1)` shows.
///
/// # Errors
///
/// `ENOTTY` or `EOPNOTSUPP` when the filesystem has no flags.
pub fn flags(file: BorrowedFd<'_>) -> Result<u32> {
    let mut flags: libc::c_uint = 0;
    // SAFETY: despite its number the ioctl writes one `unsigned int`
    // (ioctl_getflags in fs/ioctl.c).
    checked(unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_GETFLAGS, &raw mut flags) })?;
    Ok(flags)
}

/// Sets the flags as `chattr(1)` would.
///
/// # Errors
///
/// `EPERM` when [`IMMUTABLE`] would change and the caller lacks
/// `CAP_LINUX_IMMUTABLE` in the initial user namespace.
pub fn set_flags(file: BorrowedFd<'_>, flags: u32) -> Result<()> {
    let flags: libc::c_uint = flags;
    // SAFETY: the ioctl reads one `unsigned int`.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_SETFLAGS, &raw const flags) }).map(drop)
}

/// A part of `struct fsxattr` (include/uapi/linux/fs.h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtendedFlags {
    /// `fsx_xflags`.
    pub flags: u32,
    /// Extent size hint in bytes, 0 for none.
    pub extent_size: u32,
    /// Size hint for copies of shared blocks (XFS), in bytes; 0 for the
    /// default.
    pub copy_extent_size: u32,
    /// The project that a quota may count the file for; 0 for none.
    pub project: u32,
}

/// `FS_XFLAG_REALTIME`: the data lies on the realtime device (XFS).
pub const XFLAG_REALTIME: u32 = 0x0000_0001;
/// `FS_XFLAG_PREALLOC`: blocks beyond the end of the file were requested (XFS).
pub const XFLAG_PREALLOC: u32 = 0x0000_0002;
/// `FS_XFLAG_EXTSIZE`: [`ExtendedFlags::extent_size`] is in force.
pub const XFLAG_EXTSIZE: u32 = 0x0000_0800;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct FsXattr {
    xflags: u32,
    extsize: u32,
    nextents: u32,
    projid: u32,
    cowextsize: u32,
    pad: [u8; 8],
}

const _: () = assert!(size_of::<FsXattr>() == 28);

/// `_IOW('X', 32, struct fsxattr)`.
const FS_IOC_FSSETXATTR: libc::c_ulong = 0x401C_5820;
/// `FS_XFLAG_COWEXTSIZE`: [`ExtendedFlags::copy_extent_size`] is in force.
const XFLAG_COWEXTSIZE: u32 = 0x0001_0000;

/// The former size hint for copies of shared blocks. Dropping this value
/// restores the hint.
#[derive(Debug)]
pub struct CopyHint<'file> {
    file: BorrowedFd<'file>,
    size: u32,
    is_set: bool,
}

/// Makes XFS copy only the block that is written to when it is shared, as long
/// as the result lives.
///
/// # Errors
///
/// `EPERM` for a file of another user without `CAP_FOWNER`, `EINVAL` when
/// blocks cannot be shared, `ENOTTY` on other filesystems.
pub fn copy_single_blocks(file: BorrowedFd<'_>, block_size: u32) -> Result<CopyHint<'_>> {
    let before = get_extended(file)?;
    let mut one = before;
    one.cowextsize = block_size;
    one.xflags |= XFLAG_COWEXTSIZE;
    set_extended(file, &one)?;
    Ok(CopyHint {
        file,
        size: before.cowextsize,
        is_set: before.xflags & XFLAG_COWEXTSIZE != 0,
    })
}

impl Drop for CopyHint<'_> {
    fn drop(&mut self) {
        // Other flags may have been changed meanwhile, so they are kept as they
        // are now. If this fails, a hint stays that makes copies smaller.
        if let Ok(mut now) = get_extended(self.file) {
            now.cowextsize = self.size;
            now.xflags &= !XFLAG_COWEXTSIZE;
            if self.is_set {
                now.xflags |= XFLAG_COWEXTSIZE;
            }
            let _ = set_extended(self.file, &now);
        }
    }
}

fn get_extended(file: BorrowedFd<'_>) -> Result<FsXattr> {
    let mut found = FsXattr::default();
    // SAFETY: the ioctl writes one `struct fsxattr`, 28 bytes by the assert.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FSGETXATTR, &raw mut found) })?;
    Ok(found)
}

fn set_extended(file: BorrowedFd<'_>, value: &FsXattr) -> Result<()> {
    // SAFETY: the ioctl reads one `struct fsxattr`.
    checked(unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            FS_IOC_FSSETXATTR,
            std::ptr::from_ref(value),
        )
    })
    .map(drop)
}

/// The flags of `xfs_io -c lsattr` and the extent size hint.
///
/// # Errors
///
/// `ENOTTY` or `EOPNOTSUPP` when the filesystem has no flags.
pub fn extended(file: BorrowedFd<'_>) -> Result<ExtendedFlags> {
    let found = get_extended(file)?;
    Ok(ExtendedFlags {
        flags: found.xflags,
        extent_size: found.extsize,
        copy_extent_size: found.cowextsize,
        project: found.projid,
    })
}
