//! System calls that rustix has no safe wrapper for, or that must be made in
//! an unusual way: as a 32-bit program, through aio, through io_uring.
//!
//! All of them act on descriptors and memory of the caller only.

pub mod adversary;
#[cfg(target_arch = "x86_64")]
pub mod compat;
mod memory;
mod uring;

use io_uring::{IoUring, opcode, squeue, types};
use mapdirect_sys::Errno;
pub use memory::*;
use rustix::fs::{Mode, OFlags};
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
pub use uring::*;

/// Result of a system call.
pub type Result<T> = std::result::Result<T, Errno>;

fn checked(ret: libc::c_long) -> Result<libc::c_long> {
    if ret >= 0 {
        return Ok(ret);
    }
    let errno = std::io::Error::last_os_error().raw_os_error();
    Err(Errno::from_raw_os_error(errno.unwrap_or(libc::EIO)))
}

/// A C string of a path.
#[must_use]
pub fn c_path(path: &Path) -> CString {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes()).unwrap_or_default()
}

fn signed(offset: u64) -> i64 {
    i64::try_from(offset).unwrap_or(i64::MAX)
}

/// `ioctl(2)` with a structure the kernel reads and may write.
pub fn ioctl<T>(file: BorrowedFd<'_>, request: u64, argument: &mut T) -> Result<i32> {
    // SAFETY: the callers pair each request with the structure its number
    // encodes the size of.
    let ret = unsafe { libc::ioctl(file.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    checked(ret.into()).map(|_| ret)
}

/// `ioctl(2)` with an integer argument.
pub fn ioctl_value(file: BorrowedFd<'_>, request: u64, argument: u64) -> Result<i32> {
    // SAFETY: the request takes a number (FICLONE: a descriptor) or ignores
    // its argument.
    let ret = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    checked(ret.into()).map(|_| ret)
}

/// A descriptor of another process: `pidfd_getfd(2)`.
pub fn take_descriptor(pid: i32, fd: i32) -> Result<OwnedFd> {
    // SAFETY: integers only.
    let pidfd = checked(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let pidfd = i32::try_from(pidfd).map_err(|_| Errno::IO)?;
    // SAFETY: the kernel has just made it for us.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    // SAFETY: integers only.
    let taken = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    let taken = i32::try_from(checked(taken)?).map_err(|_| Errno::IO)?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(taken) })
}

/// `fallocate(2)` with any mode bits.
pub fn fallocate(file: BorrowedFd<'_>, mode: i32, offset: u64, length: u64) -> Result<()> {
    // SAFETY: integers only.
    let ret = unsafe { libc::fallocate(file.as_raw_fd(), mode, signed(offset), signed(length)) };
    checked(ret.into()).map(drop)
}

/// `pwritev2(2)` of one buffer.
pub fn pwritev2(file: BorrowedFd<'_>, bytes: &[u8], offset: u64, flags: i32) -> Result<usize> {
    let vector = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: one vector over a slice that outlives the call.
    let ret = unsafe {
        libc::pwritev2(
            file.as_raw_fd(),
            &raw const vector,
            1,
            signed(offset),
            flags,
        )
    };
    checked(ret as libc::c_long).map(|written| usize::try_from(written).unwrap_or(0))
}

/// `truncate(2)`.
pub fn truncate(path: &CString, size: u64) -> Result<()> {
    // SAFETY: a C string that outlives the call.
    let ret = unsafe { libc::truncate(path.as_ptr(), signed(size)) };
    checked(ret.into()).map(drop)
}

/// `creat(2)`, which the C library makes of openat(2) where there is no such call.
pub fn creat(path: &Path) -> Result<OwnedFd> {
    let path = c_path(path);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a C string that outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_creat, path.as_ptr(), 0o644) };
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: a C string that outlives the call.
    let fd = libc::c_long::from(unsafe { libc::creat(path.as_ptr(), 0o644) });
    checked(fd).map(owned)
}

fn owned(fd: libc::c_long) -> OwnedFd {
    // SAFETY: the kernel just returned this descriptor to the caller.
    unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap_or(-1)) }
}

/// Opens by handle: `name_to_handle_at(2)` and `open_by_handle_at(2)`.
pub fn open_by_handle(path: &Path, mount: BorrowedFd<'_>, flags: i32) -> Result<OwnedFd> {
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        handle: [u8; 128],
    }
    let mut handle = Handle {
        bytes: 128,
        kind: 0,
        handle: [0; 128],
    };
    let mut mount_id = 0i32;
    let path = c_path(path);
    // SAFETY: the handle has room for as many bytes as it says.
    checked(unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            libc::AT_FDCWD,
            path.as_ptr(),
            &raw mut handle,
            &raw mut mount_id,
            0,
        )
    })?;
    // SAFETY: as above; the handle is what the kernel filled in.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_raw_fd(),
            &raw mut handle,
            flags | libc::O_CLOEXEC,
        )
    };
    checked(fd).map(owned)
}

/// `openat2(2)`.
pub fn openat2(path: &Path, flags: i32) -> Result<OwnedFd> {
    #[repr(C)]
    struct How {
        flags: u64,
        mode: u64,
        resolve: u64,
    }
    let how = How {
        flags: u64::from((flags | libc::O_CLOEXEC).cast_unsigned()),
        mode: 0,
        resolve: 0,
    };
    let path = c_path(path);
    // SAFETY: the structure has the size given.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            libc::AT_FDCWD,
            path.as_ptr(),
            &raw const how,
            size_of::<How>(),
        )
    };
    checked(fd).map(owned)
}

/// One write through Linux aio: `io_setup(2)`, `io_submit(2)`,
/// `io_getevents(2)`.
pub fn aio_write(file: BorrowedFd<'_>, bytes: &[u8], offset: u64, rw_flags: i32) -> Result<usize> {
    #[repr(C)]
    struct Iocb {
        data: u64,
        key: u32,
        rw_flags: i32,
        opcode: u16,
        priority: i16,
        fd: u32,
        buffer: u64,
        length: u64,
        offset: i64,
        reserved: u64,
        flags: u32,
        event_fd: u32,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Event {
        data: u64,
        object: u64,
        result: i64,
        result2: i64,
    }
    const PWRITE: u16 = 1;
    let mut context = 0u64;
    // SAFETY: io_setup writes one context id.
    checked(unsafe { libc::syscall(libc::SYS_io_setup, 1, &raw mut context) })?;
    let mut block = Iocb {
        data: 0,
        key: 0,
        rw_flags,
        opcode: PWRITE,
        priority: 0,
        fd: file.as_raw_fd().cast_unsigned(),
        buffer: bytes.as_ptr() as u64,
        length: bytes.len() as u64,
        offset: signed(offset),
        reserved: 0,
        flags: 0,
        event_fd: 0,
    };
    let mut blocks = [&raw mut block];
    // SAFETY: one control block whose buffer outlives the wait below.
    let submitted = unsafe { libc::syscall(libc::SYS_io_submit, context, 1, blocks.as_mut_ptr()) };
    let result = checked(submitted).and_then(|_| {
        let mut event = Event::default();
        // SAFETY: room for one event; no timeout.
        let events = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                context,
                1,
                1,
                &raw mut event,
                std::ptr::null_mut::<libc::timespec>(),
            )
        };
        checked(events).and_then(|_| of_result(event.result))
    });
    // SAFETY: the context made above; nothing of it is in flight any more.
    unsafe { libc::syscall(libc::SYS_io_destroy, context) };
    result.map(|written| usize::try_from(written).unwrap_or(0))
}

fn of_result(result: i64) -> Result<i64> {
    if result < 0 {
        Err(Errno::from_raw_os_error(
            i32::try_from(-result).unwrap_or(libc::EIO),
        ))
    } else {
        Ok(result)
    }
}

/// Begins a write through Linux aio and does not wait for it: the context
/// stays, and whoever tears the memory down waits. The bytes are leaked.
pub fn aio_begin_write(file: BorrowedFd<'_>, bytes: &'static [u8]) -> Result<()> {
    let mut context = 0u64;
    // SAFETY: io_setup writes one context id.
    checked(unsafe { libc::syscall(libc::SYS_io_setup, 1, &raw mut context) })?;
    // The layout of `struct iocb` in words: opcode 1 (PWRITE) and the
    // descriptor are in the third, buffer, length and offset follow.
    let mut block = [0u64; 8];
    block[2] = 1 | u64::from(file.as_raw_fd().cast_unsigned()) << 32;
    block[3] = bytes.as_ptr() as u64;
    block[4] = bytes.len() as u64;
    let mut blocks = [block.as_mut_ptr()];
    // SAFETY: one control block, which the kernel copies; its buffer lives
    // for ever.
    let submitted = unsafe { libc::syscall(libc::SYS_io_submit, context, 1, blocks.as_mut_ptr()) };
    checked(submitted).map(drop)
}

/// Ends the calling thread, and nothing else: not even the process, when it is
/// the first one.
pub fn end_thread() -> ! {
    loop {
        // SAFETY: nothing of this thread is used afterwards, and nobody joins
        // the first one.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
}

/// A mapping of a file made the plain way.
#[derive(Debug)]
pub struct PlainMap {
    address: usize,
    length: usize,
}

impl PlainMap {
    /// `mmap(2)`.
    pub fn new(
        file: BorrowedFd<'_>,
        prot: i32,
        flags: i32,
        offset: u64,
        length: usize,
    ) -> Result<Self> {
        // SAFETY: without MAP_FIXED nothing is replaced.
        let address = unsafe { mapdirect_sys::mmap::map(0, length, prot, flags, file, offset) }?;
        Ok(Self { address, length })
    }

    /// Where it begins.
    #[must_use]
    pub const fn address(&self) -> usize {
        self.address
    }

    fn pointer(&self) -> *mut libc::c_void {
        std::ptr::with_exposed_provenance_mut(self.address)
    }

    /// `madvise(2)`.
    pub fn advise(&self, advice: i32) -> Result<()> {
        madvise(self.address, self.length, advice)
    }

    /// `mprotect(2)`.
    pub fn protect(&self, prot: i32) -> Result<()> {
        // SAFETY: no reference to the mapping exists.
        let ret = unsafe { libc::mprotect(self.pointer(), self.length, prot) };
        checked(ret.into()).map(drop)
    }

    /// Stores one byte. The caller knows that the mapping can take it.
    pub fn store(&self, at: usize, value: u8) {
        assert!(at < self.length);
        let byte = std::ptr::with_exposed_provenance_mut::<u8>(self.address + at);
        // SAFETY: inside the mapping, by the assertion; volatile, since
        // others may look.
        unsafe { byte.write_volatile(value) };
    }

    /// Loads one byte.
    #[must_use]
    pub fn load(&self, at: usize) -> u8 {
        assert!(at < self.length);
        let byte = std::ptr::with_exposed_provenance::<u8>(self.address + at);
        // SAFETY: inside the mapping, by the assertion.
        unsafe { byte.read_volatile() }
    }
}

impl Drop for PlainMap {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more.
        let _ = unsafe { mapdirect_sys::mmap::unmap(self.address, self.length) };
    }
}

/// A shared mapping of a file that goes to and fro between two places, with many
/// other mappings in between.
#[derive(Debug)]
pub struct Shuttle {
    base: usize,
    length: usize,
    reserved: usize,
    is_at_base: bool,
}

impl Shuttle {
    /// Maps so many bytes of the file from its start, for storing to them.
    pub fn new(file: BorrowedFd<'_>, length: usize, between: usize) -> Result<Self> {
        let page = usize::try_from(mapdirect_sys::mmap::page_size()).unwrap_or(usize::MAX);
        let reserved = 2 * length + 2 * between * page;
        let base = anonymous(reserved)?;
        let fixed = libc::MAP_FIXED;
        let both = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: only memory is replaced that was reserved just now, and to which
        // nothing refers.
        unsafe { mapdirect_sys::mmap::map(base, length, both, libc::MAP_SHARED | fixed, file, 0) }?;
        for number in 0..between {
            let place = base + length + 2 * number * page;
            let private = libc::MAP_PRIVATE | fixed;
            // SAFETY: as above.
            unsafe { mapdirect_sys::mmap::map(place, page, libc::PROT_READ, private, file, 0) }?;
        }
        Ok(Self {
            base,
            length,
            reserved,
            is_at_base: true,
        })
    }

    /// Moves it to its other place.
    pub fn go(&mut self) -> Result<()> {
        let other = self.base + self.reserved - self.length;
        let (from, to) = if self.is_at_base {
            (self.base, other)
        } else {
            (other, self.base)
        };
        let pointer = std::ptr::with_exposed_provenance_mut::<libc::c_void>;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: both places are reserved for this, the process has one thread that
        // maps, and nothing refers to either.
        let moved =
            unsafe { libc::mremap(pointer(from), self.length, self.length, flags, pointer(to)) };
        if moved == libc::MAP_FAILED {
            return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
        }
        self.is_at_base = !self.is_at_base;
        Ok(())
    }
}

/// Memory for direct reads: as aligned as any device asks for.
#[derive(Debug)]
pub struct PageBuffer {
    address: usize,
    length: usize,
}

impl PageBuffer {
    /// Of so many bytes.
    ///
    /// # Panics
    ///
    /// Without memory.
    #[must_use]
    pub fn new(length: usize) -> Self {
        #[expect(clippy::unwrap_used, reason = "a test without memory is over")]
        let address = anonymous(length).unwrap();
        Self { address, length }
    }

    /// The bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        let start = std::ptr::with_exposed_provenance_mut(self.address);
        // SAFETY: private memory of the value, borrowed as the value is.
        unsafe { std::slice::from_raw_parts_mut(start, self.length) }
    }
}

impl Drop for PageBuffer {
    fn drop(&mut self) {
        // SAFETY: nothing refers to it any more.
        let _ = unsafe { munmap(self.address, self.length) };
    }
}

/// Puts the calling process, which must have one thread only, into a user
/// namespace of its own.
pub fn own_user_namespace() -> Result<()> {
    // SAFETY: takes flags; nothing that is in memory changes.
    let ret = unsafe { libc::unshare(libc::CLONE_NEWUSER) };
    checked(ret.into()).map(drop)
}

/// Has the signals that shells and nohup(1) ignore for what they start in the
/// background do again what they do: a shell that is started with one of them
/// ignored cannot trap it.
pub fn heed_signals() {
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
        // SAFETY: SIG_DFL runs no code.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// The user without any privilege.
pub const NOBODY: u32 = 65_534;

/// Takes every privilege from the calling process, which must have one thread
/// only, for good.
///
/// It can still be looked at through `/proc`, as a program can that such a
/// user starts.
pub fn become_nobody() -> Result<()> {
    // SAFETY: an empty list.
    checked(unsafe { libc::setgroups(0, std::ptr::null()) }.into())?;
    // SAFETY: takes numbers.
    checked(unsafe { libc::setresgid(NOBODY, NOBODY, NOBODY) }.into())?;
    // SAFETY: takes numbers.
    checked(unsafe { libc::setresuid(NOBODY, NOBODY, NOBODY) }.into())?;
    // Its files in /proc are root's otherwise.
    // SAFETY: takes numbers.
    checked(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1) }.into()).map(drop)
}

/// Has the calling process killed when its parent ends.
pub fn die_with_parent() {
    // It always can.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
}

/// Puts the calling process, which must have one thread only, into a user and
/// a mount namespace of its own, as their root.
pub fn own_mapped_mount_namespace() -> Result<()> {
    let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
    // SAFETY: takes flags; nothing that is in memory changes.
    let ret = unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) };
    checked(ret.into())?;
    for (name, text) in [
        ("setgroups", String::from("deny")),
        ("uid_map", format!("0 {} 1", uid.as_raw())),
        ("gid_map", format!("0 {} 1", gid.as_raw())),
    ] {
        let path = format!("/proc/self/{name}");
        let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::io::write(&file, text.as_bytes())?;
    }
    Ok(())
}

/// Maps the beginning of a file privately, for as long as the process lives.
pub fn map_private(file: &std::fs::File, length: usize) -> Result<&'static mut [u8]> {
    // SAFETY: a fresh mapping, which nobody unmaps.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE,
            file.as_raw_fd(),
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(Errno::from_raw_os_error(
            std::io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO),
        ));
    }
    // SAFETY: as long as that, and nobody else's. Whoever touches it waits for
    // the file.
    Ok(unsafe { std::slice::from_raw_parts_mut(address.cast(), length) })
}

/// `epoll_wait(2)` of one event into memory that need not be there yet.
pub fn epoll_wait_into(epoll: i32, memory: &mut [u8]) -> Result<()> {
    assert!(memory.len() >= size_of::<libc::epoll_event>());
    // SAFETY: there is room for one event, which is made of plain bytes.
    let ret = unsafe { libc::epoll_wait(epoll, memory.as_mut_ptr().cast(), 1, -1) };
    checked(ret.into()).map(drop)
}

/// `getdents64(2)` into memory that need not be there yet.
pub fn getdents_into(directory: BorrowedFd<'_>, memory: &mut [u8]) -> Result<usize> {
    // SAFETY: the kernel writes no more than there is room for.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            directory.as_raw_fd(),
            memory.as_mut_ptr(),
            memory.len(),
        )
    };
    checked(ret).map(|length| usize::try_from(length).unwrap_or(0))
}

/// Duplicates a descriptor that this process was started with.
pub fn duplicate(number: i32) -> Result<OwnedFd> {
    // SAFETY: two integers. If the number is not open, this fails.
    let fd = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 0) };
    checked(fd.into())?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes `to` a duplicate of `from`, whatever it was: for programs that expect
/// to find another file where theirs was.
pub fn dup2(from: i32, to: i32) {
    // SAFETY: takes numbers; the callers own both.
    unsafe { libc::dup2(from, to) };
}

/// Puts the calling process, which must have one thread only, into a mount
/// namespace of its own, and into a user namespace before that if asked for.
pub fn own_mount_namespace(of_own_user: bool) -> Result<()> {
    let user = if of_own_user { libc::CLONE_NEWUSER } else { 0 };
    // SAFETY: takes flags; nothing that is in memory changes.
    let ret = unsafe { libc::unshare(libc::CLONE_NEWNS | user) };
    checked(ret.into()).map(drop)
}

/// Has the kernel write a record to a file whenever a process ends, or to none
/// any more (`acct(2)`).
pub fn account_to(path: Option<&Path>) -> Result<()> {
    let path = path.map(c_path);
    let pointer = path.as_ref().map_or(std::ptr::null(), |path| path.as_ptr());
    // SAFETY: no path, or a C string that outlives the call.
    let ret = unsafe { libc::acct(pointer) };
    checked(ret.into()).map(drop)
}

/// Waits for a child and returns its exit status, or 128 and the signal that
/// killed it.
pub fn wait(pid: i32) -> Result<i32> {
    let mut status = 0;
    // SAFETY: writes one int.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    checked(waited.into())?;
    Ok(if libc::WIFEXITED(status) {
        libc::WEXITSTATUS(status)
    } else {
        128 + libc::WTERMSIG(status)
    })
}

/// Maps a page of a file with `MAP_SHARED | MAP_DIRECT`, as a program without
/// a library does, and unmaps it at once.
pub fn map_direct_once(file: BorrowedFd<'_>) -> Result<()> {
    const MAP_DIRECT: i32 = 0x200_0000;
    let length = 4096;
    // SAFETY: the kernel chooses the address, and nothing uses the memory.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | MAP_DIRECT,
            file.as_raw_fd(),
            0,
        )
    };
    if address == libc::MAP_FAILED {
        checked(-1)?;
    }
    // SAFETY: that mapping, which nothing else knows of.
    checked(unsafe { libc::munmap(address, length) }.into()).map(drop)
}

/// `union bpf_attr` of the commands below (include/uapi/linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct BpfElement {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Does something to an element of a map, or to its place: `key` and `value` are
/// addresses.
fn on_bpf_map(map: BorrowedFd<'_>, command: i32, key: u64, value: u64) -> Result<()> {
    let mut element = BpfElement {
        map: map.as_raw_fd().cast_unsigned(),
        key,
        value,
        ..BpfElement::default()
    };
    // SAFETY: reads the attributes, and what they point to: a key and a value of
    // the callers, longer than any of these maps has.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            &raw mut element,
            size_of::<BpfElement>(),
        )
    };
    checked(ret).map(drop)
}

/// Reads every element of a map of the bpf filesystem that is a hash, and writes
/// back those that `change` says it has changed. Returns how many those were.
pub fn change_bpf_map(
    path: &std::path::Path,
    mut change: impl FnMut(&mut [u64]) -> bool,
) -> Result<u32> {
    const MAP_LOOKUP_ELEM: i32 = 1;
    const MAP_UPDATE_ELEM: i32 = 2;
    const MAP_GET_NEXT_KEY: i32 = 4;
    let map = mapdirect_sys::bpf::get(path)?;
    let call = |command, key, value| on_bpf_map(map.as_fd(), command, key, value);
    let (mut key, mut value) = ([0u64; 8], [0u64; 128]);
    let (mut from, mut changed) = (0, 0);
    loop {
        let at = key.as_mut_ptr() as u64;
        match call(MAP_GET_NEXT_KEY, from, at) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(changed),
            Err(errno) => return Err(errno),
        }
        from = at;
        match call(MAP_LOOKUP_ELEM, at, value.as_mut_ptr() as u64) {
            Ok(()) if change(&mut value) => {
                call(MAP_UPDATE_ELEM, at, value.as_ptr() as u64)?;
                changed += 1;
            }
            // It may be gone by now.
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Deletes every key from a map of the bpf filesystem; sets every element of
/// one that is an array to zeros. Returns how many there were.
pub fn empty_bpf_map(path: &std::path::Path) -> Result<u32> {
    const MAP_UPDATE_ELEM: i32 = 2;
    const MAP_DELETE_ELEM: i32 = 3;
    const MAP_GET_NEXT_KEY: i32 = 4;
    let map = mapdirect_sys::bpf::get(path)?;
    let call = |command, key, value| on_bpf_map(map.as_fd(), command, key, value);
    let zeros = vec![0u8; 1 << 20];
    let mut key = [0u8; 64];
    let mut emptied = 0;
    // The first key, as long as there is one; an array has one after another.
    let mut after: Option<[u8; 64]> = None;
    loop {
        let from = after.as_ref().map_or(0, |after| after.as_ptr() as u64);
        match call(MAP_GET_NEXT_KEY, from, key.as_mut_ptr() as u64) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(emptied),
            Err(errno) => return Err(errno),
        }
        let at = key.as_ptr() as u64;
        match call(MAP_DELETE_ELEM, at, 0) {
            Ok(()) => {}
            Err(Errno::INVAL) => {
                call(MAP_UPDATE_ELEM, at, zeros.as_ptr() as u64)?;
                after = Some(key);
            }
            Err(errno) => return Err(errno),
        }
        emptied += 1;
    }
}
