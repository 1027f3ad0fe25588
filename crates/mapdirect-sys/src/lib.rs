//! How mapdirect talks to the kernel.
//!
//! There is one file for each kernel interface, named after its manual page.
//! This crate is the only home of raw system calls and of constants that
//! distribution headers do not have yet. Everything that it exports is safe to
//! call unless its documentation says otherwise, takes and returns owned or
//! borrowed descriptors, and fails with the exact errno.
//!
//! Interfaces that `rustix` already wraps well (sockets, `statx`, `mmap`, ...)
//! are used directly by the other crates, and not wrapped a second time.

#[cfg(not(target_os = "linux"))]
compile_error!("mapdirect speaks to Linux interfaces only");
#[cfg(not(target_pointer_width = "64"))]
compile_error!("mapdirect needs 64-bit offsets in registers and mappings");

pub mod ancestry;
pub mod apart;
pub mod bpf;
pub mod cache;
pub mod capget;
pub mod descriptors;
pub mod dlsym;
pub mod dm_table;
pub mod dup;
pub mod errno;
pub mod faccessat2;
pub mod fallocate;
pub mod fanotify;
pub mod fcntl;
pub mod fiemap;
pub mod file_handle;
pub mod fork;
pub mod fsmap;
pub mod fsync;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzz;
pub mod getauxval;
pub mod inode_flags;
pub mod kcmp;
pub mod madvise;
pub mod memfd;
pub mod mmap;
pub mod names;
pub mod open_tree;
pub mod perf_event;
pub mod pidfd;
pub mod proc;
pub mod proc_locks;
pub mod proc_maps;
pub mod proc_mountinfo;
pub mod proc_pagemap;
pub mod proc_status;
pub mod pthread_atfork;
pub mod reopen;
pub mod sd_listen_fds;
pub mod sd_notify;
pub mod seam;
pub mod seccomp;
pub mod setfsuid;
pub mod shared_words;
pub mod signal;
pub mod stat;
pub mod stdout;
pub mod sync_file_range;
pub mod umask;
pub mod uname;
pub mod unix;
pub mod userfaultfd;
pub mod vmsplice;
pub mod xfs_eofblocks;
pub mod xfs_geometry;

/// The error of every call in this crate: exactly what the kernel returned.
pub use rustix::io::Errno;

/// The result of a system call.
pub type Result<T> = std::result::Result<T, Errno>;

/// Turns the `-1, errno` convention of libc into a `Result`.
fn checked(ret: libc::c_int) -> Result<libc::c_int> {
    if ret < 0 { Err(last_errno()) } else { Ok(ret) }
}

/// `errno` of the calling thread, as left by the libc call just made.
fn last_errno() -> Errno {
    std::io::Error::last_os_error()
        .raw_os_error()
        .map_or(Errno::IO, Errno::from_raw_os_error)
}
