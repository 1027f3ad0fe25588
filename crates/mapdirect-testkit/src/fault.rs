//! Loads and stores that may raise a signal, and what came of them.
//!
//! The handler goes on behind the instruction that faulted; it takes SIGBUS
//! and SIGSEGV for the whole process, and passes on what is not ours by dying
//! of it.

use std::cell::Cell;
use std::sync::Once;

/// What came of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It went through; a load found this.
    Went(u8),
    /// SIGBUS with this code.
    Bus(i32),
    /// SIGSEGV with this code.
    Segv(i32),
}

impl Access {
    /// SIGBUS as memory raises it that has nothing behind it.
    pub const BUS_ADRERR: Self = Self::Bus(2);
}

thread_local! {
    /// Where to go on, and what happened.
    static RECOVER: Cell<usize> = const { Cell::new(0) };
    static SIGNAL: Cell<(i32, i32)> = const { Cell::new((0, 0)) };
}

extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let recover = RECOVER.get();
    if recover == 0 {
        // Not one of ours: once more, without us.
        // SAFETY: SIG_DFL runs no code.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    // SAFETY: the kernel passes a valid pointer to a handler with SA_SIGINFO.
    let code = unsafe { (*info).si_code };
    SIGNAL.set((signal, code));
    let context = context.cast::<libc::ucontext_t>();
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above; nobody else has the context.
    unsafe {
        (*context).uc_mcontext.gregs[libc::REG_RIP as usize] = recover as i64;
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        (*context).uc_mcontext.pc = recover as u64;
    }
}

fn prepare() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for signal in [libc::SIGBUS, libc::SIGSEGV] {
            // SAFETY: all zeros is a valid sigaction.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
            // SAFETY: the handler touches thread locals without destructors
            // and the context only.
            let ret = unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
            assert_eq!(ret, 0);
        }
    });
}

fn outcome(value: u8, faulted: u64) -> Access {
    RECOVER.set(0);
    match SIGNAL.replace((0, 0)) {
        _ if faulted == 0 => Access::Went(value),
        (libc::SIGBUS, code) => Access::Bus(code),
        (_, code) => Access::Segv(code),
    }
}

/// Loads the byte at an address of this process.
#[must_use]
pub fn load(address: usize) -> Access {
    prepare();
    let place = RECOVER.with(Cell::as_ptr);
    let value: u64;
    let faulted: u64;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: one load, which goes on at 2 if it faults; the address need not
    // be mapped.
    unsafe {
        std::arch::asm!(
            "lea {scratch}, [rip + 2f]",
            "mov [{place}], {scratch}",
            "mov {faulted}, 1",
            "movzx {value:e}, byte ptr [{address}]",
            "mov {faulted}, 0",
            "2:",
            scratch = out(reg) _,
            place = in(reg) place,
            address = in(reg) address,
            faulted = out(reg) faulted,
            value = inout(reg) 0u64 => value,
            options(nostack),
        );
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!(
            "adr {scratch}, 2f",
            "str {scratch}, [{place}]",
            "mov {faulted}, #1",
            "ldrb {value:w}, [{address}]",
            "mov {faulted}, #0",
            "2:",
            scratch = out(reg) _,
            place = in(reg) place,
            address = in(reg) address,
            faulted = out(reg) faulted,
            value = inout(reg) 0u64 => value,
            options(nostack),
        );
    }
    outcome(u8::try_from(value & 0xff).unwrap_or(0), faulted)
}

/// Stores a byte to an address of this process.
///
/// # Safety
///
/// What is there, if anything, must be memory whose bytes may change.
pub unsafe fn store(address: usize, value: u8) -> Access {
    prepare();
    let place = RECOVER.with(Cell::as_ptr);
    let faulted: u64;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: one store, which goes on at 2 if it faults; the caller answers
    // for the byte.
    unsafe {
        std::arch::asm!(
            "lea {scratch}, [rip + 2f]",
            "mov [{place}], {scratch}",
            "mov {faulted}, 1",
            "mov byte ptr [{address}], {value}",
            "mov {faulted}, 0",
            "2:",
            scratch = out(reg) _,
            place = in(reg) place,
            address = in(reg) address,
            faulted = out(reg) faulted,
            value = in(reg_byte) value,
            options(nostack),
        );
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!(
            "adr {scratch}, 2f",
            "str {scratch}, [{place}]",
            "mov {faulted}, #1",
            "strb {value:w}, [{address}]",
            "mov {faulted}, #0",
            "2:",
            scratch = out(reg) _,
            place = in(reg) place,
            address = in(reg) address,
            faulted = out(reg) faulted,
            value = in(reg) u32::from(value),
            options(nostack),
        );
    }
    outcome(value, faulted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_are_what_they_are() {
        let byte = Box::new(7u8);
        let address = std::ptr::from_ref(&*byte).expose_provenance();
        assert_eq!(load(address), Access::Went(7));
        assert!(matches!(load(8), Access::Segv(_)));
        // SAFETY: nothing is there.
        assert!(matches!(unsafe { store(16, 1) }, Access::Segv(_)));
        assert_eq!(load(address), Access::Went(7));
    }
}
