//! Looks at a thread that waits for an answer.
//!
//! A thread is judged only once it is off its processor. Before that,
//! `/proc/<tid>/stack` may show what an earlier sleep left behind. Two things
//! prove that the thread is off its processor:
//!
//! * The stack itself, on kernels that unwind by ORC tables, as distributions'
//!   kernels for x86-64 do. They show no stack of a thread that is on another
//!   processor (`__unwind_start`, arch/x86/kernel/unwind_orc.c). The stack that
//!   they show begins where the thread was last switched out. The thread ran
//!   when it queued its event and has not got further since, so it was switched
//!   out inside of this event.
//! * `/proc/<tid>/syscall`, if it is read before the stack
//!   (`task_current_syscall` waits until the thread is off its processor).
//!   Other kernels need this.
//!
//! The thread stays where it is until it is answered or killed. It may be woken
//! for a moment when others are answered, but that changes only frames inside
//! the wait.
//!
//! Everything here may hang for as long as the owner of the thread likes, so it
//! runs only in the threads of [`lookers`](super::lookers). As of 6.18:
//!
//! | what is read | what it can wait for |
//! |---|---|
//! | `syscall`, `stack`, the link `exe`; `pidfd_getfd(2)` | `exec_update_lock`, while a thread of the process is in `execve(2)` and, say, a FUSE server does not answer the flush of a close-on-exec descriptor. SIGKILL ends the wait (`down_read_killable`). |
//! | `syscall` | that the thread, about to sleep, gets off its processor (`wait_task_inactive`). |
//! | any name below `/proc/<tid>` | the lock of that directory, while somebody lists it into a page of a FUSE file and somebody else waits to mount there. **Deaf to SIGKILL.** |
//! | the end of a descriptor from `pidfd_getfd(2)` | the last close of the file, if its owner closed it meanwhile, and the flush of a FUSE file. **Deaf to SIGKILL.** |
//! | the block map | the locks of the inode, which a read into a page of a FUSE file holds. **Deaf to SIGKILL.** |
//! | `stat`, `comm`, `status`, `cgroup`, links in `fd`; `statx(2)` by such a link with `DONT_SYNC` | nothing else: the kernel's own memory, or what a filesystem remembers. |
//!
//! `fdinfo` is never read: for an epoll descriptor it needs a lock that the
//! owner of the descriptor can hold for ever.

use super::classify::{self, Asked, Descriptors};
use crate::Errno;
use crate::audit::actor;
use crate::policy::{Operation, OperationKind as K};
use crate::table::InodeId;
use mapdirect_model::ExtentState;
use mapdirect_proto::record::Actor;
use mapdirect_sys::proc::{self, Syscall, SyscallState};
use mapdirect_sys::{fanotify::Mask, pidfd};
use rustix::fs::{AtFlags, CWD, StatxFlags};
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::sync::OnceLock;
use std::time::Duration;

/// How long a thread may take to fall asleep before it is judged unseen.
const WAIT_FOR_SLEEP: Duration = Duration::from_secs(1);
/// How long to wait for a stack that reaches the bottom before a partial stack
/// must do. A partial stack leads to more refusals, not fewer.
const WAIT_FOR_STACK: Duration = Duration::from_millis(50);
/// The most bytes of a file that are searched for shared blocks, because many
/// extents take long.
pub(crate) const MOST_LOOKED_AT: u64 = 256 << 20;

/// A question about a thread. It consists of plain values, since lookers have
/// none of the guard's descriptors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Question {
    pub(crate) tid: i32,
    /// What the thread asks permission for.
    pub(crate) mask: Mask,
    /// Range of the event, `(offset, count)`.
    pub(crate) range: Option<(u64, u64)>,
    pub(crate) id: InodeId,
    /// Size of the file in bytes.
    pub(crate) size: u64,
    /// Whether the filesystem can share blocks between files.
    pub(crate) reflink: bool,
    /// Whether the thread may have been announced, so that its start time is
    /// needed.
    pub(crate) announced: bool,
    /// Whether to tell who the thread is, whatever it does.
    pub(crate) named: bool,
    /// How long the thread has been waiting.
    pub(crate) late: Duration,
    /// How often to look at the thread if it does not sleep yet.
    pub(crate) tries: u32,
}

/// What could be learned about a waiting thread.
#[derive(Debug, PartialEq)]
pub(crate) enum Seen {
    /// The thread has not gone to sleep yet: look again.
    NotYet,
    /// The thread is gone: it was killed while it waited.
    Gone,
    /// The thread sleeps.
    Doing(Doing),
}

/// What a waiting thread is doing.
#[derive(Debug, PartialEq)]
pub(crate) struct Doing {
    pub(crate) operation: Operation,
    /// Who it is, if a refusal is likely or the question asked for it, and if
    /// that could be found out.
    pub(crate) actor: Option<Box<Actor>>,
    /// The system call that the thread is in, if that is certain.
    pub(crate) call: Option<Syscall>,
    /// The word for the operation, if there is a better one than that of its
    /// kind.
    pub(crate) word: Option<&'static str>,
    /// The start time of the thread, if the question asked for it.
    pub(crate) began: Option<u64>,
    /// For a collapse: no block was shared with another file between the start
    /// of the operation and this offset.
    pub(crate) unshared_until: u64,
}

impl Doing {
    /// An operation that no pin refuses.
    fn harmless(operation: Operation) -> Self {
        Self {
            operation,
            actor: None,
            call: None,
            word: None,
            began: None,
            unshared_until: 0,
        }
    }

    /// The worst operation, assumed of a thread that could not be seen.
    pub(crate) fn the_worst(mask: Mask) -> Self {
        let kind = if mask.intersects(Mask::PRE_ACCESS) {
            K::Unknown
        } else {
            K::OpenTruncate
        };
        Self {
            operation: Operation::new(kind, 0..u64::MAX),
            actor: None,
            call: None,
            word: None,
            began: None,
            unshared_until: 0,
        }
    }
}

/// Open proc files of threads that were looked at before. A thread that asks
/// once tends to ask again, and reading an open file takes a third of the time.
#[derive(Debug, Default)]
pub(crate) struct Threads {
    open: HashMap<i32, Files>,
}

#[derive(Debug, Default)]
struct Files {
    syscall: Option<OwnedFd>,
    stack: Option<OwnedFd>,
}

impl Files {
    fn of(&mut self, what: What) -> &mut Option<OwnedFd> {
        match what {
            What::Syscall => &mut self.syscall,
            What::Stack => &mut self.stack,
        }
    }
}

/// A file below `/proc/<tid>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Syscall,
    Stack,
}

impl What {
    fn name(self) -> &'static str {
        match self {
            Self::Syscall => "syscall",
            Self::Stack => "stack",
        }
    }
}

/// The thread has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Gone;

/// The number of threads whose files are kept open.
const KEPT: usize = 256;

/// The longest stack text that is read. The kernel shows 64 functions at most,
/// and a text that is cut off is not whole.
const LONGEST_STACK: usize = 4096;

/// Whether the kernel shows the stack of a thread only while the thread is on
/// no processor: see the head of this file.
fn shows_only_who_rests() -> bool {
    /// Kernel functions that exist only in kernels that unwind by ORC tables.
    /// They come early in the list.
    const OF_ORC: [&str; 2] = ["orc_find", "__orc_find"];
    static ANSWER: OnceLock<bool> = OnceLock::new();
    let has_orc = || {
        let Ok(symbols) = File::open("/proc/kallsyms") else {
            return false;
        };
        let mut lines = BufReader::new(symbols).lines().map_while(Result::ok);
        lines.any(|line| {
            let name = line.split_ascii_whitespace().nth(2).unwrap_or_default();
            let name = name.split_once('.').map_or(name, |(name, _)| name);
            OF_ORC.contains(&name)
        })
    };
    cfg!(target_arch = "x86_64") && *ANSWER.get_or_init(has_orc)
}

/// The registers of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Registers {
    /// The thread is not asleep.
    NotYet,
    /// The thread sleeps. If it is inside a system call, these are its
    /// registers.
    Asleep(Option<Syscall>),
}

impl Threads {
    /// Looks at a thread.
    pub(crate) fn look(&mut self, question: &Question) -> Seen {
        for _ in 1..question.tries.max(1) {
            match self.look_once(question) {
                Ok(Seen::NotYet) => std::hint::spin_loop(),
                Ok(seen) => return seen,
                Err(Gone) => return Seen::Gone,
            }
        }
        self.look_once(question).unwrap_or(Seen::Gone)
    }

    fn look_once(&mut self, question: &Question) -> Result<Seen, Gone> {
        if shows_only_who_rests() {
            self.look_at_stack_first(question)
        } else {
            self.look_at_registers_first(question)
        }
    }

    /// Tries the stack alone first: most threads read, and a stack alone says
    /// so. Registers would be read sooner, but prove nothing by themselves: a
    /// thread that uses `io_uring` writes on its way out of a read(2), with the
    /// registers of that call.
    fn look_at_stack_first(&mut self, question: &Question) -> Result<Seen, Gone> {
        let mut buffer = [0; LONGEST_STACK];
        let stack = Stack::of(self.stack(question.tid, &mut buffer)?);
        if !stack.is_ready(question.late) {
            return Ok(Seen::NotYet);
        }
        if question.mask.intersects(Mask::PRE_ACCESS) && stack.reads() {
            let read = Operation::new(K::Read, 0..u64::MAX);
            return Ok(Seen::Doing(Doing::harmless(read)));
        }
        match self.registers(question.tid)? {
            Registers::NotYet => Ok(not_asleep(question)),
            Registers::Asleep(syscall) if stack.begins_with_the_wait() => {
                Ok(stack.understand(question, syscall))
            }
            // The thread was on its way to sleep, and sleeps now.
            Registers::Asleep(_) => self.look_at_registers_first(question),
        }
    }

    fn look_at_registers_first(&mut self, question: &Question) -> Result<Seen, Gone> {
        let syscall = match self.registers(question.tid)? {
            Registers::NotYet => return Ok(not_asleep(question)),
            Registers::Asleep(syscall) => syscall,
        };
        let mut buffer = [0; LONGEST_STACK];
        let stack = Stack::of(self.stack(question.tid, &mut buffer)?);
        if !stack.is_ready(question.late) {
            return Ok(Seen::NotYet);
        }
        Ok(stack.understand(question, syscall))
    }

    fn registers(&mut self, tid: i32) -> Result<Registers, Gone> {
        let mut buffer = [0; 256];
        let text = self.read(tid, What::Syscall, &mut buffer)?;
        Ok(match proc::parse_syscall(text) {
            Some(SyscallState::Running) => Registers::NotYet,
            Some(SyscallState::Inside(syscall)) => Registers::Asleep(Some(syscall)),
            Some(SyscallState::Outside) | None => Registers::Asleep(None),
        })
    }

    /// The functions that a resting thread is inside of, as text for
    /// [`proc::stack_functions`]. Empty if they cannot be read.
    fn stack<'buffer>(
        &mut self,
        tid: i32,
        buffer: &'buffer mut [u8],
    ) -> Result<&'buffer str, Gone> {
        let text = self.read(tid, What::Stack, buffer)?;
        // Function names are ASCII; other text is no stack.
        Ok(std::str::from_utf8(text).unwrap_or_default())
    }

    /// Reads a file of a thread.
    fn read<'buffer>(
        &mut self,
        tid: i32,
        what: What,
        buffer: &'buffer mut [u8],
    ) -> Result<&'buffer [u8], Gone> {
        // A file of a dead thread reads as ESRCH, even when the thread number
        // has been used again since. A newly opened file then decides.
        if self.is_open(tid, what) {
            let length = self.reread(tid, what, buffer).map(<[u8]>::len);
            if let Some(length) = length {
                return Ok(&buffer[..length]);
            }
            self.open.remove(&tid);
        }
        if self.open.len() >= KEPT && !self.open.contains_key(&tid) {
            self.open.clear();
        }
        let file = proc::open_task_file(tid, what.name()).map_err(|_| Gone)?;
        *self.open.entry(tid).or_default().of(what) = Some(file);
        self.reread(tid, what, buffer).ok_or(Gone)
    }

    fn is_open(&mut self, tid: i32, what: What) -> bool {
        let files = self.open.get_mut(&tid);
        files.is_some_and(|files| files.of(what).is_some())
    }

    fn reread<'buffer>(
        &mut self,
        tid: i32,
        what: What,
        buffer: &'buffer mut [u8],
    ) -> Option<&'buffer [u8]> {
        let file = self.open.get_mut(&tid)?.of(what).as_ref()?;
        proc::reread(file.as_fd(), buffer).ok()
    }
}

/// Answers for a thread that runs or waits for a processor: look again, unless
/// that has been done for long enough.
fn not_asleep(question: &Question) -> Seen {
    if question.late < WAIT_FOR_SLEEP {
        Seen::NotYet
    } else {
        Seen::Doing(Doing::the_worst(question.mask))
    }
}

/// The functions that a thread is inside of, innermost first.
struct Stack<'text> {
    functions: Vec<&'text str>,
    is_whole: bool,
}

impl<'text> Stack<'text> {
    fn of(text: &'text str) -> Self {
        let mut functions = Vec::with_capacity(32);
        functions.extend(proc::stack_functions(text));
        let is_whole = classify::is_whole(&functions);
        Self {
            functions,
            is_whole,
        }
    }

    /// Whether this stack is good enough, or must do because it is so `late`.
    /// Every answer wakes all waiting threads for a moment: a stack read just
    /// then is empty or incomplete.
    fn is_ready(&self, late: Duration) -> bool {
        let mut functions = self.functions.iter();
        let waits = functions.any(|name| classify::is_machinery(name));
        (waits || late >= WAIT_FOR_SLEEP) && (self.is_whole || late >= WAIT_FOR_STACK)
    }

    fn begins_with_the_wait(&self) -> bool {
        let first = self.functions.first();
        first.is_some_and(|function| classify::is_machinery(function))
    }

    fn reads(&self) -> bool {
        self.is_whole && classify::reads(&self.functions)
    }

    fn understand(&self, question: &Question, syscall: Option<Syscall>) -> Seen {
        // The missing part of the stack could have shown that the registers
        // belong to another call.
        let syscall = syscall.filter(|_| self.is_whole);
        Seen::Doing(understand(question, syscall.as_ref(), &self.functions))
    }
}

/// Says what a sleeping thread is doing, and adds what else must be known to
/// judge that.
fn understand(question: &Question, syscall: Option<&Syscall>, functions: &[&str]) -> Doing {
    let descriptors = ThreadDescriptors {
        tid: question.tid,
        id: question.id,
    };
    let operation = if question.mask.intersects(Mask::PRE_ACCESS) {
        let asked = Asked {
            range: question.range,
            syscall,
            functions,
            reflink: question.reflink,
            size: question.size,
        };
        classify::classify(&asked, &descriptors)
    } else {
        let kind = classify::classify_open(syscall, functions);
        Operation::new(kind, 0..u64::MAX)
    };
    let unshared_until = match (operation.kind, syscall) {
        (K::CollapseRange, Some(syscall)) => {
            let file = descriptors.of_watched(classify::descriptor(syscall.args[0]));
            file.map_or(0, |file| unshared_until(&file, operation.range.start))
        }
        _ => 0,
    };
    // Who it is takes several looks at `/proc`. Most operations are let in, so
    // that is found out for those that hardly ever are, and when it is known
    // that another will be refused.
    let is_refused = question.named
        || match operation.kind {
            K::OpenWrite => !question.announced,
            K::OpenTruncate => true,
            kind => kind.may_do_anything(),
        };
    let call = classify::own_registers(syscall, functions).copied();
    Doing {
        // The thread waits for the answer, so it is the one that has this number.
        actor: is_refused
            .then(|| actor::find(question.tid, actor::Sight::Waits).map(Box::new))
            .flatten(),
        call,
        word: classify::word(operation.kind, call.as_ref(), functions),
        began: question
            .announced
            .then(|| proc::start_time(question.tid).ok())
            .flatten(),
        operation,
        unshared_until,
    }
}

/// The offset up to which no block of a file is shared, from `start` on.
fn unshared_until(file: &OwnedFd, start: u64) -> u64 {
    let end = start.saturating_add(MOST_LOOKED_AT);
    mapdirect_model::block_map::read(file.as_fd(), start..end).map_or(start, |map| {
        let mut frozen = map.frozen();
        frozen
            .find(|extent| extent.state == ExtentState::Shared)
            .map_or(end, |extent| extent.offset)
    })
}

/// The descriptors of a thread.
///
/// Anybody who reads a pinned file can make the guard ask about any of their
/// descriptors.
struct ThreadDescriptors {
    tid: i32,
    /// The watched file.
    id: InodeId,
}

impl ThreadDescriptors {
    fn link(&self, fd: i32) -> String {
        format!("/proc/{}/fd/{fd}", self.tid)
    }

    /// A duplicate of a descriptor, if it is one of the watched file.
    fn of_watched(&self, fd: i32) -> Option<OwnedFd> {
        // Check before duplicating: closing a duplicate of some other files
        // would take long.
        if !is_inode(&self.link(fd), self.id).is_ok_and(|same| same) {
            return None;
        }
        let thread = pidfd::of_thread(self.tid).ok()?;
        let file = pidfd::descriptor(&thread, fd).ok()?;
        // Another file may have taken the place of the first.
        let stat = rustix::fs::fstat(&file).ok()?;
        ((stat.st_dev, stat.st_ino) == (self.id.dev, self.id.inode)).then_some(file)
    }
}

/// Whether a path leads to an inode. Does not contact the server of a network
/// or FUSE filesystem.
fn is_inode(path: &str, id: InodeId) -> Result<bool, Errno> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let stat = rustix::fs::statx(CWD, path, flags, StatxFlags::INO)?;
    let dev = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
    Ok((dev, stat.stx_ino) == (id.dev, id.inode))
}

impl Descriptors for ThreadDescriptors {
    fn is_watched(&self, fd: i32) -> bool {
        is_inode(&self.link(fd), self.id).unwrap_or(true)
    }

    fn is_read_only(&self, fd: i32) -> bool {
        // The mode of the link shows the mode of the description.
        std::fs::symlink_metadata(self.link(fd))
            .is_ok_and(|link| link.permissions().mode() & 0o200 == 0)
    }

    fn flags(&self, fd: i32) -> Option<u32> {
        let file = self.of_watched(fd)?;
        let flags = rustix::fs::fcntl_getfl(&file).ok()?;
        Some(flags.bits())
    }
}

/// Questions about the range in which a collapse was looked at.
impl Doing {
    /// Whether it is known that nothing that may come to lie before `end` is
    /// shared.
    pub(crate) fn is_unshared_before(&self, gone: &Range<u64>, end: u64) -> bool {
        end <= gone.start || end <= self.unshared_until
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    fn question(tid: i32, late: Duration) -> Question {
        Question {
            tid,
            mask: Mask::PRE_ACCESS,
            range: Some((0, 4096)),
            id: InodeId { dev: 0, inode: 0 },
            size: 4096,
            reflink: true,
            announced: true,
            named: false,
            late,
            tries: 2,
        }
    }

    fn own_tid() -> i32 {
        rustix::thread::gettid().as_raw_nonzero().get()
    }

    #[test]
    fn a_thread_that_runs_is_not_seen_yet_and_then_taken_for_the_worst() {
        let mut threads = Threads::default();
        let soon = question(own_tid(), Duration::ZERO);
        // A thread that looks at itself waits for nothing; where it may not
        // look, it is as good as gone.
        let seen = threads.look(&soon);
        assert!(matches!(seen, Seen::NotYet | Seen::Gone), "{seen:?}");
        if seen == Seen::NotYet {
            let late = question(own_tid(), WAIT_FOR_SLEEP);
            let Seen::Doing(doing) = threads.look(&late) else {
                panic!("it is late");
            };
            assert_eq!(doing.operation.kind, K::Unknown);
            assert_eq!(doing.operation.range, 0..u64::MAX);
        }
        let nobody = question(i32::MAX, Duration::ZERO);
        assert_eq!(threads.look(&nobody), Seen::Gone);
    }

    #[test]
    fn the_worst_is_refused_by_every_pin() {
        let open = Doing::the_worst(Mask::OPEN_PERM);
        assert_eq!(open.operation.kind, K::OpenTruncate);
        let other = Doing::the_worst(Mask::PRE_ACCESS);
        assert_eq!(other.operation.kind, K::Unknown);
        assert!(!other.is_unshared_before(&(10..20), 11));
        assert!(other.is_unshared_before(&(10..20), 10));
    }

    #[test]
    fn descriptors_are_told_apart_by_their_inode() {
        let file = tempfile::tempfile().unwrap();
        let other = File::open("/dev/zero").unwrap();
        let stat = rustix::fs::fstat(&file).unwrap();
        let descriptors = ThreadDescriptors {
            tid: own_tid(),
            id: InodeId::from(&stat),
        };
        assert!(descriptors.is_watched(file.as_raw_fd()));
        assert!(!descriptors.is_watched(other.as_raw_fd()));
        assert!(descriptors.is_watched(i32::MAX), "not known is the worst");
        assert!(!descriptors.is_read_only(file.as_raw_fd()));
        assert!(descriptors.is_read_only(other.as_raw_fd()));
        assert_eq!(descriptors.flags(other.as_raw_fd()), None);
        let append = rustix::fs::OFlags::APPEND | rustix::fs::OFlags::RDWR;
        rustix::fs::fcntl_setfl(&file, append).unwrap();
        let flags = descriptors.flags(file.as_raw_fd()).unwrap();
        assert_ne!(flags & libc::O_APPEND.cast_unsigned(), 0);
    }
}
