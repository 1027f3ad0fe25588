//! The virtio-serial port to the task outside.

use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};
use xtask_init::wire::{Decoder, Message};

/// For a device to appear once its driver is there.
const APPEARS: Duration = Duration::from_secs(30);

/// The port.
pub(crate) struct Port {
    file: File,
    decoder: Decoder,
}

impl Port {
    /// Opens it, once the kernel has it.
    pub(crate) fn open() -> Result<Self> {
        let name = wait_for("the port to the task outside", find)?;
        let file = File::options()
            .read(true)
            .write(true)
            .open(Path::new("/dev").join(name))
            .context("cannot open the port to the task outside")?;
        Ok(Self {
            file,
            decoder: Decoder::default(),
        })
    }

    /// Sends a message; waits while the task outside has no room for it.
    pub(crate) fn send(&mut self, message: &Message) -> Result<()> {
        self.file
            .write_all(&message.encode())
            .context("the task outside does not listen any more")
    }

    /// The next message that has arrived as a whole.
    pub(crate) fn received(&mut self) -> Result<Option<Message>> {
        Ok(self.decoder.take()?)
    }

    /// Takes what has arrived; call it when there is something to read.
    pub(crate) fn read(&mut self) -> Result<()> {
        let mut piece = [0; 4096];
        let length = self.file.read(&mut piece)?;
        ensure!(length > 0, "the task outside is gone");
        self.decoder.push(&piece[..length]);
        Ok(())
    }
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Name of the port's device.
fn find() -> Option<String> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
    ports.flatten().find_map(|port| {
        let name = fs::read_to_string(port.path().join("name")).ok()?;
        (name.trim_end() == xtask_init::PORT)
            .then(|| port.file_name().to_string_lossy().into_owned())
    })
}

/// Asks until there is an answer.
pub(crate) fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + APPEARS;
    loop {
        if let Some(answer) = ask() {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            bail!("{what} did not appear within {APPEARS:?}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
