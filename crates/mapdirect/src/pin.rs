//! Pinning without mapping.

mod all;
mod in_place;

pub use in_place::PinInPlace;

use crate::descriptor::size_of_file;
use crate::error::Result;
use crate::establish::{
    Established, PATIENCE, Scope, Strength, establish, nothing_is_frozen, offset_and_length,
};
use crate::guard::Guard;
use crate::holder::{Connection, Held, Hold};
use crate::prepare;
use crate::state::{EventFd, Integrity, OnBreach, State};
use mapdirect_proto::{BlockMap, Extent, Flags};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// How to pin a range of a file without mapping it.
///
/// # Examples
///
/// ```no_run
/// use mapdirect::PinOptions;
///
/// let file = std::fs::File::open("image")?;
/// let pin = PinOptions::new().range(0..1 << 30).pin(&file)?;
/// for extent in pin.extents() {
///     println!("{} bytes at {:?} of the device", extent.length, extent.physical);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "options do nothing until `pin` is called"]
pub struct PinOptions {
    range: Option<Range<u64>>,
    scope: Scope,
    strength: Strength,
    prepare_first: bool,
    also: Flags,
    keeper: Option<i32>,
    patience: Duration,
    guard: Option<Guard>,
}

impl Default for PinOptions {
    /// [`PinOptions::new`].
    fn default() -> Self {
        Self::new()
    }
}

impl PinOptions {
    /// The whole file as it is now.
    pub fn new() -> Self {
        Self {
            range: None,
            scope: Scope::Range,
            strength: Strength::All,
            prepare_first: false,
            also: Flags::NONE,
            keeper: None,
            patience: PATIENCE,
            guard: None,
        }
    }

    /// Pins this range of the file, in bytes. It is extended to whole
    /// filesystem blocks. It may reach beyond the end of the file: then nothing
    /// can be allocated there, unless [`Strength::Stable`] is asked for.
    pub fn range(mut self, range: Range<u64>) -> Self {
        self.range = Some(range);
        self
    }

    /// Pins the range (the default) or the whole file and its size.
    pub fn scope(mut self, scope: Scope) -> Self {
        self.scope = scope;
        self
    }

    /// Pins from this byte on, however far the file grows. Only a pin of
    /// [`Strength::Stable`] can do that: with the other strength, pinning fails
    /// with `EINVAL`.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use mapdirect::{PinOptions, Strength};
    ///
    /// let log = std::fs::File::open("log")?;
    /// let pin = PinOptions::new()
    ///     .strength(Strength::Stable)
    ///     .range_from(0)
    ///     .pin(&log)?;
    /// // Whatever is appended now can be read, and is not cut off again.
    /// # drop(pin);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn range_from(self, start: u64) -> Self {
        self.range(start..u64::MAX)
    }

    /// Holds everything in the range (the default), or only what is stable or
    /// becomes so.
    pub fn strength(mut self, strength: Strength) -> Self {
        self.strength = strength;
        self
    }

    /// Prepares the range before it is pinned
    /// ([`PrepareOptions`](crate::PrepareOptions)): then every block of it that
    /// is in the file is stable. The file must be open for reading and writing.
    pub fn prepare_first(mut self, prepare: bool) -> Self {
        self.prepare_first = prepare;
        self
    }

    /// Gives the descendants of this process the rights of a holder, as long as
    /// this process lives: they may open the file for writing, which the
    /// fanotify gate refuses everybody else while the file is pinned. What they
    /// do is judged like everything else.
    ///
    /// A process whose parent has ended stays a descendant if this process is a
    /// subreaper (`PR_SET_CHILD_SUBREAPER` of prctl(2)). More than 64
    /// generations down, descendants are strangers.
    pub fn family(mut self, family: bool) -> Self {
        self.also = with(self.also, Flags::FAMILY, family);
        self
    }

    /// Denies writing to everybody else: nobody but this process and its
    /// descendants may open the file for writing, or truncate it by path, as with
    /// a running program (`ETXTBSY`). The pin is refused while somebody else has
    /// it open for writing.
    ///
    /// The fanotify gate refuses others to open a pinned file for writing in any
    /// case. With this it refuses holders of other pins as well.
    pub fn deny_write(mut self, deny: bool) -> Self {
        self.also = with(self.also, Flags::DENY_WRITE, deny);
        self
    }

    /// Denies that a name of the file is removed, renamed or replaced by another
    /// file (`ETXTBSY`), by anybody, this process included. It is about every
    /// name that the file has, also those that it gets by `link(2)` meanwhile;
    /// directories above can be renamed.
    ///
    /// The fanotify gate cannot refuse this, but tells
    /// ([`Pin::renames`](Pin::renames)).
    pub fn deny_rename(mut self, deny: bool) -> Self {
        self.also = with(self.also, Flags::DENY_RENAME, deny);
        self
    }

    /// See [`MapOptions::patience`](crate::MapOptions::patience).
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Asks this guard instead of the one of the environment.
    pub fn guard(mut self, guard: Guard) -> Self {
        self.guard = Some(guard);
        self
    }

    /// Pins the range.
    ///
    /// `file` must be open for reading, at least; it may be closed afterwards.
    /// If it was opened before any pin on the file its descriptor may get a new
    /// open file description, see [`MapOptions::map`](crate::MapOptions::map).
    ///
    /// # Errors
    ///
    /// * `EACCES` without `CAP_LINUX_IMMUTABLE` in the initial user namespace;
    /// * `EOPNOTSUPP` when the file or its filesystem cannot keep the promise,
    ///   or no guard runs;
    /// * `ETXTBSY` when the block map cannot be brought to rest, with the list
    ///   of who has the file open;
    /// * `EINVAL` for an empty range, or one that ends before it begins;
    /// * `EOVERFLOW`, `EBADF`, `ENODEV` as `mmap(2)`.
    pub fn pin(&self, file: impl AsFd) -> Result<Pin> {
        let guard = self.guard.clone().unwrap_or_default();
        self.pin_by(&guard, || guard.connect(), file.as_fd())
    }

    /// Pins the range by way of a connection to `guard`.
    fn pin_by(
        &self,
        guard: &Guard,
        connect: impl FnOnce() -> Result<Arc<Connection>>,
        file: BorrowedFd<'_>,
    ) -> Result<Pin> {
        self.pin_range(guard, connect, file).map_err(|error| {
            let path = mapdirect_sys::proc::shown_path_of(file);
            error.asking(match &self.range {
                Some(range) if range.end == u64::MAX => {
                    format!("pin {path} from byte {} on", range.start)
                }
                Some(range) => format!("pin bytes {} to {} of {path}", range.start, range.end),
                None => format!("pin {path}"),
            })
        })
    }

    /// Prepares the range, if that is wanted.
    fn prepare(&self, file: BorrowedFd<'_>) -> Result<()> {
        if !self.prepare_first {
            return Ok(());
        }
        let size = size_of_file(file)?;
        let in_file = self.range.as_ref().filter(|_| self.scope == Scope::Range);
        // Nobody can prepare what has no end.
        let in_file = in_file.map(|range| match range.end {
            u64::MAX => range.start..size.max(range.start),
            end => range.start..end,
        });
        prepare::before_pin(file, in_file.as_ref())
    }

    fn pin_range(
        &self,
        guard: &Guard,
        connect: impl FnOnce() -> Result<Arc<Connection>>,
        file: BorrowedFd<'_>,
    ) -> Result<Pin> {
        let range = offset_and_length(self.range.as_ref())?;
        let scope = match self.scope {
            Scope::Range => Flags::NONE,
            Scope::File => Flags::WHOLE_FILE,
        };
        let flags = scope | self.also | self.strength.flags();
        self.prepare(file)?;
        let Established {
            named,
            map,
            file: description,
            life,
            connection,
        } = establish(connect, file, range, flags, self.patience)?;
        let hold = Hold::new(named, guard, connection.gate(), OnBreach::Tell, None)?;
        let mut pin = Pin {
            life,
            description,
            strength: self.strength,
            held: Held::new(hold, connection, map),
        };
        if self.prepare_first && self.strength == Strength::All {
            // Somebody may have changed it again before it was pinned.
            let range = pin.range();
            let end = range.end.min(pin.block_map().file_size());
            pin.allocate(range.start..end.max(range.start))?;
        }
        Ok(pin)
    }
}

/// `flags` with or without some of them.
pub(crate) fn with(flags: Flags, some: Flags, wanted: bool) -> Flags {
    if wanted {
        flags | some
    } else {
        Flags::from_known_bits(flags.bits() & !some.bits())
    }
}

/// A block map held still: while it exists, nobody can move, free, share or
/// allocate the blocks of the range, so its extents stay true. For agents that
/// go to a file's blocks by themselves.
///
/// Children of `fork(2)` share it; it ends when the last of them drops it or
/// ends.
///
/// **Ending it.** [`unpin`](Self::unpin) ends it and reports errors; dropping it
/// does the same without a word. Both close a descriptor of the file: POSIX
/// record locks of this process on the file go with that, as with any
/// `close(2)`. With the bpf gate both wait until the guard has confirmed the
/// end, **up to a second** if the guard is stuck.
///
/// # Examples
///
/// ```no_run
/// use mapdirect::Pin;
///
/// let file = std::fs::File::open("image")?;
/// let pin = Pin::new(&file, 0..1 << 20)?;
/// println!("on device {}: {:?}", pin.block_map().device(), pin.extents());
/// pin.unpin()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "the pin ends when it is dropped"]
pub struct Pin {
    /// What the pin lives by besides. Dropped before the description: the guard
    /// looks when that is closed.
    life: Option<OwnedFd>,
    /// The description whose life is the pin.
    description: OwnedFd,
    strength: Strength,
    /// Dropped after that: it tells the guard of the end.
    held: Held,
}

impl Pin {
    /// Pins a range of `file`, in bytes; short for [`PinOptions::pin`].
    ///
    /// # Errors
    ///
    /// As [`PinOptions::pin`].
    pub fn new(file: impl AsFd, range: Range<u64>) -> Result<Self> {
        PinOptions::new().range(range).pin(file)
    }

    /// What the pin lives by: it lasts as long as anybody has copies of all of
    /// these descriptors.
    #[doc(hidden)]
    #[must_use]
    pub fn lives_by(&self) -> Vec<BorrowedFd<'_>> {
        let life = self.life.iter().map(AsFd::as_fd);
        life.chain([self.description.as_fd()]).collect()
    }

    /// Makes frozen blocks of a range stable, under the pin; see
    /// [`DirectMap::allocate`](crate::DirectMap::allocate). `range` counts bytes
    /// of the file, and must be pinned. An empty range succeeds without doing
    /// anything.
    ///
    /// # Errors
    ///
    /// As [`DirectMap::allocate`](crate::DirectMap::allocate), and `EACCES` if
    /// the file was not open for writing when it was pinned.
    pub fn allocate(&mut self, range: Range<u64>) -> Result<()> {
        if range.start == range.end {
            return Ok(());
        }
        if self.strength == Strength::Stable {
            return Err(nothing_is_frozen()
                .asking(format!("allocate bytes {} to {}", range.start, range.end)));
        }
        let is_frozen = self
            .block_map()
            .frozen()
            .any(|extent| extent.clipped(&range).is_some());
        let pinned = self.range();
        let inside = range.start >= pinned.start && range.end <= pinned.end;
        if inside && !range.is_empty() && !is_frozen {
            return Ok(());
        }
        offset_and_length(Some(&range))
            .and_then(|_| self.held.allocate(&range, self.description.as_fd()))
            .map_err(|error| {
                error.asking(format!("allocate bytes {} to {}", range.start, range.end))
            })
    }

    /// Learns from the guard which blocks a pin of [`Strength::Stable`] holds by
    /// now: [`block_map`](Self::block_map) tells them afterwards. A pin of the
    /// other strength holds what it held, and nothing is asked.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` when the guard is gone, or in a child of `fork(2)`.
    pub fn refresh(&mut self) -> Result<()> {
        if self.strength == Strength::All {
            return Ok(());
        }
        let range = self.range();
        self.held
            .allocate(&range, self.description.as_fd())
            .map_err(|error| error.asking("learn what is held"))
    }

    /// Ends this process's part in the pin, and says whether that worked, which
    /// dropping cannot.
    ///
    /// # Errors
    ///
    /// `ETIMEDOUT` when the guard has not confirmed the end within a second
    /// (bpf gate). This process has let go of the pin all the same then, and the
    /// pin ends by itself.
    pub fn unpin(self) -> Result<()> {
        let Self {
            life,
            description,
            strength: _,
            mut held,
        } = self;
        drop(life);
        drop(description);
        held.end().map_err(|error| error.asking("unpin"))
    }

    /// The block map of the pinned range.
    #[must_use]
    pub fn block_map(&self) -> &BlockMap {
        self.held.block_map()
    }

    /// The extents of the pinned range; short for `block_map().extents()`.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        self.block_map().extents()
    }

    /// The range pinned, in bytes of the file: the one asked for, extended to
    /// whole filesystem blocks. A range up to `u64::MAX` has no end.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.block_map().range()
    }

    /// The number by which the guard knows the pin.
    #[must_use]
    pub fn pin_id(&self) -> u64 {
        self.held.hold().id()
    }

    /// Whether the pin is kept.
    ///
    /// In a child of fork(2) this connects to the guard when it is asked for
    /// the first time, and starts a thread.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use mapdirect::{Pin, State};
    ///
    /// let file = std::fs::File::open("image")?;
    /// let pin = Pin::new(&file, 0..4096)?;
    /// match pin.state() {
    ///     State::Kept => println!("the extents are true"),
    ///     State::Unattended { why } => println!("still refused: {why}"),
    ///     state => println!("do not use the extents any more: {state}"),
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn state(&self) -> State {
        self.held.hold().state()
    }

    /// Whether the blocks of the pin are what they were, as far as that has
    /// been found; which blocks are not, since when, and who changed them
    /// where that is known.
    #[must_use]
    pub fn integrity(&self) -> Integrity {
        self.held.hold().integrity()
    }

    /// What has become of names of the file, for a person, if the pin denies that
    /// ([`PinOptions::deny_rename`]) and the gate could not refuse it: the first
    /// 16 of them.
    #[must_use]
    pub fn renames(&self) -> Vec<String> {
        self.held.hold().renames()
    }

    /// A descriptor that becomes readable when [`state`](Self::state) or
    /// [`integrity`](Self::integrity) change.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use std::os::fd::AsFd;
    ///
    /// let file = std::fs::File::open("image")?;
    /// let pin = mapdirect::Pin::new(&file, 0..4096)?;
    /// let event = pin.event_fd()?;
    /// // ... until poll(2) says that event.as_fd() is readable:
    /// if event.clear() {
    ///     println!("{}", pin.state());
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// `EMFILE`, `ENFILE`, `ENOMEM`.
    pub fn event_fd(&self) -> Result<EventFd> {
        self.held.hold().event_fd()
    }

    /// Connects to the guard again now, if none tends the pin
    /// ([`State::Unattended`]), and returns the state afterwards.
    ///
    /// The library does so by itself, five times a second. This is for a
    /// program that knows that a guard has just been started. It waits for the
    /// guard's answer, up to ten seconds.
    ///
    /// # Errors
    ///
    /// `ENOMEM` and `EOPNOTSUPP` when the thread that hears of pins cannot be
    /// started.
    pub fn reconnect(&self) -> Result<State> {
        self.held.hold().reconnect()
    }
}
