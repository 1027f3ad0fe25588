//! Any command of this machine on another kernel, in a virtual machine.
//!
//! The machine sees the files of this one; what it writes stays in its
//! memory. Kernels are Debian's own.

mod check;
mod cpio;
mod cut;
mod debian;
mod kernel;
mod machine;
mod modules;
mod userland;
pub(crate) mod version;
mod vmlinux;

pub(crate) use check::{Scope, self_test};
pub(crate) use cut::cut;
pub(crate) use machine::{Boot, Machine, Nvdimm, RunDirectory};
pub(crate) use userland::get as userland;

use crate::arch::Arch;
use crate::{build, packages};
use anyhow::{Context, Result, ensure};
use clap::Args;
use debian::Series;
use kernel::{Cache, Kernel, Wanted};
use machine::{Clock, End, Failure, NVDIMM_UNIT};
use mapdirect_cli::size::parse_size;
use mapdirect_sys::signal::{Signal, SignalFd};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use xtask_init::wire::Program;

/// Exit statuses that are not the command's.
const CRASHED: u8 = 123;
const TOO_LONG: u8 = 124;
const NO_MACHINE: u8 = 125;

/// With less a kernel hangs, or has no room for what is written.
const LEAST_MEMORY: u64 = 256 << 20;

/// Arguments of `vm`.
#[derive(Debug, Args)]
#[command(after_help = "\
The command runs as root in the current directory, with this environment and no input. Every file of \
this machine is there; what is written to them stays in the memory of the virtual one.

Its exit status is returned, 128 and the signal if one ended it. 123: the virtual machine crashed. \
124: the time limit. 125: there is no machine to be had. 126 and 127: the command cannot be run.")]
pub(crate) struct VmArgs {
    /// What kind of machine: one that is not this machine's own kind has Debian's programs for it,
    /// and sees of this machine's files the workspace and the current directory
    #[arg(long, value_enum, default_value_t = Arch::OWN)]
    arch: Arch,
    /// A series of Debian's kernels, such as 6.1, 6.12 or 7.3; a package with a kernel; or a
    /// directory like an unpacked one
    #[arg(long, value_name = "SERIES|PATH", default_value = "7.3")]
    kernel: Wanted,
    /// An NVDIMM of this size: /dev/pmem0, in mode fsdax; given again, /dev/pmem1, and so on
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    nvdimm: Vec<u64>,
    /// Keep what the NVDIMM holds in this file; once for each
    #[arg(long, value_name = "FILE", requires = "nvdimm")]
    nvdimm_file: Vec<PathBuf>,
    /// Memory
    #[arg(long, value_name = "SIZE", default_value = "2G", value_parser = parse_size)]
    memory: u64,
    /// Processors
    #[arg(long, value_name = "NUMBER", default_value = "2",
          value_parser = clap::value_parser!(u32).range(1..=64))]
    processors: u32,
    /// Let clocks count instructions, one for a nanosecond: what is measured by them does not depend
    /// on what else this machine does, nor on how fast it emulates
    #[arg(long)]
    count_instructions: bool,
    /// More words for the kernel's command line
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        hide_default_value = true
    )]
    parameters: String,
    /// How long the machine may run
    #[arg(long, value_name = "SECONDS", default_value = "600")]
    time_limit: u64,
    /// Show what the kernel says, and how long it took to boot
    #[arg(long, short)]
    verbose: bool,
    /// Fetch the newest kernel of the series and boot nothing; otherwise what was fetched once is
    /// used, without a look at the mirror
    #[arg(long, conflicts_with_all = ["check", "command"])]
    fetch: bool,
    /// Check the virtual machines themselves, on three kernels
    #[arg(long, conflicts_with_all = ["fetch", "command"])]
    check: bool,
    /// What to run
    #[arg(last = true, value_name = "COMMAND", required_unless_present_any = ["fetch", "check"])]
    command: Vec<OsString>,
}

/// Runs a command on another kernel.
pub(crate) fn run(args: &VmArgs) -> Result<ExitCode> {
    if args.check {
        return check::run();
    }
    if args.fetch {
        println!("{}", fetch(args.arch, &args.kernel)?.release());
        return Ok(ExitCode::SUCCESS);
    }
    let status = run_command(args).unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        match end_of(&error) {
            Some(End::Crashed) => CRASHED,
            Some(End::TooLong) => TOO_LONG,
            Some(End::Interrupted | End::NotStarted) | None => NO_MACHINE,
        }
    });
    Ok(ExitCode::from(status))
}

/// Whether somebody wanted the machine to end.
pub(crate) fn is_interruption(error: &anyhow::Error) -> bool {
    end_of(error) == Some(End::Interrupted)
}

/// How the machine ended whose failure this is.
fn end_of(error: &anyhow::Error) -> Option<End> {
    error.downcast_ref().map(|failure: &Failure| failure.end)
}

/// Fetches the newest kernel there is.
pub(crate) fn fetch(arch: Arch, wanted: &Wanted) -> Result<Kernel> {
    prepare(arch)?;
    match wanted {
        Wanted::Series(series) => cache(arch)?.fetch(series),
        Wanted::Path(_) => cache(arch)?.get(wanted),
    }
}

/// A machine with the newest kernel of a series that is kept, or else the
/// newest there is.
pub(crate) fn boot(arch: Arch, series: &str) -> Result<Boot> {
    prepare(arch)?;
    let wanted = Series::parse(series).with_context(|| format!("{series} is no series"))?;
    let kernel = cache(arch)?.get(&Wanted::Series(wanted))?;
    of_arch(arch, kernel)
}

/// A machine that sees what it can run.
fn of_arch(arch: Arch, kernel: Kernel) -> Result<Boot> {
    let boot = Boot::new(arch, kernel, build::init(arch)?);
    if arch == Arch::OWN {
        return Ok(boot);
    }
    let mut shared = vec![
        build::workspace().to_owned(),
        build::target()?,
        std::env::current_dir().context("there is no current directory")?,
    ];
    // A line each.
    for path in &shared {
        let is_text = path.to_str().is_some_and(|path| !path.contains('\n'));
        ensure!(is_text, "{} cannot be shared", path.display());
    }
    shared.dedup();
    Ok(boot.root(userland::get(arch)?, shared))
}

/// A program as a user of this machine would run it, with more in its
/// environment.
pub(crate) fn program(words: &[&OsStr], more: &[(&str, &str)]) -> Program {
    let more = more.iter().map(|(name, value)| (name.into(), value.into()));
    Program {
        directory: build::workspace().to_owned(),
        words: words.iter().map(Into::into).collect(),
        environment: environment().into_iter().chain(more).collect(),
    }
}

/// What every machine needs of this one.
fn prepare(arch: Arch) -> Result<()> {
    ensure!(
        cfg!(target_arch = "x86_64"),
        "the virtual machines run programs of this machine, and are x86_64: run this on x86_64"
    );
    packages::install_missing(&packages::FOR_MACHINES)?;
    if arch == Arch::Aarch64 {
        packages::install_missing(&packages::FOR_AARCH64)?;
    }
    machine::remove_stale();
    Ok(())
}

fn cache(arch: Arch) -> Result<Cache> {
    let mut directory = build::target()?.join("vm");
    if arch != Arch::OWN {
        directory.push(arch.name());
    }
    Ok(Cache::new(directory, arch))
}

/// Boots, runs the command, and returns the exit status of this process.
fn run_command(args: &VmArgs) -> Result<u8> {
    ensure!(
        args.memory >= LEAST_MEMORY,
        "no kernel boots with less than {} MiB of memory",
        LEAST_MEMORY >> 20
    );
    ensure!(
        args.nvdimm_file.len() <= args.nvdimm.len(),
        "there are more files than NVDIMMs to keep in them: give --nvdimm SIZE for each"
    );
    prepare(args.arch)?;
    let kernel = cache(args.arch)?.get(&args.kernel)?;
    let program = Program {
        directory: std::env::current_dir().context("there is no current directory")?,
        words: args.command.clone(),
        environment: environment(),
    };
    // From here on there is something to clean up.
    let signals = SignalFd::block(&[Signal::INTERRUPT, Signal::TERMINATE, Signal::HANGUP])?;
    let signals = Arc::new(signals);
    let mut boot = of_arch(args.arch, kernel)?
        .memory(args.memory)
        .processors(args.processors)
        .clock(if args.count_instructions {
            Clock::Instructions
        } else {
            Clock::Time
        })
        .parameters(&args.parameters)
        .time_limit(Duration::from_secs(args.time_limit))
        .console_shown(args.verbose)
        .interruption(Arc::clone(&signals));
    let scratch = RunDirectory::new()?;
    for (number, size) in args.nvdimm.iter().enumerate() {
        let file = match args.nvdimm_file.get(number) {
            Some(file) => file.clone(),
            None => scratch.path().join(format!("nvdimm{number}")),
        };
        let size = size.next_multiple_of(NVDIMM_UNIT);
        boot = boot.nvdimm(Nvdimm { file, size });
    }
    match boot_and_run(&boot, &program, args) {
        Err(error) if end_of(&error) == Some(End::Interrupted) => {
            eprintln!("xtask: {error:#}");
            Ok(ended_by(signals.wait()?.number))
        }
        // As programs end that do not ignore it.
        Err(error) if is_broken_pipe(&error) => Ok(ended_by(Signal::PIPE)),
        result => result,
    }
}

fn boot_and_run(boot: &Boot, program: &Program, args: &VmArgs) -> Result<u8> {
    let mut machine = boot.start()?;
    if args.verbose {
        let seconds = machine.booted_in().as_secs_f64();
        eprintln!("xtask: booted in {seconds:.1} s");
    }
    let status = machine.run(program, std::io::stdout(), std::io::stderr())?;
    if !args.nvdimm_file.is_empty() {
        machine.switch_off()?;
    }
    Ok(status)
}

/// What the exit status of a shell would be after a signal.
pub(crate) fn ended_by(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

/// Whether nobody reads what the command prints any more.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref()
        .is_some_and(|error: &std::io::Error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// The environment of this process, with a path that finds what root runs.
fn environment() -> Vec<(OsString, OsString)> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let root: Vec<PathBuf> = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"]
        .map(PathBuf::from)
        .into();
    let mut directories: Vec<_> = std::env::split_paths(&path).collect();
    for directory in root {
        if !directories.contains(&directory) {
            directories.push(directory);
        }
    }
    let path = std::env::join_paths(directories).unwrap_or(path);
    std::env::vars_os()
        .filter(|(name, _)| name != "PATH")
        .chain([("PATH".into(), path)])
        .collect()
}
