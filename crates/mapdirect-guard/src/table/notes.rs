//! What the gate has let through on an inode, for grants to hear of.
//!
//! The gate writes a note before it lets something through; a grant reads the
//! notes after it has published its pin. See [`publish`](super::publish) for why
//! that is enough, and for the types that keep this order.

use super::publish::{Atomics, Count, Machine, Published, Tally};
use crate::policy::{Operation, OperationKind as K};
use arc_swap::ArcSwap;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// An operation that the gate is about to let through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Passing {
    tid: i32,
    /// It opens the file for writing.
    writer: bool,
    /// It may change the block map.
    changes: bool,
    /// It may make a mapping that can be stored to.
    maps: bool,
    /// Blocks that others use may come to lie where they did not.
    shares: bool,
}

impl Passing {
    /// What thread `tid` is about to do.
    pub(crate) fn of(operation: &Operation, tid: i32) -> Self {
        let kind = operation.kind;
        Self {
            tid,
            // Opening it with O_TRUNC leaves a writer behind, too.
            writer: matches!(kind, K::OpenWrite | K::OpenTruncate),
            changes: !matches!(kind, K::OpenWrite | K::MapWrite),
            // What nobody knows may be a mapping.
            maps: matches!(kind, K::MapWrite | K::Unknown),
            shares: operation.brings_shared,
        }
    }
}

/// The notes on one inode. What they say can be read by way of [`Published`]
/// alone.
#[derive(Debug)]
pub(crate) struct Notes<A: Atomics = Machine, L = LetIn> {
    /// Opens for writing that were let through.
    writers: Tally<A>,
    /// Operations that may change the block map and may still be under way.
    changes: Tally<A>,
    /// The threads they are under way in.
    changes_by: L,
    /// Mappings through which somebody can store.
    mappings: Tally<A>,
    /// The threads that may still be making one.
    mappings_by: L,
    /// Operations by which blocks may have come to be shared; collapses, which
    /// move blocks of the file itself, count in `moved`.
    shares: Tally<A>,
    /// By how many bytes blocks may have come nearer to a pin.
    moved: A::Count,
}

impl<A: Atomics, L: ThreadList> Default for Notes<A, L> {
    fn default() -> Self {
        Self {
            writers: Tally::default(),
            changes: Tally::default(),
            changes_by: L::default(),
            mappings: Tally::default(),
            mappings_by: L::default(),
            shares: Tally::default(),
            moved: A::Count::new(0),
        }
    }
}

/// The gate's side.
impl<A: Atomics, L: ThreadList> Notes<A, L> {
    /// Notes an operation, and gives leave to look for pins, at `pins`, once
    /// more: it may go on only if there are none that mind.
    ///
    /// A thread is listed before its operation counts: whoever finds the count
    /// finds the thread.
    pub(super) fn note<'a, P>(&self, passing: Passing, pins: &'a P) -> Published<'a, P> {
        Published::after::<A>(pins, || {
            if passing.writer {
                self.writers.note();
            }
            if passing.changes {
                self.changes_by.note(passing.tid);
                self.changes.note();
            }
            if passing.maps {
                self.mappings_by.note(passing.tid);
                self.mappings.note();
            }
            if passing.shares {
                self.shares.note();
            }
        })
    }

    /// Notes an open for writing that an announcement lets through, and gives
    /// leave to look whether a grant is under way. If the open cannot go on
    /// yet, the note is [withdrawn](Self::withdraw_writer).
    pub(super) fn note_writer<'a, P>(&self, pins: &'a P) -> Published<'a, P> {
        Published::after::<A>(pins, || self.writers.note())
    }

    /// Takes the note of an open back that did not go on.
    pub(super) fn withdraw_writer(&self) {
        self.writers.withdraw();
    }

    /// Blocks behind a pin are about to come nearer by so many bytes. Only the
    /// gate's thread lets blocks be shared or moved: what it notes first, it
    /// finds noted.
    pub(crate) fn begin_move(&self, bytes: u64) {
        self.moved.add(bytes);
    }

    /// They were not moved after all.
    pub(crate) fn cancel_move(&self, bytes: u64) {
        self.moved.add(bytes.wrapping_neg());
    }

    /// By how many bytes blocks may have come nearer.
    pub(crate) fn moved(&self) -> u64 {
        self.moved.load()
    }

    /// Whether blocks may have come to be shared.
    pub(crate) fn may_be_shared(&self) -> bool {
        self.shares.is_any()
    }
}

/// The side of grants.
impl<A: Atomics, L: ThreadList> Notes<A, L> {
    /// Forgets what was noted by a gate that has been open since: what it let
    /// through is found by the proofs that close it.
    pub(crate) fn forget(&self) {
        self.changes_by.take();
        self.mappings_by.take();
        for tally in [&self.writers, &self.changes, &self.mappings] {
            tally.forget();
        }
    }

    /// Forgets what was shared while nothing was pinned: a pin that comes looks
    /// for itself. What was moved stays, since it is also given back.
    pub(super) fn forget_shares(&self) {
        self.shares.forget();
    }
}

impl<A: Atomics, L: ThreadList> Published<'_, Notes<A, L>> {
    /// Has `prove` show that nobody else can write, if anybody was let in who
    /// can; says whether anybody was. If that fails, the notes stand.
    pub(crate) fn writers<E>(&self, prove: impl FnOnce() -> Result<(), E>) -> Result<bool, E> {
        self.other().writers.deal(prove)
    }

    /// Has `wait` wait for the threads that may be changing the file, if any
    /// were let in; says whether any were. If that fails, the notes stand.
    pub(crate) fn changes<E>(
        &self,
        wait: impl FnOnce(&Threads) -> Result<(), E>,
    ) -> Result<bool, E> {
        let notes = self.other();
        notes.changes.deal(|| notes.changes_by.deal(wait))
    }

    /// Has `wait` wait for the threads that may be making a mapping to store
    /// by; says whether any was ever made. That stays noted: mappings last.
    pub(crate) fn mappings<E>(
        &self,
        wait: impl FnOnce(&Threads) -> Result<(), E>,
    ) -> Result<bool, E> {
        let notes = self.other();
        if !notes.mappings.is_any() {
            return Ok(false);
        }
        notes.mappings_by.deal(wait).map(|()| true)
    }
}

/// A list of threads that one side writes and the other takes.
pub(crate) trait ThreadList: Debug + Default {
    fn add(&self, more: &Threads);
    fn take(&self) -> Threads;

    fn note(&self, tid: i32) {
        self.add(&Threads {
            tids: vec![tid],
            and_others: false,
        });
    }

    /// Takes the threads, and lists them again if `deal` fails.
    fn deal<E>(&self, deal: impl FnOnce(&Threads) -> Result<(), E>) -> Result<(), E> {
        let threads = self.take();
        deal(&threads).inspect_err(|_| self.add(&threads))
    }
}

/// Threads that the gate has let in and that may still be at it. No lock.
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

impl Threads {
    /// These and others.
    pub(super) fn with(&self, more: &Self) -> Self {
        let mut threads = self.clone();
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
    }
}

impl ThreadList for LetIn {
    fn add(&self, more: &Threads) {
        self.0.rcu(|threads| threads.with(more));
    }

    fn take(&self) -> Threads {
        Threads::clone(&self.0.swap(Arc::default()))
    }
}

/// What a grant under way asks of opens, and whether any wait for it.
#[derive(Debug, Default)]
pub(crate) struct Opens {
    held: AtomicBool,
    waiting: AtomicBool,
    refused: AtomicBool,
}

impl Opens {
    /// Whether no open may get an answer now: a description is being replaced,
    /// and its record locks with it.
    pub(crate) fn are_held(&self) -> bool {
        self.held.load(SeqCst)
    }

    pub(crate) fn hold(&self, held: bool) {
        self.held.store(held, SeqCst);
    }

    /// Says that an open for writing waits at the gate, and whether it may: the
    /// kernel counts it as a writer already, and the grant may be waiting for
    /// that to end. If the grant begins to refuse right after this has looked,
    /// it has the gate look again at whoever waits.
    pub(crate) fn may_wait(&self) -> bool {
        self.waiting.store(true, SeqCst);
        !self.refused.load(SeqCst)
    }

    /// Whether an open for writing waits, and is not refused yet.
    pub(crate) fn any_waits(&self) -> bool {
        self.waiting.load(SeqCst) && !self.refused.load(SeqCst)
    }

    /// Has opens for writing refused at once; the gate must be told to look
    /// again at those that wait.
    pub(crate) fn refuse(&self) {
        self.refused.store(true, SeqCst);
    }

    /// The grant is over.
    pub(crate) fn reset(&self) {
        self.refused.store(false, SeqCst);
        self.waiting.store(false, SeqCst);
    }
}
