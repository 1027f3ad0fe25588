//! Watches the gate: every program must be attached, every map must be there,
//! and the maps must contain what the guard has written.
//!
//! Root can take any of this away: remove files of the bpf filesystem, unmount
//! it, delete from maps. So the guard holds a descriptor of every link and of
//! every map. A program stays attached as long as somebody has a descriptor of
//! its link, because the kernel lets nobody detach a tracing link by force. So
//! removing a file opens nothing while the guard lives. The guard puts the file
//! back, which keeps the gate closed even when the guard dies. What is missing
//! in a map is written again. Everything is checked every second, and the
//! directory before each grant.
//!
//! Until something is back in the maps the gate may be open. So the block maps
//! of all pins are then read and compared, and a change in that time is
//! reported as a breach.

use super::abi::{Entry, Holder, Key, Life, Settings};
use super::attach::LINKS;
use super::directory::{claim, mount_bpffs};
use super::load::BPF_MAPS;
use super::{Gate, Published};
use crate::ledger::PinSet;
use crate::table::{Pin, Watched};
use crate::{Errno, Guard};
use libbpf_rs::{MapCore, MapFlags};
use mapdirect_sys::bpf;
use mapdirect_sys::names::path_in_line;
use rustix::fs::Mode;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

/// How often everything is checked.
const INTERVAL: Duration = Duration::from_secs(1);

/// An object of the gate, kept by its name in the directory.
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
    /// The state of the directory when it was last complete.
    seen: Option<Seen>,
    /// A lock on a directory that was created anew.
    claim: Option<OwnedFd>,
    /// Whether the gate is being removed.
    over: bool,
}

/// Shows whether anything in a directory has changed.
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

    /// Holds what has been added to the directory since.
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

    /// Removes these names from the directory and closes their objects. The
    /// kernel then detaches the programs.
    pub(super) fn remove(&self, names: impl Iterator<Item = String>) {
        let mut state = self.state();
        for name in names {
            state.objects.remove(&name);
            // If a link stays, its program is skipped when it is attached
            // again.
            let _ = std::fs::remove_file(self.directory.join(name));
        }
        state.seen = None;
    }

    /// Closes everything: nothing is put back from now on.
    pub(super) fn let_go(&self) {
        let mut state = self.state();
        state.over = true;
        state.objects.clear();
    }

    /// Puts back what is missing in the directory, and says what was missing.
    /// Unless `thoroughly` is set, a directory that has not changed is not
    /// checked.
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
                path_in_line(&self.directory)
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
                // Something else has this name.
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

/// When the gate was last checked, and the result.
#[derive(Debug, Default)]
pub(super) struct Watch {
    last: Mutex<Last>,
}

#[derive(Debug, Default)]
struct Last {
    at: Option<Instant>,
    /// Why the gate is not whole.
    broken: Option<String>,
    /// Messages for the operator of the guard.
    unsaid: Vec<String>,
}

/// The state of an inode's entries in the maps.
enum Content {
    Whole,
    /// Something was missing, and was put back.
    Mended(&'static str),
    /// Something is missing, and cannot be put back.
    Lost(&'static str),
}

impl Gate {
    fn last(&self) -> MutexGuard<'_, Last> {
        self.watch
            .last
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks whether the gate can keep one more pin.
    ///
    /// # Errors
    ///
    /// Why it cannot.
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

    /// Checks everything, every second. Reports what the operator should know,
    /// and tells holders what cannot be put back.
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
        // The receiver may take its time: nobody waits for it here.
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

    /// Checks everything but the inodes' entries in the maps. Returns why the
    /// gate is not whole, and adds what was put back to `texts`.
    fn look(&self, guard: &Guard, texts: &mut Vec<String>) -> Option<String> {
        let mut broken = None;
        match self.loaded.held.put_back(true) {
            Ok(missing) => texts.extend(put_back(&missing)),
            Err(why) => broken = Some(why),
        }
        // The settings also say which process the programs answer.
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

    /// Checks the entries of pinned inodes in the maps.
    fn watch_content(&self, guard: &Guard, say: &dyn Fn(&str)) {
        for watched in guard.table.all() {
            self.check(guard, &watched, say);
        }
    }

    /// Checks that the programs answer the guard.
    fn require_answer(&self) -> Result<(), String> {
        self.identify(self.probe.as_fd())
            .map(drop)
            .map_err(|errno| format!("the gate is not whole: its programs do not answer ({errno})"))
    }

    /// Whether the programs have the right rules and the identity of this
    /// guard. Puts the settings back if not.
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

    /// Checks an inode's entries in the maps.
    fn check(&self, guard: &Guard, watched: &Arc<Watched>, say: &dyn Fn(&str)) {
        match self.mend(watched) {
            Content::Whole => {}
            Content::Mended(what) => {
                // Published outside of the lock under which the fault was
                // found.
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
        // An inode that is just about to get its first pin has no entries yet,
        // and the entries that an earlier guard has left cannot be written
        // anew.
        if known.pins == 0 || known.kept {
            return Content::Whole;
        }
        let key = Key::new(watched.id);
        let maps = &self.loaded.maps;
        // Only this guard removes this entry, under this lock, and then it
        // forgets the inode.
        if matches!(maps.lives.lookup(key.as_bytes(), MapFlags::ANY), Ok(None)) {
            return if self.count_lives(key) {
                Content::Mended("the count of its pins")
            } else {
                Content::Lost("the count of its pins")
            };
        }
        let pins = watched.pins.load();
        if !self.is_any_kept(&pins) {
            // All of these pins are just ending.
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
            // If this cannot be found out, nothing is known to be missing.
            Err(_) => true,
        }
    }

    /// Counts again how many descriptions are pins of an inode. Returns `false`
    /// if that cannot be found out any more.
    fn count_lives(&self, key: Key) -> bool {
        let maps = &self.loaded.maps;
        let lives = self.count_holders(|holder| holder.key == key);
        let life = Life {
            lives,
            // No earlier stamp matches this one.
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

    /// Counts the pins on a filesystem again.
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
