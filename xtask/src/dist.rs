//! What is handed out: packages for Debian, and a tarball for others.
//!
//! The same tree gives the same bytes: times are those of the last commit, and
//! the paths of the machine that builds are in none of it.

mod check;
mod completions;
mod debian;
mod licences;
mod needs;
mod tarball;
mod target;
mod tree;

use crate::arch::Arch;
use crate::{build, man, packages};
use anyhow::{Context, Result, ensure};
pub(crate) use check::run as check;
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use target::{Builder, run as succeed};

/// The version that the workspace has.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Units that a package without would be of no use.
const UNITS: [&str; 2] = ["mapdirect.socket", "mapdirect.service"];

/// Arguments of `dist`.
#[derive(Debug, Args)]
pub(crate) struct DistArgs {
    /// What it is to run on
    #[arg(long, value_enum, default_value_t = Arch::OWN)]
    arch: Arch,
    /// The number behind the version in the packages' own
    #[arg(long, value_name = "NUMBER", default_value = "1")]
    revision: u32,
    /// Where everything is put [default: dist in the target directory]
    #[arg(long, value_name = "DIRECTORY")]
    output: Option<PathBuf>,
    /// Then build it all anew in another directory, and fail if a byte differs
    #[arg(long)]
    twice: bool,
    /// Instead, install packages of two revisions in a virtual machine with systemd, one after the
    /// other with a pin held, and take them away again; for another architecture, try what is in the
    /// tarball on such a machine: needs root
    #[arg(long, conflicts_with_all = ["revision", "output", "twice"])]
    check: bool,
}

/// Makes what is handed out.
pub(crate) fn run(args: &DistArgs) -> Result<ExitCode> {
    if args.check {
        let found = if args.arch == Arch::OWN {
            check()?
        } else {
            check::elsewhere(args.arch)?
        };
        println!("{found}");
        return Ok(ExitCode::SUCCESS);
    }
    let target = build::target()?;
    let output = args.output.clone().unwrap_or_else(|| target.join("dist"));
    let release = Release::new(args.arch, args.revision)?;
    let made = release.make(&target.join("dist-build"), &output)?;
    if args.twice {
        let again = target.join("dist-again");
        println!("the same once more, in {}", again.display());
        let _ = fs::remove_dir_all(&again);
        release.make(&again.join("build"), &again.join("dist"))?;
        for file in &made {
            let path = |directory: &Path| directory.join(file);
            let (one, other) = (path(&output), path(&again.join("dist")));
            ensure!(fs::read(one)? == fs::read(other)?, "{file} differs");
        }
        println!("{} files are the same, byte by byte", made.len());
        fs::remove_dir_all(&again)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Packages of a revision, for an architecture.
pub(crate) struct Release {
    arch: Arch,
    revision: u32,
    /// The time that all files have, in seconds since 1970.
    epoch: String,
}

impl Release {
    /// One of this tree, as of its last commit.
    pub(crate) fn new(arch: Arch, revision: u32) -> Result<Self> {
        packages::install_missing(&packages::FOR_PACKAGES)?;
        packages::install_for_bpf()?;
        Ok(Self {
            arch,
            revision,
            epoch: epoch()?,
        })
    }

    /// The version of the packages.
    fn version(&self) -> String {
        format!("{VERSION}-{}", self.revision)
    }

    /// Builds in one directory and puts what comes of it into another; returns
    /// the names of the files.
    pub(crate) fn make(&self, build: &Path, output: &Path) -> Result<Vec<String>> {
        fs::create_dir_all(build)?;
        let build = fs::canonicalize(build)?;
        let built = Builder::new(self.arch, build.clone())?.build()?;
        let stage = build.join(format!("stage-{}", self.arch.debian()));
        let _ = fs::remove_dir_all(&stage);
        fs::create_dir_all(&stage)?;
        fs::create_dir_all(output)?;
        let mut made = debian::make(self, &built, &stage, output)?;
        made.push(tarball::make(self, &built, &stage, output)?);
        debian::lint(output, &made)?;
        sums(output)?;
        for file in &made {
            let bytes = fs::metadata(output.join(file))?.len();
            println!("{} ({} KiB)", output.join(file).display(), bytes >> 10);
        }
        Ok(made)
    }
}

/// When the last commit was made, or what `SOURCE_DATE_EPOCH` says.
fn epoch() -> Result<String> {
    if let Ok(epoch) = std::env::var("SOURCE_DATE_EPOCH") {
        ensure!(
            epoch.parse::<u64>().is_ok(),
            "SOURCE_DATE_EPOCH is no number of seconds: {epoch}"
        );
        return Ok(epoch);
    }
    let mut git = Command::new("git");
    let log = git
        .current_dir(build::workspace())
        .args(["log", "-1", "--format=%ct"]);
    let epoch = succeed(log).context(
        "the files get the time of the last commit: build in a checkout, or set SOURCE_DATE_EPOCH",
    )?;
    Ok(epoch.trim().to_owned())
}

/// Writes the sums of everything that is there.
fn sums(output: &Path) -> Result<()> {
    let mut files: Vec<_> = fs::read_dir(output)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    files.retain(|file| file.ends_with(".deb") || file.ends_with(".tar.xz"));
    files.sort();
    let sums = succeed(Command::new("sha256sum").current_dir(output).args(&files))?;
    Ok(fs::write(output.join("SHA256SUMS"), sums)?)
}

/// Files of a directory of `packaging`, by name.
fn packaging(directory: &str) -> Result<Vec<(String, PathBuf)>> {
    let path = build::workspace().join("packaging").join(directory);
    let mut files = Vec::new();
    if path.is_dir() {
        for entry in fs::read_dir(&path)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type()?.is_file() {
                files.push((name, entry.path()));
            }
        }
    }
    files.sort();
    Ok(files)
}

/// The units, of which none may be missing.
fn units() -> Result<Vec<(String, String)>> {
    let files = packaging("systemd")?;
    for unit in UNITS {
        ensure!(
            files.iter().any(|(name, _)| name == unit),
            "there is no packaging/systemd/{unit}"
        );
    }
    files
        .into_iter()
        .map(|(name, path)| Ok((name, fs::read_to_string(path)?)))
        .collect()
}

/// Manual pages: where they belong below `man`, and their text.
fn pages() -> Result<Vec<(String, Vec<u8>)>> {
    man::files()?
        .into_iter()
        .map(|page| {
            let name = page.file_name().context("a page without a name")?;
            let name = name.to_string_lossy();
            let place = format!("man{}/{name}", man::section(&name)?);
            Ok((place, fs::read(&page)?))
        })
        .collect()
}

/// Documents that go along: their names, and where they are.
fn documents() -> Result<Vec<(String, PathBuf)>> {
    let root = build::workspace();
    let mut all = vec![
        (String::from("README.md"), root.join("README.md")),
        (String::from("SECURITY.md"), root.join("SECURITY.md")),
    ];
    for entry in fs::read_dir(root.join("docs"))? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            let name = entry.file_name().to_string_lossy().into_owned();
            all.push((format!("docs/{name}"), entry.path()));
        }
    }
    all.sort();
    Ok(all)
}
