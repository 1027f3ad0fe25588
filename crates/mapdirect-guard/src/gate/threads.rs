//! Looking at threads that wait for an answer.
//!
//! A thread is looked at only once it sleeps: `/proc/<tid>/syscall` proves
//! that (`task_current_syscall` waits until the thread is off its processor),
//! and only then is `/proc/<tid>/stack` more than what an earlier sleep left
//! behind. It keeps sleeping until it is answered or killed.

use crate::gate::classify::Descriptors;
use mapdirect_sys::proc::{self, Syscall, SyscallState};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

/// What could be learned about a waiting thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// It has not gone to sleep yet: look again.
    NotYet,
    /// It is gone, killed while it waited.
    Gone,
    /// It sleeps; these are its registers, if it is inside a system call.
    Sleeps(Option<Syscall>),
}

/// Open proc files of threads looked at before: threads that ask once tend
/// to ask again, and reading an open file takes a third of the time.
#[derive(Debug, Default)]
pub(crate) struct Threads {
    open: HashMap<i32, Files>,
}

#[derive(Debug)]
struct Files {
    syscall: OwnedFd,
    stack: Option<OwnedFd>,
}

/// Threads whose files are kept open.
const KEPT: usize = 512;

impl Threads {
    /// Looks at a thread.
    pub(crate) fn look(&mut self, tid: i32) -> Look {
        // A file of a thread that died reads as ESRCH, also when the number
        // has been used again since: then a fresh one tells.
        for fresh in [false, true] {
            if fresh {
                self.open.remove(&tid);
            }
            let Some(files) = self.files(tid) else {
                return Look::Gone;
            };
            let mut buffer = [0; 256];
            let Ok(text) = proc::reread(files.syscall.as_fd(), &mut buffer) else {
                continue;
            };
            return match proc::parse_syscall(text) {
                Some(SyscallState::Running) => Look::NotYet,
                Some(SyscallState::Inside(syscall)) => Look::Sleeps(Some(syscall)),
                Some(SyscallState::Outside) | None => Look::Sleeps(None),
            };
        }
        Look::Gone
    }

    /// The functions a sleeping thread is inside of, as text for
    /// [`proc::stack_functions`]; empty if they cannot be read.
    pub(crate) fn stack(&mut self, tid: i32) -> String {
        let Some(files) = self.files(tid) else {
            return String::new();
        };
        if files.stack.is_none() {
            files.stack = proc::open_task_file(tid, "stack").ok();
        }
        let mut buffer = [0; 4096];
        let text = files
            .stack
            .as_ref()
            .and_then(|stack| proc::reread(stack.as_fd(), &mut buffer).ok());
        // Names of functions: anything but ASCII would be no stack.
        text.and_then(|text| std::str::from_utf8(text).ok())
            .map_or_else(String::new, str::to_owned)
    }

    fn files(&mut self, tid: i32) -> Option<&mut Files> {
        if !self.open.contains_key(&tid) {
            if self.open.len() >= KEPT {
                self.open.clear();
            }
            let files = Files {
                syscall: proc::open_task_file(tid, "syscall").ok()?,
                stack: None,
            };
            self.open.insert(tid, files);
        }
        self.open.get_mut(&tid)
    }
}

/// The descriptors of a thread.
///
/// Anybody who reads a pinned file can have the gate thread ask about any
/// descriptor of its own, so what is asked must not depend on what the
/// descriptor is: an epoll descriptor's fdinfo, for one, waits for a lock
/// that its owner can hold for ever. The links in `/proc/<tid>/fd` are made of
/// the kernel's own memory.
pub(crate) struct ThreadDescriptors<'event> {
    pub(crate) tid: i32,
    pub(crate) inode: u64,
    /// A descriptor of the watched file.
    pub(crate) file: BorrowedFd<'event>,
    /// Links to the watched file.
    pub(crate) links: u64,
}

impl ThreadDescriptors<'_> {
    fn link(&self, fd: i32) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{fd}", self.tid))
    }
}

impl Descriptors for ThreadDescriptors<'_> {
    /// By name: whatever is called the same, wherever it is, is taken for the
    /// watched file, and so is everything if that has several names. That
    /// refuses more, not less.
    fn is_watched(&self, fd: i32) -> bool {
        if self.links > 1 {
            return true;
        }
        let Ok(target) = std::fs::read_link(self.link(fd)) else {
            return true;
        };
        let watched = PathBuf::from(proc::path_of(self.file));
        // Pipes, sockets and the like have names without a slash.
        target.is_absolute() && target.file_name() == watched.file_name()
    }

    fn is_read_only(&self, fd: i32) -> bool {
        // The mode of the link is that of the description.
        std::fs::symlink_metadata(self.link(fd))
            .is_ok_and(|link| link.permissions().mode() & 0o200 == 0)
    }

    fn flags(&self, fd: i32) -> Option<u32> {
        let text = proc::read_task_file(self.tid, &format!("fdinfo/{fd}")).ok()?;
        let info = proc::parse_fdinfo(&text);
        // Another descriptor may have taken its place.
        (info.inode == self.inode).then_some(info.flags)
    }
}
