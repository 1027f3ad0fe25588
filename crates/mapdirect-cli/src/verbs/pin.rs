//! `mapdirect pin`: pin a range of files, print its extents, hold it.

use crate::args::{PinArgs, ScopeChoice, StrengthChoice};
use crate::{Exit, draw, exit, json, output};
use anyhow::{Context, Result};
use mapdirect::{Breach, EventFd, Extent, Integrity, Pin, PinOptions, Scope, State, Strength};
use mapdirect_sys::proc::printable;
use mapdirect_sys::signal::{self, Signal, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::json;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::Path;
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
    let files = args
        .files
        .iter()
        .map(|path| super::show::open(path))
        .collect::<Result<Vec<_>>>()?;
    let mut options = PinOptions::new()
        .patience(Duration::from_millis(args.patience.into()))
        .scope(match args.scope {
            ScopeChoice::Range => Scope::Range,
            ScopeChoice::File => Scope::File,
        })
        .strength(match args.strength {
            StrengthChoice::All => Strength::All,
            StrengthChoice::Stable => Strength::Stable,
        });
    if let Some(range) = common_range(args, &files)? {
        options = options.range(range);
    }
    let pins = match ask(options, files, &signals)? {
        Asked::Answered(pins) => pins?,
        Asked::Interrupted(number) => return Ok(Exit::of_signal(number)),
    };
    for (path, pin) in args.files.iter().zip(&pins) {
        tell(args, path, pin);
    }
    if args.command.is_empty() && !args.json {
        output::line("held until SIGINT or SIGTERM");
    }
    match &args.command[..] {
        [] => hold(args, &pins, &signals),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments);
            signal::unblocked_in_child(&mut command);
            match command.spawn() {
                Ok(child) => attend(args, &pins, &signals, child),
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

/// The range that is pinned of every file, in bytes; nothing for the whole of
/// each.
fn common_range(args: &PinArgs, files: &[File]) -> Result<Option<Range<u64>>> {
    let goes_on = args.strength == StrengthChoice::Stable;
    let Some(range) = &args.range else {
        return Ok(goes_on.then_some(0..u64::MAX));
    };
    if goes_on && range.length.is_none() {
        return Ok(Some(range.offset..u64::MAX));
    }
    let mut common = None;
    for (path, file) in args.files.iter().zip(files) {
        let (name, size) = (path.display(), file.metadata()?.len());
        let bytes = range.resolve(size);
        anyhow::ensure!(
            !bytes.is_empty(),
            "{name} ends at byte {size}, before the range begins"
        );
        anyhow::ensure!(
            common.as_ref().is_none_or(|common| *common == bytes),
            "a range without an end is another one in each file: {name} ends at byte {size}\n\
             help: say how long the range is, or pin these files one by one"
        );
        common = Some(bytes);
    }
    Ok(common)
}

/// What came of asking for pins.
enum Asked {
    Answered(mapdirect::Result<Vec<Pin>>),
    /// A signal came while others had to be waited for.
    Interrupted(i32),
}

/// Asks for the pins, and lets a signal end the waiting: signals are blocked
/// here, so another thread has to wait for the guard. It ends with the process,
/// which takes the connection along, and the guard forgets the request.
fn ask(options: PinOptions, files: Vec<File>, signals: &SignalFd) -> Result<Asked> {
    let (mut answered, answer) = std::io::pipe()?;
    let asking = std::thread::spawn(move || {
        let pins = options.pin_all(&files);
        // The pins do not need them, and a duplicate would be in their way.
        drop(files);
        // Closed here, however this ends.
        drop(answer);
        pins
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
                Ok(pins) => Ok(Asked::Answered(pins)),
                Err(_) => anyhow::bail!("asking for the pin failed"),
            };
        }
        let received = signals.wait()?;
        if received.number != Signal::CHILD {
            return Ok(Asked::Interrupted(received.number));
        }
    }
}

fn tell(args: &PinArgs, path: &Path, pin: &Pin) {
    let map = pin.block_map();
    let range = pin.range();
    if args.json {
        let value = json!({
            "file": path.to_string_lossy(),
            "pin": pin.pin_id(),
            "pid": std::process::id(),
            "range": json::range(&range),
            "scope": match args.scope {
                ScopeChoice::Range => "range",
                ScopeChoice::File => "file",
            },
            "strength": json::strength(match args.strength {
                StrengthChoice::All => Strength::All,
                StrengthChoice::Stable => Strength::Stable,
            }),
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
        "pinned {} of {} (blocks of {} bytes on device {})",
        output::bytes(&range),
        path.display(),
        map.block_size(),
        map.device(),
    ));
    if args.strength == StrengthChoice::Stable {
        output::line(
            "held is what is written, and what is written from now on; the rest may change",
        );
    }
    output::line(draw::extent_table(map).trim_end());
}

/// What held pins waited for.
enum Woken {
    Signal(signal::Received),
    /// Something became of a pin.
    Changed,
}

/// Pins, and what was said of them so far.
struct AllHeld<'a> {
    pins: Vec<Held<'a>>,
    signals: &'a SignalFd,
}

impl<'a> AllHeld<'a> {
    fn new(args: &PinArgs, pins: &'a [Pin], signals: &'a SignalFd) -> Result<Self> {
        let named = args.files.iter().zip(pins).map(|(path, pin)| {
            // Of the only one there is nothing to tell apart.
            let several = pins.len() > 1;
            let name = several.then(|| format!("{}: ", printable(&path.to_string_lossy())));
            Held::new(pin, name.unwrap_or_default())
        });
        let pins = named.collect::<Result<_>>()?;
        Ok(Self { pins, signals })
    }

    fn wait(&self) -> Result<Woken> {
        loop {
            let signal_fd = self.signals.as_fd();
            let mut fds = vec![PollFd::new(&signal_fd, PollFlags::IN)];
            let events = self.pins.iter().map(|held| &held.event);
            fds.extend(events.map(|event| PollFd::new(event, PollFlags::IN)));
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            if !fds[0].revents().is_empty() {
                return Ok(Woken::Signal(self.signals.wait()?));
            }
            // All of them: one that stays set would be found again and again.
            let changed = self.pins.iter().filter(|held| held.event.clear()).count();
            if changed > 0 {
                return Ok(Woken::Changed);
            }
        }
    }

    /// Says what became of each pin, once; and how this must end, if a promise
    /// is over. A breach is more than a loss.
    fn tell(&mut self) -> Option<Exit> {
        let endings: Vec<_> = self.pins.iter_mut().filter_map(Held::tell).collect();
        let breached = endings.contains(&Exit::PIN_BREACHED);
        if breached {
            Some(Exit::PIN_BREACHED)
        } else {
            endings.first().copied()
        }
    }
}

/// A pin, and what was said of it so far.
struct Held<'a> {
    pin: &'a Pin,
    /// Begins what is said of it: the file, if there are several.
    name: String,
    event: EventFd,
    /// It was said that no guard is there.
    is_unattended: bool,
    /// It was said that it is over.
    ending: Option<Exit>,
}

impl<'a> Held<'a> {
    fn new(pin: &'a Pin, name: String) -> Result<Self> {
        Ok(Self {
            pin,
            name,
            event: pin.event_fd()?,
            is_unattended: false,
            ending: None,
        })
    }

    /// Says what became of the pin, once; and how this must end, if the promise
    /// is over. A breach is more than a loss.
    fn tell(&mut self) -> Option<Exit> {
        let name = &self.name;
        match self.pin.state() {
            State::Kept if self.is_unattended => {
                self.is_unattended = false;
                output::complain(&format!(
                    "{name}a guard is back, and has taken the pin over"
                ));
            }
            State::Unattended { why } if !self.is_unattended => {
                self.is_unattended = true;
                let why = printable(&why);
                output::complain(&format!("{name}the pin stays, unattended: {why}"));
            }
            State::Lost { why } if self.ending.is_none() => {
                self.ending = Some(Exit::PIN_LOST);
                if self.pin.integrity().is_intact() {
                    let why = printable(&why);
                    output::complain(&format!("{name}the pin is not kept any more: {why}"));
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

fn hold(args: &PinArgs, pins: &[Pin], signals: &SignalFd) -> Result<Exit> {
    let mut held = AllHeld::new(args, pins, signals)?;
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

/// Holds the pins until the command ends.
fn attend(args: &PinArgs, pins: &[Pin], signals: &SignalFd, mut child: Child) -> Result<Exit> {
    let pid = child.id().cast_signed();
    let mut held = AllHeld::new(args, pins, signals)?;
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
