//! Extents on the wire. [`mapdirect_model`] defines what an extent is.

pub use mapdirect_model::extent::{BlockMap, DeviceId, Extent, ExtentState};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// An extent on the wire and in sealed memory files: 32 bytes.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct ExtentRecord {
    offset: U64,
    /// `u64::MAX` for none.
    physical: U64,
    length: U64,
    state: U32,
    reserved: U32,
}

/// The number of bytes of one extent on the wire.
pub const EXTENT_RECORD: usize = size_of::<ExtentRecord>();

impl From<&Extent> for ExtentRecord {
    fn from(extent: &Extent) -> Self {
        Self {
            offset: extent.offset.into(),
            physical: extent.physical.unwrap_or(u64::MAX).into(),
            length: extent.length.into(),
            state: extent.state.number().into(),
            reserved: 0.into(),
        }
    }
}

/// Writes extents as records, one after the other.
#[must_use]
pub fn encode_extents(extents: &[Extent]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(extents.len() * EXTENT_RECORD);
    for extent in extents {
        bytes.extend_from_slice(ExtentRecord::from(extent).as_bytes());
    }
    bytes
}

/// Reads what [`encode_extents`] wrote.
///
/// # Errors
///
/// [`DecodeError`](crate::DecodeError) for anything else. The extents are taken
/// as they are: [`BlockMap::new`] brings any list into order.
pub fn decode_extents(bytes: &[u8]) -> Result<Vec<Extent>, crate::DecodeError> {
    let (records, rest) = bytes.as_chunks::<EXTENT_RECORD>();
    if !rest.is_empty() {
        return Err(crate::DecodeError::Length);
    }
    records
        .iter()
        .map(|bytes| {
            let record =
                ExtentRecord::read_from_bytes(bytes).map_err(|_| crate::DecodeError::Short)?;
            let state = ExtentState::from_number(record.state.get())
                .ok_or(crate::DecodeError::Value("extent state"))?;
            let physical = Some(record.physical.get()).filter(|at| *at != u64::MAX);
            Ok(Extent::new(
                record.offset.get(),
                physical,
                record.length.get(),
                state,
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
        fn extents_survive_the_wire(extents in proptest::collection::vec(extent(), 0..30)) {
            let decoded = decode_extents(&encode_extents(&extents)).unwrap();
            prop_assert_eq!(decoded, extents);
        }

        #[test]
        fn any_bytes_decode_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_extents(&bytes);
        }
    }
}
