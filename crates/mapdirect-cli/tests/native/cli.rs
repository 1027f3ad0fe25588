//! The `mapdirect` command as a person or a script uses it.

use crate::world::{BINARY, World, is_pinned, map, open, wait_until_free, written};
use libtest_mimic::Trial;
use mapdirect_sys::fcntl::HeldLease;
use mapdirect_sys::signal::{self, Signal};
use mapdirect_testkit::Kind;
use mapdirect_testkit::contract::Gate as UnderTest;
use mapdirect_testkit::process::{GuardProcess, Helper, wait_for};
use serde_json::Value;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, run) in [
        ("command-line", command_line as fn(&World)),
        ("pin-json", pin_json),
        ("pin-until-interrupted", pin_until_interrupted),
        ("guard-killed", guard_killed),
        ("status-json", status_json),
        ("show-json", show_json),
        ("doctor-json", doctor_json),
        ("nobody-listens", nobody_listens),
        ("leased", leased),
    ] {
        trials.push(world.trial(format!("cli::{name}"), run));
    }
    trials
}

fn mapdirect(socket: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.env("COLUMNS", "1000");
    command.args(arguments).env("MAPDIRECT_SOCKET", socket);
    command
}

fn parsed(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Somebody who has a lease is given the time to give it up, as an NFS client
/// needs.
fn leased(world: &World) {
    let path = written(&world.disk(Kind::EXT4), "cli-leased", 65536);
    let file = open(&path);
    let lease = HeldLease::take(file.as_fd()).unwrap().unwrap();
    let name = path.to_str().unwrap();
    let mut show = mapdirect(Path::new("/nowhere"), &["show", name, "--json"]);
    let show = show.stdout(Stdio::piped()).stderr(Stdio::piped());
    let show = show.spawn().unwrap();
    wait_for(Duration::from_secs(20), || {
        Ok((!lease.is_undisturbed()).then_some(()))
    })
    .unwrap();
    drop(lease);
    let shown = parsed(&show.wait_with_output().unwrap());
    assert_eq!(shown["file_size"], 65536);
    drop(file);
    std::fs::remove_file(&path).unwrap();
}

/// The extents printed are those of the file, and hold for as long as the
/// command runs.
fn pin_json(world: &World) {
    let guard = world.guard();
    let path = written(&world.disk(Kind::XFS), "cli-pin-json", 3 << 20);
    let name = path.to_str().unwrap();
    let arguments = ["pin", name, "--range", "1M:1M", "--json"];
    let mut pin = Helper::spawn(mapdirect(guard.socket(), &arguments)).unwrap();
    let line = pin.hear().unwrap();
    let value: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(value["file"], name);
    assert_eq!(value["pid"], pin.pid());
    assert_eq!(value["range"]["offset"], 1 << 20);
    assert_eq!(value["range"]["length"], 1 << 20);
    assert_eq!(value["stable"], true);
    let expected = mapdirect::block_map(open_read(&path), 1 << 20..2 << 20).unwrap();
    let extents = value["extents"].as_array().unwrap();
    assert_eq!(extents.len(), expected.extents().len());
    for (shown, extent) in extents.iter().zip(expected.extents()) {
        assert_eq!(shown["file_offset"], extent.offset);
        assert_eq!(shown["physical_offset"], extent.physical.unwrap());
        assert_eq!(shown["length"], extent.length);
        assert_eq!(shown["state"], "written");
    }
    assert!(is_pinned(&path));
    signal::kill(pin.pid(), Signal::TERMINATE).unwrap();
    assert_eq!(pin.finish().unwrap(), Some(0));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

fn open_read(path: &Path) -> std::fs::File {
    std::fs::File::open(path).unwrap()
}

fn pin_until_interrupted(world: &World) {
    let guard = world.guard();
    let path = written(&world.disk(Kind::EXT4), "cli-pin", 65536);
    let arguments = ["pin", path.to_str().unwrap(), "--scope", "file"];
    let mut pin = Helper::spawn(mapdirect(guard.socket(), &arguments)).unwrap();
    while pin.hear().unwrap() != "held until SIGINT or SIGTERM" {}
    assert!(is_pinned(&path));
    signal::kill(pin.pid(), Signal::INTERRUPT).unwrap();
    assert_eq!(pin.finish().unwrap(), Some(0));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// A pin that is kept no longer says so. One that the kernel keeps stays.
fn guard_killed(world: &World) {
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(Kind::XFS), "cli-guard-killed", 65536);
    let mut command = mapdirect(guard.socket(), &["pin", path.to_str().unwrap()]);
    command.stderr(Stdio::null());
    let mut pin = Helper::spawn(command).unwrap();
    while pin.hear().unwrap() != "held until SIGINT or SIGTERM" {}
    guard.kill().unwrap();
    let status = mapdirect(guard.socket(), &["status"]).output().unwrap();
    assert_eq!(status.status.code(), Some(3));
    if UnderTest::under_test() == UnderTest::Bpf {
        std::thread::sleep(Duration::from_secs(1));
        assert!(is_pinned(&path));
        guard.unload().unwrap();
    }
    assert_eq!(pin.finish().unwrap(), Some(4));
    // Nobody refuses any more, and nobody hangs.
    assert!(!is_pinned(&path));
    std::fs::remove_file(&path).unwrap();
}

fn status_json(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(Kind::XFS), "cli-status-json", 65536);
    let name = path.to_str().unwrap();
    let file = open(&path);
    let held = map(&guard.client(), &file, 0..8192);
    let refused = Command::new("truncate")
        .args(["-s", "0", name])
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(!refused.success());
    let status = || {
        let output = mapdirect(guard.socket(), &["status", "--json"]);
        parsed(&{ output }.output().unwrap())
    };
    // What was refused is written down by another thread.
    let value = wait_for(Duration::from_secs(2), || {
        let value = status();
        Ok((value["recent"]
            .as_array()
            .is_some_and(|recent| !recent.is_empty()))
        .then_some(value))
    })
    .unwrap();
    assert_eq!(value["gate"], UnderTest::under_test().name());
    assert_eq!(value["pins"], 1);
    let operation = match UnderTest::under_test() {
        UnderTest::Fanotify => "open-write",
        UnderTest::Bpf => "truncate",
    };
    assert_eq!(value["refused"][operation], 1);
    let shown = &value["files"][0];
    assert_eq!(shown["file"], name);
    assert_eq!(shown["pins"][0]["offset"], 0);
    assert_eq!(shown["pins"][0]["length"], 8192);
    assert_eq!(shown["pins"][0]["mapped"], true);
    let holder = &shown["holders"][0];
    assert_eq!(holder["pid"], std::process::id());
    assert_eq!(holder["mapped"], 8192);
    let recent = &value["recent"][0];
    assert_eq!(recent["operation"], operation);
    assert_eq!(recent["command"], "truncate");
    assert_eq!(recent["file"], name);
    drop((held, file));
    wait_until_free(&path);
    wait_for(Duration::from_secs(2), || {
        Ok((status()["pins"] == 0).then_some(()))
    })
    .unwrap();
    std::fs::remove_file(&path).unwrap();
}

fn show_json(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::EXT4);
    let path = written(&disk, "cli-show-json", 65536);
    open(&path).set_len(1 << 20).unwrap();
    let name = path.to_str().unwrap();
    let pin = crate::world::pin(&guard.client(), &open_read(&path), 4096..8192);
    let output = mapdirect(guard.socket(), &["show", name, "--json"]).output();
    let value = parsed(&output.unwrap());
    assert_eq!(value["file_size"], 1 << 20);
    assert_eq!(value["totals"]["written"], 65536);
    assert_eq!(value["totals"]["hole"], (1 << 20) - 65536);
    assert_eq!(value["pinned"][0]["offset"], 4096);
    assert_eq!(value["pinned"][0]["length"], 4096);
    assert_eq!(value["mappable"]["direct"], false);
    assert_eq!(value["mappable"]["cached"], true);
    assert_eq!(value["stable"], 65536);
    assert_eq!(value["frozen"], (1 << 20) - 65536);
    let reasons = value["mappable"]["reasons"].to_string();
    assert!(reasons.contains("no-dax"), "{reasons}");
    drop(pin);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

fn doctor_json(world: &World) {
    let guard = world.guard();
    let output = mapdirect(guard.socket(), &["doctor", "--json"]).output();
    let value = parsed(&output.unwrap());
    assert_eq!(value["gate"], UnderTest::under_test().name());
    let findings = value["findings"].as_array().unwrap();
    for name in ["kernel", "fanotify gate", "to pin", "guard", "dax"] {
        assert!(
            findings.iter().any(|finding| finding["name"] == name),
            "{name} is missing: {findings:?}"
        );
    }
    for finding in findings {
        assert!(
            finding["outcome"] == "good" || finding["mend"] != "",
            "no mend: {finding}"
        );
    }
}

/// A reader that leaves is no reason to fail, or to let go of a pin.
fn nobody_listens(world: &World) {
    let guard = world.guard();
    let path = written(&world.disk(Kind::XFS), "cli-nobody-listens", 65536);
    let name = path.to_str().unwrap();
    let mut pin = mapdirect(guard.socket(), &["pin", name, "--patience", "5000"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(pin.stdout.take());
    // Granted: whoever is interrupted before that has held nothing.
    let pid = pin.id().cast_signed();
    wait_for(Duration::from_secs(5), || {
        let files = guard.client().status()?.files;
        let held = files.iter().flat_map(|file| &file.pins);
        Ok(held.clone().any(|pin| pin.pid == pid).then_some(()))
    })
    .unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(is_pinned(&path));
    signal::kill(pin.id().cast_signed(), Signal::INTERRUPT).unwrap();
    assert_eq!(pin.wait().unwrap().code(), Some(0));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// Wrong input gets one clear line and a documented status.
fn command_line(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "cli-command-line", 65536);
    let file = path.to_string_lossy().into_owned();
    let run = |arguments: &[&str], socket: &Path| {
        Command::new(BINARY)
            .env("COLUMNS", "1000")
            .args(arguments)
            .env("MAPDIRECT_SOCKET", socket)
            .output()
            .unwrap()
    };
    for arguments in [
        &["pin", &file, "--range", "nonsense"][..],
        &["pin", &file, "--range", "0:0"],
        &["pin", &file, "--range", "4X:1"],
        &["pin", &file, "--range", "9999999999G:1"],
        &["pin", &file, "--scope", "galaxy"],
        &["pin"],
        &["frobnicate"],
        &["guard", "--gate", "none"],
        &[],
        &["status", "--no-such-option"],
    ] {
        let output = run(arguments, guard.socket());
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{arguments:?}: {text}");
        assert!(text.starts_with("mapdirect: "), "{text}");
    }
    let nowhere = Path::new("/nonexistent/guard.sock");
    for arguments in [&["status"][..], &["pin", &file]] {
        let output = run(arguments, nowhere);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(3), "{text}");
        assert!(text.contains("mapdirect guard"), "how to start one: {text}");
    }
    // `show` needs no guard, and says what is missing.
    let output = run(&["show", &file], nowhere);
    assert!(output.status.success());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("no guard answers"), "{text}");
    let pin = |command: &[&str]| {
        let arguments = [&["pin", &file, "--range", "0:4K", "--"], command].concat();
        run(&arguments, guard.socket()).status.code()
    };
    assert_eq!(pin(&["true"]), Some(0));
    assert_eq!(pin(&["sh", "-c", "exit 7"]), Some(7));
    assert_eq!(pin(&["sh", "-c", "kill -9 $$"]), Some(128 + 9));
    assert_eq!(pin(&["/nonexistent/command"]), Some(127));
    assert_eq!(pin(&["/dev/null"]), Some(126));
    let attack = format!("truncate -s 0 {file}; test $? -ne 0");
    assert_eq!(pin(&["sh", "-c", &attack]), Some(0));
    let missing = run(&["pin", "/nonexistent", "--", "true"], guard.socket());
    assert_eq!(missing.status.code(), Some(125));
    for strange in ["/dev/null", "/", "/proc/self/maps"] {
        let output = run(&["show", strange], guard.socket());
        assert!(output.status.code() <= Some(1), "{output:?}");
        let output = run(&["pin", strange], guard.socket());
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{strange}: {text}");
    }
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}
