//! The inodes behind the gate, and what is pinned of each.
//!
//! The gate thread looks things up here while other threads wait in the
//! kernel for its answer, so no look-up takes a lock: every value it reads is
//! swapped in whole. Changes are made by grants and by the lifetime thread.

use crate::apart::Held;
use crate::grant::pending::Queue;
use crate::ledger::{PinSet, Ranged};
use crate::notice::Fate;
use crate::policy::{Operation, Pinned, RULES, judge};
use arc_swap::{ArcSwap, ArcSwapOption};
use crossbeam_queue::ArrayQueue;
use mapdirect_proto::{BlockMap, DeviceId, Flags};
use mapdirect_sys::fanotify::Object;
use mapdirect_sys::fcntl::conflicting_lock;
use mapdirect_sys::{Errno, open_tree, proc};
use rustix::fs::OFlags;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// Names an inode as long as it is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct InodeId {
    pub(crate) dev: u64,
    pub(crate) inode: u64,
}

impl InodeId {
    pub(crate) fn device(self) -> DeviceId {
        DeviceId {
            major: rustix::fs::major(self.dev),
            minor: rustix::fs::minor(self.dev),
        }
    }
}

/// The bytes of a file that record locks of this guard's pins live on: far
/// beyond any data, one byte for each pin.
pub(crate) const LOCK_BASE: u64 = 1 << 62;

/// One pin.
#[derive(Debug)]
pub(crate) struct Pin {
    pub(crate) id: u64,
    /// What is judged: the range rounded out to blocks, or everything for a
    /// pin of the whole file.
    range: Range<u64>,
    /// What was asked for, rounded out to blocks.
    pub(crate) shown: Range<u64>,
    /// What its holder maps of it.
    pub(crate) mapped: Option<Range<u64>>,
    pub(crate) flags: Flags,
    pub(crate) pid: i32,
    pub(crate) uid: u32,
    pub(crate) since: Instant,
    /// Missing while the grant is still settling.
    settled: ArcSwapOption<Settled>,
    /// The other end of a pipe that its holders have, for a pin that was asked
    /// for with a description which cannot write.
    life: OnceLock<OwnedFd>,
    /// Where its blocks are, as its holder was told.
    map: ArcSwapOption<BlockMap>,
    /// Grows by one when its holder begins to have blocks allocated, and when
    /// that is over.
    changes: AtomicU64,
    /// The guard's own copy of its description is closed: from now on the
    /// description is gone when its holders have let go of it.
    handed_over: AtomicBool,
    /// The description it lived in is gone.
    dead: AtomicBool,
    /// Whether it was kept.
    pub(crate) fate: Fate,
}

/// What is known of a pin once its block map is at rest.
#[derive(Debug)]
pub(crate) struct Settled {
    pub(crate) pinned: Pinned,
    /// Pages kept in the page cache, so that stores beside frozen blocks do
    /// not take them along.
    _held: Option<Held>,
    pub(crate) stable: u64,
    pub(crate) frozen: u64,
}

impl Ranged for Pin {
    fn range(&self) -> Range<u64> {
        self.range.clone()
    }
    fn id(&self) -> u64 {
        self.id
    }
}

/// How often a pin was changed on behalf of its holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Changes(u64);

impl Changes {
    /// It is just being changed.
    pub(crate) fn is_under_way(self) -> bool {
        !self.0.is_multiple_of(2)
    }
}

/// What one pin says about an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opinion {
    /// It does not mind.
    Allow,
    /// It is refused.
    Refuse,
    /// It would be refused, but the grant is not finished yet: it may fail,
    /// or its holder may have let go of it already.
    Wait,
}

impl Pin {
    pub(crate) fn unsettled(
        id: u64,
        shown: Range<u64>,
        mapped: Option<Range<u64>>,
        reach: Range<u64>,
        flags: Flags,
        owner: mapdirect_sys::unix::Sender,
    ) -> Self {
        let whole_file = flags.contains(Flags::WHOLE_FILE);
        Self {
            id,
            range: if whole_file { 0..u64::MAX } else { reach },
            shown,
            mapped,
            flags,
            pid: owner.pid,
            uid: owner.uid,
            since: Instant::now(),
            settled: ArcSwapOption::empty(),
            life: OnceLock::new(),
            map: ArcSwapOption::empty(),
            changes: AtomicU64::new(0),
            handed_over: AtomicBool::new(false),
            dead: AtomicBool::new(false),
            fate: Fate::default(),
        }
    }

    /// Whether any of the bytes are pinned by it.
    #[cfg_attr(not(feature = "bpf"), expect(dead_code, reason = "for the bpf gate"))]
    pub(crate) fn meets(&self, range: &Range<u64>) -> bool {
        self.settled().is_some()
            && !self.is_dead()
            && self.shown.start.max(range.start) < self.shown.end.min(range.end)
    }

    /// Another pin, of process `pid`, of what this one pins.
    #[cfg_attr(not(feature = "bpf"), expect(dead_code, reason = "for the bpf gate"))]
    pub(crate) fn joined(&self, id: u64, pid: i32) -> Self {
        Self {
            id,
            range: self.range.clone(),
            shown: self.shown.clone(),
            mapped: self.mapped.clone(),
            flags: self.flags,
            pid,
            uid: self.uid,
            since: Instant::now(),
            settled: ArcSwapOption::new(self.settled()),
            life: OnceLock::new(),
            map: ArcSwapOption::new(self.map()),
            changes: AtomicU64::new(self.changes.load(SeqCst)),
            handed_over: AtomicBool::new(true),
            dead: AtomicBool::new(false),
            fate: Fate::default(),
        }
    }

    /// The byte its description holds a lock on.
    pub(crate) fn lock_byte(&self) -> u64 {
        LOCK_BASE + self.id
    }

    /// From now on its blocks are known and refusals are final. Again, when
    /// its holder had some of them allocated.
    pub(crate) fn settle(&self, map: &BlockMap, pinned: Pinned, held: Option<Held>) {
        let frozen: u64 = map.frozen().map(|extent| extent.length).sum();
        let range = map.range();
        self.record(map);
        self.settled.store(Some(Arc::new(Settled {
            pinned,
            _held: held,
            stable: range.end - range.start - frozen,
            frozen,
        })));
    }

    /// Its blocks are there, as its holder is told.
    pub(crate) fn record(&self, map: &BlockMap) {
        self.map.store(Some(Arc::new(map.clone())));
    }

    /// Where its blocks are, as far as that is known.
    pub(crate) fn map(&self) -> Option<Arc<BlockMap>> {
        self.map.load_full()
    }

    /// Some of its blocks are elsewhere now, and that was told: unless
    /// somebody else says something newer than `seen`.
    pub(crate) fn renew(&self, seen: &Arc<BlockMap>, now: BlockMap) {
        self.map.compare_and_swap(seen, Some(Arc::new(now)));
    }

    /// Its holder begins to have blocks allocated, or that is over: in between
    /// nothing is known of what is frozen.
    pub(crate) fn changes_or_is_done(&self) {
        self.changes.fetch_add(1, SeqCst);
    }

    /// What its holder has had allocated so far.
    pub(crate) fn changes(&self) -> Changes {
        Changes(self.changes.load(SeqCst))
    }

    pub(crate) fn settled(&self) -> Option<Arc<Settled>> {
        self.settled.load_full()
    }

    /// The guard's own copy of the description is closed.
    pub(crate) fn hand_over(&self) {
        self.handed_over.store(true, SeqCst);
    }

    pub(crate) fn is_handed_over(&self) -> bool {
        self.handed_over.load(SeqCst)
    }

    /// The grant that made it is not over yet.
    pub(crate) fn is_being_granted(&self) -> bool {
        !self.is_handed_over() && !self.is_dead()
    }

    pub(crate) fn bury(&self) {
        self.dead.store(true, SeqCst);
    }

    /// From now on it lives as long as the other end of this pipe does.
    pub(crate) fn lives_by(&self, life: OwnedFd) {
        let _ = self.life.set(life);
    }

    /// Whether its holders have closed their end of the pipe it lives by, if
    /// it does.
    pub(crate) fn is_let_go(&self) -> Option<bool> {
        self.life
            .get()
            .map(|life| crate::wake::has_hung_up(life.as_fd()))
    }

    /// Whether it is still held; `file` is a description of the file that is
    /// not its own. Where its lock tells, somebody else's can hide that it is
    /// gone: then it counts as alive until the lifetime thread has looked
    /// further.
    pub(crate) fn is_alive(&self, file: BorrowedFd<'_>) -> bool {
        match self.is_let_go() {
            Some(let_go) => !let_go,
            None => conflicting_lock(file, self.lock_byte(), 1) != Ok(None),
        }
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(SeqCst)
    }

    /// What it says about `operation` on a file of `size` bytes.
    pub(crate) fn opinion(&self, operation: &Operation, size: u64, moved: u64) -> Opinion {
        if self.is_dead() || operation.kind.is_harmless() {
            return Opinion::Allow;
        }
        match &*self.settled.load() {
            Some(settled)
                if judge(operation, &settled.pinned, size)
                    && !settled.pinned.minds_beside(operation, size, moved) =>
            {
                Opinion::Allow
            }
            Some(_) if self.is_handed_over() => Opinion::Refuse,
            Some(_) => Opinion::Wait,
            // Its blocks are not known yet: any of them may be frozen.
            None => Opinion::Wait,
        }
    }
}

/// What a filesystem can do with the blocks of its files.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Abilities {
    /// Files can share them.
    pub(crate) reflink: bool,
    /// Files can exchange them (`XFS_IOC_EXCHANGE_RANGE`).
    pub(crate) exchange: bool,
    /// Writing to a part of a folio makes all of it dirty.
    #[cfg_attr(not(feature = "bpf"), expect(dead_code, reason = "for the bpf gate"))]
    pub(crate) coarse: bool,
}

/// An inode behind the gate.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) id: InodeId,
    /// What its filesystem can do.
    pub(crate) abilities: Abilities,
    /// Where it was when the gate closed.
    pub(crate) path: Arc<str>,
    /// What is pinned of it.
    pub(crate) pins: ArcSwap<PinSet<Pin>>,
    /// An open for writing was let in while nothing was pinned.
    pub(crate) writers_let_in: AtomicBool,
    /// Something that may change the block map was let in and may still be
    /// under way.
    pub(crate) unrest: AtomicBool,
    /// The threads it is under way in.
    pub(crate) unrest_by: LetIn,
    /// A mapping through which somebody can store was let in.
    pub(crate) mapped_writable: AtomicBool,
    /// The threads that may still be making one.
    pub(crate) mapping_by: LetIn,
    /// No open gets an answer while this is set: a description is being
    /// replaced, and its record locks with it.
    pub(crate) hold_opens: AtomicBool,
    /// Blocks may have come to be shared, by something other than moving
    /// blocks of the file itself.
    pub(crate) cloned_since: AtomicBool,
    /// By so many bytes blocks may have come nearer to a pin.
    pub(crate) moved: AtomicU64,
    /// Somebody waits at the gate to open it for writing.
    pub(crate) opens_wait: AtomicBool,
    /// Who waits at the gate to open it for writing is refused at once: the
    /// kernel counts it as open for writing by then, and a grant waits for
    /// that to end.
    pub(crate) refuse_opens: AtomicBool,
    /// Threads that may open it for writing, once each.
    announced: ArcSwap<Vec<Arc<Announcement>>>,
    /// Refusals by operation.
    pub(crate) refused: [AtomicU64; RULES.len()],
    /// Who waits for a grant.
    pub(crate) queue: Queue,
    /// The file, as long as it is behind the fanotify gate.
    anchor: Mutex<Option<Anchor>>,
    grant: Mutex<GrantState>,
    /// Held while the tripwire has it open for a look.
    looking: Mutex<()>,
}

/// A file behind the fanotify gate.
#[derive(Clone, Debug)]
struct Anchor {
    /// A path to it.
    path: Arc<OwnedFd>,
    /// What close events call it.
    object: Object,
}

/// What grants on one inode know. Held for the whole of a grant.
#[derive(Debug, Default)]
pub(crate) struct GrantState {
    /// It was proven that every description that matters was opened behind
    /// the gate.
    pub(crate) closed: bool,
    /// The entry left the table: look it up again.
    pub(crate) retired: bool,
}

impl Watched {
    pub(crate) fn new(id: InodeId, abilities: Abilities, path: Arc<str>) -> Self {
        Self {
            id,
            abilities,
            path,
            pins: ArcSwap::default(),
            writers_let_in: AtomicBool::new(false),
            unrest: AtomicBool::new(false),
            unrest_by: LetIn::default(),
            mapped_writable: AtomicBool::new(false),
            mapping_by: LetIn::default(),
            hold_opens: AtomicBool::new(false),
            cloned_since: AtomicBool::new(false),
            moved: AtomicU64::new(0),
            opens_wait: AtomicBool::new(false),
            refuse_opens: AtomicBool::new(false),
            announced: ArcSwap::default(),
            refused: [const { AtomicU64::new(0) }; RULES.len()],
            queue: Queue::default(),
            anchor: Mutex::default(),
            grant: Mutex::default(),
            looking: Mutex::default(),
        }
    }

    /// Keeps a path to the file, to open it by when it must be looked at: of a
    /// mount of its own, so that nobody finds his own mount busy. It is no
    /// description that a lease would count.
    pub(crate) fn cast_anchor(&self, file: BorrowedFd<'_>) -> Result<Object, Errno> {
        let path = match open_tree::detached(file) {
            Ok(path) => path,
            // It is on a mount of another namespace, a container's: that mount
            // it is, then.
            Err(_) => proc::reopen(file, OFlags::PATH)?,
        };
        let object = Object::of(file)?;
        let anchor = Anchor {
            path: Arc::new(path),
            object: object.clone(),
        };
        *self.lock_anchor() = Some(anchor);
        Ok(object)
    }

    /// The path to the file.
    pub(crate) fn anchor(&self) -> Option<Arc<OwnedFd>> {
        let anchor = self.lock_anchor();
        anchor.as_ref().map(|anchor| Arc::clone(&anchor.path))
    }

    /// Lets go of the path to the file, and of its filesystem; says what close
    /// events called it. Not for the gate thread: that may have to wait.
    pub(crate) fn weigh_anchor(&self) -> Option<Object> {
        let anchor = self.lock_anchor().take()?;
        Some(anchor.object)
    }

    fn lock_anchor(&self) -> MutexGuard<'_, Option<Anchor>> {
        self.anchor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has it open for a look, as long as this lives.
    pub(crate) fn look(&self) -> MutexGuard<'_, ()> {
        self.looking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody looks while this lives, so that no description is there but those
    /// of others. A look that takes longer is not waited for.
    pub(crate) fn hold_looks(&self) -> Option<MutexGuard<'_, ()>> {
        for _ in 0..200 {
            match self.looking.try_lock() {
                Ok(held) => return Some(held),
                Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        None
    }

    /// Forgets what was shared while nothing is pinned: a pin that comes looks
    /// for itself. `moved` stays, since it is also given back.
    pub(crate) fn forget_if_free(&self) {
        if self.pins.load().iter().all(|pin| pin.is_dead()) {
            self.cloned_since.store(false, SeqCst);
        }
    }

    /// The grant state, if nobody is granting.
    pub(crate) fn try_grant(&self) -> Option<MutexGuard<'_, GrantState>> {
        match self.grant.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    pub(crate) fn add(&self, pin: &Arc<Pin>) {
        self.pins.rcu(|pins| pins.with(Arc::clone(pin)));
    }

    pub(crate) fn remove(&self, gone: impl Fn(&Pin) -> bool) {
        self.pins.rcu(|pins| pins.without(&gone));
    }

    /// Lets a thread open it for writing, once. Says no when too many have
    /// been announced and not come.
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

    /// Whether a thread of this number was announced. Takes no lock.
    pub(crate) fn may_be_announced(&self, tid: i32) -> bool {
        let announced = self.announced.load();
        announced.iter().any(|announcement| announcement.tid == tid)
    }

    /// The announcement of thread `tid`, which came to the gate at `came`.
    /// `start_time` tells when the thread of that number began, and is asked
    /// only if there is an announcement. Takes no lock.
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

/// Threads that the gate has let in and that may still be at it. Written by
/// the gate thread before it sets the flag that belongs to it, and taken by
/// grants after they have found that flag set. No lock.
#[derive(Debug, Default)]
pub(crate) struct LetIn(ArcSwap<Threads>);

/// Threads, as far as they are known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Threads {
    pub(crate) tids: Vec<i32>,
    /// There were more: anybody may be one of them.
    pub(crate) and_others: bool,
}

/// Most threads remembered for a file.
const MAX_LET_IN: usize = 256;

impl LetIn {
    /// Notes a thread.
    pub(crate) fn note(&self, tid: i32) {
        self.add(&Threads {
            tids: vec![tid],
            and_others: false,
        });
    }

    /// Notes threads, also those taken before that are still to be waited for.
    pub(crate) fn add(&self, more: &Threads) {
        self.0.rcu(|threads| {
            let mut threads = Threads::clone(threads);
            threads.and_others |= more.and_others;
            for tid in &more.tids {
                if threads.tids.contains(tid) {
                    continue;
                }
                if threads.tids.len() >= MAX_LET_IN {
                    threads.and_others = true;
                    break;
                }
                threads.tids.push(*tid);
            }
            threads
        });
    }

    /// Takes those noted so far.
    pub(crate) fn take(&self) -> Threads {
        Threads::clone(&self.0.swap(Arc::default()))
    }
}

/// Most announcements of one file that are good at a time.
const MAX_ANNOUNCED: usize = 64;

/// A thread that may open a pinned file for writing, once and soon.
#[derive(Debug)]
pub(crate) struct Announcement {
    tid: i32,
    /// When that thread began: its number is used again.
    start: u64,
    /// The last moment to come to the gate.
    until: Instant,
    /// It has come, or may not any more.
    over: AtomicBool,
}

impl Announcement {
    pub(crate) fn new(tid: i32, start: u64) -> Self {
        Self {
            tid,
            start,
            until: Instant::now() + mapdirect_proto::ANNOUNCEMENT_LIFE,
            over: AtomicBool::new(false),
        }
    }

    /// Whether it lets in a thread that comes to the gate at `came`.
    pub(crate) fn is_good(&self, came: Instant) -> bool {
        came <= self.until && !self.over.load(SeqCst)
    }

    /// Ends it; says whether that was the first time. Whoever let the thread
    /// in must have asked this.
    pub(crate) fn take(&self) -> bool {
        !self.over.swap(true, SeqCst)
    }
}

const SHARDS: usize = 1024;

/// Every inode behind the gate.
#[derive(Debug)]
pub(crate) struct Table {
    shards: Vec<ArcSwap<Vec<Arc<Watched>>>>,
    /// Whoever changes the table.
    changing: Mutex<()>,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| ArcSwap::default()).collect(),
            changing: Mutex::new(()),
        }
    }

    fn shard(&self, id: InodeId) -> &ArcSwap<Vec<Arc<Watched>>> {
        // Inode numbers grow with the directory they are made in: the lower
        // bits spread well, mixed with those above by a Fibonacci hash.
        let mixed = (id.inode ^ id.dev.rotate_left(32)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let at = usize::try_from(mixed >> 54).unwrap_or(0);
        &self.shards[at % SHARDS]
    }

    /// The entry of an inode. Takes no lock.
    pub(crate) fn get(&self, id: InodeId) -> Option<Arc<Watched>> {
        self.shard(id)
            .load()
            .iter()
            .find(|watched| watched.id == id)
            .cloned()
    }

    /// The entry of an inode, made if there is none.
    pub(crate) fn get_or_insert(
        &self,
        id: InodeId,
        make: impl FnOnce() -> Watched,
    ) -> Arc<Watched> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = self.get(id) {
            return found;
        }
        let made = Arc::new(make());
        let shard = self.shard(id);
        let mut entries = Vec::clone(&shard.load());
        entries.push(Arc::clone(&made));
        shard.store(Arc::new(entries));
        made
    }

    /// Takes an entry out.
    pub(crate) fn remove(&self, watched: &Arc<Watched>) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let shard = self.shard(watched.id);
        let mut entries = Vec::clone(&shard.load());
        entries.retain(|entry| !Arc::ptr_eq(entry, watched));
        shard.store(Arc::new(entries));
    }

    /// Every entry there is right now.
    pub(crate) fn all(&self) -> Vec<Arc<Watched>> {
        self.shards
            .iter()
            .flat_map(|shard| Vec::clone(&shard.load()))
            .collect()
    }
}

/// Threads of the guard that are about to open a file behind its own gate:
/// their opens are let in without question.
#[derive(Debug)]
pub(crate) struct OwnOpens {
    slots: [AtomicI32; 64],
    /// Those that take long about it.
    long: ArcSwap<Vec<i32>>,
    /// The one that wants the description of its event instead of one of its
    /// own.
    quiet: AtomicI32,
    handed: ArrayQueue<OwnedFd>,
}

impl OwnOpens {
    pub(crate) fn new() -> Self {
        Self {
            slots: [const { AtomicI32::new(0) }; 64],
            long: ArcSwap::default(),
            quiet: AtomicI32::new(0),
            handed: ArrayQueue::new(1),
        }
    }

    /// A description of a file behind the gate that nobody hears of: what is
    /// opened, used and closed by it raises no events, also not inotify's. It
    /// is the one of the event that the kernel asks the gate by whether `open`
    /// may go on, which then may not. For one thread at a time; another one
    /// gets a description as any.
    pub(crate) fn quietly(
        &self,
        open: impl FnOnce() -> Result<OwnedFd, Errno>,
    ) -> Result<OwnedFd, Errno> {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        if self.quiet.compare_exchange(0, tid, SeqCst, SeqCst).is_err() {
            return self.during(open);
        }
        let opened = self.during(open);
        self.quiet.store(0, SeqCst);
        match (opened, self.handed.pop()) {
            (Err(Errno::TXTBSY), Some(handed)) => Ok(handed),
            (opened, _) => opened,
        }
    }

    /// Hands the description of an event to the thread that it is about, if
    /// that waits for it; else gives it back.
    pub(crate) fn hand(&self, tid: i32, file: OwnedFd) -> Option<OwnedFd> {
        if tid == 0 || self.quiet.load(SeqCst) != tid {
            return Some(file);
        }
        self.handed.push(file).err()
    }

    /// Runs something with all that the calling thread does to files behind
    /// the gate let in, for as long as it takes.
    pub(crate) fn for_long<T>(&self, run: impl FnOnce() -> T) -> T {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        self.long.rcu(|long| {
            let mut long = Vec::clone(long);
            long.push(tid);
            long
        });
        let result = run();
        self.long.rcu(|long| {
            let mut long = Vec::clone(long);
            long.retain(|other| *other != tid);
            long
        });
        result
    }

    /// Runs `open` with the calling thread's opens let in.
    pub(crate) fn during<T>(&self, open: impl FnOnce() -> T) -> T {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let slot = loop {
            let taken = self
                .slots
                .iter()
                .find(|slot| slot.compare_exchange(0, tid, SeqCst, SeqCst).is_ok());
            match taken {
                Some(slot) => break slot,
                // 64 opens at once: each is over in microseconds.
                None => std::thread::yield_now(),
            }
        };
        let result = open();
        slot.store(0, SeqCst);
        result
    }

    pub(crate) fn contains(&self, tid: i32) -> bool {
        tid != 0
            && (self.slots.iter().any(|slot| slot.load(SeqCst) == tid)
                || self.long.load().contains(&tid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::OperationKind;
    use mapdirect_proto::{Extent, ExtentState};
    use mapdirect_sys::unix::Sender;

    const OWNER: Sender = Sender { pid: 1, uid: 0 };

    fn id(inode: u64) -> InodeId {
        InodeId { dev: 7, inode }
    }

    #[test]
    fn entries_come_and_go() {
        let table = Table::new();
        let made: Vec<_> = (0..5000)
            .map(|inode| {
                table.get_or_insert(id(inode), || {
                    Watched::new(id(inode), Abilities::default(), Arc::default())
                })
            })
            .collect();
        let again = table.get_or_insert(id(17), || panic!("it is there already"));
        assert!(Arc::ptr_eq(&made[17], &again));
        assert_eq!(table.all().len(), 5000);
        table.remove(&made[17]);
        assert!(table.get(id(17)).is_none());
        assert!(table.get(id(18)).is_some());
    }

    #[test]
    fn an_unsettled_pin_makes_others_wait_and_a_dead_one_does_not() {
        let pin = Pin::unsettled(1, 0..4096, None, 0..4096, Flags::NONE, OWNER);
        let write = Operation::new(OperationKind::Write, 0..10);
        let read = Operation::new(OperationKind::Read, 0..10);
        assert_eq!(pin.opinion(&write, 4096, 0), Opinion::Wait);
        assert_eq!(pin.opinion(&read, 4096, 0), Opinion::Allow);
        let device = DeviceId { major: 7, minor: 0 };
        let written = Extent::new(0, Some(0), 4096, ExtentState::Written);
        let map = BlockMap::new(device, 4096, 4096, 0..4096, [written]);
        pin.settle(&map, Pinned::new(&map, false), None);
        assert_eq!(pin.opinion(&write, 4096, 0), Opinion::Allow);
        let punch = Operation::new(OperationKind::PunchHole, 0..10);
        assert_eq!(pin.opinion(&punch, 4096, 0), Opinion::Wait);
        pin.hand_over();
        assert_eq!(pin.opinion(&punch, 4096, 0), Opinion::Refuse);
        pin.bury();
        assert_eq!(pin.opinion(&punch, 4096, 0), Opinion::Allow);
    }

    fn announced(watched: &Watched, tid: i32, start: u64, came: Instant) -> bool {
        watched.announced(tid, came, || Some(start)).is_some()
    }

    #[test]
    fn an_announcement_is_good_once_and_for_the_thread_it_names() {
        let watched = Watched::new(id(1), Abilities::default(), Arc::default());
        let now = Instant::now();
        assert!(
            watched
                .announced(5, now, || panic!("nobody came"))
                .is_none()
        );
        assert!(watched.announce(&Arc::new(Announcement::new(5, 70))));
        assert!(!announced(&watched, 6, 70, now));
        assert!(!announced(&watched, 5, 71, now), "its number is used again");
        assert!(watched.announced(5, now, || None).is_none(), "it is gone");
        let found = watched.announced(5, now, || Some(70)).unwrap();
        assert!(found.take());
        assert!(!found.take());
        assert!(!announced(&watched, 5, 70, now));
    }

    #[test]
    fn an_announcement_does_not_outlive_its_time() {
        let watched = Watched::new(id(1), Abilities::default(), Arc::default());
        assert!(watched.announce(&Arc::new(Announcement::new(5, 70))));
        let life = mapdirect_proto::ANNOUNCEMENT_LIFE;
        assert!(announced(&watched, 5, 70, Instant::now()));
        assert!(!announced(&watched, 5, 70, Instant::now() + life));
    }

    #[test]
    fn stale_announcements_are_in_nobodys_way() {
        let watched = Watched::new(id(1), Abilities::default(), Arc::default());
        let all: Vec<_> = (1..=64)
            .map(|tid| Arc::new(Announcement::new(tid, 70)))
            .collect();
        assert!(all.iter().all(|one| watched.announce(one)));
        let more = Arc::new(Announcement::new(65, 70));
        assert!(!watched.announce(&more));
        assert!(all[7].take());
        assert!(watched.announce(&more));
        let now = Instant::now();
        assert!(!announced(&watched, 8, 70, now));
        assert!(announced(&watched, 9, 70, now) && announced(&watched, 65, 70, now));
    }

    #[test]
    fn only_the_opening_thread_is_ours() {
        let own = OwnOpens::new();
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        assert!(!own.contains(tid));
        own.during(|| assert!(own.contains(tid)));
        assert!(!own.contains(tid));
        own.for_long(|| assert!(own.contains(tid)));
        assert!(!own.contains(tid));
        assert!(!own.contains(0));
    }

    #[test]
    fn the_description_of_an_event_goes_to_the_thread_it_is_about() {
        let own = OwnOpens::new();
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        assert!(own.hand(tid, file()).is_some(), "it did not ask");
        let handed = own.quietly(|| {
            assert!(own.hand(tid + 1, file()).is_some());
            assert!(own.hand(tid, file()).is_none());
            Err(Errno::TXTBSY)
        });
        assert!(handed.is_ok());
        let refused = own.quietly(|| Err(Errno::TXTBSY));
        assert_eq!(refused.unwrap_err(), Errno::TXTBSY);
        assert!(own.quietly(|| Ok(file())).is_ok());
        assert!(own.hand(tid, file()).is_some());
    }
}
