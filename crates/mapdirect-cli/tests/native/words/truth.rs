//! What is said of a file is what a pin finds.

use super::{flat, mapdirect, output};
use crate::world::{BINARY, World, open, wait_until_free, written};
use mapdirect_sys::signal::{self, Signal};
use mapdirect_testkit::disk::run;
use mapdirect_testkit::process::{GuardProcess, Helper};
use mapdirect_testkit::{Disk, Kind};
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

fn shown(guard: &GuardProcess, path: &Path, more: &[&str]) -> Value {
    let name = path.to_str().unwrap();
    let arguments = [&["show", name, "--json"], more].concat();
    serde_json::from_slice(&output(guard.socket(), &arguments).stdout).unwrap()
}

/// Pins a file, says what is stable of it, and lets go; or why it cannot be
/// pinned.
fn pinned(guard: &GuardProcess, path: &Path) -> Result<(u64, u64), String> {
    let name = path.to_str().unwrap();
    let arguments = ["pin", name, "--json", "--patience", "3000"];
    let mut command = mapdirect(guard.socket(), &arguments);
    command.stderr(std::process::Stdio::piped());
    let mut child = command
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
    let _ = signal::kill(child.id().cast_signed(), Signal::TERMINATE);
    let ended = child.wait_with_output().unwrap();
    if line.is_empty() {
        return Err(flat(&ended));
    }
    wait_until_free(path);
    let value: Value = serde_json::from_str(&line).unwrap();
    let extents = value["extents"].as_array().unwrap();
    let bytes = |stable: bool| {
        let those = extents
            .iter()
            .filter(|extent| (extent["state"] == "written") == stable);
        those.map(|extent| extent["length"].as_u64().unwrap()).sum()
    };
    Ok((bytes(true), bytes(false)))
}

/// Data that is only in memory yet is what a pin right after makes of it.
pub(super) fn becoming_stable(world: &World) {
    let guard = world.guard();
    let mut delayed = 0;
    for kind in [Kind::XFS, Kind::EXT4] {
        let path = world.disk(kind).path("words-becoming");
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        open(&path).set_len(3 << 20).unwrap();
        let value = shown(&guard, &path, &[]);
        delayed += value["totals"]["delalloc"].as_u64().unwrap();
        let said = flat(&output(guard.socket(), &["show", path.to_str().unwrap()]));
        assert!(said.contains("1 MiB stable"), "{kind}: {said}");
        assert_eq!(pinned(&guard, &path), Ok((1 << 20, 2 << 20)), "{kind}");
        assert_eq!(value["stable"], 1 << 20, "{kind}: {value}");
        assert_eq!(value["frozen"], 2 << 20, "{kind}: {value}");
        std::fs::remove_file(&path).unwrap();

        // What was written to blocks that were set aside before.
        let file = std::fs::File::create_new(&path).unwrap();
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 1 << 20).unwrap();
        file.sync_all().unwrap();
        file.write_all_at(&[7; 65536], 0).unwrap();
        drop(file);
        let said = flat(&output(guard.socket(), &["show", path.to_str().unwrap()]));
        assert!(
            said.contains("of what is unwritten, 64 KiB may have been written"),
            "{said}"
        );
        let value = shown(&guard, &path, &["--sync"]);
        let found = (
            value["stable"].as_u64().unwrap(),
            value["frozen"].as_u64().unwrap(),
        );
        assert_eq!(pinned(&guard, &path), Ok(found), "{kind}");
        assert_eq!(found.0, 65536, "{kind}");
        std::fs::remove_file(&path).unwrap();
    }
    assert!(delayed > 0, "nothing was delayed: this shows nothing");
}

/// The word that `show` has for what stands in the way.
fn reasons(value: &Value) -> Vec<String> {
    let reasons = value["mappable"]["reasons"].as_array().unwrap();
    let reasons = reasons
        .iter()
        .map(|reason| reason["reason"].as_str().unwrap().to_owned());
    reasons.filter(|reason| reason != "no-dax").collect()
}

fn prepared(guard: &GuardProcess, path: &Path) {
    let name = path.to_str().unwrap();
    let said = output(
        guard.socket(),
        &["prepare", name, "--size", "8M", "--contiguous"],
    );
    assert!(said.status.success(), "{said:?}");
}

fn attached(path: &Path, more: &[&str]) -> PathBuf {
    let mut losetup = Command::new("losetup");
    let said = losetup
        .args(more)
        .args(["--find", "--show"])
        .arg(path)
        .output()
        .unwrap();
    assert!(said.status.success(), "{said:?}");
    PathBuf::from(String::from_utf8(said.stdout).unwrap().trim())
}

/// Swap files, loop devices and overlays are in the way of a pin, and `show`
/// says so when `pin` does.
pub(super) fn used_by_the_kernel(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::EXT4);
    let path = disk.path("words used");
    prepared(&guard, &path);
    assert_eq!(reasons(&shown(&guard, &path, &[])), [""; 0]);

    let device = attached(&path, &[]);
    let found = reasons(&shown(&guard, &path, &[]));
    let refused = pinned(&guard, &path);
    run(Command::new("losetup").arg("--detach").arg(&device)).unwrap();
    assert_eq!(found, ["loop"]);
    assert!(
        refused
            .as_ref()
            .is_err_and(|said| said.contains("loop device")),
        "{refused:?}"
    );

    // Nobody can write by this one.
    let device = attached(&path, &["--read-only"]);
    let found = reasons(&shown(&guard, &path, &[]));
    let granted = pinned(&guard, &path);
    run(Command::new("losetup").arg("--detach").arg(&device)).unwrap();
    assert_eq!(found, [""; 0]);
    assert!(granted.is_ok(), "{granted:?}");

    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    run(Command::new("mkswap").arg(&path)).unwrap();
    let swapped = Command::new("swapon").arg(&path).status().unwrap();
    if swapped.success() {
        let found = reasons(&shown(&guard, &path, &[]));
        let refused = pinned(&guard, &path);
        run(Command::new("swapoff").arg(&path)).unwrap();
        assert_eq!(found, ["swap"]);
        assert!(
            refused.as_ref().is_err_and(|said| said.contains("swap")),
            "{refused:?}"
        );
    } else {
        world.unavailable(String::from("swap files (CONFIG_SWAP)"));
    }
    std::fs::remove_file(&path).unwrap();
    below_an_overlay(&guard, &disk);
}

fn below_an_overlay(guard: &GuardProcess, disk: &Disk) {
    let directories = ["lower", "upper", "work", "merged"].map(|name| {
        let path = disk.path(&format!("words-{name}"));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        path
    });
    let [lower, upper, work, merged] = &directories;
    for directory in [lower, upper] {
        std::fs::create_dir(directory.join("deep")).unwrap();
    }
    let (below, above) = (lower.join("deep/file"), upper.join("deep/other"));
    for file in [&below, &above] {
        std::fs::write(file, [7; 8192]).unwrap();
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    let mut mount = Command::new("mount");
    mount.args(["-t", "overlay", "overlay", "-o", &options]);
    run(mount.arg(merged)).unwrap();
    // The guard looks for overlays once a second at most.
    std::thread::sleep(Duration::from_millis(1100));
    let found = [&above, &below, &merged.join("deep/file")].map(|file| {
        (
            reasons(&shown(guard, file, &[])),
            pinned(guard, file).is_ok(),
        )
    });
    let said = pinned(guard, &above);
    run(Command::new("umount").arg(merged)).unwrap();
    assert_eq!(found[0], (vec![String::from("overlay-upper")], false));
    assert_eq!(found[1], (vec![], true));
    assert_eq!(found[2], (vec![String::from("filesystem")], false));
    assert!(
        said.as_ref()
            .is_err_and(|said| said.contains("the overlay at")),
        "{said:?}"
    );
    for directory in &directories {
        std::fs::remove_dir_all(directory).unwrap();
    }
}

/// Nobody is advised to set what is set.
pub(super) fn cache_accepted(world: &World) {
    let guard = world.guard();
    let path = written(&world.disk(Kind::XFS), "words-cached", 65536);
    let name = path.to_str().unwrap();
    for (value, accepts) in [(None, false), (Some("0"), false), (Some("1"), true)] {
        let mut command = mapdirect(guard.socket(), &["show", name]);
        command.envs(value.map(|value| ("MAPDIRECT_CACHED", value)));
        let said = flat(&command.output().unwrap());
        let advised = said.contains("accept the page cache (MAPDIRECT_CACHED=1)");
        assert_eq!(advised, !accepts, "{value:?}: {said}");
        let verdict = if accepts {
            "MAP_DIRECT: yes, through the page cache"
        } else {
            "only with"
        };
        assert!(said.contains(verdict), "{value:?}: {said}");
    }
    std::fs::remove_file(&path).unwrap();
}

/// What `prepare` cannot do it says in words about that.
pub(super) fn prepare_refused(world: &World) {
    let guard = world.guard();
    let path = written(&world.disk(Kind::XFS), "words-refused", 1 << 20);
    let name = path.to_str().unwrap();
    for (arguments, words) in [
        (
            &["--range", "2M:"][..],
            "begins at byte 2097152, and the file ends at byte 1048576",
        ),
        (
            &["--range", "0:2M"],
            "ends at byte 2097152, beyond the end of the file at 1048576",
        ),
        (
            &["--range", "4M:", "--size", "2M"],
            "begins at byte 4194304, and the file ends at byte 2097152",
        ),
    ] {
        let said = output(guard.socket(), &[&["prepare", name], arguments].concat());
        let text = flat(&said);
        assert_eq!(said.status.code(), Some(2), "{text}");
        assert!(text.contains(words), "{text}");
        assert!(!text.contains("bytes 2097152 to 1048576"), "{text}");
    }
    let missing = flat(&output(guard.socket(), &["prepare", "/nonexistent"]));
    assert!(missing.contains("--size SIZE makes a file"), "{missing}");
    let mut pin = Helper::spawn(mapdirect(guard.socket(), &["pin", name])).unwrap();
    while pin.hear().unwrap() != "held until SIGINT or SIGTERM" {}
    let said = flat(&output(guard.socket(), &["prepare", name]));
    assert!(!said.contains("--size"), "{said}");
    if said.contains("busy") {
        assert!(
            said.contains(&format!("it is pinned by process {}", pin.pid())),
            "{said}"
        );
    }
    signal::kill(pin.pid(), Signal::TERMINATE).unwrap();
    pin.finish().unwrap();
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
    a_project_without_room(world, &guard);
}

/// A quota is not a full filesystem.
fn a_project_without_room(world: &World, guard: &GuardProcess) {
    let Ok(disk) = Disk::with_options(Kind::XFS, 400, &[], "prjquota") else {
        world.unavailable(String::from("XFS with project quotas (CONFIG_XFS_QUOTA)"));
        return;
    };
    let directory = disk.path("project");
    std::fs::create_dir(&directory).unwrap();
    let root = disk.root();
    for (program, arguments) in [
        ("xfs_io", ["-c", "chproj 42", "-c", "chattr +P"]),
        ("xfs_quota", ["-x", "-c", "limit -p bhard=4m 42", ""]),
    ] {
        let mut command = Command::new(program);
        command.args(arguments.iter().filter(|word| !word.is_empty()));
        run(command.arg(if program == "xfs_io" {
            &directory
        } else {
            &root
        }))
        .unwrap();
    }
    let path = directory.join("file");
    let name = path.to_str().unwrap();
    let said = flat(&output(guard.socket(), &["prepare", name, "--size", "64M"]));
    assert!(
        said.contains("the quota of project 42 is used up"),
        "{said}"
    );
    assert!(!path.exists());
}

/// Data inside an inode is moved into a block.
pub(super) fn prepare_inline(world: &World) {
    let guard = world.guard();
    let options = ["-O", "inline_data", "-I", "1024"];
    let disk = Disk::with_options(Kind::EXT4, 64, &options, "").unwrap();
    for (more, size) in [(&["--size", "1M"][..], 1 << 20), (&[], 100)] {
        let path = written(&disk, "words-inline", 100);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(shown(&guard, &path, &[])["totals"]["inline"], 100);
        let name = path.to_str().unwrap();
        let said = output(guard.socket(), &[&["prepare", name], more].concat());
        assert!(said.status.success(), "{said:?}");
        let after = std::fs::read(&path).unwrap();
        assert_eq!(after.len(), size);
        assert!(after.starts_with(&bytes) && after[100..].iter().all(|byte| *byte == 0));
        let (stable, frozen) = pinned(&guard, &path).unwrap();
        assert_eq!((stable, frozen), (size.next_multiple_of(4096) as u64, 0));
        std::fs::remove_file(&path).unwrap();
    }
    disk.unmount().unwrap();
}

/// `doctor` begins with what everything else waits for.
pub(super) fn first_remedy(world: &World) {
    let guard = world.guard();
    let doctor = |socket: &Path| {
        let said = output(socket, &["doctor", "--json"]);
        let text = String::from_utf8(output(socket, &["doctor"]).stdout).unwrap();
        let value: Value = serde_json::from_slice(&said.stdout).unwrap();
        (value, text)
    };
    let (value, text) = doctor(guard.socket());
    assert!(value["first"].is_null(), "{value}");
    assert!(text.starts_with("files can be pinned here"), "{text}");
    let (value, text) = doctor(Path::new("/nonexistent/guard.sock"));
    let first = value["first"].as_str().unwrap();
    assert!(first.contains("mapdirect guard"), "{first}");
    assert!(text.starts_with("first: "), "{text}");
    let named = |name: &str, value: &Value| {
        let findings = value["findings"].as_array().unwrap();
        findings
            .iter()
            .find(|finding| finding["name"] == name)
            .cloned()
    };
    for gate in ["bpf", "fanotify"] {
        assert!(
            text.contains(&format!("what the {gate} gate cannot refuse:")),
            "{text}"
        );
        assert!(
            value["holes_of_gates"][gate]
                .as_array()
                .is_some_and(|holes| holes.len() > 4)
        );
    }
    left_in_the_kernel(&named, &doctor);
}

/// Says what the gate does that a guard has left in the kernel.
fn left_in_the_kernel(
    named: &dyn Fn(&str, &Value) -> Option<Value>,
    doctor: &dyn Fn(&Path) -> (Value, String),
) {
    use mapdirect_testkit::contract::Gate;
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let (value, _) = doctor(guard.socket());
    let told = named("without a guard", &value).unwrap();
    let says = if Gate::under_test() == Gate::Bpf {
        "goes on refusing"
    } else {
        "are lost"
    };
    assert!(told["text"].as_str().unwrap().contains(says), "{told}");
    guard.kill().unwrap();
}

/// A range that goes beyond the end of the file is pinned as mmap(2) would map
/// it, and stderr says what that is worth.
pub(super) fn beyond_the_end(world: &World) {
    let guard = world.guard();
    let path = written(&world.disk(Kind::XFS), "words-beyond", 10_000);
    let name = path.to_str().unwrap();
    // A write by the command itself, at byte 70,000.
    let write = "dd if=/dev/zero bs=1 count=1 seek=70000 conv=notrunc status=none of=";
    let write = format!("{write}{name}");
    let pin = |range: &str, more: &[&str], script: &str| {
        let pin = ["pin", name, "--range", range];
        let arguments = [&pin, more, &["--", "sh", "-c", script]].concat();
        let ended = output(guard.socket(), &arguments);
        wait_until_free(&path);
        (ended.status.success(), flat(&ended))
    };
    let (ended, text) = pin("0:8192", &[], "true");
    assert!(ended && text.is_empty(), "{text}");
    let (ended, text) = pin("0:128K", &[], &write);
    assert!(!ended && text.contains("Text file busy"), "{text}");
    let part = "ends at byte 10000, inside the range: only bytes 0 to 10000 are pinned";
    assert!(text.contains(part), "{text}");
    assert!(
        text.contains("nobody can write in the rest of the range (ETXTBSY)"),
        "{text}"
    );
    let (ended, text) = pin("64K:64K", &[], &write);
    assert!(!ended && text.contains("Text file busy"), "{text}");
    let nothing = "ends at byte 10000, before the range begins: no byte of the file is pinned";
    assert!(text.contains(nothing), "{text}");
    assert!(!text.contains("allocated behind the end"), "{text}");
    let allocate = "fallocate --keep-size --offset 64K --length 64K";
    run(Command::new("sh")
        .arg("-c")
        .arg(format!("{allocate} {name}")))
    .unwrap();
    let (ended, text) = pin("64K:64K", &[], "true");
    assert!(ended, "{text}");
    assert!(
        text.contains("65536 bytes allocated behind the end stay"),
        "{text}"
    );
    let (ended, text) = pin("0:128K", &["--strength", "stable"], &write);
    assert!(ended && !text.contains("ETXTBSY"), "{text}");
    assert!(
        text.contains("what is written behind the end is held from then on"),
        "{text}"
    );
    std::fs::remove_file(&path).unwrap();
}
