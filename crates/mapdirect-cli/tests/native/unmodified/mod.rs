//! Programs that know nothing of pins: databases, interpreters, runtimes with
//! system calls of their own. Each maps a file, or holds it open, while others
//! try to cut, to empty, to share and to move it; and changes it itself.

use crate::world::{BINARY, World, is_emulated, is_pinned, kinds, wait_until_free};
use libtest_mimic::Trial;
use mapdirect_sys::Errno;
use mapdirect_testkit::attack::clone_range;
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::process::{GuardProcess, Helper, ScratchDirectory};
use mapdirect_testkit::{Disk, Kind, raw};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// A program, as the driver knows it.
#[derive(Clone, Copy)]
struct Program {
    name: &'static str,
    /// What it is run by.
    by: By,
    /// The file that it uses, in its directory.
    file: &'static str,
    /// It maps the file, so that the file's end is its own if nobody keeps it.
    dies: bool,
    /// It has the file mapped all the time that it waits.
    maps: bool,
    /// It takes too long where the processor is emulated.
    heavy: bool,
    /// What must be there for it, besides the driver: a Python module or a
    /// command.
    needs: Needs,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Driver,
    Go,
    Java,
}

#[derive(Clone, Copy)]
enum Needs {
    Nothing,
    Module(&'static str),
    Command(&'static str),
}

const fn driven(name: &'static str, file: &'static str, needs: Needs) -> Program {
    Program {
        name,
        by: By::Driver,
        file,
        dies: true,
        maps: true,
        heavy: false,
        needs,
    }
}

const PROGRAMS: [Program; 13] = [
    driven("plain", "plain", Needs::Nothing),
    Program {
        heavy: true,
        ..driven("numpy", "array.npy", Needs::Module("numpy"))
    },
    driven("lmdb", "lmdb/data.mdb", Needs::Module("lmdb")),
    driven("lmdb_writemap", "lmdb/data.mdb", Needs::Module("lmdb")),
    driven("sqlite", "base.db", Needs::Module("sqlite3")),
    driven("sqlite_wal", "base.db", Needs::Module("sqlite3")),
    Program {
        maps: false,
        dies: false,
        heavy: true,
        ..driven("duckdb", "base.duckdb", Needs::Module("duckdb"))
    },
    Program {
        maps: false,
        dies: false,
        ..driven("rrdtool", "base.rrd", Needs::Command("rrdtool"))
    },
    Program {
        maps: false,
        dies: false,
        ..driven("qemu", "disk.raw", Needs::Command("qemu-io"))
    },
    Program {
        dies: false,
        ..driven("fio", "fio.data", Needs::Command("fio"))
    },
    Program {
        dies: false,
        heavy: true,
        ..driven("etcd", "etcd/member/snap/db", Needs::Command("etcd"))
    },
    Program {
        by: By::Go,
        ..driven("go", "plain", Needs::Command("go"))
    },
    Program {
        by: By::Java,
        heavy: true,
        ..driven("java", "plain", Needs::Command("javac"))
    },
];

/// How a program is kept.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    /// By nobody: what happens without mapdirect.
    Alone,
    /// `mapdirect pin FILE -- PROGRAM`.
    Pin,
    /// `mapdirect run --files FILE -- PROGRAM`.
    Run,
}

impl How {
    const fn word(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Pin => "pin",
            Self::Run => "run",
        }
    }
}

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    for kind in kinds(&[Kind::XFS, Kind::EXT4]) {
        for program in PROGRAMS {
            for how in [How::Alone, How::Pin, How::Run] {
                let word = how.word();
                if how == How::Alone && (kind != Kind::XFS || !program.dies) {
                    continue;
                }
                // Under `run` a file is kept while it is mapped.
                if how == How::Run && !program.maps {
                    continue;
                }
                let name = format!("unmodified::{kind}::{word}::{}", program.name);
                trials.push(world.trial(name, move |world| play(world, kind, program, how)));
            }
        }
    }
    trials
}

/// Debian's own Python: the modules of its packages are for that one.
const PYTHON: &str = "/usr/bin/python3";

/// Where there is what is not installed on the machine.
fn target() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target")
}

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/native/unmodified")
}

/// Has a command find modules and programs that are not installed.
fn with_places(command: &mut Command) -> &mut Command {
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PYTHONPATH", target().join("python")).env(
        "PATH",
        format!("{path}:{}/programs/usr/bin", target().display()),
    )
}

/// Succeeds silently, or not.
fn works(command: &mut Command) -> bool {
    let quiet = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

impl Program {
    /// Why it cannot be run here, if it cannot.
    fn missing(&self) -> Option<String> {
        if self.heavy && is_emulated() {
            return Some(format!("{}: the processor is emulated", self.name));
        }
        let there = match self.needs {
            Needs::Nothing => true,
            Needs::Module(module) => works(with_places(
                Command::new(PYTHON).args(["-c", &format!("import {module}")]),
            )),
            Needs::Command(command) => works(with_places(
                Command::new("sh").args(["-c", &format!("command -v {command}")]),
            )),
        };
        (!there).then(|| format!("{} is not installed", self.name))
    }

    /// Has the driver make the file.
    fn make(&self, directory: &Path) {
        let name = match self.by {
            By::Driver => self.name,
            By::Go | By::Java => "plain",
        };
        let mut command = driver(name, "make", directory);
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// What uses the file. `scratch` is for what is compiled.
    fn using(&self, directory: &Path, scratch: &Path) -> Command {
        match self.by {
            By::Driver => driver(self.name, "use", directory),
            By::Go => {
                let binary = scratch.join("plain");
                let built = Command::new("go")
                    .args(["build", "-o"])
                    .arg(&binary)
                    .arg(here().join("plain.go"))
                    .env("CGO_ENABLED", "0")
                    .env("GOCACHE", scratch.join("cache"))
                    .output()
                    .unwrap();
                let said = String::from_utf8_lossy(&built.stderr);
                assert!(built.status.success(), "{said}");
                let mut command = Command::new(binary);
                command.arg(directory);
                command
            }
            By::Java => {
                let built = Command::new("javac")
                    .arg("-d")
                    .arg(scratch)
                    .arg(here().join("Plain.java"))
                    .output()
                    .unwrap();
                let said = String::from_utf8_lossy(&built.stderr);
                assert!(built.status.success(), "{said}");
                let mut command = Command::new("java");
                command
                    .args(["-Xmx64m", "-cp"])
                    .arg(scratch)
                    .arg("Plain")
                    .arg(directory);
                command
            }
        }
    }
}

fn driver(program: &str, step: &str, directory: &Path) -> Command {
    let mut command = Command::new(PYTHON);
    command
        .arg("-B")
        .arg(here().join("driver.py"))
        .args([program, step])
        .arg(directory);
    with_places(&mut command);
    command
}

/// A command, kept in this way, and ended if it takes too long.
fn kept(guard: &GuardProcess, how: How, path: &Path, inner: &Command) -> Command {
    let mut command = match how {
        How::Alone => Command::new("timeout"),
        How::Pin => {
            let mut command = Command::new(BINARY);
            command
                .args(["pin", "--strength", "stable"])
                .arg(path)
                .args(["--", "timeout"]);
            command
        }
        How::Run => {
            let mut command = Command::new(BINARY);
            command
                .args(["run", "--files"])
                .arg(path)
                .args(["--", "timeout"]);
            command
        }
    };
    command
        .args(["--foreground", "200"])
        .arg(inner.get_program())
        .args(inner.get_args())
        .env("MAPDIRECT_SOCKET", guard.socket());
    if how == How::Alone {
        // What a runtime says of a fault is long.
        command.stderr(Stdio::null());
    }
    for (name, value) in inner.get_envs() {
        if let Some(value) = value {
            command.env(name, value);
        }
    }
    command
}

type Attack = (&'static str, fn(&Path, &Path) -> Result<(), Errno>);

fn writer(path: &Path) -> Result<File, Errno> {
    let file = File::options().write(true).open(path);
    file.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

fn reader(path: &Path) -> Result<File, Errno> {
    File::open(path).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

const PUNCH: i32 = 0x03;
const COLLAPSE: i32 = 0x08;

/// What a stranger does to a file; beside it there is another.
const ATTACKS: [Attack; 7] = [
    ("truncate", |path, _| raw::truncate(&raw::c_path(path), 100)),
    ("ftruncate", |path, _| {
        rustix::fs::ftruncate(writer(path)?, 4096)
    }),
    ("open with O_TRUNC", |path, _| {
        let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::TRUNC;
        rustix::fs::open(path, flags, rustix::fs::Mode::empty()).map(drop)
    }),
    ("punch a hole", |path, _| {
        raw::fallocate(writer(path)?.as_fd(), PUNCH, 0, 8192)
    }),
    ("collapse", |path, _| {
        raw::fallocate(writer(path)?.as_fd(), COLLAPSE, 0, 4096)
    }),
    ("clone onto it", |path, other| {
        clone_range(writer(path)?.as_fd(), reader(other)?.as_fd(), 0, 4096, 0)
    }),
    ("clone from it", |path, other| {
        clone_range(writer(other)?.as_fd(), reader(path)?.as_fd(), 0, 4096, 0)
    }),
];

/// Attacks a file once in each way, and says what was not refused.
fn attack(kind: Kind, path: &Path, other: &Path) -> Vec<String> {
    let here = ATTACKS
        .iter()
        .filter(|(name, _)| kind.reflink() || !name.starts_with("clone"));
    let passed = here.filter_map(|(name, attack)| match attack(path, other) {
        Err(Errno::TXTBSY) => None,
        Ok(()) => Some(format!("{name}: it worked")),
        Err(errno) => Some(format!("{name}: {errno}")),
    });
    passed.collect()
}

/// Has the filesystem's own tool move the file's blocks, if it will.
fn defragment(kind: Kind, path: &Path) {
    let tool = if kind.is_xfs() { "xfs_fsr" } else { "e4defrag" };
    works(Command::new(tool).arg(path));
}

/// The blocks that hold data for good.
fn stable(path: &Path) -> Vec<mapdirect::Extent> {
    let file = File::open(path).unwrap();
    let map = mapdirect::block_map(&file, 0..file.metadata().unwrap().len()).unwrap();
    map.extents()
        .iter()
        .filter(|extent| extent.state.is_stable())
        .copied()
        .collect()
}

fn play(world: &World, kind: Kind, program: Program, how: How) {
    if let Some(missing) = program.missing() {
        return world.unavailable(missing);
    }
    let disk: std::sync::Arc<Disk> = world.disk(kind);
    let guard = world.guard();
    let scratch = ScratchDirectory::new("unmodified").unwrap();
    let word = how.word();
    let directory = disk.path(&format!("unmodified-{word}-{}", program.name));
    std::fs::create_dir(&directory).unwrap();
    program.make(&directory);
    let path = directory.join(program.file);
    if path.exists() {
        // What is not written yet has no blocks that could be kept.
        File::open(&path).unwrap().sync_all().unwrap();
    }
    let other = directory.join("other");
    std::fs::write(&other, [7; 8192]).unwrap();
    File::open(&other).unwrap().sync_all().unwrap();
    let using = program.using(&directory, scratch.path());
    let mut running = Helper::spawn(kept(&guard, how, &path, &using)).unwrap();
    assert_eq!(running.hear().unwrap(), "ready");
    if how == How::Alone {
        rustix::fs::ftruncate(writer(&path).unwrap(), 4096).unwrap();
        running.tell("on").unwrap();
        let said = running.hear();
        let status = running.status().unwrap();
        assert!(
            said.is_err() && status != 0,
            "it does not mind that its file is cut: {said:?}, {status}"
        );
    } else {
        let before = stable(&path);
        assert!(!before.is_empty(), "nothing is stable");
        let began = Instant::now();
        let mut tries = 0;
        while began.elapsed() < Duration::from_millis(200) || tries == 0 {
            assert_eq!(attack(kind, &path, &other), [""; 0]);
            tries += 1;
        }
        defragment(kind, &path);
        let after = stable(&path);
        // What the program itself stores meanwhile may become stable.
        for extent in &before {
            let kept = |now: &mapdirect::Extent| {
                now.offset <= extent.offset
                    && now.end() >= extent.end()
                    && now
                        .physical
                        .zip(extent.physical)
                        .is_some_and(|(now_at, at)| now_at + (extent.offset - now.offset) == at)
            };
            assert!(
                after.iter().any(kept),
                "{extent:?} of {before:?}: {after:?}"
            );
        }
        running.tell("on").unwrap();
        let done = AtomicBool::new(false);
        let (said, passed) = std::thread::scope(|scope| {
            let going_on = scope.spawn(|| {
                let mut passed = Vec::new();
                // Under `run` nothing is kept from when the program closes its
                // file, which is before it is done.
                while how == How::Pin && !done.load(SeqCst) && passed.is_empty() {
                    let now = attack(kind, &path, &other);
                    if !done.load(SeqCst) {
                        passed = now;
                    }
                }
                passed
            });
            let said = running.hear();
            done.store(true, SeqCst);
            (said, going_on.join().unwrap())
        });
        let said = said.unwrap_or_else(|error| panic!("{}: {error}", program.name));
        println!("unmodified::{kind}::{word}::{}: {said}", program.name);
        assert_eq!(running.status().unwrap(), 0);
        check_words(program, &said);
        if said.contains("cut=ok") || said.contains("vacuum=ok") || said.contains("discard=ok") {
            // It cut or emptied its file itself, so what came later found no pin.
            // In WAL mode SQLite vacuums into the log, and lets the file be as
            // long as it is if it cannot be cut.
            let into_log = program.name == "sqlite_wal";
            let may = Gate::under_test() == Gate::Fanotify || how == How::Run || into_log;
            assert!(may, "{said}");
        } else {
            assert_eq!(passed, [""; 0]);
        }
        wait_until_free(&path);
        world.count("programs that nobody rewrote, kept", 1);
    }
    assert!(!is_pinned(&path));
    std::fs::remove_dir_all(&directory).unwrap();
}

/// What a program says of the things that it did to its own file.
fn check_words(program: Program, said: &str) {
    let mut words = said.split(' ');
    assert_eq!(words.next(), Some("done"), "{said}");
    for word in words {
        let (what, how) = word.split_once('=').unwrap();
        match what {
            // Whoever holds a stable pin goes on storing and growing.
            "grow" | "delete" => assert_eq!(how, "ok", "{}: {said}", program.name),
            // To shrink is up to the gate: `mapdirect(7)`.
            _ => assert!(how == "ok" || how == "refused", "{}: {said}", program.name),
        }
    }
}
