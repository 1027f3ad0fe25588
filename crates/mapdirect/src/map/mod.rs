//! Mapping a file `MAP_DIRECT`.

mod allocate;
mod bytes;
mod durability;
mod durable;
mod memory;
mod options;
mod place;
pub(crate) mod revoke;
mod segments;

pub use durability::Durability;
pub use options::MapOptions;
pub(crate) use options::cached_by_environment;
pub(crate) use place::How;

use crate::error::{Error, Result};
use crate::frozen::Frozen;
use crate::holder::{Connection, Hold};
use crate::plan::Plan;
use crate::state::{EventFd, Integrity, State};
use mapdirect_proto::{BlockMap, Extent};
use mapdirect_sys::{Errno, mmap};
use memory::Memory;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// A file range mapped `MAP_DIRECT`: while it exists, nobody can move, free,
/// share or allocate the blocks under it.
///
/// Offsets are bytes from the start of the mapping. The memory is shared with
/// whoever else maps or writes the file, so nothing here hands out a
/// reference to it but [`as_slice`](Self::as_slice) and
/// [`as_mut_slice`](Self::as_mut_slice), which are unsafe.
///
/// Dropping it unmaps the range. The pin ends when no process maps any of it.
#[must_use = "the pin ends when the mapping is dropped"]
pub struct DirectMap {
    memory: Memory,
    offset: u64,
    hold: Hold,
    map: BlockMap,
    plan: Plan,
    frozen: Option<Frozen>,
    /// Flags of `mmap(2)` that the file itself is mapped with.
    flags: i32,
    durability: Durability,
    /// The one by which it was asked for.
    connection: Arc<Connection>,
    released: bool,
}

// SAFETY: the memory belongs to the mapping, which any thread may unmap; all
// access to it is atomic.
unsafe impl Send for DirectMap {}
// SAFETY: shared access through `&self` is atomic, see `memory`.
unsafe impl Sync for DirectMap {}

impl DirectMap {
    /// Maps a whole file on DAX; short for [`MapOptions::map`].
    ///
    /// # Errors
    ///
    /// As [`MapOptions::map`].
    pub fn new(file: &impl AsFd) -> Result<Self> {
        MapOptions::new().map(file)
    }

    /// Length of the mapping in bytes, as asked for.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> usize {
        self.memory.length()
    }

    /// Offset in the file of the first byte mapped.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The first byte, for code that goes to the memory by itself: valid for
    /// [`len`](Self::len) bytes until the mapping is dropped. Others may
    /// store to it at any time. A store to a frozen block raises SIGBUS, and
    /// so does any access to a shared one or to pages beyond the end of the
    /// file.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.base().as_ptr()
    }

    /// The memory as a slice.
    ///
    /// # Safety
    ///
    /// While the slice exists nobody may change the bytes: no thread of this
    /// process by any way, no other process through a mapping of its own, no
    /// `write(2)` of anybody, no device. A pin does not see to that.
    #[must_use]
    pub unsafe fn as_slice(&self) -> &[u8] {
        // SAFETY: mapped for as long as `self` is borrowed; initialised, as
        // memory of the kernel is; unchanged, by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len()) }
    }

    /// The memory as a mutable slice.
    ///
    /// # Safety
    ///
    /// As [`as_slice`](Self::as_slice), and nobody else may read the bytes by
    /// way of Rust references either.
    #[must_use]
    pub unsafe fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr(), self.len()) }
    }

    /// The block map of the pinned range: what it was when the pin was
    /// granted, and stays while it is kept.
    #[must_use]
    pub fn block_map(&self) -> &BlockMap {
        &self.map
    }

    /// The extents of the pinned range; short for `block_map().extents()`.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        self.map.extents()
    }

    /// The number by which the guard knows the pin.
    #[must_use]
    pub fn pin_id(&self) -> u64 {
        self.hold.id()
    }

    /// Whether the pin is kept; see [`Pin::state`](crate::Pin::state).
    #[must_use]
    pub fn state(&self) -> State {
        self.hold.state()
    }

    /// Whether the blocks under the mapping are what they were; see
    /// [`Pin::integrity`](crate::Pin::integrity).
    ///
    /// When they are not, the mapping has been taken away, unless
    /// [`MapOptions::on_breach`] said otherwise: accesses by way of
    /// [`as_ptr`](Self::as_ptr) raise SIGBUS, and calls like
    /// [`read_at`](Self::read_at) fail with `EIO`. One that is under way at
    /// that moment raises SIGBUS. Offsets here are those of the file.
    #[must_use]
    pub fn integrity(&self) -> Integrity {
        self.hold.integrity()
    }

    /// A descriptor that becomes readable when [`state`](Self::state) or
    /// [`integrity`](Self::integrity) change; see
    /// [`Pin::event_fd`](crate::Pin::event_fd).
    ///
    /// # Errors
    ///
    /// `EMFILE`, `ENFILE`, `ENOMEM`.
    pub fn event_fd(&self) -> Result<EventFd> {
        self.hold.event_fd()
    }

    /// The old name of [`state`](Self::state).
    #[deprecated(note = "use `state`")]
    #[must_use]
    pub fn status(&self) -> State {
        self.state()
    }

    /// A descriptor that `poll(2)` reports a hang-up on (`POLLHUP`,
    /// `POLLRDHUP`) when the guard that granted the pin is gone. Nothing else
    /// may be done with it.
    #[deprecated(note = "use `event_fd`")]
    #[must_use]
    pub fn notice_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    /// Unmaps the range and says whether that worked, which dropping cannot.
    ///
    /// # Errors
    ///
    /// What `munmap(2)` answers.
    pub fn unmap(mut self) -> Result<()> {
        self.release()
            .map_err(|errno| Error::system("munmap", errno).asking("unmap"))
    }

    fn release(&mut self) -> std::result::Result<(), Errno> {
        if std::mem::replace(&mut self.released, true) {
            return Ok(());
        }
        let base = self.memory.base().as_ptr().expose_provenance();
        // From here on nobody else does anything to the memory.
        let keeper = self.hold.let_go();
        // SAFETY: only called, once, when the value goes away, so that
        // nothing of this crate refers to the memory any more; pointers
        // handed out say so in their documentation.
        let result = unsafe { mmap::unmap(base, self.memory.length()) };
        if self.frozen.take().is_some() {
            Frozen::settle();
        }
        drop(keeper);
        if self.hold.is_own() {
            self.hold.guard().ended(self.hold.gate(), self.hold.named());
        }
        result
    }
}

impl Drop for DirectMap {
    fn drop(&mut self) {
        // It cannot fail for a whole mapping that mmap returned; the kernel
        // would need memory only to split one.
        let _ = self.release();
    }
}

impl fmt::Debug for DirectMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirectMap")
            .field("address", &self.memory.base())
            .field("length", &self.len())
            .field("offset", &self.offset)
            .field("pin", &self.hold.id())
            .finish_non_exhaustive()
    }
}
