//! Whether a filesystem is frozen. Nothing tells; one has to try.

use rustix::io::Errno;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc;
use std::time::Instant;

/// Tries that wait for a thaw. Each is a thread that cannot be ended.
static WAITING: AtomicUsize = AtomicUsize::new(0);
const MOST: usize = 32;

/// Whether the filesystem of `file` lets a writer in before `deadline`.
///
/// Taking away an attribute that is not there changes nothing, not even a
/// time, but waits for a thaw like every change (`mnt_want_write_file` in
/// `vfs_removexattr`'s callers, seen on 6.18 for XFS and ext4).
pub(crate) fn is_thawed(file: BorrowedFd<'_>, deadline: Instant) -> bool {
    if WAITING.load(SeqCst) >= MOST {
        return false;
    }
    let Ok(file) = file.try_clone_to_owned() else {
        return false;
    };
    let (tell, told) = mpsc::channel();
    WAITING.fetch_add(1, SeqCst);
    let trying = std::thread::Builder::new()
        .name(String::from("thaw"))
        .stack_size(64 * 1024)
        .spawn(move || {
            let result = rustix::fs::fremovexattr(&file, c"user.mapdirect.absent");
            drop(file);
            WAITING.fetch_sub(1, SeqCst);
            // Nobody listens any more if it took too long.
            let _ = tell.send(result);
        });
    if trying.is_err() {
        WAITING.fetch_sub(1, SeqCst);
        return false;
    }
    match told.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        // Without attributes nothing was tried.
        Ok(Err(Errno::OPNOTSUPP | Errno::NOSYS)) | Err(_) => false,
        Ok(_) => true,
    }
}
