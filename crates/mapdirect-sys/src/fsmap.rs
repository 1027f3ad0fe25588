//! ioctl_getfsmap(2): which blocks of a filesystem are free.

use crate::{Result, checked};
use std::os::fd::{AsRawFd, BorrowedFd};

/// `struct fsmap` of include/uapi/linux/fsmap.h. Numbers are bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Record {
    device: u32,
    flags: u32,
    physical: u64,
    owner: u64,
    offset: u64,
    length: u64,
    reserved: [u64; 3],
}

/// Records for each call.
const RECORDS: usize = 256;

/// `struct fsmap_head` with room for records.
#[repr(C)]
struct Head {
    in_flags: u32,
    out_flags: u32,
    count: u32,
    entries: u32,
    reserved: [u64; 6],
    keys: [Record; 2],
    records: [Record; RECORDS],
}

const _: () = assert!(size_of::<Record>() == 64);
const _: () = assert!(std::mem::offset_of!(Head, records) == 192);

/// `_IOWR('X', 59, struct fsmap_head)`.
const FS_IOC_GETFSMAP: libc::c_ulong = 0xC0C0_583B;
/// `FMR_OF_SPECIAL_OWNER`: the owner is none of the filesystem's inodes.
const SPECIAL_OWNER: u32 = 0x10;
/// `FMR_OF_LAST`: there are no more records.
const LAST: u32 = 0x20;
/// `FMR_OWN_FREE`: nobody has it.
const FREE: u64 = 1;

/// The length in bytes of the largest run of free blocks on the device of the
/// filesystem that `file` is on; 0 if none is free. It is an observation: others
/// take and free blocks all the time, and the filesystem may keep some of these
/// for itself.
///
/// # Errors
///
/// `EOPNOTSUPP` or `ENOTTY` where the filesystem does not tell.
pub fn largest_free(file: BorrowedFd<'_>) -> Result<u64> {
    let stat = rustix::fs::fstat(file)?;
    let (major, minor) = (
        rustix::fs::major(stat.st_dev),
        rustix::fs::minor(stat.st_dev),
    );
    // As new_encode_dev (include/linux/kdev_t.h) has it.
    let device = (minor & 0xff) | major << 8 | (minor & !0xff) << 12;
    let mut head = Box::new(Head {
        in_flags: 0,
        out_flags: 0,
        count: u32::try_from(RECORDS).unwrap_or(u32::MAX),
        entries: 0,
        reserved: [0; 6],
        keys: [Record::default(); 2],
        records: [Record::default(); RECORDS],
    });
    head.keys[1] = Record {
        device: u32::MAX,
        flags: u32::MAX,
        physical: u64::MAX,
        owner: u64::MAX,
        offset: u64::MAX,
        ..Record::default()
    };
    let (mut largest, mut run) = (0, 0..0);
    loop {
        head.entries = 0;
        // SAFETY: the ioctl reads the head and the two keys, and writes no more
        // records behind them than `count` says, for which there is room.
        checked(unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_GETFSMAP, &raw mut *head) })?;
        let entries = usize::try_from(head.entries)
            .unwrap_or(RECORDS)
            .min(RECORDS);
        let records = &head.records[..entries];
        for record in records {
            let free = record.flags & SPECIAL_OWNER != 0 && record.owner == FREE;
            if free && record.device == device {
                let end = record.physical.saturating_add(record.length);
                // A run may come in several records.
                let start = if run.end == record.physical {
                    run.start
                } else {
                    record.physical
                };
                run = start..end;
                largest = largest.max(end - start);
            }
        }
        match records.last() {
            // The next call goes on behind it.
            Some(last) if last.flags & LAST == 0 => head.keys[0] = *last,
            _ => return Ok(largest),
        }
    }
}
