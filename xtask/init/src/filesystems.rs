//! What is mounted in the machine, and how it is left.

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_move, unmount};
use std::ffi::CString;
use std::fs;
use std::os::unix::fs::symlink;

/// The root of the machine outside, as it is.
const OUTSIDE: &str = "/outside";
/// What is written over it, in memory.
const WRITTEN: &str = "/written";
/// The two together.
const ROOT: &str = "/root";
/// The root of the machine outside, where something else is the root here.
const BESIDE: &str = "/beside";
/// That, with what is written over it.
const SEEN: &str = "/seen";

/// Filesystems of the kernel's own that programs expect, and options.
const OWN: [(&str, &str, &str); 3] = [
    ("devtmpfs", "/dev", "mode=0755"),
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
];

/// Others that do without if this kernel has them not.
const MORE: [(&str, &str, &str); 8] = [
    ("tmpfs", "/run", "mode=0755"),
    ("tmpfs", "/dev/shm", "mode=1777"),
    ("devpts", "/dev/pts", "mode=0620,ptmxmode=0666"),
    ("securityfs", "/sys/kernel/security", ""),
    ("debugfs", "/sys/kernel/debug", ""),
    ("tracefs", "/sys/kernel/tracing", ""),
    ("bpf", "/sys/fs/bpf", "mode=0700"),
    ("cgroup2", "/sys/fs/cgroup", ""),
];

fn mount_one(kind: &str, source: &str, target: &str, options: &str) -> Result<()> {
    let options = CString::new(options)?;
    mount(
        source,
        target,
        kind,
        MountFlags::empty(),
        (!options.is_empty()).then_some(options.as_c_str()),
    )
    .with_context(|| format!("{kind} at {target}"))
}

/// Mounts what nothing works without, in the initramfs.
pub(crate) fn mount_own() -> Result<()> {
    for (kind, target, options) in OWN {
        mount_one(kind, kind, target, options)?;
    }
    Ok(())
}

/// Mounts a directory that the machine outside shares, so that it can be written
/// to and nothing of that goes out.
fn mount_shared(tag: &str, lower: &str, target: &str) -> Result<()> {
    // Nobody writes to it from here; what somebody writes to it outside in
    // the meantime need not be seen. More than 500 KiB at a time the device
    // does not take.
    mount_one(
        "9p",
        tag,
        lower,
        "trans=virtio,version=9p2000.L,cache=loose,msize=512000,ro",
    )?;
    let (upper, work) = (
        format!("{WRITTEN}/{tag}-upper"),
        format!("{WRITTEN}/{tag}-work"),
    );
    fs::create_dir(&upper)?;
    fs::create_dir(&work)?;
    mount_one(
        "overlay",
        "overlay",
        target,
        &format!("lowerdir={lower},upperdir={upper},workdir={work}"),
    )
}

/// Makes the root of the machine outside the root here, or another one with some
/// directories of that.
pub(crate) fn change_root() -> Result<()> {
    mount_one("tmpfs", "tmpfs", WRITTEN, "mode=0755")?;
    mount_shared(xtask_init::ROOT_TAG, OUTSIDE, ROOT)?;
    if let Ok(shared) = fs::read_to_string(xtask_init::SHARED) {
        mount_shared(xtask_init::BESIDE_TAG, BESIDE, SEEN)?;
        for path in shared.lines() {
            let place = format!("{ROOT}{path}");
            fs::create_dir_all(&place)?;
            mount_bind(format!("{SEEN}{path}"), &place)
                .with_context(|| format!("cannot show {path}"))?;
        }
    }
    for (_, target, _) in OWN {
        let new = format!("{ROOT}{target}");
        fs::create_dir_all(&new)?;
        mount_move(target, &new)?;
    }
    std::env::set_current_dir(ROOT)?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    std::env::set_current_dir("/")?;

    for (kind, target, options) in MORE {
        // In /sys the kernel makes the directories of what it has.
        let there = fs::create_dir_all(target).is_ok();
        if there && let Err(error) = mount_one(kind, kind, target, options) {
            eprintln!("init: {error:#}");
        }
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
    ] {
        symlink(target, format!("/dev/{name}"))?;
    }
    rustix::system::sethostname(b"vm")?;
    Ok(())
}

/// Unmounts every filesystem that lies on a disk, the last one mounted first.
pub(crate) fn unmount_disks() {
    // A disk can be an image on another one: what is busy now may not be
    // later.
    for _ in 0..10 {
        let mut disks = mapdirect_sys::proc_mountinfo::read(None).unwrap_or_default();
        disks.retain(|mount| mount.source.starts_with("/dev/"));
        if disks.is_empty() {
            break;
        }
        for disk in disks.iter().rev() {
            let _ = unmount(&disk.mount_point, UnmountFlags::empty());
        }
    }
    rustix::fs::sync();
}
