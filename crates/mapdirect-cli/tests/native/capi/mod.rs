//! libmapdirect as programs in other languages use it: compiled, linked, loaded,
//! and called with whatever they may call it with.

mod library;
mod preload;
pub mod python;

use crate::segments::{State as Block, make};
use crate::versions::Relay;
use crate::world::{BINARY, World, is_pinned, kinds, wait_until_free, written};
use libtest_mimic::Trial;
use mapdirect_proto::OLDEST_VERSION;
use mapdirect_sys::Errno;
use mapdirect_testkit::Kind;
use mapdirect_testkit::disk::run;
use mapdirect_testkit::process::{Helper, ScratchDirectory};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = library::trials(world);
    trials.extend(preload::trials(world));
    trials.extend(python::trials(world));
    trials.extend(world.trials(
        "capi",
        &kinds(&[Kind::XFS, Kind::EXT4]),
        &[
            ("bad-input", bad_input),
            ("use", every_call),
            ("attacked", attacked),
            ("forks", forks),
        ],
    ));
    trials.push(world.trial("capi::no-guard", no_guard));
    trials.push(world.trial("capi::guard-ends", guard_ends));
    trials.push(world.trial("capi::other-versions", other_versions));
    trials
}

/// Where `cargo xtask test` puts the libraries.
pub fn stage() -> PathBuf {
    let target = Path::new(BINARY).ancestors().nth(2).unwrap();
    let stage = target.join("capi/stage");
    assert!(
        stage.join("lib/libmapdirect.so.0").exists(),
        "the C library is not built: cargo xtask install --libraries --prefix {}",
        stage.display()
    );
    stage
}

static SCRATCH: OnceLock<Mutex<Option<ScratchDirectory>>> = OnceLock::new();

/// Where what is compiled lies, while the tests run.
fn scratch() -> PathBuf {
    let scratch = SCRATCH.get_or_init(Mutex::default);
    let mut scratch = scratch.lock().unwrap();
    let made = scratch.get_or_insert_with(|| ScratchDirectory::new("capi").unwrap());
    made.path().to_owned()
}

/// Removes it.
pub fn clean() {
    if let Some(scratch) = SCRATCH.get() {
        drop(scratch.lock().unwrap().take());
    }
}

/// Compiles a program in C against the library.
pub fn compile(source: &Path, name: &str, more: &[&str]) -> PathBuf {
    let stage = stage();
    let program = scratch().join(name);
    run(Command::new("cc")
        .args(["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&program)
        .arg(source)
        .arg(format!("-I{}", stage.join("include").display()))
        .arg(format!("-L{}", stage.join("lib").display()))
        .arg(format!("-Wl,-rpath,{}", stage.join("lib").display()))
        .args(more))
    .unwrap();
    program
}

fn here(file: &str) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/native/capi");
    tests.join(file)
}

/// An example in C.
pub fn example(name: &str) -> PathBuf {
    static COMPILING: Mutex<()> = Mutex::new(());
    let _turn = COMPILING.lock().unwrap();
    let program = scratch().join(format!("example-{name}"));
    if program.exists() {
        return program;
    }
    let source = format!("../../examples/c/{}.c", name.replace('-', "_"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(source);
    compile(&source, &format!("example-{name}"), &["-lmapdirect"])
}

fn checks() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| check_program("checks", &["-lmapdirect", "-lpthread"]))
}

fn check_program(name: &str, more: &[&str]) -> PathBuf {
    compile(&here("checks.c"), name, more)
}

/// The program that checks, with the guard of the tests.
fn check(world: &World, arguments: &[&str]) -> Command {
    let mut command = Command::new(checks());
    command.args(arguments);
    with_guard(world, &mut command);
    command
}

fn with_guard(world: &World, command: &mut Command) {
    command.env("MAPDIRECT_SOCKET", world.guard().socket());
    command.env("MAPDIRECT_CACHED", "1");
    if !crate::world::dax_kinds().is_empty() {
        command.env("MAPDIRECT_DAX", "1");
    }
}

/// What it says, if all is as it should be.
pub fn said(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?}: {} {error}",
        output.status
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

const SPARSE: [Block; 4] = [
    Block::Written,
    Block::Hole,
    Block::Unwritten,
    Block::Written,
];

/// Two files of a test: one that is stable, and one with holes.
fn files(world: &World, kind: Kind, test: &str) -> [PathBuf; 2] {
    let disk = world.disk(kind);
    let stable = written(&disk, &format!("capi-{test}"), 16 * 4096);
    let sparse = disk.path(&format!("capi-{test}-sparse"));
    let block = kind.block().max(4096);
    drop(make(&sparse, block, &SPARSE, 4 * block));
    [stable, sparse]
}

fn names(files: &[PathBuf; 2]) -> [&str; 2] {
    [0, 1].map(|at| files[at].to_str().unwrap())
}

fn finish(files: &[PathBuf]) {
    for file in files {
        wait_until_free(file);
        std::fs::remove_file(file).unwrap();
    }
}

fn bad_input(world: &World, kind: Kind) {
    let files = files(world, kind, "bad");
    let [stable, sparse] = names(&files);
    assert_eq!(said(&mut check(world, &["bad", stable, sparse])), "done\n");
    finish(&files);
}

fn every_call(world: &World, kind: Kind) {
    let files = files(world, kind, "use");
    let [stable, sparse] = names(&files);
    assert_eq!(said(&mut check(world, &["use", stable, sparse])), "done\n");
    finish(&files);
}

/// Whatever would take blocks away is refused to others.
pub fn attack(path: &Path) {
    let refused = |result: Result<(), Errno>| assert_eq!(result, Err(Errno::TXTBSY));
    assert!(is_pinned(path));
    let truncated = rustix::fs::open(
        path,
        rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::TRUNC,
        rustix::fs::Mode::empty(),
    );
    refused(truncated.map(drop));
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: a string with its end.
    let cut = unsafe { libc::truncate(name.as_ptr(), 0) };
    assert_eq!(cut, -1);
    assert_eq!(
        std::io::Error::last_os_error().raw_os_error(),
        Some(libc::ETXTBSY)
    );
}

/// While a program in C holds, nobody takes its blocks; its stores are in the file.
fn attacked(world: &World, kind: Kind) {
    let files = files(world, kind, "attacked");
    let [stable, _] = names(&files);
    let mut holder = Helper::spawn(check(world, &["hold", stable])).unwrap();
    assert_eq!(holder.hear().unwrap(), "mapped");
    attack(&files[0]);
    holder.tell("store").unwrap();
    assert_eq!(holder.hear().unwrap(), "done");
    assert_eq!(
        std::fs::read(&files[0]).unwrap()[..4 * 4096],
        [0x5a; 4 * 4096]
    );
    holder.tell("unmap").unwrap();
    assert_eq!(holder.hear().unwrap(), "done");
    assert!(!is_pinned(&files[0]), "the pin is over when munmap returns");
    assert_eq!(holder.finish().unwrap(), Some(0));
    let mut holder = Helper::spawn(check(world, &["pin", stable])).unwrap();
    assert_eq!(holder.hear().unwrap(), "pinned");
    attack(&files[0]);
    holder.tell("end").unwrap();
    assert_eq!(holder.hear().unwrap(), "done");
    assert_eq!(holder.finish().unwrap(), Some(0));
    finish(&files);
}

fn forks(world: &World, kind: Kind) {
    let files = files(world, kind, "forks");
    let [stable, _] = names(&files);
    assert_eq!(said(&mut check(world, &["fork", stable])), "done\n");
    finish(&files);
}

/// A guard that is too old for the library is told from one that is not there.
fn other_versions(world: &World) {
    let files = files(world, Kind::EXT4, "versions");
    let [stable, _] = names(&files);
    let guard = world.guard();
    let unknown = Relay::new(guard.socket(), OLDEST_VERSION - 1);
    let expected = libc::EPROTONOSUPPORT.to_string();
    let mut command = check(world, &["refused", stable, &expected]);
    let words = said(command.env("MAPDIRECT_SOCKET", &unknown.path));
    assert!(words.contains("help:"), "{words}");
    finish(&files);
}

/// No guard at all.
fn no_guard(world: &World) {
    let files = files(world, Kind::XFS, "no-guard");
    let [stable, _] = names(&files);
    let refused = |socket: &Path| {
        let expected = libc::EOPNOTSUPP.to_string();
        let mut command = check(world, &["refused", stable, &expected]);
        said(command.env("MAPDIRECT_SOCKET", socket))
    };
    let words = refused(&scratch().join("no-such-guard"));
    assert!(words.contains("help: start one as root"), "{words}");
    finish(&files);
}

/// The program hears of it when the guard is gone, by a descriptor.
fn guard_ends(world: &World) {
    let path = written(&world.disk(Kind::EXT4), "capi-guard-ends", 16 * 4096);
    let own = mapdirect_testkit::process::GuardProcess::start(Path::new(BINARY));
    let mut guard = own.unwrap();
    let mut command = check(world, &["hold", path.to_str().unwrap()]);
    command.env("MAPDIRECT_SOCKET", guard.socket());
    let mut holder = Helper::spawn(command).unwrap();
    assert_eq!(holder.hear().unwrap(), "mapped");
    guard.kill().unwrap();
    holder.tell("lost").unwrap();
    assert_eq!(holder.hear().unwrap(), "done");
    assert_eq!(holder.finish().unwrap(), Some(0));
    drop(guard);
    drop(File::open(&path).unwrap());
    finish(&[path]);
}
