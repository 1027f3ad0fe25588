//! Pins that live in descriptions of programs that know nothing of pins.

use super::PinOptions;
use crate::error::Result;
use crate::establish::{Established, Scope, establish, offset_and_length};
use crate::guard::Guard;
use crate::holder::Hold;
use crate::state::{EventFd, Integrity, OnBreach, State};
use mapdirect_proto::{BlockMap, Flags, Gate, IS_IT_PIN, PIN_NUMBER, Request};
use mapdirect_sys::{Errno, fcntl};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

impl PinOptions {
    /// For [`pin_in_place`](Self::pin_in_place): the pin is one of a family, see
    /// [`family`](Self::family), but not of this process and its descendants. It
    /// is that of this ancestor and all of its descendants. This is for
    /// supervisors that are not themselves ancestors of what they supervise.
    pub fn family_of(mut self, ancestor: i32) -> Self {
        self.keeper = Some(ancestor);
        self
    }

    /// Pins the range for a program that knows nothing of pins: for as long as
    /// an open file description of the program is open or mapped anywhere, not
    /// for as long as the returned value lives. This is for supervisors of such
    /// programs.
    ///
    /// * Under the bpf gate the description is that of `file` itself. The
    ///   supervisor duplicates the program's descriptor (`pidfd_getfd(2)`), pins
    ///   in place, and closes its duplicate. Whoever else has the description
    ///   keeps the pin, too.
    /// * Under the fanotify gate the description must come from the guard: the
    ///   supervisor opens the file in the program's stead, pins it, and gives
    ///   the program what [`PinInPlace::take_stand_in`] returns. That is open as
    ///   `file` is.
    ///
    /// # Errors
    ///
    /// As [`pin`](Self::pin); and
    ///
    /// * `EEXIST` when the description is a pin already;
    /// * `EOPNOTSUPP` when blocks of the range are frozen: a program that knows
    ///   nothing of pins would store to them.
    pub fn pin_in_place(&self, file: impl AsFd) -> Result<PinInPlace> {
        let guard = self.guard.clone().unwrap_or_default();
        self.in_place(&guard, file.as_fd()).map_err(|error| {
            let path = mapdirect_sys::proc::shown_path_of(file.as_fd());
            error.asking(format!("pin {path} in place"))
        })
    }

    fn in_place(&self, guard: &Guard, file: BorrowedFd<'_>) -> Result<PinInPlace> {
        let range = offset_and_length(self.range.as_ref())?;
        let flags = match self.scope {
            Scope::Range => Flags::IN_PLACE,
            Scope::File => Flags::IN_PLACE | Flags::WHOLE_FILE,
        };
        let flags = flags | self.also | self.strength.flags();
        let connection = guard.connect()?;
        connection.require_known(flags)?;
        // Without an ancestor that lives it is a pin of nobody but this process.
        let keeper = self.keeper.map(|pid| Request::Keeper { pid });
        let is_family = keeper.is_some_and(|keeper| connection.call(&keeper, &[]).is_ok());
        let flags = if is_family {
            flags | Flags::FAMILY
        } else {
            flags
        };
        self.prepare(file)?;
        let gate = connection.gate();
        let Established {
            named,
            map,
            file: description,
            life,
            ..
        } = establish(|| Ok(connection), file, range, flags, self.patience)?;
        let hold = Hold::new(named, guard, gate, OnBreach::Tell, None)?;
        Ok(PinInPlace {
            hold,
            map,
            stand_in: (gate != Gate::Bpf).then_some(description),
            life,
        })
    }
}

/// What is known of a pin that lives in a program's description; see
/// [`PinOptions::pin_in_place`]. Dropping it stops listening to what becomes of
/// the pin, and ends nothing else, with two exceptions:
/// [`take_stand_in`](Self::take_stand_in) and
/// [`ends_with_this`](Self::ends_with_this).
#[derive(Debug)]
#[must_use = "some pins end when it is dropped"]
pub struct PinInPlace {
    hold: Hold,
    map: BlockMap,
    stand_in: Option<OwnedFd>,
    /// What the pin lives by besides.
    life: Option<OwnedFd>,
}

impl PinInPlace {
    /// The number by which the guard knows the pin.
    #[must_use]
    pub fn pin_id(&self) -> u64 {
        self.hold.id()
    }

    /// The block map of the pinned range, as it was granted.
    #[must_use]
    pub fn block_map(&self) -> &BlockMap {
        &self.map
    }

    /// The description that the program must get in place of its own, under the
    /// fanotify gate; only once. The pin ends if nobody keeps it.
    pub fn take_stand_in(&mut self) -> Option<OwnedFd> {
        self.stand_in.take()
    }

    /// Whether the pin ends when this is dropped: under the fanotify gate a
    /// description that can only read does not keep a pin.
    #[must_use]
    pub fn ends_with_this(&self) -> bool {
        self.life.is_some() || self.stand_in.is_some()
    }

    /// Whether this pin lives in the description of `file`. Asks the programs
    /// in the kernel, not the guard; under the fanotify gate nobody knows, and
    /// it says no.
    #[must_use]
    pub fn lives_in(&self, file: impl AsFd) -> bool {
        let question = IS_IT_PIN | self.pin_id() & PIN_NUMBER;
        fcntl::get_flags_with(file.as_fd(), question) == Err(Errno::ALREADY)
    }

    /// Whether the pin is kept; [`State::Lost`] also when it has ended.
    #[must_use]
    pub fn state(&self) -> State {
        self.hold.state()
    }

    /// See [`Pin::integrity`](crate::Pin::integrity).
    #[must_use]
    pub fn integrity(&self) -> Integrity {
        self.hold.integrity()
    }

    /// See [`Pin::event_fd`](crate::Pin::event_fd).
    ///
    /// # Errors
    ///
    /// `EMFILE`, `ENFILE`, `ENOMEM`.
    pub fn event_fd(&self) -> Result<EventFd> {
        self.hold.event_fd()
    }
}
