//! Finds who has a file open, as far as `/proc` shows.
//!
//! `/proc` shows what processes have, but not everything that a kernel can
//! hold. So these findings decide only when the exact proof (a lease) is not
//! available, and they explain refusals.

mod kernel;
mod process;

#[cfg(feature = "bpf")]
pub(crate) use self::kernel::kernel_users;

use self::kernel::all_kernel_users;
use self::process::{Process, Socket, device_behind, never_writable};
use crate::bounded::{self, Looking, Retries, within};
use crate::table::{InodeId, LOCK_BASE};
use mapdirect_proto::Opener;
use mapdirect_sys::kcmp;
use mapdirect_sys::proc::{self, FdInfo};
use mapdirect_sys::proc_locks;
use rustix::event::EventfdFlags;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// A file whose openers are looked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) id: InodeId,
    /// The path at which the file was last seen.
    pub(crate) path: &'a str,
    /// Descriptors of the description with this mark are listed separately.
    pub(crate) mark: Option<Mark>,
}

/// What tells one open file description from the others of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// A descriptor of the guard refers to it, too. The guard keeps this
    /// descriptor open for as long as anybody waits for the findings.
    Descriptor(RawFd),
    /// It holds a lock on this byte.
    Lock(u64),
}

impl Mark {
    /// Whether a descriptor, whose `info` was read, is of the marked
    /// description.
    ///
    /// To compare descriptors waits for a process in the middle of `execve(2)`.
    /// There, `can_compare` is not set, and no descriptor counts as marked.
    fn is_on(self, (table, fd): (i32, i32), info: &FdInfo, can_compare: bool) -> bool {
        match self {
            Self::Descriptor(own) => {
                let guard = std::process::id().cast_signed();
                can_compare && kcmp::same_description((guard, own), (table, fd))
            }
            // Neighbouring locks of one description are merged.
            Self::Lock(byte) => info.locks.iter().any(|lock| {
                lock.kind == proc_locks::Kind::Description
                    && (LOCK_BASE..=byte).contains(&lock.start)
                    && lock.last.is_none_or(|last| last >= byte)
            }),
        }
    }
}

/// What is known about who has a file open.
#[derive(Debug, Default)]
pub(crate) struct Openers {
    /// All openers that were found, except through the marked description.
    pub(crate) others: Vec<Opener>,
    /// Descriptors of the marked description.
    pub(crate) marked: Vec<Opener>,
    /// Ranges of the file that are mapped writable.
    pub(crate) writable_mappings: Vec<(Opener, Range<u64>)>,
    /// A process that executes the file as its program.
    pub(crate) executing: Option<Opener>,
    /// Places that cannot be looked into and in which a description could hide.
    pub(crate) hidden: Vec<String>,
    /// Processes with descriptors in flight through their sockets.
    pub(crate) in_flight: Vec<i32>,
    /// Some process, or its mappings, could not be looked at.
    pub(crate) unseen: bool,
}

impl Openers {
    /// Whether somebody other than the marked description can write. A kernel
    /// device counts as a writer, because whoever sets it up can make it
    /// writable later on.
    pub(crate) fn has_writer(&self) -> bool {
        self.others
            .iter()
            .any(|opener| opener.writable || opener.pid == 0)
    }
}

/// How long to look when no patience is given.
const LIMIT: Duration = Duration::from_secs(2);
/// How often to ask again for the registered files of a busy io_uring, and to
/// wait for descriptors on their way through sockets.
const TRIES: u32 = 10;

/// Looks for everybody who has a file open.
pub(crate) fn openers(wanted: Wanted<'_>) -> Openers {
    openers_before(wanted, Instant::now() + LIMIT)
}

/// The same, but with patience until `deadline`.
pub(crate) fn openers_before(wanted: Wanted<'_>, deadline: Instant) -> Openers {
    look_for(&[wanted], bounded::limit(deadline))
        .pop()
        .unwrap_or_default()
}

/// Finds which processes have files open or mapped, for a person to read. This
/// looks at every process once, and not at anything that hides elsewhere. The
/// answers are in the order of the questions.
pub(crate) fn processes_of(wanted: &[Wanted<'_>]) -> Vec<Openers> {
    search_for(Search::of(wanted, Depth::Processes), LIMIT)
}

fn look_for(wanted: &[Wanted<'_>], limit: Duration) -> Vec<Openers> {
    search_for(Search::of(wanted, Depth::Everything), limit)
}

fn search_for(search: Search, limit: Duration) -> Vec<Openers> {
    let search = Arc::new(search);
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
        // The findings up to then are true, but incomplete.
        for found in &mut found {
            found.hidden.push(stuck.obstacle());
            found.unseen = true;
        }
    }
    found
}

/// How closely to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Depth {
    /// Everything that could hold a file open, with details.
    Everything,
    /// Only descriptors and mappings of processes.
    Processes,
}

/// The data of a search. A search owns all of it, because it may outlive the
/// call that started it.
struct Search {
    depth: Depth,
    wanted: Vec<Sought>,
    by_inode: HashMap<u64, Vec<usize>>,
    /// The findings. They are taken away from a search that takes too long.
    found: Mutex<Vec<Openers>>,
    /// Processes still to be looked at.
    left: Mutex<Vec<i32>>,
    /// The process that was last found in the middle of `execve(2)`.
    in_execve: AtomicI32,
}

/// An owned [`Wanted`].
struct Sought {
    id: InodeId,
    path: String,
    mark: Option<Mark>,
}

impl Search {
    fn of(wanted: &[Wanted<'_>], depth: Depth) -> Self {
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
            depth,
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
            let go_on = || !looking.is_given_up();
            self.look_at_process(pid, in_execve, &go_on);
            if looking.is_given_up() {
                return;
            }
            self.pass(pid);
        }
        if self.depth == Depth::Everything {
            self.look_into_the_kernel();
        }
    }

    fn pass(&self, pid: i32) {
        self.left().pop_if(|last| *last == pid);
    }

    /// Notes that a look hung at a process in the middle of `execve(2)`, and
    /// says whether the process is worth another try: it is once. The next look
    /// is content with what can still be read, the descriptors. The mappings of
    /// such a process are about to go, and nothing can be stored through them
    /// any more.
    fn is_news(&self, pid: i32) -> bool {
        self.in_execve.swap(pid, SeqCst) != pid
    }

    /// Notes something about a file. Nothing here waits for a process.
    fn note(&self, at: usize, add: impl FnOnce(&mut Openers)) {
        if let Some(found) = self.found().get_mut(at) {
            add(found);
        }
    }

    /// Notes that any of the files may hide in `place`.
    fn hide(&self, place: &str) {
        for at in 0..self.wanted.len() {
            self.note(at, |found| found.hidden.push(place.to_owned()));
        }
    }

    fn look_at_process(&self, pid: i32, in_execve: bool, go_on: &dyn Fn() -> bool) {
        let mut process = Process {
            pid,
            threads: proc::numbers_in(&format!("/proc/{pid}/task")).unwrap_or_default(),
            command: None,
        };
        let mut sockets = self.look_at_descriptors(&mut process, in_execve);
        // A descriptor on its way through a socket is received in a moment, and
        // is then in a table that was looked at before. So look again. Only
        // sockets show whether there was one, so a large table is read twice at
        // most.
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
            self.look_at_mappings(&mut process, go_on);
        }
    }

    /// Looks at all descriptors of a process, and returns the sockets among
    /// them.
    fn look_at_descriptors(&self, process: &mut Process, in_execve: bool) -> Vec<Socket> {
        let mut sockets = Vec::new();
        for table in process.descriptor_tables() {
            let path = format!("/proc/{table}/fd");
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let Ok(links) = rustix::fs::open(&path, flags, Mode::empty()) else {
                continue;
            };
            for fd in proc::numbers_in(&path).unwrap_or_default() {
                let is_socket = if in_execve {
                    self.look_at_descriptor_in_execve(process, table, fd)
                } else {
                    self.look_at_descriptor(process, table, links.as_fd(), fd)
                };
                if is_socket {
                    sockets.push(Socket { table, fd });
                }
            }
        }
        if self.depth == Depth::Processes {
            sockets.clear();
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

    /// Looks at one descriptor, and says whether it is a socket.
    fn look_at_descriptor(
        &self,
        process: &mut Process,
        table: i32,
        links: BorrowedFd<'_>,
        fd: i32,
    ) -> bool {
        // Most descriptors are of other files, and a glance shows that much
        // sooner than a closer look.
        let name = fd.to_string();
        let Some((id, kind)) = glance(links, &name) else {
            return false;
        };
        if kind == FileType::Socket {
            return true;
        }
        let same = self.by_inode.get(&id.inode).into_iter().flatten();
        let mut wanted = same.copied().filter(|at| self.wanted[*at].id == id);
        if self.depth == Depth::Processes {
            wanted.for_each(|at| self.note_holder(process, at, links, &name));
            return false;
        }
        let is_ring = is_anonymous(id, kind)
            && rustix::fs::readlinkat(links, &name, Vec::new())
                .is_ok_and(|to| to.as_bytes().starts_with(b"anon_inode:[io_uring]"));
        if !is_ring && wanted.next().is_none() {
            return false;
        }
        let Ok(text) = proc::read_task_file(table, &format!("fdinfo/{fd}")) else {
            return false;
        };
        let info = proc::parse_fdinfo(&text);
        if is_ring {
            self.look_into_ring(process, table, fd, info);
        } else {
            self.note_descriptor(process, (table, fd), &info, true);
        }
        false
    }

    /// The same when links cannot be read but `fdinfo` can (seen on 6.18, where
    /// `proc_pid_readlink` waits for the end of execve(2)).
    fn look_at_descriptor_in_execve(&self, process: &mut Process, table: i32, fd: i32) -> bool {
        let Ok(text) = proc::read_task_file(table, &format!("fdinfo/{fd}")) else {
            return false;
        };
        let info = proc::parse_fdinfo(&text);
        if text.contains("\nSqMask:") {
            self.look_into_ring(process, table, fd, info);
        } else {
            self.note_descriptor(process, (table, fd), &info, false);
        }
        text.contains("\nscm_fds:")
    }

    /// Notes that a process has a file open by more than an `O_PATH`
    /// descriptor: the link of such a descriptor has no rights.
    fn note_holder(&self, process: &mut Process, at: usize, links: BorrowedFd<'_>, name: &str) {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC;
        let link = rustix::fs::statx(links, name, flags, StatxFlags::MODE);
        let Some(mode) = link.ok().map(|link| link.stx_mode & 0o600) else {
            return;
        };
        if mode == 0 {
            return;
        }
        let opener = Opener {
            pid: process.pid,
            fd: name.parse().ok(),
            writable: mode & 0o200 != 0,
            mapped: false,
            command: process.command(),
        };
        self.note(at, |found| found.others.push(opener));
    }

    fn note_descriptor(
        &self,
        process: &mut Process,
        (table, fd): (i32, i32),
        info: &FdInfo,
        can_compare: bool,
    ) {
        if info.is_path() {
            return;
        }
        for &at in self.by_inode.get(&info.inode).into_iter().flatten() {
            let wanted = &self.wanted[at];
            if !is_inode(&format!("/proc/{table}/fd/{fd}"), wanted.id) {
                continue;
            }
            let opener = Opener {
                pid: process.pid,
                fd: Some(fd),
                writable: info.is_writable(),
                mapped: false,
                command: process.command(),
            };
            let is_marked = wanted
                .mark
                .is_some_and(|mark| mark.is_on((table, fd), info, can_compare));
            self.note(at, |found| {
                if is_marked {
                    found.marked.push(opener);
                } else {
                    found.others.push(opener);
                }
            });
        }
    }

    /// Notes the files that are registered with an io_uring. The kernel shows
    /// only their names. On the same filesystem a name proves nothing: it may
    /// be another link, or may lead to another file by now.
    fn look_into_ring(&self, process: &mut Process, table: i32, fd: i32, mut info: FdInfo) {
        // While somebody submits, the kernel leaves the files out.
        for _ in 1..TRIES {
            if info.tells_registered() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
            let Ok(text) = proc::read_task_file(table, &format!("fdinfo/{fd}")) else {
                // The descriptor is gone.
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
        // A file that is not on a mounted filesystem has a name without a
        // slash.
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

    fn look_at_mappings(&self, process: &mut Process, go_on: &dyn Fn() -> bool) {
        let pid = process.pid;
        let Some((tid, maps)) = process.maps(go_on) else {
            return;
        };
        let mut mapped: HashMap<usize, Opener> = HashMap::new();
        // Takes long to read, so it is read once at most.
        let mut fixed = None;
        for entry in maps {
            for &at in self.by_inode.get(&entry.inode).into_iter().flatten() {
                let id = self.wanted[at].id;
                let device = id.device();
                if (entry.major, entry.minor) != (device.major, device.minor) {
                    continue;
                }
                // A shared mapping that is not writable now may become writable
                // if its description allows that. VmFlags tell.
                let writable = entry.shared
                    && (entry.writable
                        || !fixed
                            .get_or_insert_with(|| never_writable(tid, go_on))
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

    /// Notes the users of the files inside the kernel that can be found.
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

/// Whether `link` leads to the inode. Does not contact the server of a network
/// filesystem.
fn is_inode(link: &str, id: InodeId) -> bool {
    identify(link) == Some(id)
}

/// The inode that a link leads to. Does not contact the server of a network
/// filesystem.
pub(crate) fn identify(link: &str) -> Option<InodeId> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let stat = rustix::fs::statx(rustix::fs::CWD, link, flags, StatxFlags::INO).ok()?;
    Some(InodeId {
        dev: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
        inode: stat.stx_ino,
    })
}

/// The inode that a link of `/proc/<pid>/fd` leads to, and its type. Does not
/// contact the server of a network filesystem. Files that the kernel made
/// without a filesystem have no type.
fn glance(links: BorrowedFd<'_>, name: &str) -> Option<(InodeId, FileType)> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let asked = StatxFlags::INO | StatxFlags::TYPE;
    let stat = rustix::fs::statx(links, name, flags, asked).ok()?;
    let id = InodeId {
        dev: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
        inode: stat.stx_ino,
    };
    Some((id, FileType::from_raw_mode(stat.stx_mode.into())))
}

/// Whether a file may be one that the kernel made without a filesystem: such a
/// file has no type (seen on 6.18), or is on the same device as an eventfd.
fn is_anonymous(id: InodeId, kind: FileType) -> bool {
    static DEVICE: OnceLock<Option<u64>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| {
        let file = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).ok()?;
        rustix::fs::fstat(&file).ok().map(|stat| stat.st_dev)
    });
    kind == FileType::Unknown || device.is_none_or(|device| device == id.dev)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(file: &std::fs::File) -> Openers {
        let stat = rustix::fs::fstat(file).unwrap();
        let id = InodeId::from(&stat);
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
