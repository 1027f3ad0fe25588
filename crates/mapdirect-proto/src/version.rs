//! Which version of the protocol two sides speak.

use std::fmt;

/// The newest version spoken here.
///
/// 1 is what mapdirect spoke first. 2 has [`Request::Barrier`], for which a
/// holder of version 1 says hello once more.
///
/// [`Request::Barrier`]: crate::Request::Barrier
pub const VERSION: u32 = 2;

/// The oldest version spoken here.
pub const OLDEST_VERSION: u32 = 1;

/// The version that has [`Request::Barrier`](crate::Request::Barrier).
pub const VERSION_WITH_BARRIER: u32 = 2;

/// The version to speak with somebody whose newest is `theirs`: the lower one
/// of the two newest, which both sides work out for themselves.
///
/// # Errors
///
/// [`UnknownVersion`] if it is older than the oldest one spoken here.
pub const fn settle(theirs: u32) -> Result<u32, UnknownVersion> {
    let lower = if theirs < VERSION { theirs } else { VERSION };
    if lower < OLDEST_VERSION {
        Err(UnknownVersion { theirs })
    } else {
        Ok(lower)
    }
}

/// The other side speaks no version that is spoken here.
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
            "the other side speaks version 0 of the protocol at most, and this one speaks 1 to 2"
        );
    }
}
