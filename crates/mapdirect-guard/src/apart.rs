//! Holds single pages in the page cache.
//!
//! These pages keep frozen blocks apart from others:
//! [`pages_between`](crate::policy::pages_between) says why, and which pages.
//! They are brought in one by one, and held for as long as the pin lives.
//! Operations that would throw them out again are refused: see
//! [`Apart::Held`](crate::policy::Apart::Held).

use crate::Errno;
use mapdirect_sys::mmap::{View, page_size};
use mapdirect_sys::proc_pagemap::PageFlags;
use mapdirect_sys::vmsplice;
use rustix::fs::Advice;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// Pages held for one pin. Dropping this value gives them back.
#[derive(Debug)]
pub(crate) struct Held {
    _pages: vmsplice::Held,
    _budget: Budget,
}

/// Counts the pages held for all pins together, and the pipes that hold them.
/// Held pages are page cache that nobody gets back, and pipes are descriptors
/// that the gate needs.
#[derive(Debug)]
pub(crate) struct Pages {
    held: Arc<AtomicUsize>,
    pipes: Arc<AtomicUsize>,
    most_pipes: usize,
}

/// The most pages held: four gigabytes.
const MOST_PAGES: usize = 1 << 20;

/// Permission to hold some pages.
#[derive(Debug)]
pub(crate) struct Budget {
    of: [(Arc<AtomicUsize>, usize); 2],
}

impl Pages {
    /// Of this many descriptors, a quarter may be pipes.
    pub(crate) fn new(descriptors: usize) -> Self {
        Self {
            held: Arc::default(),
            pipes: Arc::default(),
            most_pipes: descriptors / 4,
        }
    }

    /// Permission to hold `count` more pages, if the limit permits that. A quarter
    /// of everything is for holders that are not `trusted`.
    pub(crate) fn take(&self, count: usize, trusted: bool) -> Option<Budget> {
        let pipes = vmsplice::pipes_for(count);
        let take = |of: &Arc<AtomicUsize>, count: usize, most: usize| {
            let taken = of.fetch_update(SeqCst, SeqCst, |held| {
                held.checked_add(count).filter(|held| *held <= most)
            });
            taken.ok().map(|_| (Arc::clone(of), count))
        };
        let share = if trusted { 1 } else { 4 };
        let pages = take(&self.held, count, MOST_PAGES / share)?;
        let Some(pipes) = take(&self.pipes, pipes, self.most_pipes / share) else {
            pages.0.fetch_sub(count, SeqCst);
            return None;
        };
        Some(Budget { of: [pages, pipes] })
    }
}

impl Drop for Budget {
    fn drop(&mut self) {
        for (of, count) in &self.of {
            of.fetch_sub(*count, SeqCst);
        }
    }
}

/// Why pages could not be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    /// This page is part of a larger folio that somebody maps.
    InUse(u64),
    /// A system call failed.
    System(&'static str, Errno),
}

/// How often to try to get a page out of a larger folio: readers may bring the
/// folio back.
const TRIES: u32 = 20;

/// Brings the pages at `offsets`, which must be in file order, into the page
/// cache one by one and holds them there. `file` must be open for reading and
/// be used by this thread alone.
pub(crate) fn hold(
    file: BorrowedFd<'_>,
    offsets: &[u64],
    folio: u64,
    budget: Budget,
) -> Result<Held, Failed> {
    let system = |call| move |errno| Failed::System(call, errno);
    let (Some(first), Some(last)) = (offsets.first(), offsets.last()) else {
        return Err(Failed::System("vmsplice", Errno::INVAL));
    };
    let flags = PageFlags::open().map_err(system("opening /proc/kpageflags"))?;
    let view = View::new(file, *first..*last + page_size()).map_err(system("mmap"))?;
    for _ in 0..TRIES {
        for offset in offsets {
            view.populate(*offset).map_err(system("reading a page"))?;
        }
        // First hold the pages, then check them: a held page does not change
        // any more.
        let held = vmsplice::Held::new(&view, offsets).map_err(system("vmsplice"))?;
        let mut large = None;
        for offset in offsets {
            match flags.is_single(&view, *offset) {
                Ok(true) => {}
                // A page that is not there any more is no better than one in a
                // larger folio.
                Ok(false) | Err(Errno::NOENT) => {
                    large = Some(*offset);
                    break;
                }
                Err(errno) => return Err(Failed::System("reading /proc/kpageflags", errno)),
            }
        }
        let Some(large) = large else {
            return Ok(Held {
                _pages: held,
                _budget: budget,
            });
        };
        drop(held);
        view.forget().map_err(system("madvise"))?;
        throw_out(file, offsets, large, folio).map_err(system("posix_fadvise"))?;
    }
    Err(Failed::InUse(*first))
}

/// Throws the folios around the pages out of the page cache, beginning with the
/// first that is too large.
fn throw_out(file: BorrowedFd<'_>, offsets: &[u64], large: u64, folio: u64) -> Result<(), Errno> {
    // Stores of other holders may have made some pages dirty.
    rustix::fs::fdatasync(file)?;
    let mut done = 0;
    for offset in offsets.iter().filter(|offset| **offset >= large) {
        let start = offset - offset % folio;
        if start >= done {
            done = start + folio;
            let length = std::num::NonZeroU64::new(folio);
            rustix::fs::fadvise(file, start, length, Advice::DontNeed)?;
        }
    }
    Ok(())
}
