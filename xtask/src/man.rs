//! Manual pages, made from the description the command line is parsed by, so
//! that the two cannot drift apart.

use crate::build::workspace;
use anyhow::{Context, Result, ensure};
use clap::CommandFactory;
use mapdirect_cli::args::Mapdirect;
use mapdirect_testkit::writers;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

fn directory() -> PathBuf {
    workspace().join("man")
}

/// Name and text of every page.
fn pages() -> Result<Vec<(String, Vec<u8>)>> {
    let mut root = Mapdirect::command();
    root.build();
    let verbs: Vec<_> = root.get_subcommands().cloned().collect();
    let mut pages = Vec::new();
    for command in std::iter::once(root).chain(verbs) {
        if command.get_name() == "help" {
            continue;
        }
        let name = command
            .get_display_name()
            .unwrap_or(command.get_name())
            .replace(' ', "-");
        let mut text = Vec::new();
        clap_mangen::Man::new(command)
            .manual("mapdirect")
            // The version is in `mapdirect --version`; a page that carried
            // it would change with every release and nothing else.
            .source("mapdirect")
            .render(&mut text)?;
        pages.push((format!("{name}.1"), text));
    }
    Ok(pages)
}

/// The page that is written by hand, but for the table of writers that tests
/// have tried.
fn contract_page() -> Result<(PathBuf, String, String)> {
    let path = directory().join("mapdirect.7");
    let there =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let wanted = writers::in_page(&there);
    Ok((path, there, wanted))
}

/// All pages there are.
pub(crate) fn files() -> Result<Vec<PathBuf>> {
    let mut files: Vec<_> = fs::read_dir(directory())?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    files.sort();
    Ok(files)
}

/// The section of a page: 1 of `mapdirect.1`, 2 of one in `2const`.
pub(crate) fn section(name: &str) -> Result<char> {
    let (_, section) = name.rsplit_once('.').context("a page without a section")?;
    let digit = section.chars().next().filter(char::is_ascii_digit);
    digit.with_context(|| format!("{name} is in no section"))
}

/// Writes the pages.
pub(crate) fn write() -> Result<ExitCode> {
    fs::create_dir_all(directory())?;
    for (name, text) in pages()? {
        let path = directory().join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        println!("{}", path.display());
    }
    let (path, there, wanted) = contract_page()?;
    if there != wanted {
        fs::write(&path, wanted)?;
        println!("{}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Checks that the pages in the tree are those of this command line.
pub(crate) fn check() -> Result<()> {
    for (name, text) in pages()? {
        let path = directory().join(&name);
        let there = fs::read(&path).unwrap_or_default();
        ensure!(
            there == text,
            "man/{name} is not what the command line says; run `cargo xtask man`"
        );
    }
    let (_, there, wanted) = contract_page()?;
    ensure!(
        there == wanted,
        "man/mapdirect.7 has not the table of writers that is tested; run `cargo xtask man`"
    );
    Ok(())
}
