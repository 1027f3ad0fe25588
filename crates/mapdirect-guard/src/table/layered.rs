//! All pins of an inode merged, for the fanotify gate to judge by.
//!
//! No pin refuses most operations, however many pins there are. So the gate
//! first asks the merged [`Layers`] of all pins. Only when the layers refuse
//! does it ask pin after pin, to find out which pin refuses, and whether that
//! pin is still held.
//!
//! The threads that change what is pinned merge the layers, not the gate's
//! thread, and replace them as a whole. A snapshot records the set of pins it
//! was made for. For another set of pins the snapshot does not count, and each
//! pin is asked. So a newly published pin is never missed, and outdated layers
//! cost nothing but time. While a pin is being settled anew, the layers may be
//! the earlier ones for a moment. An operation that these let through might
//! have come before as well, and the holder is told only after the layers are
//! renewed.

use super::pin::{Pin, Settled};
use crate::ledger::PinSet;
use crate::policy::{Layers, Operation};
use arc_swap::{ArcSwap, ArcSwapOption};
use std::sync::Arc;

/// The layers of all pins of an inode, if they have been merged.
#[derive(Debug, Default)]
pub(super) struct Layered(ArcSwapOption<Snapshot>);

/// The layers of a set of pins.
#[derive(Debug)]
struct Snapshot {
    pins: Arc<PinSet<Pin>>,
    layers: Arc<Layers>,
}

impl Snapshot {
    /// The layers of these pins, or `None` if a pin is not settled yet.
    fn of(pins: Arc<PinSet<Pin>>) -> Option<Arc<Self>> {
        let live = pins.iter().filter(|pin| !pin.is_dead());
        let settled: Option<Vec<_>> = live.map(|pin| pin.settled()).collect();
        let layers = together(&settled?);
        Some(Arc::new(Self { pins, layers }))
    }
}

impl Layered {
    /// Merges the layers of the current pins. If several threads do so at a
    /// time, the layers of the newest pins stay: each thread replaces only the
    /// snapshot that it has seen.
    pub(super) fn renew(&self, pins: &ArcSwap<PinSet<Pin>>) {
        self.0.rcu(|_| Snapshot::of(pins.load_full()));
    }

    /// Whether layers were ever merged.
    pub(super) fn is_kept(&self) -> bool {
        self.0.load().is_some()
    }

    /// Whether none of these pins refuses an operation on a file of `size`
    /// bytes. `false` if that is not known. Takes no lock.
    pub(super) fn let_pass(
        &self,
        pins: &PinSet<Pin>,
        operation: &Operation,
        size: u64,
        moved: u64,
    ) -> bool {
        self.0.load().as_ref().is_some_and(|snapshot| {
            std::ptr::eq(&raw const *snapshot.pins, pins)
                && !snapshot.layers.refuses(operation, size, moved)
        })
    }
}

/// Merges the layers of several pins.
pub(crate) fn together(settled: &[Arc<Settled>]) -> Arc<Layers> {
    match settled {
        [one] => Arc::clone(&one.layers),
        many => Arc::new(Layers::all(many.iter().map(|one| &*one.layers))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Abilities, InodeId, Opinion, Watched};
    use super::*;
    use crate::policy::{Geometry, OperationKind, Pinned};
    use mapdirect_proto::{BlockMap, DeviceId, Extent, ExtentState, Flags};
    use mapdirect_sys::unix::Sender;
    use proptest::prelude::*;

    const BLOCK: u64 = 4096;

    /// What grants, ends of pins and allocations do to an inode.
    #[derive(Clone, Debug)]
    enum Step {
        Publish(u64),
        Settle(prop::sample::Index, ExtentState),
        Renew,
        End(prop::sample::Index),
        Remove,
    }

    fn step() -> impl Strategy<Value = Step> {
        let state = prop_oneof![Just(ExtentState::Written), Just(ExtentState::Hole)];
        prop_oneof![
            (0u64..4).prop_map(Step::Publish),
            (any::<prop::sample::Index>(), state).prop_map(|(at, state)| Step::Settle(at, state)),
            Just(Step::Renew),
            any::<prop::sample::Index>().prop_map(Step::End),
            Just(Step::Remove),
        ]
    }

    fn settle(pin: &Pin, at: u64, state: ExtentState) {
        let range = at * BLOCK..(at + 1) * BLOCK;
        let device = DeviceId { major: 7, minor: 0 };
        let extent = Extent::new(range.start, None, BLOCK, state);
        let map = BlockMap::new(device, 4096, 8 * BLOCK, range, [extent]);
        let geometry = Geometry::of_pages(4096);
        pin.settle(&map, &Pinned::new(&map, false, geometry), None);
    }

    proptest! {
        /// Whatever is done in whatever order, nothing passes that a pin minds.
        /// Once layers are renewed and all pins settled, all else passes.
        #[test]
        fn nothing_passes_that_a_pin_minds(steps in proptest::collection::vec(step(), 0..40)) {
            let id = InodeId { dev: 7, inode: 1 };
            let watched = Watched::new(id, Abilities::default(), Arc::default());
            let owner = Sender { pid: 1, uid: 0 };
            // Whether layers were renewed since pins were published or settled.
            let mut is_current = false;
            for (number, step) in (1..).zip(steps) {
                let pins: Vec<_> = watched.pins.load().iter().cloned().collect();
                is_current &= matches!(step, Step::End(_));
                match step {
                    Step::Publish(at) => {
                        let range = at * BLOCK..(at + 1) * BLOCK;
                        let flags = Flags::NONE;
                        let pin = Pin::unsettled(number, range.clone(), None, range, flags, owner);
                        watched.add(&Arc::new(pin));
                    }
                    Step::Settle(at, state) if !pins.is_empty() => {
                        let pin = at.get(&pins);
                        if !pin.is_dead() {
                            settle(pin, pin.shown.start / BLOCK, state);
                            // Those who settle it go on to renew what it was.
                            watched.renew_layers();
                        }
                    }
                    Step::End(at) if !pins.is_empty() => at.get(&pins).end(),
                    Step::Renew => watched.renew_layers(),
                    Step::Remove => watched.remove(Pin::is_dead),
                    Step::Settle(..) | Step::End(_) => {}
                }
                is_current |= matches!(step, Step::Renew);
                let pins = watched.pins.load();
                for at in 0..4 {
                    let kind = OperationKind::Write;
                    let operation = Operation::new(kind, at * BLOCK..(at + 1) * BLOCK);
                    let mind = |pin: &Arc<Pin>| {
                        pin.opinion(&operation, 8 * BLOCK, 0) != Opinion::Allow
                    };
                    let passes = watched.lets_pass(&pins, &operation, 8 * BLOCK, 0);
                    let minds = pins.iter().any(mind);
                    prop_assert!(!passes || !minds);
                    let is_settled = pins.iter().all(|pin| pin.is_dead() || pin.settled().is_some());
                    let any_died = pins.iter().any(|pin| pin.is_dead());
                    prop_assert!(passes || minds || !is_current || !is_settled || any_died);
                }
            }
        }
    }
}
