//! Counts what tests say.

use super::{Counts, Ran};
use std::time::Instant;

/// What tests say, counted.
pub(super) struct Tally {
    pub(super) counts: Counts,
    /// How many tests were to run: a test may end the whole program.
    announced: u64,
    notes: Vec<String>,
    passed_since: u64,
    started: Instant,
}

impl Tally {
    pub(super) fn new() -> Self {
        Self {
            counts: Counts::default(),
            announced: 0,
            notes: Vec::new(),
            passed_since: 0,
            started: Instant::now(),
        }
    }

    /// Takes a line of theirs; returns what is to be shown.
    pub(super) fn hear(&mut self, line: &str) -> Option<String> {
        if line.starts_with("test ") && line.ends_with(" ok") {
            self.passed_since += 1;
            let passed = self.passed_since;
            return passed
                .is_multiple_of(100)
                .then(|| format!("{passed} passed, {:.0?}", self.started.elapsed()));
        }
        if let Some(announced) = parse_beginning(line) {
            self.announced += announced;
            return None;
        }
        if let Some(found) = parse_result(line) {
            self.counts.passed += found.passed;
            self.counts.failed += found.failed;
            self.counts.ignored += found.ignored;
            return None;
        }
        let told = ["tried: ", "not available here: ", "wrong: "];
        if told.iter().any(|word| line.starts_with(word)) {
            self.notes.push(line.to_owned());
        }
        (!line.is_empty()).then(|| line.to_owned())
    }

    /// Takes what is no test of a binary.
    pub(super) fn count(&mut self, passed: bool) {
        self.announced += 1;
        if passed {
            self.counts.passed += 1;
        } else {
            self.counts.failed += 1;
        }
    }

    /// The stage that said all this; `ok` is what the program said at its
    /// end. A test that is ignored should have run here, and fails the stage.
    pub(super) fn ran(self, name: &str, ok: bool, started: Instant) -> Ran {
        let Self {
            counts,
            announced,
            mut notes,
            ..
        } = self;
        let ended = counts.passed + counts.failed + counts.ignored;
        if announced != ended {
            notes.push(format!("{announced} tests began, and {ended} have ended"));
        }
        if counts.ignored > 0 {
            notes.push(format!("{} tests should have run here", counts.ignored));
        }
        if counts.passed == 0 {
            notes.push(String::from("nothing ran"));
        }
        let all_is_well = counts.failed == 0 && counts.passed > 0 && counts.ignored == 0;
        Ran {
            name: name.to_owned(),
            ok: ok && all_is_well && announced == ended,
            counts: Some(counts),
            took: started.elapsed(),
            notes,
        }
    }
}

/// Reads the line with which a test binary begins, as in `running 3 tests`.
fn parse_beginning(line: &str) -> Option<u64> {
    let (number, tests) = line.strip_prefix("running ")?.split_once(' ')?;
    tests.starts_with("test").then_some(())?;
    number.parse().ok()
}

/// Reads the line that sums up a test binary, as in `test result: ok. 3
/// passed; 0 failed; 0 ignored; ...`.
fn parse_result(line: &str) -> Option<Counts> {
    let rest = line.strip_prefix("test result: ")?;
    let (_, numbers) = rest.split_once(". ")?;
    let mut counts = Counts::default();
    for part in numbers.split(';') {
        let mut words = part.split_whitespace();
        let (Some(number), Some(what)) = (words.next(), words.next()) else {
            continue;
        };
        let place = match what {
            "passed" => &mut counts.passed,
            "failed" => &mut counts.failed,
            "ignored" => &mut counts.ignored,
            _ => continue,
        };
        *place = number.parse().ok()?;
    }
    Some(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted() {
        let line = "test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 1 filtered out";
        assert_eq!(
            parse_result(line),
            Some(Counts {
                passed: 12,
                failed: 0,
                ignored: 3
            })
        );
        let line = "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured";
        assert_eq!(parse_result(line).map(|counts| counts.failed), Some(2));
        assert_eq!(parse_result("test a::b ... ok"), None);
    }

    #[test]
    fn who_does_not_come_to_the_end_is_missed() {
        let said = |lines: &[&str]| {
            let mut tally = Tally::new();
            lines.iter().for_each(|line| drop(tally.hear(line)));
            tally.ran("", true, Instant::now())
        };
        let whole = [
            "running 1 test",
            "test result: ok. 1 passed; 0 failed; 0 ignored",
        ];
        assert!(said(&whole).ok);
        // A test has ended the second program, with success.
        let half = [whole[0], whole[1], "running 106 tests"];
        let ran = said(&half);
        assert!(!ran.ok);
        assert_eq!(ran.notes, ["107 tests began, and 1 have ended"]);
    }
}
