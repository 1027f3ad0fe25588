//! The protocol of [`publish`](super::publish), run through every order that
//! the memory model permits. Pins are a flag here that is published with less
//! than the table publishes them with.

use super::notes::{Notes, Passing, ThreadList, Threads};
use super::publish::{Atomics, Published};
use crate::policy::{Operation, OperationKind as K};
use loom::sync::Mutex;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering::*, fence};
use std::sync::Arc;

/// Atomics whose every order is tried.
#[derive(Debug)]
pub(crate) struct Loom;

impl Atomics for Loom {
    type Count = AtomicU64;

    fn fence() {
        fence(SeqCst);
    }
}

/// The same without what the protocol rests on.
#[derive(Debug)]
pub(crate) struct WithoutFences;

impl Atomics for WithoutFences {
    type Count = AtomicU64;

    fn fence() {}
}

super::publish::count!(AtomicU64);

#[derive(Debug, Default)]
struct Listed(Mutex<Threads>);

impl ThreadList for Listed {
    fn add(&self, more: &Threads) {
        let mut threads = self.0.lock().unwrap();
        *threads = threads.with(more);
    }

    fn take(&self) -> Threads {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

#[derive(Debug)]
struct Inode<A: Atomics> {
    notes: Notes<A, Listed>,
    pinned: AtomicBool,
}

const TID: i32 = 7;

impl<A: Atomics> Inode<A> {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            notes: Notes::default(),
            pinned: AtomicBool::new(false),
        })
    }

    /// The gate's thread: whether an operation goes on.
    fn pass(&self, kind: K) -> bool {
        let passing = Passing::of(&Operation::new(kind, 0..4096), TID);
        let pins = self.notes.note(passing, &self.pinned);
        !pins.other().load(Acquire)
    }

    /// The gate's thread: whether an announced open goes on.
    fn pass_announced(&self) -> bool {
        let pins = self.notes.note_writer(&self.pinned);
        let granting = pins.other().load(Acquire);
        if granting {
            self.notes.withdraw_writer();
        }
        !granting
    }

    fn publish(&self) -> Published<'_, Notes<A, Listed>> {
        Published::after::<A>(&self.notes, || self.pinned.store(true, Release))
    }
}

/// Which notes a grant has found.
#[derive(Clone, Debug, Default)]
struct Found {
    writers: bool,
    changes: bool,
    mappings: bool,
    waited_for: Vec<i32>,
}

fn look<A: Atomics>(notes: &Published<'_, Notes<A, Listed>>) -> Found {
    let mut found = Found::default();
    let mut waited_for = Vec::new();
    let mut wait = |threads: &Threads| {
        waited_for.extend(&threads.tids);
        Ok::<(), ()>(())
    };
    found.writers = notes.writers(|| Ok::<(), ()>(())).unwrap();
    found.changes = notes.changes(&mut wait).unwrap();
    found.mappings = notes.mappings(&mut wait).unwrap();
    found.waited_for = waited_for;
    found
}

fn nobody_is_missed<A: Atomics + 'static>(kind: K) {
    loom::model(move || {
        let inode = Inode::<A>::new();
        let gate = Arc::clone(&inode);
        let gate = loom::thread::spawn(move || gate.pass(kind));
        let found = look(&inode.publish());
        let went_on = gate.join().unwrap();
        let is_writer = matches!(kind, K::OpenWrite | K::OpenTruncate);
        let changes = !matches!(kind, K::OpenWrite | K::MapWrite);
        let maps = kind == K::MapWrite || kind.may_do_anything();
        if went_on {
            assert!(!is_writer || found.writers, "a writer was missed");
            assert!(!changes || found.changes, "a change was missed");
            assert!(!maps || found.mappings, "a mapping was missed");
        }
        if found.changes || found.mappings {
            assert!(found.waited_for.contains(&TID), "nobody waited for it");
        }
    });
}

#[test]
fn what_goes_on_is_found_by_the_grant() {
    for kind in [
        K::OpenWrite,
        K::OpenTruncate,
        K::Write,
        K::MapWrite,
        K::Unknown,
        K::SetFlags,
    ] {
        nobody_is_missed::<Loom>(kind);
    }
}

/// The test can fail: the checker finds the order in which both look too early.
/// Mappings show it, since their notes are only read; notes that are taken are
/// exchanged, and that orders the two sides by itself.
#[test]
#[should_panic(expected = "was missed")]
fn without_fences_somebody_is_missed() {
    nobody_is_missed::<WithoutFences>(K::MapWrite);
}

#[test]
fn an_announced_open_that_goes_on_is_found_by_the_grant() {
    loom::model(|| {
        let inode = Inode::<Loom>::new();
        let gate = Arc::clone(&inode);
        let gate = loom::thread::spawn(move || gate.pass_announced());
        let found = look(&inode.publish());
        assert!(!gate.join().unwrap() || found.writers);
    });
}

/// A grant that could not prove anything puts the notes back, and at the same
/// time the gate withdraws one: the note of who did go on stays.
#[test]
fn a_note_that_is_withdrawn_takes_no_other_with_it() {
    loom::model(|| {
        let inode = Inode::<Loom>::new();
        assert!(inode.pass_announced(), "nothing is pinned yet");
        let notes = inode.publish();
        let gate = Arc::clone(&inode);
        let gate = loom::thread::spawn(move || gate.pass_announced());
        let proven = notes.writers(|| Err::<(), ()>(()));
        assert!(proven.is_err());
        assert!(!gate.join().unwrap(), "a grant is under way");
        assert!(look(&notes).writers, "the writer was forgotten");
    });
}

/// What is noted while notes are being dealt with is not lost.
#[test]
fn what_comes_meanwhile_stays_noted() {
    loom::model(|| {
        let inode = Inode::<Loom>::new();
        assert!(inode.pass(K::Write));
        let gate = Arc::clone(&inode);
        let gate = loom::thread::spawn(move || {
            // It passed its first look before, and finds the pin only now.
            gate.pass(K::Write)
        });
        let notes = inode.publish();
        let first = look(&notes);
        let went_on = gate.join().unwrap();
        let second = look(&notes);
        assert!(first.changes);
        assert!(!went_on || first.changes || second.changes);
        assert!(first.waited_for.contains(&TID));
    });
}
