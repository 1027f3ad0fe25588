//! Facts about a file that decide whether the file can be pinned or mapped
//! `MAP_DIRECT` at all, and what they mean.

use crate::contract::Geometry;
use crate::extent::DeviceId;
use mapdirect_sys::inode_flags::{self, ExtendedFlags};
use mapdirect_sys::{Errno, proc_mountinfo, xfs_geometry};
use rustix::fs::{AtFlags, FileType, StatxFlags};
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// The filesystems that are distinguished here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Filesystem {
    /// XFS.
    Xfs,
    /// ext4, or ext2 and ext3 through its driver.
    Ext4,
    /// Another filesystem, by name or magic number.
    Other(String),
}

/// The facts about a file that matter to a pin.
#[derive(Clone, Debug)]
pub struct FileFacts {
    /// Device of the filesystem.
    pub device: DeviceId,
    /// `st_dev`.
    pub dev: u64,
    /// Inode number.
    pub inode: u64,
    /// Size in bytes.
    pub size: u64,
    /// Size of a filesystem block in bytes.
    pub block_size: u32,
    /// The filesystem.
    pub filesystem: Filesystem,
    /// Whether files can share blocks.
    pub reflink: bool,
    /// Whether files of the filesystem can exchange blocks (XFS).
    pub exchange: bool,
    /// Whether loads and stores reach the media without the page cache.
    pub dax: bool,
    /// The type of the file.
    file_type: FileType,
    /// The number of links to the file.
    pub links: u64,
    /// The owner of the file.
    pub owner: u32,
    /// Whether all writes go to new places (zoned XFS).
    out_of_place: bool,
    /// Whether data goes through the journal.
    journalled: bool,
    inode_flags: u32,
    extended: ExtendedFlags,
}

/// The kind of an obstacle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ObstacleKind {
    /// Not a regular file.
    FileType,
    /// A filesystem that cannot keep the promise.
    Filesystem,
    /// The file's data lies inside its inode.
    InlineData,
    /// The file is mapped by indirect blocks, not by extents.
    NotExtentMapped,
    /// The file is encrypted or compressed.
    Encoded,
    /// The file's data goes through the journal.
    JournalledData,
    /// The file lies on the realtime device.
    Realtime,
    /// The filesystem always writes out of place.
    OutOfPlace,
    /// An extent size hint would allocate blocks beside the ones written.
    ExtentSizeHint,
    /// The range contains blocks that cannot be stored to as they are.
    FrozenBlocks,
}

/// The pieces in which the page cache of this machine handles files. `coarse`
/// says whether the filesystem writes back whole folios.
#[must_use]
pub fn geometry(coarse: bool) -> Geometry {
    Geometry::of_pages(mapdirect_sys::mmap::page_size()).coarse(coarse)
}

/// A permanent obstacle to a pin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// The kind of the obstacle.
    pub kind: ObstacleKind,
    /// The errno that goes with it.
    pub errno: Errno,
    /// A description for a person.
    pub text: String,
    /// What to do about it. Empty if nothing helps.
    pub mend: String,
}

impl Obstacle {
    fn new(kind: ObstacleKind, errno: Errno, text: impl Into<String>, mend: &str) -> Self {
        Self {
            kind,
            errno,
            text: text.into(),
            mend: mend.to_owned(),
        }
    }

    fn unsupported(kind: ObstacleKind, text: impl Into<String>, mend: &str) -> Self {
        Self::new(kind, Errno::OPNOTSUPP, text, mend)
    }
}

impl Filesystem {
    /// The filesystem of a file. The server of a filesystem may make this wait.
    ///
    /// # Errors
    ///
    /// Any error of `fstatfs(2)`.
    pub fn of(file: BorrowedFd<'_>) -> Result<Self, Errno> {
        rustix::fs::fstatfs(file).map(|statfs| filesystem_of(&statfs))
    }
}

fn filesystem_of(statfs: &rustix::fs::StatFs) -> Filesystem {
    // f_type is a signed long, and some magic numbers do not fit into it.
    // So only the lower half is compared.
    filesystem(u64::from_ne_bytes(statfs.f_type.to_ne_bytes()) & 0xffff_ffff)
}

fn filesystem(magic: u64) -> Filesystem {
    // Magic numbers of include/uapi/linux/magic.h and of the filesystems.
    let name = match magic {
        0x5846_5342 => return Filesystem::Xfs,
        0xEF53 => return Filesystem::Ext4,
        0x9123_683E => "btrfs",
        0x794c_7630 => "overlayfs",
        0x0102_1994 => "tmpfs",
        0x8584_58f6 => "ramfs",
        0x6969 => "NFS",
        0x6573_5546 => "FUSE",
        0xF2F5_2010 => "F2FS",
        0x2FC1_2FC1 => "ZFS",
        0xca45_1a4e => "bcachefs",
        0x0102_1997 => "9p",
        0xff53_4d42 | 0xfe53_4d42 => "SMB",
        0xe0f5_e1e2 => "EROFS",
        0x7371_7368 => "squashfs",
        0x9fa0 => "proc",
        0x6265_6572 => "sysfs",
        0x1373 => "devfs",
        0x5346_544e | 0x7366_746e => "NTFS",
        0x4d44 => "FAT",
        0x2011_BAB0 => "exFAT",
        _ => return Filesystem::Other(format!("type {magic:#x}")),
    };
    Filesystem::Other(name.to_owned())
}

impl FileFacts {
    /// Reads the facts from the kernel.
    ///
    /// # Errors
    ///
    /// `EBADF` for an `O_PATH` descriptor, and any other error of the system
    /// calls.
    pub fn read(file: BorrowedFd<'_>) -> Result<Self, Errno> {
        let stat = rustix::fs::fstat(file)?;
        let statfs = rustix::fs::fstatfs(file)?;
        let filesystem = filesystem_of(&statfs);
        let file_type = FileType::from_raw_mode(stat.st_mode);
        let statx = rustix::fs::statx(
            file,
            "",
            AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC,
            StatxFlags::empty(),
        )?;
        let attributes = statx.stx_attributes.bits() & statx.stx_attributes_mask.bits();
        let mut facts = Self {
            device: DeviceId {
                major: rustix::fs::major(stat.st_dev),
                minor: rustix::fs::minor(stat.st_dev),
            },
            dev: stat.st_dev,
            inode: stat.st_ino,
            size: u64::try_from(stat.st_size).map_err(|_| Errno::OVERFLOW)?,
            block_size: u32::try_from(statfs.f_bsize).unwrap_or(4096),
            filesystem,
            reflink: false,
            exchange: false,
            dax: attributes & STATX_ATTR_DAX != 0,
            file_type,
            links: mapdirect_sys::stat::links(&stat),
            owner: stat.st_uid,
            out_of_place: false,
            journalled: false,
            inode_flags: 0,
            extended: ExtendedFlags::default(),
        };
        if attributes & STATX_ATTR_ENCRYPTED != 0 {
            facts.inode_flags |= inode_flags::ENCRYPTED;
        }
        if attributes & STATX_ATTR_COMPRESSED != 0 {
            facts.inode_flags |= inode_flags::COMPRESSED;
        }
        if file_type != FileType::RegularFile {
            return Ok(facts);
        }
        match facts.filesystem {
            Filesystem::Xfs => {
                let features = xfs_geometry::features(file)?;
                facts.reflink = features & xfs_geometry::REFLINK != 0;
                facts.exchange = features & xfs_geometry::EXCHANGE_RANGE != 0;
                facts.out_of_place = features & xfs_geometry::ZONED != 0;
                facts.extended = inode_flags::extended(file)?;
            }
            Filesystem::Ext4 => {
                facts.inode_flags |= inode_flags::flags(file)?;
                facts.journalled = facts.inode_flags & inode_flags::JOURNAL_DATA != 0
                    || mounted_with_data_journal(facts.device);
            }
            Filesystem::Other(_) => {}
        }
        Ok(facts)
    }

    /// The obstacles to any pin on this file, worst first.
    #[must_use]
    pub fn obstacles(&self) -> Vec<Obstacle> {
        let mut found = Vec::new();
        if self.file_type != FileType::RegularFile {
            // mmap(2) itself cannot map a directory, pipe or socket.
            let errno = match self.file_type {
                FileType::BlockDevice | FileType::CharacterDevice => Errno::OPNOTSUPP,
                _ => Errno::NODEV,
            };
            found.push(Obstacle::new(
                ObstacleKind::FileType,
                errno,
                "it is not a regular file",
                "give a regular file on XFS or ext4",
            ));
            return found;
        }
        let has = |flag| self.inode_flags & flag != 0;
        if let Filesystem::Other(name) = &self.filesystem {
            found.push(Obstacle::unsupported(
                ObstacleKind::Filesystem,
                format!("{name} cannot promise to leave blocks where they are"),
                if name == "overlayfs" {
                    "put the file on XFS or ext4 itself: in a container, on a volume"
                } else {
                    "put the file on XFS or ext4"
                },
            ));
            return found;
        }
        if has(inode_flags::INLINE_DATA) {
            found.push(Obstacle::unsupported(
                ObstacleKind::InlineData,
                "its data lies inside the inode (inline_data)",
                "mapdirect prepare FILE moves it into a block of its own",
            ));
        } else if self.filesystem == Filesystem::Ext4 && !has(inode_flags::EXTENTS) {
            found.push(Obstacle::unsupported(
                ObstacleKind::NotExtentMapped,
                "it is mapped by indirect blocks, not by extents",
                "chattr +e FILE, or copy it on an ext4 with extents",
            ));
        }
        if has(inode_flags::ENCRYPTED) || has(inode_flags::COMPRESSED) {
            found.push(Obstacle::unsupported(
                ObstacleKind::Encoded,
                "it is encrypted or compressed",
                "copy it to a directory without encryption and compression",
            ));
        }
        if self.journalled {
            found.push(Obstacle::unsupported(
                ObstacleKind::JournalledData,
                "its data goes through the journal",
                "chattr -j FILE, or mount with data=ordered",
            ));
        }
        if self.extended.flags & inode_flags::XFLAG_REALTIME != 0 {
            found.push(Obstacle::unsupported(
                ObstacleKind::Realtime,
                "it lies on the realtime device, whose offsets FIEMAP does not tell apart",
                "copy it to the data device",
            ));
        }
        if self.out_of_place {
            found.push(Obstacle::unsupported(
                ObstacleKind::OutOfPlace,
                "this XFS is zoned: every write goes to a new place",
                "use a filesystem on a conventional device",
            ));
        }
        found
    }

    /// Whether blocks beyond the end of the file were requested, and are not
    /// preallocated by XFS, which frees such blocks some minutes later.
    #[must_use]
    pub fn keeps_blocks_beyond_the_end(&self) -> bool {
        self.filesystem != Filesystem::Xfs || self.extended.flags & inode_flags::XFLAG_PREALLOC != 0
    }

    /// Whether the filesystem still allocates blocks of the file by the same
    /// flags and hints. (The flag for requested blocks does not count.)
    ///
    /// # Errors
    ///
    /// Any error of `FS_IOC_FSGETXATTR`.
    pub fn still_allocates_so(&self, file: BorrowedFd<'_>) -> Result<bool, Errno> {
        if self.filesystem != Filesystem::Xfs {
            return Ok(true);
        }
        let hints = |found: ExtendedFlags| ExtendedFlags {
            flags: found.flags & !inode_flags::XFLAG_PREALLOC,
            project: 0,
            ..found
        };
        let now = inode_flags::extended(file)?;
        Ok(hints(now) == hints(self.extended))
    }

    /// Whether a write that makes the file grow may take more blocks behind the
    /// end than it needs, even blocks that somebody requested (XFS:
    /// `xfs_iomap_prealloc_size`, and `xfs_iomap_eof_align_last_fsb` for direct
    /// writes, fs/xfs/xfs_iomap.c).
    #[must_use]
    pub fn allocates_ahead(&self) -> bool {
        self.filesystem == Filesystem::Xfs
    }

    /// The bytes around a range for which XFS may set blocks aside when shared
    /// blocks among them are written to, or `None` if the filesystem does not
    /// copy blocks. A block for which XFS has set another one aside moves there
    /// the next time it is written, whether it is shared or not.
    ///
    /// XFS allocates in pieces that have the size and the alignment of a hint.
    /// To fit a piece between others, XFS moves the piece by less than its size
    /// (`xfs_bmap_extsize_align`, fs/xfs/libxfs/xfs_bmap.c). So XFS can reach a
    /// range from the pieces that the range lies in, and from one more on each
    /// side. The default size counts as well as a hint that is set, because the
    /// hint may be removed.
    #[must_use]
    pub fn copies_around(&self, range: &Range<u64>) -> Option<Range<u64>> {
        // XFS_DEFAULT_COWEXTSZ_HINT, fs/xfs/xfs_inode.h
        const DEFAULT_BLOCKS: u64 = 32;
        if self.filesystem != Filesystem::Xfs || !self.reflink {
            return None;
        }
        let hints = self.extended;
        let hint = u64::from(hints.copy_extent_size.max(hints.extent_size));
        let default = DEFAULT_BLOCKS * u64::from(self.block_size).max(1);
        let around = |piece: u64| {
            let start = (range.start - range.start % piece).saturating_sub(piece);
            let end = range.end.checked_next_multiple_of(piece);
            start
                ..end
                    .and_then(|end| end.checked_add(piece))
                    .unwrap_or(u64::MAX)
        };
        let (default, hinted) = (around(default), around(hint.max(1)));
        Some(default.start.min(hinted.start)..default.end.max(hinted.end))
    }

    /// The obstacle to pinning a range with frozen blocks, if there is one.
    /// With an extent size hint, a write beside frozen blocks would allocate
    /// them. If ext4 allocates blocks as they are written, it joins new blocks
    /// to an unwritten extent beside them, and converts both.
    #[must_use]
    pub fn obstacle_to_frozen(&self) -> Option<Obstacle> {
        let hint = self.extended;
        if hint.flags & inode_flags::XFLAG_EXTSIZE != 0 && hint.extent_size != 0 {
            return Some(Obstacle::unsupported(
                ObstacleKind::ExtentSizeHint,
                format!(
                    "an extent size hint of {} bytes would allocate holes beside what is written",
                    hint.extent_size
                ),
                "fill the range first (mapdirect prepare), or drop the hint: xfs_io -c \
                 'extsize 0' FILE",
            ));
        }
        if self.filesystem != Filesystem::Ext4 {
            return None;
        }
        // Kernels show the second option under the name of the third
        // (`_ext4_show_options`, fs/ext4/super.c: the first name that matches).
        let option = ["nodelalloc", "dioread_lock", "nodioread_nolock"]
            .into_iter()
            .find(|option| is_mounted_with(self.device, |mount| mount.option(option).is_some()))?;
        Some(Obstacle::unsupported(
            ObstacleKind::FrozenBlocks,
            format!(
                "ext4 is mounted with {option}, and converts unwritten blocks beside what is \
                 written"
            ),
            "fill the range first (mapdirect prepare), or mount it without that option",
        ))
    }
}

// include/uapi/linux/stat.h
const STATX_ATTR_COMPRESSED: u64 = 0x4;
const STATX_ATTR_ENCRYPTED: u64 = 0x800;
const STATX_ATTR_DAX: u64 = 0x20_0000;

fn mounted_with_data_journal(device: DeviceId) -> bool {
    is_mounted_with(device, |mount| mount.option("data") == Some("journal"))
}

fn is_mounted_with(device: DeviceId, what: impl Fn(&proc_mountinfo::Mount) -> bool) -> bool {
    proc_mountinfo::read(None).is_ok_and(|mounts| {
        mounts
            .iter()
            .any(|mount| (mount.major, mount.minor) == (device.major, device.minor) && what(mount))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn facts(path: &str) -> FileFacts {
        FileFacts::read(std::fs::File::open(path).unwrap().as_fd()).unwrap()
    }

    #[test]
    #[cfg_attr(miri, ignore = "it asks the kernel about files")]
    fn files_that_are_none_and_filesystems_that_cannot() {
        let device = facts("/dev/null").obstacles();
        assert_eq!(device[0].kind, ObstacleKind::FileType);
        assert_eq!(device[0].errno, Errno::OPNOTSUPP);
        let directory = facts("/").obstacles();
        assert_eq!(directory[0].errno, Errno::NODEV);
        let proc = facts("/proc/self/status").obstacles();
        assert_eq!(proc[0].kind, ObstacleKind::Filesystem);
        assert_eq!(proc[0].errno, Errno::OPNOTSUPP);
    }

    #[test]
    fn magic_numbers_with_the_upper_bit_set() {
        assert_eq!(filesystem(0x9123_683E), Filesystem::Other("btrfs".into()));
    }
}
