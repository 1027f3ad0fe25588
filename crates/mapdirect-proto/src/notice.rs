//! Notices that the guard sends about a pin without being asked.

use crate::extent::{DeviceId, EXTENT_RECORD, Extent, decode_extents, encode_extents};
use crate::wire::{DecodeError, Reader, clipped, wire_len};
use std::fmt;
use std::ops::Range;
use zerocopy::little_endian::{I32, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The most extents that a breach lists, both before and after.
pub const MAX_BREACH_EXTENTS: usize = 32;

/// A difference between what a pin promises and what the file has: something
/// that no gate refuses has changed the block map.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Breach {
    /// The number of the pin.
    pub pin: u64,
    /// Device of the filesystem.
    pub device: DeviceId,
    /// Inode number of the file.
    pub inode: u64,
    /// The path of the file, as far as the guard knows it. Empty for a receiver
    /// that may not know it.
    pub path: String,
    /// When the breach was noticed, in nanoseconds since the epoch.
    pub time: u64,
    /// The bytes that differ, from the first to the last.
    pub range: Range<u64>,
    /// The extents of those bytes as they were pinned, but only the first
    /// [`MAX_BREACH_EXTENTS`].
    pub before: Vec<Extent>,
    /// The same extents as they are now.
    pub after: Vec<Extent>,
    /// The process that caused the breach, if it is known.
    pub cause: Option<Cause>,
}

/// The process that changed a pinned block.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Cause {
    /// Process id, as the guard sees it.
    pub pid: i32,
    /// The name of its command.
    pub command: String,
    /// What it did, as far as that is known.
    pub what: String,
}

/// An event in the life of a pin.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// Blocks of the pin have changed.
    Breach(Breach),
    /// Nothing refuses any more what would change the pin's blocks.
    Lost {
        /// The number of the pin.
        pin: u64,
        /// The reason, for a person.
        why: String,
    },
    /// The kernel still refuses, but no guard tends the pin.
    Unattended {
        /// The number of the pin.
        pin: u64,
        /// The reason, for a person.
        why: String,
    },
    /// A name of the file was removed, renamed or replaced. Only a pin that
    /// denies that, by a gate that cannot refuse it, has such a notice.
    Renamed {
        /// The number of the pin.
        pin: u64,
        /// What happened, for a person.
        how: String,
    },
}

impl Notice {
    /// The pin that the notice is about.
    #[must_use]
    pub const fn pin(&self) -> u64 {
        match self {
            Self::Breach(breach) => breach.pin,
            Self::Lost { pin, .. } | Self::Unattended { pin, .. } | Self::Renamed { pin, .. } => {
                *pin
            }
        }
    }
}

impl Cause {
    /// A process, and what it did.
    #[must_use]
    pub fn new(pid: i32, command: impl Into<String>, what: impl Into<String>) -> Self {
        Self {
            pid,
            command: command.into(),
            what: what.into(),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} ({})", self.pid, self.command)?;
        if !self.what.is_empty() {
            write!(f, ", {}", self.what)?;
        }
        Ok(())
    }
}

impl Breach {
    /// A breach of unknown cause. Extents beyond [`MAX_BREACH_EXTENTS`] are
    /// left out.
    #[must_use]
    pub fn new(
        pin: u64,
        (device, inode): (DeviceId, u64),
        path: impl Into<String>,
        time: u64,
        range: Range<u64>,
        (before, after): (&[Extent], &[Extent]),
    ) -> Self {
        let first = |extents: &[Extent]| extents[..extents.len().min(MAX_BREACH_EXTENTS)].to_vec();
        Self {
            pin,
            device,
            inode,
            path: path.into(),
            time,
            range,
            before: first(before),
            after: first(after),
            cause: None,
        }
    }

    /// This breach, with its cause.
    #[must_use]
    pub fn caused_by(mut self, cause: Option<Cause>) -> Self {
        self.cause = cause;
        self
    }
}

/// A breach on the wire: this record, the texts, and the extents.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct BreachRecord {
    pin: U64,
    inode: U64,
    time: U64,
    start: U64,
    end: U64,
    major: U32,
    minor: U32,
    path: U32,
    before: U32,
    after: U32,
    /// 1 if there is a cause, otherwise 0.
    caused: U32,
    pid: I32,
    command: U32,
    what: U32,
    reserved: U32,
}

/// The fate of one pin on the wire: this record and the reason.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct FateRecord {
    pub(crate) pin: U64,
}

/// The lengths of the longest texts.
pub(crate) const MAX_PATH: usize = 4096;
pub(crate) const MAX_WHY: usize = 1024;
pub(crate) const MAX_WORD: usize = 256;

impl Breach {
    pub(crate) fn to_wire(&self) -> (BreachRecord, Vec<u8>) {
        let path = clipped(&self.path, MAX_PATH);
        let cause = self.cause.as_ref();
        let word = |text: fn(&Cause) -> &str| clipped(cause.map_or("", text), MAX_WORD);
        let (command, what) = (word(|cause| &cause.command), word(|cause| &cause.what));
        let first = |extents: &[Extent]| {
            let count = extents.len().min(MAX_BREACH_EXTENTS);
            (wire_len(count), encode_extents(&extents[..count]))
        };
        let (before, before_bytes) = first(&self.before);
        let (after, after_bytes) = first(&self.after);
        let record = BreachRecord {
            pin: self.pin.into(),
            inode: self.inode.into(),
            time: self.time.into(),
            start: self.range.start.into(),
            end: self.range.end.into(),
            major: self.device.major.into(),
            minor: self.device.minor.into(),
            path: wire_len(path.len()),
            before,
            after,
            caused: u32::from(cause.is_some()).into(),
            pid: cause.map_or(0, |cause| cause.pid).into(),
            command: wire_len(command.len()),
            what: wire_len(what.len()),
            reserved: 0.into(),
        };
        let tail = [
            path.as_bytes(),
            command.as_bytes(),
            what.as_bytes(),
            &before_bytes,
            &after_bytes,
        ]
        .concat();
        (record, tail)
    }

    pub(crate) fn from_wire(
        record: &BreachRecord,
        rest: &mut Reader<'_>,
    ) -> Result<Self, DecodeError> {
        let path = rest.text(record.path.get() as usize)?;
        let command = rest.text(record.command.get() as usize)?;
        let what = rest.text(record.what.get() as usize)?;
        let mut extents = |count: U32| {
            let count = count.get() as usize;
            if count > MAX_BREACH_EXTENTS {
                return Err(DecodeError::Value("extents"));
            }
            decode_extents(rest.take(count * EXTENT_RECORD)?)
        };
        Ok(Self {
            pin: record.pin.get(),
            device: DeviceId {
                major: record.major.get(),
                minor: record.minor.get(),
            },
            inode: record.inode.get(),
            path,
            time: record.time.get(),
            range: record.start.get()..record.end.get(),
            before: extents(record.before)?,
            after: extents(record.after)?,
            cause: (record.caused.get() != 0).then_some(Cause {
                pid: record.pid.get(),
                command,
                what,
            }),
        })
    }
}
