//! `mapdirect run`: runs any program, and pins the files that it maps.
//!
//! Three processes besides the program take part.
//!
//! * This one starts the program, passes signals on, and ends as it ends.
//! * The *watcher* starts the worker, and another one when that is killed.
//! * The *worker* answers what the filter asks: see [`supervise`].
//!
//! Each has the filter's listener. Without any the program would get `ENOSYS`
//! for every call that the filter asks about, and nothing could mend that. So
//! this process starts another watcher when the watcher is killed, and two of
//! the three can be killed at once. The last two have sessions of their own, so
//! that what ends a job does not end them before the program. They live as long
//! as any descendant of the program does.
//!
//! What the worker has received and not answered is in memory that the three
//! share, where the kernel itself put it: the next worker begins with that.

mod filter;
mod globs;
mod open;
mod own;
mod stand_in;
mod supervise;
mod target;

use self::globs::Files;
use self::supervise::{AT_ONCE, Rules, Supervisor, wait_until_unused, word};
use crate::args::{OwnChoice, RunArgs, StrengthChoice};
use crate::{Exit, exit, output, terminal};
use anyhow::{Context, Result};
use mapdirect::{Gate, Guard};
use mapdirect_sys::seccomp::{self, Journal};
use mapdirect_sys::signal::{self, Signal, SignalFd};
use mapdirect_sys::unix::Socket;
use mapdirect_sys::{Errno, capget, fork, pidfd, proc};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, WaitOptions, WaitStatus};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

/// include/uapi/linux/capability.h
const CAP_SYS_ADMIN: u32 = 21;
/// A worker that dies so often in so much time will not do better.
const DEATHS: usize = 5;
const SPELL: Duration = Duration::from_secs(60);

pub(crate) fn run(args: &RunArgs) -> Result<Exit> {
    let directory = std::env::current_dir().unwrap_or_default();
    let files = match Files::new(&args.files, &directory) {
        Ok(files) => files,
        Err(why) => {
            output::complain(&why);
            return Ok(Exit::USAGE);
        }
    };
    Ok(supervise(args, files).unwrap_or_else(|error| {
        exit::explain(&error);
        Exit::COMMAND_NOT_RUN
    }))
}

fn supervise(args: &RunArgs, files: Files) -> Result<Exit> {
    let signals = SignalFd::block(&[
        Signal::INTERRUPT,
        Signal::TERMINATE,
        Signal::HANGUP,
        Signal::CHILD,
    ])?;
    let rules = Rules {
        files,
        prepare: args.prepare,
        strength: args.strength.into(),
        strict: args.strict,
        gate: Guard::from_env().gate()?,
        keeper: std::process::id().cast_signed(),
    };
    let asked = filter::Asked {
        private: args.private,
        opens: rules.gate != Gate::Bpf,
        own: args.own == OwnChoice::Allow && args.strength == StrengthChoice::Stable,
    };
    let house = House {
        journal: Journal::new(AT_ONCE).context("mmap")?,
        rules,
    };
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let (own, to_own) = Socket::pair()?;
    let (watchers, to_watcher) = Socket::pair()?;
    let mut ends = Some((own, to_own, to_watcher));
    let watcher = fork::child(|| {
        // Then the other end is closed once the program runs, or does not.
        drop(ends.take());
        house.begin_watching(&watchers)
    })
    .context("fork")?;
    drop(watchers);
    let Some((own, to_own, to_watcher)) = ends else {
        anyhow::bail!("the sockets are gone");
    };
    let Some((program, arguments)) = args.command.split_first() else {
        anyhow::bail!("there is no command");
    };
    if args.keep_privileges && !may_keep_privileges() {
        anyhow::bail!(
            "--keep-privileges takes CAP_SYS_ADMIN\nhelp: run it as root, or without that option"
        );
    }
    let mut command = Command::new(program);
    command.args(arguments);
    signal::unblocked_in_child(&mut command);
    seccomp::supervised(
        &mut command,
        filter::assemble(asked),
        args.keep_privileges,
        vec![to_own, to_watcher],
    );
    let child = match command.spawn() {
        Ok(child) => child.id().cast_signed(),
        Err(error) => return not_started(program, &error),
    };
    // What is in there are the other ends of the sockets.
    drop(command);
    leave_pipes()?;
    let listener = house.hear(&own).context("receiving the listener")?;
    house.attend(child, watcher, &listener, &signals)
}

/// Without no_new_privs only this capability may install a filter.
fn may_keep_privileges() -> bool {
    capget::effective(0).is_ok_and(|effective| capget::contains(effective, CAP_SYS_ADMIN))
}

/// Why the command does not run.
fn not_started(program: &std::ffi::OsStr, error: &std::io::Error) -> Result<Exit> {
    let shown = terminal::name(Path::new(program));
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT) => {
            output::complain(&format!("{shown}: {error}"));
            Ok(Exit::NOT_FOUND)
        }
        Some(Errno::BUSY) => anyhow::bail!(
            "{shown} is not run: a filter with a listener is in force already, and the kernel \
             allows one to each chain of filters (EBUSY)\n\
             help: `mapdirect run` within `mapdirect run` is not needed: give the outer one the \
             --files of both"
        ),
        Some(Errno::INVAL | Errno::NOSYS) => anyhow::bail!(
            "{shown} is not run: this kernel has no seccomp filters with a listener: {error}\n\
             help: it takes CONFIG_SECCOMP_FILTER, and Linux 5.5"
        ),
        _ => {
            output::complain(&format!("{shown}: {error}"));
            Ok(Exit::CANNOT_EXECUTE)
        }
    }
}

/// What the three processes share.
struct House {
    journal: Journal,
    rules: Rules,
}

impl House {
    /// Receives the listener; fails if the program was not started.
    fn hear(&self, socket: &Socket) -> Result<OwnedFd, Errno> {
        let received = socket.receive(&mut [0; 8])?;
        received.fds.into_iter().next().ok_or(Errno::NOTCONN)
    }

    /// The watcher's life. A watcher cannot be killed by what ends a job.
    fn begin_watching(&self, socket: &Socket) -> u8 {
        match self.hear(socket) {
            Ok(listener) => self.watch(&listener),
            Err(_) => 0,
        }
    }

    /// Has a worker, until nobody is supervised any more.
    fn watch(&self, listener: &OwnedFd) -> u8 {
        let _ = rustix::process::setsid();
        // Whoever reads what the program writes waits for its end, not for that
        // of this process.
        let _ = leave_pipes();
        let mut deaths: VecDeque<Instant> = VecDeque::new();
        let mut worker = self.worker();
        loop {
            let pidfd = match worker
                .take()
                .map_or_else(|| self.start_worker(listener), Ok)
            {
                Ok(pidfd) => pidfd,
                Err(errno) => {
                    output::complain(&format!("no worker can be started: {errno}"));
                    return self.let_pass(listener, "there is no process to ask the guard");
                }
            };
            if !ends_before_use_does(listener.as_fd(), pidfd.as_fd()) {
                return 0;
            }
            while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
            let now = Instant::now();
            deaths.push_back(now);
            deaths.retain(|then| now.duration_since(*then) < SPELL);
            if is_unused(listener.as_fd()) {
                return 0;
            }
            if deaths.len() >= DEATHS {
                return self.let_pass(
                    listener,
                    "the process that asks the guard was killed again and again",
                );
            }
            output::complain(
                "the process that asks the guard was killed; another one takes its place",
            );
        }
    }

    /// The worker that is there, if there is one.
    fn worker(&self) -> Option<OwnedFd> {
        let more = self.journal.more();
        let pid = i32::try_from(more[word::WORKER].load(SeqCst)).ok()?;
        let pidfd = pidfd::of_process(pid).ok()?;
        (proc::start_time(pid) == Ok(more[word::STARTED].load(SeqCst))).then_some(pidfd)
    }

    fn start_worker(&self, listener: &OwnedFd) -> Result<OwnedFd, Errno> {
        let pid = fork::child(|| {
            self.note_worker(std::process::id().cast_signed());
            Supervisor::new(&self.rules, &self.journal, listener.as_fd(), None).run();
            0
        })?;
        let pidfd = pidfd::of_process(pid)?;
        self.note_worker(pid);
        Ok(pidfd)
    }

    fn note_worker(&self, pid: i32) {
        let more = self.journal.more();
        more[word::STARTED].store(proc::start_time(pid).unwrap_or(0), SeqCst);
        more[word::WORKER].store(u64::from(pid.cast_unsigned()), SeqCst);
    }

    /// Answers in the worker's place, without asking the guard.
    fn let_pass(&self, listener: &OwnedFd, why: &'static str) -> u8 {
        output::complain(&format!(
            "{why}: what is pinned stays so, and nothing new is pinned from here on"
        ));
        Supervisor::new(&self.rules, &self.journal, listener.as_fd(), Some(why)).run();
        0
    }

    /// Waits for the end of the program.
    fn attend(
        &self,
        child: i32,
        watcher: i32,
        listener: &OwnedFd,
        signals: &SignalFd,
    ) -> Result<Exit> {
        let mut watcher = watcher;
        loop {
            let received = signals.wait()?;
            if received.number != Signal::CHILD {
                // From the terminal the command got it as well; sent to this
                // process alone it is meant for the command.
                if !received.from_terminal {
                    // It may have ended just now: then SIGCHLD is next.
                    let _ = signal::kill(child, received.number);
                }
                continue;
            }
            let mut status = None;
            while let Some((pid, ended)) = reap() {
                if pid == child {
                    status = Some(ended);
                } else if pid == watcher && !is_unused(listener.as_fd()) {
                    output::complain(
                        "the process that watches the supervisor was killed; another one takes \
                         its place",
                    );
                    watcher = fork::child(|| self.watch(listener))?;
                }
            }
            if let Some(status) = status {
                self.tell_unmatched();
                return Ok(Exit::of_waited(status));
            }
        }
    }

    fn tell_unmatched(&self) {
        let matched = self.journal.more()[word::MATCHED].load(SeqCst);
        for glob in self.rules.files.unmatched(matched) {
            output::complain(&format!(
                "--files {glob}: nothing that it names was mapped; help: a glob is matched with \
                 absolute paths without links, ** stands for directories"
            ));
        }
    }
}

/// A child that has ended.
fn reap() -> Option<(i32, WaitStatus)> {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => return Some((Pid::as_raw(Some(pid)), status)),
            Err(Errno::INTR) => {}
            _ => return None,
        }
    }
}

/// Lets go of what the program was given to read from and write to.
fn leave_pipes() -> Result<(), Errno> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let nothing = rustix::fs::open("/dev/null", flags, Mode::empty())?;
    rustix::stdio::dup2_stdin(&nothing)?;
    rustix::stdio::dup2_stdout(&nothing)
}

fn is_unused(listener: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(&listener, PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::HUP)
}

/// Whether a process ends before nobody is supervised any more.
fn ends_before_use_does(listener: BorrowedFd<'_>, process: BorrowedFd<'_>) -> bool {
    loop {
        let mut fds = [
            PollFd::new(&listener, PollFlags::empty()),
            PollFd::new(&process, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) if fds[0].revents().contains(PollFlags::HUP) => return false,
            Ok(_) if !fds[1].revents().is_empty() => return true,
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => {
                wait_until_unused(listener);
                return false;
            }
        }
    }
}
