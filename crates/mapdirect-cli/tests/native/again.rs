//! Pinning again, under the bpf gate, what was pinned a moment ago: by mmap(2)
//! alone, if nothing has happened meanwhile.
//!
//! A pin that was taken up again has the number it had; one that the guard has
//! granted has a new one.

use crate::in_kernel::{BOTH, MAP_DIRECT, punch, raw_command, raw_errno, wait_until_unpinned};
use crate::world::{BINARY, OnKind, World, is_brief, map, open, patience, pin, written};
use mapdirect::{DirectMap, Guard, Integrity, MapOptions, State};
use mapdirect_sys::Errno;
use mapdirect_testkit::attack::{CORPUS, Door, Target};
use mapdirect_testkit::contract::{Place, Subject};
use mapdirect_testkit::process::{GuardProcess, Helper, wait_for};
use mapdirect_testkit::random::Random;
use mapdirect_testkit::{Kind, raw};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

pub const TESTS: [(&str, OnKind); 10] = [
    ("again::taken-up", taken_up),
    ("again::undecided", undecided),
    ("again::numbers-of-strangers", numbers_of_strangers),
    ("again::disturbed", disturbed),
    ("again::another-file", another_file),
    ("again::forked", forked),
    ("again::by-somebody-else", by_somebody_else),
    ("again::guard-killed", guard_killed),
    ("again::neighbours", neighbours),
    ("again::hammer", hammer),
];

const RANGE: Range<u64> = 0..65_536;

/// A mapping that was taken up again: at the first try, unless the guard has
/// just let go of the pin for its age.
#[track_caller]
fn taken_up_again(guard: &Guard, file: &File, before: u64) -> DirectMap {
    let again = map(guard, file, RANGE);
    assert_eq!(again.pin_id(), before, "the guard was asked");
    again
}

fn taken_up(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "again", 1 << 20);
    let file = open(&path);
    let guard = world.guard().client();
    let first = map(&guard, &file, RANGE);
    let mut id = first.pin_id();
    let mut asked = 0;
    let blocks = first.block_map().clone();
    drop(first);
    assert_eq!(rustix::io::pwrite(&file, b"harmless", 4096), Ok(8));
    for round in 0..20 {
        let again = map(&guard, &file, RANGE);
        // Inodes that leave memory meanwhile may look like this one.
        asked += u32::from(again.pin_id() != id);
        id = again.pin_id();
        assert_eq!(again.block_map(), &blocks);
        assert_eq!(
            (again.state(), again.integrity()),
            (State::Kept, Integrity::Intact)
        );
        let known = guard.pinned_ranges(&file).unwrap();
        let own = std::process::id().cast_signed();
        assert_eq!(known.len(), 1, "{known:?}");
        assert_eq!((known[0].pin, known[0].pid), (id, own), "in round {round}");
        assert_eq!(known[0].range, RANGE);
        let mut word = [0; 8];
        again.read_exact_at(&mut word, 4096).unwrap();
        assert_eq!(&word, b"harmless");
        again.write_all_at(b"stored", 8192).unwrap();
        assert_eq!(punch(&file, 8192), Err(Errno::TXTBSY));
        assert_eq!(rustix::fs::ftruncate(&file, 4096), Err(Errno::TXTBSY));
        if round % 4 == 0 {
            // Time for the guard to look.
            std::thread::sleep(Duration::from_millis(250));
            assert_eq!(punch(&file, 8192), Err(Errno::TXTBSY));
        }
        drop(again);
        if round % 4 == 1 {
            std::thread::sleep(Duration::from_millis(250));
        }
        let known = guard.pinned_ranges(&file).unwrap();
        assert!(known.is_empty() || round % 4 != 1, "{known:?}");
    }
    assert!(asked <= 2, "the guard was asked {asked} times of 20");
    // Another range is another pin.
    let other = map(&guard, &file, 65_536..131_072);
    assert_ne!(other.pin_id(), id);
    drop(other);
    // What was refused is let pass, and from then on the guard is asked.
    let again = map(&guard, &file, RANGE);
    let id = again.pin_id();
    assert_eq!(punch(&file, 8192), Err(Errno::TXTBSY));
    drop(again);
    assert_eq!(punch(&file, 131_072), Ok(()), "it met no pin");
    let again = taken_up_again(&guard, &file, id);
    drop(again);
    assert_eq!(punch(&file, 8192), Ok(()), "at once");
    assert_eq!(rustix::io::pwrite(&file, &[1; 4096], 8192), Ok(4096));
    let granted = map(&guard, &file, RANGE);
    assert_ne!(granted.pin_id(), id);
    drop(granted);
    wait_until_unpinned(&path);
    // Nothing is left of it after a while.
    let status = || guard.status().unwrap();
    wait_for(Duration::from_secs(30), || {
        Ok(status().files.is_empty().then_some(()))
    })
    .unwrap();
    drop(file);
    std::fs::remove_file(&path).unwrap();
}

/// Whatever is done to a file whose pin is dormant: what is promised next is
/// true.
fn disturbed(world: &World, kind: Kind) {
    let guard = world.guard().client();
    let disk = world.disk(kind);
    let block = kind.block();
    let places = [Place::Stable, Place::Across];
    let places = if is_brief() {
        &places[..1]
    } else {
        &places[..]
    };
    let (mut asked, mut went_on) = (0, 0);
    for attack in CORPUS.iter().filter(|attack| attack.place.includes(kind)) {
        for place in places {
            let subject = Subject::new(&disk, &format!("disturbed-{}", attack.name), false);
            let file = open(&subject.path);
            let first = map(&guard, &file, subject.pinned());
            let (id, before) = (first.pin_id(), subject.block_map());
            drop(first);
            let (offset, length) = subject.bytes(*place);
            let done = (attack.run)(&Target {
                path: subject.path.clone(),
                offset,
                length,
                block,
                other: subject.other.clone(),
                door: Door::Path,
                file: None,
            });
            file.sync_all().unwrap();
            let after = subject.block_map();
            let again = MapOptions::new()
                .range(subject.pinned())
                .accept_page_cache(true)
                .patience(patience())
                .guard(guard.clone())
                .map(&file);
            let Ok(again) = again else {
                // It cannot be pinned as it is now.
                continue;
            };
            let what = format!("{} at {}: {done:?}", attack.name, place.name());
            assert_eq!(again.block_map().extents(), after.extents(), "{what}");
            if before.extents() == after.extents() && again.pin_id() == id {
                went_on += 1;
            } else {
                asked += 1;
            }
            if before.extents() != after.extents() {
                assert_ne!(again.pin_id(), id, "{what}");
            }
            assert_eq!(punch(&file, offset), Err(Errno::TXTBSY), "{what}");
        }
    }
    assert!(asked > 5 && went_on > 0, "{asked} {went_on}");
    world.count("pins taken up after something harmless", went_on);
    world.count("pins granted anew after something else", asked);
}

/// A file that gets the number of one that is gone is another one.
fn another_file(world: &World, kind: Kind) {
    use std::os::unix::fs::MetadataExt;
    let disk = world.disk(kind);
    let guard = world.guard().client();
    let mut same = 0;
    for round in 0..20 {
        let path = written(&disk, "again-old", 1 << 20);
        let file = open(&path);
        let number = file.metadata().unwrap().ino();
        let first = map(&guard, &file, RANGE);
        let id = first.pin_id();
        drop((first, file));
        std::fs::remove_file(&path).unwrap();
        for attempt in 0..50 {
            let other = written(&disk, &format!("again-new-{attempt}"), 1 << 20);
            let file = open(&other);
            if file.metadata().unwrap().ino() == number {
                same += 1;
                let again = map(&guard, &file, RANGE);
                assert_ne!(again.pin_id(), id, "in round {round}");
                let now = mapdirect::block_map(&file, RANGE).unwrap();
                assert_eq!(again.block_map().extents(), now.extents());
                break;
            }
        }
        for attempt in 0..50 {
            let _ = std::fs::remove_file(disk.path(&format!("again-new-{attempt}")));
        }
    }
    world.count("files with the number of one that was pinned", same);
}

/// A child that has the mapping holds the pin; and after that it is over.
fn forked(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "again-forked", 1 << 20);
    let file = open(&path);
    let guard = world.guard().client();
    let first = map(&guard, &file, RANGE);
    let id = first.pin_id();
    drop(first);
    let again = taken_up_again(&guard, &file, id);
    let child = raw::fork(|| {
        loop {
            std::thread::sleep(Duration::from_secs(3600));
        }
    })
    .unwrap();
    drop(again);
    assert_eq!(punch(&file, 4096), Err(Errno::TXTBSY), "the child has it");
    let beside = map(&guard, &file, RANGE);
    assert_ne!(beside.pin_id(), id);
    kill(child);
    assert_eq!(punch(&file, 4096), Err(Errno::TXTBSY));
    drop(beside);
    wait_until_unpinned(&path);
    assert_eq!(punch(&file, 4096), Ok(()));
    drop(file);
    std::fs::remove_file(&path).unwrap();
}

fn kill(child: i32) {
    let pid = rustix::process::Pid::from_raw(child).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
}

/// A program without a library that maps a range.
#[track_caller]
fn raw_holder(path: &Path, range: Range<u64>) -> Helper {
    let shared = libc::MAP_SHARED | MAP_DIRECT;
    let mut raw = Helper::spawn(raw_command(path, "both", BOTH, shared, range)).unwrap();
    assert_eq!(raw.hear().unwrap(), "mapped");
    raw
}

/// A program without a library takes up what another has let go of.
fn by_somebody_else(world: &World, kind: Kind) {
    // It is compiled when it is needed first, which takes long.
    let _ = crate::in_kernel::raw_mmap();
    let path = written(&world.disk(kind), "again-else", 1 << 20);
    let file = open(&path);
    let guard = world.guard().client();
    let shared = libc::MAP_SHARED | MAP_DIRECT;
    let first = map(&guard, &file, RANGE);
    let id = first.pin_id();
    drop(first);
    let outside = raw_command(&path, "both", BOTH, shared, 61_440..69_632);
    assert_eq!(raw_errno(outside), Some(Errno::OPNOTSUPP));
    let raw = raw_holder(&path, 4096..12_288);
    assert_eq!(punch(&file, 0), Err(Errno::TXTBSY), "all of the pin");
    let known = guard.pinned_ranges(&file).unwrap();
    assert_eq!(known.len(), 1, "{known:?}");
    assert_eq!((known[0].pin, known[0].pid), (id, raw.pid()));
    // It is no pin of this process.
    let own = map(&guard, &file, RANGE);
    assert_ne!(own.pin_id(), id);
    // One more joins, and stays.
    let joined = raw_holder(&path, 0..4096);
    drop(own);
    raw.kill().unwrap();
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(punch(&file, 8192), Err(Errno::TXTBSY));
    let known = guard.pinned_ranges(&file).unwrap();
    assert!(
        known.iter().any(|pinned| pinned.pid == joined.pid()),
        "{known:?}"
    );
    joined.kill().unwrap();
    wait_until_unpinned(&path);
    // Without the capability nothing is taken up.
    let held = map(&guard, &file, RANGE);
    drop(held);
    let plain = raw_command(&path, "both", BOTH, shared, RANGE);
    let mut powerless = std::process::Command::new("setpriv");
    powerless
        .arg("--bounding-set=-linux_immutable")
        .arg(plain.get_program())
        .args(plain.get_args());
    assert_eq!(raw_errno(powerless), Some(Errno::ACCESS));
    assert_eq!(punch(&file, 0), Ok(()));
    let refused = raw_command(&path, "both", BOTH, shared, RANGE);
    assert_eq!(raw_errno(refused), Some(Errno::OPNOTSUPP));
    drop(file);
    std::fs::remove_file(&path).unwrap();
}

/// Without a guard the kernel goes on, and the next guard knows all of it.
fn guard_killed(world: &World, kind: Kind) {
    let _ = crate::in_kernel::raw_mmap();
    world.end_guard();
    let disk = world.disk(kind);
    let paths = ["again-killed-1", "again-killed-2", "again-killed-3"]
        .map(|name| written(&disk, name, 1 << 20));
    let files = paths.each_ref().map(|path| open(path));
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let client = guard.client();
    let ids = files.each_ref().map(|file| {
        let first = map(&client, file, RANGE);
        first.pin_id()
    });
    // One is taken up while the guard is there, one when it is not, and one
    // never.
    let with_guard = taken_up_again(&client, &files[0], ids[0]);
    let gate = guard.kill_and_keep().unwrap();
    let raw = raw_holder(&paths[1], RANGE);
    assert_eq!(punch(&files[0], 0), Err(Errno::TXTBSY));
    assert_eq!(punch(&files[1], 0), Err(Errno::TXTBSY));
    let guard = GuardProcess::start_at(Path::new(BINARY), &[], gate).unwrap();
    let client = guard.client();
    assert_eq!(punch(&files[0], 0), Err(Errno::TXTBSY));
    assert_eq!(punch(&files[1], 0), Err(Errno::TXTBSY));
    for (at, pid) in [(0, std::process::id().cast_signed()), (1, raw.pid())] {
        let known = client.pinned_ranges(&files[at]).unwrap();
        assert_eq!(known.len(), 1, "{known:?}");
        assert_eq!((known[0].pin, known[0].pid), (ids[at], pid));
    }
    assert!(client.pinned_ranges(&files[2]).unwrap().is_empty());
    let anew = raw_command(
        &paths[2],
        "both",
        BOTH,
        libc::MAP_SHARED | MAP_DIRECT,
        RANGE,
    );
    assert_eq!(
        raw_errno(anew),
        Some(Errno::OPNOTSUPP),
        "the new guard knows nothing of it"
    );
    drop(with_guard);
    raw.kill().unwrap();
    for (path, file) in paths.iter().zip(&files) {
        wait_until_unpinned(path);
        assert_eq!(punch(file, 0), Ok(()));
    }
    drop(guard);
    for path in &paths {
        std::fs::remove_file(path).unwrap();
    }
}

/// The words of the kernel's count of pins of the only inode there is.
fn set_lives(guard: &GuardProcess, lives: u64) {
    let map = guard.gate_directory().unwrap().join("lives");
    let changed = raw::change_bpf_map(&map, |words| {
        words[0] = lives;
        true
    });
    assert_eq!(changed, Ok(1));
}

/// Somebody is not run in the middle of taking up a pin: as long as nobody knows
/// what becomes of that, the pin counts, and a guard that comes later knows no
/// better.
fn undecided(world: &World, kind: Kind) {
    const DEAD: u64 = 1 << 63;
    const WAKING: u64 = 1 << 62;
    world.end_guard();
    let path = written(&world.disk(kind), "again-undecided", 1 << 20);
    let file = open(&path);
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let client = guard.client();
    let another = |client: &Guard| {
        MapOptions::new()
            .range(131_072..196_608)
            .accept_page_cache(true)
            .guard(client.clone())
            .map(&file)
    };
    drop(map(&client, &file, RANGE));
    set_lives(&guard, WAKING);
    assert_eq!(punch(&file, 8192), Err(Errno::TXTBSY));
    let refused = another(&client).map(drop).unwrap_err();
    assert_eq!(punch(&file, 8192), Err(Errno::TXTBSY), "after {refused}");
    let gate = guard.kill_and_keep().unwrap();
    let guard = GuardProcess::start_at(Path::new(BINARY), &[], gate).unwrap();
    let client = guard.client();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(punch(&file, 8192), Err(Errno::TXTBSY));
    let refused = another(&client).map(drop).unwrap_err();
    assert_eq!(punch(&file, 8192), Err(Errno::TXTBSY), "after {refused}");
    // It came too late, and the guard finds that out by itself.
    set_lives(&guard, DEAD);
    assert_eq!(punch(&file, 8192), Ok(()));
    assert_eq!(rustix::io::pwrite(&file, &[1; 4096], 8192), Ok(4096));
    file.sync_all().unwrap();
    let held = wait_for(Duration::from_secs(5), || Ok(another(&client).ok())).unwrap();
    assert_eq!(punch(&file, 135_168), Err(Errno::TXTBSY));
    assert_eq!(punch(&file, 8192), Ok(()));
    drop(held);
    wait_until_unpinned(&path);
    drop((file, guard));
    std::fs::remove_file(&path).unwrap();
}

/// Nobody who gives numbers to files of his own has others ask the guard; whoever
/// does that to this file has.
fn numbers_of_strangers(world: &World, kind: Kind) {
    const EXT4_SETVERSION: u64 = 0x4008_6604;
    let disk = world.disk(kind);
    let (path, stranger) = (
        written(&disk, "again-numbers", 1 << 20),
        written(&disk, "again-stranger", 4096),
    );
    let (file, other) = (open(&path), open(&stranger));
    let guard = world.guard().client();
    // On most filesystems ext4 refuses it, after it was noted.
    let number = |file: &File| raw::ioctl(file.as_fd(), EXT4_SETVERSION, &mut 7u64);
    let first = map(&guard, &file, RANGE);
    let id = first.pin_id();
    drop(first);
    let _ = number(&other);
    drop(taken_up_again(&guard, &file, id));
    let done = number(&file);
    let anew = map(&guard, &file, RANGE);
    assert_eq!(anew.pin_id() == id, kind.is_xfs(), "{done:?}");
    assert!(!kind.is_xfs() || done == Err(Errno::NOTTY), "{done:?}");
    drop(anew);
    wait_until_unpinned(&path);
    drop((file, other));
    for path in [path, stranger] {
        std::fs::remove_file(&path).unwrap();
    }
}

/// With other pins of the file nothing comes out of order.
fn neighbours(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "again-beside", 1 << 20);
    let file = open(&path);
    let guard = world.guard().client();
    for _ in 0..5 {
        drop(map(&guard, &file, RANGE));
        let again = map(&guard, &file, RANGE);
        let beside = map(&guard, &file, 131_072..196_608);
        drop(again);
        assert_eq!(punch(&file, 8192), Ok(()), "it is over");
        assert_eq!(rustix::io::pwrite(&file, &[1; 4096], 8192), Ok(4096));
        assert_eq!(punch(&file, 135_168), Err(Errno::TXTBSY));
        let again = map(&guard, &file, RANGE);
        assert_eq!(
            again.block_map().extents(),
            mapdirect::block_map(&file, RANGE).unwrap().extents()
        );
        drop(beside);
        assert_eq!(punch(&file, 8192), Err(Errno::TXTBSY));
        let frozen = pin(&guard, &file, 262_144..266_240);
        drop(again);
        drop(frozen);
        wait_until_unpinned(&path);
    }
    drop(file);
    std::fs::remove_file(&path).unwrap();
}

/// What attackers do to the file while its holder pins it again and again.
fn attack(path: &Path, kind: Kind, number: u64, over: &AtomicBool) -> u64 {
    let file = open(path);
    let copy = path.with_extension(format!("copy-{number}"));
    let own = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&copy)
        .unwrap();
    own.write_all_at(&[9; 65_536], 0).unwrap();
    let mut random = Random::new(number + 1);
    let mut passed = 0;
    while !over.load(SeqCst) {
        let offset = random.below(16) * 4096;
        let done = match random.below(if kind.reflink() { 6 } else { 4 }) {
            0 => punch(&file, offset)
                .and_then(|()| rustix::io::pwrite(&file, &[3; 4096], offset).map(drop)),
            1 => rustix::fs::ftruncate(&file, 32_768)
                .and_then(|()| rustix::io::pwrite(&file, &[4; 32_768], 32_768).map(drop)),
            2 => raw::fallocate(file.as_fd(), 0x10, offset, 4096)
                .and_then(|()| rustix::io::pwrite(&file, &[5; 4096], offset).map(drop)),
            3 => raw::fallocate(file.as_fd(), 0x08, 0, 4096),
            4 => rustix::fs::ioctl_ficlone(&own, &file)
                .and_then(|()| rustix::io::pwrite(&file, &[6; 65_536], 0).map(drop)),
            _ => rustix::fs::ioctl_ficlone(&file, &own),
        };
        passed += u64::from(done.is_ok());
        // A grant needs a moment without anybody.
        std::thread::sleep(Duration::from_millis(random.below(60)));
    }
    let _ = std::fs::remove_file(copy);
    passed
}

/// Several attack all the while; what a holder is promised is true as long as
/// its mapping is there.
fn hammer(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "again-hammer", 1 << 20);
    let guard = world.guard().client();
    let over = AtomicBool::new(false);
    let limit = Duration::from_secs(if is_brief() { 20 } else { 60 });
    let (mut taken_up, mut granted, mut refused) = (0, 0, 0);
    let passed = std::thread::scope(|scope| {
        let attackers: Vec<_> = (0..3)
            .map(|number| {
                let (path, over) = (&path, &over);
                scope.spawn(move || attack(path, kind, number, over))
            })
            .collect();
        let file = open(&path);
        let mut last = 0;
        let begun = Instant::now();
        while begun.elapsed() < limit {
            let held = MapOptions::new()
                .range(RANGE)
                .accept_page_cache(true)
                .patience(patience())
                .guard(guard.clone())
                .map(&file);
            let Ok(held) = held else {
                refused += 1;
                continue;
            };
            let is_same = held.pin_id() == last;
            last = held.pin_id();
            (taken_up, granted) = if is_same {
                (taken_up + 1, granted)
            } else {
                (taken_up, granted + 1)
            };
            if !held.block_map().is_stable() {
                // It may be stored to by nobody, and is not taken up again.
                continue;
            }
            for _ in 0..3 {
                let now = mapdirect::block_map(&file, RANGE).unwrap();
                assert_eq!(
                    held.block_map().extents(),
                    now.extents(),
                    "moved; taken up: {is_same}, after {taken_up} and {granted}"
                );
                std::thread::yield_now();
            }
            assert_eq!(held.integrity(), Integrity::Intact);
        }
        over.store(true, SeqCst);
        attackers
            .into_iter()
            .map(|attacker| attacker.join().unwrap())
            .sum::<u64>()
    });
    assert!(granted > 0 && passed > 0, "{taken_up} {granted} {passed}");
    println!(
        "{kind}: {taken_up} taken up, {granted} granted, {refused} refused; {passed} operations \
         of attackers passed; 0 moved"
    );
    world.count("pins taken up under attack", taken_up);
    world.count("pins granted under attack", granted);
    wait_until_unpinned(&path);
    std::fs::remove_file(&path).unwrap();
}
