//! Who may be in the middle of changing a file.
//!
//! A lease proves that nobody has a file open, but a truncation by path needs
//! no description, and what the gate let in through one behind it may still
//! be under way. Both are looked for among all threads of the system.

use crate::bounded::{self, Looking, Stuck, within};
use crate::gate::classify::{self, classify_open};
use crate::policy::OperationKind;
use crate::thaw;
use crate::wake::Backoff;
use mapdirect_sys::proc::{self, Syscall, SyscallState};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A thread that may be in the middle of something.
#[derive(Clone, Debug)]
pub(crate) struct Busy {
    pub(crate) tid: i32,
    pub(crate) command: String,
    pub(crate) doing: &'static str,
    /// What it had run when it was first seen running, if it was.
    had: Option<Run>,
}

impl Busy {
    /// It is on a processor, or waits for one, and cannot be looked at.
    pub(crate) fn runs(&self) -> bool {
        self.had.is_some()
    }
}

/// What a scan looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LookFor {
    /// Truncation by path, which needs no description. A lease asked for
    /// afterwards counts whoever is past the permission check by then.
    Truncations,
    /// Opens of any kind.
    Opens,
    /// Whatever may change a block map.
    Changes,
    /// Making mappings.
    Mappings,
}

/// The functions a thread is inside of while it truncates by path or opens
/// with `O_TRUNC`, from before the permission check to the end.
const TRUNCATING: [&str; 5] = [
    "vfs_truncate",
    "do_sys_truncate",
    "do_truncate",
    "handle_truncate",
    "notify_change",
];

/// The functions a thread is inside of while it changes a file.
const CHANGING: [&str; 27] = [
    "vfs_write",
    "vfs_writev",
    "vfs_iter_write",
    "vfs_iocb_iter_write",
    "do_iter_write",
    "aio_write",
    "io_write",
    "vfs_fallocate",
    "do_ftruncate",
    "do_sys_ftruncate",
    "vfs_truncate",
    "do_sys_truncate",
    "do_truncate",
    "notify_change",
    "vfs_clone_file_range",
    "vfs_dedupe_file_range",
    "vfs_copy_file_range",
    "do_splice",
    "do_sendfile",
    "splice_direct_to_actor",
    "xfs_exchange_range",
    "xfs_ioc_swapext",
    "xfs_swap_extents",
    "do_clone_file_range",
    "vfs_fileattr_set",
    "ext4_move_extents",
    "ext4_ioctl",
];

/// The functions a thread is inside of while it maps a file, from before the
/// permission check until the mapping shows.
const MAPPING: [&str; 5] = [
    "vm_mmap_pgoff",
    "ksys_mmap_pgoff",
    "do_mmap",
    "do_shmat",
    "__do_sys_remap_file_pages",
];

/// Where writes end that are none to a file.
const NOT_A_FILE: [&str; 10] = [
    // splice(2) and sendfile(2) from a file, for as long as nobody reads.
    "splice_file_to_pipe",
    "pipe_write",
    "anon_pipe_write",
    "sock_write_iter",
    "sock_sendmsg",
    "unix_stream_sendmsg",
    "tcp_sendmsg",
    "tty_write",
    "file_tty_write",
    "eventfd_write",
];

fn is_busy(look_for: LookFor, syscall: &Syscall, stack: &str) -> Option<&'static str> {
    let functions = || proc::stack_functions(stack);
    let names: Vec<&str> = functions().collect();
    // A FIFO only waits for its other end.
    let opening = || {
        functions().any(|name| name == "path_openat" || name == "do_open")
            && !functions().any(|name| name == "fifo_open")
    };
    let inside = |names: &'static [&'static str]| {
        names
            .iter()
            .copied()
            .find(|name| functions().any(|function| function == *name))
    };
    match look_for {
        LookFor::Truncations => inside(&TRUNCATING).or_else(|| {
            // Opening with O_TRUNC, or possibly so: it truncates after the
            // permission check.
            let truncates = classify_open(Some(syscall), &names) == OperationKind::OpenTruncate;
            (opening() && truncates).then_some("opening")
        }),
        LookFor::Opens => opening().then_some("opening"),
        LookFor::Changes => inside(&CHANGING).filter(|_| inside(&NOT_A_FILE).is_none()),
        LookFor::Mappings => inside(&MAPPING),
    }
}

/// A thread found on a processor, or waiting for one.
struct Running {
    tid: i32,
    /// What it had run when first seen.
    had: Run,
}

/// How much a thread has run.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// Nanoseconds in all (`/proc/<tid>/schedstat`, which every distribution
    /// kernel has: `CONFIG_SCHED_INFO`).
    all: u64,
    /// Clock ticks outside the kernel (`/proc/<tid>/stat`, field 14).
    outside: u64,
}

impl Run {
    /// More than any thread runs.
    const ENDLESS: Self = Self {
        all: u64::MAX / 2,
        outside: u64::MAX / 2,
    };

    fn of(tid: i32) -> Option<Self> {
        let schedstat = proc::read_task_file(tid, "schedstat").ok()?;
        let stat = proc::read_task_file(tid, "stat").ok()?;
        // The command in parentheses may hold anything, parentheses too.
        let (_, behind) = stat.rsplit_once(')')?;
        Some(Self {
            all: schedstat.split_ascii_whitespace().next()?.parse().ok()?,
            outside: behind.split_ascii_whitespace().nth(11)?.parse().ok()?,
        })
    }
}

impl Running {
    fn now(tid: i32) -> Self {
        // If it cannot be read, no run is enough.
        let had = Run::of(tid).unwrap_or(Run::ENDLESS);
        Self { tid, had }
    }

    /// Whether it has got out of what it may have been in the middle of, by
    /// what it has run since.
    fn has_moved_on(&self, look_for: LookFor) -> bool {
        let Some(now) = Run::of(self.tid) else {
            return false;
        };
        match look_for {
            // Past the few instructions between a permission check and the
            // counts that a lease looks at.
            LookFor::Truncations => now.all >= self.had.all + 50_000,
            // It has been outside of the kernel. What it has run is split by
            // the ticks that found it inside and outside (`cputime_adjust`,
            // kernel/sched/cputime.c): until the next tick finds it inside,
            // what it runs there is taken for outside. That is no more than
            // one of these, which are as long as the longest tick there is.
            LookFor::Opens | LookFor::Changes | LookFor::Mappings => {
                now.outside > self.had.outside.saturating_add(1)
            }
        }
    }
}

/// Threads that may be in the middle of something.
#[derive(Default)]
struct Suspects {
    sleeping: Vec<(i32, &'static str)>,
    running: Vec<Running>,
}

impl Suspects {
    /// Every thread of the system that is not idle.
    fn find(look_for: LookFor, looking: &Looking) -> Result<Self, Stuck> {
        let own_pid = std::process::id().cast_signed();
        let mut suspects = Self::default();
        for pid in proc::numbers_in("/proc").unwrap_or_default() {
            if pid == own_pid {
                continue;
            }
            looking.at(pid)?;
            for tid in proc::numbers_in(&format!("/proc/{pid}/task")).unwrap_or_default() {
                suspects.note(tid, look(look_for, tid));
            }
        }
        Ok(suspects)
    }

    fn note(&mut self, tid: i32, seen: Seen) {
        match seen {
            Seen::Idle => {}
            Seen::Busy(doing) => self.sleeping.push((tid, doing)),
            Seen::Running => self.running.push(Running::now(tid)),
        }
    }

    /// Those of them who still may be.
    fn look_again(self, look_for: LookFor, looking: &Looking) -> Result<Self, Stuck> {
        let mut left = Self::default();
        for (tid, _) in self.sleeping {
            looking.at(tid)?;
            left.note(tid, look(look_for, tid));
        }
        for thread in self.running {
            looking.at(thread.tid)?;
            match look(look_for, thread.tid) {
                Seen::Running if thread.has_moved_on(look_for) => {}
                Seen::Running => left.running.push(thread),
                seen => left.note(thread.tid, seen),
            }
        }
        Ok(left)
    }

    fn is_empty(&self) -> bool {
        self.sleeping.is_empty() && self.running.is_empty()
    }

    fn into_busy(self) -> Vec<Busy> {
        let busy = |tid, doing, had| Busy {
            tid,
            command: proc::command(tid),
            doing,
            had,
        };
        let asleep = self.sleeping.into_iter();
        let awake = self.running.into_iter();
        asleep
            .map(|(tid, doing)| busy(tid, doing, None))
            .chain(awake.map(|thread| busy(thread.tid, "running", Some(thread.had))))
            .collect()
    }
}

/// Looks at every thread of the system until none is busy any more or the
/// time is over, and tells who still is. Those that begin later are not
/// waited for: they meet a closed gate. Nor are those that `held` names: they
/// have not passed it. A process that cannot be looked at is waited for until
/// `limit`.
fn wait_for(
    look_for: LookFor,
    held: &dyn Fn() -> Arc<Vec<i32>>,
    deadline: Instant,
    limit: Instant,
) -> Result<Vec<Busy>, Stuck> {
    let mut suspects = loop {
        let found = within(bounded::limit(limit), move |looking| {
            Suspects::find(look_for, looking)
        });
        match found? {
            Ok(suspects) => break suspects,
            Err(stuck) if stuck.is_over_before(limit) => {}
            Err(stuck) => return Err(stuck),
        }
    };
    let mut backoff = Backoff::until(
        deadline,
        Duration::from_micros(100),
        Duration::from_millis(5),
    );
    while !suspects.is_empty() {
        let waiting = held();
        suspects.sleeping.retain(|(tid, _)| !waiting.contains(tid));
        suspects = within(bounded::limit(limit), move |looking| {
            suspects.look_again(look_for, looking)
        })??;
        if backoff.is_over() {
            break;
        }
        backoff.pause();
    }
    Ok(suspects.into_busy())
}

/// Whether a thread that waits for a processor does so where it leaves the
/// kernel, with everything behind it: on a busy machine it may be long before
/// it runs again.
fn is_on_its_way_out(tid: i32) -> bool {
    // On x86-64 nobody reads a stack in use: it is not begun while the thread
    // is on another processor, and then begins where it was switched out last
    // (`__unwind_start`, arch/x86/kernel/unwind_orc.c). arm64 does not ask.
    cfg!(target_arch = "x86_64")
        && proc::read_task_file(tid, "stack").is_ok_and(|stack| leaves(&stack))
}

/// Whether a stack is that of a thread which gave way to others right before
/// it leaves the kernel. What it has left to do there (`task_work_run`) is not
/// begun, and meets a closed gate.
fn leaves(stack: &str) -> bool {
    let functions: Vec<&str> = proc::stack_functions(stack).collect();
    let innermost = functions
        .iter()
        .find(|function| !matches!(**function, "schedule" | "__schedule"));
    classify::is_whole(&functions)
        && matches!(
            innermost,
            Some(&("exit_to_user_mode_loop" | "irqentry_exit_to_user_mode"))
        )
}

enum Seen {
    Idle,
    Busy(&'static str),
    Running,
}

fn look(look_for: LookFor, tid: i32) -> Seen {
    let Ok(text) = proc::read_task_file(tid, "syscall") else {
        return Seen::Idle;
    };
    match proc::parse_syscall(text.as_bytes()) {
        Some(SyscallState::Running) if is_on_its_way_out(tid) => Seen::Idle,
        Some(SyscallState::Running) => Seen::Running,
        Some(SyscallState::Inside(syscall)) => {
            let Ok(stack) = proc::read_task_file(tid, "stack") else {
                return Seen::Idle;
            };
            let functions: Vec<&str> = proc::stack_functions(&stack).collect();
            // It woke up just now: the stack breaks off, or is what it was in
            // an earlier sleep.
            if !classify::is_whole(&functions) {
                return Seen::Running;
            }
            is_busy(look_for, &syscall, &stack).map_or(Seen::Idle, Seen::Busy)
        }
        _ => Seen::Idle,
    }
}

/// Whether every thread of a process sleeps, none of them changing a file.
pub(crate) fn is_at_rest(pid: i32) -> bool {
    let threads = proc::numbers_in(&format!("/proc/{pid}/task")).unwrap_or_default();
    !threads.is_empty()
        && threads
            .into_iter()
            .all(|tid| matches!(look(LookFor::Changes, tid), Seen::Idle))
}

/// Whether any of the threads found busy can still be about to change a file
/// of this filesystem, which is not frozen: a thread that sleeps waiting for
/// a thaw waits for another one.
fn still_busy_here(
    look_for: LookFor,
    mut left: Vec<Busy>,
    held: &dyn Fn() -> Arc<Vec<i32>>,
    deadline: Instant,
) -> Result<Vec<Busy>, Stuck> {
    loop {
        // Whoever has come to the gate since is out of it.
        let waiting = held();
        left.retain(|busy| !waiting.contains(&busy.tid));
        left = within(bounded::limit(deadline), move |looking| {
            stay_busy(look_for, left, looking)
        })??;
        if left.is_empty() || Instant::now() >= deadline {
            return Ok(left);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Those who still are busy, and not because they wait for a thaw.
fn stay_busy(
    look_for: LookFor,
    mut left: Vec<Busy>,
    looking: &Looking,
) -> Result<Vec<Busy>, Stuck> {
    let mut stuck = Ok(());
    left.retain_mut(|busy| {
        if let Err(there) = looking.at(busy.tid) {
            stuck = Err(there);
            return true;
        }
        match look(look_for, busy.tid) {
            Seen::Idle => false,
            Seen::Running => {
                // Woken by a thaw, perhaps: it will tell when it sleeps
                // again, or has run for long enough.
                let tid = busy.tid;
                let had = *busy.had.get_or_insert_with(|| Running::now(tid).had);
                !Running { tid, had }.has_moved_on(look_for)
            }
            Seen::Busy(_) => !waits_for_thaw(busy.tid),
        }
    });
    stuck.map(|()| left)
}

/// How long to wait for threads to get through, before asking whether their
/// filesystem is frozen.
const BEFORE_ASKING: Duration = Duration::from_millis(50);

/// A file that nobody shall be in the middle of changing.
pub(crate) struct Quiet<'a> {
    /// Any descriptor of it.
    pub(crate) file: BorrowedFd<'a>,
    /// Threads that wait at the gate: they have not passed it.
    pub(crate) held: &'a dyn Fn() -> Arc<Vec<i32>>,
    pub(crate) deadline: Instant,
}

impl Quiet<'_> {
    /// Waits until every truncation by path that began before this call has
    /// either finished or is counted by the inode; ask for a lease then.
    /// Tells who may still be at it when the time is over.
    pub(crate) fn wait_for_truncations(&self, scans: &Scans) -> Result<Vec<Busy>, Stuck> {
        let scan = &scans.truncations;
        let busy = scan.wait(self.held, BEFORE_ASKING, self.deadline)?;
        self.leave_out_other_filesystems(LookFor::Truncations, busy)
    }

    /// Waits until every open that began before this call has finished.
    pub(crate) fn wait_for_opens(&self) -> Result<Vec<Busy>, Stuck> {
        wait_for(LookFor::Opens, self.held, self.deadline, self.deadline)
    }

    /// Waits until every mapping that was being made before this call shows in
    /// `/proc/<pid>/maps`.
    pub(crate) fn wait_for_mappings(&self, scans: &Scans) -> Result<Vec<Busy>, Stuck> {
        let scan = &scans.mappings;
        let busy = scan.wait(self.held, BEFORE_ASKING, self.deadline)?;
        still_busy_here(LookFor::Mappings, busy, self.held, self.deadline)
    }

    /// Waits until everybody who was changing any file has finished.
    pub(crate) fn wait_for_changes(&self, scans: &Scans) -> Result<Vec<Busy>, Stuck> {
        let scan = &scans.changes;
        let busy = scan.wait(self.held, BEFORE_ASKING, self.deadline)?;
        self.leave_out_other_filesystems(LookFor::Changes, busy)
    }

    /// If it is not this filesystem that is frozen, whoever waits for a thaw
    /// waits for another.
    fn leave_out_other_filesystems(
        &self,
        look_for: LookFor,
        busy: Vec<Busy>,
    ) -> Result<Vec<Busy>, Stuck> {
        if busy.is_empty() || !thaw::is_thawed(self.file, self.deadline) {
            return Ok(busy);
        }
        still_busy_here(look_for, busy, self.held, self.deadline)
    }
}

/// Whether a thread sleeps waiting for a filesystem to thaw: in
/// `sb_start_write`, which is inlined into `mnt_want_write`.
fn waits_for_thaw(tid: i32) -> bool {
    proc::read_task_file(tid, "stack").is_ok_and(|stack| {
        proc::stack_functions(&stack).any(|function| {
            matches!(
                function,
                "mnt_want_write" | "sb_start_write" | "__sb_start_write"
            ) || function.starts_with("percpu_rwsem_wait")
                || function.starts_with("__percpu_down_read")
        })
    })
}

/// Scans of all threads of the system, one for all grants that wait for one:
/// those that close their gate before a scan begins share it.
#[derive(Debug)]
pub(crate) struct Scans {
    /// A truncation by path has no description that a lease could count, so a
    /// thread caught between its permission check and the truncation must be
    /// looked for.
    truncations: Scan,
    changes: Scan,
    mappings: Scan,
}

impl Default for Scans {
    fn default() -> Self {
        Self {
            truncations: Scan::new(LookFor::Truncations),
            changes: Scan::new(LookFor::Changes),
            mappings: Scan::new(LookFor::Mappings),
        }
    }
}

/// Scans for one thing.
#[derive(Debug)]
struct Scan {
    look_for: LookFor,
    state: Mutex<ScanState>,
    changed: Condvar,
}

#[derive(Debug)]
struct ScanState {
    /// Scans begun, and scans finished.
    begun: u64,
    finished: u64,
    running: bool,
    /// What the last finished scan left, or why it came to nothing.
    outcome: Result<Vec<Busy>, Stuck>,
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

    /// Waits until nothing of it is under way that began before this call, and
    /// tells who still is at it when the time is over.
    fn wait(
        &self,
        held: &dyn Fn() -> Arc<Vec<i32>>,
        patience: Duration,
        deadline: Instant,
    ) -> Result<Vec<Busy>, Stuck> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // A scan that is running now may have passed a thread before it went
        // into the kernel: the next one counts.
        let wanted = state.begun + 1;
        loop {
            if state.finished >= wanted {
                match &state.outcome {
                    // Whoever began it may have been less patient.
                    Err(_) if Instant::now() < deadline => {}
                    outcome => return outcome.clone(),
                }
            }
            if !state.running {
                state.running = true;
                state.begun += 1;
                drop(state);
                let soon = Instant::now() + patience;
                let outcome = wait_for(self.look_for, held, soon, deadline);
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

    fn truncating(number: i64, stack: &str) -> Option<&'static str> {
        let syscall = Syscall {
            number,
            args: [0, 0, 0o2001, 0, 0, 0],
            sp: 1,
            pc: 1,
        };
        is_busy(LookFor::Truncations, &syscall, stack)
    }

    #[test]
    fn truncations_by_path_are_seen_and_fifos_are_not() {
        let frozen = "[<0>] percpu_rwsem_wait+0x1/0x2\n[<0>] vfs_truncate+0x1/0x2\n";
        assert_eq!(truncating(76, frozen), Some("vfs_truncate"));
        let fifo = "[<0>] fifo_open+0x1/0x2\n[<0>] do_dentry_open+0x1/0x2\n\
                    [<0>] path_openat+0x1/0x2\n";
        assert_eq!(truncating(437, fifo), None);
        let opening = "[<0>] xfs_ilock+0x1/0x2\n[<0>] path_openat+0x1/0x2\n\
                       [<0>] do_sys_openat2+0x1/0x2\n";
        assert_eq!(truncating(437, opening), Some("opening"));
        assert_eq!(truncating(257, opening), None, "no O_TRUNC among its flags");
    }

    #[test]
    fn whoever_leaves_the_kernel_has_done_everything() {
        let out = "[<0>] irqentry_exit_to_user_mode+0x110/0x1a0\n\
                   [<0>] asm_sysvec_apic_timer_interrupt+0x1a/0x20\n";
        assert!(leaves(out));
        let out = "[<0>] exit_to_user_mode_loop+0x51/0xe0\n[<0>] do_syscall_64+0x23b/0x280\n\
                   [<0>] entry_SYSCALL_64_after_hwframe+0x76/0x7e\n";
        assert!(leaves(out));
        let broken_off = "[<0>] exit_to_user_mode_loop+0x51/0xe0\n";
        assert!(!leaves(broken_off));
        let work = "[<0>] io_write+0x51/0xe0\n[<0>] task_work_run+0x51/0xe0\n\
                    [<0>] exit_to_user_mode_loop+0x51/0xe0\n\
                    [<0>] entry_SYSCALL_64_after_hwframe+0x76/0x7e\n";
        assert!(!leaves(work));
        assert!(!leaves(""));
    }

    #[test]
    fn a_write_to_a_pipe_is_no_change() {
        let syscall = Syscall {
            number: 1,
            args: [0; 6],
            sp: 1,
            pc: 1,
        };
        let pipe = "[<0>] anon_pipe_write+0x1/0x2\n[<0>] vfs_write+0x1/0x2\n";
        assert_eq!(is_busy(LookFor::Changes, &syscall, pipe), None);
        let file = "[<0>] percpu_rwsem_wait+0x1/0x2\n[<0>] vfs_write+0x1/0x2\n";
        assert_eq!(is_busy(LookFor::Changes, &syscall, file), Some("vfs_write"));
    }

    #[test]
    fn scans_are_shared_and_end() {
        let scan = Scan::new(LookFor::Truncations);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let late = Instant::now() + Duration::from_secs(60);
                    scan.wait(&Arc::default, Duration::from_millis(200), late)
                });
            }
        });
        let state = scan.state.lock().unwrap();
        assert!(state.begun <= 9 && state.finished == state.begun);
    }
}
