//! Preparing: whatever a range is like it becomes stable, and nobody loses a
//! byte by it.

use crate::world::{BINARY, World, map, open, pin, wait_until_free, written};
use anyhow::Result;
use libtest_mimic::Trial;
use mapdirect::{BlockMap, ExtentState, HugePieces, Kind as Reason, PrepareOptions, Prepared};
use mapdirect_sys::{Errno, fallocate, inode_flags, uname};
use mapdirect_testkit::attack::clone_range;
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::disk::run;
use mapdirect_testkit::process::{Background, Helper, listen, say};
use mapdirect_testkit::random::Random;
use mapdirect_testkit::raw::PlainMap;
use mapdirect_testkit::{Disk, Kind};
use rustix::fs::OFlags;
use serde_json::Value;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

const XFS_1K: Kind = Kind::Xfs {
    reflink: true,
    block: 1024,
};
const EXT4_1K: Kind = Kind::Ext4 { block: 1024 };

const HUGE: u64 = 2 << 20;

type Run = fn(&World, Kind);

pub fn trials(world: &World) -> Vec<Trial> {
    let everywhere: [(&str, Run); 11] = [
        ("any-mix", any_mix),
        ("sizes", sizes),
        ("refused", refused),
        ("no-space", no_space),
        ("space-runs-out", space_runs_out),
        ("readers", readers),
        ("writers", writers),
        ("killed", killed),
        ("huge", huge),
        ("truncated", truncated),
        ("extended", extended),
    ];
    let main: [(&str, Run); 6] = [
        ("then-mapped", then_mapped),
        ("pinned", pinned),
        ("watched", watched),
        ("unprivileged", unprivileged),
        ("unlinked", unlinked),
        ("command-line", command_line),
    ];
    let mut trials = Vec::new();
    let mut add = |name: &str, kind: Kind, run: Run| {
        let name = format!("prepare::{kind}::{name}");
        trials.push(world.trial(name, move |world| run(world, kind)));
    };
    for kind in [Kind::XFS, Kind::XFS_PLAIN, Kind::EXT4, XFS_1K, EXT4_1K] {
        for (name, run) in everywhere {
            add(name, kind, run);
        }
    }
    for kind in [Kind::XFS, Kind::EXT4] {
        for (name, run) in main {
            add(name, kind, run);
        }
    }
    for kind in [Kind::XFS, XFS_1K] {
        add("cloned", kind, cloned);
        add("huge-beside-data", kind, huge_beside_data);
    }
    trials
}

fn new_file(path: &Path) -> File {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .unwrap()
}

fn contents(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

fn synced(file: &File) -> BlockMap {
    file.sync_all().unwrap();
    let size = file.metadata().unwrap().len().max(1);
    mapdirect::block_map(file, 0..size).unwrap()
}

/// Nothing but written blocks, seen by another way than the one that counts
/// them.
fn assert_stable(file: &File, prepared: &Prepared, range: Range<u64>, block: u64) {
    let map = prepared.block_map();
    let rounded = range.start - range.start % block..range.end.next_multiple_of(block);
    assert_eq!(map.range(), rounded);
    assert!(map.is_stable(), "{map:?}");
    let now = mapdirect::block_map(file, rounded).unwrap();
    assert_eq!(now.extents(), map.extents());
    for extent in now.extents() {
        assert_eq!(extent.state, ExtentState::Written);
    }
}

fn mapdirect(arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.arg("prepare").args(arguments);
    command
}

fn complaint(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A file of every state there is, in random places, some of it not written
/// back yet. Returns its bytes.
fn mixed(random: &mut Random, file: &File, sharer: &File, size: u64, block: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(size).unwrap()];
    file.set_len(size).unwrap();
    let reflink = clone_is_possible(file, sharer);
    for _ in 0..24 {
        let length = 1 + random.below(20 * block);
        let at = random.below(size);
        let end = size.min(at + length);
        match random.below(5) {
            0 | 1 => {
                let value = random.byte();
                let run = usize::try_from(at).unwrap()..usize::try_from(end).unwrap();
                bytes[run.clone()].fill(value);
                file.write_all_at(&bytes[run], at).unwrap();
            }
            2 => fallocate::allocate(file.as_fd(), &(at..end)).unwrap(),
            3 if reflink => {
                let at = at - at % block;
                let end = end.next_multiple_of(block).min(size - size % block);
                if at < end {
                    clone_range(sharer.as_fd(), file.as_fd(), at, end - at, at).unwrap();
                }
            }
            3 => file.sync_all().unwrap(),
            _ => {
                fallocate::punch(file.as_fd(), &(at..end)).unwrap();
                bytes[usize::try_from(at).unwrap()..usize::try_from(end).unwrap()].fill(0);
            }
        }
    }
    bytes
}

fn clone_is_possible(file: &File, sharer: &File) -> bool {
    // A clone of nothing changes nothing.
    sharer.set_len(1 << 20).unwrap();
    let cloned = clone_range(sharer.as_fd(), file.as_fd(), 0, 4096, 0);
    assert!(
        cloned.is_ok() || cloned == Err(Errno::OPNOTSUPP),
        "{cloned:?}"
    );
    cloned.is_ok()
}

fn any_mix(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = disk.path("prepare-mix");
    let other = disk.path("prepare-mix.sharer");
    let block = kind.block();
    let mut seen = [0; 3];
    for seed in 0..40 {
        let mut random = Random::new(seed);
        let (file, sharer) = (new_file(&path), new_file(&other));
        let size = block * 8 + random.below(200 * block);
        let bytes = mixed(&mut random, &file, &sharer, size, block);
        let range = match random.below(3) {
            0 => 0..size,
            _ => {
                let start = random.below(size);
                start..start + 1 + random.below(size - start)
            }
        };
        let shared_bytes = contents(&other);
        let before_of_sharer = synced(&sharer);
        let before = synced(&file);
        let prepared = mapdirect::prepare(&file, range.clone()).unwrap();
        assert_stable(&file, &prepared, range.clone(), block);
        assert!(contents(&path) == bytes, "seed {seed}: bytes changed");
        assert_eq!(file.metadata().unwrap().len(), size, "seed {seed}");
        let counted = |state| {
            let rounded = prepared.block_map().range();
            before
                .extents()
                .iter()
                .filter(|extent| extent.state == state)
                .filter_map(|extent| extent.clipped(&rounded))
                .map(|extent| extent.length)
                .sum::<u64>()
        };
        // The map before ends with the file, not with its last block.
        let slack = size.next_multiple_of(block) - size;
        let close = |done: u64, state| {
            let expected = counted(state);
            assert!(
                done == expected || done == expected + slack,
                "seed {seed}: {done} bytes were {state}, not {expected}"
            );
        };
        close(prepared.allocated(), ExtentState::Hole);
        close(prepared.converted(), ExtentState::Unwritten);
        close(prepared.unshared(), ExtentState::Shared);
        seen[0] += prepared.allocated();
        seen[1] += prepared.converted();
        seen[2] += prepared.unshared();
        // Who shared blocks keeps his, though they may be his alone now.
        assert!(contents(&other) == shared_bytes, "seed {seed}: the sharer");
        let after_of_sharer = synced(&sharer);
        let places = |map: &BlockMap| -> Vec<_> {
            let alone = |extent: &mapdirect::Extent| match extent.state {
                ExtentState::Shared => ExtentState::Written,
                state => state,
            };
            let range = map.range();
            let extents = map.extents().iter().map(|extent| {
                mapdirect::Extent::new(extent.offset, extent.physical, extent.length, alone(extent))
            });
            BlockMap::new(map.device(), map.block_size(), 0, range, extents)
                .extents()
                .to_vec()
        };
        assert_eq!(places(&after_of_sharer), places(&before_of_sharer));
        // Once more there is nothing to do.
        let again = mapdirect::prepare(&file, range).unwrap();
        let done = again.allocated() + again.converted() + again.unshared();
        assert_eq!(done, 0, "seed {seed}");
        assert_eq!(again.block_map(), prepared.block_map(), "seed {seed}");
    }
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
    assert_eq!(seen[2] > 0, kind.reflink(), "{seen:?}");
    world.count("files of mixed blocks prepared", 40);
    std::fs::remove_file(&path).unwrap();
    std::fs::remove_file(&other).unwrap();
}

fn sizes(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = disk.path("prepare-sizes");
    let block = kind.block();
    for (old, size) in [
        (0, 1),
        (1, 1),
        (1, 2),
        (0, block),
        (100, 3 * block),
        (block + 1, 10 * block - 1),
        (5000, 3 << 20),
        (0, (1 << 20) + 77),
    ] {
        let file = new_file(&path);
        let mut bytes = vec![9; usize::try_from(old).unwrap()];
        file.write_all_at(&bytes, 0).unwrap();
        let options = PrepareOptions::new().size(size);
        let prepared = options.prepare(&file).unwrap();
        assert_stable(&file, &prepared, 0..size, block);
        bytes.resize(usize::try_from(size).unwrap(), 0);
        assert!(contents(&path) == bytes, "{old} to {size}");
    }
    // A range of what is added, and the rest stays a hole.
    let file = new_file(&path);
    file.write_all_at(&[1; 10], 0).unwrap();
    let range = 40 * block + 5..50 * block;
    let options = PrepareOptions::new().size(100 * block).range(range.clone());
    let prepared = options.prepare(&file).unwrap();
    assert_stable(&file, &prepared, range, block);
    assert_eq!(file.metadata().unwrap().len(), 100 * block);
    let middle = mapdirect::block_map(&file, 64 * block..96 * block).unwrap();
    assert_eq!(middle.total(ExtentState::Hole), 32 * block);
    // One byte in the middle of a hole: its block, not its neighbours' pages
    // more than a page holds.
    let file = new_file(&path);
    file.set_len(1 << 20).unwrap();
    let prepared = mapdirect::prepare(&file, 70_000..70_001).unwrap();
    assert_stable(&file, &prepared, 70_000..70_001, block);
    assert_eq!(prepared.allocated(), block);
    let around = mapdirect::block_map(&file, 0..1 << 20).unwrap();
    // A fault makes all of a folio dirty; Linux 6.12 has made one of 16 KiB.
    let folio = if uname::version() < (6, 18) { 65536 } else { 1 };
    let page = mapdirect_sys::mmap::page_size().max(block).max(folio);
    assert!(
        (1 << 20) - around.total(ExtentState::Hole) <= page,
        "{around:?}"
    );
    std::fs::remove_file(&path).unwrap();
}

fn refused(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = written(&disk, "prepare-refused", 10_000);
    let errno = |result: mapdirect::Result<Prepared>, expected: Errno, words: &str| {
        let error = result.unwrap_err();
        assert_eq!(error.errno(), expected.raw_os_error(), "{error:#}");
        let text = format!("{error:#}");
        assert!(text.contains(words), "{text}");
        assert!(text.starts_with("cannot prepare "), "{text}");
        error
    };
    let whole = PrepareOptions::new();
    let for_reading = File::open(&path).unwrap();
    errno(
        whole.prepare(&for_reading),
        Errno::ACCESS,
        "reading and writing",
    );
    let for_writing = File::options().write(true).open(&path).unwrap();
    errno(
        whole.prepare(&for_writing),
        Errno::ACCESS,
        "reading and writing",
    );
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let path_only = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).unwrap();
    errno(whole.prepare(&path_only), Errno::BADF, "O_PATH");
    let file = open(&path);
    let before = synced(&file);
    let range = |range| PrepareOptions::new().range(range);
    errno(range(5..5).prepare(&file), Errno::INVAL, "empty");
    errno(
        range(0..10_001).prepare(&file),
        Errno::INVAL,
        "beyond the end",
    );
    let beyond = range(0..10_002).size(10_001).prepare(&file);
    errno(beyond, Errno::INVAL, "beyond the end of the file at 10001");
    let shorter = PrepareOptions::new().size(9_999).prepare(&file);
    errno(shorter, Errno::INVAL, "never shrinks");
    let largest = PrepareOptions::new().size(u64::MAX).prepare(&file);
    errno(largest, Errno::FBIG, "that large");
    let empty = new_file(&disk.path("prepare-refused.empty"));
    errno(whole.prepare(&empty), Errno::INVAL, "empty");
    let elsewhere = tempfile("/dev/shm/mapdirect-prepare-refused");
    let error = errno(whole.prepare(&elsewhere), Errno::OPNOTSUPP, "tmpfs");
    assert_eq!(error.kind(), Reason::Filesystem);
    let device = File::options().read(true).write(true).open("/dev/zero");
    errno(
        whole.prepare(&device.unwrap()),
        Errno::OPNOTSUPP,
        "regular file",
    );
    assert_eq!(synced(&file), before);
    assert!(contents(&path) == vec![7; 10_000]);
    drop(empty);
    std::fs::remove_file(disk.path("prepare-refused.empty")).unwrap();
    std::fs::remove_file(&path).unwrap();
}

/// A file without a name.
fn tempfile(path: &str) -> File {
    let file = new_file(Path::new(path));
    file.write_all_at(b"x", 0).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

/// Bytes free on the filesystem, once it has come to rest: XFS frees what was
/// deleted by and by.
fn free_space(disk: &Disk) -> u64 {
    let free = || {
        rustix::fs::sync();
        let stat = rustix::fs::statvfs(disk.root()).unwrap();
        stat.f_bfree * stat.f_frsize
    };
    let mut last = free();
    loop {
        std::thread::sleep(Duration::from_millis(50));
        let now = free();
        if now == last {
            return now;
        }
        last = now;
    }
}

/// What is known to be too much is refused before anything is touched.
fn no_space(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = written(&disk, "prepare-no-space", 10_000);
    let file = open(&path);
    let before = (synced(&file), file.metadata().unwrap());
    let options = PrepareOptions::new().size(10 << 30).exclusive(true);
    let error = options.prepare(&file).unwrap_err();
    assert_eq!(error.errno(), Errno::NOSPC.raw_os_error(), "{error:#}");
    assert_eq!(error.kind(), Reason::NoSpace);
    let words: Vec<_> = error.obstacle().split(' ').collect();
    let missing: u64 = words[0].parse().unwrap();
    assert!((9 << 30..10 << 30).contains(&missing), "{error:#}");
    assert!(error.obstacle().contains("are missing"), "{error:#}");
    let after = file.metadata().unwrap();
    assert_eq!(synced(&file), before.0);
    assert_eq!(after.mtime_nsec(), before.1.mtime_nsec(), "it was touched");
    assert_eq!(after.blocks(), before.1.blocks());
    // A file that is not there is not left behind either.
    let new = disk.path("prepare-no-space.new");
    let output = mapdirect(&[text(&new), "--size", "10G"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(complaint(&output).contains("are missing"), "{output:?}");
    assert!(!new.exists());
    std::fs::remove_file(&path).unwrap();
}

/// What turns out to be too much on the way is given back, if that can cost
/// nobody a byte: as many bytes as are free, of which every filesystem keeps
/// some.
fn space_runs_out(_world: &World, kind: Kind) {
    let megabytes = if kind.is_xfs() { 320 } else { 100 };
    let disk = Disk::new(kind, megabytes).unwrap();
    let path = disk.path("file");
    let file = new_file(&path);
    file.write_all_at(&[5; 70_000], 333_333).unwrap();
    fallocate::allocate(file.as_fd(), &(1 << 20..2 << 20)).unwrap();
    file.set_len((2 << 20) + 5).unwrap();
    let before = synced(&file);
    let bytes = contents(&path);
    let free = free_space(&disk);
    // ext4 does not make a tree of extents lower again.
    let grace = if kind.is_xfs() { 0 } else { 2 * kind.block() };
    let assert_as_found = |file: &File| {
        assert_eq!(synced(file), before, "the block map");
        assert!(contents(&path) == bytes, "the bytes");
        let now = free_space(&disk);
        assert!(now + grace >= free, "{} bytes are gone", free - now);
    };
    // All that is free: XFS has something to the last block, ext4 sets some
    // aside for itself.
    let end = before.file_size().next_multiple_of(kind.block());
    let blocks = mapdirect::block_map(&file, 0..end).unwrap();
    let all = end + free - blocks.total(ExtentState::Hole) - 4 * grace;
    let size = all.to_string();
    let full = |output: &Output| {
        let text = complaint(output);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(text.contains("ENOSPC"), "{text}");
        assert!(text.contains("the filesystem is full"), "{text}");
        text
    };
    // Somebody else has it open, and may store to any of it.
    let output = mapdirect(&[text(&path), "--size", &size]).output().unwrap();
    let words = full(&output);
    assert!(words.contains("somebody else has the file open"), "{words}");
    assert!(words.contains("stay allocated"), "{words}");
    assert!(contents(&path) == bytes, "the bytes");
    assert_eq!(file.metadata().unwrap().len(), before.file_size());
    assert!(free_space(&disk) < free / 2);
    restore(&file, &before);
    assert_as_found(&file);
    // Who shares the description is somebody else as well.
    let shared = PrepareOptions::new().size(size.parse().unwrap());
    let error = shared.prepare(&file).unwrap_err();
    assert!(error.obstacle().contains("exclusive"), "{error:#}");
    restore(&file, &before);
    assert_as_found(&file);
    drop(file);
    let output = mapdirect(&[text(&path), "--size", &size]).output().unwrap();
    let words = full(&output);
    assert!(words.contains("is given back"), "{words}");
    assert_as_found(&open(&path));
    // The same in the middle of a file.
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(size.parse().unwrap())
        .unwrap();
    let output = mapdirect(&[text(&path)]).output().unwrap();
    let words = full(&output);
    assert!(words.contains("is given back"), "{words}");
    let file = open(&path);
    assert_eq!(file.metadata().unwrap().len().to_string(), size);
    file.set_len(before.file_size()).unwrap();
    assert_as_found(&file);
    drop(file);
    // Less than all works.
    let size = (all / 2).to_string();
    let output = mapdirect(&[text(&path), "--size", &size]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    disk.unmount().unwrap();
}

/// Makes holes where there were some, and frees what lies beyond the end.
fn restore(file: &File, before: &BlockMap) {
    for extent in before.extents() {
        if extent.state == ExtentState::Hole {
            let end = extent.end().next_multiple_of(before.block_size().into());
            fallocate::punch(file.as_fd(), &(extent.offset..end)).unwrap();
        }
    }
    file.set_len(before.file_size()).unwrap();
}

/// A file with all there is to do: 16 MiB, in pieces.
fn patchwork(path: &Path) -> (File, Vec<u8>) {
    let size = 16 << 20;
    let file = new_file(path);
    file.set_len(size).unwrap();
    let mut bytes = vec![0; usize::try_from(size).unwrap()];
    for (number, piece) in bytes.chunks_mut(100_000).enumerate() {
        let at = number as u64 * 100_000;
        match number % 3 {
            0 => {
                piece.fill(u8::try_from(number % 250).unwrap() + 1);
                file.write_all_at(piece, at).unwrap();
            }
            1 => fallocate::allocate(file.as_fd(), &(at..at + 100_000)).unwrap(),
            _ => {}
        }
    }
    file.set_len(size).unwrap();
    (file, bytes)
}

/// Whoever reads meanwhile sees the same bytes as ever.
fn readers(world: &World, kind: Kind) {
    let path = world.disk(kind).path("prepare-readers");
    let (file, bytes) = patchwork(&path);
    let done = AtomicBool::new(false);
    let rounds = std::thread::scope(|scope| {
        let (path, bytes, done) = (&path, &bytes, &done);
        let reader = scope.spawn(move || {
            let file = File::open(path).unwrap();
            let mut buffer = vec![0; bytes.len()];
            let mut rounds = 0;
            while !done.load(Relaxed) || rounds == 0 {
                file.read_exact_at(&mut buffer, 0).unwrap();
                assert!(buffer == *bytes);
                rounds += 1;
            }
            rounds
        });
        for _ in 0..3 {
            let prepared = PrepareOptions::new().prepare(&file).unwrap();
            assert_stable(&file, &prepared, 0..bytes.len() as u64, kind.block());
            fallocate::punch(file.as_fd(), &(200_000..300_000)).unwrap();
        }
        done.store(true, Relaxed);
        reader.join().unwrap()
    });
    assert!(rounds > 0);
    std::fs::remove_file(&path).unwrap();
}

/// Another process stores at random places, by write and through a mapping,
/// and remembers what. It reads each of its stores back at the end.
pub fn play_writer(arguments: &[String]) -> Result<()> {
    let [path, seed] = arguments else {
        anyhow::bail!("wrong arguments");
    };
    let file = File::options().read(true).write(true).open(path)?;
    let size = usize::try_from(file.metadata()?.len())?;
    let mut expected = vec![0; size];
    file.read_exact_at(&mut expected, 0)?;
    let both = mapdirect_sys::mmap::PROT_READ | mapdirect_sys::mmap::PROT_WRITE;
    let mapping = PlainMap::new(file.as_fd(), both, mapdirect_sys::mmap::MAP_SHARED, 0, size)?;
    let mut random = Random::new(seed.parse()?);
    let stop: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
    std::thread::spawn(move || {
        let _ = listen();
        stop.store(true, Relaxed);
    });
    say("ready");
    let mut stores = 0u64;
    while !stop.load(Relaxed) {
        let at = usize::try_from(random.below(size as u64))?;
        if random.below(2) == 0 {
            expected[at] = random.byte();
            mapping.store(at, expected[at]);
        } else {
            let length = usize::try_from(1 + random.below(9000))?.min(size - at);
            let value = random.byte();
            expected[at..at + length].fill(value);
            file.write_all_at(&expected[at..at + length], at as u64)?;
        }
        stores += 1;
    }
    let mut found = vec![0; size];
    file.read_exact_at(&mut found, 0)?;
    if let Some(at) = (0..size).find(|at| found[*at] != expected[*at]) {
        say(&format!("lost byte {at} of {stores} stores"));
        return Ok(());
    }
    say(&format!("kept {stores}"));
    Ok(())
}

/// Whatever others store meanwhile is there afterwards.
fn writers(world: &World, kind: Kind) {
    let path = world.disk(kind).path("prepare-writers");
    let mut stores = 0;
    for seed in 0..4u64 {
        let file = new_file(&path);
        file.set_len((48 << 20) + 123).unwrap();
        // A writer leaves nothing unwritten that it comes by: it gets a
        // moment, not more.
        let seed = (seed + 1).to_string();
        let mut writer = Helper::start("writer", &[text(&path), &seed]).unwrap();
        assert_eq!(writer.hear().unwrap(), "ready");
        let prepared = PrepareOptions::new()
            .huge(seed == "2")
            .exclusive(true)
            .prepare(&file)
            .unwrap();
        assert_stable(&file, &prepared, 0..(48 << 20) + 123, kind.block());
        writer.tell("stop").unwrap();
        let said = writer.hear().unwrap();
        let kept = said
            .strip_prefix("kept ")
            .unwrap_or_else(|| panic!("{said}"));
        stores += kept.parse::<u64>().unwrap();
        assert_eq!(writer.finish().unwrap(), Some(0));
        // It is as they left it, and as stable.
        let after = mapdirect::block_map(&file, 0..48 << 20).unwrap();
        assert!(after.is_stable(), "{after:?}");
    }
    assert!(stores > 100, "only {stores}");
    world.count("stores by others while a file was prepared", stores);
    std::fs::remove_file(&path).unwrap();
}

/// Killed at any moment it leaves every byte, and can go on.
fn killed(world: &World, kind: Kind) {
    let path = world.disk(kind).path("prepare-killed");
    let mut random = Random::new(9);
    let mut in_the_middle = 0;
    let whole = Duration::from_millis(80);
    for _ in 0..15 {
        let (file, mut bytes) = patchwork(&path);
        drop(file);
        let size = bytes.len() + 9_999_999;
        let mut child = mapdirect(&[text(&path), "--size", &size.to_string()])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let wait = random.below(u64::try_from(whole.as_micros()).unwrap());
        std::thread::sleep(Duration::from_micros(wait));
        child.kill().unwrap();
        in_the_middle += u32::from(!child.wait().unwrap().success());
        let now = contents(&path);
        assert!(
            now.len() == bytes.len() || now.len() == size,
            "{}",
            now.len()
        );
        assert!(now[..bytes.len()] == bytes, "bytes changed");
        assert!(now[bytes.len()..].iter().all(|byte| *byte == 0));
        let file = open(&path);
        let prepared = PrepareOptions::new()
            .size(size as u64)
            .prepare(&file)
            .unwrap();
        assert_stable(&file, &prepared, 0..size as u64, kind.block());
        bytes.resize(size, 0);
        assert!(contents(&path) == bytes, "bytes changed");
    }
    assert!(in_the_middle > 0, "it was always done before");
    world.count("preparations killed", in_the_middle.into());
    std::fs::remove_file(&path).unwrap();
}

/// Counts huge pieces one by one, by another way than the library does.
fn aligned(map: &BlockMap) -> (u64, u64) {
    let range = map.range();
    let (mut pieces, mut good) = (0, 0);
    let mut at = range.start.next_multiple_of(HUGE);
    while at + HUGE <= range.end {
        pieces += 1;
        let extent = map.find(at).unwrap();
        let physical = extent.physical.unwrap() + at - extent.offset;
        good += u64::from(extent.end() >= at + HUGE && physical.is_multiple_of(HUGE));
        at += HUGE;
    }
    (pieces, good)
}

fn assert_huge(prepared: &Prepared, at_least: u64) {
    let HugePieces {
        pieces,
        aligned: good,
        ..
    } = prepared.huge_pieces();
    assert_eq!((pieces, good), aligned(prepared.block_map()));
    assert!(
        good * 100 >= pieces * at_least,
        "{good} of {pieces}: {:?}",
        prepared.block_map().extents()
    );
}

/// New blocks lie where huge pages can map them, and nothing but them is
/// left: no hint, no other file, no block.
fn huge(_world: &World, kind: Kind) {
    let disk = Disk::new(kind, 700).unwrap();
    let names = || std::fs::read_dir(disk.root()).unwrap().count();
    let there = names();
    let free = free_space(&disk);
    let path = disk.path("file");
    // ext4 begins to count blocks of 1 KiB at the second: what it aligns is
    // one off, always.
    let at_least = if kind == EXT4_1K { 0 } else { 95 };
    let file = new_file(&path);
    let options = PrepareOptions::new().size(300 << 20).huge(true);
    let prepared = options.prepare(&file).unwrap();
    assert_stable(&file, &prepared, 0..300 << 20, kind.block());
    assert_eq!(prepared.huge_pieces().pieces, 150);
    assert_huge(&prepared, at_least);
    assert_eq!(names(), there + 1);
    let extended = inode_flags::extended(file.as_fd()).unwrap();
    assert_eq!(extended.flags & inode_flags::XFLAG_EXTSIZE, 0);
    assert_eq!(extended.extent_size, 0);
    let used = free - free_space(&disk);
    assert!(used < (300 << 20) + (1 << 20), "{used} bytes are used");
    drop(file);
    std::fs::remove_file(&path).unwrap();
    // A range that begins and ends anywhere.
    let file = new_file(&path);
    file.set_len(200 << 20).unwrap();
    let range = 12_345..(100 << 20) + 1;
    let options = PrepareOptions::new().range(range.clone()).huge(true);
    let prepared = options.prepare(&file).unwrap();
    assert_stable(&file, &prepared, range, kind.block());
    assert_eq!(prepared.huge_pieces().pieces, 49);
    assert_huge(&prepared, at_least);
    drop(file);
    // Where nearly all is needed it does not fail for the sake of alignment.
    std::fs::remove_file(&path).unwrap();
    let file = new_file(&path);
    let aside = if kind.is_xfs() { 1 << 20 } else { 20 << 20 };
    let size = free_space(&disk) - aside;
    let options = PrepareOptions::new().size(size).huge(true);
    let prepared = options.prepare(&file).unwrap();
    assert_stable(&file, &prepared, 0..size, kind.block());
    drop(file);
    disk.unmount().unwrap();
}

/// Beside blocks that are there already, which XFS likes to go on from.
fn huge_beside_data(_world: &World, kind: Kind) {
    let disk = Disk::new(kind, 512).unwrap();
    let path = written(&disk, "file", 1_234_567);
    let file = open(&path);
    let options = PrepareOptions::new().size(200 << 20).huge(true);
    let prepared = options.prepare(&file).unwrap();
    assert_stable(&file, &prepared, 0..200 << 20, kind.block());
    // The first piece has blocks already.
    assert_huge(&prepared, 90);
    assert!(contents(&path)[..1_234_567].iter().all(|byte| *byte == 7));
    drop(file);
    disk.unmount().unwrap();
}

/// Others truncate it: it says so, never makes longer what they made shorter,
/// and does not die of it.
fn truncated(world: &World, kind: Kind) {
    let path = world.disk(kind).path("prepare-truncated");
    let file = new_file(&path);
    let still_changing = |error: &mapdirect::Error| {
        assert_eq!(error.errno(), Errno::TXTBSY.raw_os_error(), "{error:#}");
        assert_eq!(error.kind(), Reason::StillChanging, "{error:#}");
    };
    // At the worst moments: before anything is done, and after every step.
    for step in 0..3 {
        file.set_len(0).unwrap();
        file.set_len(80 << 20).unwrap();
        let mut steps = 0;
        let error = PrepareOptions::new()
            .prepare_with(&file, |_| {
                if steps == step {
                    file.set_len(70 << 20).unwrap();
                }
                steps += 1;
            })
            .unwrap_err();
        still_changing(&error);
        assert!(error.obstacle().contains("truncated"), "{error:#}");
        assert_eq!(file.metadata().unwrap().len(), 70 << 20, "step {step}");
    }
    // Behind the range it is nobody's business.
    let options = PrepareOptions::new().range(0..70 << 20);
    file.set_len(80 << 20).unwrap();
    fallocate::punch(file.as_fd(), &(0..1 << 20)).unwrap();
    let shorten = |_| file.set_len(70 << 20).unwrap();
    let prepared = options.prepare_with(&file, shorten).unwrap();
    assert_stable(&file, &prepared, 0..70 << 20, kind.block());
    assert_eq!(file.metadata().unwrap().len(), 70 << 20);
    // At any moment.
    let script = "while :; do truncate -s 3000000 \"$0\"; truncate -s 9000000 \"$0\"; done";
    let mut command = Command::new("sh");
    let _loop = Background::spawn(command.args(["-c", script]).arg(&path)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(1);
    while Instant::now() < deadline {
        match PrepareOptions::new().range(0..9_000_000).prepare(&file) {
            Ok(_) => {}
            Err(error) if error.errno() == Errno::INVAL.raw_os_error() => {
                assert!(error.obstacle().contains("beyond the end"), "{error:#}");
            }
            Err(error) => still_changing(&error),
        }
    }
    std::fs::remove_file(&path).unwrap();
}

/// Others make it longer while it is made longer: it is as long as the
/// longest, and has what they stored.
fn extended(world: &World, kind: Kind) {
    let path = world.disk(kind).path("prepare-extended");
    for step in 0..2 {
        let file = new_file(&path);
        file.write_all_at(&[1; 1000], 0).unwrap();
        let mut steps = 0;
        let prepared = PrepareOptions::new()
            .size(3 << 20)
            .exclusive(true)
            .prepare_with(&file, |_| {
                if steps == step {
                    file.write_all_at(b"appended", 5 << 20).unwrap();
                }
                steps += 1;
            })
            .unwrap();
        assert!(steps > step);
        assert_stable(&file, &prepared, 0..3 << 20, kind.block());
        let bytes = contents(&path);
        assert_eq!(bytes.len(), (5 << 20) + 8);
        assert_eq!(&bytes[5 << 20..], b"appended");
    }
    std::fs::remove_file(&path).unwrap();
}

/// Others share it anew.
fn cloned(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = written(&disk, "prepare-cloned", 3 << 20);
    let other = disk.path("prepare-cloned.sharer");
    let (file, sharer) = (open(&path), new_file(&other));
    let share = |_| clone_range(sharer.as_fd(), file.as_fd(), 0, 0, 0).unwrap();
    clone_range(sharer.as_fd(), file.as_fd(), 0, 0, 0).unwrap();
    let error = PrepareOptions::new()
        .prepare_with(&file, share)
        .unwrap_err();
    assert_eq!(error.errno(), Errno::TXTBSY.raw_os_error(), "{error:#}");
    assert_eq!(error.kind(), Reason::StillChanging);
    let expected = "3145728 bytes at 0 are shared again";
    assert!(error.obstacle().contains(expected), "{error:#}");
    // All the time, whenever the kernel lets them.
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Relaxed) {
                clone_range(sharer.as_fd(), file.as_fd(), 0, 0, 0).unwrap();
            }
        });
        for _ in 0..100 {
            if let Err(error) = PrepareOptions::new().prepare(&file) {
                assert!(error.obstacle().contains(expected), "{error:#}");
            }
        }
        done.store(true, Relaxed);
    });
    assert!(contents(&path) == vec![7; 3 << 20]);
    assert!(contents(&other) == vec![7; 3 << 20]);
    let prepared = PrepareOptions::new().prepare(&file).unwrap();
    assert_stable(&file, &prepared, 0..3 << 20, kind.block());
    std::fs::remove_file(&path).unwrap();
    std::fs::remove_file(&other).unwrap();
}

/// What it is for: all of the file can be mapped.
fn then_mapped(world: &World, kind: Kind) {
    let path = world.disk(kind).path("prepare-mapped");
    let guard = world.guard().client();
    let file = new_file(&path);
    let prepared = PrepareOptions::new().size(3 << 20).prepare(&file).unwrap();
    let held = map(&guard, &file, 0..3 << 20);
    assert_eq!(held.block_map().extents(), prepared.block_map().extents());
    for at in (0..3 << 20).step_by(65536) {
        held.write_all_at(b"here it stays", at).unwrap();
    }
    held.persist(0..3 << 20).unwrap();
    let now = synced(&file);
    assert_eq!(now.extents(), held.block_map().extents());
    drop((held, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// A pin keeps its blocks as they are from this, too, and only its own.
fn pinned(world: &World, kind: Kind) {
    let path = world.disk(kind).path("prepare-pinned");
    let guard = world.guard().client();
    let file = new_file(&path);
    file.write_all_at(&[6; 65536], 0).unwrap();
    file.set_len(32 << 20).unwrap();
    let held = pin(&guard, &file, 0..4 << 20);
    let output = mapdirect(&[text(&path)]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = complaint(&output);
    let refused = match Gate::under_test() {
        // It may not open it,
        Gate::Fanotify => "Text file busy",
        // or not allocate in it.
        Gate::Bpf => "ETXTBSY",
    };
    assert!(said.contains(refused), "{output:?}");
    let error = PrepareOptions::new().prepare(&file).unwrap_err();
    assert_eq!(error.errno(), Errno::TXTBSY.raw_os_error(), "{error:#}");
    assert_eq!(error.kind(), Reason::FrozenBlocks, "{error:#}");
    assert!(error.obstacle().contains("a pin"), "{error:#}");
    match mapdirect::prepare(&file, 16 << 20..20 << 20) {
        Ok(prepared) => assert!(prepared.block_map().is_stable()),
        // It takes a mapping, which mremap(2) could grow over the hole.
        Err(error) => {
            assert_eq!(Gate::under_test(), Gate::Bpf, "{error:#}");
            assert_eq!(error.errno(), Errno::TXTBSY.raw_os_error(), "{error:#}");
        }
    }
    let now = mapdirect::block_map(&file, 0..4 << 20).unwrap();
    assert_eq!(now.extents(), held.extents());
    drop(held);
    drop(file);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// Behind the gate, which stays closed for a while after a pin: a lease would
/// keep the guard waiting for us, and us for the guard.
fn watched(world: &World, kind: Kind) {
    let disk = Disk::new(kind, if kind.is_xfs() { 320 } else { 100 }).unwrap();
    let guard = world.guard().client();
    let path = written(&disk, "file", 65536);
    let other = written(&disk, "other", 65536);
    let mut watched = 0;
    for _ in 0..20 {
        let began = Instant::now();
        let file = open(&path);
        drop(pin(&guard, &file, 0..65536));
        let stat = rustix::fs::statvfs(disk.root()).unwrap();
        let size = stat.f_bfree * stat.f_frsize + 65536 - 16 * kind.block();
        let options = PrepareOptions::new().size(size).exclusive(true);
        let result = options.prepare_with(&file, |_| {
            // Half of what was free when it began is not any more.
            let stat = rustix::fs::statvfs(disk.root()).unwrap();
            let half = 65536..stat.f_bfree * stat.f_frsize / 2;
            fallocate::allocate(open(&other).as_fd(), &half).unwrap();
        });
        let error = result.unwrap_err();
        assert_eq!(error.errno(), Errno::NOSPC.raw_os_error(), "{error:#}");
        // Or it is being looked at this very moment.
        watched += u32::from(error.obstacle().contains("watches the file"));
        assert_eq!(file.metadata().unwrap().len(), 65536);
        drop(file);
        wait_until_free(&path);
        open(&path).set_len(65536).unwrap();
        open(&other).set_len(65536).unwrap();
        assert!(began.elapsed() < Duration::from_secs(10), "it stood still");
        free_space(&disk);
    }
    assert!(watched > 0, "nobody watched");
    disk.unmount().unwrap();
}

/// It takes nothing but a descriptor: also to give back, from a file of
/// one's own.
fn unprivileged(_world: &World, kind: Kind) {
    const NOBODY: u32 = 65534;
    let disk = Disk::new(kind, 320).unwrap();
    // The binary may lie where only root can go.
    let binary = disk.path("mapdirect");
    std::fs::copy(BINARY, &binary).unwrap();
    std::fs::set_permissions(&binary, PermissionsExt::from_mode(0o755)).unwrap();
    let path = disk.path("file");
    drop(new_file(&path));
    std::os::unix::fs::chown(&path, Some(NOBODY), Some(NOBODY)).unwrap();
    let prepare = |size: u64| {
        Command::new(&binary)
            .args([
                "prepare",
                text(&path),
                "--size",
                &size.to_string(),
                "--huge",
            ])
            .current_dir("/")
            .uid(NOBODY)
            .gid(NOBODY)
            .output()
            .unwrap()
    };
    let output = prepare(5_000_000);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let file = open(&path);
    assert!(synced(&file).is_stable());
    drop(file);
    let free = free_space(&disk);
    let all = rustix::fs::statvfs(disk.root()).unwrap();
    let available = all.f_bavail * all.f_frsize;
    if !kind.is_xfs() {
        // What ext4 sets aside is not for everybody.
        assert!(available < free);
        let output = prepare(free);
        assert!(complaint(&output).contains("are missing"), "{output:?}");
    } else {
        let output = prepare(available + 5_000_000 - 16_384);
        let words = complaint(&output);
        assert_eq!(output.status.code(), Some(1), "{words}");
        assert!(words.contains("is given back"), "{words}");
        let file = open(&path);
        assert_eq!(file.metadata().unwrap().len(), 5_000_000);
    }
    assert_eq!(free_space(&disk), free);
    std::fs::remove_file(&binary).unwrap();
    disk.unmount().unwrap();
}

/// A file without a name, and without a directory to put others beside it.
fn unlinked(world: &World, kind: Kind) {
    let path = world.disk(kind).path("prepare-unlinked");
    let file = tempfile(text(&path));
    let options = PrepareOptions::new().size(20 << 20).huge(true);
    let prepared = options.prepare(&file).unwrap();
    assert_stable(&file, &prepared, 0..20 << 20, kind.block());
    assert!(!path.exists());
}

fn command_line(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = disk.path("prepare-command-line");
    let name = text(&path);
    for arguments in [
        &[][..],
        &[name, "--size", "nonsense"],
        &[name, "--size", "4X"],
        &[name, "--range", "0:0"],
        &[name, "--no-such-option"],
        &[name, "beside", "it"],
    ] {
        let output = mapdirect(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        assert_eq!(complaint(&output).lines().count(), 1, "{output:?}");
    }
    let missing = mapdirect(&[name]).output().unwrap();
    assert_eq!(missing.status.code(), Some(1));
    assert!(complaint(&missing).contains("--size"), "{missing:?}");
    assert!(!path.exists());
    let wrong = mapdirect(&[name, "--size", "1M", "--range", "0:2M"]);
    let output = { wrong }.output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(!path.exists(), "what was made for nothing is gone");
    let limited = format!("ulimit -f 100; exec \"$0\" prepare {name} --size 1M");
    let output = Command::new("sh").args(["-c", &limited, BINARY]).output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(1), "no signal: {output:?}");
    assert!(complaint(&output).contains("ulimit"), "{output:?}");
    assert!(!path.exists());
    let output = mapdirect(&[name, "--size", "3M", "--json"])
        .output()
        .unwrap();
    assert_eq!(complaint(&output), "");
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["file"], name);
    assert_eq!(value["created"], true);
    assert_eq!(value["file_size"], 3 << 20);
    assert_eq!(value["allocated"], 3 << 20);
    assert_eq!(value["stable"], true);
    assert_eq!(value["huge_pieces"]["pieces"], 1);
    let extents = value["extents"].as_array().unwrap();
    assert!(extents.iter().all(|extent| extent["state"] == "written"));
    // A picture for a person, nothing on stderr where nobody looks.
    let output = mapdirect(&[name, "--size", "4M", "--range", "1M:2M", "--huge"]).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(complaint(&output), "");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        said.contains("bytes 1048576 to 3145728 are stable"),
        "{said}"
    );
    assert!(said.contains("from 3145728 to 4194304 bytes"), "{said}");
    assert!(said.contains("█ written"), "{said}");
    assert!(said.contains("pieces of 2 MiB"), "{said}");
    // On a terminal there is a bar.
    let command = format!("{BINARY} prepare {name} --size 100M");
    let output = Command::new("script")
        .args(["-q", "-e", "-c", &command, "/dev/null"])
        .stdin(Stdio::null())
        .env("TERM", "xterm")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("of 97.00 MiB"), "{said}");
    assert!(said.contains("MiB allocated"), "{said}");
    for strange in ["/dev/null", "/", "/proc/self/maps", "/dev/shm"] {
        let output = mapdirect(&[strange]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{strange}: {output:?}");
    }
    run(Command::new("chattr").args(["+a", name])).unwrap();
    let output = mapdirect(&[name, "--size", "101M"]).output().unwrap();
    run(Command::new("chattr").args(["-a", name])).unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    std::fs::remove_file(&path).unwrap();
}
