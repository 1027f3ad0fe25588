//! Ends pins before their holders let go of them: when the policy gives no more
//! time, or when root says so.

use crate::Errno;
use crate::Guard;
use crate::grant::refusal;
use crate::table::{InodeId, Pin, Watched};
use mapdirect_proto::{Reason, Refusal};
use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// When a pin must end: its number, and device and number of its inode.
type Deadline = (Instant, u64, (u64, u64));

/// When pins must end.
#[derive(Debug, Default)]
pub(crate) struct Deadlines {
    all: Mutex<BTreeSet<Deadline>>,
    changed: Condvar,
}

/// How often to look whether the guard stops.
const PAUSE: Duration = Duration::from_secs(1);

impl Deadlines {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<Deadline>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a pin end when its time is over, if it has a limit.
    pub(crate) fn add(&self, inode: InodeId, pin: &Pin) {
        let deadline = pin.delegated().and_then(super::Delegated::deadline);
        if let Some(deadline) = deadline {
            let named = (deadline, pin.id, (inode.dev, inode.inode));
            self.lock().insert(named);
            self.changed.notify_all();
        }
    }

    /// Waits for the next pin whose time is over.
    fn next(&self) -> Option<(InodeId, u64)> {
        let mut all = self.lock();
        let now = Instant::now();
        let first = all.first().map_or(PAUSE, |(deadline, _, _)| {
            deadline.saturating_duration_since(now).min(PAUSE)
        });
        if first > Duration::ZERO {
            all = self
                .changed
                .wait_timeout(all, first)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let now = Instant::now();
        let is_due = all.first().is_some_and(|(deadline, _, _)| *deadline <= now);
        let (_, pin, (dev, inode)) = is_due.then(|| all.pop_first()).flatten()?;
        Some((InodeId { dev, inode }, pin))
    }
}

/// Ends pins whose time is over, until the guard stops.
pub(crate) fn run(guard: &Guard) {
    while !guard.is_stopping() {
        let Some((inode, id)) = guard.delegation.deadlines.next() else {
            continue;
        };
        let Some(watched) = guard.table.get(inode) else {
            continue;
        };
        let pins = watched.pins.load_full();
        if let Some(pin) = pins.iter().find(|pin| pin.id == id && !pin.is_dead()) {
            let rule = pin.delegated().and_then(super::Delegated::rule);
            let by = rule.map_or_else(String::new, |rule| format!(" (rule {rule:?})"));
            let why = format!("the time that the policy allows for it is over{by}");
            take_away(guard, &watched, pin, &why);
        }
    }
}

/// Ends the pin with this number, whoever holds it.
pub(crate) fn unpin(guard: &Guard, id: u64) -> Result<(), Refusal> {
    if let Some(dormancy) = guard.gate.dormancy() {
        dormancy.catch_up();
    }
    for watched in guard.table.all() {
        let pins = watched.pins.load_full();
        let Some(pin) = pins.iter().find(|pin| pin.id == id && !pin.is_dead()) else {
            continue;
        };
        if pin.is_being_granted() {
            return Err(refusal(
                Reason::StillChanging,
                Errno::AGAIN,
                format!("pin {id} is just being granted"),
                "try again",
            ));
        }
        take_away(guard, &watched, pin, "root has ended it (mapdirect unpin)");
        return Ok(());
    }
    Err(refusal(
        Reason::Arguments,
        Errno::NOENT,
        format!("there is no pin {id}"),
        "see which there are: mapdirect status",
    ))
}

/// Tells the holder, and refuses nothing for the pin any more.
fn take_away(guard: &Guard, watched: &Arc<Watched>, pin: &Arc<Pin>, why: &str) {
    guard.notices.lost(pin, why);
    guard.gate.take_away(guard, watched, pin);
    guard.waiting.decided();
}
