//! Compares a block map as it was pinned with the map as it is now.

use mapdirect_proto::{BlockMap, Extent, ExtentState as S};
use std::ops::Range;

/// Whether a block may change from one state and place to another without
/// breaking the promise of a pin.
fn is_kept(follows: bool, before: &Extent, now: &Extent) -> bool {
    if follows {
        // It holds what is stable. Everything else may change, but nothing comes
        // to be shared.
        let stays = now.state == S::Written && before.physical == now.physical;
        return match before.state {
            S::Written => stays || now.state == S::Loose && before.physical == now.physical,
            S::Shared => true,
            _ => now.state != S::Shared,
        };
    }
    match (before.state, now.state) {
        // Space is reserved in memory, but no block is chosen yet. When one is
        // chosen, the filesystem raises an event.
        (S::Hole, S::Hole | S::Delalloc) => true,
        // The other users of the blocks have let go of them. The blocks are
        // where they were, and the holder still does not store to them.
        (S::Shared, S::Written | S::Shared) => before.physical == now.physical,
        (before_state, now_state) => before_state == now_state && before.physical == now.physical,
    }
}

/// A difference between two block maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    /// From the first to the last differing byte.
    pub(crate) range: Range<u64>,
    /// Whether blocks that were stable before differ as well.
    pub(crate) stable: bool,
}

/// Compares what both maps say about `range`. The maps cover the range, or as
/// much of it as counts. The pin may be one of strength stable (`follows`).
pub(crate) fn difference(
    follows: bool,
    before: &BlockMap,
    now: &BlockMap,
    range: &Range<u64>,
) -> Option<Difference> {
    let mut found: Option<Difference> = None;
    let mut at = range.start;
    while at < range.end {
        let (Some(was), Some(is)) = (before.find(at), now.find(at)) else {
            break;
        };
        let end = was.end().min(is.end()).min(range.end);
        let part = at..end;
        if let (Some(was), Some(is)) = (was.clipped(&part), is.clipped(&part))
            && !is_kept(follows, &was, &is)
        {
            let stable = was.state.is_stable();
            found = Some(found.map_or_else(
                || Difference {
                    range: part.clone(),
                    stable,
                },
                |difference| Difference {
                    range: difference.range.start..end,
                    stable: difference.stable || stable,
                },
            ));
        }
        at = end;
    }
    found
}

/// The same for blocks that were stable before.
pub(crate) fn difference_of_stable(
    before: &BlockMap,
    now: &BlockMap,
    range: &Range<u64>,
) -> Option<Difference> {
    let runs = before
        .extents()
        .iter()
        .filter(|extent| extent.state.is_stable())
        .filter_map(|extent| extent.clipped(range));
    runs.filter_map(|run| difference(false, before, now, &(run.offset..run.end())))
        .reduce(|first, last| Difference {
            range: first.range.start..last.range.end,
            stable: true,
        })
}

/// `before`, with the blocks in `range` as they are `now`.
pub(crate) fn renewed(before: &BlockMap, now: &BlockMap, range: &Range<u64>) -> BlockMap {
    let whole = before.range();
    let part = |map: &BlockMap, range: Range<u64>| {
        let clip = move |extent: &Extent| extent.clipped(&range);
        map.extents().iter().filter_map(clip).collect::<Vec<_>>()
    };
    let mut extents = part(before, whole.start..range.start);
    extents.extend(part(now, range.clone()));
    extents.extend(part(before, range.end..whole.end));
    BlockMap::new(
        before.device(),
        before.block_size(),
        before.file_size(),
        whole,
        extents,
    )
}

/// `before`, with everything in `range` that is not stable in it as it is `now`,
/// or `None` if that is the same.
pub(crate) fn grown(before: &BlockMap, now: &BlockMap, range: &Range<u64>) -> Option<BlockMap> {
    let mut extents = Vec::new();
    let mut is_new = before.file_size() != now.file_size();
    let mut at = range.start;
    while at < range.end {
        let (Some(was), Some(is)) = (before.find(at), now.find(at)) else {
            break;
        };
        let part = at..was.end().min(is.end()).min(range.end);
        let (was, is) = (was.clipped(&part), is.clipped(&part));
        let stays = was.filter(|was| was.state.is_stable() || Some(*was) == is);
        is_new |= stays.is_none();
        extents.extend(stays.or(is));
        at = part.end;
    }
    is_new.then(|| {
        let inside = BlockMap::new(
            now.device(),
            now.block_size(),
            now.file_size(),
            range.clone(),
            extents,
        );
        let grown = renewed(before, &inside, range);
        BlockMap::new(
            now.device(),
            now.block_size(),
            now.file_size(),
            grown.range(),
            grown.extents().iter().copied(),
        )
    })
}

/// The extents of a map inside `range`.
pub(crate) fn extents_in(map: &BlockMap, range: &Range<u64>) -> Vec<Extent> {
    let extents = map.extents().iter();
    extents.filter_map(|extent| extent.clipped(range)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mapdirect_proto::DeviceId;
    use proptest::prelude::*;

    const DEVICE: DeviceId = DeviceId { major: 7, minor: 1 };
    const END: u64 = 24;

    /// State and place of each block, blocks of one byte.
    type Blocks = Vec<(S, Option<u64>)>;

    fn map(blocks: &Blocks) -> BlockMap {
        let extents = (0..)
            .zip(blocks)
            .map(|(at, (state, physical))| Extent::new(at, *physical, 1, *state));
        BlockMap::new(DEVICE, 1, END, 0..END, extents)
    }

    fn blocks() -> impl Strategy<Value = Blocks> {
        let block = (0u8..6, 0u64..3).prop_map(|(state, place)| match state {
            0 => (S::Hole, None),
            1 => (S::Delalloc, None),
            2 => (S::Unwritten, Some(place)),
            3 => (S::Shared, Some(place)),
            _ => (S::Written, Some(place)),
        });
        proptest::collection::vec(block, usize::try_from(END).unwrap())
    }

    fn differ(was: (S, Option<u64>), is: (S, Option<u64>)) -> bool {
        match (was.0, is.0) {
            (S::Hole, S::Delalloc) => false,
            (S::Shared, S::Written) => was.1 != is.1,
            _ => was != is,
        }
    }

    fn loosened() -> impl Strategy<Value = Blocks> {
        blocks().prop_map(|mut blocks| {
            for (at, block) in blocks.iter_mut().enumerate() {
                if at % 5 == 0 && block.0 == S::Written {
                    block.0 = S::Loose;
                }
            }
            blocks
        })
    }

    proptest! {
        /// What a pin of strength stable holds stays, and everything else is
        /// taken as it comes.
        #[test]
        fn what_is_stable_is_held_and_what_becomes_so_from_then_on(
            before in loosened(),
            now in loosened(),
            start in 0..END,
            length in 0..END,
        ) {
            let range = start..(start + length).min(END);
            let broken = |at: &u64| {
                let at = usize::try_from(*at).unwrap();
                let (was, is) = (before[at], now[at]);
                let is_there = matches!(is.0, S::Written | S::Loose) && was.1 == is.1;
                was.0 == S::Written && !is_there || was.0 != S::Shared && is.0 == S::Shared
            };
            let broken: Vec<u64> = range.clone().filter(broken).collect();
            let found = difference(true, &map(&before), &map(&now), &range);
            let found = found.map(|found| found.range);
            let span = broken.first().zip(broken.last()).map(|(first, last)| *first..last + 1);
            prop_assert_eq!(found, span);
            let expected: Blocks = (0..END)
                .map(|at| {
                    let place = usize::try_from(at).unwrap();
                    let is_held = before[place].0 == S::Written;
                    if range.contains(&at) && !is_held { now[place] } else { before[place] }
                })
                .collect();
            let grown = grown(&map(&before), &map(&now), &range);
            prop_assert_eq!(grown.is_some(), expected != before);
            prop_assert_eq!(&grown.unwrap_or_else(|| map(&before)), &map(&expected));
        }

        #[test]
        fn it_agrees_with_a_look_at_every_block(
            before in blocks(),
            mut now in blocks(),
            same in proptest::collection::vec(any::<bool>(), usize::try_from(END).unwrap()),
            start in 0..END,
            length in 0..END,
        ) {
            for (at, same) in same.iter().enumerate() {
                if *same {
                    now[at] = before[at];
                }
            }
            let range = start..(start + length).min(END);
            let differing: Vec<u64> = range
                .clone()
                .filter(|at| {
                    let at = usize::try_from(*at).unwrap();
                    differ(before[at], now[at])
                })
                .collect();
            let was_stable =
                |at: &u64| before[usize::try_from(*at).unwrap()].0.is_stable();
            let expected = differing.first().zip(differing.last()).map(|(first, last)| Difference {
                range: *first..last + 1,
                stable: differing.iter().any(was_stable),
            });
            prop_assert_eq!(difference(false, &map(&before), &map(&now), &range), expected);
            let stable: Vec<u64> = differing.iter().copied().filter(was_stable).collect();
            let expected = stable.first().zip(stable.last()).map(|(first, last)| Difference {
                range: *first..last + 1,
                stable: true,
            });
            prop_assert_eq!(difference_of_stable(&map(&before), &map(&now), &range), expected);
        }

        #[test]
        fn a_renewed_map_is_the_old_one_outside_and_the_new_one_inside(
            before in blocks(),
            now in blocks(),
            start in 0..END,
            length in 0..END,
        ) {
            let range = start..(start + length).min(END);
            let expected: Blocks = (0..END)
                .map(|at| {
                    let place = usize::try_from(at).unwrap();
                    if range.contains(&at) { now[place] } else { before[place] }
                })
                .collect();
            let renewed = renewed(&map(&before), &map(&now), &range);
            prop_assert_eq!(&renewed, &map(&expected));
            prop_assert_eq!(difference(false, &renewed, &map(&now), &range), None);
        }
    }
}
