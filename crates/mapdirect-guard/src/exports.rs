//! Filesystems that clients of an NFS server may write to.
//!
//! The server sets the size of a file for a client without asking any listener
//! (`nfsd_setattr`, fs/nfsd/vfs.c, calls `notify_change`), and without a
//! description that a lease would count. So under a gate of permission events
//! nothing on such a filesystem can be pinned: a file handle reaches all of
//! it, whichever directory is exported. (`bpf` judges it where it happens.)
//!
//! What the kernel exports just now is in its own list; what it would export
//! when a client asks for it is in that of `exportfs(8)`.

use crate::bounded::within;
use arc_swap::ArcSwapOption;
use mapdirect_sys::proc;
use rustix::fs::{AtFlags, StatxFlags};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where such lists are.
const LISTS: [&str; 3] = [
    "/proc/fs/nfsd/exports",
    "/proc/fs/nfs/exports",
    "/var/lib/nfs/etab",
];
const FRESH: Duration = Duration::from_secs(1);
/// A directory may lie on a filesystem that does not answer.
const LIMIT: Duration = Duration::from_millis(500);

/// What is exported for writing, looked up at most once a second.
#[derive(Debug, Default)]
pub(crate) struct Exports {
    known: ArcSwapOption<Known>,
}

#[derive(Debug)]
struct Known {
    since: Instant,
    exported: Vec<Exported>,
}

#[derive(Debug)]
struct Exported {
    path: String,
    /// Its device; nothing if it does not tell in time.
    device: Option<u64>,
}

impl Exports {
    /// The directory by which a filesystem is exported for writing.
    pub(crate) fn of(&self, device: u64) -> Option<String> {
        let known = match self.known.load_full() {
            Some(known) if known.since.elapsed() < FRESH => known,
            _ => {
                let known = Arc::new(Known {
                    since: Instant::now(),
                    exported: all(),
                });
                self.known.store(Some(Arc::clone(&known)));
                known
            }
        };
        known
            .exported
            .iter()
            .find(|exported| exported.device == Some(device))
            .map(|exported| exported.path.clone())
    }
}

fn all() -> Vec<Exported> {
    let texts = LISTS.iter().filter_map(|list| std::fs::read(list).ok());
    let mut paths: Vec<String> = texts
        .flat_map(|text| writable(&String::from_utf8_lossy(&text)))
        .collect();
    paths.sort_unstable();
    paths.dedup();
    let tell = |path: String| {
        let asked = path.clone();
        let device = within(LIMIT, move |_| device_of(&asked)).ok().flatten();
        Exported { path, device }
    };
    paths.into_iter().map(tell).collect()
}

fn device_of(path: &str) -> Option<u64> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let stat = rustix::fs::statx(rustix::fs::CWD, path, flags, StatxFlags::INO).ok()?;
    Some(rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor))
}

/// The directories of a list that somebody may write to: each line has a path
/// and clients with options, `/srv *(rw,sync) host(ro)`.
fn writable(list: &str) -> Vec<String> {
    let lines = list.lines().filter(|line| line.starts_with('/'));
    let may_write = |client: &str| {
        client
            .split_once('(')
            .is_none_or(|(_, options)| options.split([',', ')']).any(|option| option == "rw"))
    };
    lines
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let path = proc::unescape(words.next()?);
            let mut clients = words.take_while(|word| !word.starts_with('#')).peekable();
            // Without a word about clients it may be anybody.
            let anybody = clients.peek().is_none();
            (anybody || clients.any(may_write)).then_some(path)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_that_can_be_written_to() {
        let kernel = "# Version 1.1\n# Path Client(Flags) # IPs\n\
                      /srv/a\\040b\t*(rw,no_root_squash,sync,wdelay,fsid=0) # 10.0.0.1\n\
                      /srv/read\t10.0.0.0/8(ro,root_squash)\n";
        assert_eq!(writable(kernel), ["/srv/a b"]);
        let etab = "/srv\thost(ro,sync)\n/srv\tother(rw,sync,sec=sys)\n/all\n";
        assert_eq!(writable(etab), ["/srv", "/all"]);
        assert!(writable("").is_empty());
        assert!(writable("/srv\thost(ro,rwx)\n").is_empty());
    }

    #[test]
    fn a_filesystem_that_is_not_exported() {
        assert_eq!(Exports::default().of(u64::MAX), None);
    }
}
