//! The state of a guard. How it travels says [`encode_status`](crate::encode_status).

use crate::extent::DeviceId;
use crate::notice::Breach;
use crate::reply::Gate;
use crate::request::Flags;
use std::ops::Range;

/// How a process holds a pin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Process id, as the guard sees it.
    pub pid: i32,
    /// Name of the command.
    pub command: String,
    /// Bytes of the pinned file it maps.
    pub mapped: u64,
    /// Descriptors it has of the file.
    pub descriptors: u32,
}

/// One pin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinStatus {
    /// Names the pin.
    pub pin: u64,
    /// Bytes, rounded out to blocks.
    pub range: Range<u64>,
    /// What was asked for.
    pub flags: Flags,
    /// Process that asked for it.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Seconds since it was granted.
    pub age: u64,
    /// Bytes in stable blocks.
    pub stable: u64,
    /// Bytes in frozen blocks.
    pub frozen: u64,
    /// How often its blocks were found changed.
    pub breaches: u64,
    /// Why it is kept no longer; empty while it is.
    pub lost: String,
}

/// A file with pins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileStatus {
    /// Device of the filesystem.
    pub device: DeviceId,
    /// Inode number.
    pub inode: u64,
    /// Path when the first pin was granted; empty for whoever may not know.
    pub path: String,
    /// Its pins.
    pub pins: Vec<PinStatus>,
    /// The processes that map it or have it open.
    pub holders: Vec<Holder>,
}

/// A refusal that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedOperation {
    /// Seconds since the epoch.
    pub time: u64,
    /// Thread that was refused.
    pub tid: i32,
    /// Name of its command.
    pub command: String,
    /// What it tried.
    pub operation: String,
    /// Device of the file.
    pub device: DeviceId,
    /// Inode number of the file.
    pub inode: u64,
    /// Where the file was when it was first pinned.
    pub path: String,
    /// Byte range of the attempt, if it had one.
    pub range: Option<Range<u64>>,
}

/// The whole state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The gate in force.
    pub gate: Gate,
    /// Process id of the guard.
    pub pid: i32,
    /// Seconds it has been running.
    pub uptime: u64,
    /// Clients connected.
    pub clients: u32,
    /// Events judged.
    pub judged: u64,
    /// Refusals by operation.
    pub refused: Vec<(String, u64)>,
    /// Files with pins.
    pub files: Vec<FileStatus>,
    /// The latest refusals, oldest first.
    pub recent: Vec<RefusedOperation>,
    /// How many breaches there were.
    pub breached: u64,
    /// The latest of them, oldest first.
    pub breaches: Vec<Breach>,
}
