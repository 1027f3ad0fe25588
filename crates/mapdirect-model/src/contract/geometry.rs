//! The pieces of a file that the page cache handles as one. Pure: all sizes are
//! values, so that property tests can vary them.

use std::ops::Range;

/// The number of bytes in the largest possible block or page.
pub const LARGEST_BLOCK: u64 = 64 << 10;

/// How the page cache divides a file into pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes in a page, the smallest unit of a mapping.
    pub page: u64,
    /// Bytes in the largest folio. A store to one page makes its whole folio
    /// dirty.
    pub folio: u64,
    /// Whether a write to a part of a folio makes the whole folio dirty, too
    /// (XFS before Linux 6.6 without DAX).
    pub coarse: bool,
}

impl Geometry {
    /// The geometry of a machine with pages of this size. Its largest folio is
    /// a huge page, or what fits into two levels of the page cache's index
    /// (`MAX_PAGECACHE_ORDER`, include/linux/pagemap.h).
    #[must_use]
    pub const fn of_pages(page: u64) -> Self {
        let most = 1 << 11;
        let pages = page / 8;
        Self {
            page,
            folio: page * if pages < most { pages } else { most },
            coarse: false,
        }
    }

    /// This geometry, with or without [`coarse`](Self::coarse) writes.
    #[must_use]
    pub const fn coarse(self, coarse: bool) -> Self {
        Self { coarse, ..self }
    }

    /// The bytes of all folios that may contain any of `range`.
    #[must_use]
    pub fn folios(&self, range: &Range<u64>) -> Range<u64> {
        rounded_out(range, self.folio)
    }

    /// The end of the page in which byte `end` lies, or `end` itself if a page
    /// begins there.
    pub(super) fn page_end(&self, end: u64) -> u64 {
        end.checked_next_multiple_of(self.page).unwrap_or(u64::MAX)
    }
}

/// The bytes of all units that contain any of `range`.
pub(super) fn rounded_out(range: &Range<u64>, unit: u64) -> Range<u64> {
    let end = range.end.checked_next_multiple_of(unit);
    range.start - range.start % unit..end.unwrap_or(u64::MAX)
}

/// Whether two ranges have a byte in common.
pub(super) fn intersects(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start.max(other.start) < one.end.min(other.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folios_are_huge_pages_or_what_the_index_holds() {
        assert_eq!(Geometry::of_pages(4 << 10).folio, 2 << 20);
        assert_eq!(Geometry::of_pages(16 << 10).folio, 32 << 20);
        assert_eq!(Geometry::of_pages(64 << 10).folio, 128 << 20);
    }

    #[test]
    fn the_last_unit_of_all_ends_where_numbers_end() {
        assert_eq!(rounded_out(&(5..9), 4), 4..12);
        assert_eq!(rounded_out(&(5..u64::MAX), 4), 4..u64::MAX);
    }
}
