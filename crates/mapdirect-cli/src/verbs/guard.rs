//! `mapdirect guard`: run the guard in the foreground.

use crate::args::{GateChoice, GuardArgs};
use crate::{Exit, output};
use anyhow::Result;
use mapdirect_guard::{Config, RefusedOperation, start};
use mapdirect_sys::proc::printable;
use mapdirect_sys::signal::{Signal, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::time::{Duration, Instant};

pub(crate) fn run(args: &GuardArgs) -> Result<Exit> {
    if args.gate == GateChoice::Bpf {
        output::complain(
            "the bpf gate is not part of this version; use --gate fanotify (Linux 6.14 and later)",
        );
        return Ok(Exit::FAILURE);
    }
    // Before any thread is made, so that all of them have it blocked.
    let signals = SignalFd::block(&[Signal::TERMINATE, Signal::INTERRUPT, Signal::HANGUP])?;
    let quiet = args.quiet;
    let log = Mutex::new(Log::new());
    let running = start(Config {
        socket: args.socket.clone(),
        on_refusal: Box::new(move |refused, lost| {
            if !quiet && let Ok(mut log) = log.lock() {
                log.tell(refused, lost);
            }
        }),
    })?;
    output::line(&format!(
        "mapdirect guard: ready, gate fanotify, listening at {}",
        args.socket.display()
    ));
    loop {
        let signal_fd = signals.as_fd();
        let failed_fd = running.failed();
        let mut fds = [
            PollFd::new(&signal_fd, PollFlags::IN),
            PollFd::new(&failed_fd, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        if !fds[1].revents().is_empty() {
            let why = running.failure().unwrap_or("unknown reason").to_owned();
            output::complain(&format!("{why}; pins end now, and holders are told"));
            running.stop();
            return Ok(Exit::FAILURE);
        }
        if !fds[0].revents().is_empty() {
            signals.wait()?;
            let pins = running.pins();
            if pins > 0 {
                output::complain(&format!(
                    "stopping; {pins} pins end now, and their holders are told"
                ));
            }
            running.stop();
            return Ok(Exit::SUCCESS);
        }
    }
}

/// Refusals on stderr, no more than a terminal can take.
struct Log {
    second: Instant,
    said: u32,
    unsaid: u64,
}

/// Lines per second.
const PACE: u32 = 20;

impl Log {
    fn new() -> Self {
        Self {
            second: Instant::now(),
            said: 0,
            unsaid: 0,
        }
    }

    fn tell(&mut self, refused: &RefusedOperation, lost: u64) {
        self.unsaid += lost;
        if self.second.elapsed() >= Duration::from_secs(1) {
            (self.second, self.said) = (Instant::now(), 0);
        }
        if self.said >= PACE {
            self.unsaid += 1;
            return;
        }
        self.said += 1;
        if self.unsaid > 0 {
            output::complain(&format!("{} more refusals, not printed", self.unsaid));
            self.unsaid = 0;
        }
        let range = refused.range.as_ref().map_or_else(String::new, |range| {
            if range.end == u64::MAX {
                format!(", bytes from {}", range.start)
            } else {
                format!(", bytes {} to {}", range.start, range.end)
            }
        });
        output::complain(&format!(
            "refused {} by thread {} ({}) on {} (inode {} of {}){range}",
            refused.operation,
            refused.tid,
            printable(&refused.command),
            printable(&refused.path),
            refused.inode,
            refused.device,
        ));
    }
}
