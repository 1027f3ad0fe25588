//! Which packages the programs for another machine need: what dpkg-shlibdeps finds
//! out for this one, by the symbols that packages of that architecture say they
//! have.

use super::target::run;
use crate::arch::Arch;
use crate::vm;
use crate::vm::version::Version;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// A library: its package, and since when that has each symbol.
#[derive(Debug, Default)]
struct Library {
    package: String,
    symbols: BTreeMap<String, Version>,
}

/// The packages, as in `libc6 (>= 2.34), zlib1g (>= 1:1.2.0)`.
pub(super) fn of(arch: Arch, programs: &[PathBuf]) -> Result<String> {
    let mut libraries = BTreeMap::new();
    let directory = vm::userland(arch)?.join("var/lib/dpkg/info");
    for entry in fs::read_dir(&directory)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "symbols")
        {
            parse(&fs::read_to_string(path)?, &mut libraries);
        }
    }
    let mut needed: BTreeMap<String, Version> = BTreeMap::new();
    for program in programs {
        let read = |what: &str| run(Command::new("readelf").args(["-W", what]).arg(program));
        let names = names(&read("-d")?);
        let symbols = read("--dyn-syms")?;
        for name in &names {
            let library: &Library = libraries
                .get(name)
                .with_context(|| format!("no package is known to have {name}"))?;
            let mut used = undefined(&symbols)
                .filter_map(|symbol| library.symbols.get(symbol))
                .peekable();
            ensure!(
                used.peek().is_some(),
                "{} names {name} and uses nothing of it",
                program.display()
            );
            let newest = used.max().context("no symbol")?;
            let least = needed
                .entry(library.package.clone())
                .or_insert_with(|| newest.clone());
            if newest > least {
                *least = newest.clone();
            }
        }
    }
    Ok(needed
        .iter()
        .map(|(package, version)| format!("{package} (>= {version})"))
        .collect::<Vec<_>>()
        .join(", "))
}

/// Reads deb-symbols(5), which begins each library with its name and package.
fn parse(text: &str, libraries: &mut BTreeMap<String, Library>) {
    let mut current: Option<&mut Library> = None;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if line.starts_with(' ') {
            let symbol = words.next().zip(words.next());
            if let (Some(library), Some((symbol, since))) = (current.as_mut(), symbol) {
                let since = Version::new(since);
                library.symbols.insert(symbol.to_owned(), since);
            }
        } else if !line.starts_with(['*', '|']) {
            current = match (words.next(), words.next()) {
                (Some(name), Some(package)) => {
                    let library = libraries.entry(name.to_owned()).or_default();
                    package.clone_into(&mut library.package);
                    Some(library)
                }
                _ => None,
            };
        }
    }
}

/// The libraries that `readelf -d` says a program is linked with.
fn names(dynamic: &str) -> Vec<String> {
    let needed = dynamic.lines().filter(|line| line.contains("(NEEDED)"));
    needed
        .filter_map(|line| Some(line.split_once('[')?.1.split_once(']')?.0.to_owned()))
        .collect()
}

/// The symbols that `readelf --dyn-syms` says somebody else has to have, with
/// their versions.
fn undefined(symbols: &str) -> impl Iterator<Item = &str> {
    symbols.lines().filter_map(|line| {
        let mut words = line.split_whitespace().skip(6);
        (words.next() == Some("UND"))
            .then(|| words.next())
            .flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_is_looked_up() {
        let mut libraries = BTreeMap::new();
        parse(
            "libc.so.6 libc6 #MINVER#\n| libc6 (>> 2.36)\n* Build-Depends-Package: libc6-dev\n \
             memcpy@GLIBC_2.17 2.17\n fstat@GLIBC_2.33 2.33 1\n",
            &mut libraries,
        );
        let library = &libraries["libc.so.6"];
        assert_eq!(library.package, "libc6");
        assert_eq!(library.symbols["fstat@GLIBC_2.33"], Version::new("2.33"));
        let symbols = "  1: 0 0 FUNC GLOBAL DEFAULT UND fstat@GLIBC_2.33 (3)\n  2: 5 8 FUNC GLOBAL \
                       DEFAULT 12 main\n";
        let symbols = symbols.replace("GLOBAL \n", "GLOBAL ");
        assert_eq!(
            undefined(&symbols).collect::<Vec<_>>(),
            ["fstat@GLIBC_2.33"]
        );
        let dynamic = " 0x1 (NEEDED)  Shared library: [libc.so.6]\n 0xe (SONAME) [x]\n";
        assert_eq!(names(dynamic), ["libc.so.6"]);
    }
}
