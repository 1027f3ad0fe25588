//! Properties of the contract that can be said in a sentence each.

use super::geometry::intersects;
use super::*;
use crate::extent::{BlockMap, DeviceId, Extent, ExtentState};
use OperationKind as K;
use proptest::prelude::*;
use std::ops::Range;

const BLOCK: u64 = 4096;

fn map(size: u64, range: Range<u64>, states: &[ExtentState]) -> BlockMap {
    let extents = states.iter().enumerate().map(|(at, state)| {
        let offset = at as u64 * BLOCK;
        let physical = (*state != ExtentState::Hole).then_some((1 << 30) + 7 * offset);
        Extent::new(offset, physical, BLOCK, *state)
    });
    let device = DeviceId { major: 7, minor: 0 };
    let block = u32::try_from(BLOCK).unwrap();
    BlockMap::new(device, block, size, range, extents)
}

/// A pin without folios around it.
fn pin(map: &BlockMap, whole_file: bool) -> Pinned {
    Pinned::new(map, whole_file, Geometry::of_pages(4096)).apart(Apart::Without)
}

fn may(kind: K, range: Range<u64>, pinned: &Pinned, size: u64) -> bool {
    !Layers::of(pinned).refuses(&Operation::new(kind, range), size, 0)
}

/// What each operation does to single blocks, spelled out one block at a
/// time: the meaning the table must have.
fn blocks_changed(kind: K, range: &Range<u64>, map: &BlockMap, size: u64) -> bool {
    let block_range = |at: u64| at * BLOCK..(at + 1) * BLOCK;
    let blocks = map.range().start / BLOCK..map.range().end / BLOCK;
    blocks.into_iter().any(|at| {
        let block = block_range(at);
        let state = map.find(block.start).unwrap().state;
        let inside = intersects(range, &block);
        let beyond = block.end > range.start;
        let tail_of_file = !size.is_multiple_of(BLOCK) && at == size / BLOCK;
        let grown = range.end > size && tail_of_file && state == ExtentState::Shared;
        match kind {
            K::Write | K::Allocate => inside && !state.is_stable() || grown,
            K::AllocateKeepSize | K::MapWrite => inside && !state.is_stable(),
            K::PunchHole | K::Exchange | K::Dedupe => inside,
            K::ZeroRange | K::WriteZeroes | K::UnshareRange | K::Clone | K::CopyRange => {
                inside || grown
            }
            K::CollapseRange | K::InsertRange => beyond,
            K::Truncate => {
                // Bytes of the file that were in the block go, or a block
                // that was allocated beyond the end of it.
                range.start < block.end.min(map.file_size()).max(block.start)
                    && block.start < map.file_size()
                    || block.start >= map.file_size()
                        && state != ExtentState::Hole
                        && range.start < block.end
                    // It is copied to be zeroed behind the new end.
                    || state == ExtentState::Shared && block.start < range.start && range.start < block.end
                    || grown
            }
            _ => unreachable!(),
        }
    })
}

fn any_state() -> impl Strategy<Value = ExtentState> {
    prop_oneof![
        Just(ExtentState::Written),
        Just(ExtentState::Unwritten),
        Just(ExtentState::Hole),
        Just(ExtentState::Shared),
    ]
}

const PRECISE: [K; 14] = [
    K::Write,
    K::Allocate,
    K::AllocateKeepSize,
    K::MapWrite,
    K::PunchHole,
    K::ZeroRange,
    K::WriteZeroes,
    K::UnshareRange,
    K::CollapseRange,
    K::InsertRange,
    K::Clone,
    K::Dedupe,
    K::CopyRange,
    K::Exchange,
];

proptest! {
    #[test]
    fn the_table_means_what_happens_to_blocks(
        states in proptest::collection::vec(any_state(), 1..12),
        first in 0u64..11,
        count in 1u64..12,
        size in 1u64..12 * BLOCK,
        start in 0u64..13 * BLOCK,
        length in 1u64..5 * BLOCK,
        kind in proptest::sample::select(&PRECISE[..]),
    ) {
        let range = first * BLOCK..(first + count) * BLOCK;
        let map = map(size, range, &states);
        let pinned = pin(&map, false);
        let operation = start..start + length;
        let expected = !blocks_changed(kind, &operation, &map, size);
        prop_assert_eq!(may(kind, operation, &pinned, size), expected);
    }

    #[test]
    fn truncation_keeps_every_byte_of_the_pin(
        states in proptest::collection::vec(any_state(), 1..12),
        first in 0u64..11,
        count in 1u64..12,
        size in 1u64..12 * BLOCK,
        new_size in 0u64..14 * BLOCK,
    ) {
        let range = first * BLOCK..(first + count) * BLOCK;
        let map = map(size, range, &states);
        let pinned = pin(&map, false);
        let operation = new_size..new_size;
        let expected = !blocks_changed(K::Truncate, &operation, &map, size);
        // Where the whole pin lies beyond the end of file there are no
        // bytes to lose, and the rule may refuse a little more.
        prop_assume!(map.range().start < size);
        prop_assert_eq!(may(K::Truncate, operation, &pinned, size), expected);
    }

    #[test]
    fn a_pin_out_of_reach_never_minds(
        states in proptest::collection::vec(any_state(), 1..12),
        first in 0u64..11,
        count in 1u64..12,
        size in 1u64..12 * BLOCK,
        start in 0u64..13 * BLOCK,
        length in 0u64..5 * BLOCK,
        append in any::<bool>(),
        kind in proptest::sample::select(RULES.map(|rule| rule.kind).to_vec()),
    ) {
        let map = map(size, first * BLOCK..(first + count) * BLOCK, &states);
        let pinned = pin(&map, false);
        let mut operation = Operation::new(kind, start..start + length);
        operation.or = append.then_some(size..size + length);
        let reach = operation.reach(size);
        if !intersects(&reach, &map.range()) {
            prop_assert!(!Layers::of(&pinned).refuses(&operation, size, 0));
        }
    }

    #[test]
    fn less_certainty_never_allows_more(
        states in proptest::collection::vec(any_state(), 1..12),
        size in 1u64..12 * BLOCK,
        start in 0u64..13 * BLOCK,
        length in 1u64..5 * BLOCK,
        kind in proptest::sample::select(&PRECISE[4..12]),
    ) {
        let map = map(size, BLOCK..5 * BLOCK, &states);
        let pinned = pin(&map, false);
        let range = start..start + length;
        let pages = start - start % BLOCK..(start + length).next_multiple_of(BLOCK);
        // A range rounded out to pages, a fallocate of unknown mode, an
        // unknown operation: each refuses whatever the former refuses.
        let exact = may(kind, range.clone(), &pinned, size);
        let rounded = may(kind, pages.clone(), &pinned, size);
        prop_assert!(exact || !rounded);
        if !matches!(kind, K::Clone | K::Dedupe) {
            prop_assert!(exact || !may(K::Reshape, pages, &pinned, size));
        }
        prop_assert!(!may(K::Unknown, range, &pinned, size));
    }
}

#[test]
fn reading_is_always_allowed() {
    let map = map(8 * BLOCK, 0..8 * BLOCK, &[ExtentState::Shared; 8]);
    for whole in [false, true] {
        let pinned = pin(&map, whole);
        for kind in [K::Read, K::OpenRead, K::MapRead] {
            assert!(may(kind, 0..u64::MAX, &pinned, 8 * BLOCK));
        }
    }
}

#[test]
fn the_end_of_a_pin_is_capped_by_the_size_of_the_file() {
    // 5000 bytes, pinned to the end of their second block.
    let map = map(5000, 0..2 * BLOCK, &[ExtentState::Written; 2]);
    let pinned = pin(&map, false);
    assert!(may(K::Truncate, 5000..5000, &pinned, 5000));
    assert!(!may(K::Truncate, 4999..4999, &pinned, 5000));
    assert!(may(K::Truncate, 1 << 40..1 << 40, &pinned, 5000));
}

#[test]
fn blocks_beyond_the_end_are_kept_too() {
    use ExtentState::{Hole, Unwritten, Written};
    let map = map(
        BLOCK,
        0..6 * BLOCK,
        &[Written, Hole, Unwritten, Hole, Hole, Hole],
    );
    let pinned = pin(&map, false);
    assert!(!may(K::Truncate, BLOCK..BLOCK, &pinned, BLOCK));
    assert!(!may(K::Truncate, 2 * BLOCK..2 * BLOCK, &pinned, BLOCK));
    assert!(may(K::Truncate, 3 * BLOCK..3 * BLOCK, &pinned, BLOCK));
}

#[test]
fn a_whole_file_keeps_its_size() {
    let map = map(2 * BLOCK, 0..2 * BLOCK, &[ExtentState::Written; 2]);
    let pinned = pin(&map, true);
    let size = 2 * BLOCK;
    assert!(may(K::Truncate, size..size, &pinned, size));
    assert!(!may(K::Truncate, size + 1..size + 1, &pinned, size));
    assert!(may(K::Write, 0..size, &pinned, size));
    assert!(!may(K::Write, size - 1..size + 1, &pinned, size));
    assert!(!may(K::AllocateKeepSize, size..size + BLOCK, &pinned, size));
}

#[test]
fn growing_spares_a_shared_end_of_file() {
    let map = map(
        5000,
        0..2 * BLOCK,
        &[ExtentState::Written, ExtentState::Shared],
    );
    let pinned = pin(&map, false);
    assert!(!may(K::Write, 100_000..100_001, &pinned, 5000));
    assert!(!may(K::Truncate, 100_000..100_000, &pinned, 5000));
    let written = pin(
        &self::map(5000, 0..2 * BLOCK, &[ExtentState::Written; 2]),
        false,
    );
    assert!(may(K::Write, 100_000..100_001, &written, 5000));
}

#[test]
fn pins_that_disagree_on_the_size_leave_none() {
    let whole = |blocks: u64| {
        let states = vec![ExtentState::Written; usize::try_from(blocks).unwrap()];
        let map = map(blocks * BLOCK, 0..blocks * BLOCK, &states);
        Layers::of(&pin(&map, true))
    };
    for pins in [[whole(3), whole(2)], [whole(2), whole(3)]] {
        let all = Layers::all(&pins);
        for size in [2 * BLOCK, 3 * BLOCK, 4 * BLOCK] {
            let truncate = Operation::new(K::Truncate, size..size);
            assert!(all.refuses(&truncate, size, 0));
        }
    }
}
