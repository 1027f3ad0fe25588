//! Ways to wait: for a descriptor, for a wake-up, for a while.

use crate::Errno;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A descriptor that becomes readable when somebody wakes its owner.
#[derive(Clone, Debug)]
pub(crate) struct Waker(Arc<OwnedFd>);

impl Waker {
    pub(crate) fn new() -> Result<Self, Errno> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self(Arc::new(rustix::event::eventfd(0, flags)?)))
    }

    /// The descriptor, for a thread with a descriptor table of its own.
    pub(crate) fn shared(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.0)
    }

    /// Whether both wake the same owner.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(crate) fn wake(&self) {
        // This fails only when the counter is full, and then the owner is woken
        // already.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    pub(crate) fn clear(&self) {
        // If there is nothing to read, there is nothing to clear.
        let _ = rustix::io::read(&*self.0, &mut [0u8; 8]);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until one of `fds` is readable or the time is over, and says which are
/// readable.
pub(crate) fn wait_any<const N: usize>(
    fds: &[BorrowedFd<'_>; N],
    timeout: Option<Duration>,
) -> Result<[bool; N], Errno> {
    let mut polled = fds.each_ref().map(|fd| PollFd::new(fd, PollFlags::IN));
    let timeout = timeout.map(|timeout| Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    match rustix::event::poll(&mut polled, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(other) => return Err(other),
    }
    Ok(polled.map(|fd| !fd.revents().is_empty()))
}

/// Whether the other end of a pipe is closed everywhere.
pub(crate) fn has_hung_up(pipe: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(pipe, PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(rustix::event::poll(&mut polled, Some(&now)), Ok(1))
        && polled[0].revents().contains(PollFlags::HUP)
}

/// Waits repeatedly for something that nobody signals, each time for twice as
/// long, until the time is over.
#[derive(Debug)]
pub(crate) struct Backoff {
    pause: Duration,
    longest: Duration,
    deadline: Instant,
}

impl Backoff {
    /// Waits with pauses from `first` to `longest`, until `deadline`.
    pub(crate) fn until(deadline: Instant, first: Duration, longest: Duration) -> Self {
        Self {
            pause: first,
            longest,
            deadline,
        }
    }

    /// Waits for other programs, as long as whoever asks has patience.
    pub(crate) fn patiently(patience: Duration) -> Self {
        Self::until(
            Instant::now() + patience,
            Duration::from_millis(1),
            Duration::from_millis(20),
        )
    }

    pub(crate) fn is_over(&self) -> bool {
        Instant::now() >= self.deadline
    }

    pub(crate) fn pause(&mut self) {
        std::thread::sleep(self.pause);
        self.pause = self.pause.saturating_mul(2).min(self.longest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_hangs_up_with_its_last_copy() {
        let (reader, writer) = std::io::pipe().unwrap();
        let copy = writer.try_clone().unwrap();
        assert!(!has_hung_up(reader.as_fd()));
        drop(writer);
        assert!(!has_hung_up(reader.as_fd()));
        drop(copy);
        assert!(has_hung_up(reader.as_fd()));
    }

    #[test]
    fn pauses_grow_to_the_longest_and_no_further() {
        let deadline = Instant::now() + Duration::from_secs(3600);
        let longest = Duration::from_micros(3);
        let mut backoff = Backoff::until(deadline, Duration::from_nanos(1), longest);
        for _ in 0..200 {
            backoff.pause();
        }
        assert_eq!(backoff.pause, longest);
        assert!(!backoff.is_over());
        backoff.deadline = Instant::now();
        assert!(backoff.is_over());
    }
}
