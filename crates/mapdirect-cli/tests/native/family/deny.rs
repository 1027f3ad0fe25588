//! Pins that deny more than what would break them.

use super::pin_command;
use crate::world::{
    PATIENCE, World, is_pinned, kinds, open, patience, pin, wait_until_free, written,
};
use libtest_mimic::Trial;
use mapdirect::{Pin, PinOptions};
use mapdirect_sys::Errno;
use mapdirect_testkit::Kind;
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::process::{Helper, wait_for};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(super) fn trials(world: &World) -> Vec<Trial> {
    let tests = [
        ("deny-write", deny_write as crate::world::OnKind),
        ("deny-write-open", deny_write_open),
        ("deny-rename", deny_rename),
    ];
    world.trials("family", &kinds(&[Kind::XFS, Kind::EXT4]), &tests)
}

/// What opens it for writing, or changes its size by its path.
fn writes(path: &Path) -> Vec<(&'static str, Result<(), Errno>)> {
    let opened = |flags: OFlags| rustix::fs::open(path, flags, Mode::empty()).map(drop);
    let known = rustix::fs::open(path, OFlags::PATH, Mode::empty()).unwrap();
    let linked = path.with_extension("linked");
    std::fs::hard_link(path, &linked).unwrap();
    let by_link = rustix::fs::open(&linked, OFlags::RDWR, Mode::empty()).map(drop);
    let _ = std::fs::remove_file(&linked);
    let truncated = |size| {
        let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        mapdirect_testkit::raw::truncate(&name, size)
    };
    vec![
        ("read-write", opened(OFlags::RDWR)),
        ("write-only", opened(OFlags::WRONLY)),
        ("append", opened(OFlags::WRONLY | OFlags::APPEND)),
        ("direct", opened(OFlags::RDWR | OFlags::DIRECT)),
        (
            "by a path",
            mapdirect_sys::proc::reopen(known.as_fd(), OFlags::RDWR).map(drop),
        ),
        ("by another name", by_link),
        ("grow", truncated(1 << 20)),
        ("stay", truncated(65536)),
    ]
}

/// Nobody but the family opens the file for writing, whatever it would do.
fn deny_write(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "deny-write", 65536);
    let script = r#"
        printf x | dd of="$F" bs=1 conv=notrunc status=none && echo stored
        truncate -s 70000 "$F" && truncate -s 65536 "$F" && echo sized
        read -r line
        exit 0
    "#;
    let options = ["--deny", "write"];
    let command = pin_command(world, &path, &options, &["sh", "-c", script]);
    let mut held = Helper::spawn(command).unwrap();
    assert_eq!(held.hear().unwrap(), "stored");
    assert_eq!(held.hear().unwrap(), "sized");
    for (how, result) in writes(&path) {
        assert_eq!(result, Err(Errno::TXTBSY), "{how}");
    }
    // A holder of another pin is a stranger, too, and its pin is granted.
    let guard = world.guard().client();
    let reader = File::open(&path).unwrap();
    let other = pin(&guard, &reader, 0..4096);
    let error = mapdirect::open(&path, &guard).unwrap_err();
    assert_eq!(error.errno(), Errno::TXTBSY.raw_os_error(), "{error:#}");
    drop((other, reader));
    assert_eq!(held.finish().unwrap(), Some(0));
    wait_until_free(&path);
    for (how, result) in writes(&path) {
        assert_eq!(result, Ok(()), "{how}");
    }
    std::fs::remove_file(&path).unwrap();
}

/// A pin that denies writing is refused while somebody else has the file open
/// for it, and says who.
fn deny_write_open(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "deny-write-open", 65536);
    let writer = open(&path);
    let run = |patience: &str| {
        let options = ["--deny", "write", "--patience", patience];
        let output = pin_command(world, &path, &options, &["echo", "ran"]).output();
        let output = output.unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), errors)
    };
    let (status, errors) = run("50");
    assert_eq!(status, Some(125), "{errors}");
    assert!(errors.contains(&std::process::id().to_string()), "{errors}");
    // One that has it open for reading is in nobody's way, unless it could share
    // blocks unseen.
    drop(writer);
    let (status, errors) = run("8000");
    assert_eq!(status, Some(0), "{errors}");
    // A description that can write is not to be had beside such a pin.
    let guard = world.guard().client();
    let writer = open(&path);
    let own = PinOptions::new()
        .deny_write(true)
        .patience(PATIENCE)
        .guard(guard.clone());
    let pins = [own.pin(&writer).unwrap(), own.pin(&writer).unwrap()];
    drop(pins);
    drop(writer);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

fn denying(world: &World, path: &Path) -> Pin {
    PinOptions::new()
        .deny_rename(true)
        .patience(patience())
        .guard(world.guard().client())
        .pin(File::open(path).unwrap())
        .unwrap()
}

fn renamed(from: &Path, to: &Path, flags: RenameFlags) -> Result<(), Errno> {
    rustix::fs::renameat_with(CWD, from, CWD, to, flags)
}

/// No name of the file is removed, renamed or replaced; where the gate cannot
/// refuse that, the holder is told.
fn deny_rename(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = written(&disk, "deny-rename", 65536);
    let other = written(&disk, "deny-rename-other", 4096);
    let linked = disk.path("deny-rename-linked");
    let away = disk.path("deny-rename-away");
    std::fs::hard_link(&path, &linked).unwrap();
    let held = denying(world, &path);
    let event = held.event_fd().unwrap();
    assert!(is_pinned(&path));
    // These are nobody's business.
    std::fs::set_permissions(&path, std::fs::metadata(&path).unwrap().permissions()).unwrap();
    std::fs::rename(&other, &away).unwrap();
    std::fs::rename(&away, &other).unwrap();
    let extra = disk.path("deny-rename-extra");
    std::fs::hard_link(&path, &extra).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(held.renames(), Vec::<String>::new());
    assert!(!event.clear());
    let plain = RenameFlags::empty();
    let exchange = RenameFlags::EXCHANGE;
    type Step<'a> = (&'a str, Box<dyn Fn() -> Result<(), Errno> + 'a>);
    let unlink = |path: &PathBuf| rustix::fs::unlinkat(CWD, path, AtFlags::empty());
    let steps: [Step<'_>; 5] = [
        ("rename", Box::new(|| renamed(&extra, &away, plain))),
        ("exchange", Box::new(|| renamed(&other, &linked, exchange))),
        (
            "exchange back",
            Box::new(|| renamed(&linked, &other, exchange)),
        ),
        ("replace", Box::new(|| renamed(&other, &linked, plain))),
        ("unlink", Box::new(|| unlink(&path))),
    ];
    if Gate::under_test() == Gate::Bpf {
        for (what, step) in &steps {
            assert_eq!(step(), Err(Errno::TXTBSY), "{what}");
        }
        let status = world.guard().client().status().unwrap();
        let recent = |name: &str| status.refused.iter().any(|one| one.0 == name);
        assert!(recent("unlink") && recent("rename"), "{:?}", status.refused);
        assert!(held.renames().is_empty());
        drop(held);
        wait_until_free(&path);
        for (what, step) in &steps {
            assert_eq!(step(), Ok(()), "{what}");
        }
    } else {
        // The same words twice are told once.
        for ((what, step), count) in steps.iter().zip([1, 1, 1, 2, 3]) {
            assert_eq!(step(), Ok(()), "{what}");
            let told = || Ok((held.renames().len() == count).then_some(()));
            wait_for(Duration::from_secs(2), told).unwrap();
        }
        assert!(event.clear());
        assert!(held.state().is_kept());
        let own = std::process::id().to_string();
        assert!(
            held.renames().iter().all(|how| how.contains(&own)),
            "{:?}",
            held.renames()
        );
        drop(held);
    }
    for left in [&away, &linked, &other, &extra, &path] {
        let _ = std::fs::remove_file(left);
    }
}
