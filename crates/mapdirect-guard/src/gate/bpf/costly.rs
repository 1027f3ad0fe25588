//! Programs that are attached only while they are needed.

use super::attach::{attach, link_name};
use super::load::{LoadError, failed};
use super::watch::Held;
use libbpf_rs::Object;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Programs that cost time for every read, write, open and close of any file.
/// They are attached while something is pinned and for a while after that, in
/// this order.
pub(super) const COSTLY: [&str; 4] = ["inode_free", "file_free", "file_open", "file_permission"];

/// Programs that note where each write goes, for writes whose registers do not
/// tell. They are attached while a pin needs that.
pub(super) const NOTES: [&str; 2] = ["end_rw", "note_rw"];

/// How long nothing must have been pinned before the programs are detached:
/// attaching them takes longer than a pin otherwise does.
const QUIET: Duration = Duration::from_secs(10);

/// The programs that are attached only while they are needed.
#[derive(Debug)]
pub(super) struct Costly {
    object: Object,
    directory: PathBuf,
    held: Arc<Held>,
    state: Mutex<CostlyState>,
}

#[derive(Debug)]
struct CostlyState {
    costly: Attachment,
    notes: Attachment,
    /// The number of pins that are about to begin.
    beginning: u32,
}

/// A group of programs that are attached together.
#[derive(Debug)]
struct Attachment {
    names: &'static [&'static str],
    attached: bool,
    quiet_since: Instant,
}

impl Attachment {
    fn new(names: &'static [&'static str], directory: &Path) -> Self {
        let is_there = |name: &&str| directory.join(link_name(name)).exists();
        Self {
            names,
            attached: names.iter().all(is_there),
            quiet_since: Instant::now(),
        }
    }

    fn attach(&mut self, object: &Object, directory: &Path, held: &Held) -> Result<(), LoadError> {
        self.quiet_since = Instant::now();
        if !self.attached {
            attach(object, directory, self.names)?;
            held.hold()
                .map_err(|errno| failed("holding the gate", errno))?;
            self.attached = true;
        }
        Ok(())
    }

    /// Detaches the programs when they have not been needed for a while.
    fn rest(&mut self, are_needed: bool, held: &Held) {
        if are_needed {
            self.quiet_since = Instant::now();
        } else if self.attached && self.quiet_since.elapsed() >= QUIET {
            self.attached = false;
            held.remove(self.names.iter().rev().map(|name| link_name(name)));
        }
    }
}

/// Keeps the programs attached while this value exists.
pub(super) struct Attached<'costly>(&'costly Costly);

impl Costly {
    pub(super) fn new(object: Object, directory: &Path, held: Arc<Held>) -> Self {
        let state = CostlyState {
            costly: Attachment::new(&COSTLY, directory),
            notes: Attachment::new(&NOTES, directory),
            beginning: 0,
        };
        Self {
            object,
            directory: directory.to_owned(),
            held,
            state: Mutex::new(state),
        }
    }

    fn state(&self) -> MutexGuard<'_, CostlyState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Attaches the programs that cost time for every file, unless they are
    /// attached.
    pub(super) fn attached(&self) -> Result<Attached<'_>, LoadError> {
        let mut state = self.state();
        state
            .costly
            .attach(&self.object, &self.directory, &self.held)?;
        state.beginning += 1;
        Ok(Attached(self))
    }

    /// Attaches the programs that note where writes go, unless they are
    /// attached.
    pub(super) fn take_notes(&self) -> Result<(), LoadError> {
        self.state()
            .notes
            .attach(&self.object, &self.directory, &self.held)
    }

    /// The object with the programs.
    pub(super) fn object(&self) -> &Object {
        &self.object
    }

    /// Detaches what has not been needed for a while.
    pub(super) fn rest(&self, needs: impl FnOnce() -> Needs) {
        let mut state = self.state();
        let needs = needs();
        let beginning = state.beginning > 0;
        state.notes.rest(beginning || needs.notes, &self.held);
        state.costly.rest(beginning || needs.hooks, &self.held);
    }
}

/// What is needed right now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Needs {
    /// Whether something is pinned.
    pub(super) hooks: bool,
    /// Whether it matters where a write goes.
    pub(super) notes: bool,
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.beginning -= 1;
        state.costly.quiet_since = Instant::now();
    }
}
