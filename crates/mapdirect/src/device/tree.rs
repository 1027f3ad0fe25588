//! Block devices in sysfs. What is there is checked, not trusted: devices come
//! and go while it is read.

use super::BlockDevice;
use crate::error::{Error, Kind, Result};
use mapdirect_model::DeviceId;
use mapdirect_sys::Errno;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Bytes of the sectors that sysfs counts in, whatever those of a device are.
const SECTOR: u64 = 512;

/// Where sysfs and the device files are.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) sysfs: PathBuf,
    pub(super) devices: PathBuf,
}

/// What lies below a block device.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Below {
    /// Nothing: it is a whole disk.
    Nothing,
    /// A disk, of which it is the part that begins there, in bytes.
    Disk(DeviceId, u64),
    /// What a table of the device-mapper says.
    Mapped,
    /// Other devices, in an order that only their driver knows.
    Others(Vec<String>),
}

impl Tree {
    pub(super) fn of_this_machine() -> Self {
        Self {
            sysfs: PathBuf::from("/sys"),
            devices: PathBuf::from("/dev"),
        }
    }

    /// The directory of a device.
    fn directory(&self, id: DeviceId) -> Result<PathBuf> {
        let link = self.sysfs.join(format!("dev/block/{id}"));
        let directory = fs::canonicalize(&link).map_err(|_| {
            let why = match (id.major, self.sysfs.join("dev/block").is_dir()) {
                (0, true) => format!("{id} is the number of a filesystem without a block device"),
                (_, true) => format!("there is no block device {id} (any more)"),
                (_, false) => String::from("sysfs is not mounted at /sys"),
            };
            Error::new(Kind::System, Errno::NXIO, why, "")
        })?;
        // It may have been another one's a moment ago.
        match text(&directory, "dev") {
            Some(there) if there == id.to_string() => Ok(directory),
            there => Err(contradiction(&format!(
                "{} shows device {}",
                link.display(),
                there.unwrap_or_else(|| String::from("without a number"))
            ))),
        }
    }

    /// A device of this number.
    pub(super) fn device(&self, id: DeviceId) -> Result<BlockDevice> {
        let directory = self.directory(id)?;
        let uevent = text(&directory, "uevent").unwrap_or_default();
        let name = uevent
            .lines()
            .find_map(|line| line.strip_prefix("DEVNAME="))
            .map(str::to_owned)
            .or_else(|| Some(directory.file_name()?.to_string_lossy().replace('!', "/")))
            .ok_or_else(|| contradiction(&format!("device {id} has no name")))?;
        let size = number(&directory, "size")
            .and_then(|sectors| sectors.checked_mul(SECTOR))
            .ok_or_else(|| contradiction(&format!("{name} has no size")))?;
        let mapped = text(&directory, "dm/name").map(|name| Path::new("mapper").join(name));
        let path = mapped
            .into_iter()
            .chain([PathBuf::from(&name)])
            .map(|path| self.devices.join(path))
            .find(|path| is_device(path, id));
        Ok(BlockDevice {
            id,
            path,
            size,
            backing_file: text(&directory, "loop/backing_file").map(PathBuf::from),
            name,
        })
    }

    /// What a device lies on.
    pub(super) fn below(&self, id: DeviceId) -> Result<Below> {
        let directory = self.directory(id)?;
        if directory.join("partition").exists() {
            let start = number(&directory, "start").and_then(|start| start.checked_mul(SECTOR));
            let disk = directory
                .parent()
                .and_then(|disk| text(disk, "dev"))
                .and_then(|text| parse_id(&text));
            return match (start, disk) {
                (Some(start), Some(disk)) => Ok(Below::Disk(disk, start)),
                _ => Err(contradiction(&format!(
                    "the partition {id} has no start, or no disk"
                ))),
            };
        }
        if directory.join("dm").exists() {
            return Ok(Below::Mapped);
        }
        let entries = fs::read_dir(directory.join("slaves"));
        let mut others: Vec<_> = entries
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        others.sort_unstable();
        Ok(if others.is_empty() {
            Below::Nothing
        } else {
            Below::Others(others)
        })
    }
}

/// sysfs does not agree with itself.
pub(super) fn contradiction(what: &str) -> Error {
    Error::new(
        Kind::System,
        Errno::BADMSG,
        format!("sysfs contradicts itself: {what}"),
        "try again: a device may have come or gone at this moment",
    )
}

/// Whether a path leads to the block device of this number.
fn is_device(path: &Path, id: DeviceId) -> bool {
    fs::metadata(path).is_ok_and(|metadata| {
        metadata.file_type().is_block_device()
            && rustix::fs::major(metadata.rdev()) == id.major
            && rustix::fs::minor(metadata.rdev()) == id.minor
    })
}

/// An attribute without the end of its line.
fn text(directory: &Path, attribute: &str) -> Option<String> {
    let text = fs::read_to_string(directory.join(attribute)).ok()?;
    Some(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}

fn number(directory: &Path, attribute: &str) -> Option<u64> {
    text(directory, attribute)?.parse().ok()
}

fn parse_id(text: &str) -> Option<DeviceId> {
    let (major, minor) = text.split_once(':')?;
    Some(DeviceId {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    })
}
