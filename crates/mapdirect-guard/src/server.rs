//! Starts and stops a guard, and accepts clients.

use crate::audit::journald::Journald;
use crate::audit::keep::Tellers;
use crate::delegation::{self, Delegation, PolicyError};
use crate::gate::Gate;
use crate::places::{self, Limits, Places, Standing};
use crate::session::Session;
use crate::socket::listen_or_go_on;
use crate::store::Starter;
use crate::wake::{Waker, wait_any};
use crate::{Errno, Guard, audit, gate, needs, tripwire};
use mapdirect_proto::status::RefusedOperation;
use mapdirect_proto::{Notice, Refusal, Reply};
use mapdirect_sys::names::path_in_line;
use mapdirect_sys::unix::Socket;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

/// The configuration of a guard.
pub struct Config {
    /// The path of the socket to listen at.
    pub socket: PathBuf,
    /// The gate that refuses operations which would break a pin.
    pub gate: GateChoice,
    /// The directory in which the bpf gate is pinned.
    pub bpf_directory: PathBuf,
    /// The policy: [`Policy::load`](crate::Policy::load).
    pub policy: PathBuf,
    /// Whoever started this process.
    pub starter: Arc<Starter>,
    /// Called for every refusal, by a thread that may block, with the number
    /// of refusals lost before it because they came too fast.
    pub on_refusal: Box<OnRefusal>,
    /// Called for every breach and for every lost pin, by the same thread.
    pub on_notice: Box<OnNotice>,
    /// Called when somebody has tampered with the gate, with the result.
    pub on_tampering: Box<OnTampering>,
    /// Called when pins give way for their holder, or hold again, with words
    /// about it, by the thread that calls `on_refusal`.
    pub on_giving_way: Box<OnGivingWay>,
    /// The socket of a journal (of systemd) that gets an entry for every record.
    /// What the journal takes is not given to `on_refusal` or `on_notice`.
    pub journal: Option<PathBuf>,
}

/// Which gate to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateChoice {
    /// The bpf gate if it loads, otherwise the fanotify gate.
    Auto,
    /// The fanotify gate: permission events.
    Fanotify,
    /// The bpf gate: programs in the kernel.
    Bpf,
}

/// The type of [`Config::on_refusal`].
pub type OnRefusal = dyn Fn(&RefusedOperation, u64) + Send;

/// The type of [`Config::on_notice`].
pub type OnNotice = dyn Fn(&Notice) + Send;

/// The type of [`Config::on_tampering`].
pub type OnTampering = dyn Fn(&str) + Send;

/// The type of [`Config::on_giving_way`].
pub type OnGivingWay = dyn Fn(&str) + Send;

/// Why a guard did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The process lacks capabilities.
    #[error(
        "the guard lacks {missing}; with the {gate} gate it needs {needed}\n  \
         help: run it as root, or give its unit all of them"
    )]
    NotPrivileged {
        /// The missing capabilities, and what each is needed for.
        missing: String,
        /// The gate that the guard was to have.
        gate: mapdirect_proto::Gate,
        /// All capabilities that this gate needs.
        needed: String,
    },
    /// Something else is missing that the guard needs.
    #[error("{what}\n  help: {help}")]
    Missing {
        /// What is missing, and what follows from that.
        what: String,
        /// What to do about it.
        help: String,
    },
    /// The guard could not see every process.
    #[error(
        "the guard must run in the initial PID namespace, where it can see every process\n  \
         help: run it on the host, not in a container"
    )]
    PidNamespace,
    /// The kernel lacks the events of the fanotify gate.
    #[error(
        "this kernel has no pre-content permission events to watch files with ({0})\n  \
         help: boot Linux 6.14 or later with CONFIG_FANOTIFY_ACCESS_PERMISSIONS, or use the bpf \
         gate; see `mapdirect doctor`"
    )]
    NoGate(Errno),
    /// The bpf gate could not be loaded.
    #[error("the bpf gate cannot be had: {0}")]
    NoBpf(String),
    /// The policy is wrong. Every mistake is on a line of its own.
    #[error(
        "the policy is wrong:\n  {0}\n  \
         help: mend it (mapdirect policy check), or move it away"
    )]
    Policy(String),
    /// Another guard is running already.
    #[error("another guard listens at {}; end it first, or give another --socket", path_in_line(.0))]
    AlreadyRunning(PathBuf),
    /// Something else is where the socket should be. It is not followed, nor removed.
    #[error(
        "cannot listen at {}: {what} is there\n  \
         help: move it away, or give another --socket",
        path_in_line(path)
    )]
    InTheWay {
        /// The path of the socket.
        path: PathBuf,
        /// What is there.
        what: &'static str,
    },
    /// The socket could not be created.
    #[error("cannot listen at {}: {errno}", path_in_line(path))]
    Socket {
        /// The path of the socket.
        path: PathBuf,
        /// The error.
        errno: Errno,
    },
    /// A system call failed.
    #[error("{call} failed: {errno}")]
    System {
        /// The call, or what it was for.
        call: &'static str,
        /// The error.
        errno: Errno,
    },
}

/// Separates the obstacle from the help at the end of a displayed error.
const HELP: &str = "\n  help: ";

impl StartError {
    /// What is wrong, without the help.
    #[must_use]
    pub fn obstacle(&self) -> String {
        let said = self.to_string();
        match said.split_once(HELP) {
            Some((obstacle, _)) => obstacle.to_owned(),
            None => said,
        }
    }

    /// What to do about it. Empty if nothing is known.
    #[must_use]
    pub fn help(&self) -> String {
        let said = self.to_string();
        let help = said.split_once(HELP).map(|(_, help)| help);
        help.unwrap_or_default().to_owned()
    }
}

/// A guard that is running.
#[derive(Debug)]
pub struct Running {
    shared: Arc<Shared>,
    opened: Opened,
    socket: PathBuf,
    identity: Option<(u64, u64)>,
}

#[derive(Debug)]
struct Shared {
    guard: Guard,
    failed: Waker,
    failure: OnceLock<String>,
}

impl Shared {
    fn fail(&self, what: &str, errno: Errno) {
        let _ = self.failure.set(format!("{what}: {errno}"));
        self.failed.wake();
    }
}

fn list(errors: &[PolicyError]) -> String {
    let lines: Vec<_> = errors.iter().map(ToString::to_string).collect();
    lines.join("\n  ")
}

/// How long to wait for the last answers of the gate.
const ANSWERS: Duration = Duration::from_millis(300);

/// The stack size of a client's thread: a grant needs some 40 KiB.
const SESSION_STACK: usize = 256 * 1024;

/// Starts a guard. When this returns, the guard listens.
///
/// The calling process must not fork for as long as the guard runs. Before the
/// call it must block or ignore the signals by which it does not want to die.
///
/// # Errors
///
/// [`StartError`]. Nothing is left behind then.
pub fn start(config: Config) -> Result<Running, StartError> {
    // Taking a lease for a moment may raise SIGIO, whose default is to end the
    // process.
    mapdirect_sys::signal::ignore(libc::SIGIO).map_err(|errno| StartError::System {
        call: "ignoring SIGIO",
        errno,
    })?;
    let limits = Limits::of_process(raise_descriptor_limit());
    let delegation = Delegation::new(config.policy.clone(), descriptor_limit())
        .map_err(|errors| StartError::Policy(list(&errors)))?;
    let opened = open_gate(&config)?;
    let starter = Arc::clone(&config.starter);
    let guard = Guard::new(opened.gate(), limits, delegation, starter);
    let guard = guard.map_err(|errno| StartError::System {
        call: "preparing to start",
        errno,
    })?;
    opened.adopt(&guard)?;
    let shared = Arc::new(Shared {
        guard,
        failed: Waker::new().map_err(|errno| StartError::System {
            call: "eventfd",
            errno,
        })?,
        failure: OnceLock::new(),
    });
    let (listener, identity) = listen_or_go_on(&config)?;

    let spawn = |name: &str, run: Box<dyn FnOnce(&Shared) + Send>| {
        let shared = Arc::clone(&shared);
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run(&shared))
            .map_err(|error| StartError::System {
                call: "starting a thread",
                errno: Errno::from_io_error(&error).unwrap_or(Errno::AGAIN),
            })
    };
    for task in opened.gate().tasks(config.on_tampering) {
        let serve = move |shared: &Shared| {
            if let Err(errno) = (task.run)(&shared.guard) {
                shared.fail(task.failure, errno);
                // Whoever watches this thread takes its end for that of the guard,
                // which shall say first why.
                thread::sleep(ANSWERS);
            }
        };
        spawn(task.name, Box::new(serve))?;
    }
    opened.settle(&shared.guard);
    // Those who wait at the gate do not wait for what follows.
    crate::supervise::is_not_urgent_any_more();
    if let Some(gate) = opened.fanotify() {
        spawn("adopt", Box::new(move |shared| gate.listen(&shared.guard)))?;
    }
    let looking = Arc::clone(&shared);
    spawn(
        "tripwire",
        Box::new(move |shared| {
            let start = move |run: fn(&Guard)| {
                let shared = Arc::clone(&looking);
                let thread = thread::Builder::new().name(String::from("look"));
                let thread = thread.stack_size(SESSION_STACK);
                thread.spawn(move || run(&shared.guard)).is_ok()
            };
            if let Err(errno) = tripwire::run(&shared.guard, &start) {
                shared.fail("the tripwire cannot go on", errno);
            }
        }),
    )?;
    let journald = config.journal.as_deref().map(Journald::new);
    let tellers = Tellers {
        refusal: config.on_refusal,
        notice: config.on_notice,
        giving_way: config.on_giving_way,
        journald: journald.transpose().map_err(|error| StartError::System {
            call: "making a socket for the journal",
            errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
        })?,
    };
    spawn(
        "audit",
        Box::new(move |shared| audit::keep::run(&shared.guard, &tellers)),
    )?;
    spawn(
        "policy",
        Box::new(|shared| delegation::ends::run(&shared.guard)),
    )?;
    let accepting = Arc::clone(&shared);
    spawn(
        "accept",
        Box::new(move |shared| accept_clients(&accepting, &listener, &shared.guard.places)),
    )?;
    Ok(Running {
        shared,
        opened,
        socket: config.socket,
        identity,
    })
}

impl Running {
    /// Becomes readable when the guard cannot go on; [`failure`](Self::failure)
    /// says why. The process must then end, so that holders are told.
    #[must_use]
    pub fn failed(&self) -> BorrowedFd<'_> {
        self.shared.failed.as_fd()
    }

    /// Why the guard cannot go on, or `None` if it can.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.shared.failure.get().map(String::as_str)
    }

    /// Asks the threads that others wait for whether they make progress.
    pub fn ask_pulse(&self) {
        self.shared.guard.pulse.ask();
        self.shared.guard.waiting.wake();
    }

    /// Whether they do: they have seen the last question.
    #[must_use]
    pub fn has_pulse(&self) -> bool {
        self.shared.guard.pulse.is_answered()
    }

    /// The number of pins.
    #[must_use]
    pub fn pins(&self) -> usize {
        let files = self.shared.guard.table.all();
        files.iter().map(|file| file.pins.load().len()).sum()
    }

    /// Why the guard does not notice what the gate cannot refuse, or `None` if
    /// it does.
    #[must_use]
    pub fn without_tripwire(&self) -> Option<String> {
        self.shared.guard.tripwire.missing()
    }

    /// Reads the policy again, and returns the number of its rules.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with it. The policy then stays as it was.
    pub fn reload_policy(&self) -> Result<usize, Vec<PolicyError>> {
        self.shared.guard.delegation.reload()
    }

    /// Tells holders at once that this guard is about to end, and nobody is there to
    /// start another one. The kernel may take long to take the process apart.
    pub fn tell_that_it_ends(&self, why: &str) {
        let guard = &self.shared.guard;
        if guard.gate.kind() == mapdirect_proto::Gate::Fanotify {
            guard.notices.lost_all(&guard.table, why);
        }
        guard.notices.hang_up();
    }

    /// The gate that the guard has.
    #[must_use]
    pub fn gate(&self) -> mapdirect_proto::Gate {
        self.shared.guard.gate.kind()
    }

    /// Stops accepting clients and removes the socket. The pins of the fanotify
    /// gate end with the process, which tells their holders. The bpf gate stays
    /// in the kernel, unless nothing is pinned.
    pub fn stop(self) {
        let there = rustix::fs::lstat(&self.socket)
            .ok()
            .map(|stat| (stat.st_dev, stat.st_ino));
        // Another guard may have put its own socket there.
        if there.is_some() && there == self.identity {
            let _ = rustix::fs::unlink(&self.socket);
        }
        self.shared.guard.stop();
        let guard = &self.shared.guard;
        if guard.starter.keeps() {
            // What was read is answered here, and what comes now waits for the
            // next guard.
            guard.pulse.wait_for_gate(ANSWERS);
        }
        if let Some(dormancy) = guard.gate.dormancy() {
            dormancy.spoil_all(guard);
        }
        if self.shared.guard.table.all().is_empty() {
            self.opened.remove();
        }
    }
}

/// The gate of a guard, by its kind.
#[derive(Debug)]
enum Opened {
    Fanotify(Arc<gate::fanotify::Gate>),
    #[cfg(feature = "bpf")]
    Bpf(Arc<gate::bpf::Gate>),
}

impl Opened {
    fn gate(&self) -> Arc<dyn Gate> {
        match self {
            Self::Fanotify(gate) => Arc::clone(gate) as Arc<dyn Gate>,
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => Arc::clone(gate) as Arc<dyn Gate>,
        }
    }

    fn fanotify(&self) -> Option<Arc<gate::fanotify::Gate>> {
        match self {
            Self::Fanotify(gate) => Some(Arc::clone(gate)),
            #[cfg(feature = "bpf")]
            Self::Bpf(_) => None,
        }
    }

    /// Takes over the pins that an earlier guard has left in the kernel, if the
    /// gate was there before this guard.
    fn adopt(&self, guard: &Guard) -> Result<(), StartError> {
        match self {
            Self::Fanotify(gate) => {
                let nonsense = gate.recognise(guard).map_err(|errno| StartError::System {
                    call: "answering events that an earlier guard has read",
                    errno,
                })?;
                for _ in 0..nonsense {
                    guard.audit.say(String::from(
                        "a record of an earlier guard makes no sense; if it was a pin's, that pin \
                         is lost",
                    ));
                }
            }
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) if gate.is_adopted() => gate::bpf::adopt(guard, gate),
            #[cfg(feature = "bpf")]
            Self::Bpf(_) => {}
        }
        Ok(())
    }

    /// Takes over the rest, when the gate's thread answers.
    fn settle(&self, guard: &Guard) {
        match self {
            Self::Fanotify(gate) => gate.settle(guard),
            #[cfg(feature = "bpf")]
            Self::Bpf(_) => {}
        }
    }

    /// Removes the gate if it would outlive its guard. The next guard takes
    /// over what cannot be removed now.
    fn remove(&self) {
        match self {
            Self::Fanotify(_) => {}
            #[cfg(feature = "bpf")]
            Self::Bpf(gate) => drop(gate.remove()),
        }
    }
}

fn no_fanotify(errno: Errno) -> StartError {
    match errno {
        Errno::MFILE => StartError::Missing {
            what: String::from("there are as many fanotify groups as one user may have"),
            help: String::from("end other watchers, or raise fs.fanotify.max_user_groups"),
        },
        // The store says the same as the call.
        Errno::NFILE => StartError::Missing {
            what: String::from(
                "the supervisor of the guard, or the system, has too few descriptors",
            ),
            help: String::from("raise the limit (ulimit -n, LimitNOFILE; fs.file-max)"),
        },
        other => StartError::NoGate(other),
    }
}

fn open_fanotify(config: &Config) -> Result<Opened, StartError> {
    needs::require(mapdirect_proto::Gate::Fanotify)?;
    let gate = gate::fanotify::Gate::new(&config.starter).map_err(no_fanotify)?;
    Ok(Opened::Fanotify(Arc::new(gate)))
}

#[cfg(feature = "bpf")]
fn open_gate(config: &Config) -> Result<Opened, StartError> {
    if config.gate == GateChoice::Fanotify {
        return open_fanotify(config);
    }
    needs::require(mapdirect_proto::Gate::Bpf)?;
    match gate::bpf::Gate::new(&config.bpf_directory) {
        Ok(gate) => Ok(Opened::Bpf(Arc::new(gate))),
        // If the kernel can never load the bpf gate, use the fanotify gate.
        Err(error) if error.is_for_good() && config.gate == GateChoice::Auto => {
            open_fanotify(config)
        }
        Err(error) => Err(match error.help() {
            Some(help) => StartError::Missing {
                what: format!("the bpf gate is {error}"),
                help,
            },
            None => StartError::NoBpf(error.to_string()),
        }),
    }
}

#[cfg(not(feature = "bpf"))]
fn open_gate(config: &Config) -> Result<Opened, StartError> {
    if config.gate == GateChoice::Bpf {
        return Err(StartError::NoBpf(String::from(
            "this program was built without it; build it with its default features",
        )));
    }
    open_fanotify(config)
}

/// Raises the soft limit of descriptors to the hard limit, because events and
/// clients need descriptors. The soft limit is made for programs that use
/// select(2). Returns the number of descriptors, if it is limited.
fn raise_descriptor_limit() -> Option<u64> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // If this fails, fewer clients fit.
    let _ = setrlimit(Resource::Nofile, limit);
    getrlimit(Resource::Nofile).current
}

/// The number of descriptors that the guard may have.
pub(crate) fn descriptor_limit() -> usize {
    use rustix::process::{Resource, getrlimit};
    getrlimit(Resource::Nofile)
        .current
        .map_or(usize::MAX, |limit| {
            usize::try_from(limit).unwrap_or(usize::MAX)
        })
}

fn accept_clients(shared: &Arc<Shared>, listener: &Socket, places: &Arc<Places>) {
    while !shared.guard.is_stopping() {
        let pulse = &shared.guard.pulse;
        pulse.accept_beats();
        let [_, woken] =
            wait_any(&[listener.as_fd(), pulse.waker.as_fd()], None).unwrap_or_default();
        if woken {
            pulse.waker.clear();
            continue;
        }
        let Ok(socket) = listener.accept() else {
            // Descriptors or memory are short: others must free some first.
            thread::sleep(Duration::from_millis(50));
            continue;
        };
        shared.guard.gate.has_descriptor(socket.as_fd().as_raw_fd());
        let Ok(peer) = socket.peer() else {
            continue;
        };
        // Nothing of this is read from /proc, where a stranger could make it wait.
        let is_named = || {
            let groups = socket.peer_groups().unwrap_or_default();
            shared.guard.delegation.names(peer.uid, &groups)
        };
        let place = match places.take(peer.uid, Standing::of(peer, is_named)) {
            Ok(place) => place,
            Err(refusal) => {
                refuse(&socket, refusal);
                continue;
            }
        };
        let serve = Arc::clone(shared);
        // If no thread can be started, the client must be told. The closure is
        // gone by then, so the socket must be reachable outside of it.
        let handed_over = Arc::new(Mutex::new(Some(socket)));
        let client = Arc::clone(&handed_over);
        let started = thread::Builder::new()
            .name(String::from("session"))
            .stack_size(SESSION_STACK)
            .spawn(move || {
                if matches!(place.standing(), Standing::Stranger | Standing::Named) {
                    let own = rustix::thread::gettid();
                    // If this fails, the client is served all the same.
                    let _ = rustix::process::setpriority_process(Some(own), LEAST_URGENT);
                }
                let socket = client.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(socket) = socket
                    && let Ok(session) = Session::new(&serve.guard, socket)
                {
                    session.run(&place);
                }
            });
        if started.is_err() {
            let socket = handed_over
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            if let Some(socket) = socket {
                refuse(&socket, places::no_thread());
            }
        }
    }
}

/// The nice value of threads that serve clients without the capability: a crowd of
/// them must not keep the processors from clients that have it.
const LEAST_URGENT: i32 = 19;

/// Tells a client that it is not served. A client that has already said hello
/// may find its connection reset before it reads this.
fn refuse(socket: &Socket, refusal: Refusal) {
    let _ = socket.send_now(&[&Reply::Refused(refusal).encode()], &[]);
}
