//! madvise(2): making pages of a mapping writable before anybody writes to
//! them.

use crate::mmap::{self, MAP_SHARED, PROT_READ, PROT_WRITE};
use crate::seam::{self, Call};
use crate::{Errno, Result, checked};
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// `MADV_POPULATE_WRITE` (include/uapi/asm-generic/mman-common.h), since
/// Linux 5.14.
const MADV_POPULATE_WRITE: libc::c_int = 23;

/// A part of a file, mapped shared and writable but never accessed. Nobody
/// knows the address, so no store can raise SIGBUS.
#[derive(Debug)]
pub struct Window {
    address: usize,
    bytes: Range<u64>,
}

impl Window {
    /// Maps `bytes` of a file, which must begin on a page boundary.
    ///
    /// # Errors
    ///
    /// As mmap(2): `EACCES` unless the file is open for reading and writing,
    /// `ETXTBSY` from a gate.
    pub fn new(file: BorrowedFd<'_>, bytes: Range<u64>) -> Result<Self> {
        let length = usize::try_from(bytes.end - bytes.start).map_err(|_| Errno::NOMEM)?;
        let prot = PROT_READ | PROT_WRITE;
        // SAFETY: without MAP_FIXED the call only adds a mapping.
        let address = unsafe { mmap::map(0, length, prot, MAP_SHARED, file, bytes.start) }?;
        Ok(Self { address, bytes })
    }

    /// Makes the pages of `bytes` dirty without changing a byte: the filesystem
    /// allocates the blocks that they lack, and copies the blocks that they
    /// share, as for a store. `bytes` are offsets in the file; the part outside
    /// of the window is ignored.
    ///
    /// # Errors
    ///
    /// `EFAULT` when a store would raise SIGBUS (beyond the end of the file, no
    /// space, a failing device), `EINVAL` before Linux 5.14, `ENOMEM`,
    /// `EHWPOISON`. Pages before the one that failed are then dirty.
    pub fn populate_write(&self, bytes: &Range<u64>) -> Result<()> {
        seam::check(Call::PopulateWrite)?;
        let page = mmap::page_size();
        let start = bytes.start.max(self.bytes.start);
        let end = bytes.end.min(self.bytes.end);
        let start = start - start % page;
        if start >= end {
            return Ok(());
        }
        let offset = usize::try_from(start - self.bytes.start).map_err(|_| Errno::INVAL)?;
        let length = usize::try_from(end - start).map_err(|_| Errno::INVAL)?;
        loop {
            let address = std::ptr::with_exposed_provenance_mut(self.address + offset);
            // SAFETY: the range lies in the mapping of `self`, by the maximum
            // and minimum above. Populating neither changes memory nor
            // unmaps it, and nobody has a reference to it.
            let done = checked(unsafe { libc::madvise(address, length, MADV_POPULATE_WRITE) });
            match done {
                Err(Errno::INTR | Errno::AGAIN) => {}
                done => return done.map(drop),
            }
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let length = usize::try_from(self.bytes.end - self.bytes.start).unwrap_or(0);
        // SAFETY: the mapping of `self`, whose address nobody else knows.
        let _ = unsafe { mmap::unmap(self.address, length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;

    #[test]
    fn pages_become_writable_and_keep_their_bytes() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 10_000]).unwrap();
        let window = Window::new(file.as_fd(), 0..65536).unwrap();
        window.populate_write(&(5000..10_000)).unwrap();
        drop(window);
        let mut bytes = vec![0; 10_000];
        rustix::io::pread(&file, &mut bytes[..], 0).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 7));
    }

    #[test]
    fn beyond_the_end_is_an_error_and_no_signal() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let window = Window::new(file.as_fd(), 0..1 << 20).unwrap();
        assert_eq!(window.populate_write(&(0..4096)), Ok(()));
        let beyond = mmap::page_size().max(65536);
        let failed = window.populate_write(&(beyond..beyond + 4096));
        assert_eq!(failed, Err(Errno::FAULT));
        // Outside of the window there is nothing to do.
        assert_eq!(window.populate_write(&(1 << 20..1 << 21)), Ok(()));
    }

    #[test]
    fn a_descriptor_for_reading_is_not_enough() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let reader = std::fs::File::open(file.path()).unwrap();
        let refused = Window::new(reader.as_fd(), 0..4096).map(drop);
        assert_eq!(refused, Err(Errno::ACCESS));
    }
}
