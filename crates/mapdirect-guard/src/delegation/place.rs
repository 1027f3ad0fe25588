//! Where a file is, in the mount namespace of the guard.
//!
//! What `/proc` shows for a descriptor of a mount in another namespace is what
//! *that* namespace calls the file, and whoever made the namespace chose that
//! name. So a path counts only if it leads to the file here, without symbolic
//! links: then the file is there, whoever came up with the path. If the path does
//! not, the file is looked for by its handle on the mounts that are here.

use mapdirect_sys::{Errno, descriptors, file_handle, proc, proc_mountinfo};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, StatxFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// The most mounts of a filesystem on which a file is looked for.
const MOST_MOUNTS: usize = 32;

/// The path of a file as this namespace has it, or `None` if it cannot be
/// reached here. The kernel may have to ask others to follow a path, so this may
/// hang. Descriptors must be those of the calling thread.
#[must_use]
pub fn host_path(file: BorrowedFd<'_>) -> Option<PathBuf> {
    let seen = proc::own_path_of(file).ok()?;
    if leads_to(&seen, file) {
        return Some(seen);
    }
    let (stat, handle) = (rustix::fs::fstat(file).ok()?, file_handle::of(file).ok()?);
    let device = (
        rustix::fs::major(stat.st_dev),
        rustix::fs::minor(stat.st_dev),
    );
    let mounts = proc_mountinfo::read(None).ok()?;
    mounts
        .iter()
        .filter(|mount| (mount.major, mount.minor) == device)
        .take(MOST_MOUNTS)
        .find_map(|mount| {
            // A file that is mounted over another is nothing to open.
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let place = rustix::fs::open(mount.mount_point.as_str(), flags, Mode::empty()).ok()?;
            let found = file_handle::open(place.as_fd(), &handle, OFlags::PATH).ok()?;
            let path = proc::own_path_of(found.as_fd()).ok()?;
            leads_to(&path, file).then_some(path)
        })
}

/// The path of a file here, if process `pid` lives in another mount namespace
/// than the guard, whose names mean nothing here. Waits for as long as the lookup
/// takes, in a thread that keeps no descriptors of the guard open.
pub(crate) fn from_another_namespace(pid: i32, file: BorrowedFd<'_>) -> Option<PathBuf> {
    let namespace = |who: &str| std::fs::read_link(format!("/proc/{who}/ns/mnt")).ok();
    let theirs = namespace(&pid.to_string())?;
    if namespace("self").is_none_or(|own| own == theirs) {
        return None;
    }
    let builder = std::thread::Builder::new()
        .name(String::from("place"))
        .stack_size(256 * 1024);
    descriptors::apart(builder, &[file], || host_path(file)).ok()?
}

/// Opens what is at a path. No symbolic link is followed, because a policy is
/// about the names that files have.
fn at(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve)
}

fn leads_to(path: &Path, file: BorrowedFd<'_>) -> bool {
    let id = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino));
    path.is_absolute()
        && at(path).is_ok_and(|there| {
            let there = id(there.as_fd());
            there.is_ok() && there == id(file)
        })
}

/// How old the last change of an inode must be, so that a further change shows:
/// the clock for such times goes in steps of up to 10 ms.
const STEP: Duration = Duration::from_millis(20);
/// How often to look at a file that is being changed.
const TRIES: u32 = 10;

/// The place of a file, as far as a rule about paths may rely on it.
///
/// Whoever may make a link to a file in a directory of theirs could bring a file
/// of others under a rule that way. So a file that belongs to somebody else must
/// have one name only: before and after its path is followed, with nothing
/// changed between. Owners may link their own files: they could move them, too.
///
/// # Errors
///
/// Why there is no such place, for a person.
pub(super) fn of(file: BorrowedFd<'_>, uid: u32) -> Result<PathBuf, String> {
    let nowhere = || String::from("the guard does not find it under any path of the host");
    let look = || {
        let wanted = StatxFlags::NLINK | StatxFlags::CTIME | StatxFlags::UID;
        rustix::fs::statx(file, "", rustix::fs::AtFlags::EMPTY_PATH, wanted)
            .map_err(|errno| format!("statx failed: {errno}"))
    };
    let changed = |stat: &rustix::fs::Statx| (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec);
    for _ in 0..TRIES {
        let before = look()?;
        if before.stx_uid == uid {
            return host_path(file).ok_or_else(nowhere);
        }
        if before.stx_nlink != 1 {
            return Err(format!(
                "it belongs to user {} and has {} names, and a rule about paths is about files \
                 with one",
                before.stx_uid, before.stx_nlink
            ));
        }
        let (seconds, nanoseconds) = changed(&before);
        let last = u64::try_from(seconds)
            .ok()
            .map(|seconds| SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds));
        let is_old = last.is_some_and(|last| last.elapsed().is_ok_and(|age| age >= STEP));
        if !is_old {
            std::thread::sleep(STEP);
            continue;
        }
        let path = host_path(file).ok_or_else(nowhere)?;
        let after = look()?;
        if (after.stx_nlink, changed(&after)) == (1, changed(&before)) {
            return Ok(path);
        }
    }
    Err(String::from(
        "it belongs to somebody else and changes all the time, so its name cannot be relied on",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_path_is_where_the_file_is_now() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().canonicalize().unwrap();
        let path = real.join("a");
        std::fs::write(&path, "x").unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(host_path(file.as_fd()), Some(path.clone()));
        let moved = real.join("b (deleted)");
        std::fs::rename(&path, &moved).unwrap();
        assert_eq!(host_path(file.as_fd()), Some(moved.clone()));
        std::os::unix::fs::symlink(&moved, &path).unwrap();
        assert!(!leads_to(&path, file.as_fd()), "a symbolic link");
        std::fs::remove_file(&moved).unwrap();
        assert_eq!(host_path(file.as_fd()), None);
    }

    #[test]
    fn files_of_others_have_one_name() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().canonicalize().unwrap();
        let path = real.join("a");
        std::fs::write(&path, "x").unwrap();
        let file = File::open(&path).unwrap();
        let own = rustix::process::getuid().as_raw();
        let other = own.wrapping_add(1);
        assert_eq!(of(file.as_fd(), other), Ok(path.clone()));
        std::fs::hard_link(&path, real.join("b")).unwrap();
        assert!(of(file.as_fd(), other).unwrap_err().contains("2 names"));
        assert!(of(file.as_fd(), own).is_ok());
        std::fs::remove_file(&path).unwrap();
        assert_eq!(of(file.as_fd(), other), Ok(real.join("b")));
    }

    /// Somebody who links and unlinks all the time gets through at no moment.
    #[test]
    fn links_that_come_and_go_are_seen() {
        use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().canonicalize().unwrap();
        let (path, link) = (real.join("a"), real.join("allowed"));
        std::fs::write(&path, "x").unwrap();
        std::fs::hard_link(&path, &link).unwrap();
        // A descriptor of the name that comes and goes.
        let file = File::open(&link).unwrap();
        std::fs::remove_file(&link).unwrap();
        let other = rustix::process::getuid().as_raw().wrapping_add(1);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(SeqCst) {
                    std::fs::hard_link(&path, &link).unwrap();
                    std::fs::remove_file(&link).unwrap();
                }
            });
            for _ in 0..5 {
                assert!(of(file.as_fd(), other).is_err());
            }
            over.store(true, SeqCst);
        });
    }
}
