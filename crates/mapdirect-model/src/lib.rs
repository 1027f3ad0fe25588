//! Where the blocks of a file lie, and what may be done to them while they are
//! pinned. The library and the guard both build on this crate: it contains what
//! they agree on, and communicates with nothing but the kernel.
//!
//! [`facts`] and [`block_map`] read facts about a file. Everything else is
//! pure. [`extent`] defines block maps, [`held`] tells apart what a pin of
//! strength stable holds, [`plan`] says which part of one is
//! mapped how, and [`contract`] says what may be done to a file while ranges of
//! it are pinned.

#![forbid(unsafe_code)]

pub mod block_map;
pub mod contract;
pub mod extent;
pub mod facts;
pub mod held;
pub mod plan;

pub use extent::{BlockMap, DeviceId, Extent, ExtentState, RawAccess};
pub use facts::{FileFacts, Filesystem, Obstacle, ObstacleKind};
