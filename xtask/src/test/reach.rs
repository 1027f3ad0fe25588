//! Where it has been shown to work: architecture, kernel, gate and filesystem, by
//! what ran there. `docs/reach.md` has nothing in it that was not written by a run.

use super::guest::{self, Guest};
use super::{Arch, BRIEF, Counts, Ran};
use crate::{build, packages};
use anyhow::{Context, Result, ensure};
use clap::Args;
use mapdirect_testkit::Kind;
use mapdirect_testkit::contract::{GATE_VARIABLE, Gate};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

/// Arguments of `reach`.
#[derive(Debug, Args)]
pub(crate) struct ReachArgs {
    /// Only rows that have all of these words, as in `aarch64 6.12 bpf xfs`
    #[arg(value_name = "WORD")]
    words: Vec<String>,
    /// Run nothing: say which rows there are
    #[arg(long)]
    list: bool,
}

const FILE: &str = "docs/reach.md";

const BEFORE: &str = "\
# Reach

Where mapdirect has been shown to work, and nothing else: each row was written by
`cargo xtask reach`, which runs the tests in a virtual machine with one of Debian's
kernels. *Contract* is every operation that could break a pin, and those that must
go on working, in the places that matter (`contract::`, brief). *Hammer* is eight
unprivileged processes that try to slip past the gate while others pin and unpin
(`hammer::`, brief; with the fanotify gate processes that attack at random,
`random::`), with how often they tried; the [soak](soak.md) tries longer.
Machines are emulated, so these are results and no measurements.

";

const AFTER: &str = "
What was tried and is refused, with a reason: on aarch64 with Linux 6.1 the guard cannot
attach its programs to functions of the kernel (fentry, ENOTSUPP) and does not start; with
pages of 16384 bytes (Debian's kernel 6.12 for arm64, flavour 16k) `mapdirect doctor` and the
guard say that the bpf gate is for pages of 4096 bytes. Persistent memory (DAX) is tried on
x86_64, where QEMU has NVDIMMs.
";

const HEAD: [&str; 8] = [
    "architecture",
    "Linux",
    "gate",
    "filesystem",
    "contract",
    "hammer",
    "date",
    "commit",
];

/// A row, before it ran.
#[derive(Clone, Debug)]
struct Row {
    arch: Arch,
    kernel: &'static str,
    gate: Gate,
    filesystem: String,
    nvdimms: usize,
}

impl Row {
    /// What it is about; no two rows have the same.
    fn key(&self) -> [String; 4] {
        [
            self.arch.name().to_owned(),
            self.kernel.to_owned(),
            self.gate.name().to_owned(),
            self.filesystem.clone(),
        ]
    }

    fn guest(&self, tests: &str) -> Guest {
        let mut environment = vec![(BRIEF.0, BRIEF.1.to_owned())];
        environment.push((GATE_VARIABLE, self.gate.name().to_owned()));
        Guest {
            name: format!("{}, {tests}", self.key().join(" ")),
            arch: self.arch,
            kernel: self.kernel,
            // Without BPF among the security modules there is the other gate.
            parameters: match self.gate {
                Gate::Bpf => "",
                Gate::Fanotify => "lsm=landlock,yama,apparmor",
            },
            nvdimms: self.nvdimms,
            environment,
            // The tests at random are one of a filesystem, the others are many.
            filters: vec![match tests {
                "random" => format!("{tests}::{}", self.filesystem),
                _ => format!("{tests}::{}::", self.filesystem),
            }],
            cuts: None,
            time_limit: Duration::from_secs(3600),
        }
    }
}

/// Every row there could be.
fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let places = [
        (Arch::X86_64, "7.3", Gate::Bpf),
        (Arch::X86_64, "7.3", Gate::Fanotify),
        (Arch::X86_64, "6.12", Gate::Bpf),
        (Arch::X86_64, "6.1", Gate::Bpf),
        (Arch::Aarch64, "7.3", Gate::Bpf),
        (Arch::Aarch64, "7.3", Gate::Fanotify),
        (Arch::Aarch64, "6.12", Gate::Bpf),
    ];
    for (arch, kernel, gate) in places {
        let mut row = |filesystem: String, nvdimms| {
            rows.push(Row {
                arch,
                kernel,
                gate,
                filesystem,
                nvdimms,
            });
        };
        for filesystem in ["xfs", "ext4"] {
            row(filesystem.to_owned(), 0);
        }
        if arch == Arch::X86_64 && kernel == "7.3" && gate == Gate::Bpf {
            for kind in Kind::DAX {
                row(kind.to_string(), 2 * Kind::DAX.len());
            }
        }
    }
    rows
}

/// Runs what is asked for, and writes what came of it after each row.
pub(crate) fn run(args: &ReachArgs) -> Result<ExitCode> {
    let wanted: Vec<_> = rows()
        .into_iter()
        .filter(|row| args.words.iter().all(|word| row.key().contains(word)))
        .collect();
    ensure!(
        !wanted.is_empty(),
        "there is no such row: see cargo xtask reach --list"
    );
    if args.list {
        for row in &wanted {
            println!("{}", row.key().join(" "));
        }
        return Ok(ExitCode::SUCCESS);
    }
    packages::require_root()?;
    let mut all_well = true;
    for row in wanted {
        let hammer = match row.gate {
            Gate::Bpf => "hammer",
            // There is no moment to slip past a gate that stops everybody.
            Gate::Fanotify => "random",
        };
        let guests = [row.guest("contract"), row.guest(hammer)];
        let ran = guest::run(&guests, &[]);
        let [contract, hammer] = &ran[..] else {
            anyhow::bail!("two machines ran, and {} told of it", ran.len());
        };
        all_well &= contract.ok && hammer.ok;
        for one in &ran {
            for note in &one.notes {
                println!("  {}: {note}", one.name);
            }
        }
        let mut cells: Vec<_> = row.key().into();
        cells.extend([outcome(contract), outcome(hammer), today()?, commit()?]);
        write(cells)?;
    }
    Ok(if all_well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// A cell of what ran.
fn outcome(ran: &Ran) -> String {
    let Counts {
        passed,
        failed,
        ignored,
    } = ran.counts.unwrap_or_default();
    let tried: Vec<_> = ran
        .notes
        .iter()
        .filter_map(|note| note.strip_prefix("tried: "))
        .collect();
    let tried = if tried.is_empty() {
        String::new()
    } else {
        format!(" ({})", tried.join("; "))
    };
    if ran.ok {
        return format!("{passed} passed{tried}");
    }
    format!("{passed} passed, **{} failed**{tried}", failed + ignored)
}

fn today() -> Result<String> {
    told_by(Command::new("date").args(["-u", "+%Y-%m-%d"]))
}

/// The commit, and whether something was changed since.
fn commit() -> Result<String> {
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        told_by(command.current_dir(build::workspace()).args(arguments))
    };
    let commit = git(&["log", "-1", "--format=%h", "--", "crates", "xtask"])?;
    let changed = git(&["status", "--porcelain", "--", "crates"])?;
    Ok(if changed.is_empty() {
        commit
    } else {
        format!("{commit} and changes")
    })
}

fn told_by(command: &mut Command) -> Result<String> {
    let output = command.output().context("cannot run a command")?;
    ensure!(output.status.success(), "{command:?} failed");
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Puts a row into the table, in the place of the one about the same.
fn write(cells: Vec<String>) -> Result<()> {
    let path: PathBuf = build::workspace().join(FILE);
    let there = fs::read_to_string(&path).unwrap_or_default();
    fs::write(&path, with_row(&there, cells)).with_context(|| format!("cannot write {FILE}"))
}

fn with_row(text: &str, cells: Vec<String>) -> String {
    let mut all: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    let order: Vec<_> = rows().iter().map(Row::key).collect();
    let place = |cells: &[String]| {
        order
            .iter()
            .position(|key| cells.get(..4) == Some(&key[..]))
    };
    let rows = text
        .lines()
        .filter(|line| line.starts_with("| "))
        .map(|line| {
            let cells = line.trim_matches('|').split(" | ");
            cells.map(|cell| cell.trim().to_owned()).collect()
        });
    for row in rows.chain([cells]) {
        // Rows that there are no more are gone, and so is the head.
        if let Some(place) = place(&row) {
            all.insert(place, row);
        }
    }
    let body: Vec<Vec<String>> = all.into_values().collect();
    format!("{BEFORE}{}{AFTER}", markdown(&body))
}

fn markdown(rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = line(&HEAD.map(String::from));
    text.push_str(&line(&HEAD.map(|_| String::from("---"))));
    for row in rows {
        text.push_str(&line(row));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(kernel: &str, contract: &str) -> Vec<String> {
        ["x86_64", kernel, "bpf", "xfs", contract, "", "", ""]
            .map(String::from)
            .into()
    }

    #[test]
    fn a_row_takes_the_place_of_the_one_about_the_same() {
        let text = with_row("", row("6.12", "1 passed"));
        let text = with_row(&text, row("7.3", "2 passed"));
        let text = with_row(&text, row("6.12", "3 passed"));
        let rows: Vec<_> = text
            .lines()
            .filter(|line| line.contains("passed"))
            .collect();
        assert_eq!(rows.len(), 2, "{text}");
        assert!(
            rows[0].contains("7.3") && rows[1].contains("3 passed"),
            "{text}"
        );
        // What nobody runs is not kept.
        assert_eq!(with_row(&text, row("5.4", "1 passed")), text);
    }

    #[test]
    fn no_two_rows_are_about_the_same() {
        let mut keys: Vec<_> = rows().iter().map(Row::key).collect();
        let count = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), count);
    }
}
