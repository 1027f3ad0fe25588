//! Reads facts about one process.

use mapdirect_sys::proc::MapsEntry;
use mapdirect_sys::{kcmp, proc, proc_maps};
use rustix::fs::{AtFlags, StatxFlags};
use std::collections::HashSet;

/// A socket of a process.
pub(super) struct Socket {
    pub(super) table: i32,
    pub(super) fd: i32,
}

impl Socket {
    /// The number of descriptors in flight through this socket.
    pub(super) fn in_flight(&self) -> u64 {
        proc::read_task_file(self.table, &format!("fdinfo/{}", self.fd))
            .map_or(0, |text| proc::parse_fdinfo(&text).in_flight)
    }
}

/// A process. Its name is looked up when it is needed.
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) threads: Vec<i32>,
    pub(super) command: Option<String>,
}

impl Process {
    pub(super) fn command(&mut self) -> String {
        let pid = self.pid;
        self.command
            .get_or_insert_with(|| proc::command(pid))
            .clone()
    }

    /// Threads whose descriptor tables together are all of the process's
    /// tables. A thread may have a table of its own (created without
    /// `CLONE_FILES`). The first thread may have ended before the others, and
    /// then has none.
    pub(super) fn descriptor_tables(&self) -> Vec<i32> {
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

    /// The mappings of files, and a thread by which they can be read. All threads of a
    /// process share one memory, but threads that have ended show none, and the
    /// first thread may be one of them.
    pub(super) fn maps(&self, go_on: &dyn Fn() -> bool) -> Option<(i32, Vec<MapsEntry>)> {
        let others = self.threads.iter().copied().filter(|tid| *tid != self.pid);
        std::iter::once(self.pid).chain(others).find_map(|tid| {
            let maps = proc_maps::of_files(tid, go_on).ok()?;
            (!maps.is_empty()).then_some((tid, maps))
        })
    }
}

/// The device of the file that a path from the kernel leads to, or `None` if
/// that cannot be found out or if the path leads elsewhere from the process's
/// root directory.
pub(super) fn device_behind(pid: i32, path: &str) -> Option<u64> {
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

/// The start addresses of mappings that `mprotect(2)` cannot make writable,
/// because VmFlags lack `mw`. Empty if that cannot be found out.
pub(super) fn never_writable(tid: i32, go_on: &dyn Fn() -> bool) -> HashSet<u64> {
    let smaps = proc_maps::line_heads(tid, "smaps", go_on).unwrap_or_default();
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
