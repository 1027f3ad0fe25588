//! What a holder and the guard say to each other.
//!
//! Messages travel as a whole over a `SOCK_SEQPACKET` socket, one request and
//! its reply at a time. Each is a header and one fixed record of little-endian
//! integers. Some are followed by texts and records whose lengths the fixed
//! part gives. Records are extensible like those of `openat2(2)`: a receiver
//! takes a longer record if the part that it does not know is zero, and reads a
//! shorter one as if zeros followed. Each side states the newest version that
//! it speaks, and both speak the older of the two ([`settle`]). This crate does
//! no I/O, and no bytes can make a decoder panic, loop or allocate more than
//! they fill.
//!
//! ```text
//! holder                                   guard
//!   Hello (version)  ───────────────────▶
//!                    ◀───────────────────  Welcome (version, challenge),
//!                                          or Refused
//!   Prove + memfd    ───────────────────▶         once per connection, unless
//!                    ◀───────────────────  Done   the policy is to decide
//!   Pin + file       ───────────────────▶
//!                    ◀───────────────────  Swap + file      only if the
//!   Swapped          ───────────────────▶                   file was opened
//!                                                           before the gate
//!                                                           closed
//!                    ◀───────────────────  Granted + file, or Refused
//!   Barrier          ───────────────────▶         if the guard must have
//!                    ◀───────────────────  Done   closed its copy by then
//!   Yield + file     ───────────────────▶
//!                    ◀───────────────────  Done, or Refused
//!   Resume           ───────────────────▶
//!                    ◀───────────────────  Done
//!   Keeper           ───────────────────▶         of whom a family is
//!                    ◀───────────────────  Done, or Refused
//!   Allocate + file  ───────────────────▶
//!                    ◀───────────────────  Granted, if anything changed
//!                    ◀───────────────────  Done, or Refused
//!   Arm, Disarm + file, Unpin ──────────▶
//!                    ◀───────────────────  Done, or Refused
//!
//! on a connection of its own, by which the guard speaks unasked:
//!   Hello            ───────────────────▶
//!                    ◀───────────────────  Welcome
//!   Watch (pins)     ───────────────────▶         again for pins that come
//!                    ◀───────────────────  Notice, for each that has one
//!                    ◀───────────────────  Watching
//!                    ◀───────────────────  Notice, at any time
//!
//! on another, for records of what was refused and noticed:
//!   Hello            ───────────────────▶
//!                    ◀───────────────────  Welcome
//!   Follow           ───────────────────▶
//!                    ◀───────────────────  Record, for each that is kept
//!                    ◀───────────────────  Following
//!                    ◀───────────────────  Record or Missed, as they come,
//!                                          if that was asked for
//! ```

#![forbid(unsafe_code)]

mod envelope;
pub mod extent;
pub mod notice;
pub mod reason;
pub mod record;
pub mod refusal;
pub mod reply;
pub mod request;
pub mod status;
mod status_wire;
#[cfg(test)]
mod tests;
mod version;
mod wire;

pub use extent::{BlockMap, DeviceId, Extent, ExtentState};
pub use notice::{Breach, Cause, Notice};
pub use reason::Reason;
pub use record::{Actor, Event, Name, NameState, Owner, Record};
pub use refusal::{Opener, Refusal};
pub use reply::{Gate, Granted, PinnedRange, Reply};
pub use request::{
    AllocateRequest, ArmRequest, Flags, FollowRequest, PinRequest, Request, WatchedPin, Who,
    YieldRequest,
};
pub use status_wire::{MAX_STATUS, decode_status, encode_status};
pub use version::{
    OLDEST_VERSION, UnknownVersion, VERSION, VERSION_WITH_BARRIER, VERSION_WITH_FAMILIES,
    VERSION_WITH_POLICY, VERSION_WITH_RECORDS, settle,
};
pub use wire::DecodeError;

use std::time::Duration;

/// The argument of `fcntl(F_GETFL)` that asks the programs of the bpf gate
/// whether a file is a pin; the pin's number is in the bits below. The call
/// fails with `EALREADY` if the file is that pin. Without the programs the call
/// returns flags.
pub const IS_IT_PIN: u64 = 0x6d64 << 48;
/// The argument of `fcntl(F_GETFL)` that asks the same programs whether a pin
/// that has ended could be taken up again by this file; the pin's number is in
/// the bits below. The call fails with `EALREADY` if the pin is the last one of
/// the file's inode and has ended, the file is open for reading and writing, and
/// nobody has record locks on the inode. Whether anything has been done to its
/// blocks meanwhile only `mmap(2)` finds out.
pub const MAY_TAKE_UP: u64 = 0x6d65 << 48;
/// The bits of the pin's number.
pub const PIN_NUMBER: u64 = (1 << 48) - 1;

/// First field of a hello: "MAPDIRCT".
pub const MAGIC: u64 = u64::from_be_bytes(*b"MAPDIRCT");

/// The length of the longest message in bytes. Longer data travels in a sealed
/// memory file.
pub const MAX_MESSAGE: usize = 32 * 1024;

/// The most extents inside a message.
pub const MAX_INLINE_EXTENTS: usize = 512;

/// How long an announced thread may take to open the file.
pub const ANNOUNCEMENT_LIFE: Duration = Duration::from_secs(1);

/// The default path of the guard's socket.
pub const DEFAULT_SOCKET: &str = "/run/mapdirect/guard.sock";

/// The environment variable that names another socket, for every client.
pub const SOCKET_VARIABLE: &str = "MAPDIRECT_SOCKET";
