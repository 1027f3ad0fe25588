//! mmap(2), munmap(2), and what becomes of blocks under a mapping.

use super::{MAPS, Told, descriptor, end_of, invalid, off_t, prepare_for_forks};
use crate::boundary::{Failure, call};
use crate::hints;
use mapdirect::{Durability, MapOptions, PrepareOptions, raw};
use mapdirect_sys::{dlsym, errno, mmap};
use std::cell::Cell;
use std::ffi::{c_int, c_uint, c_void};
use std::ops::Range;
use std::sync::Once;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicUsize};
use std::time::Duration;

/// A flag for mmap: use it with MAP_SHARED_VALIDATE.
pub const MAP_DIRECT: c_int = 0x200_0000;
const _: () = assert!(MAP_DIRECT == raw::MAP_DIRECT);

/// mapdirect_prepare: the file grows to the end of the range, if it is smaller.
pub const MAPDIRECT_GROW: c_uint = 1;
/// mapdirect_prepare: fails unless the range can be mapped by huge pages.
pub const MAPDIRECT_HUGE: c_uint = 2;

/// MAP_FAILED.
const FAILED: *mut c_void = std::ptr::without_provenance_mut(usize::MAX);

/// How many mappings there are, and how many that take msync(2) to flush.
static LIVE: AtomicUsize = AtomicUsize::new(0);
pub(super) static SYNCED: AtomicUsize = AtomicUsize::new(0);

/// As `MapOptions` has it.
static PATIENCE: AtomicU32 = AtomicU32::new(100);

thread_local! {
    static CACHED: Cell<Option<bool>> = const { Cell::new(None) };
}

/// What libmapdirect-mmap.so is told when there is a first mapping.
#[repr(C)]
#[derive(Debug)]
pub struct Attached {
    live: *const AtomicUsize,
    meets: extern "C" fn(usize, usize) -> bool,
    munmap: unsafe extern "C" fn(*mut c_void, usize) -> c_int,
}

// SAFETY: the pointer leads to an atomic that lives as long as the program.
unsafe impl Sync for Attached {}

extern "C" fn meets(address: usize, length: usize) -> bool {
    MAPS.meets(&(address..address.saturating_add(length)))
}

fn attach() {
    static ATTACHED: Attached = Attached {
        live: &raw const LIVE,
        meets,
        munmap: mapdirect_munmap,
    };
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let Some(found) = dlsym::find(c"mapdirect_mmap_attach") else {
            return;
        };
        // SAFETY: the only thing of this name is the function of
        // libmapdirect-mmap.so, which takes this.
        let attach: extern "C" fn(*const Attached) = unsafe { std::mem::transmute(found) };
        attach(&raw const ATTACHED);
    });
}

/// mmap(2) that knows MAP_DIRECT; without that flag it is mmap(2).
///
/// While the mapping exists, nobody can move, free, share or allocate the blocks
/// under it: whoever tries gets ETXTBSY. Memory is mapped until mapdirect_munmap,
/// exec or exit; a child of fork(2) shares it. The file can be closed.
///
/// Without DAX it fails with EOPNOTSUPP, unless MAPDIRECT_CACHED=1 is in the
/// environment, or mapdirect_accept_page_cache(1) was called in this thread.
///
/// EINVAL: MAP_ANONYMOUS, MAP_PRIVATE or MAP_HUGETLB; offset off a page boundary;
/// length 0; MAP_FIXED over a pinned mapping. EACCES: no PROT_WRITE; fd not open
/// for reading and writing; no CAP_LINUX_IMMUTABLE. EOPNOTSUPP: the filesystem or
/// the file cannot keep the promise; no guard; an unknown flag beside
/// MAP_SHARED_VALIDATE. ETXTBSY: the block map cannot be brought to rest. EBADF,
/// ENODEV, ENOMEM, EOVERFLOW, EEXIST: as mmap(2).
///
/// # Safety
///
/// With `MAP_FIXED` nothing may refer to what was mapped at `address`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mapdirect_mmap(
    address: *mut c_void,
    length: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    let wanted = address.addr()..address.addr().saturating_add(length);
    let is_over = flags & mmap::MAP_FIXED != 0 && MAPS.meets(&wanted);
    if flags & MAP_DIRECT == 0 && !is_over {
        // SAFETY: the caller's promise.
        let mapped = unsafe { mmap::call(wanted.start, length, prot, flags, fd, offset) };
        return mapped.map_or_else(
            |error| {
                errno::set(error.raw_os_error());
                FAILED
            },
            std::ptr::with_exposed_provenance_mut,
        );
    }
    let mapped = call(usize::MAX, || {
        if is_over {
            return Err(invalid(
                "MAP_FIXED would replace a pinned mapping",
                "munmap all of that first",
            ));
        }
        // SAFETY: the caller's promise.
        unsafe { map_direct((wanted.start, length), (prot, flags), fd, offset) }
    });
    std::ptr::with_exposed_provenance_mut(mapped)
}

/// # Safety
///
/// As [`mapdirect_mmap`].
unsafe fn map_direct(
    place: (usize, usize),
    (prot, flags): (c_int, c_int),
    fd: c_int,
    offset: off_t,
) -> Result<usize, Failure> {
    if flags & mmap::MAP_ANONYMOUS != 0 {
        return Err(invalid(
            "MAP_ANONYMOUS and MAP_DIRECT exclude each other",
            "use MAP_SHARED_VALIDATE | MAP_DIRECT on a file",
        ));
    }
    prepare_for_forks();
    // SAFETY: the caller's, for the time of the call.
    let file = unsafe { descriptor(fd) }?;
    // The kernel takes it for a number without a sign, too.
    let offset = offset.cast_unsigned();
    // SAFETY: the caller's promise; the table unmaps it by the object alone, and
    // the manual says that programs must not do it by themselves.
    let map = unsafe { raw::map(&options(), place, (prot, flags), file, offset) }?;
    let start = map.as_ptr().expose_provenance();
    let range = start..start + map.len().next_multiple_of(rustix::param::page_size());
    if map.durability() == Durability::Msync {
        SYNCED.fetch_add(1, SeqCst);
    }
    LIVE.fetch_add(1, SeqCst);
    MAPS.insert(range, Told::new(map));
    attach();
    Ok(start)
}

/// munmap(2) that knows the mappings of mapdirect_mmap. It waits until their pins
/// are over. Mappings that are in the range must be in it whole: EINVAL for a part
/// of one, and nothing is unmapped then. Of other memory it unmaps what munmap(2)
/// would.
///
/// # Safety
///
/// Nothing may refer to the memory any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mapdirect_munmap(address: *mut c_void, length: usize) -> c_int {
    let start = address.addr();
    if LIVE.load(Relaxed) == 0 {
        // SAFETY: the caller's promise.
        return match unsafe { mmap::unmap(start, length) } {
            Ok(()) => 0,
            Err(error) => {
                errno::set(error.raw_os_error());
                -1
            }
        };
    }
    call(-1, || {
        let page = rustix::param::page_size();
        let end = length
            .checked_next_multiple_of(page)
            .and_then(|length| start.checked_add(length))
            .filter(|end| *end > start && start.is_multiple_of(page))
            .ok_or_else(|| {
                invalid(
                    "this is no range of pages",
                    "give the address of a page, and a length",
                )
            })?;
        // SAFETY: the caller's promise.
        unsafe { unmap(start..end) }.map(|()| 0)
    })
}

/// # Safety
///
/// As [`mapdirect_munmap`].
unsafe fn unmap(range: Range<usize>) -> Result<(), Failure> {
    let mut places = MAPS.meeting(&range);
    places.sort_unstable_by_key(|place| place.start);
    if places
        .iter()
        .any(|place| place.start < range.start || place.end > range.end)
    {
        return Err(invalid(
            "the range covers a part of a pinned mapping",
            "unmap all that one call of mapdirect_mmap has mapped",
        ));
    }
    let mut at = range.start;
    for place in places {
        // SAFETY: other memory of the range.
        unsafe { unmap_other(at..place.start) }?;
        at = place.end;
        match MAPS.take(place.start, hints::forget) {
            Ok(Some(Told { what: map, .. })) => {
                LIVE.fetch_sub(1, SeqCst);
                if map.durability() == Durability::Msync {
                    SYNCED.fetch_sub(1, SeqCst);
                }
                // The memory is gone, also if the guard has not said yet that the
                // pin is over.
                if let Err(error) = map.unmap()
                    && error.errno_name() != "ETIMEDOUT"
                {
                    return Err(error.into());
                }
            }
            // SAFETY: nothing is known of it but that it is there.
            Ok(None) => unsafe { unmap_other(place) }?,
            // Another thread has just unmapped it.
            Err(_) => {}
        }
    }
    // SAFETY: as above.
    unsafe { unmap_other(at..range.end) }
}

/// # Safety
///
/// As [`mapdirect_munmap`].
unsafe fn unmap_other(range: Range<usize>) -> Result<(), Failure> {
    if range.is_empty() {
        return Ok(());
    }
    // SAFETY: the caller's promise.
    unsafe { mmap::unmap(range.start, range.len()) }
        .map_err(|error| Failure::new(error.raw_os_error(), "munmap failed", "see munmap(2)"))
}

/// Whether mapdirect_mmap in this thread accepts the page cache where there is no
/// DAX: 1 yes, 0 no, -1 what MAPDIRECT_CACHED in the environment says (as at
/// first).
#[unsafe(no_mangle)]
pub extern "C" fn mapdirect_accept_page_cache(accept: c_int) -> c_int {
    call(-1, || {
        CACHED.set(match accept {
            -1 => None,
            0 => Some(false),
            1 => Some(true),
            _ => return Err(invalid("it is 1, 0 or -1", "see mapdirect(3)")),
        });
        Ok(0)
    })
}

/// How long, in milliseconds, calls of this process wait for others who have a file
/// open or change it: a tenth of a second at first, a minute at most.
#[unsafe(no_mangle)]
pub extern "C" fn mapdirect_patience(milliseconds: c_uint) -> c_int {
    PATIENCE.store(milliseconds, Relaxed);
    0
}

/// The same for a call.
pub(super) fn patience() -> Duration {
    Duration::from_millis(PATIENCE.load(Relaxed).into())
}

/// Has the guard allocate, initialise and unshare the blocks under length bytes of
/// a mapping, while it is pinned: then they can be stored to. EINVAL if they are
/// not all in one mapping; ENOSPC; ETXTBSY if somebody else has pinned them.
#[unsafe(no_mangle)]
pub extern "C" fn mapdirect_allocate(address: *mut c_void, length: usize) -> c_int {
    call(-1, || {
        MAPS.change(address.addr(), |told, place| {
            let map = &mut told.what;
            let from = map.offset() + (address.addr() - place.start) as u64;
            let to = from.checked_add(length as u64);
            let to = to.ok_or_else(|| invalid("the range has no end", "give a smaller length"))?;
            Ok(map.allocate(from..to)?)
        })
        .map(|()| 0)
    })
}

/// Allocates, initialises and unshares every block of length bytes of a file from
/// offset on, before it is pinned. Length 0 stands for the rest of the file. Not a
/// byte of it changes. Flags: MAPDIRECT_GROW, MAPDIRECT_HUGE. Needs no guard.
///
/// # Safety
///
/// Nobody closes the descriptor meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mapdirect_prepare(
    fd: c_int,
    offset: off_t,
    length: u64,
    flags: c_uint,
) -> c_int {
    call(-1, || {
        // SAFETY: the caller's promise.
        let file = unsafe { descriptor(fd) }?;
        if flags & !(MAPDIRECT_GROW | MAPDIRECT_HUGE) != 0 {
            return Err(invalid(
                "a flag is not known",
                "use MAPDIRECT_GROW, MAPDIRECT_HUGE, or 0",
            ));
        }
        let range = range_of(file, offset, length)?;
        let mut options = PrepareOptions::new()
            .patience(patience())
            .huge(flags & MAPDIRECT_HUGE != 0);
        if flags & MAPDIRECT_GROW != 0 && range.end > size_of(file)? {
            options = options.size(range.end);
        }
        options.range(range).prepare(file)?;
        Ok(0)
    })
}

fn size_of(file: std::os::fd::BorrowedFd<'_>) -> Result<u64, Failure> {
    let stat = rustix::fs::fstat(file);
    let stat = stat.map_err(|error| Failure::new(error.raw_os_error(), "fstat failed", ""))?;
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

/// The bytes that C asks for; length 0 stands for the rest of the file.
pub(super) fn range_of(
    file: std::os::fd::BorrowedFd<'_>,
    offset: off_t,
    length: u64,
) -> Result<Range<u64>, Failure> {
    let start = end_of(offset, 0)?;
    let end = if length == 0 {
        size_of(file)?
    } else {
        end_of(offset, length)?
    };
    if end <= start {
        return Err(invalid(
            "the range is empty",
            "give a range of at least one byte",
        ));
    }
    Ok(start..end)
}

/// Whether mapdirect_mmap can map this file: 1, or 0 with errno and words; -1 for a
/// descriptor that is none. It maps a page for a moment to find out.
///
/// # Safety
///
/// Nobody closes the descriptor meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mapdirect_supported(fd: c_int) -> c_int {
    // SAFETY: the caller's promise.
    let file = call(None, || unsafe { descriptor(fd) }.map(Some));
    let Some(file) = file else {
        return -1;
    };
    call(0, || {
        let place = (0, rustix::param::page_size());
        let access = (mmap::PROT_READ | mmap::PROT_WRITE, mmap::MAP_SHARED);
        // SAFETY: no MAP_FIXED, and nobody learns of it.
        let map = unsafe { raw::map(&options(), place, access, file, 0) }?;
        // When the guard confirms the end is of no interest.
        let _ = map.unmap();
        Ok(1)
    })
}

/// How mappings of this thread are made.
fn options() -> MapOptions {
    let options = MapOptions::new().patience(patience());
    match CACHED.get() {
        Some(cached) => options.accept_page_cache(cached),
        None => options,
    }
}
