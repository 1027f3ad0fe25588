//! The bpf gate: programs in the kernel that judge every operation on a
//! pinned file, whoever makes it, by whatever way, through a descriptor of
//! whatever age.
//!
//! They find what is pinned in maps, which this module keeps: an entry for
//! each inode, with the [`Layers`] of all its pins. Programs and maps stay
//! when the guard dies. The kernel tells the end of a pin by itself, when the
//! struct file is freed that was the pin.

mod abi;
pub(crate) mod census;
mod constants;
mod functions;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz;
mod load;
pub mod oracle;
mod watch;

use crate::audit::Refused;
use crate::policy::RULES;
use crate::policy::layers::Layers;
use crate::table::{InodeId, Pin, Settled, Watched};
use crate::wake::Backoff;
use crate::{Errno, Guard};
use abi::{
    Entry, Event, FILTER_WORDS, Facts, Holder, Identity, Key, PinFacts, Run, Settings, WHO_IS_IT,
};
use libbpf_rs::libbpf_sys::bpf_map_create_opts;
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType, RingBufferBuilder};
pub use load::LoadError;
pub use load::probe;
use mapdirect_proto::Flags;
use mapdirect_sys::file_handle::{self, FileHandle};
use mapdirect_sys::{fcntl, memfd, proc};
use rustix::fs::{Mode, OFlags};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Where the gate is pinned by default.
pub const DIRECTORY: &str = "/sys/fs/bpf/mapdirect";

const SHARDS: usize = 64;

/// A gate in place.
#[derive(Debug)]
pub(crate) struct Gate {
    loaded: load::Loaded,
    directory: PathBuf,
    versions: AtomicU64,
    /// What of an inode is in the maps. Whoever changes that holds the lock
    /// while looking at its pins, so that the last one to look writes last.
    published: [Mutex<HashMap<InodeId, Published>>; SHARDS],
    counts: Mutex<Counts>,
    rules: Mutex<Settings>,
    watch: watch::Watch,
    /// A file of the guard's own, to ask the programs about.
    probe: OwnedFd,
}

#[derive(Clone, Debug, Default)]
struct Published {
    version: u64,
    spilled: bool,
    pins: u64,
    handle: Option<FileHandle>,
    /// Its entry is of a guard before this one, which could not be read: it
    /// stays as it is.
    kept: bool,
}

/// What several inodes have in common.
#[derive(Debug, Default)]
struct Counts {
    /// Inodes in each place of the filter that has any.
    filter: HashMap<u32, u32>,
    /// Pins on each filesystem.
    devices: HashMap<u32, u64>,
    /// Inodes to which it matters where a write goes.
    noted: HashSet<InodeId>,
    /// The inode that each word of the filter tells of, that writes to it pass.
    easy: HashMap<usize, InodeId>,
}

/// A pin that an earlier guard has granted, and that lives.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) id: u64,
    pub(crate) inode: InodeId,
    pub(crate) range: Range<u64>,
    pub(crate) mapped: Option<Range<u64>>,
    pub(crate) flags: Flags,
    pub(crate) pid: i32,
    pub(crate) uid: u32,
    pub(crate) handle: FileHandle,
    pub(crate) path: String,
}

/// Whether the kernel may take the processor from a program that is not attached
/// to a hook, and leave the program out for others meanwhile: `preempt_none` is
/// 0 and `preempt_voluntary` 1 in `preempt_dynamic_mode`; a kernel whose mode is
/// built in says so in its version.
fn preempts(kernel: &functions::Kernel, mode: i32) -> bool {
    if kernel.preemption != 0 {
        return mode != 0 && mode != 1;
    }
    rustix::system::uname()
        .version()
        .to_string_lossy()
        .contains("PREEMPT")
}

fn errno(error: &libbpf_rs::Error) -> Errno {
    match error.kind() {
        libbpf_rs::ErrorKind::NotFound => Errno::NOENT,
        libbpf_rs::ErrorKind::PermissionDenied => Errno::PERM,
        libbpf_rs::ErrorKind::OutOfMemory => Errno::NOMEM,
        libbpf_rs::ErrorKind::TooBig => Errno::TOOBIG,
        _ => Errno::IO,
    }
}

/// Asks the programs what a descriptor of this process is to the kernel; from
/// now on it is a pin, if one is given.
fn ask_about(
    identities: &MapHandle,
    file: BorrowedFd<'_>,
    pin: Option<&Pin>,
) -> Result<Identity, Errno> {
    let tid = rustix::thread::gettid().as_raw_nonzero().get();
    let key = tid.to_ne_bytes();
    if let Some(pin) = pin {
        let mut asked = Identity::new_zeroed();
        asked.pin = pin.id;
        (asked.start, asked.end) = (pin.shown.start, pin.shown.end);
        identities
            .update(&key, asked.as_bytes(), MapFlags::ANY)
            .map_err(|error| errno(&error))?;
    }
    fcntl::get_flags_with(file, WHO_IS_IT)?;
    let found = identities.lookup(&key, MapFlags::ANY);
    let _ = identities.delete(&key);
    found
        .ok()
        .flatten()
        .and_then(|bytes| Identity::read_from_bytes(&bytes).ok())
        .ok_or(Errno::NODATA)
}

impl Gate {
    /// Puts it in place, or takes over the one that is there.
    pub(crate) fn new(directory: &Path) -> Result<Self, LoadError> {
        let loaded = load::load(directory)?;
        let probe = memfd::sealed("mapdirect-probe", b"")
            .map_err(|errno| LoadError::Failed(format!("memfd_create: {errno}")))?;
        let mut random = [0; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|errno| LoadError::Failed(format!("getrandom: {errno}")))?;
        let gate = Self {
            loaded,
            directory: directory.to_owned(),
            versions: AtomicU64::new(u64::from_ne_bytes(random)),
            published: std::array::from_fn(|_| Mutex::default()),
            counts: Mutex::default(),
            rules: Mutex::new(Settings::new(0, &functions::Kernel::default(), true)),
            watch: watch::Watch::default(),
            probe,
        };
        gate.introduce(&functions::Kernel::read()?)?;
        Ok(gate)
    }

    /// What the programs have been told.
    fn rules(&self) -> MutexGuard<'_, Settings> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the programs the rules, who the guard is, and what kernel this is.
    fn introduce(&self, kernel: &functions::Kernel) -> Result<(), LoadError> {
        let tell = |preempts| {
            let settings = Settings::new(std::process::id(), kernel, preempts);
            *self.rules() = settings;
            self.loaded
                .maps
                .settings
                .update(&0u32.to_ne_bytes(), settings.as_bytes(), MapFlags::ANY)
                .map_err(|error| LoadError::Failed(format!("writing the rules: {error}")))
        };
        tell(true)?;
        let answered = self
            .identify(self.probe.as_fd())
            .map_err(|_| LoadError::Failed(String::from("the programs do not answer")))?;
        let preempts = preempts(kernel, answered.preemption);
        if preempts && !self.loaded.hooked {
            if !self.loaded.adopted {
                let _ = self.remove();
            }
            return Err(LoadError::MayLeaveOut);
        }
        if preempts {
            return Ok(());
        }
        tell(false)?;
        self.identify(self.probe.as_fd())
            .map(drop)
            .map_err(|_| LoadError::Failed(String::from("the programs do not answer any more")))
    }

    /// It was there already.
    pub(crate) fn is_adopted(&self) -> bool {
        self.loaded.adopted
    }

    /// Where it is pinned; no descriptor that a lock could be taken by.
    pub(crate) fn directory(&self) -> Option<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(self.loaded.claim(), ".", flags, Mode::empty()).ok()
    }

    /// Takes it away.
    pub(crate) fn remove(&self) -> Result<(), LoadError> {
        self.loaded.held.let_go();
        load::remove(&self.directory)
    }

    fn shard(&self, id: InodeId) -> &Mutex<HashMap<InodeId, Published>> {
        let mixed = (id.inode ^ id.dev.rotate_left(32)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        &self.published[usize::try_from(mixed >> 58).unwrap_or(0) % SHARDS]
    }

    /// Has the programs judge by the pins that the inode has now.
    pub(crate) fn publish(&self, watched: &Watched) -> Result<(), Errno> {
        let shard = self.shard(watched.id);
        let mut published = shard.lock().unwrap_or_else(PoisonError::into_inner);
        let pins = watched.pins.load();
        let live: Vec<&Arc<Pin>> = pins.iter().filter(|pin| !pin.is_dead()).collect();
        let settled: Vec<Arc<Settled>> = live.iter().filter_map(|pin| pin.settled()).collect();
        let before = published.get(&watched.id).cloned();
        let key = Key::new(watched.id);
        if settled.is_empty() {
            if let Some(before) = &before
                && self.forget(key, before)
            {
                published.remove(&watched.id);
            }
            return Ok(());
        }
        let layers = Layers::new(
            settled.iter().map(|settled| &settled.pinned),
            watched.abilities.coarse,
        );
        let facts = Facts {
            reflink: watched.abilities.reflink,
            cached: live.iter().any(|pin| pin.flags.contains(Flags::CACHED)),
        };
        let version = self.versions.fetch_add(1, Relaxed);
        let (entry, runs) = Entry::new(version, &layers, facts);
        self.settle_ways(watched.id, &entry)?;
        let count = live.len() as u64;
        let counted = before.as_ref().map(|before| before.pins);
        self.count(key, counted, Some(count))?;
        let maps = &self.loaded.maps;
        let put = || -> Result<(), libbpf_rs::Error> {
            if let Some(runs) = &runs {
                spill(&maps.spill, version, runs)?;
            }
            maps.entries
                .update(key.as_bytes(), entry.as_bytes(), MapFlags::ANY)
        };
        if let Err(error) = put() {
            let _ = maps.spill.delete(&version.to_ne_bytes());
            // What was there stays.
            let _ = self.count(key, Some(count), counted);
            return Err(errno(&error));
        }
        if let Some(before) = before.as_ref().filter(|before| before.spilled) {
            let _ = maps.spill.delete(&before.version.to_ne_bytes());
        }
        let now = Published {
            version,
            spilled: runs.is_some(),
            pins: count,
            handle: before.and_then(|before| before.handle),
            kept: false,
        };
        published.insert(watched.id, now);
        if entry.lets_writes_pass() {
            self.ease(key);
        }
        Ok(())
    }

    /// Before an entry counts for which it matters where writes go, they lose
    /// their short way, and the programs are there that note it.
    fn settle_ways(&self, id: InodeId, entry: &Entry) -> Result<(), Errno> {
        if entry.lets_writes_pass() {
            return Ok(());
        }
        self.burden(Key::new(id));
        self.note_writes(id)
    }

    /// From now on the programs note where writes go.
    fn note_writes(&self, id: InodeId) -> Result<(), Errno> {
        self.loaded.costly.take_notes().map_err(|_| Errno::NOEXEC)?;
        self.counts().noted.insert(id);
        Ok(())
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets writes to an inode pass without a look at its entry.
    fn ease(&self, key: Key) {
        let mut counts = self.counts();
        let word = key.word();
        let owner = *counts.easy.entry(word).or_insert(key.inode());
        if owner != key.inode() {
            return;
        }
        let (ino, facts) = self.easy(word);
        ino.store(key.ino, SeqCst);
        facts.store(u64::from(key.dev) << 32 | abi::EASY, SeqCst);
    }

    /// Takes that back.
    fn burden(&self, key: Key) {
        let mut counts = self.counts();
        let word = key.word();
        if counts.easy.get(&word) == Some(&key.inode()) {
            self.easy(word).1.store(0, SeqCst);
            counts.easy.remove(&word);
        }
    }

    /// What stands beside a word of the filter.
    fn easy(&self, word: usize) -> (&AtomicU64, &AtomicU64) {
        let words = self.loaded.maps.filter.words();
        let at = FILTER_WORDS + 2 * word;
        (&words[at], &words[at + 1])
    }

    /// Whether the kernel knows of pins of an inode.
    fn lives(&self, key: Key) -> bool {
        load::has_pins(&self.loaded.maps.lives, key.as_bytes())
    }

    /// Takes an inode out of the maps; says no if the kernel knows of pins
    /// that have not been heard of.
    fn forget(&self, key: Key, before: &Published) -> bool {
        if self.lives(key) {
            return false;
        }
        let maps = &self.loaded.maps;
        let _ = maps.entries.delete(key.as_bytes());
        let _ = maps.lives.delete(key.as_bytes());
        self.burden(key);
        self.counts().noted.remove(&key.inode());
        if before.spilled {
            let _ = maps.spill.delete(&before.version.to_ne_bytes());
        }
        let _ = self.count(key, Some(before.pins), None);
        true
    }

    /// Counts the pins of an inode instead of those it had.
    fn count(&self, key: Key, before: Option<u64>, now: Option<u64>) -> Result<(), Errno> {
        let mut counts = self.counts();
        let maps = &self.loaded.maps;
        let device = counts.devices.entry(key.dev).or_default();
        *device = (*device + now.unwrap_or(0)).saturating_sub(before.unwrap_or(0));
        let device = *device;
        let told =
            maps.devices
                .update(&key.dev.to_ne_bytes(), &device.to_ne_bytes(), MapFlags::ANY);
        let slot = key.slot();
        let mut filter = counts.filter.get(&slot).copied().unwrap_or(0);
        match (before, now) {
            (None, Some(_)) => filter += 1,
            (Some(_), None) => filter = filter.saturating_sub(1),
            _ => {}
        }
        let bit = 1 << (slot % 64);
        let word = &maps.filter.words()[key.word()];
        if filter == 0 {
            counts.filter.remove(&slot);
            word.fetch_and(!bit, SeqCst);
        } else {
            counts.filter.insert(slot, filter);
            word.fetch_or(bit, SeqCst);
        }
        told.map_err(|error| errno(&error))
    }

    /// What a descriptor of this process is to the kernel.
    fn identify(&self, file: BorrowedFd<'_>) -> Result<Identity, Errno> {
        self.ask_about(file, None)
    }

    /// The same; from now on it is a pin, if one is given.
    fn ask_about(&self, file: BorrowedFd<'_>, pin: Option<&Pin>) -> Result<Identity, Errno> {
        ask_about(&self.loaded.maps.identities, file, pin)
    }

    /// Whether nobody else can be in the middle of anything on the inode of
    /// these two descriptions: `of_holder`, whose holder has one descriptor of
    /// it and we the other, and `of_pin`, which only we have.
    ///
    /// Whoever writes holds a reference to a description all the while;
    /// asynchronous requests and mappings do, too. Whoever truncates by path
    /// counts as a writer. So if there are no other descriptions, and no more
    /// references to these than are known, there is nobody. (A process that
    /// has its descriptors for itself alone takes no reference: that can only
    /// be the holder.)
    pub(crate) fn is_alone(
        &self,
        of_holder: BorrowedFd<'_>,
        of_pin: BorrowedFd<'_>,
    ) -> Result<bool, Errno> {
        let (writers, readers) = known_counts([of_holder, of_pin])?;
        let holders = self.identify(of_holder)?;
        let pins = self.identify(of_pin)?;
        // The question itself holds one: this process has many threads.
        Ok(holders.references <= 3
            && pins.references <= 2
            && [holders, pins]
                .iter()
                .all(|one| (one.writers, one.readers, one.direct) == (writers, readers, 0)))
    }

    /// Whether the inode of these two descriptions, as in
    /// [`is_alone`](Self::is_alone), counts no writer but them, and nobody else
    /// has the holder's: readers there may be.
    pub(crate) fn is_sole_writer(
        &self,
        of_holder: BorrowedFd<'_>,
        of_pin: BorrowedFd<'_>,
    ) -> Result<bool, Errno> {
        let (writers, _) = known_counts([of_holder, of_pin])?;
        let holders = self.identify(of_holder)?;
        let pins = self.identify(of_pin)?;
        Ok(holders.references <= 3
            && pins.references <= 2
            && holders.writers == writers
            && pins.writers == writers)
    }

    /// The pin that a description is.
    pub(crate) fn pin_of(&self, file: BorrowedFd<'_>) -> Result<Option<u64>, Errno> {
        let identity = self.identify(file)?;
        let holder = self
            .loaded
            .maps
            .holders
            .lookup(&identity.file.to_ne_bytes(), MapFlags::ANY)
            .map_err(|error| errno(&error))?;
        let holder = holder.and_then(|bytes| Holder::read_from_bytes(&bytes).ok());
        Ok(holder.map(|holder| holder.pin))
    }

    /// How many direct reads and writes of a file are under way.
    pub(crate) fn direct_under_way(&self, file: BorrowedFd<'_>) -> Result<u32, Errno> {
        Ok(self.identify(file)?.direct)
    }

    /// Attaches what is not attached while nothing is pinned.
    pub(crate) fn rouse(&self) -> Result<(), String> {
        self.require_whole()?;
        let attached = self.loaded.costly.attached();
        attached.map(drop).map_err(|error| error.to_string())
    }

    /// From now on the pin lives as long as this description does.
    pub(crate) fn hold(
        &self,
        watched: &Watched,
        pin: &Pin,
        file: BorrowedFd<'_>,
    ) -> Result<(), Errno> {
        let key = Key::new(watched.id);
        let handle = file_handle::of(file)?;
        let attached = self.loaded.costly.attached();
        let _attached = attached.map_err(|_| Errno::NOEXEC)?;
        let identity = {
            // Nobody may forget the inode before the programs count this pin.
            let shard = self.shard(watched.id);
            let mut published = shard.lock().unwrap_or_else(PoisonError::into_inner);
            self.prepare(&mut published, watched.id, &handle)?;
            if !self.lives(key) {
                // That of pins which are gone would count again.
                let _ = self.loaded.maps.entries.delete(key.as_bytes());
            }
            self.ask_about(file, Some(pin))?
        };
        if identity.key != key || identity.held == 0 {
            return Err(Errno::STALE);
        }
        self.remember(watched, pin, identity.file, &handle)
    }

    /// Keeps what a guard that comes later must know.
    fn remember(
        &self,
        watched: &Watched,
        pin: &Pin,
        file: u64,
        handle: &FileHandle,
    ) -> Result<(), Errno> {
        let mut facts = PinFacts {
            key: Key::new(watched.id),
            id: pin.id,
            file,
            start: pin.shown.start,
            end: pin.shown.end,
            mapped_start: pin.mapped.as_ref().map_or(0, |mapped| mapped.start),
            mapped_end: pin.mapped.as_ref().map_or(0, |mapped| mapped.end),
            flags: pin.flags.bits(),
            pid: pin.pid,
            uid: pin.uid,
            handle_type: handle.kind,
            handle_length: u32::try_from(handle.bytes.len()).unwrap_or(0),
            path_length: 0,
            handle: [0; abi::HANDLE],
            path: [0; abi::PIN_FACTS - 88 - abi::HANDLE],
        };
        facts.handle[..handle.bytes.len()].copy_from_slice(&handle.bytes);
        let path = watched.path.as_bytes();
        let length = path.len().min(facts.path.len());
        facts.path[..length].copy_from_slice(&path[..length]);
        facts.path_length = u32::try_from(length).unwrap_or(0);
        self.loaded
            .maps
            .pins
            .update(&pin.id.to_ne_bytes(), facts.as_bytes(), MapFlags::ANY)
            .map_err(|error| errno(&error))
    }

    /// Has the programs look at an inode from now on: they would not see the
    /// end of a pin otherwise.
    fn prepare(
        &self,
        published: &mut HashMap<InodeId, Published>,
        id: InodeId,
        handle: &FileHandle,
    ) -> Result<(), Errno> {
        if published.get(&id).is_some_and(|published| published.kept) {
            return Err(Errno::BUSY);
        }
        if !published.contains_key(&id) {
            self.count(Key::new(id), None, Some(0))?;
        }
        published.entry(id).or_default().handle = Some(handle.clone());
        Ok(())
    }

    /// Leaves an inode as an earlier guard has left it.
    pub(crate) fn keep(&self, found: &Found) {
        let mut published = self
            .shard(found.inode)
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if published.contains_key(&found.inode) {
            return;
        }
        let key = Key::new(found.inode);
        let entry = self
            .loaded
            .maps
            .entries
            .lookup(key.as_bytes(), MapFlags::ANY);
        let entry = entry
            .ok()
            .flatten()
            .and_then(|bytes| Entry::read_from_bytes(&bytes).ok());
        let _ = self.count(key, None, Some(1));
        let kept = Published {
            version: entry.map_or(0, |entry| entry.version),
            spilled: entry.is_some_and(|entry| entry.spilled != 0),
            pins: 1,
            handle: Some(found.handle.clone()),
            kept: true,
        };
        published.insert(found.inode, kept);
    }

    /// Whether the description is gone whose life a pin was.
    pub(crate) fn is_over(&self, pin: u64) -> bool {
        let pins = &self.loaded.maps.pins;
        matches!(pins.lookup(&pin.to_ne_bytes(), MapFlags::ANY), Ok(None))
    }

    /// Whether the kernel keeps a pin.
    pub(crate) fn keeps(&self, pin: u64) -> bool {
        let pins = &self.loaded.maps.pins;
        matches!(pins.lookup(&pin.to_ne_bytes(), MapFlags::ANY), Ok(Some(_)))
    }

    /// Takes out what is left of an inode that nobody pins.
    fn clean(&self, id: InodeId) {
        let mut published = self
            .shard(id)
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = published.get(&id)
            && self.forget(Key::new(id), before)
        {
            published.remove(&id);
        }
    }

    /// The pins that live, as an earlier guard has left them. Those whose
    /// description is gone have been taken out by the kernel.
    pub(crate) fn left_behind(&self) -> Vec<Found> {
        let maps = &self.loaded.maps;
        maps.pins
            .keys()
            .filter_map(|key| maps.pins.lookup(&key, MapFlags::ANY).ok().flatten())
            .filter_map(|bytes| PinFacts::read_from_bytes(&bytes).ok())
            .filter(|facts| {
                let holder = maps
                    .holders
                    .lookup(&facts.file.to_ne_bytes(), MapFlags::ANY);
                let holder = holder.ok().flatten();
                holder
                    .and_then(|bytes| Holder::read_from_bytes(&bytes).ok())
                    .is_some_and(|holder| holder.pin == facts.id)
            })
            .map(|facts| found(&facts))
            .collect()
    }

    /// Everything in the maps that no pin of `known` accounts for goes; and
    /// what is in the maps counts from now on.
    pub(crate) fn take_over(&self, known: &[InodeId]) {
        let maps = &self.loaded.maps;
        let entries: Vec<Vec<u8>> = maps.entries.keys().collect();
        for key in entries {
            if Key::read_from_bytes(&key).is_ok_and(|key| !known.contains(&key.inode())) {
                let _ = maps.entries.delete(&key);
            }
        }
        let counts = self.counts();
        let devices: Vec<Vec<u8>> = maps.devices.keys().collect();
        for key in devices {
            let is_known = u32::read_from_bytes(&key)
                .is_ok_and(|device| counts.devices.get(&device).is_some_and(|pins| *pins > 0));
            if !is_known {
                let _ = maps.devices.delete(&key);
            }
        }
        // What the filter has beside what was counted again goes, too.
        let mut bits = vec![0u64; FILTER_WORDS];
        for slot in counts.filter.keys() {
            if let Ok(slot) = usize::try_from(*slot) {
                bits[slot / 64] |= 1 << (slot % 64);
            }
        }
        for (word, bits) in bits.into_iter().enumerate() {
            maps.filter.words()[word].store(bits, SeqCst);
            if !counts.easy.contains_key(&word) {
                self.easy(word).1.store(0, SeqCst);
            }
        }
        drop(counts);
        let used: Vec<u64> = self
            .published
            .iter()
            .flat_map(|shard| {
                let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
                shard.values().map(|one| one.version).collect::<Vec<_>>()
            })
            .collect();
        let spilled: Vec<Vec<u8>> = maps.spill.keys().collect();
        for key in spilled {
            if u64::read_from_bytes(&key).is_ok_and(|version| !used.contains(&version)) {
                let _ = maps.spill.delete(&key);
            }
        }
    }

    /// Refusals by kind since the gate is in place.
    pub(crate) fn refused(&self) -> Vec<(String, u64)> {
        RULES
            .iter()
            .map(|rule| (rule.name.to_owned(), self.counted(rule.kind as u32)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    /// Lets other files off what is there for those that are pinned, when
    /// there are none.
    fn rest(&self) {
        self.loaded.costly.rest(|| {
            let counts = self.counts();
            load::Needs {
                hooks: !counts.filter.is_empty(),
                notes: !counts.noted.is_empty(),
            }
        });
    }

    fn counted(&self, what: u32) -> u64 {
        let bytes = self
            .loaded
            .maps
            .refused
            .lookup(&what.to_ne_bytes(), MapFlags::ANY);
        bytes
            .ok()
            .flatten()
            .and_then(|bytes| u64::read_from_bytes(&bytes).ok())
            .unwrap_or(0)
    }
}

/// Runs in a map of their own.
fn spill(spilled: &MapHandle, version: u64, runs: &[Run]) -> Result<(), libbpf_rs::Error> {
    // BPF_F_INNER_MAP: as many runs as there are, whatever the template
    // says (include/uapi/linux/bpf.h).
    let options = bpf_map_create_opts {
        sz: size_of::<bpf_map_create_opts>() as u64,
        map_flags: 1 << 12,
        ..Default::default()
    };
    let count = u32::try_from(runs.len()).unwrap_or(u32::MAX);
    let size = u32::try_from(size_of::<Run>()).unwrap_or(16);
    let map = MapHandle::create(MapType::Array, Some("runs"), 4, size, count, &options)?;
    let keys: Vec<u8> = (0..count).flat_map(u32::to_ne_bytes).collect();
    map.update_batch(&keys, runs.as_bytes(), count, MapFlags::ANY, MapFlags::ANY)?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&map.as_fd());
    spilled.update(&version.to_ne_bytes(), &fd.to_ne_bytes(), MapFlags::ANY)
}

fn found(facts: &PinFacts) -> Found {
    let slice = |bytes: &[u8], length: u32| {
        let length = usize::try_from(length).unwrap_or(0).min(bytes.len());
        bytes[..length].to_vec()
    };
    let mapped = facts.mapped_start..facts.mapped_end;
    Found {
        id: facts.id,
        inode: facts.key.inode(),
        range: facts.start..facts.end,
        mapped: (!mapped.is_empty()).then_some(mapped),
        flags: Flags::from_known_bits(facts.flags),
        pid: facts.pid,
        uid: facts.uid,
        handle: FileHandle {
            kind: facts.handle_type,
            bytes: slice(&facts.handle, facts.handle_length),
        },
        path: String::from_utf8_lossy(&slice(&facts.path, facts.path_length)).into_owned(),
    }
}

/// Takes a gate away that no guard keeps; says whether there was one.
///
/// # Errors
///
/// When a guard keeps it, or something is in the way.
pub fn unload(directory: &Path) -> Result<bool, LoadError> {
    load::unload(directory)
}

/// Hears of refusals and ends, and watches the gate, until the guard stops;
/// `say` tells whoever runs it what somebody has done to the gate.
///
/// # Errors
///
/// When events cannot be read any more.
pub(crate) fn run(guard: &Guard, gate: &Gate, say: &dyn Fn(&str)) -> Result<(), Errno> {
    let maps = &gate.loaded.maps;
    let heard = |bytes: &[u8]| {
        if let Ok(event) = Event::read_from_bytes(bytes) {
            take(guard, gate, &event);
        }
        0
    };
    let mut builder = RingBufferBuilder::new();
    for map in [&maps.changes, &maps.events] {
        builder.add(map, heard).map_err(|error| errno(&error))?;
    }
    let ring = builder.build().map_err(|error| errno(&error))?;
    let mut untold = gate.counted(abi::UNTOLD);
    while !guard.is_stopping() {
        // A signal is none of our business here.
        let _ = ring.poll(Duration::from_millis(100));
        let now = gate.counted(abi::UNTOLD);
        if now != untold {
            untold = now;
            end_untold(guard, gate);
        }
        gate.rest();
        if !guard.is_stopping() {
            gate.watch(guard, say);
        }
    }
    Ok(())
}

/// Waits until a pin that is over has been taken out. That must come in the
/// order in which it is told: somebody may have joined it before.
pub(super) fn look_for_end(guard: &Guard, gate: &Gate, inode: InodeId, pin: u64) {
    if !gate.is_over(pin) {
        return;
    }
    let is_there = || {
        let watched = guard.table.get(inode);
        watched.is_some_and(|watched| watched.pins.load().iter().any(|other| other.id == pin))
    };
    let mut backoff = Backoff::until(
        Instant::now() + Duration::from_millis(500),
        Duration::from_micros(20),
        Duration::from_millis(2),
    );
    while is_there() && !backoff.is_over() {
        backoff.pause();
    }
}

/// Ends the pins whose end could not be told.
fn end_untold(guard: &Guard, gate: &Gate) {
    for watched in guard.table.all() {
        let pins = watched.pins.load_full();
        for pin in pins.iter().filter(|pin| pin.is_handed_over()) {
            if gate.is_over(pin.id) {
                end(guard, gate, &watched, pin.id);
            }
        }
    }
}

fn take(guard: &Guard, gate: &Gate, event: &Event) {
    let id = event.key.inode();
    let watched = guard.table.get(id);
    match event.kind_of_event {
        abi::EVENT_ENDED => match watched {
            Some(watched) => end(guard, gate, &watched, event.pin),
            None => gate.clean(id),
        },
        abi::EVENT_RAW => {
            if let Some(watched) = watched {
                begin(gate, &watched, event);
            }
        }
        abi::EVENT_REFUSED => note(guard, watched.as_deref(), event),
        // Without them such writes stay refused.
        abi::EVENT_DOUBT => drop(gate.note_writes(id)),
        _ => {}
    }
}

/// The name of the command, fit for a terminal: any process chooses its own.
fn command_of(event: &Event) -> String {
    let length = event.command.iter().position(|byte| *byte == 0);
    let command = &event.command[..length.unwrap_or(event.command.len())];
    proc::printable(&String::from_utf8_lossy(command))
}

fn note(guard: &Guard, watched: Option<&Watched>, event: &Event) {
    let kind = usize::try_from(event.kind).unwrap_or(usize::MAX);
    let Some(rule) = RULES.get(kind) else {
        return;
    };
    guard.audit.judged();
    if let Some(watched) = watched {
        watched.refused[rule.kind as usize].fetch_add(1, SeqCst);
    }
    guard.audit.refused(Refused {
        tid: event.tid.cast_signed(),
        command: command_of(event),
        kind: rule.kind,
        id: event.key.inode(),
        path: watched.map_or_else(Arc::default, |watched| Arc::clone(&watched.path)),
        range: (event.end != u64::MAX || event.start > 0).then_some(event.start..event.end),
    });
}

/// Somebody has mapped what is pinned, by mmap(2) alone: it stays pinned as
/// it is for as long as that file lives.
fn begin(gate: &Gate, watched: &Arc<Watched>, event: &Event) {
    let pins = watched.pins.load_full();
    let pid = event.tgid.cast_signed();
    for pin in pins
        .iter()
        .filter(|pin| pin.id != event.pin && pin.meets(&(event.start..event.end)))
    {
        let joined = Arc::new(pin.joined(event.pin, pid));
        let handle = {
            let shard = gate.shard(watched.id);
            let published = shard.lock().unwrap_or_else(PoisonError::into_inner);
            published
                .get(&watched.id)
                .and_then(|published| published.handle.clone())
        };
        if let Some(handle) = handle {
            // Only a guard that comes later misses it.
            let _ = gate.remember(watched, &joined, event.file, &handle);
        }
        watched.add(&joined);
    }
    let _ = gate.publish(watched);
}

/// A pin is over.
fn end(guard: &Guard, gate: &Gate, watched: &Arc<Watched>, pin: u64) {
    for ended in watched.pins.load().iter().filter(|other| other.id == pin) {
        ended.bury();
    }
    // It can only fail to make less of it.
    let _ = gate.publish(watched);
    // Whoever finds it gone is judged without it.
    watched.remove(|other| other.id == pin);
    let_go(guard, watched);
}

/// Forgets an inode without pins.
pub(crate) fn let_go(guard: &Guard, watched: &Arc<Watched>) {
    // A grant under way has a pin, or comes here itself.
    let Some(mut state) = watched.try_grant() else {
        return;
    };
    if !state.retired && watched.pins.load().is_empty() {
        state.retired = true;
        guard.table.remove(watched);
    }
}

/// How many writers and readers these descriptions count for.
fn known_counts(files: [BorrowedFd<'_>; 2]) -> Result<(i32, i32), Errno> {
    let mut counts = (0, 0);
    for file in files {
        let access = rustix::fs::fcntl_getfl(file)? & rustix::fs::OFlags::ACCMODE;
        if access == rustix::fs::OFlags::RDONLY {
            counts.1 += 1;
        } else {
            counts.0 += 1;
        }
    }
    Ok(counts)
}
