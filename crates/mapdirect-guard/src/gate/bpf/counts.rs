//! What several inodes have in common: places of the filter, filesystems, and
//! the programs that are attached only while somebody needs them.

use super::abi::{self, FILTER_WORDS, Key};
use super::{Gate, costly, errno};
use crate::Errno;
use crate::table::InodeId;
use libbpf_rs::{MapCore, MapFlags};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{MutexGuard, PoisonError};

/// What several inodes have in common.
#[derive(Debug, Default)]
pub(super) struct Counts {
    /// Inodes in each place of the filter that has any.
    pub(super) filter: HashMap<u32, u32>,
    /// Pins on each filesystem.
    pub(super) devices: HashMap<u32, u64>,
    /// Inodes to which it matters where a write goes.
    pub(super) noted: HashSet<InodeId>,
    /// The inode that each word of the filter tells of, that writes to it pass.
    pub(super) easy: HashMap<usize, InodeId>,
}

impl Gate {
    /// From now on the programs note where writes go.
    pub(super) fn note_writes(&self, id: InodeId) -> Result<(), Errno> {
        self.loaded.costly.take_notes().map_err(|_| Errno::NOEXEC)?;
        self.counts().noted.insert(id);
        Ok(())
    }

    pub(super) fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets writes to an inode pass without a look at its entry.
    pub(super) fn ease(&self, key: Key) {
        let mut counts = self.counts();
        let word = key.word();
        let owner = *counts.easy.entry(word).or_insert(key.inode());
        if owner != key.inode() {
            return;
        }
        let (ino, facts) = self.easy(word);
        ino.store(key.ino, SeqCst);
        facts.store(u64::from(key.dev) << 32 | abi::EASY, SeqCst);
    }

    /// Takes that back.
    pub(super) fn burden(&self, key: Key) {
        let mut counts = self.counts();
        let word = key.word();
        if counts.easy.get(&word) == Some(&key.inode()) {
            self.easy(word).1.store(0, SeqCst);
            counts.easy.remove(&word);
        }
    }

    /// What stands beside a word of the filter.
    pub(super) fn easy(&self, word: usize) -> (&AtomicU64, &AtomicU64) {
        let words = self.loaded.maps.filter.words();
        let at = FILTER_WORDS + 2 * word;
        (&words[at], &words[at + 1])
    }

    /// Counts the pins of an inode instead of those it had.
    pub(super) fn count(
        &self,
        key: Key,
        before: Option<u64>,
        now: Option<u64>,
    ) -> Result<(), Errno> {
        let mut counts = self.counts();
        let maps = &self.loaded.maps;
        let device = counts.devices.entry(key.dev).or_default();
        *device = (*device + now.unwrap_or(0)).saturating_sub(before.unwrap_or(0));
        let device = *device;
        let told =
            maps.devices
                .update(&key.dev.to_ne_bytes(), &device.to_ne_bytes(), MapFlags::ANY);
        let slot = key.slot();
        let mut filter = counts.filter.get(&slot).copied().unwrap_or(0);
        match (before, now) {
            (None, Some(_)) => filter += 1,
            (Some(_), None) => filter = filter.saturating_sub(1),
            _ => {}
        }
        let bit = 1 << (slot % 64);
        let word = &maps.filter.words()[key.word()];
        if filter == 0 {
            counts.filter.remove(&slot);
            word.fetch_and(!bit, SeqCst);
        } else {
            counts.filter.insert(slot, filter);
            word.fetch_or(bit, SeqCst);
        }
        told.map_err(|error| errno(&error))
    }

    /// Lets other files off what is there for those that are pinned, when
    /// there are none.
    pub(super) fn rest(&self) {
        self.loaded.costly.rest(|| {
            let counts = self.counts();
            costly::Needs {
                hooks: !counts.filter.is_empty(),
                notes: !counts.noted.is_empty(),
            }
        });
    }
}
