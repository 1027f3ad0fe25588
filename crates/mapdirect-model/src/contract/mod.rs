//! What may be done to a file while ranges of it are pinned. Pure.
//!
//! [`RULES`] is the contract as data: for every operation, which bytes it
//! reaches and what it may not meet there. Gates classify what they see into
//! [`Operation`]s and ask [`judge`]; a gate that cannot see precisely asks
//! about the worst operation it could be.

pub mod layers;

use crate::extent::{BlockMap, Extent, ExtentState};
use crate::plan::{Pages, Plan};
use std::ops::Range;

/// What somebody does, or may be doing, to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OperationKind {
    /// Reads, sends or splices from.
    Read,
    /// Opens for reading.
    OpenRead,
    /// Maps without being able to write through the mapping.
    MapRead,
    /// Maps shared, writable now or later.
    MapWrite,
    /// Opens for writing. A gate that judges every write allows it; one that
    /// cannot refuses it whenever a pin exists.
    OpenWrite,
    /// Opens and truncates, or may.
    OpenTruncate,
    /// Writes, in place where blocks are written and unshared.
    Write,
    /// Writes so that a crash tears nothing, which XFS does by remapping.
    WriteUntorn,
    /// Sets the size to a value in `range.start ..= range.end`.
    Truncate,
    /// `fallocate(2)` allocating, growing the file if need be.
    Allocate,
    /// `fallocate(2)` allocating with `FALLOC_FL_KEEP_SIZE`.
    AllocateKeepSize,
    /// `FALLOC_FL_PUNCH_HOLE`, `MADV_REMOVE`, discard.
    PunchHole,
    /// `FALLOC_FL_ZERO_RANGE`.
    ZeroRange,
    /// `FALLOC_FL_WRITE_ZEROES`.
    WriteZeroes,
    /// `FALLOC_FL_UNSHARE_RANGE`.
    UnshareRange,
    /// `FALLOC_FL_COLLAPSE_RANGE`.
    CollapseRange,
    /// `FALLOC_FL_INSERT_RANGE`.
    InsertRange,
    /// `fallocate(2)` in a mode that cannot be seen.
    Reshape,
    /// `FICLONE`, `FICLONERANGE`, on either side.
    Clone,
    /// `FIDEDUPERANGE`, on either side.
    Dedupe,
    /// `copy_file_range(2)` where the filesystem would share blocks, on
    /// either side.
    CopyRange,
    /// `XFS_IOC_EXCHANGE_RANGE`, `XFS_IOC_COMMIT_RANGE`, `XFS_IOC_SWAPEXT`,
    /// `EXT4_IOC_MOVE_EXT` and their like, on either side.
    Exchange,
    /// Nobody knows.
    Unknown,
}

/// The bytes an operation reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// None whose place could change.
    Nothing,
    /// Its range.
    Range,
    /// From the start of its range to the end of all files.
    ToTheEnd,
    /// What lies beyond the new size.
    BeyondSize,
    /// The whole file.
    Everything,
}

/// What an operation may not meet within its reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meets {
    /// A frozen block of a pin.
    Frozen,
    /// Any block of a pin.
    Any,
}

/// One row of the contract.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// The operation.
    pub kind: OperationKind,
    /// A word for audit records and counters.
    pub name: &'static str,
    /// What it reaches.
    pub reach: Reach,
    /// What it may not meet there.
    pub refused_on: Meets,
    /// It grows the file when its range ends beyond the size: then the block
    /// that holds the old end of file is zeroed behind the end, and a shared
    /// one is copied for that.
    pub grows: bool,
}

const fn rule(
    kind: OperationKind,
    name: &'static str,
    reach: Reach,
    refused_on: Meets,
    grows: bool,
) -> Rule {
    Rule {
        kind,
        name,
        reach,
        refused_on,
        grows,
    }
}

/// The contract, in the order of [`OperationKind`].
pub const RULES: [Rule; 23] = {
    use Meets::{Any, Frozen};
    use OperationKind as K;
    use Reach::{BeyondSize, Everything, Nothing, Range, ToTheEnd};
    [
        rule(K::Read, "read", Nothing, Any, false),
        rule(K::OpenRead, "open-read", Nothing, Any, false),
        rule(K::MapRead, "mmap-read", Nothing, Any, false),
        rule(K::MapWrite, "mmap-write", Range, Frozen, false),
        rule(K::OpenWrite, "open-write", Nothing, Any, false),
        rule(K::OpenTruncate, "open-truncate", Everything, Any, false),
        rule(K::Write, "write", Range, Frozen, true),
        rule(K::WriteUntorn, "write-untorn", Range, Any, true),
        rule(K::Truncate, "truncate", BeyondSize, Any, true),
        rule(K::Allocate, "allocate", Range, Frozen, true),
        rule(
            K::AllocateKeepSize,
            "allocate-keep-size",
            Range,
            Frozen,
            false,
        ),
        rule(K::PunchHole, "punch-hole", Range, Any, false),
        rule(K::ZeroRange, "zero-range", Range, Any, true),
        rule(K::WriteZeroes, "write-zeroes", Range, Any, true),
        rule(K::UnshareRange, "unshare-range", Range, Any, true),
        rule(K::CollapseRange, "collapse-range", ToTheEnd, Any, false),
        rule(K::InsertRange, "insert-range", ToTheEnd, Any, false),
        rule(K::Reshape, "fallocate", ToTheEnd, Any, true),
        rule(K::Clone, "clone", Range, Any, true),
        rule(K::Dedupe, "dedupe", Range, Any, false),
        rule(K::CopyRange, "copy-range", Range, Any, true),
        rule(K::Exchange, "exchange-range", Range, Any, false),
        rule(K::Unknown, "unknown", Everything, Any, false),
    ]
};

impl OperationKind {
    /// Whether it writes bytes: when the file grows XFS may allocate ahead for
    /// that, and ext4 truncate what it did if it fails. A copy is a write
    /// where blocks cannot be shared.
    pub const fn writes_data(self) -> bool {
        matches!(self, Self::Write | Self::WriteUntorn | Self::CopyRange)
    }

    /// Whether what it allocates is unwritten, or moves, and may become one
    /// extent with what lies beside it.
    pub const fn leaves_unwritten(self) -> bool {
        matches!(
            self,
            Self::Allocate
                | Self::AllocateKeepSize
                | Self::ZeroRange
                | Self::WriteZeroes
                | Self::CollapseRange
                | Self::InsertRange
                | Self::Reshape
        )
    }

    /// The row of this operation.
    #[must_use]
    pub const fn rule(self) -> &'static Rule {
        &RULES[self as usize]
    }

    /// The word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.rule().name
    }

    /// Blocks that others use as well may come to lie where it works.
    #[must_use]
    pub const fn may_bring_shared(self) -> bool {
        matches!(
            self,
            Self::Clone
                | Self::Dedupe
                | Self::CopyRange
                | Self::Exchange
                | Self::CollapseRange
                | Self::InsertRange
                | Self::Reshape
                | Self::Unknown
        )
    }

    /// It changes neither bytes nor their places, nor lets its caller do so
    /// later.
    #[must_use]
    pub const fn is_harmless(self) -> bool {
        matches!(self, Self::Read | Self::OpenRead | Self::MapRead)
    }
}

/// An operation on bytes `range` of a file. For [`OperationKind::Truncate`]
/// the range holds the new size: `start` is the smallest and `end` the
/// largest it can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// What it is.
    pub kind: OperationKind,
    /// Where, in bytes.
    pub range: Range<u64>,
    /// Where it may be instead, as far as can be seen: an appending write
    /// goes to the end of file whatever its offset says.
    pub or: Option<Range<u64>>,
    /// A write that may bypass the page cache, and empties it then.
    pub direct: bool,
    /// Blocks that others use as well may come to lie where they did not.
    pub brings_shared: bool,
}

impl Operation {
    /// An operation.
    #[must_use]
    pub const fn new(kind: OperationKind, range: Range<u64>) -> Self {
        Self {
            kind,
            range,
            or: None,
            direct: true,
            // What is inserted is a hole, and nothing comes nearer by it.
            brings_shared: kind.may_bring_shared() && !matches!(kind, OperationKind::InsertRange),
        }
    }

    /// Whether it may make a file of `size` bytes larger.
    fn reaches_beyond(&self, size: u64) -> bool {
        self.range.end > size || self.or.as_ref().is_some_and(|range| range.end > size)
    }

    /// Whether it may work on any of these bytes.
    fn meets(&self, bytes: &Range<u64>) -> bool {
        let to_the_end = self.kind.rule().reach == Reach::ToTheEnd;
        std::iter::once(&self.range).chain(&self.or).any(|range| {
            let end = if to_the_end { u64::MAX } else { range.end };
            intersects(&(range.start..end), bytes)
        })
    }

    /// Bytes outside of which no pin can mind it, in a file of `size` bytes.
    #[must_use]
    pub fn reach(&self, size: u64) -> Range<u64> {
        let rule = self.kind.rule();
        let mut reach = match rule.reach {
            Reach::Nothing => return 0..0,
            Reach::Range => self.range.clone(),
            // Pages are thrown out from one block earlier on.
            Reach::ToTheEnd => self.range.start.saturating_sub(LARGEST_BLOCK)..u64::MAX,
            Reach::BeyondSize => self.range.start.saturating_sub(LARGEST_BLOCK)..u64::MAX,
            Reach::Everything => 0..u64::MAX,
        };
        if let Some(or) = &self.or {
            reach = reach.start.min(or.start)..reach.end.max(or.end);
        }
        if rule.grows && reach.end.max(self.range.end) > size {
            reach.start = reach.start.min(size.saturating_sub(1));
        }
        // What shares a page or a block with it is thrown out, zeroed or
        // copied with it.
        rounded_out(&reach, LARGEST_BLOCK)
    }
}

/// Bytes in the largest block or page there is.
pub const LARGEST_BLOCK: u64 = 64 << 10;

/// What gates need to know of a kind beside its [`Rule`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traits {
    /// Blocks that others use as well may come to lie where it works.
    pub brings_shared: bool,
    /// It writes to the blocks it reaches, or zeroes in them.
    pub touches: bool,
    /// The pages it throws out of the page cache.
    pub lets_go: LetsGo,
}

/// The pages an operation throws out of the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LetsGo {
    /// None.
    Nothing,
    /// Those of its range.
    Range,
    /// Those from a block before its range on.
    ToTheEnd,
    /// Those of its range, if it goes past the page cache.
    RangeIfDirect,
}

impl LetsGo {
    /// Where the pages lie that an operation at `range` throws out, in a file
    /// of so large blocks; a `direct` one may bypass the page cache.
    fn pages(self, range: &Range<u64>, direct: bool, block: u64) -> Option<Range<u64>> {
        let (before, end) = match self {
            Self::Nothing => return None,
            Self::RangeIfDirect if !direct => return None,
            Self::Range | Self::RangeIfDirect => (0, range.end),
            // From one block earlier on, since it may join the one that is
            // moved (`xfs_prepare_shift`, fs/xfs/xfs_bmap_util.c).
            Self::ToTheEnd => (block, u64::MAX),
        };
        let page = mapdirect_sys::mmap::page_size();
        let start = range.start.saturating_sub(before);
        Some(start - start % page..end)
    }
}

impl Traits {
    /// Those of a kind.
    #[must_use]
    pub fn of(kind: OperationKind) -> Self {
        use OperationKind as K;
        let rule = kind.rule();
        Self {
            brings_shared: Operation::new(kind, 0..0).brings_shared,
            touches: match kind {
                K::Truncate | K::Reshape | K::Exchange | K::Clone | K::CopyRange => true,
                kind => !kind.is_harmless() && rule.reach == Reach::Range,
            },
            lets_go: match kind {
                K::Write | K::WriteUntorn => LetsGo::RangeIfDirect,
                K::PunchHole
                | K::ZeroRange
                | K::WriteZeroes
                | K::UnshareRange
                | K::Clone
                | K::Dedupe
                | K::CopyRange
                | K::Exchange => LetsGo::Range,
                K::CollapseRange | K::InsertRange | K::Reshape => LetsGo::ToTheEnd,
                _ => LetsGo::Nothing,
            },
        }
    }
}

/// What a pin keeps still, as far as verdicts need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pinned {
    /// The range, rounded out to blocks; to the end of all files for a pin of
    /// the whole file.
    range: Range<u64>,
    /// A size below this would free blocks of the pin, or bytes that were in
    /// it.
    size_floor: u64,
    /// The size itself is pinned to this.
    size: Option<u64>,
    /// Frozen runs, in file order.
    frozen: Box<[(Range<u64>, ExtentState)]>,
    block: u64,
    /// Size of the file when it was pinned.
    file_size: u64,
    beside: Beside,
    /// What its mapping asks for; of a pin that is mapped.
    mapped: Option<Mapped>,
    apart: Apart,
}

/// Whether folios of the page cache may hold both frozen blocks of a pin and
/// blocks that somebody stores to: a store to one page makes all of its folio
/// dirty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Apart {
    /// They may: nothing near frozen blocks can be mapped for storing.
    No,
    /// There are no folios: DAX.
    Without,
    /// No folio that ends before the end of the file does, as long as these
    /// pages, by their offsets in file order, stay in the page cache as they
    /// are.
    Held(Box<[u64]>),
}

/// What a mapping of a pin asks for beyond the pin.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapped {
    /// The page that holds the end of the file, if it also holds pinned
    /// blocks behind it: a store would allocate those once the file had
    /// grown, so it may not grow.
    tail: Option<Range<u64>>,
}

/// What lies beside a pin and takes blocks of it along when it is written to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Beside {
    /// Runs that may not be written to: shared blocks whose copy would take
    /// their neighbours with it (XFS), the rest of an unwritten extent that
    /// is converted as a whole (ext4).
    pub frozen: Vec<Range<u64>>,
    /// A block that comes to be shared in here would be such a run, so none
    /// may. To let it be shared and refuse writes to it instead would let
    /// whoever can read the file keep out those who can write to it; and a
    /// store to a mapping asks nobody, and makes a whole folio dirty, shared
    /// blocks of it included (`iomap_page_mkwrite`, fs/iomap/buffered-io.c).
    pub window: Option<Range<u64>>,
    /// A write that makes the file grow allocates ahead, into holes of the
    /// pin beyond the end of the file (XFS: `xfs_iomap_prealloc_size`,
    /// fs/xfs/xfs_iomap.c). Whether it does is seen by XFS when the write has
    /// the lock of the inode, and the file may have been made larger and
    /// smaller again before. It never gets smaller than it was when it was
    /// pinned: a write that ends there does not make it grow.
    pub grows_into: bool,
    /// A write that would have made the file grow and fails frees all blocks
    /// behind its end, those of the pin as well (ext4:
    /// `ext4_truncate_failed_write`, fs/ext4/truncate.h), until the file has
    /// grown over them. Smaller it does not get before, so whether it has is
    /// known when the write is judged.
    pub failing_frees: bool,
    /// Blocks next to unwritten ones of the pin: what comes to be unwritten
    /// there becomes one extent with them, and what is written to that is
    /// converted with its neighbours (ext4:
    /// `ext4_ext_convert_to_initialized`, fs/ext4/extents.c).
    pub edges: Vec<Range<u64>>,
}

impl Beside {
    /// Whether writing to `range` takes blocks of the pin along; an `untorn`
    /// write, if one of the kind is asked for.
    ///
    /// An untorn write goes to new blocks, and XFS sets more of those aside
    /// than it needs (`xfs_atomic_write_cow_iomap_begin`,
    /// fs/xfs/xfs_iomap.c, 6.16), whether anything is shared or not.
    fn minds(&self, range: &Range<u64>, untorn: bool) -> bool {
        self.frozen.iter().any(|run| intersects(run, range))
            || untorn
                && self
                    .window
                    .as_ref()
                    .is_some_and(|window| intersects(window, range))
    }
}

impl Pinned {
    /// The facts of a pin over `map`; `whole_file` pins the size as well.
    #[must_use]
    pub fn new(map: &BlockMap, whole_file: bool) -> Self {
        let mut range = map.range();
        let mut frozen: Vec<_> = map
            .frozen()
            .map(|extent| (extent.offset..extent.end(), extent.state))
            .collect();
        let block = u64::from(map.block_size()).max(1);
        // Blocks beyond the end of the file go with any truncation to less
        // than their end, to the same or a larger size too (XFS).
        let ahead = map
            .extents()
            .iter()
            .filter(|extent| extent.state != ExtentState::Hole)
            .map(Extent::end)
            .filter(|end| *end > map.file_size().next_multiple_of(block))
            .max();
        let size_floor = range.end.min(map.file_size()).max(ahead.unwrap_or(0));
        if whole_file {
            frozen.push((range.end..u64::MAX, ExtentState::Hole));
            range.end = u64::MAX;
        }
        Self {
            range,
            size_floor,
            size: whole_file.then_some(map.file_size()),
            frozen: frozen.into(),
            block,
            file_size: map.file_size(),
            beside: Beside::default(),
            mapped: None,
            apart: Apart::No,
        }
    }

    /// The same, mapped by `plan`, `cached` if through the page cache. Blocks
    /// that share a page with frozen ones are frozen with them: the holder has
    /// a copy of that page, which must stay true.
    #[must_use]
    pub fn mapped(mut self, plan: &Plan, cached: bool) -> Self {
        let mut frozen: Vec<_> = std::mem::take(&mut self.frozen).into();
        let copied = plan
            .segments()
            .iter()
            .filter(|segment| segment.pages == Pages::Copied);
        for segment in copied {
            let page =
                segment.range.start.max(self.range.start)..segment.range.end.min(self.range.end);
            frozen.push((page, ExtentState::Unknown));
        }
        frozen.sort_by_key(|(run, _)| run.start);
        self.frozen = without_overlaps(frozen).into();
        let behind = self.file_size.next_multiple_of(self.block)
            ..self.file_size.next_multiple_of(plan.page());
        let tail = cached && intersects(&behind, &self.range);
        self.mapped = Some(Mapped {
            tail: tail.then_some(behind),
        });
        self
    }

    /// The same, kept apart from what is stored to.
    #[must_use]
    pub fn apart(mut self, apart: Apart) -> Self {
        self.apart = apart;
        self
    }

    /// The same with what lies beside it.
    #[must_use]
    pub fn with_beside(mut self, beside: Beside) -> Self {
        self.beside = beside;
        self
    }

    /// Whether an operation changes blocks of the pin by what it does beside
    /// it; see [`Beside`] and [`Apart`]. By `moved` bytes blocks from behind may
    /// have come nearer since it was granted.
    #[must_use]
    pub fn minds_beside(&self, operation: &Operation, size: u64, moved: u64) -> bool {
        use OperationKind as K;
        let kind = operation.kind;
        let tail = matches!(&self.mapped, Some(Mapped { tail: Some(_) }));
        if tail && kind.rule().grows && operation.reaches_beyond(self.file_size) {
            return true;
        }
        if kind.writes_data() && operation.meets(&self.ahead()) {
            return true;
        }
        if self.beside.failing_frees
            && kind.writes_data()
            && size < self.size_floor
            && operation.reaches_beyond(size)
        {
            return true;
        }
        if kind.leaves_unwritten() && self.beside.edges.iter().any(|edge| operation.meets(edge)) {
            return true;
        }
        // What moves would not be known any more.
        if kind == K::InsertRange
            && self.beside.window.is_some()
            && self.beside.frozen.iter().any(|run| operation.meets(run))
        {
            return true;
        }
        if self.lets_go_of_held(operation) {
            return true;
        }
        if kind == K::MapWrite && self.shares_folios(&operation.range) {
            return true;
        }
        if operation.brings_shared
            && let Some(window) = self.unshared_window(moved)
            && intersects(&window, &operation.reach(size))
        {
            return true;
        }
        self.touched(operation, size).any(|range| {
            // What lies wholly inside is judged by its own blocks.
            let inside = range.start >= self.range.start && range.end <= self.range.end;
            !inside && self.beside.minds(&range, kind == K::WriteUntorn)
        })
    }

    /// Where a write may make the file grow, and allocate ahead into the pin:
    /// what it takes lies behind where it begins.
    fn ahead(&self) -> Range<u64> {
        if self.beside.grows_into {
            self.file_size..self.range.end
        } else {
            0..0
        }
    }

    /// Where nothing may come to be shared: what lies beside the pin, or will
    /// when what is behind has moved so many bytes nearer.
    #[must_use]
    pub fn unshared_window(&self, moved: u64) -> Option<Range<u64>> {
        let window = self.beside.window.as_ref()?;
        Some(window.start..window.end.saturating_add(moved))
    }

    /// The blocks that an operation writes to, or zeroes a part of: shared
    /// ones are copied for that, unwritten ones converted.
    fn touched(&self, operation: &Operation, size: u64) -> impl Iterator<Item = Range<u64>> {
        let block = self.block;
        let rule = operation.kind.rule();
        let reaches_blocks = Traits::of(operation.kind).touches;
        let grows = rule.grows && operation.reaches_beyond(size) && !size.is_multiple_of(block);
        // The block that held the end of the file is zeroed behind it.
        let last = grows.then(|| size - size % block..size);
        std::iter::once(&operation.range)
            .chain(&operation.or)
            .filter(move |_| reaches_blocks)
            .map(|range| rounded_out(range, block))
            .chain(last)
            .collect::<Vec<_>>()
            .into_iter()
    }

    /// Whether an operation throws pages out of the page cache that must stay.
    fn lets_go_of_held(&self, operation: &Operation) -> bool {
        let Apart::Held(held) = &self.apart else {
            return false;
        };
        let lets_go = Traits::of(operation.kind).lets_go;
        std::iter::once(&operation.range)
            .chain(&operation.or)
            .filter_map(|range| lets_go.pages(range, operation.direct, self.block))
            .any(|pages| {
                let first = held.partition_point(|offset| *offset < pages.start);
                held.get(first).is_some_and(|offset| *offset < pages.end)
            })
    }

    /// The pages that may not be in one folio with pages that are stored to:
    /// of frozen blocks of the pin, and of what lies beside it and would take
    /// blocks of it along. Disjoint, in file order.
    #[must_use]
    pub fn frozen_pages(&self, beside: &Beside, page: u64) -> Vec<Range<u64>> {
        let end = self.file_size.next_multiple_of(self.block);
        // Nothing is stored to behind the end of the file.
        let tail = end..end.next_multiple_of(page);
        let mut pages: Vec<Range<u64>> = self
            .frozen
            .iter()
            .map(|(run, _)| run)
            .chain(&beside.frozen)
            .filter(|run| run.start < tail.start || run.end > tail.end)
            .map(|run| {
                let start = if tail.contains(&run.start) {
                    tail.end
                } else {
                    run.start - run.start % page
                };
                start..run.end.checked_next_multiple_of(page).unwrap_or(u64::MAX)
            })
            .collect();
        pages.sort_by_key(|run| run.start);
        pages.dedup_by(|next, last| {
            let joins = next.start <= last.end;
            if joins {
                last.end = last.end.max(next.end);
            }
            joins
        });
        pages
    }

    /// Whether a store to a mapping of `range` could take frozen blocks of
    /// the pin along that are not in the range themselves.
    fn shares_folios(&self, range: &Range<u64>) -> bool {
        match &self.apart {
            Apart::No => self.frozen_in(folios(range)).next().is_some(),
            Apart::Without => false,
            // Apart before the end of the file. Behind it there is nothing to
            // keep anything apart, but nothing to store to either, until it
            // grows.
            Apart::Held(_) => {
                let end = self.file_size.next_multiple_of(self.block);
                range.end > folio_page(end)
                    && self.frozen_in(end..folios(range).end).next().is_some()
            }
        }
    }

    /// Whether `range` may be mapped for storing as far as the blocks in it
    /// go. What lies behind the end of the file in its last page does not
    /// count where the file may not grow.
    fn may_store_to(&self, range: &Range<u64>) -> bool {
        let held = self.size.is_some() || matches!(&self.mapped, Some(Mapped { tail: Some(_) }));
        let end = self.file_size.next_multiple_of(self.block);
        let ignored = if held { end..folio_page(end) } else { end..end };
        [
            range.start..range.end.min(ignored.start),
            range.start.max(ignored.end)..range.end,
        ]
        .into_iter()
        .filter(|part| part.start < part.end)
        .all(|part| self.frozen_in(part).next().is_none())
    }

    /// Whether any block of it is frozen.
    #[must_use]
    pub fn has_frozen(&self) -> bool {
        !self.frozen.is_empty()
    }

    /// The frozen runs that meet `reach`.
    fn frozen_in(&self, reach: Range<u64>) -> impl Iterator<Item = &(Range<u64>, ExtentState)> {
        let from = self
            .frozen
            .partition_point(|(run, _)| run.end <= reach.start);
        self.frozen[from..]
            .iter()
            .take_while(move |(run, _)| run.start < reach.end)
    }
}

/// Whether an operation may go on, as far as one pin is concerned, in a file
/// of `size` bytes. Every rule refuses on what it meets, so an operation may
/// go on under many pins exactly when it may under each.
#[must_use]
pub fn judge(operation: &Operation, pinned: &Pinned, size: u64) -> bool {
    let rule = operation.kind.rule();
    judge_range(rule, &operation.range, pinned, size)
        && operation
            .or
            .as_ref()
            .is_none_or(|range| judge_range(rule, range, pinned, size))
}

fn judge_range(rule: &Rule, range: &Range<u64>, pinned: &Pinned, size: u64) -> bool {
    let reach = match rule.reach {
        Reach::Nothing => return true,
        Reach::Everything => return false,
        Reach::Range => reach_of(rule.kind, range, size),
        Reach::ToTheEnd => range.start..u64::MAX,
        Reach::BeyondSize => {
            let resized = pinned.size.is_some_and(|size| *range != (size..size));
            if range.start < pinned.size_floor || resized {
                return false;
            }
            0..0
        }
    };
    let meets = match rule.refused_on {
        Meets::Frozen if rule.kind == OperationKind::MapWrite => !pinned.may_store_to(&reach),
        Meets::Any => intersects(&reach, &pinned.range),
        Meets::Frozen => !reach.is_empty() && pinned.frozen_in(reach).next().is_some(),
    };
    if meets {
        return false;
    }
    // Growing zeroes the rest of the block that holds the old end of file.
    // Written, it is zeroed in place; a hole or unwritten, it is left alone;
    // shared, it is copied.
    if rule.grows && range.end > size && !size.is_multiple_of(pinned.block) {
        let last = size - size % pinned.block;
        return !pinned
            .frozen_in(last..size)
            // Unknown: whatever shares a page with others.
            .any(|(_, state)| matches!(state, ExtentState::Shared | ExtentState::Unknown));
    }
    true
}

/// The bytes an operation at `range` of a file of `size` bytes reaches. A hole
/// that ends behind the end of the file may be punched to the end of the page
/// that is in then (ext4 with blocks smaller than pages: `ext4_punch_hole`,
/// fs/ext4/inode.c, 6.12).
fn reach_of(kind: OperationKind, range: &Range<u64>, size: u64) -> Range<u64> {
    let end = if kind == OperationKind::PunchHole && range.end > size {
        folio_page(range.end)
    } else {
        range.end
    };
    range.start..end
}

/// The bytes that folios of the page cache around `range` may hold: a store
/// to one page makes all of its folio dirty.
#[must_use]
pub fn folios(range: &Range<u64>) -> Range<u64> {
    rounded_out(range, folio_size())
}

/// The bytes of all units that hold any of `range`.
fn rounded_out(range: &Range<u64>, unit: u64) -> Range<u64> {
    let end = range.end.checked_next_multiple_of(unit);
    range.start - range.start % unit..end.unwrap_or(u64::MAX)
}

/// Bytes in the largest folio of the page cache: a huge page, or what fits
/// into two levels of its index (`MAX_PAGECACHE_ORDER`,
/// include/linux/pagemap.h).
#[must_use]
pub fn folio_size() -> u64 {
    let page = mapdirect_sys::mmap::page_size();
    page * (page / 8).min(1 << 11)
}

/// The end of the page that byte `end` lies in, if it is not one itself.
fn folio_page(end: u64) -> u64 {
    end.checked_next_multiple_of(mapdirect_sys::mmap::page_size())
        .unwrap_or(u64::MAX)
}

/// Runs in file order, the later ones cut off where they overlap.
fn without_overlaps(runs: Vec<(Range<u64>, ExtentState)>) -> Vec<(Range<u64>, ExtentState)> {
    let mut kept: Vec<(Range<u64>, ExtentState)> = Vec::with_capacity(runs.len());
    for (run, state) in runs {
        let start = kept
            .last()
            .map_or(run.start, |(last, _)| run.start.max(last.end));
        if start < run.end {
            kept.push((start..run.end, state));
        }
    }
    kept
}

fn intersects(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start.max(other.start) < one.end.min(other.end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::DeviceId;
    use OperationKind as K;
    use proptest::prelude::*;

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

    fn may(kind: K, range: Range<u64>, pinned: &Pinned, size: u64) -> bool {
        judge(&Operation::new(kind, range), pinned, size)
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
            let pinned = Pinned::new(&map, false);
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
            let pinned = Pinned::new(&map, false);
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
            let pinned = Pinned::new(&map, false);
            let mut operation = Operation::new(kind, start..start + length);
            operation.or = append.then_some(size..size + length);
            let reach = operation.reach(size);
            if !intersects(&reach, &map.range()) {
                prop_assert!(judge(&operation, &pinned, size));
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
            let pinned = Pinned::new(&map, false);
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
    fn the_rules_stand_in_the_order_of_the_kinds() {
        for (at, rule) in RULES.iter().enumerate() {
            assert_eq!(rule.kind as usize, at, "{}", rule.name);
        }
    }

    #[test]
    fn reading_is_always_allowed() {
        let map = map(8 * BLOCK, 0..8 * BLOCK, &[ExtentState::Shared; 8]);
        for whole in [false, true] {
            let pinned = Pinned::new(&map, whole);
            for kind in [K::Read, K::OpenRead, K::MapRead] {
                assert!(may(kind, 0..u64::MAX, &pinned, 8 * BLOCK));
            }
        }
    }

    #[test]
    fn the_end_of_a_pin_is_capped_by_the_size_of_the_file() {
        // 5000 bytes, pinned to the end of their second block.
        let map = map(5000, 0..2 * BLOCK, &[ExtentState::Written; 2]);
        let pinned = Pinned::new(&map, false);
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
        let pinned = Pinned::new(&map, false);
        assert!(!may(K::Truncate, BLOCK..BLOCK, &pinned, BLOCK));
        assert!(!may(K::Truncate, 2 * BLOCK..2 * BLOCK, &pinned, BLOCK));
        assert!(may(K::Truncate, 3 * BLOCK..3 * BLOCK, &pinned, BLOCK));
    }

    #[test]
    fn a_whole_file_keeps_its_size() {
        let map = map(2 * BLOCK, 0..2 * BLOCK, &[ExtentState::Written; 2]);
        let pinned = Pinned::new(&map, true);
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
        let pinned = Pinned::new(&map, false);
        assert!(!may(K::Write, 100_000..100_001, &pinned, 5000));
        assert!(!may(K::Truncate, 100_000..100_000, &pinned, 5000));
        let written = Pinned::new(
            &self::map(5000, 0..2 * BLOCK, &[ExtentState::Written; 2]),
            false,
        );
        assert!(may(K::Write, 100_000..100_001, &written, 5000));
    }
}
