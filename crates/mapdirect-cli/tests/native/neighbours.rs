//! Operations that do not meet a pin, and would change blocks of it all the
//! same: by what filesystems do beside what they are asked for.

use crate::world::{World, kinds, open, pin, written};
use anyhow::bail;
use libtest_mimic::Trial;
use mapdirect::Pin;
use mapdirect_sys::Errno;
use mapdirect_testkit::attack::{clone_range, dedupe};
use mapdirect_testkit::disk::run;
use mapdirect_testkit::process::{Helper, say};
use mapdirect_testkit::{Kind, raw};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;

const KEEP_SIZE: i32 = 1;
const PUNCH_HOLE: i32 = 2 | KEEP_SIZE;
const BUSY: Errno = Errno::TXTBSY;
/// Out of the reach of copies for a pin at the beginning: XFS makes pieces of
/// 32 blocks of them, and may move one by less than its size.
const FAR: u64 = 65_536 + 2 * 32 * 4096;

/// For a gate in the kernel: the one by permission events keeps everybody out
/// who could do any of this.
pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    let mut add = |name: &str, kind: Kind, test: fn(&World, Kind)| {
        let name = format!("in-kernel::{kind}::{name}");
        trials.push(world.trial(name, move |world| test(world, kind)));
    };
    for kind in kinds(&[Kind::XFS, Kind::EXT4]) {
        add("growing-in-a-block", kind, growing_in_a_block);
        if kind.is_xfs() {
            add("hints", kind, hints);
        } else {
            add("failing-writes", kind, failing_writes);
            add("joined-extents", kind, joined_extents);
            add("verity", kind, verity);
        }
        if kind.reflink() {
            add("nothing-shared-beside", kind, nothing_shared_beside);
            add("sharing-readers", kind, sharing_readers);
            add("odd-hint", kind, odd_hint);
            add("shared-and-moved", kind, shared_and_moved);
            add("shared-before-a-mapping", kind, shared_before_a_mapping);
            add("untorn-beside", kind, untorn_beside);
        }
    }
    // Blocks smaller than pages do not go with DAX.
    add("punched-page", Kind::Ext4 { block: 1024 }, punched_page);
    trials
}

fn unchanged(pin: &Pin, file: &File, after: &str) {
    file.sync_all().unwrap();
    let range = pin.block_map().range();
    let now = mapdirect::block_map(file, range).unwrap();
    assert_eq!(now.extents(), pin.extents(), "after {after}");
}

fn map_to_store(file: &File, range: Range<u64>) -> Result<raw::PlainMap, Errno> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let length = usize::try_from(range.end - range.start).unwrap();
    raw::PlainMap::new(file.as_fd(), prot, libc::MAP_SHARED, range.start, length)
}

/// Opens past the page cache.
fn open_direct(path: &Path) -> File {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .unwrap()
}

/// While a file has no blocks it can be given a hint for the size of its
/// extents: then a write beside a pinned hole would allocate in it.
fn hints(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = disk.path("neighbours-hints");
    let file = File::create_new(&path).unwrap();
    file.set_len(1 << 20).unwrap();
    let held = pin(&world.guard().client(), &file, 65_536..131_072);
    let commands = &["extsize 1m", "cowextsize 1m"][..1 + usize::from(kind.reflink())];
    let hint = |command: &str| {
        run(Command::new("xfs_io")
            .args(["-r", "-c", command])
            .arg(&path))
    };
    for command in commands {
        hint(command).unwrap_err();
    }
    // The programs cannot read what is not in memory: `struct fsxattr`, in a
    // file that nobody has touched through this mapping.
    const FSSETXATTR: u64 = 0x401c_5820;
    let mut attributes = [0u8; 4096];
    attributes[1] = 0x08; // FS_XFLAG_EXTSIZE
    attributes[6] = 0x10; // 1 MiB
    let argument = disk.path("neighbours-argument");
    std::fs::write(&argument, attributes).unwrap();
    let argument_file = open(&argument);
    let absent = map_to_store(&argument_file, 0..4096).unwrap();
    let set = raw::ioctl_value(file.as_fd(), FSSETXATTR, absent.address() as u64);
    assert_eq!(set, Err(BUSY));
    file.write_all_at(&[5; 4096], 0).unwrap();
    unchanged(&held, &file, "a write beside it");
    drop(held);
    file.set_len(0).unwrap();
    for command in commands {
        hint(command).unwrap();
    }
    drop((file, absent, argument_file));
    std::fs::remove_file(&argument).unwrap();
    std::fs::remove_file(&path).unwrap();
}

/// A write that would have made the file grow and fails truncates the file to
/// where it was, and takes what was allocated behind that along.
fn failing_writes(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "neighbours-failing", 4096);
    let file = open(&path);
    raw::fallocate(file.as_fd(), KEEP_SIZE, 65_536, 65_536).unwrap();
    let held = pin(&world.guard().client(), &file, 65_536..131_072);
    let write_nothing = |mut file: &File, to: u64| {
        file.seek(SeekFrom::Start(to)).unwrap();
        // There is no memory at that address.
        raw::write_from(file.as_fd(), 4096, 4096)
    };
    let direct = open_direct(&path);
    assert_eq!(write_nothing(&direct, 4096), Err(BUSY));
    assert_eq!(write_nothing(&file, 4096), Err(BUSY));
    assert_eq!(rustix::io::pwrite(&file, &[1; 100], 4096), Err(BUSY));
    unchanged(&held, &file, "writes that would have failed");
    // When the file has grown over it nothing is truncated.
    assert_eq!(rustix::fs::ftruncate(&file, 131_072), Ok(()));
    assert_eq!(write_nothing(&direct, 4096), Err(Errno::FAULT));
    assert_eq!(write_nothing(&direct, 131_072), Err(Errno::FAULT));
    assert_eq!(rustix::io::pwrite(&file, &[1; 100], 131_072), Ok(100));
    unchanged(&held, &file, "writes beside it");
    drop((held, file, direct));
    std::fs::remove_file(&path).unwrap();
}

/// What comes to be unwritten next to unwritten blocks is one extent with
/// them, and a write to it may write zeros to its neighbours.
fn joined_extents(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "neighbours-joined", 4096);
    let file = open(&path);
    file.set_len(1 << 20).unwrap();
    raw::fallocate(file.as_fd(), 0, 65_536, 16_384).unwrap();
    file.sync_all().unwrap();
    let held = pin(&world.guard().client(), &file, 65_536..81_920);
    let allocate = |mode: i32, range: Range<u64>| {
        raw::fallocate(file.as_fd(), mode, range.start, range.end - range.start)
    };
    for mode in [0, KEEP_SIZE] {
        assert_eq!(allocate(mode, 81_920..86_016), Err(BUSY));
        assert_eq!(allocate(mode, 61_440..65_536), Err(BUSY));
        assert_eq!(allocate(mode, 86_016..90_112), Ok(()));
    }
    // A write brings blocks that are written.
    file.write_all_at(&[1; 4096], 81_920).unwrap();
    file.write_all_at(&[1; 4096], 61_440).unwrap();
    file.write_all_at(&[1; 4096], 86_016).unwrap();
    unchanged(&held, &file, "writes beside it");
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}

/// A tree of hashes would be written behind the end of the file, and what is
/// there freed before. Neither looks at a pin.
fn verity(world: &World, kind: Kind) {
    const ENABLE_VERITY: u64 = 0x4080_6685;
    let path = written(&world.disk(kind), "neighbours-verity", 100_000);
    let file = File::open(&path).unwrap();
    let held = pin(&world.guard().client(), &file, 0..1 << 20);
    let enable = || raw::ioctl(file.as_fd(), ENABLE_VERITY, &mut [0u8; 128]);
    assert_eq!(enable(), Err(BUSY));
    drop(held);
    // This filesystem was made without.
    assert_ne!(enable(), Err(BUSY));
    drop(file);
    std::fs::remove_file(&path).unwrap();
}

/// Nothing beside a pin may come to be shared: whoever has the file mapped
/// stores without being asked.
fn nothing_shared_beside(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = written(&disk, "neighbours-mapped", 4 << 20);
    let other = disk.path("neighbours-clone");
    let file = open(&path);
    let held = pin(&world.guard().client(), &file, 0..65_536);
    let into = File::create_new(&other).unwrap();
    let share = || clone_range(into.as_fd(), file.as_fd(), 65_536, 4096, 0);
    let map = map_to_store(&file, 65_536..69_632).unwrap();
    assert_eq!(share(), Err(BUSY));
    map.store(0, 1);
    file.write_all_at(&[2; 4096], 0).unwrap();
    unchanged(&held, &file, "a store beside it");
    drop(map);
    assert_eq!(share(), Err(BUSY));
    // Far away it is nobody's business, nor who writes there.
    clone_range(into.as_fd(), file.as_fd(), FAR, 4096, 4096).unwrap();
    let map = map_to_store(&file, FAR..FAR + 4096).unwrap();
    map.store(0, 1);
    file.write_all_at(&[2; 4096], FAR).unwrap();
    file.write_all_at(&[2; 4096], 0).unwrap();
    unchanged(&held, &file, "a write to what is shared");
    drop((map, held));
    share().unwrap();
    drop((file, into));
    std::fs::remove_file(&other).unwrap();
    std::fs::remove_file(&path).unwrap();
}

/// Whoever can only read the file keeps nobody from writing to it, whatever
/// they share of it, or try to.
fn sharing_readers(world: &World, kind: Kind) {
    const PIN: Range<u64> = 1 << 20..(1 << 20) + 65_536;
    /// What XFS may copy together with the pin.
    const WINDOW: Range<u64> = (1 << 20) - 131_072..(1 << 20) + 2 * 131_072;
    let disk = world.disk(kind);
    let path = written(&disk, "neighbours-read", 4 << 20);
    let other = disk.path("neighbours-own");
    let file = open(&path);
    let held = pin(&world.guard().client(), &file, PIN);
    let can_write = |when: &str| {
        let near = [0, 4096, 65_536, 131_072, 262_144, 900_000];
        let near = near.map(|near| near - near % 4096);
        let before = near.map(|near| PIN.start - 4096 - near);
        let behind = near.map(|near| PIN.end + near);
        for offset in before.into_iter().chain(behind).chain([PIN.start]) {
            let wrote = rustix::io::pwrite(&file, &[5; 4096], offset);
            assert_eq!(wrote, Ok(4096), "at {offset} {when}");
            let map = map_to_store(&file, offset..offset + 4096);
            map.unwrap_or_else(|errno| panic!("at {offset} {when}: {errno}"))
                .store(0, 6);
        }
    };
    can_write("at first");
    for offset in [
        PIN.start - 4096,
        PIN.end,
        WINDOW.start - 4096,
        WINDOW.start,
        WINDOW.end - 4096,
        WINDOW.end,
    ] {
        for how in ["clone", "dedupe", "dedupe-what-differs", "dedupe-into"] {
            let _ = std::fs::remove_file(&other);
            let owned = File::create(&other).unwrap();
            std::os::unix::fs::fchown(&owned, Some(65_534), Some(65_534)).unwrap();
            let mut reader = Helper::start(
                "sharer",
                &[
                    how,
                    &path.to_string_lossy(),
                    &other.to_string_lossy(),
                    &offset.to_string(),
                ],
            )
            .unwrap();
            let came = reader.hear().unwrap();
            let expected = match how {
                _ if WINDOW.contains(&offset) => BUSY.to_string(),
                "clone" | "dedupe" => String::from("shared"),
                "dedupe-what-differs" => Errno::ILSEQ.to_string(),
                _ => Errno::PERM.to_string(),
            };
            assert_eq!(came, expected, "{how} at {offset}");
            // While the reader goes on trying.
            for _ in 0..3 {
                can_write(&format!("after {how} at {offset}"));
            }
            reader.kill().unwrap();
            world.count("ways of a reader to share beside a pin", 1);
        }
    }
    unchanged(&held, &file, "what readers share");
    drop((held, file));
    std::fs::remove_file(&other).unwrap();
    std::fs::remove_file(&path).unwrap();
}

/// Role: shares a block of a file that it can only read with one of its own,
/// says what came of it, and goes on.
pub fn play_sharer(arguments: &[String]) -> anyhow::Result<()> {
    let [how, path, own, offset] = arguments else {
        bail!("wrong arguments");
    };
    let offset = offset.parse()?;
    raw::become_nobody()?;
    let file = File::open(path)?;
    let own = File::options().read(true).write(true).open(own)?;
    let share = || {
        let mut block = vec![0; 4096];
        file.read_exact_at(&mut block, offset)?;
        if how == "dedupe-what-differs" {
            block[17] ^= 1;
        }
        if how != "clone" {
            own.write_all_at(&block, 0)?;
            own.sync_all()?;
        }
        let shared = match how.as_str() {
            "clone" => clone_range(own.as_fd(), file.as_fd(), offset, 4096, 0),
            "dedupe-into" => dedupe(own.as_fd(), 0, file.as_fd(), offset, 4096),
            _ => dedupe(file.as_fd(), offset, own.as_fd(), 0, 4096),
        };
        anyhow::Ok(shared)
    };
    match share()? {
        Ok(()) => say("shared"),
        Err(errno) => say(&errno.to_string()),
    }
    loop {
        let _ = share()?;
    }
}

/// XFS copies in pieces of the file's own hint, which may be smaller than the
/// default and lie elsewhere.
fn odd_hint(world: &World, kind: Kind) {
    const PIN: Range<u64> = 64 * 4096..80 * 4096;
    let disk = world.disk(kind);
    let other = disk.path("neighbours-hint-clone");
    let into = File::create_new(&other).unwrap();
    let path = disk.path("neighbours-hint");
    File::create_new(&path).unwrap();
    run(Command::new("xfs_io")
        .args(["-c", "cowextsize 96k"])
        .arg(&path))
    .unwrap();
    std::fs::write(&path, vec![7; 4 << 20]).unwrap();
    let file = open(&path);
    file.sync_all().unwrap();
    let held = pin(&world.guard().client(), &file, PIN);
    // 24 blocks from block 24 on, and such a piece may be moved onto the pin.
    let share = |block: u64| clone_range(into.as_fd(), file.as_fd(), block * 4096, 4096, 0);
    assert_eq!(share(24), Err(BUSY));
    // By the default it ends at 128, by the hint at 120.
    assert_eq!(share(127), Err(BUSY));
    for block in [0, 15, 128] {
        share(block).unwrap();
        file.write_all_at(&[2; 4096], block * 4096).unwrap();
    }
    file.write_all_at(&[2; 65_536], PIN.start).unwrap();
    unchanged(&held, &file, "copies in pieces of an odd size");
    drop((held, file, into));
    std::fs::remove_file(&other).unwrap();
    std::fs::remove_file(&path).unwrap();
}

/// What was shared beside a pin before that came must not move to where nobody
/// knows of it.
fn shared_and_moved(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = written(&disk, "neighbours-moved", 4 << 20);
    let other = disk.path("neighbours-moved-clone");
    let file = open(&path);
    let into = File::create_new(&other).unwrap();
    clone_range(into.as_fd(), file.as_fd(), 20 * 4096, 4096, 0).unwrap();
    let held = pin(&world.guard().client(), &file, 0..65_536);
    let insert = |block: u64| raw::fallocate(file.as_fd(), 0x20, block * 4096, 4096);
    assert_eq!(insert(17), Err(BUSY));
    assert_eq!(insert(20), Err(BUSY));
    assert_eq!(insert(21), Ok(()), "nothing known lies there");
    assert_eq!(rustix::io::pwrite(&file, &[1; 100], 20 * 4096), Err(BUSY));
    file.write_all_at(&[2; 65_536], 0).unwrap();
    unchanged(&held, &file, "what was inserted beside it");
    drop((held, file, into));
    std::fs::remove_file(&other).unwrap();
    std::fs::remove_file(&path).unwrap();
}

/// A mapping anywhere could be grown over what is shared beside a pin.
fn shared_before_a_mapping(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = written(&disk, "neighbours-shared", 1 << 20);
    let other = disk.path("neighbours-sharer");
    let file = open(&path);
    let into = File::create_new(&other).unwrap();
    clone_range(into.as_fd(), file.as_fd(), 69_632, 4096, 0).unwrap();
    let held = pin(&world.guard().client(), &file, 0..65_536);
    for range in [69_632..73_728, 98_304..102_400, 524_288..528_384] {
        assert_eq!(
            map_to_store(&file, range.clone()).err(),
            Some(BUSY),
            "{range:?}"
        );
    }
    drop(held);
    drop(map_to_store(&file, 524_288..528_384).unwrap());
    drop((file, into));
    std::fs::remove_file(&other).unwrap();
    std::fs::remove_file(&path).unwrap();
}

/// An untorn write goes to new blocks, of which XFS sets aside more than are
/// needed.
fn untorn_beside(world: &World, kind: Kind) {
    const RWF_ATOMIC: i32 = 0x40;
    #[repr(C, align(4096))]
    struct Block([u8; 4096]);
    let path = written(&world.disk(kind), "neighbours-untorn", 4 << 20);
    let file = open_direct(&path);
    let held = pin(&world.guard().client(), &file, 0..65_536);
    let block = Block([3; 4096]);
    let write = |at| raw::pwritev2(file.as_fd(), &block.0, at, RWF_ATOMIC);
    let far = write(FAR);
    let beside = write(65_536);
    if far.is_ok() {
        assert_eq!(beside, Err(BUSY));
    } else {
        world.unavailable(format!("untorn writes on {kind}: {far:?}"));
    }
    open(&path).write_all_at(&[2; 4096], 0).unwrap();
    unchanged(&held, &file, "an untorn write beside it");
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}

/// Behind the end of the file ext4 punches to the end of the page.
fn punched_page(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "neighbours-punched", 1000);
    let file = open(&path);
    raw::fallocate(file.as_fd(), KEEP_SIZE, 1024, 3072).unwrap();
    let held = pin(&world.guard().client(), &file, 1024..4096);
    let punched = raw::fallocate(file.as_fd(), PUNCH_HOLE, 0, 1024);
    assert_eq!(punched, Err(BUSY));
    assert_eq!(raw::fallocate(file.as_fd(), PUNCH_HOLE, 0, 1000), Ok(()));
    unchanged(&held, &file, "holes beside it");
    drop(held);
    // A whole page further, where it ends with one.
    file.set_len(4096).unwrap();
    raw::fallocate(file.as_fd(), KEEP_SIZE, 5120, 3072).unwrap();
    let held = pin(&world.guard().client(), &file, 5120..8192);
    let punched = raw::fallocate(file.as_fd(), PUNCH_HOLE, 0, 4097);
    assert_eq!(punched, Err(BUSY));
    unchanged(&held, &file, "a hole beside it");
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}

/// Where the last block of a pin is there, the file grows as ever.
fn growing_in_a_block(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "neighbours-tail", 5000);
    let file = open(&path);
    let held = pin(&world.guard().client(), &file, 0..5000);
    assert_eq!(rustix::io::pwrite(&file, &[1; 100], 5000), Ok(100));
    assert_eq!(rustix::io::pwrite(&file, &[1; 8192], 5100), Ok(8192));
    unchanged(&held, &file, "appending to it");
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}
