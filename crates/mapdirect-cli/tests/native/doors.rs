//! Every way to open a file, while a part of it is pinned.

use crate::world::{PATIENCE, World, kinds, map, open, wait_until_free};
use libtest_mimic::Trial;
use mapdirect_sys::Errno;
use mapdirect_testkit::Kind;
use mapdirect_testkit::attack::Door;
use mapdirect_testkit::contract::{Gate, Subject};
use mapdirect_testkit::disk::{run, unmount};
use mapdirect_testkit::process::{ScratchDirectory, wait_for};
use std::path::{Path, PathBuf};
use std::process::Command;

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    for kind in kinds(&[Kind::XFS, Kind::EXT4]) {
        for door in Door::ALL {
            let name = format!("doors::{kind}::{}", door.name());
            trials.push(world.trial(name, move |world| try_door(world, kind, door)));
        }
        trials.push(
            world.trial(format!("doors::{kind}::loop-device"), move |world| {
                loop_device(world, kind);
            }),
        );
        trials.push(world.trial(format!("doors::{kind}::swapon"), move |world| {
            swapon(world, kind);
        }));
        trials.push(
            world.trial(format!("doors::{kind}::overlay"), move |world| {
                overlay(world, kind);
            }),
        );
        trials.push(
            world.trial(format!("doors::{kind}::execute"), move |world| {
                execute(world, kind);
            }),
        );
    }
    trials
}

/// A bind mount of a directory; unmounted when dropped.
struct Bind {
    place: ScratchDirectory,
}

impl Bind {
    fn new(of: &Path) -> Self {
        let place = ScratchDirectory::new("bind").unwrap();
        run(Command::new("mount")
            .arg("--bind")
            .arg(of)
            .arg(place.path()))
        .unwrap();
        Self { place }
    }

    fn path(&self, path: &Path) -> PathBuf {
        self.place.path().join(path.file_name().unwrap())
    }
}

impl Drop for Bind {
    fn drop(&mut self) {
        // The guard keeps a path of a file for a moment after its last pin,
        // if somebody else has it open.
        unmount(self.place.path()).unwrap();
    }
}

fn try_door(world: &World, kind: Kind, door: Door) {
    let disk = world.disk(kind);
    let guard = world.guard();
    let subject = Subject::new(&disk, &format!("door-{}", door.name()), false);
    let bind = (door == Door::BindMount).then(|| Bind::new(&disk.root()));
    let path = bind
        .as_ref()
        .map_or_else(|| subject.path.clone(), |bind| bind.path(&subject.path));
    let open_for = |flags| door.open(&path, flags).map(drop);
    if let Err(errno) = open_for(libc::O_RDWR) {
        world.unavailable(format!("opening by {}: {errno}", door.name()));
        return;
    }
    let file = open(&subject.path);
    let map = map(&guard.client(), &file, subject.pinned());
    let before = subject.block_map();
    for flags in [
        libc::O_RDWR,
        libc::O_WRONLY,
        libc::O_RDWR | libc::O_TRUNC,
        libc::O_RDONLY | libc::O_TRUNC,
        libc::O_WRONLY | libc::O_APPEND,
        libc::O_RDWR | libc::O_CREAT,
    ] {
        // A worker of io_uring refuses to truncate without being asked where
        // it would have to wait; either way nothing is opened.
        let got = open_for(flags);
        let harmless = flags & libc::O_TRUNC == 0;
        let expected = match Gate::under_test() {
            // What is done with it will be judged.
            Gate::Bpf if harmless => Ok(()),
            _ => Err(Errno::TXTBSY),
        };
        assert_eq!(got, expected, "{} with {flags:#o}", door.name());
    }
    // Flags that cannot be seen may be for writing.
    let visible = !matches!(door, Door::Openat2 | Door::Uring | Door::UringWorker);
    let reading = open_for(libc::O_RDONLY);
    if visible {
        assert_eq!(reading, Ok(()), "{} for reading", door.name());
    } else {
        assert!(matches!(reading, Ok(()) | Err(Errno::TXTBSY)));
    }
    // A path is no description.
    if door == Door::Path {
        assert_eq!(open_for(libc::O_PATH), Ok(()));
    }
    assert_eq!(before.extents(), subject.block_map().extents());
    drop(map);
    drop(file);
    wait_until_free(&subject.path);
    assert_eq!(open_for(libc::O_RDWR), Ok(()), "{} afterwards", door.name());
    world.count("doors", 1);
}

fn losetup(arguments: &[&str], path: &Path) -> bool {
    Command::new("losetup")
        .args(arguments)
        .arg(path)
        .stderr(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap()
        .success()
}

fn loop_device(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let guard = world.guard();
    let subject = Subject::new(&disk, "loop", false);
    let file = open(&subject.path);
    let held = map(&guard.client(), &file, subject.pinned());
    assert!(!losetup(&["--find"], &subject.path), "it would write to it");
    drop(held);
    drop(file);
    wait_until_free(&subject.path);
    // And the other way round: what backs a loop device cannot be pinned.
    assert!(losetup(&["--find"], &subject.path));
    let file = open(&subject.path);
    let refused = mapdirect::PinOptions::new()
        .range(subject.pinned())
        .guard(guard.client())
        .pin(&file)
        .unwrap_err();
    let devices = Command::new("losetup")
        .arg("-j")
        .arg(&subject.path)
        .output()
        .unwrap();
    let devices = String::from_utf8_lossy(&devices.stdout).into_owned();
    let device = devices.split(':').next().unwrap().to_owned();
    assert!(losetup(&["--detach"], Path::new(&device)));
    assert_eq!(refused.errno(), Errno::TXTBSY.raw_os_error());
    let named = refused
        .openers()
        .iter()
        .any(|opener| opener.command.contains(&device));
    assert!(named, "the refusal must name {device}: {refused:#}");
}

fn swapon(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let guard = world.guard();
    let subject = Subject::new(&disk, "swap", false);
    run(Command::new("chmod").arg("600").arg(&subject.path)).unwrap();
    if run(Command::new("mkswap").arg(&subject.path)).is_err() {
        world.unavailable(String::from("mkswap"));
        return;
    }
    let file = open(&subject.path);
    let held = map(&guard.client(), &file, subject.pinned());
    let output = Command::new("swapon").arg(&subject.path).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        run(Command::new("swapoff").arg(&subject.path)).unwrap();
    }
    match Gate::under_test() {
        Gate::Fanotify => {
            assert!(!output.status.success());
            assert!(text.contains("Text file busy"), "{text}");
        }
        // It writes where blocks are, and moves none.
        Gate::Bpf => {
            let now = mapdirect::block_map(&file, subject.pinned()).unwrap();
            assert_eq!(held.block_map().extents(), now.extents());
        }
    }
    drop(held);
}

fn overlay(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let guard = world.guard();
    let place = ScratchDirectory::new("overlay").unwrap();
    let (lower, merged) = (place.path().join("lower"), place.path().join("merged"));
    let (upper, work) = (disk.path("upper"), disk.path("work"));
    for path in [&lower, &merged, &upper, &work] {
        std::fs::create_dir_all(path).unwrap();
    }
    let path = upper.join("file");
    std::fs::write(&path, vec![1; 65536]).unwrap();
    let free = disk.path("beside-the-overlay");
    std::fs::write(&free, vec![1; 65536]).unwrap();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    let mounted = run(Command::new("mount")
        .args(["-t", "overlay", "overlay", "-o", &options])
        .arg(&merged));
    if let Err(error) = mounted {
        world.unavailable(format!("overlayfs: {error}"));
        return;
    }
    // The list of overlays may be a second old.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let pin = |path: &Path| {
        mapdirect::PinOptions::new()
            .guard(guard.client())
            .pin(std::fs::File::open(path).unwrap())
    };
    let in_upper = pin(&path);
    let beside = pin(&free);
    let through = pin(&merged.join("file"));
    run(Command::new("umount").arg(&merged)).unwrap();
    let refused = in_upper.unwrap_err();
    assert_eq!(refused.errno(), Errno::OPNOTSUPP.raw_os_error());
    assert_eq!(refused.kind(), mapdirect::Kind::OverlayUpper, "{refused:#}");
    let refused = through.unwrap_err();
    assert_eq!(refused.kind(), mapdirect::Kind::Filesystem, "{refused:#}");
    drop(beside.unwrap());
    // What is gone is in nobody's way, as soon as the copies of the mount are
    // gone, too, that namespaces of other tests may have.
    drop(wait_for(PATIENCE, || Ok(pin(&path).ok())).unwrap());
    for path in [&path, &free] {
        std::fs::remove_file(path).unwrap();
    }
    let _ = std::fs::remove_dir_all(&work);
    let _ = std::fs::remove_dir_all(&upper);
}

fn execute(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let guard = world.guard();
    let path = disk.path("program");
    std::fs::copy("/bin/sleep", &path).unwrap();
    std::fs::File::open(&path).unwrap().sync_all().unwrap();
    let pin = || {
        mapdirect::PinOptions::new()
            .guard(guard.client())
            .pin(std::fs::File::open(&path).unwrap())
    };
    // What is being executed cannot be pinned where others must be kept out,
    let mut child = Command::new(&path).arg("60").spawn().unwrap();
    let result = pin();
    child.kill().unwrap();
    child.wait().unwrap();
    match Gate::under_test() {
        Gate::Bpf => drop(result.unwrap()),
        Gate::Fanotify => {
            let refused = result.unwrap_err();
            assert_eq!(refused.errno(), Errno::TXTBSY.raw_os_error(), "{refused:#}");
            let pid = child.id().cast_signed();
            assert!(refused.openers().iter().any(|opener| opener.pid == pid));
        }
    }
    // and what is pinned can be executed.
    let held = pin().unwrap();
    let status = Command::new(&path).arg("0").status().unwrap();
    assert!(status.success());
    drop(held);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}
