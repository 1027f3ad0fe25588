//! What the block map must not do while it is granted.

use super::*;

/// More extents than a message holds.
pub(crate) fn many_extents(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = disk.path("grants-extents");
    let guard = world.guard().client();
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    const EXTENTS: u64 = 2000;
    for number in 0..EXTENTS {
        file.write_all_at(&[5; 4096], number * 8192).unwrap();
    }
    file.sync_all().unwrap();
    let held = pin(&guard, &file, 0..EXTENTS * 8192);
    assert_eq!(held.extents().len() as u64, 2 * EXTENTS);
    let read = mapdirect::block_map(&file, 0..EXTENTS * 8192).unwrap();
    assert_eq!(*held.block_map(), read);
    // A write to any of the holes is refused, to any of the rest is not.
    for number in (0..EXTENTS).step_by(97) {
        let written = rustix::io::pwrite(&file, b"x", number * 8192);
        // What XFS allocates ahead of the end of the file stays unwritten.
        let coarse = Gate::under_test() == Gate::Bpf && dirties_whole_folios(kind);
        let too_near = coarse && written == Err(Errno::TXTBSY);
        assert!(written == Ok(1) || too_near, "{written:?}");
        let refused = rustix::io::pwrite(&file, b"x", number * 8192 + 4096);
        assert_eq!(refused, Err(Errno::TXTBSY));
    }
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}

pub(crate) fn rounding(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "rounding");
    let guard = world.guard().client();
    let file = open(&path);
    let held = pin(&guard, &file, 5000..5001);
    assert_eq!(held.range(), 4096..8192);
    let punch = |offset| raw::fallocate(file.as_fd(), 3, offset, 4096);
    assert_eq!(punch(4096), Err(Errno::TXTBSY));
    assert_eq!(punch(0), Ok(()));
    assert_eq!(punch(8192), Ok(()));
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}

pub(crate) fn beyond_the_end(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = written(&disk, "grants-beyond", 10_000);
    let guard = world.guard().client();
    let file = open(&path);
    let held = pin(&guard, &file, 0..1 << 20);
    assert_eq!(
        held.block_map().total(ExtentState::Hole),
        (1 << 20) - 12_288
    );
    // The end of the pin is capped by the size.
    assert_eq!(rustix::fs::ftruncate(&file, 9_999), Err(Errno::TXTBSY));
    assert_eq!(rustix::fs::ftruncate(&file, 10_000), Ok(()));
    assert_eq!(rustix::fs::ftruncate(&file, 2 << 20), Ok(()));
    assert_eq!(rustix::io::pwrite(&file, b"x", 20_000), Err(Errno::TXTBSY));
    assert_eq!(rustix::io::pwrite(&file, b"x", 1 << 20), Ok(1));
    let after = mapdirect::block_map(&file, 0..1 << 20).unwrap();
    assert_eq!(held.extents(), after.extents());
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}

/// What XFS allocated beyond the end of the file, ahead of need, would become
/// part of it when it grows; what somebody asked for there stays.
pub(crate) fn allocated_ahead(world: &World) {
    let disk = world.disk(Kind::XFS);
    let path = disk.path("grants-ahead");
    let guard = world.guard().client();
    let file = File::create_new(&path).unwrap();
    // Appending in small pieces makes XFS allocate generously.
    for number in 0..256u64 {
        file.write_all_at(&[3; 4096], number * 4096).unwrap();
    }
    file.sync_all().unwrap();
    let ahead = mapdirect::block_map(&file, 1 << 20..8 << 20).unwrap();
    if ahead.total(ExtentState::Hole) == 7 << 20 {
        world.unavailable(String::from("speculative preallocation on xfs"));
    }
    let held = pin(&guard, &file, 0..8 << 20);
    assert_eq!(held.block_map().total(ExtentState::Hole), 7 << 20);
    rustix::fs::ftruncate(&file, 8 << 20).unwrap();
    let grown = mapdirect::block_map(&file, 0..8 << 20).unwrap();
    assert_eq!(grown.extents(), held.extents());
    drop(held);
    // A child of another test has it until it gets to its exec.
    wait_until_free(&path);
    rustix::fs::ftruncate(&file, 1 << 20).unwrap();
    raw::fallocate(file.as_fd(), 1, 1 << 20, 1 << 20).unwrap();
    let held = pin(&guard, &file, 0..8 << 20);
    assert_eq!(held.block_map().total(ExtentState::Unwritten), 1 << 20);
    rustix::fs::ftruncate(&file, 8 << 20).unwrap();
    let grown = mapdirect::block_map(&file, 0..8 << 20).unwrap();
    assert_eq!(grown.extents(), held.extents());
    drop(held);
    // A copy that cannot share blocks is a write, for which XFS allocates
    // ahead as well: into holes behind the end of the file.
    let source = written(&disk, "grants-ahead-source", 65536);
    let source = open(&source);
    for (from, length) in [(100, 100), (5000, 100), (100, 5000)] {
        rustix::fs::ftruncate(&file, 372_736).unwrap();
        let held = pin(&guard, &file, 454_656..471_040);
        let (mut from, mut to) = (from, 446_464);
        let copied =
            rustix::fs::copy_file_range(&source, Some(&mut from), &file, Some(&mut to), length);
        assert!(matches!(copied, Ok(_) | Err(Errno::TXTBSY)), "{copied:?}");
        let now = mapdirect::block_map(&file, 454_656..471_040).unwrap();
        assert_eq!(now.extents(), held.extents(), "after a copy: {copied:?}");
        drop(held);
    }
    // That somebody asked for blocks behind the end keeps those, and does not
    // keep XFS from allocating ahead.
    rustix::fs::ftruncate(&file, 372_736).unwrap();
    raw::fallocate(file.as_fd(), 1, 372_736, 4096).unwrap();
    let flags = inode_flags::extended(file.as_fd()).unwrap().flags;
    assert_ne!(flags & inode_flags::XFLAG_PREALLOC, 0);
    let held = pin(&guard, &file, 454_656..471_040);
    let written = rustix::io::pwrite(&file, &[4; 8192], 438_272);
    assert!(
        matches!(written, Ok(8192) | Err(Errno::TXTBSY)),
        "{written:?}"
    );
    let now = mapdirect::block_map(&file, 454_656..471_040).unwrap();
    assert_eq!(now.extents(), held.extents(), "after a write: {written:?}");
    drop((held, file, source));
    std::fs::remove_file(disk.path("grants-ahead-source")).unwrap();
    std::fs::remove_file(&path).unwrap();
}

/// What is stored is in the file, for everybody.
pub(crate) fn bytes(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "bytes");
    let guard = world.guard().client();
    let file = open(&path);
    let held = map(&guard, &file, 4096..69_632);
    let text = b"these bytes do not move";
    held.write_all_at(text, 12_345).unwrap();
    held.persist(12_345..12_345 + text.len()).unwrap();
    let mut read = vec![0; text.len()];
    file.read_exact_at(&mut read, 4096 + 12_345).unwrap();
    assert_eq!(read, text);
    file.write_all_at(b"and back", 4096).unwrap();
    let mut back = [0; 8];
    held.read_exact_at(&mut back, 0).unwrap();
    assert_eq!(&back, b"and back");
    let error = held.read_exact_at(&mut back, 65_530).unwrap_err();
    assert_eq!(error.errno(), Errno::INVAL.raw_os_error());
    // The blocks on the device hold them, where the extents say.
    let extent = held.block_map().find(4096 + 12_345).unwrap();
    let at = extent.physical.unwrap() + (4096 + 12_345 - extent.offset);
    file.sync_all().unwrap();
    let device = held.block_map().device();
    let name = std::fs::read_link(format!("/sys/dev/block/{device}")).unwrap();
    let device = Path::new("/dev").join(name.file_name().unwrap());
    let mut disk = File::open(device).unwrap();
    disk.seek(SeekFrom::Start(at)).unwrap();
    let mut raw = vec![0; text.len()];
    disk.read_exact(&mut raw).unwrap();
    assert_eq!(raw, text);
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}

pub(crate) fn gone(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "gone");
    let guard = world.guard().client();
    let file = open(&path);
    std::fs::remove_file(&path).unwrap();
    let held = map(&guard, &file, 0..65536);
    assert_eq!(rustix::fs::ftruncate(&file, 0), Err(Errno::TXTBSY));
    drop(held);
    assert_eq!(rustix::fs::ftruncate(&file, 0), Ok(()));
}

/// The filesystem is detached between opening and pinning.
pub(crate) fn unmounted(world: &World, kind: Kind) {
    let disk = Disk::new(kind, 512).unwrap();
    let path = written(&disk, "file", 1 << 20);
    let guard = world.guard().client();
    let file = open(&path);
    run(Command::new("umount").arg("-l").arg(disk.root())).unwrap();
    let held = map(&guard, &file, 0..65536);
    assert_eq!(rustix::fs::ftruncate(&file, 0), Err(Errno::TXTBSY));
    drop(held);
    assert_eq!(rustix::fs::ftruncate(&file, 0), Ok(()));
}

/// XFS copies the neighbours of a shared block along with it.
pub(crate) fn copied_along(world: &World) {
    let disk = world.disk(Kind::XFS);
    let guard = world.guard().client();
    let path = written(&disk, "grants-copied-along", 131_072);
    let sharer = disk.path("grants-copied-along.sharer");
    let file = open(&path);
    let share = |offset| {
        let into = File::create(&sharer).unwrap();
        clone_range(into.as_fd(), file.as_fd(), offset, 4096, 0)
    };
    let write_beside = || rustix::io::pwrite(&file, &[8; 4096], 20 * 4096);
    let store_everywhere = |held: &DirectMap| {
        for block in 0..16 {
            held.write_all_at(&[9; 100], block * 4096).unwrap();
        }
        held.persist(0..65536).unwrap();
        file.sync_all().unwrap();
        let now = mapdirect::block_map(&file, 0..65536).unwrap();
        assert_eq!(now.extents(), held.block_map().extents());
    };
    share(20 * 4096).unwrap();
    let held = map(&guard, &file, 0..65536);
    store_everywhere(&held);
    assert_eq!(write_beside(), Err(Errno::TXTBSY), "the pin would go along");
    store_everywhere(&held);
    drop(held);
    wait_until_free(&path);
    let held = pin(&guard, &file, 0..65536);
    assert_eq!(write_beside(), Err(Errno::TXTBSY), "the pin would go along");
    drop(held);
    // The copy leaves blocks behind that neighbours would go to.
    file.write_all_at(&[8; 4096], 20 * 4096).unwrap();
    let held = map(&guard, &file, 0..65536);
    assert_eq!(share(18 * 4096), Err(Errno::TXTBSY));
    store_everywhere(&held);
    drop((held, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
    std::fs::remove_file(&sharer).unwrap();
}

/// What is shared comes to lie beside a pin when what is between goes.
pub(crate) fn collapsed_towards(world: &World) {
    const MIB: u64 = 1 << 20;
    // What XFS copies with the pin ends 131,072 bytes further on.
    const NEAR: u64 = 131_072;
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "grants-collapsed-towards", 20 << 20);
    let sharer = disk.path("grants-collapsed-towards.sharer");
    let file = open(&path);
    let share = |offset| {
        let into = File::create(&sharer).unwrap();
        clone_range(into.as_fd(), file.as_fd(), offset, 4096, 0)
    };
    let collapse = |offset| raw::fallocate(file.as_fd(), 0x08, offset, MIB);
    let held = map(&world.guard().client(), &file, 0..65536);
    if Gate::under_test() == Gate::Bpf {
        // The kernel has no time to look what is shared: nothing comes near.
        assert_eq!(collapse(NEAR), Err(Errno::TXTBSY));
        assert_eq!(collapse(MIB), Ok(()), "far behind");
        drop((held, file));
        wait_until_free(&path);
        return;
    }
    assert_eq!(collapse(NEAR), Ok(()), "nothing is shared");
    assert_eq!(collapse(65536), Ok(()), "nothing is shared");
    // What has moved once may do so again: the same bytes could.
    assert_eq!(share(2 * MIB), Err(Errno::TXTBSY));
    assert_eq!(share(10 * MIB), Ok(()));
    assert_eq!(collapse(NEAR), Err(Errno::TXTBSY), "something is shared");
    assert_eq!(collapse(8 * MIB), Ok(()), "far behind");
    drop(held);
    wait_until_free(&path);
    // Looked at, not remembered.
    let held = map(&world.guard().client(), &file, 0..65536);
    assert_eq!(collapse(NEAR), Ok(()), "what is shared stays away");
    for _ in 0..4 {
        let _ = collapse(NEAR);
    }
    for block in 0..16 {
        held.write_all_at(&[9; 100], block * 4096).unwrap();
    }
    held.persist(0..65536).unwrap();
    file.sync_all().unwrap();
    let now = mapdirect::block_map(&file, 0..65536).unwrap();
    assert_eq!(now.extents(), held.block_map().extents());
    assert_eq!(collapse(NEAR), Err(Errno::TXTBSY), "it would come too near");
    drop((held, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
    std::fs::remove_file(&sharer).unwrap();
}

/// XFS allocates ahead of a growing file, into a hole that is pinned.
pub(crate) fn allocated_into(world: &World) {
    let path = written(&world.disk(Kind::XFS), "grants-allocated-into", 262_144);
    let file = open(&path);
    let held = pin(&world.guard().client(), &file, 524_288..589_824);
    let result = rustix::io::pwrite(&file, &[1; 131_072], 262_144);
    assert_eq!(result, Err(Errno::TXTBSY));
    assert_eq!(rustix::io::pwrite(&file, &[1; 4096], 0), Ok(4096));
    let now = mapdirect::block_map(&file, 524_288..589_824).unwrap();
    assert_eq!(now.extents(), held.block_map().extents());
    drop((held, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// ext4 converts a small unwritten extent as a whole.
pub(crate) fn converted_along(world: &World) {
    let disk = world.disk(Kind::EXT4);
    let path = disk.path("grants-converted-along");
    let file = File::create_new(&path).unwrap();
    raw::fallocate(file.as_fd(), 0, 0, 28_672).unwrap();
    file.sync_all().unwrap();
    let held = pin(&world.guard().client(), &file, 0..4096);
    let result = rustix::io::pwrite(&file, &[1; 4096], 16_384);
    assert_eq!(result, Err(Errno::TXTBSY));
    assert_eq!(rustix::io::pwrite(&file, &[1; 4096], 1 << 20), Ok(4096));
    file.sync_all().unwrap();
    let now = mapdirect::block_map(&file, 0..4096).unwrap();
    assert_eq!(now.extents(), held.block_map().extents());
    drop((held, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// Others open it for writing all the time, and let go of it at once: they
/// cannot keep a pin away for long.
pub(crate) fn hammered(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "hammered");
    let guard = world.guard().client();
    let loops: Vec<_> = (0..2)
        .map(|_| {
            let mut command = Command::new("sh");
            let script = "while :; do : >> \"$0\"; done 2> /dev/null";
            Background::spawn(command.args(["-c", script]).arg(&path)).unwrap()
        })
        .collect();
    for _ in 0..20 {
        let file = open_in_between(&path);
        drop(pin(&guard, &file, 0..65536));
    }
    drop(loops);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// Opens a file that is being let go of.
pub(crate) fn open_in_between(path: &Path) -> File {
    for _ in 0..500 {
        if let Ok(file) = File::options().read(true).write(true).open(path) {
            return file;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("{} is still pinned", path.display());
}

/// Threads that never sleep cannot be looked at, and must not block grants.
pub(crate) fn busy_processor(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "busy");
    let guard = world.guard().client();
    let spinning: Vec<_> = (0..4)
        .map(|_| {
            let mut command = Command::new("sh");
            Background::spawn(command.args(["-c", "while :; do :; done"])).unwrap()
        })
        .collect();
    for _ in 0..5 {
        let file = open(&path);
        // A child of another test has it open until it gets to its exec.
        drop(pin(&guard, &file, 0..65536));
        drop(file);
        wait_until_free(&path);
    }
    drop(spinning);
    std::fs::remove_file(&path).unwrap();
}

pub(crate) fn extent_size_hint(world: &World) {
    let disk = world.disk(Kind::XFS);
    let path = disk.path("grants-hint");
    let guard = world.guard().client();
    let file = File::create_new(&path).unwrap();
    run(Command::new("xfs_io")
        .args(["-c", "extsize 64k"])
        .arg(&path))
    .unwrap();
    let hint = inode_flags::extended(file.as_fd()).unwrap();
    assert_eq!(hint.extent_size, 65536);
    file.write_all_at(&[1; 65536], 0).unwrap();
    file.set_len(1 << 20).unwrap();
    file.sync_all().unwrap();
    let error = PinOptions::new()
        .guard(guard.clone())
        .pin(&file)
        .unwrap_err();
    assert_eq!(error.kind(), Reason::ExtentSizeHint, "{error:#}");
    let held = MapOptions::new()
        .range(0..65536)
        .accept_page_cache(true)
        .guard(guard)
        .map(&file)
        .unwrap();
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}

/// Without reflink a reader can do no harm, wherever it came from.
pub(crate) fn reader_without_reflink(world: &World) {
    let (_disk, path) = subject(world, Kind::XFS_PLAIN, "reader");
    let guard = world.guard().client();
    let reader = File::open(&path).unwrap();
    let file = open(&path);
    let held = map(&guard, &file, 0..65536);
    let mut bytes = vec![0; 65536];
    reader.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(rustix::fs::ftruncate(&file, 0), Err(Errno::TXTBSY));
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}
