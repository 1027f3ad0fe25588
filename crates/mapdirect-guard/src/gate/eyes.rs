//! A second pair of eyes for the gate thread.
//!
//! What takes longest about an event is to read the kernel stack of the
//! thread that waits: the kernel looks up a name for every frame. While many
//! wait, another thread reads some of the stacks. It only looks: events are
//! read, judged and answered by the gate thread alone, which never waits for
//! it longer than it would take to look by itself.

use crate::gate::threads::{Look, Threads};
use crate::wake::{Waker, wait_any};
use crate::{Errno, Guard};
use crossbeam_queue::SegQueue;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

/// A waiting thread as it was seen.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) look: Look,
    /// Its kernel stack, as text for `stack_functions`.
    pub(crate) stack: String,
}

impl Seen {
    /// Looks at a thread, and at its stack if it sleeps.
    pub(crate) fn of(threads: &mut Threads, tid: i32) -> Self {
        let look = threads.look(tid);
        let stack = match look {
            Look::Sleeps(_) => threads.stack(tid),
            Look::NotYet | Look::Gone => String::new(),
        };
        Self { look, stack }
    }
}

/// One thread to look at.
#[derive(Debug)]
struct Question {
    /// Which round of events it belongs to: late answers are thrown away.
    round: u64,
    /// Its place in the round.
    at: usize,
    tid: i32,
}

/// How many must wait for a second pair of eyes to be worth waking.
const CROWD: usize = 4;
/// How long the gate thread waits for an answer before it looks by itself.
const LONGEST_LOOK: Duration = Duration::from_micros(100);

/// What the two threads share.
#[derive(Debug)]
pub(crate) struct Eyes {
    questions: SegQueue<Question>,
    answers: SegQueue<(Question, Seen)>,
    round: AtomicU64,
    asleep: AtomicBool,
    waker: Waker,
}

impl Eyes {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self {
            questions: SegQueue::new(),
            answers: SegQueue::new(),
            round: AtomicU64::new(0),
            asleep: AtomicBool::new(false),
            waker: Waker::new()?,
        })
    }

    /// Has the second thread notice that the guard stops.
    pub(crate) fn wake(&self) {
        self.waker.wake();
    }

    /// Looks at the threads of a round of events; the answers stand in the
    /// order of the questions.
    pub(crate) fn look(&self, threads: &mut Threads, tids: &[i32]) -> Vec<Seen> {
        if tids.len() < CROWD {
            return tids.iter().map(|tid| Seen::of(threads, *tid)).collect();
        }
        let round = self.round.fetch_add(1, SeqCst) + 1;
        for (at, tid) in tids.iter().copied().enumerate() {
            self.questions.push(Question { round, at, tid });
        }
        if self.asleep.load(SeqCst) {
            self.waker.wake();
        }
        let mut seen: Vec<Option<Seen>> = tids.iter().map(|_| None).collect();
        let mut left = tids.len();
        while let Some(question) = self.questions.pop() {
            seen[question.at] = Some(Seen::of(threads, question.tid));
            left -= 1;
        }
        let since = Instant::now();
        while left > 0 && since.elapsed() < LONGEST_LOOK {
            match self.answers.pop() {
                Some((question, answer)) if question.round == round => {
                    seen[question.at] = Some(answer);
                    left -= 1;
                }
                Some(_) => {}
                None => std::thread::yield_now(),
            }
        }
        seen.into_iter()
            .zip(tids)
            .map(|(seen, tid)| seen.unwrap_or_else(|| Seen::of(threads, *tid)))
            .collect()
    }
}

/// Serves as the second pair of eyes until the guard stops.
///
/// # Errors
///
/// When it cannot wait any more; the gate thread goes on by itself then.
pub(crate) fn run(guard: &Guard, eyes: &Eyes) -> Result<(), Errno> {
    let mut threads = Threads::default();
    while !guard.is_stopping() {
        while let Some(question) = eyes.questions.pop() {
            // Nobody waits for the answer any more, but to drop it is all
            // the same to the gate thread.
            if question.round == eyes.round.load(SeqCst) {
                let seen = Seen::of(&mut threads, question.tid);
                eyes.answers.push((question, seen));
            }
        }
        // Say so first, look once more then: the gate thread asks first and
        // looks whether we sleep then.
        eyes.asleep.store(true, SeqCst);
        if eyes.questions.is_empty() {
            wait_any(&[eyes.waker.as_fd()], None)?;
            eyes.waker.clear();
        }
        eyes.asleep.store(false, SeqCst);
    }
    Ok(())
}
