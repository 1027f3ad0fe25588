//! All pins of an inode in one, for the fanotify gate to judge by.
//!
//! Most operations are nobody's business, however many pins there are: the gate
//! asks the [`Layers`] of all of them at once, and asks pin after pin only when
//! these refuse, to find out which one it is, and whether that is still held.
//!
//! Layers are put together by whoever changes what is pinned, not by the gate's
//! thread, and swapped in whole. They say for which set of pins they are made.
//! For another set they count for nothing, and each pin is asked: so a pin that
//! has just been published is never missed, and layers that nobody renewed cost
//! time and nothing else. When a pin is settled anew, layers may be those from
//! before for a moment. What is let through then might have come before as well,
//! and the holder is told only after they are renewed.

use super::pin::{Pin, Settled};
use crate::ledger::PinSet;
use crate::policy::{Layers, Operation};
use arc_swap::{ArcSwap, ArcSwapOption};
use std::sync::Arc;

/// The layers of all pins of an inode, if they have been put together.
#[derive(Debug, Default)]
pub(super) struct Layered(ArcSwapOption<Snapshot>);

/// The layers of a set of pins.
#[derive(Debug)]
struct Snapshot {
    pins: Arc<PinSet<Pin>>,
    layers: Arc<Layers>,
}

impl Snapshot {
    /// The layers of these pins, unless one of them is not settled yet.
    fn of(pins: Arc<PinSet<Pin>>) -> Option<Arc<Self>> {
        let live = pins.iter().filter(|pin| !pin.is_dead());
        let settled: Option<Vec<_>> = live.map(|pin| pin.settled()).collect();
        let layers = together(&settled?);
        Some(Arc::new(Self { pins, layers }))
    }
}

impl Layered {
    /// Puts the layers of the pins together that there are now. If several do
    /// so at a time, what stays is made from the newest pins: nobody replaces
    /// anything but what was there when they looked.
    pub(super) fn renew(&self, pins: &ArcSwap<PinSet<Pin>>) {
        self.0.rcu(|_| Snapshot::of(pins.load_full()));
    }

    /// Whether layers were ever put together.
    pub(super) fn is_kept(&self) -> bool {
        self.0.load().is_some()
    }

    /// Whether none of these pins minds an operation on a file of `size` bytes.
    /// If that is not known, it is not so. Takes no lock.
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

/// The layers of several pins in one.
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
