//! Running a program whose descendants are a family: two processes do it.
//!
//! ```text
//!   shell ── front ─┬─ keeper (a session of its own) ── COMMAND ── ...
//!                   └────── what they tell each other
//! ```
//!
//! * The *front* is the process that was started. It has the terminal, passes
//!   signals on, stops when COMMAND stops, and ends as COMMAND does.
//! * The *keeper* holds what COMMAND needs, and is its parent. It is a
//!   subreaper: whoever descends from COMMAND descends from the keeper for as
//!   long as it lives, however often processes between them end. It blocks all
//!   signals, leaves the session of the terminal and lets go of all files of
//!   COMMAND, so that it ends only when the last descendant has, or by SIGKILL.
//!
//! So when the front is killed, COMMAND and what the keeper holds stay. When
//! the keeper is killed, COMMAND's processes go to the front, which is a
//! subreaper as well, and tells what has happened.
//!
//! COMMAND is a member of the front's process group, so keys of the terminal
//! reach it without anybody's help, and only signals that were sent to the front
//! alone are passed on.

use crate::args::OnLoss;
use crate::{Exit, exit, output, terminal};
use anyhow::{Context, Result};
use mapdirect_sys::fork::{Side, fork};
use mapdirect_sys::signal::{self, Before, Received, Signal, SignalFd};
use mapdirect_sys::unix::Socket;
use mapdirect_sys::{Errno, ancestry, descriptors, pidfd, proc};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{WaitOptions, WaitStatus};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// How long a family may take to end by itself when its promise is lost.
const GRACE: Duration = Duration::from_secs(5);
/// The pause between two looks at a family that is being ended.
const ROUND: Duration = Duration::from_millis(50);
/// The most lines that a keeper says. A front that is stopped reads none, and
/// the keeper must not wait for it.
const MOST_LINES: usize = 256;
/// The longest line.
const LONGEST_LINE: usize = 2000;

/// What the keeper tells the front, and the other way round: a letter, and a
/// text or number.
mod letter {
    /// To the front: everything is ready for COMMAND. To the keeper: start it.
    pub(super) const READY: u8 = b'r';
    /// To the front: say this.
    pub(super) const SAY: u8 = b'l';
    /// To the front: COMMAND was stopped by this signal.
    pub(super) const STOPPED: u8 = b's';
    /// To the front: end so.
    pub(super) const END: u8 = b'e';
    /// To the keeper: send COMMAND this signal.
    pub(super) const SIGNAL: u8 = b'k';
    /// To the keeper: COMMAND shall go on.
    pub(super) const CONTINUE: u8 = b'c';
}

/// Something that the keeper holds, and that may be lost while COMMAND runs.
pub(crate) trait Kept {
    /// Descriptors that become readable when there is something to notice.
    fn events(&self) -> Vec<BorrowedFd<'_>>;

    /// Looks what has happened, says it once, and returns how this must end if
    /// a promise is over.
    fn notice(&mut self, say: &mut dyn FnMut(&str)) -> Option<Exit>;
}

/// Splits the process: `work` runs in the keeper, and returns how to end. In
/// the front this returns that, when COMMAND has ended. Call it before any
/// thread is started.
///
/// # Errors
///
/// When there can be no second process, or it is lost before COMMAND is run.
pub(crate) fn run(on_loss: OnLoss, work: impl FnOnce(&mut Keeper) -> Result<Exit>) -> Result<Exit> {
    let (ours, theirs) = Socket::pair().context("socketpair")?;
    let (signals, before) = SignalFd::block_all().context("signalfd")?;
    become_subreaper()?;
    match fork().context("fork")? {
        Side::Parent(keeper) => {
            drop(theirs);
            let mut front = Front {
                keeper,
                link: ours,
                signals,
                started: false,
                on_loss,
            };
            match front.stand() {
                // COMMAND was run.
                Err(error) if front.started => Ok(exit::explain(&error)),
                ended => ended,
            }
        }
        Side::Child => {
            drop(ours);
            // Orphans come here, before they come to the front.
            let mut keeper = Keeper {
                link: theirs,
                signals,
                before,
                said: 0,
                told: false,
                front_is_gone: false,
            };
            let result = become_subreaper().and_then(|()| work(&mut keeper));
            let ending = result.unwrap_or_else(|error| {
                // stderr may be nobody's by now.
                keeper.say(&exit::words(&error));
                Exit::COMMAND_NOT_RUN
            });
            keeper.end(ending);
            std::process::exit(0)
        }
    }
}

fn become_subreaper() -> Result<()> {
    let own = rustix::process::getpid();
    rustix::process::set_child_subreaper(Some(own)).context("PR_SET_CHILD_SUBREAPER")
}

/// Waits until any of `fds` is readable, or for `limit`.
fn wait(fds: &[BorrowedFd<'_>], limit: Option<Duration>) -> Result<Vec<bool>> {
    let deadline = limit.map(|limit| Instant::now() + limit);
    let mut polled: Vec<_> = fds
        .iter()
        .map(|fd| PollFd::new(fd, PollFlags::IN))
        .collect();
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut polled, left.as_ref()) {
            Ok(_) => return Ok(polled.iter().map(|fd| !fd.revents().is_empty()).collect()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn send(link: &Socket, what: u8, text: &[u8]) -> Result<(), Errno> {
    link.send(&[&[what], text], &[])
}

/// A message of the other process; nothing if it has ended.
fn hear(link: &Socket) -> Option<(u8, Vec<u8>)> {
    let mut buffer = [0; LONGEST_LINE + 16];
    let received = link.receive(&mut buffer).ok()?;
    let (what, text) = buffer[..received.length].split_first()?;
    Some((*what, text.to_vec()))
}

fn number(text: &[u8]) -> i32 {
    let digits: Option<[u8; 4]> = text.try_into().ok();
    digits.map_or(0, i32::from_ne_bytes)
}

/// The process that was started.
struct Front {
    keeper: i32,
    link: Socket,
    signals: SignalFd,
    /// COMMAND was started, or will be at once.
    started: bool,
    on_loss: OnLoss,
}

impl Front {
    /// Stands for COMMAND until it has ended.
    fn stand(&mut self) -> Result<Exit> {
        let mut silent = true;
        loop {
            let limit = (silent && !self.started).then_some(output::SILENCE);
            let ready = wait(&[self.signals.as_fd(), self.link.as_fd()], limit)?;
            if silent && !ready[0] && !ready[1] {
                silent = false;
                output::still_waiting("for the pin, before COMMAND runs");
            }
            if ready[0] {
                let received = self.signals.wait()?;
                if let Some(ending) = self.take_signal(received) {
                    return Ok(ending);
                }
            }
            if ready[1] {
                let Some((what, text)) = hear(&self.link) else {
                    return Ok(self.left_alone());
                };
                match what {
                    letter::READY => {
                        self.started = true;
                        let _ = send(&self.link, letter::READY, &[]);
                    }
                    letter::SAY => output::complain(&String::from_utf8_lossy(&text)),
                    letter::STOPPED => {
                        let _ = signal::stop_by(number(&text));
                    }
                    letter::END => return Ok(Exit::from_code(number(&text))),
                    _ => {}
                }
            }
        }
    }

    /// Handles a signal, and says how to end if it ends this process.
    fn take_signal(&self, received: Received) -> Option<Exit> {
        let number = received.number;
        let stops = [
            Signal::TERMINAL_STOP,
            Signal::TERMINAL_INPUT,
            Signal::TERMINAL_OUTPUT,
        ];
        let harmless = [Signal::CHILD, Signal::PIPE, Signal::WINDOW, Signal::URGENT];
        match number {
            // Whoever continues this process alone means COMMAND as well.
            Signal::CONTINUE => {
                let _ = send(&self.link, letter::CONTINUE, &[]);
            }
            Signal::CHILD | Signal::PIPE => {}
            // From the terminal COMMAND got it as well. What COMMAND does then
            // is seen.
            _ if self.started && received.from_terminal => {}
            _ if self.started => {
                let _ = send(&self.link, letter::SIGNAL, &number.to_ne_bytes());
            }
            _ if stops.contains(&number) => {
                let _ = signal::stop_by(number);
            }
            _ if harmless.contains(&number) => {}
            _ => {
                // COMMAND was not started, and will not be: the keeper waits
                // for an answer before it does that. Nothing outlives it but
                // what the kernel takes back.
                let _ = signal::kill(self.keeper, Signal::KILL);
                return Some(Exit::of_signal(number));
            }
        }
        None
    }

    /// The keeper is gone, and with it what it has held. Its children are ours.
    fn left_alone(&self) -> Exit {
        if !self.started {
            return Exit::COMMAND_NOT_RUN;
        }
        if self.on_loss != OnLoss::Ignore {
            output::complain(
                "the process that kept the pin was killed: nothing is pinned any more for COMMAND",
            );
        }
        if self.on_loss == OnLoss::Kill {
            let mut ending = Ending::new();
            while children_are_left() {
                ending.go_on();
                std::thread::sleep(ROUND);
            }
        }
        Exit::LOST_UNDER_COMMAND
    }
}

/// Collects children that have ended, and says whether any is left.
fn children_are_left() -> bool {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
}

/// The process that is COMMAND's parent.
pub(crate) struct Keeper {
    link: Socket,
    signals: SignalFd,
    before: Before,
    /// How many lines were said.
    said: usize,
    /// The front knows how to end.
    told: bool,
    front_is_gone: bool,
}

impl Keeper {
    /// Has a line said to whoever started this.
    pub(crate) fn say(&mut self, text: &str) {
        if self.said == MOST_LINES {
            return;
        }
        self.said += 1;
        let mut end = text.len().min(LONGEST_LINE);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let _ = send(&self.link, letter::SAY, &text.as_bytes()[..end]);
    }

    fn end(&mut self, ending: Exit) {
        if !self.told {
            self.told = true;
            let code = i32::from(ending.code());
            let _ = send(&self.link, letter::END, &code.to_ne_bytes());
        }
    }

    /// Starts COMMAND, unless the front was interrupted, and leaves everything
    /// to it that the front had: the terminal, directories and descriptors.
    /// Returns its number, or how to end if it does not run.
    ///
    /// # Errors
    ///
    /// When the front is gone already.
    pub(crate) fn start(&mut self, command: &mut Command) -> Result<Result<i32, Exit>> {
        send(&self.link, letter::READY, &[]).context("telling the front")?;
        let (what, _) = hear(&self.link).context("the front has ended")?;
        anyhow::ensure!(what == letter::READY, "the front was interrupted");
        self.before.in_child(command);
        match command.spawn() {
            Ok(child) => {
                self.detach();
                Ok(Ok(child.id().cast_signed()))
            }
            Err(error) => {
                let program = terminal::name(Path::new(command.get_program()));
                output::complain(&format!("{program}: {error}"));
                Ok(Err(if error.kind() == std::io::ErrorKind::NotFound {
                    Exit::NOT_FOUND
                } else {
                    Exit::CANNOT_EXECUTE
                }))
            }
        }
    }

    /// Lets go of what belongs to COMMAND, so that nobody waits for this
    /// process: a reader of its output, a terminal, a mount.
    fn detach(&self) {
        // None of these can fail in a way that could be mended.
        let _ = rustix::process::setsid();
        let _ = rustix::process::chdir("/");
        let _ = descriptors::leave_inherited();
    }

    /// Keeps what is held for as long as COMMAND or any descendant lives.
    /// Returns how COMMAND has ended.
    ///
    /// # Errors
    ///
    /// When nothing can be waited for.
    pub(crate) fn attend(
        &mut self,
        command: i32,
        kept: &mut dyn Kept,
        on_loss: OnLoss,
    ) -> Result<Exit> {
        let mut children = Children {
            command,
            is_stopped: false,
            status: None,
        };
        let mut ending = None;
        loop {
            let (ready, events) = {
                let mut fds = vec![self.signals.as_fd()];
                fds.extend((!self.front_is_gone).then(|| self.link.as_fd()));
                let first = fds.len();
                fds.extend(kept.events());
                let limit = ending.is_some().then_some(ROUND);
                (wait(&fds, limit)?, first)
            };
            if ready[events..].contains(&true) {
                let lost = self.notice(kept, on_loss);
                if lost.is_some() && on_loss == OnLoss::Kill {
                    ending.get_or_insert_with(Ending::new);
                }
            }
            if !self.front_is_gone && ready[1] {
                self.take_order(&children);
            }
            if ready[0] {
                // Only that a child has changed means anything here.
                self.signals.wait()?;
            }
            let some_are_left = self.collect(&mut children);
            if let Some(status) = children.status {
                // It may have been found just now.
                let lost = self.notice(kept, on_loss);
                if lost.is_some() && on_loss == OnLoss::Kill {
                    ending.get_or_insert_with(Ending::new);
                }
                let exit = lost
                    .filter(|_| on_loss != OnLoss::Ignore)
                    .map_or_else(|| Exit::of_waited(status), Exit::under_command);
                if !some_are_left {
                    return Ok(exit);
                }
                // Whoever wants them killed hears of it when they are.
                if ending.is_none() {
                    self.end(exit);
                }
            }
            if let Some(ending) = &mut ending {
                ending.go_on();
            }
        }
    }

    /// Looks what has happened to what is kept, and says so if that is wanted.
    fn notice(&mut self, kept: &mut dyn Kept, on_loss: OnLoss) -> Option<Exit> {
        kept.notice(&mut |line| {
            if on_loss != OnLoss::Ignore {
                self.say(line);
            }
        })
    }

    /// Does what the front asks for.
    fn take_order(&mut self, children: &Children) {
        let Some((what, text)) = hear(&self.link) else {
            self.front_is_gone = true;
            return;
        };
        // COMMAND was not collected, so nobody else has its number.
        if children.status.is_some() {
            return;
        }
        match what {
            letter::SIGNAL => {
                let _ = signal::kill(children.command, number(&text));
            }
            letter::CONTINUE if children.is_stopped => {
                let _ = signal::kill(children.command, Signal::CONTINUE);
            }
            _ => {}
        }
    }

    /// Collects what has become of children, and says whether any are left.
    fn collect(&mut self, children: &mut Children) -> bool {
        let options = WaitOptions::NOHANG | WaitOptions::UNTRACED | WaitOptions::CONTINUED;
        loop {
            match rustix::process::wait(options) {
                Ok(Some((pid, status))) if pid.as_raw_nonzero().get() == children.command => {
                    if let Some(number) = status.stopping_signal() {
                        children.is_stopped = true;
                        let _ = send(&self.link, letter::STOPPED, &number.to_ne_bytes());
                    } else if status.continued() {
                        children.is_stopped = false;
                    } else {
                        children.status = Some(status);
                    }
                }
                Ok(Some(_)) | Err(Errno::INTR) => {}
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
    }
}

/// What the keeper knows of its children.
struct Children {
    /// The number of COMMAND.
    command: i32,
    is_stopped: bool,
    /// How COMMAND has ended.
    status: Option<WaitStatus>,
}

/// Ends all descendants of this process: first they are asked to, then killed.
struct Ending {
    begun: Instant,
    asked: bool,
}

impl Ending {
    fn new() -> Self {
        Self {
            begun: Instant::now(),
            asked: false,
        }
    }

    /// Does what is to be done by now. Killed processes leave their children to
    /// this process, so it takes several rounds.
    fn go_on(&mut self) {
        if !self.asked {
            self.asked = true;
            signal_descendants(Signal::TERMINATE);
            // Who is stopped cannot end.
            signal_descendants(Signal::CONTINUE);
        } else if self.begun.elapsed() >= GRACE {
            signal_descendants(Signal::KILL);
        }
    }
}

/// Sends a signal to every descendant of this process.
fn signal_descendants(number: i32) {
    let own = std::process::id().cast_signed();
    for pid in proc::numbers_in("/proc").unwrap_or_default() {
        // Held before it is looked at: the signal reaches nobody else.
        let Ok(process) = pidfd::of_process(pid) else {
            continue;
        };
        if pid != own && ancestry::descends_by_proc(pid, |it| it == own) {
            let _ = pidfd::signal(process.as_fd(), number);
        }
    }
}
