//! Notes on what the gate has let through on an inode, for grants to read.
//!
//! The gate writes a note before it lets an operation through; a grant reads
//! the notes after it has published its pin. The module
//! [`publish`](super::publish) explains why that is enough, and has the types
//! that enforce this order.

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
    /// The operation opens the file for writing.
    writer: bool,
    /// The operation may change the block map.
    changes: bool,
    /// The operation may make a writable mapping.
    maps: bool,
    /// The operation may put shared blocks where there were none.
    shares: bool,
}

impl Passing {
    /// What thread `tid` is about to do.
    pub(crate) fn of(operation: &Operation, tid: i32) -> Self {
        let kind = operation.kind;
        Self {
            tid,
            // Opening with O_TRUNC leaves a writer behind, too.
            writer: matches!(kind, K::OpenWrite | K::OpenTruncate),
            changes: !matches!(kind, K::OpenWrite | K::MapWrite),
            // What may do anything may be a mapping.
            maps: kind == K::MapWrite || kind.may_do_anything(),
            shares: operation.brings_shared,
        }
    }

    /// What a process has that is no holder any more: a description that can
    /// write, and mappings of it.
    pub(crate) fn left_with(pid: i32) -> Self {
        Self {
            tid: pid,
            writer: true,
            maps: true,
            ..Self::default()
        }
    }
}

/// The notes on one inode. Only [`Published`] permits a grant to read them.
#[derive(Debug)]
pub(crate) struct Notes<A: Atomics = Machine, L = LetIn> {
    /// Opens for writing that were let through.
    writers: Tally<A>,
    /// Operations that may change the block map and may still be under way.
    changes: Tally<A>,
    /// The threads in which these operations are under way.
    changes_by: L,
    /// Writable mappings that were let through.
    mappings: Tally<A>,
    /// The threads that may still be making such a mapping.
    mappings_by: L,
    /// Operations by which blocks may have become shared. Collapses, which move
    /// blocks of the file itself, count in `moved`.
    shares: Tally<A>,
    /// The number of bytes by which blocks may have come nearer to a pin.
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
    /// Notes an operation, and permits its caller to look at `pins` once more:
    /// the operation may go on only if no pin refuses it.
    ///
    /// A thread is listed before its operation is counted, so a grant that
    /// finds the count finds the thread.
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

    /// Notes an open for writing that an announcement lets through, and permits
    /// its caller to look whether a grant is under way. If the open cannot go
    /// on yet, the note is [withdrawn](Self::withdraw_writer).
    pub(super) fn note_writer<'a, P>(&self, pins: &'a P) -> Published<'a, P> {
        Published::after::<A>(pins, || self.writers.note())
    }

    /// Withdraws the note of an open that did not go on.
    pub(super) fn withdraw_writer(&self) {
        self.writers.withdraw();
    }

    /// Notes that anything may have been let in, by anybody, because an earlier
    /// guard has kept the gate.
    pub(crate) fn anything(&self) {
        let anybody = Threads {
            tids: Vec::new(),
            and_others: true,
        };
        self.changes_by.add(&anybody);
        self.mappings_by.add(&anybody);
        for tally in [&self.writers, &self.changes, &self.mappings, &self.shares] {
            tally.note();
        }
    }

    /// Notes that blocks behind a pin are about to come nearer by `bytes`. Only
    /// the gate's thread lets blocks be shared or moved, so it sees its own
    /// earlier notes.
    pub(crate) fn begin_move(&self, bytes: u64) {
        self.moved.add(bytes);
    }

    /// Takes back a noted move that did not happen.
    pub(crate) fn cancel_move(&self, bytes: u64) {
        self.moved.add(bytes.wrapping_neg());
    }

    /// The number of bytes by which blocks may have come nearer.
    pub(crate) fn moved(&self) -> u64 {
        self.moved.load()
    }

    /// Whether blocks may have become shared.
    pub(crate) fn may_be_shared(&self) -> bool {
        self.shares.is_any()
    }
}

/// The grants' side.
impl<A: Atomics, L: ThreadList> Notes<A, L> {
    /// Forgets the notes of a gate that has been open since. The proofs that
    /// close the gate find what it let through.
    pub(crate) fn forget(&self) {
        self.changes_by.take();
        self.mappings_by.take();
        for tally in [&self.writers, &self.changes, &self.mappings] {
            tally.forget();
        }
    }

    /// Forgets the shares from before anything was pinned: a new pin reads the
    /// blocks itself. Noted moves stay, since they are also taken back.
    pub(super) fn forget_shares(&self) {
        self.shares.forget();
    }
}

impl<A: Atomics, L: ThreadList> Published<'_, Notes<A, L>> {
    /// Calls `prove` if anybody was let in who can write; `prove` must show
    /// that nobody else can write. Says whether anybody was let in. If `prove`
    /// fails, the notes stay.
    pub(crate) fn writers<E>(&self, prove: impl FnOnce() -> Result<(), E>) -> Result<bool, E> {
        self.other().writers.deal(prove)
    }

    /// Calls `wait` if any threads were let in that may be changing the file;
    /// `wait` must wait for them. Says whether any were let in. If `wait`
    /// fails, the notes stay.
    pub(crate) fn changes<E>(
        &self,
        wait: impl FnOnce(&Threads) -> Result<(), E>,
    ) -> Result<bool, E> {
        let notes = self.other();
        notes.changes.deal(|| notes.changes_by.deal(wait))
    }

    /// Calls `wait` to wait for the threads that may be making a writable
    /// mapping. Says whether any such mapping was ever made. That stays noted,
    /// because mappings last.
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

/// A list of threads that the gate writes and a grant takes.
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

/// Threads that the gate has let in and that may still be running their
/// operation. Takes no lock.
#[derive(Debug, Default)]
pub(crate) struct LetIn(ArcSwap<Threads>);

/// A list of threads, which may be incomplete.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Threads {
    pub(crate) tids: Vec<i32>,
    /// There were more threads than the list holds: any thread may be one of
    /// them.
    pub(crate) and_others: bool,
}

/// The most threads remembered for a file.
const MAX_LET_IN: usize = 256;

impl Threads {
    /// Both lists in one.
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

/// What a grant under way demands of opens, and whether any open waits for the
/// grant.
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

    /// Notes that an open for writing waits at the gate, and says whether it
    /// may. The kernel already counts this open as a writer, and the grant may
    /// be waiting for writers to end. If the grant begins to refuse right after
    /// this check, it makes the gate look again at the waiting opens.
    pub(crate) fn may_wait(&self) -> bool {
        self.waiting.store(true, SeqCst);
        !self.refused.load(SeqCst)
    }

    /// Whether an open for writing waits, and is not refused yet.
    pub(crate) fn any_waits(&self) -> bool {
        self.waiting.load(SeqCst) && !self.refused.load(SeqCst)
    }

    /// Makes the gate refuse opens for writing at once. The caller must tell
    /// the gate to look again at the opens that wait.
    pub(crate) fn refuse(&self) {
        self.refused.store(true, SeqCst);
    }

    /// Clears the demands when the grant is over.
    pub(crate) fn reset(&self) {
        self.refused.store(false, SeqCst);
        self.waiting.store(false, SeqCst);
    }
}
