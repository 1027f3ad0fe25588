//! Files that somebody may pin for a while, because root said so.
//!
//! A file is known by its inode and its handle, which contains the generation of
//! the inode: the next file with the same number has another. Nothing is kept
//! open, so no mount is busy.

use super::claims::Right;
use crate::Errno;
use crate::grant::{refusal, system};
use crate::table::InodeId;
use mapdirect_proto::status::Armed as Shown;
use mapdirect_proto::{ArmRequest, Reason, Refusal, Who};
use mapdirect_sys::file_handle::{self, FileHandle};
use mapdirect_sys::proc;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The most files that are armed at a time, counted for each user or group.
const MOST: usize = 1024;
/// The longest time.
const LONGEST: u32 = 24 * 60 * 60;

/// The name of the rule by which pins of armed files are counted. No rule of a
/// policy can have this name.
pub(super) const RULE: &str = "(armed)";

/// One permission.
#[derive(Clone, Debug)]
struct Armed {
    id: InodeId,
    handle: FileHandle,
    path: String,
    who: Who,
    range: Range<u64>,
    until: Instant,
}

/// Everything that is armed.
#[derive(Debug, Default)]
pub(crate) struct Arms(Mutex<Vec<Armed>>);

pub(crate) fn arm_refused(errno: Errno, obstacle: impl Into<String>, mend: &str) -> Refusal {
    let reason = if errno == Errno::AGAIN {
        Reason::Limit
    } else {
        Reason::Arguments
    };
    refusal(reason, errno, obstacle, mend)
}

fn meant(who: Who, uid: u32, groups: &[u32]) -> bool {
    match who {
        Who::User(user) => user == uid,
        Who::Group(group) => groups.contains(&group),
    }
}

impl Arms {
    /// What is armed now.
    fn lock(&self) -> MutexGuard<'_, Vec<Armed>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        all.retain(|armed| armed.until > now);
        all
    }

    /// Whether anything is armed for a user or member of these groups.
    pub(super) fn name(&self, uid: u32, groups: &[u32]) -> bool {
        self.lock()
            .iter()
            .any(|armed| meant(armed.who, uid, groups))
    }

    /// Arms a file. An earlier permission for the same user or group is replaced.
    pub(crate) fn arm(&self, request: &ArmRequest, file: BorrowedFd<'_>) -> Result<(), Refusal> {
        if request.seconds == 0 || request.seconds > LONGEST {
            return Err(arm_refused(
                Errno::INVAL,
                format!(
                    "{} seconds is not a time to arm a file for",
                    request.seconds
                ),
                "give 1 to 86400 seconds; a rule of the policy has no end",
            ));
        }
        let end = match request.length {
            0 => Some(u64::MAX),
            length => request.offset.checked_add(length),
        };
        let end = end.ok_or_else(|| {
            arm_refused(
                Errno::OVERFLOW,
                "the range ends beyond the largest file",
                "give a smaller range",
            )
        })?;
        let (id, handle) = identify(file)?;
        // Pins are of whole blocks.
        let statfs = rustix::fs::fstatfs(file).map_err(|errno| system("fstatfs", errno))?;
        let block = u64::try_from(statfs.f_bsize).unwrap_or(1).max(1);
        let start = request.offset - request.offset % block;
        let end = end.checked_next_multiple_of(block).unwrap_or(u64::MAX);
        let armed = Armed {
            id,
            handle,
            path: proc::path_of(file),
            who: request.who,
            range: start..end,
            until: Instant::now() + Duration::from_secs(request.seconds.into()),
        };
        let mut all = self.lock();
        all.retain(|other| (other.id, other.who) != (id, request.who));
        if all.len() >= MOST {
            return Err(arm_refused(
                Errno::AGAIN,
                format!("{MOST} files are armed already"),
                "disarm some, or wait until their time is over",
            ));
        }
        all.push(armed);
        Ok(())
    }

    /// Takes back every permission for a file.
    pub(crate) fn disarm(&self, file: BorrowedFd<'_>) -> Result<(), Refusal> {
        let (id, _) = identify(file)?;
        let mut all = self.lock();
        let before = all.len();
        all.retain(|armed| armed.id != id);
        if all.len() == before {
            return Err(arm_refused(
                Errno::NOENT,
                "the file is not armed",
                "see what is: mapdirect status",
            ));
        }
        Ok(())
    }

    /// What a user may do to a file.
    pub(super) fn rights(&self, file: BorrowedFd<'_>, uid: u32, groups: &[u32]) -> Vec<Right> {
        let mut all = self.lock().clone();
        all.retain(|armed| meant(armed.who, uid, groups));
        if all.is_empty() {
            return Vec::new();
        }
        let Ok((id, handle)) = identify(file) else {
            return Vec::new();
        };
        all.into_iter()
            .filter(|armed| (armed.id, &armed.handle) == (id, &handle))
            .map(|armed| Right::armed(armed.range))
            .collect()
    }

    pub(crate) fn status(&self) -> Vec<Shown> {
        let now = Instant::now();
        self.lock()
            .iter()
            .map(|armed| Shown {
                device: armed.id.device(),
                inode: armed.id.inode,
                path: armed.path.clone(),
                who: armed.who,
                range: armed.range.clone(),
                left: armed.until.saturating_duration_since(now).as_secs(),
            })
            .collect()
    }
}

fn identify(file: BorrowedFd<'_>) -> Result<(InodeId, FileHandle), Refusal> {
    super::door::require_local_file(file)?;
    let stat = rustix::fs::fstat(file).map_err(|errno| system("fstat", errno))?;
    let handle = file_handle::of(file).map_err(|errno| system("name_to_handle_at", errno))?;
    Ok((InodeId::from(&stat), handle))
}

/// The name of [`RULE`] for pins to share.
pub(super) fn rule() -> Arc<str> {
    Arc::from(RULE)
}
