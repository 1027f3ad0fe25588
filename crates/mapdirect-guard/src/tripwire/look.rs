//! Checks whether pinned blocks are where they were.
//!
//! A look opens the file and reads the part of its block map that an event was
//! about. Both may wait: for the gate, for the holder of the inode's lock, for
//! a frozen filesystem. So separate threads take the looks, one for each file
//! that makes them wait, and nobody waits for a look.
//!
//! One look is enough. As long as the promise holds, a pinned block stays in
//! one state and one place, whatever happens beside it. The filesystems change
//! their lists of extents under a lock that FIEMAP takes too (`ILOCK` in XFS,
//! `i_data_sem` and the lock of the extent status tree in ext4). So FIEMAP sees
//! each block as it is before or after a change, never in between. FIEMAP reads
//! a long map piece by piece; each piece is consistent in itself, and only that
//! is compared.

use super::compare::{self, difference, difference_of_stable, extents_in, grown};
use super::wires::{Listened, Who};
use crate::grant::read_now;
use crate::table::{Changes, Pin, Watched};
use crate::{Errno, Guard};
use mapdirect_proto::{BlockMap, Breach, Cause};
use mapdirect_sys::{file_handle, proc_mountinfo};
use rustix::fs::{Mode, OFlags};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// A change of a file's block map, as an event told it.
#[derive(Clone, Debug)]
pub(super) struct Hit {
    pub(super) who: Who,
    /// The name of the thread.
    pub(super) command: String,
    /// The first block and the number of blocks, if known.
    pub(super) blocks: Option<(u64, u64)>,
    /// The name of the tracepoint.
    pub(super) at: &'static str,
    /// A later look found everything as it was.
    pub(super) seen: bool,
}

impl Hit {
    fn concerns(&self, map: &BlockMap, range: &Range<u64>) -> bool {
        self.blocks.is_none_or(|blocks| {
            let bytes = bytes_of(blocks, map);
            bytes.start.max(range.start) < bytes.end.min(range.end)
        })
    }
}

/// The task of one look.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) watched: Arc<Watched>,
    pub(super) file: Arc<Listened>,
    pub(super) blocks: Blocks,
    pub(super) hits: Vec<Hit>,
    /// The filesystem may have been shut down.
    pub(super) may_be_dead: bool,
}

/// The result of a look. Of several pins the last of these counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Outcome {
    /// Everything is as it was, or the difference has been reported.
    Done,
    /// Nothing is broken, but more is stable than before.
    Grown,
    /// Some blocks cannot be judged yet: a grant is under way, or the holder
    /// has blocks allocated.
    Undecided,
    /// The look was not possible.
    Failed,
}

/// A set of blocks of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Blocks {
    /// The first block and the number of blocks of each run.
    runs: Vec<(u64, u64)>,
    all: bool,
}

impl Blocks {
    /// The most runs that are kept apart.
    const MOST: usize = 16;

    pub(super) fn add(&mut self, blocks: Option<(u64, u64)>) {
        let Some((first, count)) = blocks else {
            self.all = true;
            self.runs.clear();
            return;
        };
        if self.all {
            return;
        }
        let end = first.saturating_add(count);
        let meets = |run: &(u64, u64)| run.0 <= end && first <= run.0.saturating_add(run.1);
        if let Some(run) = self.runs.iter_mut().find(|run| meets(run)) {
            let last = run.0.saturating_add(run.1).max(end);
            run.0 = run.0.min(first);
            run.1 = last - run.0;
            return;
        }
        self.runs.push((first, count));
        if self.runs.len() > Self::MOST {
            let first = self.runs.iter().map(|run| run.0).min().unwrap_or(0);
            let end = self.runs.iter().map(|run| run.0.saturating_add(run.1));
            let end = end.max().unwrap_or(u64::MAX);
            self.runs = vec![(first, end - first)];
        }
    }

    /// These blocks and others.
    pub(super) fn and(&self, others: &Self) -> Self {
        let mut both = self.clone();
        if others.all {
            both.add(None);
        }
        for run in &others.runs {
            both.add(Some(*run));
        }
        both
    }

    /// The blocks that lie in a pin, in bytes.
    fn of(&self, map: &BlockMap) -> Vec<Range<u64>> {
        let pinned = map.range();
        if self.all {
            return vec![pinned];
        }
        let clip = |run: &(u64, u64)| {
            let bytes = bytes_of(*run, map);
            let clipped = bytes.start.max(pinned.start)..bytes.end.min(pinned.end);
            (!clipped.is_empty()).then_some(clipped)
        };
        self.runs.iter().filter_map(clip).collect()
    }
}

fn bytes_of((first, count): (u64, u64), map: &BlockMap) -> Range<u64> {
    let block = u64::from(map.block_size()).max(1);
    let start = first.saturating_mul(block);
    start..start.saturating_add(count.saturating_mul(block))
}

/// Whether changed blocks are covered by a pin. A pin whose blocks are not
/// known yet may cover any.
pub(super) fn concerns(pin: &Pin, blocks: Option<(u64, u64)>) -> bool {
    if pin.is_dead() {
        return false;
    }
    match (blocks, pin.map()) {
        (Some(blocks), Some(map)) => {
            let bytes = bytes_of(blocks, &map);
            let pinned = map.range();
            bytes.start.max(pinned.start) < bytes.end.min(pinned.end)
        }
        _ => true,
    }
}

/// Why a pin is lost when its filesystem is.
const DEAD: &str = "its filesystem was shut down: nothing is written to the blocks any more";

/// Takes a look.
pub(super) fn look(guard: &Guard, order: &Order) -> Outcome {
    let watched = &order.watched;
    let pins = guard.pins_awake_or_asleep(watched);
    let alive: Vec<&Arc<Pin>> = pins.iter().filter(|pin| !pin.is_dead()).collect();
    if alive.is_empty() {
        return Outcome::Done;
    }
    let _looking = watched.look();
    let holders: Vec<i32> = alive.iter().map(|pin| pin.pid).collect();
    let file = match guard.own.during(|| open(&order.file, &holders)) {
        Ok(file) => file,
        // The inode is gone, and so is every pin on it. Pins of a file that has
        // its number now are none of it.
        Err(Errno::STALE) => {
            if guard.tripwire.is_current(&order.file) {
                guard.spoil(watched.id);
            }
            return Outcome::Done;
        }
        Err(_) if order.may_be_dead && is_shut_down(&order.file, &holders) => {
            for pin in alive {
                guard.notices.lost(pin, DEAD);
            }
            guard.spoil(watched.id);
            return Outcome::Done;
        }
        Err(_) => return Outcome::Failed,
    };
    let mut outcome = Outcome::Done;
    for pin in alive {
        let found = look_at(guard, order, pin, file.as_fd());
        outcome = outcome.max(found);
    }
    outcome
}

/// What a pin promises, or `None` as long as that is not fully known: a pin of
/// strength stable begins with a map in which nothing is held. Once it is
/// granted it stays so. That must be asked before the map is read: the grant may
/// come to its end at any time, and the map read before would be an older one,
/// beside which all that is shared would seem to have come to be shared.
fn promised(pin: &Pin) -> Option<(Changes, Arc<BlockMap>)> {
    if pin.is_being_granted() {
        return None;
    }
    let changes = pin.changes();
    Some((changes, pin.map()?))
}

fn look_at(guard: &Guard, order: &Order, pin: &Pin, file: BorrowedFd<'_>) -> Outcome {
    let Some((before, map)) = promised(pin) else {
        return Outcome::Undecided;
    };
    let mut outcome = Outcome::Done;
    for range in order.blocks.of(&map) {
        let now = if pin.follows() {
            read_now(guard, pin, file, range.clone())
        } else {
            mapdirect_model::block_map::read(file, range.clone())
        };
        let Ok(now) = now else {
            return Outcome::Failed;
        };
        let Some(mut found) = difference(pin.follows(), &map, &now, &range) else {
            if pin.follows() {
                outcome = outcome.max(grow(pin, &now, &range));
            }
            continue;
        };
        // The holder has blocks allocated, so frozen blocks change. Stable
        // blocks must not change even then.
        if before.is_under_way() || pin.changes() != before {
            outcome = Outcome::Undecided;
            match difference_of_stable(&map, &now, &range) {
                Some(stable) => found = stable,
                None => continue,
            }
        }
        // A dormant pin on this file must not be taken up again.
        guard.spoil(order.watched.id);
        // If the pin is alive now, it was alive when the blocks were changed.
        if has_ended(guard, pin, file) {
            return Outcome::Done;
        }
        let hit = who(&order.hits, &map, &found.range);
        let cause = hit.map(|hit| {
            let what = format!("thread {} in {}", hit.who.tid, hit.at);
            Cause::new(hit.who.pid, hit.command, what)
        });
        let was = extents_in(&map, &found.range);
        let is = extents_in(&now, &found.range);
        let id = (order.watched.id.device(), order.watched.id.inode);
        let (time, at) = (since_the_epoch(), found.range.clone());
        let breach = Breach::new(pin.id, id, "", time, at, (&was, &is)).caused_by(cause);
        // A breach is reported once: from now on this is the reference.
        pin.renew(&map, compare::renewed(&map, &now, &found.range));
        if pin.follows() {
            grow(pin, &now, &range);
        }
        guard.notices.breach(&order.watched, pin, breach);
    }
    outcome
}

/// Has a pin of strength stable hold what has become stable.
fn grow(pin: &Pin, now: &BlockMap, range: &Range<u64>) -> Outcome {
    let map = pin.map();
    let more = map
        .as_ref()
        .and_then(|map| Some((map, grown(map, now, range)?)));
    let Some((seen, more)) = more else {
        return Outcome::Done;
    };
    pin.renew(seen, more);
    Outcome::Grown
}

/// Reads everything that a pin of strength stable holds now, and has the pin
/// hold it.
pub(crate) fn look_now(guard: &Guard, watched: &Watched, pin: &Pin, file: BorrowedFd<'_>) {
    let _looking = watched.look();
    if let Some(map) = pin.map()
        && let Ok(now) = read_now(guard, pin, file, map.range())
        && difference(true, &map, &now, &map.range()).is_none()
    {
        grow(pin, &now, &map.range());
    }
}

fn has_ended(guard: &Guard, pin: &Pin, file: BorrowedFd<'_>) -> bool {
    pin.is_dead() || guard.gate.has_ended(pin, file)
}

/// The change to blame: the first since everything was last in order. If an
/// event told of something that was only about to happen, this is the last one
/// before.
fn who(hits: &[Hit], map: &BlockMap, range: &Range<u64>) -> Option<Hit> {
    let mut concerned = hits.iter().filter(|hit| hit.concerns(map, range));
    let first = concerned.clone().find(|hit| !hit.seen);
    first.or_else(|| concerned.next_back()).cloned()
}

fn since_the_epoch() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| u64::try_from(since.as_nanos()).ok())
        .unwrap_or(0)
}

/// Opens a file through any mount of its filesystem.
fn open(file: &Listened, holders: &[i32]) -> Result<OwnedFd, Errno> {
    by_mounts(file, holders, |place| {
        let opened = file_handle::open(place, &file.handle, READING)?;
        let stat = rustix::fs::fstat(&opened)?;
        let is_it = (stat.st_dev, stat.st_ino) == (file.id.dev, file.id.inode);
        is_it.then_some(opened).ok_or(Errno::NODEV)
    })
}

/// Whether a filesystem whose files cannot be opened was shut down. Nothing on
/// such a filesystem can be synced, and on XFS not even a directory can be
/// opened. The error of opening a file does not tell: behind permission events
/// it is EPERM.
fn is_shut_down(file: &Listened, holders: &[i32]) -> bool {
    let synced = by_mounts(file, holders, |place| rustix::fs::fsync(place));
    matches!(synced, Err(Errno::IO | Errno::SHUTDOWN))
}

const READING: OFlags = OFlags::RDONLY
    .union(OFlags::CLOEXEC)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY);

/// Does something through any mount of a file's filesystem, here or in the
/// namespace of its holders. No mount is kept open for that, because that would
/// keep the filesystem busy.
fn by_mounts<T>(
    file: &Listened,
    holders: &[i32],
    act: impl Fn(BorrowedFd<'_>) -> Result<T, Errno>,
) -> Result<T, Errno> {
    let mut last = match by_mounts_of(file, None, &act) {
        Err(errno) => errno,
        done => return done,
    };
    for pid in holders {
        match by_mounts_of(file, Some(*pid), &act) {
            Err(Errno::NODEV) => {}
            Err(errno) => last = errno,
            done => return done,
        }
    }
    Err(last)
}

/// The same through the mounts that a process sees, or this process.
fn by_mounts_of<T>(
    file: &Listened,
    pid: Option<i32>,
    act: impl Fn(BorrowedFd<'_>) -> Result<T, Errno>,
) -> Result<T, Errno> {
    let device = file.id.device();
    // A process that is gone has no mounts any more.
    let mounts = proc_mountinfo::read(pid).map_err(|_| Errno::NODEV)?;
    let mut last = Errno::NODEV;
    for mount in mounts
        .iter()
        .filter(|mount| (mount.major, mount.minor) == (device.major, device.minor))
    {
        let place = pid.map_or_else(
            || mount.mount_point.clone(),
            |pid| format!("/proc/{pid}/root{}", mount.mount_point),
        );
        let done =
            rustix::fs::open(place, READING, Mode::empty()).and_then(|place| act(place.as_fd()));
        match done {
            Err(Errno::NODEV) => {}
            Err(errno) => last = errno,
            done => return done,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Pinned;
    use mapdirect_model::facts::geometry;
    use mapdirect_proto::{DeviceId, Extent, ExtentState, Flags};
    use mapdirect_sys::unix::Sender;
    use proptest::prelude::*;

    fn map() -> BlockMap {
        let device = DeviceId { major: 7, minor: 0 };
        let extent = Extent::new(0, Some(0), 1 << 20, ExtentState::Written);
        BlockMap::new(device, 10, 1 << 20, 100..200, [extent])
    }

    fn hit(tid: i32, blocks: Option<(u64, u64)>, seen: bool) -> Hit {
        Hit {
            who: Who {
                pid: tid,
                tid,
                time: 0,
            },
            command: String::new(),
            blocks,
            at: "",
            seen,
        }
    }

    #[test]
    fn whoever_came_first_since_all_was_well_did_it() {
        let tid = |hits: &[Hit]| who(hits, &map(), &(120..130)).map(|hit| hit.who.tid);
        let before = hit(1, Some((12, 1)), true);
        let elsewhere = hit(2, Some((13, 1)), false);
        let first = hit(3, Some((0, 13)), false);
        let next = hit(4, None, false);
        assert_eq!(
            tid(&[before.clone(), elsewhere.clone(), first, next]),
            Some(3)
        );
        assert_eq!(
            tid(&[hit(9, None, true), before, elsewhere.clone()]),
            Some(1)
        );
        assert_eq!(tid(&[elsewhere]), None);
    }

    #[test]
    fn nothing_is_promised_until_it_is_granted() {
        let owner = Sender { pid: 1, uid: 0 };
        let pin = Pin::unsettled(1, 100..200, None, 100..200, Flags::STABLE, owner);
        assert_eq!(promised(&pin), None);
        let nothing = BlockMap::new(map().device(), 10, 0, 100..200, []);
        pin.settle(
            &nothing,
            &Pinned::stable(100..200, None, 10, geometry(false)),
            None,
        );
        assert_eq!(promised(&pin), None);
        pin.record(&map());
        assert_eq!(promised(&pin), None);
        pin.hand_over();
        let (changes, promised) = promised(&pin).unwrap();
        assert_eq!((changes, &*promised), (pin.changes(), &map()));
    }

    #[test]
    fn too_many_runs_become_one() {
        let mut blocks = Blocks::default();
        for run in 0..=16 {
            blocks.add(Some((11 + 2 * (run % 4) + 100 * (run / 4), 1)));
        }
        assert_eq!(blocks.of(&map()), vec![110..200; 1]);
        blocks.add(None);
        assert_eq!(blocks.of(&map()), vec![100..200; 1]);
    }

    proptest! {
        #[test]
        fn no_block_is_forgotten(
            runs in proptest::collection::vec((0u64..40, 1u64..8), 1..40),
        ) {
            let mut blocks = Blocks::default();
            for run in &runs {
                blocks.add(Some(*run));
            }
            let ranges = blocks.of(&map());
            for (first, count) in runs {
                for block in first..first + count {
                    let byte = block * 10;
                    if map().range().contains(&byte) {
                        prop_assert!(ranges.iter().any(|range| range.contains(&byte)));
                    }
                }
            }
        }

        #[test]
        fn absurd_numbers_do_no_harm(first: u64, count: u64, other: u64) {
            let mut blocks = Blocks::default();
            blocks.add(Some((first, count)));
            blocks.add(Some((other, count)));
            let _ = blocks.of(&map());
        }
    }
}
