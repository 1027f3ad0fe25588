//! Files that threads of the guard open behind its own gate.

use crate::Errno;
use arc_swap::ArcSwap;
use crossbeam_queue::ArrayQueue;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};

/// Threads of the guard that are about to open a file behind its own gate:
/// their opens are let in without question.
#[derive(Debug)]
pub(crate) struct OwnOpens {
    slots: [AtomicI32; 64],
    /// Those that take long about it.
    long: ArcSwap<Vec<i32>>,
    /// The one that wants the description of its event instead of one of its
    /// own.
    quiet: AtomicI32,
    handed: ArrayQueue<OwnedFd>,
}

impl OwnOpens {
    pub(crate) fn new() -> Self {
        Self {
            slots: [const { AtomicI32::new(0) }; 64],
            long: ArcSwap::default(),
            quiet: AtomicI32::new(0),
            handed: ArrayQueue::new(1),
        }
    }

    /// A description of a file behind the gate that nobody hears of: what is
    /// opened, used and closed by it raises no events, also not inotify's. It
    /// is the one of the event that the kernel asks the gate by whether `open`
    /// may go on, which then may not. For one thread at a time; another one
    /// gets a description as any.
    pub(crate) fn quietly(
        &self,
        open: impl FnOnce() -> Result<OwnedFd, Errno>,
    ) -> Result<OwnedFd, Errno> {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        if self.quiet.compare_exchange(0, tid, SeqCst, SeqCst).is_err() {
            return self.during(open);
        }
        let opened = self.during(open);
        self.quiet.store(0, SeqCst);
        match (opened, self.handed.pop()) {
            (Err(Errno::TXTBSY), Some(handed)) => Ok(handed),
            (opened, _) => opened,
        }
    }

    /// Hands the description of an event to the thread that it is about, if
    /// that waits for it; else gives it back.
    pub(crate) fn hand(&self, tid: i32, file: OwnedFd) -> Option<OwnedFd> {
        if tid == 0 || self.quiet.load(SeqCst) != tid {
            return Some(file);
        }
        self.handed.push(file).err()
    }

    /// Runs something with all that the calling thread does to files behind
    /// the gate let in, for as long as it takes.
    pub(crate) fn for_long<T>(&self, run: impl FnOnce() -> T) -> T {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        self.long.rcu(|long| {
            let mut long = Vec::clone(long);
            long.push(tid);
            long
        });
        let result = run();
        self.long.rcu(|long| {
            let mut long = Vec::clone(long);
            long.retain(|other| *other != tid);
            long
        });
        result
    }

    /// Runs `open` with the calling thread's opens let in.
    pub(crate) fn during<T>(&self, open: impl FnOnce() -> T) -> T {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let slot = loop {
            let taken = self
                .slots
                .iter()
                .find(|slot| slot.compare_exchange(0, tid, SeqCst, SeqCst).is_ok());
            match taken {
                Some(slot) => break slot,
                // 64 opens at once: each is over in microseconds.
                None => std::thread::yield_now(),
            }
        };
        let result = open();
        slot.store(0, SeqCst);
        result
    }

    pub(crate) fn contains(&self, tid: i32) -> bool {
        tid != 0
            && (self.slots.iter().any(|slot| slot.load(SeqCst) == tid)
                || self.long.load().contains(&tid))
    }
}
