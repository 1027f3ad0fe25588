//! The same facts for machines. Offsets and lengths are bytes.

use mapdirect::{BlockMap, Breach, Extent, ExtentState, Strength};
use serde_json::{Map, Value, json};
use std::ops::Range;
use std::path::Path;

/// A file name: itself, or `$'...'` if it is not UTF-8 (docs/schemas/common.json).
pub(crate) fn name(path: &Path) -> String {
    mapdirect_sys::names::name(path.as_os_str())
}

pub(crate) fn extent(extent: &Extent) -> Value {
    json!({
        "file_offset": extent.offset,
        "physical_offset": extent.physical,
        "length": length(&(extent.offset..extent.end())),
        "state": extent.state.name(),
    })
}

pub(crate) fn range(range: &Range<u64>) -> Value {
    json!({ "offset": range.start, "length": length(range) })
}

/// The length of a range; nothing if it has no end.
pub(crate) fn length(range: &Range<u64>) -> Option<u64> {
    (range.end != u64::MAX).then_some(range.end - range.start)
}

/// The name of a strength.
pub(crate) fn strength(strength: Strength) -> &'static str {
    match strength {
        Strength::Stable => "stable",
        _ => "all",
    }
}

/// A breach of a pin. Times are nanoseconds since the epoch.
pub(crate) fn breach(breach: &Breach) -> Value {
    let cause = breach
        .cause
        .as_ref()
        .map(|cause| json!({ "pid": cause.pid, "command": cause.command, "what": cause.what }));
    json!({
        "pin": breach.pin,
        "file": breach.path,
        "device": breach.device.to_string(),
        "inode": breach.inode,
        "time": breach.time,
        "offset": breach.range.start,
        "length": breach.range.end.saturating_sub(breach.range.start),
        "before": breach.before.iter().map(extent).collect::<Vec<_>>(),
        "after": breach.after.iter().map(extent).collect::<Vec<_>>(),
        "cause": cause,
    })
}

/// Bytes by state, every state named.
pub(crate) fn totals(map: &BlockMap) -> Value {
    let totals: Map<String, Value> = ExtentState::ALL
        .iter()
        .map(|state| (state.name().to_owned(), map.total(*state).into()))
        .collect();
    totals.into()
}
