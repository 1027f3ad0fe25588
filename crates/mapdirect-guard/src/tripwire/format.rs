//! Reads the `format` files of tracefs, in which the kernel describes its
//! tracepoints.
//!
//! The same tracepoint has its fields in other places on other kernels (7.3
//! puts the inode of ext4's first), so only their names are known beforehand.

/// One field of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Field {
    name: String,
    offset: usize,
    size: usize,
}

/// A tracepoint of the running kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    /// The number of the tracepoint, which is also in the first two bytes of
    /// every record.
    pub(crate) id: u16,
    fields: Vec<Field>,
}

impl Format {
    /// Reads a `format` file, or returns `None` if the text is not one.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let id = text.lines().find_map(|line| line.strip_prefix("ID:"))?;
        let fields = text.lines().filter_map(field).collect();
        Some(Self {
            id: id.trim().parse().ok()?,
            fields,
        })
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.fields.iter().any(|field| field.name == name)
    }

    /// The value of a field in a record from the kernel.
    pub(crate) fn value(&self, name: &str, record: &[u8]) -> Option<u64> {
        let field = self.fields.iter().find(|field| field.name == name)?;
        let end = field.offset.checked_add(field.size)?;
        let bytes = record.get(field.offset..end)?;
        Some(match *bytes {
            [a] => a.into(),
            [a, b] => u16::from_ne_bytes([a, b]).into(),
            [a, b, c, d] => u32::from_ne_bytes([a, b, c, d]).into(),
            [a, b, c, d, e, f, g, h] => u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
            _ => return None,
        })
    }
}

/// The number of the tracepoint that wrote a record (`common_type`).
pub(crate) fn id_of(record: &[u8]) -> Option<u16> {
    record.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes))
}

/// Reads a line like `field:xfs_ino_t ino; offset:16; size:8; signed:0;`, with
/// tabs.
fn field(line: &str) -> Option<Field> {
    let mut parts = line.trim().strip_prefix("field:")?.split(';');
    let declared = parts.next()?;
    let name = declared.split_whitespace().next_back()?;
    let name = name.split('[').next()?.trim_start_matches('*');
    let mut numbers = parts.filter_map(|part| part.trim().split_once(':'));
    let mut number = |wanted: &str| {
        let (_, value) = numbers.find(|(key, _)| *key == wanted)?;
        value.trim().parse().ok()
    };
    Some(Field {
        name: name.to_owned(),
        offset: number("offset")?,
        size: number("size")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &str = "name: ext4_remove_blocks\nID: 1192\nformat:\n\
        \tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\
        \tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n\
        \tfield:dev_t dev;\toffset:8;\tsize:4;\tsigned:0;\n\
        \tfield:ino_t ino;\toffset:16;\tsize:8;\tsigned:0;\n\
        \tfield:unsigned short ee_len;\toffset:44;\tsize:2;\tsigned:0;\n\
        \tfield:char comm[16];\toffset:48;\tsize:16;\tsigned:0;\n\n\
        print fmt: \"dev %d\", REC->dev\n";

    #[test]
    fn a_format_is_read() {
        let format = Format::parse(TEXT).unwrap();
        assert_eq!(format.id, 1192);
        assert!(format.has("common_type") && format.has("ino") && format.has("comm"));
        assert!(!format.has("from"));
        let mut record = vec![0; 64];
        record[..2].copy_from_slice(&1192u16.to_ne_bytes());
        record[8..12].copy_from_slice(&77u32.to_ne_bytes());
        record[16..24].copy_from_slice(&(1u64 << 40).to_ne_bytes());
        record[44..46].copy_from_slice(&9u16.to_ne_bytes());
        assert_eq!(id_of(&record), Some(1192));
        assert_eq!(format.value("dev", &record), Some(77));
        assert_eq!(format.value("ino", &record), Some(1 << 40));
        assert_eq!(format.value("ee_len", &record), Some(9));
        assert_eq!(format.value("comm", &record), None, "it is no number");
        assert_eq!(format.value("ino", &record[..20]), None, "it is cut off");
    }

    #[test]
    fn what_is_no_format_is_none() {
        for text in ["", "ID:", "ID: x", "ID: 70000", "name: y\nformat:\n"] {
            assert_eq!(Format::parse(text), None, "{text:?}");
        }
        let odd = "ID: 3\nfield:;\nfield:int a;\toffset:x;\nfield:int b;\toffset:4;\tsize:99999999999999999999;";
        assert_eq!(Format::parse(odd).unwrap().fields, []);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_not(
            text in "(ID: ?[0-9]{0,6}\n)?(\tfield:[a-z *\\[\\]0-9]{0,12};?\toffset:[0-9]{0,20};\tsize:[0-9]{0,20};\n){0,4}",
            record in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            if let Some(format) = Format::parse(&text) {
                for field in &format.fields {
                    let _ = format.value(&field.name, &record);
                }
            }
            let _ = id_of(&record);
        }
    }
}
