//! A process that cannot be looked at: it hangs in the middle of execve(2).
//!
//! Its old memory goes only when its aio is done (`exit_aio`), which waits for
//! a write to a loop device, which waits for a frozen filesystem.

use crate::world::{BINARY, PATIENCE, World, open, pin, written};
use anyhow::{Context, Result};
use libtest_mimic::Trial;
use mapdirect::PinOptions;
use mapdirect_sys::Errno;
use mapdirect_testkit::disk::Frozen;
use mapdirect_testkit::process::{GuardProcess, Helper, say};
use mapdirect_testkit::{Disk, Kind, raw};
use rustix::fs::OFlags;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

pub fn trials(world: &World) -> Vec<Trial> {
    vec![world.trial("stuck::in-the-middle-of-execve", in_the_middle_of_execve)]
}

/// A loop device whose writes hang, until this is dropped.
struct Hanging {
    device: PathBuf,
    /// Thawed before the loop device goes.
    frozen: Option<Frozen>,
    _disk: Disk,
}

impl Hanging {
    fn new() -> Self {
        let disk = Disk::new(Kind::EXT4, 64).unwrap();
        let backing = written(&disk, "backing", 1 << 20);
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&backing)
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let device = PathBuf::from(String::from_utf8(made.stdout).unwrap().trim_end());
        Self {
            device,
            frozen: Some(Frozen::new(&disk).unwrap()),
            _disk: disk,
        }
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        drop(self.frozen.take());
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

pub fn play_stuck(arguments: &[String]) -> Result<()> {
    let device = arguments.first().context("no device")?;
    let flags = OFlags::WRONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let device = rustix::fs::open(device, flags, rustix::fs::Mode::empty())?;
    let bytes = vec![1u8; 8192].leak();
    let aligned = bytes.as_ptr().align_offset(4096);
    raw::aio_begin_write(device.as_fd(), &bytes[aligned..aligned + 4096])?;
    say("ready");
    Err(Command::new("sleep").arg("60").exec().into())
}

/// Whether `/proc` can tell what a process is doing.
fn can_be_looked_at(pid: i32) -> bool {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let _ = std::fs::read(format!("/proc/{pid}/stack"));
        let _ = tell.send(());
    });
    told.recv_timeout(Duration::from_millis(200)).is_ok()
}

fn in_the_middle_of_execve(world: &World) {
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "stuck", 1 << 20);
    let other = written(&disk, "stuck-before", 1 << 20);
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let client = guard.client();
    let before = open(&other);
    let first = pin(&client, &before, 0..65536);
    let hanging = Hanging::new();
    let mut helper = Helper::start("stuck", &[hanging.device.to_str().unwrap()]).unwrap();
    assert_eq!(helper.hear().unwrap(), "ready");
    let deadline = Instant::now() + Duration::from_secs(5);
    while can_be_looked_at(helper.pid()) {
        if Instant::now() >= deadline {
            drop(hanging);
            helper.kill().unwrap();
            world.unavailable(String::from("a process that hangs in execve"));
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let file = open(&path);
    let begun = Instant::now();
    for _ in 0..4 {
        let pinned = PinOptions::new()
            .range(0..65536)
            .patience(Duration::from_millis(20))
            .guard(client.clone())
            .pin(&file);
        // It is in the middle of nothing but execve(2).
        drop(pinned.unwrap());
    }
    assert!(begun.elapsed() < Duration::from_secs(20));
    // What is pinned already stays so, and can be pinned again.
    let second = pin(&client, &before, 65536..131_072);
    assert_eq!(rustix::fs::ftruncate(&before, 0), Err(Errno::TXTBSY));
    let status = Command::new(BINARY)
        .args(["status"])
        .env("MAPDIRECT_SOCKET", guard.socket())
        .output()
        .unwrap();
    assert!(status.status.success(), "{status:?}");
    // Others find out that it is over, and the patient ones are granted.
    let pinned = std::thread::scope(|scope| {
        let patient = scope.spawn(|| {
            PinOptions::new()
                .range(0..65536)
                .patience(PATIENCE * 5)
                .guard(client.clone())
                .pin(&file)
        });
        std::thread::sleep(Duration::from_millis(300));
        drop(hanging);
        patient.join().unwrap()
    });
    drop((pinned.unwrap(), first, second));
    helper.kill().unwrap();
    for path in [path, other] {
        std::fs::remove_file(&path).unwrap();
    }
}
