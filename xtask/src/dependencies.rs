//! What comes from elsewhere: licences, sources, doubles, and whether it all
//! builds with the oldest compiler that is promised.
//!
//! `deny.toml` says what is allowed. Where there is cargo-deny it judges; its own
//! build takes longer than everything it looks at, so nobody must have it:
//! without it the same is looked at here, by what cargo says of the packages.

use crate::{build, packages};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, Stdio};

/// Where everything comes from that is not of this workspace.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// Looks at every package; says who judged.
pub(crate) fn check() -> Result<String> {
    let packages = packages_in_use()?;
    let rules = std::fs::read_to_string(build::workspace().join("deny.toml"))?;
    let (allowed, doubles) = (list(&rules, "allow")?, list(&rules, "skip")?);
    let wrong: Vec<_> = packages
        .iter()
        .filter_map(|package| {
            let mut allowed = allowed.clone();
            allowed.extend(exceptions(&rules, &package.name));
            complaint(package, &allowed)
        })
        .chain(more_than_once(&packages, &doubles))
        .collect();
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    if !packages::exists("cargo-deny") {
        let count = packages.len();
        return Ok(format!(
            "{count} packages were looked at without cargo-deny: licences, sources, doubles, \
             rust-version"
        ));
    }
    let status = build::cargo(&["deny", "--locked", "check", "licenses", "bans", "sources"])
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo deny")?;
    ensure!(status.success(), "cargo deny is not content");
    Ok(String::from("cargo deny has looked at it, too"))
}

/// A package of the workspace, or one that it needs.
#[derive(Debug)]
struct Package {
    name: String,
    version: String,
    license: String,
    /// Nothing for one of the workspace.
    source: Option<String>,
    rust_version: Option<String>,
}

/// What cargo says of every package that is needed on a platform.
pub(crate) fn packages_for(platform: &str) -> Result<Vec<Value>> {
    let output = build::cargo(&["metadata", "--locked", "--format-version=1"])
        .args(["--filter-platform", platform])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "cargo metadata failed");
    let mut metadata: Value = serde_json::from_slice(&output.stdout)?;
    match metadata["packages"].take() {
        Value::Array(packages) => Ok(packages),
        _ => bail!("no packages"),
    }
}

fn packages_in_use() -> Result<Vec<Package>> {
    let packages = packages_for("x86_64-unknown-linux-gnu")?;
    let text = |package: &Value, key: &str| package[key].as_str().map(str::to_owned);
    packages
        .iter()
        .map(|package| {
            Ok(Package {
                name: text(package, "name").context("a package without a name")?,
                version: text(package, "version").context("a package without a version")?,
                license: text(package, "license").unwrap_or_default(),
                source: text(package, "source"),
                rust_version: text(package, "rust_version"),
            })
        })
        .collect()
}

/// The texts of a list in deny.toml.
fn list(rules: &str, name: &str) -> Result<BTreeSet<String>> {
    let begins = |line: &str| {
        line.split_once('=')
            .is_some_and(|(key, _)| key.trim() == name)
    };
    let mut lines = rules.lines().skip_while(|line| !begins(line));
    ensure!(lines.next().is_some(), "deny.toml has no list `{name}`");
    Ok(lines
        .take_while(|line| line.trim() != "]")
        .filter_map(|line| Some(line.trim().strip_prefix('"')?.split_once('"')?.0.to_owned()))
        .collect())
}

/// The licences that deny.toml allows one package.
fn exceptions(rules: &str, package: &str) -> Vec<String> {
    let is_about = |line: &&str| line.contains(&format!("crate = \"{package}\""));
    let lines = rules.lines().filter(is_about);
    lines
        .filter_map(|line| line.split_once('[')?.1.split_once(']'))
        .flat_map(|(licences, _)| licences.split(','))
        .map(|licence| licence.trim().trim_matches('"').to_owned())
        .collect()
}

/// What is wrong with a package, if anything is.
fn complaint(package: &Package, allowed: &BTreeSet<String>) -> Option<String> {
    let Package { name, version, .. } = package;
    if !is_allowed(&package.license, allowed) {
        let license = &package.license;
        return Some(format!("the licence of {name} {version} is `{license}`"));
    }
    if package
        .source
        .as_ref()
        .is_some_and(|source| source != REGISTRY)
    {
        return Some(format!("{name} {version} comes from elsewhere"));
    }
    let needed = package.rust_version.as_deref().map(numbers);
    let promised = numbers(env!("CARGO_PKG_RUST_VERSION"));
    (needed > Some(promised)).then(|| format!("{name} {version} needs a newer Rust"))
}

/// Major, minor and patch; what is not written is 0.
fn numbers(version: &str) -> [u32; 3] {
    let mut parts = version.split('.').map_while(|part| part.parse().ok());
    [(); 3].map(|()| parts.next().unwrap_or(0))
}

/// Whether one of the alternatives of an SPDX expression is allowed, and all
/// that come with it. Few crates nest them: one pair of parentheses will do.
fn is_allowed(license: &str, allowed: &BTreeSet<String>) -> bool {
    if let Some((first, second)) = license.split_once(") AND ") {
        let first = first.trim_start_matches('(');
        return is_allowed(first, allowed) && is_allowed(second, allowed);
    }
    license
        .split(" OR ")
        .flat_map(|part| part.split('/'))
        .any(|part| {
            let mut together = part.split(" AND ");
            together.all(|one| allowed.contains(one.trim()))
        })
}

/// Packages that are there in several versions.
fn more_than_once(packages: &[Package], allowed: &BTreeSet<String>) -> Vec<String> {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in packages {
        let of = versions.entry(&package.name).or_default();
        of.push(&package.version);
    }
    versions
        .into_iter()
        .filter(|(name, versions)| versions.len() > 1 && !allowed.contains(*name))
        .map(|(name, versions)| format!("{name} is there as {}", versions.join(" and ")))
        .collect()
}

/// Builds with the oldest compiler that is promised; says how it was looked
/// at.
pub(crate) fn oldest_compiler() -> Result<String> {
    let version = env!("CARGO_PKG_RUST_VERSION");
    if !packages::exists("rustup") {
        // Clippy has looked at what is used of the standard library
        // (incompatible_msrv), and the check above at the dependencies.
        return Ok(format!(
            "there is no rustup here, so Rust {version} did not build it: clippy and the \
             rust-version of each package are all that was looked at"
        ));
    }
    let has = rustup(&["run", version, "cargo", "--version"])?;
    if !has && !rustup(&["toolchain", "install", version, "--profile", "minimal"])? {
        bail!("rustup cannot install Rust {version}");
    }
    let target = build::target()?.join("oldest");
    let status = under(version)
        .args([
            "check",
            "--quiet",
            "--locked",
            "--workspace",
            "--target-dir",
        ])
        .arg(target)
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "Rust {version} does not build it");
    Ok(format!("with Rust {version} itself"))
}

/// The cargo of another toolchain than the one that runs us, in the workspace.
fn under(toolchain: &str) -> Command {
    let mut command = Command::new("rustup");
    command
        .args(["run", toolchain, "cargo"])
        .current_dir(build::workspace())
        .env_remove("CARGO")
        .env_remove("RUSTC")
        .env_remove("RUSTUP_TOOLCHAIN");
    command
}

/// Whether rustup does something.
fn rustup(arguments: &[&str]) -> Result<bool> {
    let status = Command::new("rustup")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .context("cannot run rustup")?;
    Ok(status.success())
}

/// Runs what Miri can run: no system call is made there.
pub(crate) fn miri() -> Result<String> {
    let missing =
        "not available here: Miri (rustup component add --toolchain nightly miri rust-src)";
    if !packages::exists("rustup") || !rustup(&["run", "nightly", "cargo", "miri", "--version"])? {
        return Ok(String::from(missing));
    }
    let target = build::target()?.join("miri");
    // The parsers of mapdirect-sys take Miri minutes for their seeds alone; the
    // fuzz targets run them natively.
    let status = under("nightly")
        .args(["miri", "test", "--quiet", "--locked", "--target-dir"])
        .arg(&target)
        .args([
            "--package=mapdirect-proto",
            "--package=mapdirect-model",
            "--lib",
        ])
        // A few of each: it is a hundred times slower.
        .env("PROPTEST_CASES", "2")
        .env("PROPTEST_DISABLE_FAILURE_PERSISTENCE", "1")
        .env("MIRIFLAGS", "-Zmiri-disable-isolation")
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo miri")?;
    ensure!(status.success(), "Miri is not content");
    Ok(String::from("the model and the protocol"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed() -> BTreeSet<String> {
        ["MIT", "Apache-2.0", "Unicode-3.0"]
            .map(str::to_owned)
            .into()
    }

    #[test]
    fn one_alternative_must_be_allowed() {
        for license in [
            "MIT",
            "MIT OR GPL-3.0",
            "Apache-2.0/MIT",
            "(MIT OR GPL-3.0) AND Unicode-3.0",
        ] {
            assert!(is_allowed(license, &allowed()), "{license}");
        }
        for license in [
            "",
            "GPL-3.0",
            "MIT AND GPL-3.0",
            "(MIT OR Apache-2.0) AND GPL-3.0",
        ] {
            assert!(!is_allowed(license, &allowed()), "{license}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let good = || Package {
            name: String::from("one"),
            version: String::from("1.0.0"),
            license: String::from("MIT"),
            source: Some(REGISTRY.to_owned()),
            rust_version: Some(String::from("1.70")),
        };
        assert_eq!(complaint(&good(), &allowed()), None);
        let mut other = good();
        other.license = String::from("GPL-3.0");
        assert!(complaint(&other, &allowed()).is_some());
        let mut other = good();
        other.source = Some(String::from("git+https://example.org/one"));
        assert!(complaint(&other, &allowed()).is_some());
        let mut other = good();
        other.rust_version = Some(String::from("1.999"));
        assert!(complaint(&other, &allowed()).is_some());
        let twice = [good(), good()];
        assert_eq!(more_than_once(&twice, &allowed()).len(), 1);
        assert!(more_than_once(&twice, &[String::from("one")].into()).is_empty());
    }

    #[test]
    fn an_exception_is_for_one_package() {
        let rules = "exceptions = [\n    { allow = [\"MPL-2.0\"], crate = \"one\" },\n]\n";
        assert_eq!(exceptions(rules, "one"), ["MPL-2.0"]);
        assert!(exceptions(rules, "on").is_empty());
    }

    #[test]
    fn lists_are_found() {
        let rules = "[licenses]\nallow = [\n    \"MIT\",\n    # why\n    \"Zlib\",\n]\n";
        let found = list(rules, "allow").unwrap();
        assert_eq!(found.into_iter().collect::<Vec<_>>(), ["MIT", "Zlib"]);
        assert!(list(rules, "skip").is_err());
    }
}
