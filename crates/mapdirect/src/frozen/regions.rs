//! Where frozen memory is. Pure.

use std::collections::BTreeMap;
use std::ops::Range;

/// Protected memory, by address, and which mapping it belongs to.
#[derive(Debug, Default)]
pub(super) struct Regions(pub(super) BTreeMap<usize, (usize, u64)>);

impl Regions {
    pub(super) fn add(&mut self, range: &Range<usize>, map: u64) {
        self.0.insert(range.start, (range.end, map));
    }

    pub(super) fn remove(&mut self, gone: &Range<usize>) {
        let meeting: Vec<usize> = self
            .0
            .range(..gone.end)
            .rev()
            .take_while(|(_, (end, _))| *end > gone.start)
            .map(|(start, _)| *start)
            .collect();
        for start in meeting {
            let Some((end, map)) = self.0.remove(&start) else {
                continue;
            };
            if start < gone.start {
                self.add(&(start..gone.start), map);
            }
            if gone.end < end {
                self.add(&(gone.end..end), map);
            }
        }
    }

    pub(super) fn copy(&mut self, from: &Range<usize>, to: usize) {
        let found: Vec<_> = self
            .0
            .range(..from.end)
            .rev()
            .take_while(|(_, (end, _))| *end > from.start)
            .map(|(start, (end, map))| {
                let start = (*start).max(from.start) - from.start;
                let end = (*end).min(from.end) - from.start;
                (to + start..to + end, *map)
            })
            .collect();
        for (range, map) in found {
            self.remove(&range);
            self.add(&range, map);
        }
    }

    pub(super) fn has(&self, map: u64) -> bool {
        self.0.values().any(|(_, of)| *of == map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Add(usize, usize),
        Remove(usize, usize),
        Copy(usize, usize, usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let place = 0usize..60;
        let step = prop_oneof![
            (place.clone(), 1usize..20).prop_map(|(at, len)| Step::Add(at, at + len)),
            (place.clone(), 1usize..20).prop_map(|(at, len)| Step::Remove(at, at + len)),
            (place.clone(), 1usize..20, place).prop_map(|(at, len, to)| Step::Copy(
                at,
                at + len,
                to
            )),
        ];
        proptest::collection::vec(step, 0..30)
    }

    proptest! {
        /// The same, an address at a time.
        #[test]
        fn regions_are_where_memory_is(steps in steps()) {
            let mut regions = Regions::default();
            let mut model = [0u64; 100];
            for (number, step) in steps.into_iter().enumerate() {
                let map = number as u64 + 1;
                match step {
                    Step::Add(start, end) => {
                        // Fresh memory lies where nothing is.
                        if model[start..end].iter().all(|of| *of == 0) {
                            regions.add(&(start..end), map);
                            model[start..end].fill(map);
                        }
                    }
                    Step::Remove(start, end) => {
                        regions.remove(&(start..end));
                        model[start..end].fill(0);
                    }
                    Step::Copy(start, end, to) => {
                        // mremap refuses to move onto itself.
                        let apart = to >= end || to + (end - start) <= start;
                        if apart {
                            regions.copy(&(start..end), to);
                            let moved = model[start..end].to_vec();
                            for (at, of) in moved.into_iter().enumerate() {
                                if of != 0 {
                                    model[to + at] = of;
                                }
                            }
                        }
                    }
                }
                let mut found = [0u64; 100];
                for (start, (end, of)) in &regions.0 {
                    prop_assert!(start < end);
                    prop_assert!(found[*start..*end].iter().all(|of| *of == 0), "they overlap");
                    found[*start..*end].fill(*of);
                }
                prop_assert_eq!(found, model);
                for of in 1..=map {
                    prop_assert_eq!(regions.has(of), model.contains(&of));
                }
            }
        }
    }
}
