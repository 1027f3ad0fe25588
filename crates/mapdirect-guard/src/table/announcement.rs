//! Announcements of threads that may open a pinned file for writing, because a
//! process that may pin has announced them.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Instant;

/// The most announcements of one file that are valid at a time.
pub(super) const MAX_ANNOUNCED: usize = 64;

/// Permits one thread to open a pinned file for writing, once and soon.
#[derive(Debug)]
pub(crate) struct Announcement {
    pub(super) tid: i32,
    /// When that thread started: a thread's number is used again after its end.
    pub(super) start: u64,
    /// The last moment at which the thread may come to the gate.
    until: Instant,
    /// The thread has come to the gate, or may not come any more.
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

    /// Whether the announcement lets in a thread that comes to the gate at
    /// `came`.
    pub(crate) fn is_good(&self, came: Instant) -> bool {
        came <= self.until && !self.over.load(SeqCst)
    }

    /// Uses the announcement up, and says whether this was the first use. Only
    /// the caller that gets `true` may let the thread in.
    pub(crate) fn take(&self) -> bool {
        !self.over.swap(true, SeqCst)
    }
}
