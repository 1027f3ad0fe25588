//! The fanotify gate: permission events that one thread answers.
//!
//! * `server`: the thread, which takes events and gives answers.
//! * `decide`: what an event is answered once it is known what it means.
//! * `classify`: what a blocked thread is doing, from its registers and its
//!   stack. Pure.
//! * `look`, `lookers`: the threads that read these registers and stacks.
//! * `adopt`: how the gate and its pins go from one guard to the next.
//! * `turns`: which event is looked at next.

mod adopt;
pub(crate) mod classify;
mod contract;
mod decide;
mod exclude;
mod lifetime;
pub(crate) mod look;
mod lookers;
mod server;
mod turns;

use self::adopt::{Recognised, Settled};
pub(crate) use self::classify::descriptor;
use self::lifetime::Lifetime;
use crate::journal::{Journal, Left};
use crate::store::Starter;
use crate::{Errno, Guard};
use mapdirect_sys::fanotify::{Group, Mask};
use mapdirect_sys::memfd;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

/// The events that the gate gets for an inode behind it.
pub(crate) const MASK: Mask = Mask::from_bits(Mask::OPEN_PERM.bits() | Mask::PRE_ACCESS.bits());

/// The names in the store of the group that asks, and of the one that tells.
const NAMES: [&str; 2] = ["gate", "closes"];

/// The fanotify groups of a guard with this gate. They end with whoever has the
/// last copy of them: with the guard, or with whoever started it.
#[derive(Debug)]
pub(crate) struct Gate {
    /// The group that asks before an operation goes on.
    pub(crate) group: Group,
    /// The group that tells of the ends of pins.
    lifetime: Lifetime,
    /// What the next guard has to know.
    journal: Arc<Journal>,
    /// What an earlier guard has left.
    left: Mutex<Option<Left>>,
    recognised: Mutex<Vec<Recognised>>,
    settled: Mutex<Vec<Settled>>,
}

impl Gate {
    /// Creates the gate.
    ///
    /// # Errors
    ///
    /// `EINVAL` or `ENOSYS` when the kernel has no pre-content events, and any
    /// other error of opening a group.
    pub(crate) fn new(starter: &Arc<Starter>) -> Result<Self, Errno> {
        if let Some((group, closes, journal, left)) = left_behind(starter) {
            return Ok(Self {
                group,
                lifetime: Lifetime::of(closes)?,
                journal,
                left: Mutex::new(Some(left)),
                recognised: Mutex::default(),
                settled: Mutex::default(),
            });
        }
        let group = Group::pre_content()?;
        require_pre_content(&group)?;
        let closes = Group::notification()?;
        let journal = Journal::new(starter)?;
        for (name, group) in NAMES.iter().zip([&group, &closes]) {
            starter.keep(name, group.as_fd())?;
        }
        mapdirect_sys::fanotify::note_own(group.as_fd());
        Ok(Self {
            group,
            lifetime: Lifetime::of(closes)?,
            journal,
            left: Mutex::default(),
            recognised: Mutex::default(),
            settled: Mutex::default(),
        })
    }

    /// Takes over what an earlier guard has left, before an event is read.
    /// Returns the number of records that make no sense.
    ///
    /// # Errors
    ///
    /// When events that were read cannot be answered.
    pub(crate) fn recognise(&self, guard: &Guard) -> Result<usize, Errno> {
        let left = self
            .left
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(left) = left else {
            return Ok(0);
        };
        let nonsense = left.nonsense;
        let recognised = adopt::recognise(guard, self, left)?;
        *self.recognised() = recognised;
        Ok(nonsense)
    }

    /// Settles the pins that were taken over, when events are answered.
    pub(crate) fn settle(&self, guard: &Guard) {
        let recognised = std::mem::take(&mut *self.recognised());
        let settled = adopt::settle(guard, self, recognised);
        *self.settled() = settled;
    }

    /// Has the tripwire listen to what was taken over.
    pub(crate) fn listen(&self, guard: &Guard) {
        let settled = std::mem::take(&mut *self.settled());
        adopt::listen(guard, self, &settled);
    }

    fn settled(&self) -> std::sync::MutexGuard<'_, Vec<Settled>> {
        self.settled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recognised(&self) -> std::sync::MutexGuard<'_, Vec<Recognised>> {
        self.recognised
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The groups and the journal of an earlier guard. If any of it is missing or
/// cannot be read, all of it is let go of, and with it everybody who waits.
fn left_behind(starter: &Arc<Starter>) -> Option<(Group, Group, Arc<Journal>, Left)> {
    let [gate, closes] = NAMES.map(|name| {
        let taken = starter.take(name)?;
        Group::made_before(taken).ok()
    });
    let journal = Journal::found(starter);
    match (gate, closes, journal) {
        (Some(gate), Some(closes), Some((journal, left))) => {
            mapdirect_sys::fanotify::note_own(gate.as_fd());
            Some((gate, closes, journal, left))
        }
        (gate, closes, journal) => {
            drop((gate, closes, journal));
            Journal::forget(starter);
            for name in NAMES {
                starter.let_go(name);
            }
            None
        }
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
