//! Clients that talk nonsense, leave in the middle, do not listen, or come in
//! crowds. The guard must survive all of them, and nobody else may notice.

use crate::world::{BINARY, World, is_pinned, map, open, wait_until_free, written};
use libtest_mimic::Trial;
use mapdirect::PinOptions;
use mapdirect_proto::{
    Flags, MAX_MESSAGE, PinRequest, Reason, Reply, Request, VERSION, WatchedPin,
};
use mapdirect_sys::fcntl::HeldLease;
use mapdirect_sys::unix::Socket;
use mapdirect_sys::{Errno, memfd};
use mapdirect_testkit::Kind;
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::process::{GuardProcess, Helper, say, wait_for};
use mapdirect_testkit::random::Random;
use rustix::event::{PollFd, PollFlags};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, run) in [
        ("garbage", garbage as fn(&World)),
        ("wrong-order", wrong_order),
        ("wrong-descriptors", wrong_descriptors),
        ("ranges", ranges),
        ("unproven", unproven),
        ("relayed-proof", relayed_proof),
        ("own-user-namespace", own_user_namespace),
        ("announcements-expire", announcements_expire),
        ("announcements-end-with-their-session", announcements_end),
        (
            "announcements-name-one-thread",
            announcements_name_one_thread,
        ),
        ("someone-elses-connection", someone_elses_connection),
        ("leaves-in-the-middle", leaves_in_the_middle),
        ("never-swaps", never_swaps),
        ("never-reads", never_reads),
        ("thousand-clients", thousand_clients),
        ("out-of-descriptors", out_of_descriptors),
        ("leases", leases),
        ("second-guard", second_guard),
        ("socket-in-the-way", socket_in_the_way),
        ("guards-at-once", guards_at_once),
        ("unprivileged-status", unprivileged_status),
    ] {
        trials.push(world.trial(format!("abuse::{name}"), run));
    }
    trials
}

/// Whoever has a lease on a file that stays behind the gate for a moment
/// keeps nobody waiting but himself.
fn leases(world: &World) {
    let (disk, guard) = (world.disk(Kind::EXT4), world.guard());
    let path = written(&disk, "abuse-lease", 65536);
    let mut leased = 0;
    for _ in 0..20 {
        let file = open(&path);
        let held = map(&guard.client(), &file, 0..65536);
        // What is opened now is watched for as long as the file is.
        let reader = File::open(&path).unwrap();
        drop((held, file));
        let Some(lease) = HeldLease::take(reader.as_fd()).unwrap() else {
            // A child that another thread is just making has them, too.
            wait_until_free(&path);
            continue;
        };
        leased += 1;
        let started = Instant::now();
        let read = reader.read_at(&mut [0; 16], 0);
        // A moment later nobody would have asked.
        let refused = read.as_ref().err().and_then(std::io::Error::raw_os_error);
        assert!(refused.is_none_or(|errno| errno == libc::EPERM), "{read:?}");
        is_well(world, &guard);
        assert!(
            started.elapsed() < Duration::from_secs(5),
            "everybody waited"
        );
        drop(lease);
    }
    assert!(leased > 0);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// The guard still does its work.
fn is_well(world: &World, guard: &GuardProcess) {
    let disk = world.disk(Kind::XFS);
    // Tests of other threads ask the same guard.
    let thread = rustix::thread::gettid().as_raw_nonzero();
    let path = written(&disk, &format!("abuse-well-{thread}"), 65536);
    let file = open(&path);
    let held = map(&guard.client(), &file, 0..65536);
    assert!(is_pinned(&path));
    drop((held, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

fn connect(guard: &GuardProcess) -> Socket {
    connect_to(guard.socket())
}

fn connect_to(path: &Path) -> Socket {
    let socket = Socket::connect(path).unwrap();
    socket
        .set_receive_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    socket
}

fn hear(socket: &Socket) -> Option<(Reply, Vec<OwnedFd>)> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let received = socket.receive(&mut buffer).ok()?;
    if received.length == 0 {
        return None;
    }
    Some((
        Reply::decode(&buffer[..received.length]).unwrap(),
        received.fds,
    ))
}

fn ask(socket: &Socket, request: &Request, fds: &[BorrowedFd<'_>]) -> Option<Reply> {
    socket.send(&[&request.encode()], fds).ok()?;
    hear(socket).map(|(reply, _)| reply)
}

/// Begins a conversation, and returns the challenge.
fn greet(socket: &Socket) -> [u8; 32] {
    let hello = Request::Hello { version: VERSION };
    let Some(Reply::Welcome { challenge, .. }) = ask(socket, &hello, &[]) else {
        panic!("no welcome");
    };
    challenge
}

/// A connection that may pin.
fn proven(guard: &GuardProcess) -> Socket {
    proven_to(guard.socket())
}

fn proven_to(path: &Path) -> Socket {
    let socket = connect_to(path);
    let challenge = greet(&socket);
    let proof = memfd::prove_immutable_capability(&challenge).unwrap();
    assert_eq!(
        ask(&socket, &Request::Prove, &[proof.as_fd()]),
        Some(Reply::Done)
    );
    socket
}

fn pin_request(offset: u64, length: u64) -> Request {
    Request::Pin(PinRequest {
        offset,
        length,
        flags: Flags::NONE,
        patience_ms: 0,
    })
}

fn garbage(world: &World) {
    let guard = world.guard();
    let mut random = Random::new(1);
    let file = File::open("/dev/null").unwrap();
    for round in 0..2000u32 {
        let socket = connect(&guard);
        if round % 2 == 0 {
            let hello = Request::Hello { version: VERSION };
            assert!(ask(&socket, &hello, &[]).is_some());
        }
        let mut bytes = match random.below(4) {
            0 => Vec::new(),
            1 => pin_request(random.number(), random.number()).encode(),
            2 => Request::Prove.encode(),
            _ => vec![0; 16],
        };
        let longer = usize::try_from(random.below(300)).unwrap();
        bytes.resize(bytes.len() + longer, 0);
        for _ in 0..random.below(8) {
            if let Some(last) = bytes.len().checked_sub(1) {
                let at = usize::try_from(random.below(last as u64 + 1)).unwrap();
                bytes[at] = random.byte();
            }
        }
        let fds = vec![file.as_fd(); usize::try_from(random.below(4)).unwrap()];
        // An empty message looks like the end of a conversation.
        let _ = socket.send(&[&bytes], &fds);
        if random.below(2) == 0 {
            let _ = hear(&socket);
        }
    }
    // Far too long, with and without descriptors.
    let socket = connect(&guard);
    let _ = socket.send(&[&vec![7; 150_000]], &[file.as_fd(); 4]);
    assert!(matches!(hear(&socket), Some((Reply::Refused(_), _))));
    is_well(world, &guard);
    world.count("messages of garbage", 2001);
}

fn wrong_order(world: &World) {
    let guard = world.guard();
    let file = File::open("/dev/null").unwrap();
    let nothing = WatchedPin {
        pin: 1,
        device: 2,
        inode: 3,
    };
    for (request, fds) in [
        (Request::Watch(vec![nothing]), vec![]),
        (pin_request(0, 1), vec![file.as_fd()]),
        (Request::Prove, vec![file.as_fd()]),
        (Request::Swapped, vec![]),
        (Request::Status, vec![]),
        (Request::Announce { tid: 1 }, vec![file.as_fd()]),
        (Request::Ended(nothing), vec![file.as_fd()]),
        (Request::Watch(vec![nothing]), vec![file.as_fd()]),
    ] {
        let socket = connect(&guard);
        let reply = ask(&socket, &request, &fds);
        assert!(
            matches!(reply, Some(Reply::Refused(_))),
            "{request:?}: {reply:?}"
        );
        assert!(hear(&socket).is_none(), "the conversation is over");
    }
    let socket = connect(&guard);
    assert!(ask(&socket, &Request::Hello { version: 99 }, &[]).is_some());
    let reply = ask(&socket, &Request::Swapped, &[]);
    assert!(matches!(reply, Some(Reply::Refused(_))));
    // A connection for notices is for nothing else.
    let socket = connect(&guard);
    assert!(ask(&socket, &Request::Hello { version: VERSION }, &[]).is_some());
    let lost = ask(&socket, &Request::Watch(vec![nothing]), &[]);
    assert!(
        matches!(
            lost,
            Some(Reply::Notice(mapdirect_proto::Notice::Lost { pin: 1, .. }))
        ),
        "{lost:?}"
    );
    assert!(matches!(hear(&socket), Some((Reply::Watching, _))));
    let reply = ask(&socket, &Request::Status, &[]);
    assert!(matches!(reply, Some(Reply::Refused(_))), "{reply:?}");
    assert!(hear(&socket).is_none(), "the conversation is over");
    is_well(world, &guard);
}

fn wrong_descriptors(world: &World) {
    let guard = world.guard();
    let (pipe, _writer) = std::io::pipe().unwrap();
    let (socket, _other) = Socket::pair().unwrap();
    let kinds: Vec<(&str, OwnedFd, Errno)> = vec![
        ("directory", File::open("/").unwrap().into(), Errno::NODEV),
        ("pipe", pipe.into(), Errno::NODEV),
        (
            "socket",
            socket.as_fd().try_clone_to_owned().unwrap(),
            Errno::NODEV,
        ),
        (
            "null",
            File::open("/dev/null").unwrap().into(),
            Errno::OPNOTSUPP,
        ),
        (
            "proc",
            File::open("/proc/self/maps").unwrap().into(),
            Errno::OPNOTSUPP,
        ),
        (
            "memory",
            memfd::sealed("x", b"y").unwrap(),
            Errno::OPNOTSUPP,
        ),
        (
            "eventfd",
            rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap(),
            Errno::NODEV,
        ),
        (
            "path",
            rustix::fs::open("/", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap(),
            Errno::BADF,
        ),
    ];
    let connection = proven(&guard);
    for (name, fd, errno) in &kinds {
        let reply = ask(&connection, &pin_request(0, 4096), &[fd.as_fd()]);
        let Some(Reply::Refused(refusal)) = reply else {
            panic!("{name}: {reply:?}");
        };
        assert_eq!(refusal.errno, errno.raw_os_error(), "{name}: {refusal:?}");
        assert!(ask(&connection, &Request::Query, &[fd.as_fd()]).is_some());
        let proof = ask(&connection, &Request::Prove, &[fd.as_fd()]);
        assert!(matches!(proof, Some(Reply::Refused(_))), "{name}");
    }
    // None, and too many.
    for fds in [vec![], vec![kinds[0].1.as_fd(); 2]] {
        let connection = proven(&guard);
        let reply = ask(&connection, &pin_request(0, 4096), &fds);
        assert!(matches!(reply, Some(Reply::Refused(_))), "{reply:?}");
    }
    is_well(world, &guard);
}

fn ranges(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "abuse-ranges", 65536);
    let file = File::open(&path).unwrap();
    let connection = proven(&guard);
    for (offset, length, errno) in [
        (u64::MAX, 1, Errno::OVERFLOW),
        (1, u64::MAX, Errno::OVERFLOW),
        (0, u64::MAX, Errno::OVERFLOW),
        (0, i64::MAX.cast_unsigned(), Errno::OVERFLOW),
        (65536, 0, Errno::INVAL),
        (u64::MAX, 0, Errno::INVAL),
    ] {
        let reply = ask(&connection, &pin_request(offset, length), &[file.as_fd()]);
        let Some(Reply::Refused(refusal)) = reply else {
            panic!("{offset}, {length}: {reply:?}");
        };
        assert_eq!(refusal.errno, errno.raw_os_error(), "{offset}, {length}");
    }
    drop(file);
    assert!(!is_pinned(&path));
    is_well(world, &guard);
    std::fs::remove_file(&path).unwrap();
}

/// Without the proof there is no pin, whatever else is said.
fn unproven(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "abuse-unproven", 65536);
    let file = File::open(&path).unwrap();
    let socket = connect(&guard);
    ask(&socket, &Request::Hello { version: VERSION }, &[]).unwrap();
    // A memory file that holds nothing, one that is not immutable, and one
    // made for another connection.
    let other = proven(&guard);
    let stale = memfd::prove_immutable_capability(&[0; 32]).unwrap();
    for proof in [
        memfd::sealed("x", b"").unwrap(),
        memfd::sealed("x", &[0; 32]).unwrap(),
        stale,
    ] {
        let reply = ask(&socket, &Request::Prove, &[proof.as_fd()]);
        assert!(matches!(reply, Some(Reply::Refused(_))), "{reply:?}");
    }
    let reply = ask(&socket, &pin_request(0, 4096), &[file.as_fd()]);
    let Some(Reply::Refused(refusal)) = reply else {
        panic!("{reply:?}");
    };
    assert_eq!(refusal.errno, Errno::ACCESS.raw_os_error());
    assert_eq!(refusal.reason, Reason::NotCapable);
    drop((other, file));
    std::fs::remove_file(&path).unwrap();
}

/// A proof for this connection's challenge, but made by another process: what
/// a fake guard gets out of a privileged program.
fn relayed_proof(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "abuse-relayed", 65536);
    let file = File::open(&path).unwrap();
    let socket = connect(&guard);
    let challenge = greet(&socket);
    let (ours, theirs) = Socket::pair().unwrap();
    let child = mapdirect_testkit::raw::fork(|| {
        let sent = memfd::prove_immutable_capability(&challenge)
            .and_then(|proof| theirs.send(&[b"proof"], &[proof.as_fd()]));
        i32::from(sent.is_err())
    })
    .unwrap();
    assert_eq!(mapdirect_testkit::raw::wait(child), Ok(0));
    let proof = ours.receive(&mut [0; 16]).unwrap().fds.remove(0);
    let requests = [
        (Request::Prove, proof.as_fd()),
        (pin_request(0, 4096), file.as_fd()),
    ];
    for (request, fd) in requests {
        let Some(Reply::Refused(refusal)) = ask(&socket, &request, &[fd]) else {
            panic!("{request:?} with the proof of another");
        };
        assert_eq!(refusal.errno, Errno::ACCESS.raw_os_error());
        assert_eq!(refusal.reason, Reason::NotCapable);
    }
    drop((proof, file));
    assert!(!is_pinned(&path));
    std::fs::remove_file(&path).unwrap();
}

/// In a user namespace of its own a process has all capabilities, and they
/// count for nothing outside.
fn own_user_namespace(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "abuse-namespace", 65536);
    let socket = guard.socket().to_string_lossy().into_owned();
    let name = path.to_string_lossy().into_owned();
    let mut helper = Helper::start("own-namespace", &[&socket, &name]).unwrap();
    let errno = Errno::ACCESS.raw_os_error();
    assert_eq!(helper.hear().unwrap(), format!("refused {errno}"));
    assert_eq!(helper.finish().unwrap(), Some(0));
    assert!(!is_pinned(&path));
    std::fs::remove_file(&path).unwrap();
}

/// Proves what it can, goes into a user namespace of its own, and asks for a
/// pin.
pub fn play_own_namespace(arguments: &[String]) -> anyhow::Result<()> {
    let [socket, path] = arguments else {
        anyhow::bail!("wrong arguments");
    };
    let file = File::open(path)?;
    let socket = proven_to(Path::new(socket));
    mapdirect_testkit::raw::own_user_namespace()?;
    let all = mapdirect_sys::capget::effective(0)?;
    anyhow::ensure!(mapdirect_sys::capget::contains(
        all,
        mapdirect_sys::capget::CAP_LINUX_IMMUTABLE
    ));
    match ask(&socket, &pin_request(0, 4096), &[file.as_fd()]) {
        Some(Reply::Refused(refusal)) => say(&format!("refused {}", refusal.errno)),
        other => say(&format!("{other:?}")),
    }
    Ok(())
}

/// A pinned file, and a connection that may announce who opens it.
struct Announcing {
    connection: Socket,
    path: PathBuf,
    known: OwnedFd,
    _held: mapdirect::Pin,
}

impl Announcing {
    fn new(world: &World, guard: &GuardProcess, name: &str) -> Self {
        let path = written(&world.disk(Kind::XFS), name, 65536);
        let file = File::open(&path).unwrap();
        let held = PinOptions::new().guard(guard.client()).pin(&file).unwrap();
        let mode = rustix::fs::Mode::empty();
        let known = rustix::fs::open(&path, rustix::fs::OFlags::PATH, mode).unwrap();
        assert!(is_pinned(&path));
        Self {
            connection: proven(guard),
            path,
            known,
            _held: held,
        }
    }

    /// Announces the calling thread.
    fn announce(&self) -> Reply {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let request = Request::Announce { tid };
        ask(&self.connection, &request, &[self.known.as_fd()]).unwrap()
    }

    /// Whether the calling thread may open it for writing must be `announced`;
    /// where operations are judged whoever likes may.
    fn expect_let_in(&self, announced: bool, why: &str) {
        match Gate::under_test() {
            Gate::Fanotify => assert_eq!(!is_pinned(&self.path), announced, "{why}"),
            Gate::Bpf => assert!(is_pinned(&self.path), "{why}"),
        }
    }
}

impl Drop for Announcing {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One that is not made use of is soon worth nothing, and in nobody's way.
fn announcements_expire(world: &World) {
    let guard = world.guard();
    let announcing = Announcing::new(world, &guard, "abuse-announced-late");
    let mut announced = 0;
    let refusal = loop {
        match announcing.announce() {
            Reply::Done => announced += 1,
            Reply::Refused(refusal) => break refusal,
            other => panic!("{other:?}"),
        }
        assert!(announced < 1000, "there must be a limit");
    };
    assert_eq!(refusal.reason, Reason::Limit);
    std::thread::sleep(mapdirect_proto::ANNOUNCEMENT_LIFE);
    announcing.expect_let_in(false, "none of them is good any more");
    assert_eq!(announcing.announce(), Reply::Done);
    announcing.expect_let_in(true, "this one is");
    announcing.expect_let_in(false, "but only once");
}

fn announcements_end(world: &World) {
    let guard = world.guard();
    let mut announcing = Announcing::new(world, &guard, "abuse-announced-and-left");
    assert_eq!(announcing.announce(), Reply::Done);
    announcing.connection = connect(&guard);
    // The guard hears of it when its thread runs.
    std::thread::sleep(Duration::from_millis(300));
    announcing.expect_let_in(false, "it ended with the session");
}

fn announcements_name_one_thread(world: &World) {
    let guard = world.guard();
    let announcing = Announcing::new(world, &guard, "abuse-announced-another");
    assert_eq!(announcing.announce(), Reply::Done);
    std::thread::scope(|scope| {
        let another = scope.spawn(|| announcing.expect_let_in(false, "another thread"));
        another.join().unwrap();
    });
    announcing.expect_let_in(true, "the thread announced");
    // A thread of somebody else is not for us to announce.
    let request = Request::Announce { tid: 1 };
    let reply = ask(
        &announcing.connection,
        &request,
        &[announcing.known.as_fd()],
    );
    assert!(matches!(reply, Some(Reply::Refused(_))), "{reply:?}");
}

/// A child that inherited a proven connection is not the one that proved.
fn someone_elses_connection(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "abuse-inherited", 65536);
    let file = File::open(&path).unwrap();
    let connection = proven(&guard);
    let request = pin_request(0, 4096).encode();
    let child = mapdirect_testkit::raw::fork(|| {
        i32::from(connection.send(&[&request], &[file.as_fd()]).is_err())
    })
    .unwrap();
    assert_eq!(mapdirect_testkit::raw::wait(child), Ok(0));
    let Some((Reply::Refused(refusal), _)) = hear(&connection) else {
        panic!("a child must not pin on its parent's connection");
    };
    assert_eq!(refusal.errno, Errno::ACCESS.raw_os_error());
    drop(file);
    assert!(!is_pinned(&path));
    std::fs::remove_file(&path).unwrap();
}

/// At every point where the guard waits for it.
fn leaves_in_the_middle(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "abuse-leaves", 65536);
    for round in 0..60 {
        // What the one before asked for may be granted only now.
        let file = wait_for(Duration::from_secs(20), || {
            Ok(File::options().read(true).write(true).open(&path).ok())
        });
        let file = file.unwrap();
        let connection = proven(&guard);
        let request = pin_request(0, 4096).encode();
        connection.send(&[&request], &[file.as_fd()]).unwrap();
        // It does not even wait for the answer, or hears that it should swap
        // (or that it need not) and leaves, or swaps and leaves.
        if round % 3 > 0
            && let Some((Reply::Swap, fds)) = hear(&connection)
            && round % 3 == 2
        {
            mapdirect_sys::dup::replace(file.as_fd(), fds[0].as_fd()).unwrap();
            connection.send(&[&Request::Swapped.encode()], &[]).unwrap();
        }
        drop((connection, file));
        wait_until_free(&path);
    }
    is_well(world, &guard);
    std::fs::remove_file(&path).unwrap();
}

fn never_swaps(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "abuse-never-swaps", 65536);
    let file = open(&path);
    let connection = proven(&guard);
    let request = pin_request(0, 4096).encode();
    connection.send(&[&request], &[file.as_fd()]).unwrap();
    let first = hear(&connection);
    if Gate::under_test() == Gate::Bpf {
        // The old description may stay: nothing is to be swapped, and whoever
        // says that it was talks nonsense.
        assert!(matches!(first, Some((Reply::Granted(_), _))), "{first:?}");
        let nonsense = ask(&connection, &Request::Swapped, &[]);
        assert!(matches!(nonsense, Some(Reply::Refused(_))), "{nonsense:?}");
        drop((first, connection, file));
        is_well(world, &guard);
        std::fs::remove_file(&path).unwrap();
        return;
    }
    let Some((Reply::Swap, fds)) = first else {
        panic!("no swap: {first:?}");
    };
    // Meanwhile others are not kept waiting for ever.
    let started = Instant::now();
    let opened = File::open(&path);
    assert!(opened.is_ok() && started.elapsed() < Duration::from_secs(6));
    let Some((Reply::Refused(refusal), _)) = hear(&connection) else {
        panic!("it must be refused in the end");
    };
    assert_eq!(refusal.reason, Reason::Protocol);
    drop((fds, opened, connection, file));
    wait_until_free(&path);
    // And one that says it did, and did not.
    let file = open(&path);
    let connection = proven(&guard);
    connection.send(&[&request], &[file.as_fd()]).unwrap();
    let Some((Reply::Swap, _fds)) = hear(&connection) else {
        panic!("no swap");
    };
    connection.send(&[&Request::Swapped.encode()], &[]).unwrap();
    let Some((Reply::Refused(refusal), _)) = hear(&connection) else {
        panic!("it must be refused");
    };
    assert_eq!(refusal.reason, Reason::OpenHere, "{refusal:?}");
    drop((connection, file));
    is_well(world, &guard);
    std::fs::remove_file(&path).unwrap();
}

/// Asks and asks and never reads an answer.
fn never_reads(world: &World) {
    let guard = world.guard();
    let connection = proven(&guard);
    connection
        .set_send_timeout(Duration::from_millis(200))
        .unwrap();
    let request = Request::Status.encode();
    let started = Instant::now();
    let mut sent = 0;
    while started.elapsed() < Duration::from_secs(8) {
        match connection.send(&[&request], &[]) {
            Ok(()) => sent += 1,
            Err(Errno::AGAIN) => {}
            Err(_) => break,
        }
    }
    assert!(sent > 0);
    assert!(
        started.elapsed() < Duration::from_secs(8),
        "the guard must hang up at last"
    );
    is_well(world, &guard);
}

fn thousand_clients(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let disk = world.disk(Kind::XFS);
    let started = Instant::now();
    let clients: Vec<Socket> = (0..1000).map(|_| proven(&guard)).collect();
    // All of them ask for a pin of their own before anybody reads an answer.
    let paths: Vec<_> = (0..1000)
        .map(|number| {
            let path = disk.path(&format!("abuse-crowd-{number}"));
            std::fs::write(&path, [1; 4096]).unwrap();
            path
        })
        .collect();
    rustix::fs::sync();
    // They are in each other's way for a while.
    let request = Request::Pin(PinRequest {
        offset: 0,
        length: 4096,
        flags: Flags::NONE,
        patience_ms: 20_000,
    });
    let request = request.encode();
    for (client, path) in clients.iter().zip(&paths) {
        let file = File::open(path).unwrap();
        client.send(&[&request], &[file.as_fd()]).unwrap();
    }
    // Whoever is asked to replace its descriptor answers at once, in whatever
    // order they are asked.
    let mut granted = Vec::new();
    let mut left: Vec<&Socket> = clients.iter().collect();
    while !left.is_empty() {
        let mut polled: Vec<_> = left
            .iter()
            .map(|client| PollFd::new(*client, PollFlags::IN))
            .collect();
        let minute = rustix::event::Timespec {
            tv_sec: 60,
            tv_nsec: 0,
        };
        let ready = rustix::event::poll(&mut polled, Some(&minute)).unwrap();
        assert!(ready > 0, "{} were not answered", left.len());
        let mut ready = polled.into_iter().map(|one| !one.revents().is_empty());
        left.retain(|client| {
            if !ready.next().unwrap() {
                return true;
            }
            match hear(client) {
                Some((Reply::Swap, _)) => {
                    // The descriptor that was sent is closed here already.
                    client.send(&[&Request::Swapped.encode()], &[]).unwrap();
                    true
                }
                Some((Reply::Granted(pin), fds)) => {
                    granted.push((pin, fds));
                    false
                }
                other => panic!("not granted: {other:?}"),
            }
        });
    }
    assert_eq!(granted.len(), 1000);
    assert!(paths.iter().all(|path| is_pinned(path)));
    let status = guard.client().status().unwrap();
    assert_eq!(status.files.len(), 1000);
    assert!(status.clients >= 1000);
    drop((granted, clients));
    for path in &paths {
        wait_until_free(path);
        std::fs::remove_file(path).unwrap();
    }
    println!("a thousand clients took {:?}", started.elapsed());
    is_well(world, &guard);
}

/// More clients than a guard has descriptors for.
fn out_of_descriptors(world: &World) {
    let guard = GuardProcess::start_with_descriptors(Path::new(BINARY), 1024).unwrap();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "abuse-descriptors", 65536);
    let file = open(&path);
    let held = map(&guard.client(), &file, 0..65536);
    let crowd: Vec<Socket> = (0..1100).map(|_| connect(&guard)).collect();
    let hello = Request::Hello { version: VERSION };
    let mut served = Vec::new();
    for client in crowd {
        match ask(&client, &hello, &[]) {
            Some(Reply::Welcome { .. }) => served.push(client),
            // It may hang up before it is asked anything.
            Some(Reply::Refused(refusal)) => assert_eq!(refusal.reason, Reason::Limit),
            None => {}
            other => panic!("{other:?}"),
        }
    }
    // Two more are those of this process: what it asks by, and what it is told
    // by.
    assert_eq!(served.len() + 2, 1024 / 4);
    // All of them send what the guard has to keep while it looks.
    for client in &served {
        client
            .send(&[&Request::Query.encode()], &[file.as_fd()])
            .unwrap();
    }
    assert!(is_pinned(&path), "the gate goes on");
    let status = guard.client().status().unwrap();
    assert_eq!((status.files.len(), status.clients), (1, 1024 / 4));
    // Those it knows are served.
    let other = written(&disk, "abuse-descriptors-more", 65536);
    let more = open(&other);
    let also_held = map(&guard.client(), &more, 0..65536);
    assert!(is_pinned(&other));
    drop((held, also_held, file, more, served));
    for path in [&path, &other] {
        wait_until_free(path);
        std::fs::remove_file(path).unwrap();
    }
}

fn second_guard(_world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let second = std::process::Command::new(BINARY)
        .arg("guard")
        .arg("--socket")
        .arg(guard.socket())
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    let text = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(text.contains("another guard listens"), "{text}");
    assert!(guard.client().status().is_ok(), "the first goes on");
}

/// Guards that start at the same time, each on its own socket, each with the
/// best gate there is. In the kernel there is one gate, for one guard.
fn guards_at_once(_world: &World) {
    let scratch = mapdirect_testkit::process::ScratchDirectory::new("at-once").unwrap();
    let start = |number: usize| {
        let mut child = std::process::Command::new(BINARY)
            .args(["guard", "--socket"])
            .arg(scratch.path().join(format!("{number}.sock")))
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        (child, std::io::BufReader::new(stdout))
    };
    let started: Vec<_> = (0..5).map(start).collect();
    let mut gates = Vec::new();
    let mut children = Vec::new();
    for (child, mut stdout) in started {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
        gates.push(line.split(", ").nth(1).unwrap_or_default().to_owned());
        children.push(child);
    }
    for mut child in children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let of = |gate: &str| gates.iter().filter(|found| *found == gate).count();
    let kernel = of("gate bpf");
    assert!(of("gate fanotify") == 5 || kernel == 1, "{gates:?}");
}

/// A socket left behind is taken over; any other file is not.
fn socket_in_the_way(_world: &World) {
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let socket = guard.socket().to_owned();
    guard.kill().unwrap();
    assert!(socket.exists(), "nobody took it away");
    let start = || {
        let mut child = std::process::Command::new(BINARY)
            .arg("guard")
            .arg("--socket")
            .arg(&socket)
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).unwrap();
        (child, line)
    };
    let (mut child, line) = start();
    assert!(line.contains("ready"), "{line}");
    child.kill().unwrap();
    child.wait().unwrap();
    std::fs::remove_file(&socket).unwrap();
    std::fs::write(&socket, "something precious").unwrap();
    let (mut child, line) = start();
    assert_eq!(line, "");
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(std::fs::read(&socket).unwrap(), b"something precious");
}

/// Others may ask, and learn nothing about pins of strangers.
fn unprivileged_status(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "abuse-secret-name", 65536);
    let file = File::open(&path).unwrap();
    let held = PinOptions::new().guard(guard.client()).pin(&file).unwrap();
    std::process::Command::new("chmod")
        .arg("755")
        .arg(guard.socket().parent().unwrap())
        .status()
        .unwrap();
    // The binary may lie where nobody else can reach it.
    let copy = mapdirect_testkit::process::ScratchDirectory::new("bin").unwrap();
    let binary = copy.path().join("mapdirect");
    std::fs::copy(BINARY, &binary).unwrap();
    for path in [copy.path(), &binary] {
        std::process::Command::new("chmod")
            .arg("755")
            .arg(path)
            .status()
            .unwrap();
    }
    let run = |arguments: &[&str]| {
        std::process::Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&binary)
            .args(arguments)
            .env("MAPDIRECT_SOCKET", guard.socket())
            .output()
            .unwrap()
    };
    let output = run(&["status", "--json"]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains("secret"), "{text}");
    // With more privilege than its caller it does not listen to the caller's
    // environment.
    std::process::Command::new("chmod")
        .arg("2755")
        .arg(&binary)
        .status()
        .unwrap();
    let output = run(&["status"]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains(mapdirect_proto::DEFAULT_SOCKET), "{text}");
    let output = run(&["doctor"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("lacks CAP_LINUX_IMMUTABLE"), "{text}");
    let output = run(&["guard", "--socket", "/tmp/mapdirect-nobody.sock"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("root"), "{text}");
    drop(held);
    std::fs::remove_file(&path).unwrap();
}
