//! ioctl_fiemap(2) (Documentation/filesystems/fiemap.rst): where the bytes of
//! a file range lie on the block device.
//!
//! Numbers are bytes throughout. Layout and flags are from
//! `include/uapi/linux/fiemap.h`.

use crate::seam::{self, Call};
use crate::{Errno, Result, checked};
use std::os::fd::{AsRawFd, BorrowedFd};

/// The extent is the last of the file.
pub const LAST: u32 = 0x0000_0001;
/// The location is not known (yet).
pub const UNKNOWN: u32 = 0x0000_0002;
/// Space is reserved but no block is chosen until writeback.
pub const DELALLOC: u32 = 0x0000_0004;
/// The data cannot be read at that location as it is (compressed, ...).
pub const ENCODED: u32 = 0x0000_0008;
/// The data is encrypted.
pub const DATA_ENCRYPTED: u32 = 0x0000_0080;
/// Offsets may not be block-aligned.
pub const NOT_ALIGNED: u32 = 0x0000_0100;
/// The data lies inside a metadata block.
pub const DATA_INLINE: u32 = 0x0000_0200;
/// Several files share the block as tails.
pub const DATA_TAIL: u32 = 0x0000_0400;
/// Allocated but never written: reads as zeros.
pub const UNWRITTEN: u32 = 0x0000_0800;
/// Other files, or other ranges of this one, use the same blocks.
pub const SHARED: u32 = 0x0000_2000;

/// One extent as the filesystem reports it, which may reach over the ends of
/// the requested range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawExtent {
    /// Offset in the file.
    pub logical: u64,
    /// Offset on the block device; meaningless with [`UNKNOWN`].
    pub physical: u64,
    /// Length.
    pub length: u64,
    /// The flag bits above.
    pub flags: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

const ZERO_EXTENT: FiemapExtent = FiemapExtent {
    logical: 0,
    physical: 0,
    length: 0,
    reserved64: [0; 2],
    flags: 0,
    reserved: [0; 3],
};

/// The number of extents per call: 14 KiB, which fit on the stack of a thread
/// that maps a small range. For a large range the number of calls stays small
/// (a file of a million extents takes 0.7 s to dump on 6.18, next to none of it
/// per call).
const BATCH: u32 = 256;

#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [FiemapExtent; BATCH as usize],
}

const _: () = assert!(size_of::<FiemapExtent>() == 56);
const _: () = assert!(size_of::<Fiemap>() == 32 + 56 * BATCH as usize);

/// `_IOWR('f', 11, struct fiemap)`; the size is that of the header alone.
const FS_IOC_FIEMAP: libc::c_ulong = 0xC020_660B;

/// Calls `each` for every extent that meets `start .. start + length`, in file
/// order. A range without an extent is a hole. Nothing is flushed first.
///
/// # Errors
///
/// `EOPNOTSUPP` when the filesystem has no FIEMAP, `EBADF`, `EIO`, `EINVAL` for
/// a `length` of 0, `EFBIG` for a `start` beyond the largest file. `EPROTO` if
/// a filesystem goes backwards, so that a broken one cannot make the caller
/// loop for ever.
pub fn fiemap(
    file: BorrowedFd<'_>,
    start: u64,
    length: u64,
    mut each: impl FnMut(RawExtent),
) -> Result<()> {
    seam::check(Call::Fiemap)?;
    let end = start.saturating_add(length);
    let mut at = start;
    let mut request = Fiemap {
        start,
        length,
        flags: 0,
        mapped_extents: 0,
        extent_count: BATCH,
        reserved: 0,
        extents: [ZERO_EXTENT; BATCH as usize],
    };
    loop {
        request.start = at;
        request.length = end - at;
        request.mapped_extents = 0;
        // SAFETY: FS_IOC_FIEMAP reads the 32-byte header and writes it and at
        // most `extent_count` records behind it, all inside `request`, whose
        // layout the asserts above tie to the kernel's.
        checked(unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut request) })?;
        let count = request.mapped_extents as usize;
        if count == 0 {
            return Ok(());
        }
        let answer = &request.extents[..count.min(request.extents.len())];
        match walk(answer, at..end, &mut each)? {
            Some(reached) => at = reached,
            None => return Ok(()),
        }
    }
}

/// Hands on the extents of one answer for a range. Returns the offset from
/// which to ask for more, or `None` at the end.
fn walk(
    answer: &[FiemapExtent],
    range: std::ops::Range<u64>,
    each: &mut impl FnMut(RawExtent),
) -> Result<Option<u64>> {
    let mut at = range.start;
    for extent in answer {
        each(RawExtent {
            logical: extent.logical,
            physical: extent.physical,
            length: extent.length,
            flags: extent.flags,
        });
        let reached = extent.logical.saturating_add(extent.length);
        if reached <= at || extent.length == 0 {
            return Err(Errno::PROTO);
        }
        at = reached;
        if extent.flags & LAST != 0 || at >= range.end {
            return Ok(None);
        }
    }
    Ok(Some(at))
}

/// Hands on the extents of an answer that consists of these bytes.
#[cfg(feature = "fuzzing")]
pub(crate) fn walk_bytes(
    bytes: &[u8],
    range: std::ops::Range<u64>,
    each: &mut impl FnMut(RawExtent),
) -> Result<Option<u64>> {
    let number = |bytes: &[u8], at: usize| {
        let word = bytes.get(at..).and_then(<[u8]>::first_chunk);
        word.map_or(0, |word| u64::from_ne_bytes(*word))
    };
    let extent = |bytes: &[u8]| FiemapExtent {
        logical: number(bytes, 0),
        physical: number(bytes, 8),
        length: number(bytes, 16),
        flags: u32::try_from(number(bytes, 40) & 0xffff_ffff).unwrap_or(0),
        ..ZERO_EXTENT
    };
    let answer: Vec<_> = bytes
        .chunks(size_of::<FiemapExtent>())
        .map(extent)
        .collect();
    walk(&answer, range, each)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;

    #[test]
    fn a_planned_failure_arrives() {
        let file = tempfile::tempfile().unwrap();
        seam::fail_after(Call::Fiemap, 0, Errno::IO);
        let failed = fiemap(file.as_fd(), 0, 4096, |_| {});
        assert_eq!(failed, Err(Errno::IO));
    }

    #[test]
    fn a_written_file_has_extents_in_order_or_no_fiemap() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 100_000]).unwrap();
        file.sync_all().unwrap();
        let mut extents = Vec::new();
        match fiemap(file.as_fd(), 0, 100_000, |extent| extents.push(extent)) {
            Ok(()) => {
                assert!(!extents.is_empty());
                assert!(extents.is_sorted_by_key(|extent| extent.logical));
            }
            // tmpfs, where $TMPDIR may well lie.
            Err(errno) => assert_eq!(errno, Errno::OPNOTSUPP),
        }
    }
}
