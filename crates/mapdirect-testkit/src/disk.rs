//! Real filesystems on loop devices.

use anyhow::{Context, Result, ensure};
use rustix::fs::{Mode, OFlags};
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Filesystems the promise is kept on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// XFS, with or without reflink, and its block size in bytes.
    Xfs {
        /// Files can share blocks.
        reflink: bool,
        /// Block size.
        block: u32,
    },
    /// ext4 and its block size in bytes.
    Ext4 {
        /// Block size.
        block: u32,
    },
    /// XFS on persistent memory, mounted with DAX; see [`pmem`].
    XfsDax {
        /// Files can share blocks, which Linux 6.1 does not allow with DAX.
        reflink: bool,
    },
    /// ext4 on persistent memory, mounted with DAX.
    Ext4Dax,
}

/// Environment variable that names the devices of persistent memory to use,
/// one for each of [`Kind::DAX`], with commas in between; as many as there
/// are. More of them, in the same order again, are for tests that want a
/// filesystem for themselves. What is on them is lost.
pub const PMEM_VARIABLE: &str = "MAPDIRECT_PMEM";

/// The devices of persistent memory there are.
#[must_use]
pub fn pmem() -> Vec<PathBuf> {
    let value = std::env::var(PMEM_VARIABLE).unwrap_or_default();
    let devices = value.split(',').filter(|device| !device.is_empty());
    devices.map(PathBuf::from).collect()
}

impl Kind {
    /// XFS as `mkfs.xfs` makes it.
    pub const XFS: Self = Self::Xfs {
        reflink: true,
        block: 4096,
    };
    /// XFS that cannot share blocks.
    pub const XFS_PLAIN: Self = Self::Xfs {
        reflink: false,
        block: 4096,
    };
    /// ext4 as `mkfs.ext4` makes it.
    pub const EXT4: Self = Self::Ext4 { block: 4096 };
    /// Those on persistent memory.
    pub const DAX: [Self; 3] = [
        Self::XfsDax { reflink: false },
        Self::Ext4Dax,
        Self::XfsDax { reflink: true },
    ];

    /// Whether files can share blocks.
    #[must_use]
    pub const fn reflink(self) -> bool {
        matches!(
            self,
            Self::Xfs { reflink: true, .. } | Self::XfsDax { reflink: true }
        )
    }

    /// Whether it is XFS.
    #[must_use]
    pub const fn is_xfs(self) -> bool {
        matches!(self, Self::Xfs { .. } | Self::XfsDax { .. })
    }

    /// Whether loads and stores reach the media without the page cache.
    #[must_use]
    pub const fn is_dax(self) -> bool {
        matches!(self, Self::XfsDax { .. } | Self::Ext4Dax)
    }

    /// The device it lies on, if that is no loop device.
    #[must_use]
    pub fn device(self) -> Option<PathBuf> {
        self.devices().into_iter().next()
    }

    /// The devices there are for it.
    fn devices(self) -> Vec<PathBuf> {
        let at = Self::DAX.iter().position(|kind| *kind == self);
        at.map_or_else(Vec::new, |at| {
            let devices = pmem().into_iter().skip(at);
            devices.step_by(Self::DAX.len()).collect()
        })
    }

    /// One of them that nothing is mounted from.
    fn free_device(self) -> Result<PathBuf> {
        let devices = self.devices();
        ensure!(!devices.is_empty(), "{PMEM_VARIABLE} names no device");
        let is_free = |device: &PathBuf| {
            let exclusively = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
            rustix::fs::open(device, exclusively, Mode::empty()).is_ok()
        };
        let free = devices.into_iter().find(is_free);
        free.with_context(|| format!("all devices of {PMEM_VARIABLE} for {self} are in use"))
    }

    /// Block size in bytes.
    #[must_use]
    pub const fn block(self) -> u64 {
        match self {
            Self::Xfs { block, .. } | Self::Ext4 { block } => block as u64,
            // DAX needs blocks of the size of pages.
            Self::XfsDax { .. } | Self::Ext4Dax => 4096,
        }
    }

    /// Its command to make one, for the device as last argument.
    #[must_use]
    pub fn mkfs(self) -> Command {
        match self {
            Self::XfsDax { reflink: false } => Self::XFS_PLAIN.mkfs(),
            Self::XfsDax { reflink: true } => Self::XFS.mkfs(),
            Self::Ext4Dax => Self::EXT4.mkfs(),
            Self::Xfs { reflink, block } => {
                let mut command = Command::new("mkfs.xfs");
                command.args(["-q", "-f", "-b", &format!("size={block}")]);
                // Small blocks cannot hold version 5 inodes of 512 bytes in
                // any other way; 4096 is the default.
                command.args(["-m", &format!("reflink={}", u8::from(reflink))]);
                command
            }
            Self::Ext4 { block } => {
                let mut command = Command::new("mkfs.ext4");
                command.args(["-q", "-F", "-b", &block.to_string()]);
                command
            }
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Xfs { reflink, .. } => {
                write!(f, "xfs{}", if *reflink { "" } else { "-plain" })?;
            }
            Self::Ext4 { .. } => f.write_str("ext4")?,
            Self::XfsDax { reflink: false } => f.write_str("xfs-dax")?,
            Self::XfsDax { reflink: true } => f.write_str("xfs-reflink-dax")?,
            Self::Ext4Dax => f.write_str("ext4-dax")?,
        }
        if self.block() != 4096 {
            write!(f, "-{}", self.block())?;
        }
        Ok(())
    }
}

/// A filesystem in an image file on a loop device, mounted; unmounted and
/// gone when dropped.
#[derive(Debug)]
pub struct Disk {
    kind: Kind,
    directory: PathBuf,
}

/// Where images lie: in memory where there is plenty, since a loop device
/// turns every flush into an fsync of its image.
#[must_use]
pub fn place() -> PathBuf {
    const ENOUGH: u64 = 8 << 30;
    let memory = Path::new("/dev/shm");
    let free = rustix::fs::statvfs(memory).map_or(0, |stat| stat.f_bavail * stat.f_frsize);
    if free >= ENOUGH {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    }
}

/// Directories of disks: the process that made one is in the name, so that
/// what a killed one left behind can be found.
/// What the names of directories begin with that tests make; they end with the
/// process and a number.
pub(crate) const PREFIX: &str = "mapdirect-";

impl Disk {
    /// Makes and mounts one of `megabytes`; XFS needs 300.
    ///
    /// # Errors
    ///
    /// When a tool is missing or fails, with what it said.
    pub fn new(kind: Kind, megabytes: u64) -> Result<Self> {
        Self::with_options(kind, megabytes, &[], "")
    }

    /// The same with more arguments for mkfs and options for mount.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_options(
        kind: Kind,
        megabytes: u64,
        mkfs_arguments: &[&str],
        mount_options: &str,
    ) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}disk-{}-{number}", std::process::id());
        let directory = place().join(name);
        fs::create_dir(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        // From here on dropping it cleans up.
        let disk = Self { kind, directory };
        let (image, how) = if kind.is_dax() {
            (kind.free_device()?, "dax=always")
        } else {
            let image = disk.directory.join("image");
            File::create(&image)?.set_len(megabytes << 20)?;
            (image, "loop")
        };
        let mut mkfs = kind.mkfs();
        run(mkfs.args(mkfs_arguments).arg(&image))?;
        fs::create_dir(disk.root())?;
        run(Command::new("mount")
            .arg("-o")
            .arg(format!("{how},{mount_options}"))
            .arg(&image)
            .arg(disk.root()))?;
        Ok(disk)
    }

    /// What kind it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where it is mounted.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.directory.join("mnt")
    }

    /// A path on it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// Unmounts it and says whether that worked, which dropping cannot.
    ///
    /// # Errors
    ///
    /// When it stays busy for five seconds.
    pub fn unmount(self) -> Result<()> {
        let result = unmount(&self.root());
        drop(self);
        result
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        remove(&self.directory);
    }
}

/// Takes a directory of tests away, whatever is still mounted in it.
fn remove(directory: &Path) {
    for mounted in mounted_in(directory) {
        if unmount(&mounted).is_err() {
            // Somebody still has a file open: detach it, so that it goes when
            // they do.
            let _ = Command::new("umount").arg("-l").arg(&mounted).status();
        }
    }
    let _ = fs::remove_dir_all(directory);
}

/// What is mounted below a directory, the last first.
fn mounted_in(directory: &Path) -> Vec<PathBuf> {
    let mounts = mapdirect_sys::proc_mountinfo::read(None).unwrap_or_default();
    let points = mounts.into_iter().rev();
    let points = points.map(|mount| PathBuf::from(mount.mount_point));
    points
        .filter(|point| point.starts_with(directory))
        .collect()
}

/// Unmounts what is mounted at `root`.
///
/// # Errors
///
/// When it stays busy for five seconds.
pub fn unmount(root: &Path) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let output = Command::new("umount").arg(root).output()?;
        if output.status.success() {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Takes away the disks and directories of processes that were killed.
pub fn remove_stale() {
    let places = [PathBuf::from("/dev/shm"), std::env::temp_dir()];
    let entries = places.into_iter().flat_map(fs::read_dir);
    let mut stale: Vec<PathBuf> = entries
        .flatten()
        .flatten()
        .filter(|entry| {
            let owner = entry.file_name().to_str().and_then(owner_of);
            owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
        })
        .map(|entry| entry.path())
        .collect();
    // Overlays keep the disks busy that they lie on.
    let is_disk = |path: &PathBuf| path.to_string_lossy().contains(&format!("/{PREFIX}disk-"));
    stale.sort_by_key(is_disk);
    for path in stale {
        remove(&path);
    }
}

/// The process that made a directory of this name.
fn owner_of(name: &str) -> Option<u32> {
    let (rest, number) = name.strip_prefix(PREFIX)?.rsplit_once('-')?;
    number.parse::<u32>().ok()?;
    rest.rsplit_once('-')?.1.parse().ok()
}

/// A filesystem that is frozen; thawed when dropped.
#[derive(Debug)]
pub struct Frozen(PathBuf);

impl Frozen {
    /// Freezes that of a disk.
    ///
    /// # Errors
    ///
    /// As [`run`].
    pub fn new(disk: &Disk) -> Result<Self> {
        run(Command::new("fsfreeze").arg("-f").arg(disk.root()))?;
        Ok(Self(disk.root()))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("-u").arg(&self.0).status();
    }
}

/// Runs a command that must succeed.
///
/// # Errors
///
/// When it cannot be started or fails, with what it wrote to stderr.
pub fn run(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;
    ensure!(
        output.status.success(),
        "{} failed: {}",
        command.get_program().display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
