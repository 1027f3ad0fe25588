//! Writers that meet no hook: each line of the table in mapdirect.7
//! (`testkit/src/writers.rs`), tried under the gate there is.

mod lio;
mod md;
mod nfs;

use crate::world::{BINARY, World, patience};
use anyhow::{Result, bail};
use libtest_mimic::Trial;
use mapdirect::{BlockMap, Guard, Integrity, Pin, PinOptions};
use mapdirect_sys::Errno;
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::disk::run;
use mapdirect_testkit::overlay::{Above, OPERATIONS, Owner};
use mapdirect_testkit::process::{GuardProcess, Helper, wait_for};
use mapdirect_testkit::writers::{Answer, When, Writer};
use mapdirect_testkit::{Disk, Kind, raw};
use rustix::process::{Resource, Rlimit, setrlimit};
use std::fmt;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// The file is written up to here,
const WRITTEN: u64 = MIB;
/// and a hole up to here.
const LENGTH: u64 = 2 * MIB;

pub fn trials(world: &World) -> Vec<Trial> {
    // On loop devices: what is on persistent memory differs in nothing here.
    let kinds: &[Kind] = if crate::world::dax_kinds().is_empty() {
        &[Kind::XFS, Kind::EXT4]
    } else {
        &[]
    };
    let mut trials = world.trials(
        "writers",
        kinds,
        &[
            ("overlay-after", overlay_after),
            ("overlay-before", overlay_before),
            ("overlay-detached", overlay_detached),
            ("overlay-between", overlay_between),
            ("copy-up", copy_up),
            ("core", core),
            ("acct", acct),
            ("nvmet", nvmet),
            ("lio", lio::backstores),
            ("md-bitmap", md::bitmap),
            ("nfs", nfs::clients),
            ("loop", loop_device),
            ("swapon", swapon),
        ],
    );
    trials.extend(world.trials(
        "writers",
        &kinds[kinds.len().min(1)..],
        &[("verity", verity)],
    ));
    trials
}

/// What came of a writer.
enum Came {
    Passed,
    Refused(String),
}

impl fmt::Display for Came {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => f.write_str("it passed"),
            Self::Refused(why) => write!(f, "it was refused ({why})"),
        }
    }
}

impl Came {
    fn of<T, E: std::fmt::Display>(result: Result<T, E>) -> Self {
        match result {
            Ok(_) => Self::Passed,
            Err(error) => Self::Refused(error.to_string()),
        }
    }
}

/// A file of a user without privilege, in a directory of that user's.
struct Scene<'a> {
    world: &'a World,
    guard: Guard,
    base: PathBuf,
    path: PathBuf,
    file: File,
    range: u64,
}

impl<'a> Scene<'a> {
    /// Before the guard that all tests share, with a hole at the end of the
    /// file, which is pinned as well.
    fn new(world: &'a World, disk: &Disk, name: &str) -> Self {
        Self::with(world, world.guard().client(), disk, name, true)
    }

    fn with(world: &'a World, guard: Guard, disk: &Disk, name: &str, hole: bool) -> Self {
        let base = disk.path(&format!("writers-{name}"));
        let up = base.join("up");
        fs::create_dir_all(&up).unwrap();
        let path = up.join("f");
        let length = if hole { WRITTEN } else { LENGTH };
        fs::write(&path, vec![7; usize::try_from(length).unwrap()]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        file.set_len(LENGTH).unwrap();
        file.sync_all().unwrap();
        for path in [&base, &up, &path] {
            chown(path, Some(raw::NOBODY), Some(raw::NOBODY)).unwrap();
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let file = File::open(&path).unwrap();
        Self {
            world,
            guard,
            base,
            path,
            file,
            range: LENGTH,
        }
    }

    fn pin(&self, patience: Duration) -> Result<Held, mapdirect::Error> {
        let pin = PinOptions::new()
            .range(0..self.range)
            .patience(patience)
            .guard(self.guard.clone())
            .pin(&self.file)?;
        Ok(Held {
            before: pin.block_map().clone(),
            length: self.file.metadata().unwrap().len(),
            pin,
        })
    }

    /// Whether anything that was promised has changed.
    fn has_changed(&self, held: &Held) -> bool {
        self.file.sync_all().unwrap();
        let now = mapdirect::block_map(&self.file, 0..self.range).unwrap();
        let shorter = self.file.metadata().unwrap().len() < held.length;
        now.extents() != held.before.extents() || shorter
    }

    /// Tries a writer that comes to a pinned file.
    fn after(&self, name: &str, how: &str, writes: impl FnOnce() -> Came) {
        let writer = Writer::find(name, When::After).unwrap();
        let held = self.pin(patience()).unwrap();
        let came = writes();
        self.judge(writer, how, &came, &held);
    }

    /// Tries one that was there before.
    fn before(&self, name: &str, how: &str, writes: impl FnOnce() -> Came) {
        let writer = Writer::find(name, When::Before).unwrap();
        let expected = writer.answer(Gate::under_test());
        match self.pin(Duration::from_millis(500)) {
            Err(error) => {
                let errno = Errno::from_raw_os_error(error.errno());
                println!("writers: {name} {how}, before: the pin is refused ({errno})");
                assert!(
                    matches!(errno, Errno::TXTBSY | Errno::OPNOTSUPP),
                    "{error:#}"
                );
                self.world.count("writers that meet no hook", 1);
            }
            Ok(held) => {
                let came = writes();
                assert!(
                    expected != Answer::GrantRefused,
                    "{name} {how}: the pin was granted beside a writer that was there \
                     ({came}, changed: {})",
                    self.has_changed(&held)
                );
                self.judge(writer, how, &came, &held);
            }
        }
    }

    fn judge(&self, writer: &Writer, how: &str, came: &Came, held: &Held) {
        let changed = self.has_changed(held);
        let expected = writer.answer(Gate::under_test());
        println!("writers: {} {how}: {came}, changed: {changed}", writer.name);
        match expected {
            Answer::Refused => assert!(
                matches!(came, Came::Refused(_)) && !changed,
                "{} {how}: {came}, changed: {changed}",
                writer.name
            ),
            Answer::Harmless => assert!(!changed, "{} {how}: {came}", writer.name),
            Answer::Noticed => match came {
                // It is not to be had here.
                Came::Refused(_) => assert!(!changed, "{} {how}: {came}", writer.name),
                Came::Passed => {
                    assert!(changed, "{} {how}: it passed, and did nothing", writer.name);
                    self.is_told(&format!("{} {how}", writer.name), held);
                }
            },
            Answer::GrantRefused => panic!("{}: the pin was granted", writer.name),
        }
        self.world.count("writers that meet no hook", 1);
    }

    /// The holder hears of the breach, and the status shows it.
    fn is_told(&self, who: &str, held: &Held) {
        let breach = wait_for(patience(), || {
            Ok(match held.pin.integrity() {
                Integrity::Breached { breaches, .. } => breaches.into_iter().next(),
                _ => None,
            })
        });
        let breach = breach.unwrap_or_else(|_| panic!("{who}: the holder was not told"));
        assert_eq!(breach.pin, held.pin.pin_id(), "{who}");
        assert_ne!(breach.before, breach.after, "{who}");
        assert!(held.pin.state().is_lost(), "{who}: {}", held.pin.state());
        let status = self.guard.status().unwrap();
        let is_shown = status.breaches.iter().any(|shown| {
            (shown.pin, &shown.range, shown.time) == (breach.pin, &breach.range, breach.time)
        });
        assert!(is_shown, "{who}: the status does not show it");
        self.world.count("changes left to be noticed, and told", 1);
    }
}

impl Drop for Scene<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.base);
    }
}

/// A pin, and what it promised.
struct Held {
    before: BlockMap,
    length: u64,
    pin: Pin,
}

/// The system has one of some things.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where an operation on the file does harm.
fn harmful(operation: &str) -> u64 {
    match operation {
        "truncate" => 4096,
        "punch" => 8192,
        _ => WRITTEN + 65_536,
    }
}

fn name_of(operation: &str) -> &'static str {
    if operation == "truncate" {
        "overlay-truncate"
    } else {
        "overlay"
    }
}

/// A disk and a guard of one's own: while an overlay is there, nobody else's
/// pins are granted as they would be.
fn alone(kind: Kind) -> (Disk, GuardProcess) {
    let disk = Disk::new(kind, 512).unwrap();
    (disk, GuardProcess::start(Path::new(BINARY)).unwrap())
}

/// Mounts one, or says that there can be none here.
fn above(scene: &Scene<'_>, owner: Owner, operation: &str, early: bool) -> Option<Above> {
    match Above::new(&scene.base, owner, operation, early).unwrap() {
        Ok(above) => Some(above),
        Err(why) => {
            scene.world.unavailable(why);
            None
        }
    }
}

/// Every operation through overlays mounted after the pin.
fn overlay_after(world: &World, kind: Kind) {
    let (disk, guard) = alone(kind);
    for owner in [Owner::Root, Owner::Nobody] {
        for operation in OPERATIONS {
            let how = format!("{operation} by {}", owner.name());
            let name = how.replace(' ', "-");
            let scene = Scene::with(world, guard.client(), &disk, &name, true);
            scene.after(name_of(operation), &how, || {
                match above(&scene, owner, operation, false) {
                    Some(mut above) => Came::of(above.attack(harmful(operation)).unwrap()),
                    None => Came::Refused(String::from("there is no such overlay here")),
                }
            });
        }
    }
}

/// The same with overlays that were there before, with the file open.
fn overlay_before(world: &World, kind: Kind) {
    let (disk, guard) = alone(kind);
    let mut all = Vec::new();
    for owner in [Owner::Root, Owner::Nobody] {
        for operation in OPERATIONS {
            let how = format!("{operation} by {}", owner.name());
            let name = how.replace(' ', "-");
            let scene = Scene::with(world, guard.client(), &disk, &name, true);
            if let Some(above) = above(&scene, owner, operation, true) {
                all.push((operation, how, above, scene));
            }
        }
    }
    // What is known of mounts may be a second old.
    std::thread::sleep(Duration::from_millis(1100));
    for (operation, how, mut above, scene) in all {
        scene.before(name_of(operation), &how, || {
            Came::of(above.attack(harmful(operation)).unwrap())
        });
    }
}

/// Overlays that no list of mounts has.
fn overlay_detached(world: &World, kind: Kind) {
    let (disk, guard) = alone(kind);
    for operation in OPERATIONS {
        let scene = Scene::with(
            world,
            guard.client(),
            &disk,
            &format!("detached-{operation}"),
            true,
        );
        let Some(mut above) = above(&scene, Owner::Detached, operation, true) else {
            continue;
        };
        let name = if operation == "truncate" {
            "overlay-detached-truncate"
        } else {
            "overlay-detached"
        };
        scene.before(name, operation, || {
            Came::of(above.attack(harmful(operation)).unwrap())
        });
    }
}

/// One that came between two pins: the gate knew the file already, and let it
/// in.
fn overlay_between(world: &World, kind: Kind) {
    let (disk, guard) = alone(kind);
    let scene = Scene::with(world, guard.client(), &disk, "between", true);
    drop(scene.pin(patience()).unwrap());
    crate::world::wait_until_free(&scene.path);
    let Some(mut above) = above(&scene, Owner::Detached, "write", true) else {
        return;
    };
    scene.before("overlay-detached", "write, between two pins", || {
        Came::of(above.attack(harmful("write")).unwrap())
    });
}

/// The pinned file is in a lower directory, and copied, or cloned.
fn copy_up(world: &World, kind: Kind) {
    let (disk, guard) = alone(kind);
    for owner in [Owner::Root, Owner::Nobody] {
        let scene = Scene::with(
            world,
            guard.client(),
            &disk,
            &format!("copy-up-{}", owner.name()),
            true,
        );
        scene.after("copy-up", owner.name(), || {
            match above(&scene, owner, "copy-up", false) {
                Some(mut above) => Came::of(above.attack(4096).unwrap()),
                None => Came::Refused(String::from("there is no such overlay here")),
            }
        });
    }
}

/// Role: dumps core in a directory.
pub fn play_dump_core(arguments: &[String]) -> Result<()> {
    let [directory] = arguments else {
        bail!("wrong arguments");
    };
    let without = Rlimit {
        current: None,
        maximum: None,
    };
    setrlimit(Resource::Core, without)?;
    raw::become_nobody()?;
    std::env::set_current_dir(directory)?;
    std::process::abort();
}

fn core(world: &World, kind: Kind) {
    const PATTERN: &str = "/proc/sys/kernel/core_pattern";
    let _turn = turn();
    let disk = world.disk(kind);
    let scene = Scene::new(world, &disk, "core");
    let target = scene.path.with_file_name("core");
    fs::rename(&scene.path, &target).unwrap();
    let pattern = fs::read_to_string(PATTERN).unwrap();
    let with_pid = fs::read_to_string("/proc/sys/kernel/core_uses_pid").unwrap();
    if pattern.trim() != "core" || with_pid.trim() != "0" {
        let written = fs::write(PATTERN, "core")
            .and_then(|()| fs::write("/proc/sys/kernel/core_uses_pid", "0"));
        if let Err(error) = written {
            world.unavailable(format!("core dumps to a file: {error}"));
            return;
        }
    }
    scene.after("core", "by nobody", || {
        let up = scene.base.join("up");
        let helper = Helper::start("dump-core", &[&up.to_string_lossy()]).unwrap();
        let status = helper.status().unwrap();
        assert_eq!(status, 128 + libc::SIGABRT);
        let dumped = fs::metadata(&target).is_ok_and(|core| core.len() != LENGTH);
        Came::of(if dumped { Ok(()) } else { Err("no core") })
    });
    let _ = fs::write(PATTERN, pattern.trim());
    let _ = fs::write("/proc/sys/kernel/core_uses_pid", with_pid.trim());
}

/// Records of processes that end; ends when it is dropped.
struct Accounting;

impl Accounting {
    fn to(path: &Path) -> raw::Result<Self> {
        raw::account_to(Some(path)).map(|()| Self)
    }
}

impl Drop for Accounting {
    fn drop(&mut self) {
        let _ = raw::account_to(None);
    }
}

fn end_many_processes() {
    for _ in 0..40 {
        run(&mut Command::new("true")).unwrap();
    }
}

fn acct(world: &World, kind: Kind) {
    let _turn = turn();
    let disk = world.disk(kind);
    let scene = Scene::new(world, &disk, "acct");
    match Accounting::to(&scene.path) {
        Err(errno) => {
            world.unavailable(format!("acct(2): {errno}"));
            return;
        }
        Ok(accounting) => {
            scene.before("acct", "", || {
                end_many_processes();
                Came::Passed
            });
            drop(accounting);
        }
    }
    scene.after("acct", "", || {
        let accounting = Accounting::to(&scene.path);
        if accounting.is_ok() {
            end_many_processes();
        }
        Came::of(accounting)
    });
}

/// Loads modules and mounts configfs, or says what is missing.
fn configfs(world: &World, modules: &[&str]) -> bool {
    for module in modules {
        if let Err(error) = run(Command::new("modprobe").arg(module)) {
            world.unavailable(format!("{module}: {error:#}"));
            return false;
        }
    }
    let _ = run(Command::new("mount").args(["-t", "configfs", "none", "/sys/kernel/config"]));
    true
}

/// Directories of configfs that are taken away when it is dropped, the last
/// one first.
struct Configured {
    directories: Vec<PathBuf>,
    /// Told 0 before that.
    enable: PathBuf,
}

impl Drop for Configured {
    fn drop(&mut self) {
        let _ = fs::write(&self.enable, "0");
        for directory in self.directories.iter().rev() {
            let _ = fs::remove_dir(directory);
        }
    }
}

/// A namespace of nvmet in a file.
fn nvmet_with(path: &Path) -> std::io::Result<Configured> {
    let subsystem = PathBuf::from("/sys/kernel/config/nvmet/subsystems/mapdirect-test");
    let namespace = subsystem.join("namespaces/1");
    let enable = namespace.join("enable");
    let mut configured = Configured {
        directories: Vec::new(),
        enable,
    };
    for directory in [subsystem, namespace.clone()] {
        fs::create_dir(&directory)?;
        configured.directories.push(directory);
    }
    fs::write(
        namespace.join("device_path"),
        path.as_os_str().as_encoded_bytes(),
    )?;
    fs::write(&configured.enable, "1")?;
    Ok(configured)
}

fn nvmet(world: &World, kind: Kind) {
    if !configfs(world, &["nvmet"]) {
        return;
    }
    let _turn = turn();
    let disk = world.disk(kind);
    let scene = Scene::new(world, &disk, "nvmet");
    match nvmet_with(&scene.path) {
        Ok(configured) => {
            scene.before("nvmet", "", || Came::Passed);
            drop(configured);
        }
        Err(error) => world.unavailable(format!("nvmet: {error}")),
    }
    scene.after("nvmet", "", || Came::of(nvmet_with(&scene.path)));
}

/// A loop device, detached when it is dropped.
struct Loop(String);

impl Loop {
    fn of(path: &Path, arguments: &[&str]) -> Result<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .args(arguments)
            .arg(path)
            .output()?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(Self(String::from_utf8(output.stdout)?.trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = run(Command::new("losetup").arg("--detach").arg(&self.0));
    }
}

/// Makes a loop device of a descriptor.
fn loop_of(file: &File) -> Result<Loop> {
    const LOOP_SET_FD: u64 = 0x4c00;
    use std::os::fd::AsRawFd;
    let output = Command::new("losetup").arg("--find").output()?;
    let device = String::from_utf8(output.stdout)?.trim().to_owned();
    let opened = File::options().read(true).write(true).open(&device)?;
    let number = u64::from(file.as_raw_fd().cast_unsigned());
    raw::ioctl_value(opened.as_fd(), LOOP_SET_FD, number)?;
    Ok(Loop(device))
}

fn loop_device(world: &World, kind: Kind) {
    let _turn = turn();
    let disk = world.disk(kind);
    let scene = Scene::new(world, &disk, "loop");
    let discard = |device: &Loop| run(Command::new("blkdiscard").arg("-f").arg(&device.0));
    scene.after("loop", "", || {
        let device = Loop::of(&scene.path, &[]);
        let _ = device.as_ref().map(discard);
        Came::of(device)
    });
    scene.after("loop-read-only", "", || {
        let device = Loop::of(&scene.path, &["--read-only"]);
        let _ = device.as_ref().map(discard);
        Came::of(device)
    });
    let device = Loop::of(&scene.path, &["--read-only"]).unwrap();
    scene.before("loop-read-only", "", || Came::of(discard(&device)));
    drop(device);
    let device = Loop::of(&scene.path, &[]).unwrap();
    scene.before("loop", "", || Came::of(discard(&device)));
    drop(device);
    let file = crate::world::open(&scene.path);
    scene.before("loop-descriptor", "", || {
        let device = loop_of(&file);
        let _ = device.as_ref().map(discard);
        Came::of(device)
    });
}

fn swapon(world: &World, kind: Kind) {
    let _turn = turn();
    let disk = world.disk(kind);
    let scene = Scene::with(world, world.guard().client(), &disk, "swapon", false);
    chown(&scene.path, Some(0), Some(0)).unwrap();
    if let Err(error) = run(Command::new("mkswap").arg(&scene.path)) {
        world.unavailable(format!("mkswap: {error:#}"));
        return;
    }
    let swap = |verb: &str| run(Command::new(verb).arg(&scene.path));
    if let Err(error) = swap("swapon") {
        world.unavailable(format!("swapon: {error:#}"));
        return;
    }
    scene.before("swapon", "", || Came::Passed);
    swap("swapoff").unwrap();
    scene.after("swapon", "", || {
        let on = swap("swapon");
        if on.is_ok() {
            swap("swapoff").unwrap();
        }
        Came::of(on)
    });
}

/// `FS_IOC_ENABLE_VERITY`: SHA-256, blocks of 4096 bytes, no salt.
fn enable_verity(file: &File) -> raw::Result<()> {
    const ENABLE_VERITY: u64 = 0x4080_6685;
    let mut argument = [0u32; 32];
    argument[..3].copy_from_slice(&[1, 1, 4096]);
    raw::ioctl(file.as_fd(), ENABLE_VERITY, &mut argument).map(drop)
}

fn verity(world: &World, kind: Kind) {
    let disk = match Disk::with_options(kind, 512, &["-O", "verity"], "") {
        Ok(disk) => disk,
        Err(error) => {
            world.unavailable(format!("fs-verity: {error:#}"));
            return;
        }
    };
    let plain = disk.path("plain");
    fs::write(&plain, [1; 4096]).unwrap();
    if let Err(errno) = enable_verity(&File::open(&plain).unwrap()) {
        world.unavailable(format!("fs-verity: {errno}"));
        return;
    }
    let mut scene = Scene::with(world, world.guard().client(), &disk, "verity", false);
    // Its tree of hashes lies behind the end of the file.
    scene.range = 2 * LENGTH;
    scene.after("verity", "", || Came::of(enable_verity(&scene.file)));
}
