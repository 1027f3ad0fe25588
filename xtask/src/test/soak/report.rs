//! `docs/soak.md`: what really ran, of which commit, and when.

use super::{Piece, state::State, total};
use anyhow::Result;
use std::fs;
use std::path::Path;

const HEAD: &str = "\
# What the soak really ran

`cargo xtask soak` makes hostile operations over all gates, kernels and filesystems, in pieces
that go on where they were stopped. `cargo xtask soak --report` wrote this page: a section for
each commit, newest first, with nothing in it that did not run. An operation is a try of a hammer
(a trick of a process without privilege, `crates/mapdirect-testkit/src/hammer.rs`) or an attack of
the random test (`crates/mapdirect-cli/tests/native/random.rs`). A part fails if a single one of
them changed a pinned block, or if none was ever refused. Legal load (`legal.rs` beside it) is
counted in seconds: several processes do what anybody may to a pinned file, beside it and to its
end, and a part fails if the tripwire tells of a single breach.
";

/// Writes the section of a commit, in place of the one that is there or before
/// all others.
pub(super) fn write(path: &Path, state: &State, pieces: &[Piece]) -> Result<()> {
    let old = match fs::read_to_string(path) {
        Ok(old) => old,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error.into()),
    };
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(path, page(&old, state, pieces))?;
    Ok(())
}

fn page(old: &str, state: &State, pieces: &[Piece]) -> String {
    let mut page = String::from(HEAD);
    let title = format!("## {}", state.commit());
    let new = section(&title, state, pieces);
    let mut placed = false;
    let mut sections = Vec::new();
    for section in old.split("\n## ").skip(1) {
        let section = format!("## {section}");
        if section.lines().next() == Some(title.as_str()) {
            placed = true;
            sections.push(new.clone());
        } else {
            sections.push(section);
        }
    }
    if !placed {
        sections.insert(0, new);
    }
    for section in sections {
        page.push('\n');
        page.push_str(section.trim_end());
        page.push('\n');
    }
    page
}

fn section(title: &str, state: &State, pieces: &[Piece]) -> String {
    let mut text = format!("{title}\n\n");
    let (done, goal) = total(state, pieces);
    text.push_str(&format!(
        "{} of {} operations ran.\n\n",
        thousands(done),
        thousands(goal)
    ));
    text.push_str(
        "| piece | operations | of | parts failed | first | last | minutes | last seed |\n",
    );
    text.push_str("| --- | ---: | ---: | ---: | --- | --- | ---: | ---: |\n");
    let ran = pieces
        .iter()
        .filter(|piece| state.of(&piece.name).parts > 0);
    for piece in ran {
        let of = state.of(&piece.name);
        let (operations, goal) = if piece.is_legal() {
            (format!("{} s", of.operations), format!("{} s", piece.goal))
        } else if piece.is_counted() {
            (thousands(of.operations), thousands(piece.goal))
        } else {
            (format!("{} tests", of.tests), String::from("all"))
        };
        text.push_str(&format!(
            "| {} | {operations} | {goal} | {} of {} | {} | {} | {} | {} |\n",
            piece.name,
            of.failures,
            of.parts,
            of.first,
            of.last,
            of.seconds.div_ceil(60),
            of.seed,
        ));
    }
    for piece in pieces {
        let notes = state.of(&piece.name).notes;
        if !notes.is_empty() {
            text.push_str(&format!("\nFailures of \"{}\":\n\n", piece.name));
            for note in notes {
                text.push_str(&format!("- {}\n", note.replace('\n', " ")));
            }
        }
    }
    let not: Vec<&str> = pieces
        .iter()
        .filter(|piece| state.of(&piece.name).parts == 0)
        .map(|piece| piece.name.as_str())
        .collect();
    if not.is_empty() {
        text.push_str("\nEvery piece ran, in part at least.\n");
    } else {
        text.push_str("\nNot run at all:\n\n");
        for name in not {
            text.push_str(&format!("- {name}\n"));
        }
    }
    text
}

/// A number as people read it.
fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::{pieces, state::Done};
    use super::*;

    #[test]
    fn a_section_for_each_commit() {
        let pieces = pieces();
        let mut first = State::empty("aaaa");
        let part = Done {
            operations: 123_456,
            parts: 2,
            first: String::from("2026-11-28"),
            last: String::from("2026-11-29"),
            ..Done::default()
        };
        first.merge(&pieces[0].name, &part);
        let page_of_first = page("", &first, &pieces);
        assert!(page_of_first.contains("123,456 of "), "{page_of_first}");
        assert!(page_of_first.contains("0 of 2"));
        assert!(page_of_first.contains("Not run at all:"));
        let second = State::empty("bbbb");
        let both = page(&page_of_first, &second, &pieces);
        let (a, b) = (both.find("## aaaa"), both.find("## bbbb"));
        assert!(b.is_some() && b < a, "the newest first");
        // Once more, and nothing is there twice.
        first.merge(&pieces[0].name, &part);
        let again = page(&both, &first, &pieces);
        assert_eq!(again.matches("## aaaa").count(), 1);
        assert!(again.contains("246,912 of "));
        assert_eq!(page(&again, &first, &pieces), again);
    }
}
