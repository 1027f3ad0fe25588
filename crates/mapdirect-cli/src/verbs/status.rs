//! `mapdirect status`: what the guard is doing.

use crate::args::StatusArgs;
use crate::size::human;
use crate::{Exit, json, output};
use anyhow::{Context, Result};
use mapdirect::status::{Armed, FileStatus, RefusedOperation, Status};
use mapdirect::{Breach, Guard, Strength, Who};
use mapdirect_sys::proc::printable;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

pub(crate) fn run(args: &StatusArgs) -> Result<Exit> {
    if args.metrics || args.metrics_file.is_some() {
        return metrics(args.metrics_file.as_deref());
    }
    let status = Guard::from_env().status()?;
    if args.json {
        output::line(&as_json(&status).to_string());
        return Ok(Exit::SUCCESS);
    }
    let pins: usize = status.files.iter().map(|file| file.pins.len()).sum();
    output::line(&format!(
        "guard: pid {}, gate {}, up {} s, {} clients, {} events judged",
        status.pid,
        status.gate.name(),
        status.uptime,
        status.clients,
        status.judged
    ));
    output::line(&format!("pins: {pins} on {} files", status.files.len()));
    for file in &status.files {
        tell_file(file);
    }
    if let Some(policy) = status
        .policy
        .as_ref()
        .filter(|policy| policy.rules > 0 || !policy.error.is_empty())
    {
        output::line(&format!("policy: {} rules", policy.rules));
        if !policy.error.is_empty() {
            let error = printable(&policy.error);
            output::line(&format!(
                "  could not be read again, and stays as it was: {error}"
            ));
        }
    }
    for armed in &status.armed {
        output::line(&format!(
            "armed: {} for {}, bytes {}, {} s more",
            printable(&armed.path),
            armed.who,
            if armed.range.end == u64::MAX {
                format!("from {}", armed.range.start)
            } else {
                format!("{} to {}", armed.range.start, armed.range.end)
            },
            armed.left
        ));
    }
    if status.refused.is_empty() {
        output::line("refused: nothing");
    } else {
        output::line("refused:");
        for (operation, count) in &status.refused {
            output::line(&format!("  {count:>8}  {operation}"));
        }
    }
    for refused in status.recent.iter().rev().take(8) {
        output::line(&format!("  {}", recent(refused)));
    }
    if status.breached == 0 {
        output::line("breaches: none");
    } else {
        output::line(&format!("breaches: {}", status.breached));
    }
    for breach in status.breaches.iter().rev().take(8) {
        tell_breach(breach);
    }
    Ok(Exit::SUCCESS)
}

/// Prints metrics, or replaces a file by them.
fn metrics(path: Option<&Path>) -> Result<Exit> {
    let status = Guard::from_env().status();
    let Some(path) = path else {
        output::line(crate::metrics::text(Some(&status?)).trim_end());
        return Ok(Exit::SUCCESS);
    };
    // A collector shall see that there is no guard.
    let text = crate::metrics::text(status.as_ref().ok());
    crate::metrics::write(path, &text).with_context(|| path.display().to_string())?;
    status?;
    Ok(Exit::SUCCESS)
}

fn name_of(file: &FileStatus) -> String {
    if file.path.is_empty() {
        format!("inode {} of {}", file.inode, file.device)
    } else {
        printable(&file.name.to_string())
    }
}

fn tell_file(file: &FileStatus) {
    output::line(&format!("  {}", name_of(file)));
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
            let left = delegated
                .left
                .map_or_else(String::new, |left| format!(", {left} s more"));
            format!("policy: {}{left}", printable(&delegated.rule))
        });
        notes.extend(by.as_deref());
        output::line(&format!(
            "    pin {}: {} ({} stable, {} frozen), {} s, by pid {}{}",
            pin.pin,
            output::bytes(&pin.range),
            human(pin.stable),
            human(pin.frozen),
            pin.age,
            pin.pid,
            if notes.is_empty() {
                String::new()
            } else {
                format!(" [{}]", notes.join(", "))
            }
        ));
    }
    for holder in &file.holders {
        output::line(&format!(
            "    held by pid {} ({}): maps {}, {} descriptors",
            holder.pid,
            printable(&holder.command),
            human(holder.mapped),
            holder.descriptors
        ));
    }
}

/// A breach: when, where, by whom, and what the blocks were and are.
fn tell_breach(breach: &Breach) {
    let file = if breach.path.is_empty() {
        format!("inode {} of {}", breach.inode, breach.device)
    } else {
        printable(&breach.path)
    };
    let cause = breach.cause.as_ref().map_or_else(String::new, |cause| {
        format!(", by {}", printable(&cause.to_string()))
    });
    output::line(&format!(
        "  bytes {} to {} of {file}, pin {}, {} s ago{cause}",
        breach.range.start,
        breach.range.end,
        breach.pin,
        age(breach.time),
    ));
    for (when, extents) in [("before", &breach.before), ("now", &breach.after)] {
        for extent in extents {
            let physical = extent
                .physical
                .map_or_else(|| String::from("nowhere"), |at| format!("at {at}"));
            output::line(&format!(
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
        printable(&refused.command),
        printable(&refused.path),
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
        "name": super::records::states(&file.name),
        "device": file.device.to_string(),
        "inode": file.inode,
        "pins": pins,
        "holders": holders,
    })
}
