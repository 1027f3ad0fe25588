//! Takes over pins that an earlier guard has left in the kernel.
//!
//! The gate has kept these pins all the while. Their block maps are unchanged,
//! so the guard can read again what it must tell the gate when something
//! changes.

use super::{Found, Gate};
use crate::Guard;
use crate::family::Family;
use crate::grant::pending::lock;
use crate::grant::{Granting, Judged, Survey, arm, judge, length_of, system};
use crate::table::{InodeId, Pin, Watched};
use crate::tripwire::Armed;
use mapdirect_proto::{PinRequest, Refusal};
use mapdirect_sys::file_handle::FileHandle;
use mapdirect_sys::unix::Sender;
use mapdirect_sys::{Errno, file_handle, proc_mountinfo};
use rustix::fs::{Mode, OFlags};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Takes over every live pin. A pin that cannot be read stays in the kernel as
/// it is, and ends when its description does.
pub(crate) fn adopt(guard: &Guard, gate: &Gate) {
    let all = gate.left_behind();
    let mut untold = Vec::new();
    let mut known = Vec::new();
    for found in &all {
        match recognise(guard, found) {
            Ok(one) => known.push((found, one)),
            Err(_) => untold.push(found),
        }
    }
    // Settle them only after all are known: a process that maps a file may be
    // the holder of another pin.
    for (found, one) in known {
        if one.settle(guard, found).is_err() {
            untold.push(found);
        }
    }
    for found in &untold {
        // The entry in the kernel contains pins that are not known here, so it
        // must not be overwritten with fewer pins.
        if let Some(watched) = guard.table.get(found.inode) {
            guard.table.remove(&watched);
        }
        gate.keep(found.inode, Some(&found.handle));
    }
    for watched in guard.table.all() {
        // The maps had room for these pins before, and have it again.
        let _ = gate.publish(&watched);
    }
    let inodes: Vec<_> = all.iter().map(|found| found.inode).collect();
    gate.take_over(&inodes);
}

/// Opens the inode of a pin through any mount of its filesystem.
pub(crate) fn open(id: InodeId, handle: &FileHandle) -> Result<OwnedFd, Errno> {
    let device = id.device();
    let mounts = proc_mountinfo::read(None).map_err(|_| Errno::IO)?;
    let mut last = Errno::NODEV;
    for mount in mounts
        .iter()
        .filter(|mount| (mount.major, mount.minor) == (device.major, device.minor))
    {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let Ok(place) = rustix::fs::open(mount.mount_point.as_str(), flags, Mode::empty()) else {
            continue;
        };
        match file_handle::open(place.as_fd(), handle, OFlags::RDWR) {
            Ok(file) => {
                let stat = rustix::fs::fstat(&file)?;
                if (stat.st_dev, stat.st_ino) == (id.dev, id.inode) {
                    return Ok(file);
                }
            }
            Err(errno) => last = errno,
        }
    }
    Err(last)
}

/// A pin that is known again, but whose blocks are not read yet.
struct Recognised {
    judged: Judged,
    watched: Arc<Watched>,
    pin: Arc<Pin>,
    _armed: Armed,
}

fn recognise(guard: &Guard, found: &Found) -> Result<Recognised, Refusal> {
    let file = open(found.inode, &found.handle)
        .map_err(|errno| system("opening it by its handle", errno))?;
    let request = PinRequest {
        offset: found.range.start,
        length: length_of(&found.range),
        flags: found.flags,
        patience_ms: 0,
    };
    let mut judged: Judged = judge(guard, &request, file.as_fd())?;
    judged.range = found.range.clone();
    judged.mapped.clone_from(&found.mapped);
    let armed = arm(guard, &judged, file.as_fd())?;
    let watched = judged.watched(guard);
    let owner = Sender {
        pid: found.pid,
        uid: found.uid,
    };
    let pin = judged.unsettled(found.id, found.flags, owner);
    let family = Family::that_began(found.pid, found.began);
    let pin = Arc::new(pin.of_family(family.map(Arc::new)));
    if found.until != 0 {
        let bytes = found.range.end - found.range.start;
        let delegation = &guard.delegation;
        pin.is_delegated_by(delegation.claim_again(found.uid, bytes, found.until));
        delegation.deadlines.add(found.inode, &pin);
    }
    watched.add(&pin);
    Ok(Recognised {
        judged,
        watched,
        pin,
        _armed: armed,
    })
}

impl Recognised {
    /// Reads the block map of the pin again, which is unchanged.
    fn settle(self, guard: &Guard, found: &Found) -> Result<(), Refusal> {
        // Opened once more, because there may be more pins than descriptors.
        let file = open(found.inode, &found.handle)
            .map_err(|errno| system("opening it by its handle", errno))?;
        let patience = Duration::from_secs(1);
        let _state = lock(&self.watched, patience)?;
        let granting = Granting {
            guard,
            judged: &self.judged,
            watched: &self.watched,
            pin: &self.pin,
            patience,
        };
        let survey = Survey {
            granting: &granting,
            file: file.as_fd(),
            others_can_store: &|frozen| {
                guard.gate.others_can_store(&granting, file.as_fd(), frozen)
            },
        };
        let (map, found) = survey.until_at_rest(true)?;
        self.pin.settle(&map, &found.pinned, found.kept_pages);
        self.pin.hand_over();
        Ok(())
    }
}
