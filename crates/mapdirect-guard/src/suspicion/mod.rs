//! Decides whether what a thread is doing can concern a file. Pure.
//!
//! A thread is judged by the functions on its kernel stack, which nobody can
//! forge, and never by the memory of its process. The question is always about
//! one short way through the kernel: from the moment when a gate let something
//! pass, before it knew of the file, to the moment when the kernel counts that
//! operation.
//!
//! * **Truncation by path** needs no description. `vfs_truncate` (fs/open.c)
//!   asks the gate (`fsnotify_truncate_perm`) and takes a write reference of
//!   the mount (`mnt_want_write`). It then counts as a writer of the inode
//!   (`get_write_access`) before it does anything else: before it waits for
//!   leases, or asks a security module or the filesystem. From then on a lease
//!   sees it. So a *sleeping* thread is a suspect only if it waits on this way
//!   for a thaw, or for the answer of another listener that the gate asked
//!   before or after this guard. A thread that sleeps deeper (in somebody's
//!   lease, in a `FUSE_SETATTR` without an answer) is counted. A thread that
//!   sleeps earlier (in a path look-up) will meet the gate. A thread that was
//!   taken off its processor between these calls is a suspect until it runs
//!   again.
//! * **`open(O_TRUNC)`** counts as a reader from before the gate is asked
//!   (`do_dentry_open`), so a lease that excludes readers sees it. When readers
//!   are permitted, the thread is a suspect until it counts as a writer
//!   (`handle_truncate`): in the filesystem's own `open`, or after that.
//! * **Changes** may go through a description that is in no table any more. The
//!   VFS function of such a change is on the stack, and right below it the
//!   filesystem's operation, which must be of this file's filesystem. If the
//!   VFS itself waits, the stack does not tell which file the call is about,
//!   but a descriptor may ([`descriptors`]).

mod names;
#[cfg(test)]
mod tests;

use self::names::{
    BEFORE_OR_COUNTED, CHANGING, IDLE, NOT_A_FILE, SHARING, is_between, is_machinery,
    waits_for_answer, waits_for_thaw,
};
use mapdirect_sys::proc::Syscall;

/// The kind of operation that is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LookFor {
    /// Truncations by path that no count shows yet.
    Truncations,
    /// The same when readers are permitted: includes opens that will truncate.
    AllTruncations,
    /// Opens that are past the gate but in no descriptor table yet.
    Opens,
    /// Anything that may change a block map.
    Changes,
    /// The changes for which reading is enough: sharing blocks, and truncation
    /// by path.
    #[cfg_attr(not(feature = "bpf"), allow(dead_code, reason = "for the bpf gate"))]
    ChangesByReaders,
    /// Making mappings.
    Mappings,
}

/// The prefix of the names of a filesystem's functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Prefix(pub(crate) &'static str);

impl Prefix {
    fn is_of(self, function: &str) -> bool {
        function.trim_start_matches('_').starts_with(self.0)
    }
}

/// What a stack says about a thread and a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finding {
    /// The thread cannot concern the file.
    Nothing,
    /// The thread may concern the file.
    May(&'static str),
    /// It may, unless the descriptors of its call are of other files.
    MayByDescriptor(&'static str),
    /// It may, if the file's filesystem is frozen.
    IfFrozen(&'static str),
    /// It may, if somebody has a lease on the file.
    IfLeased(&'static str),
    /// It may, if another listener watches the file.
    IfWatched(&'static str),
}

/// Whether the function in which a thread sleeps already shows that the thread
/// cannot concern the file. Its stack then need not be read.
pub(crate) fn is_elsewhere(look_for: LookFor, function: &str) -> bool {
    IDLE.contains(&function)
        || look_for == LookFor::Truncations
            && (BEFORE_OR_COUNTED.contains(&function) || function.starts_with("fuse_"))
}

/// What the innermost functions say, up to the function in question.
fn waiting(inner: &[&str], doing: &'static str) -> Option<Finding> {
    if inner.iter().any(|function| waits_for_answer(function)) {
        return Some(Finding::IfWatched(doing));
    }
    if inner.iter().any(|function| waits_for_thaw(function)) {
        return Some(Finding::IfFrozen(doing));
    }
    None
}

/// Judges a thread by its stack, innermost function first.
pub(crate) fn judge(look_for: LookFor, functions: &[&str], prefix: Prefix) -> Finding {
    match look_for {
        LookFor::Truncations => truncation(functions),
        LookFor::AllTruncations => match truncation(functions) {
            Finding::Nothing => opening(functions, prefix, true),
            found => found,
        },
        LookFor::Opens => opening(functions, prefix, false),
        LookFor::Changes => match truncation(functions) {
            Finding::Nothing => change(&CHANGING, functions, prefix),
            found => found,
        },
        LookFor::ChangesByReaders => match truncation(functions) {
            Finding::Nothing => change(&SHARING, functions, prefix),
            found => found,
        },
        LookFor::Mappings => mapping(functions),
    }
}

fn find(functions: &[&str], names: &[&str]) -> Option<usize> {
    functions
        .iter()
        .position(|function| names.contains(function))
}

fn truncation(functions: &[&str]) -> Finding {
    const DOING: &str = "in the middle of truncate(2)";
    const WINDOW: [&str; 4] = [
        "vfs_truncate",
        "do_sys_truncate",
        "ksys_truncate",
        "do_truncate_path",
    ];
    /// Functions that are called before the gate is asked, or when the inode
    /// already counts a writer.
    const OUTSIDE: [&str; 15] = [
        "do_truncate",
        "notify_change",
        "break_lease",
        "__break_lease",
        "security_path_truncate",
        "put_write_access",
        "mnt_drop_write",
        "user_path_at",
        "user_path_at_empty",
        "filename_lookup",
        "path_lookupat",
        "getname_flags",
        "inode_permission",
        "path_put",
        "mntput_no_expire",
    ];
    let Some(at) = find(functions, &WINDOW) else {
        return Finding::Nothing;
    };
    let inner = &functions[..at];
    if find(inner, &OUTSIDE).is_some() {
        return Finding::Nothing;
    }
    waiting(inner, DOING).unwrap_or(Finding::May(DOING))
}

/// Judges an open that is past the gate. With `truncates`, only opens that
/// truncate count, until the inode counts them as writers.
fn opening(functions: &[&str], prefix: Prefix, truncates: bool) -> Finding {
    const DOING: &str = "in the middle of opening something";
    /// Files that are on no filesystem, and waits before the gate.
    const ELSEWHERE: [&str; 8] = [
        "fifo_open",
        "chrdev_open",
        "blkdev_open",
        "link_path_walk",
        "open_last_lookups",
        "lookup_open",
        "lookup_slow",
        "inode_permission",
    ];
    let outer = [
        "do_dentry_open",
        "vfs_open",
        "handle_truncate",
        "do_open",
        "path_openat",
        "dentry_open",
    ];
    let Some(at) = find(functions, &outer) else {
        return Finding::Nothing;
    };
    let inner = &functions[..at];
    let counted = ["do_truncate", "notify_change"];
    if find(inner, &ELSEWHERE).is_some() || truncates && find(inner, &counted).is_some() {
        return Finding::Nothing;
    }
    if inner.iter().any(|function| prefix.is_of(function)) {
        return Finding::May(DOING);
    }
    if let Some(found) = waiting(inner, DOING) {
        return found;
    }
    // The thread is in the VFS itself: it was taken off its processor, or waits
    // in somebody's lease.
    let is_of_vfs = |function: &&str| {
        outer.contains(function)
            || is_machinery(function)
            || function.starts_with("security_")
            || function.starts_with("ima_")
            || function.starts_with("process_measurement")
            || counted.contains(function)
    };
    if inner.iter().any(|name| name.contains("break_lease")) {
        // The holder already has the file open, so nobody can have a lease on
        // it for which an open for reading waits.
        return if truncates {
            Finding::Nothing
        } else {
            Finding::IfLeased(DOING)
        };
    }
    match inner.last() {
        None => Finding::May(DOING),
        Some(callee) if is_of_vfs(callee) => Finding::May(DOING),
        Some(_) => Finding::Nothing,
    }
}

fn change(names: &'static [&'static str], functions: &[&str], prefix: Prefix) -> Finding {
    let Some(at) = functions.iter().rposition(|name| names.contains(name)) else {
        return Finding::Nothing;
    };
    let Some(doing) = names.iter().copied().find(|name| *name == functions[at]) else {
        return Finding::Nothing;
    };
    let inner = &functions[..at];
    let is_of_a_filesystem = |name: &str| name.starts_with("xfs_") || name.starts_with("ext4_");
    if is_of_a_filesystem(doing) && !prefix.is_of(doing) {
        return Finding::Nothing;
    }
    if find(inner, &NOT_A_FILE).is_some() {
        return Finding::Nothing;
    }
    if prefix.is_of(doing) || inner.iter().any(|function| prefix.is_of(function)) {
        return Finding::May(doing);
    }
    if let Some(found) = waiting(inner, doing) {
        return found;
    }
    // These calls go from one file to another. While they read from one,
    // nothing tells which the other is.
    let from_file = [
        "do_sendfile",
        "do_splice_direct",
        "splice_direct_to_actor",
        "vfs_copy_file_range",
        "splice_file_range",
    ];
    let writes = find(inner, &["direct_splice_actor", "direct_file_splice_actor"]).is_some();
    let reads = from_file.contains(&doing) && !writes;
    match inner.iter().rev().find(|name| !is_between(name)) {
        Some(_) if !reads => Finding::Nothing,
        _ => Finding::MayByDescriptor(doing),
    }
}

fn mapping(functions: &[&str]) -> Finding {
    const DOING: &str = "in the middle of mapping something";
    const MAPPING: [&str; 5] = [
        "vm_mmap_pgoff",
        "ksys_mmap_pgoff",
        "do_mmap",
        "do_shmat",
        "__do_sys_remap_file_pages",
    ];
    find(functions, &MAPPING).map_or(Finding::Nothing, |at| {
        waiting(&functions[..at], DOING).unwrap_or(Finding::May(DOING))
    })
}

/// The descriptors through which a system call can change a file, if the
/// registers tell. The i386 numbers that mean something else in this table
/// write to no file, so they do not occur here.
pub(crate) fn descriptors(syscall: &Syscall) -> Option<Vec<i32>> {
    if !syscall.is_genuine() {
        return None;
    }
    let arguments: &[usize] = match syscall.number {
        // write, pwrite64, writev, fcntl, ftruncate, fallocate, pwritev, pwritev2
        #[cfg(target_arch = "x86_64")]
        1 | 18 | 20 | 72 | 77 | 285 | 296 | 328 => &[0],
        // sendfile
        #[cfg(target_arch = "x86_64")]
        40 => &[0, 1],
        // splice, copy_file_range
        #[cfg(target_arch = "x86_64")]
        275 | 326 => &[0, 2],
        #[cfg(target_arch = "aarch64")]
        64 | 68 | 66 | 25 | 46 | 47 | 70 | 287 => &[0],
        #[cfg(target_arch = "aarch64")]
        71 => &[0, 1],
        #[cfg(target_arch = "aarch64")]
        76 | 285 => &[0, 2],
        _ => return None,
    };
    let descriptor = |at: &usize| {
        // The kernel takes an int and ignores the upper half.
        u32::try_from(syscall.args[*at] & 0xffff_ffff)
            .ok()
            .map(u32::cast_signed)
    };
    arguments.iter().map(descriptor).collect()
}
