//! Sweeps of all threads of the system, shared by all grants that wait for one.

use super::sweep::{everybody, sweep};
use super::{Subject, Suspect};
use crate::bounded::{self, Stuck};
use crate::suspicion::{LookFor, Prefix};
use crate::table::InodeId;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

/// Sweeps of all threads of the system, one for all grants that wait for one:
/// those that close their gate before a sweep begins share what it finds.
#[derive(Debug)]
pub(crate) struct Scans {
    truncations: Scan,
}

/// Everybody who may have been in the middle of a truncation by path when the
/// census was begun. No truncation depends on which file is asked about, so it
/// answers for every file whose gate was closed before that.
#[derive(Clone, Debug)]
pub(crate) struct Census {
    pub(super) found: Vec<Suspect>,
}

impl Scans {
    /// Looks for truncations by path that began before this call, or shares a
    /// look that somebody else begins after it.
    pub(crate) fn truncations(&self, deadline: Instant) -> Result<Census, Stuck> {
        // Nothing of it is asked where truncations are looked for.
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

/// Sweeps for one thing.
#[derive(Debug)]
struct Scan {
    look_for: LookFor,
    state: Mutex<ScanState>,
    changed: Condvar,
}

#[derive(Debug)]
struct ScanState {
    /// Sweeps begun, and sweeps finished.
    begun: u64,
    finished: u64,
    running: bool,
    /// What the last finished sweep found, or why it came to nothing.
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

    /// Everybody who may be at it and began before this call. One that was
    /// given up by who began it is no answer for others: they begin anew.
    fn sweep(&self, subject: Subject, deadline: Instant) -> Result<Vec<Suspect>, Stuck> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // A sweep that is running now may have passed a thread before it went
        // into the kernel: the next one counts.
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
