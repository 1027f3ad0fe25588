//! Memory in the place of blocks that may not be stored to.
//!
//! It is private memory, registered with a userfaultfd(2) that raises SIGBUS:
//! pages that are there are write-protected and read as they were filled,
//! pages that are not there cannot be accessed at all. Whatever becomes of
//! it, a store must never be lost in it:
//!
//! * The registration ends with the descriptor, so this lives in the table of
//!   a thread that has one of its own, where nobody closes it by mistake.
//! * mremap(2) waits until that thread has read where the memory went, and
//!   takes the registration along.
//! * A child of fork(2) would have the memory without the registration: it
//!   does not get it (`MADV_DONTFORK`). What it gets in its place raises
//!   SIGBUS on every access.
//!
//! The memory has no part in the description that a pin lives in, so the
//! thread holds that description for as long as any of the memory is mapped:
//! it hears of every munmap(2).

use crate::error::{Error, Kind};
use mapdirect_sys::mmap::{self, MAP_FIXED_NOREPLACE, MAP_SHARED, PROT_READ, PROT_WRITE};
use mapdirect_sys::pthread_atfork::pthread_atfork;
use mapdirect_sys::unix::Socket;
use mapdirect_sys::userfaultfd::{Event, Userfaultfd};
use mapdirect_sys::{Errno, descriptors, signal};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::MemfdFlags;
use rustix::mm::Advice;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A run of memory to protect, in addresses. It is fresh private anonymous
/// memory, readable and writable, that nobody else knows of.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) range: Range<usize>,
    /// Parts that cannot be accessed at all.
    pub(crate) faulting: Vec<Range<usize>>,
    /// Whole pages that read as these bytes; everything else as zeros.
    pub(crate) copied: Vec<(usize, Vec<u8>)>,
}

/// The runs of one mapping, known to the thread by a number.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frozen(u64);

/// Protects `runs`, and keeps the description of `pinned` for as long as any
/// of them is mapped.
///
/// # Safety
///
/// The runs must be as [`Run`] says.
pub(crate) unsafe fn protect(runs: Vec<Run>, pinned: BorrowedFd<'_>) -> Result<Frozen, Error> {
    for run in &runs {
        // SAFETY: the caller's promise.
        unsafe { fill(run) }.map_err(no_memory)?;
    }
    let mut turn = lock(&TURN);
    let thread = match &mut *turn {
        Some(thread) if thread.is_usable() => thread,
        turn => turn.insert(Thread::start().map_err(not_protected)?),
    };
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let map = NEXT.fetch_add(1, Relaxed);
    let ranges: Vec<_> = runs.iter().map(|run| run.range.clone()).collect();
    let job = Job::Protect { map, runs };
    thread.ask(job, &[pinned]).map_err(not_protected)?;
    for range in ranges {
        // SAFETY: the caller's memory; a child does without.
        unsafe { advise(&range, Advice::LinuxDontFork) }.map_err(no_memory)?;
    }
    Ok(Frozen(map))
}

impl Frozen {
    /// The description that the memory keeps, once more.
    pub(crate) fn pinned(&self) -> Result<OwnedFd, Error> {
        let mut turn = lock(&TURN);
        let asked = match &mut *turn {
            Some(thread) if thread.is_usable() => thread.ask(Job::Borrow { map: self.0 }, &[]),
            _ => Err(Errno::SRCH),
        };
        let found = asked.and_then(|fd| fd.ok_or(Errno::SRCH));
        found.map_err(|errno| Error::system("asking for the pinned description", errno))
    }

    /// Returns when the thread has heard of everything that was unmapped
    /// before, and has let go of what it kept for that.
    pub(crate) fn settle() {
        if let Some(thread) = &mut *lock(&TURN)
            && thread.is_usable()
        {
            // A thread that cannot answer cannot be waited for.
            let _ = thread.ask(Job::Settle, &[]);
        }
    }
}

fn no_memory(errno: Errno) -> Error {
    Error::new(
        Kind::System,
        errno,
        format!("no memory for what cannot be stored to: {errno}"),
        "free memory, or map less of it",
    )
}

fn not_protected(errno: Errno) -> Error {
    let unsupported = matches!(errno, Errno::NOSYS | Errno::PERM | Errno::INVAL);
    Error::new(
        Kind::FrozenBlocks,
        if unsupported { Errno::OPNOTSUPP } else { errno },
        format!(
            "holes and unwritten blocks of the range cannot be protected (userfaultfd: {errno})"
        ),
        "fill the range first (mapdirect prepare), or let the sandbox allow userfaultfd(2)",
    )
}

/// # Safety
///
/// The memory is the caller's, and nothing refers to it.
unsafe fn advise(range: &Range<usize>, advice: Advice) -> Result<(), Errno> {
    let start = std::ptr::with_exposed_provenance_mut(range.start);
    // SAFETY: the caller's promise.
    unsafe { rustix::mm::madvise(start, range.len(), advice) }
}

/// Has the zeros there, and nothing where nothing shall be.
///
/// # Safety
///
/// As [`protect`].
unsafe fn fill(run: &Run) -> Result<(), Errno> {
    let faulting: usize = run.faulting.iter().map(Range::len).sum();
    if faulting < run.range.len() {
        // Huge pages of zeros cost next to nothing. Where there are none,
        // small ones will do.
        // SAFETY: the caller's memory, which holds nothing yet.
        let _ = unsafe { advise(&run.range, Advice::LinuxHugepage) };
        // SAFETY: as above.
        unsafe { advise(&run.range, Advice::LinuxPopulateRead) }?;
        let copied = run.copied.iter().map(|(at, page)| *at..*at + page.len());
        for range in run.faulting.iter().cloned().chain(copied) {
            // SAFETY: as above.
            unsafe { advise(&range, Advice::LinuxDontNeed) }?;
        }
    }
    Ok(())
}

/// What the thread is asked.
#[derive(Debug)]
enum Job {
    Protect { map: u64, runs: Vec<Run> },
    Borrow { map: u64 },
    Settle,
}

/// The thread, for whoever has the turn to speak with it.
static TURN: Mutex<Option<Thread>> = Mutex::new(None);
/// What it is to do next; set by whoever has the turn.
static JOB: Mutex<Option<Job>> = Mutex::new(None);
/// Where the memory is, for the thread and for children of fork(2).
static REGIONS: Mutex<Regions> = Mutex::new(Regions(BTreeMap::new()));

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Protected memory, by address, and which mapping it belongs to.
#[derive(Debug, Default)]
struct Regions(BTreeMap<usize, (usize, u64)>);

impl Regions {
    fn add(&mut self, range: &Range<usize>, map: u64) {
        self.0.insert(range.start, (range.end, map));
    }

    fn remove(&mut self, gone: &Range<usize>) {
        let meeting: Vec<usize> = self
            .0
            .range(..gone.end)
            .rev()
            .take_while(|(_, (end, _))| *end > gone.start)
            .map(|(start, _)| *start)
            .collect();
        for start in meeting {
            let Some((end, map)) = self.0.remove(&start) else {
                continue;
            };
            if start < gone.start {
                self.add(&(start..gone.start), map);
            }
            if gone.end < end {
                self.add(&(gone.end..end), map);
            }
        }
    }

    fn copy(&mut self, from: &Range<usize>, to: usize) {
        let found: Vec<_> = self
            .0
            .range(..from.end)
            .rev()
            .take_while(|(_, (end, _))| *end > from.start)
            .map(|(start, (end, map))| {
                let start = (*start).max(from.start) - from.start;
                let end = (*end).min(from.end) - from.start;
                (to + start..to + end, *map)
            })
            .collect();
        for (range, map) in found {
            self.remove(&range);
            self.add(&range, map);
        }
    }

    fn has(&self, map: u64) -> bool {
        self.0.values().any(|(_, of)| *of == map)
    }
}

/// How to reach the thread.
#[derive(Debug)]
struct Thread {
    socket: Option<Socket>,
    /// Inode of the socket: a program that closes descriptors it does not
    /// know may have another one under that number by now.
    identity: (u64, u64),
}

fn identity(socket: &Socket) -> Option<(u64, u64)> {
    rustix::fs::fstat(socket)
        .ok()
        .map(|stat| (stat.st_dev, stat.st_ino))
}

impl Thread {
    fn start() -> Result<Self, Errno> {
        static AT_FORK: AtomicBool = AtomicBool::new(false);
        if !AT_FORK.swap(true, Relaxed) {
            pthread_atfork(before_fork, after_fork, in_child)?;
        }
        let (ours, theirs) = Socket::pair()?;
        let identity = identity(&ours).ok_or(Errno::BADF)?;
        // Signals are for the program's own threads.
        let _blocked = signal::block_all()?;
        std::thread::Builder::new()
            .name(String::from("mapdirect"))
            .stack_size(128 * 1024)
            .spawn(move || serve(&theirs))
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))?;
        let mut thread = Self {
            socket: Some(ours),
            identity,
        };
        // It says how its start went.
        thread.answer()?;
        Ok(thread)
    }

    fn is_usable(&self) -> bool {
        self.socket.as_ref().and_then(identity) == Some(self.identity)
    }

    fn ask(&mut self, job: Job, fds: &[BorrowedFd<'_>]) -> Result<Option<OwnedFd>, Errno> {
        *lock(&JOB) = Some(job);
        let socket = self.socket.as_ref().ok_or(Errno::SRCH)?;
        socket.send(&[&[0]], fds)?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Option<OwnedFd>, Errno> {
        let mut errno = [0; 4];
        let socket = self.socket.as_ref().ok_or(Errno::SRCH)?;
        let mut received = socket.receive(&mut errno)?;
        match (received.length, i32::from_ne_bytes(errno)) {
            (4, 0) => Ok(received.fds.pop()),
            (4, errno) => Err(Errno::from_raw_os_error(errno)),
            _ => Err(Errno::SRCH),
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if !self.is_usable() {
            // The number is somebody else's.
            std::mem::forget(self.socket.take());
        }
    }
}

/// The thread: hears where the memory goes, and does what it is asked.
fn serve(socket: &Socket) {
    let say = |result: Result<(), Errno>, fds: &[BorrowedFd<'_>]| {
        let errno = result.err().map_or(0, Errno::raw_os_error);
        // Whoever asked may be gone.
        let _ = socket.send(&[&errno.to_ne_bytes()], fds);
    };
    // SAFETY: the thread uses the socket and what it opens or receives from
    // here on, all of which it keeps to itself.
    let alone = unsafe { descriptors::unshare(socket.as_fd()) };
    let uffd = match alone.and_then(|()| Userfaultfd::open()) {
        Ok(uffd) => uffd,
        Err(errno) => return say(Err(errno), &[]),
    };
    say(Ok(()), &[]);
    let mut kept = HashMap::new();
    let mut is_asked = true;
    // Until the process ends: the program may close its end of the socket,
    // but not the registration.
    loop {
        let mut fds = [
            PollFd::new(&uffd, PollFlags::IN),
            PollFd::new(socket, PollFlags::IN),
        ];
        let watched = if is_asked { 2 } else { 1 };
        match poll(&mut fds[..watched], None) {
            Ok(_) | Err(Errno::INTR) => {}
            // No memory for a moment.
            Err(_) => std::thread::yield_now(),
        }
        let asked = is_asked && !fds[1].revents().is_empty();
        hear(&uffd, &mut kept);
        if asked {
            match socket.receive(&mut [0; 8]) {
                Ok(mut received) if received.length > 0 => {
                    let job = lock(&JOB).take();
                    match job {
                        Some(Job::Protect { map, runs }) => {
                            let pinned = received.fds.pop();
                            say(register(&uffd, &mut kept, map, runs, pinned), &[]);
                        }
                        Some(Job::Borrow { map }) => match kept.get(&map) {
                            Some(pinned) => say(Ok(()), &[AsFd::as_fd(pinned)]),
                            None => say(Err(Errno::SRCH), &[]),
                        },
                        Some(Job::Settle) => say(Ok(()), &[]),
                        None => say(Err(Errno::INVAL), &[]),
                    }
                }
                _ => is_asked = false,
            }
        }
    }
}

/// Reads what happened, and lets go of descriptions whose memory is gone.
fn hear(uffd: &Userfaultfd, kept: &mut HashMap<u64, OwnedFd>) {
    let mut heard = false;
    while let Ok(event) = uffd.read() {
        heard = true;
        let mut regions = lock(&REGIONS);
        match event {
            Event::Unmapped(range) => regions.remove(&range),
            Event::Moved { from, to } => regions.copy(&from, to),
            Event::Unknown => {}
        }
    }
    if heard {
        let regions = lock(&REGIONS);
        kept.retain(|map, _| regions.has(*map));
    }
}

fn register(
    uffd: &Userfaultfd,
    kept: &mut HashMap<u64, OwnedFd>,
    map: u64,
    runs: Vec<Run>,
    pinned: Option<OwnedFd>,
) -> Result<(), Errno> {
    // Kept before it is needed, so that the pin never ends in between.
    kept.extend(pinned.map(|pinned| (map, pinned)));
    let mut result = Ok(());
    for run in runs {
        // SAFETY: memory as `Run` says, by the promise made to `protect`.
        result = unsafe { uffd.register(&run.range) };
        if result.is_err() {
            break;
        }
        lock(&REGIONS).add(&run.range, map);
        result = run
            .copied
            .iter()
            .try_for_each(|(at, page)| patiently(uffd, kept, || uffd.copy(*at, page)))
            .and_then(|()| patiently(uffd, kept, || uffd.write_protect(&run.range)));
        if result.is_err() {
            break;
        }
    }
    // What was registered goes with the memory; its owner unmaps it now.
    if !lock(&REGIONS).has(map) {
        kept.remove(&map);
    }
    result
}

/// Does something that the kernel puts off while somebody waits for us to
/// hear of a move.
fn patiently(
    uffd: &Userfaultfd,
    kept: &mut HashMap<u64, OwnedFd>,
    mut what: impl FnMut() -> Result<(), Errno>,
) -> Result<(), Errno> {
    loop {
        match what() {
            Err(Errno::AGAIN) => {
                hear(uffd, kept);
                std::thread::yield_now();
            }
            other => return other,
        }
    }
}

type Held = (
    MutexGuard<'static, Option<Thread>>,
    MutexGuard<'static, Regions>,
);

thread_local! {
    /// What a thread that forks holds meanwhile.
    static HELD: RefCell<Option<Held>> = const { RefCell::new(None) };
}

extern "C" fn before_fork() {
    let held = (lock(&TURN), lock(&REGIONS));
    // A thread whose locals are gone already forks at its own risk.
    let _ = HELD.try_with(|place| *place.borrow_mut() = Some(held));
}

extern "C" fn after_fork() {
    let _ = HELD.try_with(|place| place.borrow_mut().take());
}

/// The child has gaps in its memory, and no thread: nothing may come to lie
/// in the gaps that a stray store could hit.
extern "C" fn in_child() {
    let held = HELD.try_with(|place| place.borrow_mut().take());
    let Ok(Some((mut turn, mut regions))) = held else {
        return;
    };
    *turn = None;
    if regions.0.is_empty() {
        return;
    }
    let empty = rustix::fs::memfd_create(c"mapdirect-empty", MemfdFlags::CLOEXEC);
    for (start, (end, _)) in &regions.0 {
        let length = end - start;
        if let Ok(empty) = &empty {
            // SAFETY: takes no place that is in use.
            let mapped = unsafe {
                mmap::map(
                    *start,
                    length,
                    PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_FIXED_NOREPLACE,
                    empty.as_fd(),
                    0,
                )
            };
            if mapped.is_ok() {
                continue;
            }
        }
        let start = std::ptr::with_exposed_provenance_mut(*start);
        let flags = rustix::mm::MapFlags::PRIVATE
            | rustix::mm::MapFlags::NORESERVE
            | rustix::mm::MapFlags::FIXED_NOREPLACE;
        // An access raises SIGSEGV then.
        // SAFETY: as above.
        let _ = unsafe {
            rustix::mm::mmap_anonymous(start, length, rustix::mm::ProtFlags::empty(), flags)
        };
    }
    regions.0 = BTreeMap::new();
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Add(usize, usize),
        Remove(usize, usize),
        Copy(usize, usize, usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let place = 0usize..60;
        let step = prop_oneof![
            (place.clone(), 1usize..20).prop_map(|(at, len)| Step::Add(at, at + len)),
            (place.clone(), 1usize..20).prop_map(|(at, len)| Step::Remove(at, at + len)),
            (place.clone(), 1usize..20, place).prop_map(|(at, len, to)| Step::Copy(
                at,
                at + len,
                to
            )),
        ];
        proptest::collection::vec(step, 0..30)
    }

    proptest! {
        /// The same, an address at a time.
        #[test]
        fn regions_are_where_memory_is(steps in steps()) {
            let mut regions = Regions::default();
            let mut model = [0u64; 100];
            for (number, step) in steps.into_iter().enumerate() {
                let map = number as u64 + 1;
                match step {
                    Step::Add(start, end) => {
                        // Fresh memory lies where nothing is.
                        if model[start..end].iter().all(|of| *of == 0) {
                            regions.add(&(start..end), map);
                            model[start..end].fill(map);
                        }
                    }
                    Step::Remove(start, end) => {
                        regions.remove(&(start..end));
                        model[start..end].fill(0);
                    }
                    Step::Copy(start, end, to) => {
                        // mremap refuses to move onto itself.
                        let apart = to >= end || to + (end - start) <= start;
                        if apart {
                            regions.copy(&(start..end), to);
                            let moved = model[start..end].to_vec();
                            for (at, of) in moved.into_iter().enumerate() {
                                if of != 0 {
                                    model[to + at] = of;
                                }
                            }
                        }
                    }
                }
                let mut found = [0u64; 100];
                for (start, (end, of)) in &regions.0 {
                    prop_assert!(start < end);
                    prop_assert!(found[*start..*end].iter().all(|of| *of == 0), "they overlap");
                    found[*start..*end].fill(*of);
                }
                prop_assert_eq!(found, model);
                for of in 1..=map {
                    prop_assert_eq!(regions.has(of), model.contains(&of));
                }
            }
        }
    }
}
