//! Finds files below the upper directory of an overlay.
//!
//! overlayfs truncates a file of its upper layer by path without asking anybody
//! (seen on 6.18: not even an open event). So the fanotify gate cannot protect
//! such a file.

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

/// The upper directories of every overlay in every mount namespace that a
/// process lives in. They are looked up at most once a second, and again before
/// a refusal names one.
#[derive(Debug, Default)]
pub(crate) struct Overlays {
    known: Arc<ArcSwapOption<Known>>,
}

#[derive(Debug)]
struct Known {
    /// When the look began.
    since: Instant,
    uppers: Vec<Upper>,
}

impl Known {
    /// The mount point of an overlay that writes to a directory above a file;
    /// see [`Overlays::above`].
    fn above(&self, file: BorrowedFd<'_>, path: &str, id: InodeId, links: u64) -> Option<&str> {
        let mut here = self.uppers.iter().filter(|upper| upper.id.dev == id.dev);
        // Most systems have no overlay here, so this ends the search.
        let first = here.next()?;
        let ancestors = ancestors(Path::new(path), file);
        std::iter::once(first)
            .chain(here)
            .find(|upper| match &ancestors {
                Some(ancestors) if links <= 1 => ancestors.contains(&upper.id),
                // A file with other links, or without a path that leads to it,
                // may be anywhere on this filesystem.
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
/// How long to look for upper directories.
const LIMIT: Duration = Duration::from_secs(2);
/// How many processes may turn out to be impossible to look at in one search.
const TRIES: usize = 4;

impl Overlays {
    /// The mount point of an overlay that writes to the directory that `file`
    /// is in, or to one above that. `path` is where the file was last seen.
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
        // That overlay may be gone together with its filesystem, and another
        // filesystem may have the same numbers now.
        let known = self.look_up(now);
        known.above(file, path, id, links).map(str::to_owned)
    }

    /// The overlays as they are now, or were after `since`. Callers do not wait
    /// for each other's looks, because a look may hang.
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
                // Another caller may have looked while this one waited for
                // room.
                let published = known.load_full().filter(|known| known.since >= since);
                published.unwrap_or_else(|| Arc::new(find_uppers(looking)))
            });
            // The process at which the look hung is passed over the next time.
            // A namespace that is seen only through that process is missed. But
            // as long as that process cannot be looked at, no proof from
            // scratch succeeds.
            if found.is_ok() {
                break;
            }
        }
        if let Ok(known) = found {
            self.known.store(Some(Arc::clone(&known)));
            return known;
        }
        // The earlier result is better than none.
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
        id: InodeId::from(&stat),
        mount_point: mount.mount_point.clone(),
    })
}

/// The directories above a file, if `path` leads to the file.
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
    Some(InodeId::from(&stat))
}
