//! Dormant pins: pins that have ended and that mmap(2) may take up again.
//!
//! When the last pin of an inode ends, its entry stays in the kernel, dormant.
//! `prog/dormant.h` says what that means, and why it is sound. This module is
//! the guard's part. The guard keeps the pin for a while, and its tripwire
//! listens all that time. Before the guard removes anything of a dormant inode,
//! it notes that nothing can be taken up any more, and then checks whether
//! something has been ([`Gate::disturb`]).
//!
//! Nobody wakes the guard when a pin is taken up again, or when it ends after
//! that: a wake-up would take longer than both. Instead the guard checks by
//! itself ten times a second, if something has stirred, and before it answers a
//! question about pins.

use super::Gate;
use super::abi::{
    DEAD, Key, STIRRED, TEND_DISOWN, TEND_DISTURB, TEND_GRANTED, TEND_GRANTING, TEND_LOOK,
    TEND_QUIET, TEND_TELL, Tending, WAKING,
};
use super::events::{end_what_is_over, let_go};
use crate::table::{InodeId, Pin, Watched};
use crate::wake::Backoff;
use crate::{Errno, Guard};
use libbpf_rs::{MapCore, ProgramInput};
use mapdirect_sys::unix::Sender;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use zerocopy::{FromZeros, IntoBytes};

/// How long a dormant pin stays that nobody takes up.
const LINGER: Duration = Duration::from_secs(10);
/// The most dormant pins. Those that have been dormant longest go first.
const MOST: usize = 1024;
/// How long a process may take that is just taking up a pin: some instructions,
/// and the time in which the process does not run.
const WAKING_UP: Duration = Duration::from_secs(1);

/// The dormant pins.
#[derive(Debug, Default)]
pub(super) struct Dormant {
    /// At most one pin for each inode: the one that ended last. A thread that
    /// changes what is known of an inode must also hold the lock of its shard.
    sleepers: Mutex<HashMap<InodeId, Sleeper>>,
    /// The value of `STIRRED` when the dormant pins were last checked.
    seen: AtomicU64,
    /// Inodes of which the guard could not find out whether a pin was just
    /// being taken up. They count as if one was, until that is known.
    undecided: Mutex<HashSet<InodeId>>,
}

#[derive(Clone, Debug)]
struct Sleeper {
    watched: Arc<Watched>,
    pin: Arc<Pin>,
    /// The time since which the pin has been dormant, as far as is known.
    since: Instant,
    /// How often the pin had been taken up until then.
    revived: u64,
}

impl Dormant {
    fn lock(&self) -> MutexGuard<'_, HashMap<InodeId, Sleeper>> {
        self.sleepers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn undecided(&self) -> MutexGuard<'_, HashSet<InodeId>> {
        self.undecided
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, id: InodeId) -> Option<Sleeper> {
        self.lock().get(&id).cloned()
    }

    fn all(&self) -> Vec<Sleeper> {
        self.lock().values().cloned().collect()
    }

    /// The inodes whose time is over, and the oldest of too many.
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
pub(super) fn is_dead(tending: &Tending) -> bool {
    tending.lives & DEAD != 0
}

impl Gate {
    /// Asks the programs about an inode and one of its pins. With `pin` 0, asks
    /// about the pin that ended last.
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

    /// Lets nobody join the pins of an inode from now on, by the entry that is
    /// there.
    pub(super) fn tell_granting(&self, key: Key) -> Result<(), Errno> {
        self.tend(key, 0, TEND_GRANTING).map(drop)
    }

    /// Lets others join them again.
    pub(super) fn tell_granted(&self, key: Key) {
        // If this fails, nobody joins until the next entry is written.
        let _ = self.tend(key, 0, TEND_GRANTED);
    }

    /// Whether this pin has ended, and nobody is just about to take it up. If
    /// that is not known, the guard looks again soon.
    pub(super) fn is_at_rest(&self, key: Key, pin: u64) -> bool {
        match self.tend(key, pin, TEND_LOOK) {
            Ok(tending) if tending.lives & WAKING == 0 => tending.file == 0,
            _ => {
                self.look_again(key.inode());
                false
            }
        }
    }

    /// Makes sure that no dormant pin on an inode can be taken up from now on.
    /// Returns the state of the inode once nobody is just about to take one up.
    ///
    /// # Errors
    ///
    /// `EBUSY` when somebody still is: it may yet take the pin up.
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

    /// The same, and says whether the inode has no pin.
    pub(super) fn lay_to_rest(&self, key: Key) -> bool {
        self.disturb(key, 0).is_ok_and(|tending| is_dead(&tending))
    }

    /// Ends a pin whose description is still there: the programs take that for any
    /// other from now on.
    pub(super) fn disown(&self, id: InodeId, pin: u64) {
        let key = Key::new(id);
        // Nobody may take the pin up again.
        let _ = self.disturb(key, pin);
        let _ = self.tend(key, pin, TEND_DISOWN);
    }

    /// Handles the kernel's report that a pin has ended. Returns `true` if the
    /// pin is alive after all, or stays for a while as a dormant one. Then
    /// nothing more is to be done about its end.
    pub(super) fn is_kept_after_end(&self, watched: &Arc<Watched>, id: u64) -> bool {
        let published = self.lock_shard(watched.id);
        let pins = watched.pins.load_full();
        let Some(pin) = pins.iter().find(|pin| pin.id == id) else {
            // The pin is dormant, and may have been taken up before the guard
            // knew that it was.
            if self.wake(watched.id).is_err() {
                return self.look_again(watched.id);
            }
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
                .is_some_and(|published| published.can_sleep);
        if !may_sleep {
            // Only now is it certain that the pin has ended for good.
            return self
                .disturb(key, id)
                .map_or_else(|_| self.look_again(watched.id), |tending| tending.file != 0);
        }
        match self.send_to_sleep(key, id) {
            Ok(Some(asleep)) => {
                let sleeper = Sleeper {
                    watched: Arc::clone(watched),
                    pin: Arc::clone(pin),
                    since: Instant::now(),
                    revived: asleep.revived,
                };
                // A thread that looks for the pin finds it in one of the two
                // places.
                self.dormant.lock().insert(watched.id, sleeper);
                watched.remove(|other| other.id == id);
                true
            }
            Ok(None) => true,
            Err(_) => self.look_again(watched.id),
        }
    }

    /// Orders another look at an inode, because what is known now does not say
    /// whether a pin of it is over. So it counts as one that is not: returns
    /// `true`.
    pub(super) fn look_again(&self, id: InodeId) -> bool {
        self.dormant.undecided().insert(id);
        true
    }

    /// Looks again at the inodes that were left undecided.
    fn decide(&self, guard: &Guard) {
        let undecided = std::mem::take(&mut *self.dormant.undecided());
        for id in undecided {
            match guard.table.get(id) {
                Some(watched) => end_what_is_over(guard, self, &watched),
                None => self.decide_left(id),
            }
        }
    }

    /// Looks again at an inode that an earlier guard has left.
    fn decide_left(&self, id: InodeId) {
        let key = Key::new(id);
        // From here on the end of the pin is reported, should it live.
        let told = self.tend(key, 0, TEND_TELL);
        match told.and_then(|_| self.tend(key, 0, TEND_LOOK)) {
            Ok(tending) if tending.lives & WAKING == 0 => {
                if is_dead(&tending) {
                    self.clean(id, tending.pin);
                }
            }
            _ => drop(self.look_again(id)),
        }
    }

    /// Asks the programs not to report the end of a pin any more. Returns
    /// `None` if the pin is alive, and its end will be reported.
    fn send_to_sleep(&self, key: Key, id: u64) -> Result<Option<Tending>, Errno> {
        // Somebody may take the pin up and let go of it again meanwhile.
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

    /// Registers the dormant pin of an inode as alive if it was taken up and
    /// still lives; says whether it does. The caller must hold the lock of the
    /// shard.
    ///
    /// # Errors
    ///
    /// When the programs do not say: then nothing has changed.
    fn wake(&self, id: InodeId) -> Result<bool, Errno> {
        let Some(sleeper) = self.dormant.get(id) else {
            return Ok(false);
        };
        let (key, pin) = (Key::new(id), &sleeper.pin);
        let tending = self.tend(key, pin.id, TEND_LOOK)?;
        if tending.revived != sleeper.revived
            && let Some(sleeper) = self.dormant.lock().get_mut(&id)
        {
            sleeper.since = Instant::now();
            sleeper.revived = tending.revived;
        }
        if tending.file == 0 {
            return Ok(false);
        }
        let tending = self.tend(key, pin.id, TEND_TELL)?;
        if tending.file == 0 && self.send_to_sleep(key, pin.id)?.is_some() {
            return Ok(false);
        }
        let pin = if tending.pid == pin.pid {
            Arc::clone(pin)
        } else {
            // The pin belongs to another process now.
            let owner = Sender {
                pid: tending.pid,
                uid: tending.uid,
            };
            Arc::new(pin.passed_to(owner))
        };
        sleeper.watched.add(&pin);
        self.dormant.lock().remove(&id);
        Ok(true)
    }

    /// Whether this pin of an inode is dormant.
    fn sleeps(&self, id: InodeId, pin: u64) -> bool {
        self.dormant.get(id).is_some_and(|one| one.pin.id == pin)
    }

    /// The pin that is dormant, or is just being taken up, for a process that
    /// joins it.
    pub(super) fn sleeping(&self, id: InodeId) -> Option<Arc<Pin>> {
        let _published = self.lock_shard(id);
        let _ = self.wake(id);
        self.dormant.get(id).map(|sleeper| sleeper.pin)
    }

    /// Ends dormancy because the inode is about to change: its dormant pin is
    /// registered as alive, or forgotten. The caller must hold the lock of the
    /// shard.
    pub(super) fn end_sleep(&self, id: InodeId) -> Result<(), Errno> {
        let Some(sleeper) = self.dormant.get(id) else {
            return Ok(());
        };
        self.disturb(Key::new(id), sleeper.pin.id)?;
        if !self.wake(id)? {
            self.dormant.lock().remove(&id);
            self.drop_facts(sleeper.pin.id);
        }
        Ok(())
    }

    /// Deletes what is kept of a pin for a later guard.
    pub(super) fn drop_facts(&self, pin: u64) {
        let _ = self.loaded.maps.pins.delete(&pin.to_ne_bytes());
    }

    /// Forgets the dormant pin of an inode whose blocks may have changed.
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
                // It stays dormant if that is not known: the next look will
                // tell.
                let _ = self.wake(id);
            }
            is_over
        };
        if is_over {
            let_go(guard, &sleeper.watched);
        }
    }

    /// The same for all inodes.
    pub(crate) fn spoil_all(&self, guard: &Guard) {
        for sleeper in self.dormant.all() {
            self.forget_dormant(guard, sleeper.watched.id);
        }
    }

    /// Makes sure that nobody takes up a pin whose blocks have changed. Whoever
    /// is still in the middle of that counts as a holder ([`Gate::is_over`]).
    pub(super) fn disturb_inode(&self, id: InodeId) {
        let _ = self.disturb(Key::new(id), 0);
    }

    /// The dormant pin of an inode.
    pub(super) fn dormant_pin(&self, id: InodeId) -> Option<Arc<Pin>> {
        self.dormant.get(id).map(|sleeper| sleeper.pin)
    }

    /// Registers every pin that was taken up since the last check.
    pub(super) fn take_note(&self) {
        let stirred = self.loaded.maps.filter.words()[STIRRED].load(SeqCst);
        if self.dormant.seen.load(SeqCst) == stirred {
            return;
        }
        for sleeper in self.dormant.all() {
            let id = sleeper.watched.id;
            let _published = self.lock_shard(id);
            if self.wake(id).is_err() {
                // It is looked at again soon.
                return;
            }
        }
        self.dormant.seen.store(stirred, SeqCst);
    }

    /// The same, and forgets the pins whose time is over.
    pub(super) fn tend_dormant(&self, guard: &Guard) {
        self.take_note();
        self.decide(guard);
        for id in self.dormant.due() {
            self.forget_dormant(guard, id);
        }
        // Root may have removed the marks by which operations on these inodes
        // are refused.
        let words = self.loaded.maps.filter.words();
        for sleeper in self.dormant.all() {
            let key = Key::new(sleeper.watched.id);
            if words[key.word()].load(SeqCst) & 1 << (key.slot() % 64) == 0 {
                self.forget_dormant(guard, sleeper.watched.id);
            }
        }
    }

    /// Makes sure that no pin which an earlier guard left dormant can be taken
    /// up. Where somebody is still in the middle of that, the inode is left
    /// undecided.
    pub(super) fn disturb_all(&self) {
        use zerocopy::FromBytes;
        let keys: Vec<Vec<u8>> = self.loaded.maps.lives.keys().collect();
        for key in keys {
            if let Ok(key) = Key::read_from_bytes(&key)
                && self.disturb(key, 0).is_err()
            {
                self.look_again(key.inode());
            }
        }
    }

    /// The inodes that were left undecided.
    pub(super) fn undecided(&self) -> Vec<InodeId> {
        self.dormant.undecided().iter().copied().collect()
    }

    /// Makes the programs report the end of a pin that an earlier guard had
    /// dormant.
    pub(super) fn listen_for_end(&self, key: Key, pin: u64) {
        let _ = self.tend(key, pin, TEND_TELL);
    }
}

#[cfg(test)]
mod model;
