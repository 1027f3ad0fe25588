//! The library's calls on real files: what they store, what they refuse, and
//! that what they say is true.

use crate::lifetime::freed_at_once;
use crate::segments::{State as Block, make};
use crate::world::{World, is_pinned, kinds, map, open, patience, pin, wait_until_free, written};
use libtest_mimic::Trial;
use mapdirect::{Advice, Kind as Reason, MapOptions, Pin, PinOptions, PrepareOptions, State};
use mapdirect_testkit::Kind;
use mapdirect_testkit::process::wait_for;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};

const PAGE: usize = 4096;

pub fn trials(world: &World) -> Vec<Trial> {
    world.trials(
        "api",
        &kinds(&[Kind::XFS, Kind::EXT4]),
        &[
            ("bytes", bytes),
            ("integers", integers),
            ("frozen", frozen),
            ("flush", flush),
            ("advise-and-lock", advise_and_lock),
            ("all-pinned-ranges", all_pinned_ranges),
            ("unpin", unpin),
            ("ranges-that-are-none", ranges_that_are_none),
            ("errors", errors),
        ],
    )
}

/// What is written, filled and stored by slices is what the file holds.
fn bytes(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = written(&world.disk(kind), "api-bytes", 1 << 16);
    let file = open(&path);
    let map = map(&guard.client(), &file, 4096..65536);
    assert_eq!((map.offset(), map.len()), (4096, 65536 - 4096));
    assert!(!map.is_read_only());
    map.write_all_at(b"hello", 4093).unwrap();
    map.fill(100..4000, 1).unwrap();
    let slice = map.slice(8000..9000).unwrap();
    let (first, second) = slice.split_at(500).unwrap();
    first.fill(2).unwrap();
    second.write_all_at(b"second", 494).unwrap();
    assert_eq!((second.len(), second.is_empty()), (500, false));
    assert!(slice.slice(7..7).unwrap().is_empty());
    let mut seen = [0; 6];
    second.read_exact_at(&mut seen, 494).unwrap();
    assert_eq!(&seen, b"second");
    map.flush().unwrap();
    let mut expected = vec![7; 65536];
    expected[4096 + 4093..4096 + 4098].copy_from_slice(b"hello");
    expected[4096 + 100..4096 + 4000].fill(1);
    expected[4096 + 8000..4096 + 8500].fill(2);
    expected[4096 + 8994..4096 + 9000].copy_from_slice(b"second");
    let mut there = vec![0; 65536];
    file.read_exact_at(&mut there, 0).unwrap();
    assert!(there == expected);
    // SAFETY: nobody changes the file meanwhile.
    assert!(unsafe { map.as_slice() } == &expected[4096..]);
    assert_eq!(map.as_ptr(), map.as_mut_ptr().cast_const());
    assert_eq!(slice.as_ptr() as usize, map.as_ptr() as usize + 8000);
    let inval = |result: mapdirect::Result<()>| {
        let error = result.unwrap_err();
        assert_eq!(error.errno_name(), "EINVAL", "{error:#}");
    };
    let length = map.len();
    inval(map.write_all_at(b"12", length - 1));
    inval(map.read_exact_at(&mut [0; 2], usize::MAX));
    inval(map.fill(length..length + 1, 0));
    inval(map.slice(0..length + 1).map(drop));
    inval(second.write_all_at(b"1", 500));
    inval(second.read_exact_at(&mut [0; 2], 499));
    inval(second.store(1u32, 500, Relaxed));
    inval(slice.split_at(1001).map(drop));
    inval(slice.slice(10..1001).map(drop));
    map.write_all_at(b"", length).unwrap();
    drop((map, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// Integers are in the file as they were stored, and add up when processes and
/// threads add to them.
fn integers(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = written(&world.disk(kind), "api-integers", PAGE);
    let file = open(&path);
    let map = map(&guard.client(), &file, 0..4096);
    map.fill(0..PAGE, 0).unwrap();
    map.store(0x1122_3344_5566_7788u64, 8, Release).unwrap();
    map.store(-5i16, 18, SeqCst).unwrap();
    assert_eq!(map.load::<u64>(8, Acquire).unwrap(), 0x1122_3344_5566_7788);
    assert_eq!(map.load::<i16>(18, SeqCst).unwrap(), -5);
    let exchanged = map.compare_exchange(-5i16, 6, 18, AcqRel, Acquire).unwrap();
    assert_eq!(exchanged, Ok(-5));
    let refused = map.compare_exchange(-5i16, 7, 18, AcqRel, Acquire).unwrap();
    assert_eq!(refused, Err(6));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let counters = map.slice(64..128).unwrap();
                for round in 0..1000u32 {
                    counters.fetch_add(1u32, 0, Relaxed).unwrap();
                    counters.fetch_add(1u8, 4, Relaxed).unwrap();
                    counters.fetch_add(u64::from(round), 8, Relaxed).unwrap();
                }
            });
        }
    });
    for offset in [1, 2, 3, 5] {
        let error = map.load::<u32>(offset, Relaxed).unwrap_err();
        assert_eq!(error.errno_name(), "EINVAL", "{error:#}");
        assert!(map.store(1u64, offset, Relaxed).is_err());
    }
    map.flush_range(0..128).unwrap();
    let mut there = [0; 128];
    file.read_exact_at(&mut there, 0).unwrap();
    assert_eq!(there[8..16], 0x1122_3344_5566_7788u64.to_ne_bytes());
    assert_eq!(there[18..20], 6i16.to_ne_bytes());
    assert_eq!(there[64..68], 4000u32.to_ne_bytes());
    assert_eq!(there[68], u8::try_from(4000 % 256).unwrap());
    assert_eq!(there[72..80], (4 * 499_500u64).to_ne_bytes());
    drop((map, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// A frozen block is an error for every call that stores, and is left alone by
/// advice.
fn frozen(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = world.disk(kind).path("api-frozen");
    let states = [
        Block::Written,
        Block::Hole,
        Block::Unwritten,
        Block::Written,
    ];
    let file = make(&path, 4096, &states, 4 * 4096);
    let mut held = map(&guard.client(), &file, 0..4 * 4096);
    for refused in [
        held.write_all_at(b"xx", PAGE - 1),
        held.fill(0..2 * PAGE, 1),
        held.store(1u32, PAGE, SeqCst),
        held.fetch_add(1u8, 2 * PAGE, SeqCst).map(drop),
        held.slice(PAGE..2 * PAGE).unwrap().fill(1),
    ] {
        let error = refused.unwrap_err();
        assert_eq!(error.errno(), libc::ETXTBSY, "{error:#}");
        assert_eq!(error.kind(), Reason::FrozenBlocks);
    }
    let before = held.block_map().clone();
    held.advise(Advice::PopulateWrite).unwrap();
    held.lock().unwrap();
    held.flush().unwrap();
    held.unlock().unwrap();
    assert_eq!(held.load::<u64>(PAGE, Acquire).unwrap(), 0);
    assert_eq!(
        before.extents(),
        mapdirect::block_map(&file, before.range())
            .unwrap()
            .extents()
    );
    // Bytes of the file, wherever the mapping begins.
    held.allocate(4096..8192).unwrap();
    held.store(1u32, PAGE, SeqCst).unwrap();
    drop(held);
    let mut later = map(&guard.client(), &file, 8192..4 * 4096);
    let error = later.allocate(0..4096).unwrap_err();
    assert_eq!(error.errno_name(), "EINVAL", "{error:#}");
    later.allocate(8192..12_288).unwrap();
    later.store(1u32, 0, SeqCst).unwrap();
    assert!(later.block_map().is_stable());
    drop((later, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// What was flushed is on the medium: the page cache has nothing dirty left.
fn flush(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = written(&world.disk(kind), "api-flush", 64 * PAGE);
    let file = open(&path);
    let map = map(&guard.client(), &file, 0..64 * 4096);
    for round in 0..3u8 {
        for page in 0..64 {
            map.write_all_at(&[round; 10], page * PAGE).unwrap();
            map.flush_async_range(page * PAGE..page * PAGE + 10)
                .unwrap();
        }
        map.drain().unwrap();
        map.drain().unwrap();
        map.write_all_at(&[round; 10], 100).unwrap();
        map.flush_async().unwrap();
        map.drain().unwrap();
        map.write_persist_at(&[round; 10], 200).unwrap();
        map.write_all_at(&[round; 10], 300).unwrap();
        map.persist(300..310).unwrap();
        if !kind.is_dax() {
            match unwritten_pages(&file) {
                Some(pages) => assert_eq!(pages, 0, "round {round}"),
                None => world.unavailable(String::from("cachestat(2), to see what is dirty")),
            }
        }
    }
    map.flush_range(5..5).unwrap();
    drop((map, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// How many pages of a file are dirty or being written, if the kernel tells
/// (cachestat(2), Linux 6.5).
fn unwritten_pages(file: &File) -> Option<u64> {
    const SYS_CACHESTAT: libc::c_long = 451;
    let whole = [0u64; 2];
    let mut found = [0u64; 5];
    // SAFETY: a range and room for what is counted, as the call wants them.
    let answer = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            whole.as_ptr(),
            found.as_mut_ptr(),
            0,
        )
    };
    (answer == 0).then(|| found[1] + found[2])
}

fn advise_and_lock(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = written(&world.disk(kind), "api-advise", 64 * PAGE);
    let file = open(&path);
    let map = map(&guard.client(), &file, 0..64 * 4096);
    for advice in [
        Advice::Normal,
        Advice::Random,
        Advice::Sequential,
        Advice::WillNeed,
        Advice::PopulateRead,
        Advice::PopulateWrite,
        Advice::DontDump,
        Advice::DoDump,
    ] {
        map.advise(advice)
            .unwrap_or_else(|error| panic!("{advice:?}: {error:#}"));
        map.advise_range(advice, 5000..9000).unwrap();
    }
    if !kind.is_dax() {
        // Mappings of the media take neither.
        map.advise(Advice::Cold).unwrap();
        map.advise(Advice::PageOut).unwrap();
    }
    let locked = || {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let name = path.to_string_lossy().into_owned();
        let mut mine = false;
        let mut total = 0;
        for line in smaps.lines() {
            match line.split_once(':') {
                Some(("Locked", value)) if mine => {
                    let kilobytes = value.trim().trim_end_matches(" kB");
                    total += kilobytes.parse::<u64>().unwrap();
                }
                _ if line.contains('/') => mine = line.ends_with(&name),
                _ => {}
            }
        }
        total
    };
    map.lock().unwrap();
    if !kind.is_dax() {
        assert_eq!(locked(), 256);
    }
    map.unlock().unwrap();
    assert_eq!(locked(), 0);
    let length = map.len();
    let error = map.advise_range(Advice::Normal, 0..length + 1).unwrap_err();
    assert_eq!(error.errno_name(), "EINVAL", "{error:#}");
    drop((map, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// More ranges than fit into a message are told all the same.
fn all_pinned_ranges(world: &World, kind: Kind) {
    const COUNT: u64 = 600;
    let guard = world.guard();
    let client = guard.client();
    let path = written(
        &world.disk(kind),
        "api-many",
        usize::try_from(COUNT * 4096).unwrap(),
    );
    let file = open(&path);
    let pins: Vec<Pin> = (0..COUNT)
        .map(|at| pin(&client, &file, at * 4096..(at + 1) * 4096))
        .collect();
    let ranges = client.pinned_ranges(&file).unwrap();
    assert_eq!(ranges.len(), pins.len());
    let mut starts: Vec<u64> = ranges.iter().map(|pinned| pinned.range.start).collect();
    starts.sort_unstable();
    assert!(
        starts
            .iter()
            .enumerate()
            .all(|(at, start)| *start == at as u64 * 4096)
    );
    let own = i32::try_from(std::process::id()).unwrap();
    assert!(ranges.iter().all(|pinned| pinned.pid == own));
    drop(pins);
    wait_for(patience(), || {
        let left = client.pinned_ranges(file.as_fd())?;
        Ok(left.is_empty().then_some(()))
    })
    .unwrap();
    drop(file);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

fn unpin(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = written(&world.disk(kind), "api-unpin", 65536);
    let file = File::open(&path).unwrap();
    let pin = pin(&guard.client(), &file, 0..65536);
    assert!(is_pinned(&path));
    assert_eq!(pin.state(), State::Kept);
    assert_eq!(
        pin.reconnect().unwrap(),
        State::Kept,
        "there is nothing to do"
    );
    pin.unpin().unwrap();
    freed_at_once(&path);
    std::fs::remove_file(&path).unwrap();
}

/// No range, however odd, makes a call panic.
#[expect(clippy::reversed_empty_ranges, reason = "that is what is tried")]
fn ranges_that_are_none(world: &World, kind: Kind) {
    let guard = world.guard();
    let client = guard.client();
    let path = written(&world.disk(kind), "api-ranges", 65536);
    let file = open(&path);
    let inval = |error: mapdirect::Error| {
        assert_eq!(error.errno_name(), "EINVAL", "{error:#}");
        assert_eq!(error.kind(), Reason::Arguments);
        assert!(
            !error.help().is_empty() && !error.asked().is_empty(),
            "{error:#}"
        );
    };
    for range in [10..5, 5..5, u64::MAX..0] {
        inval(
            PinOptions::new()
                .range(range.clone())
                .guard(client.clone())
                .pin(&file)
                .unwrap_err(),
        );
        inval(Pin::new(&file, range.clone()).unwrap_err());
        inval(mapdirect::block_map(&file, range.clone()).unwrap_err());
        inval(mapdirect::prepare(&file, range.clone()).unwrap_err());
        inval(
            PrepareOptions::new()
                .range(range.clone())
                .prepare(file.as_fd())
                .unwrap_err(),
        );
        let options = MapOptions::new()
            .accept_page_cache(true)
            .guard(client.clone());
        inval(options.range(range).map(&file).unwrap_err());
    }
    let mut pinned = pin(&client, &file, 0..65536);
    inval(pinned.allocate(10..5).unwrap_err());
    pinned.allocate(5..5).unwrap();
    drop(pinned);
    let mut held = map(&client, &file, 0..65536);
    inval(held.allocate(10..5).unwrap_err());
    inval(held.allocate(u64::MAX..0).unwrap_err());
    held.allocate(5..5).unwrap();
    for refused in [
        held.flush_range(10..5),
        held.flush_async_range(10..5),
        held.persist(usize::MAX..0),
        held.fill(10..5, 0),
        held.slice(10..5).map(drop),
        held.advise_range(Advice::Normal, 10..5),
    ] {
        inval(refused.unwrap_err());
    }
    drop((held, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// An error keeps its errno in an `io::Error`, and its words when asked to.
fn errors(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = written(&world.disk(kind), "api-errors", 65536);
    let file = open(&path);
    if kind.is_dax() {
        return;
    }
    let mapped = || {
        MapOptions::new()
            .accept_page_cache(false)
            .guard(guard.client())
            .map(&file)
    };
    let through_io = || -> io::Result<()> {
        mapped().map(drop)?;
        Ok(())
    };
    let error = through_io().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
    let error = mapped().unwrap_err();
    assert_eq!(error.kind(), Reason::NoDax);
    let all = format!("{error:#}");
    assert!(all.contains("\n  help: "), "{all}");
    assert!(all.contains(&*path.to_string_lossy()), "{all}");
    let with_words = error.into_io_error_with_words();
    assert_eq!(with_words.kind(), io::ErrorKind::Unsupported);
    assert!(all.starts_with(&with_words.to_string()), "{with_words}");
    drop(file);
    std::fs::remove_file(&path).unwrap();
}
