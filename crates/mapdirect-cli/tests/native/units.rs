//! The units for systemd: what they say is right and allowed, and the guard
//! does what systemd expects of a service.

use crate::policy::{allow, rule};
use crate::world::{BINARY, World, is_pinned, open, patience, pin, wait_until_free, written};
use anyhow::{Context, ensure};
use libtest_mimic::Trial;
use mapdirect::Guard;
use mapdirect_sys::signal::{Signal, kill};
use mapdirect_testkit::Kind;
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::process::{BpfDirectory, ScratchDirectory, wait_for};
use mapdirect_testkit::raw::NOBODY;
use std::fs::File;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = vec![
        world.trial("units::are-right", are_right),
        world.trial("units::exposure", exposure),
        world.trial("units::capabilities", capabilities),
        world.trial("units::activated", activated),
    ];
    if Gate::under_test() == Gate::Fanotify {
        trials.push(world.trial("units::watchdog", watchdog));
    }
    trials
}

/// Where the units are.
fn units() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/systemd")
}

/// The values of a setting of the service, in the order of their lines.
fn settings(name: &str) -> Vec<String> {
    let text = std::fs::read_to_string(units().join("mapdirect.service")).unwrap();
    text.lines()
        .filter_map(|line| line.strip_prefix(name)?.strip_prefix('='))
        .map(str::to_owned)
        .collect()
}

/// A copy of the units that starts the program under test.
fn copied() -> ScratchDirectory {
    let directory = ScratchDirectory::new("units").unwrap();
    for name in ["mapdirect.service", "mapdirect.socket"] {
        let text = std::fs::read_to_string(units().join(name)).unwrap();
        let text = text.replace("/usr/bin/mapdirect", BINARY);
        std::fs::write(directory.path().join(name), text).unwrap();
    }
    directory
}

/// What a program of systemd says, and whether that is good.
fn ask_systemd(command: &mut Command) -> (bool, String) {
    let output = command
        .output()
        .context("systemd is not installed here, which has the programs to check its units")
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

/// systemd understands every line, but for settings that are newer than it.
fn are_right(_world: &World) {
    let directory = copied();
    let (good, said) = ask_systemd(
        Command::new("systemd-analyze")
            .args(["verify", "--man=no"])
            .arg(directory.path().join("mapdirect.service"))
            .arg(directory.path().join("mapdirect.socket")),
    );
    let newer = "Unknown key 'FileDescriptorStorePreserve'";
    let wrong: Vec<_> = said
        .lines()
        .filter(|line| line.contains("mapdirect") && !line.contains(newer))
        .collect();
    assert!(good && wrong.is_empty(), "{said}");
    // What the comment there says must not be there is not.
    for name in [
        "PrivateMounts",
        "ProtectSystem",
        "ProtectHome",
        "ProtectProc",
        "ProtectKernelTunables",
        "ProtectControlGroups",
        "PrivateTmp",
        "PrivateDevices",
        "PrivateUsers",
        "ReadWritePaths",
    ] {
        assert!(settings(name).is_empty(), "{name} hides something");
    }
}

/// By the measure of `systemd-analyze security` the service is not more exposed
/// than it has to be.
fn exposure(_world: &World) {
    let directory = copied();
    let (good, said) = ask_systemd(
        Command::new("systemd-analyze")
            .args(["security", "--offline=yes", "--threshold=50", "--no-pager"])
            .arg(directory.path().join("mapdirect.service")),
    );
    assert!(good, "{said}");
}

/// A guard with just the capabilities of the service does its work, and one with
/// one less says which it lacks.
fn capabilities(world: &World) {
    let [list] = &settings("CapabilityBoundingSet")[..] else {
        panic!("one line has them all");
    };
    let all: Vec<String> = list
        .split(' ')
        .map(|name| name.strip_prefix("CAP_").unwrap().to_lowercase())
        .collect();
    let of_others: &[&str] = match Gate::under_test() {
        Gate::Bpf => &["lease", "setgid", "linux_immutable"],
        Gate::Fanotify => &["dac_read_search", "syslog", "setgid", "linux_immutable"],
    };
    let disk = world.disk(Kind::XFS);
    let directory = ScratchDirectory::new("units-policy").unwrap();
    allow(directory.path(), 0o755);
    let policy = directory.path().join("policy.toml");
    std::fs::write(&policy, rule("nobody", &disk.path(""), "write", "")).unwrap();
    for less in all.iter().map(Some).chain([None]) {
        let set: Vec<_> = all.iter().filter(|name| Some(*name) != less).collect();
        let set: Vec<_> = set.iter().map(|name| format!("+{name}")).collect();
        let mut words = vec![
            String::from("setpriv"),
            format!("--bounding-set=-all,{}", set.join(",")),
            String::from("--no-new-privs"),
        ];
        words.extend([BINARY, "guard", "--policy"].map(String::from));
        words.push(policy.to_string_lossy().into_owned());
        let mut service = Service::start(&words, &[]);
        let is_needed = less.is_some_and(|less| !of_others.contains(&less.as_str()));
        if is_needed {
            let status = service.child.wait().unwrap();
            assert_eq!(status.code(), Some(1), "without {less:?}");
            let name = format!("lacks CAP_{}", less.unwrap().to_uppercase());
            assert!(service.said().contains(&name), "{}", service.said());
            continue;
        }
        service.wait_for("READY=1");
        let path = written(&disk, "units-capabilities", 65536);
        let file = open(&path);
        drop(pin(&service.client(), &file, 0..65536));
        drop(file);
        wait_until_free(&path);
        allow(&path, 0o666);
        let (may, said) = pins_as_nobody(&service, &path);
        let all_there = less.is_none_or(|less| less != "setgid");
        assert_eq!(may, all_there, "without {less:?}: {said}");
        assert!(may || said.contains("CAP_SETGID"), "{said}");
        wait_until_free(&path);
        std::fs::remove_file(&path).unwrap();
    }
}

/// Whether a user whom the policy names can pin a file, and what is said.
fn pins_as_nobody(service: &Service, path: &Path) -> (bool, String) {
    let nobody = NOBODY.to_string();
    allow(service.directory.path(), 0o755);
    let output = Command::new("setpriv")
        .args(["--reuid", &nobody, "--regid", &nobody, "--clear-groups"])
        .args([BINARY, "pin"])
        .arg(path)
        .args(["--", "true"])
        .env(
            "MAPDIRECT_SOCKET",
            service.directory.path().join("guard.sock"),
        )
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.success(), said)
}

/// Hears what is sent to an address, until this process ends. Descriptors that come
/// along are closed.
fn listen_at(address: &Path) -> Receiver<String> {
    let socket = UnixDatagram::bind(address).unwrap();
    let (send, messages) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length) = socket.recv(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            if send.send(text).is_err() {
                return;
            }
        }
    });
    messages
}

/// A guard that was started as systemd starts it.
struct Service {
    child: Child,
    directory: ScratchDirectory,
    /// What it has said, as it comes: nobody who starts services lets them wait.
    messages: Receiver<String>,
    _gate: BpfDirectory,
}

impl Service {
    /// Starts it by these words, to which the arguments of `guard` are added.
    fn start(words: &[String], environment: &[(&str, &str)]) -> Self {
        Self::start_in(ScratchDirectory::new("units").unwrap(), words, environment)
    }

    fn start_in(
        directory: ScratchDirectory,
        words: &[String],
        environment: &[(&str, &str)],
    ) -> Self {
        let address = directory.path().join("notify");
        let messages = listen_at(&address);
        let gate = BpfDirectory::new(Path::new(BINARY));
        let child = Command::new(&words[0])
            .args(&words[1..])
            .args(["--gate", Gate::under_test().name(), "--socket"])
            .arg(directory.path().join("guard.sock"))
            .arg("--bpf-directory")
            .arg(gate.path())
            .env("NOTIFY_SOCKET", &address)
            .envs(environment.iter().copied())
            .stdout(Stdio::null())
            .stderr(File::create(directory.path().join("stderr")).unwrap())
            .spawn()
            .unwrap();
        Self {
            child,
            directory,
            messages,
            _gate: gate,
        }
    }

    fn said(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("stderr")).unwrap()
    }

    fn client(&self) -> Guard {
        Guard::at(self.directory.path().join("guard.sock"))
    }

    /// The next message, if one comes in time.
    fn hear(&self, limit: Duration) -> Option<String> {
        self.messages.recv_timeout(limit).ok()
    }

    /// Waits for a message with such a line.
    fn wait_for(&self, line: &str) -> String {
        let deadline = Instant::now() + patience().max(Duration::from_secs(20));
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no {line}: {}", self.said());
            if let Some(message) = self.hear(left.max(Duration::from_millis(1)))
                && message.lines().any(|said| said.starts_with(line))
            {
                return message;
            }
        }
    }

    fn end(&mut self) {
        kill(self.child.id().cast_signed(), Signal::TERMINATE).unwrap();
        self.wait_for("STOPPING=1");
        let ended = wait_for(Duration::from_secs(10), || Ok(self.child.try_wait()?));
        assert!(ended.unwrap().success(), "{}", self.said());
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = kill(self.child.id().cast_signed(), Signal::TERMINATE);
            let ended = wait_for(Duration::from_secs(5), || Ok(self.child.try_wait()?));
            if ended.is_err() {
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
        }
    }
}

/// systemd listens: the first client starts the guard, which takes over the
/// socket, says when it serves, and leaves the socket where it is.
fn activated(world: &World) {
    let directory = ScratchDirectory::new("units").unwrap();
    let socket = directory.path().join("guard.sock");
    let notify = format!(
        "NOTIFY_SOCKET={}",
        directory.path().join("notify").display()
    );
    let words: Vec<String> = [
        "systemd-socket-activate",
        "--seqpacket",
        "--fdname=listener",
        "-E",
        &notify,
        "-E",
        "WATCHDOG_USEC=200000",
        "-l",
        socket.to_str().unwrap(),
        BINARY,
        "guard",
    ]
    .map(String::from)
    .to_vec();
    let mut service = Service::start_in(directory, &words, &[]);
    wait_for(Duration::from_secs(10), || {
        Ok(socket.exists().then_some(()))
    })
    .context("is systemd-socket-activate installed?")
    .unwrap();
    let client = service.client();
    let status = wait_for(Duration::from_secs(60), || Ok(client.status().ok())).unwrap();
    // The process that systemd knows is the guard's parent.
    let stat = mapdirect_sys::proc::read_task_file(status.pid, "status").unwrap();
    assert!(
        stat.contains(&format!("PPid:\t{}", service.child.id())),
        "{stat}"
    );
    let ready = service.wait_for("READY=1");
    let gate = Gate::under_test().name();
    assert!(ready.contains(&format!("STATUS=gate {gate}")), "{ready}");
    service.wait_for("WATCHDOG=1");
    // What it does is said when it changes, and it goes on being alive.
    let path = written(&world.disk(Kind::EXT4), "units-activated", 65536);
    let file = open(&path);
    let held = pin(&client, &file, 0..65536);
    assert!(is_pinned(&path));
    service.wait_for(&format!("STATUS=gate {gate}, pins: 1"));
    service.wait_for("WATCHDOG=1");
    drop((held, file));
    wait_until_free(&path);
    service.end();
    assert!(socket.exists(), "it is not the guard's to remove");
    std::fs::remove_file(&path).unwrap();
}

/// While the gate's thread hangs, the guard does not say that it is alive.
fn watchdog(_world: &World) {
    let words = [String::from(BINARY), String::from("guard")];
    let mut service = Service::start(&words, &[]);
    service.wait_for("READY=1");
    service.wait_for("WATCHDOG=1");
    let tid = service.thread("gate").unwrap();
    let mut hang = Command::new("strace")
        .args(["-qq", "-e", "trace=ppoll,poll"])
        .args(["-e", "inject=ppoll,poll:delay_enter=7000000", "-p"])
        .arg(tid.to_string())
        .stderr(Stdio::null())
        .spawn()
        .context("strace is missing, which makes a thread hang")
        .unwrap();
    // What was said before it hung.
    std::thread::sleep(Duration::from_millis(3000));
    while service.hear(Duration::from_millis(1)).is_some() {}
    let silent = service.hear(Duration::from_millis(3500));
    assert_eq!(silent, None, "it says that it is alive");
    kill(hang.id().cast_signed(), Signal::INTERRUPT).unwrap();
    hang.wait().unwrap();
    service.wait_for("WATCHDOG=1");
    service.end();
}

impl Service {
    /// The number of a thread of the guard.
    fn thread(&self, name: &str) -> anyhow::Result<i32> {
        let pid = self.client().status()?.pid;
        let directory = format!("/proc/{pid}/task");
        for tid in mapdirect_sys::proc::numbers_in(&directory)? {
            let comm = std::fs::read_to_string(format!("{directory}/{tid}/comm"))?;
            if comm.trim_end() == name {
                return Ok(tid);
            }
        }
        ensure!(false, "there is no thread {name}");
        Ok(0)
    }
}
