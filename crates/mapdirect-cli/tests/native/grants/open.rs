//! Who has the file open, and how.

use super::*;

pub(crate) fn who_has_it_open(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "who");
    let guard = world.guard().client();
    let mut writer = Command::new("sleep")
        .arg("60")
        .stdin(open(&path))
        .spawn()
        .unwrap();
    let error = excluded(impatient(&guard).pin(File::open(&path).unwrap()));
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
    drop(impatient(&guard).pin(File::open(&path).unwrap()).unwrap());
    std::fs::remove_file(&path).unwrap();
}

pub(crate) fn patience(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "patience");
    let guard = world.guard().client();
    let writer = open(&path);
    let closing = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(150));
        drop(writer);
    });
    let pinned = impatient(&guard)
        .patience(PATIENCE)
        .pin(File::open(&path).unwrap());
    closing.join().unwrap();
    drop(pinned.unwrap());
    std::fs::remove_file(&path).unwrap();
}

pub(crate) fn duplicate(world: &World, kind: Kind) {
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

pub(crate) fn inherited(world: &World, kind: Kind) {
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

pub(crate) fn mapped_before(world: &World, kind: Kind) {
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
pub(crate) fn in_flight(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "flight");
    let guard = world.guard().client();
    let (one, other) = Socket::pair().unwrap();
    one.send(&[b"x"], &[open(&path).as_fd()]).unwrap();
    if let Some(error) = excluded(impatient(&guard).pin(File::open(&path).unwrap())) {
        assert!(error.obstacle().contains("socket"), "{error:#}");
    }
    drop(other);
    drop(
        impatient(&guard)
            .patience(PATIENCE)
            .pin(File::open(&path).unwrap())
            .unwrap(),
    );
    std::fs::remove_file(&path).unwrap();
}

/// A file registered with an io_uring, its descriptor closed.
pub(crate) fn registered(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "registered");
    let guard = world.guard().client();
    let ring = raw::ring_with_file(open(&path)).unwrap();
    if let Some(error) = excluded(impatient(&guard).pin(File::open(&path).unwrap())) {
        assert!(error.obstacle().contains("io_uring"), "{error:#}");
    }
    drop(ring);
    drop(
        impatient(&guard)
            .patience(PATIENCE)
            .pin(File::open(&path).unwrap())
            .unwrap(),
    );
    std::fs::remove_file(&path).unwrap();
}

/// A filesystem that is frozen. Whose threads wait for a thaw is not told
/// apart, so it is one at a time.
pub(crate) struct FrozenAlone {
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
pub(crate) fn wait_until_inside(function: &str) {
    let own = std::process::id().cast_signed();
    let inside = wait_for(Duration::from_secs(5), || {
        Ok(is_inside(own, function).then_some(()))
    });
    assert!(inside.is_ok(), "nobody is inside {function}");
}

/// A truncation by path that passed its permission check before the gate
/// closed, and waits for the filesystem to thaw.
pub(crate) fn frozen_truncate(world: &World, kind: Kind) {
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
pub(crate) fn frozen_write(world: &World, kind: Kind) {
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
pub(crate) fn frozen_write_behind_the_gate(world: &World, kind: Kind) {
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
pub(crate) fn dirty(world: &World, kind: Kind) {
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
pub(crate) fn description(world: &World, kind: Kind) {
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

/// Many threads pin one file at the same time.
pub(crate) fn at_once(world: &World, kind: Kind) {
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
