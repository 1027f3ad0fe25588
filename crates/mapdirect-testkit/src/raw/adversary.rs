//! System calls made as somebody makes them who wants to be misunderstood:
//! with junk in the halves of registers that the kernel does not look at,
//! under another call's name, through contexts that are kept.

use super::{Errno, PlainMap, Result, Uring, checked, of_io, of_result, signed};
use crate::fault::{self, Access};
use io_uring::{IoUring, opcode, squeue, types};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::AtomicU64;

/// How the scheduler treats a process, compared to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// As any.
    Normal,
    /// As one that computes.
    Batch,
    /// Behind all others: it is preempted wherever it is.
    Idle,
}

/// Has the scheduler treat the calling thread so.
pub fn set_priority(priority: Priority) -> Result<()> {
    let policy = match priority {
        Priority::Normal => libc::SCHED_OTHER,
        Priority::Batch => libc::SCHED_BATCH,
        Priority::Idle => libc::SCHED_IDLE,
    };
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: reads the structure.
    let ret = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    checked(ret.into()).map(drop)
}

/// Has the calling process killed if it is still there after so many seconds.
pub fn end_after(seconds: u32) {
    // SAFETY: takes a number only.
    unsafe { libc::alarm(seconds) };
}

/// Counters that a process shares with its children. They live as long as the
/// last of these.
pub fn shared_counters(number: usize) -> Result<&'static [AtomicU64]> {
    // SAFETY: no address is asked for.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            number * size_of::<AtomicU64>(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(Errno::NOMEM);
    }
    // SAFETY: zeroed memory of that size, aligned to pages, never unmapped,
    // and only ever accessed through atomics.
    Ok(unsafe { std::slice::from_raw_parts(address.cast::<AtomicU64>(), number) })
}

/// A call of this number with these registers, whatever is in them.
///
/// # Safety
///
/// That of the call that the kernel makes of it.
#[cfg(target_arch = "x86_64")]
unsafe fn call(number: u64, arguments: [u64; 6]) -> Result<u64> {
    let ret: i64;
    // SAFETY: the caller's promise.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number => ret,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            in("r8") arguments[4],
            in("r9") arguments[5],
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    of_call(ret)
}

#[cfg(target_arch = "x86_64")]
fn of_call(ret: i64) -> Result<u64> {
    of_result(ret).map(i64::cast_unsigned)
}

/// Calls of x86-64 with junk in the upper halves of the registers of which
/// the kernel looks at the lower ones only.
#[cfg(target_arch = "x86_64")]
pub mod junk {
    use super::{AsRawFd, BorrowedFd, Result, call};

    /// What is in the upper halves.
    const JUNK: u64 = 0x7a5a_0005 << 32;

    fn fd(file: BorrowedFd<'_>) -> u64 {
        JUNK | u64::from(file.as_raw_fd().cast_unsigned())
    }

    /// `pwrite64`.
    pub fn pwrite(file: BorrowedFd<'_>, bytes: &[u8], offset: u64) -> Result<u64> {
        let (start, length) = (bytes.as_ptr() as u64, bytes.len() as u64);
        // SAFETY: reads the bytes.
        unsafe { call(JUNK | 18, [fd(file), start, length, offset, JUNK, JUNK]) }
    }

    /// `fallocate`.
    pub fn fallocate(file: BorrowedFd<'_>, mode: i32, offset: u64, length: u64) -> Result<u64> {
        let mode = JUNK | u64::from(mode.cast_unsigned());
        // SAFETY: integers only.
        unsafe { call(JUNK | 285, [fd(file), mode, offset, length, JUNK, JUNK]) }
    }

    /// `ftruncate`.
    pub fn ftruncate(file: BorrowedFd<'_>, size: u64) -> Result<u64> {
        // SAFETY: integers only.
        unsafe { call(JUNK | 77, [fd(file), size, JUNK, JUNK, JUNK, JUNK]) }
    }

    /// `copy_file_range`.
    pub fn copy(
        from: BorrowedFd<'_>,
        mut from_offset: i64,
        to: BorrowedFd<'_>,
        mut to_offset: i64,
        length: u64,
    ) -> Result<u64> {
        let offsets = [&raw mut from_offset as u64, &raw mut to_offset as u64];
        // SAFETY: reads and writes the two offsets.
        unsafe {
            call(
                JUNK | 326,
                [fd(from), offsets[0], fd(to), offsets[1], length, JUNK],
            )
        }
    }

    /// `ioctl` with `FICLONE`.
    pub fn clone(to: BorrowedFd<'_>, from: BorrowedFd<'_>) -> Result<u64> {
        let request = JUNK | 0x4004_9409;
        let from = u64::from(from.as_raw_fd().cast_unsigned());
        // SAFETY: integers only.
        unsafe { call(JUNK | 16, [fd(to), request, from, JUNK, JUNK, JUNK]) }
    }
}

/// Calls of i386 made by a 64-bit program, with junk in the upper halves of
/// all registers.
#[cfg(target_arch = "x86_64")]
pub mod junk_compat {
    use super::{AsRawFd, BorrowedFd, Errno, Result, of_call};

    const JUNK: u64 = 0x8000_0005 << 32;

    /// # Safety
    ///
    /// That of the call that the kernel makes of it.
    unsafe fn call(number: u32, arguments: [u32; 6]) -> Result<u64> {
        let wide = arguments.map(|argument| JUNK | u64::from(argument));
        let ret: i64;
        // SAFETY: the caller's promise. rbx and rbp are saved around the
        // call, since LLVM keeps both for itself.
        unsafe {
            std::arch::asm!(
                "push rbx",
                "push rbp",
                "mov rbx, r8",
                "mov rbp, r9",
                "int 0x80",
                "pop rbp",
                "pop rbx",
                inlateout("rax") u64::from(number) | JUNK => ret,
                inlateout("r8") wide[0] => _,
                inlateout("rcx") wide[1] => _,
                inlateout("rdx") wide[2] => _,
                inlateout("rsi") wide[3] => _,
                inlateout("rdi") wide[4] => _,
                inlateout("r9") wide[5] => _,
                lateout("r10") _,
                lateout("r11") _,
            );
        }
        // The result is 32 bits wide.
        #[expect(clippy::cast_possible_truncation, reason = "the lower half is meant")]
        let ret = ret as i32;
        of_call(ret.into())
    }

    fn fd(file: BorrowedFd<'_>) -> u32 {
        file.as_raw_fd().cast_unsigned()
    }

    fn halves(value: u64) -> (u32, u32) {
        let low = u32::try_from(value & 0xffff_ffff).unwrap_or(0);
        (low, u32::try_from(value >> 32).unwrap_or(0))
    }

    /// A page that 32-bit pointers reach.
    #[derive(Debug)]
    pub struct LowPage(u32);

    impl LowPage {
        /// A new one, which stays as long as the process.
        pub fn new() -> Result<Self> {
            // SAFETY: no address is asked for.
            let address = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    4096,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
                    -1,
                    0,
                )
            };
            u32::try_from(address as usize)
                .map(Self)
                .map_err(|_| Errno::NOMEM)
        }
    }

    /// `pwrite64` of the beginning of a page.
    pub fn pwrite(file: BorrowedFd<'_>, page: &LowPage, length: u32, offset: u64) -> Result<u64> {
        let (low, high) = halves(offset);
        // SAFETY: reads at most the page.
        unsafe { call(181, [fd(file), page.0, length.min(4096), low, high, 0]) }
    }

    /// `fallocate`.
    pub fn fallocate(file: BorrowedFd<'_>, mode: i32, offset: u64, length: u64) -> Result<u64> {
        let ((low, high), (length_low, length_high)) = (halves(offset), halves(length));
        let mode = mode.cast_unsigned();
        // SAFETY: integers only.
        unsafe { call(324, [fd(file), mode, low, high, length_low, length_high]) }
    }

    /// `ftruncate64`.
    pub fn ftruncate(file: BorrowedFd<'_>, size: u64) -> Result<u64> {
        let (low, high) = halves(size);
        // SAFETY: integers only.
        unsafe { call(194, [fd(file), low, high, 0, 0, 0]) }
    }

    /// `ioctl` with `FICLONE`.
    pub fn clone(to: BorrowedFd<'_>, from: BorrowedFd<'_>) -> Result<u64> {
        // SAFETY: integers only.
        unsafe { call(54, [fd(to), 0x4004_9409, fd(from), 0, 0, 0]) }
    }
}

/// A context of Linux aio that is kept: setting one up takes longer than most
/// writes.
#[derive(Debug)]
pub struct Aio(u64);

impl Aio {
    /// Sets one up.
    pub fn new() -> Result<Self> {
        let mut context = 0u64;
        // SAFETY: writes one context id.
        checked(unsafe { libc::syscall(libc::SYS_io_setup, 4, &raw mut context) })?;
        Ok(Self(context))
    }

    /// Writes, and waits for it.
    pub fn write(
        &self,
        file: BorrowedFd<'_>,
        bytes: &[u8],
        offset: u64,
        flags: i32,
    ) -> Result<i64> {
        // The layout of `struct iocb` in words: the flags are in the second,
        // opcode 1 (PWRITE) and the descriptor in the third; buffer, length
        // and offset follow.
        let mut block = [0u64; 8];
        block[1] = u64::from(flags.cast_unsigned()) << 32;
        block[2] = 1 | u64::from(file.as_raw_fd().cast_unsigned()) << 32;
        block[3] = bytes.as_ptr() as u64;
        block[4] = bytes.len() as u64;
        block[5] = signed(offset).cast_unsigned();
        let mut blocks = [block.as_mut_ptr()];
        // SAFETY: one control block whose buffer outlives the wait below.
        let submitted =
            unsafe { libc::syscall(libc::SYS_io_submit, self.0, 1, blocks.as_mut_ptr()) };
        checked(submitted)?;
        let mut event = [0i64; 4];
        // SAFETY: room for one event; no timeout.
        let events = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.0,
                1,
                1,
                event.as_mut_ptr(),
                std::ptr::null_mut::<libc::timespec>(),
            )
        };
        checked(events)?;
        of_result(event[2])
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // SAFETY: the context made above; nothing of it is in flight.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

/// An io_uring that is kept.
pub struct Ring {
    ring: IoUring,
    how: Uring,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("how", &self.how).finish()
    }
}

impl Ring {
    /// Sets one up whose requests are executed so.
    pub fn new(how: Uring) -> Result<Self> {
        let mut builder = IoUring::builder();
        if how == Uring::Polled {
            builder.setup_sqpoll(50);
        }
        let ring = builder.build(4).map_err(|error| of_io(&error))?;
        Ok(Self { ring, how })
    }

    fn submit(&mut self, entry: squeue::Entry) -> Result<i32> {
        let entry = if self.how == Uring::Worker {
            entry.flags(squeue::Flags::ASYNC)
        } else {
            entry
        };
        // SAFETY: the callers keep what the entry points to until the
        // completion is there.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| Errno::NOMEM)?;
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => break,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(of_io(&error)),
            }
        }
        let completion = self.ring.completion().next().ok_or(Errno::IO)?;
        of_result(completion.result().into())
            .map(|result| i32::try_from(result).unwrap_or(i32::MAX))
    }

    /// `IORING_OP_WRITE`.
    pub fn write(
        &mut self,
        file: BorrowedFd<'_>,
        bytes: &[u8],
        offset: u64,
        flags: i32,
    ) -> Result<i32> {
        let length = u32::try_from(bytes.len()).map_err(|_| Errno::INVAL)?;
        let entry = opcode::Write::new(types::Fd(file.as_raw_fd()), bytes.as_ptr(), length);
        self.submit(entry.offset(offset).rw_flags(flags).build())
    }

    /// `IORING_OP_FALLOCATE`.
    pub fn fallocate(
        &mut self,
        file: BorrowedFd<'_>,
        mode: i32,
        offset: u64,
        length: u64,
    ) -> Result<i32> {
        let entry = opcode::Fallocate::new(types::Fd(file.as_raw_fd()), length);
        self.submit(entry.offset(offset).mode(mode).build())
    }

    /// `IORING_OP_FTRUNCATE`.
    pub fn ftruncate(&mut self, file: BorrowedFd<'_>, size: u64) -> Result<i32> {
        let entry = opcode::Ftruncate::new(types::Fd(file.as_raw_fd()), size).build();
        self.submit(entry)
    }

    /// Has a write of `bytes` follow as soon as `pipe` can be read from, and
    /// does not wait: it is made wherever this thread next does the work that
    /// is left to it.
    pub fn write_after(
        &mut self,
        pipe: BorrowedFd<'_>,
        file: BorrowedFd<'_>,
        bytes: &'static [u8],
        offset: u64,
    ) -> Result<()> {
        let readable = u32::try_from(libc::POLLIN).unwrap_or(1);
        let poll = opcode::PollAdd::new(types::Fd(pipe.as_raw_fd()), readable)
            .build()
            .flags(squeue::Flags::IO_LINK);
        let length = u32::try_from(bytes.len()).map_err(|_| Errno::INVAL)?;
        let write = opcode::Write::new(types::Fd(file.as_raw_fd()), bytes.as_ptr(), length)
            .offset(offset)
            .build();
        for entry in [poll, write] {
            // SAFETY: the bytes live for ever.
            unsafe { self.ring.submission().push(&entry) }.map_err(|_| Errno::NOMEM)?;
        }
        self.ring.submit().map(drop).map_err(|error| of_io(&error))
    }

    /// What came of [`write_after`](Self::write_after).
    pub fn result_of_write_after(&mut self) -> Result<i32> {
        while self.ring.completion().len() < 2 {
            self.ring
                .submit_and_wait(2)
                .map_err(|error| of_io(&error))?;
        }
        let results: Vec<i32> = self.ring.completion().map(|entry| entry.result()).collect();
        let last = results.last().copied().unwrap_or(-libc::EIO);
        of_result(last.into()).map(|result| i32::try_from(result).unwrap_or(i32::MAX))
    }
}

/// The offset of the `pwrite64` that a thread with a [`Notifier`] is told does
/// not exist.
pub const ANNOUNCED: u64 = 8192;

/// Somebody who is asked about each `pwrite64` at [`ANNOUNCED`] of another
/// thread of this process.
#[derive(Debug)]
pub struct Notifier(OwnedFd);

impl Notifier {
    /// Has the calling thread, and what it starts, ask from now on. Returns
    /// whom.
    pub fn install() -> Result<Self> {
        const LOAD: u16 = 0x20;
        const EQUAL: u16 = 0x15;
        const RETURN: u16 = 0x06;
        const ALLOW: u32 = 0x7fff_0000;
        const ASK: u32 = 0x7fc0_0000;
        const NEW_LISTENER: u32 = 1 << 3;
        const WAIT_KILLABLE_RECV: u32 = 1 << 5;
        let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
        let announced = u32::try_from(ANNOUNCED).unwrap_or(0);
        let mut program = [
            // `struct seccomp_data`: the number, and the lower half of the
            // fourth argument.
            step(LOAD, 0, 0, 0),
            step(EQUAL, 0, 3, 18),
            step(LOAD, 0, 0, 16 + 3 * 8),
            step(EQUAL, 0, 1, announced),
            step(RETURN, 0, 0, ASK),
            step(RETURN, 0, 0, ALLOW),
        ];
        let program = libc::sock_fprog {
            len: 6,
            filter: program.as_mut_ptr(),
        };
        // SAFETY: takes numbers only.
        checked(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
        // SAFETY: reads the program, which is as long as it says.
        let listener = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                NEW_LISTENER | WAIT_KILLABLE_RECV,
                &raw const program,
            )
        };
        let listener = i32::try_from(checked(listener)?).unwrap_or(-1);
        // SAFETY: the kernel just returned it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(listener) }))
    }

    /// Waits for a call, does `meanwhile`, and has the call fail with ENOSYS.
    pub fn answer(&self, meanwhile: impl FnOnce()) -> Result<()> {
        const RECEIVE: libc::c_ulong = 0xc050_2100;
        const SEND: libc::c_ulong = 0xc018_2101;
        let mut asked = [0u64; 10];
        // SAFETY: writes a `struct seccomp_notif`, which has 80 bytes.
        let ret = unsafe { libc::ioctl(self.0.as_raw_fd(), RECEIVE, asked.as_mut_ptr()) };
        checked(ret.into())?;
        meanwhile();
        let error = u64::from((-libc::ENOSYS).cast_unsigned());
        let mut answer = [asked[0], 0, error];
        // SAFETY: reads a `struct seccomp_notif_resp`, which has 24 bytes.
        let ret = unsafe { libc::ioctl(self.0.as_raw_fd(), SEND, answer.as_mut_ptr()) };
        checked(ret.into()).map(drop)
    }
}

impl PlainMap {
    /// Makes it longer, wherever there is room (`mremap(2)`).
    pub fn grow(&mut self, length: usize) -> Result<()> {
        // SAFETY: nobody has a reference to the mapping.
        let moved =
            unsafe { libc::mremap(self.pointer(), self.length, length, libc::MREMAP_MAYMOVE) };
        checked(if moved == libc::MAP_FAILED { -1 } else { 0 })?;
        self.address = moved.expose_provenance();
        self.length = length;
        Ok(())
    }

    /// Asks for another mapping at the same place (`mmap(2)` with
    /// `MAP_FIXED_NOREPLACE` in `flags`), which there is no room for.
    pub fn another(&self, file: BorrowedFd<'_>, prot: i32, flags: i32, offset: u64) -> Result<()> {
        let flags = flags | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: with this flag nothing is replaced.
        let made = unsafe {
            mapdirect_sys::mmap::map(self.address, self.length, prot, flags, file, offset)
        };
        made.map(drop)
    }

    /// Has its first page show another page of the file
    /// (`remap_file_pages(2)`).
    pub fn show_page(&self, page: usize) -> Result<()> {
        // SAFETY: nobody has a reference to the mapping.
        let ret =
            unsafe { libc::syscall(libc::SYS_remap_file_pages, self.address, 4096, 0, page, 0) };
        checked(ret).map(drop)
    }

    /// Stores a byte, or says which signal that raised.
    #[must_use]
    pub fn try_store(&self, at: usize, value: u8) -> Access {
        assert!(at < self.length);
        // SAFETY: inside the mapping, by the assertion.
        unsafe { fault::store(self.address + at, value) }
    }
}
