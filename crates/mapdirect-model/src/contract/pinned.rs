//! What one pin keeps still.

use super::geometry::{Geometry, intersects};
use crate::extent::{BlockMap, Extent, ExtentState};
use crate::plan::{Pages, Plan};
use std::ops::Range;

/// What a pin keeps still, as far as verdicts need it: the facts that
/// [`Layers`](super::Layers) are made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pinned {
    /// The range, rounded out to blocks; to the end of all files for a pin of
    /// the whole file.
    pub(super) range: Range<u64>,
    /// A size below this would free blocks of the pin, or bytes that were in
    /// it.
    pub(super) size_floor: u64,
    /// The only size that a pin of the whole file allows.
    pub(super) fixed_size: Option<u64>,
    /// Frozen runs, in file order and disjoint. A block that is frozen only
    /// because it shares a page with others is [`ExtentState::Unknown`].
    pub(super) frozen: Box<[(Range<u64>, ExtentState)]>,
    /// Bytes in a block.
    pub(super) block: u64,
    /// Size of the file when it was pinned.
    pub(super) file_size: u64,
    pub(super) geometry: Geometry,
    pub(super) beside: Beside,
    /// The pin is mapped through the page cache, and the page that holds the
    /// end of the file also holds pinned blocks behind it. A store would
    /// allocate those once the file had grown, so it may not grow.
    pub(super) holds_tail: bool,
    pub(super) apart: Apart,
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

impl Pinned {
    /// The facts of a pin over `map`; `whole_file` pins the size as well.
    #[must_use]
    pub fn new(map: &BlockMap, whole_file: bool, geometry: Geometry) -> Self {
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
            fixed_size: whole_file.then_some(map.file_size()),
            frozen: frozen.into(),
            block,
            file_size: map.file_size(),
            geometry,
            beside: Beside::default(),
            holds_tail: false,
            apart: Apart::No,
        }
    }

    /// The same, mapped by `plan`, through the page cache if `cached`. Blocks
    /// that share a page with frozen ones are frozen with them: the holder has
    /// a copy of that page, which must stay true.
    #[must_use]
    pub fn mapped(mut self, plan: &Plan, cached: bool) -> Self {
        let mut frozen = self.frozen.to_vec();
        let copied = plan
            .segments()
            .iter()
            .filter(|segment| segment.pages == Pages::Copied);
        for segment in copied {
            let range = &segment.range;
            let inside = range.start.max(self.range.start)..range.end.min(self.range.end);
            // What is frozen by itself stays what it is.
            frozen.extend(
                self.gaps(inside)
                    .into_iter()
                    .map(|gap| (gap, ExtentState::Unknown)),
            );
        }
        frozen.sort_by_key(|(run, _)| run.start);
        self.frozen = frozen.into();
        let end = self.file_end();
        let behind = end..self.geometry.page_end(end);
        self.holds_tail = cached && intersects(&behind, &self.range);
        self
    }

    /// What of `range` no frozen run covers.
    fn gaps(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let from = self
            .frozen
            .partition_point(|(run, _)| run.end <= range.start);
        let mut gaps = Vec::new();
        let mut at = range.start;
        for (run, _) in &self.frozen[from..] {
            if run.start >= range.end {
                break;
            }
            if at < run.start {
                gaps.push(at..run.start);
            }
            at = run.end;
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        gaps
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

    /// Where a write may make the file grow, and allocate ahead into the pin:
    /// what it takes lies behind where it begins.
    pub(super) fn ahead(&self) -> Range<u64> {
        if self.beside.grows_into {
            self.file_size..self.range.end
        } else {
            0..0
        }
    }

    /// Where the block ends that held the end of the file.
    pub(super) fn file_end(&self) -> u64 {
        self.file_size.next_multiple_of(self.block)
    }

    /// The rest of the page that held the end of the file, if the file may not
    /// grow: nothing is ever stored there, so it may be mapped for storing
    /// whatever lies under it.
    pub(super) fn idle_tail(&self) -> Range<u64> {
        let end = self.file_end();
        if self.fixed_size.is_some() || self.holds_tail {
            end..self.geometry.page_end(end)
        } else {
            end..end
        }
    }

    /// The pages that may not be in one folio with pages that are stored to:
    /// of frozen blocks of the pin, and of what lies beside it and would take
    /// blocks of it along. Disjoint, in file order.
    #[must_use]
    pub fn frozen_pages(&self, beside: &Beside) -> Vec<Range<u64>> {
        let page = self.geometry.page;
        let end = self.file_end();
        // Nothing is stored to behind the end of the file.
        let tail = end..self.geometry.page_end(end);
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
                start..self.geometry.page_end(run.end)
            })
            .collect();
        join(&mut pages);
        pages
    }

    /// Whether any block of it is frozen.
    #[must_use]
    pub fn has_frozen(&self) -> bool {
        !self.frozen.is_empty()
    }
}

/// Sorts runs, and joins those that touch.
pub(super) fn join(runs: &mut Vec<Range<u64>>) {
    runs.sort_by_key(|run| run.start);
    runs.dedup_by(|next, last| {
        let joins = next.start <= last.end;
        if joins {
            last.end = last.end.max(next.end);
        }
        joins
    });
}
