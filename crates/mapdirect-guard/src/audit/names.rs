//! Finds out which name a pinned file has now.
//!
//! A path may lead through the directories of strangers, and through their FUSE
//! mounts. So whoever must not wait looks at what the kernel remembers
//! ([`glance`]), and everybody else runs [`find`] within a limit.

use super::few::Few;
use crate::bounded::Looking;
use crate::table::{InodeId, Watched};
use mapdirect_proto::{Name, NameState};
use mapdirect_sys::{Errno, names, proc};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::Duration;

/// How the kernel marks the path of a file that lost the name.
const DELETED: &str = " (deleted)";

/// A path as it is: the guard keeps one that is not UTF-8 quoted.
fn as_it_is(path: &str) -> OsString {
    let quoted = path.starts_with("$'/").then(|| names::unquoted(path));
    quoted.flatten().unwrap_or_else(|| OsString::from(path))
}

/// Whether a path leads to a file, or `None` if the kernel would have to ask
/// anybody. Waits for nobody.
pub(crate) fn glance(path: &str, id: InodeId) -> Option<bool> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let cached = ResolveFlags::CACHED;
    let file = rustix::fs::openat2(CWD, as_it_is(path), flags, Mode::empty(), cached).ok()?;
    let stat = rustix::fs::fstat(&file).ok()?;
    Some(InodeId::from(&stat) == id)
}

/// Whether a path leads to a file. Waits no longer than `limit`.
pub(super) fn leads(few: &Few, path: &Arc<str>, id: InodeId, limit: Duration) -> bool {
    // Paths on some filesystems are never answered from memory alone.
    glance(path, id).unwrap_or_else(|| {
        let path = Arc::clone(path);
        few.within(limit, move |_| leads_to(&path, id) == Ok(true))
            .unwrap_or(false)
    })
}

/// What is asked about a file. It consists of plain values, since the thread
/// that looks has none of the guard's descriptors.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    id: InodeId,
    /// The path by which it was pinned.
    path: Arc<str>,
    /// Whether that path led to the file once, as this process sees paths.
    led: bool,
    /// Whether no name of the file is left, if that is known.
    nameless: Option<bool>,
    /// The processes that have pinned it.
    holders: Vec<i32>,
}

impl Question {
    pub(crate) fn about(watched: &Watched) -> Self {
        let mut holders: Vec<i32> = watched.pins.load().iter().map(|pin| pin.pid).collect();
        holders.sort_unstable();
        holders.dedup();
        // Every one of them has the file's name.
        holders.truncate(8);
        // What a filesystem remembers is told by it without waiting.
        let nameless = watched.anchor().and_then(|path| {
            let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
            let stat = rustix::fs::statx(&*path, "", flags, StatxFlags::NLINK).ok()?;
            Some(stat.stx_nlink == 0)
        });
        Self {
            id: watched.id,
            path: Arc::clone(&watched.path),
            led: watched.path_led(),
            nameless,
            holders,
        }
    }

    /// The answer if nothing can be found out.
    pub(crate) fn unknown(&self) -> Name {
        let state = match self.nameless {
            Some(true) => NameState::DELETED,
            _ => NameState::UNKNOWN,
        };
        Name::new(bare(&self.path), "", state)
    }
}

/// Finds the names of files. Waits no longer than `limit` for all of them.
pub(super) fn find_all(few: &Few, questions: Vec<Question>, limit: Duration) -> Vec<Name> {
    let mut names: Vec<_> = questions.iter().map(at_once).collect();
    let open: Vec<_> = (0..names.len()).filter(|at| names[*at].is_none()).collect();
    if !open.is_empty() {
        let asked: Vec<_> = open.iter().map(|at| questions[*at].clone()).collect();
        let found = few.within(limit, move |looking| {
            let find = |question: &Question| find(question, looking);
            asked.iter().map(find).collect::<Vec<_>>()
        });
        for (at, name) in open.into_iter().zip(found.unwrap_or_default()) {
            names[at] = Some(name);
        }
    }
    let known = names.into_iter().zip(&questions);
    known
        .map(|(name, question)| name.unwrap_or_else(|| question.unknown()))
        .collect()
}

/// The name, if it is what it was.
fn at_once(question: &Question) -> Option<Name> {
    let leads = question.led && glance(&question.path, question.id) == Some(true);
    leads.then(|| Name::new(&*question.path, "", NameState::PRESENT))
}

/// Finds the name of a file. This may hang.
fn find(question: &Question, looking: &Looking) -> Name {
    let path = &*question.path;
    let is_it = |path: &str| leads_to(path, question.id);
    let state = match is_it(path) {
        Ok(true) => return Name::new(path, "", NameState::PRESENT),
        // In another mount namespace the path may lead to the file all the same.
        _ if !question.led => NameState::UNKNOWN,
        Ok(false) => NameState::REPLACED,
        Err(Errno::NOENT | Errno::NOTDIR) => NameState::MISSING,
        Err(_) => NameState::UNKNOWN,
    };
    let mut nameless = question.nameless == Some(true);
    let mut holders = question.holders.iter();
    let seen = holders.find_map(|pid| {
        // In the middle of execve(2) it cannot be looked at.
        looking.at(*pid).ok()?;
        name_of_holder(*pid, question.id)
    });
    if let Some(seen) = seen {
        nameless |= seen.links == Some(0);
        let now = names::name(&seen.path);
        let is_deleted = seen.path.as_bytes().ends_with(DELETED.as_bytes());
        if !nameless && now != bare(path) && !is_deleted {
            let state = match is_it(&now) {
                Ok(true) => state.and(NameState::PRESENT),
                _ => state,
            };
            return Name::new(now, path, state);
        }
        nameless |= is_deleted && seen.links.is_none();
    }
    if nameless {
        return Name::new(bare(path), "", state.and(NameState::DELETED));
    }
    Name::new(bare(path), "", state)
}

/// The path without the mark of a file that had lost its name already.
fn bare(path: &str) -> &str {
    path.strip_suffix(DELETED).unwrap_or(path)
}

fn leads_to(path: &str, id: InodeId) -> Result<bool, Errno> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let stat = rustix::fs::statx(CWD, as_it_is(path), flags, StatxFlags::INO)?;
    let dev = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
    Ok((dev, stat.stx_ino) == (id.dev, id.inode))
}

/// What a holder's link says.
struct Seen {
    path: OsString,
    /// How many names the file has, if that is known.
    links: Option<u32>,
}

/// The name of a file as a process has it, by a descriptor or by a mapping.
fn name_of_holder(pid: i32, id: InodeId) -> Option<Seen> {
    let directory = format!("/proc/{pid}/fd");
    for fd in proc::numbers_in(&directory).unwrap_or_default() {
        let link = format!("{directory}/{fd}");
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        let wanted = StatxFlags::INO | StatxFlags::NLINK;
        let Ok(stat) = rustix::fs::statx(CWD, &link, flags, wanted) else {
            continue;
        };
        let dev = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
        if (dev, stat.stx_ino) != (id.dev, id.inode) {
            continue;
        }
        let path = std::fs::read_link(&link).ok()?.into_os_string();
        // The file itself, on a mount that is attached nowhere.
        if path == "/" {
            continue;
        }
        return Some(Seen {
            path,
            links: Some(stat.stx_nlink),
        });
    }
    let (major, minor) = (rustix::fs::major(id.dev), rustix::fs::minor(id.dev));
    let maps = std::fs::read(format!("/proc/{pid}/maps")).ok()?;
    let line = maps.split(|byte| *byte == b'\n').find(|line| {
        proc::parse_maps_line(&String::from_utf8_lossy(line)).is_some_and(|entry| {
            (entry.major, entry.minor, entry.inode) == (major, minor, id.inode)
        })
    })?;
    let path = line
        .splitn(6, |byte| *byte == b' ')
        .nth(5)?
        .trim_ascii_start();
    let path = OsStr::from_bytes(&without_escapes(path)).to_owned();
    (path != "/").then_some(Seen { path, links: None })
}

/// A path of `maps`, where a newline is escaped, and a backslash is not.
fn without_escapes(path: &[u8]) -> Vec<u8> {
    let mut rest = path;
    let mut bytes = Vec::with_capacity(path.len());
    while let Some(byte) = rest.first() {
        if let Some(behind) = rest.strip_prefix(b"\\012") {
            bytes.push(b'\n');
            rest = behind;
        } else {
            bytes.push(*byte);
            rest = &rest[1..];
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(path: &std::path::Path, id: InodeId) -> Question {
        Question {
            id,
            path: Arc::from(path.to_str().unwrap()),
            led: true,
            nameless: None,
            holders: vec![std::process::id().cast_signed()],
        }
    }

    #[test]
    fn a_file_is_followed_from_name_to_name() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let file = std::fs::File::create(at("a")).unwrap();
        let id = InodeId::from(&rustix::fs::fstat(&file).unwrap());
        let asked = question(&at("a"), id);
        let now = || find_all(&Few::new(1), vec![asked.clone()], Duration::from_secs(5)).remove(0);
        let is = |name: &Name, path: &str, state: NameState| {
            assert_eq!(
                (name.path.as_str(), name.state),
                (at(path).to_str().unwrap(), state)
            );
        };
        is(&now(), "a", NameState::PRESENT);
        std::fs::rename(at("a"), at("b")).unwrap();
        is(&now(), "b", NameState::PRESENT.and(NameState::MISSING));
        assert_eq!(now().former, at("a").to_str().unwrap());
        std::fs::write(at("a"), b"another").unwrap();
        is(&now(), "b", NameState::PRESENT.and(NameState::REPLACED));
        std::fs::remove_file(at("b")).unwrap();
        is(&now(), "a", NameState::REPLACED.and(NameState::DELETED));
        std::fs::remove_file(at("a")).unwrap();
        is(&now(), "a", NameState::MISSING.and(NameState::DELETED));
        // A path that never led to the file says nothing.
        let elsewhere = Question {
            led: false,
            holders: Vec::new(),
            ..asked
        };
        let name = find_all(&Few::new(1), vec![elsewhere], Duration::from_secs(5)).remove(0);
        is(&name, "a", NameState::UNKNOWN);
        assert_eq!(glance(at("b").to_str().unwrap(), id), None);
        drop(file);
    }
}
