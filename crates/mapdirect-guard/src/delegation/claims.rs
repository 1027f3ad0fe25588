//! What everybody has by the policy, and whose turn it is.

use super::armed;
use super::door::Admission;
use super::file::Rule;
use crate::Errno;
use crate::grant::refusal;
use mapdirect_proto::{Flags, Reason, Refusal};
use rustix::time::{ClockId, clock_gettime};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The most pins of one user on files that are armed.
const ARMED_PINS: u32 = 16;

/// Something that allows a request.
#[derive(Clone, Debug)]
pub(crate) struct Right {
    rule: Arc<str>,
    pins: u32,
    bytes: Option<u64>,
    seconds: Option<u32>,
    /// What the pin may deny to others.
    denies: Flags,
    /// The bytes of the file that may be pinned.
    range: Range<u64>,
}

impl Right {
    pub(super) fn rule(rule: &Rule) -> Self {
        Self {
            rule: Arc::clone(&rule.name),
            pins: rule.pins,
            bytes: rule.bytes,
            seconds: rule.seconds,
            denies: rule.denies,
            range: 0..u64::MAX,
        }
    }

    pub(super) fn armed(range: Range<u64>) -> Self {
        Self {
            rule: armed::rule(),
            pins: ARMED_PINS,
            bytes: None,
            seconds: None,
            denies: Flags::NONE,
            range,
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Used {
    pins: u64,
    /// A pin may be without end, so there may be more than fit into a file.
    bytes: u128,
}

#[derive(Debug, Default)]
struct Usage {
    /// By user and rule. The rule of a pin that an earlier guard granted is not
    /// known: it counts for every rule.
    of: HashMap<(u32, Option<Arc<str>>), Used>,
    all: u64,
}

/// Counts the pins of those who lack the capability.
#[derive(Debug)]
pub(super) struct Claims {
    usage: Mutex<Usage>,
    /// The most pins by the policy together. A pin can cost the guard two
    /// descriptors.
    most: u64,
}

impl Claims {
    /// Of this many descriptors, a quarter may be for pins by the policy.
    pub(super) fn new(descriptors: usize) -> Self {
        Self {
            usage: Mutex::default(),
            most: (descriptors / 8) as u64,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Usage> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One pin that is counted. Dropping this value uncounts it.
#[derive(Debug)]
struct Claim {
    claims: Arc<Claims>,
    uid: u32,
    rule: Option<Arc<str>>,
    bytes: u128,
}

impl Claim {
    fn count(
        claims: &Arc<Claims>,
        usage: &mut Usage,
        uid: u32,
        rule: Option<Arc<str>>,
        bytes: u128,
    ) -> Self {
        let used = usage.of.entry((uid, rule.clone())).or_default();
        used.pins += 1;
        used.bytes += bytes;
        usage.all += 1;
        Self {
            claims: Arc::clone(claims),
            uid,
            rule,
            bytes,
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut usage = self.claims.lock();
        let key = (self.uid, self.rule.clone());
        usage.all = usage.all.saturating_sub(1);
        if let Some(used) = usage.of.get_mut(&key) {
            used.pins = used.pins.saturating_sub(1);
            used.bytes -= self.bytes;
            if used.pins == 0 {
                usage.of.remove(&key);
            }
        }
    }
}

/// What makes a pin one by the policy.
#[derive(Debug)]
pub(crate) struct Delegated {
    claim: Claim,
    /// When the pin ends at the latest, in seconds of `CLOCK_BOOTTIME`.
    until: Option<u64>,
    /// Whether its holder can write to the file.
    pub(crate) writes: bool,
}

/// The value of [`Delegated::wire`] for a pin without a limit.
const NO_LIMIT: u64 = u64::MAX;

fn boot_time() -> u64 {
    u64::try_from(clock_gettime(ClockId::Boottime).tv_sec).unwrap_or(0)
}

impl Delegated {
    /// The name of the rule, if it is known.
    pub(crate) fn rule(&self) -> Option<&str> {
        self.claim.rule.as_deref()
    }

    /// How many seconds are left.
    pub(crate) fn left(&self) -> Option<u64> {
        self.until.map(|until| until.saturating_sub(boot_time()))
    }

    /// When the pin must end.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.left()
            .map(|left| Instant::now() + Duration::from_secs(left))
    }

    /// What a later guard must know: never 0.
    pub(crate) fn wire(&self) -> u64 {
        self.until.map_or(NO_LIMIT, |until| until.max(1))
    }
}

pub(super) fn claim(
    claims: &Arc<Claims>,
    admission: &Admission,
    flags: Flags,
    range: &Range<u64>,
) -> Result<Delegated, Refusal> {
    let bytes = u128::from(range.end.saturating_sub(range.start));
    let uid = admission.uid;
    let mut usage = claims.lock();
    if usage.all >= claims.most {
        return Err(refusal(
            Reason::Limit,
            Errno::AGAIN,
            format!(
                "the guard keeps {} pins by its policy, as many as it can",
                usage.all
            ),
            "try again later, or give the guard more descriptors (LimitNOFILE of its unit)",
        ));
    }
    let used_by = |usage: &Usage, rule: Option<Arc<str>>| {
        usage.of.get(&(uid, rule)).copied().unwrap_or_default()
    };
    let unknown = used_by(&usage, None);
    let mut obstacle = None;
    for right in &admission.rights {
        let used = used_by(&usage, Some(Arc::clone(&right.rule)));
        let (pins, pinned) = (used.pins + unknown.pins, used.bytes + unknown.bytes);
        let rule = &right.rule;
        let (errno, why) = if range.start < right.range.start || range.end > right.range.end {
            (
                Errno::ACCESS,
                format!(
                    "bytes {} to {} of the file are armed, and bytes {} to {} are to be pinned",
                    right.range.start, right.range.end, range.start, range.end
                ),
            )
        } else if let Some(denial) = [Flags::DENY_WRITE, Flags::DENY_RENAME]
            .into_iter()
            .find(|denial| flags.contains(*denial) && !right.denies.contains(*denial))
        {
            let what = if denial == Flags::DENY_WRITE {
                "write"
            } else {
                "rename"
            };
            (
                Errno::ACCESS,
                format!("rule {rule:?} lets no pin deny others to {what} (deny in the policy)"),
            )
        } else if pins >= right.pins.into() {
            (
                Errno::AGAIN,
                format!(
                    "rule {rule:?} allows {} pins, and user {uid} has {pins}",
                    right.pins
                ),
            )
        } else if let Some(most) = right.bytes
            && pinned + bytes > u128::from(most)
        {
            (
                Errno::AGAIN,
                if range.end == u64::MAX {
                    format!(
                        "rule {rule:?} allows {most} pinned bytes, and this range has no end: it \
                         would follow the file's growth"
                    )
                } else {
                    format!(
                        "rule {rule:?} allows {most} pinned bytes, user {uid} has {pinned}, and \
                         this would be {bytes} more"
                    )
                },
            )
        } else {
            let rule = Some(Arc::clone(rule));
            let until = right
                .seconds
                .map(|seconds| boot_time() + u64::from(seconds));
            return Ok(Delegated {
                claim: Claim::count(claims, &mut usage, uid, rule, bytes),
                until,
                writes: admission.writes,
            });
        };
        obstacle.get_or_insert((errno, why));
    }
    let (errno, why) = obstacle.unwrap_or((Errno::ACCESS, String::from("no rule allows it")));
    let (reason, mend) = if errno == Errno::AGAIN {
        (
            Reason::Limit,
            "let go of pins, or ask root to raise the limit",
        )
    } else {
        (Reason::Policy, "ask for less")
    };
    Err(refusal(reason, errno, why, mend))
}

pub(super) fn claim_again(claims: &Arc<Claims>, uid: u32, bytes: u64, until: u64) -> Delegated {
    let mut usage = claims.lock();
    Delegated {
        claim: Claim::count(claims, &mut usage, uid, None, bytes.into()),
        until: (until != NO_LIMIT).then_some(until),
        writes: true,
    }
}

/// How many grants by the policy may be under way, and how many of one user.
const AT_ONCE: usize = 8;
const OF_ONE_USER: usize = 2;
/// How long to wait for a turn.
const PATIENCE: Duration = Duration::from_secs(2);

/// Whose grants are under way. A grant may look at every thread of the system, so
/// those who lack the capability cannot have any number of them at once.
#[derive(Debug, Default)]
pub(super) struct Turns {
    under_way: Mutex<Vec<u32>>,
    changed: Condvar,
}

/// A grant under way.
#[derive(Debug)]
pub(crate) struct Turn<'turns> {
    turns: &'turns Turns,
    uid: u32,
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, Vec<u32>> {
        self.under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wait(&self, uid: u32) -> Result<Turn<'_>, Refusal> {
        let is_full = |under_way: &mut Vec<u32>| {
            let own = under_way.iter().filter(|other| **other == uid).count();
            under_way.len() >= AT_ONCE || own >= OF_ONE_USER
        };
        let (mut under_way, waited) = self
            .changed
            .wait_timeout_while(self.lock(), PATIENCE, is_full)
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() && is_full(&mut under_way) {
            return Err(refusal(
                Reason::Limit,
                Errno::AGAIN,
                "other requests that need the policy are under way",
                "try again later",
            ));
        }
        under_way.push(uid);
        Ok(Turn { turns: self, uid })
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut under_way = self.turns.lock();
        if let Some(at) = under_way.iter().position(|other| *other == self.uid) {
            under_way.swap_remove(at);
        }
        drop(under_way);
        self.turns.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn right(name: &str, pins: u32, bytes: Option<u64>, range: Range<u64>) -> Right {
        Right {
            rule: Arc::from(name),
            pins,
            bytes,
            seconds: Some(60),
            denies: Flags::DENY_RENAME,
            range,
        }
    }

    fn admission(uid: u32, rights: Vec<Right>) -> Admission {
        Admission {
            uid,
            rights,
            writes: true,
        }
    }

    #[test]
    fn what_is_let_go_of_can_be_had_again() {
        let claims = Arc::new(Claims::new(8000));
        let by = admission(7, vec![right("a", 2, Some(100), 0..u64::MAX)]);
        let one = claim(&claims, &by, Flags::NONE, &(0..60)).unwrap();
        let refused = claim(&claims, &by, Flags::NONE, &(0..50)).unwrap_err();
        assert_eq!(refused.errno, Errno::AGAIN.raw_os_error());
        assert!(
            refused
                .obstacle
                .contains("allows 100 pinned bytes, user 7 has 60")
        );
        let two = claim(&claims, &by, Flags::NONE, &(0..40)).unwrap();
        let refused = claim(&claims, &by, Flags::NONE, &(0..0)).unwrap_err();
        assert!(refused.obstacle.contains("allows 2 pins, and user 7 has 2"));
        // Another user has a share of its own.
        let other = admission(8, by.rights.clone());
        assert!(claim(&claims, &other, Flags::NONE, &(0..100)).is_ok());
        drop(one);
        assert!(claim(&claims, &by, Flags::NONE, &(0..60)).is_ok());
        assert!(two.left().is_some_and(|left| (59..=60).contains(&left)));
        drop(two);
        assert!(claims.lock().of.is_empty());
        assert_eq!(claims.lock().all, 0);
    }

    #[test]
    fn a_rule_says_what_may_be_denied() {
        let claims = Arc::new(Claims::new(8000));
        let by = admission(7, vec![right("a", 9, Some(1 << 20), 0..u64::MAX)]);
        assert!(claim(&claims, &by, Flags::DENY_RENAME, &(0..1)).is_ok());
        let both = Flags::DENY_RENAME | Flags::DENY_WRITE;
        let refused = claim(&claims, &by, both, &(0..1)).unwrap_err();
        assert_eq!(refused.reason, Reason::Policy);
        assert!(refused.obstacle.contains("deny others to write"));
        let refused = claim(&claims, &by, Flags::STABLE, &(0..u64::MAX)).unwrap_err();
        assert!(refused.obstacle.contains("has no end"));
        assert_eq!(claims.lock().all, 0);
    }

    #[test]
    fn the_next_rule_is_tried() {
        let claims = Arc::new(Claims::new(8000));
        let by = admission(
            7,
            vec![
                right("a", 1, None, 0..100),
                right("b", 1, None, 0..u64::MAX),
            ],
        );
        let one = claim(&claims, &by, Flags::NONE, &(0..50)).unwrap();
        let two = claim(&claims, &by, Flags::NONE, &(0..50)).unwrap();
        assert_eq!((one.rule(), two.rule()), (Some("a"), Some("b")));
        drop((one, two));
        let far = claim(&claims, &by, Flags::NONE, &(50..150)).unwrap();
        assert_eq!(far.rule(), Some("b"));
        let only = admission(7, vec![right("a", 1, None, 0..100)]);
        let refused = claim(&claims, &only, Flags::NONE, &(50..150)).unwrap_err();
        assert_eq!(refused.errno, Errno::ACCESS.raw_os_error());
    }

    #[test]
    fn pins_of_an_earlier_guard_count_for_every_rule() {
        let claims = Arc::new(Claims::new(8000));
        let adopted = claim_again(&claims, 7, 10, NO_LIMIT);
        assert_eq!((adopted.left(), adopted.wire()), (None, NO_LIMIT));
        let by = admission(7, vec![right("a", 1, None, 0..u64::MAX)]);
        assert!(claim(&claims, &by, Flags::NONE, &(0..1)).is_err());
        let over = claim_again(&claims, 7, 10, 1);
        assert_eq!((over.left(), over.wire()), (Some(0), 1));
        drop((adopted, over));
        assert!(claim(&claims, &by, Flags::NONE, &(0..1)).is_ok());
    }

    #[test]
    fn descriptors_are_left_for_others() {
        let claims = Arc::new(Claims::new(16));
        let by = admission(7, vec![right("a", 9, None, 0..u64::MAX)]);
        let _held = [0, 1].map(|_| claim(&claims, &by, Flags::NONE, &(0..1)).unwrap());
        assert_eq!(
            claim(&claims, &by, Flags::NONE, &(0..1))
                .unwrap_err()
                .reason,
            Reason::Limit
        );
    }

    #[test]
    fn one_user_has_two_turns() {
        let turns = Turns::default();
        let held = [turns.wait(7).unwrap(), turns.wait(7).unwrap()];
        let other = turns.wait(8).unwrap();
        assert_eq!(turns.wait(7).unwrap_err().reason, Reason::Limit);
        drop((held, other));
        assert!(turns.wait(7).is_ok());
        assert!(turns.lock().is_empty());
    }
}
