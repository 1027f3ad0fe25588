//! Files of every mix of blocks, and sizes.

use super::*;

pub(crate) fn any_mix(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = disk.path("prepare-mix");
    let other = disk.path("prepare-mix.sharer");
    let block = kind.block();
    let mut seen = [0; 3];
    for seed in 0..40 {
        let mut random = Random::new(seed);
        let (file, sharer) = (new_file(&path), new_file(&other));
        let size = block * 8 + random.below(200 * block);
        let bytes = mixed(&mut random, &file, &sharer, size, block);
        let range = match random.below(3) {
            0 => 0..size,
            _ => {
                let start = random.below(size);
                start..start + 1 + random.below(size - start)
            }
        };
        let shared_bytes = contents(&other);
        let before_of_sharer = synced(&sharer);
        let before = synced(&file);
        let prepared = mapdirect::prepare(&file, range.clone()).unwrap();
        assert_stable(&file, &prepared, range.clone(), block);
        assert!(contents(&path) == bytes, "seed {seed}: bytes changed");
        assert_eq!(file.metadata().unwrap().len(), size, "seed {seed}");
        let counted = |state| {
            let rounded = prepared.block_map().range();
            before
                .extents()
                .iter()
                .filter(|extent| extent.state == state)
                .filter_map(|extent| extent.clipped(&rounded))
                .map(|extent| extent.length)
                .sum::<u64>()
        };
        // The map before ends with the file, not with its last block.
        let slack = size.next_multiple_of(block) - size;
        let close = |done: u64, state| {
            let expected = counted(state);
            assert!(
                done == expected || done == expected + slack,
                "seed {seed}: {done} bytes were {state}, not {expected}"
            );
        };
        close(prepared.allocated(), ExtentState::Hole);
        close(prepared.converted(), ExtentState::Unwritten);
        close(prepared.unshared(), ExtentState::Shared);
        seen[0] += prepared.allocated();
        seen[1] += prepared.converted();
        seen[2] += prepared.unshared();
        // Who shared blocks keeps his, though they may be his alone now.
        assert!(contents(&other) == shared_bytes, "seed {seed}: the sharer");
        let after_of_sharer = synced(&sharer);
        let places = |map: &BlockMap| -> Vec<_> {
            let alone = |extent: &mapdirect::Extent| match extent.state {
                ExtentState::Shared => ExtentState::Written,
                state => state,
            };
            let range = map.range();
            let extents = map.extents().iter().map(|extent| {
                mapdirect::Extent::new(extent.offset, extent.physical, extent.length, alone(extent))
            });
            BlockMap::new(map.device(), map.block_size(), 0, range, extents)
                .extents()
                .to_vec()
        };
        assert_eq!(places(&after_of_sharer), places(&before_of_sharer));
        // Once more there is nothing to do.
        let again = mapdirect::prepare(&file, range).unwrap();
        let done = again.allocated() + again.converted() + again.unshared();
        assert_eq!(done, 0, "seed {seed}");
        assert_eq!(again.block_map(), prepared.block_map(), "seed {seed}");
    }
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
    assert_eq!(seen[2] > 0, kind.reflink(), "{seen:?}");
    world.count("files of mixed blocks prepared", 40);
    std::fs::remove_file(&path).unwrap();
    std::fs::remove_file(&other).unwrap();
}

pub(crate) fn sizes(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = disk.path("prepare-sizes");
    let block = kind.block();
    for (old, size) in [
        (0, 1),
        (1, 1),
        (1, 2),
        (0, block),
        (100, 3 * block),
        (block + 1, 10 * block - 1),
        (5000, 3 << 20),
        (0, (1 << 20) + 77),
    ] {
        let file = new_file(&path);
        let mut bytes = vec![9; usize::try_from(old).unwrap()];
        file.write_all_at(&bytes, 0).unwrap();
        let options = PrepareOptions::new().size(size);
        let prepared = options.prepare(&file).unwrap();
        assert_stable(&file, &prepared, 0..size, block);
        bytes.resize(usize::try_from(size).unwrap(), 0);
        assert!(contents(&path) == bytes, "{old} to {size}");
    }
    // A range of what is added, and the rest stays a hole.
    let file = new_file(&path);
    file.write_all_at(&[1; 10], 0).unwrap();
    let range = 40 * block + 5..50 * block;
    let options = PrepareOptions::new().size(100 * block).range(range.clone());
    let prepared = options.prepare(&file).unwrap();
    assert_stable(&file, &prepared, range, block);
    assert_eq!(file.metadata().unwrap().len(), 100 * block);
    let middle = mapdirect::block_map(&file, 64 * block..96 * block).unwrap();
    assert_eq!(middle.total(ExtentState::Hole), 32 * block);
    // One byte in the middle of a hole: its block, not its neighbours' pages
    // more than a page holds.
    let file = new_file(&path);
    file.set_len(1 << 20).unwrap();
    let prepared = mapdirect::prepare(&file, 70_000..70_001).unwrap();
    assert_stable(&file, &prepared, 70_000..70_001, block);
    assert_eq!(prepared.allocated(), block);
    let around = mapdirect::block_map(&file, 0..1 << 20).unwrap();
    // A fault makes all of a folio dirty; Linux 6.12 has made one of 16 KiB.
    let folio = if uname::version() < (6, 18) { 65536 } else { 1 };
    let page = mapdirect_sys::mmap::page_size().max(block).max(folio);
    assert!(
        (1 << 20) - around.total(ExtentState::Hole) <= page,
        "{around:?}"
    );
    std::fs::remove_file(&path).unwrap();
}

pub(crate) fn refused(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = written(&disk, "prepare-refused", 10_000);
    let errno = |result: mapdirect::Result<Prepared>, expected: Errno, words: &str| {
        let error = result.unwrap_err();
        assert_eq!(error.errno(), expected.raw_os_error(), "{error:#}");
        let text = format!("{error:#}");
        assert!(text.contains(words), "{text}");
        assert!(text.starts_with("cannot prepare "), "{text}");
        error
    };
    let whole = PrepareOptions::new();
    let for_reading = File::open(&path).unwrap();
    errno(
        whole.prepare(&for_reading),
        Errno::ACCESS,
        "reading and writing",
    );
    let for_writing = File::options().write(true).open(&path).unwrap();
    errno(
        whole.prepare(&for_writing),
        Errno::ACCESS,
        "reading and writing",
    );
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let path_only = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).unwrap();
    errno(whole.prepare(&path_only), Errno::BADF, "O_PATH");
    let file = open(&path);
    let before = synced(&file);
    let range = |range| PrepareOptions::new().range(range);
    errno(range(5..5).prepare(&file), Errno::INVAL, "empty");
    errno(
        range(0..10_001).prepare(&file),
        Errno::INVAL,
        "beyond the end",
    );
    let beyond = range(0..10_002).size(10_001).prepare(&file);
    errno(beyond, Errno::INVAL, "beyond the end of the file at 10001");
    let shorter = PrepareOptions::new().size(9_999).prepare(&file);
    errno(shorter, Errno::INVAL, "never shrinks");
    let largest = PrepareOptions::new().size(u64::MAX).prepare(&file);
    errno(largest, Errno::FBIG, "that large");
    let empty = new_file(&disk.path("prepare-refused.empty"));
    errno(whole.prepare(&empty), Errno::INVAL, "empty");
    let elsewhere = tempfile("/dev/shm/mapdirect-prepare-refused");
    let error = errno(whole.prepare(&elsewhere), Errno::OPNOTSUPP, "tmpfs");
    assert_eq!(error.kind(), Reason::Filesystem);
    let device = File::options().read(true).write(true).open("/dev/zero");
    errno(
        whole.prepare(device.unwrap()),
        Errno::OPNOTSUPP,
        "regular file",
    );
    assert_eq!(synced(&file), before);
    assert!(contents(&path) == vec![7; 10_000]);
    drop(empty);
    std::fs::remove_file(disk.path("prepare-refused.empty")).unwrap();
    std::fs::remove_file(&path).unwrap();
}

/// A file without a name.
pub(crate) fn tempfile(path: &str) -> File {
    let file = new_file(Path::new(path));
    file.write_all_at(b"x", 0).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

/// Bytes free on the filesystem, once it has come to rest: XFS frees what was
/// deleted by and by.
pub(crate) fn free_space(disk: &Disk) -> u64 {
    let free = || {
        rustix::fs::sync();
        let stat = rustix::fs::statvfs(disk.root()).unwrap();
        stat.f_bfree * stat.f_frsize
    };
    let mut last = free();
    loop {
        std::thread::sleep(Duration::from_millis(50));
        let now = free();
        if now == last {
            return now;
        }
        last = now;
    }
}

/// What is known to be too much is refused before anything is touched.
pub(crate) fn no_space(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = written(&disk, "prepare-no-space", 10_000);
    let file = open(&path);
    let before = (synced(&file), file.metadata().unwrap());
    let options = PrepareOptions::new().size(10 << 30).exclusive(true);
    let error = options.prepare(&file).unwrap_err();
    assert_eq!(error.errno(), Errno::NOSPC.raw_os_error(), "{error:#}");
    assert_eq!(error.kind(), Reason::NoSpace);
    let words: Vec<_> = error.obstacle().split(' ').collect();
    let missing: u64 = words[0].parse().unwrap();
    assert!((9 << 30..10 << 30).contains(&missing), "{error:#}");
    assert!(error.obstacle().contains("are missing"), "{error:#}");
    let after = file.metadata().unwrap();
    assert_eq!(synced(&file), before.0);
    assert_eq!(after.mtime_nsec(), before.1.mtime_nsec(), "it was touched");
    assert_eq!(after.blocks(), before.1.blocks());
    // A file that is not there is not left behind either.
    let new = disk.path("prepare-no-space.new");
    let output = mapdirect(&[text(&new), "--size", "10G"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(complaint(&output).contains("are missing"), "{output:?}");
    assert!(!new.exists());
    std::fs::remove_file(&path).unwrap();
}

/// What turns out to be too much on the way is given back, if that can cost
/// nobody a byte: as many bytes as are free, of which every filesystem keeps
/// some.
pub(crate) fn space_runs_out(_world: &World, kind: Kind) {
    let megabytes = if kind.is_xfs() { 320 } else { 100 };
    let disk = Disk::new(kind, megabytes).unwrap();
    let path = disk.path("file");
    let file = new_file(&path);
    file.write_all_at(&[5; 70_000], 333_333).unwrap();
    fallocate::allocate(file.as_fd(), &(1 << 20..2 << 20)).unwrap();
    file.set_len((2 << 20) + 5).unwrap();
    let before = synced(&file);
    let bytes = contents(&path);
    let free = free_space(&disk);
    // ext4 does not make a tree of extents lower again.
    let grace = if kind.is_xfs() { 0 } else { 2 * kind.block() };
    let assert_as_found = |file: &File| {
        assert_eq!(synced(file), before, "the block map");
        assert!(contents(&path) == bytes, "the bytes");
        let now = free_space(&disk);
        assert!(now + grace >= free, "{} bytes are gone", free - now);
    };
    // All that is free: XFS has something to the last block, ext4 sets some
    // aside for itself.
    let end = before.file_size().next_multiple_of(kind.block());
    let blocks = mapdirect::block_map(&file, 0..end).unwrap();
    let all = end + free - blocks.total(ExtentState::Hole) - 4 * grace;
    let size = all.to_string();
    let full = |output: &Output| {
        let text = complaint(output);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(text.contains("ENOSPC"), "{text}");
        assert!(text.contains("the filesystem is full"), "{text}");
        text
    };
    // Somebody else has it open, and may store to any of it.
    let output = mapdirect(&[text(&path), "--size", &size]).output().unwrap();
    let words = full(&output);
    assert!(words.contains("somebody else has the file open"), "{words}");
    assert!(words.contains("stay allocated"), "{words}");
    assert!(contents(&path) == bytes, "the bytes");
    assert_eq!(file.metadata().unwrap().len(), before.file_size());
    assert!(free_space(&disk) < free / 2);
    restore(&file, &before);
    assert_as_found(&file);
    // Who shares the description is somebody else as well.
    let shared = PrepareOptions::new().size(size.parse().unwrap());
    let error = shared.prepare(&file).unwrap_err();
    assert!(error.obstacle().contains("exclusive"), "{error:#}");
    restore(&file, &before);
    assert_as_found(&file);
    drop(file);
    let output = mapdirect(&[text(&path), "--size", &size]).output().unwrap();
    let words = full(&output);
    assert!(words.contains("is given back"), "{words}");
    assert_as_found(&open(&path));
    // The same in the middle of a file.
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(size.parse().unwrap())
        .unwrap();
    let output = mapdirect(&[text(&path)]).output().unwrap();
    let words = full(&output);
    assert!(words.contains("is given back"), "{words}");
    let file = open(&path);
    assert_eq!(file.metadata().unwrap().len().to_string(), size);
    file.set_len(before.file_size()).unwrap();
    assert_as_found(&file);
    drop(file);
    // Less than all works.
    let size = (all / 2).to_string();
    let output = mapdirect(&[text(&path), "--size", &size]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    disk.unmount().unwrap();
}

/// Makes holes where there were some, and frees what lies beyond the end.
pub(crate) fn restore(file: &File, before: &BlockMap) {
    for extent in before.extents() {
        if extent.state == ExtentState::Hole {
            let end = extent.end().next_multiple_of(before.block_size().into());
            fallocate::punch(file.as_fd(), &(extent.offset..end)).unwrap();
        }
    }
    file.set_len(before.file_size()).unwrap();
}
