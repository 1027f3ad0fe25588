//! The process that was started, and the one that keeps the pin.

use super::{pin_command, rest_of, shorten};
use crate::world::{BINARY, World, is_pinned, open, patience, wait_until_free, written};
use libtest_mimic::Trial;
use mapdirect_sys::signal::{self, Signal};
use mapdirect_sys::{Errno, proc};
use mapdirect_testkit::Kind;
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::process::{GuardProcess, wait_for};
use mapdirect_testkit::raw;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(super) fn trials(world: &World) -> Vec<Trial> {
    [
        ("front-killed", front_killed as fn(&World)),
        ("keeper-killed", keeper_killed),
        ("interrupted", interrupted),
        ("signals", signals),
        ("stopped", stopped),
        ("on-loss", on_loss),
        ("options", options),
    ]
    .into_iter()
    .map(|(name, run)| world.trial(format!("family::{name}"), run))
    .collect()
}

/// The processes whose parent is `pid`.
fn children(pid: i32) -> Vec<i32> {
    let text = proc::read_task_file(pid, &format!("task/{pid}/children")).unwrap_or_default();
    let numbers = text.split_ascii_whitespace();
    numbers.filter_map(|number| number.parse().ok()).collect()
}

fn child_of(pid: i32) -> i32 {
    wait_for(patience(), || Ok(children(pid).first().copied())).unwrap()
}

/// A character: R, S, T, Z.
fn state(pid: i32) -> char {
    let stat = proc::read_task_file(pid, "stat").unwrap_or_default();
    let behind = stat.rsplit_once(") ").map_or("X", |(_, behind)| behind);
    behind.chars().next().unwrap()
}

fn start(mut command: Command) -> Child {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits until COMMAND runs, and returns the keeper's and its number.
fn running(front: &Child) -> (i32, i32) {
    let keeper = child_of(front.id().cast_signed());
    let command = child_of(keeper);
    let runs = || Ok((proc::command(command) != "mapdirect").then_some(()));
    wait_for(patience(), runs).unwrap();
    (keeper, command)
}

/// The pin stays as long as COMMAND lives.
fn front_killed(world: &World) {
    let path = written(&world.disk(Kind::XFS), "family-front-killed", 65536);
    let mut front = start(pin_command(world, &path, &[], &["sleep", "60"]));
    let (_, command) = running(&front);
    front.kill().unwrap();
    front.wait().unwrap();
    for _ in 0..10 {
        assert_eq!(shorten(&path), Err(Errno::TXTBSY));
        assert!(matches!(state(command), 'S' | 'R' | 'D'));
        std::thread::sleep(Duration::from_millis(20));
    }
    signal::kill(command, Signal::KILL).unwrap();
    wait_for(patience(), || Ok((!is_pinned(&path)).then_some(()))).unwrap();
    assert_eq!(shorten(&path), Ok(()));
    std::fs::remove_file(&path).unwrap();
}

/// With the process that holds it the pin goes, and somebody says so.
fn keeper_killed(world: &World) {
    let path = written(&world.disk(Kind::EXT4), "family-keeper-killed", 65536);
    for on_loss in ["warn", "kill"] {
        let options = ["--on-loss", on_loss];
        // What it says ends with those who can say something.
        let sleeps = ["sh", "-c", "exec sleep 60 2> /dev/null"];
        let mut front = start(pin_command(world, &path, &options, &sleeps));
        let (keeper, command) = running(&front);
        let is_asleep = || Ok((proc::command(command) == "sleep").then_some(()));
        wait_for(patience(), is_asleep).unwrap();
        signal::kill(keeper, Signal::KILL).unwrap();
        assert_eq!(front.wait().unwrap().code(), Some(124));
        assert!(rest_of(front.stderr.take().unwrap()).contains("was killed"));
        wait_until_free(&path);
        let lives = matches!(state(command), 'S' | 'R' | 'D') && proc::command(command) == "sleep";
        assert_eq!(lives, on_loss == "warn");
        if lives {
            signal::kill(command, Signal::KILL).unwrap();
        }
    }
    std::fs::remove_file(&path).unwrap();
}

/// A signal ends the waiting for others, and COMMAND is not run.
fn interrupted(world: &World) {
    let path = written(&world.disk(Kind::XFS), "family-interrupted", 65536);
    let marker = path.with_file_name("family-interrupted.ran");
    // Somebody has it open for writing, and stores to a hole.
    let file = open(&path);
    raw::fallocate(file.as_fd(), 3, 4096, 4096).unwrap();
    let protection = mapdirect_sys::mmap::PROT_READ | mapdirect_sys::mmap::PROT_WRITE;
    let shared = mapdirect_sys::mmap::MAP_SHARED;
    let mapped = raw::PlainMap::new(file.as_fd(), protection, shared, 0, 65536).unwrap();
    for number in [Signal::INTERRUPT, Signal::TERMINATE, Signal::HANGUP] {
        let touch = ["touch", marker.to_str().unwrap()];
        let mut pin = pin_command(world, &path, &["--patience", "60000"], &touch);
        pin.args(["x"]);
        let mut front = start(pin);
        child_of(front.id().cast_signed());
        std::thread::sleep(Duration::from_millis(300));
        let begun = Instant::now();
        signal::kill(front.id().cast_signed(), number).unwrap();
        let code = front.wait().unwrap().code();
        let said = rest_of(front.stderr.take().unwrap());
        assert_eq!(code, Some(128 + number), "{said}");
        assert!(begun.elapsed() < patience() / 2, "{:?}", begun.elapsed());
    }
    drop((mapped, file));
    assert!(!marker.exists());
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// A signal for the process that was started reaches COMMAND; its status is
/// COMMAND's.
fn signals(world: &World) {
    let path = written(&world.disk(Kind::XFS), "family-signals", 65536);
    for (name, number) in [
        ("TERM", Signal::TERMINATE),
        ("INT", Signal::INTERRUPT),
        ("HUP", Signal::HANGUP),
        ("USR1", Signal::USER_1),
        ("QUIT", Signal::QUIT),
    ] {
        let script = format!("trap 'exit {number}' {name}; echo; while :; do sleep 0.05; done");
        let mut front = start(pin_command(world, &path, &[], &["sh", "-c", &script]));
        // It says a line when it can be interrupted.
        front.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        signal::kill(front.id().cast_signed(), number).unwrap();
        assert_eq!(front.wait().unwrap().code(), Some(number), "{name}");
    }
    // What it does not handle kills it, and the status says so.
    let mut front = start(pin_command(world, &path, &[], &["sleep", "60"]));
    running(&front);
    signal::kill(front.id().cast_signed(), Signal::TERMINATE).unwrap();
    assert_eq!(front.wait().unwrap().code(), Some(128 + Signal::TERMINATE));
    // COMMAND has nothing blocked.
    let script = "grep SigBlk /proc/self/status";
    let mut front = start(pin_command(world, &path, &[], &["sh", "-c", script]));
    assert_eq!(front.wait().unwrap().code(), Some(0));
    assert!(rest_of(front.stdout.take().unwrap()).ends_with("\t0000000000000000\n"));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// The process that was started stops when COMMAND does, and goes on with it.
fn stopped(world: &World) {
    let path = written(&world.disk(Kind::XFS), "family-stopped", 65536);
    let script = "kill -STOP $$; exit 6";
    let mut front = start(pin_command(world, &path, &[], &["sh", "-c", script]));
    let (_, command) = running(&front);
    let own = front.id().cast_signed();
    wait_for(patience(), || {
        Ok((state(own) == 'T' && state(command) == 'T').then_some(()))
    })
    .unwrap();
    assert_eq!(shorten(&path), Err(Errno::TXTBSY));
    signal::kill(own, Signal::CONTINUE).unwrap();
    assert_eq!(front.wait().unwrap().code(), Some(6));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// What becomes of COMMAND when its pin is lost.
fn on_loss(world: &World) {
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let disk = world.disk(Kind::XFS);
    let cases = [("warn", 124), ("ignore", 6), ("kill", 124)];
    let mut fronts = Vec::new();
    for (how, status) in cases {
        let path = written(&disk, &format!("family-on-loss-{how}"), 65536);
        // One ends when it is asked to; an orphan in a session of its own does
        // not.
        let script = r#"
            (setsid sh -c 'trap "" TERM; echo $$ > "$F.orphan"; sleep 3600 & wait; sleep 3600' \
                < /dev/null > /dev/null 2>&1 &)
            until test -s "$F.orphan"; do sleep 0.05; done
            touch "$F.ready"
            until test -e "$F.end"; do sleep 0.05; done
            exit 6
        "#;
        let command = ["sh", "-c", script];
        let mut command = pin_command(world, &path, &["--on-loss", how], &command);
        command.env("MAPDIRECT_SOCKET", guard.socket());
        fronts.push((path, how, status, start(command)));
    }
    let beside = |path: &Path, what: &str| {
        let name = path.file_name().unwrap().to_str().unwrap();
        path.with_file_name(format!("{name}.{what}"))
    };
    for (path, ..) in &fronts {
        super::appears(&beside(path, "ready"));
    }
    guard.kill().unwrap();
    if Gate::under_test() == Gate::Bpf {
        guard.unload().unwrap();
    }
    for (path, how, status, mut front) in fronts {
        if how != "kill" {
            std::thread::sleep(Duration::from_millis(300));
            std::fs::write(beside(&path, "end"), "").unwrap();
        }
        assert_eq!(front.wait().unwrap().code(), Some(status), "{how}");
        let errors = rest_of(front.stderr.take().unwrap());
        assert_eq!(
            errors.contains("is not kept any more"),
            how != "ignore",
            "{errors}"
        );
        let orphan = std::fs::read_to_string(beside(&path, "orphan")).unwrap();
        let orphan: i32 = orphan.trim().parse().unwrap();
        let lives = matches!(state(orphan), 'S' | 'R' | 'D') && proc::command(orphan) == "sh";
        assert_eq!(lives, how != "kill", "{how}");
        if lives {
            signal::kill(-orphan, Signal::KILL).unwrap();
        }
        for what in ["ready", "end", "orphan"] {
            let _ = std::fs::remove_file(beside(&path, what));
        }
        std::fs::remove_file(&path).unwrap();
    }
}

/// Options that concern COMMAND.
fn options(world: &World) {
    let path = written(&world.disk(Kind::XFS), "family-options", 65536);
    let run = |options: &[&str]| {
        let mut command = pin_command(world, &path, options, &["echo", "ran"]);
        let output = command.output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), output.stdout, errors)
    };
    let ran = (Some(0), b"ran\n".to_vec(), String::new());
    assert_eq!(run(&["--require-stable"]), ran);
    let file = open(&path);
    raw::fallocate(file.as_fd(), 3, 8192, 4096).unwrap();
    drop(file);
    assert_eq!(run(&[]), ran);
    let (status, output, errors) = run(&["--require-stable"]);
    assert_eq!((status, output), (Some(125), Vec::new()));
    assert!(errors.contains("bytes 8192 to 12288"), "{errors}");
    assert!(errors.contains("not stable but hole"), "{errors}");
    assert_eq!(run(&["--prepare", "--require-stable"]), ran);
    assert_eq!(run(&["--require-stable"]), ran);
    let (status, _, errors) = run(&["--json"]);
    assert_eq!(status, Some(2), "{errors}");
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}
