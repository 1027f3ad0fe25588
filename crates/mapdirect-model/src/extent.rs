//! Extents and block maps: where the bytes of a file lie. Pure data, which
//! [`read`](crate::block_map::read) fills from FIEMAP.

use std::fmt;
use std::ops::Range;

/// The state of a block of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum ExtentState {
    /// Allocated, written, and used by this file alone: stable under a pin.
    Written,
    /// Allocated but never written: reads as zeros.
    Unwritten,
    /// Not allocated: reads as zeros. Everything beyond the end of the file is
    /// a hole, too.
    Hole,
    /// Written, but other files or ranges use the same blocks.
    Shared,
    /// Written in memory, but no block is chosen yet.
    Delalloc,
    /// Inside the inode or another metadata block.
    Inline,
    /// Compressed, encrypted, or otherwise not the file's own bytes.
    Encoded,
    /// The filesystem does not say.
    Unknown,
    /// Written and used by this file alone, but not at rest: a write to a
    /// shared block nearby may move it, or it lies behind the end of the file.
    /// FIEMAP never says so. A guard does, of a pin of strength stable, which
    /// does not hold such a block in its place.
    Loose,
}

impl ExtentState {
    /// Every state, in the order of its number.
    pub const ALL: [Self; 9] = [
        Self::Written,
        Self::Unwritten,
        Self::Hole,
        Self::Shared,
        Self::Delalloc,
        Self::Inline,
        Self::Encoded,
        Self::Unknown,
        Self::Loose,
    ];

    /// Allocated, written and not shared: a store changes the bytes and
    /// nothing else.
    #[must_use]
    pub const fn is_stable(self) -> bool {
        matches!(self, Self::Written)
    }

    /// Whether the state is hole, unwritten or shared. A pin keeps such a block
    /// as it is, so stores to it cannot be allowed.
    #[must_use]
    pub const fn is_frozen(self) -> bool {
        matches!(self, Self::Unwritten | Self::Hole | Self::Shared)
    }

    /// What an agent may do to blocks in this state by itself, on the device,
    /// while a pin of strength `all` keeps them there. (A pin of strength `stable`
    /// holds no shared blocks.)
    #[must_use]
    pub const fn raw_access(self) -> RawAccess {
        match self {
            Self::Written => RawAccess::ReadWrite,
            // A write would change the other files, too.
            Self::Shared => RawAccess::Read,
            _ => RawAccess::None,
        }
    }

    /// The name of the state in output and documentation.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Written => "written",
            Self::Unwritten => "unwritten",
            Self::Hole => "hole",
            Self::Shared => "shared",
            Self::Delalloc => "delalloc",
            Self::Inline => "inline",
            Self::Encoded => "encoded",
            Self::Unknown => "unknown",
            Self::Loose => "loose",
        }
    }

    /// The number of the state in stored and transmitted data, which never
    /// changes.
    #[must_use]
    pub const fn number(self) -> u32 {
        self as u32
    }

    /// The state with this number.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }
}

impl fmt::Display for ExtentState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What may be done to blocks of a file by going to the device itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RawAccess {
    /// The bytes there are those of the file, and its alone.
    ReadWrite,
    /// The bytes there are those of the file, and of others.
    Read,
    /// There are no blocks, or the bytes there are not those of the file. In
    /// blocks that were never written they may be those of somebody else's
    /// deleted file.
    None,
}

impl RawAccess {
    /// The name in output and documentation.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ReadWrite => "read-write",
            Self::Read => "read",
            Self::None => "none",
        }
    }
}

/// A run of bytes of a file that lie in one piece and are in one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Extent {
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Offset on the block device, in bytes, if there is one.
    pub physical: Option<u64>,
    /// Length in bytes.
    pub length: u64,
    /// The state of the blocks.
    pub state: ExtentState,
}

impl Extent {
    /// Makes an extent.
    #[must_use]
    pub const fn new(offset: u64, physical: Option<u64>, length: u64, state: ExtentState) -> Self {
        Self {
            offset,
            physical,
            length,
            state,
        }
    }

    /// Offset in the file of the first byte behind the extent.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    /// The part of the extent inside `range`.
    #[must_use]
    pub fn clipped(&self, range: &Range<u64>) -> Option<Self> {
        let start = self.offset.max(range.start);
        let end = self.end().min(range.end);
        (start < end).then(|| Self {
            offset: start,
            physical: self
                .physical
                .map(|physical| physical.saturating_add(start - self.offset)),
            length: end - start,
            state: self.state,
        })
    }

    /// Whether `next` goes on where this one ends, in the file and on the
    /// device.
    fn continues_in(&self, next: &Self) -> bool {
        self.state == next.state
            && self.end() == next.offset
            && self.physical.map(|at| at.saturating_add(self.length)) == next.physical
    }
}

/// A block device or filesystem by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// The block map of a range of a file: extents in file order that cover the
/// range without gaps or overlaps, including holes.
///
/// Two block maps of one range are equal exactly when every byte lies at the
/// same place in the same state, however the filesystem divides its records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockMap {
    device: DeviceId,
    block_size: u32,
    file_size: u64,
    range: Range<u64>,
    extents: Vec<Extent>,
}

impl BlockMap {
    /// Makes a block map of `range` from extents as a filesystem reports them.
    /// They must be in file order, but may reach over the ends of the range,
    /// and holes may be left out. An extent that overlaps an earlier one is
    /// cut.
    #[must_use]
    pub fn new(
        device: DeviceId,
        block_size: u32,
        file_size: u64,
        range: Range<u64>,
        reported: impl IntoIterator<Item = Extent>,
    ) -> Self {
        let mut map = Self {
            device,
            block_size,
            file_size,
            range: range.clone(),
            extents: Vec::new(),
        };
        let mut at = range.start;
        for extent in reported {
            let Some(extent) = extent.clipped(&(at..range.end)) else {
                continue;
            };
            map.push_hole(at, extent.offset);
            map.push(extent);
            at = extent.end();
        }
        map.push_hole(at, range.end);
        map
    }

    fn push_hole(&mut self, start: u64, end: u64) {
        if start < end {
            self.push(Extent::new(start, None, end - start, ExtentState::Hole));
        }
    }

    fn push(&mut self, extent: Extent) {
        match self.extents.last_mut() {
            Some(last) if last.continues_in(&extent) => last.length += extent.length,
            _ => self.extents.push(extent),
        }
    }

    /// The device that physical offsets refer to: the one of the filesystem, as
    /// in `st_dev`.
    #[must_use]
    pub const fn device(&self) -> DeviceId {
        self.device
    }

    /// Size of a filesystem block in bytes.
    #[must_use]
    pub const fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Size of the file in bytes when the map was read.
    #[must_use]
    pub const fn file_size(&self) -> u64 {
        self.file_size
    }

    /// The range of the file that the map covers, in bytes.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// The extents, in file order.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// The extents that a pin lets nobody store to.
    pub fn frozen(&self) -> impl Iterator<Item = &Extent> {
        self.extents
            .iter()
            .filter(|extent| !extent.state.is_stable())
    }

    /// Whether every block is allocated, written and not shared.
    #[must_use]
    pub fn is_stable(&self) -> bool {
        self.frozen().next().is_none()
    }

    /// The extent that holds byte `offset` of the file.
    #[must_use]
    pub fn find(&self, offset: u64) -> Option<&Extent> {
        let at = self
            .extents
            .partition_point(|extent| extent.end() <= offset);
        self.extents
            .get(at)
            .filter(|extent| extent.offset <= offset)
    }

    /// The number of bytes in `state`.
    #[must_use]
    pub fn total(&self, state: ExtentState) -> u64 {
        self.extents
            .iter()
            .filter(|extent| extent.state == state)
            .map(|extent| extent.length)
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEVICE: DeviceId = DeviceId { major: 7, minor: 1 };

    fn map(range: Range<u64>, reported: Vec<Extent>) -> BlockMap {
        BlockMap::new(DEVICE, 4096, 1 << 20, range, reported)
    }

    fn state() -> impl Strategy<Value = ExtentState> {
        (0..ExtentState::ALL.len()).prop_map(|at| ExtentState::ALL[at])
    }

    fn extent() -> impl Strategy<Value = Extent> {
        let physical = proptest::option::of(0u64..1 << 40);
        (0u64..1000, physical, 0u64..300, state()).prop_map(|(offset, physical, length, state)| {
            Extent::new(offset, physical, length, state)
        })
    }

    proptest! {
        #[test]
        fn any_report_gives_a_map_without_gaps(
            mut reported in proptest::collection::vec(extent(), 0..30),
            start in 0u64..1000,
            length in 1u64..1000,
        ) {
            reported.sort_by_key(|extent| extent.offset);
            let map = map(start..start + length, reported);
            let mut at = start;
            for extent in map.extents() {
                prop_assert_eq!(extent.offset, at);
                prop_assert!(extent.length > 0);
                at = extent.end();
            }
            prop_assert_eq!(at, start + length);
            let totals: u64 = ExtentState::ALL.iter().map(|state| map.total(*state)).sum();
            prop_assert_eq!(totals, length);
        }

        #[test]
        fn cutting_a_report_into_pieces_changes_nothing(
            offset in 0u64..100,
            physical in 0u64..100,
            length in 2u64..100,
            cut in 1u64..99,
        ) {
            prop_assume!(cut < length);
            let whole = Extent::new(offset, Some(physical), length, ExtentState::Written);
            let left = whole.clipped(&(offset..offset + cut)).unwrap();
            let right = whole.clipped(&(offset + cut..offset + length)).unwrap();
            prop_assert_eq!(map(0..300, vec![whole]), map(0..300, vec![left, right]));
        }

        #[test]
        fn find_agrees_with_a_linear_search(
            mut reported in proptest::collection::vec(extent(), 0..30),
            offset in 0u64..1200,
        ) {
            reported.sort_by_key(|extent| extent.offset);
            let map = map(50..1000, reported);
            let linear = map
                .extents()
                .iter()
                .find(|extent| extent.offset <= offset && offset < extent.end());
            prop_assert_eq!(map.find(offset), linear);
        }
    }

    #[test]
    fn numbers_of_states_come_back() {
        for state in ExtentState::ALL {
            assert_eq!(ExtentState::from_number(state.number()), Some(state));
        }
        assert_eq!(ExtentState::from_number(9), None);
    }

    #[test]
    fn a_moved_block_makes_another_map() {
        let here = Extent::new(0, Some(4096), 4096, ExtentState::Written);
        let there = Extent::new(0, Some(8192), 4096, ExtentState::Written);
        assert_ne!(map(0..4096, vec![here]), map(0..4096, vec![there]));
    }

    #[test]
    fn an_empty_report_is_one_hole() {
        let map = map(4096..8192, Vec::new());
        assert_eq!(map.total(ExtentState::Hole), 4096);
        assert!(!map.is_stable());
    }
}
