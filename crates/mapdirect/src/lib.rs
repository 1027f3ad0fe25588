//! Files mapped so that nobody can move, free, share or allocate the blocks
//! under the mapping: the semantics of `MAP_DIRECT`, an mmap flag that Linux
//! never merged, on the kernels people already run.
//!
//! A [`DirectMap`] is a shared mapping whose blocks stay where they are; a
//! [`Pin`] holds a block map still without mapping anything. While either
//! exists, an operation by anybody that would change the block map of the
//! range fails with `ETXTBSY`. A guard keeps that promise: `mapdirect guard`,
//! run by root. The caller needs `CAP_LINUX_IMMUTABLE`.
//!
//! ```no_run
//! use mapdirect::{MapOptions, PinOptions, State};
//!
//! let file = std::fs::File::options().read(true).write(true).open("data")?;
//!
//! // Stores go to the file's own blocks; no truncation can turn them into SIGBUS.
//! let map = MapOptions::new().range(0..1 << 20).accept_page_cache(true).map(&file)?;
//! map.write_at(0, b"hello")?;
//! map.persist(0..5)?;
//!
//! // Extents that stay true, for whoever goes to the blocks by itself.
//! let pin = PinOptions::new().range(0..1 << 20).pin(&file)?;
//! assert!(pin.block_map().is_stable());
//! assert_eq!(pin.state(), State::Kept);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Holes, unwritten and shared blocks are *frozen* under a pin: a store to
//! them would have to change the block map, so it raises SIGBUS. Holes and
//! unwritten blocks read as zeros. [`DirectMap::allocate`] makes them
//! *stable* under a pin that holds, [`MapOptions::prepare`] before there is
//! one.
//!
//! A pin is `Kept`, `Unattended` or `Lost` ([`State`]). What no gate can refuse
//! the guard notices: then [`Pin::integrity`] says which blocks have changed,
//! and a mapping raises SIGBUS from then on, unless [`MapOptions::on_breach`]
//! said otherwise. [`Pin::event_fd`] says when to look. For that a thread is
//! started in each process with the first pin.

#![deny(unsafe_code)]

#[expect(unsafe_code, reason = "atomic access to mapped memory")]
mod access;
#[expect(unsafe_code, reason = "a mapping is made again here")]
mod again;
mod durability;
mod error;
mod establish;
mod extents;
#[expect(
    unsafe_code,
    reason = "memory is registered, and put in the place of memory that a child lacks"
)]
mod frozen;
mod guard;
mod locks;
#[expect(
    unsafe_code,
    reason = "mappings are made, handed out and unmapped here"
)]
mod mapping;
mod open;
mod pin;
mod prepare;
#[expect(
    unsafe_code,
    reason = "the system call takes an address from its caller"
)]
pub mod raw;
#[expect(unsafe_code, reason = "mappings are taken away here")]
mod revoke;
#[expect(unsafe_code, reason = "mappings are put together here")]
mod segments;
mod state;
#[expect(
    unsafe_code,
    reason = "a child of fork(2) cannot wait for locks of its parent's threads; mappings are \
              taken away"
)]
mod watch;

pub use durability::Durability;
pub use error::{Error, Kind, Result};
pub use establish::Scope;
pub use extents::block_map;
pub use guard::Guard;
pub use mapdirect_proto::status;
pub use mapdirect_proto::{
    BlockMap, Breach, Cause, DeviceId, Extent, ExtentState, Gate, Opener, PinnedRange,
};
pub use mapping::{DirectMap, MapOptions};
pub use open::open;
pub use pin::{Pin, PinOptions};
pub use prepare::{HugePieces, PrepareOptions, Prepared, Progress, prepare};
pub use state::{EventFd, Integrity, OnBreach, State};

/// The old name of [`State`].
#[deprecated(note = "use `State`; `Status` is what `Guard::status` returns")]
pub type Status = State;
