//! A virtual machine: booted, told what to run, switched off or cut off from
//! power.

mod boot;

use super::cpio;
use super::kernel::Kernel;
use anyhow::{Context, Result, bail, ensure};
pub(crate) use boot::{Boot, Clock, NVDIMM_UNIT, Nvdimm};
use mapdirect_sys::signal::{SignalFd, unblocked_in_child};
use mapdirect_testkit::disk;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use xtask_init::wire::{Decoder, Message, Program};

/// A machine that is not ready by then never will be, even emulated on a busy
/// processor.
const BOOTS: Duration = Duration::from_secs(240);
/// Ending every program and unmounting every disk.
const FINISHES: Duration = Duration::from_secs(60);
/// How often a console that is watched is looked at.
const LOOKS: Duration = Duration::from_millis(200);
/// Lines of the console that say what went wrong.
const LINES: usize = 40;
/// What the first of them has in it when a kernel crashes.
const CRASHES: [&str; 5] = [
    "BUG: ",
    "Oops: ",
    "kernel BUG at ",
    "general protection fault",
    "Kernel panic - not syncing: ",
];

/// How a machine ended that should not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// QEMU did not start it.
    NotStarted,
    /// Its kernel panicked, or it went off by itself.
    Crashed,
    /// It took too long.
    TooLong,
    /// A signal came that was waited for.
    Interrupted,
}

/// A machine that ended so, and what there is to say about it.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) end: End,
    text: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Failure {}

/// A machine that runs; killed when dropped, as by [`cut_power`].
///
/// [`cut_power`]: Machine::cut_power
#[derive(Debug)]
pub(crate) struct Machine {
    qemu: Qemu,
    /// There once QEMU has come to us.
    port: Option<UnixStream>,
    decoder: Decoder,
    interruption: Option<Arc<SignalFd>>,
    /// If it is shown, how much of it has been.
    console_shown: Option<u64>,
    started: Instant,
    deadline: Instant,
    /// Zero before it is ready.
    booted_in: Duration,
    /// After all that uses it.
    directory: RunDirectory,
}

impl Machine {
    /// From nothing to ready.
    pub(crate) fn booted_in(&self) -> Duration {
        self.booted_in
    }

    /// Starts a program, beside those that run already.
    pub(crate) fn begin(&mut self, program: &Program) -> Result<()> {
        self.send(&Message::Run(program.clone()))
    }

    /// Waits for what comes next, for a while: [`Out`], [`Err`], [`Exited`] or
    /// [`NotStarted`].
    ///
    /// [`Out`]: Message::Out
    /// [`Err`]: Message::Err
    /// [`Exited`]: Message::Exited
    /// [`NotStarted`]: Message::NotStarted
    pub(crate) fn next(&mut self, within: Duration) -> Result<Option<Message>> {
        self.receive_until(Instant::now() + within)
    }

    /// Runs a program to its end, passes on what it writes and returns its
    /// exit status: 128 and the signal if one ended it, 127 or 126 if it
    /// cannot be started, as a shell has it.
    pub(crate) fn run(
        &mut self,
        program: &Program,
        mut out: impl Write,
        mut err: impl Write,
    ) -> Result<u8> {
        self.begin(program)?;
        loop {
            match self.receive()? {
                Message::Out(bytes) => {
                    out.write_all(&bytes)?;
                    out.flush()?;
                }
                Message::Err(bytes) => {
                    err.write_all(&bytes)?;
                    err.flush()?;
                }
                Message::Exited(status) => return Ok(status),
                Message::NotStarted(errno) => {
                    let errno = Errno::from_raw_os_error(errno);
                    writeln!(
                        err,
                        "xtask: cannot run {} in {}: {errno}",
                        program.words.first().cloned().unwrap_or_default().display(),
                        program.directory.display()
                    )?;
                    return Ok(if errno == Errno::NOENT { 127 } else { 126 });
                }
                other => bail!("the machine sent {other:?} while a program ran"),
            }
        }
    }

    /// Ends it as a power cut would: at once, whatever it is doing. What it
    /// has stored to its NVDIMMs is in their files, also what it has not
    /// flushed: the caches of a processor are not emulated. Returns what it
    /// had sent before.
    pub(crate) fn cut_power(mut self) -> Result<Vec<Message>> {
        self.qemu.kill()?;
        let mut rest = Vec::new();
        if let Some(port) = &mut self.port {
            // Whoever is killed amid a write leaves what has arrived.
            let _ = port.read_to_end(&mut rest);
        }
        self.decoder.push(&rest);
        let mut sent = Vec::new();
        while let Some(message) = self.decoder.take()? {
            sent.push(message);
        }
        Ok(sent)
    }

    /// Ends its programs, unmounts its disks and switches it off.
    pub(crate) fn switch_off(mut self) -> Result<()> {
        self.send(&Message::Finish)?;
        self.deadline = Instant::now() + FINISHES;
        loop {
            match self.receive()? {
                Message::Finished => break,
                // The last words of what still ran.
                Message::Out(_) | Message::Err(_) | Message::Exited(_) => {}
                other => bail!("the machine sent {other:?} while it finished"),
            }
        }
        self.qemu.kill()
    }

    /// What its kernel said so far.
    pub(crate) fn console(&self) -> String {
        let text = fs::read(self.directory.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&text).replace('\r', "")
    }

    /// Waits for QEMU to come to us.
    fn accept(&mut self, listener: &UnixListener) -> Result<()> {
        listener.set_nonblocking(true)?;
        loop {
            match listener.accept() {
                Ok((port, _)) => {
                    port.set_nonblocking(false)?;
                    self.port = Some(port);
                    return Ok(());
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            self.wait(listener, self.deadline)?;
        }
    }

    fn send(&mut self, message: &Message) -> Result<()> {
        let port = self.port.as_mut().context("the machine has no port")?;
        if port.write_all(&message.encode()).is_err() {
            return Err(self.crashed());
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<Message> {
        let received = self.receive_until(self.deadline)?;
        // It is an error when the deadline passes.
        received.context("the machine said nothing")
    }

    fn receive_until(&mut self, until: Instant) -> Result<Option<Message>> {
        loop {
            if let Some(message) = self.decoder.take()? {
                return Ok(Some(message));
            }
            let port = self.port.as_ref().context("the machine has no port")?;
            let mut port = port.try_clone()?;
            if !self.wait(&port, until)? {
                return Ok(None);
            }
            let mut piece = vec![0; 64 << 10];
            match port.read(&mut piece) {
                Ok(0) => return Err(self.crashed()),
                Ok(length) => self.decoder.push(&piece[..length]),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return Err(self.crashed()),
            }
        }
    }

    /// Waits until there is something to be had from a descriptor; says
    /// whether there is.
    fn wait(&mut self, fd: &impl AsFd, until: Instant) -> Result<bool> {
        loop {
            self.show_console();
            let now = Instant::now();
            if now >= self.deadline {
                return Err(self.too_long());
            }
            if now >= until {
                return Ok(false);
            }
            let mut pause = until.min(self.deadline) - now;
            if self.console_shown.is_some() {
                pause = pause.min(LOOKS);
            }
            let pause = Timespec::try_from(pause)?;
            let mut fds = vec![
                PollFd::new(fd, PollFlags::IN),
                PollFd::new(&self.qemu.process, PollFlags::IN),
            ];
            if let Some(signals) = &self.interruption {
                fds.push(PollFd::new(&**signals, PollFlags::IN));
            }
            match poll(&mut fds, Some(&pause)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let happened: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if happened.get(2).copied().unwrap_or(false) {
                return Err(self.failure(End::Interrupted, ""));
            }
            // What it had to say comes first.
            if happened[0] {
                return Ok(true);
            }
            if happened[1] {
                return Err(self.crashed());
            }
        }
    }

    /// Shows what is new on the console.
    fn show_console(&mut self) {
        let Some(shown) = self.console_shown else {
            return;
        };
        let mut new = Vec::new();
        if let Ok(mut console) = File::open(self.directory.path().join("console")) {
            let _ = std::io::Seek::seek(&mut console, std::io::SeekFrom::Start(shown));
            let _ = console.read_to_end(&mut new);
        }
        let _ = std::io::stderr().write_all(&new);
        self.console_shown = Some(shown + new.len() as u64);
    }

    /// It went off by itself: says why.
    fn crashed(&mut self) -> anyhow::Error {
        let status = self.qemu.wait();
        let console = self.console();
        // An oops ends in a panic here.
        let panic = console
            .lines()
            .find_map(|line| line.split_once("Kernel panic - not syncing: "));
        let text = match (panic, status) {
            (Some((_, why)), _) => format!("its kernel panicked: {why}"),
            (None, Ok(status)) if status.success() => String::from("it went off by itself"),
            (None, Ok(status)) if status.signal() == Some(Signal::BUS.as_raw()) => {
                String::from("there is no more room where the file of an NVDIMM lies")
            }
            (None, Ok(status)) => {
                let complaint = fs::read(self.directory.path().join("qemu")).unwrap_or_default();
                let complaint = String::from_utf8_lossy(&complaint);
                format!("QEMU ended ({status}): {}", complaint.trim())
            }
            (None, Err(error)) => format!("QEMU cannot be run: {error:#}"),
        };
        // Without a word of a kernel there was none.
        let end = if panic.is_none() && console.is_empty() {
            End::NotStarted
        } else {
            End::Crashed
        };
        self.failure(end, &text)
    }

    fn too_long(&mut self) -> anyhow::Error {
        let seconds = self.started.elapsed().as_secs();
        let text = if self.booted_in.is_zero() {
            format!("it is not ready after {seconds} s")
        } else {
            format!("its time was over after {seconds} s")
        };
        self.failure(End::TooLong, &text)
    }

    /// A failure with the end of the console, unless all of it was shown.
    fn failure(&mut self, end: End, text: &str) -> anyhow::Error {
        self.show_console();
        if end == End::Interrupted {
            let text = String::from("interrupted; the virtual machine is gone");
            return Failure { end, text }.into();
        }
        let mut text = format!("the virtual machine failed: {text}");
        let console = self.console();
        if self.console_shown.is_none() && !console.is_empty() {
            text.push_str("\nits kernel said:");
            for line in telling(&console) {
                text.push_str("\n  ");
                text.push_str(line);
            }
        }
        Failure { end, text }.into()
    }
}

/// The lines of a console that say what went wrong: those from the first
/// crash on, or the last ones.
fn telling(console: &str) -> Vec<&str> {
    let lines: Vec<_> = console.lines().collect();
    let crash = lines
        .iter()
        .position(|line| CRASHES.iter().any(|crash| line.contains(crash)));
    let start = crash.unwrap_or(lines.len().saturating_sub(LINES));
    lines.into_iter().skip(start).take(LINES).collect()
}

/// A process of QEMU's, killed when dropped.
#[derive(Debug)]
struct Qemu {
    process: OwnedFd,
    /// The thread that started it, for as long as it runs: the kernel kills
    /// it when that thread ends.
    keeper: Option<JoinHandle<std::io::Result<ExitStatus>>>,
}

impl Qemu {
    fn start(mut command: Command) -> Result<Self> {
        let (tell, told) = mpsc::channel();
        let keeper = std::thread::spawn(move || {
            let mut child = match command.spawn() {
                Ok(child) => child,
                Err(error) => {
                    let _ = tell.send(Err(error));
                    return Err(std::io::ErrorKind::NotFound.into());
                }
            };
            let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
            let known = process.is_ok();
            let heard = tell.send(process.map_err(Into::into)).is_ok();
            if !(known && heard) {
                child.kill()?;
            }
            child.wait()
        });
        let process = told
            .recv()
            .context("the thread that starts QEMU has ended")?
            .context("cannot start QEMU")?;
        Ok(Self {
            process,
            keeper: Some(keeper),
        })
    }

    fn kill(&mut self) -> Result<()> {
        match pidfd_send_signal(&self.process, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(errno) => return Err(errno).context("cannot kill QEMU"),
        }
        self.wait().map(drop)
    }

    /// Waits for its end; only once.
    fn wait(&mut self) -> Result<ExitStatus> {
        let keeper = self.keeper.take().context("it has ended before")?;
        let status = keeper
            .join()
            .ok()
            .context("the thread that started it panicked")?;
        Ok(status?)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        if self.keeper.is_some() {
            let _ = self.kill();
        }
    }
}

/// Directories of machines: the process that made one is in the name, so that
/// what a killed one left behind can be found.
const PREFIX: &str = "mapdirect-vm-";

/// The files of one machine, gone when it is dropped.
#[derive(Debug)]
pub(crate) struct RunDirectory(PathBuf);

impl RunDirectory {
    /// Makes one where there is room, readable for nobody else.
    pub(crate) fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        let path = disk::place().join(name);
        rustix::fs::mkdir(&path, Mode::RWXU)
            .with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Every such directory, and the process that made it.
fn run_directories() -> Vec<(PathBuf, u32)> {
    let places = [PathBuf::from("/dev/shm"), std::env::temp_dir()];
    let entries = places.into_iter().flat_map(fs::read_dir);
    entries
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let (pid, _) = name.to_str()?.strip_prefix(PREFIX)?.split_once('-')?;
            Some((entry.path(), pid.parse().ok()?))
        })
        .collect()
}

/// The run directories of a process.
pub(crate) fn directories_of(pid: u32) -> Vec<PathBuf> {
    let all = run_directories().into_iter();
    all.filter(|(_, owner)| *owner == pid)
        .map(|(path, _)| path)
        .collect()
}

/// Takes away what killed processes left behind.
pub(crate) fn remove_stale() {
    for (path, owner) in run_directories() {
        if !Path::new(&format!("/proc/{owner}")).exists() {
            let _ = fs::remove_dir_all(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::boot::{parse_version, with_path};
    use super::*;

    #[test]
    fn versions_of_qemu() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright";
        assert_eq!(parse_version(debian), Some((7, 2)));
        assert_eq!(parse_version("QEMU emulator version 10.0.2"), Some((10, 0)));
        assert_eq!(parse_version("QEMU"), None);
    }

    #[test]
    fn commas_in_paths_are_doubled() {
        assert_eq!(with_path("file:", Path::new("/a,b")), "file:/a,,b");
    }

    #[test]
    fn what_a_console_tells() {
        let quiet: String = (0..100).map(|line| format!("{line}\n")).collect();
        let last = telling(&quiet);
        assert_eq!((last.len(), last[0]), (LINES, "60"));
        let crashed = format!("all is well\n[1.0] Oops: int3: 0000\n{quiet}");
        assert_eq!(telling(&crashed)[..2], ["[1.0] Oops: int3: 0000", "0"]);
        assert!(telling("").is_empty());
    }
}
