//! Pins of strength stable: what is stable is held, from the moment it becomes
//! so, and everything else goes on as if nothing were pinned.

pub mod attacked;
mod contract;
pub mod hammer;
mod tools;

use crate::world::{World, kinds, open, patience, wait_until_free, written};
use libtest_mimic::Trial;
use mapdirect::{BlockMap, ExtentState, Guard, Kind as Reason, MapOptions, Pin, PinOptions};
use mapdirect::{Scope, Strength};
use mapdirect_sys::Errno;
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::fault::{Access, load};
use mapdirect_testkit::process::{GuardProcess, wait_for};
use mapdirect_testkit::{Kind, raw};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

pub fn trials(world: &World) -> Vec<Trial> {
    let all = kinds(&[Kind::XFS, Kind::EXT4]);
    let mut trials = world.trials(
        "stable",
        &all,
        &[
            ("follows-growth", follows_growth),
            ("holds-what-is-filled", holds_what_is_filled),
            ("maps-what-is-not-there-yet", maps_what_is_not_there_yet),
            ("as-a-database-does", as_a_database_does),
            ("shared-blocks", shared_blocks),
            ("scopes-and-arguments", scopes_and_arguments),
            ("grows-quietly", grows_quietly),
            ("gives-way", gives_way),
            ("gives-way-to-nobody-else", gives_way_to_nobody_else),
        ],
    );
    trials.extend(attacked::trials(world));
    trials.extend(contract::trials(world));
    trials.extend(hammer::trials(world));
    trials.extend(tools::trials(world));
    trials
}

/// How a pin of strength stable is asked for.
fn options(guard: &Guard) -> PinOptions {
    PinOptions::new()
        .strength(Strength::Stable)
        .patience(patience())
        .guard(guard.clone())
}

/// Pins from a byte on, without an end.
fn follow(guard: &Guard, file: &File, start: u64) -> Pin {
    options(guard).range_from(start).pin(file).unwrap()
}

fn punch(file: &File, offset: u64, length: u64) -> Result<(), Errno> {
    raw::fallocate(file.as_fd(), 3, offset, length)
}

fn truncate(file: &File, size: u64) -> Result<(), Errno> {
    rustix::fs::ftruncate(file, size)
}

/// Waits until a pin holds so many bytes, and tells which.
fn wait_until_held(pin: &mut Pin, bytes: u64) -> BlockMap {
    wait_for(patience(), || {
        pin.refresh().unwrap();
        let map = pin.block_map();
        Ok((map.total(ExtentState::Written) == bytes).then(|| map.clone()))
    })
    .unwrap_or_else(|_| panic!("{bytes} bytes shall be held: {:#?}", pin.block_map()))
}

/// The bytes that the guard says a pin holds.
fn told_by_status(guard: &GuardProcess, pin: u64) -> u64 {
    let status = guard.client().status().unwrap();
    let mut pins = status.files.iter().flat_map(|file| &file.pins);
    let found = pins.find(|found| found.pin == pin).unwrap();
    assert_eq!(found.flags.strength(), Strength::Stable);
    assert_eq!((found.frozen, found.breaches), (0, 0));
    found.stable
}

fn end(pin: Pin, path: &Path) {
    assert!(pin.integrity().is_intact() && pin.state().is_kept());
    drop(pin);
    wait_until_free(path);
    std::fs::remove_file(path).unwrap();
}

/// What is appended is held: the file does not get shorter any more, not even
/// to the size that it had when it was pinned.
fn follows_growth(world: &World, kind: Kind) {
    const HALF: u64 = 1 << 19;
    let guard = world.guard();
    let path = written(&world.disk(kind), "stable-grows", 1 << 19);
    let file = open(&path);
    let mut pin = follow(&guard.client(), &file, 0);
    assert_eq!(pin.range(), 0..u64::MAX);
    assert_eq!(pin.block_map().total(ExtentState::Written), HALF);
    assert_eq!(truncate(&file, HALF - 1), Err(Errno::TXTBSY));
    assert_eq!(truncate(&file, HALF), Ok(()));
    // Appended, and held at once: nothing has told the guard yet.
    file.write_all_at(&[8; 5000], HALF).unwrap();
    for size in [0, HALF, HALF + 1, HALF + 4999] {
        assert_eq!(truncate(&file, size), Err(Errno::TXTBSY), "{size}");
    }
    assert_eq!(truncate(&file, HALF + 5000), Ok(()));
    // A larger file by truncation is no shorter file either.
    assert_eq!(truncate(&file, 2 << 20), Ok(()));
    assert_eq!(truncate(&file, 1 << 20), Err(Errno::TXTBSY));
    assert_eq!(raw::fallocate(file.as_fd(), 0, 2 << 20, HALF), Ok(()));
    assert_eq!(truncate(&file, 2 << 20), Err(Errno::TXTBSY));
    assert_eq!(file.metadata().unwrap().len(), (2 << 20) + HALF);
    file.sync_all().unwrap();
    let map = wait_until_held(&mut pin, HALF + 2 * 4096);
    assert_eq!(map.file_size(), (2 << 20) + HALF);
    assert_eq!(told_by_status(&guard, pin.pin_id()), HALF + 2 * 4096);
    assert_eq!(punch(&file, HALF, 4096), Err(Errno::TXTBSY));
    drop(file);
    end(pin, &path);
}

/// Holes and unwritten blocks may be filled; what fills them is held from that
/// moment on, and told.
fn holds_what_is_filled(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = written(&world.disk(kind), "stable-filled", 1 << 20);
    let file = open(&path);
    punch(&file, 65536, 65536).unwrap();
    punch(&file, 262_144, 65536).unwrap();
    raw::fallocate(file.as_fd(), 0, 262_144, 65536).unwrap();
    file.sync_all().unwrap();
    let mut pin = options(&guard.client())
        .range(0..524_288)
        .pin(&file)
        .unwrap();
    let before = pin.block_map().clone();
    assert_eq!(before.total(ExtentState::Written), 524_288 - 131_072);
    assert_eq!(before.total(ExtentState::Hole), 65536);
    assert_eq!(before.total(ExtentState::Unwritten), 65536);
    // Whatever would take blocks away is refused there, too.
    for at in [0, 65536, 262_144] {
        assert_eq!(punch(&file, at, 4096), Err(Errno::TXTBSY), "{at}");
        assert_eq!(
            raw::fallocate(file.as_fd(), 0x10, at, 4096),
            Err(Errno::TXTBSY),
            "{at}"
        );
    }
    // But it is none of the pin's business beside it.
    assert_eq!(punch(&file, 524_288, 4096), Ok(()));
    file.write_all_at(&[9; 4096], 65536).unwrap();
    raw::fallocate(file.as_fd(), 1, 69_632, 4096).unwrap();
    raw::fallocate(file.as_fd(), 0, 73_728, 4096).unwrap();
    file.write_all_at(&[9; 8192], 262_144).unwrap();
    assert_eq!(punch(&file, 65536, 4096), Err(Errno::TXTBSY));
    file.sync_all().unwrap();
    let after = wait_until_held(&mut pin, 524_288 - 131_072 + 12_288);
    // And nothing that was held has moved.
    for extent in before.extents().iter().filter(|e| e.state.is_stable()) {
        let now = after.find(extent.offset).unwrap();
        let now = now.clipped(&(extent.offset..extent.end())).unwrap();
        assert_eq!(now.physical, extent.physical);
    }
    assert!(told_by_status(&guard, pin.pin_id()) >= after.total(ExtentState::Written));
    drop(file);
    end(pin, &path);
}

/// A mapping is the file itself, holes and what is behind its end included: a
/// store allocates, and raises SIGBUS only where there is no file yet.
fn maps_what_is_not_there_yet(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = written(&world.disk(kind), "stable-mapped", 65536);
    let file = open(&path);
    punch(&file, 16_384, 16_384).unwrap();
    file.sync_all().unwrap();
    let map = |read_only| {
        MapOptions::new()
            .strength(Strength::Stable)
            .read_only(read_only)
            .range(0..131_072)
            .accept_page_cache(true)
            .patience(patience())
            .guard(guard.client())
            .map(&file)
    };
    let mut held = map(false).unwrap();
    let at = |byte: usize| held.as_ptr() as usize + byte;
    assert_eq!(load(at(16_384)), Access::Went(0));
    raw::store_into(&held, 16_384, 5);
    assert_eq!(load(at(16_384)), Access::Went(5));
    assert_eq!(load(at(70_000)), Access::BUS_ADRERR);
    held.write_all_at(b"filled", 20_480).unwrap();
    let refused = held.write_all_at(b"x", 70_000).unwrap_err();
    assert_eq!(refused.errno_name(), "EFAULT");
    let allocated = held.allocate(16_384..20_480).unwrap_err();
    assert_eq!(allocated.errno_name(), "EOPNOTSUPP");
    // The file grows under the mapping.
    truncate(&file, 131_072).unwrap();
    raw::store_into(&held, 70_000, 6);
    held.refresh(&file).unwrap();
    held.write_all_at(b"x", 70_001).unwrap();
    held.flush().unwrap();
    let mut bytes = [0; 2];
    file.read_exact_at(&mut bytes, 70_000).unwrap();
    assert_eq!(&bytes, b"\x06x");
    assert_eq!(truncate(&file, 65536), Err(Errno::TXTBSY));
    assert_eq!(punch(&file, 16_384, 4096), Err(Errno::TXTBSY));
    let reader = map(true);
    if let Ok(reader) = &reader {
        let mut bytes = [0; 6];
        reader.read_exact_at(&mut bytes, 20_480).unwrap();
        assert_eq!(&bytes, b"filled");
    }
    let other = written(&world.disk(kind), "stable-mapped-other", 65536);
    let unlike = held.refresh(File::open(&other).unwrap()).unwrap_err();
    assert_eq!(unlike.errno_name(), "EINVAL");
    std::fs::remove_file(&other).unwrap();
    assert!(held.integrity().is_intact());
    drop((reader, held, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// Grows by ftruncate(2), maps the hole, and writes into it.
fn as_a_database_does(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = world.disk(kind).path("stable-database");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    // Nothing is there yet.
    let mut pin = follow(&guard.client(), &file, 0);
    assert_eq!(pin.block_map().total(ExtentState::Written), 0);
    let mut pages = 0;
    for round in 1..=8u64 {
        let size = round * 65536;
        truncate(&file, size).unwrap();
        let map = raw::PlainMap::new(
            file.as_fd(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            0,
            usize::try_from(size).unwrap(),
        )
        .unwrap();
        file.write_all_at(&[7; 4096], size - 65536).unwrap();
        map.store(usize::try_from(size).unwrap() - 4096, 8);
        assert_eq!(map.load(usize::try_from(size).unwrap() - 65536), 7);
        pages += 2;
        assert_eq!(truncate(&file, size - 65536), Err(Errno::TXTBSY));
    }
    file.sync_all().unwrap();
    wait_until_held(&mut pin, pages * 4096);
    drop(file);
    end(pin, &path);
}

/// What is shared may be unshared; what a copy of it could take along is told
/// as loose until then, and nothing comes to be shared.
fn shared_blocks(world: &World, kind: Kind) {
    if !kind.reflink() {
        return;
    }
    const MIB: u64 = 1 << 20;
    let guard = world.guard();
    let disk = world.disk(kind);
    let path = written(&disk, "stable-shared", 4 << 20);
    let sharer = disk.path("stable-sharer");
    let file = open(&path);
    let clone = |into: &File, from: &File, offset| {
        mapdirect_testkit::attack::clone_range(into.as_fd(), from.as_fd(), offset, 4096, offset)
    };
    let other = File::create(&sharer).unwrap();
    clone(&other, &file, 2 * MIB).unwrap();
    other.sync_all().unwrap();
    drop(other);
    let mut pin = follow(&guard.client(), &file, 0);
    let state = |map: &BlockMap, at: u64| map.find(at).unwrap().state;
    let map = pin.block_map().clone();
    assert_eq!(state(&map, 2 * MIB), ExtentState::Shared);
    for near in [
        2 * MIB - 4096,
        2 * MIB + 4096,
        2 * MIB - 65536,
        2 * MIB + 65536,
    ] {
        assert_eq!(state(&map, near), ExtentState::Loose, "{near}");
    }
    for far in [0, MIB, 3 * MIB] {
        assert_eq!(state(&map, far), ExtentState::Written, "{far}");
    }
    assert!(told_by_status(&guard, pin.pin_id()) < 4 << 20);
    // Loose or not, nobody takes it away or shares it.
    assert_eq!(punch(&file, 2 * MIB + 4096, 4096), Err(Errno::TXTBSY));
    assert_eq!(truncate(&file, 2 * MIB), Err(Errno::TXTBSY));
    let reader = File::open(&path).unwrap();
    let into = open(&sharer);
    for offset in [0, MIB, 2 * MIB] {
        assert_eq!(
            clone(&into, &reader, offset),
            Err(Errno::TXTBSY),
            "{offset}"
        );
        assert_eq!(clone(&file, &into, offset), Err(Errno::TXTBSY), "{offset}");
    }
    drop((reader, into));
    // Unshared by a write, and by fallocate(2).
    file.write_all_at(&[3; 4096], 2 * MIB).unwrap();
    assert_eq!(raw::fallocate(file.as_fd(), 0x40, 2 * MIB, 8192), Ok(()));
    file.sync_all().unwrap();
    wait_for(patience(), || {
        pin.refresh().unwrap();
        Ok((state(pin.block_map(), 2 * MIB) != ExtentState::Shared).then_some(()))
    })
    .unwrap();
    for extent in map.extents().iter().filter(|e| e.state.is_stable()) {
        let now = pin.block_map().find(extent.offset).unwrap();
        let now = now.clipped(&(extent.offset..extent.end())).unwrap();
        assert_eq!(now.physical, extent.physical);
    }
    if Gate::under_test() == Gate::Bpf {
        // Once XFS has nothing set aside for copies, all of it is held.
        rustix::fs::syncfs(&file).unwrap();
        mapdirect_sys::xfs_eofblocks::free(file.as_fd(), 0, 0).unwrap();
        wait_until_held(&mut pin, 4 << 20);
    }
    drop(file);
    std::fs::remove_file(&sharer).unwrap();
    end(pin, &path);
}

fn scopes_and_arguments(world: &World, kind: Kind) {
    let guard = world.guard().client();
    let path = written(&world.disk(kind), "stable-arguments", 65536);
    let file = open(&path);
    let all = PinOptions::new().guard(guard.clone()).patience(patience());
    let refused = all.range_from(4096).pin(&file).unwrap_err();
    assert_eq!(
        (refused.kind(), refused.errno_name()),
        (Reason::Arguments, "EINVAL")
    );
    // As it is now, and no more.
    let pin = options(&guard).pin(&file).unwrap();
    assert_eq!(pin.range(), 0..65536);
    assert_eq!(truncate(&file, 131_072), Ok(()));
    assert_eq!(truncate(&file, 65536), Ok(()));
    assert_eq!(truncate(&file, 65535), Err(Errno::TXTBSY));
    drop(pin);
    wait_until_free_by(&file);
    // The whole file grows, its size is not fixed.
    let mut pin = options(&guard).scope(Scope::File).pin(&file).unwrap();
    assert_eq!(pin.range(), 0..u64::MAX);
    assert_eq!(truncate(&file, 131_072), Ok(()));
    assert_eq!(truncate(&file, 65536), Err(Errno::TXTBSY));
    let refused = pin.allocate(65536..131_072).unwrap_err();
    assert_eq!(refused.errno_name(), "EOPNOTSUPP");
    // A pin of the other strength beside it freezes what it covers.
    let strict = PinOptions::new()
        .range(65536..131_072)
        .guard(guard.clone())
        .patience(patience())
        .pin(&file)
        .unwrap();
    assert_eq!(rustix::io::pwrite(&file, b"x", 65536), Err(Errno::TXTBSY));
    drop(strict);
    wait_for(patience(), || {
        Ok(rustix::io::pwrite(&file, b"x", 65536).ok())
    })
    .unwrap();
    // Prepared first, all of it is held.
    drop(pin);
    wait_until_free_by(&file);
    let options = options(&guard).range_from(0).prepare_first(true);
    let pin = options.pin(&file).unwrap();
    assert_eq!(pin.block_map().total(ExtentState::Written), 131_072);
    drop(file);
    end(pin, &path);
}

/// Waits until nothing of a file is pinned, which stays open here.
fn wait_until_free_by(file: &File) {
    let collapse = rustix::fs::FallocateFlags::COLLAPSE_RANGE;
    wait_for(patience(), || {
        let refused = rustix::fs::fallocate(file, collapse, 0, 1).unwrap_err();
        Ok((refused != Errno::TXTBSY).then_some(()))
    })
    .unwrap();
}

/// Nothing that grows or fills a file is ever taken for a breach.
fn grows_quietly(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = written(&world.disk(kind), "stable-quiet", 4096);
    let file = open(&path);
    let mut pin = follow(&guard.client(), &file, 0);
    for round in 1..200u64 {
        let at = round * 20_000;
        file.write_all_at(&[1; 3000], at).unwrap();
        if round % 7 == 0 {
            raw::fallocate(file.as_fd(), 1, at + 10_000, 65536).unwrap();
        }
        if round % 11 == 0 {
            file.sync_data().unwrap();
        }
        if round % 13 == 0 {
            truncate(&file, at + 12_000).unwrap();
        }
    }
    file.sync_all().unwrap();
    let now = mapdirect::block_map(File::open(&path).unwrap(), 0..8 << 20).unwrap();
    wait_until_held(&mut pin, now.total(ExtentState::Written));
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(
        told_by_status(&guard, pin.pin_id()),
        now.total(ExtentState::Written)
    );
    drop(file);
    end(pin, &path);
}

/// A holder may shrink and punch what it alone has pinned, if it asks; and what
/// is there then is held.
fn gives_way(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = written(&world.disk(kind), "stable-gives-way", 1 << 20);
    let file = open(&path);
    let mut pin = follow(&guard.client(), &file, 0);
    let giving_way = guard.client().give_way(&file, 524_288..u64::MAX).unwrap();
    assert_eq!(truncate(&file, 524_287), Err(Errno::TXTBSY));
    assert_eq!(punch(&file, 0, 4096), Err(Errno::TXTBSY));
    assert_eq!(truncate(&file, 600_000), Ok(()));
    assert_eq!(truncate(&file, 524_288), Ok(()));
    file.write_all_at(&[4; 8192], 524_288).unwrap();
    file.sync_all().unwrap();
    giving_way.resume().unwrap();
    assert_eq!(truncate(&file, 524_288), Err(Errno::TXTBSY));
    assert_eq!(punch(&file, 524_288, 4096), Err(Errno::TXTBSY));
    pin.refresh().unwrap();
    assert_eq!(pin.block_map().total(ExtentState::Written), 532_480);
    assert_eq!(pin.block_map().file_size(), 532_480);
    // Two at a time, in the middle.
    let one = guard.client().give_way(&file, 65536..131_072).unwrap();
    let other = guard.client().give_way(&file, 100_000..200_000).unwrap();
    for at in [65536, 131_072, 196_608] {
        assert_eq!(punch(&file, at, 4096), Ok(()), "{at}");
    }
    assert_eq!(truncate(&file, 65536), Err(Errno::TXTBSY));
    one.resume().unwrap();
    assert_eq!(punch(&file, 69_632, 4096), Err(Errno::TXTBSY));
    assert_eq!(punch(&file, 102_400, 4096), Ok(()));
    // Without a word, when whoever asked is gone.
    drop(other);
    wait_for(patience(), || {
        Ok((punch(&file, 102_400, 4096) == Err(Errno::TXTBSY)).then_some(()))
    })
    .unwrap();
    let held = wait_until_held(&mut pin, 532_480 - 4 * 4096);
    assert_eq!(held.find(65536).unwrap().state, ExtentState::Hole);
    std::thread::sleep(Duration::from_millis(200));
    assert!(pin.integrity().is_intact());
    drop(file);
    end(pin, &path);
}

fn gives_way_to_nobody_else(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = written(&world.disk(kind), "stable-keeps", 1 << 20);
    let file = open(&path);
    let client = guard.client();
    let give_way = |range| client.give_way(&file, range).map(drop);
    let refused = give_way(0..4096).unwrap_err();
    assert_eq!(refused.errno_name(), "EINVAL");
    let pin = follow(&client, &file, 0);
    let refused = give_way(4096..4096).unwrap_err();
    assert_eq!(refused.errno_name(), "EINVAL");
    // Neither what another process has pinned, nor what shall stay as it is.
    let name = path.to_str().unwrap();
    let mut command = std::process::Command::new(crate::world::BINARY);
    command
        .args(["pin", name, "--strength", "stable", "--range", "64K:64K"])
        .args(["--patience", "20000", "--json"])
        .env("MAPDIRECT_SOCKET", guard.socket());
    let mut other = mapdirect_testkit::process::Helper::spawn(command).unwrap();
    other.hear().unwrap();
    let refused = give_way(65536..69_632).unwrap_err();
    assert_eq!(refused.errno_name(), "ETXTBSY");
    assert!(
        refused.to_string().contains("something of it pinned"),
        "{refused}"
    );
    assert_eq!(punch(&file, 65536, 4096), Err(Errno::TXTBSY));
    give_way(0..65536).unwrap();
    other.kill().unwrap();
    let strict = PinOptions::new()
        .range(0..4096)
        .guard(client.clone())
        .patience(patience())
        .pin(&file)
        .unwrap();
    let refused = give_way(0..4096).unwrap_err();
    assert_eq!(refused.errno_name(), "ETXTBSY");
    drop((strict, file));
    end(pin, &path);
}
