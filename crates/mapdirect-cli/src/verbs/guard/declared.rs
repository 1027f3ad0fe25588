//! The keeper of pins that a file declares: mapdirect-pins(5).
//!
//! It is a child of the supervisor, beside the guard, and a holder like any other.
//! So its pins outlive a guard that is killed. What they live by is kept by the
//! supervisor as well (and by systemd, where that has started the supervisor), so
//! that they outlive the keeper, too, until the next one has taken them.

use super::opening::Opening;
use crate::{output, terminal};
use anyhow::Result;
use mapdirect::{Guard, Pin, PinOptions, Scope, State, Strength};
use mapdirect_guard::{Declared, PolicyError, Starter, read_pins};
use mapdirect_sys::signal::{Signal, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long the holders of a file may take to let go of it, each time.
const PATIENCE: Duration = Duration::from_millis(500);
/// When a pin is tried again: the pause doubles.
const SOON: Duration = Duration::from_secs(1);
/// The longest pause.
const LATER: Duration = Duration::from_secs(60);
/// How often a pin is tried, until the file is read again.
const TRIES: u32 = 12;
/// How long it may take to open a file, at first. What takes longer is looked at
/// again.
const AT_ONCE: Duration = Duration::from_secs(1);
/// How often to look what has become of pins, and whether there is still a
/// supervisor.
const ROUND: Duration = Duration::from_millis(500);

/// How long what an earlier keeper has taken stays if a pin cannot be taken.
const EARLIER: Duration = Duration::from_secs(15);

/// A pin that shall be held.
struct Wanted {
    declared: Declared,
    pin: Option<Pin>,
    /// When to try again, if that is to be done.
    next: Option<Instant>,
    tries: u32,
    /// Whoever serves the way to the file has not answered yet.
    opening: Option<Opening>,
    /// What was said of it last.
    said: String,
}

impl Wanted {
    fn new(declared: Declared) -> Self {
        Self {
            declared,
            pin: None,
            next: Some(Instant::now()),
            tries: 0,
            opening: None,
            said: String::new(),
        }
    }

    fn say(&mut self, what: String) {
        if self.said != what {
            let path = terminal::name(&self.declared.path);
            output::complain_at_once(&format!("{path}: {what}"));
            self.said = what;
        }
    }

    /// The file, or why there is none. `None` if that will be known later.
    fn open(&mut self) -> Option<std::result::Result<File, String>> {
        let (opening, limit) = match self.opening.take() {
            Some(opening) => (Ok(opening), Duration::ZERO),
            None => (Opening::begin(&self.declared.path), AT_ONCE),
        };
        match opening.map(|opening| opening.wait(limit)) {
            Ok(Ok(file)) => Some(file),
            Ok(Err(opening)) => {
                self.opening = Some(opening);
                None
            }
            Err(error) => Some(Err(error.to_string())),
        }
    }

    /// Tries to take it.
    fn take(&mut self, guard: &Guard, starter: &Starter) {
        let Some(file) = self.open() else {
            self.say(String::from(
                "not pinned: a filesystem on the way to it does not answer; it is waited for",
            ));
            self.next = Some(Instant::now() + ROUND);
            return;
        };
        self.tries += 1;
        match file.and_then(|file| pin(&file, &self.declared, guard)) {
            Ok(pin) => {
                let kept = starter.keep_declared(pin.pin_id(), &pin.lives_by());
                let but = kept.err().map_or_else(String::new, |errno| {
                    format!("; nobody can keep it beside this process, with which it ends: {errno}")
                });
                self.say(format!(
                    "pinned as the file of pins says, pin {}{but}",
                    pin.pin_id()
                ));
                (self.pin, self.next, self.tries) = (Some(pin), None, 0);
            }
            Err(why) => {
                self.next = (self.tries < TRIES).then(|| {
                    let pause = SOON.saturating_mul(1 << self.tries.min(16).saturating_sub(1));
                    Instant::now() + pause.min(LATER)
                });
                let then = if self.next.is_some() {
                    "it is tried again"
                } else {
                    "that was the last try, until SIGHUP"
                };
                self.say(format!("not pinned: {why}; {then}"));
            }
        }
    }

    /// Lets go of a pin that is lost: there may be a promise to be had again.
    fn look(&mut self, starter: &Starter) {
        let lost = match self.pin.as_ref().map(Pin::state) {
            Some(State::Lost { why }) => why,
            _ => return,
        };
        self.say(format!("the pin is lost: {lost}"));
        self.let_go(starter);
        self.next = Some(Instant::now() + SOON);
    }

    fn let_go(&mut self, starter: &Starter) {
        if let Some(pin) = self.pin.take() {
            // With none, nothing can fail.
            let _ = starter.keep_declared(pin.pin_id(), &[]);
            drop(pin);
        }
    }
}

fn pin(file: &File, declared: &Declared, guard: &Guard) -> std::result::Result<Pin, String> {
    let mut options = PinOptions::new()
        .guard(guard.clone())
        .patience(PATIENCE)
        .deny_write(declared.deny_write)
        .deny_rename(declared.deny_rename);
    if let Some(range) = &declared.range {
        options = options.range(range.clone());
    }
    if declared.stable {
        options = options.strength(Strength::Stable);
    }
    if declared.whole_file {
        options = options.scope(Scope::File);
    }
    options.pin(file).map_err(|error| {
        let (obstacle, help) = (error.obstacle(), error.help());
        if help.is_empty() {
            obstacle.to_owned()
        } else {
            format!("{obstacle} ({help})")
        }
    })
}

/// Says what is wrong with the file.
fn complain(errors: &[PolicyError]) {
    for error in errors {
        output::complain_at_once(&error.to_string());
    }
}

/// Holds the pins that the file at `path` declares, until it declares none, or a
/// signal says to stop.
pub(super) fn keep(
    path: &Path,
    guard: &Guard,
    starter: &Starter,
    signals: &SignalFd,
) -> Result<()> {
    let begun = Instant::now();
    let read = read_pins(path);
    let mut is_read = read.is_ok();
    let mut wanted: Vec<Wanted> = match read {
        Ok(pins) => pins.into_iter().map(Wanted::new).collect(),
        Err(errors) => {
            complain(&errors);
            output::complain_at_once(
                "no pin of the file of pins is taken until it is mended (SIGHUP)",
            );
            Vec::new()
        }
    };
    let (mut has_tried, mut has_taken) = (false, false);
    loop {
        let now = Instant::now();
        for one in &mut wanted {
            one.look(starter);
            if one.next.is_some_and(|next| next <= now) {
                one.take(guard, starter);
            }
        }
        if !has_tried {
            starter.tried_all();
            has_tried = true;
        }
        let is_late = || begun.elapsed() > EARLIER;
        if !has_taken && is_read && (wanted.iter().all(|one| one.pin.is_some()) || is_late()) {
            // Pins of an earlier keeper end now. What could not be taken meanwhile
            // is tried again.
            starter.taken_all();
            has_taken = true;
        }
        if !path.exists() && wanted.is_empty() || starter.is_alone() {
            return Ok(());
        }
        let due = wanted.iter().filter_map(|one| one.next).min();
        let left = due.map_or(ROUND, |due| {
            ROUND.min(due.saturating_duration_since(Instant::now()))
        });
        let timeout = Timespec::try_from(left).ok();
        let mut fds = [PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(errno) => return Err(errno.into()),
        }
        match signals.wait()?.number {
            Signal::TERMINATE | Signal::INTERRUPT => return Ok(()),
            Signal::HANGUP => match read_pins(path) {
                Ok(pins) => {
                    is_read = true;
                    let before = wanted.len();
                    wanted = exchange(wanted, pins, starter);
                    output::complain_at_once(&format!(
                        "SIGHUP: read the file of pins again: it declares {} (before: {before})",
                        wanted.len()
                    ));
                }
                Err(errors) => {
                    complain(&errors);
                    output::complain_at_once("SIGHUP: declared pins stay as they were");
                }
            },
            _ => {}
        }
    }
}

/// Lets go of what is declared no more, and keeps what still is.
fn exchange(mut wanted: Vec<Wanted>, pins: Vec<Declared>, starter: &Starter) -> Vec<Wanted> {
    let mut now = Vec::new();
    for declared in pins {
        let known = wanted.iter().position(|one| one.declared == declared);
        let mut one = known.map_or_else(|| Wanted::new(declared), |at| wanted.swap_remove(at));
        if one.pin.is_none() {
            (one.next, one.tries) = (Some(Instant::now()), 0);
            one.said.clear();
        }
        now.push(one);
    }
    for mut gone in wanted {
        gone.let_go(starter);
        gone.say(String::from("the file of pins declares it no more"));
    }
    now
}
