//! The way through partitions and mapped devices, on real ones.

use super::{
    Line, Loop, Made, Mounted, complaint, has_mapper, lines, mapdirect, pattern, read_direct, said,
    text,
};
use crate::world::{World, wait_until_free};
use mapdirect_testkit::Kind;
use mapdirect_testkit::disk::run;
use mapdirect_testkit::process::{HELPER, ScratchDirectory};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bytes of a disk that XFS is content with.
const LARGE: u64 = 340 << 20;
/// Bytes of a disk for ext4.
const SMALL: u64 = 32 << 20;

/// An image, and a loop device of it.
fn disk(size: u64, arguments: &[&str]) -> (Loop, ScratchDirectory) {
    let place = ScratchDirectory::in_memory("disk").unwrap();
    let image = place.path().join("image");
    File::create(&image).unwrap().set_len(size).unwrap();
    (Loop::of(&image, arguments), place)
}

/// A partition without a table on the disk, as the kernel has it (BLKPG).
fn partition_of(disk: &Loop, size: u64) -> (PathBuf, Made) {
    let sectors = (size / 512 - 4096).to_string();
    run(Command::new("addpart").args([&disk.0, "1", "2048", &sectors])).unwrap();
    let gone = Made(["delpart", &disk.0, "1"].map(str::to_owned).into());
    (PathBuf::from(format!("{}p1", disk.0)), gone)
}

/// Reads the file by the places on disks, and compares.
fn follow(csv: &[Line], expected: &[u8]) {
    let mut read = Vec::new();
    for line in csv {
        let disk = Path::new("/dev").join(&line.disk_name);
        read.extend(read_direct(&disk, line.disk_offset.unwrap(), line.length));
    }
    assert!(
        read[..expected.len()] == *expected,
        "the disks say otherwise"
    );
}

/// A file on a partition is found on the whole disk, by the command and by the
/// example that reads there.
pub fn partition(world: &World) {
    let guard = world.guard();
    let (disk, _place) = disk(LARGE, &["--partscan"]);
    let (partition, _gone) = partition_of(&disk, LARGE);
    let mounted = Mounted::new(&mut Kind::XFS.mkfs(), &partition);
    let path = mounted.path("file");
    let bytes = pattern(3_000_000);
    fs::write(&path, &bytes).unwrap();
    let name = path.to_str().unwrap();
    let csv = lines(&said(&guard, &["show", name, "--format", "csv"]));
    for line in &csv {
        assert_eq!(Path::new("/dev").join(&line.disk_name), Path::new(&disk.0));
        assert_eq!(
            line.disk_offset,
            line.device_offset.map(|at| at + (1 << 20))
        );
        assert_ne!(line.device, line.disk);
    }
    follow(&csv, &bytes);
    let shown: serde_json::Value =
        serde_json::from_str(&said(&guard, &["show", name, "--json"])).unwrap();
    assert_eq!(shown["block_device"]["path"], partition.to_str().unwrap());
    assert_eq!(shown["disks"][0]["path"], *disk.0);
    assert_eq!(shown["disks"].as_array().unwrap().len(), 1);
    assert_eq!(shown["disk_unknown"], serde_json::Value::Null);
    let mut reader = Command::new(std::env::current_exe().unwrap());
    reader.args([HELPER, "example-raw-reader", name, "--disk"]);
    let read = reader
        .env("MAPDIRECT_SOCKET", guard.socket())
        .output()
        .unwrap();
    assert!(read.status.success(), "{read:?}");
    assert!(read.stdout == bytes);
    wait_until_free(&path);
}

/// Makes a mapped device; taken away when the second is dropped.
fn mapped(name: &str, table: &str) -> (PathBuf, Made) {
    let name = format!("mapdirect-{name}-{}", std::process::id());
    let mut create = Command::new("dmsetup");
    run(create.args(["create", &name, "--table", table])).unwrap();
    let device = Path::new("/dev/mapper").join(&name);
    let remove = ["dmsetup", "remove", "--retry", &name];
    (device, Made(remove.map(str::to_owned).into()))
}

/// A filesystem on two pieces of two partitions, in another order: what LVM
/// makes of them.
pub fn linear(world: &World) {
    if !has_mapper(world) {
        return;
    }
    let guard = world.guard();
    let (first, _one) = disk(SMALL, &["--partscan"]);
    let (second, _two) = disk(SMALL, &[]);
    let (partition, _gone) = partition_of(&first, SMALL);
    let half = SMALL / 512 / 2;
    let table = format!(
        "0 {half} linear {} 64\n{half} {half} linear {} 2048",
        second.0,
        partition.display()
    );
    let (device, _removed) = mapped("linear", &table);
    let mounted = Mounted::new(Kind::EXT4.mkfs().args(["-O", "^has_journal"]), &device);
    let path = mounted.path("file");
    // Larger than a half.
    let bytes = pattern(usize::try_from(SMALL / 2 + (6 << 20)).unwrap());
    fs::write(&path, &bytes).unwrap();
    let name = path.to_str().unwrap();
    let csv = lines(&said(&guard, &["show", name, "--format", "csv"]));
    follow(&csv, &bytes);
    for disk in [&first, &second] {
        let name = disk.0.trim_start_matches("/dev/");
        assert!(csv.iter().any(|line| line.disk_name == name), "{csv:?}");
    }
    // The table is not for everybody.
    let shown = Command::new("setpriv")
        .args(["--reuid=65534", "--clear-groups", crate::world::BINARY])
        .args(["show", name, "--json"])
        .output();
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let shown: serde_json::Value = serde_json::from_str(&text(&shown.unwrap())).unwrap();
    let reason = shown["disk_unknown"].as_str().unwrap();
    assert!(reason.contains("CAP_SYS_ADMIN"), "{reason}");
    assert_eq!(
        shown["extents"][0]["disk"][0]["offset"],
        serde_json::Value::Null
    );
}

/// What is not linear is not guessed.
pub fn not_linear(world: &World) {
    if !has_mapper(world) {
        return;
    }
    let guard = world.guard();
    let (first, _one) = disk(SMALL, &[]);
    let (second, _two) = disk(SMALL, &[]);
    let sectors = SMALL / 512;
    let table = format!(
        "0 {} striped 2 128 {} 0 {} 0",
        2 * sectors,
        first.0,
        second.0
    );
    let (device, _removed) = mapped("striped", &table);
    let mounted = Mounted::new(&mut Kind::EXT4.mkfs(), &device);
    let path = mounted.path("file");
    let bytes = pattern(1 << 20);
    fs::write(&path, &bytes).unwrap();
    let name = path.to_str().unwrap();
    let csv = lines(&said(&guard, &["show", name, "--format", "csv"]));
    let read: Vec<u8> = csv
        .iter()
        .flat_map(|line| {
            assert_eq!((line.disk_offset, &*line.disk), (None, ""));
            read_direct(&device, line.device_offset.unwrap(), line.length)
        })
        .collect();
    assert!(read == bytes, "on the mapped device itself it is known");
    let table = said(&guard, &["show", name, "--format", "table"]);
    assert!(table.contains("target striped, not linearly"), "{table}");
}

/// The example: a device over the pinned blocks, written to and read, and the
/// file has what was written there when it is over.
pub fn table_over_a_pin(world: &World) {
    if !has_mapper(world) {
        return;
    }
    let guard = world.guard();
    for kind in [Kind::XFS, Kind::EXT4] {
        let disk = world.disk(kind);
        let path = disk.path("extents-dm-example");
        let mut bytes = pattern(1_000_000);
        fs::write(&path, &bytes).unwrap();
        let name = path.to_str().unwrap();
        said(&guard, &["prepare", name]);
        let copy = disk.path("extents-dm-copy");
        let script =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../mapdirect/examples/dm-linear.sh");
        let directory = Path::new(crate::world::BINARY).parent().unwrap();
        let search = std::env::var("PATH").unwrap_or_default();
        let work = "head -c $SIZE $DEVICE >$COPY && printf changed | \
                    dd of=$DEVICE bs=1 seek=4096 conv=notrunc,fsync status=none";
        let done = Command::new("sh")
            .arg(script)
            .args([name, "sh", "-c", work])
            .env("COPY", &copy)
            .env("PATH", format!("{}:{search}", directory.display()))
            .env("MAPDIRECT_SOCKET", guard.socket())
            .output()
            .unwrap();
        text(&done);
        assert!(fs::read(&copy).unwrap() == bytes);
        bytes[4096..4103].copy_from_slice(b"changed");
        assert!(fs::read(&path).unwrap() == bytes, "the old pages are gone");
        wait_until_free(&path);
        let left = Command::new("dmsetup").args(["ls"]).output().unwrap();
        assert!(!text(&left).contains("pinned-"), "{left:?}");
        let refused = mapdirect(&guard, &["show", name, "--format", "dmsetup"]);
        assert!({ refused }.output().unwrap().status.success());
        fs::remove_file(copy).unwrap();
        fs::remove_file(&path).unwrap();
    }
}

/// What lies on the realtime device of an XFS is not on the device of which
/// FIEMAP seems to speak.
pub fn realtime(world: &World) {
    let guard = world.guard();
    let (data, _one) = disk(LARGE, &[]);
    let (real, _two) = disk(LARGE, &[]);
    let mut mkfs = Command::new("mkfs.xfs");
    let device = format!("rtdev={}", real.0);
    mkfs.args(["-q", "-f", "-m", "reflink=0,rmapbt=0", "-r", &device]);
    run(mkfs.args(["-d", "rtinherit=1"]).arg(&data.0)).unwrap();
    let directory = ScratchDirectory::in_memory("realtime").unwrap();
    let mut mount = Command::new("mount");
    mount.args(["-o", &device, &data.0]).arg(directory.path());
    if let Err(error) = run(&mut mount) {
        world.unavailable(format!("a realtime device of XFS: {error}"));
        return;
    }
    let point = directory.path().to_str().unwrap().to_owned();
    let _unmounted = Made(vec![String::from("umount"), point]);
    let path = directory.path().join("file");
    fs::write(&path, pattern(1 << 20)).unwrap();
    let name = path.to_str().unwrap();
    let csv = lines(&said(&guard, &["show", name, "--format", "csv"]));
    for line in &csv {
        assert_eq!(
            (&*line.access, line.device_offset),
            ("none", None),
            "{line:?}"
        );
    }
    for form in ["dmsetup", "resume-offset"] {
        let show = mapdirect(&guard, &["show", name, "--format", form]).output();
        let complaint = complaint(&show.unwrap());
        assert!(complaint.contains("realtime device"), "{complaint}");
    }
    let pin = complaint(&mapdirect(&guard, &["pin", name]).output().unwrap());
    assert!(pin.contains("realtime device"), "{pin}");
}
