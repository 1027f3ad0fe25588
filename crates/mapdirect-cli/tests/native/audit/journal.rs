//! Entries for the journal of systemd.

use super::{NOBODY, Refused, number, open_to_all};
use crate::world::{BINARY, World, open, pin, wait_until_free, written};
use mapdirect_testkit::Kind;
use mapdirect_testkit::process::{GuardProcess, ScratchDirectory};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

const SOCKET: &str = "/run/systemd/journal/socket";

/// The fields of an entry.
fn fields(mut entry: &[u8]) -> BTreeMap<String, String> {
    let mut fields = BTreeMap::new();
    while !entry.is_empty() {
        let end = entry.iter().position(|byte| *byte == b'\n').unwrap();
        let line = std::str::from_utf8(&entry[..end]).unwrap();
        entry = &entry[end + 1..];
        let (name, value) = match line.split_once('=') {
            Some((name, value)) => (name, value.to_owned()),
            None => {
                let length = usize::try_from(u64::from_le_bytes(entry[..8].try_into().unwrap()));
                let (value, rest) = entry[8..].split_at(length.unwrap());
                entry = rest.strip_prefix(b"\n").unwrap();
                (line, String::from_utf8(value.to_vec()).unwrap())
            }
        };
        fields.insert(name.to_owned(), value);
    }
    fields
}

/// A guard whose stderr is the journal sends an entry in place of a line.
pub fn journal(world: &World) {
    if Path::new(SOCKET).exists() {
        world.unavailable(String::from(
            "a place for a journal of one's own: systemd's is there",
        ));
        return;
    }
    std::fs::create_dir_all("/run/systemd/journal").unwrap();
    let journal = UnixDatagram::bind(SOCKET).unwrap();
    journal
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| heard(world, &journal)));
    std::fs::remove_file(SOCKET).unwrap();
    outcome.unwrap();
}

fn heard(world: &World, journal: &UnixDatagram) {
    let scripts = ScratchDirectory::new("journal").unwrap();
    let script = scripts.path().join("guard");
    // What systemd tells a service whose stderr is the journal.
    let text = format!(
        "#!/bin/sh\nJOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) exec {BINARY} \"$@\"\n"
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let guard = GuardProcess::start(&script).unwrap();
    let path = written(&world.disk(Kind::XFS), "audit-journal", 65536);
    open_to_all(&path);
    let pinned = pin(&guard.client(), &open(&path), 0..65536);
    let refused = Refused::by(NOBODY, &path);
    let mut buffer = vec![0; 65536];
    let length = journal.recv(&mut buffer).unwrap();
    let fields = fields(&buffer[..length]);
    let is = |name: &str, value: &str| assert_eq!(fields[name], value, "{name} of {fields:?}");
    is("PRIORITY", "4");
    is("MAPDIRECT_EVENT", "refusal");
    is("MAPDIRECT_PIN", &number(&guard, &path).to_string());
    is("MAPDIRECT_PID", &refused.pid().to_string());
    is("MAPDIRECT_UID", "65534");
    is("MAPDIRECT_COMMAND", "bash");
    is("MAPDIRECT_FILE", path.to_str().unwrap());
    assert!(fields["MAPDIRECT_OPERATION"].contains("truncate"));
    assert!(fields["MESSAGE"].starts_with("refused "), "{fields:?}");
    assert!(!guard.said().contains("refused"), "{}", guard.said());
    drop((pinned, refused));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}
