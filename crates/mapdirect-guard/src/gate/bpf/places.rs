//! Where XFS keeps the blocks that it has set aside for copies of shared blocks.
//!
//! The kernel describes a module's types as long as the module is there. XFS is
//! one in most kernels, and comes with the first such filesystem: a guard that
//! is started with the system may well have loaded its programs before that.
//! What they say of XFS would stay unknown to them for as long as they are
//! attached, also for later guards. So a program that is attached to nothing is
//! asked when there is a file of XFS to ask about, and is loaded for that if it
//! was not.

use super::abi::Places;
use super::load::{LoadError, OBJECT, failed, told};
use libbpf_rs::{Object, ObjectBuilder, ProgramInput};
use std::sync::{Mutex, PoisonError};
use zerocopy::IntoBytes;

/// The program that knows.
const FINDS: &str = "find_places";

/// What is known.
#[derive(Debug)]
pub(super) struct Known(Mutex<Option<Places>>);

impl Known {
    /// What can be known when the programs have been loaded.
    pub(super) fn of(object: &Object) -> Self {
        let found = ask(object).ok().filter(|places| places.known != 0);
        Self(Mutex::new(found))
    }

    /// The places, now that there is a file of XFS, and so the module; or that they
    /// are not known, if this kernel does not describe its modules.
    pub(super) fn now(&self) -> Places {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.is_none() {
            // If there is no memory for that, there may be some next time.
            *known = load().and_then(|object| ask(&object)).ok();
        }
        known.unwrap_or_default()
    }
}

fn ask(object: &Object) -> Result<Places, LoadError> {
    let program = object.progs_mut().find(|program| program.name() == FINDS);
    let program = program.ok_or_else(|| failed(FINDS, "there is no such program"))?;
    let mut places = Places::default();
    let input = ProgramInput {
        context_in: Some(places.as_mut_bytes()),
        ..ProgramInput::default()
    };
    program
        .test_run(input)
        .map_err(|error| failed(FINDS, error))?;
    Ok(places)
}

/// Loads that program alone.
fn load() -> Result<Object, LoadError> {
    let mut open = ObjectBuilder::default()
        .open_memory(OBJECT)
        .map_err(|error| told("reading the programs", &error))?;
    for mut program in open.progs_mut() {
        let finds = program.name() == FINDS;
        program.set_autoload(finds);
    }
    for mut map in open.maps_mut() {
        map.set_autocreate(false)
            .map_err(|error| told("leaving out a map", &error))?;
    }
    open.load().map_err(|error| told("loading", &error))
}
