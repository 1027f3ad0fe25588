//! vmsplice(2): keeping pages of the page cache in place.
//!
//! A pipe that holds a page has a reference to it: the page stays in the page
//! cache, by itself and as it is, until the pipe is closed. Reclaim, dropped
//! caches and `POSIX_FADV_DONTNEED` pass it over (`mapping_evict_folio`,
//! mm/truncate.c, 6.1 to 7.2); truncation and direct writes do not.

use crate::mmap::{View, page_size};
use crate::{Errno, Result, last_errno};
use rustix::fs::{Mode, OFlags};
use rustix::pipe::PipeFlags;
use std::os::fd::{AsRawFd, OwnedFd};

/// Pages that stay in the page cache as long as this value lives.
#[derive(Debug)]
pub struct Held {
    /// Pipes that are never read.
    _pages: Vec<OwnedFd>,
}

impl Held {
    /// Holds the pages at `offsets` of the file that `view` shows; these pages
    /// must be populated. Each descriptor holds as many bytes as
    /// `/proc/sys/fs/pipe-max-size` permits without privilege. Larger pipes
    /// would take larger pieces of the kernel's memory.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a page outside of the view, `EFAULT` for one that cannot be
    /// read, `ENOMEM`, `EMFILE`, `ENFILE`. `EPERM` when the user may not have
    /// that many pages in pipes, for lack of `CAP_SYS_ADMIN`.
    pub fn new(view: &View, offsets: &[u64]) -> Result<Self> {
        let page = usize::try_from(page_size()).map_err(|_| Errno::INVAL)?;
        let most = most_bytes()?;
        let mut pages = Vec::new();
        let mut rest = offsets;
        while !rest.is_empty() {
            let (reader, writer) =
                rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
            let wanted = rest.len().saturating_mul(page).min(most.max(page));
            let size = rustix::pipe::fcntl_setpipe_size(&writer, wanted)?;
            let (now, later) = rest.split_at((size / page).clamp(1, rest.len()));
            fill(&writer, view, now, page)?;
            rest = later;
            pages.push(reader);
        }
        Ok(Self { _pages: pages })
    }
}

/// The number of pipes that are needed to hold this many pages.
#[must_use]
pub fn pipes_for(pages: usize) -> usize {
    let page = usize::try_from(page_size()).unwrap_or(usize::MAX);
    let most = most_bytes().unwrap_or(page).max(page) / page;
    pages.div_ceil(most)
}

/// The number of bytes that a pipe may hold without privilege.
fn most_bytes() -> Result<usize> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open("/proc/sys/fs/pipe-max-size", flags, Mode::empty())?;
    let mut text = [0; 32];
    let length = rustix::io::read(file, &mut text)?;
    std::str::from_utf8(&text[..length])
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .ok_or(Errno::PROTO)
}

/// Puts pages into a pipe, which must have room for them.
fn fill(pipe: &OwnedFd, view: &View, offsets: &[u64], page: usize) -> Result<()> {
    /// UIO_MAXIOV, include/uapi/linux/uio.h.
    const MOST_AT_ONCE: usize = 1024;
    for some in offsets.chunks(MOST_AT_ONCE) {
        let mut vectors = Vec::with_capacity(some.len());
        for offset in some {
            vectors.push(libc::iovec {
                iov_base: std::ptr::with_exposed_provenance_mut(view.address_of(*offset)?),
                iov_len: page,
            });
        }
        let mut done = 0;
        while done < vectors.len() {
            let rest = &vectors[done..];
            // SAFETY: the vectors name whole pages of the view, which lives
            // until the call returns; the kernel reads them only.
            let taken = unsafe {
                libc::vmsplice(
                    pipe.as_raw_fd(),
                    rest.as_ptr(),
                    rest.len(),
                    libc::SPLICE_F_NONBLOCK,
                )
            };
            match usize::try_from(taken) {
                // The kernel stops only between two pages.
                Ok(taken) if taken > 0 && taken.is_multiple_of(page) => done += taken / page,
                Ok(_) => return Err(Errno::NOMEM),
                Err(_) if last_errno() == Errno::INTR => {}
                Err(_) => return Err(last_errno()),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::Advice;
    use std::os::fd::AsFd;

    /// Pages of the file in the page cache, from the first on.
    fn cached(file: &std::fs::File, pages: usize) -> Vec<bool> {
        let page = usize::try_from(page_size()).unwrap();
        let length = pages * page;
        // SAFETY: no address is asked for.
        let address = unsafe {
            crate::mmap::map(
                0,
                length,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_fd(),
                0,
            )
        }
        .unwrap();
        let mut found = vec![0u8; pages];
        let start = std::ptr::with_exposed_provenance_mut(address);
        // SAFETY: writes a byte for each page, of which there are as many.
        let ret = unsafe { libc::mincore(start, length, found.as_mut_ptr()) };
        assert_eq!(ret, 0);
        // SAFETY: nothing refers to the mapping.
        unsafe { crate::mmap::unmap(address, length) }.unwrap();
        found.into_iter().map(|byte| byte & 1 != 0).collect()
    }

    #[test]
    fn more_than_one_pipe_can_hold() {
        let file = tempfile::tempfile_in(".").unwrap();
        let page = page_size();
        let count = 3 * most_bytes().unwrap() as u64 / 2 / page;
        file.set_len(page * count).unwrap();
        file.sync_all().unwrap();
        let view = View::new(file.as_fd(), 0..page * count).unwrap();
        let offsets: Vec<_> = (0..count).map(|at| at * page).collect();
        for offset in &offsets {
            view.populate(*offset).unwrap();
        }
        let held = Held::new(&view, &offsets).unwrap();
        drop(view);
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        let count = usize::try_from(count).unwrap();
        assert_eq!(cached(&file, count), vec![true; count]);
        drop(held);
    }

    #[test]
    fn what_is_held_stays_and_the_rest_goes() {
        // Not on tmpfs, which has nothing but its pages.
        let file = tempfile::tempfile_in(".").unwrap();
        let page = page_size();
        let pages = 64;
        file.set_len(page * pages).unwrap();
        file.sync_all().unwrap();
        let view = View::new(file.as_fd(), 0..page * pages).unwrap();
        let wanted = [3, 4, 40].map(|at| at * page);
        for at in 0..pages {
            view.populate(at * page).unwrap();
        }
        assert_eq!(view.populate(pages * page), Err(Errno::INVAL));
        let held = Held::new(&view, &wanted).unwrap();
        drop(view);
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        let count = usize::try_from(pages).unwrap();
        let kept = cached(&file, count);
        for (at, is_there) in kept.iter().enumerate() {
            assert_eq!(*is_there, [3, 4, 40].contains(&at), "page {at}");
        }
        drop(held);
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        assert_eq!(cached(&file, count), vec![false; count]);
    }
}
