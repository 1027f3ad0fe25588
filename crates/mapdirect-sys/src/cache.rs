//! CPU caches and persistent memory: making stores durable without a system
//! call.
//!
//! A store is durable once its cache line was written back and a fence has
//! waited for that. On x86-64 the instruction is `clwb`, `clflushopt` or
//! `clflush`, the first of these that the processor has (CPUID leaf 7, EBX bits
//! 24 and 23, Intel SDM volume 2), and the fence is `sfence`; `clwb` may keep
//! the line in the cache. On arm64 the instruction is `dc cvap` if the
//! processor has it (`HWCAP_DCPOP`), and otherwise `dc cvac`. The fence there
//! is `dsb ish`.

#[cfg(target_arch = "aarch64")]
#[path = "cache/aarch64.rs"]
mod arch;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
#[path = "cache/other.rs"]
mod arch;
#[cfg(target_arch = "x86_64")]
#[path = "cache/x86_64.rs"]
mod arch;

/// The instruction that writes back cache lines on this processor.
#[must_use]
pub fn instruction() -> &'static str {
    arch::instruction()
}

/// Starts to write back the cache lines that hold `length` bytes at `address`.
/// [`drain`] waits for the end of that.
///
/// # Safety
///
/// Every line must be mapped, or the access raises SIGSEGV or SIGBUS.
#[inline]
pub unsafe fn write_back(address: usize, length: usize) {
    // SAFETY: the caller's promise.
    unsafe { arch::write_back(address, length) }
}

/// Waits until everything that was written back or [`stream`]ed before is
/// durable.
#[inline]
pub fn drain() {
    arch::drain();
}

/// Stores bytes past the cache if that is possible. Otherwise stores them and
/// starts to write them back. [`drain`] waits for either. Eight aligned bytes
/// are never torn.
///
/// # Safety
///
/// `address` must be a multiple of 8, and so must the number of bytes; the
/// memory must be mapped for writing, and no reference to it may exist.
///
/// # Panics
///
/// If either is not a multiple of 8.
#[inline]
pub unsafe fn stream(address: usize, bytes: &[u8]) {
    assert!(
        address.is_multiple_of(8) && bytes.len().is_multiple_of(8),
        "words only"
    );
    // SAFETY: the caller's promise.
    unsafe { arch::stream(address, bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[repr(align(64))]
    struct Aligned([u8; 4096]);

    proptest! {
        #[test]
        fn streamed_bytes_are_the_bytes(
            start in 0usize..40,
            words in 0usize..400,
            seed in any::<u8>(),
            shift in 0usize..16,
        ) {
            let mut memory = Box::new(Aligned([0xee; 4096]));
            let bytes: Vec<u8> = (0..shift + 8 * words)
                .map(|at| u8::try_from(at % 256).unwrap().wrapping_mul(31).wrapping_add(seed))
                .collect();
            // From anywhere, aligned or not.
            let bytes = &bytes[shift..];
            let address = memory.0.as_mut_ptr().expose_provenance() + 8 * start;
            // SAFETY: inside the memory, which nothing refers to meanwhile.
            unsafe { stream(address, bytes) };
            // SAFETY: as above.
            unsafe { write_back(address, bytes.len()) };
            drain();
            let end = 8 * start + bytes.len();
            prop_assert!(memory.0[..8 * start].iter().all(|byte| *byte == 0xee));
            prop_assert_eq!(&memory.0[8 * start..end], bytes);
            prop_assert!(memory.0[end..].iter().all(|byte| *byte == 0xee));
        }
    }

    #[test]
    fn nothing_is_written_back_where_nothing_is_asked() {
        // An address that is not mapped.
        // SAFETY: no line.
        unsafe { write_back(8, 0) };
        // SAFETY: no word.
        unsafe { stream(8, &[]) };
        drain();
    }

    #[test]
    fn the_instruction_is_one_that_the_processor_has() {
        let name = instruction();
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        if cfg!(target_arch = "x86_64") {
            assert!(
                cpuinfo.split_whitespace().any(|flag| flag == name),
                "{name}"
            );
        } else {
            assert!(!name.is_empty());
        }
    }
}
