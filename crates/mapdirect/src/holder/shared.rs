//! What is known of the pins of this process, and how the threads that hear
//! of them are reached.

use super::connection::Connection;
use super::listener::{KEPT, serve};
use crate::guard::Guard;
use crate::map::revoke::{self, Keeper, Memory};
use crate::state::{OnBreach, State};
use mapdirect_proto::{Breach, Gate, WatchedPin};
use mapdirect_sys::unix::Socket;
use mapdirect_sys::{Errno, signal};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::Ordering::{AcqRel, Acquire, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicPtr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

/// What is known in this process.
#[derive(Debug)]
pub(super) struct Watching {
    pub(super) process: u32,
    pub(super) shared: Mutex<Shared>,
    /// Whoever starts a thread.
    pub(super) starting: Mutex<()>,
    /// A thread has tried to connect.
    pub(super) tried: Condvar,
    /// The connections of this process. A child of fork(2) could wait for ever for
    /// a lock on those of its parent.
    pub(super) connections: Mutex<Connections>,
}

#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) pins: HashMap<u64, Entry>,
    /// Those that have been started, by number.
    pub(super) threads: Vec<Thread>,
}

/// A pin that is watched.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) named: WatchedPin,
    pub(super) gate: Gate,
    pub(super) on_breach: OnBreach,
    pub(super) memory: Option<Memory>,
    pub(super) revoked: Arc<AtomicBool>,
    pub(super) keeper: Option<Keeper>,
    /// Number of the thread that watches it.
    pub(super) thread: usize,
    pub(super) state: State,
    pub(super) count: u64,
    pub(super) breaches: Vec<Breach>,
    /// What became of names of the file, if the pin denies that; the first few.
    pub(super) renames: Vec<String>,
    pub(super) event: Weak<OwnedFd>,
    /// The pin is over, and may be taken up again.
    pub(super) asleep: bool,
}

impl Entry {
    /// Says whether that is news. What is lost stays so.
    pub(super) fn become_(&mut self, state: State) -> bool {
        if self.state.is_lost() || self.state == state {
            return false;
        }
        self.state = state;
        true
    }

    /// Says whether it was not known before.
    pub(super) fn renamed(&mut self, how: String) -> bool {
        let is_news = self.renames.len() < KEPT && !self.renames.contains(&how);
        if is_news {
            self.renames.push(how);
        }
        is_news
    }

    /// Says whether it was not known before.
    pub(super) fn breached(&mut self, breach: Breach) -> bool {
        if self.breaches.contains(&breach) {
            return false;
        }
        self.count += 1;
        let mut why = describe(&breach);
        if self.breaches.len() < KEPT {
            self.breaches.push(breach);
        }
        if self.on_breach == OnBreach::Revoke
            && let Some(memory) = self.memory.take()
        {
            // Before it is done: whoever finds it done must be told why.
            self.revoked.store(true, SeqCst);
            ANY_REVOKED.store(true, SeqCst);
            // SAFETY: the mapping of the DirectMap whose pin this is. Before
            // that is unmapped this entry goes, under the lock that is held
            // here.
            let (keeper, done) = unsafe { revoke::revoke(&memory) };
            self.keeper = keeper;
            if let Err(errno) = done {
                why = format!("{why}; its mapping could not be revoked: {errno}");
            }
        }
        self.become_(State::Lost { why });
        true
    }
}

/// Whether a mapping of this process was ever revoked.
static ANY_REVOKED: AtomicBool = AtomicBool::new(false);

#[inline]
pub(crate) fn any_revoked() -> bool {
    ANY_REVOKED.load(Acquire)
}

/// A breach in one line.
pub(crate) fn describe(breach: &Breach) -> String {
    let cause = breach
        .cause
        .as_ref()
        .map_or_else(String::new, |cause| format!("; by {cause}"));
    format!(
        "blocks under it have changed: bytes {} to {}{cause}",
        breach.range.start, breach.range.end
    )
}

impl Watching {
    pub(super) fn lock(&self) -> MutexGuard<'_, Shared> {
        lock(&self.shared)
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// That of this process: a child of fork(2) has its own, since whoever held a
/// lock when it was made is not there to let go.
pub(super) fn watching() -> &'static Watching {
    static CURRENT: AtomicPtr<Watching> = AtomicPtr::new(std::ptr::null_mut());
    let process = std::process::id();
    loop {
        let there = CURRENT.load(Acquire);
        // SAFETY: null, or made by `Box::into_raw` below and never freed.
        let current = unsafe { there.as_ref() };
        if let Some(current) = current.filter(|current| current.process == process) {
            return current;
        }
        let new = Box::into_raw(Box::new(Watching {
            process,
            shared: Mutex::default(),
            starting: Mutex::default(),
            tried: Condvar::new(),
            connections: Mutex::default(),
        }));
        if CURRENT
            .compare_exchange(there, new, AcqRel, Acquire)
            .is_err()
        {
            // SAFETY: made above, and seen by nobody.
            drop(unsafe { Box::from_raw(new) });
        }
    }
}

/// How to reach a thread.
/// Connections, by where their guard listens, and whether they are for threads with
/// the capability.
pub(crate) type Connections = HashMap<(PathBuf, bool), Arc<Connection>>;

/// The connections of this process.
pub(crate) fn connections() -> MutexGuard<'static, Connections> {
    lock(&watching().connections)
}

#[derive(Debug)]
pub(super) struct Thread {
    pub(super) guard: Guard,
    pub(super) orders: Option<Socket>,
    /// Inode of the socket: a program that closes descriptors it does not know
    /// may have another one under that number by now.
    pub(super) identity: (u64, u64),
    /// Pins that it does not know of yet.
    pub(super) new: Vec<WatchedPin>,
    /// How often it has begun to connect.
    pub(super) begun: u64,
    /// Which of these tries has come to an end.
    pub(super) done: u64,
}

pub(super) fn identity(fd: BorrowedFd<'_>) -> Option<(u64, u64)> {
    rustix::fs::fstat(fd)
        .ok()
        .map(|stat| (stat.st_dev, stat.st_ino))
}

impl Thread {
    pub(super) fn start(
        watching: &'static Watching,
        number: usize,
        guard: &Guard,
    ) -> std::result::Result<Self, (&'static str, Errno)> {
        let (ours, theirs) = Socket::pair().map_err(|errno| ("socketpair", errno))?;
        let identity = identity(ours.as_fd()).ok_or(("fstat", Errno::BADF))?;
        // Signals are for the program's own threads.
        let blocked = signal::block_all().map_err(|errno| ("pthread_sigmask", errno))?;
        let path = guard.socket().to_owned();
        std::thread::Builder::new()
            .name(String::from("mapdirect-watch"))
            .stack_size(128 * 1024)
            .spawn(move || serve(watching, number, path, theirs))
            .map_err(|error| {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::AGAIN);
                ("starting a thread", errno)
            })?;
        drop(blocked);
        // It answers when it has asked about the first pin.
        let answer = ours.receive(&mut [0; 8]);
        match answer {
            Ok(received) if received.length > 0 => Ok(Self {
                guard: guard.clone(),
                orders: Some(ours),
                identity,
                new: Vec::new(),
                begun: 0,
                done: 0,
            }),
            Ok(_) => Err(("receive", Errno::SRCH)),
            Err(errno) => Err(("receive", errno)),
        }
    }

    pub(super) fn is_usable(&self) -> bool {
        let there = self.orders.as_ref().map(AsFd::as_fd).and_then(identity);
        there == Some(self.identity)
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if !self.is_usable() {
            // The number is somebody else's.
            std::mem::forget(self.orders.take());
        }
    }
}
