//! The contract as data: for every operation, which bytes it reaches and what
//! it may not meet there.

use super::operation::Operation;
use std::ops::Range;

/// A kind of operation on a file, which may be only suspected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OperationKind {
    /// Reads, sends or splices from.
    Read,
    /// Opens for reading.
    OpenRead,
    /// Maps so that the mapping can never be written through.
    MapRead,
    /// Maps shared, writable now or later.
    MapWrite,
    /// Opens for writing. A gate that judges every write permits this; a gate
    /// that cannot refuses it whenever a pin exists.
    OpenWrite,
    /// Opens and truncates, or may truncate.
    OpenTruncate,
    /// Writes; in place if blocks are written and unshared.
    Write,
    /// Writes so that a crash tears nothing. XFS does this by remapping.
    WriteUntorn,
    /// Sets the size to a value in `range.start ..= range.end`.
    Truncate,
    /// `fallocate(2)` that allocates, and grows the file if need be.
    Allocate,
    /// `fallocate(2)` that allocates with `FALLOC_FL_KEEP_SIZE`.
    AllocateKeepSize,
    /// `FALLOC_FL_PUNCH_HOLE`, `MADV_REMOVE`, discard.
    PunchHole,
    /// `FALLOC_FL_ZERO_RANGE`.
    ZeroRange,
    /// `FALLOC_FL_WRITE_ZEROES`.
    WriteZeroes,
    /// `FALLOC_FL_UNSHARE_RANGE`.
    UnshareRange,
    /// `FALLOC_FL_COLLAPSE_RANGE`.
    CollapseRange,
    /// `FALLOC_FL_INSERT_RANGE`.
    InsertRange,
    /// `fallocate(2)` in a mode that cannot be seen.
    Reshape,
    /// `FICLONE`, `FICLONERANGE`, on either side.
    Clone,
    /// `FIDEDUPERANGE`, on either side.
    Dedupe,
    /// `copy_file_range(2)` on a filesystem that would share blocks, on either
    /// side.
    CopyRange,
    /// `XFS_IOC_EXCHANGE_RANGE`, `XFS_IOC_COMMIT_RANGE`, `XFS_IOC_SWAPEXT`,
    /// `EXT4_IOC_MOVE_EXT` and their like, on either side.
    Exchange,
    /// An operation that could not be identified.
    Unknown,
    /// Removes a name of the file. No block moves by that: a gate refuses it
    /// only for a pin that denies it.
    Unlink,
    /// Gives a name of the file another place, or takes that place for another
    /// file. Refused as [`Unlink`](Self::Unlink) is.
    Rename,
    /// Lays a loop device on the file, which writes and discards without
    /// asking.
    SetUpLoop,
    /// `FS_IOC_ENABLE_VERITY`, which writes behind the end of the file.
    EnableVerity,
    /// `FS_IOC_FSSETXATTR`, `FS_IOC_SETFLAGS`, `file_setattr(2)`: hints on how
    /// to allocate, and other flags of the inode.
    SetAttributes,
    /// `fcntl(F_SETFL)`, which changes how a write that has been judged is made.
    SetFlags,
}

/// The bytes that an operation reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// No bytes whose place could change.
    Nothing,
    /// Its range.
    Range,
    /// From the start of its range to the end of all files.
    ToTheEnd,
    /// Everything beyond the new size.
    BeyondSize,
    /// The whole file.
    Everything,
}

/// The blocks that an operation may not meet within its reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meets {
    /// A frozen block of a pin.
    Frozen,
    /// Any block of a pin.
    Any,
}

/// One row of the contract.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// The kind of the operation.
    pub kind: OperationKind,
    /// The word for the operation in audit records and counters.
    pub name: &'static str,
    /// The bytes that the operation reaches.
    pub reach: Reach,
    /// The blocks that it may not meet there.
    pub refused_on: Meets,
    /// Whether the operation grows the file when its range ends beyond the
    /// size. The block that holds the old end of the file is then zeroed behind
    /// that end, and a shared block is copied for that.
    pub grows: bool,
}

const fn rule(
    kind: OperationKind,
    name: &'static str,
    reach: Reach,
    refused_on: Meets,
    grows: bool,
) -> Rule {
    Rule {
        kind,
        name,
        reach,
        refused_on,
        grows,
    }
}

/// The contract, in the order of [`OperationKind`].
pub const RULES: [Rule; 29] = {
    use Meets::{Any, Frozen};
    use OperationKind as K;
    use Reach::{BeyondSize, Everything, Nothing, Range, ToTheEnd};
    [
        rule(K::Read, "read", Nothing, Any, false),
        rule(K::OpenRead, "open-read", Nothing, Any, false),
        rule(K::MapRead, "mmap-read", Nothing, Any, false),
        rule(K::MapWrite, "mmap-write", Range, Frozen, false),
        rule(K::OpenWrite, "open-write", Nothing, Any, false),
        rule(K::OpenTruncate, "open-truncate", Everything, Any, false),
        rule(K::Write, "write", Range, Frozen, true),
        rule(K::WriteUntorn, "write-untorn", Range, Any, true),
        rule(K::Truncate, "truncate", BeyondSize, Any, true),
        rule(K::Allocate, "allocate", Range, Frozen, true),
        rule(
            K::AllocateKeepSize,
            "allocate-keep-size",
            Range,
            Frozen,
            false,
        ),
        rule(K::PunchHole, "punch-hole", Range, Any, false),
        rule(K::ZeroRange, "zero-range", Range, Any, true),
        rule(K::WriteZeroes, "write-zeroes", Range, Any, true),
        rule(K::UnshareRange, "unshare-range", Range, Any, true),
        rule(K::CollapseRange, "collapse-range", ToTheEnd, Any, false),
        rule(K::InsertRange, "insert-range", ToTheEnd, Any, false),
        rule(K::Reshape, "fallocate", ToTheEnd, Any, true),
        rule(K::Clone, "clone", Range, Any, true),
        rule(K::Dedupe, "dedupe", Range, Any, false),
        rule(K::CopyRange, "copy-range", Range, Any, true),
        rule(K::Exchange, "exchange-range", Range, Any, false),
        rule(K::Unknown, "unknown", Everything, Any, false),
        rule(K::Unlink, "unlink", Nothing, Any, false),
        rule(K::Rename, "rename", Nothing, Any, false),
        rule(K::SetUpLoop, "loop-setup", Everything, Any, false),
        rule(K::EnableVerity, "enable-verity", Everything, Any, false),
        rule(K::SetAttributes, "set-attributes", Everything, Any, false),
        rule(K::SetFlags, "set-flags", Everything, Any, false),
    ]
};

impl OperationKind {
    /// Whether the operation writes bytes. When the file grows, XFS may
    /// allocate ahead for such an operation, and ext4 may truncate it if it
    /// fails. A copy is a write if blocks cannot be shared.
    #[must_use]
    pub const fn writes_data(self) -> bool {
        matches!(self, Self::Write | Self::WriteUntorn | Self::CopyRange)
    }

    /// Whether the blocks that the operation allocates or moves may be
    /// unwritten, and become one extent with the blocks beside them.
    #[must_use]
    pub const fn leaves_unwritten(self) -> bool {
        matches!(
            self,
            Self::Allocate
                | Self::AllocateKeepSize
                | Self::ZeroRange
                | Self::WriteZeroes
                | Self::CollapseRange
                | Self::InsertRange
                | Self::Reshape
        )
    }

    /// The rule for this operation.
    #[must_use]
    pub const fn rule(self) -> &'static Rule {
        &RULES[self as usize]
    }

    /// The word for this operation.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.rule().name
    }

    /// Whether the operation may put shared blocks where it works.
    #[must_use]
    pub const fn may_bring_shared(self) -> bool {
        matches!(
            self,
            Self::Clone
                | Self::Dedupe
                | Self::CopyRange
                | Self::Exchange
                | Self::CollapseRange
                | Self::InsertRange
                | Self::Reshape
        ) || self.may_do_anything()
    }

    /// Whether the operation is judged by no range, since it may do whatever
    /// there is, now or later.
    #[must_use]
    pub const fn may_do_anything(self) -> bool {
        matches!(
            self,
            Self::Unknown
                | Self::SetUpLoop
                | Self::EnableVerity
                | Self::SetAttributes
                | Self::SetFlags
        )
    }

    /// Whether the operation neither changes bytes or their places, nor lets
    /// its caller do so later.
    #[must_use]
    pub const fn is_harmless(self) -> bool {
        matches!(self, Self::Read | Self::OpenRead | Self::MapRead)
    }
}

/// Properties of a kind that gates need beside its [`Rule`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traits {
    /// The operation may put shared blocks where it works.
    pub brings_shared: bool,
    /// The operation writes to the blocks that it reaches, or zeroes in them.
    pub touches: bool,
    /// The pages it throws out of the page cache.
    pub lets_go: LetsGo,
}

/// The pages that an operation throws out of the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LetsGo {
    /// No pages.
    Nothing,
    /// The pages of its range.
    Range,
    /// The pages from one block before its range on.
    ToTheEnd,
    /// The pages of its range, if it bypasses the page cache.
    RangeIfDirect,
}

impl LetsGo {
    /// The bytes whose pages an operation at `range` throws out, in a file with
    /// blocks of this size. A `direct` operation may bypass the page cache.
    pub(super) fn bytes(self, range: &Range<u64>, direct: bool, block: u64) -> Option<Range<u64>> {
        let (before, end) = match self {
            Self::Nothing => return None,
            Self::RangeIfDirect if !direct => return None,
            Self::Range | Self::RangeIfDirect => (0, range.end),
            // Beginning one block earlier, since that block may join the one
            // that is moved (`xfs_prepare_shift`, fs/xfs/xfs_bmap_util.c).
            Self::ToTheEnd => (block, u64::MAX),
        };
        Some(range.start.saturating_sub(before)..end)
    }
}

impl Traits {
    /// The traits of a kind.
    #[must_use]
    pub fn of(kind: OperationKind) -> Self {
        use OperationKind as K;
        let rule = kind.rule();
        Self {
            brings_shared: Operation::new(kind, 0..0).brings_shared,
            touches: match kind {
                K::Truncate | K::Reshape | K::Exchange | K::Clone | K::CopyRange => true,
                kind => !kind.is_harmless() && rule.reach == Reach::Range,
            },
            lets_go: match kind {
                K::Write | K::WriteUntorn => LetsGo::RangeIfDirect,
                K::PunchHole
                | K::ZeroRange
                | K::WriteZeroes
                | K::UnshareRange
                | K::Clone
                | K::Dedupe
                | K::CopyRange
                | K::Exchange => LetsGo::Range,
                K::CollapseRange | K::InsertRange | K::Reshape => LetsGo::ToTheEnd,
                _ => LetsGo::Nothing,
            },
        }
    }
}

/// All kinds, in the order of [`RULES`].
pub fn kinds() -> impl Iterator<Item = OperationKind> {
    RULES.iter().map(|rule| rule.kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_stand_in_the_order_of_the_kinds() {
        for (at, rule) in RULES.iter().enumerate() {
            assert_eq!(rule.kind as usize, at, "{}", rule.name);
        }
    }
}
