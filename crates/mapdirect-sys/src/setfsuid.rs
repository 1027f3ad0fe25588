//! setfsuid(2) and capset(2): using a filesystem with the rights of another
//! user.

use crate::capget::{self, CAP_SYS_RESOURCE};
use crate::{Errno, Result};

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

#[cfg(test)]
mod tests {
    use super::*;

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
