//! Reading and writing the bytes of a mapping.

use super::DirectMap;
use super::memory::Word;
use crate::error::{Error, Kind, Result};
use mapdirect_model::plan::{Access, Pages};
use mapdirect_sys::Errno;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// An integer that [`DirectMap`] and [`VolatileSlice`](super::VolatileSlice)
/// load and store as a whole: `u8` to `u64` and `i8` to `i64`. No other type
/// can be one.
pub trait Atomic: sealed::Sealed {}

mod sealed {
    pub trait Sealed: super::Word {}
    impl<T: super::Word> Sealed for T {}
}

impl<T: sealed::Sealed> Atomic for T {}

/// Bytes and integers, at offsets in bytes from the start of the mapping.
///
/// Every access is made of atomic loads and stores of aligned eight-byte words.
/// What other threads, processes and devices do to the memory at the same time
/// is therefore never undefined behaviour; eight aligned bytes are never torn.
/// Smaller accesses never disturb their neighbours.
impl DirectMap {
    /// Reads bytes into all of `buf`, beginning at `offset`.
    ///
    /// What others store at the same time is seen or not, eight aligned bytes
    /// at a time. An empty buffer succeeds without doing anything.
    ///
    /// # Errors
    ///
    /// Nothing is read then. `EINVAL` if the bytes are not all inside the
    /// mapping, `EFAULT` if some of them cannot be accessed (shared blocks,
    /// pages beyond the end of the file), `EIO` if the mapping was revoked.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(map: &mapdirect::DirectMap) -> mapdirect::Result<()> {
    /// let mut record = [0; 64];
    /// map.read_exact_at(&mut record, 4096)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn read_exact_at(&self, buf: &mut [u8], offset: usize) -> Result<()> {
        self.check("read", offset, buf.len(), Access::Load)?;
        self.memory.read(offset, buf);
        Ok(())
    }

    /// Writes all of `buf`, beginning at `offset`.
    ///
    /// The bytes are durable after [`flush_range`](Self::flush_range);
    /// [`write_persist_at`](Self::write_persist_at) does both. An empty buffer
    /// succeeds without doing anything.
    ///
    /// # Errors
    ///
    /// Nothing is written then. `EINVAL` if the bytes are not all inside the
    /// mapping, `ETXTBSY` if some of them lie in frozen blocks, `EFAULT` for
    /// pages beyond the end of the file, `EACCES` for a read-only mapping,
    /// `EIO` if the mapping was revoked.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(map: &mapdirect::DirectMap) -> mapdirect::Result<()> {
    /// map.write_all_at(b"hello", 4096)?;
    /// map.flush_range(4096..4101)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn write_all_at(&self, buf: &[u8], offset: usize) -> Result<()> {
        self.check("write", offset, buf.len(), Access::Store)?;
        self.memory.write(offset, buf);
        Ok(())
    }

    /// Fills a range of the mapping with one byte.
    ///
    /// # Errors
    ///
    /// As [`write_all_at`](Self::write_all_at), and `EINVAL` for a range that
    /// ends before it begins.
    pub fn fill(&self, range: Range<usize>, byte: u8) -> Result<()> {
        let count = length_of("fill", &range)?;
        self.check("fill", range.start, count, Access::Store)?;
        self.memory.fill(range.start, count, byte);
        Ok(())
    }

    /// Loads an integer, in the byte order of the machine.
    ///
    /// # Errors
    ///
    /// As [`read_exact_at`](Self::read_exact_at), and `EINVAL` if `offset` is
    /// no multiple of the integer's size.
    ///
    /// # Panics
    ///
    /// If `order` is [`Release`](Ordering::Release) or
    /// [`AcqRel`](Ordering::AcqRel), as the atomic types of the standard
    /// library do.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(map: &mapdirect::DirectMap) -> mapdirect::Result<()> {
    /// use std::sync::atomic::Ordering::Acquire;
    ///
    /// let end: u64 = map.load(8, Acquire)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn load<T: Atomic>(&self, offset: usize, order: Ordering) -> Result<T> {
        self.check_value::<T>("load", offset, Access::Load)?;
        Ok(self.memory.load(offset, order))
    }

    /// Stores an integer, in the byte order of the machine.
    ///
    /// With [`Release`](Ordering::Release), whoever loads the integer with
    /// [`Acquire`](Ordering::Acquire) sees everything that this thread stored
    /// before. **It says nothing of what a power cut leaves**: caches write
    /// lines back in any order. Flush what an integer refers to before storing
    /// the integer, then flush the integer.
    ///
    /// # Errors
    ///
    /// As [`write_all_at`](Self::write_all_at), and `EINVAL` if `offset` is no
    /// multiple of the integer's size.
    ///
    /// # Panics
    ///
    /// If `order` is [`Acquire`](Ordering::Acquire) or
    /// [`AcqRel`](Ordering::AcqRel).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(map: &mapdirect::DirectMap) -> mapdirect::Result<()> {
    /// use std::sync::atomic::Ordering::Release;
    ///
    /// map.write_all_at(b"a record", 4096)?;
    /// map.flush_range(4096..4104)?;           // durable before anything refers to it
    /// map.store(4104u64, 8, Release)?;        // from now on readers see it
    /// map.flush_range(8..16)?;                // and find it after a power cut
    /// # Ok(())
    /// # }
    /// ```
    pub fn store<T: Atomic>(&self, value: T, offset: usize, order: Ordering) -> Result<()> {
        self.check_value::<T>("store", offset, Access::Store)?;
        self.memory.store(offset, value, order);
        Ok(())
    }

    /// Adds to an integer, wrapping, and returns what it was before.
    ///
    /// # Errors
    ///
    /// As [`store`](Self::store).
    pub fn fetch_add<T: Atomic>(&self, value: T, offset: usize, order: Ordering) -> Result<T> {
        self.check_value::<T>("add", offset, Access::Store)?;
        Ok(self.memory.fetch_add(offset, value, order))
    }

    /// Stores `new` if the integer is `current`. The inner result is `Ok` with
    /// what it was if it was stored, and `Err` with what is there if not, as
    /// for the atomic types of the standard library.
    ///
    /// # Errors
    ///
    /// As [`store`](Self::store).
    ///
    /// # Panics
    ///
    /// If `failure` is [`Release`](Ordering::Release) or
    /// [`AcqRel`](Ordering::AcqRel).
    pub fn compare_exchange<T: Atomic>(
        &self,
        current: T,
        new: T,
        offset: usize,
        success: Ordering,
        failure: Ordering,
    ) -> Result<std::result::Result<T, T>> {
        self.check_value::<T>("store", offset, Access::Store)?;
        let orders = (success, failure);
        Ok(self.memory.compare_exchange(offset, (current, new), orders))
    }

    fn check_value<T: Atomic>(&self, what: &str, offset: usize, access: Access) -> Result<()> {
        self.check(what, offset, T::SIZE, access)?;
        if offset.is_multiple_of(T::SIZE) {
            return Ok(());
        }
        Err(misaligned(what, offset, T::SIZE))
    }

    /// Whether bytes may be accessed.
    #[inline]
    pub(super) fn check(
        &self,
        what: &str,
        offset: usize,
        count: usize,
        access: Access,
    ) -> Result<()> {
        self.check_bounds(what, offset, count)?;
        if access == Access::Store {
            self.check_writable(what)?;
        }
        self.check_access(what, offset, count, access)
    }

    #[inline]
    pub(super) fn check_bounds(&self, what: &str, offset: usize, count: usize) -> Result<()> {
        if self.held.hold().is_revoked() {
            return Err(self.revoked(what));
        }
        if self.memory.contains(offset, count) {
            return Ok(());
        }
        Err(self.out_of_bounds(what, offset, count))
    }

    #[inline]
    pub(super) fn check_writable(&self, what: &str) -> Result<()> {
        if self.is_read_only {
            return Err(read_only(what));
        }
        Ok(())
    }

    #[cold]
    pub(super) fn revoked(&self, what: &str) -> Error {
        let state = self.held.hold().state();
        Error::new(
            Kind::Breached,
            Errno::IO,
            format!("the mapping was revoked: {}", state.why()),
            "see what the file holds now, and map it again; DirectMap::integrity has the details",
        )
        .asking(what)
    }

    #[cold]
    fn out_of_bounds(&self, what: &str, offset: usize, count: usize) -> Error {
        Error::new(
            Kind::Arguments,
            Errno::INVAL,
            format!("the mapping ends at byte {}", self.len()),
            "stay inside the mapping",
        )
        .asking(format!("{what} {count} bytes at {offset}"))
    }

    /// A pointer would raise SIGBUS there; this says so.
    #[inline]
    fn check_access(&self, what: &str, offset: usize, count: usize, access: Access) -> Result<()> {
        if self.plan.is_stable() {
            return Ok(());
        }
        self.check_segments(what, offset, count, access)
    }

    fn check_segments(
        &self,
        what: &str,
        offset: usize,
        count: usize,
        access: Access,
    ) -> Result<()> {
        let start = self.offset + offset as u64;
        // A child of fork(2) can do no more with what is frozen than fault.
        let asked = if self.held.hold().is_own() {
            access
        } else {
            Access::Store
        };
        let Some((at, pages)) = self.plan.obstacle(start..start + count as u64, asked) else {
            return Ok(());
        };
        let map = self.held.block_map();
        let beyond = at >= map.file_size() && pages == Pages::Faulting;
        let state = map.find(at).map(|extent| extent.state);
        let error = if beyond {
            Error::new(
                Kind::Arguments,
                Errno::FAULT,
                format!(
                    "the file ended at byte {} when it was mapped",
                    map.file_size()
                ),
                "grow it, and map it again",
            )
        } else {
            let errno = match access {
                Access::Load => Errno::FAULT,
                Access::Store => Errno::TXTBSY,
            };
            let state = match (pages, state) {
                (Pages::Copied, _) | (_, None) => "frozen, with others in its page",
                (_, Some(state)) => state.name(),
            };
            Error::new(
                Kind::FrozenBlocks,
                errno,
                format!("byte {at} of the file lies in a block that is {state}"),
                "make it stable first: prepare it before it is mapped, or allocate under the pin",
            )
        };
        Err(error.asking(format!("{what} {count} bytes at {offset}")))
    }
}

/// The bytes of a range that does not end before it begins.
pub(super) fn length_of(what: &str, range: &Range<usize>) -> Result<usize> {
    range.end.checked_sub(range.start).ok_or_else(|| {
        Error::new(
            Kind::Arguments,
            Errno::INVAL,
            "the range ends before it begins",
            "give the smaller offset first",
        )
        .asking(format!("{what} bytes {} to {}", range.start, range.end))
    })
}

#[cold]
fn read_only(what: &str) -> Error {
    Error::new(
        Kind::NotReadWrite,
        Errno::ACCESS,
        "the mapping is read-only",
        "map the file without MapOptions::read_only",
    )
    .asking(what)
}

#[cold]
fn misaligned(what: &str, offset: usize, size: usize) -> Error {
    Error::new(
        Kind::Arguments,
        Errno::INVAL,
        format!("the offset is no multiple of {size}"),
        "align what is accessed as a whole",
    )
    .asking(format!("{what} {size} bytes at {offset}"))
}
