//! `mapdirect pin`: pin ranges of files, and hold them: until a signal comes, or
//! for a command.

mod beyond;
mod watch;

pub(crate) use self::watch::breach_line;

use self::watch::AllHeld;
use crate::args::{Denial, Format, PinArgs, ScopeChoice, StrengthChoice};
use crate::extents::Extents;
use crate::keeper::{self, Keeper, Kept};
use crate::{Exit, exit, json, output, terminal};
use anyhow::{Context, Result};
use mapdirect::{Pin, PinOptions, Scope};
use mapdirect_sys::signal::{Signal, SignalFd};
use mapdirect_sys::{descriptors, memfd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

pub(crate) fn run(args: &PinArgs) -> Result<Exit> {
    one_table(args)?;
    if args.command.is_empty() {
        return hold(args);
    }
    // The status is that of the command, and failures of our own need one that
    // a command is unlikely to have.
    let ended = keeper::run(args.on_loss, |keeper| keep_for_command(args, keeper));
    Ok(ended.unwrap_or_else(|error| {
        exit::explain(&error);
        Exit::COMMAND_NOT_RUN
    }))
}

/// Holds pins until a signal comes.
fn hold(args: &PinArgs) -> Result<Exit> {
    let signals = SignalFd::block(&[
        Signal::INTERRUPT,
        Signal::TERMINATE,
        Signal::HANGUP,
        Signal::CHILD,
    ])?;
    let files = open_all(args)?;
    let options = options(args, &files)?;
    let pins = match ask(options, files, &signals)? {
        Asked::Answered(pins) => pins?,
        Asked::Interrupted(number) => return Ok(Exit::of_signal(number)),
    };
    require_stable(args, &pins)?;
    for (path, pin) in args.files.iter().zip(&pins) {
        tell(args, path, pin)?;
    }
    beyond::say(args, &pins);
    // Who could not be told where the blocks are has no use for the pin.
    output::check()?;
    if form(args) == Format::Table {
        output::line("held until SIGINT or SIGTERM");
    }
    let mut held = AllHeld::new(&args.files, &pins)?;
    loop {
        let signal_fd = signals.as_fd();
        let mut fds = vec![PollFd::new(&signal_fd, PollFlags::IN)];
        let events = held.events();
        fds.extend(events.iter().map(|event| PollFd::new(event, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        if !fds[0].revents().is_empty() {
            if signals.wait()?.number != Signal::CHILD {
                return Ok(Exit::SUCCESS);
            }
            continue;
        }
        drop(fds);
        drop(events);
        if let Some(exit) = held.notice(&mut output::complain) {
            return Ok(exit);
        }
    }
}

/// Holds pins while a command and its descendants run.
fn keep_for_command(args: &PinArgs, keeper: &mut Keeper) -> Result<Exit> {
    let files = open_all(args)?;
    let options = options(args, &files)?.family(true);
    let pins = options.pin_all(&files)?;
    // The pins do not need them, and a duplicate would be in their way.
    drop(files);
    require_stable(args, &pins)?;
    beyond::say(args, &pins);
    let extents = described(args, &pins)?;
    let mut held = AllHeld::new(&args.files, &pins)?;
    let (program, arguments) = args.command.split_first().context("no command")?;
    let mut command = Command::new(program);
    command.args(arguments);
    hand_out(&mut command, &extents)?;
    match keeper.start(&mut command)? {
        Ok(pid) => keeper.attend(pid, &mut held, args.on_loss),
        Err(exit) => Ok(exit),
    }
}

/// Has a command find the extents of the pins: in a memory file that nobody can
/// change, and that goes with the last descriptor of it.
fn hand_out(command: &mut Command, extents: &str) -> Result<()> {
    let file = memfd::sealed("mapdirect-extents", extents.as_bytes()).context("memfd_create")?;
    let file = out_of_the_way(file)?;
    let number = file.as_raw_fd();
    command.env("MAPDIRECT_EXTENTS", format!("/proc/self/fd/{number}"));
    command.env("MAPDIRECT_EXTENTS_FD", number.to_string());
    descriptors::inherit(command, file);
    Ok(())
}

/// A high number for a descriptor: shells and their scripts use low ones, and a
/// program that has closed this one shall not find another file under it.
fn out_of_the_way(file: OwnedFd) -> Result<OwnedFd> {
    for least in [900, 200, 3] {
        if let Ok(moved) = rustix::io::fcntl_dupfd_cloexec(&file, least) {
            return Ok(moved);
        }
    }
    Ok(file)
}

fn open_all(args: &PinArgs) -> Result<Vec<File>> {
    let access = if args.prepare {
        OFlags::RDWR
    } else {
        OFlags::RDONLY
    };
    let open = |path: &std::path::PathBuf| {
        crate::open::open(path, access)
            .with_context(|| format!("cannot open {}", terminal::name(path)))
    };
    args.files.iter().map(open).collect()
}

fn options(args: &PinArgs, files: &[File]) -> Result<PinOptions> {
    let options = PinOptions::new()
        .patience(Duration::from_millis(args.patience.into()))
        .prepare_first(args.prepare)
        .deny_write(args.deny.contains(&Denial::Write))
        .deny_rename(args.deny.contains(&Denial::Rename))
        .scope(match args.scope {
            ScopeChoice::Range => Scope::Range,
            ScopeChoice::File => Scope::File,
        })
        .strength(args.strength.into());
    Ok(match common_range(args, files)? {
        Some(range) => options.range(range),
        None => options,
    })
}

/// Fails if stable blocks are wanted and some are not.
fn require_stable(args: &PinArgs, pins: &[Pin]) -> Result<()> {
    for (path, pin) in args.files.iter().zip(pins) {
        let frozen = pin.block_map().frozen().next();
        if let Some(extent) = frozen.filter(|_| args.require_stable) {
            anyhow::bail!(
                "bytes {} to {} of {} are not stable but {}\n\
                 help: make them stable: mapdirect prepare, or --prepare here",
                extent.offset,
                extent.end(),
                terminal::name(path),
                extent.state.name(),
            );
        }
    }
    Ok(())
}

/// The range that is pinned of every file, in bytes; nothing for the whole of
/// each.
fn common_range(args: &PinArgs, files: &[File]) -> Result<Option<Range<u64>>> {
    let goes_on = args.strength == StrengthChoice::Stable;
    let Some(range) = &args.range else {
        return Ok(goes_on.then_some(0..u64::MAX));
    };
    if goes_on && range.length.is_none() {
        return Ok(Some(range.offset..u64::MAX));
    }
    let mut common = None;
    for (path, file) in args.files.iter().zip(files) {
        let (name, size) = (terminal::name(path), file.metadata()?.len());
        let bytes = range.resolve(size);
        anyhow::ensure!(
            !bytes.is_empty(),
            "{name} ends at byte {size}, before the range begins"
        );
        anyhow::ensure!(
            common.as_ref().is_none_or(|common| *common == bytes),
            "a range without an end is another one in each file: {name} ends at byte {size}\n\
             help: say how long the range is, or pin these files one by one"
        );
        common = Some(bytes);
    }
    Ok(common)
}

/// What came of asking for pins.
enum Asked {
    Answered(mapdirect::Result<Vec<Pin>>),
    /// A signal came while others had to be waited for.
    Interrupted(i32),
}

/// Asks for the pins, and lets a signal end the waiting: signals are blocked
/// here, so another thread has to wait for the guard. It ends with the process,
/// which takes the connection along, and the guard forgets the request.
fn ask(options: PinOptions, files: Vec<File>, signals: &SignalFd) -> Result<Asked> {
    let (mut answered, answer) = std::io::pipe()?;
    let asking = std::thread::spawn(move || {
        let pins = options.pin_all(&files);
        // The pins do not need them, and a duplicate would be in their way.
        drop(files);
        // Closed here, however this ends.
        drop(answer);
        pins
    });
    let mut limit = Some(Timespec::try_from(output::SILENCE)?);
    loop {
        let signal_fd = signals.as_fd();
        let answered_fd = answered.as_fd();
        let mut fds = [
            PollFd::new(&signal_fd, PollFlags::IN),
            PollFd::new(&answered_fd, PollFlags::IN),
        ];
        match poll(&mut fds, limit.as_ref()) {
            Ok(0) => {
                limit = None;
                output::still_waiting("for others to let go of the file");
                continue;
            }
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        if !fds[1].revents().is_empty() {
            // Nothing is ever written to it: it has ended.
            let _ = answered.read(&mut [0])?;
            return match asking.join() {
                Ok(pins) => Ok(Asked::Answered(pins)),
                Err(_) => anyhow::bail!("asking for the pin failed"),
            };
        }
        let received = signals.wait()?;
        if received.number != Signal::CHILD {
            return Ok(Asked::Interrupted(received.number));
        }
    }
}

/// The form that the extents shall have.
fn form(args: &PinArgs) -> Format {
    match (args.format, args.json || !args.command.is_empty()) {
        (Some(format), _) => format.into(),
        (None, true) => Format::Json,
        (None, false) => Format::Table,
    }
}

/// What a command is told: an array with an object for each file, or what comes
/// of each file in another form.
fn described(args: &PinArgs, pins: &[Pin]) -> Result<String> {
    let pinned = args.files.iter().zip(pins);
    if form(args) == Format::Json {
        let all: Vec<Value> = pinned
            .map(|(path, pin)| describe(args, path, pin))
            .collect();
        return Ok(Value::from(all).to_string());
    }
    let mut text = String::new();
    for (_, pin) in pinned {
        text += &said(args, pin)?;
        text.push('\n');
    }
    Ok(text)
}

/// Nothing in a form but JSON says which file it is of.
fn one_table(args: &PinArgs) -> Result<()> {
    let many = args.files.len() > 1 && matches!(form(args), Format::Csv | Format::Dmsetup);
    anyhow::ensure!(
        !many,
        "in this form nothing says which file an extent is of\n\
         help: pin the files one by one, or take JSON"
    );
    Ok(())
}

/// The extents of a pin in a form other than JSON.
fn said(args: &PinArgs, pin: &Pin) -> Result<String> {
    let map = pin.block_map();
    let extents = Extents::pinned(map, args.strength.into());
    extents.say(form(args), None, args.device.as_deref())
}

/// A pin, for programs.
fn describe(args: &PinArgs, path: &Path, pin: &Pin) -> Value {
    let map = pin.block_map();
    let extents = Extents::pinned(map, args.strength.into());
    let mut value = json!({
        "file": json::name(path),
        "pin": pin.pin_id(),
        "pid": std::process::id(),
        "range": json::range(&pin.range()),
        "scope": match args.scope {
            ScopeChoice::Range => "range",
            ScopeChoice::File => "file",
        },
        "strength": json::strength(args.strength.into()),
        "file_size": map.file_size(),
        "block_size": map.block_size(),
        "device": map.device().to_string(),
        "stable": map.is_stable(),
        "extents": extents.list(),
    });
    extents.add_devices(&mut value);
    value
}

fn tell(args: &PinArgs, path: &Path, pin: &Pin) -> Result<()> {
    let map = pin.block_map();
    let range = pin.range();
    match form(args) {
        Format::Table => {}
        Format::Json => {
            output::json(&describe(args, path, pin));
            return Ok(());
        }
        _ => {
            output::line(&said(args, pin)?);
            return Ok(());
        }
    }
    output::prose(&format!(
        "pinned {} of {} (blocks of {} bytes on device {})",
        output::bytes(&range),
        terminal::name(path),
        map.block_size(),
        map.device(),
    ));
    if args.strength == StrengthChoice::Stable {
        output::prose(
            "held is what is written, and what is written from now on; the rest may change",
        );
    }
    output::line(said(args, pin)?.trim_end());
    Ok(())
}
