//! Reading block maps from the kernel.

use crate::error::{Error, Kind};
use mapdirect_proto::{BlockMap, DeviceId, Extent, ExtentState};
use mapdirect_sys::fiemap::{self, RawExtent};
use mapdirect_sys::{Errno, fiemap::fiemap};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

/// Reads the block map of a range of `file`, in bytes, without flushing
/// anything first: what is written but not yet allocated shows as
/// [`ExtentState::Delalloc`].
///
/// An unpinned file's block map is an observation that may be false a
/// microsecond later; [`Pin`](crate::Pin) makes it stay true.
///
/// The range may reach beyond the end of the file; blocks that lie there,
/// allocated ahead of need, are shown too.
///
/// # Errors
///
/// `EINVAL` for an empty range, `EOPNOTSUPP` where the filesystem does not
/// tell (FIEMAP), and what the ioctl answers otherwise.
///
/// # Examples
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let file = tempfile::tempfile_in(".")?;
/// # file.set_len(8192)?;
/// let map = mapdirect::block_map(&file, 0..8192)?;
/// for extent in map.extents() {
///     println!("{:>10} {:>10} {}", extent.offset, extent.length, extent.state);
/// }
/// assert_eq!(map.total(mapdirect::ExtentState::Hole), 8192);
/// # Ok(())
/// # }
/// ```
pub fn block_map(file: impl AsFd, range: Range<u64>) -> Result<BlockMap, Error> {
    if range.is_empty() {
        return Err(Error::new(
            Kind::Arguments,
            Errno::INVAL,
            "the range is empty",
            "give a range of at least one byte",
        )
        .asking("read the block map"));
    }
    read(file.as_fd(), range.clone()).map_err(|errno| {
        let (obstacle, mend) = match errno {
            Errno::OPNOTSUPP => (
                String::from("the filesystem does not tell where its blocks are (no FIEMAP)"),
                "use a file on XFS or ext4",
            ),
            other => (format!("FIEMAP failed: {other}"), ""),
        };
        Error::new(Kind::System, errno, obstacle, mend).asking(format!(
            "read the block map of bytes {} to {}",
            range.start, range.end
        ))
    })
}

/// [`block_map`] with the bare errno, for the guard.
///
/// # Errors
///
/// As [`block_map`].
#[doc(hidden)]
pub fn read(file: BorrowedFd<'_>, range: Range<u64>) -> Result<BlockMap, Errno> {
    let stat = rustix::fs::fstat(file)?;
    let device = DeviceId {
        major: rustix::fs::major(stat.st_dev),
        minor: rustix::fs::minor(stat.st_dev),
    };
    let size = u64::try_from(stat.st_size).map_err(|_| Errno::OVERFLOW)?;
    // For XFS and ext4 this is the size of a block.
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

    #[test]
    fn an_empty_range_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let error = block_map(&file, 5..5).unwrap_err();
        assert_eq!(error.errno(), Errno::INVAL.raw_os_error());
    }
}
