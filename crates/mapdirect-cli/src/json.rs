//! The same facts for machines. Offsets and lengths are bytes.

use mapdirect::{BlockMap, Extent, ExtentState};
use serde_json::{Map, Value, json};
use std::ops::Range;

pub(crate) fn extent(extent: &Extent) -> Value {
    json!({
        "file_offset": extent.offset,
        "physical_offset": extent.physical,
        "length": extent.length,
        "state": extent.state.name(),
    })
}

pub(crate) fn range(range: &Range<u64>) -> Value {
    json!({ "offset": range.start, "length": range.end - range.start })
}

pub(crate) fn extents(map: &BlockMap) -> Value {
    map.extents().iter().map(extent).collect()
}

/// Bytes by state, every state named.
pub(crate) fn totals(map: &BlockMap) -> Value {
    let totals: Map<String, Value> = ExtentState::ALL
        .iter()
        .map(|state| (state.name().to_owned(), map.total(*state).into()))
        .collect();
    totals.into()
}
