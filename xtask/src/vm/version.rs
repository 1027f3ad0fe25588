//! Versions of Debian packages, and which is newer.

use std::cmp::Ordering;
use std::fmt;

/// `[epoch:]upstream[-revision]`, as in `6.1.192-2` or `7.3~rc7-1~exp1`.
#[derive(Clone, Debug)]
pub(crate) struct Version(String);

impl Version {
    pub(crate) fn new(text: &str) -> Self {
        Self(text.to_owned())
    }

    fn parts(&self) -> (u64, &str, &str) {
        let (epoch, rest) = self.0.split_once(':').unwrap_or(("0", &self.0));
        let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, "0"));
        (epoch.parse().unwrap_or(0), upstream, revision)
    }

    /// What the people upstream call it, more or less.
    pub(crate) fn upstream(&self) -> &str {
        self.parts().1
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Ord for Version {
    fn cmp(&self, other: &Self) -> Ordering {
        let (epoch, upstream, revision) = self.parts();
        let (other_epoch, other_upstream, other_revision) = other.parts();
        epoch
            .cmp(&other_epoch)
            .then_with(|| compare(upstream, other_upstream))
            .then_with(|| compare(revision, other_revision))
    }
}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Version {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Version {}

/// Compares as deb-version(7) says: text and numbers in turns; in text `~`
/// comes before the end, the end before letters, letters before all else.
fn compare(mut a: &str, mut b: &str) -> Ordering {
    while !a.is_empty() || !b.is_empty() {
        let (text, other) = (cut(&mut a, false), cut(&mut b, false));
        let longest = text.len().max(other.len());
        let ranks = |text: &str| {
            let mut ranks: Vec<_> = text.bytes().map(rank).collect();
            ranks.resize(longest, END);
            ranks
        };
        let (number, other_number) = (cut(&mut a, true), cut(&mut b, true));
        let number = number.trim_start_matches('0');
        let other_number = other_number.trim_start_matches('0');
        let order = ranks(text)
            .cmp(&ranks(other))
            // More digits are a greater number.
            .then(number.len().cmp(&other_number.len()))
            .then(number.cmp(other_number));
        if order.is_ne() {
            return order;
        }
    }
    Ordering::Equal
}

/// Cuts the digits off the front, or what is none.
fn cut<'a>(text: &mut &'a str, digits: bool) -> &'a str {
    let end = text
        .find(|c: char| c.is_ascii_digit() != digits)
        .unwrap_or(text.len());
    let (front, rest) = text.split_at(end);
    *text = rest;
    front
}

const END: u16 = 1;

fn rank(byte: u8) -> u16 {
    match byte {
        b'~' => 0,
        letter if letter.is_ascii_alphabetic() => u16::from(letter),
        other => u16::from(other) + 256,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order() {
        let ascending = [
            "1.0~~",
            "1.0~rc1",
            "1.0",
            "1.0a",
            "1.0+b",
            "1.0.1",
            "6.1.9-1",
            "6.1.170-3",
            "6.1.192-1",
            "6.1.192-2",
            "6.1.192-10",
            "6.12.117-1~bpo12+1",
            "6.12.117-1~deb12u1",
            "6.12.117-1",
            "7.3~rc7-1~exp1",
            "7.3-1",
            "7.3.4-1~bpo13+1",
            "7.3.4-1",
            "7.3.10-1",
            "1:0.1-1",
        ];
        for (at, a) in ascending.iter().enumerate() {
            for (other_at, b) in ascending.iter().enumerate() {
                assert_eq!(
                    Version::new(a).cmp(&Version::new(b)),
                    at.cmp(&other_at),
                    "{a} and {b}"
                );
            }
        }
    }

    #[test]
    fn the_same_in_other_words() {
        assert_eq!(Version::new("1.02-1"), Version::new("1.2-1"));
        assert_eq!(Version::new("1.2"), Version::new("0:1.2-0"));
        assert_eq!(Version::new("7.3~rc7-1~exp1").upstream(), "7.3~rc7");
    }
}
