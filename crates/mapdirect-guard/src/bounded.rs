//! Looking around in `/proc`, for a limited time.
//!
//! Most of what `/proc` tells about a process cannot be read while that
//! process is in the middle of `execve(2)`: the kernel holds its
//! `exec_update_lock` from the exchange of the memory until the descriptors
//! marked close-on-exec are closed (`begin_new_exec`, fs/exec.c). If what one
//! of these steps waits for never comes, say an answer of a FUSE server, then
//! whoever reads waits for ever, and cannot be called back. So every look is
//! taken by a thread of its own, which is left alone when it takes too long.
//!
//! A look that hangs says something all the same. Whoever waits for
//! `exec_update_lock` (`lock_trace`, fs/proc/base.c; `mm_access`,
//! kernel/fork.c) waits for a process that is past `de_thread`: its one thread
//! is in the middle of `execve(2)` and of nothing else. So
//! [`Stuck::is_in_execve`] looks at what the hanging thread of *ours* sleeps in,
//! and how many threads the process has. (Landlock takes
//! the same lock in a process with other threads, from Linux 7.0: they count.)
//!
//! Counting them can hang, too: `/proc/<pid>` and `/proc/<pid>/task` are locked
//! for as long as somebody likes who lists them into a page of a FUSE file while
//! somebody else waits to mount there. So each look that takes long gets a
//! second thread ([`Look::answer`]) that says whether it hangs, and where that
//! does not answer, it does not.

use mapdirect_sys::descriptors::spawn_apart;
use mapdirect_sys::proc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

/// Looks under way at any time, those that hang included.
const MOST: usize = 512;

/// How much longer than somebody's patience a look may take, so that a busy
/// processor is not taken for a process that cannot be looked at.
const GRACE: Duration = Duration::from_millis(200);

/// How often to see whether a look hangs; what was found is seen the next time.
const A_WHILE: Duration = Duration::from_millis(10);

static LOOKS: Looks = Looks::new(MOST, hangs_for_execve);

/// A process could not be looked at in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stuck {
    /// Which; 0 if it was not even begun with any.
    pub(crate) pid: i32,
}

impl Stuck {
    /// What could not be done, for a person.
    pub(crate) fn obstacle(self) -> String {
        if self.pid == 0 {
            return String::from("there was no time to look at the processes of the system");
        }
        format!(
            "process {} ({}) cannot be looked at: it has been in the middle of execve(2), or \
             the system too busy, for all that time",
            self.pid,
            // This can be read then, unless its directory in /proc is locked.
            within(GRACE, move |_| proc::command(self.pid)).unwrap_or_else(|_| String::from("?"))
        )
    }

    /// Whether a look still hangs there because the process is in the middle
    /// of `execve(2)`.
    pub(crate) fn is_in_execve(self) -> bool {
        LOOKS.hangs_for_execve(self.pid)
    }
}

/// Whether thread `tid` of this process waits for process `pid` to be done
/// with `execve(2)`. This may hang.
fn hangs_for_execve(tid: i32, pid: i32) -> bool {
    // In this order: a process that has one thread while a look waits has had
    // one ever since that began to wait, unless it got further.
    let alone =
        || proc::numbers_in(&format!("/proc/{pid}/task")).is_ok_and(|threads| threads.len() == 1);
    let waits = || {
        proc::sleeps_in(tid).is_ok_and(|function| {
            function.is_some_and(|function| {
                // Inlined here and there: what reads a file of `/proc` or the
                // name of a namespace, takes a look at memory, or compares
                // descriptors.
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
    /// The process it is at.
    pid: AtomicI32,
    /// The thread that looks.
    tid: AtomicI32,
    /// Nobody waits for it any more.
    is_given_up: AtomicBool,
    examination: Mutex<Examination>,
    /// Something of the examination has changed.
    changed: Condvar,
}

/// Whether a look hangs, as its second thread finds out.
#[derive(Debug, Default)]
struct Examination {
    /// There is such a thread.
    is_under_way: bool,
    /// How often that was asked, and up to which of these it is answered.
    asked: u64,
    answered: u64,
    /// The process that it hung at then, or 0.
    at: i32,
    /// The look has ended.
    is_over: bool,
}

impl Examination {
    /// Unless it has gone on meanwhile.
    fn hangs_at(&self, look: &Look) -> bool {
        self.at > 0 && self.at == look.pid.load(SeqCst)
    }
}

/// Second threads, those that hang included.
static EXAMINERS: AtomicUsize = AtomicUsize::new(0);

/// Counted for as long as it lives.
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

    /// Has it found out once more whether it hangs; nothing if nobody can.
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

    /// Whether it hung when that was found out last; asks for the next time,
    /// and waits for nothing.
    fn hung_lately(self: &Arc<Self>, is_in_execve: fn(i32, i32) -> bool) -> bool {
        self.ask(is_in_execve)
            .is_some_and(|examination| examination.hangs_at(self))
    }

    /// Whether it hangs, looked at after this was called; no if that cannot be
    /// told in so long a time.
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

    /// Says whether it hangs, as often as that is asked, until it has ended.
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

    /// It has ended.
    fn end(&self) {
        self.examination().is_over = true;
        self.changed.notify_all();
    }
}

/// Tells what a look is at.
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
    /// there: this one would as well.
    pub(crate) fn at(&self, pid: i32) -> Result<(), Stuck> {
        // Noted even so: whoever takes this look all the same may hang there.
        self.look.pid.store(pid, SeqCst);
        if self.looks.hangs_for_execve(pid) {
            return Err(Stuck { pid });
        }
        Ok(())
    }

    /// Whether nobody waits any more for what is seen.
    pub(crate) fn is_given_up(&self) -> bool {
        self.look.is_given_up.load(SeqCst)
    }
}

/// Takes a look in a thread of its own and waits for what it sees, but not
/// for longer than `limit`, nor for a process in the middle of `execve(2)`.
/// What it sees later is dropped.
pub(crate) fn within<T: Send + 'static>(
    limit: Duration,
    look: impl FnOnce(&Looking) -> T + Send + 'static,
) -> Result<T, Stuck> {
    LOOKS.within(limit, look)
}

/// Looks taken again when one was given up for an `execve(2)` that went on.
///
/// A program that is only just starting can make a look wait for a moment, too;
/// when whoever gave it up asks again ([`Stuck::is_in_execve`]) that may be over.
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
    /// `stuck`, if there is no time for another.
    pub(crate) fn once_more(&self, stuck: Stuck) -> Result<(), Stuck> {
        if Instant::now() >= self.0 || stuck.pid <= 0 {
            return Err(stuck);
        }
        std::thread::sleep(Duration::from_millis(1));
        Ok(())
    }
}

/// The limit of a look for somebody who is patient until `deadline`.
pub(crate) fn limit(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()) + GRACE
}

/// Where the oldest look under way is: what those who share it wait for.
pub(crate) fn oldest() -> Stuck {
    let looks = LOOKS.lock();
    Stuck {
        pid: looks.first().map_or(0, |look| look.pid.load(SeqCst)),
    }
}

/// Every look under way.
#[derive(Debug)]
struct Looks {
    under_way: Mutex<Vec<Arc<Look>>>,
    ended: Condvar,
    most: usize,
    /// Whether a thread of ours hangs at a process for its `execve(2)`.
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
        // What hangs may not even be ended by SIGKILL: nobody may have to
        // wait for the descriptors it has, least of all for those of a gate.
        let spawned = spawn_apart(builder, None, move || {
            // It counts as under way until it is told.
            let _under_way = under_way;
            let tid = rustix::thread::gettid().as_raw_nonzero().get();
            looking.look.tid.store(tid, SeqCst);
            let seen = look(&looking);
            // Nobody listens any more if it took too long.
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

/// Makes room for another look when it is dropped.
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
