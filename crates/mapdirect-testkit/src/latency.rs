//! How long it takes until what was stored is durable, beside the system
//! calls for the same.

use crate::raw;
use anyhow::Result;
use mapdirect::{DirectMap, Guard, MapOptions};
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

const PAGE: usize = 4096;
/// Bytes of an update.
const UPDATE: usize = 64;

/// Updates of 64 bytes, in microseconds each.
#[derive(Clone, Copy, Debug)]
pub struct Updates {
    /// Stored to the mapping, and made durable by `persist`.
    pub persist: f64,
    /// Stored and made durable by `copy_persist`.
    pub copy_persist: f64,
    /// Sixteen stored and flushed, a page apart, and one `drain` for all:
    /// each of them.
    pub grouped: f64,
    /// `pwrite` and `fdatasync`.
    pub fdatasync: f64,
    /// How many times as long the system calls take as `persist`, turn by
    /// turn: the least, the median, the most.
    pub times_faster: [f64; 3],
}

/// Microseconds a call takes, over places that wander through `length` bytes.
fn each(length: usize, count: usize, mut call: impl FnMut(usize) -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    for at in 0..count {
        call(at * UPDATE % length)?;
    }
    Ok(started.elapsed().as_secs_f64() * 1e6 / count as f64)
}

/// Measures updates of a mapped file, of 16 pages at least, in turns.
pub fn updates(map: &DirectMap, file: &File) -> Result<Updates> {
    const TURNS: usize = 7;
    const GROUP: usize = 16;
    let update = [5u8; UPDATE];
    let length = map.len() - UPDATE;
    let mut turns = [const { Vec::new() }; 5];
    for _ in 0..TURNS {
        let persist = each(length, 4000, |at| {
            map.write_all_at(&update, at)?;
            Ok(map.persist(at..at + UPDATE)?)
        })?;
        let copied = each(length, 4000, |at| Ok(map.write_persist_at(&update, at)?))?;
        let grouped = each(length, 250, |at| {
            for page in 0..GROUP {
                let at = (at + page * PAGE) % length;
                map.write_all_at(&update, at)?;
                map.flush_async_range(at..at + UPDATE)?;
            }
            map.drain()?;
            Ok(())
        })?;
        let synced = each(length, 100, |at| {
            file.write_all_at(&update, at as u64)?;
            Ok(file.sync_data()?)
        })?;
        let found = [
            persist,
            copied,
            grouped / GROUP as f64,
            synced,
            synced / persist,
        ];
        turns
            .iter_mut()
            .zip(found)
            .for_each(|(turn, value)| turn.push(value));
    }
    for turn in &mut turns {
        turn.sort_by(f64::total_cmp);
    }
    let [persist, copy_persist, grouped, fdatasync, faster] = turns;
    let middle = TURNS / 2;
    Ok(Updates {
        persist: persist[middle],
        copy_persist: copy_persist[middle],
        grouped: grouped[middle],
        fdatasync: fdatasync[middle],
        times_faster: [faster[0], faster[middle], faster[TURNS - 1]],
    })
}

/// The first store to a page, and how often the filesystem wrote its log for
/// all of them.
#[derive(Clone, Copy, Debug)]
pub struct FirstStores {
    /// The median of them.
    pub microseconds: f64,
    /// For all.
    pub commits: u64,
}

/// Measures first stores that are durable: to the pages of a pinned range,
/// and to unwritten blocks mapped with `MAP_SYNC`, as programs do that have
/// only that. `commits` counts what the filesystem in `directory` committed.
pub fn first_stores(
    guard: &Guard,
    directory: &Path,
    pages: usize,
    commits: &dyn Fn() -> u64,
) -> Result<(FirstStores, FirstStores)> {
    let measure = |store: &mut dyn FnMut(usize) -> Result<()>| -> Result<FirstStores> {
        let before = commits();
        let mut took = Vec::new();
        for page in 0..pages {
            let started = Instant::now();
            store(page * PAGE)?;
            took.push(started.elapsed().as_secs_f64() * 1e6);
        }
        let commits = commits() - before;
        took.sort_by(f64::total_cmp);
        Ok(FirstStores {
            microseconds: took[pages / 2],
            commits,
        })
    };
    let create = |name: &str| -> Result<File> {
        let mut options = File::options();
        options.read(true).write(true).create_new(true);
        Ok(options.open(directory.join(name))?)
    };
    let (ours, theirs) = ("first-stores", "first-stores-sync");
    let file = create(ours)?;
    file.write_all_at(&vec![7; pages * PAGE], 0)?;
    file.sync_all()?;
    let map = MapOptions::new().guard(guard.clone()).map(&file)?;
    let pinned = measure(&mut |at| Ok(map.write_persist_at(&[1; UPDATE], at)?))?;
    drop(map);

    let file = create(theirs)?;
    let length = (pages * PAGE) as u64;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, length)?;
    file.sync_all()?;
    let flags = libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let plain = raw::PlainMap::new(file.as_fd(), prot, flags, 0, pages * PAGE)?;
    let synced = measure(&mut |at| {
        plain.store(at, 1);
        Ok(())
    })?;
    for name in [ours, theirs] {
        std::fs::remove_file(directory.join(name))?;
    }
    Ok((pinned, synced))
}
