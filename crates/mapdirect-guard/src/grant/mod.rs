//! Granting a pin: a promise is made only when it can be kept.
//!
//! In order: judge the request; publish the pin, so that whoever comes now
//! waits for the outcome; close the gate; prove that nobody holds a
//! description from before, and that nobody is still in the middle of
//! something the gate let pass; replace the caller's own description by one
//! from behind the gate; read the block map twice; settle.
//!
//! On an inode that is behind the gate already, and where nothing was let in
//! since the last proof, all of that holds, and what remains is to open a
//! description, lock its byte and read the block map.

#[cfg(feature = "bpf")]
pub(crate) mod adopt;
pub(crate) mod allocate;
mod exclude;
pub(crate) mod in_kernel;
pub(crate) mod pending;
mod refusal;
mod request;
mod survey;
#[cfg(test)]
mod tests;

use self::pending::{Queue, Turn};
pub(crate) use self::refusal::refusal;
use self::refusal::system;
use self::request::{Judged, judge};
use self::survey::{Still, write_back};
use crate::gate::fanotify::MASK;
use crate::lifetime::CLOSES;
use crate::table::{Abilities, GrantState, InodeId, Pin, Watched};
use crate::tripwire::Armed;
use crate::wake::Backoff;
use crate::{Errno, Guard};
use mapdirect_proto::PinnedRange;
use mapdirect_proto::{Granted, PinRequest, Reason, Refusal};
use mapdirect_sys::unix::Sender;
use rustix::fs::{AtFlags, OFlags, StatxFlags};
use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

/// A pin, and the descriptors that go to its holder.
#[derive(Debug)]
pub(crate) struct Grant {
    /// To be handed over once `file` is closed here.
    pub(crate) pin: Arc<Pin>,
    pub(crate) granted: Granted,
    /// The description whose life is the pin.
    pub(crate) file: OwnedFd,
    /// The extents, if there are too many for a message.
    pub(crate) extents: Option<OwnedFd>,
    /// What the pin lives by if the description cannot write.
    pub(crate) life: Option<OwnedFd>,
}

/// The holder's part in a grant.
pub(crate) trait Conversation {
    /// Has the holder put `replacement` in the place of the descriptor it
    /// sent.
    fn swap(&mut self, replacement: BorrowedFd<'_>) -> Result<(), Refusal>;

    /// Whether somebody still waits for the answer.
    fn is_wanted(&self) -> bool {
        true
    }
}

/// Longest patience a request can ask for.
const MOST_PATIENCE: Duration = Duration::from_secs(60);

/// Grants a pin on `file`, which its holder opened, or says why not. Nothing
/// is left behind in that case.
pub(crate) fn grant(
    guard: &Guard,
    request: &PinRequest,
    file: OwnedFd,
    owner: Sender,
    talk: &mut dyn Conversation,
) -> Result<Grant, Refusal> {
    let mut file = file;
    let judged = judge(guard, request, file.as_fd())?;
    let patience = Duration::from_millis(request.patience_ms.into()).min(MOST_PATIENCE);
    // First of all: what is changed from here on is noticed.
    let _armed = arm(guard, &judged, file.as_fd())?;
    loop {
        let watched = guard.table.get_or_insert(judged.id, || {
            let abilities = Abilities {
                reflink: judged.facts.reflink,
                exchange: judged.facts.exchange,
                coarse: in_kernel::writes_whole_folios(&judged.facts),
            };
            Watched::new(judged.id, abilities, Arc::clone(&judged.path))
        });
        let waiting = Queue::join(&watched, owner.pid);
        let mut state = lock_meanwhile(&watched, patience, || {
            if guard.gate.is_in_kernel() {
                return Ok(());
            }
            waiting.step_aside(guard, &judged, &mut file, talk)
        })?;
        if state.retired {
            continue;
        }
        let turn = waiting.into_turn();
        let pin = Arc::new(Pin::unsettled(
            guard.next_id(),
            judged.range.clone(),
            judged.mapped.clone(),
            judged.reach(),
            request.flags,
            owner,
        ));
        let mut attempt = Attempt {
            guard,
            judged: &judged,
            watched: &watched,
            state: &mut state,
            pin: &pin,
            patience,
            mark: guard.next_lock_byte(),
            marked: Cell::new(false),
            talk,
            file,
            life: None,
            turn: Some(turn),
        };
        let result = if guard.gate.is_in_kernel() {
            attempt.run_in_kernel()
        } else {
            attempt.run()
        };
        attempt.unmark();
        watched.opens.reset();
        let (file, life) = (attempt.file, attempt.life);
        if result.is_err() {
            abandon(guard, &watched, &mut state, &pin, file.as_fd());
        }
        // Whoever waited for the outcome is judged by it now.
        guard.gate.reconsider();
        let (granted, extents) = result?;
        return Ok(Grant {
            pin,
            granted,
            file,
            extents,
            life,
        });
    }
}

/// Has the tripwire listen to a file.
fn arm(guard: &Guard, judged: &Judged, file: BorrowedFd<'_>) -> Result<Armed, Refusal> {
    let armed = guard
        .tripwire
        .arm(judged.id, &judged.facts.filesystem, file);
    armed.map_err(|errno| {
        let call = "arming the tripwire (perf_event_open, name_to_handle_at)";
        match errno {
            Errno::MFILE | Errno::NFILE | Errno::NOMEM => refusal(
                Reason::Limit,
                Errno::NOMEM,
                format!("{call} failed: {errno}"),
                "give the guard more descriptors (ulimit -n), or let go of other pins",
            ),
            other => system(call, other),
        }
    })
}

fn lock(watched: &Watched, patience: Duration) -> Result<MutexGuard<'_, GrantState>, Refusal> {
    lock_meanwhile(watched, patience, || Ok(()))
}

/// The same; `meanwhile` is done again and again while others have it.
fn lock_meanwhile(
    watched: &Watched,
    patience: Duration,
    mut meanwhile: impl FnMut() -> Result<(), Refusal>,
) -> Result<MutexGuard<'_, GrantState>, Refusal> {
    // Another grant on the inode may rightly take as long as its patience.
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

/// Takes back what a grant that failed has done.
fn abandon(
    guard: &Guard,
    watched: &Arc<Watched>,
    state: &mut GrantState,
    pin: &Pin,
    file: BorrowedFd<'_>,
) {
    watched.remove(|other| other.id == pin.id);
    // It can only fail to make less of it.
    let _ = guard.gate.publish(watched);
    if watched.pins.load().is_empty() {
        state.retired = true;
        // Marks first: once the entry is gone another grant may set its own.
        // None may be there yet, or any more.
        if let Some(gate) = guard.gate.fanotify() {
            let _ = gate.group.remove(MASK, file);
            let _ = guard.lifetime.closes.remove(CLOSES, file);
            guard.lifetime.forget(watched);
        }
        guard.table.remove(watched);
    }
}

/// One attempt at a grant.
struct Attempt<'a> {
    guard: &'a Guard,
    judged: &'a Judged,
    watched: &'a Arc<Watched>,
    state: &'a mut GrantState,
    pin: &'a Arc<Pin>,
    /// How long to wait for others, each time there is something to wait for.
    patience: Duration,
    /// A byte to mark the holder's own description by.
    mark: u64,
    marked: Cell<bool>,
    talk: &'a mut dyn Conversation,
    /// A description of the inode: the holder's, later the pin's.
    file: OwnedFd,
    /// The holder's end of the pipe that the pin lives by, if it does.
    life: Option<OwnedFd>,
    /// Who else asks for the same file.
    turn: Option<Turn>,
}

/// What a description that takes another's place keeps of its flags.
const KEPT_FLAGS: OFlags = OFlags::ACCMODE
    .union(OFlags::APPEND)
    .union(OFlags::DIRECT)
    .union(OFlags::DSYNC)
    .union(OFlags::SYNC)
    .union(OFlags::NOATIME)
    .union(OFlags::NONBLOCK);

impl Attempt<'_> {
    fn run(&mut self) -> Result<(Granted, Option<OwnedFd>), Refusal> {
        let marked = self.gate_has_mark();
        // Marks go with their inode, on unmount for one: what was proven then
        // is worth nothing now.
        let was_closed = self.state.closed && marked == Ok(true);
        self.state.closed = was_closed;
        if !was_closed {
            self.watched.notes.forget();
        }
        let notes = self.watched.publish(self.pin);
        let settled = if was_closed {
            self.prove_again(&notes)?
        } else {
            self.close_the_gate()?;
            self.prove_from_scratch()?;
            false
        };
        if !was_closed && (self.judged.is_writable() || self.judged.facts.reflink) {
            self.replace_description()?;
        } else {
            let for_pin = self.open_for_pin()?;
            self.unmark();
            self.file = for_pin;
        }
        self.begin_life()?;
        self.state.closed = true;
        let (map, pinned, held) = self.come_to_rest(settled)?;
        self.check_marks()?;
        self.pin.settle(&map, pinned, held);
        self.hand_out(&map)
    }
}

/// The pins of a file, for whoever has it open.
pub(crate) fn pins_of(guard: &Guard, file: BorrowedFd<'_>) -> Result<Vec<PinnedRange>, Refusal> {
    // Anybody may ask about any file, and no server of a filesystem (FUSE, NFS)
    // may make the guard wait: this asks none.
    let statx = rustix::fs::statx(
        file,
        "",
        AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC,
        StatxFlags::INO,
    )
    .map_err(|errno| system("statx", errno))?;
    let id = InodeId {
        dev: rustix::fs::makedev(statx.stx_dev_major, statx.stx_dev_minor),
        inode: statx.stx_ino,
    };
    let Some(watched) = guard.table.get(id) else {
        return Ok(Vec::new());
    };
    let pins = watched.pins.load();
    Ok(pins
        .iter()
        .filter(|pin| pin.settled().is_some() && !pin.is_dead())
        .map(|pin| PinnedRange {
            pin: pin.id,
            range: pin.shown.clone(),
            flags: pin.flags,
            pid: pin.pid,
        })
        .collect())
}
