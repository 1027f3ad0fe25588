//! Hears what becomes of the pins of this process.
//!
//! A thread for each guard listens on a connection of its own, started with the
//! first pin. It has a table of descriptors of its own, so that a program that
//! closes descriptors it does not know (`closefrom`) does not deafen it, and it
//! takes no signals. It cannot be the thread that hears where frozen memory
//! goes: taking a mapping away waits for that one.
//!
//! When the connection ends the thread connects again, names the pins of this
//! process, and hears what the guard makes of them: one that was granted by an
//! earlier guard and taken over is kept; one that is not known is lost.
//!
//! A child of fork(2) has its mappings, but no thread and none of what is known
//! here, since somebody may have been changing it when the child was made. It
//! begins anew with the first pin it asks about: from then on it is told, and
//! its mapping revoked, like its parent's.

use crate::error::{Error, Kind, Result};
use crate::guard::Guard;
use crate::revoke::{self, Keeper, Memory};
use crate::state::{EventFd, Integrity, OnBreach, State};
use mapdirect_proto::message::MAX_WATCHED;
use mapdirect_proto::{Breach, Gate, MAX_MESSAGE, Notice, Reply, Request, VERSION, WatchedPin};
use mapdirect_sys::unix::Socket;
use mapdirect_sys::{Errno, descriptors, signal};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::Ordering::{AcqRel, Acquire, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicPtr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Breaches kept with each pin: the first ones.
const KEPT: usize = 16;
/// Pins named in one request, so that the answers fit into the socket.
const AT_ONCE: usize = 64;
/// How long a guard may take to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// How often to look for a guard when it has just gone, and how many times.
const SOON: Duration = Duration::from_millis(20);
const SOON_TIMES: u32 = 10;
/// How often afterwards.
const LATER: Duration = Duration::from_millis(200);
/// How long something may be missing in the gate's directory: a guard that is
/// just starting may put it back.
const MISSING: Duration = Duration::from_secs(1);

const _: () = assert!(AT_ONCE <= MAX_WATCHED);

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
        thread.new.push(self.named);
        if let Some(orders) = &thread.orders {
            // If its orders do not fit there is one it has not read.
            let _ = orders.send_now(&[&[0]], &[]);
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

/// What is known in this process.
#[derive(Debug)]
struct Watching {
    process: u32,
    shared: Mutex<Shared>,
    /// Whoever starts a thread.
    starting: Mutex<()>,
}

#[derive(Debug, Default)]
struct Shared {
    pins: HashMap<u64, Entry>,
    /// Those that have been started, by number.
    threads: Vec<Thread>,
}

/// A pin that is watched.
#[derive(Debug)]
struct Entry {
    named: WatchedPin,
    gate: Gate,
    on_breach: OnBreach,
    memory: Option<Memory>,
    revoked: Arc<AtomicBool>,
    keeper: Option<Keeper>,
    /// Number of the thread that watches it.
    thread: usize,
    state: State,
    count: u64,
    breaches: Vec<Breach>,
    event: Weak<OwnedFd>,
    /// The pin is over, and may be taken up again.
    asleep: bool,
}

impl Entry {
    /// Says whether that is news. What is lost stays so.
    fn become_(&mut self, state: State) -> bool {
        if self.state.is_lost() || self.state == state {
            return false;
        }
        self.state = state;
        true
    }

    /// Says whether it was not known before.
    fn breached(&mut self, breach: Breach) -> bool {
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
    fn lock(&self) -> MutexGuard<'_, Shared> {
        lock(&self.shared)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// That of this process: a child of fork(2) has its own, since whoever held a
/// lock when it was made is not there to let go.
fn watching() -> &'static Watching {
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
#[derive(Debug)]
struct Thread {
    guard: Guard,
    orders: Option<Socket>,
    /// Inode of the socket: a program that closes descriptors it does not know
    /// may have another one under that number by now.
    identity: (u64, u64),
    /// Pins that it does not know of yet.
    new: Vec<WatchedPin>,
}

fn identity(fd: BorrowedFd<'_>) -> Option<(u64, u64)> {
    rustix::fs::fstat(fd)
        .ok()
        .map(|stat| (stat.st_dev, stat.st_ino))
}

impl Thread {
    fn start(
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
            }),
            Ok(_) => Err(("receive", Errno::SRCH)),
            Err(errno) => Err(("receive", errno)),
        }
    }

    fn is_usable(&self) -> bool {
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

/// Why nothing is heard.
enum Silence {
    /// Nobody listens.
    NoGuard(String),
    /// Somebody does, and does not answer.
    Busy(String),
}

/// A connection that notices come by.
struct Link {
    socket: Socket,
}

impl Link {
    fn open(path: &std::path::Path) -> std::result::Result<Self, Silence> {
        let path_name = path.display();
        let socket = Socket::connect(path).map_err(|errno| {
            Silence::NoGuard(format!("no guard answers at {path_name}: {errno}"))
        })?;
        let gone = |errno: Errno| {
            Silence::Busy(format!("the guard at {path_name} does not answer: {errno}"))
        };
        socket.set_receive_timeout(Some(ANSWER)).map_err(gone)?;
        socket.set_send_timeout(ANSWER).map_err(gone)?;
        let hello = Request::Hello { version: VERSION };
        socket.send(&[&hello.encode()], &[]).map_err(gone)?;
        match hear(&socket).map_err(gone)? {
            (Some(Reply::Welcome { .. }), _) => Ok(Self { socket }),
            (Some(Reply::Refused(refusal)), _) => Err(Silence::Busy(refusal.obstacle)),
            _ => Err(gone(Errno::PROTO)),
        }
    }

    fn name(&self, pins: &[WatchedPin]) -> std::result::Result<(), Errno> {
        let request = Request::Watch(pins.to_vec());
        self.socket.send(&[&request.encode()], &[])
    }
}

/// The next thing that is said, or nothing if it is not understood.
fn hear(socket: &Socket) -> std::result::Result<(Option<Reply>, Option<OwnedFd>), Errno> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let mut received = socket.receive(&mut buffer)?;
    if received.length == 0 {
        return Err(Errno::PIPE);
    }
    let reply = Reply::decode(&buffer[..received.length]).ok();
    Ok((reply.filter(|_| !received.truncated), received.fds.pop()))
}

/// Where the gate is in the kernel, and what belongs to it.
struct Directory {
    fd: OwnedFd,
    identity: (u64, u64),
    changed: (i64, u64),
    /// What was in it when a guard was there, if this process may know.
    names: Option<BTreeSet<CString>>,
    missing_since: Option<Instant>,
}

impl Directory {
    fn new(fd: OwnedFd) -> Option<Self> {
        let identity = identity(fd.as_fd())?;
        let changed = changed(fd.as_fd())?;
        let names = names(fd.as_fd());
        Some(Self {
            fd,
            identity,
            changed,
            names,
            missing_since: None,
        })
    }

    fn is_there(&self) -> bool {
        rustix::fs::fstat(&self.fd).is_ok_and(|stat| stat.st_nlink > 0)
    }

    /// Why the gate in it does not keep pins any more, if that can be seen.
    fn fault(&mut self) -> Option<String> {
        if !self.is_there() {
            return Some(String::from("the gate was taken out of the kernel"));
        }
        let before = self.names.as_ref()?;
        if changed(self.fd.as_fd()) == Some(self.changed) {
            return None;
        }
        let now = names(self.fd.as_fd())?;
        let Some(name) = before.difference(&now).next() else {
            self.missing_since = None;
            return None;
        };
        let since = *self.missing_since.get_or_insert_with(Instant::now);
        (since.elapsed() >= MISSING).then(|| {
            format!(
                "a part of the gate was taken out of the kernel: {}",
                name.to_string_lossy()
            )
        })
    }
}

fn changed(directory: BorrowedFd<'_>) -> Option<(i64, u64)> {
    let stat = rustix::fs::fstat(directory).ok()?;
    Some((stat.st_mtime, stat.st_mtime_nsec))
}

fn names(directory: BorrowedFd<'_>) -> Option<BTreeSet<CString>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = rustix::fs::openat(directory, ".", flags, Mode::empty()).ok()?;
    let entries = rustix::fs::Dir::new(open).ok()?;
    entries
        .map(|entry| entry.map(|entry| entry.file_name().to_owned()).ok())
        .collect()
}

/// The thread.
struct Listener {
    watching: &'static Watching,
    number: usize,
    path: PathBuf,
    orders: Socket,
    /// The program has not closed its end.
    has_orders: bool,
    link: Option<Link>,
    /// The guard's process (`pidfd_open(2)`), where the kernel tells it.
    guard: Option<OwnedFd>,
    directory: Option<Directory>,
    /// Readable for the program when something changes.
    events: HashMap<u64, OwnedFd>,
    /// How often no guard was found since there was one.
    tries: u32,
}

fn serve(watching: &'static Watching, number: usize, path: PathBuf, orders: Socket) {
    // Without a table of its own, in a sandbox that allows none, the thread can
    // be deafened by a program that closes its descriptors, and then connects
    // again.
    // SAFETY: the thread uses the socket and what it opens or receives from
    // here on, all of which it keeps to itself.
    let _ = unsafe { descriptors::unshare(orders.as_fd()) };
    let mut listener = Listener {
        watching,
        number,
        path,
        orders,
        has_orders: true,
        link: None,
        guard: None,
        directory: None,
        events: HashMap::new(),
        tries: 0,
    };
    listener.connect_or_tell();
    // Whoever asked may be gone.
    let _ = listener.orders.send(&[&[0]], &[]);
    loop {
        listener.step();
    }
}

impl Listener {
    fn step(&mut self) {
        let timeout = match (&self.link, self.has_live_pins()) {
            (Some(_), _) | (None, false) => None,
            _ if self.tries < SOON_TIMES => Some(SOON),
            _ => Some(LATER),
        };
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let (ordered, told) = {
            let mut fds = Vec::with_capacity(2);
            if self.has_orders {
                fds.push(PollFd::new(&self.orders, PollFlags::IN));
            }
            if let Some(link) = &self.link {
                fds.push(PollFd::new(&link.socket, PollFlags::IN));
            }
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                // No memory for a moment.
                Err(_) => std::thread::sleep(SOON),
            }
            let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
            let ordered = self.has_orders && fds.first().is_some_and(is_ready);
            let told = self.link.is_some() && fds.last().is_some_and(is_ready);
            (ordered, told)
        };
        if ordered {
            self.take_order();
        }
        if told {
            self.listen();
        }
        if self.link.is_none() && self.has_live_pins() {
            self.connect_or_tell();
        }
    }

    fn has_live_pins(&self) -> bool {
        let shared = self.watching.lock();
        let mut own = shared
            .pins
            .values()
            .filter(|entry| entry.thread == self.number);
        own.any(|entry| !entry.state.is_lost() && !entry.asleep)
    }

    /// Something to be told to the program by, or a word that there are new
    /// pins.
    fn take_order(&mut self) {
        let mut order = [0; 8];
        match self.orders.receive(&mut order) {
            Ok(mut received) if received.length > 0 => {
                if received.length == 8
                    && let Some(event) = received.fds.pop()
                {
                    self.keep_event(u64::from_ne_bytes(order), event);
                }
            }
            _ => self.has_orders = false,
        }
        let mut new = {
            let mut shared = self.watching.lock();
            let thread = shared.threads.get_mut(self.number);
            thread
                .map(|thread| std::mem::take(&mut thread.new))
                .unwrap_or_default()
        };
        // What was let go of at once need not be asked about.
        new.retain(|pin| self.watching.lock().pins.contains_key(&pin.pin));
        let Some(link) = &self.link else {
            // It names them all when there is one.
            return;
        };
        let named = new.chunks(AT_ONCE).try_for_each(|pins| link.name(pins));
        if named.is_err() {
            self.link = None;
        }
    }

    fn keep_event(&mut self, pin: u64, event: OwnedFd) {
        let shared = self.watching.lock();
        self.events.retain(|pin, _| shared.pins.contains_key(pin));
        // It may have changed while this was on its way.
        let entry = shared.pins.get(&pin);
        if entry.is_some_and(|entry| !entry.state.is_kept()) {
            signal_event(&event);
        }
        drop(shared);
        self.events.insert(pin, event);
    }

    /// Hears one thing that the guard says.
    fn listen(&mut self) {
        let Some(link) = &self.link else {
            return;
        };
        match hear(&link.socket) {
            Ok((Some(Reply::Notice(notice)), _)) => self.take(notice),
            Ok((Some(Reply::Watching), Some(fd))) => self.keep_directory(fd),
            Ok((Some(_), _)) => {}
            Ok((None, _)) | Err(_) => self.link = None,
        }
    }

    fn keep_directory(&mut self, fd: OwnedFd) {
        let known = self
            .directory
            .as_ref()
            .map(|known| (known.identity, known.changed));
        let now = identity(fd.as_fd()).zip(changed(fd.as_fd()));
        if known.is_none() || known != now {
            self.directory = Directory::new(fd);
        }
    }

    fn take(&mut self, notice: Notice) {
        let pin = notice.pin();
        let is_news = {
            let mut shared = self.watching.lock();
            match shared.pins.get_mut(&pin) {
                Some(entry) if entry.thread == self.number => match notice {
                    Notice::Breach(breach) => entry.breached(breach),
                    Notice::Unattended { why, .. } => entry.become_(State::Unattended { why }),
                    Notice::Lost { why, .. } => entry.become_(State::Lost { why }),
                    _ => false,
                },
                _ => false,
            }
        };
        if is_news {
            self.signal(pin);
        }
    }

    fn signal(&self, pin: u64) {
        if let Some(event) = self.events.get(&pin) {
            signal_event(event);
        }
    }

    /// Brings the pins of one gate into a state.
    fn bring(&self, wanted: impl Fn(&Entry) -> Option<State>) {
        let mut changed = Vec::new();
        let mut shared = self.watching.lock();
        for (pin, entry) in &mut shared.pins {
            if entry.thread == self.number
                && let Some(state) = wanted(entry)
                && entry.become_(state)
            {
                changed.push(*pin);
            }
        }
        drop(shared);
        changed.iter().for_each(|pin| self.signal(*pin));
    }

    fn connect_or_tell(&mut self) {
        match self.connect() {
            Ok(()) => self.tries = 0,
            Err(silence) => {
                self.link = None;
                self.tries = self.tries.saturating_add(1);
                self.tell_without_guard(&silence);
            }
        }
    }

    /// What becomes of pins while no guard answers.
    fn tell_without_guard(&mut self, silence: &Silence) {
        let (Silence::NoGuard(why) | Silence::Busy(why)) = silence;
        let is_gone = match &self.guard {
            Some(guard) => has_ended(guard),
            None => matches!(silence, Silence::NoGuard(_)),
        };
        let fault = self.directory.as_mut().and_then(Directory::fault);
        self.bring(|entry| {
            let unattended = || State::Unattended {
                why: format!("{why}; the kernel goes on refusing"),
            };
            Some(match (entry.gate, &fault) {
                (Gate::Bpf, Some(fault)) => State::Lost { why: fault.clone() },
                (Gate::Bpf, None) => unattended(),
                _ if is_gone => State::Lost {
                    why: String::from("the guard is gone, and nobody refuses any more"),
                },
                _ => State::Unattended { why: why.clone() },
            })
        });
    }

    /// Connects, names all pins, and hears what the guard makes of them.
    fn connect(&mut self) -> std::result::Result<(), Silence> {
        let link = Link::open(&self.path)?;
        let pins: Vec<WatchedPin> = {
            let mut shared = self.watching.lock();
            if let Some(thread) = shared.threads.get_mut(self.number) {
                thread.new.clear();
            }
            let own = shared
                .pins
                .values()
                .filter(|entry| entry.thread == self.number && !entry.state.is_lost());
            own.map(|entry| entry.named).collect()
        };
        let failed = |errno: Errno| Silence::Busy(format!("the guard does not answer: {errno}"));
        let mut notices = Vec::new();
        let mut directory = None;
        for some in pins.chunks(AT_ONCE) {
            link.name(some).map_err(failed)?;
            loop {
                match hear(&link.socket).map_err(failed)? {
                    (Some(Reply::Notice(notice)), _) => notices.push(notice),
                    (Some(Reply::Watching), fd) => {
                        directory = fd;
                        break;
                    }
                    (Some(Reply::Refused(refusal)), _) => {
                        return Err(Silence::Busy(refusal.obstacle));
                    }
                    _ => return Err(failed(Errno::PROTO)),
                }
            }
        }
        link.socket.set_receive_timeout(None).map_err(failed)?;
        let found = directory.as_ref().map(AsFd::as_fd).and_then(identity);
        // A guard with another gate, or none in the kernel, knows nothing of
        // pins that the kernel keeps.
        let is_other_gate = self
            .directory
            .as_ref()
            .is_some_and(|known| Some(known.identity) != found && known.is_there());
        let answered: HashSet<u64> = pins.iter().map(|pin| pin.pin).collect();
        let refused: HashSet<u64> = notices.iter().map(Notice::pin).collect();
        if is_other_gate {
            let no_verdict = |entry: &Entry| entry.gate == Gate::Bpf;
            notices.retain(|notice| {
                let shared = self.watching.lock();
                !shared.pins.get(&notice.pin()).is_some_and(no_verdict)
            });
            notices.into_iter().for_each(|notice| self.take(notice));
            return Err(Silence::Busy(format!(
                "the guard at {} keeps another gate",
                self.path.display()
            )));
        }
        if let Some(directory) = directory {
            self.keep_directory(directory);
        }
        self.guard = link.socket.peer_pidfd().ok();
        self.link = Some(link);
        self.bring(|entry| {
            let pin = &entry.named.pin;
            (answered.contains(pin) && !refused.contains(pin)).then_some(State::Kept)
        });
        notices.into_iter().for_each(|notice| self.take(notice));
        Ok(())
    }
}

/// Whether a guard's process has ended. It closes its connections a moment
/// before.
fn has_ended(guard: &OwnedFd) -> bool {
    let patience = Timespec {
        tv_sec: 0,
        tv_nsec: 100_000_000,
    };
    let mut fds = [PollFd::new(guard, PollFlags::IN)];
    poll(&mut fds, Some(&patience)) != Ok(0)
}

fn signal_event(event: &OwnedFd) {
    // It fails only when the counter is full: then it is readable.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

#[cfg(test)]
mod tests;
