//! Has pins of strength stable give way for a while, so that their own holder
//! can shrink or punch the file.
//!
//! What a pin gives way in is neither refused nor held: whatever becomes of
//! blocks there is no breach. When that is over, the gate refuses again first.
//! Then everybody is waited for who may be in the middle of something that it
//! let pass, and only then is the block map read again.

use super::allocate::judge_again;
use super::pending::lock;
use super::{Granting, refusal, system};
use crate::ledger::PinSet;
use crate::table::{InodeId, Pin, Watched};
use crate::tripwire::look_now;
use crate::wake::Backoff;
use crate::{Errno, Guard};
use mapdirect_proto::{PinRequest, Reason, Refusal, YieldRequest};
use mapdirect_sys::names;
use mapdirect_sys::unix::Sender;
use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long others may take to finish with the same file.
const PATIENCE: Duration = Duration::from_secs(10);

/// Pins that give way.
#[derive(Debug)]
pub(crate) struct GivenWay {
    watched: Arc<Watched>,
    pins: Vec<Arc<Pin>>,
    range: Range<u64>,
    /// A description of the file.
    file: OwnedFd,
}

/// Has every pin of strength stable that `owner` asked for on a file give way in
/// a range.
pub(crate) fn give_way(
    guard: &Guard,
    request: YieldRequest,
    file: OwnedFd,
    owner: Sender,
) -> Result<GivenWay, Refusal> {
    let stat = rustix::fs::fstat(&file).map_err(|errno| system("fstat", errno))?;
    let range = range_of(request, u64::try_from(stat.st_blksize).unwrap_or(1))?;
    let Some(watched) = guard.table.get(InodeId::from(&stat)) else {
        return Err(no_pin());
    };
    // A holder that is quick has its pin before the guard has let go of it.
    let mut backoff = Backoff::until(
        Instant::now() + PATIENCE,
        Duration::from_micros(50),
        Duration::from_millis(5),
    );
    let (state, pins) = loop {
        let state = lock(&watched, PATIENCE)?;
        let pins = watched.pins.load_full();
        let under_way = pins
            .iter()
            .any(|pin| is_own(pin, owner) && pin.overlaps(&range) && pin.is_being_granted());
        if !under_way || backoff.is_over() {
            break (state, pins);
        }
        drop(state);
        backoff.pause();
    };
    let pins = own_pins(guard, &watched, &pins, &range, &file, owner)?;
    if pins.is_empty() || state.retired {
        return Err(no_pin());
    }
    let given = GivenWay {
        watched: Arc::clone(&watched),
        pins,
        range,
        file,
    };
    for pin in &given.pins {
        let _looking = watched.look();
        pin.begin_to_give_way(&given.range);
    }
    if let Err(errno) = guard.gate.publish(guard, &watched) {
        drop(state);
        given.hold_again(guard);
        return Err(system("telling the gate", errno));
    }
    guard
        .audit
        .gives_way(format!("{given} give way for process {}", owner.pid));
    Ok(given)
}

/// The pins that shall give way; or why they may not.
fn own_pins(
    guard: &Guard,
    watched: &Watched,
    pins: &PinSet<Pin>,
    range: &Range<u64>,
    file: &OwnedFd,
    owner: Sender,
) -> Result<Vec<Arc<Pin>>, Refusal> {
    let mut own = Vec::new();
    for pin in pins
        .iter()
        .filter(|pin| !pin.is_dead() && pin.overlaps(range))
    {
        let is_own = is_own(pin, owner);
        if is_own && pin.follows() && pin.is_handed_over() {
            own.push(Arc::clone(pin));
        } else if pin.settled().is_some() && guard.gate.has_ended(pin, file.as_fd()) {
            // Only the notice of its end has not arrived yet.
            guard.gate.end(watched, pin);
        } else {
            let obstacle = if !is_own {
                format!("process {} has something of it pinned, too", pin.pid)
            } else if pin.follows() {
                String::from("a pin there is still being granted")
            } else {
                String::from("a pin of strength all does not give way")
            };
            return Err(refusal(
                Reason::FrozenBlocks,
                Errno::TXTBSY,
                obstacle,
                "have that pin end first",
            ));
        }
    }
    Ok(own)
}

fn is_own(pin: &Pin, owner: Sender) -> bool {
    pin.pid == owner.pid && pin.uid == owner.uid
}

fn no_pin() -> Refusal {
    refusal(
        Reason::Arguments,
        Errno::INVAL,
        "this process has asked for no pin of strength stable there",
        "name a range that it has pinned",
    )
}

/// The range, extended to whole blocks.
fn range_of(request: YieldRequest, block: u64) -> Result<Range<u64>, Refusal> {
    let block = block.max(1);
    let start = request.offset - request.offset % block;
    let end = match request.length {
        PinRequest::WITHOUT_END => Some(u64::MAX),
        length => request
            .offset
            .checked_add(length)
            .and_then(|end| end.checked_next_multiple_of(block)),
    };
    end.filter(|end| request.length > 0 && *end > start)
        .map(|end| start..end)
        .ok_or_else(|| {
            refusal(
                Reason::Arguments,
                Errno::INVAL,
                "the range is empty, or ends beyond the largest file",
                "give a range of at least one byte",
            )
        })
}

impl fmt::Display for GivenWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<String> = self.pins.iter().map(|pin| pin.id.to_string()).collect();
        let range = &self.range;
        write!(f, "in bytes {} to ", range.start)?;
        match range.end {
            u64::MAX => f.write_str("the end")?,
            end => write!(f, "{end}")?,
        }
        let path = names::told(&self.watched.path, true);
        write!(f, " of {path} the pins {}", numbers.join(", "))
    }
}

impl GivenWay {
    /// Has the pins hold what is there now. If somebody does not finish in time
    /// with what the gate let pass, it stays unknown what becomes of the blocks
    /// in the range: the gate refuses again, but they are not held.
    pub(crate) fn hold_again(self, guard: &Guard) {
        guard.audit.gives_way(format!("{self} hold again"));
        let Self {
            watched,
            pins,
            range,
            file,
        } = self;
        // Without the lock another grant would only read an older map.
        let _state = lock(&watched, PATIENCE).ok();
        for pin in &pins {
            pin.refuse_again(&range);
        }
        // If this fails, the gate refuses less than it should: the tripwire
        // notices what comes of it.
        let _ = guard.gate.publish(guard, &watched);
        for pin in pins.iter().filter(|pin| !pin.is_dead()) {
            let Ok(judged) = judge_again(guard, pin, file.as_fd()) else {
                continue;
            };
            let granting = Granting {
                guard,
                judged: &judged,
                watched: &watched,
                pin,
                patience: PATIENCE,
            };
            let quiet = granting.quietly(file.as_fd(), |quiet| quiet.wait_for_changes());
            if quiet.is_ok() {
                pin.hold_again(&range);
                look_now(guard, &watched, pin, file.as_fd());
            }
        }
    }
}
