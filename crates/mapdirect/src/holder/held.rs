//! A pin that this process holds: what [`Pin`](crate::Pin) and
//! [`DirectMap`](crate::DirectMap) have in common.

use super::{Connection, Hold};
use crate::error::Result;
use crate::establish;
use crate::map::revoke::{Keeper, Memory};
use crate::state::OnBreach;
use mapdirect_proto::BlockMap;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// A pin, its block map, and the conversation by which it was granted.
#[derive(Debug)]
pub(crate) struct Held {
    hold: Hold,
    /// The one by which it was asked for.
    connection: Arc<Connection>,
    map: BlockMap,
    has_ended: bool,
}

impl Held {
    pub(crate) fn new(hold: Hold, connection: Arc<Connection>, map: BlockMap) -> Self {
        Self {
            hold,
            connection,
            map,
            has_ended: false,
        }
    }

    pub(crate) fn hold(&self) -> &Hold {
        &self.hold
    }

    /// The pin, its block map and its conversation, for a mapping that goes on
    /// from this one, if one may.
    pub(crate) fn fall_asleep(&mut self) -> Option<Self> {
        let hold = self.hold.fall_asleep()?;
        let connection = Arc::clone(&self.connection);
        let mut asleep = Self::new(hold, connection, self.map.clone());
        // Nobody has it, until it wakes.
        asleep.has_ended = true;
        Some(asleep)
    }

    /// See [`Hold::wake`].
    pub(crate) fn wake(&mut self, memory: Memory, on_breach: OnBreach) -> bool {
        self.has_ended = false;
        self.hold.wake(memory, on_breach)
    }

    /// The kernel itself has ended what was taken up by itself, unless there
    /// are other pins of the file.
    pub(crate) fn ends_by_itself(&mut self) {
        self.has_ended |= self.hold.was_asleep() && !self.hold.has_neighbours();
    }

    pub(crate) fn block_map(&self) -> &BlockMap {
        &self.map
    }

    /// Has the guard make frozen blocks stable, and notes the block map that
    /// comes of it, also when a part of it fails. `pinned` is the description
    /// of the pin.
    pub(crate) fn allocate(&mut self, range: &Range<u64>, pinned: BorrowedFd<'_>) -> Result<()> {
        let bytes = (range.start, range.end.saturating_sub(range.start));
        let (now, result) = establish::allocate(&self.hold, &self.connection, bytes, pinned);
        if let Some(now) = now {
            self.map = now;
        }
        result
    }

    /// Forgets the pin, without ending it; see [`Hold::let_go`].
    pub(crate) fn let_go(&mut self) -> Option<Keeper> {
        self.hold.let_go()
    }

    /// Tells the guard, once, that this process has let go of everything the
    /// pin lives by.
    pub(crate) fn end(&mut self) -> Result<()> {
        let _ = self.hold.let_go();
        if std::mem::replace(&mut self.has_ended, true) || !self.hold.is_own() {
            return Ok(());
        }
        self.hold.guard().ended(self.hold.gate(), self.hold.named())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Without a guard the pin ends by itself.
        let _ = self.end();
    }
}
