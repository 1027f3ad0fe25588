//! Running cargo, and finding what it built.

use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The workspace this task belongs to.
pub(crate) fn workspace() -> &'static Path {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own)
}

/// The cargo that runs us, in the workspace.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(workspace());
    command
}

/// Builds the `mapdirect` command and says where it is.
pub(crate) fn mapdirect() -> Result<PathBuf> {
    let output = cargo(&[
        "build",
        // Both, so that what they share is built once, with one set of
        // features.
        "--package=xtask",
        "--package=mapdirect-cli",
        "--message-format=json-render-diagnostics",
    ])
    .stdin(Stdio::null())
    .stderr(Stdio::inherit())
    .output()
    .context("cannot run cargo")?;
    ensure!(output.status.success(), "the build failed");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "mapdirect")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("cargo did not say where it put the mapdirect command")
}
