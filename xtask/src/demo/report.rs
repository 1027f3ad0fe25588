//! What is told of what was tried: a screen for each filesystem, or all of it.

use super::{Outcome, mark};
use crate::table::Table;
use std::time::Duration;

/// Something that was tried, and what came of it.
pub(super) struct Tried<'a> {
    pub(super) name: &'a str,
    /// By which program or call.
    pub(super) by: String,
    /// It stands for others of its kind.
    pub(super) is_brief: bool,
    pub(super) expected: Outcome,
    pub(super) got: Outcome,
    pub(super) took: Duration,
    /// The block map of the range is what it was.
    pub(super) kept: bool,
    pub(super) as_expected: bool,
    /// What the program said.
    pub(super) said: String,
}

enum Form {
    /// Everything.
    Verbose(Table<6>),
    /// What stands for others, and what was not as expected.
    Brief(Table<4>),
    /// Only what was not as expected.
    Silent,
}

/// A table that comes up row by row.
pub(super) struct Report {
    form: Form,
    /// How many rows were left out.
    hidden: usize,
    pub(super) tried: usize,
    pub(super) refused: usize,
    pub(super) worked: usize,
    pub(super) moved: usize,
    pub(super) unsupported: usize,
    pub(super) unexpected: usize,
}

/// Widths of the columns of a table that fits into 80 columns.
const BRIEF: [(&str, usize); 4] = [("tried", 15), ("by", 39), ("answer", 10), ("moved?", 6)];

fn verbose() -> Table<6> {
    Table::new([
        ("operation", 16),
        ("tool", 61),
        ("expected", 10),
        ("got", 10),
        ("µs", 6),
        ("blocks", 7),
    ])
}

impl Report {
    fn new(form: Form) -> Self {
        Self {
            form,
            hidden: 0,
            tried: 0,
            refused: 0,
            worked: 0,
            moved: 0,
            unsupported: 0,
            unexpected: 0,
        }
    }

    /// Of what is tried while the range is pinned.
    pub(super) fn pinned(everything: bool) -> Self {
        Self::new(if everything {
            Form::Verbose(verbose())
        } else {
            Form::Brief(Table::new(BRIEF))
        })
    }

    /// Of the same without a pin.
    pub(super) fn unpinned(everything: bool) -> Self {
        Self::new(if everything {
            Form::Verbose(verbose())
        } else {
            Form::Silent
        })
    }

    pub(super) fn row(&mut self, tried: Tried<'_>) {
        self.tried += 1;
        self.refused += usize::from(tried.got == Outcome::Refused);
        self.worked += usize::from(tried.got == Outcome::Works);
        self.moved += usize::from(!tried.kept);
        self.unsupported += usize::from(tried.got == Outcome::NotSupported);
        self.unexpected += usize::from(!tried.as_expected);
        let got = mark(tried.got, tried.as_expected);
        match &self.form {
            Form::Verbose(table) => table.row([
                tried.name.to_owned(),
                tried.by,
                tried.expected.to_string(),
                got,
                tried.took.as_micros().to_string(),
                String::from(if tried.kept { "kept" } else { "changed" }),
            ]),
            Form::Brief(table) if tried.is_brief || !tried.as_expected => table.row([
                tried.name.to_owned(),
                cut(&tried.by, BRIEF[1].1),
                got,
                String::from(if tried.kept { "no" } else { "YES" }),
            ]),
            Form::Silent if !tried.as_expected => {
                println!("  {}, by {}: {got}", tried.name, tried.by);
            }
            _ => self.hidden += 1,
        }
        if !tried.as_expected {
            tried.said.lines().for_each(|line| println!("    {line}"));
        }
    }

    /// Ends the table.
    pub(super) fn end(&self) {
        if matches!(self.form, Form::Brief(_)) && self.hidden > 0 {
            println!(
                "  ... and {} more, as expected; --verbose lists them",
                self.hidden
            );
        }
    }
}

/// Text in so many columns.
fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().take(width - 3).collect();
    format!("{}...", kept.trim_end())
}
