//! Strangers without any privilege try to take away what a holder fills and
//! appends, all the time; the block map of what was stable is compared all the
//! time.
//!
//! `MAPDIRECT_HAMMER_TRIES` says how many steps the holder takes.

use super::follow;
use crate::world::{World, is_emulated, kinds, open, patience, wait_until_free, written};
use libtest_mimic::Trial;
use mapdirect::{BlockMap, ExtentState};
use mapdirect_sys::Errno;
use mapdirect_testkit::attack::{clone_range, dedupe};
use mapdirect_testkit::hammer::TRIES_VARIABLE;
use mapdirect_testkit::process::{Helper, say, wait_for};
use mapdirect_testkit::random::Random;
use mapdirect_testkit::{Kind, raw};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

const BLOCK: u64 = 4096;
/// Where holes are, at first.
const HOLES: u64 = 1 << 20;

pub fn trials(world: &World) -> Vec<Trial> {
    let kinds = kinds(&[Kind::XFS, Kind::EXT4]);
    world.trials("stable", &kinds, &[("hammer", hammer)])
}

fn steps() -> u64 {
    let steps = std::env::var(TRIES_VARIABLE).ok();
    let steps = steps.and_then(|steps| steps.parse().ok());
    steps.unwrap_or(if is_emulated() { 400 } else { 1000 })
}

/// What the holder knows to be held.
struct Known(Vec<mapdirect::Extent>);

impl Known {
    /// Compares, and takes in what is new.
    fn compare(&mut self, now: &BlockMap) {
        for held in &self.0 {
            let parts = now
                .extents()
                .iter()
                .filter_map(|now| now.clipped(&(held.offset..held.end())));
            for part in parts {
                let physical = held
                    .physical
                    .map(|physical| physical + (part.offset - held.offset));
                assert_eq!(
                    (part.state, part.physical),
                    (ExtentState::Written, physical),
                    "what was held at {} is gone",
                    part.offset
                );
            }
        }
        let stable = now
            .extents()
            .iter()
            .filter(|extent| extent.state.is_stable());
        self.0 = stable.copied().collect();
    }
}

fn hammer(world: &World, kind: Kind) {
    let guard = world.guard();
    let disk = world.disk(kind);
    let path = written(&disk, "stable-hammered", 2 << 20);
    let other = written(&disk, "stable-hammer", 2 << 20);
    for path in [&path, &other] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666)).unwrap();
    }
    let file = open(&path);
    raw::fallocate(file.as_fd(), 3, HOLES, 1 << 19).unwrap();
    file.sync_all().unwrap();
    let mut pin = follow(&guard.client(), &file, 0);
    let direct = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path);
    let mut strangers: Vec<Helper> = (0..3)
        .map(|seed| {
            let words = [
                path.to_string_lossy().into_owned(),
                other.to_string_lossy().into_owned(),
                seed.to_string(),
                kind.reflink().to_string(),
            ];
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            Helper::start("stable-stranger", &words).unwrap()
        })
        .collect();
    let mut random = Random::new(7);
    let mut known = Known(Vec::new());
    let mut page = raw::PageBuffer::new(usize::try_from(2 * BLOCK).unwrap());
    let page = page.bytes();
    for step in 0..steps() {
        let size = file.metadata().unwrap().len();
        let end = match random.below(6) {
            0 => {
                let at = HOLES + BLOCK * random.below(128);
                file.write_all_at(&[3; 100], at).unwrap();
                at + 100
            }
            1 => {
                rustix::fs::ftruncate(&file, size + random.below(3 * BLOCK)).unwrap_or_else(
                    |errno| {
                        // A stranger may have made it longer meanwhile.
                        assert_eq!(errno, Errno::TXTBSY);
                    },
                );
                size
            }
            2 => {
                raw::fallocate(file.as_fd(), 0, size, BLOCK).unwrap();
                size + BLOCK
            }
            3 if direct.is_ok() => {
                // Grows when it is done, which is not when it is asked for.
                let at = size.next_multiple_of(BLOCK);
                page.fill(5);
                let direct = direct.as_ref().unwrap().as_fd();
                wait_for(patience(), || {
                    match raw::aio_write(direct, page, at, 0) {
                        // The first one may be an untorn one to the bpf gate,
                        // until it has writes noted.
                        Err(Errno::TXTBSY) => Ok(None),
                        written => Ok(Some(written.unwrap())),
                    }
                })
                .unwrap();
                at + page.len() as u64
            }
            4 => {
                let length = usize::try_from(BLOCK).unwrap();
                let at = HOLES + BLOCK * random.below(128);
                let both = libc::PROT_READ | libc::PROT_WRITE;
                let map =
                    raw::PlainMap::new(file.as_fd(), both, libc::MAP_SHARED, at, length).unwrap();
                map.store(0, 9);
                at + BLOCK
            }
            _ => {
                let bytes = vec![4; usize::try_from(random.below(9000)).unwrap()];
                file.write_all_at(&bytes, size).unwrap();
                size + bytes.len() as u64
            }
        };
        let now = file.metadata().unwrap().len();
        assert!(
            now >= end.max(size),
            "cut to {now}, it had {size} and {end} bytes"
        );
        if step % 20 == 19 {
            file.sync_data().unwrap();
            pin.refresh().unwrap();
            known.compare(pin.block_map());
            let there = mapdirect::block_map(&file, 0..now).unwrap();
            Known(known.0.clone()).compare(&there);
        }
    }
    let mut refused = 0;
    for stranger in &mut strangers {
        stranger.tell("stop").unwrap();
        let said = stranger.hear().unwrap();
        let said: Vec<u64> = said.split(' ').map(|word| word.parse().unwrap()).collect();
        assert_eq!(said[1], 0, "strangers took something away: {said:?}");
        refused += said[0];
    }
    assert!(refused > 50, "only {refused} were refused");
    world.count("refusals beside a holder that fills and grows", refused);
    for stranger in strangers {
        assert_eq!(stranger.finish().unwrap(), Some(0));
    }
    assert!(pin.integrity().is_intact() && pin.state().is_kept());
    drop((pin, file, direct));
    wait_until_free(&path);
    for path in [path, other] {
        std::fs::remove_file(path).unwrap();
    }
}

/// Role: does what it can to a file until it is told to stop; says how often it
/// was refused, and how often it was not.
pub fn play_stranger(arguments: &[String]) -> anyhow::Result<()> {
    let [path, other, seed, reflink] = arguments else {
        anyhow::bail!("wrong arguments");
    };
    raw::become_nobody()?;
    let stopped = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let told = std::sync::Arc::clone(&stopped);
    std::thread::spawn(move || {
        let _ = mapdirect_testkit::process::listen();
        told.store(true, std::sync::atomic::Ordering::SeqCst);
    });
    let (path, other) = (Path::new(path), Path::new(other));
    let reflink: bool = reflink.parse()?;
    let mut random = Random::new(seed.parse()?);
    let (mut refused, mut passed) = (0u64, 0u64);
    while !stopped.load(std::sync::atomic::Ordering::SeqCst) {
        match attempt(path, other, reflink, &mut random) {
            Err(Errno::TXTBSY) => refused += 1,
            Ok(true) => passed += 1,
            _ => {}
        }
    }
    say(&format!("{refused} {passed}"));
    Ok(())
}

/// One attempt: whether it took away or shared anything that was in the file.
fn attempt(path: &Path, other: &Path, reflink: bool, random: &mut Random) -> Result<bool, Errno> {
    let io = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    let reader = File::open(path).map_err(io)?;
    // It does not get shorter.
    let size = reader.metadata().map_err(io)?.len();
    let at = BLOCK * random.below(size.div_ceil(BLOCK).max(1));
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
    let write = || {
        File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(io)
    };
    match random.below(if reflink { 10 } else { 7 }) {
        0 => raw::truncate(&name, random.below(size)).map(|()| true),
        // Longer or as long: allowed, if it is not shorter when it is done.
        1 => raw::truncate(&name, size + random.below(100)).map(|()| false),
        2 => rustix::fs::ftruncate(write()?, random.below(size)).map(|()| true),
        3 => raw::fallocate(write()?.as_fd(), 3, at, BLOCK).map(|()| true),
        4 => raw::fallocate(write()?.as_fd(), 8, at, BLOCK).map(|()| true),
        5 => raw::fallocate(write()?.as_fd(), 0x10, at, BLOCK).map(|()| true),
        6 => raw::fallocate(write()?.as_fd(), 0x20, at, BLOCK).map(|()| true),
        7 => {
            let into = File::options().write(true).open(other).map_err(io)?;
            clone_range(into.as_fd(), reader.as_fd(), at, BLOCK, 0).map(|()| true)
        }
        8 => {
            let from = File::open(other).map_err(io)?;
            clone_range(write()?.as_fd(), from.as_fd(), 0, BLOCK, at).map(|()| true)
        }
        _ => {
            let from = File::open(other).map_err(io)?;
            dedupe(from.as_fd(), at, reader.as_fd(), at, BLOCK).map(|()| false)
        }
    }
}
