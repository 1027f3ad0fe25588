//! Who has a file open, as far as `/proc` shows.
//!
//! It shows what processes have, but not everything a kernel can hold: what
//! is found here decides only where the exact proof (a lease) cannot be had,
//! and explains refusals.

use crate::bounded::{self, Looking, Retries, within};
use crate::table::{InodeId, LOCK_BASE};
use mapdirect_proto::Opener;
use mapdirect_sys::proc::{self, FdInfo};
use mapdirect_sys::{kcmp, proc_locks};
use rustix::fs::{AtFlags, StatxFlags};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
    /// Processes with descriptors in flight through their sockets.
    pub(crate) in_flight: Vec<i32>,
    /// Some process could not be looked at, nor what it maps.
    pub(crate) unseen: bool,
}

impl Openers {
    /// Somebody other than the marked description can write. Whoever sets up
    /// a device of the kernel can make it writable later on, whatever it is
    /// now.
    pub(crate) fn has_writer(&self) -> bool {
        self.others
            .iter()
            .any(|opener| opener.writable || opener.pid == 0)
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
    let search = Arc::new(Search::of(wanted));
    let deadline = Instant::now() + limit;
    let retries = Retries::until(deadline);
    let looked = loop {
        let shared = Arc::clone(&search);
        let left = deadline.saturating_duration_since(Instant::now());
        match within(left, move |looking| shared.run(looking)) {
            Ok(()) => break Ok(()),
            Err(stuck) if stuck.pid > 0 && stuck.is_in_execve() && search.is_news(stuck.pid) => {}
            Err(stuck) => match retries.once_more(stuck) {
                Ok(()) => {}
                Err(stuck) => break Err(stuck),
            },
        }
    };
    let mut found = std::mem::take(&mut *search.found());
    if let Err(stuck) = looked {
        // What was found until then is true, but not all.
        for found in &mut found {
            found.hidden.push(stuck.obstacle());
            found.unseen = true;
        }
    }
    found
}

/// What a search owns: it may outlive who asked for it.
struct Search {
    wanted: Vec<Sought>,
    by_inode: HashMap<u64, Vec<usize>>,
    /// Taken away from a search that took too long.
    found: Mutex<Vec<Openers>>,
    /// Processes still to be looked at.
    left: Mutex<Vec<i32>>,
    /// The last one that was found in the middle of `execve(2)`.
    in_execve: AtomicI32,
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
        let own = std::process::id().cast_signed();
        let mut left = proc::numbers_in("/proc").unwrap_or_default();
        left.retain(|pid| *pid != own);
        Self {
            wanted: sought.collect(),
            by_inode,
            found: Mutex::new(found),
            left: Mutex::new(left),
            in_execve: AtomicI32::new(0),
        }
    }

    fn found(&self) -> MutexGuard<'_, Vec<Openers>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn left(&self) -> MutexGuard<'_, Vec<i32>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, looking: &Looking) {
        loop {
            let Some(pid) = self.left().last().copied() else {
                break;
            };
            let in_execve = looking.at(pid).is_err();
            self.look_at_process(pid, in_execve);
            if looking.is_given_up() {
                return;
            }
            self.pass(pid);
        }
        self.look_into_the_kernel();
    }

    fn pass(&self, pid: i32) {
        self.left().pop_if(|last| *last == pid);
    }

    /// A look hung at a process in the middle of `execve(2)`. The next one is
    /// content with what can be read of it all the same: its descriptors. What
    /// it had mapped is on its way out, and nothing can be stored by it any
    /// more. Says whether that is worth a try: once.
    fn is_news(&self, pid: i32) -> bool {
        self.in_execve.swap(pid, SeqCst) != pid
    }

    /// Notes something about a file; nothing here waits for a process.
    fn note(&self, at: usize, add: impl FnOnce(&mut Openers)) {
        if let Some(found) = self.found().get_mut(at) {
            add(found);
        }
    }

    /// Any of the files may hide in `place`.
    fn hide(&self, place: &str) {
        for at in 0..self.wanted.len() {
            self.note(at, |found| found.hidden.push(place.to_owned()));
        }
    }

    fn look_at_process(&self, pid: i32, in_execve: bool) {
        let mut process = Process {
            pid,
            threads: proc::numbers_in(&format!("/proc/{pid}/task")).unwrap_or_default(),
            command: None,
        };
        let mut sockets = self.look_at_descriptors(&mut process, in_execve);
        // What is on its way through a socket is received in a moment, and
        // then it is in a table that was looked at before: look again. Only
        // sockets tell whether it was, so a large table is read twice at most.
        let mut tries = 1;
        let in_flight = loop {
            let in_flight: u64 = sockets.iter().map(Socket::in_flight).sum();
            if in_flight == 0 || tries >= TRIES {
                break in_flight;
            }
            tries += 1;
            std::thread::sleep(Duration::from_millis(2));
        };
        if tries > 1 {
            self.forget(pid);
            sockets = self.look_at_descriptors(&mut process, in_execve);
        }
        let in_flight = in_flight.max(sockets.iter().map(Socket::in_flight).sum());
        if in_flight > 0 {
            for at in 0..self.wanted.len() {
                self.note(at, |found| found.in_flight.push(pid));
            }
            self.hide(&format!(
                "{in_flight} descriptors in flight through sockets of pid {pid} ({})",
                process.command()
            ));
        }
        if !in_execve {
            self.look_at_mappings(&mut process);
        }
    }

    /// Returns the sockets among them.
    fn look_at_descriptors(&self, process: &mut Process, in_execve: bool) -> Vec<Socket> {
        let mut sockets = Vec::new();
        for table in process.descriptor_tables() {
            for fd in proc::numbers_in(&format!("/proc/{table}/fd")).unwrap_or_default() {
                let is_socket = if in_execve {
                    self.look_at_descriptor_in_execve(process, table, fd)
                } else {
                    self.look_at_descriptor(process, table, fd)
                };
                if is_socket {
                    sockets.push(Socket { table, fd });
                }
            }
        }
        sockets
    }

    /// Forgets the descriptors of a process.
    fn forget(&self, pid: i32) {
        for at in 0..self.wanted.len() {
            self.note(at, |found| {
                found.others.retain(|opener| opener.pid != pid);
                found.marked.retain(|opener| opener.pid != pid);
                found
                    .writable_mappings
                    .retain(|(opener, _)| opener.pid != pid);
            });
        }
    }

    /// Says whether it is a socket.
    fn look_at_descriptor(&self, process: &mut Process, table: i32, fd: i32) -> bool {
        let link = format!("/proc/{table}/fd/{fd}");
        let Ok(target) = std::fs::read_link(&link) else {
            return false;
        };
        let target = target.to_string_lossy();
        if target.starts_with("socket:") {
            return true;
        }
        let is_ring = target.starts_with("anon_inode:[io_uring]");
        // Most are of other files: that is told much sooner than the rest.
        let is_wanted = || {
            target.starts_with('/')
                && identify(&link).is_some_and(|id| {
                    let same = self.by_inode.get(&id.inode).into_iter().flatten();
                    same.copied().any(|at| self.wanted[at].id == id)
                })
        };
        if !is_ring && !is_wanted() {
            return false;
        }
        let Ok(text) = proc::read_task_file(table, &format!("fdinfo/{fd}")) else {
            return false;
        };
        let info = proc::parse_fdinfo(&text);
        if is_ring {
            self.look_into_ring(process, table, fd, info);
        } else {
            self.note_descriptor(process, &link, fd, &info);
        }
        false
    }

    /// The same where links cannot be read: `fdinfo` can (seen on 6.18, where
    /// `proc_pid_readlink` waits for the end of execve(2)).
    fn look_at_descriptor_in_execve(&self, process: &mut Process, table: i32, fd: i32) -> bool {
        let Ok(text) = proc::read_task_file(table, &format!("fdinfo/{fd}")) else {
            return false;
        };
        let info = proc::parse_fdinfo(&text);
        if text.contains("\nSqMask:") {
            self.look_into_ring(process, table, fd, info);
        } else {
            self.note_descriptor(process, &format!("/proc/{table}/fd/{fd}"), fd, &info);
        }
        text.contains("\nscm_fds:")
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
        for user in all_kernel_users() {
            for (at, wanted) in self.wanted.iter().enumerate() {
                if user.path == wanted.path || is_inode(&user.path, wanted.id) {
                    self.note(at, |found| found.others.push(user.opener()));
                }
            }
        }
    }
}

/// Users of one file inside the kernel that can be found.
#[cfg_attr(not(feature = "bpf"), expect(dead_code, reason = "for the bpf gate"))]
pub(crate) fn kernel_users(id: InodeId, known_path: &str) -> Vec<Opener> {
    all_kernel_users()
        .into_iter()
        .filter(|user| user.path == known_path || is_inode(&user.path, id))
        .map(|user| user.opener())
        .collect()
}

/// A socket of a process.
struct Socket {
    table: i32,
    fd: i32,
}

impl Socket {
    /// How many descriptors are in flight through it.
    fn in_flight(&self) -> u64 {
        proc::read_task_file(self.table, &format!("fdinfo/{}", self.fd))
            .map_or(0, |text| proc::parse_fdinfo(&text).in_flight)
    }
}

/// What the kernel itself has open.
struct KernelUser {
    path: String,
    what: String,
    writable: bool,
}

impl KernelUser {
    fn opener(&self) -> Opener {
        Opener {
            pid: 0,
            fd: None,
            writable: self.writable,
            mapped: false,
            command: self.what.clone(),
        }
    }
}

fn all_kernel_users() -> Vec<KernelUser> {
    let mut users = Vec::new();
    let blocks = std::fs::read_dir("/sys/block").into_iter().flatten();
    for entry in blocks.flatten() {
        let backing = entry.path().join("loop/backing_file");
        if let Ok(backing) = std::fs::read_to_string(backing) {
            let name = entry.file_name().to_string_lossy().into_owned();
            let read_only = std::fs::read_to_string(entry.path().join("ro"));
            users.push(KernelUser {
                path: backing.trim_end_matches('\n').to_owned(),
                what: format!("loop device /dev/{name}"),
                writable: !read_only.is_ok_and(|text| text.trim_end() == "1"),
            });
        }
    }
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    for line in swaps.lines().skip(1) {
        if let Some(file) = line.split_ascii_whitespace().next() {
            users.push(KernelUser {
                path: file.to_owned(),
                what: String::from("swap space (swapoff it first)"),
                writable: true,
            });
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
    identify(link) == Some(id)
}

/// The inode that a link leads to, without asking a server behind a network
/// filesystem.
pub(crate) fn identify(link: &str) -> Option<InodeId> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let stat = rustix::fs::statx(rustix::fs::CWD, link, flags, StatxFlags::INO).ok()?;
    Some(InodeId {
        dev: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
        inode: stat.stx_ino,
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
