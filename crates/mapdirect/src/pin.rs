//! Pinning without mapping.

use crate::error::Result;
use crate::establish::{Established, PATIENCE, Scope, establish, offset_and_length};
use crate::guard::{Connection, Guard};
use crate::mapping::{Status, status_of};
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
///     println!("{:?} bytes at {:?}", extent.length, extent.physical);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "options do nothing until `pin` is called"]
pub struct PinOptions {
    range: Option<Range<u64>>,
    scope: Scope,
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
            Err(crate::Error::new(
                crate::error::Kind::Arguments,
                mapdirect_sys::Errno::INVAL,
                "the range is empty",
                "give a range of at least one byte",
            ))
        } else {
            establish(&guard, file, range, flags, self.patience)
        };
        let Established {
            id,
            map,
            file: description,
            connection,
        } = established.map_err(|error| {
            let path = mapdirect_sys::proc::path_of(file);
            error.asking(match &self.range {
                Some(range) => format!("pin bytes {} to {} of {path}", range.start, range.end),
                None => format!("pin {path}"),
            })
        })?;
        Ok(Pin {
            id,
            map,
            _description: description,
            connection,
        })
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
    id: u64,
    map: BlockMap,
    /// The description whose life is the pin.
    _description: OwnedFd,
    connection: Arc<Connection>,
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
        self.id
    }

    /// Whether the pin is kept.
    #[must_use]
    pub fn status(&self) -> Status {
        status_of(&self.connection)
    }

    /// See [`DirectMap::notice_fd`](crate::DirectMap::notice_fd).
    #[must_use]
    pub fn notice_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}
