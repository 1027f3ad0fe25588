//! Finding out that nothing near a pin has come to be shared after all.
//!
//! Where blocks beside a pin are shared, a write to them copies their
//! neighbours too (XFS), so the programs refuse such writes from the moment in
//! which they let something pass that may share blocks there. It may fail, or
//! share others, and whoever tried may be somebody who can only read: so the
//! guard looks what has come of it, and lets writes pass again if nothing has.
//!
//! The programs count: each such operation raises a number before it begins.
//! The guard reads the number, waits until everybody is out of what they had
//! begun, reads the block map, and says up to which number nothing came to be
//! shared. Whoever began later has raised the number since, and counts on.

use super::{Gate, Key};
use crate::Guard;
use crate::busy::Quiet;
use crate::suspicion::Prefix;
use crate::table::{InodeId, Watched};
use libbpf_rs::{MapCore, MapFlags};
use mapdirect_proto::ExtentState;
use std::collections::HashSet;
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

/// How long after such an operation to look first: most are over by then.
const SOON: Duration = Duration::from_millis(50);
/// How long to wait before looking again at what has stayed shared, or could
/// not be looked at.
const LATER: Duration = Duration::from_secs(2);
/// How long to wait for those who have begun something.
const PATIENCE: Duration = Duration::from_secs(2);

/// Inodes near whose pins blocks may have come to be shared.
#[derive(Debug, Default)]
pub(super) struct Sharing {
    marked: Mutex<HashSet<InodeId>>,
    told: Condvar,
}

impl Sharing {
    /// Has an inode looked at soon.
    pub(super) fn add(&self, id: InodeId) {
        let mut marked = self.marked.lock().unwrap_or_else(PoisonError::into_inner);
        marked.insert(id);
        self.told.notify_one();
    }

    /// Waits for something to look at, for a moment.
    fn next(&self) -> Vec<InodeId> {
        let marked = self.marked.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .told
            .wait_timeout_while(marked, Duration::from_millis(200), |marked| {
                marked.is_empty()
            });
        let (mut marked, _) = waited.unwrap_or_else(PoisonError::into_inner);
        marked.drain().collect()
    }
}

/// Looks until the guard stops.
pub(super) fn run(guard: &Guard, gate: &Gate) {
    let mut all_at = Instant::now();
    let mut again = Vec::new();
    while !guard.is_stopping() {
        if all_at <= Instant::now() {
            // Those that an earlier guard has not come to look at, and those
            // that there was no room to tell of.
            let keys = gate.loaded.maps.shared_since.keys();
            for key in keys.filter_map(|key| Key::read_from_bytes(&key).ok()) {
                if gate.may_be_shared(key) {
                    gate.sharing.add(key.inode());
                }
            }
            again.drain(..).for_each(|id| gate.sharing.add(id));
            all_at = Instant::now() + LATER;
        }
        let due = gate.sharing.next();
        if !due.is_empty() {
            std::thread::sleep(SOON);
        }
        for id in due {
            let Some(watched) = guard.table.get(id) else {
                continue;
            };
            if !gate.look_whether_shared(&watched) {
                again.push(id);
            }
        }
    }
}

impl Gate {
    /// Says whether it is known now that nothing near the pins of an inode is
    /// shared that was not when they were granted.
    fn look_whether_shared(&self, watched: &Watched) -> bool {
        let key = Key::new(watched.id);
        let maps = &self.loaded.maps;
        let Ok(Some(marks)) = maps.shared_since.lookup(key.as_bytes(), MapFlags::ANY) else {
            return true;
        };
        if !self.nothing_is_shared(watched) {
            return false;
        }
        let told = maps
            .not_shared
            .update(key.as_bytes(), &marks, MapFlags::ANY);
        told.is_ok() && self.publish(watched).is_ok() && !self.may_be_shared(key)
    }

    fn nothing_is_shared(&self, watched: &Watched) -> bool {
        let handle = {
            let shard = self.shard(watched.id);
            let published = shard.lock().unwrap_or_else(PoisonError::into_inner);
            published
                .get(&watched.id)
                .and_then(|published| published.handle.clone())
        };
        let Some(handle) = handle else {
            return false;
        };
        let Ok(file) = crate::grant::adopt::open(watched.id, &handle) else {
            return false;
        };
        let quiet = Quiet {
            file: file.as_fd(),
            id: watched.id,
            // Only XFS shares blocks.
            prefix: Prefix("xfs_"),
            held: &std::sync::Arc::default,
            deadline: Instant::now() + PATIENCE,
        };
        if !matches!(quiet.wait_for_changes(), Ok(busy) if busy.is_empty()) {
            return false;
        }
        let pins = watched.pins.load_full();
        pins.iter().filter_map(|pin| pin.settled()).all(|settled| {
            let pinned = &settled.pinned;
            let Some(window) = pinned.window() else {
                return true;
            };
            mapdirect::extents::read(file.as_fd(), window.clone()).is_ok_and(|map| {
                map.frozen()
                    .filter(|extent| extent.state == ExtentState::Shared)
                    .all(|extent| pinned.counts_as_shared(&(extent.offset..extent.end())))
            })
        })
    }
}
