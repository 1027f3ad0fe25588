//! The socket at which clients connect.

use crate::Errno;
use crate::server::{Config, StartError};
use crate::store::LISTENER;
use crate::wake::Backoff;
use mapdirect_sys::unix::Socket;
use rustix::fs::{FileType, FlockOperation, Mode, OFlags};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

fn listen(path: &Path) -> Result<Socket, StartError> {
    let failed = |errno| StartError::Socket {
        path: path.to_owned(),
        errno,
    };
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if !directory.exists() {
        std::fs::create_dir_all(directory)
            .map_err(|error| failed(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
        // Clients must be able to enter the directory, whatever the umask says.
        rustix::fs::chmod(directory, Mode::from_raw_mode(0o755)).map_err(failed)?;
    }
    // Two guards that start at once must not take each other's socket for a
    // stale one.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory, flags, Mode::empty()).map_err(failed)?;
    lock_for_a_while(directory.as_fd()).map_err(failed)?;
    let socket = match Socket::listen(path, 1024) {
        Err(Errno::ADDRINUSE) => {
            let in_the_way = |what| StartError::InTheWay {
                path: path.to_owned(),
                what,
            };
            if let Some(other) = other_than_socket(path) {
                return Err(in_the_way(other));
            }
            match connect_to_one_that_stays(path) {
                Ok(_) => return Err(StartError::AlreadyRunning(path.to_owned())),
                Err(Errno::CONNREFUSED) => {}
                Err(Errno::PROTOTYPE) => return Err(in_the_way("a socket of another program")),
                Err(errno) => return Err(failed(errno)),
            }
            // Only a socket at which nobody listens is removed.
            if let Some(other) = other_than_socket(path) {
                return Err(in_the_way(other));
            }
            rustix::fs::unlink(path).map_err(failed)?;
            Socket::listen(path, 1024).map_err(failed)?
        }
        listening => listening.map_err(failed)?,
    };
    // Any process may connect; each request is judged by its sender.
    rustix::fs::chmod(path, Mode::from_raw_mode(0o666)).map_err(failed)?;
    Ok(socket)
}

/// Locks a directory, unless that takes longer than another guard that starts has it
/// locked: a stranger who may read a directory may lock it, for ever.
fn lock_for_a_while(directory: BorrowedFd<'_>) -> Result<(), Errno> {
    let limit = std::time::Instant::now() + GOING * 2;
    let (first, longest) = (Duration::from_millis(1), Duration::from_millis(20));
    let mut backoff = Backoff::until(limit, first, longest);
    loop {
        match rustix::fs::flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if !backoff.is_over() => backoff.pause(),
            Ok(()) | Err(Errno::WOULDBLOCK) => return Ok(()),
            Err(other) => return Err(other),
        }
    }
}

/// Whether somebody listens at a socket, and goes on to. A guard that was killed
/// may take a moment to be gone.
fn connect_to_one_that_stays(path: &Path) -> Result<Socket, Errno> {
    let limit = std::time::Instant::now() + GOING;
    let (first, longest) = (Duration::from_millis(1), Duration::from_millis(20));
    let mut backoff = Backoff::until(limit, first, longest);
    loop {
        let socket = Socket::connect(path)?;
        while socket.peer_is_gone() == Ok(false) {
            if backoff.is_over() {
                return Ok(socket);
            }
            backoff.pause();
        }
    }
}

/// How long a guard that was killed may take to be gone.
const GOING: Duration = Duration::from_secs(2);

/// Goes on listening at the socket that whoever started this process has passed,
/// or makes one; which it is then, so that it can be removed.
pub(crate) fn listen_or_go_on(config: &Config) -> Result<(Socket, Option<(u64, u64)>), StartError> {
    let path = &config.socket;
    if let Some(passed) = config.starter.take(LISTENER) {
        let socket = Socket::listening(passed).map_err(|errno| StartError::Socket {
            path: path.clone(),
            errno,
        })?;
        // It belongs to whoever has made it.
        return Ok((socket, None));
    }
    let socket = listen(path)?;
    if config.starter.keep(LISTENER, socket.as_fd()).is_ok() && config.starter.is_supervisor() {
        // Which removes it in the end.
        return Ok((socket, None));
    }
    let identity = rustix::fs::lstat(path);
    Ok((socket, identity.ok().map(|stat| (stat.st_dev, stat.st_ino))))
}

/// What is at a path if it is no socket.
fn other_than_socket(path: &Path) -> Option<&'static str> {
    let stat = rustix::fs::lstat(path).ok()?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Socket => None,
        FileType::Symlink => Some("a symbolic link, which is not followed,"),
        FileType::Directory => Some("a directory"),
        _ => Some("a file of another kind"),
    }
}
