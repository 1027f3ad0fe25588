//! Opening a file that is pinned already.

use crate::error::{Error, Kind, Result};
use crate::guard::Guard;
use crate::holder::unexpected;
use mapdirect_proto::{Reply, Request};
use mapdirect_sys::names::path_in_line;
use mapdirect_sys::{Errno, proc};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Opens a file for reading and writing, also while somebody else has pinned
/// a part of it.
///
/// The fanotify gate refuses everybody who opens a pinned file for writing
/// with `ETXTBSY`. A process that may pin files itself can announce that it
/// will open one as another holder; this does that where it is needed. What
/// is done through the descriptor is judged like everything else.
///
/// # Errors
///
/// What `open(2)` answers, and what the guard answers to the announcement.
pub fn open(path: impl AsRef<Path>, guard: &Guard) -> Result<File> {
    let path = path.as_ref();
    let asked = |error: Error| error.asking(format!("open {}", path_in_line(path)));
    let failed = |errno: Errno| asked(Error::new(Kind::System, errno, errno.to_string(), ""));
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => return Ok(File::from(file)),
        Err(Errno::TXTBSY) => {}
        Err(other) => return Err(failed(other)),
    }
    let known =
        rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    let mut left = ATTEMPTS;
    loop {
        tell_of(known.as_fd(), guard).map_err(asked)?;
        left -= 1;
        match proc::reopen(known.as_fd(), flags) {
            Err(Errno::TXTBSY) if left > 0 => {}
            opened => return opened.map(File::from).map_err(failed),
        }
    }
}

/// An announcement is good for a second, which can pass before this thread
/// runs again, and a grant that has just begun may turn everybody away.
const ATTEMPTS: u32 = 3;

/// Tells the guard that this thread is about to open a file, by an `O_PATH`
/// descriptor of it, as a holder may; see [`open`]. The announcement is good for
/// one open, for a second. A grant that has just begun may refuse it all the
/// same.
///
/// # Errors
///
/// `EACCES` without what a pin needs, `EOPNOTSUPP` when no guard answers.
pub fn announce(known: impl AsFd, guard: &Guard) -> Result<()> {
    tell_of(known.as_fd(), guard).map_err(|error| error.asking("announce an open"))
}

fn tell_of(known: BorrowedFd<'_>, guard: &Guard) -> Result<()> {
    let announcement = Request::Announce {
        tid: rustix::thread::gettid().as_raw_nonzero().get(),
    };
    guard.connect()?.converse(
        &announcement,
        known,
        |_, reply, _: Vec<OwnedFd>| match reply {
            Reply::Done => Ok(Some(())),
            _ => Err(unexpected()),
        },
    )
}
