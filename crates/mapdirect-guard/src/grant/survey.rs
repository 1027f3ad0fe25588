//! Reads from the disk what a pin promises.
//!
//! A survey does not ask the gate anything: its caller tells it whether anybody
//! else can store to the file.

use super::Granting;
use super::refusal::{obstructed, refusal, system};
use super::stable::require_told;
use crate::Errno;
use crate::apart::{self, Held};
use crate::policy::{Apart, Beside, Pinned, pages_between};
use mapdirect_model::facts::{Filesystem, geometry};
use mapdirect_model::plan::Plan;
use mapdirect_proto::{BlockMap, Extent, ExtentState, Flags, Reason, Refusal};
use mapdirect_sys::{fsync, xfs_eofblocks};
use rustix::fs::OFlags;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

/// Says whether anybody else may be able to store to a file by a mapping. Fails
/// if somebody may be able to store to the given blocks, which must not change.
pub(crate) type OthersCanStore<'a> = dyn Fn(&[Range<u64>]) -> Result<bool, Refusal> + 'a;

/// Reads the blocks of a file that is being pinned.
pub(crate) struct Survey<'a> {
    pub(crate) granting: &'a Granting<'a>,
    /// A description of the file.
    pub(crate) file: BorrowedFd<'a>,
    pub(crate) others_can_store: &'a OthersCanStore<'a>,
}

/// What a pin promises, and what keeps that promise.
pub(crate) struct Findings {
    pub(crate) pinned: Pinned,
    /// Pages kept in the page cache, so that stores beside frozen blocks do not
    /// take these blocks along.
    pub(crate) kept_pages: Option<Held>,
    /// Pages that nobody may have mapped writable.
    #[cfg_attr(not(feature = "bpf"), expect(dead_code, reason = "for the bpf gate"))]
    pub(crate) frozen: Vec<Range<u64>>,
    #[cfg_attr(not(feature = "bpf"), expect(dead_code, reason = "for the bpf gate"))]
    pub(crate) beside: Beside,
}

impl Survey<'_> {
    /// Reads the block map until it stays the same, and says what the pin
    /// promises of it. A store may change frozen blocks until they are kept
    /// apart from the blocks that others store to, so the map is read again
    /// after that.
    pub(crate) fn until_at_rest(&self, at_rest: bool) -> Result<(BlockMap, Findings), Refusal> {
        const TRIES: u32 = 10;
        if self.granting.judged.follows {
            return self.of_stable(at_rest);
        }
        let mut map = self.read(at_rest)?;
        for _ in 0..TRIES {
            self.require_pinnable(&map)?;
            let found = self.examine(&map)?;
            if found.kept_pages.is_none() && !found.pinned.has_frozen() {
                return Ok((map, found));
            }
            let again = self.read(false)?;
            if again == map {
                return Ok((map, found));
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

    /// Reads the block map. If anybody was let in since the map was last at
    /// rest, this first writes everything back, and reads until the map stays
    /// the same.
    pub(crate) fn read(&self, at_rest: bool) -> Result<BlockMap, Refusal> {
        let read = || {
            mapdirect_model::block_map::read(self.file, self.granting.judged.range.clone())
                .map_err(|errno| system("FIEMAP", errno))
        };
        if !at_rest {
            write_back(self.file)?;
        }
        let mut map = read()?;
        if !self.granting.judged.facts.keeps_blocks_beyond_the_end() && reaches_beyond_the_end(&map)
        {
            // Such blocks would go away by themselves, or become part of the
            // file when it grows.
            let (owner, size) = (self.granting.judged.facts.owner, map.file_size());
            xfs_eofblocks::free(self.file, owner, size)
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
        if at_rest && !is_moving(&map) {
            return Ok(map);
        }
        self.free_copy_blocks()?;
        let deadline = Instant::now() + self.granting.patience;
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
            write_back(self.file)?;
            map = again;
        }
    }

    /// Frees blocks that XFS has set aside for copies of shared blocks nearby.
    /// A write to blocks of the range would move them to such a reservation,
    /// because XFS looks there first (`xfs_map_blocks`, fs/xfs/xfs_aops.c). Only
    /// debug kernels show the reservations, so they are freed unseen. XFS frees
    /// them for inodes without dirty pages (`xfs_can_free_cowblocks`).
    pub(super) fn free_copy_blocks(&self) -> Result<(), Refusal> {
        // Writing back a whole filesystem takes as long as others have written
        // to it, so do it only when there may be something to free.
        let gate = &self.granting.guard.gate;
        let none = || gate.has_copy_blocks(self.file.as_fd()) == Some(false);
        if self.granting.judged.window().is_none() || none() {
            return Ok(());
        }
        // syncfs(2), because fsync(2) leaves the inode marked as having dirty
        // pages.
        rustix::fs::syncfs(self.file).map_err(|errno| system("syncfs", errno))?;
        xfs_eofblocks::free(self.file, self.granting.judged.facts.owner, 0)
            .map_err(|errno| system("XFS_IOC_FREE_EOFBLOCKS", errno))
    }

    pub(crate) fn require_pinnable(&self, map: &BlockMap) -> Result<(), Refusal> {
        require_told(map)?;
        if map.is_stable() {
            return Ok(());
        }
        // A program that knows nothing of pins does not, either.
        let in_place = self.granting.pin.flags.contains(Flags::IN_PLACE);
        let all = in_place.then_some(&self.granting.judged.range);
        if let Some(mapped) = self.granting.judged.mapped.as_ref().or(all)
            && !self.granting.judged.in_segments
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
        if let Some(obstacle) = self.granting.judged.facts.obstacle_to_frozen() {
            return Err(obstructed(obstacle));
        }
        Ok(())
    }

    /// Finds the blocks beside the range that would take blocks of the range
    /// along when they are written to.
    pub(crate) fn look_beside(&self, map: &BlockMap) -> Result<Beside, Refusal> {
        let range = map.range();
        let is_ext4 = self.granting.judged.facts.filesystem == Filesystem::Ext4;
        let block = u64::from(map.block_size()).max(1);
        let mut beside = Beside {
            window: self.granting.judged.window(),
            failing_frees: is_ext4 && reaches_beyond_the_end(map),
            grows_into: self.granting.judged.facts.allocates_ahead()
                && range.end > map.file_size().next_multiple_of(block),
            ..Beside::default()
        };
        let failed = |errno| system("FIEMAP", errno);
        if let Some(window) = &beside.window {
            let around = mapdirect_model::block_map::read(self.file, window.clone());
            let around = around.map_err(failed)?;
            beside.frozen.extend(
                around
                    .frozen()
                    .filter(|extent| extent.state == ExtentState::Shared)
                    .map(|extent| extent.offset..extent.end()),
            );
        } else {
            // FIEMAP cuts extents to the requested range, so ask for more.
            for edge in [range.start, range.end - 1] {
                let unwritten = |extent: &&Extent| extent.state == ExtentState::Unwritten;
                if map.find(edge).filter(unwritten).is_none() {
                    continue;
                }
                let around =
                    mapdirect_model::block_map::read(self.file, self.granting.judged.reach());
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

    /// Says what the pin promises, and what is needed to keep that promise when
    /// somebody stores beside frozen blocks.
    pub(crate) fn examine(&self, map: &BlockMap) -> Result<Findings, Refusal> {
        let beside = self.look_beside(map)?;
        let geometry = geometry(self.granting.watched.abilities.coarse);
        let whole_file = self.granting.pin.flags.contains(Flags::WHOLE_FILE);
        let mut pinned = Pinned::new(map, whole_file, geometry);
        let dax = self.granting.judged.facts.dax;
        let mapped = self.granting.judged.mapped.as_ref();
        if let Some(mapped) = mapped {
            let length = mapped.end - mapped.start;
            let plan = Plan::new(map, mapped.start, length, geometry.page);
            pinned = pinned.mapped(&plan, !dax);
        }
        let frozen = pinned.frozen_pages(&beside);
        self.require_trust(&frozen)?;
        let stored_to = (self.others_can_store)(&frozen)?;
        let (apart, kept_pages) = if dax {
            (Apart::Without, None)
        } else if mapped.is_some() || stored_to {
            let (pages, kept_pages) = self.keep_apart(&frozen, map.file_size())?;
            (Apart::Held(pages.into()), kept_pages)
        } else {
            // Nobody stores near the frozen blocks, and the gate lets nobody do
            // so.
            (Apart::No, None)
        };
        Ok(Findings {
            pinned: pinned.with_beside(beside.clone()).apart(apart),
            kept_pages,
            frozen,
            beside,
        })
    }

    /// Refuses frozen blocks beside a holder that can write and lacks the
    /// capability, unless both are of the same user. Such a holder is not trusted
    /// to leave blocks alone that a mapping of its own could be grown over.
    fn require_trust(&self, frozen: &[Range<u64>]) -> Result<(), Refusal> {
        let own = self.granting.pin;
        let pins = self.granting.watched.pins.load();
        let obstacle = pins
            .iter()
            .filter(|pin| pin.id != own.id && pin.uid != own.uid && !pin.is_dead())
            .find_map(|pin| {
                let has_frozen = pin.settled().is_some_and(|settled| settled.frozen > 0);
                if own.is_of_untrusted_writer() && has_frozen {
                    return Some(format!(
                        "pin {} of user {} has blocks that must not be stored to, and whoever \
                         lacks CAP_LINUX_IMMUTABLE is not trusted beside them with a descriptor \
                         that can write",
                        pin.id, pin.uid
                    ));
                }
                let untrusted = pin.is_of_untrusted_writer() && !frozen.is_empty();
                untrusted.then(|| {
                    format!(
                        "user {}, who lacks CAP_LINUX_IMMUTABLE, has pin {} with a descriptor \
                         that can write, and is not trusted beside blocks that must not be \
                         stored to",
                        pin.uid, pin.id
                    )
                })
            });
        obstacle.map_or(Ok(()), |obstacle| {
            Err(refusal(
                Reason::OpenElsewhere,
                Errno::TXTBSY,
                obstacle,
                "make the range stable first (mapdirect prepare), or end the other pin \
                 (mapdirect unpin)",
            ))
        })
    }

    /// Makes sure that no store takes frozen blocks along. Returns the pages
    /// that must stay in the page cache for that.
    fn keep_apart(
        &self,
        frozen: &[Range<u64>],
        size: u64,
    ) -> Result<(Vec<u64>, Option<Held>), Refusal> {
        /// The most pages to keep: a quarter of a gigabyte of page cache.
        const MOST: usize = 1 << 16;
        let geometry = geometry(self.granting.watched.abilities.coarse);
        let pages = pages_between(frozen, size, &geometry);
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
        let trusted = self.granting.pin.delegated().is_none();
        let Some(budget) = self.granting.guard.pages.take(pages.len(), trusted) else {
            return Err(too_many(String::from(
                "others have so many ranges with frozen blocks mapped that the guard keeps no \
                 more pages of page cache apart",
            )));
        };
        let file = self.granting.reopen(self.file, OFlags::RDONLY)?;
        // Mapping the file raises an event at the gate, too.
        let kept = self
            .granting
            .guard
            .own
            .for_long(|| apart::hold(file.as_fd(), &pages, geometry.folio, budget));
        let kept = kept.map_err(|failed| match failed {
            apart::Failed::InUse(offset) => {
                let mut openers = self.granting.openers(None).others;
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
        Ok((pages, Some(kept)))
    }
}

/// Writes a file back. This also fails for earlier errors in anybody's writes:
/// the first fsync(2) after an error is told, and only that one
/// (`file_check_and_advance_wb_err`, mm/filemap.c). Such an error can be a
/// direct write that met pages in use (`dio_warn_stale_pagecache`, same file).
pub(super) fn write_back(file: BorrowedFd<'_>) -> Result<(), Refusal> {
    fsync::fsync(file).map_err(|errno| Refusal {
        mend: String::from(
            "something written to the file before may not be on the disk, or be what is there: \
             if that does not matter, or was written again, try again",
        ),
        ..system("fsync", errno)
    })
}

/// Whether blocks behind the one that holds the end of the file are allocated.
fn reaches_beyond_the_end(map: &BlockMap) -> bool {
    let block = u64::from(map.block_size()).max(1);
    let end = map.file_size().next_multiple_of(block);
    map.extents()
        .iter()
        .any(|extent| extent.end() > end && extent.state != ExtentState::Hole)
}

/// Whether some blocks have no place on the disk yet.
fn is_moving(map: &BlockMap) -> bool {
    map.total(ExtentState::Delalloc) + map.total(ExtentState::Unknown) > 0
}
