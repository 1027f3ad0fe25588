//! Excluding others, under a gate of permission events.

use super::refusal::*;
use super::{Attempt, KEPT_FLAGS};
use crate::bounded::Stuck;
use crate::busy::{Busy, Quiet};
use crate::gate::fanotify::MASK;
use crate::openers::{Openers, Wanted, openers_before};
use crate::suspicion::Prefix;
use crate::table::{LOCK_BASE, Notes, Published, Watched};
use crate::wake::Backoff;
use crate::{Errno, Guard};
use mapdirect_model::facts::Filesystem;
use mapdirect_proto::{Opener, Reason, Refusal};
use mapdirect_sys::fcntl::{
    Lease, LockKind, LockOwner, conflicting_lock, lease_holds, lock_byte_shared, set_lock,
};
use mapdirect_sys::proc;
use rustix::fs::{OFlags, SeekFrom};
use rustix::pipe::PipeFlags;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// How often to ask for a lease at least, however little patience there is: a
/// truncation that changes nothing is over at once, and is counted all the
/// same.
const LEAST_TRIES: u32 = 5;

/// How long a replaced description may take to go away: an operation of
/// another thread may be using it.
const LETTING_GO: Duration = Duration::from_millis(200);

impl Attempt<'_> {
    pub(super) fn gate_has_mark(&self) -> Result<bool, Errno> {
        let gate = self.guard.gate.fanotify();
        gate.map_or(Ok(false), |gate| gate.group.has_mark(self.file.as_fd()))
    }

    /// Nothing else removes marks of an inode with a grant under way; if they
    /// are gone all the same there is no gate.
    pub(super) fn check_marks(&self) -> Result<(), Refusal> {
        let file = self.file.as_fd();
        let gate = self.gate_has_mark();
        let closes = self.guard.lifetime.closes.has_mark(file);
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

    pub(super) fn close_the_gate(&self) -> Result<(), Refusal> {
        let file = self.file.as_fd();
        let gate = self.guard.gate.fanotify();
        let result = gate
            .map_or(Ok(()), |gate| gate.group.add(MASK, file))
            .and_then(|()| self.guard.lifetime.watch(self.watched, file));
        result.map_err(|errno| {
            refusal(
                Reason::NoGate,
                Errno::OPNOTSUPP,
                format!("the kernel cannot watch this file (fanotify_mark: {errno})"),
                "run `mapdirect doctor` to see what this kernel offers",
            )
        })
    }

    /// Whoever has left is waited for no longer: others wait for the outcome.
    pub(super) fn require_wanted(&self) -> Result<(), Refusal> {
        if self.talk.is_wanted() {
            return Ok(());
        }
        Err(refusal(
            Reason::Protocol,
            Errno::PIPE,
            "the client is gone",
            "",
        ))
    }

    pub(super) fn patiently(&self) -> Backoff {
        Backoff::until(
            Instant::now() + self.patience,
            Duration::from_millis(1),
            Duration::from_millis(20),
        )
    }

    /// Nobody may hold a description from before the gate closed, and nobody
    /// may be in the middle of a truncation from before.
    pub(super) fn prove_from_scratch(&self) -> Result<(), Refusal> {
        self.quietly(|quiet| quiet.wait_for_truncations(&self.guard.scans))?;
        let mut backoff = self.patiently();
        let mut tries = 0;
        loop {
            // It counts writers and truncations alike, those under way too.
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
            if !self.judged.facts.reflink || over {
                let found = self.look_around()?;
                let Some(found) = found else {
                    return Ok(());
                };
                if over {
                    return Err(self.open_elsewhere(found));
                }
            }
            self.require_wanted()?;
            backoff.pause();
        }
    }

    /// Whoever comes to open the file for writing in the middle of a grant
    /// waits at the gate, and the lease counts it. If nobody else stands in
    /// the way, it gets the answer it would get a moment later. Says whether
    /// that is worth another try.
    pub(super) fn turn_openers_away(&self) -> Result<bool, Refusal> {
        if !self.watched.opens.any_waits() {
            return Ok(false);
        }
        self.mark_own_description()?;
        let found = self.openers(Some(self.mark));
        if !found.others.is_empty() || !found.hidden.is_empty() {
            return Ok(false);
        }
        self.watched.opens.refuse();
        self.guard.gate.reconsider();
        Ok(true)
    }

    /// Whether everybody who has the file open asks for a pin of it, too, and
    /// has come behind the gate for that.
    pub(super) fn only_those_who_wait(&self) -> Result<bool, Refusal> {
        let Some(turn) = self.turn.as_ref().filter(|turn| turn.bring_others()) else {
            return Ok(false);
        };
        self.mark_own_description()?;
        let harmless = |found: &Openers| {
            found.hidden.is_empty()
                && found.others.iter().all(|opener| {
                    turn.queue().knows(opener)
                        || !self.judged.facts.reflink && !opener.writable && opener.pid != 0
                })
        };
        if !harmless(&self.openers(Some(self.mark))) {
            return Ok(false);
        }
        // As beside readers: see `look_around`.
        self.quietly(|quiet| quiet.wait_for_opens())?;
        let again = self.openers(Some(self.mark));
        if !harmless(&again) {
            return Ok(false);
        }
        self.refuse_executed(&again)?;
        self.quietly(|quiet| quiet.wait_for_changes())?;
        Ok(true)
    }

    /// Without reflink a reader from before the gate can do no harm, but a
    /// lease cannot tell readers beside the holder's own descriptor from
    /// writers: look who they are. Returns who stands in the way, or nothing
    /// if nobody does.
    pub(super) fn look_around(&self) -> Result<Option<Openers>, Refusal> {
        self.mark_own_description()?;
        let harmless = |found: &Openers| {
            // Somebody must be there: the lease says so. What is not seen
            // may be anything.
            let explained = !found.others.is_empty() && found.hidden.is_empty();
            !self.judged.facts.reflink && explained && !found.has_writer()
        };
        let found = self.openers(Some(self.mark));
        if !harmless(&found) {
            return Ok(Some(found));
        }
        self.refuse_executed(&found)?;
        // A descriptor may have been on its way into a table while we looked:
        // from an open, or to a child. Those opens are over now, and a child
        // is seen beside its parent.
        self.quietly(|quiet| quiet.wait_for_opens())?;
        let again = self.openers(Some(self.mark));
        if !harmless(&again) {
            return Ok(Some(again));
        }
        self.quietly(|quiet| quiet.wait_for_changes())?;
        Ok(None)
    }

    /// Waits for others by `wait`, and refuses if they do not finish.
    pub(super) fn quietly(
        &self,
        wait: impl FnOnce(&Quiet<'_>) -> Result<Vec<Busy>, Stuck>,
    ) -> Result<(), Refusal> {
        let quiet = Quiet {
            file: self.file.as_fd(),
            id: self.judged.id,
            prefix: match self.judged.facts.filesystem {
                Filesystem::Xfs => Prefix("xfs_"),
                Filesystem::Ext4 => Prefix("ext4_"),
                // Anybody's.
                _ => Prefix(""),
            },
            held: &|| self.guard.gate.held(),
            // It ends as soon as it can, and a busy processor needs some time
            // to show that a thread goes on.
            deadline: Instant::now() + self.patience.max(Duration::from_secs(1)),
        };
        still_changing(&wait(&quiet).map_err(stuck)?)
    }

    pub(super) fn openers(&self, mark: Option<u64>) -> Openers {
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

    pub(super) fn lease_proves(&self) -> Result<bool, Refusal> {
        let file = self.file.as_fd();
        let _no_looks = self.watched.hold_looks();
        let proven = match lease_holds(file, Lease::Sole) {
            Ok(false) if !self.judged.is_writable() && !self.judged.facts.reflink => {
                let no_writer = lease_holds(file, Lease::NoWriter);
                if no_writer == Ok(true) {
                    let found = self.openers(None);
                    self.refuse_executed(&found)?;
                    // Whoever opens it to truncate it counts as a reader so
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
            // No leases here: only looking around is left.
            Err(Errno::INVAL) => Ok(false),
            Err(other) => Err(system("F_SETLEASE", other)),
        }
    }

    /// A gate switches the kernel's own protection of running programs off.
    pub(super) fn refuse_executed(&self, found: &Openers) -> Result<(), Refusal> {
        let Some(opener) = &found.executing else {
            return Ok(());
        };
        Err(Refusal {
            openers: vec![opener.clone()],
            ..refusal(
                Reason::Executing,
                Errno::TXTBSY,
                format!("pid {} ({}) is executing it", opener.pid, opener.command),
                "end that program first",
            )
        })
    }

    /// Has the holder's description told apart from others by a lock.
    pub(super) fn mark_own_description(&self) -> Result<(), Refusal> {
        lock_byte_shared(self.file.as_fd(), self.mark)
            .map_err(|errno| self.lock_refused(errno, self.mark))?;
        self.marked.set(true);
        Ok(())
    }

    /// Takes the mark off a description that stays.
    pub(super) fn unmark(&self) {
        if self.marked.take() {
            // A mark that stays tells nobody anything.
            let _ = set_lock(
                self.file.as_fd(),
                LockOwner::Description,
                LockKind::Unlock,
                self.mark,
                1,
            );
        }
    }

    pub(super) fn lock_refused(&self, errno: Errno, byte: u64) -> Refusal {
        if errno != Errno::AGAIN {
            return system("F_OFD_SETLK", errno);
        }
        let holder = conflicting_lock(self.file.as_fd(), byte, 1)
            .ok()
            .flatten()
            .and_then(|lock| lock.pid);
        let who = holder.map_or_else(
            || String::from("somebody"),
            |pid| format!("pid {pid} ({})", proc::command(pid)),
        );
        refusal(
            Reason::Locked,
            Errno::TXTBSY,
            format!("{who} holds an exclusive record lock to the end of all offsets"),
            format!("lock no further than byte {LOCK_BASE} (2^62), where pins are marked"),
        )
    }

    pub(super) fn open_elsewhere(&self, found: Openers) -> Refusal {
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

    /// Nothing that was let in since the last proof may still matter. Says
    /// whether there was nothing at all.
    pub(super) fn prove_again(&mut self, notes: &Published<'_, Notes>) -> Result<bool, Refusal> {
        let writers = notes.writers(|| self.no_other_writer())?;
        // It is known which threads these are: nobody else can be at it.
        let changes = notes.changes(|threads| {
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

    /// Nobody else may have it open for writing. All descriptions are behind
    /// the gate here, but some things the gate cannot see.
    pub(super) fn no_other_writer(&self) -> Result<(), Refusal> {
        let pins = self.watched.pins.load();
        let mut backoff = self.patiently();
        loop {
            if self.lease_proves()? {
                return Ok(());
            }
            self.mark_own_description()?;
            let mut found = self.openers(Some(self.mark));
            // Holders of pins may have theirs, and have been asked; so may
            // those who ask now.
            let is_holder = |opener: &Opener| {
                pins.iter().any(|pin| pin.pid == opener.pid)
                    || self.watched.queue.has(opener.pid, self.pin.pid)
            };
            found.others.retain(|opener| opener.writable);
            let explained = self.judged.is_writable()
                || pins.iter().any(|pin| pin.id != self.pin.id)
                || found.others.iter().any(is_holder);
            found.others.retain(|opener| !is_holder(opener));
            if found.others.is_empty() && found.hidden.is_empty() {
                // The kernel's own writers (a storage target, an overlay that
                // is mounted nowhere) are in no process. They count as
                // writers of the inode, and where nobody else may, it shows.
                let file = self.file.as_fd();
                if explained || lease_holds(file, Lease::NoWriter) != Ok(false) {
                    return Ok(());
                }
            }
            if backoff.is_over() {
                return Err(self.open_elsewhere(found));
            }
            self.require_wanted()?;
            backoff.pause();
        }
    }

    /// Opens the description that will be the pin.
    pub(super) fn open_for_pin(&self) -> Result<OwnedFd, Refusal> {
        let access = if self.judged.is_writable() {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        self.reopen(access)
    }

    pub(super) fn reopen(&self, flags: OFlags) -> Result<OwnedFd, Refusal> {
        self.guard
            .own
            .during(|| proc::reopen(self.file.as_fd(), flags))
            .map_err(|errno| system("opening the file again", errno))
    }

    /// Puts a description from behind the gate in the place of the holder's,
    /// and makes sure the old one is gone.
    pub(super) fn replace_description(&mut self) -> Result<(), Refusal> {
        // The old description is marked by a lock that goes when it does.
        self.mark_own_description()?;
        let replacement = self.reopen(self.judged.open_flags & KEPT_FLAGS)?;
        let position = rustix::fs::seek(&self.file, SeekFrom::Current(0))
            .and_then(|at| rustix::fs::seek(&replacement, SeekFrom::Start(at)));
        position.map_err(|errno| system("lseek", errno))?;
        let for_pin = self.open_for_pin()?;
        let _held = HoldOpens::new(self.guard, self.watched);
        self.talk.swap(replacement.as_fd())?;
        // Our own copy goes with this; from now on the pin's description
        // stands for the inode.
        self.file = for_pin;
        self.marked.set(false);
        if self.is_gone()? {
            return Ok(());
        }
        let mut found = self.openers(Some(self.mark));
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

    /// Whether the marked description is gone.
    pub(super) fn is_gone(&self) -> Result<bool, Refusal> {
        let mut backoff = Backoff::until(
            Instant::now() + LETTING_GO,
            Duration::from_micros(20),
            Duration::from_millis(10),
        );
        loop {
            let found = conflicting_lock(self.file.as_fd(), self.mark, 1)
                .map_err(|errno| system("F_OFD_GETLK", errno))?;
            if found.is_none() {
                return Ok(true);
            }
            if backoff.is_over() {
                return Ok(false);
            }
            backoff.pause();
        }
    }

    /// Ties the life of the pin to something that only its holders have. A
    /// description that can write is one: nobody else has such while the file
    /// is pinned, and its lock tells when it goes. Every reader could hold the
    /// same lock as one that cannot, so that comes with a pipe.
    pub(super) fn begin_life(&mut self) -> Result<(), Refusal> {
        if !self.judged.is_writable() {
            let flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
            let (ours, theirs) = rustix::pipe::pipe_with(flags).map_err(|e| system("pipe2", e))?;
            self.pin.lives_by(ours);
            self.life = Some(theirs);
            return Ok(());
        }
        let byte = self.pin.lock_byte();
        lock_byte_shared(self.file.as_fd(), byte).map_err(|errno| self.lock_refused(errno, byte))
    }

    /// Nobody may have a mapping to store by over what is to be frozen, from
    /// before the pin. Says whether anybody has one of anything else.
    pub(super) fn nobody_stores_to(&self, frozen: &[Range<u64>]) -> Result<bool, Refusal> {
        if frozen.is_empty() {
            return Ok(false);
        }
        if self.guard.gate.is_in_kernel() {
            return self.nobody_may_come_to_store(frozen);
        }
        let Some((_, notes)) = self.watched.published(self.pin.id) else {
            return Ok(false);
        };
        // What the gate has let in may not show yet.
        let mapped = notes.mappings(|threads| {
            self.quietly(|quiet| {
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
        let mut backoff = self.patiently();
        let found = loop {
            let found = self.openers(None);
            if found.hidden.is_empty() {
                break found;
            }
            if backoff.is_over() {
                return Err(self.open_elsewhere(Openers {
                    hidden: found.hidden,
                    ..Openers::default()
                }));
            }
            backoff.pause();
        };
        let mappings = found.writable_mappings;
        let over = mappings.iter().find(|(_, mapped)| {
            frozen
                .iter()
                .any(|run| run.start.max(mapped.start) < run.end.min(mapped.end))
        });
        let Some((opener, mapped)) = over else {
            return Ok(!mappings.is_empty());
        };
        Err(Refusal {
            openers: vec![opener.clone()],
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
}

/// Holds back every open of an inode while it exists.
struct HoldOpens<'a> {
    guard: &'a Guard,
    watched: &'a Watched,
}

impl<'a> HoldOpens<'a> {
    fn new(guard: &'a Guard, watched: &'a Watched) -> Self {
        watched.opens.hold(true);
        Self { guard, watched }
    }
}

impl Drop for HoldOpens<'_> {
    fn drop(&mut self) {
        self.watched.opens.hold(false);
        self.guard.gate.reconsider();
    }
}
