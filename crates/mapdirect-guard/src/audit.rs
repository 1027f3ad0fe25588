//! Records refusals and breaches: counts them, keeps them for a while, and tells
//! them to whoever wants to know.
//!
//! The gate thread only puts what it knows into a ring and wakes the audit
//! thread ([`keep`]). It never logs: a logger may need the very file that
//! somebody waits for.

pub(crate) mod actor;
pub(crate) mod call;
mod few;
pub(crate) mod journal;
pub(crate) mod journald;
pub(crate) mod keep;
pub(crate) mod names;
pub(crate) mod words;

use crate::policy::{OperationKind, RULES};
use crate::table::InodeId;
use crossbeam_queue::ArrayQueue;
use mapdirect_proto::Name;
use mapdirect_proto::record::Actor;
use mapdirect_proto::status::RefusedOperation;
use mapdirect_sys::proc::Syscall;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Refusals kept for `mapdirect status`.
const RECENT: usize = 64;

/// A refusal as the gate thread notes it.
#[derive(Debug)]
pub(crate) struct Refused {
    /// Nanoseconds since the epoch.
    pub(crate) time: u64,
    pub(crate) who: Who,
    pub(crate) kind: OperationKind,
    /// The word for the operation, if there is a better one than that of its
    /// kind.
    pub(crate) operation: &'static str,
    /// The system call, if it is known.
    pub(crate) call: Option<Syscall>,
    pub(crate) id: InodeId,
    pub(crate) path: Arc<str>,
    pub(crate) range: Option<Range<u64>>,
    pub(crate) met: Option<Met>,
}

/// Who was refused.
#[derive(Debug)]
pub(crate) enum Who {
    /// Somebody looked while the thread waited.
    Known(Box<Actor>),
    /// A thread that must be looked up.
    Thread {
        tid: i32,
        /// 0 if it is not known.
        pid: i32,
        command: String,
        /// How it was seen; `None` if it cannot be looked up.
        sight: Option<actor::Sight>,
    },
}

/// The pin that an operation met.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Met {
    pub(crate) pin: u64,
    pub(crate) pid: i32,
    pub(crate) uid: u32,
    /// When the holder began, in clock ticks since boot, if that is known.
    pub(crate) began: Option<u64>,
}

/// The time in nanoseconds since the epoch.
pub(crate) fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

/// The counters, and the ring between the gate thread and the audit thread.
#[derive(Debug)]
pub(crate) struct Audit {
    ring: ArrayQueue<Refused>,
    /// What had no room in the ring, and is not told yet.
    lost: AtomicU64,
    /// What had no room in the ring, and is told.
    unkept: AtomicU64,
    /// What pins give way to.
    words: ArrayQueue<String>,
    judged: AtomicU64,
    refused: [AtomicU64; RULES.len()],
    recent: Mutex<VecDeque<RefusedOperation>>,
    thread: OnceLock<Thread>,
    stop: AtomicBool,
    /// Looks at processes, and for names of files.
    actors: few::Few,
    names: few::Few,
}

impl Audit {
    pub(crate) fn new() -> Self {
        Self {
            ring: ArrayQueue::new(4096),
            lost: AtomicU64::new(0),
            unkept: AtomicU64::new(0),
            words: ArrayQueue::new(1024),
            judged: AtomicU64::new(0),
            refused: [const { AtomicU64::new(0) }; RULES.len()],
            recent: Mutex::default(),
            thread: OnceLock::new(),
            stop: AtomicBool::new(false),
            actors: few::Few::new(16),
            names: few::Few::new(8),
        }
    }

    pub(crate) fn judged(&self) {
        self.judged.fetch_add(1, Relaxed);
    }

    /// Records a refusal. Neither blocks nor fails.
    pub(crate) fn refused(&self, refused: Refused) {
        self.refused[refused.kind as usize].fetch_add(1, Relaxed);
        if self.ring.push(refused).is_err() {
            self.lost.fetch_add(1, Relaxed);
        }
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Says something to the operator of the guard.
    pub(crate) fn say(&self, words: String) {
        self.gives_way(words);
    }

    /// Records in words that pins give way, or hold again. Of more than fit, the
    /// newest stay.
    pub(crate) fn gives_way(&self, words: String) {
        let _ = self.words.force_push(words);
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    pub(crate) fn next_words(&self) -> Option<String> {
        self.words.pop()
    }

    pub(crate) fn total_judged(&self) -> u64 {
        self.judged.load(Relaxed)
    }

    /// The counts that are not zero, by name of operation.
    pub(crate) fn counts(&self) -> Vec<(String, u64)> {
        RULES
            .iter()
            .zip(&self.refused)
            .map(|(rule, count)| (rule.name.to_owned(), count.load(Relaxed)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    pub(crate) fn recent(&self) -> Vec<RefusedOperation> {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.iter().cloned().collect()
    }

    /// Finds the present names of files. Waits no longer than `limit`.
    pub(crate) fn names_of(&self, questions: Vec<names::Question>, limit: Duration) -> Vec<Name> {
        names::find_all(&self.names, questions, limit)
    }

    /// Whether a path leads to a file, as far as that can be found out soon.
    pub(crate) fn leads(&self, path: &Arc<str>, id: InodeId) -> bool {
        names::leads(&self.names, path, id, Duration::from_millis(100))
    }

    /// Ends [`keep::run`].
    pub(crate) fn stop(&self) {
        self.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Makes the calling thread the audit thread, which is woken when there is
    /// something to do.
    pub(crate) fn begin(&self) {
        let _ = self.thread.set(std::thread::current());
    }

    /// Takes refusals out of the ring, and the number of those that had no room
    /// in it.
    pub(crate) fn take(&self, most: usize) -> (Vec<Refused>, u64) {
        let taken: Vec<_> = std::iter::from_fn(|| self.ring.pop()).take(most).collect();
        let lost = if taken.is_empty() {
            0
        } else {
            self.lost.swap(0, Relaxed)
        };
        self.unkept.fetch_add(lost, Relaxed);
        (taken, lost)
    }

    /// The number of refusals of which there is no record.
    pub(crate) fn unkept(&self) -> u64 {
        self.unkept.load(Relaxed) + self.lost.load(Relaxed)
    }

    /// Keeps a refusal for `mapdirect status`.
    pub(crate) fn remember(&self, refused: RefusedOperation) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.len() == RECENT {
            recent.pop_front();
        }
        recent.push_back(refused);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.stop.load(SeqCst)
    }
}
