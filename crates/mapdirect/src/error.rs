//! What went wrong, to whom, and how to mend it.

use mapdirect_proto::{Opener, Refusal};
use mapdirect_sys::Errno;
use std::fmt;

/// What kind of obstacle there was; [`Error::errno`] is what `mmap(2)` would
/// say of it.
pub use mapdirect_proto::Reason as Kind;

/// Result of this crate's calls.
pub type Result<T> = std::result::Result<T, Error>;

/// Why something was not done: what was asked, what stood in the way, who,
/// and how to mend it.
///
/// `{}` prints one line. `{:#}` prints everything there is to say.
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    errno: Errno,
    asked: String,
    obstacle: String,
    mend: String,
    openers: Vec<Opener>,
}

impl Error {
    pub(crate) fn new(
        kind: Kind,
        errno: Errno,
        obstacle: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self(Box::new(Inner {
            kind,
            errno,
            asked: String::new(),
            obstacle: obstacle.into(),
            mend: mend.into(),
            openers: Vec::new(),
        }))
    }

    /// An error of a system call that should not have failed.
    pub(crate) fn system(call: &str, errno: Errno) -> Self {
        Self::new(Kind::System, errno, format!("{call} failed: {errno}"), "")
    }

    pub(crate) fn refused(refusal: Refusal) -> Self {
        Self(Box::new(Inner {
            kind: refusal.reason,
            errno: Errno::from_raw_os_error(refusal.errno.clamp(1, 4095)),
            asked: String::new(),
            obstacle: refusal.obstacle,
            mend: refusal.mend,
            openers: refusal.openers,
        }))
    }

    /// Says what was asked, unless that is known already.
    pub(crate) fn asking(mut self, asked: impl Into<String>) -> Self {
        if self.0.asked.is_empty() {
            self.0.asked = asked.into();
        }
        self
    }

    /// Adds to what stood in the way.
    pub(crate) fn noting(mut self, note: &str) -> Self {
        self.0.obstacle.push_str("; ");
        self.0.obstacle.push_str(note);
        self
    }

    /// What kind of obstacle.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The errno that `mmap(2)` with `MAP_DIRECT` gives for this, exactly.
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.0.errno.raw_os_error()
    }

    /// What was asked for, as a phrase that follows "cannot".
    #[must_use]
    pub fn asked(&self) -> &str {
        &self.0.asked
    }

    /// What stood in the way.
    #[must_use]
    pub fn obstacle(&self) -> &str {
        &self.0.obstacle
    }

    /// How to mend it; empty where there is no way.
    #[must_use]
    pub fn mend(&self) -> &str {
        &self.0.mend
    }

    /// Who has the file open, where that stood in the way.
    #[must_use]
    pub fn openers(&self) -> &[Opener] {
        &self.0.openers
    }

    /// Name of the errno, as `errno(3)` has it.
    #[must_use]
    pub fn errno_name(&self) -> &'static str {
        errno_name(self.0.errno)
    }
}

fn errno_name(errno: Errno) -> &'static str {
    match errno {
        Errno::ACCESS => "EACCES",
        Errno::AGAIN => "EAGAIN",
        Errno::BADF => "EBADF",
        Errno::DQUOT => "EDQUOT",
        Errno::EXIST => "EEXIST",
        Errno::FBIG => "EFBIG",
        Errno::INTR => "EINTR",
        Errno::INVAL => "EINVAL",
        Errno::IO => "EIO",
        Errno::MFILE => "EMFILE",
        Errno::NFILE => "ENFILE",
        Errno::NODEV => "ENODEV",
        Errno::NOENT => "ENOENT",
        Errno::NOMEM => "ENOMEM",
        Errno::NOSPC => "ENOSPC",
        Errno::OPNOTSUPP => "EOPNOTSUPP",
        Errno::OVERFLOW => "EOVERFLOW",
        Errno::PERM => "EPERM",
        Errno::PIPE => "EPIPE",
        Errno::PROTO => "EPROTO",
        Errno::ROFS => "EROFS",
        Errno::TIMEDOUT => "ETIMEDOUT",
        Errno::TXTBSY => "ETXTBSY",
        _ => "errno",
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0;
        if !inner.asked.is_empty() {
            write!(f, "cannot {}: ", inner.asked)?;
        }
        write!(f, "{} ({})", inner.obstacle, self.errno_name())?;
        if f.alternate() {
            for opener in &inner.openers {
                write!(f, "\n  {}", Described(opener))?;
            }
            if !inner.mend.is_empty() {
                write!(f, "\n  to mend it: {}", inner.mend)?;
            }
        }
        Ok(())
    }
}

struct Described<'opener>(&'opener Opener);

impl fmt::Display for Described<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Opener {
            pid,
            fd,
            writable,
            mapped,
            command,
        } = self.0;
        if *pid > 0 {
            write!(f, "pid {pid} ({command})")?;
        } else {
            f.write_str(command)?;
        }
        match (mapped, fd) {
            (true, _) => f.write_str(" maps it")?,
            (false, Some(fd)) => write!(f, " has it open as descriptor {fd}")?,
            (false, None) => f.write_str(" has it open")?,
        }
        f.write_str(if *writable {
            ", for writing"
        } else {
            ", for reading"
        })
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What `unwrap` and a `main` that returns the error print.
        write!(f, "{self:#}")
    }
}

impl std::error::Error for Error {}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        // Not `other`: callers of io code look at the kind and the errno.
        let kind = Self::from_raw_os_error(error.errno()).kind();
        Self::new(kind, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_or_everything() {
        let error = Error::refused(Refusal {
            errno: 26,
            reason: Kind::OpenElsewhere,
            obstacle: "somebody else has it open".into(),
            mend: "close it there".into(),
            openers: vec![Opener {
                pid: 7,
                fd: Some(3),
                writable: true,
                mapped: false,
                command: "dd".into(),
            }],
        })
        .asking("pin `x`");
        assert_eq!(
            error.to_string(),
            "cannot pin `x`: somebody else has it open (ETXTBSY)"
        );
        let all = format!("{error:#}");
        assert!(all.contains("pid 7 (dd) has it open as descriptor 3, for writing"));
        assert!(all.contains("to mend it: close it there"));
        assert_eq!(error.errno(), 26);
        let io: std::io::Error = error.into();
        assert_eq!(io.kind(), std::io::ErrorKind::ExecutableFileBusy);
    }
}
