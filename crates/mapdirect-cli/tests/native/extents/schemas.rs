//! What the command prints as JSON is what `docs/schemas` says, no more and no
//! less.

use super::{mapdirect, said};
use crate::segments::{State as Block, make};
use crate::world::{World, open, wait_until_free, written};
use clap::CommandFactory;
use mapdirect_cli::args::Mapdirect;
use mapdirect_sys::signal::{self, Signal};
use mapdirect_testkit::Kind;
use mapdirect_testkit::process::{GuardProcess, Helper, wait_for};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/schemas")
}

/// Verbs that print JSON: each has a schema.
pub fn every_verb_has_one(_: &World) {
    let mut verbs = 0;
    for verb in Mapdirect::command().get_subcommands() {
        let has_json = verb
            .get_arguments()
            .any(|argument| argument.get_id() == "json");
        let schema = directory().join(format!("{}.json", verb.get_name()));
        assert_eq!(has_json, schema.exists(), "{}", verb.get_name());
        verbs += u32::from(has_json);
    }
    assert!(verbs >= 5, "{verbs}");
}

/// Real outputs of every verb, in as many of their forms as can be had here.
pub fn outputs_are_as_described(world: &World) {
    let guard = GuardProcess::start(Path::new(crate::world::BINARY)).unwrap();
    let mut documents = Vec::new();
    documents.extend(of_files(world, &guard));
    documents.push(("doctor", parsed(&said(&guard, &["doctor", "--json"]))));
    assert!(documents.len() > 12);
    let names: BTreeSet<_> = documents.iter().map(|(name, _)| *name).collect();
    assert_eq!(names.len(), 6, "{names:?}");
    validate(world, &documents);
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn of_files(world: &World, guard: &GuardProcess) -> Vec<(&'static str, Value)> {
    let mut documents = Vec::new();
    for kind in [Kind::XFS, Kind::EXT4] {
        let disk = world.disk(kind);
        let mixed = disk.path("schemas-mixed");
        let mut states = vec![Block::Written, Block::Hole, Block::Unwritten];
        if kind.reflink() {
            states.push(Block::Shared);
        }
        drop(make(&mixed, 4096, &states, states.len() as u64 * 4096));
        let empty = written(&disk, "schemas-empty", 0);
        let new = disk.path("schemas-new");
        let _ = std::fs::remove_file(&new);
        let name = |path: &PathBuf| path.to_str().unwrap().to_owned();
        let (mixed_name, empty_name, new_name) = (name(&mixed), name(&empty), name(&new));
        for path in [&mixed_name, &empty_name] {
            documents.push(("show", parsed(&said(guard, &["show", path, "--json"]))));
        }
        for arguments in [
            &["--size", "1M", "--contiguous", "--json"][..],
            &["--size", "2M", "--contiguous", "--format", "json"],
            &["--json"],
        ] {
            let arguments = [&["prepare", &new_name], arguments].concat();
            documents.push(("prepare", parsed(&said(guard, &arguments))));
        }
        let arguments = ["pin", &mixed_name, &new_name];
        let script = ["--", "sh", "-c", "cat $MAPDIRECT_EXTENTS"];
        let extents = said(guard, &[&arguments[..], &script].concat());
        documents.push(("extents", parsed(&extents)));
        wait_until_free(&mixed);
        wait_until_free(&new);
        for more in [
            &["--json"][..],
            &["--format", "json", "--strength", "stable"],
        ] {
            let arguments = [&arguments, more].concat();
            let mut pin = Helper::spawn(mapdirect(guard, &arguments)).unwrap();
            for _ in 0..2 {
                documents.push(("pin", parsed(&pin.hear().unwrap())));
            }
            // Something to tell: a pin, and that somebody was refused.
            let truncated = Command::new("truncate")
                .args(["-s", "0", &mixed_name])
                .stderr(Stdio::null())
                .status()
                .unwrap();
            assert!(!truncated.success());
            let status = wait_for(Duration::from_secs(5), || {
                let status = parsed(&said(guard, &["status", "--json"]));
                let recent = status["recent"].as_array().map_or(0, Vec::len);
                Ok((recent > 0).then_some(status))
            })
            .unwrap();
            assert!(
                status["files"]
                    .as_array()
                    .is_some_and(|files| files.len() == 2)
            );
            documents.push(("status", status));
            documents.push((
                "show",
                parsed(&said(guard, &["show", &mixed_name, "--json"])),
            ));
            signal::kill(pin.pid(), Signal::TERMINATE).unwrap();
            pin.finish().unwrap();
            wait_until_free(&mixed);
        }
        drop(open(&new));
        for path in [&mixed, &empty, &new] {
            std::fs::remove_file(path).unwrap();
        }
    }
    documents
}

/// Has an independent program look at documents, each with the name of its
/// schema.
pub fn validate(world: &World, documents: &[(&str, Value)]) {
    let there = Command::new("/usr/bin/python3")
        .args(["-c", "import jsonschema"])
        .stderr(Stdio::null())
        .status();
    if !there.is_ok_and(|status| status.success()) {
        world.unavailable(String::from(
            "a validator of JSON schemas (python3-jsonschema)",
        ));
        return;
    }
    let count = documents.len() as u64;
    let documents: Vec<_> = documents
        .iter()
        .map(|(name, document)| json!([name, document]))
        .collect();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/native/extents/validate.py");
    let mut validator = Command::new("/usr/bin/python3")
        .arg(script)
        .arg(directory())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = validator.stdin.take().unwrap();
    let text = Value::from(documents).to_string();
    let feeding = std::thread::spawn(move || input.write_all(text.as_bytes()));
    let output = validator.wait_with_output().unwrap();
    feeding.join().unwrap().unwrap();
    let complaints = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{complaints}");
    world.count("outputs that are as their schemas say", count);
}
