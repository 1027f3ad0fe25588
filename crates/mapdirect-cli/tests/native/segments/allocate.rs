//! Frozen blocks made stable under a mapping.

use super::*;

/// Piece by piece, in any order: what was asked for can be stored to, and
/// nothing else has changed.
pub(crate) fn allocate(world: &World, kind: Kind) {
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
pub(crate) struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// The pages of the range are stable; what was stable is where it was; what
/// else was frozen is what it was, but for ext4, which converts whole extents
/// that are small.
pub(crate) fn check_allocated(before: &BlockMap, now: &BlockMap, range: &Range<usize>, kind: Kind) {
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

pub(crate) fn allocate_arguments(world: &World, kind: Kind) {
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

pub(crate) fn wait_until_free_of(file: File, path: &Path) {
    drop(file);
    wait_until_free(path);
    std::fs::remove_file(path).unwrap();
}

/// No room: nothing changes.
pub(crate) fn allocate_without_room(world: &World, kind: Kind) {
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
pub(crate) fn allocate_beside_a_pin(world: &World, kind: Kind) {
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
pub(crate) fn allocate_under_attack(world: &World, kind: Kind) {
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
pub(crate) fn prepared(world: &World, kind: Kind) {
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
pub(crate) fn pin_allocates(world: &World, kind: Kind) {
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
