//! Guards and attackers in processes of their own.
//!
//! A test binary is its own helper: run with `--mapdirect-helper ROLE ...` it
//! plays that role instead of running tests, see [`play_role`].

use crate::attack::{Attack, Door, Target};
use crate::contract::Gate;
use anyhow::{Context, Result, bail, ensure};
use mapdirect_sys::Errno;
use mapdirect_sys::signal::{self, Signal};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A guard on a socket of its own; ended when dropped.
#[derive(Debug)]
pub struct GuardProcess {
    child: Child,
    socket: PathBuf,
    directory: ScratchDirectory,
    /// Where its gate is, if it has one in the kernel; gone when it is.
    gate: Option<BpfDirectory>,
    /// What it was told besides.
    arguments: Vec<String>,
    /// It was told to end, or killed.
    ended: bool,
}

impl GuardProcess {
    /// Starts `binary` as a guard, with the gate under test, and waits until
    /// it is ready.
    pub fn start(binary: &Path) -> Result<Self> {
        Self::start_with(binary, &[])
    }

    /// The same with more arguments.
    pub fn start_with(binary: &Path, arguments: &[&str]) -> Result<Self> {
        Self::start_at(binary, arguments, BpfDirectory::new(binary))
    }

    /// The same with the gate of a guard that was killed, or of none yet.
    pub fn start_at(binary: &Path, arguments: &[&str], gate: BpfDirectory) -> Result<Self> {
        let mut command = Command::new(binary);
        command.arg("guard").args(arguments);
        let mut guard = Self::spawn(command, gate)?;
        guard.arguments = arguments.iter().map(ToString::to_string).collect();
        Ok(guard)
    }

    /// The same with no more than so many descriptors.
    pub fn start_with_descriptors(binary: &Path, limit: u32) -> Result<Self> {
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(format!("ulimit -n {limit}; exec \"$0\" \"$@\""))
            .arg(binary)
            .arg("guard");
        Self::spawn(command, BpfDirectory::new(binary))
    }

    fn spawn(command: Command, gate: BpfDirectory) -> Result<Self> {
        let directory = ScratchDirectory::new("guard")?;
        let socket = directory.path().join("guard.sock");
        let (child, line) = run_guard(command, &directory, &socket, &gate)?;
        let guard = Self {
            child,
            socket,
            directory,
            gate: Some(gate),
            arguments: Vec::new(),
            ended: false,
        };
        ensure!(
            line.contains("ready"),
            "the guard said: {line:?} {}",
            guard.last_words()
        );
        Ok(guard)
    }

    /// Has another take its place, once it has ended: at the same socket, with
    /// the gate that stayed behind.
    pub fn start_again(&mut self, binary: &Path) -> Result<()> {
        ensure!(self.ended, "the first one still runs");
        let gate = self.gate.as_ref().context("it has no gate")?;
        let mut command = Command::new(binary);
        command.arg("guard").args(&self.arguments);
        let (child, line) = run_guard(command, &self.directory, &self.socket, gate)?;
        self.child = child;
        self.ended = false;
        let words = self.last_words();
        ensure!(line.contains("ready"), "the guard said: {line:?} {words}");
        Ok(())
    }

    /// Takes the gate away that it has left behind.
    pub fn unload(&mut self) -> Result<()> {
        ensure!(self.ended, "it still runs");
        drop(self.gate.take());
        Ok(())
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// It as the library sees it.
    #[must_use]
    pub fn client(&self) -> mapdirect::Guard {
        mapdirect::Guard::at(&self.socket)
    }

    /// The process id of its supervisor, which was started.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// The process id of the guard itself, as long as there is one.
    pub fn worker(&self) -> Result<i32> {
        Ok(self.client().status()?.pid)
    }

    /// What it has said on stderr.
    #[must_use]
    pub fn said(&self) -> String {
        let path = self.directory.path().join("stderr");
        std::fs::read_to_string(path).unwrap_or_default()
    }

    fn last_words(&self) -> String {
        let text = self.said();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }

    /// Ends the guard and its supervisor with SIGKILL, and waits until they are gone.
    /// A supervisor that were killed alone would have its guard end in an orderly way,
    /// and one that is not stopped would start another guard.
    pub fn kill(&mut self) -> Result<()> {
        self.ended = true;
        let children = self.children();
        signal::kill(self.pid(), Signal::STOP)?;
        for child in &children {
            // It may have ended by itself.
            let _ = pidfd_send_signal(child, rustix::process::Signal::KILL);
        }
        self.child.kill()?;
        self.child.wait()?;
        wait_until_gone(&children)
    }

    /// The guard itself, and whatever else its supervisor has started, the oldest
    /// first; also what the kernel still takes apart.
    #[must_use]
    pub fn started(&self) -> Vec<i32> {
        let pid = self.pid();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.unwrap_or_default();
        let numbers = children.split_whitespace().map(str::parse);
        numbers.filter_map(Result::ok).collect()
    }

    fn children(&self) -> Vec<OwnedFd> {
        self.started()
            .into_iter()
            .filter_map(Pid::from_raw)
            .filter_map(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
            .collect()
    }

    /// Where its gate is in the kernel.
    #[must_use]
    pub fn gate_directory(&self) -> Option<&Path> {
        self.gate.as_ref().map(BpfDirectory::path)
    }

    /// Ends it with SIGKILL, and hands over the gate that stays behind.
    pub fn kill_and_keep(mut self) -> Result<BpfDirectory> {
        self.kill()?;
        self.gate.take().context("it has no gate")
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> Result<bool> {
        self.ended = self.child.try_wait()?.is_some();
        Ok(self.ended)
    }

    /// Ends it with SIGTERM and returns its exit code.
    pub fn terminate(&mut self) -> Result<Option<i32>> {
        self.ended = true;
        let children = self.children();
        signal::kill(self.pid(), Signal::TERMINATE)?;
        let code = wait_for(Duration::from_secs(10), || {
            Ok(self.child.try_wait()?.map(|status| status.code()))
        })?;
        wait_until_gone(&children)?;
        Ok(code)
    }
}

/// Waits until processes are gone: the kernel takes a guard apart for a while after
/// its supervisor has seen its end, and until then the guard has its gate.
fn wait_until_gone(processes: &[OwnedFd]) -> Result<()> {
    for process in processes {
        let mut ended = [PollFd::new(process, PollFlags::IN)];
        let limit = Timespec {
            tv_sec: 10,
            tv_nsec: 0,
        };
        let count = rustix::event::poll(&mut ended, Some(&limit))?;
        ensure!(count > 0, "the guard outlives its supervisor");
    }
    Ok(())
}

/// Runs a guard, and returns its first line.
fn run_guard(
    mut command: Command,
    directory: &ScratchDirectory,
    socket: &Path,
    gate: &BpfDirectory,
) -> Result<(Child, String)> {
    // Refusals by the hundred are nobody's reading; what it says last, if
    // it ends by itself, is.
    let complaints = File::create(directory.path().join("stderr"))?;
    let mut child = command
        .arg("--socket")
        .arg(socket)
        .args(["--gate", Gate::under_test().name(), "--bpf-directory"])
        .arg(gate.path())
        .stdout(Stdio::piped())
        .stderr(complaints)
        .spawn()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;
    let stdout = child.stdout.take().context("no stdout")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    Ok((child, line))
}

impl Drop for GuardProcess {
    fn drop(&mut self) {
        if !self.ended
            && let Ok(Some(status)) = self.child.try_wait()
        {
            say(&format!(
                "a guard ended by itself ({status}): {}",
                self.last_words()
            ));
        }
        // SIGTERM first: a guard that ends by itself takes its socket away.
        let runs = matches!(self.child.try_wait(), Ok(None));
        if runs && self.terminate().is_err() {
            let _ = self.kill();
        }
    }
}

/// Where the gate of a guard is in the kernel; taken away when dropped.
#[derive(Debug)]
pub struct BpfDirectory {
    binary: PathBuf,
    path: PathBuf,
}

impl BpfDirectory {
    /// One that nobody else uses.
    #[must_use]
    pub fn new(binary: &Path) -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("mapdirect-test-{}-{number}", std::process::id());
        Self {
            binary: binary.to_owned(),
            path: Path::new("/sys/fs/bpf").join(name),
        }
    }

    /// One that exists already, or is on another bpf filesystem.
    #[must_use]
    pub fn at(binary: &Path, path: &Path) -> Self {
        Self {
            binary: binary.to_owned(),
            path: path.to_owned(),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for BpfDirectory {
    fn drop(&mut self) {
        if !self.path.exists() {
            return;
        }
        let unloaded = Command::new(&self.binary)
            .args(["guard", "--unload", "--bpf-directory"])
            .arg(&self.path)
            .stdout(Stdio::null())
            .status();
        if !unloaded.is_ok_and(|status| status.success()) {
            say(&format!("{} stays behind", self.path.display()));
        }
    }
}

/// Asks again and again until there is an answer.
pub fn wait_for<T>(limit: Duration, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        ensure!(
            Instant::now() < deadline,
            "nothing happened within {limit:?}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A directory that goes when it is dropped.
#[derive(Debug)]
pub struct ScratchDirectory(PathBuf);

impl ScratchDirectory {
    /// Makes one.
    pub fn new(what: &str) -> Result<Self> {
        Self::under(&std::env::temp_dir(), what)
    }

    /// Makes one where device nodes can be used.
    pub fn in_memory(what: &str) -> Result<Self> {
        Self::under(Path::new("/dev/shm"), what)
    }

    fn under(parent: &Path, what: &str) -> Result<Self> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!(
            "{}{what}-{}-{number}",
            crate::disk::PREFIX,
            std::process::id()
        );
        let path = parent.join(name);
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for ScratchDirectory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A command in the background, killed when dropped.
#[derive(Debug)]
pub struct Background(Child);

impl Background {
    /// Starts it.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        Ok(Self(command.spawn()?))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Marks the command line of a helper.
pub const HELPER: &str = "--mapdirect-helper";

/// A helper: this program in another role. Dropped, it is let end by itself
/// and waited for: the guard looks at every process there is, ended or not.
#[derive(Debug)]
pub struct Helper {
    child: Child,
    /// Until it is let end.
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Helper {
    /// Starts this program in `role`.
    pub fn start(role: &str, arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(HELPER).arg(role).args(arguments);
        Self::spawn(command)
    }

    /// Starts any command as a helper.
    pub fn spawn(mut command: Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = Some(child.stdin.take().context("no stdin")?);
        let stdout = BufReader::new(child.stdout.take().context("no stdout")?);
        Ok(Self {
            child,
            stdin,
            stdout,
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Waits for its next line.
    pub fn hear(&mut self) -> Result<String> {
        let mut line = String::new();
        let length = self.stdout.read_line(&mut line)?;
        ensure!(length > 0, "the helper ended without a word");
        Ok(line.trim_end().to_owned())
    }

    /// Tells it to go on.
    pub fn tell(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("no stdin")?;
        writeln!(stdin, "{line}")?;
        stdin.flush()?;
        Ok(())
    }

    /// Ends it with SIGKILL.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Lets it end by itself, and says how it did: its exit status, or 128
    /// and the signal that killed it.
    pub fn status(mut self) -> Result<i32> {
        use std::os::unix::process::ExitStatusExt;
        drop(self.stdin.take());
        let status = self.child.wait()?;
        Ok(status
            .code()
            .or_else(|| status.signal().map(|signal| 128 + signal))
            .unwrap_or(-1))
    }

    /// Lets it end by itself: its input ends.
    pub fn finish(mut self) -> Result<Option<i32>> {
        self.end()
    }

    fn end(&mut self) -> Result<Option<i32>> {
        drop(self.stdin.take());
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            if Instant::now() >= deadline {
                self.child.kill()?;
                self.child.wait()?;
                bail!("the helper did not end");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// Attackers that wait for their next target: to start a program anew for
/// each attack is most of what an attack takes on an emulated processor.
static WAITING: Mutex<Vec<Helper>> = Mutex::new(Vec::new());

/// An attack by another process, which is there for nothing else. Returns
/// what it got: nothing, or an errno.
pub fn attack_by_stranger(
    attack: &Attack,
    door: Door,
    path: &Path,
    other: &Path,
    (offset, length): (u64, u64),
    block: u64,
) -> Result<std::result::Result<(), Errno>> {
    let waiting = || WAITING.lock().unwrap_or_else(PoisonError::into_inner);
    let first = waiting().pop();
    let mut helper = match first {
        Some(helper) => helper,
        None => Helper::start("attackers", &[])?,
    };
    let words = words_of(attack, door, path, other, (offset, length), block);
    helper.tell(&words.join("\t"))?;
    let result = parse_answer(&helper.hear()?)?;
    waiting().push(helper);
    Ok(result)
}

/// An attack as words of a command line.
fn words_of(
    attack: &Attack,
    door: Door,
    path: &Path,
    other: &Path,
    (offset, length): (u64, u64),
    block: u64,
) -> [String; 7] {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    [
        attack.name.to_owned(),
        door.name().to_owned(),
        text(path),
        text(other),
        offset.to_string(),
        length.to_string(),
        block.to_string(),
    ]
}

fn parse_words(words: &[String]) -> Result<(&'static Attack, Target)> {
    let [name, door, path, other, offset, length, block] = words else {
        bail!("wrong arguments");
    };
    let attack = Attack::by_name(name).context("no such attack")?;
    let target = Target {
        path: path.into(),
        other: other.into(),
        offset: offset.parse()?,
        length: length.parse()?,
        block: block.parse()?,
        door: Door::by_name(door).context("no such door")?,
        file: None,
    };
    Ok((attack, target))
}

/// What came of an attack, as one process says it to another.
pub(crate) fn answer(result: std::result::Result<(), Errno>) -> String {
    match result {
        Ok(()) => String::from("ok"),
        Err(errno) => format!("errno {}", errno.raw_os_error()),
    }
}

pub(crate) fn parse_answer(line: &str) -> Result<std::result::Result<(), Errno>> {
    match line.strip_prefix("errno ") {
        None if line == "ok" => Ok(Ok(())),
        Some(errno) => Ok(Err(Errno::from_raw_os_error(errno.parse()?))),
        None => bail!("the stranger said: {line}"),
    }
}

/// Another process, ready to attack.
#[derive(Debug)]
pub struct Stranger {
    helper: Helper,
}

impl Stranger {
    /// Starts one. `early` makes it open the file now, for what the attack
    /// needs; otherwise it opens it when it attacks.
    pub fn start(
        attack: &Attack,
        door: Door,
        path: &Path,
        other: &Path,
        (offset, length): (u64, u64),
        block: u64,
        early: bool,
    ) -> Result<Self> {
        let words = words_of(attack, door, path, other, (offset, length), block);
        let mut words: Vec<_> = words.iter().map(String::as_str).collect();
        words.push(if early { "early" } else { "late" });
        let mut helper = Helper::start("attack", &words)?;
        let line = helper.hear()?;
        ensure!(line == "ready", "the stranger said: {line}");
        Ok(Self { helper })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.helper.pid()
    }

    /// Has it attack, and tells what it got.
    pub fn attack(&mut self) -> Result<std::result::Result<(), Errno>> {
        self.helper.tell("go")?;
        parse_answer(&self.helper.hear()?)
    }
}

/// Name of a role, and what plays it, given the rest of the command line.
pub type Role = (&'static str, fn(&[String]) -> Result<()>);

/// Plays a role if the command line asks for one, with the roles of the
/// caller beside those of this crate; says whether it did.
pub fn play_role(roles: &[Role]) -> bool {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [marker, role, rest @ ..] = &arguments[..] else {
        return false;
    };
    if marker != HELPER {
        return false;
    }
    let own: [Role; 2] = [("attack", play_attacker), ("attackers", play_attackers)];
    let found = own.iter().chain(roles).find(|(name, _)| name == role);
    let result = match found {
        Some((_, play)) => play(rest),
        None => Err(anyhow::anyhow!("no role {role}")),
    };
    if let Err(error) = result {
        say(&format!("failed: {error:#}"));
        std::process::exit(1);
    }
    true
}

/// A helper's line to its test.
pub fn say(line: &str) {
    let mut stdout = std::io::stdout().lock();
    // Without a listener there is nobody to tell.
    let _ = writeln!(stdout, "{line}");
    let _ = stdout.flush();
}

/// Waits for a line from the test; `None` when its input has ended.
pub fn listen() -> Result<Option<String>> {
    let mut line = String::new();
    let length = std::io::stdin().lock().read_line(&mut line)?;
    Ok((length > 0).then(|| line.trim_end().to_owned()))
}

fn play_attacker(arguments: &[String]) -> Result<()> {
    let Some((when, words)) = arguments.split_last() else {
        bail!("wrong arguments");
    };
    let (attack, mut target) = parse_words(words)?;
    if when == "early" {
        let flags = match attack.needs {
            crate::attack::Needs::Write => OFlags::RDWR,
            _ => OFlags::RDONLY,
        };
        target.file = Some(rustix::fs::open(
            &target.path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
        )?);
    }
    say("ready");
    while listen()?.is_some() {
        say(&answer((attack.run)(&target)));
    }
    Ok(())
}

/// Role: for each line it hears, a process of its own that attacks.
fn play_attackers(_: &[String]) -> Result<()> {
    while let Some(line) = listen()? {
        let words: Vec<_> = line.split('\t').map(str::to_owned).collect();
        let (attack, target) = parse_words(&words)?;
        let attacker = crate::raw::fork(|| {
            say(&answer((attack.run)(&target)));
            0
        })?;
        let status = crate::raw::wait(attacker)?;
        ensure!(status == 0, "the attacker ended with {status}");
    }
    Ok(())
}
