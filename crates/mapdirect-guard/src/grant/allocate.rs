//! Makes frozen blocks stable under an existing pin.
//!
//! Nobody may change what is pinned, so the guard does it on behalf of the
//! holder, with the holder's rights and quota. The pin is never lifted. Until
//! the pin is settled anew, its blocks count as frozen for everybody else. The
//! holder goes on to see zeros there, which is what the new blocks hold.

use super::pending::lock;
use super::survey::write_back;
use super::{Granting, Judged, Survey, gone, hand_out, judge, length_of, refusal, system};
use crate::policy::{Operation, OperationKind as K};
use crate::table::{InodeId, Pin, Watched};
use crate::tripwire::look_now;
use crate::{Errno, Guard};
use mapdirect_proto::{
    AllocateRequest, BlockMap, Extent, ExtentState, Granted, PinRequest, Reason, Refusal,
};
use mapdirect_sys::mmap::page_size;
use mapdirect_sys::unix::Sender;
use mapdirect_sys::{inode_flags, setfsuid};
use rustix::fs::{FallocateFlags, OFlags};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// The outcome of an allocation.
#[derive(Debug)]
pub(crate) struct Allocated {
    /// The block map as it is now, if the allocation touched it at all. The
    /// descriptor holds the extents if they do not fit into a message.
    pub(crate) now: Option<(Granted, Option<OwnedFd>)>,
    pub(crate) result: Result<(), Refusal>,
}

/// How long others may take to finish with the same file.
const PATIENCE: Duration = Duration::from_secs(10);

/// Makes the blocks of a range stable. `file` is the description whose life is
/// the pin: a process that has this description holds the pin.
///
/// `is_wanted` says whether the holder still waits for the answer. Nobody else
/// needs the blocks, and the pin lives as long as the allocation takes.
pub(crate) fn allocate(
    guard: &Guard,
    request: AllocateRequest,
    file: OwnedFd,
    owner: Sender,
    is_wanted: &dyn Fn() -> bool,
) -> Allocated {
    match prepare(guard, request, file, owner, is_wanted) {
        Ok(allocated) => allocated,
        Err(refusal) => Allocated {
            now: None,
            result: Err(refusal),
        },
    }
}

fn prepare(
    guard: &Guard,
    request: AllocateRequest,
    file: OwnedFd,
    owner: Sender,
    is_wanted: &dyn Fn() -> bool,
) -> Result<Allocated, Refusal> {
    let stat = rustix::fs::fstat(&file).map_err(|errno| system("fstat", errno))?;
    let id = InodeId::from(&stat);
    let Some(watched) = guard.table.get(id) else {
        return Err(no_pin());
    };
    let state = lock(&watched, PATIENCE)?;
    let pins = watched.pins.load_full();
    let pin = pins
        .iter()
        .find(|pin| pin.id == request.pin && pin.settled().is_some() && !pin.is_dead())
        .cloned()
        .filter(|_| !state.retired)
        .ok_or_else(no_pin)?;
    let judged = judge_again(guard, &pin, file.as_fd())?;
    let allocation = Allocation {
        granting: Granting {
            guard,
            judged: &judged,
            watched: &watched,
            pin: &pin,
            patience: PATIENCE,
        },
        file: file.as_fd(),
    };
    // A pin that lives by a pipe has left no mark on its description.
    let is_held = pin.pid == owner.pid && pin.is_held_by_pipe();
    if !is_held && !guard.gate.is_the_pin(&allocation.granting, file.as_fd())? {
        return Err(no_pin());
    }
    if pin.follows() {
        return tell(guard, &watched, &pin, file.as_fd());
    }
    let range = allocation.pages_of(&request)?;
    let before = allocation.read()?;
    let work = Work::find(&before, &range);
    if work.is_empty() {
        // An earlier allocation may have made the blocks, but failed before it
        // promised them.
        return allocation.settle_anew(&before);
    }
    allocation.nobody_minds(&work, &range)?;
    allocation.has_space(&work, owner.uid)?;
    let filling = Filling {
        file: file.as_fd(),
        size: judged.facts.size,
        is_wanted,
    };
    pin.changes_or_is_done();
    let result = guard
        .own
        .for_long(|| filling.fill(&work, owner.uid, before.block_size()));
    // Whatever the result is, the block map shows what is there now. If the map
    // cannot be read, nothing is known of frozen blocks any more, and the
    // change stays under way for ever.
    let settled = allocation.settle_anew(&before)?;
    pin.changes_or_is_done();
    Ok(Allocated {
        now: settled.now,
        result: result.and(settled.result),
    })
}

/// Tells the holder of a pin of strength stable what the pin holds now. Its
/// holder makes blocks stable without the guard.
fn tell(
    guard: &Guard,
    watched: &Watched,
    pin: &Pin,
    file: BorrowedFd<'_>,
) -> Result<Allocated, Refusal> {
    look_now(guard, watched, pin, file);
    let map = pin.map().ok_or_else(no_pin)?;
    Ok(Allocated {
        now: Some(hand_out(pin, &map)?),
        result: Ok(()),
    })
}

fn no_pin() -> Refusal {
    refusal(
        Reason::Arguments,
        Errno::INVAL,
        "the descriptor is not that of a pin that lives",
        "allocate while the mapping exists, by way of it",
    )
}

/// Judges the pin as if it were requested now.
pub(super) fn judge_again(
    guard: &Guard,
    pin: &Pin,
    file: BorrowedFd<'_>,
) -> Result<Judged, Refusal> {
    let request = PinRequest {
        offset: pin.shown.start,
        length: length_of(&pin.shown),
        flags: pin.flags,
        patience_ms: 0,
    };
    let mut judged = judge(guard, &request, file)?;
    if !pin.follows() && judged.open_flags & OFlags::ACCMODE != OFlags::RDWR {
        return Err(refusal(
            Reason::NotReadWrite,
            Errno::ACCESS,
            "the pin was made by way of a descriptor that cannot write",
            "open the file for reading and writing before it is pinned",
        ));
    }
    judged.range = pin.shown.clone();
    judged.mapped.clone_from(&pin.mapped);
    Ok(judged)
}

/// The runs that need work, by kind of work, in file order.
#[derive(Debug, Default)]
struct Work {
    /// Runs without blocks.
    holes: Vec<Range<u64>>,
    /// Holes, and blocks that nothing was ever written to.
    zeros: Vec<Range<u64>>,
    /// Blocks that other files use as well.
    shared: Vec<Range<u64>>,
}

impl Work {
    fn find(map: &BlockMap, range: &Range<u64>) -> Self {
        let mut work = Self::default();
        for extent in map
            .extents()
            .iter()
            .filter_map(|extent| extent.clipped(range))
        {
            let run = extent.offset..extent.end();
            match extent.state {
                ExtentState::Hole => {
                    work.holes.push(run.clone());
                    work.zeros.push(run);
                }
                ExtentState::Unwritten => work.zeros.push(run),
                ExtentState::Shared => work.shared.push(run),
                _ => {}
            }
        }
        work
    }

    fn is_empty(&self) -> bool {
        self.zeros.is_empty() && self.shared.is_empty()
    }

    /// The number of bytes that need new blocks.
    fn bytes(&self) -> u64 {
        self.holes
            .iter()
            .chain(&self.shared)
            .map(|run| run.end - run.start)
            .sum()
    }
}

fn no_space(missing: Option<u64>) -> Refusal {
    let obstacle = missing.map_or_else(
        || String::from("the filesystem, or the quota, has no room for the blocks"),
        |bytes| format!("the filesystem lacks {bytes} bytes for the blocks"),
    );
    refusal(
        Reason::System,
        Errno::NOSPC,
        obstacle,
        "make room, and try again",
    )
}

/// An allocation under way.
struct Allocation<'a> {
    granting: Granting<'a>,
    /// The description whose life is the pin.
    file: BorrowedFd<'a>,
}

impl Allocation<'_> {
    /// The requested range, extended to whole pages and blocks, but not beyond
    /// the pin and the file.
    fn pages_of(&self, request: &AllocateRequest) -> Result<Range<u64>, Refusal> {
        let facts = &self.granting.judged.facts;
        let block = u64::from(facts.block_size).max(1);
        let unit = page_size().max(block);
        let pinned = &self.granting.pin.shown;
        let end = request
            .offset
            .checked_add(request.length)
            .filter(|end| request.length > 0 && *end <= pinned.end.next_multiple_of(unit))
            .filter(|_| request.offset >= pinned.start);
        let Some(end) = end else {
            return Err(refusal(
                Reason::Arguments,
                Errno::INVAL,
                format!("bytes {} to {} are pinned", pinned.start, pinned.end),
                "stay inside the pin",
            ));
        };
        let start = request.offset - request.offset % unit;
        let file_end = facts.size.next_multiple_of(block);
        if request.offset >= file_end {
            return Err(refusal(
                Reason::Arguments,
                Errno::INVAL,
                format!("the file ends at byte {}", facts.size),
                "grow the file first, and map it again",
            ));
        }
        let end = end.next_multiple_of(unit).min(pinned.end).min(file_end);
        Ok(start.max(pinned.start)..end)
    }

    fn read(&self) -> Result<BlockMap, Refusal> {
        mapdirect_model::block_map::read(self.file, self.granting.pin.shown.clone())
            .map_err(|errno| system("FIEMAP", errno))
    }

    /// Refuses the allocation if another pin does not permit it. The other pin
    /// may freeze the same blocks, which must then stay as they are. The holder
    /// will also map the new blocks writable, and the other pin must permit
    /// that, too.
    fn nobody_minds(&self, work: &Work, range: &Range<u64>) -> Result<(), Refusal> {
        let size = self.granting.judged.facts.size;
        let pins = self.granting.watched.pins.load();
        let moved = self.granting.watched.notes.moved();
        for other in pins.iter().filter(|other| other.id != self.granting.pin.id) {
            let Some(settled) = other.settled().filter(|_| !other.is_dead()) else {
                continue;
            };
            let minds = |operation: &Operation| settled.layers.refuses(operation, size, moved);
            // Nothing is written behind the end of the file.
            let writes = work.zeros.iter().chain(&work.shared).map(|run| {
                let mut write = Operation::new(K::Write, run.start..run.end.min(size));
                write.direct = false;
                write
            });
            let fills = work
                .holes
                .iter()
                .map(|run| Operation::new(K::AllocateKeepSize, run.clone()));
            let maps = self
                .granting
                .pin
                .mapped
                .iter()
                .map(|_| Operation::new(K::MapWrite, range.clone()));
            let minds = writes
                .chain(fills)
                .chain(maps)
                .any(|operation| minds(&operation));
            let gate = &self.granting.guard.gate;
            if minds && gate.has_ended(other, self.file) {
                // The last mapping of the other pin is gone; only the notice
                // has not arrived yet.
                gate.end(self.granting.watched, other);
                continue;
            }
            if minds {
                return Err(refusal(
                    Reason::FrozenBlocks,
                    Errno::TXTBSY,
                    format!(
                        "the same blocks are pinned by process {} as they are",
                        other.pid
                    ),
                    "have it let go of them first",
                ));
            }
        }
        Ok(())
    }

    /// Checks for space, because it is better to know before than halfway.
    fn has_space(&self, work: &Work, uid: u32) -> Result<(), Refusal> {
        let stat = rustix::fs::fstatvfs(self.file).map_err(|errno| system("statvfs", errno))?;
        // Some blocks are reserved for root.
        let blocks = if uid == 0 {
            stat.f_bfree
        } else {
            stat.f_bavail
        };
        let available = blocks.saturating_mul(stat.f_frsize);
        match work.bytes().checked_sub(available) {
            Some(missing) if missing > 0 => Err(no_space(Some(missing))),
            _ => Ok(()),
        }
    }

    /// Reads the block map again, and promises what it shows from now on.
    fn settle_anew(&self, before: &BlockMap) -> Result<Allocated, Refusal> {
        let Granting {
            guard,
            watched,
            pin,
            ..
        } = self.granting;
        let survey = Survey {
            granting: &self.granting,
            file: self.file,
            others_can_store: &|frozen| {
                let gate = &guard.gate;
                gate.others_can_store(&self.granting, self.file, frozen)
            },
        };
        let (map, result) = match survey.until_at_rest(false) {
            Ok((map, found)) => {
                pin.settle(&map, &found.pinned, found.kept_pages);
                // If publishing fails, others are still refused what was
                // frozen.
                let _ = guard.gate.publish(guard, watched);
                let result = match moved(before, &map) {
                    None => Ok(()),
                    Some(extent) => Err(refusal(
                        Reason::StillChanging,
                        Errno::IO,
                        format!(
                            "{} bytes at {} moved while others were allocated",
                            extent.length, extent.offset
                        ),
                        "take the extents as they are told now",
                    )),
                };
                (map, result)
            }
            // The holder must be told the block map in any case.
            Err(refusal) => {
                let map = self.read()?;
                pin.record(&map);
                (map, Err(refusal))
            }
        };
        Ok(Allocated {
            now: Some(hand_out(pin, &map)?),
            result,
        })
    }
}

/// The work of filling blocks, and whether somebody waits for it.
struct Filling<'a> {
    file: BorrowedFd<'a>,
    /// The end of the file.
    size: u64,
    is_wanted: &'a dyn Fn() -> bool,
}

impl Filling<'_> {
    /// Allocates and unshares blocks and writes zeros, as user `uid`.
    fn fill(&self, work: &Work, uid: u32, block: u32) -> Result<(), Refusal> {
        // XFS copies blocks in aligned windows, and takes dirty neighbours in a
        // window along, whether shared or not, unless it is told to copy no
        // more than needed. XFS decides this when it writes back, so the hint
        // stays until write-back is done.
        let hint = (!work.shared.is_empty())
            .then(|| inode_flags::copy_single_blocks(self.file, block))
            .transpose()
            .map_err(|errno| system("FS_IOC_FSSETXATTR", errno))?;
        let behalf = setfsuid::on_behalf_of(uid).map_err(|errno| system("setfsuid", errno))?;
        let filled = self
            .fill_holes(&work.holes)
            .and_then(|()| self.unshare(&work.shared))
            .and_then(|()| self.write_zeros(&work.zeros));
        drop(behalf);
        let written = write_back(self.file);
        drop(hint);
        filled.and(written)
    }

    /// Fills all of the holes or none.
    fn fill_holes(&self, holes: &[Range<u64>]) -> Result<(), Refusal> {
        for (at, hole) in holes.iter().enumerate() {
            let allocated = self.still_wanted().and_then(|()| {
                self.fallocate(FallocateFlags::KEEP_SIZE, hole)
                    .map_err(|errno| failed("fallocate", errno))
            });
            let Err(refusal) = allocated else {
                continue;
            };
            // Nothing was written to these blocks, and nobody else can have
            // written to them.
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            for hole in &holes[..=at] {
                // If this fails, the block map tells the holder what stays.
                let _ = self.fallocate(punch, hole);
            }
            return Err(refusal);
        }
        Ok(())
    }

    /// Fails if nobody waits for the blocks any more: then the pin must go,
    /// too.
    fn still_wanted(&self) -> Result<(), Refusal> {
        if (self.is_wanted)() {
            return Ok(());
        }
        Err(gone())
    }

    fn fallocate(&self, mode: FallocateFlags, run: &Range<u64>) -> Result<(), Errno> {
        loop {
            match rustix::fs::fallocate(self.file, mode, run.start, run.end - run.start) {
                Err(Errno::INTR) => {}
                other => return other,
            }
        }
    }

    fn unshare(&self, shared: &[Range<u64>]) -> Result<(), Refusal> {
        shared.iter().try_for_each(|run| {
            self.still_wanted()?;
            let mode = FallocateFlags::UNSHARE_RANGE | FallocateFlags::KEEP_SIZE;
            self.fallocate(mode, run)
                .map_err(|errno| failed("fallocate", errno))
        })
    }

    /// Writes real zeros to blocks that nothing was ever written to. A write
    /// makes only the written bytes dirty, unlike a store.
    fn write_zeros(&self, runs: &[Range<u64>]) -> Result<(), Refusal> {
        const CHUNK: usize = 256 << 10;
        let zeros = vec![0; CHUNK];
        let size = self.size;
        for run in runs {
            let mut at = run.start;
            let end = run.end.min(size);
            while at < end {
                self.still_wanted()?;
                let length = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
                match rustix::io::pwrite(self.file, &zeros[..length], at) {
                    Ok(0) => return Err(system("pwrite", Errno::IO)),
                    Ok(written) => at += written as u64,
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(failed("pwrite", errno)),
                }
            }
        }
        Ok(())
    }
}

fn failed(call: &str, errno: Errno) -> Refusal {
    match errno {
        Errno::NOSPC | Errno::DQUOT => no_space(None),
        other => system(call, other),
    }
}

/// The first block that was stable before and is not where it was.
fn moved(before: &BlockMap, now: &BlockMap) -> Option<Extent> {
    before
        .extents()
        .iter()
        .filter(|extent| extent.state == ExtentState::Written)
        .find(|extent| {
            let mut at = extent.offset;
            while at < extent.end() {
                let Some(found) = now.find(at) else {
                    return true;
                };
                let expected = extent.physical.map(|start| start + (at - extent.offset));
                let there = found.physical.map(|start| start + (at - found.offset));
                if !found.state.is_stable() || expected != there {
                    return true;
                }
                at = found.end();
            }
            false
        })
        .copied()
}
