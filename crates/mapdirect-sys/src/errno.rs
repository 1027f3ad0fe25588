//! errno(3) of the calling thread, for functions that C calls.

/// An argument makes no sense.
pub const EINVAL: i32 = libc::EINVAL;
/// No such descriptor.
pub const EBADF: i32 = libc::EBADF;
/// A pointer leads nowhere.
pub const EFAULT: i32 = libc::EFAULT;
/// Nobody can do it here.
pub const EOPNOTSUPP: i32 = libc::EOPNOTSUPP;
/// Something broke.
pub const EIO: i32 = libc::EIO;
/// A sum does not fit.
pub const EOVERFLOW: i32 = libc::EOVERFLOW;

/// Sets it.
pub fn set(errno: i32) {
    // SAFETY: takes nothing, and returns where this thread has it.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: it belongs to this thread, for as long as that lives.
    unsafe { *place = errno };
}

/// What it is.
#[must_use]
pub fn get() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_is_what_it_was_set_to() {
        super::set(super::EOVERFLOW);
        assert_eq!(super::get(), libc::EOVERFLOW);
    }
}
