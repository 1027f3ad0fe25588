//! Which processes a process descends from.
//!
//! The kernel tells a process's parent by number (`PIDFD_GET_INFO`, or
//! `/proc/<pid>/stat`). Numbers are used again, and a process whose parent ends
//! gets another one: the nearest ancestor that is a subreaper, or the first
//! process. So a step from a child to its parent is believed only if it was
//! certain at one moment:
//!
//! 1. The child is held by a descriptor, which is never about another process.
//! 2. The child names its parent, and the process with that number is opened.
//! 3. The child names the same parent again. So the parent lived in between, and
//!    nobody else had its number: who replaces a parent is an ancestor, which is
//!    older than the parent, and had a number of its own.
//!
//! Every parent that a process ever has is one of those it descends from
//! (`find_new_reaper`, kernel/exit.c; `CLONE_PARENT` makes the creator's parent
//! the parent). So steps may be certain at different moments, and a stranger is
//! never taken for a descendant. A step that is not certain ends the walk, which
//! then begins anew, a limited number of times.

use crate::pidfd;
use crate::proc;
use std::os::fd::{AsFd, OwnedFd};

/// The most generations that are looked at.
pub const MOST_GENERATIONS: usize = 64;
/// How often a walk is begun anew when a parent ends meanwhile.
const TRIES: usize = 8;

/// A way to find out about parents.
trait Processes {
    type Process;
    /// The process with a number, held so that no other process can be taken
    /// for it.
    fn open(&self, pid: i32) -> Option<Self::Process>;
    /// The number of its parent; 0 if it has none. `None` if it is gone.
    fn parent(&self, process: &Self::Process) -> Option<i32>;
}

/// What is found by walking up.
enum Walk {
    /// One that is wanted was met.
    Met,
    /// The first process was met instead, or too many generations.
    NotMet,
    /// A process on the way has ended.
    Uncertain,
}

/// Whether process `pid` is one of those that `is_wanted` knows by number, or
/// descends from one. The caller makes sure that `pid` does not end meanwhile,
/// and afterwards that the one that was found has not ended yet: the number of a
/// process that has ended is used again.
///
/// `false` if it cannot be found out. Waits for nobody. Needs Linux 6.13.
#[must_use]
pub fn descends(pid: i32, is_wanted: impl Fn(i32) -> bool) -> bool {
    descends_by(&ByPidfd, pid, is_wanted)
}

/// [`descends`] for every kernel. Reads below `/proc`, which can take as long as
/// somebody who may list these directories likes.
#[must_use]
pub fn descends_by_proc(pid: i32, is_wanted: impl Fn(i32) -> bool) -> bool {
    descends_by(&ByProc, pid, is_wanted)
}

fn descends_by<P: Processes>(processes: &P, pid: i32, is_wanted: impl Fn(i32) -> bool) -> bool {
    for _ in 0..TRIES {
        match walk(processes, pid, &is_wanted) {
            Walk::Met => return true,
            Walk::NotMet => return false,
            Walk::Uncertain => {}
        }
    }
    false
}

fn walk<P: Processes>(processes: &P, pid: i32, is_wanted: &impl Fn(i32) -> bool) -> Walk {
    if is_wanted(pid) {
        return Walk::Met;
    }
    let Some(mut child) = processes.open(pid) else {
        return Walk::Uncertain;
    };
    for _ in 0..MOST_GENERATIONS {
        let Some(number) = processes.parent(&child) else {
            return Walk::Uncertain;
        };
        if number == 0 {
            return Walk::NotMet;
        }
        let Some(parent) = processes.open(number) else {
            return Walk::Uncertain;
        };
        if processes.parent(&child) != Some(number) {
            return Walk::Uncertain;
        }
        if is_wanted(number) {
            return Walk::Met;
        }
        child = parent;
    }
    Walk::NotMet
}

/// `PIDFD_GET_INFO`.
struct ByPidfd;

impl Processes for ByPidfd {
    type Process = OwnedFd;
    fn open(&self, pid: i32) -> Option<OwnedFd> {
        pidfd::of_process(pid).ok()
    }
    fn parent(&self, process: &OwnedFd) -> Option<i32> {
        pidfd::parent(process.as_fd()).ok()
    }
}

/// Directories of `/proc`, which go with the process that they are about.
struct ByProc;

impl Processes for ByProc {
    type Process = OwnedFd;
    fn open(&self, pid: i32) -> Option<OwnedFd> {
        proc::open_process(pid).ok()
    }
    fn parent(&self, process: &OwnedFd) -> Option<i32> {
        proc::parent_of(process.as_fd()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};
    use std::collections::HashMap;

    /// A process of the model: its own name, which is never used again.
    type Name = u32;

    /// Processes that end and begin while they are looked at. Each question lets
    /// one thing happen before it is answered.
    struct Model {
        /// Who has which number.
        numbers: RefCell<HashMap<i32, Name>>,
        /// The parent of each.
        parents: RefCell<HashMap<Name, Name>>,
        /// What happens next, in order; the first is done with the last question.
        to_come: RefCell<Vec<Event>>,
        /// The questions until the next thing happens.
        after: Cell<usize>,
        chosen: Vec<usize>,
    }

    #[derive(Clone, Copy, Debug)]
    enum Event {
        /// A process ends and is collected; its children go to another.
        Ends { number: i32, heir: Name },
        /// A process begins with this number.
        Begins {
            number: i32,
            name: Name,
            parent: Name,
        },
    }

    impl Model {
        fn question(&self) {
            while self.after.get() == 0 {
                let Some(event) = self.to_come.borrow_mut().pop() else {
                    return;
                };
                let left = self.to_come.borrow().len();
                self.after.set(self.chosen[left]);
                match event {
                    Event::Ends { number, heir } => {
                        let name = self.numbers.borrow_mut().remove(&number).unwrap();
                        for parent in self.parents.borrow_mut().values_mut() {
                            if *parent == name {
                                *parent = heir;
                            }
                        }
                    }
                    Event::Begins {
                        number,
                        name,
                        parent,
                    } => {
                        self.numbers.borrow_mut().insert(number, name);
                        self.parents.borrow_mut().insert(name, parent);
                    }
                }
            }
            self.after.set(self.after.get() - 1);
        }

        fn number_of(&self, name: Name) -> Option<i32> {
            let numbers = self.numbers.borrow();
            let mut found = numbers.iter().filter(|(_, it)| **it == name);
            found.next().map(|(number, _)| *number)
        }
    }

    impl Processes for Model {
        type Process = Name;
        fn open(&self, pid: i32) -> Option<Name> {
            self.question();
            self.numbers.borrow().get(&pid).copied()
        }
        fn parent(&self, process: &Name) -> Option<i32> {
            self.question();
            self.number_of(*process)?;
            let parent = self.parents.borrow()[process];
            Some(if parent == 0 {
                0
            } else {
                self.number_of(parent).unwrap()
            })
        }
    }

    /// The keeper 50 (name 5) is a subreaper below the first process. Stranger
    /// 30 (name 3) descends from 20 (name 2); member 80 (name 8) from 70 (name
    /// 7), which is the keeper's child.
    fn model(events: &[Event], chosen: Vec<usize>) -> Model {
        let numbers = [(1, 1), (20, 2), (30, 3), (50, 5), (70, 7), (80, 8)];
        let parents = [(1, 0), (2, 1), (3, 2), (5, 1), (7, 5), (8, 7)];
        Model {
            numbers: RefCell::new(numbers.into()),
            parents: RefCell::new(parents.into()),
            to_come: RefCell::new(events.iter().rev().copied().collect()),
            after: Cell::new(chosen[events.len()]),
            chosen,
        }
    }

    /// Runs `look` with every way in which `events` can fall between questions.
    fn in_every_order(events: &[Event], look: impl Fn(Model)) {
        const LATEST: usize = 9;
        let mut chosen = vec![0; events.len() + 1];
        loop {
            look(model(events, chosen.clone()));
            let Some(at) = chosen.iter().position(|after| *after < LATEST) else {
                return;
            };
            chosen[at] += 1;
            chosen[..at].fill(0);
        }
    }

    #[test]
    fn families_are_told_apart() {
        let quiet = || model(&[], vec![0]);
        for (pid, ancestor, expected) in [
            (50, 50, true),
            (70, 50, true),
            (80, 50, true),
            (30, 50, false),
            (20, 50, false),
            (1, 50, false),
            (99, 50, false),
            (80, 1, true),
        ] {
            assert_eq!(
                descends_by(&quiet(), pid, |it| it == ancestor),
                expected,
                "{pid}"
            );
        }
    }

    #[test]
    fn no_stranger_passes_while_numbers_change_hands() {
        // The stranger's parent ends, and a member of the family, and then
        // the keeper's own child, get its number.
        let events = [
            Event::Ends {
                number: 20,
                heir: 1,
            },
            Event::Begins {
                number: 20,
                name: 12,
                parent: 8,
            },
            Event::Ends {
                number: 20,
                heir: 5,
            },
            Event::Begins {
                number: 20,
                name: 13,
                parent: 5,
            },
        ];
        in_every_order(&events, |model| {
            assert!(!descends_by(&model, 30, |it| it == 50));
        });
    }

    #[test]
    fn a_member_whose_parent_ends_stays_one() {
        let events = [
            Event::Ends {
                number: 70,
                heir: 5,
            },
            Event::Begins {
                number: 70,
                name: 12,
                parent: 2,
            },
        ];
        in_every_order(&events, |model| {
            assert!(descends_by(&model, 80, |it| it == 50));
        });
    }

    #[test]
    fn generations_are_limited() {
        let depth = i32::try_from(MOST_GENERATIONS).unwrap() + 2;
        let model = model(&[], vec![0]);
        for number in 101..=100 + depth {
            let name = number.cast_unsigned();
            model.numbers.borrow_mut().insert(number, name);
            let parent = if number == 101 { 5 } else { name - 1 };
            model.parents.borrow_mut().insert(name, parent);
        }
        assert!(descends_by(&model, 98 + depth, |it| it == 50));
        assert!(!descends_by(&model, 100 + depth, |it| it == 50));
    }

    #[test]
    fn this_process_descends_from_its_parent() {
        let own = std::process::id().cast_signed();
        let parent = std::os::unix::process::parent_id().cast_signed();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = child.id().cast_signed();
        let by_pidfd =
            crate::pidfd::of_process(own).and_then(|process| crate::pidfd::parent(process.as_fd()));
        let found = (
            descends_by_proc(pid, |it| it == own),
            descends_by_proc(pid, |it| it == parent),
            descends_by_proc(own, |it| it == pid),
            by_pidfd.is_err() || descends(pid, |it| it == parent) && !descends(own, |it| it == pid),
        );
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, (true, true, false, true));
        if let Ok(told) = by_pidfd {
            assert_eq!(told, parent);
        }
    }
}
