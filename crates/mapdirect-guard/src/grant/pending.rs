//! Requests for the same file at the same time.
//!
//! The fanotify gate grants a pin only if nobody else has the file open in a
//! way that could change it. But every process that asks for a pin has the file
//! open. So the first one to be granted brings the others behind the gate: the
//! descriptor of each is replaced while it waits for its turn, and from then on
//! the gate judges what it does. The grant then has to make sure that nobody
//! else is there. A lease cannot tell that any more, so the grant concludes it
//! from `/proc`, as it does when a filesystem without reflink has readers.

use super::{Conversation, Judged, KEPT_FLAGS, MOST_PATIENCE, refusal, system};
use crate::table::{GrantState, Watched};
use crate::wake::Backoff;
use crate::{Errno, Guard};
use mapdirect_proto::{Opener, Reason, Refusal};
use mapdirect_sys::{kcmp, proc};
use rustix::fs::SeekFrom;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How long the waiting requests may take to come behind the gate.
const PATIENCE: Duration = Duration::from_secs(1);

/// Takes the right to grant pins of an inode, once no other grant has it.
pub(crate) fn lock(
    watched: &Watched,
    patience: Duration,
) -> Result<MutexGuard<'_, GrantState>, Refusal> {
    lock_meanwhile(watched, patience, || Ok(()))
}

/// Like [`lock`], but calls `meanwhile` again and again while another grant has
/// the right.
pub(super) fn lock_meanwhile(
    watched: &Watched,
    patience: Duration,
    mut meanwhile: impl FnMut() -> Result<(), Refusal>,
) -> Result<MutexGuard<'_, GrantState>, Refusal> {
    // Another grant on the inode may rightly take as long as its own patience.
    let mut backoff = Backoff::until(
        Instant::now() + patience + MOST_PATIENCE,
        Duration::from_micros(50),
        Duration::from_millis(5),
    );
    loop {
        if let Some(state) = watched.try_grant() {
            return Ok(state);
        }
        if backoff.is_over() {
            return Err(refusal(
                Reason::StillChanging,
                Errno::TXTBSY,
                "another request for this file has not been decided yet",
                "try again later",
            ));
        }
        meanwhile()?;
        backoff.pause();
    }
}

/// All requests that wait for a grant of an inode.
#[derive(Debug, Default)]
pub(crate) struct Queue(Mutex<Vec<Arc<Pending>>>);

impl Queue {
    fn all(&self) -> Vec<Arc<Pending>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Joins the queue. Dropping the returned value gives the place up.
    pub(crate) fn join(watched: &Arc<Watched>, pid: i32) -> Waiting {
        let pending = Arc::new(Pending {
            pid,
            is_asked: AtomicBool::new(false),
            is_done: AtomicBool::new(false),
            armed: OnceLock::new(),
        });
        watched
            .queue
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::clone(&pending));
        Waiting {
            watched: Arc::clone(watched),
            pending,
        }
    }

    /// Brings every waiting request behind the gate, and says whether any has
    /// come.
    pub(crate) fn bring_behind_the_gate(&self, own: &Waiting) -> bool {
        let others = || {
            let mut all = self.all();
            all.retain(|pending| !Arc::ptr_eq(pending, &own.pending));
            all
        };
        let asked = others();
        for pending in &asked {
            pending.is_asked.store(true, SeqCst);
        }
        let mut backoff = Backoff::until(
            Instant::now() + PATIENCE,
            Duration::from_micros(50),
            Duration::from_millis(5),
        );
        while !asked.iter().all(|pending| pending.is_done.load(SeqCst)) && !backoff.is_over() {
            backoff.pause();
        }
        others().iter().any(|pending| pending.armed.get().is_some())
    }

    /// Whether this opener is a description behind the gate that a waiting
    /// request was given.
    pub(crate) fn knows(&self, opener: &Opener) -> bool {
        let own = std::process::id().cast_signed();
        self.all().iter().any(|pending| {
            let armed = pending.armed.get().map(AsRawFd::as_raw_fd);
            matches!((armed, opener.fd), (Some(armed), Some(fd))
                if !opener.mapped
                    && kcmp::same_description((own, armed), (opener.pid, fd)))
        })
    }

    /// Whether a process other than `own` waits for a grant. When everybody is
    /// behind the gate already, no waiting process has to be brought there.
    pub(crate) fn has(&self, pid: i32, own: i32) -> bool {
        pid != own && self.all().iter().any(|pending| pending.pid == pid)
    }
}

/// One waiting request.
#[derive(Debug)]
struct Pending {
    pid: i32,
    /// The request is asked to come behind the gate.
    is_asked: AtomicBool,
    /// The request has come behind the gate, or it cannot, or it is its turn.
    is_done: AtomicBool,
    /// The description behind the gate that the request was given.
    armed: OnceLock<OwnedFd>,
}

/// A place in the queue.
#[derive(Debug)]
pub(crate) struct Waiting {
    watched: Arc<Watched>,
    pending: Arc<Pending>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.pending.is_done.store(true, SeqCst);
        self.watched
            .queue
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|pending| !Arc::ptr_eq(pending, &self.pending));
    }
}

impl Waiting {
    /// Comes behind the gate, if that is asked for. `file` is the holder's
    /// description, and is then replaced by one behind the gate.
    pub(super) fn step_aside(
        &self,
        guard: &Guard,
        judged: &Judged,
        file: &mut OwnedFd,
        talk: &mut dyn Conversation,
    ) -> Result<(), Refusal> {
        if !self.pending.is_asked.load(SeqCst) || self.pending.is_done.load(SeqCst) {
            return Ok(());
        }
        let result = self.come_behind_the_gate(guard, judged, file, talk);
        self.pending.is_done.store(true, SeqCst);
        result
    }

    fn come_behind_the_gate(
        &self,
        guard: &Guard,
        judged: &Judged,
        file: &mut OwnedFd,
        talk: &mut dyn Conversation,
    ) -> Result<(), Refusal> {
        let armed = guard
            .own
            .during(|| proc::reopen(file.as_fd(), judged.open_flags & KEPT_FLAGS))
            .map_err(|errno| system("opening the file again", errno))?;
        let again = armed.try_clone().map_err(|_| {
            refusal(
                Reason::Limit,
                Errno::MFILE,
                "the guard has no descriptor left",
                "",
            )
        })?;
        rustix::fs::seek(&*file, SeekFrom::Current(0))
            .and_then(|at| rustix::fs::seek(&armed, SeekFrom::Start(at)))
            .map_err(|errno| system("lseek", errno))?;
        talk.swap(armed.as_fd())?;
        *file = armed;
        let _ = self.pending.armed.set(again);
        Ok(())
    }

    /// Turns the waiting request into the one whose turn it is. It is not asked
    /// to come behind the gate any more, and the guard closes its own copy of
    /// the description.
    pub(crate) fn into_turn(self) -> Turn {
        let turn = Queue::join(&self.watched, self.pending.pid);
        turn.pending.is_done.store(true, SeqCst);
        Turn(turn)
    }
}

/// The place of the request whose turn it is.
#[derive(Debug)]
pub(crate) struct Turn(Waiting);

impl Turn {
    pub(crate) fn queue(&self) -> &Queue {
        &self.0.watched.queue
    }

    pub(crate) fn bring_others(&self) -> bool {
        self.queue().bring_behind_the_gate(&self.0)
    }
}
