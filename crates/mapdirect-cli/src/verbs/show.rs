//! `mapdirect show`: the block maps of files, drawn.

use crate::args::{Format, ShowArgs};
use crate::columns::{ShowColumn, Table, add_extents};
use crate::draw::{becomes_stable, state_in_words};
use crate::extents::Extents;
use crate::size::human;
use crate::terminal::{self, Style};
use crate::{Exit, draw, exit, json, output, uses};
use anyhow::{Context, Result, ensure};
use mapdirect::{BlockMap, ExtentState, Guard, PinnedRange, Strength};
use mapdirect_model::FileFacts;
use mapdirect_proto::Reason;
use mapdirect_sys::{capget, fsync, getauxval};
use rustix::fs::{OFlags, SeekFrom};
use serde_json::{Value, json};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::Path;

/// Opens a file to look at it.
pub(crate) fn open(path: &Path) -> Result<File> {
    crate::open::open(path, OFlags::RDONLY)
        .with_context(|| format!("cannot open {}", terminal::name(path)))
}

/// One reason why the file could not be mapped `MAP_DIRECT` here and now.
struct Hindrance {
    key: &'static str,
    text: String,
    mend: String,
    /// Accepting the page cache does away with it.
    cured_by_cache: bool,
}

/// Whether every program may map files through the page cache: what the library
/// reads.
fn accepts_cache() -> bool {
    !getauxval::is_secure_execution()
        && std::env::var_os("MAPDIRECT_CACHED").is_some_and(|value| value == "1")
}

/// A file that cannot be shown is no reason not to show the others.
pub(crate) fn run(args: &ShowArgs) -> Result<Exit> {
    let is_for_one = matches!(
        args.format,
        Some(Format::Csv | Format::Dmsetup | Format::ResumeOffset)
    );
    ensure!(
        !is_for_one || args.files.len() == 1,
        "in this form nothing says which file an extent is of\n\
         help: show the files one by one, or take JSON or --columns file,..."
    );
    let mut ends = Vec::new();
    let mut table = Table::new(&args.columns, !args.no_headings);
    for (at, path) in args.files.iter().enumerate() {
        let is_first = at == 0;
        ends.push(match show(args, path, is_first, &mut table) {
            Ok(()) => Exit::SUCCESS,
            Err(error) => exit::explain(&error),
        });
    }
    table.tell();
    Ok(match *ends {
        [one] => one,
        _ if ends.iter().all(|end| *end == Exit::SUCCESS) => Exit::SUCCESS,
        _ => Exit::FAILURE,
    })
}

fn show(args: &ShowArgs, path: &Path, is_first: bool, table: &mut Table) -> Result<()> {
    let file = open(path)?;
    let name = terminal::name(path);
    let facts = FileFacts::read(file.as_fd()).with_context(|| format!("cannot examine {name}"))?;
    let is_json = args.json || args.format == Some(Format::Json);
    let names_itself = is_json || args.columns.contains(&ShowColumn::File);
    if !is_first && !names_itself {
        output::line("");
    }
    if let Some(format) = args.format.filter(|_| !is_json) {
        if args.files.len() > 1 {
            output::line(&format!("{name}:"));
        }
        return say(args, format, path, &file, &facts);
    }
    if args.sync {
        write_back(&file, &name)?;
    }
    let map = if facts.size == 0 {
        None
    } else {
        Some(mapdirect::block_map(&file, 0..facts.size)?)
    };
    if !args.columns.is_empty() {
        let none = BlockMap::new(facts.device, facts.block_size, 0, 0..0, []);
        let map = map.as_ref().unwrap_or(&none);
        if args.files.len() > 1 && !names_itself {
            output::line(&format!("{}:", terminal::cell(path)));
        }
        add_extents(table, path, map, &Extents::of(&file, map), &args.columns);
        if !names_itself {
            table.tell();
            *table = Table::new(&args.columns, !args.no_headings);
        }
        return Ok(());
    }
    let guard = Guard::from_env();
    let pins = guard.pinned_ranges(&file);
    let hindrances = hindrances(&file, &facts, map.as_ref(), pins.as_ref().err());
    let pins = pins.unwrap_or_default();
    if is_json {
        let mut value = as_json(&json::name(path), &facts, map.as_ref(), &pins, &hindrances);
        let none = BlockMap::new(facts.device, facts.block_size, 0, 0..0, []);
        let extents = Extents::of(&file, map.as_ref().unwrap_or(&none));
        value["extents"] = extents.list();
        extents.add_devices(&mut value);
        output::json(&value);
        return Ok(());
    }
    output::marked(
        "",
        (Style::Strong, &name),
        &format!(
            ": {}, blocks of {} bytes on device {}",
            size_in_words(facts.size),
            facts.block_size,
            facts.device,
        ),
        4,
    );
    if let Some(map) = &map {
        tell_map(args, &file, map, &pins);
    }
    for pin in &pins {
        output::prose(&format!(
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
    Ok(())
}

/// A size for a person, and to the byte.
fn size_in_words(size: u64) -> String {
    let bytes = output::count(size, "byte");
    let human = human(size);
    if human.ends_with(" B") {
        bytes
    } else {
        format!("{human} ({bytes})")
    }
}

fn tell_map(args: &ShowArgs, file: &File, map: &BlockMap, pins: &[PinnedRange]) {
    let ranges: Vec<Range<u64>> = pins.iter().map(|pin| pin.range.clone()).collect();
    output::line(draw::block_map(map, &ranges).trim_end());
    if args.extents {
        output::line(Extents::of(file, map).table().trim_end());
    }
    output::prose(&totals(map));
    if frozen(map) > 0 {
        output::prose(
            "under a pin a store to what is frozen raises SIGBUS; mapdirect prepare makes it \
             stable",
        );
    }
    let in_memory = written_in_memory(file, map);
    if in_memory > 0 {
        output::prose(&format!(
            "of what is unwritten, {} may have been written in memory: --sync writes it to the \
             device first, as a pin does",
            human(in_memory)
        ));
    }
}

/// Bytes of unwritten blocks for which the page cache has something: the next
/// write to the device makes them written. What was only read counts, too.
fn written_in_memory(file: &File, map: &BlockMap) -> u64 {
    let unwritten = map.extents().iter();
    let unwritten = unwritten.filter(|extent| extent.state == ExtentState::Unwritten);
    let mut bytes = 0;
    for extent in unwritten {
        let mut at = extent.offset;
        while at < extent.end() {
            let Ok(start) = rustix::fs::seek(file, SeekFrom::Data(at)) else {
                break;
            };
            let end = rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap_or(extent.end());
            let end = end.min(extent.end());
            if start >= end {
                break;
            }
            bytes += end - start;
            at = end;
        }
    }
    bytes
}

/// Has the device hold what was written: only then do the blocks show that are
/// not chosen yet, and have the bytes that the file has.
fn write_back(file: &File, name: &str) -> Result<()> {
    fsync::fsync(file.as_fd()).with_context(|| format!("cannot write {name} to its device"))
}

/// The extents, as they are on the device, and nothing else.
fn say(args: &ShowArgs, format: Format, path: &Path, file: &File, facts: &FileFacts) -> Result<()> {
    let name = terminal::name(path);
    ensure!(facts.size > 0, "{name} is empty, and has no extents");
    write_back(file, &name)?;
    let end = facts
        .size
        .next_multiple_of(u64::from(facts.block_size.max(1)));
    let map = mapdirect::block_map(file, 0..end)?;
    let said = Extents::of(file, &map).say(format, Some(file), args.device.as_deref());
    output::line(said.with_context(|| name.clone())?.trim_end());
    Ok(())
}

/// Bytes that a pin lets nobody store to.
fn frozen(map: &BlockMap) -> u64 {
    let frozen = map.frozen().filter(|extent| !becomes_stable(extent.state));
    frozen.map(|extent| extent.length).sum()
}

/// What can be stored to under a pin, and what cannot.
fn totals(map: &BlockMap) -> String {
    let bytes_in = |stable: bool| {
        let totals: Vec<_> = ExtentState::ALL
            .iter()
            .filter(|state| becomes_stable(**state) == stable)
            .map(|state| (state, map.total(*state)))
            .filter(|(_, bytes)| *bytes > 0)
            .collect();
        let sum: u64 = totals.iter().map(|(_, bytes)| bytes).sum();
        let word = if stable { "stable" } else { "frozen" };
        let parts: Vec<_> = totals
            .iter()
            .map(|(state, bytes)| format!("{} {}", human(*bytes), state_in_words(**state)))
            .collect();
        (sum > 0).then(|| format!("{} {word} ({})", human(sum), parts.join(", ")))
    };
    let totals: Vec<_> = [true, false].into_iter().filter_map(bytes_in).collect();
    let extents = output::count(map.extents().len() as u64, "extent");
    format!("{extents}: {}", totals.join(", "))
}

fn tell_verdict(hindrances: &[Hindrance]) {
    let cached = hindrances.iter().all(|hindrance| hindrance.cured_by_cache);
    let (answer, rest) = match (hindrances.is_empty(), cached, accepts_cache()) {
        (true, ..) => ((Style::Good, "yes"), ""),
        (false, true, true) => (
            (Style::Good, "yes"),
            ", through the page cache, which MAPDIRECT_CACHED=1 accepts",
        ),
        (false, true, false) => ((Style::Note, "only"), " with the page cache accepted"),
        (false, false, _) => ((Style::Bad, "no"), ""),
    };
    output::marked("could be mapped MAP_DIRECT: ", answer, rest, 4);
    for hindrance in hindrances {
        output::prose(&format!("  - {}", hindrance.text));
        if !hindrance.mend.is_empty() {
            output::prose(&format!("    help: {}", hindrance.mend));
        }
    }
}

fn hindrances(
    file: &File,
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
            mend: String::from(if accepts_cache() {
                ""
            } else {
                "use persistent memory mounted with dax, or accept the page cache \
                 (MAPDIRECT_CACHED=1)"
            }),
            cured_by_cache: true,
        });
    }
    found.extend(uses::of(file).into_iter().map(|used| Hindrance {
        key: used.key,
        text: used.text,
        mend: used.help,
        cured_by_cache: false,
    }));
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
    let frozen = map.map_or(0, frozen);
    let all = map.map_or(0, |map| map.range().end - map.range().start);
    let stable = all - frozen;
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
        "extents": Value::Null,
        "stable": stable,
        "frozen": frozen,
        "totals": map.map_or_else(|| json!({}), json::totals),
        "pinned": pinned,
        "mappable": {
            "direct": hindrances.is_empty(),
            "cached": hindrances.iter().all(|hindrance| hindrance.cured_by_cache),
            "reasons": reasons,
        },
    })
}
