//! Files below the upper directory of an overlay.
//!
//! overlayfs truncates a file of its upper layer by path without asking
//! anybody (seen on 6.18: not even an open event), so such a file cannot be
//! kept still by a gate of permission events.

use crate::table::InodeId;
use mapdirect_sys::proc;
use mapdirect_sys::proc_mountinfo::{self, Mount};
use rustix::fs::{Mode, OFlags};
use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Upper directories of every overlay in every mount namespace that a process
/// lives in, looked up at most once a second.
#[derive(Debug, Default)]
pub(crate) struct Overlays {
    known: Mutex<Option<(Instant, Arc<Vec<Upper>>)>>,
}

#[derive(Debug)]
struct Upper {
    id: InodeId,
    mount_point: String,
}

const FRESH: Duration = Duration::from_secs(1);

impl Overlays {
    /// The mount point of an overlay that writes to the directory `file` is
    /// in, or to one above it. `path` is where the file was last seen.
    pub(crate) fn above(
        &self,
        file: BorrowedFd<'_>,
        path: &str,
        id: InodeId,
        links: u64,
    ) -> Option<String> {
        let uppers = self.uppers();
        let mut here = uppers.iter().filter(|upper| upper.id.dev == id.dev);
        // Most systems have none: look no further.
        let first = here.next()?;
        let ancestors = ancestors(Path::new(path), file);
        std::iter::once(first)
            .chain(here)
            .find(|upper| match &ancestors {
                Some(ancestors) if links <= 1 => ancestors.contains(&upper.id),
                // With other links, or without a path that leads to the
                // file, it may be anywhere on this filesystem.
                _ => links > 0,
            })
            .map(|upper| upper.mount_point.clone())
    }

    fn uppers(&self) -> Arc<Vec<Upper>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, uppers)) = &*known
            && at.elapsed() < FRESH
        {
            return Arc::clone(uppers);
        }
        let uppers = Arc::new(find_uppers());
        *known = Some((Instant::now(), Arc::clone(&uppers)));
        uppers
    }
}

fn find_uppers() -> Vec<Upper> {
    let mut uppers = Vec::new();
    let mut seen = HashSet::new();
    for pid in proc::numbers_in("/proc").unwrap_or_default() {
        let Ok(namespace) = std::fs::read_link(format!("/proc/{pid}/ns/mnt")) else {
            continue;
        };
        if !seen.insert(namespace) {
            continue;
        }
        let mounts = proc_mountinfo::read(Some(pid)).unwrap_or_default();
        uppers.extend(
            mounts
                .iter()
                .filter(|mount| mount.fs_type == "overlay")
                .filter_map(|mount| upper_of(pid, mount)),
        );
    }
    uppers
}

fn upper_of(pid: i32, mount: &Mount) -> Option<Upper> {
    let directory = mount.option("upperdir").filter(|path| !path.is_empty())?;
    let path = PathBuf::from(format!("/proc/{pid}/root/{directory}"));
    let stat = rustix::fs::stat(&path).ok()?;
    Some(Upper {
        id: InodeId {
            dev: stat.st_dev,
            inode: stat.st_ino,
        },
        mount_point: mount.mount_point.clone(),
    })
}

/// The directories above a file, if `path` leads to it.
fn ancestors(path: &Path, file: BorrowedFd<'_>) -> Option<Vec<InodeId>> {
    let wanted = identity(file)?;
    let found = rustix::fs::stat(path).ok()?;
    if (found.st_dev, found.st_ino) != (wanted.dev, wanted.inode) {
        return None;
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut directory = rustix::fs::open(path.parent()?, flags, Mode::empty()).ok()?;
    let mut ancestors: Vec<InodeId> = Vec::new();
    loop {
        let id = identity(directory.as_fd())?;
        // The root is its own parent.
        if ancestors.last() == Some(&id) {
            return Some(ancestors);
        }
        ancestors.push(id);
        directory = parent(directory.as_fd(), flags)?;
    }
}

fn parent(directory: BorrowedFd<'_>, flags: OFlags) -> Option<OwnedFd> {
    rustix::fs::openat(directory, "..", flags, Mode::empty()).ok()
}

fn identity(file: BorrowedFd<'_>) -> Option<InodeId> {
    let stat = rustix::fs::fstat(file).ok()?;
    Some(InodeId {
        dev: stat.st_dev,
        inode: stat.st_ino,
    })
}
