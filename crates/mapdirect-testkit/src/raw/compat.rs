//! Calls as a 32-bit program makes them: `int 0x80`, numbers and register
//! layout of i386. The kernel takes them from any program.

use super::{Errno, Result, c_path, owned};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Whether this kernel takes i386 calls.
#[must_use]
pub fn available() -> bool {
    // getpid
    call(20, [0; 6]).is_ok()
}

fn call(number: u32, args: [u32; 6]) -> Result<u32> {
    let ret: i32;
    // SAFETY: enters the kernel as an i386 call; memory the kernel may
    // touch is named by 32-bit pointers that the callers made. rbx and
    // rbp are saved around the call, since LLVM keeps both for itself.
    unsafe {
        std::arch::asm!(
            "push rbx",
            "push rbp",
            "mov ebx, r8d",
            "mov ebp, r9d",
            "int 0x80",
            "pop rbp",
            "pop rbx",
            inlateout("eax") number => ret,
            inlateout("r8d") args[0] => _,
            in("ecx") args[1],
            in("edx") args[2],
            in("esi") args[3],
            in("edi") args[4],
            inlateout("r9d") args[5] => _,
            // The kernel clears these on the way back to 32-bit code.
            lateout("r10") _,
            lateout("r11") _,
        );
    }
    if (-4095..0).contains(&ret) {
        Err(Errno::from_raw_os_error(-ret))
    } else {
        Ok(ret.cast_unsigned())
    }
}

fn halves(value: u64) -> (u32, u32) {
    let low = u32::try_from(value & 0xffff_ffff).unwrap_or(0);
    let high = u32::try_from(value >> 32).unwrap_or(0);
    (low, high)
}

fn number(file: BorrowedFd<'_>) -> u32 {
    file.as_raw_fd().cast_unsigned()
}

/// Memory that 32-bit pointers reach, with `bytes` in it.
struct Low {
    address: usize,
    length: usize,
}

impl Low {
    fn new(bytes: &[u8]) -> Result<Self> {
        let length = bytes.len().max(1);
        // SAFETY: a fresh anonymous mapping.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(Errno::NOMEM);
        }
        // SAFETY: as long as the source, and just mapped.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), address.cast(), bytes.len());
        }
        Ok(Self {
            address: address.expose_provenance(),
            length,
        })
    }

    fn pointer(&self) -> u32 {
        u32::try_from(self.address).unwrap_or(0)
    }
}

impl Drop for Low {
    fn drop(&mut self) {
        // SAFETY: nothing refers to it any more.
        let _ = unsafe { mapdirect_sys::mmap::unmap(self.address, self.length) };
    }
}

/// `open`.
pub fn open(path: &Path, flags: i32) -> Result<OwnedFd> {
    let path = Low::new(c_path(path).as_bytes_with_nul())?;
    let flags = (flags | libc::O_CLOEXEC | 0o100_000).cast_unsigned(); // O_LARGEFILE
    call(5, [path.pointer(), flags, 0o644, 0, 0, 0]).map(|fd| owned(fd.into()))
}

/// `pread64`.
pub fn pread(file: BorrowedFd<'_>, length: usize, offset: u64) -> Result<u32> {
    let buffer = Low::new(&vec![0; length])?;
    let (low, high) = halves(offset);
    let length = u32::try_from(length).unwrap_or(0);
    call(180, [number(file), buffer.pointer(), length, low, high, 0])
}

/// `pwrite64`.
pub fn pwrite(file: BorrowedFd<'_>, bytes: &[u8], offset: u64) -> Result<u32> {
    let buffer = Low::new(bytes)?;
    let (low, high) = halves(offset);
    let length = u32::try_from(bytes.len()).unwrap_or(0);
    call(181, [number(file), buffer.pointer(), length, low, high, 0])
}

/// `fallocate`.
pub fn fallocate(file: BorrowedFd<'_>, mode: i32, offset: u64, length: u64) -> Result<()> {
    let (low, high) = halves(offset);
    let (len_low, len_high) = halves(length);
    let mode = mode.cast_unsigned();
    call(324, [number(file), mode, low, high, len_low, len_high]).map(drop)
}

/// `ftruncate64`.
pub fn ftruncate(file: BorrowedFd<'_>, size: u64) -> Result<()> {
    let (low, high) = halves(size);
    call(194, [number(file), low, high, 0, 0, 0]).map(drop)
}

/// `truncate64`.
pub fn truncate(path: &Path, size: u64) -> Result<()> {
    let path = Low::new(c_path(path).as_bytes_with_nul())?;
    let (low, high) = halves(size);
    call(193, [path.pointer(), low, high, 0, 0, 0]).map(drop)
}

/// `ioctl` with an integer argument.
pub fn ioctl_value(file: BorrowedFd<'_>, request: u32, argument: u32) -> Result<()> {
    call(54, [number(file), request, argument, 0, 0, 0]).map(drop)
}
