//! The file that says who has written what is in a package, and under which
//! conditions it may be passed on.
//!
//! The command and the libraries have other people's crates in them, whose
//! licences ask that their copyright notices go along.

use crate::arch::Arch;
use crate::build;
use crate::dependencies::packages_for;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// Texts of licences that Debian has not on every machine.
const TEXTS: [(&str, &str); 5] = [
    ("BSD-2-Clause", include_str!("licences/BSD-2-Clause")),
    ("BSL-1.0", include_str!("licences/BSL-1.0")),
    ("MIT", include_str!("licences/MIT")),
    ("Unlicense", include_str!("licences/Unlicense")),
    ("Zlib", include_str!("licences/Zlib")),
];

/// Licences that every Debian system has, and where.
const COMMON: [(&str, &str); 3] = [
    ("Apache-2.0", "Apache-2.0"),
    ("GPL-2.0", "GPL-2"),
    ("LGPL-2.1-only", "LGPL-2.1"),
];

/// A crate that is built in.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Crate {
    name: String,
    version: String,
    license: String,
}

/// The text of `/usr/share/doc/PACKAGE/copyright`, in Debian's format 1.0.
pub(super) fn text(arch: Arch, packages: &[&str]) -> Result<String> {
    let mut text = String::from(
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\
         Upstream-Name: mapdirect\n\
         Comment: What Files calls vendor/ is built into the programs and libraries.\n\n\
         Files: *\nCopyright: 2026 The mapdirect authors\nLicense: MIT or Apache-2.0\n\n",
    );
    let mut used: BTreeSet<String> = ["MIT", "Apache-2.0"].map(str::to_owned).into();
    if packages.contains(&"mapdirect-cli") {
        text.push_str(
            "Files: crates/mapdirect-guard/src/gate/bpf/prog/*\n\
             Copyright: 2026 The mapdirect authors\n\
             License: MIT or Apache-2.0 or GPL-2.0\n\n\
             Files: vendor/libbpf/*\nCopyright: 2015-2026 The Libbpf Authors\n\
             License: BSD-2-Clause or LGPL-2.1-only\n\n",
        );
        used.extend(["GPL-2.0", "BSD-2-Clause", "LGPL-2.1-only"].map(str::to_owned));
    }
    if !packages.is_empty() {
        text.push_str(
            "Files: vendor/std/*\nCopyright: 2010-2026 The Rust Project contributors\n\
             License: MIT or Apache-2.0\n\n",
        );
        let sources = sources(arch)?;
        for one in built_in(arch, packages)? {
            let key = (one.name.clone(), one.version.clone());
            let (directory, authors) = sources
                .get(&key)
                .with_context(|| format!("cargo does not say where {} is", one.name))?;
            let mut holders = copyright_lines(directory)?;
            if holders.is_empty() {
                holders.insert(if authors.is_empty() {
                    format!("The authors of {}", one.name)
                } else {
                    authors.clone()
                });
            }
            let holders: Vec<_> = holders.into_iter().collect();
            let license = in_debian(&one.license);
            used.extend(names(&license).map(str::to_owned));
            let _ = write!(
                text,
                "Files: vendor/{}-{}/*\nCopyright: {}\nLicense: {license}\n\n",
                one.name,
                one.version,
                holders.join("\n ")
            );
        }
    }
    for name in used {
        let _ = write!(text, "License: {name}\n{}\n", full(&name)?);
    }
    Ok(text.trim_end().to_owned() + "\n")
}

/// An expression of SPDX's as Debian writes it.
fn in_debian(license: &str) -> String {
    // One with an exception is never the only one, and Debian has no name for it.
    let parts = license.replace('/', " OR ");
    let parts: Vec<_> = parts
        .split(" OR ")
        .filter(|part| !part.contains(" WITH "))
        .collect();
    parts
        .join(" or ")
        .replace(") AND ", ", and ")
        .replace(" AND ", " and ")
        .replace(['(', ')'], "")
}

/// The licences in an expression.
fn names(license: &str) -> impl Iterator<Item = &str> {
    license
        .split([' ', ','])
        .filter(|word| !["", "or", "and"].contains(word))
}

/// The text of a licence, as a field's value.
fn full(name: &str) -> Result<String> {
    if let Some((_, file)) = COMMON.iter().find(|(common, _)| *common == name) {
        return Ok(format!(
            " On Debian systems the text is in /usr/share/common-licenses/{file}.\n"
        ));
    }
    let (_, text) = TEXTS
        .iter()
        .find(|(known, _)| *known == name)
        .with_context(|| format!("xtask/src/dist/licences has no text of {name}"))?;
    let mut value = String::new();
    for line in text.lines() {
        let line = line.trim_end();
        value.push_str(if line.is_empty() { " ." } else { " " });
        value.push_str(line);
        value.push('\n');
    }
    Ok(value)
}

/// The crates of others that packages of the workspace have in them.
fn built_in(arch: Arch, packages: &[&str]) -> Result<BTreeSet<Crate>> {
    let mut cargo = build::cargo(&[
        "tree",
        "--locked",
        "--edges=normal,no-proc-macro",
        "--prefix=none",
    ]);
    cargo.args(["--target", &arch.rust(), "--format={p}\t{l}"]);
    for package in packages {
        cargo.args(["--package", package]);
    }
    let output = cargo
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "cargo tree failed");
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(parse)
        .collect())
}

/// Reads a line such as `libc v0.2.186<tab>MIT OR Apache-2.0 (*)`; nothing for a
/// crate of the workspace, nor for one that only the compiler runs.
fn parse(line: &str) -> Option<Crate> {
    let (package, license) = line.split_once('\t')?;
    let mut words = package.split(' ');
    let (name, version) = (words.next()?, words.next()?.strip_prefix('v')?);
    if words.any(|word| word.starts_with("(/") || word == "(proc-macro)") {
        return None;
    }
    Some(Crate {
        name: name.to_owned(),
        version: version.to_owned(),
        license: license.trim_end_matches(" (*)").to_owned(),
    })
}

/// Where the source of each crate is, and who its authors say they are.
fn sources(arch: Arch) -> Result<BTreeMap<(String, String), (PathBuf, String)>> {
    Ok(packages_for(&arch.rust())?
        .iter()
        .filter_map(|package| {
            let text = |key: &str| package[key].as_str().map(str::to_owned);
            let manifest = PathBuf::from(text("manifest_path")?);
            let authors: Vec<_> = package["authors"].as_array().map_or_else(Vec::new, |all| {
                all.iter().filter_map(Value::as_str).collect()
            });
            let directory = manifest.parent()?.to_owned();
            Some((
                (text("name")?, text("version")?),
                (directory, authors.join(", ")),
            ))
        })
        .collect())
}

/// The lines of a crate's licences that say who has a copyright.
fn copyright_lines(directory: &Path) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().to_uppercase();
        let is_one = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE"];
        // These have the copyright of their text in them.
        let is_of_text = ["GPL", "APACHE"].iter().any(|text| name.contains(text));
        let is_one = is_one.iter().any(|one| name.starts_with(one)) && !is_of_text;
        if is_one && entry.file_type()?.is_file() {
            let text = String::from_utf8_lossy(&fs::read(entry.path())?).into_owned();
            found.extend(text.lines().filter_map(copyright));
        }
    }
    Ok(found)
}

/// Whose copyright a line tells of.
fn copyright(line: &str) -> Option<String> {
    let line = line.trim().trim_start_matches(['/', '*', '#', ' ']);
    let rest = line.strip_prefix("Copyright ")?;
    let rest = ["(c) ", "(C) ", "© "]
        .iter()
        .find_map(|sign| rest.strip_prefix(sign))
        .unwrap_or(rest);
    let rest = rest.trim_end_matches('.').trim();
    // The Apache licence has a blank form, and speaks of notices.
    let begins_well = rest.starts_with(|c: char| c.is_ascii_digit())
        || line.contains("(c)")
        || line.contains("(C)")
        || line.contains('©')
        || rest.starts_with("The ");
    let is_form = ["[", "{yyyy}", "<year>", "year name of author"]
        .iter()
        .any(|blank| rest.contains(blank));
    // Some have the names on the next line.
    let has_name = rest.contains(char::is_alphabetic);
    (begins_well && has_name && !is_form).then(|| rest.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_a_copyright() {
        for (line, holder) in [
            ("Copyright (c) 2014 Somebody", Some("2014 Somebody")),
            ("   Copyright 2016 Somebody.", Some("2016 Somebody")),
            ("Copyright © 1991 Unicode, Inc.", Some("1991 Unicode, Inc")),
            ("   Copyright [yyyy] [name of copyright owner]", None),
            ("Copyright License. Subject to the terms", None),
            ("Copyright (c) 2016--2023", None),
            ("Copyright (c) <year> <owner>", None),
            ("a copy", None),
        ] {
            assert_eq!(copyright(line).as_deref(), holder, "{line}");
        }
    }

    #[test]
    fn crates_of_others_are_told_apart() {
        let line = "libc v0.2.186\tMIT OR Apache-2.0 (*)";
        let found = parse(line).unwrap();
        assert_eq!(
            (&*found.name, &*found.license),
            ("libc", "MIT OR Apache-2.0")
        );
        assert_eq!(parse("mapdirect v0.2.0 (/work/mapdirect)\tMIT"), None);
        assert_eq!(parse("serde_derive v1.0.0 (proc-macro)\tMIT"), None);
    }

    #[test]
    fn licences_have_their_texts() {
        let license = in_debian("(MIT OR Apache-2.0) AND Zlib");
        assert_eq!(license, "MIT or Apache-2.0, and Zlib");
        let several = in_debian("Apache-2.0 WITH LLVM-exception OR Apache-2.0/MIT");
        assert_eq!(several, "Apache-2.0 or MIT");
        for name in names(&license).chain(["Unlicense", "BSD-2-Clause", "GPL-2.0"]) {
            assert!(full(name).is_ok(), "{name}");
        }
        assert!(full("none such").is_err());
    }
}
