//! getauxval(3): what the kernel told this program at its start.

/// Whether the program was started with privileges that its caller does not
/// have: a set-user-ID, set-group-ID or set-capability program (`AT_SECURE`).
/// The caller controls its environment, so the environment cannot be trusted.
#[must_use]
pub fn is_secure_execution() -> bool {
    // SAFETY: takes a number and returns a number.
    let secure = unsafe { libc::getauxval(libc::AT_SECURE) };
    secure != 0
}

#[cfg(test)]
mod tests {
    #[test]
    fn tests_run_with_the_privilege_of_their_caller() {
        assert!(!super::is_secure_execution());
    }
}
