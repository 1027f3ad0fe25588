//! Opening what the command line names.

use mapdirect_sys::{Errno, proc, reopen};
use rustix::fs::{FileType, Mode, OFlags, fstat};
use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

/// Why something was not opened.
#[derive(Debug)]
pub(crate) enum Unopened {
    /// As open(2).
    Errno(Errno),
    /// There is something that has no blocks.
    NoFile(FileType),
    /// It is there, and there is no way to open it without its name.
    NoProc,
}

impl fmt::Display for Unopened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self {
            Self::Errno(errno) => return errno.fmt(f),
            Self::NoProc => return f.write_str("/proc is not mounted"),
            Self::NoFile(FileType::Directory) => "a directory",
            Self::NoFile(FileType::CharacterDevice | FileType::BlockDevice) => "a device",
            Self::NoFile(FileType::Fifo) => "a FIFO",
            Self::NoFile(FileType::Socket) => "a socket",
            Self::NoFile(_) => return f.write_str("it is not a regular file"),
        };
        write!(f, "it is {kind}, not a regular file")
    }
}

impl std::error::Error for Unopened {}

impl From<Errno> for Unopened {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

/// Finds a file, which is not opened by that: nobody notices, and no lease breaks.
///
/// # Errors
///
/// As open(2).
pub(crate) fn find(path: &Path) -> Result<File, Errno> {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map(File::from)
}

/// Opens a regular file, and nothing else: opening a device may do something, and
/// that of a FIFO waits for its other end. A lease on the file does make us wait,
/// until its holder has given it up or the kernel has taken it
/// (`/proc/sys/fs/lease-break-time`): NFS clients have some.
///
/// # Errors
///
/// As open(2), or that it is no regular file.
pub(crate) fn open(path: &Path, access: OFlags) -> Result<File, Unopened> {
    open_found(find(path)?.as_fd(), access)
}

/// The same of what was found: this very file, whatever its name leads to by now.
pub(crate) fn open_found(there: BorrowedFd<'_>, access: OFlags) -> Result<File, Unopened> {
    let kind = FileType::from_raw_mode(fstat(there)?.st_mode);
    if kind != FileType::RegularFile {
        return Err(Unopened::NoFile(kind));
    }
    match reopen::reopen(there, access) {
        Ok(file) => Ok(File::from(file)),
        Err(Errno::NOENT) if proc::own_path_of(there).is_err() => Err(Unopened::NoProc),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn regular_files_are_opened_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::write(at("file"), "it").unwrap();
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        for name in ["file", "link"] {
            let mut read = String::new();
            let mut file = open(&at(name), OFlags::RDWR).unwrap();
            file.read_to_string(&mut read).unwrap();
            assert_eq!(read, "it");
            let flags = rustix::fs::fcntl_getfl(&file).unwrap();
            assert!(!flags.intersects(OFlags::PATH | OFlags::NONBLOCK));
        }
        let fifo = at("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::from(0o600), 0).unwrap();
        let socket = at("socket");
        let _listens = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for (path, words) in [
            (directory.path(), "it is a directory, not a regular file"),
            (Path::new("/dev/null"), "it is a device, not a regular file"),
            // That nobody could open, without a terminal.
            (Path::new("/dev/tty"), "it is a device, not a regular file"),
            // Nobody is at its other end.
            (&fifo, "it is a FIFO, not a regular file"),
            (&socket, "it is a socket, not a regular file"),
            (&at("none"), "No such file or directory (os error 2)"),
        ] {
            for access in [OFlags::RDONLY, OFlags::RDWR] {
                let refused = open(path, access).unwrap_err();
                assert_eq!(refused.to_string(), words, "{path:?}");
            }
        }
    }
}
