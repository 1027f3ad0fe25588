//! What the gate has let in, for grants to hear of.

use arc_swap::ArcSwap;
use std::sync::Arc;

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
