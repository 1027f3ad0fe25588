//! Chooses the inodes of a filesystem to listen to, as ranges of inode numbers,
//! and writes the filter for the kernel.
//!
//! A filter has 4,095 bytes at most, and every event of the filesystem pays for
//! its evaluation. A few inodes are named exactly. Many are covered by ranges,
//! cut at the widest gaps between their numbers: both filesystems give files of
//! one directory numbers that are close together, and files of other
//! directories distant ones. The thread that reads the events drops those of
//! inodes that are covered but not pinned. The filter is a search tree, so an
//! event that does not match is dropped after a number of comparisons
//! logarithmic in the number of ranges.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::ops::RangeInclusive;

/// The most ranges that fit into a filter: each takes 145 bytes in the worst
/// case, including the conditions that lead to it.
const MOST: usize = 26;

/// The inode numbers that are listened to, as ranges in order and apart from
/// each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cover {
    ranges: Vec<RangeInclusive<u64>>,
    exact: bool,
}

impl Cover {
    /// Covers these inodes. If other inodes are covered as well, some inodes
    /// after `newest` are covered, too. Files are often pinned in the order in
    /// which they were made, so the next ones are then covered already.
    pub(crate) fn of(inodes: &BTreeSet<u64>, newest: Option<u64>) -> Self {
        let mut runs: Vec<RangeInclusive<u64>> = Vec::new();
        for &inode in inodes {
            match runs.last_mut() {
                Some(last) if last.end().checked_add(1) == Some(inode) => {
                    *last = *last.start()..=inode;
                }
                _ => runs.push(inode..=inode),
            }
        }
        if runs.len() <= MOST {
            return Self {
                ranges: runs,
                exact: true,
            };
        }
        // Cut at the widest gaps.
        let mut gaps: Vec<(u64, usize)> = runs
            .windows(2)
            .enumerate()
            .map(|(at, pair)| (pair[1].start() - pair[0].end(), at))
            .collect();
        gaps.sort_unstable_by(|one, other| other.cmp(one));
        let mut cuts: Vec<usize> = gaps.iter().take(MOST - 1).map(|(_, at)| *at).collect();
        cuts.sort_unstable();
        let mut ranges = Vec::with_capacity(MOST);
        let mut first = 0;
        for last in cuts.into_iter().chain([runs.len() - 1]) {
            ranges.push(*runs[first].start()..=*runs[last].end());
            first = last + 1;
        }
        if let Some(newest) = newest
            && let Some(at) = ranges.iter().position(|range| range.contains(&newest))
        {
            let slack = inodes.len() as u64;
            let limit = ranges.get(at + 1).map_or(u64::MAX, |next| next.start() - 1);
            let end = ranges[at].end().saturating_add(slack).min(limit);
            ranges[at] = *ranges[at].start()..=end;
        }
        Self {
            ranges,
            exact: false,
        }
    }

    pub(crate) fn covers(&self, inode: u64) -> bool {
        let at = self.ranges.partition_point(|range| *range.end() < inode);
        self.ranges
            .get(at)
            .is_some_and(|range| range.contains(&inode))
    }

    /// Whether only the requested inodes are covered.
    pub(crate) fn is_exact(&self) -> bool {
        self.exact
    }

    /// Builds the filter for a tracepoint. `device` is a device as the kernel
    /// numbers it; `condition` is one more condition.
    pub(crate) fn filter(&self, device: u32, condition: Option<&str>) -> String {
        // An event that is not about a pin mostly ends with the first
        // comparison. That is one of inodes, because other filesystems are
        // seldom as busy as this one, and files of other directories are mostly
        // outside of all the ranges.
        let mut text = String::new();
        // Writing to a string does not fail.
        if let [first, .., last] = self.ranges.as_slice() {
            let (first, last) = (first.start(), last.end());
            let _ = write!(text, "ino >= {first} && ino <= {last} && (");
            tree(&self.ranges, &mut text);
            text.push(')');
        } else {
            tree(&self.ranges, &mut text);
        }
        let _ = write!(text, " && dev == {device}");
        if let Some(condition) = condition {
            text.push_str(" && ");
            text.push_str(condition);
        }
        text
    }
}

fn tree(ranges: &[RangeInclusive<u64>], text: &mut String) {
    // Writing to a string does not fail.
    let _ = match ranges {
        // No inode has this number.
        [] => write!(text, "ino == 0"),
        [one] if one.start() == one.end() => write!(text, "ino == {}", one.start()),
        [one] => write!(text, "ino >= {} && ino <= {}", one.start(), one.end()),
        _ => {
            let (left, right) = ranges.split_at(ranges.len() / 2);
            let middle = right[0].start();
            let _ = write!(text, "(ino < {middle} && (");
            tree(left, text);
            let _ = write!(text, ")) || (ino >= {middle} && (");
            tree(right, text);
            write!(text, "))")
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use mapdirect_sys::perf_event::MAX_FILTER;
    use proptest::prelude::*;

    fn set(inodes: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
        inodes.into_iter().collect()
    }

    #[test]
    fn few_are_named() {
        let cover = Cover::of(&set([5, 9, 6]), Some(9));
        assert!(cover.is_exact());
        assert_eq!(
            cover.filter(77, Some("!(bmap_state & 768)")),
            "ino >= 5 && ino <= 9 && ((ino < 9 && (ino >= 5 && ino <= 6)) || \
             (ino >= 9 && (ino == 9))) && dev == 77 && !(bmap_state & 768)"
        );
        assert_eq!(
            Cover::of(&set([4]), None).filter(1, None),
            "ino == 4 && dev == 1"
        );
        assert!(!Cover::of(&set([4]), None).covers(5));
    }

    #[test]
    fn files_made_together_are_covered_before_they_are_pinned() {
        // Every other one is a file of somebody else's.
        let mut pinned = BTreeSet::new();
        let mut cover = Cover::default();
        let mut armed = 0;
        for inode in (0..20_000).step_by(2) {
            pinned.insert(inode);
            if !cover.covers(inode) {
                cover = Cover::of(&pinned, Some(inode));
                armed += 1;
            }
        }
        assert!(armed < 80, "armed {armed} times");
    }

    #[test]
    fn the_largest_filter_fits() {
        let far = (0..MOST as u64).map(|at| u64::MAX - 2 * at * (1 << 50));
        let cover = Cover::of(&set(far.flat_map(|at| [at, at - 1])), None);
        assert_eq!(cover.ranges.len(), MOST);
        let filter = cover.filter(u32::MAX, Some("!(bmap_state & 768)"));
        assert!(filter.len() <= MAX_FILTER, "{}", filter.len());
    }

    /// What the kernel does with the filter, of the words used here.
    fn matches(filter: &str, dev: u64, ino: u64) -> bool {
        let mut at = 0;
        let tokens: Vec<String> = filter
            .replace('(', " ( ")
            .replace(')', " ) ")
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        let result = or(&tokens, &mut at, dev, ino);
        assert_eq!(at, tokens.len(), "{filter}");
        result
    }

    fn or(tokens: &[String], at: &mut usize, dev: u64, ino: u64) -> bool {
        let mut result = and(tokens, at, dev, ino);
        while tokens.get(*at).is_some_and(|token| token == "||") {
            *at += 1;
            let other = and(tokens, at, dev, ino);
            result |= other;
        }
        result
    }

    fn and(tokens: &[String], at: &mut usize, dev: u64, ino: u64) -> bool {
        let mut result = one(tokens, at, dev, ino);
        while tokens.get(*at).is_some_and(|token| token == "&&") {
            *at += 1;
            let other = one(tokens, at, dev, ino);
            result &= other;
        }
        result
    }

    fn one(tokens: &[String], at: &mut usize, dev: u64, ino: u64) -> bool {
        if tokens[*at] == "(" {
            *at += 1;
            let result = or(tokens, at, dev, ino);
            assert_eq!(tokens[*at], ")");
            *at += 1;
            return result;
        }
        let left = if tokens[*at] == "dev" { dev } else { ino };
        let right: u64 = tokens[*at + 2].parse().unwrap();
        let result = match tokens[*at + 1].as_str() {
            "==" => left == right,
            "<" => left < right,
            ">=" => left >= right,
            "<=" => left <= right,
            other => panic!("{other}"),
        };
        *at += 3;
        result
    }

    proptest! {
        #[test]
        fn everything_asked_for_is_covered_and_matched(
            inodes in proptest::collection::btree_set(1u64..4000, 1..300),
            others in proptest::collection::vec(0u64..5000, 20),
        ) {
            let cover = Cover::of(&inodes, inodes.last().copied());
            let filter = cover.filter(9, None);
            prop_assert!(filter.len() <= MAX_FILTER - 40);
            for inode in &inodes {
                prop_assert!(cover.covers(*inode));
                prop_assert!(matches(&filter, 9, *inode));
                prop_assert!(!matches(&filter, 8, *inode));
            }
            for inode in others {
                prop_assert_eq!(matches(&filter, 9, inode), cover.covers(inode));
                if cover.is_exact() {
                    prop_assert_eq!(cover.covers(inode), inodes.contains(&inode));
                }
            }
        }
    }
}
