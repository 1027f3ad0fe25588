//! Manual pages. Those of the command are made from the description the command
//! line is parsed by, so that the two cannot drift apart; the others are written
//! by hand. All of them must read well to `man` and to `mandoc`.

mod page;
mod roff;

use crate::build::workspace;
use crate::packages;
use anyhow::{Context, Result, ensure};
use clap::{Args, CommandFactory};
use mapdirect_cli::args::Mapdirect;
use mapdirect_cli::pages;
use mapdirect_testkit::writers;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

/// Arguments of `man`.
#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Write nothing: check that the pages are those of the command line, and that man and mandoc
    /// have nothing to say of any
    #[arg(long)]
    check: bool,
}

/// Writes the pages, or checks them.
pub(crate) fn run(args: &ManArgs) -> Result<ExitCode> {
    if args.check {
        packages::install_missing(&packages::FOR_MANUAL)?;
        check()?;
        println!("{} pages are as they should be", files()?.len());
        return Ok(ExitCode::SUCCESS);
    }
    write()
}

fn directory() -> PathBuf {
    workspace().join("man")
}

/// Name and text of every page that is made of the command line.
fn made() -> Result<Vec<(String, String)>> {
    let mut root = Mapdirect::command();
    root.build();
    let mut made = Vec::new();
    for page in pages::PAGES {
        let command = if page.verb.is_empty() {
            Some(&root)
        } else {
            root.find_subcommand(page.verb)
        };
        let command = command.with_context(|| format!("there is no verb {}", page.verb))?;
        let name = format!("{}.{}", page::name(page.verb), page::section(page.verb));
        made.push((name, page::render(command, page)));
    }
    Ok(made)
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

/// The section of a page: 1 of `mapdirect.1`, 2 of one in `2const`.
pub(crate) fn section(name: &str) -> Result<char> {
    let (_, section) = name.rsplit_once('.').context("a page without a section")?;
    let digit = section.chars().next().filter(char::is_ascii_digit);
    digit.with_context(|| format!("{name} is in no section"))
}

/// All pages there are.
pub(crate) fn files() -> Result<Vec<PathBuf>> {
    let mut files: Vec<_> = fs::read_dir(directory())?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    files.sort();
    Ok(files)
}

/// Writes the pages.
fn write() -> Result<ExitCode> {
    fs::create_dir_all(directory())?;
    for (name, text) in made()? {
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

/// Checks that the pages in the tree are those of this command line, that they
/// have what every page has, and that their readers have nothing to say.
pub(crate) fn check() -> Result<()> {
    for (name, text) in made()? {
        let path = directory().join(&name);
        let there = fs::read_to_string(&path).unwrap_or_default();
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
    let mut complaints = Vec::new();
    let pages = files()?;
    for page in &pages {
        complaints.extend(complaints_of(page, &pages)?);
    }
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(())
}

/// What is wrong with a page.
fn complaints_of(page: &Path, pages: &[PathBuf]) -> Result<Vec<String>> {
    let name = page.file_name().and_then(|name| name.to_str());
    let name = name.context("a page without a name")?;
    let text = fs::read_to_string(page)?;
    let mut complaints = Vec::new();
    let is_of_a_verb = name.starts_with("mapdirect") && name.ends_with(['1', '8']);
    let sections: &[&str] = if is_of_a_verb {
        &["NAME", "SYNOPSIS", "EXAMPLES", "EXIT STATUS", "SEE ALSO"]
    } else {
        &["NAME", "SEE ALSO"]
    };
    for section in sections {
        let headings = [format!(".SH {section}\n"), format!(".SH \"{section}\"\n")];
        if !headings.iter().any(|heading| text.contains(heading)) {
            complaints.push(format!("man/{name}: there is no section {section}"));
        }
    }
    for (named, section) in references(&text) {
        let is_ours =
            named.starts_with("mapdirect-") || named == "mapdirect" || named == "MAP_DIRECT";
        let file = format!("{named}.{section}");
        if is_ours && !pages.iter().any(|page| page.ends_with(&file)) {
            complaints.push(format!("man/{name}: there is no page {named}({section})"));
        }
    }
    let man = Command::new("man")
        .args(["--warnings", "-E", "UTF-8", "-l"])
        .arg(page)
        .env("MANWIDTH", "80")
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .output()
        .context("cannot run man (apt-get install man-db)")?;
    let said = String::from_utf8_lossy(&man.stderr).into_owned();
    complaints.extend(said.lines().map(|line| format!("man/{name}: {line}")));
    ensure!(man.status.success(), "man cannot read man/{name}");
    let mandoc = Command::new("mandoc")
        .args(["-T", "lint", "-W", "warning"])
        .arg(page)
        .stdin(Stdio::null())
        .output()
        .context("cannot run mandoc (apt-get install mandoc)")?;
    let said = String::from_utf8_lossy(&mandoc.stdout).into_owned();
    complaints.extend(said.lines().map(str::to_owned));
    Ok(complaints)
}

/// The pages that a page names: `.BR name (section)`, `\fBname\fR(section)`.
fn references(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for line in text.lines() {
        let plain = line
            .replace("\\-", "-")
            .replace("\\fB", "")
            .replace("\\fR", "")
            .replace(" (", "(");
        for word in plain.split_whitespace() {
            let Some((name, rest)) = word.split_once('(') else {
                continue;
            };
            let Some((section, _)) = rest.split_once(')') else {
                continue;
            };
            let kind = section.trim_start_matches(|c: char| c.is_ascii_digit());
            let digits = section.len() - kind.len();
            if digits == 1 && kind.chars().all(|c| c.is_ascii_lowercase()) {
                let name = name.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
                found.push((name.to_owned(), section.to_owned()));
            }
        }
    }
    found
}
