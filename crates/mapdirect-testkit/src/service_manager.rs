//! What systemd does for a service that keeps descriptors with it: sd_notify(3)
//! with `FDSTORE=1`. A helper plays this role, which has one thread.

use crate::process::{listen, say};
use anyhow::{Context, Result, bail};
use mapdirect_sys::sd_listen_fds;
use mapdirect_sys::signal::{Signal, kill};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use rustix::process::{Pid, WaitOptions, waitpid};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A service, and what is kept for it.
struct Service {
    messages: OwnedFd,
    store: Vec<(String, OwnedFd)>,
    process: Option<Pid>,
    arguments: Vec<String>,
    address: String,
}

/// Role: starts a program, keeps what it hands over, and passes it to the next one.
/// Arguments: where messages come, and the program with its arguments. Orders:
/// `start`, `restart` (SIGTERM, and start), `kill` (SIGKILL, and start), `stop`.
/// Each is answered, with how many descriptors are kept.
pub fn play(arguments: &[String]) -> Result<()> {
    let [address, program @ ..] = arguments else {
        bail!("wrong arguments");
    };
    let messages = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::bind(&messages, &SocketAddrUnix::new(Path::new(address))?)?;
    let mut service = Service {
        messages,
        store: Vec::new(),
        process: None,
        arguments: program.to_vec(),
        address: address.clone(),
    };
    say("waiting");
    // Orders are few, and whoever gives one waits for the answer, so messages are
    // heard while one is carried out, and before the next.
    while let Some(order) = listen()? {
        service.hear(Duration::ZERO)?;
        match order.as_str() {
            "start" => service.start()?,
            "restart" => {
                service.end(Signal::TERMINATE)?;
                service.start()?;
            }
            "kill" => {
                service.end(Signal::KILL)?;
                service.start()?;
            }
            "stop" => {
                service.end(Signal::TERMINATE)?;
                service.store.clear();
            }
            other => bail!("no such order: {other}"),
        }
        say(&service.store.len().to_string());
    }
    service.end(Signal::TERMINATE)
}

impl Service {
    /// Starts the program, and waits until it is ready.
    fn start(&mut self) -> Result<()> {
        let (program, arguments) = self.arguments.split_first().context("no program")?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("NOTIFY_SOCKET", &self.address)
            .stdin(Stdio::null());
        let fds: Vec<_> = self
            .store
            .iter()
            .map(|(name, fd)| (name.as_str(), fd.as_fd()))
            .collect();
        self.process = Pid::from_raw(sd_listen_fds::start(&mut command, &fds)?);
        let limit = Instant::now() + Duration::from_secs(60);
        while !self.hear(Duration::from_millis(10))? {
            if Instant::now() > limit {
                bail!("it is not ready");
            }
        }
        Ok(())
    }

    fn end(&mut self, signal: i32) -> Result<()> {
        let Some(process) = self.process.take() else {
            return Ok(());
        };
        kill(process.as_raw_nonzero().get(), signal)?;
        while waitpid(Some(process), WaitOptions::NOHANG)?.is_none() {
            self.hear(Duration::from_millis(5))?;
        }
        // What it has said before it ended.
        self.hear(Duration::ZERO)?;
        Ok(())
    }

    /// Hears what is said until nobody has said anything for so long. Says whether
    /// the service is ready.
    fn hear(&mut self, limit: Duration) -> Result<bool> {
        let mut is_ready = false;
        loop {
            let limit = Timespec::try_from(limit)?;
            if poll(
                &mut [PollFd::new(&self.messages, PollFlags::IN)],
                Some(&limit),
            )? == 0
            {
                return Ok(is_ready);
            }
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut buffer = [0; 4096];
            let message = rustix::net::recvmsg(
                &self.messages,
                &mut [IoSliceMut::new(&mut buffer)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )?;
            let mut fds: Vec<OwnedFd> = Vec::new();
            for ancillary in control.drain() {
                if let RecvAncillaryMessage::ScmRights(more) = ancillary {
                    fds.extend(more);
                }
            }
            let text = String::from_utf8_lossy(&buffer[..message.bytes]).into_owned();
            let has = |line: &str| text.lines().any(|other| other == line);
            let name = text.lines().find_map(|line| line.strip_prefix("FDNAME="));
            let name = name.unwrap_or("stored").to_owned();
            is_ready |= has("READY=1");
            if has("FDSTORE=1") {
                self.store.extend(fds.pop().map(|fd| (name, fd)));
            } else if has("FDSTOREREMOVE=1") {
                self.store.retain(|(other, _)| *other != name);
            }
        }
    }
}
