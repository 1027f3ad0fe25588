//! Making what was stored durable.

use super::bytes::length_of;
use super::memory::Memory;
use super::{DirectMap, Durability};
use crate::error::{Error, Result};
use mapdirect_model::plan::{Access, Pages};
use mapdirect_sys::{cache, mmap};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Pages that were to be written back and were not waited for. Only
/// [`Durability::Msync`] has any.
#[derive(Debug, Default)]
pub(super) struct Unsynced(Mutex<Vec<Range<usize>>>);

/// Ranges that are remembered one by one.
const FEW: usize = 64;

impl Unsynced {
    fn note(&self, range: Range<usize>) {
        let mut ranges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match ranges.last_mut() {
            Some(last) if range.start <= last.end && last.start <= range.end => {
                *last = last.start.min(range.start)..last.end.max(range.end);
            }
            _ => ranges.push(range),
        }
        if ranges.len() > FEW {
            let all = ranges
                .drain(..)
                .reduce(|one, other| one.start.min(other.start)..one.end.max(other.end));
            ranges.extend(all);
        }
    }

    fn take(&self) -> Vec<Range<usize>> {
        let mut ranges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *ranges)
    }
}

/// Durability: what a power cut leaves of what was stored.
///
/// | [`Durability`] | [`flush_range`](DirectMap::flush_range) | [`flush_async_range`](DirectMap::flush_async_range) | [`drain`](DirectMap::drain) |
/// | --- | --- | --- | --- |
/// | `CacheFlush` | writes cache lines back, and a fence | writes cache lines back | a fence |
/// | `Automatic` | a fence | nothing | a fence |
/// | `Msync` | `msync(2)`, `MS_SYNC` | remembers the range | `msync(2)` of what is remembered |
impl DirectMap {
    /// What it takes here to make a store durable.
    #[must_use]
    pub fn durability(&self) -> Durability {
        self.durability
    }

    /// Overrides how stores become durable. For benchmarks on machines without
    /// persistent memory.
    #[doc(hidden)]
    pub fn pretend(&mut self, durability: Durability) {
        self.durability = durability;
    }

    /// Makes everything that was stored to the mapping durable, and returns
    /// when it is. The work grows with the mapping: prefer
    /// [`flush_range`](Self::flush_range) when few bytes have changed.
    ///
    /// # Errors
    ///
    /// `EACCES` for a read-only mapping, `EIO` if the mapping was revoked; with
    /// [`Durability::Msync`] what `msync(2)` answers.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(map: &mapdirect::DirectMap) -> mapdirect::Result<()> {
    /// map.write_all_at(b"hello", 0)?;
    /// map.flush()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn flush(&self) -> Result<()> {
        self.flush_range(0..self.len())
    }

    /// Makes what was stored to a range of the mapping durable, and returns
    /// when it is. An empty range succeeds without doing anything.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the range is not inside the mapping, and as
    /// [`flush`](Self::flush).
    #[inline]
    pub fn flush_range(&self, range: Range<usize>) -> Result<()> {
        if self.durability == Durability::Msync {
            self.check_flush(&range)?;
            return self.sync(&range);
        }
        self.flush_async_range(range)?;
        cache::drain();
        Ok(())
    }

    /// The name that libpmem gives to [`flush_range`](Self::flush_range).
    ///
    /// # Errors
    ///
    /// As there.
    #[inline]
    pub fn persist(&self, range: Range<usize>) -> Result<()> {
        self.flush_range(range)
    }

    /// Starts writing everything back that was stored to the mapping. The data
    /// is durable once a later [`drain`](Self::drain) returns.
    ///
    /// # Errors
    ///
    /// As [`flush`](Self::flush).
    pub fn flush_async(&self) -> Result<()> {
        self.flush_async_range(0..self.len())
    }

    /// Starts writing a range back. The data is durable once a later
    /// [`drain`](Self::drain) returns. Flush many ranges, then drain once.
    ///
    /// With [`Durability::Msync`] the kernel begins when it likes.
    ///
    /// # Errors
    ///
    /// As [`flush_range`](Self::flush_range).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(map: &mapdirect::DirectMap) -> mapdirect::Result<()> {
    /// for at in [0, 4096, 65536] {
    ///     map.write_all_at(&[1; 64], at)?;
    ///     map.flush_async_range(at..at + 64)?;
    /// }
    /// map.drain()?;
    /// # Ok(())
    /// # }
    /// ```
    #[inline]
    pub fn flush_async_range(&self, range: Range<usize>) -> Result<()> {
        let count = self.check_flush(&range)?;
        match self.durability {
            Durability::CacheFlush if self.plan.is_stable() => {
                self.memory.write_back(range.start, count);
            }
            Durability::CacheFlush => self.write_back_stable(&range),
            Durability::Automatic => {}
            Durability::Msync if range.is_empty() => {}
            Durability::Msync => self.unsynced.note(range),
        }
        Ok(())
    }

    /// Waits until everything is durable that this thread has flushed
    /// asynchronously; with [`Durability::Msync`], that any thread has.
    ///
    /// # Errors
    ///
    /// With [`Durability::Msync`] what `msync(2)` answers; the next call tries
    /// again then. Otherwise none.
    #[inline]
    pub fn drain(&self) -> Result<()> {
        if self.durability == Durability::Msync {
            return self.sync_all();
        }
        cache::drain();
        Ok(())
    }

    /// Writes all of `buf`, beginning at `offset`, and makes it durable. On
    /// persistent memory this goes past the cache, without reading the lines
    /// first. Otherwise it is [`write_all_at`](Self::write_all_at) and
    /// [`flush_range`](Self::flush_range).
    ///
    /// # Errors
    ///
    /// As those two.
    #[inline]
    pub fn write_persist_at(&self, buf: &[u8], offset: usize) -> Result<()> {
        if self.durability != Durability::CacheFlush {
            self.write_all_at(buf, offset)?;
            return self.flush_range(offset..offset + buf.len());
        }
        self.check("write", offset, buf.len(), Access::Store)?;
        self.memory.stream(offset, buf);
        cache::drain();
        Ok(())
    }

    /// What makes stores to this mapping durable without a look at it; `None` if
    /// each call has to look: the page cache, frozen blocks, a mapping that is
    /// read-only.
    #[must_use]
    pub fn flusher(&self) -> Option<Flusher> {
        let looks = self.is_read_only || !self.plan.is_stable();
        (!looks).then_some(self.durability).and_then(Flusher::new)
    }

    /// Checks a range to flush, and returns its length.
    #[inline]
    fn check_flush(&self, range: &Range<usize>) -> Result<usize> {
        let count = length_of("flush", range)?;
        self.check_bounds("flush", range.start, count)?;
        self.check_writable("flush")?;
        Ok(count)
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

    fn sync_all(&self) -> Result<()> {
        let mut ranges = self.unsynced.take();
        while let Some(range) = ranges.last() {
            if let Err(error) = self.sync(range) {
                ranges.drain(..).for_each(|range| self.unsynced.note(range));
                return Err(error);
            }
            ranges.pop();
        }
        Ok(())
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
                .asking(format!("flush bytes {} to {}", range.start, range.end))
        })
    }
}

/// Makes stores durable as a [`DirectMap`] does, at an address. For tables that
/// find mappings by address; everybody else uses the mapping itself.
///
/// It knows nothing of a breach: see [`raw::any_revoked`](crate::raw::any_revoked).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flusher {
    writes_back: bool,
}

impl Flusher {
    /// For mappings of this durability; `None` if that takes a system call.
    #[must_use]
    pub const fn new(durability: Durability) -> Option<Self> {
        match durability {
            Durability::CacheFlush => Some(Self { writes_back: true }),
            Durability::Automatic => Some(Self { writes_back: false }),
            Durability::Msync => None,
        }
    }

    /// What it was made of.
    #[must_use]
    pub const fn durability(self) -> Durability {
        if self.writes_back {
            Durability::CacheFlush
        } else {
            Durability::Automatic
        }
    }

    /// As [`DirectMap::flush_async_range`].
    ///
    /// # Safety
    ///
    /// The memory must belong to a mapping whose
    /// [`flusher`](DirectMap::flusher) this is.
    #[inline]
    pub unsafe fn flush_async(self, address: usize, length: usize) {
        if self.writes_back {
            // SAFETY: the caller's promise.
            unsafe { cache::write_back(address, length) };
        }
    }

    /// As [`DirectMap::drain`].
    #[inline]
    pub fn drain() {
        cache::drain();
    }

    /// As [`DirectMap::write_persist_at`].
    ///
    /// # Safety
    ///
    /// As [`flush_async`](Self::flush_async), for as many bytes as `from` has.
    #[inline]
    pub unsafe fn write_persist(self, address: usize, from: &[u8]) {
        let skip = address % size_of::<u64>();
        let base = std::ptr::with_exposed_provenance_mut(address - skip);
        let Some(base) = std::ptr::NonNull::new(base) else {
            return;
        };
        // SAFETY: a mapping consists of whole pages, so the word that the first
        // byte lies in does as well; the rest is the caller's promise.
        let memory = unsafe { Memory::new(base, skip + from.len()) };
        if self.writes_back {
            memory.stream(skip, from);
        } else {
            memory.write(skip, from);
        }
        cache::drain();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_was_flushed_is_remembered(
            ranges in proptest::collection::vec((0usize..10_000, 1usize..500), 0..200),
        ) {
            let unsynced = Unsynced::default();
            for (start, length) in &ranges {
                unsynced.note(*start..start + length);
            }
            let remembered = unsynced.take();
            prop_assert!(remembered.len() <= FEW);
            for (start, length) in ranges {
                let inside = |all: &Range<usize>| all.start <= start && start + length <= all.end;
                prop_assert!(remembered.iter().any(inside));
            }
            prop_assert!(unsynced.take().is_empty());
        }
    }
}
