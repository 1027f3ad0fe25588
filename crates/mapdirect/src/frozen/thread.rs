//! The thread that holds the registration and the descriptions, and how it is
//! spoken with.

use super::child::in_child;
use super::regions::Regions;
use mapdirect_sys::pthread_atfork::pthread_atfork;
use mapdirect_sys::unix::Socket;
use mapdirect_sys::userfaultfd::{Event, Userfaultfd};
use mapdirect_sys::{Errno, descriptors, signal};
use rustix::event::{PollFd, PollFlags, poll};
use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What the thread is asked.
#[derive(Debug)]
pub(super) enum Job {
    Protect { map: u64, ranges: Vec<Range<usize>> },
    Borrow { map: u64 },
    Settle,
}

/// How to speak with the thread of this process; a child of fork(2) has its
/// own, since whoever held a lock when it was made is not there to let go.
#[derive(Debug, Default)]
pub(super) struct Speaking {
    /// Whoever has the turn.
    pub(super) turn: Mutex<Option<Thread>>,
    /// What the thread is to do next; set by whoever has the turn.
    pub(super) job: Mutex<Option<Job>>,
    /// Where the memory is, twice. The thread changes the one that is not
    /// `intact`, and then the other: whenever a child is made, one of them is
    /// whole and nobody holds its lock. fork(2) holds back whoever stores to
    /// a page that it has copied, so the child sees stores in their order.
    pub(super) regions: [Mutex<Regions>; 2],
    pub(super) intact: AtomicUsize,
    /// The thread hears of something, and `regions` does not say so yet.
    pub(super) hearing: AtomicBool,
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

pub(super) static SPEAKING: AtomicPtr<Speaking> = AtomicPtr::new(std::ptr::null_mut());

pub(super) fn speaking() -> &'static Speaking {
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

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How to reach the thread.
#[derive(Debug)]
pub(super) struct Thread {
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
pub(super) type Failed = (&'static str, Errno);

impl Thread {
    pub(super) fn start(speaking: &'static Speaking) -> Result<Self, Failed> {
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

    pub(super) fn is_usable(&self) -> bool {
        self.socket.as_ref().and_then(identity) == Some(self.identity)
    }

    pub(super) fn ask(
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
