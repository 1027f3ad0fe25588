//! Finds out who did something: user, program, control group.
//!
//! Everything is read from `/proc` by number, so a start time is read before
//! and after: if both are the same, the number was that of one thread all the
//! time. Nothing here waits for the thread itself but for what
//! [`look`](crate::gate::fanotify::look) names: the lock of a directory of
//! `/proc`, and from Linux 7.0 for `exec_update_lock`, for the link `exe`. So
//! this runs only where nobody has to wait for it.

use crate::table::InodeId;
use mapdirect_proto::record::{Actor, MAX_PLACE};
use mapdirect_sys::{proc, proc_mountinfo, proc_status};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;

/// How a thread was seen whose number this is, or was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Sight {
    /// It waits for the guard, and so is what it was.
    Waits,
    /// By the kernel.
    #[cfg_attr(
        all(not(feature = "bpf"), not(test)),
        expect(dead_code, reason = "for the bpf gate")
    )]
    Then {
        /// When it began, in clock ticks since boot.
        began: u64,
        /// The file that its program was, by the kernel's own numbers; `None` if
        /// it ran none.
        program: Option<InodeId>,
    },
    /// It had its number before this time, in clock ticks since boot. What it ran
    /// then is not known.
    Before(u64),
}

impl Sight {
    /// Whether a thread that began then is the one that was seen.
    fn is_of(self, began: u64) -> bool {
        match self {
            Self::Waits => true,
            Self::Then { began: seen, .. } => began == seen,
            Self::Before(time) => began < time,
        }
    }

    /// The program of the thread, if it is the one that it ran then: a process
    /// stays the same when it executes another. Empty for kernel threads.
    fn executable(self, tid: i32) -> String {
        let link = format!("/proc/{tid}/exe");
        let is_it = || match self {
            Self::Waits => true,
            Self::Then { program, .. } => {
                program.is_some_and(|program| is_file(program, &link, tid))
            }
            Self::Before(_) => false,
        };
        if !is_it() {
            return String::new();
        }
        let path = std::fs::read_link(&link);
        let path = path.map(|path| cut(&proc::printable(&path.to_string_lossy())));
        path.ok().filter(|_| is_it()).unwrap_or_default()
    }
}

/// Whether a link leads to a file with these numbers of the kernel's own, as
/// thread `tid` sees mounts. `stat(2)` shows them, except on btrfs and some
/// overlays.
fn is_file(id: InodeId, link: &str, tid: i32) -> bool {
    let shown = rustix::fs::stat(link).map(|stat| InodeId {
        dev: stat.st_dev,
        inode: stat.st_ino,
    });
    shown == Ok(id) || own_numbers(link, tid) == Some(id)
}

/// The kernel's own numbers of the file that a link leads to.
fn own_numbers(link: &str, tid: i32) -> Option<InodeId> {
    /// Whoever has more mounts has made them for this.
    const MOST: u64 = 1 << 20;
    let file = rustix::fs::open(link, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
    // A thread that looks has descriptors of its own.
    let about = format!("/proc/thread-self/fdinfo/{}", file.as_raw_fd());
    let about = std::fs::read_to_string(about).ok()?;
    let mount = about
        .lines()
        .find_map(|line| line.strip_prefix("mnt_id:"))?;
    let mount: u64 = mount.trim().parse().ok()?;
    let mut mounts = Vec::new();
    let all = File::open(format!("/proc/{tid}/mountinfo")).ok()?;
    all.take(MOST).read_to_end(&mut mounts).ok()?;
    let mounts = String::from_utf8_lossy(&mounts);
    let mut mounts = mounts.lines().filter_map(proc_mountinfo::parse_line);
    let mount = mounts.find(|one| one.id == mount)?;
    Some(InodeId {
        dev: rustix::fs::makedev(mount.major, mount.minor),
        inode: proc::parse_fdinfo(&about).inode,
    })
}

/// What `/proc` says about a thread, or `None` if it is gone, or is another one
/// than was seen.
pub(crate) fn find(tid: i32, sight: Sight) -> Option<Actor> {
    let began = proc::start_time(tid).ok()?;
    if !sight.is_of(began) {
        return None;
    }
    let status = proc::read_task_file(tid, "status").ok()?;
    let mut actor = Actor::default();
    actor.tid = tid;
    actor.pid = proc_status::process_in(&status)?;
    // The real user: the owner even of a program with the set-user-id bit.
    actor.uid = proc_status::parse(&status).map(|ids| ids.users[0]);
    actor.command = proc::command(tid);
    actor.executable = sight.executable(tid);
    actor.cgroup = proc::read_task_file(tid, "cgroup")
        .ok()
        .and_then(|text| proc::parse_cgroup(&text).map(|path| cut(&proc::printable(path))))
        .unwrap_or_default();
    (proc::start_time(tid) == Ok(began)).then_some(actor)
}

/// The command of a process that began at this time, in clock ticks since boot,
/// if its number still is its own.
pub(crate) fn command_of(pid: i32, began: u64) -> Option<String> {
    let is_it = || proc::start_time(pid) == Ok(began);
    let command = is_it().then(|| proc::command(pid))?;
    (command != "?" && is_it()).then_some(command)
}

/// Strangers choose these texts, and many records are kept.
fn cut(text: &str) -> String {
    text.chars()
        .scan(0, |length, character| {
            *length += character.len_utf8();
            (*length <= MAX_PLACE).then_some(character)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_thread_is_found_and_no_other_is_taken_for_it() {
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        let actor = find(own, Sight::Waits).unwrap();
        assert_eq!(actor.pid, std::process::id().cast_signed());
        assert_eq!(actor.tid, own);
        assert_eq!(actor.uid, Some(rustix::process::getuid().as_raw()));
        let program = std::env::current_exe().unwrap();
        assert_eq!(actor.executable, program.to_string_lossy());
        let began = proc::start_time(own).unwrap();
        let later = Sight::Before(began);
        assert_eq!(find(own, later), None, "a thread that came later");
        let found = find(own, Sight::Before(began + 1)).unwrap();
        assert_eq!((found.pid, &*found.executable), (actor.pid, ""));
        assert_eq!(find(i32::MAX, Sight::Waits), None);
        // A kernel thread runs no program.
        assert_eq!(
            find(2, Sight::Waits).map(|actor| actor.executable),
            Some(String::new())
        );
    }

    #[test]
    fn a_thread_with_the_same_number_or_another_program_is_told_apart() {
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        let began = proc::start_time(own).unwrap();
        let stat = rustix::fs::stat("/proc/self/exe").unwrap();
        let id = |inode| InodeId {
            dev: stat.st_dev,
            inode,
        };
        let seen = |began, program| find(own, Sight::Then { began, program });
        let program = Some(id(stat.st_ino));
        let found = seen(began, program).unwrap();
        assert!(!found.executable.is_empty());
        assert!(own_numbers("/proc/self/exe", own).is_some());
        assert_eq!(seen(began + 1, program), None, "the number was used again");
        // It has executed another since.
        for other in [None, Some(id(stat.st_ino + 1))] {
            let found = seen(began, other).unwrap();
            assert_eq!(
                (found.pid, &*found.executable),
                (std::process::id().cast_signed(), "")
            );
        }
    }

    #[test]
    fn a_holder_whose_number_was_used_again_has_no_command() {
        let own = std::process::id().cast_signed();
        let began = proc::start_time(own).unwrap();
        assert_eq!(command_of(own, began), Some(proc::command(own)));
        assert_eq!(command_of(own, began + 1), None);
    }

    #[test]
    fn long_texts_are_cut() {
        assert_eq!(cut("abc"), "abc");
        let long = "ü".repeat(2000);
        assert_eq!(cut(&long).len(), MAX_PLACE);
    }
}
