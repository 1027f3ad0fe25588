//! Mapping what may not be stored to: every state next to every other.

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

/// Every state beside every other, at boundaries of blocks, pages and huge
/// pages.
fn pairs(world: &World, kind: Kind) {
    let (disk, guard) = (world.disk(kind), world.guard());
    let block = kind.block();
    for first in State::all(kind) {
        for second in State::all(kind) {
            // 2 MiB of the first but for a few blocks of the second around
            // the middle, then 2 MiB of the second.
            let blocks = usize::try_from(HUGE / block).unwrap();
            let few = usize::try_from(PAGE / block).unwrap();
            let mut states = vec![*first; blocks];
            states[7 * few..8 * few + 1].fill(*second);
            states[12 * few - 1] = *second;
            states.extend(vec![*second; blocks]);
            let path = disk.path(&format!("segments-{first:?}-{second:?}"));
            let size = states.len() as u64 * block;
            let file = make(&path, block, &states, size);
            let map = map_all(&guard.client(), &file, 0..size);
            probe(
                &map,
                &file,
                &states,
                block,
                &format!("{first:?} and {second:?}"),
            );
            drop(map);
            drop(file);
            let _ = std::fs::remove_file(path.with_extension("other"));
            std::fs::remove_file(&path).unwrap();
        }
    }
}

fn random(world: &World, kind: Kind) {
    let (disk, guard) = (world.disk(kind), world.guard());
    let block = kind.block();
    let path = disk.path("segments-random");
    for seed in 0..12 {
        let mut random = Random::new(seed);
        let mut states = Vec::new();
        while states.len() < 400 {
            let state = *random.pick(State::all(kind));
            let length = if random.below(3) == 0 {
                1
            } else {
                random.below(30)
            };
            states.extend((0..length).map(|_| state));
        }
        let size = states.len() as u64 * block - random.below(block);
        let file = make(&path, block, &states, size);
        let pages = size / PAGE;
        let start = random.below(pages) * PAGE;
        let length = 1 + random.below(size - start);
        let map = map_all(&guard.client(), &file, start..start + length);
        let what = format!("seed {seed}, bytes {start} to {}", start + length);
        probe(&map, &file, &states, block, &what);
    }
    let _ = std::fs::remove_file(path.with_extension("other"));
    std::fs::remove_file(&path).unwrap();
}

/// Files that end anywhere, files of one byte among them.
fn ends(world: &World, kind: Kind) {
    let (disk, guard) = (world.disk(kind), world.guard());
    let block = kind.block();
    let path = disk.path("segments-ends");
    for state in State::all(kind) {
        for size in [
            1,
            block - 1,
            block,
            block + 1,
            PAGE - 1,
            PAGE,
            PAGE + 1,
            PAGE + block,
            3 * PAGE + 7,
        ] {
            let blocks = usize::try_from(size.div_ceil(block)).unwrap();
            let states = vec![*state; blocks];
            let file = make(&path, block, &states, size);
            for length in [1, size, size.next_multiple_of(PAGE), size + 2 * PAGE] {
                let map = map_all(&guard.client(), &file, 0..length);
                let what = format!("{state:?}, {size} bytes, {length} mapped");
                probe(&map, &file, &states, block, &what);
            }
        }
    }
    let _ = std::fs::remove_file(path.with_extension("other"));
    std::fs::remove_file(&path).unwrap();
}

/// Ranges partly and wholly beyond the end of the file.
fn beyond_the_end(world: &World, kind: Kind) {
    let (disk, guard) = (world.disk(kind), world.guard());
    let block = kind.block();
    let path = disk.path("segments-beyond");
    let size = 5 * PAGE - 100;
    let states = vec![State::Written; usize::try_from(5 * PAGE / block).unwrap()];
    let file = make(&path, block, &states, size);
    for range in [
        4 * PAGE..6 * PAGE,
        5 * PAGE..5 * PAGE + 1,
        8 * PAGE..400 * PAGE,
        0..if is_emulated() { 1 << 25 } else { 1 << 30 },
    ] {
        let map = map_all(&guard.client(), &file, range.clone());
        probe(&map, &file, &states, block, &format!("{range:?}"));
        // Somebody else's growth does not make it anything else.
        assert!(is_pinned(&path));
        drop(map);
        wait_until_free(&path);
    }
    let empty = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(disk.path("segments-empty"))
        .unwrap();
    let map = map_all(&guard.client(), &empty, 0..2 * PAGE);
    probe(&map, &empty, &[], block, "an empty file");
    drop(map);
    std::fs::remove_file(disk.path("segments-empty")).unwrap();
    std::fs::remove_file(&path).unwrap();
}

/// Readers bring large folios into the page cache; a store must not make
/// more of them dirty than blocks that can be stored to.
fn large_folios(world: &World, kind: Kind) {
    let (disk, guard) = (world.disk(kind), world.guard());
    let block = kind.block();
    let path = disk.path("segments-folios");
    let per_page = usize::try_from(PAGE / block).unwrap();
    let mut random = Random::new(7);
    for round in 0..4 {
        let mut states = Vec::new();
        while states.len() < usize::try_from(4 * HUGE / block).unwrap() {
            let state = *random.pick(State::all(kind));
            let pages = 1 + random.below(if round % 2 == 0 { 40 } else { 300 });
            let blocks = usize::try_from(pages).unwrap() * per_page;
            states.extend(vec![state; blocks]);
        }
        let size = states.len() as u64 * block;
        let file = make(&path, block, &states, size);
        let read = || {
            // As a reader does that the kernel reads ahead for, more and more.
            let reader = File::open(&path).unwrap();
            let mut chunk = vec![0; 32 << 10];
            let mut at = 0;
            while at < size {
                at += reader.read_at(&mut chunk, at).unwrap() as u64;
            }
        };
        let drop_cache = || {
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        };
        drop_cache();
        read();
        let map = map_all(&guard.client(), &file, 0..size);
        for _ in 0..3 {
            probe(&map, &file, &states, block, &format!("round {round}"));
            file.sync_all().unwrap();
            drop_cache();
            read();
        }
        drop(map);
        drop(file);
        wait_until_free(&path);
    }
    let _ = std::fs::remove_file(path.with_extension("other"));
    std::fs::remove_file(&path).unwrap();
}

/// Four pages: written, hole, unwritten, written.
pub(crate) const FOUR: [State; 4] = [
    State::Written,
    State::Hole,
    State::Unwritten,
    State::Written,
];

pub(crate) fn four(world: &World, kind: Kind, name: &str) -> (std::path::PathBuf, File) {
    let path = world.disk(kind).path(&format!("segments-{name}"));
    let file = make(&path, PAGE, &FOUR, 4 * PAGE);
    (path, file)
}

pub(crate) fn at(map: &DirectMap, page: usize) -> usize {
    map.as_ptr() as usize + page * 4096
}

/// A system call that is given such a buffer fails, and does not kill.
fn system_calls(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = four(world, kind, "calls");
    let map = map_all(&guard.client(), &file, 0..6 * PAGE);
    let zeros = File::open("/dev/zero").unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    for page in 0..6 {
        // SAFETY: bytes of a test file.
        let read = unsafe { raw::read_into(zeros.as_fd(), at(&map, page), 100) };
        let written = raw::write_from(writer.as_fd(), at(&map, page), 100);
        if page == 0 || page == 3 {
            assert_eq!((read, written), (Ok(100), Ok(100)), "page {page}");
        } else if page < 4 {
            assert_eq!((read, written), (Err(Errno::FAULT), Ok(100)), "page {page}");
        } else {
            let fault = Err(Errno::FAULT);
            assert_eq!((read, written), (fault, fault), "page {page}");
        }
    }
    drop((reader, writer));
    drop(map);
    std::fs::remove_file(path).unwrap();
}

/// A child shares what can be stored to, and loses no store in what cannot.
fn fork(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = four(world, kind, "fork");
    let map = map_all(&guard.client(), &file, 0..5 * PAGE);
    let child = raw::fork(|| {
        let mut wrong = 0;
        // Something to lie in a gap, if there were one.
        let other = raw::anonymous(5 * 4096).is_ok();
        for page in 1..5 {
            if page != 3 {
                wrong += i32::from(load(at(&map, page)) != Access::BUS_ADRERR);
                wrong += i32::from(store(at(&map, page), 1) != Access::BUS_ADRERR);
            }
        }
        wrong += 10 * i32::from(load(at(&map, 0)) != Access::Went(filling(0)));
        wrong += 10 * i32::from(store(at(&map, 0), 77) != Access::Went(77));
        wrong += 20 * i32::from(store(at(&map, 3), 78) != Access::Went(78));
        wrong += 100 * i32::from(!other);
        // And its own children.
        let again = raw::fork(|| i32::from(store(at(&map, 1), 1) != Access::BUS_ADRERR));
        wrong += 30 * i32::from(again.and_then(raw::wait) != Ok(0));
        wrong
    })
    .unwrap();
    assert_eq!(raw::wait(child).unwrap(), 0);
    assert_eq!(load(at(&map, 0)), Access::Went(77));
    assert_eq!(load(at(&map, 3)), Access::Went(78));
    assert_eq!(load(at(&map, 1)), Access::Went(0));
    assert_eq!(store(at(&map, 1), 1), Access::BUS_ADRERR);
    // A child that has the mapping keeps the pin; one that only has holes
    // does not.
    let child = raw::fork(|| {
        loop {
            std::thread::sleep(std::time::Duration::from_secs(3600));
        }
    })
    .unwrap();
    drop(map);
    drop(file);
    assert!(is_pinned(&path));
    mapdirect_sys::signal::kill(child, mapdirect_sys::signal::Signal::KILL).unwrap();
    raw::wait(child).unwrap();
    wait_until_free(&path);
    std::fs::remove_file(path).unwrap();
}

/// Threads that map and unmap, and fork meanwhile.
fn fork_beside_a_store(world: &World, kind: Kind) {
    let guard = world.guard();
    let files: Vec<_> = (0..3)
        .map(|number| four(world, kind, &format!("fork-beside-{number}")))
        .collect();
    std::thread::scope(|scope| {
        for (_, file) in &files {
            let client = guard.client();
            scope.spawn(move || {
                for _ in 0..40 {
                    let map = map_all(&client, file, 0..4 * PAGE);
                    let child = raw::fork(|| {
                        i32::from(store(at(&map, 1), 1) != Access::BUS_ADRERR)
                            + 2 * i32::from(load(at(&map, 3)) != Access::Went(filling(3)))
                    })
                    .unwrap();
                    assert_eq!(store(at(&map, 2), 1), Access::BUS_ADRERR);
                    assert_eq!(raw::wait(child).unwrap(), 0);
                }
            });
        }
    });
    for (path, file) in files {
        drop(file);
        wait_until_free(&path);
        std::fs::remove_file(path).unwrap();
    }
}

fn mprotect(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = four(world, kind, "mprotect");
    let map = map_all(&guard.client(), &file, 0..4 * PAGE);
    let base = at(&map, 0);
    for (start, length) in [(base, 4 * 4096), (base + 4096, 4096), (base + 8192, 8192)] {
        protect(start, length, libc::PROT_READ).unwrap();
        assert!(matches!(store(start, 1), Access::Segv(_)));
        protect(start, length, libc::PROT_NONE).unwrap();
        assert!(matches!(load(start), Access::Segv(_)));
        protect(start, length, libc::PROT_READ | libc::PROT_WRITE).unwrap();
    }
    probe(&map, &file, &FOUR, PAGE, "after mprotect");
    drop(map);
    std::fs::remove_file(path).unwrap();
}

/// What is moved stays what it was, and keeps the pin.
fn mremap(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = four(world, kind, "mremap");
    for page in 0..4 {
        let map = map_all(&guard.client(), &file, 0..4 * PAGE);
        let frozen = page == 1 || page == 2;
        let check = |place| {
            let there = if frozen { 0 } else { filling(page as u64) };
            assert_eq!(load(place), Access::Went(there), "page {page}");
            let stored = store(place, there);
            if frozen {
                assert_eq!(stored, Access::BUS_ADRERR, "page {page}");
            } else {
                assert_eq!(stored, Access::Went(there), "page {page}");
            }
        };
        let place = raw::anonymous(8 * 4096).unwrap();
        remap(at(&map, page), 4096, 4096, place);
        check(place);
        remap(place, 4096, 4096, place + 2 * 4096);
        check(place + 2 * 4096);
        if frozen {
            // Grown: there is nothing behind it, and nothing is lost there.
            remap(place + 2 * 4096, 4096, 8192, place + 4 * 4096);
            check(place + 4 * 4096);
            assert_eq!(store(place + 5 * 4096, 1), Access::BUS_ADRERR);
        }
        drop(map);
        assert!(is_pinned(&path), "page {page}");
        unmap(place, 8 * 4096);
        wait_until_free(&path);
    }
    std::fs::remove_file(path).unwrap();
}

/// What the program advises changes what is there, and loses no store.
fn madvise(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = four(world, kind, "madvise");
    let map = map_all(&guard.client(), &file, 0..4 * PAGE);
    for advice in [
        libc::MADV_WILLNEED,
        libc::MADV_HUGEPAGE,
        libc::MADV_COLD,
        libc::MADV_PAGEOUT,
        libc::MADV_FREE,
        libc::MADV_DONTNEED,
        libc::MADV_DOFORK,
        libc::MADV_POPULATE_WRITE,
    ] {
        // Some of them make no sense here.
        let _ = raw::madvise(at(&map, 1), 8192, advice);
        for page in [1, 2] {
            assert_eq!(
                store(at(&map, page), 1),
                Access::BUS_ADRERR,
                "advice {advice}"
            );
            let loaded = load(at(&map, page));
            // It may be gone: that is told, too.
            assert!(
                loaded == Access::Went(0) || loaded == Access::BUS_ADRERR,
                "advice {advice}: {loaded:?}"
            );
        }
    }
    drop(map);
    drop(file);
    wait_until_free(&path);
    std::fs::remove_file(path).unwrap();
}

/// Role: maps a file, closes every descriptor it has, and says what becomes
/// of stores. Arguments: socket, path.
pub fn play_close_all(arguments: &[String]) -> Result<()> {
    let [socket, path] = arguments else {
        bail!("wrong arguments");
    };
    let guard = Guard::at(socket);
    let file = open(Path::new(path));
    let map = map_all(&guard, &file, 0..4 * PAGE);
    // SAFETY: what is forgotten below is not used any more.
    unsafe { raw::close_from(3) }?;
    let first = store(at(&map, 1), 1);
    // Whoever comes to have those numbers is left alone.
    let one = File::open("/dev/zero")?;
    let other = raw::fork(|| i32::from(store(at(&map, 2), 1) != Access::BUS_ADRERR))?;
    let child = raw::wait(other)?;
    // A gate in the kernel lets it be opened, and nothing be done with it.
    let second = File::options().read(true).write(true).open(path);
    let second = second.and_then(|file| file.set_len(0));
    let refused = second.is_err_and(|error| error.raw_os_error() == Some(libc::ETXTBSY));
    one.read_exact_at(&mut [0; 8], 0)?;
    say(&format!("{first:?} {child} {refused}"));
    std::mem::forget((map, file, one));
    Ok(())
}

fn descriptors_closed(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = four(world, kind, "closed");
    drop(file);
    let mut helper = Helper::start(
        "close-all",
        &[&guard.socket().to_string_lossy(), &path.to_string_lossy()],
    )
    .unwrap();
    assert_eq!(helper.hear().unwrap(), "Bus(2) 0 true");
    helper.finish().unwrap();
    wait_until_free(&path);
    std::fs::remove_file(path).unwrap();
}

/// The pin lives in whatever is left, holes included.
fn partial_unmap(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = four(world, kind, "partial");
    for last in 0..4 {
        let map = map_all(&guard.client(), &file, 0..4 * PAGE);
        let base = at(&map, 0);
        std::mem::forget(map);
        for page in (0..4).filter(|page| *page != last) {
            unmap(base + page * 4096, 4096);
            assert!(is_pinned(&path), "page {page} gone, {last} left");
        }
        if last == 1 || last == 2 {
            assert_eq!(store(base + last * 4096, 1), Access::BUS_ADRERR);
        }
        unmap(base + last * 4096, 4096);
        wait_until_free(&path);
    }
    std::fs::remove_file(path).unwrap();
}

/// A range without a single block is pinned all the same.
fn holes_only(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = world.disk(kind).path("segments-holes");
    let file = make(&path, PAGE, &[State::Hole; 64], 64 * PAGE);
    let map = map_all(&guard.client(), &file, 0..64 * PAGE);
    probe(&map, &file, &[State::Hole; 64], PAGE, "holes");
    assert!(is_pinned(&path));
    drop(map);
    // Not a moment later: whoever unmaps may go on at once.
    drop(open(&path));
    std::fs::remove_file(path).unwrap();
}

fn fixed(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = four(world, kind, "fixed");
    drop(file);
    for (flag, taken, expected) in [
        (libc::MAP_FIXED, true, "there"),
        (libc::MAP_FIXED, false, "there"),
        (libc::MAP_FIXED_NOREPLACE, false, "there"),
        (libc::MAP_FIXED_NOREPLACE, true, "errno 17"),
        (0, false, "there"),
        (0, true, "elsewhere"),
    ] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([mapdirect_testkit::process::HELPER, "fixed"])
            .arg(&path)
            .args([flag.to_string(), taken.to_string()])
            .env("MAPDIRECT_SOCKET", guard.socket())
            .env("MAPDIRECT_CACHED", "1");
        let mut helper = Helper::spawn(command).unwrap();
        assert_eq!(helper.hear().unwrap(), expected, "{flag:#x} {taken}");
        helper.finish().unwrap();
        // Whoever looks at the process keeps what it mapped for a moment.
        wait_until_free(&path);
    }
    std::fs::remove_file(path).unwrap();
}

/// Role: maps where it is told. Arguments: path, flag, whether the place is
/// taken.
pub fn play_fixed(arguments: &[String]) -> Result<()> {
    let [path, flag, taken] = arguments else {
        bail!("wrong arguments");
    };
    let file = open(Path::new(path));
    let there = raw::anonymous(8 * 4096)?;
    // Between neighbours that must stay.
    let place = there + 2 * 4096;
    if taken == "false" {
        unmap(place, 4 * 4096);
    } else {
        assert_eq!(store(place, 55), Access::Went(55));
    }
    assert_eq!(store(there, 56), Access::Went(56));
    assert_eq!(store(there + 6 * 4096, 57), Access::Went(57));
    let flags = libc::MAP_SHARED_VALIDATE | mapdirect::raw::MAP_DIRECT | flag.parse::<i32>()?;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: what is replaced is our own, and nothing refers to it.
    let mapped = unsafe { mapdirect::raw::mmap(place, 4 * 4096, prot, flags, file.as_fd(), 0) };
    let kept = load(there) == Access::Went(56) && load(there + 6 * 4096) == Access::Went(57);
    assert!(kept, "a neighbour was touched");
    match mapped {
        Ok(address) => {
            assert_eq!(load(address), Access::Went(filling(0)));
            assert_eq!(load(address + 4096), Access::Went(0));
            assert_eq!(store(address + 4096, 1), Access::BUS_ADRERR);
            assert_eq!(
                store(address + 3 * 4096, filling(3)),
                Access::Went(filling(3))
            );
            say(if address == place {
                "there"
            } else {
                "elsewhere"
            });
        }
        Err(error) => {
            if taken == "true" {
                assert_eq!(load(place), Access::Went(55));
            }
            say(&format!("errno {}", error.errno()));
        }
    }
    Ok(())
}

/// Huge pages of the file can lie in huge pages of memory.
fn aligned(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = world.disk(kind).path("segments-aligned");
    let pages = usize::try_from(3 * HUGE / PAGE).unwrap();
    for hole in [None, Some(3), Some(pages - 2)] {
        let mut states = vec![State::Written; pages];
        if let Some(hole) = hole {
            states[hole] = State::Hole;
        }
        let file = make(&path, PAGE, &states, 3 * HUGE);
        for start in [0, PAGE, HUGE] {
            let map = map_all(&guard.client(), &file, start..3 * HUGE);
            let address = map.as_ptr() as u64;
            assert_eq!(
                address % HUGE,
                start % HUGE,
                "hole at {hole:?}, from {start}"
            );
            probe(&map, &file, &states, PAGE, "aligned");
        }
    }
    std::fs::remove_file(path).unwrap();
}

/// Makes a file of which every other page is a hole.
fn every_other(path: &Path, pages: u64) -> File {
    let _ = std::fs::remove_file(path);
    let file = File::create_new(path).unwrap();
    file.set_len(pages * PAGE).unwrap();
    let bytes = [5; 4096];
    for at in (0..pages).step_by(2) {
        file.write_all_at(&bytes, at * PAGE).unwrap();
    }
    file.sync_all().unwrap();
    file
}

fn many(world: &World, kind: Kind) {
    const PAGES: u64 = 20_000;
    let guard = world.guard();
    let path = world.disk(kind).path("segments-many");
    let file = every_other(&path, PAGES);
    let started = Instant::now();
    let map = map_all(&guard.client(), &file, 0..PAGES * PAGE);
    let took = started.elapsed();
    let before = map.block_map().clone();
    for page in (0..usize::try_from(PAGES).unwrap()).step_by(97) {
        if page % 2 == 0 {
            assert_eq!(store(at(&map, page), 6), Access::Went(6));
        } else {
            assert_eq!(load(at(&map, page)), Access::Went(0));
            assert_eq!(store(at(&map, page), 6), Access::BUS_ADRERR);
        }
    }
    map.persist(0..map.len()).unwrap();
    let now = mapdirect::block_map(&file, before.range()).unwrap();
    assert_eq!(before.extents(), now.extents());
    let unmapping = Instant::now();
    drop(map);
    println!(
        "  {kind}: {PAGES} pages, every other a hole: mapped in {took:?}, unmapped in {:?}",
        unmapping.elapsed()
    );
    drop(file);
    wait_until_free(&path);
    std::fs::remove_file(path).unwrap();
}

fn too_many(world: &World, kind: Kind) {
    const PAGES: u64 = 70_000;
    let guard = world.guard();
    let path = world.disk(kind).path("segments-too-many");
    let file = every_other(&path, PAGES);
    let limit = mapdirect_sys::proc::max_map_count().unwrap();
    let result = try_map(&guard.client(), &file, 0..PAGES * PAGE);
    if u64::try_from(limit).unwrap() > PAGES + 1000 {
        drop(result.unwrap());
    } else {
        let error = result.unwrap_err();
        assert_eq!(error.errno(), Errno::NOMEM.raw_os_error(), "{error:#}");
        assert!(
            error
                .obstacle()
                .contains(&format!("{PAGES} memory mappings"))
        );
        assert!(error.obstacle().contains("vm.max_map_count"), "{error:#}");
    }
    drop(file);
    // Nothing is left behind.
    wait_until_free(&path);
    std::fs::remove_file(path).unwrap();
}

/// A terabyte of nothing.
fn sparse(world: &World, kind: Kind) {
    const SIZE: u64 = 1 << 38;
    let guard = world.guard();
    let path = world.disk(kind).path("segments-sparse");
    let file = make(&path, PAGE, &[State::Written], SIZE);
    let started = Instant::now();
    let map = map_all(&guard.client(), &file, 0..SIZE);
    println!(
        "  {kind}: {} GiB of hole mapped in {:?}",
        SIZE >> 30,
        started.elapsed()
    );
    let last = usize::try_from(SIZE).unwrap() - 1;
    let base = at(&map, 0);
    for place in [4096, last / 2, last] {
        assert_eq!(load(base + place), Access::Went(0));
        assert_eq!(store(base + place, 1), Access::BUS_ADRERR);
    }
    assert_eq!(store(base, 1), Access::Went(1));
    drop(map);
    std::fs::remove_file(path).unwrap();
}

/// Role: maps and probes as whoever it is run as.
pub fn play_probe(arguments: &[String]) -> Result<()> {
    let [socket, path] = arguments else {
        bail!("wrong arguments");
    };
    let file = open(Path::new(path));
    let map = try_map(&Guard::at(socket), &file, 0..4 * PAGE).context("mapping")?;
    probe(&map, &file, &FOUR, PAGE, "unprivileged");
    say("probed");
    Ok(())
}

fn unprivileged(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = four(world, kind, "unprivileged");
    drop(file);
    Command::new("chmod")
        .arg("666")
        .arg(&path)
        .status()
        .unwrap();
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=65534", "--clear-groups"])
        .args([
            "--inh-caps=-all,+linux_immutable",
            "--ambient-caps=+linux_immutable",
        ])
        .arg("--bounding-set=-all,+linux_immutable")
        .arg(std::env::current_exe().unwrap())
        .arg(mapdirect_testkit::process::HELPER)
        .arg("probe")
        .arg(guard.socket())
        .arg(&path);
    let mut helper = Helper::spawn(command).unwrap();
    assert_eq!(helper.hear().unwrap(), "probed");
    helper.finish().unwrap();
    wait_until_free(&path);
    std::fs::remove_file(path).unwrap();
}

/// Role: stores to a page and, if it lives on, says so. Arguments: socket,
/// path, page.
pub fn play_store(arguments: &[String]) -> Result<()> {
    let [socket, path, page] = arguments else {
        bail!("wrong arguments");
    };
    let file = open(Path::new(path));
    let map = map_all(&Guard::at(socket), &file, 0..5 * PAGE);
    raw::store_into(&map, page.parse::<usize>()? * 4096, 42);
    say("alive");
    Ok(())
}

/// A program that does not expect it dies of SIGBUS, and only there.
fn killed_by_a_store(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = four(world, kind, "killed");
    drop(file);
    for page in 0..5 {
        let arguments = [
            &*guard.socket().to_string_lossy(),
            &*path.to_string_lossy(),
            &page.to_string(),
        ];
        let mut helper = Helper::start("store", &arguments).unwrap();
        let said = helper.hear();
        let status = helper.status().unwrap();
        if page == 0 || page == 3 {
            assert_eq!(
                (said.unwrap().as_str(), status),
                ("alive", 0),
                "page {page}"
            );
        } else {
            assert!(said.is_err(), "page {page}");
            assert_eq!(status, 128 + libc::SIGBUS, "page {page}");
        }
        wait_until_free(&path);
    }
    std::fs::remove_file(path).unwrap();
}

/// A file that grows behind its mapping allocates nothing in it.
fn growing(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = world.disk(kind).path("segments-growing");
    let states = [State::Written; 3];
    let file = make(&path, PAGE, &states, 3 * PAGE - 10);
    let map = map_all(&guard.client(), &file, 0..40 * PAGE);
    let before = map.block_map().clone();
    file.set_len(80 * PAGE).unwrap();
    // Read ahead, stored to, written back, again and again: the page that
    // held the end of the file is by itself.
    for round in 0..5u8 {
        let mut chunk = vec![0; 16 << 10];
        let reader = File::open(&path).unwrap();
        for at in (0..80 * PAGE).step_by(chunk.len()) {
            reader.read_at(&mut chunk, at).unwrap();
        }
        assert_eq!(store(at(&map, 2), round), Access::Went(round));
        file.write_all_at(&[round], 2 * PAGE + 1).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let now = mapdirect::block_map(&file, before.range()).unwrap();
        assert_eq!(before.extents(), now.extents(), "round {round}");
    }
    // What was beyond the end when it was mapped stays so.
    assert_eq!(load(at(&map, 3)), Access::BUS_ADRERR);
    assert_eq!(store(at(&map, 39), 1), Access::BUS_ADRERR);
    // Writing past the page cache would throw that page out of it.
    let direct = rustix::fs::open(
        &path,
        rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::DIRECT,
        rustix::fs::Mode::empty(),
    );
    // A gate in the kernel judges what is done by it.
    let written = direct.and_then(|direct| rustix::io::pwrite(&direct, &[0; 4096], 2 * PAGE));
    assert_eq!(written, Err(Errno::TXTBSY));
    drop(map);
    std::fs::remove_file(path).unwrap();
}

/// Two holders, one of them of the holes beside the other's blocks.
fn neighbours(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = four(world, kind, "neighbours");
    let first = map_all(&guard.client(), &file, 0..PAGE);
    let second = map_all(&guard.client(), &file, PAGE..3 * PAGE);
    let third = map_all(&guard.client(), &file, 3 * PAGE..4 * PAGE);
    let before = mapdirect::block_map(&file, 0..4 * PAGE).unwrap();
    for _ in 0..3 {
        assert_eq!(store(at(&first, 0), 1), Access::Went(1));
        assert_eq!(store(at(&third, 0), 1), Access::Went(1));
        assert_eq!(store(at(&second, 0), 1), Access::BUS_ADRERR);
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let mut chunk = vec![0; 4 * 4096];
        File::open(&path).unwrap().read_at(&mut chunk, 0).unwrap();
        let now = mapdirect::block_map(&file, 0..4 * PAGE).unwrap();
        assert_eq!(before.extents(), now.extents());
    }
    drop((first, second, third));
    // A pin without a mapping beside somebody's store.
    let first = map_all(&guard.client(), &file, 0..PAGE);
    let pin = PinOptions::new()
        .range(PAGE..3 * PAGE)
        .patience(PATIENCE)
        .guard(guard.client())
        .pin(&file)
        .unwrap();
    for _ in 0..3 {
        assert_eq!(store(at(&first, 0), 2), Access::Went(2));
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let mut chunk = vec![0; 4 * 4096];
        File::open(&path).unwrap().read_at(&mut chunk, 0).unwrap();
    }
    let now = mapdirect::block_map(&file, PAGE..3 * PAGE).unwrap();
    assert_eq!(pin.block_map().extents(), now.extents());
    assert_eq!(pin.block_map().total(ExtentState::Hole), PAGE);
    drop((first, pin));
    std::fs::remove_file(path).unwrap();
}

/// Whatever fails, nothing stays mapped and nothing pinned.
fn fails_halfway(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = world.disk(kind).path("segments-halfway");
    let file = every_other(&path, 64);
    drop(file);
    let mut helper = Helper::start(
        "halfway",
        &[&guard.socket().to_string_lossy(), &path.to_string_lossy()],
    )
    .unwrap();
    let said = helper.hear().unwrap();
    helper.finish().unwrap();
    assert_eq!(said, "all of them failed and left nothing");
    wait_until_free(&path);
    std::fs::remove_file(path).unwrap();
}

/// Role: maps with less and less room for it.
pub fn play_halfway(arguments: &[String]) -> Result<()> {
    let [socket, path] = arguments else {
        bail!("wrong arguments");
    };
    let guard = Guard::at(socket);
    let file = open(Path::new(path));
    // Once, so that whatever is made for good is there.
    drop(map_all(&guard, &file, 0..64 * PAGE));
    let count = || mapdirect_sys::proc::count_own_mappings().unwrap_or(0);
    let limit = mapdirect_sys::proc::max_map_count()?;
    // Alternating protections keep neighbours from becoming one mapping.
    let pages = 2 * (limit - count());
    let place = raw::anonymous(pages * 4096)?;
    let mut filled = 0;
    while count() + 60 < limit {
        let step = ((limit - 60 - count()) / 2).max(1);
        for _ in 0..step {
            protect(place + filled * 8192, 4096, libc::PROT_READ)?;
            filled += 1;
        }
    }
    // Less and less room.
    let mut failed = 0;
    while count() + 4 < limit {
        let there = count();
        let error = try_map(&guard, &file, 0..64 * PAGE)
            .err()
            .context("there was room")?;
        assert_eq!(error.errno(), Errno::NOMEM.raw_os_error(), "{error:#}");
        assert_eq!(count(), there, "something stayed mapped");
        failed += 1;
        for _ in 0..3 {
            protect(place + filled * 8192, 4096, libc::PROT_READ)?;
            filled += 1;
        }
    }
    assert!(failed > 3);
    unmap(place, pages * 4096);
    let map = map_all(&guard, &file, 0..64 * PAGE);
    assert_eq!(store(at(&map, 1), 1), Access::BUS_ADRERR);
    say("all of them failed and left nothing");
    Ok(())
}

/// Piece by piece, in any order: what was asked for can be stored to, and
/// nothing else has changed.
fn allocate(world: &World, kind: Kind) {
    let (disk, guard) = (world.disk(kind), world.guard());
    let block = kind.block();
    let path = disk.path("segments-allocate");
    let other = path.with_extension("other");
    for seed in 0..6 {
        let mut random = Random::new(100 + seed);
        let mut states = Vec::new();
        while states.len() < 300 {
            let state = *random.pick(State::all(kind));
            let length = 1 + random.below(40);
            states.extend((0..length).map(|_| state));
        }
        let size = states.len() as u64 * block - random.below(block);
        let file = make(&path, block, &states, size);
        let sharer = other.exists().then(|| std::fs::read(&other).unwrap());
        let mut map = map_all(&guard.client(), &file, 0..size);
        // Stores beside it all the time: dirty neighbours stay where they are.
        let base = at(&map, 0);
        let stored: Vec<usize> = (0..map.len())
            .step_by(4096)
            .filter(|offset| map.write_all_at(&[1], *offset).is_ok())
            .collect();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut round = 0u8;
                while !done.load(SeqCst) {
                    round = round.wrapping_add(1);
                    for offset in &stored {
                        store(base + offset + 1, round);
                    }
                    std::thread::yield_now();
                }
            });
            let _done = Done(&done);
            for _ in 0..12 {
                let before = map.block_map().clone();
                let start = random.below(size);
                let length = 1 + random.below((size - start).min(40 * PAGE));
                let range =
                    usize::try_from(start).unwrap()..usize::try_from(start + length).unwrap();
                map.allocate(start..start + length).unwrap();
                let now = map.block_map().clone();
                let there = mapdirect::block_map(&file, now.range()).unwrap();
                assert_eq!(now.extents(), there.extents(), "seed {seed}, {range:?}");
                check_allocated(&before, &now, &range, kind);
                let bytes = vec![filling(7); range.len()];
                map.write_all_at(&bytes, range.start).unwrap();
                assert_eq!(
                    store(base + range.start, filling(7)),
                    Access::Went(filling(7))
                );
                let mut read = vec![0; range.len()];
                file.read_exact_at(&mut read, start).unwrap();
                // But for the bytes that the other thread stores to.
                let differs = (0..bytes.len())
                    .find(|at| read[*at] != bytes[*at] && (range.start + at) % 4096 != 1);
                assert_eq!(
                    differs, None,
                    "seed {seed}: what was stored is not in the file"
                );
            }
        });
        map.allocate(0..size).unwrap();
        assert!(map.block_map().is_stable());
        for offset in (0..map.len()).step_by(4096) {
            assert_eq!(store(base + offset, 9), Access::Went(9));
        }
        map.persist(0..map.len()).unwrap();
        let there = mapdirect::block_map(&file, map.block_map().range()).unwrap();
        assert_eq!(map.block_map().extents(), there.extents());
        if let Some(sharer) = sharer {
            assert!(
                sharer == std::fs::read(&other).unwrap(),
                "the sharer has other bytes"
            );
        }
        assert!(is_pinned(&path));
        drop(map);
        drop(file);
        wait_until_free(&path);
    }
    let _ = std::fs::remove_file(&other);
    std::fs::remove_file(&path).unwrap();
}

/// Ends the storing thread, also when something fails.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// The pages of the range are stable; what was stable is where it was; what
/// else was frozen is what it was, but for ext4, which converts whole extents
/// that are small.
fn check_allocated(before: &BlockMap, now: &BlockMap, range: &Range<usize>, kind: Kind) {
    let block = kind.block();
    let unit = PAGE.max(block);
    let start = range.start as u64 / unit * unit;
    let end = (range.end as u64).next_multiple_of(unit);
    for at in (0..before.range().end).step_by(usize::try_from(block).unwrap()) {
        let (was, is) = (before.find(at).unwrap(), now.find(at).unwrap());
        let place = |extent: &mapdirect::Extent| extent.physical.map(|to| to + at - extent.offset);
        if (start..end).contains(&at) {
            assert_eq!(is.state, ExtentState::Written, "byte {at} of {range:?}");
        } else if was.state != is.state {
            let converted = was.state == ExtentState::Unwritten && !kind.is_xfs();
            assert!(
                converted,
                "byte {at}, not of {range:?}: {was:?} became {is:?}"
            );
        }
        let moves = (start..end).contains(&at) && was.state != ExtentState::Unwritten;
        if was.state == ExtentState::Written || !moves {
            assert_eq!(place(was), place(is), "byte {at} of {range:?} moved");
        }
    }
}

fn allocate_arguments(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = four(world, kind, "arguments");
    let mut map = map_all(&guard.client(), &file, 0..6 * PAGE);
    let errno = |result: mapdirect::Result<()>| result.unwrap_err().errno();
    let inval = Errno::INVAL.raw_os_error();
    assert_eq!(errno(map.allocate(0..6 * 4096 + 1)), inval);
    assert_eq!(errno(map.allocate(5 * 4096..6 * 4096)), inval);
    map.allocate(4096..4096).unwrap();
    assert_eq!(store(at(&map, 1), 1), Access::BUS_ADRERR);
    // Across the end of the file: up to there.
    map.allocate(4096..6 * 4096).unwrap();
    for page in 0..4 {
        assert_eq!(store(at(&map, page), 1), Access::Went(1));
    }
    assert_eq!(store(at(&map, 4), 1), Access::BUS_ADRERR);
    // Nothing to do is done without anybody.
    map.allocate(0..4 * 4096).unwrap();
    drop(map);
    wait_until_free_of(file, &path);

    // Without a guard there is nobody to do it.
    let (path, file) = four(world, kind, "arguments");
    let mut own = GuardProcess::start(Path::new(BINARY)).unwrap();
    let mut map = map_all(&own.client(), &file, 0..4 * PAGE);
    own.kill().unwrap();
    let error = map.allocate(4096..8192).unwrap_err();
    assert_eq!(error.errno(), Errno::OPNOTSUPP.raw_os_error(), "{error:#}");
    assert_eq!(store(at(&map, 1), 1), Access::BUS_ADRERR);
    drop(map);
    std::fs::remove_file(path).unwrap();
}

fn wait_until_free_of(file: File, path: &Path) {
    drop(file);
    wait_until_free(path);
    std::fs::remove_file(path).unwrap();
}

/// No room: nothing changes.
fn allocate_without_room(world: &World, kind: Kind) {
    let guard = world.guard();
    let disk = Disk::new(kind, 320).unwrap();
    let path = disk.path("file");
    let file = make(&path, PAGE, &FOUR, 1 << 32);
    let mut map = map_all(&guard.client(), &file, 0..1 << 32);
    let before = map.block_map().clone();
    let error = map.allocate(0..1 << 32).unwrap_err();
    assert_eq!(error.errno(), Errno::NOSPC.raw_os_error(), "{error:#}");
    assert!(error.obstacle().contains("lacks"), "{error:#}");
    let now = mapdirect::block_map(&file, 0..1 << 32).unwrap();
    assert_eq!(
        (before.extents(), before.extents()),
        (now.extents(), map.extents())
    );
    assert_eq!(store(at(&map, 1), 1), Access::BUS_ADRERR);
    assert_eq!(load(at(&map, 1)), Access::Went(0));
    // Less of it fits.
    map.allocate(4096..8192).unwrap();
    assert_eq!(store(at(&map, 1), 1), Access::Went(1));
    drop(map);
    drop(file);
    disk.unmount().unwrap();
}

/// What somebody else has pinned as it is stays so.
fn allocate_beside_a_pin(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = four(world, kind, "beside");
    let mut map = map_all(&guard.client(), &file, 0..4 * PAGE);
    let pin = |range| {
        PinOptions::new()
            .range(range)
            .patience(PATIENCE)
            .guard(guard.client())
            .pin(&file)
            .unwrap()
    };
    let hole = pin(PAGE..2 * PAGE);
    let error = map.allocate(4096..8192).unwrap_err();
    assert_eq!(error.errno(), Errno::TXTBSY.raw_os_error(), "{error:#}");
    assert_eq!(store(at(&map, 1), 1), Access::BUS_ADRERR);
    drop(hole);
    let stable = pin(0..PAGE);
    map.allocate(4096..8192).unwrap();
    assert_eq!(store(at(&map, 1), 1), Access::Went(1));
    assert_eq!(
        stable.block_map().extents(),
        mapdirect::block_map(&file, 0..PAGE).unwrap().extents()
    );
    drop((stable, map));
    wait_until_free_of(file, &path);
}

/// While blocks are made, nobody else gets at them.
fn allocate_under_attack(world: &World, kind: Kind) {
    const PAGES: u64 = 4096;
    let guard = world.guard();
    let path = world.disk(kind).path("segments-attacked");
    let file = make(&path, PAGE, &[State::Hole; 1], PAGES * PAGE);
    let mut map = map_all(&guard.client(), &file, 0..PAGES * PAGE);
    let done = AtomicBool::new(false);
    let tried = std::thread::scope(|scope| {
        let attacker = scope.spawn(|| {
            let mut tried = 0u32;
            let c_path = raw::c_path(&path);
            while !done.load(SeqCst) {
                assert_eq!(raw::truncate(&c_path, PAGE), Err(Errno::TXTBSY));
                let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let punched = raw::fallocate(file.as_fd(), punch, 8 * PAGE, 64 * PAGE);
                assert_eq!(punched, Err(Errno::TXTBSY));
                let written = raw::pwritev2(file.as_fd(), &[3; 4096], (PAGES - 1) * PAGE, 0);
                assert_eq!(written, Err(Errno::TXTBSY));
                tried += 1;
            }
            tried
        });
        let finished = Done(&done);
        for at in 0..32 {
            let range = at * 127 * 4096..(at * 127 + 126) * 4096;
            map.allocate(range).unwrap();
        }
        drop(finished);
        attacker.join().unwrap()
    });
    assert!(tried > 0);
    let there = mapdirect::block_map(&file, 0..PAGES * PAGE).unwrap();
    assert_eq!(map.block_map().extents(), there.extents());
    drop(map);
    wait_until_free_of(file, &path);
}

/// Prepared, mapped and pinned in one call.
fn prepared(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = four(world, kind, "prepared");
    let map = MapOptions::new()
        .range(0..6 * PAGE)
        .prepare_first(true)
        .accept_page_cache(true)
        .patience(PATIENCE)
        .guard(guard.client())
        .map(&file)
        .unwrap();
    let states = [
        State::Written,
        State::Hole,
        State::Unwritten,
        State::Written,
    ];
    for (page, state) in states.iter().enumerate() {
        let there = if *state == State::Written {
            filling(page as u64)
        } else {
            0
        };
        assert_eq!(load(at(&map, page)), Access::Went(there));
        assert_eq!(store(at(&map, page), 5), Access::Went(5));
    }
    assert_eq!(load(at(&map, 4)), Access::BUS_ADRERR);
    drop(map);
    // Wholly beyond the end there is nothing to prepare.
    let beyond = MapOptions::new()
        .range(8 * PAGE..9 * PAGE)
        .prepare_first(true)
        .accept_page_cache(true)
        .patience(PATIENCE)
        .guard(guard.client())
        .map(&file)
        .unwrap();
    drop(beyond);
    // What somebody else has pinned as it is cannot be prepared.
    file.set_len(8 * PAGE).unwrap();
    let pin = PinOptions::new()
        .range(6 * PAGE..7 * PAGE)
        .patience(PATIENCE)
        .guard(guard.client())
        .pin(&file)
        .unwrap();
    let refused = MapOptions::new()
        .range(4 * PAGE..8 * PAGE)
        .prepare_first(true)
        .accept_page_cache(true)
        .guard(guard.client())
        .map(&file);
    let error = refused.unwrap_err();
    assert_eq!(error.errno(), Errno::TXTBSY.raw_os_error(), "{error:#}");
    drop(pin);
    wait_until_free_of(file, &path);
}

/// A pin without a mapping can be prepared and allocated in as well.
fn pin_allocates(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = four(world, kind, "pin-allocates");
    let options = || PinOptions::new().patience(PATIENCE).guard(guard.client());
    let mut pin = options().range(0..4 * PAGE).pin(&file).unwrap();
    pin.allocate(PAGE..2 * PAGE).unwrap();
    let there = mapdirect::block_map(&file, 0..4 * PAGE).unwrap();
    assert_eq!(pin.block_map().extents(), there.extents());
    assert_eq!(there.find(PAGE).unwrap().state, ExtentState::Written);
    assert_eq!(
        pin.allocate(PAGE..5 * PAGE).unwrap_err().errno(),
        Errno::INVAL.raw_os_error()
    );
    drop(pin);
    let pin = options().prepare_first(true).pin(&file).unwrap();
    assert!(pin.block_map().is_stable());
    drop(pin);
    // Whoever cannot write cannot have anything written.
    drop(file);
    wait_until_free(&path);
    let file = make(&path, PAGE, &FOUR, 4 * PAGE);
    drop(file);
    let reader = File::open(&path).unwrap();
    let mut pin = options().pin(&reader).unwrap();
    let error = pin.allocate(PAGE..2 * PAGE).unwrap_err();
    assert_eq!(error.errno(), Errno::ACCESS.raw_os_error(), "{error:#}");
    let error = options().prepare_first(true).pin(&reader).unwrap_err();
    assert_eq!(error.errno(), Errno::ACCESS.raw_os_error(), "{error:#}");
    drop(pin);
    drop(reader);
    std::fs::remove_file(path).unwrap();
}
