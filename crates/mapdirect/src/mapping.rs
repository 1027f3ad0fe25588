//! Mapping a file `MAP_DIRECT`.

use crate::access::Memory;
use crate::durability::{self, Durability};
use crate::error::{Error, Kind, Result};
use crate::establish::{Established, PATIENCE, Scope, establish};
use crate::frozen::Frozen;
use crate::guard::{Connection, Guard};
use crate::state::{EventFd, Integrity, OnBreach, State};
use crate::watch::Hold;
use crate::{again, prepare, revoke, segments};
use mapdirect_model::plan::{Access, Pages, Plan};
use mapdirect_proto::{BlockMap, Extent, Flags, WatchedPin};
use mapdirect_sys::{Errno, cache, mmap};
use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;
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
/// map.write_at(4096, b"these bytes will not move")?;
/// map.persist(4096..4096 + 25)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "options do nothing until `map` is called"]
pub struct MapOptions {
    range: Option<Range<u64>>,
    scope: Scope,
    cached: Option<bool>,
    prepare: bool,
    populate: bool,
    patience: Duration,
    on_breach: OnBreach,
    guard: Option<Guard>,
}

impl Default for MapOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl MapOptions {
    /// The whole file as it is now, on DAX only.
    pub fn new() -> Self {
        Self {
            range: None,
            scope: Scope::Range,
            cached: None,
            prepare: false,
            populate: false,
            patience: PATIENCE,
            on_breach: OnBreach::default(),
            guard: None,
        }
    }

    /// Maps this range of bytes. It must begin on a page boundary.
    pub fn range(mut self, range: Range<u64>) -> Self {
        self.range = Some(range);
        self
    }

    /// Pins the range (the default) or the whole file and its size.
    pub fn scope(mut self, scope: Scope) -> Self {
        self.scope = scope;
        self
    }

    /// Accepts the page cache where the file has no DAX: the block map is
    /// pinned all the same, stores go through the page cache, and
    /// [`DirectMap::persist`] means `msync(2)`. Unless this is called,
    /// `MAPDIRECT_CACHED=1` in the environment says yes, except in a program
    /// that runs with more privilege than its caller (`AT_SECURE` of
    /// getauxval(3)).
    pub fn accept_page_cache(mut self, accept: bool) -> Self {
        self.cached = Some(accept);
        self
    }

    /// Prepares the range before it is pinned, as
    /// [`PrepareOptions`](crate::PrepareOptions) does: then all of it that is
    /// in the file can be stored to.
    pub fn prepare(mut self, prepare: bool) -> Self {
        self.prepare = prepare;
        self
    }

    /// Prefaults the pages (`MAP_POPULATE`).
    pub fn populate(mut self, populate: bool) -> Self {
        self.populate = populate;
        self
    }

    /// How long to wait for others who have the file open to let go of it; a
    /// tenth of a second unless told otherwise, a minute at most.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// What becomes of the mapping when blocks under it have changed all the
    /// same, by a way that no gate refuses: it is taken away unless told
    /// otherwise.
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

    /// Pins the range and maps it for reading and writing.
    ///
    /// `file` must be open for reading and writing. It may be closed
    /// afterwards: the pin lives until the last mapping made here is gone,
    /// also one a child of `fork(2)` has. If the file was opened before any
    /// pin on it, its descriptor gets a new open file description with the
    /// same flags, position and locks, which cannot escape the gate.
    ///
    /// # Errors
    ///
    /// What `mmap(2)` with `MAP_DIRECT` answers, see [`raw::mmap`]; the error
    /// says more. With [`prepare`](Self::prepare), what that answers as well.
    ///
    /// [`raw::mmap`]: crate::raw::mmap
    pub fn map(&self, file: &impl AsFd) -> Result<DirectMap> {
        let file = file.as_fd();
        let asked = |range: &Range<u64>| {
            let path = mapdirect_sys::proc::path_of(file);
            format!(
                "map bytes {} to {} of {path} MAP_DIRECT",
                range.start, range.end
            )
        };
        let range = match &self.range {
            Some(range) => range.clone(),
            None => 0..size_of_file(file)?,
        };
        let length = range.end.saturating_sub(range.start);
        let length = usize::try_from(length).map_err(|_| too_large().asking(asked(&range)))?;
        let how = How {
            prot: mmap::PROT_READ | mmap::PROT_WRITE,
            flags: if self.populate { mmap::MAP_POPULATE } else { 0 },
            address: 0,
            scope: self.scope,
            cached: self.cached.unwrap_or_else(cached_by_environment),
            patience: self.patience,
            guard: self.guard.clone().unwrap_or_default(),
        };
        if let Some(map) = self.map_again(file, &range, &how) {
            return Ok(map);
        }
        let durability = durability::of(file)
            .map_err(|errno| Error::system("statx", errno).asking(asked(&range)))?;
        if self.prepare {
            prepare::before_pin(file, Some(&range)).map_err(|error| error.asking(asked(&range)))?;
        }
        // SAFETY: without MAP_FIXED a mapping takes no place that is in use.
        let placed = unsafe { how.place(file, range.start, length) }
            .map_err(|error| error.asking(asked(&range)))?;
        let base = NonNull::new(std::ptr::with_exposed_provenance_mut(placed.address))
            .ok_or_else(|| Error::system("mmap (address 0)", Errno::INVAL))?;
        // SAFETY: mmap returned whole pages at a page boundary, readable and
        // writable; the DirectMap unmaps them when it is dropped, and gives
        // the memory to nobody who outlives it.
        let memory = unsafe { Memory::new(base, length) };
        let gate = placed.connection.gate();
        let to_revoke = revoke::Memory {
            base: placed.address,
            length,
            stable: placed.plan.first_stable().and_then(|offset| {
                let past = usize::try_from(offset - range.start).ok()?;
                Some(placed.address + past)
            }),
        };
        let hold = Hold::new(
            placed.named,
            &how.guard,
            gate,
            self.on_breach,
            Some(to_revoke),
        );
        let hold = hold.map_err(|error| {
            // SAFETY: mapped above, and handed to nobody.
            let _ = unsafe { mmap::unmap(placed.address, length) };
            error.asking(asked(&range))
        })?;
        let mut map = DirectMap {
            memory,
            offset: range.start,
            hold,
            map: placed.map,
            plan: placed.plan,
            frozen: placed.frozen,
            flags: placed.flags,
            durability,
            connection: placed.connection,
            shape: self.shape(&range, &how),
            released: false,
        };
        if self.prepare {
            // Somebody may have changed it again before it was pinned.
            map.allocate_in_file()
                .map_err(|error| error.asking(asked(&range)))?;
        }
        Ok(map)
    }

    /// What a mapping has in common with an earlier one that it may go on
    /// from; only pins of ranges can.
    fn shape(&self, range: &Range<u64>, how: &How) -> Option<again::Shape> {
        (self.scope == Scope::Range).then(|| again::Shape {
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
        // SAFETY: as in `map`.
        let memory = unsafe { Memory::new(base, length) };
        Some(DirectMap {
            memory,
            offset: range.start,
            hold: known.hold,
            map: known.map,
            plan: known.plan,
            frozen: None,
            flags: mmap::MAP_SHARED | how.flags,
            durability: known.durability,
            connection: known.connection,
            shape: Some(shape),
            released: false,
        })
    }
}

fn size_of_file(file: BorrowedFd<'_>) -> Result<u64> {
    let stat = rustix::fs::fstat(file).map_err(|errno| Error::system("fstat", errno))?;
    u64::try_from(stat.st_size).map_err(|_| Error::system("fstat", Errno::OVERFLOW))
}

/// `MAPDIRECT_CACHED=1` in the environment; ignored by a program that runs
/// with more privilege than its caller (`AT_SECURE` of getauxval(3)), which is
/// not for the caller to loosen.
pub(crate) fn cached_by_environment() -> bool {
    crate::guard::environment("MAPDIRECT_CACHED").is_some_and(|value| value == "1")
}

fn too_large() -> Error {
    Error::new(
        Kind::Arguments,
        Errno::NOMEM,
        "the range is larger than the address space",
        "map it in parts",
    )
}

/// Everything about a mapping but the file and the range.
pub(crate) struct How {
    pub(crate) prot: i32,
    /// Flags of `mmap(2)` besides the type and `MAP_DIRECT`.
    pub(crate) flags: i32,
    pub(crate) address: usize,
    pub(crate) scope: Scope,
    pub(crate) cached: bool,
    pub(crate) patience: Duration,
    pub(crate) guard: Guard,
}

/// A mapping that was made.
pub(crate) struct Placed {
    pub(crate) address: usize,
    pub(crate) named: WatchedPin,
    pub(crate) map: BlockMap,
    pub(crate) plan: Plan,
    pub(crate) frozen: Option<Frozen>,
    pub(crate) flags: i32,
    pub(crate) connection: Arc<Connection>,
}

impl How {
    /// Pins and maps. Leaves nothing behind when it fails.
    ///
    /// # Safety
    ///
    /// With `MAP_FIXED`, as [`mmap::map`].
    pub(crate) unsafe fn place(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        length: usize,
    ) -> Result<Placed> {
        check(self.prot, offset, length)?;
        require_read_write(file)?;
        let mut asked = Flags::MAP | Flags::SEGMENTS;
        if self.cached {
            asked = asked | Flags::CACHED;
        }
        if self.scope == Scope::File {
            asked = asked | Flags::WHOLE_FILE;
        }
        let range = (offset, length as u64);
        let Established {
            named,
            map,
            file: pinned,
            // Only where the description cannot write.
            life: _,
            connection,
        } = establish(&self.guard, file, range, asked, self.patience)?;
        // MAP_SYNC has a meaning only where flags are validated.
        let kind = if self.flags & mmap::MAP_SYNC != 0 {
            mmap::MAP_SHARED_VALIDATE
        } else {
            mmap::MAP_SHARED
        };
        let flags = kind | self.flags;
        let plan = Plan::new(&map, offset, length as u64, mmap::page_size());
        let arguments = segments::Arguments {
            pinned: pinned.as_fd(),
            address: self.address,
            prot: self.prot,
            flags,
        };
        // SAFETY: the caller answers for MAP_FIXED.
        let mapped = unsafe { segments::map(&plan, arguments) };
        // From here on the mapping alone keeps the description, and with it
        // the pin; if there is none, the pin ends with this descriptor.
        drop(pinned);
        let segments::Mapped { address, frozen } = mapped?;
        Ok(Placed {
            address,
            named,
            map,
            plan,
            frozen,
            flags,
            connection,
        })
    }
}

/// What `mmap(2)` checks before it looks at the file.
fn check(prot: i32, offset: u64, length: usize) -> Result<()> {
    let page = mmap::page_size();
    let invalid = |text: &str| {
        Error::new(
            Kind::Arguments,
            Errno::INVAL,
            text,
            format!("pages have {page} bytes here"),
        )
    };
    if length == 0 {
        return Err(invalid("the length is 0"));
    }
    if !offset.is_multiple_of(page) {
        return Err(invalid("the offset is not on a page boundary"));
    }
    let rounded = (length as u64)
        .checked_next_multiple_of(page)
        .filter(|length| *length <= i64::MAX.cast_unsigned())
        .ok_or_else(too_large)?;
    if offset
        .checked_add(rounded)
        .is_none_or(|end| end > i64::MAX.cast_unsigned())
    {
        return Err(Error::new(
            Kind::Arguments,
            Errno::OVERFLOW,
            "the range ends beyond the largest file",
            "give a smaller offset or length",
        ));
    }
    if prot & mmap::PROT_WRITE == 0 {
        return Err(Error::new(
            Kind::NotReadWrite,
            Errno::ACCESS,
            "MAP_DIRECT needs PROT_WRITE",
            "ask for reading and writing; to read, an ordinary mapping will do",
        ));
    }
    Ok(())
}

/// Refuses a descriptor that is not open for reading and writing.
pub(crate) fn require_read_write(file: BorrowedFd<'_>) -> Result<()> {
    let access = rustix::fs::fcntl_getfl(file).map_err(|errno| match errno {
        Errno::BADF => bad_descriptor(),
        other => Error::system("F_GETFL", other),
    })?;
    if access.contains(rustix::fs::OFlags::PATH) {
        return Err(bad_descriptor());
    }
    if access & rustix::fs::OFlags::ACCMODE != rustix::fs::OFlags::RDWR {
        return Err(Error::new(
            Kind::NotReadWrite,
            Errno::ACCESS,
            "the descriptor is not open for reading and writing",
            "open the file for both",
        ));
    }
    Ok(())
}

fn bad_descriptor() -> Error {
    Error::new(
        Kind::Arguments,
        Errno::BADF,
        "the descriptor is not open, or only a path (O_PATH)",
        "open the file for reading and writing",
    )
}

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
    /// What another mapping must have in common with it to go on from it.
    shape: Option<again::Shape>,
    released: bool,
}

// SAFETY: the memory belongs to the mapping, which any thread may unmap; all
// access to it is atomic.
unsafe impl Send for DirectMap {}
// SAFETY: shared access through `&self` is atomic, see `access`.
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

    /// Reads bytes, by atomic loads of aligned words: what others store
    /// meanwhile is seen or not, eight aligned bytes at a time.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the bytes are not all inside the mapping, `EFAULT` if some
    /// of them raise SIGBUS (shared blocks, bytes in pages beyond the end of
    /// the file); nothing is read then.
    pub fn read_at(&self, offset: usize, into: &mut [u8]) -> Result<()> {
        self.check_bounds("read", offset, into.len())?;
        self.check_access("read", offset, into.len(), Access::Load)?;
        self.memory.read(offset, into);
        Ok(())
    }

    /// Writes bytes, by atomic stores of aligned words.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the bytes are not all inside the mapping, `ETXTBSY` if some
    /// of them lie in frozen blocks, `EFAULT` for pages beyond the end of the
    /// file; nothing is written then.
    pub fn write_at(&self, offset: usize, from: &[u8]) -> Result<()> {
        self.check_bounds("write", offset, from.len())?;
        self.check_access("write", offset, from.len(), Access::Store)?;
        self.memory.write(offset, from);
        Ok(())
    }

    #[inline]
    fn check_bounds(&self, what: &str, offset: usize, count: usize) -> Result<()> {
        if self.hold.is_revoked() {
            return Err(self.revoked(what));
        }
        if self.memory.contains(offset, count) {
            return Ok(());
        }
        Err(self.out_of_bounds(what, offset, count))
    }

    #[cold]
    fn revoked(&self, what: &str) -> Error {
        let state = self.hold.state();
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
        let asked = if self.hold.is_own() {
            access
        } else {
            Access::Store
        };
        let Some((at, pages)) = self.plan.obstacle(start..start + count as u64, asked) else {
            return Ok(());
        };
        let beyond = at >= self.map.file_size() && pages == Pages::Faulting;
        let state = self.map.find(at).map(|extent| extent.state);
        let error = if beyond {
            Error::new(
                Kind::Arguments,
                Errno::FAULT,
                format!(
                    "the file ended at byte {} when it was mapped",
                    self.map.file_size()
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
                "make it stable first: DirectMap::allocate, or prepare before mapping",
            )
        };
        Err(error.asking(format!("{what} {count} bytes at {offset}")))
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
        let result = crate::establish::allocate(
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

    fn allocate_in_file(&mut self) -> Result<()> {
        let in_file = self.map.file_size().saturating_sub(self.offset);
        let length = usize::try_from(in_file)
            .unwrap_or(usize::MAX)
            .min(self.len());
        self.allocate(0..length)
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
        let asleep = self.fall_asleep();
        let keeper = self.hold.let_go();
        // SAFETY: only called, once, when the value goes away, so that
        // nothing of this crate refers to the memory any more; pointers
        // handed out say so in their documentation.
        let result = unsafe { mmap::unmap(base, self.memory.length()) };
        if self.frozen.take().is_some() {
            Frozen::settle();
        }
        drop(keeper);
        let was_taken_up = asleep.as_ref().is_some_and(|hold| hold.was_asleep());
        // The kernel itself has ended what it took up by itself, unless there
        // are other pins of the file.
        if self.hold.is_own() && !(was_taken_up && !self.hold.has_neighbours()) {
            self.hold.guard().ended(self.hold.gate(), self.hold.named());
        }
        if let (Some(hold), Some(shape), Ok(())) = (asleep, self.shape.take(), &result) {
            let nothing = BlockMap::new(self.map.device(), 0, 0, 0..0, Vec::new());
            again::keep(again::Known {
                shape,
                hold,
                map: std::mem::replace(&mut self.map, nothing),
                plan: self.plan.clone(),
                durability: self.durability,
                connection: Arc::clone(&self.connection),
            });
        }
        result
    }

    /// The pin, for a mapping that goes on from this one, if one may.
    fn fall_asleep(&mut self) -> Option<Hold> {
        if self.shape.is_none() || self.frozen.is_some() || !self.plan.is_stable() {
            return None;
        }
        self.hold.fall_asleep()
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
