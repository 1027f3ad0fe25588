//! Sizes and ranges as people write them: `4096`, `4K`, `1M:2M`.

use std::ops::Range;

/// A range of bytes to pin: from an offset, for a length or to the end of the
/// file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Length in bytes, or to the end of the file.
    pub length: Option<u64>,
}

impl ByteRange {
    /// The bytes of it in a file of `size` bytes.
    #[must_use]
    pub fn resolve(&self, size: u64) -> Range<u64> {
        match self.length {
            Some(length) => self.offset..self.offset.saturating_add(length),
            None => self.offset..size,
        }
    }
}

/// Parses a number of bytes: digits and one of K, M, G, T (powers of 1024),
/// with or without `iB` behind it.
///
/// # Errors
///
/// What is wrong with it, in words.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(format!("`{text}` is no size: write 4096, 4K, 2M or 1G"));
    }
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => {
            return Err(format!(
                "`{unit}` is no unit of size: write K, M, G or T for powers of 1024"
            ));
        }
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|size| *size <= i64::MAX.cast_unsigned())
        .ok_or_else(|| format!("`{text}` is larger than any file"))
}

/// Parses `OFFSET:LENGTH`, or `OFFSET:` for the rest of the file.
///
/// # Errors
///
/// What is wrong with it, in words.
pub(crate) fn parse_range(text: &str) -> Result<ByteRange, String> {
    let (offset, length) = text
        .split_once(':')
        .ok_or_else(|| format!("`{text}` is no range: write OFFSET:LENGTH, as in 0:2M"))?;
    let offset = parse_size(offset)?;
    let length = match length {
        "" => None,
        length => Some(parse_size(length)?),
    };
    if length == Some(0) {
        return Err(String::from("a range has at least one byte"));
    }
    if offset
        .checked_add(length.unwrap_or(0))
        .is_none_or(|end| end > i64::MAX.cast_unsigned())
    {
        return Err(format!("the range `{text}` ends beyond the largest file"));
    }
    Ok(ByteRange { offset, length })
}

/// Bytes for a person: `4096` stays, larger round numbers get a unit.
#[must_use]
pub(crate) fn human(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >> shift >= 10 || bytes != 0 && bytes.is_multiple_of(1 << shift) {
            let tenths = (u128::from(bytes) * 10) >> shift;
            return if tenths.is_multiple_of(10) {
                format!("{} {unit}", tenths / 10)
            } else {
                format!("{}.{} {unit}", tenths / 10, tenths % 10)
            };
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_people_write() {
        for (text, expected) in [
            ("0", 0),
            ("4096", 4096),
            ("4K", 4096),
            ("4k", 4096),
            ("2MiB", 2 << 20),
            ("1G", 1 << 30),
            ("3T", 3 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(expected), "{text}");
        }
        for text in [
            "",
            "K",
            "4X",
            "-1",
            "4 K",
            "1.5G",
            "0x10",
            "99999999999999999999",
            "9999999T",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ranges_people_write() {
        let range = parse_range("1M:2M").unwrap();
        assert_eq!(range.resolve(0), 1 << 20..3 << 20);
        let rest = parse_range("4K:").unwrap();
        assert_eq!(rest.resolve(10_000), 4096..10_000);
        for text in ["", ":", "4K", "0:0", ":4K", "1:2:3", "8388607T:8388607T"] {
            assert!(parse_range(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_people_read() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(5000), "5000 B");
        assert_eq!(human(4096), "4 KiB");
        assert_eq!(human(15_000), "14.6 KiB");
        assert_eq!(human(3 << 30), "3 GiB");
    }

    proptest! {
        #[test]
        fn any_text_is_a_size_or_not(text in ".{0,20}") {
            let _ = parse_size(&text);
            let _ = parse_range(&text);
        }

        #[test]
        fn a_number_reads_as_itself(bytes in 0..i64::MAX.cast_unsigned()) {
            prop_assert_eq!(parse_size(&bytes.to_string()), Ok(bytes));
            prop_assert!(!human(bytes).is_empty());
        }
    }
}
