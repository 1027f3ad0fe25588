//! Running programs for the task outside.

use crate::filesystems;
use crate::port::Port;
use anyhow::{Context, Result, bail};
use mapdirect_sys::signal::{self, Signal, SignalFd, unblocked_in_child};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, WaitStatus};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use xtask_init::wire::{Message, Program};

/// As much as a virtio-serial port takes at once.
const PIECE: usize = 32 << 10;

/// What a program writes.
struct Output {
    pipe: OwnedFd,
    message: fn(Vec<u8>) -> Message,
    /// Every writer has closed it.
    ended: bool,
}

impl Output {
    fn new(pipe: impl Into<OwnedFd>, message: fn(Vec<u8>) -> Message) -> Result<Self> {
        let pipe = pipe.into();
        let flags = fcntl_getfl(&pipe)?;
        fcntl_setfl(&pipe, flags | OFlags::NONBLOCK)?;
        Ok(Self {
            pipe,
            message,
            ended: false,
        })
    }

    /// Passes a piece of it on and says how long that was.
    fn relay(&mut self, port: &mut Port) -> Result<u64> {
        let mut piece = vec![0; PIECE];
        match rustix::io::read(&self.pipe, &mut piece) {
            Ok(0) => {
                self.ended = true;
                Ok(0)
            }
            Ok(length) => {
                piece.truncate(length);
                port.send(&(self.message)(piece))?;
                Ok(length as u64)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Passes on what is in the pipe now, and not what somebody else may go
    /// on to write.
    fn relay_rest(&mut self, port: &mut Port) -> Result<()> {
        let mut rest = rustix::io::ioctl_fionread(&self.pipe)?;
        while rest > 0 {
            let relayed = self.relay(port)?;
            if relayed == 0 {
                break;
            }
            rest = rest.saturating_sub(relayed);
        }
        Ok(())
    }
}

/// Does as it is told until it is told to finish, or the task is gone.
pub(crate) fn serve(port: &mut Port, children: &SignalFd) -> Result<()> {
    // Of programs that have ended, too: what they left running may write.
    let mut outputs: Vec<Output> = Vec::new();
    let mut last = None;
    loop {
        let mut fds = vec![
            PollFd::new(&*port, PollFlags::IN),
            PollFd::new(children, PollFlags::IN),
        ];
        fds.extend(
            outputs
                .iter()
                .map(|output| PollFd::new(&output.pipe, PollFlags::IN)),
        );
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno).context("cannot wait"),
        }
        let happened: Vec<_> = fds.iter().map(PollFd::revents).collect();
        for (output, happened) in outputs.iter_mut().zip(&happened[2..]) {
            if !happened.is_empty() {
                output.relay(port)?;
            }
        }
        if !happened[1].is_empty() {
            children.wait()?;
            // Signals of several children can become one.
            while let Some((pid, status)) = reap()? {
                if last == Some(pid) {
                    last = None;
                    for output in &mut outputs {
                        output.relay_rest(port)?;
                    }
                    port.send(&Message::Exited(status))?;
                }
            }
        }
        outputs.retain(|output| !output.ended);
        if happened[0].contains(PollFlags::HUP) {
            bail!("the task outside is gone");
        }
        if happened[0].contains(PollFlags::IN) {
            port.read()?;
        }
        while let Some(message) = port.received()? {
            match message {
                Message::Run(program) => match start(&program, &mut outputs)? {
                    Ok(pid) => last = Some(pid),
                    Err(errno) => port.send(&Message::NotStarted(errno))?,
                },
                Message::Finish => {
                    finish();
                    port.send(&Message::Finished)?;
                }
                other => bail!("the task outside sent {other:?}"),
            }
        }
    }
}

/// Starts a program, or says which errno stood in the way.
fn start(program: &Program, outputs: &mut Vec<Output>) -> Result<Result<Pid, i32>> {
    let Some((name, arguments)) = program.words.split_first() else {
        return Ok(Err(Errno::INVAL.raw_os_error()));
    };
    let mut command = Command::new(name);
    command
        .args(arguments)
        .current_dir(&program.directory)
        .env_clear()
        .envs(
            program
                .environment
                .iter()
                .map(|(name, value)| (name, value)),
        )
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    unblocked_in_child(&mut command);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let unknown = Errno::IO.raw_os_error();
            return Ok(Err(error.raw_os_error().unwrap_or(unknown)));
        }
    };
    let stdout = child.stdout.take().context("no output")?;
    let stderr = child.stderr.take().context("no output")?;
    outputs.push(Output::new(stdout, Message::Out)?);
    outputs.push(Output::new(stderr, Message::Err)?);
    // Reaped with all others, below.
    Ok(Ok(Pid::from_child(&child)))
}

/// A child that has ended, and its exit status as a shell would give it.
fn reap() -> Result<Option<(Pid, u8)>> {
    match rustix::process::wait(WaitOptions::NOHANG) {
        Ok(ended) => Ok(ended.map(|(pid, status)| (pid, exit_status(status)))),
        Err(Errno::CHILD) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn exit_status(status: WaitStatus) -> u8 {
    let signalled = || status.terminating_signal().map(|signal| 128 + signal);
    let status = status.exit_status().or_else(signalled);
    status
        .and_then(|status| u8::try_from(status).ok())
        .unwrap_or(u8::MAX)
}

/// Leaves every disk as it should be left.
fn finish() {
    // To all but this one.
    let _ = signal::kill(-1, Signal::KILL);
    while !matches!(
        rustix::process::wait(WaitOptions::empty()),
        Err(Errno::CHILD)
    ) {}
    filesystems::unmount_disks();
}
