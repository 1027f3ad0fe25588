//! arm64.

use std::arch::asm;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// HWCAP_DCPOP (arch/arm64/include/uapi/asm/hwcap.h): `dc cvap`.
const HWCAP_DCPOP: u64 = 1 << 16;
/// Set in `MEANS` beside the size of a line.
const CVAP: usize = 1;

/// The size of a cache line in bytes, and whether the processor has `dc cvap`.
#[inline]
fn means() -> (usize, bool) {
    static MEANS: AtomicUsize = AtomicUsize::new(0);
    let mut means = MEANS.load(Relaxed);
    if means == 0 {
        means = detect();
        MEANS.store(means, Relaxed);
    }
    (means & !CVAP, means & CVAP != 0)
}

#[cold]
fn detect() -> usize {
    let ctr: usize;
    // SAFETY: reads a register that Linux lets every program read.
    unsafe { asm!("mrs {}, ctr_el0", out(reg) ctr, options(nomem, nostack, preserves_flags)) };
    // DminLine: words in the smallest line of all data caches.
    let line = 4usize << (ctr >> 16 & 0xf);
    // SAFETY: takes a number.
    let capabilities = unsafe { libc::getauxval(libc::AT_HWCAP) };
    line | if capabilities & HWCAP_DCPOP != 0 {
        CVAP
    } else {
        0
    }
}

pub(super) fn instruction() -> &'static str {
    if means().1 { "dc cvap" } else { "dc cvac" }
}

/// # Safety
///
/// As [`super::write_back`].
#[inline]
pub(super) unsafe fn write_back(address: usize, length: usize) {
    if length == 0 {
        return;
    }
    let (size, to_persistence) = means();
    let end = address + length;
    let mut line = address & !(size - 1);
    while line < end {
        if to_persistence {
            // SAFETY: the line is mapped; it changes no byte. The encoding of
            // `dc cvap`, which assemblers know from ARMv8.2 on.
            unsafe {
                asm!("sys #3, c7, c12, #1, {}", in(reg) line, options(nostack, preserves_flags));
            }
        } else {
            // SAFETY: as above.
            unsafe { asm!("dc cvac, {}", in(reg) line, options(nostack, preserves_flags)) };
        }
        line += size;
    }
}

#[inline]
pub(super) fn drain() {
    // SAFETY: a barrier.
    unsafe { asm!("dsb ish", options(nostack, preserves_flags)) };
}

/// # Safety
///
/// As [`super::stream`].
#[inline]
pub(super) unsafe fn stream(address: usize, bytes: &[u8]) {
    for (at, word) in bytes.chunks_exact(8).enumerate() {
        let mut value = [0; 8];
        value.copy_from_slice(word);
        let to: *mut u64 = std::ptr::with_exposed_provenance_mut(address + 8 * at);
        // SAFETY: an aligned word of the range.
        let word = unsafe { std::sync::atomic::AtomicU64::from_ptr(to) };
        word.store(u64::from_ne_bytes(value), Relaxed);
    }
    // SAFETY: the range is mapped.
    unsafe { write_back(address, bytes.len()) }
}
