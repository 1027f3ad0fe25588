//! Finds the place where the kernel describes its tracepoints.

use crate::Errno;
use rustix::fs::{CWD, Mode, OFlags, fstatfs, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use std::os::fd::{AsFd, OwnedFd};

/// `TRACEFS_MAGIC` (include/uapi/linux/magic.h).
const TRACEFS: u64 = 0x7472_6163;

/// Opens the directory of all events. If tracefs is not mounted, this mounts it
/// for the returned descriptor alone: nobody else sees the mount, and it goes
/// when the descriptor is closed.
pub(crate) fn events() -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    if let Ok(found) = openat(CWD, "/sys/kernel/tracing/events", flags, Mode::empty())
        && fstatfs(&found).is_ok_and(|stat| u64::try_from(stat.f_type) == Ok(TRACEFS))
    {
        return Ok(found);
    }
    let context = fsopen("tracefs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    openat(&root, "events", flags, Mode::empty())
}
