//! Making frozen blocks stable under a mapping.

use super::{DirectMap, segments};
use crate::error::{Error, Kind, Result};
use crate::establish::{Strength, nothing_is_frozen};
use mapdirect_model::plan::{Access, Pages, Plan};
use mapdirect_sys::{Errno, mmap};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

impl DirectMap {
    /// Makes frozen blocks of a range stable, under the pin: the guard
    /// allocates, unshares, and writes zeros where nothing was written. Then
    /// they can be stored to. No other stable block moves, and none is
    /// unprotected for a moment.
    ///
    /// **`range` counts bytes of the file**, as everything about blocks does
    /// ([`block_map`](Self::block_map), [`Pin::allocate`](crate::Pin::allocate),
    /// breaches); what is about memory counts bytes of the mapping. All whole
    /// pages and blocks that meet the range become stable, up to the end of the
    /// file. ext4 converts the rest of a small unwritten extent along, which
    /// stays frozen in this mapping. Afterwards [`block_map`](Self::block_map)
    /// tells what has changed. An empty range succeeds without doing anything.
    ///
    /// Blocks that another holder has pinned too stay as they are.
    ///
    /// # Errors
    ///
    /// * `EINVAL` if the range is not inside what is mapped, or begins beyond
    ///   the end of the file;
    /// * `EACCES` for a read-only mapping;
    /// * `ENOSPC` when there is no room: nothing has changed then, or
    ///   [`block_map`](Self::block_map) tells what has;
    /// * `ETXTBSY` when another holder has the blocks pinned, or frozen ones
    ///   near them;
    /// * `EOPNOTSUPP` when the guard is gone, or in a child of `fork(2)`;
    /// * `ENOMEM` for want of memory mappings (`vm.max_map_count`);
    /// * `EIO` if the mapping was revoked.
    ///
    /// What could not be done can be asked for again.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use mapdirect::MapOptions;
    ///
    /// let file = std::fs::File::options().read(true).write(true).open("sparse")?;
    /// let mut map = MapOptions::new().accept_page_cache(true).map(&file)?;
    /// map.allocate(8 << 20..9 << 20)?;
    /// map.write_all_at(b"no SIGBUS here", 8 << 20)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn allocate(&mut self, range: Range<u64>) -> Result<()> {
        let asked = format!("allocate bytes {} to {}", range.start, range.end);
        self.try_allocate(&range)
            .map_err(|error| error.asking(asked))
    }

    fn try_allocate(&mut self, range: &Range<u64>) -> Result<()> {
        self.check_writable("allocate")?;
        self.check_inside(range)?;
        if self.strength == Strength::Stable {
            return Err(nothing_is_frozen());
        }
        let stable = self.plan.obstacle(range.clone(), Access::Store).is_none();
        let Some(frozen) = &self.frozen else {
            return Ok(());
        };
        if stable {
            return Ok(());
        }
        let at_most = self.plan.assuming_stable(range);
        segments::check_count(at_most.mappings(), self.plan.mappings())?;
        let pinned = frozen.pinned()?;
        // What the guard did not promise is as frozen as before.
        self.held.allocate(range, pinned.as_fd())?;
        self.put_in_place(pinned.as_fd())
    }

    /// Whether bytes of the file are mapped.
    fn check_inside(&self, range: &Range<u64>) -> Result<()> {
        let end = self.offset + self.len() as u64;
        if self.held.hold().is_revoked() {
            return Err(self.revoked("allocate"));
        }
        if range.start <= range.end && range.start >= self.offset && range.end <= end {
            return Ok(());
        }
        Err(Error::new(
            Kind::Arguments,
            Errno::INVAL,
            format!("bytes {} to {end} of the file are mapped", self.offset),
            "give bytes of the file that are mapped",
        ))
    }

    /// Maps the file itself wherever that can be stored to now.
    fn put_in_place(&mut self, pinned: BorrowedFd<'_>) -> Result<()> {
        let length = self.len() as u64;
        let there = Plan::new(self.held.block_map(), self.offset, length, self.plan.page());
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
        let replaced = self.held.hold().unless_revoked(|| {
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

    /// Allocates all of the mapping that is in the file.
    pub(super) fn allocate_in_file(&mut self) -> Result<()> {
        let end = self.offset + self.len() as u64;
        let in_file = self.held.block_map().file_size().min(end);
        self.allocate(self.offset..in_file.max(self.offset))
    }
}
