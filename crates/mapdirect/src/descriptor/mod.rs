//! The descriptor that a caller hands in.

pub(crate) mod locks;

use crate::error::{Error, Kind, Result};
use mapdirect_sys::Errno;
use std::os::fd::BorrowedFd;

/// The size of a file in bytes.
pub(crate) fn size_of_file(file: BorrowedFd<'_>) -> Result<u64> {
    let stat = rustix::fs::fstat(file).map_err(|errno| Error::system("fstat", errno))?;
    u64::try_from(stat.st_size).map_err(|_| Error::system("fstat", Errno::OVERFLOW))
}

/// Refuses a descriptor that is not open for reading and writing.
pub(crate) fn require_read_write(file: BorrowedFd<'_>) -> Result<()> {
    let access = rustix::fs::fcntl_getfl(file).map_err(|errno| match errno {
        Errno::BADF => bad_descriptor(),
        other => Error::system("F_GETFL", other),
    })?;
    if access.contains(rustix::fs::OFlags::PATH) {
        return Err(bad_descriptor());
    }
    if access & rustix::fs::OFlags::ACCMODE != rustix::fs::OFlags::RDWR {
        return Err(Error::new(
            Kind::NotReadWrite,
            Errno::ACCESS,
            "the descriptor is not open for reading and writing",
            "open the file for both",
        ));
    }
    Ok(())
}

fn bad_descriptor() -> Error {
    Error::new(
        Kind::Arguments,
        Errno::BADF,
        "the descriptor is not open, or only a path (O_PATH)",
        "open the file for reading and writing",
    )
}
