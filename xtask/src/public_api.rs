//! The public API of the library, as text.
//!
//! Whoever changes it shall see that in the diff of a file, and so shall who
//! reviews the change: `--check` compares the file with what the source says, and
//! the tests do so every time.

use crate::build::{self, workspace};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use public_api::PublicApi;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

/// Arguments of `public-api`.
#[derive(Debug, Args)]
pub(crate) struct PublicApiArgs {
    /// Change nothing, and fail if the file is not what the source says
    #[arg(long)]
    check: bool,
}

/// The library.
const LIBRARY: &str = "mapdirect";
/// Crates that it hands out types of.
const LENDERS: [&str; 2] = ["mapdirect-model", "mapdirect-proto"];
/// Where the list is.
const FILE: &str = "crates/mapdirect/public-api.txt";
/// The compiler that describes the crates. The form of the description changes
/// with versions, and so must the version of the crate `public-api` that reads
/// it.
const COMPILER: &str = "1.95.0";

/// Writes the list, or compares it.
pub(crate) fn run(args: &PublicApiArgs) -> Result<ExitCode> {
    if args.check {
        check()?;
        println!("the public API is what {FILE} says");
        return Ok(ExitCode::SUCCESS);
    }
    let path = workspace().join(FILE);
    std::fs::write(&path, list()?).context("writing the list")?;
    println!("{}", path.display());
    Ok(ExitCode::SUCCESS)
}

/// Fails if the list is not what the source says.
pub(crate) fn check() -> Result<()> {
    let there = std::fs::read_to_string(workspace().join(FILE)).context("reading the list")?;
    let wanted = list()?;
    if there == wanted {
        return Ok(());
    }
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    let (before, now) = (lines(&there), lines(&wanted));
    let mut difference = String::new();
    for (sign, lines) in [
        ('-', before.difference(&now)),
        ('+', now.difference(&before)),
    ] {
        for line in lines {
            let _ = write!(difference, "\n  {sign}{line}");
        }
    }
    bail!("{FILE} is not what the source says: run `cargo xtask public-api`{difference}");
}

/// All public items of the library, and of the types it hands out that are at
/// home in other crates.
fn list() -> Result<String> {
    let own = describe(LIBRARY)?;
    let mut text = String::new();
    let mut lent = BTreeSet::new();
    for item in own.items() {
        let line = item.to_string();
        // A type of another crate is listed by its name alone.
        if let Some(name) = line.strip_prefix("pub use mapdirect::") {
            lent.insert(name.trim_matches(['<', '>']).to_owned());
        }
        writeln!(text, "{line}")?;
    }
    for lender in LENDERS {
        let lender = describe(lender)?;
        for item in lender.items() {
            let line = item.to_string();
            if names(&line).any(|name| lent.contains(name)) {
                writeln!(text, "{line}")?;
            }
        }
    }
    Ok(text)
}

/// The path that a line is about, name by name.
fn names(line: &str) -> impl Iterator<Item = &str> {
    let item = line.split(['(', '=', '{']).next().unwrap_or(line);
    // Of `impl Trait for Type` the type.
    let item = item.rsplit(" for ").next().unwrap_or(item);
    let path = item
        .split(' ')
        .find(|word| word.contains("::"))
        .unwrap_or_default();
    path.trim_end_matches(':').split("::")
}

/// Has rustdoc describe a crate.
fn describe(package: &str) -> Result<PublicApi> {
    let mut command = cargo()?;
    command
        .args(["rustdoc", "--quiet", "--lib", "--package", package])
        .args(["--", "-Zunstable-options", "--output-format=json"])
        .env("RUSTC_BOOTSTRAP", "1")
        .stdin(Stdio::null());
    let what = format!("the description of {package}: a minute the first time");
    let status = build::saying(&what, || command.status()).context("cannot run cargo rustdoc")?;
    ensure!(status.success(), "cargo rustdoc failed for {package}");
    let file = format!("{}.json", package.replace('-', "_"));
    let path = target_directory()?.join("doc").join(file);
    public_api::Builder::from_rustdoc_json(&path)
        .omit_blanket_impls(true)
        .omit_auto_trait_impls(true)
        .omit_auto_derived_impls(true)
        .build()
        .with_context(|| format!("cannot read {}", path.display()))
}

fn target_directory() -> Result<PathBuf> {
    let output = build::cargo(&["metadata", "--no-deps", "--format-version=1"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo metadata")?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let directory = metadata["target_directory"].as_str();
    Ok(directory.context("no target directory")?.into())
}

/// The cargo of [`COMPILER`]: the one that runs us, or one that rustup has or
/// installs.
fn cargo() -> Result<Command> {
    let own = Command::new("rustc").arg("--version").output();
    let prefix = format!("rustc {COMPILER} ");
    if own.is_ok_and(|own| own.stdout.starts_with(prefix.as_bytes())) {
        return Ok(build::cargo(&[]));
    }
    let toolchains = Command::new("rustup").args(["toolchain", "list"]).output();
    let toolchains = toolchains.with_context(|| {
        format!("the list is made with Rust {COMPILER}: install that, or rustup, which fetches it")
    })?;
    let is_there = String::from_utf8_lossy(&toolchains.stdout)
        .lines()
        .any(|line| line.starts_with(COMPILER));
    if !is_there {
        let status = Command::new("rustup")
            .args(["toolchain", "install", COMPILER, "--profile", "minimal"])
            .status()
            .context("cannot run rustup")?;
        ensure!(status.success(), "rustup cannot install Rust {COMPILER}");
    }
    let mut command = Command::new("rustup");
    command
        .args(["run", COMPILER, "cargo"])
        .current_dir(workspace());
    // Those of the cargo that runs us.
    for name in ["CARGO", "RUSTC", "RUSTDOC", "RUSTUP_TOOLCHAIN"] {
        command.env_remove(name);
    }
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_about_the_path_that_it_begins_with() {
        for (line, about) in [
            ("pub struct proto::extent::Extent", "Extent"),
            ("pub proto::extent::Extent::length: u64", "Extent"),
            (
                "pub const fn proto::extent::Extent::end(&self) -> u64",
                "Extent",
            ),
            (
                "impl core::fmt::Display for proto::extent::Extent",
                "Extent",
            ),
            (
                "pub fn proto::extent::Extent::clipped(&self, &proto::Other) -> bool",
                "Extent",
            ),
        ] {
            assert!(names(line).any(|name| name == about), "{line}");
            assert!(names(line).all(|name| name != "Other"), "{line}");
        }
    }
}
