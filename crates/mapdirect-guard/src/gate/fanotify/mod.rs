//! The fanotify gate: permission events that one thread answers.
//!
//! * `server`: the thread, which takes events and gives answers.
//! * `decide`: what an event is answered once it is known what it means.
//! * `classify`: what a blocked thread is doing, from its registers and its
//!   stack. Pure.
//! * `look`, `lookers`: the threads that read those.
//! * `turns`: who is looked at next.

pub(crate) mod classify;
mod contract;
mod decide;
mod exclude;
mod lifetime;
mod look;
mod lookers;
mod server;
mod turns;

use self::lifetime::Lifetime;
use crate::Errno;
use mapdirect_sys::fanotify::{Group, Mask};
use mapdirect_sys::memfd;
use std::os::fd::AsFd;

/// What is asked for on an inode behind the gate.
pub(crate) const MASK: Mask = Mask::from_bits(Mask::OPEN_PERM.bits() | Mask::PRE_ACCESS.bits());

/// The groups that a guard with this gate has. They go with it, and so does the
/// gate.
#[derive(Debug)]
pub(crate) struct Gate {
    /// Asks before an operation goes on.
    pub(crate) group: Group,
    /// Hears of the ends of pins.
    lifetime: Lifetime,
}

impl Gate {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// `EINVAL` or `ENOSYS` where the kernel has no pre-content events, and
    /// whatever else opening a group answers.
    pub(crate) fn new() -> Result<Self, Errno> {
        let group = Group::pre_content()?;
        require_pre_content(&group)?;
        Ok(Self {
            group,
            lifetime: Lifetime::new()?,
        })
    }
}

/// A kernel before 6.14 makes such a group, too, and only refuses its marks: a
/// mask that it does not know with `EINVAL`. One that knows it refuses it for
/// a memory file, whose filesystem has no such events.
fn require_pre_content(group: &Group) -> Result<(), Errno> {
    let probe = memfd::sealed("mapdirect-probe", b"")?;
    match group.add(Mask::PRE_ACCESS, probe.as_fd()) {
        Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Whether an error of reading events says that there will be none any more.
/// Others say that one event could not be delivered (`create_fd`,
/// fs/notify/fanotify/fanotify_user.c).
pub(crate) fn is_final(errno: Errno) -> bool {
    matches!(errno, Errno::BADF | Errno::INVAL | Errno::FAULT)
}
