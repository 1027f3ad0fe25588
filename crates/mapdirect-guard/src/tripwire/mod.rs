//! The tripwire: notices what no gate can refuse.
//!
//! Some ways to change a block map ask nobody: a storage target that discards,
//! an ioctl of the holder, root who takes the gate away. But every change
//! passes a tracepoint of the filesystem. Perf events listen there, with
//! filters inside the kernel. (Programs like those of the bpf gate would be
//! left out now and then.) Each event, and each possible loss of events, is a
//! reason to read the block map again and to compare it with what was pinned.
//! Only a difference is a breach, so an event too many does no harm. A file
//! that cannot be opened any more because its filesystem was shut down is lost.
//!
//! [`points`] knows the tracepoints and [`filter`] the files; [`wires`] has the
//! perf events and their rings. One thread ([`run`]) reads the rings and
//! decides which files to look at; other threads ([`look`]) do that. A file is
//! looked at as soon as an event names it. An event may come a moment before
//! the change, so the file is looked at a few more times after that.

mod compare;
mod filter;
mod format;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz;
mod look;
mod points;
mod tracefs;
mod wires;

use crate::table::{InodeId, Watched};
use crate::wake::Waker;
use crate::{Errno, Guard};
use crossbeam_queue::SegQueue;
pub(crate) use look::look_now;
use look::{Blocks, Hit, Order, Outcome};
use mapdirect_model::facts::Filesystem;
use mapdirect_sys::{file_handle, proc};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use wires::{CannotArm, Listened, Who, Wires};

/// How often to read rings that wake nobody.
const ROUND: Duration = Duration::from_millis(20);
/// The least pause between two looks at the same file. The pause is also at
/// least `REST` times as long as a look takes, so that a file in a million
/// pieces does not keep a processor busy.
const PAUSE: Duration = Duration::from_millis(10);
const REST: u32 = 3;
/// The same while files grow under pins of strength stable, which may go on for
/// hours; but a change is always noticed in time.
const REST_WHILE_GROWING: u32 = 9;
const LONGEST_REST: Duration = Duration::from_millis(60);
/// When to look again after the first look, because an event may come a moment
/// before the change.
const AGAIN: [Duration; 3] = [
    Duration::from_millis(40),
    Duration::from_millis(400),
    Duration::from_secs(4),
];
/// How long a file counts as growing, and how often the rings are read at most
/// while one does: each event wakes the thread.
const WHILE_GROWING: Duration = Duration::from_secs(1);
const PACE: Duration = Duration::from_millis(5);
/// The blocks of events are forgotten once they are between once and twice as
/// old as this and were looked at. A file that grows for hours is not looked at
/// from the start again and again.
const FORGET: Duration = Duration::from_secs(5);
/// When to try again what could not be decided: the pause doubles each time.
const RETRY: Duration = Duration::from_millis(20);
const LONGEST_RETRY: Duration = Duration::from_secs(1);
/// How often to look for new processors.
const HOUSEKEEPING: Duration = Duration::from_millis(500);
/// How often to look for files that are not pinned any more.
const TIDYING: Duration = Duration::from_secs(5);
/// The number of hits remembered for a file, to say who changed it.
const HITS: usize = 8;
/// The most threads that take looks, including those that wait.
const LOOKERS: usize = 256;

/// The tripwire of a guard.
#[derive(Debug)]
pub(crate) struct Tripwire {
    /// Made when they are first needed: an earlier guard that the kernel still
    /// takes apart is in the way, and everybody at the gate would wait.
    wires: OnceLock<Option<Mutex<Wires>>>,
    /// Why there is no tripwire, or none for some filesystems.
    missing: Mutex<Option<String>>,
    waker: Waker,
    looks: Looks,
    /// All files must be looked at.
    all: AtomicBool,
}

/// Keeps the tripwire listening to a file as long as this value lives.
#[derive(Debug)]
pub(crate) struct Armed {
    _listened: Option<Arc<Listened>>,
}

impl Tripwire {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self {
            wires: OnceLock::new(),
            missing: Mutex::default(),
            waker: Waker::new()?,
            looks: Looks::default(),
            all: AtomicBool::new(false),
        })
    }

    fn wires(&self) -> Option<&Mutex<Wires>> {
        let make = || {
            let wires = Wires::new();
            *lock(&self.missing) = match &wires {
                Ok(_) => probe_tracepoints().err(),
                Err(error) => Some(error.to_string()),
            };
            wires.ok().map(Mutex::new)
        };
        self.wires.get_or_init(make).as_ref()
    }

    /// Listens to a file from now on. Earlier changes show in a block map that
    /// is read afterwards. If this kernel offers no tripwire, nothing happens,
    /// and [`missing`](Self::missing) says so.
    ///
    /// # Errors
    ///
    /// There is a tripwire, but it cannot be armed for this file.
    pub(crate) fn arm(
        &self,
        id: InodeId,
        filesystem: &Filesystem,
        file: BorrowedFd<'_>,
    ) -> Result<Armed, Errno> {
        let Some(wires) = self.wires() else {
            return Ok(Armed { _listened: None });
        };
        let listened = Listened::new(id, file_handle::of(file)?);
        let (listened, begins) = {
            let mut wires = lock(wires);
            let begins = wires.is_idle();
            (wires.listen(filesystem, listened), begins)
        };
        if begins {
            // The thread was asleep.
            self.waker.wake();
        }
        match listened {
            Ok(listened) => Ok(Armed {
                _listened: Some(listened),
            }),
            Err(CannotArm::System(errno)) => Err(errno),
            Err(missing @ CannotArm::Missing(_)) => {
                *lock(&self.missing) = Some(missing.to_string());
                Ok(Armed { _listened: None })
            }
        }
    }

    /// Whether the number of this inode is still this file's, as far as is known:
    /// another file that has it now is listened to before anything of it is
    /// pinned.
    fn is_current(&self, file: &Arc<Listened>) -> bool {
        self.wires()
            .and_then(|wires| lock(wires).listened(file.id))
            .is_none_or(|now| Arc::ptr_eq(&now, file))
    }

    /// Why changes that the gate does not refuse go unnoticed, if they do.
    pub(crate) fn missing(&self) -> Option<String> {
        let _ = self.wires();
        lock(&self.missing).clone()
    }

    /// Makes the tripwire read and compare the block maps of all pins soon,
    /// because the gate was open for a moment and is closed again.
    pub(crate) fn look_everywhere(&self) {
        self.all.store(true, SeqCst);
        self.waker.wake();
    }

    /// Makes the thread notice that the guard stops.
    pub(crate) fn wake(&self) {
        self.waker.wake();
    }
}

/// Checks whether the kernel offers what a tripwire needs, and says why not.
pub(crate) fn probe() -> Result<(), String> {
    Wires::new().map_err(|error| error.to_string())?;
    probe_tracepoints()
}

/// Checks whether the tracepoints exist, for filesystems whose modules are
/// loaded.
fn probe_tracepoints() -> Result<(), String> {
    let events = tracefs::events()
        .map_err(|errno| format!("tracepoints cannot be read (tracefs): {errno}"))?;
    for (name, filesystem) in [("xfs", Filesystem::Xfs), ("ext4", Filesystem::Ext4)] {
        let here = rustix::fs::statat(&events, name, rustix::fs::AtFlags::empty());
        if here.is_ok() {
            points::Tracepoints::find(&filesystem).map_err(|missing| missing.to_string())?;
        }
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is known of a file that an event named.
struct Case {
    watched: Arc<Watched>,
    file: Arc<Listened>,
    blocks: Blocks,
    /// The blocks of events that are older, but not yet too old: one may come
    /// before its change.
    older: Blocks,
    /// When the events began that are not older.
    since: Instant,
    /// When a look last found that more is stable.
    grew: Option<Instant>,
    hits: Vec<Hit>,
    /// The file's filesystem may have been shut down.
    may_be_dead: bool,
    /// When to look.
    due: Option<Instant>,
    /// A look is under way.
    looking: bool,
    /// The earliest time for the next look.
    rests_until: Instant,
    /// How many looks since the last event had a decided result.
    looks: usize,
    retry: Duration,
}

impl Case {
    fn new(watched: Arc<Watched>, file: Arc<Listened>) -> Self {
        Self {
            watched,
            file,
            blocks: Blocks::default(),
            older: Blocks::default(),
            since: Instant::now(),
            grew: None,
            hits: Vec::new(),
            may_be_dead: false,
            due: None,
            looking: false,
            rests_until: Instant::now(),
            looks: 0,
            retry: RETRY,
        }
    }

    /// Whether the case is about this file: the inode number may be another
    /// file's by now.
    fn is_of(&self, watched: &Arc<Watched>, file: &Arc<Listened>) -> bool {
        Arc::ptr_eq(&self.watched, watched) && Arc::ptr_eq(&self.file, file)
    }

    fn heard(&mut self, blocks: Option<(u64, u64)>, hit: Option<(Who, &'static str)>) {
        self.blocks.add(blocks);
        if let Some((who, at)) = hit {
            let known = self
                .hits
                .iter()
                .any(|hit| hit.who.tid == who.tid && hit.blocks == blocks && !hit.seen);
            if !known {
                if self.hits.len() == HITS {
                    // The first hit since everything was in order is kept.
                    let seen = self.hits.iter().position(|hit| hit.seen);
                    self.hits.remove(seen.unwrap_or(HITS - 1));
                }
                self.hits.push(Hit {
                    who,
                    command: String::new(),
                    blocks,
                    at,
                    seen: false,
                });
            }
        }
        self.looks = 0;
        self.due = Some(self.rests_until.max(Instant::now()));
    }

    /// Handles an event of the filesystem: anything may have become of the
    /// file.
    fn heard_of_filesystem(&mut self) {
        self.may_be_dead = true;
        self.heard(None, None);
    }

    /// Asks for the names of the threads in the hits, before these are gone.
    fn ask_for_names(&mut self) {
        for hit in &mut self.hits {
            if hit.command.is_empty() {
                hit.command = proc::command(hit.who.tid);
            }
        }
    }

    /// Whether the file grows under a pin of strength stable, and so raises
    /// events without end.
    fn is_growing(&self) -> bool {
        self.grew.is_some_and(|grew| grew.elapsed() < WHILE_GROWING)
    }

    fn is_due(&self, now: Instant) -> bool {
        !self.looking && self.due.is_some_and(|due| due <= now)
    }

    fn looked(&mut self, looked: &Looked) {
        let now = Instant::now();
        self.looking = false;
        let rest = PAUSE.max(looked.took * REST);
        self.rests_until = now
            + match looked.outcome {
                Outcome::Grown => rest.max((looked.took * REST_WHILE_GROWING).min(LONGEST_REST)),
                _ => rest,
            };
        if looked.outcome == Outcome::Grown {
            self.grew = Some(now);
        }
        match looked.outcome {
            Outcome::Done | Outcome::Grown => {
                self.retry = RETRY;
                if self.since.elapsed() > FORGET {
                    self.older = std::mem::take(&mut self.blocks);
                    self.since = now;
                }
                for hit in self
                    .hits
                    .iter_mut()
                    .filter(|hit| hit.who.time <= looked.newest)
                {
                    hit.seen = true;
                }
                if self.due.is_none() {
                    self.due = AGAIN.get(self.looks).map(|pause| now + *pause);
                    self.looks += 1;
                }
            }
            Outcome::Undecided | Outcome::Failed => {
                let due = now + self.retry;
                self.retry = (2 * self.retry).min(LONGEST_RETRY);
                self.due = Some(self.due.map_or(due, |other| other.min(due)));
            }
        }
        self.due = self.due.map(|due| due.max(self.rests_until));
    }
}

/// The result of a look.
#[derive(Debug)]
struct Looked {
    id: InodeId,
    outcome: Outcome,
    took: Duration,
    /// The time of the newest hit that the look knew of.
    newest: u64,
}

/// Looks to take, and looks that were taken.
#[derive(Debug, Default)]
struct Looks {
    wanted: Mutex<Wanted>,
    bell: Condvar,
    taken: SegQueue<Looked>,
}

#[derive(Debug, Default)]
struct Wanted {
    orders: VecDeque<Order>,
    /// The number of threads, and the number of threads that wait for an order.
    threads: usize,
    idle: usize,
    /// When each look under way began.
    begun: Vec<(InodeId, Instant)>,
}

impl Wanted {
    /// Whether more threads would help, because too few are not held up.
    fn is_short(&self) -> bool {
        /// As many threads look at a time when none of them has to wait.
        const ENOUGH: usize = 4;
        /// A look that takes longer than this waits for something.
        const LONG: Duration = Duration::from_millis(20);
        let waiting = self
            .begun
            .iter()
            .filter(|(_, begun)| begun.elapsed() > LONG);
        self.orders.len() > self.idle
            && self.threads < LOOKERS
            && self.threads < ENOUGH + waiting.count()
    }
}

/// Starts a thread of the guard that runs this function, and says whether it
/// started.
pub(crate) type Spawn = dyn Fn(fn(&Guard)) -> bool;

impl Looks {
    /// Orders a look.
    fn order(&self, order: Order) {
        lock(&self.wanted).orders.push_back(order);
        self.bell.notify_one();
    }

    /// Makes sure that there are enough threads for all orders, and says
    /// whether orders are left.
    fn staff(&self, spawn: &Spawn) -> bool {
        let mut wanted = lock(&self.wanted);
        while wanted.is_short() {
            wanted.threads += 1;
            drop(wanted);
            let started = spawn(take_looks);
            wanted = lock(&self.wanted);
            if !started {
                // A thread that finishes another look will take the order.
                wanted.threads -= 1;
                break;
            }
        }
        !wanted.orders.is_empty()
    }

    /// The next look to take, or `None` if there is none for a while.
    fn next(&self) -> Option<Order> {
        /// How long a thread without work stays.
        const IDLE: Duration = Duration::from_secs(10);
        let mut wanted = lock(&self.wanted);
        loop {
            if let Some(order) = wanted.orders.pop_front() {
                wanted.begun.push((order.file.id, Instant::now()));
                return Some(order);
            }
            wanted.idle += 1;
            let (woken, timeout) = self
                .bell
                .wait_timeout(wanted, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            wanted = woken;
            wanted.idle -= 1;
            if timeout.timed_out() && wanted.orders.is_empty() {
                wanted.threads -= 1;
                return None;
            }
        }
    }

    fn taken(&self, looked: Looked) {
        let mut wanted = lock(&self.wanted);
        if let Some(at) = wanted.begun.iter().position(|(id, _)| *id == looked.id) {
            wanted.begun.swap_remove(at);
        }
        drop(wanted);
        self.taken.push(looked);
    }
}

/// Runs a thread that takes looks.
fn take_looks(guard: &Guard) {
    let looks = &guard.tripwire.looks;
    while let Some(order) = looks.next() {
        let begun = Instant::now();
        let outcome = look::look(guard, &order);
        looks.taken(Looked {
            id: order.file.id,
            outcome,
            took: begun.elapsed(),
            newest: order.hits.iter().map(|hit| hit.who.time).max().unwrap_or(0),
        });
        guard.tripwire.waker.wake();
    }
}

/// Reads the rings until the guard stops.
///
/// # Errors
///
/// When the rings cannot be read any more.
pub(crate) fn run(guard: &Guard, spawn: &Spawn) -> Result<(), Errno> {
    let tripwire = &guard.tripwire;
    let Some(wires) = tripwire.wires() else {
        return Ok(());
    };
    let mut cases: HashMap<InodeId, Case> = HashMap::new();
    let (mut kept_house, mut tidied) = (Instant::now(), Instant::now());
    let mut is_behind = false;
    while !guard.is_stopping() {
        wait(tripwire, wires, &cases, is_behind)?;
        if cases.values().any(Case::is_growing) {
            std::thread::sleep(PACE);
        }
        tripwire.waker.clear();
        while let Some(looked) = tripwire.looks.taken.pop() {
            if let Some(case) = cases.get_mut(&looked.id) {
                case.looked(&looked);
            }
        }
        listen(guard, wires, &mut cases);
        if tripwire.all.swap(false, SeqCst) {
            look_at_all(guard, wires, &mut cases);
        }
        let now = Instant::now();
        for case in cases.values_mut().filter(|case| case.is_due(now)) {
            (case.due, case.looking) = (None, true);
            tripwire.looks.order(Order {
                watched: Arc::clone(&case.watched),
                file: Arc::clone(&case.file),
                blocks: case.blocks.and(&case.older),
                hits: case.hits.clone(),
                may_be_dead: case.may_be_dead,
            });
        }
        is_behind = tripwire.looks.staff(spawn);
        cases.retain(|_, case| case.looking || case.due.is_some());
        if now.duration_since(kept_house) >= HOUSEKEEPING {
            kept_house = now;
            if lock(wires).look_at_processors()? {
                look_at_all(guard, wires, &mut cases);
            }
        }
        if now.duration_since(tidied) >= TIDYING {
            tidied = now;
            tidy(guard, wires);
        }
    }
    Ok(())
}

/// Waits until there is something to do.
fn wait(
    tripwire: &Tripwire,
    wires: &Mutex<Wires>,
    cases: &HashMap<InodeId, Case>,
    is_behind: bool,
) -> Result<(), Errno> {
    let now = Instant::now();
    let due = cases
        .values()
        .filter(|case| !case.looking)
        .filter_map(|case| case.due)
        .min()
        .map(|due| due.saturating_duration_since(now));
    let (descriptors, regular) = {
        let wires = lock(wires);
        let regular = if wires.is_idle() {
            None
        } else if is_behind || wires.hears_more() {
            Some(ROUND)
        } else {
            Some(HOUSEKEEPING)
        };
        (wires.descriptors(), regular)
    };
    let mut polled: Vec<PollFd<'_>> = vec![PollFd::from_borrowed_fd(
        tripwire.waker.as_fd(),
        PollFlags::IN,
    )];
    polled.extend(
        descriptors
            .iter()
            .map(|owner| PollFd::new(&**owner, PollFlags::IN)),
    );
    let timeout = due
        .into_iter()
        .chain(regular)
        .min()
        .map(|timeout| Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        });
    match poll(&mut polled, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Takes the records out of the rings.
fn listen(guard: &Guard, wires: &Mutex<Wires>, cases: &mut HashMap<InodeId, Case>) {
    let mut heard = Vec::new();
    let mut wired = lock(wires);
    let lost = wired.drain(|id, told, who| heard.push((id, told, who)));
    for (id, told, who) in heard {
        let Some(watched) = guard.table.get(id) else {
            continue;
        };
        let pins = guard.pins_awake_or_asleep(&watched);
        if !pins.iter().any(|pin| look::concerns(pin, told.blocks)) {
            continue;
        }
        if let Some(file) = wired.listened(id) {
            let case = case_of(cases, watched, file);
            if told.inode.is_some() {
                case.heard(told.blocks, Some((who, told.at)));
            } else {
                case.heard_of_filesystem();
            }
        }
    }
    drop(wired);
    // Names are asked only for the remembered hits, not for each of thousands.
    cases.values_mut().for_each(Case::ask_for_names);
    if lost {
        look_at_all(guard, wires, cases);
    }
}

/// Orders a look at every file, because events may have been lost and nobody
/// knows of which file.
fn look_at_all(guard: &Guard, wires: &Mutex<Wires>, cases: &mut HashMap<InodeId, Case>) {
    for file in lock(wires).all() {
        if let Some(watched) = guard.table.get(file.id) {
            case_of(cases, watched, file).heard_of_filesystem();
        }
    }
}

fn case_of(
    cases: &mut HashMap<InodeId, Case>,
    watched: Arc<Watched>,
    file: Arc<Listened>,
) -> &mut Case {
    match cases.entry(file.id) {
        Entry::Occupied(entry) if entry.get().is_of(&watched, &file) => entry.into_mut(),
        Entry::Occupied(mut entry) => {
            // A look at the earlier file may be under way: its result finds no
            // case.
            entry.insert(Case::new(watched, file));
            entry.into_mut()
        }
        Entry::Vacant(entry) => entry.insert(Case::new(watched, file)),
    }
}

/// Stops listening to files that are not pinned any more.
fn tidy(guard: &Guard, wires: &Mutex<Wires>) {
    let is_pinned = |id| {
        let watched = guard.table.get(id);
        watched.is_some_and(|watched| {
            let pins = guard.pins_awake_or_asleep(&watched);
            pins.iter().any(|pin| !pin.is_dead())
        })
    };
    let closed = lock(wires).tidy(is_pinned);
    if closed.is_empty() {
        return;
    }
    // Closing the last event of a tracepoint waits until no processor is inside
    // of it.
    let closing = std::thread::Builder::new()
        .name(String::from("disarm"))
        .spawn(move || drop(closed));
    // If no thread could be started, the events are closed here.
    drop(closing);
}
