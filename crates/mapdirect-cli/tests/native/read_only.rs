//! Mappings for reading alone: for readers who fear that somebody truncates the
//! file under them.

use crate::lifetime::{Holder, fork, freed_at_once, kill};
use crate::segments::{State as Block, make};
use crate::world::{World, is_pinned, kinds, open, patience, wait_until_free, written};
use libtest_mimic::Trial;
use mapdirect::{Advice, DirectMap, ExtentState, Guard, Kind as Reason, MapOptions};
use mapdirect_sys::Errno;
use mapdirect_testkit::attack::{Attack, Door};
use mapdirect_testkit::contract::{Gate, Subject};
use mapdirect_testkit::fault::{Access, load, store};
use mapdirect_testkit::process::{attack_by_stranger, wait_for};
use mapdirect_testkit::{Kind, raw};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};
use std::time::Duration;

const PAGE: u64 = 4096;

pub fn trials(world: &World) -> Vec<Trial> {
    let mut tests: Vec<(&str, crate::world::OnKind)> = vec![
        ("reads-every-block", reads_every_block),
        ("no-store", no_store),
        ("attacked", attacked),
        ("beyond-the-end", beyond_the_end),
        ("whole-file", whole_file),
        ("close-and-unmap", close_and_unmap),
        ("fork-parent-first", fork_parent_first),
        ("fork-child-first", fork_child_first),
        ("exec-and-sigkill", exec_and_sigkill),
        ("writable-descriptor", writable_descriptor),
        ("arguments", arguments),
    ];
    if Gate::under_test() == Gate::Fanotify {
        // The other gate refuses what the test does.
        tests.push(("broken", broken));
    }
    world.trials("read-only", &kinds(&[Kind::XFS, Kind::EXT4]), &tests)
}

fn options(guard: &Guard, range: Range<u64>) -> MapOptions {
    MapOptions::new()
        .read_only(true)
        .range(range)
        .patience(patience())
        .guard(guard.clone())
}

fn read(guard: &Guard, path: &Path, range: Range<u64>) -> DirectMap {
    // Closed when this returns.
    let file = File::open(path).unwrap();
    options(guard, range).map(file).unwrap()
}

fn bytes_of(map: &DirectMap) -> Vec<u8> {
    let mut bytes = vec![0; map.len()];
    map.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// A file with a block of each state, and its bytes.
fn every_state(world: &World, kind: Kind, name: &str) -> (std::path::PathBuf, Vec<u8>) {
    let path = world.disk(kind).path(&format!("read-only-{name}"));
    let mut states = vec![
        Block::Written,
        Block::Hole,
        Block::Unwritten,
        Block::Written,
    ];
    if kind.reflink() {
        states.push(Block::Shared);
    }
    drop(make(&path, PAGE, &states, states.len() as u64 * PAGE));
    let bytes = std::fs::read(&path).unwrap();
    (path, bytes)
}

/// Holes and unwritten blocks read as zeros, all others as what is in them; and
/// reading changes no block.
fn reads_every_block(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, bytes) = every_state(world, kind, "states");
    let reader = File::open(&path).unwrap();
    let before = mapdirect::block_map(&reader, 0..bytes.len() as u64).unwrap();
    for state in [ExtentState::Hole, ExtentState::Unwritten] {
        assert_eq!(before.total(state), PAGE, "{before:?}");
    }
    // A second descriptor would be in the way where blocks can be shared.
    drop(reader);
    let map = read(&guard.client(), &path, 0..bytes.len() as u64);
    let reader = File::open(&path).unwrap();
    assert!(map.is_read_only() && map.state().is_kept());
    assert_eq!(map.block_map(), &before);
    assert_eq!(bytes_of(&map), bytes);
    for (at, byte) in bytes.iter().enumerate().step_by(512) {
        assert_eq!(
            load(map.as_ptr() as usize + at),
            Access::Went(*byte),
            "{at}"
        );
        assert_eq!(map.load::<u8>(at, Acquire).unwrap(), *byte);
    }
    let words = bytes.as_chunks::<8>().0;
    for (at, word) in words.iter().enumerate().step_by(64) {
        let expected = u64::from_ne_bytes(*word);
        assert_eq!(map.load::<u64>(8 * at, SeqCst).unwrap(), expected);
    }
    // What is read ahead, faulted in and locked is not allocated either.
    map.advise(Advice::WillNeed).unwrap();
    map.advise(Advice::PopulateRead).unwrap();
    map.lock().unwrap();
    map.unlock().unwrap();
    let part = map.slice(PAGE_SIZE..2 * PAGE_SIZE).unwrap();
    let mut hole = [1; PAGE_SIZE];
    part.read_exact_at(&mut hole, 0).unwrap();
    assert_eq!(hole, [0; PAGE_SIZE]);
    let after = mapdirect::block_map(&reader, 0..bytes.len() as u64).unwrap();
    assert_eq!(before, after);
    drop((map, reader));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

const PAGE_SIZE: usize = 4096;

/// Nothing can be stored by any call; a pointer raises SIGSEGV, and mprotect(2)
/// does not help.
fn no_store(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, bytes) = every_state(world, kind, "no-store");
    let mut map = read(&guard.client(), &path, 0..bytes.len() as u64);
    let refused = [
        map.write_all_at(b"x", 0),
        map.write_all_at(b"x", PAGE_SIZE),
        map.write_persist_at(b"x", 0),
        map.fill(0..10, 1),
        map.store(1u8, 0, Relaxed),
        map.store(1u64, 8, SeqCst),
        map.fetch_add(1u32, 0, Relaxed).map(drop),
        map.compare_exchange(7u8, 8, 0, SeqCst, Relaxed).map(drop),
        map.flush(),
        map.flush_range(0..10),
        map.flush_async(),
        map.persist(0..10),
        map.advise(Advice::PopulateWrite),
        map.allocate(PAGE..2 * PAGE),
        map.slice(0..10).unwrap().fill(1),
    ];
    for refused in refused {
        let error = refused.unwrap_err();
        assert_eq!(error.errno(), libc::EACCES, "{error:#}");
        assert_eq!(error.kind(), Reason::NotReadWrite);
        assert!(!error.help().is_empty(), "{error:#}");
    }
    map.drain().unwrap();
    for page in 0..bytes.len() / PAGE_SIZE {
        let address = map.as_mut_ptr() as usize + page * PAGE_SIZE;
        // SAFETY: a page of the test's own mapping.
        let stored = unsafe { store(address, 1) };
        assert!(matches!(stored, Access::Segv(_)), "{stored:?}");
        // SAFETY: as above.
        let opened =
            unsafe { raw::mprotect(address, PAGE_SIZE, libc::PROT_READ | libc::PROT_WRITE) };
        assert_eq!(opened, Err(Errno::ACCESS));
    }
    assert_eq!(bytes_of(&map), bytes);
    drop(map);
    wait_until_free(&path);
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    std::fs::remove_file(&path).unwrap();
}

/// What would take blocks or bytes away from under a reader.
const ATTACKS: [&str; 9] = [
    "truncate",
    "truncate-inside-a-page",
    "ftruncate",
    "punch-hole",
    "collapse-range",
    "open-trunc",
    "open-rdonly-trunc",
    "creat",
    "zero-range",
];

/// Other processes are refused, and the reader reads on, at any moment.
fn attacked(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = written(&world.disk(kind), "read-only-attacked", 1 << 20);
    let other = written(&world.disk(kind), "read-only-other", 1 << 20);
    let map = read(&guard.client(), &path, 0..1 << 20);
    let over = std::sync::atomic::AtomicBool::new(false);
    let rounds = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut rounds = 0u32;
            while !over.load(SeqCst) {
                assert!(bytes_of(&map).iter().all(|byte| *byte == 7));
                rounds += 1;
            }
            rounds
        });
        for name in ATTACKS {
            let attack = Attack::by_name(name).unwrap_or_else(|| panic!("no attack {name}"));
            for _ in 0..5 {
                let bytes = (65536, 65536);
                let result =
                    attack_by_stranger(attack, Door::ALL[0], &path, &other, bytes, PAGE).unwrap();
                assert_eq!(result, Err(Errno::TXTBSY), "{name}");
            }
        }
        over.store(true, SeqCst);
        reader.join().unwrap()
    });
    assert!(rounds > 0);
    assert!(map.state().is_kept() && map.integrity().is_intact());
    assert_eq!(load(map.as_ptr() as usize + (1 << 20) - 1), Access::Went(7));
    // With the pin the protection ends, and nothing of it stays behind.
    drop(map);
    wait_until_free(&path);
    let truncate = Attack::by_name("truncate").unwrap();
    let result = attack_by_stranger(truncate, Door::ALL[0], &path, &other, (65536, 65536), PAGE);
    assert_eq!(result.unwrap(), Ok(()));
    for path in [path, other] {
        std::fs::remove_file(path).unwrap();
    }
}

/// Pages beyond the end of the file are an error, not a signal.
fn beyond_the_end(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = written(&world.disk(kind), "read-only-end", 5000);
    let map = read(&guard.client(), &path, 0..4 * PAGE);
    let mut byte = [1];
    map.read_exact_at(&mut byte, 4999).unwrap();
    assert_eq!(byte, [7]);
    map.read_exact_at(&mut byte, 2 * PAGE_SIZE - 1).unwrap();
    assert_eq!(byte, [0], "the rest of the last page");
    let error = map.read_exact_at(&mut byte, 2 * PAGE_SIZE).unwrap_err();
    assert_eq!(error.errno_name(), "EFAULT", "{error:#}");
    assert_eq!(
        load(map.as_ptr() as usize + 2 * PAGE_SIZE),
        Access::BUS_ADRERR
    );
    let error = map.read_exact_at(&mut byte, 4 * PAGE_SIZE).unwrap_err();
    assert_eq!(error.errno_name(), "EINVAL", "{error:#}");
    drop(map);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// The size of the file is pinned as well, if that was asked for.
fn whole_file(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = written(&world.disk(kind), "read-only-whole", 65536);
    let file = File::open(&path).unwrap();
    let map = MapOptions::new()
        .read_only(true)
        .scope(mapdirect::Scope::File)
        .populate(true)
        .patience(patience())
        .guard(guard.client())
        .map(file.as_fd())
        .unwrap();
    let pins = guard.client().pinned_ranges(&file).unwrap();
    assert!(pins.len() == 1 && pins[0].flags.is_whole_file(), "{pins:?}");
    assert!(!pins[0].flags.is_mapped() && !pins[0].flags.is_cached());
    assert_eq!(bytes_of(&map), vec![7; 65536]);
    map.unmap().unwrap();
    freed_at_once(&path);
    std::fs::remove_file(&path).unwrap();
}

fn close_and_unmap(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "read-only-close", 1 << 20);
    let mut holder = Holder::start(&world.guard(), &path, 0, 65536, "read");
    holder.order("close");
    assert!(is_pinned(&path), "closing descriptors changes nothing");
    assert_eq!(holder.order("status"), "kept");
    holder.order("unmap");
    freed_at_once(&path);
    std::fs::remove_file(&path).unwrap();
}

fn fork_parent_first(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "read-only-fork1", 1 << 20);
    let mut holder = Holder::start(&world.guard(), &path, 0, 65536, "read");
    let child = fork(&mut holder);
    holder.order("unmap");
    assert!(is_pinned(&path), "the child shares the pin");
    holder.kill();
    assert!(is_pinned(&path), "the child still shares the pin");
    kill(child);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

fn fork_child_first(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "read-only-fork2", 1 << 20);
    let mut holder = Holder::start(&world.guard(), &path, 0, 65536, "read");
    let child = fork(&mut holder);
    kill(child);
    std::thread::sleep(Duration::from_millis(50));
    assert!(is_pinned(&path), "the parent still maps it");
    holder.order("unmap");
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

fn exec_and_sigkill(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "read-only-exec", 1 << 20);
    let guard = world.guard();
    let mut holder = Holder::start(&guard, &path, 0, 65536, "read");
    assert!(is_pinned(&path));
    holder.order("exec");
    wait_until_free(&path);
    holder.kill();
    let holder = Holder::start(&guard, &path, 0, 65536, "read");
    assert!(is_pinned(&path));
    holder.kill();
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// A descriptor that can write does as well. By the mapping nothing can be
/// written all the same.
fn writable_descriptor(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, bytes) = every_state(world, kind, "writable");
    let file = open(&path);
    let map = options(&guard.client(), 0..bytes.len() as u64)
        .map(&file)
        .unwrap();
    assert_eq!(bytes_of(&map), bytes);
    let address = map.as_mut_ptr() as usize;
    // SAFETY: a page of the test's own mapping.
    let opened = unsafe { raw::mprotect(address, PAGE_SIZE, libc::PROT_READ | libc::PROT_WRITE) };
    assert_eq!(opened, Err(Errno::ACCESS));
    // The holder's own descriptor writes what is stable, and the mapping shows
    // it.
    std::os::unix::fs::FileExt::write_all_at(&file, b"written", 10).unwrap();
    let mut seen = [0; 7];
    map.read_exact_at(&mut seen, 10).unwrap();
    assert_eq!(&seen, b"written");
    assert_eq!(rustix::fs::ftruncate(&file, 0), Err(Errno::TXTBSY));
    drop(file);
    assert!(is_pinned(&path), "closing it changes nothing");
    drop(map);
    freed_at_once(&path);
    std::fs::remove_file(&path).unwrap();
}

fn arguments(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = written(&world.disk(kind), "read-only-arguments", 65536);
    let file = File::open(&path).unwrap();
    let errno = |options: MapOptions, file: &dyn AsFd| {
        let error = options.map(file.as_fd()).unwrap_err();
        assert!(!error.asked().is_empty(), "{error}");
        error.errno_name()
    };
    let of = |range: Range<u64>| options(&guard.client(), range);
    assert_eq!(errno(of(5..5), &file), "EINVAL");
    #[expect(clippy::reversed_empty_ranges, reason = "it must not panic")]
    let reversed = of(8192..4096);
    assert_eq!(errno(reversed, &file), "EINVAL");
    assert_eq!(errno(of(100..4096), &file), "EINVAL");
    assert_eq!(errno(of(0..u64::MAX), &file), "ENOMEM");
    assert_eq!(errno(of(0..4096).prepare_first(true), &file), "EACCES");
    let writer = File::options().write(true).open(&path).unwrap();
    assert_eq!(errno(of(0..4096), &writer), "EACCES");
    drop(writer);
    let flags = rustix::fs::OFlags::PATH;
    let only = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).unwrap();
    assert_eq!(errno(of(0..4096), &only), "EBADF");
    // Without the word the file must be open for writing.
    let mut writable = of(0..4096).accept_page_cache(true);
    writable = writable.read_only(false);
    assert_eq!(errno(writable, &file), "EACCES");
    drop(file);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// When blocks have changed all the same, a reader is told by SIGBUS and EIO.
fn broken(world: &World, kind: Kind) {
    let guard = world.guard();
    let client = guard.client();
    let subject = Subject::new(&world.disk(kind), "read-only-broken", false);
    let map = read(&client, &subject.path, subject.pinned());
    let event = map.event_fd().unwrap();
    let address = map.as_ptr() as usize;
    assert!(matches!(load(address), Access::Went(_)));
    let holder = mapdirect::open(&subject.path, &client).unwrap();
    subject.move_blocks(kind, &holder).unwrap();
    wait_for(Duration::from_secs(5), || {
        Ok(map.state().is_lost().then_some(()))
    })
    .unwrap();
    assert!(event.clear());
    assert!(!map.integrity().is_intact());
    assert_eq!(load(address), Access::BUS_ADRERR);
    let error = map.read_exact_at(&mut [0], 0).unwrap_err();
    assert_eq!((error.errno(), error.kind()), (libc::EIO, Reason::Breached));
    drop((map, holder));
    wait_until_free(&subject.path);
}
