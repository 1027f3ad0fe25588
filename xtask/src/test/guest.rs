//! Tests on other kernels, in virtual machines.

use super::tally::Tally;
use super::{Counts, Ran, stage};
use crate::arch::Arch;
use crate::{build, vm};
use anyhow::{Context, Result};
use mapdirect_testkit::contract::GATE_VARIABLE;
use mapdirect_testkit::{Kind, disk};
use std::ffi::OsStr;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// What is tried on one kernel, in one machine after the other.
#[derive(Clone, Debug)]
pub(super) struct Guest {
    /// What the summary calls it.
    pub(super) name: String,
    /// What kind of machine.
    pub(super) arch: Arch,
    /// A series of Debian's kernels.
    pub(super) kernel: &'static str,
    /// More for the kernel's command line.
    pub(super) parameters: &'static str,
    /// How many NVDIMMs the machine has.
    pub(super) nvdimms: usize,
    /// More for the environment of the tests.
    pub(super) environment: Vec<(&'static str, String)>,
    /// Parts of the names of native tests, run one after the other; of each
    /// at least one must be there.
    pub(super) filters: Vec<String>,
    /// A filesystem on persistent memory, and how often its power is cut.
    pub(super) cuts: Option<(Kind, u32)>,
    /// For the tests, from the start of the machine on.
    pub(super) time_limit: Duration,
}

/// XFS holds itself to be too small with less than 300 MiB.
const NVDIMM: u64 = 512 << 20;

/// Runs them all, and `others` beside them, as many at once as there are
/// processors: an emulated machine keeps one of them busy.
pub(super) fn run(guests: &[Guest], others: &[fn() -> Ran]) -> Vec<Ran> {
    let started = stage("in virtual machines");
    let built = Built::of(guests);
    let built = match built {
        Ok(built) => built,
        Err(error) => {
            let failed = |guest| could_not_run(guest, started, &error);
            return guests.iter().map(failed).collect();
        }
    };
    let jobs = guests.len() + others.len();
    let job = |number: usize| match guests.get(number) {
        Some(guest) => guest.run(&built),
        None => others[number - guests.len()](),
    };
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    let lock = || done.lock().unwrap_or_else(PoisonError::into_inner);
    thread::scope(|scope| {
        let processors = thread::available_parallelism().map_or(1, Into::into);
        for _ in 0..processors.min(jobs) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Relaxed);
                    if number >= jobs {
                        break;
                    }
                    let ran = job(number);
                    lock().push((number, ran));
                }
            });
        }
    });
    let mut done = std::mem::take(&mut *lock());
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, ran)| ran).collect()
}

/// What runs in the machines.
struct Built {
    /// The tests, for each kind of machine.
    native: Vec<(Arch, Result<PathBuf>)>,
    binary: PathBuf,
}

impl Built {
    fn of(guests: &[Guest]) -> Result<Self> {
        let mut native: Vec<(Arch, Result<PathBuf>)> = Vec::new();
        for guest in guests {
            if !native.iter().any(|(arch, _)| *arch == guest.arch) {
                native.push((guest.arch, build::native_tests(guest.arch)));
            }
        }
        Ok(Self {
            native,
            binary: build::mapdirect()?,
        })
    }

    fn native(&self, of: Arch) -> Result<&Path> {
        let mut all = self.native.iter();
        // One kind that cannot be built for leaves the others as they are.
        match all.find(|(arch, _)| *arch == of).map(|(_, built)| built) {
            Some(Ok(path)) => Ok(path),
            Some(Err(error)) => Err(anyhow::anyhow!("for {}: {error:#}", of.name())),
            None => Err(anyhow::anyhow!("nothing was built for {}", of.name())),
        }
    }
}

fn could_not_run(guest: &Guest, started: Instant, error: &anyhow::Error) -> Ran {
    Ran {
        name: guest.name.clone(),
        ok: false,
        counts: Some(Counts::default()),
        took: started.elapsed(),
        notes: vec![format!("it could not run: {error:#}")],
    }
}

impl Guest {
    fn run(&self, built: &Built) -> Ran {
        let started = Instant::now();
        let mut tally = Tally::new();
        let native = built.native(self.arch);
        let result = native.and_then(|native| self.run_tests(native, &mut tally));
        let result = result.and_then(|()| self.cut_power(&built.binary, &mut tally));
        let mut ran = tally.ran(&self.name, result.is_ok(), started);
        if let Err(error) = result {
            self.say(&format!("{error:#}"));
            let first = error.to_string();
            ran.notes
                .push(first.lines().next().unwrap_or_default().to_owned());
        }
        ran
    }

    fn say(&self, line: &str) {
        println!("  {}: {line}", self.name);
    }

    fn boot(&self) -> Result<vm::Boot> {
        Ok(vm::boot(self.arch, self.kernel)?
            .parameters(self.parameters)
            .time_limit(self.time_limit))
    }

    fn run_tests(&self, native: &Path, tally: &mut Tally) -> Result<()> {
        let scratch = vm::RunDirectory::new()?;
        let mut boot = self.boot()?;
        let by_gate = |(name, _): &(&str, String)| *name == GATE_VARIABLE;
        if self.environment.iter().any(by_gate) {
            // It makes disks that lie in memory.
            boot = boot.memory(4 << 30);
        }
        for number in 0..self.nvdimms {
            boot = boot.nvdimm(vm::Nvdimm {
                file: scratch.path().join(format!("nvdimm{number}")),
                size: NVDIMM,
            });
        }
        let mut machine = boot.start()?;
        let devices: Vec<_> = (0..self.nvdimms).map(|n| format!("/dev/pmem{n}")).collect();
        let devices = devices.join(",");
        let own = self.environment.iter();
        let mut environment: Vec<(&str, &str)> =
            own.map(|(name, value)| (*name, value.as_str())).collect();
        if self.nvdimms > 0 {
            environment.push((disk::PMEM_VARIABLE, &devices));
        }
        // A guard that meets a panic ends; what the panic said is enough.
        environment.push(("RUST_BACKTRACE", "0"));
        let mut failed = None;
        for filter in &self.filters {
            let words: [&OsStr; 4] = [
                native.as_os_str(),
                "--include-ignored".as_ref(),
                // Its processors take turns: two tests at once are no faster,
                // and make each other wait.
                "--test-threads=1".as_ref(),
                filter.as_ref(),
            ];
            let program = vm::program(&words, &environment);
            let before = tally.counts.passed;
            let mut lines = Lines::new(|line: &str| {
                if let Some(line) = tally.hear(line) {
                    self.say(&line);
                }
            });
            let status = machine.run(&program, &mut lines, io::stderr())?;
            lines.finish();
            // The others may be fine: better to know of all at once.
            if status != 0 {
                failed.get_or_insert(format!("the tests of {filter} ended with status {status}"));
            } else if tally.counts.passed == before {
                failed.get_or_insert(format!("there is no test of {filter}"));
            }
        }
        machine.switch_off()?;
        failed.map_or(Ok(()), |failed| Err(anyhow::Error::msg(failed)))
    }

    fn cut_power(&self, binary: &Path, tally: &mut Tally) -> Result<()> {
        let Some((kind, times)) = self.cuts else {
            return Ok(());
        };
        let boot = self.boot()?;
        for number in 1..=times {
            let cut = vm::cut(&boot, binary, kind);
            tally.count(cut.is_ok());
            let cut = cut.with_context(|| format!("power cut {number} of {times} on {kind}"))?;
            self.say(&format!(
                "power cut {number} of {times}, {} ms and {} durable records after the first: {}",
                cut.after.as_millis(),
                cut.durable,
                cut.found
            ));
        }
        Ok(())
    }
}

/// Runs the unit tests of what is shipped on another architecture.
pub(super) fn units(arch: Arch, kernel: &'static str) -> Ran {
    let name = format!("units on {}", arch.name());
    let started = Instant::now();
    let mut tally = Tally::new();
    let result = run_units(arch, kernel, &name, &mut tally);
    let mut ran = tally.ran(&name, result.is_ok(), started);
    ran.notes
        .extend(result.err().map(|error| format!("{error:#}")));
    ran
}

/// Runs a program on a filesystem of the machine's own: its root is one of this
/// machine's, where names and pages come and go in other ways.
const ON_A_FILESYSTEM: &str = "set -e
PATH=$PATH:/usr/sbin:/sbin
place=/dev/shm/units
if ! [ -d $place ]; then
    mkdir -p $place/mnt
    truncate -s 512M $place/image
    mkfs.ext4 -q -F $place/image
    mount -o loop $place/image $place/mnt
fi
cd $place/mnt
exec \"$@\"";

fn run_units(arch: Arch, kernel: &'static str, name: &str, tally: &mut Tally) -> Result<()> {
    let binaries = build::unit_tests(arch)?;
    let mut machine = vm::boot(arch, kernel)?
        .memory(4 << 30)
        .time_limit(Duration::from_secs(1800))
        .start()?;
    let mut failed = None;
    for binary in &binaries {
        let words: [&OsStr; 6] = [
            "sh".as_ref(),
            "-c".as_ref(),
            ON_A_FILESYSTEM.as_ref(),
            "sh".as_ref(),
            binary.as_os_str(),
            "--include-ignored".as_ref(),
        ];
        let environment = [("RUST_BACKTRACE", "0"), ("TMPDIR", "/dev/shm")];
        let program = vm::program(&words, &environment);
        let mut lines = Lines::new(|line: &str| {
            if let Some(line) = tally.hear(line) {
                println!("  {name}: {line}");
            }
        });
        let status = machine.run(&program, &mut lines, io::stderr())?;
        lines.finish();
        if status != 0 {
            failed.get_or_insert(format!("{} ended with status {status}", binary.display()));
        }
    }
    machine.switch_off()?;
    failed.map_or(Ok(()), |failed| Err(anyhow::Error::msg(failed)))
}

/// Cuts what is written into lines.
struct Lines<F: FnMut(&str)> {
    rest: Vec<u8>,
    each: F,
}

impl<F: FnMut(&str)> Lines<F> {
    fn new(each: F) -> Self {
        let rest = Vec::new();
        Self { rest, each }
    }

    /// What is left is a line, too.
    fn finish(mut self) {
        if !self.rest.is_empty() {
            (self.each)(&String::from_utf8_lossy(&self.rest));
        }
    }
}

impl<F: FnMut(&str)> Write for Lines<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.rest.extend_from_slice(bytes);
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            (self.each)(&String::from_utf8_lossy(&line[..end]));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_arrive_whole() {
        let mut heard = Vec::new();
        let mut lines = Lines::new(|line: &str| heard.push(line.to_owned()));
        for piece in ["on", "e\n\ntwo\nth", "ree"] {
            lines.write_all(piece.as_bytes()).unwrap();
        }
        lines.finish();
        assert_eq!(heard, ["one", "", "two", "three"]);
    }
}
