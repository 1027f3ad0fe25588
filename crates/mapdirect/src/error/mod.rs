//! What went wrong, who stood in the way, and what helps.

mod kind;

pub use kind::Kind;

use crate::report::Opener;
use mapdirect_proto::Refusal;
use mapdirect_sys::Errno;
use std::{fmt, io};

/// The result of this crate's calls.
pub type Result<T> = std::result::Result<T, Error>;

/// Why something was not done: what was asked, what stood in the way, who,
/// and what helps.
///
/// `{}` prints one line. `{:#}` and `{:?}` print everything there is to say,
/// with one line for each process in the way and a line that begins with
/// "help:".
///
/// # In code that returns `io::Error`
///
/// An [`io::Error`] has room for an errno or for words, not for both. `?` and
/// [`From`] keep the errno, so that `raw_os_error()` and `kind()` are what
/// callers of `mmap(2)` expect. [`into_io_error_with_words`] keeps the words.
///
/// [`into_io_error_with_words`]: Self::into_io_error_with_words
///
/// # Examples
///
/// ```
/// use mapdirect::PinOptions;
///
/// let file = std::fs::File::open("/proc/self/exe")?;
/// let error = PinOptions::new().range(10..5).pin(&file).unwrap_err();
/// assert_eq!(error.errno_name(), "EINVAL");
/// assert!(format!("{error:#}").contains("\n  help: "));
/// let errno = error.errno();
/// assert_eq!(std::io::Error::from(error).raw_os_error(), Some(errno));
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    errno: Errno,
    asked: String,
    obstacle: String,
    help: String,
    openers: Vec<Opener>,
    source: Option<io::Error>,
}

impl Error {
    pub(crate) fn new(
        kind: Kind,
        errno: Errno,
        obstacle: impl Into<String>,
        help: impl Into<String>,
    ) -> Self {
        Self(Box::new(Inner {
            kind,
            errno,
            asked: String::new(),
            obstacle: obstacle.into(),
            help: help.into(),
            openers: Vec::new(),
            source: None,
        }))
    }

    /// An error of a system call that should not have failed.
    pub(crate) fn system(call: &str, errno: Errno) -> Self {
        Self::new(Kind::System, errno, format!("{call} failed: {errno}"), "").caused_by(errno)
    }

    /// Names the answer of a system call as the source.
    pub(crate) fn caused_by(mut self, errno: Errno) -> Self {
        self.0.source = Some(io::Error::from_raw_os_error(errno.raw_os_error()));
        self
    }

    pub(crate) fn refused(refusal: Refusal) -> Self {
        Self(Box::new(Inner {
            kind: Kind::of(refusal.reason),
            errno: Errno::from_raw_os_error(refusal.errno.clamp(1, 4095)),
            asked: String::new(),
            obstacle: refusal.obstacle,
            help: refusal.mend,
            openers: refusal.openers.into_iter().map(Opener::of).collect(),
            source: None,
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

    /// What kind of obstacle it was.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The errno that `mmap(2)` with `MAP_DIRECT` gives for this, exactly.
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.0.errno.raw_os_error()
    }

    /// The name of the errno, as errno(3) has it: "EINVAL".
    #[must_use]
    pub fn errno_name(&self) -> &'static str {
        errno_name(self.0.errno)
    }

    /// What was asked for, as a phrase that follows "cannot".
    #[must_use]
    pub fn asked(&self) -> &str {
        &self.0.asked
    }

    /// What stood in the way, for a person.
    #[must_use]
    pub fn obstacle(&self) -> &str {
        &self.0.obstacle
    }

    /// What helps, for a person; empty if nothing does.
    #[must_use]
    pub fn help(&self) -> &str {
        &self.0.help
    }

    /// The processes that have the file open, if they stood in the way.
    #[must_use]
    pub fn openers(&self) -> &[Opener] {
        &self.0.openers
    }

    /// An `io::Error` with all the words: of the right [`io::ErrorKind`], and
    /// with this error inside, which [`io::Error::get_ref`] and `downcast_ref`
    /// find. Its `raw_os_error()` is `None`: that is what `From` is for.
    ///
    /// # Examples
    ///
    /// ```
    /// let file = std::fs::File::open("/proc/self/exe")?;
    /// let error = mapdirect::Pin::new(&file, 5..5).unwrap_err();
    /// let error = error.into_io_error_with_words();
    /// assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    /// let inside = error.get_ref().and_then(|inside| inside.downcast_ref::<mapdirect::Error>());
    /// assert_eq!(inside.map(mapdirect::Error::errno_name), Some("EINVAL"));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn into_io_error_with_words(self) -> io::Error {
        let kind = io::Error::from_raw_os_error(self.errno()).kind();
        io::Error::new(kind, self)
    }
}

fn errno_name(errno: Errno) -> &'static str {
    match errno {
        Errno::ACCESS => "EACCES",
        Errno::AGAIN => "EAGAIN",
        Errno::BADF => "EBADF",
        Errno::DQUOT => "EDQUOT",
        Errno::CONNREFUSED => "ECONNREFUSED",
        Errno::CONNRESET => "ECONNRESET",
        Errno::EXIST => "EEXIST",
        Errno::FAULT => "EFAULT",
        Errno::FBIG => "EFBIG",
        Errno::INTR => "EINTR",
        Errno::INVAL => "EINVAL",
        Errno::ISDIR => "EISDIR",
        Errno::LOOP => "ELOOP",
        Errno::IO => "EIO",
        Errno::MFILE => "EMFILE",
        Errno::NAMETOOLONG => "ENAMETOOLONG",
        Errno::NFILE => "ENFILE",
        Errno::NODEV => "ENODEV",
        Errno::NOENT => "ENOENT",
        Errno::NOEXEC => "ENOEXEC",
        Errno::NOMEM => "ENOMEM",
        Errno::NOSPC => "ENOSPC",
        Errno::NOSYS => "ENOSYS",
        Errno::NOTDIR => "ENOTDIR",
        Errno::NOTTY => "ENOTTY",
        Errno::NXIO => "ENXIO",
        Errno::OPNOTSUPP => "EOPNOTSUPP",
        Errno::OVERFLOW => "EOVERFLOW",
        Errno::PERM => "EPERM",
        Errno::PIPE => "EPIPE",
        Errno::PROTO => "EPROTO",
        Errno::ROFS => "EROFS",
        Errno::SRCH => "ESRCH",
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
                write!(f, "\n  {opener}")?;
            }
            if !inner.help.is_empty() {
                write!(f, "\n  help: {}", inner.help)?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What `unwrap` and a `main` that returns the error print.
        write!(f, "{self:#}")
    }
}

impl std::error::Error for Error {
    /// The answer of the system call that failed, as an [`io::Error`], if one
    /// failed here.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|source| source as _)
    }
}

impl From<Error> for io::Error {
    /// Keeps the errno. The words are lost with that:
    /// [`Error::into_io_error_with_words`] keeps them.
    fn from(error: Error) -> Self {
        Self::from_raw_os_error(error.errno())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mapdirect_proto::Reason;

    #[test]
    fn one_line_or_everything() {
        let error = Error::refused(Refusal {
            errno: 26,
            reason: Reason::OpenElsewhere,
            obstacle: "somebody else has it open".into(),
            mend: "close it there".into(),
            openers: vec![mapdirect_proto::Opener {
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
        assert!(all.contains("  help: close it there"));
        assert_eq!(error.errno(), 26);
        assert_eq!(error.kind(), Kind::OpenElsewhere);
        let io: io::Error = error.into();
        assert_eq!(io.kind(), io::ErrorKind::ExecutableFileBusy);
        assert_eq!(io.raw_os_error(), Some(26));
    }

    #[test]
    fn words_survive_in_an_io_error() {
        let words = || Error::system("mmap", Errno::NOMEM).asking("map it");
        let with_words = words().into_io_error_with_words();
        assert_eq!(with_words.kind(), io::ErrorKind::OutOfMemory);
        assert_eq!(with_words.to_string(), words().to_string());
    }

    #[test]
    fn the_source_is_the_system_call() {
        use std::error::Error as _;
        let error = Error::system("mmap", Errno::NOMEM);
        let source = error.source().unwrap().downcast_ref::<io::Error>();
        assert_eq!(source.unwrap().raw_os_error(), Some(error.errno()));
        let ours = Error::new(Kind::Arguments, Errno::INVAL, "", "");
        assert!(ours.source().is_none());
    }
}
