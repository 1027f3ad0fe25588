//! What makes a store durable.

use mapdirect_proto::DeviceId;
use mapdirect_sys::{Errno, cache};
use rustix::fs::{AtFlags, StatxFlags};
use std::fs;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

/// What it takes to make what was stored to a mapping durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Durability {
    /// Cache lines are written back, by the program itself, without a system
    /// call: persistent memory behind the processor's caches.
    CacheFlush,
    /// Nothing but a fence: the caches survive a power cut as well (eADR;
    /// the kernel calls that persistence domain `cpu_cache`).
    Automatic,
    /// `msync(2)`: the page cache, or persistent memory on a processor whose
    /// caches are not known here.
    Msync,
}

// include/uapi/linux/stat.h
const STATX_ATTR_DAX: u64 = 0x20_0000;

/// Of a file that is going to be mapped.
pub(crate) fn of(file: BorrowedFd<'_>) -> Result<Durability, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(file, "", flags, StatxFlags::empty())?;
    let attributes = stat.stx_attributes.bits() & stat.stx_attributes_mask.bits();
    if attributes & STATX_ATTR_DAX == 0 || cache::instruction() == "none" {
        return Ok(Durability::Msync);
    }
    let device = DeviceId {
        major: stat.stx_dev_major,
        minor: stat.stx_dev_minor,
    };
    let directory = PathBuf::from(format!("/sys/dev/block/{device}"));
    Ok(if is_automatic(&directory, DEPTH) {
        Durability::Automatic
    } else {
        Durability::CacheFlush
    })
}

/// Devices upon devices, at most.
const DEPTH: u32 = 8;

/// Whether the caches survive a power cut on a block device: what its region
/// of persistent memory says, or, of a device made of others, what all of
/// them say (Documentation/ABI/testing/sysfs-bus-nvdimm). In doubt they do
/// not.
fn is_automatic(device: &Path, depth: u32) -> bool {
    let Ok(place) = fs::canonicalize(device) else {
        return false;
    };
    let domain = place
        .ancestors()
        .find_map(|above| fs::read_to_string(above.join("persistence_domain")).ok());
    if let Some(domain) = domain {
        return domain.trim() == "cpu_cache";
    }
    let mut slaves = fs::read_dir(place.join("slaves"))
        .into_iter()
        .flatten()
        .flatten()
        .peekable();
    depth > 0
        && slaves.peek().is_some()
        && slaves.all(|slave| is_automatic(&slave.path(), depth - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn the_page_cache_needs_msync() {
        let file = tempfile::tempfile_in(".").unwrap();
        assert_eq!(of(file.as_fd()), Ok(Durability::Msync));
    }

    /// A tree like that of sysfs.
    fn tree(domains: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let slaves = root.path().join("dm-0/slaves");
        fs::create_dir_all(&slaves).unwrap();
        for (at, domain) in domains.iter().enumerate() {
            let region = root.path().join(format!("ndbus0/region{at}"));
            let block = region.join(format!("namespace{at}.0/block/pmem{at}"));
            fs::create_dir_all(&block).unwrap();
            if !domain.is_empty() {
                fs::write(region.join("persistence_domain"), format!("{domain}\n")).unwrap();
            }
            std::os::unix::fs::symlink(&block, slaves.join(format!("pmem{at}"))).unwrap();
        }
        root
    }

    #[test]
    fn a_device_is_what_all_its_regions_are() {
        for (domains, expected) in [
            (&["cpu_cache"][..], true),
            (&["cpu_cache", "cpu_cache"], true),
            (&["cpu_cache", "memory_controller"], false),
            (&["cpu_cache", ""], false),
            (&[], false),
        ] {
            let tree = tree(domains);
            let stacked = tree.path().join("dm-0");
            assert_eq!(is_automatic(&stacked, DEPTH), expected, "{domains:?}");
            if let [one] = domains {
                let pmem = tree.path().join("dm-0/slaves/pmem0");
                assert_eq!(is_automatic(&pmem, DEPTH), *one == "cpu_cache");
            }
        }
        assert!(!is_automatic(Path::new("/sys/dev/block/0:0"), DEPTH));
    }
}
