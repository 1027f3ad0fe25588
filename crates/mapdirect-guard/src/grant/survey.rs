//! What a pin promises, read from the disk.

use super::Attempt;
use super::refusal::*;
use crate::Errno;
use crate::apart::{self, Held};
use crate::policy::{self, Apart, Beside, Pinned};
use mapdirect_model::facts::Filesystem;
use mapdirect_model::plan::Plan;
use mapdirect_proto::MAX_INLINE_EXTENTS;
use mapdirect_proto::{BlockMap, Extent, ExtentState, Flags, Granted, Reason, Refusal, extent};
use mapdirect_sys::mmap::page_size;
use mapdirect_sys::{fsync, memfd, xfs_eofblocks};
use rustix::fs::OFlags;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Writes a file back. It also fails for what went wrong before, in whatever
/// anybody wrote: whoever does fsync(2) first is told, and only they
/// (`file_check_and_advance_wb_err`, mm/filemap.c). That includes a direct
/// write that met somebody's pages in use (`dio_warn_stale_pagecache`, there).
pub(super) fn write_back(file: BorrowedFd<'_>) -> Result<(), Refusal> {
    fsync::fsync(file).map_err(|errno| Refusal {
        mend: String::from(
            "something written to the file before may not be on the disk, or be what is there: \
             if that does not matter, or was written again, try again",
        ),
        ..system("fsync", errno)
    })
}

/// What a pin promises, and what it takes to keep that.
pub(super) struct Still {
    pub(super) pinned: Pinned,
    pub(super) held: Option<Held>,
    /// Pages that nobody may have mapped to store to.
    pub(super) frozen: Vec<Range<u64>>,
    pub(super) beside: Beside,
}

impl Attempt<'_> {
    /// Reads the block map; unless nothing was let in since it was last at
    /// rest, after writing everything back, and until it stays the same.
    pub(super) fn read_map(&self, settled: bool) -> Result<BlockMap, Refusal> {
        let read = || {
            mapdirect_model::block_map::read(self.file.as_fd(), self.judged.range.clone())
                .map_err(|errno| system("FIEMAP", errno))
        };
        if !settled {
            write_back(self.file.as_fd())?;
        }
        let mut map = read()?;
        if !self.judged.facts.keeps_blocks_beyond_the_end() && reaches_beyond_the_end(&map) {
            // They would go by themselves, or become part of the file when
            // it grows.
            let (owner, size) = (self.judged.facts.owner, map.file_size());
            xfs_eofblocks::free(self.file.as_fd(), owner, size)
                .map_err(|errno| system("XFS_IOC_FREE_EOFBLOCKS", errno))?;
            map = read()?;
            if reaches_beyond_the_end(&map) {
                return Err(refusal(
                    Reason::StillChanging,
                    Errno::TXTBSY,
                    "XFS keeps blocks beyond the end of the file for writes to come",
                    "try again, or pin nothing beyond the end of the file",
                ));
            }
        }
        if settled && !is_moving(&map) {
            return Ok(map);
        }
        self.free_copy_blocks()?;
        let deadline = Instant::now() + self.patience;
        loop {
            let again = read()?;
            if again == map && !is_moving(&again) {
                return Ok(again);
            }
            if Instant::now() >= deadline {
                return Err(refusal(
                    Reason::StillChanging,
                    Errno::TXTBSY,
                    "its block map keeps changing although nobody has it open",
                    "try again later",
                ));
            }
            std::thread::sleep(Duration::from_millis(1));
            write_back(self.file.as_fd())?;
            map = again;
        }
    }

    /// Blocks that XFS has set aside for copies of shared blocks nearby would
    /// take those of the range along when they are written to: it looks there
    /// first (`xfs_map_blocks`, fs/xfs/xfs_aops.c). It does not show them to
    /// anybody (only debug kernels do), so they are taken back unseen; it
    /// does so for inodes without dirty pages (`xfs_can_free_cowblocks`).
    pub(super) fn free_copy_blocks(&self) -> Result<(), Refusal> {
        // Writing back a whole filesystem takes as long as others have written
        // to it: only where there is something to free.
        if self.judged.window().is_none()
            || !self.guard.gate.may_have_copy_blocks(self.file.as_fd())
        {
            return Ok(());
        }
        // fsync(2) leaves the inode marked as having dirty pages.
        rustix::fs::syncfs(&self.file).map_err(|errno| system("syncfs", errno))?;
        xfs_eofblocks::free(self.file.as_fd(), self.judged.facts.owner, 0)
            .map_err(|errno| system("XFS_IOC_FREE_EOFBLOCKS", errno))
    }

    /// What beside the range would take blocks of it along when written to.
    pub(super) fn look_beside(&self, map: &BlockMap) -> Result<Beside, Refusal> {
        let range = map.range();
        let is_ext4 = self.judged.facts.filesystem == Filesystem::Ext4;
        let block = u64::from(map.block_size()).max(1);
        let mut beside = Beside {
            window: self.judged.window(),
            failing_frees: is_ext4 && reaches_beyond_the_end(map),
            grows_into: self.judged.facts.allocates_ahead()
                && range.end > map.file_size().next_multiple_of(block),
            ..Beside::default()
        };
        let failed = |errno| system("FIEMAP", errno);
        if let Some(window) = &beside.window {
            let around = mapdirect_model::block_map::read(self.file.as_fd(), window.clone());
            let around = around.map_err(failed)?;
            beside.frozen.extend(
                around
                    .frozen()
                    .filter(|extent| extent.state == ExtentState::Shared)
                    .map(|extent| extent.offset..extent.end()),
            );
        } else {
            // FIEMAP cuts extents to what is asked for: ask for more.
            for edge in [range.start, range.end - 1] {
                let unwritten = |extent: &&Extent| extent.state == ExtentState::Unwritten;
                if map.find(edge).filter(unwritten).is_none() {
                    continue;
                }
                let around =
                    mapdirect_model::block_map::read(self.file.as_fd(), self.judged.reach());
                let around = around.map_err(failed)?;
                if let Some(extent) = around.find(edge).filter(unwritten) {
                    let run = extent.offset..extent.end();
                    if is_ext4 {
                        beside.edges.extend([
                            run.start.saturating_sub(block)..run.start,
                            run.end..run.end.saturating_add(block),
                        ]);
                    }
                    beside.frozen.push(run);
                }
            }
        }
        Ok(beside)
    }

    pub(super) fn check_map(&self, map: &BlockMap) -> Result<(), Refusal> {
        for (state, reason, text) in [
            (
                ExtentState::Inline,
                Reason::InlineData,
                "lies inside the inode",
            ),
            (
                ExtentState::Encoded,
                Reason::Encoded,
                "is encrypted or compressed",
            ),
        ] {
            if map.total(state) > 0 {
                return Err(refusal(
                    reason,
                    Errno::OPNOTSUPP,
                    format!("part of the range {text}"),
                    "",
                ));
            }
        }
        if map.is_stable() {
            return Ok(());
        }
        if let Some(mapped) = &self.judged.mapped
            && !self.judged.in_segments
        {
            let under: Vec<_> = map
                .frozen()
                .filter_map(|extent| extent.clipped(mapped))
                .collect();
            if let Some(first) = under.first() {
                let bytes: u64 = under.iter().map(|extent| extent.length).sum();
                return Err(refusal(
                    Reason::FrozenBlocks,
                    Errno::OPNOTSUPP,
                    format!(
                        "{bytes} bytes of the range cannot be stored to as they are; the \
                         first: {} bytes at {} ({})",
                        first.length, first.offset, first.state
                    ),
                    "use a library that maps them apart, or make the range stable first \
                     (mapdirect prepare)",
                ));
            }
        }
        if let Some(obstacle) = self.judged.facts.obstacle_to_frozen() {
            return Err(obstructed(obstacle));
        }
        Ok(())
    }

    /// The block map, what the pin promises of it, and what it takes to keep
    /// that. Until frozen blocks are kept apart from those that others store
    /// to, a store may still change them: so it is read again afterwards.
    pub(super) fn come_to_rest(
        &self,
        settled: bool,
    ) -> Result<(BlockMap, Pinned, Option<Held>), Refusal> {
        const TRIES: u32 = 10;
        let mut map = self.read_map(settled)?;
        for _ in 0..TRIES {
            self.check_map(&map)?;
            let Still { pinned, held, .. } = self.keep_still(&map)?;
            if held.is_none() && !pinned.has_frozen() {
                return Ok((map, pinned, held));
            }
            let again = self.read_map(false)?;
            if again == map {
                return Ok((map, pinned, held));
            }
            map = again;
        }
        Err(refusal(
            Reason::StillChanging,
            Errno::TXTBSY,
            "its block map keeps changing by stores through somebody's mapping",
            "have it unmapped there, or make the range stable first (mapdirect prepare)",
        ))
    }

    /// What the pin promises, and what it takes to keep that where somebody
    /// stores beside frozen blocks.
    pub(super) fn keep_still(&self, map: &BlockMap) -> Result<Still, Refusal> {
        let beside = self.look_beside(map)?;
        let mut pinned = Pinned::new(map, self.pin.flags.contains(Flags::WHOLE_FILE));
        let dax = self.judged.facts.dax;
        let mapped = self.judged.mapped.as_ref();
        if let Some(mapped) = mapped {
            let length = mapped.end - mapped.start;
            let plan = Plan::new(map, mapped.start, length, page_size());
            pinned = pinned.mapped(&plan, !dax);
        }
        let frozen = pinned.frozen_pages(&beside, page_size());
        let stored_to = self.nobody_stores_to(&frozen)?;
        let (apart, held) = if dax {
            (Apart::Without, None)
        } else if mapped.is_some() || stored_to {
            let (pages, held) = self.keep_apart(&frozen, map.file_size())?;
            (Apart::Held(pages.into()), held)
        } else {
            // Nobody stores near it, and nobody will be let.
            (Apart::No, None)
        };
        Ok(Still {
            pinned: pinned.with_beside(beside.clone()).apart(apart),
            held,
            frozen,
            beside,
        })
    }

    /// Sees to it that no store takes frozen blocks along; returns the pages
    /// that must stay for that.
    pub(super) fn keep_apart(
        &self,
        frozen: &[Range<u64>],
        size: u64,
    ) -> Result<(Vec<u64>, Option<Held>), Refusal> {
        /// A quarter of a gigabyte of page cache.
        const MOST: usize = 1 << 16;
        let folio = policy::folio_size();
        let pages = apart::pages_between(frozen, size, page_size(), folio);
        if pages.is_empty() {
            return Ok((pages, None));
        }
        let too_many = |what: String| {
            refusal(
                Reason::Limit,
                Errno::NOMEM,
                what,
                "make the range stable first (mapdirect prepare), or map it in parts",
            )
        };
        if pages.len() > MOST {
            return Err(too_many(format!(
                "what can be stored to and what cannot lie in so many pieces that {} pages of \
                 page cache would be needed to keep them apart; {MOST} may be",
                pages.len()
            )));
        }
        let Some(budget) = self.guard.pages.take(pages.len()) else {
            return Err(too_many(String::from(
                "others have so many ranges with frozen blocks mapped that the guard keeps no \
                 more pages of page cache apart",
            )));
        };
        let file = self.reopen(OFlags::RDONLY)?;
        // Its mapping of the file comes to the gate, too.
        let held = self
            .guard
            .own
            .for_long(|| apart::hold(file.as_fd(), &pages, folio, budget));
        let held = held.map_err(|failed| match failed {
            apart::Failed::InUse(offset) => {
                let mut openers = self.openers(None).others;
                openers.retain(|opener| opener.mapped);
                Refusal {
                    openers,
                    ..refusal(
                        Reason::OpenElsewhere,
                        Errno::TXTBSY,
                        format!(
                            "somebody maps the file, so that what can be stored to around byte \
                             {offset} and what cannot stay in one piece in the page cache"
                        ),
                        "have it unmapped there for a moment, or make the range stable first \
                         (mapdirect prepare)",
                    )
                }
            }
            apart::Failed::System(call, errno @ (Errno::NOMEM | Errno::MFILE | Errno::NFILE)) => {
                too_many(format!(
                    "keeping what can be stored to and what cannot apart in the page cache: \
                     {call} failed: {errno}"
                ))
            }
            apart::Failed::System(call, errno) => refusal(
                Reason::FrozenBlocks,
                Errno::OPNOTSUPP,
                format!(
                    "what can be stored to and what cannot do not stay apart in the page cache: \
                     {call} failed: {errno}"
                ),
                "make the range stable first (mapdirect prepare), or use DAX",
            ),
        })?;
        Ok((pages, Some(held)))
    }

    pub(super) fn hand_out(&self, map: &BlockMap) -> Result<(Granted, Option<OwnedFd>), Refusal> {
        let extents = map.extents();
        let inline = extents.len() <= MAX_INLINE_EXTENTS;
        let sealed = (!inline)
            .then(|| memfd::sealed("mapdirect-extents", &extent::encode_extents(extents)))
            .transpose()
            .map_err(|errno| system("memfd_create", errno))?;
        let granted = Granted {
            pin: self.pin.id,
            range: map.range(),
            file_size: map.file_size(),
            block_size: map.block_size(),
            device: map.device(),
            extent_count: extents.len() as u64,
            extents: if inline { extents.to_vec() } else { Vec::new() },
        };
        Ok((granted, sealed))
    }
}

/// Blocks behind the one that holds the end of the file are allocated.
fn reaches_beyond_the_end(map: &BlockMap) -> bool {
    let block = u64::from(map.block_size()).max(1);
    let end = map.file_size().next_multiple_of(block);
    map.extents()
        .iter()
        .any(|extent| extent.end() > end && extent.state != ExtentState::Hole)
}

/// Some of it has no place yet.
fn is_moving(map: &BlockMap) -> bool {
    map.total(ExtentState::Delalloc) + map.total(ExtentState::Unknown) > 0
}
