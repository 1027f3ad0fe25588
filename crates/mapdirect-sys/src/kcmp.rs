//! kcmp(2): whether two threads share something inside the kernel.

/// `KCMP_FILES`.
const KCMP_FILES: libc::c_long = 2;

/// Whether two threads share one table of descriptors. No, if that cannot be
/// told: then both tables must be looked at.
#[must_use]
pub fn same_descriptors(one: i32, other: i32) -> bool {
    // SAFETY: five integers; the kernel reads and writes no memory of ours.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_FILES, 0, 0) };
    order == 0
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_thread_shares_with_itself() {
        let own = std::process::id().cast_signed();
        // Where the kernel has no kcmp the answer is no, and costs time only.
        let _ = super::same_descriptors(own, own);
        assert!(!super::same_descriptors(own, i32::MAX));
    }
}
