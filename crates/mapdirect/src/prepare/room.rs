//! Making XFS begin an allocation where a huge page can begin.
//!
//! XFS takes the free blocks nearest to what the file has, wherever they
//! begin, unless it has a stripe width to respect; an extent size hint would
//! change the inode and rounds offsets in the file only. But what is nearest
//! can be arranged: a scratch file in the same directory gets the free blocks
//! first, keeps those in front of the boundary, and gives back the rest. The
//! file itself is not touched, and the scratch file has no name: it is gone
//! with its descriptor, whatever happens.

use super::plan::HUGE;
use crate::extents;
use mapdirect_proto::Extent;
use mapdirect_sys::{fallocate, fsync};
use rustix::fs::{Mode, OFlags};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// A file without a name, in the directory of another.
#[derive(Debug)]
pub(super) struct Scratch {
    file: OwnedFd,
}

impl Scratch {
    /// Makes one; nothing where the directory is not to be found or not to be
    /// written to.
    pub(super) fn beside(file: BorrowedFd<'_>) -> Option<Self> {
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let path = std::fs::read_link(link).ok()?;
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let scratch = rustix::fs::open(path.parent()?, flags, mode).ok()?;
        // The file may have moved, and its old path lead anywhere.
        let device = |file| rustix::fs::fstat(file).map(|stat| stat.st_dev).ok();
        let same = device(file)? == device(scratch.as_fd())?;
        same.then_some(Self { file: scratch })
    }

    /// Arranges free blocks for `piece` of `file`, so that it will probably
    /// begin at a multiple of [`HUGE`] on the device if it does in the file.
    /// Returns how much of the piece there is room for, from its start; all of
    /// it where nothing could be arranged.
    pub(super) fn make_room(&self, file: BorrowedFd<'_>, piece: Range<u64>) -> Range<u64> {
        let length = self.try_make_room(file, &piece).unwrap_or_else(|| {
            let _ = rustix::fs::ftruncate(&self.file, 0);
            piece.end - piece.start
        });
        piece.start..piece.start + length
    }

    fn try_make_room(&self, file: BorrowedFd<'_>, piece: &Range<u64>) -> Option<u64> {
        let wished = wished_places(file, piece)?;
        let scratch = self.file.as_fd();
        let length = piece.end - piece.start;
        let taken = 0..length + 2 * HUGE;
        rustix::fs::ftruncate(scratch, 0).ok()?;
        fallocate::allocate_and_grow(scratch, &taken).ok()?;
        let map = extents::read(scratch, taken).ok()?;
        let first = map.extents().first()?;
        let free = first.physical?..first.physical?.checked_add(first.length)?;
        let (in_front, room) = place(&free, piece.start, &wished)?;
        rustix::fs::ftruncate(scratch, in_front).ok()?;
        // Freed blocks can be had again only when the log says on disk that
        // they are free.
        fsync::fsync(scratch).ok()?;
        Some(length.min(room))
    }
}

/// How far XFS looks for what a file has already, in multiples of what it is
/// asked for (`XFS_ALLOC_GAP_UNITS`, fs/xfs/libxfs/xfs_bmap.c).
const GAP_UNITS: u64 = 4;

/// Where XFS would like to put `piece`: as far from the blocks the file has
/// in front of it and behind it as it is in the file (`xfs_bmap_adjacent`).
fn wished_places(file: BorrowedFd<'_>, piece: &Range<u64>) -> Option<Vec<u64>> {
    let reach = GAP_UNITS * (piece.end - piece.start);
    let around = piece.start.saturating_sub(reach)..piece.end.saturating_add(reach);
    let map = extents::read(file, around).ok()?;
    let place = |extent: &Extent| {
        let start = extent.physical?.checked_add(piece.start)?;
        start.checked_sub(extent.offset)
    };
    let there = |extent: &&Extent| extent.physical.is_some();
    let at = map
        .extents()
        .partition_point(|extent| extent.offset < piece.start);
    let (before, behind) = map.extents().split_at(at);
    let before = before.iter().rev().find(there).and_then(place);
    let behind = behind.iter().find(there).and_then(place);
    Some(before.into_iter().chain(behind).collect())
}

/// How many bytes of a free run must be taken so that what is left of it
/// begins where `offset` of a file may begin, and how many of what is left a
/// huge page can map. What begins at a place XFS wishes for it takes there,
/// so these have to be among those taken.
fn place(free: &Range<u64>, offset: u64, wished: &[u64]) -> Option<(u64, u64)> {
    let least = wished
        .iter()
        .copied()
        .filter(|place| free.contains(place))
        .max()
        .unwrap_or(free.start);
    let start = least + offset.wrapping_sub(least) % HUGE;
    let room = free.end.checked_sub(start)?;
    let room = room - room % HUGE;
    (room > 0).then_some((start - free.start, room))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_left_begins_where_a_huge_page_can(
            start in 0u64..1 << 40,
            length in 1u64..64 << 20,
            offset in 0u64..1 << 40,
            wished in proptest::collection::vec(0u64..70 << 20, 0..3),
        ) {
            let free = start..start + length;
            let wished: Vec<_> = wished.into_iter().map(|place| start + place).collect();
            match place(&free, offset, &wished) {
                Some((in_front, room)) => {
                    let left = start + in_front;
                    prop_assert_eq!(left % HUGE, offset % HUGE);
                    prop_assert!(room.is_multiple_of(HUGE) && room > 0);
                    prop_assert!(left + room <= free.end);
                    for place in wished {
                        prop_assert!(place <= left || !free.contains(&place));
                    }
                }
                None => {
                    let least = wished.iter().filter(|place| free.contains(place)).max();
                    let least = *least.unwrap_or(&start);
                    prop_assert!(free.end - least < 2 * HUGE);
                }
            }
        }
    }
}
