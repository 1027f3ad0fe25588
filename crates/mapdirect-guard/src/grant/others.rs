//! Finds the other users of a file that is being pinned, and waits for them.

use super::Granting;
use super::refusal::{refusal, still_changing, stuck, system};
use crate::Errno;
use crate::bounded::Stuck;
use crate::busy::{Busy, Quiet};
use crate::openers::{Mark, Openers, Wanted, openers_before};
use crate::suspicion::Prefix;
use crate::table::{Notes, Published};
use crate::wake::Backoff;
use mapdirect_model::facts::Filesystem;
use mapdirect_proto::{Reason, Refusal};
use mapdirect_sys::proc;
use rustix::fs::OFlags;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

impl Granting<'_> {
    /// The notes on what the gate let through before it could see the pin.
    pub(crate) fn notes(&self) -> Result<Published<'_, Notes>, Refusal> {
        let published = self.watched.published(self.pin.id);
        published.map(|(_, notes)| notes).ok_or_else(|| {
            refusal(
                Reason::Arguments,
                Errno::INVAL,
                "the pin has ended meanwhile",
                "allocate while the mapping exists",
            )
        })
    }

    /// Opens the file again; the gate lets this open pass.
    pub(crate) fn reopen(&self, file: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Refusal> {
        self.guard
            .own
            .during(|| proc::reopen(file, flags))
            .map_err(|errno| system("opening the file again", errno))
    }

    pub(crate) fn patiently(&self) -> Backoff {
        Backoff::patiently(self.patience)
    }

    /// Runs `wait`, which waits for other users of the file, and refuses the
    /// pin if they do not finish.
    pub(crate) fn quietly(
        &self,
        file: BorrowedFd<'_>,
        wait: impl FnOnce(&Quiet<'_>) -> Result<Vec<Busy>, Stuck>,
    ) -> Result<(), Refusal> {
        let quiet = Quiet {
            file,
            id: self.judged.id,
            prefix: match self.judged.facts.filesystem {
                Filesystem::Xfs => Prefix("xfs_"),
                Filesystem::Ext4 => Prefix("ext4_"),
                // Functions of any filesystem.
                _ => Prefix(""),
            },
            held: &|| self.guard.waiting.threads(),
            // The wait ends as soon as it can. It may take at least a second,
            // because a thread on a busy processor needs some time to show that
            // it makes progress.
            deadline: Instant::now() + self.patience.max(Duration::from_secs(1)),
        };
        still_changing(&wait(&quiet).map_err(stuck)?)
    }

    pub(crate) fn openers(&self, mark: Option<Mark>) -> Openers {
        let wanted = Wanted {
            id: self.judged.id,
            path: &self.judged.path,
            mark,
        };
        openers_before(
            wanted,
            Instant::now() + self.patience.max(Duration::from_secs(1)),
        )
    }

    pub(crate) fn open_elsewhere(&self, found: Openers) -> Refusal {
        let own = found.others.iter().all(|opener| opener.pid == self.pin.pid);
        let reason = if own && !found.others.is_empty() {
            Reason::OpenHere
        } else {
            Reason::OpenElsewhere
        };
        let mut obstacle = if found.others.is_empty() {
            String::from(
                "it is open somewhere that /proc does not show (a descriptor in flight through \
                 a socket, a client of an NFS export, a part of the kernel), or somebody \
                 truncates it by path again and again",
            )
        } else if reason == Reason::OpenHere {
            String::from("this process has it open or mapped a second time")
        } else if self.judged.facts.reflink {
            String::from(
                "somebody else has it open; on a filesystem with reflink a reader can \
                 share its blocks, too",
            )
        } else {
            String::from("somebody else has it open for writing")
        };
        for hidden in &found.hidden {
            obstacle.push_str("; perhaps through ");
            obstacle.push_str(hidden);
        }
        Refusal {
            openers: found.others,
            ..refusal(
                reason,
                Errno::TXTBSY,
                obstacle,
                "have it closed there, or ask with more patience",
            )
        }
    }
}
