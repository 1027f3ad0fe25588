//! A part of a mapping.

use super::DirectMap;
use super::bytes::{Atomic, length_of};
use crate::error::{Error, Kind, Result};
use mapdirect_sys::Errno;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// A part of a [`DirectMap`], with offsets of its own: what `&[u8]` is to
/// memory that nobody else changes.
///
/// It is a borrow of the mapping and a range, small and `Copy`, and never a
/// reference to the memory itself. Hand it to code that shall see no more than
/// its part. Offsets are bytes from the start of the slice.
///
/// # Examples
///
/// ```no_run
/// # fn example(map: &mapdirect::DirectMap) -> mapdirect::Result<()> {
/// let header = map.slice(0..64)?;
/// let name = header.slice(16..32)?;
/// name.write_all_at(b"journal", 0)?;
/// header.flush()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct VolatileSlice<'map> {
    map: &'map DirectMap,
    start: usize,
    length: usize,
}

impl DirectMap {
    /// A part of the mapping, as a value of its own. `range` counts bytes from
    /// the start of the mapping.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the range is not inside the mapping.
    pub fn slice(&self, range: Range<usize>) -> Result<VolatileSlice<'_>> {
        self.as_volatile_slice().slice(range)
    }

    /// All of the mapping as a [`VolatileSlice`].
    #[must_use]
    pub fn as_volatile_slice(&self) -> VolatileSlice<'_> {
        VolatileSlice {
            map: self,
            start: 0,
            length: self.len(),
        }
    }
}

impl<'map> VolatileSlice<'map> {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// A part of the slice.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the range is not inside the slice.
    pub fn slice(&self, range: Range<usize>) -> Result<VolatileSlice<'map>> {
        let length = length_of("take", &range)?;
        Ok(Self {
            map: self.map,
            start: self.within("take", range.start, length)?,
            length,
        })
    }

    /// The slice before `middle`, and the slice from there on.
    ///
    /// # Errors
    ///
    /// `EINVAL` if `middle` is beyond the end.
    pub fn split_at(&self, middle: usize) -> Result<(VolatileSlice<'map>, VolatileSlice<'map>)> {
        Ok((self.slice(0..middle)?, self.slice(middle..self.length)?))
    }

    /// The first byte; see [`DirectMap::as_ptr`]. Dangling if the slice is
    /// empty.
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        self.map.as_ptr().wrapping_add(self.start)
    }

    /// The first byte, for writing; see [`DirectMap::as_mut_ptr`].
    #[must_use]
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr().wrapping_add(self.start)
    }

    /// See [`DirectMap::read_exact_at`].
    ///
    /// # Errors
    ///
    /// As there, and `EINVAL` if the bytes are not all inside the slice.
    pub fn read_exact_at(&self, buf: &mut [u8], offset: usize) -> Result<()> {
        let at = self.within("read", offset, buf.len())?;
        self.map.read_exact_at(buf, at)
    }

    /// See [`DirectMap::write_all_at`].
    ///
    /// # Errors
    ///
    /// As there, and `EINVAL` if the bytes are not all inside the slice.
    pub fn write_all_at(&self, buf: &[u8], offset: usize) -> Result<()> {
        let at = self.within("write", offset, buf.len())?;
        self.map.write_all_at(buf, at)
    }

    /// Fills the slice with one byte.
    ///
    /// # Errors
    ///
    /// As [`DirectMap::fill`].
    pub fn fill(&self, byte: u8) -> Result<()> {
        self.map.fill(self.start..self.start + self.length, byte)
    }

    /// See [`DirectMap::load`]. What counts for the alignment is the place in
    /// the mapping.
    ///
    /// # Errors
    ///
    /// As there, and `EINVAL` if the integer is not inside the slice.
    ///
    /// # Panics
    ///
    /// As there.
    pub fn load<T: Atomic>(&self, offset: usize, order: Ordering) -> Result<T> {
        let at = self.within("load", offset, size_of::<T>())?;
        self.map.load(at, order)
    }

    /// See [`DirectMap::store`]. What counts for the alignment is the place in
    /// the mapping.
    ///
    /// # Errors
    ///
    /// As there, and `EINVAL` if the integer is not inside the slice.
    ///
    /// # Panics
    ///
    /// As there.
    pub fn store<T: Atomic>(&self, value: T, offset: usize, order: Ordering) -> Result<()> {
        let at = self.within("store", offset, size_of::<T>())?;
        self.map.store(value, at, order)
    }

    /// See [`DirectMap::fetch_add`].
    ///
    /// # Errors
    ///
    /// As [`store`](Self::store).
    pub fn fetch_add<T: Atomic>(&self, value: T, offset: usize, order: Ordering) -> Result<T> {
        let at = self.within("add", offset, size_of::<T>())?;
        self.map.fetch_add(value, at, order)
    }

    /// See [`DirectMap::compare_exchange`].
    ///
    /// # Errors
    ///
    /// As [`store`](Self::store).
    ///
    /// # Panics
    ///
    /// As there.
    pub fn compare_exchange<T: Atomic>(
        &self,
        current: T,
        new: T,
        offset: usize,
        success: Ordering,
        failure: Ordering,
    ) -> Result<std::result::Result<T, T>> {
        let at = self.within("store", offset, size_of::<T>())?;
        self.map
            .compare_exchange(current, new, at, success, failure)
    }

    /// Makes what was stored to the slice durable; see
    /// [`DirectMap::flush_range`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn flush(&self) -> Result<()> {
        self.map.flush_range(self.start..self.start + self.length)
    }

    /// Starts writing the slice back; see [`DirectMap::flush_async_range`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn flush_async(&self) -> Result<()> {
        self.map
            .flush_async_range(self.start..self.start + self.length)
    }

    /// Where bytes of the slice are in the mapping.
    fn within(&self, what: &str, offset: usize, count: usize) -> Result<usize> {
        if offset <= self.length && count <= self.length - offset {
            return Ok(self.start + offset);
        }
        Err(Error::new(
            Kind::Arguments,
            Errno::INVAL,
            format!("the slice ends at byte {}", self.length),
            "stay inside the slice",
        )
        .asking(format!("{what} {count} bytes at {offset}")))
    }
}
