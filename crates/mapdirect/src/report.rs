//! What the guard tells of others: who has a file open, and which ranges are
//! pinned.

use crate::establish::Strength;
use mapdirect_proto::{self as proto, Flags};
use std::fmt;
use std::ops::Range;

/// A process that has a file open or mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Opener {
    /// Process id, as the guard sees it; 0 for the kernel itself.
    pub pid: i32,
    /// Number of the descriptor, or `None` for a memory mapping or a user in
    /// the kernel.
    pub fd: Option<i32>,
    /// Whether it can write.
    pub writable: bool,
    /// Whether it is a memory mapping.
    pub mapped: bool,
    /// Name of the command, or what else it is.
    pub command: String,
}

impl Opener {
    pub(crate) fn of(opener: proto::Opener) -> Self {
        let proto::Opener {
            pid,
            fd,
            writable,
            mapped,
            command,
        } = opener;
        Self {
            pid,
            fd,
            writable,
            mapped,
            command,
        }
    }
}

impl fmt::Display for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            pid,
            fd,
            writable,
            mapped,
            command,
        } = self;
        if *pid > 0 {
            write!(f, "pid {pid} ({command})")?;
        } else {
            f.write_str(command)?;
        }
        match (mapped, fd) {
            (true, _) => f.write_str(" maps it")?,
            (false, Some(fd)) => write!(f, " has it open as descriptor {fd}")?,
            (false, None) => f.write_str(" has it open")?,
        }
        f.write_str(if *writable {
            ", for writing"
        } else {
            ", for reading"
        })
    }
}

/// What a pin was asked to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PinFlags(Flags);

impl PinFlags {
    pub(crate) const fn of(flags: Flags) -> Self {
        Self(flags)
    }

    /// Whether its holder maps the range for writing.
    #[must_use]
    pub const fn is_mapped(self) -> bool {
        self.0.contains(Flags::MAP)
    }

    /// Whether its holder accepts the page cache.
    #[must_use]
    pub const fn is_cached(self) -> bool {
        self.0.contains(Flags::CACHED)
    }

    /// Whether it covers the whole file and its size
    /// ([`Scope::File`](crate::Scope::File)).
    #[must_use]
    pub const fn is_whole_file(self) -> bool {
        self.0.contains(Flags::WHOLE_FILE)
    }

    /// Whether the descendants of its holder have a holder's rights.
    #[must_use]
    pub const fn is_for_family(self) -> bool {
        self.0.contains(Flags::FAMILY)
    }

    /// Whether it denies everybody else to open the file for writing.
    #[must_use]
    pub const fn denies_write(self) -> bool {
        self.0.contains(Flags::DENY_WRITE)
    }

    /// Whether it denies that a name of the file goes.
    #[must_use]
    pub const fn denies_rename(self) -> bool {
        self.0.contains(Flags::DENY_RENAME)
    }

    /// What it holds of its range.
    #[must_use]
    pub const fn strength(self) -> Strength {
        if self.0.contains(Flags::STABLE) {
            Strength::Stable
        } else {
            Strength::All
        }
    }
}

/// A pinned range of a file, as [`Guard::pinned_ranges`] tells of it.
///
/// [`Guard::pinned_ranges`]: crate::Guard::pinned_ranges
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PinnedRange {
    /// The number by which the guard knows the pin.
    pub pin: u64,
    /// Bytes of the file, extended to whole filesystem blocks. A range up to
    /// `u64::MAX` has no end.
    pub range: Range<u64>,
    /// What it was asked to be.
    pub flags: PinFlags,
    /// The process that asked for it, as the guard sees it.
    pub pid: i32,
}

impl PinnedRange {
    pub(crate) fn of(pinned: proto::PinnedRange) -> Self {
        Self {
            pin: pinned.pin,
            range: pinned.range,
            flags: PinFlags::of(pinned.flags),
            pid: pinned.pid,
        }
    }
}
