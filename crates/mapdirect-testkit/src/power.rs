//! A log on persistent memory, and what must be left of it when the power
//! goes: roles for both sides of a power cut.

use crate::Kind;
use crate::disk::run;
use crate::process::{GuardProcess, Role, say};
use crate::random::Random;
use anyhow::{Context, Result, bail, ensure};
use mapdirect::{Durability, MapOptions};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Both.
pub const ROLES: [Role; 2] = [("append", play_append), ("verify", play_verify)];

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
fn play_append(arguments: &[String]) -> Result<()> {
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
    let file = File::create_new(&path)?;
    file.set_len(LOG)?;
    let map = MapOptions::new()
        .prepare_first(true)
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
            map.write_persist_at(&record(number), at)?;
        } else {
            map.write_all_at(&record(number), at)?;
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
        std::fs::write(path(number), vec![1; 3 * 4096])?;
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
fn play_verify(arguments: &[String]) -> Result<()> {
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
