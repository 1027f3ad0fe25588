//! The guard as a service: places for clients, what it needs before it says
//! that it is ready, and signals.

use crate::world::{BINARY, World, is_pinned, map, open, wait_until_free, written};
use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use mapdirect::Kind as Reason;
use mapdirect_proto::{MAX_MESSAGE, Reply, Request, VERSION};
use mapdirect_sys::Errno;
use mapdirect_sys::unix::Socket;
use mapdirect_testkit::Kind;
use mapdirect_testkit::process::{GuardProcess, Helper, listen, say, wait_for};
use std::path::Path;
use std::time::{Duration, Instant};

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, run) in [
        ("many-users", many_users as fn(&World)),
        ("silent-clients", silent_clients),
    ] {
        trials.push(world.trial(format!("service::{name}"), run));
    }
    trials
}

/// Users of the crowd.
const USERS: std::ops::Range<u32> = 60_001..60_041;

/// Many users together, each with as many connections as it gets, keep root
/// from nothing; and whoever finds no place is told why.
fn many_users(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(Kind::EXT4), "service-many-users", 65536);
    let socket = guard.socket().to_string_lossy().into_owned();
    let mut crowd = Helper::start("crowd", &[&socket]).unwrap();
    let said = crowd.hear().unwrap();
    let served: usize = said.strip_prefix("served ").unwrap().parse().unwrap();
    assert!(served >= 16, "{said}: the crowd must be one");
    // What a program of a user without a place is told.
    assert_eq!(
        crowd.hear().unwrap(),
        format!("{:?} {}", Reason::Limit, Errno::AGAIN.raw_os_error())
    );
    let started = Instant::now();
    let file = open(&path);
    let held = map(&guard.client(), &file, 0..65536);
    assert!(is_pinned(&path));
    let status = guard.client().status().unwrap();
    assert!(status.clients as usize > served, "{}", status.clients);
    // Programs of root each have a connection of their own.
    for _ in 0..20 {
        let command = std::process::Command::new(BINARY)
            .arg("status")
            .env("MAPDIRECT_SOCKET", guard.socket())
            .output()
            .unwrap();
        assert!(command.status.success(), "{command:?}");
    }
    let took = started.elapsed();
    assert!(took < Duration::from_secs(10), "root waited for {took:?}");
    // While there is a crowd, a stranger that asks for nothing has to go.
    wait_for(Duration::from_secs(30), || {
        let clients = guard.client().status()?.clients as usize;
        Ok((clients <= served / 2 + 2).then_some(()))
    })
    .unwrap();
    crowd.tell("end").unwrap();
    assert_eq!(crowd.status().unwrap(), 0);
    drop((held, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
    world.count("connections of a crowd", served as u64);
}

/// Role: user after user takes every place it gets.
pub fn play_crowd(arguments: &[String]) -> Result<()> {
    let [path] = arguments else {
        bail!("wrong arguments");
    };
    let path = Path::new(path);
    std::process::Command::new("chmod")
        .arg("755")
        .arg(path.parent().context("no directory")?)
        .status()?;
    let mut held = Vec::new();
    let mut last = 0;
    for uid in USERS {
        become_user(uid)?;
        last = uid;
        loop {
            match greeted(path)? {
                Some(socket) => held.push(socket),
                None => break,
            }
        }
        become_user(0)?;
    }
    say(&format!("served {}", held.len()));
    become_user(last)?;
    let error = mapdirect::Guard::at(path)
        .status()
        .err()
        .context("it was served")?;
    ensure!(!error.mend().is_empty(), "{error:#}");
    say(&format!("{:?} {}", error.kind(), error.errno()));
    listen()?;
    Ok(())
}

/// Has this process be a user without privilege, or root again.
fn become_user(uid: u32) -> Result<()> {
    let root = rustix::process::Uid::ROOT;
    let user = rustix::process::Uid::from_raw(uid);
    rustix::thread::set_thread_res_uid(user, user, root)?;
    Ok(())
}

/// A connection that has been welcomed; `None` if it was refused for want of a
/// place, as it must be then.
fn greeted(path: &Path) -> Result<Option<Socket>> {
    let socket = Socket::connect(path)?;
    socket.set_receive_timeout(Some(Duration::from_secs(20)))?;
    let hello = Request::Hello { version: VERSION }.encode();
    let mut sent = socket.send(&[&hello], &[]);
    if sent == Err(Errno::PIPE) || sent == Err(Errno::CONNRESET) {
        // It was refused before it could say hello.
        sent = Ok(());
    }
    sent?;
    let mut buffer = vec![0; MAX_MESSAGE];
    let received = match socket.receive(&mut buffer) {
        Err(Errno::CONNRESET) => socket.receive(&mut buffer)?,
        received => received?,
    };
    match Reply::decode(&buffer[..received.length])? {
        Reply::Welcome { .. } => Ok(Some(socket)),
        Reply::Refused(refusal) => {
            ensure!(refusal.reason == Reason::Limit, "{refusal:?}");
            ensure!(!refusal.mend.is_empty(), "{refusal:?}");
            Ok(None)
        }
        other => bail!("{other:?}"),
    }
}

/// Whoever connects and says nothing does not keep its place.
fn silent_clients(_world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let silent: Vec<Socket> = (0..8)
        .map(|_| Socket::connect(guard.socket()).unwrap())
        .collect();
    let greeted = greeted(guard.socket()).unwrap().unwrap();
    for socket in &silent {
        socket
            .set_receive_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let received = socket.receive(&mut [0; 16]).unwrap();
        assert_eq!(received.length, 0, "the guard hangs up");
    }
    // Nobody waits for the place of one that has begun to talk.
    assert_eq!(greeted.peer_is_gone(), Ok(false));
}
