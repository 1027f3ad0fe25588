//! The library as a file: its names and versions, its header, its structures, and
//! where it is installed.

use super::{compile, here, said, scratch, stage};
use crate::world::World;
use libtest_mimic::Trial;
use mapdirect_testkit::disk::run;
use std::path::Path;
use std::process::Command;

pub fn trials(world: &World) -> Vec<Trial> {
    vec![
        world.trial("capi::abi", abi),
        world.trial("capi::header", header),
        world.trial("capi::pkg-config", pkg_config),
    ]
}

/// Names with their versions, and structures with their offsets: a program that
/// was linked against an earlier library goes on with this one. Whoever changes
/// `abi.txt` has thought of that.
fn abi(_: &World) {
    let shared = stage().join("lib/libmapdirect.so.0");
    let listed = said(
        Command::new("readelf")
            .args(["-W", "--dyn-syms"])
            .arg(&shared),
    );
    let mut names: Vec<&str> = listed
        .lines()
        .filter(|line| !line.contains(" UND ") && line.contains("mapdirect"))
        .filter_map(|line| line.split_whitespace().last())
        .collect();
    names.sort_unstable();
    let dynamic = said(Command::new("readelf").args(["-W", "-d"]).arg(&shared));
    assert!(dynamic.contains("soname: [libmapdirect.so.0]"), "{dynamic}");
    let exported = listed
        .lines()
        .filter(|line| line.contains("FUNC    GLOBAL DEFAULT") && !line.contains(" UND "))
        .count();
    assert_eq!(exported, names.len(), "nothing else is exported: {listed}");
    let layout = said(&mut Command::new(compile(&here("layout.c"), "layout", &[])));
    let found = format!("{}\n{layout}", names.join("\n"));
    let expected = std::fs::read_to_string(here("abi.txt")).unwrap();
    assert!(
        found == expected,
        "abi.txt says\n{expected}\nand there is\n{found}"
    );
}

/// The header is one for every compiler that there is here.
fn header(_: &World) {
    let include = format!("-I{}", stage().join("include").display());
    for (compiler, language, standard) in [
        ("gcc", "c", "-std=c99"),
        ("gcc", "c", "-std=c17"),
        ("g++", "c++", "-std=c++11"),
        ("g++", "c++", "-std=c++20"),
    ] {
        let source = scratch().join(format!("header.{language}"));
        std::fs::write(&source, "#include <mapdirect.h>\n#include <mapdirect.h>\n").unwrap();
        run(Command::new(compiler)
            .args([
                "-x",
                language,
                standard,
                "-Wall",
                "-Wextra",
                "-pedantic",
                "-Werror",
            ])
            .args(["-fsyntax-only", &include])
            .arg(&source))
        .unwrap();
    }
}

/// What pkg-config says is enough, for the shared library and for the archive.
fn pkg_config(_: &World) {
    let told = |arguments: &[&str]| -> Vec<String> {
        let mut command = Command::new("pkg-config");
        command.args(arguments).arg("mapdirect");
        let told = said(command.env("PKG_CONFIG_PATH", stage().join("lib/pkgconfig")));
        told.split_whitespace().map(str::to_owned).collect()
    };
    let source = scratch().join("version.c");
    let text = "#include <mapdirect.h>\n#include <stdio.h>\n\
                int main(void) { return puts(mapdirect_strerror()) < 0; }\n";
    std::fs::write(&source, text).unwrap();
    for (name, flags) in [
        ("shared", told(&["--cflags", "--libs"])),
        ("archive", told(&["--cflags", "--libs", "--static"])),
    ] {
        let program = scratch().join(name);
        let mut flags = flags;
        if name == "archive" {
            let archive = stage().join("lib/libmapdirect.a");
            for flag in &mut flags {
                if flag == "-lmapdirect" {
                    archive.to_str().unwrap().clone_into(flag);
                }
            }
        }
        run(Command::new("cc")
            .arg("-o")
            .arg(&program)
            .arg(&source)
            .args(&flags))
        .unwrap();
        let mut command = Command::new(&program);
        assert_eq!(
            said(command.env("LD_LIBRARY_PATH", stage().join("lib"))),
            "\n"
        );
    }
    assert!(Path::new(&stage().join("lib/libmapdirect.so")).is_symlink());
}
