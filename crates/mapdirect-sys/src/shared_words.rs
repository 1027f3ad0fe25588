//! Words of memory shared with the kernel: a map of BPF programs that can be
//! mapped into memory (`BPF_F_MMAPABLE`, bpf(2)).

use crate::mmap::{MAP_SHARED, PROT_READ, PROT_WRITE, map};
use crate::{Errno, Result, checked};
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// A mapping of some words. Dropping this value unmaps them.
#[derive(Debug)]
pub struct SharedWords {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the words are atomic, so any thread may use them, and the mapping
// belongs to the process.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Maps this many words from the beginning of a map.
    ///
    /// # Errors
    ///
    /// As mmap(2).
    pub fn new(file: BorrowedFd<'_>, words: usize) -> Result<Self> {
        let length = words * size_of::<AtomicU64>();
        // SAFETY: nothing is mapped at a fixed address.
        let address = unsafe { map(0, length, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) }?;
        let start = std::ptr::with_exposed_provenance_mut::<AtomicU64>(address);
        let start = NonNull::new(start).ok_or(Errno::NOMEM)?;
        Ok(Self { start, words })
    }

    /// The words. Others may change them at any time.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is this long, aligned to a page, and stays until
        // this is dropped; every bit pattern is a number; and what others
        // store they may, since the type is atomic.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        let length = self.words * size_of::<AtomicU64>();
        // SAFETY: `words` borrows from this, so nothing refers to the mapping.
        let _ = checked(unsafe { libc::munmap(self.start.as_ptr().cast(), length) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::sync::atomic::Ordering::SeqCst;

    #[test]
    fn words_are_those_of_the_file() {
        let file = rustix::fs::memfd_create("words", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 4096).unwrap();
        let words = SharedWords::new(file.as_fd(), 512).unwrap();
        words.words()[3].store(0x0102, SeqCst);
        let mut bytes = [0; 8];
        rustix::io::pread(&file, &mut bytes, 24).unwrap();
        assert_eq!(u64::from_ne_bytes(bytes), 0x0102);
        rustix::io::pwrite(&file, &7u64.to_ne_bytes(), 4088).unwrap();
        assert_eq!(words.words()[511].load(SeqCst), 7);
    }
}
