//! Where the blocks of a file lie, and what may be done to them while they are
//! pinned. The library and the guard stand on this crate: what they agree on
//! is here, and nothing that talks to anybody but the kernel.
//!
//! [`facts`] and [`block_map`] read facts about a file. All else is pure:
//! [`extent`] says what a block map is, [`plan`] which part of it is mapped
//! how, [`contract`] what may be done to a file while ranges of it are pinned.

#![forbid(unsafe_code)]

pub mod block_map;
pub mod contract;
pub mod extent;
pub mod facts;
pub mod plan;

pub use extent::{BlockMap, DeviceId, Extent, ExtentState};
pub use facts::{FileFacts, Filesystem, Obstacle, ObstacleKind};
