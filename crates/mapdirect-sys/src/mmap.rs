//! mmap(2): raw mappings of files.
//!
//! The system calls are made by their numbers: a program may have functions of
//! their names of its own, and libmapdirect-mmap.so is one that calls this.

use crate::seam::{self, Call};
use crate::{Result, checked, last_errno};
use rustix::mm::Advice;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `MAP_SHARED`.
pub const MAP_SHARED: i32 = libc::MAP_SHARED;
/// `MAP_PRIVATE`.
pub const MAP_PRIVATE: i32 = libc::MAP_PRIVATE;
/// `MAP_SHARED_VALIDATE`: like `MAP_SHARED`, but unknown flags are refused.
pub const MAP_SHARED_VALIDATE: i32 = libc::MAP_SHARED_VALIDATE;
/// `MAP_TYPE`: the bits that hold one of the three above.
pub const MAP_TYPE: i32 = 0x0f;
/// `MAP_FIXED`.
pub const MAP_FIXED: i32 = libc::MAP_FIXED;
/// `MAP_FIXED_NOREPLACE`.
pub const MAP_FIXED_NOREPLACE: i32 = libc::MAP_FIXED_NOREPLACE;
/// `MAP_ANONYMOUS`.
pub const MAP_ANONYMOUS: i32 = libc::MAP_ANONYMOUS;
/// `MAP_HUGETLB`.
pub const MAP_HUGETLB: i32 = libc::MAP_HUGETLB;
/// `MAP_POPULATE`.
pub const MAP_POPULATE: i32 = libc::MAP_POPULATE;
/// `MAP_NORESERVE`.
pub const MAP_NORESERVE: i32 = libc::MAP_NORESERVE;
/// `MAP_SYNC`.
pub const MAP_SYNC: i32 = 0x80000;

/// The flags that `MAP_SHARED_VALIDATE` lets through, besides the type:
/// `LEGACY_MAP_MASK` of include/linux/mman.h (6.18), `MAP_SYNC`, and
/// `MAP_FIXED_NOREPLACE`, which is missing in the kernel's own mask.
pub const MAP_VALIDATED: i32 = MAP_FIXED
    | MAP_FIXED_NOREPLACE
    | MAP_ANONYMOUS
    | MAP_HUGETLB
    | MAP_POPULATE
    | MAP_SYNC
    | libc::MAP_DENYWRITE
    | libc::MAP_EXECUTABLE
    | libc::MAP_GROWSDOWN
    | libc::MAP_LOCKED
    | libc::MAP_NORESERVE
    | libc::MAP_NONBLOCK
    | libc::MAP_STACK
    | 0x0400_0000 // MAP_UNINITIALIZED
    | MAP_32BIT
    | (0x1f << 26); // MAP_HUGE_2MB | MAP_HUGE_1GB

/// `MAP_32BIT` and `MAP_ABOVE4G`: they choose a place in memory, on x86-64.
#[cfg(target_arch = "x86_64")]
pub const MAP_32BIT: i32 = libc::MAP_32BIT | 0x80;
/// `MAP_32BIT` exists only on x86-64.
#[cfg(not(target_arch = "x86_64"))]
pub const MAP_32BIT: i32 = 0;

/// `PROT_NONE`.
pub const PROT_NONE: i32 = libc::PROT_NONE;
/// `PROT_READ`.
pub const PROT_READ: i32 = libc::PROT_READ;
/// `PROT_WRITE`.
pub const PROT_WRITE: i32 = libc::PROT_WRITE;

/// `mmap(2)`.
///
/// # Errors
///
/// As in the manual page.
///
/// # Safety
///
/// With `MAP_FIXED` the earlier mapping at `address` is gone, so nothing may
/// refer to it any more. Without it the call is safe, but later use of the
/// address may not be.
pub unsafe fn map(
    address: usize,
    length: usize,
    prot: i32,
    flags: i32,
    file: BorrowedFd<'_>,
    offset: u64,
) -> Result<usize> {
    seam::check(Call::Mmap)?;
    let offset = i64::try_from(offset).map_err(|_| crate::Errno::OVERFLOW)?;
    // SAFETY: the caller answers for MAP_FIXED; otherwise mmap only adds a
    // mapping where there is none.
    unsafe { call(address, length, prot, flags, file.as_raw_fd(), offset) }
}

/// `mmap(2)` of memory without a file.
///
/// # Errors
///
/// As in the manual page.
///
/// # Safety
///
/// As [`map`].
pub unsafe fn map_anonymous(address: usize, length: usize, prot: i32, flags: i32) -> Result<usize> {
    seam::check(Call::Mmap)?;
    let flags = flags | MAP_ANONYMOUS;
    // SAFETY: as in `map`.
    unsafe { call(address, length, prot, flags, -1, 0) }
}

/// `mmap(2)` with any arguments.
///
/// # Errors
///
/// As in the manual page.
///
/// # Safety
///
/// As [`map`].
pub unsafe fn call(
    address: usize,
    length: usize,
    prot: i32,
    flags: i32,
    fd: i32,
    offset: i64,
) -> Result<usize> {
    // SAFETY: the caller's promise.
    let mapped = unsafe { libc::syscall(libc::SYS_mmap, address, length, prot, flags, fd, offset) };
    if mapped == -1 {
        return Err(last_errno());
    }
    Ok(mapped.cast_unsigned().try_into().unwrap_or(usize::MAX))
}

/// Makes memory that was mapped `PROT_NONE` readable and writable, and unlocks
/// it. With `mlockall(2)` every mapping is locked, but is not filled before it
/// can be read.
///
/// # Errors
///
/// `ENOMEM`.
///
/// # Safety
///
/// The memory must be the caller's own.
pub unsafe fn open_up(address: usize, length: usize) -> Result<()> {
    let address = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: the caller's promise.
    checked(unsafe { libc::munlock(address, length) })?;
    // SAFETY: as above.
    checked(unsafe { libc::mprotect(address, length, PROT_READ | PROT_WRITE) }).map(drop)
}

/// `munmap(2)`.
///
/// # Errors
///
/// `EINVAL` for an address off a page boundary or a length of 0.
///
/// # Safety
///
/// Nothing may refer to `length` bytes at `address` any more.
pub unsafe fn unmap(address: usize, length: usize) -> Result<()> {
    // SAFETY: the caller's promise.
    let done = unsafe { libc::syscall(libc::SYS_munmap, address, length) };
    if done == -1 {
        return Err(last_errno());
    }
    Ok(())
}

/// `mremap(2)`.
///
/// # Errors
///
/// As in the manual page.
///
/// # Safety
///
/// Nothing may refer to what is unmapped or moved.
pub unsafe fn remap(
    address: usize,
    length: usize,
    new_length: usize,
    flags: i32,
    new_address: usize,
) -> Result<usize> {
    // SAFETY: the caller's promise.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_mremap,
            address,
            length,
            new_length,
            flags,
            new_address,
        )
    };
    if moved == -1 {
        return Err(last_errno());
    }
    Ok(moved.cast_unsigned().try_into().unwrap_or(usize::MAX))
}

/// `msync(2)` with `MS_SYNC`: writes back the pages that meet the range, and
/// makes the device flush.
///
/// # Errors
///
/// `EIO`, `ENOSPC`, and `ENOMEM` when part of the range is not mapped.
pub fn sync(address: usize, length: usize) -> Result<()> {
    let address = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: msync reads nothing of ours and changes no memory; an address
    // that is not mapped is answered with ENOMEM.
    checked(unsafe { libc::msync(address, length, libc::MS_SYNC) }).map(drop)
}

/// The number of bytes in a page.
#[must_use]
pub fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

/// A mapping of a file, made to look page by page at what the page cache has of
/// the file. Nothing of the file can be read or written through it.
#[derive(Debug)]
pub struct View {
    address: usize,
    /// The bytes of the file, as whole pages.
    range: Range<u64>,
}

impl View {
    /// Maps `range`, which must be whole pages, of a file open for reading. The
    /// mapping causes no readahead.
    ///
    /// # Errors
    ///
    /// As `mmap(2)`; `EINVAL` unless the range is whole pages.
    pub fn new(file: BorrowedFd<'_>, range: Range<u64>) -> Result<Self> {
        let page = page_size();
        if range.is_empty() || !range.start.is_multiple_of(page) || !range.end.is_multiple_of(page)
        {
            return Err(crate::Errno::INVAL);
        }
        let length = usize::try_from(range.end - range.start).map_err(|_| crate::Errno::NOMEM)?;
        // Pages that are only read are those of the page cache in a private mapping,
        // too, and the kernel does not count it among the mappings by which the file
        // can be stored to, as it counts a shared one of a file open for writing.
        // SAFETY: no address is asked for.
        let address = unsafe { map(0, length, PROT_READ, MAP_PRIVATE, file, range.start) }?;
        let view = Self { address, range };
        view.advise(&view.range, Advice::Random)?;
        Ok(view)
    }

    /// Brings the page at `offset` of the file into the page cache, as a single
    /// page if it is not there yet, and maps it.
    ///
    /// # Errors
    ///
    /// `EFAULT` beyond the end of the file and when the page cannot be read,
    /// `ENOMEM`.
    pub fn populate(&self, offset: u64) -> Result<()> {
        self.advise(&(offset..offset + page_size()), Advice::LinuxPopulateRead)
    }

    /// Unmaps all pages, but keeps the address range.
    ///
    /// # Errors
    ///
    /// None in practice.
    pub fn forget(&self) -> Result<()> {
        self.advise(&self.range, Advice::LinuxDontNeed)
    }

    /// The address of the page at `offset` of the file.
    ///
    /// # Errors
    ///
    /// `EINVAL` unless `offset` is a page of the range.
    pub(crate) fn address_of(&self, offset: u64) -> Result<usize> {
        if !self.range.contains(&offset) || !offset.is_multiple_of(page_size()) {
            return Err(crate::Errno::INVAL);
        }
        usize::try_from(offset - self.range.start)
            .map(|past| self.address + past)
            .map_err(|_| crate::Errno::INVAL)
    }

    fn advise(&self, range: &Range<u64>, advice: Advice) -> Result<()> {
        let start = std::ptr::with_exposed_provenance_mut(self.address_of(range.start)?);
        let length = usize::try_from(range.end - range.start).map_err(|_| crate::Errno::INVAL)?;
        // SAFETY: nothing refers to the memory; what is advised changes no
        // byte of a file.
        unsafe { rustix::mm::madvise(start, length, advice) }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        let length = usize::try_from(self.range.end - self.range.start).unwrap_or(0);
        // SAFETY: nothing refers to the memory.
        let _ = unsafe { unmap(self.address, length) };
    }
}
