//! Decides the answer to an event, once it is known what the event means.

use super::look::{Doing, MOST_LOOKED_AT};
use super::server::{About, Server, Waiting};
use crate::audit::{self, Refused, Who};
use crate::family;
use crate::gate::Gate as _;
use crate::ledger::PinSet;
use crate::policy::{Operation, OperationKind as K};
use crate::table::{InodeId, Opinion, Passing, Pin, Watched};
use mapdirect_sys::fanotify::Mask;
use std::cell::Cell;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

/// How long an operation waits for a grant to finish before it is refused.
const WAIT_FOR_GRANT: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Allow,
    Refuse,
    /// Ask again when a grant is finished.
    Hold,
    /// Look again: the file has changed meanwhile.
    Again,
    /// Refuse, once the name of the thread is known for the record.
    Name,
}

impl Server<'_> {
    pub(super) fn decide(&self, waiting: &Waiting, doing: &Doing) -> Verdict {
        let (event, file) = (&waiting.event, waiting.file.as_fd());
        let opens = !event.mask.intersects(Mask::PRE_ACCESS);
        if !opens && doing.operation.kind.is_harmless() {
            // Most operations are harmless: no pin and no grant forbids them.
            return Verdict::Allow;
        }
        let late = waiting.since.elapsed();
        let Ok(stat) = rustix::fs::fstat(file) else {
            return Verdict::Refuse;
        };
        let id = InodeId::from(&stat);
        let Some(watched) = self.guard.table.get(id) else {
            return Verdict::Allow;
        };
        if opens && watched.opens.are_held() && late < WAIT_FOR_GRANT {
            return Verdict::Hold;
        }
        let size = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
        if doing.operation.or.is_some() && size != waiting.question.size {
            // The operation may append, and the end of the file has moved.
            return Verdict::Again;
        }
        let verdict = judge_holder(&watched, waiting, doing)
            .unwrap_or_else(|| self.judge(&watched, waiting, doing, size));
        if verdict != Verdict::Refuse {
            return verdict;
        }
        if doing.actor.is_none() && !waiting.question.named {
            return Verdict::Name;
        }
        self.note(&watched, event, doing, size);
        verdict
    }

    /// Judges what a thread does, and notes what a later grant must know about
    /// the operations that were let in.
    fn judge(&self, watched: &Watched, waiting: &Waiting, doing: &Doing, size: u64) -> Verdict {
        if doing.operation.kind.is_harmless() {
            return Verdict::Allow;
        }
        let (file, late) = (waiting.file.as_fd(), waiting.since.elapsed());
        if doing.operation.kind == K::Truncate
            && watched.denies_write_to(|| family::process_of(waiting.event.tid), file)
        {
            return Verdict::Refuse;
        }
        let mut operation = doing.operation.clone();
        let moving = Moving::new(watched, &operation);
        operation.brings_shared &= match operation.kind {
            K::Exchange => watched.abilities.exchange,
            K::CollapseRange => moving.may_bring_shared(doing, waiting.next_pin),
            _ => true,
        };
        let operation = &operation;
        let pins = watched.pins.load();
        let verdict = self.ask_pins(watched, &pins, operation, size, file, late);
        if verdict != Verdict::Allow {
            return verdict;
        }
        // The operation may go on, so a grant that begins now must learn of it:
        // note the operation first, and only then look for pins once more.
        let pins = watched.note(Passing::of(operation, waiting.event.tid));
        let verdict = self.ask_pins(watched, &pins.load(), operation, size, file, late);
        if verdict == Verdict::Allow {
            moving.goes_on();
        }
        verdict
    }

    fn ask_pins(
        &self,
        watched: &Watched,
        pins: &PinSet<Pin>,
        operation: &Operation,
        size: u64,
        file: BorrowedFd<'_>,
        late: Duration,
    ) -> Verdict {
        let moved = watched.notes.moved();
        let mut held = false;
        // A descriptor open for writing can do things that this gate cannot see
        // (MOVE_EXT, SWAPEXT, mremap). So nobody gets a new one while anything
        // is pinned.
        let exclusive = matches!(operation.kind, K::OpenWrite | K::OpenTruncate);
        if !exclusive && watched.lets_pass(pins, operation, size, moved) {
            return Verdict::Allow;
        }
        let mut reach = if exclusive {
            0..u64::MAX
        } else {
            operation.reach(size)
        };
        if operation.brings_shared {
            reach.start = reach.start.saturating_sub(moved);
        }
        for pin in pins.meeting(reach).filter(|pin| !pin.is_dead()) {
            let opinion = match pin.opinion(operation, size, moved) {
                Opinion::Allow if exclusive && pin.is_handed_over() => Opinion::Refuse,
                Opinion::Allow if exclusive => Opinion::Wait,
                opinion => opinion,
            };
            match opinion {
                Opinion::Allow => {}
                Opinion::Wait => held = true,
                Opinion::Refuse if pin.is_alive(file) => return Verdict::Refuse,
                Opinion::Refuse => {
                    // The last mapping of the pin is gone; only the notice has
                    // not arrived yet.
                    self.gate.end(watched, pin);
                }
            }
        }
        match held {
            false => Verdict::Allow,
            true if exclusive => wait_to_open(watched, late),
            true => wait_for_grant(late),
        }
    }

    fn note(&self, watched: &Watched, event: &About, doing: &Doing, size: u64) {
        let operation = &doing.operation;
        watched.refused[operation.kind as usize].fetch_add(1, SeqCst);
        let by_range = !matches!(operation.kind, K::OpenWrite | K::OpenTruncate)
            && !operation.kind.may_do_anything();
        let who = match &doing.actor {
            Some(actor) => Who::Known(actor.clone()),
            // Whoever could not be seen then may have its number no more.
            None => Who::Thread {
                tid: event.tid,
                pid: 0,
                command: String::new(),
                sight: None,
            },
        };
        self.guard.audit.refused(Refused {
            time: audit::now(),
            who,
            kind: operation.kind,
            operation: doing.word.unwrap_or_else(|| operation.kind.name()),
            call: doing.call,
            met: watched.met_by(operation, size),
            id: watched.id,
            path: Arc::clone(&watched.path),
            range: by_range.then(|| operation.range.clone()),
        });
    }
}

/// A collapse moves everything behind it nearer to the pins before it,
/// including shared blocks. Blocks there cannot become shared after the look: a
/// clone either counts `moved` when it asks, or has left a note.
struct Moving<'a> {
    watched: &'a Watched,
    /// The bytes that a collapse removes; everything behind them moves by their
    /// length.
    gone: Option<Range<u64>>,
    goes_on: Cell<bool>,
}

impl<'a> Moving<'a> {
    fn new(watched: &'a Watched, operation: &Operation) -> Self {
        let gone = (operation.kind == K::CollapseRange).then(|| operation.range.clone());
        if let Some(gone) = &gone {
            watched.notes.begin_move(gone.end - gone.start);
        }
        Self {
            watched,
            gone,
            goes_on: Cell::new(false),
        }
    }

    /// Whether any block that may come to lie beside a pin is shared. `doing`
    /// says what was not shared when the thread was looked at. Later clones
    /// have left a note, unless a new pin has come since (with the number
    /// `next_pin` or higher): a new pin finds out for itself what is shared,
    /// and takes the note away.
    fn may_bring_shared(&self, doing: &Doing, next_pin: u64) -> bool {
        let Some(gone) = &self.gone else {
            return false;
        };
        let moved = self.watched.notes.moved();
        let pins = self.watched.pins.load();
        if pins.iter().any(|pin| pin.id >= next_pin) {
            return true;
        }
        let windows = pins
            .iter()
            .filter_map(|pin| pin.settled()?.layers.unshared_until());
        let Some(end) = windows.max().map(|end| end.saturating_add(moved)) else {
            return false;
        };
        self.watched.notes.may_be_shared()
            || end.saturating_sub(gone.start) > MOST_LOOKED_AT
            || !doing.is_unshared_before(gone, end)
    }

    /// Marks that the collapse is let in, so that its move counts from now on.
    fn goes_on(&self) {
        self.goes_on.set(true);
        if self.gone.is_some() {
            self.watched.keep_moved();
        }
    }
}

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        if let Some(gone) = self.gone.as_ref().filter(|_| !self.goes_on.get()) {
            self.watched.notes.cancel_move(gone.end - gone.start);
        }
    }
}

/// Judges an open for writing by a holder: one that was announced, or one by a
/// family. Existing pins do not refuse such an open, unless they deny it to all
/// but another family. But a grant under way must learn of it, or be over before
/// the open goes on.
fn judge_holder(watched: &Watched, waiting: &Waiting, doing: &Doing) -> Option<Verdict> {
    let (tid, late) = (waiting.event.tid, waiting.since.elapsed());
    if doing.operation.kind != K::OpenWrite {
        return None;
    }
    // What counts is when the thread came: the gate may have kept it waiting.
    let came = Instant::now().checked_sub(late)?;
    let announcement = watched.announced(tid, came, || doing.began);
    if announcement.is_none() && !watched.is_in_family(|| family::process_of(tid)) {
        return None;
    }
    let mut granting = false;
    let goes_on = watched.let_writer_through(|pins| {
        granting = pins.iter().any(|pin| pin.is_being_granted());
        !granting
            && !watched.denies_write_to(|| family::process_of(tid), waiting.file.as_fd())
            && announcement.is_none_or(|announcement| announcement.take())
    });
    if goes_on {
        return Some(Verdict::Allow);
    }
    granting.then(|| wait_to_open(watched, late))
}

/// Keeps an open for writing until a grant is over, unless the grant can finish
/// only without the open.
fn wait_to_open(watched: &Watched, late: Duration) -> Verdict {
    if watched.opens.may_wait() {
        wait_for_grant(late)
    } else {
        Verdict::Refuse
    }
}

fn wait_for_grant(late: Duration) -> Verdict {
    if late < WAIT_FOR_GRANT {
        Verdict::Hold
    } else {
        Verdict::Refuse
    }
}
