//! Opens a file that a file of pins declares.
//!
//! Directories on its way may belong to strangers. They can lead elsewhere by a
//! symbolic link, so none is followed. They can put something there that is no
//! file, and does something when it is opened, so what is there is looked at
//! first. And they can serve the way themselves, by FUSE, and never answer, deaf
//! to SIGKILL, so this is done by a thread that keeps none of the descriptors that
//! pins live by.

use crate::open::{Unopened, open_found};
use mapdirect_sys::Errno;
use mapdirect_sys::descriptors::spawn_apart;
use mapdirect_sys::unix::Socket;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

/// The longest text of an error.
const TEXT: usize = 512;

/// A file that is being opened.
pub(super) struct Opening {
    ours: Socket,
    /// The thread has a table of its own, so this has to outlive it here to be
    /// closed here.
    _theirs: Arc<OwnedFd>,
    thread: JoinHandle<Option<()>>,
}

impl Opening {
    /// Begins to open what is at `path`.
    pub(super) fn begin(path: &Path) -> io::Result<Self> {
        let (ours, theirs) = Socket::pair()?;
        let theirs = Arc::new(OwnedFd::from(theirs));
        let (path, answer) = (PathBuf::from(path), Arc::clone(&theirs));
        let builder = Builder::new().name(String::from("open"));
        let thread = spawn_apart(builder, Some(Arc::clone(&theirs)), move || {
            // In the table of this thread, as everything from here on.
            let Ok(answer) = answer.try_clone().and_then(|fd| Ok(Socket::connected(fd)?)) else {
                return;
            };
            // Nobody waits for it any more if it cannot be sent.
            let _ = match open(&path) {
                Ok(file) => answer.send(&[b"+"], &[file.as_fd()]),
                Err(why) => answer.send(&[b"-", &why.as_bytes()[..why.len().min(TEXT)]], &[]),
            };
        })?;
        Ok(Self {
            ours,
            _theirs: theirs,
            thread,
        })
    }

    /// The file, or why there is none; or this again, if nothing has come of it
    /// within `limit`.
    pub(super) fn wait(self, limit: Duration) -> Result<Result<File, String>, Self> {
        if self.ours.wait_until_readable(limit) != Ok(true) && !self.thread.is_finished() {
            return Err(self);
        }
        let mut buffer = [0; TEXT + 1];
        // It has sent what there is, and ends.
        let received = self
            .ours
            .wait_until_readable(Duration::ZERO)
            .and_then(|is| {
                if is {
                    self.ours.receive(&mut buffer)
                } else {
                    Err(Errno::IO)
                }
            });
        let ended = self.thread.join();
        Ok(match received {
            Ok(mut received) if ended.is_ok() => match received.fds.pop() {
                Some(fd) => Ok(File::from(fd)),
                None => {
                    let text = buffer[..received.length].get(1..).unwrap_or_default();
                    Err(String::from_utf8_lossy(text).into_owned())
                }
            },
            _ => Err(String::from("the thread that opens it could not run")),
        })
    }
}

fn open(path: &Path) -> Result<File, String> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let there = rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve);
    let there = there.map_err(|errno| match errno {
        Errno::LOOP => String::from(
            "a part of its path is a symbolic link, which is not followed; write the path \
             that realpath(1) says",
        ),
        other => Unopened::from(other).to_string(),
    })?;
    open_found(there.as_fd(), OFlags::RDONLY).map_err(|why| match why {
        Unopened::NoFile(_) => String::from("it is no regular file"),
        why => why.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    const SOON: Duration = Duration::from_secs(10);

    fn opened(path: &Path) -> Result<File, String> {
        let opening = Opening::begin(path).unwrap();
        opening.wait(SOON).unwrap_or_else(|_| panic!("{path:?}"))
    }

    #[test]
    fn files_are_opened_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path().canonicalize().unwrap();
        let file = directory.join("file");
        std::fs::write(&file, "it").unwrap();
        let mut read = String::new();
        opened(&file).unwrap().read_to_string(&mut read).unwrap();
        assert_eq!(read, "it");
        let link = directory.join("link");
        std::os::unix::fs::symlink(&directory, &link).unwrap();
        for (path, why) in [
            (link.clone(), "symbolic link"),
            (link.join("file"), "symbolic link"),
            (directory.join("none"), "No such file"),
            (directory.clone(), "no regular file"),
            (PathBuf::from("/dev/null"), "no regular file"),
        ] {
            let error = opened(&path).unwrap_err();
            assert!(error.contains(why), "{path:?}: {error}");
        }
    }
}
