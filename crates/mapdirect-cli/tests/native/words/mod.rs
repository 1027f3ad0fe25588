//! What the command says: in which characters, how wide, of which files, and
//! whether it is true.

mod cells;
mod forms;
mod truth;

use crate::world::{BINARY, World};
use libtest_mimic::Trial;
use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

pub fn trials(world: &World) -> Vec<Trial> {
    let tests = [
        ("names", forms::names as fn(&World)),
        ("cells", cells::cells),
        ("paths", cells::paths),
        ("kinds", cells::kinds),
        ("limits", cells::limits),
        ("sizes", cells::sizes),
        ("names-in-json", forms::names_in_json),
        ("locales", forms::locales),
        ("widths", forms::widths),
        ("one-and-many", forms::one_and_many),
        ("several-files", forms::several_files),
        ("status-of-files", forms::status_of_files),
        ("columns", forms::columns),
        ("full-device", forms::full_device),
        ("closed-pipe", forms::closed_pipe),
        ("colours", forms::colours),
        ("interrupted", forms::interrupted),
        ("becoming-stable", truth::becoming_stable),
        ("used-by-the-kernel", truth::used_by_the_kernel),
        ("cache-accepted", truth::cache_accepted),
        ("prepare-refused", truth::prepare_refused),
        ("prepare-inline", truth::prepare_inline),
        ("first-remedy", truth::first_remedy),
        ("beyond-the-end", truth::beyond_the_end),
    ];
    tests
        .map(|(name, test)| world.trial(format!("words::{name}"), test))
        .into()
}

/// The command, with the environment that a person has, and nothing of ours.
fn mapdirect<S: AsRef<OsStr>>(socket: &Path, arguments: &[S]) -> Command {
    let mut command = Command::new(BINARY);
    command
        .args(arguments)
        .env("MAPDIRECT_SOCKET", socket)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null());
    for variable in [
        "COLUMNS",
        "NO_COLOR",
        "LANG",
        "LC_CTYPE",
        "MAPDIRECT_CACHED",
    ] {
        command.env_remove(variable);
    }
    command
}

fn output<S: AsRef<OsStr>>(socket: &Path, arguments: &[S]) -> Output {
    mapdirect(socket, arguments).output().unwrap()
}

/// Everything that was said, in one line.
fn flat(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr].concat();
    let text = String::from_utf8(text).unwrap();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
