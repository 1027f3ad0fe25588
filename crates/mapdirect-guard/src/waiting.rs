//! Operations that wait at the gate for the outcome of a grant.
//!
//! The fanotify gate holds back an operation that a pending pin may forbid, and
//! looks at the operation again when the grant is decided. The bpf gate holds
//! nothing back, so nothing waits here then.

use crate::Errno;
use crate::table::publish::{Atomics, Count, Machine, Published};
use crate::wake::Waker;
use arc_swap::ArcSwap;
use std::sync::Arc;

/// Counts decisions, and the operations that wait for one. Neither side waits
/// for the other. The gate says how many operations it holds back, and then
/// looks for decisions; a grant says that it has decided, and then looks
/// whether anything waits. So either the gate sees a decision before it sleeps,
/// or it is woken.
#[derive(Debug)]
pub(crate) struct Decisions<A: Atomics = Machine> {
    made: A::Count,
    waiting: A::Count,
}

impl<A: Atomics> Default for Decisions<A> {
    fn default() -> Self {
        Self {
            made: A::Count::new(0),
            waiting: A::Count::new(0),
        }
    }
}

impl<A: Atomics> Decisions<A> {
    /// Makes a decision, and says whether the gate must be woken for it.
    fn make(&self) -> bool {
        let waiting = Published::after::<A>(&self.waiting, || {
            self.made.add(1);
        });
        waiting.other().load() > 0
    }

    /// The number of decisions made so far.
    fn made(&self) -> u64 {
        self.made.load()
    }

    /// Records the number of operations that wait now. Returns the number that
    /// waited before, and permission to look for decisions: without such a look
    /// the gate could sleep for long.
    fn wait(&self, count: u64) -> (u64, Published<'_, A::Count>) {
        let mut before = 0;
        let made = Published::after::<A>(&self.made, || before = self.waiting.swap(count));
        (before, made)
    }
}

/// The place where operations wait for the outcome of a grant.
#[derive(Debug)]
pub(crate) struct WaitingRoom {
    decisions: Decisions,
    /// The threads whose operations wait.
    threads: ArcSwap<Vec<i32>>,
    waker: Waker,
}

impl WaitingRoom {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self {
            decisions: Decisions::default(),
            threads: ArcSwap::default(),
            waker: Waker::new()?,
        })
    }

    /// Makes the gate look again at the waiting operations, because something
    /// was decided.
    pub(crate) fn decided(&self) {
        if self.decisions.make() {
            self.waker.wake();
        }
    }

    /// The threads that wait, and so have not passed the gate.
    pub(crate) fn threads(&self) -> Arc<Vec<i32>> {
        self.threads.load_full()
    }

    /// Wakes the gate's thread, so that it notices that the guard stops.
    pub(crate) fn wake(&self) {
        self.waker.wake();
    }

    /// The waker of the gate's thread.
    pub(crate) fn waker(&self) -> &Waker {
        &self.waker
    }

    /// The number of decisions made so far. A caller that later finds a larger
    /// number must look again.
    pub(crate) fn decisions(&self) -> u64 {
        self.decisions.made()
    }

    /// Records which threads the gate holds back now. The gate must look for
    /// new [decisions](Self::decisions) after this call and before it sleeps.
    pub(crate) fn now_waiting(&self, tids: impl ExactSizeIterator<Item = i32>) {
        let count = tids.len();
        let (before, _decisions) = self.decisions.wait(count as u64);
        if before > 0 || count > 0 {
            self.threads.store(Arc::new(tids.collect()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::interleavings::{Loom, WithoutFences};

    /// Either the gate sees a decision before it sleeps, or it is woken.
    fn nobody_sleeps_through_a_decision<A: Atomics + 'static>() {
        loom::model(|| {
            let decisions = Arc::new(Decisions::<A>::default());
            let grant = Arc::clone(&decisions);
            let grant = loom::thread::spawn(move || grant.make());
            // The operation was judged by what was decided so far.
            let seen = decisions.made();
            let (_, made) = decisions.wait(1);
            let sleeps = made.other().load() == seen;
            let wakes = grant.join().unwrap();
            assert!(seen == 1 || !sleeps || wakes, "it sleeps for long");
        });
    }

    #[test]
    fn no_decision_is_slept_through() {
        nobody_sleeps_through_a_decision::<Loom>();
    }

    #[test]
    #[should_panic(expected = "it sleeps for long")]
    fn without_fences_a_decision_is_slept_through() {
        nobody_sleeps_through_a_decision::<WithoutFences>();
    }
}
