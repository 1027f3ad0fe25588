//! Kernel modules: the few that lead to the rest, and where the rest is.

use anyhow::{Context, Result};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::io::Errno;
use std::fs::{self, File};
use std::path::Path;

/// Loads every module in a directory, in the order of their names.
pub(crate) fn load(directory: &Path) -> Result<()> {
    let mut paths: Vec<_> = fs::read_dir(directory)
        .with_context(|| format!("the initramfs has no {}", directory.display()))?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    paths.sort();
    for path in paths {
        let file = File::open(&path)?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => {
                return Err(errno).with_context(|| format!("cannot load {}", path.display()));
            }
        }
    }
    Ok(())
}

/// Puts the kernel's modules where modprobe looks for them, so that the
/// kernel loads what it is asked for, and makes the device files that ask.
pub(crate) fn show(outside: &Path) -> Result<()> {
    let release = outside
        .file_name()
        .context("the directory of the modules has no name")?;
    let here = Path::new("/lib/modules").join(release);
    fs::create_dir_all(&here)?;
    rustix::mount::mount_bind(outside, &here)?;
    let devices = fs::read_to_string(here.join("modules.devname")).unwrap_or_default();
    for line in devices.lines() {
        if let Some((path, kind, device)) = parse_device(line) {
            let path = Path::new("/dev").join(path);
            fs::create_dir_all(path.parent().unwrap_or(Path::new("/dev")))?;
            match mknodat(CWD, &path, kind, Mode::from_raw_mode(0o600), device) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => {
                    return Err(errno).with_context(|| format!("cannot make {}", path.display()));
                }
            }
        }
    }
    Ok(())
}

/// Reads a line such as `loop loop-control c10:237`.
fn parse_device(line: &str) -> Option<(&str, FileType, u64)> {
    let mut words = line.split(' ');
    let (_module, path, device) = (words.next()?, words.next()?, words.next()?);
    let (kind, numbers) = if let Some(numbers) = device.strip_prefix('c') {
        (FileType::CharacterDevice, numbers)
    } else {
        (FileType::BlockDevice, device.strip_prefix('b')?)
    };
    let (major, minor) = numbers.split_once(':')?;
    let device = makedev(major.parse().ok()?, minor.parse().ok()?);
    Some((path, kind, device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices() {
        assert_eq!(
            parse_device("loop loop-control c10:237"),
            Some(("loop-control", FileType::CharacterDevice, makedev(10, 237)))
        );
        assert_eq!(
            parse_device("a b/c b7:1"),
            Some(("b/c", FileType::BlockDevice, makedev(7, 1)))
        );
        assert_eq!(parse_device("# Device nodes to trigger loading."), None);
        assert_eq!(parse_device("x y p1:2"), None);
        assert_eq!(parse_device(""), None);
    }
}
