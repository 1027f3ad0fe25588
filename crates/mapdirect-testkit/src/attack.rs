//! The corpus: operations that read, write or reshape a file, made by real
//! system calls.
//!
//! An attack works on a range of blocks of a target, through a door: one of
//! the ways there are to get at a file. It succeeds or fails with an errno,
//! wherever that came from, the opening or the operation.

mod blocks;
mod calls;

use crate::disk::Kind;
use crate::raw::{self, PlainMap, Result, Uring};
use blocks::*;
pub use blocks::{clone_range, dedupe};
use calls::*;
use mapdirect_sys::Errno;
use rustix::fs::{AtFlags, Mode, OFlags};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Rows of the contract (section 4) that attacks belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Row {
    /// Reads and looks.
    Read,
    /// Writes of all kinds.
    Write,
    /// Makes the file end where the range begins.
    Truncate,
    /// Makes the file empty by opening it.
    TruncateByOpen,
    /// Makes the file longer.
    Grow,
    /// Allocates.
    Allocate,
    /// Punches, zeroes, unshares, removes.
    Deallocate,
    /// Collapses or inserts at the start of the range.
    Shift,
    /// Clones or dedupes into or from the range.
    Reflink,
    /// Copies from the range where the filesystem would share blocks.
    CopyFrom,
    /// Writes untorn.
    Untorn,
    /// Exchanges or moves extents.
    Exchange,
    /// Maps the range shared and writable.
    MapWrite,
    /// Names, owners, times, fsync.
    Metadata,
}

/// What an attack needs of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Open for reading.
    Read,
    /// Open for reading and writing.
    Write,
    /// The path alone.
    Path,
}

/// Where an attack can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Where {
    /// On every filesystem.
    Everywhere,
    /// Where files can share blocks.
    Reflink,
    /// On XFS.
    Xfs,
    /// On ext4.
    Ext4,
}

impl Where {
    /// Whether a filesystem of this kind is meant.
    #[must_use]
    pub fn includes(self, kind: Kind) -> bool {
        match self {
            Self::Everywhere => true,
            Self::Reflink => kind.reflink(),
            Self::Xfs => kind.is_xfs(),
            Self::Ext4 => !kind.is_xfs(),
        }
    }
}

/// Ways to get at a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Door {
    /// `open(2)` of its path.
    Path,
    /// Its path in a bind mount.
    BindMount,
    /// `/proc/self/fd` of a descriptor opened for reading.
    ProcSelfFd,
    /// `open_by_handle_at(2)`.
    Handle,
    /// `openat2(2)`.
    Openat2,
    /// io_uring, by the submitting thread.
    Uring,
    /// io_uring, by a worker.
    UringWorker,
    /// An i386 system call.
    Compat,
}

impl Door {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Path,
        Self::BindMount,
        Self::ProcSelfFd,
        Self::Handle,
        Self::Openat2,
        Self::Uring,
        Self::UringWorker,
        Self::Compat,
    ];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Path => "path",
            Self::BindMount => "bind-mount",
            Self::ProcSelfFd => "proc-self-fd",
            Self::Handle => "handle",
            Self::Openat2 => "openat2",
            Self::Uring => "io_uring",
            Self::UringWorker => "io_uring-worker",
            Self::Compat => "i386",
        }
    }

    /// The door of a name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|door| door.name() == name)
    }

    /// Opens `path` with `flags`.
    pub fn open(self, path: &Path, flags: i32) -> Result<OwnedFd> {
        let plain = |path: &Path| {
            let flags = OFlags::from_bits_retain(flags.cast_unsigned()) | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty())
        };
        match self {
            Self::Path | Self::BindMount => plain(path),
            Self::ProcSelfFd => {
                let first = rustix::fs::open(path, OFlags::RDONLY, Mode::empty())?;
                let link = format!("/proc/self/fd/{}", first.as_raw_fd());
                plain(Path::new(&link))
            }
            Self::Handle => {
                let parent = path.parent().unwrap_or(Path::new("/"));
                let mount = rustix::fs::open(parent, OFlags::RDONLY, Mode::empty())?;
                raw::open_by_handle(path, mount.as_fd(), flags)
            }
            Self::Openat2 => raw::openat2(path, flags),
            Self::Uring => raw::uring_open(Uring::Inline, path, flags),
            Self::UringWorker => raw::uring_open(Uring::Worker, path, flags),
            #[cfg(target_arch = "x86_64")]
            Self::Compat => raw::compat::open(path, flags),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Compat => Err(Errno::NOSYS),
        }
    }
}

/// What an attack works on.
#[derive(Debug)]
pub struct Target {
    /// The file.
    pub path: PathBuf,
    /// First byte of the range.
    pub offset: u64,
    /// Length of the range in bytes.
    pub length: u64,
    /// Block size of the filesystem in bytes.
    pub block: u64,
    /// Another file of the same filesystem, written, at least as long as the
    /// range ends.
    pub other: PathBuf,
    /// How the file is opened.
    pub door: Door,
    /// A descriptor opened earlier, used instead of opening.
    pub file: Option<OwnedFd>,
}

impl Target {
    fn with<T>(&self, flags: i32, run: impl FnOnce(BorrowedFd<'_>) -> Result<T>) -> Result<T> {
        match &self.file {
            Some(file) => run(file.as_fd()),
            None => run(self.door.open(&self.path, flags)?.as_fd()),
        }
    }

    fn read<T>(&self, run: impl FnOnce(BorrowedFd<'_>) -> Result<T>) -> Result<T> {
        self.with(libc::O_RDONLY, run)
    }

    fn write<T>(&self, run: impl FnOnce(BorrowedFd<'_>) -> Result<T>) -> Result<T> {
        self.with(libc::O_RDWR, run)
    }

    /// Bytes to write: as many as the range has, aligned for direct I/O.
    fn bytes(&self) -> Aligned {
        Aligned::new(self.length)
    }

    fn other(&self) -> Result<OwnedFd> {
        rustix::fs::open(&self.other, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
    }

    fn length(&self) -> usize {
        usize::try_from(self.length).unwrap_or(usize::MAX)
    }
}

/// A buffer that direct I/O takes.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    fn new(length: u64) -> Self {
        const ALIGN: usize = 4096;
        let length = usize::try_from(length).unwrap_or(0);
        let memory = vec![0xa5; length + ALIGN];
        let start = memory.as_ptr().align_offset(ALIGN);
        Self {
            memory,
            start,
            length,
        }
    }

    fn as_slice(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }
}

/// One operation.
#[derive(Clone, Copy, Debug)]
pub struct Attack {
    /// Its name, unique.
    pub name: &'static str,
    /// The row it belongs to.
    pub row: Row,
    /// What it needs of a descriptor.
    pub needs: Needs,
    /// Where it can be made.
    pub place: Where,
    /// The fanotify gate sees exactly what it reaches; otherwise it may
    /// refuse more.
    pub precise: bool,
    /// Kernels and devices may lack it.
    pub optional: bool,
    /// Makes it.
    pub run: fn(&Target) -> Result<()>,
}

impl Attack {
    /// The attack of a name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<&'static Self> {
        CORPUS.iter().find(|attack| attack.name == name)
    }
}

const fn attack(
    name: &'static str,
    row: Row,
    needs: Needs,
    place: Where,
    run: fn(&Target) -> Result<()>,
) -> Attack {
    Attack {
        name,
        row,
        needs,
        place,
        precise: true,
        optional: false,
        run,
    }
}

const fn vague(attack: Attack) -> Attack {
    Attack {
        precise: false,
        ..attack
    }
}

const fn optional(attack: Attack) -> Attack {
    Attack {
        optional: true,
        ..attack
    }
}

const KEEP_SIZE: i32 = 0x01;
const PUNCH_HOLE: i32 = 0x02;
const COLLAPSE_RANGE: i32 = 0x08;
const ZERO_RANGE: i32 = 0x10;
const INSERT_RANGE: i32 = 0x20;
const UNSHARE_RANGE: i32 = 0x40;
const WRITE_ZEROES: i32 = 0x80;
const RWF_APPEND: i32 = 0x10;
const RWF_ATOMIC: i32 = 0x40;
const MADV_REMOVE: i32 = 9;
const BOTH: i32 = libc::PROT_READ | libc::PROT_WRITE;
const SHARED: i32 = libc::MAP_SHARED;

/// Everything there is.
pub const CORPUS: &[Attack] = {
    use Needs::{Path as P, Read as R, Write as W};
    use Where::{Everywhere as E, Ext4, Reflink, Xfs};
    &[
        // Reads and looks.
        attack("read", Row::Read, R, E, read),
        attack("pread", Row::Read, R, E, pread),
        attack("preadv2", Row::Read, R, E, preadv2),
        attack("mmap-read", Row::Read, R, E, mmap_read),
        attack("mmap-private", Row::Read, R, E, mmap_private),
        attack("sendfile-from", Row::Read, R, E, sendfile_from),
        attack("splice-from", Row::Read, R, E, splice_from),
        attack("readahead", Row::Read, R, E, readahead),
        attack("seek-hole", Row::Read, R, E, seek_hole),
        attack("fiemap", Row::Read, R, E, fiemap),
        attack("io_uring-read", Row::Read, R, E, |t| {
            t.read(|f| raw::uring_read(Uring::Inline, f, &mut vec![0; t.length()], t.offset))
                .map(drop)
        }),
        attack("io_uring-worker-read", Row::Read, R, E, |t| {
            t.read(|f| raw::uring_read(Uring::Worker, f, &mut vec![0; t.length()], t.offset))
                .map(drop)
        }),
        attack("io_uring-sqpoll-read", Row::Read, R, E, |t| {
            t.read(|f| raw::uring_read(Uring::Polled, f, &mut vec![0; t.length()], t.offset))
                .map(drop)
        }),
        optional(attack("i386-pread", Row::Read, R, E, compat_pread)),
        // Writes.
        attack("write", Row::Write, W, E, write),
        attack("pwrite", Row::Write, W, E, pwrite),
        attack("pwrite-direct", Row::Write, W, E, pwrite_direct),
        attack("pwritev2", Row::Write, W, E, |t| {
            t.write(|f| raw::pwritev2(f, t.bytes().as_slice(), t.offset, 0))
                .map(drop)
        }),
        attack("append", Row::Grow, W, E, append),
        attack("pwritev2-append", Row::Grow, W, E, |t| {
            t.write(|f| raw::pwritev2(f, t.bytes().as_slice(), t.offset, RWF_APPEND))
                .map(drop)
        }),
        vague(attack("sendfile-into", Row::Write, W, E, sendfile_into)),
        vague(attack("splice-into", Row::Write, W, E, splice_into)),
        vague(attack("copy_file_range-into", Row::Write, W, E, copy_into)),
        vague(attack("aio-write", Row::Write, W, E, |t| {
            t.write(|f| raw::aio_write(f, t.bytes().as_slice(), t.offset, 0))
                .map(drop)
        })),
        vague(attack("io_uring-write", Row::Write, W, E, |t| {
            t.write(|f| raw::uring_write(Uring::Inline, f, t.bytes().as_slice(), t.offset, 0))
                .map(drop)
        })),
        vague(attack("io_uring-worker-write", Row::Write, W, E, |t| {
            t.write(|f| raw::uring_write(Uring::Worker, f, t.bytes().as_slice(), t.offset, 0))
                .map(drop)
        })),
        vague(attack("io_uring-sqpoll-write", Row::Write, W, E, |t| {
            t.write(|f| raw::uring_write(Uring::Polled, f, t.bytes().as_slice(), t.offset, 0))
                .map(drop)
        })),
        optional(vague(attack(
            "i386-pwrite",
            Row::Write,
            W,
            E,
            compat_pwrite,
        ))),
        attack("mmap-store", Row::MapWrite, W, E, mmap_store),
        vague(attack(
            "mmap-then-mprotect",
            Row::MapWrite,
            W,
            E,
            mmap_protect,
        )),
        // Sizes.
        attack("truncate", Row::Truncate, P, E, |t| {
            truncate(&t.path, t.offset)
        }),
        attack("truncate-inside-a-page", Row::Truncate, P, E, |t| {
            // Loses bytes of the block before, if the range begins a block.
            truncate(&t.path, t.offset.saturating_sub(1))
        }),
        attack("ftruncate", Row::Truncate, W, E, |t| {
            t.write(|f| rustix::fs::ftruncate(f, t.offset))
        }),
        optional(vague(attack(
            "io_uring-ftruncate",
            Row::Truncate,
            W,
            E,
            |t| t.write(|f| raw::uring_ftruncate(f, t.offset)).map(drop),
        ))),
        optional(vague(attack(
            "i386-ftruncate",
            Row::Truncate,
            W,
            E,
            compat_ftruncate,
        ))),
        optional(vague(attack(
            "i386-truncate",
            Row::Truncate,
            P,
            E,
            compat_truncate,
        ))),
        attack("truncate-up", Row::Grow, P, E, |t| {
            truncate(&t.path, 1 << 30)
        }),
        attack("ftruncate-up", Row::Grow, W, E, |t| {
            t.write(|f| rustix::fs::ftruncate(f, 1 << 30))
        }),
        attack("open-trunc", Row::TruncateByOpen, P, E, |t| {
            t.door.open(&t.path, libc::O_RDWR | libc::O_TRUNC).map(drop)
        }),
        attack("open-rdonly-trunc", Row::TruncateByOpen, P, E, |t| {
            t.door
                .open(&t.path, libc::O_RDONLY | libc::O_TRUNC)
                .map(drop)
        }),
        attack("creat", Row::TruncateByOpen, P, E, |t| {
            raw::creat(&t.path).map(drop)
        }),
        // Space.
        attack("fallocate", Row::Allocate, W, E, |t| space(t, 0)),
        attack("fallocate-keep-size", Row::Allocate, W, E, |t| {
            space(t, KEEP_SIZE)
        }),
        vague(attack("io_uring-fallocate", Row::Allocate, W, E, |t| {
            t.write(|f| raw::uring_fallocate(f, 0, t.offset, t.length))
                .map(drop)
        })),
        vague(attack("xfs-resvsp", Row::Allocate, W, Xfs, |t| {
            t.write(|f| xfs_space(f, XFS_IOC_RESVSP64, t))
        })),
        attack("punch-hole", Row::Deallocate, W, E, |t| {
            space(t, PUNCH_HOLE | KEEP_SIZE)
        }),
        attack("zero-range", Row::Deallocate, W, E, |t| {
            space(t, ZERO_RANGE)
        }),
        attack("zero-range-keep-size", Row::Deallocate, W, E, |t| {
            space(t, ZERO_RANGE | KEEP_SIZE)
        }),
        optional(attack("write-zeroes", Row::Deallocate, W, E, |t| {
            space(t, WRITE_ZEROES)
        })),
        attack("unshare-range", Row::Deallocate, W, Reflink, |t| {
            space(t, UNSHARE_RANGE)
        }),
        attack("madvise-remove", Row::Deallocate, W, E, madvise_remove),
        vague(attack("io_uring-punch", Row::Deallocate, W, E, |t| {
            t.write(|f| raw::uring_fallocate(f, PUNCH_HOLE | KEEP_SIZE, t.offset, t.length))
                .map(drop)
        })),
        optional(vague(attack(
            "i386-punch",
            Row::Deallocate,
            W,
            E,
            compat_punch,
        ))),
        vague(attack("xfs-unresvsp", Row::Deallocate, W, Xfs, |t| {
            t.write(|f| xfs_space(f, XFS_IOC_UNRESVSP64, t))
        })),
        vague(attack("xfs-zero-range", Row::Deallocate, W, Xfs, |t| {
            t.write(|f| xfs_space(f, XFS_IOC_ZERO_RANGE, t))
        })),
        attack("collapse-range", Row::Shift, W, E, |t| {
            space(t, COLLAPSE_RANGE)
        }),
        attack("insert-range", Row::Shift, W, E, |t| space(t, INSERT_RANGE)),
        // Sharing.
        attack("ficlone-from", Row::Reflink, R, Reflink, |t| {
            t.read(|f| clone_range(t.other()?.as_fd(), f, 0, 0, 0))
        }),
        attack("ficlone-into", Row::Reflink, W, Reflink, |t| {
            t.write(|f| clone_range(f, t.other()?.as_fd(), 0, 0, 0))
        }),
        attack("ficlonerange-from", Row::Reflink, R, Reflink, |t| {
            t.read(|f| clone_range(t.other()?.as_fd(), f, t.offset, t.length, 0))
        }),
        attack("ficlonerange-into", Row::Reflink, W, Reflink, |t| {
            t.write(|f| clone_range(f, t.other()?.as_fd(), 0, t.length, t.offset))
        }),
        attack("fideduperange-from", Row::Reflink, R, Reflink, dedupe_from),
        attack("fideduperange-into", Row::Reflink, R, Reflink, dedupe_into),
        attack("copy_file_range-from", Row::CopyFrom, R, E, copy_from),
        // Untorn writes.
        optional(attack("pwritev2-atomic", Row::Untorn, W, Xfs, |t| {
            untorn(t, |f, bytes| {
                raw::pwritev2(f, bytes, t.offset, RWF_ATOMIC).map(drop)
            })
        })),
        optional(attack("aio-atomic", Row::Untorn, W, Xfs, |t| {
            untorn(t, |f, bytes| {
                raw::aio_write(f, bytes, t.offset, RWF_ATOMIC).map(drop)
            })
        })),
        optional(attack("io_uring-atomic", Row::Untorn, W, Xfs, |t| {
            untorn(t, |f, bytes| {
                raw::uring_write(Uring::Inline, f, bytes, t.offset, RWF_ATOMIC).map(drop)
            })
        })),
        // Moving.
        attack("xfs-swapext", Row::Exchange, W, Xfs, xfs_swapext),
        optional(attack(
            "xfs-exchange-range",
            Row::Exchange,
            W,
            Xfs,
            xfs_exchange,
        )),
        attack("ext4-move-extent", Row::Exchange, W, Ext4, ext4_move),
        attack(
            "ext4-move-extent-donor",
            Row::Exchange,
            W,
            Ext4,
            ext4_move_donor,
        ),
        attack("ext4-swap-boot", Row::Exchange, W, Ext4, |t| {
            t.write(|f| raw::ioctl_value(f, EXT4_IOC_SWAP_BOOT, 0).map(drop))
        }),
        // Names and the rest.
        attack("rename", Row::Metadata, P, E, rename_and_back),
        attack("link-unlink", Row::Metadata, P, E, link_unlink),
        attack("chmod", Row::Metadata, P, E, |t| {
            rustix::fs::chmod(&t.path, Mode::from_raw_mode(0o640))
        }),
        attack("chown", Row::Metadata, P, E, |t| {
            let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
            rustix::fs::chown(&t.path, Some(uid), Some(gid))
        }),
        attack("utimes", Row::Metadata, P, E, utimes),
        attack("setxattr", Row::Metadata, P, E, |t| {
            let flags = rustix::fs::XattrFlags::empty();
            rustix::fs::setxattr(&t.path, c"user.mapdirect", b"x", flags)
        }),
        attack("fsync", Row::Metadata, R, E, |t| {
            t.read(|f| rustix::fs::fsync(f))
        }),
        attack("fitrim", Row::Metadata, R, E, fitrim),
    ]
};

fn rename_and_back(t: &Target) -> Result<()> {
    let aside = t.path.with_extension("aside");
    rustix::fs::rename(&t.path, &aside)?;
    rustix::fs::rename(&aside, &t.path)
}

fn link_unlink(t: &Target) -> Result<()> {
    let aside = t.path.with_extension("link");
    rustix::fs::link(&t.path, &aside)?;
    rustix::fs::unlink(&aside)
}

fn utimes(t: &Target) -> Result<()> {
    let now = rustix::fs::Timespec {
        tv_sec: 0,
        tv_nsec: rustix::fs::UTIME_NOW,
    };
    let times = rustix::fs::Timestamps {
        last_access: now,
        last_modification: now,
    };
    rustix::fs::utimensat(rustix::fs::CWD, &t.path, &times, AtFlags::empty())
}

fn fitrim(t: &Target) -> Result<()> {
    const FITRIM: u64 = 0xc018_5879;
    let root = t.path.parent().unwrap_or(Path::new("/"));
    let root = rustix::fs::open(root, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut range = [0u64, u64::MAX, 0];
    raw::ioctl(root.as_fd(), FITRIM, &mut range).map(drop)
}

#[cfg(target_arch = "x86_64")]
mod compat {
    use super::*;

    pub(super) fn pread(t: &Target) -> Result<()> {
        t.read(|f| raw::compat::pread(f, t.length(), t.offset))
            .map(drop)
    }

    pub(super) fn pwrite(t: &Target) -> Result<()> {
        t.write(|f| raw::compat::pwrite(f, t.bytes().as_slice(), t.offset))
            .map(drop)
    }

    pub(super) fn ftruncate(t: &Target) -> Result<()> {
        t.write(|f| raw::compat::ftruncate(f, t.offset))
    }

    pub(super) fn truncate(t: &Target) -> Result<()> {
        raw::compat::truncate(&t.path, t.offset)
    }

    pub(super) fn punch(t: &Target) -> Result<()> {
        t.write(|f| raw::compat::fallocate(f, PUNCH_HOLE | KEEP_SIZE, t.offset, t.length))
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod compat {
    use super::*;

    pub(super) fn missing(_: &Target) -> Result<()> {
        Err(Errno::NOSYS)
    }
}

#[cfg(target_arch = "x86_64")]
use compat::{
    ftruncate as compat_ftruncate, pread as compat_pread, punch as compat_punch,
    pwrite as compat_pwrite, truncate as compat_truncate,
};
#[cfg(not(target_arch = "x86_64"))]
use compat::{
    missing as compat_ftruncate, missing as compat_pread, missing as compat_punch,
    missing as compat_pwrite, missing as compat_truncate,
};
