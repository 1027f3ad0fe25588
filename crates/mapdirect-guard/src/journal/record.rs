//! The records of the journal: what a guard has to know of a pin, and of a file
//! behind the gate, to keep what another one has granted.
//!
//! The layout is fixed, and numbers are little-endian. A record is written by one
//! system call into one page, so a guard that is killed leaves it as it was or
//! as it shall be. It has a sum all the same, and nothing is believed that
//! does not match it.

use crate::table::InodeId;
use mapdirect_proto::{BlockMap, ExtentState, Flags};
use std::ops::Range;
use zerocopy::byteorder::little_endian::{I32, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// The bytes of a record of a pin.
pub(super) const PIN: usize = 256;
/// The bytes of a record of a file: its path is in it.
pub(super) const FILE: usize = 4096;
/// The longest path that is remembered; of a longer one the beginning is.
const PATH: usize = FILE - 8 * 8;

/// What a pin lives by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LivesBy {
    Lock,
    /// The guard's end of the pipe is kept under the number of the pin.
    Pipe,
    Writers,
}

impl LivesBy {
    fn of(number: u32) -> Option<Self> {
        [Self::Lock, Self::Pipe, Self::Writers]
            .into_iter()
            .find(|by| *by as u32 == number)
    }
}

/// A pin as the journal has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PinRecord {
    pub(crate) id: u64,
    pub(crate) inode: InodeId,
    /// What operations are judged by.
    pub(crate) reach: Range<u64>,
    pub(crate) shown: Range<u64>,
    pub(crate) mapped: Option<Range<u64>>,
    pub(crate) flags: Flags,
    pub(crate) pid: i32,
    pub(crate) uid: u32,
    pub(crate) lives_by: LivesBy,
    /// When it was granted, in seconds of `CLOCK_BOOTTIME`.
    pub(crate) since: u64,
    /// The root of its family and when that started, if it has one.
    pub(crate) family: Option<(i32, u64)>,
    /// The process that asked for it, and when that started.
    pub(crate) asker: Option<(i32, u64)>,
    /// Until when the policy allows it, as [`Delegated::wire`] has it; 0 for a
    /// holder with the capability.
    ///
    /// [`Delegated::wire`]: crate::delegation::Delegated::wire
    pub(crate) until: u64,
    /// Stands for the block map.
    pub(crate) map: u64,
    /// How often blocks of it were found to have changed.
    pub(crate) breaches: u64,
    /// Where copies of shared blocks may take blocks along, for a pin of strength
    /// stable.
    pub(crate) copied: Option<Range<u64>>,
}

/// A file behind the gate as the journal has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileRecord {
    pub(crate) inode: InodeId,
    pub(crate) reflink: bool,
    pub(crate) exchange: bool,
    pub(crate) coarse: bool,
    /// How many names it had.
    pub(crate) names: u64,
    /// By how many bytes blocks may have come nearer.
    pub(crate) moved: u64,
    pub(crate) path: String,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawPin {
    sum: U64,
    id: U64,
    dev: U64,
    inode: U64,
    reach: [U64; 2],
    shown: [U64; 2],
    mapped: [U64; 2],
    flags: U32,
    is_mapped: U32,
    pid: I32,
    uid: U32,
    lives_by: U32,
    family: I32,
    family_began: U64,
    asker: I32,
    pad: U32,
    asker_began: U64,
    since: U64,
    until: U64,
    map: U64,
    breaches: U64,
    copied: [U64; 2],
    rest: [u8; 80],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawFile {
    sum: U64,
    dev: U64,
    inode: U64,
    names: U64,
    moved: U64,
    abilities: U32,
    length: U32,
    pad: [U64; 2],
    path: [u8; PATH],
}

const _: () = assert!(size_of::<RawPin>() == PIN && size_of::<RawFile>() == FILE);

const REFLINK: u32 = 1;
const EXCHANGE: u32 = 2;
const COARSE: u32 = 4;

/// What follows the sum in a record.
const BEHIND_SUM: usize = 8;

/// The sum of bytes: FNV-1a. It is never 0, which a free place begins with.
fn sum(bytes: &[u8]) -> u64 {
    let mut sum = Sum::default();
    sum.add(bytes);
    sum.0.max(1)
}

struct Sum(u64);

impl Default for Sum {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

/// A number that stands for where the blocks of a map are: the same for two maps
/// that differ in nothing that a pin forbids, and never [`UNKNOWN`].
pub(crate) fn sum_of(map: &BlockMap) -> u64 {
    // Blocks that lie in one piece, as filesystems may tell of them in several.
    let mut runs: Vec<(u64, u64, u64, bool)> = Vec::new();
    for extent in map.extents() {
        let is_written = match extent.state {
            // Others may let go of what is shared.
            ExtentState::Written | ExtentState::Shared | ExtentState::Loose => true,
            ExtentState::Unwritten => false,
            _ => continue,
        };
        let Some(physical) = extent.physical else {
            continue;
        };
        match runs.last_mut() {
            Some((offset, at, length, state))
                if *state == is_written
                    && offset.checked_add(*length) == Some(extent.offset)
                    && at.checked_add(*length) == Some(physical) =>
            {
                *length += extent.length;
            }
            _ => runs.push((extent.offset, physical, extent.length, is_written)),
        }
    }
    let mut sum = Sum::default();
    for (offset, physical, length, is_written) in runs {
        for number in [offset, physical, length, is_written.into()] {
            sum.add(&number.to_le_bytes());
        }
    }
    sum.0.max(UNKNOWN + 1)
}

/// Stands for a block map that is being changed for the holder, or that changes
/// by itself.
pub(crate) const UNKNOWN: u64 = 0;

/// A record with its sum.
fn summed<T: IntoBytes + Immutable>(raw: &T) -> Vec<u8> {
    let mut bytes = raw.as_bytes().to_vec();
    let sum = sum(&bytes[BEHIND_SUM..]);
    bytes[..BEHIND_SUM].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// What a place contains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place<T> {
    Free,
    Taken(T),
    /// Something that no guard has written.
    Nonsense,
}

fn read<T: FromBytes, R>(bytes: &[u8], parse: impl FnOnce(T) -> Option<R>) -> Place<R> {
    let Some((first, rest)) = bytes.split_at_checked(BEHIND_SUM) else {
        return Place::Nonsense;
    };
    if first.iter().all(|byte| *byte == 0) {
        return Place::Free;
    }
    if first != sum(rest).to_le_bytes() {
        return Place::Nonsense;
    }
    let raw = T::read_from_bytes(bytes).ok();
    raw.and_then(parse).map_or(Place::Nonsense, Place::Taken)
}

fn known(bits: u32) -> Option<Flags> {
    let flags = Flags::from_known_bits(bits);
    (flags.bits() == bits).then_some(flags)
}

fn range(raw: [U64; 2]) -> Option<Range<u64>> {
    let [start, end] = raw.map(U64::get);
    (start < end).then_some(start..end)
}

fn raw_range(range: &Range<u64>) -> [U64; 2] {
    [range.start.into(), range.end.into()]
}

impl PinRecord {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let (family, family_began) = self.family.unwrap_or_default();
        let (asker, asker_began) = self.asker.unwrap_or_default();
        summed(&RawPin {
            id: self.id.into(),
            dev: self.inode.dev.into(),
            inode: self.inode.inode.into(),
            reach: raw_range(&self.reach),
            shown: raw_range(&self.shown),
            mapped: raw_range(self.mapped.as_ref().unwrap_or(&(0..0))),
            is_mapped: u32::from(self.mapped.is_some()).into(),
            flags: self.flags.bits().into(),
            pid: self.pid.into(),
            uid: self.uid.into(),
            lives_by: (self.lives_by as u32).into(),
            family: family.into(),
            family_began: family_began.into(),
            asker: asker.into(),
            asker_began: asker_began.into(),
            since: self.since.into(),
            until: self.until.into(),
            map: self.map.into(),
            breaches: self.breaches.into(),
            copied: self.copied.as_ref().map_or([U64::MAX_VALUE; 2], raw_range),
            ..RawPin::new_zeroed()
        })
    }

    pub(crate) fn decode(bytes: &[u8]) -> Place<Self> {
        read(bytes, |raw: RawPin| {
            let process = |pid: I32, began: U64| (pid.get() > 0).then(|| (pid.get(), began.get()));
            let mapped = match raw.is_mapped.get() {
                0 => None,
                1 => Some(range(raw.mapped)?),
                _ => return None,
            };
            Some(Self {
                id: raw.id.get(),
                inode: InodeId {
                    dev: raw.dev.get(),
                    inode: raw.inode.get(),
                },
                reach: range(raw.reach)?,
                shown: range(raw.shown)?,
                mapped,
                flags: known(raw.flags.get())?,
                pid: raw.pid.get(),
                uid: raw.uid.get(),
                lives_by: LivesBy::of(raw.lives_by.get())?,
                since: raw.since.get(),
                family: process(raw.family, raw.family_began),
                asker: process(raw.asker, raw.asker_began),
                until: raw.until.get(),
                map: raw.map.get(),
                breaches: raw.breaches.get(),
                copied: match raw.copied.map(U64::get) {
                    [u64::MAX, u64::MAX] => None,
                    // Of a guard that did not record it.
                    [0, 0] => Some(0..u64::MAX),
                    _ => Some(range(raw.copied)?),
                },
            })
        })
    }
}

impl FileRecord {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut raw = RawFile::new_zeroed();
        (raw.dev, raw.inode) = (self.inode.dev.into(), self.inode.inode.into());
        (raw.names, raw.moved) = (self.names.into(), self.moved.into());
        let abilities = [
            (self.reflink, REFLINK),
            (self.exchange, EXCHANGE),
            (self.coarse, COARSE),
        ];
        let bits = abilities.iter().filter(|(has, _)| *has);
        raw.abilities = bits.fold(0, |bits, (_, bit)| bits | bit).into();
        let mut end = self.path.len().min(PATH);
        while !self.path.is_char_boundary(end) {
            end -= 1;
        }
        let path = &self.path.as_bytes()[..end];
        raw.path[..path.len()].copy_from_slice(path);
        raw.length = u32::try_from(path.len()).unwrap_or(0).into();
        summed(&raw)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Place<Self> {
        read(bytes, |raw: RawFile| {
            let length = usize::try_from(raw.length.get()).ok()?;
            let path = std::str::from_utf8(raw.path.get(..length)?).ok()?;
            let abilities = raw.abilities.get();
            Some(Self {
                inode: InodeId {
                    dev: raw.dev.get(),
                    inode: raw.inode.get(),
                },
                reflink: abilities & REFLINK != 0,
                exchange: abilities & EXCHANGE != 0,
                coarse: abilities & COARSE != 0,
                names: raw.names.get(),
                moved: raw.moved.get(),
                path: path.to_owned(),
            })
        })
    }
}

/// For the fuzz target: whatever is believed is written as it was read, also with
/// a sum that matches.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    fn check<T: PartialEq + std::fmt::Debug>(
        bytes: &[u8],
        size: usize,
        decode: fn(&[u8]) -> Place<T>,
        encode: fn(&T) -> Vec<u8>,
    ) {
        let mut record = vec![0; size];
        let length = bytes.len().min(size);
        record[..length].copy_from_slice(&bytes[..length]);
        for _ in 0..2 {
            if let Place::Taken(taken) = decode(&record) {
                assert_eq!(decode(&encode(&taken)), Place::Taken(taken));
            }
            let sum = sum(&record[BEHIND_SUM..]);
            record[..BEHIND_SUM].copy_from_slice(&sum.to_le_bytes());
        }
    }
    check(bytes, PIN, PinRecord::decode, PinRecord::encode);
    check(bytes, FILE, FileRecord::decode, FileRecord::encode);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_range() -> impl Strategy<Value = Range<u64>> {
        (any::<u64>(), any::<u64>()).prop_filter_map("empty", |(one, other)| {
            (one != other).then(|| one.min(other)..one.max(other))
        })
    }

    fn any_inode() -> impl Strategy<Value = InodeId> {
        (any::<u64>(), any::<u64>()).prop_map(|(dev, inode)| InodeId { dev, inode })
    }

    fn any_process() -> impl Strategy<Value = Option<(i32, u64)>> {
        proptest::option::of((1..i32::MAX, any::<u64>()))
    }

    prop_compose! {
        fn any_pin()(
            (id, since, until, map, breaches) in any::<(u64, u64, u64, u64, u64)>(),
            (pid, uid) in any::<(i32, u32)>(),
            inode in any_inode(),
            (reach, shown) in (any_range(), any_range()),
            mapped in proptest::option::of(any_range()),
            (family, asker) in (any_process(), any_process()),
            by in 0u32..3,
            copied in proptest::option::of(any_range()),
        ) -> PinRecord {
            PinRecord {
                copied, id, inode, reach, shown, mapped, pid, uid, since, family, asker, until, map, breaches,
                flags: Flags::STABLE | Flags::FAMILY,
                lives_by: LivesBy::of(by).unwrap(),
            }
        }
    }

    proptest! {
        #[test]
        fn a_pin_comes_back_as_it_was_or_not_at_all(pin in any_pin(), at in 0..PIN, bit in 0..8_u8) {
            let mut bytes = pin.encode();
            prop_assert_eq!(bytes.len(), PIN);
            prop_assert_eq!(PinRecord::decode(&bytes), Place::Taken(pin.clone()));
            bytes[at] ^= 1 << bit;
            prop_assert_eq!(PinRecord::decode(&bytes), Place::Nonsense);
        }

        #[test]
        fn a_file_comes_back_as_it_was(
            inode in any_inode(),
            (names, moved) in any::<(u64, u64)>(),
            (reflink, exchange, coarse) in any::<(bool, bool, bool)>(),
            path in ".{0,3000}",
        ) {
            let file = FileRecord { inode, reflink, exchange, coarse, names, moved, path };
            let Place::Taken(back) = FileRecord::decode(&file.encode()) else {
                panic!("it was written just now");
            };
            prop_assert!(file.path.starts_with(&back.path));
            prop_assert!(back.path.len() == file.path.len() || back.path.len() > PATH - 4);
            let path = file.path.clone();
            prop_assert_eq!(FileRecord { path, ..back }, file);
        }
    }

    #[test]
    fn a_free_place_is_none_and_a_short_one_is_nonsense() {
        assert_eq!(PinRecord::decode(&[0; PIN]), Place::Free);
        assert_eq!(FileRecord::decode(&[0; FILE]), Place::Free);
        assert_eq!(PinRecord::decode(&[1; PIN - 1]), Place::Nonsense);
        assert_eq!(PinRecord::decode(&[]), Place::Nonsense);
    }
}
