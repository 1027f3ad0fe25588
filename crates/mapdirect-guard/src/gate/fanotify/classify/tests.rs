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

#[cfg(target_arch = "x86_64")]
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

#[test]
fn a_stack_alone_tells_a_read() {
    let at = |frames: &[&str]| reads(&stack(frames));
    assert!(at(&["rw_verify_area", "vfs_read", "ksys_read"]));
    assert!(at(&["rw_verify_area", "io_read", "io_issue_sqe"]));
    for other in [
        &["rw_verify_area", "vfs_write", "ksys_write"][..],
        &["rw_verify_area", "do_sendfile"],
        &["rw_verify_area", "vfs_copy_file_range"],
        &["rw_verify_area"],
        &["vfs_fallocate", "vfs_read"],
        &["vfs_read", "rw_verify_area"],
        &[],
    ] {
        assert!(!at(other), "{other:?}");
    }
    // A frame of the gate comes first.
    assert!(!reads(&["rw_verify_area", "vfs_read"]));
    assert!(!reads(&["__schedule", "rw_verify_area", "vfs_read"]));
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
        if reads(&functions) {
            prop_assert_eq!(classify(&asked, &NO_FDS).kind, K::Read);
        }
    }
}
