//! Extents in the forms that agents need: they lead to the bytes of the file, and
//! what does not is refused.

mod coherence;
mod devices;
mod forms;
pub mod schemas;

use crate::world::{BINARY, World, kinds};
use libtest_mimic::Trial;
use mapdirect_testkit::Kind;
use mapdirect_testkit::disk::{run, unmount};
use mapdirect_testkit::process::{GuardProcess, ScratchDirectory};
use rustix::fs::OFlags;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = world.trials(
        "extents",
        &kinds(&[Kind::XFS, Kind::EXT4]),
        &[
            ("forms", forms::lead_to_the_bytes),
            ("resume-offset", forms::resume_offset),
            ("contiguous", forms::contiguous),
            ("coherence", coherence::of_caches),
        ],
    );
    for (name, run) in [
        ("schemas", schemas::outputs_are_as_described as fn(&World)),
        ("every-verb-has-a-schema", schemas::every_verb_has_one),
        ("bad-input", forms::bad_input),
        ("partition", devices::partition),
        ("dm-linear", devices::linear),
        ("dm-others", devices::not_linear),
        ("dm-example", devices::table_over_a_pin),
        ("realtime", devices::realtime),
    ] {
        trials.push(world.trial(format!("extents::{name}"), run));
    }
    trials
}

/// The command, with the socket of a guard.
fn mapdirect(guard: &GuardProcess, arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.env("COLUMNS", "1000");
    command
        .args(arguments)
        .env("MAPDIRECT_SOCKET", guard.socket());
    command
}

/// What it prints, if it is content.
fn said(guard: &GuardProcess, arguments: &[&str]) -> String {
    text(&mapdirect(guard, arguments).output().unwrap())
}

fn text(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What it complains of, if it is not content.
fn complaint(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(output.stdout.is_empty(), "{output:?}");
    assert!(!errors.contains("panicked"), "{errors}");
    errors
}

/// A line of CSV.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Line {
    offset: u64,
    length: u64,
    state: String,
    access: String,
    device: String,
    device_offset: Option<u64>,
    disk: String,
    disk_name: String,
    disk_offset: Option<u64>,
}

/// The lines of CSV; nothing in these fields is quoted.
fn lines(csv: &str) -> Vec<Line> {
    let (heading, rest) = csv.split_once('\n').unwrap();
    assert_eq!(
        heading,
        "file_offset,length,state,access,device,device_offset,disk,disk_name,disk_offset"
    );
    rest.lines()
        .map(|line| {
            let fields: Vec<_> = line.split(',').map(str::to_owned).collect();
            let [
                offset,
                length,
                state,
                access,
                device,
                at,
                disk,
                name,
                disk_at,
            ] = &fields[..]
            else {
                panic!("{line}");
            };
            Line {
                offset: offset.parse().unwrap(),
                length: length.parse().unwrap(),
                state: state.clone(),
                access: access.clone(),
                device: device.clone(),
                device_offset: at.parse().ok(),
                disk: disk.clone(),
                disk_name: name.clone(),
                disk_offset: disk_at.parse().ok(),
            }
        })
        .collect()
}

/// A device or a file, past the page cache.
fn direct(path: &Path) -> File {
    File::options()
        .read(true)
        .write(path.starts_with("/dev"))
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(path)
        .unwrap()
}

/// Memory for direct I/O.
struct Aligned(Vec<u8>, usize);

impl Aligned {
    fn new(length: usize) -> Self {
        Self(vec![0; length + 4096], length)
    }

    fn bytes(&mut self) -> &mut [u8] {
        let start = self.0.as_ptr().align_offset(4096);
        &mut self.0[start..start + self.1]
    }
}

/// Bytes of a device, past its page cache.
fn read_direct(device: &Path, offset: u64, length: u64) -> Vec<u8> {
    let mut memory = Aligned::new(usize::try_from(length).unwrap());
    direct(device)
        .read_exact_at(memory.bytes(), offset)
        .unwrap();
    memory.bytes().to_vec()
}

/// A loop device, detached when it is dropped.
struct Loop(String);

impl Loop {
    fn of(path: &Path, arguments: &[&str]) -> Self {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .args(arguments)
            .arg(path)
            .output()
            .unwrap();
        Self(text(&output).trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = run(Command::new("losetup").arg("--detach").arg(&self.0));
    }
}

/// Something that a command made, and another one takes away.
struct Made(Vec<String>);

impl Drop for Made {
    fn drop(&mut self) {
        let _ = run(Command::new(&self.0[0]).args(&self.0[1..]));
    }
}

/// A filesystem on a device, mounted; unmounted when dropped.
struct Mounted {
    directory: ScratchDirectory,
}

impl Mounted {
    fn new(mkfs: &mut Command, device: &Path) -> Self {
        run(mkfs.arg(device)).unwrap();
        let directory = ScratchDirectory::in_memory("extents").unwrap();
        run(Command::new("mount").arg(device).arg(directory.path())).unwrap();
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(self.directory.path());
    }
}

/// Bytes that tell places apart.
fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| u8::try_from((at / 13 + at / 4096) % 251).unwrap())
        .collect()
}

/// Whether there is a device-mapper; says so if not.
fn has_mapper(world: &World) -> bool {
    // Opening it has the kernel load the module.
    let there = File::options()
        .read(true)
        .write(true)
        .open("/dev/mapper/control");
    match there {
        Ok(_) => true,
        Err(error) => {
            world.unavailable(format!("a device-mapper (/dev/mapper/control: {error})"));
            false
        }
    }
}
