//! An NVDIMM as a disk that files can be mapped from directly.
//!
//! The kernel offers it as a *namespace*. As it comes, that is a raw disk
//! whose pages the kernel knows nothing of, and no filesystem can do DAX on
//! it. A block of information at its beginning makes it a *pfn* device (what
//! `ndctl` calls mode fsdax): then the kernel has a `struct page` for each,
//! here in ordinary memory. The block stays, so this happens once in the life
//! of an NVDIMM.

use crate::port::wait_for;
use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

const DEVICES: &str = "/sys/bus/nd/devices";
const DRIVER: &str = "/sys/bus/nd/drivers/nd_pmem";
/// What lies before the data of a pfn device at least.
const HEAD: u64 = 2 << 20;

/// Makes sure that there is `/dev/pmem` of this number, and that it can do
/// DAX.
pub(crate) fn prepare(number: u32) -> Result<()> {
    let namespace = format!("namespace{number}.0");
    wait_for("the NVDIMM's namespace", || {
        Path::new(DEVICES).join(&namespace).exists().then_some(())
    })?;
    // Reading it waits until every driver has looked at what it has.
    let _ = fs::read(format!("{DEVICES}/ndbus0/wait_probe"));
    let found = wait_for("its disk", || device(number))?;
    if found.starts_with("pfn") {
        return Ok(());
    }
    ensure!(
        is_blank(number)?,
        "its file holds something, but not in mode fsdax: nothing is overwritten here; \
         use another file, or empty this one"
    );
    write(&format!("{DRIVER}/unbind"), &namespace)?;
    let seed = read(&format!("{DEVICES}/region{number}/pfn_seed"))?;
    let uuid = read("/proc/sys/kernel/random/uuid")?;
    for (attribute, value) in [("mode", "ram"), ("uuid", &uuid), ("namespace", &namespace)] {
        write(&format!("{DEVICES}/{seed}/{attribute}"), value)?;
    }
    write(&format!("{DRIVER}/bind"), &seed)?;
    wait_for("its disk in mode fsdax", || {
        device(number).filter(|device| device.starts_with("pfn"))
    })?;
    Ok(())
}

/// What the disk of this number is made of.
fn device(number: u32) -> Option<String> {
    Path::new(&disk(number)).exists().then_some(())?;
    let device = fs::canonicalize(format!("/sys/block/pmem{number}/device")).ok()?;
    Some(device.file_name()?.to_string_lossy().into_owned())
}

fn disk(number: u32) -> String {
    format!("/dev/pmem{number}")
}

/// Whether nothing has ever been written to its beginning.
fn is_blank(number: u32) -> Result<bool> {
    let mut head = Vec::new();
    File::open(disk(number))?
        .take(HEAD)
        .read_to_end(&mut head)?;
    Ok(head.iter().all(|byte| *byte == 0))
}

fn read(path: &str) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    Ok(text.trim_end().to_owned())
}

fn write(path: &str, value: &str) -> Result<()> {
    fs::write(path, value).with_context(|| format!("cannot write {value} to {path}"))
}
