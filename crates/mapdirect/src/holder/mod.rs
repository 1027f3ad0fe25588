//! What a holder has to do with the guard: the conversation, and what becomes
//! of its pins.

mod connection;
mod held;
mod hold;
mod listener;
mod shared;
#[cfg(test)]
mod tests;

pub(crate) use connection::{Connection, ENDED, environment, is_capable, unexpected};
pub(crate) use held::Held;
pub(crate) use hold::Hold;
pub(crate) use shared::{any_revoked, connections};
