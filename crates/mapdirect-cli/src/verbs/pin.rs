//! `mapdirect pin`: pin a range, print its extents, hold it.

use crate::args::{PinArgs, ScopeChoice};
use crate::{Exit, draw, exit, json, output};
use anyhow::{Context, Result};
use mapdirect::{Breach, EventFd, Extent, Integrity, Pin, PinOptions, Scope, State};
use mapdirect_sys::proc::printable;
use mapdirect_sys::signal::{self, Signal, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::json;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::process::{Child, Command};
use std::time::Duration;

pub(crate) fn run(args: &PinArgs) -> Result<Exit> {
    let result = pin_and_hold(args);
    if args.command.is_empty() {
        return result;
    }
    // With a command, its status is the status, and failures of our own need
    // one that a command is unlikely to have.
    Ok(result.unwrap_or_else(|error| {
        exit::explain(&error);
        Exit::COMMAND_NOT_RUN
    }))
}

fn pin_and_hold(args: &PinArgs) -> Result<Exit> {
    let signals = SignalFd::block(&[
        Signal::INTERRUPT,
        Signal::TERMINATE,
        Signal::HANGUP,
        Signal::CHILD,
    ])?;
    let name = args.file.display();
    let file = super::show::open(&args.file)?;
    let size = file.metadata()?.len();
    let mut options = PinOptions::new()
        .patience(Duration::from_millis(args.patience.into()))
        .scope(match args.scope {
            ScopeChoice::Range => Scope::Range,
            ScopeChoice::File => Scope::File,
        });
    if let Some(range) = &args.range {
        let bytes = range.resolve(size);
        anyhow::ensure!(
            !bytes.is_empty(),
            "{name} ends at byte {size}, before the range begins"
        );
        options = options.range(bytes);
    }
    let pin = match ask(options, file, &signals)? {
        Asked::Answered(pin) => pin?,
        Asked::Interrupted(number) => return Ok(Exit::of_signal(number)),
    };
    tell(args, &pin);
    match &args.command[..] {
        [] => hold(&pin, &signals),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments);
            signal::unblocked_in_child(&mut command);
            match command.spawn() {
                Ok(child) => attend(&pin, &signals, child),
                Err(error) => {
                    output::complain(&format!("{}: {error}", program.display()));
                    Ok(if error.kind() == std::io::ErrorKind::NotFound {
                        Exit::NOT_FOUND
                    } else {
                        Exit::CANNOT_EXECUTE
                    })
                }
            }
        }
    }
}

/// What came of asking for a pin.
enum Asked {
    Answered(mapdirect::Result<Pin>),
    /// A signal came while others had to be waited for.
    Interrupted(i32),
}

/// Asks for the pin, and lets a signal end the waiting: signals are blocked
/// here, so another thread has to wait for the guard. It ends with the process,
/// which takes the connection along, and the guard forgets the request.
fn ask(options: PinOptions, file: File, signals: &SignalFd) -> Result<Asked> {
    let (mut answered, answer) = std::io::pipe()?;
    let asking = std::thread::spawn(move || {
        let pin = options.pin(&file);
        // The pin does not need it, and a duplicate would be in its way.
        drop(file);
        // Closed here, however this ends.
        drop(answer);
        pin
    });
    loop {
        let signal_fd = signals.as_fd();
        let answered_fd = answered.as_fd();
        let mut fds = [
            PollFd::new(&signal_fd, PollFlags::IN),
            PollFd::new(&answered_fd, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        if !fds[1].revents().is_empty() {
            // Nothing is ever written to it: it has ended.
            let _ = answered.read(&mut [0])?;
            return match asking.join() {
                Ok(pin) => Ok(Asked::Answered(pin)),
                Err(_) => anyhow::bail!("asking for the pin failed"),
            };
        }
        let received = signals.wait()?;
        if received.number != Signal::CHILD {
            return Ok(Asked::Interrupted(received.number));
        }
    }
}

fn tell(args: &PinArgs, pin: &Pin) {
    let map = pin.block_map();
    let range = pin.range();
    if args.json {
        let value = json!({
            "file": args.file.to_string_lossy(),
            "pin": pin.pin_id(),
            "pid": std::process::id(),
            "range": json::range(&range),
            "scope": match args.scope {
                ScopeChoice::Range => "range",
                ScopeChoice::File => "file",
            },
            "file_size": map.file_size(),
            "block_size": map.block_size(),
            "device": map.device().to_string(),
            "stable": map.is_stable(),
            "extents": json::extents(map),
        });
        output::line(&value.to_string());
        return;
    }
    output::line(&format!(
        "pinned bytes {} to {} of {} (blocks of {} bytes on device {})",
        range.start,
        range.end,
        args.file.display(),
        map.block_size(),
        map.device(),
    ));
    output::line(draw::extent_table(map).trim_end());
    if args.command.is_empty() {
        output::line("held until SIGINT or SIGTERM");
    }
}

/// What a held pin waited for.
enum Woken {
    Signal(signal::Received),
    /// Something became of the pin.
    Changed,
}

/// A pin, and what was said of it so far.
struct Held<'a> {
    pin: &'a Pin,
    event: EventFd,
    signals: &'a SignalFd,
    /// It was said that no guard is there.
    is_unattended: bool,
    /// It was said that it is over.
    ending: Option<Exit>,
}

impl<'a> Held<'a> {
    fn new(pin: &'a Pin, signals: &'a SignalFd) -> Result<Self> {
        Ok(Self {
            pin,
            event: pin.event_fd()?,
            signals,
            is_unattended: false,
            ending: None,
        })
    }

    fn wait(&self) -> Result<Woken> {
        loop {
            let signal_fd = self.signals.as_fd();
            let mut fds = [
                PollFd::new(&signal_fd, PollFlags::IN),
                PollFd::new(&self.event, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            if !fds[0].revents().is_empty() {
                return Ok(Woken::Signal(self.signals.wait()?));
            }
            if self.event.clear() {
                return Ok(Woken::Changed);
            }
        }
    }

    /// Says what became of the pin, once; and how this must end, if the promise
    /// is over. A breach is more than a loss.
    fn tell(&mut self) -> Option<Exit> {
        match self.pin.state() {
            State::Kept if self.is_unattended => {
                self.is_unattended = false;
                output::complain("a guard is back, and has taken the pin over");
            }
            State::Unattended { why } if !self.is_unattended => {
                self.is_unattended = true;
                output::complain(&format!("the pin stays, unattended: {}", printable(&why)));
            }
            State::Lost { why } if self.ending.is_none() => {
                self.ending = Some(Exit::PIN_LOST);
                if self.pin.integrity().is_intact() {
                    let why = printable(&why);
                    output::complain(&format!("the pin is not kept any more: {why}"));
                }
            }
            _ => {}
        }
        if self.ending != Some(Exit::PIN_BREACHED)
            && let Integrity::Breached { breaches, .. } = self.pin.integrity()
        {
            self.ending = Some(Exit::PIN_BREACHED);
            for breach in &breaches {
                output::complain(&printable(&breach_line(breach)));
            }
        }
        self.ending
    }
}

fn breach_line(breach: &Breach) -> String {
    let cause = breach
        .cause
        .as_ref()
        .map_or_else(String::new, |cause| format!("; by {cause}"));
    let count = |extents: &[Extent]| match extents {
        [one] => one.state.name().to_owned(),
        more => format!("{} extents", more.len()),
    };
    format!(
        "the pin was broken: bytes {} to {} of {} have changed ({}, now {}){cause}",
        breach.range.start,
        breach.range.end,
        breach.path,
        count(&breach.before),
        count(&breach.after),
    )
}

fn hold(pin: &Pin, signals: &SignalFd) -> Result<Exit> {
    let mut held = Held::new(pin, signals)?;
    loop {
        match held.wait()? {
            Woken::Changed => {
                if let Some(exit) = held.tell() {
                    return Ok(exit);
                }
            }
            Woken::Signal(received) if received.number == Signal::CHILD => {}
            Woken::Signal(_) => return Ok(Exit::SUCCESS),
        }
    }
}

/// Holds the pin until the command ends.
fn attend(pin: &Pin, signals: &SignalFd, mut child: Child) -> Result<Exit> {
    let pid = child.id().cast_signed();
    let mut held = Held::new(pin, signals)?;
    loop {
        match held.wait()? {
            Woken::Changed => {
                let _ = held.tell();
            }
            Woken::Signal(received) if received.number == Signal::CHILD => {
                if let Some(status) = child.try_wait().context("waiting for the command")? {
                    // It may have been found just now.
                    let ending = held.tell();
                    return Ok(match ending {
                        None => Exit::of_command(status),
                        Some(Exit::PIN_BREACHED) => Exit::BREACHED_UNDER_COMMAND,
                        Some(_) => Exit::LOST_UNDER_COMMAND,
                    });
                }
            }
            // From the terminal the command got it as well; sent to this
            // process alone it is meant for the command.
            Woken::Signal(received) => {
                if !received.from_terminal {
                    // It may have ended just now: then SIGCHLD is next.
                    let _ = signal::kill(pid, received.number);
                }
            }
        }
    }
}
