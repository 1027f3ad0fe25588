//! memfd_create(2): sealed bytes to hand to another process, and a proof of
//! privilege that the kernel itself checks.

use crate::inode_flags::{self, IMMUTABLE};
use crate::{Errno, Result};
use rustix::fs::{MemfdFlags, SealFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

const ALL_SEALS: SealFlags = SealFlags::SEAL
    .union(SealFlags::SHRINK)
    .union(SealFlags::GROW)
    .union(SealFlags::WRITE);

/// A memory file that holds `bytes` and can never change again.
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

/// The bytes of a memory file that somebody else made and sealed; at most
/// `limit` of them.
///
/// # Errors
///
/// `EINVAL` if it is no sealed memory file, `EFBIG` beyond `limit`: nothing
/// is read then.
pub fn read_sealed(file: BorrowedFd<'_>, limit: usize) -> Result<Vec<u8>> {
    // Only memfd and hugetlbfs answer F_GET_SEALS; everything else, FUSE
    // files that could hang a read included, is refused here.
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

/// Proves `CAP_LINUX_IMMUTABLE` in the initial user namespace by an act: a
/// memory file with `challenge` in it is made immutable, which the kernel
/// allows to nobody else (`fileattr_set_prepare`, fs/ioctl.c, 5.13 to 6.16,
/// fs/file_attr.c since: `capable(CAP_LINUX_IMMUTABLE)`; tmpfs has the flag
/// since 6.0).
///
/// What a daemon reads in `/proc` about a client can be stale or about
/// another program by the time it is read: a client may send its request and
/// then run a set-user-ID program. An act cannot be backdated.
///
/// # Errors
///
/// `EPERM` without the capability, `ENOTTY` or `EOPNOTSUPP` where tmpfs lacks
/// the flag.
pub fn prove_immutable_capability(challenge: &[u8]) -> Result<OwnedFd> {
    let file = sealed("mapdirect-proof", challenge)?;
    inode_flags::set_flags(file.as_fd(), IMMUTABLE)?;
    Ok(file)
}

/// Whether `file` is what [`prove_immutable_capability`] makes of
/// `challenge`.
///
/// # Errors
///
/// As [`read_sealed`].
pub fn check_immutable_capability(file: BorrowedFd<'_>, challenge: &[u8]) -> Result<bool> {
    let content = read_sealed(file, challenge.len())?;
    Ok(content == challenge && inode_flags::flags(file)? & IMMUTABLE != 0)
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
    fn a_proof_needs_the_act_and_the_challenge() {
        let plain = sealed("test", b"challenge").unwrap();
        assert_eq!(
            check_immutable_capability(plain.as_fd(), b"challenge"),
            Ok(false)
        );
        let capable = crate::capget::contains(
            crate::capget::effective(0).unwrap(),
            crate::capget::CAP_LINUX_IMMUTABLE,
        );
        match prove_immutable_capability(b"challenge") {
            Ok(proof) => {
                assert!(capable);
                let check = |challenge| check_immutable_capability(proof.as_fd(), challenge);
                assert_eq!(check(b"challenge"), Ok(true));
                assert_eq!(check(b"challengf"), Ok(false));
            }
            Err(errno) => assert_eq!((errno, capable), (Errno::PERM, false)),
        }
    }
}
