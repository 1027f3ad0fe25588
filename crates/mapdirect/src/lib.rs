//! Files mapped so that nobody can move, free, share or allocate the blocks
//! under the mapping: the semantics of `MAP_DIRECT`, an mmap flag that Linux
//! never merged, on the kernels people already run.
//!
//! * A [`DirectMap`] is a shared mapping whose blocks stay where they are.
//! * A read-only one ([`MapOptions::read_only`]) is for readers who fear that
//!   somebody truncates the file under them.
//! * A [`Pin`] holds a block map still without mapping anything, for agents that
//!   go to the blocks by themselves.
//!
//! While one of them exists, an operation by anybody that would change the block
//! map of the range fails with `ETXTBSY`. A guard keeps that promise: `mapdirect
//! guard`, run by root. The caller needs `CAP_LINUX_IMMUTABLE`.
//!
//! ```no_run
//! use mapdirect::{MapOptions, PinOptions, State};
//!
//! let file = std::fs::File::options().read(true).write(true).open("data")?;
//!
//! // Stores go to the file's own blocks; no truncation can turn them into SIGBUS.
//! let map = MapOptions::new().range(0..1 << 20).accept_page_cache(true).map(&file)?;
//! map.write_all_at(b"hello", 0)?;
//! map.flush_range(0..5)?;
//!
//! // Extents that stay true, for agents that go to the blocks by themselves.
//! let pin = PinOptions::new().range(0..1 << 20).pin(&file)?;
//! assert!(pin.block_map().is_stable());
//! assert_eq!(pin.state(), State::Kept);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Words
//!
//! * A block is **stable** if it is allocated, written and used by this file
//!   alone: a store changes its bytes and nothing else.
//! * Holes, unwritten and shared blocks are **frozen** under a pin. A store to
//!   them would have to change the block map, so it raises SIGBUS; the safe calls
//!   return an error. Holes and unwritten blocks read as zeros.
//! * To **prepare** a file is to make all blocks of a range stable before there
//!   is a pin: [`PrepareOptions`], [`MapOptions::prepare_first`]. To
//!   [**allocate**](DirectMap::allocate) is to do so under a pin that holds.
//! * A pin is **kept**, **unattended** or **lost** ([`State`]). What no gate can
//!   refuse the guard notices: a **breach**. Then [`Pin::integrity`] says which
//!   blocks have changed, and a mapping raises SIGBUS from then on, unless
//!   [`MapOptions::on_breach`] said otherwise. [`Pin::event_fd`] says when to
//!   look. For that, each process has a thread from its first pin on.
//!
//! Offsets in memory are bytes from the start of the mapping, as `usize`.
//! Everything about blocks counts bytes of the file, as `u64`.
//!
//! # No Deref
//!
//! A [`DirectMap`] is no `&[u8]`, and does not deref to one. A reference promises
//! the compiler that nobody else changes the bytes while it lives. A pin keeps
//! others from truncating the file, not from storing to it: another process may
//! do so at any moment, and the promise would be broken in safe code. So the safe
//! calls copy, by atomic loads and stores, and [`DirectMap::as_slice`], which
//! makes that promise, is `unsafe`.
//!
//! # Porting from memmap2
//!
//! | memmap2 | here |
//! | --- | --- |
//! | `unsafe { Mmap::map(&file)? }` | `MapOptions::new().read_only(true).map(&file)?`; no `unsafe`: nobody can truncate it |
//! | `unsafe { MmapMut::map_mut(&file)? }` | `MapOptions::new().accept_page_cache(true).map(&file)?` |
//! | `MmapOptions::offset(a).len(n)` | [`MapOptions::range(a..a + n)`](MapOptions::range) |
//! | `&map[a..b]` | [`map.read_exact_at(&mut buf, a)`](DirectMap::read_exact_at), or [`map.slice(a..b)`](DirectMap::slice) to pass it on |
//! | `map[a..b].copy_from_slice(buf)` | [`map.write_all_at(buf, a)`](DirectMap::write_all_at) |
//! | `map[a..b].fill(0)` | [`map.fill(a..b, 0)`](DirectMap::fill) |
//! | an atomic by pointer cast | [`map.load`](DirectMap::load), [`store`](DirectMap::store), [`fetch_add`](DirectMap::fetch_add), [`compare_exchange`](DirectMap::compare_exchange) |
//! | `flush`, `flush_async` | [the same](DirectMap::flush); [`drain`](DirectMap::drain) waits for the second |
//! | `flush_range(a, n)` | [`flush_range(a..a + n)`](DirectMap::flush_range) |
//! | `advise`, `lock`, `unlock`, `as_ptr`, `as_mut_ptr` | [the same](DirectMap::advise) |
//! | `unchecked_advise` | not here: what it adds takes away bytes or pages |
//! | `remap` | not here, see below |
//! | `Deref` | [`unsafe { map.as_slice() }`](DirectMap::as_slice), if you can promise it |
//!
//! **remap** would not be sound. Growing a mapping in place takes in bytes that
//! nobody has pinned and blocks that may be holes, which an ordinary store would
//! allocate; and moving it would invalidate every pointer that
//! [`DirectMap::as_ptr`] has given out, and the address at which a breach revokes
//! the mapping. Map the larger range, then drop the smaller mapping: pins of one
//! file may overlap, so no block is unprotected for a moment.
//!
//! # Porting from vm-memory
//!
//! [`VolatileSlice`] is a part of a mapping as there, [`DirectMap::load`] and
//! [`DirectMap::store`] take the same arguments, and [`DirectMap::as_mut_ptr`] is
//! what a `MmapRegion` can be built from (`MmapRegion::build_raw`), for as long as
//! the mapping lives.

#![deny(unsafe_code)]
#![warn(missing_docs, rustdoc::broken_intra_doc_links)]

#[expect(unsafe_code, reason = "a mapping is made again here")]
mod again;
mod descriptor;
mod device;
mod error;
mod establish;
mod extents;
#[expect(
    unsafe_code,
    reason = "memory is registered, and put in the place of memory that a child lacks"
)]
mod frozen;
mod giving_way;
mod guard;
#[expect(
    unsafe_code,
    reason = "a child of fork(2) cannot wait for locks of its parent's threads; mappings are \
              taken away"
)]
mod holder;
#[expect(
    unsafe_code,
    reason = "mappings are made, accessed, handed out and unmapped here"
)]
mod map;
mod open;
mod pin;
mod prepare;
#[expect(
    unsafe_code,
    reason = "the system call takes an address from its caller"
)]
pub mod raw;
pub mod records;
mod report;
mod state;
pub mod status;

pub use device::{BlockDevice, DiskLayout, DiskRun, Place};
pub use error::{Error, Kind, Result};
pub use establish::{Scope, Strength};
pub use extents::block_map;
pub use giving_way::GivingWay;
pub use guard::Guard;
pub use map::{Advice, Atomic, DirectMap, Durability, Flusher, MapOptions, VolatileSlice};
pub use mapdirect_model::{BlockMap, DeviceId, Extent, ExtentState, RawAccess};
pub use mapdirect_proto::{Breach, Cause, Gate, Who};
pub use open::{announce, open};
pub use pin::{Pin, PinInPlace, PinOptions};
pub use prepare::{HugePieces, PrepareOptions, Prepared, Progress, prepare};
pub use report::{Opener, PinFlags, PinnedRange};
pub use state::{EventFd, Integrity, OnBreach, State};

/// The Rust of the README, which the tests compile.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;

/// The Rust of the page for those who use it, which the tests compile.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/using.md")]
struct Using;

/// The Rust of the page about porting.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/porting.md")]
struct Porting;
