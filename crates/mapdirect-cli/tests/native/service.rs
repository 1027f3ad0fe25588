//! The guard as a service: places for clients, what it needs before it says
//! that it is ready, and signals.

use crate::world::{
    BINARY, World, dax_kinds, is_emulated, is_pinned, map, open, pin, wait_until_free, written,
};
use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use mapdirect::{Integrity, Kind as Reason, PrepareOptions};
use mapdirect_proto::{MAX_MESSAGE, Reply, Request, VERSION};
use mapdirect_sys::mmap::View;
use mapdirect_sys::signal::{Signal, kill};
use mapdirect_sys::unix::Socket;
use mapdirect_sys::vmsplice::Held;
use mapdirect_sys::{Errno, uname};
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::disk::run;
use mapdirect_testkit::process::{
    BpfDirectory, GuardProcess, Helper, ScratchDirectory, listen, say, wait_for,
};
use mapdirect_testkit::{Disk, Kind, raw};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, run) in [
        ("many-users", many_users as fn(&World)),
        ("silent-clients", silent_clients),
        ("signals", signals),
        ("shut-down-filesystem", shut_down_filesystem),
    ] {
        trials.push(world.trial(format!("service::{name}"), run));
    }
    if Gate::under_test() == Gate::Fanotify {
        trials.push(world.trial("service::capabilities", capabilities));
        // The other gate waits for nobody who has a file open.
        trials.push(world.trial("service::interrupted", interrupted));
    }
    trials.extend(world.trials("pmem", &dax_kinds(), &[("busy-page", busy_page)]));
    trials
}

/// What only a virtual machine can show, run alone there.
pub fn trials_in_kernel(world: &World) -> Vec<Trial> {
    vec![
        world.trial("in-kernel::service::capabilities", capabilities),
        world.trial("in-kernel::service::no-gate", no_gate),
        world.trial("in-kernel::service::removed-files", removed_files),
        world.trial("in-kernel::service::removed-directory", removed_directory),
        world.trial("in-kernel::service::emptied-maps", emptied_maps),
        world.trial(
            "in-kernel::service::opened-for-a-moment",
            opened_for_a_moment,
        ),
        world.trial("in-kernel::service::replaced-without-a-gap", replaced),
    ]
}

/// Longer than a guard takes to find out what somebody has done to its gate.
const PATIENCE: Duration = Duration::from_secs(60);

/// A guard that is looked at closely.
struct Trying {
    child: Child,
    directory: ScratchDirectory,
    gate: BpfDirectory,
}

impl Trying {
    /// Starts one with a gate, by way of another program, if any.
    fn start(wrapper: &[&str], gate: &str) -> Self {
        Self::start_at(wrapper, gate, BpfDirectory::new(Path::new(BINARY)))
    }

    fn start_at(wrapper: &[&str], gate: &str, bpf: BpfDirectory) -> Self {
        let directory = ScratchDirectory::new("service").unwrap();
        let words: Vec<&str> = wrapper.iter().copied().chain([BINARY]).collect();
        let child = Command::new(words[0])
            .args(&words[1..])
            .args(["guard", "--gate", gate, "--socket"])
            .arg(directory.path().join("guard.sock"))
            .arg("--bpf-directory")
            .arg(bpf.path())
            .stdin(Stdio::null())
            .stdout(File::create(directory.path().join("out")).unwrap())
            .stderr(File::create(directory.path().join("err")).unwrap())
            .spawn()
            .unwrap();
        Self {
            child,
            directory,
            gate: bpf,
        }
    }

    fn said(&self, stream: &str) -> String {
        std::fs::read_to_string(self.directory.path().join(stream)).unwrap()
    }

    /// Waits until it is ready, or has ended: what it said then.
    fn outcome(&mut self) -> std::result::Result<(), String> {
        wait_for(Duration::from_secs(120), || {
            if self.said("out").contains("ready") {
                return Ok(Some(Ok(())));
            }
            let Some(status) = self.child.try_wait()? else {
                return Ok(None);
            };
            ensure!(status.code() == Some(1), "it ended with {status}");
            Ok(Some(Err(self.said("err"))))
        })
        .unwrap()
    }

    /// Waits until it has complained of something.
    fn complains(&self, of: &str) {
        wait_for(PATIENCE, || Ok(self.said("err").contains(of).then_some(())))
            .with_context(|| format!("{of}: {}", self.said("err")))
            .unwrap();
    }

    fn client(&self) -> mapdirect::Guard {
        mapdirect::Guard::at(self.directory.path().join("guard.sock"))
    }

    fn signal(&self, number: i32) {
        kill(self.child.id().cast_signed(), number).unwrap();
    }
}

impl Drop for Trying {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.signal(Signal::TERMINATE);
            let _ = self.child.wait();
        }
    }
}

/// What `doctor` finds about being a guard, if it finds one thing, and that.
fn to_guard(doctor: &mut Command, outcome: &str) -> Option<String> {
    let said = doctor.output().unwrap();
    let said: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
    let findings = said["findings"].as_array()?.iter();
    let mut ours = findings.filter(|finding| finding["name"] == "to guard");
    let found = ours.next()?;
    assert!(ours.next().is_none(), "{said}");
    assert_eq!(found["outcome"], outcome, "{said}");
    assert!(outcome == "good" || found["mend"] != "", "{said}");
    Some(found["text"].as_str()?.to_owned())
}

/// A guard without a capability that it needs says which, and never that it is
/// ready; one that has just these does its work, on files of others as well.
fn capabilities(world: &World) {
    let gate = Gate::under_test();
    let needed: &[&str] = match gate {
        Gate::Bpf => &[
            "sys_admin",
            "sys_ptrace",
            "dac_override",
            "dac_read_search",
            "setuid",
            "syslog",
        ],
        Gate::Fanotify => &["sys_admin", "sys_ptrace", "dac_override", "lease", "setuid"],
    };
    for missing in needed {
        let without = format!("--bounding-set=-{missing}");
        let mut trying = Trying::start(&["setpriv", &without], gate.name());
        let said = trying.outcome().unwrap_err();
        let name = format!("CAP_{}", missing.to_uppercase());
        assert!(said.contains(&format!("lacks {name} (")), "{said}");
        for other in needed {
            assert!(said.contains(&other.to_uppercase()), "{said}");
        }
        assert!(said.contains("help: "), "{said}");
        // `doctor` says the same, where it would be the same gate.
        let mut doctor = Command::new("setpriv");
        doctor.arg(&without).arg(BINARY).args(["doctor", "--json"]);
        let text = to_guard(&mut doctor, "note").unwrap();
        assert!(text.contains(&format!("lacks {name} (")), "{text}");
        if text.contains(&format!("with the {} gate", gate.name())) {
            assert!(said.contains(&text), "{text}: {said}");
        }
    }
    let text = to_guard(Command::new(BINARY).args(["doctor", "--json"]), "good").unwrap();
    assert_eq!(text.matches("CAP_").count(), needed.len(), "{text}");
    for name in needed {
        assert!(text.contains(&name.to_uppercase()), "{text}");
    }
    let just = format!("--bounding-set=-all,+{}", needed.join(",+"));
    let mut guard = Trying::start(&["setpriv", &just], gate.name());
    guard.outcome().unwrap();
    let path = written(&world.disk(Kind::XFS), "service-capabilities", 65536);
    let file = open(&path);
    file.set_len(131_072).unwrap();
    file.sync_all().unwrap();
    run(Command::new("chown").arg("60001").arg(&path)).unwrap();
    run(Command::new("chmod").arg("600").arg(&path)).unwrap();
    let mut held = map(&guard.client(), &file, 0..131_072);
    assert!(is_pinned(&path));
    held.allocate(65536..131_072).unwrap();
    drop(held);
    wait_until_free(&path);
    // Whoever stands in the way, of whatever user, is named.
    run(Command::new("chmod").arg("666").arg(&path)).unwrap();
    if gate == Gate::Fanotify {
        let mut other = Command::new("sleep");
        other.arg("60").stdin(open(&path)).uid(60002).gid(60002);
        let mut other = other.spawn().unwrap();
        let refused = mapdirect::PinOptions::new()
            .guard(guard.client())
            .pin(&file)
            .unwrap_err();
        let pid = other.id().cast_signed();
        assert!(
            refused.openers().iter().any(|opener| opener.pid == pid),
            "{refused:#}"
        );
        other.kill().unwrap();
        other.wait().unwrap();
    }
    drop(file);
    std::fs::remove_file(&path).unwrap();
}

/// Where the kernel has no gate a guard says so, and never that it is ready.
fn no_gate(_world: &World) {
    let mut trying = Trying::start(&[], "fanotify");
    let outcome = trying.outcome();
    if uname::version() >= (6, 14) {
        assert_eq!(outcome, Ok(()));
        return;
    }
    let said = outcome.unwrap_err();
    assert!(said.contains("no pre-content permission events"), "{said}");
    assert!(said.contains("help: "), "{said}");
}

fn punch(file: &File, offset: u64) -> std::result::Result<(), Errno> {
    raw::fallocate(file.as_fd(), 3, offset, 4096)
}

/// What there is in the directory of a gate.
fn names_in(directory: &Path) -> BTreeSet<String> {
    std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect()
}

/// Whoever removes the files of a gate opens nothing by it; they come back, and
/// keep the gate when the guard dies.
fn removed_files(world: &World) {
    let mut guard = Trying::start(&[], "bpf");
    guard.outcome().unwrap();
    let path = written(&world.disk(Kind::XFS), "service-removed", 1 << 20);
    let file = open(&path);
    let held = pin(&guard.client(), &file, 0..65_536);
    let directory = guard.gate.path().to_owned();
    let names = names_in(&directory);
    assert!(names.contains("link-file_permission"), "{names:?}");
    for name in &names {
        let path = directory.join(name);
        if path.is_dir() {
            std::fs::remove_dir(path).unwrap();
        } else {
            std::fs::remove_file(path).unwrap();
        }
    }
    // At once, and also when the kernel has got round to it.
    for _ in 0..50 {
        assert_eq!(punch(&file, 8192), Err(Errno::TXTBSY));
        std::thread::sleep(Duration::from_millis(20));
    }
    // The next pin looks for itself; and the guard says what it found.
    let other = pin(&guard.client(), &file, 131_072..196_608);
    guard.complains("put back");
    assert_eq!(names_in(&directory), names);
    assert_eq!(punch(&file, 131_072), Err(Errno::TXTBSY));
    // All of it, the directory too.
    run(Command::new("rm").arg("-r").arg(&directory)).unwrap();
    wait_for(PATIENCE, || {
        let back = directory.is_dir() && names_in(&directory) == names;
        Ok(back.then_some(()))
    })
    .unwrap();
    // Another guard may not come meanwhile, and finds everything afterwards.
    let mut second = Trying::start_at(&[], "bpf", BpfDirectory::at(Path::new(BINARY), &directory));
    assert!(second.outcome().unwrap_err().contains("another guard"));
    drop(second);
    guard.signal(Signal::KILL);
    guard.child.wait().unwrap();
    for _ in 0..50 {
        assert_eq!(punch(&file, 8192), Err(Errno::TXTBSY));
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut next = Trying::start_at(&[], "bpf", BpfDirectory::at(Path::new(BINARY), &directory));
    next.outcome().unwrap();
    // It says so a moment after it is ready.
    wait_for(PATIENCE, || {
        Ok(next.said("out").contains("took over 2 pins").then_some(()))
    })
    .unwrap();
    // It holds what it has found as well.
    std::fs::remove_file(directory.join("link-file_permission")).unwrap();
    next.complains("put back");
    assert_eq!(punch(&file, 8192), Err(Errno::TXTBSY));
    drop((held, other, file));
    std::fs::remove_file(&path).unwrap();
}

/// Where nothing can be put back, the pins that are there are told that they
/// are lost, and no other is granted.
fn removed_directory(world: &World) {
    let place = ScratchDirectory::new("bpffs").unwrap();
    run(Command::new("mount")
        .args(["-t", "bpf", "bpf"])
        .arg(place.path()))
    .unwrap();
    let directory = place.path().join("gate");
    let mut guard = Trying::start_at(&[], "bpf", BpfDirectory::at(Path::new(BINARY), &directory));
    guard.outcome().unwrap();
    let path = written(&world.disk(Kind::EXT4), "service-unmounted", 1 << 20);
    let file = open(&path);
    let held = pin(&guard.client(), &file, 0..65_536);
    run(Command::new("umount").arg("-l").arg(place.path())).unwrap();
    // Before anybody has noticed, too.
    let refused = mapdirect::PinOptions::new()
        .guard(guard.client())
        .range(131_072..196_608)
        .pin(&file)
        .unwrap_err();
    assert!(refused.obstacle().contains("not whole"), "{refused:#}");
    guard.complains("holders are told");
    guard.complains(&format!("pin {} is lost", held.pin_id()));
    // While the guard lives it keeps the programs all the same.
    assert_eq!(punch(&file, 8192), Err(Errno::TXTBSY));
    drop((held, file, guard));
    std::fs::remove_file(&path).unwrap();
}

/// What somebody deletes from the maps is put back.
fn emptied_maps(world: &World) {
    let mut guard = Trying::start(&[], "bpf");
    guard.outcome().unwrap();
    let path = written(&world.disk(Kind::XFS), "service-emptied", 1 << 20);
    let file = open(&path);
    let held = pin(&guard.client(), &file, 0..65_536);
    for (map, what) in [
        ("entries", "what is pinned"),
        ("lives", "the count of its pins"),
        ("filter", "the mark in the filter"),
        ("devices", "the count of its filesystem's pins"),
        ("settings", "the rules"),
    ] {
        assert_eq!(punch(&file, 8192), Err(Errno::TXTBSY), "before {map}");
        assert!(raw::empty_bpf_map(&guard.gate.path().join(map)).unwrap() > 0);
        // Until then the gate may be open; what happens then is for the
        // tripwire to find.
        guard.complains(what);
        assert_eq!(punch(&file, 8192), Err(Errno::TXTBSY), "after {map}");
    }
    drop(held);
    wait_until_free(&path);
    assert_eq!(punch(&file, 8192), Ok(()), "it ends as ever");
    // Without the count, and without what it could be counted by, nobody knows
    // what lives.
    let held = pin(&guard.client(), &file, 131_072..196_608);
    for map in ["holders", "lives"] {
        raw::empty_bpf_map(&guard.gate.path().join(map)).unwrap();
    }
    guard.complains(&format!("pin {} is lost", held.pin_id()));
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}

/// What is changed while something is missing in the maps is told as a breach.
fn opened_for_a_moment(world: &World) {
    let mut guard = Trying::start(&[], "bpf");
    guard.outcome().unwrap();
    let client = guard.client();
    for map in ["entries", "settings"] {
        let path = written(&world.disk(Kind::XFS), "service-opened", 1 << 20);
        let file = open(&path);
        let held = pin(&client, &file, 0..65_536);
        let event = held.event_fd().unwrap();
        // It may be put back before anything has been done.
        wait_for(PATIENCE, || {
            raw::empty_bpf_map(&guard.gate.path().join(map)).unwrap();
            Ok(punch(&file, 8192).is_ok().then_some(()))
        })
        .unwrap();
        let breach = wait_for(PATIENCE, || {
            event.clear();
            Ok(match held.integrity() {
                Integrity::Breached { breaches, .. } => breaches.into_iter().next(),
                _ => None,
            })
        });
        let breach = breach.unwrap_or_else(|_| panic!("{map}: nothing was told"));
        assert_eq!(breach.range, 8192..12_288, "{map}");
        assert!(held.state().is_lost(), "{map}: {}", held.state());
        let status = client.status().unwrap();
        let shown = status.breaches.iter();
        assert_eq!(shown.filter(|b| b.pin == held.pin_id()).count(), 1, "{map}");
        drop((held, file));
        wait_until_free(&path);
        std::fs::remove_file(&path).unwrap();
    }
}

/// While a guard replaces a gate that keeps nothing, mmap(2) with `MAP_DIRECT`
/// never finds a kernel that knows no such flag.
fn replaced(world: &World) {
    let path = written(&world.disk(Kind::EXT4), "service-replaced", 65_536);
    let mut guard = Trying::start(&[], "bpf");
    guard.outcome().unwrap();
    let directory = guard.gate.path().to_owned();
    let mut knocker = Helper::start("map-direct", &[&path.to_string_lossy()]).unwrap();
    assert_eq!(knocker.hear().unwrap(), "knocking");
    for _ in 0..2 {
        guard.signal(Signal::KILL);
        guard.child.wait().unwrap();
        let bpf = BpfDirectory::at(Path::new(BINARY), &directory);
        // The gate must outlive the guard that was killed.
        let next = Trying::start_at(&[], "bpf", bpf);
        std::mem::forget(std::mem::replace(&mut guard, next));
        guard.outcome().unwrap();
    }
    assert!(
        names_in(&directory)
            .iter()
            .all(|name| !name.starts_with("next"))
    );
    knocker.tell("end").unwrap();
    let said = knocker.hear().unwrap();
    let (tries, accepted) = said.split_once(' ').unwrap();
    assert_eq!(accepted, "0", "of {tries}");
    assert!(tries.parse::<u64>().unwrap() > 100, "{tries}");
    assert_eq!(knocker.status().unwrap(), 0);
    world.count(
        "mappings tried while a gate was replaced",
        tries.parse().unwrap(),
    );
    std::fs::remove_file(&path).unwrap();
}

/// Role: maps a file with the flag again and again, and says how often it
/// tried, and how often that was accepted.
pub fn play_map_direct(arguments: &[String]) -> Result<()> {
    let [path] = arguments else {
        bail!("wrong arguments");
    };
    let file = File::options().read(true).write(true).open(path)?;
    let over = Arc::new(AtomicBool::new(false));
    let knocking = {
        let over = Arc::clone(&over);
        std::thread::spawn(move || -> Result<(u64, u64)> {
            let (mut tries, mut accepted) = (0, 0);
            while !over.load(Relaxed) {
                match raw::map_direct_once(file.as_fd()) {
                    Ok(()) => accepted += 1,
                    Err(errno) => ensure!(errno == Errno::OPNOTSUPP, "{errno}"),
                }
                tries += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok((tries, accepted))
        })
    };
    say("knocking");
    listen()?;
    over.store(true, Relaxed);
    let (tries, accepted) = knocking
        .join()
        .map_err(|_| anyhow::anyhow!("the thread failed"))??;
    say(&format!("{tries} {accepted}"));
    Ok(())
}

/// SIGHUP is answered; other signals that are sent by mistake do no harm.
fn signals(world: &World) {
    let mut guard = Trying::start(&[], Gate::under_test().name());
    guard.outcome().unwrap();
    let path = written(&world.disk(Kind::EXT4), "service-signals", 65536);
    let file = open(&path);
    let held = map(&guard.client(), &file, 0..65536);
    for number in [Signal::QUIT, Signal::USER_1, Signal::USER_2, Signal::HANGUP] {
        guard.signal(number);
    }
    wait_for(Duration::from_secs(10), || {
        Ok(guard.said("err").contains("SIGHUP").then_some(()))
    })
    .unwrap();
    assert_eq!(guard.said("err").lines().count(), 1, "one line");
    assert!(guard.child.try_wait().unwrap().is_none());
    assert!(is_pinned(&path));
    assert_eq!(guard.client().status().unwrap().files.len(), 1);
    drop((held, file));
    wait_until_free(&path);
    guard.signal(Signal::INTERRUPT);
    assert!(guard.child.wait().unwrap().success());
    std::fs::remove_file(&path).unwrap();
}

/// A filesystem that is dead lets nobody open a file, and a pin on it ends all
/// the same.
fn shut_down_filesystem(_world: &World) {
    let mut guard = Trying::start(&[], Gate::under_test().name());
    guard.outcome().unwrap();
    let disk = Disk::new(Kind::XFS, 320).unwrap();
    let socket = guard.client().socket().to_string_lossy().into_owned();
    let holders = ["map", "pin"].map(|how| {
        let path = written(&disk, how, 65536);
        let path = path.to_string_lossy();
        let mut holder = Helper::start("hold", &[&socket, &path, "0", "65536", how]).unwrap();
        assert_eq!(holder.hear().unwrap(), "held");
        holder
    });
    let files = || guard.client().status().unwrap().files.len();
    assert_eq!(files(), 2);
    run(Command::new("xfs_io")
        .args(["-x", "-c", "shutdown"])
        .arg(disk.root()))
    .unwrap();
    for holder in holders {
        holder.kill().unwrap();
    }
    wait_for(
        Duration::from_secs(if is_emulated() { 60 } else { 15 }),
        || Ok((files() == 0).then_some(())),
    )
    .unwrap();
    // The guard does not keep it mounted.
    disk.unmount().unwrap();
}

/// Whoever waits for others to let go of a file can be interrupted.
fn interrupted(world: &World) {
    let guard = world.guard();
    let path = written(&world.disk(Kind::EXT4), "service-interrupted", 65536);
    let mut writer = Command::new("sleep")
        .arg("60")
        .stdin(open(&path))
        .spawn()
        .unwrap();
    for (signal, command) in [
        (Signal::INTERRUPT, &[][..]),
        (Signal::TERMINATE, &["--", "true"]),
    ] {
        let mut pinning = Command::new(BINARY)
            .args(["pin", "--patience", "30000"])
            .arg(&path)
            .args(command)
            .env("MAPDIRECT_SOCKET", guard.socket())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(700));
        assert!(pinning.try_wait().unwrap().is_none(), "it waits");
        let started = Instant::now();
        kill(pinning.id().cast_signed(), signal).unwrap();
        assert_eq!(pinning.wait().unwrap().code(), Some(128 + signal));
        assert!(started.elapsed() < Duration::from_secs(5));
    }
    writer.kill().unwrap();
    writer.wait().unwrap();
    // What it had asked for is forgotten, and others wait for it no longer.
    let started = Instant::now();
    wait_until_free(&path);
    assert!(started.elapsed() < Duration::from_secs(5));
    let file = open(&path);
    drop(pin(&guard.client(), &file, 0..65536));
    drop(file);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// A page that somebody keeps in a pipe holds up whoever prepares the file, on
/// DAX, and not for longer than he has patience.
fn busy_page(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "service-busy", 65536);
    let file = open(&path);
    file.set_len(131_072).unwrap();
    file.sync_all().unwrap();
    let reader = File::open(&path).unwrap();
    let view = View::new(reader.as_fd(), 0..4096).unwrap();
    view.populate(0).unwrap();
    let page = Held::new(&view, &[0]).unwrap();
    let mut longest = Duration::ZERO;
    let started = Instant::now();
    let prepared = PrepareOptions::new()
        .patience(Duration::from_secs(2))
        .prepare_with(&file, |progress| longest = longest.max(progress.waiting));
    let took = started.elapsed();
    assert!(took < Duration::from_secs(40), "{took:?}");
    if longest.is_zero() {
        // Not every change waits for every page.
        prepared.unwrap();
        world.count("preparations that a page in a pipe did not hold up", 1);
    } else {
        let refused = prepared.unwrap_err();
        assert_eq!(refused.errno(), Errno::TXTBSY.raw_os_error());
        assert_eq!(refused.kind(), Reason::StillChanging);
        assert!(refused.obstacle().contains("pipe"), "{refused:#}");
        world.count("preparations that a page in a pipe held up", 1);
    }
    drop((page, view, reader));
    let prepared = PrepareOptions::new().prepare(&file).unwrap();
    assert!(prepared.block_map().is_stable());
    drop(file);
    std::fs::remove_file(&path).unwrap();
}

/// Users of the crowd.
const USERS: std::ops::Range<u32> = 60_001..60_041;

/// Many users together, each with as many connections as it gets, keep root
/// from nothing; and whoever finds no place is told why.
fn many_users(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(Kind::EXT4), "service-many-users", 65536);
    let socket = guard.socket().to_string_lossy().into_owned();
    let mut crowd = Helper::start("crowd", &[&socket]).unwrap();
    let said = crowd.hear().unwrap();
    let served: usize = said.strip_prefix("served ").unwrap().parse().unwrap();
    assert!(served >= 16, "{said}: the crowd must be one");
    // What a program of a user without a place is told.
    assert_eq!(
        crowd.hear().unwrap(),
        format!("{:?} {}", Reason::Limit, Errno::AGAIN.raw_os_error())
    );
    let started = Instant::now();
    let file = open(&path);
    let held = map(&guard.client(), &file, 0..65536);
    assert!(is_pinned(&path));
    let status = guard.client().status().unwrap();
    assert!(status.clients as usize > served, "{}", status.clients);
    // Programs of root each have a connection of their own.
    for _ in 0..20 {
        let command = std::process::Command::new(BINARY)
            .arg("status")
            .env("MAPDIRECT_SOCKET", guard.socket())
            .output()
            .unwrap();
        assert!(command.status.success(), "{command:?}");
    }
    let took = started.elapsed();
    assert!(took < Duration::from_secs(10), "root waited for {took:?}");
    // While there is a crowd, a stranger that asks for nothing has to go.
    wait_for(Duration::from_secs(30), || {
        let clients = guard.client().status()?.clients as usize;
        Ok((clients <= served / 2 + 2).then_some(()))
    })
    .unwrap();
    crowd.tell("end").unwrap();
    assert_eq!(crowd.status().unwrap(), 0);
    drop((held, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
    world.count("connections of a crowd", served as u64);
}

/// Role: user after user takes every place it gets.
pub fn play_crowd(arguments: &[String]) -> Result<()> {
    let [path] = arguments else {
        bail!("wrong arguments");
    };
    let path = Path::new(path);
    std::process::Command::new("chmod")
        .arg("755")
        .arg(path.parent().context("no directory")?)
        .status()?;
    let mut held = Vec::new();
    let mut last = 0;
    for uid in USERS {
        become_user(uid)?;
        last = uid;
        while let Some(socket) = greeted(path)? {
            held.push(socket);
        }
        become_user(0)?;
    }
    say(&format!("served {}", held.len()));
    become_user(last)?;
    let error = mapdirect::Guard::at(path)
        .status()
        .err()
        .context("it was served")?;
    ensure!(!error.help().is_empty(), "{error:#}");
    say(&format!("{:?} {}", error.kind(), error.errno()));
    listen()?;
    Ok(())
}

/// Has this process be a user without privilege, or root again.
fn become_user(uid: u32) -> Result<()> {
    let root = rustix::process::Uid::ROOT;
    let user = rustix::process::Uid::from_raw(uid);
    rustix::thread::set_thread_res_uid(user, user, root)?;
    Ok(())
}

/// A connection that has been welcomed; `None` if it was refused for want of a
/// place, as it must be then.
fn greeted(path: &Path) -> Result<Option<Socket>> {
    let socket = Socket::connect(path)?;
    socket.set_receive_timeout(Some(Duration::from_secs(20)))?;
    let hello = Request::Hello { version: VERSION }.encode();
    let mut sent = socket.send(&[&hello], &[]);
    if sent == Err(Errno::PIPE) || sent == Err(Errno::CONNRESET) {
        // It was refused before it could say hello.
        sent = Ok(());
    }
    sent?;
    let mut buffer = vec![0; MAX_MESSAGE];
    let received = match socket.receive(&mut buffer) {
        Err(Errno::CONNRESET) => socket.receive(&mut buffer)?,
        received => received?,
    };
    match Reply::decode(&buffer[..received.length])? {
        Reply::Welcome { .. } => Ok(Some(socket)),
        Reply::Refused(refusal) => {
            ensure!(
                refusal.reason == mapdirect_proto::Reason::Limit,
                "{refusal:?}"
            );
            ensure!(!refusal.mend.is_empty(), "{refusal:?}");
            Ok(None)
        }
        other => bail!("{other:?}"),
    }
}

/// Whoever connects and says nothing does not keep its place.
fn silent_clients(_world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let silent: Vec<Socket> = (0..8)
        .map(|_| Socket::connect(guard.socket()).unwrap())
        .collect();
    let greeted = greeted(guard.socket()).unwrap().unwrap();
    for socket in &silent {
        socket
            .set_receive_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let received = socket.receive(&mut [0; 16]).unwrap();
        assert_eq!(received.length, 0, "the guard hangs up");
    }
    // Nobody waits for the place of one that has begun to talk.
    assert_eq!(greeted.peer_is_gone(), Ok(false));
}
