//! Writing to the terminal, where nobody may be listening any more.

use crate::Exit;
use crate::terminal::{self, Style};
use anyhow::{Result, anyhow};
use mapdirect_sys::names::is_deceptive;
use mapdirect_sys::signal::{self, Signal};
use mapdirect_sys::{Errno, stdout};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fmt::Write as _;
use std::io::{self, ErrorKind, Write as _};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What first went wrong with stdout.
static FAILURE: Mutex<Option<io::Error>> = Mutex::new(None);

fn failure() -> MutexGuard<'static, Option<io::Error>> {
    FAILURE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has a write beyond `RLIMIT_FSIZE` fail as others do, where a signal would end
/// this process without a word.
pub(crate) fn outlive_limits() {
    // That it can be ignored is certain.
    let _ = signal::ignore(Signal::FILE_SIZE);
}

/// Writes a line to stdout as it is, and makes sure it is out. When that fails,
/// nothing more is written, and [`finish`] says so.
fn write(text: &str) {
    let mut failure = failure();
    if failure.is_some() {
        return;
    }
    if stdout::was_closed() {
        *failure = Some(Errno::BADF.into());
        return;
    }
    let mut stdout = io::stdout().lock();
    let written = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
    *failure = written.err();
}

/// Writes a line to stdout, or several.
pub(crate) fn line(text: &str) {
    write(&fence(text));
}

/// Writes a line with a word in a style of its own, wrapped at words. Further
/// lines are indented by `hanging`.
pub(crate) fn marked(before: &str, (style, word): (Style, &str), rest: &str, hanging: usize) {
    let (before, word) = (fence(before), fence(word));
    let text = format!("{before}{word}{}", fence(rest));
    let text = wrapped(&text, terminal::width(), hanging);
    match text.strip_prefix(&format!("{before}{word}")) {
        Some(rest) => write(&format!("{before}{}{rest}", terminal::paint(style, &word))),
        None => write(&text),
    }
}

/// Writes a line to stdout, wrapped at words.
pub(crate) fn prose(text: &str) {
    let item = text.trim_start().starts_with("- ");
    write(&wrapped(
        &fence(text),
        terminal::width(),
        if item { 2 } else { 4 },
    ));
}

/// Writes a line of JSON to stdout. It holds names as they are, escaped as JSON
/// demands, and is the same in every locale.
pub(crate) fn json(value: &serde_json::Value) {
    write(&value.to_string());
}

/// Writes metrics to stdout. They escape names as OpenMetrics demands, and are
/// the same in every locale: other escapes would be none to a collector.
pub(crate) fn metrics(text: &str) {
    write(text.trim_end());
}

/// Writes one complaint to stderr.
pub(crate) fn complain(text: &str) {
    let mut text = fence(&format!("mapdirect: {}", without_numbers(text)));
    if let Some(width) = terminal::width_of_stderr() {
        let lines: Vec<_> = text.lines().map(|line| wrapped(line, width, 2)).collect();
        text = lines.join("\n");
    }
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Whether a stream takes something at once.
fn has_room(stream: impl AsFd) -> bool {
    let mut room = [PollFd::new(&stream, PollFlags::OUT)];
    let none = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut room, Some(&none)).is_ok_and(|ready| ready > 0)
        && room[0].revents().contains(PollFlags::OUT)
}

/// As [`line`], from a guard: it waits for nobody who reads stdout. What there is no
/// room for is not said.
pub(crate) fn line_at_once(text: &str) {
    if has_room(io::stdout()) {
        line(text);
    }
}

/// As [`complain`], from a guard, or who looks after one: neither waits for whoever
/// reads stderr. What there is no room for is not said.
pub(crate) fn complain_at_once(text: &str) {
    if has_room(io::stderr()) {
        // A pipe with room has that for a page (`pipe_poll`, fs/pipe.c), and what
        // is told becomes a little longer.
        const LONGEST: usize = 3500;
        let short: String = text
            .char_indices()
            .take_while(|(at, _)| *at < LONGEST)
            .map(|(_, one)| one)
            .collect();
        complain(&short);
    }
}

/// How long to wait without a word.
pub(crate) const SILENCE: Duration = Duration::from_secs(1);

/// Says to whoever looks at the terminal what takes so long.
pub(crate) fn still_waiting(what: &str) {
    if terminal::width_of_stderr().is_some() {
        complain(&format!("waiting {what}; Ctrl-C ends it"));
    }
}

/// Whether stdout has taken everything so far.
pub(crate) fn is_read() -> bool {
    failure().is_none()
}

/// Fails if stdout does not take what is written. A reader that has left is no
/// failure here.
pub(crate) fn check() -> Result<()> {
    let mut failure = failure();
    let error = failure.take_if(|error| error.kind() != ErrorKind::BrokenPipe);
    error.map_or(Ok(()), |error| Err(unwritten(&error)))
}

/// Says how a process ends that has written all it had to write, if not as it
/// would.
pub(crate) fn finish() -> Option<Exit> {
    let error = failure().take()?;
    if error.kind() == ErrorKind::BrokenPipe {
        return Some(Exit::UNREAD);
    }
    complain(&unwritten(&error).to_string());
    Some(Exit::FAILURE)
}

fn unwritten(error: &io::Error) -> anyhow::Error {
    anyhow!("cannot write to standard output: {error}")
}

/// `text` without the numbers that std adds to the words of an errno, and to those
/// alone: the name of a file may look like one.
fn without_numbers(text: &str) -> String {
    const BEGINS: &str = " (os error ";
    let mut rest = text;
    let mut kept = String::with_capacity(text.len());
    while let Some((before, behind)) = rest.split_once(BEGINS) {
        kept.push_str(before);
        let digits = behind.bytes().take_while(u8::is_ascii_digit).count();
        let says_so = behind[..digits].parse().is_ok_and(|errno| {
            let said = io::Error::from_raw_os_error(errno).to_string();
            said.split_once(BEGINS)
                .is_some_and(|(words, _)| before.ends_with(words))
        });
        rest = match behind[digits..].strip_prefix(')') {
            Some(behind) if says_so => behind,
            _ => {
                kept.push_str(BEGINS);
                behind
            }
        };
    }
    kept + rest
}

/// `text` as this terminal can show it. Nothing in it makes the terminal do
/// anything, whoever chose the names in it.
fn fence(text: &str) -> String {
    fenced(text, terminal::is_unicode())
}

fn fenced(text: &str, unicode: bool) -> String {
    let mut fenced = String::with_capacity(text.len());
    for character in text.chars() {
        let other = match character {
            '\n' => None,
            other if is_deceptive(other) => Some(None),
            other if unicode || other.is_ascii() => None,
            '\u{b5}' | '\u{3bc}' => Some(Some("u")),
            '\u{2018}' | '\u{2019}' => Some(Some("'")),
            '\u{201c}' | '\u{201d}' => Some(Some("\"")),
            '\u{2010}'..='\u{2015}' | '\u{2500}' => Some(Some("-")),
            '\u{2026}' => Some(Some("...")),
            '\u{d7}' => Some(Some("x")),
            _ => Some(None),
        };
        match other {
            None => fenced.push(character),
            Some(Some(plain)) => fenced.push_str(plain),
            Some(None) => {
                let _ = write!(fenced, "\\u{{{:x}}}", u32::from(character));
            }
        }
    }
    fenced
}

/// A line in pieces of at most `width` characters, cut between words. Further
/// lines are indented as the first, and by `hanging` more.
fn wrapped(line: &str, width: usize, hanging: usize) -> String {
    let indent = line.chars().take_while(|c| *c == ' ').count();
    let further = (indent + hanging).min(width / 2);
    let mut text = " ".repeat(indent);
    let mut column = indent;
    let mut is_first = true;
    for word in joined(line.trim_start_matches(' ')) {
        let length = word.chars().count();
        if !is_first && column + 1 + length > width {
            text.truncate(text.trim_end_matches(' ').len());
            text.push('\n');
            text.push_str(&" ".repeat(further));
            column = further;
        } else if !is_first {
            text.push(' ');
            column += 1;
        }
        text.push_str(&word);
        column += length;
        is_first = false;
    }
    text
}

/// The words of a line. A number and its unit are one.
fn joined(line: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    for word in line.split(' ') {
        let bare = word.trim_end_matches(|c: char| c.is_ascii_punctuation());
        let is_unit = matches!(
            bare,
            "B" | "KiB" | "MiB" | "GiB" | "TiB" | "s" | "min" | "h" | "ms"
        );
        match words.last_mut() {
            Some(last) if is_unit && last.ends_with(|c: char| c.is_ascii_digit()) => {
                last.push(' ');
                last.push_str(word);
            }
            _ => words.push(word.to_owned()),
        }
    }
    words
}

/// So many things: `1 pin`, `2 pins`.
pub(crate) fn count(number: u64, one: &str) -> String {
    match number {
        1 => format!("1 {one}"),
        many => format!("{many} {one}s"),
    }
}

/// Seconds, as a person says them.
pub(crate) fn seconds(seconds: u64) -> String {
    match seconds {
        0..300 => format!("{seconds} s"),
        300..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// A range of a file in words.
pub(crate) fn bytes(range: &Range<u64>) -> String {
    if range.end == u64::MAX {
        format!("bytes {} to the end (however far it grows)", range.start)
    } else {
        format!("bytes {} to {}", range.start, range.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn errors_are_words() {
        for (text, plain) in [
            (
                "No such file or directory (os error 2)",
                "No such file or directory",
            ),
            (
                "a: Input/output error (os error 5): Invalid argument (os error 22)!",
                "a: Input/output error: Invalid argument!",
            ),
            // The name of a file.
            ("cannot open y (os error 5)", "cannot open y (os error 5)"),
            ("y (os error 99999999999)", "y (os error 99999999999)"),
            ("a (os error x) (os error ", "a (os error x) (os error "),
        ] {
            assert_eq!(without_numbers(text), plain);
        }
    }

    #[test]
    fn one_and_many() {
        let pins: Vec<_> = (0..3).map(|number| count(number, "pin")).collect();
        assert_eq!(pins, ["0 pins", "1 pin", "2 pins"]);
        assert_eq!(seconds(299), "299 s");
        assert_eq!(seconds(3600), "60 min");
        assert_eq!(seconds(7200), "2 h");
        assert_eq!(seconds(172_800), "2 days");
    }

    #[test]
    fn what_a_terminal_would_obey_is_shown() {
        assert_eq!(fenced("a\x1b[2Jb\u{202e}c", true), "a\\u{1b}[2Jb\\u{202e}c");
        assert_eq!(
            fenced("12 \u{b5}s \u{2026} \u{e5}", true),
            "12 \u{b5}s \u{2026} \u{e5}"
        );
        assert_eq!(
            fenced("12 \u{b5}s \u{2026} \u{e5}", false),
            "12 us ... \\u{e5}"
        );
    }

    #[test]
    fn lines_break_at_words() {
        assert_eq!(wrapped("  one two three", 9, 2), "  one two\n    three");
        assert_eq!(wrapped("a", 1, 4), "a");
        assert_eq!(
            wrapped("it takes 12 s, or 4 KiB", 14, 2),
            "it takes 12 s,\n  or 4 KiB"
        );
        assert_eq!(
            wrapped("it takes 12 s, or 4 KiB", 12, 2),
            "it takes\n  12 s, or\n  4 KiB"
        );
    }

    proptest! {
        #[test]
        fn no_line_is_too_long_and_no_word_is_lost(
            words in proptest::collection::vec("[a-z]{1,12}", 1..30),
            indent in 0usize..6,
            hanging in 0usize..6,
            width in 30usize..120,
        ) {
            let text = format!("{}{}", " ".repeat(indent), words.join(" "));
            let text = wrapped(&text, width, hanging);
            prop_assert!(text.lines().all(|line| line.chars().count() <= width));
            prop_assert!(text.lines().all(|line| !line.ends_with(' ')));
            prop_assert_eq!(text.split_whitespace().collect::<Vec<_>>(), words);
        }

        #[test]
        fn nothing_deceptive_comes_out(text in "\\PC{0,9}\\p{C}{0,9}") {
            for unicode in [true, false] {
                let fenced = fenced(&text, unicode);
                prop_assert!(fenced.chars().all(|c| c == '\n' || !is_deceptive(c)));
                prop_assert!(unicode || fenced.is_ascii());
            }
        }
    }
}
