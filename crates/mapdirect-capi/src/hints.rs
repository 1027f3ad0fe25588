//! Which mapping an address lies in, without a lock: what makes a flush cost what
//! it costs in Rust.
//!
//! A hint is of a mapping whose stores become durable without a look at it
//! ([`Flusher`]). It is left while the mapping's entry of the table is locked for
//! reading, and taken away while it is locked alone, so it never outlives that.
//! Whoever finds no hint goes to the table.

use mapdirect::{Durability, Flusher, raw};
use std::ops::Range;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicUsize, fence};

/// A sequence lock: odd while it changes.
struct Hint {
    version: AtomicUsize,
    start: AtomicUsize,
    end: AtomicUsize,
    writes_back: AtomicUsize,
}

/// Enough for as many pieces of 2 MiB.
const COUNT: usize = 64;

static HINTS: [Hint; COUNT] = [const {
    Hint {
        version: AtomicUsize::new(0),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        writes_back: AtomicUsize::new(0),
    }
}; COUNT];

#[inline]
fn hint(address: usize) -> &'static Hint {
    &HINTS[(address >> 21) % COUNT]
}

impl Hint {
    /// Changes it, unless somebody else does just now.
    fn change(&self, range: &Range<usize>, flusher: Option<Flusher>) {
        let version = self.version.load(Relaxed);
        let is_mine = version.is_multiple_of(2)
            && self
                .version
                .compare_exchange(version, version + 1, Acquire, Relaxed)
                .is_ok();
        if !is_mine {
            return;
        }
        fence(Release);
        let writes_back = flusher.map(Flusher::durability) == Some(Durability::CacheFlush);
        self.start.store(range.start, Relaxed);
        self.end.store(range.end, Relaxed);
        self.writes_back.store(usize::from(writes_back), Relaxed);
        self.version.store(version + 2, Release);
    }
}

/// Leaves a hint for an address of a mapping. The mapping's entry must be locked.
pub(crate) fn leave(address: usize, range: &Range<usize>, flusher: Flusher) {
    hint(address).change(range, Some(flusher));
}

/// Takes away what leads to a mapping. The mapping's entry must be locked alone:
/// whoever changes a hint meanwhile has it lead elsewhere.
pub(crate) fn forget(range: &Range<usize>) {
    for hint in &HINTS {
        let leads_there =
            hint.start.load(Relaxed) < range.end && range.start < hint.end.load(Relaxed);
        if leads_there {
            hint.change(&(0..0), None);
        }
    }
}

/// In a child of fork(2): what another thread was changing leads nowhere.
pub(crate) fn after_fork() {
    for hint in &HINTS {
        let version = hint.version.load(Relaxed);
        if !version.is_multiple_of(2) {
            hint.start.store(0, Relaxed);
            hint.end.store(0, Relaxed);
            hint.version.store(version + 1, Release);
        }
    }
}

/// How to flush bytes, if a hint says so.
#[inline]
fn find(address: usize, length: usize) -> Option<Flusher> {
    let hint = hint(address);
    let version = hint.version.load(Acquire);
    let (start, end) = (hint.start.load(Relaxed), hint.end.load(Relaxed));
    let writes_back = hint.writes_back.load(Relaxed);
    fence(Acquire);
    let is_whole = version.is_multiple_of(2) && hint.version.load(Relaxed) == version;
    let is_inside = start <= address && address < end && length <= end - address;
    if !is_whole || !is_inside || raw::any_revoked() {
        return None;
    }
    Flusher::new(if writes_back == 1 {
        Durability::CacheFlush
    } else {
        Durability::Automatic
    })
}

/// Flushes bytes, if there is a hint how; says whether there was.
#[inline]
pub(crate) fn flush(address: usize, length: usize) -> bool {
    let Some(flusher) = find(address, length) else {
        return false;
    };
    // SAFETY: the hint says that a mapping is there with such a flusher. It was so
    // a moment ago; a program that unmaps memory while it flushes it is wrong
    // whatever is done here, and nothing is written to.
    unsafe { flusher.flush_async(address, length) };
    true
}

/// Copies bytes and makes them durable, if there is a hint how; says whether there
/// was.
///
/// # Safety
///
/// Nobody unmaps the memory at `address` meanwhile.
#[inline]
pub(crate) unsafe fn write_persist(address: usize, from: &[u8]) -> bool {
    let Some(flusher) = find(address, from.len()) else {
        return false;
    };
    // SAFETY: as above, and by the caller's promise.
    unsafe { flusher.write_persist(address, from) };
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_for_what_is_inside() {
        let range = 0x7000_0000..0x7000_3000;
        let flusher = Flusher::new(Durability::Automatic).unwrap();
        leave(0x7000_1000, &range, flusher);
        assert_eq!(find(0x7000_0000, 0x3000), Some(flusher));
        for (address, length) in [
            (0x7000_0000, 0x3001),
            (0x7000_2fff, 2),
            (0x7000_3000, 0),
            (0x6fff_ffff, 1),
            (0x7000_0001, usize::MAX),
        ] {
            assert_eq!(find(address, length), None, "{address:#x} {length:#x}");
        }
        hint(0x7000_0000).version.fetch_add(1, Relaxed);
        assert_eq!(find(0x7000_0000, 1), None, "it changes");
        after_fork();
        assert_eq!(find(0x7000_0000, 1), None, "nobody knows what it was");
        leave(0x7000_0000, &range, flusher);
        assert!(find(0x7000_0000, 1).is_some());
        forget(&(0x7000_2000..0x7000_2001));
        assert_eq!(find(0x7000_0000, 1), None);
    }
}
