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

/// Where threads sleep that are in the middle of nothing at all.
const IDLE: [&str; 24] = [
    "futex_wait_queue",
    "futex_do_wait",
    "ep_poll",
    "do_epoll_wait",
    "poll_schedule_timeout",
    "do_select",
    "do_poll",
    "do_nanosleep",
    "hrtimer_nanosleep",
    "do_wait",
    "kernel_wait4",
    "sigsuspend",
    "do_sigtimedwait",
    "do_signal_stop",
    "ptrace_stop",
    "do_exit",
    "kthread",
    "kthreadd",
    "kthread_worker_fn",
    "worker_thread",
    "rescuer_thread",
    "smpboot_thread_fn",
    "rcu_gp_kthread",
    "io_wq_worker",
];

/// Where threads sleep that, if they truncate at all, are before the gate or
/// counted: see the head of this file.
const BEFORE_OR_COUNTED: [&str; 10] = [
    "__break_lease",
    "request_wait_answer",
    "pipe_read",
    "anon_pipe_read",
    "pipe_write",
    "anon_pipe_write",
    "pipe_wait_readable",
    "pipe_wait_writable",
    "unix_stream_read_generic",
    "exit_aio",
];

/// Whether the function that a thread sleeps in says already that it cannot
/// concern the file: its stack need not be read.
pub(crate) fn is_elsewhere(look_for: LookFor, function: &str) -> bool {
    IDLE.contains(&function)
        || look_for == LookFor::Truncations
            && (BEFORE_OR_COUNTED.contains(&function) || function.starts_with("fuse_"))
}

fn waits_for_thaw(function: &str) -> bool {
    function.starts_with("percpu_rwsem_wait")
        || function.starts_with("__percpu_down_read")
        || matches!(
            function,
            "percpu_down_read" | "mnt_want_write" | "sb_start_write" | "__sb_start_write"
        )
}

fn waits_for_answer(function: &str) -> bool {
    function.starts_with("fanotify_")
        || function.starts_with("fsnotify")
        || function.starts_with("__fsnotify")
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

/// Frames of the scheduler and of locks, which say nothing about whose.
fn is_machinery(function: &str) -> bool {
    function.starts_with("schedule")
        || function.starts_with("__schedule")
        || function.starts_with("preempt_schedule")
        || function.contains("cond_resched")
        || function.starts_with("down_")
        || function.starts_with("rwsem_down_")
        || function.contains("mutex_lock")
        || function.starts_with("asm_")
        || function.starts_with("irqentry_")
        || function.starts_with("raw_irqentry_")
        || function.starts_with("sysvec_")
}

/// The functions a thread is inside of while it changes a file.
const CHANGING: [&str; 35] = [
    "vfs_write",
    "vfs_writev",
    "vfs_iter_write",
    "vfs_iocb_iter_write",
    "do_iter_write",
    "aio_write",
    "io_write",
    "vfs_fallocate",
    "do_ftruncate",
    "do_sys_ftruncate",
    "ksys_ftruncate",
    "do_truncate",
    "notify_change",
    "vfs_clone_file_range",
    "vfs_dedupe_file_range",
    "vfs_dedupe_file_range_one",
    "do_clone_file_range",
    "vfs_copy_file_range",
    "do_splice",
    "do_sendfile",
    "do_splice_direct",
    "splice_direct_to_actor",
    "splice_file_range",
    "xfs_exchange_range",
    "xfs_ioc_exchange_range",
    "xfs_ioc_swapext",
    "xfs_swap_extents",
    // F_SETFL, which moves a write that has been judged.
    "__x64_sys_fcntl",
    "__ia32_sys_fcntl",
    "__ia32_compat_sys_fcntl",
    "__ia32_compat_sys_fcntl64",
    "__arm64_sys_fcntl",
    "vfs_fileattr_set",
    "ext4_move_extents",
    "ext4_ioctl",
];

/// Those of them that a reader can be inside of.
const SHARING: [&str; 8] = [
    "vfs_clone_file_range",
    "vfs_dedupe_file_range",
    "vfs_dedupe_file_range_one",
    "do_clone_file_range",
    "vfs_copy_file_range",
    "xfs_exchange_range",
    "xfs_ioc_exchange_range",
    "xfs_ioc_swapext",
];

/// Where what is written goes into no file.
const NOT_A_FILE: [&str; 12] = [
    // splice(2) from a file, for as long as nobody reads.
    "splice_file_to_pipe",
    "splice_pipe_to_pipe",
    "splice_to_socket",
    "pipe_write",
    "anon_pipe_write",
    "sock_write_iter",
    "sock_sendmsg",
    "unix_stream_sendmsg",
    "tcp_sendmsg",
    "tty_write",
    "file_tty_write",
    "eventfd_write",
];

/// Functions between one of [`CHANGING`] and the operation of a filesystem.
fn is_between(function: &str) -> bool {
    is_machinery(function)
        || matches!(
            function,
            "do_fcntl"
                | "do_compat_fcntl64"
                | "setfl"
                | "new_sync_write"
                | "do_iter_readv_writev"
                | "call_write_iter"
                | "vfs_iter_write"
                | "vfs_iocb_iter_write"
                | "do_iter_write"
                | "do_splice_from"
                | "iter_file_splice_write"
                | "direct_splice_actor"
                | "direct_file_splice_actor"
                | "splice_direct_to_actor"
                | "do_splice_direct"
                | "do_splice_direct_actor"
                | "splice_file_range"
                | "splice_file_range_actor"
                | "splice_from_pipe"
                | "__splice_from_pipe"
                | "splice_from_pipe_next"
                | "pipe_wait_readable"
                | "pipe_wait_writable"
                | "rw_verify_area"
                | "remap_verify_area"
                | "vfs_clone_file_range"
                | "vfs_dedupe_file_range_one"
                | "do_truncate"
                | "notify_change"
                | "setattr_prepare"
                | "file_start_write"
                | "mnt_want_write_file"
        )
        || function.starts_with("security_")
        || function.starts_with("apparmor_")
        || function.starts_with("selinux_")
        || waits_for_thaw(function)
        || waits_for_answer(function)
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const XFS: Prefix = Prefix("xfs_");

    fn see(look_for: LookFor, stack: &[&str]) -> Finding {
        let whole: Vec<&str> = stack
            .iter()
            .copied()
            .chain(["do_syscall_64", "entry_SYSCALL_64_after_hwframe"])
            .collect();
        judge(look_for, &whole, XFS)
    }

    #[test]
    fn setting_flags_matters_and_waiting_for_a_lock_does_not() {
        let see = |stack: &[&str]| see(LookFor::Changes, stack);
        let preempted = ["irqentry_exit", "asm_sysvec_apic_timer_interrupt"];
        let sets: Vec<&str> = preempted
            .into_iter()
            .chain(["setfl", "do_fcntl", "__x64_sys_fcntl"])
            .collect();
        assert!(matches!(see(&sets), Finding::MayByDescriptor(_)));
        let waits = ["schedule", "fcntl_setlk", "do_fcntl", "__x64_sys_fcntl"];
        assert_eq!(see(&waits), Finding::Nothing);
    }

    #[test]
    fn a_truncation_matters_only_until_it_is_counted() {
        let see = |stack: &[&str]| see(LookFor::Truncations, stack);
        let may = |found| matches!(found, Finding::May(_));
        assert!(may(see(&["vfs_truncate", "do_sys_truncate"])));
        assert!(may(see(&[
            "asm_sysvec_apic_timer_interrupt",
            "vfs_truncate"
        ])));
        assert!(may(see(&["__kmalloc", "vfs_truncate", "do_sys_truncate"])));
        for counted_or_before in [
            &["__break_lease", "vfs_truncate"][..],
            &[
                "request_wait_answer",
                "fuse_setattr",
                "notify_change",
                "do_truncate",
                "vfs_truncate",
            ],
            &[
                "down_write",
                "do_truncate",
                "vfs_truncate",
                "do_sys_truncate",
            ],
            &[
                "fuse_lookup",
                "path_lookupat",
                "filename_lookup",
                "user_path_at",
                "do_sys_truncate",
            ],
            &[
                "fuse_permission",
                "inode_permission",
                "vfs_truncate",
                "do_sys_truncate",
            ],
            &["anon_pipe_read", "vfs_read"],
            &[],
        ] {
            assert_eq!(
                see(counted_or_before),
                Finding::Nothing,
                "{counted_or_before:?}"
            );
        }
        let frozen = see(&["percpu_rwsem_wait", "mnt_want_write", "vfs_truncate"]);
        assert!(matches!(frozen, Finding::IfFrozen(_)));
        let asked = see(&["fanotify_handle_event", "fsnotify", "vfs_truncate"]);
        assert!(matches!(asked, Finding::IfWatched(_)));
    }

    #[test]
    fn a_change_is_judged_by_whose_operation_it_is() {
        let see = |stack: &[&str]| see(LookFor::Changes, stack);
        let may = |found| matches!(found, Finding::May(_));
        assert!(may(see(&[
            "down_write",
            "xfs_file_write_iter",
            "vfs_write"
        ])));
        assert!(may(see(&[
            "xfs_setattr_size",
            "notify_change",
            "do_truncate",
            "vfs_truncate"
        ])));
        // A store of somebody else's that takes a page of FUSE along.
        assert!(may(see(&[
            "fuse_read_folio",
            "exc_page_fault",
            "xfs_file_write_iter",
            "vfs_write"
        ])));
        for other in [
            &["write_null", "vfs_write", "ksys_write"][..],
            &[
                "asm_sysvec_apic_timer_interrupt",
                "copy_page",
                "write_zero",
                "vfs_write",
            ],
            &["fuse_file_write_iter", "new_sync_write", "vfs_write"],
            &["ext4_file_write_iter", "vfs_write"],
            &["anon_pipe_write", "vfs_write"],
            &["pipe_wait_writable", "splice_file_to_pipe", "do_splice"],
            &[
                "fuse_setattr",
                "notify_change",
                "do_truncate",
                "vfs_truncate",
            ],
            &["read_zero", "vfs_read"],
            &["ext4_ioctl", "vfs_ioctl"],
        ] {
            assert_eq!(see(other), Finding::Nothing, "{other:?}");
        }
        for unknown in [
            &["pipe_wait_readable", "iter_file_splice_write", "do_splice"][..],
            &["fuse_splice_read", "splice_direct_to_actor", "do_sendfile"],
            &["down_write", "do_truncate", "do_ftruncate"],
            &["vfs_write"],
        ] {
            assert!(
                matches!(see(unknown), Finding::MayByDescriptor(_)),
                "{unknown:?}"
            );
        }
        let frozen = see(&["percpu_rwsem_wait", "vfs_write"]);
        assert!(matches!(frozen, Finding::IfFrozen(_)));
    }

    #[test]
    fn readers_are_looked_at_for_what_readers_can_do() {
        let see = |stack: &[&str]| see(LookFor::ChangesByReaders, stack);
        assert_eq!(see(&["xfs_file_write_iter", "vfs_write"]), Finding::Nothing);
        assert_eq!(
            see(&["iter_file_splice_write", "do_splice"]),
            Finding::Nothing
        );
        let clone = [
            "xfs_file_remap_range",
            "vfs_clone_file_range",
            "ioctl_file_clone",
        ];
        assert!(matches!(see(&clone), Finding::May(_)));
        let elsewhere = ["btrfs_remap_file_range", "vfs_clone_file_range"];
        assert_eq!(see(&elsewhere), Finding::Nothing);
    }

    #[test]
    fn an_open_matters_behind_the_gate() {
        let fifo = [
            "wait_for_partner",
            "fifo_open",
            "do_dentry_open",
            "vfs_open",
            "path_openat",
        ];
        let fuse = [
            "request_wait_answer",
            "fuse_open",
            "do_dentry_open",
            "path_openat",
        ];
        let lookup = [
            "fuse_lookup",
            "lookup_open",
            "open_last_lookups",
            "path_openat",
        ];
        let own = ["xfs_file_open", "do_dentry_open", "vfs_open", "path_openat"];
        let lease = ["__break_lease", "do_dentry_open", "vfs_open", "path_openat"];
        let truncating = [
            "xfs_setattr_size",
            "notify_change",
            "do_truncate",
            "path_openat",
        ];
        for look_for in [LookFor::Opens, LookFor::AllTruncations] {
            for other in [&fifo[..], &fuse, &lookup] {
                assert_eq!(see(look_for, other), Finding::Nothing, "{other:?}");
            }
            assert!(matches!(see(look_for, &own), Finding::May(_)));
            assert!(matches!(
                see(look_for, &["do_dentry_open", "vfs_open"]),
                Finding::May(_)
            ));
        }
        assert!(matches!(see(LookFor::Opens, &lease), Finding::IfLeased(_)));
        assert_eq!(see(LookFor::AllTruncations, &lease), Finding::Nothing);
        assert!(matches!(see(LookFor::Opens, &truncating), Finding::May(_)));
        assert_eq!(see(LookFor::AllTruncations, &truncating), Finding::Nothing);
        assert_eq!(see(LookFor::Truncations, &own), Finding::Nothing);
    }

    #[test]
    fn descriptors_are_those_that_can_be_written_to() {
        let call = |number, sp| Syscall {
            number,
            args: [3, 4, 5, 6, 7, 8],
            sp,
            pc: 1,
        };
        if cfg!(target_arch = "x86_64") {
            assert_eq!(descriptors(&call(1, 1)), Some(vec![3]));
            assert_eq!(descriptors(&call(275, 1)), Some(vec![3, 5]));
        }
        assert_eq!(descriptors(&call(1, 0)), None, "a kernel thread");
        assert_eq!(descriptors(&call(16, 1)), None);
    }

    proptest! {
        #[test]
        fn no_stack_upsets_it(names in prop::collection::vec("[a-z_]{0,12}", 0..12)) {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            for look_for in [
                LookFor::Truncations, LookFor::AllTruncations, LookFor::Opens, LookFor::Changes,
                LookFor::ChangesByReaders, LookFor::Mappings,
            ] {
                let _ = judge(look_for, &names, XFS);
            }
        }
    }
}
