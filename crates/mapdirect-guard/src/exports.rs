//! Finds filesystems that clients of an NFS server may write to.
//!
//! The server sets the size of a file for a client without asking any listener
//! (`nfsd_setattr`, fs/nfsd/vfs.c, calls `notify_change`), and without a
//! description that a lease would count. So with the fanotify gate nothing on
//! such a filesystem can be pinned: a file handle reaches all of the
//! filesystem, whichever directory is exported. (The bpf gate judges the change
//! where it happens.)
//!
//! The kernel lists what it exports now. `exportfs(8)` lists what the kernel
//! would export when a client asks for it. With `crossmnt` that includes
//! everything that is mounted below a directory, which no list names before a
//! client has walked into it.

use crate::bounded::within;
use arc_swap::ArcSwapOption;
use mapdirect_sys::{proc, proc_mountinfo};
use rustix::fs::{AtFlags, StatxFlags};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The files with such lists.
const LISTS: [&str; 3] = [
    "/proc/fs/nfsd/exports",
    "/proc/fs/nfs/exports",
    "/var/lib/nfs/etab",
];
const FRESH: Duration = Duration::from_secs(1);
/// How long to wait for a directory, because its filesystem may not answer.
const LIMIT: Duration = Duration::from_millis(500);

/// The directories exported for writing, looked up at most once a second.
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
    /// The device of the directory, or `None` if it cannot be found out in
    /// time.
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
    let listed: Vec<Listed> = texts
        .flat_map(|text| writable(&String::from_utf8_lossy(&text)))
        .collect();
    let mut paths: Vec<String> = listed.iter().map(|listed| listed.path.clone()).collect();
    if listed.iter().any(|listed| listed.with_mounts) {
        let mounts = proc_mountinfo::read(None).unwrap_or_default();
        let below = mounts
            .into_iter()
            .map(|mount| mount.mount_point)
            .filter(|place| listed.iter().any(|listed| listed.leads_to(place)));
        paths.extend(below);
    }
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

/// A directory that some client may write to.
#[derive(Debug, PartialEq, Eq)]
struct Listed {
    path: String,
    /// Whether clients may also write to what is mounted below the directory.
    with_mounts: bool,
}

impl Listed {
    /// Whether a client can reach a mount at `place`.
    fn leads_to(&self, place: &str) -> bool {
        let rest = place.strip_prefix(self.path.trim_end_matches('/'));
        self.with_mounts && rest.is_some_and(|rest| rest.starts_with('/'))
    }
}

/// The directories of a list that some client may write to. Each line has a
/// path and clients with options, like `/srv *(rw,sync) host(ro)`.
fn writable(list: &str) -> Vec<Listed> {
    let lines = list.lines().filter(|line| line.starts_with('/'));
    let has = |client: &str, wanted: &str| {
        client
            .split_once('(')
            .is_none_or(|(_, options)| options.split([',', ')']).any(|option| option == wanted))
    };
    lines
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let path = proc::unescape(words.next()?);
            let clients: Vec<_> = words.take_while(|word| !word.starts_with('#')).collect();
            let writers: Vec<_> = clients.iter().filter(|client| has(client, "rw")).collect();
            // If a line names no clients, anybody may have any access.
            let anybody = clients.is_empty();
            (anybody || !writers.is_empty()).then(|| Listed {
                path,
                with_mounts: anybody || writers.iter().any(|client| has(client, "crossmnt")),
            })
        })
        .collect()
}

/// Parses a list, for a fuzzer.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(list: &str) {
    let listed = writable(list);
    assert!(listed.len() <= list.lines().count());
    for one in listed {
        // A relative path is never below a listed directory.
        assert!(!one.leads_to("relative"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_that_can_be_written_to() {
        let kernel = "# Version 1.1\n# Path Client(Flags) # IPs\n\
                      /srv/a\\040b\t*(rw,no_root_squash,sync,wdelay,fsid=0) # 10.0.0.1\n\
                      /srv/read\t10.0.0.0/8(ro,root_squash)\n";
        let paths = |list: &str| -> Vec<String> {
            writable(list)
                .into_iter()
                .map(|listed| listed.path)
                .collect()
        };
        assert_eq!(paths(kernel), ["/srv/a b"]);
        let etab = "/srv\thost(ro,sync)\n/srv\tother(rw,sync,sec=sys)\n/all\n";
        assert_eq!(paths(etab), ["/srv", "/all"]);
        assert!(writable("").is_empty());
        assert!(writable("/srv\thost(ro,rwx)\n").is_empty());
    }

    #[test]
    fn what_is_mounted_below_may_be_exported_with_it() {
        let leads = |list: &str, place: &str| {
            let listed = writable(list);
            listed.iter().any(|listed| listed.leads_to(place))
        };
        let list = "/srv\thost(rw,sync,crossmnt,no_subtree_check)\n";
        assert!(leads(list, "/srv/disk") && leads(list, "/srv/a/b"));
        assert!(!leads(list, "/srv2") && !leads(list, "/") && !leads(list, "/srv"));
        assert!(leads("/\t*(rw,crossmnt)\n", "/srv/disk"));
        assert!(!leads("/srv\thost(rw,nocrossmnt)\n", "/srv/disk"));
        // Who may cross may not write.
        assert!(!leads("/srv\ta(rw) b(ro,crossmnt)\n", "/srv/disk"));
    }

    #[test]
    fn a_filesystem_that_is_not_exported() {
        assert_eq!(Exports::default().of(u64::MAX), None);
    }
}
