//! The tracepoints that are hit whenever a filesystem changes a block map.
//!
//! XFS has a tracepoint for every change of its list of extents in memory,
//! through which all changes of a block map go. It exchanges whole lists in one
//! other place (`xfs_swap_extent_forks`, fs/xfs/xfs_bmap_util.c). Sharing
//! changes the list of the file that gets the blocks, not of the file that has
//! them; `xfs_reflink_remap_extent_src` tells of the latter a moment before.
//! ext4 allocates and converts in `ext4_ext_map_blocks`. Everything that takes
//! blocks away or moves them first forgets them in ext4's extent status tree. A
//! long truncation frees the last of the blocks much later, and tells of each
//! extent then.
//!
//! None of these tracepoints is hit by reading, or by writing to blocks that
//! exist.
//!
//! A filesystem that is shut down changes no block map any more, and writes
//! nothing either. A shutdown has tracepoints of its own, which name no file.

use super::format::{Format, id_of};
use super::tracefs;
use crate::Errno;
use mapdirect_model::facts::Filesystem;
use std::os::fd::BorrowedFd;

/// The fields of a record that say which blocks it is about.
#[derive(Clone, Copy, Debug)]
enum Blocks {
    /// The record does not say, so it may be about all blocks.
    All,
    /// The first block and the number of blocks.
    Run(&'static str, &'static str),
    /// The first block and the last block.
    Span(&'static str, &'static str),
}

struct Point {
    name: &'static str,
    /// A condition of this tracepoint, and the field that the condition needs.
    condition: Option<(&'static str, &'static str)>,
    blocks: Blocks,
    about: About,
}

/// What a tracepoint tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum About {
    /// Blocks of a file.
    File,
    /// A filesystem that may be shut down.
    Filesystem,
}

/// Excludes attributes (256) and blocks set aside for copies (512), which are
/// in other lists than the data (`BMAP_ATTRFORK`, `BMAP_COWFORK`,
/// fs/xfs/libxfs/xfs_bmap.h).
const DATA: Option<(&str, &str)> = Some(("bmap_state", "!(bmap_state & 768)"));
const EXTENT: Blocks = Blocks::Run("startoff", "blockcount");

const fn point(
    name: &'static str,
    condition: Option<(&'static str, &'static str)>,
    blocks: Blocks,
) -> Point {
    Point {
        name,
        condition,
        blocks,
        about: About::File,
    }
}

const fn shutdown(name: &'static str) -> Point {
    Point {
        about: About::Filesystem,
        ..point(name, None, Blocks::All)
    }
}

const XFS: [Point; 7] = [
    point("xfs/xfs_iext_insert", DATA, EXTENT),
    point("xfs/xfs_iext_remove", DATA, EXTENT),
    point("xfs/xfs_bmap_pre_update", DATA, EXTENT),
    point("xfs/xfs_bmap_post_update", DATA, EXTENT),
    point("xfs/xfs_swap_extent_before", None, Blocks::All),
    point(
        "xfs/xfs_reflink_remap_extent_src",
        None,
        Blocks::Run("lblk", "len"),
    ),
    shutdown("xfs/xfs_force_shutdown"),
];

/// `EXT4_GET_BLOCKS_CREATE` (fs/ext4/ext4.h): blocks may be allocated or
/// converted, and are not just looked up.
const CREATE: Option<(&str, &str)> = Some(("flags", "(flags & 1)"));

const EXT4: [Point; 5] = [
    point(
        "ext4/ext4_ext_map_blocks_exit",
        CREATE,
        Blocks::Run("lblk", "len"),
    ),
    point(
        "ext4/ext4_es_remove_extent",
        None,
        Blocks::Run("lblk", "len"),
    ),
    point("ext4/ext4_remove_blocks", None, Blocks::Span("from", "to")),
    shutdown("ext4/ext4_shutdown"),
    // An error may lead to a shutdown.
    shutdown("ext4/ext4_error"),
];

/// Why there are no tracepoints to listen to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Missing {
    /// The kernel lacks this tracepoint, or its description cannot be
    /// understood.
    #[error("this kernel lacks the tracepoint {0}")]
    Point(&'static str),
    /// The kernel does not show its tracepoints.
    #[error("tracepoints cannot be read (tracefs): {0}")]
    Tracefs(Errno),
}

/// A tracepoint as the running kernel has it.
#[derive(Debug)]
pub(crate) struct Tracepoint {
    format: Format,
    /// The name without the group.
    name: &'static str,
    blocks: Blocks,
    pub(crate) condition: Option<&'static str>,
    pub(crate) about: About,
}

impl Tracepoint {
    pub(crate) fn id(&self) -> u64 {
        self.format.id.into()
    }
}

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    /// The device, as the kernel numbers devices.
    pub(crate) device: u32,
    /// The inode, or `None` if the record is about the filesystem.
    pub(crate) inode: Option<u64>,
    /// The name of the tracepoint.
    pub(crate) at: &'static str,
    /// The first block and the number of blocks, or `None` if it may be any.
    pub(crate) blocks: Option<(u64, u64)>,
}

/// The tracepoints of a filesystem.
#[derive(Debug)]
pub(crate) struct Tracepoints(pub(crate) Vec<Tracepoint>);

impl Tracepoints {
    /// Finds the tracepoints of a filesystem in the running kernel.
    pub(crate) fn find(filesystem: &Filesystem) -> Result<Self, Missing> {
        let events = tracefs::events().map_err(Missing::Tracefs)?;
        Self::find_in(filesystem, |name| read(&events, name))
    }

    fn find_in(
        filesystem: &Filesystem,
        format_of: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, Missing> {
        let points: &[Point] = match filesystem {
            Filesystem::Xfs => &XFS,
            Filesystem::Ext4 => &EXT4,
            _ => &[],
        };
        let mut found = Vec::new();
        for point in points {
            let format = format_of(point.name)
                .and_then(|text| Format::parse(&text))
                .filter(|format| format.has("dev"))
                .filter(|format| point.about == About::Filesystem || format.has("ino"));
            let format = match format {
                Some(format) => format,
                None if point.about == About::Filesystem => continue,
                // Without this tracepoint a change could go unnoticed.
                None => return Err(Missing::Point(point.name)),
            };
            // Without the field there are more events than needed, but none is
            // missed.
            let condition = point
                .condition
                .filter(|(field, _)| format.has(field))
                .map(|(_, condition)| condition);
            found.push(Tracepoint {
                name: point
                    .name
                    .split_once('/')
                    .map_or(point.name, |(_, name)| name),
                blocks: point.blocks,
                condition,
                about: point.about,
                format,
            });
        }
        Ok(Self(found))
    }

    /// What a record says, if it is from one of these tracepoints.
    pub(crate) fn understand(&self, record: &[u8]) -> Option<Told> {
        let id = id_of(record)?;
        let point = self.0.iter().find(|point| point.format.id == id)?;
        let value = |name| point.format.value(name, record);
        let blocks = match point.blocks {
            Blocks::All => None,
            Blocks::Run(first, count) => value(first).zip(value(count)),
            Blocks::Span(first, last) => value(first)
                .zip(value(last))
                .map(|(first, last)| (first, last.saturating_sub(first).saturating_add(1))),
        };
        Some(Told {
            device: u32::try_from(value("dev")?).ok()?,
            inode: match point.about {
                About::File => Some(value("ino")?),
                About::Filesystem => None,
            },
            at: point.name,
            blocks,
        })
    }
}

fn read(events: &impl std::os::fd::AsFd, name: &str) -> Option<String> {
    use rustix::fs::{Mode, OFlags, openat};
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let path = format!("{name}/format");
    let events: BorrowedFd<'_> = events.as_fd();
    let file = openat(events, path, flags, Mode::empty()).ok()?;
    let mut text = Vec::new();
    // A format is a few hundred bytes.
    let mut limited = std::io::Read::take(std::fs::File::from(file), 64 << 10);
    std::io::Read::read_to_end(&mut limited, &mut text).ok()?;
    String::from_utf8(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(name: &str) -> Option<String> {
        let number = 100 + name.len();
        Some(format!(
            "ID: {number}\n\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\
             \tfield:ino_t ino;\toffset:8;\tsize:8;\tsigned:0;\n\
             \tfield:dev_t dev;\toffset:16;\tsize:4;\tsigned:0;\n\
             \tfield:u32 lblk;\toffset:20;\tsize:4;\tsigned:0;\n\
             \tfield:unsigned len;\toffset:24;\tsize:4;\tsigned:0;\n\
             \tfield:u32 from;\toffset:20;\tsize:4;\tsigned:0;\n\
             \tfield:u32 to;\toffset:24;\tsize:4;\tsigned:0;\n"
        ))
    }

    fn record(name: &str) -> Vec<u8> {
        let id = u16::try_from(100 + name.len()).unwrap();
        let mut record = vec![0; 28];
        record[..2].copy_from_slice(&id.to_ne_bytes());
        record[8..16].copy_from_slice(&99u64.to_ne_bytes());
        record[16..20].copy_from_slice(&7u32.to_ne_bytes());
        record[20..24].copy_from_slice(&10u32.to_ne_bytes());
        record[24..28].copy_from_slice(&12u32.to_ne_bytes());
        record
    }

    #[test]
    fn records_are_understood_by_what_the_kernel_says_of_them() {
        let points = Tracepoints::find_in(&Filesystem::Ext4, format).unwrap();
        assert_eq!(points.0.len(), EXT4.len());
        // It has no field of the condition here.
        assert!(points.0.iter().all(|point| point.condition.is_none()));
        let told = |name: &str| points.understand(&record(name)).unwrap();
        let run = told("ext4/ext4_es_remove_extent");
        assert_eq!((run.device, run.inode), (7, Some(99)));
        let dead = told("ext4/ext4_shutdown");
        assert_eq!((dead.device, dead.inode, dead.blocks), (7, None, None));
        assert_eq!(run.blocks, Some((10, 12)));
        assert_eq!(told("ext4/ext4_remove_blocks").blocks, Some((10, 3)));
        assert_eq!(points.understand(&[1, 0]), None);
        assert_eq!(points.understand(&[]), None);
        assert_eq!(
            points.understand(&record("ext4/ext4_remove_blocks")[..12]),
            None
        );
    }

    #[test]
    fn what_must_be_there_is_missed() {
        let without = |gone: &'static str| {
            Tracepoints::find_in(&Filesystem::Xfs, |name| {
                format(name).filter(|_| name != gone)
            })
        };
        assert_eq!(without("").unwrap().0.len(), XFS.len());
        let gone = "xfs/xfs_iext_remove";
        assert_eq!(without(gone).unwrap_err(), Missing::Point(gone));
        // Blocks are noticed all the same.
        let less = without("xfs/xfs_force_shutdown").unwrap();
        assert_eq!(less.0.len(), XFS.len() - 1);
    }
}
