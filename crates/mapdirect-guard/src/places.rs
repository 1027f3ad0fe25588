//! Places for clients: who may connect when there is a crowd.
//!
//! Anybody may connect, and every client costs a thread, descriptors and
//! memory. So there are four kinds of clients, and each leaves room for the
//! kinds above it. Root may take every place. A process of another user that
//! has `CAP_LINUX_IMMUTABLE` leaves a quarter of all places to root. A process
//! without the capability gets a place only in the quarter that is for
//! strangers, or in a quarter of their own if the policy names its user or one of
//! its groups. Each user gets only a small part of these quarters. So no number of
//! users can take more than that together.

use mapdirect_proto::{Reason, Refusal};
use mapdirect_sys::unix::Sender;
use mapdirect_sys::{Errno, capget, proc};
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The kind of a client when it connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// User 0 of the guard's user namespace.
    Root,
    /// A process of another user that has the capability to pin.
    Capable,
    /// A process without the capability whose user or groups the policy names.
    Named,
    /// Any other process.
    Stranger,
}

impl Standing {
    /// The kind of the process that connected. The process may run another
    /// program since, so this decides only who waits for whom, never who may
    /// pin.
    pub(crate) fn of(peer: Sender, is_named: impl FnOnce() -> bool) -> Self {
        if peer.uid == 0 {
            return Self::Root;
        }
        let capable = capget::effective(peer.pid)
            .is_ok_and(|effective| capget::contains(effective, capget::CAP_LINUX_IMMUTABLE));
        // In a user namespace of its own, every process has all capabilities.
        if capable && proc::in_initial_user_namespace(peer.pid) == Ok(true) {
            Self::Capable
        } else if is_named() {
            Self::Named
        } else {
            Self::Stranger
        }
    }
}

/// How many clients are served at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// All clients.
    all: usize,
    /// Clients of users other than root.
    others: usize,
    /// Capable clients of one user other than root.
    of_capable_user: usize,
    /// Clients whom the policy names.
    named: usize,
    /// Clients of one user whom the policy names.
    of_named: usize,
    /// Clients without the capability.
    strangers: usize,
    /// Clients of one user without the capability.
    of_stranger: usize,
}

impl Limits {
    /// More places are no use to anybody: a guard with this many clients serves
    /// programs that do not share their connections.
    const MOST: usize = 4096;

    /// The limits that fit the resources of this process.
    pub(crate) fn of_process(descriptors: Option<u64>) -> Self {
        Self::new(descriptors, thread_limit())
    }

    /// The limits for this many descriptors and threads. A client keeps its
    /// socket, and can occupy the guard with a few descriptors that it has
    /// sent. There are a quarter as many clients as descriptors, and a quarter
    /// of the clients are strangers. So at least half of the descriptors are
    /// left to the gate and to grants. A client has a thread, too: half of the
    /// threads are left.
    fn new(descriptors: Option<u64>, threads: Option<u64>) -> Self {
        let count = |limit: Option<u64>| {
            limit.map_or(usize::MAX, |limit| {
                usize::try_from(limit).unwrap_or(usize::MAX)
            })
        };
        let all = (count(descriptors) / 4)
            .min(count(threads) / 2)
            .min(Self::MOST);
        let strangers = all / 4;
        Self {
            all,
            others: all - all / 4,
            of_capable_user: all / 4,
            named: all / 4,
            of_named: (all / 16).max(1),
            strangers,
            of_stranger: (strangers / 8).max(1),
        }
    }
}

/// The number of threads that this process may have: the smallest limit of its
/// control group and of the groups above it, or `None` if there is no limit to
/// be found.
fn thread_limit() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    groups
        .lines()
        .filter_map(|line| {
            // "0::/path", or "7:pids:/path" in the first version.
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            let root = match controllers {
                "" => Path::new("/sys/fs/cgroup"),
                "pids" => Path::new("/sys/fs/cgroup/pids"),
                _ => return None,
            };
            let group = root.join(path.trim_start_matches('/'));
            group
                .ancestors()
                .take_while(|group| group.starts_with(root))
                .filter_map(|group| {
                    let limit = std::fs::read_to_string(group.join("pids.max")).ok()?;
                    limit.trim().parse().ok()
                })
                .min()
        })
        .min()
}

/// The places of a guard, and who has them.
#[derive(Debug)]
pub(crate) struct Places {
    limits: Limits,
    taken: Mutex<Taken>,
    /// The number of strangers, to be read without the lock.
    strangers: AtomicUsize,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    others: usize,
    named: usize,
    strangers: usize,
    /// The number of clients of each user other than root.
    users: HashMap<u32, usize>,
}

impl Places {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            taken: Mutex::default(),
            strangers: AtomicUsize::new(0),
        })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place for a client of this kind.
    ///
    /// # Errors
    ///
    /// What the client is told when there is no place.
    pub(crate) fn take(self: &Arc<Self>, uid: u32, standing: Standing) -> Result<Place, Refusal> {
        let limits = self.limits;
        let mut taken = self.taken();
        let of_user = taken.users.get(&uid).copied().unwrap_or(0);
        let own_limit = match standing {
            Standing::Root => usize::MAX,
            Standing::Capable => limits.of_capable_user,
            Standing::Named => limits.of_named,
            Standing::Stranger => limits.of_stranger,
        };
        if of_user >= own_limit {
            return Err(too_many_of(uid, of_user));
        }
        let room = match standing {
            Standing::Root => true,
            Standing::Capable => taken.others < limits.others,
            Standing::Named => taken.others < limits.others && taken.named < limits.named,
            Standing::Stranger => {
                taken.others < limits.others && taken.strangers < limits.strangers
            }
        };
        if !room || taken.all >= limits.all {
            return Err(too_many());
        }
        taken.all += 1;
        if standing != Standing::Root {
            taken.others += 1;
            *taken.users.entry(uid).or_default() += 1;
        }
        if standing == Standing::Named {
            taken.named += 1;
        }
        if standing == Standing::Stranger {
            taken.strangers += 1;
            self.strangers.store(taken.strangers, Relaxed);
        }
        Ok(Place {
            places: Arc::clone(self),
            uid,
            standing,
        })
    }

    /// The number of clients.
    pub(crate) fn count(&self) -> usize {
        self.taken().all
    }
}

/// A client's place among those that are served. Dropping this value gives the
/// place back.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    uid: u32,
    standing: Standing,
}

impl Place {
    /// The kind of the client when it connected.
    pub(crate) fn standing(&self) -> Standing {
        self.standing
    }

    /// Whether others wait for the places of strangers. A stranger that asks
    /// for nothing should then leave.
    pub(crate) fn is_wanted(&self) -> bool {
        self.standing == Standing::Stranger
            && self.places.strangers.load(Relaxed) > self.places.limits.strangers / 2
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        taken.all -= 1;
        if self.standing != Standing::Root {
            taken.others -= 1;
            if let Some(count) = taken.users.get_mut(&self.uid) {
                *count -= 1;
                if *count == 0 {
                    taken.users.remove(&self.uid);
                }
            }
        }
        if self.standing == Standing::Named {
            taken.named -= 1;
        }
        if self.standing == Standing::Stranger {
            taken.strangers -= 1;
            self.places.strangers.store(taken.strangers, Relaxed);
        }
    }
}

fn limit(obstacle: String, mend: &str) -> Refusal {
    Refusal {
        errno: Errno::AGAIN.raw_os_error(),
        reason: Reason::Limit,
        obstacle,
        mend: String::from(mend),
        openers: Vec::new(),
    }
}

fn too_many() -> Refusal {
    limit(
        String::from("the guard serves as many clients as it can"),
        "close connections that are not needed, or try again later",
    )
}

fn too_many_of(uid: u32, count: usize) -> Refusal {
    limit(
        format!("user {uid} has {count} connections to the guard, as many as one user may have"),
        "close connections of that user that are not needed, or ask as root",
    )
}

/// The refusal for a client when there is a place for it but no thread.
pub(crate) fn no_thread() -> Refusal {
    limit(
        String::from("the guard could not start a thread for one more client"),
        "raise the limit of threads (TasksMax of its unit), or try again later",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(all: u64) -> Arc<Places> {
        Places::new(Limits::new(Some(4 * all), None))
    }

    #[test]
    fn clients_leave_descriptors_and_threads_to_the_gate() {
        let all = |descriptors, threads| Limits::new(descriptors, threads).all;
        assert_eq!(all(Some(1024), None), 256);
        assert_eq!(all(Some(1024), Some(100)), 50);
        assert_eq!(all(Some(0), None), 0);
        for plenty in [None, Some(1 << 30), Some(u64::MAX)] {
            assert_eq!(all(plenty, plenty), Limits::MOST);
        }
    }

    #[test]
    fn strangers_of_all_users_together_leave_root_its_places() {
        let places = places(256);
        let mut held = Vec::new();
        for uid in 1..=1000 {
            while let Ok(place) = places.take(uid, Standing::Stranger) {
                held.push(place);
            }
        }
        assert_eq!(held.len(), 64);
        for uid in 1..=1000 {
            while let Ok(place) = places.take(uid, Standing::Named) {
                held.push(place);
            }
        }
        assert_eq!(held.len(), 128);
        for uid in 1..=1000 {
            while let Ok(place) = places.take(uid, Standing::Capable) {
                held.push(place);
            }
        }
        assert_eq!(held.len(), 192);
        let root: Vec<_> = (0..64)
            .map(|_| places.take(0, Standing::Root).unwrap())
            .collect();
        let refused = places.take(0, Standing::Root).unwrap_err();
        assert_eq!(refused.reason, Reason::Limit);
        assert_eq!(places.count(), 256);
        drop((held, root));
        assert_eq!(places.count(), 0);
        assert!(places.taken().users.is_empty());
    }

    #[test]
    fn one_user_has_a_small_part_and_is_told_so() {
        let places = places(256);
        let held: Vec<_> = (0..8)
            .map(|_| places.take(7, Standing::Stranger).unwrap())
            .collect();
        let refused = places.take(7, Standing::Stranger).unwrap_err();
        assert!(refused.obstacle.contains("user 7"), "{refused:?}");
        assert!(!held[0].is_wanted());
        let others: Vec<_> = (10..60)
            .filter_map(|uid| places.take(uid, Standing::Stranger).ok())
            .collect();
        assert_eq!(others.len(), 50);
        assert!(held[0].is_wanted(), "others want to be served");
        drop(held);
        assert!(places.take(7, Standing::Stranger).is_ok());
    }

    #[test]
    fn this_process_has_a_standing() {
        let pid = std::process::id().cast_signed();
        let by_policy = |named: bool| move || named;
        let root = Sender { pid, uid: 0 };
        assert_eq!(Standing::of(root, by_policy(true)), Standing::Root);
        let nobody = Sender {
            pid: i32::MAX,
            uid: 65534,
        };
        assert_eq!(Standing::of(nobody, by_policy(false)), Standing::Stranger);
        assert_eq!(Standing::of(nobody, by_policy(true)), Standing::Named);
    }
}
