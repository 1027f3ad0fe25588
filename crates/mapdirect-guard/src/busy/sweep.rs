//! Looks at many threads, for a limited time.

use super::look::look;
use super::{Seen, Subject, Suspect};
use crate::bounded::{self, Looking, Retries, Stuck, within};
use crate::suspicion::LookFor;
use mapdirect_sys::proc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// A process to look at, or a suspect to look at once more.
#[derive(Clone, Copy, Debug)]
pub(super) enum Item {
    Process(i32),
    Suspect(Suspect),
}

impl Item {
    pub(super) fn id(&self) -> i32 {
        match self {
            Self::Process(pid) => *pid,
            Self::Suspect(suspect) => suspect.tid,
        }
    }

    fn look(&self, look_for: LookFor, subject: Subject) -> Vec<Suspect> {
        match self {
            Self::Process(pid) => proc::numbers_in(&format!("/proc/{pid}/task"))
                .unwrap_or_default()
                .into_iter()
                .filter_map(|tid| {
                    let seen = look(look_for, subject, tid, 0);
                    let suspect = Suspect {
                        tid,
                        seen,
                        looks: 0,
                    };
                    (!matches!(seen, Seen::Innocent)).then_some(suspect)
                })
                .collect(),
            Self::Suspect(suspect) => suspect.look_again(look_for, subject).into_iter().collect(),
        }
    }
}

/// The items left to look at, and the suspects found.
struct Work {
    left: Vec<Item>,
    found: Vec<Suspect>,
}

/// Looks at everything in `items`, and returns the suspects. A process in the
/// middle of `execve(2)`, at which a look hangs, is not a suspect. There is no
/// answer if a look hangs for another reason, or if the system is so busy that
/// there is no progress until `limit`.
pub(super) fn sweep(
    items: Vec<Item>,
    look_for: LookFor,
    subject: Subject,
    limit: Instant,
) -> Result<Vec<Suspect>, Stuck> {
    let work = Arc::new(Mutex::new(Work {
        left: items,
        found: Vec::new(),
    }));
    let retries = Retries::until(limit);
    loop {
        let shared = Arc::clone(&work);
        let looked = within(bounded::limit(limit), move |looking| {
            look_at_all(&shared, look_for, subject, looking);
        });
        let mut work = work.lock().unwrap_or_else(PoisonError::into_inner);
        match looked {
            Ok(()) => return Ok(std::mem::take(&mut work.found)),
            Err(stuck) if stuck.pid > 0 && stuck.is_in_execve() => {
                if work.left.last().is_some_and(|item| item.id() == stuck.pid) {
                    work.left.pop();
                }
            }
            Err(stuck) => {
                drop(work);
                retries.once_more(stuck)?;
            }
        }
    }
}

fn look_at_all(work: &Mutex<Work>, look_for: LookFor, subject: Subject, looking: &Looking) {
    let lock = || work.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let Some(item) = lock().left.last().copied() else {
            return;
        };
        // The process is in the middle of execve(2), and so of nothing else.
        let found = match looking.at(item.id()) {
            Ok(()) => item.look(look_for, subject),
            Err(_) => Vec::new(),
        };
        let mut work = lock();
        // This thread was given up before it took the lock: another one goes on
        // from here.
        if looking.is_given_up() {
            return;
        }
        work.left.pop();
        work.found.extend(found);
    }
}

/// Every process of the system but this one.
pub(super) fn everybody() -> Vec<Item> {
    let own = std::process::id().cast_signed();
    proc::numbers_in("/proc")
        .unwrap_or_default()
        .into_iter()
        .filter(|pid| *pid != own)
        .map(Item::Process)
        .collect()
}
