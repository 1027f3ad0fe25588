//! Which blocks a pin of strength stable holds. Pure, except for the reading.
//!
//! Such a pin holds what is stable, and lets everything else change until it is
//! stable, too. A block that is written and not shared is not always stable.
//! XFS copies a shared block that is written to in a window around it, and sets
//! blocks aside for its neighbours there; a neighbour then moves the next time
//! it is written. And what lies behind the end of the file is freed with every
//! change of its size. Such blocks are [`ExtentState::Loose`].

use crate::block_map;
use crate::extent::{BlockMap, Extent, ExtentState};
use crate::facts::FileFacts;
use mapdirect_sys::Errno;
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// The bytes in which a copy of a shared block may take neighbours along:
/// sorted and disjoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Copied(Vec<Range<u64>>);

impl Copied {
    /// Nothing is copied.
    pub const NOTHING: Self = Self(Vec::new());

    /// Everything may be copied.
    #[must_use]
    pub fn everything() -> Self {
        let all = 0..u64::MAX;
        Self(vec![all])
    }

    /// The surroundings of the shared blocks of `map`. `window` says how far
    /// from such blocks a copy reaches, or `None` if nothing is copied.
    #[must_use]
    pub fn around(map: &BlockMap, window: impl Fn(&Range<u64>) -> Option<Range<u64>>) -> Self {
        let shared = map
            .extents()
            .iter()
            .filter(|extent| extent.state == ExtentState::Shared);
        let mut found: Vec<Range<u64>> = Vec::new();
        for extent in shared {
            let Some(around) = window(&(extent.offset..extent.end())) else {
                continue;
            };
            match found.last_mut() {
                Some(last) if around.start <= last.end => last.end = last.end.max(around.end),
                _ => found.push(around),
            }
        }
        Self(found)
    }

    /// These bytes and others.
    #[must_use]
    pub fn and(&self, others: &[Range<u64>]) -> Self {
        let mut both = [&self.0[..], others].concat();
        both.sort_by_key(|run| run.start);
        both.dedup_by(|next, last| {
            let joins = next.start <= last.end;
            if joins {
                last.end = last.end.max(next.end);
            }
            joins
        });
        Self(both)
    }

    /// The same for what was found to be copied elsewhere.
    #[must_use]
    pub fn joined(&self, others: &Self) -> Self {
        self.and(&others.0)
    }

    /// From the first to the last byte that may be copied.
    #[must_use]
    pub fn hull(&self) -> Option<Range<u64>> {
        let (first, last) = self.0.first().zip(self.0.last())?;
        Some(first.start..last.end)
    }

    /// Whether nothing is copied.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The parts of an extent, and whether a copy may take them along.
    fn cut(&self, extent: &Extent) -> Vec<(Extent, bool)> {
        let mut parts = Vec::new();
        let mut at = extent.offset;
        let first = self.0.partition_point(|run| run.end <= at);
        for run in &self.0[first..] {
            if run.start >= extent.end() {
                break;
            }
            parts.extend(extent.clipped(&(at..run.start)).map(|part| (part, false)));
            let within = at.max(run.start)..run.end;
            parts.extend(extent.clipped(&within).map(|part| (part, true)));
            at = run.end.min(extent.end());
        }
        parts.extend(
            extent
                .clipped(&(at..extent.end()))
                .map(|part| (part, false)),
        );
        parts
    }
}

/// A block map as a pin of strength stable sees it: what is written but not
/// stable is loose.
#[must_use]
pub fn told_apart(map: &BlockMap, copied: &Copied) -> BlockMap {
    let block = u64::from(map.block_size()).max(1);
    let end = map.file_size().next_multiple_of(block);
    let extents = map.extents().iter().flat_map(|extent| {
        if extent.state != ExtentState::Written {
            return vec![*extent];
        }
        let loosen = |part: Extent| Extent {
            state: ExtentState::Loose,
            ..part
        };
        let in_file = extent.clipped(&(extent.offset..end));
        let behind = extent
            .clipped(&(end.max(extent.offset)..u64::MAX))
            .map(loosen);
        let parts = in_file.map_or_else(Vec::new, |part| copied.cut(&part));
        let told = parts
            .into_iter()
            .map(|(part, is_copied)| if is_copied { loosen(part) } else { part });
        told.chain(behind).collect()
    });
    BlockMap::new(
        map.device(),
        map.block_size(),
        map.file_size(),
        map.range(),
        extents,
    )
}

/// The surroundings of all shared blocks from which a copy can reach `range` of
/// a file.
///
/// # Errors
///
/// As [`block_map::read`].
pub fn copied(
    file: BorrowedFd<'_>,
    facts: &FileFacts,
    range: &Range<u64>,
) -> Result<Copied, Errno> {
    let Some(window) = facts.copies_around(range) else {
        return Ok(Copied::NOTHING);
    };
    let map = block_map::read(file, window)?;
    Ok(Copied::around(&map, |shared| facts.copies_around(shared)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::DeviceId;
    use ExtentState as S;
    use proptest::prelude::*;

    const END: u64 = 40;

    fn map(size: u64, states: &[S]) -> BlockMap {
        let extents = (0..).zip(states).map(|(at, state)| {
            let physical = (*state != S::Hole).then_some(100 + at);
            Extent::new(at, physical, 1, *state)
        });
        BlockMap::new(DeviceId { major: 7, minor: 0 }, 1, size, 0..END, extents)
    }

    fn window(run: &Range<u64>) -> Option<Range<u64>> {
        Some(run.start.saturating_sub(3)..run.end + 3)
    }

    fn state() -> impl Strategy<Value = S> {
        prop_oneof![
            6 => Just(S::Written),
            1 => Just(S::Shared),
            1 => Just(S::Hole),
            1 => Just(S::Unwritten),
        ]
    }

    proptest! {
        #[test]
        fn a_block_is_held_if_it_is_written_in_the_file_and_far_from_shared_ones(
            states in proptest::collection::vec(state(), usize::try_from(END).unwrap()),
            size in 0..2 * END,
        ) {
            let map = map(size, &states);
            let told = told_apart(&map, &Copied::around(&map, window));
            for at in 0..END {
                let near = at.saturating_sub(3)..(at + 4).min(END);
                let is_near = near.into_iter().any(|other| {
                    states[usize::try_from(other).unwrap()] == S::Shared
                });
                let was = map.find(at).unwrap();
                let expected = match was.state {
                    S::Written if is_near || at >= size => S::Loose,
                    state => state,
                };
                let is = told.find(at).unwrap();
                prop_assert_eq!(is.state, expected, "{}", at);
                let physical = |extent: &Extent| {
                    extent.physical.map(|physical| physical + (at - extent.offset))
                };
                prop_assert_eq!(physical(is), physical(was));
            }
        }
    }

    #[test]
    fn everything_or_nothing() {
        let map = map(END, &[S::Written; 40]);
        assert_eq!(told_apart(&map, &Copied::NOTHING), map);
        assert_eq!(told_apart(&map, &Copied::everything()).total(S::Loose), END);
        let none = |_: &Range<u64>| None;
        assert!(Copied::around(&self::map(END, &[S::Shared; 40]), none).is_empty());
    }
}
