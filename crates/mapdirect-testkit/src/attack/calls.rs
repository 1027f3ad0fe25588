//! Operations that are one system call: reads, writes, mappings, fallocate.

use super::*;

pub(super) fn read(t: &Target) -> Result<()> {
    t.read(|f| {
        rustix::fs::seek(f, rustix::fs::SeekFrom::Start(t.offset))?;
        rustix::io::read(f, &mut vec![0; t.length()]).map(drop)
    })
}

pub(super) fn pread(t: &Target) -> Result<()> {
    t.read(|f| rustix::io::pread(f, &mut vec![0; t.length()], t.offset).map(drop))
}

pub(super) fn preadv2(t: &Target) -> Result<()> {
    t.read(|f| {
        let mut bytes = vec![0; t.length()];
        let mut slices = [std::io::IoSliceMut::new(&mut bytes)];
        let flags = rustix::io::ReadWriteFlags::empty();
        rustix::io::preadv2(f, &mut slices, t.offset, flags).map(drop)
    })
}

pub(super) fn mmap_read(t: &Target) -> Result<()> {
    t.read(|f| {
        let map = PlainMap::new(f, libc::PROT_READ, SHARED, t.offset, t.length())?;
        let _ = map.load(0);
        Ok(())
    })
}

pub(super) fn mmap_private(t: &Target) -> Result<()> {
    t.read(|f| {
        let map = PlainMap::new(f, BOTH, libc::MAP_PRIVATE, t.offset, t.length())?;
        map.store(0, 1);
        Ok(())
    })
}

pub(super) fn pipe_or_other() -> Result<(OwnedFd, OwnedFd)> {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
}

pub(super) fn sendfile_from(t: &Target) -> Result<()> {
    t.read(|f| {
        let (_reader, writer) = pipe_or_other()?;
        let mut offset = t.offset;
        rustix::fs::sendfile(&writer, f, Some(&mut offset), t.length().min(4096)).map(drop)
    })
}

pub(super) fn splice_from(t: &Target) -> Result<()> {
    t.read(|f| {
        let (_reader, writer) = pipe_or_other()?;
        let mut offset = t.offset;
        let flags = rustix::pipe::SpliceFlags::empty();
        let length = t.length().min(4096);
        rustix::pipe::splice(f, Some(&mut offset), &writer, None, length, flags).map(drop)
    })
}

pub(super) fn readahead(t: &Target) -> Result<()> {
    t.read(|f| {
        let length = std::num::NonZeroU64::new(t.length);
        rustix::fs::fadvise(f, t.offset, length, rustix::fs::Advice::WillNeed)
    })
}

pub(super) fn seek_hole(t: &Target) -> Result<()> {
    t.read(|f| rustix::fs::seek(f, rustix::fs::SeekFrom::Hole(0)).map(drop))
}

pub(super) fn fiemap(t: &Target) -> Result<()> {
    t.read(|f| mapdirect_sys::fiemap::fiemap(f, t.offset, t.length, |_| {}))
}

pub(super) fn write(t: &Target) -> Result<()> {
    t.write(|f| {
        rustix::fs::seek(f, rustix::fs::SeekFrom::Start(t.offset))?;
        rustix::io::write(f, t.bytes().as_slice()).map(drop)
    })
}

pub(super) fn pwrite(t: &Target) -> Result<()> {
    t.write(|f| rustix::io::pwrite(f, t.bytes().as_slice(), t.offset).map(drop))
}

/// Turns a flag of a description on for a moment, which may be the holder's.
/// Where the gate lets nobody do that, since a write that has been judged would
/// be another one then, the file is opened with the flag instead.
pub(super) fn flagged<T>(
    file: BorrowedFd<'_>,
    flag: OFlags,
    run: impl FnOnce(BorrowedFd<'_>) -> Result<T>,
) -> Result<T> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    match rustix::fs::fcntl_setfl(file, flags | flag) {
        Ok(()) => {
            let result = run(file);
            rustix::fs::fcntl_setfl(file, flags)?;
            result
        }
        Err(Errno::TXTBSY) => {
            let access = flags & OFlags::ACCMODE;
            let opened = mapdirect_sys::proc::reopen(file, access | flag)?;
            run(opened.as_fd())
        }
        Err(errno) => Err(errno),
    }
}

pub(super) fn pwrite_direct(t: &Target) -> Result<()> {
    t.write(|f| {
        flagged(f, OFlags::DIRECT, |f| {
            rustix::io::pwrite(f, t.bytes().as_slice(), t.offset).map(drop)
        })
    })
}

pub(super) fn append(t: &Target) -> Result<()> {
    t.write(|f| {
        flagged(f, OFlags::APPEND, |f| {
            rustix::io::write(f, t.bytes().as_slice()).map(drop)
        })
    })
}

pub(super) fn untorn(
    t: &Target,
    run: impl FnOnce(BorrowedFd<'_>, &[u8]) -> Result<()>,
) -> Result<()> {
    t.write(|f| flagged(f, OFlags::DIRECT, |f| run(f, t.bytes().as_slice())))
}

pub(super) fn sendfile_into(t: &Target) -> Result<()> {
    t.write(|f| {
        rustix::fs::seek(f, rustix::fs::SeekFrom::Start(t.offset))?;
        let mut from = 0;
        rustix::fs::sendfile(f, t.other()?, Some(&mut from), t.length()).map(drop)
    })
}

pub(super) fn splice_into(t: &Target) -> Result<()> {
    t.write(|f| {
        let (reader, writer) = pipe_or_other()?;
        let length = t.length().min(4096);
        rustix::io::write(&writer, &vec![7; length])?;
        let mut offset = t.offset;
        let flags = rustix::pipe::SpliceFlags::empty();
        rustix::pipe::splice(&reader, None, f, Some(&mut offset), length, flags).map(drop)
    })
}

pub(super) fn copy_into(t: &Target) -> Result<()> {
    t.write(|f| {
        let (mut from, mut into) = (0, t.offset);
        let other = t.other()?;
        rustix::fs::copy_file_range(other, Some(&mut from), f, Some(&mut into), t.length())
            .map(drop)
    })
}

pub(super) fn copy_from(t: &Target) -> Result<()> {
    t.read(|f| {
        let (mut from, mut into) = (t.offset, 0);
        let other = t.other()?;
        rustix::fs::copy_file_range(f, Some(&mut from), other, Some(&mut into), t.length())
            .map(drop)
    })
}

pub(super) fn mmap_store(t: &Target) -> Result<()> {
    t.write(|f| {
        let map = PlainMap::new(f, BOTH, SHARED, t.offset, t.length())?;
        map.store(0, 1);
        Ok(())
    })
}

pub(super) fn mmap_protect(t: &Target) -> Result<()> {
    t.write(|f| {
        let map = PlainMap::new(f, libc::PROT_READ, SHARED, t.offset, t.length())?;
        map.protect(BOTH)?;
        map.store(0, 1);
        Ok(())
    })
}

pub(super) fn madvise_remove(t: &Target) -> Result<()> {
    t.write(|f| PlainMap::new(f, BOTH, SHARED, t.offset, t.length())?.advise(MADV_REMOVE))
}

pub(super) fn truncate(path: &Path, size: u64) -> Result<()> {
    raw::truncate(&raw::c_path(path), size)
}

pub(super) fn space(t: &Target, mode: i32) -> Result<()> {
    t.write(|f| raw::fallocate(f, mode, t.offset, t.length))
}
