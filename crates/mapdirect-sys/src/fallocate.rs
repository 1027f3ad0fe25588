//! fallocate(2): allocating, unsharing and freeing blocks of a file.

use crate::Result;
use crate::seam::{self, Call};
use rustix::fs::FallocateFlags;
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// A change to the blocks of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// See [`allocate`].
    Allocate,
    /// See [`allocate_and_grow`].
    AllocateAndGrow,
    /// See [`unshare`].
    Unshare,
    /// See [`punch`].
    Punch,
    /// See [`write_zeroes`].
    WriteZeroes,
}

impl Change {
    pub(crate) fn flags(self) -> FallocateFlags {
        match self {
            Self::Allocate => FallocateFlags::KEEP_SIZE,
            Self::AllocateAndGrow => FallocateFlags::empty(),
            Self::Unshare => FallocateFlags::UNSHARE_RANGE | FallocateFlags::KEEP_SIZE,
            Self::Punch => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            // FALLOC_FL_WRITE_ZEROES, include/uapi/linux/falloc.h.
            Self::WriteZeroes => FallocateFlags::from_bits_retain(0x80),
        }
    }
}

/// Makes a change.
///
/// # Errors
///
/// As the function for this change.
pub fn change(file: BorrowedFd<'_>, change: Change, range: &Range<u64>) -> Result<()> {
    seam::check(Call::Fallocate)?;
    // A signal may interrupt the call half-way. Each of these changes can be
    // made twice.
    rustix::io::retry_on_intr(|| {
        rustix::fs::fallocate(file, change.flags(), range.start, range.end - range.start)
    })
}

/// Allocates blocks in the holes of `range`. The new blocks read as zeros, and
/// existing blocks stay. The file keeps its size.
///
/// # Errors
///
/// `ENOSPC` and `EDQUOT` (a part of the range may then be allocated), `EFBIG`,
/// `EPERM` for immutable and append-only files, `ETXTBSY` for swap files and
/// from a gate, `EOPNOTSUPP`.
pub fn allocate(file: BorrowedFd<'_>, range: &Range<u64>) -> Result<()> {
    change(file, Change::Allocate, range)
}

/// The same, and the file grows to the end of `range` unless it is longer. It
/// never gets shorter, even if somebody else sets its size at the same time.
///
/// # Errors
///
/// As [`allocate`]. Beyond `RLIMIT_FSIZE`, the call fails with `EFBIG` and the
/// calling thread gets `SIGXFSZ`.
pub fn allocate_and_grow(file: BorrowedFd<'_>, range: &Range<u64>) -> Result<()> {
    change(file, Change::AllocateAndGrow, range)
}

/// Gives the file blocks of its own for those that it shares in `range`, with
/// the same bytes in them, and waits until they are written.
///
/// # Errors
///
/// As [`allocate`], and `EOPNOTSUPP` when files cannot share blocks.
pub fn unshare(file: BorrowedFd<'_>, range: &Range<u64>) -> Result<()> {
    change(file, Change::Unshare, range)
}

/// Frees the blocks of `range`, whatever they contain.
///
/// # Errors
///
/// As [`allocate`].
pub fn punch(file: BorrowedFd<'_>, range: &Range<u64>) -> Result<()> {
    change(file, Change::Punch, range)
}

/// Makes the device fill `range` with zeros, without sending them, so that
/// unwritten blocks and holes become written ones. The old content is lost. The
/// file grows if the range reaches beyond its end.
///
/// # Errors
///
/// As [`allocate`]. `EOPNOTSUPP` before Linux 6.17, when the filesystem does
/// not have this, and when the zeros would have to be sent to the device
/// (`ext4_fallocate`, fs/ext4/extents.c).
pub fn write_zeroes(file: BorrowedFd<'_>, range: &Range<u64>) -> Result<()> {
    change(file, Change::WriteZeroes, range)
}
