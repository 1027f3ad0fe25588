//! Clients of this machine's own NFS server.
//!
//! The server is told by files of the kernel what to serve, as its daemons
//! would tell it: nothing has to be installed, none is started, and nobody but
//! this machine can reach it. The grace period in which it changes nothing is
//! waited for once a server.

use super::{Came, Scene, alone, turn};
use crate::world::{World, patience};
use mapdirect::{Pin, PinOptions};
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::disk::{run, unmount};
use mapdirect_testkit::process::{ScratchDirectory, wait_for};
use mapdirect_testkit::writers::{Answer, When, Writer};
use mapdirect_testkit::{Kind, raw};
use std::fs::{self, File};
use std::io;
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const SERVER: &str = "/proc/fs/nfsd";
const CACHES: &str = "/proc/net/rpc";
/// Where a write does harm: in a hole.
const HOLE: u64 = super::WRITTEN + 65_536;

/// The server, with version 4 alone, which asks no other service of a
/// machine; ended when it is dropped.
struct Server {
    port: u16,
    _listener: TcpListener,
}

impl Server {
    fn start() -> anyhow::Result<Self> {
        run(Command::new("modprobe").args(["-a", "nfsd", "nfsv4"]))?;
        if !Path::new(SERVER).join("threads").exists() {
            run(Command::new("mount").args(["-t", "nfsd", "nfsd", SERVER]))?;
        }
        run(Command::new("ip").args(["link", "set", "lo", "up"]))?;
        let threads = fs::read_to_string(format!("{SERVER}/threads"))?;
        anyhow::ensure!(threads.trim() == "0", "somebody's server runs already");
        let tell =
            |file: &str, words: &str| fs::write(format!("{SERVER}/{file}"), format!("{words}\n"));
        tell("versions", "-3 +4")?;
        for times in ["nfsv4leasetime", "nfsv4gracetime"] {
            // In seconds; less it does not take.
            tell(times, "10")?;
        }
        let listener = TcpListener::bind("127.0.0.1:0")?;
        tell("portlist", &listener.as_raw_fd().to_string())?;
        tell("threads", "2")?;
        Ok(Self {
            port: listener.local_addr()?.port(),
            _listener: listener,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = fs::write(format!("{SERVER}/threads"), "0\n");
        let _ = fs::write(format!("{SERVER}/versions"), "+3 +4\n");
    }
}

/// A directory that clients may mount; nothing is served any more when it is
/// dropped.
struct Export;

impl Export {
    fn new(directory: &Path, for_writing: bool) -> io::Result<Self> {
        // linux/nfsd/export.h: any port, no checks of subtrees, the root of
        // what is served, and whether it may only be read.
        let flags = 0x2 | 0x400 | 0x2000 | u32::from(!for_writing);
        let directory = directory.to_string_lossy();
        let tell = |cache: &str, line: String| {
            fs::write(format!("{CACHES}/{cache}/channel"), format!("{line}\n"))
        };
        // For longer than any test takes.
        let until = 4_000_000_000u64;
        tell("auth.unix.ip", format!("nfsd 127.0.0.1 {until} all"))?;
        tell(
            "nfsd.export",
            format!("all {directory} {until} {flags} 65534 65534 0"),
        )?;
        tell("nfsd.fh", format!("all 1 \\x00000000 {until} {directory}"))?;
        Ok(Self)
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        for cache in ["nfsd.fh", "nfsd.export", "auth.unix.ip"] {
            let _ = fs::write(format!("{CACHES}/{cache}/flush"), "4000000000");
        }
        // The guard looks at what is exported once a second.
        std::thread::sleep(Duration::from_millis(1100));
    }
}

/// A client.
struct Client(ScratchDirectory);

impl Client {
    fn new(server: &Server) -> Self {
        let place = ScratchDirectory::new("nfs").unwrap();
        // The kernel reads these itself: no helper of mount(8) is needed.
        let options = format!(
            "vers=4.2,addr=127.0.0.1,clientaddr=127.0.0.1,sec=sys,port={}",
            server.port
        );
        run(Command::new("mount")
            .args(["-i", "-t", "nfs4", "-o", &options, "127.0.0.1:/"])
            .arg(place.path()))
        .unwrap();
        Self(place)
    }

    fn path(&self, scene: &Scene<'_>) -> PathBuf {
        self.0.path().join(scene.path.file_name().unwrap())
    }

    fn open(&self, scene: &Scene<'_>) -> io::Result<File> {
        File::options()
            .read(true)
            .write(true)
            .open(self.path(scene))
    }

    fn write(&self, scene: &Scene<'_>) -> io::Result<()> {
        write(&self.open(scene)?)
    }

    /// A whole block at first, so that one that stays can be compared.
    fn truncate(&self, scene: &Scene<'_>) -> Result<(), mapdirect_sys::Errno> {
        raw::truncate(&raw::c_path(&self.path(scene)), 8192)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let unmounted = unmount(self.0.path());
        if unmounted.is_err() {
            let _ = run(Command::new("umount").arg("-l").arg(self.0.path()));
        }
    }
}

/// What a client writes is on its way when it says so.
fn write(file: &File) -> io::Result<()> {
    file.write_all_at(&[1; 4096], HOLE)?;
    file.sync_all()
}

/// The file's own directory is what is exported.
fn directory<'a>(scene: &'a Scene<'_>) -> &'a Path {
    scene.path.parent().unwrap()
}

fn server(world: &World) -> Option<Server> {
    match Server::start() {
        Ok(server) => Some(server),
        Err(error) => {
            world.unavailable(format!("an NFS server: {error:#}"));
            None
        }
    }
}

pub(super) fn clients(world: &World, kind: Kind) {
    let _turn = turn();
    let Some(server) = server(world) else {
        return;
    };
    let (disk, guard) = alone(kind);
    let scene = |name: &str| Scene::with(world, guard.client(), &disk, name, true);
    // Without a guard's word both of them do what is refused below.
    let free = scene("nfs-free");
    let export = Export::new(directory(&free), true).unwrap();
    let client = Client::new(&server);
    client.write(&free).unwrap();
    client.truncate(&free).unwrap();
    assert_eq!(free.file.metadata().unwrap().len(), 8192);
    drop((client, export, free));

    let after = scene("nfs-after");
    after.after("nfs", "write", || {
        let _export = Export::new(directory(&after), true).unwrap();
        Came::of(Client::new(&server).write(&after))
    });
    truncated_after(world, &server, &scene("nfs-truncate-after"));

    let before = scene("nfs-before");
    let export = Export::new(directory(&before), true).unwrap();
    let client = Client::new(&server);
    std::thread::sleep(Duration::from_millis(1100));
    before.before("nfs", "write", || Came::of(client.write(&before)));
    before.before("nfs-truncate", "truncate", || {
        Came::of(client.truncate(&before))
    });
    if Gate::under_test() == Gate::Fanotify {
        let refused = before.pin(patience()).err().unwrap();
        assert_eq!(refused.kind(), mapdirect::Kind::Filesystem, "{refused:#}");
        assert!(refused.to_string().contains("exported"), "{refused:#}");
    }
    let open = client.open(&before).unwrap();
    before.before("nfs-open", "write", || Came::of(write(&open)));
    drop(open);
    drop((client, export, before));

    let read = scene("nfs-read-only");
    let export = Export::new(directory(&read), false).unwrap();
    let client = Client::new(&server);
    read.before("nfs-read-only", "write and truncate", || {
        let written = client.write(&read);
        assert!(client.truncate(&read).is_err());
        Came::of(written)
    });
    drop((client, export, read));
    if !Path::new("/sys/module/nfs_localio").exists() {
        let loaded = run(Command::new("modprobe").arg("nfs_localio"));
        world.unavailable(match loaded {
            Ok(()) => String::from("NFS LOCALIO: the server was started without it"),
            Err(error) => format!("NFS LOCALIO: {error:#}"),
        });
    }
}

/// The server sets the size without asking whoever listens: under one gate the
/// holder is told, and that by everything that tells it.
fn truncated_after(world: &World, server: &Server, scene: &Scene<'_>) {
    let expected = Writer::find("nfs-truncate", When::After)
        .unwrap()
        .answer(Gate::under_test());
    let pin = PinOptions::new()
        .range(0..scene.range)
        .patience(patience())
        .guard(scene.guard.clone())
        .pin(&scene.file)
        .unwrap();
    let length = scene.file.metadata().unwrap().len();
    let _export = Export::new(directory(scene), true).unwrap();
    let truncated = Client::new(server).truncate(scene);
    println!("writers: nfs-truncate, after: {truncated:?}");
    let now = mapdirect::block_map(&scene.file, 0..scene.range).unwrap();
    let same = now.extents() == pin.block_map().extents();
    match expected {
        Answer::Refused => {
            truncated.unwrap_err();
            assert!(same && scene.file.metadata().unwrap().len() == length);
            assert!(pin.integrity().is_intact());
        }
        _ => {
            assert!(truncated.is_ok() && !same, "it is refused by now: say so");
            told(scene, &pin);
        }
    }
    world.count("writers that meet no hook", 1);
}

/// Waits until the holder has been told, and status shows it.
fn told(scene: &Scene<'_>, pin: &Pin) {
    wait_for(patience(), || {
        Ok((!pin.integrity().is_intact()).then_some(()))
    })
    .unwrap_or_else(|_| panic!("the holder was not told"));
    let status = scene.guard.status().unwrap();
    let mut breaches = status.breaches.iter();
    let breach = breaches.find(|breach| breach.pin == pin.pin_id()).unwrap();
    assert_eq!(breach.range.start, 8192, "{breach:?}");
}
