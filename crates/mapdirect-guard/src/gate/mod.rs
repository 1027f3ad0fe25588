//! Gates: what refuses an operation that would break a pin.
//!
//! * [`fanotify`]: pre-content permission events, Linux 6.14 and later. Sound
//!   because it excludes everybody who could change the file unseen.
//! * `bpf`: BPF LSM and fentry programs, Linux 6.1 and later. Precise, and
//!   still in place when the guard is not.
//!
//! Both keep the same contract, [`crate::policy::RULES`]. The rest of the guard
//! sees only a [`Gate`].

#[cfg(feature = "bpf")]
pub(crate) mod bpf;
pub(crate) mod fanotify;

use crate::grant::{Granting, Holder, Secured};
use crate::server::OnTampering;
use crate::table::{GrantState, InodeId, Pin, Watched};
use crate::{Errno, Guard};
use mapdirect_proto::{Notice, Refusal, WatchedPin};
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

/// What the guard asks of its gate.
pub(crate) trait Gate: std::fmt::Debug + Send + Sync {
    /// Which gate this is.
    fn kind(&self) -> mapdirect_proto::Gate;

    /// The threads that serve the gate. One of them calls `on_tampering` when
    /// somebody has tampered with the gate.
    fn tasks(self: Arc<Self>, on_tampering: Box<OnTampering>) -> Vec<Task>;

    /// Whether the gate is asked when a client of an NFS server sets a file's
    /// size.
    fn sees_nfs_clients(&self) -> bool;

    /// Publishes a pin, excludes everybody who could break it unseen, surveys
    /// its blocks and settles the pin by them. Once this returns, every
    /// operation that the pin forbids is refused.
    ///
    /// The gates do this in different orders. The fanotify gate, which is asked
    /// only about descriptions from behind it, excludes others first and then
    /// surveys. The bpf gate, which judges everybody, first tells the kernel
    /// what seems to be pinned.
    ///
    /// `state` is locked for the whole of the grant. In the end the holder's
    /// file is the description whose life is the pin.
    ///
    /// # Errors
    ///
    /// Why the pin cannot be granted. Then [`withdraw`](Self::withdraw) undoes
    /// what was done.
    fn exclude(
        &self,
        granting: &Granting<'_>,
        state: &mut GrantState,
        holder: &mut Holder<'_>,
    ) -> Result<Secured, Refusal>;

    /// What the gate keeps of pins that have ended, or `None` if nobody can take
    /// up a pin again.
    fn dormancy(&self) -> Option<&dyn Dormancy>;

    /// Whether XFS has set blocks of a file aside for copies of shared blocks,
    /// or `None` if that cannot be known.
    fn has_copy_blocks(&self, file: BorrowedFd<'_>) -> Option<bool> {
        let _ = file;
        None
    }

    /// Whether anybody else may be able to store to a pinned file by a mapping.
    ///
    /// # Errors
    ///
    /// When somebody may be able to store to one of `frozen`, which must not
    /// change.
    fn others_can_store(
        &self,
        granting: &Granting<'_>,
        file: BorrowedFd<'_>,
        frozen: &[Range<u64>],
    ) -> Result<bool, Refusal>;

    /// Makes the gate judge by the current pins of an inode, and by what is
    /// known of them.
    fn publish(&self, guard: &Guard, watched: &Watched) -> Result<(), Errno>;

    /// Has the pin outlive this guard if the kernel does not see to that, before
    /// its holder is told of it.
    ///
    /// # Errors
    ///
    /// When it would not.
    fn outlives(&self, watched: &Watched, pin: &Pin) -> Result<(), Refusal> {
        let _ = (watched, pin);
        Ok(())
    }

    /// Notes that the guard has a descriptor of this number open for long.
    fn has_descriptor(&self, number: RawFd) {
        let _ = number;
    }

    /// Lets others share a pin that was granted just now, by `mmap(2)` alone.
    fn granted(&self, watched: &Watched) {
        let _ = watched;
    }

    /// Undoes what a failed grant has done, after its pin has left the table.
    /// `file` is any description of the inode. The pin `was_last` if nothing
    /// else is pinned on the inode; the inode then leaves the table, too.
    fn withdraw(&self, watched: &Watched, file: BorrowedFd<'_>, was_last: bool);

    /// Whether a description that was handed to the guard is the pin.
    fn is_the_pin(&self, granting: &Granting<'_>, file: BorrowedFd<'_>) -> Result<bool, Refusal>;

    /// Whether a pin has ended, even if the guard has not been told yet. `file`
    /// is a description of the pin's file that is not the pin's.
    fn has_ended(&self, pin: &Pin, file: BorrowedFd<'_>) -> bool;

    /// Ends a pin that was [found](Self::has_ended) to have ended. The pin
    /// leaves the table soon after.
    fn end(&self, watched: &Watched, pin: &Pin);

    /// Ends a pin whose holder still has its description. From then on the
    /// description is like any other.
    fn take_away(&self, guard: &Guard, watched: &Arc<Watched>, pin: &Pin);

    /// Whether operations may still be refused for an ended pin with this
    /// number, until the pin leaves the table.
    fn refuses_for_ended(&self, pin: u64) -> bool;

    /// The fate of a pin that this guard does not know.
    fn fate_of(&self, named: &WatchedPin) -> Notice;

    /// A directory that stays in the kernel as long as the gate does, if the
    /// gate outlives its guard. Nothing in the gate can be reached through this
    /// directory.
    fn directory(&self) -> Option<OwnedFd>;

    /// Refusals by kind since the gate was put in place.
    fn refused(&self, guard: &Guard) -> Vec<(String, u64)>;
}

/// Pins that have ended, and that `mmap(2)` may take up again.
pub(crate) trait Dormancy {
    /// Registers every pin that was taken up again without a request.
    fn catch_up(&self);

    /// Handles that blocks of a file may have changed although nothing refused
    /// it: no pin of this file that has ended, or is about to, may be taken up
    /// again.
    fn spoil(&self, guard: &Guard, inode: InodeId);

    /// The same for all files.
    fn spoil_all(&self, guard: &Guard);

    /// The dormant pin of an inode, if there is one. The tripwire watches it as
    /// if it were alive.
    fn sleeper(&self, inode: InodeId) -> Option<Arc<Pin>>;
}

/// Serves a gate until the guard stops.
pub(crate) type Run = dyn FnOnce(&Guard) -> Result<(), Errno> + Send;

/// A thread that serves a gate.
pub(crate) struct Task {
    /// The name of the thread.
    pub(crate) name: &'static str,
    /// What an error of this thread means for the guard.
    pub(crate) failure: &'static str,
    pub(crate) run: Box<Run>,
}

/// The fate of a pin that nobody knows any more.
fn unknown(pin: u64) -> Notice {
    Notice::Lost {
        pin,
        why: String::from("the guard does not know the pin"),
    }
}
