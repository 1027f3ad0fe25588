//! Talking to the guard.

use crate::error::{Error, Kind, Result};
use mapdirect_proto::{
    Flags, Gate, MAX_MESSAGE, Reply, Request, VERSION, VERSION_WITH_BARRIER, VERSION_WITH_FAMILIES,
    VERSION_WITH_POLICY, WatchedPin, settle,
};
use mapdirect_sys::memfd::By;
use mapdirect_sys::names::path_in_line;
use mapdirect_sys::unix::Socket;
use mapdirect_sys::{Errno, capget, getauxval, memfd};
use std::cell::Cell;
use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long to wait for a guard that is told of an end.
pub(crate) const ENDED: Duration = Duration::from_secs(1);

/// A conversation with a guard.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: Socket,
    /// The process that made it: the guard knows no other on it.
    pid: u32,
    gate: Gate,
    /// The version of the protocol that both sides speak.
    version: u32,
    /// Whoever is asking holds this until the answer is there.
    turn: Mutex<Turn>,
    challenge: [u8; 32],
    /// Whether it is for threads that have the capability. Others ask without a
    /// proof, and the guard's policy decides.
    capable: bool,
    /// A conversation was left in the middle: what comes next would be an
    /// answer to something else.
    broken: AtomicBool,
}

/// Where a conversation stands.
#[derive(Debug, Default)]
struct Turn {
    /// The capability was proven, or cannot be in this user namespace.
    proven: bool,
    /// Answers still to come that nobody waits for.
    owed: u32,
}

impl Connection {
    /// Connects; waits for the guard's first answer for ever, or no longer
    /// than `patience`.
    pub(crate) fn open(path: &Path, patience: Option<Duration>, capable: bool) -> Result<Self> {
        let socket = Socket::connect(path).map_err(|errno| match errno {
            Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM => {
                Error::system("a socket for the guard", errno)
            }
            _ => no_guard(path, errno),
        })?;
        let limited = |limit| {
            socket
                .set_receive_timeout(limit)
                .map_err(|errno| Error::system("SO_RCVTIMEO", errno))
        };
        if patience.is_some() {
            limited(patience)?;
        }
        let talk = Talk {
            socket: &socket,
            refused: Cell::new(false),
        };
        talk.say(&Request::Hello { version: VERSION }, &[])?;
        let (reply, _) = talk.hear()?;
        let Reply::Welcome {
            version,
            gate,
            challenge,
            ..
        } = reply
        else {
            return Err(unexpected());
        };
        let version = settle(version).map_err(|unknown| {
            Error::new(
                Kind::Protocol,
                Errno::PROTONOSUPPORT,
                format!("the guard at {}: {unknown}", path_in_line(path)),
                "use the guard of the same version as the library",
            )
        })?;
        if patience.is_some() {
            limited(None)?;
        }
        Ok(Self {
            socket,
            pid: std::process::id(),
            gate,
            version,
            turn: Mutex::default(),
            challenge,
            capable,
            broken: AtomicBool::new(false),
        })
    }

    pub(crate) fn is_usable(&self) -> bool {
        self.pid == std::process::id() && !self.broken.load(Relaxed) && self.is_alive()
    }

    /// Which gate the guard has.
    pub(crate) fn gate(&self) -> Gate {
        self.gate
    }

    /// Fails if the guard is too old to know what a pin shall be.
    pub(crate) fn require_known(&self, flags: Flags) -> Result<()> {
        if self.version >= VERSION_WITH_FAMILIES || !flags.intersects(Flags::NEW_IN_3) {
            return Ok(());
        }
        Err(Error::new(
            Kind::Protocol,
            Errno::OPNOTSUPP,
            format!(
                "the guard speaks version {} of the protocol, and knows neither strengths nor \
                 families nor denials",
                self.version
            ),
            "use the guard of the same version as the library",
        ))
    }

    /// What the guard answers when it is through with everything before.
    pub(crate) fn barrier(&self) -> Request {
        if self.version >= VERSION_WITH_BARRIER {
            Request::Barrier
        } else {
            Request::Hello {
                version: self.version,
            }
        }
    }

    /// Whether the guard is still there.
    pub(crate) fn is_alive(&self) -> bool {
        self.socket.peer_is_gone() == Ok(false)
    }

    /// Asks once, and returns the answer, unless that is a refusal.
    pub(crate) fn call(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>)> {
        let _turn = self.take_turn()?;
        self.whole(|talk| {
            talk.say(request, fds)?;
            talk.hear()
        })
    }

    /// Asks for something that comes in many answers, of which none has come yet.
    pub(crate) fn begin(&self, request: &Request) -> Result<()> {
        let mut turn = self.take_turn()?;
        self.prove(&mut turn)?;
        self.whole(|talk| talk.say(request, &[]))
    }

    /// The next of these answers, or `None` if there is none in that time.
    pub(crate) fn hear_within(&self, limit: Option<Duration>) -> Result<Option<Reply>> {
        if let Some(limit) = limit
            && self.socket.wait_until_readable(limit) == Ok(false)
        {
            return Ok(None);
        }
        self.whole(|talk| talk.hear().map(|(reply, _)| Some(reply)))
    }

    /// Waits until nobody else asks, and hears what nobody has waited for. Nothing
    /// can be asked where a conversation was left in the middle, nor by a child of
    /// the process that began it: there, whoever has the turn may be no thread of
    /// its own.
    fn take_turn(&self) -> Result<MutexGuard<'_, Turn>> {
        if self.pid != std::process::id() {
            return Err(Error::new(
                Kind::NoGuard,
                Errno::OPNOTSUPP,
                "this process is a child of the one that the guard knows",
                "do it in the process that asked for the pin, or pin the file again",
            ));
        }
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if self.broken.load(Relaxed) {
            return Err(lost(&Errno::PIPE));
        }
        while turn.owed > 0 {
            self.whole(|talk| talk.hear())?;
            turn.owed -= 1;
        }
        Ok(turn)
    }

    /// Requires that the guard knows requests of a version of the protocol.
    pub(crate) fn require_version(&self, version: u32, what: &str) -> Result<()> {
        if self.version >= version {
            return Ok(());
        }
        Err(Error::new(
            Kind::Protocol,
            Errno::OPNOTSUPP,
            format!(
                "the guard is too old to {what}: it speaks version {} of the protocol, and this \
                 needs {version}",
                self.version
            ),
            "run the guard of the same version as the library",
        ))
    }

    /// Proves the capability, once. Where it counts for nothing (in another user
    /// namespace than the initial one) the guard's policy is left to decide.
    fn prove(&self, turn: &mut Turn) -> Result<()> {
        if turn.proven {
            return Ok(());
        }
        let has_policy = self.version >= VERSION_WITH_POLICY;
        if !self.capable {
            return if has_policy {
                Ok(())
            } else {
                Err(missing_capability())
            };
        }
        let by = if has_policy {
            By::Namespace
        } else {
            By::StartTime
        };
        match memfd::prove_immutable_capability(&self.challenge, by) {
            Ok(proof) => {
                self.whole(|talk| {
                    talk.say(&Request::Prove, &[proof.as_fd()])?;
                    talk.hear()
                })?;
            }
            Err(Errno::PERM) if has_policy => {}
            Err(errno) => return Err(not_capable(errno)),
        }
        turn.proven = true;
        Ok(())
    }

    /// Asks for something that needs the capability or a rule of the guard's
    /// policy, and answers nothing back.
    pub(crate) fn ask(&self, request: &Request, file: Option<BorrowedFd<'_>>) -> Result<Reply> {
        let mut turn = self.take_turn()?;
        self.prove(&mut turn)?;
        self.whole(|talk| {
            talk.say(request, file.as_slice())?;
            talk.hear().map(|(reply, _)| reply)
        })
    }

    /// Asks for something that needs the capability or a rule of the guard's
    /// policy; `more` answers what the guard asks back, until it returns
    /// something.
    pub(crate) fn converse<T>(
        &self,
        request: &Request,
        file: BorrowedFd<'_>,
        mut more: impl FnMut(&Talk<'_>, Reply, Vec<OwnedFd>) -> Result<Option<T>>,
    ) -> Result<T> {
        let mut turn = self.take_turn()?;
        self.prove(&mut turn)?;
        self.whole(|talk| {
            talk.say(request, &[file])?;
            loop {
                let (reply, fds) = talk.hear()?;
                if let Some(result) = more(talk, reply, fds)? {
                    return Ok(result);
                }
            }
        })
    }

    /// See [`Guard::ended`](crate::Guard). Returns whether the guard has
    /// confirmed it.
    pub(crate) fn ended(&self, pin: WatchedPin) -> bool {
        let Ok(mut turn) = self.turn.try_lock() else {
            return false;
        };
        // A guard that owes an answer is stuck.
        if turn.owed > 0
            || self
                .whole(|talk| talk.say(&Request::Ended(pin), &[]))
                .is_err()
        {
            return false;
        }
        if self.socket.wait_until_readable(ENDED) == Ok(true) {
            return self.whole(|talk| talk.hear()).is_ok();
        }
        turn.owed += 1;
        false
    }

    /// Runs a conversation, and lets nobody continue one that did not come to
    /// its end: with the answer asked for, or with a refusal.
    fn whole<T>(&self, conversation: impl FnOnce(&Talk<'_>) -> Result<T>) -> Result<T> {
        let talk = Talk {
            socket: &self.socket,
            refused: Cell::new(false),
        };
        let result = conversation(&talk);
        if result.is_err() && !talk.refused.get() {
            self.broken.store(true, Relaxed);
        }
        result
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// One side of a conversation.
pub(crate) struct Talk<'socket> {
    socket: &'socket Socket,
    /// The last thing heard was a refusal.
    refused: Cell<bool>,
}

impl Talk<'_> {
    pub(crate) fn say(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<()> {
        match self.socket.send(&[&request.encode()], fds) {
            Ok(()) => Ok(()),
            // The guard has hung up; it may have said why.
            Err(errno @ (Errno::PIPE | Errno::CONNRESET)) => match self.hear() {
                Err(error) if self.refused.get() => Err(error),
                _ => Err(lost(&errno)),
            },
            Err(errno) => Err(lost(&errno)),
        }
    }

    fn hear(&self) -> Result<(Reply, Vec<OwnedFd>)> {
        let mut buffer = [0; MAX_MESSAGE];
        let received = match self.socket.receive(&mut buffer) {
            // A guard that hangs up without having read everything resets the
            // connection. The kernel says so once, and then delivers what the
            // guard had said before.
            Err(Errno::CONNRESET) => self.socket.receive(&mut buffer),
            received => received,
        };
        let received = received.map_err(|errno| lost(&errno))?;
        if received.length == 0 {
            return Err(lost(&Errno::PIPE));
        }
        if received.truncated {
            // No message fills the buffer: what was cut off are descriptors,
            // for which this process had no number left.
            return Err(if received.length < buffer.len() {
                no_descriptor()
            } else {
                unexpected()
            });
        }
        match Reply::decode(&buffer[..received.length]) {
            Ok(Reply::Refused(refusal)) => {
                self.refused.set(true);
                Err(Error::refused(refusal))
            }
            Ok(reply) => Ok((reply, received.fds)),
            Err(_) => Err(unexpected()),
        }
    }
}

/// A variable of the environment, unless the program runs with more privilege
/// than its caller, whose word the environment is.
pub(crate) fn environment(name: &str) -> Option<OsString> {
    if getauxval::is_secure_execution() {
        return None;
    }
    std::env::var_os(name)
}

fn no_guard(path: &Path, errno: Errno) -> Error {
    Error::new(
        Kind::NoGuard,
        Errno::OPNOTSUPP,
        format!("no guard answers at {}: {errno}", path_in_line(path)),
        // With privileges of its own a program does not listen to the variable.
        if getauxval::is_secure_execution() {
            "start one as root: mapdirect guard"
        } else {
            "start one as root: mapdirect guard (or name another socket in MAPDIRECT_SOCKET)"
        },
    )
    .caused_by(errno)
}

fn lost(errno: &Errno) -> Error {
    Error::new(
        Kind::NoGuard,
        Errno::OPNOTSUPP,
        format!("the guard went away in the middle of the conversation: {errno}"),
        "see whether it still runs: mapdirect status",
    )
    .caused_by(*errno)
}

pub(crate) fn unexpected() -> Error {
    Error::new(
        Kind::Protocol,
        Errno::PROTO,
        "the guard said something that makes no sense here",
        "use the library of the same version as the guard",
    )
}

fn no_descriptor() -> Error {
    Error::new(
        Kind::System,
        Errno::MFILE,
        "this process has too many files open to speak with the guard",
        "raise its limit (RLIMIT_NOFILE), or close some: a pin needs a descriptor of its own",
    )
}

fn not_capable(errno: Errno) -> Error {
    match errno {
        Errno::PERM => missing_capability(),
        Errno::MFILE | Errno::NFILE => no_descriptor(),
        Errno::FBIG => Error::new(
            Kind::System,
            errno,
            "the capability cannot be proven: this process may make no file (RLIMIT_FSIZE)",
            "raise the limit (ulimit -f)",
        ),
        other => Error::new(
            Kind::System,
            Errno::OPNOTSUPP,
            format!(
                "the capability cannot be proven (memfd_create, FS_IOC_SETFLAGS, /proc/self/stat: \
                 {other})"
            ),
            "the proof needs tmpfs with inode flags, Linux 6.0 or later, and proc(5)",
        ),
    }
}

fn missing_capability() -> Error {
    Error::new(
        Kind::NotCapable,
        Errno::ACCESS,
        "the caller lacks CAP_LINUX_IMMUTABLE in the initial user namespace",
        "run it as root, or give it the capability: setcap cap_linux_immutable+ep PROGRAM",
    )
}

/// Whether the calling thread has the capability, which it may have given up since
/// a connection was made.
pub(crate) fn is_capable() -> bool {
    capget::effective(0)
        .is_ok_and(|effective| capget::contains(effective, capget::CAP_LINUX_IMMUTABLE))
}
