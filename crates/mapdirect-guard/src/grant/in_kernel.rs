//! Grants where the gate judges in the kernel.
//!
//! Nobody has to be excluded there: an operation is judged whoever makes it,
//! by whatever descriptor. So a grant tells the gate first what would be
//! pinned, as far as that can be seen; then it waits until everybody is out of
//! what they may have begun before; then it looks whether what is there is
//! what the gate was told. If so, it is the pin; if not, it begins anew.

use super::{Attempt, Still, refusal, system};
use crate::openers::{Openers, kernel_users};
use crate::thaw;
use crate::wake::Backoff;
use crate::{Errno, busy};
use mapdirect_model::facts::{FileFacts, Filesystem};
use mapdirect_proto::{Granted, Opener, Reason, Refusal};
use mapdirect_sys::{proc, uname};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Whether a write to a part of a folio makes all of it dirty, so that
/// unwritten blocks in it are converted: XFS through the page cache before
/// Linux 6.6, where iomap came to know dirty blocks.
pub(crate) fn writes_whole_folios(facts: &FileFacts) -> bool {
    facts.filesystem == Filesystem::Xfs && !facts.dax && uname::version() < (6, 6)
}

impl Attempt<'_> {
    /// Grants it, with a gate in the kernel.
    pub(super) fn run_in_kernel(&mut self) -> Result<(Granted, Option<OwnedFd>), Refusal> {
        let deadline = Instant::now() + self.patience + Duration::from_secs(1);
        self.guard.gate.rouse().map_err(|obstacle| {
            let mend = "see what `mapdirect doctor` says of the bpf gate";
            refusal(Reason::System, Errno::NOEXEC, obstacle, mend)
        })?;
        self.watched.add(self.pin);
        // Its life begins first: should every other pin of the inode end now,
        // the gate stays closed.
        let for_pin = self.open_for_pin()?;
        let of_holder = std::mem::replace(&mut self.file, for_pin);
        self.guard
            .gate
            .hold(self.watched, self.pin, self.file.as_fd())
            .map_err(|errno| system("telling the gate whose life the pin is", errno))?;
        // Reading the block map waits for a thaw on XFS: better to say who
        // does so already.
        let soon = Instant::now() + self.patience.max(Duration::from_millis(50));
        if !self.is_alone(&of_holder) && !thaw::is_thawed(self.file.as_fd(), soon) {
            self.wait_for_others(&of_holder, false)?;
        }
        // As it seems, for now: what is written back is seen when the gate is
        // closed.
        let mut map = self.read_map(true)?;
        loop {
            self.check_map(&map)?;
            let Still {
                pinned,
                held,
                frozen,
                beside,
            } = self.keep_still(&map)?;
            self.pin.settle(&map, pinned, held);
            self.publish()?;
            // From here on nothing new comes to pass that the gate was not
            // asked about.
            if !self.is_alone(&of_holder) {
                self.wait_for_others(&of_holder, !frozen.is_empty())?;
            }
            self.nobody_stores_to(&frozen)?;
            let again = self.read_map(false)?;
            if again == map && self.look_beside(&again)? == beside {
                self.hints_are_as_they_were()?;
                break;
            }
            if Instant::now() >= deadline {
                return Err(refusal(
                    Reason::StillChanging,
                    Errno::TXTBSY,
                    "its block map keeps changing",
                    "try again later",
                ));
            }
            map = again;
        }
        self.hand_out(&map)
    }

    /// Whether there is nobody to wait for: by far the most frequent case, and
    /// the cheapest to prove.
    fn is_alone(&self, of_holder: &OwnedFd) -> bool {
        let alone = self
            .guard
            .gate
            .is_alone(of_holder.as_fd(), self.file.as_fd());
        alone == Ok(true) && busy::is_at_rest(self.pin.pid)
    }

    /// From here on the gate lets nobody change how XFS allocates and copies;
    /// what the pin was judged by was read before.
    fn hints_are_as_they_were(&self) -> Result<(), Refusal> {
        if self
            .judged
            .facts
            .still_allocates_so(self.file.as_fd())
            .map_err(|errno| system("FS_IOC_FSGETXATTR", errno))?
        {
            return Ok(());
        }
        Err(refusal(
            Reason::StillChanging,
            Errno::TXTBSY,
            "its flags and hints for allocation have just been changed",
            "try again",
        ))
    }

    fn publish(&self) -> Result<(), Refusal> {
        self.guard
            .gate
            .publish(self.watched)
            .map_err(|errno| match errno {
                Errno::NOMEM | Errno::TOOBIG => refusal(
                    Reason::Limit,
                    Errno::NOMEM,
                    "the gate has no room for what would be pinned",
                    "pin less, or let go of other pins",
                ),
                other => system("telling the gate", other),
            })
    }

    /// Nobody may be in the middle of something that the gate let pass
    /// before it knew of the pin.
    fn wait_for_others(&self, of_holder: &OwnedFd, mappings: bool) -> Result<(), Refusal> {
        self.no_kernel_users()?;
        if self.others_may_write(of_holder)? {
            self.no_hidden_writers()?;
            self.quietly(|quiet| quiet.wait_for_changes())?;
            if mappings {
                self.quietly(|quiet| quiet.wait_for_mappings())?;
            }
        } else {
            self.quietly(|quiet| quiet.wait_for_readers())?;
            self.quietly(|quiet| {
                let own = proc::numbers_in(&format!("/proc/{}/task", self.pin.pid));
                let own = own.unwrap_or_default();
                let busy = quiet.wait_for_changes_by(&own)?;
                if !busy.is_empty() || !mappings {
                    return Ok(busy);
                }
                quiet.wait_for_mappings_by(&own)
            })?;
        }
        // Asynchronous direct writes have no thread that could be looked at.
        let mut backoff = Backoff::until(
            Instant::now() + self.patience.max(Duration::from_secs(1)),
            Duration::from_micros(50),
            Duration::from_millis(5),
        );
        loop {
            let under_way = self
                .guard
                .gate
                .direct_under_way(self.file.as_fd())
                .map_err(|errno| system("asking the gate about direct I/O", errno))?;
            if under_way == 0 {
                return Ok(());
            }
            if backoff.is_over() {
                return Err(refusal(
                    Reason::StillChanging,
                    Errno::TXTBSY,
                    format!("{under_way} direct reads or writes of it do not come to their end"),
                    "try again when they are over, or ask with more patience",
                ));
            }
            backoff.pause();
        }
    }

    /// Whoever writes without asking counts as a writer all the same, and is in
    /// nobody's table: an overlay, process accounting, a storage target. They
    /// cannot open a pinned file, but may have done so before.
    fn no_hidden_writers(&self) -> Result<(), Refusal> {
        // A truncation by path counts for as long as it takes, and what is on
        // its way through a socket arrives.
        let mut backoff = Backoff::until(
            Instant::now() + self.patience.max(Duration::from_millis(200)),
            Duration::from_millis(1),
            Duration::from_millis(20),
        );
        loop {
            let hidden = self
                .guard
                .gate
                .hidden_writers(self.file.as_fd())
                .map_err(|errno| system("counting who can write to it", errno))?;
            if hidden == 0 {
                return Ok(());
            }
            if backoff.is_over() {
                return Err(refusal(
                    Reason::OpenElsewhere,
                    Errno::TXTBSY,
                    format!(
                        "it is open for writing {hidden} times more than processes have it open: \
                         by an overlay, process accounting, a storage target, a ring of io_uring, \
                         or in a descriptor on its way through a socket"
                    ),
                    "unmount the overlay, or stop what else has it open",
                ));
            }
            backoff.pause();
        }
    }

    /// Whether anybody but the holder itself can be in the middle of writing
    /// to it, by what the kernel counts: whoever writes, or truncates, or maps
    /// it to store, does so by a description that is counted as a writer.
    fn others_may_write(&self, of_holder: &OwnedFd) -> Result<bool, Refusal> {
        let alone = self
            .guard
            .gate
            .is_sole_writer(of_holder.as_fd(), self.file.as_fd());
        alone
            .map(|alone| !alone)
            .map_err(|errno| system("asking the gate who writes", errno))
    }

    /// Some parts of the kernel write to files without asking anybody.
    fn no_kernel_users(&self) -> Result<(), Refusal> {
        let users = kernel_users(self.judged.id, &self.judged.path);
        if users.is_empty() {
            return Ok(());
        }
        Err(self.open_elsewhere(Openers {
            others: users,
            ..Openers::default()
        }))
    }

    /// With frozen blocks nobody may have a mapping to store by, wherever in
    /// the file: `mremap(2)` could grow it over them, and no hook sees that.
    /// Holders of pins are trusted not to. Says whether any of them has one.
    pub(super) fn nobody_may_come_to_store(&self, frozen: &[Range<u64>]) -> Result<bool, Refusal> {
        let found = self.openers(None);
        // Descriptors are judged when they are used, wherever they hide.
        if found.unseen {
            return Err(self.open_elsewhere(Openers {
                hidden: found.hidden,
                ..Openers::default()
            }));
        }
        let pins = self.watched.pins.load();
        let is_holder = |opener: &Opener| {
            pins.iter()
                .any(|pin| pin.pid == opener.pid && pin.mapped.is_some())
        };
        for (opener, mapped) in &found.writable_mappings {
            let over = frozen
                .iter()
                .any(|run| run.start.max(mapped.start) < run.end.min(mapped.end));
            if is_holder(opener) && !over {
                continue;
            }
            let obstacle = if over {
                format!(
                    "a writable mapping of bytes {} to {} covers blocks that cannot be stored to \
                     as they are",
                    mapped.start, mapped.end
                )
            } else {
                format!(
                    "a writable mapping of bytes {} to {} could be grown over blocks that cannot \
                     be stored to as they are",
                    mapped.start, mapped.end
                )
            };
            return Err(Refusal {
                openers: vec![opener.clone()],
                ..refusal(
                    Reason::OpenElsewhere,
                    Errno::TXTBSY,
                    obstacle,
                    "unmap it first, or fill and unshare the range",
                )
            });
        }
        Ok(!found.writable_mappings.is_empty())
    }
}
