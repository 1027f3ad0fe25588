//! Reads what an earlier guard has left in the kernel.

use super::abi::{Entry, FILTER_WORDS, Holder, Key, PinFacts};
use super::{Gate, Published};
use crate::table::InodeId;
use libbpf_rs::{MapCore, MapFlags};
use mapdirect_proto::Flags;
use mapdirect_sys::file_handle::FileHandle;
use std::ops::Range;
use std::sync::PoisonError;
use std::sync::atomic::Ordering::SeqCst;
use zerocopy::{FromBytes, IntoBytes};

/// A live pin that an earlier guard has granted.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) id: u64,
    pub(crate) inode: InodeId,
    pub(crate) range: Range<u64>,
    pub(crate) mapped: Option<Range<u64>>,
    pub(crate) flags: Flags,
    pub(crate) pid: i32,
    pub(crate) uid: u32,
    /// See [`PinFacts::until`].
    pub(crate) until: u64,
    /// When that process started, in clock ticks since boot.
    pub(crate) began: u64,
    pub(crate) handle: FileHandle,
}

pub(super) fn found(facts: &PinFacts) -> Found {
    let slice = |bytes: &[u8], length: u32| {
        let length = usize::try_from(length).unwrap_or(0).min(bytes.len());
        bytes[..length].to_vec()
    };
    let mapped = facts.mapped_start..facts.mapped_end;
    Found {
        id: facts.id,
        inode: facts.key.inode(),
        range: facts.start..facts.end,
        mapped: (!mapped.is_empty()).then_some(mapped),
        flags: Flags::from_known_bits(facts.flags),
        pid: facts.pid,
        uid: facts.uid,
        until: facts.until,
        began: facts.began,
        handle: FileHandle {
            kind: facts.handle_type,
            bytes: slice(&facts.handle, facts.handle_length),
        },
    }
}

impl Gate {
    /// Leaves an inode as an earlier guard has left it.
    pub(crate) fn keep(&self, id: InodeId, handle: Option<&FileHandle>) {
        let mut published = self.lock_shard(id);
        if published.contains_key(&id) {
            return;
        }
        let key = Key::new(id);
        let entry = self
            .loaded
            .maps
            .entries
            .lookup(key.as_bytes(), MapFlags::ANY);
        let entry = entry
            .ok()
            .flatten()
            .and_then(|bytes| Entry::read_from_bytes(&bytes).ok());
        self.mark(key);
        let kept = Published {
            version: entry.map_or(0, |entry| entry.version),
            spilled: entry.is_some_and(|entry| entry.spilled != 0),
            pins: 1,
            handle: handle.cloned(),
            kept: true,
            can_sleep: false,
            granting: false,
        };
        published.insert(id, kept);
    }

    /// The live pins that an earlier guard has left. The kernel itself has
    /// removed those whose description is gone.
    pub(crate) fn left_behind(&self) -> Vec<Found> {
        // No dormant pin may be taken up that this list does not contain.
        self.disturb_all();
        let maps = &self.loaded.maps;
        maps.pins
            .keys()
            .filter_map(|key| maps.pins.lookup(&key, MapFlags::ANY).ok().flatten())
            .filter_map(|bytes| PinFacts::read_from_bytes(&bytes).ok())
            .filter(|facts| {
                let holder = maps
                    .holders
                    .lookup(&facts.file.to_ne_bytes(), MapFlags::ANY);
                let holder = holder.ok().flatten();
                holder
                    .and_then(|bytes| Holder::read_from_bytes(&bytes).ok())
                    .is_some_and(|holder| holder.pin == facts.id)
            })
            .map(|facts| found(&facts))
            .collect()
    }

    /// Removes everything from the maps that belongs to none of the `known`
    /// inodes. The rest of the maps counts from now on.
    pub(crate) fn take_over(&self, known: &[InodeId]) {
        let maps = &self.loaded.maps;
        // A pin that somebody is still taking up may need all of it.
        let undecided = self.undecided();
        for id in &undecided {
            self.keep(*id, None);
        }
        let known: Vec<InodeId> = known.iter().copied().chain(undecided).collect();
        let entries: Vec<Vec<u8>> = maps.entries.keys().collect();
        for key in entries {
            if Key::read_from_bytes(&key).is_ok_and(|key| !known.contains(&key.inode())) {
                let _ = maps.entries.delete(&key);
            }
        }
        let roots: Vec<Vec<u8>> = maps.roots.keys().collect();
        for key in roots {
            if Key::read_from_bytes(&key).is_ok_and(|key| !known.contains(&key.inode())) {
                let _ = maps.roots.delete(&key);
            }
        }
        let lives: Vec<Vec<u8>> = maps.lives.keys().collect();
        for key in lives {
            let is_gone = Key::read_from_bytes(&key)
                .is_ok_and(|key| !known.contains(&key.inode()) && self.lay_to_rest(key));
            if is_gone {
                let _ = maps.lives.delete(&key);
            }
        }
        self.hear_of_pins();
        let counts = self.counts();
        // The filter may have more bits than were counted again; they are
        // removed, too.
        let mut bits = vec![0u64; FILTER_WORDS];
        for slot in counts.filter.keys() {
            if let Ok(slot) = usize::try_from(*slot) {
                bits[slot / 64] |= 1 << (slot % 64);
            }
        }
        for (word, bits) in bits.into_iter().enumerate() {
            maps.filter.words()[word].store(bits, SeqCst);
            if !counts.easy.contains_key(&word) {
                self.easy(word).1.store(0, SeqCst);
            }
        }
        drop(counts);
        let used: Vec<u64> = self
            .published
            .iter()
            .flat_map(|shard| {
                let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
                shard.values().map(|one| one.version).collect::<Vec<_>>()
            })
            .collect();
        let spilled: Vec<Vec<u8>> = maps.spill.keys().collect();
        for key in spilled {
            if u64::read_from_bytes(&key).is_ok_and(|version| !used.contains(&version)) {
                let _ = maps.spill.delete(&key);
            }
        }
    }

    /// Makes the programs report the ends of all pins from now on, and deletes
    /// what is kept of pins that have ended.
    fn hear_of_pins(&self) {
        let pins: Vec<Vec<u8>> = self.loaded.maps.pins.keys().collect();
        for pin in pins {
            let Ok(pin) = u64::read_from_bytes(&pin) else {
                continue;
            };
            match self.facts(pin) {
                Ok(Some(facts)) if facts.file != 0 => self.listen_for_end(facts.key, pin),
                Ok(Some(facts)) if self.is_at_rest(facts.key, pin) => self.drop_facts(pin),
                _ => {}
            }
        }
    }
}
