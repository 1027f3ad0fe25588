//! Hammers on the gate in the kernel: tricks of processes without privilege,
//! tens of thousands of times each, and not one may pass.
//!
//! `MAPDIRECT_HAMMER_TRIES` says how many tries a hammer makes (all its tricks
//! together), `MAPDIRECT_HAMMER_ONLY` which tricks, by a part of their names.

use crate::world::{BINARY, World, kinds, patience};
use libtest_mimic::Trial;
use mapdirect::{BlockMap, Guard, Pin, PinOptions};
use mapdirect_sys::Errno;
use mapdirect_testkit::Kind;
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::hammer::{self, Counts, Files, Success, TRICKS, Trick};
use mapdirect_testkit::process::{BpfDirectory, Helper, ScratchDirectory};
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Tries of one hammer, when nobody says how many.
const TRIES: u64 = 6000;
/// How many rounds more a trick gets of which nothing was refused.
const MORE_ROUNDS: u32 = 20;

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    if Gate::under_test() != Gate::Bpf {
        return trials;
    }
    trials.push(world.trial("gate::without-lsm", without_lsm));
    for kind in kinds(&[Kind::XFS, Kind::EXT4]) {
        for processors in [1, 2] {
            let name = format!("hammer::{kind}::on-{processors}");
            trials.push(world.trial(name, move |world| run(world, kind, processors)));
        }
    }
    trials
}

fn tries() -> u64 {
    std::env::var(hammer::TRIES_VARIABLE)
        .ok()
        .and_then(|tries| tries.parse().ok())
        .unwrap_or(TRIES)
}

fn seed() -> u64 {
    std::env::var("MAPDIRECT_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(1)
}

/// A file that is hammered, and what is promised of it.
struct Target {
    name: String,
    file: File,
    range: u64,
    before: BlockMap,
    length: u64,
    _pin: Pin,
}

impl Target {
    fn new(guard: &Guard, path: &Path, range: u64) -> Self {
        let file = File::open(path).unwrap();
        let pin = PinOptions::new()
            .range(0..range)
            .patience(patience())
            .guard(guard.clone())
            .pin(&file)
            .unwrap();
        Self {
            name: path.file_name().unwrap().to_string_lossy().into_owned(),
            range,
            before: pin.block_map().clone(),
            length: file.metadata().unwrap().len(),
            file,
            _pin: pin,
        }
    }

    /// What is no longer as it was; taken note of, so that it is told once.
    fn changed(&mut self) -> Option<String> {
        self.file.sync_all().unwrap();
        let now = mapdirect::block_map(&self.file, 0..self.range).unwrap();
        let length = self.file.metadata().unwrap().len();
        let mut what = Vec::new();
        if now.extents() != self.before.extents() {
            let (before, now) = (self.before.extents().len(), now.extents().len());
            what.push(format!("its block map ({before} extents, now {now})"));
        }
        if length != self.length {
            what.push(format!("its size ({}, now {length})", self.length));
        }
        self.before = now;
        self.length = length;
        (!what.is_empty()).then(|| format!("{} changed: {}", self.name, what.join(", ")))
    }
}

fn tricks(kind: Kind) -> Vec<&'static Trick> {
    let only = std::env::var("MAPDIRECT_HAMMER_ONLY").unwrap_or_default();
    let wanted = |trick: &&Trick| trick.place.includes(kind) && trick.name.contains(&only);
    TRICKS.iter().filter(wanted).collect()
}

fn run(world: &World, kind: Kind, processors: u32) {
    let disk = world.disk(kind);
    let guard = world.guard();
    let directory = disk.path(&format!("hammer-{processors}"));
    let files = Files::make(&directory, kind).unwrap();
    let mut targets = files
        .pinned()
        .map(|(path, range)| Target::new(&guard.client(), &path, range));
    let arguments = [
        directory.to_string_lossy().into_owned(),
        kind.reflink().to_string(),
        processors.to_string(),
        seed().to_string(),
    ];
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut helper = Helper::start("hammer", &arguments).unwrap();
    let tricks = tricks(kind);
    let weights: u64 = tricks.iter().map(|trick| trick.weight).sum();
    let each = tries().div_ceil(weights);
    let mut all = Counts::default();
    let mut wrong = Vec::new();
    for trick in tricks {
        let started = Instant::now();
        helper
            .tell(&format!("{} {}", trick.name, each * trick.weight))
            .unwrap();
        let mut counts = hammer::parse_counts(&helper.hear().unwrap()).unwrap();
        // Whether two threads meet is up to the scheduler. A trick of which
        // nothing was refused has shown nothing yet, so it goes on for a while.
        for _ in 0..MORE_ROUNDS {
            if trick.success != Success::Harmless || counts.refused > 0 || counts.is_unavailable() {
                break;
            }
            helper
                .tell(&format!("{} {}", trick.name, each * trick.weight))
                .unwrap();
            counts = counts.plus(hammer::parse_counts(&helper.hear().unwrap()).unwrap());
        }
        let changed: Vec<String> = targets.iter_mut().filter_map(Target::changed).collect();
        let said = judge(world, trick, counts, &changed);
        println!(
            "hammer::{kind}::on-{processors} {}: {} tries, {} refused, {} passed, {} failed, {:.1} s{}",
            trick.name,
            counts.tries,
            counts.refused,
            counts.passed,
            counts.failed,
            started.elapsed().as_secs_f64(),
            said.as_ref()
                .map(|said| format!(": {said}"))
                .unwrap_or_default(),
        );
        if let Some(said) = said {
            println!("wrong: {} on {kind}: {said}", trick.name);
            wrong.push(format!("{}: {said}", trick.name));
        }
        all.tries += counts.tries;
        all.refused += counts.refused;
    }
    assert_eq!(helper.finish().unwrap(), Some(0));
    drop(targets);
    std::fs::remove_dir_all(&directory).unwrap();
    world.count("hammer tries", all.tries);
    world.count("hammer tries refused", all.refused);
    assert!(
        wrong.is_empty(),
        "{} of the tricks went wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// What is wrong with a trick, if anything is.
fn judge(world: &World, trick: &Trick, counts: Counts, changed: &[String]) -> Option<String> {
    let mut wrong = changed.to_vec();
    if trick.success == Success::Breach && counts.passed > 0 {
        wrong.push(format!("{} of {} passed", counts.passed, counts.tries));
    }
    if counts.is_unavailable() {
        let errno = Errno::from_raw_os_error(i32::try_from(counts.errno).unwrap_or(0));
        world.unavailable(format!("the hammer {}: {errno}", trick.name));
    } else if counts.refused == 0 && trick.success != Success::Allowed {
        wrong.push(String::from("nothing was refused"));
    }
    (!wrong.is_empty()).then(|| wrong.join("; "))
}

/// How this kernel preempts, as in `full` of `none voluntary (full)`.
fn preemption() -> Option<String> {
    let modes = std::fs::read_to_string("/sys/kernel/debug/sched/preempt").ok()?;
    let (_, rest) = modes.split_once('(')?;
    let (mode, _) = rest.split_once(')')?;
    Some(mode.to_owned())
}

/// Without `bpf` in `lsm=` the programs hang where a kernel that preempts
/// programs may leave them out: such a gate is none, and the guard says so.
fn without_lsm(world: &World) {
    let modules = std::fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
    if modules.split(',').any(|module| module.trim() == "bpf") {
        world.unavailable(String::from("a kernel without bpf in lsm="));
        return;
    }
    let remedy = format!("lsm={},bpf", modules.trim());
    let preempts = preemption().is_none_or(|mode| mode == "full" || mode == "lazy");
    let gate = BpfDirectory::new(Path::new(BINARY));
    let scratch = ScratchDirectory::new("without-lsm").unwrap();
    let mut guard = Command::new(BINARY)
        .args(["guard", "--gate", "bpf", "--bpf-directory"])
        .arg(gate.path())
        .arg("--socket")
        .arg(scratch.path().join("guard.sock"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut status = None;
    while status.is_none() && Instant::now() < deadline {
        let there = scratch.path().join("guard.sock").exists();
        if there && !preempts {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
        status = guard.try_wait().unwrap();
    }
    if status.is_none() {
        guard.kill().unwrap();
    }
    let output = guard.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    if preempts {
        assert!(
            status.is_some_and(|status| !status.success()),
            "the guard runs ({status:?}) on a kernel that may leave its gate out"
        );
        let first = "the bpf gate is not supported here: ";
        assert!(said.contains(first), "{said}");
        assert!(said.contains(&remedy), "the remedy is missing: {said}");
    } else {
        assert!(status.is_none(), "it ended with {status:?}: {said}");
    }
    let doctor = Command::new(BINARY).args(["doctor", "--json"]).output();
    let found: serde_json::Value = serde_json::from_slice(&doctor.unwrap().stdout).unwrap();
    let findings = found["findings"].as_array().unwrap();
    let ours = findings
        .iter()
        .find(|finding| finding["name"] == "bpf gate")
        .unwrap();
    if preempts {
        assert!(found["gate"] != "bpf", "{found}");
        let text = ours["text"].as_str().unwrap();
        assert!(text.starts_with("not supported here: "), "{text}");
        let mend = ours["mend"].as_str().unwrap();
        assert!(mend.contains(&remedy), "{mend}");
    } else {
        assert_eq!(found["gate"], "bpf", "{found}");
        assert_eq!(ours["outcome"], "good");
    }
    world.count("kernels without bpf in lsm=", 1);
}
