//! Mapping a file `MAP_DIRECT`.

use crate::access::Memory;
use crate::error::{Error, Kind, Result};
use crate::establish::{Established, PATIENCE, Scope, establish};
use crate::guard::{Connection, Guard};
use mapdirect_proto::{BlockMap, Extent, Flags};
use mapdirect_sys::{Errno, mmap};
use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

/// Whether a pin is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Status {
    /// The guard is there: the block map stays as it is.
    Kept,
    /// The guard is gone, and with it whatever refused to change the file:
    /// from now on anybody may truncate it, and an access may raise SIGBUS.
    GuardGone,
}

pub(crate) fn status_of(connection: &Connection) -> Status {
    if connection.is_alive() {
        Status::Kept
    } else {
        Status::GuardGone
    }
}

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
    populate: bool,
    patience: Duration,
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
            populate: false,
            patience: PATIENCE,
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
    /// says more.
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
        // SAFETY: without MAP_FIXED a mapping takes no place that is in use.
        let placed = unsafe { how.place(file, range.start, length) }
            .map_err(|error| error.asking(asked(&range)))?;
        let base = NonNull::new(std::ptr::with_exposed_provenance_mut(placed.address))
            .ok_or_else(|| Error::system("mmap (address 0)", Errno::INVAL))?;
        // SAFETY: mmap returned whole pages at a page boundary, readable and
        // writable; the DirectMap unmaps them when it is dropped, and gives
        // the memory to nobody who outlives it.
        let memory = unsafe { Memory::new(base, length) };
        Ok(DirectMap {
            memory,
            offset: range.start,
            id: placed.id,
            map: placed.map,
            connection: placed.connection,
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
    pub(crate) id: u64,
    pub(crate) map: BlockMap,
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
        let mut flags = Flags::MAP;
        if self.cached {
            flags = flags | Flags::CACHED;
        }
        if self.scope == Scope::File {
            flags = flags | Flags::WHOLE_FILE;
        }
        let range = (offset, length as u64);
        let Established {
            id,
            map,
            file: pinned,
            connection,
        } = establish(&self.guard, file, range, flags, self.patience)?;
        // MAP_SYNC has a meaning only where flags are validated.
        let kind = if self.flags & mmap::MAP_SYNC != 0 {
            mmap::MAP_SHARED_VALIDATE
        } else {
            mmap::MAP_SHARED
        };
        // SAFETY: the caller answers for MAP_FIXED.
        let mapped = unsafe {
            mmap::map(
                self.address,
                length,
                self.prot,
                kind | self.flags,
                pinned.as_fd(),
                offset,
            )
        };
        // From here on the mapping alone keeps the description, and with it
        // the pin; if there is none, the pin ends with this descriptor.
        drop(pinned);
        let address = mapped.map_err(|errno| {
            let mend = match errno {
                Errno::NOMEM => "free address space or mappings (vm.max_map_count)",
                Errno::EXIST => "give an address where nothing is mapped",
                _ => "",
            };
            Error::new(
                Kind::System,
                errno,
                format!("mmap failed after the pin was granted: {errno}"),
                mend,
            )
        })?;
        Ok(Placed {
            address,
            id,
            map,
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
    id: u64,
    map: BlockMap,
    connection: Arc<Connection>,
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
    /// `EINVAL` if the bytes are not all inside the mapping; nothing is read
    /// then.
    pub fn read_at(&self, offset: usize, into: &mut [u8]) -> Result<()> {
        self.check_bounds("read", offset, into.len())?;
        self.memory.read(offset, into);
        Ok(())
    }

    /// Writes bytes, by atomic stores of aligned words.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the bytes are not all inside the mapping; nothing is
    /// written then.
    pub fn write_at(&self, offset: usize, from: &[u8]) -> Result<()> {
        self.check_bounds("write", offset, from.len())?;
        self.memory.write(offset, from);
        Ok(())
    }

    fn check_bounds(&self, what: &str, offset: usize, count: usize) -> Result<()> {
        if self.memory.contains(offset, count) {
            return Ok(());
        }
        Err(Error::new(
            Kind::Arguments,
            Errno::INVAL,
            format!("the mapping ends at byte {}", self.len()),
            "stay inside the mapping",
        )
        .asking(format!("{what} {count} bytes at {offset}")))
    }

    /// The first byte, for code that goes to the memory by itself: valid for
    /// [`len`](Self::len) bytes until the mapping is dropped. Others may
    /// store to it at any time.
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
        self.id
    }

    /// Whether the pin is kept.
    #[must_use]
    pub fn status(&self) -> Status {
        status_of(&self.connection)
    }

    /// A descriptor that `poll(2)` reports a hang-up on (`POLLHUP`,
    /// `POLLRDHUP`) when the guard is gone. Nothing else may be done with it.
    #[must_use]
    pub fn notice_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    /// Makes what was stored to a range of the mapping durable: `msync(2)` of
    /// the pages that meet it.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the range is not inside the mapping, and what `msync`
    /// answers.
    pub fn persist(&self, range: Range<usize>) -> Result<()> {
        let count = range.end.saturating_sub(range.start);
        self.check_bounds("persist", range.start, count)?;
        if count == 0 {
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
        // SAFETY: only called, once, when the value goes away, so that
        // nothing of this crate refers to the memory any more; pointers
        // handed out say so in their documentation.
        unsafe { mmap::unmap(base, self.memory.length()) }
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
            .field("pin", &self.id)
            .finish_non_exhaustive()
    }
}
