//! Granting a pin: a promise is made only when it can be kept.
//!
//! * [`request`] judges the request and its file by themselves.
//! * [`pending`] queues requests for the same file.
//! * The gate publishes the pin, so that every later operation waits for the
//!   outcome. It then excludes everybody who could break the pin unseen: see
//!   [`Gate::exclude`](crate::gate::Gate::exclude).
//! * [`survey`] reads the block map until it stays the same, and the gate
//!   settles the pin by it.
//! * The holder gets the extents and the file description whose life is the
//!   pin.

pub(crate) mod allocate;
pub(crate) mod giving_way;
mod others;
pub(crate) mod pending;
mod refusal;
mod request;
mod stable;
mod survey;
#[cfg(test)]
mod tests;

pub(crate) use self::refusal::{gone, lock_refused, refusal, refuse_executed, system};
use self::request::judge_from;
pub(crate) use self::request::{Judged, judge, length_of};
pub(crate) use self::stable::read_now;
pub(crate) use self::survey::{Findings, Survey};

use self::pending::{Queue, Turn, lock_meanwhile};
use crate::delegation::{Admission, from_another_namespace};
use crate::family::Family;
use crate::table::{InodeId, Pin, Watched};
use crate::tripwire::Armed;
use crate::{Errno, Guard};
use mapdirect_proto::{
    BlockMap, Flags, Granted, MAX_INLINE_EXTENTS, PinRequest, PinnedRange, Reason, Refusal, extent,
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
    /// The inode that the pin is on.
    pub(crate) watched: Arc<Watched>,
    /// The pin, which counts as handed over once `file` is closed here.
    pub(crate) pin: Arc<Pin>,
    pub(crate) granted: Granted,
    /// The file description whose life is the pin.
    pub(crate) file: OwnedFd,
    /// The extents, if they do not fit into a message.
    pub(crate) extents: Option<OwnedFd>,
    /// The holder's end of the pipe that the pin lives by. Only a pin whose
    /// description cannot write has one.
    pub(crate) lifeline: Option<OwnedFd>,
}

/// The holder's part in a grant.
pub(crate) trait Conversation {
    /// Asks the holder to replace the descriptor it sent with `replacement`.
    fn swap(&mut self, replacement: BorrowedFd<'_>) -> Result<(), Refusal>;

    /// The family of the process that asks.
    fn family(&self) -> Option<Arc<Family>> {
        None
    }

    /// Whether the holder still waits for the answer.
    fn is_wanted(&self) -> bool {
        true
    }
}

/// The longest patience that a request can ask for.
pub(crate) const MOST_PATIENCE: Duration = Duration::from_secs(60);

/// The same for a caller without the capability: others wait for its turn.
const MOST_PATIENCE_BY_POLICY: Duration = Duration::from_secs(5);

/// The open flags that a description keeps when it replaces another.
pub(crate) const KEPT_FLAGS: OFlags = OFlags::ACCMODE
    .union(OFlags::APPEND)
    .union(OFlags::DIRECT)
    .union(OFlags::DSYNC)
    .union(OFlags::SYNC)
    .union(OFlags::NOATIME)
    .union(OFlags::NONBLOCK);

/// A pin that is being granted, or granted anew. Every step of a grant needs
/// these facts.
#[derive(Clone, Copy)]
pub(crate) struct Granting<'a> {
    pub(crate) guard: &'a Guard,
    pub(crate) judged: &'a Judged,
    pub(crate) watched: &'a Arc<Watched>,
    pub(crate) pin: &'a Arc<Pin>,
    /// How long to wait for other users of the file, each time there is
    /// something to wait for.
    pub(crate) patience: Duration,
}

/// The holder's side of a grant: the process that asks for the pin.
pub(crate) struct Holder<'a> {
    /// A description of the inode: at first the holder's, in the end the pin's.
    pub(crate) file: OwnedFd,
    pub(crate) talk: &'a mut dyn Conversation,
    /// The holder's place in the queue of requests for this file.
    pub(crate) turn: Turn,
}

/// A settled pin that nobody can break unseen any more.
pub(crate) struct Secured {
    pub(crate) map: BlockMap,
    /// The holder's end of the pipe that the pin lives by, if the pin has one.
    pub(crate) lifeline: Option<OwnedFd>,
}

impl Granting<'_> {
    /// Opens the description that will be the pin. If a program shall have it in
    /// place of its own, it is open in the same way.
    pub(crate) fn open_for_pin(&self, file: BorrowedFd<'_>) -> Result<OwnedFd, Refusal> {
        if self.pin.flags.contains(Flags::IN_PLACE) {
            return self.reopen(file, self.judged.open_flags & KEPT_FLAGS);
        }
        let access = if self.judged.is_writable() {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        self.reopen(file, access)
    }
}

/// Grants a pin on `file`, which its holder opened, or says why not. A refusal
/// leaves nothing behind.
pub(crate) fn grant(
    guard: &Guard,
    request: &PinRequest,
    file: OwnedFd,
    owner: Sender,
    admission: Option<&Admission>,
    talk: &mut dyn Conversation,
) -> Result<Grant, Refusal> {
    let mut file = file;
    let judged = judge_from(guard, request, file.as_fd(), || {
        from_another_namespace(owner.pid, file.as_fd())
    })?;
    // Before this, only the caller itself waits for what it has handed in.
    let turn = admission.map(|admission| guard.delegation.turn(admission.uid));
    let _turn = turn.transpose()?;
    let most = if admission.is_some() {
        MOST_PATIENCE_BY_POLICY
    } else {
        MOST_PATIENCE
    };
    let patience = Duration::from_millis(request.patience_ms.into()).min(most);
    let delegation = &guard.delegation;
    let delegated = admission
        .map(|admission| delegation.claim(admission, request.flags, &judged.range, patience));
    let mut delegated = delegated.transpose()?;
    let family = talk
        .family()
        .filter(|_| request.flags.intersects(Flags::FAMILY | Flags::DENY_WRITE));
    // The tripwire is armed first, so that every later change is noticed.
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
        if judged.is_writable() {
            nobody_denies(&watched, owner.pid)?;
        }
        let turn = waiting.into_turn();
        let pin = judged.unsettled(guard.next_id(), request.flags, owner);
        let pin = Arc::new(pin.of_family(family.clone()));
        if let Some(delegated) = delegated.take() {
            pin.is_delegated_by(delegated);
        }
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
        if granted.is_ok() {
            guard.gate.granted(&watched);
        } else {
            watched.remove(|other| other.id == pin.id);
            let was_last = watched.pins.load().is_empty();
            // Withdraw from the gate first: once the entry is out of the table,
            // another grant may publish its own entry in the gate.
            guard.gate.withdraw(&watched, file.as_fd(), was_last);
            // Somebody may have taken up a dormant pin.
            if was_last && watched.pins.load().is_empty() {
                state.retired = true;
                guard.table.remove(&watched);
            }
        }
        // Operations that waited for the outcome are judged by it now.
        guard.waiting.decided();
        let (granted, extents, lifeline) = granted?;
        delegation.deadlines.add(judged.id, &pin);
        return Ok(Grant {
            watched: Arc::clone(&watched),
            pin,
            granted,
            file,
            extents,
            lifeline,
        });
    }
}

/// Fails if a pin denies this process to have a description that can write.
fn nobody_denies(watched: &Watched, process: i32) -> Result<(), Refusal> {
    let pins = watched.pins.load();
    let denies = |pin: &&Arc<Pin>| {
        pin.denies_write() && !pin.is_dead() && !pin.belongs_to(|family| family.may_have(process))
    };
    let Some(pin) = pins.iter().find(denies) else {
        return Ok(());
    };
    Err(refusal(
        Reason::OpenElsewhere,
        Errno::TXTBSY,
        format!(
            "process {} has pinned it so that nobody else may write to it",
            pin.pid
        ),
        "ask with a descriptor that can only read, or when that pin has ended",
    ))
}

/// Makes the tripwire watch a file.
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

/// Builds the reply to the holder. Many extents go into a sealed file, since
/// they do not fit into the message.
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

/// Lists the pins of a file, for any process that has the file open.
pub(crate) fn pins_of(guard: &Guard, file: BorrowedFd<'_>) -> Result<Vec<PinnedRange>, Refusal> {
    // Anybody may ask about any file, so the server of a filesystem (FUSE, NFS)
    // must not be able to make the guard wait. This statx does not contact the
    // server.
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
