//! Operations that share, exchange or move blocks, which are ioctls of
//! filesystems.

use super::*;

/// `struct xfs_flock64` (fs/xfs/libxfs/xfs_fs.h).
#[repr(C)]
#[derive(Default)]
pub(super) struct XfsFlock64 {
    kind: i16,
    whence: i16,
    start: i64,
    length: i64,
    sysid: i32,
    pid: u32,
    pad: [i32; 4],
}

pub(super) const XFS_IOC_RESVSP64: u64 = 0x4030_582a;
pub(super) const XFS_IOC_UNRESVSP64: u64 = 0x4030_582b;
pub(super) const XFS_IOC_ZERO_RANGE: u64 = 0x4030_5839;

pub(super) fn xfs_space(file: BorrowedFd<'_>, request: u64, t: &Target) -> Result<()> {
    let mut argument = XfsFlock64 {
        start: i64::try_from(t.offset).unwrap_or(0),
        length: i64::try_from(t.length).unwrap_or(0),
        ..XfsFlock64::default()
    };
    raw::ioctl(file, request, &mut argument).map(drop)
}

/// `struct file_clone_range` (include/uapi/linux/fs.h).
#[repr(C)]
pub(super) struct CloneRange {
    source: i64,
    source_offset: u64,
    source_length: u64,
    offset: u64,
}

/// `FICLONERANGE`.
pub fn clone_range(
    into: BorrowedFd<'_>,
    from: BorrowedFd<'_>,
    from_offset: u64,
    length: u64,
    into_offset: u64,
) -> Result<()> {
    const FICLONE: u64 = 0x4004_9409;
    const FICLONERANGE: u64 = 0x4020_940d;
    if length == 0 {
        let from = from.as_raw_fd().cast_unsigned();
        return raw::ioctl_value(into, FICLONE, from.into()).map(drop);
    }
    let mut range = CloneRange {
        source: from.as_raw_fd().into(),
        source_offset: from_offset,
        source_length: length,
        offset: into_offset,
    };
    raw::ioctl(into, FICLONERANGE, &mut range).map(drop)
}

/// `struct file_dedupe_range` with one destination.
#[repr(C)]
pub(super) struct DedupeRange {
    offset: u64,
    length: u64,
    count: u16,
    reserved1: u16,
    reserved2: u32,
    into: i64,
    into_offset: u64,
    deduped: u64,
    status: i32,
    reserved: u32,
}

/// Dedupes a range of two files, which must hold the same bytes.
pub fn dedupe(
    from: BorrowedFd<'_>,
    from_offset: u64,
    into: BorrowedFd<'_>,
    into_offset: u64,
    length: u64,
) -> Result<()> {
    const FIDEDUPERANGE: u64 = 0xc018_9436;
    let mut range = DedupeRange {
        offset: from_offset,
        length,
        count: 1,
        reserved1: 0,
        reserved2: 0,
        into: into.as_raw_fd().into(),
        into_offset,
        deduped: 0,
        status: 0,
        reserved: 0,
    };
    raw::ioctl(from, FIDEDUPERANGE, &mut range)?;
    match range.status {
        0 => Ok(()),
        // FILE_DEDUPE_RANGE_DIFFERS: then nothing was shared.
        status if status > 0 => Err(Errno::ILSEQ),
        status => Err(Errno::from_raw_os_error(-status)),
    }
}

/// Gives the other file the bytes of the range, so that deduping does
/// something.
pub(super) fn make_equal(t: &Target, file: BorrowedFd<'_>, other: &OwnedFd) -> Result<()> {
    let mut bytes = vec![0; t.length()];
    rustix::io::pread(file, &mut bytes, t.offset)?;
    rustix::io::pwrite(other, &bytes, 0)?;
    rustix::fs::fsync(other)
}

pub(super) fn dedupe_from(t: &Target) -> Result<()> {
    t.read(|f| {
        let other = t.other()?;
        make_equal(t, f, &other)?;
        dedupe(f, t.offset, other.as_fd(), 0, t.length)
    })
}

pub(super) fn dedupe_into(t: &Target) -> Result<()> {
    t.read(|f| {
        let other = t.other()?;
        make_equal(t, f, &other)?;
        dedupe(other.as_fd(), 0, f, t.offset, t.length)
    })
}

/// `struct xfs_swapext` and the `struct xfs_bstat` in it.
#[repr(C)]
pub(super) struct XfsSwapExt {
    version: i64,
    target: i64,
    donor: i64,
    offset: i64,
    length: i64,
    pad: [u8; 16],
    stat: [u8; 136],
}

const _: () = assert!(size_of::<XfsSwapExt>() == 192);

/// `struct xfs_fsop_bulkreq` (fs/xfs/libxfs/xfs_fs.h).
#[repr(C)]
pub(super) struct XfsBulkRequest {
    last: *mut u64,
    count: i32,
    buffer: *mut [u8; 136],
    done: *mut i32,
}

/// Swaps all extents with a file of the same size, as `xfs_fsr` does.
pub(super) fn xfs_swapext(t: &Target) -> Result<()> {
    const XFS_IOC_SWAPEXT: u64 = 0xc0c0_586d;
    const XFS_IOC_FSBULKSTAT_SINGLE: u64 = 0xc020_5866;
    t.write(|f| {
        let size = rustix::fs::fstat(f)?.st_size;
        let other = t.other()?;
        rustix::fs::ftruncate(&other, size.cast_unsigned())?;
        rustix::fs::fsync(&other)?;
        let mut inode = rustix::fs::fstat(f)?.st_ino;
        let mut swap = XfsSwapExt {
            version: 0,
            target: f.as_raw_fd().into(),
            donor: other.as_raw_fd().into(),
            offset: 0,
            length: size,
            pad: [0; 16],
            stat: [0; 136],
        };
        let mut done = 0;
        let mut request = XfsBulkRequest {
            last: &raw mut inode,
            count: 1,
            buffer: &raw mut swap.stat,
            done: &raw mut done,
        };
        raw::ioctl(f, XFS_IOC_FSBULKSTAT_SINGLE, &mut request)?;
        raw::ioctl(f, XFS_IOC_SWAPEXT, &mut swap).map(drop)
    })
}

/// `struct xfs_exchange_range` (Linux 6.10).
#[repr(C)]
pub(super) struct XfsExchangeRange {
    file1: i32,
    pad: u32,
    offset1: u64,
    offset2: u64,
    length: u64,
    flags: u64,
}

pub(super) fn xfs_exchange(t: &Target) -> Result<()> {
    const XFS_IOC_EXCHANGE_RANGE: u64 = 0x4028_5881;
    t.write(|f| {
        let other = t.other()?;
        let mut exchange = XfsExchangeRange {
            file1: other.as_raw_fd(),
            pad: 0,
            offset1: 0,
            offset2: t.offset,
            length: t.length,
            flags: 0,
        };
        raw::ioctl(f, XFS_IOC_EXCHANGE_RANGE, &mut exchange).map(drop)
    })
}

/// `struct move_extent` (fs/ext4/ext4.h), in blocks.
#[repr(C)]
pub(super) struct MoveExtent {
    reserved: u32,
    donor: u32,
    start: u64,
    donor_start: u64,
    length: u64,
    moved: u64,
}

pub(super) fn move_extent(file: BorrowedFd<'_>, donor: BorrowedFd<'_>, t: &Target) -> Result<()> {
    const EXT4_IOC_MOVE_EXT: u64 = 0xc028_660f;
    let mut request = MoveExtent {
        reserved: 0,
        donor: donor.as_raw_fd().cast_unsigned(),
        start: t.offset / t.block,
        donor_start: t.offset / t.block,
        length: t.length / t.block,
        moved: 0,
    };
    raw::ioctl(file, EXT4_IOC_MOVE_EXT, &mut request).map(drop)
}

pub(super) const EXT4_IOC_SWAP_BOOT: u64 = 0x6611;

pub(super) fn ext4_move(t: &Target) -> Result<()> {
    t.write(|f| move_extent(f, t.other()?.as_fd(), t))
}

pub(super) fn ext4_move_donor(t: &Target) -> Result<()> {
    t.write(|f| move_extent(t.other()?.as_fd(), f, t))
}
