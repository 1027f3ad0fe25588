//! openat(2) with `O_EMPTYPATH`: opens again what a descriptor is open on.

use crate::seam::{self, Call};
use crate::{Errno, Result, proc};
use rustix::fs::{Mode, OFlags};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// `O_EMPTYPATH` (include/uapi/asm-generic/fcntl.h, for x86 and arm64). Linux 7.3
/// has it, 6.12 does not.
const EMPTY_PATH: OFlags = OFlags::from_bits_retain(1 << 26);

/// Set when this kernel turned out not to know the flag. Kernels ignore flags
/// that they do not know, and then there is no file of an empty name.
static IS_UNKNOWN: AtomicBool = AtomicBool::new(false);

/// Opens the inode behind `file` once more, as [`proc::reopen`] does, at half
/// the price where the kernel has a call for it.
///
/// # Errors
///
/// As [`proc::reopen`].
pub fn reopen(file: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd> {
    if IS_UNKNOWN.load(Relaxed) {
        return proc::reopen(file, flags);
    }
    seam::check(Call::Reopen)?;
    let directly = flags | OFlags::CLOEXEC | OFlags::NOCTTY | EMPTY_PATH;
    match rustix::fs::openat(file, c"", directly, Mode::empty()) {
        Err(Errno::NOENT) => {
            IS_UNKNOWN.store(true, Relaxed);
            proc::reopen(file, flags)
        }
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn it_is_the_same_file_and_another_description() {
        for is_unknown in [false, true] {
            IS_UNKNOWN.store(is_unknown, Relaxed);
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(b"here").unwrap();
            let again = reopen(file.as_fd(), OFlags::RDWR).unwrap();
            let of = |fd: BorrowedFd<'_>| {
                let stat = rustix::fs::fstat(fd).unwrap();
                (stat.st_dev, stat.st_ino)
            };
            assert_eq!(of(again.as_fd()), of(file.as_fd()));
            let flags = rustix::io::fcntl_getfd(&again).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
            let mut text = String::new();
            // From the beginning: it has a position of its own.
            std::fs::File::from(again)
                .read_to_string(&mut text)
                .unwrap();
            assert_eq!(text, "here");
        }
    }
}
