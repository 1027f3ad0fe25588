//! What programs do to their own files: they shorten them, and punch holes into
//! them. Pins that nobody else holds give way to that.
//!
//! The worker does it for the program, through the program's own description:
//! then it knows when it is done, and when the pins have to hold again.

use super::filter::Subject;
use super::supervise::{Supervisor, lock};
use super::target::Target;
use mapdirect::Guard;
use mapdirect_sys::Errno;
use mapdirect_sys::seccomp::{self, Notification, Verdict};
use rustix::fs::FallocateFlags;
use std::ops::Range;
use std::os::fd::OwnedFd;

impl Supervisor<'_> {
    /// What becomes of such a call; nothing if nobody waits any more. What the
    /// kernel refuses it refuses to the program itself.
    pub(crate) fn decide_own(
        &self,
        notification: &Notification,
        subject: Subject,
        in_haste: bool,
    ) -> Option<Verdict> {
        let [descriptor, mode, ..] = notification.call.arguments;
        let lower = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0);
        let file = Target::new(notification.tid)
            .and_then(|target| target.descriptor(lower(descriptor).cast_signed()));
        if !seccomp::is_waiting(self.listener(), notification.id) {
            return None;
        }
        let Ok(file) = file else {
            return Some(Verdict::Continue);
        };
        let mode = FallocateFlags::from_bits_retain(lower(mode));
        if in_haste || self.out_of_order().is_some() {
            return Some(Verdict::Continue);
        }
        Some(
            self.do_own(&file, subject, mode)
                .unwrap_or(Verdict::Continue),
        )
    }

    /// Does it, if pins of this supervisor alone are in the way.
    fn do_own(&self, file: &OwnedFd, subject: Subject, mode: FallocateFlags) -> Option<Verdict> {
        let stat = rustix::fs::fstat(file).ok()?;
        let range = in_the_way(subject, mode, stat.st_size)?;
        let inode = self.inode((stat.st_dev, stat.st_ino));
        // Nothing is pinned meanwhile.
        let inode = lock(&inode);
        if !inode.is_pinned() {
            return None;
        }
        // Others have pinned it, too; or the guard is gone. The gate decides.
        let giving_way = Guard::from_env().give_way(file, range).ok()?;
        let number = |number: i64| u64::try_from(number).unwrap_or(0);
        let done = match subject {
            Subject::Truncate(length) => rustix::fs::ftruncate(file, number(length)),
            Subject::Allocate(offset, length) => {
                rustix::fs::fallocate(file, mode, number(offset), number(length))
            }
            _ => Err(Errno::NOSYS),
        };
        // Otherwise they hold again by themselves, when the connection ends.
        let _ = giving_way.resume();
        Some(match done {
            Ok(()) => Verdict::Return(0),
            Err(errno) => Verdict::Fail(errno),
        })
    }
}

/// The bytes from which an operation takes blocks; nothing if it takes none, or
/// makes no sense.
fn in_the_way(subject: Subject, mode: FallocateFlags, size: i64) -> Option<Range<u64>> {
    let moves = FallocateFlags::COLLAPSE_RANGE | FallocateFlags::INSERT_RANGE;
    let number = |number: i64| u64::try_from(number).ok();
    match subject {
        Subject::Truncate(length) if length < size => Some(number(length)?..u64::MAX),
        Subject::Allocate(offset, _) if mode.intersects(moves) => Some(number(offset)?..u64::MAX),
        Subject::Allocate(offset, length) if length > 0 => {
            Some(number(offset)?..number(offset)?.checked_add(number(length)?)?)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_no_blocks_is_left_to_the_program() {
        let none = FallocateFlags::empty();
        let cut = |length| in_the_way(Subject::Truncate(length), none, 8192);
        assert_eq!(cut(4096), Some(4096..u64::MAX));
        assert_eq!(cut(8192), None);
        assert_eq!(cut(-1), None);
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let punched = |offset, length| in_the_way(Subject::Allocate(offset, length), punch, 8192);
        assert_eq!(punched(4096, 4096), Some(4096..8192));
        assert_eq!(punched(0, 0), None);
        assert_eq!(punched(-1, 4096), None);
        assert_eq!(
            punched(i64::MAX, i64::MAX),
            Some((1 << 63) - 1..u64::MAX - 1)
        );
        let collapse = FallocateFlags::COLLAPSE_RANGE;
        let moved = in_the_way(Subject::Allocate(4096, 4096), collapse, 8192);
        assert_eq!(moved, Some(4096..u64::MAX));
    }
}
