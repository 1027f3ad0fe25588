//! Pinning a range and mapping it.

use super::segments;
use crate::descriptor::{require_read_write, require_readable};
use crate::error::{Error, Kind, Result};
use crate::establish::{Established, Scope, Strength, establish};
use crate::frozen::Frozen;
use crate::guard::Guard;
use crate::holder::Connection;
use mapdirect_model::plan::Plan;
use mapdirect_proto::{BlockMap, Extent, ExtentState, Flags, WatchedPin};
use mapdirect_sys::{Errno, mmap, proc};
use rustix::fs::OFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Everything about a mapping but the file and the range.
pub(crate) struct How {
    pub(crate) prot: i32,
    /// Flags of `mmap(2)` besides the type and `MAP_DIRECT`.
    pub(crate) flags: i32,
    pub(crate) address: usize,
    pub(crate) scope: Scope,
    /// What else the pin shall be.
    pub(crate) also: Flags,
    pub(crate) strength: Strength,
    pub(crate) cached: bool,
    pub(crate) patience: Duration,
    pub(crate) guard: Guard,
}

/// What keeps a pin besides its mapping: nothing for a mapping that can be
/// stored to.
#[derive(Debug, Default)]
pub(super) struct Life {
    /// What a pin lives by whose description cannot write, with the fanotify
    /// gate. Dropped first: the guard looks when the description is closed.
    pub(super) pipe: Option<OwnedFd>,
    /// A description that can write, and is not the one that is mapped.
    _description: Option<OwnedFd>,
}

/// A mapping that was made.
pub(crate) struct Placed {
    pub(crate) address: usize,
    pub(crate) named: WatchedPin,
    pub(crate) map: BlockMap,
    pub(crate) plan: Plan,
    pub(crate) frozen: Option<Frozen>,
    pub(crate) flags: i32,
    pub(crate) connection: Arc<Connection>,
    pub(super) life: Life,
}

impl How {
    /// Pins and maps. Leaves nothing behind when it fails.
    ///
    /// # Safety
    ///
    /// With `MAP_FIXED`, as [`mmap::map`].
    pub(crate) unsafe fn place(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        length: usize,
    ) -> Result<Placed> {
        check_range(offset, length)?;
        check_prot(self.prot)?;
        require_read_write(file)?;
        let mut asked = Flags::MAP | Flags::SEGMENTS | self.also | self.strength.flags();
        if self.cached {
            asked = asked | Flags::CACHED;
        }
        if self.scope == Scope::File {
            asked = asked | Flags::WHOLE_FILE;
        }
        let range = (offset, length as u64);
        let Established {
            named,
            map,
            file: pinned,
            // Only where the description cannot write.
            life: _,
            connection,
        } = establish(|| self.guard.connect(), file, range, asked, self.patience)?;
        // MAP_SYNC has a meaning only where flags are validated.
        let kind = if self.flags & mmap::MAP_SYNC != 0 {
            mmap::MAP_SHARED_VALIDATE
        } else {
            mmap::MAP_SHARED
        };
        let flags = kind | self.flags;
        let plan = match self.strength {
            Strength::All => Plan::new(&map, offset, length as u64, mmap::page_size()),
            Strength::Stable => plan_of_file(&map, offset, length as u64),
        };
        let arguments = segments::Arguments {
            pinned: pinned.as_fd(),
            address: self.address,
            prot: self.prot,
            flags,
        };
        let mapped = match self.strength {
            // SAFETY: the caller answers for MAP_FIXED.
            Strength::All => unsafe { segments::map(&plan, arguments) },
            // SAFETY: as above.
            Strength::Stable => unsafe { segments::map_whole(&plan, arguments, offset, length) },
        };
        // From here on the mapping alone keeps the description, and with it
        // the pin; if there is none, the pin ends with this descriptor.
        drop(pinned);
        let segments::Mapped { address, frozen } = mapped?;
        Ok(Placed {
            address,
            named,
            map,
            plan,
            frozen,
            flags,
            connection,
            life: Life::default(),
        })
    }

    /// Pins and maps for reading alone, wherever the kernel likes. Leaves
    /// nothing behind when it fails.
    ///
    /// The whole range is the file itself: a load changes no block, whatever
    /// the block is.
    pub(super) fn place_for_reading(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        length: usize,
    ) -> Result<Placed> {
        check_range(offset, length)?;
        let writable = require_readable(file)?;
        let scope = match self.scope {
            Scope::Range => Flags::NONE,
            Scope::File => Flags::WHOLE_FILE,
        };
        let asked = scope | self.also | self.strength.flags();
        let range = (offset, length as u64);
        let Established {
            named,
            map,
            file: pinned,
            life: pipe,
            connection,
        } = establish(|| self.guard.connect(), file, range, asked, self.patience)?;
        let flags = mmap::MAP_SHARED | self.flags;
        let plan = plan_of_file(&map, offset, length as u64);
        // By a description that can write, mprotect(2) would make the mapping
        // writable, holes included. So that is kept, and another one mapped.
        let (for_reading, description) = if writable {
            (reopen_for_reading(pinned.as_fd())?, Some(pinned))
        } else {
            (pinned, None)
        };
        let arguments = segments::Arguments {
            pinned: for_reading.as_fd(),
            address: 0,
            prot: mmap::PROT_READ,
            flags,
        };
        // SAFETY: without MAP_FIXED a mapping takes no place that is in use.
        let mapped = unsafe { segments::map_whole(&plan, arguments, offset, length) }?;
        Ok(Placed {
            address: mapped.address,
            named,
            map,
            plan,
            frozen: None,
            flags,
            connection,
            life: Life {
                pipe,
                _description: description,
            },
        })
    }
}

/// What `mmap(2)` checks before it looks at the file.
pub(super) fn check_range(offset: u64, length: usize) -> Result<()> {
    let page = mmap::page_size();
    let invalid = |text: &str| {
        Error::new(
            Kind::Arguments,
            Errno::INVAL,
            text,
            format!("pages have {page} bytes here"),
        )
    };
    if length == 0 {
        return Err(invalid("the length is 0"));
    }
    if !offset.is_multiple_of(page) {
        return Err(invalid("the offset is not on a page boundary"));
    }
    let rounded = (length as u64)
        .checked_next_multiple_of(page)
        .filter(|length| *length <= i64::MAX.cast_unsigned())
        .ok_or_else(too_large)?;
    if offset
        .checked_add(rounded)
        .is_none_or(|end| end > i64::MAX.cast_unsigned())
    {
        return Err(Error::new(
            Kind::Arguments,
            Errno::OVERFLOW,
            "the range ends beyond the largest file",
            "give a smaller offset or length",
        ));
    }
    Ok(())
}

/// The plan of a mapping that is the file itself throughout. Whatever is in the
/// file can be accessed: to read it, and under a pin of strength stable to write
/// to it as well.
fn plan_of_file(map: &BlockMap, offset: u64, length: u64) -> Plan {
    let range = map.range();
    let end = map.file_size().min(range.end).max(range.start);
    let all = Extent::new(range.start, None, end - range.start, ExtentState::Written);
    let written = BlockMap::new(
        map.device(),
        map.block_size(),
        map.file_size(),
        range,
        [all],
    );
    Plan::new(&written, offset, length, mmap::page_size())
}

/// The same for a file that has `size` bytes by now.
pub(super) fn plan_of_size(map: &BlockMap, size: u64, offset: u64, length: u64) -> Plan {
    let (device, block) = (map.device(), map.block_size());
    let now = BlockMap::new(device, block, size, map.range(), []);
    plan_of_file(&now, offset, length)
}

fn reopen_for_reading(pinned: BorrowedFd<'_>) -> Result<OwnedFd> {
    proc::reopen(pinned, OFlags::RDONLY | OFlags::CLOEXEC).map_err(|errno| {
        Error::new(
            Kind::System,
            errno,
            format!("the file cannot be opened again for reading: {errno}"),
            "give a descriptor that is open for reading only",
        )
        .caused_by(errno)
    })
}

pub(super) fn check_prot(prot: i32) -> Result<()> {
    if prot & mmap::PROT_WRITE == 0 {
        return Err(Error::new(
            Kind::NotReadWrite,
            Errno::ACCESS,
            "MAP_DIRECT needs PROT_WRITE",
            "ask for reading and writing; to read, use MapOptions::read_only",
        ));
    }
    Ok(())
}

pub(super) fn too_large() -> Error {
    Error::new(
        Kind::Arguments,
        Errno::NOMEM,
        "the range is larger than the address space",
        "map it in parts",
    )
}
