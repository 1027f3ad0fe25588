//! Grants: a promise is made only when it can be kept.

use crate::world::{
    PATIENCE, World, dirties_whole_folios, is_inside, is_pinned, kinds, map, open, pin,
    wait_until_free, written,
};
use libtest_mimic::Trial;
use mapdirect::{DirectMap, ExtentState, Guard, Kind as Reason, MapOptions, Pin, PinOptions};
use mapdirect_sys::fcntl::{LockKind, LockOwner, conflicting_lock, set_lock};
use mapdirect_sys::unix::Socket;
use mapdirect_sys::{Errno, inode_flags};
use mapdirect_testkit::attack::clone_range;
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::disk::{Frozen, run};
use mapdirect_testkit::process::{Background, wait_for};
use mapdirect_testkit::raw::{self, PlainMap};
use mapdirect_testkit::{Disk, Kind};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(world.trials(
        "grants",
        &kinds(&[Kind::XFS, Kind::EXT4]),
        &[
            ("who-has-it-open", who_has_it_open),
            ("patience", patience),
            ("duplicate", duplicate),
            ("inherited", inherited),
            ("mapped-before", mapped_before),
            ("in-flight", in_flight),
            ("registered", registered),
            ("frozen-truncate", frozen_truncate),
            ("frozen-write", frozen_write),
            ("frozen-write-behind-the-gate", frozen_write_behind_the_gate),
            ("dirty", dirty),
            ("description", description),
            ("record-locks", record_locks),
            ("foreign-locks", foreign_locks),
            ("at-once", at_once),
            ("many-extents", many_extents),
            ("rounding", rounding),
            ("beyond-the-end", beyond_the_end),
            ("bytes", bytes),
            ("gone", gone),
            ("unmounted", unmounted),
            ("busy-processor", busy_processor),
            ("hammered", hammered),
        ],
    ));
    trials.push(world.trial("grants::xfs::allocated-ahead", allocated_ahead));
    trials.push(world.trial("grants::xfs::extent-size-hint", extent_size_hint));
    trials.push(world.trial("grants::xfs::copied-along", copied_along));
    trials.push(world.trial("grants::xfs::collapsed-towards", collapsed_towards));
    trials.push(world.trial("grants::xfs::allocated-into", allocated_into));
    trials.push(world.trial("grants::ext4::converted-along", converted_along));
    trials.push(world.trial("grants::xfs-plain::reader", reader_without_reflink));
    trials
}

fn subject(world: &World, kind: Kind, name: &str) -> (std::sync::Arc<Disk>, std::path::PathBuf) {
    let disk = world.disk(kind);
    let path = written(&disk, &format!("grants-{name}"), 1 << 20);
    (disk, path)
}

fn impatient(guard: &Guard) -> PinOptions {
    PinOptions::new()
        .range(0..65536)
        .patience(Duration::from_millis(20))
        .guard(guard.clone())
}

fn refused(result: mapdirect::Result<Pin>) -> mapdirect::Error {
    let error = result.unwrap_err();
    assert_eq!(error.errno(), Errno::TXTBSY.raw_os_error(), "{error:#}");
    error
}

/// Whoever could change the file unseen is in the way of a pin by permission
/// events, and the refusal is returned; in the way of one in the kernel is
/// nobody.
fn excluded(result: mapdirect::Result<Pin>) -> Option<mapdirect::Error> {
    match Gate::under_test() {
        Gate::Fanotify => Some(refused(result)),
        Gate::Bpf => {
            drop(result.unwrap());
            None
        }
    }
}

/// Why a pin is refused beside an operation of the holder's own that is under
/// way.
fn reason_of_own_operation() -> Reason {
    match Gate::under_test() {
        Gate::Fanotify => Reason::OpenHere,
        Gate::Bpf => Reason::StillChanging,
    }
}

fn who_has_it_open(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "who");
    let guard = world.guard().client();
    let mut writer = Command::new("sleep")
        .arg("60")
        .stdin(open(&path))
        .spawn()
        .unwrap();
    let error = excluded(impatient(&guard).pin(&File::open(&path).unwrap()));
    writer.kill().unwrap();
    writer.wait().unwrap();
    if let Some(error) = error {
        assert_eq!(error.kind(), Reason::OpenElsewhere);
        let [opener] = error.openers() else {
            panic!("exactly one: {error:#}");
        };
        assert_eq!(opener.pid, writer.id().cast_signed());
        assert_eq!(opener.command, "sleep");
        assert_eq!(
            (opener.fd, opener.writable, opener.mapped),
            (Some(0), true, false)
        );
    }
    assert!(!is_pinned(&path), "a refused pin leaves nothing behind");
    drop(impatient(&guard).pin(&File::open(&path).unwrap()).unwrap());
    std::fs::remove_file(&path).unwrap();
}

fn patience(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "patience");
    let guard = world.guard().client();
    let writer = open(&path);
    let closing = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(150));
        drop(writer);
    });
    let pinned = impatient(&guard)
        .patience(PATIENCE)
        .pin(&File::open(&path).unwrap());
    closing.join().unwrap();
    drop(pinned.unwrap());
    std::fs::remove_file(&path).unwrap();
}

fn duplicate(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "duplicate");
    let guard = world.guard().client();
    let file = open(&path);
    let twin = file.try_clone().unwrap();
    if let Some(error) = excluded(impatient(&guard).pin(&file)) {
        assert_eq!(error.kind(), Reason::OpenHere, "{error:#}");
        let own = std::process::id().cast_signed();
        assert!(error.openers().iter().all(|opener| opener.pid == own));
    }
    drop(twin);
    let held = impatient(&guard).pin(&file).unwrap();
    // A duplicate made now is one from behind the gate.
    let twin = file.try_clone().unwrap();
    assert_eq!(rustix::fs::ftruncate(&twin, 0), Err(Errno::TXTBSY));
    drop(held);
    std::fs::remove_file(&path).unwrap();
}

fn inherited(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "inherited");
    let guard = world.guard().client();
    let file = open(&path);
    let mut child = Command::new("sleep")
        .arg("60")
        .stdin(file.try_clone().unwrap())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let error = excluded(impatient(&guard).pin(&file));
    child.kill().unwrap();
    child.wait().unwrap();
    let pid = child.id().cast_signed();
    if let Some(error) = error {
        assert!(
            error.openers().iter().any(|opener| opener.pid == pid),
            "{error:#}"
        );
    }
    drop(impatient(&guard).pin(&file).unwrap());
    std::fs::remove_file(&path).unwrap();
}

fn mapped_before(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "mapped");
    let guard = world.guard().client();
    let file = open(&path);
    let shared = mapdirect_sys::mmap::MAP_SHARED;
    let both = mapdirect_sys::mmap::PROT_READ | mapdirect_sys::mmap::PROT_WRITE;
    let plain = PlainMap::new(file.as_fd(), both, shared, 0, 65536).unwrap();
    if let Some(error) = excluded(impatient(&guard).pin(&file)) {
        assert!(
            error.openers().iter().any(|opener| opener.mapped),
            "{error:#}"
        );
    }
    drop(plain);
    let held = impatient(&guard).pin(&file).unwrap();
    // Mapped now, it is behind the gate: removing pages is refused.
    let plain = PlainMap::new(file.as_fd(), both, shared, 0, 65536).unwrap();
    assert_eq!(plain.advise(9), Err(Errno::TXTBSY));
    drop(held);
    std::fs::remove_file(&path).unwrap();
}

/// A descriptor nobody has, on its way through a socket.
fn in_flight(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "flight");
    let guard = world.guard().client();
    let (one, other) = Socket::pair().unwrap();
    one.send(&[b"x"], &[open(&path).as_fd()]).unwrap();
    if let Some(error) = excluded(impatient(&guard).pin(&File::open(&path).unwrap())) {
        assert!(error.obstacle().contains("socket"), "{error:#}");
    }
    drop(other);
    drop(
        impatient(&guard)
            .patience(PATIENCE)
            .pin(&File::open(&path).unwrap())
            .unwrap(),
    );
    std::fs::remove_file(&path).unwrap();
}

/// A file registered with an io_uring, its descriptor closed.
fn registered(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "registered");
    let guard = world.guard().client();
    let ring = raw::ring_with_file(open(&path)).unwrap();
    if let Some(error) = excluded(impatient(&guard).pin(&File::open(&path).unwrap())) {
        assert!(error.obstacle().contains("io_uring"), "{error:#}");
    }
    drop(ring);
    drop(
        impatient(&guard)
            .patience(PATIENCE)
            .pin(&File::open(&path).unwrap())
            .unwrap(),
    );
    std::fs::remove_file(&path).unwrap();
}

/// A filesystem that is frozen. Whose threads wait for a thaw is not told
/// apart, so it is one at a time.
struct FrozenAlone {
    _frozen: Frozen,
    _alone: MutexGuard<'static, ()>,
}

impl FrozenAlone {
    fn new(disk: &Disk) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        Self {
            _frozen: Frozen::new(disk).unwrap(),
            _alone: alone,
        }
    }
}

/// Waits until a thread of this process is inside a kernel function.
fn wait_until_inside(function: &str) {
    let own = std::process::id().cast_signed();
    let inside = wait_for(Duration::from_secs(5), || {
        Ok(is_inside(own, function).then_some(()))
    });
    assert!(inside.is_ok(), "nobody is inside {function}");
}

/// A truncation by path that passed its permission check before the gate
/// closed, and waits for the filesystem to thaw.
fn frozen_truncate(world: &World, kind: Kind) {
    let disk = Disk::new(kind, 512).unwrap();
    let path = written(&disk, "file", 1 << 20);
    let guard = world.guard().client();
    let reader = File::open(&path).unwrap();
    let frozen = FrozenAlone::new(&disk);
    let victim = path.clone();
    let truncating = std::thread::spawn(move || raw::truncate(&raw::c_path(&victim), 0).unwrap());
    wait_until_inside("percpu_rwsem_wait");
    let error = refused(impatient(&guard).pin(&reader));
    assert_eq!(error.kind(), Reason::StillChanging, "{error:#}");
    drop(frozen);
    truncating.join().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    drop(reader);
}

/// A write through the holder's own descriptor, from before the gate.
fn frozen_write(world: &World, kind: Kind) {
    let disk = Disk::new(kind, 512).unwrap();
    let path = written(&disk, "file", 1 << 20);
    let guard = world.guard().client();
    let file = open(&path);
    let frozen = FrozenAlone::new(&disk);
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| rustix::io::pwrite(&file, &[1; 4096], 2 << 20).unwrap());
        wait_until_inside("percpu_rwsem_wait");
        let error = refused(impatient(&guard).pin(&file));
        assert_eq!(error.kind(), reason_of_own_operation(), "{error:#}");
        drop(frozen);
        writing.join().unwrap();
    });
    drop(impatient(&guard).pin(&file).unwrap());
}

/// A write through a descriptor behind the gate, let in while only another
/// range was pinned.
fn frozen_write_behind_the_gate(world: &World, kind: Kind) {
    let disk = Disk::new(kind, 512).unwrap();
    let path = written(&disk, "file", 1 << 20);
    let guard = world.guard().client();
    let file = open(&path);
    let first = map(&guard, &file, 0..65536);
    let frozen = FrozenAlone::new(&disk);
    std::thread::scope(|scope| {
        let punching = scope.spawn(|| raw::fallocate(file.as_fd(), 3, 524_288, 65536).unwrap());
        wait_until_inside("percpu_rwsem_wait");
        let elsewhere = PinOptions::new()
            .range(524_288..589_824)
            .guard(guard.clone())
            .pin(&file);
        let error = refused(elsewhere);
        assert_eq!(error.kind(), Reason::StillChanging, "{error:#}");
        drop(frozen);
        punching.join().unwrap();
    });
    let second = pin(&guard, &file, 524_288..589_824);
    assert_eq!(second.block_map().total(ExtentState::Hole), 65536);
    drop((first, second));
}

/// What was written but not yet allocated is allocated by the grant.
fn dirty(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = disk.path("grants-dirty");
    let guard = world.guard().client();
    std::fs::write(&path, vec![3; 1 << 20]).unwrap();
    let file = open(&path);
    let held = map(&guard, &file, 0..1 << 20);
    assert!(held.block_map().is_stable());
    rustix::fs::sync();
    assert_eq!(
        *held.block_map(),
        mapdirect::block_map(&file, 0..1 << 20).unwrap()
    );
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}

/// The new description is like the old one.
fn description(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "description");
    let guard = world.guard().client();
    let mut file = File::options().read(true).append(true).open(&path).unwrap();
    file.seek(SeekFrom::Start(777)).unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&file);
    let flags = rustix::fs::fcntl_getfl(&file).unwrap();
    let held = impatient(&guard).pin(&file).unwrap();
    assert_eq!(std::os::fd::AsRawFd::as_raw_fd(&file), number);
    assert_eq!(rustix::fs::fcntl_getfl(&file).unwrap(), flags);
    assert_eq!(file.stream_position().unwrap(), 777);
    let closing = rustix::io::fcntl_getfd(&file).unwrap();
    assert!(closing.contains(rustix::io::FdFlags::CLOEXEC));
    file.write_all(b"at the end").unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), (1 << 20) + 10);
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}

fn record_locks(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "locks");
    let guard = world.guard().client();
    let file = open(&path);
    // To the end of all offsets, where pins are marked.
    let exclusive = LockKind::Exclusive;
    set_lock(file.as_fd(), LockOwner::Description, exclusive, 100, 0).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let held = impatient(&guard).pin(&file).unwrap();
    let stranger = File::open(&path).unwrap();
    let found = conflicting_lock(stranger.as_fd(), 100, 1).unwrap();
    assert!(found.is_some(), "the lock is still there");
    let shared = rustix::fs::FlockOperation::NonBlockingLockShared;
    assert_eq!(rustix::fs::flock(&stranger, shared), Err(Errno::AGAIN));
    drop((held, file, stranger));
    wait_until_free(&path);
    // POSIX locks would be lost, and that is said.
    let file = open(&path);
    set_lock(file.as_fd(), LockOwner::Process, exclusive, 0, 10).unwrap();
    let error = refused(impatient(&guard).pin(&file));
    assert_eq!(error.kind(), Reason::Locked, "{error:#}");
    let stranger = File::open(&path).unwrap();
    let found = conflicting_lock(stranger.as_fd(), 0, 10).unwrap();
    assert!(found.is_some(), "and the lock is still there");
    // Dropping the stranger costs this process the lock.
    drop((stranger, file));
    std::fs::remove_file(&path).unwrap();
}

/// Somebody's shared lock to the end of all offsets covers the marks.
fn foreign_locks(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "foreign");
    let guard = world.guard().client();
    let file = open(&path);
    let held = impatient(&guard).pin(&file).unwrap();
    let reader = File::open(&path).unwrap();
    set_lock(
        reader.as_fd(),
        LockOwner::Description,
        LockKind::Shared,
        0,
        0,
    )
    .unwrap();
    let second = PinOptions::new()
        .range(65536..131_072)
        .guard(guard.clone())
        .pin(&file)
        .unwrap();
    drop(held);
    assert!(is_pinned(&path), "one is left");
    drop((second, file));
    wait_until_free(&path);
    drop(reader);
    std::fs::remove_file(&path).unwrap();
}

/// Many threads pin one file at the same time.
fn at_once(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "at-once");
    let guard = world.guard().client();
    let file = open(&path);
    let pins: Vec<Pin> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16u64)
            .map(|number| {
                let (file, guard) = (&file, &guard);
                scope.spawn(move || pin(guard, file, number * 65536..(number + 1) * 65536))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!(guard.pinned_ranges(&file).unwrap().len(), 16);
    assert_eq!(
        rustix::fs::ftruncate(&file, (1 << 20) - 1),
        Err(Errno::TXTBSY)
    );
    drop(pins);
    // A child that another thread is just making has them, too, for a moment.
    wait_until_free(&path);
    assert_eq!(rustix::fs::ftruncate(&file, 0), Ok(()));
    std::fs::remove_file(&path).unwrap();
}

/// More extents than a message holds.
fn many_extents(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = disk.path("grants-extents");
    let guard = world.guard().client();
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    const EXTENTS: u64 = 2000;
    for number in 0..EXTENTS {
        file.write_all_at(&[5; 4096], number * 8192).unwrap();
    }
    file.sync_all().unwrap();
    let held = pin(&guard, &file, 0..EXTENTS * 8192);
    assert_eq!(held.extents().len() as u64, 2 * EXTENTS);
    let read = mapdirect::block_map(&file, 0..EXTENTS * 8192).unwrap();
    assert_eq!(*held.block_map(), read);
    // A write to any of the holes is refused, to any of the rest is not.
    for number in (0..EXTENTS).step_by(97) {
        let written = rustix::io::pwrite(&file, b"x", number * 8192);
        // What XFS allocates ahead of the end of the file stays unwritten.
        let coarse = Gate::under_test() == Gate::Bpf && dirties_whole_folios(kind);
        let too_near = coarse && written == Err(Errno::TXTBSY);
        assert!(written == Ok(1) || too_near, "{written:?}");
        let refused = rustix::io::pwrite(&file, b"x", number * 8192 + 4096);
        assert_eq!(refused, Err(Errno::TXTBSY));
    }
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}

fn rounding(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "rounding");
    let guard = world.guard().client();
    let file = open(&path);
    let held = pin(&guard, &file, 5000..5001);
    assert_eq!(held.range(), 4096..8192);
    let punch = |offset| raw::fallocate(file.as_fd(), 3, offset, 4096);
    assert_eq!(punch(4096), Err(Errno::TXTBSY));
    assert_eq!(punch(0), Ok(()));
    assert_eq!(punch(8192), Ok(()));
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}

fn beyond_the_end(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = written(&disk, "grants-beyond", 10_000);
    let guard = world.guard().client();
    let file = open(&path);
    let held = pin(&guard, &file, 0..1 << 20);
    assert_eq!(
        held.block_map().total(ExtentState::Hole),
        (1 << 20) - 12_288
    );
    // The end of the pin is capped by the size.
    assert_eq!(rustix::fs::ftruncate(&file, 9_999), Err(Errno::TXTBSY));
    assert_eq!(rustix::fs::ftruncate(&file, 10_000), Ok(()));
    assert_eq!(rustix::fs::ftruncate(&file, 2 << 20), Ok(()));
    assert_eq!(rustix::io::pwrite(&file, b"x", 20_000), Err(Errno::TXTBSY));
    assert_eq!(rustix::io::pwrite(&file, b"x", 1 << 20), Ok(1));
    let after = mapdirect::block_map(&file, 0..1 << 20).unwrap();
    assert_eq!(held.extents(), after.extents());
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}

/// What XFS allocated beyond the end of the file, ahead of need, would become
/// part of it when it grows; what somebody asked for there stays.
fn allocated_ahead(world: &World) {
    let disk = world.disk(Kind::XFS);
    let path = disk.path("grants-ahead");
    let guard = world.guard().client();
    let file = File::create_new(&path).unwrap();
    // Appending in small pieces makes XFS allocate generously.
    for number in 0..256u64 {
        file.write_all_at(&[3; 4096], number * 4096).unwrap();
    }
    file.sync_all().unwrap();
    let ahead = mapdirect::block_map(&file, 1 << 20..8 << 20).unwrap();
    if ahead.total(ExtentState::Hole) == 7 << 20 {
        world.unavailable(String::from("speculative preallocation on xfs"));
    }
    let held = pin(&guard, &file, 0..8 << 20);
    assert_eq!(held.block_map().total(ExtentState::Hole), 7 << 20);
    rustix::fs::ftruncate(&file, 8 << 20).unwrap();
    let grown = mapdirect::block_map(&file, 0..8 << 20).unwrap();
    assert_eq!(grown.extents(), held.extents());
    drop(held);
    // A child of another test has it until it gets to its exec.
    wait_until_free(&path);
    rustix::fs::ftruncate(&file, 1 << 20).unwrap();
    raw::fallocate(file.as_fd(), 1, 1 << 20, 1 << 20).unwrap();
    let held = pin(&guard, &file, 0..8 << 20);
    assert_eq!(held.block_map().total(ExtentState::Unwritten), 1 << 20);
    rustix::fs::ftruncate(&file, 8 << 20).unwrap();
    let grown = mapdirect::block_map(&file, 0..8 << 20).unwrap();
    assert_eq!(grown.extents(), held.extents());
    drop(held);
    // A copy that cannot share blocks is a write, for which XFS allocates
    // ahead as well: into holes behind the end of the file.
    let source = written(&disk, "grants-ahead-source", 65536);
    let source = open(&source);
    for (from, length) in [(100, 100), (5000, 100), (100, 5000)] {
        rustix::fs::ftruncate(&file, 372_736).unwrap();
        let held = pin(&guard, &file, 454_656..471_040);
        let (mut from, mut to) = (from, 446_464);
        let copied =
            rustix::fs::copy_file_range(&source, Some(&mut from), &file, Some(&mut to), length);
        assert!(matches!(copied, Ok(_) | Err(Errno::TXTBSY)), "{copied:?}");
        let now = mapdirect::block_map(&file, 454_656..471_040).unwrap();
        assert_eq!(now.extents(), held.extents(), "after a copy: {copied:?}");
        drop(held);
    }
    // That somebody asked for blocks behind the end keeps those, and does not
    // keep XFS from allocating ahead.
    rustix::fs::ftruncate(&file, 372_736).unwrap();
    raw::fallocate(file.as_fd(), 1, 372_736, 4096).unwrap();
    let flags = inode_flags::extended(file.as_fd()).unwrap().flags;
    assert_ne!(flags & inode_flags::XFLAG_PREALLOC, 0);
    let held = pin(&guard, &file, 454_656..471_040);
    let written = rustix::io::pwrite(&file, &[4; 8192], 438_272);
    assert!(
        matches!(written, Ok(8192) | Err(Errno::TXTBSY)),
        "{written:?}"
    );
    let now = mapdirect::block_map(&file, 454_656..471_040).unwrap();
    assert_eq!(now.extents(), held.extents(), "after a write: {written:?}");
    drop((held, file, source));
    std::fs::remove_file(disk.path("grants-ahead-source")).unwrap();
    std::fs::remove_file(&path).unwrap();
}

/// What is stored is in the file, for everybody.
fn bytes(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "bytes");
    let guard = world.guard().client();
    let file = open(&path);
    let held = map(&guard, &file, 4096..69_632);
    let text = b"these bytes do not move";
    held.write_all_at(text, 12_345).unwrap();
    held.persist(12_345..12_345 + text.len()).unwrap();
    let mut read = vec![0; text.len()];
    file.read_exact_at(&mut read, 4096 + 12_345).unwrap();
    assert_eq!(read, text);
    file.write_all_at(b"and back", 4096).unwrap();
    let mut back = [0; 8];
    held.read_exact_at(&mut back, 0).unwrap();
    assert_eq!(&back, b"and back");
    let error = held.read_exact_at(&mut back, 65_530).unwrap_err();
    assert_eq!(error.errno(), Errno::INVAL.raw_os_error());
    // The blocks on the device hold them, where the extents say.
    let extent = held.block_map().find(4096 + 12_345).unwrap();
    let at = extent.physical.unwrap() + (4096 + 12_345 - extent.offset);
    file.sync_all().unwrap();
    let device = held.block_map().device();
    let name = std::fs::read_link(format!("/sys/dev/block/{device}")).unwrap();
    let device = Path::new("/dev").join(name.file_name().unwrap());
    let mut disk = File::open(device).unwrap();
    disk.seek(SeekFrom::Start(at)).unwrap();
    let mut raw = vec![0; text.len()];
    disk.read_exact(&mut raw).unwrap();
    assert_eq!(raw, text);
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}

fn gone(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "gone");
    let guard = world.guard().client();
    let file = open(&path);
    std::fs::remove_file(&path).unwrap();
    let held = map(&guard, &file, 0..65536);
    assert_eq!(rustix::fs::ftruncate(&file, 0), Err(Errno::TXTBSY));
    drop(held);
    assert_eq!(rustix::fs::ftruncate(&file, 0), Ok(()));
}

/// The filesystem is detached between opening and pinning.
fn unmounted(world: &World, kind: Kind) {
    let disk = Disk::new(kind, 512).unwrap();
    let path = written(&disk, "file", 1 << 20);
    let guard = world.guard().client();
    let file = open(&path);
    run(Command::new("umount").arg("-l").arg(disk.root())).unwrap();
    let held = map(&guard, &file, 0..65536);
    assert_eq!(rustix::fs::ftruncate(&file, 0), Err(Errno::TXTBSY));
    drop(held);
    assert_eq!(rustix::fs::ftruncate(&file, 0), Ok(()));
}

/// XFS copies the neighbours of a shared block along with it.
fn copied_along(world: &World) {
    let disk = world.disk(Kind::XFS);
    let guard = world.guard().client();
    let path = written(&disk, "grants-copied-along", 131_072);
    let sharer = disk.path("grants-copied-along.sharer");
    let file = open(&path);
    let share = |offset| {
        let into = File::create(&sharer).unwrap();
        clone_range(into.as_fd(), file.as_fd(), offset, 4096, 0)
    };
    let write_beside = || rustix::io::pwrite(&file, &[8; 4096], 20 * 4096);
    let store_everywhere = |held: &DirectMap| {
        for block in 0..16 {
            held.write_all_at(&[9; 100], block * 4096).unwrap();
        }
        held.persist(0..65536).unwrap();
        file.sync_all().unwrap();
        let now = mapdirect::block_map(&file, 0..65536).unwrap();
        assert_eq!(now.extents(), held.block_map().extents());
    };
    share(20 * 4096).unwrap();
    let held = map(&guard, &file, 0..65536);
    store_everywhere(&held);
    assert_eq!(write_beside(), Err(Errno::TXTBSY), "the pin would go along");
    store_everywhere(&held);
    drop(held);
    wait_until_free(&path);
    let held = pin(&guard, &file, 0..65536);
    assert_eq!(write_beside(), Err(Errno::TXTBSY), "the pin would go along");
    drop(held);
    // The copy leaves blocks behind that neighbours would go to.
    file.write_all_at(&[8; 4096], 20 * 4096).unwrap();
    let held = map(&guard, &file, 0..65536);
    assert_eq!(share(18 * 4096), Err(Errno::TXTBSY));
    store_everywhere(&held);
    drop((held, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
    std::fs::remove_file(&sharer).unwrap();
}

/// What is shared comes to lie beside a pin when what is between goes.
fn collapsed_towards(world: &World) {
    const MIB: u64 = 1 << 20;
    // What XFS copies with the pin ends 131,072 bytes further on.
    const NEAR: u64 = 131_072;
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "grants-collapsed-towards", 20 << 20);
    let sharer = disk.path("grants-collapsed-towards.sharer");
    let file = open(&path);
    let share = |offset| {
        let into = File::create(&sharer).unwrap();
        clone_range(into.as_fd(), file.as_fd(), offset, 4096, 0)
    };
    let collapse = |offset| raw::fallocate(file.as_fd(), 0x08, offset, MIB);
    let held = map(&world.guard().client(), &file, 0..65536);
    if Gate::under_test() == Gate::Bpf {
        // The kernel has no time to look what is shared: nothing comes near.
        assert_eq!(collapse(NEAR), Err(Errno::TXTBSY));
        assert_eq!(collapse(MIB), Ok(()), "far behind");
        drop((held, file));
        wait_until_free(&path);
        return;
    }
    assert_eq!(collapse(NEAR), Ok(()), "nothing is shared");
    assert_eq!(collapse(65536), Ok(()), "nothing is shared");
    // What has moved once may do so again: the same bytes could.
    assert_eq!(share(2 * MIB), Err(Errno::TXTBSY));
    assert_eq!(share(10 * MIB), Ok(()));
    assert_eq!(collapse(NEAR), Err(Errno::TXTBSY), "something is shared");
    assert_eq!(collapse(8 * MIB), Ok(()), "far behind");
    drop(held);
    wait_until_free(&path);
    // Looked at, not remembered.
    let held = map(&world.guard().client(), &file, 0..65536);
    assert_eq!(collapse(NEAR), Ok(()), "what is shared stays away");
    for _ in 0..4 {
        let _ = collapse(NEAR);
    }
    for block in 0..16 {
        held.write_all_at(&[9; 100], block * 4096).unwrap();
    }
    held.persist(0..65536).unwrap();
    file.sync_all().unwrap();
    let now = mapdirect::block_map(&file, 0..65536).unwrap();
    assert_eq!(now.extents(), held.block_map().extents());
    assert_eq!(collapse(NEAR), Err(Errno::TXTBSY), "it would come too near");
    drop((held, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
    std::fs::remove_file(&sharer).unwrap();
}

/// XFS allocates ahead of a growing file, into a hole that is pinned.
fn allocated_into(world: &World) {
    let path = written(&world.disk(Kind::XFS), "grants-allocated-into", 262_144);
    let file = open(&path);
    let held = pin(&world.guard().client(), &file, 524_288..589_824);
    let result = rustix::io::pwrite(&file, &[1; 131_072], 262_144);
    assert_eq!(result, Err(Errno::TXTBSY));
    assert_eq!(rustix::io::pwrite(&file, &[1; 4096], 0), Ok(4096));
    let now = mapdirect::block_map(&file, 524_288..589_824).unwrap();
    assert_eq!(now.extents(), held.block_map().extents());
    drop((held, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// ext4 converts a small unwritten extent as a whole.
fn converted_along(world: &World) {
    let disk = world.disk(Kind::EXT4);
    let path = disk.path("grants-converted-along");
    let file = File::create_new(&path).unwrap();
    raw::fallocate(file.as_fd(), 0, 0, 28_672).unwrap();
    file.sync_all().unwrap();
    let held = pin(&world.guard().client(), &file, 0..4096);
    let result = rustix::io::pwrite(&file, &[1; 4096], 16_384);
    assert_eq!(result, Err(Errno::TXTBSY));
    assert_eq!(rustix::io::pwrite(&file, &[1; 4096], 1 << 20), Ok(4096));
    file.sync_all().unwrap();
    let now = mapdirect::block_map(&file, 0..4096).unwrap();
    assert_eq!(now.extents(), held.block_map().extents());
    drop((held, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// Others open it for writing all the time, and let go of it at once: they
/// cannot keep a pin away for long.
fn hammered(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "hammered");
    let guard = world.guard().client();
    let loops: Vec<_> = (0..2)
        .map(|_| {
            let mut command = Command::new("sh");
            let script = "while :; do : >> \"$0\"; done 2> /dev/null";
            Background::spawn(command.args(["-c", script]).arg(&path)).unwrap()
        })
        .collect();
    for _ in 0..20 {
        let file = open_in_between(&path);
        drop(pin(&guard, &file, 0..65536));
    }
    drop(loops);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// Opens a file that is being let go of.
fn open_in_between(path: &Path) -> File {
    for _ in 0..500 {
        if let Ok(file) = File::options().read(true).write(true).open(path) {
            return file;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("{} is still pinned", path.display());
}

/// Threads that never sleep cannot be looked at, and must not block grants.
fn busy_processor(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "busy");
    let guard = world.guard().client();
    let spinning: Vec<_> = (0..4)
        .map(|_| {
            let mut command = Command::new("sh");
            Background::spawn(command.args(["-c", "while :; do :; done"])).unwrap()
        })
        .collect();
    for _ in 0..5 {
        let file = open(&path);
        // A child of another test has it open until it gets to its exec.
        drop(pin(&guard, &file, 0..65536));
        drop(file);
        wait_until_free(&path);
    }
    drop(spinning);
    std::fs::remove_file(&path).unwrap();
}

fn extent_size_hint(world: &World) {
    let disk = world.disk(Kind::XFS);
    let path = disk.path("grants-hint");
    let guard = world.guard().client();
    let file = File::create_new(&path).unwrap();
    run(Command::new("xfs_io")
        .args(["-c", "extsize 64k"])
        .arg(&path))
    .unwrap();
    let hint = inode_flags::extended(file.as_fd()).unwrap();
    assert_eq!(hint.extent_size, 65536);
    file.write_all_at(&[1; 65536], 0).unwrap();
    file.set_len(1 << 20).unwrap();
    file.sync_all().unwrap();
    let error = PinOptions::new()
        .guard(guard.clone())
        .pin(&file)
        .unwrap_err();
    assert_eq!(error.kind(), Reason::ExtentSizeHint, "{error:#}");
    let held = MapOptions::new()
        .range(0..65536)
        .accept_page_cache(true)
        .guard(guard)
        .map(&file)
        .unwrap();
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}

/// Without reflink a reader can do no harm, wherever it came from.
fn reader_without_reflink(world: &World) {
    let (_disk, path) = subject(world, Kind::XFS_PLAIN, "reader");
    let guard = world.guard().client();
    let reader = File::open(&path).unwrap();
    let file = open(&path);
    let held = map(&guard, &file, 0..65536);
    let mut bytes = vec![0; 65536];
    reader.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(rustix::fs::ftruncate(&file, 0), Err(Errno::TXTBSY));
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}
