//! A pin, from its grant to its end.

use super::LOCK_BASE;
use super::life::{Life, Stage};
use crate::apart::Held;
use crate::ledger::Ranged;
use crate::notice::Fate;
use crate::policy::{Layers, Operation, Pinned};
use arc_swap::ArcSwapOption;
use mapdirect_proto::{BlockMap, Flags};
use mapdirect_sys::fcntl::conflicting_lock;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

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
    /// How far it has come.
    life: Life,
    /// What is known of its blocks; missing while it is unsettled.
    settled: ArcSwapOption<Settled>,
    /// The other end of a pipe that its holders have, for a pin that was asked
    /// for with a description which cannot write.
    lifeline: OnceLock<OwnedFd>,
    /// Where its blocks are, as its holder was told.
    map: ArcSwapOption<BlockMap>,
    /// Grows by one when its holder begins to have blocks allocated, and when
    /// that is over.
    changes: AtomicU64,
    /// Whether it was kept.
    pub(crate) fate: Fate,
}

/// What is known of a pin once its block map is at rest.
#[derive(Debug)]
pub(crate) struct Settled {
    /// What it keeps still.
    pub(crate) layers: Arc<Layers>,
    /// Pages kept in the page cache, so that stores beside frozen blocks do
    /// not take them along.
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
            life: Life::at(Stage::Unsettled),
            settled: ArcSwapOption::empty(),
            lifeline: OnceLock::new(),
            map: ArcSwapOption::empty(),
            changes: AtomicU64::new(0),
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
            // Nobody but the one who mapped the file has its description.
            life: Life::at(Stage::HandedOver),
            settled: ArcSwapOption::new(self.settled()),
            lifeline: OnceLock::new(),
            map: ArcSwapOption::new(self.map()),
            changes: AtomicU64::new(self.changes.load(SeqCst)),
            fate: Fate::default(),
        }
    }

    /// The byte its description holds a lock on.
    pub(crate) fn lock_byte(&self) -> u64 {
        LOCK_BASE + self.id
    }

    /// Tells what is known of its blocks, so that operations are judged by
    /// that. This is repeated when its holder has some of them allocated, and
    /// when the block map was found to have changed during the grant.
    pub(crate) fn settle(&self, map: &BlockMap, pinned: &Pinned, kept_pages: Option<Held>) {
        let frozen: u64 = map.frozen().map(|extent| extent.length).sum();
        let range = map.range();
        self.record(map);
        self.settled.store(Some(Arc::new(Settled {
            layers: Arc::new(Layers::of(pinned)),
            _kept_pages: kept_pages,
            stable: range.end - range.start - frozen,
            frozen,
        })));
        // After the blocks: whoever finds the pin settled finds them, too.
        self.life.advance(Stage::Settled);
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

    /// Says that the guard's own copy of its description is closed: from now on
    /// refusals for it are final.
    pub(crate) fn hand_over(&self) {
        let went = self.life.advance(Stage::HandedOver);
        debug_assert!(went || self.is_dead(), "only a settled pin has a holder");
    }

    pub(crate) fn is_handed_over(&self) -> bool {
        self.life.stage() == Stage::HandedOver
    }

    /// Whether the grant that made it is not over yet.
    pub(crate) fn is_being_granted(&self) -> bool {
        matches!(self.life.stage(), Stage::Unsettled | Stage::Settled)
    }

    /// Says that the description it lived in is gone.
    pub(crate) fn end(&self) {
        self.life.advance(Stage::Dead);
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.life.stage() == Stage::Dead
    }

    /// From now on it lives as long as the other end of this pipe does.
    pub(crate) fn lives_by(&self, lifeline: OwnedFd) {
        let _ = self.lifeline.set(lifeline);
    }

    /// Whether its holders have closed their end of the pipe it lives by, if
    /// it does.
    pub(crate) fn is_let_go(&self) -> Option<bool> {
        self.lifeline
            .get()
            .map(|lifeline| crate::wake::has_hung_up(lifeline.as_fd()))
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

    /// What it says about `operation` on a file of `size` bytes.
    pub(crate) fn opinion(&self, operation: &Operation, size: u64, moved: u64) -> Opinion {
        let stage = self.life.stage();
        if stage == Stage::Dead || operation.kind.is_harmless() {
            return Opinion::Allow;
        }
        match &*self.settled.load() {
            Some(settled) if !settled.layers.refuses(operation, size, moved) => Opinion::Allow,
            Some(_) if stage == Stage::HandedOver => Opinion::Refuse,
            Some(_) => Opinion::Wait,
            // Its blocks are not known yet: any of them may be frozen.
            None => Opinion::Wait,
        }
    }
}
