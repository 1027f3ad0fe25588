//! A pin, from its grant to its end.

use super::life::{Life, Stage};
use super::{InodeId, LOCK_BASE};
use crate::apart::Held;
use crate::delegation::Delegated;
use crate::family::Family;
use crate::journal::{Kept, LivesBy, PinRecord, UNKNOWN, sum_of};
use crate::ledger::Ranged;
use crate::notice::Fate;
use crate::policy::{Layers, Operation, Pinned};
use arc_swap::{ArcSwap, ArcSwapOption};
use mapdirect_model::held::{Copied, told_apart};
use mapdirect_proto::{BlockMap, ExtentState, Flags};
use mapdirect_sys::fcntl::{Lease, conflicting_lock, lease_holds};
use mapdirect_sys::unix::Sender;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// One pin.
#[derive(Debug)]
pub(crate) struct Pin {
    pub(crate) id: u64,
    /// The range that operations are judged by: the requested range extended to
    /// whole blocks, or everything for a pin of the whole file.
    range: Range<u64>,
    /// The requested range, extended to whole blocks.
    pub(crate) shown: Range<u64>,
    /// The part that the holder maps.
    pub(crate) mapped: Option<Range<u64>>,
    pub(crate) flags: Flags,
    pub(crate) pid: i32,
    pub(crate) uid: u32,
    pub(crate) since: Instant,
    /// The holder and its descendants, if they have its rights together, or if
    /// the pin denies something to all others.
    pub(crate) family: Option<Arc<Family>>,
    /// The stage of the pin's life.
    life: Life,
    /// What is known of the blocks, or `None` while the pin is unsettled.
    settled: ArcSwapOption<Settled>,
    /// What the pin lives by, under the fanotify gate.
    carrier: OnceLock<Carrier>,
    /// Where the blocks are, as the holder was told.
    map: ArcSwapOption<BlockMap>,
    /// Grows by one when the holder begins to have blocks allocated, and by one
    /// when the allocation is over.
    changes: AtomicU64,
    /// Where copies of shared blocks may take blocks along that a pin of strength
    /// stable would hold otherwise.
    copied: ArcSwap<Copied>,
    /// Where a pin of strength stable gives way for now, and where it refuses
    /// again but nothing is held yet.
    gives_way: Mutex<GivingWay>,
    /// Whether the promise was kept: that of the pin, whoever holds it.
    pub(crate) fate: Arc<Fate>,
    /// What allowed it to a holder without the capability.
    delegated: OnceLock<Delegated>,
    /// What the next guard finds, under the fanotify gate.
    kept: OnceLock<Kept>,
}

/// What a pin lives by under the fanotify gate: something that only its holders
/// have, and that shows when it goes.
#[derive(Debug)]
pub(crate) enum Carrier {
    /// A lock on a byte of its own, which the pin's description has. The
    /// description can write, and is mapped.
    ///
    /// The lock is shared, because readers lock whole files and an exclusive
    /// lock would keep them out. So readers can lock the same byte; but they
    /// cannot write.
    Lock,
    /// The guard's end of a pipe whose other end goes to the holder, with a
    /// description that is not mapped or cannot write. The pipe goes where the
    /// description goes: to children, and away on `execve(2)`.
    Pipe(OwnedFd),
    /// All descriptions that can write. While the file is pinned, only holders
    /// can get one. A program that knows nothing of pins has the pin's
    /// description in place of its own, and may lock the whole file.
    Writers,
}

/// Where a pin of strength stable gives way.
#[derive(Clone, Debug, Default)]
struct GivingWay {
    /// What the pin refuses otherwise, if it is of strength stable. Apart,
    /// because most pins are not.
    whole: Option<Box<Pinned>>,
    /// Nothing is refused here,
    open: Vec<Range<u64>>,
    /// and nothing held here.
    loose: Vec<Range<u64>>,
}

/// Seconds since the machine was started.
fn boot_time() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0)
}

/// Takes one of several equal ranges out of a list.
fn take(ranges: &mut Vec<Range<u64>>, range: &Range<u64>) {
    if let Some(at) = ranges.iter().position(|other| other == range) {
        ranges.swap_remove(at);
    }
}

/// What is known of a pin once its block map is at rest.
#[derive(Debug)]
pub(crate) struct Settled {
    /// What the pin refuses.
    pub(crate) layers: Arc<Layers>,
    /// Pages kept in the page cache, so that stores beside frozen blocks do not
    /// take these blocks along.
    _kept_pages: Option<Held>,
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

/// Counts the changes to a pin on behalf of its holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Changes(u64);

impl Changes {
    /// Whether the pin is being changed right now.
    pub(crate) fn is_under_way(self) -> bool {
        !self.0.is_multiple_of(2)
    }
}

/// What one pin says about an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opinion {
    /// The pin permits the operation.
    Allow,
    /// The pin refuses the operation.
    Refuse,
    /// The pin would refuse the operation, but its grant is not finished yet:
    /// the grant may fail, or the holder may have let go of the pin already.
    Wait,
}

impl Pin {
    pub(crate) fn unsettled(
        id: u64,
        shown: Range<u64>,
        mapped: Option<Range<u64>>,
        reach: Range<u64>,
        flags: Flags,
        owner: Sender,
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
            family: None,
            life: Life::at(Stage::Unsettled),
            settled: ArcSwapOption::empty(),
            carrier: OnceLock::new(),
            map: ArcSwapOption::empty(),
            changes: AtomicU64::new(0),
            copied: ArcSwap::default(),
            gives_way: Mutex::default(),
            fate: Arc::default(),
            delegated: OnceLock::new(),
            kept: OnceLock::new(),
        }
    }

    /// Marks that the holder lacks the capability.
    pub(crate) fn is_delegated_by(&self, delegated: Delegated) {
        let _ = self.delegated.set(delegated);
    }

    /// What allowed the pin to a holder without the capability.
    pub(crate) fn delegated(&self) -> Option<&Delegated> {
        self.delegated.get()
    }

    /// Whether the holder can write to the file but is not trusted: it could grow
    /// a mapping of its own over blocks that must not be stored to.
    pub(crate) fn is_of_untrusted_writer(&self) -> bool {
        self.delegated().is_some_and(|delegated| delegated.writes)
    }

    /// The same pin, of a family.
    pub(crate) fn of_family(self, family: Option<Arc<Family>>) -> Self {
        Self { family, ..self }
    }

    /// When the process began that has the pin, in clock ticks since boot, if
    /// that is known: its number may mean another process by now.
    pub(crate) fn holder_began(&self) -> Option<u64> {
        let family = self.family.as_ref().map(|one| (one.pid(), one.began()));
        self.fate
            .asker()
            .into_iter()
            .chain(family)
            .find_map(|(pid, began)| (pid == self.pid).then_some(began))
    }

    /// Whether nobody but the holder's family may open the file for writing.
    pub(crate) fn denies_write(&self) -> bool {
        self.flags.contains(Flags::DENY_WRITE)
    }

    /// Whether `is_member` says yes of the holder's family.
    pub(crate) fn belongs_to(&self, is_member: impl Fn(&Family) -> bool) -> bool {
        self.family.as_deref().is_some_and(is_member)
    }

    /// Whether the pin covers any of these bytes.
    #[cfg_attr(not(feature = "bpf"), expect(dead_code, reason = "for the bpf gate"))]
    pub(crate) fn meets(&self, range: &Range<u64>) -> bool {
        self.settled().is_some()
            && !self.is_dead()
            && self.shown.start.max(range.start) < self.shown.end.min(range.end)
    }

    /// A new pin, of process `pid`, on what this one pins.
    #[cfg_attr(not(feature = "bpf"), expect(dead_code, reason = "for the bpf gate"))]
    pub(crate) fn joined(&self, id: u64, pid: i32) -> Self {
        let uid = self.uid;
        self.with(id, Sender { pid, uid }, Arc::default())
    }

    /// The same pin, which somebody else holds from now on. Whoever is told of
    /// the pin still is.
    #[cfg_attr(
        all(not(feature = "bpf"), not(test)),
        expect(dead_code, reason = "for the bpf gate")
    )]
    pub(crate) fn passed_to(&self, owner: Sender) -> Self {
        self.with(self.id, owner, Arc::clone(&self.fate))
    }

    fn with(&self, id: u64, owner: Sender, fate: Arc<Fate>) -> Self {
        Self {
            id,
            range: self.range.clone(),
            shown: self.shown.clone(),
            mapped: self.mapped.clone(),
            flags: self.flags,
            pid: owner.pid,
            uid: owner.uid,
            since: Instant::now(),
            family: None,
            // Only the process that mapped the file has the description.
            life: Life::at(Stage::HandedOver),
            settled: ArcSwapOption::new(self.settled()),
            carrier: OnceLock::new(),
            map: ArcSwapOption::new(self.map()),
            changes: AtomicU64::new(self.changes.load(SeqCst)),
            copied: ArcSwap::new(self.copied()),
            gives_way: Mutex::new(self.giving_way().clone()),
            fate,
            delegated: OnceLock::new(),
            kept: OnceLock::new(),
        }
    }

    /// Whether the pin is of strength stable.
    pub(crate) fn follows(&self) -> bool {
        self.flags.contains(Flags::STABLE)
    }

    /// Records where copies of shared blocks may take blocks along.
    pub(crate) fn follow(&self, copied: Copied) {
        self.copied.store(Arc::new(copied));
    }

    /// Where copies of shared blocks may take blocks along, as far as a pin of
    /// strength stable is concerned.
    pub(crate) fn copied(&self) -> Arc<Copied> {
        self.copied.load_full()
    }

    fn giving_way(&self) -> MutexGuard<'_, GivingWay> {
        self.gives_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Where nothing is held although it may be stable: copies of shared blocks
    /// may take it along, or the pin gives way.
    pub(crate) fn not_held(&self) -> Copied {
        self.copied().and(&self.giving_way().loose)
    }

    /// Refuses nothing in a range for now, and holds nothing there. Nobody may
    /// look at the blocks meanwhile.
    pub(crate) fn begin_to_give_way(&self, range: &Range<u64>) {
        {
            let mut giving = self.giving_way();
            giving.open.push(range.clone());
            giving.loose.push(range.clone());
            self.judge_by(&giving);
        }
        if let Some(map) = self.map() {
            let range = Copied::NOTHING.and(std::slice::from_ref(range));
            self.record(&told_apart(&map, &range));
        }
    }

    /// Refuses everything in a range again.
    pub(crate) fn refuse_again(&self, range: &Range<u64>) {
        let mut giving = self.giving_way();
        take(&mut giving.open, range);
        self.judge_by(&giving);
    }

    /// Holds what is stable in a range again, once that is found out.
    pub(crate) fn hold_again(&self, range: &Range<u64>) {
        take(&mut self.giving_way().loose, range);
    }

    /// Judges by what the pin refuses where it does not give way.
    fn judge_by(&self, giving: &GivingWay) {
        let (Some(whole), Some(before)) = (&giving.whole, self.settled()) else {
            return;
        };
        let pinned = Pinned::clone(whole).giving_way(giving.open.iter().cloned());
        self.settled.store(Some(Arc::new(Settled {
            layers: Arc::new(Layers::of(&pinned)),
            // A pin of strength stable keeps no pages.
            _kept_pages: None,
            stable: before.stable,
            frozen: before.frozen,
        })));
    }

    /// Whether the pin covers any of these bytes, settled or not.
    pub(crate) fn overlaps(&self, range: &Range<u64>) -> bool {
        self.shown.start.max(range.start) < self.shown.end.min(range.end)
    }

    /// Bytes in stable and in frozen blocks, now. A pin of strength stable
    /// freezes nothing.
    pub(crate) fn totals(&self, settled: &Settled) -> (u64, u64) {
        if !self.follows() {
            return (settled.stable, settled.frozen);
        }
        let map = self.map();
        (map.map_or(0, |map| map.total(ExtentState::Written)), 0)
    }

    /// The byte on which the pin's description has a lock.
    pub(crate) fn lock_byte(&self) -> u64 {
        LOCK_BASE + self.id
    }

    /// Records what is known of the blocks, so that operations are judged by
    /// that. This is repeated when the holder has blocks allocated, and when
    /// the block map was found to have changed during the grant.
    pub(crate) fn settle(&self, map: &BlockMap, pinned: &Pinned, kept_pages: Option<Held>) {
        let frozen = map
            .frozen()
            .fold(0, |sum: u64, extent| sum.saturating_add(extent.length));
        let range = map.range();
        self.record(map);
        if self.follows() {
            self.giving_way().whole = Some(Box::new(pinned.clone()));
        }
        self.settled.store(Some(Arc::new(Settled {
            layers: Arc::new(Layers::of(pinned)),
            _kept_pages: kept_pages,
            stable: (range.end - range.start).saturating_sub(frozen),
            frozen,
        })));
        // The stage changes after the blocks are stored, so that a thread which
        // finds the pin settled also finds its blocks.
        self.life.advance(Stage::Settled);
    }

    /// Records where the blocks are, as the holder is told.
    pub(crate) fn record(&self, map: &BlockMap) {
        self.map.store(Some(Arc::new(map.clone())));
        self.keep_map();
    }

    /// Where the blocks are, as far as that is known.
    pub(crate) fn map(&self) -> Option<Arc<BlockMap>> {
        self.map.load_full()
    }

    /// Records that some blocks have moved and that the holder was told. Does
    /// nothing if another thread has recorded something newer than `seen`.
    pub(crate) fn renew(&self, seen: &Arc<BlockMap>, now: BlockMap) {
        self.map.compare_and_swap(seen, Some(Arc::new(now)));
        self.keep_map();
    }

    /// Marks that the holder begins to have blocks allocated, or that this is
    /// over. In between, nothing is known of what is frozen.
    pub(crate) fn changes_or_is_done(&self) {
        self.changes.fetch_add(1, SeqCst);
        self.keep_map();
    }

    /// What the next guard has to know of the pin, which is on this inode.
    pub(crate) fn record_for(&self, inode: InodeId) -> PinRecord {
        PinRecord {
            id: self.id,
            inode,
            reach: self.range.clone(),
            shown: self.shown.clone(),
            mapped: self.mapped.clone(),
            flags: self.flags,
            pid: self.pid,
            uid: self.uid,
            lives_by: match self.carrier() {
                Carrier::Lock => LivesBy::Lock,
                Carrier::Pipe(_) => LivesBy::Pipe,
                Carrier::Writers => LivesBy::Writers,
            },
            since: boot_time().saturating_sub(self.since.elapsed().as_secs()),
            family: self.family.as_ref().map(|one| (one.pid(), one.began())),
            asker: self.fate.asker(),
            until: self.delegated().map_or(0, Delegated::wire),
            map: UNKNOWN,
            breaches: self.fate.summary().0,
            copied: self.copied().hull(),
        }
    }

    /// The pin that an earlier guard has recorded, of which only the blocks are
    /// not known yet.
    pub(crate) fn recorded(record: &PinRecord, carrier: Carrier, family: Option<Family>) -> Self {
        let owner = Sender {
            pid: record.pid,
            uid: record.uid,
        };
        let (shown, mapped) = (record.shown.clone(), record.mapped.clone());
        let reach = record.reach.clone();
        let pin = Self::unsettled(record.id, shown, mapped, reach, record.flags, owner);
        pin.lives_by(carrier);
        if let Some((pid, began)) = record.asker {
            pin.fate.asked_by(pid, began);
        }
        pin.fate.had(record.breaches);
        pin.follow(Copied::NOTHING.and(record.copied.as_slice()));
        let age = Duration::from_secs(boot_time().saturating_sub(record.since));
        Self {
            since: Instant::now().checked_sub(age).unwrap_or_else(Instant::now),
            family: family.map(Arc::new),
            ..pin
        }
    }

    /// Has the next guard find the pin.
    pub(crate) fn outlives_by(&self, kept: Kept) {
        let _ = self.kept.set(kept);
        self.keep_map();
    }

    /// Records the present block map for the next guard.
    fn keep_map(&self) {
        let Some(kept) = self.kept.get() else {
            return;
        };
        kept.change_pin(|record| {
            let is_unknown = self.follows() || self.changes().is_under_way();
            let map = self.map().filter(|_| !is_unknown);
            record.map = map.map_or(UNKNOWN, |map| sum_of(&map));
        });
    }

    /// Records for the next guard that blocks were found to have changed.
    pub(crate) fn keep_breach(&self) {
        if let Some(kept) = self.kept.get() {
            kept.change_pin(|record| record.breaches += 1);
        }
    }

    /// Has the next guard not find the pin any more.
    pub(crate) fn is_out(&self) {
        if let Some(kept) = self.kept.get() {
            kept.end();
        }
    }

    /// How often the holder has had blocks allocated so far.
    pub(crate) fn changes(&self) -> Changes {
        Changes(self.changes.load(SeqCst))
    }

    pub(crate) fn settled(&self) -> Option<Arc<Settled>> {
        self.settled.load_full()
    }

    /// Marks that the guard's own copy of the description is closed: from now
    /// on refusals for this pin are final.
    pub(crate) fn hand_over(&self) {
        let went = self.life.advance(Stage::HandedOver);
        debug_assert!(went || self.is_dead(), "only a settled pin has a holder");
    }

    pub(crate) fn is_handed_over(&self) -> bool {
        self.life.stage() == Stage::HandedOver
    }

    /// Whether the grant of this pin is still under way.
    pub(crate) fn is_being_granted(&self) -> bool {
        matches!(self.life.stage(), Stage::Unsettled | Stage::Settled)
    }

    /// Marks that the pin's description is gone.
    pub(crate) fn end(&self) {
        self.life.advance(Stage::Dead);
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.life.stage() == Stage::Dead
    }

    /// Decides what the pin lives by.
    pub(crate) fn lives_by(&self, carrier: Carrier) {
        let _ = self.carrier.set(carrier);
    }

    /// What the pin lives by.
    pub(crate) fn carrier(&self) -> &Carrier {
        self.carrier.get().unwrap_or(&Carrier::Lock)
    }

    /// Whether the holders still have their end of the pipe that the pin lives
    /// by. `false` if there is no pipe.
    pub(crate) fn is_held_by_pipe(&self) -> bool {
        matches!(self.carrier(), Carrier::Pipe(pipe) if !crate::wake::has_hung_up(pipe.as_fd()))
    }

    /// Whether the pin is still held. `file` must be a description of the file
    /// that is not the pin's own and cannot write. Somebody else's lock can hide
    /// that a pin's lock is gone, and an open that waits for its refusal counts
    /// as a writer. Then the pin counts as alive until the lifetime thread has
    /// looked further.
    pub(crate) fn is_alive(&self, file: BorrowedFd<'_>) -> bool {
        match self.carrier() {
            Carrier::Pipe(_) => self.is_held_by_pipe(),
            Carrier::Lock => conflicting_lock(file, self.lock_byte(), 1) != Ok(None),
            Carrier::Writers => lease_holds(file, Lease::NoWriter) != Ok(true),
        }
    }

    /// What the pin says about `operation` on a file of `size` bytes.
    pub(crate) fn opinion(&self, operation: &Operation, size: u64, moved: u64) -> Opinion {
        let stage = self.life.stage();
        if stage == Stage::Dead || operation.kind.is_harmless() {
            return Opinion::Allow;
        }
        match &*self.settled.load() {
            Some(settled) if !settled.layers.refuses(operation, size, moved) => Opinion::Allow,
            Some(_) if stage == Stage::HandedOver => Opinion::Refuse,
            Some(_) => Opinion::Wait,
            // The blocks are not known yet: any of them may be frozen.
            None => Opinion::Wait,
        }
    }
}
