//! Whether a file can be pinned or mapped `MAP_DIRECT` at all: facts about
//! it, and what they mean.

use crate::contract::Geometry;
use crate::extent::DeviceId;
use mapdirect_sys::inode_flags::{self, ExtendedFlags};
use mapdirect_sys::{Errno, proc_mountinfo, xfs_geometry};
use rustix::fs::{AtFlags, FileType, StatxFlags};
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// Filesystems told apart here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Filesystem {
    /// XFS.
    Xfs,
    /// ext4, or ext2 and ext3 through its driver.
    Ext4,
    /// Another one, by name or magic number.
    Other(String),
}

/// What the kernel tells about a file that matters to a pin.
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
    /// Files can share blocks.
    pub reflink: bool,
    /// Files of it can exchange blocks (XFS).
    pub exchange: bool,
    /// Loads and stores reach the media without the page cache.
    pub dax: bool,
    /// What kind of file.
    file_type: FileType,
    /// Links to it.
    pub links: u64,
    /// Its owner.
    pub owner: u32,
    /// All writes go to new places (zoned XFS).
    out_of_place: bool,
    /// Data goes through the journal.
    journalled: bool,
    inode_flags: u32,
    extended: ExtendedFlags,
}

/// What kind of obstacle it is.
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
    /// The range holds blocks that cannot be stored to as they are.
    FrozenBlocks,
}

/// The pieces in which the page cache of this machine handles files; `coarse`
/// says whether the filesystem writes whole folios back.
#[must_use]
pub fn geometry(coarse: bool) -> Geometry {
    Geometry::of_pages(mapdirect_sys::mmap::page_size()).coarse(coarse)
}

/// Something that stands in the way, for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// What kind.
    pub kind: ObstacleKind,
    /// The errno of it.
    pub errno: Errno,
    /// In words.
    pub text: String,
    /// How to mend it; empty if there is no way.
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
    /// Asks the kernel.
    ///
    /// # Errors
    ///
    /// `EBADF` for a descriptor that is only a path, and what the calls
    /// answer.
    pub fn read(file: BorrowedFd<'_>) -> Result<Self, Errno> {
        let stat = rustix::fs::fstat(file)?;
        let statfs = rustix::fs::fstatfs(file)?;
        // f_type is a signed long that some magic numbers do not fit: compare
        // the lower half.
        let magic = u64::from_ne_bytes(statfs.f_type.to_ne_bytes()) & 0xffff_ffff;
        let filesystem = filesystem(magic);
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
            #[allow(clippy::useless_conversion, reason = "smaller on arm64")]
            links: u64::from(stat.st_nlink),
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

    /// What stands in the way of any pin on this file, worst first.
    #[must_use]
    pub fn obstacles(&self) -> Vec<Obstacle> {
        let mut found = Vec::new();
        if self.file_type != FileType::RegularFile {
            // mmap(2) itself has no way to map a directory, pipe or socket.
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
                "put the file on XFS or ext4",
            ));
            return found;
        }
        if has(inode_flags::INLINE_DATA) {
            found.push(Obstacle::unsupported(
                ObstacleKind::InlineData,
                "its data lies inside the inode (inline_data)",
                "make the file larger than its inode, or the filesystem without inline_data",
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

    /// Blocks beyond the end of the file were asked for, and are not an
    /// allocation ahead of need that XFS takes back some minutes later.
    #[must_use]
    pub fn keeps_blocks_beyond_the_end(&self) -> bool {
        self.filesystem != Filesystem::Xfs || self.extended.flags & inode_flags::XFLAG_PREALLOC != 0
    }

    /// Whether the flags and hints by which the filesystem allocates blocks of
    /// the file are still those. (That blocks were asked for is none of them.)
    ///
    /// # Errors
    ///
    /// What `FS_IOC_FSGETXATTR` answers.
    pub fn still_allocates_so(&self, file: BorrowedFd<'_>) -> Result<bool, Errno> {
        if self.filesystem != Filesystem::Xfs {
            return Ok(true);
        }
        let hints = |found: ExtendedFlags| ExtendedFlags {
            flags: found.flags & !inode_flags::XFLAG_PREALLOC,
            ..found
        };
        let now = inode_flags::extended(file)?;
        Ok(hints(now) == hints(self.extended))
    }

    /// A write that makes the file grow may take more blocks behind it than it
    /// needs, whoever asked for those that are there (XFS:
    /// `xfs_iomap_prealloc_size`, and `xfs_iomap_eof_align_last_fsb` for direct
    /// writes, fs/xfs/xfs_iomap.c).
    #[must_use]
    pub fn allocates_ahead(&self) -> bool {
        self.filesystem == Filesystem::Xfs
    }

    /// The bytes around a range that XFS may set blocks aside for when shared
    /// blocks among them are written to; if it copies blocks. What has such a
    /// block goes there the next time it is written, shared or not.
    ///
    /// XFS allocates in pieces of the size and alignment of a hint. To fit one
    /// between others it moves it, by less than its size
    /// (`xfs_bmap_extsize_align`, fs/xfs/libxfs/xfs_bmap.c): so a range is
    /// reached from the pieces that it lies in and from one more on each side.
    /// The default counts as well as a hint that is set, which may go.
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

    /// The obstacle of a range with frozen blocks: with an extent size hint,
    /// writing beside them would allocate them; and ext4 that allocates
    /// blocks as they are written joins what it allocates beside an unwritten
    /// extent to that, and converts both.
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
        // The last is how kernels spell the one before it
        // (`_ext4_show_options`, fs/ext4/super.c: the first name there is).
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
