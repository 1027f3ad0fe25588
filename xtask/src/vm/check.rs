//! Whether virtual machines do what they are for.

use super::debian::Series;
use super::kernel::{Kernel, Wanted};
use super::machine::{Boot, End, Failure, Machine, Nvdimm, RunDirectory};
use super::{cache, prepare};
use crate::arch::Arch;
use crate::build;
use crate::packages;
use anyhow::{Context, Result, bail, ensure};
use mapdirect_sys::signal::{self, Signal};
use mapdirect_testkit::process::{ScratchDirectory, wait_for};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use xtask_init::wire::{Message, Program};

/// The kernels that the project is for, the newest first.
const SERIES: [&str; 3] = ["7.3", "6.12", "6.1"];

/// Something that was checked.
pub(crate) struct Checked {
    pub(crate) name: String,
    /// What it found worth telling.
    pub(crate) result: Result<String>,
}

/// How much is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// What would hinder the tests in virtual machines most, on the newest
    /// kernel: those find out the rest.
    Newest,
    /// Everything, on every kernel.
    All,
}

/// Runs the checks and tells the result of each as it comes.
pub(crate) fn run() -> Result<ExitCode> {
    let checked = self_test(Scope::All)?;
    let failed = checked.iter().filter(|one| one.result.is_err()).count();
    println!("{} passed, {failed} failed", checked.len() - failed);
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Checks virtual machines by booting some.
pub(crate) fn self_test(scope: Scope) -> Result<Vec<Checked>> {
    prepare(Arch::X86_64)?;
    packages::install_missing(&packages::FOR_TESTS)?;
    let init = build::init(Arch::X86_64)?;
    let series = match scope {
        Scope::Newest => &SERIES[..1],
        Scope::All => &SERIES[..],
    };
    let mut checks = Checks {
        done: Vec::new(),
        init,
    };
    for series_name in series {
        let wanted = Series::parse(series_name).context("no series")?;
        let kernel = cache(Arch::X86_64)?.get(&Wanted::Series(wanted))?;
        checks.of_one(series_name, &kernel, scope);
    }
    Ok(checks.done)
}

struct Checks {
    done: Vec<Checked>,
    init: PathBuf,
}

impl Checks {
    fn check(&mut self, name: &str, check: impl FnOnce() -> Result<String>) {
        let started = Instant::now();
        let result = check();
        let seconds = started.elapsed().as_secs_f64();
        match &result {
            Ok(note) if note.is_empty() => println!("  {name}: ok ({seconds:.1} s)"),
            Ok(note) => println!("  {name}: ok, {note} ({seconds:.1} s)"),
            Err(error) => println!("  {name}: FAILED: {error:#}"),
        }
        self.done.push(Checked {
            name: name.to_owned(),
            result,
        });
    }

    fn of_one(&mut self, series: &str, kernel: &Kernel, scope: Scope) {
        let release = kernel.release().to_owned();
        let boot = Boot::new(Arch::X86_64, kernel.clone(), self.init.clone())
            .memory(1 << 30)
            .time_limit(Duration::from_secs(180));
        let named = |what: &str| format!("{release}: {what}");
        self.check(&named("programs and how they end"), || {
            programs(&boot, &release)
        });
        if scope == Scope::Newest {
            return;
        }
        self.check(
            &named("an NVDIMM outlives its machine, on XFS and ext4 with DAX"),
            || outlives(&boot),
        );
        self.check(&named("a crash is told"), || crash(&boot));
        self.check(&named("a time limit is kept"), || time_limit(&boot));
        self.check(&named("two machines at once"), || two_at_once(&boot));
        self.check(&named("the kernel rewrites itself under load"), || {
            rewrites_itself(&boot)
        });
        self.check(&named("an NVDIMM with anything else is left alone"), || {
            left_alone(&boot)
        });
        self.check(&named("a task that ends leaves nothing behind"), || {
            nothing_left(series)
        });
    }
}

/// A program for the shell.
fn shell(script: &str) -> Program {
    program(&["sh", "-ec", script])
}

fn program(words: &[&str]) -> Program {
    Program {
        directory: "/".into(),
        words: words.iter().map(Into::into).collect(),
        environment: [("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), ("LC_ALL", "C")]
            .map(|(name, value)| (name.into(), value.into()))
            .into(),
    }
}

/// What a program printed, on stdout and on stderr, and its exit status.
fn output(machine: &mut Machine, program: &Program) -> Result<(String, String, u8)> {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = machine.run(program, &mut out, &mut err)?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok((text(out), text(err), status))
}

/// Runs a script that must succeed and returns what it printed.
fn succeed(machine: &mut Machine, script: &str) -> Result<String> {
    let (out, err, status) = output(machine, &shell(script))?;
    ensure!(status == 0, "`{script}` ended with {status}: {out}{err}");
    Ok(out)
}

fn programs(boot: &Boot, release: &str) -> Result<String> {
    let mut machine = boot.start()?;
    let booted_in = machine.booted_in();
    let scratch = ScratchDirectory::new("check")?;
    let inside = scratch.path().join("written inside");
    let inside = inside.to_string_lossy();
    for (program, out, err, status) in [
        (program(&["uname", "-r"]), &*format!("{release}\n"), "", 0),
        (program(&["false"]), "", "", 1),
        (shell("kill -9 $$"), "", "", 137),
        (
            shell("echo out; echo err >&2; exit 255"),
            "out\n",
            "err\n",
            255,
        ),
        (
            program(&["no-such-program"]),
            "",
            "xtask: cannot run no-such-program in /: No such file or directory (os error 2)\n",
            127,
        ),
        (
            program(&["/etc"]),
            "",
            "xtask: cannot run /etc in /: Permission denied (os error 13)\n",
            126,
        ),
        (shell("id -u; cd /tmp; pwd"), "0\n/tmp\n", "", 0),
        (
            program(&[
                "sh",
                "-c",
                "printf %s \"$1\" > \"$0\"; cat \"$0\"",
                &inside,
                "x",
            ]),
            "x",
            "",
            0,
        ),
        // Nothing but what it was given, and no input.
        (
            program(&["env"]),
            "LC_ALL=C\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\n",
            "",
            0,
        ),
        (program(&["cat"]), "", "", 0),
    ] {
        let found = output(&mut machine, &program)?;
        ensure!(
            found == (out.to_owned(), err.to_owned(), status),
            "{:?} ended with {found:?}",
            program.words
        );
    }
    ensure!(
        !scratch.path().join("written inside").exists(),
        "what a machine writes is in the files of this one"
    );
    // More than a pipe and a port hold.
    let much = shell("head -c 10000000 /dev/zero | tr '\\0' x");
    let (out, _, status) = output(&mut machine, &much)?;
    ensure!(
        status == 0 && out.len() == 10_000_000 && out.bytes().all(|byte| byte == b'x'),
        "of 10 MB that a program printed, {} bytes arrived",
        out.len()
    );
    // What a program leaves running goes on.
    let marker = "/run/went-on";
    succeed(
        &mut machine,
        &format!("(sleep 0.5; echo later; touch {marker}) & echo now"),
    )?;
    succeed(
        &mut machine,
        &format!("while ! [ -e {marker} ]; do sleep 0.1; done"),
    )?;
    machine.switch_off()?;
    Ok(format!("booted in {:.1} s", booted_in.as_secs_f64()))
}

/// Makes a filesystem and mounts it with DAX.
fn make_filesystem(kind: &str) -> String {
    let mkfs = match kind {
        "xfs" => "mkfs.xfs -q -f -m reflink=0",
        _ => "mkfs.ext4 -q -F -b 4096",
    };
    format!("{mkfs} /dev/pmem0; {}", mount(kind))
}

fn mount(kind: &str) -> String {
    format!(
        "mkdir -p /mnt/pmem; mount -t {kind} -o dax=always /dev/pmem0 /mnt/pmem; \
         grep -q '/mnt/pmem {kind} .*dax=always' /proc/mounts"
    )
}

/// Writes and syncs files until the power is cut, and looks for them
/// afterwards.
fn outlives(boot: &Boot) -> Result<String> {
    let scratch = RunDirectory::new()?;
    let mut written = Vec::new();
    for kind in ["xfs", "ext4"] {
        let boot = boot.clone().nvdimm(Nvdimm {
            file: scratch.path().join("nvdimm"),
            size: 512 << 20,
        });
        let mut machine = boot.start()?;
        succeed(&mut machine, &make_filesystem(kind))?;
        // A mapping that is synchronous is one past the page cache.
        succeed(
            &mut machine,
            "xfs_io -f -c 'pwrite -q 0 4096' -c 'mmap -S 0 4096' -c 'mwrite 0 4096' \
             /mnt/pmem/mapped",
        )?;
        machine.begin(&shell(
            "i=0; while :; do i=$((i+1)); \
             echo \"content $i\" | dd of=/mnt/pmem/$i conv=fsync status=none; echo $i; done",
        ))?;
        let last = cut_after(machine, 20)?;
        written.push(format!("{last} on {kind}"));
        let mut machine = boot.start()?;
        succeed(&mut machine, &mount(kind))?;
        let read = succeed(
            &mut machine,
            &format!("cd /mnt/pmem; for i in $(seq {last}); do cat $i; done"),
        )?;
        let expected: String = (1..=last).map(|i| format!("content {i}\n")).collect();
        ensure!(
            read == expected,
            "{last} files were synced; there is {read}"
        );
        machine.switch_off()?;
    }
    Ok(format!("synced files: {}", written.join(", ")))
}

/// Cuts the power at some moment after a program has printed so many lines;
/// returns the last number it printed.
fn cut_after(mut machine: Machine, lines: u64) -> Result<u64> {
    let mut text = Vec::new();
    let mut wait = |machine: &mut Machine, within| -> Result<u64> {
        match machine.next(within)? {
            Some(Message::Out(bytes)) => text.extend(bytes),
            None => {}
            Some(other) => bail!("the program that writes: {other:?}"),
        }
        let end = text.iter().rposition(|byte| *byte == b'\n').unwrap_or(0);
        let whole = String::from_utf8_lossy(&text[..end]);
        Ok(whole
            .lines()
            .last()
            .and_then(|line| line.parse().ok())
            .unwrap_or(0))
    };
    while wait(&mut machine, Duration::from_secs(60))? < lines {}
    let random = std::time::UNIX_EPOCH.elapsed()?.subsec_micros() % 500;
    let moment = Instant::now() + Duration::from_millis(random.into());
    let mut last = lines;
    loop {
        let left = moment.saturating_duration_since(Instant::now());
        last = wait(&mut machine, left)?.max(last);
        if left.is_zero() {
            break;
        }
    }
    // What it had sent by then is not looked at: fewer files to look for.
    machine.cut_power().map(|_| last)
}

/// How a program that must not end by itself fails.
fn failure(result: Result<u8>) -> Result<(End, String)> {
    match result {
        Ok(status) => bail!("it ended with {status}"),
        Err(error) => match error.downcast::<Failure>() {
            Ok(failure) => Ok((failure.end, failure.to_string())),
            Err(error) => Err(error),
        },
    }
}

fn crash(boot: &Boot) -> Result<String> {
    let mut machine = boot.start()?;
    let crash = shell("echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 60");
    let (end, text) = failure(machine.run(&crash, std::io::sink(), std::io::sink()))?;
    ensure!(end == End::Crashed, "{text}");
    ensure!(
        text.contains("its kernel panicked") && text.contains("sysrq"),
        "{text}"
    );
    Ok(String::new())
}

fn time_limit(boot: &Boot) -> Result<String> {
    let started = Instant::now();
    let limit = Duration::from_secs(25);
    let mut machine = boot.clone().time_limit(limit).start()?;
    let endless = shell("while :; do :; done");
    let (end, text) = failure(machine.run(&endless, std::io::sink(), std::io::sink()))?;
    ensure!(end == End::TooLong, "{text}");
    let took = started.elapsed();
    ensure!(
        took >= limit && took < limit + Duration::from_secs(5),
        "a limit of {limit:?} took {took:?}"
    );
    Ok(String::new())
}

fn two_at_once(boot: &Boot) -> Result<String> {
    std::thread::scope(|scope| {
        let machines: Vec<_> = ["1", "2"]
            .map(|number| {
                scope.spawn(move || {
                    let scratch = RunDirectory::new()?;
                    let file = scratch.path().join("nvdimm");
                    let size = 64 << 20;
                    let boot = boot.clone().nvdimm(Nvdimm { file, size });
                    let mut machine = boot.start()?;
                    let found = succeed(
                        &mut machine,
                        &format!(
                            "echo {number} > /tmp/which; echo {number} > /dev/pmem0; sleep 3; \
                             cat /tmp/which; head -c 2 /dev/pmem0"
                        ),
                    )?;
                    ensure!(
                        found == format!("{number}\n{number}\n"),
                        "{number}: {found}"
                    );
                    machine.switch_off()
                })
            })
            .into();
        for machine in machines {
            machine.join().ok().context("a check panicked")??;
        }
        Ok(String::new())
    })
}

/// Tracepoints are switched by overwriting instructions that another
/// processor may be executing: an emulator that gets this wrong crashes
/// kernels at random.
fn rewrites_itself(boot: &Boot) -> Result<String> {
    let mut machine = boot.start()?;
    succeed(
        &mut machine,
        "(while :; do stat /proc/self/status > /dev/null; done) & \
         events=/sys/kernel/tracing/events; \
         for i in 1 2 3 4 5; do for s in sched syscalls irq timer; do \
         echo 1 > $events/$s/enable; echo 0 > $events/$s/enable; done; done; kill $!",
    )?;
    Ok(String::new())
}

fn left_alone(boot: &Boot) -> Result<String> {
    let scratch = RunDirectory::new()?;
    let file = scratch.path().join("nvdimm");
    let content = b"somebody's";
    fs::write(&file, content)?;
    let size = 64 << 20;
    fs::File::options().write(true).open(&file)?.set_len(size)?;
    let boot = boot.clone().nvdimm(Nvdimm {
        file: file.clone(),
        size,
    });
    let error = match boot.start() {
        Ok(_) => bail!("it booted"),
        Err(error) => error.to_string(),
    };
    ensure!(error.contains("nothing is overwritten"), "{error}");
    ensure!(fs::read(&file)?.starts_with(content), "it was overwritten");
    Ok(String::new())
}

/// Ends the task in several ways while its machine runs.
fn nothing_left(series: &str) -> Result<String> {
    for (how, status) in [
        (Signal::INTERRUPT, Some(130)),
        (Signal::TERMINATE, Some(143)),
        (Signal::KILL, None),
    ] {
        let mut task = Command::new(build::own()?)
            .args(["vm", "--kernel", series, "--nvdimm", "64M", "--"])
            .args(["sh", "-c", "echo runs; sleep 100"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(task.stdout.take().context("no stdout")?).read_line(&mut line)?;
        ensure!(line == "runs\n", "it printed {line:?}");
        let pid = task.id();
        let qemu = of_task(pid)?;
        ensure!(!qemu.is_empty(), "its QEMU is not found");
        signal::kill(pid.cast_signed(), how)?;
        let ended = task.wait()?;
        ensure!(ended.code() == status, "after signal {how}: {ended}");
        wait_for(Duration::from_secs(10), || {
            let gone = qemu.iter().all(|process| !Path::new(process).exists());
            Ok(gone.then_some(()))
        })
        .with_context(|| format!("after signal {how} its QEMU is still there"))?;
        if how == Signal::KILL {
            super::machine::remove_stale();
        }
        let left = super::machine::directories_of(pid);
        ensure!(
            left.is_empty(),
            "after signal {how} there is still {left:?}"
        );
    }
    Ok(String::new())
}

/// What a task started that runs: directories in /proc.
fn of_task(pid: u32) -> Result<Vec<String>> {
    let mut children = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(thread?.path().join("children"))?;
        children.extend(text.split_whitespace().map(|pid| format!("/proc/{pid}")));
    }
    Ok(children)
}
