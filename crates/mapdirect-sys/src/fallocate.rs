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
/// As the function that makes it.
pub fn change(file: BorrowedFd<'_>, change: Change, range: &Range<u64>) -> Result<()> {
    seam::check(Call::Fallocate)?;
    // A signal may interrupt it half-way; each of these can be done twice.
    rustix::io::retry_on_intr(|| {
        rustix::fs::fallocate(file, change.flags(), range.start, range.end - range.start)
    })
}

/// Allocates blocks for `range` where there are none; they read as zeros, and
/// what is there already stays. The file keeps its size.
///
/// # Errors
///
/// `ENOSPC` and `EDQUOT` (part of the range may be allocated then), `EFBIG`,
/// `EPERM` for immutable and append-only files, `ETXTBSY` for swap files and
/// from a gate, `EOPNOTSUPP`.
pub fn allocate(file: BorrowedFd<'_>, range: &Range<u64>) -> Result<()> {
    change(file, Change::Allocate, range)
}

/// The same, and the file ends behind `range` unless it is longer: it never
/// gets shorter, whoever else sets its size at the same time.
///
/// # Errors
///
/// As [`allocate`]. Beyond `RLIMIT_FSIZE` it is `EFBIG`, and `SIGXFSZ` for
/// the calling thread.
pub fn allocate_and_grow(file: BorrowedFd<'_>, range: &Range<u64>) -> Result<()> {
    change(file, Change::AllocateAndGrow, range)
}

/// Gives the file blocks of its own for what it shares in `range`, with the
/// same bytes in them, and waits until they are written.
///
/// # Errors
///
/// As [`allocate`]; `EOPNOTSUPP` where files cannot share blocks.
pub fn unshare(file: BorrowedFd<'_>, range: &Range<u64>) -> Result<()> {
    change(file, Change::Unshare, range)
}

/// Frees the blocks of `range`, whatever is in them.
///
/// # Errors
///
/// As [`allocate`].
pub fn punch(file: BorrowedFd<'_>, range: &Range<u64>) -> Result<()> {
    change(file, Change::Punch, range)
}

/// Has the device fill `range` with zeros, without sending them, and makes
/// what was unwritten or a hole written by that. What was there before is
/// lost. The file grows if the range reaches beyond its end.
///
/// # Errors
///
/// As [`allocate`]; `EOPNOTSUPP` before Linux 6.17, where the filesystem does
/// not have it, and where the device would have to be sent the zeros
/// (`ext4_fallocate`, fs/ext4/extents.c).
pub fn write_zeroes(file: BorrowedFd<'_>, range: &Range<u64>) -> Result<()> {
    change(file, Change::WriteZeroes, range)
}
