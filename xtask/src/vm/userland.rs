//! Programs for machines of another architecture: a tree of Debian's packages,
//! unpacked and not installed.

use super::debian::Apt;
use crate::arch::Arch;
use crate::build;
use anyhow::{Context, Result, ensure};
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Changes with what is in it.
const NAME: &str = "userland-1";

/// What tests run, what programs are linked with, and what these need.
const PACKAGES: [&str; 34] = [
    "base-files",
    "base-passwd",
    "bash",
    "binutils",
    "bsdutils",
    "btrfs-progs",
    "coreutils",
    "dash",
    "diffutils",
    "dmsetup",
    "e2fsprogs",
    "findutils",
    "gawk",
    "grep",
    "gzip",
    "hostname",
    "kmod",
    "libc-bin",
    "libelf-dev",
    "libgcc-s1",
    "login",
    "mount",
    "passwd",
    "procps",
    "python3",
    "python3-jsonschema",
    "sed",
    "systemd-container",
    "tar",
    "util-linux",
    "util-linux-extra",
    "xfsprogs",
    "zlib1g-dev",
    "perl-base",
];

/// The tree, made if it is not there.
pub(crate) fn get(arch: Arch) -> Result<PathBuf> {
    let directory = build::target()?.join("vm").join(arch.name());
    fs::create_dir_all(&directory)?;
    let place = directory.join(NAME);
    if place.exists() {
        return Ok(place);
    }
    let lock = File::create(directory.join("userland.lock"))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    if place.exists() {
        return Ok(place);
    }
    eprintln!("fetching Debian's programs for {}", arch.name());
    let apt = Apt::new(&directory.join("userland-apt"), arch)?;
    let packages = apt.fetch_with_needs(&PACKAGES)?;
    eprintln!("unpacking {} packages", packages.len());
    let new = directory.join("userland-incomplete");
    if new.exists() {
        fs::remove_dir_all(&new)?;
    }
    unpack(&packages, &new)?;
    fs::rename(&new, &place)?;
    Ok(place)
}

/// Unpacks packages, and keeps what each says of its libraries.
fn unpack(packages: &[PathBuf], new: &Path) -> Result<()> {
    // Programs and libraries are in one place; the packages name both.
    for name in ["bin", "sbin", "lib"] {
        fs::create_dir_all(new.join("usr").join(name))?;
        symlink(format!("usr/{name}"), new.join(name))?;
    }
    let symbols = new.join("var/lib/dpkg/info");
    fs::create_dir_all(&symbols)?;
    for package in packages {
        let mut from = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(package)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run dpkg-deb")?;
        let archive = from.stdout.take().context("no output")?;
        let unpacked = Command::new("tar")
            .args(["--extract", "--keep-directory-symlink", "--directory"])
            .arg(new)
            .stdin(archive)
            .status()
            .context("cannot run tar")?;
        ensure!(
            from.wait()?.success() && unpacked.success(),
            "cannot unpack {}",
            package.display()
        );
        let said = Command::new("dpkg-deb")
            .args(["--info"])
            .arg(package)
            .arg("symbols")
            .stdin(Stdio::null())
            .output()
            .context("cannot run dpkg-deb")?;
        // Most have no libraries.
        if said.status.success() {
            let name = package.file_name().context("a package without a name")?;
            let name = name.to_string_lossy();
            let name = name.split('_').next().unwrap_or_default();
            fs::write(symbols.join(format!("{name}.symbols")), said.stdout)?;
        }
    }
    for name in ["passwd", "group"] {
        let master = new.join(format!("usr/share/base-passwd/{name}.master"));
        fs::copy(master, new.join("etc").join(name))?;
    }
    Ok(())
}
