//! Memory in the place of blocks that may not be stored to.
//!
//! It is memory without a file, registered with a userfaultfd(2) that raises
//! SIGBUS: pages that are there are write-protected and read as they were
//! filled, pages that are not there cannot be accessed at all. Whatever
//! becomes of it, a store must never be lost in it:
//!
//! * The registration ends with the descriptor, so this lives in the table of
//!   a thread that has one of its own, where nobody closes it by mistake.
//! * mremap(2) waits until that thread has read where the memory went, and
//!   takes the registration along.
//! * A child of fork(2) would have the memory without the registration: it
//!   does not get it (`MADV_DONTFORK`). What it gets in its place raises
//!   SIGBUS on every access.
//! * Merging equal pages (KSM) takes the protection off. It does so with
//!   private pages that have been filled, so copies of bytes lie in a memory
//!   file that is mapped shared; zeros are no pages of anybody's.
//!
//! The memory has no part in the description that a pin lives in, so the
//! thread holds that description for as long as any of the memory is mapped:
//! it hears of every munmap(2).

use crate::error::{Error, Kind};
use mapdirect_sys::mmap::{
    self, MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_NONE,
    PROT_READ, PROT_WRITE,
};
use mapdirect_sys::pthread_atfork::pthread_atfork;
use mapdirect_sys::unix::Socket;
use mapdirect_sys::userfaultfd::{Event, Userfaultfd};
use mapdirect_sys::{Errno, descriptors, proc, signal};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::MemfdFlags;
use rustix::mm::Advice;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize};
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
    let speaking = speaking();
    let mut turn = lock(&speaking.turn);
    let thread = match &mut *turn {
        Some(thread) if thread.is_usable() => thread,
        turn => turn.insert(Thread::start(speaking).map_err(not_protected)?),
    };
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let map = NEXT.fetch_add(1, Relaxed);
    let ranges: Vec<_> = runs.into_iter().map(|run| run.range).collect();
    let job = Job::Protect {
        map,
        ranges: ranges.clone(),
    };
    thread
        .ask(speaking, job, &[pinned])
        .map_err(not_protected)?;
    for range in ranges {
        // SAFETY: the caller's memory; a child does without.
        unsafe { advise(&range, Advice::LinuxDontFork) }.map_err(no_memory)?;
    }
    Ok(Frozen(map))
}

impl Frozen {
    /// The description that the memory keeps, once more.
    pub(crate) fn pinned(&self) -> Result<OwnedFd, Error> {
        let speaking = speaking();
        let mut turn = lock(&speaking.turn);
        let asked = match &mut *turn {
            Some(thread) if thread.is_usable() => {
                thread.ask(speaking, Job::Borrow { map: self.0 }, &[])
            }
            _ => Err(("", Errno::SRCH)),
        };
        asked.ok().flatten().ok_or_else(|| {
            Error::new(
                Kind::FrozenBlocks,
                Errno::OPNOTSUPP,
                "this process does not have the thread any more that keeps frozen memory: it is a \
                 child of the one that mapped it, or has closed descriptors that it did not know",
                "do it in the process that made the mapping, or map the file again",
            )
        })
    }

    /// Returns when the thread has heard of everything that was unmapped
    /// before, and has let go of what it kept for that.
    pub(crate) fn settle() {
        let speaking = speaking();
        if let Some(thread) = &mut *lock(&speaking.turn)
            && thread.is_usable()
        {
            // A thread that cannot answer cannot be waited for.
            let _ = thread.ask(speaking, Job::Settle, &[]);
        }
    }
}

/// Has any access to frozen memory raise SIGBUS from now on, since what it
/// reads as is not true any more.
///
/// # Safety
///
/// The memory is the caller's own, protected by [`protect`].
pub(crate) unsafe fn let_fault(range: &Range<usize>) {
    // Of memory without a file the pages go, of a memory file the bytes: one
    // of the two fails.
    // SAFETY: the caller's promise.
    let _ = unsafe { advise(range, Advice::LinuxRemove) };
    // SAFETY: as above.
    let _ = unsafe { advise(range, Advice::LinuxDontNeed) };
}

fn no_memory(errno: Errno) -> Error {
    Error::new(
        Kind::System,
        errno,
        format!("no memory for what cannot be stored to: {errno}"),
        "free memory, or map less of it",
    )
}

/// Whatever keeps the thread from doing its work but a shortage is somebody's
/// decision.
fn not_protected((call, errno): (&'static str, Errno)) -> Error {
    let is_shortage = matches!(
        errno,
        Errno::NOMEM | Errno::MFILE | Errno::NFILE | Errno::AGAIN
    );
    let (kind, shown, mend) = if is_shortage {
        let mend = "each mapping with frozen blocks takes a descriptor: raise the limits (ulimit \
                    -n), or map less";
        (Kind::Limit, Errno::NOMEM, mend)
    } else {
        let mend = "fill the range first (mapdirect prepare), or let the sandbox allow \
                    userfaultfd(2), unshare(2) and close_range(2)";
        (Kind::FrozenBlocks, Errno::OPNOTSUPP, mend)
    };
    Error::new(
        kind,
        shown,
        format!("holes and unwritten blocks of the range cannot be protected: {call}: {errno}"),
        mend,
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

/// Has the zeros and the copies there, and nothing where nothing shall be.
///
/// # Safety
///
/// As [`protect`].
unsafe fn fill(run: &Run) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    unsafe { map_copies(&run.copied) }?;
    let faulting: usize = run.faulting.iter().map(Range::len).sum();
    if faulting == run.range.len() {
        // The kernel would clear a huge page for every access before it finds
        // that it must raise SIGBUS (do_huge_pmd_anonymous_page, Linux 7.3).
        // SAFETY: the caller's memory, which nobody else knows of.
        let _ = unsafe { advise(&run.range, Advice::LinuxNoHugepage) };
        return Ok(());
    }
    // Huge pages of zeros cost next to nothing, if they are one and the same.
    let advice = if has_huge_zeros() {
        Advice::LinuxHugepage
    } else {
        Advice::LinuxNoHugepage
    };
    // Where there are no huge pages at all, small ones will do.
    // SAFETY: the caller's memory, which nobody else knows of.
    let _ = unsafe { advise(&run.range, advice) };
    // SAFETY: as above.
    unsafe { advise(&run.range, Advice::LinuxPopulateRead) }?;
    run.faulting.iter().try_for_each(|range| {
        // SAFETY: as above.
        unsafe { advise(range, Advice::LinuxDontNeed) }
    })
}

/// Whether there is one huge page of zeros for everybody.
fn has_huge_zeros() -> bool {
    std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/use_zero_page")
        .is_ok_and(|text| text.trim() == "1")
}

/// Puts a memory file with copies in their place.
///
/// # Safety
///
/// As [`protect`].
unsafe fn map_copies(copied: &[(usize, Vec<u8>)]) -> Result<(), Errno> {
    if copied.is_empty() {
        return Ok(());
    }
    let file = rustix::fs::memfd_create(COPIES, MemfdFlags::CLOEXEC)?;
    let mut offset = 0;
    for (at, page) in copied {
        let mut done = 0;
        while done < page.len() {
            match rustix::io::pwrite(&file, &page[done..], offset + done as u64) {
                Ok(written) => done += written,
                Err(Errno::INTR) => {}
                Err(other) => return Err(other),
            }
        }
        // SAFETY: over the caller's memory, which nobody else knows of.
        unsafe {
            mmap::map(
                *at,
                page.len(),
                PROT_READ | PROT_WRITE,
                MAP_SHARED | MAP_FIXED,
                file.as_fd(),
                offset,
            )
        }?;
        offset += page.len() as u64;
    }
    Ok(())
}

/// Name of the memory file of copies, as `/proc/<pid>/maps` shows it.
const COPIES: &std::ffi::CStr = c"mapdirect-copies";

/// What the thread is asked.
#[derive(Debug)]
enum Job {
    Protect { map: u64, ranges: Vec<Range<usize>> },
    Borrow { map: u64 },
    Settle,
}

/// How to speak with the thread of this process; a child of fork(2) has its
/// own, since whoever held a lock when it was made is not there to let go.
#[derive(Debug, Default)]
struct Speaking {
    /// Whoever has the turn.
    turn: Mutex<Option<Thread>>,
    /// What the thread is to do next; set by whoever has the turn.
    job: Mutex<Option<Job>>,
    /// Where the memory is, twice. The thread changes the one that is not
    /// `intact`, and then the other: whenever a child is made, one of them is
    /// whole and nobody holds its lock. fork(2) holds back whoever stores to
    /// a page that it has copied, so the child sees stores in their order.
    regions: [Mutex<Regions>; 2],
    intact: AtomicUsize,
    /// The thread hears of something, and `regions` does not say so yet.
    hearing: AtomicBool,
}

impl Speaking {
    /// Only for the thread.
    fn change(&self, change: impl Fn(&mut Regions)) {
        let intact = self.intact.load(SeqCst);
        let other = 1 - intact;
        change(&mut lock(&self.regions[other]));
        self.intact.store(other, SeqCst);
        change(&mut lock(&self.regions[intact]));
    }

    /// Only for the thread.
    fn has(&self, map: u64) -> bool {
        lock(&self.regions[self.intact.load(SeqCst)]).has(map)
    }
}

static SPEAKING: AtomicPtr<Speaking> = AtomicPtr::new(std::ptr::null_mut());

fn speaking() -> &'static Speaking {
    let there = SPEAKING.load(Acquire);
    if there.is_null() {
        let new = Box::into_raw(Box::default());
        let raced = SPEAKING.compare_exchange(std::ptr::null_mut(), new, AcqRel, Acquire);
        if raced.is_err() {
            // SAFETY: made above, and seen by nobody.
            drop(unsafe { Box::from_raw(new) });
        }
        return speaking();
    }
    // SAFETY: made by `Box::into_raw`, and never freed.
    unsafe { &*there }
}

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

/// What failed, and how.
type Failed = (&'static str, Errno);

impl Thread {
    fn start(speaking: &'static Speaking) -> Result<Self, Failed> {
        static AT_FORK: AtomicBool = AtomicBool::new(false);
        if !AT_FORK.swap(true, Relaxed) {
            pthread_atfork(in_child).map_err(|errno| ("pthread_atfork", errno))?;
        }
        let (ours, theirs) = Socket::pair().map_err(|errno| ("socketpair", errno))?;
        let identity = identity(&ours).ok_or(("fstat", Errno::BADF))?;
        // Signals are for the program's own threads.
        let _blocked = signal::block_all().map_err(|errno| ("pthread_sigmask", errno))?;
        std::thread::Builder::new()
            .name(String::from("mapdirect"))
            .stack_size(128 * 1024)
            .spawn(move || serve(speaking, &theirs))
            .map_err(|error| {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::AGAIN);
                ("starting a thread", errno)
            })?;
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

    fn ask(
        &mut self,
        speaking: &Speaking,
        job: Job,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Option<OwnedFd>, Failed> {
        *lock(&speaking.job) = Some(job);
        let socket = self.socket.as_ref().ok_or(("send", Errno::SRCH))?;
        socket.send(&[&[0]], fds).map_err(|errno| ("send", errno))?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Option<OwnedFd>, Failed> {
        let mut answer = [0; 8];
        let socket = self.socket.as_ref().ok_or(("receive", Errno::SRCH))?;
        let received = socket.receive(&mut answer);
        let mut received = received.map_err(|errno| ("receive", errno))?;
        let [errno, step] = [0, 4].map(|at| {
            let mut number = [0; 4];
            number.copy_from_slice(&answer[at..at + 4]);
            i32::from_ne_bytes(number)
        });
        match (received.length, errno) {
            (8, 0) => Ok(received.fds.pop()),
            (8, errno) => {
                let step = usize::try_from(step).unwrap_or(0).min(STEPS.len() - 1);
                Err((STEPS[step], Errno::from_raw_os_error(errno)))
            }
            _ => Err(("receive", Errno::SRCH)),
        }
    }
}

/// What can fail in the thread.
const STEPS: [&str; 6] = [
    "",
    "unshare, close_range",
    "userfaultfd",
    "receiving a descriptor",
    "UFFDIO_REGISTER",
    "UFFDIO_WRITEPROTECT",
];

impl Drop for Thread {
    fn drop(&mut self) {
        if !self.is_usable() {
            // The number is somebody else's.
            std::mem::forget(self.socket.take());
        }
    }
}

/// An error of the thread: which of [`STEPS`], and how.
type FailedAt = (i32, Errno);

/// The thread: hears where the memory goes, and does what it is asked.
fn serve(speaking: &Speaking, socket: &Socket) {
    let say = |result: Result<(), FailedAt>, fds: &[BorrowedFd<'_>]| {
        let (step, errno) = result
            .err()
            .map_or((0, 0), |(step, errno)| (step, errno.raw_os_error()));
        // Whoever asked may be gone.
        let _ = socket.send(&[&errno.to_ne_bytes(), &step.to_ne_bytes()], fds);
    };
    // SAFETY: the thread uses the socket and what it opens or receives from
    // here on, all of which it keeps to itself.
    let alone = unsafe { descriptors::unshare(socket.as_fd()) };
    let opened = alone
        .map_err(|errno| (1, errno))
        .and_then(|()| Userfaultfd::open().map_err(|errno| (2, errno)));
    let uffd = match opened {
        Ok(uffd) => uffd,
        Err(failed) => return say(Err(failed), &[]),
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
        hear(speaking, &uffd, &mut kept);
        if asked {
            match socket.receive(&mut [0; 8]) {
                Ok(mut received) if received.length > 0 => {
                    let job = lock(&speaking.job).take();
                    match job {
                        Some(Job::Protect { map, ranges }) => {
                            // A table of descriptors that is full drops it.
                            let result =
                                received
                                    .fds
                                    .pop()
                                    .ok_or((3, Errno::MFILE))
                                    .and_then(|pinned| {
                                        register(speaking, &uffd, &mut kept, &ranges)?;
                                        speaking.change(|regions| {
                                            for range in &ranges {
                                                regions.add(range, map);
                                            }
                                        });
                                        kept.insert(map, pinned);
                                        Ok(())
                                    });
                            say(result, &[]);
                        }
                        Some(Job::Borrow { map }) => match kept.get(&map) {
                            Some(pinned) => say(Ok(()), &[AsFd::as_fd(pinned)]),
                            None => say(Err((0, Errno::SRCH)), &[]),
                        },
                        Some(Job::Settle) => say(Ok(()), &[]),
                        None => say(Err((0, Errno::INVAL)), &[]),
                    }
                }
                _ => is_asked = false,
            }
        }
    }
}

/// Reads what happened, and lets go of descriptions whose memory is gone.
fn hear(speaking: &Speaking, uffd: &Userfaultfd, kept: &mut HashMap<u64, OwnedFd>) {
    let mut heard = false;
    // Whoever unmapped something goes on as soon as it is read, and something
    // else may be there before it is written down.
    speaking.hearing.store(true, SeqCst);
    while let Ok(event) = uffd.read() {
        heard = true;
        speaking.change(|regions| match &event {
            Event::Unmapped(range) => regions.remove(range),
            Event::Moved { from, to } => regions.copy(from, *to),
            Event::Unknown => {}
        });
    }
    speaking.hearing.store(false, SeqCst);
    if heard {
        kept.retain(|map, _| speaking.has(*map));
    }
}

/// Registers memory and protects it. When this returns, everything that
/// happened before to whatever was in its place has been heard of: the kernel
/// protects nothing while somebody waits for that.
fn register(
    speaking: &Speaking,
    uffd: &Userfaultfd,
    kept: &mut HashMap<u64, OwnedFd>,
    ranges: &[Range<usize>],
) -> Result<(), FailedAt> {
    // What was registered, when it fails, goes with the memory: its owner
    // unmaps it then.
    for range in ranges {
        // SAFETY: memory as `Run` says, by the promise made to `protect`.
        unsafe { uffd.register(range) }.map_err(|errno| (4, errno))?;
        // Linux 6.1 protects no more at a time than lies in one mapping as the
        // kernel keeps them (`mwriteprotect_range`, mm/userfaultfd.c), which
        // nobody can tell from here: smaller and smaller pieces, in order.
        let page = rustix::param::page_size();
        let mut pieces = vec![range.clone()];
        while let Some(piece) = pieces.pop() {
            match uffd.write_protect(&piece) {
                Ok(()) => {}
                Err(Errno::AGAIN) => {
                    hear(speaking, uffd, kept);
                    std::thread::yield_now();
                    pieces.push(piece);
                }
                Err(Errno::NOENT) if piece.len() > page => {
                    let half = (piece.len() / 2).next_multiple_of(page);
                    let middle = piece.start + half;
                    pieces.push(middle..piece.end);
                    pieces.push(piece.start..middle);
                }
                Err(errno) => return Err((5, errno)),
            }
        }
    }
    Ok(())
}

/// The child has gaps in its memory, and no thread: nothing may come to lie
/// in the gaps that a stray store could hit.
extern "C" fn in_child() {
    // Nobody of those who spoke through it is here.
    let there = SPEAKING.swap(std::ptr::null_mut(), AcqRel);
    if there.is_null() {
        return;
    }
    // SAFETY: made by `Box::into_raw`, and never freed.
    let speaking = unsafe { &*there };
    // Whoever heard of something at this moment may have made room for
    // others: then only what is empty can be told to be ours.
    let is_sure = !speaking.hearing.load(SeqCst);
    let Ok(regions) = speaking.regions[speaking.intact.load(SeqCst)].try_lock() else {
        return;
    };
    if regions.0.is_empty() {
        return;
    }
    let empty = rustix::fs::memfd_create(c"mapdirect-empty", MemfdFlags::CLOEXEC);
    let empty = empty.as_ref().ok().map(AsFd::as_fd);
    for (start, (end, _)) in &regions.0 {
        let range = *start..*end;
        if block(&range, MAP_FIXED_NOREPLACE, empty).is_err() {
            // The program has it inherited all the same (MADV_DOFORK): what
            // is there is not protected.
            block_inherited(&range, empty, is_sure);
        }
    }
}

/// Has every access to a range raise SIGBUS: there is a file mapped, and
/// nothing in it. Or SIGSEGV, if there is no file either.
fn block(range: &Range<usize>, how: i32, empty: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    let (start, length) = (range.start, range.len());
    if let Some(empty) = empty {
        let prot = PROT_READ | PROT_WRITE;
        // SAFETY: takes no place that is in use, or that of memory which is
        // the library's own.
        return unsafe { mmap::map(start, length, prot, MAP_SHARED | how, empty, 0) }.map(drop);
    }
    let flags = MAP_PRIVATE | MAP_NORESERVE | how;
    // SAFETY: as above.
    unsafe { mmap::map_anonymous(start, length, PROT_NONE, flags) }.map(drop)
}

/// Blocks what is nothing in a range, and if that `is_ours` also memory
/// without a file and our own memory file.
fn block_inherited(range: &Range<usize>, empty: Option<BorrowedFd<'_>>, is_ours: bool) {
    let mut at = range.start;
    let gap = |part: Range<usize>| {
        if !part.is_empty() {
            // Whatever is there is not ours.
            let _ = block(&part, MAP_FIXED_NOREPLACE, empty);
        }
    };
    for (entry, name) in proc::own_mappings().unwrap_or_default() {
        let (Ok(start), Ok(end)) = (usize::try_from(entry.start), usize::try_from(entry.end))
        else {
            continue;
        };
        let part = start.max(range.start)..end.min(range.end);
        if part.is_empty() {
            continue;
        }
        gap(at..part.start);
        at = part.end;
        let ours = entry.inode == 0 && !entry.shared || name.starts_with("/memfd:mapdirect-copies");
        if is_ours && ours {
            // If it fails, the child has what it asked for.
            let _ = block(&part, MAP_FIXED, empty);
        }
    }
    gap(at..range.end);
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
