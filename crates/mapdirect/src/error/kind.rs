//! What kinds of errors there are.

use mapdirect_proto::Reason;
use std::fmt;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident, $key:literal;)*) => {
        /// What kind of obstacle an [`Error`](crate::Error) is about.
        ///
        /// The errno tells what `mmap(2)` would answer; the kind tells apart
        /// what shares an errno.
        ///
        /// # Examples
        ///
        /// ```
        /// use mapdirect::{Kind, PinOptions};
        ///
        /// let file = std::fs::File::open("/proc/self/exe")?;
        /// let error = PinOptions::new().range(5..5).pin(&file).unwrap_err();
        /// assert_eq!(error.kind(), Kind::Arguments);
        /// assert_eq!(error.kind().key(), "arguments");
        /// # Ok::<(), std::io::Error>(())
        /// ```
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Kind {
            $($(#[$doc])* $name,)*
            /// A kind that this version of the library does not know.
            Other,
        }

        impl Kind {
            /// A stable word for machines: lower case, with hyphens.
            #[must_use]
            pub const fn key(self) -> &'static str {
                match self {
                    $(Self::$name => $key,)*
                    Self::Other => "other",
                }
            }

            /// The kind of a reason that the guard gives.
            pub(crate) const fn of(reason: Reason) -> Self {
                match reason {
                    $(Reason::$name => Self::$name,)*
                    _ => Self::Other,
                }
            }

            #[cfg(test)]
            const REASONS: &'static [Reason] = &[$(Reason::$name,)*];
        }
    };
}

kinds! {
    /// The arguments contradict `mmap(2)` or each other.
    Arguments, "arguments";
    /// The descriptor, or the mapping, is not open for what was asked.
    NotReadWrite, "not-read-write";
    /// The caller lacks `CAP_LINUX_IMMUTABLE` in the initial user namespace.
    NotCapable, "not-capable";
    /// The file is not a regular file.
    FileType, "file-type";
    /// The filesystem cannot keep the promise.
    Filesystem, "filesystem";
    /// The file's data lies inside its inode.
    InlineData, "inline-data";
    /// The file is encrypted or compressed.
    Encoded, "encoded";
    /// The file's data goes through the journal.
    JournalledData, "journalled-data";
    /// The file is mapped by indirect blocks, not by extents.
    NotExtentMapped, "not-extent-mapped";
    /// The file lies on the realtime device.
    Realtime, "realtime";
    /// The filesystem always writes to new places.
    OutOfPlace, "out-of-place";
    /// An extent size hint would allocate blocks beside the ones written.
    ExtentSizeHint, "extent-size-hint";
    /// The file lies below the upper directory of an overlay.
    OverlayUpper, "overlay-upper";
    /// The file is being executed.
    Executing, "executing";
    /// The file has no DAX, and the page cache was not accepted.
    NoDax, "no-dax";
    /// The range holds blocks that cannot be stored to as they are.
    FrozenBlocks, "frozen-blocks";
    /// No guard answers.
    NoGuard, "no-guard";
    /// The guard has no gate on this kernel or for this file.
    NoGate, "no-gate";
    /// Another process has the file open in a way the gate cannot watch.
    OpenElsewhere, "open-elsewhere";
    /// The caller itself has the file open or mapped through a descriptor
    /// that the gate cannot watch.
    OpenHere, "open-here";
    /// The block map keeps changing.
    StillChanging, "still-changing";
    /// A record lock is in the way.
    Locked, "locked";
    /// There are too many clients, pins, mappings or descriptors.
    Limit, "limit";
    /// The guard and the library do not understand each other.
    Protocol, "protocol";
    /// A system call failed that should not have.
    System, "system";
    /// The filesystem, or the caller's quota, has too little space left.
    NoSpace, "no-space";
    /// Blocks of the pin have changed, and the mapping was revoked.
    Breached, "breached";
    /// The guard's policy does not allow it to the caller, who lacks
    /// `CAP_LINUX_IMMUTABLE` in the initial user namespace.
    Policy, "policy";
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.key())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_of_the_guard_is_a_kind_of_the_same_key() {
        for reason in Kind::REASONS {
            assert_eq!(Kind::of(*reason).key(), reason.key());
        }
        assert_eq!(Kind::of(Reason::Other(9999)), Kind::Other);
    }
}
