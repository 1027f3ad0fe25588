//! Persistent memory: stores go to the media, and nowhere else. Run where
//! `MAPDIRECT_PMEM` names devices of it: in a virtual machine, as a rule.

use crate::world::{World, dax_kinds, is_pinned, open, patience, wait_until_free};
use libtest_mimic::Trial;
use mapdirect::{
    DirectMap, Durability, ExtentState, Guard, Kind as Reason, MapOptions, PrepareOptions,
};
use mapdirect_sys::Errno;
use mapdirect_testkit::disk::run;
use mapdirect_testkit::process::wait_for;
use mapdirect_testkit::random::Random;
use mapdirect_testkit::{Kind, latency, raw};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

const PAGE: usize = 4096;

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(world.trials(
        "pmem",
        &dax_kinds(),
        &[
            ("maps-directly", maps_directly),
            ("media", media),
            ("no-page-cache", no_page_cache),
            ("no-commit", no_commit),
            ("figures", figures),
            ("persist-everywhere", persist_everywhere),
            ("huge-pages", huge_pages),
        ],
    ));
    // A disk that zeroes by itself is a module away in a virtual machine.
    if dax_kinds().contains(&Kind::Ext4Dax) {
        let name = format!("pmem::{}::zeroed-by-the-device", Kind::Ext4Dax);
        trials.push(world.trial(name, zeroed_by_the_device));
    }
    trials
}

/// A file of so many bytes, written and synced.
fn file_of(world: &World, kind: Kind, name: &str, length: usize) -> (PathBuf, File) {
    let path = world.disk(kind).path(name);
    std::fs::write(&path, vec![7; length]).unwrap();
    let file = open(&path);
    file.sync_all().unwrap();
    (path, file)
}

/// An emulated disk that zeroes by itself, with ext4 on it.
struct Disk(PathBuf);

impl Disk {
    fn new() -> Self {
        run(Command::new("modprobe").arg("sd_mod")).unwrap();
        run(Command::new("modprobe").args([
            "scsi_debug",
            "lbpws=1",
            "lbpu=1",
            "lbprz=1",
            "dev_size_mb=256",
        ]))
        .unwrap();
        let device = wait_for(Duration::from_secs(60), || {
            let names = std::fs::read_dir("/sys/block")?;
            let found = names
                .flatten()
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .find(|name| name.starts_with("sd"));
            Ok(found.map(|name| format!("/dev/{name}")))
        })
        .unwrap();
        let root = std::env::temp_dir().join("zeroing-disk");
        std::fs::create_dir_all(&root).unwrap();
        run(Kind::EXT4.mkfs().arg(&device)).unwrap();
        run(Command::new("mount").arg(&device).arg(&root)).unwrap();
        Self(root)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = run(Command::new("umount").arg(&self.0));
        let _ = run(Command::new("rmmod").arg("scsi_debug"));
    }
}

/// Bytes this process has had written to devices.
fn written_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/io").unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("write_bytes: "));
    line.unwrap().trim().parse().unwrap()
}

/// A file that nobody else uses is zeroed without sending zeros.
fn zeroed_by_the_device(_world: &World) {
    const LENGTH: u64 = 32 << 20;
    let disk = Disk::new();
    for (exclusive, most) in [(true, 4 << 20), (false, u64::MAX)] {
        let path = disk.0.join(format!("exclusive-{exclusive}"));
        let file = File::create_new(&path).unwrap();
        // Some of it is there already, and not written back yet.
        file.set_len(LENGTH).unwrap();
        raw::fallocate(file.as_fd(), 0, 0, LENGTH / 2).unwrap();
        file.write_all_at(&[7; 5000], 100_000).unwrap();
        let before = written_bytes();
        let prepared = PrepareOptions::new()
            .exclusive(exclusive)
            .prepare(&file)
            .unwrap();
        let sent = written_bytes() - before;
        assert!(prepared.block_map().is_stable());
        assert!(sent < most, "{sent} bytes were sent");
        if !exclusive {
            assert!(sent >= LENGTH / 2, "only {sent} bytes were sent");
        }
        let bytes = std::fs::read(&path).unwrap();
        let (filled, rest): (Vec<_>, Vec<_>) = (0..)
            .zip(bytes)
            .partition(|(at, _)| (100_000..105_000).contains(at));
        assert!(filled.iter().all(|(_, byte)| *byte == 7));
        assert!(rest.iter().all(|(_, byte)| *byte == 0));
        assert_eq!(rest.len() + filled.len(), usize::try_from(LENGTH).unwrap());
        drop(file);
        std::fs::remove_file(path).unwrap();
    }
}

/// Maps as strictly as a program does that says nothing about caches.
fn map(guard: &Guard, file: &File, range: Range<u64>) -> DirectMap {
    MapOptions::new()
        .range(range)
        .patience(patience())
        .guard(guard.clone())
        .map(file)
        .unwrap()
}

fn maps_directly(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = file_of(world, kind, "maps", 1 << 20);
    let held = map(&guard.client(), &file, 0..1 << 20);
    assert_eq!(held.durability(), Durability::CacheFlush);
    assert!(is_pinned(&path));
    held.write_persist_at(b"stored", 5000).unwrap();
    let mut read = [0; 6];
    file.read_exact_at(&mut read, 5000).unwrap();
    assert_eq!(&read, b"stored");
    drop(held);
    wait_until_free(&path);
    // Without DAX the same call says so.
    let other = world.disk(Kind::EXT4);
    let plain = crate::world::written(&other, "dax-none", PAGE);
    let refused = MapOptions::new().guard(guard.client()).map(&open(&plain));
    let error = refused.unwrap_err();
    assert_eq!(error.kind(), Reason::NoDax, "{error:#}");
    assert_eq!(error.errno(), Errno::OPNOTSUPP.raw_os_error());
    std::fs::remove_file(&plain).unwrap();
    std::fs::remove_file(&path).unwrap();
}

/// Somebody who reads the device past every cache sees each store at once,
/// where the extents say.
fn media(world: &World, kind: Kind) {
    const LENGTH: usize = 4 << 20;
    let guard = world.guard();
    let (path, file) = file_of(world, kind, "media", LENGTH);
    let held = map(&guard.client(), &file, 0..LENGTH as u64);
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECT;
    let device = kind.device().unwrap();
    let device = rustix::fs::open(&device, flags, rustix::fs::Mode::empty()).unwrap();
    let device = File::from(device);
    let mut random = Random::new(4);
    let mut page = raw::PageBuffer::new(PAGE);
    for round in 0..400 {
        let offset = usize::try_from(random.below(LENGTH as u64 - 300)).unwrap();
        let length = 1 + usize::try_from(random.below(299)).unwrap();
        let bytes: Vec<u8> = (0..length).map(|_| random.byte()).collect();
        match round % 3 {
            0 => held.write_all_at(&bytes, offset).unwrap(),
            1 => held.write_persist_at(&bytes, offset).unwrap(),
            _ => {
                held.write_all_at(&bytes, offset).unwrap();
                held.persist(offset..offset + length).unwrap();
            }
        }
        for (at, byte) in bytes.iter().enumerate() {
            let byte_offset = (offset + at) as u64;
            if at > 0 && !byte_offset.is_multiple_of(PAGE as u64) {
                // One look at every page will do.
                continue;
            }
            let extent = held.block_map().find(byte_offset).unwrap();
            assert_eq!(extent.state, ExtentState::Written);
            let place = extent.physical.unwrap() + (byte_offset - extent.offset);
            let start = place - place % PAGE as u64;
            device.read_exact_at(page.bytes(), start).unwrap();
            let within = usize::try_from(place - start).unwrap();
            let there = (bytes.len() - at).min(PAGE - within);
            assert_eq!(
                page.bytes()[within..within + there],
                bytes[at..at + there],
                "byte {byte} at {byte_offset} of the file, {place} of the device, round {round}"
            );
        }
    }
    drop(held);
    std::fs::remove_file(&path).unwrap();
}

/// Nothing of the file comes to be in the page cache, and what is mapped is
/// the media itself, page by page.
fn no_page_cache(world: &World, kind: Kind) {
    const LENGTH: usize = 1 << 20;
    let guard = world.guard();
    let (path, file) = file_of(world, kind, "no-cache", LENGTH);
    let held = map(&guard.client(), &file, 0..LENGTH as u64);
    held.write_all_at(&vec![3; LENGTH], 0).unwrap();
    let mut bytes = vec![0; LENGTH];
    held.read_exact_at(&mut bytes, 0).unwrap();
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(raw::cached_pages(file.as_fd(), LENGTH), Ok(0));
    let media = start_of_media(kind);
    for offset in (0..LENGTH).step_by(PAGE) {
        let extent = held.block_map().find(offset as u64).unwrap();
        let place = extent.physical.unwrap() + (offset as u64 - extent.offset);
        let frame = raw::frame(held.as_ptr() as usize + offset).unwrap();
        assert_eq!(frame, Some((media + place) / PAGE as u64), "at {offset}");
    }
    // Where there is a page cache the same call finds it.
    let other = crate::world::written(&world.disk(Kind::EXT4), "cached", LENGTH);
    let other_file = open(&other);
    let found = raw::cached_pages(other_file.as_fd(), LENGTH).unwrap();
    assert_eq!(found, LENGTH / PAGE);
    drop(held);
    std::fs::remove_file(&other).unwrap();
    std::fs::remove_file(&path).unwrap();
}

/// The physical address of the first byte of a disk that is an NVDIMM.
fn start_of_media(kind: Kind) -> u64 {
    let device = kind.device().unwrap();
    let name = device.file_name().unwrap().to_str().unwrap();
    let path = format!("/sys/block/{name}/device/resource");
    let text = std::fs::read_to_string(path).unwrap();
    u64::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap()
}

/// How often a filesystem wrote its log, as it counts.
fn commits(kind: Kind) -> u64 {
    let device = kind.device().unwrap();
    let device = device.file_name().unwrap().to_str().unwrap();
    if kind.is_xfs() {
        // "log writes blocks noiclogs force force_sleep" (fs/xfs/xfs_stats.h)
        let stats = std::fs::read_to_string(format!("/sys/fs/xfs/{device}/stats/stats")).unwrap();
        let line = stats.lines().find_map(|line| line.strip_prefix("log "));
        return line.unwrap().split(' ').next().unwrap().parse().unwrap();
    }
    // "N transactions (M requested), each up to K blocks" (fs/jbd2/journal.c)
    let directory = std::fs::read_dir("/proc/fs/jbd2").unwrap();
    let entry = directory
        .map(|entry| entry.unwrap().path())
        .find(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            name.starts_with(&format!("{device}-"))
        })
        .unwrap();
    let info = std::fs::read_to_string(entry.join("info")).unwrap();
    info.split(' ').next().unwrap().parse().unwrap()
}

/// A first store to each page of a pinned range commits nothing; one to
/// unwritten blocks mapped with MAP_SYNC commits each time.
fn no_commit(world: &World, kind: Kind) {
    let guard = world.guard();
    let root = world.disk(kind).root();
    let count = || commits(kind);
    let (ours, theirs) = latency::first_stores(&guard.client(), &root, 64, &count).unwrap();
    println!(
        "  {kind}: a first store to each of 64 pages: {:.1} us each and {} log writes; on \
         unwritten blocks with MAP_SYNC {:.1} us and {}: {:.0}x",
        ours.microseconds,
        ours.commits,
        theirs.microseconds,
        theirs.commits,
        theirs.microseconds / ours.microseconds
    );
    // Something else may have been committed meanwhile, but not every time.
    assert!(ours.commits <= 2, "{ours:?}");
    assert!(theirs.commits >= 32, "{theirs:?}");
}

/// What a durable update takes, against the system calls for it: told, not
/// judged, as it depends on the machine.
fn figures(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = file_of(world, kind, "figures", 1 << 20);
    let held = map(&guard.client(), &file, 0..1 << 20);
    let updates = latency::updates(&held, &file).unwrap();
    let [low, middle, high] = updates.times_faster;
    println!(
        "  {kind}: 64 bytes stored and persisted {:.2} us; pwrite and fdatasync {:.0} us: \
         {middle:.0}x ({low:.0} to {high:.0})",
        updates.persist, updates.fdatasync
    );
    drop(held);
    std::fs::remove_file(&path).unwrap();
}

/// Any range, across what can be stored to and what cannot.
fn persist_everywhere(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = world.disk(kind).path("everywhere");
    let file = File::create_new(&path).unwrap();
    // Written, hole, written, and pages beyond the end.
    file.write_all_at(&vec![1; PAGE], 0).unwrap();
    file.write_all_at(&vec![1; PAGE], 2 * PAGE as u64).unwrap();
    file.sync_all().unwrap();
    let length = 5 * PAGE;
    let held = map(&guard.client(), &file, 0..length as u64);
    for start in [
        0,
        1,
        63,
        64,
        PAGE - 1,
        PAGE,
        2 * PAGE - 1,
        2 * PAGE,
        3 * PAGE,
        length,
    ] {
        for end in [
            start,
            start + 1,
            start + 65,
            PAGE + 7,
            3 * PAGE,
            3 * PAGE + 1,
            length,
        ] {
            if start <= end && end <= length {
                held.persist(start..end).unwrap();
                held.flush_async_range(start..end).unwrap();
            }
        }
    }
    held.drain().unwrap();
    let inval = Errno::INVAL.raw_os_error();
    assert_eq!(held.persist(0..length + 1).unwrap_err().errno(), inval);
    assert_eq!(
        held.write_persist_at(&[1, 2], length - 1)
            .unwrap_err()
            .errno(),
        inval
    );
    let frozen = held.write_persist_at(&[1; 16], PAGE - 8).unwrap_err();
    assert_eq!(frozen.errno(), Errno::TXTBSY.raw_os_error());
    held.write_persist_at(&[2; 8], PAGE - 8).unwrap();
    held.write_persist_at(&[], 0).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, PAGE as u64 - 1).unwrap();
    assert_eq!(byte, [2]);
    drop(held);
    std::fs::remove_file(&path).unwrap();
}

/// Aligned extents are mapped by huge pages.
fn huge_pages(world: &World, kind: Kind) {
    const HUGE: usize = 2 << 20;
    let guard = world.guard();
    let path = world.disk(kind).path("huge");
    let make = || {
        let _ = std::fs::remove_file(&path);
        let file = File::create_new(&path).unwrap();
        let prepared = mapdirect::PrepareOptions::new()
            .size(4 * HUGE as u64)
            .huge(true)
            .prepare(&file)
            .unwrap();
        (file, prepared)
    };
    let mut made = make();
    // Other tests allocate on the same filesystem, and may take the room that
    // was arranged.
    for _ in 0..5 {
        if made.1.huge_pieces().aligned > 0 {
            break;
        }
        made = make();
    }
    let (file, prepared) = made;
    let held = map(&guard.client(), &file, 0..4 * HUGE as u64);
    assert_eq!(held.as_ptr() as usize % HUGE, 0);
    // Mapped by huge pages, an aligned piece takes one fault, and 512
    // otherwise.
    let pieces = prepared.huge_pieces();
    let before = raw::faults().unwrap();
    for page in 0..4 * HUGE / PAGE {
        held.write_all_at(&[1; 8], page * PAGE).unwrap();
    }
    let faults = raw::faults().unwrap() - before;
    println!(
        "  {kind}: {} of {} pieces of 2 MiB lie aligned; a store to each page takes {faults} faults",
        pieces.aligned, pieces.pieces
    );
    let apart = (pieces.pieces - pieces.aligned) * (HUGE / PAGE) as u64;
    assert!(pieces.aligned > 0);
    assert!(faults < apart + 100, "{faults} faults");
    drop(held);
    std::fs::remove_file(&path).unwrap();
}
