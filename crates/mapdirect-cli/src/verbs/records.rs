//! What `watch` and `log` share: which records are wanted, and how they are
//! told.

use crate::args::{EventChoice, RecordFilters};
use crate::terminal::{Style, told_name, told_word};
use crate::{json, output};
use anyhow::{Context, Result, bail};
use mapdirect::Cause;
use mapdirect::records::{Actor, Event, Name, NameState, Record};
use mapdirect_guard::user_number;
use mapdirect_sys::proc::printable;
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

/// Which records are wanted.
#[derive(Debug)]
pub(crate) struct Filter {
    file: Option<Wanted>,
    pid: Option<i32>,
    uid: Option<u32>,
    pin: Option<u64>,
    operation: Option<String>,
    event: Option<Event>,
    /// Nanoseconds since the epoch.
    pub(crate) since: u64,
}

/// A file, by what it is and by its name.
#[derive(Debug)]
struct Wanted {
    path: PathBuf,
    /// Device and inode, if there is such a file now.
    identity: Option<(u32, u32, u64)>,
}

impl Wanted {
    fn of(path: &Path) -> Result<Self> {
        let path = std::path::absolute(path).context("the current directory")?;
        let identity = rustix::fs::stat(&path).ok().map(|stat| {
            let device = stat.st_dev;
            (
                rustix::fs::major(device),
                rustix::fs::minor(device),
                stat.st_ino,
            )
        });
        Ok(Self {
            path: path.canonicalize().unwrap_or(path),
            identity,
        })
    }

    fn is(&self, record: &Record) -> bool {
        let identity = (record.device.major, record.device.minor, record.inode);
        let named = |name: &str| Path::new(name) == self.path;
        self.identity == Some(identity) || named(&record.name.path) || named(&record.name.former)
    }
}

impl Filter {
    /// # Errors
    ///
    /// What is wrong with the arguments.
    pub(crate) fn of(filters: &RecordFilters) -> Result<Self> {
        let uid = match &filters.uid {
            None => None,
            Some(user) => match user_number(user) {
                Some(uid) => Some(uid),
                None => bail!(
                    "there is no user {} in /etc; a number does as well",
                    told_word(user)
                ),
            },
        };
        Ok(Self {
            file: filters.file.as_deref().map(Wanted::of).transpose()?,
            pid: filters.pid,
            uid,
            pin: filters.pin,
            operation: filters.operation.clone(),
            event: filters.kind.map(|kind| match kind {
                EventChoice::Refusal => Event::Refusal,
                EventChoice::Breach => Event::Breach,
            }),
            since: 0,
        })
    }

    pub(crate) fn wants(&self, record: &Record) -> bool {
        let actor = &record.actor;
        record.time >= self.since
            && self.file.as_ref().is_none_or(|file| file.is(record))
            && self
                .pid
                .is_none_or(|pid| actor.pid == pid || actor.tid == pid)
            && self.uid.is_none_or(|uid| actor.uid == Some(uid))
            && self.pin.is_none_or(|pin| record.pin == pin)
            && self
                .operation
                .as_ref()
                .is_none_or(|operation| record.operation == *operation)
            && self.event.is_none_or(|event| record.event == event)
    }
}

/// Tells a record to a person: one line, unless a terminal is too narrow for it.
pub(crate) fn tell(record: &Record) {
    let (time, style, word, rest) = parts(record);
    if std::io::stdout().is_terminal() {
        output::marked(&format!("{time} "), (style, &word), &rest, 4);
    } else {
        output::line(&format!("{time} {word}{rest}"));
    }
}

/// When it was, the word for it with its style, and the rest.
fn parts(record: &Record) -> (String, Style, String, String) {
    let (style, word) = match record.event {
        Event::Refusal => (
            Style::Note,
            format!("refused {}", printable(&record.operation)),
        ),
        Event::Breach => (Style::Bad, String::from("breach")),
        _ => (Style::Strong, String::from(record.event.name())),
    };
    let mut rest = format!(
        " {}{}, by {}",
        name(record),
        range(record),
        who(&record.actor)
    );
    if record.event == Event::Breach && !record.operation.is_empty() {
        rest += &format!(", {}", printable(&record.operation));
    }
    if record.pin != 0 {
        rest += &format!("; pin {}", record.pin);
        if let Some(owner) = &record.owner {
            let command = match owner.command.as_str() {
                "" => String::new(),
                command => format!("{}, ", told_word(command)),
            };
            rest += &format!(" of {command}pid {}, uid {}", owner.pid, owner.uid);
        }
    }
    if !record.call.is_empty() {
        rest += &format!("; {}", printable(&record.call));
    }
    (time(record.time), style, word, rest)
}

/// Whether this is the path of a file: not all have one, and the kernel tells none
/// that is longer than a page.
pub(crate) fn is_known(path: &str) -> bool {
    !matches!(path, "" | "?")
}

/// The file of a record, in words.
pub(crate) fn name(record: &Record) -> String {
    if !is_known(&record.name.path) {
        format!("inode {} of {}", record.inode, record.device)
    } else {
        name_in_words(&record.name, told_name)
    }
}

/// A name, and what must be said of it, with names as `show` shows them.
pub(crate) fn name_in_words(name: &Name, show: fn(&str) -> String) -> String {
    let path = show(&name.path);
    match name.remark_as(show) {
        remark if remark.is_empty() => path,
        remark => format!("{path} ({remark})"),
    }
}

fn range(record: &Record) -> String {
    match &record.range {
        None => String::new(),
        Some(range) if range.end == u64::MAX => format!(", bytes from {}", range.start),
        Some(range) if range.is_empty() => format!(" at {}", range.start),
        Some(range) => format!(", bytes {} to {}", range.start, range.end),
    }
}

/// A process in words.
pub(crate) fn who(actor: &Actor) -> String {
    if (actor.pid, actor.tid) == (0, 0) {
        return String::from("somebody unknown");
    }
    let command = match actor.command.as_str() {
        "" => "?",
        command => command,
    };
    let mut facts = Vec::new();
    if actor.pid != 0 {
        facts.push(format!("pid {}", actor.pid));
    }
    if actor.tid != 0 && actor.tid != actor.pid {
        facts.push(format!("thread {}", actor.tid));
    }
    match actor.uid {
        Some(uid) => facts.push(format!("uid {uid}")),
        None => facts.push(String::from("uid unknown")),
    }
    if !actor.executable.is_empty() {
        facts.push(told_word(&actor.executable));
    }
    format!("{} ({})", told_word(command), facts.join(", "))
}

/// What caused a breach, in words.
pub(crate) fn cause(cause: &Cause) -> String {
    let what = match cause.what.as_str() {
        "" => String::new(),
        what => format!(", {}", printable(what)),
    };
    format!("pid {} ({}){what}", cause.pid, told_word(&cause.command))
}

/// A record for machines.
pub(crate) fn as_json(record: &Record) -> Value {
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let number = |number: i32| (number != 0).then_some(number);
    let actor = &record.actor;
    json!({
        "event": record.event.name(),
        "number": record.number,
        "time": record.time,
        "operation": text(&record.operation),
        "call": text(&record.call),
        "offset": record.range.as_ref().map(|range| range.start),
        "length": record.range.as_ref().and_then(json::length),
        "file": text(&record.name.path),
        "former": text(&record.name.former),
        "name_state": states(&record.name),
        "device": record.device.to_string(),
        "inode": record.inode,
        "pin": (record.pin != 0).then_some(record.pin),
        "holder": record.owner.as_ref().map(|owner| json!({
            "pid": owner.pid,
            "uid": owner.uid,
            "command": text(&owner.command),
        })),
        "pid": number(actor.pid),
        "tid": number(actor.tid),
        "uid": actor.uid,
        "command": text(&actor.command),
        "executable": text(&actor.executable),
        "cgroup": text(&actor.cgroup),
        "gate": record.gate.name(),
        "before": record.before.iter().map(json::extent).collect::<Vec<_>>(),
        "after": record.after.iter().map(json::extent).collect::<Vec<_>>(),
    })
}

/// What is known of a name, in words for machines.
pub(crate) fn states(name: &Name) -> Vec<&'static str> {
    [
        (NameState::PRESENT, "present"),
        (NameState::DELETED, "deleted"),
        (NameState::REPLACED, "replaced"),
        (NameState::MISSING, "missing"),
    ]
    .into_iter()
    .filter(|(state, _)| name.state.contains(*state))
    .map(|(_, word)| word)
    .collect()
}

/// A time in nanoseconds since the epoch, as RFC 3339 has it, in UTC and
/// milliseconds.
pub(crate) fn time(nanoseconds: u64) -> String {
    let seconds = nanoseconds / 1_000_000_000;
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Days in years that begin in March, since 1 March of year 0.
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        of_day / 3600,
        of_day / 60 % 60,
        of_day % 60,
        nanoseconds / 1_000_000 % 1000,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use mapdirect::{DeviceId, Gate};

    #[test]
    fn times_are_as_date_says_them() {
        for (seconds, said) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_868_799, "2000-02-29T23:59:59.000Z"),
            (951_868_800, "2000-03-01T00:00:00.000Z"),
            (1_796_083_199, "2026-11-30T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(time(seconds * 1_000_000_000), said);
        }
        assert_eq!(time(1_234_567_890), "1970-01-01T00:00:01.234Z");
    }

    #[test]
    fn a_line_says_it_all_and_moves_no_cursor() {
        let device = DeviceId { major: 7, minor: 0 };
        let mut record = Record::new(Event::Refusal, 0, Gate::Fanotify, (device, 5));
        record.operation = String::from("write");
        record.range = Some(0..4096);
        record.name = Name::new("/a\n\x1b[2J", "", NameState::DELETED);
        record.actor.pid = 7;
        record.actor.tid = 8;
        record.actor.command = String::from("d\x1bd");
        record.pin = 3;
        let (time, style, word, rest) = parts(&record);
        assert_eq!((&*time, style), ("1970-01-01T00:00:00.000Z", Style::Note));
        assert_eq!(word, "refused write");
        let said = r" $'/a\n\x1b[2J' (deleted), bytes 0 to 4096, by d";
        assert!(rest.starts_with(said), "{rest}");
        assert!(!rest.contains(char::is_control), "{rest}");
        assert!(
            rest.contains("(pid 7, thread 8, uid unknown); pin 3"),
            "{rest}"
        );
    }
}
