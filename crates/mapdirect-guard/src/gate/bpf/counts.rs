//! Counts what several inodes share: positions in the filter, and the programs
//! that are attached only while they are needed.

use super::abi::{self, FILTER_WORDS, Key};
use super::{Gate, costly};
use crate::Errno;
use crate::table::InodeId;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{MutexGuard, PoisonError};

/// What several inodes share.
#[derive(Debug, Default)]
pub(super) struct Counts {
    /// The number of inodes at each position in the filter that has any.
    pub(super) filter: HashMap<u32, u32>,
    /// The inodes for which it matters where a write goes.
    pub(super) noted: HashSet<InodeId>,
    /// For each word of the filter, the inode to which writes pass easily.
    pub(super) easy: HashMap<usize, InodeId>,
}

impl Gate {
    /// Makes the programs note where writes go from now on.
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

    /// Undoes [`ease`](Self::ease).
    pub(super) fn burden(&self, key: Key) {
        let mut counts = self.counts();
        let word = key.word();
        if counts.easy.get(&word) == Some(&key.inode()) {
            self.easy(word).1.store(0, SeqCst);
            counts.easy.remove(&word);
        }
    }

    /// The two words that belong to a word of the filter.
    pub(super) fn easy(&self, word: usize) -> (&AtomicU64, &AtomicU64) {
        let words = self.loaded.maps.filter.words();
        let at = FILTER_WORDS + 2 * word;
        (&words[at], &words[at + 1])
    }

    /// Marks one more inode as behind the gate: the programs look at it from
    /// now on.
    pub(super) fn mark(&self, key: Key) {
        let mut counts = self.counts();
        let slot = key.slot();
        *counts.filter.entry(slot).or_default() += 1;
        self.loaded.maps.filter.words()[key.word()].fetch_or(1 << (slot % 64), SeqCst);
    }

    /// Sets the mark of an inode again, because root may have removed it.
    pub(super) fn mark_again(&self, key: Key) {
        let _counts = self.counts();
        self.loaded.maps.filter.words()[key.word()].fetch_or(1 << (key.slot() % 64), SeqCst);
    }

    /// Marks one inode as not behind the gate any more.
    pub(super) fn unmark(&self, key: Key) {
        let mut counts = self.counts();
        let slot = key.slot();
        let left = counts.filter.get(&slot).map_or(0, |count| count - 1);
        if left > 0 {
            counts.filter.insert(slot, left);
            return;
        }
        counts.filter.remove(&slot);
        self.loaded.maps.filter.words()[key.word()].fetch_and(!(1 << (slot % 64)), SeqCst);
    }

    /// Detaches the programs that other files need not pay for when nothing is
    /// pinned.
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
