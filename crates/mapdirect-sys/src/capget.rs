//! capget(2), capset(2): does a process hold `CAP_LINUX_IMMUTABLE`?

use crate::{Result, checked};

const VERSION_3: u32 = 0x2008_0522;

/// `CAP_LINUX_IMMUTABLE`, the capability that allows pinning.
pub const CAP_LINUX_IMMUTABLE: u32 = 9;
/// `CAP_DAC_OVERRIDE`: permits opening every file.
pub const CAP_DAC_OVERRIDE: u32 = 1;
/// `CAP_SYSLOG`: permits reading the addresses of kernel functions.
pub const CAP_SYSLOG: u32 = 34;
/// `CAP_DAC_READ_SEARCH`: permits reading every file, and opening it by its
/// handle.
pub const CAP_DAC_READ_SEARCH: u32 = 2;
/// `CAP_SETUID`: permits acting on behalf of another user.
pub const CAP_SETUID: u32 = 7;
/// `CAP_SYS_PTRACE`: permits looking at processes of other users.
pub const CAP_SYS_PTRACE: u32 = 19;
/// `CAP_SYS_ADMIN`, which the guard needs.
pub const CAP_SYS_ADMIN: u32 = 21;
/// `CAP_LEASE`: permits leases on files of other users.
pub const CAP_LEASE: u32 = 28;
/// `CAP_SYS_RESOURCE`: permits using space reserved for root, without quota.
pub const CAP_SYS_RESOURCE: u32 = 24;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// The effective capabilities of process `pid` (0: the calling thread), one bit
/// each. They are valid in *that process's* user namespace, which this call
/// does not show.
///
/// # Errors
///
/// `ESRCH` when there is no such process.
pub fn effective(pid: i32) -> Result<u64> {
    let mut header = Header {
        version: VERSION_3,
        pid,
    };
    let mut data = [Data::default(); 2];
    // SAFETY: version 3 reads and writes one header and writes two data
    // records (include/uapi/linux/capability.h); both are ours.
    let ret = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    checked(if ret < 0 { -1 } else { 0 })?;
    Ok(u64::from(data[0].effective) | u64::from(data[1].effective) << 32)
}

/// Makes exactly these capabilities of the calling thread effective.
///
/// # Errors
///
/// `EPERM` for a capability that the thread may not have.
pub fn set_effective(capabilities: u64) -> Result<()> {
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let mut data = [Data::default(); 2];
    // SAFETY: as in `effective`.
    let ret = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    checked(if ret < 0 { -1 } else { 0 })?;
    let halves = [capabilities & 0xffff_ffff, capabilities >> 32];
    for (data, half) in data.iter_mut().zip(halves) {
        data.effective = u32::try_from(half).unwrap_or(0);
    }
    // SAFETY: reads the header and two data records.
    let ret = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    checked(if ret < 0 { -1 } else { 0 }).map(drop)
}

/// Whether `capability` is in the set `effective` returned.
#[must_use]
pub const fn contains(effective: u64, capability: u32) -> bool {
    effective >> capability & 1 == 1
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_agrees_with_proc() {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:"))
            .unwrap();
        let expected = u64::from_str_radix(line.trim(), 16).unwrap();
        assert_eq!(super::effective(0), Ok(expected));
    }

    #[test]
    fn nobody_has_no_capabilities() {
        assert_eq!(super::effective(i32::MAX), Err(crate::Errno::SRCH));
    }
}
