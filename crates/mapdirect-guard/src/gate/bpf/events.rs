//! Handles the events of the programs: refusals, and beginnings and ends of
//! pins.

use super::abi::{self, Event};
use super::{Gate, Proof};
use crate::audit::actor::Sight;
use crate::audit::{self, Refused, Who};
use crate::policy::{Operation, RULES};
use crate::table::Watched;
use crate::{Errno, Guard};
use libbpf_rs::RingBufferBuilder;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use zerocopy::FromBytes;

/// Reads the events and watches the gate until the guard stops. `say` tells the
/// operator of the guard what somebody has done to the gate.
///
/// # Errors
///
/// When events cannot be read any more.
pub(crate) fn run(guard: &Guard, gate: &Gate, say: &dyn Fn(&str)) -> Result<(), Errno> {
    let maps = &gate.loaded.maps;
    let heard = |bytes: &[u8]| {
        if let Ok(event) = Event::read_from_bytes(bytes) {
            take(guard, gate, &event);
        }
        0
    };
    let mut builder = RingBufferBuilder::new();
    for map in [&maps.changes, &maps.events] {
        builder
            .add(map, heard)
            .map_err(|error| super::errno(&error))?;
    }
    let ring = builder.build().map_err(|error| super::errno(&error))?;
    let mut untold = gate.counted(abi::UNTOLD);
    // Ends from before anybody listened.
    end_untold(guard, gate);
    while !guard.is_stopping() {
        // Signals are not handled here.
        let _ = ring.poll(Duration::from_millis(100));
        let now = gate.counted(abi::UNTOLD);
        if now != untold {
            untold = now;
            end_untold(guard, gate);
        }
        gate.tend_dormant(guard);
        gate.rest();
        if !guard.is_stopping() {
            gate.watch(guard, say);
        }
        guard.pulse.gate_beats();
    }
    guard.pulse.gate_is_over();
    Ok(())
}

/// Ends the pins whose ends could not be reported.
fn end_untold(guard: &Guard, gate: &Gate) {
    for watched in guard.table.all() {
        end_what_is_over(guard, gate, &watched);
    }
}

/// Ends the pins of an inode that are over.
pub(super) fn end_what_is_over(guard: &Guard, gate: &Gate, watched: &Arc<Watched>) {
    let pins = watched.pins.load_full();
    for pin in pins.iter().filter(|pin| !pin.is_being_granted()) {
        if gate.is_over(pin.id) {
            end(guard, gate, watched, pin.id);
        }
    }
}

fn take(guard: &Guard, gate: &Gate, event: &Event) {
    let id = event.key.inode();
    let watched = guard.table.get(id);
    match event.kind_of_event {
        abi::EVENT_ENDED => match watched {
            Some(watched) => end(guard, gate, &watched, event.pin),
            None => gate.clean(id, event.pin),
        },
        abi::EVENT_RAW => {
            if let Some(watched) = watched {
                begin(gate, &watched, event);
            }
        }
        abi::EVENT_REFUSED => note(guard, watched.as_deref(), event),
        // If this fails, such writes stay refused.
        abi::EVENT_DOUBT => drop(gate.note_writes(id)),
        _ => {}
    }
}

/// The name of the command, made safe for a terminal, because any process
/// chooses its own name.
pub(super) fn command_of(event: &Event) -> String {
    let length = event.command.iter().position(|byte| *byte == 0);
    let command = &event.command[..length.unwrap_or(event.command.len())];
    mapdirect_sys::proc::printable(&String::from_utf8_lossy(command))
}

fn note(guard: &Guard, watched: Option<&Watched>, event: &Event) {
    let kind = usize::try_from(event.kind).unwrap_or(usize::MAX);
    let Some(rule) = RULES.get(kind) else {
        return;
    };
    guard.audit.judged();
    if let Some(watched) = watched {
        watched.refused[rule.kind as usize].fetch_add(1, SeqCst);
    }
    let range = event.start..event.end;
    let operation = Operation::new(rule.kind, range);
    guard.audit.refused(Refused {
        time: audit::now(),
        who: Who::Thread {
            tid: event.tid.cast_signed(),
            pid: event.tgid.cast_signed(),
            command: command_of(event),
            sight: Some(Sight::Then {
                began: event.began,
                program: (event.program.dev != 0).then(|| event.program.inode()),
            }),
        },
        kind: rule.kind,
        operation: rule.name,
        call: None,
        id: event.key.inode(),
        // What the size was is not known here, and hardly matters for which pin
        // it was.
        met: watched.and_then(|watched| watched.met_by(&operation, 0)),
        path: watched.map_or_else(Arc::default, |watched| Arc::clone(&watched.path)),
        range: (event.end != u64::MAX || event.start > 0).then_some(event.start..event.end),
    });
}

/// Handles a process that has mapped pinned blocks by mmap(2) alone. The blocks
/// stay pinned as they are for as long as that file lives.
fn begin(gate: &Gate, watched: &Arc<Watched>, event: &Event) {
    let sleeping = gate.sleeping(watched.id);
    let pins = watched.pins.load_full();
    let pid = event.tgid.cast_signed();
    for pin in pins
        .iter()
        .chain(&sleeping)
        .filter(|pin| pin.id != event.pin && pin.meets(&(event.start..event.end)))
    {
        let joined = Arc::new(pin.joined(event.pin, pid));
        let handle = {
            let shard = gate.shard(watched.id);
            let published = shard.lock().unwrap_or_else(PoisonError::into_inner);
            published
                .get(&watched.id)
                .and_then(|published| published.handle.clone())
        };
        if let Some(handle) = handle {
            // If this fails, only a later guard misses the pin.
            let _ = gate.remember(watched, &joined, event.file, &handle, Proof::NONE);
        }
        // The pin may have ended by now, and its end may be the next event. If
        // it ended before it was remembered here, nobody has noted the end in
        // what is remembered. The programs remove a freed struct file from
        // `holders` and then note the end; this code remembers the pin and then
        // looks for it in `holders`, so that one side sees the other.
        if matches!(gate.pin_at(event.file), Ok(pin) if pin != Some(event.pin)) {
            gate.drop_facts(event.pin);
            continue;
        }
        watched.add(&joined);
    }
    let _ = gate.publish(watched);
}

/// Handles the end of a pin.
fn end(guard: &Guard, gate: &Gate, watched: &Arc<Watched>, pin: u64) {
    if gate.is_kept_after_end(watched, pin) {
        return;
    }
    for ended in watched.pins.load().iter().filter(|other| other.id == pin) {
        ended.end();
    }
    remove(guard, gate, watched, pin);
}

/// Removes a pin that has ended.
pub(super) fn remove(guard: &Guard, gate: &Gate, watched: &Arc<Watched>, pin: u64) {
    // If this fails, the entry still contains more than is pinned, so it only
    // refuses more.
    let _ = gate.publish(watched);
    // An operation that no longer finds the pin is judged without it.
    watched.remove(|other| other.id == pin);
    gate.drop_facts(pin);
    let_go(guard, watched);
}

/// Forgets an inode without pins, dormant or not.
pub(crate) fn let_go(guard: &Guard, watched: &Arc<Watched>) {
    // A grant under way has a pin, or comes here itself.
    let Some(mut state) = watched.try_grant() else {
        return;
    };
    if !state.retired && guard.pins_awake_or_asleep(watched).is_empty() {
        state.retired = true;
        guard.table.remove(watched);
    }
}
