//! The package for Python: built as a wheel, installed in an environment of its own,
//! and used.

use super::{attack, files, finish, here, names, said, scratch, stage, with_guard};
use crate::world::{World, kinds};
use libtest_mimic::Trial;
use mapdirect_testkit::Kind;
use mapdirect_testkit::disk::run;
use mapdirect_testkit::process::Helper;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

pub fn trials(world: &World) -> Vec<Trial> {
    world.trials(
        "capi",
        &kinds(&[Kind::XFS, Kind::EXT4]),
        &[("python", python), ("python-attacked", attacked)],
    )
}

/// The Python that has the package.
fn interpreter() -> &'static Path {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    PYTHON.get_or_init(|| {
        let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../python");
        // The build leaves files beside the sources.
        let copy = scratch().join("python");
        run(Command::new("cp").arg("-r").arg(package).arg(&copy)).unwrap();
        let wheels = scratch().join("wheels");
        run(Command::new("/usr/bin/python3")
            .args(["-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"])
            .args(["--no-build-isolation", "--wheel-dir"])
            .args([&wheels, &copy]))
        .unwrap();
        let wheel = wheels.join("mapdirect-0.2.0-py3-none-any.whl");
        let environment = scratch().join("venv");
        run(Command::new("/usr/bin/python3")
            .args(["-m", "venv"])
            .arg(&environment))
        .unwrap();
        let python = environment.join("bin/python");
        run(Command::new(&python)
            .args(["-m", "pip", "install", "--quiet", "--no-index", "--no-deps"])
            .arg(wheel))
        .unwrap();
        python
    })
}

/// An example.
pub fn example(world: &World, name: &str) -> Command {
    let source = format!("../../examples/python/{}.py", name.replace('-', "_"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(source);
    script(world, &source, &[])
}

/// A program in Python, with the guard of the tests.
fn script(world: &World, script: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(interpreter());
    with_guard(world, &mut command);
    command
        .env("MAPDIRECT_LIBRARY", stage().join("lib/libmapdirect.so.0"))
        .arg("-W")
        .arg("error")
        .arg(script)
        .args(arguments);
    command
}

fn python(world: &World, kind: Kind) {
    let files = files(world, kind, "python");
    let [stable, sparse] = names(&files);
    let script = script(world, &here("checks.py"), &["use", stable, sparse]);
    assert_eq!(said(&mut { script }), "done\n");
    finish(&files);
}

fn attacked(world: &World, kind: Kind) {
    let files = files(world, kind, "python-attacked");
    let [stable, _] = names(&files);
    let script = script(world, &here("checks.py"), &["hold", stable]);
    let mut holder = Helper::spawn(script).unwrap();
    for how in ["mapped", "pinned"] {
        assert_eq!(holder.hear().unwrap(), how);
        attack(&files[0]);
        holder.tell("on").unwrap();
    }
    assert_eq!(holder.hear().unwrap(), "done");
    assert_eq!(holder.finish().unwrap(), Some(0));
    finish(&files);
}
