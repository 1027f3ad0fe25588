//! Strangers without any privilege who try to keep a guard busy, or others
//! waiting. Each is played by a process of its own, as user 65534.

use crate::fuse::{self, Unanswered};
use crate::process::say;
use crate::raw;
use anyhow::{Context, Result, bail};
use mapdirect_proto::{MAX_MESSAGE, Request, VERSION};
use mapdirect_sys::Errno;
use mapdirect_sys::unix::Socket;
use rustix::event::epoll;
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// What a stranger does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attack {
    /// Processes read the file and hang in the middle of `execve(2)`, until
    /// FUSE answers the flush of a descriptor.
    Exec,
    /// Writes by descriptors that turn into an epoll instance whose lock is
    /// held, until FUSE answers a read.
    Epoll,
    /// Lists `/proc/<pid>` and reads the file into memory that FUSE never
    /// fills, while somebody waits to mount on `/proc/<pid>`.
    Faults,
    /// Processes that read the file are stopped again and again.
    Stopped,
    /// Four thousand threads read the file.
    Crowd,
    /// A process with twenty thousand descriptors reads the file.
    Descriptors,
    /// Hands the guard descriptors that FUSE never lets it close.
    Handed,
}

impl Attack {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Exec,
        Self::Epoll,
        Self::Faults,
        Self::Stopped,
        Self::Crowd,
        Self::Descriptors,
        Self::Handed,
    ];

    /// In words.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::Epoll => "epoll",
            Self::Faults => "faults",
            Self::Stopped => "stopped",
            Self::Crowd => "crowd",
            Self::Descriptors => "descriptors",
            Self::Handed => "handed",
        }
    }

    const fn unanswered(self) -> Option<Unanswered> {
        match self {
            Self::Exec | Self::Handed => Some(Unanswered::Flush),
            Self::Epoll | Self::Faults => Some(Unanswered::Read),
            Self::Stopped | Self::Crowd | Self::Descriptors => None,
        }
    }
}

/// Plays a stranger until it is killed; says `ready` when it is at it.
/// Arguments: the attack, a node of `/dev/fuse`, a directory to mount on, the
/// file, the guard's socket.
pub fn play(arguments: &[String]) -> Result<()> {
    let [name, node, directory, file, socket] = arguments else {
        bail!("wrong arguments");
    };
    let attack = Attack::ALL.into_iter().find(|attack| attack.name() == name);
    let attack = attack.context("no such attack")?;
    let limit = rustix::process::Resource::Nofile;
    let mut limits = rustix::process::getrlimit(limit);
    limits.current = limits.maximum;
    rustix::process::setrlimit(limit, limits)?;
    raw::become_nobody()?;
    let file = Path::new(file);
    let strange = match attack.unanswered() {
        Some(unanswered) => Some(mount(Path::new(node), Path::new(directory), unanswered)?),
        None => None,
    };
    let strange = || strange.as_deref().context("no FUSE");
    match attack {
        Attack::Exec => exec(file, strange()?),
        Attack::Epoll => hold_epoll(file, strange()?),
        Attack::Faults => faults(file, strange()?),
        Attack::Stopped => stopped(file),
        Attack::Crowd => crowd(file, 4000),
        Attack::Descriptors => descriptors(file),
        Attack::Handed => handed(Path::new(socket), strange()?),
    }
}

/// Mounts a strange file in namespaces of one's own, and serves it in a child.
fn mount(node: &Path, directory: &Path, unanswered: Unanswered) -> Result<Box<Path>> {
    raw::own_mapped_mount_namespace()?;
    let server = fuse::mount(node, directory)?;
    raw::fork(|| {
        raw::die_with_parent();
        fuse::serve(&server, unanswered, || {});
        0
    })?;
    drop(server);
    Ok(directory.join(fuse::FILE).into())
}

fn child(run: impl FnOnce() -> Result<()>) -> Result<Pid> {
    let pid = raw::fork(|| {
        raw::die_with_parent();
        i32::from(run().is_err())
    })?;
    Pid::from_raw(pid).context("no child")
}

fn read_forever(file: &File) -> ! {
    loop {
        if file.read_at(&mut [0], 0).is_err() {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

fn exec(file: &Path, strange: &Path) -> Result<()> {
    for _ in 0..2 {
        child(|| read_forever(&File::open(file)?))?;
    }
    say("ready");
    for attempt in 0..200u64 {
        child(|| {
            let file = File::open(file)?;
            let _strange = File::open(strange)?;
            std::thread::spawn(move || {
                let pause = 200 + attempt * 7919 % 4000;
                std::thread::sleep(Duration::from_micros(pause));
                // It hangs before anything of it is run.
                Command::new("/bin/true").exec()
            });
            read_forever(&file)
        })?;
        std::thread::sleep(Duration::from_millis(15));
    }
    wait()
}

fn wait() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(60));
    }
}

/// A page that nobody ever fills.
fn strange_page(strange: &File) -> Result<&'static mut [u8]> {
    Ok(raw::map_private(strange, 4096)?)
}

fn hold_epoll(path: &Path, strange: &Path) -> Result<()> {
    // While it is open the file stays behind the gate.
    let _reader = File::open(path)?;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let ready = rustix::event::eventfd(1, rustix::event::EventfdFlags::CLOEXEC)?;
    let data = epoll::EventData::new_u64(0);
    epoll::add(&epoll, &ready, data, epoll::EventFlags::IN)?;
    let page = strange_page(&File::open(strange)?)?;
    let waits = epoll.as_raw_fd();
    std::thread::spawn(move || raw::epoll_wait_into(waits, page));
    std::thread::sleep(Duration::from_millis(100));
    say("ready");
    let file = loop {
        match File::options().read(true).write(true).open(path) {
            Ok(file) => break file,
            Err(_) => std::thread::sleep(Duration::from_micros(500)),
        }
    };
    let spare = file.try_clone()?;
    let number = file.as_raw_fd();
    std::thread::spawn(move || {
        loop {
            raw::dup2(epoll.as_raw_fd(), number);
            std::thread::yield_now();
            raw::dup2(spare.as_raw_fd(), number);
            std::thread::yield_now();
        }
    });
    loop {
        // It fails while the number is something else.
        let _ = file.write_at(b"w", 0);
    }
}

fn faults(path: &Path, strange: &Path) -> Result<()> {
    let file = File::open(path)?;
    // Once for all: an open drops what is cached, and waits for the page that
    // somebody wants to be filled.
    let strange = File::open(strange)?;
    let page = strange_page(&strange)?;
    let reader = file.try_clone()?;
    std::thread::spawn(move || reader.read_at(page, 0));
    let own = format!("/proc/{}", std::process::id());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let listed = rustix::fs::open(&own, flags, Mode::empty())?;
    let page = strange_page(&strange)?;
    std::thread::spawn(move || raw::getdents_into(listed.as_fd(), page));
    std::thread::sleep(Duration::from_millis(200));
    std::thread::spawn(move || {
        let flags = rustix::mount::MountFlags::BIND;
        rustix::mount::mount("/tmp", &*own, "", flags, None)
    });
    std::thread::sleep(Duration::from_millis(200));
    for _ in 0..8 {
        let file = file.try_clone()?;
        std::thread::spawn(move || read_forever(&file));
    }
    say("ready");
    wait()
}

fn stopped(path: &Path) -> Result<()> {
    let mut readers = Vec::new();
    for _ in 0..8 {
        readers.push(child(|| read_forever(&File::open(path)?))?);
    }
    say("ready");
    for round in 0u64.. {
        for reader in &readers {
            kill_process(*reader, Signal::STOP)?;
        }
        std::thread::sleep(Duration::from_micros(200 + round * 7919 % 3000));
        for reader in &readers {
            kill_process(*reader, Signal::CONT)?;
        }
        std::thread::sleep(Duration::from_micros(round * 7919 % 2000));
    }
    Ok(())
}

fn crowd(path: &Path, threads: usize) -> Result<()> {
    let file: &'static File = Box::leak(Box::new(File::open(path)?));
    for _ in 0..threads {
        std::thread::Builder::new()
            .stack_size(64 * 1024)
            .spawn(|| read_forever(file))?;
    }
    say("ready");
    wait()
}

fn descriptors(path: &Path) -> Result<()> {
    let mut files = Vec::new();
    while files.len() < 20_000 {
        match File::open("/dev/null") {
            Ok(file) => files.push(file),
            Err(error) if error.raw_os_error() == Some(Errno::MFILE.raw_os_error()) => break,
            Err(error) => return Err(error.into()),
        }
        if files.len() == 10_000 {
            files.push(File::open(path)?);
        }
    }
    // Room for what is opened from here on.
    files.truncate(files.len() - 10);
    crowd(path, 8)
}

fn handed(guard: &Path, strange: &Path) -> Result<()> {
    // In a child, since to end it takes the end of the server, which comes
    // when this process is gone.
    child(|| {
        let strange = File::open(strange)?;
        let mut connections = Vec::new();
        for request in [Request::Query, Request::Prove, Request::Status] {
            let connection = Socket::connect(guard)?;
            let hello = Request::Hello { version: VERSION };
            connection.send(&[&hello.encode()], &[])?;
            connection.receive(&mut [0; MAX_MESSAGE])?;
            connection.send(&[&request.encode()], &[strange.as_fd()])?;
            connections.push(connection);
        }
        // It has them, and closes them.
        std::thread::sleep(Duration::from_millis(300));
        say("ready");
        wait()
    })?;
    wait()
}
