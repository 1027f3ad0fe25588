//! Making stores durable.

use super::MAPS;
use super::map::SYNCED;
use crate::boundary::{Failure, call};
use crate::hints;
use mapdirect::{DirectMap, Durability, Flusher};
use mapdirect_sys::errno;
use std::ffi::{c_int, c_void};
use std::sync::atomic::Ordering::Relaxed;

/// mapdirect_durability: the program writes cache lines back by itself.
pub const MAPDIRECT_CACHE_FLUSH: c_int = 1;
/// mapdirect_durability: caches survive a power cut, and a fence is all.
pub const MAPDIRECT_AUTOMATIC: c_int = 2;
/// mapdirect_durability: msync(2).
pub const MAPDIRECT_MSYNC: c_int = 3;

pub(super) const fn number_of(durability: Durability) -> c_int {
    match durability {
        Durability::CacheFlush => MAPDIRECT_CACHE_FLUSH,
        Durability::Automatic => MAPDIRECT_AUTOMATIC,
        _ => MAPDIRECT_MSYNC,
    }
}

/// Looks a mapping up, and leaves a hint for the next time.
#[cold]
fn look_up(
    address: usize,
    run: impl FnOnce(&DirectMap, usize) -> mapdirect::Result<()>,
) -> Result<c_int, Failure> {
    MAPS.read(address, |told, place| {
        let map = &told.what;
        if let Some(flusher) = map.flusher() {
            hints::leave(address, &(place.start..place.start + map.len()), flusher);
        }
        Ok(run(map, address - place.start)?)
    })
    .map(|()| 0)
}

/// Makes what was stored to length bytes of a mapping durable, and returns when it
/// is. EINVAL if they are not all in one mapping; EIO if blocks under it have
/// changed; what msync(2) answers.
#[unsafe(no_mangle)]
pub extern "C" fn mapdirect_persist(address: *const c_void, length: usize) -> c_int {
    if hints::flush(address.addr(), length) {
        Flusher::drain();
        return 0;
    }
    call(-1, || {
        look_up(address.addr(), |map, at| {
            map.flush_range(at..at.saturating_add(length))
        })
    })
}

/// Starts writing a range back. It is durable when a later mapdirect_drain has
/// returned: flush many ranges, then drain once. Errors as mapdirect_persist.
#[unsafe(no_mangle)]
pub extern "C" fn mapdirect_flush(address: *const c_void, length: usize) -> c_int {
    if hints::flush(address.addr(), length) {
        return 0;
    }
    call(-1, || {
        look_up(address.addr(), |map, at| {
            map.flush_async_range(at..at.saturating_add(length))
        })
    })
}

/// Waits until everything is durable that this thread has flushed, and, where that
/// takes msync(2), any thread has. Errors of msync(2); the next call tries again.
#[unsafe(no_mangle)]
pub extern "C" fn mapdirect_drain() -> c_int {
    Flusher::drain();
    if SYNCED.load(Relaxed) == 0 {
        return 0;
    }
    call(-1, || {
        for place in MAPS.places() {
            let drained = MAPS.read(place, |told, _| Ok(told.what.drain().err()));
            // It may have been unmapped meanwhile.
            if let Ok(Some(error)) = drained {
                return Err(error.into());
            }
        }
        Ok(0)
    })
}

/// Copies length bytes into a mapping and makes them durable; on persistent memory
/// past the cache. Errors as mapdirect_persist, and ETXTBSY for blocks that cannot
/// be stored to; EFAULT for a source of NULL.
///
/// # Safety
///
/// `from` must be readable for so many bytes, which nobody changes meanwhile, and
/// nobody may unmap `to`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mapdirect_memcpy_persist(
    to: *mut c_void,
    from: *const c_void,
    length: usize,
) -> c_int {
    let is_a_slice = !from.is_null() && isize::try_from(length).is_ok();
    if is_a_slice {
        // SAFETY: the caller's promise.
        let bytes = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), length) };
        // SAFETY: the caller's promise.
        if unsafe { hints::write_persist(to.addr(), bytes) } {
            return 0;
        }
        return call(-1, || {
            look_up(to.addr(), |map, at| map.write_persist_at(bytes, at))
        });
    }
    call(-1, || {
        let (errno, obstacle) = if from.is_null() {
            (errno::EFAULT, "the source is NULL")
        } else {
            (errno::EINVAL, "no memory has so many bytes")
        };
        Err(Failure::new(errno, obstacle, "give the bytes to copy"))
    })
}

/// What it takes to make stores to a mapping durable: MAPDIRECT_CACHE_FLUSH,
/// MAPDIRECT_AUTOMATIC or MAPDIRECT_MSYNC; -1 and EINVAL if none is there.
#[unsafe(no_mangle)]
pub extern "C" fn mapdirect_durability(address: *const c_void) -> c_int {
    call(-1, || {
        MAPS.read(address.addr(), |told, _| {
            Ok(number_of(told.what.durability()))
        })
    })
}

/// Has stores to a mapping become durable as on other hardware. For benchmarks; the
/// shared library does not have it.
#[doc(hidden)]
pub fn pretend(address: *const c_void, durability: Durability) -> bool {
    let pretended = MAPS.change(address.addr(), |told, place| {
        hints::forget(&place);
        told.what.pretend(durability);
        Ok(())
    });
    pretended.is_ok()
}
