//! Surveys a file for a pin of strength stable.
//!
//! Such a pin needs no block map at rest. What is not stable yet may become so
//! at any time, so nothing is written back, nothing is kept apart, and the map
//! is read once. Only shared blocks need care: see [`held`].

use super::survey::{Findings, Survey, write_back};
use super::{Granting, refusal, system};
use crate::policy::{Beside, Pinned};
use crate::table::Pin;
use crate::{Errno, Guard};
use mapdirect_model::facts::{FileFacts, geometry};
use mapdirect_model::held::{self, Copied};
use mapdirect_proto::{BlockMap, ExtentState, Reason, Refusal};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

impl Granting<'_> {
    /// What a pin of strength stable refuses. No blocks have to be known for
    /// that.
    pub(crate) fn refused_for_stable(&self) -> Pinned {
        let judged = self.judged;
        Pinned::stable(
            judged.range.clone(),
            judged.window(),
            judged.facts.block_size.into(),
            geometry(self.watched.abilities.coarse),
        )
    }
}

impl Survey<'_> {
    /// Reads which blocks a pin of strength stable holds from now on. Everybody
    /// must be excluded who could move or free them. If nobody was let in since
    /// the file was last `at_rest`, XFS has set no blocks aside for copies.
    pub(crate) fn of_stable(&self, at_rest: bool) -> Result<(BlockMap, Findings), Refusal> {
        let Granting {
            guard, judged, pin, ..
        } = self.granting;
        let set_aside = || guard.gate.has_copy_blocks(self.file.as_fd());
        if judged.window().is_some() && set_aside().unwrap_or(!at_rest) {
            write_back(self.file)?;
            self.free_copy_blocks()?;
        }
        let failed = |errno| system("FIEMAP", errno);
        let mut copied = held::copied(self.file, &judged.facts, &judged.range).map_err(failed)?;
        if judged.window().is_some() {
            match set_aside() {
                Some(false) => {}
                // They are for blocks that are not shared any more, or right now.
                // Nobody knows where.
                Some(true) => copied = Copied::everything(),
                // They may be what holders have left that go on writing, where
                // blocks were shared when they got their pins.
                None => {
                    let pins = self.granting.watched.pins.load();
                    for other in pins.iter().filter(|one| one.follows() && !one.is_dead()) {
                        copied = copied.joined(&other.copied());
                    }
                }
            }
        }
        let map = mapdirect_model::block_map::read(self.file, judged.range.clone());
        let map = held::told_apart(&map.map_err(failed)?, &copied);
        require_told(&map)?;
        pin.follow(copied);
        let found = Findings {
            pinned: self.granting.refused_for_stable(),
            kept_pages: None,
            frozen: Vec::new(),
            beside: Beside::default(),
        };
        Ok((map, found))
    }
}

/// Fails for blocks that never become stable.
pub(super) fn require_told(map: &BlockMap) -> Result<(), Refusal> {
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
    Ok(())
}

/// Reads a part of the block map of a file, as a pin of strength stable sees it
/// now.
pub(crate) fn read_now(
    guard: &Guard,
    pin: &Pin,
    file: BorrowedFd<'_>,
    range: Range<u64>,
) -> Result<BlockMap, Errno> {
    let none_set_aside = || guard.gate.has_copy_blocks(file) == Some(false);
    if !pin.copied().is_empty() && none_set_aside() {
        let facts = FileFacts::read(file)?;
        let around_shared = held::copied(file, &facts, &pin.shown)?;
        // Whatever is copied after this question was shared before it, and
        // nothing comes to be shared.
        if none_set_aside() {
            pin.follow(around_shared);
        }
    }
    let map = mapdirect_model::block_map::read(file, range)?;
    Ok(held::told_apart(&map, &pin.not_held()))
}
