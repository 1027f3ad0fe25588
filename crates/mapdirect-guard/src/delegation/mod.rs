//! Who may pin without the capability: whom the policy names, or for whom root
//! has armed a file.
//!
//! [`file`] reads a policy, [`load`] says which files are one, and [`paths`] what
//! a path in it means. [`door`] finds out who asks, and whether that process could
//! open the file by itself; [`place`] finds out where the file is. [`claims`]
//! counts what everybody has, and [`ends`] ends pins whose time is over.

mod armed;
mod claims;
mod door;
pub(crate) mod ends;
mod file;
mod load;
mod names;
mod paths;
mod place;

pub use self::door::would_allow;
pub use self::file::{PolicyError, Rule};
pub use self::load::{DEFAULT, Policy};
pub use self::names::{Account, group_number, user_number};
pub use self::place::host_path;

pub(crate) use self::place::from_another_namespace;

pub(crate) use self::claims::{Delegated, Turn};
pub(crate) use self::door::{Admission, Peer, admit, not_capable};
pub(crate) use self::file::{Reader, Size};
pub(crate) use self::load::read as read_text;
#[cfg(feature = "fuzzing")]
pub(crate) use self::{file::parse, names::Names, paths::Pattern};

use self::armed::Arms;
use self::claims::{Claims, Turns};
use self::ends::Deadlines;
use crate::Errno;
use crate::wake::Backoff;
use arc_swap::ArcSwap;
use mapdirect_proto::status::PolicyStatus;
use mapdirect_proto::{Flags, Refusal};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Everything about pins of those who lack the capability.
#[derive(Debug)]
pub(crate) struct Delegation {
    path: PathBuf,
    policy: ArcSwap<Policy>,
    /// What was wrong when the policy was last read.
    error: Mutex<String>,
    pub(crate) arms: Arms,
    claims: Arc<Claims>,
    turns: Turns,
    pub(crate) deadlines: Deadlines,
}

impl Delegation {
    /// Reads the policy.
    pub(crate) fn new(path: PathBuf, descriptors: usize) -> Result<Self, Vec<PolicyError>> {
        let policy = Policy::load(&path)?;
        Ok(Self {
            path,
            policy: ArcSwap::from_pointee(policy),
            error: Mutex::default(),
            arms: Arms::default(),
            claims: Arc::new(Claims::new(descriptors)),
            turns: Turns::default(),
            deadlines: Deadlines::default(),
        })
    }

    pub(crate) fn policy(&self) -> Arc<Policy> {
        self.policy.load_full()
    }

    /// Reads the policy again. If anything is wrong with it, the policy stays as
    /// it was. Pins stay in any case.
    pub(crate) fn reload(&self) -> Result<usize, Vec<PolicyError>> {
        let read = Policy::load(&self.path);
        let mut error = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        match read {
            Ok(policy) => {
                error.clear();
                let rules = policy.rules().len();
                self.policy.store(Arc::new(policy));
                Ok(rules)
            }
            Err(errors) => {
                *error = errors.first().map(ToString::to_string).unwrap_or_default();
                Err(errors)
            }
        }
    }

    /// Whether a user or member of these groups may pin anything at all.
    pub(crate) fn names(&self, uid: u32, groups: &[u32]) -> bool {
        self.policy.load().names(uid, groups) || self.arms.name(uid, groups)
    }

    /// Counts a pin that is about to be granted. What is used up may be free in a
    /// moment, when the guard has heard of the end of another pin: as long as the
    /// caller has patience.
    ///
    /// # Errors
    ///
    /// Every right of the caller is used up.
    pub(crate) fn claim(
        &self,
        admission: &Admission,
        flags: Flags,
        range: &Range<u64>,
        patience: Duration,
    ) -> Result<Delegated, Refusal> {
        let mut backoff = Backoff::patiently(patience);
        loop {
            match claims::claim(&self.claims, admission, flags, range) {
                Err(refusal)
                    if refusal.errno == Errno::AGAIN.raw_os_error() && !backoff.is_over() =>
                {
                    backoff.pause();
                }
                result => return result,
            }
        }
    }

    /// Counts a pin that an earlier guard has granted.
    pub(crate) fn claim_again(&self, uid: u32, bytes: u64, until: u64) -> Delegated {
        claims::claim_again(&self.claims, uid, bytes, until)
    }

    /// Waits for the turn of a user: grants cost everybody something.
    pub(crate) fn turn(&self, uid: u32) -> Result<Turn<'_>, Refusal> {
        self.turns.wait(uid)
    }

    pub(crate) fn status(&self, in_full: bool) -> PolicyStatus {
        let error = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        PolicyStatus {
            rules: u32::try_from(self.policy.load().rules().len()).unwrap_or(u32::MAX),
            error: if in_full {
                error.clone()
            } else {
                String::new()
            },
        }
    }
}
