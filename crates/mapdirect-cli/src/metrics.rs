//! The state of the guard as OpenMetrics text, for a collector.

use mapdirect::status::Status;
use mapdirect_sys::names::is_deceptive;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, openat, readlinkat, renameat, statat, unlinkat};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::Path;

/// What a family of samples is.
#[derive(Clone, Copy)]
enum Kind {
    Gauge,
    /// Its samples end in `_total`.
    Counter,
}

struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
        };
        let _ = writeln!(self.0, "# HELP mapdirect_{name} {help}");
        let _ = writeln!(self.0, "# TYPE mapdirect_{name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: u64) {
        let _ = write!(self.0, "mapdirect_{name}");
        if !labels.is_empty() {
            let labels: Vec<_> = labels
                .iter()
                .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)))
                .collect();
            let _ = write!(self.0, "{{{}}}", labels.join(","));
        }
        let _ = writeln!(self.0, " {value}");
    }

    /// A family with one sample.
    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, Kind::Gauge, help);
        self.sample(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, Kind::Counter, help);
        self.sample(&format!("{name}_total"), &[], value);
    }

    fn end(mut self) -> String {
        self.0.push_str("# EOF\n");
        self.0
    }
}

/// The value of a label. Names may contain anything, and are safe for a terminal
/// here.
fn escaped(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    for character in value.chars() {
        match character {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            other if is_deceptive(other) => text.push('\u{fffd}'),
            other => text.push(other),
        }
    }
    text
}

/// The metrics of a guard; `None` if no guard answers.
pub(crate) fn text(status: Option<&Status>) -> String {
    let mut text = Text(String::new());
    let up = u64::from(status.is_some());
    text.gauge("guard_up", "Whether a guard answers.", up);
    let Some(status) = status else {
        return text.end();
    };
    text.family("guard_gate", Kind::Gauge, "The gate in force.");
    text.sample("guard_gate", &[("gate", status.gate.name())], 1);
    text.gauge(
        "guard_uptime_seconds",
        "How long the guard has been running.",
        status.uptime,
    );
    text.gauge("guard_clients", "Connected clients.", status.clients.into());
    let pins = || status.files.iter().flat_map(|file| &file.pins);
    text.gauge("pins", "Pins.", pins().count() as u64);
    text.gauge(
        "pins_lost",
        "Pins that nothing keeps any more.",
        pins().filter(|pin| !pin.lost.is_empty()).count() as u64,
    );
    text.gauge(
        "pins_broken",
        "Pins whose blocks have changed.",
        pins().filter(|pin| pin.breaches > 0).count() as u64,
    );
    text.gauge(
        "pinned_files",
        "Files with pins.",
        status.files.len() as u64,
    );
    text.family(
        "pinned_bytes",
        Kind::Gauge,
        "Pinned bytes, by the state of their blocks.",
    );
    text.sample(
        "pinned_bytes",
        &[("state", "stable")],
        pins().map(|pin| pin.stable).sum(),
    );
    text.sample(
        "pinned_bytes",
        &[("state", "frozen")],
        pins().map(|pin| pin.frozen).sum(),
    );
    text.gauge(
        "armed_files",
        "Files that are armed.",
        status.armed.len() as u64,
    );
    if let Some(policy) = &status.policy {
        text.gauge("policy_rules", "Rules of the policy.", policy.rules.into());
        text.gauge(
            "policy_broken",
            "Whether the policy could not be read again, and stays as it was.",
            u64::from(!policy.error.is_empty()),
        );
    }
    text.counter(
        "events_judged",
        "Operations that the guard has judged or heard of.",
        status.judged,
    );
    text.family("refusals", Kind::Counter, "Refused operations.");
    for (operation, count) in &status.refused {
        text.sample("refusals_total", &[("operation", operation)], *count);
    }
    text.counter(
        "refusals_unrecorded",
        "Refusals without a record, because they came too fast.",
        status.unrecorded,
    );
    text.counter(
        "breaches",
        "Changes of pinned blocks that no gate refused.",
        status.breached,
    );
    text.family("file_pins", Kind::Gauge, "Pins of a file.");
    for file in &status.files {
        let (device, inode) = (file.device.to_string(), file.inode.to_string());
        let labels = [
            ("device", &*device),
            ("file", &file.path),
            ("inode", &inode),
        ];
        text.sample("file_pins", &labels, file.pins.len() as u64);
    }
    text.end()
}

/// Replaces a file at once, so that a collector never reads half of it. Whoever
/// may write to its directory may put links there: none of them is followed. The
/// way to the directory is: who may change that chooses where the file comes to be.
pub(crate) fn write(path: &Path, text: &str) -> std::io::Result<()> {
    let name = path.file_name().ok_or(Errno::ISDIR)?;
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let directory = rustix::fs::open(
        parent.unwrap_or(Path::new(".")),
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    require_no_device(&directory, name)?;
    let (new, file) = create_beside(&directory, name)?;
    let mut file = File::from(file);
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| Ok(renameat(&directory, &new, &directory, name)?));
    if written.is_err() {
        let _ = unlinkat(&directory, &new, AtFlags::empty());
    }
    written
}

/// Fails if that is no file but something to write to: what should go to `/dev/null`
/// or `/dev/stdout` must not take its place.
fn require_no_device(directory: &OwnedFd, name: &OsStr) -> std::io::Result<()> {
    let Ok(there) = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) else {
        return Ok(());
    };
    let kind = match FileType::from_raw_mode(there.st_mode) {
        FileType::RegularFile => return Ok(()),
        // Links that others have put there are replaced, and not followed.
        FileType::Symlink => match readlinkat(directory, name, Vec::new()) {
            Ok(target) if target.to_bytes().starts_with(b"/proc/") => "a link to a descriptor",
            _ => return Ok(()),
        },
        FileType::Directory => return Err(Errno::ISDIR.into()),
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        _ => "a device",
    };
    Err(std::io::Error::other(format!(
        "it is {kind}, and a file would take its place\nhelp: --metrics writes to stdout"
    )))
}

/// Creates a file with a name that is free.
fn create_beside(directory: &OwnedFd, name: &OsStr) -> std::io::Result<(OsString, OwnedFd)> {
    /// What was left when a process with this number was killed, or is in the
    /// way on purpose.
    const IN_THE_WAY: u32 = 16;
    for attempt in 0..IN_THE_WAY {
        // Collectors read names that end in .prom.
        let mut new = name.to_owned();
        new.push(format!(".{}-{attempt}", std::process::id()));
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat(directory, &new, flags, Mode::from_raw_mode(0o644)) {
            Ok(file) => return Ok((new, file)),
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(Errno::EXIST.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_label_ends_early() {
        assert_eq!(escaped("a\"b\\c\nd\x1be"), "a\\\"b\\\\c\\nd\u{fffd}e");
        // A terminal fence would write an escape here that OpenMetrics does not have.
        assert_eq!(escaped("a\u{202e}b\u{e5}"), "a\u{fffd}b\u{e5}");
        assert_eq!(
            text(None),
            "# HELP mapdirect_guard_up Whether a guard answers.\n\
             # TYPE mapdirect_guard_up gauge\nmapdirect_guard_up 0\n# EOF\n"
        );
    }

    #[test]
    fn a_file_is_replaced_at_once_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.prom");
        write(&path, "one").unwrap();
        write(&path, "two").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        assert!(write(&directory.path().join("no/a.prom"), "three").is_err());
    }

    #[test]
    fn what_is_no_file_stays() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let cwd = rustix::fs::CWD;
        rustix::fs::mknodat(cwd, at("fifo"), FileType::Fifo, Mode::from(0o600), 0).unwrap();
        std::os::unix::fs::symlink("/proc/self/fd/1", at("stdout")).unwrap();
        std::fs::create_dir(at("directory")).unwrap();
        for (name, words) in [
            ("fifo", "it is a FIFO"),
            ("stdout", "it is a link to a descriptor"),
            ("directory", "Is a directory"),
        ] {
            let before = std::fs::symlink_metadata(at(name)).unwrap().file_type();
            let error = write(&at(name), "one").unwrap_err().to_string();
            assert!(error.starts_with(words), "{error}");
            let after = std::fs::symlink_metadata(at(name)).unwrap().file_type();
            assert_eq!(before, after);
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 3);
    }

    #[test]
    fn links_in_the_directory_lead_nowhere() {
        let directory = tempfile::tempdir().unwrap();
        let other = directory.path().join("other");
        std::fs::write(&other, "untouched").unwrap();
        let path = directory.path().join("a.prom");
        let pid = std::process::id();
        for link in [
            "a.prom".to_owned(),
            format!("a.prom.{pid}-0"),
            format!("a.prom.{pid}-1"),
        ] {
            std::os::unix::fs::symlink(&other, directory.path().join(link)).unwrap();
        }
        write(&path, "one").unwrap();
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "untouched");
        assert!(std::fs::symlink_metadata(&path).unwrap().is_file());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one");
        // With all names taken nothing is written, and nothing removed.
        for attempt in 0..16 {
            let link = directory.path().join(format!("a.prom.{pid}-{attempt}"));
            let _ = std::os::unix::fs::symlink(&other, link);
        }
        assert!(write(&path, "two").is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one");
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "untouched");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 18);
    }
}
