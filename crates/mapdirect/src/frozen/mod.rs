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

mod child;
mod regions;
mod thread;

use crate::error::{Error, Kind};
use mapdirect_sys::Errno;
use mapdirect_sys::mmap::{self, MAP_FIXED, MAP_SHARED, PROT_READ, PROT_WRITE};
use rustix::fs::MemfdFlags;
use rustix::mm::Advice;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use thread::{Job, Thread, lock, speaking};

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
