//! Persistent memory: stores go to the media, and nowhere else. Run where
//! `MAPDIRECT_PMEM` names devices of it: in a virtual machine, as a rule.

use crate::world::{PATIENCE, World, dax_kinds, is_pinned, open, wait_until_free};
use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use mapdirect::{DirectMap, Durability, ExtentState, Guard, Kind as Reason, MapOptions};
use mapdirect_sys::Errno;
use mapdirect_testkit::disk::run;
use mapdirect_testkit::process::{GuardProcess, say};
use mapdirect_testkit::random::Random;
use mapdirect_testkit::{Kind, raw};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const PAGE: usize = 4096;

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    for kind in dax_kinds() {
        for (name, run) in [
            ("maps-directly", maps_directly as fn(&World, Kind)),
            ("media", media),
            ("no-page-cache", no_page_cache),
            ("no-commit", no_commit),
            ("figures", figures),
            ("persist-everywhere", persist_everywhere),
            ("huge-pages", huge_pages),
        ] {
            let name = format!("pmem::{kind}::{name}");
            trials.push(world.trial(name, move |world| run(world, kind)));
        }
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

/// Maps as strictly as a program does that says nothing about caches.
fn map(guard: &Guard, file: &File, range: Range<u64>) -> DirectMap {
    MapOptions::new()
        .range(range)
        .patience(PATIENCE)
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
    held.copy_persist(5000, b"stored").unwrap();
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
    // And so does a file that gave DAX up.
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
            0 => held.write_at(offset, &bytes).unwrap(),
            1 => held.copy_persist(offset, &bytes).unwrap(),
            _ => {
                held.write_at(offset, &bytes).unwrap();
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
    held.write_at(0, &vec![3; LENGTH]).unwrap();
    let mut bytes = vec![0; LENGTH];
    held.read_at(0, &mut bytes).unwrap();
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
fn commits(world: &World, kind: Kind) -> u64 {
    let device = kind.device().unwrap();
    let device = device.file_name().unwrap().to_str().unwrap();
    let _ = world;
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
    const PAGES: usize = 64;
    let guard = world.guard();
    let (path, file) = file_of(world, kind, "no-commit", PAGES * PAGE);
    let held = map(&guard.client(), &file, 0..(PAGES * PAGE) as u64);
    let before = commits(world, kind);
    let started = Instant::now();
    for page in 0..PAGES {
        held.copy_persist(page * PAGE, &[1; 64]).unwrap();
    }
    let ours = started.elapsed();
    let ours_commits = commits(world, kind) - before;
    drop(held);

    let synced = world.disk(kind).path("no-commit-sync");
    let other = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&synced)
        .unwrap();
    rustix::fs::fallocate(
        &other,
        rustix::fs::FallocateFlags::empty(),
        0,
        (PAGES * PAGE) as u64,
    )
    .unwrap();
    other.sync_all().unwrap();
    let flags = libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let plain = raw::PlainMap::new(other.as_fd(), prot, flags, 0, PAGES * PAGE).unwrap();
    let before = commits(world, kind);
    let started = Instant::now();
    for page in 0..PAGES {
        plain.store(page * PAGE, 1);
    }
    let peer = started.elapsed();
    let peer_commits = commits(world, kind) - before;
    println!(
        "  {kind}: a first store to each of {PAGES} pages: {:.1} us each and {ours_commits} log \
         writes; on unwritten blocks with MAP_SYNC {:.1} us and {peer_commits}: {:.0}x",
        ours.as_secs_f64() * 1e6 / PAGES as f64,
        peer.as_secs_f64() * 1e6 / PAGES as f64,
        peer.as_secs_f64() / ours.as_secs_f64()
    );
    // Something else may have been committed meanwhile, but not every time.
    assert!(
        ours_commits <= 2,
        "{ours_commits} commits for {PAGES} stores"
    );
    assert!(
        peer_commits >= PAGES as u64 / 2,
        "{peer_commits} commits with MAP_SYNC"
    );
    drop(plain);
    std::fs::remove_file(&synced).unwrap();
    std::fs::remove_file(&path).unwrap();
}

/// What a durable update takes, against the system calls for it.
fn figures(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = file_of(world, kind, "figures", 1 << 20);
    let held = map(&guard.client(), &file, 0..1 << 20);
    let record = [5u8; 64];
    let each = |count: usize, run: &mut dyn FnMut(usize)| {
        let started = Instant::now();
        for at in 0..count {
            run(at * 64 % (1 << 20));
        }
        started.elapsed().as_secs_f64() * 1e6 / count as f64
    };
    let mut ratios = Vec::new();
    let (mut ours, mut theirs) = (0.0, 0.0);
    for _ in 0..7 {
        ours = each(4000, &mut |at| {
            held.write_at(at, &record).unwrap();
            held.persist(at..at + 64).unwrap();
        });
        theirs = each(100, &mut |at| {
            file.write_all_at(&record, at as u64).unwrap();
            file.sync_data().unwrap();
        });
        ratios.push(theirs / ours);
    }
    ratios.sort_by(f64::total_cmp);
    println!(
        "  {kind}: 64 bytes stored and persisted {ours:.2} us; pwrite and fdatasync {theirs:.0} \
         us: {:.0}x ({:.0} to {:.0})",
        ratios[3], ratios[0], ratios[6]
    );
    drop(held);
    std::fs::remove_file(&path).unwrap();
}

/// Any range, across what can be stored to and what cannot.
fn persist_everywhere(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = world.disk(kind).path("everywhere");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
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
                held.flush(start..end).unwrap();
            }
        }
    }
    held.drain();
    let inval = Errno::INVAL.raw_os_error();
    assert_eq!(held.persist(0..length + 1).unwrap_err().errno(), inval);
    assert_eq!(
        held.copy_persist(length - 1, &[1, 2]).unwrap_err().errno(),
        inval
    );
    let frozen = held.copy_persist(PAGE - 8, &[1; 16]).unwrap_err();
    assert_eq!(frozen.errno(), Errno::TXTBSY.raw_os_error());
    held.copy_persist(PAGE - 8, &[2; 8]).unwrap();
    held.copy_persist(0, &[]).unwrap();
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
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    let prepared = mapdirect::PrepareOptions::new()
        .size(4 * HUGE as u64)
        .huge(true)
        .prepare(&file)
        .unwrap();
    let held = map(&guard.client(), &file, 0..4 * HUGE as u64);
    assert_eq!(held.as_ptr() as usize % HUGE, 0);
    // Mapped by huge pages, an aligned piece takes one fault, and 512
    // otherwise.
    let pieces = prepared.huge_pieces();
    let before = raw::faults().unwrap();
    for page in 0..4 * HUGE / PAGE {
        held.write_at(page * PAGE, &[1; 8]).unwrap();
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

/// Bytes of a record of the log: its number, as many bytes made of it, and a
/// sum.
const RECORD: usize = 256;

fn record(number: u64) -> [u8; RECORD] {
    let mut record = [0; RECORD];
    record[..8].copy_from_slice(&number.to_le_bytes());
    let mut random = Random::new(number);
    for byte in &mut record[8..RECORD - 8] {
        *byte = random.byte();
    }
    let sum = sum(&record[..RECORD - 8]);
    record[RECORD - 8..].copy_from_slice(&sum.to_le_bytes());
    record
}

/// FNV-1a: a torn record does not have it by chance.
fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Bytes of the log of a power cut.
const LOG: u64 = 16 << 20;

/// Where the roles below mount it.
const ROOT: &str = "/tmp/log";

/// Role: makes a filesystem on a device, and appends to a log on it, telling
/// which records are durable, until the power goes. Arguments: mapdirect,
/// filesystem.
pub fn play_append(arguments: &[String]) -> Result<()> {
    let [binary, kind] = arguments else {
        bail!("wrong arguments");
    };
    let kind = dax_kind(kind)?;
    let device = kind.device().context("no persistent memory")?;
    let root = PathBuf::from(ROOT);
    std::fs::create_dir_all(&root)?;
    run(kind.mkfs().arg(&device))?;
    mount(&device, &root)?;
    let guard = GuardProcess::start(Path::new(binary))?;
    let path = root.join("log");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    file.set_len(LOG)?;
    let map = MapOptions::new()
        .prepare(true)
        .guard(guard.client())
        .map(&file)?;
    ensure!(
        map.durability() == Durability::CacheFlush,
        "not mapped directly, but with {:?}",
        map.durability()
    );
    File::open(&root)?.sync_all()?;
    // So that there is a journal to replay.
    std::thread::spawn(move || {
        if let Err(error) = change_files(&root) {
            say(&format!("failed: {error:#}"));
        }
    });
    say("appending");
    let records = u64::try_from(map.len() / RECORD)?;
    let mut random = Random::new(u64::from(std::process::id()));
    for number in 0.. {
        let at = usize::try_from(number % records)? * RECORD;
        if random.below(2) == 0 {
            map.copy_persist(at, &record(number))?;
        } else {
            map.write_at(at, &record(number))?;
            map.persist(at..at + RECORD)?;
        }
        say(&format!("durable {number}"));
    }
    Ok(())
}

/// Makes, moves and removes files for ever.
fn change_files(root: &Path) -> Result<()> {
    for number in 0u64.. {
        let path = |number: u64| root.join(format!("other-{number}"));
        std::fs::write(path(number), vec![1; 3 * PAGE])?;
        let moved = root.join(format!("moved-{}", number % 5));
        std::fs::rename(path(number), &moved)?;
        if number % 7 == 0 {
            File::open(&moved)?.sync_all()?;
            std::fs::remove_file(&moved)?;
        }
    }
    Ok(())
}

/// Role: what is left after a power cut. Arguments: mapdirect, filesystem, the
/// last record told to be durable.
pub fn play_verify(arguments: &[String]) -> Result<()> {
    let [binary, kind, last] = arguments else {
        bail!("wrong arguments");
    };
    let kind = dax_kind(kind)?;
    let last: u64 = last.parse()?;
    let device = kind.device().context("no persistent memory")?;
    let root = PathBuf::from(ROOT);
    std::fs::create_dir_all(&root)?;
    // Mounting replays the log of the filesystem.
    mount(&device, &root)?;
    let path = root.join("log");
    // Nobody is left who could have it pinned, and nothing on disk says so.
    let guard = GuardProcess::start(Path::new(binary))?;
    let status = guard.client().status()?;
    ensure!(status.files.is_empty(), "something is pinned");
    let file = File::options().read(true).write(true).open(&path)?;
    ensure!(file.metadata()?.len() == LOG, "the log has another size");
    let map = mapdirect::block_map(&file, 0..LOG)?;
    ensure!(map.is_stable(), "the log lost blocks");
    let mut bytes = vec![0; usize::try_from(LOG)?];
    file.read_exact_at(&mut bytes, 0)?;
    let beyond = verify_records(&bytes, last)?;
    drop(file);
    drop(guard);
    run(Command::new("umount").arg(&root))?;
    if kind.is_xfs() {
        run(Command::new("xfs_repair").arg("-n").arg(&device))?;
    } else {
        run(Command::new("e2fsck").args(["-f", "-n"]).arg(&device))?;
    }
    say(&format!(
        "every record is there and {beyond} more, nothing is pinned, the filesystem is clean"
    ));
    Ok(())
}

/// Every record up to `last` must be in its place, unless one that is as
/// whole has taken it. Behind the last one there may be whole records, which
/// were stored and not told any more: says how many. Only the one that was
/// being stored when the power went may be anything.
fn verify_records(bytes: &[u8], last: u64) -> Result<u64> {
    let places = bytes.len() / RECORD;
    let place = |number: u64| usize::try_from(number % places as u64);
    let found = |number: u64| -> Result<bool> {
        let at = place(number)? * RECORD;
        Ok(bytes[at..at + RECORD] == record(number))
    };
    let mut newest = last;
    while found(newest + 1)? {
        newest += 1;
    }
    let oldest = (newest + 1).saturating_sub(places as u64);
    for number in oldest..=newest {
        // The one being stored took the place of the oldest.
        let taken = place(number)? == place(newest + 1)?;
        ensure!(
            taken || found(number)?,
            "record {number} was told to be durable and is gone"
        );
    }
    Ok(newest - last)
}

fn dax_kind(name: &str) -> Result<Kind> {
    let found = Kind::DAX.into_iter().find(|kind| kind.to_string() == name);
    found.with_context(|| format!("no filesystem {name}"))
}

fn mount(device: &Path, root: &Path) -> Result<()> {
    run(Command::new("mount")
        .args(["-o", "dax=always"])
        .arg(device)
        .arg(root))
}
