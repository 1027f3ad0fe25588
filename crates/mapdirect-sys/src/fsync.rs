//! fsync(2).

use crate::Result;
use crate::seam::{self, Call};
use std::os::fd::BorrowedFd;

/// Writes back the file's data and block map, and makes the device flush.
///
/// # Errors
///
/// `EIO`, `ENOSPC`, `EROFS`.
pub fn fsync(file: BorrowedFd<'_>) -> Result<()> {
    seam::check(Call::Fsync)?;
    rustix::fs::fsync(file)
}
