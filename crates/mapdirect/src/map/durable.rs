//! Making what was stored durable.

use super::{DirectMap, Durability};
use crate::error::{Error, Result};
use crate::plan::{Access, Pages};
use mapdirect_sys::{cache, mmap};
use std::ops::Range;

impl DirectMap {
    /// What it takes here to make a store durable.
    #[must_use]
    pub fn durability(&self) -> Durability {
        self.durability
    }

    /// Has it do what it would do if stores became durable in another way than
    /// they do: to measure what that takes where there is no persistent memory.
    #[doc(hidden)]
    pub fn pretend(&mut self, durability: Durability) {
        self.durability = durability;
    }

    /// Makes what was stored to a range of the mapping durable:
    /// [`flush`](Self::flush) and [`drain`](Self::drain). Nothing is asked for
    /// a range of no bytes.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the range is not inside the mapping; with
    /// [`Durability::Msync`] what `msync(2)` answers.
    #[inline]
    pub fn persist(&self, range: Range<usize>) -> Result<()> {
        self.flush(range)?;
        self.drain();
        Ok(())
    }

    /// Starts to make what was stored to a range durable; it is when a
    /// [`drain`](Self::drain) afterwards returns. For many ranges that are
    /// cheaper to wait for together. With [`Durability::Msync`] this is
    /// `msync(2)` of the pages that meet the range, and waits itself.
    ///
    /// # Errors
    ///
    /// As [`persist`](Self::persist).
    #[inline]
    pub fn flush(&self, range: Range<usize>) -> Result<()> {
        let count = range.end.saturating_sub(range.start);
        self.check_bounds("persist", range.start, count)?;
        match self.durability {
            Durability::CacheFlush if self.plan.is_stable() => {
                self.memory.write_back(range.start, count);
                Ok(())
            }
            Durability::CacheFlush => {
                self.write_back_stable(&range);
                Ok(())
            }
            Durability::Automatic => Ok(()),
            Durability::Msync => self.sync(&range),
        }
    }

    /// Waits until everything that this thread flushed is durable. For the
    /// thread alone: what others stored and flushed they drain themselves.
    #[inline]
    pub fn drain(&self) {
        if self.durability != Durability::Msync {
            cache::drain();
        }
    }

    /// Writes bytes and makes them durable, for persistent memory without
    /// reading their cache lines first. Otherwise as
    /// [`write_at`](Self::write_at) and [`persist`](Self::persist).
    ///
    /// # Errors
    ///
    /// As those two.
    #[inline]
    pub fn copy_persist(&self, offset: usize, from: &[u8]) -> Result<()> {
        if self.durability != Durability::CacheFlush {
            self.write_at(offset, from)?;
            return self.persist(offset..offset + from.len());
        }
        self.check_bounds("write", offset, from.len())?;
        self.check_access("write", offset, from.len(), Access::Store)?;
        self.memory.stream(offset, from);
        cache::drain();
        Ok(())
    }

    /// What is frozen holds nothing to be made durable, and what faults would
    /// do so here as well.
    fn write_back_stable(&self, range: &Range<usize>) {
        let (start, end) = (range.start as u64, range.end as u64);
        for segment in self.plan.segments() {
            if segment.pages != Pages::Stable {
                continue;
            }
            let from = (segment.range.start - self.offset).max(start);
            let to = (segment.range.end - self.offset).min(end);
            // Inside of a range that fits into memory.
            if let (Ok(from), Ok(to)) = (usize::try_from(from), usize::try_from(to))
                && from < to
            {
                self.memory.write_back(from, to - from);
            }
        }
    }

    fn sync(&self, range: &Range<usize>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let page = rustix::param::page_size();
        let base = self.memory.base().addr().get();
        let start = base + range.start - range.start % page;
        mmap::sync(start, base + range.end - start).map_err(|errno| {
            Error::system("msync", errno)
                .asking(format!("persist bytes {} to {}", range.start, range.end))
        })
    }
}
