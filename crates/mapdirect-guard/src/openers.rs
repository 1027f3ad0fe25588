//! Who has a file open, as far as `/proc` shows.
//!
//! It shows what processes have, but not everything a kernel can hold: what
//! is found here decides only where the exact proof (a lease) cannot be had,
//! and explains refusals.

use crate::bounded::{self, Looking, within};
use crate::table::{InodeId, LOCK_BASE};
use mapdirect_proto::Opener;
use mapdirect_sys::proc::{self, FdInfo};
use mapdirect_sys::{kcmp, proc_locks};
use rustix::fs::{AtFlags, StatxFlags};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

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
    /// Some process could not be looked at, nor what it maps.
    pub(crate) unseen: bool,
}

impl Openers {
    /// Somebody other than the marked description can write.
    pub(crate) fn has_writer(&self) -> bool {
        self.others.iter().any(|opener| opener.writable)
    }
}

/// How long to look where nobody's patience says.
const LIMIT: Duration = Duration::from_secs(2);
/// How often to ask again what a busy io_uring has registered, and to wait for
/// what is on its way through sockets.
const TRIES: u32 = 10;

/// Looks for everybody who has a file open.
pub(crate) fn openers(wanted: Wanted<'_>) -> Openers {
    openers_before(wanted, Instant::now() + LIMIT)
}

/// The same for somebody who is patient until `deadline`.
pub(crate) fn openers_before(wanted: Wanted<'_>, deadline: Instant) -> Openers {
    look_for(&[wanted], bounded::limit(deadline))
        .pop()
        .unwrap_or_default()
}

/// The same for many files with one look at every process; the answers stand
/// in the order of the questions.
pub(crate) fn openers_of(wanted: &[Wanted<'_>]) -> Vec<Openers> {
    look_for(wanted, LIMIT)
}

fn look_for(wanted: &[Wanted<'_>], limit: Duration) -> Vec<Openers> {
    let search = Search::of(wanted);
    let shared = Arc::clone(&search.found);
    let looked = within(limit, move |looking| search.run(looking));
    let mut found = std::mem::take(&mut *shared.lock().unwrap_or_else(PoisonError::into_inner));
    if let Err(stuck) = looked {
        // What was found until then is true, but not all.
        for found in &mut found {
            found.hidden.push(stuck.obstacle());
        }
    }
    found
}

/// What a search owns: it may outlive who asked for it.
struct Search {
    wanted: Vec<Sought>,
    by_inode: HashMap<u64, Vec<usize>>,
    /// Taken away from a search that took too long.
    found: Arc<Mutex<Vec<Openers>>>,
}

/// [`Wanted`], owned.
struct Sought {
    id: InodeId,
    path: String,
    mark: Option<u64>,
}

impl Search {
    fn of(wanted: &[Wanted<'_>]) -> Self {
        let mut by_inode: HashMap<u64, Vec<usize>> = HashMap::new();
        for (at, file) in wanted.iter().enumerate() {
            by_inode.entry(file.id.inode).or_default().push(at);
        }
        let found = wanted.iter().map(|_| Openers::default()).collect();
        let sought = wanted.iter().map(|file| Sought {
            id: file.id,
            path: file.path.to_owned(),
            mark: file.mark,
        });
        Self {
            wanted: sought.collect(),
            by_inode,
            found: Arc::new(Mutex::new(found)),
        }
    }

    fn run(&self, looking: &Looking) {
        let own = std::process::id().cast_signed();
        for pid in proc::numbers_in("/proc").unwrap_or_default() {
            if pid == own {
                continue;
            }
            match looking.at(pid) {
                Ok(()) => self.look_at_process(pid),
                Err(stuck) => {
                    self.hide(&stuck.obstacle());
                    for at in 0..self.wanted.len() {
                        self.note(at, |found| found.unseen = true);
                    }
                }
            }
        }
        self.look_into_the_kernel();
    }

    /// Notes something about a file; nothing here waits for a process.
    fn note(&self, at: usize, add: impl FnOnce(&mut Openers)) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = found.get_mut(at) {
            add(found);
        }
    }

    /// Any of the files may hide in `place`.
    fn hide(&self, place: &str) {
        for at in 0..self.wanted.len() {
            self.note(at, |found| found.hidden.push(place.to_owned()));
        }
    }

    fn look_at_process(&self, pid: i32) {
        let mut process = Process {
            pid,
            threads: proc::numbers_in(&format!("/proc/{pid}/task")).unwrap_or_default(),
            command: None,
        };
        // What is on its way through a socket is received in a moment, and
        // then it is in a table that was looked at before: look again.
        for _ in 1..TRIES {
            if self.look_at_descriptors(&mut process) == 0 {
                return self.look_at_mappings(&mut process);
            }
            self.forget(pid);
            std::thread::sleep(Duration::from_millis(2));
        }
        let in_flight = self.look_at_descriptors(&mut process);
        if in_flight > 0 {
            self.hide(&format!(
                "{in_flight} descriptors on their way through sockets of pid {pid} ({})",
                process.command()
            ));
        }
        self.look_at_mappings(&mut process);
    }

    /// Returns how many are on their way through its sockets.
    fn look_at_descriptors(&self, process: &mut Process) -> u64 {
        let mut in_flight = 0;
        for table in process.descriptor_tables() {
            for fd in proc::numbers_in(&format!("/proc/{table}/fd")).unwrap_or_default() {
                in_flight += self.look_at_descriptor(process, table, fd);
            }
        }
        in_flight
    }

    /// Forgets the descriptors of a process.
    fn forget(&self, pid: i32) {
        for at in 0..self.wanted.len() {
            self.note(at, |found| {
                found.others.retain(|opener| opener.pid != pid);
                found.marked.retain(|opener| opener.pid != pid);
            });
        }
    }

    /// Returns how many others are on their way through it.
    fn look_at_descriptor(&self, process: &mut Process, table: i32, fd: i32) -> u64 {
        let link = format!("/proc/{table}/fd/{fd}");
        let Ok(target) = std::fs::read_link(&link) else {
            return 0;
        };
        let target = target.to_string_lossy();
        let is_file = target.starts_with('/');
        let is_ring = target.starts_with("anon_inode:[io_uring]");
        if !is_file && !is_ring && !target.starts_with("socket:") {
            return 0;
        }
        let Ok(text) = proc::read_task_file(table, &format!("fdinfo/{fd}")) else {
            return 0;
        };
        let info = proc::parse_fdinfo(&text);
        let in_flight = info.in_flight;
        if is_file {
            self.note_descriptor(process, &link, fd, &info);
        } else if is_ring {
            self.look_into_ring(process, table, fd, info);
        }
        in_flight
    }

    fn note_descriptor(&self, process: &mut Process, link: &str, fd: i32, info: &FdInfo) {
        if info.is_path() {
            return;
        }
        for &at in self.by_inode.get(&info.inode).into_iter().flatten() {
            let wanted = &self.wanted[at];
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
            self.note(at, |found| {
                if is_marked {
                    found.marked.push(opener);
                } else {
                    found.others.push(opener);
                }
            });
        }
    }

    /// What an io_uring has registered is told by name only. A name proves
    /// nothing about a file of the same filesystem: it may be another link, or
    /// one that somebody else has by now.
    fn look_into_ring(&self, process: &mut Process, table: i32, fd: i32, mut info: FdInfo) {
        // While somebody submits, the kernel leaves the files out.
        for _ in 1..TRIES {
            if info.tells_registered() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
            let Ok(text) = proc::read_task_file(table, &format!("fdinfo/{fd}")) else {
                // It is gone.
                return;
            };
            info = proc::parse_fdinfo(&text);
        }
        let pid = process.pid;
        let ring = format!("io_uring {fd} of pid {pid} ({})", process.command());
        if !info.tells_registered() {
            self.hide(&format!("{ring}, which does not tell what it has open"));
            return;
        }
        // What is no file of a mounted filesystem has a name without a slash.
        for path in info.registered.iter().filter(|path| path.starts_with('/')) {
            let device = device_behind(pid, path);
            for (at, wanted) in self.wanted.iter().enumerate() {
                if device.is_none_or(|device| device == wanted.id.dev) || *path == wanted.path {
                    self.note(at, |found| {
                        found.hidden.push(format!(
                            "a file registered with {ring}, last seen at {}",
                            proc::printable(path)
                        ));
                    });
                }
            }
        }
    }

    fn look_at_mappings(&self, process: &mut Process) {
        let pid = process.pid;
        let Some((tid, maps)) = process.maps() else {
            return;
        };
        let mut mapped: HashMap<usize, Opener> = HashMap::new();
        // Long to read: once at most.
        let mut fixed = None;
        for entry in maps.lines().filter_map(proc::parse_maps_line) {
            for &at in self.by_inode.get(&entry.inode).into_iter().flatten() {
                let id = self.wanted[at].id;
                let device = id.device();
                if (entry.major, entry.minor) != (device.major, device.minor) {
                    continue;
                }
                // A shared mapping that may not be written through now may
                // become so, if its description allows it: VmFlags tell.
                let writable = entry.shared
                    && (entry.writable
                        || !fixed
                            .get_or_insert_with(|| never_writable(tid))
                            .contains(&entry.start));
                let opener = mapped.entry(at).or_insert_with(|| Opener {
                    pid,
                    fd: None,
                    writable: false,
                    mapped: true,
                    command: process.command(),
                });
                opener.writable |= writable;
                if writable {
                    let bytes = entry.offset..entry.offset.saturating_add(entry.end - entry.start);
                    let one = (opener.clone(), bytes);
                    self.note(at, |found| found.writable_mappings.push(one));
                }
                if entry.executable && is_inode(&format!("/proc/{tid}/exe"), id) {
                    self.note(at, |found| {
                        found.executing.get_or_insert_with(|| opener.clone());
                    });
                }
            }
        }
        for (at, opener) in mapped {
            self.note(at, |found| found.others.push(opener));
        }
    }

    /// Users of the files inside the kernel that can be found.
    fn look_into_the_kernel(&self) {
        for (path, user) in all_kernel_users() {
            for (at, wanted) in self.wanted.iter().enumerate() {
                if path == wanted.path || is_inode(&path, wanted.id) {
                    self.note(at, |found| found.others.push(kernel_user(&user)));
                }
            }
        }
    }
}

/// Users of one file inside the kernel that can be found.
pub(crate) fn kernel_users(id: InodeId, known_path: &str) -> Vec<Opener> {
    all_kernel_users()
        .into_iter()
        .filter(|(path, _)| path == known_path || is_inode(path, id))
        .map(|(_, user)| kernel_user(&user))
        .collect()
}

fn kernel_user(user: &str) -> Opener {
    Opener {
        pid: 0,
        fd: None,
        writable: true,
        mapped: false,
        command: user.to_owned(),
    }
}

/// What the kernel itself has open, by path, and what for.
fn all_kernel_users() -> Vec<(String, String)> {
    let mut users = Vec::new();
    let blocks = std::fs::read_dir("/sys/block").into_iter().flatten();
    for entry in blocks.flatten() {
        let backing = entry.path().join("loop/backing_file");
        if let Ok(backing) = std::fs::read_to_string(backing) {
            let name = entry.file_name().to_string_lossy().into_owned();
            users.push((
                backing.trim_end().to_owned(),
                format!("loop device /dev/{name}"),
            ));
        }
    }
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    for line in swaps.lines().skip(1) {
        if let Some(file) = line.split_ascii_whitespace().next() {
            users.push((
                file.to_owned(),
                String::from("swap space (swapoff it first)"),
            ));
        }
    }
    users
}

/// A process, and its name once somebody wants to know.
struct Process {
    pid: i32,
    threads: Vec<i32>,
    command: Option<String>,
}

impl Process {
    fn command(&mut self) -> String {
        let pid = self.pid;
        self.command
            .get_or_insert_with(|| proc::command(pid))
            .clone()
    }

    /// Threads whose tables of descriptors are all there are: they may have
    /// some of their own (`CLONE_FILES` left out). The first thread may have
    /// ended before the others, and has none then.
    fn descriptor_tables(&self) -> Vec<i32> {
        let mut tables = vec![self.pid];
        let mut last = self.pid;
        for &tid in self.threads.iter().filter(|tid| **tid != self.pid) {
            let is_known = [self.pid, last]
                .into_iter()
                .any(|known| kcmp::same_descriptors(known, tid));
            if !is_known {
                tables.push(tid);
                last = tid;
            }
        }
        tables
    }

    /// What is mapped, and a thread it can be read of. All threads of a
    /// process have one memory, but those that have ended, the first one
    /// perhaps, show none.
    fn maps(&self) -> Option<(i32, String)> {
        let others = self.threads.iter().copied().filter(|tid| *tid != self.pid);
        std::iter::once(self.pid).chain(others).find_map(|tid| {
            let maps = proc::read_task_file(tid, "maps").ok()?;
            (!maps.is_empty()).then_some((tid, maps))
        })
    }
}

/// The device of the file that a path of the kernel leads to, from here and
/// from where a process stands; nothing if that cannot be told, or differs.
fn device_behind(pid: i32, path: &str) -> Option<u64> {
    let path = proc::unescape(path);
    let here = device_of(&path)?;
    let there = device_of(&format!("/proc/{pid}/root{path}"))?;
    (here == there).then_some(here)
}

fn device_of(path: &str) -> Option<u64> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT | AtFlags::SYMLINK_NOFOLLOW;
    let stat = rustix::fs::statx(rustix::fs::CWD, path, flags, StatxFlags::INO).ok()?;
    Some(rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor))
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

/// Where the mappings begin that `mprotect(2)` cannot make writable: without
/// `mw` in VmFlags. None, if that cannot be told.
fn never_writable(tid: i32) -> HashSet<u64> {
    let smaps = proc::read_task_file(tid, "smaps").unwrap_or_default();
    let mut fixed = HashSet::new();
    let mut start = None;
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if !flags.split_ascii_whitespace().any(|flag| flag == "mw") {
                fixed.extend(start);
            }
            start = None;
        } else if let Some(entry) = proc::parse_maps_line(line) {
            start = Some(entry.start);
        }
    }
    fixed
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
