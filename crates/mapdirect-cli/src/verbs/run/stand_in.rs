//! The fanotify gate: the program gets the guard's own description when it
//! opens a file, because the gate judges only what was opened behind it.

use super::filter::Subject;
use super::open::{Leads, Opening, Rights, RightsOf};
use super::supervise::{Inode, Obstacle, Supervisor, lock, path_of, word};
use super::target::Target;
use mapdirect::{Guard, PinInPlace};
use mapdirect_sys::seccomp::{self, Notification, Verdict};
use mapdirect_sys::{Errno, proc};
use rustix::fs::OFlags;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::Ordering::SeqCst;

impl Supervisor<'_> {
    /// What becomes of an open; nothing if it has been answered, or nobody waits
    /// any more. Whatever this does not open the program opens by itself.
    pub(crate) fn decide_open(
        &self,
        notification: &Notification,
        subject: Subject,
        in_haste: bool,
    ) -> Option<Verdict> {
        if in_haste || self.out_of_order().is_some() {
            return Some(Verdict::Continue);
        }
        let Ok(target) = Target::new(notification.tid) else {
            return Some(Verdict::Continue);
        };
        let wanted = self.wanted_opening(&target, subject, notification);
        if !seccomp::is_waiting(self.listener(), notification.id) {
            return None;
        }
        match wanted {
            Ok(Some((opening, leads))) => {
                // From here on the program gets what is opened here, or the
                // error: it may have made a file, or emptied it.
                let result = match &leads {
                    Leads::To(file) => self.open_known(notification, &opening, file),
                    Leads::ToNew(directory, name) => opening
                        .make(&target, directory.as_fd(), name)
                        .and_then(|file| {
                            let inode = self.inode(id_of(&file)?);
                            Ok(self.hand_over(notification, &opening, &file, &mut lock(&inode)))
                        }),
                    Leads::Elsewhere => return Some(Verdict::Continue),
                };
                match result {
                    Ok(answered) => answered,
                    // Somebody has made the file just now: the program finds it.
                    Err(Errno::EXIST) if matches!(leads, Leads::ToNew(..)) => {
                        Some(Verdict::Continue)
                    }
                    // This process lacks something, not the program.
                    Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM) => Some(Verdict::Continue),
                    Err(other) => Some(Verdict::Fail(other)),
                }
            }
            _ => Some(Verdict::Continue),
        }
    }

    /// Opens a file that is there, and gives it to the program. One at a time: a
    /// description that is not pinned yet would be in the way of the other's
    /// pin.
    fn open_known(
        &self,
        notification: &Notification,
        opening: &Opening,
        known: &OwnedFd,
    ) -> Result<Option<Verdict>, Errno> {
        let inode = self.inode(id_of(known)?);
        let mut inode = lock(&inode);
        // Nobody maps what can only be written. But where the file is pinned,
        // the gate lets nobody open it so but whoever may pin it.
        let writes_only = opening.access() == OFlags::WRONLY;
        if writes_only && !inode.is_pinned() {
            return Ok(Some(Verdict::Continue));
        }
        let file = opening.open(known.as_fd(), inode.is_pinned(), || announce(known.as_fd()))?;
        if writes_only {
            return Ok(self.give(notification, opening, file.as_fd()));
        }
        Ok(self.hand_over(notification, opening, &file, &mut inode))
    }

    /// An opening of a file that is to be pinned, as far as it can be made here.
    fn wanted_opening(
        &self,
        target: &Target,
        subject: Subject,
        notification: &Notification,
    ) -> Result<Option<(Opening, Leads)>, Errno> {
        let opening = Opening::read(target, subject, &notification.call)?;
        let reads_only = opening.access() == OFlags::RDONLY;
        // A program opens many files that it only reads, and never maps: those
        // are pinned if they are named.
        if !opening.is_of_file() || reads_only && !self.files().are_named() {
            return Ok(None);
        }
        if target.rights()?.rights != *self.own_rights()? {
            return Ok(None);
        }
        let leads = opening.follow(target)?;
        let (at, name) = match &leads {
            Leads::To(file) => (path_of(file.as_fd(), 1), None),
            Leads::ToNew(directory, name) => (path_of(directory.as_fd(), 1), Some(name)),
            Leads::Elsewhere => return Ok(None),
        };
        if name.is_some() && opening.access() == OFlags::WRONLY {
            return Ok(None);
        }
        let path = name.map_or_else(
            || at.clone(),
            |name| {
                let mut path = at.clone();
                if path != OsStr::from_bytes(b"/") {
                    path.push("/");
                }
                path.push(name);
                path
            },
        );
        let Some(matched) = self.files().matching(&path) else {
            return Ok(None);
        };
        self.journal().more()[word::MATCHED].fetch_or(matched, SeqCst);
        Ok(Some((opening, leads)))
    }

    fn own_rights(&self) -> Result<&Rights, Errno> {
        if let Some(known) = self.rights.get() {
            return Ok(known);
        }
        let own = RightsOf::read(std::process::id().cast_signed())?;
        Ok(self.rights.get_or_init(|| own.rights))
    }

    /// Pins a file that was opened for a program, and gives it to it.
    fn hand_over(
        &self,
        notification: &Notification,
        opening: &Opening,
        file: &OwnedFd,
        inode: &mut Inode,
    ) -> Option<Verdict> {
        let pinned = self.pin_open(inode, file);
        match pinned {
            Ok(mut pin) => {
                let stand_in = pin.take_stand_in();
                let given = self.give(
                    notification,
                    opening,
                    stand_in.as_ref().map_or(file.as_fd(), AsFd::as_fd),
                );
                if given.is_none() {
                    inode.look_after(pin);
                }
                given
            }
            Err(obstacle) => {
                let path = path_of(file.as_fd(), 1);
                self.say_not_pinned(&path, &obstacle);
                if self.is_strict() {
                    return Some(Verdict::Fail(Errno::TXTBSY));
                }
                inode.told = true;
                self.give(notification, opening, file.as_fd())
            }
        }
    }

    /// Answers an open by a descriptor of this file.
    fn give(
        &self,
        notification: &Notification,
        opening: &Opening,
        file: BorrowedFd<'_>,
    ) -> Option<Verdict> {
        let close_on_exec = opening.flags.contains(OFlags::CLOEXEC);
        match seccomp::answer_with(self.listener(), notification.id, file, close_on_exec) {
            Ok(()) | Err(Errno::NOENT) => None,
            Err(other) => Some(Verdict::Fail(other)),
        }
    }

    fn pin_open(&self, inode: &mut Inode, file: &OwnedFd) -> Result<PinInPlace, Obstacle> {
        if let Some(obstacle) = inode.refusal() {
            return Err(obstacle);
        }
        let pinned = self.ask(file);
        if let Err(obstacle) = &pinned {
            inode.remember_refusal(obstacle);
        }
        pinned
    }

    /// Under the fanotify gate: whether a file that is being mapped was pinned
    /// when it was opened.
    pub(crate) fn was_pinned(&self, file: &OwnedFd) -> Result<(), Obstacle> {
        let access = rustix::fs::fcntl_getfl(file).unwrap_or(OFlags::empty()) & OFlags::ACCMODE;
        match Guard::from_env().pinned_ranges(file) {
            Ok(pins) if !pins.is_empty() => Ok(()),
            Ok(_) if access == OFlags::RDONLY && !self.files().are_named() => Err(Obstacle {
                why: String::from("it was opened for reading alone, and no --files names it"),
                help: String::from("name it with --files"),
            }),
            Ok(_) => Err(Obstacle {
                why: String::from(
                    "it was opened where that was not seen: before this began, by another \
                     process, by io_uring, by a handle, or with other rights, root directory or \
                     mounts than those of mapdirect",
                ),
                help: String::from("use the bpf gate, which pins what is mapped"),
            }),
            Err(error) => Err(Obstacle {
                why: error.obstacle().to_owned(),
                help: error.help().to_owned(),
            }),
        }
    }

    /// Ends pins of files that were opened for reading alone and that no
    /// program here has any more.
    pub(crate) fn end_unused(&self, inode: &mut Inode, id: (u64, u64), used: &Used) {
        if !inode.lives.is_empty() && !used.has(id) {
            inode.lives.clear();
        }
    }
}

/// The files that supervised programs have open or mapped.
#[derive(Debug, Default)]
pub(crate) struct Used {
    files: HashSet<(u64, u64)>,
    /// A program could not be looked at.
    is_partial: bool,
}

impl Used {
    /// Looks at every process that runs under a filter. Strangers do not count:
    /// they could keep a pin for as long as they like.
    pub(crate) fn look(keeper: i32) -> Self {
        let mut used = Self::default();
        for pid in proc::numbers_in("/proc").unwrap_or_default() {
            if is_supervised(pid, keeper) && used.add(pid).is_err() {
                used.is_partial = !matches!(proc::has_ended(pid), Ok(true) | Err(_));
            }
        }
        used
    }

    fn add(&mut self, pid: i32) -> std::io::Result<()> {
        let place = format!("/proc/{pid}/fd");
        for entry in std::fs::read_dir(&place)? {
            if let Ok(stat) = std::fs::metadata(entry?.path()) {
                self.files.insert((stat.dev(), stat.ino()));
            }
        }
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
        for entry in maps.lines().filter_map(proc::parse_maps_line) {
            let device = rustix::fs::makedev(entry.major, entry.minor);
            self.files.insert((device, entry.inode));
        }
        Ok(())
    }

    fn has(&self, id: (u64, u64)) -> bool {
        self.is_partial || self.files.contains(&id)
    }
}

/// Whether a process has a filter, and descends from the one that started the
/// program, as long as that is there.
fn is_supervised(pid: i32, keeper: i32) -> bool {
    let field = |pid: i32, name: &str| -> Option<i32> {
        let status = proc::read_task_file(pid, "status").ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse().ok()
    };
    if field(pid, "Seccomp:") != Some(2) {
        return false;
    }
    if proc::start_time(keeper).is_err() {
        return true;
    }
    let mut at = pid;
    // No chain of parents is longer than there are processes.
    for _ in 0..4096 {
        if at == keeper {
            return true;
        }
        match field(at, "PPid:") {
            Some(parent) if parent > 0 => at = parent,
            _ => return false,
        }
    }
    true
}

fn id_of(file: &OwnedFd) -> Result<(u64, u64), Errno> {
    rustix::fs::fstat(file).map(|stat| (stat.st_dev, stat.st_ino))
}

fn announce(known: BorrowedFd<'_>) -> Result<(), Errno> {
    mapdirect::announce(known, &Guard::from_env())
        .map_err(|error| Errno::from_raw_os_error(error.errno()))
}
