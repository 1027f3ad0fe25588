//! What a mapping shows, and what a store to it does.

use super::*;

/// Every state beside every other, at boundaries of blocks, pages and huge
/// pages.
pub(crate) fn pairs(world: &World, kind: Kind) {
    let (disk, guard) = (world.disk(kind), world.guard());
    let block = kind.block();
    for first in State::all(kind) {
        for second in State::all(kind) {
            // 2 MiB of the first but for a few blocks of the second around
            // the middle, then 2 MiB of the second.
            let blocks = usize::try_from(HUGE / block).unwrap();
            let few = usize::try_from(PAGE / block).unwrap();
            let mut states = vec![*first; blocks];
            states[7 * few..8 * few + 1].fill(*second);
            states[12 * few - 1] = *second;
            states.extend(vec![*second; blocks]);
            let path = disk.path(&format!("segments-{first:?}-{second:?}"));
            let size = states.len() as u64 * block;
            let file = make(&path, block, &states, size);
            let map = map_all(&guard.client(), &file, 0..size);
            probe(
                &map,
                &file,
                &states,
                block,
                &format!("{first:?} and {second:?}"),
            );
            drop(map);
            drop(file);
            let _ = std::fs::remove_file(path.with_extension("other"));
            std::fs::remove_file(&path).unwrap();
        }
    }
}

pub(crate) fn random(world: &World, kind: Kind) {
    let (disk, guard) = (world.disk(kind), world.guard());
    let block = kind.block();
    let path = disk.path("segments-random");
    for seed in 0..12 {
        let mut random = Random::new(seed);
        let mut states = Vec::new();
        while states.len() < 400 {
            let state = *random.pick(State::all(kind));
            let length = if random.below(3) == 0 {
                1
            } else {
                random.below(30)
            };
            states.extend((0..length).map(|_| state));
        }
        let size = states.len() as u64 * block - random.below(block);
        let file = make(&path, block, &states, size);
        let pages = size / PAGE;
        let start = random.below(pages) * PAGE;
        let length = 1 + random.below(size - start);
        let map = map_all(&guard.client(), &file, start..start + length);
        let what = format!("seed {seed}, bytes {start} to {}", start + length);
        probe(&map, &file, &states, block, &what);
    }
    let _ = std::fs::remove_file(path.with_extension("other"));
    std::fs::remove_file(&path).unwrap();
}

/// Files that end anywhere, files of one byte among them.
pub(crate) fn ends(world: &World, kind: Kind) {
    let (disk, guard) = (world.disk(kind), world.guard());
    let block = kind.block();
    let path = disk.path("segments-ends");
    for state in State::all(kind) {
        for size in [
            1,
            block - 1,
            block,
            block + 1,
            PAGE - 1,
            PAGE,
            PAGE + 1,
            PAGE + block,
            3 * PAGE + 7,
        ] {
            let blocks = usize::try_from(size.div_ceil(block)).unwrap();
            let states = vec![*state; blocks];
            let file = make(&path, block, &states, size);
            for length in [1, size, size.next_multiple_of(PAGE), size + 2 * PAGE] {
                let map = map_all(&guard.client(), &file, 0..length);
                let what = format!("{state:?}, {size} bytes, {length} mapped");
                probe(&map, &file, &states, block, &what);
            }
        }
    }
    let _ = std::fs::remove_file(path.with_extension("other"));
    std::fs::remove_file(&path).unwrap();
}

/// Ranges partly and wholly beyond the end of the file.
pub(crate) fn beyond_the_end(world: &World, kind: Kind) {
    let (disk, guard) = (world.disk(kind), world.guard());
    let block = kind.block();
    let path = disk.path("segments-beyond");
    let size = 5 * PAGE - 100;
    let states = vec![State::Written; usize::try_from(5 * PAGE / block).unwrap()];
    let file = make(&path, block, &states, size);
    for range in [
        4 * PAGE..6 * PAGE,
        5 * PAGE..5 * PAGE + 1,
        8 * PAGE..400 * PAGE,
        0..if is_emulated() { 1 << 25 } else { 1 << 30 },
    ] {
        let map = map_all(&guard.client(), &file, range.clone());
        probe(&map, &file, &states, block, &format!("{range:?}"));
        // Somebody else's growth does not make it anything else.
        assert!(is_pinned(&path));
        drop(map);
        wait_until_free(&path);
    }
    let empty = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(disk.path("segments-empty"))
        .unwrap();
    let map = map_all(&guard.client(), &empty, 0..2 * PAGE);
    probe(&map, &empty, &[], block, "an empty file");
    drop(map);
    std::fs::remove_file(disk.path("segments-empty")).unwrap();
    std::fs::remove_file(&path).unwrap();
}

/// Readers bring large folios into the page cache; a store must not make
/// more of them dirty than blocks that can be stored to.
pub(crate) fn large_folios(world: &World, kind: Kind) {
    let (disk, guard) = (world.disk(kind), world.guard());
    let block = kind.block();
    let path = disk.path("segments-folios");
    let per_page = usize::try_from(PAGE / block).unwrap();
    let mut random = Random::new(7);
    for round in 0..4 {
        let mut states = Vec::new();
        while states.len() < usize::try_from(4 * HUGE / block).unwrap() {
            let state = *random.pick(State::all(kind));
            let pages = 1 + random.below(if round % 2 == 0 { 40 } else { 300 });
            let blocks = usize::try_from(pages).unwrap() * per_page;
            states.extend(vec![state; blocks]);
        }
        let size = states.len() as u64 * block;
        let file = make(&path, block, &states, size);
        let read = || {
            // As a reader does that the kernel reads ahead for, more and more.
            let reader = File::open(&path).unwrap();
            let mut chunk = vec![0; 32 << 10];
            let mut at = 0;
            while at < size {
                at += reader.read_at(&mut chunk, at).unwrap() as u64;
            }
        };
        let drop_cache = || {
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        };
        drop_cache();
        read();
        let map = map_all(&guard.client(), &file, 0..size);
        for _ in 0..3 {
            probe(&map, &file, &states, block, &format!("round {round}"));
            file.sync_all().unwrap();
            drop_cache();
            read();
        }
        drop(map);
        drop(file);
        wait_until_free(&path);
    }
    let _ = std::fs::remove_file(path.with_extension("other"));
    std::fs::remove_file(&path).unwrap();
}

/// Four pages: written, hole, unwritten, written.
pub(crate) const FOUR: [State; 4] = [
    State::Written,
    State::Hole,
    State::Unwritten,
    State::Written,
];

pub(crate) fn four(world: &World, kind: Kind, name: &str) -> (std::path::PathBuf, File) {
    let path = world.disk(kind).path(&format!("segments-{name}"));
    let file = make(&path, PAGE, &FOUR, 4 * PAGE);
    (path, file)
}

pub(crate) fn at(map: &DirectMap, page: usize) -> usize {
    map.as_ptr() as usize + page * 4096
}

/// A system call that is given such a buffer fails, and does not kill.
pub(crate) fn system_calls(world: &World, kind: Kind) {
    let guard = world.guard();
    let (path, file) = four(world, kind, "calls");
    let map = map_all(&guard.client(), &file, 0..6 * PAGE);
    let zeros = File::open("/dev/zero").unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    for page in 0..6 {
        // SAFETY: bytes of a test file.
        let read = unsafe { raw::read_into(zeros.as_fd(), at(&map, page), 100) };
        let written = raw::write_from(writer.as_fd(), at(&map, page), 100);
        if page == 0 || page == 3 {
            assert_eq!((read, written), (Ok(100), Ok(100)), "page {page}");
        } else if page < 4 {
            assert_eq!((read, written), (Err(Errno::FAULT), Ok(100)), "page {page}");
        } else {
            let fault = Err(Errno::FAULT);
            assert_eq!((read, written), (fault, fault), "page {page}");
        }
    }
    drop((reader, writer));
    drop(map);
    std::fs::remove_file(path).unwrap();
}
