//! Tables with the columns that are asked for. Every cell is one word, for those
//! who split lines at blanks: strangers choose names of files and commands.

use crate::draw::becomes_stable;
use crate::extents::Extents;
use crate::verbs::records;
use crate::{json, output, terminal};
use clap::ValueEnum;
use mapdirect::status::{FileStatus, PinStatus, Status};
use mapdirect::{BlockMap, Extent};
use mapdirect_sys::names;
use std::path::Path;

/// Columns of the extents of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ShowColumn {
    /// The file
    File,
    /// Offset in the file
    Offset,
    /// Length in bytes
    Length,
    /// Offset of the first byte behind it
    End,
    /// Offset on the filesystem's device
    Physical,
    /// The state of the blocks
    State,
    /// Whether a pin lets them be stored to: yes or no
    Stable,
    /// What an agent may do to the blocks of a pin: read-write, read or none
    Access,
    /// Number of the filesystem's device
    Device,
    /// The whole disk it lies on, or several
    Disk,
    /// Offset on that disk
    DiskOffset,
}

/// Columns of the pins of a guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StatusColumn {
    /// The file
    File,
    /// Number of the pin
    Pin,
    /// First byte of the file that is pinned
    Offset,
    /// Length in bytes; nothing if it has no end
    Length,
    /// What it holds: all or stable
    Strength,
    /// What it covers: range or file
    Scope,
    /// Process that asked for it
    Pid,
    /// The name of its command
    Command,
    /// The user of that process
    Uid,
    /// Seconds since it was granted
    Age,
    /// Bytes in stable blocks
    Stable,
    /// Bytes in frozen blocks
    Frozen,
    /// kept, broken or lost
    State,
    /// How often its blocks were found changed
    Breaches,
    /// Whether it is a mapping: yes or no
    Mapped,
    /// The rule of the policy that allowed it
    Rule,
    /// Seconds that it may still last
    Left,
    /// Device of the filesystem
    Device,
    /// Inode number
    Inode,
}

fn yes_or_no(yes: bool) -> String {
    String::from(if yes { "yes" } else { "no" })
}

fn heading<C: ValueEnum>(column: &C) -> String {
    let value = column.to_possible_value();
    value.map_or_else(String::new, |value| value.get_name().to_ascii_uppercase())
}

/// Rows under their headings. Numbers stand at the right of a column.
pub(crate) struct Table {
    headings: bool,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new<C: ValueEnum>(columns: &[C], headings: bool) -> Self {
        let heading = columns.iter().map(heading).collect();
        Self {
            headings,
            rows: if headings { vec![heading] } else { Vec::new() },
        }
    }

    fn add(&mut self, row: impl Iterator<Item = String>) {
        let word = |cell: String| match cell.as_str() {
            "" => String::from("-"),
            cell => names::one_word(cell),
        };
        self.rows.push(row.map(word).collect());
    }

    fn lines(&self) -> Vec<String> {
        let columns = self.rows.first().map_or(0, Vec::len);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..columns).map(width).collect();
        let is_number = |cell: &str| cell == "-" || cell.parse::<u64>().is_ok();
        // The heading goes with what is below it.
        let right: Vec<_> = (0..columns)
            .map(|column| {
                let below = self.rows.get(usize::from(self.headings)..);
                let below = below.unwrap_or_default();
                !below.is_empty() && below.iter().all(|row| is_number(&row[column]))
            })
            .collect();
        let line = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths).zip(&right);
            let cells = cells.map(|((cell, width), right)| {
                let room = " ".repeat(width.saturating_sub(cell.chars().count()));
                if *right {
                    format!("{room}{cell}")
                } else {
                    format!("{cell}{room}")
                }
            });
            let line = cells.collect::<Vec<_>>().join("  ");
            line.trim_end().to_owned()
        };
        self.rows.iter().map(line).collect()
    }

    /// Prints it, if there is anything in it.
    pub(crate) fn tell(&self) {
        if self.rows.len() <= usize::from(self.headings) {
            return;
        }
        for line in self.lines() {
            output::line(&line);
        }
    }
}

/// Adds the extents of a file, a row for each.
pub(crate) fn add_extents(
    table: &mut Table,
    file: &Path,
    map: &BlockMap,
    extents: &Extents<'_>,
    columns: &[ShowColumn],
) {
    let name = terminal::cell(file);
    let none = || String::from("-");
    let cell = |extent: &Extent, column: ShowColumn| match column {
        ShowColumn::File => name.clone(),
        ShowColumn::Offset => extent.offset.to_string(),
        ShowColumn::Length => extent.length.to_string(),
        ShowColumn::End => extent.end().to_string(),
        ShowColumn::Physical => extent.physical.map_or_else(none, |at| at.to_string()),
        ShowColumn::State => extent.state.to_string(),
        ShowColumn::Stable => yes_or_no(becomes_stable(extent.state)),
        ShowColumn::Access => extents.access(extent).name().to_owned(),
        ShowColumn::Device => map.device().to_string(),
        ShowColumn::Disk | ShowColumn::DiskOffset => {
            let runs = extents.runs(extent);
            let places = runs.iter().map(|run| match run.place.known() {
                Some((disk, _)) if column == ShowColumn::Disk => disk.name.clone(),
                Some((_, offset)) => offset.to_string(),
                None => String::from("unknown"),
            });
            let places: Vec<_> = places.collect();
            if places.is_empty() {
                none()
            } else {
                places.join(",")
            }
        }
    };
    for extent in map.extents() {
        table.add(columns.iter().map(|column| cell(extent, *column)));
    }
}

/// Prints the pins of a guard, a row for each.
pub(crate) fn tell_pins(status: &Status, columns: &[StatusColumn], headings: bool) {
    let mut table = Table::new(columns, headings);
    for file in &status.files {
        for pin in &file.pins {
            table.add(columns.iter().map(|column| pin_cell(file, pin, *column)));
        }
    }
    table.tell();
}

/// The name of a file for a person: its number if the name is not told.
pub(crate) fn name_of(file: &FileStatus) -> String {
    name_as(file, terminal::told_name)
}

/// The same, with names as `show` shows them.
fn name_as(file: &FileStatus, show: fn(&str) -> String) -> String {
    if !records::is_known(&file.path) {
        format!("inode {} of {}", file.inode, file.device)
    } else {
        records::name_in_words(&file.name, show)
    }
}

fn pin_cell(file: &FileStatus, pin: &PinStatus, column: StatusColumn) -> String {
    let or_none =
        |number: Option<u64>| number.map_or_else(|| String::from("-"), |number| number.to_string());
    match column {
        StatusColumn::File => name_as(file, terminal::told_cell),
        StatusColumn::Pin => pin.pin.to_string(),
        StatusColumn::Offset => pin.range.start.to_string(),
        StatusColumn::Length => or_none(json::length(&pin.range)),
        StatusColumn::Strength => json::strength(pin.flags.strength()).to_owned(),
        StatusColumn::Scope => String::from(if pin.flags.is_whole_file() {
            "file"
        } else {
            "range"
        }),
        StatusColumn::Pid => pin.pid.to_string(),
        StatusColumn::Command => {
            let holder = file.holders.iter().find(|holder| holder.pid == pin.pid);
            holder.map_or_else(
                || String::from("-"),
                |holder| terminal::word_cell(&holder.command),
            )
        }
        StatusColumn::Uid => pin.uid.to_string(),
        StatusColumn::Age => pin.age.to_string(),
        StatusColumn::Stable => pin.stable.to_string(),
        StatusColumn::Frozen => pin.frozen.to_string(),
        StatusColumn::State => String::from(match (pin.breaches > 0, pin.lost.is_empty()) {
            (true, _) => "broken",
            (false, true) => "kept",
            (false, false) => "lost",
        }),
        StatusColumn::Breaches => pin.breaches.to_string(),
        StatusColumn::Mapped => yes_or_no(pin.flags.is_mapped()),
        StatusColumn::Rule => pin.delegated.as_ref().map_or_else(
            || String::from("-"),
            |delegated| terminal::word_cell(&delegated.rule),
        ),
        StatusColumn::Left => or_none(pin.delegated.as_ref().and_then(|by| by.left)),
        StatusColumn::Device => file.device.to_string(),
        StatusColumn::Inode => file.inode.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_at_the_right() {
        let columns = [ShowColumn::File, ShowColumn::Offset, ShowColumn::DiskOffset];
        let mut table = Table::new(&columns, true);
        for row in [["a", "0", "-"], ["a long name", "4096", "1048576"]] {
            table.rows.push(row.map(str::to_owned).to_vec());
        }
        assert_eq!(
            table.lines(),
            [
                "FILE         OFFSET  DISK-OFFSET",
                "a                 0            -",
                "a long name    4096      1048576",
            ]
        );
    }
}
