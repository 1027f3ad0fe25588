//! What may be done to a file while ranges of it are pinned. Pure.
//!
//! [`RULES`] is the contract as data: for every kind of operation, which bytes
//! it reaches and what it may not meet there. [`Pinned`] is what one pin
//! refuses. Both become [`Layers`], the only evaluator of the contract: sorted
//! lists of runs, one list for each reason to refuse. A gate classifies what it
//! sees into an [`Operation`] and asks the layers of the inode. A gate that
//! cannot see precisely asks about the worst operation that it could be. To
//! name the pin that refuses an operation, a gate asks the layers of each pin
//! alone.
//!
//! `gate/bpf/prog/judge.h` of the guard is [`Layers::refuses`] in C, and a test
//! asks both the same questions. Another test in this crate compares the layers
//! with a model of the contract. The model knows neither rules nor runs, and
//! looks at each block, page or folio by itself. Both must agree in both
//! directions.

mod apart;
mod geometry;
pub mod layers;
mod operation;
mod pinned;
mod rules;

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

pub use apart::pages_between;
pub use geometry::{Geometry, LARGEST_BLOCK};
pub use layers::Layers;
pub use operation::Operation;
pub use pinned::{Apart, Beside, Pinned};
pub use rules::{LetsGo, Meets, OperationKind, RULES, Reach, Rule, Traits, kinds};
