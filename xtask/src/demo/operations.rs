//! What is tried while a range is pinned.

use super::*;

/// Filesystems an operation makes sense on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum On {
    Both,
    Xfs,
    Ext4,
}

/// An operation by another process.
pub(super) struct Operation {
    pub(super) name: &'static str,
    pub(super) tool: &'static [&'static str],
    pub(super) on: On,
    /// What comes of it while the range is pinned.
    pub(super) pinned: Outcome,
    /// It moves, frees, shares or allocates blocks of the pinned range when
    /// nothing stops it.
    pub(super) moves: bool,
}

pub(super) const fn refused(
    name: &'static str,
    tool: &'static [&'static str],
    moves: bool,
) -> Operation {
    Operation {
        name,
        tool,
        on: On::Both,
        pinned: Outcome::Refused,
        moves,
    }
}

/// Those that stand for others of their kind, where there is one screen.
const BRIEF: [&str; 11] = [
    "shrink into it",
    "empty it",
    "write into it",
    "punch a hole",
    "collapse",
    "clone from it",
    "clone onto it",
    "dedupe it",
    "defragment it",
    "store by mmap",
    "read it",
];

/// Those that change no pinned block. A gate that judges what is done lets them
/// pass; one that judges who opens the file refuses them.
const HARMLESS: [&str; 4] = [
    "write into it",
    "write beyond it",
    "allocate",
    "store by mmap",
];

impl Operation {
    pub(super) fn is_brief(&self) -> bool {
        BRIEF.contains(&self.name)
    }

    /// What comes of it while the range is pinned.
    pub(super) fn expected(&self, gate: Gate) -> Outcome {
        if gate == Gate::Bpf && HARMLESS.contains(&self.name) {
            Outcome::Works
        } else {
            self.pinned
        }
    }
}

pub(super) const fn only(on: On, operation: Operation) -> Operation {
    Operation { on, ..operation }
}

pub(super) const fn allowed(name: &'static str, tool: &'static [&'static str]) -> Operation {
    Operation {
        pinned: Outcome::Works,
        ..refused(name, tool, false)
    }
}

pub(super) const WRITER: &str = "import mmap, os; fd = os.open('data', os.O_RDWR); \
                      m = mmap.mmap(fd, 4096, offset=5 << 20); m[0] = 1; m.flush()";

/// What is tried, in the directory of the file `data`.
pub(super) const OPERATIONS: [Operation; 24] = [
    refused("shrink into it", &["truncate", "-s", "6M", "data"], true),
    refused("empty it", &["sh", "-c", ": > data"], true),
    refused(
        "write into it",
        &[
            "dd",
            "if=/dev/zero",
            "of=data",
            "bs=1M",
            "count=1",
            "seek=5",
            "conv=notrunc",
        ],
        false,
    ),
    refused(
        "write beyond it",
        &[
            "dd",
            "if=/dev/zero",
            "of=data",
            "bs=1M",
            "count=1",
            "seek=20",
            "conv=notrunc",
        ],
        false,
    ),
    refused(
        "punch a hole",
        &["fallocate", "--punch-hole", "-o", "5M", "-l", "64K", "data"],
        true,
    ),
    refused(
        "zero a range",
        &["fallocate", "--zero-range", "-o", "5M", "-l", "64K", "data"],
        true,
    ),
    refused(
        "collapse",
        &[
            "fallocate",
            "--collapse-range",
            "-o",
            "1M",
            "-l",
            "64K",
            "data",
        ],
        true,
    ),
    refused(
        "insert",
        &[
            "fallocate",
            "--insert-range",
            "-o",
            "1M",
            "-l",
            "64K",
            "data",
        ],
        true,
    ),
    refused(
        "allocate",
        &["fallocate", "-o", "18M", "-l", "64K", "data"],
        false,
    ),
    only(
        On::Xfs,
        refused(
            "clone from it",
            &["cp", "--reflink=always", "data", "copy"],
            true,
        ),
    ),
    Operation {
        on: On::Ext4,
        pinned: Outcome::NotSupported,
        ..refused(
            "clone from it",
            &["cp", "--reflink=always", "data", "copy"],
            false,
        )
    },
    only(
        On::Xfs,
        refused(
            "clone onto it",
            &["cp", "--reflink=always", "twin", "data"],
            true,
        ),
    ),
    only(
        On::Ext4,
        // cp opens it with O_TRUNC before it finds out.
        Operation {
            moves: false,
            ..refused(
                "clone onto it",
                &["cp", "--reflink=always", "twin", "data"],
                false,
            )
        },
    ),
    only(
        On::Xfs,
        refused(
            "reflink from it",
            &["xfs_io", "-f", "-c", "reflink data 5m 0 64k", "copy"],
            true,
        ),
    ),
    only(
        On::Xfs,
        refused(
            "reflink onto it",
            &["xfs_io", "-c", "reflink twin 5m 5m 64k", "data"],
            true,
        ),
    ),
    only(
        On::Xfs,
        refused(
            "dedupe with it",
            &["xfs_io", "-c", "dedupe data 5m 5m 64k", "twin"],
            true,
        ),
    ),
    only(
        On::Xfs,
        refused(
            "dedupe it",
            &["xfs_io", "-c", "dedupe twin 5m 5m 64k", "data"],
            true,
        ),
    ),
    only(
        On::Xfs,
        refused("defragment it", &["xfs_fsr", "-v", "data"], true),
    ),
    only(
        On::Ext4,
        refused("defragment it", &["e4defrag", "-v", "data"], true),
    ),
    refused("store by mmap", &["python3", "-c", WRITER], false),
    allowed("read it", &["cmp", "data", "twin"]),
    allowed("copy it", &["cp", "--reflink=never", "data", "copy"]),
    allowed("chmod", &["chmod", "600", "data"]),
    allowed("rename", &["sh", "-c", "mv data moved && mv moved data"]),
];
