//! How the process ends.

use crate::output;
use mapdirect::{Error, Kind};
use mapdirect_sys::Errno;
use std::process::ExitCode;

/// An exit status, as the manual documents it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit(u8);

impl Exit {
    /// It worked.
    pub const SUCCESS: Self = Self(0);
    /// It was refused, or failed.
    pub const FAILURE: Self = Self(1);
    /// The command line makes no sense.
    pub const USAGE: Self = Self(2);
    /// No guard answers.
    pub const NO_GUARD: Self = Self(3);
    /// A pin that was held is not kept any more.
    pub const PIN_LOST: Self = Self(4);
    /// Blocks of a pin that was held have changed.
    pub const PIN_BREACHED: Self = Self(5);
    /// Nobody reads what is printed any more: what a shell says of a command that
    /// SIGPIPE has ended.
    pub const UNREAD: Self = Self(141);
    /// `pin -- COMMAND`: blocks of the pin changed while COMMAND ran.
    pub const BREACHED_UNDER_COMMAND: Self = Self(123);
    /// `pin -- COMMAND`: the pin was lost while COMMAND ran.
    pub const LOST_UNDER_COMMAND: Self = Self(124);
    /// `pin -- COMMAND`: the pin was not granted, COMMAND was not run.
    pub const COMMAND_NOT_RUN: Self = Self(125);
    /// `pin -- COMMAND`: COMMAND cannot be executed.
    pub const CANNOT_EXECUTE: Self = Self(126);
    /// `pin -- COMMAND`: there is no COMMAND.
    pub const NOT_FOUND: Self = Self(127);

    /// The status of a command that was waited for: its own, or 128 and the
    /// number of the signal that killed it.
    #[must_use]
    pub(crate) fn of_waited(status: rustix::process::WaitStatus) -> Self {
        let number = status
            .exit_status()
            .or_else(|| status.terminating_signal().map(|signal| 128 + signal));
        Self::from_code(number.unwrap_or(1))
    }

    /// The status of this number.
    pub(crate) fn from_code(code: i32) -> Self {
        Self(u8::try_from(code).unwrap_or(u8::MAX))
    }

    /// What became of a pin, if it became of it while COMMAND ran.
    pub(crate) fn under_command(self) -> Self {
        if self == Self::PIN_BREACHED {
            Self::BREACHED_UNDER_COMMAND
        } else {
            Self::LOST_UNDER_COMMAND
        }
    }

    /// A signal ended it before there was anything to hold.
    pub(crate) fn of_signal(number: i32) -> Self {
        Self(u8::try_from(128 + number).unwrap_or(u8::MAX))
    }

    /// The number.
    #[must_use]
    pub const fn code(self) -> u8 {
        self.0
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.0)
    }
}

/// What went wrong. An error of the library has a line for each process in the
/// way, and one that says what helps.
pub(crate) fn words(error: &anyhow::Error) -> String {
    match error.downcast_ref::<Error>() {
        Some(error) => format!("{error:#}"),
        None => format!("{error:#}"),
    }
}

fn is_missing(error: &anyhow::Error) -> bool {
    let errno = error.downcast_ref::<Error>().map(Error::errno);
    errno == Some(Errno::NOENT.raw_os_error())
}

/// Says on stderr what went wrong, and which status that is.
pub(crate) fn explain(error: &anyhow::Error) -> Exit {
    output::complain(&words(error));
    match error.downcast_ref::<Error>().map(Error::kind) {
        Some(Kind::NoGuard) => Exit::NO_GUARD,
        // A pin that is there no more was not named wrongly.
        Some(Kind::Arguments) if !is_missing(error) => Exit::USAGE,
        _ => Exit::FAILURE,
    }
}
