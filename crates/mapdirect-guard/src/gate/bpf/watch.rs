//! Watching the gate: that every program is attached, every map is there, and
//! what the guard has written to the maps is in them.
//!
//! Root can take any of this away: remove files of the bpf filesystem, unmount
//! it, delete from maps. So the guard holds a descriptor of every link and of
//! every map. A program stays attached for as long as somebody has a
//! descriptor of its link (the kernel lets nobody detach a tracing link by
//! force), so a file that is removed opens nothing while the guard lives; put
//! back, it keeps the gate closed also when the guard dies. What is missing in
//! a map is written again. All of it is looked at every second, and the
//! directory before each grant.
//!
//! Until something is back in the maps the gate may be open. So the block maps
//! of all pins are read and compared then: what was changed in that time is
//! told as a breach.

use super::abi::{Entry, Holder, Key, Life, Settings};
use super::directory::{claim, mount_bpffs};
use super::load::{BPF_MAPS, LINKS};
use super::{Gate, Published};
use crate::ledger::PinSet;
use crate::table::{Pin, Watched};
use crate::{Errno, Guard};
use libbpf_rs::{MapCore, MapFlags};
use mapdirect_sys::bpf;
use rustix::fs::Mode;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

/// How often everything is looked at.
const INTERVAL: Duration = Duration::from_secs(1);

/// An object of the gate, by its name in the directory.
#[derive(Debug)]
struct Object {
    fd: OwnedFd,
    id: u32,
}

/// The links and maps of a gate, kept by their descriptors.
#[derive(Debug)]
pub(super) struct Held {
    directory: PathBuf,
    marker: String,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<String, Object>,
    /// The directory as it was when all of it was there.
    seen: Option<Seen>,
    /// A lock on a directory that was made anew.
    claim: Option<OwnedFd>,
    /// The gate is being taken away.
    over: bool,
}

/// What tells that nothing in a directory has been changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    device: u64,
    inode: u64,
    changed: (i64, u64),
}

impl Seen {
    fn of(directory: &Path) -> Result<Self, Errno> {
        let stat = rustix::fs::stat(directory)?;
        Ok(Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            #[allow(clippy::useless_conversion, reason = "signed on some machines")]
            changed: (
                stat.st_ctime,
                u64::try_from(stat.st_ctime_nsec).unwrap_or(0),
            ),
        })
    }
}

impl Held {
    /// Holds everything that is in the directory.
    pub(super) fn new(directory: &Path, marker: String) -> Result<Self, Errno> {
        let held = Self {
            directory: directory.to_owned(),
            marker,
            state: Mutex::default(),
        };
        held.hold()?;
        Ok(held)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds what has come to be in the directory since.
    pub(super) fn hold(&self) -> Result<(), Errno> {
        let mut state = self.state();
        let entries = std::fs::read_dir(&self.directory).map_err(|error| io(&error))?;
        for entry in entries {
            let name = entry.map_err(|error| io(&error))?.file_name();
            let name = name.to_string_lossy().into_owned();
            let is_ours = name.starts_with(LINKS) || BPF_MAPS.contains(&name.as_str());
            if is_ours && !state.objects.contains_key(&name) {
                let fd = bpf::get(self.directory.join(&name))?;
                let id = bpf::id(&fd)?;
                state.objects.insert(name, Object { fd, id });
            }
        }
        state.seen = None;
        Ok(())
    }

    /// Takes these out of the directory and lets go of them: the kernel
    /// detaches the programs.
    pub(super) fn remove(&self, names: impl Iterator<Item = String>) {
        let mut state = self.state();
        for name in names {
            state.objects.remove(&name);
            // What stays attached is left out when it is attached again.
            let _ = std::fs::remove_file(self.directory.join(name));
        }
        state.seen = None;
    }

    /// Lets go of everything: nothing is put back from now on.
    pub(super) fn let_go(&self) {
        let mut state = self.state();
        state.over = true;
        state.objects.clear();
    }

    /// Puts back what is missing in the directory, and says what was. Without
    /// `thoroughly` nothing is looked at if the directory is as it was.
    ///
    /// # Errors
    ///
    /// What cannot be put back, and why.
    fn put_back(&self, thoroughly: bool) -> Result<Vec<String>, String> {
        let mut state = self.state();
        if state.over || !thoroughly && state.seen.is_some_and(|seen| self.is_as(seen)) {
            return Ok(Vec::new());
        }
        let mut missing = Vec::new();
        let failed = |what: &str, why: &dyn std::fmt::Display| {
            format!(
                "the gate is not whole: {what} is missing at {} and cannot be put back ({why})",
                self.directory.display()
            )
        };
        if !self.directory.is_dir() {
            missing.push(String::from("its directory"));
            state.claim = Some(
                self.make_directory()
                    .map_err(|why| failed("its directory", &why))?,
            );
        }
        for (name, object) in &state.objects {
            let path = self.directory.join(name);
            let there = bpf::get(&path).and_then(bpf::id);
            if there == Ok(object.id) {
                continue;
            }
            if there != Err(Errno::NOENT) {
                // Something else has its name.
                let _ = std::fs::remove_file(&path);
            }
            missing.push(name.clone());
            bpf::pin(object.fd.as_fd(), &path).map_err(|errno| failed(name, &errno))?;
        }
        let marker = self.directory.join(&self.marker);
        match rustix::fs::mkdir(&marker, Mode::RWXU) {
            Ok(()) => missing.push(self.marker.clone()),
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed(&self.marker, &errno)),
        }
        state.seen = Seen::of(&self.directory).ok();
        Ok(missing)
    }

    fn is_as(&self, seen: Seen) -> bool {
        Seen::of(&self.directory) == Ok(seen)
    }

    fn make_directory(&self) -> Result<OwnedFd, String> {
        mount_bpffs(&self.directory).map_err(|error| error.to_string())?;
        match rustix::fs::mkdir(&self.directory, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.to_string()),
        }
        claim(&self.directory).map_err(|error| error.to_string())
    }
}

fn io(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// When the gate was looked at last, and what came of it.
#[derive(Debug, Default)]
pub(super) struct Watch {
    last: Mutex<Last>,
}

#[derive(Debug, Default)]
struct Last {
    at: Option<Instant>,
    /// Why the gate is not whole.
    broken: Option<String>,
    /// What is to be said to whoever runs the guard.
    unsaid: Vec<String>,
}

/// How an inode's entries in the maps were found.
enum Content {
    Whole,
    /// Was put back.
    Mended(&'static str),
    /// Cannot be.
    Lost(&'static str),
}

impl Gate {
    fn last(&self) -> MutexGuard<'_, Last> {
        self.watch
            .last
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the gate can keep one more pin.
    ///
    /// # Errors
    ///
    /// Why not.
    pub(super) fn require_whole(&self) -> Result<(), String> {
        let mut last = self.last();
        match self.loaded.held.put_back(false) {
            Ok(missing) => {
                last.unsaid.extend(put_back(&missing));
                last.broken.clone().map_or(Ok(()), Err)
            }
            Err(why) => Err(why),
        }
    }

    /// Looks at all of it, every second. Says what is to be known, and tells
    /// holders what cannot be put back.
    pub(super) fn watch(&self, guard: &Guard, say: &dyn Fn(&str)) {
        let mut texts = Vec::new();
        let mut is_due = false;
        let newly_broken = {
            let mut last = self.last();
            texts.append(&mut last.unsaid);
            if last.at.is_some_and(|at| at.elapsed() < INTERVAL) {
                None
            } else {
                last.at = Some(Instant::now());
                let said = texts.len();
                let broken = self.look(guard, &mut texts);
                if broken.is_some() || texts.len() > said {
                    // Anything may have passed meanwhile.
                    self.spoil_all(guard);
                }
                let before = std::mem::replace(&mut last.broken, broken.clone());
                is_due = true;
                broken.filter(|_| before.is_none())
            }
        };
        // Whoever listens may take his time: nobody waits for him here.
        for text in texts {
            say(&text);
        }
        if let Some(why) = newly_broken {
            say(&format!(
                "{why}; holders are told, and nothing can be pinned"
            ));
            guard.notices.lost_all(&guard.table, &why);
        }
        if is_due {
            self.watch_content(guard, say);
        }
    }

    /// Looks at everything but what inodes have in the maps. Returns why the
    /// gate is not whole, and adds what was put back to `texts`.
    fn look(&self, guard: &Guard, texts: &mut Vec<String>) -> Option<String> {
        let mut broken = None;
        match self.loaded.held.put_back(true) {
            Ok(missing) => texts.extend(put_back(&missing)),
            Err(why) => broken = Some(why),
        }
        // Whom the programs answer is in there, too.
        match self.check_settings() {
            Ok(true) => {}
            Ok(false) => {
                guard.tripwire.look_everywhere();
                texts.push(String::from(
                    "somebody has changed the rules of the gate: they were put back",
                ));
            }
            Err(why) => {
                broken.get_or_insert(why);
            }
        }
        if let Err(why) = self.require_answer() {
            broken.get_or_insert(why);
        }
        broken
    }

    /// Looks at what pinned inodes have in the maps.
    fn watch_content(&self, guard: &Guard, say: &dyn Fn(&str)) {
        for watched in guard.table.all() {
            self.check(guard, &watched, say);
        }
    }

    /// The programs answer the guard.
    fn require_answer(&self) -> Result<(), String> {
        self.identify(self.probe.as_fd())
            .map(drop)
            .map_err(|errno| format!("the gate is not whole: its programs do not answer ({errno})"))
    }

    /// Whether the programs judge by the right rules, and for this guard; puts
    /// them back if not.
    fn check_settings(&self) -> Result<bool, String> {
        let map = &self.loaded.maps.settings;
        let key = 0u32.to_ne_bytes();
        let there = map
            .lookup(&key, MapFlags::ANY)
            .ok()
            .flatten()
            .and_then(|bytes| Settings::read_from_bytes(&bytes).ok());
        let wanted = *self.rules();
        if there.is_some_and(|there| there.says_the_same_as(&wanted)) {
            return Ok(true);
        }
        map.update(&key, wanted.as_bytes(), MapFlags::ANY)
            .map(|()| false)
            .map_err(|error| {
                format!("the gate is not whole: its rules cannot be written ({error})")
            })
    }

    /// Looks at what is in the maps of an inode.
    fn check(&self, guard: &Guard, watched: &Arc<Watched>, say: &dyn Fn(&str)) {
        match self.mend(watched) {
            Content::Whole => {}
            Content::Mended(what) => {
                // Outside of the lock that it was found under.
                let published = self.publish(watched);
                guard.tripwire.look_everywhere();
                if published.is_err() {
                    self.lose(guard, watched, what, say);
                } else {
                    say(&format!(
                        "somebody has removed {what} of {} (inode {} of {}) from the gate: it was \
                         put back",
                        watched.path,
                        watched.id.inode,
                        watched.id.device()
                    ));
                }
            }
            Content::Lost(what) => {
                guard.tripwire.look_everywhere();
                self.lose(guard, watched, what, say);
            }
        }
    }

    fn lose(&self, guard: &Guard, watched: &Watched, what: &str, say: &dyn Fn(&str)) {
        let why = format!("somebody has removed {what} of its file from the gate");
        let pins = watched.pins.load();
        let mut told = false;
        for pin in pins.iter().filter(|pin| !pin.is_dead()) {
            told |= pin.fate.summary().1.is_none();
            guard.notices.lost(pin, &why);
        }
        if told {
            say(&format!("{}: {why}; holders are told", watched.path));
        }
    }

    /// Finds out what is missing of an inode, and puts back what
    /// [`publish`](Self::publish) does not.
    fn mend(&self, watched: &Watched) -> Content {
        let shard = self.shard(watched.id);
        let published = shard.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(known) = published.get(&watched.id) else {
            return Content::Whole;
        };
        // Of an inode that is just about to have its first pin nothing is
        // there; and what an earlier guard has left cannot be written anew.
        if known.pins == 0 || known.kept {
            return Content::Whole;
        }
        let key = Key::new(watched.id);
        let maps = &self.loaded.maps;
        // Only this guard takes it out, under this lock, and forgets the inode
        // then.
        if matches!(maps.lives.lookup(key.as_bytes(), MapFlags::ANY), Ok(None)) {
            return if self.count_lives(key) {
                Content::Mended("the count of its pins")
            } else {
                Content::Lost("the count of its pins")
            };
        }
        let pins = watched.pins.load();
        if !self.is_any_kept(&pins) {
            // All of them are just ending.
            return Content::Whole;
        }
        if !self.has_entry(key, known) {
            return Content::Mended("what is pinned");
        }
        let bit = 1 << (key.slot() % 64);
        if maps.filter.words()[key.word()].load(SeqCst) & bit == 0 {
            return Content::Mended("the mark in the filter");
        }
        let device = maps.devices.lookup(&key.dev.to_ne_bytes(), MapFlags::ANY);
        if matches!(device, Ok(None)) && self.count_on(key.dev) {
            return Content::Mended("the count of its filesystem's pins");
        }
        Content::Whole
    }

    /// Whether the kernel keeps a pin that is granted.
    fn is_any_kept(&self, pins: &PinSet<Pin>) -> bool {
        pins.iter().any(|pin| {
            !pin.is_dead() && pin.settled().is_some() && pin.is_handed_over() && self.keeps(pin.id)
        })
    }

    fn has_entry(&self, key: Key, known: &Published) -> bool {
        let entry = self
            .loaded
            .maps
            .entries
            .lookup(key.as_bytes(), MapFlags::ANY);
        match entry {
            Ok(entry) => entry
                .and_then(|bytes| Entry::read_from_bytes(&bytes).ok())
                .is_some_and(|entry| entry.version == known.version),
            // What cannot be told is not known to be missing.
            Err(_) => true,
        }
    }

    /// Counts again how many descriptions are pins of an inode; says no if
    /// that cannot be told any more.
    fn count_lives(&self, key: Key) -> bool {
        let maps = &self.loaded.maps;
        let lives = self.count_holders(|holder| holder.key == key);
        let life = Life {
            lives,
            // No stamp of before fits.
            disturbed: self.versions.fetch_add(1, Relaxed),
            last: 0,
        };
        // Unless a program has begun to count anew.
        lives > 0
            && maps
                .lives
                .update(key.as_bytes(), life.as_bytes(), MapFlags::NO_EXIST)
                .is_ok()
    }

    /// The same on a filesystem.
    fn count_on(&self, device: u32) -> bool {
        let count = self.count_holders(|holder| holder.key.dev == device);
        let devices = &self.loaded.maps.devices;
        devices
            .update(
                &device.to_ne_bytes(),
                &count.to_ne_bytes(),
                MapFlags::NO_EXIST,
            )
            .is_ok()
    }

    fn count_holders(&self, which: impl Fn(&Holder) -> bool) -> u64 {
        let holders = &self.loaded.maps.holders;
        holders
            .keys()
            .filter_map(|holder| holders.lookup(&holder, MapFlags::ANY).ok().flatten())
            .filter_map(|bytes| Holder::read_from_bytes(&bytes).ok())
            .filter(which)
            .count() as u64
    }
}

fn put_back(missing: &[String]) -> Option<String> {
    (!missing.is_empty()).then(|| {
        format!(
            "somebody has removed {} from the gate: put back",
            missing.join(", ")
        )
    })
}
