//! The examples, in Rust, C and Python, run as whole programs: in processes of their
//! own, with the guard of the environment.

use crate::capi;
use crate::segments::{State as Block, make};
use crate::world::{World, is_pinned, kinds, wait_until_free, written};
use anyhow::{Result, anyhow};
use libtest_mimic::Trial;
use mapdirect_testkit::Kind;
use mapdirect_testkit::process::{HELPER, Helper};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

#[path = "../../../mapdirect/examples/log.rs"]
#[expect(dead_code, reason = "its main is not called")]
mod log;
#[path = "../../../mapdirect/examples/raw_reader.rs"]
#[expect(dead_code, reason = "its main is not called")]
mod raw_reader;
#[path = "../../../mapdirect/examples/reader.rs"]
#[expect(dead_code, reason = "its main is not called")]
mod reader;

pub fn trials(world: &World) -> Vec<Trial> {
    world.trials(
        "examples",
        &kinds(&[Kind::XFS, Kind::EXT4]),
        &[
            ("log", log_keeps_what_it_said),
            ("reader", reader_survives),
            ("raw-reader", raw_reader_reads_the_file),
        ],
    )
}

/// Roles: the examples, with their own arguments.
pub fn play_log(arguments: &[String]) -> Result<()> {
    log::run(arguments).map_err(|error| anyhow!("{error:#}"))
}

pub fn play_reader(arguments: &[String]) -> Result<()> {
    reader::run(arguments).map_err(|error| anyhow!("{error:#}"))
}

pub fn play_raw_reader(arguments: &[String]) -> Result<()> {
    raw_reader::run(arguments).map_err(|error| anyhow!("{error:#}"))
}

/// What an example is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Language {
    Rust,
    C,
    Python,
}

const LANGUAGES: [Language; 3] = [Language::Rust, Language::C, Language::Python];

/// An example as a command.
fn example(world: &World, language: Language, name: &str, arguments: &[&str]) -> Command {
    let mut command = match language {
        Language::Rust => {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.arg(HELPER).arg(format!("example-{name}"));
            command
        }
        Language::C => Command::new(capi::example(name)),
        Language::Python => capi::python::example(world, name),
    };
    command.env("MAPDIRECT_SOCKET", world.guard().socket());
    command.args(arguments);
    command
}

/// What an example prints.
fn output(world: &World, language: Language, name: &str, arguments: &[&str]) -> Vec<u8> {
    let output = example(world, language, name, arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && error.is_empty(), "{error}");
    output.stdout
}

/// Killed at any moment, it has all records that it said are durable, in their
/// order, whole, and at most the one more that it was about to say.
fn log_keeps_what_it_said(world: &World, kind: Kind) {
    for language in LANGUAGES {
        log_in(world, kind, language);
    }
}

fn log_in(world: &World, kind: Kind, language: Language) {
    let path = world.disk(kind).path("example-log");
    let _ = std::fs::remove_file(&path);
    let name = path.to_string_lossy().into_owned();
    let line = |number: usize| format!("record {number} {}", "x".repeat(number % 90));
    let mut said = 0;
    let rounds = if language == Language::Rust { 4 } else { 2 };
    for round in 0..rounds {
        let mut command = example(world, language, "log", &[&name, "append"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        let first = said;
        let feeding = std::thread::spawn(move || {
            for number in first..first + 100_000 {
                // It may be dead by now.
                if writeln!(input, "record {number} {}", "x".repeat(number % 90)).is_err() {
                    return;
                }
            }
        });
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for _ in 0..20 + 37 * round {
            assert_eq!(lines.next().unwrap().unwrap(), line(said));
            said += 1;
        }
        child.kill().unwrap();
        // What it said before it died counts, too.
        for more in lines.map_while(Result::ok) {
            // The last line may have been cut.
            said += usize::from(more == line(said));
        }
        child.wait().unwrap();
        feeding.join().unwrap();
        wait_until_free(&path);
        let shown = String::from_utf8(output(world, language, "log", &[&name, "show"])).unwrap();
        let shown: Vec<&str> = shown.lines().collect();
        let expected: Vec<String> = (0..shown.len()).map(line).collect();
        assert_eq!(shown, expected);
        assert!(
            (said..=said + 1).contains(&shown.len()),
            "{said} said, {} there",
            shown.len()
        );
        said = shown.len();
        wait_until_free(&path);
    }
    world.count("records of a log that was killed", said as u64);
    std::fs::remove_file(&path).unwrap();
}

/// Others truncate the file under it, in vain, and it reads on.
fn reader_survives(world: &World, kind: Kind) {
    for language in LANGUAGES {
        reader_in(world, kind, language);
    }
}

fn reader_in(world: &World, kind: Kind, language: Language) {
    let path = written(&world.disk(kind), "example-reader", 300_000);
    let name = path.to_string_lossy().into_owned();
    let mut reader = Helper::spawn(example(world, language, "reader", &[&name])).unwrap();
    let sum = "300000 bytes, sum 2100000";
    assert!(reader.hear().unwrap().starts_with(sum));
    assert!(is_pinned(&path));
    for size in ["0", "4096", "299999"] {
        let output = Command::new("truncate")
            .args(["-s", size])
            .arg(&path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && said.contains("Text file busy"),
            "{said}"
        );
        reader.tell("again").unwrap();
        assert_eq!(reader.hear().unwrap(), format!("{sum}, kept"));
    }
    assert_eq!(reader.finish().unwrap(), Some(0));
    wait_until_free(&path);
    truncate(&path);
    std::fs::remove_file(&path).unwrap();
}

fn truncate(path: &Path) {
    let status = Command::new("truncate")
        .args(["-s", "0"])
        .arg(path)
        .status();
    assert!(
        status.unwrap().success(),
        "the protection ended with the reader"
    );
}

/// What comes by the device is what the file reads as, whatever its blocks are.
fn raw_reader_reads_the_file(world: &World, kind: Kind) {
    let path = world.disk(kind).path("example-raw");
    let mut states = vec![
        Block::Written,
        Block::Hole,
        Block::Unwritten,
        Block::Written,
    ];
    if kind.reflink() {
        states.extend([Block::Shared, Block::Hole, Block::Shared]);
    }
    states.extend(std::iter::repeat_n(Block::Written, 600));
    let block = kind.block().max(4096);
    let size = states.len() as u64 * block - 1000;
    drop(make(&path, block, &states, size));
    let expected = std::fs::read(&path).unwrap();
    let name = path.to_string_lossy().into_owned();
    for language in LANGUAGES {
        let copied = output(world, language, "raw-reader", &[&name]);
        assert!(copied == expected, "{language:?}");
        wait_until_free(&path);
    }
    // Written anew, so that the blocks are others, and through the page cache.
    let bytes: Vec<u8> = (0..expected.len())
        .map(|at| u8::try_from(at / 7 % 251).unwrap())
        .collect();
    std::fs::write(&path, &bytes).unwrap();
    for language in LANGUAGES {
        let copied = output(world, language, "raw-reader", &[&name]);
        assert!(copied == bytes, "{language:?}");
        wait_until_free(&path);
    }
    let rust = Language::Rust;
    let mut none = example(world, rust, "raw-reader", &[&name, "/dev/null"]);
    let refused = none.stderr(Stdio::piped()).output().unwrap();
    assert!(!refused.status.success(), "that is no device with blocks");
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}
