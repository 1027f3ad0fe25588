//! Pins without a mapping.

use super::map::{patience, range_of};
use super::{PINS, Told, descriptor, end_of, invalid, off_t, prepare_for_forks};
use crate::boundary::{Failure, call};
use mapdirect::{PinOptions, Scope, Strength};
use std::ffi::{c_int, c_uint};
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

/// The number of a pin: never 0, and never used again.
#[expect(non_camel_case_types, reason = "it is the name in C")]
pub type mapdirect_pin = u64;

/// mapdirect_pin_fd: holds what is stable or becomes so, and lets the file grow.
pub const MAPDIRECT_PIN_STABLE: c_uint = 1;
/// mapdirect_pin_fd: the whole file and its size.
pub const MAPDIRECT_PIN_FILE: c_uint = 2;
/// mapdirect_pin_fd: nobody else may open the file for writing.
pub const MAPDIRECT_PIN_DENY_WRITE: c_uint = 4;
/// mapdirect_pin_fd: no name of the file goes.
pub const MAPDIRECT_PIN_DENY_RENAME: c_uint = 8;
/// mapdirect_pin_fd: descendants of this process have a holder's rights.
pub const MAPDIRECT_PIN_FAMILY: c_uint = 16;
/// mapdirect_pin_fd: prepares the range first.
pub const MAPDIRECT_PIN_PREPARE: c_uint = 32;

const KNOWN: c_uint = MAPDIRECT_PIN_STABLE
    | MAPDIRECT_PIN_FILE
    | MAPDIRECT_PIN_DENY_WRITE
    | MAPDIRECT_PIN_DENY_RENAME
    | MAPDIRECT_PIN_FAMILY
    | MAPDIRECT_PIN_PREPARE;

/// Where a pin is in the table.
pub(super) fn place(pin: mapdirect_pin) -> usize {
    usize::try_from(pin).unwrap_or(usize::MAX)
}

/// Pins length bytes of a file from offset on, without mapping them: until
/// mapdirect_unpin, their blocks stay where they are. Length 0 stands for the rest
/// of the file, and with MAPDIRECT_PIN_STABLE for whatever it grows to. The file
/// can be open for reading only, and can be closed. 0 if it fails; errno as
/// mapdirect_mmap.
///
/// # Safety
///
/// Nobody closes the descriptor meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mapdirect_pin_fd(
    fd: c_int,
    offset: off_t,
    length: u64,
    flags: c_uint,
) -> mapdirect_pin {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    call(0, || {
        // SAFETY: the caller's promise.
        let file = unsafe { descriptor(fd) }?;
        let has = |flag| flags & flag != 0;
        if has(!KNOWN) {
            return Err(invalid("a flag is not known", "use those of mapdirect.h"));
        }
        let options = PinOptions::new()
            .patience(patience())
            .deny_write(has(MAPDIRECT_PIN_DENY_WRITE))
            .deny_rename(has(MAPDIRECT_PIN_DENY_RENAME))
            .family(has(MAPDIRECT_PIN_FAMILY))
            .prepare_first(has(MAPDIRECT_PIN_PREPARE));
        let options = if has(MAPDIRECT_PIN_STABLE) {
            options.strength(Strength::Stable)
        } else {
            options
        };
        let options = if has(MAPDIRECT_PIN_FILE) {
            if (offset, length) != (0, 0) {
                return Err(invalid(
                    "the whole file has no offset and length",
                    "give 0 and 0 with MAPDIRECT_PIN_FILE",
                ));
            }
            options.scope(Scope::File)
        } else if has(MAPDIRECT_PIN_STABLE) && length == 0 {
            options.range_from(end_of(offset, 0)?)
        } else {
            options.range(range_of(file, offset, length)?)
        };
        prepare_for_forks();
        let pin = options.pin(file)?;
        let number = NEXT.fetch_add(1, Relaxed);
        PINS.insert(number..number + 1, Told::new(pin));
        Ok(number as u64)
    })
}

/// Ends a pin. EINVAL if there is none of this number; ETIMEDOUT when the guard has
/// not confirmed the end within a second: this process has let go of it then.
#[unsafe(no_mangle)]
pub extern "C" fn mapdirect_unpin(pin: mapdirect_pin) -> c_int {
    call(-1, || -> Result<c_int, Failure> {
        if let Some(told) = PINS.take(place(pin), |_| ())? {
            told.what.unpin()?;
        }
        Ok(0)
    })
}
