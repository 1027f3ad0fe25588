//! An inode behind the gate.

use super::announcement::{Announcement, MAX_ANNOUNCED};
use super::layered::Layered;
use super::notes::{Notes, Opens, Passing};
use super::publish::{Machine, Published};
use super::{InodeId, Opinion, Pin};
use crate::audit::Met;
use crate::family::Family;
use crate::grant::pending::Queue;
use crate::journal::{FileRecord, Kept};
use crate::ledger::PinSet;
use crate::policy::{Operation, RULES};
use arc_swap::ArcSwap;
use mapdirect_proto::Flags;
use mapdirect_sys::fanotify::Object;
use mapdirect_sys::{Errno, ancestry, open_tree, proc};
use rustix::fs::OFlags;
use std::cell::OnceCell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// What a filesystem can do with the blocks of its files.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Abilities {
    /// Files can share blocks.
    pub(crate) reflink: bool,
    /// Files can exchange blocks (`XFS_IOC_EXCHANGE_RANGE`).
    pub(crate) exchange: bool,
    /// A write to a part of a folio makes the whole folio dirty.
    pub(crate) coarse: bool,
}

/// The pins of an inode. A change replaces the whole set at once.
pub(crate) type Pins = ArcSwap<PinSet<Pin>>;

impl Published<'_, Pins> {
    /// Loads the pins as they are after something was noted.
    pub(crate) fn load(&self) -> arc_swap::Guard<Arc<PinSet<Pin>>> {
        self.other().load()
    }
}

/// An inode behind the gate.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) id: InodeId,
    /// The abilities of its filesystem.
    pub(crate) abilities: Abilities,
    /// The path of the file when the gate closed.
    pub(crate) path: Arc<str>,
    /// Whether that path led to the file then, as the guard sees paths. The path
    /// of a file on a mount of another namespace may not.
    path_led: OnceLock<bool>,
    /// The pins on this inode.
    pub(crate) pins: Pins,
    /// The layers of all pins in one, for the fanotify gate.
    layered: Layered,
    /// Notes on what the gate has let through, for grants to read.
    pub(crate) notes: Notes,
    /// What a grant under way demands of opens.
    pub(crate) opens: Opens,
    /// Threads that may open the file for writing, once each.
    announced: ArcSwap<Vec<Arc<Announcement>>>,
    /// How many names the file had when that was last looked at.
    names: AtomicU64,
    /// A pin that knows its family was added. Stays set.
    has_families: AtomicBool,
    /// A pin of strength stable was added: its holder may have had shared blocks
    /// copied. Stays set.
    was_followed: AtomicBool,
    /// Counts of refusals by operation.
    pub(crate) refused: [AtomicU64; RULES.len()],
    /// The requests that wait for a grant.
    pub(crate) queue: Queue,
    /// A path to the file, as long as the file is behind the fanotify gate.
    anchor: Mutex<Option<Anchor>>,
    grant: Mutex<GrantState>,
    /// Locked while the tripwire has the file open for a look.
    looking: Mutex<()>,
}

/// A file behind the fanotify gate.
#[derive(Clone, Debug)]
struct Anchor {
    /// An `O_PATH` descriptor of the file.
    path: Arc<OwnedFd>,
    /// The name that close events have for the file.
    object: Object,
    /// What the next guard finds.
    kept: Option<Arc<Kept>>,
}

/// What grants on one inode know. A grant locks this from start to end.
#[derive(Debug, Default)]
pub(crate) struct GrantState {
    /// It has been proven that every description that matters was opened behind
    /// the gate.
    pub(crate) closed: bool,
    /// The entry has left the table, and must be looked up again.
    pub(crate) retired: bool,
}

impl Watched {
    pub(crate) fn new(id: InodeId, abilities: Abilities, path: Arc<str>) -> Self {
        Self {
            id,
            abilities,
            path_led: OnceLock::new(),
            path,
            pins: ArcSwap::default(),
            layered: Layered::default(),
            notes: Notes::default(),
            opens: Opens::default(),
            announced: ArcSwap::default(),
            names: AtomicU64::new(0),
            has_families: AtomicBool::new(false),
            was_followed: AtomicBool::new(false),
            refused: [const { AtomicU64::new(0) }; RULES.len()],
            queue: Queue::default(),
            anchor: Mutex::default(),
            grant: Mutex::default(),
            looking: Mutex::default(),
        }
    }

    /// Keeps a path to the file, so that the file can be opened when it must be
    /// looked at. The path is on a mount of its own, so that nobody finds their
    /// own mount busy. A lease does not count such a path as an open
    /// description.
    pub(crate) fn cast_anchor(&self, file: BorrowedFd<'_>) -> Result<Object, Errno> {
        let path = match open_tree::detached(file) {
            Ok(path) => path,
            // The file is on a mount of another namespace, such as a
            // container's, so the path has to be on that mount.
            Err(_) => proc::reopen(file, OFlags::PATH)?,
        };
        let object = Object::of(file)?;
        let anchor = Anchor {
            path: Arc::new(path),
            object: object.clone(),
            kept: None,
        };
        *self.lock_anchor() = Some(anchor);
        Ok(object)
    }

    /// Takes over the path that an earlier guard had.
    pub(crate) fn recast_anchor(&self, path: OwnedFd, kept: Kept) -> Result<Object, Errno> {
        let object = Object::of(path.as_fd())?;
        *self.lock_anchor() = Some(Anchor {
            path: Arc::new(path),
            object: object.clone(),
            kept: Some(Arc::new(kept)),
        });
        Ok(object)
    }

    /// What the next guard has to know of the file.
    pub(crate) fn record(&self) -> FileRecord {
        FileRecord {
            inode: self.id,
            reflink: self.abilities.reflink,
            exchange: self.abilities.exchange,
            coarse: self.abilities.coarse,
            names: self.names.load(SeqCst),
            moved: self.notes.moved(),
            path: self.path.to_string(),
        }
    }

    /// Has the next guard find the file, as long as there is an anchor.
    pub(crate) fn outlives_by(&self, kept: Kept) {
        if let Some(anchor) = &mut *self.lock_anchor() {
            anchor.kept = Some(Arc::new(kept));
        }
    }

    /// Changes what the next guard finds. Takes no lock that anybody holds for
    /// longer than it runs.
    fn change_record(&self, change: impl FnOnce(&mut FileRecord)) {
        let kept = self.lock_anchor().as_ref().and_then(|it| it.kept.clone());
        if let Some(kept) = kept {
            kept.change_file(change);
        }
    }

    /// Records for the next guard by how many bytes blocks may have come nearer.
    pub(crate) fn keep_moved(&self) {
        self.change_record(|record| record.moved = self.notes.moved());
    }

    /// The path to the file.
    pub(crate) fn anchor(&self) -> Option<Arc<OwnedFd>> {
        let anchor = self.lock_anchor();
        anchor.as_ref().map(|anchor| Arc::clone(&anchor.path))
    }

    /// Gives up the path to the file, and with it the file's filesystem.
    /// Returns the name that close events had for the file. Giving up a path
    /// may have to wait, so the gate thread must not do this.
    pub(crate) fn weigh_anchor(&self) -> Option<Object> {
        let anchor = self.lock_anchor().take()?;
        // Closed here first: whoever keeps it as well has the last copy then, and
        // lets go of the filesystem.
        let Anchor { path, object, kept } = anchor;
        drop(path);
        if let Some(kept) = kept {
            kept.end();
        }
        Some(object)
    }

    fn lock_anchor(&self) -> MutexGuard<'_, Option<Anchor>> {
        self.anchor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks that the tripwire has the file open for a look, as long as the
    /// returned value lives.
    pub(crate) fn look(&self) -> MutexGuard<'_, ()> {
        self.looking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the tripwire from looking while the returned value lives, so that
    /// only other processes can have the file open. Does not wait for a look
    /// that takes long.
    pub(crate) fn pause_looks(&self) -> Option<MutexGuard<'_, ()>> {
        for _ in 0..200 {
            match self.looking.try_lock() {
                Ok(held) => return Some(held),
                Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        None
    }

    /// Publishes a pin, and permits its caller to look at what the gate let
    /// through before it could see the pin.
    pub(crate) fn publish(&self, pin: &Arc<Pin>) -> Published<'_, Notes> {
        if self.pins.load().iter().all(|pin| pin.is_dead()) {
            // A grant waits for shares that are under way, and no pin remembers
            // the others.
            self.notes.forget_shares();
        }
        Published::after::<Machine>(&self.notes, || self.add(pin))
    }

    /// Finds a pin that was published before, and permits its caller to look at
    /// what the gate let through before it could see the pin.
    pub(crate) fn published(&self, id: u64) -> Option<(Arc<Pin>, Published<'_, Notes>)> {
        let pins = self.pins.load();
        let pin = Arc::clone(pins.iter().find(|pin| pin.id == id)?);
        Some((pin, Published::after::<Machine>(&self.notes, || ())))
    }

    /// Notes an operation that the gate is about to let through, and permits
    /// its caller to look for pins once more.
    pub(crate) fn note(&self, passing: Passing) -> Published<'_, Pins> {
        self.notes.note(passing, &self.pins)
    }

    /// Lets an announced open for writing through if `may_go_on` says so.
    /// `may_go_on` looks at the pins after the open was noted.
    pub(crate) fn let_writer_through(&self, may_go_on: impl FnOnce(&PinSet<Pin>) -> bool) -> bool {
        let pins = self.notes.note_writer(&self.pins);
        let goes_on = may_go_on(&pins.load());
        if !goes_on {
            self.notes.withdraw_writer();
        }
        goes_on
    }

    /// The grant state, if no grant is under way.
    pub(crate) fn try_grant(&self) -> Option<MutexGuard<'_, GrantState>> {
        match self.grant.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Finds out whether the path of the file leads to it, once. This may take a
    /// moment.
    pub(crate) fn try_path(&self, leads: impl FnOnce() -> bool) {
        self.path_led.get_or_init(leads);
    }

    /// Whether the path of the file once led to it, as far as that was found out.
    pub(crate) fn path_led(&self) -> bool {
        self.path_led.get().copied().unwrap_or(false)
    }

    /// The pin that an operation met when it was refused: the first that refuses
    /// it, or else the first that lives.
    pub(crate) fn met_by(&self, operation: &Operation, size: u64) -> Option<Met> {
        let pins = self.pins.load();
        let lives = |pin: &&Arc<Pin>| !pin.is_dead();
        let refuses = |pin: &&Arc<Pin>| {
            lives(pin) && pin.opinion(operation, size, self.notes.moved()) == Opinion::Refuse
        };
        let pin = pins
            .meeting(operation.reach(size))
            .find(refuses)
            .or_else(|| pins.iter().find(lives))?;
        Some(Met {
            pin: pin.id,
            pid: pin.pid,
            uid: pin.uid,
            began: pin.holder_began(),
        })
    }

    pub(crate) fn add(&self, pin: &Arc<Pin>) {
        if pin.family.is_some() {
            self.has_families.store(true, SeqCst);
        }
        if pin.follows() {
            self.was_followed.store(true, SeqCst);
        }
        self.pins.rcu(|pins| pins.with(Arc::clone(pin)));
    }

    /// Whether a pin of strength stable was added, ever.
    pub(crate) fn was_followed(&self) -> bool {
        self.was_followed.load(SeqCst)
    }

    pub(crate) fn remove(&self, gone: impl Fn(&Pin) -> bool) {
        let before = self.pins.load_full();
        self.pins.rcu(|pins| pins.without(&gone));
        before
            .iter()
            .filter(|pin| gone(pin))
            .for_each(|pin| pin.is_out());
        if self.layered.is_kept() {
            self.layered.renew(&self.pins);
        }
    }

    /// Makes the fanotify gate judge by what is known of the pins now.
    pub(crate) fn renew_layers(&self) {
        self.layered.renew(&self.pins);
    }

    /// Whether none of `pins`, which must be the pins of this inode, refuses an
    /// operation on a file of `size` bytes. `false` means that each pin must be
    /// asked.
    pub(crate) fn lets_pass(
        &self,
        pins: &PinSet<Pin>,
        operation: &Operation,
        size: u64,
        moved: u64,
    ) -> bool {
        self.layered.let_pass(pins, operation, size, moved)
    }

    /// Whether a process, which does not end meanwhile, belongs to the family of
    /// a pin. Takes no lock and waits for nobody. `process` is asked only if
    /// there are families.
    pub(crate) fn is_in_family(&self, process: impl FnOnce() -> Option<i32>) -> bool {
        if !self.has_families.load(SeqCst) {
            return false;
        }
        let families = self.families();
        let root = OnceCell::new();
        let is_root = |pid| {
            let family = families.iter().find(|family| family.pid() == pid);
            family.is_some_and(|family| root.set(Arc::clone(family)).is_ok())
        };
        !families.is_empty()
            && process().is_some_and(|process| ancestry::descends(process, is_root))
            // Nobody else had the number of a holder that still lives.
            && root.get().is_some_and(|family| family.lives())
    }

    /// Records how many names the file has, and returns how many it had.
    pub(crate) fn has_names(&self, names: u64) -> u64 {
        let before = self.names.swap(names, SeqCst);
        if before != names {
            self.change_record(|record| record.names = names);
        }
        before
    }

    /// Whether a pin denies it to a process, which does not end meanwhile, to
    /// open the file for writing. `file` is a description of the file. Takes no
    /// lock and waits for nobody.
    pub(crate) fn denies_write_to(
        &self,
        process: impl FnOnce() -> Option<i32>,
        file: BorrowedFd<'_>,
    ) -> bool {
        if !self.has_families.load(SeqCst) {
            return false;
        }
        let pins = self.pins.load();
        let mut denying = pins
            .iter()
            .filter(|pin| pin.denies_write() && pin.is_handed_over())
            .peekable();
        if denying.peek().is_none() {
            return false;
        }
        let Some(process) = process() else {
            return true;
        };
        denying.any(|pin| !pin.belongs_to(|family| family.has(process)) && pin.is_alive(file))
    }

    /// The families that have pins.
    pub(crate) fn families(&self) -> Vec<Arc<Family>> {
        let mut families: Vec<Arc<Family>> = Vec::new();
        for pin in self.pins.load().iter().filter(|pin| !pin.is_dead()) {
            if let Some(family) = &pin.family
                && pin.flags.contains(Flags::FAMILY)
                && family.lives()
                && !families.iter().any(|other| Arc::ptr_eq(other, family))
            {
                families.push(Arc::clone(family));
            }
        }
        families
    }

    /// Lets a thread open the file for writing, once. Returns `false` when too
    /// many announced threads have not come yet.
    pub(crate) fn announce(&self, announcement: &Arc<Announcement>) -> bool {
        let mut room = false;
        let now = Instant::now();
        self.announced.rcu(|announced| {
            let mut good: Vec<_> = announced
                .iter()
                .filter(|other| other.is_good(now))
                .cloned()
                .collect();
            room = good.len() < MAX_ANNOUNCED;
            if room {
                good.push(Arc::clone(announcement));
            }
            good
        });
        room
    }

    /// Whether a thread with this number was announced. Takes no lock.
    pub(crate) fn may_be_announced(&self, tid: i32) -> bool {
        let announced = self.announced.load();
        announced.iter().any(|announcement| announcement.tid == tid)
    }

    /// The announcement of thread `tid`, which came to the gate at `came`.
    /// `start_time` tells when the thread with that number started, and is
    /// called only if there is an announcement. Takes no lock.
    pub(crate) fn announced(
        &self,
        tid: i32,
        came: Instant,
        start_time: impl Fn() -> Option<u64>,
    ) -> Option<Arc<Announcement>> {
        self.announced
            .load()
            .iter()
            .filter(|announcement| announcement.tid == tid && announcement.is_good(came))
            .find(|announcement| start_time() == Some(announcement.start))
            .cloned()
    }
}
