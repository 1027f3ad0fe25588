//! What an earlier guard has left in the kernel.

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

/// A pin that an earlier guard has granted, and that lives.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) id: u64,
    pub(crate) inode: InodeId,
    pub(crate) range: Range<u64>,
    pub(crate) mapped: Option<Range<u64>>,
    pub(crate) flags: Flags,
    pub(crate) pid: i32,
    pub(crate) uid: u32,
    pub(crate) handle: FileHandle,
    pub(crate) path: String,
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
        handle: FileHandle {
            kind: facts.handle_type,
            bytes: slice(&facts.handle, facts.handle_length),
        },
        path: String::from_utf8_lossy(&slice(&facts.path, facts.path_length)).into_owned(),
    }
}

impl Gate {
    /// Leaves an inode as an earlier guard has left it.
    pub(crate) fn keep(&self, found: &Found) {
        let mut published = self
            .shard(found.inode)
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if published.contains_key(&found.inode) {
            return;
        }
        let key = Key::new(found.inode);
        let entry = self
            .loaded
            .maps
            .entries
            .lookup(key.as_bytes(), MapFlags::ANY);
        let entry = entry
            .ok()
            .flatten()
            .and_then(|bytes| Entry::read_from_bytes(&bytes).ok());
        let _ = self.count(key, None, Some(1));
        let kept = Published {
            version: entry.map_or(0, |entry| entry.version),
            spilled: entry.is_some_and(|entry| entry.spilled != 0),
            pins: 1,
            handle: Some(found.handle.clone()),
            kept: true,
        };
        published.insert(found.inode, kept);
    }

    /// The pins that live, as an earlier guard has left them. Those whose
    /// description is gone have been taken out by the kernel.
    pub(crate) fn left_behind(&self) -> Vec<Found> {
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

    /// Everything in the maps that no pin of `known` accounts for goes; and
    /// what is in the maps counts from now on.
    pub(crate) fn take_over(&self, known: &[InodeId]) {
        let maps = &self.loaded.maps;
        let entries: Vec<Vec<u8>> = maps.entries.keys().collect();
        for key in entries {
            if Key::read_from_bytes(&key).is_ok_and(|key| !known.contains(&key.inode())) {
                let _ = maps.entries.delete(&key);
            }
        }
        let counts = self.counts();
        let devices: Vec<Vec<u8>> = maps.devices.keys().collect();
        for key in devices {
            let is_known = u32::read_from_bytes(&key)
                .is_ok_and(|device| counts.devices.get(&device).is_some_and(|pins| *pins > 0));
            if !is_known {
                let _ = maps.devices.delete(&key);
            }
        }
        // What the filter has beside what was counted again goes, too.
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
}
