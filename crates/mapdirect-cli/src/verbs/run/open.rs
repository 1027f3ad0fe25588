//! Opening files in a program's stead, where the program must get the guard's
//! own description from the start.
//!
//! The path is read from memory that the program may change at any time, and
//! names may change, too. That does no harm: what was opened here is what the
//! program gets, and it is opened with the rights of the program alone. So this
//! opens for programs that have the worker's own rights, root directory and
//! namespace, and lets all others open by themselves. Those are found when they
//! map the file.

use super::filter::Subject;
use super::target::Target;
use mapdirect_sys::seccomp::Call;
use mapdirect_sys::{Errno, proc};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, StatxFlags};
use std::ffi::{OsStr, OsString};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// `AT_FDCWD`.
const WORKING_DIRECTORY: i32 = -100;

/// A file that a program wants opened.
#[derive(Debug)]
pub(crate) struct Opening {
    directory: i32,
    path: OsString,
    pub(crate) flags: OFlags,
    mode: Mode,
    resolve: ResolveFlags,
}

/// What a path leads to.
#[derive(Debug)]
pub(crate) enum Leads {
    /// A regular file, by an `O_PATH` descriptor.
    To(OwnedFd),
    /// A file that does not exist yet, with this name in a directory.
    ToNew(OwnedFd, OsString),
    /// Something that nobody maps, or that the program shall find by itself.
    Elsewhere,
}

impl Opening {
    /// Reads what a program asks for.
    pub(crate) fn read(target: &Target, subject: Subject, call: &Call) -> Result<Self, Errno> {
        let [first, second, third, fourth, ..] = call.arguments;
        let here = u64::from(WORKING_DIRECTORY.cast_unsigned());
        let (directory, path, flags, mode, resolve) = match subject {
            Subject::Open => (here, first, second, third, 0),
            Subject::OpenAt2 => {
                let mut how = [0; 24];
                target.read(third, &mut how)?;
                let word = |at: usize| {
                    let mut bytes = [0; 8];
                    bytes.copy_from_slice(&how[at..at + 8]);
                    u64::from_ne_bytes(bytes)
                };
                (first, second, word(0), word(8), word(16))
            }
            _ => (first, second, third, fourth, 0),
        };
        let lower = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0);
        Ok(Self {
            directory: lower(directory).cast_signed(),
            path: target.text(path)?,
            flags: OFlags::from_bits_retain(lower(flags)),
            mode: Mode::from_bits_truncate(lower(mode)),
            resolve: ResolveFlags::from_bits_retain(resolve),
        })
    }

    /// Whether a file is opened so that has a name.
    pub(crate) fn is_of_file(&self) -> bool {
        let never = OFlags::PATH | OFlags::DIRECTORY | OFlags::TMPFILE;
        !self.flags.intersects(never)
    }

    /// For what it is opened: reading, writing or both.
    pub(crate) fn access(&self) -> OFlags {
        self.flags & OFlags::ACCMODE
    }

    /// Where the path begins.
    fn beginning(&self, target: &Target) -> Result<OwnedFd, Errno> {
        if self.directory == WORKING_DIRECTORY || self.path.as_bytes().starts_with(b"/") {
            let cwd = target.file("cwd");
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            return rustix::fs::open(cwd, flags, Mode::empty());
        }
        target.descriptor(self.directory)
    }

    /// Follows the path, without opening anything.
    pub(crate) fn follow(&self, target: &Target) -> Result<Leads, Errno> {
        let beginning = self.beginning(target)?;
        let look = |path: &OsStr, more| {
            let flags = OFlags::PATH | OFlags::CLOEXEC | more;
            // What such links lead to depends on who follows them.
            let resolve = self.resolve | ResolveFlags::NO_MAGICLINKS;
            rustix::fs::openat2(&beginning, path, flags, Mode::empty(), resolve)
        };
        match look(&self.path, self.flags & OFlags::NOFOLLOW) {
            Ok(file) => {
                let stat = rustix::fs::fstat(&file)?;
                let is_regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
                let fails = self.flags.contains(OFlags::CREATE | OFlags::EXCL);
                Ok(if is_regular && !fails {
                    Leads::To(file)
                } else {
                    Leads::Elsewhere
                })
            }
            Err(Errno::NOENT) if self.flags.contains(OFlags::CREATE) => {
                let path = Path::new(&self.path);
                let Some(name) = path.file_name() else {
                    return Ok(Leads::Elsewhere);
                };
                // A link that leads to nothing: the program makes what it
                // names.
                let link = rustix::fs::statat(&beginning, path, AtFlags::SYMLINK_NOFOLLOW);
                let parent = match path.parent() {
                    Some(parent) if !parent.as_os_str().is_empty() => parent,
                    _ => Path::new("."),
                };
                if link.is_ok() || self.path.as_bytes().ends_with(b"/") {
                    return Ok(Leads::Elsewhere);
                }
                let directory = look(parent.as_os_str(), OFlags::DIRECTORY)?;
                Ok(Leads::ToNew(directory, name.to_owned()))
            }
            Err(_) => Ok(Leads::Elsewhere),
        }
    }

    /// Opens a file that is there, as the program would. If it is pinned
    /// `announce` says to the guard that this thread will open the file, as a
    /// holder may.
    pub(crate) fn open(
        &self,
        file: BorrowedFd<'_>,
        is_pinned: bool,
        announce: impl Fn() -> Result<(), Errno>,
    ) -> Result<OwnedFd, Errno> {
        if is_pinned && self.access() != OFlags::RDONLY {
            // Without a guard nobody is in the way.
            let _ = announce();
        }
        let flags = self.flags & !(OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW);
        let mut left = 3;
        loop {
            match proc::reopen(file, flags) {
                Err(Errno::TXTBSY) if left > 0 => announce().map_err(|_| Errno::TXTBSY)?,
                opened => return opened,
            }
            left -= 1;
        }
    }

    /// Makes a file that was not there a moment ago, and opens it.
    pub(crate) fn make(
        &self,
        target: &Target,
        directory: BorrowedFd<'_>,
        name: &OsStr,
    ) -> Result<OwnedFd, Errno> {
        // This thread has a mask of its own.
        rustix::process::umask(target.rights()?.mask);
        let flags = self.flags | OFlags::EXCL | OFlags::CLOEXEC;
        rustix::fs::openat(directory, name, flags, self.mode)
    }
}

/// What decides over what a process may open, and what paths mean to it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Rights {
    /// The lines of `/proc/PID/status` about users, groups and capabilities.
    lines: Vec<String>,
    /// Its root directory: device, inode, mount.
    root: (u32, u32, u64, u64),
    mounts: PathBuf,
}

/// [`Rights`], and the mask for new files.
#[derive(Debug)]
pub(crate) struct RightsOf {
    pub(crate) rights: Rights,
    pub(crate) mask: Mode,
}

impl RightsOf {
    /// Reads them of a process or thread.
    pub(crate) fn read(tid: i32) -> Result<Self, Errno> {
        const DECIDE: [&str; 4] = ["Uid:", "Gid:", "Groups:", "CapEff:"];
        let status = proc::read_task_file(tid, "status")?;
        let field = |name: &str| status.lines().find(|line| line.starts_with(name));
        let mask = field("Umask:")
            .and_then(|line| u32::from_str_radix(line[6..].trim(), 8).ok())
            .ok_or(Errno::SRCH)?;
        let lines = DECIDE.iter().filter_map(|name| field(name));
        let statx = rustix::fs::statx(
            rustix::fs::CWD,
            format!("/proc/{tid}/root"),
            AtFlags::empty(),
            StatxFlags::INO | StatxFlags::MNT_ID,
        )?;
        let mounts = std::fs::read_link(format!("/proc/{tid}/ns/mnt"));
        Ok(Self {
            rights: Rights {
                lines: lines.map(str::to_owned).collect(),
                root: (
                    statx.stx_dev_major,
                    statx.stx_dev_minor,
                    statx.stx_ino,
                    statx.stx_mnt_id,
                ),
                mounts: mounts.map_err(|_| Errno::ACCESS)?,
            },
            mask: Mode::from_bits_truncate(mask),
        })
    }
}
