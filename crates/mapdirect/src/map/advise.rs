//! Advice to the kernel, and keeping pages in memory.

use super::DirectMap;
use super::bytes::length_of;
use crate::error::{Error, Result};
use mapdirect_model::plan::Pages;
use mapdirect_sys::Errno;
use rustix::mm::Advice as System;
use std::ops::Range;

/// How a mapping will be used: the values of `madvise(2)` that change neither
/// bytes nor blocks nor what a child of `fork(2)` gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Advice {
    /// `MADV_NORMAL`: nothing special.
    Normal,
    /// `MADV_RANDOM`: pages are accessed in no order, so do not read ahead.
    Random,
    /// `MADV_SEQUENTIAL`: pages are accessed in order, so read far ahead.
    Sequential,
    /// `MADV_WILLNEED`: read the pages soon.
    WillNeed,
    /// `MADV_COLD`: the pages will not be used soon.
    Cold,
    /// `MADV_PAGEOUT`: take the pages out of memory.
    PageOut,
    /// `MADV_POPULATE_READ`: make the pages readable without a fault, now.
    PopulateRead,
    /// `MADV_POPULATE_WRITE`: make the pages writable without a fault, now.
    PopulateWrite,
    /// `MADV_HUGEPAGE`: use huge pages.
    HugePage,
    /// `MADV_NOHUGEPAGE`: do not use huge pages.
    NoHugePage,
    /// `MADV_DONTDUMP`: leave the pages out of core dumps.
    DontDump,
    /// `MADV_DODUMP`: put the pages into core dumps.
    DoDump,
}

impl Advice {
    fn system(self) -> System {
        match self {
            Self::Normal => System::Normal,
            Self::Random => System::Random,
            Self::Sequential => System::Sequential,
            Self::WillNeed => System::WillNeed,
            Self::Cold => System::LinuxCold,
            Self::PageOut => System::LinuxPageOut,
            Self::PopulateRead => System::LinuxPopulateRead,
            Self::PopulateWrite => System::LinuxPopulateWrite,
            Self::HugePage => System::LinuxHugepage,
            Self::NoHugePage => System::LinuxNoHugepage,
            Self::DontDump => System::LinuxDontDump,
            Self::DoDump => System::LinuxDoDump,
        }
    }
}

/// Advice, and locking into memory. Both are for the parts of the mapping that
/// are the file itself; frozen parts of a writable mapping are left alone.
impl DirectMap {
    /// Tells the kernel how the mapping will be used; see
    /// [`advise_range`](Self::advise_range).
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(map: &mapdirect::DirectMap) -> mapdirect::Result<()> {
    /// map.advise(mapdirect::Advice::Random)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn advise(&self, advice: Advice) -> Result<()> {
        self.advise_range(advice, 0..self.len())
    }

    /// Tells the kernel how a range of the mapping will be used: all pages that
    /// meet it.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the range is not inside the mapping, or the kernel does not
    /// know the advice; `EACCES` for [`Advice::PopulateWrite`] of a read-only
    /// mapping; `EIO` if the mapping was revoked; and what `madvise(2)`
    /// answers.
    pub fn advise_range(&self, advice: Advice, range: Range<usize>) -> Result<()> {
        let count = length_of("advise", &range)?;
        self.check_bounds("advise", range.start, count)?;
        if advice == Advice::PopulateWrite {
            self.check_writable("populate")?;
        }
        self.on_stable("madvise", &range, |start, length| {
            // SAFETY: pages of the mapping; no advice of the enum takes away a
            // byte or moves a page.
            unsafe { rustix::mm::madvise(start, length, advice.system()) }
        })
    }

    /// Brings the pages of the mapping into memory and keeps them there, until
    /// [`unlock`](Self::unlock) or the end of the mapping. What
    /// [`allocate`](Self::allocate) makes stable later is not locked.
    ///
    /// # Errors
    ///
    /// `ENOMEM` beyond `RLIMIT_MEMLOCK`, and what `mlock(2)` answers; some
    /// pages may be locked then. `EIO` if the mapping was revoked.
    pub fn lock(&self) -> Result<()> {
        self.check_bounds("lock", 0, self.len())?;
        self.on_stable("mlock", &(0..self.len()), |start, length| {
            // SAFETY: pages of the mapping; locking changes no byte.
            unsafe { rustix::mm::mlock(start, length) }
        })
    }

    /// Ends what [`lock`](Self::lock) began.
    ///
    /// # Errors
    ///
    /// What `munlock(2)` answers. `EIO` if the mapping was revoked.
    pub fn unlock(&self) -> Result<()> {
        self.check_bounds("unlock", 0, self.len())?;
        self.on_stable("munlock", &(0..self.len()), |start, length| {
            // SAFETY: as above.
            unsafe { rustix::mm::munlock(start, length) }
        })
    }

    /// Does something with all pages of the file itself that meet a range.
    fn on_stable(
        &self,
        call: &str,
        range: &Range<usize>,
        run: impl Fn(*mut std::ffi::c_void, usize) -> std::result::Result<(), Errno>,
    ) -> Result<()> {
        let base = self.memory.base().as_ptr().expose_provenance();
        let (start, end) = (range.start as u64, range.end as u64);
        let page = self.plan.page();
        let stable = self.plan.segments().iter();
        for segment in stable.filter(|segment| segment.pages == Pages::Stable) {
            let from = (segment.range.start - self.offset).max(start - start % page);
            let to = (segment.range.end - self.offset).min(end.next_multiple_of(page));
            // Inside of a range that fits into memory.
            if let (Ok(from), Ok(to)) = (usize::try_from(from), usize::try_from(to))
                && from < to
                && start < end
            {
                let address = std::ptr::with_exposed_provenance_mut(base + from);
                run(address, to - from).map_err(|errno| {
                    Error::system(call, errno).asking(format!(
                        "call {call} for bytes {} to {}",
                        range.start, range.end
                    ))
                })?;
            }
        }
        Ok(())
    }
}
