//! Making frozen blocks stable under a mapping.

use super::{DirectMap, segments};
use crate::error::Result;
use crate::establish;
use crate::plan::{Access, Pages, Plan};
use mapdirect_sys::mmap;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

impl DirectMap {
    /// Makes frozen blocks of a range stable, under the pin: the guard
    /// allocates, unshares, and writes zeros where nothing was written. Then
    /// they can be stored to; no other stable block moves, and none is
    /// unprotected for a moment. Whole pages and blocks are made so that meet
    /// the range, up to the end of the file. ext4 converts the rest of a small
    /// unwritten extent along, which stays frozen in this mapping.
    ///
    /// [`block_map`](Self::block_map) tells of it. Somebody else who has the
    /// same blocks pinned keeps them as they are.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the range is not inside the mapping, or begins beyond the
    /// end of the file; `ENOSPC` where there is no room: nothing has changed
    /// then, or [`block_map`](Self::block_map) tells what has; `ETXTBSY` when
    /// somebody else has the blocks pinned, or frozen ones near them;
    /// `EOPNOTSUPP` when the guard is gone, or in a child of fork(2);
    /// `ENOMEM` for want of memory mappings. What could not be done can be
    /// asked for again.
    pub fn allocate(&mut self, range: Range<usize>) -> Result<()> {
        let count = range.end.saturating_sub(range.start);
        self.check_bounds("allocate", range.start, count)?;
        let (start, count) = (self.offset + range.start as u64, count as u64);
        let stable = self
            .plan
            .obstacle(start..start + count, Access::Store)
            .is_none();
        let Some(frozen) = &self.frozen else {
            return Ok(());
        };
        if stable {
            return Ok(());
        }
        let asked = format!("allocate bytes {} to {}", range.start, range.end);
        let at_most = self.plan.assuming_stable(&(start..start + count));
        segments::check_count(at_most.mappings(), self.plan.mappings())
            .map_err(|error| error.asking(&*asked))?;
        let pinned = frozen.pinned().map_err(|error| error.asking(&*asked))?;
        let mut now = None;
        let result = establish::allocate(
            &self.hold,
            &self.connection,
            (start, count),
            pinned.as_fd(),
            &mut now,
        );
        if let Some(now) = now {
            self.map = now;
        }
        // What the guard did not promise is as frozen as before.
        result.map_err(|error| error.asking(&*asked))?;
        self.put_in_place(pinned.as_fd())
            .map_err(|error| error.asking(asked))
    }

    /// Maps the file itself wherever that can be stored to now.
    fn put_in_place(&mut self, pinned: BorrowedFd<'_>) -> Result<()> {
        let length = self.len() as u64;
        let there = Plan::new(&self.map, self.offset, length, self.plan.page());
        let (plan, added) = self.plan.with_stable_of(&there);
        let place = segments::Place {
            offset: self.offset,
            address: self.memory.base().as_ptr().expose_provenance(),
        };
        let arguments = segments::Arguments {
            pinned,
            address: 0,
            prot: mmap::PROT_READ | mmap::PROT_WRITE,
            flags: self.flags,
        };
        let replaced = self.hold.unless_revoked(|| {
            // SAFETY: no reference to the memory exists while `self` is
            // borrowed exclusively; what is there is the same bytes before and
            // after.
            unsafe { segments::replace(&place, arguments, &added) }
        });
        let (done, result) = replaced.unwrap_or_else(|| (0, Err(self.revoked("allocate"))));
        self.plan = added[done..].iter().fold(plan, |plan, segment| {
            plan.with(&segment.range, Pages::Faulting)
        });
        result
    }

    pub(super) fn allocate_in_file(&mut self) -> Result<()> {
        let in_file = self.map.file_size().saturating_sub(self.offset);
        let length = usize::try_from(in_file)
            .unwrap_or(usize::MAX)
            .min(self.len());
        self.allocate(0..length)
    }
}
