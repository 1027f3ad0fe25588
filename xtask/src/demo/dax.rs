//! The same on persistent memory, in a virtual machine: nothing between a
//! store and the media, and nothing lost when the power goes.

use super::{Interruption, Scene, summary, tell_status};
use crate::arch::Arch;
use crate::table::Table;
use crate::{build, packages, vm};
use anyhow::{Context, Result, ensure};
use mapdirect::{DirectMap, MapOptions};
use mapdirect_sys::signal::{Signal, SignalFd};
use mapdirect_testkit::process::{GuardProcess, HELPER};
use mapdirect_testkit::{Disk, Kind, disk, latency, raw};
use rustix::fs::{Mode, OFlags};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Of Debian's kernels the newest: XFS can share blocks on persistent memory.
const KERNEL: &str = "7.3";
const KIND: Kind = Kind::XfsDax { reflink: true };
/// One device for every kind.
const PMEM: &str = "/dev/pmem0,/dev/pmem0,/dev/pmem0";
const NVDIMM: u64 = 512 << 20;
const LIMIT: Duration = Duration::from_secs(600);
const PAGE: usize = 4096;
/// An argument of the role.
const VERBOSE: &str = "verbose";

/// Shows it, from outside.
pub(super) fn run(verbose: bool) -> Result<ExitCode> {
    packages::install_missing(&packages::FOR_TESTS)?;
    println!("building mapdirect: a minute or two the first time ...");
    let binary = build::mapdirect()?;
    let boot = vm::boot(Arch::OWN, KERNEL)?.time_limit(LIMIT);
    let started = Instant::now();
    // From here on there is something to clean up.
    let signals = SignalFd::block(&[Signal::INTERRUPT, Signal::TERMINATE, Signal::HANGUP])?;
    let signals = Arc::new(signals);
    let boot = boot.interruption(Arc::clone(&signals));
    match show(&boot, &binary, verbose) {
        Err(error) if vm::is_interruption(&error) => {
            println!("\ninterrupted; everything made here is gone");
            Ok(ExitCode::from(vm::ended_by(signals.wait()?.number)))
        }
        Err(error) => Err(error),
        Ok(as_expected) => {
            println!(
                "\n{} in {:.0} s; everything made here is gone",
                summary(usize::from(!as_expected)),
                started.elapsed().as_secs_f64()
            );
            Ok(if as_expected {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
    }
}

fn show(boot: &vm::Boot, binary: &Path, verbose: bool) -> Result<bool> {
    println!(
        "booting Debian's kernel {} with an NVDIMM, emulated ...",
        boot.release()
    );
    let scratch = vm::RunDirectory::new()?;
    let mut machine = boot
        .clone()
        .nvdimm(vm::Nvdimm {
            file: scratch.path().join("nvdimm"),
            size: NVDIMM,
        })
        .start()?;
    let own = build::own()?;
    let mut words: Vec<&OsStr> = vec![
        own.as_os_str(),
        HELPER.as_ref(),
        "dax".as_ref(),
        binary.as_os_str(),
    ];
    if verbose {
        words.push(VERBOSE.as_ref());
    }
    let program = vm::program(&words, &[(disk::PMEM_VARIABLE, PMEM)]);
    let status = machine.run(&program, io::stdout(), io::stderr())?;
    machine.switch_off()?;
    drop(scratch);

    println!(
        "\n━━━ a power cut: a program appends records of 256 bytes to a log on {KIND} and says \
         which are durable;\n    the machine is killed in the middle of it, and booted again ━━━"
    );
    let cut = vm::cut(boot, binary, KIND)?;
    println!(
        "  the power went {} ms after the first record; {} records were told to be durable",
        cut.after.as_millis(),
        cut.durable
    );
    println!("  booted again: {}", cut.found);
    Ok(status == 0)
}

/// Role: what is shown inside of the machine. Arguments: mapdirect, and whether
/// everything is to be shown.
pub(super) fn play(arguments: &[String]) -> Result<()> {
    let (binary, verbose) = match arguments {
        [binary] => (binary, false),
        [binary, more] if more == VERBOSE => (binary, true),
        _ => anyhow::bail!("wrong arguments"),
    };
    let binary = Path::new(binary);
    let interruption = Interruption::notice()?;
    let guard = GuardProcess::start(binary)?;
    let disk = Disk::new(KIND, 0)?;
    println!(
        "\n━━━ {KIND} on {}, mounted at {} with dax=always ━━━",
        device()?.display(),
        disk.root().display()
    );
    let scene = Scene {
        binary,
        guard: &guard,
        directory: disk.root(),
        kind: KIND,
        gate: guard.client().gate()?,
        verbose,
        interruption: &interruption,
    };
    let mut unexpected = scene.play()?;
    unexpected += show_media(&guard, &disk)?;
    unexpected += show_latencies(&guard, &disk)?;
    unexpected += tell_status(binary, &guard, verbose)?;
    disk.unmount().context("the filesystem stays busy")?;
    ensure!(unexpected == 0, "{}", summary(unexpected));
    Ok(())
}

fn device() -> Result<std::path::PathBuf> {
    KIND.device().context("there is no persistent memory")
}

/// A file of so many bytes, and its mapping.
fn mapped(
    guard: &GuardProcess,
    disk: &Disk,
    name: &str,
    length: usize,
) -> Result<(File, DirectMap)> {
    let path = disk.path(name);
    std::fs::write(&path, vec![b'.'; length])?;
    let file = File::options().read(true).write(true).open(path)?;
    file.sync_all()?;
    // As strict as can be: without DAX this fails.
    let map = MapOptions::new().guard(guard.client()).map(&file)?;
    Ok((file, map))
}

/// What a reader of the device finds, who goes past every cache, at the place
/// that the extents name.
fn show_media(guard: &GuardProcess, disk: &Disk) -> Result<usize> {
    let device = device()?;
    println!(
        "\nstores to a mapping, and what {} holds there at once, read past every cache (O_DIRECT):",
        device.display()
    );
    let (file, map) = mapped(guard, disk, "media", 1 << 20)?;
    let flags = OFlags::RDONLY | OFlags::DIRECT;
    let raw_device = File::from(rustix::fs::open(&device, flags, Mode::empty())?);
    let mut page = raw::PageBuffer::new(PAGE);
    let table = Table::new([
        ("stored", 26),
        ("byte of the file", 16),
        ("byte of the device", 18),
        ("found on the device", 26),
    ]);
    let mut unexpected = 0;
    for (offset, text) in [
        (0, "every store"),
        (70_000, "goes to the media"),
        (524_280, "across a page's end"),
        (1_048_550, "without a system call"),
    ] {
        map.write_all_at(text.as_bytes(), offset)?;
        let mut found = Vec::new();
        let mut first = None;
        for at in offset..offset + text.len() {
            let at = at as u64;
            let extent = map.block_map().find(at).context("no extent")?;
            let place = extent.physical.context("no place")? + (at - extent.offset);
            first.get_or_insert(place);
            let within = place % PAGE as u64;
            raw_device.read_exact_at(page.bytes(), place - within)?;
            found.push(page.bytes()[usize::try_from(within)?]);
        }
        let same = found == text.as_bytes();
        unexpected += usize::from(!same);
        table.row([
            text.to_owned(),
            offset.to_string(),
            first.unwrap_or_default().to_string(),
            format!(
                "{}{}",
                String::from_utf8_lossy(&found),
                if same { "" } else { " (!)" }
            ),
        ]);
    }
    let cached = raw::cached_pages(file.as_fd(), 1 << 20)?;
    unexpected += usize::from(cached > 0);
    println!("  pages of the file in the page cache: {cached}");
    Ok(unexpected)
}

/// Bars on a scale where each step is as many times as long.
fn show_latencies(guard: &GuardProcess, disk: &Disk) -> Result<usize> {
    println!("\nuntil 64 bytes are durable, in microseconds (ten times as long is 10 steps):");
    let (file, map) = mapped(guard, disk, "latency", 1 << 20)?;
    let updates = latency::updates(&map, &file)?;
    let (first, synced) = latency::first_stores(&guard.client(), &disk.root(), 64, &|| 0)?;
    for (name, microseconds) in [
        ("16 stored and flushed, one drain, each", updates.grouped),
        ("copy_persist", updates.copy_persist),
        ("stored, persist", updates.persist),
        ("pwrite, fdatasync", updates.fdatasync),
        (
            "first store to a pinned page, persisted",
            first.microseconds,
        ),
        (
            "first store to an unwritten page, MAP_SYNC",
            synced.microseconds,
        ),
    ] {
        let longer = |steps: &i32| f64::from(*steps) <= (microseconds * 100.0).log10() * 10.0;
        let bar: String = (1..=70).take_while(longer).map(|_| '█').collect();
        println!("  {name:<42} {microseconds:>9.2}  {bar}");
    }
    println!(
        "  persist is {:.0} times as fast as fdatasync; a first store to what is pinned {:.0} times \
         as one with MAP_SYNC",
        updates.times_faster[1],
        synced.microseconds / first.microseconds
    );
    Ok(0)
}
