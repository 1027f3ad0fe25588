//! Finds other programs that are asked before a file is used.
//!
//! A thread that truncates or opens a file waits for every listener with
//! permission events on it. It has passed this guard while it waits for another
//! listener. The marks in `/proc` show whether any other listener can be asked
//! about a file. If a listener cannot be, then a thread that waits for it does
//! so because of another file.

use crate::bounded::{self, Looking, Retries, within};
use crate::table::InodeId;
use mapdirect_sys::{fanotify, proc, proc_mountinfo};
use std::time::Instant;

/// `FAN_OPEN_PERM`, `FAN_ACCESS_PERM`, `FAN_OPEN_EXEC_PERM`, `FAN_PRE_ACCESS`.
const PERMISSIONS: u64 = 0x0001_0000 | 0x0002_0000 | 0x0004_0000 | 0x0010_0000;

/// `FAN_EVENT_ON_CHILD`.
const ON_CHILD: u64 = 0x0800_0000;

/// Whether a listener of another process may be asked about an inode. `true` if
/// that cannot be found out before `deadline`.
pub(crate) fn others_may_watch(id: InodeId, deadline: Instant) -> bool {
    let retries = Retries::until(deadline);
    loop {
        match within(bounded::limit(deadline), move |looking| search(id, looking)) {
            Ok(may) => return may,
            Err(stuck) if retries.once_more(stuck).is_err() => return true,
            Err(_) => {}
        }
    }
}

fn search(id: InodeId, looking: &Looking) -> bool {
    let own = std::process::id().cast_signed();
    let pids = proc::numbers_in("/proc").unwrap_or_default();
    pids.into_iter().filter(|pid| *pid != own).any(|pid| {
        // A process in the middle of execve(2) does not show which files its
        // descriptors are of, but shows everything else about them.
        let in_execve = looking.at(pid).is_err();
        let fds = proc::numbers_in(&format!("/proc/{pid}/fd")).unwrap_or_default();
        fds.into_iter().any(|fd| {
            let is_listener = || {
                let link = std::fs::read_link(format!("/proc/{pid}/fd/{fd}"));
                link.is_ok_and(|link| link.as_os_str() == "anon_inode:[fanotify]")
            };
            (in_execve || is_listener())
                && !fanotify::is_own(pid, fd)
                && proc::read_task_file(pid, &format!("fdinfo/{fd}"))
                    .is_ok_and(|text| may_be_asked(&text, id, |mount| device_of(pid, mount)))
        })
    })
}

/// The device of a mount that a process sees, by the mount's number.
fn device_of(pid: i32, mount: u64) -> Option<u64> {
    let mounts = proc_mountinfo::read(Some(pid)).ok()?;
    let found = mounts.iter().find(|found| found.id == mount)?;
    Some(rustix::fs::makedev(found.major, found.minor))
}

/// Whether a group with these marks is asked for permission when an inode is
/// used.
pub(crate) fn may_be_asked(
    fdinfo: &str,
    id: InodeId,
    device_of: impl Fn(u64) -> Option<u64>,
) -> bool {
    fdinfo
        .lines()
        .filter_map(|line| line.strip_prefix("fanotify "))
        .any(|line| {
            let field = |name: &str| {
                line.split_ascii_whitespace()
                    .find_map(|word| word.strip_prefix(name)?.strip_prefix(':'))
                    .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            };
            if field("mask").is_none_or(|mask| mask & PERMISSIONS == 0) {
                return false;
            }
            let is_here = |sdev: u64| kernel_device(id.dev) == sdev;
            // A mark on the directory above counts as well, and nobody knows
            // which directory that is.
            let is_of_children = field("mask").is_some_and(|mask| mask & ON_CHILD != 0);
            match (field("ino"), field("sdev"), field("mnt_id")) {
                (Some(inode), Some(sdev), _) => {
                    is_here(sdev) && (inode == id.inode || is_of_children)
                }
                (None, Some(sdev), _) => is_here(sdev),
                (_, _, Some(mount)) => device_of(mount).is_none_or(|device| device == id.dev),
                _ => true,
            }
        })
}

/// A device number in the kernel's form.
fn kernel_device(device: u64) -> u64 {
    u64::from(rustix::fs::major(device)) << 20 | u64::from(rustix::fs::minor(device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_told_apart() {
        let id = InodeId {
            dev: rustix::fs::makedev(7, 3),
            inode: 131,
        };
        let asked = |line: &str| may_be_asked(line, id, |_| Some(rustix::fs::makedev(8, 1)));
        let flags = "pos:\t0\nfanotify flags:4 event-flags:8000\n";
        assert!(!asked(flags));
        let here = "fanotify ino:83 sdev:700003 mflags:0 mask:100000 ignored_mask:0 fhandle\n";
        assert!(asked(here));
        let told_only = "fanotify ino:83 sdev:700003 mflags:0 mask:18 ignored_mask:100000\n";
        assert!(!asked(told_only));
        let sibling = "fanotify ino:84 sdev:700003 mflags:0 mask:100000 ignored_mask:0\n";
        assert!(!asked(sibling));
        let above = "fanotify ino:80 sdev:700003 mflags:0 mask:8100000 ignored_mask:0\n";
        assert!(asked(above));
        let elsewhere = "fanotify ino:83 sdev:700004 mflags:0 mask:100000 ignored_mask:0\n";
        assert!(!asked(elsewhere));
        assert!(asked(
            "fanotify sdev:700003 mflags:0 mask:10000 ignored_mask:0\n"
        ));
        assert!(!asked(
            "fanotify mnt_id:1f mflags:0 mask:10000 ignored_mask:0\n"
        ));
        assert!(may_be_asked("fanotify mnt_id:1f mask:10000\n", id, |_| {
            None
        }));
        assert!(asked("fanotify mask:10000\n"), "of no known form");
        assert!(!asked("fanotify \nfanotify ino:zz\n\n"));
    }
}
