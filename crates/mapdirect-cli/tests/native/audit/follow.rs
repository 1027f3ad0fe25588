//! Following records: live, chosen, and by who is slow.

use super::{NOBODY, Refused, log, mapdirect, number, open_to_all, said, wait_for_records};
use crate::extents::schemas::validate;
use crate::world::{BINARY, World, open, pin, wait_until_free, written};
use mapdirect::records::Heard;
use mapdirect_sys::signal::{Signal, kill};
use mapdirect_testkit::Kind;
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::process::{GuardProcess, Helper, wait_for};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Tries something once that every pin refuses, and says whether it was refused.
fn try_once(path: &Path) -> bool {
    let file = std::fs::File::options().write(true).open(path);
    file.and_then(|file| file.set_len(0)).is_err()
}

/// The guard is killed while somebody watches; the next one is watched.
pub fn live(world: &World) {
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(Kind::XFS), "audit-live", 65536);
    let pinned = pin(&guard.client(), &open(&path), 0..65536);
    let mut command = mapdirect(&guard, &["watch", "--json"]);
    command.stderr(Stdio::null());
    let mut watch = Helper::spawn(command).unwrap();
    // It may not watch yet.
    let first = hear(&mut watch, || assert!(try_once(&path)));
    assert_eq!(first["event"], "refusal");
    assert_eq!(first["pid"], std::process::id());
    let mut documents = vec![("watch", first)];
    guard.kill().unwrap();
    let gone = loop {
        let heard: Value = serde_json::from_str(&watch.hear().unwrap()).unwrap();
        if heard["event"] != "refusal" {
            break heard;
        }
    };
    assert_eq!(gone["event"], "guard-gone");
    drop(pinned);
    guard.start_again(Path::new(BINARY)).unwrap();
    let back: Value = serde_json::from_str(&watch.hear().unwrap()).unwrap();
    assert_eq!(back["event"], "guard-back");
    documents.extend([("watch", gone), ("watch", back)]);
    wait_until_free(&path);
    let pinned = pin(&guard.client(), &open(&path), 0..65536);
    let next = hear(&mut watch, || assert!(try_once(&path)));
    assert_eq!(next["pin"], number(&guard, &path));
    documents.push(("watch", next));
    // SIGINT ends it, and that is no failure.
    kill(watch.pid(), Signal::INTERRUPT).unwrap();
    assert_eq!(watch.status().unwrap(), 0);
    drop(pinned);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
    validate(world, &documents);
}

/// Does something again and again until a line comes of it.
fn hear(watch: &mut Helper, act: impl Fn() + Sync) -> Value {
    let line = until(act, || watch.hear().unwrap());
    serde_json::from_str(&line).unwrap()
}

/// Does something again and again until something else is done.
fn until<T>(act: impl Fn() + Sync, done: impl FnOnce() -> T) -> T {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Relaxed) {
                act();
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let result = done();
        over.store(true, Relaxed);
        result
    })
}

/// What is not asked for is not told.
pub fn filters(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let disk = world.disk(Kind::EXT4);
    let (one, other) = (
        written(&disk, "audit-one", 65536),
        written(&disk, "audit-other", 65536),
    );
    open_to_all(&other);
    let pins = [&one, &other].map(|path| pin(&guard.client(), &open(path), 0..65536));
    assert!(try_once(&one));
    let refused = Refused::by(NOBODY, &other);
    let pid = refused.pid();
    wait_for_records(&guard, 1, |record| record["pid"] == pid);
    let all = log(&guard, &[]);
    assert_eq!(all.len(), 2, "{all:?}");
    let (one_name, other_name) = (one.to_str().unwrap(), other.to_str().unwrap());
    let (pid, number) = (pid.to_string(), number(&guard, &one).to_string());
    let operation = all[0]["operation"].as_str().unwrap();
    let of_operation = all
        .iter()
        .filter(|record| record["operation"] == operation)
        .count();
    for (arguments, expected) in [
        (&["--file", one_name][..], 1),
        (&["--file", other_name], 1),
        (&["--file", "/dev/null"], 0),
        (&["--pid", &pid], 1),
        (&["--uid", "65534"], 1),
        (&["--uid", "root"], 1),
        (&["--uid", "12345"], 0),
        (&["--pin", &number], 1),
        (&["--kind", "refusal"], 2),
        (&["--kind", "breach"], 0),
        (&["--operation", operation], of_operation),
        (&["--operation", "nothing"], 0),
        (&["-n", "1"], 1),
        (&["-n", "0"], 0),
        (&["--since", "1h"], 2),
        (&["--since", "@99999999999"], 0),
        (&["--file", one_name, "--uid", "65534"], 0),
    ] {
        assert_eq!(log(&guard, arguments).len(), expected, "{arguments:?}");
    }
    for wrong in [
        &["log", "--uid", "no-such-user"][..],
        &["log", "--since", "yesterday"],
        &["watch", "--kind", "both"],
    ] {
        let output = mapdirect(&guard, wrong).output().unwrap();
        assert!(!output.status.success(), "{wrong:?}");
        assert!(output.stdout.is_empty());
    }
    drop((pins, refused));
    for path in [one, other] {
        wait_until_free(&path);
        std::fs::remove_file(path).unwrap();
    }
}

/// Whoever does not read keeps nobody waiting, and is told what is missing.
pub fn slow_reader(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(Kind::XFS), "audit-slow", 65536);
    let pinned = pin(&guard.client(), &open(&path), 0..65536);
    let mut slow = guard.client().records(0, true).unwrap();
    assert_eq!(slow.next(None).unwrap(), Heard::CaughtUp);
    // More than the guard keeps and a socket takes.
    let many: u64 = if crate::world::is_brief() && crate::world::is_emulated() {
        6_000
    } else {
        12_000
    };
    let mut longest = Duration::ZERO;
    for _ in 0..many {
        let begun = Instant::now();
        assert!(try_once(&path));
        longest = longest.max(begun.elapsed());
    }
    assert!(longest < Duration::from_secs(1), "{longest:?}");
    // The guard makes records of them in its own time.
    let mut newest = None;
    wait_for(Duration::from_secs(120), || {
        let before = newest;
        newest = log(&guard, &["-n", "1"])
            .pop()
            .and_then(|last| last["number"].as_u64());
        std::thread::sleep(Duration::from_millis(500));
        Ok((newest.is_some() && newest == before).then_some(()))
    })
    .unwrap();
    let begun = Instant::now();
    said(&mapdirect(&guard, &["status"]).output().unwrap());
    assert!(begun.elapsed() < Duration::from_secs(10));
    let (mut heard, mut missed, mut last) = (0, 0, None);
    loop {
        match slow.next(Some(Duration::from_secs(2))).unwrap() {
            Heard::Record(record) => {
                assert!(last < Some(record.number), "out of order");
                last = Some(record.number);
                heard += 1;
            }
            Heard::Missed(count) => missed += count,
            _ => break,
        }
    }
    assert!(missed > 0, "{heard} were heard, none is missing");
    assert!(heard > 100, "{heard}");
    // The programs of the bpf gate may report fewer: their own ring is full.
    match Gate::under_test() {
        Gate::Fanotify => assert_eq!(heard + missed, many),
        Gate::Bpf => assert!(heard + missed <= many, "{heard} {missed}"),
    }
    assert_eq!(
        log(&guard, &[]).len(),
        4096.min(usize::try_from(many).unwrap())
    );
    world.count(
        "refusals that a slow reader was told or told to have missed",
        many,
    );
    drop(pinned);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// Status 3, and words.
pub fn without_a_guard(_: &World) {
    for arguments in [&["watch"][..], &["log"], &["status", "--metrics"]] {
        let output = Command::new(BINARY)
            .args(arguments)
            .env("MAPDIRECT_SOCKET", "/nonexistent/guard.sock")
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(3), "{arguments:?}");
        assert!(output.stdout.is_empty());
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(words.contains("no guard answers"), "{words}");
    }
}

/// A reader that leaves ends it, without a word of panic.
pub fn reader_that_leaves(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(Kind::EXT4), "audit-leaves", 65536);
    let pinned = pin(&guard.client(), &open(&path), 0..65536);
    let mut watch = mapdirect(&guard, &["watch", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    until(
        || assert!(try_once(&path)),
        || lines.next().unwrap().unwrap(),
    );
    drop(lines);
    let status = until(
        || assert!(try_once(&path)),
        || watch.wait_with_output().unwrap(),
    );
    let words = String::from_utf8_lossy(&status.stderr).into_owned();
    // As any filter whose reader has left.
    assert_eq!(status.status.code(), Some(141), "{words}");
    assert_eq!(words, "");
    drop(pinned);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}
