//! signal(7) and signalfd(2): receiving signals through a descriptor.

use crate::{Result, checked, last_errno};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The `si_code` of a signal that the kernel itself has sent.
const SI_KERNEL: i32 = 0x80;

/// The numbers of signals.
#[derive(Clone, Copy, Debug)]
pub struct Signal;

impl Signal {
    /// `SIGINT`.
    pub const INTERRUPT: i32 = libc::SIGINT;
    /// `SIGTERM`.
    pub const TERMINATE: i32 = libc::SIGTERM;
    /// `SIGHUP`.
    pub const HANGUP: i32 = libc::SIGHUP;
    /// `SIGQUIT`.
    pub const QUIT: i32 = libc::SIGQUIT;
    /// `SIGUSR1`.
    pub const USER_1: i32 = libc::SIGUSR1;
    /// `SIGUSR2`.
    pub const USER_2: i32 = libc::SIGUSR2;
    /// `SIGCHLD`.
    pub const CHILD: i32 = libc::SIGCHLD;
    /// `SIGPIPE`.
    pub const PIPE: i32 = libc::SIGPIPE;
    /// `SIGBUS`.
    pub const BUS: i32 = libc::SIGBUS;
    /// `SIGKILL`.
    pub const KILL: i32 = libc::SIGKILL;
    /// `SIGSTOP`.
    pub const STOP: i32 = libc::SIGSTOP;
    /// `SIGXFSZ`.
    pub const FILE_SIZE: i32 = libc::SIGXFSZ;
    /// `SIGIO`.
    pub const IO: i32 = libc::SIGIO;
    /// `SIGWINCH`.
    pub const WINDOW: i32 = libc::SIGWINCH;
    /// `SIGURG`.
    pub const URGENT: i32 = libc::SIGURG;
    /// `SIGCONT`.
    pub const CONTINUE: i32 = libc::SIGCONT;
    /// `SIGTSTP`.
    pub const TERMINAL_STOP: i32 = libc::SIGTSTP;
    /// `SIGTTIN`.
    pub const TERMINAL_INPUT: i32 = libc::SIGTTIN;
    /// `SIGTTOU`.
    pub const TERMINAL_OUTPUT: i32 = libc::SIGTTOU;

    /// Whether a fault of the thread that it is delivered to raises it.
    fn is_fault(number: i32) -> bool {
        [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGTRAP,
            libc::SIGSYS,
            libc::SIGABRT,
        ]
        .contains(&number)
    }
}

/// A signal that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// The number of the signal.
    pub number: i32,
    /// Whether the kernel sent the signal for a key on the terminal: then every
    /// process of the foreground group got it.
    pub from_terminal: bool,
}

/// A set of signals that are blocked in the calling thread (and in threads that
/// it starts later) and can be read from a descriptor instead.
#[derive(Debug)]
pub struct SignalFd {
    fd: OwnedFd,
}

impl SignalFd {
    /// Blocks `signals` and opens a descriptor for them. Call this before any
    /// thread is started. Otherwise the signals reach threads that do not block
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

    /// Blocks every signal that does not come from a fault of this process
    /// itself, as [`block`](Self::block) does, and returns the mask from before
    /// as well. SIGKILL and SIGSTOP cannot be blocked.
    ///
    /// # Errors
    ///
    /// `EMFILE`, `ENFILE`, `ENOMEM`.
    pub fn block_all() -> Result<(Self, Before)> {
        let others = (1..=libc::SIGRTMAX()).filter(|number| !Signal::is_fault(*number));
        let mut before = signal_set(&[]);
        // SAFETY: writes the mask; no new one is given.
        let ret =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut before) };
        if ret != 0 {
            return Err(crate::Errno::from_raw_os_error(ret));
        }
        let signals = Self::block(&others.collect::<Vec<_>>())?;
        Ok((signals, Before(before)))
    }

    /// Waits for one of the signals.
    ///
    /// # Errors
    ///
    /// Whatever `read(2)` answers.
    pub fn wait(&self) -> Result<Received> {
        let mut record = [0u8; size_of::<libc::signalfd_siginfo>()];
        loop {
            match rustix::io::read(&self.fd, &mut record) {
                Ok(_) => {
                    // ssi_signo and ssi_code: the first and third field.
                    let field = |at: usize| {
                        let mut number = [0; 4];
                        number.copy_from_slice(&record[at..at + 4]);
                        i32::from_ne_bytes(number)
                    };
                    return Ok(Received {
                        number: field(0),
                        from_terminal: field(8) == SI_KERNEL,
                    });
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

/// The mask of blocked signals from before [`SignalFd::block_all`].
#[derive(Clone, Copy)]
pub struct Before(libc::sigset_t);

impl std::fmt::Debug for Before {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Before").finish_non_exhaustive()
    }
}

impl Before {
    /// Makes `command` run with this mask.
    pub fn in_child(self, command: &mut Command) {
        mask_in_child(command, self.0);
    }
}

/// Makes `command` run with no signal blocked, as programs expect. Otherwise it
/// would inherit the mask of [`SignalFd::block`].
pub fn unblocked_in_child(command: &mut Command) {
    mask_in_child(command, signal_set(&[]));
}

fn mask_in_child(command: &mut Command, set: libc::sigset_t) {
    let unblock = move || {
        // SAFETY: reads the set only, and is async-signal-safe.
        let ret =
            unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) };
        if ret == 0 {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error())
        }
    };
    // SAFETY: between fork and exec the closure makes one async-signal-safe
    // call and neither allocates nor locks.
    unsafe { command.pre_exec(unblock) };
}

/// Ignores a signal in the whole process, and in what it executes. This is for
/// those whose default action ends it without a word: `SIGIO`, which a short lease
/// can raise, and `SIGXFSZ`, beside which a write fails anyway.
///
/// # Errors
///
/// `EINVAL` for a number that is not a signal, or for a signal that cannot be
/// ignored.
pub fn ignore(signal: i32) -> Result<()> {
    // SAFETY: SIG_IGN runs no code of ours.
    let previous = unsafe { libc::signal(signal, libc::SIG_IGN) };
    if previous == libc::SIG_ERR {
        return Err(last_errno());
    }
    Ok(())
}

/// The calling thread's earlier mask of blocked signals. Dropping this value
/// restores it.
#[derive(Debug)]
#[must_use = "the mask is restored when this is dropped"]
pub struct Mask(libc::sigset_t);

/// Blocks every signal in the calling thread, so that signals for the process
/// are not delivered to a thread that it starts.
///
/// # Errors
///
/// None in practice.
pub fn block_all() -> Result<Mask> {
    let mut all = signal_set(&[]);
    // SAFETY: fills an initialised set.
    unsafe { libc::sigfillset(&raw mut all) };
    let mut before = signal_set(&[]);
    // SAFETY: reads one set and writes the other.
    let ret = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) };
    if ret != 0 {
        return Err(crate::Errno::from_raw_os_error(ret));
    }
    Ok(Mask(before))
}

impl Drop for Mask {
    fn drop(&mut self) {
        // SAFETY: reads a set that the kernel gave us; it cannot fail.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut())
        };
    }
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

/// Stops the calling process as `number` stops one that does not handle it:
/// SIGSTOP, SIGTSTP, SIGTTIN or SIGTTOU. Returns when it was continued, or at
/// once if the signal is ignored or the process group is orphaned.
///
/// # Errors
///
/// `EINVAL` for another signal.
pub fn stop_by(number: i32) -> Result<()> {
    let stops = [libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];
    if !stops.contains(&number) {
        return Err(crate::Errno::INVAL);
    }
    kill(std::process::id().cast_signed(), number)?;
    let set = signal_set(&[number]);
    let mut before = signal_set(&[]);
    // The signal is delivered here, if it was blocked.
    // SAFETY: reads one set and writes the other. Nothing here handles the
    // signal, so no code runs.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, &raw mut before) };
    // SAFETY: reads a set that the kernel gave us; it cannot fail.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    Ok(())
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
        // SAFETY: takes nothing and cannot fail.
        let own = unsafe { libc::pthread_self() };
        // SAFETY: sends a blocked signal to the calling thread alone.
        unsafe { libc::pthread_kill(own, libc::SIGUSR2) };
        let received = signals.wait().unwrap();
        assert_eq!(received.number, libc::SIGUSR2);
        assert!(!received.from_terminal);
    }

    #[test]
    fn a_mask_is_restored() {
        let blocked = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let line = status.lines().find(|line| line.starts_with("SigBlk"));
            line.unwrap().to_owned()
        };
        let before = blocked();
        let mask = block_all().unwrap();
        assert_ne!(blocked(), before);
        drop(mask);
        assert_eq!(blocked(), before);
    }

    #[test]
    fn a_child_has_nothing_blocked() {
        let _signals = SignalFd::block(&[libc::SIGUSR1]).unwrap();
        let mut command = Command::new("grep");
        command.args(["SigBlk", "/proc/self/status"]);
        unblocked_in_child(&mut command);
        let output = command.output().unwrap().stdout;
        let text = String::from_utf8(output).unwrap();
        assert_eq!(text.trim(), "SigBlk:\t0000000000000000");
    }
}
