//! libmapdirect-mmap.so: has mmap, mmap64, munmap and mremap of a program understand
//! `MAP_DIRECT`, whether it is linked or in LD_PRELOAD.
//!
//! A call that has nothing to do with pins is the system call, and one look at a
//! flag or a pointer. libmapdirect.so.0 is loaded when a program first maps
//! `MAP_DIRECT`: nothing happens at the start of a program, and calls before any
//! constructor has run are like all others. The library makes its own system calls
//! by their numbers, so it never comes back here.
//!
//! mprotect(2) needs no help: what is frozen stays so whatever it allows.

#![deny(clippy::panic)]

use mapdirect_sys::{dlsym, errno, mmap as sys};
use std::ffi::{c_int, c_void};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicPtr, AtomicUsize};

const MAP_DIRECT: c_int = 0x200_0000;
const MREMAP_FIXED: c_int = 2;
const MREMAP_DONTUNMAP: c_int = 4;

/// What libmapdirect tells when it has a first mapping; `Attached` there.
#[repr(C)]
pub struct Attached {
    live: *const AtomicUsize,
    meets: extern "C" fn(usize, usize) -> bool,
    munmap: unsafe extern "C" fn(*mut c_void, usize) -> c_int,
}

static ATTACHED: AtomicPtr<Attached> = AtomicPtr::new(std::ptr::null_mut());

/// Called by libmapdirect, when it has mapped something for the first time.
#[unsafe(no_mangle)]
pub extern "C" fn mapdirect_mmap_attach(attached: *mut Attached) {
    ATTACHED.store(attached, Release);
}

type Mmap = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, c_int, i64) -> *mut c_void;

/// The library's mmap, once it is loaded.
static MMAP: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

fn mapdirect_mmap() -> Option<Mmap> {
    let mut found = MMAP.load(Acquire);
    if found.is_null() {
        let beside = (&raw const ATTACHED).cast();
        found = dlsym::load(c"libmapdirect.so.0", beside, c"mapdirect_mmap")?;
        MMAP.store(found, Release);
    }
    // SAFETY: the function of that name in that version of the library.
    Some(unsafe { std::mem::transmute::<*mut c_void, Mmap>(found) })
}

/// What knows of pinned mappings in a range, if any is there.
fn pinned(address: *const c_void, length: usize) -> Option<&'static Attached> {
    // SAFETY: null, or what the library has told, which stays.
    let attached = unsafe { ATTACHED.load(Acquire).as_ref() }?;
    // SAFETY: as above.
    let live = unsafe { &*attached.live };
    let meets = live.load(Relaxed) > 0 && (attached.meets)(address.addr(), length);
    meets.then_some(attached)
}

fn failed() -> *mut c_void {
    std::ptr::without_provenance_mut(usize::MAX)
}

/// errno is what the system call has left.
fn pointer<E>(result: Result<usize, E>) -> *mut c_void {
    result.map_or_else(|_| failed(), std::ptr::with_exposed_provenance_mut)
}

/// mmap(2).
///
/// # Safety
///
/// As mmap(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    address: *mut c_void,
    length: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    let is_over = flags & sys::MAP_FIXED != 0 && pinned(address, length).is_some();
    if flags & MAP_DIRECT != 0 || is_over {
        let Some(mmap) = mapdirect_mmap() else {
            // Nobody is there who could keep the promise.
            errno::set(errno::EOPNOTSUPP);
            return failed();
        };
        // SAFETY: the caller's promise.
        return unsafe { mmap(address, length, prot, flags, fd, offset) };
    }
    // SAFETY: the caller's promise.
    pointer(unsafe { sys::call(address.addr(), length, prot, flags, fd, offset) })
}

/// mmap(2): offsets have 64 bits in either case here.
///
/// # Safety
///
/// As mmap(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    address: *mut c_void,
    length: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { mmap(address, length, prot, flags, fd, offset) }
}

/// munmap(2).
///
/// # Safety
///
/// As munmap(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn munmap(address: *mut c_void, length: usize) -> c_int {
    if let Some(attached) = pinned(address, length) {
        // SAFETY: the caller's promise.
        return unsafe { (attached.munmap)(address, length) };
    }
    // SAFETY: the caller's promise.
    match unsafe { sys::unmap(address.addr(), length) } {
        Ok(()) => 0,
        // errno is what the system call has left.
        Err(_) => -1,
    }
}

/// mremap(2). A pinned mapping neither grows, shrinks nor moves, and nothing moves
/// onto one: EINVAL.
///
/// # Safety
///
/// As mremap(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mremap(
    address: *mut c_void,
    length: usize,
    new_length: usize,
    flags: c_int,
    new_address: *mut c_void,
) -> *mut c_void {
    let stays = length == new_length && flags & (MREMAP_FIXED | MREMAP_DONTUNMAP) == 0;
    let touches = pinned(address, length.max(1)).is_some();
    let lands = flags & MREMAP_FIXED != 0 && pinned(new_address, new_length).is_some();
    if touches && !stays || lands {
        errno::set(errno::EINVAL);
        return failed();
    }
    // The fifth argument is only there with a flag; without, nobody looks at it.
    // SAFETY: the caller's promise.
    pointer(unsafe {
        sys::remap(
            address.addr(),
            length,
            new_length,
            flags,
            new_address.addr(),
        )
    })
}
