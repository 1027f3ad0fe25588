//! Clients that talk nonsense, leave in the middle, do not listen, or come in
//! crowds. The guard must survive all of them, and nobody else may notice.

mod crowds;
mod proofs;

pub(crate) use self::crowds::*;
pub(crate) use self::proofs::*;

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
        ("in-the-way", in_the_way),
        ("locked-directory", locked_directory),
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
    let proof = memfd::prove_immutable_capability(&challenge, memfd::By::Namespace).unwrap();
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
        (2, u64::MAX - 1, Errno::OVERFLOW),
        (0, u64::MAX - 1, Errno::OVERFLOW),
        // Without an end, and not of strength stable.
        (0, u64::MAX, Errno::INVAL),
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
