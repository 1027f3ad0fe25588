//! Record locks of the caller on a file about to be pinned.
//!
//! A pin makes the caller's process close descriptors of the file, and has
//! its own description replaced. Both can cost locks: POSIX locks go when the
//! process closes *any* descriptor of the file (fcntl_locking(2)), and
//! description locks and `flock(2)` go with their description. Nothing of
//! that happens silently: POSIX locks are refused, the others are carried
//! over while the guard holds back every open.

use crate::error::{Error, Kind, Result};
use mapdirect_sys::fcntl::{self, LockKind, LockOwner};
use mapdirect_sys::proc_locks::{Kind as Found, Lock};
use mapdirect_sys::{Errno, proc};
use rustix::fs::FlockOperation;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Where the guard marks pins: no lock may reach here.
const LIMIT: u64 = 1 << 62;

fn locks_of(file: BorrowedFd<'_>) -> Vec<Lock> {
    let own = std::process::id().cast_signed();
    proc::read_task_file(own, &format!("fdinfo/{}", file.as_raw_fd()))
        .map(|text| proc::parse_fdinfo(&text).locks)
        .unwrap_or_default()
}

/// Refuses to go on where the process would lose POSIX locks.
pub(crate) fn refuse_posix_locks(file: BorrowedFd<'_>) -> Result<()> {
    // One call tells that nobody has locks: the usual case.
    if fcntl::conflicting_lock(file, 0, 0) == Ok(None) {
        return Ok(());
    }
    if locks_of(file).iter().all(|lock| lock.kind != Found::Posix) {
        return Ok(());
    }
    Err(Error::new(
        Kind::Locked,
        Errno::TXTBSY,
        "this process holds POSIX record locks on the file, which the kernel drops when any \
         descriptor of the file is closed",
        "use open-file-description locks (F_OFD_SETLK), or lock after mapping",
    ))
}

/// Moves description locks and `flock` from one description to another of the
/// same file. Nobody else can take them meanwhile: the guard holds back every
/// open, and has made sure that nobody has the file open who could.
pub(crate) fn carry(old: BorrowedFd<'_>, new: BorrowedFd<'_>) -> Result<()> {
    for lock in locks_of(old) {
        let moved = match lock.kind {
            Found::Description => carry_description_lock(old, new, &lock),
            Found::Flock => carry_flock(old, new, lock.exclusive),
            Found::Posix | Found::Lease => Ok(()),
        };
        moved.map_err(|errno| {
            Error::new(
                Kind::Locked,
                Errno::TXTBSY,
                format!("a lock on the file could not be carried over: {errno}"),
                "lock the file after mapping it",
            )
        })?;
    }
    Ok(())
}

fn carry_description_lock(
    old: BorrowedFd<'_>,
    new: BorrowedFd<'_>,
    lock: &Lock,
) -> std::result::Result<(), Errno> {
    if lock.start >= LIMIT {
        // A mark of the guard: it stays, and tells when `old` is gone.
        return Ok(());
    }
    let kind = if lock.exclusive {
        LockKind::Exclusive
    } else {
        LockKind::Shared
    };
    let last = lock.last.unwrap_or(u64::MAX).min(LIMIT - 1);
    let length = last - lock.start + 1;
    let owner = LockOwner::Description;
    fcntl::set_lock(old, owner, LockKind::Unlock, lock.start, length)?;
    if lock.last.is_none_or(|last| last >= LIMIT) {
        // What is left of a lock "to the end" would cover the marks.
        fcntl::set_lock(old, owner, LockKind::Shared, LIMIT, 0)?;
    }
    fcntl::set_lock(new, owner, kind, lock.start, length)
}

fn carry_flock(
    old: BorrowedFd<'_>,
    new: BorrowedFd<'_>,
    exclusive: bool,
) -> std::result::Result<(), Errno> {
    rustix::fs::flock(old, FlockOperation::Unlock)?;
    rustix::fs::flock(
        new,
        if exclusive {
            FlockOperation::NonBlockingLockExclusive
        } else {
            FlockOperation::NonBlockingLockShared
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn lock(file: &std::fs::File, owner: LockOwner, start: u64, length: u64) {
        fcntl::set_lock(file.as_fd(), owner, LockKind::Exclusive, start, length).unwrap();
    }

    #[test]
    fn posix_locks_are_refused_and_others_are_not() {
        let file = tempfile::tempfile().unwrap();
        assert!(refuse_posix_locks(file.as_fd()).is_ok());
        lock(&file, LockOwner::Description, 0, 10);
        assert!(refuse_posix_locks(file.as_fd()).is_ok());
        lock(&file, LockOwner::Process, 20, 10);
        let error = refuse_posix_locks(file.as_fd()).unwrap_err();
        assert_eq!(error.kind(), Kind::Locked);
    }

    #[test]
    fn description_locks_move_as_they_were() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let (old, new, third) = (
            named.reopen().unwrap(),
            named.reopen().unwrap(),
            named.reopen().unwrap(),
        );
        lock(&old, LockOwner::Description, 5, 10);
        lock(&old, LockOwner::Description, 100, 0);
        rustix::fs::flock(&old, FlockOperation::LockExclusive).unwrap();
        carry(old.as_fd(), new.as_fd()).unwrap();
        // The new one holds them: it sees no conflict, others do.
        let conflict = |file: &std::fs::File, at| fcntl::conflicting_lock(file.as_fd(), at, 1);
        for at in [5, 14, 100, LIMIT - 1] {
            assert_eq!(conflict(&new, at), Ok(None), "{at}");
            assert!(conflict(&third, at).unwrap().is_some(), "{at}");
        }
        assert_eq!(conflict(&third, 15), Ok(None));
        // And the marks of the guard have room.
        drop(old);
        assert_eq!(conflict(&third, LIMIT), Ok(None));
        let flocked = rustix::fs::flock(&third, FlockOperation::NonBlockingLockShared);
        assert_eq!(flocked, Err(Errno::AGAIN));
    }
}
