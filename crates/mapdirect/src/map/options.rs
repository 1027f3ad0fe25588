//! How to map a file.

use super::durable::Unsynced;
use super::memory::Memory;
use super::place::{How, Life, Placed, too_large};
use super::{DirectMap, durability, place, revoke};
use crate::again;
use crate::descriptor::size_of_file;
use crate::error::{Error, Result};
use crate::establish::{PATIENCE, Scope, Strength};
use crate::guard::Guard;
use crate::holder::{self, Held, Hold};
use crate::pin::with;
use crate::prepare;
use crate::state::OnBreach;
use mapdirect_proto::Flags;
use mapdirect_sys::{Errno, mmap};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::time::Duration;

/// How to map a file `MAP_DIRECT`.
///
/// # Examples
///
/// ```no_run
/// use mapdirect::MapOptions;
///
/// let file = std::fs::File::options().read(true).write(true).open("data")?;
/// let map = MapOptions::new()
///     .range(0..2 << 20)
///     .accept_page_cache(true)
///     .map(&file)?;
/// map.write_all_at(b"these bytes will not move", 4096)?;
/// map.flush_range(4096..4096 + 25)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "options do nothing until `map` is called"]
pub struct MapOptions {
    range: Option<Range<u64>>,
    scope: Scope,
    also: Flags,
    strength: Strength,
    read_only: bool,
    cached: Option<bool>,
    prepare_first: bool,
    populate: bool,
    patience: Duration,
    on_breach: OnBreach,
    guard: Option<Guard>,
}

impl Default for MapOptions {
    /// [`MapOptions::new`].
    fn default() -> Self {
        Self::new()
    }
}

impl MapOptions {
    /// The whole file as it is now, for reading and writing, on DAX only.
    pub fn new() -> Self {
        Self {
            range: None,
            scope: Scope::Range,
            also: Flags::NONE,
            strength: Strength::All,
            read_only: false,
            cached: None,
            prepare_first: false,
            populate: false,
            patience: PATIENCE,
            on_breach: OnBreach::default(),
            guard: None,
        }
    }

    /// Maps this range of the file, in bytes. It must begin on a page boundary,
    /// and may end anywhere, also beyond the end of the file.
    pub fn range(mut self, range: Range<u64>) -> Self {
        self.range = Some(range);
        self
    }

    /// Pins the range (the default), or the whole file and its size.
    pub fn scope(mut self, scope: Scope) -> Self {
        self.scope = scope;
        self
    }

    /// Gives the descendants of this process the rights of a holder; see
    /// [`PinOptions::family`](crate::PinOptions::family).
    pub fn family(mut self, family: bool) -> Self {
        self.also = with(self.also, Flags::FAMILY, family);
        self
    }

    /// Denies writing to everybody but this process and its descendants; see
    /// [`PinOptions::deny_write`](crate::PinOptions::deny_write).
    pub fn deny_write(mut self, deny: bool) -> Self {
        self.also = with(self.also, Flags::DENY_WRITE, deny);
        self
    }

    /// Denies that a name of the file goes; see
    /// [`PinOptions::deny_rename`](crate::PinOptions::deny_rename).
    pub fn deny_rename(mut self, deny: bool) -> Self {
        self.also = with(self.also, Flags::DENY_RENAME, deny);
        self
    }

    /// Holds everything in the range (the default), or only what is stable or
    /// becomes so.
    ///
    /// With [`Strength::Stable`] the whole range is the file itself: a store to
    /// a hole allocates, and an access behind the end of the file raises SIGBUS,
    /// as in any mapping, until the file has grown. Calls like
    /// [`write_all_at`](DirectMap::write_all_at) fail with `EFAULT` for bytes
    /// that were behind the end of the file when it was mapped, and
    /// [`DirectMap::refresh`] has them look again.
    pub fn strength(mut self, strength: Strength) -> Self {
        self.strength = strength;
        self
    }

    /// Maps for reading alone: for readers who fear that somebody truncates
    /// the file under them.
    ///
    /// The file may be open for reading only. Nobody can truncate, punch or
    /// move what is mapped, so no load inside the file raises SIGBUS. Holes and
    /// unwritten blocks read as zeros and shared blocks as what is in them. What
    /// the bytes are is up to whoever writes them. Every store fails with
    /// `EACCES` ([`Kind::NotReadWrite`](crate::Kind::NotReadWrite)), and so does
    /// flushing: there is nothing of this process to be made durable. The page
    /// cache needs no accepting.
    ///
    /// With the fanotify gate, such a pin lives by a descriptor of this process
    /// besides the mapping. A program that closes descriptors it does not know
    /// ends it, and so does `exec`. With that gate, give a descriptor that is
    /// open for reading only: one that can write counts as a writer whom others
    /// may have.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use mapdirect::MapOptions;
    ///
    /// let file = std::fs::File::open("index")?;
    /// let map = MapOptions::new().read_only(true).map(&file)?;
    /// let mut magic = [0; 8];
    /// map.read_exact_at(&mut magic, 0)?;
    /// assert_eq!(map.write_all_at(b"x", 0).unwrap_err().errno_name(), "EACCES");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Accepts the page cache if the file has no DAX: the block map is pinned
    /// all the same, stores go through the page cache, and flushing means
    /// `msync(2)`.
    ///
    /// Unless this is called, `MAPDIRECT_CACHED=1` in the environment says yes,
    /// except in a program that runs with more privilege than its caller
    /// (`AT_SECURE` of getauxval(3)).
    pub fn accept_page_cache(mut self, accept: bool) -> Self {
        self.cached = Some(accept);
        self
    }

    /// Prepares the range before it is pinned ([`PrepareOptions`]): then all of
    /// it that is in the file can be stored to.
    ///
    /// [`PrepareOptions`]: crate::PrepareOptions
    pub fn prepare_first(mut self, prepare: bool) -> Self {
        self.prepare_first = prepare;
        self
    }

    /// Faults the pages in at once (`MAP_POPULATE`).
    pub fn populate(mut self, populate: bool) -> Self {
        self.populate = populate;
        self
    }

    /// How long to wait for others who have the file open to let go of it. The
    /// default is a tenth of a second, the most a minute.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// What becomes of the mapping when blocks under it have changed all the
    /// same, in a way that no gate refuses. The default is to take it away.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use mapdirect::{MapOptions, OnBreach};
    ///
    /// let file = std::fs::File::options().read(true).write(true).open("data")?;
    /// let map = MapOptions::new().on_breach(OnBreach::Tell).map(&file)?;
    /// assert!(map.integrity().is_intact());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn on_breach(mut self, on_breach: OnBreach) -> Self {
        self.on_breach = on_breach;
        self
    }

    /// Asks this guard instead of the one of the environment.
    pub fn guard(mut self, guard: Guard) -> Self {
        self.guard = Some(guard);
        self
    }

    /// Pins the range and maps it.
    ///
    /// `file` must be open for reading and writing, unless the mapping is
    /// [`read_only`](Self::read_only). It may be closed afterwards: the pin
    /// lives until the last mapping made here is gone, including one that a
    /// child of `fork(2)` has. If the file was opened before any pin on it, its
    /// descriptor gets a new open file description with the same flags,
    /// position and locks, which cannot escape the gate.
    ///
    /// # Errors
    ///
    /// What `mmap(2)` with `MAP_DIRECT` answers, see [`raw::mmap`]; the error
    /// says more. With [`prepare_first`](Self::prepare_first), what
    /// [`PrepareOptions::prepare`](crate::PrepareOptions::prepare) answers as
    /// well.
    ///
    /// [`raw::mmap`]: crate::raw::mmap
    pub fn map(&self, file: impl AsFd) -> Result<DirectMap> {
        let file = file.as_fd();
        let range = match &self.range {
            Some(range) => range.clone(),
            None => 0..size_of_file(file)?,
        };
        let how = self.how();
        // SAFETY: without MAP_FIXED a mapping takes no place that is in use.
        let mapped = unsafe { self.map_range(file, &range, how) };
        mapped.map_err(|error| {
            let path = mapdirect_sys::proc::shown_path_of(file);
            error.asking(format!(
                "map bytes {} to {} of {path} MAP_DIRECT",
                range.start, range.end
            ))
        })
    }

    /// The same with the arguments of `mmap(2)`.
    ///
    /// # Safety
    ///
    /// With `MAP_FIXED` nothing may refer to what was mapped at `address`.
    pub(crate) unsafe fn map_as_asked(
        &self,
        (address, length): (usize, usize),
        (prot, flags): (i32, i32),
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<DirectMap> {
        let how = How {
            prot: prot | mmap::PROT_READ,
            flags,
            address,
            ..self.how()
        };
        place::check_range(offset, length)?;
        place::check_prot(prot)?;
        let is_page = (address as u64).is_multiple_of(mmap::page_size());
        if flags & (mmap::MAP_FIXED | mmap::MAP_FIXED_NOREPLACE) != 0 && !is_page {
            return Err(Error::system("mmap", Errno::INVAL));
        }
        // SAFETY: the caller's promise.
        unsafe { self.map_range(file, &(offset..offset + length as u64), how) }
    }

    /// # Safety
    ///
    /// With `MAP_FIXED` as [`map_as_asked`](Self::map_as_asked).
    unsafe fn map_range(
        &self,
        file: BorrowedFd<'_>,
        range: &Range<u64>,
        how: How,
    ) -> Result<DirectMap> {
        let length = range.end.saturating_sub(range.start);
        let length = usize::try_from(length).map_err(|_| too_large())?;
        if let Some(map) = self.map_again(file, range, &how) {
            return Ok(map);
        }
        let durability = durability::of(file).map_err(|errno| Error::system("statx", errno))?;
        if self.prepare_first {
            prepare::before_pin(file, Some(range))?;
        }
        let placed = if self.read_only {
            how.place_for_reading(file, range.start, length)?
        } else {
            // SAFETY: the caller's promise.
            unsafe { how.place(file, range.start, length) }?
        };
        let base = NonNull::new(std::ptr::with_exposed_provenance_mut(placed.address))
            .ok_or_else(|| Error::system("mmap (address 0)", Errno::INVAL))?;
        // SAFETY: mmap returned whole pages at a page boundary, readable, and
        // writable unless the mapping is read-only, when nothing but loads is
        // done to them; the DirectMap unmaps them when it is dropped, and gives
        // the memory to nobody who outlives it.
        let memory = unsafe { Memory::new(base, length) };
        let hold = self.watch(&placed, &how.guard, range.start, length)?;
        let mut map = DirectMap {
            memory,
            offset: range.start,
            held: Held::new(hold, placed.connection, placed.map),
            plan: placed.plan,
            frozen: placed.frozen,
            flags: placed.flags,
            durability,
            unsynced: Unsynced::default(),
            is_read_only: self.read_only,
            strength: self.strength,
            life: placed.life,
            shape: self.shape(range, &how),
            released: false,
        };
        if self.prepare_first && !self.read_only && self.strength == Strength::All {
            // Somebody may have changed it again before it was pinned.
            map.allocate_in_file()?;
        }
        Ok(map)
    }

    /// What a mapping has in common with an earlier one that it may go on
    /// from; only those to store to, of ranges, can.
    fn shape(&self, range: &Range<u64>, how: &How) -> Option<again::Shape> {
        let can_sleep = self.scope == Scope::Range
            && self.strength == Strength::All
            && self.also == Flags::NONE
            && how.address == 0
            && how.flags & !mmap::MAP_POPULATE == 0
            && how.prot == mmap::PROT_READ | mmap::PROT_WRITE;
        (can_sleep && !self.read_only).then(|| again::Shape {
            guard: how.guard.clone(),
            range: range.clone(),
            flags: how.flags,
            cached: how.cached,
        })
    }

    /// Maps what was mapped a moment ago, without asking the guard.
    fn map_again(&self, file: BorrowedFd<'_>, range: &Range<u64>, how: &How) -> Option<DirectMap> {
        let shape = self.shape(range, how)?;
        let (address, known) = again::map(file, &shape, self.on_breach)?;
        let base = NonNull::new(std::ptr::with_exposed_provenance_mut(address))?;
        let length = usize::try_from(range.end - range.start).ok()?;
        // SAFETY: as in `map_range`.
        let memory = unsafe { Memory::new(base, length) };
        Some(DirectMap {
            memory,
            offset: range.start,
            held: known.held,
            plan: known.plan,
            frozen: None,
            flags: mmap::MAP_SHARED | how.flags,
            durability: known.durability,
            unsynced: Unsynced::default(),
            is_read_only: false,
            strength: self.strength,
            life: Life::default(),
            shape: Some(shape),
            released: false,
        })
    }

    fn how(&self) -> How {
        How {
            prot: mmap::PROT_READ | mmap::PROT_WRITE,
            flags: if self.populate { mmap::MAP_POPULATE } else { 0 },
            address: 0,
            scope: self.scope,
            also: self.also,
            strength: self.strength,
            cached: self.cached.unwrap_or_else(cached_by_environment),
            patience: self.patience,
            guard: self.guard.clone().unwrap_or_default(),
        }
    }

    /// Has a mapping watched from now on; unmaps it if that cannot be.
    fn watch(&self, placed: &Placed, guard: &Guard, offset: u64, length: usize) -> Result<Hold> {
        let to_revoke = revoke::Memory {
            base: placed.address,
            length,
            stable: placed.plan.first_stable().and_then(|stable| {
                let past = usize::try_from(stable - offset).ok()?;
                Some(placed.address + past)
            }),
        };
        let gate = placed.connection.gate();
        let hold = Hold::new(placed.named, guard, gate, self.on_breach, Some(to_revoke));
        hold.inspect_err(|_| {
            // SAFETY: mapped by the caller, and handed to nobody.
            let _ = unsafe { mmap::unmap(placed.address, length) };
        })
    }
}

/// `MAPDIRECT_CACHED=1` in the environment; ignored by a program that runs
/// with more privilege than its caller (`AT_SECURE` of getauxval(3)), which is
/// not for the caller to loosen.
pub(crate) fn cached_by_environment() -> bool {
    holder::environment("MAPDIRECT_CACHED").is_some_and(|value| value == "1")
}
