//! Sweeps of all threads of the system, shared by all grants that wait for one.

use super::sweep::{everybody, sweep};
use super::{Subject, Suspect};
use crate::bounded::{self, Stuck};
use crate::suspicion::{LookFor, Prefix};
use crate::table::InodeId;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

/// Shares sweeps of all threads of the system: all grants that close their gate
/// before a sweep begins use what it finds.
#[derive(Debug)]
pub(crate) struct Scans {
    truncations: Scan,
}

/// The threads that may have been in the middle of a truncation by path when
/// the census began. The search for truncations does not depend on the file, so
/// a census answers for every file whose gate was closed before.
#[derive(Clone, Debug)]
pub(crate) struct Census {
    pub(super) found: Vec<Suspect>,
}

impl Scans {
    /// Looks for truncations by path that began before this call, or shares a
    /// sweep that another grant begins after this call.
    pub(crate) fn truncations(&self, deadline: Instant) -> Result<Census, Stuck> {
        // The subject is not used in a search for truncations.
        let subject = Subject {
            id: InodeId { dev: 0, inode: 0 },
            prefix: Prefix(""),
        };
        let found = self.truncations.sweep(subject, deadline)?;
        Ok(Census { found })
    }
}

impl Default for Scans {
    fn default() -> Self {
        Self {
            truncations: Scan::new(LookFor::Truncations),
        }
    }
}

/// The sweeps for one kind of operation.
#[derive(Debug)]
struct Scan {
    look_for: LookFor,
    state: Mutex<ScanState>,
    changed: Condvar,
}

#[derive(Debug)]
struct ScanState {
    /// The number of sweeps that have begun, and that have finished.
    begun: u64,
    finished: u64,
    running: bool,
    /// What the last finished sweep found, or why it had no result.
    outcome: Result<Vec<Suspect>, Stuck>,
}

impl Default for ScanState {
    fn default() -> Self {
        Self {
            begun: 0,
            finished: 0,
            running: false,
            outcome: Ok(Vec::new()),
        }
    }
}

impl Scan {
    fn new(look_for: LookFor) -> Self {
        Self {
            look_for,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Finds every thread that may have been doing this before this call. A
    /// sweep whose starter gave it up is no answer for others: they start a new
    /// one.
    fn sweep(&self, subject: Subject, deadline: Instant) -> Result<Vec<Suspect>, Stuck> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // A sweep that is running now may have passed a thread before that
        // thread entered the kernel, so only the next sweep counts.
        let wanted = state.begun + 1;
        loop {
            if state.finished >= wanted
                && let Ok(found) = &state.outcome
            {
                return Ok(found.clone());
            }
            if !state.running {
                state.running = true;
                state.begun += 1;
                drop(state);
                let outcome = sweep(everybody(), self.look_for, subject, deadline);
                state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                state.running = false;
                state.finished = state.begun;
                state.outcome = outcome.clone();
                self.changed.notify_all();
                return outcome;
            }
            let left = bounded::limit(deadline);
            let (again, waited) = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
            if waited.timed_out() {
                return Err(bounded::oldest());
            }
            state = again;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn subject() -> Subject {
        Subject {
            id: InodeId { dev: 0, inode: 0 },
            prefix: Prefix("xfs_"),
        }
    }

    #[test]
    fn scans_are_shared_and_end() {
        let scan = Scan::new(LookFor::Truncations);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let late = Instant::now() + Duration::from_secs(60);
                    scan.sweep(subject(), late)
                });
            }
        });
        let state = scan.state.lock().unwrap();
        assert!(state.begun <= 9 && state.finished == state.begun);
    }
}
