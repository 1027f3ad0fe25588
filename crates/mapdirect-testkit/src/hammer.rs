//! Hammers: one trick again and again, by several processes without any
//! privilege that preempt each other.
//!
//! A gate that takes one call for another does so once in thousands of times.
//! So each trick is made as often as there is time for, on few processors, by
//! processes that the scheduler treats differently. What passed is counted by
//! what the calls return; whoever hammers looks at the block map as well.

mod tricks;

use crate::attack::{Where, clone_range, dedupe};
use crate::disk::Kind;
use crate::fault::Access;
use crate::process::{listen, say};
use crate::random::Random;
use crate::raw::adversary::{self, Aio, Notifier, Priority, Ring, shared_counters};
use crate::raw::{self, PageBuffer, PlainMap, Result, Uring};
use anyhow::{Context, bail, ensure};
use mapdirect_sys::Errno;
use rustix::fs::{Mode, OFlags, SeekFrom, seek};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
pub use tricks::{TRICKS, by_name};

/// Environment variable: how many tries a hammer makes, all tricks together.
pub const TRIES_VARIABLE: &str = "MAPDIRECT_HAMMER_TRIES";

/// Processes that hammer at the same time.
pub const PROCESSES: u64 = 8;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// In the file with frozen blocks: all of it, written but for
pub const SPARSE: u64 = 4 * MIB;
/// a hole, from here on a MiB,
pub const HOLE: u64 = MIB;
/// what is unwritten, from here on a MiB,
pub const UNWRITTEN: u64 = 2 * MIB;
/// and what is shared, where there is sharing: so many bytes.
pub const SHARED: (u64, u64) = (3 * MIB + MIB / 2, 65_536);
/// Bytes of the file that is stable throughout, and of the one that ends
/// where the frozen part of its pin begins.
pub const SOLID: u64 = MIB;
/// Where the pin of the latter ends.
pub const TAIL: u64 = 2 * MIB;

const RWF_APPEND: i32 = 0x10;
const RWF_NOAPPEND: i32 = 0x20;
const RWF_ATOMIC: i32 = 0x40;
const KEEP_SIZE: i32 = 0x01;
const PUNCH: i32 = KEEP_SIZE | 0x02;
const COLLAPSE: i32 = 0x08;
const ZERO: i32 = 0x10;
const INSERT: i32 = 0x20;
const WRITE_ZEROES: i32 = 0x80;
/// No mode there is.
const NO_MODE: i32 = 0x4000_0000;
const MADV_REMOVE: i32 = 9;
const BOTH: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// Where nothing can be: a range that begins here ends beyond the largest
/// offset.
const OVERFLOW: u64 = i64::MAX as u64 - 10;

/// The files that are hammered.
#[derive(Debug)]
pub struct Files {
    directory: PathBuf,
}

impl Files {
    /// Those in a directory.
    #[must_use]
    pub fn at(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
        }
    }

    /// Makes them in a new directory, for everybody to write to.
    pub fn make(directory: &Path, kind: Kind) -> anyhow::Result<Self> {
        std::fs::create_dir(directory)?;
        let files = Self::at(directory);
        let bytes = vec![0x61; usize::try_from(SOLID)?];
        for path in [files.solid(), files.tail()] {
            std::fs::write(path, &bytes)?;
        }
        let sparse = File::create(files.sparse())?;
        sparse.write_all_at(&bytes, 0)?;
        sparse.write_all_at(&bytes, UNWRITTEN + MIB)?;
        raw::fallocate(sparse.as_fd(), 0, UNWRITTEN, MIB)?;
        sparse.set_len(SPARSE)?;
        if kind.reflink() {
            let sharer = File::create(directory.join("sharer"))?;
            let from = File::open(files.sparse())?;
            clone_range(sharer.as_fd(), from.as_fd(), SHARED.0, SHARED.1, 0)?;
        }
        for process in 0..PROCESSES {
            std::fs::write(files.own(process), &bytes)?;
        }
        use std::os::unix::fs::PermissionsExt;
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            entry.path().metadata()?;
            std::fs::set_permissions(entry.path(), std::fs::Permissions::from_mode(0o666))?;
            File::open(entry.path())?.sync_all()?;
        }
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o777))?;
        Ok(files)
    }

    /// The one with frozen blocks.
    #[must_use]
    pub fn sparse(&self) -> PathBuf {
        self.directory.join("sparse")
    }

    /// The one without.
    #[must_use]
    pub fn solid(&self) -> PathBuf {
        self.directory.join("solid")
    }

    /// The one that ends amid its pin.
    #[must_use]
    pub fn tail(&self) -> PathBuf {
        self.directory.join("tail")
    }

    fn own(&self, process: u64) -> PathBuf {
        self.directory.join(format!("own-{process}"))
    }

    /// Each that is pinned, and what of it.
    #[must_use]
    pub fn pinned(&self) -> [(PathBuf, u64); 3] {
        [
            (self.sparse(), SPARSE),
            (self.solid(), SOLID),
            (self.tail(), TAIL),
        ]
    }
}

/// What it means when a trick's last call succeeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Success {
    /// It did what a pin forbids.
    Breach,
    /// It may have gone where it may: only the block map tells.
    Harmless,
    /// The same, and no try need be refused.
    Allowed,
}

/// A way to be taken for something else, or for nothing.
#[derive(Clone, Copy, Debug)]
pub struct Trick {
    /// Its name, unique.
    pub name: &'static str,
    /// Where it can be made.
    pub place: Where,
    /// What success means.
    pub success: Success,
    /// How many times as often as others it is tried.
    pub weight: u64,
    run: fn(&mut Attacker) -> Result<()>,
}

const fn breach(name: &'static str, run: fn(&mut Attacker) -> Result<()>) -> Trick {
    Trick {
        name,
        place: Where::Everywhere,
        success: Success::Breach,
        weight: 1,
        run,
    }
}

const fn harmless(name: &'static str, run: fn(&mut Attacker) -> Result<()>) -> Trick {
    Trick {
        success: Success::Harmless,
        ..breach(name, run)
    }
}

const fn allowed(name: &'static str, run: fn(&mut Attacker) -> Result<()>) -> Trick {
    Trick {
        success: Success::Allowed,
        ..breach(name, run)
    }
}

/// A trick for which two threads must meet: it is tried more often.
const fn often(trick: Trick) -> Trick {
    Trick { weight: 8, ..trick }
}

const fn reflink(trick: Trick) -> Trick {
    Trick {
        place: Where::Reflink,
        ..trick
    }
}

/// The thread that answers for the kernel.
struct Forger {
    reader: OwnedFd,
    ready: Sender<()>,
}

impl Forger {
    fn new() -> Result<Self> {
        let (reader, writer) = rustix::pipe::pipe()?;
        let (ready, asked): (Sender<()>, Receiver<()>) = channel();
        // Started before, so that it need not ask itself.
        let (hand_over, notifier) = channel::<Notifier>();
        std::thread::spawn(move || {
            let Ok(notifier) = notifier.recv() else {
                return;
            };
            while asked.recv().is_ok() {
                let wake = || {
                    let _ = rustix::io::write(&writer, b"w");
                };
                if notifier.answer(wake).is_err() {
                    return;
                }
            }
        });
        hand_over
            .send(Notifier::install()?)
            .map_err(|_| Errno::PIPE)?;
        Ok(Self { reader, ready })
    }
}

/// Places of the files, at random.
struct Places {
    random: Random,
    /// Some blocks are shared.
    shares: bool,
}

impl Places {
    fn below(&mut self, limit: u64) -> u64 {
        self.random.below(limit)
    }

    /// A byte of the frozen blocks.
    fn frozen(&mut self) -> u64 {
        if self.shares && self.below(8) == 0 {
            return SHARED.0 + self.below(SHARED.1);
        }
        HOLE + self.below(UNWRITTEN + MIB - HOLE)
    }

    /// A byte far from what is frozen.
    fn stable(&mut self) -> u64 {
        self.below(SOLID / 2)
    }

    /// The beginning of a block.
    fn block(&mut self, below: u64) -> u64 {
        self.below(below / PAGE) * PAGE
    }
}

/// A thread that does something again and again until it is dropped.
struct Meanwhile {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Meanwhile {
    /// `step` says whether it was refused.
    fn new(mut step: impl FnMut() -> bool + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut refused = 0;
            while !seen.load(SeqCst) {
                refused += u64::from(step());
            }
            refused
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    /// Ends it, and says how often it was refused.
    fn end(mut self) -> u64 {
        self.stop.store(true, SeqCst);
        let thread = self.thread.take();
        thread.map_or(0, |thread| thread.join().unwrap_or(0))
    }
}

/// One process that hammers.
struct Attacker {
    files: Files,
    random: Places,
    sparse: Arc<OwnedFd>,
    appending: OwnedFd,
    solid: Arc<OwnedFd>,
    reader: OwnedFd,
    direct: OwnedFd,
    tail: Arc<OwnedFd>,
    tail_appending: OwnedFd,
    own: OwnedFd,
    buffer: PageBuffer,
    #[cfg(target_arch = "x86_64")]
    low: adversary::junk_compat::LowPage,
    aio: Option<Aio>,
    ring: Option<Ring>,
    meanwhile: Option<Meanwhile>,
    forger: Option<Forger>,
}

impl Attacker {
    fn new(directory: &Path, shares: bool, process: u64, seed: u64) -> Result<Self> {
        let files = Files::at(directory);
        let open = |path: &Path, flags| rustix::fs::open(path, flags, Mode::empty());
        let (both, append) = (OFlags::RDWR, OFlags::RDWR | OFlags::APPEND);
        Ok(Self {
            sparse: Arc::new(open(&files.sparse(), both)?),
            appending: open(&files.sparse(), append)?,
            solid: Arc::new(open(&files.solid(), both)?),
            reader: open(&files.solid(), OFlags::RDONLY)?,
            direct: open(&files.solid(), both | OFlags::DIRECT)?,
            tail: Arc::new(open(&files.tail(), both)?),
            tail_appending: open(&files.tail(), append)?,
            own: open(&files.own(process), both)?,
            files,
            random: Places {
                random: Random::new(seed),
                shares,
            },
            buffer: PageBuffer::new(16_384),
            #[cfg(target_arch = "x86_64")]
            low: adversary::junk_compat::LowPage::new()?,
            aio: None,
            ring: None,
            meanwhile: None,
            forger: None,
        })
    }

    /// Flips a flag of a description from now on.
    fn flip(&mut self, file: Arc<OwnedFd>, flag: OFlags) {
        self.meanwhile.get_or_insert_with(|| {
            Meanwhile::new(move || {
                let set = rustix::fs::fcntl_setfl(&file, flag);
                let cleared = rustix::fs::fcntl_setfl(&file, OFlags::empty());
                set == Err(Errno::TXTBSY) || cleared == Err(Errno::TXTBSY)
            })
        });
    }

    /// Moves the position of the file with frozen blocks to stable ones from
    /// now on; by sendfile(2), which takes no lock for that, if asked for.
    fn move_position(&mut self, by_sendfile: bool) -> Result<()> {
        if self.meanwhile.is_some() {
            return Ok(());
        }
        let file = Arc::clone(&self.sparse);
        let from = self
            .own
            .try_clone()
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        let mut random = Random::new(1);
        self.meanwhile = Some(Meanwhile::new(move || {
            let place = SeekFrom::Start(random.below(SOLID / 2));
            let mut result = seek(&file, place).map(drop);
            if by_sendfile {
                result = rustix::fs::sendfile(&file, &from, Some(&mut 0), 16).map(drop);
            }
            result == Err(Errno::TXTBSY)
        }));
        Ok(())
    }
}

/// What came of the tries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tries made.
    pub tries: u64,
    /// Refused with ETXTBSY.
    pub refused: u64,
    /// Succeeded.
    pub passed: u64,
    /// Failed for another reason,
    pub failed: u64,
    /// the last of which was this errno.
    pub errno: u64,
}

impl Counts {
    /// What the kernel or the device does not offer.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        self.refused == 0 && self.passed == 0 && self.failed > 0
    }

    /// These and those of another round.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            tries: self.tries + other.tries,
            refused: self.refused + other.refused,
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            errno: if other.failed > 0 {
                other.errno
            } else {
                self.errno
            },
        }
    }
}

/// How the processes hammer.
#[derive(Clone, Copy, Debug)]
struct Plan {
    shares: bool,
    processors: u64,
    seed: u64,
}

/// Tries after which a trick that the kernel does not know is given up.
const KNOWN_BY: u64 = 32;
/// Breaches that are enough.
const ENOUGH: u64 = 50;
/// Seconds that one trick may take, and after which a process is stuck.
const LONGEST: u64 = 20;
const STUCK: u32 = 120;

/// One process: makes a trick so often, and counts.
fn hammer(
    directory: &Path,
    trick: &Trick,
    process: u64,
    tries: u64,
    plan: Plan,
    counters: &[AtomicU64],
) -> anyhow::Result<()> {
    adversary::end_after(STUCK);
    if plan.processors == 1 {
        let mut first = CpuSet::new();
        first.set(0);
        sched_setaffinity(None, &first)?;
    }
    // Whoever comes behind all others is preempted wherever it is.
    let priorities = [Priority::Normal, Priority::Idle, Priority::Batch];
    let priority = usize::try_from(process)? % priorities.len();
    adversary::set_priority(priorities[priority])?;
    let seed = plan.seed.wrapping_mul(31).wrapping_add(process + 1);
    let mut attacker = Attacker::new(directory, plan.shares, process, seed)?;
    let mut counts = Counts::default();
    let started = std::time::Instant::now();
    let breaches = &counters[2];
    while counts.tries < tries {
        match (trick.run)(&mut attacker) {
            Ok(()) => {
                counts.passed += 1;
                breaches.fetch_add(1, SeqCst);
            }
            Err(Errno::TXTBSY) => counts.refused += 1,
            Err(errno) => {
                counts.failed += 1;
                counts.errno = u64::try_from(errno.raw_os_error())?;
            }
        }
        counts.tries += 1;
        let unknown = counts.failed == counts.tries && counts.tries >= KNOWN_BY;
        let breached = trick.success == Success::Breach && breaches.load(SeqCst) >= ENOUGH;
        let late = counts.tries.is_multiple_of(16) && started.elapsed().as_secs() >= LONGEST;
        if unknown || breached || late {
            break;
        }
    }
    if let Some(meanwhile) = attacker.meanwhile.take() {
        counts.refused += meanwhile.end();
    }
    for (counter, count) in [(0, counts.tries), (1, counts.refused), (3, counts.failed)] {
        counters[counter].fetch_add(count, SeqCst);
    }
    counters[4].fetch_max(counts.errno, SeqCst);
    Ok(())
}

/// Role: for each line it hears, which names a trick and a number of tries,
/// several processes that make it. Arguments: directory, whether blocks can
/// be shared, number of processors, seed.
pub fn play(arguments: &[String]) -> anyhow::Result<()> {
    let [directory, shares, processors, seed] = arguments else {
        bail!("wrong arguments");
    };
    let directory = Path::new(directory);
    let mut plan = Plan {
        shares: shares.parse()?,
        processors: processors.parse()?,
        seed: seed.parse()?,
    };
    raw::become_nobody()?;
    let counters = shared_counters(5)?;
    while let Some(line) = listen()? {
        let (name, tries) = line.split_once(' ').context("wrong words")?;
        let trick = by_name(name).with_context(|| format!("there is no trick {name}"))?;
        let each = tries.parse::<u64>()?.div_ceil(PROCESSES);
        for counter in counters {
            counter.store(0, SeqCst);
        }
        plan.seed += 1;
        let children: Vec<i32> = (0..PROCESSES)
            .map(|process| {
                raw::fork(
                    || match hammer(directory, trick, process, each, plan, counters) {
                        Ok(()) => 0,
                        Err(error) => {
                            eprintln!("hammer {name}: {error:#}");
                            1
                        }
                    },
                )
            })
            .collect::<Result<_>>()?;
        for child in children {
            let status = raw::wait(child)?;
            ensure!(status == 0, "a process of {name} ended with {status}");
        }
        let counts: Vec<String> = counters
            .iter()
            .map(|counter| counter.load(SeqCst).to_string())
            .collect();
        say(&counts.join(" "));
    }
    Ok(())
}

/// Reads what [`play`] says of a trick.
pub fn parse_counts(line: &str) -> anyhow::Result<Counts> {
    let numbers: Vec<u64> = line
        .split(' ')
        .map(str::parse)
        .collect::<std::result::Result<_, _>>()
        .with_context(|| format!("the hammer said: {line}"))?;
    let [tries, refused, passed, failed, errno] = numbers[..] else {
        bail!("the hammer said: {line}");
    };
    Ok(Counts {
        tries,
        refused,
        passed,
        failed,
        errno,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique() {
        let names: BTreeSet<_> = TRICKS.iter().map(|trick| trick.name).collect();
        assert_eq!(names.len(), TRICKS.len());
    }

    #[test]
    fn counts_are_read_as_they_are_said() {
        let counts = parse_counts("5 1 2 2 22").unwrap();
        assert_eq!((counts.tries, counts.failed, counts.errno), (5, 2, 22));
        assert!(parse_counts("failed: no such file").is_err());
    }
}
