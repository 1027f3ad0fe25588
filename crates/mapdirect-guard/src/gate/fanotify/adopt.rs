//! Takes over the gate and the pins of an earlier guard.
//!
//! The groups outlive a guard, because [whoever started it](crate::store) has them
//! as well: the gate stays closed, and whoever comes to it waits for the next
//! guard. That takes over in steps, so that nobody waits for long and nobody
//! is let in too early:
//!
//! 1. Before an event is read: every pin of the [journal](crate::journal) is put
//!    into the table, unsettled. And events that the earlier guard has read and not
//!    answered are refused: nobody can read them again.
//! 2. When the gate's thread answers: the files are opened (which asks the gate),
//!    their block maps are read, and the pins settled. Operations that a pin may
//!    forbid wait for that.
//!
//! The tripwire comes last, since it may have to wait until the kernel has taken the
//! earlier guard apart. It reads all block maps once more, and compares them.

use super::{Gate, MASK};
use crate::Guard;
use crate::family::Family;
use crate::grant::pending::lock;
use crate::grant::{Granting, Survey, judge, length_of, refusal, system};
use crate::journal::{FILE_PREFIX, Left, LivesBy, PIPE_PREFIX, PinRecord, UNKNOWN, sum_of};
use crate::table::{Abilities, Carrier, Pin, Watched};
use crate::wake::has_hung_up;
use mapdirect_model::facts::Filesystem;
use mapdirect_proto::{Flags, PinRequest, Reason, Refusal};
use mapdirect_sys::{Errno, proc};
use rustix::fs::OFlags;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// A pin that is known again, but whose blocks are not read yet.
#[derive(Debug)]
pub(super) struct Recognised {
    watched: Arc<Watched>,
    pin: Arc<Pin>,
    record: PinRecord,
}

/// What is said of a pin that could not be taken over.
const WHILE_NONE: &str = "while one guard took over from another";

/// The first step. Nothing has read an event yet.
///
/// # Errors
///
/// When events that were read cannot be answered.
pub(super) fn recognise(guard: &Guard, gate: &Gate, left: Left) -> Result<Vec<Recognised>, Errno> {
    let by_name = |prefix| -> HashMap<String, OwnedFd> {
        guard.starter.take_all(prefix).into_iter().collect()
    };
    let (mut files, mut pipes) = (by_name(FILE_PREFIX), by_name(PIPE_PREFIX));
    for (record, kept) in left.files {
        let id = record.inode;
        let is_it = |file: &OwnedFd| {
            let stat = rustix::fs::fstat(file);
            stat.is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (id.dev, id.inode))
        };
        let Some(path) = files.remove(&kept.place()).filter(is_it) else {
            kept.end();
            continue;
        };
        let abilities = Abilities {
            reflink: record.reflink,
            exchange: record.exchange,
            coarse: record.coarse,
        };
        let watched = guard.table.get_or_insert(id, || {
            Watched::new(id, abilities, Arc::from(record.path.as_str()))
        });
        watched.notes.anything();
        watched.notes.begin_move(record.moved);
        watched.has_names(record.names);
        if gate.lifetime.watch_again(&watched, path, kept).is_err() {
            guard.table.remove(&watched);
            continue;
        }
        if let Some(mut state) = watched.try_grant() {
            // Whoever has a description has it from behind the gate.
            state.closed = true;
        }
        // If nothing turns out to be pinned, it is let go.
        gate.lifetime.take_out_dead(id);
    }
    let mut found = Vec::new();
    for (record, kept) in left.pins {
        let watched = guard.table.get(record.inode);
        let carrier = match record.lives_by {
            LivesBy::Lock => Some(Carrier::Lock),
            LivesBy::Writers => Some(Carrier::Writers),
            LivesBy::Pipe => pipes
                .remove(&kept.place())
                .filter(|pipe| !has_hung_up(pipe.as_fd()))
                .map(Carrier::Pipe),
        };
        let (Some(watched), Some(carrier)) = (watched, carrier) else {
            // It has ended, or its holder is told that nobody knows it.
            kept.end();
            continue;
        };
        let family = record
            .family
            .and_then(|(pid, began)| Family::that_began(pid, began));
        let pin = Pin::recorded(&record, carrier, family);
        if record.until != 0 {
            let bytes = record.shown.end - record.shown.start;
            let claim = &guard.delegation;
            pin.is_delegated_by(claim.claim_again(record.uid, bytes, record.until));
        }
        pin.outlives_by(kept);
        let pin = Arc::new(pin);
        watched.add(&pin);
        found.push(Recognised {
            watched,
            pin,
            record,
        });
    }
    // Nobody will come for what no record is about.
    for (prefix, names) in [(FILE_PREFIX, files), (PIPE_PREFIX, pipes)] {
        for place in names.into_keys() {
            // What is kept under a name that somebody else takes as well could come
            // to the next guard in place of the other, and end a pin.
            if !guard.starter.let_go(&format!("{prefix}{place}")) {
                gate.journal.bar(prefix, place);
            }
        }
    }
    gate.group
        .refuse_unanswered(left.descriptors, Errno::TXTBSY)?;
    Ok(found)
}

/// The second step, when the gate's thread answers. Returns the files that the
/// tripwire has to listen to.
pub(super) fn settle(guard: &Guard, gate: &Gate, recognised: Vec<Recognised>) -> Vec<Settled> {
    let mut settled = Vec::new();
    for one in recognised {
        match one.settle(guard, gate) {
            Ok(filesystem) => settled.push(Settled { one, filesystem }),
            Err(refusal) => one.is_lost(guard, gate, &refusal),
        }
        guard.waiting.decided();
    }
    settled
}

/// A pin that was taken over.
#[derive(Debug)]
pub(super) struct Settled {
    one: Recognised,
    filesystem: Filesystem,
}

/// The last step: has the tripwire listen to everything that was taken over.
pub(super) fn listen(guard: &Guard, gate: &Gate, settled: &[Settled]) {
    for Settled { one, filesystem } in settled {
        let listening = one.open(guard, OFlags::RDONLY).and_then(|file| {
            let armed = guard.tripwire.arm(one.watched.id, filesystem, file.as_fd());
            armed
                .map(drop)
                .map_err(|errno| system("arming the tripwire", errno))
        });
        match listening {
            // The pin may have ended by now.
            Err(refusal) if !one.pin.is_dead() => one.is_lost(guard, gate, &refusal),
            _ => {}
        }
    }
    if !settled.is_empty() {
        guard.tripwire.look_everywhere();
    }
}

impl Recognised {
    /// Handles that the promise cannot be kept.
    fn is_lost(&self, guard: &Guard, gate: &Gate, refusal: &Refusal) {
        let why = format!("it could not be kept {WHILE_NONE}: {}", refusal.obstacle);
        guard.notices.lost(&self.pin, &why);
        self.pin.end();
        self.watched.remove(|other| other.id == self.pin.id);
        gate.lifetime.take_out_dead(self.watched.id);
    }

    /// Opens the file behind the gate.
    fn open(&self, guard: &Guard, access: OFlags) -> Result<OwnedFd, Refusal> {
        let anchor = self.watched.anchor().ok_or_else(unwatched)?;
        let open = || proc::reopen(anchor.as_fd(), access | OFlags::NONBLOCK);
        let file = guard.own.during(open);
        file.map_err(|errno| system("opening it again", errno))
    }

    /// Reads the block map of the pin again.
    fn settle(&self, guard: &Guard, gate: &Gate) -> Result<Filesystem, Refusal> {
        let Self {
            watched,
            pin,
            record,
        } = self;
        let access = if record.flags.contains(Flags::MAP) {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        let file = self.open(guard, access)?;
        // Marks go with their inode, for example on unmount.
        if gate.group.has_mark(file.as_fd()) != Ok(true)
            || gate.lifetime.watches(file.as_fd()) != Ok(true)
        {
            return Err(unwatched());
        }
        let request = PinRequest {
            offset: record.shown.start,
            length: length_of(&record.shown),
            flags: record.flags,
            patience_ms: 0,
        };
        let mut judged = judge(guard, &request, file.as_fd())?;
        judged.range = record.shown.clone();
        judged.mapped.clone_from(&record.mapped);
        let patience = Duration::from_secs(1);
        let _state = lock(watched, patience)?;
        let granting = Granting {
            guard,
            judged: &judged,
            watched,
            pin,
            patience,
        };
        let notes = granting.notes()?;
        let survey = Survey {
            granting: &granting,
            file: file.as_fd(),
            others_can_store: &|frozen| {
                super::exclude::others_can_store(&granting, &notes, file.as_fd(), frozen)
            },
        };
        let (map, found) = survey.until_at_rest(true)?;
        pin.settle(&map, &found.pinned, found.kept_pages);
        watched.renew_layers();
        pin.hand_over();
        guard.delegation.deadlines.add(record.inode, pin);
        if record.map != UNKNOWN && record.map != sum_of(&map) {
            let why = format!("blocks of it have changed {WHILE_NONE}");
            guard.notices.lost(pin, &why);
        }
        Ok(judged.facts.filesystem)
    }
}

fn unwatched() -> Refusal {
    refusal(
        Reason::NoGate,
        Errno::IO,
        "the watch on the file went away",
        "pin it again",
    )
}

/// Why a pin is refused that would not outlive the guard.
pub(super) fn not_kept(errno: Errno) -> Refusal {
    if errno == Errno::NFILE {
        return no_room();
    }
    system("handing it over to the next guard", errno)
}

/// Why a pin is refused when there are too many.
pub(super) fn no_room() -> Refusal {
    refusal(
        Reason::Limit,
        Errno::NFILE,
        "what is pinned already is as much as a guard can hand over to the next one",
        "let go of other pins; several pins of one file take less than as many files; the \
         supervisor of the guard says so if it is short of descriptors (LimitNOFILE)",
    )
}

impl Gate {
    /// Has the next guard find a pin.
    ///
    /// # Errors
    ///
    /// When the pin would end with this guard.
    pub(super) fn outlives(&self, watched: &Watched, pin: &Pin) -> Result<(), Refusal> {
        let pipe = match pin.carrier() {
            Carrier::Pipe(pipe) => {
                self.journal.note_descriptor(pipe.as_raw_fd());
                Some(pipe.as_fd())
            }
            Carrier::Lock | Carrier::Writers => None,
        };
        let kept = self.journal.keep_pin(&pin.record_for(watched.id), pipe);
        pin.outlives_by(kept.map_err(not_kept)?);
        Ok(())
    }

    /// Has the next guard find a file. From now on it is behind the gate.
    pub(super) fn close_at(
        &self,
        watched: &Watched,
        file: std::os::fd::BorrowedFd<'_>,
    ) -> Result<(), Errno> {
        // The next guard must know of the file before there is a mark that it
        // would have to remove.
        self.lifetime.watch(&self.journal, watched, file)?;
        self.group.add(MASK, file)
    }
}
