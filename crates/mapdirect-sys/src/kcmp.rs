//! kcmp(2): whether two threads share something inside the kernel.

/// `KCMP_FILES`.
const KCMP_FILES: libc::c_long = 2;

/// `KCMP_FILE`.
const KCMP_FILE: libc::c_long = 0;

/// Whether two descriptors, each given by a process and a number, refer to one
/// open file description. `false` if that cannot be found out.
#[must_use]
pub fn same_description(one: (i32, i32), other: (i32, i32)) -> bool {
    // SAFETY: five integers; the kernel reads and writes no memory of ours.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, one.0, other.0, KCMP_FILE, one.1, other.1) };
    order == 0
}

/// Whether two threads share one descriptor table. `false` if that cannot be
/// found out: then both tables must be looked at.
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
        let (reader, writer) = std::io::pipe().unwrap();
        let copy = reader.try_clone().unwrap();
        let number = |fd: &dyn std::os::fd::AsRawFd| (own, fd.as_raw_fd());
        let _ = super::same_description(number(&reader), number(&copy));
        assert!(!super::same_description(number(&reader), number(&writer)));
    }
}
