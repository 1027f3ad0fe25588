//! What the gate in the kernel refuses beside reads, writes and the like has
//! names.

use super::{log, wait_for_records};
use crate::world::{BINARY, World, open, pin, wait_until_free, written};
use mapdirect_sys::Errno;
use mapdirect_testkit::disk::run;
use mapdirect_testkit::process::GuardProcess;
use mapdirect_testkit::{Kind, raw};
use rustix::fs::OFlags;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

/// `FS_IOC_ENABLE_VERITY`.
const ENABLE_VERITY: u64 = 0x4080_6685;
/// `FS_IOC_FSGETXATTR` and `FS_IOC_FSSETXATTR`.
const GET_ATTRIBUTES: u64 = 0x801c_581f;
const SET_ATTRIBUTES: u64 = 0x401c_5820;

pub fn operations(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    for kind in [Kind::XFS, Kind::EXT4] {
        let disk = world.disk(kind);
        let path = written(&disk, "audit-operations", 65_536);
        let file = open(&path);
        // With a hole, so that it matters how a write is made.
        file.set_len(131_072).unwrap();
        let pinned = pin(&guard.client(), &file, 0..131_072);
        for (name, refused) in refusals(kind, &path, &file) {
            assert!(refused, "{name} on {kind:?}");
            let of_pin = |record: &serde_json::Value| {
                record["pin"] == pinned.pin_id() && record["operation"] == name
            };
            let record = wait_for_records(&guard, 1, of_pin).remove(0);
            assert!(record["offset"].is_null(), "{record}");
            assert!(record["length"].is_null(), "{record}");
        }
        let unknown = log(&guard, &["--operation", "unknown"]);
        assert!(unknown.is_empty(), "{unknown:?}");
        drop((pinned, file));
        wait_until_free(&path);
        std::fs::remove_file(&path).unwrap();
    }
}

/// Does each of them; with its name, whether it was refused.
fn refusals(kind: Kind, path: &Path, file: &File) -> Vec<(&'static str, bool)> {
    let tool = |program: &str, arguments: &[&str]| {
        let ran = run(Command::new(program).args(arguments).arg(path));
        ran.is_err_and(|error| format!("{error:#}").contains("Text file busy"))
    };
    let appends = rustix::fs::fcntl_setfl(file, OFlags::RDWR | OFlags::APPEND);
    let set_attributes = if kind.is_xfs() {
        sets_copy_hint(file) == Err(Errno::TXTBSY)
    } else {
        tool("chattr", &["+j"])
    };
    let mut refused = vec![
        ("set-flags", appends == Err(Errno::TXTBSY)),
        ("set-attributes", set_attributes),
        ("loop-setup", tool("losetup", &["--find", "--show"])),
    ];
    if !kind.is_xfs() {
        let reader = File::open(path).unwrap();
        let verity = raw::ioctl(reader.as_fd(), ENABLE_VERITY, &mut [0u8; 128]);
        refused.push(("enable-verity", verity == Err(Errno::TXTBSY)));
    }
    refused
}

/// Sets a hint on how much XFS allocates for a copy of shared blocks, in
/// `struct fsxattr`.
fn sets_copy_hint(file: &File) -> Result<(), Errno> {
    const HAS_HINT: u8 = 0x1;
    let mut attributes = [0; 28];
    raw::ioctl(file.as_fd(), GET_ATTRIBUTES, &mut attributes)?;
    // FS_XFLAG_COWEXTSIZE, 0x10000 of fsx_xflags.
    attributes[2] |= HAS_HINT;
    attributes[16..20].copy_from_slice(&(1u32 << 20).to_ne_bytes());
    raw::ioctl(file.as_fd(), SET_ATTRIBUTES, &mut attributes).map(drop)
}
