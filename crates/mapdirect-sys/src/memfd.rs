//! memfd_create(2): sealed bytes to hand to another process, and a proof of
//! privilege that the kernel itself checks.

use crate::inode_flags::{self, IMMUTABLE};
use crate::{Errno, Result, proc, proc_status};
use rustix::fs::{MemfdFlags, SealFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

const ALL_SEALS: SealFlags = SealFlags::SEAL
    .union(SealFlags::SHRINK)
    .union(SealFlags::GROW)
    .union(SealFlags::WRITE);

/// A memory file that contains `bytes` and can never change again.
///
/// # Errors
///
/// `ENOMEM`, `EMFILE`, `ENFILE`.
pub fn sealed(name: &str, bytes: &[u8]) -> Result<OwnedFd> {
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut rest = bytes;
    while !rest.is_empty() {
        match rustix::io::write(&file, rest) {
            Ok(written) => rest = &rest[written..],
            Err(Errno::INTR) => {}
            Err(other) => return Err(other),
        }
    }
    rustix::fs::fcntl_add_seals(&file, ALL_SEALS)?;
    Ok(file)
}

/// The bytes of a memory file that somebody else created and sealed, at most
/// `limit` of them.
///
/// # Errors
///
/// `EINVAL` if the file is not a sealed memory file, `EFBIG` if it is longer
/// than `limit`. Nothing is read then.
pub fn read_sealed(file: BorrowedFd<'_>, limit: usize) -> Result<Vec<u8>> {
    // Only memfd and hugetlbfs answer F_GET_SEALS. All other files are refused
    // here, including FUSE files that could hang a read.
    if !rustix::fs::fcntl_get_seals(file)?.contains(ALL_SEALS) {
        return Err(Errno::INVAL);
    }
    let size = rustix::fs::fstat(file)?.st_size;
    let size = usize::try_from(size).map_err(|_| Errno::INVAL)?;
    if size > limit {
        return Err(Errno::FBIG);
    }
    let mut bytes = vec![0; size];
    let mut done = 0;
    while done < size {
        match rustix::io::pread(file, &mut bytes[done..], done as u64) {
            Ok(0) => return Err(Errno::INVAL),
            Ok(read) => done += read,
            Err(Errno::INTR) => {}
            Err(other) => return Err(other),
        }
    }
    Ok(bytes)
}

/// Proves `CAP_LINUX_IMMUTABLE` in the initial user namespace by an act: making
/// a memory file with `challenge` in it immutable. The kernel permits this to
/// nobody without the capability (`fileattr_set_prepare`, fs/ioctl.c, 5.13 to
/// 6.16, fs/file_attr.c since: `capable(CAP_LINUX_IMMUTABLE)`; tmpfs has the
/// flag since 6.0).
///
/// What a daemon reads in `/proc` about a client may be outdated by then, or be
/// about another program: a client may send its request and then run a
/// set-user-ID program. An act cannot be backdated.
///
/// The act can be passed on, though. Somebody who makes a privileged program
/// believe that it speaks with the daemon gets a proof for a challenge of their
/// choice. So the content also names the process that made the proof.
///
/// # Errors
///
/// `EPERM` without the capability, `ENOTTY` or `EOPNOTSUPP` when tmpfs lacks
/// the flag, `ENOENT` without proc(5).
pub fn prove_immutable_capability(challenge: &[u8], by: By) -> Result<OwnedFd> {
    let prover = Prover {
        pid: std::process::id().cast_signed(),
        mark: match by {
            By::StartTime => proc::own_start_time()?,
            By::Namespace => proc_status::pid_namespace(None)?,
        },
    };
    let file = sealed("mapdirect-proof", &prover.sign(challenge))?;
    inode_flags::set_flags(file.as_fd(), IMMUTABLE)?;
    Ok(file)
}

/// How the process that makes a proof names itself, beside its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// By its start time. A process in another PID or time namespace than the
    /// receiver has other numbers than the receiver sees.
    StartTime,
    /// By its PID namespace, in which its number is meant.
    Namespace,
}

/// The process that made a proof, according to itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prover {
    /// The process id.
    pub pid: i32,
    /// The start time, see [`proc::start_time`], or the PID namespace, see
    /// [`proc_status::pid_namespace`].
    pub mark: u64,
}

impl Prover {
    /// The number of bytes behind the challenge.
    const LENGTH: usize = 4 + 8;

    pub(crate) fn sign(self, challenge: &[u8]) -> Vec<u8> {
        let pid = self.pid.to_le_bytes();
        let mark = self.mark.to_le_bytes();
        [challenge, &pid, &mark].concat()
    }

    /// Takes apart what [`sign`](Self::sign) has put together.
    pub(crate) fn signed(content: &[u8], challenge: &[u8]) -> Option<Self> {
        let signature = content.strip_prefix(challenge)?;
        let (pid, mark) = signature.split_first_chunk()?;
        Some(Self {
            pid: i32::from_le_bytes(*pid),
            mark: u64::from_le_bytes(mark.try_into().ok()?),
        })
    }
}

/// If `file` is what [`prove_immutable_capability`] makes of `challenge`,
/// returns the process that the file names as its maker. That process had the
/// capability. The caller must check whether it is the process that hands the
/// file in.
///
/// # Errors
///
/// As [`read_sealed`].
pub fn check_immutable_capability(
    file: BorrowedFd<'_>,
    challenge: &[u8],
) -> Result<Option<Prover>> {
    let content = read_sealed(file, challenge.len() + Prover::LENGTH)?;
    let is_immutable = inode_flags::flags(file)? & IMMUTABLE != 0;
    Ok(Prover::signed(&content, challenge).filter(|_| is_immutable))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_bytes_arrive_and_stay() {
        let file = sealed("test", b"hello").unwrap();
        assert_eq!(read_sealed(file.as_fd(), 5).unwrap(), b"hello");
        assert_eq!(read_sealed(file.as_fd(), 4), Err(Errno::FBIG));
        assert_eq!(rustix::io::write(&file, b"x"), Err(Errno::PERM));
    }

    #[test]
    fn other_files_are_refused_unread() {
        let file = tempfile::tempfile().unwrap();
        assert!(read_sealed(file.as_fd(), 5).is_err());
        let unsealed = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        assert_eq!(read_sealed(unsealed.as_fd(), 5), Err(Errno::INVAL));
    }

    #[test]
    fn a_signature_comes_back_whole_or_not_at_all() {
        let prover = Prover {
            pid: 7,
            mark: u64::MAX - 1,
        };
        let content = prover.sign(b"challenge");
        assert_eq!(Prover::signed(&content, b"challenge"), Some(prover));
        assert_eq!(Prover::signed(&content, b"challengf"), None);
        for length in 0..content.len() {
            assert_eq!(Prover::signed(&content[..length], b"challenge"), None);
        }
        let longer = [&content[..], b"x"].concat();
        assert_eq!(Prover::signed(&longer, b"challenge"), None);
    }

    #[test]
    fn a_proof_needs_the_act_and_the_challenge() {
        let me = Prover {
            pid: std::process::id().cast_signed(),
            mark: proc::own_start_time().unwrap(),
        };
        let plain = sealed("test", &me.sign(b"challenge")).unwrap();
        assert_eq!(
            check_immutable_capability(plain.as_fd(), b"challenge"),
            Ok(None)
        );
        let capable = crate::capget::contains(
            crate::capget::effective(0).unwrap(),
            crate::capget::CAP_LINUX_IMMUTABLE,
        );
        match prove_immutable_capability(b"challenge", By::StartTime) {
            Ok(proof) => {
                assert!(capable);
                let check = |challenge| check_immutable_capability(proof.as_fd(), challenge);
                assert_eq!(check(b"challenge"), Ok(Some(me)));
                assert_eq!(check(b"challengf"), Ok(None));
            }
            Err(errno) => assert_eq!((errno, capable), (Errno::PERM, false)),
        }
    }
}
