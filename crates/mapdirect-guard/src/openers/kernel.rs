//! Finds users of files inside the kernel.

use super::is_inode;
use crate::table::InodeId;
use mapdirect_proto::Opener;

/// The users of one file inside the kernel that can be found.
#[cfg_attr(not(feature = "bpf"), expect(dead_code, reason = "for the bpf gate"))]
pub(crate) fn kernel_users(id: InodeId, known_path: &str) -> Vec<Opener> {
    all_kernel_users()
        .into_iter()
        .filter(|user| user.path == known_path || is_inode(&user.path, id))
        .map(|user| user.opener())
        .collect()
}

/// A file that the kernel itself has open.
pub(super) struct KernelUser {
    pub(super) path: String,
    what: String,
    writable: bool,
}

impl KernelUser {
    pub(super) fn opener(&self) -> Opener {
        Opener {
            pid: 0,
            fd: None,
            writable: self.writable,
            mapped: false,
            command: self.what.clone(),
        }
    }
}

pub(super) fn all_kernel_users() -> Vec<KernelUser> {
    let mut users = Vec::new();
    let blocks = std::fs::read_dir("/sys/block").into_iter().flatten();
    for entry in blocks.flatten() {
        let backing = entry.path().join("loop/backing_file");
        if let Ok(backing) = std::fs::read_to_string(backing) {
            let name = entry.file_name().to_string_lossy().into_owned();
            let read_only = std::fs::read_to_string(entry.path().join("ro"));
            users.push(KernelUser {
                path: backing.trim_end_matches('\n').to_owned(),
                what: format!("loop device /dev/{name}"),
                writable: !read_only.is_ok_and(|text| text.trim_end() == "1"),
            });
        }
    }
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    for line in swaps.lines().skip(1) {
        if let Some(file) = line.split_ascii_whitespace().next() {
            users.push(KernelUser {
                // Blanks in a name are written as escapes.
                path: mapdirect_sys::proc::unescape(file),
                what: String::from("swap space (swapoff it first)"),
                writable: true,
            });
        }
    }
    users
}
