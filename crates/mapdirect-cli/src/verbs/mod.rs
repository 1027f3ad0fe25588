//! One file per verb.

pub(crate) mod arm;
pub(crate) mod doctor;
pub(crate) mod guard;
pub(crate) mod pin;
pub(crate) mod policy;
pub(crate) mod prepare;
pub(crate) mod run;
pub(crate) mod show;
pub(crate) mod status;
pub(crate) mod unpin;
