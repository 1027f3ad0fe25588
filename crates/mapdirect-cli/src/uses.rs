//! Who inside the kernel uses a file: as swap space, as a loop device, as a part
//! of an overlay.

use mapdirect_sys::{proc, proc_mountinfo};
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A use of a file that stands in the way of a pin.
pub(crate) struct Use {
    /// A word for machines.
    pub(crate) key: &'static str,
    pub(crate) text: String,
    pub(crate) help: String,
}

/// The uses of a file that can be found without privilege.
pub(crate) fn of(file: &File) -> Vec<Use> {
    let Ok(own) = file.metadata() else {
        return Vec::new();
    };
    let mut uses = Vec::new();
    uses.extend(swap(&own));
    uses.extend(loop_devices(&own));
    uses.extend(overlay(file));
    uses
}

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

fn leads_to(path: &Path, own: &Metadata) -> bool {
    std::fs::metadata(path).is_ok_and(|there| is_same(&there, own))
}

fn swap(own: &Metadata) -> Option<Use> {
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    let mut files = swaps.lines().skip(1);
    let found = files.find_map(|line| {
        let path = proc::unescape(line.split_ascii_whitespace().next()?);
        leads_to(Path::new(&path), own).then_some(path)
    })?;
    Some(Use {
        key: "swap",
        text: String::from("it is swap space in use: the kernel itself holds its blocks"),
        help: format!("swapoff {}", crate::terminal::told_name(&found)),
    })
}

/// A loop device that can only read is none: it changes nothing.
fn loop_devices(own: &Metadata) -> Option<Use> {
    let devices = std::fs::read_dir("/sys/block").into_iter().flatten();
    devices.flatten().find_map(|device| {
        let read = |name: &str| std::fs::read(device.path().join(name)).unwrap_or_default();
        let backing = read("loop/backing_file");
        let backing = backing.strip_suffix(b"\n").unwrap_or(&backing);
        let writes = !backing.is_empty() && !read("ro").starts_with(b"1");
        (writes && leads_to(Path::new(OsStr::from_bytes(backing)), own)).then(|| {
            let name = device.file_name().display().to_string();
            Use {
                key: "loop",
                text: format!("the loop device /dev/{name} has it open for writing"),
                help: format!(
                    "losetup --detach /dev/{name}, or attach it read-only: losetup --read-only"
                ),
            }
        })
    })
}

/// The overlay that writes to a directory above the file. Only those of this
/// mount namespace can be seen; the guard looks into all.
fn overlay(file: &File) -> Option<Use> {
    let mounts = proc_mountinfo::read(None).ok()?;
    let mut uppers = mounts
        .iter()
        .filter(|mount| mount.fs_type == "overlay")
        .filter_map(|mount| {
            let directory = mount
                .option("upperdir")
                .filter(|path| path.starts_with('/'))?;
            Some((std::fs::metadata(directory).ok()?, &mount.mount_point))
        })
        .peekable();
    uppers.peek()?;
    let uppers: Vec<_> = uppers.collect();
    let path = proc::own_path_of(file.as_fd()).ok()?;
    let above = path.ancestors().skip(1).filter_map(|directory| {
        let directory = std::fs::metadata(directory).ok()?;
        let mut uppers = uppers.iter();
        uppers.find(|(upper, _)| is_same(upper, &directory))
    });
    let (_, mount_point) = above.into_iter().next()?;
    let mount_point = crate::terminal::told_name(mount_point);
    Some(Use {
        key: "overlay-upper",
        text: format!("the overlay at {mount_point} writes to it behind every gate"),
        help: String::from("unmount the overlay, or move the file out of its upper directory"),
    })
}
