//! Records of what was refused and of what was noticed, and their wire format.

use crate::extent::{DeviceId, EXTENT_RECORD, Extent, decode_extents, encode_extents};
use crate::notice::{MAX_BREACH_EXTENTS, MAX_PATH, MAX_WORD};
use crate::reply::Gate;
use crate::wire::{DecodeError, Reader, clipped, wire_len};
use std::fmt;
use std::ops::Range;
use zerocopy::little_endian::{I32, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What a record tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Event {
    /// An operation was refused.
    Refusal,
    /// Blocks of a pin have changed.
    Breach,
    /// Something that is newer than this version.
    Other(u32),
}

impl Event {
    const fn number(self) -> u32 {
        match self {
            Self::Refusal => 1,
            Self::Breach => 2,
            Self::Other(number) => number,
        }
    }

    const fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Refusal,
            2 => Self::Breach,
            other => Self::Other(other),
        }
    }

    /// The word for it on the command line and in output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Refusal => "refusal",
            Self::Breach => "breach",
            Self::Other(_) => "other",
        }
    }
}

/// A process, as it was when it did something. What could not be found out for
/// certain is not there: a process that is gone leaves its number to others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Actor {
    /// Process id, as the guard sees it; 0 if it is not known.
    pub pid: i32,
    /// The thread; 0 if it is not known.
    pub tid: i32,
    /// The user.
    pub uid: Option<u32>,
    /// The name of the command; empty if it is not known.
    pub command: String,
    /// The program that it runs; empty if it is not known, or is not for the
    /// receiver to know.
    pub executable: String,
    /// Its control group; empty if it is not known.
    pub cgroup: String,
}

/// Who holds a pin.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Owner {
    /// The process that asked for the pin.
    pub pid: i32,
    /// The user of that process.
    pub uid: u32,
    /// The name of its command; empty if it is not known.
    pub command: String,
}

/// The name of a file. A pin is on the file, so the name may change under it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Name {
    /// The last path at which the file was seen. Empty if none is known, or if
    /// it is not for the receiver to know.
    pub path: String,
    /// The path by which the file was pinned, if it has another one now.
    pub former: String,
    /// What is known of these paths.
    pub state: NameState,
}

/// What is known of the name of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct NameState(u32);

impl NameState {
    /// Nothing was found out: the path is what it was when the file was pinned.
    pub const UNKNOWN: Self = Self(0);
    /// The path leads to the file.
    pub const PRESENT: Self = Self(1);
    /// The file has no name any more.
    pub const DELETED: Self = Self(2);
    /// The path by which the file was pinned leads to another file.
    pub const REPLACED: Self = Self(4);
    /// The path by which the file was pinned leads nowhere.
    pub const MISSING: Self = Self(8);

    /// Whether all of `other` is known.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The bits on the wire.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// The bits that this version knows.
    #[must_use]
    pub const fn from_known_bits(bits: u32) -> Self {
        Self(bits & 15)
    }
}

impl Name {
    /// A path of which nothing else is known.
    #[must_use]
    pub fn new(path: impl Into<String>, former: impl Into<String>, state: NameState) -> Self {
        Self {
            path: path.into(),
            former: former.into(),
            state,
        }
    }

    /// What must be said of the path, for a person; empty if the path leads to
    /// the file, or nothing is known. Names are as they are, control characters
    /// included.
    #[must_use]
    pub fn remark(&self) -> String {
        self.remark_as(str::to_owned)
    }

    /// The same, with names as `show` shows them.
    #[must_use]
    pub fn remark_as(&self, show: impl Fn(&str) -> String) -> String {
        let is = |state| self.state.contains(state);
        let mut remarks = Vec::new();
        if is(NameState::DELETED) {
            remarks.push(String::from("deleted"));
        }
        if self.former.is_empty() {
            if is(NameState::REPLACED) {
                remarks.push(String::from("that name means another file now"));
            } else if is(NameState::MISSING) && !is(NameState::DELETED) {
                remarks.push(String::from("not there any more"));
            }
        } else if is(NameState::REPLACED) {
            let former = show(&self.former);
            remarks.push(format!("was {former}, which is another file now"));
        } else {
            remarks.push(format!("was {}", show(&self.former)));
        }
        remarks.join("; ")
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let remark = self.remark();
        if remark.is_empty() {
            f.write_str(&self.path)
        } else {
            write!(f, "{} ({remark})", self.path)
        }
    }
}

/// One refusal or breach.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Record {
    /// The guard counts its records. A number that is left out is a record that
    /// could not be kept.
    pub number: u64,
    /// Nanoseconds since the epoch.
    pub time: u64,
    /// What happened.
    pub event: Event,
    /// Who did it.
    pub actor: Actor,
    /// What it tried, or how blocks were changed if that is known.
    pub operation: String,
    /// The system call with its arguments, as far as they are known; empty
    /// otherwise.
    pub call: String,
    /// The bytes of the attempt, if it had a range, or the bytes that changed.
    pub range: Option<Range<u64>>,
    /// Device of the filesystem.
    pub device: DeviceId,
    /// Inode number of the file.
    pub inode: u64,
    /// The name of the file when this happened.
    pub name: Name,
    /// The pin that it met; 0 if it is not known.
    pub pin: u64,
    /// Who holds that pin.
    pub owner: Option<Owner>,
    /// The gate in force.
    pub gate: Gate,
    /// The extents of a breach as they were pinned, the first few.
    pub before: Vec<Extent>,
    /// The same extents as they are now.
    pub after: Vec<Extent>,
}

impl Record {
    /// A record of an event of which nothing else is known yet.
    #[must_use]
    pub fn new(event: Event, time: u64, gate: Gate, (device, inode): (DeviceId, u64)) -> Self {
        Self {
            number: 0,
            time,
            event,
            actor: Actor::default(),
            operation: String::new(),
            call: String::new(),
            range: None,
            device,
            inode,
            name: Name::default(),
            pin: 0,
            owner: None,
            gate,
            before: Vec::new(),
            after: Vec::new(),
        }
    }
}

impl Owner {
    /// A holder whose command is not known yet.
    #[must_use]
    pub const fn new(pid: i32, uid: u32) -> Self {
        Self {
            pid,
            uid,
            command: String::new(),
        }
    }
}

/// The longest executable and control group that a record keeps: strangers
/// choose them.
pub const MAX_PLACE: usize = 1024;

/// A record on the wire: this, the texts in the order of their lengths, and the
/// extents.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RecordRecord {
    number: U64,
    time: U64,
    inode: U64,
    pin: U64,
    /// `u64::MAX` for both if there is no range.
    start: U64,
    end: U64,
    event: U32,
    gate: U32,
    major: U32,
    minor: U32,
    pid: I32,
    tid: I32,
    uid: U32,
    /// 1: there is a user. 2: there is an owner.
    there: U32,
    owner_pid: I32,
    owner_uid: U32,
    name_state: U32,
    lengths: [U32; 8],
    before: U32,
    after: U32,
    reserved: U32,
}

const HAS_USER: u32 = 1;
const HAS_OWNER: u32 = 2;

/// The most bytes of a record behind its fixed part.
pub(crate) const MAX_RECORD_TAIL: usize =
    2 * MAX_PATH + 2 * MAX_PLACE + 4 * MAX_WORD + 2 * MAX_BREACH_EXTENTS * EXTENT_RECORD;

impl Record {
    pub(crate) fn to_wire(&self) -> (RecordRecord, Vec<u8>) {
        let owner_command = self.owner.as_ref().map_or("", |owner| &owner.command);
        let texts = [
            clipped(&self.name.path, MAX_PATH),
            clipped(&self.name.former, MAX_PATH),
            clipped(&self.actor.executable, MAX_PLACE),
            clipped(&self.actor.cgroup, MAX_PLACE),
            clipped(&self.actor.command, MAX_WORD),
            clipped(&self.operation, MAX_WORD),
            clipped(&self.call, MAX_WORD),
            clipped(owner_command, MAX_WORD),
        ];
        let first = |extents: &[Extent]| {
            let count = extents.len().min(MAX_BREACH_EXTENTS);
            (wire_len(count), encode_extents(&extents[..count]))
        };
        let (before, before_bytes) = first(&self.before);
        let (after, after_bytes) = first(&self.after);
        let range = self.range.clone().unwrap_or(u64::MAX..u64::MAX);
        let mut there = 0;
        if self.actor.uid.is_some() {
            there |= HAS_USER;
        }
        if self.owner.is_some() {
            there |= HAS_OWNER;
        }
        let record = RecordRecord {
            number: self.number.into(),
            time: self.time.into(),
            inode: self.inode.into(),
            pin: self.pin.into(),
            start: range.start.into(),
            end: range.end.into(),
            event: self.event.number().into(),
            gate: self.gate.number().into(),
            major: self.device.major.into(),
            minor: self.device.minor.into(),
            pid: self.actor.pid.into(),
            tid: self.actor.tid.into(),
            uid: self.actor.uid.unwrap_or(0).into(),
            there: there.into(),
            owner_pid: self.owner.as_ref().map_or(0, |owner| owner.pid).into(),
            owner_uid: self.owner.as_ref().map_or(0, |owner| owner.uid).into(),
            name_state: self.name.state.bits().into(),
            lengths: texts.map(|text| wire_len(text.len())),
            before,
            after,
            reserved: 0.into(),
        };
        let mut tail = texts.concat().into_bytes();
        tail.extend_from_slice(&before_bytes);
        tail.extend_from_slice(&after_bytes);
        (record, tail)
    }

    pub(crate) fn from_wire(
        record: &RecordRecord,
        rest: &mut Reader<'_>,
    ) -> Result<Self, DecodeError> {
        let mut texts = record
            .lengths
            .map(|length| length.get() as usize)
            .into_iter();
        let mut text = |rest: &mut Reader<'_>| rest.text(texts.next().unwrap_or(0));
        let (path, former) = (text(rest)?, text(rest)?);
        let (executable, cgroup) = (text(rest)?, text(rest)?);
        let (command, operation) = (text(rest)?, text(rest)?);
        let (call, owner_command) = (text(rest)?, text(rest)?);
        let mut extents = |count: U32| {
            let count = count.get() as usize;
            if count > MAX_BREACH_EXTENTS {
                return Err(DecodeError::Value("extents"));
            }
            decode_extents(rest.take(count * EXTENT_RECORD)?)
        };
        let there = record.there.get();
        let range = record.start.get()..record.end.get();
        Ok(Self {
            number: record.number.get(),
            time: record.time.get(),
            event: Event::from_number(record.event.get()),
            actor: Actor {
                pid: record.pid.get(),
                tid: record.tid.get(),
                uid: (there & HAS_USER != 0).then_some(record.uid.get()),
                command,
                executable,
                cgroup,
            },
            operation,
            call,
            range: (range != (u64::MAX..u64::MAX)).then_some(range),
            device: DeviceId {
                major: record.major.get(),
                minor: record.minor.get(),
            },
            inode: record.inode.get(),
            name: Name {
                path,
                former,
                state: NameState::from_known_bits(record.name_state.get()),
            },
            pin: record.pin.get(),
            owner: (there & HAS_OWNER != 0).then_some(Owner {
                pid: record.owner_pid.get(),
                uid: record.owner_uid.get(),
                command: owner_command,
            }),
            gate: Gate::from_number(record.gate.get()),
            before: extents(record.before)?,
            after: extents(record.after)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_must_be_said_of_a_name_is_said() {
        let said = |former: &str, state| Name::new("/a", former, state).to_string();
        let (deleted, replaced) = (NameState::DELETED, NameState::REPLACED);
        assert_eq!(said("", NameState::PRESENT), "/a");
        assert_eq!(said("", NameState::UNKNOWN), "/a");
        assert_eq!(said("", deleted), "/a (deleted)");
        assert_eq!(said("", NameState::MISSING), "/a (not there any more)");
        assert_eq!(
            said("", deleted.and(replaced)),
            "/a (deleted; that name means another file now)"
        );
        assert_eq!(said("/b", NameState::PRESENT), "/a (was /b)");
        assert_eq!(
            said("/b", NameState::PRESENT.and(replaced)),
            "/a (was /b, which is another file now)"
        );
    }
}
