//! Opening what the command line names.

use mapdirect_sys::Errno;
use rustix::fs::{FileType, Mode, OFlags, fstat};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Opens a file. A FIFO does not make us wait for its other end; a lease on
/// a regular file does, until its holder has given it up or the kernel has
/// taken it (`/proc/sys/fs/lease-break-time`): NFS clients have some.
///
/// # Errors
///
/// As open(2).
pub(crate) fn open(path: &Path, access: OFlags) -> Result<File, Errno> {
    let flags = access | OFlags::CLOEXEC | OFlags::NOCTTY;
    let open = |flags| rustix::fs::open(path, flags, Mode::empty());
    let opened = open(flags | OFlags::NONBLOCK).or_else(|errno| {
        if errno != Errno::AGAIN {
            return Err(errno);
        }
        let there = open(OFlags::PATH | OFlags::CLOEXEC)?;
        if FileType::from_raw_mode(fstat(&there)?.st_mode) != FileType::RegularFile {
            return Err(errno);
        }
        let again = format!("/proc/self/fd/{}", there.as_raw_fd());
        rustix::fs::open(again, flags, Mode::empty())
    });
    opened.map(File::from)
}
