//! Threads that may open a pinned file for writing, because somebody who may
//! pin has said so.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Instant;

/// Most announcements of one file that are good at a time.
pub(super) const MAX_ANNOUNCED: usize = 64;

/// A thread that may open a pinned file for writing, once and soon.
#[derive(Debug)]
pub(crate) struct Announcement {
    pub(super) tid: i32,
    /// When that thread began: its number is used again.
    pub(super) start: u64,
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
