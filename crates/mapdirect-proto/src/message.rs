//! Requests, replies, and their bytes.

use crate::extent::{DeviceId, EXTENT_RECORD, Extent, decode_extents, encode_extents};
use crate::notice::{self, Breach, BreachRecord, FateRecord, Notice};
use crate::reason::Reason;
use crate::wire::{DecodeError, Reader, clipped, wire_len};
use crate::{MAGIC, MAX_INLINE_EXTENTS, MAX_MESSAGE};
use std::ops::{BitOr, Range};
use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What a pin is asked to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flags(u32);

impl Flags {
    /// Nothing special: pin a range and hand out its extents.
    pub const NONE: Self = Self(0);
    /// The range will be mapped `MAP_DIRECT`: the file must be open for
    /// reading and writing, and keep the promise without the page cache
    /// unless [`Flags::CACHED`] is given.
    pub const MAP: Self = Self(1);
    /// The page cache is accepted.
    pub const CACHED: Self = Self(2);
    /// Pin the whole file and its size.
    pub const WHOLE_FILE: Self = Self(4);
    /// With [`Flags::MAP`]: the holder maps nothing of the file where its
    /// blocks cannot be stored to as they are.
    pub const SEGMENTS: Self = Self(8);

    /// Whether all bits of `other` are set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The raw bits.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }

    const KNOWN: u32 = 15;

    /// The bits this version knows, of a report about a pin that exists.
    #[must_use]
    pub const fn from_known_bits(bits: u32) -> Self {
        Self(bits & Self::KNOWN)
    }

    fn from_bits(bits: u32) -> Result<Self, DecodeError> {
        if bits & !Self::KNOWN == 0 {
            Ok(Self(bits))
        } else {
            Err(DecodeError::Newer)
        }
    }
}

impl BitOr for Flags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Which mechanism refuses what would break a pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Gate {
    /// fanotify pre-content permission events: writers are excluded.
    Fanotify,
    /// BPF LSM programs: operations are judged in the kernel.
    Bpf,
    /// One newer than this version.
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

    /// The name used on the command line and in output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fanotify => "fanotify",
            Self::Bpf => "bpf",
            Self::Other(_) => "other",
        }
    }
}

/// Asks for a pin; the file comes with the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PinRequest {
    /// First byte.
    pub offset: u64,
    /// Length in bytes; 0 means to the end of the file.
    pub length: u64,
    /// What it shall be.
    pub flags: Flags,
    /// How many milliseconds to wait for others to let go of the file.
    pub patience_ms: u32,
}

/// What a holder says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Request {
    /// Opens a conversation.
    Hello {
        /// Protocol version of the holder.
        version: u32,
    },
    /// Proves the capability; a memory file comes with it.
    Prove,
    /// Asks for a pin.
    Pin(PinRequest),
    /// The old description has been replaced in this process.
    Swapped,
    /// Asks which ranges of a file are pinned; the file comes with it.
    Query,
    /// Asks for the state of the guard.
    Status,
    /// Announces that thread `tid` will open a pinned file for writing, as a
    /// holder may; an `O_PATH` descriptor of the file comes with it. Good for
    /// one open, for [`ANNOUNCEMENT_LIFE`](crate::ANNOUNCEMENT_LIFE), and not
    /// beyond this conversation.
    Announce {
        /// The thread that will open it.
        tid: i32,
    },
    /// Asks to make blocks of a pin stable that are frozen, while it holds;
    /// the description whose life is the pin comes with it. The answer is a
    /// [`Reply::Granted`] without that description, if the block map changed,
    /// and then a [`Reply::Done`] or [`Reply::Refused`].
    Allocate(AllocateRequest),
    /// This process has let go of a pin. [`Reply::Done`] comes when the gate
    /// judges as if it had never been, if nobody else keeps it.
    Ended(WatchedPin),
    /// Asks to be told what happens to pins of this user from now on. The
    /// answer is what has happened to each of them already, and then
    /// [`Reply::Watching`]. From the first such request on the connection is for
    /// this alone: more of them may follow, and the guard says
    /// [`Reply::Notice`] at any time. It never waits for a reader: when
    /// notices cannot be delivered it closes the connection.
    Watch(Vec<WatchedPin>),
}

/// A pin, and where the guard finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WatchedPin {
    /// Names the pin.
    pub pin: u64,
    /// `st_dev` of the file.
    pub device: u64,
    /// `st_ino` of the file.
    pub inode: u64,
}

/// Which blocks of a pin to make stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllocateRequest {
    /// Names the pin.
    pub pin: u64,
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// A pin as granted. The description whose life is the pin comes with it, and
/// a sealed memory file with the extents when there are more than
/// [`MAX_INLINE_EXTENTS`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Granted {
    /// Names the pin to this guard.
    pub pin: u64,
    /// The range pinned: the one asked for, rounded out to blocks.
    pub range: Range<u64>,
    /// Size of the file in bytes.
    pub file_size: u64,
    /// Size of a block in bytes.
    pub block_size: u32,
    /// Device of the filesystem.
    pub device: DeviceId,
    /// How many extents there are.
    pub extent_count: u64,
    /// The extents, unless they come in a memory file.
    pub extents: Vec<Extent>,
}

/// Somebody who has the file open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opener {
    /// Process id, as the guard sees it.
    pub pid: i32,
    /// Descriptor number, or `None` for a memory mapping or a kernel user.
    pub fd: Option<i32>,
    /// It can write.
    pub writable: bool,
    /// It is a memory mapping.
    pub mapped: bool,
    /// Name of the command, or what else it is.
    pub command: String,
}

/// Why there is no pin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The errno `mmap(2)` would give.
    pub errno: i32,
    /// What kind of obstacle.
    pub reason: Reason,
    /// What stood in the way, for a person.
    pub obstacle: String,
    /// How to mend it, for a person; empty if there is no way.
    pub mend: String,
    /// Who has the file open, where that is the obstacle.
    pub openers: Vec<Opener>,
}

/// A pinned range, for whoever may read the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinnedRange {
    /// Names the pin.
    pub pin: u64,
    /// Bytes, rounded out to blocks.
    pub range: Range<u64>,
    /// What was asked for.
    pub flags: Flags,
    /// Process that asked for it.
    pub pid: i32,
}

/// What the guard says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reply {
    /// Answers a hello.
    Welcome {
        /// Protocol version of the guard.
        version: u32,
        /// The gate in force.
        gate: Gate,
        /// Process id of the guard.
        pid: i32,
        /// What the proof must contain.
        challenge: [u8; 32],
    },
    /// Done.
    Done,
    /// The description that came with the request predates the gate: put the
    /// one that comes with this in its place.
    Swap,
    /// The pin holds.
    Granted(Granted),
    /// There is no pin.
    Refused(Refusal),
    /// Answers a query; the second field says how many more there are.
    Pins(Vec<PinnedRange>, u64),
    /// Answers a status request; a sealed memory file comes with it.
    Status,
    /// Answers a request to watch, after what has happened already. Where a
    /// gate stays in the kernel without its guard, its directory comes along
    /// (`O_PATH`): it has no links any more when the gate has been taken away.
    Watching,
    /// Something happened to a pin that is watched.
    Notice(Notice),
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct Header {
    /// Length of the whole message.
    length: U32,
    kind: U16,
    /// Length of the fixed record behind the header.
    record: U16,
}

const HEADER: usize = size_of::<Header>();

mod kind {
    pub(super) const HELLO: u16 = 1;
    pub(super) const PROVE: u16 = 2;
    pub(super) const PIN: u16 = 3;
    pub(super) const SWAPPED: u16 = 4;
    pub(super) const QUERY: u16 = 5;
    pub(super) const STATUS: u16 = 6;
    pub(super) const ANNOUNCE: u16 = 7;
    pub(super) const ALLOCATE: u16 = 8;
    pub(super) const ENDED: u16 = 9;
    pub(super) const WATCH: u16 = 10;

    pub(super) const WELCOME: u16 = 101;
    pub(super) const DONE: u16 = 102;
    pub(super) const SWAP: u16 = 103;
    pub(super) const GRANTED: u16 = 104;
    pub(super) const REFUSED: u16 = 105;
    pub(super) const PINS: u16 = 106;
    pub(super) const STATUS_REPLY: u16 = 107;
    pub(super) const BREACH: u16 = 108;
    pub(super) const LOST: u16 = 109;
    pub(super) const UNATTENDED: u16 = 110;
    pub(super) const WATCHING: u16 = 111;
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct Empty {}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct HelloRecord {
    magic: U64,
    version: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct PinRecord {
    offset: U64,
    length: U64,
    flags: U32,
    patience_ms: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct AnnounceRecord {
    tid: I32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct WatchRecord {
    count: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct WatchedPinRecord {
    pin: U64,
    device: U64,
    inode: U64,
}

impl WatchedPin {
    fn to_wire(self) -> WatchedPinRecord {
        WatchedPinRecord {
            pin: self.pin.into(),
            device: self.device.into(),
            inode: self.inode.into(),
        }
    }
}

impl From<WatchedPinRecord> for WatchedPin {
    fn from(record: WatchedPinRecord) -> Self {
        Self {
            pin: record.pin.get(),
            device: record.device.get(),
            inode: record.inode.get(),
        }
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct AllocateRecord {
    pin: U64,
    offset: U64,
    length: U64,
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
struct RefusedRecord {
    errno: I32,
    reason: U32,
    obstacle: U32,
    mend: U32,
    openers: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct OpenerRecord {
    pid: I32,
    /// -1 for none.
    fd: I32,
    /// 1 writable, 2 mapped.
    flags: U32,
    command: U32,
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

/// Longest text in a refusal, and most openers: a refusal always fits.
const MAX_TEXT: usize = 4096;
const MAX_COMMAND: usize = 64;
/// Most openers a refusal carries.
pub const MAX_OPENERS: usize = 64;
/// Most pinned ranges a reply carries.
pub const MAX_PINS: usize = 512;
/// Most pins that one request names to be told about.
pub const MAX_WATCHED: usize = 1024;

const _: () = {
    let refusal = 2 * MAX_TEXT + MAX_OPENERS * (size_of::<OpenerRecord>() + MAX_COMMAND);
    assert!(HEADER + size_of::<RefusedRecord>() + refusal <= MAX_MESSAGE);
    let granted = size_of::<GrantedRecord>() + MAX_INLINE_EXTENTS * EXTENT_RECORD;
    assert!(HEADER + granted <= MAX_MESSAGE);
    let pins = size_of::<PinsRecord>() + MAX_PINS * size_of::<PinnedRangeRecord>();
    assert!(HEADER + pins <= MAX_MESSAGE);
    let watched = size_of::<WatchRecord>() + MAX_WATCHED * size_of::<WatchedPinRecord>();
    assert!(HEADER + watched <= MAX_MESSAGE);
    assert!(HEADER + notice::LONGEST <= MAX_MESSAGE);
    assert!(HEADER + size_of::<FateRecord>() + notice::MAX_WHY <= MAX_MESSAGE);
};

fn message(kind: u16, record: &(impl IntoBytes + Immutable), tail: &[u8]) -> Vec<u8> {
    let record = record.as_bytes();
    let length = HEADER + record.len() + tail.len();
    let header = Header {
        length: wire_len(length),
        kind: kind.into(),
        // Records are structures of this file, far below 64 KiB.
        record: u16::try_from(record.len()).unwrap_or(u16::MAX).into(),
    };
    let mut bytes = Vec::with_capacity(length);
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(record);
    bytes.extend_from_slice(tail);
    bytes
}

struct Body<'bytes> {
    kind: u16,
    record: usize,
    reader: Reader<'bytes>,
}

impl<'bytes> Body<'bytes> {
    fn open(bytes: &'bytes [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes);
        let header: Header = reader.record()?;
        if header.length.get() as usize != bytes.len() || bytes.len() > MAX_MESSAGE {
            return Err(DecodeError::Length);
        }
        Ok(Self {
            kind: header.kind.get(),
            record: header.record.get().into(),
            reader,
        })
    }

    /// The fixed record of a message that consists of nothing else.
    fn only<T: FromBytes + IntoBytes + KnownLayout>(mut self) -> Result<T, DecodeError> {
        let record = self.reader.extensible(self.record)?;
        if self.reader.is_empty() {
            Ok(record)
        } else {
            Err(DecodeError::Length)
        }
    }

    /// The fixed record, and what follows it.
    fn first<T: FromBytes + IntoBytes + KnownLayout>(
        mut self,
    ) -> Result<(T, Reader<'bytes>), DecodeError> {
        let record = self.reader.extensible(self.record)?;
        Ok((record, self.reader))
    }
}

impl Request {
    /// How many descriptors must come with it.
    #[must_use]
    pub const fn descriptors(&self) -> usize {
        match self {
            Self::Prove
            | Self::Pin(_)
            | Self::Query
            | Self::Announce { .. }
            | Self::Allocate(_) => 1,
            Self::Hello { .. } | Self::Swapped | Self::Status | Self::Ended(_) | Self::Watch(_) => {
                0
            }
        }
    }

    /// The bytes of the message.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Hello { version } => {
                let record = HelloRecord {
                    magic: MAGIC.into(),
                    version: (*version).into(),
                    reserved: 0.into(),
                };
                message(kind::HELLO, &record, &[])
            }
            Self::Prove => message(kind::PROVE, &Empty {}, &[]),
            Self::Pin(pin) => {
                let record = PinRecord {
                    offset: pin.offset.into(),
                    length: pin.length.into(),
                    flags: pin.flags.bits().into(),
                    patience_ms: pin.patience_ms.into(),
                };
                message(kind::PIN, &record, &[])
            }
            Self::Swapped => message(kind::SWAPPED, &Empty {}, &[]),
            Self::Query => message(kind::QUERY, &Empty {}, &[]),
            Self::Status => message(kind::STATUS, &Empty {}, &[]),
            Self::Announce { tid } => {
                let record = AnnounceRecord {
                    tid: (*tid).into(),
                    reserved: 0.into(),
                };
                message(kind::ANNOUNCE, &record, &[])
            }
            Self::Ended(pin) => message(kind::ENDED, &pin.to_wire(), &[]),
            Self::Allocate(request) => {
                let record = AllocateRecord {
                    pin: request.pin.into(),
                    offset: request.offset.into(),
                    length: request.length.into(),
                };
                message(kind::ALLOCATE, &record, &[])
            }
            Self::Watch(pins) => encode_watch(pins),
        }
    }

    /// Reads a request.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] for anything that is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let body = Body::open(bytes)?;
        Ok(match body.kind {
            kind::HELLO => {
                let record: HelloRecord = body.only()?;
                if record.magic.get() != MAGIC {
                    return Err(DecodeError::Value("magic"));
                }
                Self::Hello {
                    version: record.version.get(),
                }
            }
            kind::PROVE => {
                let Empty {} = body.only()?;
                Self::Prove
            }
            kind::PIN => {
                let record: PinRecord = body.only()?;
                Self::Pin(PinRequest {
                    offset: record.offset.get(),
                    length: record.length.get(),
                    flags: Flags::from_bits(record.flags.get())?,
                    patience_ms: record.patience_ms.get(),
                })
            }
            kind::SWAPPED => {
                let Empty {} = body.only()?;
                Self::Swapped
            }
            kind::QUERY => {
                let Empty {} = body.only()?;
                Self::Query
            }
            kind::STATUS => {
                let Empty {} = body.only()?;
                Self::Status
            }
            kind::ANNOUNCE => {
                let record: AnnounceRecord = body.only()?;
                Self::Announce {
                    tid: record.tid.get(),
                }
            }
            kind::ENDED => {
                let record: WatchedPinRecord = body.only()?;
                Self::Ended(record.into())
            }
            kind::ALLOCATE => {
                let record: AllocateRecord = body.only()?;
                Self::Allocate(AllocateRequest {
                    pin: record.pin.get(),
                    offset: record.offset.get(),
                    length: record.length.get(),
                })
            }
            kind::WATCH => Self::Watch(decode_watch(body)?),
            other => return Err(DecodeError::Kind(other)),
        })
    }
}

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
        }
    }

    /// Reads a reply.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] for anything that is none.
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
            kind::BREACH | kind::LOST | kind::UNATTENDED => Self::Notice(decode_notice(body)?),
            other => return Err(DecodeError::Kind(other)),
        })
    }
}

fn encode_watch(pins: &[WatchedPin]) -> Vec<u8> {
    let named = &pins[..pins.len().min(MAX_WATCHED)];
    let record = WatchRecord {
        count: wire_len(named.len()),
        reserved: 0.into(),
    };
    let mut tail = Vec::new();
    for pin in named {
        tail.extend_from_slice(pin.to_wire().as_bytes());
    }
    message(kind::WATCH, &record, &tail)
}

fn decode_watch(body: Body<'_>) -> Result<Vec<WatchedPin>, DecodeError> {
    let (record, mut rest): (WatchRecord, _) = body.first()?;
    let mut pins = Vec::new();
    for _ in 0..record.count.get() {
        let record: WatchedPinRecord = rest.record()?;
        pins.push(record.into());
    }
    if rest.is_empty() {
        Ok(pins)
    } else {
        Err(DecodeError::Length)
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
    Ok(if kind == kind::LOST {
        Notice::Lost { pin, why }
    } else {
        Notice::Unattended { pin, why }
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

fn encode_refusal(refusal: &Refusal) -> Vec<u8> {
    let obstacle = clipped(&refusal.obstacle, MAX_TEXT);
    let mend = clipped(&refusal.mend, MAX_TEXT);
    let openers = &refusal.openers[..refusal.openers.len().min(MAX_OPENERS)];
    let record = RefusedRecord {
        errno: refusal.errno.into(),
        reason: refusal.reason.number().into(),
        obstacle: wire_len(obstacle.len()),
        mend: wire_len(mend.len()),
        openers: wire_len(openers.len()),
        reserved: 0.into(),
    };
    let mut tail = Vec::new();
    tail.extend_from_slice(obstacle.as_bytes());
    tail.extend_from_slice(mend.as_bytes());
    for opener in openers {
        let command = clipped(&opener.command, MAX_COMMAND);
        let record = OpenerRecord {
            pid: opener.pid.into(),
            fd: opener.fd.unwrap_or(-1).into(),
            flags: (u32::from(opener.writable) | u32::from(opener.mapped) << 1).into(),
            command: wire_len(command.len()),
        };
        tail.extend_from_slice(record.as_bytes());
        tail.extend_from_slice(command.as_bytes());
    }
    message(kind::REFUSED, &record, &tail)
}

fn decode_refusal(body: Body<'_>) -> Result<Refusal, DecodeError> {
    let (record, mut rest): (RefusedRecord, _) = body.first()?;
    let mut refusal = Refusal {
        errno: record.errno.get(),
        reason: Reason::from_number(record.reason.get()),
        obstacle: rest.text(record.obstacle.get() as usize)?,
        mend: rest.text(record.mend.get() as usize)?,
        openers: Vec::new(),
    };
    // Every opener takes bytes, so a lie about their number ends as Short.
    for _ in 0..record.openers.get() {
        let record: OpenerRecord = rest.record()?;
        refusal.openers.push(Opener {
            pid: record.pid.get(),
            fd: Some(record.fd.get()).filter(|fd| *fd >= 0),
            writable: record.flags.get() & 1 != 0,
            mapped: record.flags.get() & 2 != 0,
            command: rest.text(record.command.get() as usize)?,
        });
    }
    if !rest.is_empty() {
        return Err(DecodeError::Length);
    }
    Ok(refusal)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ExtentState;
    use proptest::prelude::*;

    fn request() -> impl Strategy<Value = Request> {
        let pin = (any::<u64>(), any::<u64>(), 0u32..8, any::<u32>()).prop_map(
            |(offset, length, flags, patience_ms)| {
                Request::Pin(PinRequest {
                    offset,
                    length,
                    flags: Flags(flags),
                    patience_ms,
                })
            },
        );
        prop_oneof![
            any::<u32>().prop_map(|version| Request::Hello { version }),
            Just(Request::Prove),
            pin,
            Just(Request::Swapped),
            Just(Request::Query),
            Just(Request::Status),
            any::<i32>().prop_map(|tid| Request::Announce { tid }),
            any::<(u64, u64, u64)>().prop_map(|(pin, device, inode)| {
                Request::Ended(WatchedPin { pin, device, inode })
            }),
            proptest::collection::vec(any::<(u64, u64, u64)>(), 0..9).prop_map(|pins| {
                let pins = pins.into_iter();
                let watched = pins.map(|(pin, device, inode)| WatchedPin { pin, device, inode });
                Request::Watch(watched.collect())
            }),
            any::<(u64, u64, u64)>().prop_map(|(pin, offset, length)| {
                Request::Allocate(AllocateRequest {
                    pin,
                    offset,
                    length,
                })
            }),
        ]
    }

    fn opener() -> impl Strategy<Value = Opener> {
        let fd = proptest::option::of(0..i32::MAX);
        (any::<i32>(), fd, any::<bool>(), any::<bool>(), ".{0,12}").prop_map(
            |(pid, fd, writable, mapped, command)| Opener {
                pid,
                fd,
                writable,
                mapped,
                command,
            },
        )
    }

    fn reply() -> impl Strategy<Value = Reply> {
        let welcome = (any::<u32>(), any::<u32>(), any::<i32>(), any::<[u8; 32]>()).prop_map(
            |(version, gate, pid, challenge)| Reply::Welcome {
                version,
                gate: Gate::from_number(gate),
                pid,
                challenge,
            },
        );
        let extents = proptest::collection::vec((any::<u32>(), 1u32..9), 0..20);
        let granted = (any::<u64>(), 0u64..1000, 1u64..1000, extents).prop_map(
            |(pin, start, length, extents)| {
                let extents: Vec<_> = extents
                    .into_iter()
                    .map(|(at, length)| {
                        let physical = Some(u64::from(at) * 7);
                        Extent::new(at.into(), physical, length.into(), ExtentState::Shared)
                    })
                    .collect();
                Reply::Granted(Granted {
                    pin,
                    range: start..start + length,
                    file_size: length,
                    block_size: 4096,
                    device: DeviceId { major: 7, minor: 3 },
                    extent_count: extents.len() as u64,
                    extents,
                })
            },
        );
        let openers = proptest::collection::vec(opener(), 0..5);
        let refused = (any::<i32>(), any::<u32>(), ".{0,40}", ".{0,40}", openers).prop_map(
            |(errno, reason, obstacle, mend, openers)| {
                Reply::Refused(Refusal {
                    errno,
                    reason: Reason::from_number(reason),
                    obstacle,
                    mend,
                    openers,
                })
            },
        );
        let pin = (
            any::<u64>(),
            any::<u64>(),
            any::<u64>(),
            0u32..8,
            any::<i32>(),
        )
            .prop_map(|(pin, start, end, flags, pid)| PinnedRange {
                pin,
                range: start..end,
                flags: Flags(flags),
                pid,
            });
        let pins = (proptest::collection::vec(pin, 0..9), any::<u32>())
            .prop_map(|(pins, omitted)| Reply::Pins(pins, omitted.into()));
        prop_oneof![
            welcome,
            Just(Reply::Done),
            Just(Reply::Swap),
            granted,
            refused,
            pins,
            Just(Reply::Status),
            Just(Reply::Watching),
            notice().prop_map(Reply::Notice),
        ]
    }

    fn notice() -> impl Strategy<Value = Notice> {
        let extents = || {
            proptest::collection::vec(any::<u32>(), 0..9).prop_map(|places| {
                let places = places.into_iter();
                let extent =
                    |at: u32| Extent::new(at.into(), None, u64::from(at) + 1, ExtentState::Hole);
                places.map(extent).collect::<Vec<_>>()
            })
        };
        let cause = proptest::option::of((any::<i32>(), ".{0,20}", ".{0,20}"));
        let breach = (any::<[u64; 5]>(), ".{0,40}", extents(), extents(), cause).prop_map(
            |([pin, inode, time, start, end], path, before, after, cause)| {
                let device = DeviceId { major: 7, minor: 3 };
                let both = (&before[..], &after[..]);
                let breach = Breach::new(pin, (device, inode), path, time, start..end, both);
                let cause =
                    cause.map(|(pid, command, what)| notice::Cause::new(pid, command, what));
                Notice::Breach(breach.caused_by(cause))
            },
        );
        prop_oneof![
            breach,
            (any::<u64>(), ".{0,60}").prop_map(|(pin, why)| Notice::Lost { pin, why }),
            (any::<u64>(), ".{0,60}").prop_map(|(pin, why)| Notice::Unattended { pin, why }),
        ]
    }

    proptest! {
        #[test]
        fn requests_survive_the_wire(request in request()) {
            prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
        }

        #[test]
        fn replies_survive_the_wire(reply in reply()) {
            prop_assert_eq!(Reply::decode(&reply.encode()), Ok(reply));
        }

        #[test]
        fn any_bytes_decode_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Request::decode(&bytes);
            let _ = Reply::decode(&bytes);
        }

        /// Bytes that get past the header reach every decoder.
        #[test]
        fn any_record_decodes_or_not(
            kind in prop_oneof![1u16..12, 101u16..113],
            record in 0u16..80,
            tail in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let header = Header {
                length: wire_len(HEADER + tail.len()),
                kind: kind.into(),
                record: record.into(),
            };
            let bytes = [header.as_bytes(), &tail].concat();
            let _ = Request::decode(&bytes);
            let _ = Reply::decode(&bytes);
        }

        #[test]
        fn a_changed_byte_never_upsets_the_decoder(
            reply in reply(),
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
        ) {
            let mut bytes = reply.encode();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = Reply::decode(&bytes);
        }
    }

    #[test]
    fn a_shorter_record_reads_as_zeros_and_a_longer_must_be_zero() {
        let old = message(kind::PIN, &[7u8, 0, 0, 0, 0, 0, 0, 0], &[]);
        let Ok(Request::Pin(pin)) = Request::decode(&old) else {
            panic!("an older record must be read");
        };
        assert_eq!((pin.offset, pin.length), (7, 0));
        let mut newer = [0u8; 40];
        assert!(Request::decode(&message(kind::PIN, &newer, &[])).is_ok());
        newer[39] = 1;
        let refused = Request::decode(&message(kind::PIN, &newer, &[]));
        assert_eq!(refused, Err(DecodeError::Newer));
    }

    #[test]
    fn a_breach_with_too_much_to_say_still_fits() {
        let hole = Extent::new(0, None, 1, ExtentState::Hole);
        let many = vec![hole; 1000];
        let device = DeviceId { major: 7, minor: 3 };
        let path = "ü".repeat(9000);
        let breach = Breach::new(1, (device, 2), path, 3, 4..5, (&many, &many));
        let cause = notice::Cause::new(6, "x".repeat(9000), "y".repeat(9000));
        let mut breach = breach.caused_by(Some(cause));
        breach.before = many;
        let bytes = Reply::Notice(Notice::Breach(breach)).encode();
        assert!(bytes.len() <= MAX_MESSAGE);
        let Ok(Reply::Notice(Notice::Breach(breach))) = Reply::decode(&bytes) else {
            panic!("must decode");
        };
        assert_eq!(breach.before.len(), notice::MAX_BREACH_EXTENTS);
        assert_eq!(breach.cause.unwrap().what.len(), 256);
    }

    #[test]
    fn a_refusal_with_too_much_to_say_still_fits() {
        let opener = Opener {
            pid: 1,
            fd: None,
            writable: true,
            mapped: true,
            command: "ü".repeat(500),
        };
        let refusal = Refusal {
            errno: 26,
            reason: Reason::OpenElsewhere,
            obstacle: "ß".repeat(60_000),
            mend: "x".repeat(60_000),
            openers: vec![opener; 1000],
        };
        let bytes = Reply::Refused(refusal).encode();
        assert!(bytes.len() <= MAX_MESSAGE);
        let Ok(Reply::Refused(refusal)) = Reply::decode(&bytes) else {
            panic!("must decode");
        };
        assert_eq!(refusal.openers.len(), MAX_OPENERS);
    }
}
