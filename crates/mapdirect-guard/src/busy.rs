//! Who may be in the middle of changing a file.
//!
//! A lease proves that nobody has a file open, but a truncation by path needs
//! no description, and what the gate let in through one behind it may still
//! be under way. Both are looked for among the threads that can be at it: all
//! of the system for what began before the gate closed, and only those that
//! the gate let in for what began behind it. [`suspicion`] says when a thread
//! is a suspect; whoever does anything else is none, however long it takes.
//!
//! A thread is looked at in two steps. The function it sleeps in
//! (`/proc/<tid>/wchan`) is exact, and mostly settles it. Otherwise its stack
//! does, and that only counts if the thread did not run while it was
//! read. A thread on a processor has no stack that could be read: where it
//! matters whoever looks goes to that processor, and so takes it away from the
//! thread for a moment.
//!
//! [`suspicion`]: crate::suspicion

use crate::Errno;
use crate::bounded::{self, Looking, Retries, Stuck, within};
use crate::gate::classify::{self, classify_open};
use crate::listeners;
use crate::policy::OperationKind;
use crate::suspicion::{self, Finding, LookFor, Prefix, judge};
use crate::table::InodeId;
use crate::thaw;
use crate::wake::Backoff;
use mapdirect_sys::proc::{self, Runs, SyscallState};
use mapdirect_sys::{kcmp, proc_locks};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A thread that may be in the middle of something.
#[derive(Clone, Debug)]
pub(crate) struct Busy {
    pub(crate) tid: i32,
    pub(crate) command: String,
    pub(crate) doing: &'static str,
}

/// The file that a look is about.
#[derive(Clone, Copy, Debug)]
struct Subject {
    id: InodeId,
    prefix: Prefix,
}

/// A thread that may be in the middle of something, and why.
#[derive(Clone, Copy, Debug)]
struct Suspect {
    tid: i32,
    seen: Seen,
    /// How often it has been looked at.
    looks: u32,
}

/// What a look at a thread shows.
#[derive(Clone, Copy, Debug)]
enum Seen {
    /// It is in the middle of nothing that matters.
    Innocent,
    /// It may be.
    At(Finding),
    /// It is on a processor, or waits for one, and shows nothing; this is what
    /// it had run when first seen so.
    Running(Run),
}

/// How much a thread has run.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// Nanoseconds in all.
    all: u64,
    /// Clock ticks outside the kernel.
    outside: u64,
}

impl Run {
    /// More than any thread runs: if it cannot be read, no run is enough.
    const ENDLESS: Self = Self {
        all: u64::MAX / 2,
        outside: u64::MAX / 2,
    };

    fn of(tid: i32) -> Option<Self> {
        Some(Self {
            all: proc::runs(tid).ok()?.time,
            outside: proc::ticks_outside(tid).ok()?,
        })
    }

    /// This one, or `later` if nothing could be read for this one.
    fn or(self, later: Self) -> Self {
        if self.all == Self::ENDLESS.all {
            later
        } else {
            self
        }
    }

    /// Whether a thread has got out of what it may have been in the middle of,
    /// by what it has run since.
    fn is_over(self, tid: i32, look_for: LookFor) -> bool {
        let Some(now) = Self::of(tid) else {
            return false;
        };
        match look_for {
            // Past the few instructions between a permission check and the
            // counts that a lease looks at.
            LookFor::Truncations => now.all >= self.all.saturating_add(50_000),
            // It has been outside of the kernel. What it has run is split by
            // the ticks that found it inside and outside (`cputime_adjust`,
            // kernel/sched/cputime.c): until the next tick finds it inside,
            // what it runs there is taken for outside. That is no more than
            // one of these, which are as long as the longest tick there is.
            _ => now.outside > self.outside.saturating_add(1),
        }
    }
}

/// The functions on a thread's stack, if it can be told that all of them are
/// there and that it did not run while they were read.
///
/// # Errors
///
/// The thread is gone, or must not be looked at.
fn exact_stack(tid: i32) -> Result<Option<String>, Errno> {
    let asleep = || matches!(proc::sleeps_in(tid), Ok(Some(_)));
    for _ in 0..3 {
        let before: Option<Runs> = proc::runs(tid).ok();
        let stack = proc::read_task_file(tid, "stack")?;
        let sleeps = asleep();
        let after = proc::runs(tid).ok();
        let functions: Vec<&str> = proc::stack_functions(&stack).collect();
        // On x86-64 nobody reads a stack in use: it is not begun while the
        // thread is on another processor, and then begins where it was
        // switched out last (`__unwind_start`, arch/x86/kernel/unwind_orc.c).
        // arm64 does not ask, so there the thread must sleep.
        let is_readable = sleeps || cfg!(target_arch = "x86_64");
        let is_whole = classify::is_whole(&functions) || sleeps && !functions.is_empty();
        if before.is_some() && before == after && is_readable && is_whole {
            return Ok(Some(stack));
        }
        if before.is_none() {
            // What cannot be counted must sleep all the while.
            return Ok((asleep() && sleeps && is_whole).then_some(stack));
        }
    }
    Ok(None)
}

/// Takes a thread's processor away from it for a moment, so that its stack can
/// be read.
fn visit(tid: i32) -> Option<String> {
    let home = sched_getaffinity(None).ok()?;
    let processor = proc::processor(tid).ok()?;
    let mut there = CpuSet::new();
    if processor >= CpuSet::MAX_CPU {
        return None;
    }
    there.set(processor);
    sched_setaffinity(None, &there).ok()?;
    // We are there, so it is not.
    let stack = exact_stack(tid).ok().flatten();
    let _ = sched_setaffinity(None, &home);
    stack
}

/// Looks at a thread. What is asked of it beyond a first look is read only
/// where it decides.
fn look(look_for: LookFor, subject: Subject, tid: i32, looks: u32) -> Seen {
    let Ok(sleeps_in) = proc::sleeps_in(tid) else {
        return Seen::Innocent;
    };
    if let Some(function) = &sleeps_in
        && suspicion::is_elsewhere(look_for, function)
    {
        return Seen::Innocent;
    }
    /// It was given time to sleep, or to give way, by itself.
    const LOOKS_FROM_AFAR: u32 = 3;
    // It is gone; or it has privileges that this process lacks.
    let Ok(stack) = exact_stack(tid) else {
        return Seen::Innocent;
    };
    let has_ended = || proc::has_ended(tid).unwrap_or(true);
    let visits = looks >= LOOKS_FROM_AFAR && stack.is_none() && !has_ended();
    let stack = stack.or_else(|| visits.then(|| visit(tid))?);
    let Some(stack) = stack else {
        // What has ended has no stack any more, and is not collected yet.
        if has_ended() {
            return Seen::Innocent;
        }
        return Seen::Running(Run::of(tid).unwrap_or(Run::ENDLESS));
    };
    let functions: Vec<&str> = proc::stack_functions(&stack).collect();
    let found = judge(look_for, &functions, subject.prefix);
    match found {
        Finding::Nothing => Seen::Innocent,
        Finding::MayByDescriptor(_) if has_other_files(subject.id, tid, &functions) => {
            Seen::Innocent
        }
        _ if look_for == LookFor::AllTruncations && opens_without_truncating(tid, &functions) => {
            Seen::Innocent
        }
        found => Seen::At(found),
    }
}

/// Whether a thread opens something by a call that does not truncate.
fn opens_without_truncating(tid: i32, functions: &[&str]) -> bool {
    let truncates = functions.iter().any(|name| name.contains("truncate"));
    !truncates
        && inside(tid).is_some_and(|syscall| {
            classify_open(Some(&syscall), functions) != OperationKind::OpenTruncate
        })
}

fn inside(tid: i32) -> Option<proc::Syscall> {
    let text = proc::read_task_file(tid, "syscall").ok()?;
    match proc::parse_syscall(text.as_bytes()) {
        Some(SyscallState::Inside(syscall)) => Some(syscall),
        _ => None,
    }
}

/// Whether a thread's call was made with descriptors of other files, and
/// nobody can have put those in the place of others since: the thread is its
/// process's only one, and no other process shares its table.
fn has_other_files(id: InodeId, tid: i32, functions: &[&str]) -> bool {
    let Some(syscall) = inside(tid) else {
        return false;
    };
    let Some(syscall) = classify::own_registers(Some(&syscall), functions) else {
        return false;
    };
    let Some(descriptors) = suspicion::descriptors(syscall) else {
        return false;
    };
    let are_others = || {
        descriptors.iter().all(|fd| {
            let link = format!("/proc/{tid}/fd/{fd}");
            crate::openers::identify(&link).is_some_and(|other| other != id)
        })
    };
    let is_alone = || proc::numbers_in(&format!("/proc/{tid}/task")).is_ok_and(|t| t.len() == 1);
    let shares = || {
        let pids = proc::numbers_in("/proc").unwrap_or_default();
        pids.into_iter()
            .any(|pid| pid != tid && kcmp::same_descriptors(tid, pid))
    };
    are_others() && is_alone() && !shares()
}

/// A process to look at, or a suspect to look at once more.
#[derive(Clone, Copy, Debug)]
enum Item {
    Process(i32),
    Suspect(Suspect),
}

impl Item {
    fn id(&self) -> i32 {
        match self {
            Self::Process(pid) => *pid,
            Self::Suspect(suspect) => suspect.tid,
        }
    }

    fn look(&self, look_for: LookFor, subject: Subject) -> Vec<Suspect> {
        match self {
            Self::Process(pid) => proc::numbers_in(&format!("/proc/{pid}/task"))
                .unwrap_or_default()
                .into_iter()
                .filter_map(|tid| {
                    let seen = look(look_for, subject, tid, 0);
                    let suspect = Suspect {
                        tid,
                        seen,
                        looks: 0,
                    };
                    (!matches!(seen, Seen::Innocent)).then_some(suspect)
                })
                .collect(),
            Self::Suspect(suspect) => suspect.look_again(look_for, subject).into_iter().collect(),
        }
    }
}

impl Suspect {
    fn look_again(self, look_for: LookFor, subject: Subject) -> Option<Self> {
        let looks = self.looks.saturating_add(1);
        let seen = match (self.seen, look(look_for, subject, self.tid, looks)) {
            (_, Seen::Innocent) => return None,
            (Seen::Running(had), Seen::Running(_)) if had.is_over(self.tid, look_for) => {
                return None;
            }
            // What counts is what it had run when that could be read first: one
            // that never ran has no count.
            (Seen::Running(had), Seen::Running(now)) => Seen::Running(had.or(now)),
            (_, seen) => seen,
        };
        Some(Self {
            tid: self.tid,
            seen,
            looks,
        })
    }

    fn into_busy(self) -> Busy {
        Busy {
            tid: self.tid,
            command: proc::command(self.tid),
            doing: match self.seen {
                Seen::At(
                    Finding::May(doing)
                    | Finding::MayByDescriptor(doing)
                    | Finding::IfFrozen(doing)
                    | Finding::IfLeased(doing)
                    | Finding::IfWatched(doing),
                ) => doing,
                Seen::Running(_) | Seen::Innocent | Seen::At(Finding::Nothing) => "running",
            },
        }
    }
}

/// What is left to look at, and what was found.
struct Work {
    left: Vec<Item>,
    found: Vec<Suspect>,
}

/// Looks at everything in `items`, and returns the suspects. A process in the
/// middle of `execve(2)`, where a look hangs, is none. Where a look hangs for
/// something else, or the system is so busy that there is no progress until
/// `limit`, there is no answer.
fn sweep(
    items: Vec<Item>,
    look_for: LookFor,
    subject: Subject,
    limit: Instant,
) -> Result<Vec<Suspect>, Stuck> {
    let work = Arc::new(Mutex::new(Work {
        left: items,
        found: Vec::new(),
    }));
    let retries = Retries::until(limit);
    loop {
        let shared = Arc::clone(&work);
        let looked = within(bounded::limit(limit), move |looking| {
            look_at_all(&shared, look_for, subject, looking);
        });
        let mut work = work.lock().unwrap_or_else(PoisonError::into_inner);
        match looked {
            Ok(()) => return Ok(std::mem::take(&mut work.found)),
            Err(stuck) if stuck.pid > 0 && stuck.is_in_execve() => {
                if work.left.last().is_some_and(|item| item.id() == stuck.pid) {
                    work.left.pop();
                }
            }
            Err(stuck) => {
                drop(work);
                retries.once_more(stuck)?;
            }
        }
    }
}

fn look_at_all(work: &Mutex<Work>, look_for: LookFor, subject: Subject, looking: &Looking) {
    let lock = || work.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let Some(item) = lock().left.last().copied() else {
            return;
        };
        // In the middle of execve(2): of nothing else, then.
        let found = match looking.at(item.id()) {
            Ok(()) => item.look(look_for, subject),
            Err(_) => Vec::new(),
        };
        let mut work = lock();
        // Given up before it took the lock: somebody else goes on from here.
        if looking.is_given_up() {
            return;
        }
        work.left.pop();
        work.found.extend(found);
    }
}

/// Every process of the system but this one.
fn everybody() -> Vec<Item> {
    let own = std::process::id().cast_signed();
    proc::numbers_in("/proc")
        .unwrap_or_default()
        .into_iter()
        .filter(|pid| *pid != own)
        .map(Item::Process)
        .collect()
}

/// Whether every thread of a process sleeps, none of them changing a file.
pub(crate) fn is_at_rest(pid: i32) -> bool {
    let subject = Subject {
        id: InodeId { dev: 0, inode: 0 },
        // Whatever it is of.
        prefix: Prefix(""),
    };
    let threads = proc::numbers_in(&format!("/proc/{pid}/task")).unwrap_or_default();
    !threads.is_empty()
        && threads
            .into_iter()
            .all(|tid| matches!(look(LookFor::Changes, subject, tid, 0), Seen::Innocent))
}

/// How long to wait for threads to get through, before asking whether their
/// filesystem is frozen.
const BEFORE_ASKING: Duration = Duration::from_millis(50);
/// How often to look again at least, however little time there is: a thread
/// that was taken off its processor needs a chance to get back.
const LEAST_LOOKS: u32 = 20;

/// A file that nobody shall be in the middle of changing.
pub(crate) struct Quiet<'a> {
    /// Any descriptor of it.
    pub(crate) file: BorrowedFd<'a>,
    pub(crate) id: InodeId,
    /// What the names of its filesystem's functions begin with.
    pub(crate) prefix: Prefix,
    /// Threads that wait at the gate: they have not passed it.
    pub(crate) held: &'a dyn Fn() -> Arc<Vec<i32>>,
    pub(crate) deadline: Instant,
}

impl Quiet<'_> {
    fn subject(&self) -> Subject {
        Subject {
            id: self.id,
            prefix: self.prefix,
        }
    }

    /// Waits until every truncation by path that began before this call has
    /// either finished or is counted by the inode; ask for a lease then.
    /// Tells who may still be at it when the time is over.
    pub(crate) fn wait_for_truncations(&self, scans: &Scans) -> Result<Vec<Busy>, Stuck> {
        // This does not depend on the file: all grants share it.
        let found = scans.truncations.sweep(self.subject(), self.deadline)?;
        self.wait_for(LookFor::Truncations, found)
    }

    /// The same where a lease will be asked for that lets readers be.
    pub(crate) fn wait_for_all_truncations(&self) -> Result<Vec<Busy>, Stuck> {
        self.wait_for_everybody(LookFor::AllTruncations)
    }

    /// Waits until every open that began before this call has finished.
    pub(crate) fn wait_for_opens(&self) -> Result<Vec<Busy>, Stuck> {
        self.wait_for_everybody(LookFor::Opens)
    }

    /// Waits until everybody who was changing the file has finished.
    pub(crate) fn wait_for_changes(&self) -> Result<Vec<Busy>, Stuck> {
        self.wait_for_everybody(LookFor::Changes)
    }

    /// The same where it is known that nobody else can write to it.
    pub(crate) fn wait_for_readers(&self) -> Result<Vec<Busy>, Stuck> {
        self.wait_for_everybody(LookFor::ChangesByReaders)
    }

    /// Waits until every mapping that was being made before this call shows in
    /// `/proc/<pid>/maps`.
    pub(crate) fn wait_for_mappings(&self) -> Result<Vec<Busy>, Stuck> {
        self.wait_for_everybody(LookFor::Mappings)
    }

    /// Waits until none of these threads is changing the file any more.
    pub(crate) fn wait_for_changes_by(&self, tids: &[i32]) -> Result<Vec<Busy>, Stuck> {
        self.wait_for_these(LookFor::Changes, tids)
    }

    /// Waits until none of these threads is making a mapping any more.
    pub(crate) fn wait_for_mappings_by(&self, tids: &[i32]) -> Result<Vec<Busy>, Stuck> {
        self.wait_for_these(LookFor::Mappings, tids)
    }

    fn wait_for_everybody(&self, look_for: LookFor) -> Result<Vec<Busy>, Stuck> {
        let found = sweep(everybody(), look_for, self.subject(), self.deadline)?;
        self.wait_for(look_for, found)
    }

    fn wait_for_these(&self, look_for: LookFor, tids: &[i32]) -> Result<Vec<Busy>, Stuck> {
        let suspects = tids.iter().map(|tid| Suspect {
            tid: *tid,
            seen: Seen::At(Finding::May("running")),
            looks: 0,
        });
        self.wait_for(look_for, suspects.collect())
    }

    /// Looks at the suspects until there is none left, or the time is over and
    /// each has been looked at often enough. Those that begin later are not
    /// waited for: they meet a closed gate. Nor are those that `held` names:
    /// they have not passed it.
    fn wait_for(&self, look_for: LookFor, mut suspects: Vec<Suspect>) -> Result<Vec<Busy>, Stuck> {
        let begun = Instant::now();
        let mut facts = Facts::default();
        let mut looks = 0;
        let mut backoff = Backoff::until(
            self.deadline,
            Duration::from_micros(100),
            Duration::from_millis(5),
        );
        while !suspects.is_empty() {
            let waiting = (self.held)();
            suspects.retain(|suspect| !waiting.contains(&suspect.tid));
            let items = suspects.into_iter().map(Item::Suspect).collect();
            suspects = sweep(items, look_for, self.subject(), self.deadline)?;
            let asks = begun.elapsed() >= BEFORE_ASKING || looks >= LEAST_LOOKS;
            suspects.retain(|suspect| match suspect.seen {
                Seen::At(Finding::IfFrozen(_)) if asks => facts.is_frozen(self),
                Seen::At(Finding::IfWatched(_)) if asks => facts.is_watched(self),
                Seen::At(Finding::IfLeased(_)) => is_leased(self.id),
                _ => true,
            });
            looks += 1;
            if backoff.is_over() && looks >= LEAST_LOOKS {
                break;
            }
            backoff.pause();
        }
        Ok(suspects.into_iter().map(Suspect::into_busy).collect())
    }
}

/// Whether there is a lease on an inode that somebody could wait for. Yes, if
/// that cannot be told.
fn is_leased(id: InodeId) -> bool {
    let device = id.device();
    proc_locks::read_all().map_or(true, |locks| {
        locks.iter().any(|lock| {
            lock.kind == proc_locks::Kind::Lease
                && lock.inode == id.inode
                && (lock.major, lock.minor) == (device.major, device.minor)
        })
    })
}

/// What is asked once at most for a wait.
#[derive(Default)]
struct Facts {
    frozen: Option<bool>,
    watched: Option<bool>,
}

impl Facts {
    /// Who sleeps waiting for a thaw waits for another filesystem's, if this
    /// one is not frozen. It stays asked until then.
    fn is_frozen(&mut self, quiet: &Quiet<'_>) -> bool {
        let frozen = match self.frozen {
            Some(false) => false,
            _ => !thaw::is_thawed(quiet.file, quiet.deadline),
        };
        self.frozen = Some(frozen);
        frozen
    }

    /// Who waits for an answer that is not ours waits for another listener's.
    fn is_watched(&mut self, quiet: &Quiet<'_>) -> bool {
        *self
            .watched
            .get_or_insert_with(|| listeners::others_may_watch(quiet.id, quiet.deadline))
    }
}

/// Sweeps of all threads of the system, one for all grants that wait for one:
/// those that close their gate before a sweep begins share what it finds.
#[derive(Debug)]
pub(crate) struct Scans {
    truncations: Scan,
}

impl Default for Scans {
    fn default() -> Self {
        Self {
            truncations: Scan::new(LookFor::Truncations),
        }
    }
}

/// Sweeps for one thing.
#[derive(Debug)]
struct Scan {
    look_for: LookFor,
    state: Mutex<ScanState>,
    changed: Condvar,
}

#[derive(Debug)]
struct ScanState {
    /// Sweeps begun, and sweeps finished.
    begun: u64,
    finished: u64,
    running: bool,
    /// What the last finished sweep found, or why it came to nothing.
    outcome: Result<Vec<Suspect>, Stuck>,
}

impl Default for ScanState {
    fn default() -> Self {
        Self {
            begun: 0,
            finished: 0,
            running: false,
            outcome: Ok(Vec::new()),
        }
    }
}

impl Scan {
    fn new(look_for: LookFor) -> Self {
        Self {
            look_for,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Everybody who may be at it and began before this call. One that was
    /// given up by who began it is no answer for others: they begin anew.
    fn sweep(&self, subject: Subject, deadline: Instant) -> Result<Vec<Suspect>, Stuck> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // A sweep that is running now may have passed a thread before it went
        // into the kernel: the next one counts.
        let wanted = state.begun + 1;
        loop {
            if state.finished >= wanted
                && let Ok(found) = &state.outcome
            {
                return Ok(found.clone());
            }
            if !state.running {
                state.running = true;
                state.begun += 1;
                drop(state);
                let outcome = sweep(everybody(), self.look_for, subject, deadline);
                state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                state.running = false;
                state.finished = state.begun;
                state.outcome = outcome.clone();
                self.changed.notify_all();
                return outcome;
            }
            let left = bounded::limit(deadline);
            let (again, waited) = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
            if waited.timed_out() {
                return Err(bounded::oldest());
            }
            state = again;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

    fn subject() -> Subject {
        Subject {
            id: InodeId { dev: 0, inode: 0 },
            prefix: Prefix("xfs_"),
        }
    }

    #[test]
    fn scans_are_shared_and_end() {
        let scan = Scan::new(LookFor::Truncations);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let late = Instant::now() + Duration::from_secs(60);
                    scan.sweep(subject(), late)
                });
            }
        });
        let state = scan.state.lock().unwrap();
        assert!(state.begun <= 9 && state.finished == state.begun);
    }

    /// A thread that never leaves its processor by itself is seen all the same.
    #[test]
    fn a_thread_that_runs_is_visited() {
        if !rustix::process::geteuid().is_root() || cfg!(not(target_arch = "x86_64")) {
            // Stacks are root's to read.
            return;
        }
        let over = AtomicBool::new(false);
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                tell.send(rustix::thread::gettid().as_raw_nonzero().get())
                    .unwrap();
                while !over.load(SeqCst) {
                    std::hint::spin_loop();
                }
            });
            let tid = told.recv().unwrap();
            let seen = (0..100).find_map(|_| visit(tid));
            over.store(true, SeqCst);
            let stack = seen.unwrap();
            let functions: Vec<&str> = proc::stack_functions(&stack).collect();
            assert_eq!(
                judge(LookFor::Changes, &functions, Prefix("")),
                Finding::Nothing
            );
        });
    }

    /// A process that nobody has collected yet is in the middle of nothing.
    #[test]
    fn what_has_ended_is_no_suspect() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id().cast_signed();
        while !proc::has_ended(pid).unwrap() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let looks = [LookFor::Truncations, LookFor::Opens, LookFor::Changes];
        for (look_for, looks) in looks.into_iter().zip(0..) {
            let seen = look(look_for, subject(), pid, looks);
            assert!(matches!(seen, Seen::Innocent), "{seen:?}");
        }
        child.wait().unwrap();
    }

    #[test]
    fn what_was_not_counted_yet_counts_from_later() {
        let later = Run { all: 7, outside: 1 };
        assert_eq!(Run::ENDLESS.or(later).all, 7);
        let had = Run { all: 5, outside: 1 };
        assert_eq!(had.or(later).all, 5);
    }

    #[test]
    fn a_thread_that_sleeps_is_read_exactly() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let (release, released) = std::sync::mpsc::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let sleeper = std::thread::spawn(move || {
            tell.send(rustix::thread::gettid().as_raw_nonzero().get())
                .unwrap();
            let _ = released.recv();
        });
        let tid = told.recv().unwrap();
        let stack = (0..1000).find_map(|_| {
            std::thread::sleep(Duration::from_millis(1));
            exact_stack(tid)
                .unwrap()
                .filter(|stack| stack.contains("futex"))
        });
        assert!(stack.is_some());
        drop(release);
        sleeper.join().unwrap();
        assert!(exact_stack(tid).is_err());
    }
}
