//! How the state of a guard travels in a sealed memory file: as a sequence of
//! records. Each record begins with its length and kind, so a reader can skip
//! records that it does not know.

use crate::extent::DeviceId;
use crate::notice::{Breach, BreachRecord};
use crate::record::NameState;
use crate::reply::Gate;
use crate::request::{Flags, Who};
use crate::status::{
    Armed, Delegated, FileStatus, Holder, PinStatus, PolicyStatus, RefusedOperation, Status,
};
use crate::wire::{DecodeError, Reader, clipped, wire_len};
use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The most bytes of a status that a reader accepts.
pub const MAX_STATUS: usize = 64 << 20;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RecordHeader {
    /// The length of the record, including this header and the text.
    length: U32,
    kind: U16,
    /// The length of the fixed part.
    fixed: U16,
}

mod kind {
    pub(super) const GUARD: u16 = 1;
    pub(super) const REFUSED: u16 = 2;
    pub(super) const FILE: u16 = 3;
    pub(super) const PIN: u16 = 4;
    pub(super) const HOLDER: u16 = 5;
    pub(super) const RECENT: u16 = 6;
    pub(super) const BREACH: u16 = 7;
    pub(super) const DELEGATED: u16 = 8;
    pub(super) const ARMED: u16 = 9;
    pub(super) const POLICY: u16 = 10;
    pub(super) const NAME: u16 = 11;
    pub(super) const UNRECORDED: u16 = 12;
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct GuardRecord {
    gate: U32,
    pid: I32,
    uptime: U64,
    clients: U32,
    reserved: U32,
    judged: U64,
    breached: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RefusedRecord {
    count: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct FileRecord {
    major: U32,
    minor: U32,
    inode: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct PinRecord {
    pin: U64,
    start: U64,
    end: U64,
    flags: U32,
    pid: I32,
    uid: U32,
    reserved: U32,
    age: U64,
    stable: U64,
    frozen: U64,
    breaches: U64,
}

/// Belongs to the file before it; the text is the former path.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct NameRecord {
    state: U32,
    reserved: U32,
}

/// Belongs to the pin before it; the text is the rule.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct DelegatedRecord {
    /// `u64::MAX` if there is no limit.
    left: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct ArmedRecord {
    major: U32,
    minor: U32,
    inode: U64,
    kind: U32,
    id: U32,
    start: U64,
    end: U64,
    left: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct PolicyRecord {
    rules: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct HolderRecord {
    pid: I32,
    descriptors: U32,
    mapped: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RecentRecord {
    time: U64,
    tid: I32,
    /// The length of the command, which is the first text.
    command: U32,
    major: U32,
    minor: U32,
    inode: U64,
    /// `u64::MAX` if there is no range.
    start: U64,
    end: U64,
    /// The length of the operation; the path is the rest of the text.
    operation: U32,
}

const MAX_TEXT: usize = 4096;

fn put(bytes: &mut Vec<u8>, kind: u16, fixed: &(impl IntoBytes + Immutable), texts: &[&[u8]]) {
    let fixed = fixed.as_bytes();
    let header = size_of::<RecordHeader>();
    let text: usize = texts.iter().map(|text| text.len()).sum();
    let record = RecordHeader {
        length: wire_len(header + fixed.len() + text),
        kind: kind.into(),
        fixed: u16::try_from(fixed.len()).unwrap_or(u16::MAX).into(),
    };
    bytes.extend_from_slice(record.as_bytes());
    bytes.extend_from_slice(fixed);
    for text in texts {
        bytes.extend_from_slice(text);
    }
}

/// Writes the state of a guard as records, one after the other.
#[must_use]
pub fn encode_status(status: &Status) -> Vec<u8> {
    status.encode()
}

/// Reads what [`encode_status`] wrote, and skips records of unknown kinds.
///
/// # Errors
///
/// [`DecodeError`] for anything else.
pub fn decode_status(bytes: &[u8]) -> Result<Status, DecodeError> {
    Status::decode(bytes)
}

impl Status {
    /// The state as bytes.
    #[must_use]
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let guard = GuardRecord {
            gate: self.gate.number().into(),
            pid: self.pid.into(),
            uptime: self.uptime.into(),
            clients: self.clients.into(),
            reserved: 0.into(),
            judged: self.judged.into(),
            breached: self.breached.into(),
        };
        put(&mut bytes, kind::GUARD, &guard, &[]);
        for (name, count) in &self.refused {
            let record = RefusedRecord {
                count: (*count).into(),
            };
            put(
                &mut bytes,
                kind::REFUSED,
                &record,
                &[clipped(name, MAX_TEXT).as_bytes()],
            );
        }
        for file in &self.files {
            let record = FileRecord {
                major: file.device.major.into(),
                minor: file.device.minor.into(),
                inode: file.inode.into(),
            };
            put(
                &mut bytes,
                kind::FILE,
                &record,
                &[clipped(&file.path, MAX_TEXT).as_bytes()],
            );
            if (&*file.former, file.name_state) != ("", NameState::UNKNOWN) {
                let name = NameRecord {
                    state: file.name_state.bits().into(),
                    reserved: 0.into(),
                };
                let former = clipped(&file.former, MAX_TEXT);
                put(&mut bytes, kind::NAME, &name, &[former.as_bytes()]);
            }
            for pin in &file.pins {
                let lost = clipped(&pin.lost, MAX_TEXT);
                put(&mut bytes, kind::PIN, &pin_record(pin), &[lost.as_bytes()]);
                if let Some(delegated) = &pin.delegated {
                    let record = DelegatedRecord {
                        left: delegated.left.unwrap_or(u64::MAX).into(),
                    };
                    let rule = clipped(&delegated.rule, MAX_TEXT);
                    put(&mut bytes, kind::DELEGATED, &record, &[rule.as_bytes()]);
                }
            }
            for holder in &file.holders {
                let record = HolderRecord {
                    pid: holder.pid.into(),
                    descriptors: holder.descriptors.into(),
                    mapped: holder.mapped.into(),
                };
                let command = clipped(&holder.command, MAX_TEXT);
                put(&mut bytes, kind::HOLDER, &record, &[command.as_bytes()]);
            }
        }
        for refused in &self.recent {
            let command = clipped(&refused.command, MAX_TEXT);
            let range = refused.range.clone().unwrap_or(u64::MAX..u64::MAX);
            let operation = clipped(&refused.operation, MAX_TEXT);
            let path = clipped(&refused.path, MAX_TEXT);
            let record = RecentRecord {
                time: refused.time.into(),
                tid: refused.tid.into(),
                command: wire_len(command.len()),
                major: refused.device.major.into(),
                minor: refused.device.minor.into(),
                inode: refused.inode.into(),
                start: range.start.into(),
                end: range.end.into(),
                operation: wire_len(operation.len()),
            };
            put(
                &mut bytes,
                kind::RECENT,
                &record,
                &[command, operation, path].map(str::as_bytes),
            );
        }
        for breach in &self.breaches {
            let (record, tail) = breach.to_wire();
            put(&mut bytes, kind::BREACH, &record, &[&tail]);
        }
        if let Some(policy) = &self.policy {
            let record = PolicyRecord {
                rules: policy.rules.into(),
                reserved: 0.into(),
            };
            let error = clipped(&policy.error, MAX_TEXT);
            put(&mut bytes, kind::POLICY, &record, &[error.as_bytes()]);
        }
        for armed in &self.armed {
            let (who, id) = armed.who.to_wire();
            let record = ArmedRecord {
                major: armed.device.major.into(),
                minor: armed.device.minor.into(),
                inode: armed.inode.into(),
                kind: who.into(),
                id: id.into(),
                start: armed.range.start.into(),
                end: armed.range.end.into(),
                left: armed.left.into(),
            };
            let path = clipped(&armed.path, MAX_TEXT);
            put(&mut bytes, kind::ARMED, &record, &[path.as_bytes()]);
        }
        if self.unrecorded > 0 {
            let record = RefusedRecord {
                count: self.unrecorded.into(),
            };
            put(&mut bytes, kind::UNRECORDED, &record, &[]);
        }
        bytes
    }

    /// Reads what [`encode`](Self::encode) wrote, and skips records of unknown
    /// kinds.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] for anything else.
    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes);
        let mut status = Self {
            gate: Gate::Other(0),
            pid: 0,
            uptime: 0,
            clients: 0,
            judged: 0,
            refused: Vec::new(),
            files: Vec::new(),
            recent: Vec::new(),
            breached: 0,
            breaches: Vec::new(),
            policy: None,
            armed: Vec::new(),
            unrecorded: 0,
        };
        while !reader.is_empty() {
            let header: RecordHeader = reader.record()?;
            let length = (header.length.get() as usize)
                .checked_sub(size_of::<RecordHeader>())
                .ok_or(DecodeError::Length)?;
            let body = Reader::new(reader.take(length)?);
            status.take(header.kind.get(), header.fixed.get().into(), body)?;
        }
        Ok(status)
    }

    fn take(&mut self, kind: u16, fixed: usize, mut body: Reader<'_>) -> Result<(), DecodeError> {
        match kind {
            kind::GUARD => {
                let record: GuardRecord = body.extensible(fixed)?;
                self.gate = Gate::from_number(record.gate.get());
                self.pid = record.pid.get();
                self.uptime = record.uptime.get();
                self.clients = record.clients.get();
                self.judged = record.judged.get();
                self.breached = record.breached.get();
            }
            kind::REFUSED => {
                let record: RefusedRecord = body.extensible(fixed)?;
                let name = body.text(body.remaining())?;
                self.refused.push((name, record.count.get()));
            }
            kind::FILE => {
                let record: FileRecord = body.extensible(fixed)?;
                self.files.push(FileStatus {
                    device: DeviceId {
                        major: record.major.get(),
                        minor: record.minor.get(),
                    },
                    inode: record.inode.get(),
                    path: body.text(body.remaining())?,
                    former: String::new(),
                    name_state: NameState::UNKNOWN,
                    pins: Vec::new(),
                    holders: Vec::new(),
                });
            }
            kind::NAME => {
                let record: NameRecord = body.extensible(fixed)?;
                let file = self.files.last_mut().ok_or(DecodeError::Value("file"))?;
                file.former = body.text(body.remaining())?;
                file.name_state = NameState::from_known_bits(record.state.get());
            }
            kind::UNRECORDED => {
                let record: RefusedRecord = body.extensible(fixed)?;
                self.unrecorded = record.count.get();
            }
            kind::PIN => {
                let record: PinRecord = body.extensible(fixed)?;
                let file = self.files.last_mut().ok_or(DecodeError::Value("file"))?;
                file.pins.push(PinStatus {
                    pin: record.pin.get(),
                    range: record.start.get()..record.end.get(),
                    flags: Flags::from_known_bits(record.flags.get()),
                    pid: record.pid.get(),
                    uid: record.uid.get(),
                    age: record.age.get(),
                    stable: record.stable.get(),
                    frozen: record.frozen.get(),
                    breaches: record.breaches.get(),
                    lost: body.text(body.remaining())?,
                    delegated: None,
                });
            }
            kind::DELEGATED => {
                let record: DelegatedRecord = body.extensible(fixed)?;
                let file = self.files.last_mut().ok_or(DecodeError::Value("file"))?;
                let pin = file.pins.last_mut().ok_or(DecodeError::Value("pin"))?;
                pin.delegated = Some(Delegated {
                    rule: body.text(body.remaining())?,
                    left: Some(record.left.get()).filter(|left| *left != u64::MAX),
                });
            }
            kind::POLICY => {
                let record: PolicyRecord = body.extensible(fixed)?;
                self.policy = Some(PolicyStatus {
                    rules: record.rules.get(),
                    error: body.text(body.remaining())?,
                });
            }
            kind::ARMED => {
                let record: ArmedRecord = body.extensible(fixed)?;
                self.armed.push(Armed {
                    device: DeviceId {
                        major: record.major.get(),
                        minor: record.minor.get(),
                    },
                    inode: record.inode.get(),
                    who: Who::from_wire(record.kind.get(), record.id.get())?,
                    range: record.start.get()..record.end.get(),
                    left: record.left.get(),
                    path: body.text(body.remaining())?,
                });
            }
            kind::HOLDER => {
                let record: HolderRecord = body.extensible(fixed)?;
                let file = self.files.last_mut().ok_or(DecodeError::Value("file"))?;
                file.holders.push(Holder {
                    pid: record.pid.get(),
                    command: body.text(body.remaining())?,
                    mapped: record.mapped.get(),
                    descriptors: record.descriptors.get(),
                });
            }
            kind::RECENT => {
                let record: RecentRecord = body.extensible(fixed)?;
                let start = record.start.get();
                self.recent.push(RefusedOperation {
                    time: record.time.get(),
                    tid: record.tid.get(),
                    command: body.text(record.command.get() as usize)?,
                    operation: body.text(record.operation.get() as usize)?,
                    path: body.text(body.remaining())?,
                    device: DeviceId {
                        major: record.major.get(),
                        minor: record.minor.get(),
                    },
                    inode: record.inode.get(),
                    range: (start != u64::MAX).then(|| start..record.end.get()),
                });
            }
            kind::BREACH => {
                let record: BreachRecord = body.extensible(fixed)?;
                self.breaches.push(Breach::from_wire(&record, &mut body)?);
            }
            _ => {}
        }
        Ok(())
    }
}

fn pin_record(pin: &PinStatus) -> PinRecord {
    PinRecord {
        pin: pin.pin.into(),
        start: pin.range.start.into(),
        end: pin.range.end.into(),
        flags: pin.flags.bits().into(),
        pid: pin.pid.into(),
        uid: pin.uid.into(),
        reserved: 0.into(),
        age: pin.age.into(),
        stable: pin.stable.into(),
        frozen: pin.frozen.into(),
        breaches: pin.breaches.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cause, Extent, ExtentState};
    use proptest::prelude::*;

    fn status() -> Status {
        Status {
            gate: Gate::Fanotify,
            pid: 12,
            uptime: 34,
            clients: 5,
            judged: 600,
            refused: vec![("truncate".into(), 3), ("open-write".into(), 1)],
            files: vec![FileStatus {
                device: DeviceId { major: 7, minor: 0 },
                inode: 131,
                path: "/mnt/å b".into(),
                former: "/mnt/a".into(),
                name_state: NameState::PRESENT,
                pins: vec![PinStatus {
                    pin: 9,
                    range: 4096..8192,
                    flags: Flags::MAP | Flags::CACHED,
                    pid: 77,
                    uid: 1000,
                    age: 2,
                    stable: 4096,
                    frozen: 0,
                    breaches: 2,
                    lost: "the gate was taken away".into(),
                    delegated: Some(Delegated {
                        rule: "databases".into(),
                        left: Some(17),
                    }),
                }],
                holders: vec![Holder {
                    pid: 77,
                    command: "db".into(),
                    mapped: 4096,
                    descriptors: 1,
                }],
            }],
            recent: vec![RefusedOperation {
                time: 1,
                tid: 80,
                command: "dd".into(),
                operation: "open-write".into(),
                device: DeviceId { major: 7, minor: 0 },
                inode: 131,
                path: "/mnt/å b".into(),
                range: None,
            }],
            breached: 2,
            breaches: vec![breach()],
            policy: Some(PolicyStatus {
                rules: 3,
                error: "policy.toml:4:1: unknown field `path`".into(),
            }),
            armed: vec![Armed {
                device: DeviceId { major: 7, minor: 0 },
                inode: 132,
                path: "/mnt/b".into(),
                who: Who::Group(5),
                range: 0..u64::MAX,
                left: 59,
            }],
            unrecorded: 7,
        }
    }

    fn breach() -> Breach {
        let device = DeviceId { major: 7, minor: 0 };
        let hole = [Extent::new(4096, None, 4096, ExtentState::Hole)];
        let written = [Extent::new(4096, Some(0), 4096, ExtentState::Written)];
        let range = 4096..8192;
        Breach::new(9, (device, 131), "/mnt/å b", 5, range, (&written, &hole)).caused_by(Some(
            Cause::new(80, "truncate", "truncate through an overlay"),
        ))
    }

    #[test]
    fn a_status_survives() {
        assert_eq!(Status::decode(&status().encode()), Ok(status()));
    }

    #[test]
    fn unknown_records_are_skipped() {
        let mut bytes = status().encode();
        put(&mut bytes, 999, &[1u8, 2, 3], &[b"whatever"]);
        assert_eq!(Status::decode(&bytes), Ok(status()));
    }

    proptest! {
        #[test]
        fn a_changed_byte_never_upsets_the_decoder(
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = status().encode();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = Status::decode(&bytes);
            let _ = Status::decode(&bytes[..cut.index(bytes.len())]);
        }
    }
}
