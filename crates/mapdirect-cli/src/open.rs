//! Opening what the command line names.

use mapdirect_sys::{Errno, proc};
use rustix::fs::{FileType, Mode, OFlags, fstat};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

/// Opens a file. A FIFO does not make us wait for its other end; a lease on
/// a regular file does, until its holder has given it up or the kernel has
/// taken it (`/proc/sys/fs/lease-break-time`): NFS clients have some.
///
/// # Errors
///
/// As open(2).
pub(crate) fn open(path: &Path, access: OFlags) -> Result<File, Errno> {
    let open = |flags| rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty());
    let opened = open(access | OFlags::NOCTTY | OFlags::NONBLOCK).or_else(|errno| {
        if errno != Errno::AGAIN {
            return Err(errno);
        }
        let there = open(OFlags::PATH)?;
        if FileType::from_raw_mode(fstat(&there)?.st_mode) != FileType::RegularFile {
            return Err(errno);
        }
        proc::reopen(there.as_fd(), access)
    });
    opened.map(File::from)
}
