//! The requests of a holder, and their wire format.

use crate::MAGIC;
use crate::envelope::{Body, Empty, HEADER, kind, message};
use crate::wire::{DecodeError, wire_len};
use std::fmt;
use std::ops::BitOr;
use zerocopy::little_endian::{I32, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The properties that a pin is requested to have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flags(u32);

impl Flags {
    /// Nothing special: pins a range and returns its extents.
    pub const NONE: Self = Self(0);
    /// The range will be mapped `MAP_DIRECT`. The file must be open for reading
    /// and writing, and must keep the promise without the page cache unless
    /// [`Flags::CACHED`] is given.
    pub const MAP: Self = Self(1);
    /// The page cache is accepted.
    pub const CACHED: Self = Self(2);
    /// Pin the whole file and its size.
    pub const WHOLE_FILE: Self = Self(4);
    /// With [`Flags::MAP`]: the holder does not map the file at blocks that
    /// cannot be stored to as they are.
    pub const SEGMENTS: Self = Self(8);
    /// Strength stable: only what is stable is held. Everything else in the
    /// range may become stable, and is held from then on. The range may have no
    /// end ([`PinRequest::WITHOUT_END`]).
    pub const STABLE: Self = Self(16);
    /// Nobody but the holder, and its family if there is one, may open the file
    /// for writing.
    pub const DENY_WRITE: Self = Self(32);
    /// No name of the file may be removed, renamed or replaced.
    pub const DENY_RENAME: Self = Self(64);
    /// The process that asks and its descendants have a holder's rights
    /// together: they may open the file for writing. They are a family.
    pub const FAMILY: Self = Self(128);
    /// The pin lives in the description of a program that knows nothing of pins.
    /// Under the bpf gate that is the very description that comes with the
    /// request. Under the fanotify gate it is the one that comes with the
    /// answer, which is open in the same way.
    pub const IN_PLACE: Self = Self(256);
    /// What a guard that speaks an older version does not know.
    pub const NEW_IN_3: Self = Self(
        Self::STABLE.0
            | Self::DENY_WRITE.0
            | Self::DENY_RENAME.0
            | Self::FAMILY.0
            | Self::IN_PLACE.0,
    );

    /// Whether any bit of `other` is set.
    #[must_use]
    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

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

    const KNOWN: u32 =
        Self::MAP.0 | Self::CACHED.0 | Self::WHOLE_FILE.0 | Self::SEGMENTS.0 | Self::NEW_IN_3.0;

    /// All bits that this version knows.
    #[cfg(test)]
    pub(crate) const ALL: u32 = Self::KNOWN;

    /// The flags of an existing pin, limited to the bits that this version
    /// knows.
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

/// Asks for a pin; the file comes with the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PinRequest {
    /// The first byte.
    pub offset: u64,
    /// Length in bytes; 0 means to the end of the file.
    /// [`WITHOUT_END`](Self::WITHOUT_END) means that the range has no end.
    pub length: u64,
    /// The properties of the pin.
    pub flags: Flags,
    /// How many milliseconds to wait for others to close the file.
    pub patience_ms: u32,
}

impl PinRequest {
    /// The length of a range that goes on however far the file grows. Only a
    /// pin of strength stable can have one. The end of such a range is
    /// `u64::MAX`.
    pub const WITHOUT_END: u64 = u64::MAX;
}

/// A request of a holder.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Request {
    /// Opens a conversation.
    Hello {
        /// The newest protocol version of the holder.
        version: u32,
    },
    /// Proves the capability. A memory file comes with it.
    Prove,
    /// Asks for a pin.
    Pin(PinRequest),
    /// Says that the old description has been replaced in this process.
    Swapped,
    /// Asks which ranges of a file are pinned. The file comes with it.
    Query,
    /// Asks for the state of the guard.
    Status,
    /// Asks for a [`Reply::Done`](crate::Reply::Done) when the guard has
    /// handled all earlier requests, and has closed what it had sent.
    Barrier,
    /// Announces that thread `tid` will open a pinned file for writing, as a
    /// holder may. An `O_PATH` descriptor of the file comes with it. The
    /// announcement is valid for one open, for
    /// [`ANNOUNCEMENT_LIFE`](crate::ANNOUNCEMENT_LIFE), and ends with this
    /// connection.
    Announce {
        /// The thread that will open the file.
        tid: i32,
    },
    /// Asks to make frozen blocks of a pin stable while the pin lives. The
    /// description whose life is the pin comes with it. The answer is a
    /// [`Reply::Granted`](crate::Reply::Granted) without that description, if
    /// the block map changed, and then a [`Reply::Done`](crate::Reply::Done) or
    /// [`Reply::Refused`](crate::Reply::Refused). Nothing is allocated for a pin
    /// of strength stable: its extents are told as they are now, whatever range
    /// is given.
    Allocate(AllocateRequest),
    /// Asks that the pins of strength stable that this process asked for give way
    /// in a range of a file, so that something there can be freed or moved. Any
    /// descriptor of the file comes with it. Refused while anybody else has
    /// something pinned in the range. The pins hold everything again when
    /// [`Resume`](Self::Resume) is answered, or when this connection ends. Needs
    /// version 3.
    Yield(YieldRequest),
    /// Asks that every pin that gives way because of this connection holds what
    /// is there now.
    Resume,
    /// Names an ancestor of this process. Pins of a family that this connection
    /// asks for from now on are those of that process and its descendants. The
    /// answer is [`Reply::Done`](crate::Reply::Done).
    Keeper {
        /// The ancestor.
        pid: i32,
    },
    /// Says that this process has let go of a pin. If nobody else keeps the
    /// pin, [`Reply::Done`](crate::Reply::Done) comes when the gate judges as
    /// if the pin had never existed.
    Ended(WatchedPin),
    /// Asks for notices about pins of this user from now on. The answer is a
    /// notice of what has happened to each pin already, and then
    /// [`Reply::Watching`](crate::Reply::Watching). From the first such
    /// request, the connection is for notices only: more of these requests may
    /// follow, and the guard may send [`Reply::Notice`](crate::Reply::Notice)
    /// at any time. The guard never waits for a reader: if it cannot deliver a
    /// notice, it closes the connection.
    Watch(Vec<WatchedPin>),
    /// Asks to end the pin with this number. Needs the capability, as the two
    /// requests below do, and version 3.
    Unpin(u64),
    /// Asks to let somebody else pin a file for a while. The file comes with it.
    Arm(ArmRequest),
    /// Asks to take back every such permission for a file, which comes with it.
    Disarm,
    /// Asks for the records of what was refused and noticed. Root gets all of
    /// them, others those about files that they themselves have pinned. Each
    /// comes in a [`Reply::Record`](crate::Reply::Record), and
    /// [`Reply::Following`](crate::Reply::Following) is behind the ones that are
    /// kept. If more are asked for as they come, the connection is for records
    /// only from then on. Needs version 4.
    Follow(FollowRequest),
}

/// Which records to send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FollowRequest {
    /// The most records of those that are kept, the latest; 0 for none.
    pub kept: u32,
    /// Whether to go on as records come.
    pub live: bool,
}

/// Somebody who may pin without the capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Who {
    /// A user, by number.
    User(u32),
    /// Everybody in a group, by number.
    Group(u32),
}

/// Lets somebody pin a file for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmRequest {
    /// Who may pin it.
    pub who: Who,
    /// The first byte that may be pinned.
    pub offset: u64,
    /// The number of bytes; 0 means without end.
    pub length: u64,
    /// For how many seconds from now.
    pub seconds: u32,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(uid) => write!(f, "user {uid}"),
            Self::Group(gid) => write!(f, "group {gid}"),
        }
    }
}

impl Who {
    pub(crate) const fn to_wire(self) -> (u32, u32) {
        match self {
            Self::User(uid) => (1, uid),
            Self::Group(gid) => (2, gid),
        }
    }

    pub(crate) const fn from_wire(kind: u32, id: u32) -> Result<Self, DecodeError> {
        match kind {
            1 => Ok(Self::User(id)),
            2 => Ok(Self::Group(id)),
            _ => Err(DecodeError::Newer),
        }
    }
}

/// A pin, and the file by which the guard finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WatchedPin {
    /// The number of the pin.
    pub pin: u64,
    /// `st_dev` of the file.
    pub device: u64,
    /// `st_ino` of the file.
    pub inode: u64,
}

/// The bytes in which pins are to give way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct YieldRequest {
    /// The first byte.
    pub offset: u64,
    /// Length in bytes; [`PinRequest::WITHOUT_END`] means everything from there
    /// on.
    pub length: u64,
}

/// The blocks of a pin to make stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllocateRequest {
    /// The number of the pin.
    pub pin: u64,
    /// The first byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

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
struct KeeperRecord {
    pid: I32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct FollowRecord {
    kept: U32,
    /// 1 to go on as records come.
    live: U32,
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
struct YieldRecord {
    offset: U64,
    length: U64,
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
struct UnpinRecord {
    pin: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct ArmRecord {
    kind: U32,
    id: U32,
    offset: U64,
    length: U64,
    seconds: U32,
    reserved: U32,
}

/// The most pins that one request to watch can name.
pub const MAX_WATCHED: usize = 1024;

const _: () = {
    let watched = size_of::<WatchRecord>() + MAX_WATCHED * size_of::<WatchedPinRecord>();
    assert!(HEADER + watched <= crate::MAX_MESSAGE);
};

impl Request {
    /// The number of descriptors that must come with the request.
    #[must_use]
    pub const fn descriptors(&self) -> usize {
        match self {
            Self::Prove
            | Self::Pin(_)
            | Self::Query
            | Self::Announce { .. }
            | Self::Allocate(_)
            | Self::Yield(_)
            | Self::Arm(_)
            | Self::Disarm => 1,
            Self::Hello { .. }
            | Self::Swapped
            | Self::Status
            | Self::Barrier
            | Self::Resume
            | Self::Keeper { .. }
            | Self::Ended(_)
            | Self::Watch(_)
            | Self::Follow(_)
            | Self::Unpin(_) => 0,
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
            Self::Barrier => message(kind::BARRIER, &Empty {}, &[]),
            Self::Announce { tid } => {
                let record = AnnounceRecord {
                    tid: (*tid).into(),
                    reserved: 0.into(),
                };
                message(kind::ANNOUNCE, &record, &[])
            }
            Self::Yield(request) => {
                let record = YieldRecord {
                    offset: request.offset.into(),
                    length: request.length.into(),
                };
                message(kind::YIELD, &record, &[])
            }
            Self::Resume => message(kind::RESUME, &Empty {}, &[]),
            Self::Keeper { pid } => {
                let record = KeeperRecord {
                    pid: (*pid).into(),
                    reserved: 0.into(),
                };
                message(kind::KEEPER, &record, &[])
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
            Self::Unpin(pin) => {
                let record = UnpinRecord { pin: (*pin).into() };
                message(kind::UNPIN, &record, &[])
            }
            Self::Arm(arm) => {
                let (who, id) = arm.who.to_wire();
                let record = ArmRecord {
                    kind: who.into(),
                    id: id.into(),
                    offset: arm.offset.into(),
                    length: arm.length.into(),
                    seconds: arm.seconds.into(),
                    reserved: 0.into(),
                };
                message(kind::ARM, &record, &[])
            }
            Self::Disarm => message(kind::DISARM, &Empty {}, &[]),
            Self::Follow(follow) => {
                let record = FollowRecord {
                    kept: follow.kept.into(),
                    live: u32::from(follow.live).into(),
                };
                message(kind::FOLLOW, &record, &[])
            }
        }
    }

    /// Decodes a request.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] for anything that is not a request.
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
            kind::BARRIER => {
                let Empty {} = body.only()?;
                Self::Barrier
            }
            kind::ANNOUNCE => {
                let record: AnnounceRecord = body.only()?;
                Self::Announce {
                    tid: record.tid.get(),
                }
            }
            kind::YIELD => {
                let record: YieldRecord = body.only()?;
                Self::Yield(YieldRequest {
                    offset: record.offset.get(),
                    length: record.length.get(),
                })
            }
            kind::KEEPER => {
                let record: KeeperRecord = body.only()?;
                Self::Keeper {
                    pid: record.pid.get(),
                }
            }
            kind::RESUME => {
                let Empty {} = body.only()?;
                Self::Resume
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
            kind::UNPIN => {
                let record: UnpinRecord = body.only()?;
                Self::Unpin(record.pin.get())
            }
            kind::ARM => {
                let record: ArmRecord = body.only()?;
                Self::Arm(ArmRequest {
                    who: Who::from_wire(record.kind.get(), record.id.get())?,
                    offset: record.offset.get(),
                    length: record.length.get(),
                    seconds: record.seconds.get(),
                })
            }
            kind::DISARM => {
                let Empty {} = body.only()?;
                Self::Disarm
            }
            kind::FOLLOW => {
                let record: FollowRecord = body.only()?;
                Self::Follow(FollowRequest {
                    kept: record.kept.get(),
                    live: match record.live.get() {
                        0 => false,
                        1 => true,
                        _ => return Err(DecodeError::Newer),
                    },
                })
            }
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
