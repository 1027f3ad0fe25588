//! bpf(2) for existing objects: finding them by their names in the bpf
//! filesystem, and giving them names there.

use crate::{Errno, Result, checked};
use rustix::path::Arg;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;

/// `union bpf_attr` of BPF_OBJ_* (include/uapi/linux/bpf.h).
#[repr(C)]
struct ObjectAttributes {
    path: u64,
    fd: u32,
    flags: u32,
}

/// The same of BPF_OBJ_GET_INFO_BY_FD.
#[repr(C)]
struct InfoAttributes {
    fd: u32,
    length: u32,
    info: u64,
}

/// The beginning of `bpf_link_info` and `bpf_map_info`.
#[repr(C)]
#[derive(Default)]
struct Info {
    kind: u32,
    id: u32,
}

fn call<T>(command: libc::c_int, attributes: &mut T) -> Result<libc::c_int> {
    let size = size_of::<T>();
    // SAFETY: the kernel reads `size` bytes of attributes, which are ours, and
    // takes those that it knows beyond them for zero. Where they point is for
    // the callers to see to.
    let ret =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size) };
    checked(i32::try_from(ret).map_err(|_| Errno::OVERFLOW)?)
}

/// Opens the object with this name in the bpf filesystem.
///
/// # Errors
///
/// `ENOENT`, `EPERM` without privilege, `EINVAL` or `EACCES` for a file that is
/// not an object.
pub fn get(path: impl Arg) -> Result<OwnedFd> {
    path.into_with_c_str(|path| {
        let mut attributes = ObjectAttributes {
            path: path.as_ptr().expose_provenance() as u64,
            fd: 0,
            flags: 0,
        };
        // The string lives until the call is over, and the call only reads it.
        let fd = call(BPF_OBJ_GET, &mut attributes)?;
        // SAFETY: the kernel just gave us this descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    })
}

/// Gives an object a name in the bpf filesystem. Nothing may have this name
/// yet.
///
/// # Errors
///
/// `EEXIST`; `EPERM` when there is no bpf filesystem; `ENOENT` without the
/// directory.
pub fn pin(object: BorrowedFd<'_>, path: impl Arg) -> Result<()> {
    path.into_with_c_str(|path| {
        let mut attributes = ObjectAttributes {
            path: path.as_ptr().expose_provenance() as u64,
            fd: object.as_raw_fd().cast_unsigned(),
            flags: 0,
        };
        // As in `get`.
        call(BPF_OBJ_PIN, &mut attributes).map(drop)
    })
}

/// The number that identifies a link or a map as long as it exists.
///
/// # Errors
///
/// `EINVAL` for a descriptor of something else.
pub fn id(object: impl AsFd) -> Result<u32> {
    let mut info = Info::default();
    let mut attributes = InfoAttributes {
        fd: object.as_fd().as_raw_fd().cast_unsigned(),
        length: u32::try_from(size_of::<Info>()).map_err(|_| Errno::INVAL)?,
        info: (&raw mut info).expose_provenance() as u64,
    };
    // The kernel writes no more than `length` bytes to `info`, which outlives
    // the call.
    call(BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
    Ok(info.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_object_is_refused() {
        assert_eq!(get("/nowhere/at/all").unwrap_err(), Errno::NOENT);
        assert!(get("/proc/self/exe").is_err());
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert!(id(&file).is_err());
        assert!(pin(file.as_fd(), "/tmp/mapdirect-no-object").is_err());
    }
}
