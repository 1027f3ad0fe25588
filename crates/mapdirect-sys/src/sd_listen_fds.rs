//! sd_listen_fds(3): descriptors that a process is started with, by name.
//!
//! `LISTEN_PID` says whom they are for, `LISTEN_FDS` how many there are from
//! number 3 on, and `LISTEN_FDNAMES` their names, with colons in between.

use crate::{Result, checked, fork};
use rustix::io::FdFlags;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// `SD_LISTEN_FDS_START`.
const FIRST: RawFd = 3;

/// A descriptor that this process was started with.
#[derive(Debug)]
pub struct Inherited {
    /// What whoever started this process calls it.
    pub name: String,
    /// The descriptor, close-on-exec from now on.
    pub fd: OwnedFd,
}

/// The descriptors that this process was started with. Only the first call
/// returns any. They are not for a program that this process starts.
#[must_use]
pub fn take() -> Vec<Inherited> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, SeqCst) {
        return Vec::new();
    }
    let variable = |name: &str| std::env::var(name).ok();
    let number = |name: &str| variable(name).and_then(|value| value.parse::<u32>().ok());
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Vec::new();
    }
    let count = number("LISTEN_FDS").unwrap_or(0);
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    named(&names, count)
        .filter_map(|(number, name)| adopt(number).map(|fd| Inherited { name, fd }))
        .collect()
}

/// The numbers and names of so many descriptors.
fn named(names: &str, count: u32) -> impl Iterator<Item = (RawFd, String)> {
    let mut names = names.split(':');
    let last = FIRST.saturating_add(count.try_into().unwrap_or(RawFd::MAX));
    (FIRST..last).map(move |number| (number, names.next().unwrap_or("unknown").to_owned()))
}

/// Makes a number that this process has inherited an owned descriptor.
fn adopt(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: an integer. If the number is not open, this fails.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    // Everything that this program opens itself is close-on-exec, so that a
    // number in the environment that is not true cannot name any of it.
    if flags < 0 || flags & libc::FD_CLOEXEC != 0 {
        return None;
    }
    // SAFETY: open, and inherited: nothing in this process owns it. Nobody comes
    // here twice.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC).ok()?;
    Some(fd)
}

/// Starts `command` with these descriptors, and returns the number of the new
/// process. Everything else of this process is close-on-exec.
///
/// # Errors
///
/// As [`fork`](crate::fork::fork): this process must have one thread.
pub fn start(command: &mut Command, fds: &[(&str, BorrowedFd<'_>)]) -> Result<i32> {
    let numbered = fds.iter().map(|(name, fd)| (*name, fd.as_raw_fd()));
    let placed = places(numbered.collect());
    let names: Vec<&str> = placed.iter().map(|(name, _)| *name).collect();
    command
        .env("LISTEN_FDS", fds.len().to_string())
        .env("LISTEN_FDNAMES", names.join(":"));
    fork::child(|| {
        if place(&placed).is_ok() {
            command.env("LISTEN_PID", std::process::id().to_string());
            // Returns only if it fails.
            let _ = command.exec();
        }
        CANNOT_EXEC
    })
}

/// The status of a process that could not become another program, as shells
/// have it.
const CANNOT_EXEC: u8 = 127;

/// Which descriptor goes to which number, from [`FIRST`] on. Those that have such a
/// number keep it: there may be so many that there is no room for copies.
fn places(fds: Vec<(&str, RawFd)>) -> Vec<(&str, RawFd)> {
    let mut placed = vec![None; fds.len()];
    let mut others = Vec::new();
    for (name, number) in fds {
        let at = number
            .checked_sub(FIRST)
            .and_then(|at| usize::try_from(at).ok());
        match at.and_then(|at| placed.get_mut(at)) {
            Some(place @ None) => *place = Some((name, number)),
            _ => others.push((name, number)),
        }
    }
    let mut others = others.into_iter();
    // There are as many of them as places that are free.
    let all = placed
        .into_iter()
        .map(|place| place.or_else(|| others.next()));
    all.flatten().collect()
}

/// Puts them there.
fn place(placed: &[(&str, RawFd)]) -> Result<()> {
    for (number, (_, from)) in (FIRST..).zip(placed) {
        if *from == number {
            // SAFETY: two integers and a flag.
            checked(unsafe { libc::fcntl(number, libc::F_SETFD, 0) })?;
            continue;
        }
        // SAFETY: two integers. The process that comes here becomes another
        // program at once or ends, so nobody uses what had the number.
        checked(unsafe { libc::dup2(*from, number) })?;
        if usize::try_from(from - FIRST).is_ok_and(|at| at >= placed.len()) {
            // SAFETY: an integer, the number of a descriptor that is there a second
            // time now. Its owner is not dropped in this process: see above.
            unsafe { libc::close(*from) };
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_with_numbers() {
        let all = |names, count| named(names, count).collect::<Vec<_>>();
        let name = |number, name: &str| (number, name.to_owned());
        assert_eq!(all("a:b", 2), [name(3, "a"), name(4, "b")]);
        assert_eq!(all("a:b", 1), [name(3, "a")]);
        assert_eq!(all("a", 2), [name(3, "a"), name(4, "unknown")]);
        assert!(all("", 0).is_empty());
    }

    #[test]
    fn descriptors_stay_where_they_are_if_they_may() {
        let all = |fds: &[(&'static str, RawFd)]| places(fds.to_vec());
        assert_eq!(all(&[("a", 3), ("b", 4)]), [("a", 3), ("b", 4)]);
        assert_eq!(all(&[("a", 4), ("b", 3)]), [("b", 3), ("a", 4)]);
        assert_eq!(
            all(&[("a", 90), ("b", 4), ("c", 1)]),
            [("a", 90), ("b", 4), ("c", 1)]
        );
        assert_eq!(all(&[("a", 3), ("b", 3)]), [("a", 3), ("b", 3)]);
        assert!(all(&[]).is_empty());
    }

    #[test]
    fn what_this_program_has_opened_itself_is_not_taken() {
        let file = tempfile::tempfile().unwrap();
        assert!(adopt(file.as_raw_fd()).is_none());
        assert!(adopt(-1).is_none());
        assert!(rustix::io::fcntl_getfd(&file).is_ok());
    }
}
