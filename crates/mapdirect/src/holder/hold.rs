//! What a holder has of a pin, and by which it asks about it.

use super::listener::{ANSWER, NEW_PINS, RECONNECT};
use super::shared::{Entry, Shared, Thread, Watching, lock, watching};
use crate::error::{Error, Kind, Result};
use crate::guard::Guard;
use crate::map::revoke::{Keeper, Memory};
use crate::state::{EventFd, Integrity, OnBreach, State};
use mapdirect_proto::{Gate, WatchedPin};
use mapdirect_sys::Errno;
use rustix::event::EventfdFlags;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Acquire;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// What a holder has of a pin, and by which it asks about it.
#[derive(Debug)]
pub(crate) struct Hold {
    named: WatchedPin,
    guard: Guard,
    gate: Gate,
    /// The process that asked for the pin.
    process: u32,
    on_breach: OnBreach,
    /// The memory of a mapping.
    memory: Option<Memory>,
    /// It was taken away.
    revoked: Arc<AtomicBool>,
    /// The pin has ended before, and was taken up again.
    was_asleep: bool,
    /// Somebody else holds the pin from here on.
    passed_on: bool,
}

impl Hold {
    /// Has the pin watched from now on.
    pub(crate) fn new(
        named: WatchedPin,
        guard: &Guard,
        gate: Gate,
        on_breach: OnBreach,
        memory: Option<Memory>,
    ) -> Result<Self> {
        let hold = Self {
            named,
            guard: guard.clone(),
            gate,
            process: std::process::id(),
            on_breach,
            memory,
            revoked: Arc::default(),
            was_asleep: false,
            passed_on: false,
        };
        hold.register()?;
        Ok(hold)
    }

    /// The number by which the guard knows the pin.
    pub(crate) fn id(&self) -> u64 {
        self.named.pin
    }

    pub(crate) fn named(&self) -> WatchedPin {
        self.named
    }

    pub(crate) fn guard(&self) -> &Guard {
        &self.guard
    }

    pub(crate) fn gate(&self) -> Gate {
        self.gate
    }

    /// This process asked for the pin: it is not a child of the one that did.
    pub(crate) fn is_own(&self) -> bool {
        self.process == std::process::id()
    }

    /// Whether the mapping was taken away.
    #[inline]
    pub(crate) fn is_revoked(&self) -> bool {
        self.revoked.load(Acquire)
    }

    pub(crate) fn state(&self) -> State {
        match self.look(|entry| entry.state.clone()) {
            // What a child's parent heard before the child was made.
            Ok(state) if !state.is_lost() && self.is_revoked() => State::Lost {
                why: String::from("blocks under it have changed, and the mapping was revoked"),
            },
            Ok(state) => state,
            Err(error) => State::Unattended {
                why: format!("this process cannot hear the guard: {error}"),
            },
        }
    }

    pub(crate) fn integrity(&self) -> Integrity {
        self.look(|entry| {
            if entry.count == 0 {
                return Integrity::Intact;
            }
            Integrity::Breached {
                count: entry.count,
                breaches: entry.breaches.clone(),
            }
        })
        .unwrap_or_default()
    }

    /// What became of names of the file.
    pub(crate) fn renames(&self) -> Vec<String> {
        self.look(|entry| entry.renames.clone()).unwrap_or_default()
    }

    /// Has the thread connect again now, if no guard tends the pin, and waits
    /// for what comes of it.
    pub(crate) fn reconnect(&self) -> Result<State> {
        let thread = self.look(|entry| match entry.state {
            State::Unattended { .. } => Some(entry.thread),
            _ => None,
        })?;
        let Some(thread) = thread else {
            return Ok(self.state());
        };
        let watching = watching();
        let shared = watching.lock();
        let usable = shared.threads.get(thread).filter(|one| one.is_usable());
        let Some((orders, begun)) =
            usable.and_then(|one| one.orders.as_ref().map(|orders| (orders, one.begun)))
        else {
            drop(shared);
            // A thread that takes no orders any more tries by itself; a new one
            // has asked when this returns.
            self.register()?;
            return Ok(self.state());
        };
        // If its orders do not fit, it has one to read, and is about to.
        let _ = orders.send_now(&[&RECONNECT], &[]);
        let is_waiting = |shared: &mut Shared| {
            let one = shared.threads.get(thread);
            one.is_some_and(|one| one.done <= begun)
        };
        drop(
            watching
                .tried
                .wait_timeout_while(shared, 2 * ANSWER, is_waiting),
        );
        Ok(self.state())
    }

    pub(crate) fn event_fd(&self) -> Result<EventFd> {
        let failed = |errno| Error::system("eventfd", errno);
        // Until the thread has room for the order.
        for _ in 0..1000 {
            if let Some(made) = self.look(|_| ()).and_then(|()| self.try_event_fd(failed))? {
                return Ok(made);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(failed(Errno::AGAIN))
    }

    fn try_event_fd(&self, failed: fn(Errno) -> Error) -> Result<Option<EventFd>> {
        let watching = watching();
        let mut shared = watching.lock();
        let Shared { pins, threads } = &mut *shared;
        let Some(entry) = pins.get_mut(&self.named.pin) else {
            return Ok(None);
        };
        if let Some(fd) = entry.event.upgrade() {
            return Ok(Some(EventFd { fd }));
        }
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let changed = !entry.state.is_kept() || entry.count > 0;
        let fd = rustix::event::eventfd(u32::from(changed), flags).map_err(failed)?;
        let thread = threads
            .get(entry.thread)
            .filter(|thread| thread.is_usable());
        let Some(orders) = thread.and_then(|thread| thread.orders.as_ref()) else {
            // The program has closed what it is reached by.
            drop(shared);
            self.register()?;
            return Ok(None);
        };
        match orders.send_now(&[&entry.named.pin.to_ne_bytes()], &[fd.as_fd()]) {
            Ok(()) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(errno) => return Err(failed(errno)),
        }
        let fd = Arc::new(fd);
        entry.event = Arc::downgrade(&fd);
        Ok(Some(EventFd { fd }))
    }

    /// Does something to the memory, unless that was revoked; it is not while
    /// this runs.
    pub(crate) fn unless_revoked<T>(&self, run: impl FnOnce() -> T) -> Option<T> {
        let watching = watching();
        let _shared = watching.lock();
        (!self.is_revoked()).then(run)
    }

    /// Forgets the pin. When this returns nothing is done to its memory any
    /// more. What it returns keeps the pin, if the mapping was revoked.
    pub(crate) fn let_go(&mut self) -> Option<Keeper> {
        self.memory = None;
        if self.passed_on {
            return None;
        }
        let entry = watching().lock().pins.remove(&self.named.pin);
        entry.and_then(|entry| entry.keeper)
    }

    /// Forgets the memory, and goes on watching the pin, which may be taken up
    /// again: by what this returns. Nothing if it was not kept.
    pub(crate) fn fall_asleep(&mut self) -> Option<Self> {
        if self.gate != Gate::Bpf || !self.is_own() || self.passed_on {
            return None;
        }
        let mut shared = watching().lock();
        let entry = shared.pins.get_mut(&self.named.pin)?;
        if !entry.state.is_kept() || entry.count > 0 {
            return None;
        }
        (entry.memory, entry.asleep) = (None, true);
        drop(shared);
        self.memory = None;
        self.passed_on = true;
        Some(Self {
            named: self.named,
            guard: self.guard.clone(),
            gate: self.gate,
            process: self.process,
            on_breach: self.on_breach,
            memory: None,
            revoked: Arc::clone(&self.revoked),
            was_asleep: self.was_asleep,
            passed_on: false,
        })
    }

    /// The pin was taken up again: this is its memory. Says no if it is known
    /// by now that the pin cannot be relied on.
    pub(crate) fn wake(&mut self, memory: Memory, on_breach: OnBreach) -> bool {
        let mut shared = watching().lock();
        let Some(entry) = shared.pins.get_mut(&self.named.pin) else {
            return false;
        };
        if !entry.state.is_kept() || entry.count > 0 {
            return false;
        }
        entry.memory = Some(memory);
        entry.on_breach = on_breach;
        entry.asleep = false;
        drop(shared);
        self.memory = Some(memory);
        self.on_breach = on_breach;
        self.was_asleep = true;
        true
    }

    /// Whether the pin has ended before, and was taken up again.
    pub(crate) fn was_asleep(&self) -> bool {
        self.was_asleep
    }

    /// Whether this process has another pin of the same file.
    pub(crate) fn has_neighbours(&self) -> bool {
        let is_neighbour = |entry: &Entry| {
            let (named, own) = (&entry.named, &self.named);
            !entry.asleep
                && named.pin != own.pin
                && (named.device, named.inode) == (own.device, own.inode)
        };
        watching().lock().pins.values().any(is_neighbour)
    }

    /// Reads what is known of the pin in this process.
    fn look<T>(&self, read: impl Fn(&Entry) -> T) -> Result<T> {
        // A thread that takes no orders any more watches all the same.
        let known = || watching().lock().pins.get(&self.named.pin).map(&read);
        if let Some(known) = known() {
            return Ok(known);
        }
        self.register()?;
        known().ok_or_else(|| {
            Error::new(
                Kind::System,
                Errno::SRCH,
                "the thread that hears of pins has ended",
                "",
            )
        })
    }

    /// Has the thread for this guard watch the pin; it is started if there is
    /// none, and has asked about the pin then when this returns.
    fn register(&self) -> Result<()> {
        let watching = watching();
        if self.register_with_one_that_runs(watching) {
            return Ok(());
        }
        let _turn = lock(&watching.starting);
        if self.register_with_one_that_runs(watching) {
            return Ok(());
        }
        let number = {
            let mut shared = watching.lock();
            let number = shared.threads.len();
            self.enter(&mut shared, number);
            number
        };
        match Thread::start(watching, number, &self.guard) {
            Ok(thread) => {
                watching.lock().threads.push(thread);
                Ok(())
            }
            Err((call, errno)) => {
                watching.lock().pins.remove(&self.named.pin);
                Err(not_heard(call, errno))
            }
        }
    }

    fn register_with_one_that_runs(&self, watching: &Watching) -> bool {
        let mut shared = watching.lock();
        let found = shared
            .threads
            .iter()
            .position(|thread| thread.guard == self.guard && thread.is_usable());
        let Some(number) = found else {
            return false;
        };
        self.enter(&mut shared, number);
        let thread = &mut shared.threads[number];
        // While there are others that it does not know of, it has an order to
        // look for them.
        let is_ordered = !thread.new.is_empty();
        thread.new.push(self.named);
        if !is_ordered && let Some(orders) = &thread.orders {
            // If its orders do not fit there is one it has not read.
            let _ = orders.send_now(&[&NEW_PINS], &[]);
        }
        true
    }

    fn enter(&self, shared: &mut Shared, thread: usize) {
        let fresh = Entry {
            named: self.named,
            gate: self.gate,
            on_breach: self.on_breach,
            memory: self.memory,
            revoked: Arc::clone(&self.revoked),
            keeper: None,
            thread,
            state: State::Kept,
            count: 0,
            breaches: Vec::new(),
            renames: Vec::new(),
            event: Weak::new(),
            asleep: false,
        };
        let entry = shared.pins.entry(self.named.pin).or_insert(fresh);
        if entry.thread != thread {
            // This one has to be given what the other one has.
            entry.thread = thread;
            entry.event = Weak::new();
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // The memory may be anybody's from now on.
        drop(self.let_go());
    }
}

fn not_heard(call: &str, errno: Errno) -> Error {
    let shown = match errno {
        Errno::NOMEM | Errno::MFILE | Errno::NFILE | Errno::AGAIN => Errno::NOMEM,
        _ => Errno::OPNOTSUPP,
    };
    Error::new(
        Kind::Limit,
        shown,
        format!("the thread that hears what becomes of pins cannot be started: {call}: {errno}"),
        "raise the limits on threads and descriptors (ulimit -u, ulimit -n)",
    )
}
