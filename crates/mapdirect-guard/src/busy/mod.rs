//! Who may be in the middle of changing a file.
//!
//! A lease proves that nobody has a file open, but a truncation by path needs
//! no description, and what the gate let in through one behind it may still
//! be under way. Both are looked for among the threads that can be at it: all
//! of the system for what began before the gate closed, and only those that
//! the gate let in for what began behind it. [`suspicion`] says when a thread
//! is a suspect; whoever does anything else is none, however long it takes.
//!
//! A thread is looked at in up to three steps. Where truncations are looked
//! for, the number of the system call that it sleeps in mostly settles it.
//! Otherwise the function that it sleeps in (`/proc/<tid>/wchan`) does, which
//! is exact. Otherwise its stack does, and that only counts if the thread did
//! not run while it was read. A thread on a processor has no stack that could be read: where it
//! matters whoever looks goes to that processor, and so takes it away from the
//! thread for a moment.
//!
//! [`suspicion`]: crate::suspicion

mod look;
mod scans;
mod sweep;

pub(crate) use self::scans::{Census, Scans};

use self::look::look;
use self::sweep::{Item, everybody, sweep};
use crate::bounded::Stuck;
use crate::listeners;
use crate::suspicion::{Finding, LookFor, Prefix};
use crate::table::InodeId;
use crate::thaw;
use crate::wake::Backoff;
use mapdirect_sys::{kcmp, proc, proc_locks};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A thread that may be in the middle of something.
#[derive(Clone, Debug)]
pub(crate) struct Busy {
    pub(crate) tid: i32,
    pub(crate) command: String,
    pub(crate) doing: &'static str,
}

/// The file that a look is about.
#[derive(Clone, Copy, Debug)]
struct Subject {
    id: InodeId,
    prefix: Prefix,
}

/// A thread that may be in the middle of something, and why.
#[derive(Clone, Copy, Debug)]
struct Suspect {
    tid: i32,
    seen: Seen,
    /// How often it has been looked at.
    looks: u32,
}

/// What a look at a thread shows.
#[derive(Clone, Copy, Debug)]
enum Seen {
    /// It is in the middle of nothing that matters.
    Innocent,
    /// It may be.
    At(Finding),
    /// It is on a processor, or waits for one, and shows nothing; this is what
    /// it had run when first seen so.
    Running(Run),
}

/// How much a thread has run.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// Nanoseconds in all.
    all: u64,
    /// Clock ticks outside the kernel.
    outside: u64,
}

impl Run {
    /// More than any thread runs: if it cannot be read, no run is enough.
    const ENDLESS: Self = Self {
        all: u64::MAX / 2,
        outside: u64::MAX / 2,
    };

    fn of(tid: i32) -> Option<Self> {
        Some(Self {
            all: proc::runs(tid).ok()?.time,
            outside: proc::ticks_outside(tid).ok()?,
        })
    }

    /// This one, or `later` if nothing could be read for this one.
    fn or(self, later: Self) -> Self {
        if self.all == Self::ENDLESS.all {
            later
        } else {
            self
        }
    }

    /// Whether a thread has got out of what it may have been in the middle of,
    /// by what it has run since.
    fn is_over(self, tid: i32, look_for: LookFor) -> bool {
        let Some(now) = Self::of(tid) else {
            return false;
        };
        match look_for {
            // Past the few instructions between a permission check and the
            // counts that a lease looks at.
            LookFor::Truncations => now.all >= self.all.saturating_add(50_000),
            // It has been outside of the kernel. What it has run is split by
            // the ticks that found it inside and outside (`cputime_adjust`,
            // kernel/sched/cputime.c): until the next tick finds it inside,
            // what it runs there is taken for outside. That is no more than
            // one of these, which are as long as the longest tick there is.
            _ => now.outside > self.outside.saturating_add(1),
        }
    }
}

impl Suspect {
    fn look_again(self, look_for: LookFor, subject: Subject) -> Option<Self> {
        let looks = self.looks.saturating_add(1);
        let seen = match (self.seen, look(look_for, subject, self.tid, looks)) {
            (_, Seen::Innocent) => return None,
            (Seen::Running(had), Seen::Running(_)) if had.is_over(self.tid, look_for) => {
                return None;
            }
            // What counts is what it had run when that could be read first: one
            // that never ran has no count.
            (Seen::Running(had), Seen::Running(now)) => Seen::Running(had.or(now)),
            (_, seen) => seen,
        };
        Some(Self {
            tid: self.tid,
            seen,
            looks,
        })
    }

    fn into_busy(self) -> Busy {
        Busy {
            tid: self.tid,
            command: proc::command(self.tid),
            doing: match self.seen {
                Seen::At(
                    Finding::May(doing)
                    | Finding::MayByDescriptor(doing)
                    | Finding::IfFrozen(doing)
                    | Finding::IfLeased(doing)
                    | Finding::IfWatched(doing),
                ) => doing,
                Seen::Running(_) | Seen::Innocent | Seen::At(Finding::Nothing) => "running",
            },
        }
    }
}

/// Whether no thread of a process is in the middle of changing a file, without
/// a reference to it that the kernel would count.
///
/// A call takes no such reference if its thread has its table of descriptors
/// for itself (`__fget_light`, fs/file.c). So those that share the table of the
/// process need not be looked at: it takes one look at each to know that, and
/// its stack many more. Whoever has a table of its own is looked at; and so is
/// the first thread, if it is alone with its.
#[cfg_attr(not(feature = "bpf"), expect(dead_code, reason = "for the bpf gate"))]
pub(crate) fn is_at_rest(pid: i32) -> bool {
    let subject = Subject {
        id: InodeId { dev: 0, inode: 0 },
        // Whatever it is of.
        prefix: Prefix(""),
    };
    let threads = proc::numbers_in(&format!("/proc/{pid}/task")).unwrap_or_default();
    let apart: Vec<i32> = threads
        .iter()
        .copied()
        .filter(|tid| *tid != pid && !kcmp::same_descriptors(pid, *tid))
        .collect();
    let is_alone = threads.len() == apart.len() + 1;
    !threads.is_empty()
        && apart
            .into_iter()
            .chain(is_alone.then_some(pid))
            .all(|tid| matches!(look(LookFor::Changes, subject, tid, 0), Seen::Innocent))
}

/// How long to wait for threads to get through, before asking whether their
/// filesystem is frozen.
const BEFORE_ASKING: Duration = Duration::from_millis(50);
/// How often to look again at least, however little time there is: a thread
/// that was taken off its processor needs a chance to get back.
const LEAST_LOOKS: u32 = 20;

/// A file that nobody shall be in the middle of changing.
pub(crate) struct Quiet<'a> {
    /// Any descriptor of it.
    pub(crate) file: BorrowedFd<'a>,
    pub(crate) id: InodeId,
    /// What the names of its filesystem's functions begin with.
    pub(crate) prefix: Prefix,
    /// Threads that wait at the gate: they have not passed it.
    pub(crate) held: &'a dyn Fn() -> Arc<Vec<i32>>,
    pub(crate) deadline: Instant,
}

impl Quiet<'_> {
    fn subject(&self) -> Subject {
        Subject {
            id: self.id,
            prefix: self.prefix,
        }
    }

    /// Waits until every truncation by path that began before this call has
    /// either finished or is counted by the inode; ask for a lease then.
    /// Tells who may still be at it when the time is over.
    pub(crate) fn wait_for_truncations(&self, scans: &Scans) -> Result<Vec<Busy>, Stuck> {
        let census = scans.truncations(self.deadline)?;
        self.wait_for_those_of(&census)
    }

    /// The same by a census that began after the gate of this file was closed:
    /// one serves any number of files.
    pub(crate) fn wait_for_those_of(&self, census: &Census) -> Result<Vec<Busy>, Stuck> {
        self.wait_for(LookFor::Truncations, census.found.clone())
    }

    /// The same where a lease will be asked for that lets readers be.
    pub(crate) fn wait_for_all_truncations(&self) -> Result<Vec<Busy>, Stuck> {
        self.wait_for_everybody(LookFor::AllTruncations)
    }

    /// Waits until every open that began before this call has finished.
    pub(crate) fn wait_for_opens(&self) -> Result<Vec<Busy>, Stuck> {
        self.wait_for_everybody(LookFor::Opens)
    }

    /// Waits until everybody who was changing the file has finished.
    pub(crate) fn wait_for_changes(&self) -> Result<Vec<Busy>, Stuck> {
        self.wait_for_everybody(LookFor::Changes)
    }

    /// The same where it is known that nobody else can write to it.
    #[cfg_attr(not(feature = "bpf"), expect(dead_code, reason = "for the bpf gate"))]
    pub(crate) fn wait_for_readers(&self) -> Result<Vec<Busy>, Stuck> {
        self.wait_for_everybody(LookFor::ChangesByReaders)
    }

    /// Waits until every mapping that was being made before this call shows in
    /// `/proc/<pid>/maps`.
    pub(crate) fn wait_for_mappings(&self) -> Result<Vec<Busy>, Stuck> {
        self.wait_for_everybody(LookFor::Mappings)
    }

    /// Waits until none of these threads is changing the file any more.
    pub(crate) fn wait_for_changes_by(&self, tids: &[i32]) -> Result<Vec<Busy>, Stuck> {
        self.wait_for_these(LookFor::Changes, tids)
    }

    /// Waits until none of these threads is making a mapping any more.
    pub(crate) fn wait_for_mappings_by(&self, tids: &[i32]) -> Result<Vec<Busy>, Stuck> {
        self.wait_for_these(LookFor::Mappings, tids)
    }

    fn wait_for_everybody(&self, look_for: LookFor) -> Result<Vec<Busy>, Stuck> {
        let found = sweep(everybody(), look_for, self.subject(), self.deadline)?;
        self.wait_for(look_for, found)
    }

    fn wait_for_these(&self, look_for: LookFor, tids: &[i32]) -> Result<Vec<Busy>, Stuck> {
        let suspects = tids.iter().map(|tid| Suspect {
            tid: *tid,
            seen: Seen::At(Finding::May("running")),
            looks: 0,
        });
        self.wait_for(look_for, suspects.collect())
    }

    /// Looks at the suspects until there is none left, or the time is over and
    /// each has been looked at often enough. Those that begin later are not
    /// waited for: they meet a closed gate. Nor are those that `held` names:
    /// they have not passed it.
    fn wait_for(&self, look_for: LookFor, mut suspects: Vec<Suspect>) -> Result<Vec<Busy>, Stuck> {
        let begun = Instant::now();
        let mut facts = Facts::default();
        let mut looks = 0;
        let mut backoff = Backoff::until(
            self.deadline,
            Duration::from_micros(100),
            Duration::from_millis(5),
        );
        while !suspects.is_empty() {
            let waiting = (self.held)();
            suspects.retain(|suspect| !waiting.contains(&suspect.tid));
            let items = suspects.into_iter().map(Item::Suspect).collect();
            suspects = sweep(items, look_for, self.subject(), self.deadline)?;
            let asks = begun.elapsed() >= BEFORE_ASKING || looks >= LEAST_LOOKS;
            suspects.retain(|suspect| match suspect.seen {
                Seen::At(Finding::IfFrozen(_)) if asks => facts.is_frozen(self),
                Seen::At(Finding::IfWatched(_)) if asks => facts.is_watched(self),
                Seen::At(Finding::IfLeased(_)) => is_leased(self.id),
                _ => true,
            });
            looks += 1;
            if backoff.is_over() && looks >= LEAST_LOOKS {
                break;
            }
            backoff.pause();
        }
        Ok(suspects.into_iter().map(Suspect::into_busy).collect())
    }
}

/// Whether there is a lease on an inode that somebody could wait for. Yes, if
/// that cannot be told.
fn is_leased(id: InodeId) -> bool {
    let device = id.device();
    proc_locks::read_all().map_or(true, |locks| {
        locks.iter().any(|lock| {
            lock.kind == proc_locks::Kind::Lease
                && lock.inode == id.inode
                && (lock.major, lock.minor) == (device.major, device.minor)
        })
    })
}

/// What is asked once at most for a wait.
#[derive(Default)]
struct Facts {
    frozen: Option<bool>,
    watched: Option<bool>,
}

impl Facts {
    /// Who sleeps waiting for a thaw waits for another filesystem's, if this
    /// one is not frozen. It stays asked until then.
    fn is_frozen(&mut self, quiet: &Quiet<'_>) -> bool {
        let frozen = match self.frozen {
            Some(false) => false,
            _ => !thaw::is_thawed(quiet.file, quiet.deadline),
        };
        self.frozen = Some(frozen);
        frozen
    }

    /// Who waits for an answer that is not ours waits for another listener's.
    fn is_watched(&mut self, quiet: &Quiet<'_>) -> bool {
        *self
            .watched
            .get_or_insert_with(|| listeners::others_may_watch(quiet.id, quiet.deadline))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_counted_yet_counts_from_later() {
        let later = Run { all: 7, outside: 1 };
        assert_eq!(Run::ENDLESS.or(later).all, 7);
        let had = Run { all: 5, outside: 1 };
        assert_eq!(had.or(later).all, 5);
    }
}
