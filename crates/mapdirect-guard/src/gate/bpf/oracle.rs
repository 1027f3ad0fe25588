//! Asks the programs without affecting anybody, for tests that compare their
//! judgement with that of [`Layers::refuses`].

use super::abi::{Entry, Facts, INLINE, Key, Question, Run, Settings};
use super::functions::Kernel;
use super::load::{LoadError, load_object};
use super::spill;
use crate::policy::Operation;
use crate::policy::layers::Layers;
use crate::table::InodeId;
use libbpf_rs::{MapCore, MapFlags, MapHandle, Object, ProgramInput};
use zerocopy::{FromZeros, IntoBytes};

/// The programs with maps of their own, attached to nothing.
#[derive(Debug)]
pub struct Oracle {
    object: Object,
    entries: MapHandle,
    spill: MapHandle,
    version: u64,
}

/// The inode that every question is about.
const INODE: InodeId = InodeId { dev: 7, inode: 1 };

fn failed(error: impl std::fmt::Display) -> LoadError {
    LoadError::Failed(error.to_string())
}

impl Oracle {
    /// Loads the programs.
    ///
    /// # Errors
    ///
    /// When the gate cannot be loaded.
    pub fn load() -> Result<Self, LoadError> {
        let object = load_object(None)?;
        let map = |name: &str| {
            let found = object.maps().find(|map| map.name() == name);
            let found = found.ok_or_else(|| failed(format!("there is no map {name}")))?;
            MapHandle::try_from(&found).map_err(failed)
        };
        let settings = map("settings")?;
        let (entries, spill) = (map("entries")?, map("spill")?);
        settings
            .update(
                &0u32.to_ne_bytes(),
                Settings::new(0, &Kernel::default(), true, false).as_bytes(),
                MapFlags::ANY,
            )
            .map_err(failed)?;
        Ok(Self {
            object,
            entries,
            spill,
            version: 1,
        })
    }

    /// Makes the programs judge by these layers from now on. Says whether runs
    /// had to be spilled.
    ///
    /// # Errors
    ///
    /// When the kernel does not take the layers.
    pub fn put(&mut self, layers: &Layers, reflink: bool) -> Result<bool, LoadError> {
        let before = self.version;
        self.version += 1;
        let facts = Facts {
            reflink,
            cached: false,
            denials: super::abi::Denials::default(),
            granting: false,
            delegated: false,
        };
        let (entry, runs) = Entry::new(self.version, layers, facts);
        if let Some(runs) = &runs {
            spill(&self.spill, self.version, runs).map_err(failed)?;
        }
        self.entries
            .update(Key::new(INODE).as_bytes(), entry.as_bytes(), MapFlags::ANY)
            .map_err(failed)?;
        let _ = self.spill.delete(&before.to_ne_bytes());
        let count: usize = layers.lists().iter().map(Vec::len).sum();
        debug_assert_eq!(runs.is_some(), count > INLINE);
        Ok(runs.is_some())
    }

    /// Whether the programs refuse an operation on a file of `size` bytes.
    ///
    /// # Errors
    ///
    /// When the programs cannot be run.
    pub fn refuses(&self, operation: &Operation, size: u64) -> Result<bool, LoadError> {
        let key = Key::new(INODE);
        let run = |range: &std::ops::Range<u64>| Run {
            start: range.start,
            end: range.end,
        };
        let mut question = Question::new_zeroed();
        question.key = key;
        question.kind = operation.kind as u32;
        question.direct = operation.direct.into();
        question.late = operation.late.into();
        question.at = run(&operation.range);
        if let Some(or) = &operation.or {
            question.has_or = 1;
            question.or_at = run(or);
        }
        question.size = size;
        question.answer = u64::MAX;
        let program = self
            .object
            .progs_mut()
            .find(|program| program.name() == "ask")
            .ok_or_else(|| failed("there is no program to ask"))?;
        // The answer is written into the question.
        let input = ProgramInput {
            context_in: Some(question.as_mut_bytes()),
            ..ProgramInput::default()
        };
        program.test_run(input).map_err(failed)?;
        match question.answer {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(failed(format!("they say {other}"))),
        }
    }
}
