//! Gathers the state of the guard, for `mapdirect status`.

use crate::Guard;
use crate::audit::names;
use crate::openers::{Openers, Wanted, processes_of};
use crate::table::Watched;
use mapdirect_proto::NameState;
use mapdirect_proto::status::{Delegated, FileStatus, Holder, PinStatus, Status};
use std::collections::BTreeMap;
use std::time::Duration;

/// How long to look for the present names of files.
const NAMES: Duration = Duration::from_secs(1);

/// Gathers the state. For a caller without privileges, names, processes and
/// refusals are included only for files that `only_uid` itself has pinned.
pub(crate) fn gather(guard: &Guard, only_uid: Option<u32>) -> Status {
    let watched = guard.table.all();
    let (mut files, known): (Vec<_>, Vec<_>) = watched
        .iter()
        .filter_map(|watched| Some((file_status(watched, only_uid)?, watched)))
        .unzip();
    // One look at every process serves all files, but only the files whose
    // details are shown.
    let told: Vec<usize> = (0..files.len())
        .filter(|at| !files[*at].path.is_empty())
        .collect();
    let wanted: Vec<Wanted<'_>> = told
        .iter()
        .map(|at| Wanted {
            id: known[*at].id,
            path: &known[*at].path,
            mark: None,
        })
        .collect();
    if !wanted.is_empty() {
        for (at, found) in told.iter().zip(processes_of(&wanted)) {
            files[*at].holders = holders(found);
        }
    }
    let asked: Vec<_> = told
        .iter()
        .map(|at| names::Question::about(known[*at]))
        .collect();
    for (at, name) in told.iter().zip(guard.audit.names_of(asked, NAMES)) {
        let file = &mut files[*at];
        (file.path, file.former, file.name_state) = (name.path, name.former, name.state);
    }
    files.sort_by(|one, other| {
        (&one.path, one.device, one.inode).cmp(&(&other.path, other.device, other.inode))
    });
    let shown = |inode, device| {
        files
            .iter()
            .any(|file| (file.inode, file.device) == (inode, device) && !file.path.is_empty())
    };
    let mut recent = guard.audit.recent();
    recent.retain(|refused| only_uid.is_none() || shown(refused.inode, refused.device));
    let (breached, mut breaches) = guard.notices.breaches();
    breaches.retain(|breach| only_uid.is_none() || shown(breach.inode, breach.device));
    Status {
        gate: guard.gate.kind(),
        pid: std::process::id().cast_signed(),
        uptime: guard.started.elapsed().as_secs(),
        clients: u32::try_from(guard.places.count()).unwrap_or(u32::MAX),
        judged: guard.audit.total_judged(),
        refused: guard.gate.refused(guard),
        files,
        recent,
        breached,
        breaches,
        policy: Some(guard.delegation.status(only_uid.is_none())),
        armed: if only_uid.is_none() {
            guard.delegation.arms.status()
        } else {
            Vec::new()
        },
        unrecorded: guard.audit.unkept(),
    }
}

fn file_status(watched: &Watched, only_uid: Option<u32>) -> Option<FileStatus> {
    let pins = watched.pins.load_full();
    let live: Vec<_> = pins
        .iter()
        .filter(|pin| !pin.is_dead())
        .filter_map(|pin| Some((pin, pin.settled()?)))
        .map(|(pin, settled)| (pin, pin.totals(&settled)))
        .map(|(pin, (stable, frozen))| PinStatus {
            pin: pin.id,
            range: pin.shown.clone(),
            flags: pin.flags,
            pid: pin.pid,
            uid: pin.uid,
            age: pin.since.elapsed().as_secs(),
            stable,
            frozen,
            breaches: pin.fate.summary().0,
            lost: pin.fate.summary().1.unwrap_or_default(),
            delegated: pin.delegated().map(|delegated| Delegated {
                rule: delegated.rule().unwrap_or_default().to_owned(),
                left: delegated.left(),
            }),
        })
        .collect();
    if live.is_empty() {
        return None;
    }
    let known = only_uid.is_none_or(|uid| live.iter().any(|pin| pin.uid == uid));
    Some(FileStatus {
        device: watched.id.device(),
        inode: watched.id.inode,
        path: if known {
            watched.path.to_string()
        } else {
            String::new()
        },
        former: String::new(),
        name_state: NameState::UNKNOWN,
        holders: Vec::new(),
        pins: live,
    })
}

/// The processes that have a pinned file mapped or open.
fn holders(found: Openers) -> Vec<Holder> {
    let mut holders: BTreeMap<i32, Holder> = BTreeMap::new();
    for opener in found.others.iter().filter(|opener| opener.pid > 0) {
        let holder = holders.entry(opener.pid).or_insert_with(|| Holder {
            pid: opener.pid,
            command: opener.command.clone(),
            mapped: 0,
            descriptors: 0,
        });
        holder.descriptors += u32::from(opener.fd.is_some());
    }
    for (opener, bytes) in found.writable_mappings {
        if let Some(holder) = holders.get_mut(&opener.pid) {
            holder.mapped += bytes.end - bytes.start;
        }
    }
    holders.into_values().collect()
}
