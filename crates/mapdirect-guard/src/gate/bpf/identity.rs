//! What files of the guard's own are to the kernel: the programs are asked.

use super::abi::{Holder, Identity, WHO_IS_IT};
use super::{Gate, errno};
use crate::Errno;
use crate::table::Pin;
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use mapdirect_sys::fcntl;
use std::os::fd::BorrowedFd;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Asks the programs what a descriptor of this process is to the kernel; from
/// now on it is a pin, if one is given.
pub(super) fn ask_about(
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
    identities
        .lookup_and_delete(&key)
        .ok()
        .flatten()
        .and_then(|bytes| Identity::read_from_bytes(&bytes).ok())
        .ok_or(Errno::NODATA)
}

impl Gate {
    /// What a descriptor of this process is to the kernel.
    pub(super) fn identify(&self, file: BorrowedFd<'_>) -> Result<Identity, Errno> {
        self.ask_about(file, None)
    }

    /// The same; from now on it is a pin, if one is given.
    pub(super) fn ask_about(
        &self,
        file: BorrowedFd<'_>,
        pin: Option<&Pin>,
    ) -> Result<Identity, Errno> {
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
        self.pin_at(self.identify(file)?.file)
    }

    /// The pin that a struct file is, which may have been freed by now.
    pub(super) fn pin_at(&self, file: u64) -> Result<Option<u64>, Errno> {
        let holders = &self.loaded.maps.holders;
        let holder = holders
            .lookup(&file.to_ne_bytes(), MapFlags::ANY)
            .map_err(|error| errno(&error))?;
        let holder = holder.and_then(|bytes| Holder::read_from_bytes(&bytes).ok());
        Ok(holder.map(|holder| holder.pin))
    }

    /// Whether XFS has set blocks aside for copies of shared ones of this file.
    pub(crate) fn has_copy_blocks(&self, file: BorrowedFd<'_>) -> Result<bool, Errno> {
        Ok(self.identify(file)?.copies != 0)
    }

    /// How many direct reads and writes of a file are under way.
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
