//! Gates: what refuses an operation that would break a pin.
//!
//! * [`fanotify`]: pre-content permission events, Linux 6.14 and later.
//!   Sound by excluding everybody who could change the file unseen.
//! * `bpf`: BPF LSM and fentry programs, Linux 6.1 and later. Precise, and
//!   still there when the guard is not.
//!
//! Both keep the same contract, [`crate::policy::RULES`], and are the same to
//! the rest of the guard: a [`Gate`].

#[cfg(feature = "bpf")]
pub(crate) mod bpf;
pub(crate) mod fanotify;

use crate::grant::{Granting, Holder, Secured};
use crate::server::OnTampering;
use crate::table::{GrantState, InodeId, Pin, Watched};
use crate::{Errno, Guard};
use mapdirect_proto::{Notice, Refusal, WatchedPin};
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

/// What the guard asks of its gate.
pub(crate) trait Gate: std::fmt::Debug + Send + Sync {
    /// Which one it is.
    fn kind(&self) -> mapdirect_proto::Gate;

    /// The threads that serve it. `on_tampering` is told what somebody has done
    /// to it, by one of them.
    fn tasks(self: Arc<Self>, on_tampering: Box<OnTampering>) -> Vec<Task>;

    /// Whether it is asked when a client of an NFS server sets a file's size.
    fn sees_nfs_clients(&self) -> bool;

    /// Publishes a pin, excludes everybody who could break it unseen, surveys
    /// its blocks and settles it by them. From when this returns, every
    /// operation that the pin minds is refused.
    ///
    /// Gates do this in different orders. One that is asked only about
    /// descriptions from behind it excludes others first and surveys then; one
    /// that judges everybody first tells the kernel what seems to be pinned.
    ///
    /// `state` is locked for the whole of the grant. In the end the holder's
    /// file is the description that is the pin.
    ///
    /// # Errors
    ///
    /// Why the pin cannot be granted. Then [`withdraw`](Self::withdraw) takes
    /// back what was done.
    fn exclude(
        &self,
        granting: &Granting<'_>,
        state: &mut GrantState,
        holder: &mut Holder<'_>,
    ) -> Result<Secured, Refusal>;

    /// Takes note of every pin that was taken up again without a word.
    fn catch_up(&self) {}

    /// Blocks of a file may have changed, and nothing refused it: a pin of it
    /// that is over cannot be taken up again.
    fn spoil(&self, guard: &Guard, inode: InodeId) {
        let _ = (guard, inode);
    }

    /// Blocks of a pin have changed.
    fn breached(&self, inode: InodeId) {
        let _ = inode;
    }

    /// A pin that is over and may be taken up again: the tripwire listens as if
    /// it lived.
    fn sleeper(&self, inode: InodeId) -> Option<Arc<Pin>> {
        let _ = inode;
        None
    }

    /// Whether XFS may have set blocks aside for copies of shared ones of a
    /// file.
    fn may_have_copy_blocks(&self, file: BorrowedFd<'_>) -> bool {
        let _ = file;
        true
    }

    /// Whether anybody else may come to store to a pinned file by a mapping.
    ///
    /// # Errors
    ///
    /// If it may be to one of `frozen`, which must not change.
    fn others_can_store(
        &self,
        granting: &Granting<'_>,
        file: BorrowedFd<'_>,
        frozen: &[Range<u64>],
    ) -> Result<bool, Refusal>;

    /// Judges by what is pinned of an inode now, and by what is known of that.
    fn publish(&self, guard: &Guard, watched: &Watched) -> Result<(), Errno>;

    /// Takes back what a grant has done that failed, when its pin is out of the
    /// table; `file` is any description of the inode. It `was_last` if nothing
    /// else is pinned of the inode, which then leaves the table.
    fn withdraw(&self, watched: &Watched, file: BorrowedFd<'_>, was_last: bool);

    /// Whether a description that was handed to the guard is a pin.
    fn is_the_pin(&self, granting: &Granting<'_>, file: BorrowedFd<'_>) -> Result<bool, Refusal>;

    /// Whether a pin is over, though that may not have been told yet; `file` is
    /// a description of its file that is not the pin's.
    fn has_ended(&self, pin: &Pin, file: BorrowedFd<'_>) -> bool;

    /// Ends a pin that was [found](Self::has_ended) to be over. It is taken out
    /// of the table soon.
    fn end(&self, watched: &Watched, pin: &Pin);

    /// Whether a pin of this number is over, and operations may be refused for
    /// it all the same until it is out of the table.
    fn refuses_for_ended(&self, pin: u64) -> bool;

    /// What has become of a pin that this guard does not have.
    fn fate_of(&self, named: &WatchedPin) -> Notice;

    /// What stays in the kernel for as long as the gate does, if it is there
    /// without its guard: a directory, by which nothing in it can be reached.
    fn directory(&self) -> Option<OwnedFd>;

    /// Refusals by kind since the gate is in place.
    fn refused(&self, guard: &Guard) -> Vec<(String, u64)>;
}

/// Serves a gate until the guard stops.
pub(crate) type Run = dyn FnOnce(&Guard) -> Result<(), Errno> + Send;

/// A thread that serves a gate.
pub(crate) struct Task {
    /// Its name.
    pub(crate) name: &'static str,
    /// What it means for the guard if it ends with an error.
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
