//! The directory of the bpf filesystem in which a gate is pinned.

use super::attach::LINKS;
use super::load::{LoadError, failed};
use libbpf_rs::{MapCore, MapHandle};
use mapdirect_sys::Errno;
use mapdirect_sys::names::path_in_line;
use rustix::fs::{FlockOperation, Mode, OFlags};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long to wait for another guard to end, and how long to wait for several
/// others, one after the other, to find out that the gate cannot be loaded
/// here.
pub(super) const ENDING: Duration = Duration::from_secs(2);

const TRYING: Duration = Duration::from_secs(30);

/// Claims the directory. If need be, this creates the directory and mounts a
/// bpf filesystem; the result says whether it mounted one. Another guard may be
/// doing the same right now, or may be removing everything again.
pub(super) fn enter(directory: &Path) -> Result<(OwnedFd, bool), LoadError> {
    let begun = Instant::now();
    let mut mounted = false;
    loop {
        mounted |= mount_bpffs(directory)?;
        let error = match rustix::fs::mkdir(directory, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => match claim(directory) {
                Ok(claim) if is_at(&claim, directory) => return Ok((claim, mounted)),
                // The directory has been removed since.
                Ok(_) => failed("claiming", path_in_line(directory)),
                Err(error) => error,
            },
            Err(errno) => {
                let error = match errno {
                    Errno::PERM | Errno::ACCESS => LoadError::NotPrivileged,
                    _ => LoadError::Unsupported(format!(
                        "making {}: {errno}",
                        path_in_line(directory)
                    )),
                };
                if is_bpffs(parent_of(directory)) {
                    return Err(error);
                }
                // The filesystem was unmounted since.
                error
            }
        };
        let patience = if has_marker(directory) {
            ENDING
        } else {
            TRYING
        };
        if begun.elapsed() >= patience {
            return Err(error);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a directory is the one at a path.
fn is_at(directory: &OwnedFd, path: &Path) -> bool {
    let identity = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
    let here = rustix::fs::fstat(directory).map(identity);
    here.is_ok() && here == rustix::fs::stat(path).map(identity)
}

/// Removes the gate, and with it every pin that it kept.
pub(super) fn unload(directory: &Path) -> Result<bool, LoadError> {
    if !directory.exists() {
        return Ok(false);
    }
    let _claim = claim(directory)?;
    // The kernel releases programs only after a while. Without entries they
    // find nothing to refuse from now on.
    if let Ok(entries) = MapHandle::from_pinned_path(directory.join("entries")) {
        let keys: Vec<_> = entries.keys().collect();
        for key in keys {
            let _ = entries.delete(&key);
        }
    }
    remove(directory)?;
    Ok(true)
}

/// The same for a caller that has the claim.
pub(super) fn remove(directory: &Path) -> Result<(), LoadError> {
    empty(directory)
        .and_then(|()| std::fs::remove_dir(directory))
        .map_err(|error| failed(&format!("removing {}", path_in_line(directory)), error))
}

pub(super) fn has_marker(directory: &Path) -> bool {
    std::fs::read_dir(directory).is_ok_and(|entries| {
        entries
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().starts_with("version-"))
    })
}

/// Removes the links first, so that nothing is refused any more when the pins
/// go. The marker of a complete gate goes last, so that nobody takes over the
/// rest of one.
pub(super) fn empty(directory: &Path) -> std::io::Result<()> {
    empty_but(directory, None)
}

pub(super) fn empty_but(directory: &Path, kept: Option<&Path>) -> std::io::Result<()> {
    let mut names: Vec<_> = std::fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<std::io::Result<_>>()?;
    names.sort_by_key(|name| {
        let name = name.to_string_lossy();
        (name.starts_with("version-"), !name.starts_with(LINKS))
    });
    for name in names {
        let path = directory.join(&name);
        if kept == Some(&path) {
            continue;
        }
        if path.is_dir() {
            empty(&path)?;
            std::fs::remove_dir(path)?;
        } else {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}

pub(super) fn claim(directory: &Path) -> Result<OwnedFd, LoadError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let file = rustix::fs::open(directory, flags, Mode::empty())
        .map_err(|errno| failed(&format!("opening {}", path_in_line(directory)), errno))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::AGAIN) => Err(LoadError::AlreadyRunning(path_in_line(directory))),
        Err(errno) => Err(failed("flock", errno)),
    }
}

/// BPF_FS_MAGIC, include/uapi/linux/magic.h.
const BPF_FS: u64 = 0xcafe_4a11;

fn parent_of(directory: &Path) -> &Path {
    directory.parent().unwrap_or(Path::new("/"))
}

fn is_bpffs(path: &Path) -> bool {
    rustix::fs::statfs(path)
        .is_ok_and(|stat| u64::from_ne_bytes(stat.f_type.to_ne_bytes()) & 0xffff_ffff == BPF_FS)
}

/// Mounts the bpf filesystem if it is not there, and says whether it did.
pub(super) fn mount_bpffs(directory: &Path) -> Result<bool, LoadError> {
    let parent = parent_of(directory);
    if is_bpffs(parent) {
        return Ok(false);
    }
    if parent != Path::new("/sys/fs/bpf") {
        return Err(LoadError::Failed(format!(
            "{} is not on a bpf filesystem",
            path_in_line(directory)
        )));
    }
    let mounted = rustix::mount::mount(
        "bpf",
        parent,
        "bpf",
        rustix::mount::MountFlags::empty(),
        Some(c"mode=0700"),
    );
    match mounted {
        Ok(()) => Ok(true),
        Err(_) if is_bpffs(parent) => Ok(false),
        Err(Errno::PERM | Errno::ACCESS) => Err(LoadError::NotPrivileged),
        Err(errno) => Err(LoadError::Unsupported(format!(
            "there is no bpf filesystem to mount at {} ({errno})",
            path_in_line(parent)
        ))),
    }
}
