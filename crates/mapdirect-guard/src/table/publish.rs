//! Publish, then look: how a grant and the gate never miss each other.
//!
//! The gate lets an operation through only after it has noted it and looked for
//! pins once more. A grant publishes its pin and then looks for notes. Neither
//! waits for the other, and at least one of them sees the other:
//!
//! ```text
//!     gate                         grant
//!     note the operation           publish the pin
//!     fence                        fence
//!     look for pins                look for notes
//! ```
//!
//! Both fences are sequentially consistent, so one of them comes first, and
//! whatever was published before it is seen by everybody who looks after the
//! other. Without them both sides could look before what they published had
//! left their processor, and miss each other: the operation would go on, and
//! the pin be granted on what it is just about to change.
//!
//! [`Published`] is the only way to what the other side has published, and
//! making one publishes first. The test `interleavings` runs this very code
//! through every order that the memory model permits.

use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst, fence};

/// The atomics that a protocol is made of: those of the machine, or those of
/// the model checker.
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
    /// Makes it smaller by one, unless it is nothing.
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

impl Count for AtomicU64 {
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

/// Leave to look at `T`, which only somebody has who has published something
/// before.
#[derive(Debug)]
#[must_use = "what was published must be followed by a look at what others have"]
pub(crate) struct Published<'a, T>(&'a T);

impl<'a, T> Published<'a, T> {
    /// Publishes, and gives leave to look at what the other side publishes.
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

/// How often something was noted. It is a count and no mark, so that a note
/// which is withdrawn takes nobody else's with it.
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

    /// Takes one's own note back. If somebody has taken it meanwhile, it is
    /// put back with the others or dealt with, and either is right.
    pub(super) fn withdraw(&self) {
        self.0.decrement();
    }

    pub(super) fn is_any(&self) -> bool {
        self.0.load() > 0
    }

    /// Takes the notes, and has them dealt with by `deal`; if that fails they
    /// stand again. Says whether there were any. They are taken before, since
    /// what is noted from now on must not be lost.
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
