//! Chooses which event is looked at next. Users take turns, and each user's
//! events keep their order.
//!
//! A user with four thousand threads waits for himself; a user with one thread
//! is looked at as soon as every other user has had one turn.

use std::collections::{HashMap, VecDeque};

/// The waiting events, in one line for each user.
#[derive(Debug)]
pub(crate) struct Turns<T> {
    lines: HashMap<u32, VecDeque<T>>,
    /// The users who have events in line, next first.
    order: VecDeque<u32>,
    length: usize,
}

impl<T> Default for Turns<T> {
    fn default() -> Self {
        Self {
            lines: HashMap::new(),
            order: VecDeque::new(),
            length: 0,
        }
    }
}

impl<T> Turns<T> {
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Puts an event at the end of its user's line.
    pub(crate) fn push(&mut self, user: u32, event: T) {
        self.line(user).push_back(event);
    }

    /// Puts back an event that has had its turn without result.
    pub(crate) fn put_back(&mut self, user: u32, event: T) {
        self.line(user).push_front(event);
    }

    fn line(&mut self, user: u32) -> &mut VecDeque<T> {
        self.length += 1;
        let order = &mut self.order;
        self.lines.entry(user).or_insert_with(|| {
            order.push_back(user);
            VecDeque::new()
        })
    }

    /// The first event in the line of the next user for whom `may` says yes.
    pub(crate) fn next(&mut self, may: impl Fn(u32) -> bool) -> Option<(u32, T)> {
        let at = self.order.iter().position(|user| may(*user))?;
        let user = self.order.remove(at)?;
        let line = self.lines.get_mut(&user)?;
        let event = line.pop_front()?;
        self.length -= 1;
        if line.is_empty() {
            self.lines.remove(&user);
        } else {
            self.order.push_back(user);
        }
        Some((user, event))
    }

    /// Removes the first events from the lines of the users for whom `may` says
    /// yes, as long as the events are `due`.
    pub(crate) fn take_due(
        &mut self,
        may: impl Fn(u32) -> bool,
        due: impl Fn(&T) -> bool,
    ) -> Vec<T> {
        let mut taken = Vec::new();
        for (user, line) in &mut self.lines {
            while may(*user) && line.front().is_some_and(&due) {
                taken.extend(line.pop_front());
            }
        }
        self.length -= taken.len();
        let lines = &mut self.lines;
        self.order
            .retain(|user| lines.get(user).is_some_and(|line| !line.is_empty()));
        lines.retain(|_, line| !line.is_empty());
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_crowd_of_one_user_is_in_nobody_elses_way() {
        let mut turns = Turns::default();
        for event in 0..4000 {
            turns.push(7, event);
        }
        turns.push(0, 9000);
        turns.push(8, 9001);
        assert_eq!(turns.len(), 4002);
        let first: Vec<_> = (0..5).filter_map(|_| turns.next(|_| true)).collect();
        assert_eq!(first, [(7, 0), (0, 9000), (8, 9001), (7, 1), (7, 2)]);
        assert_eq!(turns.next(|user| user != 7), None);
        turns.put_back(7, 2);
        assert_eq!(turns.next(|_| true), Some((7, 2)));
        assert_eq!(turns.len(), 3997);
    }

    #[test]
    fn what_is_due_goes_and_the_rest_stays() {
        let mut turns = Turns::default();
        for event in 0..10 {
            turns.push(event % 2, event);
        }
        let mut due = turns.take_due(|user| user == 1, |event| *event < 6);
        due.sort_unstable();
        assert_eq!(due, [1, 3, 5]);
        assert_eq!(turns.len(), 7);
        turns.take_due(|_| true, |_| true);
        assert!(turns.is_empty());
        assert_eq!(turns.next(|_| true), None);
        turns.push(1, 1);
        assert_eq!(turns.next(|_| true), Some((1, 1)));
    }

    proptest! {
        /// Nothing is lost, each line keeps its order, and no user has two
        /// turns while another waits.
        #[test]
        fn turns_are_fair(users in proptest::collection::vec(0u32..5, 0..60)) {
            let mut turns = Turns::default();
            for (at, user) in users.iter().enumerate() {
                turns.push(*user, at);
            }
            let mut out = Vec::new();
            while let Some(next) = turns.next(|_| true) {
                out.push(next);
            }
            prop_assert_eq!(out.len(), users.len());
            for user in 0..5 {
                let line: Vec<_> = out.iter().filter(|(of, _)| *of == user).collect();
                prop_assert!(line.is_sorted());
            }
            for (at, pair) in out.windows(2).enumerate() {
                let others = out[at + 1..].iter().any(|(user, _)| *user != pair[0].0);
                prop_assert!(pair[0].0 != pair[1].0 || !others);
            }
        }
    }
}
