//! What a block map lacks to be stable, and in which pieces to bring that
//! about. Pure.

use mapdirect_model::{BlockMap, ExtentState};
use std::ops::Range;

/// Size and alignment of the pieces a processor maps with one entry of the
/// second level: on x86_64, and on aarch64 with pages of 4 KiB.
pub(super) const HUGE: u64 = 2 << 20;

/// The runs of a block map that are not stable, in file order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Work {
    /// Not allocated.
    pub(super) holes: Vec<Range<u64>>,
    /// Allocated, but not written as far as the filesystem tells.
    pub(super) unwritten: Vec<Range<u64>>,
    /// Shared with other files or ranges.
    pub(super) shared: Vec<Range<u64>>,
}

impl Work {
    pub(super) fn of(map: &BlockMap) -> Self {
        let mut work = Self::default();
        for extent in map.frozen() {
            let runs = match extent.state {
                ExtentState::Hole => &mut work.holes,
                ExtentState::Shared => &mut work.shared,
                _ => &mut work.unwritten,
            };
            append(runs, extent.offset..extent.end());
        }
        work
    }

    pub(super) fn is_none(&self) -> bool {
        self.bytes() == 0
    }

    pub(super) fn bytes(&self) -> u64 {
        total(&self.holes) + total(&self.unwritten) + total(&self.shared)
    }

    /// Bytes of blocks that have to be found: a shared block is copied to a
    /// new one.
    pub(super) fn space(&self) -> u64 {
        total(&self.holes) + total(&self.shared)
    }

    /// What is to be written once the holes are allocated: joined where they
    /// touch, in file order.
    pub(super) fn to_write(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<_> = [&self.holes[..], &self.unwritten].concat();
        runs.sort_unstable_by_key(|run| run.start);
        let mut joined = Vec::new();
        for run in runs {
            append(&mut joined, run);
        }
        joined
    }
}

fn append(runs: &mut Vec<Range<u64>>, run: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ => runs.push(run),
    }
}

/// Bytes of runs.
pub(super) fn total(runs: &[Range<u64>]) -> u64 {
    runs.iter().map(|run| run.end - run.start).sum()
}

/// A run, cut where it crosses a multiple of `grid`.
pub(super) fn pieces(run: &Range<u64>, grid: u64) -> impl Iterator<Item = Range<u64>> {
    let end = run.end;
    let mut at = run.start;
    std::iter::from_fn(move || {
        let start = at;
        at = end.min((start - start % grid).saturating_add(grid));
        (start < end).then_some(start..at)
    })
}

/// A run, cut into powers of two of at most `largest`, each at a multiple of
/// itself, as far as its ends allow.
pub(super) fn powers_of_two(run: &Range<u64>, largest: u64) -> impl Iterator<Item = Range<u64>> {
    let end = run.end;
    let mut at = run.start;
    std::iter::from_fn(move || {
        let start = at;
        let left = end.checked_sub(start).filter(|left| *left > 0)?;
        let aligned = if start == 0 {
            largest
        } else {
            start & start.wrapping_neg()
        };
        let fits = 1 << left.ilog2();
        at = start + aligned.min(largest).min(fits);
        Some(start..at)
    })
}

/// A run, cut where whole huge pieces begin and end. They come first: what is
/// allocated first can be placed with the least regard for others.
pub(super) fn huge_first(run: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let start = run.start.next_multiple_of(HUGE);
    let end = run.end - run.end % HUGE;
    let parts = if start < end {
        [start..end, run.start..start, end..run.end]
    } else {
        [run.clone(), 0..0, 0..0]
    };
    parts.into_iter().filter(|part| !part.is_empty())
}

/// How much of a range can be mapped with huge pages, as far as its blocks
/// go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct HugePieces {
    /// Pieces of 2 MiB, at multiples of 2 MiB in the file, that lie in the
    /// range as a whole.
    pub pieces: u64,
    /// How many of them lie on the device in one run of stable blocks that
    /// begins at a multiple of 2 MiB there, too.
    pub aligned: u64,
}

impl HugePieces {
    pub(super) fn of(map: &BlockMap) -> Self {
        let range = map.range();
        let count = |start: u64, end: u64| (end / HUGE).saturating_sub(start.div_ceil(HUGE));
        let aligned = map
            .extents()
            .iter()
            .filter(|extent| extent.state.is_stable())
            .filter(|extent| {
                extent
                    .physical
                    .is_some_and(|at| at % HUGE == extent.offset % HUGE)
            })
            .map(|extent| count(extent.offset, extent.end()))
            .sum();
        Self {
            pieces: count(range.start, range.end),
            aligned,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mapdirect_proto::{DeviceId, Extent};
    use proptest::prelude::*;

    const DEVICE: DeviceId = DeviceId { major: 7, minor: 1 };

    fn map(range: Range<u64>, extents: Vec<Extent>) -> BlockMap {
        BlockMap::new(DEVICE, 4096, range.end, range, extents)
    }

    fn extents() -> impl Strategy<Value = Vec<Extent>> {
        let state = (0..ExtentState::ALL.len()).prop_map(|at| ExtentState::ALL[at]);
        let extent = (0u64..50, 1u64..50, 0u64..99, state);
        proptest::collection::vec(extent, 0..30).prop_map(|list| {
            let mut at = 0;
            list.into_iter()
                .map(|(gap, length, physical, state)| {
                    let extent = Extent::new(at + gap, Some(physical), length, state);
                    at = extent.end();
                    extent
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn every_byte_that_is_not_stable_is_work_once(
            extents in extents(),
            start in 0u64..500,
            length in 1u64..2000,
        ) {
            let map = map(start..start + length, extents);
            let work = Work::of(&map);
            prop_assert_eq!(work.is_none(), map.is_stable());
            let count = |runs: &[Range<u64>], at: u64| {
                runs.iter().filter(|run| run.contains(&at)).count()
            };
            for at in start..start + length {
                let state = map.find(at).unwrap().state;
                let found = [
                    count(&work.holes, at),
                    count(&work.shared, at),
                    count(&work.unwritten, at),
                ];
                let expected = match state {
                    ExtentState::Written => [0, 0, 0],
                    ExtentState::Hole => [1, 0, 0],
                    ExtentState::Shared => [0, 1, 0],
                    _ => [0, 0, 1],
                };
                prop_assert_eq!(found, expected, "{} is {}", at, state);
                prop_assert_eq!(count(&work.to_write(), at), found[0] + found[2]);
            }
            let runs = work.to_write();
            prop_assert!(runs.is_sorted_by(|one, other| one.end < other.start));
        }

        #[test]
        fn pieces_are_the_run_and_cross_nothing(
            start in 0u64..10_000,
            length in 0u64..10_000,
            grid in 1u64..3000,
        ) {
            let run = start..start + length;
            let mut at = start;
            for piece in pieces(&run, grid) {
                prop_assert_eq!(piece.start, at);
                prop_assert!(!piece.is_empty());
                prop_assert_eq!(piece.start / grid, (piece.end - 1) / grid);
                at = piece.end;
            }
            prop_assert_eq!(at, run.end);
        }

        #[test]
        fn powers_of_two_are_the_run_and_aligned(
            start in 0u64..10_000,
            length in 0u64..10_000,
            largest in 0u32..12,
        ) {
            let run = start..start + length;
            let mut at = start;
            for piece in powers_of_two(&run, 1 << largest) {
                prop_assert_eq!(piece.start, at);
                let length = piece.end - piece.start;
                prop_assert!(length.is_power_of_two() && length <= 1 << largest);
                prop_assert!(piece.start.is_multiple_of(length));
                at = piece.end;
            }
            prop_assert_eq!(at, run.end);
        }

        #[test]
        fn huge_pieces_come_first_and_nothing_is_left_out(
            start in 0..5 * HUGE,
            length in 1..9 * HUGE,
        ) {
            let run = start..start + length;
            let mut parts: Vec<_> = huge_first(&run).collect();
            let first = parts[0].clone();
            let whole = run.end / HUGE > run.start.div_ceil(HUGE);
            let aligned = first.start.is_multiple_of(HUGE) && first.end.is_multiple_of(HUGE);
            prop_assert!(aligned || !whole);
            parts.sort_unstable_by_key(|part| part.start);
            let mut at = start;
            for part in parts {
                prop_assert_eq!(part.start, at);
                at = part.end;
            }
            prop_assert_eq!(at, run.end);
        }

        #[test]
        fn huge_pieces_are_counted_one_by_one(
            cuts in proptest::collection::vec((1u64..9, 0u64..3), 1..20),
            start in 0u64..4,
        ) {
            // In units of half a huge piece, so that things do not fit.
            let unit = HUGE / 2;
            let mut at = start * unit;
            let extents: Vec<_> = cuts
                .into_iter()
                .map(|(length, shift)| {
                    let physical = at + shift * unit + 64 * HUGE * shift;
                    let extent =
                        Extent::new(at, Some(physical), length * unit, ExtentState::Written);
                    at = extent.end();
                    extent
                })
                .collect();
            let map = map(start * unit..at, extents);
            let range = map.range();
            let mut expected = HugePieces::default();
            let mut piece = range.start.next_multiple_of(HUGE);
            while piece + HUGE <= range.end {
                expected.pieces += 1;
                let extent = map.find(piece).unwrap();
                let physical = extent.physical.unwrap() + piece - extent.offset;
                let fits = extent.end() >= piece + HUGE && physical.is_multiple_of(HUGE);
                expected.aligned += u64::from(fits);
                piece += HUGE;
            }
            prop_assert_eq!(HugePieces::of(&map), expected);
        }
    }

    #[test]
    fn a_shared_block_needs_another() {
        let shared = Extent::new(4096, Some(8192), 4096, ExtentState::Shared);
        let unwritten = Extent::new(8192, Some(0), 4096, ExtentState::Unwritten);
        let work = Work::of(&map(0..12_288, vec![shared, unwritten]));
        assert_eq!(work.space(), 8192);
        assert_eq!(work.bytes(), 12_288);
        assert_eq!(work.to_write(), [0..4096, 8192..12_288]);
    }
}
