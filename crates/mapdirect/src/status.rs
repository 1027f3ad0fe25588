//! What a guard is doing: its pins, their holders, and what it refused.
//!
//! [`Guard::status`](crate::Guard::status) returns a [`Status`].

use crate::report::PinFlags;
use mapdirect_proto::status as wire;
use mapdirect_proto::{Breach, DeviceId, Gate, Name, Who};
use std::ops::Range;

/// A process that holds a pin, or has the pinned file open.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Holder {
    /// Process id, as the guard sees it.
    pub pid: i32,
    /// Name of the command.
    pub command: String,
    /// Bytes of the pinned file that it maps for writing.
    pub mapped: u64,
    /// How many descriptors of the file it has.
    pub descriptors: u32,
}

/// One pin.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PinStatus {
    /// The number by which the guard knows the pin.
    pub pin: u64,
    /// Bytes of the file, extended to whole filesystem blocks. A range up to
    /// `u64::MAX` has no end.
    pub range: Range<u64>,
    /// What it was asked to be.
    pub flags: PinFlags,
    /// The process that asked for it.
    pub pid: i32,
    /// The user of that process.
    pub uid: u32,
    /// Seconds since it was granted.
    pub age: u64,
    /// Bytes in stable blocks.
    pub stable: u64,
    /// Bytes in frozen blocks: none for a pin of strength stable.
    pub frozen: u64,
    /// How often its blocks were found changed.
    pub breaches: u64,
    /// Why it is kept no longer, for a person; empty while it is kept.
    pub lost: String,
    /// What allowed it to a holder without the capability.
    pub delegated: Option<Delegated>,
}

/// What allowed a pin to a holder without the capability.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Delegated {
    /// The name of the rule; empty if it is not known any more.
    pub rule: String,
    /// How many seconds the pin may still last; `None` is as long as it is held.
    pub left: Option<u64>,
}

/// A file that somebody without the capability may pin for a while.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Armed {
    /// Device of the filesystem.
    pub device: DeviceId,
    /// Inode number.
    pub inode: u64,
    /// Its path when it was armed.
    pub path: String,
    /// Who may pin it.
    pub who: Who,
    /// The bytes that may be pinned.
    pub range: Range<u64>,
    /// For how many more seconds.
    pub left: u64,
}

/// The guard's policy: who else may pin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PolicyStatus {
    /// How many rules it has.
    pub rules: u32,
    /// What was wrong when the guard last read it, and why it therefore goes by
    /// the one before; empty if nothing was.
    pub error: String,
}

/// A file with pins.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileStatus {
    /// Device of the filesystem.
    pub device: DeviceId,
    /// Inode number.
    pub inode: u64,
    /// The last path at which the file was seen; empty for callers that may
    /// not know it.
    pub path: String,
    /// The same path, and what is known of it: a file may be renamed, replaced
    /// and removed under its pins.
    pub name: Name,
    /// Its pins.
    pub pins: Vec<PinStatus>,
    /// The processes that map it or have it open; empty for callers that may
    /// not know them.
    pub holders: Vec<Holder>,
}

/// An operation that was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RefusedOperation {
    /// Seconds since the epoch.
    pub time: u64,
    /// The thread that was refused.
    pub tid: i32,
    /// Name of its command.
    pub command: String,
    /// What it tried.
    pub operation: String,
    /// Device of the file.
    pub device: DeviceId,
    /// Inode number of the file.
    pub inode: u64,
    /// Path of the file when it was refused, as far as that was known.
    pub path: String,
    /// The bytes that it tried to change, if the attempt had a range.
    pub range: Option<Range<u64>>,
}

/// Everything that a guard tells of itself.
///
/// # Examples
///
/// ```no_run
/// let status = mapdirect::Guard::from_env().status()?;
/// for file in &status.files {
///     println!("{}: {} pins", file.path, file.pins.len());
/// }
/// # Ok::<(), mapdirect::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// The gate in force.
    pub gate: Gate,
    /// Process id of the guard.
    pub pid: i32,
    /// Seconds that it has been running.
    pub uptime: u64,
    /// How many clients are connected.
    pub clients: u32,
    /// How many events it has judged.
    pub judged: u64,
    /// How often it refused each kind of operation.
    pub refused: Vec<(String, u64)>,
    /// The files with pins.
    pub files: Vec<FileStatus>,
    /// The latest refusals, oldest first.
    pub recent: Vec<RefusedOperation>,
    /// How many breaches there were.
    pub breached: u64,
    /// The latest breaches, oldest first.
    pub breaches: Vec<Breach>,
    /// The guard's policy; `None` from a guard that knows none. Whoever is
    /// neither root nor capable of pinning is not told what is wrong with it.
    pub policy: Option<PolicyStatus>,
    /// The files that are armed; empty for callers that may not know.
    pub armed: Vec<Armed>,
    /// How many refusals there are no records of, because they came too fast.
    pub unrecorded: u64,
}

impl Status {
    pub(crate) fn of(status: wire::Status) -> Self {
        Self {
            gate: status.gate,
            pid: status.pid,
            uptime: status.uptime,
            clients: status.clients,
            judged: status.judged,
            refused: status.refused,
            files: status.files.into_iter().map(FileStatus::of).collect(),
            recent: status
                .recent
                .into_iter()
                .map(RefusedOperation::of)
                .collect(),
            breached: status.breached,
            breaches: status.breaches,
            policy: status.policy.map(|policy| PolicyStatus {
                rules: policy.rules,
                error: policy.error,
            }),
            armed: status.armed.into_iter().map(Armed::of).collect(),
            unrecorded: status.unrecorded,
        }
    }
}

impl FileStatus {
    fn of(file: wire::FileStatus) -> Self {
        Self {
            device: file.device,
            inode: file.inode,
            name: Name::new(file.path.clone(), file.former, file.name_state),
            path: file.path,
            pins: file.pins.into_iter().map(PinStatus::of).collect(),
            holders: file.holders.into_iter().map(Holder::of).collect(),
        }
    }
}

impl PinStatus {
    fn of(pin: wire::PinStatus) -> Self {
        Self {
            pin: pin.pin,
            range: pin.range,
            flags: PinFlags::of(pin.flags),
            pid: pin.pid,
            uid: pin.uid,
            age: pin.age,
            stable: pin.stable,
            frozen: pin.frozen,
            breaches: pin.breaches,
            lost: pin.lost,
            delegated: pin.delegated.map(|delegated| Delegated {
                rule: delegated.rule,
                left: delegated.left,
            }),
        }
    }
}

impl Armed {
    fn of(armed: wire::Armed) -> Self {
        Self {
            device: armed.device,
            inode: armed.inode,
            path: armed.path,
            who: armed.who,
            range: armed.range,
            left: armed.left,
        }
    }
}

impl Holder {
    fn of(holder: wire::Holder) -> Self {
        Self {
            pid: holder.pid,
            command: holder.command,
            mapped: holder.mapped,
            descriptors: holder.descriptors,
        }
    }
}

impl RefusedOperation {
    fn of(refused: wire::RefusedOperation) -> Self {
        Self {
            time: refused.time,
            tid: refused.tid,
            command: refused.command,
            operation: refused.operation,
            device: refused.device,
            inode: refused.inode,
            path: refused.path,
            range: refused.range,
        }
    }
}
