//! Operations on a file, as a gate sees them.

use super::geometry::{LARGEST_BLOCK, rounded_out};
use super::rules::{OperationKind, Reach};
use std::ops::Range;

/// An operation on bytes `range` of a file. For [`OperationKind::Truncate`] the
/// range contains the new size: `start` is the smallest and `end` the largest
/// that it can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// The kind of the operation.
    pub kind: OperationKind,
    /// The bytes that it works on.
    pub range: Range<u64>,
    /// The bytes that it may work on instead, as far as can be seen: an
    /// appending write goes to the end of the file whatever its offset says.
    pub or: Option<Range<u64>>,
    /// Whether it is a write that may bypass the page cache, and then empties
    /// it.
    pub direct: bool,
    /// Whether it may put shared blocks where there were none.
    pub brings_shared: bool,
    /// Whether the file may have grown by the time a truncation takes effect.
    pub late: bool,
}

impl Operation {
    /// Makes an operation.
    #[must_use]
    pub const fn new(kind: OperationKind, range: Range<u64>) -> Self {
        Self {
            kind,
            range,
            or: None,
            direct: true,
            // An insertion adds a hole, and brings nothing nearer.
            brings_shared: kind.may_bring_shared() && !matches!(kind, OperationKind::InsertRange),
            late: false,
        }
    }

    /// The ranges that the operation may work on.
    pub(super) fn ranges(&self) -> impl Iterator<Item = &Range<u64>> {
        std::iter::once(&self.range).chain(&self.or)
    }

    /// The largest end of these ranges.
    pub(super) fn end(&self) -> u64 {
        self.ranges().map(|range| range.end).max().unwrap_or(0)
    }

    /// The bytes outside of which no pin can refuse the operation, in a file of
    /// `size` bytes.
    #[must_use]
    pub fn reach(&self, size: u64) -> Range<u64> {
        let rule = self.kind.rule();
        let mut reach = match rule.reach {
            Reach::Nothing => return 0..0,
            Reach::Range => self.range.clone(),
            // Pages are thrown out beginning one block earlier.
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
        // Bytes that share a page or a block with the operation's bytes are
        // thrown out, zeroed or copied with them.
        rounded_out(&reach, LARGEST_BLOCK)
    }
}
