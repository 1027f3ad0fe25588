//! Others who read, write, clone and truncate meanwhile.

use super::*;

/// A file with all there is to do: 16 MiB, in pieces.
pub(crate) fn patchwork(path: &Path) -> (File, Vec<u8>) {
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
pub(crate) fn readers(world: &World, kind: Kind) {
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
pub(crate) fn play_writer(arguments: &[String]) -> Result<()> {
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
pub(crate) fn writers(world: &World, kind: Kind) {
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
pub(crate) fn killed(world: &World, kind: Kind) {
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
pub(crate) fn aligned(map: &BlockMap) -> (u64, u64) {
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

pub(crate) fn assert_huge(prepared: &Prepared, at_least: u64) {
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
pub(crate) fn huge(_world: &World, kind: Kind) {
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
pub(crate) fn huge_beside_data(_world: &World, kind: Kind) {
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
pub(crate) fn truncated(world: &World, kind: Kind) {
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
pub(crate) fn extended(world: &World, kind: Kind) {
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
pub(crate) fn cloned(world: &World, kind: Kind) {
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
