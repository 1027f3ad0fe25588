//! Section 2 of the contract: errors of the mapping call, each from a process
//! of its own with the rights and the environment the case needs.

use crate::world::{World, wait_until_free, written};
use anyhow::{Context, Result, bail};
use libtest_mimic::Trial;
use mapdirect::raw::{MAP_DIRECT, mmap};
use mapdirect_sys::{Errno, mmap as sys};
use mapdirect_testkit::disk::run;
use mapdirect_testkit::process::{Helper, say};
use mapdirect_testkit::{Disk, Kind};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

const BOTH: i32 = sys::PROT_READ | sys::PROT_WRITE;
const VALIDATE: i32 = sys::MAP_SHARED_VALIDATE | MAP_DIRECT;

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(world.trials(
        "errors",
        &[Kind::XFS, Kind::EXT4],
        &[
            ("arguments", arguments),
            ("access", access),
            ("capability", capability),
            ("dax", dax),
            ("frozen", frozen),
            ("fixed", fixed),
        ],
    ));
    trials.push(world.trial("errors::filesystems", filesystems));
    trials.push(world.trial("errors::no-guard", no_guard));
    trials
}

/// Role: calls `mmap` once and says the errno. Arguments: how the file is
/// opened, its path, prot, flags, length, offset, address.
pub fn play_mmap(arguments: &[String]) -> Result<()> {
    let [how, path, prot, flags, length, offset, address] = arguments else {
        bail!("wrong arguments");
    };
    let file = match how.as_str() {
        "rw" => File::options().read(true).write(true).open(path)?,
        "r" => File::open(path)?,
        "w" => File::options().write(true).open(path)?,
        "path" => {
            let flags = rustix::fs::OFlags::PATH;
            rustix::fs::open(path.as_str(), flags, rustix::fs::Mode::empty())?.into()
        }
        "pipe" => {
            let (reader, writer) = std::io::pipe()?;
            std::mem::forget(writer);
            std::os::fd::OwnedFd::from(reader).into()
        }
        "socket" => {
            let (one, other) = std::os::unix::net::UnixStream::pair()?;
            std::mem::forget(other);
            std::os::fd::OwnedFd::from(one).into()
        }
        _ => bail!("how?"),
    };
    let address = match address.as_str() {
        "any" => 0,
        // Where this very function's caller has its stack mapping's
        // neighbour: a page that is certainly in use.
        "taken" => {
            // SAFETY: no MAP_FIXED.
            unsafe {
                sys::map(
                    0,
                    4096,
                    BOTH,
                    sys::MAP_PRIVATE,
                    File::open("/proc/self/exe")?.as_fd(),
                    0,
                )
            }?
        }
        _ => bail!("where?"),
    };
    // SAFETY: MAP_FIXED replaces at most the page mapped above, which nothing
    // uses.
    let result = unsafe {
        mmap(
            address,
            length.parse()?,
            prot.parse()?,
            flags.parse()?,
            file.as_fd(),
            offset.parse()?,
        )
    };
    match result {
        Ok(mapped) => say(&format!(
            "ok {}",
            if address == mapped {
                "there"
            } else {
                "somewhere"
            }
        )),
        Err(error) => say(&format!("errno {} {}", error.errno(), error.kind())),
    }
    Ok(())
}

/// Role: pins a file opened for reading and says the errno.
pub fn play_pin(arguments: &[String]) -> Result<()> {
    let path = arguments.first().context("no path")?;
    let file = File::open(path)?;
    match mapdirect::PinOptions::new().pin(&file) {
        Ok(_) => say("ok"),
        Err(error) => say(&format!("errno {} {}", error.errno(), error.kind())),
    }
    Ok(())
}

/// One call, with defaults that would succeed.
struct Call<'a> {
    how: &'a str,
    path: &'a Path,
    prot: i32,
    flags: i32,
    length: u64,
    offset: u64,
    address: &'a str,
    cached: bool,
    /// A command in front: setpriv, unshare, ...
    wrapper: &'a [&'a str],
}

impl<'a> Call<'a> {
    fn new(path: &'a Path) -> Self {
        Self {
            how: "rw",
            path,
            prot: BOTH,
            flags: VALIDATE,
            length: 4096,
            offset: 0,
            address: "any",
            cached: true,
            wrapper: &[],
        }
    }

    fn command(&self, role: &str, socket: &Path, arguments: &[String]) -> String {
        let exe = std::env::current_exe().unwrap();
        let mut command = match self.wrapper {
            [] => Command::new(&exe),
            [first, rest @ ..] => {
                let mut command = Command::new(first);
                command.args(rest).arg(&exe);
                command
            }
        };
        command
            .arg(mapdirect_testkit::process::HELPER)
            .arg(role)
            .args(arguments)
            .env("MAPDIRECT_SOCKET", socket)
            .env_remove("MAPDIRECT_CACHED");
        if self.cached {
            command.env("MAPDIRECT_CACHED", "1");
        }
        let mut helper = Helper::spawn(command).unwrap();
        let said = helper.hear().unwrap();
        helper.finish().unwrap();
        if said.starts_with("ok") {
            // Whoever looks at the process keeps what it mapped for a moment.
            wait_until_free(self.path);
        }
        said
    }

    fn make(&self, socket: &Path) -> String {
        let arguments = [
            self.how.to_owned(),
            self.path.to_string_lossy().into_owned(),
            self.prot.to_string(),
            self.flags.to_string(),
            self.length.to_string(),
            self.offset.to_string(),
            self.address.to_owned(),
        ];
        self.command("mmap", socket, &arguments)
    }

    fn pin(&self, socket: &Path) -> String {
        self.command("pin", socket, &[self.path.to_string_lossy().into_owned()])
    }
}

#[track_caller]
fn expect(said: &str, errno: Errno) {
    let expected = format!("errno {} ", errno.raw_os_error());
    assert!(
        said.starts_with(&expected),
        "expected {errno} ({expected}), got {said}"
    );
}

fn file_on(disk: &Disk, name: &str) -> std::path::PathBuf {
    let path = written(disk, name, 65536);
    // For the cases that are not root.
    std::process::Command::new("chmod")
        .arg("666")
        .arg(&path)
        .status()
        .unwrap();
    path
}

fn arguments(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = file_on(&world.disk(kind), "arguments");
    let call = |change: fn(&mut Call<'_>)| {
        let mut call = Call::new(&path);
        change(&mut call);
        call.make(guard.socket())
    };
    assert_eq!(call(|_| {}), "ok somewhere");
    assert_eq!(
        call(|c| c.flags = sys::MAP_SHARED | MAP_DIRECT),
        "ok somewhere"
    );
    for flags in [
        sys::MAP_PRIVATE | MAP_DIRECT,
        VALIDATE | sys::MAP_ANONYMOUS,
        VALIDATE | sys::MAP_HUGETLB,
        MAP_DIRECT,
    ] {
        let mut wrong = Call::new(&path);
        wrong.flags = flags;
        expect(&wrong.make(guard.socket()), Errno::INVAL);
    }
    expect(&call(|c| c.length = 0), Errno::INVAL);
    expect(&call(|c| c.offset = 512), Errno::INVAL);
    expect(&call(|c| c.flags |= 1 << 24), Errno::OPNOTSUPP);
    expect(&call(|c| c.length = u64::MAX), Errno::NOMEM);
    expect(&call(|c| c.length = 1 << 62), Errno::NOMEM);
    expect(
        &call(|c| c.offset = i64::MAX.cast_unsigned() & !4095),
        Errno::OVERFLOW,
    );
    expect(&call(|c| c.how = "path"), Errno::BADF);
    expect(&call(|c| c.how = "socket"), Errno::NODEV);
    std::fs::remove_file(&path).unwrap();
}

fn access(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = file_on(&world.disk(kind), "access");
    let call = |change: fn(&mut Call<'_>)| {
        let mut call = Call::new(&path);
        change(&mut call);
        call.make(guard.socket())
    };
    expect(&call(|c| c.prot = sys::PROT_READ), Errno::ACCESS);
    expect(&call(|c| c.how = "r"), Errno::ACCESS);
    expect(&call(|c| c.how = "w"), Errno::ACCESS);
    std::fs::remove_file(&path).unwrap();
}

fn capability(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = file_on(&world.disk(kind), "capability");
    let nobody = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    let without = [
        "setpriv",
        "--bounding-set=-linux_immutable",
        "--inh-caps=-linux_immutable",
    ];
    let own_namespace = ["unshare", "--user", "--map-root-user"];
    for wrapper in [&nobody[..], &without[..], &own_namespace[..]] {
        let call = Call {
            wrapper,
            ..Call::new(&path)
        };
        // Nobody must be able to run this program.
        let exe = std::env::current_exe().unwrap();
        let reachable = Command::new("setpriv")
            .args(&nobody[1..])
            .args(["test", "-x"])
            .arg(&exe)
            .status()
            .unwrap()
            .success();
        if wrapper[0] == "setpriv" && wrapper == nobody && !reachable {
            world.unavailable(String::from("running the tests' binary as nobody"));
            continue;
        }
        for said in [call.make(guard.socket()), call.pin(guard.socket())] {
            expect(&said, Errno::ACCESS);
            assert!(said.ends_with("not-capable"), "{said}");
        }
    }
    std::fs::remove_file(&path).unwrap();
}

fn dax(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = file_on(&world.disk(kind), "dax");
    let call = Call {
        cached: false,
        ..Call::new(&path)
    };
    let said = call.make(guard.socket());
    expect(&said, Errno::OPNOTSUPP);
    assert!(said.ends_with("no-dax"), "{said}");
    // MAP_SYNC promises what only DAX can keep.
    let call = Call {
        flags: VALIDATE | sys::MAP_SYNC,
        ..Call::new(&path)
    };
    expect(&call.make(guard.socket()), Errno::OPNOTSUPP);
    std::fs::remove_file(&path).unwrap();
}

fn frozen(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let guard = world.guard();
    let path = file_on(&disk, "frozen");
    // A hole behind the data, and beyond the end of file.
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(131_072)
        .unwrap();
    // All of that can be mapped; what raises SIGBUS there is tried elsewhere.
    for (offset, length) in [
        (65536, 4096),
        (61440, 8192),
        (131_072, 4096),
        (0, 1 << 20),
        (0, 65536),
    ] {
        let call = Call {
            offset,
            length,
            ..Call::new(&path)
        };
        assert_eq!(call.make(guard.socket()), "ok somewhere");
    }
    std::fs::remove_file(&path).unwrap();
}

fn fixed(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = file_on(&world.disk(kind), "fixed");
    let call = Call {
        flags: VALIDATE | sys::MAP_FIXED_NOREPLACE,
        address: "taken",
        ..Call::new(&path)
    };
    expect(&call.make(guard.socket()), Errno::EXIST);
    crate::world::wait_until_free(&path);
    let call = Call {
        flags: VALIDATE | sys::MAP_FIXED,
        address: "taken",
        ..Call::new(&path)
    };
    assert_eq!(call.make(guard.socket()), "ok there");
    std::fs::remove_file(&path).unwrap();
}

fn filesystems(world: &World) {
    let guard = world.guard();
    let memory = Path::new("/dev/shm/mapdirect-errors");
    std::fs::write(memory, vec![1; 8192]).unwrap();
    let said = Call::new(memory).make(guard.socket());
    std::fs::remove_file(memory).unwrap();
    expect(&said, Errno::OPNOTSUPP);
    assert!(said.ends_with("filesystem"), "{said}");
    expect(
        &Call::new(Path::new("/dev/zero")).make(guard.socket()),
        Errno::OPNOTSUPP,
    );
    let directory = Call::new(Path::new("/"));
    expect(&directory.pin(guard.socket()), Errno::NODEV);
    // ext4 without extents, with inline data, with journalled data.
    let small = &["-O", "inline_data", "-I", "1024"];
    for (name, disk, length, attribute, reason) in [
        (
            "indirect",
            Disk::new(Kind::EXT4, 64),
            8192,
            "-e",
            "not-extent-mapped",
        ),
        (
            "inline",
            Disk::with_options(Kind::EXT4, 64, small, ""),
            100,
            "+d",
            "inline-data",
        ),
        (
            "journalled",
            Disk::with_options(Kind::EXT4, 64, &[], "data=journal"),
            8192,
            "+d",
            "journalled-data",
        ),
    ] {
        let disk = disk.unwrap();
        let path = written(&disk, name, length);
        let status = Command::new("chattr")
            .arg(attribute)
            .arg(&path)
            .status()
            .unwrap();
        assert!(status.success());
        let said = Call::new(&path).make(guard.socket());
        expect(&said, Errno::OPNOTSUPP);
        assert!(said.ends_with(reason), "{name}: {said}");
    }
    // And btrfs, which always writes elsewhere.
    let image = mapdirect_testkit::process::ScratchDirectory::new("btrfs").unwrap();
    let (file, root) = (image.path().join("image"), image.path().join("mnt"));
    File::create(&file).unwrap().set_len(256 << 20).unwrap();
    std::fs::create_dir(&root).unwrap();
    run(Command::new("mkfs.btrfs").arg("-q").arg(&file)).unwrap();
    run(Command::new("mount")
        .args(["-o", "loop"])
        .arg(&file)
        .arg(&root))
    .unwrap();
    let path = root.join("file");
    std::fs::write(&path, vec![1; 8192]).unwrap();
    let said = Call::new(&path).make(guard.socket());
    run(Command::new("umount").arg(&root)).unwrap();
    expect(&said, Errno::OPNOTSUPP);
    assert!(said.ends_with("filesystem"), "{said}");
}

fn no_guard(world: &World) {
    let path = file_on(&world.disk(Kind::XFS), "no-guard");
    let nowhere = Path::new("/nonexistent/guard.sock");
    let said = Call::new(&path).make(nowhere);
    expect(&said, Errno::OPNOTSUPP);
    assert!(said.ends_with("no-guard"), "{said}");
    expect(&Call::new(&path).pin(nowhere), Errno::OPNOTSUPP);
    std::fs::remove_file(&path).unwrap();
}
