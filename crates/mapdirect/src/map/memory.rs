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

use mapdirect_sys::cache;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

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
    /// to a multiple of 8, must be mapped for reading and writing for as long
    /// as the value or a copy of it is used.
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
        // SAFETY: aligned, since `base` and `at` are; mapped for reading and
        // writing, by the promise made to `new`; every access of this crate
        // to the memory is atomic and of this size. `&AtomicU64` allows
        // others to write.
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
