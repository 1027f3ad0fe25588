//! The supervisor of a guard is short of processes or descriptors for a while, or is
//! stopped, and no pin ends by that.
//!
//! `MAPDIRECT_ROUNDS` says for how many rounds all of it happens at random.

use crate::declared::{Declared, becomes_pinned, entry, stays_pinned};
use crate::killed::{live, wait_for_next};
use crate::world::{
    BINARY, World, is_emulated, is_pinned, kinds, open, patience, pin, wait_until_free, written,
};
use libtest_mimic::Trial;
use mapdirect::{Kind as Reason, PinOptions};
use mapdirect_sys::signal::{Signal, kill};
use mapdirect_testkit::Kind;
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::disk::{run, unmount};
use mapdirect_testkit::process::{GuardProcess, ScratchDirectory, wait_for};
use mapdirect_testkit::random::Random;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = world.trials(
        "shortage",
        &kinds(&[Kind::XFS, Kind::EXT4]),
        &[
            ("processes", processes),
            ("descriptors", descriptors),
            ("keepers", keepers),
            ("declared-not-kept", declared_not_kept),
        ],
    );
    if Gate::under_test() == Gate::Fanotify {
        // The other gate hands over nothing for a pin.
        trials.push(world.trial("shortage::not-kept", not_kept));
    }
    trials
}

/// What is in flight to a supervisor that is stopped may be open descriptors of any
/// file, for all that another guard knows.
pub fn alone(world: &World) -> Vec<Trial> {
    vec![
        world.trial("shortage::stopped", stopped),
        world.trial("shortage::at-random", at_random),
    ]
}

/// A control group with a limit of processes.
struct Pids {
    root: ScratchDirectory,
    group: PathBuf,
}

impl Pids {
    fn new() -> Self {
        let root = ScratchDirectory::new("pids").unwrap();
        let mount = |kind: &[&str]| {
            run(Command::new("mount")
                .arg("-t")
                .args(kind)
                .arg("none")
                .arg(root.path()))
        };
        if mount(&["cgroup", "-o", "pids"]).is_err() {
            mount(&["cgroup2"]).unwrap();
            std::fs::write(root.path().join("cgroup.subtree_control"), "+pids").unwrap();
        }
        let name = root.path().file_name().unwrap();
        let group = root.path().join(name);
        std::fs::create_dir(&group).unwrap();
        Self { root, group }
    }

    fn add(&self, pid: i32) {
        std::fs::write(self.group.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    /// Lets no process be made any more, or any number.
    fn is_full(&self, full: bool) {
        let most = if full { "0" } else { "max" };
        std::fs::write(self.group.join("pids.max"), most).unwrap();
    }
}

impl Drop for Pids {
    fn drop(&mut self) {
        // Whoever was in it may not be quite gone.
        let removed = wait_for(patience(), || Ok(std::fs::remove_dir(&self.group).ok()));
        unmount(self.root.path()).unwrap();
        removed.unwrap();
    }
}

/// Has a process have so many descriptors, or as many as it could have at first.
fn limit_descriptors(pid: i32, most: Option<u64>) {
    let pid = Pid::from_raw(pid);
    let own = rustix::process::getrlimit(Resource::Nofile);
    let current = most.or(own.maximum);
    let limit = Rlimit {
        current,
        maximum: own.maximum,
    };
    prlimit(pid, Resource::Nofile, limit).unwrap();
}

/// A guard is killed while its supervisor can start no other one, for a second.
fn cannot_start(world: &World, kind: Kind, name: &str, short: impl Fn(&GuardProcess, bool)) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(kind), name, 1 << 20);
    let held = pin(&guard.client(), &open(&path), 0..1 << 20);
    live();
    for round in 1..=2 {
        let before = guard.worker().unwrap();
        short(&guard, true);
        kill(before, Signal::KILL).unwrap();
        let said = || guard.said().matches("the guard cannot be started").count();
        wait_for(patience(), || Ok((said() == round).then_some(())))
            .unwrap_or_else(|_| panic!("round {round}: {}", guard.said()));
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!(said(), round, "{}", guard.said());
        assert!(guard.started().is_empty() || Gate::under_test() == Gate::Bpf);
        short(&guard, false);
        wait_for_next(&guard, before, patience());
        assert!(is_pinned(&path));
        assert!(!held.state().is_lost(), "{}", held.state());
        live();
    }
    drop(held);
    wait_until_free(&path);
    drop(guard);
    std::fs::remove_file(&path).unwrap();
}

fn processes(world: &World, kind: Kind) {
    let pids = Pids::new();
    cannot_start(world, kind, "shortage-processes", |guard, short| {
        pids.add(guard.pid());
        pids.is_full(short);
    });
}

fn descriptors(world: &World, kind: Kind) {
    cannot_start(world, kind, "shortage-descriptors", |guard, short| {
        // As many as a supervisor waits for; more are open.
        limit_descriptors(guard.pid(), short.then_some(5));
    });
}

/// A keeper is killed while no other one can be started.
fn keepers(world: &World, kind: Kind) {
    let pids = Pids::new();
    let path = written(&world.disk(kind), "shortage-keepers", 1 << 20);
    let declared = Declared::start(&entry(&path, ""));
    declared.says("shortage-keepers: pinned as");
    let keeper = declared.keeper().unwrap();
    pids.add(declared.guard.pid());
    pids.is_full(true);
    kill(keeper, Signal::KILL).unwrap();
    declared.says("the keeper of pins cannot be started");
    stays_pinned(&path, Duration::from_secs(3));
    let said = declared.guard.said();
    assert_eq!(said.matches("cannot be started").count(), 1, "{said}");
    pids.is_full(false);
    wait_for(patience(), || {
        Ok(declared.keeper().filter(|now| *now != keeper))
    })
    .unwrap();
    stays_pinned(&path, Duration::from_millis(500));
    drop(declared);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// A pin that would end with its guard is refused, whether the descriptor that it lives
/// by is lost on the way to the supervisor or the next guard would lack the room.
fn not_kept(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let client = guard.client();
    let disk = world.disk(Kind::XFS);
    let [path, other] = ["shortage-kept", "shortage-not-kept"].map(|it| written(&disk, it, 65536));
    let held = pin(&client, &open(&path), 0..65536);
    let open_there = std::fs::read_dir(format!("/proc/{}/fd", guard.pid()));
    let most = open_there.unwrap().count() as u64;
    // All of them are in use; and the next would be in the last quarter.
    for limit in [8, most + 3] {
        limit_descriptors(guard.pid(), Some(limit));
        // A second pin of a file takes one descriptor, a first one two.
        for file in [&path, &other] {
            let options = PinOptions::new().range(0..4096).guard(client.clone());
            let error = options.pin(File::open(file).unwrap()).unwrap_err();
            assert_eq!(error.kind(), Reason::Limit, "{limit}: {error}");
        }
        assert!(!is_pinned(&other));
        limit_descriptors(guard.pid(), None);
        drop(pin(&client, &open(&other), 0..4096));
        wait_until_free(&other);
    }
    // Once a minute.
    let said = guard.said();
    assert_eq!(said.matches("too few descriptors").count(), 1, "{said}");
    let also = pin(&client, &open(&other), 0..4096);
    let before = guard.worker().unwrap();
    live();
    kill(before, Signal::KILL).unwrap();
    wait_for_next(&guard, before, patience());
    for (held, path) in [(&held, &path), (&also, &other)] {
        assert!(!held.state().is_lost() && is_pinned(path));
    }
    let pins: usize = client
        .status()
        .unwrap()
        .files
        .iter()
        .map(|file| file.pins.len())
        .sum();
    assert_eq!(pins, 2);
    drop((held, also));
    for path in [path, other] {
        wait_until_free(&path);
        std::fs::remove_file(path).unwrap();
    }
}

/// A declared pin that ends with its keeper is said to.
fn declared_not_kept(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "shortage-declared", 1 << 20);
    let declared = Declared::start("");
    let keeper = wait_for(patience(), || Ok(declared.keeper())).unwrap();
    // The guard has what it needs for the pin: that is in the supervisor twice.
    limit_descriptors(declared.guard.pid(), Some(8));
    declared.reload(Some(&entry(&path, "")));
    if Gate::under_test() == Gate::Fanotify {
        declared.says("shortage-declared: not pinned: what is pinned already is as much as");
        assert!(!is_pinned(&path));
    } else {
        declared.says("nobody can keep it beside this process");
        assert!(is_pinned(&path));
    }
    limit_descriptors(declared.guard.pid(), None);
    kill(keeper, Signal::KILL).unwrap();
    wait_for(patience(), || {
        let said = declared.guard.said();
        let last = said.lines().rev().find(|line| line.contains("pinned as"));
        Ok(last
            .is_some_and(|last| !last.contains("nobody can keep"))
            .then_some(()))
    })
    .unwrap();
    becomes_pinned(&path);
    drop(declared);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// A supervisor that is stopped longer than a guard may be silent takes it for no
/// silence of the guard, and does what it has missed when it goes on.
fn stopped(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let disk = world.disk(Kind::XFS);
    let [path, other] =
        ["shortage-stopped", "shortage-meanwhile"].map(|it| written(&disk, it, 65536));
    let held = pin(&guard.client(), &open(&path), 0..65536);
    let before = guard.worker().unwrap();
    live();
    kill(guard.pid(), Signal::STOP).unwrap();
    // Nobody answers, but it will.
    let meanwhile = pin(&guard.client(), &open(&other), 0..65536);
    std::thread::sleep(Duration::from_secs(12));
    assert!(is_pinned(&path) && is_pinned(&other));
    kill(guard.pid(), Signal::CONTINUE).unwrap();
    live();
    assert_eq!(guard.worker().unwrap(), before, "{}", guard.said());
    kill(guard.pid(), Signal::STOP).unwrap();
    kill(before, Signal::KILL).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    kill(guard.pid(), Signal::CONTINUE).unwrap();
    wait_for_next(&guard, before, patience());
    for (held, path) in [(held, path), (meanwhile, other)] {
        assert!(!held.state().is_lost() && is_pinned(&path));
        drop(held);
        wait_until_free(&path);
        std::fs::remove_file(path).unwrap();
    }
}

/// All of it at random: no pin ends, and in the end everything is as at first.
fn at_random(world: &World) {
    let rounds = std::env::var("MAPDIRECT_ROUNDS");
    let rounds: u64 = rounds
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(if is_emulated() { 5 } else { 15 });
    let pids = Pids::new();
    let disk = world.disk(Kind::XFS);
    let [path, kept, other] = ["pinned", "declared", "more"]
        .map(|name| written(&disk, &format!("shortage-random-{name}"), 1 << 20));
    let declared = Declared::start(&entry(&kept, ""));
    declared.says("declared: pinned as");
    let guard = &declared.guard;
    let client = guard.client();
    let held = pin(&client, &open(&path), 0..1 << 20);
    pids.add(guard.pid());
    live();
    let mut random = Random::new(u64::from(std::process::id()));
    let mut refused = 0;
    for round in 0..rounds {
        let worker = guard.worker().unwrap();
        let keeper = declared.keeper().unwrap_or(worker);
        let mut done = Vec::new();
        for _ in 0..=random.below(3) {
            let whom = *random.pick(&[worker, worker, keeper]);
            let what = random.below(6);
            match what {
                0 | 1 => drop(kill(whom, Signal::KILL)),
                2 => kill(guard.pid(), Signal::STOP).unwrap(),
                3 => drop(kill(whom, Signal::STOP)),
                4 => pids.is_full(true),
                _ => limit_descriptors(guard.pid(), Some(4 + random.below(20))),
            }
            done.push((what, whom));
            std::thread::sleep(Duration::from_millis(random.below(30)));
        }
        // Whoever waits at the gate meanwhile waits: so only what needs no guard.
        std::thread::sleep(Duration::from_millis(random.below(400)));
        pids.is_full(false);
        limit_descriptors(guard.pid(), None);
        for pid in [guard.pid(), worker, keeper] {
            let _ = kill(pid, Signal::CONTINUE);
        }
        let context = || format!("round {round}, {done:?}: {}", guard.said());
        let answered = wait_for(patience(), || Ok(client.status().ok()));
        assert!(answered.is_ok(), "{}", context());
        assert!(is_pinned(&path) && is_pinned(&kept), "{}", context());
        assert!(!held.state().is_lost(), "{} {}", held.state(), context());
        let options = PinOptions::new().guard(client.clone()).patience(patience());
        match options.pin(File::open(&other).unwrap()) {
            Ok(_) => {}
            Err(_) => refused += 1,
        }
        live();
    }
    println!("{rounds} rounds; {refused} pins were refused meanwhile");
    let status = client.status().unwrap();
    let pins: usize = status.files.iter().map(|file| file.pins.len()).sum();
    assert_eq!(pins, 2, "{:?}", status.files);
    drop((held, declared));
    for path in [path, kept, other] {
        wait_until_free(&path);
        std::fs::remove_file(path).unwrap();
    }
}
