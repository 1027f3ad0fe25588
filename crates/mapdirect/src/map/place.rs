//! Pinning a range and mapping it.

use super::segments;
use crate::descriptor::require_read_write;
use crate::error::{Error, Kind, Result};
use crate::establish::{Established, Scope, establish};
use crate::frozen::Frozen;
use crate::guard::Guard;
use crate::holder::Connection;
use crate::plan::Plan;
use mapdirect_proto::{BlockMap, Flags, WatchedPin};
use mapdirect_sys::{Errno, mmap};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// Everything about a mapping but the file and the range.
pub(crate) struct How {
    pub(crate) prot: i32,
    /// Flags of `mmap(2)` besides the type and `MAP_DIRECT`.
    pub(crate) flags: i32,
    pub(crate) address: usize,
    pub(crate) scope: Scope,
    pub(crate) cached: bool,
    pub(crate) patience: Duration,
    pub(crate) guard: Guard,
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
        check(self.prot, offset, length)?;
        require_read_write(file)?;
        let mut asked = Flags::MAP | Flags::SEGMENTS;
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
        } = establish(&self.guard, file, range, asked, self.patience)?;
        // MAP_SYNC has a meaning only where flags are validated.
        let kind = if self.flags & mmap::MAP_SYNC != 0 {
            mmap::MAP_SHARED_VALIDATE
        } else {
            mmap::MAP_SHARED
        };
        let flags = kind | self.flags;
        let plan = Plan::new(&map, offset, length as u64, mmap::page_size());
        let arguments = segments::Arguments {
            pinned: pinned.as_fd(),
            address: self.address,
            prot: self.prot,
            flags,
        };
        // SAFETY: the caller answers for MAP_FIXED.
        let mapped = unsafe { segments::map(&plan, arguments) };
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
        })
    }
}

/// What `mmap(2)` checks before it looks at the file.
fn check(prot: i32, offset: u64, length: usize) -> Result<()> {
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
    if prot & mmap::PROT_WRITE == 0 {
        return Err(Error::new(
            Kind::NotReadWrite,
            Errno::ACCESS,
            "MAP_DIRECT needs PROT_WRITE",
            "ask for reading and writing; to read, an ordinary mapping will do",
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
