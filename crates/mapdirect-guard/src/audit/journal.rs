//! Keeps the latest records, for whoever asks for them later and for whoever
//! follows them.
//!
//! There is one list for all. Who follows has a place in it, and nobody waits
//! for who is slow: the list goes on, and the slow one is told how many records
//! it has missed.
//!
//! When the list is full, a record makes room of the user who has most of them,
//! the oldest: whoever is refused again and again pushes out only what says so of
//! them, and not what others were refused.

use crate::wake::Waker;
use mapdirect_proto::Record;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The number of records kept.
const KEPT: usize = 4096;

/// A record, and whom it may be shown to beside root.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) record: Record,
    /// The users who have pins of the file.
    pub(crate) owners: Vec<u32>,
}

/// The list.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// In the order of their numbers, which may have gaps.
    kept: VecDeque<Arc<Kept>>,
    /// How many of them each user has; `None` are those of nobody known.
    of_users: HashMap<Option<u32>, usize>,
    next: u64,
    followers: Vec<Waker>,
}

impl Inner {
    fn make_room(&mut self) {
        let most = self.of_users.iter_mut().max_by_key(|(_, count)| **count);
        let Some((user, count)) = most else {
            return;
        };
        let of_user = |kept: &Arc<Kept>| kept.record.actor.uid == *user;
        if let Some(oldest) = self.kept.iter().position(of_user) {
            self.kept.remove(oldest);
        }
        *count -= 1;
        let user = *user;
        self.of_users
            .retain(|other, count| *other != user || *count > 0);
    }
}

/// What comes next for a follower.
#[derive(Debug)]
pub(crate) struct Next {
    /// How many records before this one are not kept.
    pub(crate) missed: u64,
    pub(crate) kept: Arc<Kept>,
}

impl Journal {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a record, and wakes whoever follows. `lost` records before it could
    /// not be kept.
    pub(crate) fn add(&self, mut record: Record, owners: Vec<u32>, lost: u64) -> Arc<Kept> {
        let mut inner = self.lock();
        inner.next += lost;
        record.number = inner.next;
        inner.next += 1;
        if inner.kept.len() == KEPT {
            inner.make_room();
        }
        *inner.of_users.entry(record.actor.uid).or_default() += 1;
        let kept = Arc::new(Kept { record, owners });
        inner.kept.push_back(Arc::clone(&kept));
        inner.followers.iter().for_each(Waker::wake);
        kept
    }

    /// The latest records that `wanted` likes, no more than `most`, oldest
    /// first, and the number behind them.
    pub(crate) fn latest(
        &self,
        most: usize,
        wanted: impl Fn(&Kept) -> bool,
    ) -> (Vec<Arc<Kept>>, u64) {
        let inner = self.lock();
        let mut latest: Vec<_> = inner
            .kept
            .iter()
            .rev()
            .filter(|kept| wanted(kept))
            .take(most)
            .cloned()
            .collect();
        latest.reverse();
        (latest, inner.next)
    }

    /// The first record from number `from` on.
    pub(crate) fn at(&self, from: u64) -> Option<Next> {
        let inner = self.lock();
        let at = inner.kept.partition_point(|kept| kept.record.number < from);
        let kept = inner.kept.get(at)?;
        Some(Next {
            missed: kept.record.number - from,
            kept: Arc::clone(kept),
        })
    }

    /// Wakes a follower at every record from now on.
    pub(crate) fn follow(&self, waker: &Waker) {
        self.lock().followers.push(waker.clone());
    }

    /// Forgets a follower.
    pub(crate) fn leave(&self, waker: &Waker) {
        self.lock().followers.retain(|other| !other.is(waker));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mapdirect_proto::{DeviceId, Gate, record::Event};

    fn add(journal: &Journal, owner: u32, lost: u64) {
        let device = DeviceId { major: 7, minor: 0 };
        let record = Record::new(Event::Refusal, 1, Gate::Fanotify, (device, 5));
        journal.add(record, vec![owner], lost);
    }

    #[test]
    fn the_latest_are_kept_and_who_is_slow_learns_what_was_missed() {
        let journal = Journal::default();
        assert!(journal.at(0).is_none());
        for owner in 0..5000 {
            add(&journal, owner % 2, 0);
        }
        let first = journal.at(0).unwrap();
        assert_eq!((first.missed, first.kept.record.number), (904, 904));
        let next = journal.at(905).unwrap();
        assert_eq!((next.missed, next.kept.record.number), (0, 905));
        assert!(journal.at(5000).is_none());
        let (latest, next) = journal.latest(3, |kept| kept.owners == [1]);
        let numbers: Vec<_> = latest.iter().map(|kept| kept.record.number).collect();
        assert_eq!((&numbers[..], next), (&[4995, 4997, 4999][..], 5000));
        // What could not be kept has had numbers.
        add(&journal, 0, 7);
        let next = journal.at(5000).unwrap();
        assert_eq!((next.missed, next.kept.record.number), (7, 5007));
    }

    #[test]
    fn whoever_is_refused_most_makes_room() {
        let journal = Journal::default();
        let device = DeviceId { major: 7, minor: 0 };
        let add = |user: u32| {
            let mut record = Record::new(Event::Refusal, 1, Gate::Fanotify, (device, 5));
            record.actor.uid = Some(user);
            journal.add(record, Vec::new(), 0);
        };
        add(0);
        (0..3 * KEPT).for_each(|_| add(65_534));
        add(7);
        let (kept, next) = journal.latest(usize::MAX, |_| true);
        let of = |user| {
            kept.iter()
                .filter(move |kept| kept.record.actor.uid == Some(user))
        };
        assert_eq!((of(0).count(), of(7).count()), (1, 1));
        assert_eq!((kept.len(), next), (KEPT, 3 * KEPT as u64 + 2));
        assert!(kept.is_sorted_by_key(|kept| kept.record.number));
        // Who reads on is told how many are gone.
        assert_eq!(
            journal.at(1).map(|next| next.missed),
            Some(2 * KEPT as u64 + 2)
        );
    }

    #[test]
    fn who_follows_is_woken_until_it_leaves() {
        let journal = Journal::default();
        let waker = Waker::new().unwrap();
        journal.follow(&waker);
        let is_woken = || {
            use crate::wake::wait_any;
            use std::os::fd::AsFd;
            let now = Some(std::time::Duration::ZERO);
            let [woken] = wait_any(&[waker.as_fd()], now).unwrap();
            waker.clear();
            woken
        };
        assert!(!is_woken());
        add(&journal, 0, 0);
        assert!(is_woken());
        journal.leave(&waker);
        add(&journal, 0, 0);
        assert!(!is_woken());
    }
}
