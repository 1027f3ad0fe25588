//! The guard, as a holder knows it.

use crate::error::{Error, Result};
use crate::holder::{Connection, ENDED, environment, unexpected};
use mapdirect_proto::status::{MAX_STATUS, Status};
use mapdirect_proto::{
    DEFAULT_SOCKET, Gate, PinnedRange, Reply, Request, SOCKET_VARIABLE, WatchedPin,
};
use mapdirect_sys::memfd;
use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// A guard to ask: where it listens.
///
/// Connections are made when they are needed and kept for the process; a
/// child of `fork(2)` makes its own.
///
/// # Examples
///
/// ```no_run
/// let guard = mapdirect::Guard::from_env();
/// println!("{} files pinned", guard.status()?.files.len());
/// # Ok::<(), mapdirect::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Guard {
    socket: PathBuf,
}

impl Default for Guard {
    fn default() -> Self {
        Self::from_env()
    }
}

impl Guard {
    /// The guard that listens at `socket`.
    pub fn at(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// The guard the environment variable `MAPDIRECT_SOCKET` names, or the
    /// one at `/run/mapdirect/guard.sock`.
    ///
    /// A program that runs with more privilege than its caller (set-user-ID,
    /// set-group-ID, file capabilities: `AT_SECURE` of getauxval(3)) ignores
    /// the variable: the caller could have it speak with a guard that is
    /// none.
    #[must_use]
    pub fn from_env() -> Self {
        let socket = environment(SOCKET_VARIABLE).filter(|value| !value.is_empty());
        Self::at(socket.map_or_else(|| PathBuf::from(DEFAULT_SOCKET), PathBuf::from))
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What it is doing: pins, holders, refusals. Callers that are neither
    /// root nor capable of pinning see details only of their own pins.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` when no guard answers.
    pub fn status(&self) -> Result<Status> {
        let asked = |error: Error| error.asking("read the guard's status");
        let connection = self.connect().map_err(asked)?;
        let (reply, mut fds) = connection.call(&Request::Status, &[]).map_err(asked)?;
        let (Reply::Status, Some(file)) = (reply, fds.pop()) else {
            return Err(asked(unexpected()));
        };
        let bytes = memfd::read_sealed(file.as_fd(), MAX_STATUS)
            .map_err(|errno| asked(Error::system("reading the status", errno)))?;
        Status::decode(&bytes).map_err(|_| asked(unexpected()))
    }

    /// The ranges of `file` that are pinned.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` when no guard answers.
    pub fn pinned_ranges(&self, file: &impl AsFd) -> Result<Vec<PinnedRange>> {
        let asked = |error: Error| error.asking("ask which ranges are pinned");
        let connection = self.connect().map_err(asked)?;
        let (reply, _) = connection
            .call(&Request::Query, &[file.as_fd()])
            .map_err(asked)?;
        match reply {
            Reply::Pins(pins, _) => Ok(pins),
            _ => Err(asked(unexpected())),
        }
    }

    /// Which gate it keeps its promises with.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` when no guard answers.
    pub fn gate(&self) -> Result<Gate> {
        Ok(self.connect()?.gate())
    }

    /// The connection of this process, made if there is none that works.
    pub(crate) fn connect(&self) -> Result<Arc<Connection>> {
        let open = OPEN.get_or_init(Mutex::default);
        let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) = open.get(&self.socket)
            && connection.is_usable()
        {
            return Ok(Arc::clone(connection));
        }
        let connection = Arc::new(Connection::open(&self.socket, None)?);
        open.insert(self.socket.clone(), Arc::clone(&connection));
        Ok(connection)
    }

    /// The connection of this process, if there is one that works.
    fn connection(&self) -> Option<Arc<Connection>> {
        let open = OPEN.get_or_init(Mutex::default);
        let open = open.lock().unwrap_or_else(PoisonError::into_inner);
        let connection = open.get(&self.socket)?;
        connection.is_usable().then(|| Arc::clone(connection))
    }

    /// Says that a pin has been let go of. Where programs in the kernel judge,
    /// one of several pins of a file is over when the guard has heard so; this
    /// waits for it, so that a program finds it over that has just let go.
    /// Others may be asking something, or the guard may be stuck, or there may
    /// be none: then it is over a little later.
    pub(crate) fn ended(&self, gate: Gate, pin: WatchedPin) {
        if gate != Gate::Bpf {
            return;
        }
        // A guard that has taken over has not been spoken to yet.
        let connection = self.connection().or_else(|| {
            Connection::open(&self.socket, Some(ENDED))
                .ok()
                .map(Arc::new)
        });
        if let Some(connection) = connection {
            connection.ended(pin);
        }
    }
}

/// The connections of this process, by where their guard listens.
static OPEN: OnceLock<Mutex<HashMap<PathBuf, Arc<Connection>>>> = OnceLock::new();
