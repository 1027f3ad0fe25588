//! What fuzzers call of the tripwire.

use super::format::{Format, id_of};
use super::wires::listed;

/// A format file, and a record behind a zero byte.
pub(crate) const SEED: &[u8] = b"name: ext4_remove_blocks\nID: 1192\nformat:\n\
    \tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\
    \tfield:dev_t dev;\toffset:8;\tsize:4;\tsigned:0;\n\
    \tfield:ino_t ino;\toffset:16;\tsize:8;\tsigned:0;\n\
    \tfield:char comm[16];\toffset:24;\tsize:16;\tsigned:0;\n\n\
    print fmt: \"dev %d\", REC->dev\n\0\
    \xa8\x04\0\0\0\0\0\0\0\0\x70\0\0\0\0\0\x83\0\0\0\0\0\0\0comm";

/// Reads a format, and a record by it.
pub(crate) fn format(bytes: &[u8]) {
    let mut parts = bytes.splitn(2, |byte| *byte == 0);
    let text = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let record = parts.next().unwrap_or_default();
    let _ = id_of(record);
    let Some(format) = Format::parse(&text) else {
        return;
    };
    for name in ["common_type", "dev", "ino", "comm"] {
        let value = format.value(name, record);
        assert!(value.is_none() || format.has(name) && !record.is_empty());
    }
}

/// Reads a list of processors.
pub(crate) fn processors(bytes: &[u8]) {
    if let Some(numbers) = listed(&String::from_utf8_lossy(bytes)) {
        assert!(numbers.iter().all(|number| *number < 1 << 16));
    }
}
