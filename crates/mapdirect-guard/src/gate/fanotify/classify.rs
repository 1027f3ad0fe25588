//! Turns what a blocked thread is doing into an [`Operation`]. Pure.
//!
//! fanotify tells that something is about to happen and where, but not what.
//! The kernel functions that the thread is inside of tell that. They do not
//! depend on the ABI, they work for io_uring and for kernel threads, and nobody
//! can forge them. The registers with which the thread entered the kernel add
//! detail, if they are genuine and the system call number is unambiguous across
//! ABIs. An i386 call shows its own numbers, unmarked, so a number counts only
//! if no other ABI uses it for anything that could raise this event. An
//! operation that cannot be identified is judged as the worst it can be.

mod calls;

use self::calls::{Call, call, open_call};
use crate::policy::{Operation, OperationKind as K};
use mapdirect_sys::proc::Syscall;
use std::ops::Range;

/// The registers with which a thread entered the kernel, if they belong to what
/// the thread does now. On the way back from any system call a thread may do
/// other work first: `io_uring` operations that were waiting for something, or
/// a core dump.
#[must_use]
pub(crate) fn own_registers<'a>(
    syscall: Option<&'a Syscall>,
    functions: &[&str],
) -> Option<&'a Syscall> {
    let borrowed = functions.iter().any(|function| {
        // Functions that wait for a device do not count.
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

/// Whether the thread is inside of a system call that opens a file.
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

/// The kind of an open.
#[must_use]
pub(crate) fn classify_open(syscall: Option<&Syscall>, functions: &[&str]) -> K {
    let own = own_registers(syscall, functions).filter(|_| is_opening(functions));
    let Some(syscall) = own else {
        // An io_uring worker or a kernel thread (nfsd, for example) shows no
        // flags. The open of swapon(2) is in its caller.
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
        // change them. io_uring submits anything; acct(2), swapon(2) and others
        // open, too.
        _ => K::OpenTruncate,
    }
}

/// A better word for an operation than that of its kind, which may only be the
/// worst that it could be.
pub(crate) fn word(kind: K, call: Option<&Syscall>, functions: &[&str]) -> Option<&'static str> {
    let number = call.map(|call| call.number);
    let inside = |name: &str| functions.iter().any(|function| function.contains(name));
    match kind {
        K::OpenTruncate => match number.and_then(open_call) {
            // The flags are known, and say so.
            Some(Call::Open(_) | Call::Creat) if is_opening(functions) => None,
            _ if inside("_sys_swapon") => Some("swapon"),
            _ if inside("_sys_acct") => Some("acct"),
            // Nobody can see what such an open is for: openat2(2) and io_uring
            // keep its flags in memory of the program.
            _ => Some("open-unseen"),
        },
        _ => None,
    }
}

/// Questions about a thread's descriptors. They are asked only when the answer
/// decides.
pub(crate) trait Descriptors {
    /// Whether descriptor `fd` of the thread refers to the watched inode.
    fn is_watched(&self, fd: i32) -> bool;
    /// Whether descriptor `fd` of the thread cannot write.
    fn is_read_only(&self, fd: i32) -> bool;
    /// The open flags of descriptor `fd` of the thread, or `None` if they
    /// cannot be found out. This is asked only about a descriptor by which the
    /// thread writes to the watched file, and only a holder has one.
    fn flags(&self, fd: i32) -> Option<u32>;
}

/// A pre-content event and the thread that waits for its answer.
#[derive(Debug)]
pub(crate) struct Asked<'event> {
    /// The range of the event, `(offset, count)`, extended to whole pages.
    pub(crate) range: Option<(u64, u64)>,
    /// The thread's registers.
    pub(crate) syscall: Option<&'event Syscall>,
    /// The kernel functions that the thread is inside of, innermost first.
    pub(crate) functions: &'event [&'event str],
    /// Whether the filesystem can share blocks between files.
    pub(crate) reflink: bool,
    /// Size of the file in bytes.
    pub(crate) size: u64,
}

/// Whether a function is part of the notification machinery itself. Its frames
/// lie above the function that asked.
pub(crate) fn is_machinery(function: &str) -> bool {
    function.starts_with("fanotify_")
        || function.starts_with("fsnotify")
        || function.starts_with("__fsnotify")
        // Frames of the sleep, in case the kernel does not leave them out.
        || function == "schedule"
        || function == "__schedule"
}

/// Whether a stack reaches to the place where the thread entered the kernel or
/// began in it. These are the names of x86-64 and arm64. Without one of them an
/// event takes longer to judge.
pub(crate) fn is_whole(functions: &[&str]) -> bool {
    functions.last().is_some_and(|function| {
        ["entry_", "asm_", "ret_from_fork", "el0"]
            .iter()
            .any(|start| function.starts_with(start))
    })
}

/// Whether a thread that waits at the gate reads, judged by its whole stack.
/// The stack must show frames of the gate, the function that asks before a read
/// or a write, and one that only reads. [`classify`] then gives the same
/// result, whatever the registers are.
///
/// A thread may be woken for a moment while its stack is read, and then the
/// frames inside the wait change. The frames outside of the wait stay until the
/// answer, so a frame of the gate must come first.
pub(crate) fn reads(functions: &[&str]) -> bool {
    let waits = |function: &str| function.starts_with("fanotify_");
    let mut inside = functions
        .iter()
        .copied()
        .skip_while(|function| !waits(function))
        .skip_while(|function| is_machinery(function));
    inside.next() == Some("rw_verify_area") && inside.next().is_some_and(only_reads)
}

/// Whether a function that asks through `rw_verify_area` does so before a read.
fn only_reads(caller: &str) -> bool {
    matches!(
        caller,
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
            | "do_splice_to"
    )
}

/// Finds out what the thread is doing.
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
        "do_ftruncate" | "do_sys_ftruncate" | "ksys_ftruncate" => classify_truncate(asked, &range),
        // Holders may write, and make the file grow, until this takes effect.
        // Only holders truncate by a descriptor.
        "vfs_truncate" | "do_sys_truncate" => Operation {
            late: true,
            ..classify_truncate(asked, &range)
        },
        "remap_verify_area" => classify_remap(caller, range),
        "vm_mmap_pgoff" => classify_mmap(asked, range, descriptors),
        _ => unknown,
    }
}

/// The system call, if its registers are the thread's own and mean what the
/// table says in every ABI that could have raised a pre-content event.
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
        _ if only_reads(caller) => Operation::new(K::Read, range),
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
            // sendfile(out, in): the same function asks about both files.
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
        // This function asks about both files, too. If blocks can be shared,
        // they will be.
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

/// A transfer into descriptor `into`. If that is another file, the transfer
/// only reads the watched file. Only a holder has a descriptor by which a
/// pinned file can be written, so nobody else gains anything by exchanging the
/// descriptor meanwhile.
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

/// A write that may append. An append goes to the end of the file and not to
/// the place that the event names.
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
    // io_uring. Only XFS with reflink remaps blocks for such a write.
    let untorn = asked.reflink
        && match genuine(asked) {
            Some((Call::Pwritev2, args)) => args[5] & RWF_ATOMIC != 0,
            _ => matches!(caller, "aio_write" | "io_write"),
        };
    let kind = if untorn { K::WriteUntorn } else { K::Write };
    // The event is extended to whole pages; the registers are exact.
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
        // The write goes to the end of the file, wherever the end is by then,
        // whatever its offset says.
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
    // A count of 0 means up to the end of the file.
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
mod tests;
