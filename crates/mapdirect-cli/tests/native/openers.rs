//! Who has a file open, where that is hard to see.

use crate::world::{BINARY, PATIENCE, World, map, open, written};
use anyhow::{Context, Result};
use libtest_mimic::Trial;
use mapdirect::{Kind as Reason, PinOptions};
use mapdirect_sys::Errno;
use mapdirect_sys::mmap::{MAP_SHARED, PROT_READ, PROT_WRITE};
use mapdirect_testkit::Kind;
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::process::{Background, Helper, listen, say};
use mapdirect_testkit::raw::{self, PlainMap};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

pub fn trials(world: &World) -> Vec<Trial> {
    [
        ("headless", headless as fn(&World)),
        ("registered-link", registered_link),
        ("registered-elsewhere", registered_elsewhere),
        ("many-mappings", many_mappings),
    ]
    .into_iter()
    .map(|(name, run)| world.trial(format!("openers::{name}"), run))
    .collect()
}

/// A reader that everybody sees, so that a lease cannot tell.
fn reader(path: &Path) -> Background {
    let file = File::open(path).unwrap();
    Background::spawn(Command::new("sleep").arg("60").stdin(file)).unwrap()
}

fn refused(world: &World, path: &Path) -> mapdirect::Error {
    let error = PinOptions::new()
        .range(0..65536)
        .patience(Duration::from_millis(20))
        .guard(world.guard().client())
        .pin(File::open(path).unwrap())
        .unwrap_err();
    assert_eq!(error.errno(), Errno::TXTBSY.raw_os_error(), "{error:#}");
    assert_eq!(error.kind(), Reason::OpenElsewhere, "{error:#}");
    error
}

fn granted(world: &World, path: &Path) {
    let held = PinOptions::new()
        .range(0..65536)
        .patience(PATIENCE)
        .guard(world.guard().client())
        .pin(File::open(path).unwrap())
        .unwrap();
    drop(held);
}

/// A process whose first thread has ended: `/proc/<pid>/maps` is empty.
fn headless(world: &World) {
    let disk = world.disk(Kind::EXT4);
    let path = written(&disk, "openers-headless", 1 << 20);
    // Nobody may map what is frozen, whatever the gate.
    let file = open(&path);
    raw::fallocate(file.as_fd(), 3, 40960, 4096).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let mut helper = Helper::start("headless", &[path.to_str().unwrap()]).unwrap();
    assert_eq!(helper.hear().unwrap(), "ready");
    let maps = format!("/proc/{}/maps", helper.pid());
    let deadline = Instant::now() + Duration::from_secs(5);
    while std::fs::read(&maps).is_ok_and(|text| !text.is_empty()) {
        assert!(Instant::now() < deadline, "its first thread lives");
        std::thread::sleep(Duration::from_millis(2));
    }
    let reader = reader(&path);
    let error = refused(world, &path);
    let mapped = |opener: &mapdirect::Opener| opener.pid == helper.pid() && opener.mapped;
    assert!(error.openers().iter().any(mapped), "{error:#}");
    helper.kill().unwrap();
    granted(world, &path);
    drop(reader);
    std::fs::remove_file(&path).unwrap();
}

pub fn play_headless(arguments: &[String]) -> Result<()> {
    let path = Path::new(arguments.first().context("no path")?);
    let file = open(path);
    let plain = PlainMap::new(file.as_fd(), PROT_READ | PROT_WRITE, MAP_SHARED, 0, 65536)?;
    drop(file);
    std::mem::forget(plain);
    std::thread::spawn(|| {
        say("ready");
        let _ = listen();
        std::process::exit(0);
    });
    raw::end_thread()
}

/// Registered with an io_uring through another name, with a blank in it.
fn registered_link(world: &World) {
    let disk = world.disk(Kind::EXT4);
    let path = written(&disk, "openers-registered", 1 << 20);
    let link = disk.path("openers another name");
    std::fs::hard_link(&path, &link).unwrap();
    let reader = reader(&path);
    let ring = raw::ring_with_file(open(&link)).unwrap();
    match Gate::under_test() {
        Gate::Fanotify => {
            let error = refused(world, &path);
            assert!(error.obstacle().contains("io_uring"), "{error:#}");
        }
        // What a ring does with it will be judged.
        Gate::Bpf => granted(world, &path),
    }
    drop(ring);
    granted(world, &path);
    drop(reader);
    std::fs::remove_file(&path).unwrap();
    std::fs::remove_file(&link).unwrap();
}

/// What lies on another filesystem is another file.
fn registered_elsewhere(world: &World) {
    let disk = world.disk(Kind::EXT4);
    let path = written(&disk, "openers-elsewhere", 1 << 20);
    let other = written(&world.disk(Kind::XFS), "openers elsewhere", 4096);
    let reader = reader(&path);
    let ring = raw::ring_with_file(open(&other)).unwrap();
    granted(world, &path);
    drop((reader, ring));
    std::fs::remove_file(&path).unwrap();
    std::fs::remove_file(&other).unwrap();
}

/// Many mappings that cannot be written through: to look them up one by one
/// in the text about all would take many times as long.
fn many_mappings(world: &World) {
    let disk = world.disk(Kind::EXT4);
    let path = written(&disk, "openers-many", 1 << 20);
    let guard = world.guard();
    let mut helper = Helper::start("many-mappings", &[path.to_str().unwrap()]).unwrap();
    assert_eq!(helper.hear().unwrap(), "ready");
    let file = open(&path);
    let held = map(&guard.client(), &file, 0..65536);
    let begun = Instant::now();
    let status = Command::new(BINARY)
        .env("COLUMNS", "1000")
        .args(["status", "--json"])
        .env("MAPDIRECT_SOCKET", guard.socket())
        .output()
        .unwrap();
    let took = begun.elapsed();
    assert!(status.status.success(), "{status:?}");
    let text = String::from_utf8(status.stdout).unwrap();
    assert!(text.contains(&helper.pid().to_string()), "{text}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    drop((held, file));
    helper.kill().unwrap();
    std::fs::remove_file(&path).unwrap();
}

pub fn play_many_mappings(arguments: &[String]) -> Result<()> {
    let path = Path::new(arguments.first().context("no path")?);
    let file = File::open(path)?;
    // All of one page: neighbours do not become one mapping.
    let mappings: Vec<_> = (0..2000)
        .map(|_| PlainMap::new(file.as_fd(), PROT_READ, MAP_SHARED, 0, 4096))
        .collect::<std::result::Result<_, _>>()?;
    drop(file);
    say("ready");
    listen()?;
    drop(mappings);
    Ok(())
}
