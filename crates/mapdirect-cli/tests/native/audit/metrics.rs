//! Metrics, as strict readers take them.

use super::{mapdirect, said};
use crate::world::{BINARY, World, open, pin, wait_until_free, written};
use mapdirect_testkit::Kind;
use mapdirect_testkit::process::{GuardProcess, ScratchDirectory};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// The samples by name and labels.
type Samples = BTreeMap<(String, BTreeMap<String, String>), f64>;

/// Reads OpenMetrics text, and complains about whatever the specification does
/// not allow.
fn strictly_read(text: &str) -> Samples {
    let text = text.strip_suffix("# EOF\n").unwrap();
    assert!(text.ends_with('\n'));
    let mut types: BTreeMap<String, String> = BTreeMap::new();
    let mut samples = Samples::new();
    let mut family = String::new();
    let mut seen = BTreeSet::new();
    let mut helps = BTreeSet::new();
    for line in text.lines() {
        assert!(!line.contains(char::is_control), "{line:?}");
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(!help.is_empty() && helps.insert(name.to_owned()), "{line}");
            continue;
        }
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(matches!(kind, "gauge" | "counter"), "{line}");
            assert!(helps.contains(name), "{line}");
            // The samples of a family come together.
            assert!(seen.insert(name.to_owned()), "{line}");
            assert!(!name.ends_with("_total"), "{line}");
            types.insert(name.to_owned(), kind.to_owned());
            family = name.to_owned();
            continue;
        }
        let at = line.find(['{', ' ']).unwrap();
        let name = &line[..at];
        assert!(
            name.starts_with(|c: char| c.is_ascii_alphabetic())
                && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'),
            "{line}"
        );
        let expected = match types[&family].as_str() {
            "counter" => format!("{family}_total"),
            _ => family.clone(),
        };
        assert_eq!(name, expected, "{line}");
        let mut rest = &line[at..];
        let mut labels = BTreeMap::new();
        if let Some(inside) = rest.strip_prefix('{') {
            rest = inside;
            loop {
                let (label, behind) = rest.split_once("=\"").unwrap();
                let (value, behind) = quoted(behind);
                assert!(labels.insert(label.to_owned(), value).is_none(), "{line}");
                match behind.strip_prefix(',') {
                    Some(behind) => rest = behind,
                    None => {
                        rest = behind.strip_prefix('}').unwrap();
                        break;
                    }
                }
            }
        }
        let value: f64 = rest.strip_prefix(' ').unwrap().parse().unwrap();
        let key = (name.to_owned(), labels);
        assert!(samples.insert(key, value).is_none(), "twice: {line}");
    }
    samples
}

/// The text up to the closing quote, and what is behind that.
fn quoted(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &text[at + 1..]),
            '\\' => match characters.next().unwrap().1 {
                'n' => value.push('\n'),
                escaped @ ('\\' | '"') => value.push(escaped),
                other => panic!("\\{other} means nothing"),
            },
            other => value.push(other),
        }
    }
    panic!("no closing quote in {text}")
}

pub fn metrics(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    // A name that would end a label early.
    let path = written(&world.disk(Kind::XFS), "audit \"m\\e\"} 1", 65536);
    let pinned = pin(&guard.client(), &open(&path), 0..65536);
    for _ in 0..3 {
        let file = std::fs::File::options().write(true).open(&path);
        assert!(file.and_then(|file| file.set_len(0)).is_err());
    }
    let text = said(
        &mapdirect(&guard, &["status", "--metrics"])
            .output()
            .unwrap(),
    );
    let samples = strictly_read(&text);
    let plain = |name: &str| samples[&(format!("mapdirect_{name}"), BTreeMap::new())];
    assert_eq!(plain("guard_up"), 1.0);
    assert_eq!(plain("pins"), 1.0);
    assert_eq!(plain("breaches_total"), 0.0);
    let refused: f64 = samples
        .iter()
        .filter(|((name, _), _)| name == "mapdirect_refusals_total")
        .map(|(_, count)| count)
        .sum();
    assert_eq!(refused, 3.0);
    let of_file = samples.iter().find(|((name, labels), _)| {
        name == "mapdirect_file_pins"
            && labels
                .get("file")
                .is_some_and(|file| Path::new(file) == path)
    });
    assert!(of_file.is_some(), "{text}");
    independently(world, &text);
    // As a file, which is replaced at once.
    let directory = ScratchDirectory::new("metrics").unwrap();
    let file = directory.path().join("mapdirect.prom");
    let name = file.to_str().unwrap();
    said(
        &mapdirect(&guard, &["status", "--metrics-file", name])
            .output()
            .unwrap(),
    );
    let first = std::fs::read_to_string(&file).unwrap();
    strictly_read(&first);
    drop(pinned);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
    drop(guard);
    let output = Command::new(BINARY)
        .args(["status", "--metrics-file", name])
        .env("MAPDIRECT_SOCKET", "/nonexistent/guard.sock")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3));
    let samples = strictly_read(&std::fs::read_to_string(&file).unwrap());
    let up = (String::from("mapdirect_guard_up"), BTreeMap::new());
    assert_eq!(samples.into_iter().collect::<Vec<_>>(), [(up, 0.0)]);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

/// Has the reader of Prometheus look at it.
fn independently(world: &World, text: &str) {
    let script = "import sys\n\
        from prometheus_client.openmetrics.parser import text_string_to_metric_families\n\
        print(len(list(text_string_to_metric_families(sys.stdin.read()))))";
    let there = Command::new("/usr/bin/python3")
        .args(["-c", "import prometheus_client"])
        .stderr(Stdio::null())
        .status();
    if !there.is_ok_and(|status| status.success()) {
        world.unavailable(String::from(
            "a reader of OpenMetrics (python3-prometheus-client)",
        ));
        return;
    }
    let mut reader = Command::new("/usr/bin/python3")
        .args(["-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = reader.stdin.take().unwrap();
    input.write_all(text.as_bytes()).unwrap();
    drop(input);
    let families: u64 = said(&reader.wait_with_output().unwrap())
        .trim()
        .parse()
        .unwrap();
    assert_eq!(families, text.matches("# TYPE ").count() as u64);
    world.count("families of metrics that another reader takes", families);
}
