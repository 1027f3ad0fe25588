//! The fanotify gate: one thread that answers permission events.
//!
//! The rules of this thread. A machine has hung for the lack of each of them:
//!
//! * The queue is unlimited, since the kernel lets an event pass that does not
//!   fit ([`Group::pre_content`]).
//! * The thread never opens, reads or maps a file behind the gate, never logs,
//!   and takes no lock that others hold for longer than they run. The values
//!   that it looks up are replaced as a whole. (A grant keeps the thread from
//!   reading events while it takes a lease and gives it back; that waits for
//!   nobody either.)
//! * The thread reads nothing about another process, because that can take as
//!   long as the owner of the process likes. [`lookers`](super::lookers) read,
//!   and are not waited for. A thread that they cannot see in time is judged as
//!   the worst it can be, and so refused if anything is pinned. The only thing
//!   that the gate thread itself asks the kernel is which user a thread belongs
//!   to ([`pidfd`]).
//! * The thread takes events as fast as they come, and lets users take turns
//!   ([`Turns`]), so that nobody waits behind a crowd.
//! * The thread closes an event's descriptor before it answers. The waiting
//!   thread still holds the file then, so this close cannot be the last one,
//!   which might make the filesystem do a lot of work.
//! * The thread answers every event exactly once, and many events with one
//!   system call. It leaves the group's descriptor to no child, nor to any
//!   thread that could outlive SIGKILL: the kernel lets everybody go when the
//!   group is closed.

use super::decide::Verdict;
use super::look::{Doing, Question, Seen};
use super::lookers::{Lookers, WAIT_FOR_LOOK, Watch, hurry};
use super::turns::Turns;
use super::{Gate, is_final};
use crate::table::InodeId;
use crate::wake::wait_any;
use crate::{Errno, Guard};
use mapdirect_sys::fanotify::{Event, Mask, Response};
use mapdirect_sys::{dup, pidfd, proc};
use rustix::fs::OFlags;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// How often to look again at a thread that waits for a grant, if nobody
/// reports that the grant is over.
const HELD_PAUSE: Duration = Duration::from_millis(100);
/// The most events that are taken and not answered yet: each has a descriptor.
const MOST_TAKEN: usize = 16384;
/// The number of waiting threads that make a crowd. The kernel wakes all of
/// them for a moment whenever one is answered (`process_access_response`), so
/// answers to a crowd are given together.
const CROWD: u32 = 64;
/// How long each thread of a crowd may run before the next answers.
const MOMENT: Duration = Duration::from_micros(20);
/// How often to look again at once at a thread that has only just asked.
const TRIES: u32 = 4;

/// An event that has no answer yet.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) file: OwnedFd,
    pub(super) event: About,
    /// The user who caused the event, if that was asked.
    user: Option<u32>,
    pub(super) since: Instant,
    /// How often the thread was looked at without result.
    looks: u32,
    /// When to look again at a held event, if nobody reports that the grant is
    /// over.
    due: Instant,
    /// How many decisions had been made at the last look.
    decisions: u64,
    /// The next pin number at the last look: pins from this number on are
    /// newer.
    pub(super) next_pin: u64,
    pub(super) question: Question,
}

/// What an event says, without its descriptor.
#[derive(Clone, Copy, Debug)]
pub(super) struct About {
    pub(super) mask: Mask,
    pub(super) tid: i32,
}

impl Watch for Waiting {
    fn question(&self) -> Question {
        self.question
    }

    fn user(&self) -> Option<u32> {
        self.user.or_else(|| user_of(self.event.tid))
    }
}

/// The user of a thread, or `None` if the thread is gone.
fn user_of(tid: i32) -> Option<u32> {
    /// Stands for no user: when descriptors are short, all threads are treated
    /// alike.
    const NOBODY: u32 = u32::MAX;
    match pidfd::of_thread(tid).and_then(|thread| pidfd::real_user(thread.as_fd())) {
        Ok(user) => Some(user),
        Err(Errno::SRCH) => None,
        Err(_) => Some(NOBODY),
    }
}

/// The thread's own state.
pub(super) struct Server<'guard> {
    pub(super) guard: &'guard Guard,
    pub(super) gate: &'guard Gate,
    lookers: Lookers<Waiting>,
    /// Events that wait to be looked at.
    line: Turns<Waiting>,
    /// Events whose threads do not sleep yet, by the time of the next look. The
    /// number tells events with the same time apart.
    soon: BTreeMap<(Instant, u64), Waiting>,
    put_off: u64,
    /// Events held back for a grant.
    held: Vec<Waiting>,
    /// Answers that are not given yet. Each descriptor stays open until then,
    /// because another event would get its number.
    answers: Vec<(Option<OwnedFd>, Response)>,
    answered: Instant,
    /// The most events that are taken and not answered.
    most: usize,
}

/// Serves the gate until the guard stops.
///
/// # Errors
///
/// When the kernel's events cannot be read or answered any more. The gate is
/// open then, and the process must end so that holders are told.
pub(crate) fn run(guard: &Guard, gate: &Gate) -> Result<(), Errno> {
    hurry();
    guard.starter.this_is_the_gate();
    let mut server = Server {
        guard,
        gate,
        lookers: Lookers::new(guard.waiting.waker().clone()),
        line: Turns::default(),
        soon: BTreeMap::new(),
        put_off: 0,
        held: Vec::new(),
        answers: Vec::new(),
        answered: Instant::now(),
        most: (crate::server::descriptor_limit() / 4).clamp(16, MOST_TAKEN),
    };
    server.run()
}

impl Server<'_> {
    fn run(&mut self) -> Result<(), Errno> {
        // Room for some eighty events: enough to share the cost of reading
        // them, but few enough that the first does not wait for long.
        let mut buffer = vec![0; 4096];
        let mut events = Vec::new();
        while !(self.guard.is_stopping() && self.unanswered() == 0) {
            if self.sleep()? {
                let group = &self.gate.group;
                match group.read(&mut buffer, |event| events.push(event)) {
                    Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                    Err(errno) if is_final(errno) => return Err(errno),
                    // No descriptor could be made for one event: its filesystem
                    // is dead, or descriptors are short. The kernel has denied
                    // that event; the others still need answers.
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
            self.take_answers();
            for event in events.drain(..) {
                self.take(event);
            }
            self.look_again();
            self.ask();
            self.publish_waiting();
            self.flush()?;
            self.guard.pulse.gate_beats();
        }
        self.guard.pulse.gate_is_over();
        Ok(())
    }

    /// The number of events that have no answer yet.
    fn unanswered(&self) -> usize {
        self.line.len() + self.soon.len() + self.held.len() + self.lookers.asked()
    }

    /// Tells grants which threads wait for them.
    fn publish_waiting(&mut self) {
        let tids = self.held.iter().map(|waiting| waiting.event.tid);
        self.guard.waiting.now_waiting(tids);
    }

    /// Waits for an event, for the answer of a looker, or until something must
    /// be done. Says whether there are events.
    fn sleep(&self) -> Result<bool, Errno> {
        let now = Instant::now();
        let soon = self.soon.keys().next();
        let held = self.held.iter().map(|waiting| self.due_in(waiting, now));
        let timeout = held
            .chain(soon.map(|(due, _)| due.saturating_duration_since(now)))
            .chain(self.lookers.next_look())
            .chain(self.flush_in())
            // The waiting events must be refused in time if no looker has room.
            .chain((!self.line.is_empty()).then_some(WAIT_FOR_LOOK / 8))
            .min();
        let timeout = if self.lookers.may_sleep() {
            timeout
        } else {
            Some(Duration::ZERO)
        };
        let waker = self.guard.waiting.waker();
        // A guard that stops leaves new events to the next one, if there may be
        // one.
        let leaves = self.guard.is_stopping() && self.guard.starter.keeps();
        let (events, woken) = if self.unanswered() < self.most && !leaves {
            let [events, woken] = wait_any(&[self.gate.group.as_fd(), waker.as_fd()], timeout)?;
            (events, woken)
        } else {
            let [woken] = wait_any(&[waker.as_fd()], timeout)?;
            (false, woken)
        };
        self.lookers.awake();
        if woken {
            waker.clear();
        }
        Ok(events)
    }

    /// How long until a held event is looked at again.
    fn due_in(&self, waiting: &Waiting, now: Instant) -> Duration {
        if waiting.decisions != self.guard.waiting.decisions() {
            return Duration::ZERO;
        }
        waiting.due.saturating_duration_since(now)
    }

    /// Takes an event that has just come.
    fn take(&mut self, event: Event) {
        let Some(file) = event.file else {
            // Only an overflow has no file, and an unlimited queue has no
            // overflows.
            return;
        };
        self.guard.audit.judged();
        let fd = file.as_raw_fd();
        self.gate.journal.note_descriptor(fd);
        let opens = !event.mask.intersects(Mask::PRE_ACCESS);
        let file = if opens {
            self.guard.own.hand(event.tid, file)
        } else {
            Some(file)
        };
        let Some(file) = file else {
            // The owner of the file waits in the open that this answer ends.
            self.answers.push((None, Response::deny(fd, Errno::TXTBSY)));
            return;
        };
        let now = Instant::now();
        let Some(question) = self.question_about(&file, event.mask, event.tid, event.range) else {
            self.answer(file, Verdict::Allow);
            return;
        };
        self.line_up(Waiting {
            file,
            event: About {
                mask: event.mask,
                tid: event.tid,
            },
            user: None,
            since: now,
            looks: 0,
            due: now,
            decisions: self.guard.waiting.decisions(),
            next_pin: self.guard.next_pin_number(),
            question,
        });
    }

    /// What must be known to answer an event, or `None` if the event is let in
    /// anyway.
    fn question_about(
        &self,
        file: &OwnedFd,
        mask: Mask,
        tid: i32,
        range: Option<(u64, u64)>,
    ) -> Option<Question> {
        // The opens of the guard's own threads are not judged.
        if self.guard.own.contains(tid) {
            return None;
        }
        // For files that can be behind the gate, the kernel answers fstat(2)
        // from its own memory. If it fails, no entry is found.
        let stat = rustix::fs::fstat(file).ok();
        let id = InodeId {
            dev: stat.map_or(0, |stat| stat.st_dev),
            inode: stat.map_or(0, |stat| stat.st_ino),
        };
        let watched = self.guard.table.get(id);
        if stat.is_some() && watched.is_none() {
            return None;
        }
        Some(Question {
            tid,
            mask,
            range,
            id,
            size: stat.map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(u64::MAX)),
            reflink: watched.as_ref().is_none_or(|it| it.abilities.reflink),
            announced: watched.is_some_and(|it| it.may_be_announced(tid)),
            named: false,
            late: Duration::ZERO,
            tries: TRIES,
        })
    }

    /// Gives an event to a looker, now or when it is its turn.
    fn line_up(&mut self, mut waiting: Waiting) {
        let in_peace = self.line.is_empty() && !self.lookers.any_hangs();
        if in_peace && self.lookers.has_room() {
            // The user need not be known.
            if let Some(back) = self.lookers.ask(waiting) {
                self.refuse_unseen(back);
            }
            return;
        }
        if waiting.user.is_none() {
            waiting.user = user_of(waiting.event.tid);
        }
        match waiting.user {
            Some(user) => self.line.push(user, waiting),
            // The thread was killed, and nobody gets the answer.
            None => self.answer(waiting.file, Verdict::Refuse),
        }
    }

    /// Gives the events whose turn it is to lookers, and refuses events that
    /// nobody will look at in time.
    fn ask(&mut self) {
        let Self { lookers, line, .. } = self;
        let (mut again, mut late) = (Vec::new(), Vec::new());
        lookers.give_up(|waiting| again.push(waiting), |waiting| late.push(waiting));
        for mut waiting in again {
            waiting.user = waiting.user.or_else(|| user_of(waiting.event.tid));
            match waiting.user {
                Some(user) => line.put_back(user, waiting),
                None => late.push(waiting),
            }
        }
        while lookers.has_room()
            && let Some((user, mut waiting)) = line.next(|user| !lookers.is_barred(user))
        {
            waiting.question.late = waiting.since.elapsed();
            waiting.question.tries = 1;
            if let Some(back) = lookers.ask(waiting) {
                line.put_back(user, back);
                break;
            }
        }
        if !line.is_empty() {
            let nobody_looks = !lookers.has_any();
            late.extend(line.take_due(
                |user| nobody_looks || lookers.is_barred(user),
                |waiting| waiting.since.elapsed() >= WAIT_FOR_LOOK,
            ));
        }
        for waiting in late {
            self.refuse_unseen(waiting);
        }
    }

    /// Judges what lookers have seen.
    fn take_answers(&mut self) {
        let mut seen = Vec::new();
        self.lookers
            .answers(|waiting, what| seen.push((waiting, what)));
        for (waiting, seen) in seen {
            match seen {
                Seen::Gone => self.answer(waiting.file, Verdict::Refuse),
                Seen::NotYet => self.put_off(waiting),
                Seen::Doing(doing) => self.settle(waiting, &doing),
            }
        }
    }

    /// Refuses an event that nobody could look at in time: it may be the worst
    /// operation.
    fn refuse_unseen(&mut self, mut waiting: Waiting) {
        // Nobody can find out the thread's name.
        waiting.question.named = true;
        let doing = Doing::the_worst(waiting.event.mask);
        let verdict = match self.decide(&waiting, &doing) {
            // This happens only when nothing is pinned.
            Verdict::Allow => Verdict::Allow,
            Verdict::Refuse | Verdict::Hold | Verdict::Again | Verdict::Name => Verdict::Refuse,
        };
        self.answer(waiting.file, verdict);
    }

    /// Looks again at held events and at threads that did not sleep, when it is
    /// time.
    fn look_again(&mut self) {
        let now = Instant::now();
        let (mut due, held): (Vec<_>, _) = std::mem::take(&mut self.held)
            .into_iter()
            .partition(|waiting| self.due_in(waiting, now).is_zero());
        self.held = held;
        let later = self.soon.split_off(&(now, u64::MAX));
        due.extend(std::mem::replace(&mut self.soon, later).into_values());
        for mut waiting in due {
            let question = waiting.question;
            let event = waiting.event;
            // Perhaps nothing is pinned any more, or the file has another size.
            let asked = self.question_about(&waiting.file, event.mask, event.tid, question.range);
            let Some(asked) = asked else {
                self.answer(waiting.file, Verdict::Allow);
                continue;
            };
            waiting.decisions = self.guard.waiting.decisions();
            waiting.next_pin = self.guard.next_pin_number();
            waiting.question = Question {
                late: waiting.since.elapsed(),
                named: question.named,
                ..asked
            };
            self.line_up(waiting);
        }
    }

    /// Answers an event, or holds it back.
    fn settle(&mut self, waiting: Waiting, doing: &Doing) {
        match self.decide(&waiting, doing) {
            Verdict::Hold => self.hold(waiting),
            Verdict::Again => self.put_off(waiting),
            Verdict::Name => self.ask_name(waiting),
            verdict => self.answer(waiting.file, verdict),
        }
    }

    /// Makes a looker look once more at a thread that is going to be refused,
    /// to learn its name.
    fn ask_name(&mut self, mut waiting: Waiting) {
        waiting.question.named = true;
        self.line_up(waiting);
    }

    /// Keeps an event whose thread was just about to sleep.
    fn put_off(&mut self, mut waiting: Waiting) {
        let pause = Duration::from_micros(50) * (1 << waiting.looks.min(5));
        waiting.looks = waiting.looks.saturating_add(1);
        self.put_off += 1;
        let due = Instant::now() + pause.max(self.moment() / 4);
        self.soon.insert((due, self.put_off), waiting);
    }

    /// Keeps an event until a grant is over.
    fn hold(&mut self, mut waiting: Waiting) {
        if self.may_be_proving(waiting.question.id) {
            waiting.keep_as_path();
        }
        waiting.due = Instant::now() + HELD_PAUSE;
        self.held.push(waiting);
    }

    /// Whether a grant may have to prove that nobody has the file open. When all
    /// pins are settled, only the hand-over is left. An event that waits for
    /// that keeps its description, because the pin may be over by then, and
    /// only a description can ask for the pin's lock.
    fn may_be_proving(&self, id: InodeId) -> bool {
        self.guard.table.get(id).is_some_and(|watched| {
            let pins = watched.pins.load();
            watched.opens.are_held() || pins.iter().any(|pin| pin.settled().is_none())
        })
    }

    /// How long to let the waiting threads run before the next answers.
    fn moment(&self) -> Duration {
        match u32::try_from(self.unanswered()) {
            Ok(few) if few < CROWD => Duration::ZERO,
            Ok(many) => MOMENT * many,
            Err(_) => Duration::MAX,
        }
    }

    fn answer(&mut self, file: OwnedFd, verdict: Verdict) {
        let fd = file.as_raw_fd();
        let answer = match verdict {
            Verdict::Allow => Response::allow(fd),
            Verdict::Refuse | Verdict::Hold | Verdict::Again | Verdict::Name => {
                Response::deny(fd, Errno::TXTBSY)
            }
        };
        self.answers.push((Some(file), answer));
    }

    /// How long until the answers are given, if there are any.
    fn flush_in(&self) -> Option<Duration> {
        if self.answers.is_empty() {
            return None;
        }
        Some(self.moment().saturating_sub(self.answered.elapsed()))
    }

    fn flush(&mut self) -> Result<(), Errno> {
        if self.flush_in() != Some(Duration::ZERO) {
            return Ok(());
        }
        // Close first, then answer: see the head of this file.
        let answers: Vec<_> = self.answers.drain(..).map(|(_, answer)| answer).collect();
        self.answered = Instant::now();
        self.gate.group.respond(&answers)
    }
}

impl Waiting {
    /// Keeps the event's number but gives up its description. The kernel counts
    /// the description as one more reader of the file, and the awaited grant
    /// may need to prove that there is none. An `O_PATH` descriptor is not
    /// counted, and gives all the information that is needed until the answer.
    /// Opening one waits for nobody.
    fn keep_as_path(&mut self) {
        if rustix::fs::fcntl_getfl(&self.file).is_ok_and(|flags| flags.contains(OFlags::PATH)) {
            return;
        }
        if let Ok(path) = proc::reopen(self.file.as_fd(), OFlags::PATH) {
            // If this fails, the event keeps its description.
            let _ = dup::replace(self.file.as_fd(), path.as_fd());
        }
    }
}
