//! What somebody does to a file, as a gate sees it.

use super::geometry::{LARGEST_BLOCK, rounded_out};
use super::rules::{OperationKind, Reach};
use std::ops::Range;

/// An operation on bytes `range` of a file. For [`OperationKind::Truncate`]
/// the range holds the new size: `start` is the smallest and `end` the
/// largest it can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// What it is.
    pub kind: OperationKind,
    /// Where, in bytes.
    pub range: Range<u64>,
    /// Where it may be instead, as far as can be seen: an appending write
    /// goes to the end of file whatever its offset says.
    pub or: Option<Range<u64>>,
    /// A write that may bypass the page cache, and empties it then.
    pub direct: bool,
    /// Blocks that others use as well may come to lie where they did not.
    pub brings_shared: bool,
}

impl Operation {
    /// An operation.
    #[must_use]
    pub const fn new(kind: OperationKind, range: Range<u64>) -> Self {
        Self {
            kind,
            range,
            or: None,
            direct: true,
            // What is inserted is a hole, and nothing comes nearer by it.
            brings_shared: kind.may_bring_shared() && !matches!(kind, OperationKind::InsertRange),
        }
    }

    /// The ranges it may work on.
    pub(super) fn ranges(&self) -> impl Iterator<Item = &Range<u64>> {
        std::iter::once(&self.range).chain(&self.or)
    }

    /// The largest offset it may work up to.
    pub(super) fn end(&self) -> u64 {
        self.ranges().map(|range| range.end).max().unwrap_or(0)
    }

    /// Bytes outside of which no pin can mind it, in a file of `size` bytes.
    #[must_use]
    pub fn reach(&self, size: u64) -> Range<u64> {
        let rule = self.kind.rule();
        let mut reach = match rule.reach {
            Reach::Nothing => return 0..0,
            Reach::Range => self.range.clone(),
            // Pages are thrown out from one block earlier on.
            Reach::ToTheEnd => self.range.start.saturating_sub(LARGEST_BLOCK)..u64::MAX,
            Reach::BeyondSize => self.range.start.saturating_sub(LARGEST_BLOCK)..u64::MAX,
            Reach::Everything => 0..u64::MAX,
        };
        if let Some(or) = &self.or {
            reach = reach.start.min(or.start)..reach.end.max(or.end);
        }
        if rule.grows && reach.end.max(self.range.end) > size {
            reach.start = reach.start.min(size.saturating_sub(1));
        }
        // What shares a page or a block with it is thrown out, zeroed or
        // copied with it.
        rounded_out(&reach, LARGEST_BLOCK)
    }
}
