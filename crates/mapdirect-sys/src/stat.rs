//! What stat(2) tells, in the same types on every architecture.

use rustix::fs::Stat;

/// How many names a file has.
#[must_use]
pub fn links(stat: &Stat) -> u64 {
    #[allow(clippy::useless_conversion, reason = "smaller on arm64")]
    u64::from(stat.st_nlink)
}
