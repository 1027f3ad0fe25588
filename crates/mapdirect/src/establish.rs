//! Asking for a pin: the holder's part of a grant.

use crate::descriptor::locks;
use crate::error::{Error, Kind, Result};
use crate::holder::{Connection, Hold, unexpected};
use mapdirect_proto::{
    AllocateRequest, BlockMap, Flags, Gate, Granted, PinRequest, Reply, Request, WatchedPin,
    extent, extent::EXTENT_RECORD,
};
use mapdirect_sys::{Errno, dup, memfd};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// How much of a file a pin covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scope {
    /// The range, extended to whole filesystem blocks. The file may grow, and
    /// may be changed elsewhere.
    #[default]
    Range,
    /// The whole file and its size.
    File,
}

/// What a pin holds of its range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Strength {
    /// Everything: stable blocks stay where they are, and the others stay as
    /// they are. Nobody can store to those.
    #[default]
    All,
    /// What is stable, and what becomes stable from that moment on. Holes and
    /// unwritten blocks may be filled by whoever may write to the file, shared
    /// blocks unshared, and the file may grow. Nobody can free, move or share
    /// what is held, or cut it off.
    ///
    /// A written block near a shared one is held once no copy of that one can
    /// take it along; until then it is [`ExtentState::Loose`]. With
    /// [`Scope::File`], such a pin has no end and does not fix the size: it
    /// follows the file however far that grows.
    ///
    /// [`ExtentState::Loose`]: crate::ExtentState::Loose
    Stable,
}

impl Strength {
    /// What a request says of it.
    pub(crate) const fn flags(self) -> Flags {
        match self {
            Self::All => Flags::NONE,
            Self::Stable => Flags::STABLE,
        }
    }
}

/// What a holder knows of its pin.
#[derive(Debug)]
pub(crate) struct Established {
    pub(crate) named: WatchedPin,
    pub(crate) map: BlockMap,
    /// The description whose life is the pin.
    pub(crate) file: OwnedFd,
    /// What the pin lives by besides, if that description cannot write.
    pub(crate) life: Option<OwnedFd>,
    pub(crate) connection: Arc<Connection>,
}

/// How long to wait for others to let go of the file, unless told otherwise:
/// enough for a program that is just ending.
pub(crate) const PATIENCE: Duration = Duration::from_millis(100);

pub(crate) fn establish(
    connect: impl FnOnce() -> Result<Arc<Connection>>,
    file: BorrowedFd<'_>,
    range: (u64, u64),
    flags: Flags,
    patience: Duration,
) -> Result<Established> {
    locks::refuse_posix_locks(file)?;
    let request = Request::Pin(PinRequest {
        offset: range.0,
        length: range.1,
        flags,
        patience_ms: u32::try_from(patience.as_millis()).unwrap_or(u32::MAX),
    });
    let connection = connect()?;
    connection.require_known(flags)?;
    let mut held = None;
    let (granted, mut fds) = connection.converse(&request, file, |talk, reply, mut fds| {
        match reply {
            Reply::Granted(granted) if connection.gate() == Gate::Bpf => {
                // The guard closes its copy of the description after it has
                // sent it. When it answers once more that is done, and the
                // pin ends when we let go of it, and not a moment later.
                held = Some((granted, fds));
                talk.say(&connection.barrier(), &[])?;
                return Ok(None);
            }
            Reply::Done | Reply::Welcome { .. } if held.is_some() => return Ok(held.take()),
            Reply::Granted(granted) => return Ok(Some((granted, fds))),
            Reply::Swap => {
                let new = fds.pop().ok_or_else(unexpected)?;
                locks::carry(file, new.as_fd())?;
                dup::replace(file, new.as_fd()).map_err(|errno| Error::system("dup3", errno))?;
            }
            _ => return Err(unexpected()),
        }
        talk.say(&Request::Swapped, &[])?;
        Ok(None)
    })?;
    // Behind the description come the extents, if they are not in the message,
    // and what the pin lives by, if the description does not do for that.
    let is_sealed = granted.extents.is_empty() && granted.extent_count > 0;
    let more_than =
        |count: usize, fds: &mut Vec<OwnedFd>| (fds.len() > count).then(|| fds.pop()).flatten();
    let life = more_than(1 + usize::from(is_sealed), &mut fds);
    let extents = more_than(1, &mut fds);
    let file = fds.pop().ok_or_else(unexpected)?;
    let stat = rustix::fs::fstat(&file).map_err(|errno| Error::system("fstat", errno))?;
    Ok(Established {
        named: WatchedPin {
            pin: granted.pin,
            device: stat.st_dev,
            inode: stat.st_ino,
        },
        map: block_map(granted, extents)?,
        file,
        life,
        connection,
    })
}

/// Asks to have frozen blocks of a pin made stable; `pinned` is its
/// description. Returns the block map from then on, if anything has changed,
/// also when the rest fails.
pub(crate) fn allocate(
    hold: &Hold,
    granted_by: &Arc<Connection>,
    range: (u64, u64),
    pinned: BorrowedFd<'_>,
) -> (Option<BlockMap>, Result<()>) {
    let mut now = None;
    let result = ask_to_allocate(hold, granted_by, range, pinned, |granted, extents| {
        now = Some(block_map(granted, extents)?);
        Ok(())
    });
    (now, result)
}

fn ask_to_allocate(
    hold: &Hold,
    granted_by: &Arc<Connection>,
    range: (u64, u64),
    pinned: BorrowedFd<'_>,
    mut changed: impl FnMut(Granted, Option<OwnedFd>) -> Result<()>,
) -> Result<()> {
    // The guard that has it now may be another than the one that granted it.
    // A child of the process that asked for it is a stranger to both.
    let connection = if hold.is_own() {
        &hold.guard().connect()?
    } else {
        granted_by
    };
    let request = Request::Allocate(AllocateRequest {
        pin: hold.id(),
        offset: range.0,
        length: range.1,
    });
    connection.converse(&request, pinned, |_, reply, mut fds| match reply {
        Reply::Granted(granted) => changed(granted, fds.pop()).map(|()| None),
        Reply::Done => Ok(Some(())),
        _ => Err(unexpected()),
    })
}

fn block_map(granted: Granted, sealed: Option<OwnedFd>) -> Result<BlockMap> {
    let Granted {
        range,
        file_size,
        block_size,
        device,
        extent_count,
        extents,
        ..
    } = granted;
    let extents = match sealed {
        None => extents,
        Some(sealed) => {
            let limit = usize::try_from(extent_count)
                .ok()
                .and_then(|count| count.checked_mul(EXTENT_RECORD))
                .ok_or_else(unexpected)?;
            let bytes = memfd::read_sealed(sealed.as_fd(), limit)
                .map_err(|errno| Error::system("reading the extents", errno))?;
            extent::decode_extents(&bytes).map_err(|_| unexpected())?
        }
    };
    if extents.len() as u64 != extent_count {
        return Err(unexpected());
    }
    Ok(BlockMap::new(device, block_size, file_size, range, extents))
}

/// Why a pin of strength stable allocates nothing.
pub(crate) fn nothing_is_frozen() -> Error {
    Error::new(
        Kind::Arguments,
        Errno::OPNOTSUPP,
        "a pin of strength stable freezes nothing, and the guard allocates nothing for it",
        "write to the blocks, or use fallocate(2): the pin lets you",
    )
}

/// The bytes of a range as a request has them; nothing stands for the whole
/// file. A range up to `u64::MAX` has no end.
pub(crate) fn offset_and_length(range: Option<&Range<u64>>) -> Result<(u64, u64)> {
    let Some(range) = range else {
        return Ok((0, 0));
    };
    if range.end == u64::MAX && range.start < range.end {
        return Ok((range.start, PinRequest::WITHOUT_END));
    }
    match range.end.checked_sub(range.start) {
        Some(length) if length > 0 => Ok((range.start, length)),
        _ => Err(Error::new(
            Kind::Arguments,
            Errno::INVAL,
            "the range is empty",
            "give a range of at least one byte",
        )),
    }
}
