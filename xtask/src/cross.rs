//! Building for machines of another architecture, with Debian's compilers and its
//! libraries for them.

use crate::arch::Arch;
use crate::{build, packages, vm};
use anyhow::{Context, Result, ensure};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Libraries that programs are linked with.
const LIBRARIES: [(&str, &str); 2] = [("libelf.so", "libelf.so.1"), ("libz.so", "libz.so.1")];

/// Where cargo looks for flags of the compiler for an architecture.
pub(crate) fn flags_variable(arch: Arch) -> String {
    variable(arch, "RUSTFLAGS")
}

fn variable(arch: Arch, name: &str) -> String {
    let target = arch.rust().to_uppercase().replace('-', "_");
    format!("CARGO_TARGET_{target}_{name}")
}

/// What has cargo build programs for an architecture; nothing for this machine's
/// own. Installs what that takes.
pub(crate) fn environment(arch: Arch) -> Result<Vec<(OsString, OsString)>> {
    if arch == Arch::OWN {
        return Ok(Vec::new());
    }
    ensure!(
        arch == Arch::Aarch64,
        "nothing is built for {} on {}",
        arch.name(),
        Arch::OWN.name()
    );
    packages::install_missing(&packages::FOR_AARCH64)?;
    require_std(arch)?;
    let tree = vm::userland(arch)?;
    let libraries = tree.join("usr/lib").join(arch.gnu());
    let beside = link_libraries(&tree, &libraries)?;
    let flags = format!(
        "-L native={} -C link-arg=-Wl,-rpath-link={}",
        beside.display(),
        libraries.display()
    );
    let include = tree.join("usr/include");
    let headers = format!("-I{0} -I{0}/{1}", include.display(), arch.gnu());
    Ok(vec![
        (variable(arch, "LINKER").into(), arch.tool("gcc").into()),
        (flags_variable(arch).into(), flags.into()),
        ("LIBBPF_SYS_EXTRA_CFLAGS".into(), headers.into()),
    ])
}

/// A directory with nothing but what is asked for: the others of the tree are not
/// to be found in place of those of the compiler.
fn link_libraries(tree: &Path, libraries: &Path) -> Result<PathBuf> {
    let beside = tree.with_file_name("libraries");
    fs::create_dir_all(&beside)?;
    for (name, file) in LIBRARIES {
        let link = beside.join(name);
        let to = libraries.join(file);
        ensure!(to.exists(), "there is no {}", to.display());
        if fs::read_link(&link).ok().as_deref() != Some(&to) {
            let _ = fs::remove_file(&link);
            symlink(&to, &link)?;
        }
    }
    Ok(beside)
}

/// The standard library for another architecture.
fn require_std(arch: Arch) -> Result<()> {
    if has_std(arch)? {
        return Ok(());
    }
    let target = arch.rust();
    if packages::exists("rustup") {
        eprintln!("fetching Rust's standard library for {}", arch.name());
        Command::new("rustup")
            .args(["target", "add", &target])
            .current_dir(build::workspace())
            .stdin(Stdio::null())
            .status()
            .context("cannot run rustup")?;
    }
    ensure!(
        has_std(arch)?,
        "Rust's standard library for {} is missing: `rustup target add {target}`; or use Debian's \
         rustc with the package libstd-rust-dev:{}",
        arch.name(),
        arch.debian()
    );
    Ok(())
}

fn has_std(arch: Arch) -> Result<bool> {
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    let output = rustc
        .args(["--print", "target-libdir", "--target", &arch.rust()])
        .current_dir(build::workspace())
        .stdin(Stdio::null())
        .output()
        .context("cannot run rustc")?;
    let directory = String::from_utf8_lossy(&output.stdout);
    let files = fs::read_dir(directory.trim()).into_iter().flatten();
    Ok(files
        .flatten()
        .any(|entry| entry.file_name().to_string_lossy().starts_with("libstd-")))
}
