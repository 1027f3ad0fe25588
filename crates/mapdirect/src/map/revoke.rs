//! Takes a mapping away, so that whoever uses it cannot fail to notice.

use mapdirect_sys::Errno;
use mapdirect_sys::mmap::{
    self, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ, PROT_WRITE,
};
use rustix::fs::MemfdFlags;
use rustix::mm::{MprotectFlags, MremapFlags};
use std::os::fd::AsFd;

/// The memory of a mapping.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    pub(crate) base: usize,
    pub(crate) length: usize,
    /// A page of it that is the file itself.
    pub(crate) stable: Option<usize>,
}

/// A page of the file that keeps the pin of a mapping that was revoked, until
/// that is dropped: the rest of the blocks is protected for as long as before.
#[derive(Debug)]
pub(crate) struct Keeper(usize);

impl Drop for Keeper {
    fn drop(&mut self) {
        // SAFETY: made below, and handed to nobody.
        let _ = unsafe { mmap::unmap(self.0, rustix::param::page_size()) };
    }
}

/// Has every access to the memory raise SIGBUS from now on: an empty memory
/// file takes its place, in one step, so that nothing else can come to lie
/// there. If no file can be had it is SIGSEGV.
///
/// # Safety
///
/// The memory must be a mapping of the library's own, which nobody unmaps
/// meanwhile. Whoever refers to it must be content with a signal.
pub(crate) unsafe fn revoke(memory: &Memory) -> (Option<Keeper>, Result<(), Errno>) {
    let keeper = memory.stable.and_then(|stable| {
        // SAFETY: the caller's promise.
        unsafe { keep(stable) }.ok()
    });
    let Memory { base, length, .. } = *memory;
    if let Ok(empty) = rustix::fs::memfd_create(c"mapdirect-revoked", MemfdFlags::CLOEXEC) {
        let flags = MAP_SHARED | MAP_FIXED;
        let prot = PROT_READ | PROT_WRITE;
        // SAFETY: the caller's promise.
        let mapped = unsafe { mmap::map(base, length, prot, flags, empty.as_fd(), 0) };
        if mapped.is_ok() {
            return (keeper, Ok(()));
        }
    }
    let flags = MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED;
    // SAFETY: as above.
    if unsafe { mmap::map_anonymous(base, length, PROT_NONE, flags) }.is_ok() {
        return (keeper, Ok(()));
    }
    // Needs no memory but for splitting mappings at the ends.
    let start = std::ptr::with_exposed_provenance_mut(base);
    // SAFETY: as above.
    let protected = unsafe { rustix::mm::mprotect(start, length, MprotectFlags::empty()) };
    (keeper, protected)
}

/// Maps a page of a shared mapping once more, without access. An old length of
/// 0 asks mremap(2) for that.
///
/// # Safety
///
/// A shared mapping of the caller's own must be at `stable`.
unsafe fn keep(stable: usize) -> Result<Keeper, Errno> {
    let page = rustix::param::page_size();
    let from = std::ptr::with_exposed_provenance_mut(stable);
    // SAFETY: what is there stays; the kernel chooses a new place.
    let kept = unsafe { rustix::mm::mremap(from, 0, page, MremapFlags::MAYMOVE) }?;
    let keeper = Keeper(kept.expose_provenance());
    // SAFETY: the new mapping is ours alone. If it fails, it can be accessed,
    // and nobody knows where it is.
    let _ = unsafe { rustix::mm::mprotect(kept, page, MprotectFlags::empty()) };
    Ok(keeper)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mapdirect_testkit::fault::{Access, load, store};
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

    fn mapped(pages: usize) -> (std::fs::File, Memory) {
        let page = rustix::param::page_size();
        let file = tempfile::tempfile().unwrap();
        file.set_len((pages * page) as u64).unwrap();
        let (length, prot) = (pages * page, PROT_READ | PROT_WRITE);
        // SAFETY: no MAP_FIXED.
        let base = unsafe { mmap::map(0, length, prot, MAP_SHARED, file.as_fd(), 0) }.unwrap();
        let stable = Some(base + page);
        let memory = Memory {
            base,
            length,
            stable,
        };
        (file, memory)
    }

    /// How many mappings of this process are of the file, and where.
    fn mappings(file: &std::fs::File) -> Vec<usize> {
        let inode = rustix::fs::fstat(file).unwrap().st_ino;
        let own = mapdirect_sys::proc::own_mappings().unwrap();
        own.iter()
            .filter(|(entry, _)| entry.inode == inode)
            .map(|(entry, _)| usize::try_from(entry.start).unwrap())
            .collect()
    }

    #[test]
    fn every_access_raises_sigbus_and_the_file_stays_mapped() {
        let page = rustix::param::page_size();
        let (file, memory) = mapped(4);
        assert_eq!(load(memory.base), Access::Went(0));
        // SAFETY: memory of the test's own.
        let (keeper, done) = unsafe { revoke(&memory) };
        done.unwrap();
        for at in 0..4 {
            let address = memory.base + at * page;
            assert_eq!(load(address), Access::BUS_ADRERR);
            // SAFETY: as above.
            let stored = unsafe { store(address, 1) };
            assert_eq!(stored, Access::BUS_ADRERR);
        }
        let keeper = keeper.unwrap();
        assert_eq!(mappings(&file), [keeper.0]);
        assert!(matches!(load(keeper.0), Access::Segv(_)));
        drop(keeper);
        assert_eq!(mappings(&file), []);
        // SAFETY: nothing refers to it.
        unsafe { mmap::unmap(memory.base, memory.length) }.unwrap();
    }

    /// Whoever looks all the while sees the file, and then SIGBUS: at no
    /// moment is there nothing.
    #[test]
    fn there_is_no_moment_without_a_mapping() {
        let (_file, memory) = mapped(64);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let looking = scope.spawn(|| {
                let mut seen = Vec::new();
                while !over.load(SeqCst) {
                    let access = load(memory.base + 5 * 4096);
                    if seen.last() != Some(&access) {
                        seen.push(access);
                    }
                }
                seen
            });
            for _ in 0..200 {
                // SAFETY: memory of the test's own; the other thread catches
                // the signal.
                unsafe { revoke(&memory) }.1.unwrap();
                let file = tempfile::tempfile().unwrap();
                file.set_len(memory.length as u64).unwrap();
                let flags = MAP_SHARED | MAP_FIXED;
                let prot = PROT_READ | PROT_WRITE;
                // SAFETY: as above.
                unsafe { mmap::map(memory.base, memory.length, prot, flags, file.as_fd(), 0) }
                    .unwrap();
            }
            over.store(true, SeqCst);
            let seen = looking.join().unwrap();
            let expected = [Access::Went(0), Access::BUS_ADRERR];
            assert!(
                seen.iter().all(|access| expected.contains(access)),
                "{seen:?}"
            );
        });
        // SAFETY: nothing refers to it.
        unsafe { mmap::unmap(memory.base, memory.length) }.unwrap();
    }

    /// Where no memory file can be mapped it is another signal, and where
    /// nothing can be mapped access alone is taken away.
    #[test]
    fn without_a_file_it_is_sigsegv() {
        use mapdirect_sys::seam::{self, Call};
        for failures in [1, 2] {
            let (_file, memory) = mapped(2);
            for _ in 0..failures {
                seam::fail_after(Call::Mmap, 0, Errno::NOMEM);
            }
            // SAFETY: memory of the test's own.
            let (_, done) = unsafe { revoke(&memory) };
            seam::clear();
            done.unwrap();
            assert!(matches!(load(memory.base), Access::Segv(_)));
            // SAFETY: nothing refers to it.
            unsafe { mmap::unmap(memory.base, memory.length) }.unwrap();
        }
    }
}
