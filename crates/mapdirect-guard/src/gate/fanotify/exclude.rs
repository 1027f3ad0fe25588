//! Excludes everybody who could break a pin unseen.
//!
//! The fanotify gate is asked only about operations through descriptions that
//! were opened behind it. So it first closes, by inode marks. It then proves
//! that nobody has a description from before, and that nobody is still in the
//! middle of something that passed before. The holder's own description is
//! replaced by one from behind the gate.
//!
//! If an inode is behind the gate already, and nothing was let in since the
//! last proof, all of that holds. It then remains to open a description, lock
//! its byte and read the block map.

use super::Gate;
use super::adopt::no_room;
use crate::Errno;
use crate::bounded::Stuck;
use crate::busy::{Busy, Quiet};
use crate::grant::{
    Findings, Granting, Holder, KEPT_FLAGS, Secured, Survey, gone, lock_refused, refusal,
    refuse_executed, system,
};
use crate::openers::{Mark, Openers};
use crate::table::{Carrier, GrantState, Notes, Pin, Published};
use crate::wake::Backoff;
use mapdirect_proto::{BlockMap, Flags, Opener, Reason, Refusal};
use mapdirect_sys::fcntl::{
    Lease, LockKind, LockOwner, conflicting_lock, lease_holds, lock_byte_shared, set_lock,
};
use rustix::fs::SeekFrom;
use rustix::pipe::PipeFlags;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// The least number of times to ask for a lease, however little patience there
/// is. A truncation that changes nothing is over at once, but is counted as a
/// writer all the same.
const LEAST_TRIES: u32 = 5;

/// How long a replaced description may take to go away, because an operation of
/// another thread may still be using it.
const LETTING_GO: Duration = Duration::from_millis(200);

/// One attempt to exclude others.
pub(super) struct Exclusion<'a, 'h> {
    gate: &'a Gate,
    granting: &'a Granting<'a>,
    /// Notes on what was let through before the gate could see the pin.
    notes: Published<'a, Notes>,
    holder: &'a mut Holder<'h>,
}

impl<'a, 'h> Exclusion<'a, 'h> {
    pub(super) fn begin(
        gate: &'a Gate,
        granting: &'a Granting<'a>,
        state: &mut GrantState,
        holder: &'a mut Holder<'h>,
    ) -> Self {
        // Marks go with their inode, for example on unmount. An earlier proof
        // is then void.
        state.closed = state.closed && gate.group.has_mark(holder.file.as_fd()) == Ok(true);
        if !state.closed {
            granting.watched.notes.forget();
        }
        Self {
            gate,
            granting,
            notes: granting.watched.publish(granting.pin),
            holder,
        }
    }

    /// Excludes others, surveys the blocks and settles the pin.
    pub(super) fn run(mut self, state: &mut GrantState) -> Result<Secured, Refusal> {
        let secured = self.secure(state);
        self.granting.watched.opens.reset();
        secured
    }

    fn secure(&mut self, state: &mut GrantState) -> Result<Secured, Refusal> {
        if !self.gate.journal.has_room() {
            return Err(no_room());
        }
        let at_rest = self.exclude(state.closed)?;
        if self.granting.pin.flags.contains(Flags::DENY_RENAME) {
            let file = self.holder.file.as_fd();
            let watched = self.gate.lifetime.watch_names(self.granting.watched, file);
            watched.map_err(|errno| system("fanotify_mark", errno))?;
        }
        let lifeline = self.begin_life()?;
        state.closed = true;
        let (map, found) = self.survey(at_rest)?;
        self.check_marks()?;
        let Granting { pin, watched, .. } = self.granting;
        pin.settle(&map, &found.pinned, found.kept_pages);
        watched.renew_layers();
        Ok(Secured { map, lifeline })
    }

    /// Makes sure that every description that matters is behind the gate, and
    /// that nobody is in the middle of anything from before. Says whether
    /// nothing was let through since that was last true.
    ///
    /// If the gate was closed already, only what it has let through since needs
    /// a proof.
    fn exclude(&mut self, was_closed: bool) -> Result<bool, Refusal> {
        let at_rest = if was_closed {
            // What holders of pins of strength stable do is let through unseen.
            self.prove_again()? && !self.granting.watched.was_followed()
        } else {
            self.close_the_gate()?;
            self.prove_from_scratch()?;
            false
        };
        let judged = self.granting.judged;
        if !was_closed && (judged.is_writable() || judged.facts.reflink) {
            self.replace_description()?;
        } else {
            self.holder.file = self.granting.open_for_pin(self.holder.file.as_fd())?;
        }
        Ok(at_rest)
    }

    fn survey(&self, at_rest: bool) -> Result<(BlockMap, Findings), Refusal> {
        let file = self.holder.file.as_fd();
        let survey = Survey {
            granting: self.granting,
            file,
            others_can_store: &|frozen| others_can_store(self.granting, &self.notes, file, frozen),
        };
        survey.until_at_rest(at_rest)
    }

    /// Checks that the marks are there. Nothing else removes the marks of an
    /// inode during a grant, and without marks there is no gate.
    fn check_marks(&self) -> Result<(), Refusal> {
        let file = self.holder.file.as_fd();
        let gate = self.gate.group.has_mark(file);
        let closes = self.gate.lifetime.watches(file);
        if gate == Ok(true) && closes == Ok(true) {
            return Ok(());
        }
        Err(refusal(
            Reason::StillChanging,
            Errno::TXTBSY,
            "the watch on the file went away while the pin was granted",
            "try again",
        ))
    }

    fn close_the_gate(&self) -> Result<(), Refusal> {
        let file = self.holder.file.as_fd();
        self.gate
            .close_at(self.granting.watched, file)
            .map_err(|errno| match errno {
                // The call itself has no such error.
                Errno::NFILE => no_room(),
                errno => refusal(
                    Reason::NoGate,
                    Errno::OPNOTSUPP,
                    format!("the kernel cannot watch this file (fanotify_mark: {errno})"),
                    "run `mapdirect doctor` to see what this kernel offers",
                ),
            })
    }

    /// Fails if the holder does not wait any more: other requests wait for the
    /// outcome of this one.
    fn require_wanted(&self) -> Result<(), Refusal> {
        if self.holder.talk.is_wanted() {
            return Ok(());
        }
        Err(gone())
    }

    fn quietly(
        &self,
        wait: impl FnOnce(&Quiet<'_>) -> Result<Vec<Busy>, Stuck>,
    ) -> Result<(), Refusal> {
        self.granting.quietly(self.holder.file.as_fd(), wait)
    }

    /// Looks who has the file open. Descriptors of the holder's own description
    /// are listed separately.
    fn openers(&self) -> Openers {
        let own = Mark::Descriptor(self.holder.file.as_raw_fd());
        self.granting.openers(Some(own))
    }

    /// Proves that nothing that was let in since the last proof can still
    /// matter. Says whether nothing was let in at all.
    fn prove_again(&self) -> Result<bool, Refusal> {
        let writers = self.notes.writers(|| self.no_other_writer())?;
        if self.granting.pin.denies_write() {
            // Also by those who were no obstacle to earlier pins.
            self.no_other_writer()?;
        }
        // These threads are known, so nobody else can be changing the file.
        let changes = self.notes.changes(|threads| {
            self.quietly(|quiet| {
                if threads.and_others {
                    quiet.wait_for_changes()
                } else {
                    quiet.wait_for_changes_by(&threads.tids)
                }
            })
        })?;
        Ok(!writers && !changes)
    }

    /// Ties the life of the pin to something that only its holders have, and
    /// that shows when it goes: see [`Carrier`].
    fn begin_life(&self) -> Result<Option<OwnedFd>, Refusal> {
        let pin = self.granting.pin;
        let writable = self.granting.judged.is_writable();
        if writable && pin.flags.contains(Flags::IN_PLACE) {
            pin.lives_by(Carrier::Writers);
            return Ok(None);
        }
        if writable && pin.mapped.is_some() {
            let (file, byte) = (self.holder.file.as_fd(), pin.lock_byte());
            lock_byte_shared(file, byte).map_err(|errno| lock_refused(file, errno, byte))?;
            pin.lives_by(Carrier::Lock);
            return Ok(None);
        }
        let flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
        let (ours, theirs) = rustix::pipe::pipe_with(flags).map_err(|e| system("pipe2", e))?;
        pin.lives_by(Carrier::Pipe(ours));
        Ok(Some(theirs))
    }
}

impl Exclusion<'_, '_> {
    /// Proves that nobody has a description from before the gate closed, and
    /// that nobody is in the middle of a truncation from before.
    fn prove_from_scratch(&self) -> Result<(), Refusal> {
        self.quietly(|quiet| quiet.wait_for_truncations(&self.granting.guard.scans))?;
        let mut backoff = self.granting.patiently();
        let mut tries = 0;
        loop {
            // The lease counts writers and truncations alike, including those
            // under way.
            if self.lease_proves()? {
                return Ok(());
            }
            if self.turn_openers_away()? {
                continue;
            }
            if self.only_those_who_wait()? {
                return Ok(());
            }
            tries += 1;
            let over = backoff.is_over() && tries >= LEAST_TRIES;
            if !self.granting.judged.facts.reflink || over {
                let found = self.look_around()?;
                let Some(found) = found else {
                    return Ok(());
                };
                if over {
                    return Err(self.granting.open_elsewhere(found));
                }
            }
            self.require_wanted()?;
            backoff.pause();
        }
    }

    /// Refuses the opens for writing that wait at the gate during this grant,
    /// because the lease counts them as writers. If nothing else stands in the
    /// way of the grant, they only get a little earlier the answer that they
    /// would get anyway. Says whether that makes another try worthwhile.
    fn turn_openers_away(&self) -> Result<bool, Refusal> {
        if !self.granting.watched.opens.any_waits() {
            return Ok(false);
        }
        let found = self.openers();
        if !found.others.is_empty() || !found.hidden.is_empty() {
            return Ok(false);
        }
        self.granting.watched.opens.refuse();
        self.granting.guard.waiting.decided();
        Ok(true)
    }

    /// Whether everybody who has the file open also asks for a pin on it, and
    /// has come behind the gate.
    fn only_those_who_wait(&self) -> Result<bool, Refusal> {
        let turn = &self.holder.turn;
        if self.granting.pin.denies_write() || !turn.bring_others() {
            return Ok(false);
        }
        let harmless = |found: &Openers| {
            found.hidden.is_empty()
                && found.others.iter().all(|opener| {
                    turn.queue().knows(opener)
                        || !self.granting.judged.facts.reflink
                            && !opener.writable
                            && opener.pid != 0
                })
        };
        if !harmless(&self.openers()) {
            return Ok(false);
        }
        // Look a second time, as with readers: see `look_around`.
        self.quietly(|quiet| quiet.wait_for_opens())?;
        let again = self.openers();
        if !harmless(&again) {
            return Ok(false);
        }
        refuse_executed(&again)?;
        self.quietly(|quiet| quiet.wait_for_changes())?;
        Ok(true)
    }

    /// Looks who has the file open. Without reflink a reader from before the
    /// gate can do no harm, but a lease cannot tell readers beside the holder's
    /// own descriptor from writers. Returns the openers that stand in the way,
    /// or `None` if there are none.
    fn look_around(&self) -> Result<Option<Openers>, Refusal> {
        let harmless = |found: &Openers| {
            // The lease says that somebody has the file open. An opener that is
            // not seen may be anything.
            let explained = !found.others.is_empty() && found.hidden.is_empty();
            !self.granting.judged.facts.reflink && explained && !found.has_writer()
        };
        let found = self.openers();
        if !harmless(&found) {
            return Ok(Some(found));
        }
        refuse_executed(&found)?;
        // A descriptor may have been on its way into a table during the look,
        // from an open or to a child. Such opens are over now, and a child is
        // seen beside its parent.
        self.quietly(|quiet| quiet.wait_for_opens())?;
        let again = self.openers();
        if !harmless(&again) {
            return Ok(Some(again));
        }
        self.quietly(|quiet| quiet.wait_for_changes())?;
        Ok(None)
    }

    fn lease_proves(&self) -> Result<bool, Refusal> {
        let file = self.holder.file.as_fd();
        let _no_looks = self.granting.watched.pause_looks();
        let proven = match lease_holds(file, Lease::Sole) {
            Ok(false)
                if !self.granting.judged.is_writable() && !self.granting.judged.facts.reflink =>
            {
                let no_writer = lease_holds(file, Lease::NoWriter);
                if no_writer == Ok(true) {
                    let found = self.granting.openers(None);
                    refuse_executed(&found)?;
                    // An open that will truncate counts only as a reader so
                    // far.
                    self.quietly(|quiet| quiet.wait_for_all_truncations())?;
                    lease_holds(file, Lease::NoWriter)
                } else {
                    no_writer
                }
            }
            proven => proven,
        };
        match proven {
            Ok(proven) => Ok(proven),
            // This file has no leases, so looking around is the only way left.
            Err(Errno::INVAL) => Ok(false),
            Err(other) => Err(system("F_SETLEASE", other)),
        }
    }

    /// Proves that nobody else has the file open for writing. All descriptions
    /// are behind the gate here, but some things the gate cannot see.
    fn no_other_writer(&self) -> Result<(), Refusal> {
        let pins = self.granting.watched.pins.load();
        let mut backoff = self.granting.patiently();
        loop {
            if self.lease_proves()? {
                return Ok(());
            }
            let mut found = self.openers();
            // Holders of pins and their families may have the file open for
            // writing, because the gate has judged them. So may the processes
            // whose requests wait.
            let families = self.granting.watched.families();
            let own = self.granting.pin;
            let is_holder = |opener: &Opener| {
                if own.denies_write() {
                    return own.belongs_to(|family| family.may_have(opener.pid));
                }
                pins.iter().any(|pin| pin.pid == opener.pid)
                    || families.iter().any(|family| family.may_have(opener.pid))
                    || self
                        .granting
                        .watched
                        .queue
                        .has(opener.pid, self.granting.pin.pid)
            };
            found.others.retain(|opener| opener.writable);
            // A pin that has ended explains nobody, also before its end is noticed.
            let file = self.holder.file.as_fd();
            let lives = |pin: &Pin| !pin.is_dead() && pin.is_alive(file);
            let explained = self.granting.judged.is_writable()
                || pins
                    .iter()
                    .any(|pin| pin.id != self.granting.pin.id && lives(pin))
                || found.others.iter().any(is_holder);
            found.others.retain(|opener| !is_holder(opener));
            if found.others.is_empty() && found.hidden.is_empty() {
                // The kernel's own writers (a storage target, an overlay that
                // is mounted nowhere) are in no process. They count as writers
                // of the inode, so a lease shows them when nobody else may
                // write.
                if explained || lease_holds(file, Lease::NoWriter) != Ok(false) {
                    return Ok(());
                }
            }
            if backoff.is_over() {
                return Err(self.granting.open_elsewhere(found));
            }
            self.require_wanted()?;
            backoff.pause();
        }
    }

    /// Replaces the holder's description by one from behind the gate, and makes
    /// sure that the old one is gone.
    fn replace_description(&mut self) -> Result<(), Refusal> {
        let flags = self.granting.judged.open_flags & KEPT_FLAGS;
        let old = self.holder.file.as_fd();
        let replacement = self.granting.reopen(old, flags)?;
        let position = rustix::fs::seek(old, SeekFrom::Current(0))
            .and_then(|at| rustix::fs::seek(&replacement, SeekFrom::Start(at)));
        position.map_err(|errno| system("lseek", errno))?;
        let for_pin = self.granting.open_for_pin(old)?;
        let _held = HoldOpens::new(self.granting);
        // A lock goes when its description does: when nobody has it open or
        // mapped any more, and no operation is under way by it. Nobody else can
        // take a lock meanwhile.
        let byte = self.granting.guard.next_lock_byte();
        lock_byte_shared(old, byte).map_err(|errno| lock_refused(old, errno, byte))?;
        if let Err(refusal) = self.holder.talk.swap(replacement.as_fd()) {
            // If this fails, the lock that stays does no harm.
            let _ = set_lock(old, LockOwner::Description, LockKind::Unlock, byte, 1);
            return Err(refusal);
        }
        // This assignment closes the guard's own copy. From now on the pin's
        // description stands for the inode.
        self.holder.file = for_pin;
        if is_unlocked_soon(self.holder.file.as_fd(), byte)? {
            return Ok(());
        }
        let mut found = self.granting.openers(Some(Mark::Lock(byte)));
        found.marked.extend(
            found
                .others
                .drain(..)
                .filter(|opener| opener.mapped || opener.pid == 0),
        );
        Err(Refusal {
            openers: found.marked,
            ..refusal(
                Reason::OpenHere,
                Errno::TXTBSY,
                "the descriptor given has a duplicate, a mapping made through it, or an \
                 operation under way that the gate cannot watch",
                "close duplicates in other processes, unmap it, let operations finish; \
                 then try again",
            )
        })
    }
}

/// Whether the lock that another description has on a byte goes away in a
/// moment.
fn is_unlocked_soon(file: BorrowedFd<'_>, byte: u64) -> Result<bool, Refusal> {
    let mut backoff = Backoff::until(
        Instant::now() + LETTING_GO,
        Duration::from_micros(20),
        Duration::from_millis(10),
    );
    loop {
        let found =
            conflicting_lock(file, byte, 1).map_err(|errno| system("F_OFD_GETLK", errno))?;
        if found.is_none() {
            return Ok(true);
        }
        if backoff.is_over() {
            return Ok(false);
        }
        backoff.pause();
    }
}

/// Whether anybody else may have a writable mapping of the file. Refuses the
/// pin if such a mapping covers blocks that are to be frozen and is from before
/// the pin.
pub(super) fn others_can_store(
    granting: &Granting<'_>,
    notes: &Published<'_, Notes>,
    file: BorrowedFd<'_>,
    frozen: &[Range<u64>],
) -> Result<bool, Refusal> {
    if frozen.is_empty() {
        return Ok(false);
    }
    // Mappings that the gate has let in may not show yet.
    let mapped = notes.mappings(|threads| {
        granting.quietly(file, |quiet| {
            if threads.and_others {
                quiet.wait_for_mappings()
            } else {
                quiet.wait_for_mappings_by(&threads.tids)
            }
        })
    })?;
    if !mapped {
        return Ok(false);
    }
    let over = |mapped: &Range<u64>| {
        frozen
            .iter()
            .any(|run| run.start.max(mapped.start) < run.end.min(mapped.end))
    };
    let mut backoff = granting.patiently();
    let (opener, mapped) = loop {
        let found = granting.openers(None);
        let mut mappings = found.writable_mappings.iter();
        let in_the_way = mappings.find(|(_, mapped)| over(mapped));
        if found.hidden.is_empty() && in_the_way.is_none() {
            return Ok(!found.writable_mappings.is_empty());
        }
        if !backoff.is_over() {
            backoff.pause();
        } else if let Some((opener, mapped)) = in_the_way {
            break (opener.clone(), mapped.clone());
        } else {
            return Err(granting.open_elsewhere(Openers {
                hidden: found.hidden,
                ..Openers::default()
            }));
        }
    };
    Err(Refusal {
        openers: vec![opener],
        ..refusal(
            Reason::OpenElsewhere,
            Errno::TXTBSY,
            format!(
                "a writable mapping of bytes {} to {} covers blocks that cannot be \
                 stored to as they are",
                mapped.start, mapped.end
            ),
            "unmap it first, or fill and unshare the range",
        )
    })
}

/// Holds back every open of an inode while this value exists.
struct HoldOpens<'a>(&'a Granting<'a>);

impl<'a> HoldOpens<'a> {
    fn new(granting: &'a Granting<'a>) -> Self {
        granting.watched.opens.hold(true);
        Self(granting)
    }
}

impl Drop for HoldOpens<'_> {
    fn drop(&mut self) {
        self.0.watched.opens.hold(false);
        self.0.guard.waiting.decided();
    }
}
