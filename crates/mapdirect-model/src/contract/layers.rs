//! The evaluator of the contract: the runs that operations may not meet,
//! sorted, in one list for each reason. Pure.
//!
//! The bpf gate judges in the kernel, where there is no room to ask pin after
//! pin, so it checks whether a range meets a list. The fanotify gate judges by
//! the same lists, and asks pin after pin only to name the one that refuses.
//!
//! Layers refuse what would change a block of a pin. They refuse more than that
//! only when this is cheaper to know, or cannot be known exactly:
//!
//! * An operation that brings shared blocks near a pin is judged by pieces of
//!   [`LARGEST_BLOCK`](super::LARGEST_BLOCK) bytes.
//! * The block that holds the end of a file is zeroed when the file grows. If
//!   an untorn write makes the file grow, this counts as untorn, too.
//! * A pin that lies wholly behind the end of the file still keeps the file
//!   from getting shorter.
//! * A mapped pin keeps the file from growing if its last page holds pinned
//!   blocks behind the end, even if that page is not mapped.
//! * A mapping that reaches behind the end of the file is refused for every
//!   frozen block between there and the end of its last folio, wherever it
//!   begins.
//! * When several pins are merged, a growing write that fails is judged by the
//!   largest of their size floors ([`Beside::failing_frees`]), and an insertion
//!   counts as moving what lies beside any of them ([`Beside::window`]). Blocks
//!   are unshared in pins of strength stable only while no other pin is there.
//!
//! [`Beside::failing_frees`]: super::Beside::failing_frees
//! [`Beside::window`]: super::Beside::window

use super::geometry::{intersects, rounded_out};
use super::operation::Operation;
use super::pinned::{Apart, Pinned, join};
use super::rules::{Meets, OperationKind, Reach, Traits};
use crate::extent::ExtentState;
use std::ops::Range;

/// The reason why an operation may not meet a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    /// The run is pinned.
    Pinned,
    /// The run is pinned and frozen.
    Frozen,
    /// Writing to the run, or zeroing a part of it, takes blocks of a pin
    /// along: the run lies beside the pin, or is a shared block of the pin.
    Beside,
    /// The run is pinned, and zeroing a part of it copies it.
    Shared,
    /// No block in the run may become shared, and no untorn write may go there.
    Window,
    /// The run is pages that must stay in the page cache.
    Held,
    /// A store to a mapping of the run may allocate or copy frozen blocks.
    Mapped,
    /// A write to the run may make the file grow, and allocate ahead into a
    /// pin; see [`Beside::grows_into`](super::Beside::grows_into).
    Ahead,
    /// A block that becomes unwritten in the run becomes one extent with a
    /// pin's.
    Edges,
    /// The run is folios of unwritten blocks of a pin. Writing to a part of
    /// such a folio, or zeroing it, makes the whole folio dirty.
    Coarse,
}

/// The number of lists.
pub const LISTS: usize = 10;

/// The fixed size of pins that do not agree on one: no file has this size.
const NO_SIZE: u64 = u64::MAX - 1;

/// What the pins of one inode refuse.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layers {
    lists: [Vec<Range<u64>>; LISTS],
    /// Smaller sizes are refused.
    pub size_floor: u64,
    /// The only permitted size.
    pub fixed_size: Option<u64>,
    /// The largest permitted size.
    pub largest_size: Option<u64>,
    /// Until the file has grown to `size_floor`, a write that would make the
    /// file grow and fails frees blocks of a pin; see
    /// [`Beside::failing_frees`](super::Beside::failing_frees).
    pub failing_frees: bool,
    /// The largest end of the pins of strength stable, or 0 if there is none. A
    /// size that is smaller than this and than the present one is refused.
    pub followed_end: u64,
    /// Whether blocks may be unshared: every pin is of strength stable.
    pub unshares: bool,
    /// The number of bytes in a block.
    pub block: u64,
    /// The number of bytes in a page.
    page: u64,
}

impl Layers {
    /// The layers of no pin.
    const fn none() -> Self {
        Self {
            lists: [const { Vec::new() }; LISTS],
            size_floor: 0,
            fixed_size: None,
            largest_size: None,
            failing_frees: false,
            followed_end: 0,
            unshares: true,
            block: 1,
            page: 1,
        }
    }

    /// The layers of one pin.
    #[must_use]
    pub fn of(pin: &Pinned) -> Self {
        let mut layers = Self {
            size_floor: pin.size_floor,
            fixed_size: pin.fixed_size,
            largest_size: pin.holds_tail.then_some(pin.file_size),
            failing_frees: pin.beside.failing_frees,
            followed_end: match pin.firm().last() {
                Some(last) if pin.follows => last.end,
                _ => 0,
            },
            unshares: pin.follows,
            block: pin.block,
            page: pin.geometry.page,
            ..Self::none()
        };
        for run in pin.firm() {
            layers.push(List::Pinned, run);
        }
        layers.push(List::Ahead, pin.ahead());
        layers.add_beside(pin);
        layers.add_frozen(pin);
        layers.add_mapped(pin);
        if let Apart::Held(held) = &pin.apart {
            for offset in held {
                layers.push(
                    List::Held,
                    *offset..offset.saturating_add(pin.geometry.page),
                );
            }
        }
        layers.join();
        layers
    }

    /// Merges the layers of all pins of an inode. An operation that any of the
    /// pins refuses is refused.
    #[must_use]
    pub fn all<'a>(pins: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut all = Self::none();
        for pin in pins {
            // Blocks and pages are the same for all pins of an inode.
            (all.block, all.page) = (pin.block, pin.page);
            all.size_floor = all.size_floor.max(pin.size_floor);
            all.fixed_size = match (all.fixed_size, pin.fixed_size) {
                (Some(one), Some(other)) if one != other => Some(NO_SIZE),
                (one, other) => one.or(other),
            };
            let largest = all.largest_size.into_iter().chain(pin.largest_size);
            all.largest_size = largest.min();
            all.failing_frees |= pin.failing_frees;
            all.followed_end = all.followed_end.max(pin.followed_end);
            all.unshares &= pin.unshares;
            for (list, runs) in all.lists.iter_mut().zip(&pin.lists) {
                list.extend_from_slice(runs);
            }
        }
        all.join();
        all
    }

    fn add_beside(&mut self, pin: &Pinned) {
        for edge in &pin.beside.edges {
            self.push(List::Edges, edge.clone());
        }
        for run in &pin.beside.frozen {
            // The part inside the pin is judged by its own state.
            self.push_outside(List::Beside, run, &pin.range);
        }
        if let Some(window) = &pin.beside.window {
            self.push(List::Window, window.clone());
        }
    }

    fn add_frozen(&mut self, pin: &Pinned) {
        for (run, state) in &pin.frozen {
            self.push(List::Frozen, run.clone());
            match state {
                ExtentState::Shared => {
                    self.push(List::Shared, run.clone());
                    self.push(List::Beside, run.clone());
                }
                // The holder has a copy of the run, which must stay true.
                ExtentState::Unknown => self.push(List::Shared, run.clone()),
                // Other blocks that are dirty with the run are written back,
                // and the run with them.
                ExtentState::Unwritten if pin.geometry.coarse => {
                    self.push(List::Coarse, pin.geometry.folios(run));
                }
                _ => {}
            }
        }
    }

    /// Adds the runs at which a store to a mapping could change frozen blocks:
    /// the frozen blocks themselves, and everything that shares a folio with
    /// them.
    fn add_mapped(&mut self, pin: &Pinned) {
        let tail = pin.idle_tail();
        for (run, _) in &pin.frozen {
            self.push_outside(List::Mapped, run, &tail);
            match &pin.apart {
                Apart::No => self.push(List::Mapped, pin.geometry.folios(run)),
                // No folio before the end of the file contains both. Behind the
                // end nothing keeps them apart, but there is nothing to store
                // to until the file grows.
                Apart::Held(_) if run.end > pin.file_end() => {
                    let first = run.start.max(pin.file_end());
                    let folio = first - first % pin.geometry.folio;
                    let end = pin.geometry.page_end(pin.file_end());
                    self.push(List::Mapped, folio.max(end)..u64::MAX);
                }
                Apart::Held(_) | Apart::Without => {}
            }
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

    fn join(&mut self) {
        for list in &mut self.lists {
            join(list);
        }
    }

    /// One list: sorted and disjoint.
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
    /// wherever the mapping begins.
    #[must_use]
    pub fn has_frozen(&self) -> bool {
        [List::Frozen, List::Beside]
            .into_iter()
            .any(|list| !self.list(list).is_empty())
    }

    /// Whether no write is refused anywhere in the file, except untorn ones.
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

    /// The end of the bytes in which no block may become shared, if there are
    /// any.
    #[must_use]
    pub fn unshared_until(&self) -> Option<u64> {
        self.list(List::Window).last().map(|window| window.end)
    }

    /// Whether an operation on a file of `size` bytes is refused. Since the
    /// layers were made, blocks from behind may have come nearer by `moved`
    /// bytes.
    #[must_use]
    pub fn refuses(&self, operation: &Operation, size: u64, moved: u64) -> bool {
        operation.ranges().any(|range| {
            let late = operation.late && operation.kind == OperationKind::Truncate;
            // What the file has grown by meanwhile may not be cut off.
            let size = if late { u64::MAX } else { size };
            self.refuses_at(operation, range, size)
        }) || self.refuses_growth(operation, size)
            || operation.brings_shared && self.refuses_sharing(&operation.reach(size), moved)
    }

    /// Whether an operation is refused for what it does at one of its ranges.
    fn refuses_at(&self, operation: &Operation, range: &Range<u64>, size: u64) -> bool {
        let kind = operation.kind;
        let traits = Traits::of(kind);
        let pages = traits.lets_go.bytes(range, operation.direct, self.block);
        self.refuses_reach(kind, range, size)
            || pages.is_some_and(|pages| self.meets(List::Held, &pages))
            || kind.writes_data() && self.meets(List::Ahead, range)
            || kind.leaves_unwritten() && self.refuses_edge(kind, range)
            || kind == OperationKind::InsertRange && self.refuses_insertion(range)
            || traits.touches
                && (self.refuses_touch(range, kind == OperationKind::WriteUntorn)
                    || self.refuses_dirt(kind, range))
    }

    /// Whether an operation reaches blocks that it may not meet.
    fn refuses_reach(&self, kind: OperationKind, range: &Range<u64>, size: u64) -> bool {
        let rule = kind.rule();
        if kind == OperationKind::UnshareRange && self.unshares {
            return false;
        }
        let reach = match rule.reach {
            Reach::Nothing => return false,
            Reach::Everything => return true,
            Reach::Range => range.start..self.end_of(kind, range, size),
            Reach::ToTheEnd => range.start..u64::MAX,
            Reach::BeyondSize => {
                let resized = self.fixed_size.is_some_and(|size| *range != (size..size));
                return range.start < self.size_floor.max(self.followed_end.min(size)) || resized;
            }
        };
        let list = match rule.refused_on {
            Meets::Any => List::Pinned,
            Meets::Frozen if kind == OperationKind::MapWrite => List::Mapped,
            Meets::Frozen => List::Frozen,
        };
        self.meets(list, &reach)
    }

    /// The end of the bytes that an operation at `range` reaches. If a punched
    /// hole ends behind the end of the file, ext4 with blocks smaller than
    /// pages punches up to the end of that page (`ext4_punch_hole`,
    /// fs/ext4/inode.c, 6.12).
    fn end_of(&self, kind: OperationKind, range: &Range<u64>, size: u64) -> u64 {
        if kind == OperationKind::PunchHole && range.end > size {
            range
                .end
                .checked_next_multiple_of(self.page)
                .unwrap_or(u64::MAX)
        } else {
            range.end
        }
    }

    /// Whether blocks that become unwritten at `range` become one extent with
    /// blocks of a pin.
    fn refuses_edge(&self, kind: OperationKind, range: &Range<u64>) -> bool {
        let end = match kind.rule().reach {
            Reach::ToTheEnd => u64::MAX,
            _ => range.end,
        };
        self.meets(List::Edges, &(range.start..end))
    }

    /// Whether an insertion moves shared blocks that lie beside a pin. After
    /// that, nobody would know where they are.
    fn refuses_insertion(&self, range: &Range<u64>) -> bool {
        !self.list(List::Window).is_empty() && self.meets(List::Beside, &(range.start..u64::MAX))
    }

    /// Whether the blocks of `range` take blocks of a pin along when they are
    /// written to or partly zeroed. An untorn write goes to new blocks, and XFS
    /// sets more of those aside than it needs
    /// (`xfs_atomic_write_cow_iomap_begin`, fs/xfs/xfs_iomap.c, 6.16), whether
    /// anything is shared or not.
    fn refuses_touch(&self, range: &Range<u64>, untorn: bool) -> bool {
        let blocks = rounded_out(range, self.block);
        self.meets(List::Beside, &blocks) || untorn && self.meets(List::Window, &blocks)
    }

    /// Whether an operation makes bytes dirty that share a folio with unwritten
    /// blocks of a pin. Whole blocks are not zeroed through the page cache, and
    /// mappings are judged by folios anyway.
    fn refuses_dirt(&self, kind: OperationKind, range: &Range<u64>) -> bool {
        let blocks = rounded_out(range, self.block);
        if kind.writes_data() || kind == OperationKind::UnshareRange {
            return self.meets(List::Coarse, &blocks);
        }
        kind != OperationKind::MapWrite
            && (self.meets(List::Coarse, &(blocks.start..range.start))
                || self.meets(List::Coarse, &(range.end..blocks.end)))
    }

    /// Whether an operation is refused because it makes the file grow. The rest
    /// of the block that holds the old end of the file is then zeroed: in place
    /// if the block is written, not at all if it is a hole or unwritten. A
    /// shared block is copied.
    fn refuses_growth(&self, operation: &Operation, size: u64) -> bool {
        let kind = operation.kind;
        let end = operation.end();
        if !kind.rule().grows {
            return false;
        }
        if self.largest_size.is_some_and(|largest| end > largest) {
            return true;
        }
        if end <= size {
            return false;
        }
        let last = size - size % self.block..size;
        let fails = self.failing_frees && kind.writes_data() && size < self.size_floor;
        let untorn = kind == OperationKind::WriteUntorn;
        fails
            || !last.is_empty()
                && (self.meets(List::Shared, &last)
                    || self.refuses_touch(&last, untorn)
                    || self.meets(List::Coarse, &last))
    }

    /// Whether blocks that become shared within `reach` may come to lie beside
    /// a pin. Blocks up to `moved` bytes behind a window may be in the window
    /// by now.
    fn refuses_sharing(&self, reach: &Range<u64>, moved: u64) -> bool {
        let nearer = reach.start.saturating_sub(moved)..reach.end;
        !reach.is_empty() && self.meets(List::Window, &nearer)
    }

    fn meets(&self, list: List, range: &Range<u64>) -> bool {
        let runs = self.list(list);
        let first = runs.partition_point(|run| run.end <= range.start);
        runs.get(first).is_some_and(|run| intersects(run, range))
    }
}
