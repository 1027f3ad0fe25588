//! Reading and writing the bytes of a mapping.

use super::DirectMap;
use crate::error::{Error, Kind, Result};
use crate::plan::{Access, Pages};
use mapdirect_sys::Errno;

impl DirectMap {
    /// Reads bytes, by atomic loads of aligned words: what others store
    /// meanwhile is seen or not, eight aligned bytes at a time.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the bytes are not all inside the mapping, `EFAULT` if some
    /// of them raise SIGBUS (shared blocks, bytes in pages beyond the end of
    /// the file); nothing is read then.
    pub fn read_at(&self, offset: usize, into: &mut [u8]) -> Result<()> {
        self.check_bounds("read", offset, into.len())?;
        self.check_access("read", offset, into.len(), Access::Load)?;
        self.memory.read(offset, into);
        Ok(())
    }

    /// Writes bytes, by atomic stores of aligned words.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the bytes are not all inside the mapping, `ETXTBSY` if some
    /// of them lie in frozen blocks, `EFAULT` for pages beyond the end of the
    /// file; nothing is written then.
    pub fn write_at(&self, offset: usize, from: &[u8]) -> Result<()> {
        self.check_bounds("write", offset, from.len())?;
        self.check_access("write", offset, from.len(), Access::Store)?;
        self.memory.write(offset, from);
        Ok(())
    }

    #[inline]
    pub(super) fn check_bounds(&self, what: &str, offset: usize, count: usize) -> Result<()> {
        if self.hold.is_revoked() {
            return Err(self.revoked(what));
        }
        if self.memory.contains(offset, count) {
            return Ok(());
        }
        Err(self.out_of_bounds(what, offset, count))
    }

    #[cold]
    pub(super) fn revoked(&self, what: &str) -> Error {
        let state = self.hold.state();
        Error::new(
            Kind::Breached,
            Errno::IO,
            format!("the mapping was revoked: {}", state.why()),
            "see what the file holds now, and map it again; DirectMap::integrity has the details",
        )
        .asking(what)
    }

    #[cold]
    fn out_of_bounds(&self, what: &str, offset: usize, count: usize) -> Error {
        Error::new(
            Kind::Arguments,
            Errno::INVAL,
            format!("the mapping ends at byte {}", self.len()),
            "stay inside the mapping",
        )
        .asking(format!("{what} {count} bytes at {offset}"))
    }

    /// A pointer would raise SIGBUS there; this says so.
    #[inline]
    pub(super) fn check_access(
        &self,
        what: &str,
        offset: usize,
        count: usize,
        access: Access,
    ) -> Result<()> {
        if self.plan.is_stable() {
            return Ok(());
        }
        self.check_segments(what, offset, count, access)
    }

    fn check_segments(
        &self,
        what: &str,
        offset: usize,
        count: usize,
        access: Access,
    ) -> Result<()> {
        let start = self.offset + offset as u64;
        // A child of fork(2) can do no more with what is frozen than fault.
        let asked = if self.hold.is_own() {
            access
        } else {
            Access::Store
        };
        let Some((at, pages)) = self.plan.obstacle(start..start + count as u64, asked) else {
            return Ok(());
        };
        let beyond = at >= self.map.file_size() && pages == Pages::Faulting;
        let state = self.map.find(at).map(|extent| extent.state);
        let error = if beyond {
            Error::new(
                Kind::Arguments,
                Errno::FAULT,
                format!(
                    "the file ended at byte {} when it was mapped",
                    self.map.file_size()
                ),
                "grow it, and map it again",
            )
        } else {
            let errno = match access {
                Access::Load => Errno::FAULT,
                Access::Store => Errno::TXTBSY,
            };
            let state = match (pages, state) {
                (Pages::Copied, _) | (_, None) => "frozen, with others in its page",
                (_, Some(state)) => state.name(),
            };
            Error::new(
                Kind::FrozenBlocks,
                errno,
                format!("byte {at} of the file lies in a block that is {state}"),
                "make it stable first: DirectMap::allocate, or prepare before mapping",
            )
        };
        Err(error.asking(format!("{what} {count} bytes at {offset}")))
    }
}
