//! The fanotify gate: one thread that answers permission events.
//!
//! Rules of this thread, each of which somebody's machine has hung for:
//!
//! * The queue is unlimited, since the kernel lets an event pass that does
//!   not fit ([`Group::pre_content`]).
//! * It never opens, reads or maps a file behind the gate, never logs, and
//!   takes no lock that others hold: what it looks up is swapped in whole.
//! * It closes an event's descriptor before it answers: the waiting thread
//!   still holds the file then, so the close cannot be the last one, with
//!   whatever work of the filesystem that brings.
//! * It answers every event exactly once, many with one system call, and
//!   leaves the group's descriptor to no child.

use crate::audit::Refused;
use crate::gate::classify::{self, Asked};
use crate::gate::eyes::{Eyes, Seen};
use crate::gate::threads::{Look, ThreadDescriptors, Threads};
use crate::policy::{Operation, OperationKind as K};
use crate::table::{InodeId, Opinion, Watched};
use crate::wake::Waker;
use crate::{Errno, Guard};
use arc_swap::ArcSwap;
use mapdirect::ExtentState;
use mapdirect_sys::fanotify::{Event, Group, Mask, Response};
use mapdirect_sys::{dup, proc};
use rustix::fs::OFlags;
use std::cell::Cell;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicUsize, fence};
use std::time::{Duration, Instant};

/// What is asked for on an inode behind the gate.
pub(crate) const MASK: Mask = Mask::from_bits(Mask::OPEN_PERM.bits() | Mask::PRE_ACCESS.bits());

/// How long an operation waits for a grant to finish before it is refused.
const WAIT_FOR_GRANT: Duration = Duration::from_secs(5);
/// How long a thread may take to fall asleep before it is judged unseen.
const WAIT_FOR_SLEEP: Duration = Duration::from_secs(1);
/// How long to look for a stack that reaches the bottom before what there is
/// of it must do: refuses more then, not less.
const WAIT_FOR_STACK: Duration = Duration::from_millis(50);

/// The group, and how to reach the thread that serves it.
#[derive(Debug)]
pub(crate) struct Gate {
    pub(crate) group: Group,
    /// Helps the thread to look at who waits.
    pub(crate) eyes: Eyes,
    waker: Waker,
    /// Events held back until a grant is finished.
    waiting: AtomicUsize,
    /// The threads they belong to.
    held: ArcSwap<Vec<i32>>,
}

impl Gate {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self {
            group: Group::pre_content()?,
            eyes: Eyes::new()?,
            waker: Waker::new()?,
            waiting: AtomicUsize::new(0),
            held: ArcSwap::default(),
        })
    }

    /// Has the thread look again at the events it holds back, if any.
    pub(crate) fn reconsider(&self) {
        // Pairs with the fence in `Server::run`: either the thread sees what
        // changed, or we see that it waits.
        fence(SeqCst);
        if self.waiting.load(SeqCst) > 0 {
            self.waker.wake();
        }
    }

    /// The threads whose operations are held back at the gate.
    pub(crate) fn held(&self) -> Arc<Vec<i32>> {
        self.held.load_full()
    }

    /// Ends the threads once nothing is waiting any more.
    pub(crate) fn wake(&self) {
        self.waker.wake();
        self.eyes.wake();
    }
}

/// Whether an error of reading events says that there will be none any more.
/// Others say that one event could not be delivered (`create_fd`,
/// fs/notify/fanotify/fanotify_user.c).
pub(crate) fn is_final(errno: Errno) -> bool {
    matches!(errno, Errno::BADF | Errno::INVAL | Errno::FAULT)
}

/// A decision about an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Allow,
    Refuse,
    /// Ask again when the thread sleeps.
    NotYet,
    /// Ask again when a grant is finished.
    Hold,
}

/// An event without an answer.
struct Waiting {
    file: OwnedFd,
    event: About,
    since: Instant,
    looks: u32,
    /// A grant will say when to look again.
    held: bool,
}

/// What an event says, without its descriptor.
#[derive(Clone, Copy)]
struct About {
    mask: Mask,
    tid: i32,
    range: Option<(u64, u64)>,
}

/// The thread's own state.
struct Server<'guard> {
    guard: &'guard Guard,
    gate: &'guard Gate,
    threads: Threads,
    waiting: Vec<Waiting>,
    answers: Vec<Response>,
}

/// Serves the gate until the guard stops.
///
/// # Errors
///
/// When the kernel's events cannot be read or answered any more. The gate is
/// open then, and the process must end so that holders are told.
pub(crate) fn run(guard: &Guard, gate: &Gate) -> Result<(), Errno> {
    let mut server = Server {
        guard,
        gate,
        threads: Threads::default(),
        waiting: Vec::new(),
        answers: Vec::new(),
    };
    server.run()
}

impl Server<'_> {
    fn run(&mut self) -> Result<(), Errno> {
        // Some eighty events: enough to share the cost of answering, few
        // enough that the first does not wait for long.
        let mut buffer = vec![0; 4096];
        let mut events = Vec::new();
        while !(self.guard.is_stopping() && self.waiting.is_empty()) {
            if self.sleep()? {
                let group = &self.gate.group;
                match group.read(&mut buffer, |event| events.push(event)) {
                    Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                    Err(errno) if is_final(errno) => return Err(errno),
                    // No descriptor could be made for one event: its
                    // filesystem is dead, or descriptors are short. The
                    // kernel has denied that one; the others need us.
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
            self.reconsider();
            self.answer_own(&mut events);
            let tids: Vec<i32> = events.iter().map(|event| event.tid).collect();
            let seen = self.gate.eyes.look(&mut self.threads, &tids);
            for (event, seen) in events.drain(..).zip(seen) {
                self.take(event, &seen);
            }
            self.publish_waiting();
            fence(SeqCst);
            self.flush()?;
        }
        Ok(())
    }

    /// Lets grants know who waits for them.
    fn publish_waiting(&mut self) {
        let before = self.gate.waiting.swap(self.waiting.len(), SeqCst);
        if before > 0 || !self.waiting.is_empty() {
            let tids = self.waiting.iter().map(|waiting| waiting.event.tid);
            self.gate.held.store(Arc::new(tids.collect()));
        }
    }

    /// Waits for an event, or until something held back may be answered.
    /// Says whether there are events.
    fn sleep(&self) -> Result<bool, Errno> {
        let timeout = self.waiting.iter().map(Waiting::pause).min();
        if timeout == Some(Duration::ZERO) {
            std::thread::yield_now();
        }
        let fds = [self.gate.group.as_fd(), self.gate.waker.as_fd()];
        let [events, woken] = crate::wake::wait_any(&fds, timeout)?;
        if woken {
            self.gate.waker.clear();
        }
        Ok(events)
    }

    /// Lets in what threads of the guard open: there is nothing to look at.
    fn answer_own(&mut self, events: &mut Vec<Event>) {
        events.retain_mut(|event| {
            if !self.guard.own.contains(event.tid) {
                return true;
            }
            if let Some(file) = event.file.take() {
                self.guard.audit.judged();
                self.answers.push(Response::allow(file.as_raw_fd()));
            }
            false
        });
    }

    fn take(&mut self, event: Event, seen: &Seen) {
        let Some(file) = event.file else {
            // Only an overflow has no file, and an unlimited queue has none.
            return;
        };
        self.guard.audit.judged();
        let waiting = Waiting {
            file,
            event: About {
                mask: event.mask,
                tid: event.tid,
                range: event.range,
            },
            since: Instant::now(),
            looks: 0,
            held: false,
        };
        self.settle(waiting, seen);
    }

    /// Looks again at everything held back.
    fn reconsider(&mut self) {
        for mut waiting in std::mem::take(&mut self.waiting) {
            waiting.looks = waiting.looks.saturating_add(1);
            let seen = Seen::of(&mut self.threads, waiting.event.tid);
            self.settle(waiting, &seen);
        }
    }

    /// Answers, or holds back.
    fn settle(&mut self, mut waiting: Waiting, seen: &Seen) {
        let fd = waiting.file.as_raw_fd();
        let late = waiting.since.elapsed();
        let answer = match self.decide(&waiting.event, waiting.file.as_fd(), seen, late) {
            Verdict::Allow => Response::allow(fd),
            Verdict::Refuse => Response::deny(fd, Errno::TXTBSY),
            verdict @ (Verdict::NotYet | Verdict::Hold) => {
                if verdict == Verdict::Hold && !waiting.held {
                    waiting.keep_as_path();
                }
                waiting.held = verdict == Verdict::Hold;
                self.waiting.push(waiting);
                return;
            }
        };
        // Close first, answer then: see the head of this file. No event is
        // read in between, so the number cannot name another event yet.
        drop(waiting.file);
        self.answers.push(answer);
    }

    fn flush(&mut self) -> Result<(), Errno> {
        if self.answers.is_empty() {
            return Ok(());
        }
        let result = self.gate.group.respond(&self.answers);
        self.answers.clear();
        result
    }

    fn decide(&self, event: &About, file: BorrowedFd<'_>, seen: &Seen, late: Duration) -> Verdict {
        let syscall = match seen.look {
            Look::Gone => return Verdict::Refuse,
            Look::NotYet if late < WAIT_FOR_SLEEP => return Verdict::NotYet,
            Look::NotYet => None,
            Look::Sleeps(syscall) => syscall,
        };
        let pre_access = event.mask.intersects(Mask::PRE_ACCESS);
        let Ok(stat) = rustix::fs::fstat(file) else {
            return Verdict::Refuse;
        };
        let id = InodeId {
            dev: stat.st_dev,
            inode: stat.st_ino,
        };
        let Some(watched) = self.guard.table.get(id) else {
            return Verdict::Allow;
        };
        let size = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
        let functions: Vec<&str> = proc::stack_functions(&seen.stack).collect();
        // Every answer wakes all who wait for one, for a moment: a stack read
        // just then is none, or breaks off.
        let waits = functions.iter().any(|name| classify::is_machinery(name));
        if !waits && late < WAIT_FOR_SLEEP {
            return Verdict::NotYet;
        }
        let is_whole = classify::is_whole(&functions);
        if !is_whole && late < WAIT_FOR_STACK {
            return Verdict::NotYet;
        }
        // What broke off could have told that the registers are another
        // call's.
        let syscall = syscall.filter(|_| is_whole);
        let operation = if !pre_access {
            if watched.hold_opens.load(SeqCst) && late < WAIT_FOR_GRANT {
                return Verdict::Hold;
            }
            let kind = classify::classify_open(syscall.as_ref(), &functions);
            Operation::new(kind, 0..u64::MAX)
        } else {
            let asked = Asked {
                range: event.range,
                syscall: syscall.as_ref(),
                functions: &functions,
                reflink: watched.abilities.reflink,
                size,
            };
            let descriptors = ThreadDescriptors {
                tid: event.tid,
                inode: id.inode,
                file,
                #[allow(clippy::useless_conversion, reason = "smaller on arm64")]
                links: u64::from(stat.st_nlink),
            };
            classify::classify(&asked, &descriptors)
        };
        let verdict = judge_announced(&watched, event.tid, operation.kind, late)
            .unwrap_or_else(|| self.judge(&watched, event.tid, &operation, size, file, late));
        if verdict == Verdict::Refuse {
            self.note(&watched, event, &operation);
        }
        verdict
    }

    /// Judges a classified operation, and notes what a later grant must know
    /// about those let in.
    fn judge(
        &self,
        watched: &Watched,
        tid: i32,
        operation: &Operation,
        size: u64,
        file: BorrowedFd<'_>,
        late: Duration,
    ) -> Verdict {
        if operation.kind.is_harmless() {
            return Verdict::Allow;
        }
        let mut operation = operation.clone();
        let moving = Moving::new(watched, &operation);
        operation.brings_shared &= match operation.kind {
            K::Exchange => watched.abilities.exchange,
            K::CollapseRange => moving.may_bring_shared(file),
            _ => true,
        };
        let operation = &operation;
        let verdict = self.ask_pins(watched, operation, size, file, late);
        if verdict != Verdict::Allow {
            return verdict;
        }
        // It may go on, so a grant that comes now must hear of it: note it,
        // and then look once more for a pin. A grant does the same the other
        // way round: it publishes its pin and then looks for notes.
        let note = match operation.kind {
            K::OpenWrite => &watched.writers_let_in,
            K::MapWrite => {
                watched.mapping_by.note(tid);
                &watched.mapped_writable
            }
            _ => {
                watched.unrest_by.note(tid);
                &watched.unrest
            }
        };
        note.store(true, SeqCst);
        let fails = operation.kind == K::Exchange && !watched.abilities.exchange;
        if operation.kind.may_bring_shared() && !fails {
            watched.shared_since.store(true, SeqCst);
            if operation.brings_shared {
                watched.cloned_since.store(true, SeqCst);
            }
        }
        fence(SeqCst);
        let verdict = self.ask_pins(watched, operation, size, file, late);
        if verdict == Verdict::Allow {
            moving.goes_on();
        }
        if verdict == Verdict::Allow && operation.kind == K::OpenTruncate {
            watched.writers_let_in.store(true, SeqCst);
        }
        verdict
    }

    fn ask_pins(
        &self,
        watched: &Watched,
        operation: &Operation,
        size: u64,
        file: BorrowedFd<'_>,
        late: Duration,
    ) -> Verdict {
        let pins = watched.pins.load();
        let since = watched.since();
        let mut held = false;
        // What this gate cannot see, a descriptor open for writing can do
        // (MOVE_EXT, SWAPEXT, mremap): while anything is pinned there are no
        // new ones.
        let exclusive = matches!(operation.kind, K::OpenWrite | K::OpenTruncate);
        let mut reach = if exclusive {
            0..u64::MAX
        } else {
            operation.reach(size)
        };
        if operation.brings_shared {
            reach.start = reach.start.saturating_sub(since.moved);
        }
        for pin in pins.meeting(reach).filter(|pin| !pin.is_dead()) {
            let opinion = match pin.opinion(operation, size, since) {
                Opinion::Allow if exclusive && pin.is_handed_over() => Opinion::Refuse,
                Opinion::Allow if exclusive => Opinion::Wait,
                opinion => opinion,
            };
            match opinion {
                Opinion::Allow => {}
                Opinion::Wait => held = true,
                Opinion::Refuse if pin.is_alive(file) => return Verdict::Refuse,
                Opinion::Refuse => {
                    // Its last mapping is gone, only the notice is not here
                    // yet.
                    pin.bury();
                    self.guard.lifetime.kick(watched.id);
                }
            }
        }
        match held {
            false => Verdict::Allow,
            true if exclusive => wait_to_open(watched, late),
            true => wait_for_grant(late),
        }
    }

    fn note(&self, watched: &Watched, event: &About, operation: &Operation) {
        watched.refused[operation.kind as usize].fetch_add(1, SeqCst);
        let by_range = !matches!(operation.kind, K::OpenWrite | K::OpenTruncate | K::Unknown);
        self.guard.audit.refused(Refused {
            tid: event.tid,
            command: proc::command(event.tid),
            kind: operation.kind,
            id: watched.id,
            path: Arc::clone(&watched.path),
            range: by_range.then(|| operation.range.clone()),
        });
    }
}

/// A collapse, which moves what is behind it nearer to the pins before it:
/// shared blocks as well, if there are any. Nothing is shared there after it
/// was looked at: what clones asks with `moved` counted, or is seen in
/// `cloned_since`.
struct Moving<'a> {
    watched: &'a Watched,
    /// Bytes that go, and everything behind them moves by.
    gone: Option<Range<u64>>,
    goes_on: Cell<bool>,
}

/// So much is looked at for shared blocks: many extents take long.
const MOST_MOVED: u64 = 256 << 20;

impl<'a> Moving<'a> {
    fn new(watched: &'a Watched, operation: &Operation) -> Self {
        let gone = (operation.kind == K::CollapseRange).then(|| operation.range.clone());
        if let Some(gone) = &gone {
            watched.moved.fetch_add(gone.end - gone.start, SeqCst);
        }
        Self {
            watched,
            gone,
            goes_on: Cell::new(false),
        }
    }

    /// Whether any of what may come to lie beside a pin is shared.
    fn may_bring_shared(&self, file: BorrowedFd<'_>) -> bool {
        let Some(gone) = &self.gone else {
            return false;
        };
        let moved = self.watched.moved.load(SeqCst);
        let pins = self.watched.pins.load();
        let windows = pins.iter().filter_map(|pin| {
            let settled = pin.settled()?;
            settled.pinned.unshared_window(moved)
        });
        let Some(end) = windows.map(|window| window.end).max() else {
            return false;
        };
        if self.watched.cloned_since.load(SeqCst) || end.saturating_sub(gone.start) > MOST_MOVED {
            return true;
        }
        if end <= gone.start {
            return false;
        }
        mapdirect::extents::read(file, gone.start..end)
            .map_or(true, |map| map.total(ExtentState::Shared) > 0)
    }

    /// It is let in, and counts from now on.
    fn goes_on(&self) {
        self.goes_on.set(true);
    }
}

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        if let Some(gone) = self.gone.as_ref().filter(|_| !self.goes_on.get()) {
            self.watched.moved.fetch_sub(gone.end - gone.start, SeqCst);
        }
    }
}

/// Judges an open for writing that was announced, if this is one: what is
/// pinned already does not stand in its way, but a grant under way must know
/// of it, or be over before it goes on.
fn judge_announced(watched: &Watched, tid: i32, kind: K, late: Duration) -> Option<Verdict> {
    if kind != K::OpenWrite {
        return None;
    }
    // What counts is when it came: we may have kept it waiting.
    let came = Instant::now().checked_sub(late)?;
    let announcement = watched.announced(tid, came, || proc::start_time(tid).ok())?;
    // Noted first, then looked, as in `Server::judge`.
    let before = watched.writers_let_in.swap(true, SeqCst);
    fence(SeqCst);
    let granting = watched.pins.load().iter().any(|pin| pin.is_being_granted());
    if !granting && announcement.take() {
        return Some(Verdict::Allow);
    }
    if !before {
        // It did not go on. Nobody else sets notes.
        watched.writers_let_in.store(false, SeqCst);
    }
    granting.then(|| wait_to_open(watched, late))
}

/// Keeps an open for writing until a grant is over, unless that grant can
/// only go on without it.
fn wait_to_open(watched: &Watched, late: Duration) -> Verdict {
    watched.opens_wait.store(true, SeqCst);
    if watched.refuse_opens.load(SeqCst) {
        return Verdict::Refuse;
    }
    wait_for_grant(late)
}

fn wait_for_grant(late: Duration) -> Verdict {
    if late < WAIT_FOR_GRANT {
        Verdict::Hold
    } else {
        Verdict::Refuse
    }
}

impl Waiting {
    /// Keeps the event's number and gives its description up. The kernel
    /// counts that as one more reader of the file, and the grant that is
    /// waited for may need to prove that there is none. A mere path is not
    /// counted, and tells all that is asked until the answer. To open one
    /// asks nobody, and waits for nobody.
    fn keep_as_path(&mut self) {
        if let Ok(path) = proc::reopen(self.file.as_fd(), OFlags::PATH) {
            // It stays what it was if that fails.
            let _ = dup::replace(self.file.as_fd(), path.as_fd());
        }
    }

    /// How long to wait before looking again.
    fn pause(&self) -> Duration {
        match self.looks {
            // Once more without delay, now that it is known that we wait.
            0 if self.held => Duration::ZERO,
            _ if self.held => Duration::from_millis(100),
            // It was just about to sleep: let it.
            0..8 => Duration::ZERO,
            8..32 => Duration::from_micros(50),
            _ => Duration::from_millis(1),
        }
    }
}
