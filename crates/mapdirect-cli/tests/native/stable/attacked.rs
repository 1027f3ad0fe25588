//! What no gate refuses, guards that die, and who asks for what.

use super::{end, follow, told_by_status, truncate, wait_until_held};
use crate::killed::wait_for_next;
use crate::world::{
    BINARY, OnKind, World, is_emulated, kinds, open, patience, wait_until_free, written,
};
use libtest_mimic::Trial;
use mapdirect::{ExtentState, Integrity, PinOptions, State};
use mapdirect_sys::Errno;
use mapdirect_sys::signal::{Signal, kill};
use mapdirect_testkit::attack::clone_range;
use mapdirect_testkit::contract::{Gate, Subject};
use mapdirect_testkit::process::{GuardProcess, wait_for};
use mapdirect_testkit::{Disk, Kind};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

pub fn trials(world: &World) -> Vec<Trial> {
    let all = kinds(&[Kind::XFS, Kind::EXT4]);
    if Gate::under_test() == Gate::Fanotify {
        // The other gate refuses what the test does.
        let mut trials = world.trials("stable", &all, &[("breach", breach)]);
        let copies = ("copies-left-behind", copies_left_behind as OnKind);
        trials.extend(world.trials("stable", &kinds(&[Kind::XFS]), &[copies]));
        return trials;
    }
    let xfs = kinds(&[Kind::XFS]);
    let mut trials = world.trials(
        "stable",
        &xfs,
        &[("granted-beside-changes", granted_beside_changes)],
    );
    trials.push(world.trial("gate::before-xfs", before_xfs));
    trials
}

/// Those of the bpf gate.
pub const TESTS: [(&str, OnKind); 2] = [
    ("stable-adopted", killed_and_adopted),
    ("stable-ends-for-good", ends_for_good),
];

/// A held block that moves is a breach, also one that was filled under the pin.
fn breach(world: &World, kind: Kind) {
    let guard = world.guard();
    let subject = Subject::new(&world.disk(kind), "stable-breach", false);
    let file = open(&subject.path);
    // What is moved later was a hole when it was pinned.
    let (at, length) = (18 * kind.block(), kind.block());
    super::punch(&file, at, length).unwrap();
    file.sync_all().unwrap();
    let mut pin = follow(&guard.client(), &file, 0);
    let before = pin.block_map().total(ExtentState::Written);
    file.write_all_at(&vec![7; usize::try_from(length).unwrap()], at)
        .unwrap();
    file.sync_all().unwrap();
    wait_until_held(&mut pin, before + length);
    assert!(pin.integrity().is_intact());
    if let Err(errno) = subject.move_blocks(kind, &file) {
        assert!(kind.is_dax(), "{errno}");
        world.unavailable(format!("moving blocks on {kind}: {errno}"));
        return;
    }
    let found = wait_for(patience(), || {
        let status = guard.client().status().unwrap();
        let mut breaches = status.breaches.into_iter();
        Ok(breaches.find(|breach| breach.pin == pin.pin_id()))
    })
    .unwrap();
    assert!(
        found.range.start <= at && found.range.end >= at + length,
        "{found:?}"
    );
    wait_for(patience(), || {
        Ok((!pin.integrity().is_intact()).then_some(()))
    })
    .unwrap();
}

/// XFS sets blocks aside for the neighbours of a shared block that is copied, and
/// shows them to nobody. Whoever comes later, a guard or a pin, does not take those
/// neighbours for held: they move with the next write to them.
fn copies_left_behind(_: &World, kind: Kind) {
    const BLOCK: u64 = 4096;
    // Pins of other tests would have it all freed.
    let disk = Disk::new(kind, 512).unwrap();
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&disk, "stable-copied", 1 << 20);
    let file = open(&path);
    let sharer = File::create(disk.path("stable-copied-sharer")).unwrap();
    let store = |block: u64| {
        file.write_all_at(&[9; 4096], block * BLOCK).unwrap();
        file.sync_all().unwrap();
    };
    let place = |block: u64| {
        let bytes = block * BLOCK..(block + 1) * BLOCK;
        let map = mapdirect::block_map(&file, bytes).unwrap();
        map.extents()[0].physical.unwrap()
    };
    let moves = |block: u64| {
        let before = place(block);
        store(block);
        place(block) != before
    };
    for block in [40, 104, 168] {
        let at = block * BLOCK;
        clone_range(sharer.as_fd(), file.as_fd(), at, BLOCK, at).unwrap();
    }
    sharer.sync_all().unwrap();
    let pin = follow(&guard.client(), &file, 0);
    [40, 104, 168].into_iter().for_each(store);
    // Not even the one pin that was there from the start holds them.
    assert!(moves(41), "nothing was set aside");
    let before = guard.worker().unwrap();
    kill(before, Signal::KILL).unwrap();
    wait_for_next(&guard, before, patience());
    assert!(moves(42), "nothing was set aside any more");
    let other = follow(&guard.client(), &file, 0);
    [105, 106].into_iter().for_each(store);
    std::thread::sleep(Duration::from_millis(700));
    for pin in [&pin, &other] {
        assert_eq!(pin.integrity(), Integrity::Intact);
        assert_eq!(pin.state(), State::Kept);
    }
    drop((pin, other));
    // A pin of strength all has the blocks freed that would be taken for its own.
    let strict = PinOptions::new()
        .range(160 * BLOCK..176 * BLOCK)
        .patience(patience())
        .guard(guard.client())
        .pin(&file)
        .unwrap();
    for block in [167, 169, 170] {
        assert!(!moves(block), "{block} has moved");
    }
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(strict.integrity(), Integrity::Intact);
    drop((strict, file));
    wait_until_free(&path);
}

/// The tripwire looks at a file while it is being pinned, because somebody
/// changes it all the time. What is only then found out of it is no breach.
fn granted_beside_changes(world: &World, kind: Kind) {
    let rounds = if is_emulated() { 15 } else { 200 };
    let guard = world.guard();
    let disk = world.disk(kind);
    let (block, path) = (kind.block(), disk.path("stable-granted"));
    let file = open(&written(
        &disk,
        "stable-granted",
        64 * usize::try_from(block).unwrap(),
    ));
    let sharer = File::create(disk.path("stable-granted-sharer")).unwrap();
    // The blocks beside it are not held; they were shared as well.
    clone_range(sharer.as_fd(), file.as_fd(), 24 * block, block, 24 * block).unwrap();
    let stopped = AtomicBool::new(false);
    let pins = std::thread::scope(|scope| {
        let change = || {
            let (file, bytes) = (open(&path), vec![7; usize::try_from(block).unwrap()]);
            let mut changes = 0u32;
            while !stopped.load(SeqCst) {
                // Refused as soon as somebody has a pin.
                if super::punch(&file, 40 * block, block).is_ok() {
                    file.write_all_at(&bytes, 40 * block).unwrap();
                    file.sync_data().unwrap();
                    changes += 1;
                }
            }
            changes
        };
        let pin = || {
            let mut pins = Vec::new();
            for _ in 0..rounds {
                let file = open(&path);
                let pin = follow(&guard.client(), &file, 0);
                std::thread::sleep(Duration::from_millis(20));
                assert_eq!(pin.integrity(), Integrity::Intact);
                pins.push(pin.pin_id());
                drop((pin, file));
                wait_until_free(&path);
            }
            pins
        };
        let changer = scope.spawn(change);
        let pinner = scope.spawn(pin);
        let pins = pinner.join();
        stopped.store(true, SeqCst);
        assert!(changer.join().unwrap() >= rounds / 2);
        pins.unwrap()
    });
    let breaches = guard.client().status().unwrap().breaches;
    assert!(
        !breaches.iter().any(|breach| pins.contains(&breach.pin)),
        "{breaches:#?}"
    );
    world.count("pins granted while the tripwire looked", pins.len() as u64);
}

/// A guard that was there before the module of the filesystem knows as much of
/// it as one that comes later, and so does the one that takes over from it.
fn before_xfs(world: &World) {
    const BLOCK: u64 = 4096;
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    if mounts.lines().any(|line| line.contains(" xfs ")) {
        world.unavailable(String::from("a kernel whose XFS nobody uses"));
        return;
    }
    if Path::new("/sys/module/xfs").exists() {
        let removed = Command::new("modprobe").args(["-r", "xfs"]).output();
        let removed = removed.unwrap();
        assert!(removed.status.success(), "{removed:?}");
    }
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let disk = Disk::new(Kind::XFS, 512).unwrap();
    let plain = written(&disk, "plain", 1 << 20);
    let path = written(&disk, "shared", 1 << 20);
    let file = open(&path);
    let sharer = File::create(disk.path("sharer")).unwrap();
    let (at, end) = (100 * BLOCK, 1 << 20);
    clone_range(sharer.as_fd(), file.as_fd(), at, BLOCK, at).unwrap();
    // Its copy leaves blocks set aside for the neighbours.
    file.write_all_at(&[9; 100], at).unwrap();
    file.sync_all().unwrap();
    let pin = follow(&guard.client(), &file, 0);
    assert_eq!(pin.block_map().total(ExtentState::Written), end);
    let whole = open(&plain);
    let other = follow(&guard.client(), &whole, 0);
    assert_eq!(other.block_map().total(ExtentState::Written), end);
    assert_eq!(truncate(&file, end - 1), Err(Errno::TXTBSY));
    guard.kill().unwrap();
    guard.start_again(Path::new(BINARY)).unwrap();
    for pin in [&pin, &other] {
        wait_for(
            patience(),
            || Ok((pin.state() == State::Kept).then_some(())),
        )
        .unwrap();
        assert_eq!(told_by_status(&guard, pin.pin_id()), end);
        assert_eq!(pin.integrity(), Integrity::Intact);
    }
    world.count("filesystems that came after the guard", 1);
    drop((pin, other, file, whole, sharer));
    wait_until_free(&path);
    wait_until_free(&plain);
}

/// A guard that comes later goes on with what an earlier one has left: what
/// was filled meanwhile is held, and the file is followed.
fn killed_and_adopted(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "stable-adopted", 65536);
    let file = open(&path);
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let mut pin = follow(&guard.client(), &file, 0);
    guard.kill().unwrap();
    file.write_all_at(&[1; 8192], 65536).unwrap();
    assert_eq!(truncate(&file, 65536), Err(Errno::TXTBSY));
    file.sync_all().unwrap();
    guard.start_again(Path::new(BINARY)).unwrap();
    wait_for(
        patience(),
        || Ok((pin.state() == State::Kept).then_some(())),
    )
    .unwrap();
    assert_eq!(told_by_status(&guard, pin.pin_id()), 65536 + 8192);
    file.write_all_at(&[1; 8192], 65536 + 8192).unwrap();
    assert_eq!(truncate(&file, 65536 + 8192), Err(Errno::TXTBSY));
    file.sync_all().unwrap();
    wait_until_held(&mut pin, 65536 + 16_384);
    drop(file);
    end(pin, &path);
}

/// What has ended is not taken up again by mmap(2), where a store to a hole
/// would have to fault.
fn ends_for_good(world: &World, kind: Kind) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(kind), "stable-ends", 65536);
    let file = open(&path);
    let pin = follow(&guard.client(), &file, 0);
    let direct = mapdirect_testkit::raw::map_direct_once;
    assert_eq!(
        direct(std::os::fd::AsFd::as_fd(&file)),
        Err(Errno::OPNOTSUPP)
    );
    drop(pin);
    wait_for(Duration::from_secs(5), || Ok(truncate(&file, 4096).ok())).unwrap();
    assert_eq!(
        direct(std::os::fd::AsFd::as_fd(&file)),
        Err(Errno::OPNOTSUPP)
    );
    std::fs::remove_file(&path).unwrap();
}
