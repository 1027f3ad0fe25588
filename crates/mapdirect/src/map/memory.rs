//! Reading and writing shared memory that others change meanwhile.
//!
//! Two rules, obeyed throughout this crate:
//!
//! 1. No reference to the memory is ever formed, neither `&[u8]` nor
//!    `&mut [u8]`: both promise the compiler that nobody else writes. A pin
//!    stops others from truncating the file, not from storing to it.
//! 2. Every access is atomic, aligned and of one size, eight bytes: what other
//!    threads and processes do is then never undefined, and eight aligned
//!    bytes are never torn. Bytes at the edges are merged into their word by
//!    compare and exchange, so that a neighbour's store is never lost.
//!
//! Words never straddle pages, so an access touches no page its bytes are not
//! in.
//!
//! Typed access to less than eight bytes keeps to the second rule as well: it
//! works on the word around them. Rust has no meaning for atomic accesses of
//! different sizes to the same bytes at the same time.

use mapdirect_sys::cache;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, SeqCst};
use std::sync::atomic::{AtomicU64, Ordering, fence};

const WORD: usize = size_of::<u64>();

/// Mapped memory of `length` bytes, in whole pages from the address on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    base: NonNull<u8>,
    length: usize,
}

impl Memory {
    /// Memory at `base`.
    ///
    /// # Safety
    ///
    /// `base` must be aligned to 8, and `length` bytes from there, rounded up
    /// to a multiple of 8, must be mapped for reading for as long as the value
    /// or a copy of it is used; and for writing, if any method but
    /// [`read`](Self::read) and [`load`](Self::load) is used.
    pub(crate) unsafe fn new(base: NonNull<u8>, length: usize) -> Self {
        Self { base, length }
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(crate) fn length(&self) -> usize {
        self.length
    }

    /// Whether `count` bytes at `offset` lie inside.
    pub(crate) fn contains(&self, offset: usize, count: usize) -> bool {
        offset <= self.length && count <= self.length - offset
    }

    /// The word that holds byte `offset`.
    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset < self.length, "the callers checked the bounds");
        let at = offset - offset % WORD;
        // SAFETY: `at` is below the length, so this stays inside the mapping
        // (or one past it, never reached).
        let pointer = unsafe { self.base.add(at) };
        // SAFETY: aligned, since `base` and `at` are; mapped for reading, by the
        // promise made to `new`, and for writing unless the caller does no more
        // than relaxed loads, which are allowed on read-only memory; every
        // access of this crate to the memory is atomic and of this size.
        // `&AtomicU64` allows others to write.
        unsafe { AtomicU64::from_ptr(pointer.cast::<u64>().as_ptr()) }
    }

    /// Copies bytes out. The range must be inside.
    pub(crate) fn read(&self, offset: usize, into: &mut [u8]) {
        let mut at = offset;
        let mut rest = into;
        while !rest.is_empty() {
            let skip = at % WORD;
            let count = (WORD - skip).min(rest.len());
            let word = self.word(at).load(Relaxed).to_ne_bytes();
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&word[skip..skip + count]);
            rest = later;
            at += count;
        }
    }

    /// Copies bytes in. The range must be inside.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) {
        let mut at = offset;
        let mut rest = from;
        while !rest.is_empty() {
            let skip = at % WORD;
            let count = (WORD - skip).min(rest.len());
            let (now, later) = rest.split_at(count);
            if let Ok(whole) = <[u8; WORD]>::try_from(now) {
                self.word(at).store(u64::from_ne_bytes(whole), Relaxed);
            } else {
                self.merge(at, now);
            }
            rest = later;
            at += count;
        }
    }

    /// Fills bytes. The range must be inside.
    pub(crate) fn fill(&self, offset: usize, count: usize, byte: u8) {
        let piece = [byte; 4096];
        let mut at = offset;
        let end = offset + count;
        // Pieces end where words do, so that all but the ends are whole words.
        while at < end {
            let until = end.min(at - at % piece.len() + piece.len());
            self.write(at, &piece[..until - at]);
            at = until;
        }
    }

    /// Loads a value. It must be inside, at a multiple of its size. Nothing but
    /// a relaxed load is done to the memory, which may be read-only; fences do
    /// the rest.
    pub(crate) fn load<T: Word>(&self, offset: usize, order: Ordering) -> T {
        match order {
            Relaxed | Acquire => {}
            SeqCst => fence(SeqCst),
            // Panics as the standard library does.
            other => {
                let _ = AtomicU64::new(0).load(other);
            }
        }
        let word = self.word(offset).load(Relaxed);
        if order != Relaxed {
            fence(order);
        }
        T::of(word, offset % WORD)
    }

    /// Stores a value. It must be inside, at a multiple of its size.
    pub(crate) fn store<T: Word>(&self, offset: usize, value: T, order: Ordering) {
        let (word, skip) = (self.word(offset), offset % WORD);
        if T::SIZE == WORD {
            return word.store(value.put(0, skip), order);
        }
        if matches!(order, Acquire | AcqRel) {
            // Panics as the standard library does.
            AtomicU64::new(0).store(0, order);
        }
        // The closure always answers, so this only retries.
        let _ = word.fetch_update(order, Relaxed, |there| Some(value.put(there, skip)));
    }

    /// Adds to a value, wrapping, and returns what it was. It must be inside,
    /// at a multiple of its size.
    pub(crate) fn fetch_add<T: Word>(&self, offset: usize, value: T, order: Ordering) -> T {
        let (word, skip) = (self.word(offset), offset % WORD);
        let added = |there: u64| Some(T::of(there, skip).sum(value).put(there, skip));
        match word.fetch_update(order, Relaxed, added) {
            Ok(there) | Err(there) => T::of(there, skip),
        }
    }

    /// Stores a value if it is `current`; returns what it was. It must be
    /// inside, at a multiple of its size.
    pub(crate) fn compare_exchange<T: Word>(
        &self,
        offset: usize,
        (current, new): (T, T),
        (success, failure): (Ordering, Ordering),
    ) -> Result<T, T> {
        let (word, skip) = (self.word(offset), offset % WORD);
        let mut there = word.load(failure);
        loop {
            let found = T::of(there, skip);
            if found != current {
                return Err(found);
            }
            let wanted = new.put(there, skip);
            match word.compare_exchange_weak(there, wanted, success, failure) {
                Ok(_) => return Ok(current),
                // Its own bytes, or those of a neighbour in the word.
                Err(other) => there = other,
            }
        }
    }

    /// Puts a part of a word into the word that holds byte `offset`.
    fn merge(&self, offset: usize, part: &[u8]) {
        let skip = offset % WORD;
        let merged = |old: u64| {
            let mut bytes = old.to_ne_bytes();
            bytes[skip..skip + part.len()].copy_from_slice(part);
            Some(u64::from_ne_bytes(bytes))
        };
        // The closure always answers, so this only retries.
        let _ = self.word(offset).fetch_update(Relaxed, Relaxed, merged);
    }

    /// Copies bytes in, past the cache where that is possible, on their way to
    /// the media: [`cache::drain`] waits for it. The range must be inside.
    #[inline]
    pub(crate) fn stream(&self, offset: usize, from: &[u8]) {
        assert!(self.contains(offset, from.len()), "the callers checked");
        let head = (offset.next_multiple_of(WORD) - offset).min(from.len());
        let (first, rest) = from.split_at(head);
        let (words, last) = rest.split_at(rest.len() - rest.len() % WORD);
        if !words.is_empty() {
            let address = self.base.as_ptr().expose_provenance() + offset + head;
            // SAFETY: whole words inside the mapping, which is mapped for
            // writing by the promise made to `new`; no reference to it exists.
            unsafe { cache::stream(address, words) };
        }
        for (part, at) in [(first, offset), (last, offset + from.len() - last.len())] {
            if !part.is_empty() {
                self.merge(at, part);
                self.write_back(at, part.len());
            }
        }
    }

    /// Starts to write cache lines back. The range must be inside.
    #[inline]
    pub(crate) fn write_back(&self, offset: usize, count: usize) {
        assert!(self.contains(offset, count), "the callers checked");
        let address = self.base.as_ptr().expose_provenance() + offset;
        // SAFETY: lines of the mapping, which consists of whole pages.
        unsafe { cache::write_back(address, count) };
    }
}

/// A value that lies in a word, at a multiple of its own size.
pub trait Word: Copy + Eq {
    /// Bytes of the value.
    const SIZE: usize;
    /// The value at byte `skip` of a word.
    fn of(word: u64, skip: usize) -> Self;
    /// The word with the value at byte `skip`.
    fn put(self, word: u64, skip: usize) -> u64;
    /// The sum, wrapping.
    fn sum(self, other: Self) -> Self;
}

macro_rules! words {
    ($($name:ident)*) => {$(
        impl Word for $name {
            const SIZE: usize = size_of::<Self>();

            fn of(word: u64, skip: usize) -> Self {
                let mut bytes = [0; size_of::<Self>()];
                bytes.copy_from_slice(&word.to_ne_bytes()[skip..skip + Self::SIZE]);
                Self::from_ne_bytes(bytes)
            }

            fn put(self, word: u64, skip: usize) -> u64 {
                let mut bytes = word.to_ne_bytes();
                bytes[skip..skip + Self::SIZE].copy_from_slice(&self.to_ne_bytes());
                u64::from_ne_bytes(bytes)
            }

            fn sum(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
        }
    )*};
}

words!(u8 u16 u32 u64 i8 i16 i32 i64);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn memory(words: &mut [u64]) -> Memory {
        let base = NonNull::new(words.as_mut_ptr().cast()).unwrap();
        // SAFETY: the words are aligned and outlive the uses in these tests.
        unsafe { Memory::new(base, size_of_val(words)) }
    }

    proptest! {
        #[test]
        fn it_reads_and_writes_what_a_slice_would(
            initial in proptest::collection::vec(any::<u64>(), 1..20),
            at in any::<prop::sample::Index>(),
            data in proptest::collection::vec(any::<u8>(), 0..160),
        ) {
            let mut words = initial.clone();
            let mut model: Vec<u8> = initial.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let memory = memory(&mut words);
            let offset = at.index(model.len() + 1);
            let data = &data[..data.len().min(model.len() - offset)];
            prop_assert!(memory.contains(offset, data.len()));
            memory.write(offset, data);
            model[offset..offset + data.len()].copy_from_slice(data);
            let mut all = vec![0; model.len()];
            memory.read(0, &mut all);
            prop_assert_eq!(&all, &model);
            let mut part = vec![0; data.len()];
            memory.read(offset, &mut part);
            prop_assert_eq!(&part, data);
            let other: Vec<u8> = data.iter().map(|byte| !byte).collect();
            memory.stream(offset, &other);
            cache::drain();
            model[offset..offset + data.len()].copy_from_slice(&other);
            memory.read(0, &mut all);
            prop_assert_eq!(&all, &model);
        }
    }

    #[test]
    fn filling_touches_nothing_else() {
        for (start, end) in [
            (0, 0),
            (3, 3),
            (1, 7),
            (5, 4096 + 9),
            (8, 12_288),
            (4095, 8193),
        ] {
            let mut words = vec![u64::MAX; 12_288 / WORD];
            let memory = memory(&mut words);
            memory.fill(start, end - start, 7);
            let mut bytes = vec![0; 12_288];
            memory.read(0, &mut bytes);
            for (at, byte) in bytes.into_iter().enumerate() {
                let expected = if (start..end).contains(&at) { 7 } else { 0xff };
                assert_eq!(byte, expected, "{at} of {start}..{end}");
            }
        }
    }

    fn every_size<T: Word + std::fmt::Debug>(values: [T; 3]) {
        let [one, two, sum] = values;
        let mut words = [u64::MAX; 4];
        let memory = memory(&mut words);
        for offset in (0..32).step_by(T::SIZE) {
            memory.store(offset, one, Ordering::Release);
            assert_eq!(memory.load::<T>(offset, Acquire), one);
            let there = memory.fetch_add(offset, two, SeqCst);
            assert_eq!(there, one);
            assert_eq!(memory.load::<T>(offset, SeqCst), sum);
            let wrong = memory.compare_exchange(offset, (one, two), (AcqRel, Acquire));
            assert_eq!(wrong, Err(sum));
            let right = memory.compare_exchange(offset, (sum, two), (AcqRel, Relaxed));
            assert_eq!(right, Ok(sum));
            // Nothing beside it has changed.
            let mut bytes = [0; 32];
            memory.read(0, &mut bytes);
            let around = bytes[..offset].iter().chain(&bytes[offset + T::SIZE..]);
            assert!(
                around.copied().all(|byte| byte == 0xff),
                "{offset} {bytes:?}"
            );
            memory.fill(offset, T::SIZE, 0xff);
        }
    }

    #[test]
    fn values_of_every_size_are_atomic_at_every_offset() {
        every_size::<u8>([200, 100, 44]);
        every_size::<i8>([-100, -100, 56]);
        every_size::<u16>([65_000, 1000, 464]);
        every_size::<i16>([-5, 7, 2]);
        every_size::<u32>([1, u32::MAX, 0]);
        every_size::<i32>([i32::MAX, 1, i32::MIN]);
        every_size::<u64>([1 << 40, 5, (1 << 40) + 5]);
        every_size::<i64>([-1, -1, -2]);
    }

    #[test]
    fn counters_in_one_word_lose_nothing() {
        let mut words = [0u64; 1];
        let memory = memory(&mut words);
        let base = memory.base().as_ptr() as usize;
        std::thread::scope(|scope| {
            for lane in 0..4usize {
                scope.spawn(move || {
                    let base = NonNull::new(std::ptr::with_exposed_provenance_mut(base)).unwrap();
                    // SAFETY: the word outlives the scope.
                    let memory = unsafe { Memory::new(base, 8) };
                    for _ in 0..1000 {
                        memory.fetch_add::<u16>(2 * (lane % 4), 1, Relaxed);
                        memory.fetch_add::<u16>(2 * ((lane + 1) % 4), 1, Relaxed);
                    }
                });
            }
        });
        for lane in 0..4 {
            assert_eq!(memory.load::<u16>(2 * lane, Relaxed), 2000);
        }
    }

    #[test]
    fn an_ordering_that_makes_no_sense_panics_as_ever() {
        let mut words = [0u64; 1];
        let memory = memory(&mut words);
        let memory = std::panic::AssertUnwindSafe(memory);
        let panics = |run: &dyn Fn()| {
            let run = std::panic::AssertUnwindSafe(run);
            std::panic::catch_unwind(run).is_err()
        };
        for order in [Ordering::Release, AcqRel] {
            assert!(panics(&|| {
                let _ = memory.load::<u32>(0, order);
            }));
        }
        for order in [Acquire, AcqRel] {
            assert!(panics(&|| memory.store::<u32>(0, 1, order)));
            assert!(panics(&|| memory.store::<u64>(0, 1, order)));
        }
    }

    #[test]
    fn bounds_do_not_overflow() {
        let memory = memory(&mut [0; 4]);
        assert!(memory.contains(0, 32) && memory.contains(32, 0));
        assert!(!memory.contains(0, 33) && !memory.contains(33, 0));
        assert!(!memory.contains(usize::MAX, 2) && !memory.contains(2, usize::MAX));
    }

    #[test]
    fn neighbours_in_one_word_do_not_lose_stores() {
        let mut words = [0u64; 1];
        let memory = memory(&mut words);
        let base = memory.base().as_ptr() as usize;
        std::thread::scope(|scope| {
            for lane in 0..8usize {
                scope.spawn(move || {
                    let base = NonNull::new(std::ptr::with_exposed_provenance_mut(base)).unwrap();
                    // SAFETY: the word outlives the scope.
                    let memory = unsafe { Memory::new(base, 8) };
                    for value in 0..=255u8 {
                        memory.write(lane, &[value]);
                    }
                });
            }
        });
        assert_eq!(words[0], u64::MAX);
    }
}
