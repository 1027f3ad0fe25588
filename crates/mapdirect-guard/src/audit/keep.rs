//! The work of the audit thread: makes a record of everything that was refused
//! or noticed, keeps it, and tells those who want to know.
//!
//! What a record says of a process comes from the thread that looked at it while
//! it waited (fanotify), or is looked up now, within a limit (bpf): a process
//! that is gone by then stays without a user, and one that executes another
//! program without one.

use super::actor::{self, Sight};
use super::journald::Journald;
use super::names::Question;
use super::{Met, Refused, Who, call};
use crate::Guard;
use crate::table::{InodeId, Watched};
use mapdirect_proto::record::{Actor, Event};
use mapdirect_proto::status::RefusedOperation;
use mapdirect_proto::{Breach, Name, Notice, Owner, Record};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// How long to look for what records need. Only so many looks can hang, so this
/// thread waits for so long only a few times.
const LIMIT: Duration = Duration::from_secs(1);
/// The number of refusals that are looked up together.
const TOGETHER: usize = 64;

/// Whom the audit thread tells.
pub(crate) struct Tellers {
    pub(crate) refusal: Box<crate::server::OnRefusal>,
    pub(crate) notice: Box<crate::server::OnNotice>,
    pub(crate) giving_way: Box<crate::server::OnGivingWay>,
    /// If there is one, the operator is told there what the journal takes.
    pub(crate) journald: Option<Journald>,
}

/// Keeps records until the guard stops.
pub(crate) fn run(guard: &Guard, tellers: &Tellers) {
    guard.audit.begin();
    guard.notices.printed_here();
    loop {
        loop {
            let (refused, lost) = guard.audit.take(TOGETHER);
            if refused.is_empty() && lost == 0 {
                break;
            }
            keep_refusals(guard, refused, lost, tellers);
        }
        while let Some(notice) = guard.notices.next() {
            let is_told = match &notice {
                Notice::Breach(breach) => keep_breach(guard, breach, tellers),
                _ => false,
            };
            if !is_told {
                (tellers.notice)(&notice);
            }
        }
        while let Some(words) = guard.audit.next_words() {
            (tellers.giving_way)(&words);
        }
        if guard.audit.is_over() {
            return;
        }
        std::thread::park();
    }
}

fn keep_refusals(guard: &Guard, refused: Vec<Refused>, lost: u64, tellers: &Tellers) {
    let files = Files::of(guard, refused.iter().map(|refused| refused.id));
    let gate = guard.gate.kind();
    let mut records: Vec<Record> = Vec::with_capacity(refused.len());
    let mut unknown = Unknown::default();
    for one in refused {
        let place = (one.id.device(), one.id.inode);
        let mut record = Record::new(Event::Refusal, one.time, gate, place);
        record.operation = one.operation.to_owned();
        record.call = one.call.as_ref().map_or_else(String::new, call::words);
        record.range.clone_from(&one.range);
        record.name = files.name(one.id, &one.path);
        if let Some(met) = one.met {
            record.pin = met.pin;
            unknown.owned(&mut record, records.len(), met);
        }
        match one.who {
            Who::Known(actor) => record.actor = *actor,
            Who::Thread {
                tid,
                pid,
                command,
                sight,
            } => {
                record.actor.tid = tid;
                record.actor.pid = pid;
                record.actor.command = command;
                unknown
                    .actors
                    .extend(sight.map(|sight| (records.len(), sight)));
            }
        }
        records.push(record);
    }
    look_up(guard, &mut records, unknown);
    let mut lost = lost;
    for record in records {
        let id = InodeId::of(record.device, record.inode);
        let before = std::mem::take(&mut lost);
        let kept = guard.journal.add(record, files.owners(id), before);
        let record = &kept.record;
        let operation = RefusedOperation {
            time: record.time / 1_000_000_000,
            tid: record.actor.tid,
            command: record.actor.command.clone(),
            operation: record.operation.clone(),
            device: record.device,
            inode: record.inode,
            path: record.name.path.clone(),
            range: record.range.clone(),
        };
        if !tellers.journal_takes(record) {
            (tellers.refusal)(&operation, before);
        }
        guard.audit.remember(operation);
    }
}

/// Says whether the operator has been told of it.
fn keep_breach(guard: &Guard, breach: &Breach, tellers: &Tellers) -> bool {
    let id = InodeId::of(breach.device, breach.inode);
    let files = Files::of(guard, std::iter::once(id));
    let place = (breach.device, breach.inode);
    let mut record = Record::new(Event::Breach, breach.time, guard.gate.kind(), place);
    record.range = Some(breach.range.clone());
    record.name = files.name(id, &breach.path);
    record.pin = breach.pin;
    let mut unknown = Unknown::default();
    if let Some(met) = files.pin(id, breach.pin) {
        unknown.owned(&mut record, 0, met);
    }
    record.before.clone_from(&breach.before);
    record.after.clone_from(&breach.after);
    let mut records = [record];
    if let Some(cause) = &breach.cause {
        let [record] = &mut records;
        record.actor.pid = cause.pid;
        record.actor.command.clone_from(&cause.command);
        record.operation.clone_from(&cause.what);
        if cause.pid > 0 {
            let before = ticks_at(breach.time) + 1;
            unknown.actors.push((0, Sight::Before(before)));
        }
    }
    look_up(guard, &mut records, unknown);
    let [record] = records;
    let lost = guard.notices.take_lost();
    let kept = guard.journal.add(record, files.owners(id), lost);
    tellers.journal_takes(&kept.record)
}

impl Tellers {
    fn journal_takes(&self, record: &Record) -> bool {
        let journald = self.journald.as_ref();
        journald.is_some_and(|journald| journald.send(record, &super::words::of(record)))
    }
}

/// The number of clock ticks since boot, as `/proc` counts start times.
pub(crate) fn ticks_now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
    let ticks = rustix::param::clock_ticks_per_second();
    seconds * ticks + nanoseconds * ticks / 1_000_000_000
}

/// The same for a time in nanoseconds since the epoch, not long ago.
fn ticks_at(time: u64) -> u64 {
    let ago = super::now().saturating_sub(time);
    let tick = 1_000_000_000 / rustix::param::clock_ticks_per_second();
    ticks_now().saturating_sub(ago / tick)
}

/// Processes in some records of which not everything is known. Numbers of
/// processes are used again: what is not known for sure is left out.
#[derive(Default)]
struct Unknown {
    /// The records whose actor must be looked up, and how that was seen.
    actors: Vec<(usize, Sight)>,
    /// The records whose holder must be looked up, and when that began.
    holders: Vec<(usize, (i32, u64))>,
}

impl Unknown {
    /// Notes the holder of a pin in a record, which will be at `at`.
    fn owned(&mut self, record: &mut Record, at: usize, met: Met) {
        record.owner = Some(Owner::new(met.pid, met.uid));
        let began = met.began.map(|began| (at, (met.pid, began)));
        self.holders.extend(began);
    }
}

/// Adds what is not known of the processes in some records.
fn look_up(guard: &Guard, records: &mut [Record], unknown: Unknown) {
    let wanted: Vec<_> = unknown
        .actors
        .into_iter()
        .filter_map(|(at, sight)| {
            let actor = &records.get(at)?.actor;
            let id = if actor.tid > 0 { actor.tid } else { actor.pid };
            Some((at, id, sight))
        })
        .collect();
    let mut holders: Vec<_> = unknown.holders.iter().map(|(_, holder)| *holder).collect();
    holders.sort_unstable();
    holders.dedup();
    if wanted.is_empty() && holders.is_empty() {
        return;
    }
    let asked = wanted.clone();
    let found = guard.audit.actors.within(LIMIT, move |looking| {
        let mut known: HashMap<(i32, Sight), Option<Actor>> = HashMap::new();
        let actors: Vec<_> = asked
            .iter()
            .map(|(_, id, sight)| {
                let found = known.entry((*id, *sight)).or_insert_with(|| {
                    looking.at(*id).ok()?;
                    actor::find(*id, *sight)
                });
                found.clone()
            })
            .collect();
        let commands: HashMap<(i32, u64), String> = holders
            .into_iter()
            .filter_map(|(pid, began)| Some(((pid, began), actor::command_of(pid, began)?)))
            .collect();
        (actors, commands)
    });
    let Some((actors, commands)) = found else {
        return;
    };
    for ((at, ..), actor) in wanted.into_iter().zip(actors) {
        let (Some(record), Some(actor)) = (records.get_mut(at), actor) else {
            continue;
        };
        let seen = &record.actor;
        // A number that means another thread now.
        if seen.pid > 0 && seen.pid != actor.pid {
            continue;
        }
        // What the kernel said at that moment is more than what is said now.
        let command = std::mem::take(&mut record.actor.command);
        let tid = record.actor.tid;
        record.actor = actor;
        record.actor.tid = tid;
        if !command.is_empty() {
            record.actor.command = command;
        }
    }
    for (at, holder) in unknown.holders {
        let owner = records.get_mut(at).and_then(|record| record.owner.as_mut());
        if let (Some(owner), Some(command)) = (owner, commands.get(&holder)) {
            owner.command.clone_from(command);
        }
    }
}

/// The files that some records are about.
struct Files {
    of: HashMap<InodeId, (Name, Arc<Watched>)>,
}

impl Files {
    fn of(guard: &Guard, ids: impl Iterator<Item = InodeId>) -> Self {
        let mut watched: Vec<Arc<Watched>> = Vec::new();
        for id in ids {
            if !watched.iter().any(|known| known.id == id)
                && let Some(new) = guard.table.get(id)
            {
                watched.push(new);
            }
        }
        let questions = watched.iter().map(|watched| Question::about(watched));
        let names = guard.audit.names_of(questions.collect(), LIMIT);
        let files = watched.into_iter().zip(names);
        Self {
            of: files
                .map(|(watched, name)| (watched.id, (name, watched)))
                .collect(),
        }
    }

    fn name(&self, id: InodeId, path: &str) -> Name {
        let known = self.of.get(&id).map(|(name, _)| name.clone());
        known.unwrap_or_else(|| Name::new(path, "", mapdirect_proto::NameState::UNKNOWN))
    }

    /// The users who have pins of a file.
    fn owners(&self, id: InodeId) -> Vec<u32> {
        let Some((_, watched)) = self.of.get(&id) else {
            return Vec::new();
        };
        let pins = watched.pins.load();
        let mut owners: Vec<u32> = pins.iter().map(|pin| pin.uid).collect();
        owners.sort_unstable();
        owners.dedup();
        owners
    }

    fn pin(&self, id: InodeId, pin: u64) -> Option<Met> {
        let (_, watched) = self.of.get(&id)?;
        let pins = watched.pins.load();
        let pin = pins.iter().find(|other| other.id == pin)?;
        Some(Met {
            pin: pin.id,
            pid: pin.pid,
            uid: pin.uid,
            began: pin.holder_began(),
        })
    }
}
