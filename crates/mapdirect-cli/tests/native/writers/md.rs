//! A mirror of md whose bitmap is a file: the kernel asks where its blocks are,
//! and writes to them on the device.

use super::{Came, Loop, Scene, turn};
use crate::world::{World, open, patience};
use anyhow::{Context, Result};
use mapdirect_testkit::disk::run;
use mapdirect_testkit::process::{ScratchDirectory, wait_for};
use mapdirect_testkit::{Kind, raw};
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

const NAME: &str = "md177";
/// Of a member, in bytes.
const SIZE: u64 = 8 << 20;
/// Where the bitmap itself begins in its file, behind what is said about it.
const BITS: usize = 256;

/// A mirror without a superblock, made by the kernel's own files; stopped when
/// it is dropped.
struct Mirror {
    _members: Vec<Loop>,
    _place: ScratchDirectory,
}

impl Mirror {
    fn new() -> Result<Self> {
        for module in ["md_mod", "raid1"] {
            run(Command::new("modprobe").arg(module))?;
        }
        let place = ScratchDirectory::in_memory("md")?;
        let mut members = Vec::new();
        for name in ["a", "b"] {
            let path = place.path().join(name);
            File::create(&path)?.set_len(SIZE)?;
            members.push(Loop::of(&path, &[])?);
        }
        fs::write("/sys/module/md_mod/parameters/new_array", NAME).context("new_array")?;
        let mirror = Self {
            _members: members,
            _place: place,
        };
        for (file, words) in [
            ("metadata_version", "none"),
            ("level", "raid1"),
            ("component_size", "4096"),
            ("raid_disks", "2"),
            // Both are the same already.
            ("resync_start", "none"),
        ] {
            told(file, words)?;
        }
        for (slot, member) in mirror._members.iter().enumerate() {
            let name = member.0.trim_start_matches("/dev/");
            let number = fs::read_to_string(format!("/sys/block/{name}/dev"))?;
            told("new_dev", number.trim())?;
            told(&format!("dev-{name}/slot"), &slot.to_string())?;
        }
        told("array_state", "active")?;
        Ok(mirror)
    }

    fn device() -> std::io::Result<File> {
        let path = Path::new("/dev").join(NAME);
        File::options().read(true).write(true).open(path)
    }

    /// `SET_BITMAP_FILE` (linux/raid/md_u.h).
    fn use_bitmap(file: &File) -> Result<()> {
        const SET_BITMAP_FILE: u64 = 0x4004_092b;
        let device = Self::device()?;
        let number = u64::from(file.as_raw_fd().cast_unsigned());
        raw::ioctl_value(device.as_fd(), SET_BITMAP_FILE, number)
            .map(drop)
            .context("SET_BITMAP_FILE")
    }

    /// Dirties all of it, and so its bitmap.
    fn write() -> Result<()> {
        let device = Self::device()?;
        device.write_all_at(&vec![1; 1 << 20], 0)?;
        Ok(device.sync_all()?)
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        let stopped = wait_for(patience(), || {
            Ok(told("array_state", "clear").is_ok().then_some(()))
        });
        if let Err(error) = stopped {
            println!("{NAME} stays behind: {error:#}");
        }
    }
}

fn told(file: &str, words: &str) -> Result<()> {
    fs::write(format!("/sys/block/{NAME}/md/{file}"), words)
        .with_context(|| format!("{words} to {file}"))
}

/// What a file must say of itself for md to take it (`bitmap_super_t`,
/// drivers/md/md-bitmap.c).
fn superblock() -> [u8; BITS] {
    let mut block = [0; BITS];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &0x6d74_6962u32.to_le_bytes());
    put(4, &4u32.to_le_bytes());
    // Its mirror in sectors, of 64 KiB a bit, and to be written after 1 second.
    put(40, &(SIZE / 1024).to_le_bytes());
    put(52, &65_536u32.to_le_bytes());
    put(56, &1u32.to_le_bytes());
    block
}

pub(super) fn bitmap(world: &World, kind: Kind) {
    let _turn = turn();
    let disk = world.disk(kind);
    let scene = Scene::new(world, &disk, "md");
    let start = || {
        let file = open(&scene.path);
        file.write_all_at(&superblock(), 0).unwrap();
        file.sync_all().unwrap();
        drop(file);
        Mirror::new()
    };
    let bits = || {
        // Past the page cache, which knows nothing of it.
        rustix::fs::fadvise(&scene.file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let mut bits = [0; 16];
        scene.file.read_exact_at(&mut bits, BITS as u64).unwrap();
        bits
    };
    let mirror = match start() {
        Ok(mirror) => mirror,
        Err(error) => {
            world.unavailable(format!("a mirror of md: {error:#}"));
            return;
        }
    };
    let clean = bits();
    // It takes the descriptor of its caller, who may close it then.
    if let Err(error) = Mirror::use_bitmap(&open(&scene.path)) {
        world.unavailable(format!("md, bitmap in a file: {error:#}"));
        return;
    }
    scene.before("md-bitmap", "", || Came::of(Mirror::write()));
    Mirror::write().unwrap();
    assert_ne!(clean, bits(), "it does not write to the file");
    drop(mirror);

    let mirror = start().unwrap();
    scene.after("md-bitmap", "", || {
        let file = File::options().read(true).write(true).open(&scene.path);
        let used = file
            .map_err(anyhow::Error::from)
            .and_then(|file| Mirror::use_bitmap(&file));
        Mirror::write().unwrap();
        Came::of(used)
    });
    drop(mirror);
}
