//! What is told of mappings and pins: extents, states, and a descriptor to wait by.

use super::durable::number_of;
use super::pin::{mapdirect_pin, place};
use super::{MAPS, PINS, event_fd_of, invalid};
use crate::boundary::{Failure, call, say};
use mapdirect::{BlockMap, ExtentState, Integrity, State};
use mapdirect_sys::errno;
use std::ffi::{c_int, c_void};

/// mapdirect_extent: allocated, written, and used by this file alone.
pub const MAPDIRECT_WRITTEN: u32 = 1;
/// mapdirect_extent: no blocks; reads as zeros.
pub const MAPDIRECT_HOLE: u32 = 2;
/// mapdirect_extent: blocks with whatever was in them before. Never show it.
pub const MAPDIRECT_UNWRITTEN: u32 = 3;
/// mapdirect_extent: also used by other files.
pub const MAPDIRECT_SHARED: u32 = 4;
/// mapdirect_extent: written, but a copy of a shared block nearby may move it.
pub const MAPDIRECT_LOOSE: u32 = 5;
/// mapdirect_extent: something that a program cannot go to by itself.
pub const MAPDIRECT_OTHER: u32 = 6;

/// mapdirect_status: a guard is there, and the promise holds.
pub const MAPDIRECT_KEPT: u32 = 0;
/// mapdirect_status: no guard is there, and the kernel still refuses.
pub const MAPDIRECT_UNATTENDED: u32 = 1;
/// mapdirect_status: the promise has ended, or was broken.
pub const MAPDIRECT_LOST: u32 = 2;

/// mapdirect_extent: there is no place on the device.
pub const MAPDIRECT_NOWHERE: u64 = u64::MAX;

/// A run of blocks in the same state. Later versions have more behind it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct mapdirect_extent {
    /// Byte of the file.
    pub offset: u64,
    /// Byte of the block device, or MAPDIRECT_NOWHERE.
    pub physical: u64,
    /// Bytes.
    pub length: u64,
    /// MAPDIRECT_WRITTEN and so on.
    pub state: u32,
    /// Number of the block device.
    pub device_major: u32,
    /// Number of the block device.
    pub device_minor: u32,
    /// 0.
    pub reserved: u32,
}

/// What became of a pin. Later versions have more behind it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct mapdirect_state {
    /// MAPDIRECT_KEPT and so on.
    pub state: u32,
    /// As mapdirect_durability; 0 for a pin without a mapping.
    pub durability: u32,
    /// The number by which the guard knows the pin.
    pub pin: u64,
    /// The range pinned, in bytes of the file: its start.
    pub start: u64,
    /// And its end; all ones if it has none.
    pub end: u64,
    /// How often blocks were found changed.
    pub breaches: u64,
}

/// Copies records into a caller's buffer: of `size` bytes each, which may be more
/// or less than this version has.
///
/// # Safety
///
/// `to` must be writable for `capacity` times `size` bytes.
unsafe fn copy_out<T: Copy>(
    records: &[T],
    to: *mut c_void,
    capacity: usize,
    size: usize,
) -> Result<(), Failure> {
    let whole = std::mem::size_of::<T>();
    if size < whole || !size.is_multiple_of(8) {
        return Err(invalid(
            "the record is smaller than the first version's, or no multiple of 8 bytes",
            "give sizeof of the structure in mapdirect.h",
        ));
    }
    if to.is_null() && capacity > 0 {
        return Err(Failure::new(
            errno::EFAULT,
            "the buffer is NULL",
            "give a buffer",
        ));
    }
    for (at, record) in records.iter().take(capacity).enumerate() {
        let place = to.cast::<u8>().wrapping_add(at * size);
        // SAFETY: inside of the buffer, by the caller's promise.
        unsafe { std::ptr::write_bytes(place, 0, size) };
        // SAFETY: as above; any alignment will do.
        unsafe { place.cast::<T>().write_unaligned(*record) };
    }
    Ok(())
}

fn extents_of(map: &BlockMap) -> Vec<mapdirect_extent> {
    let device = map.device();
    let extents = map.extents().iter();
    extents
        .map(|extent| mapdirect_extent {
            offset: extent.offset,
            physical: extent.physical.unwrap_or(MAPDIRECT_NOWHERE),
            length: extent.length,
            state: match extent.state {
                ExtentState::Written => MAPDIRECT_WRITTEN,
                ExtentState::Hole => MAPDIRECT_HOLE,
                ExtentState::Unwritten => MAPDIRECT_UNWRITTEN,
                ExtentState::Shared => MAPDIRECT_SHARED,
                ExtentState::Loose => MAPDIRECT_LOOSE,
                _ => MAPDIRECT_OTHER,
            },
            device_major: device.major,
            device_minor: device.minor,
            reserved: 0,
        })
        .collect()
}

/// # Safety
///
/// As [`copy_out`].
unsafe fn give_extents(
    map: &BlockMap,
    to: *mut c_void,
    capacity: usize,
    size: usize,
) -> Result<isize, Failure> {
    let extents = extents_of(map);
    // SAFETY: the caller's promise.
    unsafe { copy_out(&extents, to, capacity, size) }?;
    Ok(isize::try_from(extents.len()).unwrap_or(isize::MAX))
}

/// The extents under a mapping, extended to whole blocks: fills a buffer of
/// capacity records of size bytes (sizeof(struct mapdirect_extent)), and returns
/// how many there are, which may be more. -1 if it fails.
///
/// # Safety
///
/// The buffer must have room for `capacity` records of `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mapdirect_extents(
    address: *const c_void,
    extents: *mut mapdirect_extent,
    capacity: usize,
    size: usize,
) -> isize {
    call(-1, || {
        MAPS.read(address.addr(), |told, _| {
            // SAFETY: the caller's promise.
            unsafe { give_extents(told.what.block_map(), extents.cast(), capacity, size) }
        })
    })
}

/// The same of a pin. One with MAPDIRECT_PIN_STABLE tells what it holds by now.
///
/// # Safety
///
/// As mapdirect_extents.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mapdirect_pin_extents(
    pin: mapdirect_pin,
    extents: *mut mapdirect_extent,
    capacity: usize,
    size: usize,
) -> isize {
    call(-1, || {
        PINS.change(place(pin), |told, _| {
            told.what.refresh()?;
            // SAFETY: the caller's promise.
            unsafe { give_extents(told.what.block_map(), extents.cast(), capacity, size) }
        })
    })
}

fn state_of(
    state: &State,
    integrity: &Integrity,
    (pin, range): (u64, std::ops::Range<u64>),
    durability: c_int,
) -> mapdirect_state {
    if !state.is_kept() {
        say(state.to_string());
    }
    mapdirect_state {
        state: match state {
            State::Kept => MAPDIRECT_KEPT,
            State::Lost { .. } => MAPDIRECT_LOST,
            _ => MAPDIRECT_UNATTENDED,
        },
        durability: durability.cast_unsigned(),
        pin,
        start: range.start,
        end: range.end,
        breaches: match integrity {
            Integrity::Breached { count, .. } => *count,
            _ => 0,
        },
    }
}

/// What has become of the pin of a mapping; size is sizeof(struct
/// mapdirect_state). If it is not kept, mapdirect_strerror says why.
///
/// # Safety
///
/// `state` must be writable for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mapdirect_status(
    address: *const c_void,
    state: *mut mapdirect_state,
    size: usize,
) -> c_int {
    call(-1, || {
        MAPS.read(address.addr(), |told, _| {
            let map = &told.what;
            let named = (map.pin_id(), map.block_map().range());
            let durability = number_of(map.durability());
            let found = state_of(&map.state(), &map.integrity(), named, durability);
            // SAFETY: the caller's promise.
            unsafe { copy_out(&[found], state.cast(), 1, size) }
        })
        .map(|()| 0)
    })
}

/// The same of a pin.
///
/// # Safety
///
/// As mapdirect_status.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mapdirect_pin_status(
    pin: mapdirect_pin,
    state: *mut mapdirect_state,
    size: usize,
) -> c_int {
    call(-1, || {
        PINS.read(place(pin), |told, _| {
            let pin = &told.what;
            let named = (pin.pin_id(), pin.range());
            let found = state_of(&pin.state(), &pin.integrity(), named, 0);
            // SAFETY: the caller's promise.
            unsafe { copy_out(&[found], state.cast(), 1, size) }
        })
        .map(|()| 0)
    })
}

/// A descriptor for poll(2) that becomes readable when mapdirect_status has news of
/// a mapping; reading 8 bytes makes it unreadable. It is the caller's to close.
#[unsafe(no_mangle)]
pub extern "C" fn mapdirect_event_fd(address: *const c_void) -> c_int {
    call(-1, || {
        MAPS.change(address.addr(), |told, _| {
            let event = told.what.event_fd()?;
            event_fd_of(told.event.insert(event))
        })
    })
}

/// The same for a pin.
#[unsafe(no_mangle)]
pub extern "C" fn mapdirect_pin_event_fd(pin: mapdirect_pin) -> c_int {
    call(-1, || {
        PINS.change(place(pin), |told, _| {
            let event = told.what.event_fd()?;
            event_fd_of(told.event.insert(event))
        })
    })
}
