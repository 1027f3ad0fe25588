//! The bpf gate: programs in the kernel that judge every operation on a pinned
//! file, whoever makes it, in whatever way, through a descriptor of whatever
//! age.
//!
//! The programs look up in maps what is pinned. This module maintains these
//! maps: an entry for each inode, with the [`Layers`] of all its pins. Programs
//! and maps stay when the guard dies. The kernel itself ends a pin when it
//! frees the struct file whose life the pin was.

mod abi;
mod adopt;
mod attach;
mod census;
mod constants;
mod contract;
mod costly;
mod counts;
mod directory;
mod dormant;
mod events;
mod exclude;
mod functions;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz;
mod identity;
mod left;
mod load;
pub mod oracle;
mod places;
mod watch;

use crate::Errno;
use crate::delegation::Delegated;
use crate::policy::RULES;
use crate::table::{InodeId, Pin, Settled, Watched, together};
use crate::wake::Backoff;
use abi::{Denials, Entry, Facts, Identity, Key, PinFacts, Role, Root, Run, Settings};
pub(crate) use adopt::adopt;
use counts::Counts;
use left::Found;
use libbpf_rs::libbpf_sys::bpf_map_create_opts;
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType};
pub use load::LoadError;
pub use load::probe;
use mapdirect_proto::Flags;
use mapdirect_sys::file_handle::{self, FileHandle};
use mapdirect_sys::memfd;
use rustix::fs::{Mode, OFlags};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

/// The directory in which the gate is pinned by default.
pub const DIRECTORY: &str = "/sys/fs/bpf/mapdirect";

const SHARDS: usize = 64;

/// A gate in place.
#[derive(Debug)]
pub(crate) struct Gate {
    loaded: load::Loaded,
    directory: PathBuf,
    versions: AtomicU64,
    /// What the maps contain about each inode. A thread that changes this holds
    /// the lock while it looks at the inode's pins, so that the last one to
    /// look writes last.
    published: [Mutex<HashMap<InodeId, Published>>; SHARDS],
    counts: Mutex<Counts>,
    rules: Mutex<Settings>,
    watch: watch::Watch,
    dormant: dormant::Dormant,
    /// Whether dormant pins may be taken up again.
    revives: bool,
    /// A file of the guard's own, to ask the programs about.
    probe: OwnedFd,
}

#[derive(Clone, Debug, Default)]
struct Published {
    version: u64,
    spilled: bool,
    pins: u64,
    handle: Option<FileHandle>,
    /// The entry is from an earlier guard and could not be read, so it stays as
    /// it is.
    kept: bool,
    /// Whether the last pin of the inode can become dormant.
    can_sleep: bool,
    /// Whether a pin of the inode is being granted. There is never more than
    /// one.
    granting: bool,
}

/// Shows later that everything is as it was when a pin was granted.
#[derive(Clone, Copy, Debug)]
struct Proof {
    stamp: u64,
    generation: u32,
}

impl Proof {
    /// No proof.
    const NONE: Self = Self {
        stamp: u64::MAX,
        generation: 0,
    };
}

/// Whether the kernel may preempt a program that is not attached to a hook, and
/// meanwhile leave the program out for others. In `preempt_dynamic_mode`,
/// `preempt_none` is 0 and `preempt_voluntary` 1. A kernel whose mode is built
/// in says so in its version.
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

/// What pins deny beside what would break them.
fn denials_of(pins: &[&Arc<Pin>]) -> Denials {
    let mut denials = Denials::default();
    for pin in pins {
        denials.rename |= pin.flags.contains(Flags::DENY_RENAME);
        if pin.flags.contains(Flags::DENY_WRITE) {
            let family = pin.family.as_ref();
            denials.deny_write(family.map_or(Root::NOBODY, |family| {
                Root::new(family.pid(), family.began())
            }));
        }
    }
    denials
}

impl Gate {
    /// Puts the gate in place, or takes over an existing one.
    pub(crate) fn new(directory: &Path) -> Result<Self, LoadError> {
        let loaded = load::load(directory)?;
        let probe = memfd::sealed("mapdirect-probe", b"")
            .map_err(|errno| LoadError::Failed(format!("memfd_create: {errno}")))?;
        let mut random = [0; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|errno| LoadError::Failed(format!("getrandom: {errno}")))?;
        let revives = loaded.hears_of_inodes;
        let gate = Self {
            loaded,
            directory: directory.to_owned(),
            versions: AtomicU64::new(u64::from_ne_bytes(random)),
            published: std::array::from_fn(|_| Mutex::default()),
            counts: Mutex::default(),
            rules: Mutex::new(Settings::new(0, &functions::Kernel::default(), true, false)),
            watch: watch::Watch::default(),
            dormant: dormant::Dormant::default(),
            revives,
            probe,
        };
        gate.introduce(&functions::Kernel::read()?)?;
        Ok(gate)
    }

    /// The settings that the programs have been given.
    fn rules(&self) -> MutexGuard<'_, Settings> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the programs the rules, the identity of the guard, and the
    /// properties of this kernel.
    fn introduce(&self, kernel: &functions::Kernel) -> Result<(), LoadError> {
        let tell = |preempts| {
            let settings = Settings::new(std::process::id(), kernel, preempts, self.revives);
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

    /// Whether the gate was there already.
    pub(crate) fn is_adopted(&self) -> bool {
        self.loaded.adopted
    }

    /// The directory of the gate, as a descriptor by which no lock can be
    /// taken.
    pub(crate) fn directory(&self) -> Option<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(self.loaded.claim(), ".", flags, Mode::empty()).ok()
    }

    /// Removes the gate.
    pub(crate) fn remove(&self) -> Result<(), LoadError> {
        self.loaded.held.let_go();
        directory::remove(&self.directory)
    }

    fn shard(&self, id: InodeId) -> &Mutex<HashMap<InodeId, Published>> {
        let mixed = (id.inode ^ id.dev.rotate_left(32)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        &self.published[usize::try_from(mixed >> 58).unwrap_or(0) % SHARDS]
    }

    fn lock_shard(&self, id: InodeId) -> MutexGuard<'_, HashMap<InodeId, Published>> {
        let shard = self.shard(id);
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the programs judge by the current pins of the inode.
    pub(crate) fn publish(&self, watched: &Watched) -> Result<(), Errno> {
        let mut published = self.lock_shard(watched.id);
        self.end_sleep(watched.id)?;
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
        let layers = together(&settled);
        let facts = Facts {
            reflink: watched.abilities.reflink,
            cached: live.iter().any(|pin| pin.flags.contains(Flags::CACHED)),
            denials: denials_of(&live),
            granting: before.as_ref().is_some_and(|before| before.granting),
            delegated: live.iter().any(|pin| pin.delegated().is_some()),
        };
        let version = self.versions.fetch_add(1, Relaxed);
        let (entry, runs) = Entry::new(version, &layers, facts);
        self.settle_ways(watched.id, &entry)?;
        if before.is_none() {
            self.mark(key);
        } else {
            self.mark_again(key);
        }
        let maps = &self.loaded.maps;
        let put = || -> Result<(), libbpf_rs::Error> {
            if let Some(root) = &facts.denials.write {
                maps.roots
                    .update(key.as_bytes(), root.as_bytes(), MapFlags::ANY)?;
            }
            if let Some(runs) = &runs {
                spill(&maps.spill, version, runs)?;
            }
            maps.entries
                .update(key.as_bytes(), entry.as_bytes(), MapFlags::ANY)
        };
        if let Err(error) = put() {
            let _ = maps.spill.delete(&version.to_ne_bytes());
            // The earlier entry stays.
            if before.is_none() {
                self.unmark(key);
            }
            return Err(errno(&error));
        }
        if let Some(before) = before.as_ref().filter(|before| before.spilled) {
            let _ = maps.spill.delete(&before.version.to_ne_bytes());
        }
        let now = Published {
            version,
            spilled: runs.is_some(),
            pins: live.len() as u64,
            handle: before.and_then(|before| before.handle),
            kept: false,
            can_sleep: entry.can_sleep(),
            granting: facts.granting,
        };
        published.insert(watched.id, now);
        if entry.lets_writes_pass() {
            self.ease(key);
        }
        Ok(())
    }

    /// Prepares for an entry that depends on where writes go. Before it counts,
    /// writes lose their short way, and the programs that note writes are
    /// attached.
    fn settle_ways(&self, id: InodeId, entry: &Entry) -> Result<(), Errno> {
        if entry.lets_writes_pass() {
            return Ok(());
        }
        self.burden(Key::new(id));
        self.note_writes(id)
    }

    /// Removes an inode from the maps. Returns `false` if the kernel knows of
    /// pins that the guard has not heard of yet.
    fn forget(&self, key: Key, before: &Published) -> bool {
        if !self.lay_to_rest(key) {
            return false;
        }
        let maps = &self.loaded.maps;
        let _ = maps.entries.delete(key.as_bytes());
        let _ = maps.roots.delete(key.as_bytes());
        let _ = maps.lives.delete(key.as_bytes());
        self.burden(key);
        self.counts().noted.remove(&key.inode());
        if before.spilled {
            let _ = maps.spill.delete(&before.version.to_ne_bytes());
        }
        self.unmark(key);
        true
    }

    /// Attaches the programs that are not attached while nothing is pinned.
    pub(crate) fn rouse(&self) -> Result<(), String> {
        self.require_whole()?;
        let attached = self.loaded.costly.attached();
        attached.map(drop).map_err(|error| error.to_string())
    }

    /// Makes the pin live as long as this description from now on. The returned
    /// proof is for [`Gate::prove`]: it shows later that nothing has happened
    /// since.
    fn hold(&self, watched: &Watched, pin: &Pin, file: BorrowedFd<'_>) -> Result<Proof, Errno> {
        let key = Key::new(watched.id);
        let handle = file_handle::of(file)?;
        let attached = self.loaded.costly.attached();
        let _attached = attached.map_err(|_| Errno::NOEXEC)?;
        let identity = {
            // Nobody may forget the inode before the programs count this pin.
            let mut published = self.lock_shard(watched.id);
            self.prepare(&mut published, watched.id, &handle)?;
            self.end_sleep(watched.id)?;
            if dormant::is_dead(&self.disturb(key, 0)?) {
                // Otherwise the entry of pins that are gone would count again.
                let _ = self.loaded.maps.entries.delete(key.as_bytes());
            }
            // Until it is granted nobody else joins it. That is said before it
            // lives: these pins may end just before, and then anything may have
            // passed that their entry refuses.
            published.entry(watched.id).or_default().granting = true;
            self.tell_granting(key)?;
            self.begin_life(file, pin)?
        };
        if identity.key != key || identity.held == 0 {
            return Err(Errno::STALE);
        }
        if identity.held == abi::ANEW {
            // The others are over, which is about to be reported. What they
            // refused anybody may have done since.
            let pins = watched.pins.load();
            let others = pins.iter().filter(|other| other.id != pin.id);
            others
                .filter(|other| !self.keeps(other.id))
                .for_each(|other| other.end());
        }
        let proof = Proof {
            stamp: identity.stamp,
            generation: identity.generation,
        };
        // Nothing is proven yet. If the guard and the pin ended now, nobody may
        // take the pin up.
        self.remember(watched, pin, identity.file, &handle, Proof::NONE)?;
        Ok(proof)
    }

    /// Marks a pin as granted: when it has ended it may be taken up again, if
    /// nothing has happened since `proof`. The guard still has the pin's
    /// description, so nobody else writes to what the maps keep of the pin.
    fn prove(&self, pin: u64, proof: Proof) {
        if let Ok(Some(mut facts)) = self.facts(pin) {
            (facts.stamp, facts.generation) = (proof.stamp, proof.generation);
            let pins = &self.loaded.maps.pins;
            // If this fails, the guard is asked for the next pin.
            let _ = pins.update(&pin.to_ne_bytes(), facts.as_bytes(), MapFlags::EXIST);
        }
    }

    /// Marks that no pin of an inode is being granted any more. The entry that
    /// is there says so only if the grant `succeeded`.
    fn grant_is_over(&self, watched: &Watched, succeeded: bool) {
        let mut published = self.lock_shard(watched.id);
        if let Some(published) = published.get_mut(&watched.id) {
            published.granting = false;
        }
        if succeeded {
            self.tell_granted(Key::new(watched.id));
        }
    }

    /// Makes a description a pin. This may have to wait for somebody who is
    /// just finding out that there is nothing to take up again.
    fn begin_life(&self, file: BorrowedFd<'_>, pin: &Pin) -> Result<Identity, Errno> {
        let role = if pin.flags.contains(Flags::IN_PLACE) {
            Role::Foreign
        } else {
            Role::Holder
        };
        let mut backoff = Backoff::until(
            Instant::now() + Duration::from_millis(500),
            Duration::from_micros(20),
            Duration::from_millis(1),
        );
        loop {
            let identity = self.identify_for(file, pin, role)?;
            if identity.held != 0 || backoff.is_over() {
                return Ok(identity);
            }
            backoff.pause();
        }
    }

    /// Ends the part that a description has in a pin that is not granted, if it
    /// stays open elsewhere.
    fn end_life(&self, file: BorrowedFd<'_>, pin: &Pin) {
        // Without an answer it stays a pin of nothing until it is closed.
        let _ = self.identify_for(file, pin, Role::None);
    }

    /// Keeps what a later guard must know.
    fn remember(
        &self,
        watched: &Watched,
        pin: &Pin,
        file: u64,
        handle: &FileHandle,
        proof: Proof,
    ) -> Result<(), Errno> {
        let mut facts = PinFacts {
            key: Key::new(watched.id),
            id: pin.id,
            file,
            quiet: 0,
            revived: 0,
            stamp: proof.stamp,
            start: pin.shown.start,
            end: pin.shown.end,
            mapped_start: pin.mapped.as_ref().map_or(0, |mapped| mapped.start),
            mapped_end: pin.mapped.as_ref().map_or(0, |mapped| mapped.end),
            generation: proof.generation,
            flags: pin.flags.bits(),
            pid: pin.pid,
            uid: pin.uid,
            handle_type: handle.kind,
            handle_length: u32::try_from(handle.bytes.len()).unwrap_or(0),
            until: pin.delegated().map_or(0, Delegated::wire),
            began: pin.family.as_ref().map_or(0, |family| family.began()),
            handle: [0; abi::HANDLE],
        };
        facts
            .handle
            .get_mut(..handle.bytes.len())
            .ok_or(Errno::TOOBIG)?
            .copy_from_slice(&handle.bytes);
        self.loaded
            .maps
            .pins
            .update(&pin.id.to_ne_bytes(), facts.as_bytes(), MapFlags::ANY)
            .map_err(|error| errno(&error))
    }

    /// Makes the programs look at an inode from now on. Otherwise they would
    /// not see the end of a pin.
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
            self.mark(Key::new(id));
        }
        published.entry(id).or_default().handle = Some(handle.clone());
        Ok(())
    }

    /// Whether the description is gone whose life a pin was, and nobody is just
    /// about to take the pin up.
    pub(crate) fn is_over(&self, pin: u64) -> bool {
        match self.facts(pin) {
            Ok(Some(facts)) if facts.file == 0 => self.is_at_rest(facts.key, pin),
            Ok(facts) => facts.is_none(),
            Err(_) => false,
        }
    }

    /// Whether the kernel keeps a pin.
    pub(crate) fn keeps(&self, pin: u64) -> bool {
        matches!(self.facts(pin), Ok(Some(facts)) if facts.file != 0)
    }

    /// What the maps keep of a pin.
    fn facts(&self, pin: u64) -> Result<Option<PinFacts>, Errno> {
        let pins = &self.loaded.maps.pins;
        let bytes = pins
            .lookup(&pin.to_ne_bytes(), MapFlags::ANY)
            .map_err(|error| errno(&error))?;
        Ok(bytes.and_then(|bytes| PinFacts::read_from_bytes(&bytes).ok()))
    }

    /// Removes what is left of an inode without pins, and of a pin of it.
    fn clean(&self, id: InodeId, pin: u64) {
        let mut published = self.lock_shard(id);
        match self.disturb(Key::new(id), pin) {
            Ok(tending) if tending.file == 0 => self.drop_facts(pin),
            Ok(_) => {}
            Err(_) => {
                self.look_again(id);
                return;
            }
        }
        if let Some(before) = published.get(&id)
            && self.forget(Key::new(id), before)
        {
            published.remove(&id);
        }
    }

    /// Refusals by kind since the gate was put in place.
    pub(crate) fn refused(&self) -> Vec<(String, u64)> {
        RULES
            .iter()
            .map(|rule| (rule.name.to_owned(), self.counted(rule.kind as u32)))
            .filter(|(_, count)| *count > 0)
            .collect()
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

/// Puts runs into a map of their own.
fn spill(spilled: &MapHandle, version: u64, runs: &[Run]) -> Result<(), libbpf_rs::Error> {
    // BPF_F_INNER_MAP: the map has as many runs as needed, whatever the
    // template says (include/uapi/linux/bpf.h).
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

/// Removes a gate that no guard keeps, and says whether there was one.
///
/// # Errors
///
/// When a guard keeps the gate, or the removal fails.
pub fn unload(directory: &Path) -> Result<bool, LoadError> {
    directory::unload(directory)
}
