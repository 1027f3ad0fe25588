//! Having one's own pins give way for a while.

use crate::error::{Error, Result};
use crate::establish::offset_and_length;
use crate::guard::Guard;
use crate::holder::{Connection, is_capable, unexpected};
use mapdirect_proto::{Flags, Reply, Request, YieldRequest};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

impl Guard {
    /// Has the pins of [`Strength::Stable`](crate::Strength::Stable) that this
    /// process asked for on `file` give way in a range, so that the file can be
    /// truncated or punched there, by whoever may write to it. A range up to
    /// `u64::MAX` has no end, as a truncation needs it.
    ///
    /// Whatever becomes of the range is no breach. The pins hold what is there
    /// when [`GivingWay::resume`] returns, or a moment after the value was
    /// dropped, or this process has ended; if the guard is killed meanwhile, when
    /// the next one takes over.
    ///
    /// # Errors
    ///
    /// * `ETXTBSY` when anybody else has something of the range pinned, or this
    ///   process a pin of strength all;
    /// * `EINVAL` for an empty range, or one in which this process has asked for
    ///   no pin;
    /// * `EACCES`, `EOPNOTSUPP` as for a pin.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use mapdirect::{Guard, PinOptions, Strength};
    ///
    /// let file = std::fs::File::options().read(true).write(true).open("log")?;
    /// let pin = PinOptions::new()
    ///     .strength(Strength::Stable)
    ///     .range_from(0)
    ///     .pin(&file)?;
    /// let giving_way = Guard::from_env().give_way(&file, 4096..u64::MAX)?;
    /// file.set_len(4096)?;
    /// giving_way.resume()?;
    /// # drop(pin);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn give_way(&self, file: impl AsFd, range: Range<u64>) -> Result<GivingWay> {
        let asked = match range.end {
            u64::MAX => format!("give way from byte {} on", range.start),
            end => format!("give way in bytes {} to {end}", range.start),
        };
        self.ask_to_give_way(file.as_fd(), &range)
            .map_err(|error| error.asking(asked))
    }

    fn ask_to_give_way(&self, file: BorrowedFd<'_>, range: &Range<u64>) -> Result<GivingWay> {
        let (offset, length) = offset_and_length(Some(range))?;
        // A connection of its own: when it ends, the pins hold again.
        let connection = Connection::open(self.socket(), None, is_capable())?;
        connection.require_known(Flags::STABLE)?;
        let request = Request::Yield(YieldRequest { offset, length });
        connection.converse(&request, file, |_, reply, _| match reply {
            Reply::Done => Ok(Some(())),
            _ => Err(unexpected()),
        })?;
        Ok(GivingWay { connection })
    }
}

/// As long as this exists, pins give way; see [`Guard::give_way`].
#[derive(Debug)]
#[must_use = "the pins hold again when this is dropped"]
pub struct GivingWay {
    connection: Connection,
}

impl GivingWay {
    /// Has the pins hold what is there now, and waits until they do.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` when the guard is gone. The pins hold again when the next one
    /// has taken over.
    pub fn resume(self) -> Result<()> {
        let resumed = self.connection.call(&Request::Resume, &[]);
        let asking = |error: Error| error.asking("hold again");
        match resumed.map_err(asking)?.0 {
            Reply::Done => Ok(()),
            _ => Err(unexpected().asking("hold again")),
        }
    }
}
