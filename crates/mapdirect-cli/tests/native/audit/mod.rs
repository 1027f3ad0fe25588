//! Who was refused, by what, and what the file is called now: records in all the
//! forms in which they are told.

mod breach;
mod follow;
mod journal;
mod metrics;
mod names;
mod operations;
mod top;

use crate::extents::schemas::validate;
use crate::world::{BINARY, World, open, pin, wait_until_free, written};
use libtest_mimic::Trial;
use mapdirect_sys::Errno;
use mapdirect_testkit::Kind;
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::process::{GuardProcess, wait_for};
use serde_json::Value;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, run) in [
        ("who", who as fn(&World)),
        ("another-program", another_program),
        ("unseen-opens", unseen_opens),
        ("others-see-nothing", others_see_nothing),
        ("names", names::names),
        ("live", follow::live),
        ("filters", follow::filters),
        ("slow-reader", follow::slow_reader),
        ("without-a-guard", follow::without_a_guard),
        ("reader-that-leaves", follow::reader_that_leaves),
        ("metrics", metrics::metrics),
        ("journal", journal::journal),
        ("top", top::top),
        ("forged", top::forged),
        ("terminal", top::terminal),
    ] {
        trials.push(world.trial(format!("audit::{name}"), run));
    }
    match Gate::under_test() {
        // The other gate refuses what makes one here.
        Gate::Fanotify => trials.push(world.trial("audit::breach", breach::breach)),
        // The other gate sees none of them.
        Gate::Bpf => trials.push(world.trial("audit::operations", operations::operations)),
    }
    trials
}

/// The nobody of every system.
const NOBODY: u32 = 65534;

fn mapdirect(guard: &GuardProcess, arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command
        .args(arguments)
        .env("MAPDIRECT_SOCKET", guard.socket())
        .env_remove("NO_COLOR");
    command
}

fn said(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What `log --json` has, with more arguments.
fn log(guard: &GuardProcess, arguments: &[&str]) -> Vec<Value> {
    let arguments = [&["log", "--json"], arguments].concat();
    let text = said(&mapdirect(guard, &arguments).output().unwrap());
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Waits for records that `wanted` likes.
fn wait_for_records(
    guard: &GuardProcess,
    count: usize,
    wanted: impl Fn(&Value) -> bool,
) -> Vec<Value> {
    wait_for(Duration::from_secs(20), || {
        let mut records = log(guard, &[]);
        records.retain(&wanted);
        Ok((records.len() >= count).then_some(records))
    })
    .unwrap()
}

/// A program that is refused to truncate a file, and stays for a while so that
/// it can be looked up. It ends when the returned value is dropped.
struct Refused(std::process::Child);

impl Refused {
    /// By user `uid`.
    fn by(uid: u32, path: &Path) -> Self {
        // With something after the sleep: the last program would take its place.
        Self::by_script(
            uid,
            path,
            "if : > \"$1\"; then echo went-through; fi; sleep 600; :",
        )
    }

    fn by_script(uid: u32, path: &Path, script: &str) -> Self {
        let child = Command::new("/bin/bash")
            .args(["-c", script, "bash"])
            .arg(path)
            .uid(uid)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap();
        Self(child)
    }

    fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }
}

impl Drop for Refused {
    fn drop(&mut self) {
        // The group of its own, with the program that it waits for.
        if let Some(group) = rustix::process::Pid::from_raw(self.pid()) {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let _ = self.0.wait();
    }
}

/// The number of the only pin of a file.
fn number(guard: &GuardProcess, path: &Path) -> u64 {
    let file = std::fs::File::open(path).unwrap();
    let pins = guard.client().pinned_ranges(&file).unwrap();
    assert_eq!(pins.len(), 1, "{pins:?}");
    pins[0].pin
}

/// Waits until the guard has forgotten all pins.
fn wait_until_nothing_is_pinned(guard: &GuardProcess) {
    wait_for(Duration::from_secs(20), || {
        let status = guard.client().status()?;
        Ok(status.files.is_empty().then_some(()))
    })
    .unwrap();
}

/// Everybody may write to it.
fn open_to_all(path: &Path) {
    rustix::fs::chmod(path, rustix::fs::Mode::from_raw_mode(0o666)).unwrap();
}

/// A refusal has a time, a process, a user, a program, a control group, an
/// operation, a file and a pin with its holder.
fn who(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let mut documents = Vec::new();
    for kind in [Kind::XFS, Kind::EXT4] {
        let path = written(&world.disk(kind), "audit-who", 65536);
        open_to_all(&path);
        let pinned = pin(&guard.client(), &open(&path), 0..65536);
        let before = std::time::SystemTime::now();
        let refused = Refused::by(NOBODY, &path);
        let pid = refused.pid();
        let records = wait_for_records(&guard, 1, |record| record["pid"] == pid);
        let record = &records[0];
        assert_eq!(records.len(), 1, "{records:?}");
        assert_eq!(record["event"], "refusal");
        assert_eq!(record["tid"], pid, "{record}");
        assert_eq!(record["uid"], NOBODY, "{record}");
        assert_eq!(record["command"], "bash", "{record}");
        let program = std::fs::canonicalize("/bin/bash").unwrap();
        assert_eq!(record["executable"], program.to_str().unwrap(), "{record}");
        let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let cgroup = cgroup.lines().find_map(|line| line.strip_prefix("0::"));
        if let Some(cgroup) = cgroup {
            assert_eq!(record["cgroup"], cgroup, "{record}");
        }
        // bpf lets it open the file, and refuses to truncate it.
        match Gate::under_test() {
            Gate::Fanotify => {
                assert_eq!(record["operation"], "open-truncate", "{record}");
                let call = record["call"].as_str().unwrap();
                assert!(call.contains("O_TRUNC"), "{record}");
            }
            Gate::Bpf => {
                let operation = record["operation"].as_str().unwrap();
                assert!(operation.contains("truncate"), "{record}");
            }
        }
        assert_eq!(record["file"], path.to_str().unwrap());
        assert_eq!(record["name_state"], serde_json::json!(["present"]));
        assert_eq!(record["pin"], number(&guard, &path), "{record}");
        assert_eq!(record["holder"]["pid"], std::process::id());
        assert_eq!(record["holder"]["uid"], 0);
        assert!(record["holder"]["command"].is_string(), "{record}");
        let since = before.duration_since(std::time::UNIX_EPOCH).unwrap();
        let time = u128::from(record["time"].as_u64().unwrap());
        assert!(time.abs_diff(since.as_nanos()) < 60_000_000_000, "{record}");
        documents.push(("log", record.clone()));
        // For people, too: one line, without colours where there is no terminal.
        let text = said(&mapdirect(&guard, &["log"]).output().unwrap());
        let line = text.lines().last().unwrap();
        assert!(line.contains("by bash (pid"), "{line}");
        assert!(!line.contains('\x1b'), "{line}");
        drop((pinned, refused));
        wait_until_free(&path);
        std::fs::remove_file(&path).unwrap();
    }
    validate(world, &documents);
}

/// A process that executes another program is still the same, and what it runs
/// now was refused nothing. Its command cannot write into the line about it.
fn another_program(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(Kind::XFS), "audit-another,by\nx", 65536);
    let pinned = pin(&guard.client(), &open(&path), 0..65536);
    let bash = std::fs::canonicalize("/bin/bash").unwrap();
    for _ in 0..10 {
        let script = "printf '\\e[31m);x' > /proc/$$/comm; : > \"$1\"; exec sleep 600";
        let refused = Refused::by_script(0, &path, script);
        let pid = refused.pid();
        let record = wait_for_records(&guard, 1, |record| record["pid"] == pid).remove(0);
        let executable = &record["executable"];
        let is_bash = executable == bash.to_str().unwrap();
        assert!(executable.is_null() || is_bash, "{record}");
        assert_eq!(record["command"], "\u{fffd}[31m);x", "{record}");
        drop(refused);
    }
    for verb in ["log", "status"] {
        let text = said(&mapdirect(&guard, &[verb]).output().unwrap());
        assert!(
            !text.contains(|c: char| c.is_control() && c != '\n'),
            "{text:?}"
        );
        assert!(text.contains("audit-another,by\\nx'"), "{text}");
        assert!(text.contains("[31m);x'"), "{text}");
    }
    drop(pinned);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// An open of which nobody can see what it is for is not said to be one that
/// truncates.
fn unseen_opens(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(Kind::XFS), "audit-unseen", 65536);
    let pinned = pin(&guard.client(), &open(&path), 0..65536);
    let opened = rustix::fs::openat2(
        rustix::fs::CWD,
        &path,
        rustix::fs::OFlags::RDONLY,
        rustix::fs::Mode::empty(),
        rustix::fs::ResolveFlags::empty(),
    );
    match Gate::under_test() {
        Gate::Bpf => assert!(opened.is_ok(), "it only reads"),
        Gate::Fanotify => {
            assert_eq!(opened.unwrap_err(), Errno::TXTBSY);
            let record = wait_for_records(&guard, 1, |_| true).remove(0);
            assert_eq!(record["operation"], "open-unseen", "{record}");
            assert_eq!(record["call"], "openat2()", "{record}");
            let status = said(&mapdirect(&guard, &["status"]).output().unwrap());
            assert!(status.contains("open-unseen by thread"), "{status}");
        }
    }
    drop(pinned);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// Whoever has pinned nothing learns nothing of others' files.
fn others_see_nothing(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(Kind::EXT4), "audit-others", 65536);
    open_to_all(&path);
    let pinned = pin(&guard.client(), &open(&path), 0..65536);
    let refused = Refused::by(NOBODY, &path);
    let pid = refused.pid();
    wait_for_records(&guard, 1, |record| record["pid"] == pid);
    let output = mapdirect(&guard, &["log", "--json"])
        .uid(NOBODY)
        .output()
        .unwrap();
    assert_eq!(said(&output), "");
    drop((pinned, refused));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}
