//! Why a pin is not granted.

use crate::Errno;
use crate::bounded::Stuck;
use crate::busy::Busy;
use crate::openers::Openers;
use crate::table::LOCK_BASE;
use mapdirect_model::facts::Obstacle;
use mapdirect_proto::{Reason, Refusal};
use mapdirect_sys::fcntl::conflicting_lock;
use mapdirect_sys::proc;
use std::os::fd::BorrowedFd;

pub(crate) fn refusal(
    reason: Reason,
    errno: Errno,
    obstacle: impl Into<String>,
    mend: impl Into<String>,
) -> Refusal {
    Refusal {
        errno: errno.raw_os_error(),
        reason,
        obstacle: obstacle.into(),
        mend: mend.into(),
        openers: Vec::new(),
    }
}

pub(crate) fn system(call: &str, errno: Errno) -> Refusal {
    refusal(Reason::System, errno, format!("{call} failed: {errno}"), "")
}

pub(crate) fn obstructed(obstacle: Obstacle) -> Refusal {
    refusal(
        obstacle.kind.into(),
        obstacle.errno,
        obstacle.text,
        obstacle.mend,
    )
}

pub(crate) fn still_changing(busy: &[Busy]) -> Result<(), Refusal> {
    if busy.is_empty() {
        return Ok(());
    }
    let who: Vec<_> = busy
        .iter()
        .take(4)
        .map(|busy| format!("thread {} ({}) is {}", busy.tid, busy.command, busy.doing))
        .collect();
    // These threads are not reported as openers: nobody knows whether they have
    // the file open.
    Err(refusal(
        Reason::StillChanging,
        Errno::TXTBSY,
        format!(
            "somebody may be in the middle of changing it: {}",
            who.join(", ")
        ),
        "try again when that is over, or ask with more patience",
    ))
}

pub(crate) fn stuck(stuck: Stuck) -> Refusal {
    refusal(
        Reason::StillChanging,
        Errno::TXTBSY,
        stuck.obstacle(),
        "try again when that is over; if it hangs, end it, or what it waits for",
    )
}

/// The refusal for a lock on a byte of a file that could not be taken.
pub(crate) fn lock_refused(file: BorrowedFd<'_>, errno: Errno, byte: u64) -> Refusal {
    if errno != Errno::AGAIN {
        return system("F_OFD_SETLK", errno);
    }
    let holder = conflicting_lock(file, byte, 1)
        .ok()
        .flatten()
        .and_then(|lock| lock.pid);
    let who = holder.map_or_else(
        || String::from("somebody"),
        |pid| format!("pid {pid} ({})", proc::command(pid)),
    );
    refusal(
        Reason::Locked,
        Errno::TXTBSY,
        format!("{who} holds an exclusive record lock to the end of all offsets"),
        format!("lock no further than byte {LOCK_BASE} (2^62), where pins are marked"),
    )
}

/// Refuses a file that is being executed, because a gate switches off the
/// kernel's own protection of running programs.
pub(crate) fn refuse_executed(found: &Openers) -> Result<(), Refusal> {
    let Some(opener) = &found.executing else {
        return Ok(());
    };
    Err(Refusal {
        openers: vec![opener.clone()],
        ..refusal(
            Reason::Executing,
            Errno::TXTBSY,
            format!("pid {} ({}) is executing it", opener.pid, opener.command),
            "end that program first",
        )
    })
}

/// The refusal when nobody waits for the answer any more.
pub(crate) fn gone() -> Refusal {
    refusal(Reason::Protocol, Errno::PIPE, "the client is gone", "")
}
