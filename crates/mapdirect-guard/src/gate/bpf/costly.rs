//! Programs that are attached only while somebody needs them.

use super::load::{LoadError, attach, failed, link_name};
use super::watch::Held;
use libbpf_rs::Object;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Programs that every read, write, open and close of any file pays for. They
/// are attached while something is pinned, and for a while after that, in this
/// order.
pub(super) const COSTLY: [&str; 4] = ["inode_free", "file_free", "file_open", "file_permission"];

/// Programs that note where each write goes, for what registers do not say.
/// They are attached while something is pinned for which that matters.
pub(super) const NOTES: [&str; 2] = ["end_rw", "note_rw"];

/// How long nothing must have been pinned before they are taken off: putting
/// them on takes longer than a pin otherwise does.
const QUIET: Duration = Duration::from_secs(10);

/// Those programs.
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
    /// Pins about to begin.
    beginning: u32,
}

/// Some programs that are attached together.
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

    /// Takes them off when nobody has needed them for a while.
    fn rest(&mut self, are_needed: bool, held: &Held) {
        if are_needed {
            self.quiet_since = Instant::now();
        } else if self.attached && self.quiet_since.elapsed() >= QUIET {
            self.attached = false;
            held.remove(self.names.iter().rev().map(|name| link_name(name)));
        }
    }
}

/// They are attached, and stay so while this is there.
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

    /// Attaches what every file pays for, unless it is.
    pub(super) fn attached(&self) -> Result<Attached<'_>, LoadError> {
        let mut state = self.state();
        state
            .costly
            .attach(&self.object, &self.directory, &self.held)?;
        state.beginning += 1;
        Ok(Attached(self))
    }

    /// Attaches the programs that note where writes go, unless they are.
    pub(super) fn take_notes(&self) -> Result<(), LoadError> {
        self.state()
            .notes
            .attach(&self.object, &self.directory, &self.held)
    }

    /// The programs.
    pub(super) fn object(&self) -> &Object {
        &self.object
    }

    /// Takes off what nothing has needed for a while.
    pub(super) fn rest(&self, needs: impl FnOnce() -> Needs) {
        let mut state = self.state();
        let needs = needs();
        let beginning = state.beginning > 0;
        state.notes.rest(beginning || needs.notes, &self.held);
        state.costly.rest(beginning || needs.hooks, &self.held);
    }
}

/// What is needed just now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Needs {
    /// Something is pinned.
    pub(super) hooks: bool,
    /// It matters where a write goes.
    pub(super) notes: bool,
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.beginning -= 1;
        state.costly.quiet_since = Instant::now();
    }
}
