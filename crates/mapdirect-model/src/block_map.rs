//! Reads block maps from the kernel.

use crate::extent::{BlockMap, DeviceId, Extent, ExtentState};
use mapdirect_sys::fiemap::{self, RawExtent};
use mapdirect_sys::{Errno, fiemap::fiemap};
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// Reads the block map of a range of `file`, in bytes, without flushing
/// anything first: data that is written but not yet allocated shows as
/// [`ExtentState::Delalloc`]. The range must not be empty.
///
/// # Errors
///
/// `EOPNOTSUPP` when the filesystem has no FIEMAP, and any other error of the
/// system calls.
pub fn read(file: BorrowedFd<'_>, range: Range<u64>) -> Result<BlockMap, Errno> {
    let stat = rustix::fs::fstat(file)?;
    let device = DeviceId {
        major: rustix::fs::major(stat.st_dev),
        minor: rustix::fs::minor(stat.st_dev),
    };
    let size = u64::try_from(stat.st_size).map_err(|_| Errno::OVERFLOW)?;
    // For XFS and ext4 `f_bsize` is the size of a block.
    let block_size = u32::try_from(rustix::fs::fstatfs(file)?.f_bsize).unwrap_or(4096);
    let mut reported = Vec::new();
    fiemap(file, range.start, range.end - range.start, |extent| {
        reported.extend(from_raw(&extent).clipped(&range));
    })?;
    Ok(BlockMap::new(device, block_size, size, range, reported))
}

fn from_raw(raw: &RawExtent) -> Extent {
    let has = |flag| raw.flags & flag != 0;
    let state = if has(fiemap::DATA_INLINE | fiemap::DATA_TAIL) {
        ExtentState::Inline
    } else if has(fiemap::ENCODED | fiemap::DATA_ENCRYPTED) {
        ExtentState::Encoded
    } else if has(fiemap::DELALLOC) {
        ExtentState::Delalloc
    } else if has(fiemap::UNKNOWN) {
        ExtentState::Unknown
    } else if has(fiemap::SHARED) {
        ExtentState::Shared
    } else if has(fiemap::UNWRITTEN) {
        ExtentState::Unwritten
    } else {
        ExtentState::Written
    };
    let nowhere = matches!(
        state,
        ExtentState::Inline | ExtentState::Delalloc | ExtentState::Unknown
    );
    let physical = (!nowhere).then_some(raw.physical);
    Extent::new(raw.logical, physical, raw.length, state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_become_states() {
        let state = |flags| {
            from_raw(&RawExtent {
                logical: 0,
                physical: 4096,
                length: 4096,
                flags,
            })
        };
        assert_eq!(state(0).state, ExtentState::Written);
        assert_eq!(state(fiemap::UNWRITTEN).state, ExtentState::Unwritten);
        assert_eq!(state(fiemap::SHARED).state, ExtentState::Shared);
        let delalloc = state(fiemap::DELALLOC | fiemap::UNKNOWN);
        assert_eq!(delalloc.state, ExtentState::Delalloc);
        assert_eq!(delalloc.physical, None);
        let inline = state(fiemap::DATA_INLINE | fiemap::NOT_ALIGNED);
        assert_eq!(inline.state, ExtentState::Inline);
    }
}
