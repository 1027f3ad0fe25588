//! Mappings that are forked, moved, cut up, placed and shrunk.

use super::*;

/// A child shares what can be stored to, and loses no store in what cannot.
pub(crate) fn fork(world: &World, kind: Kind) {
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
pub(crate) fn fork_beside_a_store(world: &World, kind: Kind) {
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

pub(crate) fn mprotect(world: &World, kind: Kind) {
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
pub(crate) fn mremap(world: &World, kind: Kind) {
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
pub(crate) fn madvise(world: &World, kind: Kind) {
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
pub(crate) fn play_close_all(arguments: &[String]) -> Result<()> {
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

pub(crate) fn descriptors_closed(world: &World, kind: Kind) {
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
pub(crate) fn partial_unmap(world: &World, kind: Kind) {
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
pub(crate) fn holes_only(world: &World, kind: Kind) {
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

pub(crate) fn fixed(world: &World, kind: Kind) {
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
pub(crate) fn play_fixed(arguments: &[String]) -> Result<()> {
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
pub(crate) fn aligned(world: &World, kind: Kind) {
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
pub(crate) fn every_other(path: &Path, pages: u64) -> File {
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

pub(crate) fn many(world: &World, kind: Kind) {
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

pub(crate) fn too_many(world: &World, kind: Kind) {
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
