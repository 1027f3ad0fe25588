//! dlsym(3) and dlopen(3): what a program has by a name.

use std::ffi::{CStr, CString, c_void};
use std::mem::MaybeUninit;

/// The address of a function or variable of any object in the program that
/// everybody sees.
#[must_use]
pub fn find(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: looks the name up, and calls nothing.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

/// The address of a function or variable of a library, which is loaded for that,
/// and stays: from the directory where the code at `beside` is, or else from where
/// libraries are. Only while nobody holds locks that a library's start may take.
#[must_use]
pub fn load(library: &CStr, beside: *const c_void, name: &CStr) -> Option<*mut c_void> {
    let flags = libc::RTLD_NOW | libc::RTLD_GLOBAL | libc::RTLD_NODELETE;
    let open = |path: &CStr| {
        // SAFETY: loads a library that the caller names; ours does nothing when it
        // is loaded.
        let handle = unsafe { libc::dlopen(path.as_ptr(), flags) };
        (!handle.is_null()).then_some(handle)
    };
    let handle = directory_of(beside)
        .and_then(|mut path| {
            path.extend_from_slice(library.to_bytes());
            open(&CString::new(path).ok()?)
        })
        .or_else(|| open(library))?;
    // SAFETY: looks the name up in a library that stays, and calls nothing.
    let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

/// The directory of the object that has an address, with a slash at the end.
fn directory_of(address: *const c_void) -> Option<Vec<u8>> {
    let mut info = MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: the structure is valid when all of it is zeros, and is filled in.
    let found = unsafe { libc::dladdr(address, info.as_mut_ptr()) };
    // SAFETY: as above.
    let info = unsafe { info.assume_init() };
    if found == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: dladdr returned a string that stays as long as the object is loaded.
    let name = unsafe { CStr::from_ptr(info.dli_fname) }.to_bytes();
    let slash = name.iter().rposition(|byte| *byte == b'/')?;
    Some(name[..=slash].to_vec())
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_there_is_found() {
        assert!(super::find(c"malloc").is_some());
        assert!(super::find(c"mapdirect_no_such_function").is_none());
    }
}
