//! Hammers: one trick again and again, by several processes without any
//! privilege that preempt each other.
//!
//! A gate that takes one call for another does so once in thousands of times.
//! So each trick is made as often as there is time for, on few processors, by
//! processes that the scheduler treats differently. What passed is counted by
//! what the calls return; whoever hammers looks at the block map as well.

use crate::attack::{Where, clone_range, dedupe};
use crate::disk::Kind;
use crate::fault::Access;
use crate::process::{listen, say};
use crate::random::Random;
use crate::raw::adversary::{self, Aio, Notifier, Priority, Ring, shared_counters};
use crate::raw::{self, PageBuffer, PlainMap, Result, Uring};
use anyhow::{Context, bail, ensure};
use mapdirect_sys::Errno;
use rustix::fs::{Mode, OFlags, SeekFrom, seek};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// Environment variable: how many tries a hammer makes, all tricks together.
pub const TRIES_VARIABLE: &str = "MAPDIRECT_HAMMER_TRIES";

/// Processes that hammer at the same time.
pub const PROCESSES: u64 = 8;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// In the file with frozen blocks: all of it, written but for
pub const SPARSE: u64 = 4 * MIB;
/// a hole, from here on a MiB,
pub const HOLE: u64 = MIB;
/// what is unwritten, from here on a MiB,
pub const UNWRITTEN: u64 = 2 * MIB;
/// and what is shared, where there is sharing: so many bytes.
pub const SHARED: (u64, u64) = (3 * MIB + MIB / 2, 65_536);
/// Bytes of the file that is stable throughout, and of the one that ends
/// where the frozen part of its pin begins.
pub const SOLID: u64 = MIB;
/// Where the pin of the latter ends.
pub const TAIL: u64 = 2 * MIB;

const RWF_APPEND: i32 = 0x10;
const RWF_NOAPPEND: i32 = 0x20;
const RWF_ATOMIC: i32 = 0x40;
const KEEP_SIZE: i32 = 0x01;
const PUNCH: i32 = KEEP_SIZE | 0x02;
const COLLAPSE: i32 = 0x08;
const ZERO: i32 = 0x10;
const INSERT: i32 = 0x20;
const WRITE_ZEROES: i32 = 0x80;
/// No mode there is.
const NO_MODE: i32 = 0x4000_0000;
const MADV_REMOVE: i32 = 9;
const BOTH: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// Where nothing can be: a range that begins here ends beyond the largest
/// offset.
const OVERFLOW: u64 = i64::MAX as u64 - 10;

/// The files that are hammered.
#[derive(Debug)]
pub struct Files {
    directory: PathBuf,
}

impl Files {
    /// Those in a directory.
    #[must_use]
    pub fn at(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
        }
    }

    /// Makes them in a new directory, for everybody to write to.
    pub fn make(directory: &Path, kind: Kind) -> anyhow::Result<Self> {
        std::fs::create_dir(directory)?;
        let files = Self::at(directory);
        let bytes = vec![0x61; usize::try_from(SOLID)?];
        for path in [files.solid(), files.tail()] {
            std::fs::write(path, &bytes)?;
        }
        let sparse = File::create(files.sparse())?;
        sparse.write_all_at(&bytes, 0)?;
        sparse.write_all_at(&bytes, UNWRITTEN + MIB)?;
        raw::fallocate(sparse.as_fd(), 0, UNWRITTEN, MIB)?;
        sparse.set_len(SPARSE)?;
        if kind.reflink() {
            let sharer = File::create(directory.join("sharer"))?;
            let from = File::open(files.sparse())?;
            clone_range(sharer.as_fd(), from.as_fd(), SHARED.0, SHARED.1, 0)?;
        }
        for process in 0..PROCESSES {
            std::fs::write(files.own(process), &bytes)?;
        }
        use std::os::unix::fs::PermissionsExt;
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            entry.path().metadata()?;
            std::fs::set_permissions(entry.path(), std::fs::Permissions::from_mode(0o666))?;
            File::open(entry.path())?.sync_all()?;
        }
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o777))?;
        Ok(files)
    }

    /// The one with frozen blocks.
    #[must_use]
    pub fn sparse(&self) -> PathBuf {
        self.directory.join("sparse")
    }

    /// The one without.
    #[must_use]
    pub fn solid(&self) -> PathBuf {
        self.directory.join("solid")
    }

    /// The one that ends amid its pin.
    #[must_use]
    pub fn tail(&self) -> PathBuf {
        self.directory.join("tail")
    }

    fn own(&self, process: u64) -> PathBuf {
        self.directory.join(format!("own-{process}"))
    }

    /// Each that is pinned, and what of it.
    #[must_use]
    pub fn pinned(&self) -> [(PathBuf, u64); 3] {
        [
            (self.sparse(), SPARSE),
            (self.solid(), SOLID),
            (self.tail(), TAIL),
        ]
    }
}

/// What it means when a trick's last call succeeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Success {
    /// It did what a pin forbids.
    Breach,
    /// It may have gone where it may: only the block map tells.
    Harmless,
    /// The same, and no try need be refused.
    Allowed,
}

/// A way to be taken for something else, or for nothing.
#[derive(Clone, Copy, Debug)]
pub struct Trick {
    /// Its name, unique.
    pub name: &'static str,
    /// Where it can be made.
    pub place: Where,
    /// What success means.
    pub success: Success,
    /// How many times as often as others it is tried.
    pub weight: u64,
    run: fn(&mut Attacker) -> Result<()>,
}

const fn breach(name: &'static str, run: fn(&mut Attacker) -> Result<()>) -> Trick {
    Trick {
        name,
        place: Where::Everywhere,
        success: Success::Breach,
        weight: 1,
        run,
    }
}

const fn harmless(name: &'static str, run: fn(&mut Attacker) -> Result<()>) -> Trick {
    Trick {
        success: Success::Harmless,
        ..breach(name, run)
    }
}

const fn allowed(name: &'static str, run: fn(&mut Attacker) -> Result<()>) -> Trick {
    Trick {
        success: Success::Allowed,
        ..breach(name, run)
    }
}

/// A trick for which two threads must meet: it is tried more often.
const fn often(trick: Trick) -> Trick {
    Trick { weight: 8, ..trick }
}

const fn reflink(trick: Trick) -> Trick {
    Trick {
        place: Where::Reflink,
        ..trick
    }
}

/// Everything there is.
pub const TRICKS: &[Trick] = &[
    // Nothing but the call itself.
    breach("plain-pwrite", |a| pwrite(&a.sparse, a.random.frozen())),
    breach("plain-write", |a| {
        seek(&a.sparse, SeekFrom::Start(a.random.frozen()))?;
        rustix::io::write(&a.sparse, b"y").map(drop)
    }),
    breach("plain-pwritev2", |a| {
        raw::pwritev2(a.sparse.as_fd(), b"y", a.random.frozen(), 0).map(drop)
    }),
    breach("plain-sendfile", |a| {
        seek(&a.sparse, SeekFrom::Start(a.random.frozen()))?;
        let mut from = 0;
        rustix::fs::sendfile(&a.sparse, &a.own, Some(&mut from), 64).map(drop)
    }),
    breach("plain-splice", |a| {
        let (reader, writer) = rustix::pipe::pipe()?;
        rustix::io::write(&writer, &[0x7a; 64])?;
        let mut at = a.random.frozen();
        let flags = rustix::pipe::SpliceFlags::empty();
        rustix::pipe::splice(&reader, None, &a.sparse, Some(&mut at), 64, flags).map(drop)
    }),
    breach("plain-copy-into", |a| {
        let mut at = a.random.frozen() & !(PAGE - 1);
        let length = usize::try_from(PAGE).unwrap_or(0);
        rustix::fs::copy_file_range(&a.own, Some(&mut 0), &a.sparse, Some(&mut at), length)
            .map(drop)
    }),
    breach("allocate", |a| {
        let at = a.random.below(UNWRITTEN + MIB - HOLE - PAGE);
        raw::fallocate(a.sparse.as_fd(), KEEP_SIZE, HOLE + at, PAGE)
    }),
    // A call that fails before its hook, and then the one that is meant.
    breach("stale-pwrite", |a| {
        for _ in 0..4 {
            let _ = rustix::io::pwrite(&a.sparse, &[0x79; 64], OVERFLOW);
        }
        pwrite(&a.sparse, a.random.frozen())
    }),
    breach("stale-pread", |a| {
        let mut bytes = [0; 64];
        for _ in 0..4 {
            let _ = rustix::io::pread(&a.sparse, &mut bytes, OVERFLOW);
        }
        pwrite(&a.sparse, a.random.frozen())
    }),
    breach("read-before", |a| {
        let mut bytes = [0; 64];
        let at = a.random.below(SPARSE - 64);
        rustix::io::pread(&a.sparse, &mut bytes, at)?;
        pwrite(&a.sparse, a.random.frozen())
    }),
    breach("stale-pwritev2", |a| {
        let _ = raw::pwritev2(a.appending.as_fd(), &[0x79; 64], OVERFLOW, 0);
        let _ = raw::pwritev2(a.appending.as_fd(), &[], 0, 0);
        raw::pwritev2(a.appending.as_fd(), b"y", a.random.frozen(), RWF_NOAPPEND).map(drop)
    }),
    reflink(breach("stale-clone", |a| {
        for _ in 0..2 {
            let _ = clone_range(
                a.own.as_fd(),
                a.reader.as_fd(),
                OVERFLOW & !(PAGE - 1),
                MIB,
                0,
            );
        }
        clone_from(a)
    })),
    reflink(breach("stale-clone-into", |a| {
        for _ in 0..2 {
            let (own, solid) = (a.own.as_fd(), a.solid.as_fd());
            let _ = clone_range(solid, own, 0, PAGE, OVERFLOW & !(PAGE - 1));
        }
        let at = a.random.block(SOLID);
        clone_range(a.solid.as_fd(), a.own.as_fd(), at, PAGE, at)
    })),
    reflink(breach("stale-dedupe", |a| {
        for _ in 0..2 {
            let (own, reader) = (a.own.as_fd(), a.reader.as_fd());
            let _ = dedupe(reader, OVERFLOW & !(PAGE - 1), own, 0, PAGE);
        }
        dedupe_from(a)
    })),
    breach("stale-fallocate", |a| {
        for mode in [NO_MODE, NO_MODE | PUNCH, 0x02] {
            let _ = raw::fallocate(a.solid.as_fd(), mode, 8 * MIB, PAGE);
        }
        punch(a)
    }),
    breach("stale-allocate", |a| {
        for mode in [NO_MODE, NO_MODE | KEEP_SIZE] {
            let _ = raw::fallocate(a.sparse.as_fd(), mode, 0, PAGE);
        }
        let at = a.random.below(UNWRITTEN + MIB - HOLE - PAGE);
        raw::fallocate(a.sparse.as_fd(), KEEP_SIZE, HOLE + at, PAGE)
    }),
    breach("stale-aio", |a| {
        for _ in 0..2 {
            let _ = aio(a, |aio, a| {
                aio.write(a.sparse.as_fd(), &[0x79; 64], OVERFLOW, 0)
            });
        }
        pwrite(&a.sparse, a.random.frozen())
    }),
    breach("stale-aio-aio", |a| {
        let _ = aio(a, |aio, a| {
            aio.write(a.sparse.as_fd(), &[0x79; 64], OVERFLOW, 0)
        });
        let at = a.random.frozen();
        aio(a, |aio, a| aio.write(a.sparse.as_fd(), b"y", at, 0))
    }),
    breach("stale-mmap", |a| {
        let place = PlainMap::new(a.own.as_fd(), BOTH, libc::MAP_SHARED, 0, 4096)?;
        let taken = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
        let _ = place.another(a.sparse.as_fd(), BOTH, taken, 0);
        map_frozen(a)
    }),
    // Flags that say where a write goes, or how.
    breach("append", |a| {
        raw::pwritev2(a.tail.as_fd(), b"y", a.random.stable(), RWF_APPEND).map(drop)
    }),
    breach("append-aio", |a| {
        let at = a.random.stable();
        aio(a, |aio, a| aio.write(a.tail.as_fd(), b"y", at, RWF_APPEND))
    }),
    breach("append-open", |a| {
        rustix::io::write(&a.tail_appending, b"y").map(drop)
    }),
    breach("no-append", |a| {
        raw::pwritev2(a.appending.as_fd(), b"y", a.random.frozen(), RWF_NOAPPEND).map(drop)
    }),
    breach("no-append-aio", |a| {
        let at = a.random.frozen();
        aio(a, |aio, a| {
            aio.write(a.appending.as_fd(), b"y", at, RWF_NOAPPEND)
        })
    }),
    reflink(breach("atomic", |a| {
        let at = a.random.below(60) * 16_384;
        raw::pwritev2(a.direct.as_fd(), a.buffer.bytes(), at, RWF_ATOMIC).map(drop)
    })),
    reflink(breach("atomic-aio", |a| {
        let at = a.random.below(60) * 16_384;
        aio(a, |aio, a| {
            aio.write(a.direct.as_fd(), a.buffer.bytes(), at, RWF_ATOMIC)
        })
    })),
    // Flags of the description that change between the hook and the write.
    often(harmless("append-flips", |a| {
        a.flip(Arc::clone(&a.tail), OFlags::APPEND);
        let at = a.random.stable();
        rustix::io::pwrite(&a.tail, b"y", at).map(drop)
    })),
    often(harmless("append-flips-aio", |a| {
        a.flip(Arc::clone(&a.tail), OFlags::APPEND);
        let at = a.random.stable();
        aio(a, |aio, a| aio.write(a.tail.as_fd(), b"y", at, 0))
    })),
    allowed("direct-flips", |a| {
        a.flip(Arc::clone(&a.tail), OFlags::DIRECT);
        let at = a.random.block(SOLID / 2);
        let page = &a.buffer.bytes()[..4096];
        rustix::io::pwrite(&a.tail, page, at).map(drop)
    }),
    reflink(breach("atomic-direct-flips", |a| {
        a.flip(Arc::clone(&a.solid), OFlags::DIRECT);
        let at = a.random.below(60) * 16_384;
        raw::pwritev2(a.solid.as_fd(), a.buffer.bytes(), at, RWF_ATOMIC).map(drop)
    })),
    // What shares blocks, by somebody who may only read.
    reflink(breach("clone-by-reader", clone_from)),
    reflink(breach("clone-all-by-reader", |a| {
        clone_range(a.own.as_fd(), a.reader.as_fd(), 0, 0, 0)
    })),
    reflink(breach("dedupe-by-reader", dedupe_from)),
    reflink(breach("dedupe-into", |a| {
        let at = a.random.block(SOLID);
        dedupe(a.own.as_fd(), at, a.solid.as_fd(), at, PAGE)
    })),
    reflink(breach("clone-into", |a| {
        let at = a.random.block(SOLID);
        clone_range(a.solid.as_fd(), a.own.as_fd(), at, PAGE, at)
    })),
    reflink(breach("copy-by-reader", |a| {
        let mut at = a.random.block(SOLID);
        let mut to = at;
        rustix::fs::copy_file_range(&a.reader, Some(&mut at), &a.own, Some(&mut to), 4096).map(drop)
    })),
    // What frees or moves blocks.
    breach("punch", punch),
    breach("zero", |a| fallocate_solid(a, ZERO | KEEP_SIZE)),
    breach("collapse", |a| fallocate_solid(a, COLLAPSE)),
    breach("insert", |a| fallocate_solid(a, INSERT)),
    breach("write-zeroes", |a| fallocate_solid(a, WRITE_ZEROES)),
    breach("madvise-remove", |a| {
        let at = a.random.block(SOLID);
        let map = PlainMap::new(a.solid.as_fd(), BOTH, libc::MAP_SHARED, at, 4096)?;
        map.advise(MADV_REMOVE)
    }),
    breach("ftruncate", |a| {
        rustix::fs::ftruncate(&a.solid, a.random.below(SOLID))
    }),
    breach("truncate", |a| {
        let size = a.random.below(SOLID);
        raw::truncate(&raw::c_path(&a.files.solid()), size)
    }),
    // Positions that somebody else moves.
    often(harmless("position-by-lseek", |a| {
        a.move_position(false)?;
        seek(&a.sparse, SeekFrom::Start(a.random.frozen()))?;
        rustix::io::write(&a.sparse, b"y").map(drop)
    })),
    often(harmless("position-by-sendfile", |a| {
        a.move_position(true)?;
        seek(&a.sparse, SeekFrom::Start(a.random.frozen()))?;
        rustix::io::write(&a.sparse, b"y").map(drop)
    })),
    often(harmless("position-of-vectors", |a| {
        a.move_position(true)?;
        seek(&a.sparse, SeekFrom::Start(a.random.frozen()))?;
        let vectors = [std::io::IoSlice::new(b"y"), std::io::IoSlice::new(b"y")];
        rustix::io::writev(&a.sparse, &vectors).map(drop)
    })),
    // Registers that hold more than the kernel looks at.
    #[cfg(target_arch = "x86_64")]
    breach("junk-pwrite", |a| {
        adversary::junk::pwrite(a.sparse.as_fd(), b"y", a.random.frozen()).map(drop)
    }),
    #[cfg(target_arch = "x86_64")]
    breach("junk-stale-pwrite", |a| {
        for _ in 0..4 {
            let _ = adversary::junk::pwrite(a.sparse.as_fd(), &[0x79; 64], OVERFLOW);
        }
        adversary::junk::pwrite(a.sparse.as_fd(), b"y", a.random.frozen()).map(drop)
    }),
    #[cfg(target_arch = "x86_64")]
    breach("junk-fallocate", |a| {
        let at = a.random.block(SOLID);
        adversary::junk::fallocate(a.solid.as_fd(), PUNCH, at, PAGE).map(drop)
    }),
    #[cfg(target_arch = "x86_64")]
    breach("junk-ftruncate", |a| {
        adversary::junk::ftruncate(a.solid.as_fd(), a.random.below(SOLID)).map(drop)
    }),
    #[cfg(target_arch = "x86_64")]
    reflink(breach("junk-copy", |a| {
        let at = a.random.block(SOLID).cast_signed();
        adversary::junk::copy(a.reader.as_fd(), at, a.own.as_fd(), at, PAGE).map(drop)
    })),
    #[cfg(target_arch = "x86_64")]
    reflink(breach("junk-clone", |a| {
        adversary::junk::clone(a.own.as_fd(), a.reader.as_fd()).map(drop)
    })),
    #[cfg(target_arch = "x86_64")]
    breach("i386-pwrite", |a| {
        let at = a.random.frozen();
        adversary::junk_compat::pwrite(a.sparse.as_fd(), &a.low, 1, at).map(drop)
    }),
    #[cfg(target_arch = "x86_64")]
    breach("i386-fallocate", |a| {
        let at = a.random.block(SOLID);
        adversary::junk_compat::fallocate(a.solid.as_fd(), PUNCH, at, PAGE).map(drop)
    }),
    #[cfg(target_arch = "x86_64")]
    breach("i386-ftruncate", |a| {
        adversary::junk_compat::ftruncate(a.solid.as_fd(), a.random.below(SOLID)).map(drop)
    }),
    #[cfg(target_arch = "x86_64")]
    reflink(breach("i386-clone", |a| {
        adversary::junk_compat::clone(a.own.as_fd(), a.reader.as_fd()).map(drop)
    })),
    // Mappings that come to lie over what is frozen.
    breach("map-frozen", map_frozen),
    breach("map-protect", |a| {
        let at = a.random.block(MIB) + HOLE;
        let map = PlainMap::new(
            a.sparse.as_fd(),
            libc::PROT_READ,
            libc::MAP_SHARED,
            at,
            4096,
        )?;
        map.protect(BOTH)?;
        stored(&map, 0)
    }),
    breach("map-grown", |a| {
        let mut map = PlainMap::new(a.sparse.as_fd(), BOTH, libc::MAP_SHARED, HOLE - PAGE, 4096)?;
        map.grow(65_536)?;
        stored(&map, 4096)
    }),
    breach("map-grown-and-protected", |a| {
        let (file, at) = (a.sparse.as_fd(), HOLE - PAGE);
        let mut map = PlainMap::new(file, libc::PROT_READ, libc::MAP_SHARED, at, 4096)?;
        map.grow(65_536)?;
        map.protect(BOTH)?;
        stored(&map, 4096)
    }),
    breach("map-of-other-pages", |a| {
        let map = PlainMap::new(a.sparse.as_fd(), libc::PROT_READ, libc::MAP_SHARED, 0, 4096)?;
        map.show_page(usize::try_from(HOLE / PAGE).unwrap_or(0))?;
        map.protect(BOTH)?;
        stored(&map, 0)
    }),
    // Behind the back of a system call.
    breach("aio", |a| {
        let at = a.random.frozen();
        aio(a, |aio, a| aio.write(a.sparse.as_fd(), b"y", at, 0))
    }),
    breach("io_uring", |a| ring_write(a, Uring::Inline, 0)),
    breach("io_uring-worker", |a| ring_write(a, Uring::Worker, 0)),
    breach("io_uring-polled", |a| ring_write(a, Uring::Polled, 0)),
    breach("stale-io_uring", |a| ring_write(a, Uring::Inline, 2)),
    breach("stale-io_uring-worker", |a| ring_write(a, Uring::Worker, 2)),
    breach("stale-io_uring-pwrite", |a| {
        let _ = ring(a, Uring::Inline, |ring, a| {
            ring.write(a.sparse.as_fd(), &[0x79; 64], OVERFLOW, 0)
        });
        pwrite(&a.sparse, a.random.frozen())
    }),
    // Plain calls of a thread that has rings: nothing proves them.
    breach("rings-pwrite", |a| {
        ring(a, Uring::Inline, |ring, a| {
            ring.write(a.own.as_fd(), b"y", 0, 0)
        })?;
        pwrite(&a.sparse, a.random.frozen())
    }),
    breach("rings-write", |a| {
        ring(a, Uring::Inline, |ring, a| {
            ring.write(a.own.as_fd(), b"y", 0, 0)
        })?;
        seek(&a.sparse, SeekFrom::Start(a.random.frozen()))?;
        rustix::io::write(&a.sparse, b"y").map(drop)
    }),
    breach("rings-punch", |a| {
        ring(a, Uring::Inline, |ring, a| {
            ring.write(a.own.as_fd(), b"y", 0, 0)
        })?;
        punch(a)
    }),
    reflink(breach("rings-clone", |a| {
        ring(a, Uring::Inline, |ring, a| {
            ring.write(a.own.as_fd(), b"y", 0, 0)
        })?;
        clone_from(a)
    })),
    breach("append-io_uring", |a| {
        let at = a.random.stable();
        ring(a, Uring::Inline, |ring, a| {
            ring.write(a.tail.as_fd(), b"y", at, RWF_APPEND)
        })
    }),
    often(harmless("append-flips-io_uring", |a| {
        a.flip(Arc::clone(&a.tail), OFlags::APPEND);
        let at = a.random.stable();
        ring(a, Uring::Inline, |ring, a| {
            ring.write(a.tail.as_fd(), b"y", at, 0)
        })
    })),
    breach("no-append-io_uring", |a| {
        let at = a.random.frozen();
        ring(a, Uring::Inline, |ring, a| {
            ring.write(a.appending.as_fd(), b"y", at, RWF_NOAPPEND)
        })
    }),
    reflink(breach("atomic-io_uring", |a| {
        let at = a.random.below(60) * 16_384;
        ring(a, Uring::Inline, |ring, a| {
            ring.write(a.direct.as_fd(), a.buffer.bytes(), at, RWF_ATOMIC)
        })
    })),
    breach("punch-io_uring", |a| {
        let at = a.random.block(SOLID);
        ring(a, Uring::Inline, |ring, a| {
            ring.fallocate(a.solid.as_fd(), PUNCH, at, PAGE)
        })
    }),
    breach("stale-punch-io_uring", |a| {
        let at = a.random.block(SOLID);
        ring(a, Uring::Inline, |ring, a| {
            let _ = ring.fallocate(a.solid.as_fd(), NO_MODE, 8 * MIB, PAGE);
            ring.fallocate(a.solid.as_fd(), PUNCH, at, PAGE)
        })
    }),
    breach("ftruncate-io_uring", |a| {
        let size = a.random.below(SOLID);
        ring(a, Uring::Inline, |ring, a| {
            ring.ftruncate(a.solid.as_fd(), size)
        })
    }),
    breach("forged-registers", forged_registers),
];

/// Looks a trick up.
#[must_use]
pub fn by_name(name: &str) -> Option<&'static Trick> {
    TRICKS.iter().find(|trick| trick.name == name)
}

fn pwrite(file: &OwnedFd, at: u64) -> Result<()> {
    rustix::io::pwrite(file, b"y", at).map(drop)
}

fn punch(attacker: &mut Attacker) -> Result<()> {
    fallocate_solid(attacker, PUNCH)
}

fn fallocate_solid(attacker: &mut Attacker, mode: i32) -> Result<()> {
    let at = attacker.random.block(SOLID);
    raw::fallocate(attacker.solid.as_fd(), mode, at, PAGE)
}

fn clone_from(attacker: &mut Attacker) -> Result<()> {
    let at = attacker.random.block(SOLID);
    clone_range(attacker.own.as_fd(), attacker.reader.as_fd(), at, PAGE, at)
}

fn dedupe_from(attacker: &mut Attacker) -> Result<()> {
    let at = attacker.random.block(SOLID);
    dedupe(attacker.reader.as_fd(), at, attacker.own.as_fd(), at, PAGE)
}

/// What stays of it is a store that went through.
fn map_frozen(attacker: &mut Attacker) -> Result<()> {
    let at = attacker.random.block(MIB) + HOLE;
    let map = PlainMap::new(attacker.sparse.as_fd(), BOTH, libc::MAP_SHARED, at, 4096)?;
    stored(&map, 0)
}

fn stored(map: &PlainMap, at: usize) -> Result<()> {
    match map.try_store(at, 0x79) {
        Access::Went(_) => Ok(()),
        Access::Bus(_) => Err(Errno::TXTBSY),
        Access::Segv(_) => Err(Errno::FAULT),
    }
}

/// With a context of aio that the attacker keeps.
fn aio(
    attacker: &mut Attacker,
    with: impl FnOnce(&Aio, &mut Attacker) -> Result<i64>,
) -> Result<()> {
    let aio = match attacker.aio.take() {
        Some(aio) => aio,
        None => Aio::new()?,
    };
    let result = with(&aio, attacker);
    attacker.aio = Some(aio);
    result.map(drop)
}

/// With a ring that the attacker keeps.
fn ring(
    attacker: &mut Attacker,
    how: Uring,
    with: impl FnOnce(&mut Ring, &mut Attacker) -> Result<i32>,
) -> Result<()> {
    let mut ring = match attacker.ring.take() {
        Some(ring) => ring,
        None => Ring::new(how)?,
    };
    let result = with(&mut ring, attacker);
    attacker.ring = Some(ring);
    result.map(drop)
}

/// A write to a frozen block, after so many that fail early.
fn ring_write(attacker: &mut Attacker, how: Uring, stale: u32) -> Result<()> {
    let at = attacker.random.frozen();
    ring(attacker, how, |ring, a| {
        for _ in 0..stale {
            let _ = ring.write(a.sparse.as_fd(), &[0x79; 64], OVERFLOW, 0);
        }
        ring.write(a.sparse.as_fd(), b"y", at, 0)
    })
}

/// A write by io_uring, made on the way out of a `pwrite64` that did not
/// happen: with the registers of that one, which was for a stable place.
fn forged_registers(attacker: &mut Attacker) -> Result<()> {
    let forger = match attacker.forger.take() {
        Some(forger) => forger,
        None => Forger::new()?,
    };
    let at = UNWRITTEN + attacker.random.block(MIB);
    let result = ring(attacker, Uring::Inline, |ring, a| {
        ring.write_after(forger.reader.as_fd(), a.sparse.as_fd(), b"y", at)?;
        forger.ready.send(()).map_err(|_| Errno::PIPE)?;
        let announced = rustix::io::pwrite(&a.sparse, b"y", adversary::ANNOUNCED);
        if announced != Err(Errno::NOSYS) {
            return Err(Errno::NOSYS);
        }
        let result = ring.result_of_write_after();
        rustix::io::read(&forger.reader, &mut [0; 1])?;
        result
    });
    attacker.forger = Some(forger);
    result
}

/// The thread that answers for the kernel.
struct Forger {
    reader: OwnedFd,
    ready: Sender<()>,
}

impl Forger {
    fn new() -> Result<Self> {
        let (reader, writer) = rustix::pipe::pipe()?;
        let (ready, asked): (Sender<()>, Receiver<()>) = channel();
        // Started before, so that it need not ask itself.
        let (hand_over, notifier) = channel::<Notifier>();
        std::thread::spawn(move || {
            let Ok(notifier) = notifier.recv() else {
                return;
            };
            while asked.recv().is_ok() {
                let wake = || {
                    let _ = rustix::io::write(&writer, b"w");
                };
                if notifier.answer(wake).is_err() {
                    return;
                }
            }
        });
        hand_over
            .send(Notifier::install()?)
            .map_err(|_| Errno::PIPE)?;
        Ok(Self { reader, ready })
    }
}

/// Places of the files, at random.
struct Places {
    random: Random,
    /// Some blocks are shared.
    shares: bool,
}

impl Places {
    fn below(&mut self, limit: u64) -> u64 {
        self.random.below(limit)
    }

    /// A byte of the frozen blocks.
    fn frozen(&mut self) -> u64 {
        if self.shares && self.below(8) == 0 {
            return SHARED.0 + self.below(SHARED.1);
        }
        HOLE + self.below(UNWRITTEN + MIB - HOLE)
    }

    /// A byte far from what is frozen.
    fn stable(&mut self) -> u64 {
        self.below(SOLID / 2)
    }

    /// The beginning of a block.
    fn block(&mut self, below: u64) -> u64 {
        self.below(below / PAGE) * PAGE
    }
}

/// A thread that does something again and again until it is dropped.
struct Meanwhile {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Meanwhile {
    /// `step` says whether it was refused.
    fn new(mut step: impl FnMut() -> bool + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut refused = 0;
            while !seen.load(SeqCst) {
                refused += u64::from(step());
            }
            refused
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    /// Ends it, and says how often it was refused.
    fn end(mut self) -> u64 {
        self.stop.store(true, SeqCst);
        let thread = self.thread.take();
        thread.map_or(0, |thread| thread.join().unwrap_or(0))
    }
}

/// One process that hammers.
struct Attacker {
    files: Files,
    random: Places,
    sparse: Arc<OwnedFd>,
    appending: OwnedFd,
    solid: Arc<OwnedFd>,
    reader: OwnedFd,
    direct: OwnedFd,
    tail: Arc<OwnedFd>,
    tail_appending: OwnedFd,
    own: OwnedFd,
    buffer: PageBuffer,
    #[cfg(target_arch = "x86_64")]
    low: adversary::junk_compat::LowPage,
    aio: Option<Aio>,
    ring: Option<Ring>,
    meanwhile: Option<Meanwhile>,
    forger: Option<Forger>,
}

impl Attacker {
    fn new(directory: &Path, shares: bool, process: u64, seed: u64) -> Result<Self> {
        let files = Files::at(directory);
        let open = |path: &Path, flags| rustix::fs::open(path, flags, Mode::empty());
        let (both, append) = (OFlags::RDWR, OFlags::RDWR | OFlags::APPEND);
        Ok(Self {
            sparse: Arc::new(open(&files.sparse(), both)?),
            appending: open(&files.sparse(), append)?,
            solid: Arc::new(open(&files.solid(), both)?),
            reader: open(&files.solid(), OFlags::RDONLY)?,
            direct: open(&files.solid(), both | OFlags::DIRECT)?,
            tail: Arc::new(open(&files.tail(), both)?),
            tail_appending: open(&files.tail(), append)?,
            own: open(&files.own(process), both)?,
            files,
            random: Places {
                random: Random::new(seed),
                shares,
            },
            buffer: PageBuffer::new(16_384),
            #[cfg(target_arch = "x86_64")]
            low: adversary::junk_compat::LowPage::new()?,
            aio: None,
            ring: None,
            meanwhile: None,
            forger: None,
        })
    }

    /// Flips a flag of a description from now on.
    fn flip(&mut self, file: Arc<OwnedFd>, flag: OFlags) {
        self.meanwhile.get_or_insert_with(|| {
            Meanwhile::new(move || {
                let set = rustix::fs::fcntl_setfl(&file, flag);
                let cleared = rustix::fs::fcntl_setfl(&file, OFlags::empty());
                set == Err(Errno::TXTBSY) || cleared == Err(Errno::TXTBSY)
            })
        });
    }

    /// Moves the position of the file with frozen blocks to stable ones from
    /// now on; by sendfile(2), which takes no lock for that, if asked for.
    fn move_position(&mut self, by_sendfile: bool) -> Result<()> {
        if self.meanwhile.is_some() {
            return Ok(());
        }
        let file = Arc::clone(&self.sparse);
        let from = self
            .own
            .try_clone()
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        let mut random = Random::new(1);
        self.meanwhile = Some(Meanwhile::new(move || {
            let place = SeekFrom::Start(random.below(SOLID / 2));
            let mut result = seek(&file, place).map(drop);
            if by_sendfile {
                result = rustix::fs::sendfile(&file, &from, Some(&mut 0), 16).map(drop);
            }
            result == Err(Errno::TXTBSY)
        }));
        Ok(())
    }
}

/// What came of the tries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tries made.
    pub tries: u64,
    /// Refused with ETXTBSY.
    pub refused: u64,
    /// Succeeded.
    pub passed: u64,
    /// Failed for another reason,
    pub failed: u64,
    /// the last of which was this errno.
    pub errno: u64,
}

impl Counts {
    /// What the kernel or the device does not offer.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        self.refused == 0 && self.passed == 0 && self.failed > 0
    }
}

/// How the processes hammer.
#[derive(Clone, Copy, Debug)]
struct Plan {
    shares: bool,
    processors: u64,
    seed: u64,
}

/// Tries after which a trick that the kernel does not know is given up.
const KNOWN_BY: u64 = 32;
/// Breaches that are enough.
const ENOUGH: u64 = 50;
/// Seconds that one trick may take, and after which a process is stuck.
const LONGEST: u64 = 20;
const STUCK: u32 = 120;

/// One process: makes a trick so often, and counts.
fn hammer(
    directory: &Path,
    trick: &Trick,
    process: u64,
    tries: u64,
    plan: Plan,
    counters: &[AtomicU64],
) -> anyhow::Result<()> {
    adversary::end_after(STUCK);
    if plan.processors == 1 {
        let mut first = CpuSet::new();
        first.set(0);
        sched_setaffinity(None, &first)?;
    }
    // Whoever comes behind all others is preempted wherever it is.
    let priorities = [Priority::Normal, Priority::Idle, Priority::Batch];
    let priority = usize::try_from(process)? % priorities.len();
    adversary::set_priority(priorities[priority])?;
    let seed = plan.seed.wrapping_mul(31).wrapping_add(process + 1);
    let mut attacker = Attacker::new(directory, plan.shares, process, seed)?;
    let mut counts = Counts::default();
    let started = std::time::Instant::now();
    let breaches = &counters[2];
    while counts.tries < tries {
        match (trick.run)(&mut attacker) {
            Ok(()) => {
                counts.passed += 1;
                breaches.fetch_add(1, SeqCst);
            }
            Err(Errno::TXTBSY) => counts.refused += 1,
            Err(errno) => {
                counts.failed += 1;
                counts.errno = u64::try_from(errno.raw_os_error())?;
            }
        }
        counts.tries += 1;
        let unknown = counts.failed == counts.tries && counts.tries >= KNOWN_BY;
        let breached = trick.success == Success::Breach && breaches.load(SeqCst) >= ENOUGH;
        let late = counts.tries.is_multiple_of(16) && started.elapsed().as_secs() >= LONGEST;
        if unknown || breached || late {
            break;
        }
    }
    if let Some(meanwhile) = attacker.meanwhile.take() {
        counts.refused += meanwhile.end();
    }
    for (counter, count) in [(0, counts.tries), (1, counts.refused), (3, counts.failed)] {
        counters[counter].fetch_add(count, SeqCst);
    }
    counters[4].fetch_max(counts.errno, SeqCst);
    Ok(())
}

/// Role: for each line it hears, which names a trick and a number of tries,
/// several processes that make it. Arguments: directory, whether blocks can
/// be shared, number of processors, seed.
pub fn play(arguments: &[String]) -> anyhow::Result<()> {
    let [directory, shares, processors, seed] = arguments else {
        bail!("wrong arguments");
    };
    let directory = Path::new(directory);
    let mut plan = Plan {
        shares: shares.parse()?,
        processors: processors.parse()?,
        seed: seed.parse()?,
    };
    raw::become_nobody()?;
    let counters = shared_counters(5)?;
    while let Some(line) = listen()? {
        let (name, tries) = line.split_once(' ').context("wrong words")?;
        let trick = by_name(name).with_context(|| format!("there is no trick {name}"))?;
        let each = tries.parse::<u64>()?.div_ceil(PROCESSES);
        for counter in counters {
            counter.store(0, SeqCst);
        }
        plan.seed += 1;
        let children: Vec<i32> = (0..PROCESSES)
            .map(|process| {
                raw::fork(
                    || match hammer(directory, trick, process, each, plan, counters) {
                        Ok(()) => 0,
                        Err(error) => {
                            eprintln!("hammer {name}: {error:#}");
                            1
                        }
                    },
                )
            })
            .collect::<Result<_>>()?;
        for child in children {
            let status = raw::wait(child)?;
            ensure!(status == 0, "a process of {name} ended with {status}");
        }
        let counts: Vec<String> = counters
            .iter()
            .map(|counter| counter.load(SeqCst).to_string())
            .collect();
        say(&counts.join(" "));
    }
    Ok(())
}

/// Reads what [`play`] says of a trick.
pub fn parse_counts(line: &str) -> anyhow::Result<Counts> {
    let numbers: Vec<u64> = line
        .split(' ')
        .map(str::parse)
        .collect::<std::result::Result<_, _>>()
        .with_context(|| format!("the hammer said: {line}"))?;
    let [tries, refused, passed, failed, errno] = numbers[..] else {
        bail!("the hammer said: {line}");
    };
    Ok(Counts {
        tries,
        refused,
        passed,
        failed,
        errno,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique() {
        let names: BTreeSet<_> = TRICKS.iter().map(|trick| trick.name).collect();
        assert_eq!(names.len(), TRICKS.len());
    }

    #[test]
    fn counts_are_read_as_they_are_said() {
        let counts = parse_counts("5 1 2 2 22").unwrap();
        assert_eq!((counts.tries, counts.failed, counts.errno), (5, 2, 22));
        assert!(parse_counts("failed: no such file").is_err());
    }
}
