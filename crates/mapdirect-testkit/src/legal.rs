//! What anybody may do to a file while some of it is pinned, beside it, and to
//! its end: a process that does it at random, as fast as it can.
//!
//! Nothing of it moves a pinned block, so none of it may raise an alarm. That a
//! gate refuses more than it must is no matter here.

use crate::process::{listen, say};
use crate::random::Random;
use crate::raw::{self, PlainMap};
use anyhow::{Context, Result, bail, ensure};
use mapdirect_sys::Errno;
use rustix::fs::Advice;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Environment variable: for how many seconds it goes on.
pub const SECONDS_VARIABLE: &str = "MAPDIRECT_SECONDS";
/// What is counted of it, for whoever adds it up.
pub const COUNTED: &str = "seconds of legal load";

const BLOCK: u64 = 4096;
/// The file grows up to here, and is cut back to its pinned range.
const MOST: u64 = 2048 * BLOCK;

/// What is done, each as often as it stands here.
const OPERATIONS: [(&str, Operation); 24] = [
    ("in the pin", store),
    ("in the pin", store_by_mapping),
    ("in the pin", read),
    ("beside the pin", write),
    ("beside the pin", write),
    ("beside the pin", |load| load.fallocate(0)),
    ("beside the pin", |load| load.fallocate(1)),
    ("beside the pin", |load| load.fallocate(3)),
    ("beside the pin", |load| load.fallocate(3)),
    ("beside the pin", |load| load.fallocate(0x10)),
    ("beside the pin", share),
    ("at the end", append),
    ("at the end", append),
    ("at the end", cut),
    ("at the end", grow_by_size),
    ("all of the file", |load| of_io(load.file.sync_all())),
    ("all of the file", drop_pages),
    ("all of the file", touch),
    ("other files", make_and_remove),
    ("other files", make_and_remove),
    ("other files", rename_and_link),
    ("other files", write_and_truncate),
    ("other files", write_and_truncate),
    ("other pins", pin_and_punch),
];

type Operation = fn(&mut Load) -> raw::Result<()>;

/// One process of it.
struct Load {
    file: File,
    guard: mapdirect::Guard,
    /// A file that is never pinned.
    other: File,
    /// Its own directory.
    directory: PathBuf,
    pinned: Range<u64>,
    /// Bytes in it that are stable.
    stable: Range<u64>,
    /// From when on it has blocks of the file shared, if it does: then gates
    /// that cannot look closely refuse most of what else it does beside the pin.
    shares: Option<Instant>,
    random: Random,
}

/// Role. Arguments: what to open or whose descriptor to take, the guard's
/// socket, another file, a directory of its own, the pinned and the stable
/// range, whether blocks can be shared, seed, seconds.
pub fn play(arguments: &[String]) -> Result<()> {
    let [
        file,
        socket,
        other,
        directory,
        pinned,
        stable,
        shares,
        seed,
        seconds,
    ] = arguments
    else {
        bail!("wrong arguments");
    };
    let range = |text: &str| -> Result<Range<u64>> {
        let (start, end) = text.split_once('-').context("no range")?;
        Ok(start.parse()?..end.parse()?)
    };
    let open = |path: &str| File::options().read(true).write(true).open(path);
    let file = match file.split_once(' ') {
        Some((pid, number)) => raw::take_descriptor(pid.parse()?, number.parse()?)?.into(),
        None => open(file)?,
    };
    fs::create_dir_all(directory)?;
    let seconds = Duration::from_secs(seconds.parse()?);
    let mut load = Load {
        file,
        guard: mapdirect::Guard::at(socket),
        other: open(other)?,
        directory: PathBuf::from(directory),
        pinned: range(pinned)?,
        stable: range(stable)?,
        shares: (shares == "true").then(|| Instant::now() + seconds * 2 / 3),
        random: Random::new(seed.parse()?),
    };
    // All of them begin at once.
    listen()?.context("nobody says when to begin")?;
    let until = Instant::now() + seconds;
    let mut counts: BTreeMap<&str, [u64; 2]> = BTreeMap::new();
    while Instant::now() < until {
        let (name, operation) = *load.random.pick(&OPERATIONS);
        let result = operation(&mut load);
        // The disk is small, and the gate may refuse more than it must.
        let expected = matches!(result, Ok(()) | Err(Errno::TXTBSY | Errno::NOSPC));
        ensure!(expected, "{name}: {result:?}");
        let count = counts.entry(name).or_default();
        count[usize::from(result.is_err())] += 1;
    }
    for (name, [done, refused]) in counts {
        say(&format!("{name}\t{done}\t{refused}"));
    }
    Ok(())
}

impl Load {
    /// A place in the file that is not pinned.
    fn beside(&mut self) -> Range<u64> {
        loop {
            let start = self.random.below(512) * BLOCK;
            let end = start + (1 + self.random.below(16)) * BLOCK;
            if end <= self.pinned.start || start >= self.pinned.end {
                return start..end;
            }
        }
    }

    fn fallocate(&mut self, mode: i32) -> raw::Result<()> {
        let place = self.beside();
        raw::fallocate(
            self.file.as_fd(),
            mode,
            place.start,
            place.end - place.start,
        )
    }

    fn size(&self) -> raw::Result<u64> {
        of_io(self.file.metadata().map(|metadata| metadata.len()))
    }

    fn own(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

fn of_io<T>(result: io::Result<T>) -> raw::Result<T> {
    result.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

fn fill(file: &File, place: &Range<u64>, byte: u8) -> raw::Result<()> {
    let length = usize::try_from(place.end - place.start).unwrap_or(0);
    of_io(file.write_all_at(&vec![byte; length], place.start))
}

fn store(load: &mut Load) -> raw::Result<()> {
    let at = load.stable.start
        + load
            .random
            .below((load.stable.end - load.stable.start).max(1));
    let byte = load.random.byte();
    fill(&load.file, &(at..at + 1), byte)
}

fn store_by_mapping(load: &mut Load) -> raw::Result<()> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let length = usize::try_from(BLOCK).unwrap_or(0);
    let map = PlainMap::new(
        load.file.as_fd(),
        protection,
        libc::MAP_SHARED,
        load.stable.start,
        length,
    )?;
    map.store(usize::from(load.random.byte()), 3);
    Ok(())
}

fn read(load: &mut Load) -> raw::Result<()> {
    let at = load.random.below(512) * BLOCK;
    of_io(load.file.read_at(&mut [0; 8192], at)).map(drop)
}

fn write(load: &mut Load) -> raw::Result<()> {
    let place = load.beside();
    let byte = load.random.byte();
    fill(&load.file, &place, byte)
}

fn share(load: &mut Load) -> raw::Result<()> {
    if load.shares.is_none_or(|since| Instant::now() < since) {
        return write(load);
    }
    let place = load.beside();
    crate::attack::clone_range(
        load.file.as_fd(),
        load.other.as_fd(),
        0,
        place.end - place.start,
        place.start,
    )
}

fn append(load: &mut Load) -> raw::Result<()> {
    let size = load.size()?;
    let place = size..size + 1 + load.random.below(8 * BLOCK);
    if place.end > MOST {
        return cut(load);
    }
    // Others do the same: it may be in the middle by now.
    fill(&load.file, &place, 5)
}

fn cut(load: &mut Load) -> raw::Result<()> {
    let size = load.pinned.end + load.random.below(64 * BLOCK);
    rustix::fs::ftruncate(&load.file, size)
}

fn grow_by_size(load: &mut Load) -> raw::Result<()> {
    let size = load.size()?.max(load.pinned.end) + load.random.below(64 * BLOCK);
    rustix::fs::ftruncate(&load.file, size.min(MOST))
}

fn drop_pages(load: &mut Load) -> raw::Result<()> {
    rustix::fs::fadvise(&load.file, 0, None, Advice::DontNeed)
}

/// Its mode and times are no blocks.
fn touch(load: &mut Load) -> raw::Result<()> {
    of_io(load.file.set_permissions(fs::Permissions::from_mode(0o640)))
}

fn make_and_remove(load: &mut Load) -> raw::Result<()> {
    let path = load.own("made");
    let file = of_io(File::create(&path))?;
    let length = (1 + load.random.below(64)) * BLOCK;
    let result = raw::fallocate(file.as_fd(), 0, 0, length);
    of_io(fs::remove_file(&path))?;
    result
}

fn rename_and_link(load: &mut Load) -> raw::Result<()> {
    let [old, new, link] = ["old", "new", "link"].map(|name| load.own(name));
    of_io(fs::write(&old, "x"))?;
    of_io(fs::hard_link(&old, &link))?;
    of_io(fs::rename(&old, &new))?;
    of_io(fs::remove_file(&link))?;
    of_io(fs::remove_file(&new))?;
    let inner = load.own("directory");
    of_io(fs::create_dir(&inner))?;
    of_io(fs::remove_dir(&inner))
}

fn write_and_truncate(load: &mut Load) -> raw::Result<()> {
    let file = kept(&load.own("written"))?;
    let start = load.random.below(64) * BLOCK;
    let end = start + (1 + load.random.below(16)) * BLOCK;
    fill(&file, &(start..end), 1)?;
    let size = load.random.below(64) * BLOCK;
    rustix::fs::ftruncate(&file, size)
}

/// What was pinned may be taken away as soon as the pin is gone.
fn pin_and_punch(load: &mut Load) -> raw::Result<()> {
    let file = kept(&load.own("pinned"))?;
    fill(&file, &(0..8 * BLOCK), 1)?;
    let start = load.random.below(8) * BLOCK;
    let options = mapdirect::PinOptions::new()
        .range(start..8 * BLOCK)
        .guard(load.guard.clone());
    let pin = options.pin(&file).map_err(|error| {
        let errno = Errno::from_raw_os_error(error.errno());
        if errno != Errno::TXTBSY {
            say(&format!("{error:#}"));
        }
        errno
    })?;
    let intact = pin.integrity().is_intact();
    drop(pin);
    if !intact {
        return Err(Errno::UCLEAN);
    }
    punch(file.as_fd(), start, BLOCK)
}

fn punch(file: BorrowedFd<'_>, start: u64, length: u64) -> raw::Result<()> {
    raw::fallocate(file, 3, start, length)
}

fn kept(path: &Path) -> raw::Result<File> {
    let mut options = File::options();
    let options = options.read(true).write(true).create(true);
    of_io(options.truncate(false).open(path))
}
