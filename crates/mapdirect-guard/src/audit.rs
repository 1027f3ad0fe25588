//! Records refusals: counts them, keeps them for a while, and reports them to
//! the operator of the guard.
//!
//! The gate thread only puts a record into a ring and wakes the audit thread.
//! It never logs: a logger may need the very file that somebody waits for.

use crate::policy::{OperationKind, RULES};
use crate::table::InodeId;
use crossbeam_queue::ArrayQueue;
use mapdirect_proto::status::RefusedOperation;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::{SystemTime, UNIX_EPOCH};

/// Refusals kept for `mapdirect status`.
const RECENT: usize = 64;

/// A refusal as the gate thread notes it.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) tid: i32,
    pub(crate) command: String,
    pub(crate) kind: OperationKind,
    pub(crate) id: InodeId,
    pub(crate) path: Arc<str>,
    pub(crate) range: Option<Range<u64>>,
}

/// The counters, and the ring between the gate thread and the audit thread.
#[derive(Debug)]
pub(crate) struct Audit {
    ring: ArrayQueue<Refused>,
    lost: AtomicU64,
    /// What pins give way to.
    words: ArrayQueue<String>,
    judged: AtomicU64,
    refused: [AtomicU64; RULES.len()],
    recent: Mutex<VecDeque<RefusedOperation>>,
    thread: OnceLock<Thread>,
    stop: AtomicBool,
}

impl Audit {
    pub(crate) fn new() -> Self {
        Self {
            ring: ArrayQueue::new(4096),
            lost: AtomicU64::new(0),
            words: ArrayQueue::new(1024),
            judged: AtomicU64::new(0),
            refused: [const { AtomicU64::new(0) }; RULES.len()],
            recent: Mutex::default(),
            thread: OnceLock::new(),
            stop: AtomicBool::new(false),
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

    /// Ends [`run`](Self::run).
    pub(crate) fn stop(&self) {
        self.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// The work of the audit thread: calls `tell` with every refusal and the
    /// number of refusals that could not be kept, and calls `others` each time
    /// the thread wakes.
    pub(crate) fn run(&self, tell: &dyn Fn(&RefusedOperation, u64), others: &dyn Fn()) {
        let _ = self.thread.set(std::thread::current());
        loop {
            while let Some(refused) = self.ring.pop() {
                let record = RefusedOperation {
                    time: SystemTime::now()
                        .duration_since(UNIX_EPOCH)
                        .map_or(0, |since| since.as_secs()),
                    tid: refused.tid,
                    command: refused.command,
                    operation: refused.kind.name().to_owned(),
                    device: refused.id.device(),
                    inode: refused.id.inode,
                    path: refused.path.to_string(),
                    range: refused.range,
                };
                tell(&record, self.lost.swap(0, Relaxed));
                let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
                if recent.len() == RECENT {
                    recent.pop_front();
                }
                recent.push_back(record);
            }
            others();
            if self.stop.load(SeqCst) {
                return;
            }
            std::thread::park();
        }
    }
}
