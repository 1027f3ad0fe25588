//! Looks around in `/proc`, for a limited time.
//!
//! Most of what `/proc` tells about a process cannot be read while that process
//! is in the middle of `execve(2)`. The kernel holds the `exec_update_lock` of
//! the process from the exchange of its memory until the descriptors marked
//! close-on-exec are closed (`begin_new_exec`, fs/exec.c). If one of these
//! steps waits for something that never comes, such as an answer of a FUSE
//! server, then a reader waits for ever, and cannot be interrupted. So every
//! look runs in a thread of its own, which is abandoned when it takes too long.
//!
//! Even a look that hangs says something. A thread that waits for
//! `exec_update_lock` (`lock_trace`, fs/proc/base.c; `mm_access`,
//! kernel/fork.c) waits for a process that is past `de_thread`: the only thread
//! of that process is in the middle of `execve(2)` and of nothing else. So
//! [`Stuck::is_in_execve`] checks in which function the hanging thread of
//! *this* process sleeps, and how many threads the other process has. (From
//! Linux 7.0 Landlock takes the same lock in a process with other threads; the
//! thread count tells.)
//!
//! Counting the threads can hang, too. `/proc/<pid>` and `/proc/<pid>/task` can
//! be locked for any length of time: by somebody who lists them into a page of
//! a FUSE file while somebody else waits to mount there. So each look that
//! takes long gets a second thread ([`Look::answer`]) that says whether the
//! look hangs. If the second thread does not answer, the look counts as not
//! hanging.

use mapdirect_sys::descriptors::spawn_apart;
use mapdirect_sys::proc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

/// The most looks under way at any time, including those that hang.
const MOST: usize = 512;

/// How much longer than the given patience a look may take, so that a busy
/// processor is not mistaken for a process that cannot be looked at.
const GRACE: Duration = Duration::from_millis(200);

/// How often to check whether a look hangs. The result is used the next time.
const A_WHILE: Duration = Duration::from_millis(10);

static LOOKS: Looks = Looks::new(MOST, hangs_for_execve);

/// A process could not be looked at in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stuck {
    /// The process, or 0 if no look was even begun.
    pub(crate) pid: i32,
}

impl Stuck {
    /// Says for a person what could not be done.
    pub(crate) fn obstacle(self) -> String {
        if self.pid == 0 {
            return String::from("there was no time to look at the processes of the system");
        }
        format!(
            "process {} ({}) cannot be looked at: it has been in the middle of execve(2), or \
             the system too busy, for all that time",
            self.pid,
            // The command can be read even then, unless the directory in /proc
            // is locked.
            within(GRACE, move |_| proc::command(self.pid)).unwrap_or_else(|_| String::from("?"))
        )
    }

    /// Whether a look still hangs at the process because the process is in the
    /// middle of `execve(2)`.
    pub(crate) fn is_in_execve(self) -> bool {
        LOOKS.hangs_for_execve(self.pid)
    }
}

/// Whether thread `tid` of this process waits for process `pid` to finish
/// `execve(2)`. This may hang.
fn hangs_for_execve(tid: i32, pid: i32) -> bool {
    // The order matters: if the process has one thread while the look waits, it
    // has had one since the look began to wait, unless the look went on.
    let alone =
        || proc::numbers_in(&format!("/proc/{pid}/task")).is_ok_and(|threads| threads.len() == 1);
    let waits = || {
        proc::sleeps_in(tid).is_ok_and(|function| {
            function.is_some_and(|function| {
                // The lock is taken in functions that may be inlined: those
                // that read a file of `/proc` or the name of a namespace, look
                // at memory, or compare descriptors.
                let waits_in = [
                    "lock_trace",
                    "proc_pid_",
                    "proc_ns_",
                    "call_proc_get_link",
                    "mm_access",
                    "kcmp",
                    "__do_sys_kcmp",
                    "down_read_killable",
                    "rwsem_down_read",
                ];
                waits_in.iter().any(|name| function.starts_with(name))
            })
        })
    };
    waits() && alone() && waits()
}

/// A look under way.
#[derive(Debug, Default)]
struct Look {
    /// The process that is being looked at.
    pid: AtomicI32,
    /// The thread that looks.
    tid: AtomicI32,
    /// Whether nobody waits for this look any more.
    is_given_up: AtomicBool,
    examination: Mutex<Examination>,
    /// Signalled when something in the examination has changed.
    changed: Condvar,
}

/// What the second thread of a look finds out about the look.
#[derive(Debug, Default)]
struct Examination {
    /// Whether there is such a thread.
    is_under_way: bool,
    /// How often the question was asked, and how many of these questions have
    /// been answered.
    asked: u64,
    answered: u64,
    /// The process at which the look hung at the last answer, or 0.
    at: i32,
    /// Whether the look has ended.
    is_over: bool,
}

impl Examination {
    /// Whether the look hangs, unless it has gone on since.
    fn hangs_at(&self, look: &Look) -> bool {
        self.at > 0 && self.at == look.pid.load(SeqCst)
    }
}

/// The number of second threads, including those that hang.
static EXAMINERS: AtomicUsize = AtomicUsize::new(0);

/// Counts one second thread as long as this value lives.
struct Examiner;

impl Examiner {
    fn new() -> Option<Self> {
        let one_more = |examiners| (examiners < MOST).then_some(examiners + 1);
        EXAMINERS.fetch_update(SeqCst, SeqCst, one_more).ok()?;
        Some(Self)
    }
}

impl Drop for Examiner {
    fn drop(&mut self) {
        EXAMINERS.fetch_sub(1, SeqCst);
    }
}

impl Look {
    fn examination(&self) -> MutexGuard<'_, Examination> {
        self.examination
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks once more whether the look hangs. Returns `None` if no second
    /// thread can be had.
    fn ask(
        self: &Arc<Self>,
        is_in_execve: fn(i32, i32) -> bool,
    ) -> Option<MutexGuard<'_, Examination>> {
        let mut examination = self.examination();
        examination.asked += 1;
        if !examination.is_under_way {
            let examiner = Examiner::new()?;
            let look = Arc::clone(self);
            let builder = std::thread::Builder::new()
                .name(String::from("examine"))
                .stack_size(256 * 1024);
            let spawned = spawn_apart(builder, None, move || {
                let _examiner = examiner;
                look.answer(is_in_execve);
            });
            spawned.ok()?;
            examination.is_under_way = true;
        }
        self.changed.notify_all();
        Some(examination)
    }

    /// Whether the look hung at the last answer. Also asks for the next answer,
    /// but does not wait for it.
    fn hung_lately(self: &Arc<Self>, is_in_execve: fn(i32, i32) -> bool) -> bool {
        self.ask(is_in_execve)
            .is_some_and(|examination| examination.hangs_at(self))
    }

    /// Whether the look hangs, checked after this call. `false` if that cannot
    /// be found out within `limit`.
    fn hangs(self: &Arc<Self>, is_in_execve: fn(i32, i32) -> bool, limit: Duration) -> bool {
        let Some(examination) = self.ask(is_in_execve) else {
            return false;
        };
        let asked = examination.asked;
        let is_waited_for =
            |examination: &mut Examination| examination.answered < asked && !examination.is_over;
        let (examination, _) = self
            .changed
            .wait_timeout_while(examination, limit, is_waited_for)
            .unwrap_or_else(PoisonError::into_inner);
        examination.answered >= asked && examination.hangs_at(self)
    }

    /// Answers the question whether the look hangs, as often as it is asked,
    /// until the look has ended.
    fn answer(&self, is_in_execve: fn(i32, i32) -> bool) {
        let mut examination = self.examination();
        loop {
            examination = self
                .changed
                .wait_while(examination, |one| one.answered == one.asked && !one.is_over)
                .unwrap_or_else(PoisonError::into_inner);
            if examination.is_over {
                return;
            }
            let asked = examination.asked;
            drop(examination);
            let (tid, pid) = (self.tid.load(SeqCst), self.pid.load(SeqCst));
            let hangs = tid > 0 && pid > 0 && is_in_execve(tid, pid);
            examination = self.examination();
            examination.at = if hangs { pid } else { 0 };
            examination.answered = asked;
            self.changed.notify_all();
        }
    }

    /// Marks that the look has ended.
    fn end(&self) {
        self.examination().is_over = true;
        self.changed.notify_all();
    }
}

/// Records which process a look is at.
#[derive(Debug)]
pub(crate) struct Looking {
    looks: &'static Looks,
    look: Arc<Look>,
}

impl Looking {
    /// Notes that `pid` is looked at next.
    ///
    /// # Errors
    ///
    /// The process is in the middle of `execve(2)`, and an earlier look hangs
    /// there. This look would hang as well.
    pub(crate) fn at(&self, pid: i32) -> Result<(), Stuck> {
        // Noted in any case, because the caller may look all the same and hang.
        self.look.pid.store(pid, SeqCst);
        if self.looks.hangs_for_execve(pid) {
            return Err(Stuck { pid });
        }
        Ok(())
    }

    /// Whether nobody waits for the result any more.
    pub(crate) fn is_given_up(&self) -> bool {
        self.look.is_given_up.load(SeqCst)
    }
}

/// Runs `look` in a thread of its own and waits for the result, but not for
/// longer than `limit`, and not for a process in the middle of `execve(2)`. A
/// later result is dropped.
pub(crate) fn within<T: Send + 'static>(
    limit: Duration,
    look: impl FnOnce(&Looking) -> T + Send + 'static,
) -> Result<T, Stuck> {
    LOOKS.within(limit, look)
}

/// Limits how often a look is repeated that was given up for an `execve(2)`
/// that has since gone on.
///
/// A program that is only just starting can make a look wait for a moment, too.
/// That moment may be over when the caller asks again
/// ([`Stuck::is_in_execve`]).
#[derive(Debug)]
pub(crate) struct Retries(Instant);

impl Retries {
    pub(crate) fn until(limit: Instant) -> Self {
        Self(limit)
    }

    /// Waits a moment before the next look.
    ///
    /// # Errors
    ///
    /// `stuck`, if there is no time for another look.
    pub(crate) fn once_more(&self, stuck: Stuck) -> Result<(), Stuck> {
        if Instant::now() >= self.0 || stuck.pid <= 0 {
            return Err(stuck);
        }
        std::thread::sleep(Duration::from_millis(1));
        Ok(())
    }
}

/// The time limit of a look for a caller whose patience ends at `deadline`.
pub(crate) fn limit(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()) + GRACE
}

/// The process at which the oldest look is. Callers that share that look wait
/// for it.
pub(crate) fn oldest() -> Stuck {
    let looks = LOOKS.lock();
    Stuck {
        pid: looks.first().map_or(0, |look| look.pid.load(SeqCst)),
    }
}

/// All looks under way.
#[derive(Debug)]
struct Looks {
    under_way: Mutex<Vec<Arc<Look>>>,
    ended: Condvar,
    most: usize,
    /// Whether a thread of this process hangs at another process for its
    /// `execve(2)`.
    is_in_execve: fn(i32, i32) -> bool,
}

impl Looks {
    const fn new(most: usize, is_in_execve: fn(i32, i32) -> bool) -> Self {
        Self {
            under_way: Mutex::new(Vec::new()),
            ended: Condvar::new(),
            most,
            is_in_execve,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Look>>> {
        self.under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn hangs_for_execve(&self, pid: i32) -> bool {
        let there = self
            .lock()
            .iter()
            .find(|look| look.is_given_up.load(SeqCst) && look.pid.load(SeqCst) == pid)
            .cloned();
        there.is_some_and(|look| look.hangs(self.is_in_execve, GRACE))
    }

    fn within<T: Send + 'static>(
        &'static self,
        limit: Duration,
        look: impl FnOnce(&Looking) -> T + Send + 'static,
    ) -> Result<T, Stuck> {
        let deadline = Instant::now() + limit;
        let under_way = UnderWay {
            looks: self,
            look: self.begin(deadline)?,
        };
        let noted = Arc::clone(&under_way.look);
        let looking = Looking {
            looks: self,
            look: Arc::clone(&noted),
        };
        let (tell, told) = mpsc::channel();
        let builder = std::thread::Builder::new()
            .name(String::from("look"))
            .stack_size(256 * 1024);
        // A thread that hangs may be deaf even to SIGKILL. Nobody must have to
        // wait for its descriptors, least of all for those of a gate.
        let spawned = spawn_apart(builder, None, move || {
            // The look counts as under way until the result is sent.
            let _under_way = under_way;
            let tid = rustix::thread::gettid().as_raw_nonzero().get();
            looking.look.tid.store(tid, SeqCst);
            let seen = look(&looking);
            // Nobody receives the result any more if it took too long.
            let _ = tell.send(seen);
        });
        if spawned.is_err() {
            return Err(Stuck { pid: 0 });
        }
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if let Ok(seen) = told.recv_timeout(left.min(A_WHILE)) {
                return Ok(seen);
            }
            if left.is_zero() || noted.hung_lately(self.is_in_execve) {
                noted.is_given_up.store(true, SeqCst);
                let pid = noted.pid.load(SeqCst);
                return told.try_recv().map_err(|_| Stuck { pid });
            }
        }
    }

    /// Waits until there is room for another look.
    fn begin(&self, deadline: Instant) -> Result<Arc<Look>, Stuck> {
        let mut under_way = self.lock();
        while under_way.len() >= self.most {
            let left = deadline.saturating_duration_since(Instant::now());
            let hang = under_way.iter().all(|look| look.is_given_up.load(SeqCst));
            if hang || left.is_zero() {
                let pid = under_way.first().map_or(0, |look| look.pid.load(SeqCst));
                return Err(Stuck { pid });
            }
            (under_way, _) = self
                .ended
                .wait_timeout(under_way, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let look = Arc::new(Look::default());
        under_way.push(Arc::clone(&look));
        Ok(look)
    }
}

/// Makes room for another look when this value is dropped.
struct UnderWay {
    looks: &'static Looks,
    look: Arc<Look>,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.looks
            .lock()
            .retain(|look| !Arc::ptr_eq(look, &self.look));
        self.looks.ended.notify_one();
        self.look.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(50);
    const LATE: Duration = Duration::from_secs(60);

    fn looks(most: usize) -> &'static Looks {
        Box::leak(Box::new(Looks::new(most, |_, _| true)))
    }

    /// A look that hangs at a process until the sender is dropped.
    fn hang(looks: &'static Looks, pid: i32) -> (Result<(), Stuck>, mpsc::Sender<()>) {
        let (release, released) = mpsc::channel::<()>();
        let seen = looks.within(SOON, move |looking| {
            let _ = looking.at(pid);
            let _ = released.recv();
        });
        (seen, release)
    }

    #[test]
    fn a_look_tells_what_it_sees() {
        assert_eq!(looks(1).within(LATE, |_| 7), Ok(7));
        assert_eq!(within(LATE, |_| 7), Ok(7));
    }

    #[test]
    fn a_look_that_hangs_is_left_alone_and_names_the_process() {
        let looks = looks(2);
        let begun = Instant::now();
        let (seen, release) = hang(looks, 77);
        assert!(begun.elapsed() < LATE / 2);
        assert_eq!(seen, Err(Stuck { pid: 77 }));
        // The next one does not go there, and sees the rest.
        let next = looks.within(LATE, |looking| (looking.at(76), looking.at(77)));
        assert_eq!(next, Ok((Ok(()), Err(Stuck { pid: 77 }))));
        drop(release);
        while looks.hangs_for_execve(77) {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(looks.within(LATE, |looking| looking.at(77)), Ok(Ok(())));
    }

    #[test]
    fn a_look_that_is_only_slow_keeps_no_other_away() {
        let looks = Box::leak(Box::new(Looks::new(2, hangs_for_execve)));
        let (seen, _release) = hang(looks, 1);
        assert_eq!(seen, Err(Stuck { pid: 1 }));
        assert_eq!(looks.within(LATE, |looking| looking.at(1)), Ok(Ok(())));
    }

    /// Whoever finds out whether a look hangs may hang himself.
    #[test]
    fn nobody_waits_for_who_finds_out_whether_a_look_hangs() {
        fn never(_: i32, _: i32) -> bool {
            std::thread::sleep(LATE);
            true
        }
        let looks: &'static Looks = Box::leak(Box::new(Looks::new(2, never)));
        let begun = Instant::now();
        let (seen, release) = hang(looks, 78);
        assert_eq!(seen, Err(Stuck { pid: 78 }));
        assert!(!looks.hangs_for_execve(78), "that cannot be told");
        let next = looks.within(LATE, |looking| looking.at(78));
        assert_eq!(next, Ok(Ok(())));
        assert!(begun.elapsed() < LATE / 2);
        // The look ends all the same.
        drop(release);
        while !looks.lock().is_empty() {
            assert!(begun.elapsed() < LATE / 2);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn no_more_than_so_many_hang() {
        let looks = looks(3);
        let hanging: Vec<_> = (1..=3).map(|pid| hang(looks, pid)).collect();
        let begun = Instant::now();
        assert_eq!(looks.within(LATE, |_| ()), Err(Stuck { pid: 1 }));
        assert!(begun.elapsed() < LATE / 2, "at once");
        assert_eq!(looks.lock().len(), 3);
        drop(hanging);
        while !looks.lock().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(looks.within(LATE, |_| ()), Ok(()));
    }

    #[test]
    fn a_crowd_waits_for_its_turn() {
        let looks = looks(2);
        std::thread::scope(|scope| {
            for _ in 0..20 {
                scope.spawn(|| {
                    let pause = |_: &Looking| std::thread::sleep(Duration::from_millis(1));
                    assert_eq!(looks.within(LATE, pause), Ok(()));
                });
            }
        });
    }
}
