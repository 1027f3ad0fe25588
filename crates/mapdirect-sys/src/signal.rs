//! signal(7) and signalfd(2): waiting for signals as for anything else.

use crate::{Result, checked, last_errno};
use std::os::fd::{FromRawFd, OwnedFd};

/// A set of signals, blocked in the calling thread (and the threads it makes
/// from then on) and readable from a descriptor instead.
#[derive(Debug)]
pub struct SignalFd {
    fd: OwnedFd,
}

impl SignalFd {
    /// Blocks `signals` and opens a descriptor for them. Call it before any
    /// thread is made, or the signals reach the threads that do not block
    /// them.
    ///
    /// # Errors
    ///
    /// `EMFILE`, `ENFILE`, `ENOMEM`.
    pub fn block(signals: &[i32]) -> Result<Self> {
        let set = signal_set(signals);
        // SAFETY: reads the set; the old mask is not asked for.
        let ret =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if ret != 0 {
            return Err(crate::Errno::from_raw_os_error(ret));
        }
        // SAFETY: reads the set; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(last_errno());
        }
        // SAFETY: the kernel just gave us this descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    /// Waits for one of the signals and returns its number.
    ///
    /// # Errors
    ///
    /// Whatever `read(2)` answers.
    pub fn wait(&self) -> Result<i32> {
        let mut record = [0u8; size_of::<libc::signalfd_siginfo>()];
        loop {
            match rustix::io::read(&self.fd, &mut record) {
                Ok(_) => {
                    // ssi_signo is the first field.
                    let mut number = [0; 4];
                    number.copy_from_slice(&record[..4]);
                    return Ok(i32::from_ne_bytes(number));
                }
                Err(crate::Errno::INTR) => {}
                Err(other) => return Err(other),
            }
        }
    }
}

impl std::os::fd::AsFd for SignalFd {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Unblocks every signal in the calling thread, as a program about to be
/// executed expects it. Async-signal-safe.
///
/// # Errors
///
/// None in practice.
pub fn unblock_all() -> Result<()> {
    let set = signal_set(&[]);
    // SAFETY: reads the set only.
    let ret =
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) };
    if ret == 0 {
        Ok(())
    } else {
        Err(crate::Errno::from_raw_os_error(ret))
    }
}

/// Ignores a signal in the whole process. Meant for `SIGIO`, which a lease
/// taken for a moment can raise and whose default action ends the process.
///
/// # Errors
///
/// `EINVAL` for a number that is no signal or cannot be ignored.
pub fn ignore(signal: i32) -> Result<()> {
    // SAFETY: SIG_IGN runs no code of ours.
    let previous = unsafe { libc::signal(signal, libc::SIG_IGN) };
    if previous == libc::SIG_ERR {
        return Err(last_errno());
    }
    Ok(())
}

/// Sends `signal` to a process.
///
/// # Errors
///
/// `ESRCH`, `EPERM`.
pub fn kill(pid: i32, signal: i32) -> Result<()> {
    // SAFETY: two integers.
    checked(unsafe { libc::kill(pid, signal) }).map(drop)
}

fn signal_set(signals: &[i32]) -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the whole set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialised by the line above.
    let mut set = unsafe { set.assume_init() };
    for signal in signals {
        // SAFETY: adds one bit; a number out of range is refused unchanged.
        unsafe { libc::sigaddset(&raw mut set, *signal) };
    }
    set
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocked_signal_is_read() {
        let signals = SignalFd::block(&[libc::SIGUSR2]).unwrap();
        // SAFETY: sends a blocked signal to the calling thread alone.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGUSR2) };
        assert_eq!(signals.wait(), Ok(libc::SIGUSR2));
    }
}
