//! `mapdirect prepare`: every block allocated, written, and the file's own.

use crate::args::{Format, PrepareArgs};
use crate::extents::Extents;
use crate::open::Unopened;
use crate::size::human;
use crate::terminal;
use crate::{Exit, draw, json, output};
use anyhow::{Result, anyhow};
use indicatif::{ProgressBar, ProgressStyle};
use mapdirect::{Guard, PrepareOptions, Prepared, Progress};
use mapdirect_sys::Errno;
use rustix::fs::{Mode, OFlags};
use serde_json::json;
use std::fs::File;
use std::io::IsTerminal;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

/// Why nobody may open a file for writing.
fn who_keeps(path: &Path) -> String {
    let pins = crate::open::open(path, OFlags::RDONLY)
        .ok()
        .and_then(|file| Guard::from_env().pinned_ranges(&file).ok())
        .unwrap_or_default();
    let mut holders: Vec<_> = pins.iter().map(|pin| pin.pid).collect();
    holders.sort_unstable();
    holders.dedup();
    let holders: Vec<_> = holders.iter().map(ToString::to_string).collect();
    match holders.as_slice() {
        [] => String::from(": it is being executed, or is swap space"),
        [one] => {
            format!("\nit is pinned by process {one}\nhelp: prepare a file before it is pinned")
        }
        several => format!(
            "\nit is pinned by processes {}\nhelp: prepare a file before it is pinned",
            several.join(", ")
        ),
    }
}

/// The file to prepare, and whether it was made for that.
struct Subject {
    file: File,
    created: bool,
}

impl Subject {
    fn open(path: &Path, create: bool) -> Result<Self> {
        let mut created = false;
        let mut opened = crate::open::open(path, OFlags::RDWR);
        if create && matches!(opened, Err(Unopened::Errno(Errno::NOENT))) {
            // What somebody else makes at this moment is not ours to remove.
            let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::EXCL;
            let made = rustix::fs::open(path, flags, Mode::from(0o666));
            opened = made.map(File::from).map_err(Unopened::Errno);
            created = opened.is_ok();
        }
        let file = opened.map_err(|why| {
            let name = terminal::name(path);
            let cannot = format!("cannot open {name} for reading and writing: {why}");
            match why {
                Unopened::Errno(Errno::NOENT) if !create => {
                    anyhow!("{cannot}\nhelp: --size SIZE makes a file")
                }
                Unopened::Errno(Errno::TXTBSY) => anyhow!("{cannot}{}", who_keeps(path)),
                _ => anyhow!(cannot),
            }
        })?;
        Ok(Self { file, created })
    }

    /// Takes a file away that was made here, if its name still leads to it.
    fn discard(self, path: &Path) {
        let same = || {
            let (here, there) = (self.file.metadata().ok()?, path.metadata().ok()?);
            Some((here.dev(), here.ino()) == (there.dev(), there.ino()))
        };
        if self.created && same() == Some(true) {
            // What it failed of is the message that counts.
            let _ = std::fs::remove_file(path);
        }
    }
}

pub(crate) fn run(args: &PrepareArgs) -> Result<Exit> {
    let subject = Subject::open(&args.file, args.size.is_some())?;
    match prepare(args, &subject) {
        Ok(()) => Ok(Exit::SUCCESS),
        Err(error) => {
            subject.discard(&args.file);
            Err(error)
        }
    }
}

fn prepare(args: &PrepareArgs, subject: &Subject) -> Result<()> {
    let old_size = subject.file.metadata()?.len();
    // The description was made here, and nobody else has it.
    let mut options = PrepareOptions::new()
        .huge(args.huge)
        .contiguous(args.contiguous)
        .exclusive(true)
        .patience(Duration::from_millis(args.patience.into()));
    if let Some(size) = args.size {
        options = options.size(size);
    }
    if let Some(range) = &args.range {
        options = options.range(range.resolve(args.size.unwrap_or(old_size)));
    }
    let bar = Bar::new(args.json || args.format.is_some());
    let mut told = false;
    let prepared = options.prepare_with(&subject.file, |progress| {
        bar.tell(progress);
        if progress.waiting >= output::SILENCE && !told {
            told = true;
            bar.0.suspend(|| {
                output::complain(&format!(
                    "waiting for I/O of others that uses pages of {} (a page in a pipe, or direct \
                     I/O by way of a mapping)",
                    terminal::name(&args.file)
                ));
            });
        }
    });
    bar.0.finish_and_clear();
    tell(args, subject, old_size, &prepared?)
}

/// A bar on stderr, if anybody looks at it.
struct Bar(ProgressBar);

impl Bar {
    fn new(quiet: bool) -> Self {
        if quiet || !std::io::stderr().is_terminal() {
            return Self(ProgressBar::hidden());
        }
        let bar = ProgressBar::new(0);
        let template = "{wide_bar} {binary_bytes} of {binary_total_bytes}, {eta} left";
        Self(match ProgressStyle::with_template(template) {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        })
    }

    fn tell(&self, progress: Progress) {
        self.0.set_length(progress.total);
        self.0.set_position(progress.done);
    }
}

fn tell(args: &PrepareArgs, subject: &Subject, old_size: u64, prepared: &Prepared) -> Result<()> {
    let created = subject.created;
    let map = prepared.block_map();
    let range = map.range();
    let huge = prepared.huge_pieces();
    let extents = Extents::of(&subject.file, map);
    if let Some(format) = args.format.filter(|format| *format != Format::Json) {
        let device = args.device.as_deref();
        output::line(extents.say(format, Some(&subject.file), device)?.trim_end());
        return Ok(());
    }
    if args.json || args.format.is_some() {
        let mut value = json!({
            "file": json::name(&args.file),
            "created": created,
            "file_size": map.file_size(),
            "old_size": old_size,
            "block_size": map.block_size(),
            "device": map.device().to_string(),
            "range": json::range(&range),
            "stable": map.is_stable(),
            "allocated": prepared.allocated(),
            "converted": prepared.converted(),
            "unshared": prepared.unshared(),
            "huge_pieces": { "pieces": huge.pieces, "aligned": huge.aligned },
            "runs": prepared.runs(),
            "why_not_contiguous": prepared.why_not_contiguous(),
            "extents": extents.list(),
        });
        extents.add_devices(&mut value);
        output::json(&value);
        return Ok(());
    }
    let done: Vec<_> = [
        (prepared.allocated(), "allocated"),
        (prepared.converted(), "unwritten, now written"),
        (prepared.unshared(), "shared, now copied"),
    ]
    .into_iter()
    .filter(|(bytes, _)| *bytes > 0)
    .map(|(bytes, what)| format!("{} {what}", human(bytes)))
    .collect();
    output::prose(&format!(
        "{}: bytes {} to {} are stable: {}",
        terminal::name(&args.file),
        range.start,
        range.end,
        if done.is_empty() {
            String::from("nothing was to be done")
        } else {
            done.join(", ")
        }
    ));
    let size = map.file_size();
    if created {
        output::line(&format!("made, with {}", output::count(size, "byte")));
    } else if size != old_size {
        output::line(&format!("made longer, from {old_size} to {size} bytes"));
    }
    output::line(draw::block_map(map, &[]).trim_end());
    if args.huge {
        output::prose(&format!(
            "{} of {} of 2 MiB can be mapped with huge pages",
            huge.aligned,
            output::count(huge.pieces, "piece")
        ));
    }
    if args.contiguous {
        output::prose(&match prepared.why_not_contiguous() {
            None => String::from("it is contiguous: one run of blocks on the device"),
            Some(why) => format!(
                "it is not contiguous: {} of blocks; {why}",
                output::count(prepared.runs(), "run")
            ),
        });
    }
    Ok(())
}
