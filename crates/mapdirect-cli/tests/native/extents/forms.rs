//! The forms themselves.

use super::{Line, complaint, lines, mapdirect, read_direct, said, text};
use crate::segments::{State as Block, make};
use crate::world::{World, wait_until_free};
use mapdirect_testkit::disk::run;
use mapdirect_testkit::process::ScratchDirectory;
use mapdirect_testkit::{Disk, Kind};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The loop device that a disk is.
pub fn device_of(disk: &Disk) -> PathBuf {
    let output = Command::new("findmnt")
        .args(["--noheadings", "--output", "SOURCE"])
        .arg(disk.root())
        .output();
    PathBuf::from(text(&output.unwrap()).trim())
}

/// The bytes that a table of linear targets shows.
fn through_table(table: &str, device: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in table.lines() {
        let words: Vec<_> = line.split(' ').collect();
        let [start, length, "linear", _, offset] = words[..] else {
            panic!("{line}");
        };
        let number = |text: &str| text.parse::<u64>().unwrap() * 512;
        assert_eq!(number(start), bytes.len() as u64);
        bytes.extend(read_direct(device, number(offset), number(length)));
    }
    bytes
}

/// What csv and dmsetup say leads to the bytes of the file; what is not stable
/// gets into no table.
pub fn lead_to_the_bytes(world: &World, kind: Kind) {
    let guard = world.guard();
    let disk = world.disk(kind);
    let path = disk.path("extents-forms");
    let name = path.to_str().unwrap();
    let mut states = vec![
        Block::Written,
        Block::Hole,
        Block::Unwritten,
        Block::Written,
    ];
    if kind.reflink() {
        states.extend([Block::Shared, Block::Written]);
    }
    let block = kind.block().max(4096);
    let size = states.len() as u64 * block - 100;
    drop(make(&path, block, &states, size));
    let expected = fs::read(&path).unwrap();
    let csv = lines(&said(&guard, &["show", name, "--format", "csv"]));
    let device = device_of(&disk);
    let mut at = 0;
    for line in &csv {
        assert_eq!(line.offset, at);
        at += line.length;
        assert_eq!(
            line.disk_offset, line.device_offset,
            "a loop device is a disk"
        );
        match &*line.access {
            "read-write" | "read" => {
                assert_eq!(line.access == "read", line.state == "shared");
                assert_eq!(Path::new("/dev").join(&line.disk_name), device);
                let raw = read_direct(&device, line.disk_offset.unwrap(), line.length);
                let start = usize::try_from(line.offset).unwrap();
                let end = expected.len().min(start + raw.len());
                assert!(raw[..end - start] == expected[start..end], "{line:?}");
            }
            "none" => assert!(["hole", "unwritten"].contains(&&*line.state), "{line:?}"),
            _ => panic!("{line:?}"),
        }
    }
    assert!(at >= size && at < size + block);
    assert!(csv.iter().any(|line| line.access == "none"));
    let refused = mapdirect(&guard, &["show", name, "--format", "dmsetup"]).output();
    let complaint = complaint(&refused.unwrap());
    assert!(
        complaint.contains("they are hole") && complaint.contains("help: "),
        "{complaint}"
    );
    text(&mapdirect(&guard, &["prepare", name]).output().unwrap());
    // Under a pin, to a command.
    let script = ["--", "sh", "-c", "cat $MAPDIRECT_EXTENTS"];
    let arguments = [&["pin", name, "--format", "dmsetup"], &script[..]].concat();
    let table = said(&guard, &arguments);
    wait_until_free(&path);
    let shown = through_table(&table, &device);
    assert!(shown[..expected.len()] == expected);
    assert_eq!(said(&guard, &["show", name, "--format", "dmsetup"]), table);
    let many = ["pin", name, name, "--format", "csv", "--", "true"];
    let refused = mapdirect(&guard, &many).output().unwrap();
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    fs::remove_file(&path).unwrap();
}

/// It is where the file begins on the device, in pages, and only of what can be
/// swap space.
pub fn resume_offset(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = world.disk(kind).path("extents-swap");
    let _ = fs::remove_file(&path);
    let name = path.to_str().unwrap();
    let offset = || mapdirect(&guard, &["show", name, "--format", "resume-offset"]).output();
    fs::write(&path, "").unwrap();
    assert!(complaint(&offset().unwrap()).contains("is empty"));
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    assert!(complaint(&offset().unwrap()).contains("are hole"));
    said(&guard, &["prepare", name, "--size", "4M", "--contiguous"]);
    assert!(complaint(&offset().unwrap()).contains("mkswap FILE"));
    let mut mkswap = Command::new("mkswap");
    run(mkswap.arg("--quiet").arg(&path)).unwrap();
    let page = mapdirect_sys::mmap::page_size();
    let map = mapdirect::block_map(File::open(&path).unwrap(), 0..4 << 20).unwrap();
    let expected = map.extents()[0].physical.unwrap() / page;
    assert_eq!(text(&offset().unwrap()), format!("{expected}\n"));
    // As swapon does it.
    let filefrag = Command::new("filefrag").arg("-v").arg(&path).output();
    let filefrag = text(&filefrag.unwrap());
    let first = filefrag
        .lines()
        .find(|line| line.trim_start().starts_with("0:"));
    let words: Vec<_> = first.unwrap().split_whitespace().collect();
    let in_blocks: u64 = words[3].trim_end_matches("..").parse().unwrap();
    assert_eq!(in_blocks * kind.block(), expected * page);
    if kind.reflink() {
        let copy = path.with_extension("copy");
        let mut cp = Command::new("cp");
        run(cp.arg("--reflink=always").args([&path, &copy])).unwrap();
        assert!(complaint(&offset().unwrap()).contains("are shared"));
        fs::remove_file(copy).unwrap();
    }
    fs::remove_file(&path).unwrap();
}

/// A new file is one run of blocks. Where free space is in pieces it says in how
/// many it is, and how large the largest was.
pub fn contiguous(world: &World, kind: Kind) {
    let guard = world.guard();
    let disk = match Disk::new(kind, 320) {
        Ok(disk) => disk,
        Err(error) => {
            world.unavailable(format!("a {kind} of its own for a test: {error}"));
            return;
        }
    };
    let path = disk.path("one");
    let name = path.to_str().unwrap();
    let size = (24 << 20).to_string();
    let prepare = |arguments: &[&str]| -> serde_json::Value {
        let common = ["prepare", name, "--contiguous", "--json"];
        serde_json::from_str(&said(&guard, &[&common, arguments].concat())).unwrap()
    };
    let one = prepare(&["--size", &size]);
    assert_eq!(one["runs"], 1, "{one}");
    assert_eq!(one["why_not_contiguous"], serde_json::Value::Null);
    assert_eq!(one["extents"].as_array().unwrap().len(), 1);
    // It stays as it is, and what comes is another run if somebody is behind it.
    fs::write(disk.path("behind"), vec![1; 1 << 20]).unwrap();
    fs::remove_file(&path).unwrap();
    // Free space in pieces of a megabyte.
    let free = rustix::fs::statvfs(disk.root()).unwrap();
    let mut number = 0;
    let filler = |number: u64| disk.path(&format!("filler-{number}"));
    let mut left = free.f_bavail * free.f_frsize;
    while left > 24 << 20 {
        let file = File::create(filler(number)).unwrap();
        let flags = rustix::fs::FallocateFlags::empty();
        if rustix::fs::fallocate(&file, flags, 0, 1 << 20).is_err() {
            break;
        }
        left -= 1 << 20;
        number += 1;
    }
    // What is left behind them.
    let rest = File::create(disk.path("rest")).unwrap();
    let mut length = 16 << 20;
    let mut at = 0;
    while length >= 1 << 16 {
        let flags = rustix::fs::FallocateFlags::empty();
        match rustix::fs::fallocate(&rest, flags, at, length) {
            Ok(()) => at += length,
            Err(_) => length /= 2,
        }
    }
    for number in (0..number).step_by(2) {
        fs::remove_file(filler(number)).unwrap();
    }
    rustix::fs::syncfs(&rest).unwrap();
    let many = prepare(&["--size", &size]);
    let runs = many["runs"].as_u64().unwrap();
    assert!(runs > 1, "{many}");
    assert_eq!(many["stable"], true);
    let why = many["why_not_contiguous"].as_str().unwrap();
    assert!(why.contains("free space is fragmented"), "{why}");
    let largest = why.split("had ").nth(1).unwrap().split(' ').next().unwrap();
    let largest: u64 = largest.parse().unwrap();
    assert!((1 << 16..24 << 20).contains(&largest), "{why}");
    let again = prepare(&[]);
    let why = again["why_not_contiguous"].as_str().unwrap();
    assert!(why.contains("were there before"), "{why}");
    assert_eq!(again["runs"], many["runs"]);
}

/// What cannot be answered is refused, with words, and nothing panics.
pub fn bad_input(world: &World) {
    let guard = world.guard();
    let scratch = ScratchDirectory::in_memory("bad").unwrap();
    let inside = |name: &str| scratch.path().join(name);
    fs::write(inside("tmpfs"), vec![1; 8192]).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, inside("fifo"), 0o600.into()).unwrap();
    let paths = [
        (inside("tmpfs"), "tmpfs"),
        (inside("fifo"), "not a regular file"),
        (scratch.path().to_owned(), "not a regular file"),
        (PathBuf::from("/dev/null"), "not a regular file"),
        (PathBuf::from("/dev/loop0"), "not a regular file"),
        (PathBuf::from("/proc/self/status"), "is empty"),
        (inside("none"), "No such file"),
        (inside("a\nb"), "No such file"),
    ];
    for (path, word) in &paths {
        for form in ["csv", "dmsetup", "resume-offset"] {
            let show = ["show", path.to_str().unwrap(), "--format", form];
            let complaint = complaint(&mapdirect(&guard, &show).output().unwrap());
            // A filesystem that tells nothing is one of which it is not known.
            let told = complaint.contains(word) || complaint.contains("no FIEMAP");
            assert!(told, "{path:?} {form}: {complaint}");
        }
    }
    let disk = world.disk(Kind::EXT4);
    let odd = disk.path("extents-odd\n\u{1b}[31m\u{202e}");
    let raw = disk
        .root()
        .join(std::ffi::OsStr::from_bytes(b"extents-\xff"));
    for path in [&odd, &raw] {
        fs::write(path, vec![5; 8192]).unwrap();
        let show = |arguments: &[&str]| {
            let mut show = mapdirect(&guard, &["show"]);
            show.arg(path).args(arguments).output().unwrap()
        };
        let csv = lines(&text(&show(&["--format", "csv"])));
        assert_eq!(csv.len(), 1);
        text(&show(&["--format", "dmsetup"]));
        let elsewhere = show(&["--format", "dmsetup", "--device", "/dev/null"]);
        assert!(complaint(&elsewhere).contains("no block device"));
        let none = show(&["--format", "dmsetup", "--device", "/dev/none"]);
        assert!(complaint(&none).contains("No such file"));
        let unused = show(&["--format", "csv", "--device", "/dev/loop0"]);
        assert!(complaint(&unused).contains("--device is for"));
        fs::remove_file(path).unwrap();
    }
    on_other_filesystems(world, &guard);
}

/// Filesystems that tell extents, but not on which device they are.
fn on_other_filesystems(world: &World, guard: &mapdirect_testkit::process::GuardProcess) {
    let scratch = ScratchDirectory::in_memory("bad").unwrap();
    let inside = |name: &str| scratch.path().join(name);
    let disk = world.disk(Kind::EXT4);
    let mut mounts = Vec::new();
    for name in ["lower", "upper", "work", "overlay", "btrfs"] {
        let place = if name == "upper" || name == "work" {
            disk.path(&format!("extents-{name}"))
        } else {
            inside(name)
        };
        fs::create_dir_all(place).unwrap();
    }
    let upper = disk.path("extents-upper");
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        inside("lower").display(),
        upper.display(),
        disk.path("extents-work").display()
    );
    let mut overlay = Command::new("mount");
    overlay.args(["-t", "overlay", "overlay", "-o", &options]);
    let image = inside("image");
    File::create(&image).unwrap().set_len(256 << 20).unwrap();
    let made = run(Command::new("mkfs.btrfs").arg("-q").arg(&image));
    let mut btrfs = Command::new("mount");
    btrfs.args(["-t", "btrfs", "-o", "loop"]).arg(&image);
    for (name, mount, made) in [
        ("overlay", &mut overlay, Ok(())),
        ("btrfs", &mut btrfs, made),
    ] {
        let point = inside(name);
        if let Err(error) = made.and_then(|()| run(mount.arg(&point))) {
            world.unavailable(format!("{name}: {error}"));
            continue;
        }
        mounts.push(super::Made(vec![
            String::from("umount"),
            point.to_str().unwrap().to_owned(),
        ]));
        let path = point.join("file");
        fs::write(&path, vec![3; 1 << 20]).unwrap();
        let name = path.to_str().unwrap();
        let csv = lines(&said(guard, &["show", name, "--format", "csv"]));
        let is_unknown = |line: &Line| line.disk.is_empty() && line.access == "none";
        assert!(csv.iter().all(is_unknown), "{csv:?}");
        let places = csv
            .iter()
            .map(|line| (line.device_offset, line.disk_offset));
        assert!({ places }.all(|place| place == (None, None)), "{csv:?}");
        for form in ["dmsetup", "resume-offset"] {
            let show = mapdirect(guard, &["show", name, "--format", form]);
            let complaint = complaint(&{ show }.output().unwrap());
            assert!(complaint.contains("is not known here"), "{complaint}");
        }
        let json: serde_json::Value =
            serde_json::from_str(&said(guard, &["show", name, "--json"])).unwrap();
        assert_eq!(json["block_device"], serde_json::Value::Null);
        assert!(
            json["disk_unknown"]
                .as_str()
                .is_some_and(|why| !why.is_empty())
        );
    }
    drop(mounts);
    let _ = fs::remove_dir_all(upper);
    let _ = fs::remove_dir_all(disk.path("extents-work"));
}
