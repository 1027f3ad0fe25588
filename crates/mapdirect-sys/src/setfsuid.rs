//! setfsuid(2), setfsgid(2), setgroups(2) and capset(2): using a filesystem with
//! the rights of another user.

use crate::capget::{self, CAP_SYS_RESOURCE};
use crate::{Errno, Result, checked};

/// The former rights of the calling thread. Dropping this value restores them.
#[derive(Debug)]
#[must_use = "the thread gets its own rights back when this is dropped"]
pub struct OnBehalf {
    uid: u32,
    capabilities: u64,
}

/// Makes the calling thread, and no other, use filesystems as user `uid`,
/// within that user's quota and without the space reserved for root. That space
/// is not for work on behalf of others.
///
/// # Errors
///
/// `EPERM` for a thread that may not act as another user.
pub fn on_behalf_of(uid: u32) -> Result<OnBehalf> {
    // Read the capabilities before the change, which removes some.
    let capabilities = capget::effective(0)?;
    let before = OnBehalf {
        uid: setfsuid(uid),
        capabilities,
    };
    if setfsuid(uid) != uid {
        return Err(Errno::PERM);
    }
    if uid != 0 {
        // A user other than root has lost the others by the change.
        let now = capget::effective(0)?;
        capget::set_effective(now & !(1 << CAP_SYS_RESOURCE))?;
    }
    Ok(before)
}

/// Makes the calling thread, and no other, somebody with exactly these ids and no
/// capability, as far as filesystems are concerned. There is no way back: this is
/// for a thread that ends soon.
///
/// # Errors
///
/// `EPERM` without `CAP_SETUID` and `CAP_SETGID`, `EINVAL` for more groups than
/// the kernel takes. The thread may be anybody then, so it must not go on.
pub fn become_for_good(uid: u32, gid: u32, groups: &[u32]) -> Result<()> {
    // SAFETY: reads as many numbers as it is told. The bare call changes this
    // thread alone.
    let set = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    checked(i32::try_from(set).unwrap_or(-1))?;
    setfsgid(gid);
    let gid_is_set = setfsgid(gid) == gid;
    setfsuid(uid);
    let uid_is_set = setfsuid(uid) == uid;
    if !gid_is_set || !uid_is_set {
        return Err(Errno::PERM);
    }
    capget::set_effective(0)
}

impl Drop for OnBehalf {
    fn drop(&mut self) {
        setfsuid(self.uid);
        // Capabilities that were effective are still permitted.
        let _ = capget::set_effective(self.capabilities);
    }
}

/// Sets the user, and returns the former one. Returns it even if nothing
/// changes.
fn setfsuid(uid: u32) -> u32 {
    // SAFETY: an integer; glibc would do the same, for this thread alone.
    let before = unsafe { libc::syscall(libc::SYS_setfsuid, uid) };
    u32::try_from(before).unwrap_or(u32::MAX)
}

/// The same for the group.
fn setfsgid(gid: u32) -> u32 {
    // SAFETY: an integer, for this thread alone.
    let before = unsafe { libc::syscall(libc::SYS_setfsgid, gid) };
    u32::try_from(before).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_becomes_somebody_who_may_do_little() {
        use crate::faccessat2::{Access, may};
        use std::os::fd::AsFd;
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::NamedTempFile::new().unwrap();
        let allow = |mode| {
            let permissions = std::fs::Permissions::from_mode(mode);
            file.as_file().set_permissions(permissions).unwrap();
        };
        let as_nobody = |groups: Vec<u32>| {
            let file = file.as_file().try_clone().unwrap();
            std::thread::spawn(move || {
                become_for_good(65534, 65534, &groups)?;
                may(file.as_fd(), Access::ReadWrite)
            })
            .join()
            .unwrap()
        };
        if !rustix::process::geteuid().is_root() {
            assert_eq!(as_nobody(vec![]), Err(Errno::PERM));
            return;
        }
        allow(0o600);
        assert_eq!(as_nobody(vec![]), Err(Errno::ACCESS));
        assert_eq!(as_nobody(vec![0]), Err(Errno::ACCESS));
        allow(0o660);
        assert_eq!(as_nobody(vec![0]), Ok(()));
        assert_eq!(as_nobody(vec![]), Err(Errno::ACCESS));
        allow(0o606);
        assert_eq!(as_nobody(vec![]), Ok(()));
        assert_eq!(may(file.as_file().as_fd(), Access::ReadWrite), Ok(()));
    }

    fn owner_of_a_new_file() -> u32 {
        use std::os::unix::fs::MetadataExt;
        let path = std::env::temp_dir().join(format!("mapdirect-{}", std::process::id()));
        let made = std::fs::File::create_new(&path).unwrap();
        let uid = made.metadata().unwrap().uid();
        std::fs::remove_file(path).unwrap();
        uid
    }

    #[test]
    fn it_is_somebody_else_for_a_while() {
        if !rustix::process::geteuid().is_root() {
            // Nobody else can be another.
            assert_eq!(on_behalf_of(65534).unwrap_err(), Errno::PERM);
            return;
        }
        let before = capget::effective(0).unwrap();
        let other = on_behalf_of(65534).unwrap();
        assert_eq!(owner_of_a_new_file(), 65534);
        assert_eq!(capget::effective(0).unwrap() >> CAP_SYS_RESOURCE & 1, 0);
        drop(other);
        assert_eq!(owner_of_a_new_file(), 0);
        assert_eq!(capget::effective(0).unwrap(), before);
    }
}
