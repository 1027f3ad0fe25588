//! Many files pinned with one request: all of them, or none.

use crate::world::{
    BINARY, World, is_pinned, kinds, open, patience, pin, wait_until_free, written,
};
use libtest_mimic::Trial;
use mapdirect::{Guard, PinOptions};
use mapdirect_sys::Errno;
use mapdirect_sys::signal::{self, Signal};
use mapdirect_testkit::Kind;
use mapdirect_testkit::process::Helper;
use serde_json::Value;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// More than are asked for at a time.
const FILES: usize = 40;
const SIZE: u64 = 65536;

pub fn trials(world: &World) -> Vec<Trial> {
    world.trials(
        "together",
        &kinds(&[Kind::XFS, Kind::EXT4]),
        &[
            ("all", all),
            ("none", none),
            ("the-same-file-twice", the_same_file_twice),
            ("command-line", command_line),
            ("killed", killed),
        ],
    )
}

fn subjects(world: &World, kind: Kind, name: &str) -> Vec<PathBuf> {
    let disk = world.disk(kind);
    (0..FILES)
        .map(|number| written(&disk, &format!("together-{name}-{number}"), 65536))
        .collect()
}

fn options(guard: &Guard) -> PinOptions {
    PinOptions::new()
        .range(0..SIZE)
        .patience(patience())
        .guard(guard.clone())
}

fn remove(paths: &[PathBuf]) {
    for path in paths {
        wait_until_free(path);
        std::fs::remove_file(path).unwrap();
    }
}

/// Every file is pinned, each pin tells of its own file, and ends by itself.
fn all(world: &World, kind: Kind) {
    let guard = world.guard().client();
    let paths = subjects(world, kind, "all");
    let files: Vec<File> = paths.iter().map(|path| open(path)).collect();
    let mut pins = options(&guard).pin_all(&files).unwrap();
    drop(files);
    assert_eq!(pins.len(), FILES);
    for (path, pin) in paths.iter().zip(&pins) {
        assert!(is_pinned(path), "{}", path.display());
        let now = mapdirect::block_map(File::open(path).unwrap(), 0..SIZE).unwrap();
        assert_eq!(pin.block_map(), &now, "{}", path.display());
    }
    drop(pins.remove(7));
    wait_until_free(&paths[7]);
    assert!(is_pinned(&paths[6]) && is_pinned(&paths[8]));
    drop(pins);
    remove(&paths);
    let nothing: [File; 0] = [];
    assert!(options(&guard).pin_all(&nothing).unwrap().is_empty());
}

/// One that cannot be pinned is named, and nothing of the others stays pinned.
fn none(world: &World, kind: Kind) {
    let guard = world.guard().client();
    let paths = subjects(world, kind, "none");
    for culprit in [0, FILES / 2, FILES - 1] {
        let mut files: Vec<File> = paths.iter().map(|path| open(path)).collect();
        files[culprit] = File::options().write(true).open(&paths[culprit]).unwrap();
        let error = options(&guard).pin_all(&files).unwrap_err();
        assert_eq!(error.errno(), Errno::ACCESS.raw_os_error(), "{error}");
        let named = format!("together-none-{culprit}");
        assert!(error.to_string().contains(&named), "{error}");
        drop(files);
        for path in &paths {
            wait_until_free(path);
        }
    }
    remove(&paths);
}

/// Two descriptors of a file get two pins, as when they are asked for one after
/// the other, or the error of that; nothing hangs and nothing stays.
fn the_same_file_twice(world: &World, kind: Kind) {
    let guard = world.guard().client();
    let path = written(&world.disk(kind), "together-twice", 65536);
    let one = open(&path);
    let _first = pin(&guard, &one, 0..SIZE);
    // Behind the gate by now, and so are duplicates of it.
    let files = [one.try_clone().unwrap(), one.try_clone().unwrap(), one];
    let pins = options(&guard).pin_all(&files).unwrap();
    assert_eq!(pins.len(), 3);
    drop((pins, _first, files));
    remove(&[path]);
}

fn command(socket: &Path, paths: &[PathBuf]) -> Command {
    let mut command = Command::new(BINARY);
    command.arg("pin").args(paths);
    command.env("MAPDIRECT_SOCKET", socket);
    command
}

/// `mapdirect pin FILE...`: a line of JSON for each file, all of them pinned
/// until a signal comes; a range without an end must mean the same in each.
fn command_line(world: &World, kind: Kind) {
    let guard = world.guard();
    let paths = subjects(world, kind, "command");
    let mut arguments = command(guard.socket(), &paths);
    arguments.args(["--json", "--range", "4K:8K"]);
    let mut held = Helper::spawn(arguments).unwrap();
    for path in &paths {
        let value: Value = serde_json::from_str(&held.hear().unwrap()).unwrap();
        assert_eq!(value["file"], path.to_str().unwrap());
        assert_eq!(value["range"]["offset"], 4096);
        assert_eq!(value["range"]["length"], 8192);
    }
    assert!(paths.iter().all(|path| is_pinned(path)));
    signal::kill(held.pid(), Signal::INTERRUPT).unwrap();
    assert_eq!(held.status().unwrap(), 0);

    std::fs::OpenOptions::new()
        .append(true)
        .open(&paths[1])
        .unwrap()
        .set_len(2 * SIZE)
        .unwrap();
    let mut uneven = command(guard.socket(), &paths);
    let refused = uneven
        .args(["--range", "4K:", "--", "true"])
        .output()
        .unwrap();
    let words = String::from_utf8(refused.stderr).unwrap();
    assert!(
        !refused.status.success() && words.contains("help:"),
        "{words}"
    );

    let missing = paths[0].with_file_name("together-missing");
    let mut some = command(guard.socket(), &[paths[0].clone(), missing]);
    let refused = some.args(["--", "true"]).output().unwrap();
    assert!(!refused.status.success());

    let mut under = command(guard.socket(), &paths);
    let status = under.args(["--", "sh", "-c", "exit 9"]).output().unwrap();
    assert_eq!(status.status.code(), Some(9), "{status:?}");
    remove(&paths);
}

/// Killed in the middle of asking, it leaves nothing pinned.
fn killed(world: &World, kind: Kind) {
    let guard = world.guard();
    let paths = subjects(world, kind, "killed");
    for delay in [0, 1, 3, 10, 30, 100] {
        let mut asking = command(guard.socket(), &paths)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        asking.kill().unwrap();
        asking.wait().unwrap();
        for path in &paths {
            wait_until_free(path);
        }
    }
    remove(&paths);
}
