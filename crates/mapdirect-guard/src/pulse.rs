//! Whether the threads that others wait for make progress.
//!
//! Whoever watches over a guard (a watchdog of systemd, the supervisor) wants to
//! hear from it now and then. It should hear nothing when the gate's thread
//! hangs although the process lives: everybody who touches a pinned file would
//! wait. So the main thread asks these threads, and passes on only what they have
//! answered.

use crate::Errno;
use crate::wake::{Backoff, Waker};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// The pulse of a guard.
#[derive(Debug)]
pub(crate) struct Pulse {
    /// How often it was asked.
    asked: AtomicU64,
    /// The last question that the thread of the gate has seen.
    gate: AtomicU64,
    /// The same for the thread that accepts clients.
    accept: AtomicU64,
    /// The thread of the gate has ended.
    is_over: AtomicBool,
    /// Wakes the thread that accepts clients.
    pub(crate) waker: Waker,
}

impl Pulse {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self {
            asked: AtomicU64::new(0),
            gate: AtomicU64::new(0),
            accept: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
            waker: Waker::new()?,
        })
    }

    /// Asks. The caller also wakes the thread of the gate.
    pub(crate) fn ask(&self) {
        self.asked.fetch_add(1, SeqCst);
        self.waker.wake();
    }

    /// Whether everybody has seen the last question.
    pub(crate) fn is_answered(&self) -> bool {
        let asked = self.asked.load(SeqCst);
        self.gate.load(SeqCst) >= asked && self.accept.load(SeqCst) >= asked
    }

    /// Called by the thread of the gate whenever it has nothing left to do at
    /// once.
    pub(crate) fn gate_beats(&self) {
        self.gate.store(self.asked.load(SeqCst), SeqCst);
    }

    /// Called by the thread of the gate when it ends.
    pub(crate) fn gate_is_over(&self) {
        self.is_over.store(true, SeqCst);
    }

    /// Waits for a while until the thread of the gate has ended.
    pub(crate) fn wait_for_gate(&self, limit: Duration) {
        let (first, longest) = (Duration::from_micros(100), Duration::from_millis(5));
        let mut backoff = Backoff::until(Instant::now() + limit, first, longest);
        while !self.is_over.load(SeqCst) && !backoff.is_over() {
            backoff.pause();
        }
    }

    /// The same for the thread that accepts clients.
    pub(crate) fn accept_beats(&self) {
        self.accept.store(self.asked.load(SeqCst), SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_hangs_is_noticed() {
        let pulse = Pulse::new().unwrap();
        assert!(pulse.is_answered());
        pulse.ask();
        assert!(!pulse.is_answered());
        pulse.gate_beats();
        assert!(!pulse.is_answered());
        pulse.accept_beats();
        assert!(pulse.is_answered());
        pulse.ask();
        pulse.gate_beats();
        assert!(!pulse.is_answered());
    }
}
