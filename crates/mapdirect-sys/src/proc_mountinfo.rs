//! proc_pid_mountinfo(5): the mounts that a process sees.

use crate::proc::unescape;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The number of the mount in the namespace, as in fanotify and statx.
    pub id: u64,
    /// Major number of `st_dev` of its files.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// The place where it is mounted, seen from the reader's root directory.
    pub mount_point: String,
    /// Type of the filesystem: `xfs`, `ext4`, `overlay`, ...
    pub fs_type: String,
    /// The device or other source.
    pub source: String,
    /// Options of the mount and of the filesystem, comma-separated.
    pub options: String,
}

impl Mount {
    /// The value of `name=value` among the options, or `Some("")` for a plain
    /// `name`.
    #[must_use]
    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.split(',').find_map(|option| {
            if option == name {
                return Some("");
            }
            option.strip_prefix(name)?.strip_prefix('=')
        })
    }
}

/// Parses one line.
#[must_use]
pub fn parse_line(line: &str) -> Option<Mount> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut words = mount.split(' ');
    let id = words.next()?.parse().ok()?;
    let mut words = words.skip(1);
    let (major, minor) = words.next()?.split_once(':')?;
    let _root = words.next()?;
    let mount_point = unescape(words.next()?);
    let mount_options = words.next()?;
    let mut words = filesystem.split(' ');
    let fs_type = words.next()?.to_owned();
    let source = unescape(words.next()?);
    let options = format!("{mount_options},{}", unescape(words.next().unwrap_or("")));
    Some(Mount {
        id,
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        mount_point,
        fs_type,
        source,
        options,
    })
}

/// Every mount in the namespace of process `pid`, or of the caller.
///
/// # Errors
///
/// Any error of reading the file.
pub fn read(pid: Option<i32>) -> std::io::Result<Vec<Mount>> {
    let path = pid.map_or_else(
        || String::from("/proc/self/mountinfo"),
        |pid| format!("/proc/{pid}/mountinfo"),
    );
    let text = std::fs::read(path)?;
    let text = String::from_utf8_lossy(&text);
    Ok(text.lines().filter_map(parse_line).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_everything() {
        let line = "36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext4 /dev/root rw,dax=always";
        let mount = parse_line(line).unwrap();
        assert_eq!((mount.id, mount.major, mount.minor), (36, 98, 0));
        assert_eq!(mount.mount_point, "/mnt 2");
        assert_eq!(mount.fs_type, "ext4");
        assert_eq!(mount.option("dax"), Some("always"));
        assert_eq!(mount.option("noatime"), Some(""));
        assert_eq!(mount.option("data"), None);
    }

    #[test]
    fn this_process_has_a_root() {
        assert!(
            read(None)
                .unwrap()
                .iter()
                .any(|mount| mount.mount_point == "/")
        );
    }
}
