//! Installing what tasks need and the machine lacks.

use crate::build;
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::{Command, Stdio};

/// A command, and the Debian package that brings it.
pub(crate) type Needed = (&'static str, &'static str);

/// What tests and demo need.
pub(crate) const FOR_TESTS: [Needed; 23] = [
    ("systemd-nspawn", "systemd-container"),
    ("systemd-analyze", "systemd"),
    ("systemd-socket-activate", "systemd"),
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
    // The header is for C++, too.
    ("g++", "g++"),
    ("readelf", "binutils"),
    ("/usr/share/doc/python3-venv", "python3-venv"),
    ("addpart", "util-linux"),
    ("filefrag", "e2fsprogs"),
    ("dmsetup", "dmsetup"),
    // Checks what is printed against docs/schemas.
    (
        "/usr/lib/python3/dist-packages/jsonschema",
        "python3-jsonschema",
    ),
    // Reads the metrics.
    (
        "/usr/lib/python3/dist-packages/prometheus_client",
        "python3-prometheus-client",
    ),
    // The terminal of `mapdirect top`.
    ("tmux", "tmux"),
];

/// What reads the manual pages.
pub(crate) const FOR_MANUAL: [Needed; 2] = [("man", "man-db"), ("mandoc", "mandoc")];

/// Programs that know nothing of pins, and that the tests run under them: the
/// commands, or files of their packages.
pub(crate) const PROGRAMS: [Needed; 12] = [
    ("/usr/bin/python3", "python3"),
    // The package for Python is built with these.
    ("/usr/lib/python3/dist-packages/pip", "python3-pip"),
    (
        "/usr/lib/python3/dist-packages/setuptools",
        "python3-setuptools",
    ),
    ("/usr/lib/python3/dist-packages/wheel", "python3-wheel"),
    ("/usr/lib/python3/dist-packages/lmdb", "python3-lmdb"),
    ("/usr/lib/python3/dist-packages/numpy", "python3-numpy"),
    ("rrdtool", "rrdtool"),
    ("qemu-io", "qemu-utils"),
    ("fio", "fio"),
    ("go", "golang-go"),
    ("javac", "default-jdk-headless"),
    // Only x86-64 has it: programs of 32 bits.
    ("/usr/lib32/libc.a", "gcc-multilib"),
];

/// What of these is not installed but laid down where the tests look for it.
pub(crate) fn lay_down_programs() -> Result<()> {
    let target = build::workspace().join("target");
    etcd(&target.join("programs"))?;
    duckdb(&target.join("python"))
}

/// A package that would start a service if it were installed.
fn etcd(place: &Path) -> Result<()> {
    if place.join("usr/bin/etcd").exists() {
        return Ok(());
    }
    println!("unpacking etcd-server");
    std::fs::create_dir_all(place)?;
    apt(&["update"])?;
    // It downloads into the directory where it runs.
    let downloaded = Command::new("apt-get")
        .args(["-qq", "download", "etcd-server"])
        .current_dir(place)
        .stdin(Stdio::null())
        .status()
        .context("cannot run apt-get")?;
    ensure!(downloaded.success(), "apt-get cannot download etcd-server");
    for entry in std::fs::read_dir(place)? {
        let package = entry?.path();
        if package
            .extension()
            .is_some_and(|extension| extension == "deb")
        {
            let unpacked = Command::new("dpkg-deb")
                .arg("-x")
                .args([&package, place])
                .status()
                .context("cannot run dpkg-deb")?;
            ensure!(unpacked.success(), "dpkg-deb cannot unpack etcd-server");
            std::fs::remove_file(package)?;
        }
    }
    Ok(())
}

/// A Python module that is no package of Debian's.
fn duckdb(place: &Path) -> Result<()> {
    if place.join("duckdb").is_dir() {
        return Ok(());
    }
    install_missing(&[("/usr/lib/python3/dist-packages/pip", "python3-pip")])?;
    println!("installing duckdb");
    let status = Command::new("/usr/bin/python3")
        .args(["-m", "pip", "install", "--quiet", "--target"])
        .arg(place)
        .args(["--root-user-action=ignore", "duckdb"])
        .stdin(Stdio::null())
        .status()
        .context("cannot run pip")?;
    ensure!(status.success(), "pip cannot install duckdb");
    Ok(())
}

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

/// What machines of that kind take, and programs for them.
pub(crate) const FOR_AARCH64: [Needed; 4] = [
    ("qemu-system-aarch64", "qemu-system-arm"),
    ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
    ("/usr/aarch64-linux-gnu/lib/libc.a", "libc6-dev-arm64-cross"),
    ("dpkg-deb", "dpkg"),
];

/// What packages are made with.
pub(crate) const FOR_PACKAGES: [Needed; 6] = [
    ("dpkg-deb", "dpkg"),
    ("dpkg-shlibdeps", "dpkg-dev"),
    ("strip", "binutils"),
    ("xz", "xz-utils"),
    ("gzip", "gzip"),
    ("git", "git"),
];

/// What a machine needs of this one where systemd is its first process, and the
/// packages are tried.
pub(crate) const FOR_SYSTEMD: [Needed; 6] = [
    ("/lib/systemd/systemd", "systemd"),
    ("deb-systemd-helper", "init-system-helpers"),
    ("pkg-config", "pkg-config"),
    ("/usr/bin/python3", "python3"),
    ("mkfs.xfs", "xfsprogs"),
    ("pgrep", "procps"),
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
        if !Path::new(header).exists() {
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

/// Whether there is a command of this name, or a file at this path.
pub(crate) fn exists(command: &str) -> bool {
    if command.starts_with('/') {
        return Path::new(command).exists();
    }
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
