//! The device-mapper's ioctl (Documentation/admin-guide/device-mapper, and
//! include/uapi/linux/dm-ioctl.h): the table of a mapped device.

use crate::{Errno, Result, checked};
use rustix::fs::{Mode, OFlags};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Where the device-mapper takes its ioctls.
const CONTROL: &str = "/dev/mapper/control";

/// Bytes of a sector, which tables count in.
pub const SECTOR: u64 = 512;

/// One target of a table. Offsets and lengths are bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Offset on the mapped device.
    pub start: u64,
    /// Length.
    pub length: u64,
    /// What maps it: `linear`, `crypt`, ...
    pub kind: String,
    /// What the target was told. Some targets leave keys out of it.
    pub parameters: String,
}

impl Target {
    /// The device and the offset on it that a `linear` target leads to, as
    /// major number, minor number and bytes; nothing for any other target.
    #[must_use]
    pub fn linear(&self) -> Option<(u32, u32, u64)> {
        if self.kind != "linear" {
            return None;
        }
        let mut words = self.parameters.split_ascii_whitespace();
        let (device, start) = (words.next()?, words.next()?);
        let (major, minor) = device.split_once(':')?;
        let start = start.parse::<u64>().ok()?.checked_mul(SECTOR)?;
        let last = words.next().is_none();
        last.then_some((major.parse().ok()?, minor.parse().ok()?, start))
    }
}

/// `struct dm_ioctl`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Header {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event: u32,
    padding: u32,
    device: u64,
    name: [u8; 128],
    uuid: [u8; 129],
    data: [u8; 7],
}

/// Bytes of `struct dm_ioctl`, in front of what an ioctl returns.
const HEADER: usize = size_of::<Header>();
const _: () = assert!(HEADER == 312);

/// `_IOWR(0xfd, 12, struct dm_ioctl)`.
const DM_TABLE_STATUS: libc::c_ulong = 0xC138_FD0C;
/// The table, and not what has become of it.
const DM_STATUS_TABLE_FLAG: u32 = 1 << 4;
/// What is returned did not fit.
const DM_BUFFER_FULL_FLAG: u32 = 1 << 8;
/// Look, and wait for no I/O that is under way.
const DM_NOFLUSH_FLAG: u32 = 1 << 11;

/// Room for a table at first, and at most.
const ROOM: usize = 16 << 10;
const MOST_ROOM: usize = 16 << 20;

/// The table that is in force of a mapped device.
///
/// # Errors
///
/// `EACCES` without `CAP_SYS_ADMIN` or access to `/dev/mapper/control`, `ENXIO`
/// if the device is gone, `EBADMSG` if the answer makes no sense, `E2BIG` for a
/// table of more than 16 MiB, and what open(2) answers where there is no
/// device-mapper.
pub fn table(major: u32, minor: u32) -> Result<Vec<Target>> {
    let control = rustix::fs::open(CONTROL, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    // As huge_encode_dev (include/linux/kdev_t.h) has it.
    let device = u64::from(minor & 0xff) | u64::from(major) << 8 | u64::from(minor & !0xff) << 12;
    let mut room = ROOM;
    while room <= MOST_ROOM {
        let mut buffer = vec![0_u64; room / 8];
        let answer = ask(rustix::fd::AsFd::as_fd(&control), device, &mut buffer)?;
        if answer.flags & DM_BUFFER_FULL_FLAG == 0 {
            let bytes: Vec<u8> = buffer.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let start = usize::try_from(answer.data_start).map_err(|_| Errno::BADMSG)?;
            let end = usize::try_from(answer.data_size).map_err(|_| Errno::BADMSG)?;
            let data = bytes.get(start..end).ok_or(Errno::BADMSG)?;
            return parse(data, answer.target_count).ok_or(Errno::BADMSG);
        }
        room *= 4;
    }
    Err(Errno::TOOBIG)
}

/// Has the kernel fill a buffer; returns the header of what it wrote.
fn ask(control: BorrowedFd<'_>, device: u64, buffer: &mut [u64]) -> Result<Header> {
    let size = u32::try_from(size_of_val(buffer)).map_err(|_| Errno::TOOBIG)?;
    let header = Header {
        version: [4, 0, 0],
        data_size: size,
        // Multiples of eight, as targets are aligned.
        data_start: u32::try_from(HEADER).map_err(|_| Errno::TOOBIG)?,
        target_count: 0,
        open_count: 0,
        flags: DM_STATUS_TABLE_FLAG | DM_NOFLUSH_FLAG,
        event: 0,
        padding: 0,
        device,
        name: [0; 128],
        uuid: [0; 129],
        data: [0; 7],
    };
    let place = buffer.as_mut_ptr().cast::<Header>();
    if size_of_val(buffer) < HEADER {
        return Err(Errno::TOOBIG);
    }
    // SAFETY: the buffer has room for a header, as was just checked, and is
    // aligned to eight bytes, which is all that the header asks for.
    unsafe { place.write(header) };
    // SAFETY: the ioctl reads the header, and writes as many bytes to where it
    // lies as `data_size` says, which is the size of the buffer.
    checked(unsafe { libc::ioctl(control.as_raw_fd(), DM_TABLE_STATUS, place) })?;
    // SAFETY: the kernel has written a header there, or left that of above; it
    // consists of integers, for which all bytes are valid.
    Ok(unsafe { place.read() })
}

/// Bytes of `struct dm_target_spec`.
const SPEC: usize = 40;

/// Parses what is behind the header: `count` times a `struct dm_target_spec`
/// with a text that ends in a zero byte. Returns `None` for anything else.
#[must_use]
pub fn parse(data: &[u8], count: u32) -> Option<Vec<Target>> {
    let mut targets = Vec::new();
    let mut at = 0_usize;
    for _ in 0..count {
        let spec = data.get(at..at.checked_add(SPEC)?)?;
        let sectors = |from: usize| {
            let bytes = spec.get(from..from + 8)?.try_into().ok()?;
            u64::from_ne_bytes(bytes).checked_mul(SECTOR)
        };
        let next = u32::from_ne_bytes(spec.get(20..24)?.try_into().ok()?);
        targets.push(Target {
            start: sectors(0)?,
            length: sectors(8)?,
            kind: text(spec.get(24..)?)?,
            parameters: text(data.get(at + SPEC..)?)?,
        });
        // It counts from the first target on, and must get ahead.
        let next = usize::try_from(next).ok()?;
        if next < at + SPEC {
            return None;
        }
        at = next;
    }
    Some(targets)
}

/// The text before the first zero byte, if there is one and it is text.
fn text(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    let text = std::str::from_utf8(bytes.get(..end)?).ok()?;
    Some(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spec(start: u64, length: u64, next: u32, kind: &str, parameters: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(start.to_ne_bytes());
        bytes.extend(length.to_ne_bytes());
        bytes.extend(0_i32.to_ne_bytes());
        bytes.extend(next.to_ne_bytes());
        let mut name = [0; 16];
        name[..kind.len()].copy_from_slice(kind.as_bytes());
        bytes.extend(name);
        bytes.extend(parameters.as_bytes());
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn a_table_comes_back() {
        let mut data = spec(0, 8, 56, "linear", "8:1 2048");
        data.extend(spec(8, 16, 120, "crypt", "aes 00 0 8:2 0"));
        let targets = parse(&data, 2).unwrap();
        assert_eq!(targets[0].linear(), Some((8, 1, 2048 * 512)));
        assert_eq!((targets[1].start, targets[1].length), (4096, 8192));
        assert_eq!(targets[1].kind, "crypt");
        assert_eq!(targets[1].linear(), None);
    }

    #[test]
    fn what_makes_no_sense_is_no_table() {
        let whole = spec(0, 8, 56, "linear", "8:1 0");
        assert_eq!(parse(&whole[..39], 1), None);
        assert_eq!(parse(&whole, 2), None, "there is no second one");
        assert_eq!(parse(&spec(u64::MAX / 2, 8, 56, "linear", ""), 1), None);
        assert_eq!(
            parse(&spec(0, 8, 0, "linear", "8:1 0"), 2),
            None,
            "a circle"
        );
        assert_eq!(parse(&[], 0), Some(Vec::new()));
    }

    #[test]
    fn strange_parameters_lead_nowhere() {
        for parameters in ["", "8:1", "8 0", "8:x 0", "8:1 0 more", "sda 0", "8:1 -1"] {
            let target = Target {
                start: 0,
                length: 512,
                kind: String::from("linear"),
                parameters: parameters.to_owned(),
            };
            assert_eq!(target.linear(), None, "{parameters}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(data in proptest::collection::vec(any::<u8>(), 0..200), count: u32) {
            if let Some(targets) = parse(&data, count) {
                prop_assert_eq!(targets.len(), usize::try_from(count).unwrap());
            }
        }
    }
}
