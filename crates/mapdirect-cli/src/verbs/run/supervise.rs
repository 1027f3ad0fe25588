//! The supervisor's worker: decides what becomes of the calls that the filter
//! asks about.

use super::filter::{self, Subject};
use super::globs::Files;
use super::open::Rights;
use super::stand_in::Used;
use super::target::{Mapping, Target};
use crate::output;
use mapdirect::{Gate, Guard, Integrity, PinInPlace, PinOptions, State, Strength};
use mapdirect_sys::proc::{self, printable};
use mapdirect_sys::seccomp::{self, Journal, Notification, Verdict};
use mapdirect_sys::{Errno, umask};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::FileType;
use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How many calls are decided at a time, at most.
pub(crate) const AT_ONCE: usize = 64;
/// How long a refusal is remembered: a program that maps the same file again and
/// again does not wait for the guard each time.
const REMEMBERED: Duration = Duration::from_secs(3);
/// How long it is remembered that a file is pinned, under the fanotify gate.
const AGAIN: Duration = Duration::from_millis(20);
/// How long the guard may wait for others to let go of a file, under the
/// fanotify gate.
const PATIENCE: Duration = Duration::from_millis(100);
/// How long it may take to look at everybody, under the bpf gate, where nobody
/// has to let go of anything.
const LOOKING: Duration = Duration::from_secs(5);
/// The inodes of which something is known.
const INODES: usize = 4096;
/// The pins of an inode that are known: one for each description.
const PINS: usize = 8;
/// The lines that are remembered, so as not to be said again.
const LINES: usize = 4096;
/// How often pins are looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How long a program waits for a decision, at most: a guard that is stopped
/// answers nothing.
const LONGEST: Duration = Duration::from_secs(20);

/// The words of the journal that are no notifications.
pub(crate) mod word {
    /// The process number of the worker.
    pub(crate) const WORKER: usize = 0;
    /// When that process was started, in clock ticks.
    pub(crate) const STARTED: usize = 1;
    /// Which globs have matched a file.
    pub(crate) const MATCHED: usize = 2;
}

/// What `run` was told.
#[derive(Debug)]
pub(crate) struct Rules {
    pub(crate) files: Files,
    pub(crate) prepare: bool,
    pub(crate) strength: Strength,
    /// What cannot be pinned is refused.
    pub(crate) strict: bool,
    pub(crate) gate: Gate,
    /// The process that starts the program.
    pub(crate) keeper: i32,
}

/// Files by device and number.
type Inodes = HashMap<(u64, u64), Arc<Mutex<Inode>>>;

/// Everything that the threads of the worker share.
#[derive(Debug)]
pub(crate) struct Supervisor<'a> {
    rules: &'a Rules,
    journal: &'a Journal,
    listener: BorrowedFd<'a>,
    /// Why no guard is asked.
    out_of_order: Option<&'static str>,
    /// Threads that wait for something to decide.
    idle: AtomicUsize,
    /// The slot of the next thread.
    next: AtomicUsize,
    /// Since when each slot waits for its decision.
    since: Vec<Mutex<Option<Instant>>>,
    inodes: Mutex<Inodes>,
    /// The worker's own.
    pub(crate) rights: OnceLock<Rights>,
    said: Mutex<HashSet<String>>,
}

/// What is known of a file.
#[derive(Debug, Default)]
pub(crate) struct Inode {
    /// Pins that live in descriptions of programs.
    pins: VecDeque<PinInPlace>,
    /// Pins that end when they are dropped.
    pub(crate) lives: Vec<PinInPlace>,
    /// It was said when it was opened that it is not pinned.
    pub(crate) told: bool,
    /// Until when it need not be looked at, and whether it was refused a pin.
    remembered: Option<(Instant, Option<Obstacle>)>,
}

impl Inode {
    /// Some end if this is forgotten.
    fn keeps_pins(&self) -> bool {
        !self.lives.is_empty()
    }

    /// It was pinned, and may be still.
    pub(crate) fn is_pinned(&self) -> bool {
        !self.pins.is_empty() || !self.lives.is_empty()
    }

    /// Has a pin looked after, which lives by itself or as long as this.
    pub(crate) fn look_after(&mut self, pin: PinInPlace) {
        if pin.ends_with_this() {
            self.lives.push(pin);
            return;
        }
        if self.pins.len() >= PINS {
            self.pins.pop_front();
        }
        self.pins.push_back(pin);
    }

    /// Why it was not pinned a moment ago.
    pub(crate) fn refusal(&self) -> Option<Obstacle> {
        match &self.remembered {
            Some((until, Some(why))) if Instant::now() < *until => Some(why.clone()),
            _ => None,
        }
    }

    pub(crate) fn remember_refusal(&mut self, obstacle: &Obstacle) {
        self.remembered = Some((Instant::now() + REMEMBERED, Some(obstacle.clone())));
    }
}

/// Why something was not pinned.
#[derive(Clone, Debug)]
pub(crate) struct Obstacle {
    pub(crate) why: String,
    pub(crate) help: String,
}

impl From<mapdirect::Error> for Obstacle {
    fn from(error: mapdirect::Error) -> Self {
        Self {
            why: error.obstacle().to_owned(),
            help: error.help().to_owned(),
        }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Supervisor<'a> {
    pub(crate) fn new(
        rules: &'a Rules,
        journal: &'a Journal,
        listener: BorrowedFd<'a>,
        out_of_order: Option<&'static str>,
    ) -> Self {
        Self {
            rules,
            journal,
            listener,
            out_of_order,
            idle: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            since: (0..journal.slots()).map(|_| Mutex::default()).collect(),
            inodes: Mutex::default(),
            rights: OnceLock::new(),
            said: Mutex::default(),
        }
    }

    pub(crate) fn listener(&self) -> BorrowedFd<'_> {
        self.listener
    }

    pub(crate) fn journal(&self) -> &Journal {
        self.journal
    }

    pub(crate) fn files(&self) -> &Files {
        &self.rules.files
    }

    pub(crate) fn is_strict(&self) -> bool {
        self.rules.strict
    }

    pub(crate) fn out_of_order(&self) -> Option<&'static str> {
        self.out_of_order
    }

    /// Decides until nobody is supervised any more.
    pub(crate) fn run(&self) {
        std::thread::scope(|scope| {
            let named = |name: &str| std::thread::Builder::new().name(name.to_owned());
            let _ = named("hurry").spawn_scoped(scope, || {
                loop {
                    std::thread::sleep(LOOK);
                    self.hurry();
                }
            });
            // What a predecessor has received and not answered comes first.
            for slot in 0..self.journal.slots() {
                if let Some(pending) = self.journal.pending(slot) {
                    self.decide(slot, &pending, false);
                }
            }
            self.start(scope);
            if self.out_of_order.is_none() {
                let looking = named("look");
                let _ = looking.spawn_scoped(scope, || {
                    let mut has_guard = true;
                    loop {
                        std::thread::sleep(LOOK);
                        self.look_for_guard(&mut has_guard);
                        self.look_after();
                    }
                });
            }
            wait_until_unused(self.listener);
            // The other threads wait in the kernel, where older ones do not say
            // that nobody will come any more.
            std::process::exit(0);
        });
    }

    /// Starts one more thread, if there may be one; says whether it did.
    fn start<'scope>(&'scope self, scope: &'scope std::thread::Scope<'scope, '_>) -> bool {
        let slot = self.next.fetch_add(1, SeqCst);
        if slot >= self.journal.slots() {
            return false;
        }
        let builder = std::thread::Builder::new()
            .name(format!("decide-{slot}"))
            .stack_size(256 * 1024);
        self.idle.fetch_add(1, SeqCst);
        let started = builder
            .spawn_scoped(scope, move || self.serve(scope, slot))
            .is_ok();
        if !started {
            self.idle.fetch_sub(1, SeqCst);
        }
        started
    }

    fn serve<'scope>(&'scope self, scope: &'scope std::thread::Scope<'scope, '_>, slot: usize) {
        if self.rules.gate != Gate::Bpf {
            // It makes files for programs, each with the program's own mask.
            let _ = umask::apart();
        }
        loop {
            let notification = match self.journal.receive(self.listener, slot) {
                Ok(notification) => notification,
                Err(Errno::NOENT | Errno::INTR) => continue,
                Err(_) => return,
            };
            let is_last = self.idle.fetch_sub(1, SeqCst) == 1;
            // With every other thread busy, and no more to be had, this one has no
            // time to wait. A new one may be busy by now, but it starts the next.
            let in_haste = is_last && !self.start(scope);
            self.decide(slot, &notification, in_haste);
            self.idle.fetch_add(1, SeqCst);
        }
    }

    /// Answers what has waited for too long.
    fn hurry(&self) {
        for (slot, since) in self.since.iter().enumerate() {
            let since = *lock(since);
            let waits = since.is_some_and(|since| since.elapsed() >= LONGEST);
            if let Some(pending) = self.journal.pending(slot).filter(|_| waits) {
                let answered = seccomp::answer(self.listener, pending.id, self.without_pin());
                if answered.is_ok() {
                    let who = printable(&proc::command(pending.tid));
                    let tid = pending.tid;
                    self.say(&format!(
                        "not pinned: what {who} (process {tid}) maps: the guard does not answer; \
                         help: see whether it runs: mapdirect status"
                    ));
                }
            }
        }
    }

    /// Answers the notification in a slot, and empties it.
    fn decide(&self, slot: usize, notification: &Notification, in_haste: bool) {
        *lock(&self.since[slot]) = Some(Instant::now());
        self.answer(notification, in_haste);
        *lock(&self.since[slot]) = None;
        self.journal.clear(slot);
    }

    fn answer(&self, notification: &Notification, in_haste: bool) {
        let verdict = match filter::subject(&notification.call) {
            Some((_, Subject::Listener)) => {
                self.say_of_listener(notification.tid);
                Some(Verdict::Continue)
            }
            Some((convention, subject @ (Subject::Map | Subject::OldMap))) => {
                self.decide_map(notification, convention, subject, in_haste)
            }
            Some((_, subject @ (Subject::Truncate(_) | Subject::Allocate(..)))) => {
                self.decide_own(notification, subject, in_haste)
            }
            Some((_, subject)) => self.decide_open(notification, subject, in_haste),
            None => Some(Verdict::Continue),
        };
        if let Some(verdict) = verdict {
            // Nobody may wait any more: then there is nothing to answer.
            let _ = seccomp::answer(self.listener, notification.id, verdict);
        }
    }

    fn say_of_listener(&self, tid: i32) {
        let who = printable(&proc::command(tid));
        self.say(&format!(
            "process {tid} ({who}) installs a filter with a listener of its own, and the kernel \
             allows one to each chain of filters (EBUSY); help: run that program without \
             `mapdirect run`, or run what it starts under `mapdirect run`"
        ));
    }

    /// What becomes of a mapping; nothing if nobody waits any more.
    fn decide_map(
        &self,
        notification: &Notification,
        convention: &filter::Convention,
        subject: Subject,
        in_haste: bool,
    ) -> Option<Verdict> {
        let looked = Target::new(notification.tid).and_then(|target| {
            let mapping = target.mapping(convention, subject, &notification.call)?;
            let Some(mapping) = mapping else {
                return Ok(None);
            };
            match target.descriptor(mapping.descriptor) {
                Ok(file) => Ok(Some((mapping, file))),
                // The kernel says so to the program itself.
                Err(Errno::BADF) => Ok(None),
                Err(other) => Err(other),
            }
        });
        // From here on it is known that what was looked at was the thread that
        // waits, and no other that got its number.
        if !seccomp::is_waiting(self.listener, notification.id) {
            return None;
        }
        match looked {
            Ok(None) => Some(Verdict::Continue),
            Ok(Some((mapping, file))) => Some(self.decide_file(&mapping, &file, in_haste)),
            Err(errno) => Some(self.unseen(notification.tid, errno)),
        }
    }

    /// A program that cannot be looked at.
    fn unseen(&self, tid: i32, errno: Errno) -> Verdict {
        let who = printable(&proc::command(tid));
        let (why, help) = match errno {
            Errno::PERM | Errno::ACCESS => (
                "may not be looked at (its program is not readable, it runs as somebody else, or \
                 kernel.yama.ptrace_scope forbids it)",
                "run mapdirect with CAP_SYS_PTRACE, or make the program readable",
            ),
            Errno::SRCH => (
                "is not in the PID namespace of mapdirect",
                "run mapdirect in the outer one",
            ),
            _ => ("cannot be looked at", "see the error"),
        };
        self.say(&format!(
            "not pinned: what {who} maps: process {tid} {why}: {errno}; help: {help}"
        ));
        self.without_pin()
    }

    fn without_pin(&self) -> Verdict {
        if self.rules.strict {
            Verdict::Fail(Errno::TXTBSY)
        } else {
            Verdict::Continue
        }
    }

    fn decide_file(&self, mapping: &Mapping, file: &OwnedFd, in_haste: bool) -> Verdict {
        let Ok(stat) = rustix::fs::fstat(file) else {
            return Verdict::Continue;
        };
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Verdict::Continue;
        }
        let inode = self.inode((stat.st_dev, stat.st_ino));
        let mut inode = lock(&inode);
        let pinned = inode.pins.iter().any(|pin| {
            // A mapping beyond the pin is as good as none.
            pin.lives_in(file) && pin.block_map().range().end >= mapping.end.min(size_of(&stat))
        });
        if pinned {
            return Verdict::Continue;
        }
        match &inode.remembered {
            Some((until, refusal)) if Instant::now() < *until => {
                return match refusal {
                    Some(_) => self.without_pin(),
                    None => Verdict::Continue,
                };
            }
            _ => inode.remembered = None,
        }
        let path = path_of(file.as_fd(), mapdirect_sys::stat::links(&stat));
        let until = Instant::now() + REMEMBERED;
        let Some(matched) = self.rules.files.matching(&path) else {
            inode.remembered = Some((until, None));
            return Verdict::Continue;
        };
        self.journal.more()[word::MATCHED].fetch_or(matched, SeqCst);
        let pinned = if let Some(why) = self.out_of_order {
            Err(Obstacle {
                why: why.to_owned(),
                help: String::new(),
            })
        } else if in_haste {
            Err(Obstacle {
                why: String::from("too many other files are being pinned at this moment"),
                help: String::from("map fewer new files at a time"),
            })
        } else if self.rules.gate == Gate::Bpf {
            self.ask_unless_pinned(file)
        } else {
            self.was_pinned(file).map(|()| None)
        };
        match pinned {
            Ok(pin) => {
                match pin {
                    Some(pin) => inode.look_after(pin),
                    // What maps again and again need not ask each time.
                    None if self.rules.gate != Gate::Bpf => {
                        inode.remembered = Some((Instant::now() + AGAIN, None));
                    }
                    None => {}
                }
                Verdict::Continue
            }
            Err(obstacle) => {
                if !inode.told {
                    self.say_not_pinned(&path, &obstacle);
                }
                if !in_haste {
                    inode.remembered = Some((until, Some(obstacle)));
                }
                self.without_pin()
            }
        }
    }

    pub(crate) fn say_not_pinned(&self, path: &OsStr, obstacle: &Obstacle) {
        let path = printable(&path.to_string_lossy());
        let Obstacle { why, help } = obstacle;
        let help = if help.is_empty() {
            String::new()
        } else {
            format!("; help: {help}")
        };
        self.say(&format!("not pinned: {path}: {why}{help}"));
    }

    pub(crate) fn inode(&self, id: (u64, u64)) -> Arc<Mutex<Inode>> {
        let mut inodes = lock(&self.inodes);
        if let Some(known) = inodes.get(&id) {
            return Arc::clone(known);
        }
        if inodes.len() >= INODES {
            // What nobody uses at this moment. A description that is a pin is
            // found to be one by the guard, if it is asked again.
            inodes.retain(|_, inode| {
                Arc::strong_count(inode) > 1 || inode.try_lock().is_ok_and(|it| it.keeps_pins())
            });
        }
        Arc::clone(inodes.entry(id).or_default())
    }

    /// Pins a file by a program's own description; nothing if that is a pin
    /// already.
    fn ask_unless_pinned(&self, file: &OwnedFd) -> Result<Option<PinInPlace>, Obstacle> {
        match self.try_pin(file) {
            Err(error) if error.errno() == Errno::EXIST.raw_os_error() => Ok(None),
            other => other.map(Some).map_err(Obstacle::from),
        }
    }

    /// Pins a file.
    pub(crate) fn ask(&self, file: &OwnedFd) -> Result<PinInPlace, Obstacle> {
        self.try_pin(file).map_err(Obstacle::from)
    }

    fn try_pin(&self, file: &OwnedFd) -> mapdirect::Result<PinInPlace> {
        let options = PinOptions::new()
            .strength(self.rules.strength)
            .family_of(self.rules.keeper)
            .patience(if self.rules.gate == Gate::Bpf {
                LOOKING
            } else {
                PATIENCE
            });
        let options = match self.rules.strength {
            Strength::Stable => options.range_from(0),
            _ => options,
        };
        options.prepare_first(self.rules.prepare).pin_in_place(file)
    }

    /// Says what has become of pins.
    fn look_after(&self) {
        let all: Vec<_> = lock(&self.inodes)
            .iter()
            .map(|(id, inode)| (*id, Arc::clone(inode)))
            .collect();
        let mut used = None;
        for (id, inode) in all {
            let Ok(mut inode) = inode.try_lock() else {
                continue;
            };
            if !inode.lives.is_empty() {
                let used = used.get_or_insert_with(|| Used::look(self.rules.keeper));
                self.end_unused(&mut inode, id, used);
            }
            let Inode { pins, lives, .. } = &mut *inode;
            for pin in pins.iter().chain(&*lives) {
                if let Integrity::Breached { breaches, .. } = pin.integrity() {
                    for breach in &breaches {
                        self.say(&printable(&crate::verbs::pin::breach_line(breach)));
                    }
                }
            }
            // Most have ended, then: the kernel alone knows when a program
            // closes and unmaps a file.
            pins.retain(|pin| !matches!(pin.state(), State::Lost { .. }));
        }
    }

    /// Says whether a guard is there, when that changes.
    fn look_for_guard(&self, was_there: &mut bool) {
        let found = Guard::from_env().gate();
        match (&found, *was_there) {
            (Err(error), true) => {
                let kept = if self.rules.gate == Gate::Bpf {
                    "what is pinned stays so, unattended"
                } else {
                    "nothing is pinned any more"
                };
                output::complain(&format!(
                    "{}: {kept}, and nothing new can be pinned",
                    error.obstacle()
                ));
            }
            (Ok(_), false) => output::complain("a guard is back"),
            _ => {}
        }
        *was_there = found.is_ok();
    }

    /// Says something, once.
    fn say(&self, line: &str) {
        let mut said = lock(&self.said);
        if said.len() >= LINES {
            said.clear();
        }
        if said.insert(line.to_owned()) {
            output::complain(line);
        }
    }
}

/// Waits until no process has the filter any more.
pub(crate) fn wait_until_unused(listener: BorrowedFd<'_>) {
    loop {
        let mut fds = [PollFd::new(&listener, PollFlags::empty())];
        match poll(&mut fds, None) {
            Ok(_) if fds[0].revents().contains(PollFlags::HUP) => return,
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

/// The path of a file as the kernel has it, without links.
pub(crate) fn path_of(file: BorrowedFd<'_>, links: u64) -> OsString {
    let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let path = path.unwrap_or_default().into_os_string();
    // Nobody can open it any more, but the program maps it all the same.
    match path.as_bytes().strip_suffix(b" (deleted)") {
        Some(name) if links == 0 => OsString::from_vec(name.to_vec()),
        _ => path,
    }
}

fn size_of(stat: &rustix::fs::Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}
