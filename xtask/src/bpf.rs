//! Compiling the programs of the bpf gate.
//!
//! What comes of it is committed, so that nobody needs clang to build
//! mapdirect: `mapdirect.bpf.o`, and beside it the fingerprints of the source
//! and of the object. A test says when they are not those.

use crate::{build, packages};
use anyhow::{Context, Result, ensure};
use mapdirect_testkit::fingerprint::fingerprint;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

const DIRECTORY: &str = "crates/mapdirect-guard/src/gate/bpf";

/// Compiles them.
pub(crate) fn run() -> Result<ExitCode> {
    if !Path::new("/usr/include/bpf/bpf_helpers.h").exists() {
        // Its headers are all that is needed; it brings no command.
        packages::install(&["libbpf-dev"])?;
    }
    let clang = newest("clang", "clang")?;
    let strip = newest("llvm-strip", "llvm")?;
    let directory = build::workspace().join(DIRECTORY);
    let object = directory.join("mapdirect.bpf.o");
    let headers = format!("/usr/include/{}-linux-gnu", std::env::consts::ARCH);
    call(
        Command::new(clang)
            .current_dir(&directory)
            .args([
                "-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Werror",
            ])
            .arg("-I")
            .arg(headers)
            .args(["-c", "mapdirect.bpf.c", "-o", "mapdirect.bpf.o"]),
    )?;
    // Type information stays, line numbers for debuggers go.
    call(Command::new(strip).arg("-g").arg(&object))?;
    let print = |name: &str| -> Result<String> {
        let bytes =
            std::fs::read(directory.join(name)).with_context(|| format!("reading {name}"))?;
        Ok(fingerprint(&bytes))
    };
    let prints = format!(
        "{} {}\n",
        print("mapdirect.bpf.c")?,
        print("mapdirect.bpf.o")?
    );
    std::fs::write(directory.join("mapdirect.bpf.hash"), prints)?;
    println!("compiled {}", object.display());
    Ok(ExitCode::SUCCESS)
}

/// The newest of a tool that Debian may have under a name with its version.
fn newest(name: &str, package: &str) -> Result<String> {
    let names = || {
        std::iter::once(name.to_owned())
            .chain((14..30).rev().map(|version| format!("{name}-{version}")))
    };
    if let Some(found) = names().find(|name| packages::exists(name)) {
        return Ok(found);
    }
    packages::install(&[package])?;
    names()
        .find(|name| packages::exists(name))
        .with_context(|| format!("{package} is installed, but there is no {name}"))
}

fn call(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;
    ensure!(
        status.success(),
        "{} failed",
        command.get_program().display()
    );
    Ok(())
}
