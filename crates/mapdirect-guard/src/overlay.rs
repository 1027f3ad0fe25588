//! Files below the upper directory of an overlay.
//!
//! overlayfs truncates a file of its upper layer by path without asking
//! anybody (seen on 6.18: not even an open event), so such a file cannot be
//! kept still by a gate of permission events.

use crate::bounded::{Looking, Stuck, within};
use crate::table::InodeId;
use arc_swap::ArcSwapOption;
use mapdirect_sys::proc;
use mapdirect_sys::proc_mountinfo::{self, Mount};
use rustix::fs::{Mode, OFlags};
use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Upper directories of every overlay in every mount namespace that a process
/// lives in, looked up at most once a second, and again before a word is said
/// of one.
#[derive(Debug, Default)]
pub(crate) struct Overlays {
    known: Arc<ArcSwapOption<Known>>,
}

#[derive(Debug)]
struct Known {
    /// When it was begun to look.
    since: Instant,
    uppers: Vec<Upper>,
}

impl Known {
    /// The mount point of an overlay that writes above a file; see
    /// [`Overlays::above`].
    fn above(&self, file: BorrowedFd<'_>, path: &str, id: InodeId, links: u64) -> Option<&str> {
        let mut here = self.uppers.iter().filter(|upper| upper.id.dev == id.dev);
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
            .map(|upper| &*upper.mount_point)
    }
}

#[derive(Debug)]
struct Upper {
    id: InodeId,
    mount_point: String,
}

const FRESH: Duration = Duration::from_secs(1);
/// How long to look for them.
const LIMIT: Duration = Duration::from_secs(2);
/// How many processes may be found impossible to look at in one go.
const TRIES: usize = 4;

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
        let now = Instant::now();
        let known = self.look_up(now.checked_sub(FRESH).unwrap_or(now));
        let above = known.above(file, path, id, links)?;
        if known.since >= now {
            return Some(above.to_owned());
        }
        // It may be gone, its filesystem with it, and another be there under
        // the same numbers.
        let known = self.look_up(now);
        known.above(file, path, id, links).map(str::to_owned)
    }

    /// What there is, or was after `since`. Nobody waits for anybody else here:
    /// a look may hang.
    fn look_up(&self, since: Instant) -> Arc<Known> {
        if let Some(known) = self.known.load_full()
            && known.since >= since
        {
            return known;
        }
        let mut found = Err(Stuck { pid: 0 });
        for _ in 0..TRIES {
            let known = Arc::clone(&self.known);
            found = within(LIMIT, move |looking| {
                // Somebody else may have looked while this waited for room.
                let published = known.load_full().filter(|known| known.since >= since);
                published.unwrap_or_else(|| Arc::new(find_uppers(looking)))
            });
            // Where it hung is passed over the next time. Whatever namespace
            // is seen through that process alone is missed: but as long as
            // it cannot be looked at, no proof from scratch succeeds.
            if found.is_ok() {
                break;
            }
        }
        if let Ok(known) = found {
            self.known.store(Some(Arc::clone(&known)));
            return known;
        }
        // What was known is better than nothing.
        self.known.load_full().unwrap_or_else(|| {
            Arc::new(Known {
                since: Instant::now(),
                uppers: Vec::new(),
            })
        })
    }
}

fn find_uppers(looking: &Looking) -> Known {
    let since = Instant::now();
    let mut uppers = Vec::new();
    let mut seen = HashSet::new();
    for pid in proc::numbers_in("/proc").unwrap_or_default() {
        if looking.at(pid).is_err() {
            continue;
        }
        let Ok(namespace) = std::fs::read_link(format!("/proc/{pid}/ns/mnt")) else {
            continue;
        };
        if seen.contains(&namespace) {
            continue;
        }
        let Ok(mounts) = proc_mountinfo::read(Some(pid)) else {
            continue;
        };
        seen.insert(namespace);
        uppers.extend(
            mounts
                .iter()
                .filter(|mount| mount.fs_type == "overlay")
                .filter_map(|mount| upper_of(pid, mount)),
        );
    }
    Known { since, uppers }
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
