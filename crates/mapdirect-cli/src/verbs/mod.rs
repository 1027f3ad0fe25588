//! One file per verb.

pub(crate) mod arm;
pub(crate) mod doctor;
pub(crate) mod guard;
pub(crate) mod log;
pub(crate) mod pin;
pub(crate) mod policy;
pub(crate) mod prepare;
pub(crate) mod records;
pub(crate) mod run;
pub(crate) mod show;
pub(crate) mod status;
#[cfg_attr(not(feature = "tui"), path = "top_missing.rs")]
pub(crate) mod top;
pub(crate) mod unpin;
pub(crate) mod watch;
