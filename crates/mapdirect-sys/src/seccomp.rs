//! seccomp(2) with user notification: a filter asks another process what is to
//! become of a system call.
//!
//! See seccomp_unotify(2). The filter is classic BPF; see [`Instruction`].

use crate::mmap::{MAP_SHARED, PROT_READ, PROT_WRITE};
use crate::unix::Socket;
use crate::{Errno, Result, checked};

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// One instruction of a filter, as `struct sock_filter` has it
/// (include/uapi/linux/filter.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What to do.
    pub code: u16,
    /// How many instructions to leave out if a comparison is true.
    pub if_true: u8,
    /// How many if it is false.
    pub if_false: u8,
    /// A constant.
    pub constant: u32,
}

/// `struct seccomp_data`: what a filter sees of a system call.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// The number of the system call.
    pub number: i32,
    /// The convention that it was called by (`AUDIT_ARCH_*`).
    pub convention: u32,
    /// Where in the program.
    pub instruction_pointer: u64,
    /// The arguments.
    pub arguments: [u64; 6],
}

/// `struct seccomp_notif`: a thread that waits for an answer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notification {
    /// The number of the notification. Never 0 in practice.
    pub id: u64,
    /// The thread, in the PID namespace of whoever received this; 0 if it is
    /// not visible there.
    pub tid: i32,
    flags: u32,
    /// What it calls.
    pub call: Call,
}

const WORDS: usize = size_of::<Notification>() / size_of::<u64>();
const _: () = assert!(size_of::<Notification>() == 80 && WORDS * 8 == 80);

/// `struct seccomp_notif_resp`.
#[repr(C)]
struct Answer {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

/// `struct seccomp_notif_addfd`.
#[repr(C)]
struct Addition {
    id: u64,
    flags: u32,
    source: u32,
    target: u32,
    target_flags: u32,
}

// include/uapi/linux/seccomp.h; SECCOMP_IOC_MAGIC is '!'.
const RECEIVE: libc::Ioctl = 0xc050_2100_u32 as libc::Ioctl;
const SEND: libc::Ioctl = 0xc018_2101_u32 as libc::Ioctl;
const ID_VALID: libc::Ioctl = 0x4008_2102_u32 as libc::Ioctl;
const ADD: libc::Ioctl = 0x4018_2103_u32 as libc::Ioctl;
const CONTINUE: u32 = 1;
const ADD_AND_SEND: u32 = 2;
const NEW_LISTENER: libc::c_ulong = 1 << 3;
const WAIT_KILLABLE: libc::c_ulong = 1 << 5;
const SET_MODE_FILTER: libc::c_uint = 1;

/// Words of a [`Journal`] that no notification arrives in.
const MORE: usize = 4;

/// What becomes of a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The kernel goes on with it, reading its arguments anew.
    Continue,
    /// It is not made, and returns this.
    Return(i64),
    /// It fails.
    Fail(Errno),
}

/// Answers a notification.
///
/// # Errors
///
/// `ENOENT` when nobody waits for the answer any more, or it was given already.
pub fn answer(listener: BorrowedFd<'_>, id: u64, verdict: Verdict) -> Result<()> {
    let (value, error, flags) = match verdict {
        Verdict::Continue => (0, 0, CONTINUE),
        Verdict::Return(value) => (value, 0, 0),
        Verdict::Fail(errno) => (0, -errno.raw_os_error(), 0),
    };
    let answer = Answer {
        id,
        value,
        error,
        flags,
    };
    // SAFETY: the request says how large the structure is, and it is ours.
    checked(unsafe { libc::ioctl(listener.as_raw_fd(), SEND, &raw const answer) }).map(drop)
}

/// Answers a notification with a descriptor of `file` in the process that
/// waits (Linux 5.14).
///
/// # Errors
///
/// As [`answer`]; `EMFILE` when that process has no number left: then it still
/// waits.
pub fn answer_with(
    listener: BorrowedFd<'_>,
    id: u64,
    file: BorrowedFd<'_>,
    close_on_exec: bool,
) -> Result<()> {
    let addition = Addition {
        id,
        flags: ADD_AND_SEND,
        source: file.as_raw_fd().cast_unsigned(),
        target: 0,
        target_flags: if close_on_exec {
            libc::O_CLOEXEC.cast_unsigned()
        } else {
            0
        },
    };
    // SAFETY: the request says how large the structure is, and it is ours.
    checked(unsafe { libc::ioctl(listener.as_raw_fd(), ADD, &raw const addition) }).map(drop)
}

/// Whether the thread still waits: then its number still means that thread.
#[must_use]
pub fn is_waiting(listener: BorrowedFd<'_>, id: u64) -> bool {
    // SAFETY: the request reads the number.
    checked(unsafe { libc::ioctl(listener.as_raw_fd(), ID_VALID, &raw const id) }).is_ok()
}

/// Memory in which notifications arrive, shared with the children of this
/// process. What one of them has received and not answered when it is killed,
/// another finds here: the kernel itself writes it, so there is no moment at
/// which a notification is nowhere.
#[derive(Debug)]
pub struct Journal {
    start: NonNull<AtomicU64>,
    slots: usize,
}

// SAFETY: the words are atomic, so any thread may use them, and the mapping
// belongs to the process.
unsafe impl Send for Journal {}
// SAFETY: as above.
unsafe impl Sync for Journal {}

impl Journal {
    /// Room for this many notifications at a time, and for some words besides.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub fn new(slots: usize) -> Result<Self> {
        let length = (slots * WORDS + MORE) * size_of::<AtomicU64>();
        let flags = MAP_SHARED | libc::MAP_ANONYMOUS;
        let null = std::ptr::null_mut();
        // SAFETY: new memory, at an address that the kernel chooses.
        let address = unsafe { libc::mmap(null, length, PROT_READ | PROT_WRITE, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            return Err(crate::last_errno());
        }
        let start = NonNull::new(address.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { start, slots })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is this long, aligned to a page, zero at first,
        // and stays until this is dropped.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.slots * WORDS + MORE) }
    }

    /// The number of slots.
    #[must_use]
    pub const fn slots(&self) -> usize {
        self.slots
    }

    /// Words for whatever the processes have to tell each other.
    #[must_use]
    pub fn more(&self) -> &[AtomicU64] {
        &self.words()[self.slots * WORDS..]
    }

    fn slot(&self, slot: usize) -> &[AtomicU64] {
        &self.words()[slot * WORDS..(slot + 1) * WORDS]
    }

    /// What was received in a slot and not [cleared](Self::clear).
    #[must_use]
    pub fn pending(&self, slot: usize) -> Option<Notification> {
        let words: Vec<u64> = self
            .slot(slot)
            .iter()
            .map(|word| word.load(SeqCst))
            .collect();
        let half = |word: u64, upper: bool| -> u32 {
            let bytes = word.to_ne_bytes();
            let at = if upper { 4 } else { 0 };
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let mut arguments = [0; 6];
        arguments.copy_from_slice(&words[4..10]);
        let notification = Notification {
            id: words[0],
            tid: half(words[1], false).cast_signed(),
            flags: half(words[1], true),
            call: Call {
                number: half(words[2], false).cast_signed(),
                convention: half(words[2], true),
                instruction_pointer: words[3],
                arguments,
            },
        };
        (notification.id != 0).then_some(notification)
    }

    /// Waits for a notification, which stays in the slot until it is
    /// [cleared](Self::clear). Nobody else may use the slot.
    ///
    /// # Errors
    ///
    /// `ENOENT` when the thread ended before it could be received; try again.
    /// `EINTR`, `ENOTCONN` when nobody is supervised any more (Linux 6.11).
    pub fn receive(&self, listener: BorrowedFd<'_>, slot: usize) -> Result<Notification> {
        let words = self.slot(slot);
        let memory = words.as_ptr().cast_mut();
        // SAFETY: the kernel writes one `struct seccomp_notif`, the size of the
        // slot, into memory of atomic words that nobody else stores to now.
        checked(unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, memory) })?;
        self.pending(slot).ok_or(Errno::NOENT)
    }

    /// Empties a slot.
    pub fn clear(&self, slot: usize) {
        for word in self.slot(slot) {
            word.store(0, SeqCst);
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        let length = (self.slots * WORDS + MORE) * size_of::<AtomicU64>();
        // SAFETY: `words` borrows from this, so nothing refers to the mapping.
        let _ = checked(unsafe { libc::munmap(self.start.as_ptr().cast(), length) });
    }
}

/// Makes `command` run under a filter, and sends the filter's listener to each
/// of `receivers` before the program begins. Unless
/// `keep_privileges`, the program and its children gain none by execve(2)
/// (`no_new_privs`), without which only `CAP_SYS_ADMIN` may install a filter.
///
/// Spawning fails with `EBUSY` if a filter with a listener is in force already,
/// `EACCES` if `keep_privileges` takes a privilege that is not there, `EINVAL`
/// if the kernel does not like the filter.
pub fn supervised(
    command: &mut Command,
    filter: Vec<Instruction>,
    keep_privileges: bool,
    receivers: Vec<Socket>,
) {
    let begin = move || {
        install(&filter, keep_privileges)
            .and_then(|listener| {
                receivers
                    .iter()
                    .try_for_each(|receiver| pass(receiver.as_fd().as_raw_fd(), listener))
            })
            .map_err(|errno| std::io::Error::from_raw_os_error(errno.raw_os_error()))
    };
    // SAFETY: between fork and exec the closure makes async-signal-safe calls
    // alone, and neither allocates nor locks.
    unsafe { command.pre_exec(begin) };
}

/// Installs a filter, and returns its listener, which is close-on-exec.
fn install(filter: &[Instruction], keep_privileges: bool) -> Result<RawFd> {
    if !keep_privileges {
        // SAFETY: five integers.
        checked(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    }
    let program = libc::sock_fprog {
        len: libc::c_ushort::try_from(filter.len()).map_err(|_| Errno::TOOBIG)?,
        filter: filter.as_ptr().cast_mut().cast(),
    };
    let install = |flags: libc::c_ulong| {
        // SAFETY: `program` points to as many instructions as it says, and the
        // kernel only reads them.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                SET_MODE_FILTER,
                flags,
                &raw const program,
            )
        };
        libc::c_int::try_from(fd)
            .map_err(|_| Errno::INVAL)
            .and_then(checked)
    };
    match install(NEW_LISTENER | WAIT_KILLABLE) {
        // Linux before 5.19. A signal can then interrupt a call that waits.
        Err(Errno::INVAL) => install(NEW_LISTENER),
        done => done,
    }
}

/// Sends a descriptor, without allocating.
fn pass(socket: RawFd, fd: RawFd) -> Result<()> {
    #[repr(C)]
    struct Control {
        header: libc::cmsghdr,
        fd: RawFd,
        pad: RawFd,
    }
    let mut byte = 0u8;
    let mut part = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    // SAFETY: for this structure of integers and padding zeros are a value.
    let mut header: libc::cmsghdr = unsafe { std::mem::zeroed() };
    // CMSG_LEN: the header is as large as its alignment.
    header.cmsg_len = size_of::<libc::cmsghdr>() + size_of::<RawFd>();
    header.cmsg_level = libc::SOL_SOCKET;
    header.cmsg_type = libc::SCM_RIGHTS;
    let mut control = Control { header, fd, pad: 0 };
    // SAFETY: null pointers and zeros are a message without anything.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>();
    loop {
        // SAFETY: everything that the message points to is alive here.
        let sent = unsafe { libc::sendmsg(socket, &raw const message, libc::MSG_NOSIGNAL) };
        if sent >= 0 {
            return Ok(());
        }
        match crate::last_errno() {
            Errno::INTR => {}
            other => return Err(other),
        }
    }
}
