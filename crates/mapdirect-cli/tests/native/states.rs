//! The states of a pin, and what its holder is told: section 9 of the contract.

use crate::world::{
    BINARY, World, is_emulated, is_pinned, kinds, map, open, patience, pin, wait_until_free,
    written,
};
use anyhow::{Result, bail};
use libtest_mimic::Trial;
use mapdirect::{DirectMap, EventFd, Guard, Integrity, MapOptions, OnBreach, State};
use mapdirect_sys::Errno;
use mapdirect_sys::signal::{self, Signal};
use mapdirect_testkit::contract::{Gate, Subject};
use mapdirect_testkit::disk::run;
use mapdirect_testkit::fault::{Access, load};
use mapdirect_testkit::process::{GuardProcess, Helper, listen, say, wait_for};
use mapdirect_testkit::{Disk, Kind, raw};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub fn trials(world: &World) -> Vec<Trial> {
    let kinds = kinds(&[Kind::XFS, Kind::EXT4]);
    let tests: &[(&str, crate::world::OnKind)] = match Gate::under_test() {
        Gate::Fanotify => &[
            ("lost-with-its-guard", lost_with_its_guard),
            ("child-of-fork", child_of_fork),
            ("broken", broken),
            ("broken-and-told-only", broken_and_told_only),
            ("broken-in-a-child", broken_in_a_child),
            (
                "broken-under-the-command-line",
                broken_under_the_command_line,
            ),
        ],
        Gate::Bpf => &[
            ("unattended-and-taken-over", unattended_and_taken_over),
            ("unloaded", unloaded),
            ("part-removed", part_removed),
            ("child-of-fork", child_of_fork),
        ],
    };
    let mut trials = world.trials("states", &kinds, tests);
    // They need filesystems of their own, and there is one of each DAX kind.
    if crate::world::dax_kinds().is_empty() {
        trials.extend(world.trials("states", &kinds, &[("shut-down", shut_down)]));
    }
    trials
}

/// How long the guard's word may be on its way.
fn soon() -> Duration {
    Duration::from_secs(if is_emulated() { 30 } else { 1 })
}

fn is_readable_within(event: &EventFd, limit: Duration) -> bool {
    let limit = Timespec::try_from(limit).unwrap();
    poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&limit)) == Ok(1)
}

/// Waits for the event, and then for a state: it may change several times.
fn told(event: &EventFd, is_it: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_it() {
        let left = soon().saturating_sub(began.elapsed());
        assert!(is_readable_within(event, left), "nothing was told");
        event.clear();
    }
}

fn lost_with_its_guard(world: &World, kind: Kind) {
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(kind), "states-lost", 1 << 20);
    let file = open(&path);
    let held = map(&guard.client(), &file, 0..65536);
    let pinned = pin(&guard.client(), &file, 65536..131_072);
    let events = [held.event_fd().unwrap(), pinned.event_fd().unwrap()];
    assert!(!events.iter().any(EventFd::clear));
    assert!(held.state().is_kept() && pinned.state().is_kept());
    guard.kill().unwrap();
    told(&events[0], || held.state().is_lost());
    told(&events[1], || pinned.state().is_lost());
    assert!(held.state().why().contains("the guard is gone"));
    assert_eq!(held.integrity(), Integrity::Intact);
    // It is mapped all the same: the file is what it is.
    let mut byte = [0];
    held.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [7]);
    // A new guard promises nothing about what it has not granted.
    guard.start_again(Path::new(BINARY)).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert!(held.state().is_lost() && pinned.state().is_lost());
    drop((held, pinned, file));
    std::fs::remove_file(&path).unwrap();
}

/// What is on a filesystem that is shut down is lost at once, and nothing else.
fn shut_down(world: &World, kind: Kind) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let disk = Disk::new(kind, 320).unwrap();
    let (path, elsewhere) = (
        written(&disk, "states-dead", 1 << 20),
        written(&world.disk(kind), "states-elsewhere", 1 << 20),
    );
    let (file, other) = (open(&path), open(&elsewhere));
    let held = map(&guard.client(), &file, 0..65536);
    let pinned = pin(&guard.client(), &file, 65536..131_072);
    let spared = pin(&guard.client(), &other, 0..65536);
    let events = [held.event_fd().unwrap(), pinned.event_fd().unwrap()];
    run(Command::new("xfs_io")
        .args(["-x", "-c", "shutdown"])
        .arg(disk.root()))
    .unwrap();
    told(&events[0], || held.state().is_lost());
    told(&events[1], || pinned.state().is_lost());
    assert!(held.state().why().contains("shut down"), "{}", held.state());
    assert_eq!(held.integrity(), Integrity::Intact, "no block has moved");
    let status = guard.client().status().unwrap();
    let pins: Vec<_> = status.files.iter().flat_map(|file| &file.pins).collect();
    assert_eq!(pins.len(), 3);
    for shown in pins {
        let is_spared = shown.pin == spared.pin_id();
        assert_eq!(shown.lost.is_empty(), is_spared, "{}", shown.lost);
    }
    assert!(spared.state().is_kept());
    drop((held, pinned, spared, file, other));
    wait_until_free(&elsewhere);
    std::fs::remove_file(&elsewhere).unwrap();
    disk.unmount().unwrap();
}

/// Role: maps a range, has a child, and that says what it sees. Arguments:
/// socket, path.
pub fn play_forked(arguments: &[String]) -> Result<()> {
    let [socket, path] = arguments else {
        bail!("wrong arguments");
    };
    let file = open(Path::new(path));
    let options = MapOptions::new().range(0..8192).accept_page_cache(true);
    let map = options.patience(patience()).guard(Guard::at(socket));
    let map = map.map(&file)?;
    drop(file);
    let child = raw::fork(|| {
        let answer = |order: &str| match order {
            "state" => map.state().to_string(),
            "count" => match map.integrity() {
                Integrity::Breached { count, .. } => count.to_string(),
                _ => String::from("0"),
            },
            "load" => format!("{:?}", load(map.as_ptr() as usize)),
            "read" => format!("{:?}", map.read_exact_at(&mut [0], 0).map_err(|e| e.kind())),
            _ => String::from("?"),
        };
        say("held");
        while let Ok(Some(order)) = listen() {
            say(&answer(&order));
        }
        0
    })?;
    raw::wait(child)?;
    Ok(())
}

fn ask(helper: &mut Helper, order: &str) -> String {
    helper.tell(order).unwrap();
    helper.hear().unwrap()
}

fn forked(guard: &GuardProcess, path: &Path) -> Helper {
    let socket = guard.socket().to_string_lossy().into_owned();
    let arguments = [&*socket, path.to_str().unwrap()];
    let mut helper = Helper::start("forked", &arguments).unwrap();
    assert_eq!(helper.hear().unwrap(), "held");
    helper
}

/// A child has no thread of its parent's, and is told all the same when it
/// asks.
fn child_of_fork(world: &World, kind: Kind) {
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(kind), "states-forked", 65536);
    let mut child = forked(&guard, &path);
    assert_eq!(ask(&mut child, "state"), "kept");
    assert_eq!(ask(&mut child, "count"), "0");
    guard.kill().unwrap();
    let expected = match Gate::under_test() {
        Gate::Fanotify => "lost",
        Gate::Bpf => "unattended",
    };
    wait_for(soon(), || {
        Ok(ask(&mut child, "state").starts_with(expected).then_some(()))
    })
    .unwrap();
    // One that asks for the first time now is told the same.
    drop(child);
    if Gate::under_test() == Gate::Bpf {
        guard.start_again(Path::new(BINARY)).unwrap();
        let mut child = forked(&guard, &path);
        guard.kill().unwrap();
        let state = ask(&mut child, "state");
        assert!(state.starts_with(expected), "{state}");
        drop(child);
        wait_until_free(&path);
    }
    std::fs::remove_file(&path).unwrap();
}

/// A mapping of all that is pinned of a subject.
fn map_subject(guard: &Guard, subject: &Subject, file: &File, on_breach: OnBreach) -> DirectMap {
    MapOptions::new()
        .range(subject.pinned())
        .accept_page_cache(true)
        .patience(patience())
        .on_breach(on_breach)
        .guard(guard.clone())
        .map(file)
        .unwrap()
}

fn broken(world: &World, kind: Kind) {
    let guard = world.guard();
    let subject = Subject::new(&world.disk(kind), "states-broken", false);
    let file = open(&subject.path);
    let mut held = map_subject(&guard.client(), &subject, &file, OnBreach::Revoke);
    let event = held.event_fd().unwrap();
    let addresses = held.as_ptr() as usize..held.as_ptr() as usize + held.len();
    assert!(matches!(load(addresses.start), Access::Went(_)));
    subject.move_blocks(kind, &file).unwrap();
    told(&event, || held.state().is_lost());
    for address in [addresses.start, addresses.end - 1] {
        assert_eq!(load(address), Access::BUS_ADRERR);
    }
    // Calls say so.
    let mut byte = [0];
    for refused in [
        held.read_exact_at(&mut byte, 0),
        held.write_all_at(b"x", 0),
        held.persist(0..1),
        held.write_persist_at(b"x", 0),
        held.allocate(0..1),
    ] {
        let refused = refused.unwrap_err();
        assert_eq!(refused.kind(), mapdirect::Kind::Breached, "{refused}");
        assert_eq!(refused.errno(), Errno::IO.raw_os_error());
        assert!(refused.to_string().contains("have changed"), "{refused}");
    }
    let Integrity::Breached { breaches, .. } = held.integrity() else {
        panic!("it is broken");
    };
    let breach = &breaches[0];
    assert_eq!(breach.pin, held.pin_id());
    assert_ne!(breach.before, breach.after);
    assert_eq!(breach.path, subject.path.to_string_lossy());
    // The rest of it is protected until it is dropped.
    assert!(is_pinned(&subject.path));
    let status = guard.client().status().unwrap();
    let pins = status.files.iter().flat_map(|file| &file.pins);
    let shown = pins.clone().find(|pin| pin.pin == held.pin_id()).unwrap();
    assert!(shown.breaches > 0);
    assert!(status.breached > 0);
    drop((held, file));
    wait_until_free(&subject.path);
    world.count("mappings revoked", 1);
}

fn broken_and_told_only(world: &World, kind: Kind) {
    let guard = world.guard();
    let subject = Subject::new(&world.disk(kind), "states-told", false);
    let file = open(&subject.path);
    let held = map_subject(&guard.client(), &subject, &file, OnBreach::Tell);
    let event = held.event_fd().unwrap();
    subject.move_blocks(kind, &file).unwrap();
    told(&event, || held.state().is_lost());
    assert!(!held.integrity().is_intact());
    held.read_exact_at(&mut [0; 64], 0).unwrap();
    assert!(matches!(load(held.as_ptr() as usize), Access::Went(_)));
    drop((held, file));
    wait_until_free(&subject.path);
}

/// What a child has of the mapping stays as it was until it asks: nobody in it
/// hears of anything before.
fn broken_in_a_child(world: &World, kind: Kind) {
    let guard = world.guard();
    let subject = Subject::new(&world.disk(kind), "states-child", false);
    let file = open(&subject.path);
    let held = map_subject(&guard.client(), &subject, &file, OnBreach::Revoke);
    let address = held.as_ptr() as usize;
    let (mut told, mut tell) = std::io::pipe().unwrap();
    let child = raw::fork(|| {
        let _ = told.read(&mut [0]);
        let unasked = load(address);
        let began = Instant::now();
        while !held.state().is_lost() && began.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let asked = (load(address), held.read_exact_at(&mut [0], 0).is_err());
        match (unasked, asked) {
            (Access::Went(_), (Access::BUS_ADRERR, true)) => 0,
            (Access::Went(_), _) => 1,
            _ => 2,
        }
    })
    .unwrap();
    subject.move_blocks(kind, &file).unwrap();
    wait_for(soon(), || Ok(held.state().is_lost().then_some(()))).unwrap();
    assert_eq!(load(address), Access::BUS_ADRERR);
    tell.write_all(b"x").unwrap();
    assert_eq!(raw::wait(child).unwrap(), 0);
    drop((held, file));
    wait_until_free(&subject.path);
}

/// A `mapdirect pin` that runs, and what it says.
struct Pinned {
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
}

impl Pinned {
    fn start(socket: &Path, path: &Path, command: &[&str]) -> Self {
        let mut child = Command::new(BINARY)
            .args(["pin", path.to_str().unwrap(), "--patience", "20000"])
            .args(command)
            .env("MAPDIRECT_SOCKET", socket)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        // The table of extents is out when it holds the pin; where there is a
        // command, all of the output is the command's.
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        assert!(line.starts_with("pinned"), "{line}");
        Self { child, stderr }
    }

    fn hear(&mut self) -> String {
        let mut line = String::new();
        self.stderr.read_line(&mut line).unwrap();
        line
    }

    /// Its status, and whatever else it said.
    fn end(mut self) -> (Option<i32>, String) {
        let mut rest = String::new();
        self.stderr.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap().code(), rest)
    }
}

/// `mapdirect pin` has a status for it, and `mapdirect status` a line.
fn broken_under_the_command_line(world: &World, kind: Kind) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let subject = Subject::new(&world.disk(kind), "states-cli", false);
    let file = open(&subject.path);
    // Whoever has a pin may have it open for writing.
    let held = map_subject(&guard.client(), &subject, &file, OnBreach::Tell);
    let alone = Pinned::start(guard.socket(), &subject.path, &[]);
    let command = ["--", "sh", "-c", "echo pinned; sleep 3; exit 7"];
    let with_command = Pinned::start(guard.socket(), &subject.path, &command);
    subject.move_blocks(kind, &file).unwrap();
    let (status, said) = alone.end();
    assert_eq!(status, Some(5), "{said}");
    assert!(said.contains("the pin was broken: bytes "), "{said}");
    let (status, said) = with_command.end();
    assert_eq!(status, Some(123), "{said}");
    assert!(said.contains("the pin was broken: bytes "), "{said}");
    let shown = |arguments: &[&str]| {
        let shown = Command::new(BINARY)
            .env("COLUMNS", "1000")
            .args(arguments)
            .env("MAPDIRECT_SOCKET", guard.socket())
            .output()
            .unwrap();
        String::from_utf8(shown.stdout).unwrap()
    };
    let text = shown(&["status"]);
    assert!(
        text.contains("breaches: ") && text.contains("BROKEN"),
        "{text}"
    );
    let value: Value = serde_json::from_str(&shown(&["status", "--json"])).unwrap();
    assert!(value["breached"].as_u64().unwrap() >= 3, "{value}");
    let breach = &value["breaches"][0];
    assert_eq!(breach["file"], subject.path.to_str().unwrap());
    assert_ne!(breach["before"], breach["after"]);
    crate::extents::schemas::validate(world, &[("status", value)]);
    drop((held, file));
    wait_until_free(&subject.path);
}

/// Under the bpf gate a pin outlives its guard, and the next one has it.
fn unattended_and_taken_over(world: &World, kind: Kind) {
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(kind), "states-unattended", 1 << 20);
    let file = open(&path);
    raw::fallocate(file.as_fd(), 3, 65536, 65536).unwrap();
    file.sync_all().unwrap();
    let mut held = map(&guard.client(), &file, 0..131_072);
    let other = pin(&guard.client(), &file, 0..4096);
    let event = held.event_fd().unwrap();
    // It would keep frozen what is to be allocated, if it had more.
    let mut shown = Pinned::start(guard.socket(), &path, &["--range", "0:4K"]);
    let is_refused = || {
        assert_eq!(rustix::fs::ftruncate(&file, 0), Err(Errno::TXTBSY));
        let punched = raw::fallocate(file.as_fd(), 3, 0, 4096);
        assert_eq!(punched, Err(Errno::TXTBSY));
    };
    for round in 0..2 {
        guard.kill().unwrap();
        let is_unattended = || matches!(held.state(), State::Unattended { .. });
        told(&event, is_unattended);
        assert!(matches!(other.state(), State::Unattended { .. }) || round > 0);
        is_refused();
        let said = shown.hear();
        assert!(said.contains("the pin stays, unattended"), "{said}");
        let page = 65536 + round * 8192;
        let refused = held.allocate(page..page + 4096).unwrap_err();
        assert_eq!(refused.kind(), mapdirect::Kind::NoGuard, "{refused}");
        guard.start_again(Path::new(BINARY)).unwrap();
        told(&event, || held.state().is_kept());
        is_refused();
        let said = shown.hear();
        assert!(said.contains("a guard is back"), "{said}");
        // It is asked as the first one was.
        held.allocate(page..page + 4096).unwrap();
        held.write_all_at(b"stored", usize::try_from(page).unwrap())
            .unwrap();
    }
    assert!(held.integrity().is_intact());
    assert!(shown.child.try_wait().unwrap().is_none());
    signal::kill(shown.child.id().cast_signed(), Signal::TERMINATE).unwrap();
    assert_eq!(shown.end(), (Some(0), String::new()));
    // One of several pins is over at once for the guard that took it over.
    drop(held);
    let elsewhere = raw::fallocate(file.as_fd(), 3, 4096, 4096);
    assert_eq!(elsewhere, Ok(()));
    assert_eq!(rustix::fs::ftruncate(&file, 0), Err(Errno::TXTBSY));
    drop((other, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// The gate is taken away by whoever may, while no guard runs.
fn unloaded(world: &World, kind: Kind) {
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(kind), "states-unloaded", 65536);
    let file = open(&path);
    let held = map(&guard.client(), &file, 0..65536);
    let event = held.event_fd().unwrap();
    let shown = Pinned::start(guard.socket(), &path, &[]);
    let with_command = Pinned::start(guard.socket(), &path, &["--", "sleep", "20"]);
    guard.kill().unwrap();
    told(&event, || !held.state().is_kept());
    assert!(!held.state().is_lost() && is_pinned(&path));
    guard.unload().unwrap();
    told(&event, || held.state().is_lost());
    assert!(held.state().why().contains("taken out of the kernel"));
    assert!(!is_pinned(&path));
    let (status, said) = shown.end();
    assert_eq!(status, Some(4), "{said}");
    assert!(
        said.contains("is not kept any more: the gate was taken"),
        "{said}"
    );
    let (status, said) = with_command.end();
    assert_eq!(status, Some(124), "{said}");
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}

/// A program of the gate is taken away while no guard runs.
fn part_removed(world: &World, kind: Kind) {
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(kind), "states-part", 65536);
    let file = open(&path);
    let held = map(&guard.client(), &file, 0..65536);
    let event = held.event_fd().unwrap();
    guard.kill().unwrap();
    told(&event, || !held.state().is_kept());
    let directory = guard.gate_directory().unwrap();
    let link = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_string_lossy().contains("setattr"))
        .unwrap();
    std::fs::remove_file(&link).unwrap();
    told(&event, || held.state().is_lost());
    let why = held.state().why().to_owned();
    assert!(
        why.contains(link.file_name().unwrap().to_str().unwrap()),
        "{why}"
    );
    drop((held, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}
