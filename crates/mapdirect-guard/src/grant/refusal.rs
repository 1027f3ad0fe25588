//! Why a pin is not granted.

use crate::Errno;
use crate::bounded::Stuck;
use crate::busy::Busy;
use mapdirect_model::facts::Obstacle;
use mapdirect_proto::{Reason, Refusal};

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

pub(super) fn system(call: &str, errno: Errno) -> Refusal {
    refusal(Reason::System, errno, format!("{call} failed: {errno}"), "")
}

pub(super) fn obstructed(obstacle: Obstacle) -> Refusal {
    refusal(
        obstacle.kind.into(),
        obstacle.errno,
        obstacle.text,
        obstacle.mend,
    )
}

pub(super) fn still_changing(busy: &[Busy]) -> Result<(), Refusal> {
    if busy.is_empty() {
        return Ok(());
    }
    let who: Vec<_> = busy
        .iter()
        .take(4)
        .map(|busy| format!("thread {} ({}) is {}", busy.tid, busy.command, busy.doing))
        .collect();
    // None of them is an opener: it is not known whether they have it open.
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

pub(super) fn stuck(stuck: Stuck) -> Refusal {
    refusal(
        Reason::StillChanging,
        Errno::TXTBSY,
        stuck.obstacle(),
        "try again when that is over; if it hangs, end it, or what it waits for",
    )
}
