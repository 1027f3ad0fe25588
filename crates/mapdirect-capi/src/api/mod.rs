//! The entry points, and the numbers of the header.

mod durable;
mod map;
mod pin;
mod told;

pub use durable::*;
pub use map::*;
pub use pin::*;
pub use told::*;

use crate::boundary::Failure;
use crate::hints;
use crate::table::Table;
use mapdirect::{DirectMap, EventFd, Pin};
use mapdirect_sys::errno;
use mapdirect_sys::pthread_atfork::pthread_atfork;
use std::ffi::{c_char, c_int};
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd};
use std::sync::Once;

/// `off_t` of <sys/types.h>.
#[expect(non_camel_case_types, reason = "it is the name in C")]
pub type off_t = i64;

/// A pin, and the descriptor that tells of it, once somebody has asked for that.
#[derive(Debug)]
struct Told<T> {
    what: T,
    event: Option<EventFd>,
}

impl<T> Told<T> {
    fn new(what: T) -> Self {
        Self { what, event: None }
    }
}

static MAPS: Table<Told<DirectMap>> = Table::new();
static PINS: Table<Told<Pin>> = Table::new();

/// Has children of this process know what they lack.
fn prepare_for_forks() {
    extern "C" fn in_child() {
        MAPS.after_fork();
        PINS.after_fork();
        hints::after_fork();
    }
    static ONCE: Once = Once::new();
    // Without memory for that, a child may wait for a thread that it lacks.
    ONCE.call_once(|| {
        let _ = pthread_atfork(in_child);
    });
}

/// The descriptor that C names.
///
/// # Safety
///
/// Nobody closes it while the result is used; if somebody does, calls fail with
/// `EBADF`, or are about what is behind the number then.
unsafe fn descriptor<'call>(fd: c_int) -> Result<BorrowedFd<'call>, Failure> {
    let closed = || {
        Failure::new(
            errno::EBADF,
            &format!("{fd} is no open descriptor"),
            "give a descriptor of the file",
        )
    };
    if fd < 0 {
        return Err(closed());
    }
    // SAFETY: the caller's promise; it is not -1.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_getfd(borrowed).map_err(|_| closed())?;
    Ok(borrowed)
}

/// Where a range of `length` bytes ends.
fn end_of(offset: off_t, length: u64) -> Result<u64, Failure> {
    let start = u64::try_from(offset).ok();
    start
        .and_then(|start| start.checked_add(length))
        .filter(|end| *end <= i64::MAX.cast_unsigned())
        .ok_or_else(|| {
            let obstacle = "the range begins before the file, or ends beyond the largest one";
            Failure::new(
                errno::EOVERFLOW,
                obstacle,
                "give a smaller offset or length",
            )
        })
}

fn invalid(obstacle: &str, help: &str) -> Failure {
    Failure::new(errno::EINVAL, obstacle, help)
}

/// A descriptor of the caller's own.
fn event_fd_of(event: &EventFd) -> Result<c_int, Failure> {
    let own = event.as_fd().try_clone_to_owned();
    let own = own.map_err(|error| {
        let errno = error.raw_os_error().unwrap_or(errno::EIO);
        Failure::new(
            errno,
            "no descriptor is left",
            "close some, or raise the limit",
        )
    })?;
    Ok(own.into_raw_fd())
}

/// Why the last call of this thread failed, in words: what was asked, what stood
/// in the way and who, and in a line that begins with "help:" what helps. Never
/// NULL; empty if none has failed. It is valid until the thread's next call that
/// fails.
#[unsafe(no_mangle)]
pub extern "C" fn mapdirect_strerror() -> *const c_char {
    crate::boundary::words()
}
