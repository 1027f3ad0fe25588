//! The facts about one pin that judgements need.

use super::geometry::{Geometry, intersects};
use crate::extent::{BlockMap, Extent, ExtentState};
use crate::plan::{Pages, Plan};
use std::ops::Range;

/// What a pin refuses: the facts from which [`Layers`](super::Layers) are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pinned {
    /// The range, extended to whole blocks. A pin of the whole file extends to
    /// the largest offset.
    pub(super) range: Range<u64>,
    /// A smaller file size would free blocks of the pin, or bytes that were in
    /// it.
    pub(super) size_floor: u64,
    /// The only size that a pin of the whole file permits.
    pub(super) fixed_size: Option<u64>,
    /// Frozen runs, in file order and disjoint. A block that is frozen only
    /// because it shares a page with others is [`ExtentState::Unknown`].
    pub(super) frozen: Box<[(Range<u64>, ExtentState)]>,
    /// The number of bytes in a block.
    pub(super) block: u64,
    /// The size of the file when it was pinned.
    pub(super) file_size: u64,
    pub(super) geometry: Geometry,
    pub(super) beside: Beside,
    /// Whether the pin is mapped through the page cache, and the page with the
    /// end of the file also contains pinned blocks behind the end. Once the
    /// file had grown, a store would allocate those blocks, so the file may not
    /// grow.
    pub(super) holds_tail: bool,
    pub(super) apart: Apart,
    /// Whether the pin is of strength stable: blocks that are not stable may
    /// become so, and the size of the file is followed.
    pub(super) follows: bool,
    /// Parts of the range of a pin of strength stable in which it refuses
    /// nothing for now, but that blocks come to be shared.
    pub(super) gives_way: Box<[Range<u64>]>,
}

/// Whether folios of the page cache may contain both frozen blocks of a pin and
/// blocks that somebody stores to. A store to one page makes its whole folio
/// dirty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Apart {
    /// They may, so nothing near frozen blocks can be mapped writable.
    No,
    /// There are no folios: DAX.
    Without,
    /// No folio that ends before the end of the file does, as long as these
    /// pages stay in the page cache as they are. They are given by their
    /// offsets, in file order.
    Held(Box<[u64]>),
}

/// Blocks beside a pin that take blocks of the pin along when they are written
/// to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Beside {
    /// Runs that may not be written to: shared blocks whose copy would include
    /// their neighbours (XFS), and the rest of an unwritten extent that is
    /// converted as a whole (ext4).
    pub frozen: Vec<Range<u64>>,
    /// A block in here that becomes shared would be such a run, so no block
    /// here may become shared. The alternative would be to permit sharing and
    /// to refuse writes to the shared block. But then anybody who can read the
    /// file could keep out those who can write to it. Also, a store to a
    /// mapping asks nobody, and makes a whole folio dirty, including its shared
    /// blocks (`iomap_page_mkwrite`, fs/iomap/buffered-io.c).
    pub window: Option<Range<u64>>,
    /// Whether a write that makes the file grow allocates ahead, into holes of
    /// the pin beyond the end of the file (XFS: `xfs_iomap_prealloc_size`,
    /// fs/xfs/xfs_iomap.c). XFS decides whether the file grows when the write
    /// has the lock of the inode; by then the file may have been made larger
    /// and smaller again. But the file never gets smaller than it was when it
    /// was pinned, so a write that ends before that size does not make it grow.
    pub grows_into: bool,
    /// Whether a write that would have made the file grow and fails frees all
    /// blocks behind the end of the file, including those of the pin (ext4:
    /// `ext4_truncate_failed_write`, fs/ext4/truncate.h). It does so until the
    /// file has grown over these blocks. The file does not get smaller before
    /// that, so this is known when the write is judged.
    pub failing_frees: bool,
    /// Blocks next to unwritten blocks of the pin. A block here that becomes
    /// unwritten becomes one extent with those, and a write to that extent
    /// converts its neighbours, too (ext4: `ext4_ext_convert_to_initialized`,
    /// fs/ext4/extents.c).
    pub edges: Vec<Range<u64>>,
}

impl Pinned {
    /// The facts of a pin over `map`. `whole_file` also pins the size.
    #[must_use]
    pub fn new(map: &BlockMap, whole_file: bool, geometry: Geometry) -> Self {
        let mut range = map.range();
        let mut frozen: Vec<_> = map
            .frozen()
            .map(|extent| (extent.offset..extent.end(), extent.state))
            .collect();
        let block = u64::from(map.block_size()).max(1);
        // Blocks beyond the end of the file are freed by any truncation to less
        // than their end, even to the same or a larger size (XFS).
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
            follows: false,
            gives_way: Box::default(),
        }
    }

    /// The facts of a pin of strength stable. It refuses what frees, moves or
    /// shares blocks anywhere in `range`, which may go to the largest offset:
    /// a gate does not learn when a block becomes stable. No block may become
    /// shared in `window`.
    #[must_use]
    pub fn stable(
        range: Range<u64>,
        window: Option<Range<u64>>,
        block: u64,
        geometry: Geometry,
    ) -> Self {
        Self {
            range,
            size_floor: 0,
            fixed_size: None,
            frozen: Box::default(),
            block: block.max(1),
            file_size: 0,
            geometry,
            beside: Beside {
                window,
                ..Beside::default()
            },
            holds_tail: false,
            apart: Apart::Without,
            follows: true,
            gives_way: Box::default(),
        }
    }

    /// This pin of strength stable, giving way in these ranges: whatever frees
    /// or moves blocks there is let pass.
    #[must_use]
    pub fn giving_way(mut self, ranges: impl IntoIterator<Item = Range<u64>>) -> Self {
        let mut ranges: Vec<_> = ranges.into_iter().collect();
        join(&mut ranges);
        self.gives_way = ranges.into();
        self
    }

    /// The parts of the range in which the pin does not give way.
    pub(super) fn firm(&self) -> Vec<Range<u64>> {
        let mut firm = Vec::new();
        let mut at = self.range.start;
        for gap in &self.gives_way {
            firm.push(at..gap.start.min(self.range.end));
            at = at.max(gap.end);
        }
        firm.push(at..self.range.end);
        firm.retain(|run| run.start < run.end);
        firm
    }

    /// This pin, mapped by `plan`, through the page cache if `cached`. Blocks
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
            // Blocks that are frozen by themselves keep their state.
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

    /// The parts of `range` that no frozen run covers.
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

    /// This pin, with its frozen blocks kept apart like this.
    #[must_use]
    pub fn apart(mut self, apart: Apart) -> Self {
        self.apart = apart;
        self
    }

    /// This pin, with these blocks beside it.
    #[must_use]
    pub fn with_beside(mut self, beside: Beside) -> Self {
        self.beside = beside;
        self
    }

    /// The range in which a write may make the file grow, and allocate ahead
    /// into the pin. XFS allocates behind the start of the write.
    pub(super) fn ahead(&self) -> Range<u64> {
        if self.beside.grows_into {
            self.file_size..self.range.end
        } else {
            0..0
        }
    }

    /// The end of the block that held the end of the file.
    pub(super) fn file_end(&self) -> u64 {
        self.file_size.next_multiple_of(self.block)
    }

    /// The rest of the page that held the end of the file, if the file may not
    /// grow. Nothing is ever stored there, so this part may be mapped writable
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
    /// pages of frozen blocks of the pin, and of blocks beside the pin that
    /// would take blocks of the pin along. Disjoint, in file order.
    #[must_use]
    pub fn frozen_pages(&self, beside: &Beside) -> Vec<Range<u64>> {
        let page = self.geometry.page;
        let end = self.file_end();
        // Nothing is stored behind the end of the file.
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

    /// Whether any block of the pin is frozen.
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
