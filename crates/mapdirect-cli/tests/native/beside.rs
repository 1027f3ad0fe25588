//! What happens beside a pin, and must not take blocks of it along.

use crate::segments::{HUGE, PAGE, State, at, make, map_all, store, try_map};
use crate::world::{PATIENCE, World, kinds, wait_until_free};
use libtest_mimic::Trial;
use mapdirect::{BlockMap, ExtentState, PinOptions};
use mapdirect_sys::Errno;
use mapdirect_testkit::Kind;
use mapdirect_testkit::fault::Access;
use mapdirect_testkit::process::wait_for;
use mapdirect_testkit::random::Random;
use mapdirect_testkit::raw::{self, PlainMap};
use rustix::fs::Advice;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

const HALF: u64 = HUGE / 2;

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(world.trials(
        "beside",
        &kinds(&[Kind::XFS, Kind::XFS_PLAIN, Kind::EXT4]),
        &[
            ("mapped-later", mapped_later),
            ("mapped-plainly", mapped_plainly),
            ("allocated", allocated),
            ("stores-while-granting", stores_while_granting),
            ("mappings-while-granting", mappings_while_granting),
            ("thrown-out", thrown_out),
            ("allocate-again", allocate_again),
        ],
    ));
    let sharing: Vec<_> = kinds(&[Kind::XFS])
        .into_iter()
        .filter(|kind| kind.reflink())
        .collect();
    trials.extend(world.trials(
        "beside",
        &sharing,
        &[
            ("copied", copied),
            ("size-kept", size_kept),
            ("same-size", same_size),
        ],
    ));
    trials
}

/// A file of one huge page's size, its halves in these states.
fn halves(world: &World, kind: Kind, name: &str, first: State, second: State) -> (PathBuf, File) {
    let path = world.disk(kind).path(&format!("beside-{name}"));
    let half = usize::try_from(HALF / PAGE).unwrap();
    let states: Vec<_> = std::iter::repeat_n(first, half)
        .chain(std::iter::repeat_n(second, half))
        .collect();
    let file = make(&path, PAGE, &states, HUGE);
    (path, file)
}

/// Empties the page cache and reads the file so that large folios come in.
fn read_anew(file: &File, path: &Path) {
    file.sync_all().unwrap();
    rustix::fs::fadvise(file, 0, None, Advice::DontNeed).unwrap();
    let reader = File::open(path).unwrap();
    rustix::fs::fadvise(&reader, 0, None, Advice::Sequential).unwrap();
    let mut chunk = vec![0; 256 << 10];
    let mut offset = 0;
    while offset < HUGE {
        offset += reader.read_at(&mut chunk, offset).unwrap() as u64;
    }
}

fn assert_still(file: &File, before: &BlockMap) {
    file.sync_all().unwrap();
    let now = mapdirect::block_map(file, before.range()).unwrap();
    assert_eq!(before.extents(), now.extents());
}

fn end(path: PathBuf, file: File) {
    drop(file);
    wait_until_free(&path);
    let _ = std::fs::remove_file(path.with_extension("other"));
    std::fs::remove_file(path).unwrap();
}

/// A hole is pinned first, and what lies before it is mapped later.
fn mapped_later(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = halves(world, kind, "later", State::Written, State::Hole);
    let hole = map_all(&guard.client(), &file, HALF..HUGE);
    let stable = map_all(&guard.client(), &file, 0..HALF);
    for round in 0..3 {
        read_anew(&file, &path);
        assert_eq!(store(at(&stable, 3), round), Access::Went(round));
        assert_eq!(store(at(&stable, 255), round), Access::Went(round));
        assert_still(&file, hole.block_map());
    }
    drop((hole, stable));
    end(path, file);
}

/// The same by mmap(2): it is refused, or its stores change nothing.
fn mapped_plainly(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = halves(world, kind, "plainly", State::Written, State::Hole);
    let hole = map_all(&guard.client(), &file, HALF..HUGE);
    let plain = PlainMap::new(
        file.as_fd(),
        3,
        libc::MAP_SHARED,
        0,
        HALF.try_into().unwrap(),
    );
    match plain {
        Ok(plain) => {
            for round in 0..3 {
                read_anew(&file, &path);
                plain.store(255 * 4096, round);
                assert_still(&file, hole.block_map());
            }
        }
        Err(errno) => assert_eq!(errno, Errno::TXTBSY),
    }
    drop(hole);
    end(path, file);
}

/// What somebody else has allocated becomes storable, the hole behind it not.
fn allocated(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = halves(world, kind, "allocated", State::Hole, State::Hole);
    let hole = map_all(&guard.client(), &file, HALF..HUGE);
    let mut first = map_all(&guard.client(), &file, 0..HALF);
    first.allocate(0..HALF).unwrap();
    for round in 1..4 {
        read_anew(&file, &path);
        assert_eq!(store(at(&first, 255), round), Access::Went(round));
        assert_eq!(store(at(&hole, 0), round), Access::BUS_ADRERR);
        assert_still(&file, hole.block_map());
    }
    drop((hole, first));
    end(path, file);
}

/// A grant reads the block map while somebody stores beside it: what it says
/// is true.
fn stores_while_granting(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = halves(world, kind, "storing", State::Written, State::Hole);
    let stable = map_all(&guard.client(), &file, 0..HALF);
    let over = AtomicBool::new(false);
    let mut granted = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random::new(1);
            let mut value = 0u8;
            while !over.load(SeqCst) {
                value = value.wrapping_add(1);
                std::thread::sleep(Duration::from_micros(random.below(25_000)));
                store(at(&stable, 3), value);
                // Faults once more, next time.
                raw::madvise(at(&stable, 0), 1 << 20, libc::MADV_DONTNEED).unwrap();
            }
        });
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..60 {
                punch_second_half(&file);
                read_anew(&file, &path);
                if let Ok(map) = try_map(&guard.client(), &file, HALF..HUGE) {
                    assert_still(&file, map.block_map());
                    granted += 1;
                }
            }
        }));
        over.store(true, SeqCst);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
    assert!(granted > 0, "nothing was granted");
    drop(stable);
    end(path, file);
}

/// One of several pins of a file is over a moment after it was let go: where
/// programs in the kernel judge, and where a child that another thread has
/// forked still has its description, until it executes something.
fn punch_second_half(file: &File) {
    let punch = || raw::fallocate(file.as_fd(), 3, HALF, HALF);
    wait_for(PATIENCE, || match punch() {
        Err(Errno::TXTBSY) => Ok(None),
        other => Ok(Some(other?)),
    })
    .unwrap();
}

/// Somebody maps and stores while a hole is being pinned: one of both is
/// refused, or the hole stays.
fn mappings_while_granting(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = halves(world, kind, "mapping", State::Written, State::Hole);
    // The descriptor is behind the gate.
    drop(map_all(&guard.client(), &file, 0..PAGE));
    let over = AtomicBool::new(false);
    let mapped = AtomicU64::new(0);
    let mut granted = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(SeqCst) {
                let length = usize::try_from(HALF).unwrap() + 4096;
                if let Ok(plain) = PlainMap::new(file.as_fd(), 3, libc::MAP_SHARED, 0, length) {
                    mapped.fetch_add(1, SeqCst);
                    plain.store(0, 1);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        for _ in 0..20 {
            let options = PinOptions::new().range(HALF..HUGE).guard(guard.client());
            if let Ok(pin) = options.pin(&file) {
                for _ in 0..5 {
                    std::thread::sleep(Duration::from_millis(1));
                    let now = mapdirect::block_map(&file, HALF..HUGE).unwrap();
                    if pin.block_map().extents() != now.extents() {
                        over.store(true, SeqCst);
                    }
                    assert_eq!(pin.block_map().extents(), now.extents());
                }
                granted += 1;
            }
        }
        over.store(true, SeqCst);
    });
    assert!(mapped.load(SeqCst) + granted > 0, "nothing happened");
    end(path, file);
}

/// The pages that keep a hole apart from what is stored to stay where they
/// are, whatever is asked to throw them out.
fn thrown_out(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = halves(world, kind, "thrown-out", State::Hole, State::Written);
    let hole = map_all(&guard.client(), &file, 0..HALF);
    let stable = map_all(&guard.client(), &file, HALF..HUGE);
    drop(stable);
    wait_for_pins(&guard.client(), &file, 1);
    let plain = PlainMap::new(
        file.as_fd(),
        3,
        libc::MAP_SHARED,
        HALF,
        HALF.try_into().unwrap(),
    );
    for (mode, offset) in [(3, HALF), (0x20, HALF), (8, HALF), (3, HALF + 4096)] {
        let result = raw::fallocate(file.as_fd(), mode, offset, 4096);
        assert!(matches!(result, Ok(()) | Err(Errno::TXTBSY)), "{result:?}");
        for round in 0..2 {
            read_anew(&file, &path);
            if let Ok(plain) = &plain {
                plain.store(3 * 4096, round);
            }
            assert_still(&file, hole.block_map());
        }
    }
    drop((hole, plain));
    end(path, file);
}

fn wait_for_pins(guard: &mapdirect::Guard, file: &File, count: usize) {
    wait_for(PATIENCE, || {
        let ranges = guard.pinned_ranges(file)?;
        Ok((ranges.len() == count).then_some(()))
    })
    .unwrap();
}

/// Allocating that failed because of somebody else works once he is gone.
fn allocate_again(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = halves(world, kind, "again", State::Hole, State::Written);
    let mut map = map_all(&guard.client(), &file, 0..HUGE);
    let reader = File::open(&path).unwrap();
    let length = usize::try_from(HUGE).unwrap();
    let seen = PlainMap::new(reader.as_fd(), libc::PROT_READ, libc::MAP_SHARED, 0, length).unwrap();
    // One huge page, if the filesystem makes them.
    let _ = seen.advise(libc::MADV_HUGEPAGE);
    for page in 0..length / 4096 {
        let _ = seen.load(page * 4096);
    }
    // It may work at once.
    let first = map.allocate(0..16 * 4096).map_err(|error| error.errno());
    assert!(matches!(first, Ok(()) | Err(libc::ETXTBSY)), "{first:?}");
    drop((seen, reader));
    for round in 1..4 {
        map.allocate(0..16 * 4096).unwrap();
        assert_eq!(store(at(&map, 15), round), Access::Went(round));
        assert_eq!(map.block_map().find(0).unwrap().state, ExtentState::Written);
        file.write_all_at(&[round], 0).unwrap();
    }
    drop(map);
    end(path, file);
}

/// Shared blocks beside a pin are copied by whatever changes a part of them.
fn copied(world: &World, kind: Kind) {
    let guard = world.guard();
    for is_mapped in [false, true] {
        for how in ["unshare", "punch", "zero", "truncate", "write"] {
            let path = world.disk(kind).path("beside-copied");
            let mut states = vec![State::Written; 240];
            states.extend([State::Shared; 16]);
            let file = make(&path, PAGE, &states, 256 * PAGE);
            rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
            let range = 0..240 * PAGE;
            let before = mapdirect::block_map(&file, range.clone()).unwrap();
            let map = is_mapped.then(|| map_all(&guard.client(), &file, range.clone()));
            let pin = (!is_mapped).then(|| {
                let options = PinOptions::new().range(range.clone()).patience(PATIENCE);
                options.guard(guard.client()).pin(&file).unwrap()
            });
            let edge = 240 * PAGE;
            let result = match how {
                "unshare" => raw::fallocate(file.as_fd(), 0x40, edge, PAGE),
                "punch" => raw::fallocate(file.as_fd(), 3, edge + 100, 200),
                "zero" => raw::fallocate(file.as_fd(), 0x11, edge + 100, 200),
                "truncate" => rustix::fs::ftruncate(&file, edge + 100),
                _ => rustix::io::pwrite(&file, &[1], edge).map(drop),
            };
            assert!(
                matches!(result, Ok(()) | Err(Errno::TXTBSY)),
                "{how}: {result:?}"
            );
            if let Some(map) = &map {
                assert_eq!(store(at(map, 230), 5), Access::Went(5));
            } else {
                file.write_all_at(&[5; 4096], 230 * PAGE).unwrap();
            }
            assert_still(&file, &before);
            drop((map, pin));
            end(path, file);
        }
    }
}

/// Allocating the last block of a file leaves its size alone.
fn size_kept(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = world.disk(kind).path("beside-size");
    let states = [State::Written, State::Shared, State::Shared, State::Shared];
    let size = 3 * PAGE + 100;
    let file = make(&path, PAGE, &states, size);
    let mut map = map_all(&guard.client(), &file, 0..size);
    map.allocate(0..size).unwrap();
    assert_eq!(file.metadata().unwrap().len(), size);
    assert_eq!(map.block_map().total(ExtentState::Shared), 0);
    drop(map);
    end(path, file);
}

/// A truncation to the size that the file has copies its last block, if others
/// share that: it is zeroed behind the end.
fn same_size(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = world.disk(kind).path("beside-same-size");
    let size = 3 * PAGE + 100;
    let file = make(&path, PAGE, &[State::Shared; 4], size);
    let options = PinOptions::new().range(0..size).patience(PATIENCE);
    let pin = options.guard(guard.client()).pin(&file).unwrap();
    let by_descriptor = rustix::fs::ftruncate(&file, size);
    assert_eq!(by_descriptor, Err(Errno::TXTBSY));
    assert_still(&file, pin.block_map());
    // It may grow by nothing either, and get shorter by nothing.
    for other in [size - 1, size + 1] {
        assert_eq!(rustix::fs::ftruncate(&file, other), Err(Errno::TXTBSY));
    }
    assert_still(&file, pin.block_map());
    drop(pin);
    end(path, file);
}
