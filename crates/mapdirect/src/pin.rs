//! Pinning without mapping.

use crate::error::{Error, Kind, Result};
use crate::establish::{self, Established, PATIENCE, Scope, establish, offset_and_length};
use crate::guard::Guard;
use crate::holder::{Connection, Hold};
use crate::prepare;
use crate::state::{EventFd, Integrity, OnBreach, State};
use mapdirect_proto::{BlockMap, Extent, Flags};
use mapdirect_sys::Errno;
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
///     println!("{:?} bytes at {:?}", extent.length, extent.physical);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "options do nothing until `pin` is called"]
pub struct PinOptions {
    range: Option<Range<u64>>,
    scope: Scope,
    prepare: bool,
    patience: Duration,
    guard: Option<Guard>,
}

impl Default for PinOptions {
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
            prepare: false,
            patience: PATIENCE,
            guard: None,
        }
    }

    /// Pins this range of bytes, rounded out to blocks. It may reach beyond
    /// the end of the file: nothing is allocated there then.
    pub fn range(mut self, range: Range<u64>) -> Self {
        self.range = Some(range);
        self
    }

    /// Pins the range (the default) or the whole file and its size.
    pub fn scope(mut self, scope: Scope) -> Self {
        self.scope = scope;
        self
    }

    /// Prepares the range before it is pinned, as
    /// [`PrepareOptions`](crate::PrepareOptions) does: then every block of it
    /// that is in the file is stable. The file must be open for reading and
    /// writing.
    pub fn prepare(mut self, prepare: bool) -> Self {
        self.prepare = prepare;
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
    /// `file` must be open for reading, at least; it may be closed
    /// afterwards. If it was opened before any pin on the file its descriptor
    /// may get a new open file description, see
    /// [`MapOptions::map`](crate::MapOptions::map).
    ///
    /// # Errors
    ///
    /// `EACCES` without `CAP_LINUX_IMMUTABLE` in the initial user namespace;
    /// `EOPNOTSUPP` where the file or its filesystem cannot keep the promise,
    /// or no guard runs; `ETXTBSY` when the block map cannot be brought to
    /// rest, with the list of who has the file open; `EINVAL`, `EOVERFLOW`,
    /// `EBADF`, `ENODEV` as `mmap(2)`.
    pub fn pin(&self, file: &impl AsFd) -> Result<Pin> {
        let file = file.as_fd();
        let range = offset_and_length(self.range.as_ref());
        let flags = match self.scope {
            Scope::Range => Flags::NONE,
            Scope::File => Flags::WHOLE_FILE,
        };
        let guard = self.guard.clone().unwrap_or_default();
        let empty = self.range.as_ref().is_some_and(Range::is_empty);
        let established = if empty {
            Err(Error::new(
                Kind::Arguments,
                Errno::INVAL,
                "the range is empty",
                "give a range of at least one byte",
            ))
        } else {
            self.prepare_first(file)
                .and_then(|()| establish(&guard, file, range, flags, self.patience))
        };
        let asked = |error: Error| {
            let path = mapdirect_sys::proc::path_of(file);
            error.asking(match &self.range {
                Some(range) => format!("pin bytes {} to {} of {path}", range.start, range.end),
                None => format!("pin {path}"),
            })
        };
        let Established {
            named,
            map,
            file: description,
            life,
            connection,
        } = established.map_err(asked)?;
        let hold =
            Hold::new(named, &guard, connection.gate(), OnBreach::Tell, None).map_err(asked)?;
        let mut pin = Pin {
            map,
            _life: life,
            description,
            ending: Ending { hold, connection },
        };
        if self.prepare {
            // Somebody may have changed it again before it was pinned.
            let range = pin.range();
            let end = range.end.min(pin.map.file_size());
            pin.allocate(range.start..end.max(range.start))
                .map_err(asked)?;
        }
        Ok(pin)
    }

    fn prepare_first(&self, file: BorrowedFd<'_>) -> Result<()> {
        if !self.prepare {
            return Ok(());
        }
        let range = self.range.as_ref().filter(|_| self.scope == Scope::Range);
        prepare::before_pin(file, range)
    }
}

/// A block map held still: while it exists, nobody can move, free, share or
/// allocate the blocks of the range, so its extents stay true. For agents
/// that go to a file's blocks by themselves.
///
/// Children of `fork(2)` share it; it ends when the last of them drops it or
/// ends.
///
/// Dropping it closes a descriptor of the file: POSIX record locks of this
/// process on the file go with that, as with any `close(2)`.
#[derive(Debug)]
#[must_use = "the pin ends when it is dropped"]
pub struct Pin {
    map: BlockMap,
    /// Dropped before the description: the guard looks when that is closed.
    _life: Option<OwnedFd>,
    /// The description whose life is the pin.
    description: OwnedFd,
    /// Dropped after that.
    ending: Ending,
}

/// Tells the guard of the end.
#[derive(Debug)]
struct Ending {
    hold: Hold,
    /// The one by which it was asked for.
    connection: Arc<Connection>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.hold.let_go();
        if self.hold.is_own() {
            self.hold.guard().ended(self.hold.gate(), self.hold.named());
        }
    }
}

impl Pin {
    /// Pins a range of `file`; short for [`PinOptions::pin`].
    ///
    /// # Errors
    ///
    /// As [`PinOptions::pin`].
    pub fn new(file: &impl AsFd, range: Range<u64>) -> Result<Self> {
        PinOptions::new().range(range).pin(file)
    }

    /// Prepares a range of `file`, so that every block of it that is in the
    /// file is stable, and pins it; short for [`PinOptions::prepare`].
    ///
    /// # Errors
    ///
    /// As [`PinOptions::pin`] and [`PrepareOptions::prepare`].
    ///
    /// [`PrepareOptions::prepare`]: crate::PrepareOptions::prepare
    pub fn prepare(file: &impl AsFd, range: Range<u64>) -> Result<Self> {
        PinOptions::new().range(range).prepare(true).pin(file)
    }

    /// Makes frozen blocks of a range of the file stable, under the pin; see
    /// [`DirectMap::allocate`](crate::DirectMap::allocate). Bytes are those of
    /// the file, and must be pinned.
    ///
    /// # Errors
    ///
    /// As [`DirectMap::allocate`](crate::DirectMap::allocate), and `EACCES` if
    /// the file was not open for writing when it was pinned.
    pub fn allocate(&mut self, range: Range<u64>) -> Result<()> {
        let is_frozen = self
            .map
            .frozen()
            .any(|extent| extent.clipped(&range).is_some());
        let pinned = self.range();
        let inside = range.start >= pinned.start && range.end <= pinned.end;
        if range.is_empty() || inside && !is_frozen {
            return Ok(());
        }
        let mut now = None;
        let result = establish::allocate(
            &self.ending.hold,
            &self.ending.connection,
            (range.start, range.end - range.start),
            self.description.as_fd(),
            &mut now,
        );
        if let Some(now) = now {
            self.map = now;
        }
        result.map_err(|error| {
            error.asking(format!("allocate bytes {} to {}", range.start, range.end))
        })
    }

    /// The block map of the pinned range.
    #[must_use]
    pub fn block_map(&self) -> &BlockMap {
        &self.map
    }

    /// The extents of the pinned range; short for `block_map().extents()`.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        self.map.extents()
    }

    /// The range pinned: the one asked for, rounded out to blocks.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.map.range()
    }

    /// The number by which the guard knows the pin.
    #[must_use]
    pub fn pin_id(&self) -> u64 {
        self.ending.hold.id()
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
        self.ending.hold.state()
    }

    /// Whether the blocks of the pin are what they were, as far as that has
    /// been found; which blocks are not, since when, and who changed them
    /// where that is known.
    #[must_use]
    pub fn integrity(&self) -> Integrity {
        self.ending.hold.integrity()
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
        self.ending.hold.event_fd()
    }

    /// The old name of [`state`](Self::state).
    #[deprecated(note = "use `state`")]
    #[must_use]
    pub fn status(&self) -> State {
        self.state()
    }

    /// See [`DirectMap::notice_fd`](crate::DirectMap::notice_fd).
    #[deprecated(note = "use `event_fd`")]
    #[must_use]
    pub fn notice_fd(&self) -> BorrowedFd<'_> {
        self.ending.connection.as_fd()
    }
}
