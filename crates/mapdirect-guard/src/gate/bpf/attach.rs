//! Attaches programs, and finds out whether the kernel can.

use super::directory::ENDING;
use super::load::{LoadError, failed, told};
use libbpf_rs::{Link, Object, ProgramAttachType, ProgramMut, ProgramType};
use std::path::Path;
use std::time::{Duration, Instant};

pub(super) const LINKS: &str = "link-";

pub(super) fn link_name(program: &str) -> String {
    format!("{LINKS}{program}")
}

/// Attaches those programs that are not attached, one after the other, and pins
/// their links.
pub(super) fn attach(object: &Object, directory: &Path, names: &[&str]) -> Result<(), LoadError> {
    for wanted in names {
        let path = directory.join(link_name(wanted));
        if path.exists() {
            continue;
        }
        let program = object.progs_mut().find(|program| program.name() == *wanted);
        let program = program.ok_or_else(|| failed("attaching", wanted))?;
        if !program.autoload() {
            // This kernel has no place for the program, and works without it.
            continue;
        }
        let mut link = attach_one(&program)?;
        link.pin(path)
            .map_err(|error| told("pinning a link", &error))?;
    }
    Ok(())
}

/// Attaches a program. The kernel detaches an earlier one only after a while,
/// and permits no new attachment before.
pub(super) fn attach_one(program: &ProgramMut<'_>) -> Result<Link, LoadError> {
    let begun = Instant::now();
    loop {
        let error = match program.attach_trace() {
            Ok(link) => return Ok(link),
            Err(error) => error,
        };
        if is_not_supported(&error) {
            return Err(LoadError::CannotAttach(place(program)));
        }
        // EBUSY has no error kind of its own.
        if error.kind() != libbpf_rs::ErrorKind::Other || begun.elapsed() >= ENDING {
            let name = program.name().to_string_lossy();
            return Err(told(&format!("attaching {name}"), &error));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether this is the kernel's own ENOTSUPP, for which libbpf has no kind: it
/// answers so where it has no way to call programs from functions, as on arm64
/// before 6.4.
fn is_not_supported(error: &libbpf_rs::Error) -> bool {
    format!("{error:#}").contains("os error 524")
}

/// What a program is attached to, in words.
fn place(program: &ProgramMut<'_>) -> &'static str {
    match (program.prog_type(), program.attach_type()) {
        (ProgramType::Lsm, _) => "security hooks",
        (_, ProgramAttachType::ModifyReturn) => "functions whose answers they change",
        (_, ProgramAttachType::TraceFexit) => "the ends of functions",
        _ => "functions",
    }
}

/// One program of each kind: they are attached to functions that are called
/// seldom, and judge by maps of their own, in which nothing is pinned.
const OF_EACH_KIND: [&str; 3] = ["inode_unlink", "note_fallocate", "end_fallocate"];

/// Attaches a program of each kind, and detaches it at once.
pub(super) fn try_each_kind(object: &Object) -> Result<(), LoadError> {
    for wanted in OF_EACH_KIND {
        let program = object.progs_mut().find(|program| program.name() == wanted);
        let program = program.ok_or_else(|| failed("attaching", wanted))?;
        drop(attach_one(&program)?);
    }
    Ok(())
}
