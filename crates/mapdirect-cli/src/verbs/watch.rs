//! `mapdirect watch`: refusals and breaches as they happen.

use super::records::{Filter, as_json, tell};
use crate::args::WatchArgs;
use crate::{Exit, output};
use anyhow::Result;
use mapdirect::Guard;
use mapdirect::records::{Heard, Records};
use mapdirect_sys::signal::{Signal, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;
use std::os::fd::AsFd;
use std::time::Duration;

/// How often to look for a guard while there is none.
const PAUSE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 300_000_000,
};

pub(crate) fn run(args: &WatchArgs) -> Result<Exit> {
    let filter = Filter::of(&args.filters)?;
    let teller = Teller { json: args.json };
    let signals = SignalFd::block(&[Signal::INTERRUPT, Signal::TERMINATE])?;
    let guard = Guard::from_env();
    let mut records = Some(guard.records(0, true)?);
    loop {
        let (stopped, ready) = wait(&signals, records.as_ref())?;
        if stopped {
            return Ok(Exit::SUCCESS);
        }
        let Some(open) = &mut records else {
            records = guard.records(0, true).ok();
            if records.is_some() {
                teller.guard("back", "a guard is there again");
            }
            continue;
        };
        if !ready {
            continue;
        }
        match open.next(Some(Duration::ZERO)) {
            Ok(Heard::Record(record)) if filter.wants(&record) => {
                if teller.json {
                    output::json(&as_json(&record));
                } else {
                    tell(&record);
                }
            }
            Ok(Heard::Missed(count)) => teller.missed(count),
            Ok(_) => {}
            Err(error) if Records::is_gone(&error) => {
                records = None;
                teller.guard("gone", "the guard is gone; waiting for one");
            }
            Err(error) => return Err(error.into()),
        }
        if !output::is_read() {
            return Ok(Exit::SUCCESS);
        }
    }
}

/// Waits for a signal or a record. Without a guard, waits a while.
fn wait(signals: &SignalFd, records: Option<&Records>) -> Result<(bool, bool)> {
    let signal_fd = signals.as_fd();
    let mut fds = vec![PollFd::from_borrowed_fd(signal_fd, PollFlags::IN)];
    if let Some(records) = records {
        fds.push(PollFd::from_borrowed_fd(records.as_fd(), PollFlags::IN));
    }
    let limit = records.is_none().then_some(&PAUSE);
    match poll(&mut fds, limit) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
    Ok((ready(0), ready(1)))
}

struct Teller {
    json: bool,
}

impl Teller {
    fn missed(&self, count: u64) {
        if self.json {
            output::json(&json!({ "event": "missed", "count": count }));
        } else {
            output::prose(&format!(
                "{} missed: they came too fast",
                output::count(count, "record")
            ));
        }
    }

    fn guard(&self, event: &str, words: &str) {
        output::complain(words);
        if self.json {
            output::json(&json!({ "event": format!("guard-{event}") }));
        }
    }
}
