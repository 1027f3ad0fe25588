//! `mapdirect status`: what the guard is doing.

use crate::args::StatusArgs;
use crate::columns::{name_of, tell_pins};
use crate::size::human;
use crate::terminal::{self, Style, told_name, told_word};
use crate::verbs::records;
use crate::{Exit, json, output};
use anyhow::{Context, Result};
use mapdirect::status::{Armed, FileStatus, RefusedOperation, Status};
use mapdirect::{Breach, DeviceId, Guard, Strength, Who};
use mapdirect_sys::proc::printable;
use serde_json::{Map, Value, json};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

pub(crate) fn run(args: &StatusArgs) -> Result<Exit> {
    if args.metrics || args.metrics_file.is_some() {
        return metrics(args.metrics_file.as_deref());
    }
    let mut status = Guard::from_env().status()?;
    let exit = if args.files.is_empty() {
        Exit::SUCCESS
    } else {
        only(&mut status, args)
    };
    if args.json {
        output::json(&as_json(&status));
    } else if !args.columns.is_empty() {
        tell_pins(&status, &args.columns, !args.no_headings);
    } else {
        if args.files.is_empty() {
            tell_guard(&status);
        }
        status.files.iter().for_each(tell_file);
        tell_permissions(&status);
        tell_refusals(&status, args.files.is_empty());
    }
    Ok(exit)
}

/// Leaves of a status what is about the files that are asked for, and says which
/// of them are not pinned.
fn only(status: &mut Status, args: &StatusArgs) -> Exit {
    let mut exit = Exit::SUCCESS;
    let mut wanted = Vec::new();
    for path in &args.files {
        match identity(path) {
            Ok(id) => {
                let is_pinned = status.files.iter().any(|file| {
                    (file.device, file.inode) == id
                        && file.pins.iter().any(|pin| pin.lost.is_empty())
                });
                if !is_pinned {
                    exit = Exit::FAILURE;
                    if !args.json && args.columns.is_empty() {
                        output::prose(&format!("{}: not pinned", terminal::name(path)));
                    }
                }
                wanted.push(id);
            }
            Err(error) => {
                exit = Exit::FAILURE;
                let name = terminal::name(path);
                output::complain(&format!("cannot examine {name}: {error}"));
            }
        }
    }
    let is_wanted = |device: DeviceId, inode: u64| wanted.contains(&(device, inode));
    status
        .files
        .retain(|file| is_wanted(file.device, file.inode));
    status
        .recent
        .retain(|refused| is_wanted(refused.device, refused.inode));
    status
        .breaches
        .retain(|breach| is_wanted(breach.device, breach.inode));
    status
        .armed
        .retain(|armed| is_wanted(armed.device, armed.inode));
    exit
}

/// The file that a name leads to, as the guard knows it.
fn identity(path: &Path) -> Result<(DeviceId, u64), std::io::Error> {
    let metadata = std::fs::metadata(path)?;
    let device = DeviceId {
        major: rustix::fs::major(metadata.dev()),
        minor: rustix::fs::minor(metadata.dev()),
    };
    Ok((device, metadata.ino()))
}

fn tell_guard(status: &Status) {
    output::prose(&format!(
        "guard: pid {}, gate {}, up {}, {}, {} judged",
        status.pid,
        status.gate.name(),
        output::seconds(status.uptime),
        output::count(status.clients.into(), "client"),
        output::count(status.judged, "event"),
    ));
    let pins: usize = status.files.iter().map(|file| file.pins.len()).sum();
    output::prose(&format!(
        "pins: {pins} on {}",
        output::count(status.files.len() as u64, "file")
    ));
}

/// Who else may pin.
fn tell_permissions(status: &Status) {
    if let Some(policy) = status
        .policy
        .as_ref()
        .filter(|policy| policy.rules > 0 || !policy.error.is_empty())
    {
        output::prose(&format!(
            "policy: {}",
            output::count(policy.rules.into(), "rule")
        ));
        if !policy.error.is_empty() {
            output::prose(&format!(
                "  could not be read again, and stays as it was: {}",
                printable(&policy.error)
            ));
        }
    }
    for armed in &status.armed {
        output::prose(&format!(
            "armed: {} for {}, bytes {}, {} more",
            told_name(&armed.path),
            armed.who,
            if armed.range.end == u64::MAX {
                format!("from {}", armed.range.start)
            } else {
                format!("{} to {}", armed.range.start, armed.range.end)
            },
            output::seconds(armed.left)
        ));
    }
}

/// What was refused, and what happened all the same: of all files, or of some.
fn tell_refusals(status: &Status, of_all: bool) {
    if of_all && status.refused.is_empty() {
        output::line("refused: nothing");
    } else if of_all {
        output::line("refused:");
        for (operation, count) in &status.refused {
            output::line(&format!("  {count:>8}  {operation}"));
        }
    } else if !status.recent.is_empty() {
        output::line("lately refused:");
    }
    for refused in status.recent.iter().rev().take(8) {
        output::prose(&format!("  {}", recent(refused)));
    }
    if !of_all {
        if !status.breaches.is_empty() {
            output::line("breaches:");
        }
    } else if status.breached == 0 {
        output::line("breaches: none");
    } else {
        let number = status.breached.to_string();
        output::marked("breaches: ", (Style::Bad, &number), "", 4);
    }
    for breach in status.breaches.iter().rev().take(8) {
        tell_breach(breach);
    }
}

/// Prints metrics, or replaces a file by them.
fn metrics(path: Option<&Path>) -> Result<Exit> {
    let status = Guard::from_env().status();
    let Some(path) = path else {
        output::metrics(&crate::metrics::text(Some(&status?)));
        return Ok(Exit::SUCCESS);
    };
    // A collector shall see that there is no guard.
    let text = crate::metrics::text(status.as_ref().ok());
    crate::metrics::write(path, &text).with_context(|| terminal::name(path))?;
    status?;
    Ok(Exit::SUCCESS)
}

fn tell_file(file: &FileStatus) {
    output::prose(&format!("  {}", name_of(file)));
    for pin in &file.pins {
        let mut notes = Vec::new();
        if pin.flags.is_mapped() {
            notes.push("mapped");
        }
        if pin.flags.is_cached() {
            notes.push("page cache");
        }
        if pin.flags.is_whole_file() {
            notes.push("whole file");
        }
        if pin.flags.strength() == Strength::Stable {
            notes.push("strength stable");
        }
        if pin.frozen > 0 {
            notes.push("has frozen blocks");
        }
        if pin.breaches > 0 {
            notes.push("BROKEN");
        }
        if !pin.lost.is_empty() {
            notes.push("LOST");
        }
        let by = pin.delegated.as_ref().map(|delegated| {
            let left = delegated.left.map_or_else(String::new, |left| {
                format!(", {} more", output::seconds(left))
            });
            format!("policy: {}{left}", printable(&delegated.rule))
        });
        notes.extend(by.as_deref());
        output::prose(&format!(
            "    pin {}: {} ({} stable, {} frozen), {}, by pid {}{}",
            pin.pin,
            output::bytes(&pin.range),
            human(pin.stable),
            human(pin.frozen),
            output::seconds(pin.age),
            pin.pid,
            if notes.is_empty() {
                String::new()
            } else {
                format!(" [{}]", notes.join(", "))
            }
        ));
    }
    for holder in &file.holders {
        output::prose(&format!(
            "    held by pid {} ({}): maps {}, {}",
            holder.pid,
            told_word(&holder.command),
            human(holder.mapped),
            output::count(holder.descriptors.into(), "descriptor")
        ));
    }
}

/// A breach: when, where, by whom, and what the blocks were and are.
fn tell_breach(breach: &Breach) {
    let file = if breach.path.is_empty() {
        format!("inode {} of {}", breach.inode, breach.device)
    } else {
        told_name(&breach.path)
    };
    let cause = breach.cause.as_ref().map_or_else(String::new, |cause| {
        format!(", by {}", records::cause(cause))
    });
    output::prose(&format!(
        "  bytes {} to {} of {file}, pin {}, {} ago{cause}",
        breach.range.start,
        breach.range.end,
        breach.pin,
        output::seconds(age(breach.time)),
    ));
    for (when, extents) in [("before", &breach.before), ("now", &breach.after)] {
        for extent in extents {
            let physical = extent
                .physical
                .map_or_else(|| String::from("nowhere"), |at| format!("at {at}"));
            output::prose(&format!(
                "    {when}: bytes {} to {} {} {physical}",
                extent.offset,
                extent.end(),
                extent.state.name(),
            ));
        }
    }
}

/// Seconds since a time in nanoseconds since the epoch.
fn age(time: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
        .saturating_sub(time / 1_000_000_000)
}

fn recent(refused: &RefusedOperation) -> String {
    let range = refused
        .range
        .as_ref()
        .map_or_else(String::new, |range| format!(" at {}", range.start));
    format!(
        "{} by thread {} ({}) on {}{range}",
        refused.operation,
        refused.tid,
        told_word(&refused.command),
        told_name(&refused.path),
    )
}

fn as_json(status: &Status) -> Value {
    let refused: Map<String, Value> = status
        .refused
        .iter()
        .map(|(operation, count)| (operation.clone(), (*count).into()))
        .collect();
    let files: Vec<Value> = status.files.iter().map(file_json).collect();
    let recent: Vec<Value> = status
        .recent
        .iter()
        .map(|refused| {
            json!({
                "time": refused.time,
                "tid": refused.tid,
                "command": refused.command,
                "operation": refused.operation,
                "device": refused.device.to_string(),
                "inode": refused.inode,
                "file": refused.path,
                "offset": refused.range.as_ref().map(|range| range.start),
                "length": refused
                    .range
                    .as_ref()
                    .filter(|range| range.end != u64::MAX)
                    .map(|range| range.end - range.start),
            })
        })
        .collect();
    json!({
        "gate": status.gate.name(),
        "pid": status.pid,
        "uptime": status.uptime,
        "clients": status.clients,
        "judged": status.judged,
        "pins": status.files.iter().map(|file| file.pins.len()).sum::<usize>(),
        "files": files,
        "refused": refused,
        "recent": recent,
        "unrecorded": status.unrecorded,
        "breached": status.breached,
        "breaches": status.breaches.iter().map(json::breach).collect::<Vec<_>>(),
        "policy": status.policy.as_ref().map(|policy| json!({
            "rules": policy.rules,
            "error": (!policy.error.is_empty()).then_some(&policy.error),
        })),
        "armed": status.armed.iter().map(armed_json).collect::<Vec<_>>(),
    })
}

fn armed_json(armed: &Armed) -> Value {
    let (user, group) = match armed.who {
        Who::User(uid) => (Some(uid), None),
        Who::Group(gid) => (None, Some(gid)),
    };
    json!({
        "file": armed.path,
        "device": armed.device.to_string(),
        "inode": armed.inode,
        "uid": user,
        "gid": group,
        "offset": armed.range.start,
        "length": (armed.range.end != u64::MAX).then(|| armed.range.end - armed.range.start),
        "seconds_left": armed.left,
    })
}

fn file_json(file: &FileStatus) -> Value {
    let pins: Vec<Value> = file
        .pins
        .iter()
        .map(|pin| {
            json!({
                "pin": pin.pin,
                "offset": pin.range.start,
                "length": json::length(&pin.range),
                "strength": json::strength(pin.flags.strength()),
                "mapped": pin.flags.is_mapped(),
                "cached": pin.flags.is_cached(),
                "whole_file": pin.flags.is_whole_file(),
                "pid": pin.pid,
                "uid": pin.uid,
                "age": pin.age,
                "stable": pin.stable,
                "frozen": pin.frozen,
                "breaches": pin.breaches,
                "lost": (!pin.lost.is_empty()).then_some(&pin.lost),
                "rule": pin.delegated.as_ref().map(|delegated| &delegated.rule),
                "seconds_left": pin.delegated.as_ref().and_then(|delegated| delegated.left),
            })
        })
        .collect();
    let holders: Vec<Value> = file
        .holders
        .iter()
        .map(|holder| {
            json!({
                "pid": holder.pid,
                "command": holder.command,
                "mapped": holder.mapped,
                "descriptors": holder.descriptors,
            })
        })
        .collect();
    json!({
        "file": file.path,
        "former": (!file.name.former.is_empty()).then_some(&file.name.former),
        "name_state": super::records::states(&file.name),
        "device": file.device.to_string(),
        "inode": file.inode,
        "pins": pins,
        "holders": holders,
    })
}
