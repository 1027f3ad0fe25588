//! Mapping a file `MAP_DIRECT`.

mod advise;
mod allocate;
mod bytes;
mod durability;
mod durable;
mod memory;
mod options;
mod place;
pub(crate) mod revoke;
pub(crate) mod segments;
mod slice;

pub use advise::Advice;
pub use bytes::Atomic;
pub use durability::Durability;
pub use durable::Flusher;
pub use options::MapOptions;
pub(crate) use options::cached_by_environment;
pub(crate) use place::How;
pub use slice::VolatileSlice;

use crate::again;
use crate::error::{Error, Kind, Result};
use crate::establish::Strength;
use crate::frozen::Frozen;
use crate::holder::Held;
use crate::state::{EventFd, Integrity, State};
use durable::Unsynced;
use mapdirect_model::plan::Plan;
use mapdirect_proto::{BlockMap, Extent};
use mapdirect_sys::{Errno, mmap};
use memory::Memory;
use place::Life;
use std::fmt;
use std::os::fd::AsFd;

/// A file range mapped `MAP_DIRECT`: while it exists, nobody can move, free,
/// share or allocate the blocks under it.
///
/// **Offsets** in memory are bytes from the start of the mapping (`usize`);
/// everything about blocks counts bytes of the file (`u64`). The memory is
/// shared with everybody who maps or writes the file, so no safe call hands out
/// a reference to it: see [the crate's documentation](crate#no-deref).
///
/// **Ending it.** Dropping the mapping unmaps the range; [`unmap`](Self::unmap)
/// does the same and reports errors. The pin ends when no process maps any of
/// it: a child of `fork(2)` has its own. With the bpf gate, dropping waits until
/// the guard has confirmed the end, **up to a second** if the guard is stuck.
///
/// # Examples
///
/// ```no_run
/// use mapdirect::{DirectMap, MapOptions};
///
/// let file = std::fs::File::options().read(true).write(true).open("data")?;
/// let map: DirectMap = MapOptions::new().accept_page_cache(true).map(&file)?;
/// map.write_all_at(b"hello", 0)?;
/// map.flush_range(0..5)?;
/// map.unmap()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "the pin ends when the mapping is dropped"]
pub struct DirectMap {
    memory: Memory,
    offset: u64,
    held: Held,
    plan: Plan,
    frozen: Option<Frozen>,
    /// Flags of `mmap(2)` that the file itself is mapped with.
    flags: i32,
    durability: Durability,
    unsynced: Unsynced,
    is_read_only: bool,
    strength: Strength,
    life: Life,
    /// What another mapping must have in common with it to go on from it.
    shape: Option<again::Shape>,
    released: bool,
}

// SAFETY: the memory belongs to the mapping, which any thread may unmap; all
// access to it is atomic.
unsafe impl Send for DirectMap {}
// SAFETY: shared access through `&self` is atomic, see `memory`.
unsafe impl Sync for DirectMap {}

impl DirectMap {
    /// Maps a whole file on DAX, for reading and writing; short for
    /// [`MapOptions::map`].
    ///
    /// # Errors
    ///
    /// As [`MapOptions::map`].
    pub fn new(file: impl AsFd) -> Result<Self> {
        MapOptions::new().map(file)
    }

    /// Length of the mapping in bytes, as asked for.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> usize {
        self.memory.length()
    }

    /// Offset in the file of the first byte mapped, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether it was mapped for reading alone
    /// ([`MapOptions::read_only`]): then every store fails with `EACCES`.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// The first byte, for reading by code that goes to the memory by itself.
    ///
    /// It is valid for [`len`](Self::len) bytes until the mapping is dropped.
    /// Others may store there at any time, so read with volatile or atomic
    /// loads. A load from a shared block (of a mapping that is not read-only)
    /// or a page beyond the end of the file raises SIGBUS.
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        self.memory.base().as_ptr()
    }

    /// The first byte, for reading and writing.
    ///
    /// As [`as_ptr`](Self::as_ptr). A store to a frozen block raises SIGBUS, a
    /// store to a read-only mapping SIGSEGV.
    #[must_use]
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.memory.base().as_ptr()
    }

    /// The memory as a slice. With [`as_mut_slice`](Self::as_mut_slice) this is
    /// the only way to a reference.
    ///
    /// # Safety
    ///
    /// While the slice exists nobody may change the bytes: no thread of this
    /// process in any way, no other process through a mapping of its own, no
    /// `write(2)` of anybody, no device. **A pin does not see to that**: it
    /// keeps blocks where they are, and says nothing of bytes. Parts that
    /// cannot be accessed raise SIGBUS, see [`as_ptr`](Self::as_ptr).
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
    ///
    /// # Panics
    ///
    /// If the mapping is read-only.
    #[must_use]
    pub unsafe fn as_mut_slice(&mut self) -> &mut [u8] {
        assert!(!self.is_read_only, "the mapping is read-only");
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), self.len()) }
    }

    /// The block map of the pinned range: what it was when the pin was
    /// granted, and stays while it is kept. Its offsets count bytes of the
    /// file; the range is extended to whole filesystem blocks.
    #[must_use]
    pub fn block_map(&self) -> &BlockMap {
        self.held.block_map()
    }

    /// The extents of the pinned range; short for `block_map().extents()`.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        self.block_map().extents()
    }

    /// Has calls like [`write_all_at`](Self::write_all_at) reach what a file has
    /// grown by since it was mapped with [`Strength::Stable`]. `file` is any
    /// descriptor of it. A mapping of the other strength stays as it is.
    ///
    /// [`block_map`](Self::block_map) goes on telling what was held when the pin
    /// was granted.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it is another file; errors of `fstat(2)`.
    pub fn refresh(&mut self, file: impl AsFd) -> Result<()> {
        if self.strength == Strength::All {
            return Ok(());
        }
        let stat = rustix::fs::fstat(file)
            .map_err(|errno| Error::system("fstat", errno).asking("look at the file again"))?;
        let named = self.held.hold().named();
        if (stat.st_dev, stat.st_ino) != (named.device, named.inode) {
            return Err(Error::new(
                Kind::Arguments,
                Errno::INVAL,
                "it is not the file that is mapped",
                "give a descriptor of the file that was mapped",
            )
            .asking("look at the file again"));
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let length = self.len() as u64;
        self.plan = place::plan_of_size(self.held.block_map(), size, self.offset, length);
        Ok(())
    }

    /// The number by which the guard knows the pin.
    #[must_use]
    pub fn pin_id(&self) -> u64 {
        self.held.hold().id()
    }

    /// Whether the pin is kept; see [`Pin::state`](crate::Pin::state).
    #[must_use]
    pub fn state(&self) -> State {
        self.held.hold().state()
    }

    /// Whether the blocks under the mapping are what they were; see
    /// [`Pin::integrity`](crate::Pin::integrity). Its offsets count bytes of the
    /// file.
    ///
    /// When they are not, the mapping has been taken away, unless
    /// [`MapOptions::on_breach`] said otherwise: accesses by way of
    /// [`as_ptr`](Self::as_ptr) raise SIGBUS, and calls like
    /// [`read_exact_at`](Self::read_exact_at) fail with `EIO`. A call that is
    /// under way at that moment raises SIGBUS.
    #[must_use]
    pub fn integrity(&self) -> Integrity {
        self.held.hold().integrity()
    }

    /// What has become of names of the file; see
    /// [`Pin::renames`](crate::Pin::renames).
    #[must_use]
    pub fn renames(&self) -> Vec<String> {
        self.held.hold().renames()
    }

    /// Connects to the guard again now, if none tends the pin; see
    /// [`Pin::reconnect`](crate::Pin::reconnect).
    ///
    /// # Errors
    ///
    /// As there.
    pub fn reconnect(&self) -> Result<State> {
        self.held.hold().reconnect()
    }

    /// A descriptor that becomes readable when [`state`](Self::state) or
    /// [`integrity`](Self::integrity) change; see
    /// [`Pin::event_fd`](crate::Pin::event_fd).
    ///
    /// # Errors
    ///
    /// `EMFILE`, `ENFILE`, `ENOMEM`.
    pub fn event_fd(&self) -> Result<EventFd> {
        self.held.hold().event_fd()
    }

    /// Unmaps the range, ends this process's part in the pin, and says whether
    /// that worked, which dropping cannot.
    ///
    /// # Errors
    ///
    /// What `munmap(2)` answers; `ETIMEDOUT` when the guard has not confirmed
    /// the end within a second (bpf gate). The memory is unmapped all the same
    /// then, and the pin ends by itself.
    pub fn unmap(mut self) -> Result<()> {
        self.release().map_err(|error| error.asking("unmap"))
    }

    fn release(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.released, true) {
            return Ok(());
        }
        let base = self.memory.base().as_ptr().expose_provenance();
        // From here on nobody else does anything to the memory.
        let asleep = self.fall_asleep();
        let keeper = self.held.let_go();
        // The guard looks when the last mapping is gone.
        drop(self.life.pipe.take());
        // SAFETY: only called, once, when the value goes away, so that
        // nothing of this crate refers to the memory any more; pointers
        // handed out say so in their documentation.
        let result = unsafe { mmap::unmap(base, self.memory.length()) };
        if self.frozen.take().is_some() {
            Frozen::settle();
        }
        drop(keeper);
        self.life = Life::default();
        if asleep.is_some() {
            self.held.ends_by_itself();
        }
        let ended = self.held.end();
        if let (Some(held), Some(shape), Ok(())) = (asleep, self.shape.take(), &result) {
            again::keep(again::Known {
                shape,
                held,
                plan: self.plan.clone(),
                durability: self.durability,
            });
        }
        result.map_err(|errno| Error::system("munmap", errno))?;
        ended
    }

    /// The pin, for a mapping that goes on from this one, if one may.
    fn fall_asleep(&mut self) -> Option<Held> {
        if self.shape.is_none() || self.frozen.is_some() || !self.plan.is_stable() {
            return None;
        }
        self.held.fall_asleep()
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
            .field("pin", &self.pin_id())
            .finish_non_exhaustive()
    }
}
