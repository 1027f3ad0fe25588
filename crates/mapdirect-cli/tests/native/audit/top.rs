//! `top` in a terminal of 80 columns and 24 lines, under tmux.

use super::{mapdirect, open_to_all};
use crate::world::{BINARY, World, open, pin, wait_until_free, written};
use mapdirect_sys::signal::{Signal, kill};
use mapdirect_testkit::Kind;
use mapdirect_testkit::process::{GuardProcess, wait_for};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// A terminal. Its server ends with this.
struct Terminal {
    server: String,
}

impl Terminal {
    /// A terminal of 80 columns and 24 lines with a shell that runs `script`.
    fn new(name: &str, script: &str) -> Self {
        let terminal = Self {
            server: format!("mapdirect-{name}-{}", std::process::id()),
        };
        terminal.tmux(&[
            "-f",
            "/dev/null",
            "new-session",
            "-d",
            "-x",
            "80",
            "-y",
            "24",
            "sh",
            "-c",
            script,
        ]);
        terminal
    }

    fn tmux(&self, arguments: &[&str]) -> String {
        let output = Command::new("tmux")
            .env_remove("TMUX")
            .env("LC_ALL", "C.UTF-8")
            .args(["-u", "-L", &self.server])
            .args(arguments)
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "tmux {arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    fn press(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat());
    }

    /// Waits until the screen has all of these texts.
    fn wait_for(&self, texts: &[&str]) -> String {
        let mut last = String::new();
        wait_for(Duration::from_secs(30), || {
            last = self.screen();
            let all = texts.iter().all(|text| last.contains(text));
            Ok(all.then(|| last.clone()))
        })
        .unwrap_or_else(|error| panic!("{error}: {texts:?} in\n{last}"))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = Command::new("tmux")
            .env_remove("TMUX")
            .args(["-L", &self.server, "kill-server"])
            .stderr(Stdio::null())
            .status();
    }
}

/// Whether there is a terminal to be had; notes it if there is none.
fn has_terminal(world: &World) -> bool {
    let there = Command::new("tmux")
        .arg("-V")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !there {
        world.unavailable(String::from("a terminal for top (tmux)"));
    }
    there
}

/// Something that every pin refuses.
fn refused(path: &Path) {
    let file = std::fs::File::options().write(true).open(path);
    assert!(file.and_then(|file| file.set_len(0)).is_err());
}

/// How `top` is run in these tests: what becomes of the terminal is shown.
fn script(guard: &GuardProcess) -> String {
    format!(
        "MAPDIRECT_SOCKET={} LC_ALL=C.UTF-8 {BINARY} top; echo status $?; \
         stty -a | grep -q ' icanon' && stty -a | grep -q ' echo ' && echo restored; sleep 600",
        guard.socket().display()
    )
}

pub fn top(world: &World) {
    if !has_terminal(world) {
        return;
    }
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "top-one", 1 << 20);
    let odd = written(&disk, "top-\x1b[31mtwo\n", 65536);
    open_to_all(&path);
    let pins = [&path, &odd].map(|path| pin(&guard.client(), &open(path), 0..65536));
    refused(&path);
    let terminal = Terminal::new("top", &script(&guard));
    let screen = terminal.wait_for(&[
        "on 2 files",
        "refusals per second",
        "top-one",
        r"top-\x1b[31mtwo\n",
        "block map of",
        "one character =",
        "last refusals and breaches",
        "q quit",
    ]);
    assert_eq!(screen.lines().count(), 24, "{screen}");
    // What happens while it is there.
    refused(&path);
    let screen = terminal.wait_for(&["top-one, by ", "refused 2"]);
    for line in screen.lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }
    terminal.press(&["?"]);
    terminal.wait_for(&["only names with this in them"]);
    terminal.press(&["x"]);
    terminal.press(&["/"]);
    terminal.press(&["o", "n", "e", "Enter"]);
    let screen = terminal.wait_for(&["[/one]", "top-one"]);
    assert!(!screen.contains("31mtwo"), "{screen}");
    terminal.press(&["s"]);
    terminal.wait_for(&["sort: pins"]);
    terminal.press(&["Enter"]);
    terminal.wait_for(&[
        "pin ",
        "bytes 0 to 65536",
        "held by pid",
        "of this file",
        "━",
    ]);
    terminal.press(&["Enter"]);
    terminal.press(&["Escape"]);
    // The terminal changes its size.
    for (columns, lines) in [("120", "40"), ("30", "6"), ("80", "24")] {
        terminal.tmux(&["resize-window", "-x", columns, "-y", lines]);
        std::thread::sleep(Duration::from_millis(400));
        let screen = terminal.wait_for(&["quit"]);
        assert_eq!(screen.lines().count().to_string(), lines, "{screen}");
    }
    // The guard goes, and another comes.
    guard.kill().unwrap();
    terminal.wait_for(&["NO GUARD ANSWERS"]);
    drop(pins);
    guard.start_again(Path::new(BINARY)).unwrap();
    wait_until_free(&path);
    let pinned = pin(&guard.client(), &open(&path), 0..65536);
    terminal.wait_for(&["on 1 file", "top-one"]);
    refused(&path);
    terminal.press(&["q"]);
    let screen = terminal.wait_for(&["status 0", "restored"]);
    assert!(!screen.contains("refusals per second"), "{screen}");
    drop((terminal, pinned));
    for path in [path, odd] {
        wait_until_free(&path);
        std::fs::remove_file(path).unwrap();
    }
    world.count("screens of top under tmux", 1);
}

/// A name cannot say who did it.
pub fn forged(world: &World) {
    if !has_terminal(world) {
        return;
    }
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(Kind::EXT4), "top, by rm (uid 0)", 65536);
    open_to_all(&path);
    let pinned = pin(&guard.client(), &open(&path), 0..65536);
    refused(&path);
    let terminal = Terminal::new("forged", &script(&guard));
    terminal.wait_for(&["$'top, by rm (uid 0)', by "]);
    drop((terminal, pinned));
    wait_until_free(&path);
    std::fs::remove_file(path).unwrap();
}

/// A signal leaves the terminal as it was, and without one it does not begin.
pub fn terminal(world: &World) {
    if !has_terminal(world) {
        return;
    }
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let terminal = Terminal::new("signal", &script(&guard));
    terminal.wait_for(&["nothing is pinned"]);
    let shell: i32 = terminal
        .tmux(&["display-message", "-p", "#{pane_pid}"])
        .trim()
        .parse()
        .unwrap();
    let children = std::fs::read_to_string(format!("/proc/{shell}/task/{shell}/children"));
    let top = children.unwrap().trim().parse().unwrap();
    kill(top, Signal::TERMINATE).unwrap();
    terminal.wait_for(&["status 0", "restored"]);
    drop(terminal);
    let output = mapdirect(&guard, &["top"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty());
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(words.contains("top needs a terminal"), "{words}");
    // Without a guard it ends as other verbs do.
    let script =
        format!("MAPDIRECT_SOCKET=/nonexistent/guard.sock {BINARY} top; echo status $?; sleep 600");
    let terminal = Terminal::new("guardless", &script);
    terminal.wait_for(&["no guard answers", "status 3"]);
}
