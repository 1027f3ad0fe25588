//! Secures a pin under the bpf gate, which need not exclude anybody.
//!
//! The bpf gate judges every operation, whoever makes it and by whatever
//! descriptor. So a grant first tells the gate what would be pinned, as far as
//! that can be seen. Then it waits until everybody has finished what they may
//! have begun before. Then it checks whether the blocks are what the gate was
//! told. If so, they are pinned; if not, the grant begins anew.

use super::census::Writers;
use super::{Gate, Proof};
use crate::Errno;
use crate::bounded::Stuck;
use crate::busy::{self, Busy, Quiet};
use crate::grant::{Findings, Granting, Holder, Secured, Survey, refusal, system};
use crate::openers::{Openers, kernel_users};
use crate::thaw;
use crate::wake::Backoff;
use mapdirect_proto::{BlockMap, DeviceId, Flags, Opener, Reason, Refusal};
use mapdirect_sys::proc;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// One attempt to exclude others.
pub(super) struct Exclusion<'a, 'h> {
    gate: &'a Gate,
    granting: &'a Granting<'a>,
    /// The holder. Its file is the pin's description already.
    holder: &'a mut Holder<'h>,
    /// The description with which the pin was requested, unless the pin's is
    /// that one.
    of_holder: Option<OwnedFd>,
    /// Shows later that nothing has happened since the pin was published.
    proof: Proof,
    /// When to give up if the block map keeps changing.
    deadline: Instant,
}

impl<'a, 'h> Exclusion<'a, 'h> {
    /// Publishes the pin, and begins its life. That comes first, so that the
    /// gate stays closed even if every other pin of the inode ends now.
    pub(super) fn begin(
        gate: &'a Gate,
        granting: &'a Granting<'a>,
        holder: &'a mut Holder<'h>,
    ) -> Result<Self, Refusal> {
        let deadline = Instant::now() + granting.patience + Duration::from_secs(1);
        gate.rouse().map_err(|obstacle| {
            let mend = "see what `mapdirect doctor` says of the bpf gate";
            refusal(Reason::System, Errno::NOEXEC, obstacle, mend)
        })?;
        let in_place = granting.pin.flags.contains(Flags::IN_PLACE);
        if in_place {
            refuse_a_pin(gate, holder.file.as_fd())?;
        }
        granting.watched.add(granting.pin);
        let of_holder = if in_place {
            None
        } else {
            let for_pin = granting.open_for_pin(holder.file.as_fd())?;
            Some(std::mem::replace(&mut holder.file, for_pin))
        };
        let proof = gate
            .hold(granting.watched, granting.pin, holder.file.as_fd())
            .map_err(|errno| system("telling the gate whose life the pin is", errno))?;
        Ok(Self {
            gate,
            granting,
            holder,
            of_holder,
            proof,
            deadline,
        })
    }

    /// Tells the gate what seems to be pinned until that is what the file has.
    pub(super) fn run(self) -> Result<Secured, Refusal> {
        let secured = self.secure();
        if secured.is_err() && self.of_holder.is_none() {
            // It is open elsewhere, so it would go on being a pin.
            self.gate
                .end_life(self.holder.file.as_fd(), self.granting.pin);
        }
        secured
    }

    fn secure(&self) -> Result<Secured, Refusal> {
        let granting = self.granting;
        let survey = Survey {
            granting,
            file: self.holder.file.as_fd(),
            others_can_store: &|frozen| {
                others_can_store(self.gate, granting, self.holder.file.as_fd(), frozen)
            },
        };
        self.wait_for_thaw()?;
        if granting.judged.follows {
            return self.follow(&survey);
        }
        // A preliminary map: unwritten data shows only when the gate is closed.
        let mut map = survey.read(true)?;
        loop {
            survey.require_pinnable(&map)?;
            let Findings {
                pinned,
                kept_pages,
                frozen,
                beside,
            } = survey.examine(&map)?;
            granting.pin.settle(&map, &pinned, kept_pages);
            self.publish()?;
            // From here on the gate is asked about everything new.
            if !self.is_alone() {
                self.wait_for_others(!frozen.is_empty())?;
            }
            self.no_other_writer()?;
            others_can_store(self.gate, granting, self.holder.file.as_fd(), &frozen)?;
            let again = survey.read(false)?;
            if again == map && survey.look_beside(&again)? == beside {
                self.hints_are_as_they_were()?;
                return Ok(self.secured(map));
            }
            if Instant::now() >= self.deadline {
                return Err(refusal(
                    Reason::StillChanging,
                    Errno::TXTBSY,
                    "its block map keeps changing",
                    "try again later",
                ));
            }
            map = again;
        }
    }

    /// Tells the gate what a pin of strength stable refuses, which depends on no
    /// block, and then looks what the pin holds.
    fn follow(&self, survey: &Survey<'_>) -> Result<Secured, Refusal> {
        let granting = self.granting;
        let device = DeviceId { major: 0, minor: 0 };
        let block = granting.judged.facts.block_size;
        // Nothing is held yet.
        let nothing = BlockMap::new(device, block, 0, granting.judged.range.clone(), []);
        let refused = granting.refused_for_stable();
        granting.pin.settle(&nothing, &refused, None);
        self.publish()?;
        if !self.is_alone() {
            self.wait_for_others(false)?;
        }
        let (map, _) = survey.of_stable(true)?;
        granting.pin.record(&map);
        self.hints_are_as_they_were()?;
        Ok(self.secured(map))
    }

    /// The pin needs no lifeline: the kernel itself reports when the
    /// description is gone.
    fn secured(&self, map: BlockMap) -> Secured {
        self.gate.prove(self.granting.pin.id, self.proof);
        Secured {
            map,
            lifeline: None,
        }
    }

    /// Reading the block map waits for a thaw on XFS. It is better to report
    /// first who waits for the thaw already.
    fn wait_for_thaw(&self) -> Result<(), Refusal> {
        let soon = Instant::now() + self.granting.patience.max(Duration::from_millis(50));
        if !self.is_alone() && !thaw::is_thawed(self.holder.file.as_fd(), soon) {
            self.wait_for_others(false)?;
        }
        Ok(())
    }

    fn quietly(
        &self,
        wait: impl FnOnce(&Quiet<'_>) -> Result<Vec<Busy>, Stuck>,
    ) -> Result<(), Refusal> {
        self.granting.quietly(self.holder.file.as_fd(), wait)
    }

    /// Whether there is nobody to wait for. This is by far the most frequent
    /// case, and the cheapest to prove.
    ///
    /// Who else has a description that was a program's before it became the pin
    /// no count can tell.
    fn is_alone(&self) -> bool {
        let Some(of_holder) = &self.of_holder else {
            return false;
        };
        let alone = self
            .gate
            .is_alone(of_holder.as_fd(), self.holder.file.as_fd());
        alone == Ok(true) && busy::is_at_rest(self.granting.pin.pid)
    }

    /// Checks the hints by which the pin was judged, which were read before the
    /// gate closed. From here on the gate lets nobody change how XFS allocates
    /// and copies.
    fn hints_are_as_they_were(&self) -> Result<(), Refusal> {
        if self
            .granting
            .judged
            .facts
            .still_allocates_so(self.holder.file.as_fd())
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
        self.gate
            .publish(self.granting.watched)
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

    /// Waits until nobody is in the middle of something that the gate let pass
    /// before it knew of the pin.
    fn wait_for_others(&self, mappings: bool) -> Result<(), Refusal> {
        self.no_kernel_users()?;
        if self.others_may_write()? {
            self.no_hidden_writers()?;
            self.quietly(|quiet| quiet.wait_for_changes())?;
            if mappings {
                self.quietly(|quiet| quiet.wait_for_mappings())?;
            }
        } else {
            self.quietly(|quiet| quiet.wait_for_readers())?;
            self.quietly(|quiet| {
                let own = proc::numbers_in(&format!("/proc/{}/task", self.granting.pin.pid));
                let own = own.unwrap_or_default();
                let busy = quiet.wait_for_changes_by(&own)?;
                if !busy.is_empty() || !mappings {
                    return Ok(busy);
                }
                quiet.wait_for_mappings_by(&own)
            })?;
        }
        if self.granting.judged.follows && self.granting.judged.window().is_none() {
            // They fill what is not held, or change nothing but bytes.
            return Ok(());
        }
        // Asynchronous direct writes have no thread that could be looked at.
        let mut backoff = Backoff::until(
            Instant::now() + self.granting.patience.max(Duration::from_secs(1)),
            Duration::from_micros(50),
            Duration::from_millis(5),
        );
        loop {
            let under_way = self
                .gate
                .direct_under_way(self.holder.file.as_fd())
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

    /// Refuses the pin if somebody may write without asking: an overlay,
    /// process accounting, a storage target. Such a writer is in no process's
    /// table, but is counted as a writer. It cannot open a pinned file, but may
    /// have opened the file before.
    fn no_hidden_writers(&self) -> Result<(), Refusal> {
        // A truncation by path counts only while it is under way, and a
        // descriptor on its way through a socket arrives soon.
        let patience = self.granting.patience.max(Duration::from_millis(200));
        let mut backoff = Backoff::patiently(patience);
        loop {
            let hidden = self
                .gate
                .writers(self.holder.file.as_fd())
                .map(Writers::hidden)
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

    /// If the pin denies writing, waits until nobody but the holder's family has
    /// the file open for writing. From here on the gate lets nobody else open it
    /// so.
    fn no_other_writer(&self) -> Result<(), Refusal> {
        let pin = self.granting.pin;
        if !pin.denies_write() || !self.others_may_write()? {
            return Ok(());
        }
        let mut backoff = self.granting.patiently();
        loop {
            // A descriptor may be on its way into a table, by an open that the
            // gate was asked about before it knew of the pin.
            self.quietly(|quiet| quiet.wait_for_opens())?;
            let mut found = self.granting.openers(None);
            found.others.retain(|opener| {
                let is_own = pin.belongs_to(|family| family.may_have(opener.pid));
                (opener.writable || opener.pid == 0) && !is_own
            });
            let hidden = self
                .gate
                .writers(self.holder.file.as_fd())
                .map(Writers::hidden)
                .map_err(|errno| system("counting who can write to it", errno))?;
            if found.others.is_empty() && !found.unseen && hidden == 0 {
                return Ok(());
            }
            if backoff.is_over() {
                return Err(self.granting.open_elsewhere(found));
            }
            backoff.pause();
        }
    }

    /// Whether anybody but the holder itself can be in the middle of writing to
    /// the file, judged by the kernel's counts. Whoever writes, truncates, or
    /// maps the file writable does so by a description that is counted as a
    /// writer.
    fn others_may_write(&self) -> Result<bool, Refusal> {
        let Some(of_holder) = &self.of_holder else {
            return Ok(true);
        };
        let alone = self
            .gate
            .is_sole_writer(of_holder.as_fd(), self.holder.file.as_fd());
        alone
            .map(|alone| !alone)
            .map_err(|errno| system("asking the gate who writes", errno))
    }

    /// Refuses the pin if a part of the kernel uses the file, because some
    /// parts write without asking anybody.
    ///
    /// A loop device that can only read changes nothing: the driver has no
    /// descriptor to write by.
    fn no_kernel_users(&self) -> Result<(), Refusal> {
        let mut users = kernel_users(self.granting.judged.id, &self.granting.judged.path);
        users.retain(|user| user.writable);
        if users.is_empty() {
            return Ok(());
        }
        Err(self.granting.open_elsewhere(Openers {
            others: users,
            ..Openers::default()
        }))
    }
}

/// A description is one pin at most: its end would be that of both.
fn refuse_a_pin(gate: &Gate, file: BorrowedFd<'_>) -> Result<(), Refusal> {
    match gate.pin_of(file) {
        Ok(None) => Ok(()),
        Ok(Some(_)) => Err(refusal(
            Reason::Arguments,
            Errno::EXIST,
            "this open file description is a pin already",
            "open the file again, and pin that",
        )),
        Err(errno) => Err(system("asking the gate about the description", errno)),
    }
}

/// With frozen blocks nobody may have a writable mapping anywhere in the file:
/// `mremap(2)` could grow it over the frozen blocks, and no hook sees that.
/// Holders of pins are trusted not to do so. Waits for those who may let go of
/// one in time, and says whether any holder has such a mapping.
///
/// `/proc` shows one mapping after the other, so one that moves to and fro, or from
/// a process to its child, may be shown nowhere. But the kernel counts them
/// (`i_mmap_writable`), and the count does not depend on where they are: if it is
/// more than what was shown, there is one that was not.
pub(super) fn others_can_store(
    gate: &Gate,
    granting: &Granting<'_>,
    file: BorrowedFd<'_>,
    frozen: &[Range<u64>],
) -> Result<bool, Refusal> {
    if frozen.is_empty() {
        return Ok(false);
    }
    let mut backoff = granting.patiently();
    // A holder may make a mapping just now, or a process may be about to end: they are
    // in nobody's way.
    let mut tries = 3;
    loop {
        let shown = others_can_store_now(granting, frozen);
        let result = shown.and_then(|shown| {
            let counted = gate.mappings_that_store(file);
            let counted = counted.map_err(|errno| system("asking the gate about the file", errno));
            if counted? <= shown {
                return Ok(shown > 0);
            }
            Err(refusal(
                Reason::OpenElsewhere,
                Errno::TXTBSY,
                "a writable mapping of the file, of which /proc does not show where it is, could \
                 be over blocks that cannot be stored to as they are",
                "unmap it first, or fill and unshare the range",
            ))
        });
        tries -= 1;
        match result {
            Err(_) if !backoff.is_over() => backoff.pause(),
            Err(error) if error.openers.is_empty() && tries > 0 => {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}

/// The number of mappings of holders that can store. Refuses if anybody else has
/// one.
fn others_can_store_now(granting: &Granting<'_>, frozen: &[Range<u64>]) -> Result<usize, Refusal> {
    let found = granting.openers(None);
    // Descriptors are judged when they are used, wherever they hide.
    if found.unseen {
        return Err(granting.open_elsewhere(Openers {
            hidden: found.hidden,
            ..Openers::default()
        }));
    }
    let pins = granting.watched.pins.load();
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
    Ok(found.writable_mappings.len())
}
