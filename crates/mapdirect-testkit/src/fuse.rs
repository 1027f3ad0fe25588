//! A FUSE filesystem with one file, whose server leaves some questions
//! unanswered: whatever waits for them waits for as long as its owner likes.
//!
//! Spoken over `/dev/fuse` directly (include/uapi/linux/fuse.h), since no more
//! than five messages are needed.

use crate::process::ScratchDirectory;
use anyhow::{Context, Result};
use mapdirect_sys::Errno;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::mount::MountFlags;
use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// A question that the server may leave unanswered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unanswered {
    /// Of the end of a descriptor.
    Flush,
    /// What a name leads to.
    Lookup,
    /// For the bytes of the file.
    Read,
    /// For other attributes, such as another size.
    Setattr,
}

impl Unanswered {
    fn is(self, opcode: u32) -> bool {
        opcode
            == match self {
                Self::Flush => FLUSH,
                Self::Lookup => LOOKUP,
                Self::Read => READ,
                Self::Setattr => SETATTR,
            }
    }
}

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

/// The name of the file.
pub const FILE: &str = "f";

/// A node of `/dev/fuse` that anybody may open, where `/dev/fuse` itself is
/// not, and a directory that anybody may mount on, until they are dropped.
#[derive(Debug)]
pub struct Place(ScratchDirectory);

impl Place {
    /// Makes them.
    pub fn new() -> Result<Self> {
        let place = Self(ScratchDirectory::in_memory("stranger")?);
        let (node, directory) = (place.node(), place.directory());
        std::fs::create_dir(&directory)?;
        for path in [place.0.path(), &directory] {
            rustix::fs::chmod(path, Mode::from_raw_mode(0o777))?;
        }
        let mode = Mode::from_raw_mode(0o666);
        let device = rustix::fs::makedev(10, 229);
        rustix::fs::mknodat(CWD, &node, FileType::CharacterDevice, mode, device)?;
        rustix::fs::chmod(&node, mode)?;
        Ok(place)
    }

    /// The node.
    #[must_use]
    pub fn node(&self) -> PathBuf {
        self.0.path().join("fuse")
    }

    /// The directory.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        self.0.path().join("mount")
    }
}

/// Mounts the filesystem on a directory, by a `/dev/fuse` that is opened here:
/// the caller must be root of its user and mount namespace.
pub fn mount(device: &Path, directory: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let server = rustix::fs::open(device, flags, Mode::empty()).context("no /dev/fuse")?;
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0",
        server.as_raw_fd()
    );
    let options = CString::new(options)?;
    rustix::mount::mount(
        "stranger",
        directory,
        "fuse",
        MountFlags::empty(),
        &*options,
    )
    .context("cannot mount FUSE")?;
    Ok(server)
}

/// Answers until the filesystem is gone; `asked` hears of each question that
/// stays unanswered.
pub fn serve(server: &OwnedFd, unanswered: Unanswered, mut asked: impl FnMut()) {
    let mut buffer = vec![0; 1 << 17];
    loop {
        let length = match rustix::io::read(server, &mut buffer) {
            Ok(length) => length,
            Err(Errno::INTR | Errno::NOENT) => continue,
            Err(_) => return,
        };
        let word = |at: usize| -> u64 {
            let bytes = buffer[..length].get(at..at + 8);
            bytes.map_or(0, |bytes| {
                u64::from_ne_bytes(bytes.try_into().unwrap_or_default())
            })
        };
        let opcode = u32::try_from(word(0) >> 32).unwrap_or(0);
        let (unique, node) = (word(8), word(16));
        let answer = match opcode {
            FORGET | INTERRUPT | BATCH_FORGET => continue,
            _ if unanswered.is(opcode) => {
                asked();
                continue;
            }
            INIT => Ok(init()),
            LOOKUP => Ok([words(&[2, 0, 1000, 1000, 0]), attributes(2)].concat()),
            GETATTR => Ok([words(&[1000, 0]), attributes(node)].concat()),
            OPEN => Ok(words(&[1, 0])),
            READ => Ok(vec![0; 4096]),
            FLUSH => Ok(Vec::new()),
            _ => Err(Errno::NOSYS),
        };
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(errno) => (-errno.raw_os_error(), Vec::new()),
        };
        let length = u32::try_from(16 + body.len()).unwrap_or(16);
        let head = [
            &length.to_ne_bytes()[..],
            &error.to_ne_bytes(),
            &unique.to_ne_bytes(),
        ];
        // Nobody waits for it any more if it fails.
        let _ = rustix::io::write(server, &[head.concat(), body].concat());
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// `struct fuse_init_out`: version 7.31, writes of a page.
fn init() -> Vec<u8> {
    let mut out = Vec::new();
    for word in [7u32, 31, 0, 0, 0, 4096, 1] {
        out.extend(word.to_ne_bytes());
    }
    out.resize(64, 0);
    out
}

/// `struct fuse_attr` of the root or of the file.
fn attributes(node: u64) -> Vec<u8> {
    let (mode, size) = if node == 1 {
        (0o040_755u32, 0)
    } else {
        (0o100_755, 4096)
    };
    let mut out = words(&[node, size, size.div_ceil(512), 0, 0, 0]);
    for word in [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0] {
        out.extend(word.to_ne_bytes());
    }
    out
}
