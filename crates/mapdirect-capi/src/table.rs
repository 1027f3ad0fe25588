//! Values by address or number: mappings and pins.
//!
//! C has no objects, so what belongs to an address is looked up. A table is a list
//! of entries that only grows; entries are used again. Each has a lock of its own,
//! and there is no other: a child of fork(2) lacks the threads that held locks,
//! and so sets them free ([`Table::after_fork`]). What a thread was changing at
//! that moment is of no use to the child; such an entry is broken, and says so.

use crate::boundary::Failure;
use mapdirect_sys::errno;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize};
use std::time::Duration;

/// The lock of an entry: this many readers, or one of the two below.
const IDLE: u32 = 0;
const CHANGING: u32 = u32::MAX;
const BROKEN: u32 = u32::MAX - 1;

#[derive(Debug)]
struct Entry<T> {
    state: AtomicU32,
    /// Where it is. Nobody is there if the end is not behind the start.
    start: AtomicUsize,
    end: AtomicUsize,
    value: UnsafeCell<Option<T>>,
    next: *const Entry<T>,
}

// SAFETY: `value` is reached only by way of the lock, shared by `read` and alone
// by `change`; `next` leads to an entry that is never freed.
unsafe impl<T: Send + Sync> Sync for Entry<T> {}

/// Sets the lock free, or breaks the entry if its user panicked while changing it.
struct Turn<'a> {
    state: &'a AtomicU32,
    alone: bool,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if !self.alone {
            self.state.fetch_sub(1, Release);
        } else if std::thread::panicking() {
            self.state.store(BROKEN, Release);
        } else {
            self.state.store(IDLE, Release);
        }
    }
}

impl<T> Entry<T> {
    fn range(&self) -> Range<usize> {
        let end = self.end.load(Acquire);
        self.start.load(Acquire)..end
    }

    /// Waits for a turn; `None` if it is broken.
    fn turn(&self, alone: bool) -> Option<Turn<'_>> {
        let state = &self.state;
        for tried in 0u32.. {
            let now = state.load(Relaxed);
            let next = match (alone, now) {
                (_, BROKEN) => return None,
                (true, IDLE) => Some(CHANGING),
                (false, readers) if readers < BROKEN - 1 => Some(readers + 1),
                _ => None,
            };
            if let Some(next) = next
                && state
                    .compare_exchange_weak(now, next, AcqRel, Relaxed)
                    .is_ok()
            {
                return Some(Turn { state, alone });
            }
            // Others write back to a disk, or speak with the guard.
            if tried > 100 {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        None
    }
}

/// Entries, from the last that was added to the first.
#[derive(Debug)]
pub(crate) struct Table<T> {
    first: AtomicPtr<Entry<T>>,
}

impl<T: Send + Sync + 'static> Table<T> {
    pub(crate) const fn new() -> Self {
        Self {
            first: AtomicPtr::new(ptr::null_mut()),
        }
    }

    fn entries(&self) -> impl Iterator<Item = &'static Entry<T>> {
        let mut at: *const Entry<T> = self.first.load(Acquire);
        std::iter::from_fn(move || {
            // SAFETY: null, or made by `Box::into_raw` in `insert` and never
            // freed.
            let entry = unsafe { at.as_ref() }?;
            at = entry.next;
            Some(entry)
        })
    }

    /// Adds a value; nothing else is at its place.
    pub(crate) fn insert(&self, range: Range<usize>, value: T) {
        for entry in self.entries() {
            let taken = || entry.end.load(Relaxed) != 0;
            let claimed = !taken()
                && entry
                    .state
                    .compare_exchange(IDLE, CHANGING, AcqRel, Relaxed)
                    .is_ok();
            if !claimed {
                continue;
            }
            let turn = Turn {
                state: &entry.state,
                alone: true,
            };
            if taken() {
                continue;
            }
            // SAFETY: this thread has the entry alone.
            unsafe { *entry.value.get() = Some(value) };
            entry.start.store(range.start, Release);
            entry.end.store(range.end, Release);
            drop(turn);
            return;
        }
        let entry = Box::into_raw(Box::new(Entry {
            state: AtomicU32::new(IDLE),
            start: AtomicUsize::new(range.start),
            end: AtomicUsize::new(range.end),
            value: UnsafeCell::new(Some(value)),
            next: ptr::null(),
        }));
        let mut first = self.first.load(Acquire);
        loop {
            // SAFETY: made above, and seen by nobody yet.
            unsafe { (*entry).next = first };
            match self
                .first
                .compare_exchange_weak(first, entry, AcqRel, Acquire)
            {
                Ok(_) => return,
                Err(other) => first = other,
            }
        }
    }

    /// The places in use that meet a range.
    pub(crate) fn meeting(&self, range: &Range<usize>) -> Vec<Range<usize>> {
        let meets = |place: &Range<usize>| place.start < range.end && range.start < place.end;
        self.entries().map(Entry::range).filter(meets).collect()
    }

    /// Whether any place in use meets a range; takes no memory.
    pub(crate) fn meets(&self, range: &Range<usize>) -> bool {
        let meets = |place: Range<usize>| place.start < range.end && range.start < place.end;
        self.entries().map(Entry::range).any(meets)
    }

    fn find(&self, at: usize, alone: bool) -> Result<(&'static Entry<T>, Turn<'static>), Failure> {
        for entry in self.entries() {
            if !entry.range().contains(&at) {
                continue;
            }
            let turn = entry.turn(alone).ok_or_else(broken)?;
            if entry.range().contains(&at) {
                return Ok((entry, turn));
            }
        }
        Err(nothing_there())
    }

    /// Looks at the value at a place, together with others who do.
    pub(crate) fn read<R>(
        &self,
        at: usize,
        look: impl FnOnce(&T, Range<usize>) -> Result<R, Failure>,
    ) -> Result<R, Failure> {
        let (entry, _turn) = self.find(at, false)?;
        // SAFETY: whoever has a turn to read shares it with readers alone.
        let value = unsafe { &*entry.value.get() };
        look(value.as_ref().ok_or_else(nothing_there)?, entry.range())
    }

    /// Changes the value at a place, alone.
    pub(crate) fn change<R>(
        &self,
        at: usize,
        change: impl FnOnce(&mut T, Range<usize>) -> Result<R, Failure>,
    ) -> Result<R, Failure> {
        let (entry, _turn) = self.find(at, true)?;
        // SAFETY: this thread has the entry alone.
        let value = unsafe { &mut *entry.value.get() };
        change(value.as_mut().ok_or_else(nothing_there)?, entry.range())
    }

    /// Takes the value at a place out, when others are done with it; `gone` hears
    /// of the place before another can be there. `None` if it is broken: then
    /// nothing can be said of it but that its place is free.
    pub(crate) fn take(
        &self,
        at: usize,
        gone: impl FnOnce(&Range<usize>),
    ) -> Result<Option<T>, Failure> {
        for entry in self.entries() {
            if !entry.range().contains(&at) {
                continue;
            }
            let turn = entry.turn(true);
            if !entry.range().contains(&at) {
                continue;
            }
            gone(&entry.range());
            if turn.is_none() {
                // It stays broken, without a place.
                entry.start.store(usize::MAX, Release);
                return Ok(None);
            }
            entry.end.store(0, Release);
            entry.start.store(0, Release);
            // SAFETY: this thread has the entry alone.
            let value = unsafe { &mut *entry.value.get() };
            return Ok(value.take());
        }
        Err(nothing_there())
    }

    /// The first bytes of all places in use.
    pub(crate) fn places(&self) -> Vec<usize> {
        let used = |place: &Range<usize>| place.start < place.end;
        let ranges = self.entries().map(Entry::range).filter(used);
        ranges.map(|range| range.start).collect()
    }

    /// In a child of fork(2), where no other thread is: nobody has a turn.
    pub(crate) fn after_fork(&self) {
        for entry in self.entries() {
            let next = match entry.state.load(Relaxed) {
                CHANGING | BROKEN => BROKEN,
                _ => IDLE,
            };
            entry.state.store(next, Relaxed);
        }
    }
}

fn nothing_there() -> Failure {
    Failure::new(
        errno::EINVAL,
        "there is no pin of this library",
        "give an address inside of what mapdirect_mmap returned, or what mapdirect_pin_fd returned",
    )
}

fn broken() -> Failure {
    Failure::new(
        errno::EIO,
        "another thread was changing this when it panicked, or when this process was forked",
        "end it, and map or pin the file again",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn values_are_found_by_every_place_of_theirs() {
        let table = Table::new();
        table.insert(10..20, 'a');
        table.insert(20..21, 'b');
        let at = |at| table.read(at, |value, _| Ok(*value)).ok();
        assert_eq!(
            [9, 10, 19, 20, 21].map(at),
            [None, Some('a'), Some('a'), Some('b'), None]
        );
        assert_eq!(table.meeting(&(0..11)).first(), Some(&(10..20)));
        assert!(table.meets(&(19..20)) && !table.meets(&(21..22)) && !table.meets(&(0..10)));
        assert_eq!(table.take(15, |_| ()).unwrap(), Some('a'));
        assert!(table.take(15, |_| ()).is_err());
        table.insert(1..2, 'c');
        assert_eq!(table.entries().count(), 2, "an entry is used again");
        let mut places = table.places();
        places.sort_unstable();
        assert_eq!(places, [1, 20]);
    }

    #[test]
    fn a_child_breaks_what_was_being_changed_alone() {
        let table = Table::new();
        for place in 0..3 {
            table.insert(place..place + 1, place);
        }
        let turns = [(0, true), (1, false)].map(|(at, alone)| table.find(at, alone).unwrap());
        table.after_fork();
        std::mem::forget(turns);
        assert!(table.read(0, |_, _| Ok(())).is_err());
        assert_eq!(table.take(0, |_| ()).unwrap(), None);
        assert!(table.take(0, |_| ()).is_err());
        assert_eq!(table.take(1, |_| ()).unwrap(), Some(1));
        assert_eq!(table.take(2, |_| ()).unwrap(), Some(2));
    }

    #[test]
    fn threads_see_whole_values() {
        static TABLE: Table<[usize; 2]> = Table::new();
        static OVER: AtomicBool = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for lane in 0..3 {
                scope.spawn(move || {
                    for round in 0..2000 {
                        TABLE.insert(lane..lane + 1, [round; 2]);
                        TABLE
                            .change(lane, |value, _| {
                                value[0] += 1;
                                value[1] += 1;
                                Ok(())
                            })
                            .unwrap();
                        assert_eq!(TABLE.take(lane, |_| ()).unwrap(), Some([round + 1; 2]));
                    }
                    OVER.store(true, Relaxed);
                });
            }
            scope.spawn(|| {
                while !OVER.load(Relaxed) {
                    for lane in 0..3 {
                        let same = TABLE.read(lane, |[one, two], _| Ok(one == two));
                        assert!(same.unwrap_or(true));
                    }
                }
            });
        });
        assert!(TABLE.places().is_empty());
    }
}
