//! Finds the pages that keep frozen blocks apart from others. Pure.
//!
//! A store through a mapping makes the whole folio of its page dirty. The
//! filesystem then allocates or copies everything that lies under the folio
//! (`iomap_page_mkwrite`, fs/iomap/buffered-io.c; `block_page_mkwrite`,
//! fs/buffer.c). Folios are aligned runs of pages, up to a huge page. If a
//! folio contains both a block that can be stored to and a frozen one, a store
//! to the first changes the second.
//!
//! A page that is in the page cache by itself cannot become part of a larger
//! folio. So the pages at both ends of every frozen run are held in the page
//! cache.

use super::geometry::Geometry;
use std::ops::Range;

/// The offsets of the pages to hold, so that no folio contains both pages of
/// `frozen` and others, in a file of `size` bytes. `frozen` must be disjoint
/// runs of whole pages in file order, with others in between. The others may be
/// mapped writable later.
#[must_use]
pub fn pages_between(frozen: &[Range<u64>], size: u64, geometry: &Geometry) -> Vec<u64> {
    let (page, folio) = (geometry.page, geometry.folio);
    let file_end = size.next_multiple_of(page);
    let mut pages = Vec::new();
    for run in frozen {
        let start = run.start;
        if !start.is_multiple_of(folio) && start - start % folio < file_end {
            // Behind the end of the file there are no pages, so the last page
            // before the end is held.
            pages.push(start.min(file_end - page));
        }
        if run.end < file_end && !run.end.is_multiple_of(folio) {
            pages.push(run.end - page);
        }
    }
    pages.dedup();
    pages
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;
    /// Small, so that there are many.
    const FOLIO: u64 = 8 * PAGE;
    const GEOMETRY: Geometry = Geometry {
        page: PAGE,
        folio: FOLIO,
        coarse: false,
    };

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
            let held = pages_between(&frozen, size, &GEOMETRY);
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
            |run: Range<u64>| pages_between(std::slice::from_ref(&run), 1 << 40, &GEOMETRY);
        assert_eq!(between(FOLIO..2 * FOLIO), []);
        assert_eq!(between(PAGE..2 * PAGE), [PAGE]);
        assert_eq!(between(PAGE..FOLIO), [PAGE]);
        assert_eq!(between(0..3 * PAGE), [2 * PAGE]);
    }
}
