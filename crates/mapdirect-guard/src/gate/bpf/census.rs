//! Finds out who can write to a file without being asked: descriptions that are
//! in no descriptor table and behind no mapping.
//!
//! The kernel counts every description that can write (`i_writecount`),
//! including those that an overlay, process accounting or a storage target has
//! opened for itself. Programs that list what all processes have open (bpf
//! iterators) name each struct file, so a struct file that is in many tables
//! counts once. If the kernel counts more descriptions than these, the rest
//! belong to somebody who writes without asking, or are on their way through a
//! socket. The count cannot tell one from the other.

use super::{Gate, abi::Key, load::LoadError};
use crate::Errno;
use libbpf_rs::{Iter, MapCore, MapFlags, MapHandle, Object, ProgramMut};
use std::collections::HashSet;
use std::io::Read;
use std::os::fd::BorrowedFd;
use zerocopy::IntoBytes;

/// The number of descriptions of a file that can write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Writers {
    /// How many the kernel counts. This includes truncations by path while they
    /// are under way.
    pub(crate) counted: usize,
    /// How many were found in the tables and mappings of processes.
    pub(crate) found: usize,
}

impl Writers {
    /// How many belong to no process.
    pub(crate) fn hidden(self) -> usize {
        self.counted.saturating_sub(self.found)
    }
}

impl Gate {
    /// Counts the descriptions that can write to the file of a description.
    /// Looking at mappings may wait for the process that has them, so never
    /// call this when nobody may wait.
    pub(crate) fn writers(&self, file: BorrowedFd<'_>) -> Result<Writers, Errno> {
        let identity = self.identify(file)?;
        let object = self.loaded.costly.object();
        let mut found = HashSet::new();
        for program in ["writers_by_descriptor", "writers_by_mapping"] {
            list(object, program, identity.key, &mut found).map_err(|_| Errno::IO)?;
            let writers = Writers {
                counted: usize::try_from(self.identify(file)?.writers).unwrap_or(0),
                found: found.len(),
            };
            // Mappings are searched only if the tables do not explain the
            // count.
            if writers.hidden() == 0 {
                return Ok(writers);
            }
        }
        Ok(Writers {
            counted: usize::try_from(self.identify(file)?.writers).unwrap_or(0),
            found: found.len(),
        })
    }
}

fn list(
    object: &Object,
    program: &str,
    key: Key,
    found: &mut HashSet<u64>,
) -> Result<(), LoadError> {
    let failed = |error: &dyn std::fmt::Display| LoadError::Failed(format!("{program}: {error}"));
    let sought = object.maps().find(|map| map.name() == "sought");
    let sought = sought.ok_or_else(|| failed(&"there is no map for it"))?;
    let sought = MapHandle::try_from(&sought).map_err(|error| failed(&error))?;
    // The programs run in this thread.
    let tid = rustix::thread::gettid()
        .as_raw_nonzero()
        .get()
        .to_ne_bytes();
    sought
        .update(&tid, key.as_bytes(), MapFlags::ANY)
        .map_err(|error| failed(&error))?;
    let lister: Option<ProgramMut<'_>> = object.progs_mut().find(|other| other.name() == program);
    let lister = lister.ok_or_else(|| failed(&"there is no such program"))?;
    let link = lister.attach().map_err(|error| failed(&error))?;
    let mut bytes = Vec::new();
    let read = Iter::new(&link)
        .map_err(|error| failed(&error))
        .and_then(|mut list| list.read_to_end(&mut bytes).map_err(|error| failed(&error)));
    let _ = sought.delete(&tid);
    read?;
    let files = bytes.chunks_exact(size_of::<u64>());
    found.extend(files.map(|file| {
        let mut word = [0; size_of::<u64>()];
        word.copy_from_slice(file);
        u64::from_ne_bytes(word)
    }));
    Ok(())
}
