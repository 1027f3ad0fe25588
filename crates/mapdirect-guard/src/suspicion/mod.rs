//! Whether what a thread is doing can concern a file. Pure.
//!
//! A thread is judged by the functions on its kernel stack, which nobody can
//! forge, and never by memory of its process. The question is always about one
//! short way through the kernel, between the moment a gate let something pass
//! (before it knew of the file) and the moment the kernel counts it:
//!
//! * **Truncation by path** needs no description. `vfs_truncate` (fs/open.c)
//!   asks the gate (`fsnotify_truncate_perm`), takes a write reference of the
//!   mount (`mnt_want_write`), and then counts as a writer of the inode
//!   (`get_write_access`) before it does anything else: before it waits for
//!   leases, asks a security module or the filesystem. A lease sees it from
//!   then on. So a thread that *sleeps* is in the way only if it waits there
//!   for a thaw, or for the answer of another listener that the gate asked
//!   before or after us; whoever sleeps deeper (in somebody's lease, in a
//!   `FUSE_SETATTR` without an answer) is counted, and whoever sleeps earlier
//!   (in a path look-up) will meet the gate. One that was taken off its
//!   processor between these calls is in the way until it runs again.
//! * **`open(O_TRUNC)`** counts as a reader from before the gate is asked
//!   (`do_dentry_open`), so the lease that excludes readers sees it. Where
//!   readers are let be, it is in the way until it counts as a writer
//!   (`handle_truncate`): in the filesystem's own `open`, or behind that.
//! * **Changes** through a description that is in no table any more. Its
//!   function of the VFS is on the stack, and right below the operation of the
//!   filesystem, which must be this file's. Where the VFS itself waits the
//!   stack does not tell whose file it is: a descriptor may ([`descriptors`]).

mod names;
#[cfg(test)]
mod tests;

use self::names::{
    BEFORE_OR_COUNTED, CHANGING, IDLE, NOT_A_FILE, SHARING, is_between, is_machinery,
    waits_for_answer, waits_for_thaw,
};
use mapdirect_sys::proc::Syscall;

/// What is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LookFor {
    /// Truncations by path that no count shows yet.
    Truncations,
    /// The same where readers are let be: opens that will truncate, too.
    AllTruncations,
    /// Opens that are past the gate and show in no table yet.
    Opens,
    /// Whatever may change a block map.
    Changes,
    /// The part of that for which reading is enough: sharing blocks, and
    /// truncation by path.
    #[cfg_attr(not(feature = "bpf"), allow(dead_code, reason = "for the bpf gate"))]
    ChangesByReaders,
    /// Making mappings.
    Mappings,
}

/// The names that functions of a filesystem begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Prefix(pub(crate) &'static str);

impl Prefix {
    fn is_of(self, function: &str) -> bool {
        function.trim_start_matches('_').starts_with(self.0)
    }
}

/// What a stack says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finding {
    /// It cannot concern the file.
    Nothing,
    /// It may.
    May(&'static str),
    /// It may, unless the descriptors it was called with are of other files.
    MayByDescriptor(&'static str),
    /// It may if this filesystem is frozen.
    IfFrozen(&'static str),
    /// It may if somebody has a lease on the file.
    IfLeased(&'static str),
    /// It may if another listener watches the file.
    IfWatched(&'static str),
}

/// Whether the function that a thread sleeps in says already that it cannot
/// concern the file: its stack need not be read.
pub(crate) fn is_elsewhere(look_for: LookFor, function: &str) -> bool {
    IDLE.contains(&function)
        || look_for == LookFor::Truncations
            && (BEFORE_OR_COUNTED.contains(&function) || function.starts_with("fuse_"))
}

/// What the functions from the innermost one out to the one asked about say.
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
    /// Called before the gate is asked, or when the inode counts a writer.
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

/// Opens past the gate; those that truncate, if `truncates`, until that is
/// counted.
fn opening(functions: &[&str], prefix: Prefix, truncates: bool) -> Finding {
    const DOING: &str = "in the middle of opening something";
    /// Files that are none of a filesystem, and waits before the gate.
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
    // Right where the VFS is: taken off its processor, or in somebody's lease.
    let is_of_vfs = |function: &&str| {
        outer.contains(function)
            || is_machinery(function)
            || function.starts_with("security_")
            || function.starts_with("ima_")
            || function.starts_with("process_measurement")
            || counted.contains(function)
    };
    if inner.iter().any(|name| name.contains("break_lease")) {
        // The holder has the file open already: nobody can have a lease on it
        // that an open for reading waits for.
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
    // From one file to another: while it reads from one, nothing tells of the
    // other.
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
/// registers say. Numbers of i386 that mean something else in this table
/// write to no file, so they are not met here.
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
