//! Settles the version of the protocol that two sides speak.

use std::fmt;

/// The newest version that this crate speaks.
///
/// 1 is the first version of mapdirect. 2 has [`Request::Barrier`]; a holder of
/// version 1 says hello once more instead. 3 has more [`Flags`](crate::Flags):
/// [`Flags::NEW_IN_3`](crate::Flags::NEW_IN_3). In 3, whoever the guard's policy names
/// may ask without a proof, a proof names its maker by PID namespace instead of
/// start time, and there are [`Request::Unpin`], [`Request::Arm`] and
/// [`Request::Disarm`]. 4 has [`Request::Follow`].
///
/// [`Request::Follow`]: crate::Request::Follow
/// [`Request::Unpin`]: crate::Request::Unpin
/// [`Request::Arm`]: crate::Request::Arm
/// [`Request::Disarm`]: crate::Request::Disarm
/// [`Request::Barrier`]: crate::Request::Barrier
pub const VERSION: u32 = 4;

/// The oldest version that this crate speaks.
pub const OLDEST_VERSION: u32 = 1;

/// The first version with [`Request::Barrier`](crate::Request::Barrier).
pub const VERSION_WITH_BARRIER: u32 = 2;

/// The first version with a policy.
pub const VERSION_WITH_POLICY: u32 = 3;

/// The first version with [`Flags::NEW_IN_3`](crate::Flags::NEW_IN_3).
pub const VERSION_WITH_FAMILIES: u32 = 3;

/// The first version with [`Request::Follow`](crate::Request::Follow).
pub const VERSION_WITH_RECORDS: u32 = 4;

/// The version to speak with a side whose newest version is `theirs`: the lower
/// of the two newest versions. Both sides compute it for themselves.
///
/// # Errors
///
/// [`UnknownVersion`] if `theirs` is older than [`OLDEST_VERSION`].
pub const fn settle(theirs: u32) -> Result<u32, UnknownVersion> {
    let lower = if theirs < VERSION { theirs } else { VERSION };
    if lower < OLDEST_VERSION {
        Err(UnknownVersion { theirs })
    } else {
        Ok(lower)
    }
}

/// The other side speaks no version that this crate speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownVersion {
    /// The newest version of the other side.
    pub theirs: u32,
}

impl fmt::Display for UnknownVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the other side speaks version {} of the protocol at most, and this one speaks \
             {OLDEST_VERSION} to {VERSION}",
            self.theirs
        )
    }
}

impl std::error::Error for UnknownVersion {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lower_version_counts_if_it_is_spoken() {
        for theirs in OLDEST_VERSION..=VERSION {
            assert_eq!(settle(theirs), Ok(theirs));
        }
        assert_eq!(settle(VERSION + 1), Ok(VERSION));
        assert_eq!(settle(u32::MAX), Ok(VERSION));
        let unknown = settle(OLDEST_VERSION - 1).unwrap_err();
        assert_eq!(
            unknown.to_string(),
            "the other side speaks version 0 of the protocol at most, and this one speaks 1 to 4"
        );
    }
}
