//! The perf events themselves: a ring for each processor, and the tracepoints
//! of each filesystem that has pins.
//!
//! A change of the listened files leaves no gap: the new events are enabled
//! before the old ones are closed. A record that comes twice meanwhile causes
//! only one look.

use super::filter::Cover;
use super::points::{About, Told, Tracepoints};
use crate::Errno;
use crate::table::InodeId;
use mapdirect_model::facts::Filesystem;
use mapdirect_sys::file_handle::FileHandle;
use mapdirect_sys::perf_event::{Event, Ring, Wake};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::CString;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// The size of a ring in bytes: room for some 2,000 records of 128 bytes.
const RING: usize = 256 << 10;

/// A file that is listened to, and the handle to open it for a look.
#[derive(Debug)]
pub(super) struct Listened {
    pub(super) id: InodeId,
    pub(super) handle: FileHandle,
    /// Whether nothing of the file was pinned at the last check.
    idle: AtomicBool,
}

impl Listened {
    pub(super) fn new(id: InodeId, handle: FileHandle) -> Self {
        Self {
            id,
            handle,
            idle: AtomicBool::new(false),
        }
    }
}

/// A processor, and the ring to which its tracepoints write.
#[derive(Debug)]
struct Processor {
    number: u32,
    owner: Arc<Event>,
    ring: Ring,
}

impl Processor {
    fn new(number: u32) -> Result<Self, Errno> {
        let owner = Event::dummy(number, RING)?;
        let ring = Ring::new(&owner, RING)?;
        Ok(Self {
            number,
            owner: Arc::new(owner),
            ring,
        })
    }
}

/// A filesystem that is listened to.
#[derive(Debug)]
struct Wire {
    points: Arc<Tracepoints>,
    cover: Cover,
    files: BTreeMap<u64, Arc<Listened>>,
    /// Closing these events ends the listening.
    events: Vec<Event>,
}

/// All filesystems that are listened to.
#[derive(Debug)]
pub(super) struct Wires {
    /// The online processors, as `/sys` lists them.
    online: String,
    processors: Vec<Processor>,
    of: HashMap<u64, Wire>,
    points: HashMap<&'static str, Arc<Tracepoints>>,
}

/// Why something cannot be listened to.
#[derive(Debug, thiserror::Error)]
pub(super) enum CannotArm {
    #[error(transparent)]
    Missing(#[from] super::points::Missing),
    #[error("perf_event_open failed: {0}")]
    System(#[from] Errno),
}

impl Wires {
    pub(super) fn new() -> Result<Self, CannotArm> {
        let mut wires = Self {
            online: String::new(),
            processors: Vec::new(),
            of: HashMap::new(),
            points: HashMap::new(),
        };
        wires.look_at_processors()?;
        if wires.processors.is_empty() {
            return Err(CannotArm::System(Errno::NODEV));
        }
        Ok(wires)
    }

    /// Listens to a file from now on, if not already.
    pub(super) fn listen(
        &mut self,
        filesystem: &Filesystem,
        file: Listened,
    ) -> Result<Arc<Listened>, CannotArm> {
        let id = file.id;
        let points = self.points_of(filesystem)?;
        let wire = self.of.entry(id.dev).or_insert_with(|| Wire {
            points,
            cover: Cover::default(),
            files: BTreeMap::new(),
            events: Vec::new(),
        });
        // The inode number of a deleted file is used again, so the handle
        // identifies the file.
        if let Some(known) = wire.files.get(&id.inode)
            && known.handle == file.handle
        {
            known.idle.store(false, SeqCst);
            return Ok(Arc::clone(known));
        }
        let listened = Arc::new(file);
        wire.files.insert(id.inode, Arc::clone(&listened));
        if wire.cover.covers(id.inode) {
            return Ok(listened);
        }
        let inodes: BTreeSet<u64> = wire.files.keys().copied().collect();
        let cover = Cover::of(&inodes, Some(id.inode));
        if let Err(errno) = wire.rearm(id.dev, &self.processors, cover) {
            wire.files.remove(&id.inode);
            if wire.files.is_empty() {
                self.of.remove(&id.dev);
            }
            return Err(errno.into());
        }
        Ok(listened)
    }

    fn points_of(&mut self, filesystem: &Filesystem) -> Result<Arc<Tracepoints>, CannotArm> {
        let name = match filesystem {
            Filesystem::Xfs => "xfs",
            _ => "ext4",
        };
        if let Some(found) = self.points.get(name) {
            return Ok(Arc::clone(found));
        }
        let found = Arc::new(Tracepoints::find(filesystem)?);
        self.points.insert(name, Arc::clone(&found));
        Ok(found)
    }

    /// The file with this inode number, if it is listened to.
    pub(super) fn listened(&self, id: InodeId) -> Option<Arc<Listened>> {
        self.of.get(&id.dev)?.files.get(&id.inode).cloned()
    }

    /// All files listened to.
    pub(super) fn all(&self) -> Vec<Arc<Listened>> {
        let files = self.of.values().flat_map(|wire| wire.files.values());
        files.cloned().collect()
    }

    /// Whether nothing is listened to.
    pub(super) fn is_idle(&self) -> bool {
        self.of.is_empty()
    }

    /// Whether events of files that are not pinned may come as well. Such
    /// events wake nobody, so the rings must be read now and then.
    pub(super) fn hears_more(&self) -> bool {
        self.of.values().any(|wire| !wire.cover.is_exact())
    }

    /// The descriptors that become readable with a record.
    pub(super) fn descriptors(&self) -> Vec<Arc<Event>> {
        let processors = self.processors.iter();
        processors
            .map(|processor| Arc::clone(&processor.owner))
            .collect()
    }

    /// Hands out the records in the rings. A record about a filesystem is
    /// handed out for each of its files. Says whether records may be lost.
    pub(super) fn drain(&mut self, mut each: impl FnMut(InodeId, Told, Who)) -> bool {
        let Self {
            processors,
            points,
            of,
            ..
        } = self;
        let mut lost = false;
        for processor in processors {
            lost |= processor.ring.drain(|sample| {
                let told = points
                    .values()
                    .find_map(|points| points.understand(sample.raw));
                let Some(told) = told else {
                    return;
                };
                let dev = user_device(told.device);
                let Some(wire) = of.get(&dev) else {
                    return;
                };
                let who = Who {
                    pid: sample.pid,
                    tid: sample.tid,
                    time: sample.time,
                };
                match told.inode {
                    Some(inode) if wire.files.contains_key(&inode) => {
                        each(InodeId { dev, inode }, told, who);
                    }
                    Some(_) => {}
                    None => {
                        for &inode in wire.files.keys() {
                            each(InodeId { dev, inode }, told, who);
                        }
                    }
                }
            });
        }
        lost
    }

    /// Stops listening to files for which `is_needed` has said no twice, and to
    /// inodes that were covered in advance. Returns the events to close, which
    /// takes the kernel some time.
    pub(super) fn tidy(&mut self, is_needed: impl Fn(InodeId) -> bool) -> Vec<Event> {
        let mut closed = Vec::new();
        let Self { of, processors, .. } = self;
        of.retain(|dev, wire| {
            wire.files.retain(|_, file| {
                // A grant under way or a look has a reference, too.
                let needed = Arc::strong_count(file) > 1 || is_needed(file.id);
                let was_idle = file.idle.swap(!needed, SeqCst);
                needed || !was_idle
            });
            if wire.files.is_empty() {
                closed.append(&mut wire.events);
                return false;
            }
            let inodes: BTreeSet<u64> = wire.files.keys().copied().collect();
            let cover = Cover::of(&inodes, None);
            if cover != wire.cover {
                // If this fails, more events come than are needed.
                let _ = wire.rearm(*dev, processors, cover);
            }
            true
        });
        closed
    }

    /// Adjusts to processors that come and go. Says whether a processor came,
    /// because something may have been missed on it.
    pub(super) fn look_at_processors(&mut self) -> Result<bool, Errno> {
        let online = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
        if online == self.online {
            return Ok(false);
        }
        let numbers = listed(&online).unwrap_or_else(|| BTreeSet::from([0]));
        let before = listed(&self.online).unwrap_or_default();
        for number in numbers.difference(&before) {
            match Processor::new(*number) {
                // An older ring of this processor, from before it went offline,
                // stays empty for ever.
                Ok(processor) => {
                    self.processors.retain(|other| other.number != *number);
                    self.processors.push(processor);
                }
                // The processor went offline again.
                Err(Errno::NODEV) => {}
                Err(errno) => return Err(errno),
            }
        }
        for (dev, wire) in &mut self.of {
            let cover = wire.cover.clone();
            wire.rearm(*dev, &self.processors, cover)?;
        }
        self.online = online;
        Ok(true)
    }
}

impl Wire {
    fn rearm(&mut self, dev: u64, processors: &[Processor], cover: Cover) -> Result<(), Errno> {
        let wake = if cover.is_exact() {
            Wake::Always
        } else {
            Wake::Seldom
        };
        let mut events = Vec::with_capacity(self.points.0.len() * processors.len());
        for point in &self.points.0 {
            let device = kernel_device(dev);
            let filter = match point.about {
                About::File => cover.filter(device, point.condition),
                About::Filesystem => format!("dev == {device}"),
            };
            let filter = CString::new(filter).map_err(|_| Errno::INVAL)?;
            for processor in processors {
                let event = match Event::tracepoint(point.id(), processor.number, wake) {
                    Err(Errno::NODEV) => continue,
                    opened => opened?,
                };
                event.set_filter(&filter)?;
                event.output_to(&processor.owner)?;
                event.enable()?;
                events.push(event);
            }
        }
        // Only now close the old events.
        self.events = events;
        self.cover = cover;
        Ok(())
    }
}

/// The thread that hit a tracepoint, and when it did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Who {
    pub(super) pid: i32,
    pub(super) tid: i32,
    /// The time in nanoseconds of the monotonic clock.
    pub(super) time: u64,
}

/// `MKDEV` (include/linux/kdev_t.h): how the kernel itself numbers devices.
fn kernel_device(dev: u64) -> u32 {
    rustix::fs::major(dev) << 20 | rustix::fs::minor(dev) & 0xf_ffff
}

fn user_device(device: u32) -> u64 {
    rustix::fs::makedev(device >> 20, device & 0xf_ffff)
}

/// Reads a list like `0-3,5`.
pub(super) fn listed(text: &str) -> Option<BTreeSet<u32>> {
    /// More processors than any kernel supports.
    const MOST: u32 = 1 << 16;
    let mut numbers = BTreeSet::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if last >= MOST {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_are_read() {
        assert_eq!(listed("0\n"), Some(BTreeSet::from([0])));
        assert_eq!(listed("0-2,5\n"), Some(BTreeSet::from([0, 1, 2, 5])));
        for text in ["", "x", "0-", "0-4294967295", "-1"] {
            assert_eq!(listed(text), None, "{text:?}");
        }
    }

    #[test]
    fn devices_are_numbered_both_ways() {
        for (major, minor) in [(7, 1), (259, 70_000), (4095, 0xf_ffff)] {
            let dev = rustix::fs::makedev(major, minor);
            assert_eq!(user_device(kernel_device(dev)), dev);
        }
        assert_eq!(kernel_device(rustix::fs::makedev(7, 1)), 7 << 20 | 1);
    }
}
