//! What the next guard with the fanotify gate has to know of pins, and of files
//! behind the gate.
//!
//! The journal is two memory files that [whoever started the guard](crate::store)
//! keeps as well. Each is a row of [records](record) of one size. A record is
//! written when its pin or file begins, and cleared when it ends: there is nothing
//! to replay. What changes most, the block map of a pin, is there as a sum only:
//! the next guard reads the map itself, and has to know whether it is the same.
//!
//! The first place of the row of pins is the head of the journal. It has the
//! version, and a number above which no event of the gate has had a descriptor:
//! see [`Journal::note_descriptor`].

mod record;

pub(crate) use self::record::{FileRecord, LivesBy, PinRecord, UNKNOWN, sum_of};

#[cfg(feature = "fuzzing")]
pub(crate) use self::record::fuzz;
use self::record::{FILE, PIN, Place};
use crate::Errno;
use crate::store::Starter;
use rustix::fs::MemfdFlags;
use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The names of the two files in the store.
const NAMES: [&str; 2] = ["journal-pins", "journal-files"];

/// Begins the head, and changes when a guard of another version cannot read the
/// records, or looks for what belongs to them under other names.
const MAGIC: [u8; 8] = *b"MDJRNL\x02\0";
/// Where the number is that [`Journal::note_descriptor`] notes.
const DESCRIPTOR_AT: u64 = 8;

/// How far beyond the descriptors that were noted the next one may be. New
/// descriptors have the lowest free numbers, and what stays open for long is
/// noted, too: clients, and what pins live by. So this is for what the guard has
/// open for a moment. It costs the next guard a system call each.
const ROOM: i32 = 4096;

/// The journal of a guard.
#[derive(Debug)]
pub(crate) struct Journal {
    pins: Row,
    files: Row,
    /// What is noted of descriptors.
    highest: AtomicI32,
    starter: Arc<Starter>,
}

/// A row of records of one size.
#[derive(Debug)]
struct Row {
    file: OwnedFd,
    size: usize,
    places: Mutex<Places>,
}

#[derive(Debug, Default)]
struct Places {
    free: Vec<u64>,
    /// The first place beyond all that were ever taken.
    end: u64,
    /// Places that are not taken, by what a name ends with that is left of them.
    barred: BTreeSet<String>,
}

/// What an earlier guard has left.
#[derive(Debug)]
pub(crate) struct Left {
    pub(crate) pins: Vec<(PinRecord, Kept)>,
    pub(crate) files: Vec<(FileRecord, Kept)>,
    /// Records that make no sense.
    pub(crate) nonsense: usize,
    /// Every descriptor of an event that the earlier guard has read and not
    /// answered has a lower number.
    pub(crate) descriptors: i32,
}

/// A record of the journal, as long as what it is about.
#[derive(Debug)]
pub(crate) struct Kept {
    journal: Arc<Journal>,
    row: fn(&Journal) -> &Row,
    at: u64,
    /// A descriptor is kept with it, under a name that begins so.
    prefix: Option<&'static str>,
    is_over: AtomicBool,
    /// Locked while the record changes.
    changing: Mutex<()>,
}

impl Journal {
    /// A new journal, which is kept.
    pub(crate) fn new(starter: &Arc<Starter>) -> Result<Arc<Self>, Errno> {
        let make = |name: &str| rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC);
        let files = [make(NAMES[0])?, make(NAMES[1])?];
        for (name, file) in NAMES.iter().zip(&files) {
            starter.keep(name, file.as_fd())?;
        }
        let journal = Self::of(files, starter);
        journal.pins.places().end = 1;
        journal.pins.write(0, &MAGIC)?;
        Ok(Arc::new(journal))
    }

    /// Forgets what an earlier guard has left, after [`found`](Self::found) has
    /// found none.
    pub(crate) fn forget(starter: &Starter) {
        for name in NAMES {
            starter.let_go(name);
        }
    }

    fn of([pins, files]: [OwnedFd; 2], starter: &Arc<Starter>) -> Self {
        Self {
            pins: Row::new(pins, PIN),
            files: Row::new(files, FILE),
            highest: AtomicI32::new(0),
            starter: Arc::clone(starter),
        }
    }

    /// The journal that an earlier guard has left, and what is in it. `None` if
    /// there is none, or none that this guard can read.
    pub(crate) fn found(starter: &Arc<Starter>) -> Option<(Arc<Self>, Left)> {
        let [pins, files] = NAMES.map(|name| starter.take(name));
        let journal = Arc::new(Self::of([pins?, files?], starter));
        let head = journal.pins.read(0).ok()?;
        let (magic, rest) = head.split_first_chunk()?;
        if *magic != MAGIC {
            return None;
        }
        let descriptors = i32::from_le_bytes(*rest.first_chunk()?);
        journal.highest.store(descriptors.max(0), SeqCst);
        let mut nonsense = 0;
        let pins = journal.gather(|journal| &journal.pins, 1, PinRecord::decode, &mut nonsense);
        let files = journal.gather(
            |journal| &journal.files,
            0,
            FileRecord::decode,
            &mut nonsense,
        );
        let (mut pins, mut files) = (pins.ok()?, files.ok()?);
        for (record, kept) in &mut pins {
            kept.prefix = (record.lives_by == LivesBy::Pipe).then_some(PIPE_PREFIX);
        }
        for (_, kept) in &mut files {
            kept.prefix = Some(FILE_PREFIX);
        }
        let left = Left {
            pins,
            files,
            nonsense,
            descriptors: descriptors.max(0).saturating_add(ROOM),
        };
        Some((journal, left))
    }

    fn gather<T>(
        self: &Arc<Self>,
        row: fn(&Self) -> &Row,
        first: u64,
        decode: impl Fn(&[u8]) -> Place<T>,
        nonsense: &mut usize,
    ) -> Result<Vec<(T, Kept)>, Errno> {
        let mut found = Vec::new();
        let count = row(self).count()?;
        let mut free = Vec::new();
        for at in first..count {
            match decode(&row(self).read(at)?) {
                Place::Free => free.push(at),
                Place::Taken(record) => found.push((record, self.kept(row, at, None))),
                Place::Nonsense => {
                    *nonsense += 1;
                    row(self).clear(at)?;
                    free.push(at);
                }
            }
        }
        *row(self).places() = Places {
            free,
            end: count.max(first),
            barred: BTreeSet::new(),
        };
        Ok(found)
    }

    fn kept(
        self: &Arc<Self>,
        row: fn(&Self) -> &Row,
        at: u64,
        prefix: Option<&'static str>,
    ) -> Kept {
        Kept {
            journal: Arc::clone(self),
            row,
            at,
            prefix,
            is_over: AtomicBool::new(false),
            changing: Mutex::default(),
        }
    }

    /// Records a pin. If it lives by a pipe, `pipe` is the guard's end of it.
    pub(crate) fn keep_pin(
        self: &Arc<Self>,
        record: &PinRecord,
        pipe: Option<BorrowedFd<'_>>,
    ) -> Result<Kept, Errno> {
        self.keep(|journal| &journal.pins, &record.encode(), pipe, PIPE_PREFIX)
    }

    /// Records a file behind the gate. `path` is a path to it.
    pub(crate) fn keep_file(
        self: &Arc<Self>,
        record: &FileRecord,
        path: BorrowedFd<'_>,
    ) -> Result<Kept, Errno> {
        self.keep(
            |journal| &journal.files,
            &record.encode(),
            Some(path),
            FILE_PREFIX,
        )
    }

    fn keep(
        self: &Arc<Self>,
        row: fn(&Self) -> &Row,
        record: &[u8],
        fd: Option<BorrowedFd<'_>>,
        prefix: &'static str,
    ) -> Result<Kept, Errno> {
        let at = row(self).take();
        let kept = self.kept(row, at, fd.map(|_| prefix));
        let named = match (kept.name(), fd) {
            (Some(name), Some(fd)) => self.starter.keep(&name, fd),
            _ => Ok(()),
        };
        match named.and_then(|()| row(self).write(at, record)) {
            Ok(()) => Ok(kept),
            Err(errno) => {
                kept.end();
                Err(errno)
            }
        }
    }

    /// Whether more may be kept: the names of all descriptors must fit what a guard
    /// is started with.
    pub(crate) fn has_room(&self) -> bool {
        self.starter.has_room()
    }

    /// Takes nothing at a place any more: something is still kept under its name, and
    /// no name may stand for two things.
    pub(crate) fn bar(&self, prefix: &str, place: String) {
        let row = if prefix == FILE_PREFIX {
            &self.files
        } else {
            &self.pins
        };
        row.places().barred.insert(place);
    }

    /// Notes that a descriptor of this number is open. The thread of the gate calls
    /// this for every event, and must not wait: it writes to memory, now and then.
    ///
    /// The kernel keeps an event until it is answered, and it is answered by the
    /// number of its descriptor. So the next guard can answer those that a killed
    /// one has read, if it knows which numbers there may be.
    pub(crate) fn note_descriptor(&self, number: i32) {
        if number > self.highest.load(SeqCst) {
            let noted = number.saturating_add(ROOM / 4);
            self.highest.fetch_max(noted, SeqCst);
            // Another thread may have noted more.
            let noted = self.highest.load(SeqCst).to_le_bytes();
            // If this fails, memory is short, and the earlier number may do.
            let _ = rustix::io::pwrite(&self.pins.file, &noted, DESCRIPTOR_AT);
        }
    }
}

/// How names of files begin, and
pub(crate) const FILE_PREFIX: &str = "F";
/// of pipes. The place of the record follows. Other names begin with a small
/// letter. All of them together must fit one string of an environment, so they are
/// as short as that.
pub(crate) const PIPE_PREFIX: &str = "P";

/// A number in as few letters and digits as there are.
pub(crate) fn in_short(mut number: u64) -> String {
    const DIGITS: &[u8; 62] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    let mut reversed = Vec::new();
    loop {
        let digit = usize::try_from(number % 62).unwrap_or(0);
        reversed.push(char::from(DIGITS[digit]));
        number /= 62;
        if number == 0 {
            return reversed.iter().rev().collect();
        }
    }
}

impl Row {
    fn new(file: OwnedFd, size: usize) -> Self {
        Self {
            file,
            size,
            places: Mutex::default(),
        }
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> u64 {
        let mut places = self.places();
        loop {
            let at = places.free.pop().unwrap_or_else(|| {
                places.end += 1;
                places.end - 1
            });
            if places.barred.is_empty() || !places.barred.contains(&in_short(at)) {
                return at;
            }
        }
    }

    fn offset(&self, at: u64) -> u64 {
        at.saturating_mul(self.size as u64)
    }

    fn count(&self) -> Result<u64, Errno> {
        let size = u64::try_from(rustix::fs::fstat(&self.file)?.st_size).unwrap_or(0);
        Ok(size.div_ceil(self.size as u64))
    }

    fn read(&self, at: u64) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; self.size];
        // What is beyond the end of the file is free.
        rustix::io::pread(&self.file, &mut bytes, self.offset(at))?;
        Ok(bytes)
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), Errno> {
        loop {
            match rustix::io::pwrite(&self.file, bytes, self.offset(at)) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(other) => return Err(other),
            }
        }
    }

    fn clear(&self, at: u64) -> Result<(), Errno> {
        self.write(at, &vec![0; self.size])
    }
}

impl Kept {
    fn row(&self) -> &Row {
        (self.row)(&self.journal)
    }

    /// Clears the record. Only the first call does anything.
    pub(crate) fn end(&self) {
        let _changing = self.lock();
        if self.is_over.swap(true, SeqCst) {
            return;
        }
        let is_clear = self.row().clear(self.at).is_ok();
        let starter = &self.journal.starter;
        let is_let_go = self.name().is_none_or(|name| starter.let_go(&name));
        // Whoever takes the place takes the name: it must not name two things.
        if is_clear && is_let_go {
            self.row().places().free.push(self.at);
        }
    }

    /// The name of the descriptor that is kept with it.
    fn name(&self) -> Option<String> {
        self.prefix
            .map(|prefix| format!("{prefix}{}", self.place()))
    }

    /// Its place, which the name of its descriptor ends with.
    pub(crate) fn place(&self) -> String {
        in_short(self.at)
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the record of a pin.
    pub(crate) fn change_pin(&self, change: impl FnOnce(&mut PinRecord)) {
        self.change(PinRecord::decode, PinRecord::encode, change);
    }

    /// Changes the record of a file.
    pub(crate) fn change_file(&self, change: impl FnOnce(&mut FileRecord)) {
        self.change(FileRecord::decode, FileRecord::encode, change);
    }

    /// If this fails, memory is short, and the next guard finds a difference that
    /// it cannot explain.
    fn change<T>(
        &self,
        decode: fn(&[u8]) -> Place<T>,
        encode: fn(&T) -> Vec<u8>,
        change: impl FnOnce(&mut T),
    ) {
        let _changing = self.lock();
        if self.is_over.load(SeqCst) {
            return;
        }
        if let Ok(Place::Taken(mut record)) = self.row().read(self.at).map(|bytes| decode(&bytes)) {
            change(&mut record);
            let _ = self.row().write(self.at, &encode(&record));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::InodeId;
    use mapdirect_proto::Flags;

    fn journal() -> Arc<Journal> {
        Journal::new(&Arc::new(Starter::none())).unwrap()
    }

    fn pin(id: u64) -> PinRecord {
        PinRecord {
            id,
            inode: InodeId { dev: 1, inode: 2 },
            reach: 0..8192,
            shown: 0..4096,
            mapped: None,
            flags: Flags::NONE,
            pid: 5,
            uid: 6,
            lives_by: LivesBy::Lock,
            since: 7,
            family: None,
            asker: Some((5, 8)),
            until: 0,
            map: 9,
            breaches: 0,
            copied: None,
        }
    }

    /// The same files, as the next guard has them.
    fn next(journal: &Journal) -> (Arc<Journal>, Left) {
        let copy = |row: &Row| row.file.try_clone().unwrap();
        let inherited = NAMES
            .iter()
            .zip([copy(&journal.pins), copy(&journal.files)])
            .map(|(name, fd)| (String::from(*name), fd));
        let starter = Arc::new(Starter::with(inherited.collect()));
        Journal::found(&starter).unwrap()
    }

    #[test]
    fn the_next_guard_finds_what_has_not_ended() {
        let journal = journal();
        let kept: Vec<_> = (0..9)
            .map(|id| journal.keep_pin(&pin(id), None).unwrap())
            .collect();
        kept[3].end();
        kept[3].end();
        kept[4].change_pin(|pin| pin.map = 77);
        let (again, left) = next(&journal);
        let ids: Vec<_> = left.pins.iter().map(|(pin, _)| pin.id).collect();
        assert_eq!(ids, [0, 1, 2, 4, 5, 6, 7, 8]);
        assert_eq!(left.pins[3].0.map, 77);
        assert_eq!((left.nonsense, left.files.len()), (0, 0));
        // The free place is taken first.
        let one = again.keep_pin(&pin(100), None).unwrap();
        assert_eq!(one.at, kept[3].at);
        let (_, left) = next(&again);
        assert_eq!(left.pins.len(), 9);
    }

    #[test]
    fn nonsense_is_counted_and_its_place_free() {
        let journal = journal();
        let kept = journal.keep_pin(&pin(1), None).unwrap();
        journal.keep_pin(&pin(2), None).unwrap();
        journal.pins.write(kept.at, b"nonsense").unwrap();
        let (again, left) = next(&journal);
        assert_eq!((left.nonsense, left.pins.len()), (1, 1));
        assert_eq!(again.keep_pin(&pin(3), None).unwrap().at, kept.at);
    }

    #[test]
    fn barred_places_are_not_taken() {
        let journal = journal();
        let kept = journal.keep_pin(&pin(1), None).unwrap();
        let at = kept.at;
        kept.end();
        for place in [at, at + 2] {
            journal.bar(PIPE_PREFIX, in_short(place));
        }
        let taken = [2, 3].map(|id| journal.keep_pin(&pin(id), None).unwrap().at);
        assert_eq!(taken, [at + 1, at + 3]);
    }

    #[test]
    fn another_version_is_not_read() {
        let journal = journal();
        journal.pins.write(0, b"MDJRNL\x03\0").unwrap();
        let copy = |row: &Row| row.file.try_clone().unwrap();
        let starter = Arc::new(Starter::with(vec![
            (String::from(NAMES[0]), copy(&journal.pins)),
            (String::from(NAMES[1]), copy(&journal.files)),
        ]));
        assert!(Journal::found(&starter).is_none());
    }

    #[test]
    fn places_are_short_and_differ() {
        let all: std::collections::BTreeSet<_> = (0..10_000).map(in_short).collect();
        assert_eq!(all.len(), 10_000);
        assert!(all.iter().all(|place| place.len() <= 3));
        assert_eq!(
            [0, 61, 62, u64::MAX].map(in_short),
            ["0", "Z", "10", "lYGhA16ahyf"]
        );
    }

    #[test]
    fn descriptors_are_noted_before_they_are_too_far() {
        let journal = journal();
        let limit = |journal: &Journal| next(journal).1.descriptors;
        assert!(limit(&journal) >= ROOM);
        for number in [5, 6, 7000, 40_000, 30] {
            journal.note_descriptor(number);
            assert!(limit(&journal) > number + ROOM / 2);
        }
        assert!(limit(&journal) > 40_000);
    }
}
