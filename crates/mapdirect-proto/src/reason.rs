//! Why a request was not granted.

use mapdirect_model::ObstacleKind;
use std::fmt;

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $key:literal;)*) => {
        /// Why a request was not granted. The errno tells a program that knows
        /// `mmap(2)` what kind of failure this is; the reason tells what the
        /// obstacle was.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Reason {
            $($(#[$doc])* $name,)*
            /// A reason newer than this version.
            Other(u32),
        }

        impl Reason {
            /// The number of the reason on the wire.
            #[must_use]
            pub(crate) const fn number(self) -> u32 {
                match self {
                    $(Self::$name => $number,)*
                    Self::Other(number) => number,
                }
            }

            /// The reason with this number on the wire.
            #[must_use]
            pub const fn from_number(number: u32) -> Self {
                match number {
                    $($number => Self::$name,)*
                    other => Self::Other(other),
                }
            }

            /// A stable word for machines.
            #[must_use]
            pub const fn key(self) -> &'static str {
                match self {
                    $(Self::$name => $key,)*
                    Self::Other(_) => "other",
                }
            }

            #[cfg(test)]
            const KNOWN: &'static [Self] = &[$(Self::$name,)*];
        }
    };
}

reasons! {
    /// The arguments contradict `mmap(2)` or each other.
    Arguments = 1, "arguments";
    /// The descriptor is not open for reading and writing, or the request did
    /// not ask for writing.
    NotReadWrite = 2, "not-read-write";
    /// The caller lacks `CAP_LINUX_IMMUTABLE` in the initial user namespace.
    NotCapable = 3, "not-capable";
    /// The file is not a regular file.
    FileType = 4, "file-type";
    /// The filesystem cannot keep the promise.
    Filesystem = 5, "filesystem";
    /// The file's data lies inside its inode.
    InlineData = 6, "inline-data";
    /// The file is encrypted or compressed.
    Encoded = 7, "encoded";
    /// The file's data goes through the journal.
    JournalledData = 8, "journalled-data";
    /// The file is mapped by indirect blocks, not by extents.
    NotExtentMapped = 9, "not-extent-mapped";
    /// The file lies on the realtime device.
    Realtime = 10, "realtime";
    /// The filesystem always writes out of place.
    OutOfPlace = 11, "out-of-place";
    /// An extent size hint would allocate blocks beside the ones written.
    ExtentSizeHint = 12, "extent-size-hint";
    /// The file lies below the upper directory of an overlay.
    OverlayUpper = 13, "overlay-upper";
    /// The file is being executed.
    Executing = 16, "executing";
    /// The file has no DAX, and the page cache was not accepted.
    NoDax = 17, "no-dax";
    /// The range contains blocks that cannot be stored to as they are.
    FrozenBlocks = 18, "frozen-blocks";
    /// No guard answers.
    NoGuard = 19, "no-guard";
    /// The guard has no gate on this kernel or for this file.
    NoGate = 20, "no-gate";
    /// Somebody else has the file open in a way that the gate cannot watch.
    OpenElsewhere = 21, "open-elsewhere";
    /// The caller itself has the file open or mapped through a descriptor
    /// that the gate cannot watch.
    OpenHere = 22, "open-here";
    /// The block map keeps changing.
    StillChanging = 23, "still-changing";
    /// Somebody's record lock covers the bytes by which the guard marks its
    /// pins.
    Locked = 24, "locked";
    /// There are too many clients, pins, mappings or descriptors.
    Limit = 25, "limit";
    /// The guard does not understand the request.
    Protocol = 26, "protocol";
    /// A system call failed that should not fail.
    System = 27, "system";
    /// The filesystem or the caller's quota has too little space left.
    NoSpace = 29, "no-space";
    /// Blocks of the pin have changed, and the mapping was revoked.
    Breached = 40, "breached";
    /// The guard's policy does not allow it to this caller.
    Policy = 50, "policy";
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.key())
    }
}

impl From<ObstacleKind> for Reason {
    fn from(kind: ObstacleKind) -> Self {
        match kind {
            ObstacleKind::FileType => Self::FileType,
            ObstacleKind::Filesystem => Self::Filesystem,
            ObstacleKind::InlineData => Self::InlineData,
            ObstacleKind::NotExtentMapped => Self::NotExtentMapped,
            ObstacleKind::Encoded => Self::Encoded,
            ObstacleKind::JournalledData => Self::JournalledData,
            ObstacleKind::Realtime => Self::Realtime,
            ObstacleKind::OutOfPlace => Self::OutOfPlace,
            ObstacleKind::ExtentSizeHint => Self::ExtentSizeHint,
            ObstacleKind::FrozenBlocks => Self::FrozenBlocks,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_keys_are_unique_and_come_back() {
        let mut numbers: Vec<_> = Reason::KNOWN.iter().map(|r| r.number()).collect();
        let mut keys: Vec<_> = Reason::KNOWN.iter().map(|r| r.key()).collect();
        let count = numbers.len();
        numbers.sort_unstable();
        numbers.dedup();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!((numbers.len(), keys.len()), (count, count));
        for reason in Reason::KNOWN {
            assert_eq!(Reason::from_number(reason.number()), *reason);
        }
        assert_eq!(Reason::from_number(9999), Reason::Other(9999));
    }
}
