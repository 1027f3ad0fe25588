//! The form of every message: a header with its length and kind, and a fixed
//! record.

use crate::MAX_MESSAGE;
use crate::wire::{DecodeError, Reader, wire_len};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct Header {
    /// Length of the whole message.
    pub(crate) length: U32,
    pub(crate) kind: U16,
    /// Length of the fixed record behind the header.
    pub(crate) record: U16,
}

pub(crate) const HEADER: usize = size_of::<Header>();

pub(crate) mod kind {
    pub(crate) const HELLO: u16 = 1;
    pub(crate) const PROVE: u16 = 2;
    pub(crate) const PIN: u16 = 3;
    pub(crate) const SWAPPED: u16 = 4;
    pub(crate) const QUERY: u16 = 5;
    pub(crate) const STATUS: u16 = 6;
    pub(crate) const ANNOUNCE: u16 = 7;
    pub(crate) const ALLOCATE: u16 = 8;
    pub(crate) const ENDED: u16 = 9;
    pub(crate) const WATCH: u16 = 10;
    pub(crate) const BARRIER: u16 = 11;
    pub(crate) const UNPIN: u16 = 12;
    pub(crate) const ARM: u16 = 13;
    pub(crate) const DISARM: u16 = 14;
    pub(crate) const YIELD: u16 = 15;
    pub(crate) const RESUME: u16 = 16;
    pub(crate) const KEEPER: u16 = 17;
    pub(crate) const FOLLOW: u16 = 18;

    pub(crate) const WELCOME: u16 = 101;
    pub(crate) const DONE: u16 = 102;
    pub(crate) const SWAP: u16 = 103;
    pub(crate) const GRANTED: u16 = 104;
    pub(crate) const REFUSED: u16 = 105;
    pub(crate) const PINS: u16 = 106;
    pub(crate) const STATUS_REPLY: u16 = 107;
    pub(crate) const BREACH: u16 = 108;
    pub(crate) const LOST: u16 = 109;
    pub(crate) const UNATTENDED: u16 = 110;
    pub(crate) const WATCHING: u16 = 111;
    pub(crate) const RENAMED: u16 = 112;
    pub(crate) const RECORD: u16 = 113;
    pub(crate) const MISSED: u16 = 114;
    pub(crate) const FOLLOWING: u16 = 115;
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct Empty {}

pub(crate) fn message(kind: u16, record: &(impl IntoBytes + Immutable), tail: &[u8]) -> Vec<u8> {
    let record = record.as_bytes();
    let length = HEADER + record.len() + tail.len();
    let header = Header {
        length: wire_len(length),
        kind: kind.into(),
        // Records are structures of this crate, far below 64 KiB.
        record: u16::try_from(record.len()).unwrap_or(u16::MAX).into(),
    };
    let mut bytes = Vec::with_capacity(length);
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(record);
    bytes.extend_from_slice(tail);
    bytes
}

pub(crate) struct Body<'bytes> {
    pub(crate) kind: u16,
    record: usize,
    reader: Reader<'bytes>,
}

impl<'bytes> Body<'bytes> {
    pub(crate) fn open(bytes: &'bytes [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes);
        let header: Header = reader.record()?;
        if header.length.get() as usize != bytes.len() || bytes.len() > MAX_MESSAGE {
            return Err(DecodeError::Length);
        }
        Ok(Self {
            kind: header.kind.get(),
            record: header.record.get().into(),
            reader,
        })
    }

    /// The fixed record of a message without anything behind it.
    pub(crate) fn only<T: FromBytes + IntoBytes + KnownLayout>(mut self) -> Result<T, DecodeError> {
        let record = self.reader.extensible(self.record)?;
        if self.reader.is_empty() {
            Ok(record)
        } else {
            Err(DecodeError::Length)
        }
    }

    /// The fixed record, and a reader of what follows it.
    pub(crate) fn first<T: FromBytes + IntoBytes + KnownLayout>(
        mut self,
    ) -> Result<(T, Reader<'bytes>), DecodeError> {
        let record = self.reader.extensible(self.record)?;
        Ok((record, self.reader))
    }
}
