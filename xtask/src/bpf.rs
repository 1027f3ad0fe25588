//! Compiling the programs of the bpf gate.
//!
//! The object is committed, so that nobody needs clang to build mapdirect. It
//! is loaded as root, so what it does must be what its source says: `--check`
//! compiles the source again and compares the two bit by bit, and the tests do
//! so every time. The numbers that programs and guard share are written into a
//! header from the Rust side.

use crate::{build, packages};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use mapdirect_testkit::fingerprint::fingerprint;
use mapdirect_testkit::process::ScratchDirectory;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

/// Arguments of `bpf`.
#[derive(Debug, Args)]
pub(crate) struct BpfArgs {
    /// Change nothing, and fail if the object is not what the source says
    #[arg(long)]
    check: bool,
}

const DIRECTORY: &str = "crates/mapdirect-guard/src/gate/bpf/prog";
const SOURCE: &str = "mapdirect.bpf.c";
const OBJECT: &str = "mapdirect.bpf.o";
const HASH: &str = "mapdirect.bpf.hash";
/// The compiler that the object is made with, as Debian 12 has it. Another one
/// makes other instructions of the same source.
const VERSION: u32 = 14;

/// Compiles them.
pub(crate) fn run(args: &BpfArgs) -> Result<ExitCode> {
    if args.check {
        check()?;
        println!("the object is what its source says");
        return Ok(ExitCode::SUCCESS);
    }
    write_constants()?;
    let object = directory().join(OBJECT);
    std::fs::write(&object, compile()?).context("writing the object")?;
    std::fs::write(directory().join(HASH), print_of(&std::fs::read(&object)?))
        .context("writing its fingerprint")?;
    println!("compiled {}", object.display());
    Ok(ExitCode::SUCCESS)
}

/// Has a test of the guard write the numbers that its Rust side knows, as C
/// has them. The units compare the two each time.
fn write_constants() -> Result<()> {
    packages::install_for_bpf()?;
    build::saying(
        "the guard, which knows the constants: a minute or two the first time",
        || {
            call(
                build::cargo(&[
                    "test",
                    "--quiet",
                    "--package=mapdirect-guard",
                    "--features=bpf",
                    "--lib",
                    "gate::bpf::constants",
                ])
                .env("MAPDIRECT_WRITE_CONSTANTS", "1"),
            )
        },
    )
}

/// Fails if the object is not what comes of the source, or is named wrongly.
pub(crate) fn check() -> Result<()> {
    let committed = std::fs::read(directory().join(OBJECT)).context("reading the object")?;
    let hash = std::fs::read_to_string(directory().join(HASH)).context("reading its name")?;
    ensure!(
        hash == print_of(&committed),
        "{HASH} is not of {OBJECT}: run `cargo xtask bpf`"
    );
    let compiled = compile()?;
    if compiled != committed {
        let differs = compiled.iter().zip(&committed).position(|(a, b)| a != b);
        let at = differs.unwrap_or(compiled.len().min(committed.len()));
        bail!(
            "{OBJECT} is not what its source says: {} bytes come of it, {} are there, and byte \
             {at} differs; run `cargo xtask bpf`",
            compiled.len(),
            committed.len()
        );
    }
    Ok(())
}

fn print_of(object: &[u8]) -> String {
    format!("{}\n", fingerprint(object))
}

fn directory() -> PathBuf {
    build::workspace().join(DIRECTORY)
}

/// What comes of the source, the same wherever it lies.
fn compile() -> Result<Vec<u8>> {
    if !Path::new("/usr/include/bpf/bpf_helpers.h").exists() {
        // Its headers are all that is needed; it brings no command.
        packages::install(&["libbpf-dev"])?;
    }
    let clang = tool("clang")?;
    let strip = tool("llvm-strip")?;
    let scratch = ScratchDirectory::new("bpf")?;
    let object = scratch.path().join(OBJECT);
    let headers = format!("/usr/include/{}-linux-gnu", std::env::consts::ARCH);
    call(
        Command::new(clang)
            .current_dir(directory())
            .args([
                "-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Werror",
            ])
            // Type information names files.
            .arg(format!("-ffile-prefix-map={}=.", directory().display()))
            .arg("-fdebug-compilation-dir=.")
            .arg("-I")
            .arg(headers)
            .args(["-c", SOURCE, "-o"])
            .arg(&object),
    )?;
    // Type information stays, line numbers for debuggers go.
    call(Command::new(strip).arg("-g").arg(&object))?;
    std::fs::read(&object).context("reading what was compiled")
}

/// A tool of the compiler's version.
fn tool(name: &str) -> Result<String> {
    let tool = format!("{name}-{VERSION}");
    if !packages::exists(&tool) {
        let package = if name == "clang" { "clang" } else { "llvm" };
        packages::install(&[&format!("{package}-{VERSION}")])?;
    }
    ensure!(packages::exists(&tool), "there is no {tool}");
    Ok(tool)
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
