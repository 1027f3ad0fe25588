//! The guard, as a holder knows it.

use crate::error::{Error, Kind, Result};
use crate::establish::offset_and_length;
use crate::holder::{self, Connection, ENDED, environment, is_capable, unexpected};
use crate::report::PinnedRange;
use crate::status::Status;
use mapdirect_proto::status as wire;
use mapdirect_proto::{
    ArmRequest, DEFAULT_SOCKET, Gate, MAX_STATUS, Reply, Request, SOCKET_VARIABLE,
    VERSION_WITH_POLICY, WatchedPin, Who, decode_status,
};
use mapdirect_sys::{Errno, memfd};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A guard to ask, named by the socket that it listens at.
///
/// The process connects when it first asks something and keeps the connection.
/// A child of `fork(2)` makes its own. When a guard has been replaced, the next
/// question connects again.
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
    /// [`Guard::from_env`].
    fn default() -> Self {
        Self::from_env()
    }
}

impl Guard {
    /// The guard that listens at `socket`. Nothing is asked of it yet.
    pub fn at(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// The guard that the environment variable `MAPDIRECT_SOCKET` names, or the
    /// one at `/run/mapdirect/guard.sock`.
    ///
    /// A program that runs with more privilege than its caller (set-user-ID,
    /// set-group-ID, file capabilities: `AT_SECURE` of getauxval(3)) ignores
    /// the variable: the caller could have it speak with an impostor.
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

    /// What it is doing: pins, holders, refusals, breaches. Callers that are
    /// neither root nor capable of pinning see paths, processes and refusals
    /// only of files that they themselves have pinned.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` when no guard answers.
    pub fn status(&self) -> Result<Status> {
        self.wire_status()
            .map(Status::of)
            .map_err(|error| error.asking("read the guard's status"))
    }

    fn wire_status(&self) -> Result<wire::Status> {
        let connection = self.connect()?;
        let (reply, mut fds) = connection.call(&Request::Status, &[])?;
        let (Reply::Status, Some(file)) = (reply, fds.pop()) else {
            return Err(unexpected());
        };
        let bytes = memfd::read_sealed(file.as_fd(), MAX_STATUS)
            .map_err(|errno| Error::system("reading the status", errno))?;
        decode_status(&bytes).map_err(|_| unexpected())
    }

    /// All ranges of `file` that are pinned, in any order, whichever process
    /// holds them. Every process that has the file open may ask.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` when no guard answers, `EBADF`.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// let file = std::fs::File::open("image")?;
    /// for pinned in mapdirect::Guard::from_env().pinned_ranges(&file)? {
    ///     println!("bytes {:?} by process {}", pinned.range, pinned.pid);
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn pinned_ranges(&self, file: impl AsFd) -> Result<Vec<PinnedRange>> {
        self.ask_pinned_ranges(file.as_fd())
            .map_err(|error| error.asking("ask which ranges are pinned"))
    }

    fn ask_pinned_ranges(&self, file: BorrowedFd<'_>) -> Result<Vec<PinnedRange>> {
        let (reply, _) = self.connect()?.call(&Request::Query, &[file])?;
        let Reply::Pins(pins, omitted) = reply else {
            return Err(unexpected());
        };
        if omitted == 0 {
            return Ok(pins.into_iter().map(PinnedRange::of).collect());
        }
        // A message has room for some hundreds. The status has them all, and
        // hides ranges from nobody.
        let stat = rustix::fs::fstat(file).map_err(|errno| Error::system("fstat", errno))?;
        let (major, minor) = (
            rustix::fs::major(stat.st_dev),
            rustix::fs::minor(stat.st_dev),
        );
        let files = self.wire_status()?.files;
        let found = files.into_iter().find(|file| {
            (file.inode, file.device.major, file.device.minor) == (stat.st_ino, major, minor)
        });
        let pins = found.map(|file| file.pins).unwrap_or_default();
        Ok(pins
            .into_iter()
            .map(|pin| {
                PinnedRange::of(mapdirect_proto::PinnedRange {
                    pin: pin.pin,
                    range: pin.range,
                    flags: pin.flags,
                    pid: pin.pid,
                })
            })
            .collect())
    }

    /// The gate that it keeps its promises with.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` when no guard answers.
    pub fn gate(&self) -> Result<Gate> {
        Ok(self.connect()?.gate())
    }

    /// Ends a pin, whoever holds it. Its holder is told that the pin is lost, and
    /// anybody may change the blocks from then on. Needs `CAP_LINUX_IMMUTABLE` in
    /// the initial user namespace.
    ///
    /// # Errors
    ///
    /// `EACCES`, `ENOENT` if there is no such pin, `EOPNOTSUPP` when no guard
    /// answers or the guard is too old.
    pub fn unpin(&self, pin: u64) -> Result<()> {
        self.order(&Request::Unpin(pin), None, "end a pin")
            .map_err(|error| error.asking(format!("end pin {pin}")))
    }

    /// Lets somebody without the capability pin a file for some seconds. `file`
    /// may be open in any way, `O_PATH` included. The permission is for the file
    /// itself, whatever its name becomes, and for `range` of it, extended to
    /// whole blocks. Whoever uses it must be able to open the file. Pins that
    /// were granted stay when the time is over. Needs `CAP_LINUX_IMMUTABLE` in
    /// the initial user namespace.
    ///
    /// # Errors
    ///
    /// `EACCES`, `EINVAL` for an empty range or no time at all, `EAGAIN` when too
    /// much is armed, `EOPNOTSUPP` when no guard answers, the guard is too old, or
    /// the file's filesystem has no pins.
    pub fn arm(
        &self,
        file: impl AsFd,
        who: Who,
        range: Option<Range<u64>>,
        seconds: u32,
    ) -> Result<()> {
        let asked = |error: Error| error.asking("arm a file");
        let (offset, length) = offset_and_length(range.as_ref()).map_err(asked)?;
        let request = Request::Arm(ArmRequest {
            who,
            offset,
            length,
            seconds,
        });
        self.order(&request, Some(file.as_fd()), "arm files")
            .map_err(asked)
    }

    /// Takes back what [`arm`](Self::arm) has permitted for a file. Pins that
    /// were granted stay.
    ///
    /// # Errors
    ///
    /// As [`arm`](Self::arm); `ENOENT` if the file is not armed.
    pub fn disarm(&self, file: impl AsFd) -> Result<()> {
        self.order(&Request::Disarm, Some(file.as_fd()), "arm files")
            .map_err(|error| error.asking("disarm a file"))
    }

    fn order(&self, request: &Request, file: Option<BorrowedFd<'_>>, what: &str) -> Result<()> {
        let connection = self.connect()?;
        connection.require_version(VERSION_WITH_POLICY, what)?;
        match connection.ask(request, file)? {
            Reply::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// The connection of this process for threads like the calling one, made if
    /// there is none that works.
    pub(crate) fn connect(&self) -> Result<Arc<Connection>> {
        let capable = is_capable();
        let mut open = holder::connections();
        let name = (self.socket.clone(), capable);
        if let Some(connection) = open.get(&name)
            && connection.is_usable()
        {
            return Ok(Arc::clone(connection));
        }
        let connection = Arc::new(Connection::open(&self.socket, None, capable)?);
        open.insert(name, Arc::clone(&connection));
        Ok(connection)
    }

    /// The connection of this process, if there is one that works.
    fn connection(&self) -> Option<Arc<Connection>> {
        let open = holder::connections();
        let mut usable = [true, false]
            .into_iter()
            .filter_map(|capable| open.get(&(self.socket.clone(), capable)))
            .filter(|connection| connection.is_usable());
        usable.next().cloned()
    }

    /// Says that a pin has been let go of, and waits until the guard confirms
    /// that it is over; a second at most.
    ///
    /// When programs in the kernel judge, one of several pins of a file is over
    /// only when the guard has heard so. A program that has just let go of a pin
    /// shall find it over. When another thread is asking something, or the guard
    /// is stuck or gone, the pin ends a little later, and this is an error.
    pub(crate) fn ended(&self, gate: Gate, pin: WatchedPin) -> Result<()> {
        if gate != Gate::Bpf {
            return Ok(());
        }
        // A guard that has taken over has not been spoken to yet.
        let connection = self.connection().or_else(|| {
            Connection::open(&self.socket, Some(ENDED), is_capable())
                .ok()
                .map(Arc::new)
        });
        if connection.is_some_and(|connection| connection.ended(pin)) {
            return Ok(());
        }
        Err(Error::new(
            Kind::NoGuard,
            Errno::TIMEDOUT,
            "this process has let go of the pin, but the guard has not confirmed that it is over",
            "nothing needs to be done: a pin that nobody holds ends when a guard looks next",
        ))
    }
}
