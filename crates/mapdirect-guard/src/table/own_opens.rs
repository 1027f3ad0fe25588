//! Files that threads of the guard open behind its own gate.

use crate::Errno;
use arc_swap::ArcSwap;
use crossbeam_queue::ArrayQueue;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};

/// Threads of the guard that are about to open a file behind its own gate. The
/// gate lets their opens in without question.
#[derive(Debug)]
pub(crate) struct OwnOpens {
    slots: [AtomicI32; 64],
    /// Threads whose opens may take long.
    long: ArcSwap<Vec<i32>>,
    /// The thread that wants the description of its event instead of one of its
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

    /// Opens a file behind the gate without anybody noticing: what is done by
    /// the returned description raises no events, not even for inotify. The
    /// description is the one in the permission event by which the kernel asks
    /// the gate whether `open` may go on; the gate then refuses `open` itself.
    /// One thread at a time can do this; any other thread gets an ordinary
    /// description.
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

    /// Hands the description of an event to the thread that caused the event,
    /// if that thread waits for it. Otherwise gives the description back.
    pub(crate) fn hand(&self, tid: i32, file: OwnedFd) -> Option<OwnedFd> {
        if tid == 0 || self.quiet.load(SeqCst) != tid {
            return Some(file);
        }
        self.handed.push(file).err()
    }

    /// Runs `run`, and lets in everything that the calling thread does to files
    /// behind the gate meanwhile. `run` may take long.
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

    /// Runs `open`, and lets the calling thread's opens in meanwhile.
    pub(crate) fn during<T>(&self, open: impl FnOnce() -> T) -> T {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let slot = loop {
            let taken = self
                .slots
                .iter()
                .find(|slot| slot.compare_exchange(0, tid, SeqCst, SeqCst).is_ok());
            match taken {
                Some(slot) => break slot,
                // 64 opens are under way; each is over in microseconds.
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
