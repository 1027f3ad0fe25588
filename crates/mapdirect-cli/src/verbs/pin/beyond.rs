//! What is pinned of a range that goes beyond the end of a file.
//!
//! mmap(2) maps such a range, and what is behind the last page raises SIGBUS. So
//! it is no error here either; but hardly anybody means it.

use crate::args::{PinArgs, StrengthChoice};
use crate::size::ByteRange;
use crate::{output, terminal};
use mapdirect::Pin;

/// Says of each file that ends before the range does what is pinned of it.
pub(super) fn say(args: &PinArgs, pins: &[Pin]) {
    let Some(range) = &args.range else {
        return;
    };
    for (path, pin) in args.files.iter().zip(pins) {
        let map = pin.block_map();
        let size = map.file_size();
        // Blocks that were allocated ahead.
        let behind = size.next_multiple_of(u64::from(map.block_size()).max(1));
        let ahead: u64 = map
            .extents()
            .iter()
            .filter(|extent| extent.physical.is_some() && extent.end() > behind)
            .map(|extent| extent.end() - extent.offset.max(behind))
            .sum();
        let follows = args.strength == StrengthChoice::Stable;
        if let Some(words) = words(range, size, ahead, follows) {
            output::complain(&format!("{} {words}", terminal::name(path)));
        }
    }
}

/// What to say of a file of `size` bytes, behind whose end `ahead` bytes of the
/// range are allocated; nothing if the range ends in the file.
fn words(range: &ByteRange, size: u64, ahead: u64, follows: bool) -> Option<String> {
    let start = range.offset;
    // A range without an end follows the file.
    let end = start.saturating_add(range.length?);
    if end <= size {
        return None;
    }
    let mut words = if start >= size {
        format!("ends at byte {size}, before the range begins: no byte of the file is pinned")
    } else {
        format!("ends at byte {size}, inside the range: only bytes {start} to {size} are pinned")
    };
    if follows {
        words += "; what is written behind the end is held from then on";
        return Some(words);
    }
    if ahead > 0 {
        words += &format!("; {ahead} bytes allocated behind the end stay where they are");
    }
    words += "; nobody can write in the rest of the range (ETXTBSY)\n\
              help: make the file longer first (mapdirect prepare), or let it grow: \
              --strength stable";
    Some(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ranges_beyond_the_end_are_spoken_of() {
        let said = |offset, length, ahead, follows| {
            words(&ByteRange { offset, length }, 4096, ahead, follows).unwrap_or_default()
        };
        assert_eq!(said(0, Some(4096), 0, false), "");
        assert_eq!(said(0, None, 0, false), "");
        assert_eq!(said(8192, None, 0, true), "");
        assert!(said(0, Some(4097), 0, false).contains("only bytes 0 to 4096 are pinned"));
        assert!(said(4096, Some(1), 0, false).contains("no byte of the file is pinned"));
        assert!(said(0, Some(8192), 0, true).contains("held from then on"));
        assert!(said(0, Some(8192), 4096, false).contains("4096 bytes allocated"));
        assert!(said(1 << 20, Some(u64::MAX), 0, false).contains("nobody can write"));
    }
}
