//! What comes after it: mappings, pins, the command line.

use super::*;

/// What it is for: all of the file can be mapped.
pub(crate) fn then_mapped(world: &World, kind: Kind) {
    let path = world.disk(kind).path("prepare-mapped");
    let guard = world.guard().client();
    let file = new_file(&path);
    let prepared = PrepareOptions::new().size(3 << 20).prepare(&file).unwrap();
    let held = map(&guard, &file, 0..3 << 20);
    assert_eq!(held.block_map().extents(), prepared.block_map().extents());
    for at in (0..3 << 20).step_by(65536) {
        held.write_all_at(b"here it stays", at).unwrap();
    }
    held.persist(0..3 << 20).unwrap();
    let now = synced(&file);
    assert_eq!(now.extents(), held.block_map().extents());
    drop((held, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// A pin keeps its blocks as they are from this, too, and only its own.
pub(crate) fn pinned(world: &World, kind: Kind) {
    let path = world.disk(kind).path("prepare-pinned");
    let guard = world.guard().client();
    let file = new_file(&path);
    file.write_all_at(&[6; 65536], 0).unwrap();
    file.set_len(32 << 20).unwrap();
    let held = pin(&guard, &file, 0..4 << 20);
    let output = mapdirect(&[text(&path)]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = complaint(&output);
    let refused = match Gate::under_test() {
        // It may not open it,
        Gate::Fanotify => "Text file busy",
        // or not allocate in it.
        Gate::Bpf => "ETXTBSY",
    };
    assert!(said.contains(refused), "{output:?}");
    let error = PrepareOptions::new().prepare(&file).unwrap_err();
    assert_eq!(error.errno(), Errno::TXTBSY.raw_os_error(), "{error:#}");
    assert_eq!(error.kind(), Reason::FrozenBlocks, "{error:#}");
    assert!(error.obstacle().contains("a pin"), "{error:#}");
    match mapdirect::prepare(&file, 16 << 20..20 << 20) {
        Ok(prepared) => assert!(prepared.block_map().is_stable()),
        // It takes a mapping, which mremap(2) could grow over the hole.
        Err(error) => {
            assert_eq!(Gate::under_test(), Gate::Bpf, "{error:#}");
            assert_eq!(error.errno(), Errno::TXTBSY.raw_os_error(), "{error:#}");
        }
    }
    let now = mapdirect::block_map(&file, 0..4 << 20).unwrap();
    assert_eq!(now.extents(), held.extents());
    drop(held);
    drop(file);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// Behind the gate, which stays closed for a while after a pin: a lease would
/// keep the guard waiting for us, and us for the guard.
pub(crate) fn watched(world: &World, kind: Kind) {
    let disk = Disk::new(kind, if kind.is_xfs() { 320 } else { 100 }).unwrap();
    let guard = world.guard().client();
    let path = written(&disk, "file", 65536);
    let other = written(&disk, "other", 65536);
    let mut watched = 0;
    for _ in 0..20 {
        let began = Instant::now();
        let file = open(&path);
        drop(pin(&guard, &file, 0..65536));
        let stat = rustix::fs::statvfs(disk.root()).unwrap();
        let size = stat.f_bfree * stat.f_frsize + 65536 - 16 * kind.block();
        let options = PrepareOptions::new().size(size).exclusive(true);
        let result = options.prepare_with(&file, |_| {
            // Half of what was free when it began is not any more.
            let stat = rustix::fs::statvfs(disk.root()).unwrap();
            let half = 65536..stat.f_bfree * stat.f_frsize / 2;
            fallocate::allocate(open(&other).as_fd(), &half).unwrap();
        });
        let error = result.unwrap_err();
        assert_eq!(error.errno(), Errno::NOSPC.raw_os_error(), "{error:#}");
        // Or it is being looked at this very moment.
        watched += u32::from(error.obstacle().contains("watches the file"));
        assert_eq!(file.metadata().unwrap().len(), 65536);
        drop(file);
        wait_until_free(&path);
        open(&path).set_len(65536).unwrap();
        open(&other).set_len(65536).unwrap();
        assert!(began.elapsed() < Duration::from_secs(10), "it stood still");
        free_space(&disk);
    }
    assert!(watched > 0, "nobody watched");
    disk.unmount().unwrap();
}

/// It takes nothing but a descriptor: also to give back, from a file of
/// one's own.
pub(crate) fn unprivileged(_world: &World, kind: Kind) {
    const NOBODY: u32 = 65534;
    let disk = Disk::new(kind, 320).unwrap();
    // The binary may lie where only root can go.
    let binary = disk.path("mapdirect");
    std::fs::copy(BINARY, &binary).unwrap();
    std::fs::set_permissions(&binary, PermissionsExt::from_mode(0o755)).unwrap();
    let path = disk.path("file");
    drop(new_file(&path));
    std::os::unix::fs::chown(&path, Some(NOBODY), Some(NOBODY)).unwrap();
    let prepare = |size: u64| {
        Command::new(&binary)
            .args([
                "prepare",
                text(&path),
                "--size",
                &size.to_string(),
                "--huge",
            ])
            .current_dir("/")
            .uid(NOBODY)
            .gid(NOBODY)
            .output()
            .unwrap()
    };
    let output = prepare(5_000_000);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let file = open(&path);
    assert!(synced(&file).is_stable());
    drop(file);
    let free = free_space(&disk);
    let all = rustix::fs::statvfs(disk.root()).unwrap();
    let available = all.f_bavail * all.f_frsize;
    if !kind.is_xfs() {
        // What ext4 sets aside is not for everybody.
        assert!(available < free);
        let output = prepare(free);
        assert!(complaint(&output).contains("are missing"), "{output:?}");
    } else {
        let output = prepare(available + 5_000_000 - 16_384);
        let words = complaint(&output);
        assert_eq!(output.status.code(), Some(1), "{words}");
        assert!(words.contains("is given back"), "{words}");
        let file = open(&path);
        assert_eq!(file.metadata().unwrap().len(), 5_000_000);
    }
    assert_eq!(free_space(&disk), free);
    std::fs::remove_file(&binary).unwrap();
    disk.unmount().unwrap();
}

/// A file without a name, and without a directory to put others beside it.
pub(crate) fn unlinked(world: &World, kind: Kind) {
    let path = world.disk(kind).path("prepare-unlinked");
    let file = tempfile(text(&path));
    let options = PrepareOptions::new().size(20 << 20).huge(true);
    let prepared = options.prepare(&file).unwrap();
    assert_stable(&file, &prepared, 0..20 << 20, kind.block());
    assert!(!path.exists());
}

pub(crate) fn command_line(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = disk.path("prepare-command-line");
    let name = text(&path);
    for arguments in [
        &[][..],
        &[name, "--size", "nonsense"],
        &[name, "--size", "4X"],
        &[name, "--range", "0:0"],
        &[name, "--no-such-option"],
        &[name, "beside", "it"],
    ] {
        let output = mapdirect(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        assert_eq!(complaint(&output).lines().count(), 1, "{output:?}");
    }
    let missing = mapdirect(&[name]).output().unwrap();
    assert_eq!(missing.status.code(), Some(1));
    assert!(complaint(&missing).contains("--size"), "{missing:?}");
    assert!(!path.exists());
    let wrong = mapdirect(&[name, "--size", "1M", "--range", "0:2M"]);
    let output = { wrong }.output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(!path.exists(), "what was made for nothing is gone");
    let limited = format!("ulimit -f 100; exec \"$0\" prepare {name} --size 1M");
    let output = Command::new("sh").args(["-c", &limited, BINARY]).output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(1), "no signal: {output:?}");
    assert!(complaint(&output).contains("ulimit"), "{output:?}");
    assert!(!path.exists());
    let output = mapdirect(&[name, "--size", "3M", "--json"])
        .output()
        .unwrap();
    assert_eq!(complaint(&output), "");
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["file"], name);
    assert_eq!(value["created"], true);
    assert_eq!(value["file_size"], 3 << 20);
    assert_eq!(value["allocated"], 3 << 20);
    assert_eq!(value["stable"], true);
    assert_eq!(value["huge_pieces"]["pieces"], 1);
    let extents = value["extents"].as_array().unwrap();
    assert!(extents.iter().all(|extent| extent["state"] == "written"));
    // A picture for a person, nothing on stderr where nobody looks.
    let output = mapdirect(&[name, "--size", "4M", "--range", "1M:2M", "--huge"]).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(complaint(&output), "");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        said.contains("bytes 1048576 to 3145728 are stable"),
        "{said}"
    );
    assert!(said.contains("from 3145728 to 4194304 bytes"), "{said}");
    assert!(said.contains("█ written"), "{said}");
    assert!(said.contains("pieces of 2 MiB"), "{said}");
    // On a terminal there is a bar.
    let command = format!("{BINARY} prepare {name} --size 100M");
    let output = Command::new("script")
        .args(["-q", "-e", "-c", &command, "/dev/null"])
        .stdin(Stdio::null())
        .env("TERM", "xterm")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("of 97.00 MiB"), "{said}");
    assert!(said.contains("MiB allocated"), "{said}");
    for strange in ["/dev/null", "/", "/proc/self/maps", "/dev/shm"] {
        let output = mapdirect(&[strange]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{strange}: {output:?}");
    }
    run(Command::new("chattr").args(["+a", name])).unwrap();
    let output = mapdirect(&[name, "--size", "101M"]).output().unwrap();
    run(Command::new("chattr").args(["-a", name])).unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    std::fs::remove_file(&path).unwrap();
}
