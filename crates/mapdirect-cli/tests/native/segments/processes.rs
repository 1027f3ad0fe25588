//! Other processes: without privilege, killed, beside each other.

use super::*;

/// A terabyte of nothing.
pub(crate) fn sparse(world: &World, kind: Kind) {
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
pub(crate) fn play_probe(arguments: &[String]) -> Result<()> {
    let [socket, path] = arguments else {
        bail!("wrong arguments");
    };
    let file = open(Path::new(path));
    let map = try_map(&Guard::at(socket), &file, 0..4 * PAGE).context("mapping")?;
    probe(&map, &file, &FOUR, PAGE, "unprivileged");
    say("probed");
    Ok(())
}

pub(crate) fn unprivileged(world: &World, kind: Kind) {
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
pub(crate) fn play_store(arguments: &[String]) -> Result<()> {
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
pub(crate) fn killed_by_a_store(world: &World, kind: Kind) {
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
pub(crate) fn growing(world: &World, kind: Kind) {
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
pub(crate) fn neighbours(world: &World, kind: Kind) {
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
pub(crate) fn fails_halfway(world: &World, kind: Kind) {
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
pub(crate) fn play_halfway(arguments: &[String]) -> Result<()> {
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
