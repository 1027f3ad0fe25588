//! fallocate(2) in a child process, so that the call can be given up.
//!
//! On DAX the filesystem waits, inside the call, until no I/O uses a page of
//! the file any more, for ever if need be (`dax_break_layout`, fs/dax.c). Only
//! a signal that ends the thread ends that wait. So a child process makes the
//! call: it can be killed without harm to anybody.

use crate::fallocate::Change;
use crate::seam::{self, Call};
use crate::{Errno, Result, checked, last_errno, proc};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// How often to check what the child is doing.
const LOOK: Duration = Duration::from_millis(50);
/// How long a killed child may take to end.
const ENDING: Duration = Duration::from_secs(2);

/// How often to try again when somebody kills the child.
const TRIES: u32 = 3;

/// Makes a change to the blocks of a file, and gives up when the call has
/// waited for others, doing nothing, for as long as `patience`. Calls `waiting`
/// repeatedly with the time that it has waited so far.
///
/// # Errors
///
/// `ETIMEDOUT` when the call was given up; a part of the change may have been
/// made. Otherwise any error of fallocate(2).
pub fn change(
    file: BorrowedFd<'_>,
    change: Change,
    range: &Range<u64>,
    patience: Duration,
    waiting: &mut dyn FnMut(Duration),
) -> Result<()> {
    seam::check(Call::Fallocate)?;
    for _ in 0..TRIES {
        let child = match Child::start(file, change, range) {
            Ok(child) => child,
            // No child can be created, so make the call without one.
            Err(Errno::NOMEM | Errno::AGAIN | Errno::NOSYS | Errno::INVAL) => {
                return crate::fallocate::change(file, change, range);
            }
            Err(errno) => return Err(errno),
        };
        match child.attend(patience, waiting)? {
            // Somebody killed the child, perhaps by a key on the terminal.
            None => {}
            Some(0) => return Ok(()),
            Some(errno) => return Err(Errno::from_raw_os_error(errno)),
        }
    }
    // The child dies of what it does (`SIGXFSZ`), so let the caller see that.
    crate::fallocate::change(file, change, range)
}

struct Child {
    pid: i32,
    /// Becomes readable when the child has ended.
    pidfd: OwnedFd,
}

impl Child {
    fn start(file: BorrowedFd<'_>, change: Change, range: &Range<u64>) -> Result<Self> {
        let mode = libc::c_long::from(change.flags().bits());
        let offset = i64::try_from(range.start).map_err(|_| Errno::FBIG)?;
        let length =
            i64::try_from(range.end.saturating_sub(range.start)).map_err(|_| Errno::FBIG)?;
        let fd = libc::c_long::from(file.as_raw_fd());
        let parent = rustix::process::getpid().as_raw_nonzero().get();
        let mut pidfd: libc::c_int = -1;
        // Without a signal at the child's end (the low byte of the flags), the
        // program that this code is part of does not notice the child. The bare
        // call is used so that no handler of pthread_atfork runs.
        let flags = libc::c_long::from(libc::CLONE_PIDFD);
        // SAFETY: a stack of 0 has the child go on with a copy of this one, as
        // fork(2) does. The third argument is where the descriptor goes, on
        // all machines; the others are not used with these flags. The child
        // makes system calls with arguments computed before, allocates
        // nothing, takes no lock, and never returns.
        let pid = unsafe {
            libc::syscall(
                libc::SYS_clone,
                flags,
                0_usize,
                &raw mut pidfd,
                0_usize,
                0_usize,
            )
        };
        if pid == 0 {
            let kill = libc::c_long::from(libc::SIGKILL);
            // SAFETY: takes numbers.
            unsafe { libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, kill, 0, 0, 0) };
            // SAFETY: takes nothing.
            let is_orphan =
                unsafe { libc::syscall(libc::SYS_getppid) } != libc::c_long::from(parent);
            // The parent may have died before the child asked to be killed
            // then.
            let status = if is_orphan {
                libc::EINTR
            // SAFETY: takes numbers, computed before.
            } else if unsafe { libc::syscall(libc::SYS_fallocate, fd, mode, offset, length) } < 0 {
                last_errno().raw_os_error()
            } else {
                0
            };
            // SAFETY: ends the process; runs nothing of the parent's.
            unsafe { libc::_exit(status) }
        }
        let pid = i32::try_from(pid).map_err(|_| Errno::OVERFLOW)?;
        checked(if pid < 0 { -1 } else { 0 })?;
        Ok(Self {
            pid,
            // SAFETY: the kernel just gave us this descriptor.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        })
    }

    /// Waits for the child's end. Returns its errno, 0 for none, or `None` if a
    /// signal killed it.
    fn attend(&self, patience: Duration, waiting: &mut dyn FnMut(Duration)) -> Result<Option<i32>> {
        let mut idle_since: Option<Instant> = None;
        // Most calls do not take long.
        let mut look = Duration::from_millis(1);
        loop {
            if self.has_ended_within(look)? {
                return self.status();
            }
            look = LOOK;
            if !self.is_idle() {
                idle_since = None;
                continue;
            }
            let waited = idle_since.get_or_insert_with(Instant::now).elapsed();
            waiting(waited);
            if waited >= patience {
                self.kill()?;
                if self.has_ended_within(ENDING)? {
                    return match self.status()? {
                        // The call finished at the last moment.
                        Some(0) => Ok(Some(0)),
                        _ => Err(Errno::TIMEDOUT),
                    };
                }
                return Err(Errno::TIMEDOUT);
            }
        }
    }

    fn has_ended_within(&self, limit: Duration) -> Result<bool> {
        let until = Instant::now() + limit;
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) => return Ok(!fds[0].revents().is_empty()),
                Err(Errno::INTR) => {}
                Err(other) => return Err(other),
            }
        }
    }

    /// Whether the child sleeps so that a signal could wake it. A process that
    /// waits for a device, for memory or for a lock of the filesystem does not.
    fn is_idle(&self) -> bool {
        let Ok(stat) = proc::read_task_file(self.pid, "stat") else {
            return false;
        };
        stat.rsplit_once(')')
            .is_some_and(|(_, behind)| behind.trim_start().starts_with('S'))
    }

    fn kill(&self) -> Result<()> {
        // SAFETY: takes numbers, and no further information.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                libc::SIGKILL,
                0_usize,
                0,
            )
        };
        checked(if ret < 0 { -1 } else { 0 }).map(drop)
    }

    /// How the child ended. It must have ended.
    fn status(&self) -> Result<Option<i32>> {
        let id = self.pidfd.as_raw_fd().try_into().map_err(|_| Errno::BADF)?;
        loop {
            // SAFETY: all zeros is a valid siginfo_t.
            let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
            // Children without a signal at their end count only with __WALL.
            let options = libc::WEXITED | libc::__WALL;
            // SAFETY: writes one siginfo_t, which is ours.
            let ret = unsafe { libc::waitid(libc::P_PIDFD, id, &raw mut info, options) };
            if ret == 0 {
                // SAFETY: waitid filled in the fields of SIGCHLD.
                let status = unsafe { info.si_status() };
                return Ok((info.si_code == libc::CLD_EXITED).then_some(status));
            }
            match last_errno() {
                Errno::INTR => {}
                other => return Err(other),
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // If the child has been waited for, there is nothing to kill or to wait
        // for.
        let _ = self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_child_does_what_the_call_does() {
        let file = tempfile::tempfile().unwrap();
        let patience = Duration::from_secs(60);
        let result = change(
            file.as_fd(),
            Change::AllocateAndGrow,
            &(0..65536),
            patience,
            &mut |_| (),
        );
        assert_eq!(result, Ok(()));
        assert_eq!(file.metadata().unwrap().len(), 65536);
        let readable = std::fs::File::open("/proc/self/exe").unwrap();
        let result = change(
            readable.as_fd(),
            Change::Allocate,
            &(0..4096),
            patience,
            &mut |_| (),
        );
        assert_eq!(result, Err(Errno::BADF));
    }
}
