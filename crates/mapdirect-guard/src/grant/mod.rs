//! Granting a pin: a promise is made only when it can be kept.
//!
//! * [`request`]: what is asked for is judged by itself.
//! * [`pending`]: whoever asks for the same file waits for his turn.
//! * The gate publishes the pin, so that whoever comes now waits for the
//!   outcome, and excludes everybody who could break it unseen: see
//!   [`Gate::exclude`](crate::gate::Gate::exclude).
//! * [`survey`]: the gate has the block map read until it stays the same, and
//!   settles the pin by it.
//! * The extents, and the description that is the pin, are handed to the
//!   holder.

pub(crate) mod allocate;
mod others;
pub(crate) mod pending;
mod refusal;
mod request;
mod survey;
#[cfg(test)]
mod tests;

pub(crate) use self::refusal::{gone, lock_refused, refusal, refuse_executed, system};
pub(crate) use self::request::{Judged, judge};
pub(crate) use self::survey::{Findings, Survey};

use self::pending::{Queue, Turn, lock_meanwhile};
use crate::table::{InodeId, Pin, Watched};
use crate::tripwire::Armed;
use crate::{Errno, Guard};
use mapdirect_proto::{
    BlockMap, Granted, MAX_INLINE_EXTENTS, PinRequest, PinnedRange, Reason, Refusal, extent,
};
use mapdirect_sys::memfd;
use mapdirect_sys::unix::Sender;
use rustix::fs::{AtFlags, OFlags, StatxFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

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
    /// The holder's end of the pipe that the pin lives by, if the description
    /// cannot write.
    pub(crate) lifeline: Option<OwnedFd>,
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
pub(crate) const MOST_PATIENCE: Duration = Duration::from_secs(60);

/// What a description that takes another's place keeps of its flags.
pub(crate) const KEPT_FLAGS: OFlags = OFlags::ACCMODE
    .union(OFlags::APPEND)
    .union(OFlags::DIRECT)
    .union(OFlags::DSYNC)
    .union(OFlags::SYNC)
    .union(OFlags::NOATIME)
    .union(OFlags::NONBLOCK);

/// A pin that is being granted, or granted anew: what every step needs to know
/// of it.
#[derive(Clone, Copy)]
pub(crate) struct Granting<'a> {
    pub(crate) guard: &'a Guard,
    pub(crate) judged: &'a Judged,
    pub(crate) watched: &'a Arc<Watched>,
    pub(crate) pin: &'a Arc<Pin>,
    /// How long to wait for others, each time there is something to wait for.
    pub(crate) patience: Duration,
}

/// Who asks for a pin.
pub(crate) struct Holder<'a> {
    /// A description of the inode: the holder's, in the end the pin's.
    pub(crate) file: OwnedFd,
    pub(crate) talk: &'a mut dyn Conversation,
    /// The place among all who ask for the same file.
    pub(crate) turn: Turn,
}

/// A pin that nobody can break unseen any more, and that is settled.
pub(crate) struct Secured {
    pub(crate) map: BlockMap,
    /// The holder's end of the pipe that the pin lives by, if it does.
    pub(crate) lifeline: Option<OwnedFd>,
}

impl Granting<'_> {
    /// Opens the description that will be the pin.
    pub(crate) fn open_for_pin(&self, file: BorrowedFd<'_>) -> Result<OwnedFd, Refusal> {
        let access = if self.judged.is_writable() {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        self.reopen(file, access)
    }
}

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
        let watched = judged.watched(guard);
        let waiting = Queue::join(&watched, owner.pid);
        let mut state = lock_meanwhile(&watched, patience, || {
            waiting.step_aside(guard, &judged, &mut file, talk)
        })?;
        if state.retired {
            continue;
        }
        let turn = waiting.into_turn();
        let pin = Arc::new(judged.unsettled(guard.next_id(), request.flags, owner));
        let granting = Granting {
            guard,
            judged: &judged,
            watched: &watched,
            pin: &pin,
            patience,
        };
        let mut holder = Holder { file, talk, turn };
        let secured = guard.gate.exclude(&granting, &mut state, &mut holder);
        let granted = secured.and_then(|secured| {
            let (granted, extents) = hand_out(&pin, &secured.map)?;
            Ok((granted, extents, secured.lifeline))
        });
        let file = holder.file;
        if granted.is_err() {
            watched.remove(|other| other.id == pin.id);
            let was_last = watched.pins.load().is_empty();
            // The gate first: once the entry is gone another grant may have its
            // own in the gate.
            guard.gate.withdraw(&watched, file.as_fd(), was_last);
            // Somebody may have taken up a pin that slept.
            if was_last && watched.pins.load().is_empty() {
                state.retired = true;
                guard.table.remove(&watched);
            }
        }
        // Whoever waited for the outcome is judged by it now.
        guard.waiting.decided();
        let (granted, extents, lifeline) = granted?;
        return Ok(Grant {
            pin,
            granted,
            file,
            extents,
            lifeline,
        });
    }
}

/// Has the tripwire listen to a file.
pub(crate) fn arm(guard: &Guard, judged: &Judged, file: BorrowedFd<'_>) -> Result<Armed, Refusal> {
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

/// What the holder is told: the extents inline, or in a file if there are many.
pub(crate) fn hand_out(pin: &Pin, map: &BlockMap) -> Result<(Granted, Option<OwnedFd>), Refusal> {
    let extents = map.extents();
    let inline = extents.len() <= MAX_INLINE_EXTENTS;
    let sealed = (!inline)
        .then(|| memfd::sealed("mapdirect-extents", &extent::encode_extents(extents)))
        .transpose()
        .map_err(|errno| system("memfd_create", errno))?;
    let granted = Granted {
        pin: pin.id,
        range: map.range(),
        file_size: map.file_size(),
        block_size: map.block_size(),
        device: map.device(),
        extent_count: extents.len() as u64,
        extents: if inline { extents.to_vec() } else { Vec::new() },
    };
    Ok((granted, sealed))
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
