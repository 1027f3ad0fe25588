//! The threads that look at waiting threads, so that the gate thread need not.
//!
//! A look may hang for ever ([`look`](super::look) says on what), so nobody
//! waits for a looker. The gate thread hands out questions and goes on. If no
//! answer comes within [`WAIT_FOR_LOOK`], the event is refused. A looker that
//! has been looking at one thread for [`SLOW`] is given up: its other questions
//! go to another looker, a new looker takes its place, and it ends when its
//! look does. Only a limited number of lookers may be given up for one user. So
//! a stranger who makes many of them hang gets only his own events refused.
//!
//! Lookers have a descriptor table of their own ([`spawn_apart`]). Some looks
//! are deaf to SIGKILL, and a thread that cannot end would keep the group open
//! after the guard was killed, and keep everybody waiting for an answer.

use super::look::{Question, Seen, Threads};
use crate::wake::Waker;
use crossbeam_queue::SegQueue;
use mapdirect_sys::descriptors::spawn_apart;
use rustix::thread::{CpuSet, Pid, sched_setaffinity};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicI32, fence};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// How long the look at one thread may take before its event is refused.
pub(crate) const WAIT_FOR_LOOK: Duration = Duration::from_millis(500);
/// How long a look may take before the looker is given up.
const SLOW: Duration = Duration::from_millis(10);
/// The most lookers, given up or not.
const MOST: usize = 64;
/// The most lookers that are given up for one user.
const OF_USER: usize = 4;
/// The number of lookers that only root's threads can use up.
const FOR_ROOT: usize = 8;
/// The number of questions that a looker has at a time, so that it has work
/// while the gate thread does something else.
const DEPTH: usize = 8;

/// The most answers that a looker keeps before it rings the bell.
const TOGETHER: u32 = 4;

/// What the gate thread and a looker share.
#[derive(Debug, Default)]
struct Desk {
    questions: SegQueue<Question>,
    /// The answers, in the order of the questions.
    answers: SegQueue<Seen>,
    /// Set when there will be no more questions.
    over: AtomicBool,
    /// The thread number of the looker; 0 until it runs.
    tid: AtomicI32,
}

/// Wakes the gate thread, if it sleeps.
#[derive(Debug)]
struct Bell {
    asleep: AtomicBool,
    waker: Waker,
}

impl Bell {
    fn ring(&self) {
        // Pairs with the fence in `Lookers::may_sleep`: either the gate thread
        // sees the answer, or the looker sees that the gate thread sleeps.
        fence(SeqCst);
        if self.asleep.swap(false, SeqCst) {
            self.waker.wake();
        }
    }
}

#[derive(Debug)]
struct Looker<W> {
    desk: Arc<Desk>,
    thread: JoinHandle<Option<()>>,
    /// The questions that this looker was asked, in order; `None` for a
    /// question that was answered without it.
    asked: VecDeque<Option<W>>,
    /// When the looker began with the first question, or a little earlier.
    since: Instant,
    given_up: Option<GivenUp>,
    /// The processor on which the looker was put, if any.
    processor: Option<usize>,
}

/// A looker that hangs.
#[derive(Clone, Copy, Debug)]
struct GivenUp {
    /// The user whose thread the looker hangs at, if known.
    user: Option<u32>,
}

/// An event that needs a look.
pub(crate) trait Watch {
    /// The question to ask about the event.
    fn question(&self) -> Question;
    /// The user who caused the event. This is asked when a looker hangs there.
    fn user(&self) -> Option<u32>;
}

/// All lookers. They belong to the gate thread.
#[derive(Debug)]
pub(crate) struct Lookers<W> {
    bell: Arc<Bell>,
    lookers: Vec<Looker<W>>,
    /// How many lookers are wanted besides those that were given up.
    wanted: usize,
}

impl<W: Watch> Lookers<W> {
    /// Starts as many lookers as are useful. Their answers wake `waker`.
    pub(crate) fn new(waker: Waker) -> Self {
        let processors = std::thread::available_parallelism().map_or(2, usize::from);
        let mut lookers = Self {
            bell: Arc::new(Bell {
                asleep: AtomicBool::new(false),
                waker,
            }),
            lookers: Vec::new(),
            wanted: processors.clamp(2, 4),
        };
        lookers.fill_up();
        lookers
    }

    /// Starts lookers until there are as many as are wanted, within the limit.
    fn fill_up(&mut self) {
        let given_up = self.given_up().count();
        while self.lookers.len() < (self.wanted + given_up).min(MOST) {
            // If no thread can be started now, it may be possible later.
            let Ok(looker) = Looker::start(&self.bell) else {
                break;
            };
            self.lookers.push(looker);
        }
    }

    fn given_up(&self) -> impl Iterator<Item = GivenUp> {
        self.lookers.iter().filter_map(|looker| looker.given_up)
    }

    /// Whether any looker hangs.
    pub(crate) fn any_hangs(&self) -> bool {
        self.given_up().next().is_some()
    }

    /// Whether so many lookers hang at threads of this user that no looker is
    /// risked on another one.
    pub(crate) fn is_barred(&self, user: u32) -> bool {
        let of_user = self.given_up().filter(|it| it.user == Some(user)).count();
        let places = if user == 0 { MOST } else { MOST - FOR_ROOT };
        of_user >= OF_USER || self.given_up().count() + self.wanted > places
    }

    /// The looker that has the least to do, if any has room.
    fn free(&mut self) -> Option<&mut Looker<W>> {
        self.lookers
            .iter_mut()
            .filter(|looker| looker.given_up.is_none() && looker.asked.len() < DEPTH)
            .min_by_key(|looker| looker.asked.len())
    }

    /// Whether there is any working looker.
    pub(crate) fn has_any(&self) -> bool {
        self.lookers.iter().any(|looker| looker.given_up.is_none())
    }

    /// Whether a question could be asked at once.
    pub(crate) fn has_room(&mut self) -> bool {
        self.free().is_some()
    }

    /// Asks a question. Gives the watch back if there is no room.
    pub(crate) fn ask(&mut self, watch: W) -> Option<W> {
        let is_alone = self.asked() == 0;
        let Some(looker) = self.free() else {
            return Some(watch);
        };
        if is_alone {
            looker.come_here();
        }
        if looker.asked.is_empty() {
            looker.since = Instant::now();
        }
        looker.desk.questions.push(watch.question());
        looker.asked.push_back(Some(watch));
        looker.thread.thread().unpark();
        None
    }

    /// The number of questions whose answers are still waited for.
    pub(crate) fn asked(&self) -> usize {
        let asked = self.lookers.iter().flat_map(|looker| &looker.asked);
        asked.filter(|watch| watch.is_some()).count()
    }

    /// Hands over the answers that have come.
    pub(crate) fn answers(&mut self, mut each: impl FnMut(W, Seen)) {
        for looker in &mut self.lookers {
            while let Some(seen) = looker.desk.answers.pop() {
                looker.since = Instant::now();
                if let Some(watch) = looker.asked.pop_front().flatten() {
                    each(watch, seen);
                }
            }
        }
        self.lookers.retain(|looker| {
            let goes = looker.given_up.is_some() && looker.asked.is_empty();
            if goes {
                looker.end();
            }
            !goes
        });
    }

    /// Gives up lookers that take long. Their other questions go to `again`,
    /// and events that have waited for long enough go to `late`.
    pub(crate) fn give_up(&mut self, mut again: impl FnMut(W), mut late: impl FnMut(W)) {
        for looker in &mut self.lookers {
            let takes = looker.since.elapsed();
            if looker.asked.is_empty() || takes < SLOW {
                continue;
            }
            if looker.given_up.is_none() {
                // In reverse, so that the questions come back in order.
                let mut left = 0;
                while looker.desk.questions.pop().is_some() {
                    left += 1;
                }
                for _ in 0..left {
                    if let Some(watch) = looker.asked.pop_back().flatten() {
                        again(watch);
                    }
                }
                let first = looker.asked.front().and_then(Option::as_ref);
                let user = first.and_then(Watch::user);
                looker.given_up = Some(GivenUp { user });
            }
            if takes >= WAIT_FOR_LOOK {
                looker
                    .asked
                    .iter_mut()
                    .filter_map(Option::take)
                    .for_each(&mut late);
            }
        }
        self.fill_up();
    }

    /// When to give up the next looker, if nothing else happens before.
    pub(crate) fn next_look(&self) -> Option<Duration> {
        let waits = self.lookers.iter().filter_map(|looker| {
            looker.asked.front()?.as_ref()?;
            let limit = if looker.given_up.is_some() {
                WAIT_FOR_LOOK
            } else {
                SLOW
            };
            Some(limit.saturating_sub(looker.since.elapsed()))
        });
        waits.min()
    }

    /// Whether the gate thread may go to sleep. If so, an answer wakes it.
    pub(crate) fn may_sleep(&self) -> bool {
        self.bell.asleep.store(true, SeqCst);
        fence(SeqCst);
        let mut lookers = self.lookers.iter();
        let may = lookers.all(|looker| looker.desk.answers.is_empty());
        if !may {
            self.bell.asleep.store(false, SeqCst);
        }
        may
    }

    /// Says that the gate thread is awake again.
    pub(crate) fn awake(&self) {
        self.bell.asleep.store(false, SeqCst);
    }
}

impl<W> Looker<W> {
    fn start(bell: &Arc<Bell>) -> std::io::Result<Self> {
        let builder = Builder::new()
            .name(String::from("looker"))
            .stack_size(256 * 1024);
        let desk = Arc::new(Desk::default());
        let (shared, bell) = (Arc::clone(&desk), Arc::clone(bell));
        let keep = bell.waker.shared();
        let thread = spawn_apart(builder, Some(keep), move || serve(&shared, &bell))?;
        Ok(Self {
            desk,
            thread,
            asked: VecDeque::new(),
            since: Instant::now(),
            given_up: None,
            processor: None,
        })
    }

    /// Puts the looker on the processor of the calling thread. A single
    /// question is answered sooner there, because waking up another processor
    /// takes longer than a look. If that fails, the kernel chooses.
    fn come_here(&mut self) {
        let here = rustix::thread::sched_getcpu();
        let tid = self.desk.tid.load(Relaxed);
        if self.processor == Some(here) || here >= CpuSet::MAX_CPU {
            return;
        }
        let Some(tid) = Pid::from_raw(tid) else {
            return;
        };
        let mut only = CpuSet::new();
        only.set(here);
        if sched_setaffinity(Some(tid), &only).is_ok() {
            self.processor = Some(here);
        }
    }

    fn end(&self) {
        self.desk.over.store(true, SeqCst);
        self.thread.thread().unpark();
    }
}

impl<W> Drop for Lookers<W> {
    fn drop(&mut self) {
        self.lookers.iter().for_each(Looker::end);
    }
}

/// The work of a looker.
fn serve(desk: &Desk, bell: &Bell) {
    hurry();
    desk.tid
        .store(rustix::thread::gettid().as_raw_nonzero().get(), Relaxed);
    let mut threads = Threads::default();
    let mut told = 0;
    while !desk.over.load(SeqCst) {
        let Some(question) = desk.questions.pop() else {
            std::thread::park();
            continue;
        };
        desk.answers.push(threads.look(&question));
        told += 1;
        // Several answers are handed over together. That saves the gate thread
        // a sleep, and wakes the waiting threads less often for each other. If
        // the next look hangs, the gate thread checks for answers by itself.
        if told >= TOGETHER || desk.questions.is_empty() {
            told = 0;
            bell.ring();
        }
    }
}

/// Lets the calling thread run before others, because every waiting thread
/// waits for it.
pub(crate) fn hurry() {
    // If this fails, the thread is only slower.
    let _ = rustix::process::setpriority_process(None, -20);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::InodeId;
    use mapdirect_sys::fanotify::Mask;

    struct Stranger {
        tid: i32,
        user: u32,
    }

    impl Watch for Stranger {
        fn question(&self) -> Question {
            Question {
                tid: self.tid,
                mask: Mask::OPEN_PERM,
                range: None,
                id: InodeId { dev: 0, inode: 0 },
                size: 0,
                reflink: false,
                announced: false,
                named: false,
                late: Duration::ZERO,
                tries: 1,
            }
        }
        fn user(&self) -> Option<u32> {
            Some(self.user)
        }
    }

    fn lookers() -> Lookers<Stranger> {
        Lookers::new(Waker::new().unwrap())
    }

    fn nobody(user: u32) -> Stranger {
        let tid = i32::MAX;
        Stranger { tid, user }
    }

    #[test]
    fn everything_asked_is_answered_once() {
        let mut lookers = lookers();
        let mut answered = 0;
        let mut asked = 0;
        while answered < 200 {
            while asked < 200 && lookers.ask(nobody(7)).is_none() {
                asked += 1;
            }
            lookers.answers(|_, seen| {
                assert_eq!(seen, Seen::Gone);
                answered += 1;
            });
            std::thread::yield_now();
        }
        assert_eq!(lookers.asked(), 0);
    }

    /// A looker that never answers: nobody reads what is on its desk.
    fn hang(lookers: &mut Lookers<Stranger>, user: u32) {
        let desk = Arc::new(Desk::default());
        let thread = std::thread::spawn(|| None);
        lookers.lookers.push(Looker {
            desk,
            thread,
            asked: VecDeque::from([Some(nobody(user))]),
            since: Instant::now().checked_sub(SLOW).unwrap(),
            given_up: None,
            processor: None,
        });
    }

    #[test]
    fn whoever_hangs_is_given_up_and_bars_its_user_alone() {
        let mut lookers = lookers();
        for _ in 0..OF_USER {
            assert!(!lookers.is_barred(7));
            hang(&mut lookers, 7);
            lookers.give_up(|_| (), |_| panic!("not late yet"));
        }
        assert!(lookers.is_barred(7));
        assert!(!lookers.is_barred(8) && !lookers.is_barred(0));
        assert!(lookers.has_room());
        assert!(lookers.next_look().unwrap() <= WAIT_FOR_LOOK);
        for looker in &mut lookers.lookers {
            looker.since = Instant::now().checked_sub(WAIT_FOR_LOOK).unwrap();
        }
        let mut late = 0;
        lookers.give_up(|_| panic!("nobody else is asked"), |_| late += 1);
        assert_eq!((late, lookers.asked()), (OF_USER, 0));
        // The looks end, and with them the lookers.
        for looker in &lookers.lookers {
            if looker.given_up.is_some() {
                looker.desk.answers.push(Seen::Gone);
            }
        }
        lookers.answers(|_, _| panic!("it was late"));
        assert!(!lookers.is_barred(7) && !lookers.any_hangs());
    }

    #[test]
    fn what_one_that_hangs_was_asked_too_is_asked_again() {
        let mut lookers = lookers();
        hang(&mut lookers, 7);
        let looker = lookers.lookers.last_mut().unwrap();
        for user in [8, 9] {
            looker.desk.questions.push(nobody(user).question());
            looker.asked.push_back(Some(nobody(user)));
        }
        let mut again = Vec::new();
        lookers.give_up(|watch| again.push(watch.user), |_| panic!("not late yet"));
        assert_eq!(again, [9, 8]);
        assert_eq!(lookers.asked(), 1);
    }

    #[test]
    fn many_users_leave_places_for_root() {
        let mut lookers = lookers();
        for user in 1..=u32::try_from(MOST).unwrap() {
            if lookers.is_barred(user) {
                break;
            }
            hang(&mut lookers, user);
            lookers.give_up(|_| (), |_| ());
        }
        assert!(lookers.is_barred(1000));
        assert!(!lookers.is_barred(0));
        assert!(lookers.has_room());
        assert!(lookers.lookers.len() <= MOST);
    }
}
