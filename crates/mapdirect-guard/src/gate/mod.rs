//! Gates: what refuses an operation that would break a pin.
//!
//! * [`fanotify`]: pre-content permission events, Linux 6.14 and later.
//!   Sound by excluding everybody who could change the file unseen.
//! * `bpf`: BPF LSM and fentry programs, Linux 6.1 and later. Precise, and
//!   still there when the guard is not.
//!
//! Both keep the same contract, [`crate::policy::RULES`].

#[cfg(feature = "bpf")]
pub(crate) mod bpf;
pub(crate) mod fanotify;

use crate::Errno;
use crate::table::{InodeId, Pin, Watched};
use mapdirect_proto::{Notice, WatchedPin};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

/// The gate of a guard.
#[derive(Debug)]
pub(crate) enum Gate {
    /// Permission events.
    Fanotify(Box<fanotify::Gate>),
    /// Programs in the kernel.
    #[cfg(feature = "bpf")]
    Bpf(Box<bpf::Gate>),
}

impl Gate {
    /// Which one it is.
    pub(crate) fn kind(&self) -> mapdirect_proto::Gate {
        match self {
            Self::Fanotify(_) => mapdirect_proto::Gate::Fanotify,
            #[cfg(feature = "bpf")]
            Self::Bpf(_) => mapdirect_proto::Gate::Bpf,
        }
    }

    /// It by permission events, if it is that.
    pub(crate) fn fanotify(&self) -> Option<&fanotify::Gate> {
        match self {
            Self::Fanotify(gate) => Some(gate),
            #[cfg(feature = "bpf")]
            Self::Bpf(_) => None,
        }
    }

    /// It judges by what it finds in the kernel's maps, and holds nobody back.
    pub(crate) fn is_in_kernel(&self) -> bool {
        self.fanotify().is_none()
    }

    /// Has it look again at who waits for the outcome of a grant.
    pub(crate) fn reconsider(&self) {
        if let Some(gate) = self.fanotify() {
            gate.reconsider();
        }
    }

    /// The threads it holds back.
    pub(crate) fn held(&self) -> Arc<Vec<i32>> {
        match self {
            Self::Fanotify(gate) => gate.held(),
            #[cfg(feature = "bpf")]
            Self::Bpf(_) => Arc::default(),
        }
    }

    /// Has it notice that the guard stops.
    pub(crate) fn wake(&self) {
        if let Some(gate) = self.fanotify() {
            gate.wake();
        }
    }

    /// Has it judge by the pins that an inode has now.
    pub(crate) fn publish(&self, watched: &Watched) -> Result<(), Errno> {
        match self {
            Self::Fanotify(_) => {
                // It asks the table itself.
                let _ = watched;
                Ok(())
            }
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => gate.publish(watched),
        }
    }

    /// Has it watch, if it rests while nothing is pinned; says why it cannot.
    pub(crate) fn rouse(&self) -> Result<(), String> {
        match self {
            Self::Fanotify(_) => Ok(()),
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => gate.rouse(),
        }
    }

    /// Ties the life of a pin to that of a description.
    pub(crate) fn hold(
        &self,
        watched: &Watched,
        pin: &Pin,
        file: BorrowedFd<'_>,
    ) -> Result<(), Errno> {
        match self {
            Self::Fanotify(_) => {
                // The lock on a byte of the description tells its end.
                let _ = (watched, pin, file);
                Ok(())
            }
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => gate.hold(watched, pin, file),
        }
    }

    /// Takes note of every pin that was taken up again without a word.
    pub(crate) fn catch_up(&self) {
        match self {
            Self::Fanotify(_) => {}
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => gate.catch_up(),
        }
    }

    /// Blocks of a file may have changed, and nothing refused it: a pin of it
    /// that is over cannot be taken up again.
    pub(crate) fn spoil(&self, guard: &crate::Guard, inode: InodeId) {
        match self {
            Self::Fanotify(_) => {
                let _ = (guard, inode);
            }
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => gate.spoil(guard, inode),
        }
    }

    /// Blocks of a pin have changed.
    pub(crate) fn breached(&self, inode: InodeId) {
        match self {
            Self::Fanotify(_) => {
                let _ = inode;
            }
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => gate.breached(inode),
        }
    }

    /// Whether a pin of a file is over and may be taken up again: the tripwire
    /// listens as if it lived.
    pub(crate) fn is_dormant(&self, inode: InodeId) -> bool {
        match self {
            Self::Fanotify(_) => {
                let _ = inode;
                false
            }
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => gate.is_dormant(inode),
        }
    }

    /// Such a pin.
    pub(crate) fn sleeper(&self, inode: InodeId) -> Option<Arc<Pin>> {
        match self {
            Self::Fanotify(_) => {
                let _ = inode;
                None
            }
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => gate.sleeper(inode),
        }
    }

    /// Such a pin, by its number.
    pub(crate) fn dormant(&self, inode: InodeId, pin: u64) -> Option<Arc<Pin>> {
        match self {
            Self::Fanotify(_) => {
                let _ = (inode, pin);
                None
            }
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => gate.dormant(inode, pin),
        }
    }

    /// Waits until a pin has been taken out, if it is over.
    pub(crate) fn look_for_end(&self, guard: &crate::Guard, inode: InodeId, pin: u64) {
        match self {
            // It hears of it before anybody can be judged again.
            Self::Fanotify(_) => {
                let _ = (guard, inode, pin);
            }
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => bpf::look_for_end(guard, gate, inode, pin),
        }
    }

    /// What has become of a pin that this guard does not have.
    pub(crate) fn fate_of(&self, named: &WatchedPin) -> Notice {
        let pin = named.pin;
        match self {
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) if gate.keeps(pin) => Notice::Unattended {
                pin,
                why: String::from(
                    "the guard could not take it over: the kernel refuses, and ends it with its \
                     last mapping",
                ),
            },
            _ => Notice::Lost {
                pin,
                why: String::from("the guard does not know the pin"),
            },
        }
    }

    /// What stays in the kernel for as long as the gate does, if it is there
    /// without its guard: a directory, by which nothing in it can be reached.
    pub(crate) fn directory(&self) -> Option<OwnedFd> {
        match self {
            Self::Fanotify(_) => None,
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => gate.directory(),
        }
    }

    /// Refusals by kind, if the kernel counts them: those too that no guard
    /// was there to hear of.
    pub(crate) fn refused(&self) -> Option<Vec<(String, u64)>> {
        match self {
            Self::Fanotify(_) => None,
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => Some(gate.refused()),
        }
    }

    /// Whether nobody else can be in the middle of anything on the inode of
    /// these two descriptions, if it can tell.
    pub(crate) fn is_alone(
        &self,
        of_holder: BorrowedFd<'_>,
        of_pin: BorrowedFd<'_>,
    ) -> Result<bool, Errno> {
        match self {
            Self::Fanotify(_) => {
                let _ = (of_holder, of_pin);
                Ok(false)
            }
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => gate.is_alone(of_holder, of_pin),
        }
    }

    /// Whether nobody else can write by a description of the inode that these
    /// two are of, if it can tell.
    pub(crate) fn is_sole_writer(
        &self,
        of_holder: BorrowedFd<'_>,
        of_pin: BorrowedFd<'_>,
    ) -> Result<bool, Errno> {
        match self {
            Self::Fanotify(_) => {
                let _ = (of_holder, of_pin);
                Ok(false)
            }
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => gate.is_sole_writer(of_holder, of_pin),
        }
    }

    /// The pin that a description is, if it can tell.
    pub(crate) fn pin_of(&self, file: BorrowedFd<'_>) -> Result<Option<u64>, Errno> {
        match self {
            Self::Fanotify(_) => {
                let _ = file;
                Ok(None)
            }
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => gate.pin_of(file),
        }
    }

    /// Whether the life of a pin is over, though it may not have been told
    /// yet; `file` is a description of its file that is not the pin's.
    pub(crate) fn is_over(&self, pin: &Pin, file: BorrowedFd<'_>) -> bool {
        match self {
            Self::Fanotify(_) => !pin.is_alive(file),
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => gate.is_over(pin.id),
        }
    }

    /// How many descriptions of a file can write and belong to no process, if
    /// it can tell.
    pub(crate) fn hidden_writers(&self, file: BorrowedFd<'_>) -> Result<usize, Errno> {
        match self {
            Self::Fanotify(_) => {
                let _ = file;
                Ok(0)
            }
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => gate.writers(file).map(bpf::census::Writers::hidden),
        }
    }

    /// Whether XFS may have set blocks aside for copies of shared ones of a
    /// file.
    pub(crate) fn may_have_copy_blocks(&self, file: BorrowedFd<'_>) -> bool {
        match self {
            Self::Fanotify(_) => {
                let _ = file;
                true
            }
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => gate.has_copy_blocks(file).unwrap_or(true),
        }
    }

    /// How many direct reads and writes of a file are under way, if it can
    /// tell.
    pub(crate) fn direct_under_way(&self, file: BorrowedFd<'_>) -> Result<u32, Errno> {
        match self {
            Self::Fanotify(_) => {
                let _ = file;
                Ok(0)
            }
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => gate.direct_under_way(file),
        }
    }
}
