//! Preparing a range: every block allocated, written, and the file's own.
//!
//! There is no guard here, so all of it must be safe beside others who write
//! to the file at the same time. It never stores a byte:
//!
//! * holes are allocated by fallocate(2), shared blocks copied by
//!   `FALLOC_FL_UNSHARE_RANGE`; both leave every byte as it reads;
//! * unwritten blocks become written by writing back pages that were made
//!   dirty as they are (`MADV_POPULATE_WRITE`). Zeros written with pwrite(2)
//!   would take the place of what somebody stores at that moment;
//! * the file grows by fallocate(2), which never shortens it, as ftruncate(2)
//!   would if somebody else makes it longer still.
//!
//! Killed at any moment, it leaves the bytes as they were. What could cost
//! somebody a byte is giving blocks back when it fails: see
//! [`Job::give_back`].

mod contiguous;
mod job;
mod plan;
mod room;
#[cfg(test)]
mod tests;

use crate::descriptor::require_read_write;
use crate::error::{Error, Kind, Result};
use job::Job;
use mapdirect_model::{FileFacts, Obstacle, ObstacleKind};
use mapdirect_proto::BlockMap;
use mapdirect_sys::{Errno, fallocate, proc};
use rustix::process::{Resource, getrlimit};
use std::cell::Cell;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

pub use plan::HugePieces;

/// How long to wait for I/O of others if the caller does not say.
const PATIENCE: Duration = Duration::from_secs(10);

/// How far a call of [`PrepareOptions::prepare_with`] has got, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes that were made stable.
    pub done: u64,
    /// Bytes that were not when it began, and have come up since.
    pub total: u64,
    /// How long it has waited so far for somebody's I/O that uses pages of the
    /// file; zero while it gets on.
    pub waiting: Duration,
}

/// How to prepare a range of a file: allocate, initialise and unshare every
/// block of it, so that all of it can be pinned *and mapped*.
///
/// This needs no guard and no privilege. Every byte of the file reads as
/// before. Others may read and write the file meanwhile; what they do to
/// their blocks afterwards is theirs to do until the range is pinned.
///
/// # Examples
///
/// ```no_run
/// use mapdirect::PrepareOptions;
///
/// let file = std::fs::File::options().read(true).write(true).open("image")?;
/// let prepared = PrepareOptions::new().size(1 << 30).prepare(&file)?;
/// assert!(prepared.block_map().is_stable());
/// println!("{} bytes were holes", prepared.allocated());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
#[must_use = "options do nothing until `prepare` is called"]
pub struct PrepareOptions {
    range: Option<Range<u64>>,
    size: Option<u64>,
    huge: bool,
    contiguous: bool,
    exclusive: bool,
    patience: Option<Duration>,
}

impl PrepareOptions {
    /// The whole file, as it is.
    pub fn new() -> Self {
        Self::default()
    }

    /// Prepares this range of the file, in bytes. It is extended to whole
    /// filesystem blocks, and must end within the file, as long as that is or
    /// is made by [`size`](Self::size).
    pub fn range(mut self, range: Range<u64>) -> Self {
        self.range = Some(range);
        self
    }

    /// Makes the file this many bytes long first, if it is shorter. What is
    /// added reads as zeros; its last block is allocated even if the range ends
    /// before.
    pub fn size(mut self, size: u64) -> Self {
        self.size = Some(size);
        self
    }

    /// Tries to place what has to be allocated so that it can be mapped with huge
    /// pages: pieces of 2 MiB at multiples of 2 MiB, in the file and on
    /// the device. [`Prepared::huge_pieces`] tells what came of it. Blocks
    /// that are there already stay where they are.
    pub fn huge(mut self, huge: bool) -> Self {
        self.huge = huge;
        self
    }

    /// Tries to place what has to be allocated in one run on the device: each
    /// hole is asked for by one call, as a whole, so that the filesystem looks
    /// for a run of free blocks that takes it. [`Prepared::runs`] tells what came
    /// of it, and [`Prepared::why_not_contiguous`] why. Blocks that are there
    /// already stay where they are: nothing that can be done from outside the
    /// kernel moves them without a doubt while others may store to them. For one
    /// run prepare a new file, and copy the data to it.
    ///
    /// A run cannot be longer than what the filesystem keeps in one piece. XFS
    /// divides its device into allocation groups; ext4 has metadata at the
    /// beginning of some groups of 32,768 blocks (128 MiB with blocks of 4 KiB).
    /// A run may be described by several records (FIEMAP, `filefrag`): one of
    /// ext4 has at most 32,768 blocks, of unwritten ones 32,767, one of XFS
    /// 2,097,151. A [`BlockMap`] joins them.
    pub fn contiguous(mut self, contiguous: bool) -> Self {
        self.contiguous = contiguous;
        self
    }

    /// Says that nobody uses this open file description until `prepare` is
    /// done: no other thread, no process that inherited the descriptor or was
    /// passed it, no mapping made from it, no ring.
    ///
    /// Then unwritten blocks are zeroed by the device itself, where it can and
    /// Linux lets it (`FALLOC_FL_WRITE_ZEROES`, ext4 since 6.17), provided
    /// that a lease proves that nobody else has the file open either, which
    /// takes the file's owner or `CAP_LEASE`.
    ///
    /// If `prepare` fails, it gives back the blocks it allocated and the
    /// bytes it made the file longer by, with the same proof. Whoever opens it
    /// at that moment waits until that is done.
    /// Otherwise what was allocated stays allocated, since freeing it could
    /// take along what others have stored there by now; the error says so.
    pub fn exclusive(mut self, exclusive: bool) -> Self {
        self.exclusive = exclusive;
        self
    }

    /// How long to wait, at each step, for I/O of others that uses pages of the
    /// file; 10 seconds if nothing is said.
    ///
    /// With DAX a page of the file is the medium itself, and while somebody
    /// keeps one for I/O (in a pipe, or for direct I/O by way of a mapping) the
    /// filesystem changes no blocks of the file. Anybody who may read it can
    /// do that.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = Some(patience);
        self
    }

    /// Prepares the range.
    ///
    /// `file` must be open for reading and writing. Its modification time
    /// changes when there is something to do.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` where the file or its filesystem could not keep a pin,
    /// `EACCES` and `EBADF` for a descriptor that is not open for reading and
    /// writing, `EINVAL` for an empty range, one that ends beyond the file,
    /// or a size that is smaller than the file. `ENOSPC` or `EDQUOT` when
    /// there is too little space: if that is known beforehand nothing is
    /// touched. `ETXTBSY` when others keep changing the file, keep pages of it
    /// in use for longer than the [`patience`](Self::patience), or a pin
    /// forbids to. `EFBIG` beyond `RLIMIT_FSIZE` and what the filesystem
    /// takes, and what the calls answer otherwise (`EIO`, ...).
    pub fn prepare(&self, file: impl AsFd) -> Result<Prepared> {
        self.prepare_with(file, |_| ())
    }

    /// [`prepare`](Self::prepare), telling how far it has got after every
    /// step.
    ///
    /// # Errors
    ///
    /// As [`prepare`](Self::prepare).
    pub fn prepare_with(
        &self,
        file: impl AsFd,
        mut progress: impl FnMut(Progress),
    ) -> Result<Prepared> {
        let file = file.as_fd();
        self.begin(file, &mut progress)
            .and_then(Job::run)
            .map_err(|error| {
                let path = proc::shown_path_of(file);
                error.asking(match &self.range {
                    Some(range) if !range.is_empty() => {
                        format!("prepare bytes {} to {} of {path}", range.start, range.end)
                    }
                    _ => format!("prepare {path}"),
                })
            })
    }

    /// Checks everything that can be checked beforehand.
    fn begin<'call>(
        &self,
        file: BorrowedFd<'call>,
        progress: &'call mut dyn FnMut(Progress),
    ) -> Result<Job<'call>> {
        require_read_write(file)?;
        let read = || FileFacts::read(file).map_err(|errno| Error::system("statx", errno));
        let mut facts = read()?;
        let is_inline = |obstacle: &Obstacle| obstacle.kind == ObstacleKind::InlineData;
        if facts.obstacles().first().is_some_and(is_inline) {
            // ext4 moves the data of an inode into a block before it allocates
            // anything, and not a byte changes (`ext4_convert_inline_data`).
            fallocate::allocate(file, &(0..1))
                .map_err(|errno| Error::system("fallocate", errno))?;
            facts = read()?;
        }
        if let Some(obstacle) = facts.obstacles().into_iter().next() {
            let (text, mend) = (obstacle.text, obstacle.mend);
            let kind = Kind::of(obstacle.kind.into());
            return Err(Error::new(kind, obstacle.errno, text, mend));
        }
        let old_size = facts.size;
        let size = self.size.unwrap_or(old_size);
        check_size(old_size, size)?;
        let bytes = self.range.clone().unwrap_or(0..size);
        check_range(&bytes, size)?;
        // Unless a size was asked for, what is behind the range may go.
        let size = self.size.unwrap_or(bytes.end);
        let block = u64::from(facts.block_size.max(1));
        let rounded = bytes.start - bytes.start % block..bytes.end.next_multiple_of(block);
        Ok(Job {
            file,
            filesystem: facts.filesystem,
            block,
            bytes,
            rounded,
            old_size,
            size,
            huge: self.huge,
            contiguous: self.contiguous,
            before: None,
            exclusive: self.exclusive,
            dax: facts.dax,
            patience: self.patience.unwrap_or(PATIENCE),
            given_up: Cell::new(false),
            beyond_the_end: true,
            grown: false,
            taken: Vec::new(),
            allocated: 0,
            converted: 0,
            unshared: 0,
            done: 0,
            total: 0,
            progress,
        })
    }
}

fn check_size(old: u64, size: u64) -> Result<()> {
    if size < old {
        return Err(Error::new(
            Kind::Arguments,
            Errno::INVAL,
            format!("the file has {old} bytes, and prepare never shrinks a file"),
            "give a size that is no smaller, or truncate it first",
        ));
    }
    if size > i64::MAX.cast_unsigned() {
        return Err(Error::new(
            Kind::Arguments,
            Errno::FBIG,
            "no file can be that large",
            "give a smaller size",
        ));
    }
    // The kernel would answer with a signal that ends the process.
    match getrlimit(Resource::Fsize).current {
        Some(limit) if size > old && size > limit => Err(Error::new(
            Kind::Limit,
            Errno::FBIG,
            format!("this process may make no file larger than {limit} bytes (RLIMIT_FSIZE)"),
            "raise the limit (ulimit -f)",
        )),
        _ => Ok(()),
    }
}

fn check_range(bytes: &Range<u64>, size: u64) -> Result<()> {
    if bytes.is_empty() {
        return Err(Error::new(
            Kind::Arguments,
            Errno::INVAL,
            if size == 0 {
                String::from("the file is empty")
            } else if bytes.start >= size {
                format!(
                    "the range begins at byte {}, and the file ends at byte {size}",
                    bytes.start
                )
            } else {
                String::from("the range is empty")
            },
            "give a range of at least one byte, or a size to make the file longer",
        ));
    }
    if bytes.end > size {
        return Err(Error::new(
            Kind::Arguments,
            Errno::INVAL,
            format!(
                "the range ends at byte {}, beyond the end of the file at {size}",
                bytes.end
            ),
            "give a size to make the file longer",
        ));
    }
    Ok(())
}

/// Allocates, initialises and unshares every block of a range of `file`, in
/// bytes, so that it can be mapped; short for [`PrepareOptions::prepare`].
///
/// # Errors
///
/// As [`PrepareOptions::prepare`].
///
/// # Examples
///
/// ```no_run
/// let file = std::fs::File::options().read(true).write(true).open("image")?;
/// mapdirect::prepare(&file, 0..1 << 20)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn prepare(file: impl AsFd, range: Range<u64>) -> Result<Prepared> {
    PrepareOptions::new().range(range).prepare(file)
}

/// Prepares what is in the file of a range that is about to be pinned.
pub(crate) fn before_pin(file: BorrowedFd<'_>, range: Option<&Range<u64>>) -> Result<()> {
    let stat = rustix::fs::fstat(file).map_err(|errno| Error::system("fstat", errno))?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let range = match range {
        Some(range) => range.start..range.end.min(size),
        None => 0..size,
    };
    if range.is_empty() {
        // Beyond the end of the file there is nothing to prepare.
        return Ok(());
    }
    prepare(file, range).map(drop)
}

/// What [`PrepareOptions::prepare`] did to a range, and what it is like now.
#[derive(Clone, Debug)]
pub struct Prepared {
    map: BlockMap,
    allocated: u64,
    converted: u64,
    unshared: u64,
    before: Option<contiguous::Before>,
}

impl Prepared {
    /// The block map of the range, extended to whole filesystem blocks. All of
    /// it is stable, until somebody changes it.
    #[must_use]
    pub fn block_map(&self) -> &BlockMap {
        &self.map
    }

    /// Bytes of holes that were allocated, and written.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.allocated
    }

    /// Bytes that were allocated but unwritten, and are written now.
    #[must_use]
    pub fn converted(&self) -> u64 {
        self.converted
    }

    /// Bytes that were shared, and have blocks of their own now.
    #[must_use]
    pub fn unshared(&self) -> u64 {
        self.unshared
    }

    /// How many runs of blocks on the device the range consists of; 1 if it is
    /// contiguous.
    #[must_use]
    pub fn runs(&self) -> u64 {
        contiguous::runs(&self.map)
    }

    /// Why the range is not contiguous, if [`PrepareOptions::contiguous`] was
    /// asked for, and it is not.
    #[must_use]
    pub fn why_not_contiguous(&self) -> Option<String> {
        self.before.as_ref()?.why(&self.map)
    }

    /// How many pieces of 2 MiB the range has, and how many of them a huge
    /// page could map.
    #[must_use]
    pub fn huge_pieces(&self) -> HugePieces {
        HugePieces::of(&self.map)
    }
}
