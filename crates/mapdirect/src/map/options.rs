//! How to map a file.

use super::memory::Memory;
use super::place::{How, too_large};
use super::{DirectMap, durability, revoke};
use crate::descriptor::size_of_file;
use crate::error::{Error, Result};
use crate::establish::{PATIENCE, Scope};
use crate::guard::Guard;
use crate::holder::{self, Hold};
use crate::prepare;
use crate::state::OnBreach;
use mapdirect_sys::{Errno, mmap};
use std::ops::Range;
use std::os::fd::AsFd;
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
        let durability = durability::of(file)
            .map_err(|errno| Error::system("statx", errno).asking(asked(&range)))?;
        let how = How {
            prot: mmap::PROT_READ | mmap::PROT_WRITE,
            flags: if self.populate { mmap::MAP_POPULATE } else { 0 },
            address: 0,
            scope: self.scope,
            cached: self.cached.unwrap_or_else(cached_by_environment),
            patience: self.patience,
            guard: self.guard.clone().unwrap_or_default(),
        };
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
            released: false,
        };
        if self.prepare {
            // Somebody may have changed it again before it was pinned.
            map.allocate_in_file()
                .map_err(|error| error.asking(asked(&range)))?;
        }
        Ok(map)
    }
}

/// `MAPDIRECT_CACHED=1` in the environment; ignored by a program that runs
/// with more privilege than its caller (`AT_SECURE` of getauxval(3)), which is
/// not for the caller to loosen.
pub(crate) fn cached_by_environment() -> bool {
    holder::environment("MAPDIRECT_CACHED").is_some_and(|value| value == "1")
}
