//! `mapdirect run`: programs that know nothing of pins.

use crate::world::{BINARY, World, is_brief, is_pinned, kinds, wait_until_free, written};
use libtest_mimic::Trial;
use mapdirect_sys::{Errno, proc, signal};
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::disk::run;
use mapdirect_testkit::process::{GuardProcess, Helper, wait_for};
use mapdirect_testkit::{Disk, Kind, raw};
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

const MEGABYTE: usize = 1 << 20;

pub fn trials(world: &World) -> Vec<Trial> {
    let on = kinds(&[Kind::XFS, Kind::EXT4]);
    let mut trials = world.trials(
        "run",
        &on,
        &[
            ("static-c", |world, kind| survive(world, kind, Program::C)),
            ("32-bit", |world, kind| {
                survive(world, kind, Program::Bits32)
            }),
            ("go", |world, kind| survive(world, kind, Program::Go)),
            ("python-r", |world, kind| {
                survive(world, kind, Program::Python("r"))
            }),
            ("python-r+", |world, kind| {
                survive(world, kind, Program::Python("r+"))
            }),
            ("ends-with-mapping", ends_with_the_mapping),
            ("own", own),
        ],
    );
    let on = kinds(&[Kind::XFS]);
    trials.extend(world.trials(
        "run",
        &on,
        &[
            ("strict", strict),
            ("globs", globs),
            ("statuses", statuses),
            ("run-in-run", run_in_run),
            ("killed-worker", killed_worker),
            ("killed-supervisor", killed_supervisor),
            ("killed-guard", killed_guard),
            ("storm", storm),
            ("crowd", crowd),
            ("unlinked", unlinked),
        ],
    ));
    trials
}

/// A program that maps a file.
#[derive(Clone, Copy, Debug)]
enum Program {
    C,
    Bits32,
    Go,
    Python(&'static str),
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/native")
        .join(name)
}

/// A program compiled once; nothing if that cannot be done here.
fn compiled(name: &str, compile: impl FnOnce(&Path) -> Command) -> Option<PathBuf> {
    type Built = Vec<(String, Option<PathBuf>)>;
    static ALL: OnceLock<Mutex<Built>> = OnceLock::new();
    let mut all = ALL
        .get_or_init(Mutex::default)
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if let Some((_, known)) = all.iter().find(|(known, _)| known == name) {
        return known.clone();
    }
    let program = std::env::temp_dir().join(format!("mapdirect-{name}-{}", std::process::id()));
    let made = run(&mut compile(&program)).is_ok().then_some(program);
    all.push((name.to_owned(), made.clone()));
    made
}

fn c_program(bits: &str) -> Option<PathBuf> {
    compiled(&format!("supervised{bits}"), |program| {
        let mut command = Command::new("cc");
        command
            .args(["-static", "-pthread", "-O1", bits, "-o"])
            .arg(program)
            .arg(source("supervised.c"));
        command
    })
}

/// The program that does as it is told.
fn told() -> PathBuf {
    c_program("-m64").unwrap()
}

impl Program {
    /// How it is started; nothing, and a word why, if it cannot be here.
    fn command(self, world: &World, path: &Path) -> Option<Vec<PathBuf>> {
        let missing = |what: &str| {
            world.unavailable(format!("run: {what}"));
            None
        };
        match self {
            Self::C => Some(vec![told()]),
            Self::Bits32 => match c_program("-m32") {
                Some(program) => Some(vec![program]),
                None => missing("a 32-bit program: gcc-multilib is not installed"),
            },
            Self::Go => {
                let made = compiled("supervised-go", |program| {
                    let mut command = Command::new("go");
                    command
                        .args(["build", "-o"])
                        .arg(program)
                        .arg(source("supervised.go"))
                        .env("CGO_ENABLED", "0")
                        .env("GOFLAGS", "-buildvcs=false")
                        .env("GOCACHE", std::env::temp_dir().join("mapdirect-go-cache"));
                    command
                });
                match made {
                    Some(program) => Some(vec![program, path.to_owned()]),
                    None => missing("a Go program: golang-go is not installed"),
                }
            }
            Self::Python(mode) => Some(vec![
                PathBuf::from("python3"),
                source("supervised.py"),
                path.to_owned(),
                PathBuf::from(mode),
            ]),
        }
    }

    /// Has it map the file.
    fn map(self, helper: &mut Helper, path: &Path) -> String {
        if matches!(self, Self::C | Self::Bits32) {
            helper
                .tell(&format!("map {} rw 0", path.display()))
                .unwrap();
        }
        helper.hear().unwrap()
    }
}

/// `mapdirect run` of a command, by a guard.
fn supervised(socket: &Path, options: &[&str], command: &[PathBuf]) -> Command {
    let mut supervised = Command::new(BINARY);
    supervised
        .arg("run")
        .args(options)
        .arg("--")
        .args(command)
        .env("MAPDIRECT_SOCKET", socket)
        .stderr(Stdio::piped());
    supervised
}

fn all_of(disk: &Disk) -> String {
    format!("--files={}/**", disk.root().display())
}

/// What everybody else is refused.
fn attack(path: &Path, kind: Kind) {
    let shorter = rustix::fs::open(path, rustix::fs::OFlags::WRONLY, rustix::fs::Mode::empty())
        .and_then(|file| rustix::fs::ftruncate(&file, 0));
    assert_eq!(shorter, Err(Errno::TXTBSY), "truncate");
    let by_path = raw::truncate(&raw::c_path(path), 0);
    assert_eq!(by_path, Err(Errno::TXTBSY), "truncate(2)");
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let punched = File::options()
        .write(true)
        .open(path)
        .map_err(|error| Errno::from_io_error(&error).unwrap())
        .and_then(|file| rustix::fs::fallocate(&file, punch, 0, 4096));
    assert_eq!(punched, Err(Errno::TXTBSY), "punch");
    if kind.is_xfs() && Gate::under_test() == Gate::Bpf {
        let clone = path.with_extension("clone");
        let target = File::create(&clone).unwrap();
        let cloned = rustix::fs::ioctl_ficlone(&target, File::open(path).unwrap());
        assert_eq!(cloned, Err(Errno::TXTBSY), "clone");
        std::fs::remove_file(clone).unwrap();
    }
}

/// What a supervised program's supervisor has said, when all have ended.
fn said(mut stderr: impl Read) -> String {
    let mut text = String::new();
    stderr.read_to_string(&mut text).unwrap();
    text
}

/// A program under supervision, and what its supervisor says.
struct Running {
    helper: Helper,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let (reader, writer) = std::io::pipe().unwrap();
        command.stderr(writer);
        let helper = Helper::spawn(command).unwrap();
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(reader).lines().map_while(Result::ok) {
                println!("said: {line}");
                let _ = sender.send(line);
            }
        });
        Self { helper, lines }
    }

    fn ask(&mut self, what: &str) -> String {
        self.helper.tell(what).unwrap();
        self.helper.hear().unwrap()
    }

    /// Waits for a line with this in it.
    fn hears(&self, part: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line.contains(part) => return,
                Ok(_) => {}
                Err(error) => panic!("{part:?} was not said: {error}"),
            }
        }
    }

    /// Ends it, and returns its status and what was said.
    fn end(self) -> (i32, Vec<String>) {
        let status = self.helper.status().unwrap();
        let mut lines = Vec::new();
        while let Ok(line) = self.lines.recv_timeout(Duration::from_secs(10)) {
            lines.push(line);
        }
        (status, lines)
    }

    fn end_quietly(self) {
        assert_eq!(self.end(), (0, Vec::new()));
    }
}

fn survive(world: &World, kind: Kind, program: Program) {
    let guard = world.guard();
    let disk = world.disk(kind);
    let path = written(
        &disk,
        &format!("run-{program:?}").replace(['"', '(', ')'], "-"),
        MEGABYTE,
    );
    let Some(command) = program.command(world, &path) else {
        return;
    };
    let mut running = Running::start(supervised(guard.socket(), &[&all_of(&disk)], &command));
    assert_eq!(program.map(&mut running.helper, &path), "mapped");
    for _ in 0..3 {
        attack(&path, kind);
        assert_eq!(running.ask("touch"), "alive");
    }
    running.end_quietly();
    wait_until_free(&path);
    world.count("attacks on programs that know nothing of pins", 9);
    std::fs::remove_file(path).unwrap();
}

/// The pin ends with mapping and descriptor, not with the program.
fn ends_with_the_mapping(world: &World, kind: Kind) {
    let guard = world.guard();
    let disk = world.disk(kind);
    let path = written(&disk, "run-unmapped", MEGABYTE);
    let command = supervised(guard.socket(), &[&all_of(&disk)], &[told()]);
    let mut running = Running::start(command);
    for _ in 0..3 {
        assert_eq!(
            running.ask(&format!("map {} rw 0", path.display())),
            "mapped"
        );
        assert!(is_pinned(&path));
        assert_eq!(running.ask("unmap"), "unmapped");
        wait_until_free(&path);
    }
    // As the only thing of it: what reads keeps it as well.
    assert_eq!(
        running.ask(&format!("map {} r 0", path.display())),
        "mapped"
    );
    assert!(is_pinned(&path));
    assert_eq!(running.ask("unmap"), "unmapped");
    wait_for(Duration::from_secs(10), || {
        Ok((!is_pinned(&path)).then_some(()))
    })
    .unwrap();
    running.end_quietly();
    std::fs::remove_file(path).unwrap();
}

/// A program goes on with its own files: it lets them grow, shortens them and
/// punches holes into them; what it has grown by is kept as well.
fn own(world: &World, kind: Kind) {
    let guard = world.guard();
    let disk = world.disk(kind);
    let path = written(&disk, "run-own", MEGABYTE);
    let map = format!("map {} rw 0", path.display());
    let command = supervised(
        guard.socket(),
        &["--own", "allow", &all_of(&disk)],
        &[told()],
    );
    let mut running = Running::start(command);
    assert_eq!(running.ask(&map), "mapped");
    assert_eq!(
        running.ask(&format!("grow {} {}", path.display(), 2 * MEGABYTE)),
        "grown"
    );
    attack(&path, kind);
    let grown = raw::truncate(&raw::c_path(&path), MEGABYTE as u64);
    assert_eq!(grown, Err(Errno::TXTBSY), "what it has grown by");
    assert_eq!(running.ask("punch 65536 65536"), "punched");
    assert_eq!(running.ask(&format!("cut {MEGABYTE}")), "cut");
    assert_eq!(running.ask("touch"), "alive");
    attack(&path, kind);
    running.end_quietly();
    wait_until_free(&path);
    let command = supervised(
        guard.socket(),
        &["--own", "refuse", &all_of(&disk)],
        &[told()],
    );
    let mut running = Running::start(command);
    assert_eq!(running.ask(&map), "mapped");
    assert_eq!(running.ask("punch 0 65536"), "Text file busy");
    assert_eq!(running.ask("cut 4096"), "Text file busy");
    running.end_quietly();
    wait_until_free(&path);
    std::fs::remove_file(path).unwrap();
}

/// What cannot be pinned is said, or refused.
fn strict(world: &World, _kind: Kind) {
    let guard = world.guard();
    let scratch = mapdirect_testkit::process::ScratchDirectory::in_memory("run").unwrap();
    let path = scratch.path().join("file");
    std::fs::write(&path, vec![7; 8192]).unwrap();
    let files = format!("--files={}/*", scratch.path().display());
    let map = format!("map {} rw 0", path.display());
    let command = supervised(guard.socket(), &[&files], &[told()]);
    let mut running = Running::start(command);
    assert_eq!(running.ask(&map), "mapped");
    assert_eq!(running.ask(&map), "mapped");
    let (status, lines) = running.end();
    assert_eq!(status, 0);
    assert_eq!(lines.len(), 1, "once: {lines:?}");
    let named = format!("not pinned: {}: ", path.display());
    assert!(lines[0].contains(&named), "{lines:?}");
    let command = supervised(guard.socket(), &["--strict", &files], &[told()]);
    let mut running = Running::start(command);
    assert_eq!(running.ask(&map), "Text file busy");
    let (status, lines) = running.end();
    assert_eq!(status, 0);
    assert!(lines[0].contains(&named), "{lines:?}");
}

fn globs(world: &World, kind: Kind) {
    let guard = world.guard();
    let disk = world.disk(kind);
    let wanted = written(&disk, "run-wanted.db", 8192);
    let other = written(&disk, "run-other", 8192);
    let mut command = supervised(
        guard.socket(),
        &["--files", "*.db", "--files", "nothing.*"],
        &[told()],
    );
    command.current_dir(disk.root());
    let mut running = Running::start(command);
    for path in [&wanted, &other] {
        assert_eq!(
            running.ask(&format!("map {} rw 0", path.display())),
            "mapped"
        );
    }
    assert!(is_pinned(&wanted));
    assert!(!is_pinned(&other));
    let (status, lines) = running.end();
    assert_eq!(status, 0);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("--files nothing.*: "), "{lines:?}");
    let nonsense = supervised(guard.socket(), &["--files", "["], &[told()]);
    let output = { nonsense }.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    for path in [wanted, other] {
        wait_until_free(&path);
        std::fs::remove_file(path).unwrap();
    }
}

fn statuses(world: &World, _kind: Kind) {
    let guard = world.guard();
    let status = |command: &[&str]| {
        let command: Vec<_> = command.iter().map(PathBuf::from).collect();
        let output = supervised(guard.socket(), &[], &command).output().unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    assert_eq!(status(&["sh", "-c", "exit 7"]), (Some(7), String::new()));
    assert_eq!(
        status(&["sh", "-c", "kill -KILL $$"]),
        (Some(137), String::new())
    );
    assert_eq!(status(&["/nonexistent/program"]).0, Some(127));
    assert_eq!(status(&["/"]).0, Some(126));
    // A signal goes on to the program.
    let command = [
        "sh",
        "-c",
        "trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.05; done",
    ];
    let command: Vec<_> = command.iter().map(PathBuf::from).collect();
    let mut helper = Helper::spawn(supervised(guard.socket(), &[], &command)).unwrap();
    assert_eq!(helper.hear().unwrap(), "ready");
    signal::kill(helper.pid(), signal::Signal::TERMINATE).unwrap();
    assert_eq!(helper.hear().unwrap(), "caught");
    assert_eq!(helper.status().unwrap(), 3);
    // Nobody to ask.
    let output = supervised(Path::new("/nonexistent/socket"), &[], &[told()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
}

fn run_in_run(world: &World, _kind: Kind) {
    let guard = world.guard();
    let inner = [BINARY, "run", "--", "true"].map(PathBuf::from);
    let output = supervised(guard.socket(), &[], &inner).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("EBUSY") && said.contains("help: "), "{said}");
}

/// The processes of `mapdirect run`, by its own process number: those of its
/// children that are no program.
fn supervisors(of: i32) -> Vec<i32> {
    let is_ours = |pid: &i32| {
        std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == Path::new(BINARY))
    };
    let parent = |pid: i32| -> Option<i32> {
        let status = proc::read_task_file(pid, "status").ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
        line.trim().parse().ok()
    };
    let descends = |pid: i32| {
        let mut at = pid;
        while let Some(above) = parent(at) {
            if above == of {
                return true;
            }
            if above <= 1 {
                return false;
            }
            at = above;
        }
        false
    };
    let mut all = proc::numbers_in("/proc").unwrap();
    all.retain(|pid| is_ours(pid) && descends(*pid));
    all
}

fn kill(pid: i32) {
    signal::kill(pid, signal::Signal::KILL).unwrap();
}

/// Waits until the watcher and the worker are there.
fn both(of: i32) -> Vec<i32> {
    wait_for(Duration::from_secs(20), || {
        let all = supervisors(of);
        Ok((all.len() == 2).then_some(all))
    })
    .unwrap()
}

/// The worker, once it is another one than `last`, which may still be there for
/// a moment. It is the watcher's child, and so the younger of both.
fn worker(of: i32, last: i32) -> i32 {
    wait_for(Duration::from_secs(20), || {
        Ok(both(of).into_iter().max().filter(|worker| *worker != last))
    })
    .unwrap()
}

/// Whoever is killed, and whenever: the program does not notice.
fn killed_supervisor(world: &World, kind: Kind) {
    let guard = world.guard();
    let disk = world.disk(kind);
    let path = written(&disk, "run-killed", MEGABYTE);
    let mut running = Running::start(supervised(guard.socket(), &[&all_of(&disk)], &[told()]));
    let map = format!("map {} rw 0", path.display());
    assert_eq!(running.ask(&map), "mapped");
    let of = running.helper.pid();
    // One after the other, and both at once.
    for victims in [&[0][..], &[1], &[0, 1]] {
        let all = both(of);
        for victim in victims {
            kill(all[*victim]);
        }
        assert_eq!(running.ask(&map), "mapped");
        attack(&path, kind);
        assert_eq!(running.ask("touch"), "alive");
    }
    // The one that was started; the others go on. Under the fanotify gate it is
    // the root of the family that has the pins, so nothing new is pinned.
    let all = both(of);
    kill(of);
    assert_eq!(running.ask(&map), "mapped");
    attack(&path, kind);
    assert_eq!(running.ask("unmap"), "unmapped");
    wait_until_free(&path);
    assert_eq!(running.ask(&map), "mapped");
    if Gate::under_test() == Gate::Bpf {
        assert!(is_pinned(&path));
    }
    let _ = running.end();
    wait_until_free(&path);
    wait_for(Duration::from_secs(20), || {
        let gone = all.iter().all(|pid| proc::has_ended(*pid) != Ok(false));
        Ok(gone.then_some(()))
    })
    .unwrap();
    std::fs::remove_file(path).unwrap();
}

/// In the middle of whatever it does.
fn killed_worker(world: &World, kind: Kind) {
    let guard = world.guard();
    let disk = world.disk(kind);
    let paths: Vec<_> = (0..4)
        .map(|number| written(&disk, &format!("run-worker-{number}"), 8192))
        .collect();
    let mut running = Running::start(supervised(guard.socket(), &[&all_of(&disk)], &[told()]));
    let of = running.helper.pid();
    // Before that, the one that starts the program is a child as well.
    assert_eq!(running.ask("touch"), "alive");
    let mut last = 0;
    for round in 0..3_u64 {
        last = worker(of, last);
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(700 * round * round));
            kill(last);
        });
        for path in &paths {
            assert_eq!(
                running.ask(&format!("map {} rw 0", path.display())),
                "mapped"
            );
        }
        killer.join().unwrap();
        for path in &paths {
            assert!(is_pinned(path));
        }
        assert_eq!(running.ask("unmap"), "unmapped");
    }
    // It is killed too often: the rest is let pass, and that is said.
    for _ in 0..2 {
        last = worker(of, last);
        kill(last);
    }
    running.hears("nothing new is pinned from here on");
    for path in &paths {
        assert_eq!(
            running.ask(&format!("map {} rw 0", path.display())),
            "mapped"
        );
    }
    running.hears("not pinned: ");
    let (status, _) = running.end();
    assert_eq!(status, 0);
    for path in paths {
        wait_until_free(&path);
        std::fs::remove_file(path).unwrap();
    }
}

fn killed_guard(world: &World, kind: Kind) {
    world.end_guard();
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let disk = world.disk(kind);
    let path = written(&disk, "run-guard", MEGABYTE);
    let other = written(&disk, "run-guard-other", 8192);
    let mut running = Running::start(supervised(guard.socket(), &[&all_of(&disk)], &[told()]));
    let map = format!("map {} rw 0", path.display());
    assert_eq!(running.ask(&map), "mapped");
    guard.kill().unwrap();
    assert_eq!(
        running.ask(&format!("map {} rw 0", other.display())),
        "mapped"
    );
    running.hears("not pinned: ");
    running.hears("nothing new can be pinned");
    assert_eq!(running.ask("touch"), "alive");
    if Gate::under_test() == Gate::Bpf {
        attack(&path, kind);
        guard.start_again(Path::new(BINARY)).unwrap();
        running.hears("a guard is back");
        let third = written(&disk, "run-guard-third", 8192);
        assert_eq!(
            running.ask(&format!("map {} rw 0", third.display())),
            "mapped"
        );
        assert!(is_pinned(&third));
        attack(&path, kind);
        assert_eq!(running.ask("unmap"), "unmapped");
        wait_until_free(&third);
        std::fs::remove_file(third).unwrap();
    }
    assert_eq!(running.end().0, 0);
    for path in [path, other] {
        std::fs::remove_file(path).unwrap();
    }
}

/// Many mappings at once, with signals in between.
fn storm(world: &World, kind: Kind) {
    let guard = world.guard();
    let disk = world.disk(kind);
    let path = written(&disk, "run-storm", 8192);
    let mut running = Running::start(supervised(guard.socket(), &[&all_of(&disk)], &[told()]));
    let (threads, count) = if is_brief() { (4, 100) } else { (16, 1250) };
    for before in ["touch", "timers"] {
        running.ask(before);
        let begun = Instant::now();
        let answer = running.ask(&format!("storm {} {threads} {count}", path.display()));
        assert_eq!(answer, "0 failed");
        println!("{} mappings in {:?}", threads * count, begun.elapsed());
    }
    running.end_quietly();
    wait_until_free(&path);
    std::fs::remove_file(path).unwrap();
}

/// Processes that start, map and end, many at a time; one stays behind.
fn crowd(world: &World, kind: Kind) {
    let guard = world.guard();
    let disk = world.disk(kind);
    let path = written(&disk, "run-crowd", 8192);
    let left = written(&disk, "run-left-behind", 8192);
    let script = format!(
        "for each in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do \
             echo 'map {path} rw 0' | {told} >/dev/null & \
         done; wait; \
         (echo 'map {left} rw 0'; sleep 1) | {told} >/dev/null 2>&1 & \
         echo started",
        told = told().display(),
        path = path.display(),
        left = left.display(),
    );
    let command = [
        PathBuf::from("sh"),
        PathBuf::from("-c"),
        PathBuf::from(script),
    ];
    let mut child = supervised(guard.socket(), &[&all_of(&disk)], &command)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    assert!(child.wait().unwrap().success());
    // What was left behind is pinned as long as it runs.
    wait_for(Duration::from_secs(20), || {
        Ok(is_pinned(&left).then_some(()))
    })
    .unwrap();
    wait_for(Duration::from_secs(20), || {
        Ok((!is_pinned(&left)).then_some(()))
    })
    .unwrap();
    // They have ended, too: the pipe is closed.
    assert_eq!(said(child.stderr.take().unwrap()), "");
    wait_until_free(&path);
    for path in [path, left] {
        std::fs::remove_file(path).unwrap();
    }
}

/// A file without a name is the same file.
fn unlinked(world: &World, kind: Kind) {
    let guard = world.guard();
    let disk = world.disk(kind);
    let path = written(&disk, "run-unlinked", 8192);
    let inode = std::fs::metadata(&path).unwrap().ino();
    let script = format!(
        "import mmap, os, sys\n\
         f = open({0:?}, 'r+b'); os.unlink({0:?})\n\
         m = mmap.mmap(f.fileno(), 0)\n\
         print('mapped', flush=True)\n\
         sys.stdin.readline()",
        path.display().to_string()
    );
    let command = [
        PathBuf::from("python3"),
        PathBuf::from("-c"),
        PathBuf::from(script),
    ];
    let mut running = Running::start(supervised(guard.socket(), &[&all_of(&disk)], &command));
    assert_eq!(running.helper.hear().unwrap(), "mapped");
    let files = guard.client().status().unwrap().files;
    let mut pinned = files.iter().filter(|file| !file.pins.is_empty());
    assert!(pinned.any(|file| file.inode == inode));
    running.end_quietly();
}
