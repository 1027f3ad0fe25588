//! Finds out when a pin ends, and does what is needed then.
//!
//! A pin lives as long as its description: until the last mapping made from it
//! is gone, in whichever process. A close event on the inode says when to check
//! whether the description is still there. The event comes a moment before the
//! locks of the description go (`__fput`, fs/file_table.c), so a pin that still
//! stands is checked once more.
//!
//! The check uses something that no reader of the file can have, because
//! otherwise every reader could keep a pin alive: see [`Carrier`]. Two of these
//! can mislead for a while. A reader's lock may hide that a pin's lock is gone,
//! and an open that waits to be refused counts as a writer. So a lease is asked
//! for several times that is given only when nobody can write
//! ([`Lease::NoWriter`]). If it is never given, a search for descriptors and
//! mappings that can write decides.
//!
//! An inode whose last pin has ended stays behind the gate for a while if
//! somebody still has it open. A new pin then finds the gate closed and the
//! proof done. Nothing is held open for that, and no mount that somebody could
//! want to unmount is kept busy ([`Watched::cast_anchor`]). If nobody else has
//! the file open, the gate lets go of the file and its filesystem at once.
//!
//! Nobody else notices these checks: close events name the file without a
//! descriptor, and the file is opened through descriptions that raise no events
//! ([`OwnOpens::quietly`](crate::table::OwnOpens::quietly)).

use super::{Gate, MASK, is_final};
use crate::journal::{Journal, Kept};
use crate::openers::{Mark, Wanted, openers};
use crate::table::{Carrier, InodeId, LOCK_BASE, Pin, Watched};
use crate::wake::{Waker, wait_any};
use crate::{Errno, Guard};
use crossbeam_queue::SegQueue;
use mapdirect_proto::Flags;
use mapdirect_sys::fanotify::{Group, Mask, Object};
use mapdirect_sys::fcntl::{Lease, lease_holds};
use mapdirect_sys::{pidfd, proc, proc_locks};
use rustix::fs::{Mode, OFlags};
use std::cell::{Cell, OnceCell};
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The close events that the group gets.
const CLOSES: Mask = Mask::from_bits(Mask::CLOSE_WRITE.bits() | Mask::CLOSE_NOWRITE.bits());

/// The events that tell of the names of a file, which the group gets for pins
/// that deny others to touch these.
const NAMES: Mask = Mask::from_bits(Mask::ATTRIBUTES.bits() | Mask::MOVE_SELF.bits());
/// Everything that the group may get for a file.
const EVERYTHING: Mask = Mask::from_bits(CLOSES.bits() | NAMES.bits());

/// How long an inode without pins stays behind the gate while others have it
/// open.
const LINGER: Duration = Duration::from_millis(250);
/// The pause between two rounds, so that many closes are handled together.
const ROUND: Duration = Duration::from_micros(300);
/// When to check pins again whose lock still stood after a close.
const SECOND_LOOK: Duration = Duration::from_millis(20);
/// The pause before the last check, unless a foreign lock is seen; each pause is
/// twice as long as the one before.
const LAST_LOOK: Duration = Duration::from_millis(160);
/// When to look for pins that ended without a notice, after the notice of a
/// close was lost. The lock may stand a moment longer.
const SWEEPS: [Duration; 4] = [
    SECOND_LOOK,
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_secs(2),
];
/// When to do so without a reason, while anything is pinned: the kernel does
/// not report a lost notice that is followed by others (`fanotify_read`).
const SWEEP: Duration = Duration::from_secs(5);

/// The group that gets close events, and the way to reach the thread that reads
/// them.
#[derive(Debug)]
pub(crate) struct Lifetime {
    closes: Group,
    waker: Waker,
    /// Inodes with pins that were found dead.
    with_dead: SegQueue<InodeId>,
    /// The inodes that close events may be about. Two filesystems that are
    /// copies of each other give their files the same names.
    objects: Mutex<HashMap<Object, Vec<InodeId>>>,
}

impl Lifetime {
    /// The one that reads the close events of a group.
    pub(super) fn of(closes: Group) -> Result<Self, Errno> {
        Ok(Self {
            closes,
            waker: Waker::new()?,
            with_dead: SegQueue::new(),
            objects: Mutex::default(),
        })
    }

    /// Gets the close events of a file from now on.
    pub(super) fn watch(
        &self,
        journal: &Arc<Journal>,
        watched: &Watched,
        file: BorrowedFd<'_>,
    ) -> Result<(), Errno> {
        // There may be one from before, whose marks have gone.
        self.forget(watched);
        let object = watched.cast_anchor(file)?;
        if let Some(path) = watched.anchor() {
            let kept = journal.keep_file(&watched.record(), path.as_fd())?;
            watched.outlives_by(kept);
        }
        self.expect(object, watched);
        self.closes.add(CLOSES, file)
    }

    /// Takes over a file whose close events an earlier guard got.
    pub(super) fn watch_again(
        &self,
        watched: &Watched,
        path: OwnedFd,
        kept: Kept,
    ) -> Result<(), Errno> {
        let object = watched.recast_anchor(path, kept)?;
        self.expect(object, watched);
        Ok(())
    }

    fn expect(&self, object: Object, watched: &Watched) {
        let mut objects = self.objects();
        let ids = objects.entry(object).or_default();
        if !ids.contains(&watched.id) {
            ids.push(watched.id);
        }
    }

    /// Learns from now on when a name of a file goes.
    pub(super) fn watch_names(&self, watched: &Watched, file: BorrowedFd<'_>) -> Result<(), Errno> {
        self.closes.add(NAMES, file)?;
        watched.has_names(mapdirect_sys::stat::links(&rustix::fs::fstat(file)?));
        Ok(())
    }

    /// Forgets a file whose close events do not come any more.
    fn forget(&self, watched: &Watched) {
        let Some(object) = watched.weigh_anchor() else {
            return;
        };
        let mut objects = self.objects();
        if let Entry::Occupied(mut ids) = objects.entry(object) {
            ids.get_mut().retain(|id| *id != watched.id);
            if ids.get().is_empty() {
                ids.remove();
            }
        }
    }

    fn objects(&self) -> MutexGuard<'_, HashMap<Object, Vec<InodeId>>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the thread remove the dead pins of an inode from the table.
    pub(super) fn take_out_dead(&self, id: InodeId) {
        self.with_dead.push(id);
        self.waker.wake();
    }

    /// Whether the close events of a file come.
    pub(super) fn watches(&self, file: BorrowedFd<'_>) -> Result<bool, Errno> {
        self.closes.has_mark(file)
    }

    /// Stops the close events of a file, and then forgets the file. A mark that
    /// is gone already is as good as a removed one.
    pub(super) fn let_go(&self, watched: &Watched, file: BorrowedFd<'_>) {
        let _ = self.closes.remove(EVERYTHING, file);
        self.forget(watched);
    }
}

/// An inode that stays behind the gate without pins.
struct Lingering {
    watched: Arc<Watched>,
    until: Instant,
}

struct Keeper<'guard> {
    guard: &'guard Guard,
    gate: &'guard Gate,
    lingering: HashMap<InodeId, Lingering>,
    second_looks: HashMap<InodeId, SecondLook>,
    sweep: Sweep,
}

/// When to look at pins without a close event.
struct Sweep {
    at: Instant,
    /// How many of [`SWEEPS`] are done.
    done: usize,
}

impl Sweep {
    fn new() -> Self {
        Self {
            at: Instant::now() + SWEEP,
            done: SWEEPS.len(),
        }
    }

    fn soon(&mut self) {
        self.done = 0;
        self.at = Instant::now() + SWEEPS[0];
    }

    fn next(&mut self) {
        self.done += 1;
        self.at = Instant::now() + SWEEPS.get(self.done).copied().unwrap_or(SWEEP);
    }
}

/// When to check an inode once more.
struct SecondLook {
    /// Whether the closed description could write.
    could_write: bool,
    at: Instant,
    /// The pause before this check.
    after: Duration,
}

/// Serves the close events until the guard stops.
///
/// # Errors
///
/// When events cannot be read any more.
pub(super) fn run(guard: &Guard, gate: &Gate) -> Result<(), Errno> {
    let mut keeper = Keeper {
        guard,
        gate,
        lingering: HashMap::new(),
        second_looks: HashMap::new(),
        sweep: Sweep::new(),
    };
    // Pins that were taken over may have ended meanwhile.
    keeper.sweep.soon();
    let mut buffer = vec![0; 64 * 1024];
    let mut undecided: Vec<(InodeId, OwnedFd, bool)> = Vec::new();
    while !guard.is_stopping() {
        let lifetime = &gate.lifetime;
        let timeout = if undecided.is_empty() {
            keeper.next_deadline()
        } else {
            Duration::ZERO
        };
        let fds = [
            lifetime.closes.as_fd(),
            lifetime.waker.as_fd(),
            guard.stopped.as_fd(),
        ];
        let [_, woken, _] = wait_any(&fds, Some(timeout))?;
        if woken {
            lifetime.waker.clear();
        }
        for (id, file, could_write) in std::mem::take(&mut undecided) {
            if !keeper.tend(id, file.as_fd()) {
                keeper.look_again(id, could_write);
            }
        }
        let mut closed: HashMap<InodeId, bool> = HashMap::new();
        let mut renamed: HashMap<InodeId, (bool, Option<i32>)> = HashMap::new();
        let read = lifetime.closes.read(&mut buffer, |event| {
            let objects = lifetime.objects();
            let ids = event.object.and_then(|object| objects.get(&object));
            let could_write = event.mask.intersects(Mask::CLOSE_WRITE);
            for id in ids.into_iter().flatten() {
                if event.mask.intersects(CLOSES) {
                    *closed.entry(*id).or_insert(false) |= could_write;
                }
                if event.mask.intersects(NAMES) {
                    let moved = event.mask.intersects(Mask::MOVE_SELF);
                    let first = (false, Some(event.tid));
                    let (any_moved, by) = renamed.entry(*id).or_insert(first);
                    *any_moved |= moved;
                    *by = by.filter(|tid| *tid == event.tid);
                }
            }
        });
        match read {
            Ok(_) => {}
            Err(errno) if is_final(errno) => return Err(errno),
            Err(Errno::AGAIN | Errno::INTR) => {}
            // The notice of one close is lost: its filesystem is dead, or
            // descriptors are short. The gate itself checks whether a pin is
            // alive before it refuses.
            Err(_) => {
                keeper.sweep.soon();
                std::thread::sleep(ROUND);
            }
        }
        for (id, (moved, by)) in renamed {
            keeper.tell_of_names(id, moved, by);
        }
        let busy = !closed.is_empty();
        for (id, could_write) in closed {
            if let Some(file) = keeper.open(id)
                && !keeper.tend(id, file.as_fd())
            {
                undecided.push((id, file, could_write));
            }
        }
        while let Some(id) = lifetime.with_dead.pop() {
            // The gate found pins dead. The close event that came with their
            // end provides a description with which to let the inode go.
            let Some(watched) = guard.table.get(id) else {
                continue;
            };
            watched.remove(Pin::is_dead);
            // A pin that was taken away from its holder leaves no close event.
            if watched.pins.load().is_empty()
                && let Some(file) = keeper.open(id)
            {
                keeper.tend(id, file.as_fd());
            }
        }
        keeper.look_at_what_is_due();
        if busy {
            std::thread::sleep(ROUND);
        }
    }
    Ok(())
}

impl Gate {
    /// Removes the marks of a file that can be reached only by a path.
    fn unmark_at(&self, path: BorrowedFd<'_>) {
        let _ = self.group.remove_at(MASK, path);
        let _ = self.lifetime.closes.remove_at(EVERYTHING, path);
    }
}

impl Keeper<'_> {
    fn next_deadline(&self) -> Duration {
        let lingering = self.lingering.values().map(|entry| entry.until);
        let looks = self.second_looks.values().map(|look| look.at);
        let due = lingering.chain(looks).fold(self.sweep.at, Instant::min);
        due.saturating_duration_since(Instant::now())
    }

    /// Tells holders whose pins deny it that a name of their file has `moved`, or
    /// that there are fewer than there were. One thread did it all, or several.
    fn tell_of_names(&self, id: InodeId, moved: bool, by: Option<i32>) {
        let Some(watched) = self.guard.table.get(id) else {
            return;
        };
        let links = watched
            .anchor()
            .and_then(|path| rustix::fs::fstat(path).ok())
            .map(|stat| mapdirect_sys::stat::links(&stat));
        let fewer = links.is_some_and(|links| watched.has_names(links) > links);
        let process =
            |tid| pidfd::of_thread(tid).and_then(|thread| pidfd::process_of(thread.as_fd()));
        let who = match by.map(|tid| (tid, process(tid))) {
            Some((_, Ok(process))) => format!("process {process}"),
            // It may be gone by now.
            Some((tid, Err(_))) => format!("thread {tid}"),
            None => String::from("several threads"),
        };
        // What was neither was something else.
        let moved = moved.then(|| format!("a name of the file was changed by {who}"));
        let fewer = fewer.then(|| {
            format!(
                "a name of the file was removed or given to another file by {who}; names left: {}",
                links.unwrap_or(0)
            )
        });
        for pin in watched.pins.load().iter() {
            if pin.flags.contains(Flags::DENY_RENAME) && !pin.is_dead() {
                for how in moved.iter().chain(&fewer) {
                    self.guard.notices.renamed(pin, how);
                }
            }
        }
    }

    /// Opens an inode behind the gate without raising events.
    fn open(&self, id: InodeId) -> Option<OwnedFd> {
        let path = self.guard.table.get(id)?.anchor()?;
        let open = || proc::reopen(path.as_fd(), OFlags::RDONLY | OFlags::NONBLOCK);
        self.guard.own.quietly(open).ok()
    }

    fn look_again(&mut self, id: InodeId, could_write: bool) {
        let look = self.second_looks.entry(id).or_insert_with(|| SecondLook {
            could_write,
            at: Instant::now() + SECOND_LOOK,
            after: SECOND_LOOK,
        });
        look.could_write |= could_write;
    }

    fn look_at_what_is_due(&mut self) {
        let now = Instant::now();
        let due: Vec<_> = self
            .second_looks
            .extract_if(|_, look| look.at <= now)
            .collect();
        for (id, mut look) in due {
            let Some(file) = self.open(id) else {
                continue;
            };
            let is_last = look.after >= LAST_LOOK;
            let unsure = Cell::new(false);
            let settled = self.tend_with(id, file.as_fd(), |watched, pin, file| {
                let can_be_found = || {
                    let found = search(watched, pin);
                    unsure.set(unsure.get() || found.is_none());
                    found != Some(false)
                };
                has_ended_for_sure(watched, pin, file, look.could_write, is_last, can_be_found)
            });
            // There may be no further notice of the end.
            let again = !is_last && look.could_write || unsure.get() || self.has_foreign_locks(id);
            if !settled && again {
                if !unsure.get() {
                    look.after = (look.after * 2).min(SWEEP);
                }
                look.at = Instant::now() + look.after;
                self.second_looks.entry(id).or_insert(look);
            }
        }
        let over: Vec<_> = self
            .lingering
            .extract_if(|_, entry| entry.until <= now)
            .map(|(_, entry)| entry)
            .collect();
        for entry in over {
            self.stop_lingering(entry);
        }
        if self.sweep.at <= now {
            self.sweep();
            self.sweep.next();
        }
    }

    /// Ends pins whose description is gone without a notice to the guard. Their
    /// files cannot be opened, or the pins would have been checked already. So
    /// the list of locks has to decide, together with `/proc`.
    fn sweep(&mut self) {
        let pinned: Vec<_> = self
            .guard
            .table
            .all()
            .into_iter()
            .filter(|watched| {
                watched
                    .pins
                    .load()
                    .iter()
                    .any(|pin| !pin.is_being_granted())
            })
            .collect();
        if pinned.is_empty() {
            return;
        }
        let mut listed = HashSet::new();
        // The list may leave out some locks while it changes.
        for look in 0..3 {
            if look > 0 {
                std::thread::sleep(ROUND);
            }
            match proc_locks::read_all() {
                Ok(locks) => listed.extend(
                    locks
                        .iter()
                        .filter(|lock| lock.start >= LOCK_BASE)
                        .map(|lock| ((lock.major, lock.minor), lock.inode, lock.start)),
                ),
                Err(_) => return,
            }
        }
        for watched in pinned {
            let device = watched.id.device();
            let pins = watched.pins.load_full();
            let is_listed = |pin: &Pin| {
                let key = (
                    (device.major, device.minor),
                    watched.id.inode,
                    pin.lock_byte(),
                );
                listed.contains(&key)
            };
            let file = OnceCell::new();
            let is_alive_by = |pin: &Pin| {
                let file = file.get_or_init(|| self.open(watched.id)).as_ref();
                file.is_some_and(|file| pin.is_alive(file.as_fd()))
            };
            let has_ended = |pin: &Pin| match pin.carrier() {
                Carrier::Pipe(_) => !pin.is_held_by_pipe(),
                Carrier::Lock => !is_listed(pin) && search(&watched, pin) == Some(false),
                Carrier::Writers => !is_alive_by(pin) && search(&watched, pin) == Some(false),
            };
            let ended: HashSet<u64> = pins
                .iter()
                .filter(|pin| pin.is_dead() || pin.is_handed_over() && has_ended(pin))
                .map(|pin| pin.id)
                .collect();
            if ended.is_empty() {
                continue;
            }
            watched.remove(|pin| ended.contains(&pin.id));
            if watched.pins.load().is_empty() {
                self.forget(&watched);
            }
        }
    }

    /// Lets an inode without pins go that cannot be opened any more.
    fn forget(&mut self, watched: &Arc<Watched>) {
        let Some(mut state) = watched.try_grant() else {
            return;
        };
        if state.retired || !watched.pins.load().is_empty() {
            return;
        }
        state.retired = true;
        self.lingering.remove(&watched.id);
        self.second_looks.remove(&watched.id);
        // If marks stay, they are on an inode for which nothing is refused.
        if let Some(path) = path_to(watched) {
            self.gate.unmark_at(path.as_fd());
        }
        self.guard.table.remove(watched);
    }

    /// Ends the pins of an inode whose lock is gone. `file` is a description of
    /// the inode that is closed soon. Says whether that settles the matter:
    /// `false` when pins are left, because the close may have been about any of
    /// them.
    fn tend(&mut self, id: InodeId, file: BorrowedFd<'_>) -> bool {
        self.tend_with(id, file, |_, pin, file| !pin.is_alive(file))
    }

    fn has_foreign_locks(&self, id: InodeId) -> bool {
        self.guard.table.get(id).is_some_and(|watched| {
            let pins = watched.pins.load();
            pins.iter().any(|pin| may_be_foreign(&watched, pin))
        })
    }

    fn tend_with(
        &mut self,
        id: InodeId,
        file: BorrowedFd<'_>,
        has_ended: impl Fn(&Watched, &Pin, BorrowedFd<'_>) -> bool,
    ) -> bool {
        let Some(watched) = self.guard.table.get(id) else {
            return true;
        };
        let pins = watched.pins.load_full();
        let ended: HashSet<u64> = pins
            .iter()
            .filter(|pin| pin.is_dead() || pin.is_handed_over() && has_ended(&watched, pin, file))
            .map(|pin| pin.id)
            .collect();
        if !ended.is_empty() {
            watched.remove(|pin| ended.contains(&pin.id));
        }
        if watched.pins.load().is_empty() {
            self.let_go(&watched, file);
            return true;
        }
        !ended.is_empty()
    }

    /// Opens the gate for an inode without pins, now or a little later.
    fn let_go(&mut self, watched: &Arc<Watched>, file: BorrowedFd<'_>) {
        let Some(mut state) = watched.try_grant() else {
            // A grant is under way: it will have a pin, or let the inode go
            // itself.
            return;
        };
        if state.retired || !watched.pins.load().is_empty() {
            return;
        }
        let alone = lease_holds(file, Lease::Sole).unwrap_or(true);
        if !alone {
            let watched = Arc::clone(watched);
            let until = Instant::now() + LINGER;
            let lingering = Lingering { watched, until };
            self.lingering.insert(lingering.watched.id, lingering);
            return;
        }
        self.lingering.remove(&watched.id);
        self.second_looks.remove(&watched.id);
        state.retired = true;
        // Remove the marks first: once the entry is out of the table, another
        // grant may set its own marks, which must not be removed here. Marks
        // that are gone already are as good as removed ones.
        let _ = self.gate.group.remove(MASK, file);
        self.gate.lifetime.let_go(watched, file);
        self.guard.table.remove(watched);
    }

    fn stop_lingering(&mut self, mut entry: Lingering) {
        let Some(mut state) = entry.watched.try_grant() else {
            entry.until = Instant::now() + LINGER;
            let watched = Arc::clone(&entry.watched);
            self.lingering.insert(watched.id, entry);
            return;
        };
        if state.retired || !entry.watched.pins.load().is_empty() {
            return;
        }
        state.retired = true;
        // In this order: see `let_go`.
        if let Some(path) = entry.watched.anchor() {
            self.gate.unmark_at(path.as_fd());
        }
        self.gate.lifetime.forget(&entry.watched);
        self.guard.table.remove(&entry.watched);
        drop(state);
    }
}

/// Whether a pin has ended although it seems to be alive: after a process that
/// `could_write` has closed the file, or when a foreign lock is seen. The pin's
/// description can write, so as long as it exists somebody can write. Searching
/// for the description takes long, so that is done only when a foreign lock is
/// seen, or at the last check: the lock that is left may look just like the
/// pin's.
fn has_ended_for_sure(
    watched: &Watched,
    pin: &Pin,
    file: BorrowedFd<'_>,
    could_write: bool,
    is_last: bool,
    can_be_found: impl Fn() -> bool,
) -> bool {
    if !pin.is_alive(file) {
        return true;
    }
    if matches!(pin.carrier(), Carrier::Pipe(_)) {
        return false;
    }
    let nobody_writes = || lease_holds(file, Lease::NoWriter) == Ok(true);
    let is_gone = || !can_be_found();
    if could_write {
        nobody_writes() || (is_last || may_be_foreign(watched, pin)) && is_gone()
    } else {
        may_be_foreign(watched, pin) && (nobody_writes() || is_gone())
    }
}

/// Whether some process has the pin's description, which can write, or `None` if
/// that cannot be found out just now.
fn search(watched: &Watched, pin: &Pin) -> Option<bool> {
    let by_writers = matches!(pin.carrier(), Carrier::Writers);
    let found = openers(Wanted {
        id: watched.id,
        path: &watched.path,
        mark: (!by_writers).then(|| Mark::Lock(pin.lock_byte())),
    });
    // Readers' descriptors and mappings do not count.
    let is_mapped = |bytes: &Range<u64>| {
        pin.mapped
            .as_ref()
            .is_some_and(|mapped| mapped.start.max(bytes.start) < mapped.end.min(bytes.end))
    };
    let has = by_writers && found.has_writer()
        || found.marked.iter().any(|opener| opener.writable)
        || found
            .writable_mappings
            .iter()
            .any(|(_, bytes)| is_mapped(bytes));
    // The holder may not have received the description yet.
    let unsure = found.unseen
        || by_writers && !found.hidden.is_empty()
        || found.in_flight.contains(&pin.pid);
    match (has, unsure) {
        (true, _) => Some(true),
        (false, true) => None,
        (false, false) => Some(false),
    }
}

/// Whether the lock on a pin's byte may be foreign: its owner is gone, there is
/// more than one lock, or a lock is not on this byte alone or not a
/// description's.
fn may_be_foreign(watched: &Watched, pin: &Pin) -> bool {
    if !matches!(pin.carrier(), Carrier::Lock) {
        return false;
    }
    let (device, byte) = (watched.id.device(), pin.lock_byte());
    let Ok(locks) = proc_locks::read_all() else {
        return true;
    };
    let mut there = locks.iter().filter(|lock| {
        lock.inode == watched.id.inode
            && (lock.major, lock.minor) == (device.major, device.minor)
            && lock.start <= byte
            && lock.last.is_none_or(|last| last >= byte)
            && matches!(
                lock.kind,
                proc_locks::Kind::Description | proc_locks::Kind::Posix
            )
    });
    let is_own = |lock: &proc_locks::Lock| {
        lock.kind == proc_locks::Kind::Description && (lock.start, lock.last) == (byte, Some(byte))
    };
    let only = there.next().is_none_or(is_own) && there.next().is_none();
    !only || proc::start_time(pin.pid).is_err()
}

/// Opens a file by the path it had, if that still leads to the file. This does
/// not involve the file's filesystem.
fn path_to(watched: &Watched) -> Option<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let path = rustix::fs::open(&*watched.path, flags, Mode::empty()).ok()?;
    let stat = rustix::fs::fstat(&path).ok()?;
    ((stat.st_dev, stat.st_ino) == (watched.id.dev, watched.id.inode)).then_some(path)
}
