//! The replies of the guard, and their wire format.

use crate::envelope::{Body, Empty, HEADER, kind, message};
use crate::extent::{DeviceId, EXTENT_RECORD, Extent, decode_extents, encode_extents};
use crate::notice::{self, Breach, BreachRecord, FateRecord, Notice};
use crate::record::{MAX_RECORD_TAIL, Record, RecordRecord};
use crate::refusal::{Refusal, decode_refusal, encode_refusal};
use crate::request::Flags;
use crate::wire::{DecodeError, clipped, wire_len};
use crate::{MAX_INLINE_EXTENTS, MAX_MESSAGE};
use std::ops::Range;
use zerocopy::little_endian::{I32, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The mechanism that refuses what would break a pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Gate {
    /// fanotify pre-content permission events: writers are excluded.
    Fanotify,
    /// BPF LSM programs: operations are judged in the kernel.
    Bpf,
    /// A gate that is newer than this version.
    Other(u32),
}

impl std::fmt::Display for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fanotify => f.pad("fanotify"),
            Self::Bpf => f.pad("bpf"),
            Self::Other(number) => write!(f, "number {number}"),
        }
    }
}

impl Gate {
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::Fanotify => 1,
            Self::Bpf => 2,
            Self::Other(number) => number,
        }
    }

    pub(crate) fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Fanotify,
            2 => Self::Bpf,
            other => Self::Other(other),
        }
    }

    /// The name of the gate on the command line and in output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fanotify => "fanotify",
            Self::Bpf => "bpf",
            Self::Other(_) => "other",
        }
    }
}

/// A granted pin. The description whose life is the pin comes with it, and a
/// sealed memory file with the extents if there are more than
/// [`MAX_INLINE_EXTENTS`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Granted {
    /// The number of the pin on this guard.
    pub pin: u64,
    /// The pinned range: the requested range, extended to whole blocks.
    pub range: Range<u64>,
    /// Size of the file in bytes.
    pub file_size: u64,
    /// Size of a block in bytes.
    pub block_size: u32,
    /// Device of the filesystem.
    pub device: DeviceId,
    /// The number of extents.
    pub extent_count: u64,
    /// The extents, unless they come in a memory file.
    pub extents: Vec<Extent>,
}

/// A pinned range, as shown to anybody who may read the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinnedRange {
    /// The number of the pin.
    pub pin: u64,
    /// The bytes, extended to whole blocks.
    pub range: Range<u64>,
    /// The flags of the request.
    pub flags: Flags,
    /// The process that asked for the pin.
    pub pid: i32,
}

/// A reply of the guard.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reply {
    /// Answers a hello.
    Welcome {
        /// The newest protocol version of the guard.
        version: u32,
        /// The gate in force.
        gate: Gate,
        /// Process id of the guard.
        pid: i32,
        /// The challenge that the proof must contain.
        challenge: [u8; 32],
    },
    /// The request is done.
    Done,
    /// The description that came with the request is older than the gate:
    /// replace it by the one that comes with this reply.
    Swap,
    /// The pin is granted.
    Granted(Granted),
    /// There is no pin.
    Refused(Refusal),
    /// Answers a query; the second field says how many more there are.
    Pins(Vec<PinnedRange>, u64),
    /// Answers a status request; a sealed memory file comes with it.
    Status,
    /// Answers a request to watch, after the notices of earlier events. If the
    /// gate stays in the kernel without its guard, the gate's directory comes
    /// along as an `O_PATH` descriptor. The directory has no links any more
    /// when the gate has been removed.
    Watching,
    /// Something happened to a watched pin.
    Notice(Notice),
    /// A record.
    Record(Box<Record>),
    /// So many records could not be sent, because they came too fast for the
    /// guard to keep or for this client to read.
    Missed(u64),
    /// The end of the records that are kept.
    Following,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct MissedRecord {
    count: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct WelcomeRecord {
    version: U32,
    gate: U32,
    pid: I32,
    reserved: U32,
    challenge: [u8; 32],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct GrantedRecord {
    pin: U64,
    start: U64,
    end: U64,
    file_size: U64,
    block_size: U32,
    major: U32,
    minor: U32,
    inline_extents: U32,
    extent_count: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct PinsRecord {
    count: U32,
    reserved: U32,
    omitted: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct PinnedRangeRecord {
    pin: U64,
    start: U64,
    end: U64,
    flags: U32,
    pid: I32,
}

/// The most pinned ranges that a reply carries.
pub const MAX_PINS: usize = 512;

const _: () = {
    let granted = size_of::<GrantedRecord>() + MAX_INLINE_EXTENTS * EXTENT_RECORD;
    assert!(HEADER + granted <= MAX_MESSAGE);
    let pins = size_of::<PinsRecord>() + MAX_PINS * size_of::<PinnedRangeRecord>();
    assert!(HEADER + pins <= MAX_MESSAGE);
    let texts = notice::MAX_PATH + 2 * notice::MAX_WORD;
    let breach = size_of::<BreachRecord>() + texts + 2 * notice::MAX_BREACH_EXTENTS * EXTENT_RECORD;
    assert!(HEADER + breach <= MAX_MESSAGE);
    assert!(HEADER + size_of::<FateRecord>() + notice::MAX_WHY <= MAX_MESSAGE);
    assert!(HEADER + size_of::<RecordRecord>() + MAX_RECORD_TAIL <= MAX_MESSAGE);
};

impl Reply {
    /// The bytes of the message.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Welcome {
                version,
                gate,
                pid,
                challenge,
            } => {
                let record = WelcomeRecord {
                    version: (*version).into(),
                    gate: gate.number().into(),
                    pid: (*pid).into(),
                    reserved: 0.into(),
                    challenge: *challenge,
                };
                message(kind::WELCOME, &record, &[])
            }
            Self::Done => message(kind::DONE, &Empty {}, &[]),
            Self::Swap => message(kind::SWAP, &Empty {}, &[]),
            Self::Granted(granted) => encode_granted(granted),
            Self::Refused(refusal) => encode_refusal(refusal),
            Self::Pins(pins, omitted) => encode_pins(pins, *omitted),
            Self::Status => message(kind::STATUS_REPLY, &Empty {}, &[]),
            Self::Watching => message(kind::WATCHING, &Empty {}, &[]),
            Self::Notice(notice) => encode_notice(notice),
            Self::Record(record) => {
                let (record, tail) = record.to_wire();
                message(kind::RECORD, &record, &tail)
            }
            Self::Missed(count) => {
                let record = MissedRecord {
                    count: (*count).into(),
                };
                message(kind::MISSED, &record, &[])
            }
            Self::Following => message(kind::FOLLOWING, &Empty {}, &[]),
        }
    }

    /// Decodes a reply.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] for anything that is not a reply.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let body = Body::open(bytes)?;
        Ok(match body.kind {
            kind::WELCOME => {
                let record: WelcomeRecord = body.only()?;
                Self::Welcome {
                    version: record.version.get(),
                    gate: Gate::from_number(record.gate.get()),
                    pid: record.pid.get(),
                    challenge: record.challenge,
                }
            }
            kind::DONE => {
                let Empty {} = body.only()?;
                Self::Done
            }
            kind::SWAP => {
                let Empty {} = body.only()?;
                Self::Swap
            }
            kind::GRANTED => Self::Granted(decode_granted(body)?),
            kind::REFUSED => Self::Refused(decode_refusal(body)?),
            kind::PINS => decode_pins(body)?,
            kind::STATUS_REPLY => {
                let Empty {} = body.only()?;
                Self::Status
            }
            kind::WATCHING => {
                let Empty {} = body.only()?;
                Self::Watching
            }
            kind::BREACH | kind::LOST | kind::UNATTENDED | kind::RENAMED => {
                Self::Notice(decode_notice(body)?)
            }
            kind::RECORD => {
                let (record, mut rest): (RecordRecord, _) = body.first()?;
                let record = Record::from_wire(&record, &mut rest)?;
                if !rest.is_empty() {
                    return Err(DecodeError::Length);
                }
                Self::Record(Box::new(record))
            }
            kind::MISSED => {
                let record: MissedRecord = body.only()?;
                Self::Missed(record.count.get())
            }
            kind::FOLLOWING => {
                let Empty {} = body.only()?;
                Self::Following
            }
            other => return Err(DecodeError::Kind(other)),
        })
    }
}

fn encode_notice(notice: &Notice) -> Vec<u8> {
    let (kind, pin, why) = match notice {
        Notice::Breach(breach) => {
            let (record, tail) = breach.to_wire();
            return message(kind::BREACH, &record, &tail);
        }
        Notice::Lost { pin, why } => (kind::LOST, pin, why),
        Notice::Unattended { pin, why } => (kind::UNATTENDED, pin, why),
        Notice::Renamed { pin, how } => (kind::RENAMED, pin, how),
    };
    let record = FateRecord { pin: (*pin).into() };
    message(kind, &record, clipped(why, notice::MAX_WHY).as_bytes())
}

fn decode_notice(body: Body<'_>) -> Result<Notice, DecodeError> {
    let kind = body.kind;
    if kind == kind::BREACH {
        let (record, mut rest): (BreachRecord, _) = body.first()?;
        let breach = Breach::from_wire(&record, &mut rest)?;
        return if rest.is_empty() {
            Ok(Notice::Breach(breach))
        } else {
            Err(DecodeError::Length)
        };
    }
    let (record, mut rest): (FateRecord, _) = body.first()?;
    let pin = record.pin.get();
    let why = rest.text(rest.remaining())?;
    Ok(match kind {
        kind::LOST => Notice::Lost { pin, why },
        kind::RENAMED => Notice::Renamed { pin, how: why },
        _ => Notice::Unattended { pin, why },
    })
}

fn encode_granted(granted: &Granted) -> Vec<u8> {
    let inline = if granted.extents.len() <= MAX_INLINE_EXTENTS {
        granted.extents.as_slice()
    } else {
        &[]
    };
    let record = GrantedRecord {
        pin: granted.pin.into(),
        start: granted.range.start.into(),
        end: granted.range.end.into(),
        file_size: granted.file_size.into(),
        block_size: granted.block_size.into(),
        major: granted.device.major.into(),
        minor: granted.device.minor.into(),
        inline_extents: wire_len(inline.len()),
        extent_count: granted.extent_count.into(),
    };
    message(kind::GRANTED, &record, &encode_extents(inline))
}

fn decode_granted(body: Body<'_>) -> Result<Granted, DecodeError> {
    let (record, mut rest): (GrantedRecord, _) = body.first()?;
    let inline = record.inline_extents.get() as usize;
    if rest.remaining() != inline * EXTENT_RECORD {
        return Err(DecodeError::Length);
    }
    let range = record.start.get()..record.end.get();
    if range.is_empty() {
        return Err(DecodeError::Value("range"));
    }
    Ok(Granted {
        pin: record.pin.get(),
        range,
        file_size: record.file_size.get(),
        block_size: record.block_size.get(),
        device: DeviceId {
            major: record.major.get(),
            minor: record.minor.get(),
        },
        extent_count: record.extent_count.get(),
        extents: decode_extents(rest.take(inline * EXTENT_RECORD)?)?,
    })
}

fn encode_pins(pins: &[PinnedRange], omitted: u64) -> Vec<u8> {
    let sent = &pins[..pins.len().min(MAX_PINS)];
    let record = PinsRecord {
        count: wire_len(sent.len()),
        reserved: 0.into(),
        omitted: (omitted + (pins.len() - sent.len()) as u64).into(),
    };
    let mut tail = Vec::new();
    for pin in sent {
        let record = PinnedRangeRecord {
            pin: pin.pin.into(),
            start: pin.range.start.into(),
            end: pin.range.end.into(),
            flags: pin.flags.bits().into(),
            pid: pin.pid.into(),
        };
        tail.extend_from_slice(record.as_bytes());
    }
    message(kind::PINS, &record, &tail)
}

fn decode_pins(body: Body<'_>) -> Result<Reply, DecodeError> {
    let (record, mut rest): (PinsRecord, _) = body.first()?;
    let mut pins = Vec::new();
    for _ in 0..record.count.get() {
        let record: PinnedRangeRecord = rest.record()?;
        pins.push(PinnedRange {
            pin: record.pin.get(),
            range: record.start.get()..record.end.get(),
            flags: Flags::from_known_bits(record.flags.get()),
            pid: record.pid.get(),
        });
    }
    if !rest.is_empty() {
        return Err(DecodeError::Length);
    }
    Ok(Reply::Pins(pins, record.omitted.get()))
}
