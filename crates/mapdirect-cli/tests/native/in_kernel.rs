//! What only the bpf gate can do: run with `MAPDIRECT_GATE=bpf` on a kernel
//! that lets it be loaded.

use crate::world::{BINARY, World, is_inside, is_pinned, kinds, map, open, pin, written};
use libtest_mimic::Trial;
use mapdirect::{Gate, Kind as Reason, PinOptions};
use mapdirect_sys::fanotify::Group;
use mapdirect_sys::{Errno, uname};
use mapdirect_testkit::attack::{Attack, Door, Row};
use mapdirect_testkit::contract::{Gate as UnderTest, Place, Subject};
use mapdirect_testkit::disk::{Frozen, run};
use mapdirect_testkit::process::{GuardProcess, Helper, ScratchDirectory, Stranger, wait_for};
use mapdirect_testkit::raw::PageBuffer;
use mapdirect_testkit::{Disk, Kind, raw};
use rustix::fs::OFlags;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    if UnderTest::under_test() != UnderTest::Bpf {
        return trials;
    }
    #[cfg(feature = "bpf")]
    trials.push(world.trial(
        "in-kernel::judges-as-the-policy",
        crate::oracle::judges_as_the_policy,
    ));
    trials.push(world.trial("in-kernel::one-guard", one_guard));
    trials.push(world.trial("in-kernel::refusals-are-told", refusals_are_told));
    trials.push(world.trial("in-kernel::rests", rests));
    trials.push(world.trial("in-kernel::needs-no-fanotify", needs_no_fanotify));
    trials.extend(crate::neighbours::trials(world));
    for kind in kinds(&[Kind::XFS, Kind::EXT4]) {
        trials.extend(world.trials(
            "in-kernel",
            &[kind],
            &[
                ("killed-and-adopted", killed_and_adopted),
                ("ends-without-a-guard", ends_without_a_guard),
                ("writers-stay", writers_stay),
                ("direct-aio", direct_aio),
                ("stale-notes", stale_notes),
                ("unnoticed-writes", unnoticed_writes),
                ("older-mappings", older_mappings),
                ("moving-mappings", moving_mappings),
                ("loop-devices", loop_devices),
                ("raw-errors", raw_errors),
                ("raw-mapping", raw_mapping),
            ],
        ));
        trials.extend(world.trials("in-kernel", &[kind], &crate::again::TESTS));
        trials.extend(world.trials("in-kernel", &[kind], &crate::stable::attacked::TESTS));
        if kind.is_dax() {
            // They need a filesystem of their own, and there is one of these.
            continue;
        }
        trials.push(
            world.trial(format!("in-kernel::{kind}::overlay"), move |world| {
                overlay(world, kind)
            }),
        );
        for name in RACERS {
            let attack = Attack::by_name(name).unwrap();
            if attack.place.includes(kind) {
                let name = format!("in-kernel::{kind}::race::{name}");
                trials.push(world.trial(name, move |world| race(world, kind, attack)));
            }
        }
    }
    trials
}

fn one_guard(_world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    assert_eq!(guard.client().gate().unwrap(), Gate::Bpf);
    let directory = guard.gate_directory().unwrap().to_owned();
    let again = |arguments: &[&str]| {
        Command::new(BINARY)
            .args([
                "guard",
                "--gate",
                "bpf",
                "--socket",
                "/tmp/mapdirect-second.sock",
            ])
            .arg("--bpf-directory")
            .arg(&directory)
            .args(arguments)
            .output()
            .unwrap()
    };
    for arguments in [&[][..], &["--unload"]] {
        let output = again(arguments);
        assert!(!output.status.success());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("another guard"), "{said}");
    }
    drop(guard);
    assert!(
        !directory.exists(),
        "a guard that ends without pins takes its gate along"
    );
}

/// How many fanotify groups a user may have; none until this is dropped.
struct NoFanotify(String);

impl NoFanotify {
    const LIMIT: &str = "/proc/sys/fs/fanotify/max_user_groups";

    fn begin() -> Self {
        let before = std::fs::read_to_string(Self::LIMIT).unwrap();
        std::fs::write(Self::LIMIT, "0").unwrap();
        Self(before)
    }
}

impl Drop for NoFanotify {
    fn drop(&mut self) {
        std::fs::write(Self::LIMIT, &self.0).unwrap();
    }
}

/// A guard with this gate opens no fanotify group: a kernel without fanotify,
/// or a sandbox that denies it, is good enough.
fn needs_no_fanotify(world: &World) {
    let path = written(&world.disk(Kind::EXT4), "in-kernel-no-fanotify", 1 << 20);
    let file = open(&path);
    let limit = NoFanotify::begin();
    for group in [Group::notification(), Group::pre_content()] {
        assert_eq!(group.unwrap_err(), Errno::MFILE);
    }
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let held = pin(&guard.client(), &file, 0..65536);
    assert_eq!(punch(&file, 8192), Err(Errno::TXTBSY));
    drop(held);
    wait_until_unpinned(&path);
    assert_eq!(punch(&file, 8192), Ok(()));
    drop((guard, limit));
    assert!(Group::notification().is_ok());
    std::fs::remove_file(&path).unwrap();
}

fn refusals_are_told(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(Kind::EXT4), "in-kernel-told", 1 << 20);
    let file = open(&path);
    let held = pin(&guard.client(), &file, 0..65536);
    assert_eq!(
        raw::fallocate(file.as_fd(), 3, 8192, 4096),
        Err(Errno::TXTBSY)
    );
    let status = wait_for(Duration::from_secs(5), || {
        let status = guard.client().status().unwrap();
        Ok((!status.recent.is_empty()).then_some(status))
    })
    .unwrap();
    assert_eq!(status.gate, Gate::Bpf);
    assert_eq!(status.refused, [(String::from("punch-hole"), 1)]);
    let refused = &status.recent[0];
    assert_eq!(refused.operation, "punch-hole");
    assert_eq!(refused.range, Some(8192..12_288));
    assert_eq!(Path::new(&refused.path), path);
    assert!(refused.command.contains("native") || !refused.command.is_empty());
    drop((held, file));
    std::fs::remove_file(&path).unwrap();
}

/// What every read and write pays for is there while something is pinned.
fn rests(world: &World) {
    let path = written(&world.disk(Kind::EXT4), "in-kernel-rests", 1 << 20);
    let file = open(&path);
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let directory = guard.gate_directory().unwrap().to_owned();
    let is_attached = |program: &str| directory.join(format!("link-{program}")).exists();
    let costly = ["file_free", "file_open", "file_permission"];
    let attached = || costly.map(is_attached);
    assert!(is_attached("file_fcntl"));
    assert_eq!(attached(), [false; 3]);
    for _ in 0..2 {
        let held = pin(&guard.client(), &file, 0..65536);
        assert_eq!(attached(), [true; 3]);
        assert_eq!(punch(&file, 8192), Err(Errno::TXTBSY));
        drop(held);
        wait_until_unpinned(&path);
        assert_eq!(attached(), [true; 3], "somebody else may pin soon");
        wait_for(Duration::from_secs(60), || {
            Ok((attached() == [false; 3]).then_some(()))
        })
        .unwrap();
    }
    // A guard that was killed while nothing was pinned leaves nothing that
    // the next one could not replace.
    let gate = guard.kill_and_keep().unwrap();
    let guard = GuardProcess::start_at(Path::new(BINARY), &[], gate).unwrap();
    assert_eq!(attached(), [false; 3]);
    let held = pin(&guard.client(), &file, 0..65536);
    assert_eq!(punch(&file, 8192), Err(Errno::TXTBSY));
    drop((held, guard, file));
    std::fs::remove_file(&path).unwrap();
}

pub fn punch(file: &File, offset: u64) -> Result<(), Errno> {
    raw::fallocate(file.as_fd(), 3, offset, 4096)
}

/// Waits until nothing is refused any more; a second at most.
pub fn wait_until_unpinned(path: &Path) {
    wait_for(Duration::from_secs(5), || {
        Ok((!is_pinned(path)).then_some(()))
    })
    .unwrap();
}

/// With the guard killed everything is refused as before, and one that comes
/// later knows the pins.
fn killed_and_adopted(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = written(&disk, "in-kernel-adopted", 1 << 20);
    let file = open(&path);
    // Holes, so that runs matter.
    assert_eq!(punch(&file, 40_960), Ok(()));
    file.sync_all().unwrap();
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let held = pin(&guard.client(), &file, 0..65536);
    let other = pin(&guard.client(), &file, 131_072..196_608);
    let refuses = |offset| {
        assert_eq!(punch(&file, offset), Err(Errno::TXTBSY));
        assert_eq!(rustix::fs::ftruncate(&file, 4096), Err(Errno::TXTBSY));
        assert_eq!(
            rustix::io::pwrite(&file, b"x", 40_960),
            if offset < 65536 {
                Err(Errno::TXTBSY)
            } else {
                Ok(1)
            }
        );
        // What is stable may be written to, what is beside it punched.
        assert_eq!(rustix::io::pwrite(&file, b"x", offset), Ok(1));
        assert_eq!(punch(&file, 524_288), Ok(()));
    };
    refuses(8192);
    let gate = guard.kill_and_keep().unwrap();
    refuses(8192);
    let guard = GuardProcess::start_at(Path::new(BINARY), &[], gate).unwrap();
    refuses(8192);
    let known = guard.client().pinned_ranges(&file).unwrap();
    let mut ranges: Vec<_> = known.iter().map(|pinned| pinned.range.clone()).collect();
    ranges.sort_by_key(|range| range.start);
    assert_eq!(ranges, [0..65536, 131_072..196_608]);
    // It counts what it took over like what it grants.
    let third = pin(&guard.client(), &file, 262_144..327_680);
    drop(held);
    wait_for(Duration::from_secs(5), || Ok(punch(&file, 8192).ok())).unwrap();
    assert_eq!(punch(&file, 135_168), Err(Errno::TXTBSY));
    assert_eq!(punch(&file, 266_240), Err(Errno::TXTBSY));
    drop(other);
    drop(third);
    wait_until_unpinned(&path);
    drop((guard, file));
    std::fs::remove_file(&path).unwrap();
}

/// The kernel ends a pin by itself, and `--unload` all of them.
fn ends_without_a_guard(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = written(&disk, "in-kernel-ends", 1 << 20);
    let second = written(&disk, "in-kernel-ends-2", 1 << 20);
    let file = open(&path);
    let other = open(&second);
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let held = pin(&guard.client(), &file, 0..65536);
    let stays = pin(&guard.client(), &other, 0..65536);
    let gate = guard.kill_and_keep().unwrap();
    assert_eq!(punch(&file, 0), Err(Errno::TXTBSY));
    drop(held);
    assert_eq!(punch(&file, 0), Ok(()), "at once");
    assert_eq!(punch(&other, 0), Err(Errno::TXTBSY));
    drop(gate);
    assert_eq!(punch(&other, 0), Ok(()), "it was unloaded");
    drop((stays, file, other));
    std::fs::remove_file(&path).unwrap();
    std::fs::remove_file(&second).unwrap();
}

/// Whoever has the file open for writing may keep it.
fn writers_stay(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "in-kernel-writers", 1 << 20);
    let writer = open(&path);
    let appender = File::options().append(true).open(&path).unwrap();
    let file = open(&path);
    let guard = world.guard().client();
    let held = map(&guard, &file, 65_536..131_072);
    assert_eq!(punch(&file, 262_144), Ok(()));
    let frozen = pin(&guard, &file, 262_144..266_240);
    // RWF_NOAPPEND, Linux 6.9: it goes where it says, and not to the end.
    let noappend = raw::pwritev2(appender.as_fd(), &[1; 100], 262_144, 0x20);
    assert!(
        matches!(noappend, Err(Errno::TXTBSY | Errno::OPNOTSUPP)),
        "{noappend:?}"
    );
    drop(frozen);
    assert_eq!(rustix::io::pwrite(&writer, b"stable", 70_000), Ok(6));
    assert_eq!(rustix::io::write(&appender, &[1; 5000]), Ok(5000));
    // One of several pins: the guard takes it out, a moment later.
    wait_for(Duration::from_secs(5), || {
        Ok(rustix::fs::ftruncate(&writer, 131_072).ok())
    })
    .unwrap();
    assert_eq!(rustix::fs::ftruncate(&writer, 131_071), Err(Errno::TXTBSY));
    assert_eq!(punch(&writer, 131_072), Ok(()));
    assert_eq!(punch(&writer, 126_976), Err(Errno::TXTBSY));
    let mut seen = [0; 6];
    held.read_exact_at(&mut seen, 70_000 - 65_536).unwrap();
    assert_eq!(&seen, b"stable");
    drop((held, file, writer, appender));
    std::fs::remove_file(&path).unwrap();
}

/// Asynchronous direct writes to what is stable pass. Where one can be untorn, the
/// first is refused, until the gate sees what they are.
fn direct_aio(world: &World, kind: Kind) {
    // RWF_ATOMIC for any file of an XFS with reflink: Linux 6.16.
    let can_be_untorn = kind.reflink() && uname::version() >= (6, 16);
    let path = written(&world.disk(kind), "in-kernel-direct-aio", 1 << 20);
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(&path)
        .unwrap();
    let guard = world.guard().client();
    let pin = pin(&guard, &open(&path), 0..1 << 20);
    let mut buffer = PageBuffer::new(65_536);
    let mut write = || raw::aio_write(file.as_fd(), buffer.bytes(), 65_536, 0);
    if can_be_untorn {
        wait_for(Duration::from_secs(5), || Ok(write().ok())).unwrap();
    }
    assert_eq!(write(), Ok(65_536));
    drop((pin, file));
    std::fs::remove_file(&path).unwrap();
}

/// What is noted of an operation that fails before anybody is asked is not
/// taken for a part of the next one.
fn stale_notes(world: &World, kind: Kind) {
    const APPEND: i32 = 0x10;
    const NOAPPEND: i32 = 0x20;
    let path = written(&world.disk(kind), "in-kernel-stale", 1 << 20);
    let file = open(&path);
    let appender = File::options().append(true).open(&path).unwrap();
    assert_eq!(punch(&file, 262_144), Ok(()));
    file.sync_all().unwrap();
    let guard = world.guard().client();
    let held = pin(&guard, &file, 262_144..266_240);
    let before = held.block_map().clone();
    // Nothing is written, and then something to a hole.
    for flags in [APPEND, NOAPPEND] {
        let nothing = raw::pwritev2(file.as_fd(), &[], 0, flags);
        assert!(
            matches!(nothing, Ok(0) | Err(Errno::OPNOTSUPP)),
            "{nothing:?}"
        );
        let written = rustix::io::pwrite(&file, b"x", 262_144);
        assert_eq!(written, Err(Errno::TXTBSY), "after flags {flags:#x}");
    }
    // Where it says is not where an appender writes.
    let nothing = raw::pwritev2(appender.as_fd(), &[], 0, NOAPPEND);
    assert!(
        matches!(nothing, Ok(0) | Err(Errno::OPNOTSUPP)),
        "{nothing:?}"
    );
    assert_eq!(rustix::io::write(&appender, &[1; 100]), Ok(100));
    // A clone to another filesystem fails, and whoever tried reads instead.
    let elsewhere = ScratchDirectory::new("stale").unwrap();
    let copy = File::create(elsewhere.path().join("copy")).unwrap();
    assert!(rustix::fs::ioctl_ficlone(&copy, &file).is_err());
    let mut page = [0; 4096];
    assert_eq!(file.read_at(&mut page, 262_144).unwrap(), 4096);
    assert_eq!(page, [0; 4096]);
    // A copy to another one takes no blocks.
    if kind == Kind::XFS {
        let other = written(&world.disk(Kind::XFS_PLAIN), "in-kernel-stale", 1 << 20);
        let copy = open(&other);
        let (mut from, mut to) = (262_144, 0);
        let copied =
            rustix::fs::copy_file_range(&file, Some(&mut from), &copy, Some(&mut to), 8192);
        assert!(matches!(copied, Ok(8192) | Err(Errno::XDEV)), "{copied:?}");
        std::fs::remove_file(&other).unwrap();
    }
    let now = mapdirect::block_map(&file, 262_144..266_240).unwrap();
    assert_eq!(before.extents(), now.extents());
    drop((held, file, appender));
    std::fs::remove_file(&path).unwrap();
}

/// The program that notes where a write goes may be left out, if it was
/// preempted: then the hook judges by registers alone. Here it is taken off.
fn unnoticed_writes(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "in-kernel-unnoticed", 1 << 20);
    let mut file = open(&path);
    let mut appender = File::options().append(true).open(&path).unwrap();
    assert_eq!(punch(&file, 262_144), Ok(()));
    file.sync_all().unwrap();
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let held = pin(&guard.client(), &file, 262_144..270_336);
    let before = held.block_map().clone();
    let vectored = |offset| raw::pwritev2(file.as_fd(), b"x", offset, 0);
    assert_eq!(vectored(0), Ok(1));
    let directory = guard.gate_directory().unwrap().to_owned();
    // A guard would keep it.
    let gate = guard.kill_and_keep().unwrap();
    for program in ["note_remap", "note_clone", "note_rw"] {
        // Which of them there are is up to the kernel.
        let taken_off = std::fs::remove_file(directory.join(format!("link-{program}")));
        assert!(taken_off.is_ok() || program != "note_rw");
    }
    // How long a vector is nobody knows now, so it may reach the hole.
    wait_for(Duration::from_secs(20), || {
        Ok((vectored(0) == Err(Errno::TXTBSY)).then_some(()))
    })
    .unwrap();
    assert_eq!(vectored(524_288), Ok(1));
    for (offset, expected) in [
        (0, Ok(1)),
        (266_240, Ok(1)),
        (262_144, Err(Errno::TXTBSY)),
        (266_239, Err(Errno::TXTBSY)),
        (524_288, Ok(1)),
    ] {
        let written = rustix::io::pwrite(&file, b"x", offset);
        assert_eq!(written, expected, "pwrite at {offset}");
        // Where the file stands is no proof: others may move it meanwhile.
        file.seek(SeekFrom::Start(offset)).unwrap();
        let written = rustix::io::write(&file, b"x");
        assert_eq!(written, Err(Errno::TXTBSY), "write at {offset}");
    }
    assert_eq!(
        rustix::io::pwrite(&file, &[1; 8192], 258_048),
        Err(Errno::TXTBSY)
    );
    if kind.reflink() {
        let other = written(&world.disk(kind), "in-kernel-unnoticed-2", 1 << 20);
        let other = open(&other);
        let (mut from, mut to) = (266_240, 0);
        let copied =
            rustix::fs::copy_file_range(&file, Some(&mut from), &other, Some(&mut to), 4096);
        assert_eq!(copied, Err(Errno::TXTBSY), "copied from");
        assert_eq!(rustix::fs::ioctl_ficlone(&other, &file), Err(Errno::TXTBSY));
        std::fs::remove_file(world.disk(kind).path("in-kernel-unnoticed-2")).unwrap();
    }
    appender.write_all(b"more").unwrap();
    assert_eq!(punch(&file, 262_144), Err(Errno::TXTBSY));
    let now = mapdirect::block_map(&file, 262_144..270_336).unwrap();
    assert_eq!(before.extents(), now.extents());
    drop((held, file, appender, gate));
    std::fs::remove_file(&path).unwrap();
}

/// A mapping from before the pin: harmless over stable blocks, in the way of
/// frozen ones.
fn older_mappings(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "in-kernel-older", 1 << 20);
    let file = open(&path);
    assert_eq!(punch(&file, 40_960), Ok(()));
    file.sync_all().unwrap();
    let guard = world.guard().client();
    let stranger = Helper::start("map-shared", &[&path.to_string_lossy()]);
    let mut stranger = stranger.unwrap();
    assert_eq!(stranger.hear().unwrap(), "mapped");
    let stable = pin(&guard, &file, 65_536..131_072);
    let refused = PinOptions::new()
        .range(0..65_536)
        .guard(guard.clone())
        .pin(&file)
        .unwrap_err();
    assert_eq!(refused.kind(), Reason::OpenElsewhere, "{refused:#}");
    assert_eq!(refused.errno(), Errno::TXTBSY.raw_os_error());
    assert!(
        refused
            .openers()
            .iter()
            .any(|opener| opener.pid == stranger.pid()),
        "{refused:#}"
    );
    stranger.kill().unwrap();
    let frozen = pin(&guard, &file, 0..65_536);
    drop((stable, frozen, file));
    wait_until_unpinned(&path);
    std::fs::remove_file(&path).unwrap();
}

/// Role: maps a file shared and writable, and waits.
pub fn play_map_shared(arguments: &[String]) -> anyhow::Result<()> {
    use mapdirect_testkit::process::{listen, say};
    let file = open(Path::new(&arguments[0]));
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let map = raw::PlainMap::new(file.as_fd(), prot, libc::MAP_SHARED, 131_072, 65_536)?;
    map.store(0, 1);
    say("mapped");
    let _ = listen()?;
    drop(map);
    Ok(())
}

/// A mapping from before the pin that is at no place for long: nobody who looks at one
/// place after the other may find it, and it is in the way of frozen blocks all the same.
fn moving_mappings(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "in-kernel-moving", 1 << 20);
    let file = open(&path);
    assert_eq!(punch(&file, 40_960), Ok(()));
    file.sync_all().unwrap();
    crate::policy::allow(&path, 0o666);
    let options = PinOptions::new()
        .range(0..65_536)
        .guard(world.guard().client());
    let stranger = Helper::start("map-moving", &[&path.to_string_lossy()]);
    let mut stranger = stranger.unwrap();
    assert_eq!(stranger.hear().unwrap(), "moving");
    for _ in 0..20 {
        let refused = options.pin(&file).unwrap_err();
        assert_eq!(refused.kind(), Reason::OpenElsewhere, "{refused:#}");
        assert_eq!(refused.errno(), Errno::TXTBSY.raw_os_error());
    }
    stranger.kill().unwrap();
    drop((options.pin(&file).unwrap(), file));
    wait_until_unpinned(&path);
    std::fs::remove_file(&path).unwrap();
}

/// Role: moves a mapping by which it can store to a file, for ever.
pub fn play_map_moving(arguments: &[String]) -> anyhow::Result<()> {
    raw::become_nobody()?;
    let file = open(Path::new(&arguments[0]));
    let mut shuttle = raw::Shuttle::new(file.as_fd(), 65_536, 1000)?;
    mapdirect_testkit::process::say("moving");
    loop {
        shuttle.go()?;
    }
}

/// A loop device discards behind everybody's back.
fn loop_devices(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "in-kernel-loop", 1 << 20);
    let file = open(&path);
    let guard = world.guard().client();
    let attach = || {
        Command::new("losetup")
            .args(["--show", "-f"])
            .arg(&path)
            .output()
            .unwrap()
    };
    let held = pin(&guard, &file, 0..65_536);
    assert!(!attach().status.success(), "a pinned file became a disk");
    drop(held);
    wait_until_unpinned(&path);
    let output = attach();
    assert!(output.status.success(), "{output:?}");
    let device = String::from_utf8(output.stdout).unwrap();
    let refused = PinOptions::new()
        .range(0..65_536)
        .guard(guard)
        .pin(&file)
        .unwrap_err();
    assert_eq!(refused.errno(), Errno::TXTBSY.raw_os_error(), "{refused:#}");
    assert!(refused.to_string().contains("loop") || !refused.openers().is_empty());
    run(Command::new("losetup").arg("-d").arg(device.trim())).unwrap();
    drop(file);
    std::fs::remove_file(&path).unwrap();
}

/// An overlay mounted later would change the file below under another name: it
/// may not open it for writing, nor truncate it.
fn overlay(_world: &World, kind: Kind) {
    let disk = Disk::new(kind, 512).unwrap();
    for name in ["upper", "work", "lower", "merged"] {
        std::fs::create_dir(disk.path(name)).unwrap();
    }
    let path = disk.path("upper/file");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    let file = open(&path);
    file.sync_all().unwrap();
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let held = pin(&guard.client(), &file, 0..65_536);
    let root = disk.root().display().to_string();
    let merged = disk.path("merged");
    run(Command::new("mount")
        .args(["-t", "overlay", "overlay", "-o"])
        .arg(format!(
            "lowerdir={root}/lower,upperdir={root}/upper,workdir={root}/work"
        ))
        .arg(&merged))
    .unwrap();
    let above = merged.join("file");
    let truncated = raw::truncate(&raw::c_path(&above), 0);
    let opened = File::options().read(true).write(true).open(&above);
    let read = std::fs::read(&above);
    run(Command::new("umount").arg(&merged)).unwrap();
    assert_eq!(truncated, Err(Errno::TXTBSY));
    let errno = opened.map(drop).map_err(|error| error.raw_os_error());
    assert_eq!(errno, Err(Some(Errno::TXTBSY.raw_os_error())));
    assert_eq!(read.unwrap().len(), 1 << 20);
    let now = mapdirect::block_map(&file, 0..65_536).unwrap();
    assert_eq!(now.extents(), held.extents());
    drop((held, file));
}

/// What passes its permission check before the pin, and works after it.
const RACERS: [&str; 9] = [
    "pwrite",
    "aio-write",
    "io_uring-worker-write",
    "sendfile-into",
    "fallocate",
    "punch-hole",
    "ftruncate",
    "truncate",
    "ficlonerange-from",
];

/// Whether a thread of a process waits for a thaw.
fn waits_for_thaw(pid: i32) -> bool {
    is_inside(pid, "percpu_rwsem_wait") || is_inside(pid, "__percpu_down_read")
}

/// The filesystem is frozen, the operation begun, the pin asked for, and only
/// then the filesystem thawed: whatever comes of it, a pin that was granted is
/// true.
fn race(world: &World, kind: Kind, attack: &'static Attack) {
    let disk = Disk::new(kind, 512).unwrap();
    let guard = world.guard().client();
    for place in [Place::Hole, Place::Stable] {
        let subject = Subject::new(&disk, &format!("race-{}", place.name()), true);
        let mut stranger = Stranger::start(
            attack,
            Door::Path,
            &subject.path,
            &subject.other,
            subject.bytes(place),
            kind.block(),
            true,
        )
        .unwrap();
        let pid = stranger.pid();
        let file = File::open(&subject.path).unwrap();
        let frozen = Frozen::new(&disk).unwrap();
        let (result, pinned) = std::thread::scope(|scope| {
            let attacking = scope.spawn(move || stranger.attack().unwrap());
            wait_for(Duration::from_secs(10), || {
                Ok(waits_for_thaw(pid).then_some(()))
            })
            .unwrap();
            let pinning = scope.spawn(|| {
                PinOptions::new()
                    .range(subject.pinned())
                    .patience(Duration::from_secs(10))
                    .guard(guard.clone())
                    .pin(&file)
            });
            std::thread::sleep(Duration::from_millis(300));
            drop(frozen);
            (attacking.join().unwrap(), pinning.join().unwrap())
        });
        if attack.row == Row::Truncate {
            // It waits before it asks.
            assert!(matches!(result, Ok(()) | Err(Errno::TXTBSY)), "{result:?}");
        } else {
            assert_eq!(result, Ok(()), "it had passed before");
        }
        match pinned {
            Ok(pin) => {
                file.sync_all().unwrap();
                let now = subject.block_map();
                assert_eq!(pin.block_map().extents(), now.extents());
                world.count("pins granted beside an operation under way", 1);
            }
            Err(error) => {
                assert_eq!(error.errno(), Errno::TXTBSY.raw_os_error(), "{error:#}");
                world.count("pins refused for an operation under way", 1);
            }
        }
    }
}

/// The program without a library, compiled once.
pub fn raw_mmap() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/native/raw_mmap.c");
        let program =
            std::env::temp_dir().join(format!("mapdirect-raw-mmap-{}", std::process::id()));
        run(Command::new("cc")
            .args(["-static", "-O1", "-o"])
            .arg(&program)
            .arg(source))
        .unwrap();
        program
    })
}

pub const MAP_DIRECT: i32 = 0x200_0000;
pub const BOTH: i32 = libc::PROT_READ | libc::PROT_WRITE;

pub fn raw_command(path: &Path, mode: &str, prot: i32, flags: i32, range: Range<u64>) -> Command {
    let mut command = Command::new(raw_mmap());
    command
        .arg(path)
        .arg(mode)
        .arg(prot.to_string())
        .arg(flags.to_string())
        .arg(range.start.to_string())
        .arg((range.end - range.start).to_string());
    command
}

/// What mmap(2) says, if it does not map.
pub fn raw_errno(mut command: Command) -> Option<Errno> {
    let output = command.stdin(std::process::Stdio::null()).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let errno = said.trim().strip_prefix("errno ")?.parse().unwrap();
    Some(Errno::from_raw_os_error(errno))
}

fn raw_errors(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "in-kernel-raw-errors", 1 << 20);
    let file = open(&path);
    assert_eq!(punch(&file, 524_288), Ok(()));
    file.sync_all().unwrap();
    let guard = world.guard().client();
    let shared = libc::MAP_SHARED | MAP_DIRECT;
    let try_it =
        |mode: &str, prot, flags, range| raw_errno(raw_command(&path, mode, prot, flags, range));
    // Nobody has pinned it.
    assert_eq!(
        try_it("both", BOTH, shared, 0..4096),
        Some(Errno::OPNOTSUPP)
    );
    let held = map(&guard, &file, 0..65_536);
    let frozen = pin(&guard, &file, 520_192..532_480);
    let private = libc::MAP_PRIVATE | MAP_DIRECT;
    let anonymous = libc::MAP_ANONYMOUS | MAP_DIRECT | libc::MAP_SHARED;
    let validate = libc::MAP_SHARED_VALIDATE | MAP_DIRECT;
    for (mode, prot, flags, range, expected) in [
        ("both", BOTH, private, 0..4096, Errno::INVAL),
        ("none", BOTH, anonymous, 0..4096, Errno::INVAL),
        ("both", BOTH, shared, 0..0, Errno::INVAL),
        ("both", BOTH, shared, 100..4096, Errno::INVAL),
        ("both", libc::PROT_READ, shared, 0..4096, Errno::ACCESS),
        ("read", libc::PROT_READ, shared, 0..4096, Errno::ACCESS),
        ("both", BOTH, validate, 0..4096, Errno::OPNOTSUPP),
        ("both", BOTH, shared, 61_440..69_632, Errno::OPNOTSUPP),
        ("both", BOTH, shared, 524_288..528_384, Errno::OPNOTSUPP),
    ] {
        let got = try_it(mode, prot, flags, range.clone());
        assert_eq!(got, Some(expected), "{mode} {prot} {flags:#x} {range:?}");
    }
    // Without the capability.
    let mut command = Command::new("setpriv");
    let plain = raw_command(&path, "both", BOTH, shared, 0..4096);
    command
        .arg("--bounding-set=-linux_immutable")
        .arg(plain.get_program())
        .args(plain.get_args());
    assert_eq!(raw_errno(command), Some(Errno::ACCESS));
    // A file that nothing was ever pinned of, on a filesystem that cannot.
    let elsewhere = std::env::temp_dir().join("mapdirect-raw-elsewhere");
    std::fs::write(&elsewhere, [1; 4096]).unwrap();
    let command = raw_command(&elsewhere, "both", BOTH, shared, 0..4096);
    assert_eq!(raw_errno(command), Some(Errno::OPNOTSUPP));
    std::fs::remove_file(&elsewhere).unwrap();
    drop((held, frozen, file));
    wait_until_unpinned(&path);
    std::fs::remove_file(&path).unwrap();
}

/// It keeps pinned what it maps, whoever else lets go.
fn raw_mapping(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "in-kernel-raw", 1 << 20);
    let file = open(&path);
    let guard = world.guard().client();
    let held = map(&guard, &file, 0..65_536);
    let shared = libc::MAP_SHARED | MAP_DIRECT;
    let mut raw = Helper::spawn(raw_command(&path, "both", BOTH, shared, 4096..12_288)).unwrap();
    assert_eq!(raw.hear().unwrap(), "mapped");
    let mut order = |word: &str| {
        raw.tell(word).unwrap();
        assert_eq!(raw.hear().unwrap(), "done");
    };
    order("store");
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, 8000).unwrap();
    assert_eq!(bytes, [0x5a; 4]);
    drop(held);
    // Time for the guard to hear of it, and to do the wrong thing.
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(punch(&file, 4096), Err(Errno::TXTBSY));
    assert_eq!(rustix::fs::ftruncate(&file, 4096), Err(Errno::TXTBSY));
    order("close");
    assert_eq!(punch(&file, 4096), Err(Errno::TXTBSY));
    let known = guard.pinned_ranges(&file).unwrap();
    assert!(
        known.iter().any(|pinned| pinned.pid == raw.pid()),
        "{known:?}"
    );
    raw.tell("unmap").unwrap();
    assert_eq!(raw.hear().unwrap(), "done");
    assert_eq!(punch(&file, 4096), Ok(()), "at once");
    raw.kill().unwrap();
    drop(file);
    wait_until_unpinned(&path);
    std::fs::remove_file(&path).unwrap();
}
