//! The life of a pin, which only ever goes forward.

use std::sync::atomic::{AtomicU8, Ordering::SeqCst};

/// The stage of a pin's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Stage {
    /// The pin is published, and its blocks are not known yet: any of them may
    /// be frozen.
    Unsettled,
    /// The blocks are known. The guard still has a copy of the description, so
    /// the pin cannot end, and the grant may still fail.
    Settled,
    /// Only the holders have the description: the pin ends when they have
    /// closed it.
    HandedOver,
    /// The description is gone, and nothing is refused for the pin any more.
    Dead,
}

impl Stage {
    const ALL: [Self; 4] = [Self::Unsettled, Self::Settled, Self::HandedOver, Self::Dead];

    /// The permitted transitions. A pin can die at every stage: the process
    /// that asked for it can be killed in the middle of the grant.
    const fn may_become(self, next: Self) -> bool {
        matches!(
            (self, next),
            (Self::Unsettled, Self::Settled)
                | (Self::Settled, Self::HandedOver)
                | (
                    Self::Unsettled | Self::Settled | Self::HandedOver,
                    Self::Dead
                )
        )
    }
}

/// The stage of one pin. Reading and changing the stage takes no lock.
#[derive(Debug)]
pub(super) struct Life(AtomicU8);

impl Life {
    pub(super) fn at(stage: Stage) -> Self {
        Self(AtomicU8::new(stage as u8))
    }

    pub(super) fn stage(&self) -> Stage {
        let stage = self.0.load(SeqCst);
        // Only values of `Stage` are ever stored.
        let known = Stage::ALL.into_iter().find(|known| *known as u8 == stage);
        known.unwrap_or(Stage::Dead)
    }

    /// Goes on to `next` if the current stage permits that, and says whether it
    /// did.
    pub(super) fn advance(&self, next: Stage) -> bool {
        let mut stage = self.stage();
        while stage.may_become(next) {
            match self
                .0
                .compare_exchange(stage as u8, next as u8, SeqCst, SeqCst)
            {
                Ok(_) => return true,
                // Another thread changed the stage first; check the transition
                // from there.
                Err(_) => stage = self.stage(),
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life_goes_forward_and_never_back() {
        for from in Stage::ALL {
            for to in Stage::ALL {
                let life = Life::at(from);
                let went = life.advance(to);
                assert_eq!(went, from.may_become(to), "{from:?} to {to:?}");
                assert_eq!(life.stage(), if went { to } else { from });
                assert!(!went || (from as u8) < (to as u8), "{from:?} to {to:?}");
            }
        }
    }

    #[test]
    fn nobody_holds_what_was_never_settled_and_nothing_comes_back() {
        assert!(!Life::at(Stage::Unsettled).advance(Stage::HandedOver));
        let life = Life::at(Stage::Unsettled);
        assert!(life.advance(Stage::Dead));
        for stage in Stage::ALL {
            assert!(!life.advance(stage), "{stage:?}");
        }
    }

    #[test]
    fn of_two_who_end_it_one_does() {
        let life = Life::at(Stage::HandedOver);
        let ended = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| life.advance(Stage::Dead)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .filter(|ended| *ended)
                .count()
        });
        assert_eq!(ended, 1);
    }
}
