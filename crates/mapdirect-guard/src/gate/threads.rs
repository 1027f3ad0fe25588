//! Looking at threads that wait for an answer.
//!
//! A thread is looked at only once it sleeps: `/proc/<tid>/syscall` proves
//! that (`task_current_syscall` waits until the thread is off its processor),
//! and only then is `/proc/<tid>/stack` more than what an earlier sleep left
//! behind. It keeps sleeping until it is answered or killed.

use crate::gate::classify::Descriptors;
use mapdirect_sys::proc::{self, Syscall, SyscallState};
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

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
        text.map_or_else(String::new, |text| {
            String::from_utf8_lossy(text).into_owned()
        })
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

/// The descriptors of a thread, read from its fdinfo files: text of the
/// kernel about memory of the kernel, so that no foreign filesystem can make
/// the reader wait.
pub(crate) struct ThreadDescriptors {
    pub(crate) tid: i32,
    pub(crate) inode: u64,
}

impl ThreadDescriptors {
    fn info(&self, fd: i32) -> Option<proc::FdInfo> {
        let text = proc::read_task_file(self.tid, &format!("fdinfo/{fd}")).ok()?;
        Some(proc::parse_fdinfo(&text))
    }
}

impl Descriptors for ThreadDescriptors {
    /// By inode number alone: a file of the same number on another
    /// filesystem is taken for the watched one, which refuses more, not less.
    fn is_watched(&self, fd: i32) -> bool {
        self.info(fd).is_none_or(|info| info.inode == self.inode)
    }

    fn flags(&self, fd: i32) -> Option<u32> {
        self.info(fd).map(|info| info.flags)
    }
}
