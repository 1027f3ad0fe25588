//! Memory of this process: what is in it, and what becomes of it.

use super::*;

/// Pages of the first `length` bytes of a file that are in the page cache.
///
/// Of a page that a process has mapped, mincore(2) says that it is there,
/// whatever it is. Of one that it has not, it looks into the page cache and
/// nowhere else: so it is asked through a mapping that nobody has touched.
/// (cachestat(2) takes what the kernel keeps of a DAX file for pages that were
/// evicted, and has been seen to crash Linux 7.3.)
pub fn cached_pages(file: BorrowedFd<'_>, length: usize) -> Result<usize> {
    let map = PlainMap::new(file, libc::PROT_READ, libc::MAP_SHARED, 0, length)?;
    let page = rustix::param::page_size();
    let mut there = vec![0u8; length.div_ceil(page)];
    // SAFETY: a byte for each page.
    let ret = unsafe { libc::mincore(map.pointer(), length, there.as_mut_ptr()) };
    checked(ret.into())?;
    Ok(there.iter().filter(|byte| *byte & 1 != 0).count())
}

/// Stores a byte to a mapping as a program does that asks nobody: frozen, it
/// raises SIGBUS.
pub fn store_into(map: &mapdirect::DirectMap, at: usize, value: u8) {
    assert!(at < map.len());
    let byte = std::ptr::with_exposed_provenance_mut::<u8>(map.as_ptr() as usize + at);
    // SAFETY: inside the mapping; volatile, since others may look.
    unsafe { byte.write_volatile(value) };
}

/// Page faults of the calling thread so far that read nothing from a disk.
pub fn faults() -> Result<u64> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: writes the value.
    let ret = unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) };
    checked(ret.into())?;
    // SAFETY: written, and zeros are a value, too.
    let usage = unsafe { usage.assume_init() };
    Ok(usage.ru_minflt.cast_unsigned())
}

/// The number of the physical page that is mapped at an address of this
/// process, if one is.
pub fn frame(address: usize) -> Result<Option<u64>> {
    // Documentation/admin-guide/mm/pagemap.rst
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let pagemap = rustix::fs::open("/proc/self/pagemap", OFlags::RDONLY, Mode::empty())?;
    let mut entry = [0; 8];
    let at = address / rustix::param::page_size();
    rustix::io::pread(&pagemap, &mut entry, at as u64 * 8)?;
    let entry = u64::from_ne_bytes(entry);
    Ok((entry & PRESENT != 0).then_some(entry & FRAME))
}

/// `madvise(2)` of an address range.
pub fn madvise(address: usize, length: usize, advice: i32) -> Result<()> {
    let pointer = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: the advice used here (MADV_REMOVE and gentler) frees file
    // blocks, not the mapping.
    let ret = unsafe { libc::madvise(pointer, length, advice) };
    checked(ret.into()).map(drop)
}

/// `munmap(2)` of part of somebody's mapping.
///
/// # Safety
///
/// Nothing may use that part any more.
pub unsafe fn munmap(address: usize, length: usize) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { mapdirect_sys::mmap::unmap(address, length) }
}

/// Private memory of so many bytes, at an address that the kernel chooses.
pub fn anonymous(length: usize) -> Result<usize> {
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    // SAFETY: no address is asked for.
    unsafe {
        mapdirect_sys::mmap::map_anonymous(0, length, libc::PROT_READ | libc::PROT_WRITE, flags)
    }
}

/// `mprotect(2)` of an address range.
///
/// # Safety
///
/// Nothing may rely on what the range could do before.
pub unsafe fn mprotect(address: usize, length: usize, prot: i32) -> Result<()> {
    let pointer = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: the caller's promise.
    let ret = unsafe { libc::mprotect(pointer, length, prot) };
    checked(ret.into()).map(drop)
}

/// `mremap(2)` to `place`.
///
/// # Safety
///
/// Nothing may use the range at its old place any more, nor what is at the new
/// one.
pub unsafe fn mremap(address: usize, length: usize, new_length: usize, place: usize) -> Result<()> {
    let old = std::ptr::with_exposed_provenance_mut(address);
    let new: *mut libc::c_void = std::ptr::with_exposed_provenance_mut(place);
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: the caller's promise.
    let moved = unsafe { libc::mremap(old, length, new_length, flags, new) };
    checked(if moved == libc::MAP_FAILED { -1 } else { 0 }).map(drop)
}

/// `read(2)` to an address, which need not be there.
///
/// # Safety
///
/// The bytes at the address, if any, may change.
pub unsafe fn read_into(file: BorrowedFd<'_>, address: usize, length: usize) -> Result<usize> {
    let pointer = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: the kernel checks the address; the caller's promise.
    let read = unsafe { libc::read(file.as_raw_fd(), pointer, length) };
    checked(read as libc::c_long).map(|read| usize::try_from(read).unwrap_or(0))
}

/// `write(2)` from an address, which need not be there.
pub fn write_from(file: BorrowedFd<'_>, address: usize, length: usize) -> Result<usize> {
    let pointer = std::ptr::with_exposed_provenance(address);
    // SAFETY: the kernel checks the address, and reads only.
    let written = unsafe { libc::write(file.as_raw_fd(), pointer, length) };
    checked(written as libc::c_long).map(|written| usize::try_from(written).unwrap_or(0))
}

/// Closes every descriptor from `first` on, as daemons do.
///
/// # Safety
///
/// Nothing may use any of them afterwards.
pub unsafe fn close_from(first: u32) -> Result<()> {
    // SAFETY: the caller's promise.
    let ret = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    checked(ret).map(drop)
}

/// Runs `child` in a forked process and waits for it.
///
/// Meant for tests about fork: between fork and exit the child may only do
/// what a single-threaded program may.
pub fn fork(child: impl FnOnce() -> i32) -> Result<i32> {
    // SAFETY: the child runs the closure and ends without returning, so no
    // state of the caller is torn down twice.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let status = child();
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(status) };
    }
    checked(pid.into()).map(|_| pid)
}

/// Has `prepare` called before every fork of this process, and `after` after
/// it, in the parent and in the child.
pub fn at_fork(prepare: extern "C" fn(), after: extern "C" fn()) {
    // SAFETY: safe functions, which live as long as the program.
    let ret = unsafe { libc::pthread_atfork(Some(prepare), Some(after), Some(after)) };
    assert_eq!(ret, 0);
}

/// Allows KSM to merge all memory of this process, as systemd's `MemoryKSM=`
/// does.
pub fn merge_own_memory() -> Result<()> {
    // SAFETY: takes numbers only.
    let ret = unsafe { libc::prctl(libc::PR_SET_MEMORY_MERGE, 1, 0, 0, 0) };
    checked(ret.into()).map(drop)
}

/// Locks all memory of this process, now and later.
pub fn lock_own_memory() -> Result<()> {
    // SAFETY: takes flags only.
    let ret = unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) };
    checked(ret.into()).map(drop)
}
