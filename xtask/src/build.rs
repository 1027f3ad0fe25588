//! Running cargo, and finding what it built.

use crate::arch::Arch;
use crate::{cross, packages};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// The workspace this task belongs to.
pub(crate) fn workspace() -> &'static Path {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own)
}

/// This program, to be run once more. What is built meanwhile may have taken
/// its place; that is as good.
pub(crate) fn own() -> std::io::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let replaced = own.to_str().and_then(|own| own.strip_suffix(" (deleted)"));
    Ok(replaced.map_or_else(|| own.clone(), PathBuf::from))
}

/// The cargo that runs us, in the workspace.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(workspace());
    command
}

/// Builds the `mapdirect` command and says where it is.
pub(crate) fn mapdirect() -> Result<PathBuf> {
    packages::install_for_bpf()?;
    executable(
        "mapdirect",
        &mut cargo(&[
            "build",
            // Both, so that what they share is built once, with one set of
            // features.
            "--package=xtask",
            "--package=mapdirect-cli",
            "--message-format=json-render-diagnostics",
        ]),
    )
}

/// Builds the tests on real filesystems and says where they are.
pub(crate) fn native_tests(arch: Arch) -> Result<PathBuf> {
    packages::install_for_bpf()?;
    let mut cargo = cargo(&[
        "test",
        "--quiet",
        "--no-run",
        "--package=mapdirect-cli",
        "--test=native",
        "--message-format=json-render-diagnostics",
    ]);
    for_arch(&mut cargo, arch)?;
    saying("the tests: some minutes the first time", || {
        executable("native", &mut cargo)
    })
}

/// Builds the unit tests of what is shipped, and says where they are.
pub(crate) fn unit_tests(arch: Arch) -> Result<Vec<PathBuf>> {
    packages::install_for_bpf()?;
    let mut cargo = cargo(&[
        "test",
        "--no-run",
        "--workspace",
        "--exclude=xtask",
        "--exclude=xtask-init",
        "--exclude=mapdirect-fuzz",
        "--lib",
        "--message-format=json-render-diagnostics",
    ]);
    for_arch(&mut cargo, arch)?;
    let found = executables(&mut cargo)?;
    ensure!(!found.is_empty(), "cargo built no unit tests");
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// Has cargo build for an architecture.
fn for_arch(cargo: &mut Command, arch: Arch) -> Result<()> {
    if arch != Arch::OWN {
        cargo.args(["--target", &arch.rust()]);
        // Of this machine's own, such as another linker.
        cargo.env_remove("RUSTFLAGS");
        cargo.envs(cross::environment(arch)?);
    }
    Ok(())
}

/// Builds the first process of virtual machines and says where it is.
pub(crate) fn init(arch: Arch) -> Result<PathBuf> {
    let mut cargo = cargo(&[
        "rustc",
        "--quiet",
        "--package=xtask-init",
        "--bin=init",
        "--release",
        "--message-format=json-render-diagnostics",
    ]);
    // A target directory of its own: cargo does not keep what is built with
    // these options apart from what is built without.
    cargo.arg("--target-dir").arg(target()?.join("vm/init"));
    for_arch(&mut cargo, arch)?;
    // Where it runs there is nothing but itself.
    cargo.args([
        "--",
        "-C",
        "target-feature=+crt-static",
        "-C",
        "strip=symbols",
    ]);
    saying(
        "the first process of virtual machines: half a minute the first time",
        || executable("init", &mut cargo),
    )
}

/// Builds something that cargo says nothing about, and says so when that is not
/// done at once.
pub(crate) fn saying<T>(what: &str, build: impl FnOnce() -> T) -> T {
    const SILENCE: Duration = Duration::from_millis(700);
    std::thread::scope(|scope| {
        let (done, is_done) = mpsc::channel::<()>();
        scope.spawn(move || {
            if is_done.recv_timeout(SILENCE) == Err(RecvTimeoutError::Timeout) {
                eprintln!("building {what} ...");
            }
        });
        let built = build();
        drop(done);
        built
    })
}

/// Runs a build and says where it put an executable.
fn executable(name: &str, cargo: &mut Command) -> Result<PathBuf> {
    executables(cargo)?
        .into_iter()
        .find_map(|(of, path)| (of == name).then_some(path))
        .with_context(|| format!("cargo did not say where it put {name}"))
}

/// Runs a build, and says what executables it made, and of what.
fn executables(cargo: &mut Command) -> Result<Vec<(String, PathBuf)>> {
    let output = cargo
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "the build failed");
    let messages = String::from_utf8_lossy(&output.stdout);
    Ok(messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| {
            let name = message["target"]["name"].as_str()?.to_owned();
            Some((name, message["executable"].as_str()?.into()))
        })
        .collect())
}

/// Where cargo puts what it builds.
pub(crate) fn target() -> Result<PathBuf> {
    let output = cargo(&["metadata", "--no-deps", "--offline", "--format-version=1"])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    metadata["target_directory"]
        .as_str()
        .map(PathBuf::from)
        .context("cargo did not say where it puts what it builds")
}
