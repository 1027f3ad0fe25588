//! Mapping what may not be stored to: every state next to every other.

mod allocate;
mod changed;
mod mapped;
mod processes;

pub(crate) use self::allocate::*;
pub(crate) use self::changed::*;
pub(crate) use self::mapped::*;
pub(crate) use self::processes::*;

use crate::world::{BINARY, PATIENCE, World, is_emulated, is_pinned, kinds, open, wait_until_free};
use anyhow::{Context, Result, bail};
use libtest_mimic::Trial;
use mapdirect::{BlockMap, DirectMap, ExtentState, Guard, MapOptions, PinOptions};
use mapdirect_sys::Errno;
use mapdirect_testkit::attack::clone_range;
use mapdirect_testkit::fault::{Access, load};
use mapdirect_testkit::process::{GuardProcess, Helper, say};
use mapdirect_testkit::random::Random;
use mapdirect_testkit::{Disk, Kind, raw};
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Instant;

pub(crate) const PAGE: u64 = 4096;
pub(crate) const HUGE: u64 = 2 << 20;

/// XFS and ext4 with blocks as small as pages and smaller.
const KINDS: [Kind; 5] = [
    Kind::XFS,
    Kind::XFS_PLAIN,
    Kind::EXT4,
    Kind::Xfs {
        reflink: true,
        block: 1024,
    },
    Kind::Ext4 { block: 1024 },
];

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(world.trials(
        "segments",
        &kinds(&KINDS),
        &[
            ("pairs", pairs),
            ("random", random),
            ("ends", ends),
            ("beyond-the-end", beyond_the_end),
            ("large-folios", large_folios),
            ("allocate", allocate),
        ],
    ));
    trials.extend(world.trials(
        "segments",
        &kinds(&[Kind::XFS, Kind::EXT4]),
        &[
            ("system-calls", system_calls),
            ("fork", fork),
            ("fork-beside-a-store", fork_beside_a_store),
            ("mprotect", mprotect),
            ("mremap", mremap),
            ("madvise", madvise),
            ("descriptors-closed", descriptors_closed),
            ("partial-unmap", partial_unmap),
            ("holes-only", holes_only),
            ("fixed", fixed),
            ("aligned", aligned),
            ("many", many),
            ("too-many", too_many),
            ("sparse", sparse),
            ("unprivileged", unprivileged),
            ("killed-by-a-store", killed_by_a_store),
            ("growing", growing),
            ("neighbours", neighbours),
            ("fails-halfway", fails_halfway),
            ("prepared", prepared),
            ("pin-allocates", pin_allocates),
            ("allocate-arguments", allocate_arguments),
            ("allocate-without-room", allocate_without_room),
            ("allocate-beside-a-pin", allocate_beside_a_pin),
            ("allocate-under-attack", allocate_under_attack),
        ],
    ));
    trials
}

/// What a block of a test file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Written,
    Hole,
    Unwritten,
    Shared,
}

impl State {
    fn all(kind: Kind) -> &'static [Self] {
        const ALL: [State; 4] = [State::Written, State::Hole, State::Unwritten, State::Shared];
        if kind.reflink() { &ALL } else { &ALL[..3] }
    }
}

/// The byte that block `at` is filled with.
fn filling(at: u64) -> u8 {
    u8::try_from(at % 250 + 1).unwrap()
}

/// Makes a file of `states`, a block each, and `size` bytes; its shared blocks
/// are shared with another file.
pub(crate) fn make(path: &Path, block: u64, states: &[State], size: u64) -> File {
    let other = path.with_extension("other");
    for path in [path, &other] {
        let _ = std::fs::remove_file(path);
    }
    let file = File::create_new(path).unwrap();
    file.set_len(size).unwrap();
    let length = usize::try_from(block).unwrap();
    let runs = |wanted: State| {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (at, state) in states.iter().enumerate() {
            let start = at as u64 * block;
            match runs.last_mut() {
                _ if *state != wanted => {}
                Some(last) if last.end == start => last.end += block,
                _ => runs.push(start..start + block),
            }
        }
        runs
    };
    for run in runs(State::Unwritten) {
        let keep = FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, keep, run.start, run.end - run.start).unwrap();
    }
    for wanted in [State::Written, State::Shared] {
        for run in runs(wanted) {
            for at in run.start / block..run.end / block {
                let start = at * block;
                let end = (start + block).min(size);
                if start < end {
                    let bytes = vec![filling(at); usize::try_from(end - start).unwrap()];
                    file.write_all_at(&bytes[..bytes.len().min(length)], start)
                        .unwrap();
                }
            }
        }
    }
    file.sync_all().unwrap();
    let shared = runs(State::Shared);
    if !shared.is_empty() {
        let to = File::create_new(&other).unwrap();
        for run in shared {
            let end = run.end.min(size.next_multiple_of(block));
            if run.start < end {
                clone_range(
                    to.as_fd(),
                    file.as_fd(),
                    run.start,
                    end.min(size) - run.start,
                    run.start,
                )
                .unwrap();
            }
        }
        to.sync_all().unwrap();
    }
    file
}

pub(crate) fn map_all(guard: &Guard, file: &File, range: Range<u64>) -> DirectMap {
    try_map(guard, file, range).unwrap()
}

pub(crate) fn try_map(
    guard: &Guard,
    file: &File,
    range: Range<u64>,
) -> mapdirect::Result<DirectMap> {
    MapOptions::new()
        .range(range)
        .accept_page_cache(true)
        .patience(PATIENCE)
        .guard(guard.clone())
        .map(file)
}

/// Stores to a test's own mapping of its own file.
pub(crate) fn store(address: usize, value: u8) -> Access {
    // SAFETY: the mappings under test hold bytes of test files; nothing
    // refers to them.
    unsafe { mapdirect_testkit::fault::store(address, value) }
}

fn unmap(address: usize, length: usize) {
    // SAFETY: as above.
    unsafe { raw::munmap(address, length) }.unwrap();
}

fn protect(address: usize, length: usize, prot: i32) -> std::result::Result<(), Errno> {
    // SAFETY: as above.
    unsafe { raw::mprotect(address, length, prot) }
}

fn remap(address: usize, length: usize, new_length: usize, place: usize) {
    // SAFETY: as above.
    unsafe { raw::mremap(address, length, new_length, place) }.unwrap();
}

/// What must come of loads and stores of a page, spelled out by its blocks:
/// nothing of the code under test is used for it.
fn expected(states: &[State], block: u64, page: u64, pinned: Range<u64>, size: u64) -> Page {
    let mut found: Vec<State> = (page / block..(page + PAGE.max(block)) / block)
        .filter(|at| at * block < size && pinned.contains(&(at * block)))
        .map(|at| {
            *states
                .get(usize::try_from(at).unwrap())
                .unwrap_or(&State::Hole)
        })
        .collect();
    let all = |wanted: &[State]| found.iter().all(|state| wanted.contains(state));
    if found.is_empty() {
        return Page::Beyond;
    }
    if all(&[State::Written]) {
        return Page::Stable;
    }
    if all(&[State::Shared]) {
        return Page::Shared;
    }
    found.dedup();
    Page::Frozen
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Stable,
    Frozen,
    Shared,
    Beyond,
}

/// Looks at every page: loads, stores, and the block map in the end.
fn probe(map: &DirectMap, file: &File, states: &[State], block: u64, what: &str) {
    let base = map.as_ptr() as usize;
    let offset = map.offset();
    let before: BlockMap = map.block_map().clone();
    let size = before.file_size();
    let length = (map.len() as u64).next_multiple_of(PAGE);
    for page in (offset..offset + length).step_by(4096) {
        let kind = expected(states, block, page, before.range(), size);
        // The first and last byte of every block that is in the file.
        let blocks = (page / block..(page + PAGE) / block)
            .flat_map(|at| [at * block, (at + 1) * block - 1])
            .filter(|at| *at < size || kind == Page::Beyond);
        for at in blocks {
            let address = base + usize::try_from(at - offset).unwrap();
            let state = states
                .get(usize::try_from(at / block).unwrap())
                .copied()
                .unwrap_or(State::Hole);
            let there = match state {
                State::Written | State::Shared if at < size => filling(at / block),
                _ => 0,
            };
            let context = format!("{what}: byte {at} ({state:?}) in a page that is {kind:?}");
            let loaded = load(address);
            match kind {
                Page::Stable | Page::Frozen => {
                    assert_eq!(loaded, Access::Went(there), "load, {context}");
                }
                Page::Shared | Page::Beyond => {
                    assert_eq!(loaded, Access::BUS_ADRERR, "load, {context}");
                }
            }
            let stored = store(address, there);
            if kind == Page::Stable {
                assert_eq!(stored, Access::Went(there), "store, {context}");
            } else {
                assert_eq!(stored, Access::BUS_ADRERR, "store, {context}");
            }
            let offset = usize::try_from(at - offset).unwrap();
            if offset < map.len() {
                let mut byte = [9];
                let safe = map.read_exact_at(&mut byte, offset);
                assert_eq!(safe.is_ok(), matches!(loaded, Access::Went(_)), "{context}");
                let safe = map.write_all_at(&[there], offset);
                assert_eq!(safe.is_ok(), kind == Page::Stable, "{context}");
            }
        }
    }
    map.persist(0..map.len()).unwrap();
    let now = mapdirect::block_map(file, before.range()).unwrap();
    assert_eq!(
        before.extents(),
        now.extents(),
        "{what}: the block map changed"
    );
    // What was stored is in the file, and nothing else is.
    for (at, state) in states.iter().enumerate() {
        let at = at as u64;
        let mut bytes = vec![9; usize::try_from(block).unwrap()];
        let read = file.read_at(&mut bytes, at * block).unwrap();
        let there = match state {
            State::Written | State::Shared => filling(at),
            _ => 0,
        };
        assert!(
            bytes[..read].iter().all(|byte| *byte == there),
            "{what}: block {at}"
        );
    }
}
