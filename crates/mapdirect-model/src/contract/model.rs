//! A model of the contract that looks at one block, page or folio after the
//! other. It knows neither rules nor runs, so that the layers have something to
//! be compared with that cannot be wrong in the same way.

mod questions;

use super::geometry::{Geometry, LARGEST_BLOCK};
use super::operation::Operation;
use super::pinned::{Apart, Beside, Pinned};
use super::rules::OperationKind as K;
use crate::extent::{BlockMap, DeviceId, Extent, ExtentState};
use crate::plan::Plan;
use std::ops::Range;

/// A pin, and what there is to know of it.
#[derive(Clone, Debug)]
struct Pin {
    block: u64,
    geometry: Geometry,
    /// Number of its first block, and what its blocks are.
    first: u64,
    states: Vec<ExtentState>,
    whole_file: bool,
    /// It is of strength stable,
    follows: bool,
    /// and then gives way in these blocks.
    gives_way: Vec<Range<u64>>,
    /// Size of the file when it was pinned.
    size: u64,
    /// The blocks that are mapped, from where a page begins, and whether
    /// through the page cache.
    mapped: Option<(Range<u64>, bool)>,
    /// Blocks, by number, that take blocks of the pin along.
    beside: Vec<Range<u64>>,
    window: Option<Range<u64>>,
    grows_into: bool,
    failing_frees: bool,
    edges: Vec<Range<u64>>,
    apart: Kept,
}

/// [`Apart`], with numbers of pages.
#[derive(Clone, Debug)]
enum Kept {
    No,
    Without,
    Held(Vec<u64>),
}

/// The pins of a file, and what somebody does to it.
#[derive(Clone, Debug)]
struct Question {
    pins: Vec<Pin>,
    operation: Operation,
    /// Size of the file by now.
    size: u64,
    moved: u64,
}

fn meet(one: &Range<u64>, other: &Range<u64>) -> bool {
    !one.is_empty() && !other.is_empty() && one.start < other.end && other.start < one.end
}

/// The bytes of unit number `at`.
fn unit(at: u64, bytes: u64) -> Range<u64> {
    at * bytes..(at + 1) * bytes
}

/// The numbers of the units that hold any of `range`.
fn units(range: &Range<u64>, bytes: u64) -> Range<u64> {
    if range.is_empty() {
        return 0..0;
    }
    range.start / bytes..(range.end - 1) / bytes + 1
}

impl Pin {
    fn end(&self) -> u64 {
        self.first + self.states.len() as u64
    }

    /// What a block of it is, if it is pinned. Behind the end of a whole file
    /// there are holes without end.
    fn state(&self, at: u64) -> Option<ExtentState> {
        match at.checked_sub(self.first)? {
            _ if at >= self.end() => self.whole_file.then_some(ExtentState::Hole),
            at => Some(self.states[usize::try_from(at).unwrap()]),
        }
    }

    /// The first block behind the end of the file.
    fn end_of_file(&self) -> u64 {
        self.size.div_ceil(self.block)
    }

    /// Whether the holder has a copy of the page that a block is in: it holds
    /// blocks of the pin that would have to be mapped in different ways.
    fn is_copied(&self, at: u64) -> bool {
        let Some((mapped, _)) = &self.mapped else {
            return false;
        };
        let page = at * self.block / self.geometry.page;
        let mapped = mapped.start * self.block..mapped.end * self.block;
        if self.block >= self.geometry.page || !units(&mapped, self.geometry.page).contains(&page) {
            return false;
        }
        let page = unit(page, self.geometry.page);
        let mut ways = units(&page, self.block)
            .filter(|at| *at < self.end() && *at < self.end_of_file())
            .filter_map(|at| self.state(at))
            .map(|state| match state {
                ExtentState::Written => 0,
                ExtentState::Hole | ExtentState::Unwritten => 1,
                _ => 2,
            });
        let first = ways.next();
        ways.any(|way| Some(way) != first)
    }

    fn gives_way_at(&self, at: u64) -> bool {
        self.follows && self.gives_way.iter().any(|run| run.contains(&at))
    }

    /// The end of the last block in which it does not give way.
    fn firm_end(&self) -> u64 {
        if self.whole_file {
            // What gives way here has an end.
            return u64::MAX;
        }
        let mut firm = (self.first..self.end()).filter(|at| !self.gives_way_at(*at));
        firm.next_back().map_or(0, |last| (last + 1) * self.block)
    }

    fn is_frozen(&self, at: u64) -> bool {
        match self.state(at) {
            _ if self.follows => false,
            None => false,
            Some(ExtentState::Written) => self.is_copied(at),
            Some(_) => true,
        }
    }

    fn is_shared(&self, at: u64) -> bool {
        !self.follows && self.state(at) == Some(ExtentState::Shared)
    }

    /// Whether it is not pinned, and takes blocks of the pin along.
    fn is_beside(&self, at: u64) -> bool {
        !self.follows && self.state(at).is_none() && self.beside.iter().any(|run| run.contains(&at))
    }

    fn is_in_window(&self, at: u64) -> bool {
        self.window.as_ref().is_some_and(|run| run.contains(&at))
    }

    /// Whether there are pinned blocks behind the end of the file in its last
    /// page, and that page is mapped through the page cache.
    fn holds_tail(&self) -> bool {
        !self.follows
            && matches!(self.mapped, Some((_, true)))
            && self
                .tail_blocks()
                .any(|at| self.state(at).is_some() && at >= self.end_of_file())
    }

    /// The blocks of the page that holds the end of the file.
    fn tail_blocks(&self) -> Range<u64> {
        let end = self.end_of_file() * self.block;
        units(&(end.saturating_sub(1)..end), self.geometry.page)
            .next()
            .map_or(0..0, |page| {
                units(&unit(page, self.geometry.page), self.block)
            })
    }

    /// Whether a file that gets `size` bytes loses anything of a block.
    fn loses(&self, at: u64, size: u64) -> bool {
        let block = unit(at, self.block);
        let Some(state) = self.state(at).filter(|_| at < self.end()) else {
            return false;
        };
        if at < self.end_of_file() {
            size < block.end.min(self.size)
        } else {
            // Freed, unless there is nothing.
            state != ExtentState::Hole && size < block.end
        }
    }

    /// The least size that does not lose anything.
    fn least_size(&self) -> u64 {
        if self.follows {
            return 0;
        }
        let beyond = self.first >= self.end_of_file();
        (self.first..self.end())
            .map(|at| match () {
                () if at < self.end_of_file() => ((at + 1) * self.block).min(self.size),
                // See `loses_size`.
                () if self.state(at) == Some(ExtentState::Hole) => self.size * u64::from(beyond),
                () => (at + 1) * self.block,
            })
            .max()
            .unwrap()
    }

    fn facts(&self) -> Pinned {
        let bytes = |run: &Range<u64>| run.start * self.block..run.end * self.block;
        let range = bytes(&(self.first..self.end()));
        if self.follows {
            let end = if self.whole_file { u64::MAX } else { range.end };
            let window = self.window.as_ref().map(bytes);
            let gaps = self.gives_way.iter().map(bytes);
            return Pinned::stable(range.start..end, window, self.block, self.geometry)
                .giving_way(gaps);
        }
        let extents = (self.first..self.end()).map(|at| {
            let state = self.state(at).unwrap();
            let offset = at * self.block;
            let physical = (state != ExtentState::Hole).then_some((1 << 30) + 7 * offset);
            Extent::new(offset, physical, self.block, state)
        });
        let device = DeviceId { major: 7, minor: 0 };
        let block = u32::try_from(self.block).unwrap();
        let map = BlockMap::new(device, block, self.size, range.clone(), extents);
        let mut pinned = Pinned::new(&map, self.whole_file, self.geometry);
        if let Some((mapped, cached)) = &self.mapped {
            let mapped = bytes(mapped);
            let length = mapped.end - mapped.start;
            let plan = Plan::new(&map, mapped.start, length, self.geometry.page);
            pinned = pinned.mapped(&plan, *cached);
        }
        let beside = Beside {
            frozen: self.beside.iter().map(bytes).collect(),
            window: self.window.as_ref().map(bytes),
            grows_into: self.grows_into,
            failing_frees: self.failing_frees,
            edges: self.edges.iter().map(bytes).collect(),
        };
        pinned.with_beside(beside).apart(match &self.apart {
            Kept::No => Apart::No,
            Kept::Without => Apart::Without,
            Kept::Held(pages) => {
                Apart::Held(pages.iter().map(|at| at * self.geometry.page).collect())
            }
        })
    }
}

/// The blocks that are looked at: enough for all that a question is about, and
/// for the folios around it.
fn all_blocks(pin: &Pin, question: &Question) -> Range<u64> {
    let runs = pin.beside.iter().chain(&pin.edges).chain(&pin.window);
    let blocks = runs.map(|run| run.end).max().unwrap_or(0).max(pin.end());
    let bytes = question.ranges().map(|range| range.end).max().unwrap();
    let bytes = bytes
        .max(question.size)
        .max(pin.size)
        .max(blocks * pin.block);
    0..(bytes + 2 * pin.geometry.folio).div_ceil(pin.block)
}

/// What an operation does, said for each kind by itself.
impl Question {
    fn ranges(&self) -> impl Iterator<Item = &Range<u64>> {
        std::iter::once(&self.operation.range).chain(&self.operation.or)
    }

    fn any_range(&self, what: impl Fn(&Range<u64>) -> bool) -> bool {
        self.ranges().any(what)
    }

    fn writes_data(&self) -> bool {
        matches!(
            self.operation.kind,
            K::Write | K::WriteUntorn | K::CopyRange
        )
    }

    fn grows_to(&self) -> Option<u64> {
        let end = self.ranges().map(|range| range.end).max().unwrap();
        matches!(
            self.operation.kind,
            K::Write
                | K::WriteUntorn
                | K::Truncate
                | K::Allocate
                | K::ZeroRange
                | K::WriteZeroes
                | K::UnshareRange
                | K::Reshape
                | K::Clone
                | K::CopyRange
        )
        .then_some(end)
    }

    /// Whether it moves, frees, replaces or allocates a block of the pin.
    fn changes(&self, pin: &Pin, at: u64) -> bool {
        let block = unit(at, pin.block);
        let kind = self.operation.kind;
        let everything = kind == K::OpenTruncate || kind.may_do_anything();
        if pin.gives_way_at(at) && !everything {
            return false;
        }
        let Some(_) = pin.state(at) else {
            return false;
        };
        self.any_range(|range| match self.operation.kind {
            K::Read | K::OpenRead | K::MapRead | K::OpenWrite | K::MapWrite => false,
            // Names are not blocks.
            K::Unlink | K::Rename => false,
            K::OpenTruncate
            | K::Unknown
            | K::SetUpLoop
            | K::EnableVerity
            | K::SetAttributes
            | K::SetFlags => true,
            // In place, if there is such.
            K::Write | K::Allocate | K::AllocateKeepSize => {
                meet(range, &block) && pin.is_frozen(at)
            }
            // See `cuts_off`.
            K::Truncate => !pin.follows && pin.loses(at, range.start),
            // A copy of a shared block moves nothing that is held.
            K::UnshareRange if pin.follows => false,
            // To the end of the page, if behind the end of the file.
            K::PunchHole if range.end > self.size => {
                let last = unit((range.end - 1) / pin.geometry.page, pin.geometry.page);
                meet(&(range.start..last.end), &block)
            }
            K::WriteUntorn
            | K::PunchHole
            | K::ZeroRange
            | K::WriteZeroes
            | K::UnshareRange
            | K::Clone
            | K::Dedupe
            | K::CopyRange
            | K::Exchange => meet(range, &block),
            K::CollapseRange | K::InsertRange | K::Reshape => block.end > range.start,
        })
    }

    /// Whether it may give a whole file another size than it has to have.
    fn resizes(&self, pin: &Pin) -> bool {
        self.operation.kind == K::Truncate
            && pin.whole_file
            && !pin.follows
            && self.operation.range != (pin.size..pin.size)
    }

    /// Whether it cuts off bytes of the file before the end of a pin of strength
    /// stable. If it is late, there may be bytes up to any size by then.
    /// Over-refusal: wherever the pin begins.
    fn cuts_off(&self, pin: &Pin) -> bool {
        let end = pin.firm_end();
        pin.follows
            && self.operation.kind == K::Truncate
            && self.operation.range.start < end
            && (self.operation.late || self.operation.range.start < self.size)
    }

    /// Over-refusal: a pin that lies wholly behind the end of the file keeps it
    /// from getting shorter.
    fn shortens_before_the_pin(&self, pin: &Pin) -> bool {
        !pin.follows
            && self.operation.kind == K::Truncate
            && pin.first >= pin.end_of_file()
            && self.operation.range.start < pin.size
    }

    /// Whether it writes to a block, or zeroes a part of it.
    fn touches(&self, pin: &Pin, at: u64) -> bool {
        let block = unit(at, pin.block);
        self.any_range(|range| match self.operation.kind {
            K::Read
            | K::OpenRead
            | K::MapRead
            | K::OpenWrite
            | K::OpenTruncate
            | K::Unknown
            | K::SetUpLoop
            | K::EnableVerity
            | K::SetAttributes
            | K::SetFlags
            | K::CollapseRange
            | K::InsertRange
            | K::Unlink
            | K::Rename => false,
            // The new end of the file is inside.
            K::Truncate => range.start < block.end && range.end > block.start,
            _ => meet(range, &block),
        }) || self.zeroes_behind_old_end(pin, at)
    }

    /// Whether the file grows, and this block held its end.
    fn zeroes_behind_old_end(&self, pin: &Pin, at: u64) -> bool {
        self.grows_to().is_some_and(|end| end > self.size)
            && !self.size.is_multiple_of(pin.block)
            && at == self.size / pin.block
    }

    /// Whether blocks of the pin go along with one that is touched: they are
    /// copied with it, or converted.
    fn takes_along(&self, pin: &Pin, at: u64) -> bool {
        // Over-refusal: where the old end of the file was, untorn or not is
        // all the same.
        let untorn = self.operation.kind == K::WriteUntorn && pin.is_in_window(at);
        self.touches(pin, at) && (pin.is_beside(at) || pin.is_shared(at) || untorn)
    }

    /// Whether a copy that the holder has of a page would not be true any more.
    fn spoils_a_copy(&self, pin: &Pin, at: u64) -> bool {
        !pin.follows
            && self.zeroes_behind_old_end(pin, at)
            && pin.state(at) == Some(ExtentState::Written)
            && pin.is_copied(at)
    }

    /// Whether a block comes to be unwritten beside an unwritten one of the pin.
    fn joins(&self, pin: &Pin, at: u64) -> bool {
        let block = unit(at, pin.block);
        !pin.follows
            && pin.edges.iter().any(|edge| edge.contains(&at))
            && self.any_range(|range| match self.operation.kind {
                K::Allocate | K::AllocateKeepSize | K::ZeroRange | K::WriteZeroes => {
                    meet(range, &block)
                }
                K::CollapseRange | K::InsertRange | K::Reshape => block.end > range.start,
                _ => false,
            })
    }

    /// Whether XFS may allocate ahead of it, into the pin.
    fn allocates_into(&self, pin: &Pin) -> bool {
        let end = if pin.whole_file {
            u64::MAX
        } else {
            pin.end() * pin.block
        };
        pin.grows_into
            && !pin.follows
            && self.writes_data()
            && self.any_range(|range| meet(range, &(pin.size..end)))
    }

    /// Whether it throws a page out of the page cache.
    fn throws_out(&self, pin: &Pin, page: u64) -> bool {
        let page = unit(page, pin.geometry.page);
        self.any_range(|range| match self.operation.kind {
            K::Write | K::WriteUntorn => self.operation.direct && meet(range, &page),
            K::PunchHole
            | K::ZeroRange
            | K::WriteZeroes
            | K::UnshareRange
            | K::Clone
            | K::Dedupe
            | K::CopyRange
            | K::Exchange => meet(range, &page),
            // A block before the range is looked at as well.
            K::CollapseRange | K::InsertRange | K::Reshape => page.end + pin.block > range.start,
            _ => false,
        })
    }

    fn throws_out_held(&self, pin: &Pin) -> bool {
        match &pin.apart {
            Kept::Held(_) if pin.follows => false,
            Kept::Held(pages) => pages.iter().any(|page| self.throws_out(pin, *page)),
            Kept::No | Kept::Without => false,
        }
    }

    /// Whether blocks that are shared may come to lie in the window, or where
    /// it would be if nothing had moved. Over-refusal: by pieces of the size of
    /// the largest block.
    fn shares_nearby(&self, pin: &Pin) -> bool {
        let Some(window) = pin.window.as_ref().filter(|_| self.operation.brings_shared) else {
            return false;
        };
        let range = &self.operation.range;
        let mut reach = match self.operation.kind {
            K::Clone | K::Dedupe | K::CopyRange | K::Exchange => range.clone(),
            K::CollapseRange | K::Reshape => range.start.saturating_sub(LARGEST_BLOCK)..u64::MAX,
            _ => return false,
        };
        if self.grows_to().is_some_and(|end| end > self.size) {
            reach.start = reach.start.min(self.size - 1);
        }
        let window = window.start * pin.block..window.end * pin.block + self.moved;
        units(&window, LARGEST_BLOCK)
            .map(|piece| unit(piece, LARGEST_BLOCK))
            .any(|piece| meet(&piece, &reach))
    }

    /// The bytes that are dirty in the page cache after it.
    fn dirt(&self, block: u64) -> Vec<Range<u64>> {
        let mut dirt = Vec::new();
        for range in self.ranges() {
            let first = range.start / block * block;
            let end = range.end.div_ceil(block) * block;
            match self.operation.kind {
                // What is not written of the first and the last block is read.
                K::Write | K::WriteUntorn | K::CopyRange | K::UnshareRange => dirt.push(first..end),
                // Parts of blocks are zeroed; the rest goes another way.
                K::Truncate
                | K::Allocate
                | K::AllocateKeepSize
                | K::PunchHole
                | K::ZeroRange
                | K::WriteZeroes
                | K::Reshape
                | K::Clone
                | K::Dedupe
                | K::Exchange => dirt.extend([first..range.start, range.end..end]),
                _ => {}
            }
        }
        if self.grows_to().is_some_and(|end| end > self.size) {
            dirt.push(self.size / block * block..self.size);
        }
        dirt
    }

    /// Whether it makes a folio dirty that an unwritten block lies in.
    fn dirties(&self, pin: &Pin, at: u64) -> bool {
        let minds = pin.geometry.coarse && !pin.follows;
        minds && pin.state(at) == Some(ExtentState::Unwritten) && {
            let dirt = self.dirt(pin.block);
            units(&unit(at, pin.block), pin.geometry.folio)
                .map(|folio| unit(folio, pin.geometry.folio))
                .any(|folio| dirt.iter().any(|dirt| meet(dirt, &folio)))
        }
    }

    /// Whether a store to its mapping may allocate or copy a block.
    fn stores_to(&self, pin: &Pin, at: u64) -> bool {
        if self.operation.kind != K::MapWrite || !pin.is_frozen(at) {
            return false;
        }
        let (range, block) = (&self.operation.range, unit(at, pin.block));
        let geometry = pin.geometry;
        let end = pin.end_of_file() * pin.block;
        let page_end = end.div_ceil(geometry.page) * geometry.page;
        // Nobody stores behind the end of a file that may not grow.
        let idle = pin.whole_file || pin.holds_tail();
        let mapped = block.start.max(range.start)..block.end.min(range.end);
        let is_idle = idle && mapped.start >= end && mapped.end <= page_end;
        let shares_folio = match &pin.apart {
            Kept::Without => false,
            Kept::No => {
                units(&block, geometry.folio).any(|folio| meet(&unit(folio, geometry.folio), range))
            }
            // Over-refusal: wherever the mapping begins.
            Kept::Held(_) => {
                at >= pin.end_of_file()
                    && range.end > page_end
                    && block.start < range.end.div_ceil(geometry.folio) * geometry.folio
            }
        };
        meet(&block, range) && !is_idle || shares_folio
    }

    fn is_refused_by(&self, pin: &Pin) -> bool {
        let any = |what: fn(&Self, &Pin, u64) -> bool| {
            all_blocks(pin, self).any(|at| what(self, pin, at))
        };
        let grows_over_tail = pin.holds_tail() && self.grows_to().is_some_and(|end| end > pin.size);
        self.resizes(pin)
            || self.cuts_off(pin)
            || self.shortens_before_the_pin(pin)
            || self.allocates_into(pin)
            || self.throws_out_held(pin)
            || self.shares_nearby(pin)
            || grows_over_tail
            || any(Self::changes)
            || any(Self::takes_along)
            || any(Self::spoils_a_copy)
            || any(Self::joins)
            || any(Self::dirties)
            || any(Self::stores_to)
            || self.fails(std::slice::from_ref(pin))
            || self.inserts(std::slice::from_ref(pin))
    }

    /// Whether it would make the file grow, may fail, and frees blocks then.
    /// Over-refusal: the largest of all sizes counts.
    fn fails(&self, pins: &[Pin]) -> bool {
        pins.iter().any(|pin| pin.failing_frees && !pin.follows)
            && self.writes_data()
            && self.grows_to().is_some_and(|end| end > self.size)
            && pins.iter().any(|pin| self.size < pin.least_size())
    }

    /// Whether it moves blocks beside a pin that others share. Over-refusal:
    /// those of one pin count for all.
    fn inserts(&self, pins: &[Pin]) -> bool {
        self.operation.kind == K::InsertRange
            && pins.iter().any(|pin| pin.window.is_some())
            && pins.iter().any(|pin| {
                all_blocks(pin, self).any(|at| {
                    unit(at, pin.block).end > self.operation.range.start && pin.is_beside(at)
                })
            })
    }

    /// Whether it unshares blocks of a pin of strength stable. Over-refusal: a
    /// pin of the other strength, wherever it is, refuses that.
    fn unshares(&self) -> bool {
        self.operation.kind == K::UnshareRange
            && self.pins.iter().any(|pin| !pin.follows)
            && self.pins.iter().any(|pin| {
                all_blocks(pin, self).any(|at| {
                    pin.state(at).is_some()
                        && !pin.gives_way_at(at)
                        && self.any_range(|range| meet(range, &unit(at, pin.block)))
                })
            })
    }

    fn is_refused(&self) -> bool {
        self.pins.iter().any(|pin| self.is_refused_by(pin))
            || self.unshares()
            || self.fails(&self.pins)
            || self.inserts(&self.pins)
    }
}
