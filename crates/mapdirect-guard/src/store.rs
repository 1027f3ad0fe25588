//! What a guard says to whoever started it, and what it leaves there.
//!
//! That is systemd, or the [supervisor](crate::supervise) that `mapdirect guard`
//! is when it is run by hand. Both speak the protocol of sd_notify(3), and both
//! keep descriptors: what a guard hands over by name (`FDSTORE=1`) comes back
//! to the next one (`LISTEN_FDS`). So what must outlive a guard is kept by
//! descriptors that somebody else has as well.
//!
//! systemd has a socket for messages, whose address is in `NOTIFY_SOCKET`. The
//! supervisor passes one end of a pair of sockets instead: nobody else can send
//! to it, and its end tells the supervisor that the guard is gone.

use crate::Errno;
use crate::journal::in_short;
use mapdirect_sys::sd_listen_fds::{self, Inherited};
use mapdirect_sys::sd_notify::Notify;
use mapdirect_sys::unix::Socket;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The name of the socket at which clients connect.
pub(crate) const LISTENER: &str = "listener";
/// The name of the end of a pair by which messages go to the supervisor.
pub(crate) const LINE: &str = "supervisor";

/// The same for a keeper of declared pins.
pub(crate) const KEEPER: &str = "keeper";
/// How the names of descriptors begin that a declared pin lives by.
pub(crate) const DECLARED: &str = "D";
/// What a keeper says when it has tried to take every pin once.
pub(crate) const TRIED: &str = "X_MAPDIRECT_TRIED=1";
/// and when it needs nothing any more that an earlier one has taken.
pub(crate) const TAKEN: &str = "X_MAPDIRECT_TAKEN=1";

/// By which whoever hands a descriptor to the supervisor wants to know whether it is
/// kept. The number comes back with the answer, as answers may come late.
pub(crate) const ASKED: &str = "X_MAPDIRECT_ASKED";
/// The answer that it is,
pub(crate) const KEPT: &str = "X_MAPDIRECT_KEPT";
/// and that it is not.
pub(crate) const NOT_KEPT: &str = "X_MAPDIRECT_NOT_KEPT";

/// By which a guard names the thread that everybody waits for.
pub(crate) const GATE_THREAD: &str = "X_MAPDIRECT_GATE_THREAD";

/// Set for a guard whose pins stay when it is told to end: whoever started its
/// supervisor keeps everything for the next one.
pub(crate) const PINS_STAY: &str = "MAPDIRECT_PINS_STAY";

/// The most bytes of names. There is room beside them for those of declared pins,
/// which a supervisor keeps, twice while one keeper takes over from another, and of
/// pins that are granted at the same moment.
const MOST_NAMES: usize = 80 << 10;

/// How long to wait until something is really in the store, or gone from it.
const STORED: Duration = Duration::from_millis(200);

/// Whoever started this process.
#[derive(Debug)]
pub struct Starter {
    line: Option<Line>,
    /// What it has passed, until somebody takes it.
    inherited: Mutex<Vec<Inherited>>,
    /// The bytes of all names that are kept, with the colons between them.
    names: AtomicUsize,
    /// Locked until the supervisor has answered.
    asked: Mutex<Asked>,
    watchdog: Option<Duration>,
    /// This process keeps declared pins, and is no guard.
    is_keeper: bool,
}

/// What is known of questions whether the supervisor keeps something.
#[derive(Debug, Default)]
struct Asked {
    count: u64,
    /// It has not answered the last one: those who ask meanwhile do not all wait.
    in_vain: bool,
}

#[derive(Debug)]
enum Line {
    Systemd(Notify),
    Supervisor(Socket),
}

impl Line {
    fn send(&self, text: &str, fd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        match self {
            Self::Systemd(notify) => notify.send(text, fd),
            Self::Supervisor(socket) => socket.send(&[text.as_bytes()], fd.as_slice()),
        }
    }
}

impl Starter {
    /// The one that the environment of this process names. Call this before
    /// anything else: it takes over descriptors by their numbers.
    #[must_use]
    pub fn of_this_process() -> Self {
        let mut inherited = sd_listen_fds::take();
        let keeper = take_named(&mut inherited, KEEPER);
        let is_keeper = keeper.is_some();
        let supervisor = keeper
            .or_else(|| take_named(&mut inherited, LINE))
            .and_then(|fd| Socket::connected(fd).ok())
            .filter(|socket| socket.set_send_timeout(Duration::from_secs(1)).is_ok());
        let systemd = || std::env::var_os("NOTIFY_SOCKET").and_then(|at| Notify::at(&at).ok());
        let line = supervisor
            .map(Line::Supervisor)
            .or_else(|| systemd().map(Line::Systemd));
        let number = |name| {
            std::env::var(name)
                .ok()
                .and_then(|value| value.parse().ok())
        };
        let is_meant =
            number("WATCHDOG_PID").is_none_or(|pid: u64| pid == std::process::id().into());
        let watchdog = number("WATCHDOG_USEC").filter(|_| is_meant && line.is_some());
        let names = inherited.iter().map(|one| one.name.len() + 1).sum();
        Self {
            line,
            inherited: Mutex::new(inherited),
            names: AtomicUsize::new(names),
            asked: Mutex::default(),
            watchdog: watchdog.map(Duration::from_micros),
            is_keeper,
        }
    }

    /// Nobody: nothing is said, and nothing outlives this process.
    #[must_use]
    pub fn none() -> Self {
        Self {
            line: None,
            inherited: Mutex::default(),
            names: AtomicUsize::new(0),
            asked: Mutex::default(),
            watchdog: None,
            is_keeper: false,
        }
    }

    /// Nobody, who has passed these descriptors all the same.
    #[cfg(test)]
    pub(crate) fn with(inherited: Vec<(String, OwnedFd)>) -> Self {
        let inherited = inherited.into_iter();
        Self {
            inherited: Mutex::new(inherited.map(|(name, fd)| Inherited { name, fd }).collect()),
            ..Self::none()
        }
    }

    /// Whether messages go to systemd, or to something that speaks like it.
    #[must_use]
    pub fn is_systemd(&self) -> bool {
        matches!(self.line, Some(Line::Systemd(_)))
    }

    /// Whether this process was started by a supervisor, as its worker.
    #[must_use]
    pub fn is_supervisor(&self) -> bool {
        matches!(self.line, Some(Line::Supervisor(_)))
    }

    /// Whether pins stay when this process is told to end, whatever the gate.
    #[must_use]
    pub fn pins_stay(&self) -> bool {
        self.is_supervisor() && std::env::var_os(PINS_STAY).is_some()
    }

    /// Has this process be told (SIGTERM) when its supervisor ends, which may be gone
    /// already: says whether it is not.
    #[must_use]
    pub fn end_with_supervisor(&self) -> bool {
        let Some(Line::Supervisor(line)) = &self.line else {
            return true;
        };
        let signal = Some(rustix::process::Signal::TERM);
        rustix::process::set_parent_process_death_signal(signal).is_ok()
            && line.peer_is_gone() == Ok(false)
    }

    /// Names the calling thread as the one that everybody waits for, to a
    /// supervisor: when it is gone, another guard is needed at once.
    pub(crate) fn this_is_the_gate(&self) {
        if self.is_supervisor() {
            let tid = rustix::thread::gettid().as_raw_nonzero();
            self.say(&format!("{GATE_THREAD}={tid}"));
        }
    }

    /// Whether this process shall keep declared pins, and be no guard.
    #[must_use]
    pub fn is_keeper(&self) -> bool {
        self.is_keeper
    }

    /// Has the descriptors that a declared pin lives by outlive this process, or,
    /// with none, end with it.
    ///
    /// # Errors
    ///
    /// When nobody can keep them, and so the pin ends with this process.
    pub fn keep_declared(&self, pin: u64, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let name = format!("{DECLARED}{}", in_short(pin));
        let kept = fds.iter().try_for_each(|fd| self.keep(&name, *fd));
        if fds.is_empty() || kept.is_err() {
            self.let_go(&name);
        }
        kept
    }

    /// Says that every declared pin was tried once.
    pub fn tried_all(&self) {
        self.say(TRIED);
    }

    /// Says that those that an earlier keeper has left are not needed any more.
    pub fn taken_all(&self) {
        self.say(TAKEN);
    }

    /// Whether the supervisor is gone.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        match &self.line {
            Some(Line::Supervisor(line)) => line.peer_is_gone() != Ok(false),
            _ => false,
        }
    }

    /// How often [`alive`](Self::alive) must be called at least, if that matters.
    #[must_use]
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Says that this process serves from now on.
    pub fn ready(&self, status: &str) {
        self.say(&format!("READY=1\nSTATUS={}", one_line(status)));
    }

    /// Says what this process is doing, in one line for a person.
    pub fn status(&self, status: &str) {
        self.say(&format!("STATUS={}", one_line(status)));
    }

    /// Says that this process still does what it should.
    pub fn alive(&self) {
        self.say("WATCHDOG=1");
    }

    /// Says that this process is about to end.
    pub fn stopping(&self, status: &str) {
        self.say(&format!("STOPPING=1\nSTATUS={}", one_line(status)));
    }

    fn say(&self, text: &str) {
        // Whoever does not listen is not told.
        let _ = self.send(text, None);
    }

    pub(crate) fn send(&self, text: &str, fd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        self.line
            .as_ref()
            .map_or(Ok(()), |line| line.send(text, fd))
    }

    /// Whether what is [kept](Self::keep) outlives this process.
    pub(crate) fn keeps(&self) -> bool {
        self.line.is_some()
    }

    /// Has a descriptor outlive this process, and come back to the next one under
    /// this name.
    ///
    /// # Errors
    ///
    /// `ENFILE` if the supervisor has no room for it, and as [`send`](Self::send).
    pub(crate) fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        // Also if it fails: it is let go of then, as what came of it is not known.
        self.names.fetch_add(name.len() + 1, SeqCst);
        // It must not be let go of because its other end is closed: the next
        // guard has to see that.
        let order = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0");
        match &self.line {
            Some(Line::Supervisor(line)) => self.ask(line, &order, fd),
            _ => self.send(&order, Some(fd)),
        }
    }

    /// Has the supervisor keep something, and waits a moment until it has said whether
    /// it does. A descriptor for which its reader has no room is lost on the way, and
    /// the sender is not told: unix(7).
    fn ask(&self, line: &Socket, order: &str, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.count += 1;
        let number = asked.count;
        let question = format!("{order}\n{ASKED}={number}");
        line.send(&[question.as_bytes()], &[fd])?;
        let (kept, not_kept) = (format!("{KEPT}={number}"), format!("{NOT_KEPT}={number}"));
        let mut limit = Instant::now();
        if !asked.in_vain {
            limit += STORED;
        }
        let mut buffer = [0; 128];
        loop {
            let left = limit.saturating_duration_since(Instant::now());
            // It may be stopped. It takes what was sent before it does anything else.
            if line.wait_until_readable(left) != Ok(true) {
                asked.in_vain = true;
                return Ok(());
            }
            let answer = match line.receive(&mut buffer) {
                Ok(received) if received.length > 0 => &buffer[..received.length],
                // It is gone, and this process ends for that.
                _ => return Ok(()),
            };
            if answer == kept.as_bytes() {
                asked.in_vain = false;
                return Ok(());
            }
            if answer == not_kept.as_bytes() {
                asked.in_vain = false;
                return Err(Errno::NFILE);
            }
            // The answer to an earlier question: it goes on.
            if std::mem::take(&mut asked.in_vain) {
                limit = Instant::now() + STORED;
            }
        }
    }

    /// Whether the names of what is kept leave room for more. They come to the next
    /// process in one string, `LISTEN_FDNAMES`, and the kernel starts no program
    /// with a longer one than 128 KiB (`MAX_ARG_STRLEN`, fs/exec.c).
    pub(crate) fn has_room(&self) -> bool {
        !self.keeps() || self.names.load(SeqCst) < MOST_NAMES
    }

    /// Ends what [`keep`](Self::keep) has begun, for all descriptors of this name,
    /// and waits a moment until that is done. Says whether it is, or will be before
    /// anything that is sent from now on.
    pub(crate) fn let_go(&self, name: &str) -> bool {
        if !self.keeps() {
            return true;
        }
        let removal = format!("FDSTOREREMOVE=1\nFDNAME={name}");
        if self.send(&removal, None).is_err() {
            return false;
        }
        let less = |names: usize| Some(names.saturating_sub(name.len() + 1));
        let _ = self.names.fetch_update(SeqCst, SeqCst, less);
        // Messages are read in their order, and whoever has read this one closes
        // the end of the pipe that came with it: sd_notify_barrier(3).
        if let Ok((ours, theirs)) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            && self.send("BARRIER=1", Some(theirs.as_fd())).is_ok()
        {
            drop(theirs);
            // If nobody reads, it goes later.
            let _ = crate::wake::wait_any(&[ours.as_fd()], Some(STORED));
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Inherited>> {
        self.inherited
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// What came back under a name; the first of several.
    pub(crate) fn take(&self, name: &str) -> Option<OwnedFd> {
        take_named(&mut self.lock(), name)
    }

    /// Everything that came back under names that begin so, with what follows in
    /// the name.
    pub(crate) fn take_all(&self, prefix: &str) -> Vec<(String, OwnedFd)> {
        let mut inherited = self.lock();
        let (wanted, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut *inherited)
            .into_iter()
            .partition(|one| one.name.starts_with(prefix));
        *inherited = rest;
        wanted
            .into_iter()
            .map(|one| (one.name[prefix.len()..].to_owned(), one.fd))
            .collect()
    }
}

fn take_named(inherited: &mut Vec<Inherited>, name: &str) -> Option<OwnedFd> {
    let at = inherited.iter().position(|one| one.name == name)?;
    Some(inherited.swap_remove(at).fd)
}

/// A text without the end of a line in it, which would begin another message.
fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process with a supervisor that says so of all that it shall keep.
    fn answered(answer: &'static str) -> (Starter, std::thread::JoinHandle<Vec<String>>) {
        let (line, theirs) = Socket::pair().unwrap();
        let supervisor = std::thread::spawn(move || {
            let mut heard = Vec::new();
            let mut buffer = [0; 256];
            while let Ok(received) = theirs.receive(&mut buffer)
                && received.length > 0
            {
                let text = String::from_utf8_lossy(&buffer[..received.length]).into_owned();
                if let Some((_, number)) = text.split_once(&format!("{ASKED}=")) {
                    // One from before comes late.
                    for said in [format!("{NOT_KEPT}=0"), format!("{answer}={number}")] {
                        theirs.send(&[said.as_bytes()], &[]).unwrap();
                    }
                }
                heard.push(text);
            }
            heard
        });
        let starter = Starter {
            line: Some(Line::Supervisor(line)),
            ..Starter::none()
        };
        (starter, supervisor)
    }

    #[test]
    fn declared_pins_are_kept_under_short_names() {
        let (starter, supervisor) = answered(KEPT);
        let (pipe, writer) = rustix::pipe::pipe().unwrap();
        // The largest number that the first pin of a guard may have.
        let pin = u64::MAX >> 16;
        let both = [pipe.as_fd(), writer.as_fd()];
        starter.keep_declared(pin, &both).unwrap();
        drop(starter);
        let heard = supervisor.join().unwrap();
        assert_eq!(heard.len(), 2);
        for message in heard {
            let name = message.lines().find_map(|it| it.strip_prefix("FDNAME="));
            assert!(name.unwrap().len() <= "D".len() + 9, "{message}");
        }
    }

    #[test]
    fn whoever_is_not_kept_is_told_and_let_go_of() {
        let (starter, supervisor) = answered(NOT_KEPT);
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        assert_eq!(starter.keep("P1", pipe.as_fd()), Err(Errno::NFILE));
        let declared = starter.keep_declared(5, &[pipe.as_fd()]);
        assert_eq!(declared, Err(Errno::NFILE));
        drop(starter);
        let heard = supervisor.join().unwrap();
        assert!(heard.contains(&String::from("FDSTOREREMOVE=1\nFDNAME=D5")));
    }

    #[test]
    fn nobody_waits_twice_for_a_supervisor_that_does_not_answer() {
        let (line, theirs) = Socket::pair().unwrap();
        let starter = Starter {
            line: Some(Line::Supervisor(line)),
            ..Starter::none()
        };
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        let began = Instant::now();
        for _ in 0..20 {
            starter.keep("P1", pipe.as_fd()).unwrap();
        }
        assert!(began.elapsed() < STORED * 10, "{:?}", began.elapsed());
        // It goes on.
        for number in 1..=21 {
            let answer = if number == 21 { NOT_KEPT } else { KEPT };
            let answer = format!("{answer}={number}");
            theirs.send(&[answer.as_bytes()], &[]).unwrap();
        }
        assert_eq!(starter.keep("P1", pipe.as_fd()), Err(Errno::NFILE));
    }

    #[test]
    fn there_is_room_for_names_until_they_are_let_go_of() {
        let (line, _theirs) = Socket::pair().unwrap();
        let starter = Starter {
            line: Some(Line::Supervisor(line)),
            names: AtomicUsize::new(MOST_NAMES - 5),
            ..Starter::none()
        };
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        assert!(starter.has_room());
        starter.keep("P123", pipe.as_fd()).unwrap();
        assert!(!starter.has_room());
        assert!(starter.let_go("P123"));
        assert!(starter.has_room());
        // Who keeps nothing needs no room.
        let nobody = Starter {
            names: AtomicUsize::new(MOST_NAMES),
            ..Starter::none()
        };
        assert!(nobody.has_room());
    }
}
