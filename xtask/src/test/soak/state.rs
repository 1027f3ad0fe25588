//! How far a soak got, in a file that outlives it.

use super::git;
use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What came of a piece so far, or of a part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Done {
    /// Hostile operations made.
    pub(super) operations: u64,
    /// Parts run,
    pub(super) parts: u64,
    /// and tests that passed in them.
    pub(super) tests: u64,
    /// Parts that failed.
    pub(super) failures: u64,
    /// Seed of the last part.
    pub(super) seed: u64,
    /// How long it took.
    pub(super) seconds: u64,
    /// Days of the first and the last part.
    pub(super) first: String,
    pub(super) last: String,
    /// What was said of failures.
    pub(super) notes: Vec<String>,
}

/// Everything that ran of one commit.
#[derive(Clone, Debug)]
pub(super) struct State {
    path: PathBuf,
    commit: String,
    pieces: BTreeMap<String, Done>,
}

/// What is documentation changes nothing that runs.
const WHAT_RUNS: [&str; 4] = [".", ":!docs", ":!man", ":!*.md"];

/// The last commit that changed what runs, marked if what is built is not
/// exactly that.
fn checked_out() -> Result<String> {
    let of = |arguments: &[&str]| git(&[arguments, &["--"], &WHAT_RUNS].concat());
    let commit = of(&["log", "-1", "--abbrev=12", "--format=%h"])?;
    let changed = of(&["status", "--porcelain", "--untracked-files=no"])?;
    Ok(if changed.is_empty() {
        commit
    } else {
        format!("{commit}-changed")
    })
}

/// Today, where nobody is asked for a time zone.
fn today() -> Result<String> {
    let output = Command::new("date").args(["-u", "+%F"]).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

impl State {
    /// Of the commit that is checked out.
    pub(super) fn load(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory)?;
        let commit = checked_out()?;
        let path = directory.join(format!("{commit}.json"));
        let pieces = match fs::read(&path) {
            Ok(bytes) => {
                parse(&bytes).with_context(|| format!("cannot make sense of {}", path.display()))?
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error.into()),
        };
        Ok(Self {
            path,
            commit,
            pieces,
        })
    }

    /// One in memory only.
    #[cfg(test)]
    pub(super) fn empty(commit: &str) -> Self {
        Self {
            path: PathBuf::new(),
            commit: commit.to_owned(),
            pieces: BTreeMap::new(),
        }
    }

    pub(super) fn commit(&self) -> &str {
        &self.commit
    }

    /// What ran would be counted for the wrong commit.
    pub(super) fn check_commit(&self) -> Result<()> {
        let now = checked_out()?;
        ensure!(
            now == self.commit,
            "what is checked out is {now} now, and was {} when the soak began",
            self.commit
        );
        Ok(())
    }

    /// How far a piece got.
    pub(super) fn of(&self, piece: &str) -> Done {
        self.pieces.get(piece).cloned().unwrap_or_default()
    }

    /// Adds a part and keeps everything.
    pub(super) fn add(&mut self, piece: &str, part: &Done) -> Result<()> {
        let today = today()?;
        let part = Done {
            first: today.clone(),
            last: today,
            ..part.clone()
        };
        self.merge(piece, &part);
        // Renamed into place: whoever is stopped here leaves the old or the
        // new one.
        let new = self.path.with_extension("new");
        fs::write(&new, serde_json::to_vec_pretty(&self.to_json())?)?;
        fs::rename(&new, &self.path)?;
        Ok(())
    }

    pub(super) fn merge(&mut self, piece: &str, part: &Done) {
        let done = self.pieces.entry(piece.to_owned()).or_default();
        done.operations += part.operations;
        done.parts += part.parts;
        done.tests += part.tests;
        done.failures += part.failures;
        done.seconds += part.seconds;
        done.seed = part.seed;
        if done.first.is_empty() {
            done.first.clone_from(&part.first);
        }
        done.last.clone_from(&part.last);
        done.notes.extend(part.notes.iter().cloned());
    }

    fn to_json(&self) -> Value {
        let pieces: Map<String, Value> = self
            .pieces
            .iter()
            .map(|(name, done)| {
                let value = json!({
                    "operations": done.operations,
                    "parts": done.parts,
                    "tests": done.tests,
                    "failures": done.failures,
                    "seed": done.seed,
                    "seconds": done.seconds,
                    "first": done.first,
                    "last": done.last,
                    "notes": done.notes,
                });
                (name.clone(), value)
            })
            .collect();
        json!({ "commit": self.commit, "pieces": pieces })
    }
}

fn parse(bytes: &[u8]) -> Result<BTreeMap<String, Done>> {
    let value: Value = serde_json::from_slice(bytes)?;
    let pieces = value["pieces"].as_object().context("it has no pieces")?;
    let of = |value: &Value| {
        let number = |name: &str| value[name].as_u64();
        let text = |name: &str| value[name].as_str().map(str::to_owned);
        let notes = value["notes"].as_array()?;
        let notes = notes.iter().filter_map(Value::as_str).map(str::to_owned);
        Some(Done {
            operations: number("operations")?,
            parts: number("parts")?,
            tests: number("tests")?,
            failures: number("failures")?,
            seed: number("seed")?,
            seconds: number("seconds")?,
            first: text("first")?,
            last: text("last")?,
            notes: notes.collect(),
        })
    };
    pieces
        .iter()
        .map(|(name, value)| {
            let done = of(value).with_context(|| format!("{name} is incomplete"))?;
            Ok((name.clone(), done))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_again() {
        let mut state = State::empty("0123456789ab");
        let part = Done {
            operations: 100,
            parts: 1,
            tests: 4,
            seed: 7,
            seconds: 60,
            first: String::from("2026-11-28"),
            last: String::from("2026-11-28"),
            ..Done::default()
        };
        state.merge("one", &part);
        let failed = Done {
            failures: 1,
            last: String::from("2026-11-29"),
            notes: vec![String::from("punch: 1 of 5 passed")],
            ..part
        };
        state.merge("one", &failed);
        let bytes = serde_json::to_vec(&state.to_json()).unwrap();
        let again = parse(&bytes).unwrap();
        assert_eq!(again, state.pieces);
        let one = &again["one"];
        assert_eq!((one.operations, one.parts, one.failures), (200, 2, 1));
        assert_eq!((&*one.first, &*one.last), ("2026-11-28", "2026-11-29"));
        assert!(parse(b"{}").is_err());
        assert!(parse(br#"{"pieces": {"one": {}}}"#).is_err());
    }
}
