//! Finds the threads that may be in the middle of changing a file.
//!
//! A lease proves that nobody has a file open. But a truncation by path needs
//! no description, and an operation that the gate let in through a description
//! from behind it may still be under way. For operations from before the gate
//! closed, all threads of the system are searched. For operations from behind
//! the gate, only the threads that it let in are searched. [`suspicion`] says
//! when a thread is a suspect; a thread that does anything else is not, however
//! long that takes.
//!
//! A thread is looked at in up to three steps. For truncations, the number of
//! the system call in which the thread sleeps mostly settles the matter.
//! Otherwise the function in which the thread sleeps may (`/proc/<tid>/wchan`),
//! which is exact. Otherwise the stack decides, which counts only if the thread
//! did not run while the stack was read. A thread on a processor has no stack
//! that could be read. If that matters, the looking thread moves to the same
//! processor, and so takes the processor away for a moment.
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

/// A thread that may be in the middle of changing a file, as it is reported.
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

/// A suspect thread, and why it is one.
#[derive(Clone, Copy, Debug)]
struct Suspect {
    tid: i32,
    seen: Seen,
    /// How often the thread has been looked at.
    looks: u32,
}

/// What a look at a thread shows.
#[derive(Clone, Copy, Debug)]
enum Seen {
    /// The thread is in the middle of nothing that matters.
    Innocent,
    /// The thread may be changing the file.
    At(Finding),
    /// The thread is on a processor, or waits for one, and shows nothing. The
    /// value is what it had run when it was first seen so.
    Running(Run),
}

/// How much a thread has run.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// All of its running time, in nanoseconds.
    all: u64,
    /// Its running time outside the kernel, in clock ticks.
    outside: u64,
}

impl Run {
    /// More than any thread runs: if the time cannot be read, no run is long
    /// enough.
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

    /// This value, or `later` if this one could not be read.
    fn or(self, later: Self) -> Self {
        if self.all == Self::ENDLESS.all {
            later
        } else {
            self
        }
    }

    /// Whether a thread has finished what it may have been in the middle of,
    /// judged by what it has run since.
    fn is_over(self, tid: i32, look_for: LookFor) -> bool {
        let Some(now) = Self::of(tid) else {
            return false;
        };
        match look_for {
            // 50 microseconds are longer than the few instructions between a
            // permission check and the counts that a lease looks at.
            LookFor::Truncations => now.all >= self.all.saturating_add(50_000),
            // The thread has been outside of the kernel. The kernel splits a
            // thread's running time by the ticks that found it inside and
            // outside (`cputime_adjust`, kernel/sched/cputime.c). Until the
            // next tick finds the thread inside, its time inside is counted as
            // outside. That error is at most one clock tick here, because these
            // are as long as the longest tick there is.
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
            // What counts is the run time when it could first be read: a thread
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

/// Whether no thread of a process is in the middle of changing a file without a
/// reference to the file that the kernel would count.
///
/// A call takes no such reference if its thread has a descriptor table for
/// itself (`__fget_light`, fs/file.c). So threads that share the table of the
/// process need not be looked at: one look tells that they share it, while
/// reading a stack takes many more. A thread with a table of its own is looked
/// at; so is the first thread, if nobody shares its table.
#[cfg_attr(not(feature = "bpf"), expect(dead_code, reason = "for the bpf gate"))]
pub(crate) fn is_at_rest(pid: i32) -> bool {
    let subject = Subject {
        id: InodeId { dev: 0, inode: 0 },
        // Functions of any filesystem.
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

/// How long to wait for threads to finish before asking whether their
/// filesystem is frozen.
const BEFORE_ASKING: Duration = Duration::from_millis(50);
/// The least number of further looks, however little time there is: a thread
/// that was taken off its processor needs a chance to get back.
const LEAST_LOOKS: u32 = 20;

/// A file that nobody may be in the middle of changing.
pub(crate) struct Quiet<'a> {
    /// Any descriptor of the file.
    pub(crate) file: BorrowedFd<'a>,
    pub(crate) id: InodeId,
    /// The prefix of the names of its filesystem's functions.
    pub(crate) prefix: Prefix,
    /// Threads that wait at the gate, and so have not passed it.
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
    /// either finished or is counted by the inode; ask for a lease after that.
    /// Returns the threads that may still be truncating when the time is over.
    pub(crate) fn wait_for_truncations(&self, scans: &Scans) -> Result<Vec<Busy>, Stuck> {
        let census = scans.truncations(self.deadline)?;
        self.wait_for_those_of(&census)
    }

    /// The same by a census that began after the gate of this file was closed:
    /// one census serves any number of files.
    pub(crate) fn wait_for_those_of(&self, census: &Census) -> Result<Vec<Busy>, Stuck> {
        self.wait_for(LookFor::Truncations, census.found.clone())
    }

    /// The same before a lease that permits readers.
    pub(crate) fn wait_for_all_truncations(&self) -> Result<Vec<Busy>, Stuck> {
        self.wait_for_everybody(LookFor::AllTruncations)
    }

    /// Waits until every open that began before this call has finished.
    pub(crate) fn wait_for_opens(&self) -> Result<Vec<Busy>, Stuck> {
        self.wait_for_everybody(LookFor::Opens)
    }

    /// Waits until every thread that was changing the file has finished.
    pub(crate) fn wait_for_changes(&self) -> Result<Vec<Busy>, Stuck> {
        self.wait_for_everybody(LookFor::Changes)
    }

    /// The same when it is known that nobody else can write to the file.
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

    /// Looks at the suspects until none is left, or until the time is over and
    /// each has been looked at often enough. Operations that begin later are
    /// not waited for, because they meet a closed gate. Threads that `held`
    /// names are not waited for either, because they have not passed the gate.
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

/// Whether there is a lease on an inode for which somebody could be waiting.
/// `true` if that cannot be found out.
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

/// Facts that are asked at most once for each wait.
#[derive(Default)]
struct Facts {
    frozen: Option<bool>,
    watched: Option<bool>,
}

impl Facts {
    /// Whether the filesystem is frozen. If it is not, a thread that waits for
    /// a thaw waits for another filesystem. The question is asked again until
    /// the answer is no.
    fn is_frozen(&mut self, quiet: &Quiet<'_>) -> bool {
        let frozen = match self.frozen {
            Some(false) => false,
            _ => !thaw::is_thawed(quiet.file, quiet.deadline),
        };
        self.frozen = Some(frozen);
        frozen
    }

    /// Whether another listener may watch the file. A thread that waits for an
    /// answer that the guard does not owe waits for another listener's.
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
