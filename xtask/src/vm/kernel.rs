//! Kernels ready to boot, kept in the target directory.

use super::debian::{Apt, Series};
use super::modules::{self, Modules};
use super::version::Version;
use super::{cpio, vmlinux};
use crate::arch::Arch;
use anyhow::{Context, Result, bail, ensure};
use mapdirect_testkit::process::ScratchDirectory;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::sync::Arc;

/// The way from the initramfs to the root of the machine outside.
const FIRST: [&str; 5] = [
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
];
/// The way to `/dev/pmem0`.
const FOR_NVDIMM: [&str; 2] = ["nfit", "nd_pmem"];
/// What the tests need beyond that; loaded when it is asked for.
const LATER: [&str; 4] = ["xfs", "ext4", "btrfs", "loop"];

/// Changes with what is made of a kernel, so that what an older version of
/// this task made is not taken for it.
const LAYOUT: &str = "kernels-1";

/// Which kernel is asked for.
#[derive(Clone, Debug)]
pub(crate) enum Wanted {
    /// The newest of a series that Debian has.
    Series(Series),
    /// A package, or a directory that is like an unpacked one.
    Path(PathBuf),
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(series) = Series::parse(text) {
            return Ok(Self::Series(series));
        }
        let path = PathBuf::from(text);
        if path.exists() {
            return Ok(Self::Path(path));
        }
        Err(format!(
            "`{text}` is neither a series of kernels such as 6.12 nor a path to one"
        ))
    }
}

/// A kernel ready to boot.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// What `uname -r` will say.
    release: String,
    /// What QEMU boots.
    image: PathBuf,
    /// Its modules, with the lists that modprobe wants.
    modules: PathBuf,
    /// The first of them, as an archive for the initramfs.
    initramfs: PathBuf,
    /// What of this is made for one run only.
    _scratch: Option<Arc<ScratchDirectory>>,
}

impl Kernel {
    pub(crate) fn release(&self) -> &str {
        &self.release
    }

    pub(crate) fn image(&self) -> &Path {
        &self.image
    }

    pub(crate) fn modules(&self) -> &Path {
        &self.modules
    }

    pub(crate) fn initramfs(&self) -> &Path {
        &self.initramfs
    }

    /// A kernel in a directory as the cache has it.
    fn kept(directory: &Path) -> Result<Self> {
        let modules = one_of(&directory.join("usr/lib/modules"))?;
        Ok(Self {
            release: file_name(&modules),
            image: directory.join("image"),
            initramfs: directory.join("initramfs"),
            modules,
            _scratch: None,
        })
    }

    /// A kernel in a directory that somebody else keeps, such as an unpacked
    /// package.
    fn of_others(directory: &Path, arch: Arch) -> Result<Self> {
        let directory = fs::canonicalize(directory)?;
        let (image, modules) = find(&directory)?;
        ensure!(
            modules.join("modules.dep").exists(),
            "{} has no modules.dep; make it with `depmod -b {} {}`",
            modules.display(),
            directory.display(),
            file_name(&modules)
        );
        let scratch = ScratchDirectory::new("kernel")?;
        make(&image, &modules, scratch.path(), arch)?;
        Ok(Self {
            release: file_name(&modules),
            image: scratch.path().join("image"),
            initramfs: scratch.path().join("initramfs"),
            modules,
            _scratch: Some(Arc::new(scratch)),
        })
    }
}

/// The kernels that are kept.
#[derive(Debug)]
pub(crate) struct Cache {
    directory: PathBuf,
    arch: Arch,
}

impl Cache {
    /// In a directory that every task may use at the same time.
    pub(crate) fn new(directory: PathBuf, arch: Arch) -> Self {
        Self { directory, arch }
    }

    /// Where one kernel a directory is kept, under its version.
    fn kernels(&self) -> PathBuf {
        self.directory.join(LAYOUT)
    }

    /// The kernel that is asked for: the newest that is kept, or else the
    /// newest there is.
    pub(crate) fn get(&self, wanted: &Wanted) -> Result<Kernel> {
        match wanted {
            Wanted::Series(series) => match self.newest(series) {
                Some(version) => Kernel::kept(&self.kernels().join(version.to_string())),
                None => self.fetch(series),
            },
            Wanted::Path(path) if path.is_dir() => Kernel::of_others(path, self.arch),
            Wanted::Path(path) => self.unpacked(path),
        }
    }

    /// The newest kernel of a series that is kept.
    fn newest(&self, series: &Series) -> Option<Version> {
        fs::read_dir(self.kernels())
            .ok()?
            .flatten()
            .map(|entry| Version::new(&entry.file_name().to_string_lossy()))
            .filter(|version| series.has(version))
            .max()
    }

    /// The newest kernel of a series there is, fetched if it is not kept.
    pub(crate) fn fetch(&self, series: &Series) -> Result<Kernel> {
        fs::create_dir_all(self.kernels())
            .with_context(|| format!("cannot make {}", self.kernels().display()))?;
        let kept = self.newest(series);
        let _lock = self.lock()?;
        // Somebody may have fetched it while this waited.
        let newest = self.newest(series);
        if let Some(version) = newest
            && kept.is_none_or(|kept| kept < version)
        {
            return Kernel::kept(&self.kernels().join(version.to_string()));
        }
        eprintln!("looking for the newest kernel {series}");
        let apt = Apt::new(&self.directory.join("apt"), self.arch)?;
        let offer = apt.find(series)?;
        let place = self.kernels().join(offer.version().to_string());
        if !place.exists() {
            self.ensure_room(offer.size())?;
            let new = self.staging()?;
            eprintln!("fetching and unpacking kernel {}", offer.version());
            let fetched = new.join("fetched");
            fs::create_dir(&fetched)?;
            let packages = apt.fetch(&offer, &fetched)?;
            keep(&packages, &new, self.arch)?;
            fs::remove_dir_all(&fetched)?;
            fs::rename(&new, &place)?;
        }
        Kernel::kept(&place)
    }

    /// The kernel in a package, unpacked if it is not kept.
    fn unpacked(&self, package: &Path) -> Result<Kernel> {
        ensure!(
            package.extension() == Some(OsStr::new("deb")),
            "{} is neither a Debian package nor a directory like an unpacked one, with \
             boot/vmlinuz-RELEASE and lib/modules/RELEASE",
            package.display()
        );
        fs::create_dir_all(self.kernels())?;
        let _lock = self.lock()?;
        let metadata = fs::metadata(package)?;
        let modified = metadata.modified()?.duration_since(std::time::UNIX_EPOCH)?;
        // Its name first: no version, so that it is of no series.
        let name = format!(
            "package-{}-{}-{}",
            file_name(package),
            metadata.len(),
            modified.as_nanos()
        );
        let place = self.kernels().join(name);
        if !place.exists() {
            // Packed as well as they ever are.
            self.ensure_room(metadata.len() * 6)?;
            let new = self.staging()?;
            keep(&[fs::canonicalize(package)?], &new, self.arch)?;
            fs::rename(&new, &place)?;
        }
        Kernel::kept(&place)
    }

    /// Keeps all others out while kernels are added.
    fn lock(&self) -> Result<File> {
        let file = File::create(self.directory.join("lock"))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                eprintln!("waiting for another task that fetches a kernel");
                flock(&file, FlockOperation::LockExclusive)?;
            }
            Err(errno) => return Err(errno).context("cannot lock the kernels"),
        }
        Ok(file)
    }

    /// An empty directory for a kernel that is not complete yet. Whoever has
    /// the lock is the only one to use it: what is in it was left behind.
    fn staging(&self) -> Result<PathBuf> {
        let new = self.directory.join("incomplete");
        if new.exists() {
            fs::remove_dir_all(&new)?;
        }
        fs::create_dir(&new)?;
        Ok(new)
    }

    fn ensure_room(&self, bytes: u64) -> Result<()> {
        let stat = rustix::fs::statvfs(&self.directory)?;
        let free = stat.f_bavail * stat.f_frsize;
        // The image, unpacked, and what else is made of it.
        let needed = bytes + (200 << 20);
        ensure!(
            free >= needed,
            "a kernel takes {} MiB of disk, and where {} lies {} MiB are free; make room, or set \
             CARGO_TARGET_DIR to a place with more",
            needed >> 20,
            self.directory.display(),
            free >> 20
        );
        Ok(())
    }
}

/// Makes a kernel to be kept in `place` of the packages it comes in.
fn keep(packages: &[PathBuf], place: &Path, arch: Arch) -> Result<()> {
    let unpacked = place.join("unpacked");
    for package in packages {
        run(Command::new("dpkg-deb")
            .arg("--extract")
            .arg(package)
            .arg(&unpacked))?;
    }
    let (image, found) = find(&unpacked)?;
    let release = file_name(&found);
    let all = place.join("usr/lib/modules");
    fs::create_dir_all(&all)?;
    // Where older versions of depmod and modprobe look.
    symlink("usr/lib", place.join("lib"))?;
    let modules = all.join(&release);
    // Moved first: it may be in there.
    let image_outside = place.join("vmlinuz");
    fs::rename(image, &image_outside)?;
    fs::rename(found, &modules)?;
    // A package leaves this to its installation.
    let list = || run(Command::new("depmod").arg("-b").arg(place).arg(&release));
    list()?;
    unpack_asked_for(&modules)?;
    list()?;
    make(&image_outside, &modules, place, arch)?;
    fs::remove_file(image_outside)?;
    fs::remove_dir_all(unpacked)?;
    Ok(())
}

/// Unpacks the modules that tests ask for: an emulated processor takes seconds
/// for it.
fn unpack_asked_for(modules: &Path) -> Result<()> {
    let known = known(modules)?;
    for path in known.order(&LATER)? {
        let (packed, plain) = match path.rsplit_once(".ko") {
            Some((name, packer)) if !packer.is_empty() => {
                (modules.join(path), modules.join(format!("{name}.ko")))
            }
            _ => continue,
        };
        fs::write(plain, unpack(&packed)?)?;
        fs::remove_file(packed)?;
    }
    Ok(())
}

/// The image and the modules of the one kernel in a directory that is like
/// the root of a system.
fn find(root: &Path) -> Result<(PathBuf, PathBuf)> {
    let all = ["usr/lib/modules", "lib/modules"]
        .into_iter()
        .map(|path| root.join(path))
        .find(|path| path.is_dir())
        .with_context(|| format!("there is no lib/modules in {}", root.display()))?;
    let modules = one_of(&all)?;
    let release = file_name(&modules);
    let image = [
        root.join(format!("boot/vmlinuz-{release}")),
        modules.join("vmlinuz"),
    ]
    .into_iter()
    .find(|path| path.is_file())
    .with_context(|| format!("there is no boot/vmlinuz-{release} in {}", root.display()))?;
    Ok((image, modules))
}

/// The one directory in a directory.
fn one_of(directory: &Path) -> Result<PathBuf> {
    let entries: Vec<_> = fs::read_dir(directory)
        .with_context(|| format!("cannot read {}", directory.display()))?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    match &entries[..] {
        [one] => Ok(one.clone()),
        others => bail!(
            "{} has {} directories of modules instead of one",
            directory.display(),
            others.len()
        ),
    }
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// What depmod found.
fn known(modules: &Path) -> Result<Modules> {
    let read = |name: &str| {
        let path = modules.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    Ok(Modules::parse(
        &read("modules.dep")?,
        &read("modules.builtin")?,
    ))
}

/// Makes what is booted: `image` and `initramfs`.
fn make(vmlinuz: &Path, modules: &Path, into: &Path, arch: Arch) -> Result<()> {
    match arch {
        Arch::X86_64 => vmlinux::make(vmlinuz, &into.join("image"))?,
        // It is not packed, or in a way that QEMU unpacks.
        Arch::Aarch64 => {
            fs::copy(vmlinuz, into.join("image"))?;
        }
    }
    let known = known(modules)?;
    // Their absence is better told now than by a test that fails.
    known.order(&LATER)?;
    let first = known.order(&FIRST)?;
    // Only x86_64 has a firmware here that tells of them.
    let for_nvdimm: &[&str] = match arch {
        Arch::X86_64 => &FOR_NVDIMM,
        Arch::Aarch64 => &[],
    };
    let mut for_nvdimm = known.order(for_nvdimm)?;
    for_nvdimm.retain(|path| !first.contains(path));
    let mut archive = cpio::Archive::default();
    for (directory, paths) in [
        (xtask_init::MODULES, first),
        (xtask_init::NVDIMM_MODULES, for_nvdimm),
    ] {
        archive.directory(directory);
        for (number, path) in paths.iter().enumerate() {
            let name = modules::name(path);
            archive.file(
                &format!("{directory}/{number:02}-{name}"),
                0o644,
                &unpack(&modules.join(path))?,
            );
        }
    }
    fs::write(into.join("initramfs"), archive.finish())?;
    Ok(())
}

/// The content of a module that may be compressed.
fn unpack(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(OsStr::to_str) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => {
            return fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        }
    };
    let output = Command::new(tool)
        .args(["-dc"])
        .arg(path)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {tool}"))?;
    ensure!(
        output.status.success(),
        "{tool} cannot unpack {}",
        path.display()
    );
    Ok(output.stdout)
}

fn run(command: &mut Command) -> Result<()> {
    mapdirect_testkit::disk::run(command.stdin(Stdio::null()))
}
