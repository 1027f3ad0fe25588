//! The C library: its header, what is built of it, and where it goes.

use crate::build::{self, workspace};
use crate::man;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

/// Arguments of `header`.
#[derive(Debug, Args)]
pub(crate) struct HeaderArgs {
    /// Change nothing, and fail if the header is not what the source says
    #[arg(long)]
    check: bool,
}

/// Arguments of `install`.
#[derive(Debug, Args)]
pub(crate) struct InstallArgs {
    /// Where it is going to be used from
    #[arg(long, default_value = "/usr/local", value_name = "DIRECTORY")]
    prefix: PathBuf,
    /// What stands for the root directory meanwhile, to make a package
    #[arg(long, value_name = "DIRECTORY")]
    destdir: Option<PathBuf>,
    /// The libraries for C alone: no command, no manual pages
    #[arg(long)]
    libraries: bool,
}

const CRATE: &str = "crates/mapdirect-capi";
const HEADER: &str = "include/mapdirect.h";
/// The source of the header, with the modules that it names.
const SOURCE: &str = "src/api/mod.rs";
const VERSION: &str = env!("CARGO_PKG_VERSION");

fn own(file: &str) -> PathBuf {
    workspace().join(CRATE).join(file)
}

/// Writes the header, or compares it.
pub(crate) fn header(args: &HeaderArgs) -> Result<ExitCode> {
    if args.check {
        check_header()?;
        println!("{HEADER} is what the source says");
    } else {
        fs::write(own(HEADER), text_of_header()?).context("writing the header")?;
        println!("{}", own(HEADER).display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Fails if the header is not what the source says, or a function in it has no
/// version.
pub(crate) fn check_header() -> Result<()> {
    let there = fs::read_to_string(own(HEADER)).unwrap_or_default();
    ensure!(
        there == text_of_header()?,
        "{CRATE}/{HEADER} is not what the source says: run `cargo xtask header`"
    );
    for symbol in symbols()? {
        ensure!(
            there.contains(&format!("{symbol}(")),
            "libmapdirect.map has {symbol}, and {HEADER} has not"
        );
    }
    Ok(())
}

fn text_of_header() -> Result<String> {
    let config = cbindgen::Config::from_file(own("cbindgen.toml"));
    let config = config.map_err(|error| anyhow::anyhow!("cbindgen.toml: {error}"))?;
    let builder = cbindgen::Builder::new()
        .with_config(config)
        .with_src(own(SOURCE));
    let mut bytes = Vec::new();
    let bindings = builder.generate().context("cbindgen")?;
    bindings.write(&mut bytes);
    Ok(for_c(&String::from_utf8(bytes)?))
}

/// The header as people of C expect it.
fn for_c(text: &str) -> String {
    let mut header = String::new();
    let mut is_safety = false;
    for line in text.lines() {
        // What Rust must be told of safety, the manual tells C.
        if line.trim() == "# Safety" {
            is_safety = true;
            // The empty line before it.
            header.truncate(header.trim_end().len() + 1);
            continue;
        }
        is_safety &= line.trim() != "*/";
        if is_safety {
            continue;
        }
        let line = match line {
            // A kernel may define it some day.
            "#define MAP_DIRECT 33554432" => {
                "#ifndef MAP_DIRECT\n#define MAP_DIRECT 0x2000000\n#endif"
            }
            _ => line,
        };
        // C of 1990 has no other comments.
        match line.split_once("// ") {
            Some((code, comment)) => header.push_str(&format!("{code}/* {comment} */")),
            None => header.push_str(line),
        }
        header.push('\n');
    }
    header
}

/// The symbols that have a version.
fn symbols() -> Result<Vec<String>> {
    let map = fs::read_to_string(own("libmapdirect.map")).context("libmapdirect.map")?;
    Ok(map
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with("mapdirect_"))
        .map(|line| line.trim_end_matches(';').to_owned())
        .collect())
}

/// Puts the libraries, the command and the manual where programs look for them.
pub(crate) fn install(args: &InstallArgs) -> Result<ExitCode> {
    let prefix = &args.prefix;
    ensure!(prefix.is_absolute(), "the prefix must begin with /");
    let root = match &args.destdir {
        Some(destdir) => destdir.join(prefix.strip_prefix("/")?),
        None => prefix.clone(),
    };
    libraries(&root, prefix)?;
    if !args.libraries {
        let status = build::cargo(&["build", "--release", "--package=mapdirect-cli"]).status();
        ensure!(status?.success(), "the command does not build");
        let command = build::target()?.join("release/mapdirect");
        put(&command, &root.join("bin"), "mapdirect", 0o755)?;
        for page in man::files()? {
            let name = page.file_name().and_then(|name| name.to_str());
            let name = name.context("a page without a name")?;
            let directory = format!("share/man/man{}", man::section(name)?);
            put(&page, &root.join(directory), name, 0o644)?;
        }
    }
    println!("{}", root.display());
    Ok(ExitCode::SUCCESS)
}

/// Builds the libraries for the tests, and says where they are.
pub(crate) fn stage() -> Result<PathBuf> {
    let root = build::target()?.join("capi/stage");
    libraries(&root, &root)?;
    Ok(root)
}

fn libraries(root: &Path, prefix: &Path) -> Result<()> {
    let mut cargo = build::cargo(&[
        "build",
        "--quiet",
        "--profile=capi",
        "--package=mapdirect-capi",
        "--package=mapdirect-mmap",
    ]);
    let status = build::saying(
        "the libraries for C: a minute or two the first time",
        || cargo.stdin(Stdio::null()).status(),
    );
    let status = status.context("cannot run cargo")?;
    ensure!(status.success(), "the libraries do not build");
    let built = build::target()?.join("capi");
    let lib = root.join("lib");
    let archive = built.join("libmapdirect_capi.a");
    put(&archive, &lib, "libmapdirect.a", 0o644)?;
    let shared = built.join("libmapdirect.so");
    link("cc", &archive, &shared)?;
    for (file, name) in [
        (shared, "libmapdirect.so"),
        (built.join("libmapdirect_mmap.so"), "libmapdirect-mmap.so"),
    ] {
        put(&file, &lib, &format!("{name}.{VERSION}"), 0o755)?;
        let soname = format!("{name}.0");
        point(&lib.join(&soname), &format!("{name}.{VERSION}"))?;
        point(&lib.join(name), &soname)?;
    }
    put(&header_file(), &root.join("include"), "mapdirect.h", 0o644)?;
    let prefix = prefix.to_str().context("the prefix is not text")?;
    let directory = lib.join("pkgconfig");
    fs::create_dir_all(&directory)?;
    fs::write(directory.join("mapdirect.pc"), pkg_config(prefix, "lib")?)?;
    Ok(())
}

/// Where the header is.
pub(crate) fn header_file() -> PathBuf {
    own(HEADER)
}

/// What pkg-config is told of the library, in a directory below the prefix.
pub(crate) fn pkg_config(prefix: &str, lib: &str) -> Result<String> {
    Ok(fs::read_to_string(own("mapdirect.pc.in"))?
        .replace("@PREFIX@", prefix)
        .replace("@LIB@", lib)
        .replace("@VERSION@", VERSION))
}

/// Makes the shared library of the archive. rustc could do so, but gives symbols
/// no versions.
pub(crate) fn link(cc: &str, archive: &Path, shared: &Path) -> Result<()> {
    let mut command = Command::new(cc);
    command
        .args(["-shared", "-o"])
        .arg(shared)
        .arg("-Wl,-soname,libmapdirect.so.0")
        .arg(format!(
            "-Wl,--version-script={}",
            own("libmapdirect.map").display()
        ))
        .args([
            "-Wl,--gc-sections",
            "-Wl,--no-undefined",
            "-Wl,-z,relro",
            "-Wl,-S",
        ]);
    for symbol in symbols()? {
        command.arg(format!("-Wl,--require-defined={symbol}"));
    }
    command
        .arg(archive)
        .args(["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl"]);
    let output = command
        .output()
        .with_context(|| format!("cannot run {cc}: install gcc"))?;
    if !output.status.success() {
        bail!("{cc}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Puts a file in the place of what is there, in one step: programs may be using
/// that.
fn put(file: &Path, directory: &Path, name: &str, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    let new = directory.join(format!(".{name}.new"));
    fs::copy(file, &new).with_context(|| format!("copying {}", file.display()))?;
    fs::set_permissions(&new, fs::Permissions::from_mode(mode))?;
    fs::rename(&new, directory.join(name))?;
    Ok(())
}

/// The same for a symbolic link.
fn point(link: &Path, to: &str) -> Result<()> {
    let name = link.file_name().unwrap_or_default().to_string_lossy();
    let new = link.with_file_name(format!(".{name}.new"));
    let _ = fs::remove_file(&new);
    symlink(to, &new)?;
    fs::rename(&new, link)?;
    Ok(())
}
