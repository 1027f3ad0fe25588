//! mmap(2) itself: linked, and preloaded.

use super::{attack, check_program, compile, files, finish, here, names, said, stage, with_guard};
use crate::world::{World, kinds};
use libtest_mimic::Trial;
use mapdirect_testkit::Kind;
use mapdirect_testkit::process::Helper;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = world.trials(
        "capi",
        &kinds(&[Kind::XFS, Kind::EXT4]),
        &[("mmap", mmap), ("mmap-attacked", attacked)],
    );
    trials.push(world.trial("capi::mmap-without-the-library", without_the_library));
    trials
}

/// How a program gets the functions.
#[derive(Clone, Copy)]
enum Way {
    Linked,
    Preloaded,
}

const WAYS: [Way; 2] = [Way::Linked, Way::Preloaded];

/// The program that knows of no library.
fn plain(way: Way) -> Command {
    static PROGRAMS: [OnceLock<PathBuf>; 2] = [const { OnceLock::new() }; 2];
    let [linked, preloaded] = &PROGRAMS;
    let source = here("plain.c");
    match way {
        Way::Linked => {
            Command::new(linked.get_or_init(|| {
                compile(&source, "plain-linked", &["-lmapdirect-mmap", "-lpthread"])
            }))
        }
        Way::Preloaded => {
            let program = preloaded.get_or_init(|| compile(&source, "plain", &["-lpthread"]));
            let mut command = Command::new(program);
            command.env("LD_PRELOAD", stage().join("lib/libmapdirect-mmap.so"));
            command
        }
    }
}

fn with(world: &World, way: Way, arguments: &[&str]) -> Command {
    let mut command = plain(way);
    with_guard(world, &mut command);
    command.args(arguments);
    command
}

/// What the library does for those who call it, it does by way of mmap(2): the
/// same errors, the same uses. And everything else of a program goes on.
fn mmap(world: &World, kind: Kind) {
    let files = files(world, kind, "mmap");
    let [stable, sparse] = names(&files);
    let renamed = &[
        "-Dmapdirect_mmap=mmap",
        "-Dmapdirect_munmap=munmap",
        "-lmapdirect-mmap",
        "-lmapdirect",
        "-lpthread",
    ];
    let program = check_program("checks-mmap", renamed);
    for check in ["bad", "use"] {
        let mut command = Command::new(&program);
        with_guard(world, &mut command);
        assert_eq!(said(command.args([check, stable, sparse])), "done\n");
        drop(crate::segments::make(
            &files[1],
            kind.block().max(4096),
            &super::SPARSE,
            4 * kind.block().max(4096),
        ));
    }
    for way in WAYS {
        assert_eq!(
            said(&mut with(world, way, &["use", stable, sparse])),
            "done\n"
        );
    }
    finish(&files);
}

fn attacked(world: &World, kind: Kind) {
    let files = files(world, kind, "mmap-attacked");
    let [stable, _] = names(&files);
    for way in WAYS {
        let mut holder = Helper::spawn(with(world, way, &["hold", stable])).unwrap();
        assert_eq!(holder.hear().unwrap(), "mapped");
        attack(&files[0]);
        holder.tell("end").unwrap();
        assert_eq!(holder.hear().unwrap(), "done");
        assert_eq!(holder.finish().unwrap(), Some(0));
        assert_eq!(
            std::fs::read(&files[0]).unwrap()[..4 * 4096],
            [0x5a; 4 * 4096]
        );
    }
    finish(&files);
}

/// Where libmapdirect.so.0 is missing nobody can keep a promise, and a program that
/// asks for none does not notice.
fn without_the_library(world: &World) {
    let files = files(world, Kind::EXT4, "mmap-alone");
    let [stable, _] = names(&files);
    let alone = super::scratch().join("libmapdirect-mmap.so");
    std::fs::copy(stage().join("lib/libmapdirect-mmap.so"), &alone).unwrap();
    let mut command = with(world, Way::Preloaded, &["hold", stable]);
    let output = command.env("LD_PRELOAD", &alone).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    let expected = format!("errno {}", libc::EOPNOTSUPP);
    let is_installed = Path::new("/usr/local/lib/libmapdirect.so.0").exists();
    assert!(is_installed || error.contains(&expected), "{error}");
    let mut other = Command::new("/usr/bin/python3");
    other.args([
        "-c",
        "import mmap, ctypes; mmap.mmap(-1, 1 << 20).close(); print(1)",
    ]);
    assert_eq!(said(other.env("LD_PRELOAD", &alone)), "1\n");
    finish(&files);
}
