//! The ranges of one inode that are pinned. Pure.
//!
//! A [`PinSet`] is a value: gates read the current one while a grant makes the
//! next, so that nobody waits.

use std::ops::Range;
use std::sync::Arc;

/// Something that covers a range of bytes.
pub trait Ranged {
    /// The bytes covered; never empty.
    fn range(&self) -> Range<u64>;
    /// A number that distinguishes this from all others.
    fn id(&self) -> u64;
}

/// The pins of one inode, ordered by their starts. They may overlap.
#[derive(Debug)]
pub struct PinSet<P> {
    pins: Vec<Arc<P>>,
    /// The length of the longest pin. It limits how far before a range a pin
    /// can start that meets the range.
    longest: u64,
}

impl<P> Default for PinSet<P> {
    fn default() -> Self {
        Self {
            pins: Vec::new(),
            longest: 0,
        }
    }
}

impl<P: Ranged> PinSet<P> {
    fn new(pins: Vec<Arc<P>>) -> Self {
        let length = |pin: &Arc<P>| pin.range().end - pin.range().start;
        let longest = pins.iter().map(length).max().unwrap_or(0);
        Self { pins, longest }
    }

    /// This set with one more pin.
    #[must_use]
    pub fn with(&self, pin: Arc<P>) -> Self {
        let at = self
            .pins
            .partition_point(|other| other.range().start <= pin.range().start);
        let mut pins = Vec::with_capacity(self.pins.len() + 1);
        pins.extend_from_slice(&self.pins[..at]);
        pins.push(pin);
        pins.extend_from_slice(&self.pins[at..]);
        Self::new(pins)
    }

    /// This set without the pins for which `gone` says yes.
    #[must_use]
    pub fn without(&self, gone: impl Fn(&P) -> bool) -> Self {
        Self::new(self.pins.iter().filter(|pin| !gone(pin)).cloned().collect())
    }

    /// The pins that meet `range`, in no particular order.
    pub fn meeting(&self, range: Range<u64>) -> impl Iterator<Item = &Arc<P>> {
        let behind = self
            .pins
            .partition_point(|pin| pin.range().start < range.end);
        let reach = range.start.saturating_sub(self.longest);
        self.pins[..behind]
            .iter()
            .rev()
            .take_while(move |pin| pin.range().start >= reach)
            .filter(move |pin| pin.range().end > range.start && !range.is_empty())
    }

    /// All pins, by start.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<P>> {
        self.pins.iter()
    }

    /// The number of pins.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pins.len()
    }

    /// Whether nothing is pinned.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pins.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone, PartialEq, Eq)]
    struct Pin(u64, Range<u64>);

    impl Ranged for Pin {
        fn range(&self) -> Range<u64> {
            self.1.clone()
        }
        fn id(&self) -> u64 {
            self.0
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Add(Range<u64>),
        Remove(prop::sample::Index),
    }

    fn step() -> impl Strategy<Value = Step> {
        // Long pins, up to the end of all files, beside short ones.
        let end = prop_oneof![9 => 1u64..40, 1 => Just(u64::MAX - 200)];
        prop_oneof![
            3 => (0u64..200, end).prop_map(|(start, length)| Step::Add(start..start + length)),
            1 => any::<prop::sample::Index>().prop_map(Step::Remove),
        ]
    }

    proptest! {
        /// The set against the plainest model there is.
        #[test]
        fn it_holds_what_was_added_and_not_removed(
            steps in proptest::collection::vec(step(), 0..60),
            start in 0u64..250,
            length in 0u64..60,
        ) {
            let mut set = PinSet::default();
            let mut model: Vec<Pin> = Vec::new();
            for (id, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Add(range) => {
                        let pin = Pin(id as u64, range);
                        model.push(pin.clone());
                        set = set.with(Arc::new(pin));
                    }
                    Step::Remove(index) if !model.is_empty() => {
                        let Pin(id, _) = model.remove(index.index(model.len()));
                        set = set.without(|pin| pin.id() == id);
                    }
                    Step::Remove(_) => {}
                }
            }
            let sorted = |pins: Vec<Pin>| {
                let mut ids: Vec<_> = pins.into_iter().map(|Pin(id, _)| id).collect();
                ids.sort_unstable();
                ids
            };
            let range = start..start + length;
            let expected = model
                .iter()
                .filter(|Pin(_, pin)| pin.start.max(start) < pin.end.min(range.end))
                .cloned()
                .collect();
            let found = set.meeting(range.clone()).map(|pin| (**pin).clone()).collect();
            prop_assert_eq!(sorted(found), sorted(expected));
            prop_assert_eq!(set.len(), model.len());
            prop_assert!(set.iter().is_sorted_by_key(|pin| pin.range().start));
        }
    }
}
