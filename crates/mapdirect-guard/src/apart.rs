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
//! one, and held there for as long as the pin lives. They are pages of frozen
//! blocks, which nobody may write to, so nothing throws them out again; but
//! for the page that holds the end of the file, where what is frozen lies
//! behind it: see `kept` in [`crate::policy`].

use crate::Errno;
use mapdirect_sys::mmap::{View, page_size};
use mapdirect_sys::proc_pagemap::PageFlags;
use mapdirect_sys::vmsplice::Held;
use rustix::fs::Advice;
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// Offsets of the pages to hold, so that no folio of up to `folio` bytes
/// holds pages of both `storable` and `frozen`: disjoint runs of whole pages,
/// each in file order, in a file of `size` bytes.
pub(crate) fn pages_between(
    storable: &[Range<u64>],
    frozen: &[Range<u64>],
    size: u64,
    page: u64,
    folio: u64,
) -> Vec<u64> {
    let file_end = size.next_multiple_of(page);
    let is_storable = |range: Range<u64>| {
        let first = storable.partition_point(|run| run.end <= range.start);
        storable
            .get(first)
            .is_some_and(|run| run.start < range.end.min(file_end))
    };
    let mut pages = Vec::new();
    for run in frozen {
        let (start, end) = (run.start, run.end.min(file_end.max(run.start)));
        if !start.is_multiple_of(folio) && is_storable(start - start % folio..start) {
            // Behind the end of the file there are no pages: then the last
            // one before it.
            pages.push(start.min(file_end - page));
        }
        if start < end
            && !end.is_multiple_of(folio)
            && is_storable(end..end.next_multiple_of(folio))
        {
            pages.push(end - page);
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
pub(crate) fn hold(file: BorrowedFd<'_>, offsets: &[u64], folio: u64) -> Result<Held, Failed> {
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
        let held = Held::new(&view, offsets).map_err(system("vmsplice"))?;
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
            return Ok(held);
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
            // 0: neither, 1: storable, 2: frozen.
            pages in proptest::collection::vec(0u8..3, 1..80),
            size in 1u64..90 * PAGE,
        ) {
            let end = size.next_multiple_of(PAGE);
            // What lies behind the end of the file cannot be stored to.
            let pages: Vec<u8> = pages
                .iter()
                .enumerate()
                .map(|(at, kind)| if *kind == 1 && at as u64 * PAGE >= end { 2 } else { *kind })
                .collect();
            let (storable, frozen) = (runs(&pages, 1), runs(&pages, 2));
            let held = pages_between(&storable, &frozen, size, PAGE, FOLIO);
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
                    *offset == run.start || *offset + PAGE == run.end.min(end.max(run.start))
                        || *offset + PAGE == end && run.start >= end
                });
                prop_assert!(is_end, "{offset} {frozen:?}");
            }
        }
    }

    #[test]
    fn nothing_is_held_where_nothing_meets() {
        let between = |storable: &[Range<u64>], frozen: Range<u64>| {
            pages_between(
                storable,
                std::slice::from_ref(&frozen),
                1 << 40,
                PAGE,
                FOLIO,
            )
        };
        let first = 0..FOLIO;
        assert_eq!(between(std::slice::from_ref(&first), FOLIO..2 * FOLIO), []);
        assert_eq!(between(&[], PAGE..2 * PAGE), []);
        let held = between(&[0..PAGE, 2 * PAGE..FOLIO], PAGE..2 * PAGE);
        assert_eq!(held, [PAGE]);
    }
}
