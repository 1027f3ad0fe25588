//! proc(5): what a thread is doing, and who has which file open.
//!
//! Everything that is read here is kernel text about processes that may vanish
//! or change at any moment. The parsers accept any text. The readers never
//! follow a link into another filesystem unless their documentation says so.

use crate::seam::{self, Call};
use crate::{Errno, Result, names};
use rustix::fs::{Mode, OFlags};
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// The content of `/proc/<tid>/syscall`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyscallState {
    /// The thread was on a processor or waiting for one; nothing is known.
    Running,
    /// The thread sleeps, but not inside a system call.
    Outside,
    /// The thread sleeps inside a system call.
    Inside(Syscall),
}

/// The registers with which a sleeping thread entered the kernel.
///
/// These are the registers that the kernel itself uses
/// (`task_current_syscall`), not memory of the process, so nobody can change
/// them while the thread sleeps. But the number belongs to the table of the ABI
/// that was used, which is not shown. A kernel thread shows number 0 and zeros,
/// and an io_uring worker shows its creator's registers. These two have `sp` 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Syscall {
    /// System call number.
    pub number: i64,
    /// The six arguments.
    pub args: [u64; 6],
    /// Stack pointer of the user program.
    pub sp: u64,
    /// Program counter of the user program.
    pub pc: u64,
}

impl Syscall {
    /// Whether the registers belong to a program that made the call itself.
    #[must_use]
    pub const fn is_genuine(&self) -> bool {
        self.sp != 0 && self.pc != 0
    }
}

/// Parses `/proc/<tid>/syscall`; `None` for text of no known form.
#[must_use]
pub fn parse_syscall(text: &[u8]) -> Option<SyscallState> {
    let text = std::str::from_utf8(text).ok()?.trim_end();
    if text == "running" {
        return Some(SyscallState::Running);
    }
    let mut words = text.split(' ');
    let number: i64 = words.next()?.parse().ok()?;
    let mut hex = words.map(|word| {
        word.strip_prefix("0x")
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
    });
    if number == -1 {
        return Some(SyscallState::Outside);
    }
    let mut args = [0; 6];
    for arg in &mut args {
        *arg = hex.next()??;
    }
    let sp = hex.next()??;
    let pc = hex.next()??;
    Some(SyscallState::Inside(Syscall {
        number,
        args,
        sp,
        pc,
    }))
}

/// The kernel functions that a sleeping thread is inside of, innermost first,
/// from the text of `/proc/<tid>/stack`. Suffixes that the compiler adds to
/// clones of a function are removed.
pub fn stack_functions(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        let frame = line.split_once(' ').map_or(line, |(_, frame)| frame);
        let name = frame.split_once('+').map_or(frame, |(name, _)| name);
        let name = name.split_once('.').map_or(name, |(name, _)| name);
        (!name.is_empty()).then_some(name)
    })
}

/// The kernel function in which a thread sleeps (`/proc/<tid>/wchan`), without
/// the scheduler's own functions and without compiler suffixes. `None` if the
/// thread runs or waits for a processor.
///
/// The answer is exact: the kernel reads it while it keeps the thread from
/// waking up (`get_wchan`, kernel/sched/core.c). Like the stack it cannot be
/// read while the process is in the middle of `execve(2)` (seen on 6.18).
///
/// # Errors
///
/// `ENOENT` or `ESRCH` when the thread is gone.
pub fn sleeps_in(tid: i32) -> Result<Option<String>> {
    let text = read_task_file(tid, "wchan")?;
    let name = text.trim_end();
    let name = name.split_once('.').map_or(name, |(name, _)| name);
    Ok((!name.is_empty() && name != "0").then(|| name.to_owned()))
}

/// How much a thread has run (`/proc/<tid>/schedstat`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Runs {
    /// The total time on a processor, in nanoseconds.
    pub time: u64,
    /// How often the thread was given a processor. As long as this stays the
    /// same, the thread did not run, or ran without a break.
    pub times: u64,
}

/// How much a thread has run so far.
///
/// # Errors
///
/// `ENOENT` or `ESRCH` when the thread is gone, `EINVAL` when the kernel does
/// not count (without `CONFIG_SCHED_INFO`, which every distribution has).
pub fn runs(tid: i32) -> Result<Runs> {
    parse_runs(&read_task_file(tid, "schedstat")?).ok_or(Errno::INVAL)
}

pub(crate) fn parse_runs(text: &str) -> Option<Runs> {
    let mut words = text.split_ascii_whitespace();
    let time = words.next()?.parse().ok()?;
    let times = words.nth(1)?.parse().ok()?;
    (times > 0).then_some(Runs { time, times })
}

/// The processor that a thread runs on, waits for, or last ran on.
///
/// # Errors
///
/// `ENOENT` or `ESRCH` when it is gone, `EINVAL` for text of no known form.
pub fn processor(tid: i32) -> Result<usize> {
    let stat = read_task_file(tid, "stat")?;
    parse_stat_field(&stat, 39).ok_or(Errno::INVAL)
}

/// The clock ticks that a thread ran outside of the kernel.
///
/// # Errors
///
/// `ENOENT` or `ESRCH` when it is gone, `EINVAL` for text of no known form.
pub fn ticks_outside(tid: i32) -> Result<u64> {
    let stat = read_task_file(tid, "stat")?;
    parse_stat_field(&stat, 14).ok_or(Errno::INVAL)
}

/// Whether a thread has ended and only waits to be collected. It is past
/// everything that it could do to a file (`exit_notify` in `do_exit`,
/// kernel/exit.c), and has no stack that could be read.
///
/// # Errors
///
/// `ENOENT` or `ESRCH` when it is gone, `EINVAL` for text of no known form.
pub fn has_ended(tid: i32) -> Result<bool> {
    let stat = read_task_file(tid, "stat")?;
    let state: char = parse_stat_field(&stat, 3).ok_or(Errno::INVAL)?;
    Ok(matches!(state, 'Z' | 'X'))
}

/// The path `/proc/thread-self/fd/N` of a descriptor: the calling thread may have a
/// table of its own.
pub(crate) fn own_fd_path(file: BorrowedFd<'_>) -> CString {
    let name = format!("/proc/thread-self/fd/{}", file.as_raw_fd());
    // A number holds no NUL.
    CString::new(name).unwrap_or_default()
}

/// Opens the inode behind `file` once more, as a second description with its
/// own access mode and flags. Works for files that have been renamed or
/// unlinked.
///
/// # Errors
///
/// As `open(2)`: `EACCES`, `EROFS`, and `ETXTBSY` from a gate.
pub fn reopen(file: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd> {
    seam::check(Call::Reopen)?;
    let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
    rustix::fs::open(own_fd_path(file), flags, Mode::empty())
}

/// The path at which a descriptor's file was last seen, as
/// [`names::name`] writes it.
#[must_use]
pub fn path_of(file: BorrowedFd<'_>) -> String {
    std::fs::read_link(own_fd_path(file).to_string_lossy().as_ref())
        .map_or_else(|_| String::from("?"), |path| names::name(path.as_os_str()))
}

/// The same inside a message: quoted if something in it cannot be shown.
#[must_use]
pub fn shown_path_of(file: BorrowedFd<'_>) -> String {
    names::shown(&names::original(&path_of(file)), true)
}

/// The path at which a descriptor of the calling thread was last seen, as the
/// namespace of the descriptor's mount has it. The thread may have a descriptor
/// table of its own.
///
/// # Errors
///
/// `ENOENT` without proc(5).
pub fn own_path_of(file: BorrowedFd<'_>) -> Result<std::path::PathBuf> {
    let name = format!("/proc/thread-self/fd/{}", file.as_raw_fd());
    std::fs::read_link(name).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// Opens a file below `/proc/<id>`, for processes and threads alike.
///
/// # Errors
///
/// `ENOENT` or `ESRCH` when the thread is gone, `EACCES` or `EPERM`.
pub fn open_task_file(id: i32, name: &str) -> Result<OwnedFd> {
    let path = format!("/proc/{id}/{name}");
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// Reads a small proc file from its start into `buffer` and returns the filled
/// part. What does not fit is cut off.
///
/// # Errors
///
/// `ESRCH` when the thread is gone.
pub fn reread<'buffer>(file: BorrowedFd<'_>, buffer: &'buffer mut [u8]) -> Result<&'buffer [u8]> {
    loop {
        match rustix::io::pread(file, &mut *buffer, 0) {
            Ok(length) => return Ok(&buffer[..length]),
            Err(Errno::INTR) => {}
            Err(other) => return Err(other),
        }
    }
}

/// Reads a whole proc file.
///
/// # Errors
///
/// As [`open_task_file`] and [`reread`].
pub fn read_task_file(id: i32, name: &str) -> Result<String> {
    read_text(&open_task_file(id, name)?)
}

fn read_text(file: &OwnedFd) -> Result<String> {
    let mut text = Vec::new();
    let mut chunk = [0; 8192];
    loop {
        match rustix::io::read(file.as_fd(), &mut chunk) {
            Ok(0) => break,
            Ok(length) => text.extend_from_slice(&chunk[..length]),
            Err(Errno::INTR) => {}
            Err(other) => return Err(other),
        }
    }
    // File names may contain any bytes.
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The start time of a process or thread, in clock ticks since boot. Together
/// with the id it identifies one process for as long as the machine runs; an id
/// alone is used again. `execve(2)` does not change the start time.
///
/// # Errors
///
/// `ENOENT` or `ESRCH` when it is gone, `EINVAL` for text of no known form.
pub fn start_time(id: i32) -> Result<u64> {
    parse_start_time(&read_task_file(id, "stat")?).ok_or(Errno::INVAL)
}

/// [`start_time`] of a thread of process `pid`.
///
/// # Errors
///
/// As [`start_time`]. Also `ENOENT` when the thread belongs to another process.
pub fn thread_start_time(pid: i32, tid: i32) -> Result<u64> {
    let stat = read_task_file(pid, &format!("task/{tid}/stat"))?;
    parse_start_time(&stat).ok_or(Errno::INVAL)
}

/// [`start_time`] of the calling process.
///
/// # Errors
///
/// `ENOENT` without proc(5), `EINVAL` for text of no known form.
pub fn own_start_time() -> Result<u64> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open("/proc/self/stat", flags, Mode::empty())?;
    parse_start_time(&read_text(&file)?).ok_or(Errno::INVAL)
}

/// Opens the directory of a process. It goes with the process: once that has
/// been collected, nothing can be read below it, whoever has the number.
///
/// # Errors
///
/// `ENOENT` when the process is gone.
pub fn open_process(pid: i32) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(format!("/proc/{pid}"), flags, Mode::empty())
}

/// The number of the parent of a process, given its directory; 0 if it has none
/// in the namespace of this `/proc`.
///
/// # Errors
///
/// `ENOENT` or `ESRCH` when the process is gone, `EINVAL` for text of no known
/// form.
pub fn parent_of(process: BorrowedFd<'_>) -> Result<i32> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(process, "stat", flags, Mode::empty())?;
    parse_stat_field(&read_text(&file)?, 4).ok_or(Errno::INVAL)
}

/// Field 22 of `/proc/<id>/stat`.
pub(crate) fn parse_start_time(stat: &str) -> Option<u64> {
    parse_stat_field(stat, 22)
}

/// A field of `/proc/<id>/stat` by its number in proc(5), which must be at
/// least 3.
pub(crate) fn parse_stat_field<T: std::str::FromStr>(stat: &str, number: usize) -> Option<T> {
    // The command in parentheses may contain anything, even parentheses. Field
    // 3 is the first behind it.
    let (_, behind) = stat.rsplit_once(')')?;
    let at = number.checked_sub(3)?;
    behind.split_ascii_whitespace().nth(at)?.parse().ok()
}

/// Whether a process is in the initial user namespace, where its
/// capabilities count everywhere.
///
/// # Errors
///
/// `ENOENT` or `ESRCH` when it is gone, `EACCES` if the caller may not know.
pub fn in_initial_user_namespace(pid: i32) -> Result<bool> {
    // PROC_USER_INIT_INO of include/linux/proc_ns.h.
    const INITIAL: &[u8] = b"user:[4026531837]";
    let link = rustix::fs::readlink(format!("/proc/{pid}/ns/user"), Vec::new())?;
    Ok(link.as_bytes() == INITIAL)
}

/// The name of a thread (`/proc/<tid>/comm`), with control characters replaced,
/// because any process chooses its own name.
#[must_use]
pub fn command(tid: i32) -> String {
    read_task_file(tid, "comm").map_or_else(
        |_| String::from("?"),
        |text| printable(text.trim_end_matches('\n')),
    )
}

/// `text` with every character replaced that could deceive whoever looks at a
/// terminal; see
/// [`is_deceptive`](crate::names::is_deceptive).
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| {
            if names::is_deceptive(c) {
                '\u{fffd}'
            } else {
                c
            }
        })
        .collect()
}

/// `text` with the octal escapes decoded that the kernel writes for blanks and
/// backslashes in names.
#[must_use]
pub fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .filter(|digits| *first == b'\\' && digits.iter().all(u8::is_ascii_digit))
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(byte) = octal {
            bytes.push(byte);
            rest = &tail[3..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The numeric names in a directory of proc: processes in `/proc`, threads in
/// `/proc/<pid>/task`, descriptors in `/proc/<pid>/fd`.
///
/// # Errors
///
/// `ENOENT` when the directory is gone, `EACCES`.
pub fn numbers_in(path: &str) -> Result<Vec<i32>> {
    let directory = rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let mut numbers = Vec::new();
    for entry in rustix::fs::Dir::new(directory)? {
        let entry = entry?;
        if let Ok(Ok(number)) = entry.file_name().to_str().map(str::parse) {
            numbers.push(number);
        }
    }
    Ok(numbers)
}

/// The content of `/proc/<pid>/fdinfo/<fd>` about a descriptor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FdInfo {
    /// The open flags as `fcntl(2)` with `F_GETFL` returns them, and
    /// `O_CLOEXEC`.
    pub flags: u32,
    /// The inode number; since 5.14.
    pub inode: u64,
    /// The number of descriptors on their way through this socket.
    pub in_flight: u64,
    /// The number of places for registered files that this io_uring has, or
    /// `None` if that is not shown.
    pub places: Option<usize>,
    /// The paths of the registered files, escaped ([`unescape`]).
    pub registered: Vec<String>,
    /// Record and whole-file locks that belong to the descriptor's description
    /// or, through the description, to the process.
    pub locks: Vec<crate::proc_locks::Lock>,
}

impl FdInfo {
    /// Whether the description allows writing.
    #[must_use]
    pub const fn is_writable(&self) -> bool {
        self.flags & 0o3 != 0 && self.flags & libc::O_PATH.cast_unsigned() == 0
    }

    /// Whether an io_uring shows which files are registered with it. It does
    /// not while it is busy; older kernels then showed the places, but none of
    /// the files.
    #[must_use]
    pub fn tells_registered(&self) -> bool {
        self.places
            .is_some_and(|places| places == 0 || !self.registered.is_empty())
    }

    /// Whether the description is an `O_PATH` one.
    #[must_use]
    pub const fn is_path(&self) -> bool {
        self.flags & libc::O_PATH.cast_unsigned() != 0
    }
}

/// Parses the text of an fdinfo file. Missing fields stay zero.
#[must_use]
pub fn parse_fdinfo(text: &str) -> FdInfo {
    let mut info = FdInfo::default();
    let mut registered = 0usize;
    for line in text.lines() {
        if registered > 0 {
            registered -= 1;
            if let Some((slot, path)) = line.trim_start().split_once(": ")
                && slot.parse::<u32>().is_ok()
            {
                info.registered.push(path.to_owned());
                continue;
            }
        }
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim();
        match key {
            "flags" => info.flags = u32::from_str_radix(value, 8).unwrap_or(0),
            "ino" => info.inode = value.parse().unwrap_or(0),
            "scm_fds" => info.in_flight = value.parse().unwrap_or(0),
            "UserFiles" => {
                info.places = value.parse().ok();
                registered = info.places.unwrap_or(0);
            }
            "lock" => info.locks.extend(crate::proc_locks::parse_line(value)),
            _ => {}
        }
    }
    info
}

/// The control group of a process, from the text of `/proc/<pid>/cgroup`: that
/// of the unified hierarchy, or else of the first one that says anything.
#[must_use]
pub fn parse_cgroup(text: &str) -> Option<&str> {
    let mut first = None;
    for line in text.lines() {
        // The path is the rest: it may contain colons.
        let mut fields = line.splitn(3, ':');
        let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        if number == "0" && controllers.is_empty() {
            return Some(path);
        }
        if first.is_none() && path != "/" {
            first = Some(path);
        }
    }
    first
}

/// How many mappings a process may have (`/proc/sys/vm/max_map_count`).
///
/// # Errors
///
/// When the file cannot be read, or does not contain a number.
pub fn max_map_count() -> Result<usize> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open("/proc/sys/vm/max_map_count", flags, Mode::empty())?;
    read_text(&file)?.trim().parse().map_err(|_| Errno::PROTO)
}

/// The number of mappings that the calling process has.
///
/// # Errors
///
/// When `/proc` is not mounted.
pub fn count_own_mappings() -> Result<usize> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open("/proc/self/maps", flags, Mode::empty())?;
    Ok(read_text(&file)?.lines().count())
}

/// The mappings of the calling process, in order, and their names: a path, a
/// word in brackets, or an empty string.
///
/// # Errors
///
/// When `/proc` is not mounted.
pub fn own_mappings() -> Result<Vec<(MapsEntry, String)>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open("/proc/self/maps", flags, Mode::empty())?;
    let text = read_text(&file)?;
    let mappings = text.lines().filter_map(|line| {
        let name = line.splitn(6, ' ').nth(5).unwrap_or_default();
        Some((parse_maps_line(line)?, name.trim_start().to_owned()))
    });
    Ok(mappings.collect())
}

/// One mapping of `/proc/<pid>/maps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapsEntry {
    /// The first address.
    pub start: u64,
    /// The address behind the last.
    pub end: u64,
    /// Whether `PROT_WRITE` is set.
    pub writable: bool,
    /// Whether `PROT_EXEC` is set.
    pub executable: bool,
    /// Whether the mapping is `MAP_SHARED`.
    pub shared: bool,
    /// Offset in the file.
    pub offset: u64,
    /// Major number of the filesystem's device.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Inode number.
    pub inode: u64,
}

/// Parses a line of `/proc/<pid>/maps`.
#[must_use]
pub fn parse_maps_line(line: &str) -> Option<MapsEntry> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let permissions = words.next()?.as_bytes();
    let offset = words.next()?;
    let (major, minor) = words.next()?.split_once(':')?;
    let inode = words.next()?;
    Some(MapsEntry {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        writable: permissions.get(1) == Some(&b'w'),
        executable: permissions.get(2) == Some(&b'x'),
        shared: permissions.get(3) == Some(&b's'),
        offset: u64::from_str_radix(offset, 16).ok()?,
        major: u32::from_str_radix(major, 16).ok()?,
        minor: u32::from_str_radix(minor, 16).ok()?,
        inode: inode.parse().ok()?,
    })
}

#[cfg(test)]
mod cgroup_tests {
    use super::parse_cgroup;

    #[test]
    fn the_group_of_the_unified_hierarchy_counts() {
        assert_eq!(parse_cgroup("0::/a.slice/b:c\n"), Some("/a.slice/b:c"));
        assert_eq!(parse_cgroup("3:pids:/x\n0::/y\n"), Some("/y"));
        assert_eq!(parse_cgroup("3:pids:/\n1:name=systemd:/z\n"), Some("/z"));
        assert_eq!(parse_cgroup(""), None);
        assert_eq!(parse_cgroup("nonsense"), None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_start_time_is_found_behind_any_name() {
        let fields: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        for name in ["x", "a b", ") 1 2 3 (", "))", "\n"] {
            let line = format!("7 ({name}) {}\n", fields.join(" "));
            assert_eq!(parse_start_time(&line), Some(22), "{name:?}");
        }
        for line in ["", "7 (x", "7 (x)", "7 (x) S 1", "7 (x) 4 5 6 7 8 9 a"] {
            assert_eq!(parse_start_time(line), None, "{line:?}");
        }
    }

    #[test]
    fn mappings_have_names() {
        let mappings = own_mappings().unwrap();
        let own = std::env::current_exe().unwrap();
        assert!(
            mappings
                .iter()
                .any(|(_, name)| *name == own.to_string_lossy())
        );
        assert!(mappings.iter().any(|(_, name)| name == "[stack]"));
        let is_sorted = mappings.is_sorted_by_key(|(entry, _)| entry.start);
        assert!(is_sorted);
    }

    #[test]
    fn a_process_knows_its_start_as_others_do() {
        let own = own_start_time().unwrap();
        assert_eq!(start_time(std::process::id().cast_signed()), Ok(own));
        assert!(start_time(i32::MAX).is_err());
        let (pid, parent) = (std::process::id(), std::os::unix::process::parent_id());
        let thread = |tid: u32| thread_start_time(pid.cast_signed(), tid.cast_signed());
        assert_eq!(thread(pid), Ok(own));
        assert!(thread(parent).is_err());
        let other = std::thread::spawn(move || {
            let tid = rustix::thread::gettid().as_raw_nonzero().get();
            (start_time(tid), thread_start_time(pid.cast_signed(), tid))
        });
        let (alone, within) = other.join().unwrap();
        assert!(alone.is_ok() && alone == within);
    }

    #[test]
    fn a_sleeping_thread_shows_its_call() {
        let text = b"17 0x3 0x7f 0xa 0x1000 0x0 0x0 0x7fffc2 0x7f41be\n";
        let Some(SyscallState::Inside(call)) = parse_syscall(text) else {
            panic!("not parsed");
        };
        assert_eq!((call.number, call.args[3]), (17, 0x1000));
        assert!(call.is_genuine());
    }

    #[test]
    fn the_other_forms_of_syscall() {
        assert_eq!(parse_syscall(b"running\n"), Some(SyscallState::Running));
        assert_eq!(
            parse_syscall(b"-1 0x7ffc 0x7f10\n"),
            Some(SyscallState::Outside)
        );
        let kthread = b"0 0x0 0x0 0x0 0x0 0x0 0x0 0x0 0x0\n";
        let Some(SyscallState::Inside(call)) = parse_syscall(kthread) else {
            panic!("not parsed");
        };
        assert!(!call.is_genuine(), "a kernel thread looks like read(2)");
    }

    #[test]
    fn a_sleeper_tells_where_it_sleeps() {
        let (tell, told) = std::sync::mpsc::channel();
        let (release, released) = std::sync::mpsc::channel::<()>();
        let sleeper = std::thread::spawn(move || {
            tell.send(rustix::thread::gettid().as_raw_nonzero().get())
                .unwrap();
            let _ = released.recv();
        });
        let tid = told.recv().unwrap();
        for _ in 0..5000 {
            // A kernel without symbols, or one that does not let us look.
            let own = rustix::process::geteuid().is_root();
            if !own
                || sleeps_in(tid)
                    .unwrap()
                    .is_some_and(|name| name.starts_with("futex"))
            {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let before = runs(tid).unwrap();
        assert_eq!(runs(tid), Ok(before));
        drop(release);
        sleeper.join().unwrap();
        assert!(sleeps_in(i32::MAX).is_err());
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        assert_eq!(sleeps_in(own), Ok(None));
        assert!(processor(own).is_ok() && ticks_outside(own).is_ok());
        assert_eq!(has_ended(own), Ok(false));
    }

    #[test]
    fn how_much_a_thread_has_run() {
        let runs = Runs {
            time: 57,
            times: 28,
        };
        assert_eq!(parse_runs("57 954 28\n"), Some(runs));
        for text in ["", "0 0 0\n", "1 2", "a b c"] {
            assert_eq!(parse_runs(text), None, "{text:?}");
        }
    }

    #[test]
    fn stack_frames_lose_offsets_and_suffixes() {
        let text = "[<0>] fanotify_handle_event+0x19/0x20\n\
                    [<0>] rw_verify_area.part.0+0xb1/0x150\n\
                    [<0>] xfs_file_ioctl+0x1/0x2 [xfs]\n";
        let names: Vec<_> = stack_functions(text).collect();
        assert_eq!(
            names,
            ["fanotify_handle_event", "rw_verify_area", "xfs_file_ioctl"]
        );
    }

    #[test]
    fn an_fdinfo_with_everything() {
        let text = "pos:\t0\nflags:\t02100002\nmnt_id:\t30\nino:\t131\nscm_fds: 2\n\
                    UserFiles:\t2\n    0: /mnt/x\n    1: /mnt/y: z\nUserBufs:\t0\n\
                    lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:131 5 5\n";
        let info = parse_fdinfo(text);
        assert!(info.is_writable());
        assert_eq!((info.inode, info.in_flight), (131, 2));
        assert_eq!(info.registered, ["/mnt/x", "/mnt/y: z"]);
        assert!(info.tells_registered());
        assert_eq!(info.locks.len(), 1);
    }

    #[test]
    fn a_ring_that_tells_nothing() {
        let none = "UserFiles:\t0\n";
        assert!(parse_fdinfo(none).tells_registered());
        let busy = "UserFiles:\t3\nUserBufs:\t0\n";
        assert!(!parse_fdinfo(busy).tells_registered());
        assert!(!parse_fdinfo("pos:\t0\n").tells_registered());
    }

    #[test]
    fn names_lose_their_escapes() {
        assert_eq!(unescape(r"/a\040b\134c\011"), "/a b\\c\t");
        assert_eq!(unescape(r"/a\0"), r"/a\0");
    }

    #[test]
    fn a_line_of_maps() {
        let line = "7f0000000000-7f0000200000 rw-s 00001000 07:0a 131     /mnt/a file (deleted)";
        let entry = parse_maps_line(line).unwrap();
        assert_eq!((entry.major, entry.minor, entry.inode), (7, 10, 131));
        assert!(entry.shared && entry.writable && !entry.executable);
        assert_eq!(entry.offset, 0x1000);
    }

    #[test]
    fn this_process_is_readable() {
        let text = read_task_file(std::process::id().cast_signed(), "maps").unwrap();
        assert!(text.lines().all(|line| parse_maps_line(line).is_some()));
        assert!(!numbers_in("/proc/self/task").unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn no_text_upsets_a_parser(text in ".{0,200}") {
            let _ = parse_syscall(text.as_bytes());
            let _ = stack_functions(&text).count();
            let _ = parse_fdinfo(&text);
            let _ = parse_maps_line(&text);
            let _ = parse_runs(&text);
            let _ = crate::proc_locks::parse_line(&text);
            let _ = crate::proc_mountinfo::parse_line(&text);
        }
    }
}
