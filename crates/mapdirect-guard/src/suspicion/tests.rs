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
