//! The tricks, and what they are made of.

use super::*;

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

pub(super) fn pwrite(file: &OwnedFd, at: u64) -> Result<()> {
    rustix::io::pwrite(file, b"y", at).map(drop)
}

pub(super) fn punch(attacker: &mut Attacker) -> Result<()> {
    fallocate_solid(attacker, PUNCH)
}

pub(super) fn fallocate_solid(attacker: &mut Attacker, mode: i32) -> Result<()> {
    let at = attacker.random.block(SOLID);
    raw::fallocate(attacker.solid.as_fd(), mode, at, PAGE)
}

pub(super) fn clone_from(attacker: &mut Attacker) -> Result<()> {
    let at = attacker.random.block(SOLID);
    clone_range(attacker.own.as_fd(), attacker.reader.as_fd(), at, PAGE, at)
}

pub(super) fn dedupe_from(attacker: &mut Attacker) -> Result<()> {
    let at = attacker.random.block(SOLID);
    dedupe(attacker.reader.as_fd(), at, attacker.own.as_fd(), at, PAGE)
}

/// What stays of it is a store that went through.
pub(super) fn map_frozen(attacker: &mut Attacker) -> Result<()> {
    let at = attacker.random.block(MIB) + HOLE;
    let map = PlainMap::new(attacker.sparse.as_fd(), BOTH, libc::MAP_SHARED, at, 4096)?;
    stored(&map, 0)
}

pub(super) fn stored(map: &PlainMap, at: usize) -> Result<()> {
    match map.try_store(at, 0x79) {
        Access::Went(_) => Ok(()),
        Access::Bus(_) => Err(Errno::TXTBSY),
        Access::Segv(_) => Err(Errno::FAULT),
    }
}

/// With a context of aio that the attacker keeps.
pub(super) fn aio(
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
pub(super) fn ring(
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
pub(super) fn ring_write(attacker: &mut Attacker, how: Uring, stale: u32) -> Result<()> {
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
pub(super) fn forged_registers(attacker: &mut Attacker) -> Result<()> {
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
