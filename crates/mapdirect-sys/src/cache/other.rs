//! Processors whose caches are not supported. No file is mapped directly on
//! them, so only tests use this module.

use std::sync::atomic::{AtomicU64, Ordering};

pub(super) fn instruction() -> &'static str {
    "none"
}

/// # Safety
///
/// As [`super::write_back`].
pub(super) unsafe fn write_back(_address: usize, _length: usize) {}

pub(super) fn drain() {
    std::sync::atomic::fence(Ordering::SeqCst);
}

/// # Safety
///
/// As [`super::stream`].
pub(super) unsafe fn stream(address: usize, bytes: &[u8]) {
    for (at, word) in bytes.chunks_exact(8).enumerate() {
        let mut value = [0; 8];
        value.copy_from_slice(word);
        let to: *mut u64 = std::ptr::with_exposed_provenance_mut(address + 8 * at);
        // SAFETY: an aligned word of the range.
        let word = unsafe { AtomicU64::from_ptr(to) };
        word.store(u64::from_ne_bytes(value), Ordering::Relaxed);
    }
}
