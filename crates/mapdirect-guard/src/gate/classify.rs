//! From what a blocked thread is doing to an [`Operation`]. Pure.
//!
//! fanotify tells that something is about to happen and where, not what. The
//! kernel functions the thread is inside of tell: they are independent of the
//! ABI, of io_uring and of kernel threads, and nobody can forge them. The
//! registers it entered with refine that where they are genuine and the
//! number is unambiguous across ABIs: an i386 call shows its own numbers,
//! unmarked, so a number counts only if no other ABI uses it for anything
//! that could raise this event. What nobody knows is judged as the worst it
//! can be.

use crate::policy::{Operation, OperationKind as K};
use mapdirect_sys::proc::Syscall;
use std::ops::Range;

/// What a system call number means to the classifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    /// Reads from its first argument, whatever the rest.
    Read,
    /// `open`-like, with the flags in this argument.
    Open(usize),
    /// `creat`: writes and truncates.
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

/// x86-64 numbers, and the i386 numbers (marked) that mean something else on
/// x86-64 which raises no event, so that both can stand in one table.
#[cfg(target_arch = "x86_64")]
fn call(number: i64) -> Option<Call> {
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

/// i386 numbers that raise open events where the same x86-64 number raises
/// none (5 `fstat`, 8 `lseek`, 11 `munmap`, 295 `preadv`, 342 unused, 358
/// unused).
#[cfg(target_arch = "x86_64")]
fn open_call(number: i64) -> Option<Call> {
    Some(match number {
        5 => Call::Open(1),         // open
        295 | 342 => Call::Open(2), // openat, open_by_handle_at
        8 => Call::Creat,
        11 | 358 => Call::Exec,
        other => return call(other),
    })
}

#[cfg(target_arch = "aarch64")]
fn call(number: i64) -> Option<Call> {
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

/// 32-bit ARM numbers are not looked at: unknown opens are refused.
#[cfg(target_arch = "aarch64")]
fn open_call(number: i64) -> Option<Call> {
    call(number)
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn call(_number: i64) -> Option<Call> {
    None
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn open_call(number: i64) -> Option<Call> {
    call(number)
}

/// The registers a thread entered the kernel with, if what it does now is
/// what it asked for with them. On the way back from any system call it may
/// do other work first: operations of `io_uring` that were waiting for
/// something, a core dump.
#[must_use]
pub(crate) fn own_registers<'a>(
    syscall: Option<&'a Syscall>,
    functions: &[&str],
) -> Option<&'a Syscall> {
    let borrowed = functions.iter().any(|function| {
        // Not those that wait for a device.
        function.starts_with("io_") && !function.starts_with("io_schedule")
            || function.starts_with("__io_")
            || function.starts_with("tctx_")
            || matches!(
                *function,
                "task_work_run" | "get_signal" | "do_coredump" | "vfs_coredump"
            )
    });
    syscall.filter(|syscall| !borrowed && syscall.is_genuine())
}

/// Whether the thread is inside of a system call that opens.
fn is_opening(functions: &[&str]) -> bool {
    functions.iter().any(|function| {
        function.starts_with("do_sys_open")
            || function.contains("_sys_open")
            || function.contains("_sys_creat")
            || function.contains("_sys_exec")
            || function.starts_with("do_execve")
            || *function == "do_handle_open"
            || *function == "do_open_execat"
            || *function == "open_exec"
    })
}

/// What an `open` is for.
#[must_use]
pub(crate) fn classify_open(syscall: Option<&Syscall>, functions: &[&str]) -> K {
    let own = own_registers(syscall, functions).filter(|_| is_opening(functions));
    let Some(syscall) = own else {
        // An io_uring worker, a kernel thread (nfsd, swapon's own open is in
        // the caller): no flags to be seen.
        return K::OpenTruncate;
    };
    match open_call(syscall.number) {
        Some(Call::Open(flags)) => {
            // The flags are an int; the upper half of the register is noise.
            let flags = syscall.args[flags] & 0xffff_ffff;
            if flags & (libc::O_TRUNC.cast_unsigned() as u64) != 0 {
                K::OpenTruncate
            } else if flags & 0o3 == 0 {
                K::OpenRead
            } else {
                K::OpenWrite
            }
        }
        Some(Call::Exec) => K::OpenRead,
        // openat2 keeps its flags in user memory, where another thread may
        // change them; io_uring submits whatever; acct(2), swapon(2), ...
        _ => K::OpenTruncate,
    }
}

/// Questions about a thread's descriptors, asked only where the answer
/// decides.
pub(crate) trait Descriptors {
    /// Whether descriptor `fd` of the thread refers to the watched inode.
    fn is_watched(&self, fd: i32) -> bool;
    /// Whether descriptor `fd` of the thread cannot write.
    fn is_read_only(&self, fd: i32) -> bool;
    /// The open flags of descriptor `fd` of the thread; `None` if they cannot
    /// be told. Asked only about a descriptor that the thread writes to the
    /// watched file by, which only a holder has.
    fn flags(&self, fd: i32) -> Option<u32>;
}

/// A pre-content event and the thread that waits for its answer.
#[derive(Debug)]
pub(crate) struct Asked<'event> {
    /// Range of the event, `(offset, count)`, rounded out to pages.
    pub(crate) range: Option<(u64, u64)>,
    /// The thread's registers.
    pub(crate) syscall: Option<&'event Syscall>,
    /// The kernel functions it is inside of, innermost first.
    pub(crate) functions: &'event [&'event str],
    /// The filesystem can share blocks between files.
    pub(crate) reflink: bool,
    /// Size of the file in bytes.
    pub(crate) size: u64,
}

/// Functions of the notification machinery itself: the frames above the one
/// that asked.
pub(crate) fn is_machinery(function: &str) -> bool {
    function.starts_with("fanotify_")
        || function.starts_with("fsnotify")
        || function.starts_with("__fsnotify")
        // Frames of the sleep, where the kernel does not leave them out.
        || function == "schedule"
        || function == "__schedule"
}

/// Whether a stack reaches to where the thread entered the kernel, or began
/// in it. Names of x86-64 and arm64; without one of them an event takes longer
/// to judge.
pub(crate) fn is_whole(functions: &[&str]) -> bool {
    functions.last().is_some_and(|function| {
        ["entry_", "asm_", "ret_from_fork", "el0"]
            .iter()
            .any(|start| function.starts_with(start))
    })
}

/// What the thread is doing.
#[must_use]
pub(crate) fn classify(asked: &Asked<'_>, descriptors: &impl Descriptors) -> Operation {
    let everything = 0..u64::MAX;
    let unknown = Operation::new(K::Unknown, everything.clone());
    let mut frames = asked
        .functions
        .iter()
        .copied()
        .skip_while(|function| is_machinery(function));
    let (Some(hook), caller) = (frames.next(), frames.next().unwrap_or("")) else {
        return unknown;
    };
    let range = match asked.range {
        Some((offset, count)) => offset..offset.saturating_add(count),
        None => everything.clone(),
    };
    match hook {
        "rw_verify_area" => classify_rw(asked, caller, range, descriptors),
        "vfs_fallocate" => classify_fallocate(asked, range),
        "do_ftruncate" | "do_sys_ftruncate" | "ksys_ftruncate" | "vfs_truncate"
        | "do_sys_truncate" => classify_truncate(asked, &range),
        "remap_verify_area" => classify_remap(caller, range),
        "vm_mmap_pgoff" => classify_mmap(asked, range, descriptors),
        _ => unknown,
    }
}

/// The call, if its registers are the thread's own and mean what the table
/// says in every ABI that could have raised a pre-content event.
fn genuine(asked: &Asked<'_>) -> Option<(Call, [u64; 6])> {
    let syscall = own_registers(asked.syscall, asked.functions)?;
    Some((call(syscall.number)?, syscall.args))
}

pub(crate) fn descriptor(register: u64) -> i32 {
    // The kernel takes an unsigned int and ignores the upper half.
    u32::try_from(register & 0xffff_ffff)
        .unwrap_or(u32::MAX)
        .cast_signed()
}

fn classify_rw(
    asked: &Asked<'_>,
    caller: &str,
    range: Range<u64>,
    descriptors: &impl Descriptors,
) -> Operation {
    match caller {
        "vfs_read"
        | "vfs_readv"
        | "do_iter_read"
        | "vfs_iter_read"
        | "vfs_iocb_iter_read"
        | "aio_read"
        | "io_read"
        | "__io_read"
        | "kernel_read"
        | "__kernel_read"
        | "vfs_splice_read"
        | "do_splice_read"
        | "splice_file_to_pipe"
        | "do_splice_to" => Operation::new(K::Read, range),
        "vfs_write"
        | "vfs_writev"
        | "do_iter_write"
        | "vfs_iter_write"
        | "vfs_iocb_iter_write"
        | "aio_write"
        | "io_write"
        | "kernel_write"
        | "__kernel_write"
        | "__kernel_write_iter" => classify_write(asked, caller, range, descriptors),
        "do_sendfile" => {
            // sendfile(out, in): the same function asks about both sides.
            let into = genuine(asked).filter(|(call, _)| *call == Call::Sendfile);
            transfer(
                into.map(|(_, args)| descriptor(args[0])),
                range,
                asked,
                descriptors,
            )
        }
        "do_splice" | "__do_splice" => {
            let into = genuine(asked).filter(|(call, _)| *call == Call::Splice);
            transfer(
                into.map(|(_, args)| descriptor(args[2])),
                range,
                asked,
                descriptors,
            )
        }
        // Both sides again. Where blocks can be shared they will be.
        "vfs_copy_file_range" if asked.reflink => Operation::new(K::CopyRange, range),
        "vfs_copy_file_range" => {
            let into = genuine(asked).filter(|(call, _)| *call == Call::CopyFileRange);
            transfer(
                into.map(|(_, args)| descriptor(args[2])),
                range,
                asked,
                descriptors,
            )
        }
        _ => Operation::new(K::Unknown, 0..u64::MAX),
    }
}

/// A transfer into descriptor `into`: a read of the watched file if that is
/// another file. Nobody but a holder has a descriptor of a pinned file to
/// write to, so nobody else can gain by exchanging it meanwhile.
fn transfer(
    into: Option<i32>,
    range: Range<u64>,
    asked: &Asked<'_>,
    descriptors: &impl Descriptors,
) -> Operation {
    match into {
        Some(into) if !descriptors.is_watched(into) => Operation::new(K::Read, range),
        _ => may_append(Operation::new(K::Write, range), asked.size),
    }
}

/// A write that may append: then it goes to the end of file and not where the
/// event says.
fn may_append(mut operation: Operation, size: u64) -> Operation {
    let length = operation.range.end.saturating_sub(operation.range.start);
    operation.or = Some(size..size.saturating_add(length));
    operation
}

fn classify_write(
    asked: &Asked<'_>,
    caller: &str,
    range: Range<u64>,
    descriptors: &impl Descriptors,
) -> Operation {
    const RWF_APPEND: u64 = 0x10;
    const RWF_ATOMIC: u64 = 0x40;
    // The flag of an untorn write hides in the control blocks of aio and
    // io_uring; only XFS with reflink remaps for it.
    let untorn = asked.reflink
        && match genuine(asked) {
            Some((Call::Pwritev2, args)) => args[5] & RWF_ATOMIC != 0,
            _ => matches!(caller, "aio_write" | "io_write"),
        };
    let kind = if untorn { K::WriteUntorn } else { K::Write };
    // The event is rounded out to pages, the registers are exact.
    let exact = match genuine(asked) {
        Some((Call::Pwrite, args)) if args[2] > 0 && within(&range, args[3], args[2]) => {
            args[3]..args[3] + args[2]
        }
        _ => range,
    };
    let length = exact.end.saturating_sub(exact.start);
    let beyond = asked.size..asked.size.saturating_add(length);
    let Some((call @ (Call::Write | Call::Pwrite | Call::Pwritev2), args)) = genuine(asked) else {
        return may_append(Operation::new(kind, exact), asked.size);
    };
    let flags = descriptors.flags(descriptor(args[0]));
    let has = |flag: i32| flags.is_none_or(|flags| flags & flag.cast_unsigned() != 0);
    let mut operation = if call == Call::Pwritev2 && args[5] & RWF_APPEND != 0 {
        // It goes to the end of file, whatever its offset says, and wherever
        // that is by then.
        let mut operation = Operation::new(kind, beyond.clone());
        operation.or = Some(beyond);
        operation
    } else if has(libc::O_APPEND) {
        may_append(Operation::new(kind, exact), asked.size)
    } else {
        Operation::new(kind, exact)
    };
    operation.direct = has(libc::O_DIRECT);
    operation
}

/// Whether `length` bytes at `offset` lie inside `range`, without overflow.
fn within(range: &Range<u64>, offset: u64, length: u64) -> bool {
    offset >= range.start && length <= range.end.saturating_sub(offset)
}

fn classify_fallocate(asked: &Asked<'_>, range: Range<u64>) -> Operation {
    const KEEP_SIZE: u64 = 0x01;
    const PUNCH_HOLE: u64 = 0x02;
    const COLLAPSE_RANGE: u64 = 0x08;
    const ZERO_RANGE: u64 = 0x10;
    const INSERT_RANGE: u64 = 0x20;
    const UNSHARE_RANGE: u64 = 0x40;
    const WRITE_ZEROES: u64 = 0x80;
    match genuine(asked) {
        Some((Call::Fallocate, args)) => {
            let exact = if within(&range, args[2], args[3]) {
                args[2]..args[2] + args[3]
            } else {
                range
            };
            let kind = match args[1] & 0xffff_ffff {
                0 => K::Allocate,
                KEEP_SIZE => K::AllocateKeepSize,
                mode if mode & PUNCH_HOLE != 0 => K::PunchHole,
                mode if mode & COLLAPSE_RANGE != 0 => K::CollapseRange,
                mode if mode & INSERT_RANGE != 0 => K::InsertRange,
                mode if mode & ZERO_RANGE != 0 => K::ZeroRange,
                mode if mode & UNSHARE_RANGE != 0 => K::UnshareRange,
                mode if mode & WRITE_ZEROES != 0 => K::WriteZeroes,
                _ => K::Reshape,
            };
            Operation::new(kind, exact)
        }
        Some((Call::Madvise, _)) => Operation::new(K::PunchHole, range),
        _ => Operation::new(K::Reshape, range),
    }
}

fn classify_truncate(asked: &Asked<'_>, range: &Range<u64>) -> Operation {
    // The event starts at the page of the new size and has a count only if
    // the size lies inside the page.
    let sizes = match genuine(asked) {
        Some((Call::Truncate, args))
            if args[1] >= range.start && args[1] <= range.end.max(range.start) =>
        {
            args[1]..args[1]
        }
        _ => range.clone(),
    };
    Operation::new(K::Truncate, sizes)
}

fn classify_remap(caller: &str, range: Range<u64>) -> Operation {
    // A count of 0 means to the end of the file.
    let range = if range.is_empty() {
        range.start..u64::MAX
    } else {
        range
    };
    let kind = match caller {
        "vfs_clone_file_range" | "do_clone_file_range" | "generic_remap_file_range_prep" => {
            K::Clone
        }
        "vfs_dedupe_file_range" | "vfs_dedupe_file_range_one" => K::Dedupe,
        "vfs_copy_file_range" => K::CopyRange,
        _ => K::Exchange,
    };
    Operation::new(kind, range)
}

fn classify_mmap(
    asked: &Asked<'_>,
    range: Range<u64>,
    descriptors: &impl Descriptors,
) -> Operation {
    const MAP_TYPE: u64 = 0x0f;
    const MAP_PRIVATE: u64 = 0x02;
    match genuine(asked) {
        Some((Call::Exec, _)) => Operation::new(K::MapRead, range),
        Some((Call::Mmap, args)) if args[3] & MAP_TYPE == MAP_PRIVATE => {
            Operation::new(K::MapRead, range)
        }
        // mprotect(2) can add PROT_WRITE later, unless the description is
        // read-only.
        Some((Call::Mmap, args)) if descriptors.is_read_only(descriptor(args[4])) => {
            Operation::new(K::MapRead, range)
        }
        _ => Operation::new(K::MapWrite, range),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Fds {
        watched: &'static [i32],
        flags: Option<u32>,
    }

    impl Descriptors for Fds {
        fn is_watched(&self, fd: i32) -> bool {
            self.watched.contains(&fd)
        }
        fn is_read_only(&self, _fd: i32) -> bool {
            self.flags.is_some_and(|flags| flags & 0o3 == 0)
        }
        fn flags(&self, _fd: i32) -> Option<u32> {
            self.flags
        }
    }

    const NO_FDS: Fds = Fds {
        watched: &[],
        flags: None,
    };

    fn syscall(number: i64, args: [u64; 6]) -> Syscall {
        Syscall {
            number,
            args,
            sp: 0x7ffe,
            pc: 0x7f00,
        }
    }

    fn asked<'a>(
        functions: &'a [&'a str],
        syscall: Option<&'a Syscall>,
        range: (u64, u64),
        reflink: bool,
    ) -> Asked<'a> {
        Asked {
            range: Some(range),
            syscall,
            functions,
            reflink,
            size: 1 << 20,
        }
    }

    const TOP: [&str; 4] = [
        "fanotify_handle_event",
        "fsnotify",
        "__fsnotify_parent",
        "fsnotify_pre_content",
    ];

    fn stack<'a>(frames: &[&'a str]) -> Vec<&'a str> {
        [&TOP[..], frames].concat()
    }

    fn kind(frames: &[&str], call: Option<&Syscall>, reflink: bool) -> K {
        let functions = stack(frames);
        classify(&asked(&functions, call, (4096, 4096), reflink), &NO_FDS).kind
    }

    /// Stacks as 6.18 shows them.
    #[test]
    fn stacks_of_a_real_kernel() {
        for (frames, reflink, expected) in [
            (
                &["rw_verify_area", "vfs_read", "ksys_read"][..],
                true,
                K::Read,
            ),
            (&["rw_verify_area", "vfs_readv", "do_preadv"], true, K::Read),
            (
                &["rw_verify_area", "io_read", "io_issue_sqe"],
                true,
                K::Read,
            ),
            (
                &["rw_verify_area", "vfs_write", "ksys_write"],
                true,
                K::Write,
            ),
            (
                &["rw_verify_area", "io_write", "io_issue_sqe"],
                false,
                K::Write,
            ),
            (
                &["rw_verify_area", "io_write", "io_issue_sqe"],
                true,
                K::WriteUntorn,
            ),
            (&["rw_verify_area", "aio_write"], true, K::WriteUntorn),
            (
                &["rw_verify_area", "vfs_copy_file_range"],
                true,
                K::CopyRange,
            ),
            (&["rw_verify_area", "vfs_copy_file_range"], false, K::Write),
            (&["rw_verify_area", "do_sendfile"], true, K::Write),
            (&["rw_verify_area", "something_new"], true, K::Unknown),
            (&["vfs_fallocate", "io_fallocate"], true, K::Reshape),
            (&["do_ftruncate", "do_sys_ftruncate"], true, K::Truncate),
            (&["vfs_truncate", "__x64_sys_truncate"], true, K::Truncate),
            (
                &["remap_verify_area", "vfs_clone_file_range"],
                true,
                K::Clone,
            ),
            (
                &["remap_verify_area", "vfs_dedupe_file_range_one"],
                true,
                K::Dedupe,
            ),
            (
                &["remap_verify_area", "xfs_exchange_range"],
                true,
                K::Exchange,
            ),
            (&["vm_mmap_pgoff", "ksys_mmap_pgoff"], true, K::MapWrite),
            (&["a_hook_of_the_future"], true, K::Unknown),
            (&[], true, K::Unknown),
        ] {
            assert_eq!(kind(frames, None, reflink), expected, "{frames:?}");
        }
    }

    #[cfg(target_arch = "x86_64")]
    mod x86_64 {
        use super::*;

        #[test]
        fn opens_by_their_flags() {
            let o = |number, args| classify_open(Some(&syscall(number, args)), &["do_sys_openat2"]);
            let path = 0x7f00;
            assert_eq!(o(257, [0, path, 0o2000000, 0, 0, 0]), K::OpenRead);
            assert_eq!(o(257, [0, path, 0o2, 0, 0, 0]), K::OpenWrite);
            assert_eq!(o(257, [0, path, 0o1001, 0, 0, 0]), K::OpenTruncate);
            assert_eq!(o(257, [0, path, 0o1000, 0, 0, 0]), K::OpenTruncate);
            assert_eq!(o(257, [0, path, 0xdead_0000_0000, 0, 0, 0]), K::OpenRead);
            assert_eq!(o(2, [path, 0o1, 0, 0, 0, 0]), K::OpenWrite);
            assert_eq!(o(85, [path, 0, 0, 0, 0, 0]), K::OpenTruncate);
            assert_eq!(o(437, [0, path, 0x7000, 24, 0, 0]), K::OpenTruncate);
            assert_eq!(o(426, [3, 1, 1, 0, 0, 0]), K::OpenTruncate);
            assert_eq!(o(59, [path, 0, 0, 0, 0, 0]), K::OpenRead);
            // i386
            assert_eq!(o(5, [path, 0, 0, 0, 0, 0]), K::OpenRead);
            assert_eq!(o(5, [path, 0o2, 0, 0, 0, 0]), K::OpenWrite);
            assert_eq!(o(295, [0, path, 0, 0, 0, 0]), K::OpenRead);
            assert_eq!(o(8, [path, 0, 0, 0, 0, 0]), K::OpenTruncate);
        }

        #[test]
        fn a_worker_or_kernel_thread_hides_its_flags() {
            let mut borrowed = syscall(257, [0; 6]);
            borrowed.sp = 0;
            assert_eq!(
                classify_open(Some(&borrowed), &["do_sys_openat2"]),
                K::OpenTruncate
            );
            assert_eq!(classify_open(None, &["do_sys_openat2"]), K::OpenTruncate);
            // io_uring at the end of an openat that only reads.
            let open = syscall(257, [0; 6]);
            let late = [
                "do_filp_open",
                "io_openat2",
                "io_issue_sqe",
                "task_work_run",
            ];
            assert_eq!(classify_open(Some(&open), &late), K::OpenTruncate);
            assert_eq!(
                classify_open(Some(&open), &["do_filp_open"]),
                K::OpenTruncate
            );
            let waits = ["io_schedule", "do_sys_openat2"];
            assert_eq!(classify_open(Some(&open), &waits), K::OpenRead);
        }

        #[test]
        fn fallocate_by_its_mode_and_exact_range() {
            let frames = stack(&["vfs_fallocate", "__x64_sys_fallocate"]);
            for (mode, expected) in [
                (0, K::Allocate),
                (1, K::AllocateKeepSize),
                (3, K::PunchHole),
                (8, K::CollapseRange),
                (0x10, K::ZeroRange),
                (0x11, K::ZeroRange),
                (0x20, K::InsertRange),
                (0x40, K::UnshareRange),
                (0x80, K::WriteZeroes),
                (0x100, K::Reshape),
            ] {
                let call = syscall(285, [3, mode, 5000, 100, 0, 0]);
                let asked = asked(&frames, Some(&call), (4096, 4096), true);
                let operation = classify(&asked, &NO_FDS);
                assert_eq!(operation, Operation::new(expected, 5000..5100), "{mode:#x}");
            }
            // i386 fallocate has another number and splits its arguments.
            let call = syscall(324, [3, 3, 5000, 0, 100, 0]);
            let operation = classify(&asked(&frames, Some(&call), (4096, 4096), true), &NO_FDS);
            assert_eq!(operation, Operation::new(K::Reshape, 4096..8192));
        }

        #[test]
        fn truncation_by_its_size() {
            let frames = stack(&["do_ftruncate", "do_sys_ftruncate"]);
            let call = syscall(77, [3, 5000, 0, 0, 0, 0]);
            let operation = classify(&asked(&frames, Some(&call), (4096, 4096), true), &NO_FDS);
            assert_eq!(operation, Operation::new(K::Truncate, 5000..5000));
            let call = syscall(77, [3, 8192, 0, 0, 0, 0]);
            let operation = classify(&asked(&frames, Some(&call), (8192, 0), true), &NO_FDS);
            assert_eq!(operation, Operation::new(K::Truncate, 8192..8192));
            // i386 ftruncate64: only the page is known.
            let call = syscall(194, [3, 5000, 0, 0, 0, 0]);
            let operation = classify(&asked(&frames, Some(&call), (4096, 4096), true), &NO_FDS);
            assert_eq!(operation, Operation::new(K::Truncate, 4096..8192));
        }

        #[test]
        fn transfers_by_the_side_they_are_on() {
            let watched = Fds {
                watched: &[7],
                flags: None,
            };
            let frames = stack(&["rw_verify_area", "do_sendfile"]);
            let from = syscall(40, [5, 7, 0, 4096, 0, 0]);
            let into = syscall(40, [7, 5, 0, 4096, 0, 0]);
            let kind = |call| classify(&asked(&frames, Some(call), (0, 4096), true), &watched).kind;
            assert_eq!(kind(&from), K::Read);
            assert_eq!(kind(&into), K::Write);
        }

        #[test]
        fn mappings_by_what_they_allow() {
            let frames = stack(&["vm_mmap_pgoff", "ksys_mmap_pgoff"]);
            let kind = |call: &Syscall, flags| {
                let fds = Fds {
                    watched: &[],
                    flags,
                };
                classify(&asked(&frames, Some(call), (0, 4096), true), &fds).kind
            };
            let shared = syscall(9, [0, 4096, 1, 1, 3, 0]);
            assert_eq!(kind(&shared, Some(2)), K::MapWrite);
            assert_eq!(kind(&shared, None), K::MapWrite);
            assert_eq!(kind(&shared, Some(0)), K::MapRead);
            let private = syscall(9, [0, 4096, 3, 2, 3, 0]);
            assert_eq!(kind(&private, Some(2)), K::MapRead);
            let validate = syscall(9, [0, 4096, 3, 3, 3, 0]);
            assert_eq!(kind(&validate, Some(2)), K::MapWrite);
        }

        #[test]
        fn a_write_is_exact_and_appends_only_where_it_may() {
            let frames = stack(&["rw_verify_area", "vfs_write"]);
            let call = syscall(18, [3, 0x7f00, 10, 5000, 0, 0]);
            let operation = |flags| {
                let fds = Fds {
                    watched: &[],
                    flags,
                };
                classify(&asked(&frames, Some(&call), (4096, 4096), true), &fds)
            };
            let in_place = operation(Some(0o2));
            assert_eq!((in_place.range, in_place.or), (5000..5010, None));
            assert!(!in_place.direct && operation(Some(0o40_002)).direct);
            assert!(operation(None).direct, "it may be, for all we know");
            for flags in [None, Some(0o2002)] {
                let appending = operation(flags);
                assert_eq!(appending.range, 5000..5010);
                assert_eq!(appending.or, Some(1 << 20..(1 << 20) + 10));
            }
        }
    }

    proptest! {
        /// Whatever the registers say, the range judged covers the part of
        /// the event that a call within the event could touch.
        #[test]
        fn any_registers_are_taken(
            number in 0i64..500,
            args in any::<[u64; 6]>(),
            sp in any::<u64>(),
            offset in any::<u64>(),
            count in any::<u64>(),
            frame in proptest::sample::select(&[
                "rw_verify_area", "vfs_fallocate", "do_ftruncate", "remap_verify_area",
                "vm_mmap_pgoff", "other",
            ][..]),
            caller in proptest::sample::select(&[
                "vfs_read", "vfs_write", "do_sendfile", "do_splice", "vfs_copy_file_range",
                "io_write", "other",
            ][..]),
        ) {
            let call = Syscall { number, args, sp, pc: sp };
            let functions = stack(&[frame, caller]);
            let asked = asked(&functions, Some(&call), (offset, count), true);
            let _ = classify(&asked, &NO_FDS);
            let _ = classify_open(Some(&call), &[frame]);
        }
    }
}
