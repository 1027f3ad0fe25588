//! A system call in words, as far as its registers tell it.
//!
//! Only numbers are told. What an argument points to is the memory of the
//! process, which other threads may have changed since.

use mapdirect_sys::proc::Syscall;
use std::fmt::Write as _;

/// What an argument means.
#[derive(Clone, Copy)]
enum Argument {
    /// Not told: an address.
    Skip,
    Fd(&'static str),
    Number(&'static str),
    Hex(&'static str),
    OpenFlags,
    FallocateMode,
}

use Argument::{FallocateMode, Fd, Hex, Number, OpenFlags, Skip};

/// The call, or nothing if its number is not known.
pub(crate) fn words(call: &Syscall) -> String {
    let Some((name, arguments)) = meaning(call.number) else {
        return String::new();
    };
    let mut words = format!("{name}(");
    let mut is_first = true;
    for (argument, value) in arguments.iter().zip(call.args) {
        let text = match argument {
            Skip => continue,
            // The kernel takes an int.
            Fd(name) => format!("{name} {}", int(value)),
            Number(name) => format!("{name} {value}"),
            Hex(name) => format!("{name} {value:#x}"),
            OpenFlags => format!("flags {}", open_flags(value)),
            FallocateMode => format!("mode {}", fallocate_mode(value)),
        };
        if !is_first {
            words.push_str(", ");
        }
        is_first = false;
        words.push_str(&text);
    }
    words.push(')');
    words
}

fn int(register: u64) -> i32 {
    crate::gate::fanotify::descriptor(register)
}

/// The names of the bits, and what is left in hexadecimal.
fn bits(value: u64, names: &[(u64, &str)]) -> String {
    let mut left = value;
    let mut words = String::new();
    for (bit, name) in names {
        if *bit != 0 && left & bit == *bit {
            left &= !bit;
            let _ = write!(words, "{}{name}", if words.is_empty() { "" } else { "|" });
        }
    }
    if left != 0 {
        let _ = write!(
            words,
            "{}{left:#x}",
            if words.is_empty() { "" } else { "|" }
        );
    }
    words
}

fn open_flags(value: u64) -> String {
    let flag = |flag: i32| u64::from(flag.cast_unsigned());
    let value = value & 0xffff_ffff;
    let access = match value & 3 {
        0 => "O_RDONLY",
        1 => "O_WRONLY",
        2 => "O_RDWR",
        _ => "O_ACCMODE",
    };
    let rest = bits(
        value & !3,
        &[
            (flag(libc::O_CREAT), "O_CREAT"),
            (flag(libc::O_EXCL), "O_EXCL"),
            (flag(libc::O_TRUNC), "O_TRUNC"),
            (flag(libc::O_APPEND), "O_APPEND"),
            (flag(libc::O_DIRECT), "O_DIRECT"),
            (flag(libc::O_SYNC), "O_SYNC"),
            (flag(libc::O_DSYNC), "O_DSYNC"),
            (flag(libc::O_CLOEXEC), "O_CLOEXEC"),
            (flag(libc::O_NOFOLLOW), "O_NOFOLLOW"),
            (flag(libc::O_NONBLOCK), "O_NONBLOCK"),
            (flag(libc::O_NOCTTY), "O_NOCTTY"),
            // What a 64-bit program always gives.
            (0o100_000, "O_LARGEFILE"),
        ],
    );
    if rest.is_empty() {
        String::from(access)
    } else {
        format!("{access}|{rest}")
    }
}

fn fallocate_mode(value: u64) -> String {
    let value = value & 0xffff_ffff;
    if value == 0 {
        return String::from("0");
    }
    bits(
        value,
        &[
            (0x01, "KEEP_SIZE"),
            (0x02, "PUNCH_HOLE"),
            (0x08, "COLLAPSE_RANGE"),
            (0x10, "ZERO_RANGE"),
            (0x20, "INSERT_RANGE"),
            (0x40, "UNSHARE_RANGE"),
            (0x80, "WRITE_ZEROES"),
        ],
    )
}

/// The name of a call and what its arguments mean.
type Meaning = (&'static str, &'static [Argument]);

const OPENAT: Meaning = ("openat", &[Skip, Skip, OpenFlags]);
const OPENAT2: Meaning = ("openat2", &[]);
const BY_HANDLE: Meaning = ("open_by_handle_at", &[Fd("mount"), Skip, OpenFlags]);
const PWRITE: Meaning = (
    "pwrite64",
    &[Fd("fd"), Skip, Number("count"), Number("offset")],
);
const WRITE: Meaning = ("write", &[Fd("fd"), Skip, Number("count")]);
const WRITEV: Meaning = ("writev", &[Fd("fd")]);
const PWRITEV: Meaning = ("pwritev", &[Fd("fd"), Skip, Skip, Number("offset")]);
const PWRITEV2: Meaning = (
    "pwritev2",
    &[Fd("fd"), Skip, Skip, Number("offset"), Skip, Hex("flags")],
);
const FALLOCATE: Meaning = (
    "fallocate",
    &[Fd("fd"), FallocateMode, Number("offset"), Number("length")],
);
const TRUNCATE: Meaning = ("truncate", &[Skip, Number("size")]);
const FTRUNCATE: Meaning = ("ftruncate", &[Fd("fd"), Number("size")]);
const MADVISE: Meaning = (
    "madvise",
    &[Hex("address"), Number("length"), Number("advice")],
);
const MMAP: Meaning = (
    "mmap",
    &[
        Skip,
        Number("length"),
        Hex("protection"),
        Hex("flags"),
        Fd("fd"),
        Number("offset"),
    ],
);
const IOCTL: Meaning = ("ioctl", &[Fd("fd"), Hex("request")]);
const SENDFILE: Meaning = ("sendfile", &[Fd("out"), Fd("in"), Skip, Number("count")]);
const SPLICE: Meaning = (
    "splice",
    &[Fd("in"), Skip, Fd("out"), Skip, Number("length")],
);
const COPY: Meaning = (
    "copy_file_range",
    &[Fd("in"), Skip, Fd("out"), Skip, Number("length")],
);

#[cfg(target_arch = "x86_64")]
fn meaning(number: i64) -> Option<Meaning> {
    Some(match number {
        1 => WRITE,
        2 => ("open", &[Skip, OpenFlags]),
        9 => MMAP,
        16 => IOCTL,
        18 => PWRITE,
        20 => WRITEV,
        28 => MADVISE,
        40 => SENDFILE,
        76 => TRUNCATE,
        77 => FTRUNCATE,
        85 => ("creat", &[]),
        167 => ("swapon", &[Skip, Hex("flags")]),
        163 => ("acct", &[]),
        257 => OPENAT,
        275 => SPLICE,
        285 => FALLOCATE,
        296 => PWRITEV,
        304 => BY_HANDLE,
        326 => COPY,
        328 => PWRITEV2,
        426 => ("io_uring_enter", &[Fd("fd"), Number("submit")]),
        437 => OPENAT2,
        _ => return None,
    })
}

#[cfg(target_arch = "aarch64")]
fn meaning(number: i64) -> Option<Meaning> {
    Some(match number {
        29 => IOCTL,
        45 => TRUNCATE,
        46 => FTRUNCATE,
        47 => FALLOCATE,
        56 => OPENAT,
        64 => WRITE,
        66 => WRITEV,
        68 => PWRITE,
        70 => PWRITEV,
        71 => SENDFILE,
        76 => SPLICE,
        89 => ("acct", &[]),
        222 => MMAP,
        224 => ("swapon", &[Skip, Hex("flags")]),
        233 => MADVISE,
        265 => BY_HANDLE,
        285 => COPY,
        287 => PWRITEV2,
        426 => ("io_uring_enter", &[Fd("fd"), Number("submit")]),
        437 => OPENAT2,
        _ => return None,
    })
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn meaning(_number: i64) -> Option<Meaning> {
    None
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    fn said(number: i64, args: [u64; 6]) -> String {
        words(&Syscall {
            number,
            args,
            sp: 1,
            pc: 1,
        })
    }

    #[test]
    fn calls_are_told_as_they_were_made() {
        let flags = (libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC).cast_unsigned();
        assert_eq!(
            said(257, [u64::MAX - 99, 0x7000, flags.into(), 0o644, 0, 0]),
            "openat(flags O_WRONLY|O_CREAT|O_TRUNC)"
        );
        assert_eq!(
            said(18, [3, 0x7000, 4096, 8192, 0, 0]),
            "pwrite64(fd 3, count 4096, offset 8192)"
        );
        assert_eq!(
            said(285, [4, 3, 0, 4096, 0, 0]),
            "fallocate(fd 4, mode KEEP_SIZE|PUNCH_HOLE, offset 0, length 4096)"
        );
        assert_eq!(
            said(77, [u64::MAX, 5, 0, 0, 0, 0]),
            "ftruncate(fd -1, size 5)"
        );
        assert_eq!(said(437, [1; 6]), "openat2()");
        assert_eq!(said(99_999, [1; 6]), "");
    }
}
