//! Whether a range lies in one run of blocks on the device, and why not.

use super::plan::Work;
use mapdirect_model::{BlockMap, Extent, ExtentState};
use mapdirect_sys::fsmap;
use std::os::fd::BorrowedFd;

/// How many runs of blocks on the device a range consists of.
pub(super) fn runs(map: &BlockMap) -> u64 {
    count(map.extents().iter())
}

/// How many runs some extents are, whatever their states.
fn count<'map>(extents: impl Iterator<Item = &'map Extent>) -> u64 {
    let mut count = 0;
    let mut end = None;
    for extent in extents {
        let Some(start) = extent.physical else {
            continue;
        };
        if end != Some((extent.offset, start)) {
            count += 1;
        }
        end = Some((extent.end(), start.saturating_add(extent.length)));
    }
    count
}

/// What there was before blocks were asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Before {
    /// Runs of blocks that are not shared, and so stay where they are.
    runs: u64,
    /// Bytes of the largest hole.
    hole: u64,
    /// Bytes of blocks that had to be found.
    needed: u64,
    /// Bytes of the largest run of free blocks, where the filesystem tells.
    free: Option<u64>,
}

impl Before {
    pub(super) fn read(file: BorrowedFd<'_>, map: &BlockMap) -> Self {
        let work = Work::of(map);
        Self {
            runs: count(
                map.extents()
                    .iter()
                    .filter(|extent| extent.state != ExtentState::Shared),
            ),
            hole: work
                .holes
                .iter()
                .map(|hole| hole.end - hole.start)
                .max()
                .unwrap_or(0),
            needed: work.space(),
            free: fsmap::largest_free(file).ok(),
        }
    }

    /// Why it is not contiguous now, if it is not.
    pub(super) fn why(&self, map: &BlockMap) -> Option<String> {
        if runs(map) <= 1 {
            return None;
        }
        let mut reasons = Vec::new();
        if self.runs > 0 {
            reasons.push(match self.runs {
                1 => String::from("a run of blocks was there before, and stays where it is"),
                runs => format!("{runs} runs of blocks were there before, and stay where they are"),
            });
        }
        match self.free {
            Some(free) if free < self.hole => reasons.push(format!(
                "free space is fragmented: the largest run of free blocks had {free} bytes, and \
                 {} were asked for at once",
                self.hole
            )),
            Some(free) if self.needed > 0 && self.runs == 0 => reasons.push(format!(
                "the filesystem chose so, though a run of {free} free bytes was there: it keeps \
                 some of them for itself, or others took them"
            )),
            None if self.needed > 0 => reasons.push(String::from(
                "the filesystem does not tell which blocks are free",
            )),
            _ => {}
        }
        if reasons.is_empty() {
            reasons.push(String::from("others moved blocks of it meanwhile"));
        }
        Some(reasons.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mapdirect_model::DeviceId;

    fn map(extents: &[(u64, Option<u64>, ExtentState)]) -> BlockMap {
        let device = DeviceId { major: 7, minor: 0 };
        let length = extents.len() as u64 * 4096;
        let extents = extents
            .iter()
            .map(|(at, physical, state)| Extent::new(*at, *physical, 4096, *state));
        BlockMap::new(device, 4096, length, 0..length, extents)
    }

    #[test]
    fn runs_are_counted_whatever_their_states() {
        use ExtentState::{Shared, Unwritten, Written};
        let one = [(0, Some(8192), Written), (4096, Some(12288), Unwritten)];
        assert_eq!(runs(&map(&one)), 1);
        let two = [(0, Some(8192), Written), (4096, Some(4096), Shared)];
        assert_eq!(runs(&map(&two)), 2);
        let around_a_hole = [(0, Some(8192), Written), (8192, Some(16384), Written)];
        assert_eq!(runs(&map(&around_a_hole)), 2);
        assert_eq!(runs(&map(&[])), 0);
    }

    #[test]
    fn the_reason_is_the_one_that_holds() {
        let two = map(&[
            (0, Some(8192), ExtentState::Written),
            (4096, Some(4096), ExtentState::Written),
        ]);
        let before = |runs, free| Before {
            runs,
            hole: 8192,
            needed: 8192,
            free,
        };
        let why = |before: Before| before.why(&two).unwrap();
        assert!(why(before(0, Some(4096))).contains("fragmented"));
        assert!(why(before(0, Some(1 << 20))).contains("chose so"));
        assert!(why(before(0, None)).contains("does not tell"));
        let kept = why(before(1, Some(1 << 20)));
        assert!(kept.contains("a run of blocks was there"), "{kept}");
        let one = map(&[(0, Some(8192), ExtentState::Written)]);
        assert_eq!(before(0, None).why(&one), None);
    }
}
