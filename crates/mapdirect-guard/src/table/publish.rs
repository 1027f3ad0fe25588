//! Publish, then look: how a grant and the gate never miss each other.
//!
//! The gate lets an operation through only after it has noted the operation and
//! has then looked for pins once more. A grant publishes its pin and then looks
//! for notes. Neither side waits for the other, and at least one of them sees
//! the other:
//!
//! ```text
//!     gate                         grant
//!     note the operation           publish the pin
//!     fence                        fence
//!     look for pins                look for notes
//! ```
//!
//! Both fences are sequentially consistent, so one of them comes first.
//! Whatever was published before the first fence is seen by the side that looks
//! after the second. Without the fences both sides could look before their own
//! publication had left their processor, and miss each other. The operation
//! would then go on, and the pin would be granted on blocks that the operation
//! is about to change.
//!
//! [`Published`] is the only way to what the other side has published, and
//! making one publishes first. The test `interleavings` runs this very code
//! through every order that the memory model permits.

use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst, fence};

/// The atomics that the protocol is built from: those of the machine, or those
/// of the model checker.
pub(crate) trait Atomics: Debug {
    type Count: Count;
    fn fence();
}

/// A number that several threads change.
pub(crate) trait Count: Debug {
    fn new(value: u64) -> Self;
    fn load(&self) -> u64;
    fn add(&self, more: u64) -> u64;
    fn swap(&self, value: u64) -> u64;
    /// Subtracts one, unless the number is zero.
    fn decrement(&self);
}

/// The atomics of the machine.
#[derive(Debug)]
pub(crate) struct Machine;

impl Atomics for Machine {
    type Count = AtomicU64;

    fn fence() {
        fence(SeqCst);
    }
}

/// Counts by sequentially consistent operations on an atomic type: that of the
/// machine, and that of the model checker, which has to try the same ones.
macro_rules! count {
    ($atomic:ty) => {
        impl $crate::table::publish::Count for $atomic {
            fn new(value: u64) -> Self {
                Self::new(value)
            }

            fn load(&self) -> u64 {
                self.load(SeqCst)
            }

            fn add(&self, more: u64) -> u64 {
                self.fetch_add(more, SeqCst)
            }

            fn swap(&self, value: u64) -> u64 {
                self.swap(value, SeqCst)
            }

            fn decrement(&self) {
                let _ = self.fetch_update(SeqCst, SeqCst, |count| count.checked_sub(1));
            }
        }
    };
}
#[cfg(test)]
pub(super) use count;

count!(AtomicU64);

/// Permission to look at `T`. Only code that has published something first can
/// get it.
#[derive(Debug)]
#[must_use = "what was published must be followed by a look at what others have"]
pub(crate) struct Published<'a, T>(&'a T);

impl<'a, T> Published<'a, T> {
    /// Publishes, and permits its caller to look at what the other side
    /// publishes.
    pub(crate) fn after<A: Atomics>(other: &'a T, publish: impl FnOnce()) -> Self {
        publish();
        A::fence();
        Self(other)
    }

    /// What the other side has published.
    pub(crate) fn other(&self) -> &'a T {
        self.0
    }
}

/// Counts how often something was noted. A count instead of a flag, so that
/// withdrawing one note leaves the others in place.
#[derive(Debug)]
pub(super) struct Tally<A: Atomics>(A::Count);

impl<A: Atomics> Default for Tally<A> {
    fn default() -> Self {
        Self(A::Count::new(0))
    }
}

impl<A: Atomics> Tally<A> {
    pub(super) fn note(&self) {
        self.0.add(1);
    }

    /// Withdraws one's own note. If a grant has taken the note meanwhile, the
    /// grant puts it back with the others or deals with it, and either is
    /// right.
    pub(super) fn withdraw(&self) {
        self.0.decrement();
    }

    pub(super) fn is_any(&self) -> bool {
        self.0.load() > 0
    }

    /// Takes the notes, and deals with them by `deal`. If `deal` fails, the
    /// notes are put back. Says whether there were any. The notes are taken
    /// first, so that notes made from now on are not lost.
    pub(super) fn deal<E>(&self, deal: impl FnOnce() -> Result<(), E>) -> Result<bool, E> {
        let taken = self.0.swap(0);
        if taken == 0 {
            return Ok(false);
        }
        deal().map(|()| true).inspect_err(|_| {
            self.0.add(taken);
        })
    }

    pub(super) fn forget(&self) {
        self.0.swap(0);
    }
}
