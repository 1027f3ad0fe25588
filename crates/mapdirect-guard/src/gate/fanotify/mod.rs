//! The fanotify gate: permission events that one thread answers.
//!
//! * `server`: the thread, which takes events and gives answers.
//! * `decide`: what an event is answered once it is known what it means.
//! * `classify`: what a blocked thread is doing, from its registers and its
//!   stack. Pure.
//! * `look`, `lookers`: the threads that read those.
//! * `turns`: who is looked at next.

pub(crate) mod classify;
mod decide;
mod look;
mod lookers;
mod server;
mod turns;

pub(crate) use self::server::run;

use crate::Errno;
use crate::wake::Waker;
use arc_swap::ArcSwap;
use mapdirect_sys::fanotify::{Group, Mask};
use mapdirect_sys::memfd;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicUsize, fence};

/// What is asked for on an inode behind the gate.
pub(crate) const MASK: Mask = Mask::from_bits(Mask::OPEN_PERM.bits() | Mask::PRE_ACCESS.bits());

/// The group, and how to reach the thread that serves it.
#[derive(Debug)]
pub(crate) struct Gate {
    pub(crate) group: Group,
    waker: Waker,
    /// How often something changed that events may have been held back for.
    changes: AtomicUsize,
    /// Events held back until a grant is finished.
    waiting: AtomicUsize,
    /// The threads they belong to.
    held: ArcSwap<Vec<i32>>,
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
            waker: Waker::new()?,
            changes: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            held: ArcSwap::default(),
        })
    }

    /// Has the thread look again at the events it holds back, if any.
    pub(crate) fn reconsider(&self) {
        self.changes.fetch_add(1, SeqCst);
        // Pairs with the fence in `Server::run`: either the thread sees the
        // change, or we see that it waits.
        fence(SeqCst);
        if self.waiting.load(SeqCst) > 0 {
            self.waker.wake();
        }
    }

    /// The threads whose operations are held back at the gate.
    pub(crate) fn held(&self) -> Arc<Vec<i32>> {
        self.held.load_full()
    }

    /// Ends the thread once nothing is waiting any more.
    pub(crate) fn wake(&self) {
        self.waker.wake();
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
