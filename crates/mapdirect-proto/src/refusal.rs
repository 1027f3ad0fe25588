//! Refusals: why there is no pin, and who has the file open. Also their wire
//! format.

use crate::MAX_MESSAGE;
use crate::envelope::{Body, HEADER, kind, message};
use crate::reason::Reason;
use crate::wire::{DecodeError, clipped, wire_len};
use zerocopy::little_endian::{I32, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A user of the file that has it open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opener {
    /// Process id, as the guard sees it.
    pub pid: i32,
    /// Descriptor number, or `None` for a memory mapping or a kernel user.
    pub fd: Option<i32>,
    /// Whether this opener can write.
    pub writable: bool,
    /// Whether this opener is a memory mapping.
    pub mapped: bool,
    /// The name of the command, or a description of another user.
    pub command: String,
}

/// Why there is no pin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The errno that `mmap(2)` would give.
    pub errno: i32,
    /// The kind of the obstacle.
    pub reason: Reason,
    /// The obstacle, for a person.
    pub obstacle: String,
    /// What to do about it, for a person. Empty if nothing helps.
    pub mend: String,
    /// The processes that have the file open, if that is the obstacle.
    pub openers: Vec<Opener>,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RefusedRecord {
    errno: I32,
    reason: U32,
    obstacle: U32,
    mend: U32,
    openers: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct OpenerRecord {
    pid: I32,
    /// -1 for none.
    fd: I32,
    /// 1 writable, 2 mapped.
    flags: U32,
    command: U32,
}

/// The longest texts in a refusal: a refusal always fits into a message.
const MAX_TEXT: usize = 4096;
const MAX_COMMAND: usize = 64;
/// The most openers that a refusal carries.
pub const MAX_OPENERS: usize = 64;

const _: () = {
    let refusal = 2 * MAX_TEXT + MAX_OPENERS * (size_of::<OpenerRecord>() + MAX_COMMAND);
    assert!(HEADER + size_of::<RefusedRecord>() + refusal <= MAX_MESSAGE);
};

pub(crate) fn encode_refusal(refusal: &Refusal) -> Vec<u8> {
    let obstacle = clipped(&refusal.obstacle, MAX_TEXT);
    let mend = clipped(&refusal.mend, MAX_TEXT);
    let openers = &refusal.openers[..refusal.openers.len().min(MAX_OPENERS)];
    let record = RefusedRecord {
        errno: refusal.errno.into(),
        reason: refusal.reason.number().into(),
        obstacle: wire_len(obstacle.len()),
        mend: wire_len(mend.len()),
        openers: wire_len(openers.len()),
        reserved: 0.into(),
    };
    let mut tail = Vec::new();
    tail.extend_from_slice(obstacle.as_bytes());
    tail.extend_from_slice(mend.as_bytes());
    for opener in openers {
        let command = clipped(&opener.command, MAX_COMMAND);
        let record = OpenerRecord {
            pid: opener.pid.into(),
            fd: opener.fd.unwrap_or(-1).into(),
            flags: (u32::from(opener.writable) | u32::from(opener.mapped) << 1).into(),
            command: wire_len(command.len()),
        };
        tail.extend_from_slice(record.as_bytes());
        tail.extend_from_slice(command.as_bytes());
    }
    message(kind::REFUSED, &record, &tail)
}

pub(crate) fn decode_refusal(body: Body<'_>) -> Result<Refusal, DecodeError> {
    let (record, mut rest): (RefusedRecord, _) = body.first()?;
    let mut refusal = Refusal {
        errno: record.errno.get(),
        reason: Reason::from_number(record.reason.get()),
        obstacle: rest.text(record.obstacle.get() as usize)?,
        mend: rest.text(record.mend.get() as usize)?,
        openers: Vec::new(),
    };
    // Every opener takes bytes, so a false count ends as Short.
    for _ in 0..record.openers.get() {
        let record: OpenerRecord = rest.record()?;
        refusal.openers.push(Opener {
            pid: record.pid.get(),
            fd: Some(record.fd.get()).filter(|fd| *fd >= 0),
            writable: record.flags.get() & 1 != 0,
            mapped: record.flags.get() & 2 != 0,
            command: rest.text(record.command.get() as usize)?,
        });
    }
    if !rest.is_empty() {
        return Err(DecodeError::Length);
    }
    Ok(refusal)
}
