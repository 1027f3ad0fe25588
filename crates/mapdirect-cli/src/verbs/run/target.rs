//! Looking at a thread that waits for an answer.
//!
//! Its number is that thread's only as long as it waits: who has looked asks
//! whether it still does, before anything is done by what was seen.

use super::filter::{Convention, Subject};
use super::open::RightsOf;
use mapdirect_sys::seccomp::Call;
use mapdirect_sys::{Errno, kcmp, pidfd, proc};
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;

const PROT_EXEC: u64 = 4;
const MAP_TYPE: u64 = 0xf;
const MAP_ANONYMOUS: u64 = 0x20;
const MAP_PRIVATE: u64 = 2;

/// A thread that is supervised.
#[derive(Debug)]
pub(crate) struct Target {
    tid: i32,
    /// The thread, or its process where the kernel has no pidfds of threads.
    pidfd: OwnedFd,
}

impl Target {
    /// # Errors
    ///
    /// `ESRCH` when it is not visible here, `ENOTSUP` when it has descriptors
    /// apart from its process and the kernel is older than Linux 6.9.
    pub(crate) fn new(tid: i32) -> Result<Self, Errno> {
        let pidfd = match pidfd::of_thread(tid) {
            Err(Errno::INVAL) if tid > 0 => Self::process_of(tid)?,
            opened => opened?,
        };
        Ok(Self { tid, pidfd })
    }

    /// The process of a thread whose descriptors are those of its process.
    fn process_of(tid: i32) -> Result<OwnedFd, Errno> {
        if let Ok(process) = pidfd::of_process(tid) {
            return Ok(process);
        }
        let status = proc::read_task_file(tid, "status")?;
        let process = status
            .lines()
            .find_map(|line| line.strip_prefix("Tgid:"))
            .and_then(|number| number.trim().parse().ok())
            .ok_or(Errno::SRCH)?;
        if !kcmp::same_descriptors(tid, process) {
            return Err(Errno::NOTSUP);
        }
        pidfd::of_process(process)
    }

    /// A duplicate of one of its descriptors.
    pub(crate) fn descriptor(&self, number: i32) -> Result<OwnedFd, Errno> {
        pidfd::descriptor(&self.pidfd, number)
    }

    /// A file below its directory in `/proc`.
    pub(crate) fn file(&self, name: &str) -> String {
        format!("/proc/{}/{name}", self.tid)
    }

    /// What it may open.
    pub(crate) fn rights(&self) -> Result<RightsOf, Errno> {
        RightsOf::read(self.tid)
    }

    /// Reads a path from its memory.
    pub(crate) fn text(&self, address: u64) -> Result<OsString, Errno> {
        const PATH_MAX: usize = 4096;
        let mut text = Vec::new();
        while text.len() < PATH_MAX {
            // The next page may not be there.
            let at = address.checked_add(text.len() as u64).ok_or(Errno::FAULT)?;
            let left = 256 - usize::try_from(at % 256).unwrap_or(0);
            let mut part = vec![0; left];
            self.read(at, &mut part)?;
            if let Some(end) = part.iter().position(|byte| *byte == 0) {
                text.extend_from_slice(&part[..end]);
                return Ok(OsString::from_vec(text));
            }
            text.extend(part);
        }
        Err(Errno::NAMETOOLONG)
    }

    /// Reads its memory.
    pub(crate) fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        let read = File::open(format!("/proc/{}/mem", self.tid))
            .and_then(|memory| memory.read_exact_at(buffer, address));
        read.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::FAULT))
    }

    /// The mapping that it asks for; nothing if no file is mapped so.
    pub(crate) fn mapping(
        &self,
        convention: &Convention,
        subject: Subject,
        call: &Call,
    ) -> Result<Option<Mapping>, Errno> {
        let arguments = match subject {
            Subject::OldMap => {
                let mut bytes = [0; 24];
                self.read(call.arguments[0], &mut bytes)?;
                let words = bytes.chunks_exact(4).map(|word| {
                    let mut number = [0; 4];
                    number.copy_from_slice(word);
                    u64::from(u32::from_ne_bytes(number))
                });
                let mut arguments = [0; 6];
                for (argument, word) in arguments.iter_mut().zip(words) {
                    *argument = word;
                }
                arguments
            }
            _ => call.arguments,
        };
        let [_, length, protection, flags, descriptor, offset] = arguments;
        let unit = if subject == Subject::OldMap {
            1
        } else {
            convention.mmap_unit
        };
        let kind = flags & MAP_TYPE;
        if flags & MAP_ANONYMOUS != 0 || kind == MAP_PRIVATE && protection & PROT_EXEC != 0 {
            return Ok(None);
        }
        // The kernel takes the lower half of the register for it.
        #[expect(clippy::cast_possible_truncation, reason = "so does the kernel")]
        let descriptor = descriptor as u32 as i32;
        let start = offset.saturating_mul(unit);
        Ok(Some(Mapping {
            descriptor,
            start,
            end: start.saturating_add(length),
        }))
    }
}

/// A mapping of a file, as it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) descriptor: i32,
    /// The first byte of the file.
    pub(crate) start: u64,
    /// The byte behind the last one.
    pub(crate) end: u64,
}
