//! The filter: which system calls the supervisor is asked about.
//!
//! It is assembled here, and installed by `seccomp(2)`. A filter sees numbers
//! and registers, no memory. Whatever it need not ask about it allows, by the
//! number of the call alone where that is possible: the kernel remembers such
//! answers, and then does not run the filter at all.

use mapdirect_sys::seccomp::{Call, Instruction};
use std::mem::offset_of;

/// What the supervisor has to be asked about.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Asked {
    /// Private mappings of files as well as shared ones.
    pub(crate) private: bool,
    /// Files that are opened.
    pub(crate) opens: bool,
    /// Files that are shortened, or holes punched into them.
    pub(crate) own: bool,
}

// include/uapi/linux/bpf_common.h, seccomp.h
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;
/// `SECCOMP_RET_ALLOW`.
const ALLOW: u32 = 0x7fff_0000;
/// `SECCOMP_RET_USER_NOTIF`.
const ASK: u32 = 0x7fc0_0000;

const MAP_SHARED: u32 = 1;
const MAP_PRIVATE: u32 = 2;
const MAP_SHARED_VALIDATE: u32 = 3;
const MAP_TYPE: u32 = 0xf;
const MAP_FIXED: u32 = 0x10;
const MAP_ANONYMOUS: u32 = 0x20;
const MAP_DENYWRITE: u32 = 0x800;
const ACCESS: u32 = 3;
const READ_ONLY: u32 = 0;
const WRITE_ONLY: u32 = 1;
const READ_WRITE: u32 = 2;
const O_PATH: u32 = 0o10_000_000;
/// `SECCOMP_FILTER_FLAG_NEW_LISTENER`.
const NEW_LISTENER: u32 = 1 << 3;

/// What takes blocks out of a file, or moves them: `FALLOC_FL_PUNCH_HOLE`,
/// `COLLAPSE_RANGE`, `ZERO_RANGE`, `INSERT_RANGE`.
const FALLOC_FREES: u32 = 0x02 | 0x08 | 0x10 | 0x20;

/// A number of 64 bits among the arguments: where its halves are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wide {
    /// In one register.
    One(usize),
    /// In one register of 32 bits, with a sign.
    Narrow(usize),
    /// The lower half here, and the upper half in the next.
    Two(usize),
}

impl Wide {
    /// The number.
    pub(crate) fn of(self, call: &Call) -> i64 {
        let lower = |at: usize| call.arguments[at] & 0xffff_ffff;
        match self {
            Self::One(at) => call.arguments[at].cast_signed(),
            Self::Narrow(at) => {
                let number = u32::try_from(lower(at)).unwrap_or(0);
                i64::from(number.cast_signed())
            }
            Self::Two(at) => (lower(at) | lower(at + 1) << 32).cast_signed(),
        }
    }
}

/// A calling convention: how the numbers of system calls are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Convention {
    /// `AUDIT_ARCH_*` (include/uapi/linux/audit.h).
    pub(crate) audit: u32,
    /// Bits of a number that count.
    numbers: u32,
    /// `mmap(2)` with its arguments in registers.
    pub(crate) mmap: u32,
    /// Its last argument counts in so many bytes.
    pub(crate) mmap_unit: u64,
    /// `mmap(2)` with its arguments in memory.
    pub(crate) old_mmap: Option<u32>,
    /// `open(2)`.
    pub(crate) open: Option<u32>,
    /// `openat(2)`.
    pub(crate) openat: u32,
    /// `openat2(2)`.
    pub(crate) openat2: u32,
    /// `ftruncate(2)`, and where the length is.
    pub(crate) ftruncate: &'static [(u32, Wide)],
    /// `fallocate(2)`, and where offset and length are.
    pub(crate) fallocate: (u32, Wide, Wide),
    seccomp: u32,
    o_directory: u32,
}

/// The conventions of programs that this machine runs.
#[cfg(target_arch = "x86_64")]
pub(crate) const CONVENTIONS: &[Convention] = &[
    Convention {
        audit: 0xc000_003e,
        // x32 has the same numbers, with one bit more.
        numbers: !0x4000_0000,
        mmap: 9,
        mmap_unit: 1,
        old_mmap: None,
        open: Some(2),
        openat: 257,
        openat2: 437,
        ftruncate: &[(77, Wide::One(1))],
        fallocate: (285, Wide::One(2), Wide::One(3)),
        seccomp: 317,
        o_directory: 0o200_000,
    },
    Convention {
        audit: 0x4000_0003,
        numbers: !0,
        mmap: 192,
        mmap_unit: 4096,
        old_mmap: Some(90),
        open: Some(5),
        openat: 295,
        openat2: 437,
        ftruncate: &[(93, Wide::Narrow(1)), (194, Wide::Two(1))],
        fallocate: (324, Wide::Two(2), Wide::Two(4)),
        seccomp: 354,
        o_directory: 0o200_000,
    },
];
/// The conventions of programs that this machine runs.
#[cfg(target_arch = "aarch64")]
pub(crate) const CONVENTIONS: &[Convention] = &[
    Convention {
        audit: 0xc000_00b7,
        numbers: !0,
        mmap: 222,
        mmap_unit: 1,
        old_mmap: None,
        open: None,
        openat: 56,
        openat2: 437,
        ftruncate: &[(46, Wide::One(1))],
        fallocate: (47, Wide::One(2), Wide::One(3)),
        seccomp: 277,
        o_directory: 0o40_000,
    },
    Convention {
        audit: 0x4000_0028,
        numbers: !0,
        mmap: 192,
        mmap_unit: 4096,
        old_mmap: None,
        open: Some(5),
        openat: 322,
        openat2: 437,
        ftruncate: &[(93, Wide::Narrow(1)), (194, Wide::Two(2))],
        fallocate: (352, Wide::Two(2), Wide::Two(4)),
        seccomp: 383,
        o_directory: 0o40_000,
    },
];

/// What the supervisor is asked about, as the filter tells it apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// A mapping, with its arguments in registers.
    Map,
    /// A mapping, with its arguments in memory.
    OldMap,
    /// `open(2)`.
    Open,
    /// `openat(2)`.
    OpenAt,
    /// `openat2(2)`.
    OpenAt2,
    /// `ftruncate(2)`, to this length.
    Truncate(i64),
    /// `fallocate(2)`, of what begins here and is so long.
    Allocate(i64, i64),
    /// A filter with a listener of its own.
    Listener,
}

/// What a call is that the supervisor was asked about.
pub(crate) fn subject(call: &Call) -> Option<(&'static Convention, Subject)> {
    let convention = CONVENTIONS
        .iter()
        .find(|convention| convention.audit == call.convention)?;
    let number = call.number.cast_unsigned() & convention.numbers;
    let subject = match number {
        number if number == convention.mmap => Subject::Map,
        number if Some(number) == convention.old_mmap => Subject::OldMap,
        number if Some(number) == convention.open => Subject::Open,
        number if number == convention.openat => Subject::OpenAt,
        number if number == convention.openat2 => Subject::OpenAt2,
        number if number == convention.seccomp => Subject::Listener,
        number if number == convention.fallocate.0 => {
            let (_, offset, length) = convention.fallocate;
            Subject::Allocate(offset.of(call), length.of(call))
        }
        number => {
            let mut known = convention.ftruncate.iter();
            let (_, length) = known.find(|(known, _)| *known == number)?;
            Subject::Truncate(length.of(call))
        }
    };
    Some((convention, subject))
}

/// A condition on an argument of a call.
#[derive(Clone, Copy, Debug)]
enum When {
    /// These bits have this value.
    Equal(usize, u32, u32),
    /// Any of these bits is set.
    Any(usize, u32),
}

/// Assembles the filter.
pub(crate) fn assemble(asked: Asked) -> Vec<Instruction> {
    let mut filter = Vec::new();
    for convention in CONVENTIONS {
        let part = part(convention, asked);
        filter.push(load(offset_of!(Call, convention)));
        filter.push(jump(JUMP_IF_EQUAL, convention.audit, 0, part.len()));
        filter.extend(part);
    }
    filter.push(ret(ALLOW));
    filter
}

/// What is asked of calls by one convention.
fn part(convention: &Convention, asked: Asked) -> Vec<Instruction> {
    let mut part = vec![load(offset_of!(Call, number))];
    if convention.numbers != !0 {
        part.push(instruction(AND, convention.numbers));
    }
    let type_of = |kind| When::Equal(3, MAP_TYPE | MAP_ANONYMOUS, kind);
    let mut maps = vec![type_of(MAP_SHARED), type_of(MAP_SHARED_VALIDATE)];
    if asked.private {
        // Libraries are mapped in one of these ways, by the loader.
        let others = MAP_TYPE | MAP_ANONYMOUS | MAP_FIXED | MAP_DENYWRITE;
        maps.push(When::Equal(3, others, MAP_PRIVATE));
    }
    part.extend(rule(convention.mmap, &maps));
    part.extend(
        convention
            .old_mmap
            .iter()
            .flat_map(|number| rule(*number, &[])),
    );
    if asked.opens {
        let known = ACCESS | O_PATH | convention.o_directory;
        let opens = |argument| {
            [READ_ONLY, WRITE_ONLY, READ_WRITE].map(|access| When::Equal(argument, known, access))
        };
        part.extend(
            convention
                .open
                .iter()
                .flat_map(|number| rule(*number, &opens(1))),
        );
        part.extend(rule(convention.openat, &opens(2)));
        part.extend(rule(convention.openat2, &[]));
    }
    if asked.own {
        for (number, _) in convention.ftruncate {
            part.extend(rule(*number, &[]));
        }
        let frees = When::Any(1, FALLOC_FREES);
        part.extend(rule(convention.fallocate.0, &[frees]));
    }
    part.extend(rule(convention.seccomp, &[When::Any(1, NEW_LISTENER)]));
    part.push(ret(ALLOW));
    part
}

/// Asks about a call if any of the conditions is true, or if there is none.
/// The number of the call has been loaded, and still is where this ends.
fn rule(number: u32, conditions: &[When]) -> Vec<Instruction> {
    let mut then = Vec::new();
    for condition in conditions {
        match *condition {
            When::Equal(argument, mask, value) => {
                then.push(load_argument(argument));
                then.push(instruction(AND, mask));
                then.push(jump(JUMP_IF_EQUAL, value, 0, 1));
            }
            When::Any(argument, mask) => {
                then.push(load_argument(argument));
                then.push(jump(JUMP_IF_ANY_BIT, mask, 0, 1));
            }
        }
        then.push(ret(ASK));
    }
    then.push(ret(if conditions.is_empty() { ASK } else { ALLOW }));
    let mut rule = vec![jump(JUMP_IF_EQUAL, number, 0, then.len())];
    rule.extend(then);
    rule
}

fn instruction(code: u16, constant: u32) -> Instruction {
    Instruction {
        code,
        if_true: 0,
        if_false: 0,
        constant,
    }
}

/// A jump over so many instructions.
fn jump(code: u16, constant: u32, if_true: usize, if_false: usize) -> Instruction {
    let short = |distance| u8::try_from(distance).unwrap_or_else(|_| unreachable!());
    Instruction {
        if_true: short(if_true),
        if_false: short(if_false),
        ..instruction(code, constant)
    }
}

fn ret(value: u32) -> Instruction {
    instruction(RETURN, value)
}

fn load(offset: usize) -> Instruction {
    instruction(LOAD, u32::try_from(offset).unwrap_or(u32::MAX))
}

/// The lower half of an argument. All flags are in it.
fn load_argument(argument: usize) -> Instruction {
    let upper_first = usize::from(cfg!(target_endian = "big")) * 4;
    load(offset_of!(Call, arguments) + argument * 8 + upper_first)
}

#[cfg(test)]
mod tests;
