//! The block device that a block map counts on, and the way from there to whole
//! disks: through partitions, and through what the device-mapper maps linearly.

mod layout;
#[cfg(test)]
mod tests;
mod tree;

pub use layout::{DiskLayout, DiskRun, Place};

use crate::error::{Error, Kind, Result};
use mapdirect_model::facts::ObstacleKind;
use mapdirect_model::{DeviceId, FileFacts, Filesystem};
use mapdirect_sys::Errno;
use std::os::fd::AsFd;
use std::path::PathBuf;
use tree::Tree;

/// A block device, as sysfs shows it.
///
/// # Examples
///
/// An agent that goes to the blocks by itself opens the disk, and needs to know
/// where on it they are:
///
/// ```no_run
/// use mapdirect::{BlockDevice, PinOptions, Place};
///
/// let file = std::fs::File::open("image.raw")?;
/// let pin = PinOptions::new().pin(&file)?;
/// let layout = BlockDevice::of(&file)?.layout();
/// for extent in pin.extents() {
///     for run in layout.locate_extent(extent) {
///         match &run.place {
///             Place::Disk { disk, offset } => {
///                 println!("{} bytes at {offset} of {}", run.length, disk.name);
///             }
///             Place::Unknown { reason } => println!("{} bytes: {reason}", run.length),
///             _ => {}
///         }
///     }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct BlockDevice {
    /// Major and minor number.
    pub id: DeviceId,
    /// The kernel's name of it: `sda1`, `dm-0`, `loop3`.
    pub name: String,
    /// The device file, if there is one of that number where udev puts it.
    pub path: Option<PathBuf>,
    /// Size in bytes.
    pub size: u64,
    /// The file that a loop device shows. Where that one's blocks are is another
    /// question.
    pub backing_file: Option<PathBuf>,
}

impl BlockDevice {
    /// The device that the block map of a file counts on.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` where there is no such device, or more than one: on
    /// filesystems other than XFS and ext4, and for a file on the realtime
    /// device of an XFS. `ENODEV` for a directory, a pipe or a socket,
    /// `EOPNOTSUPP` for a device. `ENXIO` if the device is gone.
    ///
    /// # Examples
    ///
    /// ```
    /// let null = std::fs::File::open("/dev/null")?;
    /// let error = mapdirect::BlockDevice::of(&null).unwrap_err();
    /// assert_eq!(error.errno_name(), "EOPNOTSUPP");
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn of(file: impl AsFd) -> Result<Self> {
        const ASKED: &str = "tell on which device the file lies";
        let facts = FileFacts::read(file.as_fd())
            .map_err(|errno| Error::system("statx", errno).asking(ASKED))?;
        let elsewhere = facts.obstacles().into_iter().find(|obstacle| {
            matches!(
                obstacle.kind,
                ObstacleKind::FileType | ObstacleKind::Realtime
            )
        });
        if let Some(obstacle) = elsewhere {
            let kind = Kind::of(obstacle.kind.into());
            return Err(
                Error::new(kind, obstacle.errno, obstacle.text, obstacle.mend).asking(ASKED),
            );
        }
        if let Filesystem::Other(name) = &facts.filesystem {
            return Err(Error::new(
                Kind::Filesystem,
                Errno::OPNOTSUPP,
                format!("where {name} puts the blocks of a file is not known here"),
                "use a file on XFS or ext4",
            )
            .asking(ASKED));
        }
        Self::with_id(facts.device)
    }

    /// The device of a number, such as [`BlockMap::device`](crate::BlockMap::device)
    /// gives.
    ///
    /// # Errors
    ///
    /// `ENXIO` if there is none (any more), `EBADMSG` if sysfs contradicts itself.
    pub fn with_id(id: DeviceId) -> Result<Self> {
        Tree::of_this_machine()
            .device(id)
            .map_err(|error| error.asking(format!("examine the device {id}")))
    }

    /// Finds out where the bytes of the device are on whole disks.
    ///
    /// This reads sysfs and, for mapped devices, their tables, which takes
    /// `CAP_SYS_ADMIN`. What cannot be found out is not guessed: it is
    /// [`Place::Unknown`], with the reason.
    ///
    /// The answer holds until somebody changes partitions or tables. A pin does
    /// not keep anybody from that: `pvmove`, say, moves the blocks of a whole
    /// filesystem to another disk, below of what a filesystem knows.
    #[must_use]
    pub fn layout(&self) -> DiskLayout {
        DiskLayout::read(
            &Tree::of_this_machine(),
            self,
            mapdirect_sys::dm_table::table,
        )
    }
}
