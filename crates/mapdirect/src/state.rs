//! What becomes of a pin, as its holder sees it.

use mapdirect_proto::Breach;
use mapdirect_sys::Errno;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Whether a pin is kept.
///
/// | state | what it means | how it ends |
/// | --- | --- | --- |
/// | `Kept` | a guard is there, and the promise holds | |
/// | `Unattended` | no guard can be heard, and whatever would break the promise is still refused | the library connects again by itself as soon as a guard answers ([`reconnect`](crate::Pin::reconnect) does not wait for that): `Kept`, or `Lost` |
/// | `Lost` | the promise has ended, or was broken | never: map or pin the file again |
///
/// When a filesystem is shut down, every pin on it is lost: no block moves any
/// more, but what is stored is never written to them.
///
/// Under the fanotify gate the next guard takes over from one that was killed, and
/// a pin is lost when the guard's supervisor ends (`mapdirect guard` or systemd).
/// Under the bpf gate it is not: the kernel refuses by itself. While no guard
/// answers the library
/// looks five times a second whether the gate is still in the kernel (its
/// directory in the bpf filesystem, of which the guard has passed a descriptor,
/// still has links), and, in a process that may list that directory, whether
/// anything is missing in it. If so, the pin is lost. What a process with less
/// privilege cannot see, the next guard does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// A guard is there: the block map stays as it is.
    #[default]
    Kept,
    /// No guard can be heard. The kernel goes on refusing, but nobody looks
    /// whether anything gets past it.
    Unattended {
        /// Why, for a person.
        why: String,
    },
    /// The promise has ended or was broken: anybody may change the blocks, or
    /// somebody has.
    Lost {
        /// Why, for a person.
        why: String,
    },
}

impl State {
    /// Short for `matches!(state, State::Kept)`.
    #[must_use]
    pub const fn is_kept(&self) -> bool {
        matches!(self, Self::Kept)
    }

    /// Short for `matches!(state, State::Lost { .. })`.
    #[must_use]
    pub const fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. })
    }

    /// Why it is not kept; empty if it is.
    #[must_use]
    pub fn why(&self) -> &str {
        match self {
            Self::Kept => "",
            Self::Unattended { why } | Self::Lost { why } => why,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kept => f.write_str("kept"),
            Self::Unattended { why } => write!(f, "unattended: {why}"),
            Self::Lost { why } => write!(f, "lost: {why}"),
        }
    }
}

/// Whether the blocks of a pin are what they were.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Integrity {
    /// No difference was found.
    #[default]
    Intact,
    /// Blocks have changed.
    Breached {
        /// How often that was found.
        count: u64,
        /// The first 16 breaches, in the order in which they were found.
        breaches: Vec<Breach>,
    },
}

impl Integrity {
    /// Short for `matches!(integrity, Integrity::Intact)`.
    #[must_use]
    pub const fn is_intact(&self) -> bool {
        matches!(self, Self::Intact)
    }
}

/// What becomes of a mapping when blocks of its pin have changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OnBreach {
    /// From then on any access to the mapping raises SIGBUS, and the calls of
    /// [`DirectMap`](crate::DirectMap) fail with `EIO`: what the file is now is
    /// not what was promised. The pin lasts until the mapping is dropped.
    #[default]
    Revoke,
    /// The holder is told, and nothing else happens.
    Tell,
}

/// A descriptor that becomes readable when the state of a pin changes or a
/// breach is found. Hand it to poll(2), epoll(7) or an event loop.
///
/// When it is readable, call [`clear`](Self::clear), and look at
/// [`state`](crate::Pin::state) and [`integrity`](crate::Pin::integrity)
/// afterwards. If the pin is not kept, or was breached, when this is made, it is
/// readable at once. It is an eventfd(2): a child of fork(2) that inherits it
/// shares it.
#[derive(Clone, Debug)]
pub struct EventFd {
    pub(crate) fd: Arc<OwnedFd>,
}

impl EventFd {
    /// Makes it unreadable until the next change, and says whether there was
    /// one.
    pub fn clear(&self) -> bool {
        loop {
            match rustix::io::read(&self.fd, &mut [0; 8]) {
                Err(Errno::INTR) => {}
                read => return read.is_ok(),
            }
        }
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
