//! Block maps for those who call the library.

use crate::error::{Error, Kind};
use mapdirect_model::BlockMap;
pub(crate) use mapdirect_model::block_map::read;
use mapdirect_sys::Errno;
use std::ops::Range;
use std::os::fd::AsFd;

/// Reads the block map of a range of `file`, in bytes, without flushing
/// anything first: what is written but not yet allocated shows as
/// [`ExtentState::Delalloc`](crate::ExtentState::Delalloc).
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_range_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let error = block_map(&file, 5..5).unwrap_err();
        assert_eq!(error.errno(), Errno::INVAL.raw_os_error());
    }
}
