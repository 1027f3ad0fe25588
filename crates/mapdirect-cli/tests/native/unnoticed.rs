//! The guard leaves no trace in other people's lives: mounts are not busy for
//! it, and programs that watch files do not hear of it.

use crate::world::{World, open, pin, written};
use libtest_mimic::Trial;
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::{Disk, Kind};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

pub fn trials(world: &World) -> Vec<Trial> {
    if Gate::under_test() == Gate::Bpf {
        // That gate opens nothing when others read.
        return Vec::new();
    }
    world.trials(
        "unnoticed",
        &[Kind::XFS, Kind::EXT4],
        &[
            ("unmount-after-reading", unmount_after_reading),
            ("unmount-after-a-pin", unmount_after_a_pin),
            ("inotify", inotify),
        ],
    )
}

/// A second mount of a disk, for a moment.
struct Bound(PathBuf);

impl Bound {
    fn new(disk: &Disk, name: &str) -> Self {
        let path = disk.path(name);
        std::fs::create_dir_all(&path).unwrap();
        mount_bind(disk.path("."), &path).unwrap();
        Self(path)
    }

    /// Unmounts it; says whether that worked at once.
    fn unmount(self) -> bool {
        let at_once = unmount(&self.0, UnmountFlags::empty()).is_ok();
        for _ in 0..500 {
            if at_once || unmount(&self.0, UnmountFlags::empty()).is_ok() {
                return at_once;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{} cannot be unmounted", self.0.display());
    }
}

fn unmount_after_reading(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = written(&disk, "unnoticed-read", 1 << 16);
    let guard = world.guard().client();
    let pin = pin(&guard, &open(&path), 0..65536);
    let busy = (0..100).filter(|_| {
        let bound = Bound::new(&disk, "unnoticed-mount");
        let file = File::open(bound.0.join("unnoticed-read")).unwrap();
        file.read_exact_at(&mut [0; 10], 0).unwrap();
        drop(file);
        !bound.unmount()
    });
    assert_eq!(busy.count(), 0, "of 100 mounts are busy");
    drop(pin);
    std::fs::remove_file(path).unwrap();
    std::fs::remove_dir(disk.path("unnoticed-mount")).unwrap();
}

fn unmount_after_a_pin(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = written(&disk, "unnoticed-pin", 1 << 16);
    let guard = world.guard().client();
    let busy = (0..20).filter(|_| {
        let bound = Bound::new(&disk, "unnoticed-pins");
        let file = open(&bound.0.join("unnoticed-pin"));
        let pin = pin(&guard, &file, 0..65536);
        // The guard lets go of its own copy as soon as it has sent it.
        std::thread::sleep(Duration::from_millis(20));
        drop((pin, file));
        !bound.unmount()
    });
    assert_eq!(busy.count(), 0, "of 20 mounts are busy");
    std::fs::remove_file(path).unwrap();
    std::fs::remove_dir(disk.path("unnoticed-pins")).unwrap();
}

fn inotify(world: &World, kind: Kind) {
    const READS: usize = 100;
    let disk = world.disk(kind);
    let path = written(&disk, "unnoticed-watch", 1 << 16);
    let guard = world.guard().client();
    let pin = pin(&guard, &open(&path), 0..65536);
    // What the pin itself did is over.
    std::thread::sleep(Duration::from_millis(300));
    let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&watch, &path, WatchFlags::ALL_EVENTS).unwrap();
    for _ in 0..READS {
        let file = File::open(&path).unwrap();
        file.read_exact_at(&mut [0; 10], 0).unwrap();
        drop(file);
        std::thread::sleep(Duration::from_millis(3));
    }
    std::thread::sleep(Duration::from_millis(200));
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(&watch, &mut buffer);
    let mut seen = [0; 2];
    let mut other = Vec::new();
    while let Ok(event) = reader.next() {
        match event.events() {
            ReadFlags::OPEN => seen[0] += 1,
            ReadFlags::CLOSE_NOWRITE => seen[1] += 1,
            ReadFlags::ACCESS => {}
            more => other.push(more),
        }
    }
    assert_eq!(seen, [READS; 2], "opens and closes; {other:?}");
    assert!(other.is_empty(), "{other:?}");
    drop(pin);
    std::fs::remove_file(path).unwrap();
}
