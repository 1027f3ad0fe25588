//! Judges a request and its file by themselves.

use super::refusal::{obstructed, refusal, system};
use crate::table::{Abilities, InodeId, Pin, Watched};
use crate::{Errno, Guard};
use mapdirect_model::facts::{FileFacts, Filesystem, ObstacleKind, geometry};
use mapdirect_proto::{Flags, PinRequest, Reason, Refusal};
use mapdirect_sys::unix::Sender;
use mapdirect_sys::{names, proc, uname};
use rustix::fs::OFlags;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

/// What the request and the file say by themselves.
pub(crate) struct Judged {
    pub(crate) id: InodeId,
    pub(crate) facts: FileFacts,
    pub(crate) path: Arc<str>,
    /// The range to pin: the requested range, extended to whole blocks.
    pub(crate) range: Range<u64>,
    /// The range that the holder will map.
    pub(crate) mapped: Option<Range<u64>>,
    /// The holder will not map the frozen parts of the file.
    pub(crate) in_segments: bool,
    /// The pin shall be of strength stable.
    pub(crate) follows: bool,
    /// Open flags of the holder's description.
    pub(crate) open_flags: OFlags,
}

impl Judged {
    /// The range in which a write by somebody else could take blocks of the
    /// pinned range along: see [`Beside`].
    pub(crate) fn reach(&self) -> Range<u64> {
        if self.range.end > self.facts.size {
            return 0..u64::MAX;
        }
        if let Some(window) = self.window() {
            // Somebody may store to a folio that holds blocks of the range.
            let folios = geometry(false).folios(&self.range);
            return window.start.min(folios.start)..window.end.max(folios.end);
        }
        // The largest extent of ext4 (EXT_INIT_MAX_LEN,
        // fs/ext4/ext4_extents.h).
        let extent = 32768 * u64::from(self.facts.block_size);
        let range = &self.range;
        range.start.saturating_sub(extent)..range.end.saturating_add(extent)
    }

    /// The bytes around the range that XFS may copy together with the range,
    /// when they are shared and written to. A larger folio does not matter
    /// here: a block that is neither shared nor copied with a shared block is
    /// written back in place.
    pub(crate) fn window(&self) -> Option<Range<u64>> {
        self.facts.copies_around(&self.range)
    }

    /// The table entry of the file's inode, created if there is none.
    pub(crate) fn watched(&self, guard: &Guard) -> Arc<Watched> {
        let watched = guard.table.get_or_insert(self.id, || {
            let abilities = Abilities {
                reflink: self.facts.reflink,
                exchange: self.facts.exchange,
                coarse: writes_whole_folios(&self.facts),
            };
            Watched::new(self.id, abilities, Arc::clone(&self.path))
        });
        watched.try_path(|| guard.audit.leads(&watched.path, self.id));
        watched
    }

    /// The requested pin, before anything is known of its blocks.
    pub(crate) fn unsettled(&self, id: u64, flags: Flags, owner: Sender) -> Pin {
        Pin::unsettled(
            id,
            self.range.clone(),
            self.mapped.clone(),
            self.reach(),
            flags,
            owner,
        )
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.open_flags & OFlags::ACCMODE != OFlags::RDONLY
    }
}

pub(crate) fn judge(
    guard: &Guard,
    request: &PinRequest,
    file: BorrowedFd<'_>,
) -> Result<Judged, Refusal> {
    judge_from(guard, request, file, || None)
}

/// [`judge`] for somebody who may call the file by another name than the guard;
/// `place` says where it is here, then.
pub(crate) fn judge_from(
    guard: &Guard,
    request: &PinRequest,
    file: BorrowedFd<'_>,
    place: impl FnOnce() -> Option<PathBuf>,
) -> Result<Judged, Refusal> {
    let flags = request.flags;
    let open_flags = rustix::fs::fcntl_getfl(file).map_err(|errno| system("F_GETFL", errno))?;
    if open_flags.contains(OFlags::PATH) {
        return Err(refusal(
            Reason::Arguments,
            Errno::BADF,
            "the descriptor is only a path (O_PATH)",
            "open the file for reading and writing",
        ));
    }
    let access = open_flags & OFlags::ACCMODE;
    let wanted = if flags.contains(Flags::MAP) {
        access == OFlags::RDWR
    } else {
        access != OFlags::WRONLY
    };
    let facts = FileFacts::read(file).map_err(|errno| system("reading the file's facts", errno))?;
    let obstacles = facts.obstacles();
    // A wrong file type is reported before any other obstacle.
    if let Some(obstacle) = obstacles.first()
        && obstacle.kind == ObstacleKind::FileType
    {
        return Err(obstructed(obstacle.clone()));
    }
    if !wanted {
        return Err(refusal(
            Reason::NotReadWrite,
            Errno::ACCESS,
            "the descriptor is not open for what the pin needs",
            "open the file for reading and writing (a pin without mapping: for reading)",
        ));
    }
    if let Some(obstacle) = obstacles.into_iter().next() {
        return Err(obstructed(obstacle));
    }
    if flags.contains(Flags::MAP) && !facts.dax && !flags.contains(Flags::CACHED) {
        return Err(refusal(
            Reason::NoDax,
            Errno::OPNOTSUPP,
            "the file has no DAX, so stores would go to the page cache",
            "put it on persistent memory mounted with dax, or accept the page cache \
             (option, or MAPDIRECT_CACHED=1)",
        ));
    }
    if flags.contains(Flags::IN_PLACE | Flags::MAP) {
        return Err(refusal(
            Reason::Arguments,
            Errno::INVAL,
            "a pin lives in a program's description, or its holder maps it",
            "ask for one of both",
        ));
    }
    let asked = range_of(request, &facts)?;
    let follows = flags.contains(Flags::STABLE);
    let range = if flags.contains(Flags::WHOLE_FILE) && follows {
        0..u64::MAX
    } else if flags.contains(Flags::WHOLE_FILE) {
        let block = u64::from(facts.block_size).max(1);
        0..facts.size.max(1).next_multiple_of(block).max(asked.end)
    } else {
        asked.clone()
    };
    let id = InodeId {
        dev: facts.dev,
        inode: facts.inode,
    };
    let above = |path: &str| guard.overlays.above(file, path, id, facts.links);
    // Finding out the path of a file takes longer than all the other questions,
    // so a known path is used again.
    let known = guard
        .table
        .get(id)
        .map(|watched| Arc::clone(&watched.path))
        .filter(|path| above(path).is_none());
    let path = known.unwrap_or_else(|| {
        place().map_or_else(
            || Arc::from(proc::path_of(file)),
            |place| Arc::from(names::name(place.as_os_str())),
        )
    });
    if let Some(mount_point) = above(&path) {
        return Err(refusal(
            Reason::OverlayUpper,
            Errno::OPNOTSUPP,
            format!("the overlay at {mount_point} writes to it behind every gate"),
            "unmount the overlay, or move the file out of its upper directory",
        ));
    }
    if !guard.gate.sees_nfs_clients()
        && let Some(directory) = guard.exports.of(id.dev)
    {
        return Err(refusal(
            Reason::Filesystem,
            Errno::OPNOTSUPP,
            format!(
                "its filesystem is exported by NFS for writing (at {}), and a client that sets a \
                 file's size asks no gate of permission events",
                proc::printable(&directory)
            ),
            "export it read-only, or use the bpf gate",
        ));
    }
    Ok(Judged {
        id,
        facts,
        path,
        range,
        mapped: flags.contains(Flags::MAP).then_some(asked),
        in_segments: flags.contains(Flags::SEGMENTS),
        follows,
        open_flags,
    })
}

/// The length of a range, as a request has it.
pub(crate) fn length_of(range: &Range<u64>) -> u64 {
    if range.end == u64::MAX {
        PinRequest::WITHOUT_END
    } else {
        range.end - range.start
    }
}

/// The requested range, extended to whole blocks.
fn range_of(request: &PinRequest, facts: &FileFacts) -> Result<Range<u64>, Refusal> {
    let block = u64::from(facts.block_size).max(1);
    let overflow = || {
        refusal(
            Reason::Arguments,
            Errno::OVERFLOW,
            "the range ends beyond the largest file",
            "give a smaller offset or length",
        )
    };
    if request.length == PinRequest::WITHOUT_END {
        if request.flags.contains(Flags::STABLE) {
            return Ok(request.offset - request.offset % block..u64::MAX);
        }
        return Err(refusal(
            Reason::Arguments,
            Errno::INVAL,
            "only the range of a pin of strength stable can go on without an end",
            "give a length, or ask for strength stable",
        ));
    }
    let (start, end) = if request.length > 0 {
        let end = request.offset.checked_add(request.length);
        (request.offset, end.ok_or_else(overflow)?)
    } else if request.flags.contains(Flags::WHOLE_FILE) {
        // An empty file has a size, too.
        (0, facts.size.max(1))
    } else {
        (request.offset, facts.size)
    };
    if start >= end {
        return Err(refusal(
            Reason::Arguments,
            Errno::INVAL,
            format!("the range is empty: the file ends at byte {}", facts.size),
            "give a range of at least one byte",
        ));
    }
    let end = end.checked_next_multiple_of(block).ok_or_else(overflow)?;
    if end > i64::MAX.cast_unsigned() {
        return Err(overflow());
    }
    Ok(start - start % block..end)
}

/// Whether a write to a part of a folio makes the whole folio dirty, so that
/// its unwritten blocks are converted. XFS does so through the page cache
/// before Linux 6.6, in which iomap began to track dirty blocks.
fn writes_whole_folios(facts: &FileFacts) -> bool {
    facts.filesystem == Filesystem::Xfs && !facts.dax && uname::version() < (6, 6)
}
