//! Preparing: whatever a range is like it becomes stable, and nobody loses a
//! byte by it.

mod after;
mod beside;
mod mixes;

pub(crate) use self::after::*;
pub(crate) use self::beside::*;
pub(crate) use self::mixes::*;

use crate::world::{BINARY, World, map, open, pin, wait_until_free, written};
use anyhow::Result;
use libtest_mimic::Trial;
use mapdirect::{BlockMap, ExtentState, HugePieces, Kind as Reason, PrepareOptions, Prepared};
use mapdirect_sys::{Errno, fallocate, inode_flags, uname};
use mapdirect_testkit::attack::clone_range;
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::disk::run;
use mapdirect_testkit::process::{Background, Helper, listen, say};
use mapdirect_testkit::random::Random;
use mapdirect_testkit::raw::PlainMap;
use mapdirect_testkit::{Disk, Kind};
use rustix::fs::OFlags;
use serde_json::Value;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

const XFS_1K: Kind = Kind::Xfs {
    reflink: true,
    block: 1024,
};
const EXT4_1K: Kind = Kind::Ext4 { block: 1024 };

const HUGE: u64 = 2 << 20;

type Run = fn(&World, Kind);

pub fn trials(world: &World) -> Vec<Trial> {
    let everywhere: [(&str, Run); 11] = [
        ("any-mix", any_mix),
        ("sizes", sizes),
        ("refused", refused),
        ("no-space", no_space),
        ("space-runs-out", space_runs_out),
        ("readers", readers),
        ("writers", writers),
        ("killed", killed),
        ("huge", huge),
        ("truncated", truncated),
        ("extended", extended),
    ];
    let main: [(&str, Run); 6] = [
        ("then-mapped", then_mapped),
        ("pinned", pinned),
        ("watched", watched),
        ("unprivileged", unprivileged),
        ("unlinked", unlinked),
        ("command-line", command_line),
    ];
    let mut trials = Vec::new();
    let mut add = |name: &str, kind: Kind, run: Run| {
        let name = format!("prepare::{kind}::{name}");
        trials.push(world.trial(name, move |world| run(world, kind)));
    };
    for kind in [Kind::XFS, Kind::XFS_PLAIN, Kind::EXT4, XFS_1K, EXT4_1K] {
        for (name, run) in everywhere {
            add(name, kind, run);
        }
    }
    for kind in [Kind::XFS, Kind::EXT4] {
        for (name, run) in main {
            add(name, kind, run);
        }
    }
    for kind in [Kind::XFS, XFS_1K] {
        add("cloned", kind, cloned);
        add("huge-beside-data", kind, huge_beside_data);
    }
    trials
}

fn new_file(path: &Path) -> File {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .unwrap()
}

fn contents(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

fn synced(file: &File) -> BlockMap {
    file.sync_all().unwrap();
    let size = file.metadata().unwrap().len().max(1);
    mapdirect::block_map(file, 0..size).unwrap()
}

/// Nothing but written blocks, seen by another way than the one that counts
/// them.
fn assert_stable(file: &File, prepared: &Prepared, range: Range<u64>, block: u64) {
    let map = prepared.block_map();
    let rounded = range.start - range.start % block..range.end.next_multiple_of(block);
    assert_eq!(map.range(), rounded);
    assert!(map.is_stable(), "{map:?}");
    let now = mapdirect::block_map(file, rounded).unwrap();
    assert_eq!(now.extents(), map.extents());
    for extent in now.extents() {
        assert_eq!(extent.state, ExtentState::Written);
    }
}

fn mapdirect(arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.env("COLUMNS", "1000");
    command.arg("prepare").args(arguments);
    command
}

fn complaint(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A file of every state there is, in random places, some of it not written
/// back yet. Returns its bytes.
fn mixed(random: &mut Random, file: &File, sharer: &File, size: u64, block: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(size).unwrap()];
    file.set_len(size).unwrap();
    let reflink = clone_is_possible(file, sharer);
    for _ in 0..24 {
        let length = 1 + random.below(20 * block);
        let at = random.below(size);
        let end = size.min(at + length);
        match random.below(5) {
            0 | 1 => {
                let value = random.byte();
                let run = usize::try_from(at).unwrap()..usize::try_from(end).unwrap();
                bytes[run.clone()].fill(value);
                file.write_all_at(&bytes[run], at).unwrap();
            }
            2 => fallocate::allocate(file.as_fd(), &(at..end)).unwrap(),
            3 if reflink => {
                let at = at - at % block;
                let end = end.next_multiple_of(block).min(size - size % block);
                if at < end {
                    clone_range(sharer.as_fd(), file.as_fd(), at, end - at, at).unwrap();
                }
            }
            3 => file.sync_all().unwrap(),
            _ => {
                fallocate::punch(file.as_fd(), &(at..end)).unwrap();
                bytes[usize::try_from(at).unwrap()..usize::try_from(end).unwrap()].fill(0);
            }
        }
    }
    bytes
}

fn clone_is_possible(file: &File, sharer: &File) -> bool {
    // A clone of nothing changes nothing.
    sharer.set_len(1 << 20).unwrap();
    let cloned = clone_range(sharer.as_fd(), file.as_fd(), 0, 4096, 0);
    assert!(
        cloned.is_ok() || cloned == Err(Errno::OPNOTSUPP),
        "{cloned:?}"
    );
    cloned.is_ok()
}
