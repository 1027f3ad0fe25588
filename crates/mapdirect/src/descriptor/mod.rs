//! The descriptor that a caller hands in.

pub(crate) mod locks;

use crate::error::{Error, Kind, Result};
use mapdirect_sys::Errno;
use rustix::fs::OFlags;
use std::os::fd::BorrowedFd;

/// The size of a file in bytes.
pub(crate) fn size_of_file(file: BorrowedFd<'_>) -> Result<u64> {
    let stat = rustix::fs::fstat(file).map_err(|errno| Error::system("fstat", errno))?;
    u64::try_from(stat.st_size).map_err(|_| Error::system("fstat", Errno::OVERFLOW))
}

/// Refuses a descriptor that is not open for reading and writing.
pub(crate) fn require_read_write(file: BorrowedFd<'_>) -> Result<()> {
    if access_mode(file)? == OFlags::RDWR {
        return Ok(());
    }
    Err(Error::new(
        Kind::NotReadWrite,
        Errno::ACCESS,
        "the descriptor is not open for reading and writing",
        "open the file for both",
    ))
}

/// Refuses a descriptor that is not open for reading; says whether it is open
/// for writing as well.
pub(crate) fn require_readable(file: BorrowedFd<'_>) -> Result<bool> {
    match access_mode(file)? {
        OFlags::RDONLY => Ok(false),
        OFlags::RDWR => Ok(true),
        _ => Err(Error::new(
            Kind::NotReadWrite,
            Errno::ACCESS,
            "the descriptor is not open for reading",
            "open the file for reading",
        )),
    }
}

fn access_mode(file: BorrowedFd<'_>) -> Result<OFlags> {
    let flags = rustix::fs::fcntl_getfl(file).map_err(|errno| match errno {
        Errno::BADF => bad_descriptor(),
        other => Error::system("F_GETFL", other),
    })?;
    if flags.contains(OFlags::PATH) {
        return Err(bad_descriptor());
    }
    Ok(flags & OFlags::ACCMODE)
}

fn bad_descriptor() -> Error {
    Error::new(
        Kind::Arguments,
        Errno::BADF,
        "the descriptor is not open, or only a path (O_PATH)",
        "open the file for what is asked",
    )
}
