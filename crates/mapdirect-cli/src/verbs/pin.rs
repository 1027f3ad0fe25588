//! `mapdirect pin`: pin a range, print its extents, hold it.

use crate::args::{PinArgs, ScopeChoice};
use crate::{Exit, draw, exit, json, output};
use anyhow::{Context, Result};
use mapdirect::{Pin, PinOptions, Scope};
use mapdirect_sys::signal::{self, Signal, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::json;
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
    let pin = options.pin(&file)?;
    drop(file);
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
    GuardGone,
}

fn wait(pin: &Pin, signals: &SignalFd, watch_guard: bool) -> Result<Woken> {
    loop {
        let signal_fd = signals.as_fd();
        let notice_fd = pin.notice_fd();
        let mut fds = [
            PollFd::new(&signal_fd, PollFlags::IN),
            PollFd::new(&notice_fd, PollFlags::RDHUP),
        ];
        let watched = if watch_guard { 2 } else { 1 };
        match poll(&mut fds[..watched], None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        if !fds[0].revents().is_empty() {
            return Ok(Woken::Signal(signals.wait()?));
        }
        if watch_guard && !fds[1].revents().is_empty() {
            return Ok(Woken::GuardGone);
        }
    }
}

const LOST: &str = "the guard is gone: the pin is not kept any more";

fn hold(pin: &Pin, signals: &SignalFd) -> Result<Exit> {
    loop {
        match wait(pin, signals, true)? {
            Woken::GuardGone => {
                output::complain(LOST);
                return Ok(Exit::PIN_LOST);
            }
            Woken::Signal(received) if received.number == Signal::CHILD => {}
            Woken::Signal(_) => return Ok(Exit::SUCCESS),
        }
    }
}

/// Holds the pin until the command ends.
fn attend(pin: &Pin, signals: &SignalFd, mut child: Child) -> Result<Exit> {
    let pid = child.id().cast_signed();
    let mut guarded = true;
    loop {
        match wait(pin, signals, guarded)? {
            Woken::GuardGone => {
                output::complain(LOST);
                guarded = false;
            }
            Woken::Signal(received) if received.number == Signal::CHILD => {
                if let Some(status) = child.try_wait().context("waiting for the command")? {
                    return Ok(Exit::of_command(status));
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
