//! The kernel functions that tell what a thread is doing.

/// Functions in which threads sleep that are in the middle of nothing at all.
pub(super) const IDLE: [&str; 24] = [
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

/// Functions in which a truncating thread is either before the gate or already
/// counted: see the head of [`suspicion`](super).
pub(super) const BEFORE_OR_COUNTED: [&str; 10] = [
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

pub(super) fn waits_for_thaw(function: &str) -> bool {
    function.starts_with("percpu_rwsem_wait")
        || function.starts_with("__percpu_down_read")
        || matches!(
            function,
            "percpu_down_read" | "mnt_want_write" | "sb_start_write" | "__sb_start_write"
        )
}

pub(super) fn waits_for_answer(function: &str) -> bool {
    function.starts_with("fanotify_")
        || function.starts_with("fsnotify")
        || function.starts_with("__fsnotify")
}

/// Whether a frame belongs to the scheduler or to locks. Such frames do not
/// tell which file a call is about.
pub(super) fn is_machinery(function: &str) -> bool {
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

/// The functions that a thread is inside of while it changes a file.
pub(super) const CHANGING: [&str; 35] = [
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
    // F_SETFL, which moves a write that has been judged already.
    "__x64_sys_fcntl",
    "__ia32_sys_fcntl",
    "__ia32_compat_sys_fcntl",
    "__ia32_compat_sys_fcntl64",
    "__arm64_sys_fcntl",
    "vfs_fileattr_set",
    "ext4_move_extents",
    "ext4_ioctl",
];

/// The functions among [`CHANGING`] that a reader can be inside of.
pub(super) const SHARING: [&str; 8] = [
    "vfs_clone_file_range",
    "vfs_dedupe_file_range",
    "vfs_dedupe_file_range_one",
    "do_clone_file_range",
    "vfs_copy_file_range",
    "xfs_exchange_range",
    "xfs_ioc_exchange_range",
    "xfs_ioc_swapext",
];

/// Functions whose writes go into no file.
pub(super) const NOT_A_FILE: [&str; 12] = [
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
pub(super) fn is_between(function: &str) -> bool {
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
