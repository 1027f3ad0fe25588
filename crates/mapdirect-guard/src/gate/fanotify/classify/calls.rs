//! System call numbers, and what they mean to the classifier.

/// What a system call number means to the classifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    /// Reads from its first argument, whatever the other arguments are.
    Read,
    /// `open`-like, with the flags in this argument.
    Open(usize),
    /// `creat`: writes and truncates.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(dead_code, reason = "arm64 has no such call")
    )]
    Creat,
    /// `execve` and `execveat`: the kernel opens for reading.
    Exec,
    /// Writes to its first argument: `write`, `writev`, `pwritev`.
    Write,
    /// `pwrite64(fd, buffer, count, offset)` on a 64-bit ABI.
    Pwrite,
    /// `pwritev2`, with the flags in the last argument.
    Pwritev2,
    /// `fallocate(fd, mode, offset, length)` on a 64-bit ABI.
    Fallocate,
    /// `madvise`; of its advices only `MADV_REMOVE` gets here.
    Madvise,
    /// `truncate` or `ftruncate` with a 64-bit size as second argument.
    Truncate,
    /// `mmap(address, length, prot, flags, fd, offset)`.
    Mmap,
    /// `sendfile(out, in, ...)`.
    Sendfile,
    /// `splice(in, offset, out, ...)`.
    Splice,
    /// `copy_file_range(in, offset, out, ...)`.
    CopyFileRange,
}

/// x86-64 numbers, and marked i386 numbers. Each of these i386 numbers means
/// something on x86-64 that raises no event, so both can stand in one table.
#[cfg(target_arch = "x86_64")]
pub(super) fn call(number: i64) -> Option<Call> {
    Some(match number {
        0 | 17 | 19 | 295 | 327 => Call::Read, // read, pread64, readv, preadv, preadv2
        2 => Call::Open(1),                    // open
        257 => Call::Open(2),                  // openat
        304 => Call::Open(2),                  // open_by_handle_at
        85 => Call::Creat,
        59 | 322 => Call::Exec,
        1 | 20 | 296 => Call::Write, // write, writev, pwritev
        18 => Call::Pwrite,
        328 => Call::Pwritev2,
        285 => Call::Fallocate,
        28 => Call::Madvise,
        76 | 77 => Call::Truncate,
        9 => Call::Mmap,
        40 => Call::Sendfile,
        275 => Call::Splice,
        326 => Call::CopyFileRange,
        _ => return None,
    })
}

/// i386 numbers that raise open events although the same x86-64 number raises
/// none (5 `fstat`, 8 `lseek`, 11 `munmap`, 295 `preadv`, 342 unused, 358
/// unused).
#[cfg(target_arch = "x86_64")]
pub(super) fn open_call(number: i64) -> Option<Call> {
    Some(match number {
        5 => Call::Open(1),         // open
        295 | 342 => Call::Open(2), // openat, open_by_handle_at
        8 => Call::Creat,
        11 | 358 => Call::Exec,
        other => return call(other),
    })
}

#[cfg(target_arch = "aarch64")]
pub(super) fn call(number: i64) -> Option<Call> {
    Some(match number {
        63 | 65 | 67 | 69 | 286 => Call::Read, // read, readv, pread64, preadv, preadv2
        56 => Call::Open(2),                   // openat
        265 => Call::Open(2),                  // open_by_handle_at
        221 | 281 => Call::Exec,
        64 | 66 | 70 => Call::Write, // write, writev, pwritev
        68 => Call::Pwrite,
        287 => Call::Pwritev2,
        47 => Call::Fallocate,
        233 => Call::Madvise,
        45 | 46 => Call::Truncate,
        222 => Call::Mmap,
        71 => Call::Sendfile,
        76 => Call::Splice,
        285 => Call::CopyFileRange,
        _ => return None,
    })
}

/// 32-bit ARM numbers are not recognised: unknown opens are refused.
#[cfg(target_arch = "aarch64")]
pub(super) fn open_call(number: i64) -> Option<Call> {
    call(number)
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) fn call(_number: i64) -> Option<Call> {
    None
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) fn open_call(number: i64) -> Option<Call> {
    call(number)
}
