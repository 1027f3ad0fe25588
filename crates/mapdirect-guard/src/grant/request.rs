//! What a request and its file say by themselves.

use super::refusal::*;
use crate::policy::{self};
use crate::table::InodeId;
use crate::{Errno, Guard};
use mapdirect_model::facts::{FileFacts, ObstacleKind};
use mapdirect_proto::{Flags, PinRequest, Reason, Refusal};
use mapdirect_sys::proc;
use rustix::fs::OFlags;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// What the request and the file say by themselves.
pub(super) struct Judged {
    pub(super) id: InodeId,
    pub(super) facts: FileFacts,
    pub(super) path: Arc<str>,
    /// The range to pin: the one asked for, rounded out to blocks.
    pub(super) range: Range<u64>,
    /// The range that will be mapped.
    pub(super) mapped: Option<Range<u64>>,
    /// Nothing of the file will be mapped where it is frozen.
    pub(super) in_segments: bool,
    /// Open flags of the holder's description.
    pub(super) open_flags: OFlags,
}

impl Judged {
    /// Where somebody could be writing to and take blocks of the range along:
    /// see [`Beside`].
    pub(super) fn reach(&self) -> Range<u64> {
        if self.range.end > self.facts.size {
            return 0..u64::MAX;
        }
        if let Some(window) = self.window() {
            // Somebody may store to a folio that holds blocks of the range.
            let folios = policy::folios(&self.range);
            return window.start.min(folios.start)..window.end.max(folios.end);
        }
        // One extent of ext4 (EXT_INIT_MAX_LEN, fs/ext4/ext4_extents.h).
        let extent = 32768 * u64::from(self.facts.block_size);
        let range = &self.range;
        range.start.saturating_sub(extent)..range.end.saturating_add(extent)
    }

    /// The bytes around the range that XFS may copy together with it, when they
    /// are shared and written to. That a folio is larger does not matter: what
    /// is neither shared nor copied with it is written back where it lies.
    pub(super) fn window(&self) -> Option<Range<u64>> {
        self.facts.copies_around(&self.range)
    }

    pub(super) fn is_writable(&self) -> bool {
        self.open_flags & OFlags::ACCMODE != OFlags::RDONLY
    }
}

pub(super) fn judge(
    guard: &Guard,
    request: &PinRequest,
    file: BorrowedFd<'_>,
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
    // A file of the wrong kind is that before it is anything else.
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
    let asked = range_of(request, &facts)?;
    let range = if flags.contains(Flags::WHOLE_FILE) {
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
    // To ask where a file is takes longer than all the other questions.
    let known = guard
        .table
        .get(id)
        .map(|watched| Arc::clone(&watched.path))
        .filter(|path| above(path).is_none());
    let path = known.unwrap_or_else(|| Arc::from(proc::path_of(file)));
    if let Some(mount_point) = above(&path) {
        return Err(refusal(
            Reason::OverlayUpper,
            Errno::OPNOTSUPP,
            format!("the overlay at {mount_point} writes to it behind every gate"),
            "unmount the overlay, or move the file out of its upper directory",
        ));
    }
    if !guard.gate.is_in_kernel()
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
        open_flags,
    })
}

/// The range asked for, rounded out to blocks.
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
    let (start, end) = if request.length > 0 {
        let end = request.offset.checked_add(request.length);
        (request.offset, end.ok_or_else(overflow)?)
    } else if request.flags.contains(Flags::WHOLE_FILE) {
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
