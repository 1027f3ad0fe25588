//! Keeping blocks apart in the page cache.
//!
//! A store through a mapping makes the whole folio dirty that its page lies
//! in, and the filesystem then allocates or copies whatever lies under that
//! folio (`iomap_page_mkwrite`, fs/iomap/buffered-io.c; `block_page_mkwrite`,
//! fs/buffer.c). Folios are aligned runs of pages, up to a huge page; where
//! one of them holds both a block that can be stored to and a frozen one, a
//! store to the first would change the second.
//!
//! A page that is in the page cache by itself cannot become part of a larger
//! folio. So the pages at both ends of every frozen run are brought in one by
//! one, and held there for as long as the pin lives. Operations that would throw
//! them out again are refused: see [`Apart::Held`](crate::policy::Apart::Held).

use crate::Errno;
use mapdirect_sys::mmap::{View, page_size};
use mapdirect_sys::proc_pagemap::PageFlags;
use mapdirect_sys::vmsplice;
use rustix::fs::Advice;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// Pages held for one pin; they go back when it is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    _pages: vmsplice::Held,
    _budget: Budget,
}

/// How many pages are held for all pins together, and in how many pipes:
/// page cache that nobody gets back, and descriptors that the gate needs.
#[derive(Debug)]
pub(crate) struct Pages {
    held: Arc<AtomicUsize>,
    pipes: Arc<AtomicUsize>,
    most_pipes: usize,
}

/// Four gigabytes' worth.
const MOST_PAGES: usize = 1 << 20;

/// Leave to hold some of them.
#[derive(Debug)]
pub(crate) struct Budget {
    of: [(Arc<AtomicUsize>, usize); 2],
}

impl Pages {
    /// With so many descriptors at hand a quarter of them may be pipes.
    pub(crate) fn new(descriptors: usize) -> Self {
        Self {
            held: Arc::default(),
            pipes: Arc::default(),
            most_pipes: descriptors / 4,
        }
    }

    /// Leave to hold `count` more, if so many may be.
    pub(crate) fn take(&self, count: usize) -> Option<Budget> {
        let pipes = vmsplice::pipes_for(count);
        let take = |of: &Arc<AtomicUsize>, count: usize, most: usize| {
            let taken = of.fetch_update(SeqCst, SeqCst, |held| {
                held.checked_add(count).filter(|held| *held <= most)
            });
            taken.ok().map(|_| (Arc::clone(of), count))
        };
        let pages = take(&self.held, count, MOST_PAGES)?;
        let Some(pipes) = take(&self.pipes, pipes, self.most_pipes) else {
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

/// Offsets of the pages to hold, so that no folio of up to `folio` bytes
/// holds pages of `frozen` and others: disjoint runs of whole pages, in file
/// order, with others in between, in a file of `size` bytes. Whoever maps the
/// others for storing may come later.
pub(crate) fn pages_between(frozen: &[Range<u64>], size: u64, page: u64, folio: u64) -> Vec<u64> {
    let file_end = size.next_multiple_of(page);
    let mut pages = Vec::new();
    for run in frozen {
        let start = run.start;
        if !start.is_multiple_of(folio) && start - start % folio < file_end {
            // Behind the end of the file there are no pages: then the last
            // one before it.
            pages.push(start.min(file_end - page));
        }
        if run.end < file_end && !run.end.is_multiple_of(folio) {
            pages.push(run.end - page);
        }
    }
    pages.dedup();
    pages
}

/// Why pages could not be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    /// This page is part of a larger folio that somebody maps.
    InUse(u64),
    /// The kernel refused something.
    System(&'static str, Errno),
}

/// How often to try to get a page out of a larger folio: readers bring it
/// back.
const TRIES: u32 = 20;

/// Brings the pages at `offsets`, in file order, into the page cache one by
/// one and holds them there. `file` is open for reading and has no other user
/// than this thread.
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
        // Held first, looked at then: what is held does not change any more.
        let held = vmsplice::Held::new(&view, offsets).map_err(system("vmsplice"))?;
        let mut large = None;
        for offset in offsets {
            match flags.is_single(&view, *offset) {
                Ok(true) => {}
                // Not there any more is as good as not alone.
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

/// Throws the folios around the pages out of the page cache, from the first
/// that is too large on.
fn throw_out(file: BorrowedFd<'_>, offsets: &[u64], large: u64, folio: u64) -> Result<(), Errno> {
    // Stores of other holders may have made some of them dirty.
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;
    /// Small, so that there are many.
    const FOLIO: u64 = 8 * PAGE;

    /// Runs of `kind` in a string of pages.
    fn runs(pages: &[u8], kind: u8) -> Vec<Range<u64>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        for (at, page) in pages.iter().enumerate() {
            let start = at as u64 * PAGE;
            match found.last_mut() {
                _ if *page != kind => {}
                Some(last) if last.end == start => last.end += PAGE,
                _ => found.push(start..start + PAGE),
            }
        }
        found
    }

    proptest! {
        #[test]
        fn no_folio_holds_both(
            is_frozen in proptest::collection::vec(any::<bool>(), 1..80),
            size in 1u64..90 * PAGE,
        ) {
            let end = size.next_multiple_of(PAGE);
            // 2: frozen; behind the end of the file the rest is nothing.
            let pages: Vec<u8> = is_frozen
                .iter()
                .enumerate()
                .map(|(at, is_frozen)| match is_frozen {
                    true => 2,
                    false if (at as u64) * PAGE < end => 1,
                    false => 0,
                })
                .collect();
            let frozen = runs(&pages, 2);
            let held = pages_between(&frozen, size, PAGE, FOLIO);
            prop_assert!(held.is_sorted());
            prop_assert!(held.iter().all(|offset| *offset < end));
            // Whatever order a folio has, it does not hold a held page unless
            // it is that page; the file may have grown since.
            for order in 1..=3 {
                let size = PAGE << order;
                for start in (0..pages.len() as u64 * PAGE).step_by(usize::try_from(size).unwrap()) {
                    let range = start..start + size;
                    let has = |kind| {
                        (range.start / PAGE..range.end / PAGE)
                            .any(|at| pages.get(usize::try_from(at).unwrap()) == Some(&kind))
                    };
                    let is_split = held.iter().any(|offset| range.contains(offset));
                    prop_assert!(!(has(1) && has(2)) || is_split, "{range:?} {pages:?} {held:?}");
                }
            }
            // Every page held is the end of a frozen run, or the end of the
            // file before one.
            for offset in &held {
                let is_end = frozen.iter().any(|run| {
                    *offset == run.start || *offset + PAGE == run.end
                        || *offset + PAGE == end && run.start >= end
                });
                prop_assert!(is_end, "{offset} {frozen:?}");
            }
        }
    }

    #[test]
    fn nothing_is_held_at_the_ends_of_folios() {
        let between =
            |run: Range<u64>| pages_between(std::slice::from_ref(&run), 1 << 40, PAGE, FOLIO);
        assert_eq!(between(FOLIO..2 * FOLIO), []);
        assert_eq!(between(PAGE..2 * PAGE), [PAGE]);
        assert_eq!(between(PAGE..FOLIO), [PAGE]);
        assert_eq!(between(0..3 * PAGE), [2 * PAGE]);
    }
}
