//! `mapdirect guard`: run the guard in the foreground.

mod declared;
mod opening;

use crate::args::{GateChoice, GuardArgs};
use crate::terminal::{name, told_name, told_word};
use crate::verbs::records;
use crate::{Exit, output};
use anyhow::Result;
use mapdirect::Gate;
use mapdirect_guard::{
    Config, Ended, Notice, RefusedOperation, Running, Starter, Supervision, start, supervise,
};
use mapdirect_sys::signal::{Signal, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, getrlimit, setrlimit};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub(crate) fn run(args: &GuardArgs) -> Result<Exit> {
    if args.unload {
        return unload(args);
    }
    let starter = Starter::of_this_process();
    // Before any thread is made, so that all of them have it blocked.
    let signals = SignalFd::block(&[
        Signal::TERMINATE,
        Signal::INTERRUPT,
        Signal::HANGUP,
        Signal::QUIT,
        Signal::USER_1,
        Signal::USER_2,
    ])?;
    if starter.is_keeper() {
        if !starter.end_with_supervisor() {
            return Ok(Exit::FAILURE);
        }
        // By which it is shown as a holder.
        let _ = rustix::thread::set_name(c"pins.toml");
        let guard = mapdirect::Guard::at(&args.socket);
        declared::keep(&args.pins, &guard, &starter, &signals)?;
        return Ok(Exit::SUCCESS);
    }
    if starter.is_supervisor() {
        if !starter.end_with_supervisor() {
            return Ok(Exit::FAILURE);
        }
        // The name of what was executed says nothing.
        let _ = rustix::thread::set_name(c"mapdirect");
        return guard(args, starter, &signals);
    }
    let program = std::env::args_os().next().unwrap_or_default();
    let supervision = Supervision {
        command: &|| {
            // This very program, whatever is at its path by now.
            let mut command = Command::new("/proc/self/exe");
            command.arg0(&program).args(std::env::args_os().skip(1));
            command
        },
        socket: args.socket.clone(),
        pins: args.pins.clone(),
        signals: &signals,
        say: &output::complain_at_once,
    };
    raise_descriptor_limit();
    Ok(match supervise(&supervision, starter)? {
        Ended::With(status) => Exit::from_code(status.into()),
        Ended::InVain => Exit::FAILURE,
    })
}

/// Raises the soft limit of descriptors to the hard limit: whatever outlives the
/// guard is open here as well.
fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // If this fails, fewer pins outlive a guard.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// Runs the guard itself.
fn guard(args: &GuardArgs, starter: Starter, signals: &SignalFd) -> Result<Exit> {
    let starter = Arc::new(starter);
    let quiet = args.quiet;
    let log = Mutex::new(Log::new());
    let running = start(Config {
        socket: args.socket.clone(),
        gate: match args.gate {
            GateChoice::Auto => mapdirect_guard::GateChoice::Auto,
            GateChoice::Fanotify => mapdirect_guard::GateChoice::Fanotify,
            GateChoice::Bpf => mapdirect_guard::GateChoice::Bpf,
        },
        bpf_directory: args.bpf_directory.clone(),
        policy: args.policy.clone(),
        starter: Arc::clone(&starter),
        on_refusal: Box::new(move |refused, lost| {
            if !quiet && let Ok(mut log) = log.lock() {
                log.tell(refused, lost);
            }
        }),
        on_notice: Box::new(tell_notice),
        on_tampering: Box::new(output::complain_at_once),
        on_giving_way: Box::new(output::complain_at_once),
        journal: if quiet {
            None
        } else {
            crate::journal::of_stderr()
        },
    })?;
    output::line_at_once(&format!(
        "mapdirect guard: ready, gate {}, listening at {}",
        running.gate(),
        name(&args.socket)
    ));
    if let Some(missing) = running.without_tripwire() {
        output::complain_at_once(&format!(
            "no tripwire, so what the gate cannot refuse goes unnoticed: {missing}"
        ));
    }
    let adopted = running.pins();
    if adopted > 0 {
        output::line_at_once(&format!(
            "mapdirect guard: took over {adopted} pins that an earlier guard has granted"
        ));
    }
    // What becomes of pins when the guard ends.
    let fate = match running.gate() {
        Gate::Bpf => "stay, kept by the kernel (mapdirect guard --unload ends them)",
        _ if starter.pins_stay() => "stay for the next guard, unless the service is stopped",
        _ => "end now, and their holders are told",
    };
    let mut watchdog = Watchdog::new(&starter, &running);
    loop {
        let signal_fd = signals.as_fd();
        let failed_fd = running.failed();
        let mut fds = [
            PollFd::new(&signal_fd, PollFlags::IN),
            PollFd::new(&failed_fd, PollFlags::IN),
        ];
        match poll(&mut fds, watchdog.timeout().as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        watchdog.look();
        if !fds[1].revents().is_empty() {
            let why = running.failure().unwrap_or("unknown reason").to_owned();
            output::complain_at_once(&format!("{why}; another guard takes over"));
            starter.stopping(&why);
            running.stop();
            return Ok(Exit::FAILURE);
        }
        if !fds[0].revents().is_empty() {
            let received = signals.wait()?;
            let pins = running.pins();
            match received.number {
                Signal::TERMINATE | Signal::INTERRUPT => {}
                // What a supervisor sends to have a service reload.
                Signal::HANGUP => {
                    reload(&running);
                    continue;
                }
                // Whoever sends one of these by mistake ends no pin by it.
                _ => continue,
            }
            if starter.is_alone() && !starter.pins_stay() {
                running.tell_that_it_ends("the supervisor of the guard has ended");
            }
            if pins > 0 {
                output::complain_at_once(&format!("stopping; {pins} pins {fate}"));
            }
            starter.stopping(&format!("stopping; {pins} pins {fate}"));
            running.stop();
            return Ok(Exit::SUCCESS);
        }
    }
}

/// Reads the policy again.
fn reload(running: &Running) {
    match running.reload_policy() {
        Ok(rules) => output::complain_at_once(&format!(
            "SIGHUP: read the policy again: {rules} rules; {} pins stay as they are",
            running.pins()
        )),
        Err(errors) => {
            for error in errors {
                output::complain_at_once(&format!("SIGHUP: {error}"));
            }
            output::complain_at_once("SIGHUP: the policy stays as it was");
        }
    }
}

/// Tells whoever watches over this process that it does what it should, as long
/// as that is true, and what it is doing.
struct Watchdog<'a> {
    starter: &'a Starter,
    running: &'a Running,
    /// How often to look, and when.
    every: Option<Duration>,
    next: Instant,
    /// An answer to the last question was passed on.
    said: bool,
    pins: Option<usize>,
}

/// How soon a question is answered, as a rule.
const SOON: Duration = Duration::from_millis(20);

impl<'a> Watchdog<'a> {
    fn new(starter: &'a Starter, running: &'a Running) -> Self {
        let watchdog = Self {
            starter,
            running,
            // Several times within the time that is given.
            every: starter.watchdog().map(|limit| limit / 4),
            next: Instant::now(),
            said: true,
            pins: None,
        };
        starter.ready(&watchdog.status(running.pins()));
        watchdog
    }

    fn status(&self, pins: usize) -> String {
        format!("gate {}, pins: {pins}", self.running.gate())
    }

    fn timeout(&self) -> Option<Timespec> {
        self.every?;
        let left = self.next.saturating_duration_since(Instant::now());
        Timespec::try_from(left).ok()
    }

    fn look(&mut self) {
        let (Some(every), now) = (self.every, Instant::now()) else {
            return;
        };
        if now < self.next {
            return;
        }
        if self.said {
            self.running.ask_pulse();
            (self.said, self.next) = (false, now + SOON);
        } else if self.running.has_pulse() {
            self.starter.alive();
            let pins = self.running.pins();
            if self.pins != Some(pins) {
                self.starter.status(&self.status(pins));
                self.pins = Some(pins);
            }
            (self.said, self.next) = (true, now + every);
        } else {
            // Whoever watches loses patience some day.
            self.next = now + SOON * 5;
        }
    }
}

#[cfg(feature = "bpf")]
fn unload(args: &GuardArgs) -> Result<Exit> {
    let there = mapdirect_guard::unload(&args.bpf_directory)?;
    output::line(&format!(
        "mapdirect guard: {} at {}",
        if there {
            "took the gate away"
        } else {
            "there is no gate"
        },
        name(&args.bpf_directory)
    ));
    Ok(Exit::SUCCESS)
}

#[cfg(not(feature = "bpf"))]
fn unload(_args: &GuardArgs) -> Result<Exit> {
    output::complain(
        "this program was built without the bpf gate; build it with its default features",
    );
    Ok(Exit::FAILURE)
}

/// Whatever ends a promise is said, also by a guard that is told to be quiet.
fn tell_notice(notice: &Notice) {
    match notice {
        Notice::Breach(breach) => {
            let cause = breach.cause.as_ref().map_or_else(String::new, |cause| {
                format!("; by {}", records::cause(cause))
            });
            output::complain_at_once(&format!(
                "breach: blocks under a pin have changed: bytes {} to {} of {} (inode {} of {}), \
                 pin {}{cause}",
                breach.range.start,
                breach.range.end,
                told_name(&breach.path),
                breach.inode,
                breach.device,
                breach.pin,
            ));
        }
        Notice::Renamed { pin, how } => output::complain_at_once(&format!("pin {pin}: {how}")),
        Notice::Lost { pin, why } => output::complain_at_once(&format!("pin {pin} is lost: {why}")),
        _ => {}
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
            output::complain_at_once(&format!("{} more refusals, not printed", self.unsaid));
            self.unsaid = 0;
        }
        let range = refused.range.as_ref().map_or_else(String::new, |range| {
            if range.end == u64::MAX {
                format!(", bytes from {}", range.start)
            } else {
                format!(", bytes {} to {}", range.start, range.end)
            }
        });
        output::complain_at_once(&format!(
            "refused {} by thread {} ({}) on {} (inode {} of {}){range}",
            refused.operation,
            refused.tid,
            told_word(&refused.command),
            told_name(&refused.path),
            refused.inode,
            refused.device,
        ));
    }
}
