//! The supervisor: a small process that starts a guard, keeps what must outlive
//! it, and starts another one when it ends.
//!
//! `mapdirect guard` is the supervisor, and its child is the guard. They speak the
//! protocol of sd_notify(3) by a pair of sockets (see [`crate::store`]). The
//! supervisor has copies of the fanotify groups, so a guard that is killed opens
//! nothing: whoever comes to a pinned file waits until the next guard answers,
//! a moment later. Where systemd is above the supervisor, everything is passed on
//! to it, and so outlives the supervisor as well.
//!
//! The supervisor does nothing that takes long, has one thread, and allocates
//! little. It does not end because the system is short of processes or descriptors
//! for a while, and takes in no descriptor without saying so to whoever has sent it.
//! When it is killed, the kernel kills the guard
//! (`PR_SET_PDEATHSIG`), the groups go, everybody who waits is let go, and holders
//! are told by the end of their connections.

use crate::Errno;
use crate::store::{
    ASKED, DECLARED, GATE_THREAD, KEEPER, KEPT, LINE, LISTENER, NOT_KEPT, PINS_STAY, Starter,
    TAKEN, TRIED,
};
use crate::wake::wait_any;
use mapdirect_sys::pidfd;
use mapdirect_sys::sd_listen_fds;
use mapdirect_sys::signal::{Signal, SignalFd, kill};
use mapdirect_sys::unix::Socket;
use rustix::process::{Pid, Resource, WaitOptions, getrlimit, waitpid};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// How long a guard may be silent before it is killed, and the next one started:
/// everybody at the gate waits meanwhile.
const SILENCE: Duration = Duration::from_secs(10);
/// How long it may take to be ready.
const START: Duration = Duration::from_secs(60);
/// How long it may take to end.
const END: Duration = Duration::from_secs(3);
/// How many guards, or keepers, in a row may end in vain, however long that takes.
/// Each guard keeps those who wait at the gate waiting. Some that are killed in a
/// moment are no sign that the next one is: they may wait for [`SILENCE`], as they do
/// for a guard that hangs.
const MOST_IN_VAIN: u32 = 5;
/// How long to wait before another try in vain, and how much longer each time.
const PAUSE: Duration = Duration::from_millis(50);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A guard has closed its end of the pair, but is not gone: the kernel still takes
/// it apart, or one of its threads hangs there, with nothing that matters. The next
/// one is started without it being waited for,
const AT_ONCE: Duration = Duration::from_millis(2);
/// unless there is no next one.
const LINGERING: Duration = Duration::from_millis(200);
/// How often it is said that there is no room for descriptors.
const AGAIN: Duration = Duration::from_secs(60);

/// What a supervisor needs to know.
pub struct Supervision<'a> {
    /// Makes the command that runs a guard.
    pub command: &'a dyn Fn() -> Command,
    /// Where the guard listens.
    pub socket: PathBuf,
    /// The file of pins to take. There is a keeper as long as it exists.
    pub pins: PathBuf,
    /// The signals to act upon, which are blocked.
    pub signals: &'a SignalFd,
    /// Says something to the operator.
    pub say: &'a dyn Fn(&str),
}

/// How a supervisor has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The guard has ended as it was told, or could not be started, with this
    /// status.
    With(u8),
    /// Guards have ended again and again.
    InVain,
}

struct Supervisor<'a> {
    given: &'a Supervision<'a>,
    /// Whoever has started the supervisor.
    above: Starter,
    /// What outlives the guard.
    store: Vec<(String, OwnedFd)>,
    /// The nice value that this process was started with.
    nice: i32,
    /// The socket that a guard has made, so that it can be removed in the end.
    made: Option<(u64, u64)>,
    /// The guard shall end.
    ending: Option<Instant>,
    /// A guard was ready once.
    was_ready: bool,
    /// Those that have ended since one said that it was alive.
    in_vain: InVain,
    /// The keeper of declared pins, and when another one may be started.
    keeper: Option<Worker>,
    keeper_after: Option<Instant>,
    /// Those that have ended since one had tried to take every pin.
    keepers_in_vain: InVain,
    /// What declared pins live by that the present keeper has taken, and that an
    /// earlier one has.
    declared: [Vec<(String, OwnedFd)>; 2],
    /// Guards that have ended, all but for a thread that hangs.
    lingering: Vec<Pid>,
    /// When it was said that there is no room for another descriptor, and that the
    /// keeper cannot be started.
    full_said: Option<Instant>,
    no_keeper_said: bool,
}

/// Guards, or keepers, that have ended one after the other and were of no use.
#[derive(Default)]
struct InVain {
    count: u32,
    /// When the first of them ended.
    since: Option<Instant>,
}

impl InVain {
    /// Counts one more. Says how long to wait before the next one, or that there
    /// should be none.
    fn another(&mut self) -> Option<Duration> {
        let since = *self.since.get_or_insert_with(Instant::now);
        self.count += 1;
        let is_enough = self.count > MOST_IN_VAIN && since.elapsed() > SILENCE;
        (!is_enough).then(|| LONGEST_PAUSE.min(PAUSE.saturating_mul(self.count)))
    }
}

/// Set for a guard that begins with the most urgent nice value: the one that it
/// shall have when it is ready.
pub(crate) const NICE: &str = "MAPDIRECT_NICE";

/// Lets this process run before others, because everybody who comes to the gate
/// waits for the next guard. Returns the nice value from before.
fn urgent() -> i32 {
    let before = rustix::process::getpriority_process(None).unwrap_or(0);
    // If this fails, it only takes longer.
    let _ = rustix::process::setpriority_process(None, MOST_URGENT);
    before
}

const MOST_URGENT: i32 = -20;

/// Undoes that in the calling thread, and in those that it starts from now on.
pub(crate) fn is_not_urgent_any_more() {
    let nice = std::env::var(NICE).ok().and_then(|nice| nice.parse().ok());
    if let Some(nice) = nice {
        // A thread may always be less urgent than it is.
        let _ = rustix::process::setpriority_process(None, nice);
    }
}

/// A guard that runs.
struct Worker {
    pid: Pid,
    process: OwnedFd,
    line: Socket,
    /// The thread that everybody waits for, and whether the guard has said that it
    /// is about to end.
    gate: Option<OwnedFd>,
    is_stopping: bool,
    /// When it is killed unless it says something before.
    due: Instant,
}

/// Runs a guard, and another whenever one ends, until a signal says to stop.
/// Call this before any thread is made. `above` is whoever started this process.
///
/// # Errors
///
/// When no process can be started, or nothing can be waited for.
pub fn supervise(given: &Supervision<'_>, above: Starter) -> Result<Ended, Errno> {
    let all = above.take_all("").into_iter();
    let (earlier, store) = all.partition(|(name, _)| name.starts_with(DECLARED));
    let nice = urgent();
    let mut supervisor = Supervisor {
        given,
        above,
        store,
        nice,
        made: None,
        ending: None,
        was_ready: false,
        in_vain: InVain::default(),
        keeper: None,
        keeper_after: None,
        keepers_in_vain: InVain::default(),
        declared: [Vec::new(), earlier],
        lingering: Vec::new(),
        full_said: None,
        no_keeper_said: false,
    };
    let ended = supervisor.run();
    supervisor.remove_socket();
    ended
}

impl Supervisor<'_> {
    fn run(&mut self) -> Result<Ended, Errno> {
        let mut said = String::new();
        loop {
            let started = self.start_with(LINE);
            let was_started = started.is_ok();
            let (code, how) = match started {
                Ok(worker) => match self.attend(worker)? {
                    Some(status) => (status.code, status.how),
                    None => (1, String::from("has ended")),
                },
                // Nobody waits for it, and what an earlier one has left stays above.
                Err(errno) if !self.was_ready => return Err(errno),
                Err(errno) => (0, format!("cannot be started: {errno}")),
            };
            // A signal may have told both of them to end.
            while self.ending.is_none() && self.has_signal() {
                self.take_signal(None)?;
            }
            if self.ending.is_some() || !self.was_ready {
                return Ok(Ended::With(code));
            }
            let Some(pause) = self.in_vain.another() else {
                self.give_up(&how);
                return Ok(Ended::InVain);
            };
            if was_started {
                (self.given.say)(&format!("the guard {how}; starting another one"));
            } else if said != how {
                (self.given.say)(&format!("the guard {how}; trying again"));
            }
            said = how;
            if !was_started || self.in_vain.count > 1 {
                let woken = wait_any(&[self.given.signals.as_fd()], Some(pause));
                if woken.is_err() {
                    std::thread::sleep(pause);
                }
            }
        }
    }

    /// Starts a guard, or a keeper, which gets nothing that is for a guard.
    fn start_with(&mut self, role: &str) -> Result<Worker, Errno> {
        // Until then they take the places of processes.
        self.bury_the_rest();
        let (line, theirs) = Socket::pair()?;
        let mut command = (self.given.command)();
        command
            .env_remove("NOTIFY_SOCKET")
            .env_remove("WATCHDOG_PID")
            .env("WATCHDOG_USEC", SILENCE.as_micros().to_string())
            .env(NICE, self.nice.to_string());
        if self.above.keeps() {
            command.env(PINS_STAY, "1");
        }
        let mut fds: Vec<_> = self
            .store
            .iter()
            .map(|(name, fd)| (name.as_str(), fd.as_fd()))
            .filter(|_| role == LINE)
            .collect();
        fds.push((role, theirs.as_fd()));
        let pid = Pid::from_raw(sd_listen_fds::start(&mut command, &fds)?).ok_or(Errno::SRCH)?;
        let number = pid.as_raw_nonzero().get();
        let process = pidfd::of_process(number).inspect_err(|_| {
            // It can be of no use if nobody sees its end.
            let _ = kill(number, Signal::KILL);
            self.lingering.push(pid);
        })?;
        Ok(Worker {
            pid,
            process,
            line,
            gate: None,
            is_stopping: false,
            due: Instant::now() + START,
        })
    }

    /// Looks after a guard until it has ended.
    fn attend(&mut self, mut worker: Worker) -> Result<Option<Status>, Errno> {
        // When this process goes on at the latest.
        let mut awake = Instant::now();
        loop {
            let now = Instant::now();
            // This process was stopped, and has not heard yet what the guard has said.
            if now.saturating_duration_since(awake) > PAUSE {
                worker.due = worker.due.max(now + SILENCE);
            }
            let due = self.ending.map_or(worker.due, |began| began + END);
            let left = due.saturating_duration_since(now);
            if left.is_zero() {
                if self.ending.is_none() {
                    (self.given.say)("the guard makes no progress, and is killed");
                }
                // If it is gone already, that is seen below.
                let _ = kill(worker.pid.as_raw_nonzero().get(), Signal::KILL);
                worker.due = now + START;
                self.ending = self.ending.map(|_| now);
            }
            self.start_keeper_if_due();
            let left = self
                .keeper_after
                .map_or(left, |after| left.min(after.saturating_duration_since(now)));
            awake = now + left;
            let signals = self.given.signals.as_fd();
            let keeper = self.keeper.as_ref();
            let fds = [
                worker.line.as_fd(),
                worker.process.as_fd(),
                signals,
                // One that is waited for already, if there is no keeper.
                keeper.map_or(signals, |keeper| keeper.line.as_fd()),
                worker.gate.as_ref().map_or(signals, AsFd::as_fd),
            ];
            let Ok([said, ended, signalled, kept, gate]) = wait_any(&fds, Some(left)) else {
                // So few descriptors are allowed that not even these may be waited for.
                std::thread::sleep(PAUSE);
                continue;
            };
            if kept && self.keeper.is_some() {
                self.hear_keeper();
            }
            if signalled {
                self.take_signal(Some(&worker))?;
            }
            // What it has said before it ended counts.
            if said && !self.hear(&mut worker) {
                return self.bury(&worker);
            }
            let gate_ended = gate && worker.gate.is_some() && !worker.is_stopping;
            if gate_ended && !said {
                // It was killed, as all of its threads are then, or cannot go on. The
                // kernel may take long to take it apart, if there is little time for
                // its other threads, but none of them runs any more.
                let _ = kill(worker.pid.as_raw_nonzero().get(), Signal::KILL);
            }
            if (ended || gate_ended) && !said {
                return self.bury(&worker);
            }
        }
    }

    /// Finds out how a guard has ended, which has let go of everything. `None` if
    /// it is not quite gone.
    fn bury(&mut self, worker: &Worker) -> Result<Option<Status>, Errno> {
        // Everybody at the gate waits for the next one.
        let is_urgent = self.was_ready && self.ending.is_none();
        let limit = if is_urgent { AT_ONCE } else { LINGERING };
        // If it cannot be waited for, it is not quite gone.
        let _ = wait_any(&[worker.process.as_fd()], Some(limit));
        match waitpid(Some(worker.pid), WaitOptions::NOHANG)? {
            Some((_, status)) => Ok(Some(Status::of(status))),
            None => {
                self.lingering.push(worker.pid);
                Ok(None)
            }
        }
    }

    /// Looks whether guards that were not quite gone are so now.
    fn bury_the_rest(&mut self) {
        for pid in std::mem::take(&mut self.lingering) {
            match waitpid(Some(pid), WaitOptions::NOHANG) {
                Ok(None) => self.lingering.push(pid),
                Ok(Some((_, status))) => {
                    let how = Status::of(status).how;
                    (self.given.say)(&format!("the guard before this one {how}"));
                }
                Err(_) => {}
            }
        }
    }

    /// Hears one message, or says that there will be none.
    fn hear(&mut self, worker: &mut Worker) -> bool {
        let mut buffer = [0; 4096];
        let Ok(mut received) = worker.line.receive(&mut buffer) else {
            return false;
        };
        if received.length == 0 {
            return false;
        }
        let text = String::from_utf8_lossy(&buffer[..received.length]).into_owned();
        let fd = received.fds.pop();
        if !self.takes(&worker.line, &text, fd.as_ref()) {
            return true;
        }
        let has = |wanted: &str| text.lines().any(|line| line == wanted);
        let value = |name: &str| value(&text, name).to_owned();
        // It goes on being looked after above as well.
        if self.ending.is_some() || !has("STOPPING=1") {
            // Whoever is above may be gone.
            let _ = self.above.send(&text, fd.as_ref().map(AsFd::as_fd));
        }
        self.bury_the_rest();
        if has("READY=1") {
            self.was_ready = true;
            self.want_keeper();
        }
        if has("READY=1") || has("WATCHDOG=1") {
            worker.due = Instant::now() + SILENCE;
        }
        if has("WATCHDOG=1") {
            self.in_vain = InVain::default();
        }
        if has("STOPPING=1") {
            worker.is_stopping = true;
            // Its end is no news any more, and would be told again and again.
            worker.gate = None;
        }
        if let Ok(tid) = value(GATE_THREAD).parse() {
            worker.gate = pidfd::of_thread(tid).ok();
        }
        if has("FDSTORE=1")
            && let Some(fd) = fd
        {
            let name = value("FDNAME");
            if name == LISTENER {
                let stat = rustix::fs::lstat(&self.given.socket);
                self.made = stat.ok().map(|stat| (stat.st_dev, stat.st_ino));
            }
            self.store.push((name, fd));
        } else if has("FDSTOREREMOVE=1") {
            let name = value("FDNAME");
            self.store.retain(|(other, _)| *other != name);
        }
        // A descriptor that came with a barrier is closed here, by which its sender
        // learns that everything before is done.
        true
    }

    /// Whether what shall be kept is here and may stay, if this is about something to
    /// keep; whoever has sent it is told.
    fn takes(&mut self, line: &Socket, text: &str, fd: Option<&OwnedFd>) -> bool {
        if !text.lines().any(|line| line == "FDSTORE=1") {
            return true;
        }
        let limit = getrlimit(Resource::Nofile).current;
        let is_kept = fd.is_some_and(|fd| has_room(fd.as_raw_fd(), limit));
        let asked = value(text, ASKED);
        if !asked.is_empty() {
            let answer = if is_kept { KEPT } else { NOT_KEPT };
            // Whoever does not read it has given up asking.
            let _ = line.send_now(&[answer.as_bytes(), b"=", asked.as_bytes()], &[]);
        }
        if !is_kept && self.full_said.is_none_or(|said| said.elapsed() > AGAIN) {
            self.full_said = Some(Instant::now());
            (self.given.say)(&format!(
                "too few descriptors (limit {}) to keep what the next guard needs; pins are \
                 refused until others end or the limit is raised (prlimit, LimitNOFILE)",
                limit.unwrap_or(u64::MAX)
            ));
        }
        is_kept
    }

    /// Has a keeper started if there is something to keep.
    fn want_keeper(&mut self) {
        if self.keeper.is_none() && self.given.pins.exists() {
            self.keeper_after = Some(Instant::now());
        } else if self.keeper.is_none() {
            self.forget_declared();
        }
    }

    fn start_keeper_if_due(&mut self) {
        let is_due = self
            .keeper_after
            .is_some_and(|after| after <= Instant::now());
        if !is_due || self.keeper.is_some() || self.ending.is_some() {
            return;
        }
        self.keeper_after = None;
        match self.start_with(KEEPER) {
            Ok(keeper) => {
                self.keeper = Some(keeper);
                self.no_keeper_said = false;
            }
            // What an earlier one has taken is kept here, and nobody waits for the
            // next, so there is no need to give up.
            Err(errno) => {
                self.keeper_after = Some(Instant::now() + LONGEST_PAUSE);
                if !std::mem::replace(&mut self.no_keeper_said, true) {
                    (self.given.say)(&format!(
                        "the keeper of pins cannot be started: {errno}; trying again"
                    ));
                }
            }
        }
    }

    /// Hears what the keeper says, or notices that it has ended.
    fn hear_keeper(&mut self) {
        let mut buffer = [0; 4096];
        let Some(keeper) = self.keeper.take() else {
            return;
        };
        match keeper.line.receive(&mut buffer) {
            Ok(mut received) if received.length > 0 => {
                let text = String::from_utf8_lossy(&buffer[..received.length]).into_owned();
                let name = text.lines().find_map(|line| line.strip_prefix("FDNAME="));
                let fd = received.fds.pop();
                let is_taken = self.takes(&keeper.line, &text, fd.as_ref());
                self.keeper = Some(keeper);
                if !is_taken {
                    return;
                }
                if name.is_some_and(|name| name.starts_with(DECLARED)) || text == "BARRIER=1" {
                    let _ = self.above.send(&text, fd.as_ref().map(AsFd::as_fd));
                }
                if text == TRIED {
                    self.keepers_in_vain = InVain::default();
                } else if text == TAKEN {
                    self.forget_declared();
                }
                if let (Some(name), Some(fd)) = (name, fd) {
                    self.declared[0].push((name.to_owned(), fd));
                } else if let Some(name) = name {
                    self.declared[0].retain(|(other, _)| other != name);
                }
            }
            _ => self.bury_keeper(&keeper),
        }
    }

    fn bury_keeper(&mut self, keeper: &Worker) {
        // What it has taken stays until the next one has taken it.
        let taken = std::mem::take(&mut self.declared[0]);
        self.declared[1].extend(taken);
        let status = self.bury(keeper).ok().flatten();
        if self.ending.is_some() {
            return;
        }
        if status.as_ref().is_some_and(|status| status.code == 0) {
            // It had nothing to keep any more.
            self.forget_declared();
            return;
        }
        let how = status.map_or_else(|| String::from("hangs"), |status| status.how);
        let Some(pause) = self.keepers_in_vain.another() else {
            (self.given.say)(&format!(
                "the keeper of pins {how} again and again; SIGHUP starts another one"
            ));
            self.forget_declared();
            return;
        };
        (self.given.say)(&format!("the keeper of pins {how}; starting another one"));
        self.keeper_after = Some(Instant::now() + pause);
    }

    /// Lets go of what an earlier keeper has taken.
    fn forget_declared(&mut self) {
        let [present, earlier] = &mut self.declared;
        for (name, _) in earlier.drain(..) {
            if !present.iter().any(|(other, _)| *other == name) {
                let _ = self
                    .above
                    .send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None);
            }
        }
    }

    fn has_signal(&self) -> bool {
        let signals = [self.given.signals.as_fd()];
        wait_any(&signals, Some(Duration::ZERO)) == Ok([true])
    }

    fn take_signal(&mut self, worker: Option<&Worker>) -> Result<(), Errno> {
        let received = self.given.signals.wait()?;
        let pass_on = |number| {
            if let Some(worker) = worker {
                // If it is gone, that is seen soon.
                let _ = kill(worker.pid.as_raw_nonzero().get(), number);
            }
        };
        match received.number {
            Signal::TERMINATE | Signal::INTERRUPT => {
                self.ending.get_or_insert_with(Instant::now);
                pass_on(Signal::TERMINATE);
                if let Some(keeper) = &self.keeper {
                    let _ = kill(keeper.pid.as_raw_nonzero().get(), Signal::TERMINATE);
                }
            }
            Signal::HANGUP => {
                pass_on(Signal::HANGUP);
                self.keepers_in_vain = InVain::default();
                match &self.keeper {
                    // If it is gone, that is seen soon.
                    Some(keeper) => drop(kill(keeper.pid.as_raw_nonzero().get(), Signal::HANGUP)),
                    None => self.want_keeper(),
                }
            }
            // Whoever sends another by mistake ends nothing by it.
            _ => {}
        }
        Ok(())
    }

    /// Lets go of everything, here and above, so that nobody waits any longer.
    fn give_up(&mut self, how: &str) {
        (self.given.say)(&format!(
            "the guard {how}, and none of the {} before it was of any use; giving up. Pins end \
             now, and their holders are told",
            self.in_vain.count - 1
        ));
        for (name, _) in self.store.drain(..) {
            if name != LISTENER {
                let _ = self
                    .above
                    .send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None);
            }
        }
    }

    /// Removes the socket, if a guard has made it and it is still there, and nobody
    /// keeps it for the next one.
    fn remove_socket(&self) {
        if self.above.keeps() {
            return;
        }
        let there = rustix::fs::lstat(&self.given.socket)
            .ok()
            .map(|stat| (stat.st_dev, stat.st_ino));
        if there.is_some() && there == self.made {
            let _ = rustix::fs::unlink(&self.given.socket);
        }
    }
}

/// What a message says of a name.
fn value<'a>(text: &'a str, name: &str) -> &'a str {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
        .unwrap_or_default()
}

/// Whether a descriptor of this number may stay. It is the lowest that was free, so it
/// says how many there are. The next guard begins with as many, under the same limit,
/// so a quarter stays free for what it needs besides.
fn has_room(number: i32, limit: Option<u64>) -> bool {
    let most = limit.map_or(u64::MAX, |limit| limit - limit / 4);
    u64::try_from(number).is_ok_and(|number| number < most)
}

/// How a process has ended.
struct Status {
    code: u8,
    how: String,
}

impl Status {
    fn of(status: rustix::process::WaitStatus) -> Self {
        let number = |number: i32| u8::try_from(number).unwrap_or(u8::MAX);
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Self {
                code: number(code),
                how: format!("has ended with status {code}"),
            },
            (None, Some(signal)) => Self {
                code: number(signal.saturating_add(128)),
                how: format!("was ended by signal {signal}"),
            },
            (None, None) => Self {
                code: 1,
                how: String::from("has ended"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_the_descriptors_stays_free() {
        for (number, limit, fits) in [
            (767, Some(1024), true),
            (768, Some(1024), false),
            (2, Some(3), true),
            (3, Some(3), false),
            (0, Some(0), false),
            (i32::MAX, None, true),
        ] {
            assert_eq!(has_room(number, limit), fits, "{number} of {limit:?}");
        }
    }

    #[test]
    fn what_a_message_says_is_found_by_its_whole_name() {
        let text = "FDSTORE=1\nFDNAME=D1\nX_FDNAME=2\nFDNAMES=3";
        assert_eq!(value(text, "FDNAME"), "D1");
        assert_eq!(value(text, "NAME"), "");
    }
}
