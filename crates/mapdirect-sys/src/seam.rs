//! A seam for faults in tests: calls of this crate can be made to fail.
//!
//! Without the feature `seam` (and outside this crate's own tests) the check
//! compiles to nothing. With the feature, a test plans failures for the next
//! calls of its own thread:
//!
//! ```
//! # #[cfg(feature = "seam")] {
//! use mapdirect_sys::{Errno, seam::{self, Call}};
//! seam::fail_after(Call::Fiemap, 1, Errno::IO); // the second FIEMAP fails
//! # seam::clear();
//! # }
//! ```

/// The calls that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Call {
    /// `fanotify_mark(2)` adding a mark.
    FanotifyMark,
    /// `fcntl(2)` with `F_SETLEASE`.
    SetLease,
    /// `fcntl(2)` with `F_OFD_SETLK`.
    OfdSetLock,
    /// `ioctl(2)` with `FS_IOC_FIEMAP`.
    Fiemap,
    /// `fsync(2)`.
    Fsync,
    /// `open(2)` of a second description through `/proc/self/fd`.
    Reopen,
    /// `mmap(2)`.
    Mmap,
    /// `fallocate(2)`.
    Fallocate,
    /// `madvise(2)` with `MADV_POPULATE_WRITE`.
    PopulateWrite,
    /// `sync_file_range(2)`.
    SyncFileRange,
}

impl Call {
    /// Every call with a seam, for tests that fail each in turn.
    pub const ALL: [Self; 10] = [
        Self::FanotifyMark,
        Self::SetLease,
        Self::OfdSetLock,
        Self::Fiemap,
        Self::Fsync,
        Self::Reopen,
        Self::Mmap,
        Self::Fallocate,
        Self::PopulateWrite,
        Self::SyncFileRange,
    ];
}

#[cfg(any(test, feature = "seam"))]
mod planned {
    use super::Call;
    use crate::Errno;
    use std::cell::RefCell;

    thread_local! {
        static PLAN: RefCell<Vec<(Call, u32, Errno)>> = const { RefCell::new(Vec::new()) };
    }

    /// Lets the calling thread make `call` successfully `skip` times and then
    /// fail once with `errno`.
    pub fn fail_after(call: Call, skip: u32, errno: Errno) {
        PLAN.with_borrow_mut(|plan| plan.push((call, skip, errno)));
    }

    /// Forgets every failure planned for the calling thread.
    pub fn clear() {
        PLAN.with_borrow_mut(Vec::clear);
    }

    pub(crate) fn check(call: Call) -> crate::Result<()> {
        PLAN.with_borrow_mut(|plan| {
            let Some(at) = plan.iter().position(|(planned, ..)| *planned == call) else {
                return Ok(());
            };
            if plan[at].1 > 0 {
                plan[at].1 -= 1;
                return Ok(());
            }
            Err(plan.remove(at).2)
        })
    }
}

#[cfg(any(test, feature = "seam"))]
pub(crate) use planned::check;
#[cfg(any(test, feature = "seam"))]
pub use planned::{clear, fail_after};

#[cfg(not(any(test, feature = "seam")))]
#[inline(always)]
#[expect(
    clippy::unnecessary_wraps,
    reason = "one signature with and without the seam"
)]
pub(crate) fn check(_call: Call) -> crate::Result<()> {
    Ok(())
}
