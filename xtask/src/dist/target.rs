//! Machines that packages are made for, and the builds for them.

use crate::arch::Arch;
use crate::{build, capi, cross};
use anyhow::{Context, Result, ensure};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What was built.
pub(crate) struct Built {
    pub(crate) command: PathBuf,
    pub(crate) archive: PathBuf,
    pub(crate) shared: PathBuf,
    pub(crate) mmap: PathBuf,
}

/// Builds for other machines than this one.
pub(crate) struct Builder {
    arch: Arch,
    directory: PathBuf,
    environment: Vec<(OsString, OsString)>,
}

impl Builder {
    /// One that puts what it builds into a directory of its own: the paths of
    /// this machine are kept out of it, which takes options of the compilers.
    pub(crate) fn new(arch: Arch, directory: PathBuf) -> Result<Self> {
        let cargo_home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
        let home = || std::env::home_dir().map(|home| home.join(".cargo"));
        let cargo_home = cargo_home.or_else(home).context("there is no home")?;
        let mut flags = Vec::new();
        let mut c_flags = Vec::new();
        for (path, name) in [
            (directory.as_path(), "/usr/src/mapdirect/target"),
            (build::workspace(), "/usr/src/mapdirect"),
            (&cargo_home, "/usr/src/cargo"),
        ] {
            let path = path.to_str().context("a path that is not text")?;
            // Of several that fit rustc takes the last one, and GCC as well.
            flags.insert(0, format!("--remap-path-prefix={path}={name}"));
            c_flags.insert(0, format!("-ffile-prefix-map={path}={name}"));
        }
        let mut environment: Vec<(OsString, OsString)> = vec![
            // What a developer sets for their own builds.
            ("CARGO_INCREMENTAL".into(), "0".into()),
            ("CFLAGS".into(), c_flags.join(" ").into()),
        ];
        for (name, value) in cross::environment(arch)? {
            // Flags of their own take the place of what these are joined to.
            if name == cross::flags_variable(arch).as_str() {
                flags.extend(value.to_string_lossy().split(' ').map(str::to_owned));
            } else {
                environment.push((name, value));
            }
        }
        environment.push(("CARGO_ENCODED_RUSTFLAGS".into(), flags.join("\x1f").into()));
        Ok(Self {
            arch,
            directory,
            environment,
        })
    }

    /// The command and the libraries.
    pub(crate) fn build(&self) -> Result<Built> {
        println!("building the command for {}", self.arch.name());
        let release = self.cargo("release", &["mapdirect-cli"])?;
        println!("building the libraries for {}", self.arch.name());
        let libraries = self.cargo("capi", &["mapdirect-capi", "mapdirect-mmap"])?;
        let archive = libraries.join("libmapdirect_capi.a");
        let shared = libraries.join("libmapdirect.so");
        capi::link(&self.arch.tool("gcc"), &archive, &shared)?;
        Ok(Built {
            command: release.join("mapdirect"),
            archive,
            shared,
            mmap: libraries.join("libmapdirect_mmap.so"),
        })
    }

    /// Builds packages; cargo shows how far it is.
    fn cargo(&self, profile: &str, packages: &[&str]) -> Result<PathBuf> {
        let mut cargo = build::cargo(&["build", "--locked", "--profile", profile]);
        cargo.args(["--target", &self.arch.rust(), "--target-dir"]);
        cargo.arg(&self.directory);
        for package in packages {
            cargo.args(["--package", package]);
        }
        for (name, _) in std::env::vars_os() {
            let name_text = name.to_string_lossy();
            if name_text.starts_with("CARGO_PROFILE_") || name_text == "RUSTFLAGS" {
                cargo.env_remove(&name);
            }
        }
        let status = cargo
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .status()
            .context("cannot run cargo")?;
        ensure!(
            status.success(),
            "the build for {} failed",
            self.arch.name()
        );
        Ok(self.directory.join(self.arch.rust()).join(profile))
    }
}

/// Copies a program, a library or an archive, without what only debuggers read.
pub(crate) fn strip(arch: Arch, file: &Path, to: &Path) -> Result<()> {
    let mut strip = Command::new(arch.tool("strip"));
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("a") => strip.args(["--strip-debug", "--enable-deterministic-archives"]),
        Some("so") => strip.arg("--strip-unneeded"),
        _ => strip.arg("--strip-all"),
    };
    strip.args(["--remove-section=.comment", "--remove-section=.note"]);
    run(strip.arg("-o").arg(to).arg(file))?;
    ensure!(fs::metadata(to)?.len() > 0, "strip wrote nothing");
    Ok(())
}

/// Runs a command that must succeed; what it says is shown only if it fails.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;
    ensure!(
        output.status.success(),
        "{} failed: {}{}",
        command.get_program().display(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
