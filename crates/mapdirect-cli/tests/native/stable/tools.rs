//! `mapdirect` and strength stable.

use crate::world::{BINARY, World, open, wait_until_free, written};
use libtest_mimic::Trial;
use mapdirect::{ExtentState, PinOptions, Strength};
use mapdirect_sys::Errno;
use mapdirect_sys::signal::{self, Signal};
use mapdirect_testkit::Kind;
use mapdirect_testkit::process::Helper;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

pub fn trials(world: &World) -> Vec<Trial> {
    vec![world.trial("stable::cli", on_the_command_line)]
}

fn mapdirect(socket: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.env("COLUMNS", "1000");
    command.args(arguments).env("MAPDIRECT_SOCKET", socket);
    command
}

fn json(socket: &Path, arguments: &[&str]) -> Value {
    let output = mapdirect(socket, arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn text(socket: &Path, arguments: &[&str]) -> String {
    let output = mapdirect(socket, arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A file is followed, and every tool says so.
fn on_the_command_line(world: &World) {
    let guard = world.guard();
    let path = written(&world.disk(Kind::EXT4), "stable-cli", 1 << 20);
    let name = path.to_str().unwrap();
    for (range, offset) in [(None, 0), (Some("64K:"), 65536)] {
        let mut arguments = vec!["pin", name, "--strength", "stable", "--json"];
        arguments.extend(range.iter().flat_map(|range| ["--range", range]));
        let mut pin = Helper::spawn(mapdirect(guard.socket(), &arguments)).unwrap();
        let value: Value = serde_json::from_str(&pin.hear().unwrap()).unwrap();
        assert_eq!(value["strength"], "stable");
        assert_eq!(value["range"]["offset"], offset);
        assert!(value["range"]["length"].is_null(), "{value}");
        let last = value["extents"].as_array().unwrap().last().unwrap();
        assert_eq!(last["state"], ExtentState::Hole.name());
        assert!(last["length"].is_null(), "{value}");
        let status = json(guard.socket(), &["status", "--json"]);
        let files = status["files"].as_array().unwrap();
        let shown = files.iter().find(|file| file["file"] == name).unwrap();
        let shown = &shown["pins"][0];
        assert_eq!(shown["strength"], "stable");
        assert_eq!(shown["stable"], (1 << 20) - offset);
        assert!(shown["length"].is_null(), "{shown}");
        let said = text(guard.socket(), &["status"]);
        assert!(said.contains("strength stable"), "{said}");
        let shown = json(guard.socket(), &["show", name, "--json"]);
        assert_eq!(shown["pinned"][0]["strength"], "stable");
        assert!(shown["pinned"][0]["length"].is_null(), "{shown}");
        let said = text(guard.socket(), &["show", name]);
        assert!(said.contains("strength stable"), "{said}");
        let c_name = std::ffi::CString::new(name).unwrap();
        let cut = mapdirect_testkit::raw::truncate(&c_name, 4096);
        assert_eq!(cut, Err(Errno::TXTBSY));
        signal::kill(pin.pid(), Signal::TERMINATE).unwrap();
        assert_eq!(pin.finish().unwrap(), Some(0));
        wait_until_free(&path);
    }
    // The other strength is the default, and is told as well.
    let file = open(&path);
    let pin = PinOptions::new().guard(guard.client()).pin(&file).unwrap();
    let shown = json(guard.socket(), &["show", name, "--json"]);
    assert_eq!(shown["pinned"][0]["strength"], "all");
    let ranges = guard.client().pinned_ranges(&file).unwrap();
    assert_eq!(ranges[0].flags.strength(), Strength::All);
    drop((pin, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}
