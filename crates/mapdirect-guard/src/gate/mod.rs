//! Gates: what refuses an operation that would break a pin.
//!
//! * [`fanotify`]: pre-content permission events, Linux 6.14 and later.
//!   Sound by excluding everybody who could change the file unseen.
//! * `bpf` (BPF LSM and fentry programs, 6.1 and later) will stand beside it.
//!
//! Both keep the same contract, [`crate::policy::RULES`].

pub(crate) mod classify;
pub(crate) mod eyes;
pub(crate) mod fanotify;
pub(crate) mod threads;
