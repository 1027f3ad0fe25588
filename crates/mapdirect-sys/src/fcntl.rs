//! fcntl(2): leases and open-file-description locks, the two ways to find out
//! who else has a file open.

use crate::seam::{self, Call};
use crate::{Errno, Result, checked};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

/// The two leases of `F_SETLEASE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    /// `F_RDLCK`: granted only while no description of the inode is open for
    /// writing. The description itself must be read-only.
    NoWriter,
    /// `F_WRLCK`: granted only if this description is the only one of the
    /// inode. Memory mappings and kernel users (loop devices, swap files)
    /// count; `O_PATH` descriptors do not.
    Sole,
}

/// `F_GETFL` with an argument that the kernel ignores. A security module that
/// watches fcntl(2) may look at it.
///
/// # Errors
///
/// Any error of such a module.
pub fn get_flags_with(file: BorrowedFd<'_>, word: u64) -> Result<i32> {
    // SAFETY: F_GETFL takes no argument, so any is ignored.
    checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL, word) })
}

/// Excludes short leases and reading fanotify events from each other: taking a
/// lease locks this exclusively, reading events shares it. The kernel opens the
/// file to make the descriptor of an event. If there is a lease on the file,
/// that open fails ([`fanotify`](crate::fanotify) says why it may not wait),
/// and the event is answered with `EPERM`.
static LEASE_OR_EVENTS: RwLock<()> = RwLock::new(());

/// Keeps this process from taking short leases until the result is dropped.
pub(crate) fn no_lease() -> RwLockReadGuard<'static, ()> {
    LEASE_OR_EVENTS
        .read()
        .unwrap_or_else(PoisonError::into_inner)
}

/// Checks whether the condition of `lease` holds right now, by taking the lease
/// and giving it back at once.
///
/// This is a proof, not a guess: `check_conflicting_open` (fs/locks.c, 6.1 to
/// 7.3) compares the inode's counts of writable and read-only descriptions with
/// this one's share. An `open(2)` under way counts from before its permission
/// check. So an open that escaped an earlier fanotify mark is seen here.
///
/// An open can break the lease in the short time that it exists. The calling
/// process must ignore the signal of that (`SIGIO`).
///
/// # Errors
///
/// `EACCES` for a file of another user without `CAP_LEASE`. `EINVAL` when there
/// are no leases (`/proc/sys/fs/leases-enable` is 0, or the filesystem has
/// none).
pub fn lease_holds(file: BorrowedFd<'_>, lease: Lease) -> Result<bool> {
    seam::check(Call::SetLease)?;
    let kind = match lease {
        Lease::NoWriter => libc::F_RDLCK,
        Lease::Sole => libc::F_WRLCK,
    };
    // F_SETLEASE makes the caller the owner of the description's signals, so
    // the former owner must be restored.
    let owner = signal_owner(file)?;
    let no_events = LEASE_OR_EVENTS
        .write()
        .unwrap_or_else(PoisonError::into_inner);
    // SAFETY: F_SETLEASE takes an integer; `file` is open for the call.
    let taken = checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) });
    let holds = match taken {
        Ok(_) => true,
        Err(Errno::AGAIN) => false,
        Err(other) => return Err(other),
    };
    if holds {
        // SAFETY: as above.
        checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) })?;
    }
    drop(no_events);
    if holds {
        // The old owner may have died since (ESRCH). Then there is nobody to
        // restore.
        let _ = set_signal_owner(file, owner);
    }
    Ok(holds)
}

/// The lease [`Lease::Sole`], held until this value is dropped. Anybody who
/// opens the file meanwhile waits, for `/proc/sys/fs/lease-break-time` (45 s)
/// at most.
///
/// The lease keeps other descriptions away. It does not restrict users of
/// *this* description: other threads, children that inherited it, mappings made
/// from it, rings.
#[derive(Debug)]
pub struct HeldLease<'file> {
    file: BorrowedFd<'file>,
    owner: FOwnerEx,
}

impl<'file> HeldLease<'file> {
    /// Takes the lease. Returns `None` if somebody else has the file open, or
    /// if the caller already has a lease on the description.
    ///
    /// An open that waits for the lease is announced by a signal (`SIGIO`),
    /// whose default action ends the process. So the signal goes to a thread
    /// that has ended: F_SETLEASE keeps an existing owner (`f_modown` without
    /// force, fs/fcntl.c), and a former thread is as good as any.
    /// [`is_undisturbed`](Self::is_undisturbed) gives the same information.
    ///
    /// # Errors
    ///
    /// As [`lease_holds`], and `EAGAIN` if no thread can be started.
    pub fn take(file: BorrowedFd<'file>) -> Result<Option<Self>> {
        seam::check(Call::SetLease)?;
        // SAFETY: F_GETLEASE takes nothing; `file` is open for the call.
        let there = checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) })?;
        if there != libc::F_UNLCK {
            return Ok(None);
        }
        let owner = signal_owner(file)?;
        give_signals_to_nobody(file)?;
        // SAFETY: F_SETLEASE takes an integer.
        let taken =
            checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) });
        match taken {
            Ok(_) => Ok(Some(Self { file, owner })),
            Err(errno) => {
                let _ = set_signal_owner(file, owner);
                if errno == Errno::AGAIN {
                    Ok(None)
                } else {
                    Err(errno)
                }
            }
        }
    }

    /// Whether nobody is waiting for the lease to go, and nobody was let in
    /// since.
    #[must_use]
    pub fn is_undisturbed(&self) -> bool {
        // A lease that is being broken is told as what will become of it
        // (fcntl_getlease, fs/locks.c).
        // SAFETY: F_GETLEASE takes nothing.
        let there = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_GETLEASE) };
        there == libc::F_WRLCK
    }
}

impl Drop for HeldLease<'_> {
    fn drop(&mut self) {
        // SAFETY: F_SETLEASE takes an integer.
        let _ = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
        // The old owner may have died since: then the owner is a dead one
        // anyway.
        let _ = set_signal_owner(self.file, self.owner);
    }
}

/// `F_OWNER_TID`.
const OWNER_THREAD: libc::c_int = 0;

/// Makes a thread that has ended the owner of the description's signals. They
/// then reach nobody: a signal to one thread is never handed to another
/// (`complete_signal`, kernel/signal.c).
fn give_signals_to_nobody(file: BorrowedFd<'_>) -> Result<()> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .spawn_scoped(scope, || {
                let own = FOwnerEx {
                    kind: OWNER_THREAD,
                    pid: rustix::thread::gettid().as_raw_nonzero().get(),
                };
                set_signal_owner(file, own)
            })
            .map_err(|_| Errno::AGAIN)?;
        thread.join().unwrap_or(Err(Errno::AGAIN))
    })
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FOwnerEx {
    kind: libc::c_int,
    pid: libc::pid_t,
}

const F_SETOWN_EX: libc::c_int = 15;
const F_GETOWN_EX: libc::c_int = 16;

fn signal_owner(file: BorrowedFd<'_>) -> Result<FOwnerEx> {
    let mut owner = FOwnerEx { kind: 0, pid: 0 };
    // SAFETY: F_GETOWN_EX writes one `struct f_owner_ex`, which FOwnerEx
    // mirrors (include/uapi/asm-generic/fcntl.h), to the pointer given.
    checked(unsafe { libc::fcntl(file.as_raw_fd(), F_GETOWN_EX, &raw mut owner) })?;
    Ok(owner)
}

fn set_signal_owner(file: BorrowedFd<'_>, owner: FOwnerEx) -> Result<()> {
    // SAFETY: F_SETOWN_EX reads one `struct f_owner_ex` from the pointer.
    checked(unsafe { libc::fcntl(file.as_raw_fd(), F_SETOWN_EX, &raw const owner) }).map(drop)
}

/// A lock found on a file by [`conflicting_lock`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundLock {
    /// First byte of the lock.
    pub start: u64,
    /// Length in bytes; 0 means up to the largest offset.
    pub length: u64,
    /// The process that holds the lock, or `None` if the lock belongs to an
    /// open file description.
    pub pid: Option<i32>,
}

/// Takes a shared lock on one byte through `file`'s open file description
/// (`F_OFD_SETLK`). The lock lives exactly as long as the description: through
/// fork, descriptor passing and `close`, until the last mapping made from the
/// description is gone.
///
/// The lock is shared, so that it does not conflict with other programs' shared
/// locks "to the end of the file".
///
/// # Errors
///
/// `EAGAIN` when somebody holds an exclusive lock over the byte.
pub fn lock_byte_shared(file: BorrowedFd<'_>, byte: u64) -> Result<()> {
    seam::check(Call::OfdSetLock)?;
    let lock = flock(libc::F_RDLCK, byte, 1)?;
    // SAFETY: F_OFD_SETLK reads one `struct flock` from the pointer.
    checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }).map(drop)
}

/// A lock with which an exclusive lock of `length` bytes at `start` (0: to the
/// end) through `file`'s description would conflict. `file`'s own locks never
/// count.
///
/// # Errors
///
/// `EINVAL` for an offset beyond `i64::MAX`.
pub fn conflicting_lock(
    file: BorrowedFd<'_>,
    start: u64,
    length: u64,
) -> Result<Option<FoundLock>> {
    let mut lock = flock(libc::F_WRLCK, start, length)?;
    // SAFETY: F_OFD_GETLK reads and writes one `struct flock`.
    checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) })?;
    if i32::from(lock.l_type) == libc::F_UNLCK {
        return Ok(None);
    }
    Ok(Some(FoundLock {
        start: lock.l_start.cast_unsigned(),
        length: lock.l_len.cast_unsigned(),
        pid: (lock.l_pid > 0).then_some(lock.l_pid),
    }))
}

/// Who owns a record lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockOwner {
    /// The process (`F_SETLK`, POSIX): lost when the process closes *any*
    /// descriptor of the file.
    Process,
    /// The open file description (`F_OFD_SETLK`).
    Description,
}

/// What to do with the record locks of a byte range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Lock shared.
    Shared,
    /// Lock exclusively.
    Exclusive,
    /// Unlock.
    Unlock,
}

/// Sets or clears a record lock without waiting; `length` 0 means to the end.
///
/// # Errors
///
/// `EAGAIN` or `EACCES` on conflict.
pub fn set_lock(
    file: BorrowedFd<'_>,
    owner: LockOwner,
    kind: LockKind,
    start: u64,
    length: u64,
) -> Result<()> {
    let command = match owner {
        LockOwner::Process => libc::F_SETLK,
        LockOwner::Description => libc::F_OFD_SETLK,
    };
    let kind = match kind {
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Exclusive => libc::F_WRLCK,
        LockKind::Unlock => libc::F_UNLCK,
    };
    let lock = flock(kind, start, length)?;
    // SAFETY: both commands read one `struct flock` from the pointer.
    checked(unsafe { libc::fcntl(file.as_raw_fd(), command, &raw const lock) }).map(drop)
}

fn flock(kind: libc::c_int, start: u64, length: u64) -> Result<libc::flock> {
    Ok(libc::flock {
        l_type: libc::c_short::try_from(kind).map_err(|_| Errno::INVAL)?,
        l_whence: 0, // SEEK_SET
        l_start: i64::try_from(start).map_err(|_| Errno::INVAL)?,
        l_len: i64::try_from(length).map_err(|_| Errno::INVAL)?,
        l_pid: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    fn two_descriptions() -> (tempfile::NamedTempFile, File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let second = File::options()
            .read(true)
            .write(true)
            .open(file.path())
            .unwrap();
        (file, second)
    }

    #[test]
    fn a_byte_lock_is_seen_by_others_and_not_by_its_own_description() {
        let (first, second) = two_descriptions();
        let byte = (1 << 62) + 7;
        lock_byte_shared(first.as_file().as_fd(), byte).unwrap();
        let found = conflicting_lock(second.as_fd(), byte, 1).unwrap();
        assert_eq!(
            found,
            Some(FoundLock {
                start: byte,
                length: 1,
                pid: None
            })
        );
        let own = conflicting_lock(first.as_file().as_fd(), byte, 1).unwrap();
        assert_eq!(own, None);
        drop(first);
        let found = conflicting_lock(second.as_fd(), byte, 1).unwrap();
        assert_eq!(found, None);
    }

    #[test]
    fn offsets_beyond_the_kernels_are_refused() {
        let (first, _second) = two_descriptions();
        let refused = lock_byte_shared(first.as_file().as_fd(), u64::MAX);
        assert_eq!(refused, Err(Errno::INVAL));
    }

    #[test]
    fn a_sole_lease_fails_beside_a_second_description() {
        let (first, second) = two_descriptions();
        assert_eq!(
            lease_holds(first.as_file().as_fd(), Lease::Sole),
            Ok(false),
            "a second description is open"
        );
        drop(second);
        assert_eq!(lease_holds(first.as_file().as_fd(), Lease::Sole), Ok(true));
        // And the lease was given back: opening again does not block.
        drop(File::open(first.path()).unwrap());
    }

    #[test]
    fn a_held_lease_keeps_openers_waiting_and_kills_nobody() {
        let (first, second) = two_descriptions();
        let file = first.as_file().as_fd();
        assert!(HeldLease::take(file).unwrap().is_none(), "two are open");
        drop(second);
        let lease = HeldLease::take(file).unwrap().unwrap();
        assert!(lease.is_undisturbed());
        assert!(HeldLease::take(file).unwrap().is_none(), "it is taken");
        let path = first.path().to_owned();
        let opening = std::thread::spawn(move || File::open(path).unwrap());
        while lease.is_undisturbed() {
            std::thread::yield_now();
        }
        // SIGIO would have ended this process by now.
        assert!(!opening.is_finished());
        drop(lease);
        drop(opening.join().unwrap());
        let lease = HeldLease::take(file).unwrap().unwrap();
        assert!(lease.is_undisturbed());
    }

    #[test]
    fn the_owner_of_signals_is_who_it_was() {
        let (first, second) = two_descriptions();
        drop(second);
        let file = first.as_file().as_fd();
        let own = std::process::id().cast_signed();
        for pid in [0, own] {
            let owner = FOwnerEx { kind: 1, pid }; // F_OWNER_PID
            set_signal_owner(file, owner).unwrap();
            let lease = HeldLease::take(file).unwrap().unwrap();
            // A thread that has been joined is on its way out for a moment more.
            let began = std::time::Instant::now();
            while signal_owner(file).unwrap().pid != 0 {
                assert!(began.elapsed().as_secs() < 10, "nobody");
                std::thread::yield_now();
            }
            drop(lease);
            assert_eq!(signal_owner(file).unwrap().pid, pid);
        }
    }
}
