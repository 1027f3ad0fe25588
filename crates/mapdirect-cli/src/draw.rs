//! Block maps as pictures.

use crate::size::human;
use crate::terminal;
use mapdirect::{BlockMap, Extent, ExtentState};
use std::fmt::Write;
use std::ops::Range;

/// What a picture is drawn with.
struct Pen {
    unicode: bool,
}

impl Pen {
    /// The character of a state.
    fn glyph(&self, state: ExtentState) -> char {
        let (drawn, plain) = match state {
            ExtentState::Written => ('█', '#'),
            ExtentState::Shared => ('▓', '%'),
            ExtentState::Unwritten => ('░', 'o'),
            ExtentState::Hole => ('·', '.'),
            ExtentState::Delalloc => ('~', '~'),
            ExtentState::Loose => ('▒', '+'),
            _ => ('?', '?'),
        };
        if self.unicode { drawn } else { plain }
    }

    /// A cell that holds several states.
    fn mixed(&self) -> char {
        if self.unicode { '▞' } else { '*' }
    }

    /// Below a cell that is pinned, wholly or in part.
    fn pinned(&self) -> char {
        if self.unicode { '━' } else { '=' }
    }
}

/// Whether blocks in a state can be stored to under a pin. What is only in
/// memory yet is written to its blocks before it is pinned.
pub(crate) fn becomes_stable(state: ExtentState) -> bool {
    state.is_stable() || state == ExtentState::Delalloc
}

/// A state in words.
pub(crate) fn state_in_words(state: ExtentState) -> &'static str {
    match state {
        ExtentState::Delalloc => "not on the device yet",
        other => other.name(),
    }
}

/// Most rows a picture has.
const ROWS: u64 = 8;

/// Draws a block map, a line of marks under what is pinned.
pub(crate) fn block_map(map: &BlockMap, pinned: &[Range<u64>]) -> String {
    let unicode = terminal::is_unicode();
    picture(map, pinned, terminal::width(), &Pen { unicode })
}

fn picture(map: &BlockMap, pinned: &[Range<u64>], width: usize, pen: &Pen) -> String {
    let range = map.range();
    let length = range.end - range.start;
    let block = u64::from(map.block_size()).max(1);
    // Room for the offset in front of every row.
    let digits = range.end.to_string().len().max(12);
    let columns = width.saturating_sub(digits + 2).clamp(16, 128) as u64;
    let cell = length
        .div_ceil(columns * ROWS)
        .max(1)
        .next_multiple_of(block);
    let cells = length.div_ceil(cell);
    let mut picture = String::new();
    let mut row = 0;
    while row < cells {
        let here = row..cells.min(row + columns);
        let start = range.start + here.start * cell;
        let bytes = |at: u64| {
            let start = range.start + at * cell;
            start..range.end.min(start + cell)
        };
        let line: String = here
            .clone()
            .map(|at| state_of(map, &bytes(at), pen))
            .collect();
        let _ = writeln!(picture, "{start:>digits$}  {line}");
        let marks: String = here
            .map(|at| {
                let bytes = bytes(at);
                let is_pinned = pinned
                    .iter()
                    .any(|pin| pin.start.max(bytes.start) < pin.end.min(bytes.end));
                if is_pinned { pen.pinned() } else { ' ' }
            })
            .collect();
        if marks.contains(pen.pinned()) {
            let _ = writeln!(picture, "{:>digits$}  {}", "pinned", marks.trim_end());
        }
        row += columns;
    }
    let legend = |stable: bool| {
        let states: Vec<_> = ExtentState::ALL
            .iter()
            .filter(|state| becomes_stable(**state) == stable && map.total(**state) > 0)
            .map(|state| format!("{} {}", pen.glyph(*state), state_in_words(*state)))
            .collect();
        match (states.is_empty(), stable) {
            (true, _) => None,
            (false, true) => Some(format!("stable: {}", states.join(", "))),
            (false, false) => Some(format!("frozen: {}", states.join(", "))),
        }
    };
    let mixed = picture
        .contains(pen.mixed())
        .then(|| format!("{} mixed", pen.mixed()));
    let scale = format!("one character = {}", human(cell));
    let legend: Vec<_> = [Some(scale), legend(true), legend(false), mixed]
        .into_iter()
        .flatten()
        .collect();
    // Parts stay together as long as they fit.
    let indent = digits + 2;
    let room = width.saturating_sub(indent).max(16);
    let mut line = String::new();
    for part in legend {
        if !line.is_empty() && line.chars().count() + 2 + part.chars().count() > room {
            let _ = writeln!(picture, "{:indent$}{line}", "");
            line.clear();
        }
        if !line.is_empty() {
            line.push_str("; ");
        }
        line.push_str(&part);
    }
    let _ = writeln!(picture, "{:indent$}{line}", "");
    picture
}

fn state_of(map: &BlockMap, bytes: &Range<u64>, pen: &Pen) -> char {
    let mut found: Option<ExtentState> = None;
    let extents = map.extents();
    let first = extents.partition_point(|extent| extent.end() <= bytes.start);
    for extent in &extents[first..] {
        if extent.offset >= bytes.end {
            break;
        }
        if found.is_some_and(|state| state != extent.state) {
            return pen.mixed();
        }
        found = Some(extent.state);
    }
    found.map_or(' ', |state| pen.glyph(state))
}

/// The extents as a table; `places` says where each is on disks.
pub(crate) fn extent_table(map: &BlockMap, places: impl Fn(&Extent) -> String) -> String {
    let mut table = format!(
        "{:>16} {:>16} {:>16}  {:<9}  disk and offset\n",
        "file offset", "physical offset", "length", "state"
    );
    for extent in map.extents() {
        let physical = extent
            .physical
            .map_or_else(|| String::from("-"), |at| at.to_string());
        // The range of a pin may have no end.
        let length = if extent.end() == u64::MAX {
            String::from("-")
        } else {
            extent.length.to_string()
        };
        let line = format!(
            "{:>16} {physical:>16} {length:>16}  {:<9}  {}",
            extent.offset,
            extent.state,
            places(extent)
        );
        let _ = writeln!(table, "{}", line.trim_end());
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use mapdirect::DeviceId;
    use proptest::prelude::*;

    fn map(range: Range<u64>, extents: Vec<Extent>) -> BlockMap {
        let device = DeviceId { major: 7, minor: 0 };
        BlockMap::new(device, 4096, range.end, range, extents)
    }

    #[test]
    fn a_small_file_shows_every_block() {
        let map = map(
            0..5 * 4096,
            vec![
                Extent::new(0, Some(4096), 8192, ExtentState::Written),
                Extent::new(12288, Some(65536), 4096, ExtentState::Shared),
                Extent::new(16384, Some(99 << 12), 4096, ExtentState::Unwritten),
            ],
        );
        let drawn = |unicode| {
            picture(
                &map,
                std::slice::from_ref(&(4096..8192)),
                80,
                &Pen { unicode },
            )
        };
        let text = drawn(true);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0].trim_start(), "0  ██·▓░");
        assert_eq!(lines[1].trim_start(), "pinned   ━");
        assert_eq!(
            lines[2].trim_start(),
            "one character = 4 KiB; stable: █ written"
        );
        assert_eq!(
            lines[3].trim_start(),
            "frozen: ░ unwritten, · hole, ▓ shared"
        );
        let text = drawn(false);
        assert!(text.is_ascii(), "{text}");
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0].trim_start(), "0  ##.%o");
        assert_eq!(lines[1].trim_start(), "pinned   =");
    }

    proptest! {
        #[test]
        fn any_map_fits_the_picture(
            start in 0u64..1 << 40,
            length in 1u64..1 << 45,
            width in 0usize..300,
            offsets in proptest::collection::vec(0u64..1 << 45, 0..9),
        ) {
            let mut offsets = offsets;
            offsets.sort_unstable();
            let extents = offsets
                .into_iter()
                .map(|at| Extent::new(at, Some(0), 8192, ExtentState::Written))
                .collect();
            let map = map(start..start + length, extents);
            for unicode in [true, false] {
                let pin = 0..u64::MAX;
                let picture = picture(&map, std::slice::from_ref(&pin), width, &Pen { unicode });
                prop_assert!(picture.lines().count() as u64 <= 2 * ROWS + 4);
                let widest = picture.lines().map(|line| line.chars().count()).max();
                prop_assert!(widest <= Some(width.max(48)), "{}", picture);
            }
        }
    }
}
