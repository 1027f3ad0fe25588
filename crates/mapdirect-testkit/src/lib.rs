//! How mapdirect is attacked.
//!
//! * [`disk`]: real XFS and ext4 on loop devices.
//! * [`attack`]: the corpus of operations that read, write or reshape a file,
//!   through every door the kernel has, made by real system calls.
//! * [`contract`]: which of them must be refused where, as data.
//! * [`fault`]: loads and stores that may raise SIGBUS.
//! * [`hammer`]: tricks without privilege, again and again, by processes that preempt each other.
//! * [`hostile`]: strangers who try to keep others waiting, by a filesystem of
//!   their own ([`fuse`]) for one.
//! * [`latency`]: how long it takes until a store is durable.
//! * [`overlay`]: a file changed through an overlay that somebody mounts.
//! * [`power`]: what must be left when the power goes.
//! * [`process`]: guards, holders and attackers in processes of their own.
//! * [`writers`]: who writes past the gates, and what becomes of it.

#![deny(unsafe_code)]
#![expect(
    clippy::missing_errors_doc,
    reason = "errors here are failures of a test, and say what failed"
)]

pub mod attack;
#[expect(
    clippy::unwrap_used,
    reason = "a file under test that cannot be made fails the test"
)]
pub mod contract;
pub mod disk;
#[expect(
    unsafe_code,
    reason = "accesses that may fault, and the registers to go on with"
)]
pub mod fault;
pub mod fingerprint;
pub mod fuse;
pub mod hammer;
pub mod hostile;
pub mod latency;
pub mod legal;
pub mod overlay;
pub mod power;
pub mod process;
pub mod random;
#[expect(unsafe_code, reason = "system calls that rustix has no wrapper for")]
pub mod raw;

pub mod service_manager;
pub mod writers;

pub use disk::{Disk, Kind};
