//! The inodes behind the gate, and what is pinned of each.
//!
//! The gate thread looks inodes up here while other threads wait in the kernel
//! for its answer. So no look-up takes a lock: every value that a look-up reads
//! is replaced as a whole. Grants and the lifetime thread make the changes.

mod announcement;
mod inode;
#[cfg(test)]
pub(crate) mod interleavings;
mod layered;
mod life;
mod notes;
mod own_opens;
mod pin;
pub(crate) mod publish;

pub(crate) use self::announcement::Announcement;
pub(crate) use self::inode::{Abilities, GrantState, Watched};
#[cfg(feature = "bpf")]
pub(crate) use self::layered::together;
pub(crate) use self::notes::{Notes, Passing};
pub(crate) use self::own_opens::OwnOpens;
#[cfg(feature = "bpf")]
pub(crate) use self::pin::Settled;
pub(crate) use self::pin::{Carrier, Changes, Opinion, Pin};
pub(crate) use self::publish::Published;

use crate::wake::Backoff;
use arc_swap::ArcSwap;
use mapdirect_proto::{DeviceId, WatchedPin};
use rustix::fs::Stat;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Identifies an inode as long as it is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct InodeId {
    pub(crate) dev: u64,
    pub(crate) inode: u64,
}

impl InodeId {
    pub(crate) fn device(self) -> DeviceId {
        DeviceId {
            major: rustix::fs::major(self.dev),
            minor: rustix::fs::minor(self.dev),
        }
    }

    pub(crate) fn of(device: DeviceId, inode: u64) -> Self {
        Self {
            dev: rustix::fs::makedev(device.major, device.minor),
            inode,
        }
    }
}

impl From<&WatchedPin> for InodeId {
    fn from(named: &WatchedPin) -> Self {
        Self {
            dev: named.device,
            inode: named.inode,
        }
    }
}

impl From<&Stat> for InodeId {
    fn from(stat: &Stat) -> Self {
        Self {
            dev: stat.st_dev,
            inode: stat.st_ino,
        }
    }
}

/// Where the record locks of this guard's pins begin in a file: far beyond any
/// data, with one byte for each pin.
pub(crate) const LOCK_BASE: u64 = 1 << 62;

const SHARDS: usize = 1024;

/// Every inode behind the gate.
#[derive(Debug)]
pub(crate) struct Table {
    shards: Vec<ArcSwap<Vec<Arc<Watched>>>>,
    /// Locked by the thread that changes the table.
    changing: Mutex<()>,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| ArcSwap::default()).collect(),
            changing: Mutex::new(()),
        }
    }

    fn shard(&self, id: InodeId) -> &ArcSwap<Vec<Arc<Watched>>> {
        // Inode numbers grow with the directory they are made in. Their lower
        // bits spread well, and a Fibonacci hash mixes them with the higher
        // bits.
        let mixed = (id.inode ^ id.dev.rotate_left(32)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let at = usize::try_from(mixed >> 54).unwrap_or(0);
        &self.shards[at % SHARDS]
    }

    /// The entry of an inode. Takes no lock.
    pub(crate) fn get(&self, id: InodeId) -> Option<Arc<Watched>> {
        self.shard(id)
            .load()
            .iter()
            .find(|watched| watched.id == id)
            .cloned()
    }

    /// The entry of an inode, created if there is none.
    pub(crate) fn get_or_insert(
        &self,
        id: InodeId,
        make: impl FnOnce() -> Watched,
    ) -> Arc<Watched> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = self.get(id) {
            return found;
        }
        let made = Arc::new(make());
        let shard = self.shard(id);
        let mut entries = Vec::clone(&shard.load());
        entries.push(Arc::clone(&made));
        shard.store(Arc::new(entries));
        made
    }

    /// Removes an entry.
    pub(crate) fn remove(&self, watched: &Arc<Watched>) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let shard = self.shard(watched.id);
        let mut entries = Vec::clone(&shard.load());
        entries.retain(|entry| !Arc::ptr_eq(entry, watched));
        shard.store(Arc::new(entries));
    }

    /// Waits for a while until a pin that has ended is removed. Ends are
    /// handled in the order in which they are reported, because somebody may
    /// have joined the pin before.
    pub(crate) fn wait_until_out(&self, id: InodeId, pin: u64) {
        let is_there = || {
            let watched = self.get(id);
            watched.is_some_and(|watched| watched.pins.load().iter().any(|other| other.id == pin))
        };
        let mut backoff = Backoff::until(
            Instant::now() + Duration::from_millis(500),
            Duration::from_micros(20),
            Duration::from_millis(2),
        );
        while is_there() && !backoff.is_over() {
            backoff.pause();
        }
    }

    /// All current entries.
    pub(crate) fn all(&self) -> Vec<Arc<Watched>> {
        self.shards
            .iter()
            .flat_map(|shard| Vec::clone(&shard.load()))
            .collect()
    }
}

#[cfg(test)]
mod tests;
