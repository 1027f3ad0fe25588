//! What becomes of pins that are held.

use crate::keeper::Kept;
use crate::verbs::records;
use crate::{Exit, terminal};
use anyhow::Result;
use mapdirect::{Breach, EventFd, Extent, Integrity, Pin, State};
use mapdirect_sys::proc::printable;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;

/// Pins, and what was said of them so far.
pub(super) struct AllHeld<'a> {
    pins: Vec<Held<'a>>,
}

impl<'a> AllHeld<'a> {
    pub(super) fn new(files: &[PathBuf], pins: &'a [Pin]) -> Result<Self> {
        let named = files.iter().zip(pins).map(|(path, pin)| {
            // Of the only one there is nothing to tell apart.
            let several = pins.len() > 1;
            let name = several.then(|| format!("{}: ", terminal::name(path)));
            Held::new(pin, name.unwrap_or_default())
        });
        let pins = named.collect::<Result<_>>()?;
        Ok(Self { pins })
    }
}

impl Kept for AllHeld<'_> {
    fn events(&self) -> Vec<BorrowedFd<'_>> {
        self.pins.iter().map(|held| held.event.as_fd()).collect()
    }

    /// A breach is more than a loss.
    fn notice(&mut self, say: &mut dyn FnMut(&str)) -> Option<Exit> {
        // All of them: one that stays set would be found again and again.
        for held in &self.pins {
            held.event.clear();
        }
        let mut endings = Vec::new();
        for held in &mut self.pins {
            endings.extend(held.tell(say));
        }
        let breached = endings.contains(&Exit::PIN_BREACHED);
        if breached {
            Some(Exit::PIN_BREACHED)
        } else {
            endings.first().copied()
        }
    }
}

/// A pin, and what was said of it so far.
struct Held<'a> {
    pin: &'a Pin,
    /// Begins what is said of it: the file, if there are several.
    name: String,
    event: EventFd,
    /// It was said that no guard is there.
    is_unattended: bool,
    /// How many of its names were told of.
    renames: usize,
    /// It was said that it is over.
    ending: Option<Exit>,
}

impl<'a> Held<'a> {
    fn new(pin: &'a Pin, name: String) -> Result<Self> {
        Ok(Self {
            pin,
            name,
            event: pin.event_fd()?,
            is_unattended: false,
            renames: 0,
            ending: None,
        })
    }

    /// Says what became of the pin, once; and how this must end, if the promise
    /// is over. A breach is more than a loss.
    fn tell(&mut self, say: &mut dyn FnMut(&str)) -> Option<Exit> {
        let name = &self.name;
        let renames = self.pin.renames();
        for how in renames.iter().skip(self.renames) {
            say(&format!("{name}{}", printable(how)));
        }
        self.renames = renames.len();
        match self.pin.state() {
            State::Kept if self.is_unattended => {
                self.is_unattended = false;
                say(&format!(
                    "{name}a guard is back, and has taken the pin over"
                ));
            }
            State::Unattended { why } if !self.is_unattended => {
                self.is_unattended = true;
                let why = printable(&why);
                say(&format!("{name}the pin stays, unattended: {why}"));
            }
            State::Lost { why } if self.ending.is_none() => {
                self.ending = Some(Exit::PIN_LOST);
                if self.pin.integrity().is_intact() {
                    let why = printable(&why);
                    say(&format!("{name}the pin is not kept any more: {why}"));
                }
            }
            _ => {}
        }
        if self.ending != Some(Exit::PIN_BREACHED)
            && let Integrity::Breached { breaches, .. } = self.pin.integrity()
        {
            self.ending = Some(Exit::PIN_BREACHED);
            for breach in &breaches {
                say(&printable(&breach_line(breach)));
            }
        }
        self.ending
    }
}

pub(crate) fn breach_line(breach: &Breach) -> String {
    let cause = breach.cause.as_ref().map_or_else(String::new, |cause| {
        format!("; by {}", records::cause(cause))
    });
    let count = |extents: &[Extent]| match extents {
        [one] => one.state.name().to_owned(),
        more => format!("{} extents", more.len()),
    };
    format!(
        "the pin was broken: bytes {} to {} of {} have changed ({}, now {}){cause}",
        breach.range.start,
        breach.range.end,
        terminal::told_name(&breach.path),
        count(&breach.before),
        count(&breach.after),
    )
}
