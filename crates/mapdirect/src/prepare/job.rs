//! A preparation under way, and taking back what one that failed has done.

use super::contiguous::Before;
use super::plan::{self, Work};
use super::room::Scratch;
use super::{Prepared, Progress};
use crate::error::{Error, Kind, Result};
use crate::extents;
use mapdirect_model::{BlockMap, ExtentState, Filesystem};
use mapdirect_sys::fallocate::{self, Change};
use mapdirect_sys::fcntl::HeldLease;
use mapdirect_sys::madvise::Window;
use mapdirect_sys::{Errno, apart, capget, fsync, inode_flags, mmap, sync_file_range};
use std::cell::Cell;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// How often to begin again when others change the file meanwhile.
const REPEATS: u32 = 3;

/// Bytes allocated or unshared by one call: the steps of progress, and few
/// enough calls for a large range.
const ALLOCATION: u64 = 64 << 20;

/// Bytes made dirty before they are written back, while the same again is
/// being written: what a small machine can spare.
pub(super) const WINDOW: u64 = 32 << 20;

/// Bytes ext4 is asked for when they shall be aligned: of more it makes do
/// with some that lie together, aligned or not.
const EXT4_ALIGNED: u64 = 8 << 20;

/// A preparation under way.
pub(super) struct Job<'call> {
    pub(super) file: BorrowedFd<'call>,
    pub(super) filesystem: Filesystem,
    pub(super) block: u64,
    /// The range as asked for.
    pub(super) bytes: Range<u64>,
    /// The range rounded out to blocks.
    pub(super) rounded: Range<u64>,
    /// The size the file had.
    pub(super) old_size: u64,
    /// The size it shall have, at least.
    pub(super) size: u64,
    pub(super) huge: bool,
    pub(super) contiguous: bool,
    /// What there was before anything was done, if it shall be contiguous.
    pub(super) before: Option<Before>,
    pub(super) exclusive: bool,
    pub(super) dax: bool,
    /// How long one call may wait for others.
    pub(super) patience: Duration,
    /// One has waited for so long.
    pub(super) given_up: Cell<bool>,
    /// Blocks lay beyond the end of the file before anything was done.
    pub(super) beyond_the_end: bool,
    /// The file was made longer here.
    pub(super) grown: bool,
    /// Holes that blocks were asked for.
    pub(super) taken: Vec<Range<u64>>,
    pub(super) allocated: u64,
    pub(super) converted: u64,
    pub(super) unshared: u64,
    pub(super) done: u64,
    pub(super) total: u64,
    pub(super) progress: &'call mut dyn FnMut(Progress),
}

impl Job<'_> {
    pub(super) fn run(mut self) -> Result<Prepared> {
        match self.make_stable() {
            Ok(map) => Ok(Prepared {
                map,
                allocated: self.allocated,
                converted: self.converted,
                unshared: self.unshared,
                before: self.before,
            }),
            Err(error) => Err(match self.give_back() {
                Some(note) => error.noting(&note),
                None => error,
            }),
        }
    }

    fn make_stable(&mut self) -> Result<BlockMap> {
        let mut pass = 0;
        loop {
            let map = self.block_map()?;
            let work = Work::of(&map);
            if pass == 0 {
                self.check_space(work.space())?;
                self.before = self.contiguous.then(|| Before::read(self.file, &map));
                self.beyond_the_end = self.has_blocks_beyond_the_end();
            } else if map.file_size() < self.size {
                return Err(truncated(map.file_size()));
            }
            if work.is_none() && map.file_size() >= self.size {
                return Ok(map);
            }
            if pass > REPEATS {
                return Err(still_changing(&map));
            }
            self.total += work.bytes();
            self.tell(0);
            self.allocate(&work.holes)?;
            self.grow()?;
            let shared = self.unshare(&work.shared)?;
            if self.zero_by_device() {
                let rest = Work::of(&self.block_map()?);
                self.tell(work.bytes().saturating_sub(rest.bytes()));
                self.write(&rest, shared)?;
            } else {
                self.write(&work, shared)?;
            }
            self.converted += plan::total(&work.unwritten);
            pass += 1;
        }
    }

    /// What is dirty is written first: only then do its blocks show.
    fn block_map(&self) -> Result<BlockMap> {
        fsync::fsync(self.file).map_err(|errno| self.failed("fsync", errno))?;
        extents::read(self.file, self.rounded.clone())
            .map_err(|errno| Error::system("FIEMAP", errno))
    }

    fn has_blocks_beyond_the_end(&self) -> bool {
        let end = self.old_size.next_multiple_of(self.block);
        extents::read(self.file, end..i64::MAX.cast_unsigned()).map_or(true, |map| {
            map.total(ExtentState::Hole) != map.range().end - end
        })
    }

    fn tell(&mut self, bytes: u64) {
        self.done += bytes;
        (self.progress)(Progress {
            done: self.done,
            total: self.total,
            waiting: Duration::ZERO,
        });
    }

    /// Bytes the caller can still allocate on the filesystem.
    ///
    /// ext4 gives root, and who has `CAP_SYS_RESOURCE`, the blocks it sets
    /// aside for them as well (`ext4_has_free_clusters`). What would work is
    /// not refused here: what to set aside is for the filesystem to say. It
    /// keeps some for its own needs all the same, and does not tell how many.
    fn free_space(&self) -> Result<u64> {
        let stat =
            rustix::fs::fstatvfs(self.file).map_err(|errno| Error::system("fstatvfs", errno))?;
        let capable = || {
            capget::effective(0)
                .is_ok_and(|effective| capget::contains(effective, capget::CAP_SYS_RESOURCE))
        };
        let all = rustix::process::geteuid().is_root() || capable();
        let blocks = if all { stat.f_bfree } else { stat.f_bavail };
        Ok(blocks.saturating_mul(stat.f_frsize))
    }

    /// Refuses what cannot work before anything is touched.
    fn check_space(&self, needed: u64) -> Result<()> {
        let mut free = self.free_space()?;
        // XFS frees the blocks of deleted files by and by; being asked how
        // much is free makes it begin at once (`xfs_fs_statfs`).
        let mut looks = 20;
        while needed > free && looks > 0 && self.filesystem == Filesystem::Xfs {
            std::thread::sleep(Duration::from_millis(10));
            free = self.free_space()?;
            looks -= 1;
        }
        if needed <= free {
            return Ok(());
        }
        Err(Error::new(
            Kind::NoSpace,
            Errno::NOSPC,
            format!(
                "{} bytes of space are missing: it takes {needed}, and {free} are free",
                needed - free
            ),
            "free some space, or prepare less; nothing was changed",
        ))
    }

    /// Allocates holes. That some may be none any more by now does no harm.
    fn allocate(&mut self, holes: &[Range<u64>]) -> Result<()> {
        if self.huge && !holes.is_empty() {
            return match self.filesystem {
                Filesystem::Xfs => self.allocate_in_arranged_room(holes),
                _ => self.allocate_in_powers_of_two(holes),
            };
        }
        // Asked for a part, the filesystem may find a place that has no room for
        // the rest.
        let most = if self.contiguous {
            u64::MAX
        } else {
            ALLOCATION
        };
        for hole in holes {
            for piece in plan::pieces(hole, most) {
                self.allocate_piece(piece)?;
            }
        }
        Ok(())
    }

    /// The scratch file keeps a few blocks while the piece behind them is
    /// allocated, and never into the next one: it cannot be what is missing
    /// when there is no space.
    fn allocate_in_arranged_room(&mut self, holes: &[Range<u64>]) -> Result<()> {
        let scratch = Scratch::beside(self.file);
        for part in holes.iter().flat_map(plan::huge_first) {
            for mut rest in plan::pieces(&part, ALLOCATION) {
                while !rest.is_empty() {
                    let next = match &scratch {
                        Some(scratch) => scratch.make_room(self.file, rest.clone()),
                        None => rest.clone(),
                    };
                    rest.start = next.end;
                    self.allocate_piece(next)?;
                }
            }
        }
        Ok(())
    }

    /// ext4 looks for free blocks by powers of two, and finds those aligned.
    fn allocate_in_powers_of_two(&mut self, holes: &[Range<u64>]) -> Result<()> {
        for part in holes.iter().flat_map(plan::huge_first) {
            let pieces: Vec<_> = if part.start.is_multiple_of(plan::HUGE) {
                plan::powers_of_two(&part, EXT4_ALIGNED).collect()
            } else {
                vec![part]
            };
            for piece in pieces {
                self.allocate_piece(piece)?;
            }
        }
        Ok(())
    }

    fn allocate_piece(&mut self, piece: Range<u64>) -> Result<()> {
        // Noted first: a call that fails may have allocated a part.
        self.taken.push(piece.clone());
        self.change(Change::Allocate, &piece)
            .map_err(|errno| self.failed("fallocate", errno))?;
        self.allocated += piece.end - piece.start;
        Ok(())
    }

    /// Makes the file longer, now that there are blocks for it.
    fn grow(&mut self) -> Result<()> {
        // Once only: who truncates it then means it.
        if self.grown || self.size <= self.old_size {
            return Ok(());
        }
        self.grown = self.current_size()? < self.size;
        let last = self.size - 1..self.size;
        self.change(Change::AllocateAndGrow, &last)
            .map_err(|errno| self.failed("fallocate", errno))
    }

    /// Changes blocks of the file. On DAX the filesystem waits for whoever's
    /// I/O uses a page of it, and that may be anybody who can read the file:
    /// there this gives up in time (`ETIMEDOUT`).
    fn change(&mut self, change: Change, range: &Range<u64>) -> std::result::Result<(), Errno> {
        if !self.dax {
            return fallocate::change(self.file, change, range);
        }
        let (done, total) = (self.done, self.total);
        let progress = &mut *self.progress;
        let mut waiting = |waiting| {
            progress(Progress {
                done,
                total,
                waiting,
            });
        };
        let changed = apart::change(self.file, change, range, self.patience, &mut waiting);
        self.noted(changed)
    }

    /// The same without saying how long it waits.
    fn change_quietly(&self, change: Change, range: &Range<u64>) -> std::result::Result<(), Errno> {
        if !self.dax {
            return fallocate::change(self.file, change, range);
        }
        let changed = apart::change(self.file, change, range, self.patience, &mut |_| ());
        self.noted(changed)
    }

    fn noted(&self, changed: std::result::Result<(), Errno>) -> std::result::Result<(), Errno> {
        if changed == Err(Errno::TIMEDOUT) {
            self.given_up.set(true);
        }
        changed
    }

    fn current_size(&self) -> Result<u64> {
        let stat = rustix::fs::fstat(self.file).map_err(|errno| Error::system("fstat", errno))?;
        Ok(stat.st_size.cast_unsigned())
    }

    /// Gives shared runs blocks of their own; returns those that must get
    /// them by being written.
    fn unshare<'runs>(&mut self, shared: &'runs [Range<u64>]) -> Result<&'runs [Range<u64>]> {
        for run in shared {
            for piece in plan::pieces(run, ALLOCATION) {
                match self.change(Change::Unshare, &piece) {
                    Ok(()) => {}
                    Err(Errno::OPNOTSUPP) => return Ok(shared),
                    Err(errno) => return Err(self.failed("fallocate", errno)),
                }
                let length = piece.end - piece.start;
                self.unshared += length;
                self.tell(length);
            }
        }
        Ok(&[])
    }

    /// Has the device zero what nobody ever wrote to, where it can do that by
    /// itself: nothing is sent to it then. Whatever was stored there meanwhile
    /// would be lost, so it takes a lease and a caller who says that nobody
    /// uses the description at hand. It only saves time: the rest of the way
    /// finds out what is left to do. Says whether anything was done.
    fn zero_by_device(&self) -> bool {
        // The only filesystem that has it (Linux 6.17).
        if !self.exclusive || self.filesystem != Filesystem::Ext4 {
            return false;
        }
        let Some(lease) = HeldLease::take(self.file)
            .ok()
            .flatten()
            .and_then(|lease| unwatched(lease, self.file, self.bytes.start))
        else {
            return false;
        };
        // What has been stored shows once it is written.
        let Ok(map) = self.block_map() else {
            return false;
        };
        let mut done = false;
        let end = map.file_size() - map.file_size() % self.block;
        for extent in map
            .frozen()
            .filter(|extent| extent.state == ExtentState::Unwritten)
        {
            let run = extent.offset..extent.end().min(end);
            for piece in plan::pieces(&run, ALLOCATION) {
                // An open that comes now waits longer than this takes.
                if !lease.is_undisturbed()
                    || self.change_quietly(Change::WriteZeroes, &piece).is_err()
                {
                    return done;
                }
                done = true;
            }
        }
        done
    }

    /// Has everything that is not written yet written back, as it reads.
    fn write(&mut self, work: &Work, shared: &[Range<u64>]) -> Result<()> {
        let mut runs = [&work.to_write()[..], shared].concat();
        runs.sort_unstable_by_key(|run| run.start);
        let pieces: Vec<_> = runs
            .iter()
            .flat_map(|run| plan::pieces(run, WINDOW))
            .collect();
        let mut under_way: Option<Range<u64>> = None;
        for group in pieces.chunk_by(|one, next| one.start / WINDOW == next.start / WINDOW) {
            let ([first, ..], [.., last]) = (group, group) else {
                continue;
            };
            // From the first run to the last, and no more: beside them there
            // may be a pin that forbids a mapping.
            let start = first.start - first.start % mmap::page_size();
            let window = start..last.end;
            self.dirty(&window, group)?;
            self.write_back(sync_file_range::start, &window)?;
            // The next window gets dirty while the device is busy with this
            // one.
            if let Some(before) = under_way.replace(window) {
                self.write_back(sync_file_range::finish, &before)?;
            }
            self.tell(plan::total(group));
        }
        match under_way {
            Some(last) => self.write_back(sync_file_range::finish, &last),
            None => Ok(()),
        }
    }

    fn write_back(
        &self,
        call: fn(BorrowedFd<'_>, &Range<u64>) -> std::result::Result<(), Errno>,
        window: &Range<u64>,
    ) -> Result<()> {
        call(self.file, window).map_err(|errno| self.failed("sync_file_range", errno))
    }

    /// Makes the pages of some runs of a window dirty.
    fn dirty(&self, window: &Range<u64>, runs: &[Range<u64>]) -> Result<()> {
        // The last block may reach beyond the last page of the file, where
        // nothing can be dirty.
        let end = self.bytes.end.next_multiple_of(mmap::page_size());
        let window = window.start..window.end.min(end);
        let mapped = Window::new(self.file, window).map_err(|errno| self.failed("mmap", errno))?;
        for run in runs {
            match mapped.populate_write(run) {
                Ok(()) => {}
                Err(Errno::FAULT) => self.explain_fault(&mapped, run)?,
                Err(Errno::INVAL) => {
                    return Err(Error::new(
                        Kind::System,
                        Errno::OPNOTSUPP,
                        "this kernel cannot make pages dirty as they are (MADV_POPULATE_WRITE)",
                        "use Linux 5.14 or later",
                    ));
                }
                Err(errno) => return Err(self.failed("MADV_POPULATE_WRITE", errno)),
            }
        }
        Ok(())
    }

    /// A page that cannot be made dirty does not say why. Calls that do say
    /// are asked for the same: one for its blocks, one for its bytes.
    fn explain_fault(&self, mapped: &Window, run: &Range<u64>) -> Result<()> {
        self.check_end()?;
        self.change_quietly(Change::Allocate, run)
            .map_err(|errno| self.failed("fallocate", errno))?;
        match mapped.populate_write(run) {
            // It was a hole again, or there was no space for a moment.
            Ok(()) => return Ok(()),
            Err(Errno::FAULT) => {}
            Err(errno) => return Err(self.failed("MADV_POPULATE_WRITE", errno)),
        }
        self.check_end()?;
        let mut buffer = vec![0; 1 << 20];
        for piece in plan::pieces(run, 1 << 20) {
            rustix::io::pread(self.file, &mut buffer[..], piece.start).map_err(|errno| {
                Error::new(
                    Kind::System,
                    errno,
                    format!("the file cannot be read at {}: {errno}", piece.start),
                    "look into the system's log: its device may be failing",
                )
            })?;
        }
        // Then somebody is in the way, who has let go by now: the next pass
        // will see what is left to do.
        Ok(())
    }

    fn check_end(&self) -> Result<()> {
        let size = self.current_size()?;
        if size < self.bytes.end {
            Err(truncated(size))
        } else {
            Ok(())
        }
    }

    /// An error of a call that changes the file.
    fn failed(&self, call: &str, errno: Errno) -> Error {
        match errno {
            Errno::NOSPC => {
                let free = self.free_space().unwrap_or(0);
                let left = self.rounded_rest();
                // XFS has no errno of its own for this quota.
                let project = inode_flags::extended(self.file).map_or(0, |found| found.project);
                if project != 0 && free > left {
                    return Error::new(
                        Kind::NoSpace,
                        errno,
                        format!(
                            "the quota of project {project} is used up, or the filesystem keeps \
                             what is left for itself: {left} bytes have no block of their own \
                             yet, and {free} are free"
                        ),
                        "raise the quota (xfs_quota -x -c 'limit -p ...'), free some space, or \
                         prepare less",
                    );
                }
                Error::new(
                    Kind::NoSpace,
                    errno,
                    format!(
                        "the filesystem is full: {left} bytes have no block of their own yet; \
                         of the {free} that are free it keeps some for itself"
                    ),
                    "free some space, or prepare less",
                )
            }
            Errno::DQUOT => Error::new(
                Kind::NoSpace,
                errno,
                "the disk quota of the file's owner, group or project is used up",
                "free some space, raise the quota, or prepare less",
            ),
            Errno::TXTBSY => Error::new(
                Kind::FrozenBlocks,
                errno,
                format!(
                    "{call} was refused: a pin keeps blocks of the file as they are, or it is \
                     swap space"
                ),
                "prepare a file before it is pinned; `mapdirect show FILE` tells the pins",
            ),
            Errno::TIMEDOUT => Error::new(
                Kind::StillChanging,
                Errno::TXTBSY,
                format!(
                    "somebody's I/O uses pages of the file (a page of it in a pipe, or direct I/O \
                     by way of a mapping of it), and the filesystem changes no blocks before that \
                     is over: waited for {:.1} s",
                    self.patience.as_secs_f64()
                ),
                "end whoever reads or maps it so (lsof FILE names them), or ask with more patience",
            ),
            Errno::PERM => Error::new(
                Kind::System,
                errno,
                format!("{call} was refused: the file is immutable or append-only"),
                "chattr -i -a FILE",
            ),
            other => Error::system(call, other),
        }
    }

    /// Bytes of the range that have no block of their own now.
    fn rounded_rest(&self) -> u64 {
        extents::read(self.file, self.rounded.clone()).map_or(0, |map| Work::of(&map).space())
    }

    /// Undoes what a call that failed has done, as far as that cannot cost
    /// anybody a byte; tells what stays.
    ///
    /// Freeing blocks forgets what was stored there, and shortening the file
    /// what was stored beyond. Nothing the kernel has does either on condition
    /// that nobody stored anything. So it is done only while nobody can: under
    /// a lease, which keeps away whoever has not opened the file yet, and
    /// proves that nobody else has; and the caller must have said that nobody
    /// uses the description at hand.
    fn give_back(&self) -> Option<String> {
        if self.taken.is_empty() && !self.grown {
            return None;
        }
        let undone = if self.exclusive {
            self.undo()
        } else {
            Err(String::from(
                "giving it back could cost others what they have stored there (see \
                 PrepareOptions::exclusive)",
            ))
        };
        let allocated: u64 = self
            .taken
            .iter()
            .filter_map(|run| extents::read(self.file, run.clone()).ok())
            .map(|map| map.range().end - map.range().start - map.total(ExtentState::Hole))
            .sum();
        let longer = self.grown && self.current_size().is_ok_and(|size| size > self.old_size);
        let what = match (allocated, longer) {
            (0, false) if undone.is_ok() => {
                return Some(String::from("what was allocated is given back"));
            }
            (0, false) => return None,
            (0, true) => String::from("the file stays longer"),
            (bytes, false) => format!("{bytes} bytes stay allocated"),
            (bytes, true) => format!("the file stays longer, and {bytes} bytes allocated"),
        };
        let why = undone
            .err()
            .unwrap_or_else(|| String::from("they are written"));
        Some(format!("{what}: {why}"))
    }

    fn undo(&self) -> std::result::Result<(), String> {
        if self.given_up.get() {
            // To free blocks the filesystem would wait as long.
            return Err(String::from("somebody's I/O uses pages of the file"));
        }
        let system = |call: &'static str| move |errno: Errno| format!("{call} failed: {errno}");
        let lease = HeldLease::take(self.file)
            .map_err(system("F_SETLEASE"))?
            .ok_or("somebody else has the file open")?;
        let lease =
            unwatched(lease, self.file, self.bytes.start).ok_or("somebody watches the file")?;
        let undisturbed = || {
            lease
                .is_undisturbed()
                .then_some(())
                .ok_or("somebody is just opening the file")
        };
        // What others have stored is written now, and shows as that.
        fsync::fsync(self.file).map_err(system("fsync"))?;
        for run in self.still_unwritten().map_err(system("FIEMAP"))? {
            undisturbed()?;
            self.change_quietly(Change::Punch, &run)
                .map_err(system("fallocate"))?;
        }
        // ext4 punches nothing beyond the end of the file, but gives up what
        // lies there when the size is set.
        let end = self.old_size.next_multiple_of(self.block);
        let beyond = self.grown || self.taken.iter().any(|run| run.end > end);
        let ours = self.grown || !self.beyond_the_end;
        if beyond && ours && self.ends_as_left()? {
            undisturbed()?;
            rustix::fs::ftruncate(self.file, self.old_size).map_err(system("ftruncate"))?;
        }
        Ok(())
    }

    /// Runs that were holes, have blocks now, and that nobody wrote to.
    fn still_unwritten(&self) -> std::result::Result<Vec<Range<u64>>, Errno> {
        let mut runs = Vec::new();
        for taken in &self.taken {
            let map = extents::read(self.file, taken.clone())?;
            let unwritten = map
                .frozen()
                .filter(|extent| extent.state == ExtentState::Unwritten);
            runs.extend(unwritten.map(|extent| extent.offset..extent.end()));
        }
        Ok(runs)
    }

    /// Whether the file ends where it was found or left, with nothing but
    /// zeros behind its old end.
    fn ends_as_left(&self) -> std::result::Result<bool, String> {
        let size = self.current_size().map_err(|error| error.to_string())?;
        if size != self.old_size && !(self.grown && size == self.size) {
            return Ok(false);
        }
        let mut buffer = vec![0; 1 << 20];
        let mut at = self.old_size;
        while at < size {
            let read = rustix::io::pread(self.file, &mut buffer[..], at)
                .map_err(|errno| format!("reading it back failed: {errno}"))?;
            if read == 0 || buffer[..read].iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            at += read as u64;
        }
        Ok(true)
    }
}

/// The lease again, if nobody opens the file by being asked for permission
/// before it is touched (fanotify). The lease keeps him waiting, and he keeps
/// waiting whoever asks, until the kernel loses patience and ends the lease:
/// what was to be freed under it would be freed without. So another thread
/// touches the file first, in a way that changes nothing.
fn unwatched<'file>(
    lease: HeldLease<'file>,
    file: BorrowedFd<'file>,
    at: u64,
) -> Option<HeldLease<'file>> {
    std::thread::scope(|scope| {
        let touch = move || rustix::io::pread(file, &mut [0; 1][..], at);
        let touching = std::thread::Builder::new()
            .spawn_scoped(scope, touch)
            .ok()?;
        while !touching.is_finished() && lease.is_undisturbed() {
            std::thread::sleep(Duration::from_millis(1));
        }
        // If it is disturbed, dropping it here lets that thread go.
        lease.is_undisturbed().then_some(lease)
    })
}

fn still_changing(map: &BlockMap) -> Error {
    let first = map.frozen().next().map_or_else(String::new, |extent| {
        format!(
            ": {} bytes at {} are {} again",
            extent.length, extent.offset, extent.state
        )
    });
    Error::new(
        Kind::StillChanging,
        Errno::TXTBSY,
        format!("others keep changing the file{first}"),
        "stop who shares, punches or truncates it, then try again",
    )
}

fn truncated(size: u64) -> Error {
    Error::new(
        Kind::StillChanging,
        Errno::TXTBSY,
        format!("somebody truncated the file to {size} bytes meanwhile"),
        "stop who truncates it, then try again",
    )
}
