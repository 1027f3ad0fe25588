//! LIO's backstores, served to this machine itself by its loopback fabric.

use super::{Came, Configured, Loop, Scene, configfs, harmful, turn};
use crate::world::{World, patience, wait_until_free};
use anyhow::{Context, Result};
use mapdirect_testkit::Kind;
use mapdirect_testkit::disk::run;
use mapdirect_testkit::process::wait_for;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "/sys/kernel/config/target";
const NAME: &str = "mapdirect-test";

/// What a disk of SCSI may be told that reaches what is behind it.
const COMMANDS: [&str; 3] = ["write", "unmap", "write-same"];

/// A backstore, and the disk it is served as. Dropped, it goes.
struct Target {
    device: PathBuf,
    link: PathBuf,
    // In this order: the fabric, then what it serves.
    fabric: Option<Configured>,
    store: Option<Configured>,
}

impl Target {
    fn with(plugin: &str, parameters: &str) -> Result<Self> {
        let adapter = Path::new(TARGET).join(format!("core/{plugin}_77"));
        let store = adapter.join(NAME);
        let enable = store.join("enable");
        let mut backstore = Configured {
            directories: Vec::new(),
            enable,
        };
        for directory in [adapter, store.clone()] {
            fs::create_dir(&directory)?;
            backstore.directories.push(directory);
        }
        fs::write(store.join("control"), parameters)?;
        fs::write(&backstore.enable, "1")?;
        for emulated in ["emulate_tpu", "emulate_tpws"] {
            fs::write(store.join("attrib").join(emulated), "1")?;
        }
        let before = disks();
        let wwn = Path::new(TARGET).join("loopback/naa.5001405000000077");
        let group = wwn.join("tpgt_1");
        let unit = group.join("lun/lun_0");
        let mut target = Self {
            device: PathBuf::new(),
            link: unit.join(NAME),
            fabric: Some(Configured {
                directories: Vec::new(),
                enable: group.join("enable"),
            }),
            store: Some(backstore),
        };
        let fabric = Path::new(TARGET).join("loopback");
        if !fabric.exists() {
            // It stays: it is the module's, and not this test's alone.
            fs::create_dir(fabric)?;
        }
        for directory in [wwn, group.clone()] {
            fs::create_dir(&directory)?;
            if let Some(fabric) = &mut target.fabric {
                fabric.directories.push(directory);
            }
        }
        fs::write(group.join("nexus"), "naa.5001405000000078")?;
        fs::create_dir(&unit)?;
        if let Some(fabric) = &mut target.fabric {
            fabric.directories.push(unit);
        }
        std::os::unix::fs::symlink(&store, &target.link)?;
        target.device = wait_for(patience(), || {
            let new = disks().into_iter().find(|disk| !before.contains(disk));
            Ok(new.map(|name| Path::new("/dev").join(name)))
        })
        .context("no disk came of it")?;
        wait_for(patience(), || {
            Ok(File::open(&target.device)
                .is_ok_and(|device| size(&device) >= super::LENGTH)
                .then_some(()))
        })
        .context("the disk has no size")?;
        Ok(target)
    }

    fn file(path: &Path) -> Result<Self> {
        let length = super::LENGTH;
        let parameters = format!("fd_dev_name={},fd_dev_size={length}", path.display());
        Self::with("fileio", &parameters)
    }

    fn block(device: &Loop) -> Result<Self> {
        Self::with("iblock", &format!("udev_path={}", device.0))
    }

    fn attack(&self, command: &str) -> Result<()> {
        let discard = |how: &[&str]| {
            let place = harmful("punch").to_string();
            run(Command::new("blkdiscard")
                .args(how)
                .args(["-f", "-o", &place, "-l", "4096"])
                .arg(&self.device))
        };
        match command {
            "write" => {
                let device = File::options().write(true).open(&self.device)?;
                device.write_all_at(&[1; 4096], harmful("write"))?;
                Ok(device.sync_all()?)
            }
            "unmap" => discard(&[]),
            _ => discard(&["-z"]),
        }
    }

    /// All of them; whether one worked.
    fn attack_by_all(&self) -> Came {
        let tried: Vec<_> = COMMANDS
            .iter()
            .map(|command| self.attack(command))
            .collect();
        println!("writers: LIO: {tried:?}");
        let worked = tried.iter().position(Result::is_ok).unwrap_or(0);
        Came::of(tried.into_iter().nth(worked).unwrap())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.link);
        drop(self.fabric.take());
        drop(self.store.take());
    }
}

fn disks() -> Vec<String> {
    let disks = fs::read_dir("/sys/block").unwrap().flatten();
    disks
        .map(|disk| disk.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("sd"))
        .collect()
}

fn size(mut device: &File) -> u64 {
    use std::io::Seek;
    device.seek(std::io::SeekFrom::End(0)).unwrap_or(0)
}

pub(super) fn backstores(world: &World, kind: Kind) {
    let modules = [
        "target_core_mod",
        "target_core_file",
        "target_core_iblock",
        "tcm_loop",
        "sd_mod",
    ];
    if !configfs(world, &modules) {
        return;
    }
    let _turn = turn();
    let disk = world.disk(kind);
    let scene = Scene::new(world, &disk, "lio");
    // With nothing pinned each of them reaches the file.
    let map = || {
        scene.file.sync_all().unwrap();
        mapdirect::block_map(&scene.file, 0..scene.range).unwrap()
    };
    let target = Target::file(&scene.path).unwrap();
    for command in &COMMANDS[..2] {
        let before = map();
        target.attack(command).unwrap();
        assert_ne!(before.extents(), map().extents(), "{command}");
    }
    scene.before("fileio", "", || target.attack_by_all());
    drop(target);
    scene.after("fileio", "", || {
        let target = Target::file(&scene.path);
        if let Ok(target) = &target {
            target.attack_by_all();
        }
        Came::of(target)
    });
    // The gate knows the file from a pin that is gone.
    wait_until_free(&scene.path);
    let target = Target::file(&scene.path).unwrap();
    scene.before("fileio", "between two pins", || target.attack_by_all());
    drop(target);

    let device = Loop::of(&scene.path, &[]).unwrap();
    let target = Target::block(&device).unwrap();
    scene.before("iblock", "", || target.attack_by_all());
    drop((target, device));
    scene.after("iblock", "", || {
        let device = Loop::of(&scene.path, &[]);
        let target = device.as_ref().map(Target::block);
        if let Ok(Ok(target)) = &target {
            target.attack_by_all();
        }
        Came::of(device.as_ref().map(drop))
    });
}
