//! The fanotify gate: permission events that one thread answers.
//!
//! * `server`: the thread, which takes events and gives answers.
//! * `decide`: what an event is answered once it is known what it means.
//! * `classify`: what a blocked thread is doing, from its registers and its
//!   stack. Pure.
//! * `look`, `lookers`: the threads that read these registers and stacks.
//! * `turns`: which event is looked at next.

pub(crate) mod classify;
mod contract;
mod decide;
mod exclude;
mod lifetime;
pub(crate) mod look;
mod lookers;
mod server;
mod turns;

pub(crate) use self::classify::descriptor;
use self::lifetime::Lifetime;
use crate::Errno;
use mapdirect_sys::fanotify::{Group, Mask};
use mapdirect_sys::memfd;
use std::os::fd::AsFd;

/// The events that the gate gets for an inode behind it.
pub(crate) const MASK: Mask = Mask::from_bits(Mask::OPEN_PERM.bits() | Mask::PRE_ACCESS.bits());

/// The fanotify groups of a guard with this gate. They end with the guard, and
/// so does the gate.
#[derive(Debug)]
pub(crate) struct Gate {
    /// The group that asks before an operation goes on.
    pub(crate) group: Group,
    /// The group that tells of the ends of pins.
    lifetime: Lifetime,
}

impl Gate {
    /// Creates the gate.
    ///
    /// # Errors
    ///
    /// `EINVAL` or `ENOSYS` when the kernel has no pre-content events, and any
    /// other error of opening a group.
    pub(crate) fn new() -> Result<Self, Errno> {
        let group = Group::pre_content()?;
        require_pre_content(&group)?;
        Ok(Self {
            group,
            lifetime: Lifetime::new()?,
        })
    }
}

/// Checks that the kernel knows pre-content events. A kernel before 6.14 also
/// creates such a group, and refuses only the unknown mask, with `EINVAL`. A
/// kernel that knows the mask refuses it for a memory file, whose filesystem
/// has no such events.
fn require_pre_content(group: &Group) -> Result<(), Errno> {
    let probe = memfd::sealed("mapdirect-probe", b"")?;
    match group.add(Mask::PRE_ACCESS, probe.as_fd()) {
        Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Whether an error of reading events means that there will be no more events.
/// Other errors mean that one event could not be delivered (`create_fd`,
/// fs/notify/fanotify/fanotify_user.c).
pub(crate) fn is_final(errno: Errno) -> bool {
    matches!(errno, Errno::BADF | Errno::INVAL | Errno::FAULT)
}
