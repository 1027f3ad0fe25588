//! The first process of a virtual machine: gives it the root of the machine
//! outside, its kernel modules and its NVDIMMs, and runs programs as the task
//! outside tells it.

#![forbid(unsafe_code)]

mod filesystems;
mod modules;
mod nvdimm;
mod port;
mod serve;

use anyhow::{Context, Result};
use mapdirect_sys::signal::{Signal, SignalFd};
use port::Port;
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::system::RebootCommand;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use xtask_init::wire::Message;

/// What it is called with when systemd is the first process, and this runs
/// programs beside it.
const BESIDE_SYSTEMD: &str = "beside-systemd";

fn main() {
    let is_beside = std::env::args()
        .nth(1)
        .is_some_and(|word| word == BESIDE_SYSTEMD);
    if is_beside {
        if let Err(error) = serve() {
            eprintln!("init: {error:#}");
        }
        return;
    }
    if std::process::id() != 1 {
        eprintln!("init: this is the first process of a virtual machine, see cargo xtask vm");
        std::process::exit(2);
    }
    if let Err(error) = live() {
        // To the console, which the task outside shows.
        eprintln!("init: {error:#}");
    }
    // An end of this process would be a panic of the kernel, and say less.
    let _ = rustix::system::reboot(RebootCommand::PowerOff);
}

fn live() -> Result<()> {
    allow_many_descriptors().context("cannot raise a limit")?;
    filesystems::mount_own().context("cannot mount what the kernel itself offers")?;
    modules::load(Path::new(xtask_init::MODULES))?;
    if Path::new(xtask_init::SYSTEMD).exists() {
        get_ready()?;
        return become_systemd();
    }
    // Before any program is started: they are unblocked there.
    let children = SignalFd::block(&[Signal::CHILD]).context("cannot block signals")?;
    let mut port = Port::open()?;
    // From here on the task can be told.
    if let Err(error) = get_ready() {
        port.send(&Message::Failed(format!("{error:#}")))?;
        return Err(error);
    }
    port.send(&Message::Ready)?;
    serve::serve(&mut port, &children)
}

/// Lets systemd be the first process, and leaves another one of this program to
/// run others for the task outside.
fn become_systemd() -> Result<()> {
    // Its file is out of sight, and can be run all the same.
    Command::new("/proc/self/exe")
        .arg(BESIDE_SYSTEMD)
        .spawn()
        .context("cannot run this program once more")?;
    // Nobody logs in, and there is no network.
    let error = Command::new("/lib/systemd/systemd")
        .arg("--unit=basic.target")
        .exec();
    Err(error).context("cannot run systemd")
}

/// Runs programs for the task outside, as one process of others.
fn serve() -> Result<()> {
    let children = SignalFd::block(&[Signal::CHILD]).context("cannot block signals")?;
    let mut port = Port::open()?;
    port.send(&Message::Ready)?;
    serve::serve(&mut port, &children)
}

/// The kernel begins with a limit of 4096; programs are used to what systemd
/// gives them.
fn allow_many_descriptors() -> rustix::io::Result<()> {
    let limit = Rlimit {
        current: Some(1024),
        maximum: Some(524_288),
    };
    setrlimit(Resource::Nofile, limit)
}

fn get_ready() -> Result<()> {
    let nvdimms: u32 = std::fs::read_to_string(xtask_init::NVDIMMS)
        .ok()
        .and_then(|text| text.parse().ok())
        .context("the initramfs does not say how many NVDIMMs there are")?;
    let modules_outside = std::fs::read_to_string(xtask_init::MODULES_OUTSIDE)
        .context("the initramfs does not say where the modules are")?;
    if nvdimms > 0 {
        // They come from the initramfs, which is out of sight below.
        modules::load(Path::new(xtask_init::NVDIMM_MODULES))?;
    }
    filesystems::change_root().context("cannot mount the root of the machine outside")?;
    modules::show(Path::new(&modules_outside)).context("cannot show the kernel's modules")?;
    for number in 0..nvdimms {
        nvdimm::prepare(number)
            .with_context(|| format!("cannot make /dev/pmem{number} of an NVDIMM"))?;
    }
    Ok(())
}
