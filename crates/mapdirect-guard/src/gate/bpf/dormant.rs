//! Pins that are over, and that mmap(2) may take up again.
//!
//! When the last pin of an inode ends its entry stays in the kernel, dormant:
//! `prog/dormant.h` says what that means, and why it is sound. Here is what the
//! guard makes of it. It keeps the pin for a while, and its tripwire listens
//! all the while. What it takes away of a dormant inode it takes only after a
//! note that nothing can be taken up any more, and a look whether something
//! has been ([`Gate::disturb`]).
//!
//! Nobody wakes the guard when a pin is taken up again, or ends after that: it
//! would take longer than both. It looks by itself ten times a second, if
//! something has stirred, and before it answers a question about pins.

use super::Gate;
use super::abi::{
    DEAD, Key, STIRRED, TEND_DISTURB, TEND_LOOK, TEND_QUIET, TEND_TELL, Tending, WAKING,
};
use super::events::let_go;
use crate::table::{InodeId, Pin, Watched};
use crate::wake::Backoff;
use crate::{Errno, Guard};
use libbpf_rs::{MapCore, ProgramInput};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use zerocopy::{FromZeros, IntoBytes};

/// How long a pin stays that nobody takes up.
const LINGER: Duration = Duration::from_secs(10);
/// How many stay; those go first that have slept longest.
const MOST: usize = 1024;
/// How long somebody may take who is just taking up a pin: some instructions,
/// and the time in which nothing of that process runs.
const WAKING_UP: Duration = Duration::from_secs(1);

/// The pins that sleep.
#[derive(Debug, Default)]
pub(super) struct Dormant {
    /// At most one of each inode: the one that ended last. Whoever changes what
    /// there is of an inode holds the lock of its shard, too.
    sleepers: Mutex<HashMap<InodeId, Sleeper>>,
    /// How much had stirred when they were looked at last.
    seen: AtomicU64,
}

#[derive(Clone, Debug)]
struct Sleeper {
    watched: Arc<Watched>,
    pin: Arc<Pin>,
    /// It has slept since then, as far as is known.
    since: Instant,
    /// How often it had been taken up until then.
    revived: u64,
}

impl Dormant {
    fn lock(&self) -> MutexGuard<'_, HashMap<InodeId, Sleeper>> {
        self.sleepers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, id: InodeId) -> Option<Sleeper> {
        self.lock().get(&id).cloned()
    }

    fn all(&self) -> Vec<Sleeper> {
        self.lock().values().cloned().collect()
    }

    /// Those whose time is over, and the oldest of too many.
    fn due(&self) -> Vec<InodeId> {
        let sleepers = self.lock();
        let mut by_age: Vec<_> = sleepers
            .iter()
            .map(|(id, sleeper)| (sleeper.since, *id))
            .collect();
        by_age.sort_unstable_by_key(|(since, _)| *since);
        let too_many = by_age.len().saturating_sub(MOST);
        by_age
            .into_iter()
            .enumerate()
            .filter(|(at, (since, _))| *at < too_many || since.elapsed() >= LINGER)
            .map(|(_, (_, id))| id)
            .collect()
    }
}

/// Whether an inode had no pin in the kernel when it was looked at.
fn is_dead(tending: &Tending) -> bool {
    tending.lives & DEAD != 0
}

impl Gate {
    /// Asks about an inode, and about a pin of it; or about the one that ended
    /// last, if that is 0.
    fn tend(&self, key: Key, pin: u64, what: u32) -> Result<Tending, Errno> {
        let mut tending = Tending::new_zeroed();
        (tending.key, tending.pin, tending.what) = (key, pin, what);
        let object = self.loaded.costly.object();
        let program = object
            .progs_mut()
            .find(|program| program.name() == "tend")
            .ok_or(Errno::NOEXEC)?;
        let input = ProgramInput {
            context_in: Some(tending.as_mut_bytes()),
            ..ProgramInput::default()
        };
        program
            .test_run(input)
            .map_err(|error| super::errno(&error))?;
        Ok(tending)
    }

    /// From now on nothing of an inode can be taken up again that is over. Says
    /// how it is, once nobody is just about to.
    pub(super) fn disturb(&self, key: Key, pin: u64) -> Result<Tending, Errno> {
        let mut backoff = Backoff::until(
            Instant::now() + WAKING_UP,
            Duration::from_micros(20),
            Duration::from_millis(1),
        );
        let mut tending = self.tend(key, pin, TEND_DISTURB)?;
        while tending.lives & WAKING != 0 {
            if backoff.is_over() {
                return Err(Errno::BUSY);
            }
            backoff.pause();
            tending = self.tend(key, pin, TEND_LOOK)?;
        }
        Ok(tending)
    }

    /// The same; says whether the inode has no pin.
    pub(super) fn lay_to_rest(&self, key: Key) -> bool {
        self.disturb(key, 0).is_ok_and(|tending| is_dead(&tending))
    }

    /// The kernel has told that a pin is over. Says whether it is not, or stays
    /// for a while: then nothing more is to be done about it.
    pub(super) fn is_kept_after_end(&self, watched: &Arc<Watched>, id: u64) -> bool {
        let published = self.lock_shard(watched.id);
        let pins = watched.pins.load_full();
        let Some(pin) = pins.iter().find(|pin| pin.id == id) else {
            // It sleeps, and was taken up before it was known to.
            self.wake(watched.id);
            let pins = watched.pins.load();
            return pins.iter().any(|pin| pin.id == id) || self.sleeps(watched.id, id);
        };
        let key = Key::new(watched.id);
        let is_last = !pins.iter().any(|other| other.id != id && !other.is_dead());
        let (breaches, lost) = pin.fate.summary();
        let may_sleep = is_last
            && self.revives
            && breaches == 0
            && lost.is_none()
            && published
                .get(&watched.id)
                .is_some_and(|published| published.stable);
        if !may_sleep {
            // Only now is it sure that it is over for good.
            let tending = self.disturb(key, id);
            return tending.is_ok_and(|tending| tending.file != 0);
        }
        match self.send_to_sleep(key, id) {
            Ok(Some(asleep)) => {
                let sleeper = Sleeper {
                    watched: Arc::clone(watched),
                    pin: Arc::clone(pin),
                    since: Instant::now(),
                    revived: asleep.revived,
                };
                // Whoever looks for it finds it here or there.
                self.dormant.lock().insert(watched.id, sleeper);
                watched.remove(|other| other.id == id);
                true
            }
            Ok(None) => true,
            Err(_) => false,
        }
    }

    /// Asks not to be told of the end of a pin any more; nothing if it lives,
    /// and is told.
    fn send_to_sleep(&self, key: Key, id: u64) -> Result<Option<Tending>, Errno> {
        // Somebody may take it up and let go of it all the while.
        loop {
            let tending = self.tend(key, id, TEND_QUIET)?;
            if tending.file == 0 {
                return Ok(Some(tending));
            }
            if self.tend(key, id, TEND_TELL)?.file != 0 {
                return Ok(None);
            }
        }
    }

    /// Takes note of it if the pin of an inode that sleeps was taken up, and
    /// still lives. Whoever calls this holds the lock of the shard.
    fn wake(&self, id: InodeId) -> bool {
        let Some(sleeper) = self.dormant.get(id) else {
            return false;
        };
        let (key, pin) = (Key::new(id), &sleeper.pin);
        let Ok(tending) = self.tend(key, pin.id, TEND_LOOK) else {
            return false;
        };
        if tending.revived != sleeper.revived
            && let Some(sleeper) = self.dormant.lock().get_mut(&id)
        {
            sleeper.since = Instant::now();
            sleeper.revived = tending.revived;
        }
        if tending.file == 0 {
            return false;
        }
        let Ok(tending) = self.tend(key, pin.id, TEND_TELL) else {
            return false;
        };
        if tending.file == 0 && !matches!(self.send_to_sleep(key, pin.id), Ok(None)) {
            return false;
        }
        let pin = if tending.pid == pin.pid {
            Arc::clone(pin)
        } else {
            // It is somebody else's now.
            Arc::new(pin.joined(pin.id, tending.pid))
        };
        sleeper.watched.add(&pin);
        self.dormant.lock().remove(&id);
        true
    }

    /// Whether a pin of an inode sleeps.
    fn sleeps(&self, id: InodeId, pin: u64) -> bool {
        self.dormant.get(id).is_some_and(|one| one.pin.id == pin)
    }

    /// The pin that sleeps, or is just being taken up, for whoever joins it.
    pub(super) fn sleeping(&self, id: InodeId) -> Option<Arc<Pin>> {
        let _published = self.lock_shard(id);
        self.wake(id);
        self.dormant.get(id).map(|sleeper| sleeper.pin)
    }

    /// Something else becomes of an inode: its pin that sleeps lives, or is
    /// forgotten. Whoever calls this holds the lock of the shard.
    pub(super) fn end_sleep(&self, id: InodeId) -> Result<(), Errno> {
        let Some(sleeper) = self.dormant.get(id) else {
            return Ok(());
        };
        self.disturb(Key::new(id), sleeper.pin.id)?;
        if !self.wake(id) {
            self.dormant.lock().remove(&id);
            self.drop_facts(sleeper.pin.id);
        }
        Ok(())
    }

    /// What is kept of a pin for a guard that comes later goes.
    pub(super) fn drop_facts(&self, pin: u64) {
        let _ = self.loaded.maps.pins.delete(&pin.to_ne_bytes());
    }

    /// What blocks of an inode may have changed: a pin that sleeps is
    /// forgotten.
    pub(super) fn forget_dormant(&self, guard: &Guard, id: InodeId) {
        let Some(sleeper) = self.dormant.get(id) else {
            return;
        };
        let is_over = {
            let mut published = self.lock_shard(id);
            let key = Key::new(id);
            let is_over = self.lay_to_rest(key);
            if is_over {
                self.dormant.lock().remove(&id);
                self.drop_facts(sleeper.pin.id);
                if let Some(before) = published.get(&id)
                    && self.forget(key, before)
                {
                    published.remove(&id);
                }
            } else {
                self.wake(id);
            }
            is_over
        };
        if is_over {
            let_go(guard, &sleeper.watched);
        }
    }

    /// The same of all of them.
    pub(crate) fn spoil_all(&self, guard: &Guard) {
        for sleeper in self.dormant.all() {
            self.forget_dormant(guard, sleeper.watched.id);
        }
    }

    /// Blocks of a pin have changed: nobody takes it up again.
    pub(super) fn disturb_inode(&self, id: InodeId) {
        let _ = self.disturb(Key::new(id), 0);
    }

    /// The pin that sleeps.
    pub(super) fn dormant_pin(&self, id: InodeId) -> Option<Arc<Pin>> {
        self.dormant.get(id).map(|sleeper| sleeper.pin)
    }

    /// Takes note of every pin that was taken up since.
    pub(super) fn take_note(&self) {
        let stirred = self.loaded.maps.filter.words()[STIRRED].load(SeqCst);
        if self.dormant.seen.load(SeqCst) == stirred {
            return;
        }
        for sleeper in self.dormant.all() {
            let id = sleeper.watched.id;
            let _published = self.lock_shard(id);
            self.wake(id);
        }
        self.dormant.seen.store(stirred, SeqCst);
    }

    /// The same, and forgets those whose time is over.
    pub(super) fn tend_dormant(&self, guard: &Guard) {
        self.take_note();
        for id in self.dormant.due() {
            self.forget_dormant(guard, id);
        }
        // Root may have taken away what they are refused by.
        let words = self.loaded.maps.filter.words();
        for sleeper in self.dormant.all() {
            let key = Key::new(sleeper.watched.id);
            if words[key.word()].load(SeqCst) & 1 << (key.slot() % 64) == 0 {
                self.forget_dormant(guard, sleeper.watched.id);
            }
        }
    }

    /// Nothing that an earlier guard has left sleeping can be taken up.
    pub(super) fn disturb_all(&self) {
        use zerocopy::FromBytes;
        let keys: Vec<Vec<u8>> = self.loaded.maps.lives.keys().collect();
        for key in keys {
            if let Ok(key) = Key::read_from_bytes(&key) {
                let _ = self.disturb(key, 0);
            }
        }
    }

    /// From now on the end of a pin is told that an earlier guard had sleeping.
    pub(super) fn listen_for_end(&self, key: Key, pin: u64) {
        let _ = self.tend(key, pin, TEND_TELL);
    }
}

#[cfg(test)]
mod model;
