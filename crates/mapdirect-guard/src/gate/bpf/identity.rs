//! Identifies the guard's own files to the kernel, by asking the programs.

use super::abi::{Holder, Identity, Role, WHO_IS_IT};
use super::{Gate, errno};
use crate::Errno;
use crate::table::Pin;
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use mapdirect_model::facts::Filesystem;
use mapdirect_sys::fcntl;
use std::os::fd::BorrowedFd;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Asks the programs to identify a descriptor of this process. `asked` tells
/// them more, if that is needed.
pub(super) fn ask_about(
    identities: &MapHandle,
    file: BorrowedFd<'_>,
    asked: Option<&Identity>,
) -> Result<Identity, Errno> {
    let tid = rustix::thread::gettid().as_raw_nonzero().get();
    let key = tid.to_ne_bytes();
    if let Some(asked) = asked {
        identities
            .update(&key, asked.as_bytes(), MapFlags::ANY)
            .map_err(|error| errno(&error))?;
    }
    fcntl::get_flags_with(file, WHO_IS_IT)?;
    identities
        .lookup_and_delete(&key)
        .ok()
        .flatten()
        .and_then(|bytes| Identity::read_from_bytes(&bytes).ok())
        .ok_or(Errno::NODATA)
}

impl Gate {
    /// Identifies a descriptor of this process to the kernel.
    pub(super) fn identify(&self, file: BorrowedFd<'_>) -> Result<Identity, Errno> {
        self.ask_about(file, None)
    }

    /// The same, and the description takes this role in a pin.
    pub(super) fn identify_for(
        &self,
        file: BorrowedFd<'_>,
        pin: &Pin,
        role: Role,
    ) -> Result<Identity, Errno> {
        let mut asked = Identity::new_zeroed();
        asked.pin = pin.id;
        asked.role = role as u32;
        (asked.start, asked.end) = (pin.shown.start, pin.shown.end);
        self.ask_about(file, Some(&asked))
    }

    fn ask_about(&self, file: BorrowedFd<'_>, asked: Option<&Identity>) -> Result<Identity, Errno> {
        ask_about(&self.loaded.maps.identities, file, asked)
    }

    /// The number of mappings by which the file of a descriptor can be stored to,
    /// whoever has them.
    pub(super) fn mappings_that_store(&self, file: BorrowedFd<'_>) -> Result<usize, Errno> {
        let mapped = self.identify(file)?.mapped;
        Ok(usize::try_from(mapped).unwrap_or(0))
    }

    /// Whether nobody else can be in the middle of anything on the inode of
    /// these two descriptions. The holder and the guard each have one
    /// descriptor of `of_holder`; only the guard has `of_pin`.
    ///
    /// Whoever writes holds a reference to a description all the while; so do
    /// asynchronous requests and mappings. A truncation by path counts as a
    /// writer. So if there are no other descriptions, and no more references to
    /// these two than are known, nobody else is there. (A process that does not
    /// share its descriptor table takes no reference, but that can only be the
    /// holder.)
    pub(crate) fn is_alone(
        &self,
        of_holder: BorrowedFd<'_>,
        of_pin: BorrowedFd<'_>,
    ) -> Result<bool, Errno> {
        let (writers, readers) = known_counts([of_holder, of_pin])?;
        let holders = self.identify(of_holder)?;
        let pins = self.identify(of_pin)?;
        // The question itself holds a reference, because this process has many
        // threads.
        Ok(holders.references <= 3
            && pins.references <= 2
            && [holders, pins]
                .iter()
                .all(|one| (one.writers, one.readers, one.direct) == (writers, readers, 0)))
    }

    /// Whether these two descriptions, the same as in
    /// [`is_alone`](Self::is_alone), are the only writers of their inode, and
    /// nobody else has the holder's. There may be readers.
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

    /// The pin whose life this description is, if it is one.
    pub(crate) fn pin_of(&self, file: BorrowedFd<'_>) -> Result<Option<u64>, Errno> {
        self.pin_at(self.identify(file)?.file)
    }

    /// The pin whose life a struct file is, if any. The struct file may have been
    /// freed by now.
    pub(super) fn pin_at(&self, file: u64) -> Result<Option<u64>, Errno> {
        let holders = &self.loaded.maps.holders;
        let holder = holders
            .lookup(&file.to_ne_bytes(), MapFlags::ANY)
            .map_err(|error| errno(&error))?;
        let holder = holder.and_then(|bytes| Holder::read_from_bytes(&bytes).ok());
        Ok(holder.map(|holder| holder.pin))
    }

    /// Whether XFS has set blocks aside for copies of shared blocks of this
    /// file, or that cannot be found out.
    pub(crate) fn has_copy_blocks(&self, file: BorrowedFd<'_>) -> Result<bool, Errno> {
        if Filesystem::of(file)? != Filesystem::Xfs {
            return Ok(false);
        }
        let mut asked = Identity::new_zeroed();
        asked.places = self.loaded.places.now();
        Ok(self.ask_about(file, Some(&asked))?.copies != 0)
    }

    /// The number of direct reads and writes of a file under way.
    pub(crate) fn direct_under_way(&self, file: BorrowedFd<'_>) -> Result<u32, Errno> {
        Ok(self.identify(file)?.direct)
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
