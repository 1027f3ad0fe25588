//! ioctl_xfs_fsgeometry(2): the features of an XFS filesystem.

use crate::{Result, checked};
use std::os::fd::{AsRawFd, BorrowedFd};

/// `XFS_FSOP_GEOM_FLAGS_REFLINK`: files can share blocks.
pub const REFLINK: u32 = 1 << 20;
/// `XFS_FSOP_GEOM_FLAGS_EXCHANGE_RANGE`: files can exchange blocks.
pub const EXCHANGE_RANGE: u32 = 1 << 24;
/// `XFS_FSOP_GEOM_FLAGS_ZONED`: data is always written out of place.
pub const ZONED: u32 = 1 << 27;

/// `struct xfs_fsop_geom_v1` (fs/xfs/libxfs/xfs_fs.h): the flags word has the
/// same place in every later version of the structure.
#[repr(C)]
struct GeometryV1 {
    block_size: u32,
    rt_extent_size: u32,
    ag_blocks: u32,
    ag_count: u32,
    log_blocks: u32,
    sector_size: u32,
    inode_size: u32,
    max_inode_percent: u32,
    data_blocks: u64,
    rt_blocks: u64,
    rt_extents: u64,
    log_start: u64,
    uuid: [u8; 16],
    stripe_unit: u32,
    stripe_width: u32,
    version: i32,
    flags: u32,
    log_sector_size: u32,
    rt_sector_size: u32,
    dir_block_size: u32,
}

const _: () = assert!(size_of::<GeometryV1>() == 112);

/// `_IOR('X', 100, struct xfs_fsop_geom_v1)`.
const XFS_IOC_FSGEOMETRY_V1: libc::c_ulong = 0x8070_5864;

/// The feature flags of the XFS filesystem that `file` is on.
///
/// # Errors
///
/// `ENOTTY` on any other filesystem.
pub fn features(file: BorrowedFd<'_>) -> Result<u32> {
    let mut geometry = std::mem::MaybeUninit::<GeometryV1>::zeroed();
    // SAFETY: the ioctl writes at most 112 bytes, the size that is part of
    // its number and of the assert above.
    checked(unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            XFS_IOC_FSGEOMETRY_V1,
            geometry.as_mut_ptr(),
        )
    })?;
    // SAFETY: every field is an integer, so the zeroed bytes the kernel may
    // have left are valid too.
    Ok(unsafe { geometry.assume_init() }.flags)
}
