//! Devices of a sysfs that is made up.

use super::tree::Tree;
use super::{BlockDevice, DiskLayout, DiskRun, Place};
use mapdirect_model::DeviceId;
use mapdirect_sys::Errno;
use mapdirect_sys::dm_table::Target;
use proptest::prelude::*;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

const SECTOR: u64 = 512;

/// A sysfs in a directory of its own.
struct Machine {
    tree: Tree,
    _directory: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let tree = Tree {
            sysfs: directory.path().join("sys"),
            devices: directory.path().join("dev"),
        };
        fs::create_dir_all(tree.sysfs.join("dev/block")).unwrap();
        Self {
            tree,
            _directory: directory,
        }
    }

    /// A device at a path below `devices`, with attributes.
    fn add(&self, path: &str, id: &str, sectors: u64, attributes: &[(&str, &str)]) -> &Self {
        let place = self.tree.sysfs.join("devices").join(path);
        fs::create_dir_all(&place).unwrap();
        let name = Path::new(path).file_name().unwrap().to_str().unwrap();
        let sectors = format!("{sectors}\n");
        let (id_line, uevent) = (format!("{id}\n"), format!("MAJOR=8\nDEVNAME={name}\n"));
        let common = [("dev", &*id_line), ("uevent", &uevent), ("size", &sectors)];
        for (attribute, text) in common.iter().chain(attributes) {
            let file = place.join(attribute);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        let link = self.tree.sysfs.join("dev/block").join(id);
        let _ = fs::remove_file(&link);
        symlink(place, link).unwrap();
        self
    }

    fn device(&self, major: u32, minor: u32) -> BlockDevice {
        self.tree.device(DeviceId { major, minor }).unwrap()
    }

    fn layout(&self, major: u32, minor: u32) -> DiskLayout {
        DiskLayout::read(&self.tree, &self.device(major, minor), table)
    }
}

/// Tables of mapped devices by their minor numbers.
fn table(_: u32, minor: u32) -> Result<Vec<Target>, Errno> {
    let target = |start: u64, length: u64, kind: &str, parameters: &str| Target {
        start: start * SECTOR,
        length: length * SECTOR,
        kind: kind.to_owned(),
        parameters: parameters.to_owned(),
    };
    match minor {
        0 => Ok(vec![
            target(0, 100, "linear", "8:1 50"),
            target(100, 100, "linear", "8:1 150"),
            target(200, 100, "linear", "8:16 7"),
            target(300, 100, "crypt", "aes 0 0 8:16 900"),
        ]),
        1 => Ok(vec![target(0, 1000, "linear", "253:0 100")]),
        2 => Ok(vec![target(0, 10, "linear", "8:1 0")]),
        3 => Ok(vec![target(0, 100, "linear", "253:3 0")]),
        4 => Err(Errno::ACCESS),
        _ => Err(Errno::NXIO),
    }
}

/// What became of runs: sectors, and the disk with the sector on it, or a word
/// of the reason.
fn told(runs: &[DiskRun]) -> Vec<(u64, u64, String)> {
    let place = |run: &DiskRun| match &run.place {
        Place::Disk { disk, offset } => format!("{} {}", disk.name, offset / SECTOR),
        Place::Unknown { reason } => reason.clone(),
    };
    runs.iter()
        .map(|run| (run.offset / SECTOR, run.length / SECTOR, place(run)))
        .collect()
}

fn two_disks() -> Machine {
    let machine = Machine::new();
    machine
        .add("pci/sda", "8:0", 10_000, &[])
        .add(
            "pci/sda/sda1",
            "8:1",
            1000,
            &[("partition", "1\n"), ("start", "2048\n")],
        )
        .add("pci/sdb", "8:16", 5000, &[])
        .add("virtual/dm-0", "253:0", 400, &[("dm/name", "vg-lv\n")]);
    machine
}

#[test]
fn a_partition_lies_on_its_disk() {
    let machine = two_disks();
    let device = machine.device(8, 1);
    assert_eq!((&*device.name, device.size), ("sda1", 1000 * SECTOR));
    assert_eq!(device.path, None, "there is no device file");
    let layout = machine.layout(8, 1);
    assert_eq!(told(layout.runs()), [(0, 1000, String::from("sda 2048"))]);
    assert_eq!(
        told(&layout.locate(512 * 7..512 * 9)),
        [(7, 2, String::from("sda 2055"))]
    );
    assert_eq!(
        told(&machine.layout(8, 16).locate(0..512)),
        [(0, 1, String::from("sdb 0"))]
    );
}

#[test]
fn tables_are_followed_as_far_as_they_are_linear() {
    let machine = two_disks();
    machine.add("virtual/dm-1", "253:1", 250, &[("dm/name", "upper\n")]);
    let layout = machine.layout(253, 0);
    let runs = told(layout.runs());
    // The first two targets go on in each other.
    assert_eq!(runs[0], (0, 200, String::from("sda 2098")));
    assert_eq!(runs[1], (200, 100, String::from("sdb 7")));
    assert_eq!((runs[2].0, runs[2].1), (300, 100));
    assert!(runs[2].2.contains("crypt"), "{}", runs[2].2);
    let upper = told(machine.layout(253, 1).runs());
    assert_eq!(upper[0], (0, 100, String::from("sda 2198")));
    assert_eq!(upper[1], (100, 100, String::from("sdb 7")));
    assert!(upper[2].2.contains("crypt") && upper[2].1 == 50);
}

#[test]
fn what_cannot_be_known_is_said() {
    let machine = two_disks();
    let mapped = |name: &'static str| [("dm/name", name)];
    machine
        .add(
            "virtual/md0",
            "9:0",
            100,
            &[("slaves/sda", ""), ("slaves/sdb", "")],
        )
        .add("virtual/dm-2", "253:2", 100, &mapped("short\n"))
        .add("virtual/dm-3", "253:3", 100, &mapped("circle\n"))
        .add("virtual/dm-4", "253:4", 100, &mapped("secret\n"))
        .add("virtual/dm-5", "253:5", 100, &mapped("gone\n"))
        .add(
            "pci/sdb/sdb1",
            "8:17",
            4000,
            &[("partition", "1\n"), ("start", "2048\n")],
        )
        .add("pci/sdb/sdb2", "8:18", 10, &[("partition", "2\n")]);
    for (id, reason) in [
        ((9, 0), "md0 is made of sda, sdb"),
        ((253, 2), "the table of dm-2 ends at byte 5120"),
        ((253, 3), "more than 16 devices"),
        ((253, 4), "CAP_SYS_ADMIN"),
        ((253, 5), "cannot be read"),
        ((8, 17), "sysfs contradicts itself: sdb ends at byte"),
        ((8, 18), "has no start"),
    ] {
        let layout = machine.layout(id.0, id.1);
        let runs = told(layout.runs());
        assert_eq!(runs.len(), 1, "{runs:?}");
        assert!(runs[0].2.contains(reason), "{runs:?}");
        assert_eq!(runs[0].1 * SECTOR, machine.device(id.0, id.1).size);
    }
    let beyond = told(&machine.layout(8, 1).locate(999 * SECTOR..1001 * SECTOR));
    assert_eq!(beyond.len(), 2);
    assert!(beyond[1].2.contains("beyond the end"));
}

#[test]
fn a_device_that_is_gone_or_another_is_refused() {
    let machine = two_disks();
    let id = |major, minor| DeviceId { major, minor };
    let gone = machine.tree.device(id(8, 99)).unwrap_err();
    assert_eq!(gone.errno_name(), "ENXIO");
    let none = machine.tree.device(id(0, 42)).unwrap_err();
    assert!(none.obstacle().contains("without a block device"), "{none}");
    let attribute = |name: &str| machine.tree.sysfs.join("devices/pci/sda").join(name);
    fs::write(attribute("size"), "many\n").unwrap();
    let error = machine.tree.device(id(8, 0)).unwrap_err();
    assert_eq!(error.errno(), Errno::BADMSG.raw_os_error());
    fs::write(attribute("size"), format!("{}\n", u64::MAX)).unwrap();
    assert!(machine.tree.device(id(8, 0)).is_err());
    fs::write(attribute("dev"), "8:32\n").unwrap();
    let error = machine.tree.device(id(8, 0)).unwrap_err();
    assert!(error.obstacle().contains("shows device 8:32"), "{error}");
    fs::remove_file(attribute("dev")).unwrap();
    assert!(machine.tree.device(id(8, 0)).is_err());
    // While its partition is still looked at, too.
    let layout = machine.layout(8, 1);
    assert!(layout.runs()[0].place.known().is_none());
    fs::remove_dir_all(&machine.tree.sysfs).unwrap();
    let error = machine.tree.device(id(8, 1)).unwrap_err();
    assert!(error.obstacle().contains("sysfs"), "{error}");
}

proptest! {
    /// Whatever range is asked for is covered, once and in order.
    #[test]
    fn nothing_is_left_out(start in 0u64..300_000, length in 1u64..300_000) {
        let machine = two_disks();
        let runs = machine.layout(253, 0).locate(start..start + length);
        let mut at = start;
        for run in &runs {
            prop_assert_eq!(run.offset, at);
            prop_assert!(run.length > 0);
            at = run.end();
            if let Some((disk, offset)) = run.place.known() {
                // Block by block, by hand.
                let expected = match run.offset / SECTOR {
                    0..200 => ("sda", 2098 * SECTOR + run.offset),
                    _ => ("sdb", 7 * SECTOR + run.offset - 200 * SECTOR),
                };
                prop_assert_eq!((&*disk.name, offset), expected);
            } else {
                prop_assert!(run.offset + run.length > 300 * SECTOR);
            }
        }
        prop_assert_eq!(at, start + length);
    }
}
