//! x86-64.

use std::arch::asm;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// Bytes in a cache line of every x86-64 processor.
const LINE: usize = 64;

const UNKNOWN: u8 = 0;
const CLFLUSH: u8 = 1;
const CLFLUSHOPT: u8 = 2;
const CLWB: u8 = 3;
/// Beside one of the others.
const AVX: u8 = 0x80;

#[inline]
fn means() -> u8 {
    static MEANS: AtomicU8 = AtomicU8::new(UNKNOWN);
    match MEANS.load(Relaxed) {
        UNKNOWN => {
            let found = detect();
            MEANS.store(found, Relaxed);
            found
        }
        known => known,
    }
}

#[cold]
fn detect() -> u8 {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    #[allow(
        unused_unsafe,
        reason = "CPUID is safe to ask for from some version of Rust on"
    )]
    // SAFETY: every x86-64 processor has the instruction.
    let most = unsafe { __cpuid(0) }.eax;
    let features = if most >= 7 {
        #[allow(unused_unsafe, reason = "as above")]
        // SAFETY: as above.
        unsafe { __cpuid_count(7, 0) }.ebx
    } else {
        0
    };
    let means = if features >> 24 & 1 == 1 {
        CLWB
    } else if features >> 23 & 1 == 1 {
        CLFLUSHOPT
    } else {
        CLFLUSH
    };
    // This check also asks whether the kernel saves the registers.
    if std::is_x86_feature_detected!("avx") {
        means | AVX
    } else {
        means
    }
}

pub(super) fn instruction() -> &'static str {
    match means() & !AVX {
        CLWB => "clwb",
        CLFLUSHOPT => "clflushopt",
        _ => "clflush",
    }
}

/// # Safety
///
/// As [`super::write_back`].
#[inline]
pub(super) unsafe fn write_back(address: usize, length: usize) {
    let end = address + length;
    let mut line = address & !(LINE - 1);
    macro_rules! each {
        ($instruction:literal) => {
            while line < end {
                // SAFETY: the line is mapped; it changes no byte. Without
                // `nomem`: stores before it stay before it.
                unsafe {
                    asm!(concat!($instruction, " [{}]"), in(reg) line, options(nostack, preserves_flags));
                }
                line += LINE;
            }
        };
    }
    if length == 0 {
        return;
    }
    match means() & !AVX {
        CLWB => each!("clwb"),
        CLFLUSHOPT => each!("clflushopt"),
        _ => each!("clflush"),
    }
}

#[inline]
pub(super) fn drain() {
    // SAFETY: a fence. Without `nomem`: what is stored before stays before.
    unsafe { asm!("sfence", options(nostack, preserves_flags)) };
}

/// # Safety
///
/// As [`super::stream`].
#[inline]
pub(super) unsafe fn stream(address: usize, bytes: &[u8]) {
    let mut to = address;
    let mut from = bytes.as_ptr();
    let end = address + bytes.len();
    // Up to the next line boundary, or the end.
    let head = end.min(address.next_multiple_of(LINE));
    // SAFETY: words of the range and of the slice.
    unsafe { stream_words(&mut to, &mut from, head) };
    let lines = end & !(LINE - 1);
    if to < lines {
        if means() & AVX != 0 {
            // SAFETY: whole lines; the processor has AVX.
            unsafe { stream_lines_avx(&mut to, &mut from, lines) };
        } else {
            // SAFETY: whole lines.
            unsafe { stream_lines(&mut to, &mut from, lines) };
        }
    }
    // SAFETY: the words left.
    unsafe { stream_words(&mut to, &mut from, end) };
}

/// # Safety
///
/// Whole words up to `end` in both.
#[inline]
unsafe fn stream_words(to: &mut usize, from: &mut *const u8, end: usize) {
    while *to < end {
        // SAFETY: a word of the source, which need not be aligned, and one of
        // the destination, which is.
        unsafe {
            asm!(
                "mov {word}, [{from}]",
                "movnti [{to}], {word}",
                from = in(reg) *from,
                to = in(reg) *to,
                word = out(reg) _,
                options(nostack, preserves_flags),
            );
        }
        *to += 8;
        *from = from.wrapping_add(8);
    }
}

/// # Safety
///
/// Whole lines up to `end` in both, `to` aligned to them.
unsafe fn stream_lines(to: &mut usize, from: &mut *const u8, end: usize) {
    // SAFETY: as the function asks for; SSE2 is part of x86-64.
    unsafe {
        asm!(
            "2:",
            "movdqu xmm0, [{from}]",
            "movdqu xmm1, [{from} + 16]",
            "movdqu xmm2, [{from} + 32]",
            "movdqu xmm3, [{from} + 48]",
            "movntdq [{to}], xmm0",
            "movntdq [{to} + 16], xmm1",
            "movntdq [{to} + 32], xmm2",
            "movntdq [{to} + 48], xmm3",
            "add {from}, 64",
            "add {to}, 64",
            "cmp {to}, {end}",
            "jb 2b",
            from = inout(reg) *from,
            to = inout(reg) *to,
            end = in(reg) end,
            out("xmm0") _,
            out("xmm1") _,
            out("xmm2") _,
            out("xmm3") _,
            options(nostack),
        );
    }
}

/// # Safety
///
/// As [`stream_lines`], on a processor with AVX.
#[target_feature(enable = "avx")]
unsafe fn stream_lines_avx(to: &mut usize, from: &mut *const u8, end: usize) {
    // SAFETY: as the function asks for.
    unsafe {
        asm!(
            "2:",
            "vmovdqu ymm0, [{from}]",
            "vmovdqu ymm1, [{from} + 32]",
            "vmovntdq [{to}], ymm0",
            "vmovntdq [{to} + 32], ymm1",
            "add {from}, 64",
            "add {to}, 64",
            "cmp {to}, {end}",
            "jb 2b",
            "vzeroupper",
            from = inout(reg) *from,
            to = inout(reg) *to,
            end = in(reg) end,
            out("ymm0") _,
            out("ymm1") _,
            // vzeroupper takes the upper halves of all of them.
            out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _,
            out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _,
            out("ymm10") _, out("ymm11") _, out("ymm12") _, out("ymm13") _,
            out("ymm14") _, out("ymm15") _,
            options(nostack),
        );
    }
}
