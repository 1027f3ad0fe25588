//! Sends records to the journal of systemd, with a field for each fact.
//!
//! The native protocol is one datagram with lines `NAME=value`. A value that
//! contains a newline comes as `NAME`, a newline, its length as 64 bits, and its
//! bytes (systemd's docs/JOURNAL_NATIVE_PROTOCOL.md). Nobody waits for the
//! journal: what it does not take at once is not sent, and the caller is told.

use mapdirect_proto::Record;
use mapdirect_proto::record::Event;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

/// Where the journal listens.
pub const SOCKET: &str = "/run/systemd/journal/socket";

/// A way to the journal.
#[derive(Debug)]
pub(crate) struct Journald {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Journald {
    /// Prepares to send to the journal at `path`; that it is not there yet, or
    /// starts again, does not matter.
    pub(crate) fn new(path: &Path) -> std::io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            path: path.to_owned(),
        })
    }

    /// Sends a record. Says whether the journal took it.
    pub(crate) fn send(&self, record: &Record, message: &str) -> bool {
        let entry = entry(record, message);
        self.socket.send_to(&entry, &self.path).is_ok()
    }
}

/// The bytes of an entry.
fn entry(record: &Record, message: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1024);
    let mut field = |name: &str, value: &str| {
        if value.is_empty() {
            return;
        }
        bytes.extend_from_slice(name.as_bytes());
        if value.contains('\n') {
            bytes.push(b'\n');
            bytes.extend_from_slice(&(value.len() as u64).to_le_bytes());
        } else {
            bytes.push(b'=');
        }
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(b'\n');
    };
    let number = |number: i64| {
        if number == 0 {
            String::new()
        } else {
            number.to_string()
        }
    };
    field("MESSAGE", message);
    // Warning for a refusal, critical for a breach.
    let is_breach = record.event == Event::Breach;
    field("PRIORITY", if is_breach { "2" } else { "4" });
    field("SYSLOG_IDENTIFIER", "mapdirect");
    field("MAPDIRECT_EVENT", record.event.name());
    field("MAPDIRECT_NUMBER", &record.number.to_string());
    field("MAPDIRECT_TIME", &record.time.to_string());
    field("MAPDIRECT_OPERATION", &record.operation);
    field("MAPDIRECT_CALL", &record.call);
    if let Some(range) = &record.range {
        field("MAPDIRECT_START", &range.start.to_string());
        if range.end != u64::MAX {
            field("MAPDIRECT_END", &range.end.to_string());
        }
    }
    field("MAPDIRECT_FILE", &record.name.path);
    field("MAPDIRECT_FILE_REMARK", &record.name.remark());
    field("MAPDIRECT_DEVICE", &record.device.to_string());
    field("MAPDIRECT_INODE", &record.inode.to_string());
    if record.pin != 0 {
        field("MAPDIRECT_PIN", &record.pin.to_string());
    }
    if let Some(owner) = &record.owner {
        field("MAPDIRECT_HOLDER_PID", &number(owner.pid.into()));
        field("MAPDIRECT_HOLDER_UID", &owner.uid.to_string());
        field("MAPDIRECT_HOLDER_COMMAND", &owner.command);
    }
    let actor = &record.actor;
    field("MAPDIRECT_PID", &number(actor.pid.into()));
    field("MAPDIRECT_TID", &number(actor.tid.into()));
    if let Some(uid) = actor.uid {
        field("MAPDIRECT_UID", &uid.to_string());
    }
    field("MAPDIRECT_COMMAND", &actor.command);
    field("MAPDIRECT_EXECUTABLE", &actor.executable);
    field("MAPDIRECT_CGROUP", &actor.cgroup);
    field("MAPDIRECT_GATE", record.gate.name());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use mapdirect_proto::{DeviceId, Gate, Name, NameState};

    #[test]
    fn an_entry_has_a_field_for_each_fact_and_no_value_makes_another() {
        let device = DeviceId { major: 7, minor: 0 };
        let mut record = Record::new(Event::Refusal, 12, Gate::Bpf, (device, 5));
        record.operation = String::from("write");
        record.range = Some(4096..u64::MAX);
        record.name = Name::new("/a\nMAPDIRECT_PIN=1", "", NameState::DELETED);
        record.actor.uid = Some(0);
        let entry = entry(&record, "refused");
        let text = String::from_utf8_lossy(&entry);
        assert!(text.starts_with("MESSAGE=refused\nPRIORITY=4\n"), "{text}");
        assert!(text.contains("\nMAPDIRECT_START=4096\n"));
        assert!(text.contains("\nMAPDIRECT_UID=0\n"));
        assert!(text.contains("\nMAPDIRECT_FILE_REMARK=deleted\n"));
        assert!(!text.contains("MAPDIRECT_END") && !text.contains("MAPDIRECT_PID"));
        let name = b"MAPDIRECT_FILE\n\x12\0\0\0\0\0\0\0/a\nMAPDIRECT_PIN=1\n";
        assert!(entry.windows(name.len()).any(|bytes| bytes == name));
    }

    #[test]
    fn nobody_waits_for_the_journal() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let journald = Journald::new(&path).unwrap();
        let device = DeviceId { major: 7, minor: 0 };
        let record = Record::new(Event::Breach, 12, Gate::Bpf, (device, 5));
        assert!(!journald.send(&record, "before there is a journal"));
        let journal = UnixDatagram::bind(&path).unwrap();
        let mut sent = 0;
        while journald.send(&record, "a breach") {
            sent += 1;
            assert!(sent < 100_000, "it never says that it is full");
        }
        assert!(sent > 0);
        let mut buffer = [0; 4096];
        let length = journal.recv(&mut buffer).unwrap();
        assert!(buffer[..length].starts_with(b"MESSAGE=a breach\nPRIORITY=2\n"));
    }
}
