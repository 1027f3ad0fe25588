//! The system call as it was proposed.

use crate::error::{Error, Kind, Result};
use crate::establish::{PATIENCE, Scope, Strength};
use crate::guard::Guard;
use crate::map::{DirectMap, How, MapOptions, cached_by_environment};
use mapdirect_proto::Flags;
use mapdirect_sys::mmap as sys;
use mapdirect_sys::{Errno, mmap};
use std::os::fd::BorrowedFd;

/// `MAP_DIRECT`: bit 25, free in the generic ABI through Linux 7.3.
///
/// Use it with `MAP_SHARED_VALIDATE`: a kernel that does not know it refuses
/// that with `EOPNOTSUPP`, and silently ignores the bit under `MAP_SHARED`.
pub const MAP_DIRECT: i32 = 0x0200_0000;

/// `mmap(2)` that knows [`MAP_DIRECT`], for programs written against the
/// system call. The pin lives until the last mapping is gone: `munmap(2)` of
/// all its parts, exec, exit, or death; there is no object to keep.
///
/// Without `MAP_DIRECT` among the flags this is `mmap(2)`. The guard is that
/// of the environment; `MAPDIRECT_CACHED=1` accepts the page cache. A program
/// that runs with more privilege than its caller ignores both.
///
/// # Errors
///
/// | errno | when |
/// | --- | --- |
/// | `EINVAL` | `MAP_ANONYMOUS`, `MAP_PRIVATE` or `MAP_HUGETLB` with `MAP_DIRECT`; offset off a page boundary; length 0 |
/// | `EACCES` | no `PROT_WRITE`; `fd` not open for reading and writing; no `CAP_LINUX_IMMUTABLE` in the initial user namespace |
/// | `EOPNOTSUPP` | filesystem or file cannot keep the promise; no DAX and the page cache not accepted; holes in the range and no `userfaultfd(2)`; no guard; an unknown flag under `MAP_SHARED_VALIDATE` |
/// | `ETXTBSY` | the block map cannot be brought to rest |
/// | `EBADF`, `ENODEV`, `ENOMEM`, `EOVERFLOW`, `EEXIST` | as `mmap(2)`; `ENOMEM` also for more pieces than `vm.max_map_count` allows |
///
/// SIGBUS at a store to a hole, an unwritten or a shared block of the range,
/// and at any access to a shared block or beyond the end of the file.
///
/// # Safety
///
/// With `MAP_FIXED` nothing may refer to what was mapped at `address`.
pub unsafe fn mmap(
    address: usize,
    length: usize,
    prot: i32,
    flags: i32,
    fd: BorrowedFd<'_>,
    offset: u64,
) -> Result<usize> {
    let asked = || String::from("map MAP_DIRECT");
    if flags & MAP_DIRECT == 0 {
        // SAFETY: the caller's promise.
        return unsafe { sys::map(address, length, prot, flags, fd, offset) }
            .map_err(|errno| Error::system("mmap", errno));
    }
    check_flags(flags).map_err(|error| error.asking(asked()))?;
    let how = How {
        prot,
        flags: flags & !(sys::MAP_TYPE | MAP_DIRECT),
        address,
        scope: Scope::Range,
        also: Flags::NONE,
        strength: Strength::All,
        cached: cached_by_environment(),
        patience: PATIENCE,
        guard: Guard::from_env(),
    };
    // SAFETY: the caller's promise.
    let placed = unsafe { how.place(fd, offset, length) };
    placed
        .map(|placed| placed.address)
        .map_err(|error| error.asking(asked()))
}

/// The same with an object that tells what becomes of the pin, unmaps the range
/// when it is dropped, and takes it away after a breach: for wrappers of this
/// library that keep a table of mappings. `options` has the rest; its range is
/// not looked at. `MAP_DIRECT` is understood, among the flags or not.
///
/// # Errors
///
/// As [`mmap()`].
///
/// # Safety
///
/// As [`mmap()`]; and nobody may unmap the range, or put something in its place,
/// but by way of the object.
pub unsafe fn map(
    options: &MapOptions,
    (address, length): (usize, usize),
    (prot, flags): (i32, i32),
    fd: BorrowedFd<'_>,
    offset: u64,
) -> Result<DirectMap> {
    let flags = check_flags(flags | MAP_DIRECT).map(|()| flags & !(sys::MAP_TYPE | MAP_DIRECT));
    let map = flags.and_then(|flags| {
        // SAFETY: the caller's promise.
        unsafe { options.map_as_asked((address, length), (prot, flags), fd, offset) }
    });
    map.map_err(|error| {
        let path = mapdirect_sys::proc::shown_path_of(fd);
        error.asking(format!(
            "map {length} bytes at {offset} of {path} MAP_DIRECT"
        ))
    })
}

/// Whether any mapping of this process was ever taken away after a breach. Then
/// a [`Flusher`](crate::Flusher) must not be used any more.
#[inline]
#[must_use]
pub fn any_revoked() -> bool {
    crate::holder::any_revoked()
}

fn check_flags(flags: i32) -> Result<()> {
    let invalid = |text: &str| {
        Err(Error::new(
            Kind::Arguments,
            Errno::INVAL,
            text,
            "use MAP_SHARED_VALIDATE | MAP_DIRECT on a file",
        ))
    };
    match flags & sys::MAP_TYPE {
        mmap::MAP_SHARED | mmap::MAP_SHARED_VALIDATE => {}
        mmap::MAP_PRIVATE => return invalid("MAP_PRIVATE and MAP_DIRECT exclude each other"),
        _ => return invalid("MAP_DIRECT needs MAP_SHARED or MAP_SHARED_VALIDATE"),
    }
    if flags & mmap::MAP_ANONYMOUS != 0 {
        return invalid("MAP_ANONYMOUS and MAP_DIRECT exclude each other");
    }
    if flags & mmap::MAP_HUGETLB != 0 {
        return invalid("MAP_HUGETLB and MAP_DIRECT exclude each other");
    }
    let unknown = flags & !(sys::MAP_TYPE | mmap::MAP_VALIDATED | MAP_DIRECT);
    if flags & sys::MAP_TYPE == mmap::MAP_SHARED_VALIDATE && unknown != 0 {
        return Err(Error::new(
            Kind::Arguments,
            Errno::OPNOTSUPP,
            format!("flags {unknown:#x} are not known"),
            "leave them out, or use MAP_SHARED, which ignores unknown flags",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn errno(prot: i32, flags: i32, length: usize, offset: u64) -> i32 {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        // SAFETY: no MAP_FIXED.
        let result = unsafe { mmap(0, length, prot, flags, file.as_fd(), offset) };
        result.unwrap_err().errno()
    }

    const BOTH: i32 = sys::PROT_READ | sys::PROT_WRITE;
    const SHARED: i32 = sys::MAP_SHARED | MAP_DIRECT;
    const VALIDATE: i32 = sys::MAP_SHARED_VALIDATE | MAP_DIRECT;

    #[test]
    fn arguments_are_checked_before_anybody_is_asked() {
        let inval = Errno::INVAL.raw_os_error();
        for flags in [
            sys::MAP_PRIVATE | MAP_DIRECT,
            MAP_DIRECT,
            SHARED | sys::MAP_ANONYMOUS,
            VALIDATE | sys::MAP_ANONYMOUS,
            SHARED | sys::MAP_HUGETLB,
        ] {
            assert_eq!(errno(BOTH, flags, 4096, 0), inval, "{flags:#x}");
        }
        assert_eq!(errno(BOTH, SHARED, 0, 0), inval);
        assert_eq!(errno(BOTH, SHARED, 4096, 100), inval);
        let access = Errno::ACCESS.raw_os_error();
        assert_eq!(errno(sys::PROT_READ, VALIDATE, 4096, 0), access);
        let unsupported = Errno::OPNOTSUPP.raw_os_error();
        assert_eq!(errno(BOTH, VALIDATE | 1 << 24, 4096, 0), unsupported);
        let overflow = Errno::OVERFLOW.raw_os_error();
        assert_eq!(errno(BOTH, SHARED, 8192, (1 << 63) - 4096), overflow);
        let memory = Errno::NOMEM.raw_os_error();
        assert_eq!(errno(BOTH, SHARED, usize::MAX, 0), memory);
    }

    #[test]
    fn a_read_only_file_is_refused() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let file = std::fs::File::open(named.path()).unwrap();
        // SAFETY: no MAP_FIXED.
        let result = unsafe { mmap(0, 4096, BOTH, SHARED, file.as_fd(), 0) };
        assert_eq!(result.unwrap_err().errno(), Errno::ACCESS.raw_os_error());
    }

    #[test]
    fn without_the_flag_it_is_mmap() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        // SAFETY: no MAP_FIXED.
        let address = unsafe { mmap(0, 4096, BOTH, sys::MAP_SHARED, file.as_fd(), 0) }.unwrap();
        // SAFETY: nothing refers to the mapping.
        unsafe { sys::unmap(address, 4096) }.unwrap();
    }
}
