//! `mapdirect show`: the block map of a file, drawn.

use crate::args::{Format, ShowArgs};
use crate::extents::Extents;
use crate::size::human;
use crate::{Exit, draw, json, output};
use anyhow::{Context, Result};
use mapdirect::{BlockMap, ExtentState, Guard, PinnedRange, Strength};
use mapdirect_model::FileFacts;
use mapdirect_proto::Reason;
use mapdirect_sys::{capget, fsync};
use rustix::fs::OFlags;
use serde_json::{Value, json};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::Path;

/// Opens a file to look at it.
pub(crate) fn open(path: &Path) -> Result<File> {
    crate::open::open(path, OFlags::RDONLY)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// One reason why the file could not be mapped `MAP_DIRECT` here and now.
struct Hindrance {
    key: &'static str,
    text: String,
    mend: String,
    /// Accepting the page cache does away with it.
    cured_by_cache: bool,
}

pub(crate) fn run(args: &ShowArgs) -> Result<Exit> {
    let file = open(&args.file)?;
    let name = args.file.display().to_string();
    let facts = FileFacts::read(file.as_fd()).with_context(|| format!("cannot examine {name}"))?;
    let regular = file.metadata()?.is_file();
    anyhow::ensure!(regular, "{name} is not a regular file");
    if let Some(format) = args.format
        && !matches!(format, Format::Json | Format::Table)
    {
        return say(args, format, &file, &facts);
    }
    let map = if facts.size == 0 {
        None
    } else {
        Some(mapdirect::block_map(&file, 0..facts.size)?)
    };
    let guard = Guard::from_env();
    let pins = guard.pinned_ranges(&file);
    let hindrances = hindrances(&facts, map.as_ref(), pins.as_ref().err());
    let pins = pins.unwrap_or_default();
    if args.json || args.format == Some(Format::Json) {
        let mut value = as_json(&name, &facts, map.as_ref(), &pins, &hindrances);
        if let Some(map) = &map {
            let extents = Extents::of(&file, map);
            value["extents"] = extents.list();
            extents.add_devices(&mut value);
        }
        output::line(&value.to_string());
        return Ok(Exit::SUCCESS);
    }
    output::line(&format!(
        "{name}: {} ({} bytes), blocks of {} bytes on device {}",
        human(facts.size),
        facts.size,
        facts.block_size,
        facts.device,
    ));
    if let Some(map) = &map {
        let ranges: Vec<Range<u64>> = pins.iter().map(|pin| pin.range.clone()).collect();
        output::line(draw::block_map(map, &ranges, output::width()).trim_end());
        if args.extents || args.format == Some(Format::Table) {
            output::line(Extents::of(&file, map).table().trim_end());
        }
        output::line(&totals(map));
        if !map.is_stable() {
            output::line(
                "under a pin a store to what is frozen raises SIGBUS; mapdirect prepare makes it \
                 stable",
            );
        }
    }
    for pin in &pins {
        output::line(&format!(
            "pinned: {}{} by pid {}",
            output::bytes(&pin.range),
            match (pin.flags.strength(), pin.flags.is_whole_file()) {
                (Strength::Stable, _) => ", strength stable,",
                (_, true) => ", the whole file and its size,",
                (_, false) => "",
            },
            pin.pid
        ));
    }
    tell_verdict(&hindrances);
    Ok(Exit::SUCCESS)
}

/// The extents, as they are on the device, and nothing else.
fn say(args: &ShowArgs, format: Format, file: &File, facts: &FileFacts) -> Result<Exit> {
    let name = args.file.display();
    anyhow::ensure!(facts.size > 0, "{name} is empty, and has no extents");
    // Only then do the blocks show that are not chosen yet, and have the bytes
    // that the file has.
    fsync::fsync(file.as_fd()).with_context(|| format!("cannot write {name} to its device"))?;
    let end = facts
        .size
        .next_multiple_of(u64::from(facts.block_size.max(1)));
    let map = mapdirect::block_map(file, 0..end)?;
    let said = Extents::of(file, &map).say(format, Some(file), args.device.as_deref());
    output::line(&said.with_context(|| name.to_string())?);
    Ok(Exit::SUCCESS)
}

/// What can be stored to under a pin, and what cannot.
fn totals(map: &BlockMap) -> String {
    let bytes_in = |stable: bool| {
        let totals: Vec<_> = ExtentState::ALL
            .iter()
            .filter(|state| state.is_stable() == stable)
            .map(|state| (state, map.total(*state)))
            .filter(|(_, bytes)| *bytes > 0)
            .collect();
        let sum: u64 = totals.iter().map(|(_, bytes)| bytes).sum();
        let word = if stable { "stable" } else { "frozen" };
        let parts: Vec<_> = totals
            .iter()
            .map(|(state, bytes)| format!("{} {state}", human(*bytes)))
            .collect();
        (sum > 0).then(|| format!("{} {word} ({})", human(sum), parts.join(", ")))
    };
    let totals: Vec<_> = [true, false].into_iter().filter_map(bytes_in).collect();
    let count = map.extents().len();
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} extent{plural}: {}", totals.join(", "))
}

/// Bytes that can be stored to under a pin, and bytes that cannot.
fn stable_and_frozen(map: Option<&BlockMap>) -> (u64, u64) {
    let frozen = map.map_or(0, |map| map.frozen().map(|extent| extent.length).sum());
    let all = map.map_or(0, |map| map.range().end - map.range().start);
    (all - frozen, frozen)
}

fn tell_verdict(hindrances: &[Hindrance]) {
    if hindrances.is_empty() {
        output::line("could be mapped MAP_DIRECT: yes");
        return;
    }
    let cached = hindrances.iter().all(|hindrance| hindrance.cured_by_cache);
    output::line(if cached {
        "could be mapped MAP_DIRECT: only with the page cache accepted"
    } else {
        "could be mapped MAP_DIRECT: no"
    });
    for hindrance in hindrances {
        output::line(&format!("  - {}", hindrance.text));
        if !hindrance.mend.is_empty() {
            output::line(&format!("    help: {}", hindrance.mend));
        }
    }
}

fn hindrances(
    facts: &FileFacts,
    map: Option<&BlockMap>,
    no_guard: Option<&mapdirect::Error>,
) -> Vec<Hindrance> {
    let mut found: Vec<_> = facts
        .obstacles()
        .into_iter()
        .map(|obstacle| Hindrance {
            key: Reason::from(obstacle.kind).key(),
            text: obstacle.text,
            mend: obstacle.mend,
            cured_by_cache: false,
        })
        .collect();
    if !facts.dax {
        found.push(Hindrance {
            key: "no-dax",
            text: String::from("it has no DAX: stores go through the page cache"),
            mend: String::from(
                "use persistent memory mounted with dax, or accept the page cache \
                 (MAPDIRECT_CACHED=1)",
            ),
            cured_by_cache: true,
        });
    }
    if map.is_none() {
        found.push(Hindrance {
            key: "empty",
            text: String::from("it is empty"),
            mend: String::from("write data to it first"),
            cured_by_cache: false,
        });
    }
    if let Some(error) = no_guard {
        found.push(Hindrance {
            key: "no-guard",
            text: error.obstacle().to_owned(),
            mend: error.help().to_owned(),
            cured_by_cache: false,
        });
    }
    let capable = capget::effective(0)
        .is_ok_and(|effective| capget::contains(effective, capget::CAP_LINUX_IMMUTABLE));
    if !capable {
        found.push(Hindrance {
            key: "not-capable",
            text: String::from("you lack CAP_LINUX_IMMUTABLE"),
            mend: String::from("run as root, or setcap cap_linux_immutable+ep PROGRAM"),
            cured_by_cache: false,
        });
    }
    found
}

fn as_json(
    name: &str,
    facts: &FileFacts,
    map: Option<&BlockMap>,
    pins: &[PinnedRange],
    hindrances: &[Hindrance],
) -> Value {
    let (stable, frozen) = stable_and_frozen(map);
    let pinned: Vec<Value> = pins
        .iter()
        .map(|pin| {
            json!({
                "pin": pin.pin,
                "offset": pin.range.start,
                "length": json::length(&pin.range),
                "strength": json::strength(pin.flags.strength()),
                "pid": pin.pid,
                "whole_file": pin.flags.is_whole_file(),
            })
        })
        .collect();
    let reasons: Vec<Value> = hindrances
        .iter()
        .map(|hindrance| {
            json!({
                "reason": hindrance.key,
                "text": hindrance.text,
                "mend": hindrance.mend,
            })
        })
        .collect();
    json!({
        "file": name,
        "file_size": facts.size,
        "block_size": facts.block_size,
        "device": facts.device.to_string(),
        "inode": facts.inode,
        "dax": facts.dax,
        "extents": [],
        "stable": stable,
        "frozen": frozen,
        "totals": map.map_or_else(|| json!({}), json::totals),
        "pinned": pinned,
        "mappable": {
            "direct": hindrances.is_empty(),
            "cached": hindrances.iter().all(|hindrance| hindrance.cured_by_cache),
            "reasons": reasons,
        },
        "block_device": Value::Null,
        "disks": [],
        "disk_unknown": Value::Null,
    })
}
