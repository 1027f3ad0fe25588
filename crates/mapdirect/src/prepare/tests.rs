//! Preparing real files, each step of it made to fail: no byte may change,
//! and what was allocated must go again. They need root and a loop device.

use super::job::WINDOW;
use super::*;
use crate::extents;
use mapdirect_proto::ExtentState;
use mapdirect_sys::fallocate;
use mapdirect_sys::seam::{self, Call};
use mapdirect_testkit::{Disk, Kind as On};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const SIZE: u64 = 1 << 20;

/// A file with everything there is to do, and its bytes.
fn subject(disk: &Disk) -> (File, Vec<u8>) {
    let path = disk.path("file");
    let _ = std::fs::remove_file(&path);
    let file = File::create_new(&path).unwrap();
    let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
    bytes[300_000..400_000].fill(7);
    file.write_all_at(&bytes[300_000..400_000], 300_000)
        .unwrap();
    fallocate::allocate(file.as_fd(), &(600_000..700_000)).unwrap();
    file.set_len(SIZE).unwrap();
    file.sync_all().unwrap();
    if disk.kind().reflink() {
        share(&file, &disk.path("sharer"));
    }
    (file, bytes)
}

fn share(file: &File, sharer: &Path) {
    let into = File::create(sharer).unwrap();
    rustix::fs::ioctl_ficlone(&into, file).unwrap();
}

fn whole_map(file: &File) -> BlockMap {
    file.sync_all().unwrap();
    extents::read(file.as_fd(), 0..4 * SIZE).unwrap()
}

/// How often each call can be made to fail on the way, and that nothing is
/// lost by it.
fn each_step_fails(on: On, exclusive: bool) {
    let disk = Disk::new(on, 320).unwrap();
    let mut failed = Vec::new();
    for call in Call::ALL {
        for errno in [Errno::NOSPC, Errno::IO, Errno::FAULT, Errno::AGAIN] {
            if (call, errno) == (Call::PopulateWrite, Errno::AGAIN) {
                // The call is made again, and again.
                continue;
            }
            for skip in 0..12 {
                let (file, bytes) = subject(&disk);
                let before = whole_map(&file);
                let what = format!("{call:?} after {skip}: {errno}");
                seam::fail_after(call, skip, errno);
                let options = PrepareOptions::new().size(2 * SIZE).exclusive(exclusive);
                let result = options.prepare(&file);
                seam::clear();
                let after = whole_map(&file);
                let size = usize::try_from(after.file_size()).unwrap();
                let mut now = vec![1; size];
                file.read_exact_at(&mut now, 0).unwrap();
                assert!(now[..bytes.len()] == bytes, "{what}: bytes changed");
                assert!(now[bytes.len()..].iter().all(|byte| *byte == 0), "{what}");
                let Err(error) = result else {
                    assert_eq!(after.file_size(), 2 * SIZE, "{what}");
                    assert!(
                        extents::read(file.as_fd(), 0..2 * SIZE)
                            .unwrap()
                            .is_stable()
                    );
                    continue;
                };
                failed.push(call);
                let text = format!("{error:#}");
                assert!(text.starts_with("cannot prepare"), "{what}: {text}");
                let kept = text.contains("stay allocated") || text.contains("stays longer");
                if kept {
                    assert!(!exclusive || text.contains("written"), "{what}: {text}");
                } else {
                    assert_eq!(after.file_size(), SIZE, "{what}: {text}");
                    for extent in before.frozen() {
                        if extent.state == ExtentState::Hole {
                            let range = extent.offset..extent.end();
                            let now = extents::read(file.as_fd(), range.clone()).unwrap();
                            let holes = now.total(ExtentState::Hole);
                            assert_eq!(holes, range.end - range.start, "{what}: {text}");
                        }
                    }
                }
                // It can go on from there.
                let options = PrepareOptions::new().size(2 * SIZE);
                let prepared = options.prepare(&file).unwrap();
                assert!(prepared.block_map().is_stable(), "{what}");
            }
        }
    }
    for call in [
        Call::Fiemap,
        Call::Fsync,
        Call::Mmap,
        Call::Fallocate,
        Call::SyncFileRange,
    ] {
        let count = failed.iter().filter(|failed| **failed == call).count();
        assert!(count >= 2, "{call:?} failed {count} times only");
    }
}

#[test]
#[ignore = "needs root and loop devices: cargo xtask test"]
fn a_step_that_fails_costs_no_byte_on_xfs() {
    each_step_fails(On::XFS, true);
}

#[test]
#[ignore = "needs root and loop devices: cargo xtask test"]
fn a_step_that_fails_costs_no_byte_on_ext4() {
    each_step_fails(On::EXT4, true);
}

#[test]
#[ignore = "needs root and loop devices: cargo xtask test"]
fn a_step_that_fails_costs_no_byte_when_others_use_the_description() {
    each_step_fails(On::XFS, false);
}

/// What fails after others have stored there is not given back.
#[test]
#[ignore = "needs root and loop devices: cargo xtask test"]
fn what_others_have_stored_is_never_given_back() {
    for on in [On::XFS, On::XFS_PLAIN, On::EXT4] {
        let disk = Disk::new(on, 320).unwrap();
        // The last ones are allocated, but not written when it fails.
        let size = 2 * WINDOW;
        for at in [10_000, SIZE - 5, SIZE + 5, WINDOW + 9, size - 5] {
            let (file, _) = subject(&disk);
            let mut stored = false;
            let result = PrepareOptions::new()
                .size(size)
                .exclusive(true)
                .prepare_with(&file, |progress| {
                    // Everything is allocated when the first bytes are done.
                    if progress.done > 0 && !stored {
                        stored = true;
                        let stranger = File::options().write(true).open(disk.path("file"));
                        stranger.unwrap().write_all_at(b"dear", at).unwrap();
                        seam::fail_after(Call::Mmap, 0, Errno::IO);
                    }
                });
            seam::clear();
            assert!(stored);
            let error = result.unwrap_err();
            assert_eq!(error.errno(), Errno::IO.raw_os_error(), "{error:#}");
            let mut found = [0; 4];
            file.read_exact_at(&mut found, at).unwrap();
            assert_eq!(&found, b"dear", "{on}: at {at}: {error:#}");
        }
    }
}

/// While somebody opens the file it is not given back either.
#[test]
#[ignore = "needs root and loop devices: cargo xtask test"]
fn a_lease_that_is_not_to_be_had_is_told() {
    let disk = Disk::new(On::EXT4, 64).unwrap();
    let (file, bytes) = subject(&disk);
    let reader = File::open(disk.path("file")).unwrap();
    seam::fail_after(Call::PopulateWrite, 0, Errno::IO);
    let options = PrepareOptions::new().exclusive(true);
    let error = options.prepare(&file).unwrap_err();
    let text = error.obstacle();
    assert!(text.contains("somebody else has the file open"), "{text}");
    let unwritten = whole_map(&file).total(ExtentState::Unwritten);
    assert!(unwritten > SIZE / 2, "{unwritten}");
    let mut found = vec![1; bytes.len()];
    reader.read_exact_at(&mut found, 0).unwrap();
    assert!(found == bytes);
}
