//! The main job, shown: real files on a real XFS and a real ext4, a range of
//! them mapped `MAP_DIRECT`, and the tools everybody has trying to take the
//! blocks away.

mod dax;
mod operations;
mod report;

use crate::{build, packages};
use anyhow::{Context, Result, ensure};
use clap::Args;
use mapdirect::Gate;
use mapdirect::{BlockMap, DirectMap, MapOptions};
use mapdirect_sys::Errno;
use mapdirect_sys::signal::{Signal, SignalFd, unblocked_in_child};
use mapdirect_testkit::process::{GuardProcess, HELPER, Helper, Role, say};
use mapdirect_testkit::{Disk, Kind, disk, power, raw};
use operations::{OPERATIONS, On};
use report::{Report, Tried};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FallocateFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// Size of the file, and what of it is pinned.
const SIZE: u64 = 16 * MIB;
const PINNED: Range<u64> = 4 * MIB..12 * MIB;
/// A tool that takes longer hangs.
const HANGS: Duration = Duration::from_secs(20);
/// What the exit status of a shell would be after Ctrl-C.
const INTERRUPTED: u8 = 130;
/// How long a grant may take: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(10);

/// What comes of an operation.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Works,
    Refused,
    /// ext4 cannot share blocks, pinned or not.
    NotSupported,
    Hangs,
    Fails,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Works => "works",
            Self::Refused => "ETXTBSY",
            Self::NotSupported => "EOPNOTSUPP",
            Self::Hangs => "hangs",
            Self::Fails => "fails",
        })
    }
}

/// Programs this binary plays besides the tasks.
pub(crate) const ROLES: [Role; 4] = [
    ("store", play_store),
    ("dax", dax::play),
    power::ROLES[0],
    power::ROLES[1],
];

/// Role: maps a file and stores into the middle of it, where nothing may be.
fn play_store(arguments: &[String]) -> Result<()> {
    let path = arguments.first().context("no path")?;
    let file = File::options().read(true).write(true).open(path)?;
    let map = MapOptions::new()
        .accept_page_cache(true)
        .patience(PATIENCE)
        .map(&file)?;
    let at = usize::try_from(3 * MIB)?;
    let mut byte = [1];
    map.read_exact_at(&mut byte, at)?;
    ensure!(byte == [0], "there is something already");
    raw::store_into(&map, at, b'!');
    map.persist(at..at + 1)?;
    say("stored");
    Ok(())
}

/// What became of a process that stored into a hole.
#[derive(Clone, Copy, PartialEq, Eq)]
enum StoreOutcome {
    Worked,
    Killed,
    Failed,
}

impl fmt::Display for StoreOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Worked => "it works",
            Self::Killed => "SIGBUS kills it",
            Self::Failed => "it fails in another way (!)",
        })
    }
}

/// Ctrl-C and its relatives, noticed between two steps.
struct Interruption(Arc<AtomicBool>);

impl Interruption {
    /// Must be called before any other thread is made.
    fn notice() -> Result<Self> {
        let signals = SignalFd::block(&[Signal::INTERRUPT, Signal::TERMINATE, Signal::HANGUP])?;
        let flag = Arc::new(AtomicBool::new(false));
        let set = Arc::clone(&flag);
        std::thread::spawn(move || {
            if signals.wait().is_ok() {
                set.store(true, SeqCst);
            }
        });
        Ok(Self(flag))
    }

    fn is_there(&self) -> bool {
        self.0.load(SeqCst)
    }

    /// Ends the demo, by way of everything that cleans up after it.
    fn check(&self) -> Result<()> {
        ensure!(
            !self.is_there(),
            "interrupted; everything made here is gone"
        );
        Ok(())
    }
}

/// Arguments of `demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Show it on persistent memory, in a virtual machine: stores that go to the media, and a
    /// power cut
    #[arg(long)]
    dax: bool,
    /// Show everything: every operation, the block maps, and what the guard says
    #[arg(long, short)]
    verbose: bool,
}

/// Shows it.
pub(crate) fn run(args: &DemoArgs) -> Result<ExitCode> {
    if args.dax {
        return dax::run(args.verbose);
    }
    packages::require_root()?;
    packages::install_missing(&packages::FOR_TESTS)?;
    println!("building mapdirect: a minute or two the first time ...");
    let binary = build::mapdirect()?;
    let interruption = Interruption::notice()?;
    disk::remove_stale();
    let started = Instant::now();
    let result = show(&binary, &interruption, args.verbose);
    if interruption.is_there() {
        println!("\ninterrupted; everything made here is gone");
        return Ok(ExitCode::from(INTERRUPTED));
    }
    let unexpected = result?;
    println!(
        "\n{} in {:.1} s; everything made here is gone",
        summary(unexpected),
        started.elapsed().as_secs_f64()
    );
    tell_next(&binary);
    Ok(if unexpected == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// How many things were not as expected, in words.
fn summary(unexpected: usize) -> String {
    match unexpected {
        0 => String::from("everything as expected"),
        1 => String::from("1 thing was NOT as expected"),
        many => format!("{many} things were NOT as expected"),
    }
}

/// What to do now, with a file of one's own.
fn tell_next(binary: &Path) {
    let binary = binary.strip_prefix(build::workspace()).unwrap_or(binary);
    let binary = binary.display();
    println!(
        "\nnow with a file of your own, on XFS or ext4, as root:\n  \
         {binary} guard &          # once\n  \
         {binary} show FILE        # where its blocks are\n  \
         {binary} pin FILE         # they stay there until Ctrl-C\n\
         and in another terminal meanwhile:\n  \
         truncate -s 0 FILE                     # Text file busy\n  \
         {binary} status FILE      # who holds it, and who was refused"
    );
}

fn show(binary: &Path, interruption: &Interruption, verbose: bool) -> Result<usize> {
    let guard = GuardProcess::start(binary).context(
        "the guard did not start; `mapdirect doctor` says what this machine lacks \
         (Linux 6.14 or later is needed)",
    )?;
    let gate = guard.client().gate()?;
    println!(
        "a guard listens at {}, gate {}",
        guard.socket().display(),
        gate.name()
    );
    let mut unexpected = 0;
    for kind in [Kind::XFS, Kind::EXT4] {
        interruption.check()?;
        let disk = Disk::new(kind, 400)?;
        println!("\n━━━ {kind}, on a loop device ━━━");
        if verbose {
            println!("mounted at {}", disk.root().display());
        }
        let scene = Scene {
            binary,
            guard: &guard,
            directory: disk.root(),
            kind,
            gate,
            verbose,
            interruption,
        };
        unexpected += scene.play()?;
        unexpected += scene.play_sparse()?;
        disk.unmount().context("the filesystem stays busy")?;
    }
    interruption.check()?;
    unexpected += tell_status(binary, &guard, verbose)?;
    Ok(unexpected)
}

/// What the guard says. A breach is not as expected.
fn tell_status(binary: &Path, guard: &GuardProcess, verbose: bool) -> Result<usize> {
    let counted = guard.client().status()?;
    if !verbose {
        let refused: u64 = counted.refused.iter().map(|(_, count)| count).sum();
        println!(
            "\nthe guard has refused {refused} operations, and {}",
            match counted.breached {
                0 => String::from("no pinned block has changed"),
                breached => format!("pinned blocks have changed all the same: {breached} (!)"),
            }
        );
        return Ok(usize::from(counted.breached > 0));
    }
    println!("\nwhat the guard says of it:");
    let status = Command::new(binary)
        .arg("status")
        .env("MAPDIRECT_SOCKET", guard.socket())
        .output()?;
    for line in String::from_utf8_lossy(&status.stdout).lines().take(24) {
        println!("  {line}");
    }
    Ok(usize::from(counted.breached > 0))
}

/// One filesystem.
struct Scene<'a> {
    binary: &'a Path,
    guard: &'a GuardProcess,
    directory: PathBuf,
    kind: Kind,
    gate: Gate,
    /// Everything is shown.
    verbose: bool,
    interruption: &'a Interruption,
}

impl Scene<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Returns how many things were not as expected.
    fn play(&self) -> Result<usize> {
        self.make_files()?;
        let file = File::options()
            .read(true)
            .write(true)
            .open(self.path("data"))?;
        let granting = Instant::now();
        let map = MapOptions::new()
            .range(PINNED)
            .accept_page_cache(!self.kind.is_dax())
            .guard(self.guard.client())
            .patience(PATIENCE)
            .map(&file)
            .context("the file cannot be mapped MAP_DIRECT")?;
        println!(
            "MiB {} to {} of a file of {} MiB are mapped MAP_DIRECT, in {} µs; others try:",
            PINNED.start / MIB,
            PINNED.end / MIB,
            SIZE / MIB,
            granting.elapsed().as_micros()
        );
        self.draw()?;
        let before = map.block_map().clone();
        let mut report = Report::pinned(self.verbose);
        self.attack(&mut report, Some(&before))?;
        self.attack_by_holder(&mut report, &file, &before)?;
        report.end();
        let mut unexpected = report.unexpected;
        unexpected += self.store(&map, &self.path("data"))?;
        let after = self.block_map()?;
        self.draw()?;
        if after.extents() == before.extents() {
            println!("after all that the block map is what it was, extent by extent");
        } else {
            println!("after all that the block map is NOT what it was");
            unexpected += 1;
        }
        drop(map);
        drop(file);
        let mut report = Report::unpinned(self.verbose);
        self.attack(&mut report, None)?;
        println!(
            "unmapped, each tried again on the file as it was: {} of {} work, {} move blocks{}",
            report.worked,
            report.tried,
            report.moved,
            match report.unsupported {
                0 => String::new(),
                some => format!("\n({some} are not supported by {})", self.kind),
            }
        );
        Ok(unexpected + report.unexpected)
    }

    /// A file with a hole in it: a store there would have to allocate.
    fn play_sparse(&self) -> Result<usize> {
        let path = self.path("sparse");
        let file = File::create_new(&path)?;
        let bytes = vec![b's'; usize::try_from(2 * MIB)?];
        for at in [0, 4 * MIB, 6 * MIB] {
            file.write_all_at(&bytes, at)?;
        }
        file.sync_all()?;
        drop(file);
        self.tell(&["show", "sparse"])?;
        let mut unexpected = 0;
        let before = self.store_in_child()?;
        unexpected += usize::from(before != StoreOutcome::Killed);
        self.tell(&["prepare", "sparse"])?;
        let after = self.store_in_child()?;
        let mut byte = [0];
        File::open(&path)?.read_exact_at(&mut byte, 3 * MIB)?;
        println!("a child stores into a hole of a mapped file: {before}; prepared: {after}");
        unexpected += usize::from(after != StoreOutcome::Worked || byte != *b"!");
        Ok(unexpected)
    }

    /// Has another process map the file and store into the middle of it.
    fn store_in_child(&self) -> Result<StoreOutcome> {
        let mut command = Command::new(build::own()?);
        command
            .args([HELPER, "store"])
            .arg(self.path("sparse"))
            .env("MAPDIRECT_SOCKET", self.guard.socket());
        unblocked_in_child(&mut command);
        let mut helper = Helper::spawn(command)?;
        let said = helper.hear();
        Ok(match (said.as_deref(), helper.status()?) {
            (Ok("stored"), 0) => StoreOutcome::Worked,
            (Err(_), status) if status == 128 + Signal::BUS => StoreOutcome::Killed,
            _ => StoreOutcome::Failed,
        })
    }

    /// Runs a verb of the command line, and shows what it says if everything is
    /// shown.
    fn tell(&self, arguments: &[&str]) -> Result<()> {
        let output = Command::new(self.binary)
            .args(arguments)
            .current_dir(&self.directory)
            .env("MAPDIRECT_SOCKET", self.guard.socket())
            .output()?;
        ensure!(
            output.status.success(),
            "mapdirect {} failed: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        for line in said.lines().filter(|_| self.verbose) {
            println!("  {line}");
        }
        Ok(())
    }

    /// Makes the file, in more than one piece, so that there is something to
    /// defragment, and one with the same bytes.
    fn make_files(&self) -> Result<()> {
        let _ = std::fs::remove_file(self.path("copy"));
        let piece = 2 * MIB;
        let pieces = SIZE / piece;
        for name in ["data", "twin"] {
            let path = self.path(name);
            let _ = std::fs::remove_file(&path);
            let file = File::create_new(path)?;
            let mut bytes = vec![0; usize::try_from(piece)?];
            for at in 0..2 * pieces - 1 {
                bytes.fill(b'a' + u8::try_from(at)?);
                file.write_all_at(&bytes, at * piece)?;
            }
            file.sync_data()?;
            // Every other piece is taken out again: what remains is apart.
            for at in (0..pieces - 1).rev() {
                let collapse = FallocateFlags::COLLAPSE_RANGE;
                rustix::fs::fallocate(&file, collapse, (2 * at + 1) * piece, piece)?;
            }
            file.sync_all()?;
        }
        Ok(())
    }

    fn block_map(&self) -> Result<BlockMap> {
        let file = File::open(self.path("data"))?;
        Ok(mapdirect::block_map(&file, PINNED)?)
    }

    fn draw(&self) -> Result<()> {
        self.tell(&["show", "data"])
    }

    /// Has every tool try. `pinned` is the block map that must stay, if it
    /// is pinned.
    fn attack(&self, report: &mut Report, pinned: Option<&BlockMap>) -> Result<()> {
        let here = if self.kind.is_xfs() {
            On::Xfs
        } else {
            On::Ext4
        };
        for operation in &OPERATIONS {
            if operation.on != On::Both && operation.on != here {
                continue;
            }
            self.interruption.check()?;
            if pinned.is_none() {
                self.make_files()?;
            }
            let before = match pinned {
                Some(pinned) => pinned.clone(),
                None => self.block_map()?,
            };
            let expected = if pinned.is_some() {
                operation.expected(self.gate)
            } else if here == On::Ext4 && operation.tool.contains(&"--reflink=always") {
                Outcome::NotSupported
            } else {
                Outcome::Works
            };
            let (got, took, said) = self.run_tool(operation.tool)?;
            // What was refused may not have changed anything; what works
            // must have, if it is of that kind.
            let kept = self
                .block_map()
                .is_ok_and(|now| now.extents() == before.extents());
            let as_expected = got == expected
                && (pinned.is_none() || kept)
                && !(pinned.is_none() && operation.moves && kept);
            report.row(Tried {
                name: operation.name,
                by: shown(operation.tool),
                is_brief: operation.is_brief(),
                expected,
                got,
                took,
                kept,
                as_expected,
                said,
            });
        }
        Ok(())
    }

    /// Runs a tool to its end and says what came of it.
    fn run_tool(&self, tool: &[&str]) -> Result<(Outcome, Duration, String)> {
        let refusals = self.refusals()?;
        let mut command = Command::new(tool[0]);
        command
            .args(&tool[1..])
            .current_dir(&self.directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // What a tool says must not depend on the language of whoever
            // runs it.
            .env("LC_ALL", "C");
        unblocked_in_child(&mut command);
        let started = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot run {}", tool[0]))?;
        let ended = wait(&mut child)?;
        let took = started.elapsed();
        let Some(status) = ended else {
            return Ok((Outcome::Hangs, took, String::new()));
        };
        self.interruption.check()?;
        let mut text = String::new();
        for stream in [
            child
                .stdout
                .take()
                .map(|stream| Box::new(stream) as Box<dyn Read>),
            child
                .stderr
                .take()
                .map(|stream| Box::new(stream) as Box<dyn Read>),
        ] {
            let mut bytes = Vec::new();
            stream.context("no output")?.read_to_end(&mut bytes)?;
            text.push_str(&String::from_utf8_lossy(&bytes));
        }
        let outcome = if text.contains("Text file busy") {
            Outcome::Refused
        } else if text.contains("not supported") {
            Outcome::NotSupported
        } else if self.refusals()? > refusals {
            // Some tools tell only the system log what stopped them.
            Outcome::Refused
        } else if status.success() {
            Outcome::Works
        } else {
            Outcome::Fails
        };
        Ok((outcome, took, text))
    }

    /// How many operations the guard has refused.
    fn refusals(&self) -> Result<u64> {
        let status = self.guard.client().status()?;
        Ok(status.refused.iter().map(|(_, count)| count).sum())
    }

    /// Not even the holder may.
    fn attack_by_holder(&self, report: &mut Report, file: &File, before: &BlockMap) -> Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        type Call<'a> = (
            &'a str,
            &'a str,
            Outcome,
            &'a dyn Fn() -> rustix::io::Result<()>,
        );
        let calls: [Call<'_>; 3] = [
            ("holder shrinks", "ftruncate(2)", Outcome::Refused, &|| {
                rustix::fs::ftruncate(file, PINNED.start)
            }),
            ("holder punches", "fallocate(2)", Outcome::Refused, &|| {
                rustix::fs::fallocate(file, punch, PINNED.start, 65536)
            }),
            ("holder appends", "pwrite(2)", Outcome::Works, &|| {
                rustix::io::pwrite(file, b"beyond the range", SIZE).map(drop)
            }),
        ];
        for (name, tool, expected, call) in calls {
            let started = Instant::now();
            let got = match call() {
                Ok(()) => Outcome::Works,
                Err(Errno::TXTBSY) => Outcome::Refused,
                Err(_) => Outcome::Fails,
            };
            let took = started.elapsed();
            let kept = self.block_map()?.extents() == before.extents();
            let as_expected = got == expected && kept;
            report.row(Tried {
                name,
                by: format!("{tool} by the descriptor it mapped"),
                is_brief: expected == Outcome::Refused,
                expected,
                got,
                took,
                kept,
                as_expected,
                said: String::new(),
            });
        }
        Ok(())
    }

    /// A store through the mapping is in the file.
    fn store(&self, map: &DirectMap, path: &Path) -> Result<usize> {
        let bytes = b"stored through the mapping";
        let at = 4096;
        let started = Instant::now();
        map.write_all_at(bytes, at)?;
        map.persist(at..at + bytes.len())?;
        let took = started.elapsed();
        let mut read = vec![0; bytes.len()];
        File::open(path)?.read_exact_at(&mut read, PINNED.start + 4096)?;
        let arrived = read == bytes;
        if self.verbose || !arrived {
            println!(
                "\n{} bytes stored through the mapping and persisted in {} µs: {}",
                bytes.len(),
                took.as_micros(),
                if arrived {
                    "others read them in the file"
                } else {
                    "NOT in the file"
                }
            );
        }
        Ok(usize::from(!arrived))
    }
}

/// A tool's command line as one would type it.
fn shown(tool: &[&str]) -> String {
    if tool[0] == "python3" {
        return String::from("python3: mmap.mmap(fd, 4096, offset=5M)[0] = 1");
    }
    let words: Vec<_> = tool
        .iter()
        .map(|word| {
            if word.contains(' ') {
                format!("'{word}'")
            } else {
                (*word).to_owned()
            }
        })
        .collect();
    words.join(" ")
}

fn mark(got: Outcome, as_expected: bool) -> String {
    if as_expected {
        got.to_string()
    } else {
        format!("{got} (!)")
    }
}

/// Waits for a child; nothing if it hangs, and it is killed then.
fn wait(child: &mut Child) -> Result<Option<ExitStatus>> {
    let pid = Pid::from_child(child);
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    let deadline = Instant::now() + HANGS;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left)?;
        match poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&left)) {
            Ok(0) => break,
            Ok(_) => return Ok(Some(child.wait()?)),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    child.kill()?;
    child.wait()?;
    Ok(None)
}
