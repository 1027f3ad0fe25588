//! Who has a file open, as far as `/proc` shows.
//!
//! It shows what processes have, but not everything a kernel can hold: what
//! is found here decides only where the exact proof (a lease) cannot be had,
//! and explains refusals.

use crate::table::{InodeId, LOCK_BASE};
use mapdirect_proto::Opener;
use mapdirect_sys::proc::{self, FdInfo};
use mapdirect_sys::{kcmp, proc_locks};
use rustix::fs::{AtFlags, StatxFlags};
use std::collections::HashMap;
use std::ops::Range;

/// A file whose openers are looked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) id: InodeId,
    /// Where it was last seen.
    pub(crate) path: &'a str,
    /// Descriptors whose description holds a lock on this byte are told
    /// apart.
    pub(crate) mark: Option<u64>,
}

/// What is known about who has a file open.
#[derive(Debug, Default)]
pub(crate) struct Openers {
    /// Everybody found, except through the marked description.
    pub(crate) others: Vec<Opener>,
    /// Descriptors of the marked description.
    pub(crate) marked: Vec<Opener>,
    /// Bytes of the file that are mapped so that they can be stored to.
    pub(crate) writable_mappings: Vec<(Opener, Range<u64>)>,
    /// The file is mapped executable as somebody's program.
    pub(crate) executing: Option<Opener>,
    /// Places a description could hide in that cannot be looked into.
    pub(crate) hidden: Vec<String>,
}

impl Openers {
    /// Somebody other than the marked description can write.
    pub(crate) fn has_writer(&self) -> bool {
        self.others.iter().any(|opener| opener.writable)
    }
}

/// Looks for everybody who has a file open.
pub(crate) fn openers(wanted: Wanted<'_>) -> Openers {
    openers_of(&[wanted]).pop().unwrap_or_default()
}

/// The same for many files with one look at every process; the answers stand
/// in the order of the questions.
pub(crate) fn openers_of(wanted: &[Wanted<'_>]) -> Vec<Openers> {
    let mut by_inode: HashMap<u64, Vec<usize>> = HashMap::new();
    for (at, file) in wanted.iter().enumerate() {
        by_inode.entry(file.id.inode).or_default().push(at);
    }
    let mut search = Search {
        wanted,
        by_inode,
        found: wanted.iter().map(|_| Openers::default()).collect(),
    };
    let own = std::process::id().cast_signed();
    for pid in proc::numbers_in("/proc").unwrap_or_default() {
        if pid != own {
            search.look_at_process(pid);
        }
    }
    search.look_into_the_kernel();
    search.found
}

struct Search<'a> {
    wanted: &'a [Wanted<'a>],
    by_inode: HashMap<u64, Vec<usize>>,
    found: Vec<Openers>,
}

impl Search<'_> {
    fn look_at_process(&mut self, pid: i32) {
        let mut process = Process { pid, command: None };
        // Threads may have descriptor tables of their own (CLONE_FILES left
        // out).
        let threads = proc::numbers_in(&format!("/proc/{pid}/task")).unwrap_or_default();
        let separate = threads
            .into_iter()
            .filter(|tid| *tid != pid && !kcmp::same_descriptors(pid, *tid));
        for table in std::iter::once(pid).chain(separate) {
            for fd in proc::numbers_in(&format!("/proc/{table}/fd")).unwrap_or_default() {
                self.look_at_descriptor(&mut process, table, fd);
            }
        }
        self.look_at_mappings(&mut process);
    }

    fn look_at_descriptor(&mut self, process: &mut Process, table: i32, fd: i32) {
        let link = format!("/proc/{table}/fd/{fd}");
        let Ok(target) = std::fs::read_link(&link) else {
            return;
        };
        let target = target.to_string_lossy();
        let is_file = target.starts_with('/');
        let is_ring = target.starts_with("anon_inode:[io_uring]");
        if !is_file && !is_ring && !target.starts_with("socket:") {
            return;
        }
        let Ok(text) = proc::read_task_file(table, &format!("fdinfo/{fd}")) else {
            return;
        };
        let info = proc::parse_fdinfo(&text);
        if is_file {
            self.note_descriptor(process, &link, fd, &info);
        } else {
            self.note_hiding_place(process, &info);
        }
    }

    fn note_descriptor(&mut self, process: &mut Process, link: &str, fd: i32, info: &FdInfo) {
        if info.is_path() {
            return;
        }
        for &at in self.by_inode.get(&info.inode).into_iter().flatten() {
            let wanted = self.wanted[at];
            if !is_inode(link, wanted.id) {
                continue;
            }
            let opener = Opener {
                pid: process.pid,
                fd: Some(fd),
                writable: info.is_writable(),
                mapped: false,
                command: process.command(),
            };
            let is_marked = wanted.mark.is_some_and(|byte| {
                // Neighbouring locks of one description are one.
                info.locks.iter().any(|lock| {
                    lock.kind == proc_locks::Kind::Description
                        && (LOCK_BASE..=byte).contains(&lock.start)
                        && lock.last.is_none_or(|last| last >= byte)
                })
            });
            let found = &mut self.found[at];
            if is_marked {
                found.marked.push(opener);
            } else {
                found.others.push(opener);
            }
        }
    }

    fn note_hiding_place(&mut self, process: &mut Process, info: &FdInfo) {
        let pid = process.pid;
        if info.in_flight > 0 {
            let what = format!(
                "{} descriptors on their way through a socket of pid {} ({})",
                info.in_flight,
                pid,
                process.command()
            );
            for found in &mut self.found {
                found.hidden.push(what.clone());
            }
        }
        for (wanted, found) in self.wanted.iter().zip(&mut self.found) {
            if info.registered.iter().any(|path| path == wanted.path) {
                found.hidden.push(format!(
                    "a file registered with an io_uring of pid {} ({})",
                    pid,
                    process.command()
                ));
            }
        }
    }

    fn look_at_mappings(&mut self, process: &mut Process) {
        let pid = process.pid;
        let Ok(maps) = proc::read_task_file(pid, "maps") else {
            return;
        };
        let mut mapped: HashMap<usize, Opener> = HashMap::new();
        for entry in maps.lines().filter_map(proc::parse_maps_line) {
            for &at in self.by_inode.get(&entry.inode).into_iter().flatten() {
                let id = self.wanted[at].id;
                let device = id.device();
                if (entry.major, entry.minor) != (device.major, device.minor) {
                    continue;
                }
                // A shared mapping that may not be written through now may
                // become so, if its description allows it: VmFlags tell.
                let writable =
                    entry.shared && (entry.writable || may_become_writable(pid, entry.start));
                let opener = mapped.entry(at).or_insert_with(|| Opener {
                    pid,
                    fd: None,
                    writable: false,
                    mapped: true,
                    command: process.command(),
                });
                opener.writable |= writable;
                let found = &mut self.found[at];
                if writable {
                    let bytes = entry.offset..entry.offset.saturating_add(entry.end - entry.start);
                    found.writable_mappings.push((opener.clone(), bytes));
                }
                if entry.executable && is_inode(&format!("/proc/{pid}/exe"), id) {
                    found.executing.get_or_insert_with(|| opener.clone());
                }
            }
        }
        for (at, opener) in mapped {
            self.found[at].others.push(opener);
        }
    }

    /// Users of the files inside the kernel that can be found.
    fn look_into_the_kernel(&mut self) {
        let blocks = std::fs::read_dir("/sys/block").into_iter().flatten();
        for entry in blocks.flatten() {
            let backing = entry.path().join("loop/backing_file");
            if let Ok(backing) = std::fs::read_to_string(backing) {
                let name = entry.file_name().to_string_lossy().into_owned();
                self.note_kernel_user(backing.trim_end(), &format!("loop device /dev/{name}"));
            }
        }
        let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
        for line in swaps.lines().skip(1) {
            if let Some(file) = line.split_ascii_whitespace().next() {
                self.note_kernel_user(file, "swap space (swapoff it first)");
            }
        }
    }

    fn note_kernel_user(&mut self, path: &str, user: &str) {
        for (wanted, found) in self.wanted.iter().zip(&mut self.found) {
            if path == wanted.path || is_inode(path, wanted.id) {
                found.others.push(Opener {
                    pid: 0,
                    fd: None,
                    writable: true,
                    mapped: false,
                    command: user.to_owned(),
                });
            }
        }
    }
}

/// A process, and its name once somebody wants to know.
struct Process {
    pid: i32,
    command: Option<String>,
}

impl Process {
    fn command(&mut self) -> String {
        let pid = self.pid;
        self.command
            .get_or_insert_with(|| proc::command(pid))
            .clone()
    }
}

/// Whether `link` leads to the inode, without asking a server behind a
/// network filesystem.
fn is_inode(link: &str, id: InodeId) -> bool {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(rustix::fs::CWD, link, flags, StatxFlags::INO).is_ok_and(|stat| {
        stat.stx_ino == id.inode
            && rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor) == id.dev
    })
}

/// Whether `mprotect(2)` could make the mapping at `start` writable (`mw` in
/// VmFlags). Yes if that cannot be told.
fn may_become_writable(pid: i32, start: u64) -> bool {
    let Ok(text) = proc::read_task_file(pid, "smaps") else {
        return true;
    };
    let head = format!("{start:08x}-");
    text.lines()
        .skip_while(|line| !line.starts_with(&head))
        .find_map(|line| line.strip_prefix("VmFlags:"))
        .is_none_or(|flags| flags.split_ascii_whitespace().any(|flag| flag == "mw"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn find(file: &std::fs::File) -> Openers {
        let stat = rustix::fs::fstat(file).unwrap();
        let id = InodeId {
            dev: stat.st_dev,
            inode: stat.st_ino,
        };
        openers(Wanted {
            id,
            path: &proc::path_of(file.as_fd()),
            mark: None,
        })
    }

    #[test]
    fn this_process_is_not_its_own_opener() {
        let found = find(&tempfile::tempfile().unwrap());
        assert!(found.others.is_empty(), "{found:?}");
    }

    #[test]
    fn a_child_with_the_file_open_is_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .stdin(file.reopen().unwrap())
            .spawn()
            .unwrap();
        let found = find(file.as_file());
        child.kill().unwrap();
        child.wait().unwrap();
        let [opener] = &found.others[..] else {
            panic!("{found:?}");
        };
        assert_eq!(opener.pid, child.id().cast_signed());
        assert_eq!((opener.fd, opener.writable), (Some(0), true));
    }
}
