//! proc_pid_status(5): who a process is.

use crate::{Errno, Result, ancestry, proc};
use std::cell::Cell;

/// The ids of a process, as the reader's namespaces have them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    /// Real, effective, saved and filesystem user.
    pub users: [u32; 4],
    /// Real, effective, saved and filesystem group.
    pub groups: [u32; 4],
    /// The supplementary groups.
    pub others: Vec<u32>,
    /// Its number in every PID namespace that it is in, from the reader's to its
    /// own.
    pub numbers: Vec<i32>,
}

impl Ids {
    /// The user, if it is the same one in every respect: a program that has
    /// more rights than its caller is not one.
    #[must_use]
    pub fn only_user(&self) -> Option<u32> {
        let [user, others @ ..] = self.users;
        others.iter().all(|other| *other == user).then_some(user)
    }

    /// The group, likewise.
    #[must_use]
    pub fn only_group(&self) -> Option<u32> {
        let [group, others @ ..] = self.groups;
        others.iter().all(|other| *other == group).then_some(group)
    }

    /// The number by which the process knows itself (`getpid(2)`).
    #[must_use]
    pub fn own_number(&self) -> Option<i32> {
        self.numbers.last().copied()
    }
}

/// Parses the text of `/proc/<pid>/status`; `None` if it lacks an id.
#[must_use]
pub fn parse(text: &str) -> Option<Ids> {
    fn all<T: std::str::FromStr>(words: &str) -> Option<Vec<T>> {
        words
            .split_ascii_whitespace()
            .map(|word| word.parse().ok())
            .collect()
    }
    // The name comes first, and the kernel writes no newline of it.
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
    };
    Some(Ids {
        users: all(field("Uid")?)?.try_into().ok()?,
        groups: all(field("Gid")?)?.try_into().ok()?,
        others: all(field("Groups")?)?,
        numbers: all(field("NSpid")?)?,
    })
}

/// The process that a thread belongs to, from the text of
/// `/proc/<tid>/status`.
#[must_use]
pub fn process_in(text: &str) -> Option<i32> {
    let mut lines = text.lines();
    lines
        .find_map(|line| line.strip_prefix("Tgid:"))?
        .trim()
        .parse()
        .ok()
}

/// Reads the ids of a process or thread. This waits for nobody.
///
/// # Errors
///
/// `ENOENT` or `ESRCH` when it is gone, `EINVAL` for text of no known form.
pub fn ids(id: i32) -> Result<Ids> {
    parse(&proc::read_task_file(id, "status")?).ok_or(Errno::INVAL)
}

/// The thread of process `pid` that knows itself by number `tid`.
///
/// # Errors
///
/// `ESRCH` if there is none.
pub fn thread_known_as(pid: i32, tid: i32) -> Result<i32> {
    let threads = proc::numbers_in(&format!("/proc/{pid}/task"))?;
    let is_it = |thread: &i32| {
        let ids = proc::read_task_file(pid, &format!("task/{thread}/status"));
        let ids = ids.ok().and_then(|text| parse(&text));
        ids.and_then(|ids| ids.own_number()) == Some(tid)
    };
    threads.into_iter().find(is_it).ok_or(Errno::SRCH)
}

/// The process that has this number in the PID namespace of process `pid`, if
/// `pid` is that process or descends from it. In the reader's own namespace a
/// number needs no translation, and is returned as it is.
///
/// # Errors
///
/// `ESRCH` if there is none, `ENOENT` or `ESRCH` when `pid` is gone.
pub fn ancestor_known_as(pid: i32, number: i32) -> Result<i32> {
    let level = ids(pid)?.numbers.len().saturating_sub(1);
    if level == 0 {
        return Ok(number);
    }
    // The namespaces of ancestors are those of the process, or around them. So
    // one that has a number at the same level is in the same one.
    let found = Cell::new(None);
    let is_it = |ancestor: i32| {
        let is_it = ids(ancestor).is_ok_and(|ids| ids.numbers.get(level) == Some(&number));
        if is_it {
            found.set(Some(ancestor));
        }
        is_it
    };
    if ancestry::descends_by_proc(pid, is_it) {
        return found.get().ok_or(Errno::SRCH);
    }
    Err(Errno::SRCH)
}

/// The identity of a PID namespace as long as it exists: that of process `pid`,
/// or of the caller.
///
/// # Errors
///
/// `ENOENT` without a proc(5) of that namespace, `ESRCH` when the process is
/// gone, `EACCES`.
pub fn pid_namespace(pid: Option<i32>) -> Result<u64> {
    let path = pid.map_or_else(
        || String::from("/proc/self/ns/pid"),
        |pid| format!("/proc/{pid}/ns/pid"),
    );
    Ok(rustix::fs::stat(path)?.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Name:\tUid: 7\\n\nUmask:\t0022\nUid:\t1000\t0\t1000\t1000\n\
        Gid:\t5\t5\t5\t5\nGroups:\t4 24 27 \nNStgid:\t70\t3\nNSpid:\t70\t3\n";

    #[test]
    fn ids_are_told_apart() {
        let ids = parse(TEXT).unwrap();
        assert_eq!(ids.users, [1000, 0, 1000, 1000]);
        assert_eq!((ids.only_user(), ids.only_group()), (None, Some(5)));
        assert_eq!(ids.others, [4, 24, 27]);
        assert_eq!(ids.own_number(), Some(3));
        assert_eq!(parse(&TEXT.replace("Groups", "Gruppen")), None);
        assert_eq!(parse(&TEXT.replace("1000", "x")), None);
        assert_eq!(parse(&TEXT.replace("Gid:\t5", "Gid:")), None);
        assert_eq!(parse(""), None);
        let none = parse(&TEXT.replace("4 24 27", "")).unwrap();
        assert_eq!(none.others, []);
    }

    #[test]
    fn this_process_knows_itself() {
        let own = std::process::id().cast_signed();
        let ids = ids(own).unwrap();
        assert_eq!(ids.own_number(), Some(own));
        let user = rustix::process::getuid().as_raw();
        assert_eq!(ids.only_user(), Some(user));
        assert_eq!(pid_namespace(None), pid_namespace(Some(own)));
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        assert_eq!(thread_known_as(own, tid), Ok(tid));
        assert_eq!(thread_known_as(own, i32::MAX), Err(Errno::SRCH));
        assert_eq!(ancestor_known_as(own, 77), Ok(77));
    }
}
