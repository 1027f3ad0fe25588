//! Installing what tasks need and the machine lacks.

use anyhow::{Context, Result, ensure};
use std::process::{Command, Stdio};

/// A command, and the Debian package that brings it.
pub(crate) type Needed = (&'static str, &'static str);

/// What tests and demo need.
pub(crate) const FOR_TESTS: [Needed; 11] = [
    ("mkfs.xfs", "xfsprogs"),
    ("xfs_io", "xfsprogs"),
    ("xfs_fsr", "xfsprogs"),
    ("mkfs.ext4", "e2fsprogs"),
    ("e4defrag", "e2fsprogs"),
    ("chattr", "e2fsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("fallocate", "util-linux"),
    ("losetup", "mount"),
    ("python3", "python3-minimal"),
    ("script", "bsdutils"),
];

/// What virtual machines need.
pub(crate) const FOR_MACHINES: [Needed; 6] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    // Also in the machine, where the kernel calls modprobe.
    ("depmod", "kmod"),
    ("dpkg-deb", "dpkg"),
    ("setpriv", "util-linux"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
];

/// Installs the packages of the commands that are missing.
pub(crate) fn install_missing(needed: &[Needed]) -> Result<()> {
    let missing: Vec<_> = needed
        .iter()
        .filter(|(command, _)| !exists(command))
        .collect();
    let mut packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    install(&packages)?;
    for (command, package) in missing {
        ensure!(
            exists(command),
            "{package} is installed, but there is no {command}"
        );
    }
    Ok(())
}

/// Installs packages.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    ensure!(
        exists("apt-get"),
        "missing here: {list}; install what these packages bring, then try again"
    );
    println!("installing {list}");
    // The lists of packages may be missing or stale: fetch them first.
    apt(&["update"])?;
    let mut install = vec!["install", "--no-install-recommends"];
    install.extend(packages);
    apt(&install)
}

/// What the bpf gate is built with.
pub(crate) fn install_for_bpf() -> Result<()> {
    install_missing(&[
        ("pkg-config", "pkg-config"),
        ("make", "make"),
        ("cc", "gcc"),
    ])?;
    let mut missing = Vec::new();
    for (header, package) in [
        ("/usr/include/libelf.h", "libelf-dev"),
        ("/usr/include/zlib.h", "zlib1g-dev"),
    ] {
        if !std::path::Path::new(header).exists() {
            missing.push(package);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    install(&missing)
}

fn apt(arguments: &[&str]) -> Result<()> {
    let output = Command::new("apt-get")
        .args(["-qq", "-y"])
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .context("cannot run apt-get")?;
    ensure!(
        output.status.success(),
        "apt-get {} failed: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Whether there is a command of this name.
pub(crate) fn exists(command: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        // Debian leaves these out of an ordinary user's path.
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|directory| directory.join(command).is_file())
}

/// Everything here mounts filesystems.
pub(crate) fn require_root() -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "this makes and mounts filesystems on loop devices: run it as root"
    );
    Ok(())
}
