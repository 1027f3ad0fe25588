//! The numbers that the guard and the programs agree on, in one place.
//!
//! The C side defines none of its own: `cargo xtask bpf` writes
//! `prog/constants.h` from this file and from the enums of the contract, and a
//! test below compares the two.

/// The number of rows in the table of rules, and of counters of refusals.
pub(super) const KINDS: usize = 32;
/// The counter of pin ends that could not be reported.
pub(super) const UNTOLD: u32 = 31;

/// The number of kernel functions that the programs have room for.
pub(super) const FUNCTIONS: usize = 64;

/// The number of runs inside an entry. It is chosen so that the entry fits into
/// 256 bytes with what the kernel adds.
pub(super) const INLINE: usize = 6;
/// Flag: the filesystem shares blocks.
pub(super) const REFLINK: u32 = 1;
/// Flag: there are frozen blocks, or blocks beside a pin that take frozen ones
/// along.
pub(super) const HAS_FROZEN: u32 = 2;
/// Flag: raw mappings through the page cache are accepted.
pub(super) const CACHED: u32 = 4;
/// Flag: a growing write that fails frees blocks of a pin.
pub(super) const FAILING_FREES: u32 = 8;
/// Flag: no write is refused anywhere in the file, except untorn ones.
pub(super) const WRITES_PASS: u32 = 16;
/// Flag: untorn writes are refused near the pins.
pub(super) const WINDOWED: u32 = 32;
/// Flag: nothing is frozen, so the last pin can become dormant when it ends.
pub(super) const CAN_SLEEP: u32 = 64;
/// Flag: one of the pins is being granted, so nobody may join yet.
pub(super) const GRANTING: u32 = 128;
/// Flag: only a family may open the file for writing.
pub(super) const DENIES_WRITE: u32 = 256;
/// Flag: no name of the file may go.
pub(super) const DENIES_RENAME: u32 = 512;
/// Flag: blocks may be unshared, since all pins are of strength stable.
pub(super) const UNSHARES: u32 = 1024;

/// The most generations between a process and the holder that it descends from.
#[cfg_attr(not(test), expect(dead_code, reason = "for the programs"))]
pub(super) const ANCESTORS: usize = mapdirect_sys::ancestry::MOST_GENERATIONS;
/// The nanoseconds of a clock tick, as /proc counts start times (`USER_HZ`).
#[cfg_attr(not(test), expect(dead_code, reason = "for the programs"))]
pub(super) const TICK: u64 = 10_000_000;

/// The number of bits in the filter, as a power of two.
pub(super) const FILTER_BITS: u32 = 18;
/// The number of words with these bits. Behind them are two more words for
/// each, about an inode to which writes pass easily.
pub(super) const FILTER_WORDS: usize = 1 << (FILTER_BITS - 6);
/// Spreads inode numbers over the filter.
pub(super) const FILTER_MULTIPLIER: u64 = 0x9E37_79B9_7F4A_7C15;
/// Marks a fact about an inode to which writes pass easily.
pub(super) const EASY: u64 = 1;

/// Marks an inode all of whose pins are gone.
pub(super) const DEAD: u64 = 1 << 63;
/// Marks an inode whose dormant pin somebody is about to take up.
pub(super) const WAKING: u64 = 1 << 62;

/// The number of bytes kept of a pin: 256 with what the kernel adds.
pub(super) const PIN_FACTS: usize = 192;
/// The largest size of a file handle, which is kept behind 128 bytes of other
/// facts. Those of XFS and ext4 have 24 bytes, with the handle of the parent.
pub(super) const HANDLE: usize = PIN_FACTS - 128;

/// Question: tell the state of the inode.
pub(super) const TEND_LOOK: u32 = 0;
/// Question: make sure that no dormant pin on the inode can be taken up again.
pub(super) const TEND_DISTURB: u32 = 1;
/// Question: the guard checks the pin by itself from now on.
pub(super) const TEND_QUIET: u32 = 2;
/// Question: the guard wants to be told of the pin's end.
pub(super) const TEND_TELL: u32 = 3;
/// Question: a pin is about to be granted, so nobody may join.
pub(super) const TEND_GRANTING: u32 = 4;
/// Question: the pin that was being granted is, so others may join.
pub(super) const TEND_GRANTED: u32 = 5;
/// Question: the description of the pin is none any more, though it is there.
pub(super) const TEND_DISOWN: u32 = 6;

/// Event: an operation was refused.
pub(super) const EVENT_REFUSED: u32 = 1;
/// Event: a pin has ended.
pub(super) const EVENT_ENDED: u32 = 2;
/// Event: a program without the library has joined a pin.
pub(super) const EVENT_RAW: u32 = 3;
/// Event: notes of writes are needed to judge one.
pub(super) const EVENT_DOUBT: u32 = 4;

/// The argument of fcntl(2) by which the guard asks the programs to identify a
/// file.
pub(super) const WHO_IS_IT: u64 = 0x6d61_7064_6972_6563;

/// The only page size that the programs support.
pub(super) const PAGE: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::super::functions::Doing;
    use super::*;
    use crate::policy::layers::{LISTS, List};
    use crate::policy::{LARGEST_BLOCK, LetsGo, Meets, OperationKind, RULES, Reach};
    use mapdirect_proto::{IS_IT_PIN, MAY_TAKE_UP, PIN_NUMBER};
    use std::fmt::Write as _;

    /// Has the test write the header, instead of comparing it.
    const WRITE: &str = "MAPDIRECT_WRITE_CONSTANTS";

    /// The variants of an enum with their numbers. All of them must be named,
    /// or it does not compile.
    macro_rules! variants {
        ($type:ident: $($variant:ident)*) => {{
            let _ = |one: $type| match one { $($type::$variant => (),)* };
            [$((stringify!($variant), $type::$variant as u64),)*]
        }};
    }

    /// `OpenRead` as C has it: `OPEN_READ`.
    fn upper(name: &str) -> String {
        let mut upper = String::new();
        for letter in name.chars() {
            if letter.is_uppercase() && !upper.is_empty() {
                upper.push('_');
            }
            upper.push(letter.to_ascii_uppercase());
        }
        upper
    }

    fn enumeration<'name>(
        name: &str,
        prefix: &str,
        variants: impl IntoIterator<Item = (&'name str, u64)>,
    ) -> String {
        let mut text = format!("\nenum {name} {{\n");
        for (variant, number) in variants {
            let _ = writeln!(text, "\t{prefix}{} = {number},", upper(variant));
        }
        text + "};\n"
    }

    fn header() -> String {
        let mut text = String::from(
            "// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0\n\
             //\n\
             // Written by `cargo xtask bpf` from constants.rs, which says what these mean.\n\
             // Do not edit it.\n",
        );
        let kinds: Vec<_> = RULES
            .iter()
            .map(|rule| (format!("{:?}", rule.kind), rule.kind as u64))
            .collect();
        let kinds = kinds.iter().map(|(name, number)| (name.as_str(), *number));
        text += &enumeration("kind", "", kinds);
        let reach = variants!(Reach: Nothing Range ToTheEnd BeyondSize Everything);
        text += &enumeration("reach", "", reach);
        text += &enumeration("meets", "MEETS_", variants!(Meets: Frozen Any));
        let lets_go = variants!(LetsGo: Nothing Range ToTheEnd RangeIfDirect);
        text += &enumeration("lets_go", "LETS_GO_", lets_go);
        let doing = variants!(Doing: Reading Writing Allocating Remapping Copying Asynchronous);
        let anything = [("Anything", 0)];
        text += &enumeration("doing", "", anything.into_iter().chain(doing));
        let lists = variants!(
            List: Pinned Frozen Beside Shared Window Held Mapped Ahead Edges Coarse
        );
        text += &enumeration("list", "", lists);
        text.push('\n');
        macro_rules! numbers {
            ($($name:ident)*) => {
                $(let _ = writeln!(text, "#define {} {}", stringify!($name), $name);)*
            };
        }
        macro_rules! long_numbers {
            ($($name:ident)*) => {
                $(let _ = writeln!(text, "#define {} {:#x}ULL", stringify!($name), $name);)*
            };
        }
        numbers!(LISTS KINDS UNTOLD FUNCTIONS INLINE);
        numbers!(REFLINK HAS_FROZEN CACHED FAILING_FREES WRITES_PASS WINDOWED CAN_SLEEP GRANTING);
        numbers!(DENIES_WRITE DENIES_RENAME UNSHARES ANCESTORS);
        numbers!(FILTER_BITS FILTER_WORDS EASY PIN_FACTS HANDLE);
        numbers!(TEND_LOOK TEND_DISTURB TEND_QUIET TEND_TELL);
        numbers!(TEND_GRANTING TEND_GRANTED TEND_DISOWN);
        numbers!(EVENT_REFUSED EVENT_ENDED EVENT_RAW EVENT_DOUBT);
        long_numbers!(FILTER_MULTIPLIER DEAD WAKING WHO_IS_IT IS_IT_PIN MAY_TAKE_UP PIN_NUMBER);
        long_numbers!(PAGE LARGEST_BLOCK TICK);
        text
    }

    #[test]
    fn the_header_has_these_numbers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/gate/bpf/prog/constants.h");
        if std::env::var_os(WRITE).is_some() {
            std::fs::write(path, header()).unwrap();
        }
        let written = std::fs::read_to_string(path).unwrap_or_default();
        assert_eq!(written, header(), "run `cargo xtask bpf`");
    }

    /// What C takes for granted of these numbers.
    #[test]
    fn numbers_fit_together() {
        let unknown = OperationKind::Unknown as usize;
        assert!(RULES.len() <= UNTOLD as usize && unknown < UNTOLD as usize);
        assert!((UNTOLD as usize) < KINDS);
        // The verifier knows a number in bounds by its bits.
        assert!(KINDS.is_power_of_two() && FILTER_WORDS.is_power_of_two());
        let flags = [
            REFLINK,
            HAS_FROZEN,
            CACHED,
            FAILING_FREES,
            WRITES_PASS,
            WINDOWED,
            CAN_SLEEP,
            GRANTING,
            UNSHARES,
            DENIES_WRITE,
            DENIES_RENAME,
        ];
        let all = flags.iter().fold(0, |all, flag| all | flag);
        assert_eq!(all.count_ones() as usize, flags.len());
    }
}
