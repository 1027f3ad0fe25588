//! All pins of an inode in one: what an operation may not meet, as sorted
//! runs, one list for each reason. Pure.
//!
//! The bpf gate judges in the kernel, where there is no room to ask pin after
//! pin: it looks whether a range meets a list. [`Layers::refuses`] is that
//! judgement in Rust; `gate/bpf/prog/judge.h` is the same in C, and a test
//! asks both the same questions. It refuses what [`judge`](super::judge) and
//! [`Pinned::minds_beside`] refuse for any of the pins.

use super::{
    Apart, LARGEST_BLOCK, Mapped, Meets, Operation, OperationKind, Pinned, RULES, Reach, Rule,
    Traits, folio_page, folio_size, rounded_out,
};
use crate::extent::ExtentState;
use std::ops::Range;

/// Why an operation may not meet a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    /// It is pinned.
    Pinned,
    /// It is pinned and frozen.
    Frozen,
    /// It lies beside a pin, and writing to it takes blocks of the pin along.
    Beside,
    /// It is pinned, and zeroing a part of it copies it.
    Shared,
    /// Nothing may come to be shared there, nor be written to untorn.
    Window,
    /// Pages that must stay in the page cache.
    Held,
    /// A store to a mapping of it may allocate or copy frozen blocks.
    Mapped,
    /// A write to it may make the file grow, and allocate ahead into a pin;
    /// see [`Beside::grows_into`](super::Beside::grows_into).
    Ahead,
    /// What comes to be unwritten there becomes one extent with a pin's.
    Edges,
    /// Folios of unwritten blocks of a pin, all of which is dirty when a part
    /// of it is written to, or zeroed.
    Coarse,
}

/// How many lists there are.
pub const LISTS: usize = 10;

/// What the pins of an inode keep still.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layers {
    lists: [Vec<Range<u64>>; LISTS],
    /// Sizes below this are refused.
    pub size_floor: u64,
    /// The only size there may be.
    pub fixed_size: Option<u64>,
    /// The largest size there may be.
    pub largest_size: Option<u64>,
    /// Until the file has grown to `size_floor`, a write that would make it
    /// grow and fails frees blocks of a pin; see
    /// [`Beside::failing_frees`](super::Beside::failing_frees).
    pub failing_frees: bool,
    /// Bytes in a block.
    pub block: u64,
}

impl Layers {
    /// Those of all pins of an inode. Where a
    /// write to a part of a folio makes all of it dirty (`coarse`: XFS before
    /// Linux 6.6 without DAX), unwritten blocks that share one with it are
    /// converted, too, so they keep the whole folio from being written to, and
    /// from being zeroed in.
    #[must_use]
    pub fn new<'a>(pins: impl IntoIterator<Item = &'a Pinned>, coarse: bool) -> Self {
        let mut layers = Self {
            lists: Default::default(),
            size_floor: 0,
            fixed_size: None,
            largest_size: None,
            failing_frees: false,
            block: 1,
        };
        for pin in pins {
            layers.add(pin, coarse);
        }
        for list in &mut layers.lists {
            join(list);
        }
        layers
    }

    fn add(&mut self, pin: &Pinned, coarse: bool) {
        self.block = pin.block;
        self.size_floor = self.size_floor.max(pin.size_floor);
        self.fixed_size = self.fixed_size.or(pin.size);
        if matches!(&pin.mapped, Some(Mapped { tail: Some(_) })) {
            let largest = self.largest_size.unwrap_or(u64::MAX);
            self.largest_size = Some(largest.min(pin.file_size));
        }
        self.push(List::Ahead, pin.ahead());
        self.failing_frees |= pin.beside.failing_frees;
        for edge in &pin.beside.edges {
            self.push(List::Edges, edge.clone());
        }
        self.push(List::Pinned, pin.range.clone());
        for (run, state) in &pin.frozen {
            self.push(List::Frozen, run.clone());
            if matches!(state, ExtentState::Shared | ExtentState::Unknown) {
                self.push(List::Shared, run.clone());
            }
            if coarse && *state == ExtentState::Unwritten {
                self.push(List::Coarse, super::folios(run));
            }
        }
        for run in &pin.beside.frozen {
            // What of it lies inside is frozen.
            self.push(List::Beside, run.clone());
        }
        if let Some(window) = &pin.beside.window {
            self.push(List::Window, window.clone());
        }
        if let Apart::Held(held) = &pin.apart {
            let page = mapdirect_sys::mmap::page_size();
            for offset in held {
                self.push(List::Held, *offset..offset.saturating_add(page));
            }
        }
        self.add_mapped(pin);
    }

    /// What [`Pinned::may_store_to`] and [`Pinned::shares_folios`] say no to.
    fn add_mapped(&mut self, pin: &Pinned) {
        let end = pin.file_size.next_multiple_of(pin.block);
        let held = pin.size.is_some() || matches!(&pin.mapped, Some(Mapped { tail: Some(_) }));
        let ignored = if held { end..folio_page(end) } else { end..end };
        for (run, _) in &pin.frozen {
            match &pin.apart {
                Apart::No => self.push(List::Mapped, super::folios(run)),
                Apart::Without => {}
                Apart::Held(_) if run.end > end => {
                    let folio = folio_size();
                    let start = run.start.max(end);
                    let from = (start - start % folio).max(folio_page(end));
                    self.push(List::Mapped, from..u64::MAX);
                }
                Apart::Held(_) => {}
            }
            self.push_outside(List::Mapped, run, &ignored);
        }
    }

    fn push(&mut self, list: List, run: Range<u64>) {
        if run.start < run.end {
            self.lists[list as usize].push(run);
        }
    }

    fn push_outside(&mut self, list: List, run: &Range<u64>, inside: &Range<u64>) {
        self.push(list, run.start..run.end.min(inside.start));
        self.push(list, run.start.max(inside.end)..run.end);
    }

    /// A list: sorted, disjoint.
    #[must_use]
    pub fn list(&self, list: List) -> &[Range<u64>] {
        &self.lists[list as usize]
    }

    /// All lists, in the order of [`List`].
    #[must_use]
    pub fn lists(&self) -> &[Vec<Range<u64>>; LISTS] {
        &self.lists
    }

    /// Whether there are blocks that nobody may store to through a mapping,
    /// wherever that begins.
    #[must_use]
    pub fn has_frozen(&self) -> bool {
        [List::Frozen, List::Beside]
            .into_iter()
            .any(|list| !self.list(list).is_empty())
    }

    /// Whether no write is refused, wherever in the file it goes: unless it is
    /// untorn.
    #[must_use]
    pub fn lets_writes_pass(&self) -> bool {
        const MATTER: [List; 7] = [
            List::Frozen,
            List::Beside,
            List::Shared,
            List::Held,
            List::Ahead,
            List::Edges,
            List::Coarse,
        ];
        MATTER.iter().all(|list| self.list(*list).is_empty())
            && self.largest_size.is_none()
            && !self.failing_frees
    }

    fn meets(&self, list: List, range: &Range<u64>) -> bool {
        let runs = self.list(list);
        let first = runs.partition_point(|run| run.end <= range.start);
        range.start < range.end && runs.get(first).is_some_and(|run| run.start < range.end)
    }

    /// Whether an operation on a file of `size` bytes is refused.
    #[must_use]
    pub fn refuses(&self, operation: &Operation, size: u64) -> bool {
        let kind = operation.kind;
        let rule = kind.rule();
        let traits = Traits::of(kind);
        let ranges = || std::iter::once(&operation.range).chain(&operation.or);
        let largest = ranges().map(|range| range.end).max().unwrap_or(0);
        if ranges().any(|range| self.refuses_range(rule, range, size)) {
            return true;
        }
        if rule.grows && self.largest_size.is_some_and(|most| largest > most) {
            return true;
        }
        let lets_go = |range| traits.lets_go.pages(range, operation.direct, self.block);
        if ranges()
            .filter_map(lets_go)
            .any(|pages| self.meets(List::Held, &pages))
        {
            return true;
        }
        if traits.brings_shared && self.meets(List::Window, &brings_to(rule, operation, size)) {
            return true;
        }
        if kind.writes_data() && ranges().any(|range| self.meets(List::Ahead, range)) {
            return true;
        }
        if self.failing_frees && kind.writes_data() && size < self.size_floor && largest > size {
            return true;
        }
        if kind.leaves_unwritten() && ranges().any(|range| self.refuses_edge(rule, range)) {
            return true;
        }
        let moved = operation.range.start..u64::MAX;
        if kind == OperationKind::InsertRange
            && !self.list(List::Window).is_empty()
            && self.meets(List::Beside, &moved)
        {
            return true;
        }
        let untorn = kind == OperationKind::WriteUntorn;
        if traits.touches && ranges().any(|range| self.minds_range(range, untorn)) {
            return true;
        }
        if traits.touches && ranges().any(|range| self.dirties_folios(kind, range)) {
            return true;
        }
        let last = size - size % self.block..size;
        rule.grows
            && largest > size
            && !last.is_empty()
            && (self.minds_range(&last, untorn) || self.meets(List::Coarse, &last))
    }

    fn refuses_range(&self, rule: &Rule, range: &Range<u64>, size: u64) -> bool {
        let reach = match rule.reach {
            Reach::Nothing => return false,
            Reach::Everything => return true,
            Reach::Range => super::reach_of(rule.kind, range, size),
            Reach::ToTheEnd => range.start..u64::MAX,
            Reach::BeyondSize => {
                let resized = self.fixed_size.is_some_and(|size| *range != (size..size));
                if range.start < self.size_floor || resized {
                    return true;
                }
                0..0
            }
        };
        let list = match rule.refused_on {
            Meets::Any => List::Pinned,
            Meets::Frozen if rule.kind == OperationKind::MapWrite => List::Mapped,
            Meets::Frozen => List::Frozen,
        };
        let last = size - size % self.block..size;
        let grows = rule.grows && range.end > size;
        self.meets(list, &reach) || grows && self.meets(List::Shared, &last)
    }

    /// Whole blocks are not zeroed by way of the page cache; and mappings are
    /// judged by folios as it is.
    fn dirties_folios(&self, kind: OperationKind, range: &Range<u64>) -> bool {
        let blocks = rounded_out(range, self.block);
        if kind.writes_data() || kind == OperationKind::UnshareRange {
            return self.meets(List::Coarse, &blocks);
        }
        kind != OperationKind::MapWrite
            && (blocks.start != range.start
                && self.meets(List::Coarse, &(blocks.start..range.start))
                || blocks.end != range.end && self.meets(List::Coarse, &(range.end..blocks.end)))
    }

    fn refuses_edge(&self, rule: &Rule, range: &Range<u64>) -> bool {
        let end = match rule.reach {
            Reach::ToTheEnd => u64::MAX,
            _ => range.end,
        };
        self.meets(List::Edges, &(range.start..end))
    }

    fn minds_range(&self, range: &Range<u64>, untorn: bool) -> bool {
        let blocks = rounded_out(range, self.block);
        self.meets(List::Beside, &blocks) || untorn && self.meets(List::Window, &blocks)
    }
}

/// [`Operation::reach`], for an operation that brings shared blocks.
fn brings_to(rule: &Rule, operation: &Operation, size: u64) -> Range<u64> {
    let range = &operation.range;
    let mut reach = match rule.reach {
        Reach::Everything => 0..u64::MAX,
        Reach::ToTheEnd => range.start.saturating_sub(LARGEST_BLOCK)..u64::MAX,
        _ => range.clone(),
    };
    if rule.grows && reach.end > size {
        reach.start = reach.start.min(size.saturating_sub(1));
    }
    rounded_out(&reach, LARGEST_BLOCK)
}

/// Sorts runs, and joins those that touch.
fn join(runs: &mut Vec<Range<u64>>) {
    runs.sort_by_key(|run| run.start);
    runs.dedup_by(|next, last| {
        let joins = next.start <= last.end;
        if joins {
            last.end = last.end.max(next.end);
        }
        joins
    });
}

/// Every kind, for tables that others keep.
pub fn kinds() -> impl Iterator<Item = OperationKind> {
    RULES.iter().map(|rule| rule.kind)
}

#[cfg(test)]
mod tests {
    use super::super::{Beside, judge};
    use super::*;
    use crate::extent::{BlockMap, DeviceId, Extent};
    use crate::plan::Plan;
    use proptest::prelude::*;

    const BLOCK: u64 = 4096;

    #[derive(Clone, Debug)]
    struct Model {
        first: u64,
        states: Vec<ExtentState>,
        whole_file: bool,
        beside: Vec<Range<u64>>,
        window: bool,
        grows_into: bool,
        failing_frees: bool,
        edges: bool,
        /// 0 none, 1 through the page cache, 2 DAX.
        mapped: u8,
        apart: u8,
    }

    impl Model {
        fn pinned(&self, size: u64) -> Pinned {
            let range = self.first * BLOCK..(self.first + self.states.len() as u64) * BLOCK;
            let extents = self.states.iter().enumerate().map(|(at, state)| {
                let offset = range.start + at as u64 * BLOCK;
                let physical = (*state != ExtentState::Hole).then_some((1 << 30) + 7 * offset);
                Extent::new(offset, physical, BLOCK, *state)
            });
            let device = DeviceId { major: 7, minor: 0 };
            let block = u32::try_from(BLOCK).unwrap();
            let map = BlockMap::new(device, block, size, range.clone(), extents);
            let mut pinned = Pinned::new(&map, self.whole_file);
            if self.mapped > 0 {
                let length = range.end - range.start;
                let plan = Plan::new(&map, range.start, length, BLOCK);
                pinned = pinned.mapped(&plan, self.mapped == 1);
            }
            let around = range.start.saturating_sub(4 * BLOCK)..range.end + 4 * BLOCK;
            pinned
                .with_beside(Beside {
                    frozen: self.beside.clone(),
                    window: self.window.then_some(around),
                    grows_into: self.grows_into,
                    failing_frees: self.failing_frees,
                    edges: self
                        .edges
                        .then_some(range.end..range.end + BLOCK)
                        .into_iter()
                        .collect(),
                })
                .apart(match self.apart {
                    0 => Apart::No,
                    1 => Apart::Without,
                    _ => Apart::Held(vec![range.start, range.start + 2 * BLOCK].into()),
                })
        }
    }

    fn model() -> impl Strategy<Value = Model> {
        let state = prop_oneof![
            3 => Just(ExtentState::Written),
            1 => Just(ExtentState::Unwritten),
            1 => Just(ExtentState::Hole),
            1 => Just(ExtentState::Shared),
        ];
        let beside = (0u64..40, 1u64..4).prop_map(|(at, length)| at * BLOCK..(at + length) * BLOCK);
        (
            0u64..30,
            proptest::collection::vec(state, 1..10),
            prop_oneof![9 => Just(false), 1 => Just(true)],
            proptest::collection::vec(beside, 0..3),
            proptest::array::uniform4(any::<bool>()),
            0u8..3,
            0u8..3,
        )
            .prop_map(
                |(first, states, whole_file, beside, flags, mapped, apart)| {
                    let [window, grows_into, failing_frees, edges] = flags;
                    Model {
                        first,
                        states,
                        whole_file,
                        beside,
                        window,
                        grows_into,
                        failing_frees,
                        edges,
                        mapped,
                        apart,
                    }
                },
            )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        /// All pins at once say what each of them says.
        #[test]
        fn layers_refuse_what_any_pin_refuses(
            models in proptest::collection::vec(model(), 1..4),
            size in 1u64..50 * BLOCK,
            later in 1u64..50 * BLOCK,
            start in 0u64..50 * BLOCK,
            length in 1u64..6 * BLOCK,
            append in any::<bool>(),
            direct in any::<bool>(),
            kind in proptest::sample::select(RULES.map(|rule| rule.kind).to_vec()),
        ) {
            // The size when they were pinned, and what it is now.
            let pins: Vec<Pinned> = models.iter().map(|model| model.pinned(size)).collect();
            let mut operation = Operation::new(kind, start..start + length);
            if kind == OperationKind::Truncate {
                operation.range = start..start;
            }
            operation.direct = direct;
            // Only writes go to another place than they say.
            let appends = append && kind == OperationKind::Write;
            operation.or = appends.then_some(later..later + length);
            let expected = pins.iter().any(|pin| {
                !judge(&operation, pin, later) || pin.minds_beside(&operation, later, 0)
            });
            let layers = Layers::new(&pins, false);
            let refuses = layers.refuses(&operation, later);
            prop_assert!(refuses || !expected, "{:?} {:?}", operation, layers);
            // Which pins a range lies wholly inside of is not known any more:
            // it may be refused for one that it cannot harm.
            let sure = pins.len() == 1
                && operation.or.is_none()
                && models[0].beside.is_empty();
            prop_assert!(!refuses || expected || !sure, "{:?} {:?}", operation, layers);
        }
    }

    #[test]
    fn lists_are_sorted_and_disjoint() {
        let mut runs = vec![8..12, 0..2, 11..20, 2..4, 30..31];
        join(&mut runs);
        assert_eq!(runs, [0..4, 8..20, 30..31]);
    }
}
