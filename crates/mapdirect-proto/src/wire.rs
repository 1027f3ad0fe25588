//! Reads and writes records.

use std::fmt;
use zerocopy::{FromBytes, IntoBytes, KnownLayout};

/// Why bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DecodeError {
    /// The bytes end too early.
    Short,
    /// The length in the bytes does not match their number.
    Length,
    /// A record is longer than this version knows, and the rest is not zero:
    /// the sender asks for something that this version cannot do.
    Newer,
    /// The kind of message is not defined.
    Kind(u16),
    /// A field has a value without a meaning.
    Value(&'static str),
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short => f.write_str("the message ends too early"),
            Self::Length => f.write_str("the message has another length than it says"),
            Self::Newer => f.write_str("the message uses fields this version does not know"),
            Self::Kind(kind) => write!(f, "there is no message of kind {kind}"),
            Self::Value(field) => write!(f, "field `{field}` holds a value without meaning"),
        }
    }
}

impl std::error::Error for DecodeError {}

/// A cursor over received bytes.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'bytes> {
    bytes: &'bytes [u8],
}

impl<'bytes> Reader<'bytes> {
    pub(crate) fn new(bytes: &'bytes [u8]) -> Self {
        Self { bytes }
    }

    pub(crate) fn take(&mut self, length: usize) -> Result<&'bytes [u8], DecodeError> {
        let (taken, rest) = self
            .bytes
            .split_at_checked(length)
            .ok_or(DecodeError::Short)?;
        self.bytes = rest;
        Ok(taken)
    }

    /// A record of exactly the length of this version.
    pub(crate) fn record<T: FromBytes>(&mut self) -> Result<T, DecodeError> {
        T::read_from_bytes(self.take(size_of::<T>())?).map_err(|_| DecodeError::Short)
    }

    /// A record of `length` bytes that may be older or newer than `T`.
    pub(crate) fn extensible<T: FromBytes + IntoBytes + KnownLayout>(
        &mut self,
        length: usize,
    ) -> Result<T, DecodeError> {
        let bytes = self.take(length)?;
        let known = bytes.len().min(size_of::<T>());
        if bytes[known..].iter().any(|byte| *byte != 0) {
            return Err(DecodeError::Newer);
        }
        let mut record = T::new_zeroed();
        record.as_mut_bytes()[..known].copy_from_slice(&bytes[..known]);
        Ok(record)
    }

    /// A text of `length` bytes. Bytes that are not UTF-8 are replaced.
    pub(crate) fn text(&mut self, length: usize) -> Result<String, DecodeError> {
        Ok(String::from_utf8_lossy(self.take(length)?).into_owned())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn remaining(&self) -> usize {
        self.bytes.len()
    }
}

/// `text`, cut to at most `limit` bytes at a character boundary.
pub(crate) fn clipped(text: &str, limit: usize) -> &str {
    // `str::floor_char_boundary` is newer than the oldest compiler supported.
    let mut end = limit.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// A length that is known to be small, in its wire format.
pub(crate) fn wire_len(length: usize) -> zerocopy::little_endian::U32 {
    u32::try_from(length).unwrap_or(u32::MAX).into()
}
