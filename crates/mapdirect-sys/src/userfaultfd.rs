//! userfaultfd(2), ioctl_userfaultfd(2): memory that answers a store with
//! SIGBUS.
//!
//! This module has only what is needed for that. Faults are never handed to a
//! monitor; they raise SIGBUS (`UFFD_FEATURE_SIGBUS`), and a system call that
//! is given such a buffer fails with `EFAULT`. The only thing that is read from
//! the descriptor is where memory went by munmap(2) and mremap(2). With
//! `UFFD_USER_MODE_ONLY` opening needs no privilege.
//!
//! Layouts and numbers are from `include/uapi/linux/userfaultfd.h`.

use crate::{Errno, Result, checked, last_errno};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const USER_MODE_ONLY: libc::c_int = 1;
const API: u64 = 0xAA;

const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_EVENT_REMAP: u64 = 1 << 2;
const FEATURE_EVENT_UNMAP: u64 = 1 << 6;
const FEATURE_SIGBUS: u64 = 1 << 7;
const FEATURES: u64 =
    FEATURE_PAGEFAULT_FLAG_WP | FEATURE_EVENT_REMAP | FEATURE_EVENT_UNMAP | FEATURE_SIGBUS;

/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`.
const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
/// `_IOWR(0xAA, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: libc::c_ulong = 0xC020_AA00;
/// `_IOWR(0xAA, 0x06, struct uffdio_writeprotect)`.
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xC018_AA06;

const REGISTER_MODE_MISSING: u64 = 1 << 0;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;

const EVENT_REMAP: u8 = 0x14;
const EVENT_UNMAP: u8 = 0x16;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtect {
    start: u64,
    length: u64,
    mode: u64,
}

/// `struct uffd_msg`, packed: an event and its three numbers.
const MESSAGE: usize = 32;

const _: () = assert!(size_of::<Api>() == 24 && size_of::<Register>() == 32);
const _: () = assert!(size_of::<WriteProtect>() == 24);

/// What has happened to registered memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The range is not mapped any more. It may contain memory that was not
    /// registered.
    Unmapped(Range<usize>),
    /// The mapping at `from` is now at `to`. If it is not at both places, an
    /// [`Event::Unmapped`] follows.
    Moved {
        /// The former range.
        from: Range<usize>,
        /// The start of the new range.
        to: usize,
    },
    /// An event that this version does not know.
    Unknown,
}

/// A userfaultfd of the calling process. When it is closed, memory that was
/// registered with it becomes an ordinary mapping again.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
}

impl Userfaultfd {
    /// Opens a userfaultfd that raises SIGBUS and reports moves. Reading it
    /// does not wait.
    ///
    /// # Errors
    ///
    /// `ENOSYS` or `EPERM` when the kernel has none or a sandbox forbids it
    /// (`vm.unprivileged_userfaultfd` does not matter), `EINVAL` when it lacks
    /// write protection (x86-64 has it since 5.7), `EMFILE`, `ENFILE`,
    /// `ENOMEM`.
    pub fn open() -> Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: flags only.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = i32::try_from(fd)
            .ok()
            .filter(|fd| *fd >= 0)
            .ok_or_else(last_errno)?;
        // SAFETY: the kernel just gave us this descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut api = Api {
            api: API,
            features: FEATURES,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_API reads and writes one `struct uffdio_api`.
        checked(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) })?;
        Ok(Self { fd })
    }

    /// Makes every access to a missing page of the range raise SIGBUS, and
    /// every store to a write-protected one.
    ///
    /// # Errors
    ///
    /// `EINVAL` for memory of an ordinary file, `EBUSY` for memory of another
    /// userfaultfd, `ENOMEM`.
    ///
    /// # Safety
    ///
    /// The range must be the caller's own mapping. Everything that refers to it
    /// must be prepared for SIGBUS.
    pub unsafe fn register(&self, range: &Range<usize>) -> Result<()> {
        let mut register = Register {
            start: range.start as u64,
            length: range.len() as u64,
            mode: REGISTER_MODE_MISSING | REGISTER_MODE_WP,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER reads and writes one `struct
        // uffdio_register`; the caller answers for the memory.
        checked(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) })
            .map(drop)
    }

    /// Write-protects the existing pages of a registered range.
    ///
    /// # Errors
    ///
    /// `EAGAIN` while a thread waits for its event to be read: read the event
    /// first.
    pub fn write_protect(&self, range: &Range<usize>) -> Result<()> {
        let mut protect = WriteProtect {
            start: range.start as u64,
            length: range.len() as u64,
            mode: WRITEPROTECT_MODE_WP,
        };
        // SAFETY: UFFDIO_WRITEPROTECT reads one `struct uffdio_writeprotect`;
        // it changes registered memory only, and only how a store to it ends.
        checked(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut protect) })
            .map(drop)
    }

    /// Reads what has happened to registered memory, in order. The thread that
    /// moved or unmapped memory waits until its event has been read.
    ///
    /// # Errors
    ///
    /// `EAGAIN` when there is no event.
    pub fn read(&self) -> Result<Event> {
        let mut message = [0; MESSAGE];
        loop {
            match rustix::io::read(&self.fd, &mut message) {
                Ok(MESSAGE) => return Ok(parse(&message)),
                Ok(_) => return Err(Errno::PROTO),
                Err(Errno::INTR) => {}
                Err(other) => return Err(other),
            }
        }
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

pub(crate) fn parse(message: &[u8; MESSAGE]) -> Event {
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&message[8 + 8 * at..16 + 8 * at]);
        usize::try_from(u64::from_ne_bytes(bytes)).unwrap_or(usize::MAX)
    };
    match message[0] {
        EVENT_UNMAP => Event::Unmapped(number(0)..number(1)),
        EVENT_REMAP => Event::Moved {
            from: number(0)..number(0).saturating_add(number(2)),
            to: number(1),
        },
        _ => Event::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_as_the_header_lays_them_out() {
        let mut message = [0; MESSAGE];
        let mut put = |at: usize, value: u64| {
            message[8 + 8 * at..16 + 8 * at].copy_from_slice(&value.to_ne_bytes());
        };
        put(0, 0x7000);
        put(1, 0x9000);
        put(2, 0x1000);
        message[0] = EVENT_UNMAP;
        assert_eq!(parse(&message), Event::Unmapped(0x7000..0x9000));
        message[0] = EVENT_REMAP;
        let moved = Event::Moved {
            from: 0x7000..0x8000,
            to: 0x9000,
        };
        assert_eq!(parse(&message), moved);
        message[0] = 0x12;
        assert_eq!(parse(&message), Event::Unknown);
    }

    #[test]
    fn registered_memory_keeps_its_bytes_and_tells_when_it_goes() {
        let uffd = Userfaultfd::open().unwrap();
        let page = rustix::param::page_size();
        // SAFETY: no address asked for.
        let memory = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                3 * page,
                rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
                rustix::mm::MapFlags::PRIVATE,
            )
        }
        .unwrap();
        let start = memory.expose_provenance();
        let range = start..start + 3 * page;
        let last = std::ptr::with_exposed_provenance_mut::<u8>(start + page - 1);
        // SAFETY: a byte of the mapping.
        unsafe { last.write_volatile(7) };
        // SAFETY: the test's own mapping.
        unsafe { uffd.register(&range) }.unwrap();
        uffd.write_protect(&range).unwrap();
        // SAFETY: the page is there, and readable.
        let found = unsafe { last.read_volatile() };
        assert_eq!(found, 7);
        assert_eq!(uffd.read(), Err(Errno::AGAIN));
        let gone = std::thread::spawn(move || {
            let memory = std::ptr::with_exposed_provenance_mut(start);
            // SAFETY: nothing refers to the mapping any more.
            unsafe { rustix::mm::munmap(memory, 3 * page) }
        });
        let event = loop {
            match uffd.read() {
                Err(Errno::AGAIN) => std::thread::yield_now(),
                other => break other,
            }
        };
        assert_eq!(event, Ok(Event::Unmapped(range)));
        gone.join().unwrap().unwrap();
    }
}
