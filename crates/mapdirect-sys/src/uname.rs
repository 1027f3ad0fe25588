//! uname(2): the version of the kernel.

/// The major and minor version of the running kernel. 0.0 if its release does
/// not begin with numbers, so that it counts as one without newer features.
#[must_use]
pub fn version() -> (u32, u32) {
    let release = rustix::system::uname();
    version_of(&release.release().to_string_lossy()).unwrap_or((0, 0))
}

pub(crate) fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let major = numbers.next()?.parse().ok()?;
    let minor = numbers.next()?.parse().ok()?;
    Some((major, minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_real_kernels() {
        assert_eq!(version_of("6.14.0-rc3+"), Some((6, 14)));
        assert_eq!(version_of("6.1.0-32-amd64"), Some((6, 1)));
        assert_eq!(version_of("7.3-1-amd64"), Some((7, 3)));
        assert_eq!(version_of("none"), None);
        assert_eq!(version_of("6"), None);
        assert_eq!(version_of(""), None);
    }
}
