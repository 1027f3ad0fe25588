//! umask(2) of a single thread.

use crate::{Result, checked};

/// Gives the calling thread a working directory, a root directory and a mask
/// for new files of its own (`unshare(CLONE_FS)`).
///
/// # Errors
///
/// `ENOMEM`.
pub fn apart() -> Result<()> {
    // SAFETY: one integer; the thread goes on with copies of what it had.
    checked(unsafe { libc::unshare(libc::CLONE_FS) }).map(drop)
}

#[cfg(test)]
mod tests {
    use rustix::fs::Mode;
    use rustix::process::umask;

    #[test]
    fn a_thread_has_a_mask_of_its_own() {
        let before = umask(Mode::from_bits_retain(0o022));
        let other = std::thread::spawn(|| {
            super::apart().unwrap();
            umask(Mode::from_bits_retain(0o077))
        });
        assert_eq!(other.join().unwrap(), Mode::from_bits_retain(0o022));
        assert_eq!(umask(before), Mode::from_bits_retain(0o022));
    }
}
