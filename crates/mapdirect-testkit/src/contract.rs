//! Section 4 of the contract as data: where a range lies relative to a pin,
//! and what must happen there. Worked out by itself, block by block, and not
//! by asking the guard's own rules.

use crate::attack::{Attack, Door, Needs, Row, Target};
use crate::disk::{Disk, Kind};
use crate::raw::{self, Result};
use mapdirect_sys::Errno;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Blocks of a file under test.
pub const BLOCKS: u64 = 64;
/// Blocks of it that are pinned.
pub const PINNED: Range<u64> = 16..32;
/// In a file with frozen blocks: a hole,
pub const HOLE: u64 = 20;
/// an unwritten block,
pub const UNWRITTEN: u64 = 22;
/// and a shared one, where there is sharing.
pub const SHARED: u64 = 24;

/// Where the range of an attack lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// The last block before the pin.
    Before,
    /// The first block of the pin.
    First,
    /// A stable block amid the pin.
    Stable,
    /// A hole in the pin.
    Hole,
    /// An unwritten block of the pin.
    Unwritten,
    /// A shared block of the pin.
    Shared,
    /// The last block of the pin.
    Last,
    /// The last block of the pin and the first behind it.
    Across,
    /// The first block behind the pin.
    After,
}

impl Place {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Before,
        Self::First,
        Self::Stable,
        Self::Hole,
        Self::Unwritten,
        Self::Shared,
        Self::Last,
        Self::Across,
        Self::After,
    ];

    /// The blocks of it.
    #[must_use]
    pub fn blocks(self) -> Range<u64> {
        match self {
            Self::Before => PINNED.start - 1..PINNED.start,
            Self::First => PINNED.start..PINNED.start + 1,
            Self::Stable => 18..19,
            Self::Hole => HOLE..HOLE + 1,
            Self::Unwritten => UNWRITTEN..UNWRITTEN + 1,
            Self::Shared => SHARED..SHARED + 1,
            Self::Last => PINNED.end - 1..PINNED.end,
            Self::Across => PINNED.end - 1..PINNED.end + 1,
            Self::After => PINNED.end..PINNED.end + 1,
        }
    }

    /// It exists only in a file with frozen blocks.
    #[must_use]
    pub fn is_frozen(self) -> bool {
        matches!(self, Self::Hole | Self::Unwritten | Self::Shared)
    }

    /// The name of it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::First => "first",
            Self::Stable => "stable",
            Self::Hole => "hole",
            Self::Unwritten => "unwritten",
            Self::Shared => "shared",
            Self::Last => "last",
            Self::Across => "across",
            Self::After => "after",
        }
    }

    fn meets_pin(self) -> bool {
        self.blocks().start < PINNED.end && self.blocks().end > PINNED.start
    }
}

/// Who attacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Attacker {
    /// Another process, which opens the file while it is pinned.
    Stranger,
    /// The process that holds the pin, through the descriptor it pinned.
    Holder,
}

/// Which gate is under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gate {
    /// Permission events: excludes writers.
    Fanotify,
    /// Programs in the kernel: precise.
    Bpf,
}

/// Environment variable that names the gate under test.
pub const GATE_VARIABLE: &str = "MAPDIRECT_GATE";

impl Gate {
    /// The gate that the environment names, or the one by permission events.
    ///
    /// # Panics
    ///
    /// When there is none of that name.
    #[must_use]
    pub fn under_test() -> Self {
        match std::env::var(GATE_VARIABLE).as_deref() {
            Ok("bpf") => Self::Bpf,
            Ok("fanotify" | "") | Err(_) => Self::Fanotify,
            Ok(other) => panic!("{GATE_VARIABLE}={other}: there is no such gate"),
        }
    }

    /// Its name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fanotify => "fanotify",
            Self::Bpf => "bpf",
        }
    }
}

impl Attacker {
    /// The name of it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stranger => "stranger",
            Self::Holder => "holder",
        }
    }
}

/// What must happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// It works as if nothing were pinned.
    Works,
    /// `ETXTBSY`.
    Refused,
    /// Either: the gate cannot see precisely and may refuse more.
    Either,
}

/// What the contract says of an attack at a place, `reflink` telling whether
/// the filesystem shares blocks. `None` where the attack makes no sense.
#[must_use]
pub fn verdict(attack: &Attack, place: Place, reflink: bool) -> bool {
    let meets = place.meets_pin();
    match attack.row {
        Row::Read | Row::Metadata | Row::Grow => false,
        Row::Write | Row::Allocate | Row::MapWrite => place.is_frozen(),
        // The new size is where the range begins, or a byte before that.
        Row::Truncate => match attack.name {
            "truncate-inside-a-page" => place.blocks().start <= PINNED.end,
            _ => place.blocks().start < PINNED.end,
        },
        Row::Shift => place.blocks().start < PINNED.end,
        Row::TruncateByOpen => true,
        Row::Deallocate | Row::Exchange => meets,
        Row::Reflink if is_whole_file(attack) => true,
        Row::Reflink => meets,
        Row::CopyFrom => reflink && meets,
        // Only XFS with reflink remaps for it.
        Row::Untorn => reflink && meets || place.is_frozen(),
    }
}

/// It works on the whole file, wherever the range lies.
fn is_whole_file(attack: &Attack) -> bool {
    matches!(
        attack.name,
        "ficlone-from" | "ficlone-into" | "xfs-swapext" | "ext4-swap-boot"
    )
}

/// What must happen under a gate.
#[must_use]
pub fn expected(
    attack: &Attack,
    place: Place,
    attacker: Attacker,
    reflink: bool,
    gate: Gate,
) -> Expected {
    match gate {
        Gate::Fanotify => expected_by_events(attack, place, attacker, reflink),
        Gate::Bpf => expected_in_kernel(attack, place, reflink),
    }
}

/// Under the bpf gate it matters neither who attacks nor how: it is told
/// exactly what is done.
fn expected_in_kernel(attack: &Attack, place: Place, reflink: bool) -> Expected {
    if verdict(attack, place, reflink) || is_whole_file(attack) || names_no_other(attack) {
        return Expected::Refused;
    }
    // XFS sets the neighbours' blocks aside as well, and all places are near.
    if reflink && attack.row == Row::Untorn {
        return Expected::Refused;
    }
    // Nothing beside a pin may come to be shared: what comes nearer, or from
    // another file, may be. And a copy into the file is one where blocks can be
    // shared.
    let shares = matches!(attack.row, Row::Reflink | Row::CopyFrom | Row::Exchange)
        || matches!(attack.name, "copy_file_range-into" | "collapse-range");
    if reflink && shares {
        return Expected::Refused;
    }
    Expected::Works
}

/// The other file of an exchange is known to the kernel alone: refused on the
/// whole filesystem.
fn names_no_other(attack: &Attack) -> bool {
    attack.row == Row::Exchange && attack.name != "xfs-exchange-range"
}

/// Under the fanotify gate.
fn expected_by_events(
    attack: &Attack,
    place: Place,
    attacker: Attacker,
    reflink: bool,
) -> Expected {
    let refused = verdict(attack, place, reflink) || is_whole_file(attack);
    match attacker {
        // Nobody opens a pinned file for writing, to whatever end.
        Attacker::Stranger if attack.needs == Needs::Write => Expected::Refused,
        Attacker::Stranger | Attacker::Holder if refused => Expected::Refused,
        // What is mapped for reading through a descriptor that allows writing
        // could be made writable later.
        Attacker::Holder if attack.name == "mmap-read" && place.is_frozen() => Expected::Either,
        // Nothing beside a pin may come to be shared, and beside frozen blocks
        // nothing mapped: a store makes a whole folio dirty.
        _ if reflink && matches!(attack.row, Row::Reflink | Row::CopyFrom) => Expected::Refused,
        _ if attack.row == Row::MapWrite => Expected::Either,
        // XFS sets the neighbours' blocks aside as well.
        _ if reflink && attack.row == Row::Untorn => Expected::Either,
        _ if attack.precise => Expected::Works,
        _ => Expected::Either,
    }
}

/// A file under test: written, with a few frozen blocks amid the pinned ones
/// if asked for, and another file beside it that nothing is shared with.
#[derive(Debug)]
pub struct Subject {
    /// The file.
    pub path: PathBuf,
    /// The other file.
    pub other: PathBuf,
    /// What shares a block with it, if anything does.
    pub sharer: PathBuf,
    block: u64,
}

impl Subject {
    /// Makes one.
    ///
    /// # Panics
    ///
    /// When the filesystem does not do as it is told.
    #[must_use]
    pub fn new(disk: &Disk, name: &str, frozen: bool) -> Self {
        let block = disk.kind().block();
        let subject = Self {
            path: disk.path(name),
            other: disk.path(&format!("{name}.other")),
            sharer: disk.path(&format!("{name}.sharer")),
            block,
        };
        write_blocks(&subject.other, block, BLOCKS, |_| true);
        write_blocks(&subject.path, block, BLOCKS, |at| {
            !frozen || at != HOLE && at != UNWRITTEN
        });
        if frozen {
            let file = File::options().write(true).open(&subject.path).unwrap();
            raw::fallocate(file.as_fd(), 0, UNWRITTEN * block, block).unwrap();
            if disk.kind().reflink() {
                share(&subject.path, &subject.sharer, SHARED * block, block).unwrap();
            }
            file.sync_all().unwrap();
        }
        subject
    }

    /// The bytes pinned.
    #[must_use]
    pub fn pinned(&self) -> Range<u64> {
        PINNED.start * self.block..PINNED.end * self.block
    }

    /// Moves its stable blocks by a descriptor of their holder, which no
    /// permission event tells of.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    ///
    /// # Panics
    ///
    /// When there can be no further descriptor.
    pub fn move_blocks(&self, kind: Kind, holder: &File) -> raw::Result<()> {
        let name = if kind.is_xfs() {
            "xfs-swapext"
        } else {
            "ext4-move-extent"
        };
        let (offset, length) = self.bytes(Place::Stable);
        let target = Target {
            path: self.path.clone(),
            offset,
            length,
            block: self.block,
            other: self.other.clone(),
            door: Door::ALL[0],
            file: Some(holder.as_fd().try_clone_to_owned().unwrap()),
        };
        let attack = Attack::by_name(name).unwrap();
        (attack.run)(&target)
    }

    /// First byte and length of a place.
    #[must_use]
    pub fn bytes(&self, place: Place) -> (u64, u64) {
        let blocks = place.blocks();
        (
            blocks.start * self.block,
            (blocks.end - blocks.start) * self.block,
        )
    }

    /// Reads the block map of the pinned range.
    ///
    /// # Panics
    ///
    /// When it cannot be read.
    #[must_use]
    pub fn block_map(&self) -> mapdirect::BlockMap {
        let file = File::open(&self.path).unwrap();
        mapdirect::block_map(&file, self.pinned()).unwrap()
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        for path in [&self.path, &self.other, &self.sharer] {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Writes the blocks of a new file that `wanted` says yes to, each with bytes
/// of its own, and syncs it.
fn write_blocks(path: &Path, block: u64, blocks: u64, wanted: impl Fn(u64) -> bool) {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .unwrap();
    file.set_len(blocks * block).unwrap();
    let length = usize::try_from(block).unwrap();
    // What lies together is written at once.
    let mut together = Vec::new();
    for at in (0..blocks).filter(|at| wanted(*at)) {
        let value = u8::try_from(at % 251).unwrap() + 1;
        together.resize(together.len() + length, value);
        if at + 1 == blocks || !wanted(at + 1) {
            let start = (at + 1) * block - together.len() as u64;
            file.write_all_at(&together, start).unwrap();
            together.clear();
        }
    }
    file.sync_all().unwrap();
}

/// Makes `sharer` share a range of `path`.
fn share(path: &Path, sharer: &Path, offset: u64, length: u64) -> Result<()> {
    let io = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    let from = File::open(path).map_err(io)?;
    let into = File::create(sharer).map_err(io)?;
    crate::attack::clone_range(into.as_fd(), from.as_fd(), offset, length, 0)?;
    into.sync_all().map_err(io)
}
