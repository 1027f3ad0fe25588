//! proc_locks(5): the lock records of `/proc/locks` and of fdinfo files.

/// The kind of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `fcntl(2)` with `F_SETLK`: belongs to a process.
    Posix,
    /// `fcntl(2)` with `F_OFD_SETLK`: belongs to an open file description.
    Description,
    /// `flock(2)`: belongs to an open file description.
    Flock,
    /// Leases, delegations and layouts.
    Lease,
}

/// One lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lock {
    /// See [`Kind`].
    pub kind: Kind,
    /// Whether the lock is exclusive rather than shared.
    pub exclusive: bool,
    /// The process that set it; -1 for [`Kind::Description`].
    pub pid: i32,
    /// Major number of the filesystem's device.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Inode number.
    pub inode: u64,
    /// First byte.
    pub start: u64,
    /// The last byte, or `None` for the largest offset.
    pub last: Option<u64>,
}

/// Parses a record, with or without the leading number. Returns `None` for a
/// waiter (`->`) and for text of another form.
#[must_use]
pub fn parse_line(line: &str) -> Option<Lock> {
    let mut words = line.split_ascii_whitespace();
    let mut kind = words.next()?;
    if kind.ends_with(':') {
        kind = words.next()?;
    }
    let kind = match kind {
        "POSIX" | "ACCESS" => Kind::Posix,
        "OFDLCK" => Kind::Description,
        "FLOCK" => Kind::Flock,
        "LEASE" | "DELEG" | "LAYOUT" => Kind::Lease,
        _ => return None,
    };
    let _advisory = words.next()?;
    let exclusive = match words.next()? {
        "WRITE" => true,
        "READ" => false,
        _ => return None,
    };
    let pid = words.next()?.parse().ok()?;
    let mut device = words.next()?.split(':');
    let major = u32::from_str_radix(device.next()?, 16).ok()?;
    let minor = u32::from_str_radix(device.next()?, 16).ok()?;
    let inode = device.next()?.parse().ok()?;
    let start = words.next()?.parse().ok()?;
    let last = match words.next()? {
        "EOF" => None,
        last => Some(last.parse().ok()?),
    };
    Some(Lock {
        kind,
        exclusive,
        pid,
        major,
        minor,
        inode,
        start,
        last,
    })
}

/// Every lock of the system that is visible in this PID namespace.
///
/// # Errors
///
/// Any error of reading `/proc/locks`.
pub fn read_all() -> std::io::Result<Vec<Lock>> {
    let text = std::fs::read_to_string("/proc/locks")?;
    Ok(text.lines().filter_map(parse_line).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_every_kind() {
        let lock = parse_line("12: OFDLCK ADVISORY  READ -1 07:0a:131 4611 4611").unwrap();
        assert_eq!(lock.kind, Kind::Description);
        assert_eq!((lock.major, lock.minor, lock.inode), (7, 10, 131));
        assert_eq!((lock.start, lock.last), (4611, Some(4611)));
        let lock = parse_line("POSIX  ADVISORY  WRITE 77 fe:00:2 0 EOF").unwrap();
        assert!(lock.exclusive && lock.pid == 77 && lock.last.is_none());
        let lease = parse_line("4: LEASE  BREAKING  READ  1162 08:01:5 0 EOF").unwrap();
        assert_eq!(lease.kind, Kind::Lease);
    }

    #[test]
    fn a_waiter_is_no_lock() {
        assert_eq!(
            parse_line("1: -> POSIX  ADVISORY  WRITE 77 fe:00:2 0 EOF"),
            None
        );
    }
}
