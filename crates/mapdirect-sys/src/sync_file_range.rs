//! sync_file_range(2): writing back a part of a file and nothing more. The
//! device is not flushed, and the block map is not made durable.

use crate::seam::{self, Call};
use crate::{Errno, Result, checked};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Starts to write back the dirty pages of a range, and does not wait.
///
/// # Errors
///
/// `EIO`, `ENOSPC`.
pub fn start(file: BorrowedFd<'_>, range: &Range<u64>) -> Result<()> {
    call(file, range, libc::SYNC_FILE_RANGE_WRITE)
}

/// Waits until every page of a range that is dirty now, or under writeback, is
/// written.
///
/// # Errors
///
/// `EIO`, `ENOSPC`.
pub fn finish(file: BorrowedFd<'_>, range: &Range<u64>) -> Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    call(file, range, flags)
}

fn call(file: BorrowedFd<'_>, range: &Range<u64>, flags: libc::c_uint) -> Result<()> {
    seam::check(Call::SyncFileRange)?;
    let offset = i64::try_from(range.start).map_err(|_| Errno::INVAL)?;
    let length = i64::try_from(range.end - range.start).map_err(|_| Errno::INVAL)?;
    // SAFETY: integers only; `file` is open for the call.
    checked(unsafe { libc::sync_file_range(file.as_raw_fd(), offset, length, flags) }).map(drop)
}
