//! Plans how each part of a range is mapped. Pure.
//!
//! A page is the smallest unit of a mapping, and of what a store affects. So
//! when blocks are smaller than pages, a page may contain blocks in several
//! states. Only those blocks of a page count that are inside the pinned range
//! and before the end of the file. Behind the end there is nothing to store to,
//! and the gate keeps it so.

use crate::extent::{BlockMap, ExtentState};
use std::ops::Range;

/// How a run of pages is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// The file itself: every block is written, and used by this file alone.
    Stable,
    /// Memory that reads as zeros and raises SIGBUS on a store: holes and
    /// unwritten blocks.
    Zeros,
    /// Memory with a copy of the bytes, which raises SIGBUS on a store: pages
    /// that contain blocks in several states. Nobody may write to such pages
    /// while they are pinned, so the copy stays true.
    Copied,
    /// Memory that raises SIGBUS on every access: shared blocks, and pages
    /// wholly beyond the end of the file.
    Faulting,
}

/// A run of pages that are mapped alike, in bytes of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The bytes, as whole pages.
    pub range: Range<u64>,
    /// How they are mapped.
    pub pages: Pages,
}

/// How a range is mapped: segments in file order, without gaps. Neighbours are
/// mapped differently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    segments: Vec<Segment>,
    page: u64,
}

impl Plan {
    /// Plans the mapping of `length` bytes from `offset`, which must be at a
    /// page boundary. The block map `map` must cover those bytes.
    pub fn new(map: &BlockMap, offset: u64, length: u64, page: u64) -> Self {
        let mut plan = Self {
            segments: Vec::new(),
            page,
        };
        let end = offset + length.next_multiple_of(page);
        // Pages behind this offset cannot be accessed.
        let file_end = map.file_size().next_multiple_of(page).clamp(offset, end);
        let extents = map.extents();
        let mut at = offset;
        let mut next = extents.partition_point(|extent| extent.end() <= offset);
        while at < file_end {
            let Some(extent) = extents.get(next) else {
                break;
            };
            if extent.end() <= at {
                next += 1;
                continue;
            }
            // First the whole pages of one extent, then the page that it shares
            // with others.
            let whole = extent.end() - extent.end() % page;
            if whole > at && extent.offset <= at {
                let until = whole.min(file_end);
                plan.push(at..until, Pages::of(extent.state));
                at = until;
            } else {
                let until = at + page;
                plan.push(at..until, mixed(map, at..until));
                at = until;
            }
        }
        // An empty file has nothing here. A map that ends before the file would
        // have nothing here either, but no map does.
        plan.push(at..end, Pages::Faulting);
        plan
    }

    fn push(&mut self, range: Range<u64>, pages: Pages) {
        if range.is_empty() {
            return;
        }
        match self.segments.last_mut() {
            Some(last) if last.pages == pages => last.range.end = range.end,
            _ => self.segments.push(Segment { range, pages }),
        }
    }

    /// This plan, with everything stable that is stable in `now`, a plan of the
    /// same range. Also returns that as segments.
    pub fn with_stable_of(&self, now: &Self) -> (Self, Vec<Segment>) {
        let mut plan = Self {
            segments: Vec::new(),
            page: self.page,
        };
        let mut added = Vec::new();
        let mut next = 0;
        for segment in &self.segments {
            let mut at = segment.range.start;
            while at < segment.range.end {
                let Some(other) = now.segments.get(next) else {
                    plan.push(at..segment.range.end, segment.pages);
                    break;
                };
                let until = segment.range.end.min(other.range.end);
                let becomes = other.pages == Pages::Stable && segment.pages != Pages::Stable;
                if becomes {
                    added.push(Segment {
                        range: at..until,
                        pages: Pages::Stable,
                    });
                }
                plan.push(
                    at..until,
                    if becomes {
                        Pages::Stable
                    } else {
                        segment.pages
                    },
                );
                at = until;
                if at == other.range.end {
                    next += 1;
                }
            }
        }
        (plan, added)
    }

    /// The segments, in file order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The number of bytes in a page.
    pub fn page(&self) -> u64 {
        self.page
    }

    /// Whether the whole plan is the file itself.
    #[inline]
    pub fn is_stable(&self) -> bool {
        matches!(
            &self.segments[..],
            [Segment {
                pages: Pages::Stable,
                ..
            }]
        )
    }

    /// The offset in the file of the first page that is the file itself.
    pub fn first_stable(&self) -> Option<u64> {
        let mut segments = self.segments.iter();
        segments
            .find(|segment| segment.pages == Pages::Stable)
            .map(|segment| segment.range.start)
    }

    /// The number of memory mappings that the plan needs. Neighbours that are
    /// not the file itself become one mapping, except for copies, which are
    /// separate.
    pub fn mappings(&self) -> usize {
        let kind = |segment: &Segment| match segment.pages {
            Pages::Stable => 0,
            Pages::Copied => 1,
            Pages::Zeros | Pages::Faulting => 2,
        };
        self.segments
            .chunk_by(|one, next| kind(one) == kind(next))
            .count()
    }

    /// This plan, with `range` stable, whatever it was.
    pub fn assuming_stable(&self, range: &Range<u64>) -> Self {
        let start = range.start - range.start % self.page;
        let end = range.end.next_multiple_of(self.page);
        self.with(&(start..end), Pages::Stable)
    }

    /// This plan, with `range` mapped as `pages`.
    pub fn with(&self, range: &Range<u64>, pages: Pages) -> Self {
        let mut plan = Self {
            segments: Vec::new(),
            page: self.page,
        };
        for segment in &self.segments {
            let (start, end) = (segment.range.start, segment.range.end);
            let inside = range.start.clamp(start, end)..range.end.clamp(start, end);
            plan.push(start..inside.start, segment.pages);
            plan.push(inside.clone(), pages);
            plan.push(inside.end..end, segment.pages);
        }
        plan
    }

    /// Maximal runs of segments that are not the file itself.
    pub fn frozen_runs(&self) -> impl Iterator<Item = &[Segment]> {
        self.segments
            .split(|segment| segment.pages == Pages::Stable)
            .filter(|run| !run.is_empty())
    }

    /// The first byte of `range` that may not be read (`Access::Load`) or
    /// stored to (`Access::Store`), and how its page is mapped.
    pub fn obstacle(&self, range: Range<u64>, access: Access) -> Option<(u64, Pages)> {
        let first = self
            .segments
            .partition_point(|segment| segment.range.end <= range.start);
        self.segments[first..]
            .iter()
            .take_while(|segment| segment.range.start < range.end)
            .find(|segment| match (segment.pages, access) {
                (Pages::Stable, _) | (Pages::Zeros | Pages::Copied, Access::Load) => false,
                (Pages::Zeros | Pages::Copied, Access::Store) | (Pages::Faulting, _) => true,
            })
            .map(|segment| (segment.range.start.max(range.start), segment.pages))
    }

    /// Whether huge pages of `huge` bytes fit into a part that is the file
    /// itself.
    pub fn has_room_for(&self, huge: u64) -> bool {
        self.segments.iter().any(|segment| {
            segment.pages == Pages::Stable
                && segment
                    .range
                    .start
                    .checked_next_multiple_of(huge)
                    .is_some_and(|start| {
                        segment
                            .range
                            .end
                            .checked_sub(start)
                            .is_some_and(|left| left >= huge)
                    })
        })
    }
}

/// A kind of memory access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A read.
    Load,
    /// A write.
    Store,
}

impl Pages {
    /// The mapping of whole pages whose blocks are all in one state.
    fn of(state: ExtentState) -> Self {
        match state {
            ExtentState::Written => Self::Stable,
            ExtentState::Hole | ExtentState::Unwritten => Self::Zeros,
            _ => Self::Faulting,
        }
    }
}

/// The mapping of a page in which several extents meet, or which contains the
/// end of the pinned range.
fn mixed(map: &BlockMap, page: Range<u64>) -> Pages {
    let block = u64::from(map.block_size()).max(1);
    let file_end = map.file_size().next_multiple_of(block);
    let counts = page.start..page.end.min(file_end).min(map.range().end);
    let mut found = None;
    let mut at = counts.start;
    while at < counts.end {
        let Some(extent) = map.find(at) else {
            return Pages::Faulting;
        };
        let pages = Pages::of(extent.state);
        if found.is_some_and(|found| found != pages) {
            return Pages::Copied;
        }
        found = Some(pages);
        at = extent.end();
    }
    found.unwrap_or(Pages::Faulting)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::{DeviceId, Extent};
    use proptest::prelude::*;

    const PAGE: u64 = 4096;

    fn map(block: u32, size: u64, blocks: Range<u64>, states: &[ExtentState]) -> BlockMap {
        let length = u64::from(block);
        let extents: Vec<_> = states
            .iter()
            .enumerate()
            .map(|(at, state)| {
                let offset = (blocks.start + at as u64) * length;
                let physical = (*state != ExtentState::Hole).then_some((1 << 30) + offset);
                Extent::new(offset, physical, length, *state)
            })
            .collect();
        let device = DeviceId { major: 7, minor: 0 };
        let range = blocks.start * length..blocks.end * length;
        BlockMap::new(device, block, size, range, extents)
    }

    fn state() -> impl Strategy<Value = ExtentState> {
        prop_oneof![
            3 => Just(ExtentState::Written),
            2 => Just(ExtentState::Hole),
            2 => Just(ExtentState::Unwritten),
            1 => Just(ExtentState::Shared),
        ]
    }

    proptest! {
        /// What the plan must mean, spelled out a page at a time.
        #[test]
        fn every_page_is_what_its_blocks_are(
            small in any::<bool>(),
            first in 0u64..3,
            states in proptest::collection::vec(state(), 1..40),
            end in 0u64..45 * 4096,
            cut in 0u64..4096,
        ) {
            let block: u32 = if small { 1024 } else { 4096 };
            let per_page = PAGE / u64::from(block);
            let start = first * per_page;
            let blocks = start..start + states.len() as u64;
            let offset = first * PAGE;
            let pinned = states.len() as u64 * u64::from(block);
            // Asked for in bytes, rounded out to blocks by the pin.
            let length = (pinned - cut.min(u64::from(block) - 1)).max(1);
            let map = map(block, end, blocks.clone(), &states);
            let plan = Plan::new(&map, offset, length, PAGE);

            let mut at = offset;
            for segment in plan.segments() {
                prop_assert_eq!(segment.range.start, at);
                prop_assert!(segment.range.end > at && segment.range.end % PAGE == 0);
                at = segment.range.end;
            }
            prop_assert_eq!(at, offset + length.next_multiple_of(PAGE));
            prop_assert!(plan.segments().windows(2).all(|pair| pair[0].pages != pair[1].pages));

            for segment in plan.segments() {
                for page in (segment.range.start..segment.range.end).step_by(4096) {
                    let states: Vec<_> = (page / u64::from(block)..(page + PAGE) / u64::from(block))
                        .filter(|at| blocks.contains(at) && at * u64::from(block) < end)
                        .map(|at| states[usize::try_from(at - start).unwrap()])
                        .collect();
                    let all = |wanted: &[ExtentState]| {
                        states.iter().all(|state| wanted.contains(state))
                    };
                    let expected = if states.is_empty() || all(&[ExtentState::Shared]) {
                        Pages::Faulting
                    } else if all(&[ExtentState::Written]) {
                        Pages::Stable
                    } else if all(&[ExtentState::Hole, ExtentState::Unwritten]) {
                        Pages::Zeros
                    } else {
                        Pages::Copied
                    };
                    prop_assert_eq!(segment.pages, expected, "page {}", page);
                    for access in [Access::Load, Access::Store] {
                        let may = match access {
                            Access::Load => expected != Pages::Faulting,
                            Access::Store => expected == Pages::Stable,
                        };
                        let found = plan.obstacle(page + 7..page + 9, access);
                        prop_assert_eq!(found.is_none(), may);
                        prop_assert!(found.is_none_or(|found| found == (page + 7, expected)));
                    }
                }
            }

            let runs: Vec<_> = plan.frozen_runs().collect();
            let stable = plan.segments().iter().filter(|one| one.pages == Pages::Stable).count();
            prop_assert!(plan.mappings() >= runs.len() + stable);
            prop_assert!(plan.mappings() <= plan.segments().len());
            prop_assert!(runs.len().abs_diff(stable) <= 1);
            prop_assert_eq!(plan.is_stable(), runs.is_empty());
        }
    }

    proptest! {
        #[test]
        fn only_what_is_stable_now_changes(
            before in proptest::collection::vec(state(), 1..40),
            now in proptest::collection::vec(state(), 40),
        ) {
            let count = before.len() as u64;
            let plan = |states: &[ExtentState]| {
                let map = map(4096, 1 << 40, 0..count, states);
                Plan::new(&map, 0, count * PAGE, PAGE)
            };
            let (old, new) = (plan(&before), plan(&now[..before.len()]));
            let (both, added) = old.with_stable_of(&new);
            for at in 0..count {
                let becomes = pages(&new, at) == Some(Pages::Stable)
                    && pages(&old, at) != Some(Pages::Stable);
                let expected = if becomes { Some(Pages::Stable) } else { pages(&old, at) };
                prop_assert_eq!(pages(&both, at), expected);
                let is_added = added.iter().any(|one| one.range.contains(&(at * PAGE)));
                prop_assert_eq!(is_added, becomes);
            }
            prop_assert!(both.segments.windows(2).all(|pair| pair[0].pages != pair[1].pages));
            // A part of it taken for something else.
            let part = count / 3 * PAGE..count * PAGE * 2 / 3 / PAGE * PAGE;
            let faulting = old.with(&part, Pages::Faulting);
            let assumed = old.assuming_stable(&part);
            for at in 0..count {
                let inside = part.contains(&(at * PAGE));
                let expected = |pages| if inside { Some(pages) } else { self::pages(&old, at) };
                prop_assert_eq!(self::pages(&faulting, at), expected(Pages::Faulting));
                prop_assert_eq!(self::pages(&assumed, at), expected(Pages::Stable));
            }
        }
    }

    fn pages(plan: &Plan, at: u64) -> Option<Pages> {
        let byte = at * PAGE;
        let found = plan.segments.iter().find(|one| one.range.contains(&byte));
        found.map(|one| one.pages)
    }

    #[test]
    fn huge_pages_need_an_aligned_piece_of_the_file_itself() {
        const HUGE: u64 = 2 << 20;
        let plan = |start: u64, pages: usize, state| {
            let blocks = start..start + pages as u64;
            let map = map(4096, 1 << 40, blocks, &vec![state; pages]);
            Plan::new(&map, start * PAGE, pages as u64 * PAGE, PAGE)
        };
        assert!(plan(0, 512, ExtentState::Written).has_room_for(HUGE));
        assert!(!plan(0, 511, ExtentState::Written).has_room_for(HUGE));
        assert!(!plan(1, 1022, ExtentState::Written).has_room_for(HUGE));
        assert!(plan(1, 1023, ExtentState::Written).has_room_for(HUGE));
        assert!(!plan(0, 512, ExtentState::Hole).has_room_for(HUGE));
    }

    #[test]
    fn what_a_map_does_not_cover_faults() {
        let map = map(4096, 0, 0..4, &[ExtentState::Hole; 4]);
        let plan = Plan::new(&map, 0, 4 * PAGE, PAGE);
        let all = Segment {
            range: 0..4 * PAGE,
            pages: Pages::Faulting,
        };
        assert_eq!(plan.segments(), [all]);
        assert_eq!(plan.mappings(), 1);
    }
}
