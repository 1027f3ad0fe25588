//! /proc/self/pagemap and /proc/kpageflags
//! (Documentation/admin-guide/mm/pagemap.rst): the kind of a mapped page.

use crate::mmap::{View, page_size};
use crate::{Errno, Result};
use rustix::fs::{Mode, OFlags};
use std::os::fd::OwnedFd;

/// Both files, opened. This needs `CAP_SYS_ADMIN`.
#[derive(Debug)]
pub struct PageFlags {
    pagemap: OwnedFd,
    kpageflags: OwnedFd,
}

impl PageFlags {
    /// Opens both files.
    ///
    /// # Errors
    ///
    /// `ENOENT` on kernels without them (`CONFIG_PROC_PAGE_MONITOR`),
    /// `EPERM`, `EACCES`.
    pub fn open() -> Result<Self> {
        let open = |path| {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty())
        };
        Ok(Self {
            pagemap: open("/proc/self/pagemap")?,
            kpageflags: open("/proc/kpageflags")?,
        })
    }

    /// Whether the page at `offset` of the file that `view` shows is alone in
    /// its folio. The page must be populated.
    ///
    /// # Errors
    ///
    /// `ENOENT` if the page is not mapped after all, `EPERM` if the kernel does
    /// not show which page it is.
    pub fn is_single(&self, view: &View, offset: u64) -> Result<bool> {
        // Bits of a pagemap entry and of page flags.
        const PRESENT: u64 = 1 << 63;
        const FRAME: u64 = (1 << 55) - 1;
        const COMPOUND: u64 = 1 << 15 | 1 << 16;
        let at = view.address_of(offset)? as u64 / page_size();
        let entry = read_number(&self.pagemap, at)?;
        if entry & PRESENT == 0 {
            return Err(Errno::NOENT);
        }
        let frame = entry & FRAME;
        if frame == 0 {
            return Err(Errno::PERM);
        }
        Ok(read_number(&self.kpageflags, frame)? & COMPOUND == 0)
    }
}

fn read_number(file: &OwnedFd, at: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    match rustix::io::pread(file, &mut bytes, at * 8)? {
        8 => Ok(u64::from_ne_bytes(bytes)),
        _ => Err(Errno::NOENT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_page_read_by_itself_is_single() {
        let file = tempfile::tempfile_in(".").unwrap();
        let page = page_size();
        file.set_len(4 * page).unwrap();
        file.sync_all().unwrap();
        let view = View::new(file.as_fd(), 0..4 * page).unwrap();
        let flags = match PageFlags::open() {
            Ok(flags) => flags,
            // Not as root.
            Err(errno) => return assert!(!rustix::process::geteuid().is_root(), "{errno}"),
        };
        assert_eq!(flags.is_single(&view, page), Err(Errno::NOENT));
        view.populate(page).unwrap();
        assert_eq!(flags.is_single(&view, page), Ok(true));
        assert_eq!(flags.is_single(&view, 4 * page), Err(Errno::INVAL));
    }
}
