//! What a holder and the guard say to each other.
//!
//! Messages travel whole over a `SOCK_SEQPACKET` socket, one request and its
//! reply at a time. Each is a header and one fixed record of little-endian
//! integers, for some followed by texts and records whose lengths the fixed
//! part gives. Records are extensible the way of `openat2(2)`: a receiver
//! takes a longer record if the part it does not know is zero, and reads a
//! shorter one as if zeros followed. Each side says the newest version it
//! speaks, and both speak the older one of the two ([`settle`]). No I/O happens here, and no bytes can
//! make a decoder panic, loop or allocate more than they fill.
//!
//! ```text
//! holder                                   guard
//!   Hello (version)  ───────────────────▶
//!                    ◀───────────────────  Welcome (version, challenge),
//!                                          or Refused
//!   Prove + memfd    ───────────────────▶         once per connection
//!                    ◀───────────────────  Done
//!   Pin + file       ───────────────────▶
//!                    ◀───────────────────  Swap + file      only if the
//!   Swapped          ───────────────────▶                   file was opened
//!                                                           before the gate
//!                                                           closed
//!                    ◀───────────────────  Granted + file, or Refused
//!   Barrier          ───────────────────▶         if the guard must have
//!                    ◀───────────────────  Done   closed its copy by then
//!   Allocate + file  ───────────────────▶
//!                    ◀───────────────────  Granted, if anything changed
//!                    ◀───────────────────  Done, or Refused
//!
//! on a connection of its own, by which the guard speaks unasked:
//!   Hello            ───────────────────▶
//!                    ◀───────────────────  Welcome
//!   Watch (pins)     ───────────────────▶         again for pins that come
//!                    ◀───────────────────  Notice, for each that has one
//!                    ◀───────────────────  Watching
//!                    ◀───────────────────  Notice, at any time
//! ```

#![forbid(unsafe_code)]

mod envelope;
pub mod extent;
pub mod notice;
pub mod reason;
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
pub use refusal::{Opener, Refusal};
pub use reply::{Gate, Granted, PinnedRange, Reply};
pub use request::{AllocateRequest, Flags, PinRequest, Request, WatchedPin};
pub use status_wire::{MAX_STATUS, decode_status, encode_status};
pub use version::{OLDEST_VERSION, UnknownVersion, VERSION, VERSION_WITH_BARRIER, settle};
pub use wire::DecodeError;

use std::time::Duration;

/// Where programs in the kernel judge: the argument of `fcntl(F_GETFL)` that
/// asks whether a file is a pin, whose number is in the bits below. It fails
/// with `EALREADY` if so; whoever does not know the question answers with flags.
pub const IS_IT_PIN: u64 = 0x6d64 << 48;
/// Those bits.
pub const PIN_NUMBER: u64 = (1 << 48) - 1;

/// First field of a hello: "MAPDIRCT".
pub const MAGIC: u64 = u64::from_be_bytes(*b"MAPDIRCT");

/// Longest message in bytes; what is longer travels in a sealed memory file.
pub const MAX_MESSAGE: usize = 32 * 1024;

/// Most extents sent inside a message.
pub const MAX_INLINE_EXTENTS: usize = 512;

/// How long an announced thread may take to open the file.
pub const ANNOUNCEMENT_LIFE: Duration = Duration::from_secs(1);

/// Where the guard listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/mapdirect/guard.sock";

/// Environment variable that names another socket, for every client.
pub const SOCKET_VARIABLE: &str = "MAPDIRECT_SOCKET";
