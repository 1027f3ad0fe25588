//! Families: a holder and its descendants, as `mapdirect pin -- COMMAND` makes
//! them.

mod deny;
mod keeper;

use crate::world::{BINARY, World, is_pinned, kinds, patience, pin, wait_until_free, written};
use anyhow::{Context, Result};
use libtest_mimic::Trial;
use mapdirect_sys::Errno;
use mapdirect_sys::fcntl::{LockKind, LockOwner, set_lock};
use mapdirect_testkit::Kind;
use mapdirect_testkit::process::{HELPER, Helper, listen, say};
use serde_json::Value;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

pub fn trials(world: &World) -> Vec<Trial> {
    let on_both = [
        ("members", members as crate::world::OnKind),
        ("daemon", daemon),
        ("opened-again", opened_again),
        ("beside-a-member", beside_a_member),
        ("extents", extents),
    ];
    let mut trials = world.trials("family", &kinds(&[Kind::XFS, Kind::EXT4]), &on_both);
    trials.extend(keeper::trials(world));
    trials.extend(deny::trials(world));
    trials
}

/// `mapdirect pin FILE -- COMMAND`.
fn pin_command(world: &World, path: &Path, options: &[&str], command: &[&str]) -> Command {
    let mut pin = Command::new(BINARY);
    pin.arg("pin").arg(path).args(options);
    if !options.contains(&"--patience") {
        pin.args(["--patience", "8000"]);
    }
    pin.arg("--").args(command);
    pin.env("MAPDIRECT_SOCKET", world.guard().socket());
    pin.env("F", path);
    pin
}

/// Runs a shell script under a pin of the whole of a file, whose name is in F.
fn script(world: &World, path: &Path, script: &str) -> Output {
    let mut pin = pin_command(world, path, &[], &["sh", "-c", script]);
    let output = pin.stdin(Stdio::null()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(errors, "", "{output:?}");
    output
}

/// What a stranger who wants to shorten a file is told.
fn shorten(path: &Path) -> Result<(), Errno> {
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, rustix::fs::Mode::empty())?;
    rustix::fs::ftruncate(&file, 4096)
}

/// Whoever descends from COMMAND opens the file for writing, by whatever way it
/// came to be. What it may do is what a holder may.
fn members(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "family-members", 65536);
    let output = script(
        world,
        &path,
        r#"
        store() {
            printf x | dd of="$F" bs=1 seek="$1" conv=notrunc status=none && echo "$1"
        }
        store 1
        (store 2; (store 3))
        F="$F" setsid -w sh -c 'printf x | dd of="$F" bs=1 seek=4 conv=notrunc status=none && echo 4'
        # Its parent ends first.
        sh -c '(sleep 0.2; printf x | dd of="$F" bs=1 seek=5 conv=notrunc status=none; echo 5) & :'
        sleep 0.6
        truncate -s 4096 "$F" 2>/dev/null || echo kept
        fallocate --punch-hole -o 0 -l 4096 "$F" 2>/dev/null || echo kept
        true 2>/dev/null > "$F" || echo kept
        printf more >> "$F" && echo grown
        "#,
    );
    let told = String::from_utf8(output.stdout).unwrap();
    let expected = ["1", "2", "3", "4", "5", "kept", "kept", "kept", "grown"];
    assert_eq!(told.lines().collect::<Vec<_>>(), expected);
    wait_until_free(&path);
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 65540);
    assert_eq!(&bytes[..7], b"\x07xxxxx\x07");
    std::fs::remove_file(&path).unwrap();
}

/// A daemon that COMMAND has left behind has the pin as long as it lives.
fn daemon(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "family-daemon", 65536);
    let go = path.with_extension("go");
    let script = r#"
        (setsid sh -c '
            until test -e "$F.go"; do sleep 0.05; done
            printf x | dd of="$F" bs=1 conv=notrunc status=none && mv "$F.go" "$F.done"
            until test -e "$F.end"; do sleep 0.05; done
        ' < /dev/null > /dev/null 2>&1 &)
        exit 3
    "#;
    let go = [go.with_file_name("family-daemon.go"), go];
    let pinned = path.clone();
    let mut pin = pin_command(world, &path, &[], &["sh", "-c", script]);
    let status = pin.status().unwrap();
    assert_eq!(status.code(), Some(3));
    for _ in 0..3 {
        assert!(is_pinned(&pinned));
        assert_eq!(shorten(&pinned), Err(Errno::TXTBSY));
    }
    std::fs::write(&go[0], "").unwrap();
    let done = pinned.with_file_name("family-daemon.done");
    appears(&done);
    assert_eq!(shorten(&pinned), Err(Errno::TXTBSY));
    let end = pinned.with_file_name("family-daemon.end");
    std::fs::write(&end, "").unwrap();
    mapdirect_testkit::process::wait_for(patience(), || Ok((!is_pinned(&pinned)).then_some(())))
        .unwrap();
    assert_eq!(std::fs::read(&pinned).unwrap()[0], b'x');
    assert_eq!(shorten(&pinned), Ok(()));
    for file in [pinned, done, end] {
        std::fs::remove_file(&file).unwrap();
    }
}

/// Waits for a file.
fn appears(path: &Path) {
    let there = || Ok(path.exists().then_some(()));
    mapdirect_testkit::process::wait_for(patience(), there).unwrap();
}

/// A program that opens the file in several ways and locks all of it, as
/// databases do; the role `member`.
fn member(world: &World, path: &Path, options: &[&str]) -> Helper {
    let own = std::env::current_exe().unwrap();
    let command = [
        own.to_str().unwrap(),
        HELPER,
        "member",
        path.to_str().unwrap(),
    ];
    Helper::spawn(pin_command(world, path, options, &command)).unwrap()
}

/// Role: opens a file as often as it is told to, and does something.
pub fn play_member(arguments: &[String]) -> Result<()> {
    let path = PathBuf::from(arguments.first().context("no file")?);
    let mut files = Vec::new();
    say("ready");
    while let Some(line) = listen()? {
        let mut options = File::options();
        let options = match &*line {
            "read" => options.read(true),
            "write" => options.write(true),
            "append" => options.append(true).read(true),
            _ => options.read(true).write(true),
        };
        match options.open(&path) {
            Ok(file) => {
                let locked = match &*line {
                    "lock" => set_lock(file.as_fd(), LockOwner::Process, LockKind::Exclusive, 0, 0),
                    "lock-description" => set_lock(
                        file.as_fd(),
                        LockOwner::Description,
                        LockKind::Exclusive,
                        0,
                        0,
                    ),
                    _ => Ok(()),
                };
                if line == "lock-description" {
                    // Another description could not lock it any more.
                    say(&format!("{locked:?}"));
                    continue;
                }
                files.push(file);
                say(&format!("{locked:?}"));
            }
            Err(error) => say(&format!("{error}")),
        }
    }
    Ok(())
}

fn opened_again(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "family-again", 65536);
    let mut member = member(world, &path, &[]);
    assert_eq!(member.hear().unwrap(), "ready");
    for how in [
        "lock-description",
        "read",
        "both",
        "write",
        "append",
        "lock",
        "both",
    ] {
        member.tell(how).unwrap();
        assert_eq!(member.hear().unwrap(), "Ok(())", "{how}");
        assert_eq!(shorten(&path), Err(Errno::TXTBSY), "{how}");
    }
    assert_eq!(member.finish().unwrap(), Some(0));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// A member that has the file open for writing is nobody that keeps others
/// from pinning it: it is judged.
fn beside_a_member(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "family-beside", 65536);
    let mut member = member(world, &path, &[]);
    assert_eq!(member.hear().unwrap(), "ready");
    member.tell("both").unwrap();
    assert_eq!(member.hear().unwrap(), "Ok(())");
    let other = pin(
        &world.guard().client(),
        &File::open(&path).unwrap(),
        0..16384,
    );
    member.tell("both").unwrap();
    assert_eq!(member.hear().unwrap(), "Ok(())");
    assert_eq!(member.finish().unwrap(), Some(0));
    assert!(is_pinned(&path));
    drop(other);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// COMMAND's output is its own; the extents are where the environment says.
fn extents(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "family-extents", 3 << 20);
    let copy = script(world, &path, "cat \"$F\"").stdout;
    assert!(copy == std::fs::read(&path).unwrap(), "the copy differs");
    let block_map = mapdirect::block_map(File::open(&path).unwrap(), 0..3 << 20).unwrap();
    for how in [
        "cat $MAPDIRECT_EXTENTS",
        "exec cat /proc/self/fd/$MAPDIRECT_EXTENTS_FD",
        "setpriv --reuid 65534 --regid 65534 --clear-groups cat $MAPDIRECT_EXTENTS",
        "printf x 2>/dev/null >> $MAPDIRECT_EXTENTS; cat $MAPDIRECT_EXTENTS",
    ] {
        let value: Value = serde_json::from_slice(&script(world, &path, how).stdout).unwrap();
        let [shown] = &value.as_array().unwrap()[..] else {
            panic!("{value}");
        };
        assert_eq!(shown["file"], path.to_str().unwrap());
        assert_eq!(shown["range"]["length"], 3 << 20);
        let extents = shown["extents"].as_array().unwrap();
        assert_eq!(extents.len(), block_map.extents().len());
        for (shown, extent) in extents.iter().zip(block_map.extents()) {
            assert_eq!(shown["file_offset"], extent.offset);
            assert_eq!(shown["physical_offset"], extent.physical.unwrap());
            assert_eq!(shown["length"], extent.length);
        }
    }
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// What a process says until it ends.
fn rest_of(mut output: impl Read) -> String {
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    text
}
