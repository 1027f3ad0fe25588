//! fanotify(7): permission events, which ask before other processes open or
//! touch a file.
//!
//! This module has only what a gate needs: pre-content permission events with
//! their byte range, refusals with an errno, and close events. Constants are
//! from `include/uapi/linux/fanotify.h` of Linux 6.14, in which pre-content
//! events appeared; libc and distribution headers do not have them all yet.
//!
//! Two rules that callers must know, both seen on 6.18:
//!
//! * Whether a description raises pre-content events is decided when it is
//!   opened (`fsnotify_open_perm_and_set_mode`, called by `do_dentry_open`). A
//!   description older than the mark stays silent for ever. The exception is
//!   truncation, which is judged by path and always asks.
//! * The range of an event is extended to whole pages. It is the range of the
//!   *call*, not of what the filesystem will change.

use crate::fcntl::no_lease;
use crate::seam::{self, Call};
use crate::{Errno, Result, last_errno};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};

/// The events that a mark asks for, or the kind of an event.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Mask(u64);

impl Mask {
    /// No events.
    pub const NONE: Self = Self(0);
    /// `FAN_ACCESS`. Never asked for; only used to probe for a mark.
    const ACCESS: Self = Self(0x0000_0001);
    /// `FAN_CLOSE_WRITE`: a description open for writing was closed for good.
    pub const CLOSE_WRITE: Self = Self(0x0000_0008);
    /// `FAN_CLOSE_NOWRITE`: a description open for reading was closed for good.
    pub const CLOSE_NOWRITE: Self = Self(0x0000_0010);
    /// The attributes of the file change, the number of its names among them.
    pub const ATTRIBUTES: Self = Self(0x0000_0004);
    /// The file gets another name in place of one that it had.
    pub const MOVE_SELF: Self = Self(0x0000_0800);
    /// `FAN_Q_OVERFLOW`: events were lost.
    pub const OVERFLOW: Self = Self(0x0000_4000);
    /// `FAN_OPEN_PERM`: may this open go on?
    pub const OPEN_PERM: Self = Self(0x0001_0000);
    /// `FAN_PRE_ACCESS`: may this range be read, written or reshaped? (6.14)
    pub const PRE_ACCESS: Self = Self(0x0010_0000);

    /// Whether any bit of `other` is set.
    #[must_use]
    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// The raw bits.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// A mask with these raw bits.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

impl std::ops::BitOr for Mask {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl std::fmt::Debug for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mask({:#x})", self.0)
    }
}

const FAN_CLOEXEC: libc::c_uint = 0x0001;
const FAN_NONBLOCK: libc::c_uint = 0x0002;
const FAN_CLASS_NOTIF: libc::c_uint = 0x0000;
const FAN_CLASS_PRE_CONTENT: libc::c_uint = 0x0008;
const FAN_UNLIMITED_QUEUE: libc::c_uint = 0x0010;
const FAN_UNLIMITED_MARKS: libc::c_uint = 0x0020;
const FAN_REPORT_TID: libc::c_uint = 0x0100;
const FAN_REPORT_FID: libc::c_uint = 0x0200;

const FAN_MARK_ADD: libc::c_uint = 0x0001;
const FAN_MARK_REMOVE: libc::c_uint = 0x0002;

const FAN_ALLOW: u32 = 0x01;
const FAN_DENY: u32 = 0x02;

const METADATA_VERSION: u8 = 3;
const METADATA_LEN: usize = 24;
const INFO_HEADER_LEN: usize = 4;
/// `FAN_EVENT_INFO_TYPE_RANGE`: `{ header, u32 pad, u64 offset, u64 count }`.
const INFO_TYPE_RANGE: u8 = 6;
const INFO_RANGE_LEN: usize = 24;
/// `FAN_EVENT_INFO_TYPE_FID`: `{ header, fsid, struct file_handle }`.
const INFO_TYPE_FID: u8 = 1;

/// A fanotify group: a queue of events and the marks that feed it.
///
/// When the last descriptor of a group is closed, the kernel answers every
/// waiting event with "go on" and ends the watch (`fanotify_release`). The
/// descriptor is close-on-exec, and a process that has one must never fork: a
/// child would keep third parties waiting for an answer that nobody gives.
#[derive(Debug)]
pub struct Group {
    fd: OwnedFd,
}

impl Group {
    /// Creates a group for permission events, which block their caller until
    /// [`respond`](Self::respond). Reads never block. Events name the waiting
    /// thread, not its process.
    ///
    /// The queue is unlimited on purpose: the kernel *allows* a permission
    /// event that does not fit (`fsnotify_insert_event` returning 2 in
    /// `fanotify_handle_event`).
    ///
    /// # Errors
    ///
    /// `EPERM` without `CAP_SYS_ADMIN` in the initial user namespace,
    /// `EMFILE` beyond 128 groups of one user, `EINVAL` or `ENOSYS` when the
    /// kernel has no permission events.
    pub fn pre_content() -> Result<Self> {
        Self::init(FAN_CLASS_PRE_CONTENT)
    }

    /// Creates a group for notifications (close events), which block nobody.
    /// They name their file by an [`Object`] and have no descriptor. A
    /// descriptor would keep the mount busy on which the file was closed, from
    /// the close until the event is read.
    ///
    /// # Errors
    ///
    /// As [`pre_content`](Self::pre_content).
    pub fn notification() -> Result<Self> {
        Self::init(FAN_CLASS_NOTIF | FAN_REPORT_FID)
    }

    /// Takes over a group that another process has made.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the descriptor is of something else.
    pub fn made_before(fd: OwnedFd) -> Result<Self> {
        let name = crate::proc::own_fd_path(fd.as_fd());
        let link = rustix::fs::readlink(&*name, Vec::new())?;
        if link.as_bytes() == b"anon_inode:[fanotify]" {
            Ok(Self { fd })
        } else {
            Err(Errno::INVAL)
        }
    }

    fn init(class: libc::c_uint) -> Result<Self> {
        let flags = class
            | FAN_CLOEXEC
            | FAN_NONBLOCK
            | FAN_UNLIMITED_QUEUE
            | FAN_UNLIMITED_MARKS
            | FAN_REPORT_TID;
        // Without O_NONBLOCK, opening a descriptor for an event would wait up
        // to 45 s for a lease on the file to go (`break_lease` in
        // `do_dentry_open`), and everybody else would wait for this process.
        let event_flags = libc::O_RDONLY
            | libc::O_CLOEXEC
            | libc::O_LARGEFILE
            | libc::O_NOATIME
            | libc::O_NONBLOCK;
        // SAFETY: fanotify_init takes two integers and touches no memory of
        // ours; unknown flags are refused with EINVAL.
        let fd = unsafe { libc::fanotify_init(flags, event_flags.cast_unsigned()) };
        if fd < 0 {
            return Err(last_errno());
        }
        // SAFETY: the kernel just gave us this descriptor and nobody else
        // knows its number.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    /// Adds `mask` to the mark on the inode behind `file`, and creates the mark
    /// if there is none.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` when the filesystem has no pre-content events (only ext4,
    /// XFS and btrfs set `SB_I_ALLOW_HSM` as of 6.18), `ENOMEM`.
    pub fn add(&self, mask: Mask, file: BorrowedFd<'_>) -> Result<()> {
        seam::check(Call::FanotifyMark)?;
        self.mark(FAN_MARK_ADD, mask, file)
    }

    /// Removes `mask` from the mark on the inode behind `file`. An empty mark
    /// is deleted.
    ///
    /// # Errors
    ///
    /// `ENOENT` when there is no mark.
    pub fn remove(&self, mask: Mask, file: BorrowedFd<'_>) -> Result<()> {
        self.mark(FAN_MARK_REMOVE, mask, file)
    }

    /// Whether the inode behind `file` has a mark of this group. Marks vanish
    /// by themselves when their inode does, for example on unmount.
    ///
    /// # Errors
    ///
    /// Any error of `fanotify_mark(2)` other than "no such mark".
    pub fn has_mark(&self, file: BorrowedFd<'_>) -> Result<bool> {
        // Removing a bit that is not set changes nothing and succeeds exactly
        // when there is a mark (fanotify_remove_mark, 6.18).
        match self.mark(FAN_MARK_REMOVE, Mask::ACCESS, file) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(other) => Err(other),
        }
    }

    /// [`remove`](Self::remove) for an `O_PATH` descriptor, which
    /// `fanotify_mark(2)` itself does not accept.
    ///
    /// # Errors
    ///
    /// As [`remove`](Self::remove).
    pub fn remove_at(&self, mask: Mask, path: BorrowedFd<'_>) -> Result<()> {
        let name = crate::proc::own_fd_path(path);
        // SAFETY: the name is a C string that outlives the call.
        let ret = unsafe {
            libc::fanotify_mark(
                self.fd.as_raw_fd(),
                FAN_MARK_REMOVE,
                mask.bits(),
                libc::AT_FDCWD,
                name.as_ptr(),
            )
        };
        crate::checked(ret).map(drop)
    }

    fn mark(&self, flags: libc::c_uint, mask: Mask, file: BorrowedFd<'_>) -> Result<()> {
        // SAFETY: a null path with a descriptor names the descriptor's own
        // inode (fanotify_mark(2)); both descriptors are borrowed for the
        // length of the call.
        let ret = unsafe {
            libc::fanotify_mark(
                self.fd.as_raw_fd(),
                flags,
                mask.bits(),
                file.as_raw_fd(),
                std::ptr::null(),
            )
        };
        crate::checked(ret).map(drop)
    }

    /// Reads the waiting events and hands each to `each`, which then owns the
    /// event's descriptor. Returns the number of events.
    ///
    /// # Errors
    ///
    /// `EAGAIN` when no event is waiting. `EPROTO` when the kernel uses a
    /// format that this parser does not know: the rest of the batch is then
    /// lost, so a gate must not go on.
    pub fn read(&self, buffer: &mut [u8], mut each: impl FnMut(Event)) -> Result<usize> {
        let length = {
            let _no_lease = no_lease();
            rustix::io::read(&self.fd, &mut *buffer)?
        };
        let mut count = 0;
        for raw in parse(&buffer[..length]) {
            let raw = raw.map_err(|Malformed| Errno::PROTO)?;
            let file = (raw.fd >= 0).then(|| {
                // SAFETY: the kernel opened this descriptor for us while
                // filling the buffer and named it in exactly this one event;
                // nothing else in the process knows the number.
                unsafe { OwnedFd::from_raw_fd(raw.fd) }
            });
            count += 1;
            each(Event {
                mask: raw.mask,
                file,
                tid: raw.tid,
                range: raw.range,
                object: raw.object,
            });
        }
        Ok(count)
    }

    /// Answers events, many with one system call: `writev(2)` hands each
    /// response to the kernel as a write of its own.
    ///
    /// A response names its event by descriptor *number*. The descriptor may be
    /// closed by then, and should be: the waiting thread still holds the file,
    /// so this descriptor is never the last reference, and closing it causes no
    /// work of the filesystem.
    ///
    /// # Errors
    ///
    /// `EINVAL` for an errno that the kernel does not deliver. A response whose
    /// event has vanished (the waiting thread was killed) is skipped.
    pub fn respond(&self, responses: &[Response]) -> Result<()> {
        let mut rest = responses;
        while !rest.is_empty() {
            // Room for IOV_MAX = 1024 is far more than a batch ever holds.
            let many = rest.len().min(256);
            let mut vectors = [std::io::IoSlice::new(&[]); 256];
            for (vector, response) in vectors.iter_mut().zip(rest) {
                *vector = std::io::IoSlice::new(&response.0);
            }
            match rustix::io::writev(&self.fd, &vectors[..many]) {
                Ok(written) => rest = &rest[(written / RESPONSE_LEN).max(1)..],
                // ENOENT: the first of these threads is no longer waiting.
                Err(Errno::NOENT) => rest = &rest[1..],
                Err(Errno::INTR) => {}
                Err(other) => return Err(other),
            }
        }
        Ok(())
    }
}

impl Group {
    /// Refuses every event that was read by a process that is gone, and not
    /// answered, as far as its descriptor had a number below `limit`. Nobody may
    /// have read an event since. Returns how many there were.
    ///
    /// The kernel keeps such events in the group, and an answer names an event by
    /// the number that the reader got (`process_access_response`,
    /// fs/notify/fanotify/fanotify_user.c). Whether that number is open does not
    /// matter.
    ///
    /// # Errors
    ///
    /// As [`respond`](Self::respond).
    pub fn refuse_unanswered(&self, limit: RawFd, errno: Errno) -> Result<usize> {
        let mut found = 0;
        for number in 0..limit {
            // Two events may have had the same number, if the process has closed a
            // descriptor before it has answered.
            loop {
                match rustix::io::write(&self.fd, &Response::deny(number, errno).0) {
                    Ok(_) => found += 1,
                    Err(Errno::NOENT) => break,
                    Err(Errno::INTR) => {}
                    Err(other) => return Err(other),
                }
            }
        }
        Ok(found)
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The number of the group that this process asks by, if it has one.
static OWN: AtomicI32 = AtomicI32::new(-1);

/// Makes [`is_own`] know a group of this process, which keeps its number.
pub fn note_own(group: BorrowedFd<'_>) {
    OWN.store(group.as_raw_fd(), SeqCst);
}

/// Whether a descriptor of another process is of the group of this process:
/// whoever started it keeps a copy.
#[must_use]
pub fn is_own(pid: i32, fd: RawFd) -> bool {
    let own = OWN.load(SeqCst);
    let this = std::process::id().cast_signed();
    own >= 0 && crate::kcmp::same_description((this, own), (pid, fd))
}

/// One event as read from a group.
#[derive(Debug)]
pub struct Event {
    /// What happened or is about to happen.
    pub mask: Mask,
    /// The file, opened by the kernel with `FMODE_NONOTIFY`, so that its use
    /// through this descriptor raises no events. `None` on overflow, and in
    /// notifications.
    pub file: Option<OwnedFd>,
    /// The waiting thread, in the reader's PID namespace; 0 if it is outside of
    /// that.
    pub tid: i32,
    /// The byte range `(offset, count)` of a pre-content event, extended to
    /// whole pages. A count of 0 occurs with truncation and means no range.
    pub range: Option<(u64, u64)>,
    /// The file of a notification.
    pub object: Option<Object>,
}

/// Identifies an inode among all mounted filesystems, as notifications do: by
/// the id of the filesystem, and a `struct file_handle` without its padding.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Object(Vec<u8>);

impl Object {
    /// The name that notifications will have for an open file.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` when the filesystem has no file handles.
    pub fn of(file: BorrowedFd<'_>) -> Result<Self> {
        let mut stat = std::mem::MaybeUninit::<libc::statfs>::zeroed();
        // SAFETY: `stat` is ours for the call, and as large as the kernel
        // fills it.
        crate::checked(unsafe { libc::fstatfs(file.as_raw_fd(), stat.as_mut_ptr()) })?;
        // SAFETY: all zeros are a valid value of it, and the call filled it.
        let stat = unsafe { stat.assume_init() };
        // SAFETY: an fsid is two integers; libc only hides them.
        let fsid: [u8; 8] = unsafe { std::mem::transmute(stat.f_fsid) };
        let handle = crate::file_handle::of(file)?;
        Ok(Self::new(fsid, handle.kind, &handle.bytes))
    }

    fn new(fsid: [u8; 8], kind: i32, handle: &[u8]) -> Self {
        Self([&fsid[..], &kind.to_ne_bytes(), handle].concat())
    }
}

const RESPONSE_LEN: usize = 8;

/// The answer to one permission event.
#[derive(Clone, Copy, Debug)]
pub struct Response([u8; RESPONSE_LEN]);

impl Response {
    /// Lets the operation go on.
    #[must_use]
    pub fn allow(event_fd: RawFd) -> Self {
        Self::new(event_fd, FAN_ALLOW)
    }

    /// Refuses with `errno`. The kernel delivers only `EPERM`, `EIO`, `EBUSY`,
    /// `ETXTBSY`, `EAGAIN`, `ENOSPC` and `EDQUOT`.
    #[must_use]
    pub fn deny(event_fd: RawFd, errno: Errno) -> Self {
        let errno = errno.raw_os_error().cast_unsigned() & 0xff;
        Self::new(event_fd, FAN_DENY | (errno << 24))
    }

    fn new(event_fd: RawFd, response: u32) -> Self {
        let mut bytes = [0; RESPONSE_LEN];
        bytes[..4].copy_from_slice(&event_fd.to_ne_bytes());
        bytes[4..].copy_from_slice(&response.to_ne_bytes());
        Self(bytes)
    }
}

/// An event as it lies in the buffer, with its descriptor still a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawEvent {
    /// See [`Event::mask`].
    pub mask: Mask,
    /// The descriptor number, or a negative number.
    pub fd: i32,
    /// See [`Event::tid`].
    pub tid: i32,
    /// See [`Event::range`].
    pub range: Option<(u64, u64)>,
    /// See [`Event::object`].
    pub object: Option<Object>,
}

/// The buffer is not in the format of `fanotify(7)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// Parses a buffer of events; stops after the first malformed one.
pub fn parse(bytes: &[u8]) -> impl Iterator<Item = std::result::Result<RawEvent, Malformed>> {
    let mut rest = Some(bytes).filter(|bytes| !bytes.is_empty());
    std::iter::from_fn(move || {
        let bytes = rest?;
        match parse_one(bytes) {
            Ok((event, length)) => {
                rest = Some(&bytes[length..]).filter(|bytes| !bytes.is_empty());
                Some(Ok(event))
            }
            Err(malformed) => {
                rest = None;
                Some(Err(malformed))
            }
        }
    })
}

fn parse_one(bytes: &[u8]) -> std::result::Result<(RawEvent, usize), Malformed> {
    let length = u32_at(bytes, 0)? as usize;
    let version = *bytes.get(4).ok_or(Malformed)?;
    let metadata_len = usize::from(u16_at(bytes, 6)?);
    if version != METADATA_VERSION || metadata_len < METADATA_LEN || length < metadata_len {
        return Err(Malformed);
    }
    let event = bytes.get(..length).ok_or(Malformed)?;
    let mut range = None;
    let mut object = None;
    let mut info = &event[metadata_len..];
    while !info.is_empty() {
        let kind = info[0];
        let info_len = usize::from(u16_at(info, 2)?);
        if info_len < INFO_HEADER_LEN || info_len > info.len() {
            return Err(Malformed);
        }
        if kind == INFO_TYPE_RANGE {
            if info_len < INFO_RANGE_LEN {
                return Err(Malformed);
            }
            range = Some((u64_at(info, 8)?, u64_at(info, 16)?));
        }
        if kind == INFO_TYPE_FID {
            let info = &info[..info_len];
            let (fsid, length) = (array_at(info, 4)?, u32_at(info, 12)? as usize);
            let handle_kind = u32_at(info, 16)?.cast_signed();
            let handle = info.get(20..).and_then(|rest| rest.get(..length));
            object = Some(Object::new(fsid, handle_kind, handle.ok_or(Malformed)?));
        }
        info = &info[info_len..];
    }
    let event = RawEvent {
        mask: Mask::from_bits(u64_at(event, 8)?),
        fd: u32_at(event, 16)?.cast_signed(),
        tid: u32_at(event, 20)?.cast_signed(),
        range,
        object,
    };
    Ok((event, length))
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> std::result::Result<[u8; N], Malformed> {
    bytes
        .get(at..at + N)
        .and_then(|slice| slice.try_into().ok())
        .ok_or(Malformed)
}

fn u16_at(bytes: &[u8], at: usize) -> std::result::Result<u16, Malformed> {
    array_at(bytes, at).map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> std::result::Result<u32, Malformed> {
    array_at(bytes, at).map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> std::result::Result<u64, Malformed> {
    array_at(bytes, at).map(u64::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode(event: &RawEvent) -> Vec<u8> {
        let mut bytes = Vec::new();
        let object = event.object.as_ref().map(|object| &object.0);
        // The id, then kind and bytes of a handle, which is padded.
        let object_len = |object: &Vec<u8>| (object.len() + 8).next_multiple_of(4);
        let length =
            METADATA_LEN + event.range.map_or(0, |_| INFO_RANGE_LEN) + object.map_or(0, object_len);
        bytes.extend(u32::try_from(length).unwrap().to_ne_bytes());
        bytes.extend([METADATA_VERSION, 0]);
        bytes.extend(u16::try_from(METADATA_LEN).unwrap().to_ne_bytes());
        bytes.extend(event.mask.bits().to_ne_bytes());
        bytes.extend(event.fd.to_ne_bytes());
        bytes.extend(event.tid.to_ne_bytes());
        if let Some((offset, count)) = event.range {
            bytes.extend([INFO_TYPE_RANGE, 0]);
            bytes.extend(u16::try_from(INFO_RANGE_LEN).unwrap().to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(offset.to_ne_bytes());
            bytes.extend(count.to_ne_bytes());
        }
        if let Some(object) = object {
            bytes.extend([INFO_TYPE_FID, 0]);
            bytes.extend(u16::try_from(object_len(object)).unwrap().to_ne_bytes());
            bytes.extend(&object[..8]);
            bytes.extend(u32::try_from(object.len() - 12).unwrap().to_ne_bytes());
            bytes.extend(&object[8..]);
            bytes.resize(length, 0);
        }
        bytes
    }

    fn any_event() -> impl Strategy<Value = RawEvent> {
        let range = proptest::option::of((any::<u64>(), any::<u64>()));
        let handle = proptest::collection::vec(any::<u8>(), 0..30);
        let object = (any::<[u8; 8]>(), any::<i32>(), handle)
            .prop_map(|(fsid, kind, handle)| Object::new(fsid, kind, &handle));
        let object = proptest::option::of(object);
        (any::<u64>(), any::<i32>(), any::<i32>(), range, object).prop_map(
            |(mask, fd, tid, range, object)| RawEvent {
                mask: Mask::from_bits(mask),
                fd,
                tid,
                range,
                object,
            },
        )
    }

    proptest! {
        #[test]
        fn events_survive_a_round_trip(events in proptest::collection::vec(any_event(), 0..20)) {
            let bytes: Vec<u8> = events.iter().flat_map(encode).collect();
            let parsed: Vec<_> = parse(&bytes).collect();
            prop_assert_eq!(parsed, events.into_iter().map(Ok).collect::<Vec<_>>());
        }

        #[test]
        fn any_bytes_end_the_parse(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            // Neither a panic nor an endless loop: every event takes bytes.
            prop_assert!(parse(&bytes).count() <= bytes.len() / METADATA_LEN + 1);
        }

        #[test]
        fn a_cut_buffer_is_malformed(event in any_event(), cut in 1usize..24) {
            let bytes = encode(&event);
            let parsed: Vec<_> = parse(&bytes[..bytes.len() - cut]).collect();
            prop_assert_eq!(parsed, vec![Err(Malformed)]);
        }
    }

    #[test]
    fn a_denial_carries_its_errno() {
        let Response(bytes) = Response::deny(5, Errno::TXTBSY);
        assert_eq!(bytes[..4], 5i32.to_ne_bytes());
        // FAN_DENY_ERRNO(ETXTBSY) of include/uapi/linux/fanotify.h, 6.14.
        assert_eq!(bytes[4..], 0x1a00_0002u32.to_ne_bytes());
    }
}
