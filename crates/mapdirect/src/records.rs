//! Records of what a guard refused, and of what it noticed.
//!
//! [`Guard::records`] returns [`Records`].

use crate::error::{Error, Kind, Result};
use crate::guard::Guard;
use crate::holder::{Connection, is_capable, unexpected};
use mapdirect_proto::{FollowRequest, Reply, Request, VERSION_WITH_RECORDS};
pub use mapdirect_proto::{
    Name, NameState, Record,
    record::{Actor, Event, Owner},
};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// Records of a guard, in the order in which it made them.
#[derive(Debug)]
pub struct Records {
    connection: Connection,
    live: bool,
    /// Everything that the guard had kept has come.
    caught_up: bool,
}

/// What comes of a guard that is asked for records.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Heard {
    /// A record.
    Record(Box<Record>),
    /// So many records are not there: they came too fast for the guard to keep,
    /// or for this process to read.
    Missed(u64),
    /// That was all that the guard had kept. What comes now is new.
    CaughtUp,
    /// Nothing in that time.
    Nothing,
}

impl Guard {
    /// Asks for records: the latest that the guard has kept, no more than `kept`
    /// (it keeps 4,096), and with `live` those that it makes from now on. Root,
    /// and processes capable of pinning, get all of them; others those about
    /// files that their user has pinned.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` when no guard answers, or it is too old.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use mapdirect::records::Heard;
    ///
    /// let mut records = mapdirect::Guard::from_env().records(0, true)?;
    /// loop {
    ///     if let Heard::Record(record) = records.next(None)? {
    ///         println!("{} by {}", record.operation, record.actor.command);
    ///     }
    /// }
    /// # #[allow(unreachable_code)]
    /// # Ok::<(), mapdirect::Error>(())
    /// ```
    pub fn records(&self, kept: u32, live: bool) -> Result<Records> {
        let ask = || {
            let connection = Connection::open(self.socket(), None, is_capable())?;
            connection.require_version(VERSION_WITH_RECORDS, "tell what it refused")?;
            connection.begin(&Request::Follow(FollowRequest { kept, live }))?;
            Ok(Records {
                connection,
                live,
                caught_up: false,
            })
        };
        ask().map_err(|error: Error| error.asking("read the guard's records"))
    }
}

impl Records {
    /// What comes next; waits for it, no longer than `limit` if there is one.
    /// Without `live` there is nothing behind [`Heard::CaughtUp`].
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` when the guard is gone.
    pub fn next(&mut self, limit: Option<Duration>) -> Result<Heard> {
        if self.caught_up && !self.live {
            return Ok(Heard::CaughtUp);
        }
        let reply = match self.connection.hear_within(limit)? {
            None => return Ok(Heard::Nothing),
            Some(reply) => reply,
        };
        match reply {
            Reply::Record(record) => Ok(Heard::Record(record)),
            Reply::Missed(count) => Ok(Heard::Missed(count)),
            Reply::Following => {
                self.caught_up = true;
                Ok(Heard::CaughtUp)
            }
            _ => Err(unexpected()),
        }
    }

    /// Whether an error means that the guard is gone, so that it is worth asking
    /// again later.
    #[must_use]
    pub fn is_gone(error: &Error) -> bool {
        error.kind() == Kind::NoGuard
    }
}

impl AsFd for Records {
    /// A descriptor that is readable when there is something to hear.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}
