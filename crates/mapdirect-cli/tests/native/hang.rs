//! A test that hangs fails the run, and does not stop it: others would wait for hours
//! for a word.

use crate::{killed, random};
use mapdirect_sys::proc;
use mapdirect_sys::signal::{Signal, kill};
use mapdirect_testkit::hammer::TRIES_VARIABLE;
use mapdirect_testkit::legal::SECONDS_VARIABLE;
use std::collections::BTreeMap;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// Longer than any test takes, on an emulated processor as well.
const LONGEST: Duration = Duration::from_secs(900);

/// Set for tests that are to take as long as somebody likes.
const LONGER: [&str; 4] = [
    SECONDS_VARIABLE,
    TRIES_VARIABLE,
    killed::KILLS_VARIABLE,
    random::SOAK_VARIABLE,
];

/// Dropped when the test has ended.
pub struct Watched(#[expect(dead_code, reason = "that it is gone is the message")] Sender<()>);

/// Gives the whole run up if a test has not ended after a quarter of an hour.
pub fn watch(test: String) -> Watched {
    let (test_runs, ended) = channel();
    let unlimited = LONGER.iter().any(|name| std::env::var_os(name).is_some());
    if !unlimited {
        std::thread::spawn(move || {
            if ended.recv_timeout(LONGEST) == Err(RecvTimeoutError::Timeout) {
                give_up(&test);
            }
        });
    }
    Watched(test_runs)
}

/// Says where everything hangs that belongs to the tests, and ends it.
fn give_up(test: &str) -> ! {
    println!("\n{test} has not ended after {LONGEST:?}; no more tests are run");
    let own = std::process::id().cast_signed();
    let mut family = vec![own];
    family.extend(descendants(own));
    for pid in &family {
        let tasks = proc::numbers_in(&format!("/proc/{pid}/task")).unwrap_or_default();
        for tid in tasks {
            let file = |name: &str| proc::read_task_file(tid, name).unwrap_or_default();
            println!("  {pid} {tid} {}", file("comm").trim());
            for line in file("stack").lines().take(8) {
                println!("      {line}");
            }
        }
    }
    // A frozen one is freed by its own end.
    for pid in family.iter().filter(|pid| **pid != own) {
        let _ = kill(*pid, Signal::KILL);
    }
    std::process::exit(101);
}

/// Children, and theirs.
fn descendants(of: i32) -> Vec<i32> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for pid in proc::numbers_in("/proc").unwrap_or_default() {
        let parent = proc::read_task_file(pid, "stat").ok().and_then(|stat| {
            stat.rsplit_once(')')?
                .1
                .split_whitespace()
                .nth(1)?
                .parse()
                .ok()
        });
        if let Some(parent) = parent {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = Vec::new();
    let mut parents = vec![of];
    while let Some(parent) = parents.pop() {
        let own = children.remove(&parent).unwrap_or_default();
        parents.extend(&own);
        found.extend(own);
    }
    found
}
