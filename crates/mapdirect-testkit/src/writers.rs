//! Who writes to a file without any of the checks that the gates stand at, and
//! what keeps a pin true all the same: as data, which tests try and the manual
//! shows.

use crate::contract::Gate;
use std::fmt::Write;

/// What becomes of a writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It gets an error before it can write.
    Refused,
    /// The pin is not granted.
    GrantRefused,
    /// It may write: it changes no pinned block.
    Harmless,
    /// Nobody can refuse it. The change is noticed afterwards.
    Noticed,
}

impl Answer {
    /// As the manual says it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::GrantRefused => "pin refused",
            Self::Harmless => "harmless",
            Self::Noticed => "noticed",
        }
    }
}

/// Whether the writer was there first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// It had the file open, or mounted, when the pin was asked for.
    Before,
    /// The file was pinned when it came.
    After,
}

/// A writer, and what becomes of it.
#[derive(Clone, Copy, Debug)]
pub struct Writer {
    /// Its name, unique together with when it comes.
    pub name: &'static str,
    /// As the manual calls it, in roff.
    pub title: &'static str,
    /// Whether it was there first.
    pub when: When,
    /// Under the bpf gate, on every kernel that has it,
    pub bpf: Answer,
    /// and under the fanotify gate.
    pub fanotify: Answer,
}

impl Writer {
    /// What becomes of it under a gate.
    #[must_use]
    pub const fn answer(&self, gate: Gate) -> Answer {
        match gate {
            Gate::Bpf => self.bpf,
            Gate::Fanotify => self.fanotify,
        }
    }

    /// The one of a name.
    #[must_use]
    pub fn find(name: &str, when: When) -> Option<&'static Self> {
        WRITERS
            .iter()
            .find(|writer| writer.name == name && writer.when == when)
    }
}

const fn writer(
    name: &'static str,
    title: &'static str,
    when: When,
    bpf: Answer,
    fanotify: Answer,
) -> Writer {
    Writer {
        name,
        title,
        when,
        bpf,
        fanotify,
    }
}

/// All that are known.
pub const WRITERS: &[Writer] = {
    use Answer::{GrantRefused as G, Harmless as H, Noticed as N, Refused as R};
    use When::{After as A, Before as B};
    const WRITE: &str = "overlay: write, splice, sendfile, mmap or punch through it";
    const TRUNCATE: &str = "overlay: truncate(2) through it";
    &[
        writer("overlay", WRITE, A, R, R),
        writer("overlay", WRITE, B, G, G),
        writer("overlay-truncate", TRUNCATE, A, R, N),
        writer("overlay-truncate", TRUNCATE, B, G, G),
        writer(
            "overlay-detached",
            "overlay that is mounted nowhere (fsmount(2)): open through it",
            B,
            G,
            G,
        ),
        writer(
            "overlay-detached-truncate",
            "overlay that is mounted nowhere: truncate(2) through it",
            B,
            R,
            N,
        ),
        writer(
            "copy-up",
            "overlay above: the pinned file is copied up",
            A,
            H,
            H,
        ),
        writer("core", "core dump to the name of a pinned file", A, H, H),
        writer("acct", "acct(2)", A, R, R),
        writer("acct", "acct(2)", B, G, G),
        writer("nvmet", "nvmet with a file", A, R, R),
        writer("nvmet", "nvmet with a file", B, G, G),
        writer("fileio", "LIO, fileio: write, UNMAP or WRITE SAME", A, R, R),
        writer("fileio", "LIO, fileio: write, UNMAP or WRITE SAME", B, G, G),
        writer("iblock", "LIO, iblock with a loop device", A, R, R),
        writer("iblock", "LIO, iblock with a loop device", B, G, G),
        writer("nfs", "NFS client: write", A, R, R),
        writer("nfs", "NFS client: write", B, R, G),
        writer(
            "nfs-open",
            "NFS client that has the file open: write",
            B,
            G,
            G,
        ),
        writer("nfs-truncate", "NFS client: truncate(2)", A, R, N),
        writer("nfs-truncate", "NFS client: truncate(2)", B, R, G),
        writer(
            "nfs-read-only",
            "NFS client of what is exported read-only",
            B,
            H,
            H,
        ),
        writer("md-bitmap", "md, bitmap in a file", A, H, R),
        writer("md-bitmap", "md, bitmap in a file", B, G, G),
        writer("loop", "loop device", A, R, R),
        writer("loop", "loop device", B, G, G),
        writer(
            "loop-descriptor",
            "loop device, made later of a descriptor from before",
            B,
            R,
            G,
        ),
        writer("loop-read-only", "loop device, read-only", A, H, H),
        writer("loop-read-only", "loop device, read-only", B, H, H),
        writer("swapon", "swapon(2)", A, R, R),
        writer("swapon", "swapon(2)", B, G, G),
        writer(
            "verity",
            "fs-verity, the pin reaching beyond the end of the file (ext4)",
            A,
            R,
            N,
        ),
    ]
};

/// The heading of their section in mapdirect.7.
pub const HEADING: &str = ".SH WRITERS THAT MEET NO HOOK\n";

/// Their section in mapdirect.7.
#[must_use]
pub fn section() -> String {
    let mut text = String::from(HEADING);
    text.push_str(
        "Some parts of the kernel write to a file without the checks that writes of\n\
         programs pass.\n\
         The table says what becomes of them if they have the file, or an overlay above\n\
         it, before it is pinned, and if they come after that.\n\
         It does not matter who mounts an overlay, nor in which namespace, and the\n\
         answers are the same on every kernel.\n\
         .PP\n\
         .ad l\n\
         .TS\n\
         lw(32n) l l l.\n\
         writer\tcomes\tbpf\tfanotify\n\
         _\n",
    );
    for writer in WRITERS {
        let when = match writer.when {
            When::Before => "before",
            When::After => "after",
        };
        let _ = writeln!(
            text,
            "T{{\n{}\nT}}\t{when}\t{}\t{}",
            writer.title,
            writer.bpf.name(),
            writer.fanotify.name()
        );
    }
    text.push_str(
        ".TE\n\
         .ad b\n\
         .PP\n\
         .IR Refused :\n\
         it gets an error, ETXTBSY wherever the kernel passes it on.\n\
         .IR \"Pin refused\" :\n\
         it was there first, and whoever asks for the pin gets the error.\n\
         .IR Harmless :\n\
         it changes no pinned block.\n\
         (A core dump replaces the file of that name; the pinned one loses its name.)\n\
         .IR Noticed :\n\
         no gate sees it.\n\
         What it changed is noticed afterwards, by reading the block map again.\n\
         .PP\n\
         Linux 7.3 takes no file for a bitmap of md, so that one has been tried under the\n\
         bpf gate alone, on older kernels; under the other gate no writer gets the file,\n\
         or the pin is refused for the description it holds.\n\
         NFS LOCALIO (Linux 6.12, CONFIG_NFS_LOCALIO), by which a client of its own\n\
         machine goes past the server's threads, has not been tried at all: Debian's\n\
         kernels have none.\n\
         What it changes is noticed.\n",
    );
    text
}

/// A page with its section in it, in place of the one that is there, or before
/// the section on what cannot be refused.
#[must_use]
pub fn in_page(page: &str) -> String {
    let (before, rest) = match page.split_once(HEADING) {
        Some((before, rest)) => {
            let end = rest.find("\n.SH ").map_or(rest.len(), |at| at + 1);
            (before, &rest[end..])
        }
        None => {
            let at = page
                .find(".SH WHAT IT CANNOT REFUSE\n")
                .unwrap_or(page.len());
            page.split_at(at)
        }
    };
    format!("{before}{}{rest}", section())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_is_there_once() {
        let names: BTreeSet<_> = WRITERS
            .iter()
            .map(|writer| (writer.name, writer.when == When::Before))
            .collect();
        assert_eq!(names.len(), WRITERS.len());
    }

    #[test]
    fn whoever_comes_after_is_no_matter_for_the_grant() {
        for writer in WRITERS {
            if writer.when == When::After {
                assert_ne!(writer.bpf, Answer::GrantRefused, "{}", writer.name);
                assert_ne!(writer.fanotify, Answer::GrantRefused, "{}", writer.name);
            }
        }
    }

    #[test]
    fn the_section_is_put_in_once() {
        let page = ".TH x\n.SH A\na\n.SH WHAT IT CANNOT REFUSE\nb\n";
        let once = in_page(page);
        assert!(once.contains(HEADING));
        assert!(once.ends_with(".SH WHAT IT CANNOT REFUSE\nb\n"));
        assert_eq!(in_page(&once), once);
    }
}
