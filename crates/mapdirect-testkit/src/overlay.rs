//! A file changed through an overlay that somebody mounts above it.

use crate::fault::Access;
use crate::process::{Helper, answer, listen, parse_answer, say};
use crate::raw::{self, PlainMap};
use anyhow::{Context, Result, bail, ensure};
use mapdirect_sys::Errno;
use rustix::fs::{Mode, OFlags, SeekFrom, seek};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, mount, mount_change,
};
use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Who mounts it, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Root, in a mount namespace of its own.
    Root,
    /// A user without any privilege, in a user namespace.
    Nobody,
    /// Root, who mounts it nowhere: it is in nobody's list of mounts.
    Detached,
}

impl Owner {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Root, Self::Nobody, Self::Detached];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Nobody => "nobody",
            Self::Detached => "detached",
        }
    }
}

/// What is done through an overlay; the file lies in its upper directory, but
/// for `copy-up`, where it lies in a lower one.
pub const OPERATIONS: [&str; 6] = ["write", "splice", "sendfile", "mmap", "punch", "truncate"];

/// Somebody with an overlay above a file.
#[derive(Debug)]
pub struct Above {
    helper: Helper,
}

impl Above {
    /// Mounts one above the directory `up` of `base`, in which the file `f`
    /// is. `early`: opens the file now, if the operation does so at all. The
    /// error says why there can be no such overlay here.
    pub fn new(
        base: &Path,
        owner: Owner,
        operation: &str,
        early: bool,
    ) -> Result<std::result::Result<Self, String>> {
        let base = base.to_string_lossy();
        let early = early.to_string();
        let mut helper = Helper::start("overlay", &[&base, owner.name(), operation, &early])?;
        let line = helper.hear()?;
        Ok(if line == "ready" {
            Ok(Self { helper })
        } else {
            Err(line)
        })
    }

    /// Does it, at an offset.
    pub fn attack(&mut self, offset: u64) -> Result<std::result::Result<(), Errno>> {
        self.helper.tell(&offset.to_string())?;
        parse_answer(&self.helper.hear()?)
    }
}

/// Role: see [`Above::new`]. For each line, which is an offset, it does its
/// operation.
pub fn play(arguments: &[String]) -> Result<()> {
    let [base, owner, operation, early] = arguments else {
        bail!("wrong arguments");
    };
    let owner = Owner::ALL
        .into_iter()
        .find(|known| known.name() == owner)
        .context("no such owner")?;
    let (merged, _mount) = match mount_above(Path::new(base), owner, operation == "copy-up") {
        Ok(mounted) => mounted,
        Err(error) => {
            say(&format!("no overlay by {}: {error:#}", owner.name()));
            return Ok(());
        }
    };
    let path = merged.join("f");
    let open = || rustix::fs::open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let file = if early == "true" && operation != "truncate" {
        Some(open()?)
    } else {
        None
    };
    say("ready");
    while let Some(line) = listen()? {
        let offset = line.parse()?;
        let result = match (operation.as_str(), &file) {
            ("truncate", _) => raw::truncate(&raw::c_path(&path), offset),
            (_, Some(file)) => change(file, operation, offset),
            (_, None) => open().and_then(|file| change(&file, operation, offset)),
        };
        say(&answer(result));
    }
    Ok(())
}

/// Where it is mounted, and what keeps it if that is nowhere.
fn mount_above(base: &Path, owner: Owner, as_lower: bool) -> Result<(PathBuf, Option<OwnedFd>)> {
    if owner == Owner::Nobody {
        raw::become_nobody()?;
        raw::own_mount_namespace(true)?;
        let id = raw::NOBODY;
        for (file, text) in [
            ("setgroups", String::from("deny")),
            ("uid_map", format!("0 {id} 1")),
            ("gid_map", format!("0 {id} 1")),
        ] {
            fs::write(format!("/proc/self/{file}"), text)?;
        }
    } else {
        raw::own_mount_namespace(false)?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private)?;
    }
    let mine = |name: &str| base.join(format!("{name}-{}", std::process::id()));
    let (other, work, merged) = (mine("other"), mine("work"), mine("merged"));
    for directory in [&other, &work, &merged] {
        fs::create_dir(directory)?;
    }
    let up = base.join("up");
    let (lower, upper) = if as_lower {
        (&up, &other)
    } else {
        (&other, &up)
    };
    let options = [("lowerdir", lower), ("upperdir", upper), ("workdir", &work)];
    if owner == Owner::Detached {
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (name, path) in options {
            fsconfig_set_string(context.as_fd(), name, path)?;
        }
        fsconfig_create(context.as_fd())?;
        let mount = fsmount(
            context.as_fd(),
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::empty(),
        )?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
        return Ok((path, Some(mount)));
    }
    let options: Vec<String> = options
        .iter()
        .map(|(name, path)| format!("{name}={}", path.display()))
        .collect();
    let mut options = options.join(",");
    if owner == Owner::Nobody {
        options.push_str(",userxattr");
    }
    let options = CString::new(options)?;
    mount(
        "overlay",
        &merged,
        "overlay",
        MountFlags::empty(),
        Some(options.as_c_str()),
    )?;
    ensure!(merged.join("f").exists(), "it does not show the file");
    Ok((merged, None))
}

fn change(file: &OwnedFd, operation: &str, offset: u64) -> raw::Result<()> {
    const LENGTH: usize = 4096;
    let bytes = [0x79; LENGTH];
    match operation {
        "write" | "copy-up" => rustix::io::pwrite(file, &bytes, offset).map(drop),
        "splice" => {
            let (reader, writer) = rustix::pipe::pipe()?;
            rustix::io::write(&writer, &bytes)?;
            let mut at = offset;
            let flags = rustix::pipe::SpliceFlags::empty();
            rustix::pipe::splice(&reader, None, file, Some(&mut at), LENGTH, flags).map(drop)
        }
        "sendfile" => {
            let from = rustix::fs::open("/bin/true", OFlags::RDONLY, Mode::empty())?;
            seek(file, SeekFrom::Start(offset))?;
            rustix::fs::sendfile(file, &from, Some(&mut 0), LENGTH).map(drop)
        }
        "mmap" => {
            let both = libc::PROT_READ | libc::PROT_WRITE;
            let map = PlainMap::new(file.as_fd(), both, libc::MAP_SHARED, offset, LENGTH)?;
            match map.try_store(0, 0x79) {
                Access::Went(_) => Ok(()),
                _ => Err(Errno::TXTBSY),
            }
        }
        "punch" => raw::fallocate(file.as_fd(), 3, offset, LENGTH as u64),
        _ => Err(Errno::INVAL),
    }
}
