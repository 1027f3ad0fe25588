//! perf_event_open(2): events of the kernel's tracepoints, read through a ring
//! in shared memory.
//!
//! A [`Ring`] belongs to one processor. Its owner is a dummy event, which never
//! happens, so that tracepoints can come and go without a gap. Each tracepoint
//! is opened disabled, given its filter, told to write to the ring, and then
//! enabled. The filter is evaluated inside the kernel. An event that it drops
//! costs the thread that hit the tracepoint less than a microsecond, and
//! nothing is written.
//!
//! Layouts and numbers are from `include/uapi/linux/perf_event.h`.

use crate::{Errno, Result, checked, last_errno};
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// The most bytes of a filter, without the zero at its end
/// (`ftrace_profile_set_filter` gets the filter by `strndup_user` with a page).
pub const MAX_FILTER: usize = 4095;

/// `PERF_TYPE_SOFTWARE`, `PERF_COUNT_SW_DUMMY`, `PERF_TYPE_TRACEPOINT`.
const TYPE_SOFTWARE: u32 = 1;
const COUNT_SW_DUMMY: u64 = 9;
const TYPE_TRACEPOINT: u32 = 2;

/// The content of a sample, in this order: `PERF_SAMPLE_TID`,
/// `PERF_SAMPLE_TIME` and `PERF_SAMPLE_RAW`.
const SAMPLE: u64 = 1 << 1 | 1 << 2 | 1 << 10;

/// Flags of `struct perf_event_attr`.
const DISABLED: u64 = 1 << 0;
const WATERMARK: u64 = 1 << 14;
const USE_CLOCKID: u64 = 1 << 25;

/// `PERF_FLAG_FD_CLOEXEC`.
const FD_CLOEXEC: libc::c_ulong = 8;

/// `_IO('$', 0)`, `_IO('$', 5)` and `_IOW('$', 6, char *)`.
const ENABLE: libc::c_ulong = 0x2400;
const SET_OUTPUT: libc::c_ulong = 0x2405;
const SET_FILTER: libc::c_ulong = 0x4008_2406;

/// Kinds of records.
const RECORD_LOST: u32 = 2;
const RECORD_SAMPLE: u32 = 9;

/// `struct perf_event_attr` as of `PERF_ATTR_SIZE_VER5`, which every kernel
/// since 4.1 accepts.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    breakpoint: u32,
    config1: u64,
    config2: u64,
    branches: u64,
    user_registers: u64,
    user_stack: u32,
    clock: i32,
    interrupt_registers: u64,
    aux_watermark: u32,
    most_frames: u16,
    reserved: u16,
}

const ATTRIBUTES: u32 = 112;
const _: () = assert!(size_of::<Attributes>() == ATTRIBUTES as usize);

/// When a ring wakes the threads that poll its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// On every record.
    Always,
    /// Only when the ring is half full. The reader must also look by itself.
    Seldom,
}

/// An open event.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// Opens an event of a processor that never happens, to own a ring of
    /// `bytes`.
    ///
    /// # Errors
    ///
    /// `ENODEV` if the processor is not online, `EACCES` or `EPERM` without
    /// `CAP_PERFMON`.
    pub fn dummy(processor: u32, bytes: usize) -> Result<Self> {
        Self::open(
            &Attributes {
                kind: TYPE_SOFTWARE,
                config: COUNT_SW_DUMMY,
                flags: DISABLED | WATERMARK,
                wakeup: u32::try_from(bytes / 2).unwrap_or(u32::MAX),
                ..Attributes::default()
            },
            processor,
        )
    }

    /// Opens a tracepoint of a processor, disabled. `id` is the number in its
    /// format.
    ///
    /// # Errors
    ///
    /// As [`dummy`](Self::dummy), `ENOENT` or `EINVAL` for a tracepoint that
    /// does not exist, `EMFILE`.
    pub fn tracepoint(id: u64, processor: u32, wake: Wake) -> Result<Self> {
        let (watermark, wakeup) = match wake {
            Wake::Always => (0, 1),
            // The watermark of the ring's owner decides.
            Wake::Seldom => (WATERMARK, u32::MAX),
        };
        Self::open(
            &Attributes {
                kind: TYPE_TRACEPOINT,
                config: id,
                sample_period: 1,
                sample_type: SAMPLE,
                flags: DISABLED | watermark,
                wakeup,
                ..Attributes::default()
            },
            processor,
        )
    }

    fn open(attributes: &Attributes, processor: u32) -> Result<Self> {
        let attributes = Attributes {
            size: ATTRIBUTES,
            flags: attributes.flags | USE_CLOCKID,
            clock: libc::CLOCK_MONOTONIC,
            ..*attributes
        };
        // SAFETY: the kernel reads `size` bytes of the attributes, which are
        // all of them, and keeps no pointer.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                &raw const attributes,
                // Any process that runs on that processor.
                -1,
                processor,
                // No group.
                -1,
                FD_CLOEXEC,
            )
        };
        let fd = checked(i32::try_from(fd).map_err(|_| Errno::IO)?)?;
        // SAFETY: the kernel has just made it for us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Makes the kernel drop events that do not match. This can be set once.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a filter that the kernel does not understand, or one longer
    /// than [`MAX_FILTER`].
    pub fn set_filter(&self, filter: &CStr) -> Result<()> {
        // SAFETY: the kernel copies the string, which ends with a zero.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), SET_FILTER, filter.as_ptr()) }).map(drop)
    }

    /// Makes this event write to the ring of another event of the same
    /// processor.
    ///
    /// # Errors
    ///
    /// `EINVAL` if `owner` has no ring, or is of another processor.
    pub fn output_to(&self, owner: &Self) -> Result<()> {
        // SAFETY: no memory is handed over.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), SET_OUTPUT, owner.0.as_raw_fd()) })
            .map(drop)
    }

    /// Makes the event write from now on.
    ///
    /// # Errors
    ///
    /// Any error of the kernel.
    pub fn enable(&self) -> Result<()> {
        // SAFETY: no memory is handed over.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), ENABLE, 0) }).map(drop)
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A hit of a tracepoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample<'a> {
    /// The process of the thread that hit it; 0 for the idle process.
    pub pid: i32,
    /// The thread that hit it.
    pub tid: i32,
    /// The time, in nanoseconds of `CLOCK_MONOTONIC`.
    pub time: u64,
    /// The record of the tracepoint, in the layout that its format describes.
    pub raw: &'a [u8],
}

/// Fields of `struct perf_event_mmap_page`, in the first page of a ring.
const DATA_HEAD: usize = 1024;
const DATA_TAIL: usize = 1032;

/// A ring of records that the kernel writes and this process reads.
#[derive(Debug)]
pub struct Ring {
    start: NonNull<u8>,
    page: usize,
    /// The number of bytes of the data, a power of two.
    size: usize,
    copy: Vec<u8>,
}

// SAFETY: the mapping belongs to the ring alone, is not tied to a thread, and
// is only read and written through `&mut self`.
unsafe impl Send for Ring {}

impl Ring {
    /// Creates the ring of an event. `bytes` must be a power of two times the
    /// size of a page.
    ///
    /// # Errors
    ///
    /// `EPERM` beyond the limit of locked memory, `ENOMEM`, `EINVAL` for
    /// another size.
    pub fn new(owner: &Event, bytes: usize) -> Result<Self> {
        let page = usize::try_from(crate::mmap::page_size()).map_err(|_| Errno::INVAL)?;
        if !bytes.is_power_of_two() || bytes < page {
            return Err(Errno::INVAL);
        }
        // SAFETY: a new mapping where there is none; the kernel requires it to
        // be writable for whoever tells how far it has read.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                page + bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                owner.0.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(last_errno());
        }
        let start = NonNull::new(start.cast()).ok_or(Errno::FAULT)?;
        Ok(Self {
            start,
            page,
            size: bytes,
            copy: Vec::new(),
        })
    }

    fn position(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: `offset` is one of the two constants above, so inside the
        // first page, which is mapped as long as `self` lives.
        let at = unsafe { self.start.add(offset) }.cast::<u64>();
        // SAFETY: it is aligned to 8 bytes, since a page is and the offset
        // too. The kernel changes it at the same time, by single stores of a
        // word, as another thread would an atomic.
        unsafe { AtomicU64::from_ptr(at.as_ptr()) }
    }

    /// Whether there are records to read.
    #[must_use]
    pub fn has_records(&self) -> bool {
        let head = self.position(DATA_HEAD).load(Ordering::Acquire);
        head != self.position(DATA_TAIL).load(Ordering::Relaxed)
    }

    /// Calls `each` for every sample in the ring, and makes room for others.
    /// Says whether some may be lost because the kernel had no room for them.
    pub fn drain(&mut self, mut each: impl FnMut(Sample<'_>)) -> bool {
        let tail = self.position(DATA_TAIL).load(Ordering::Relaxed);
        let head = self.position(DATA_HEAD).load(Ordering::Acquire);
        if head == tail {
            return false;
        }
        self.copy_out(tail, head);
        // The copied records may be overwritten from now on.
        self.position(DATA_TAIL).store(head, Ordering::SeqCst);
        let lost = parse(&self.copy, &mut each);
        // The kernel reports a loss only when it next has room, which may be
        // never. A record that was lost up to here found too little room in the
        // ring, and the ring has not become emptier since: the head is read
        // once more after the tail was given up.
        let now = self.position(DATA_HEAD).load(Ordering::SeqCst);
        lost || self.may_have_overflowed(now.wrapping_sub(tail))
    }

    fn may_have_overflowed(&self, used: u64) -> bool {
        used.saturating_add(LONGEST_RECORD) > self.size as u64
    }

    /// Copies the bytes between two positions, in order.
    fn copy_out(&mut self, tail: u64, head: u64) {
        let mask = self.size as u64 - 1;
        let length = head.wrapping_sub(tail).min(self.size as u64);
        let (Ok(length), Ok(from)) = (usize::try_from(length), usize::try_from(tail & mask)) else {
            return;
        };
        self.copy.clear();
        self.copy.reserve(length);
        let first = length.min(self.size - from);
        for (offset, count) in [(from, first), (0, length - first)] {
            // SAFETY: `offset + count` is at most `size`, and `page + size`
            // bytes are mapped.
            let source = unsafe { self.start.add(self.page + offset) };
            let filled = self.copy.len();
            // SAFETY: `length` bytes were reserved, `filled + count` of them
            // are at most used, and spare capacity does not overlap with a
            // mapping. The kernel does not write between tail and head until
            // the tail moves, which it does behind this.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    source.as_ptr(),
                    self.copy.as_mut_ptr().wrapping_add(filled),
                    count,
                );
            }
            // SAFETY: the bytes up to there were written just now.
            unsafe { self.copy.set_len(filled + count) };
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference into it: `position` borrows `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.page + self.size) };
    }
}

/// More than any record here takes: a sample of a tracepoint with a few
/// numbers.
const LONGEST_RECORD: u64 = 1024;

/// Takes records apart. Says whether some report that others were lost, or make
/// no sense.
pub(crate) fn parse(mut bytes: &[u8], each: &mut impl FnMut(Sample<'_>)) -> bool {
    let mut lost = false;
    while let Some(header) = bytes.first_chunk::<8>() {
        let [k0, k1, k2, k3, _, _, s0, s1] = *header;
        let kind = u32::from_ne_bytes([k0, k1, k2, k3]);
        let size = usize::from(u16::from_ne_bytes([s0, s1]));
        let Some(record) = bytes.get(8..size) else {
            return true;
        };
        match kind {
            RECORD_SAMPLE => match sample(record) {
                Some(sample) => each(sample),
                None => lost = true,
            },
            RECORD_LOST => lost = true,
            _ => {}
        }
        bytes = &bytes[size..];
    }
    lost || !bytes.is_empty()
}

fn sample(record: &[u8]) -> Option<Sample<'_>> {
    let number = |at: usize| {
        let bytes = record.get(at..)?.first_chunk::<4>()?;
        Some(u32::from_ne_bytes(*bytes))
    };
    let time = record.get(8..)?.first_chunk::<8>()?;
    let length = usize::try_from(number(16)?).ok()?;
    Some(Sample {
        pid: number(0)?.cast_signed(),
        tid: number(4)?.cast_signed(),
        time: u64::from_ne_bytes(*time),
        raw: record.get(20..)?.get(..length)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(kind: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = kind.to_ne_bytes().to_vec();
        bytes.extend([0; 2]);
        bytes.extend(u16::try_from(8 + body.len()).unwrap().to_ne_bytes());
        bytes.extend(body);
        bytes
    }

    fn sample_of(pid: i32, time: u64, raw: &[u8]) -> Vec<u8> {
        let mut body = pid.to_ne_bytes().to_vec();
        body.extend((pid + 1).to_ne_bytes());
        body.extend(time.to_ne_bytes());
        body.extend(u32::try_from(raw.len()).unwrap().to_ne_bytes());
        body.extend(raw);
        body.resize(body.len().next_multiple_of(8), 0);
        record(RECORD_SAMPLE, &body)
    }

    #[test]
    fn records_are_taken_apart() {
        let mut bytes = sample_of(7, 100, &[1, 2, 3]);
        bytes.extend(record(99, &[0; 16]));
        bytes.extend(sample_of(9, 200, &[]));
        let mut seen = Vec::new();
        let lost = parse(&bytes, &mut |sample| {
            seen.push((sample.pid, sample.tid, sample.time, sample.raw.to_vec()));
        });
        assert!(!lost);
        assert_eq!(seen, [(7, 8, 100, vec![1, 2, 3]), (9, 10, 200, vec![])]);
        bytes.extend(record(RECORD_LOST, &[0; 16]));
        assert!(parse(&bytes, &mut |_| {}));
    }

    proptest! {
        #[test]
        fn any_bytes_end(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            parse(&bytes, &mut |_| {});
        }

        #[test]
        fn half_a_record_counts_as_a_loss(cut in 1usize..40) {
            let bytes = sample_of(7, 100, &[1; 16]);
            prop_assume!(cut < bytes.len());
            let lost = parse(&bytes[..cut], &mut |_| ());
            prop_assert!(lost);
        }
    }

    #[test]
    fn a_dummy_has_a_ring_that_stays_empty() {
        let bytes = 64 << 10;
        let owner = match Event::dummy(0, bytes) {
            Ok(owner) => owner,
            // No privilege, or no perf events in this kernel.
            Err(errno) => {
                assert!(
                    [Errno::ACCESS, Errno::PERM, Errno::NOSYS].contains(&errno),
                    "{errno}"
                );
                return;
            }
        };
        let mut ring = Ring::new(&owner, bytes).unwrap();
        assert!(!ring.has_records());
        assert!(!ring.drain(|_| panic!("it never happens")));
        assert!(!ring.may_have_overflowed(bytes as u64 / 2));
        assert!(ring.may_have_overflowed(bytes as u64 - 100));
        assert_eq!(Ring::new(&owner, 5000).unwrap_err(), Errno::INVAL);
    }
}
