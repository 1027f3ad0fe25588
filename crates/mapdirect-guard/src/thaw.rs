//! Finds out whether a filesystem is frozen. The kernel does not tell, so the
//! only way is to try.

use rustix::io::Errno;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// The number of tries that wait for a thaw. Each is a thread that cannot be
/// ended.
static WAITING: AtomicUsize = AtomicUsize::new(0);
const MOST: usize = 32;

/// Waits until one more try is permitted. Returns `false` if all tries hang for
/// too long.
fn begin(deadline: Instant) -> bool {
    let one_more = |waiting| (waiting < MOST).then_some(waiting + 1);
    while WAITING.fetch_update(SeqCst, SeqCst, one_more).is_err() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// Whether the filesystem of `file` lets a writer in before `deadline`.
///
/// The try removes an extended attribute that does not exist. That changes
/// nothing, not even a time, but waits for a thaw like every change
/// (`mnt_want_write_file` in `vfs_removexattr`'s callers, seen on 6.18 for XFS
/// and ext4).
pub(crate) fn is_thawed(file: BorrowedFd<'_>, deadline: Instant) -> bool {
    if !begin(deadline) {
        return false;
    }
    let ended = || {
        WAITING.fetch_sub(1, SeqCst);
    };
    let Ok(file) = file.try_clone_to_owned() else {
        ended();
        return false;
    };
    let (tell, told) = mpsc::channel();
    let trying = std::thread::Builder::new()
        .name(String::from("thaw"))
        .stack_size(64 * 1024)
        .spawn(move || {
            let result = rustix::fs::fremovexattr(&file, c"user.mapdirect.absent");
            drop(file);
            ended();
            // Nobody receives the result any more if it took too long.
            let _ = tell.send(result);
        });
    if trying.is_err() {
        ended();
        return false;
    }
    match told.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        // Without extended attributes nothing was tried.
        Ok(Err(Errno::OPNOTSUPP | Errno::NOSYS)) | Err(_) => false,
        Ok(_) => true,
    }
}
