//! wip
#![allow(missing_docs, reason = "wip")]
pub mod eligibility;
pub mod error;
pub mod extents;
pub use extents::block_map;
pub use mapdirect_proto::{BlockMap, ExtentState};
pub struct Pin;
