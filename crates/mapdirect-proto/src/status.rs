//! The state of a guard. [`encode_status`](crate::encode_status) defines how it
//! travels.

use crate::extent::DeviceId;
use crate::notice::Breach;
use crate::record::NameState;
use crate::reply::Gate;
use crate::request::{Flags, Who};
use std::ops::Range;

/// A process that uses a pinned file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Process id, as the guard sees it.
    pub pid: i32,
    /// Name of the command.
    pub command: String,
    /// The bytes of the pinned file that it maps.
    pub mapped: u64,
    /// The number of its descriptors of the file.
    pub descriptors: u32,
}

/// One pin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinStatus {
    /// The number of the pin.
    pub pin: u64,
    /// The bytes, extended to whole blocks.
    pub range: Range<u64>,
    /// The flags of the request.
    pub flags: Flags,
    /// The process that asked for the pin.
    pub pid: i32,
    /// The user of that process.
    pub uid: u32,
    /// Seconds since it was granted.
    pub age: u64,
    /// Bytes in stable blocks.
    pub stable: u64,
    /// Bytes in frozen blocks.
    pub frozen: u64,
    /// How often its blocks were found changed.
    pub breaches: u64,
    /// Why the pin is kept no longer. Empty as long as it is kept.
    pub lost: String,
    /// What allowed it to a holder without the capability.
    pub delegated: Option<Delegated>,
}

/// What allowed a pin to a holder without the capability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delegated {
    /// The name of the rule. Empty if it is not known any more.
    pub rule: String,
    /// How many seconds the pin may still last. `None` means as long as it is
    /// held.
    pub left: Option<u64>,
}

/// A file that somebody without the capability may pin for a while.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Armed {
    /// Device of the filesystem.
    pub device: DeviceId,
    /// Inode number.
    pub inode: u64,
    /// The path when the file was armed.
    pub path: String,
    /// Who may pin it.
    pub who: Who,
    /// The bytes that may be pinned.
    pub range: Range<u64>,
    /// For how many more seconds.
    pub left: u64,
}

/// The guard's policy, as far as everybody may know it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyStatus {
    /// The number of rules.
    pub rules: u32,
    /// What was wrong when the policy was last read. Empty if nothing was.
    pub error: String,
}

/// A file with pins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileStatus {
    /// Device of the filesystem.
    pub device: DeviceId,
    /// Inode number.
    pub inode: u64,
    /// The last path at which the file was seen. Empty for a receiver that may
    /// not know it.
    pub path: String,
    /// The path when the first pin was granted, if the file has another one now.
    pub former: String,
    /// What is known of these paths.
    pub name_state: NameState,
    /// Its pins.
    pub pins: Vec<PinStatus>,
    /// The processes that map it or have it open.
    pub holders: Vec<Holder>,
}

/// An operation that was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedOperation {
    /// Seconds since the epoch.
    pub time: u64,
    /// The thread that was refused.
    pub tid: i32,
    /// Name of its command.
    pub command: String,
    /// The operation that it tried.
    pub operation: String,
    /// Device of the file.
    pub device: DeviceId,
    /// Inode number of the file.
    pub inode: u64,
    /// The path of the file when it was refused, as far as that was known.
    pub path: String,
    /// The byte range of the attempt, if it had one.
    pub range: Option<Range<u64>>,
}

/// The whole state of a guard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The gate in force.
    pub gate: Gate,
    /// Process id of the guard.
    pub pid: i32,
    /// How many seconds the guard has been running.
    pub uptime: u64,
    /// The number of connected clients.
    pub clients: u32,
    /// The number of events judged.
    pub judged: u64,
    /// Refusals by operation.
    pub refused: Vec<(String, u64)>,
    /// Files with pins.
    pub files: Vec<FileStatus>,
    /// The latest refusals, oldest first.
    pub recent: Vec<RefusedOperation>,
    /// The number of breaches.
    pub breached: u64,
    /// The latest breaches, oldest first.
    pub breaches: Vec<Breach>,
    /// The policy. `None` from a guard that knows none.
    pub policy: Option<PolicyStatus>,
    /// What is armed.
    pub armed: Vec<Armed>,
    /// The number of refusals of which there is no record, because they came too
    /// fast.
    pub unrecorded: u64,
}
