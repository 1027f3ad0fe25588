//! Caches and raw I/O: every statement of docs/raw-access.md.

use super::forms::device_of;
use super::{Aligned, direct, read_direct};
use crate::world::{World, open, pin, wait_until_free, written};
use mapdirect_testkit::Kind;
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// A byte of a file, by way of its page cache.
fn cached(file: &File) -> u8 {
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0).unwrap();
    byte[0]
}

/// Drops the pages of a file or a device that are clean and not mapped.
fn drop_pages(file: &File) {
    fadvise(file, 0, None, Advice::DontNeed).unwrap();
}

pub fn of_caches(world: &World, kind: Kind) {
    let guard = world.guard();
    let disk = world.disk(kind);
    let path = written(&disk, "extents-coherence", 4096);
    // Before it is pinned: under the fanotify gate nobody opens it for writing
    // afterwards.
    let device = device_of(&disk);
    let at = |file: &File| {
        let map = mapdirect::block_map(file, 0..4096).unwrap();
        map.extents()[0].physical.unwrap()
    };
    let offset = at(&open(&path));
    let on_device = || read_direct(&device, offset, 4096)[0];
    let write_raw = |byte: u8| {
        let mut memory = Aligned::new(4096);
        memory.bytes().fill(byte);
        direct(&device)
            .write_all_at(memory.bytes(), offset)
            .unwrap();
    };
    let through_cache = File::open(&device).unwrap();
    let in_device_cache = || {
        let mut byte = [0];
        through_cache.read_exact_at(&mut byte, offset).unwrap();
        byte[0]
    };

    // What is written gets to the device when it is synced, and not before.
    let file = open(&path);
    assert_eq!((on_device(), in_device_cache()), (7, 7));
    file.write_all_at(&[1; 4096], 0).unwrap();
    assert_eq!((cached(&file), on_device()), (1, 7), "it is dirty");
    file.sync_all().unwrap();
    assert_eq!(at(&file), offset, "the block is the same");
    assert_eq!(on_device(), 1);
    // The page cache of the device is another one, and nobody tells it.
    assert_eq!(in_device_cache(), 7, "stale");
    drop_pages(&through_cache);
    assert_eq!(in_device_cache(), 1);
    drop(file);

    // A pin has what is dirty written first.
    let file = open(&path);
    file.write_all_at(&[2; 4096], 0).unwrap();
    drop(file);
    let reader = File::open(&path).unwrap();
    let pinned = pin(&guard.client(), &reader, 0..4096);
    assert_eq!((at(&reader), on_device()), (offset, 2));

    // What is written raw is on the device, and not in the pages of the file.
    assert_eq!(cached(&reader), 2);
    write_raw(3);
    assert_eq!((on_device(), cached(&reader)), (3, 2), "stale");
    drop_pages(&reader);
    assert_eq!(cached(&reader), 3);
    // Pages that are mapped stay, until nobody maps them.
    let mapping = mapdirect::MapOptions::new()
        .read_only(true)
        .range(0..4096)
        .accept_page_cache(true)
        .patience(crate::world::patience())
        .guard(guard.client())
        .map(&reader)
        .unwrap();
    let mut byte = [0];
    mapping.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte[0], 3);
    write_raw(4);
    drop_pages(&reader);
    mapping.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!((byte[0], cached(&reader), on_device()), (3, 3, 4));
    mapping.unmap().unwrap();
    drop_pages(&reader);
    assert_eq!(cached(&reader), 4);
    drop((pinned, reader));
    wait_until_free(&path);

    // A page that is dirty when something is written raw wins in the end.
    let file = open(&path);
    file.write_all_at(&[5; 10], 0).unwrap();
    write_raw(6);
    drop_pages(&file);
    assert_eq!(cached(&file), 5, "what is dirty is not dropped");
    file.sync_all().unwrap();
    assert_eq!(on_device(), 5, "and takes the place of what was written");
    std::fs::remove_file(&path).unwrap();
}
