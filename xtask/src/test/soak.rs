//! The soak: ten million hostile operations over all gates, kernels and
//! filesystems, in pieces that go on where they were stopped.
//!
//! How far it got is kept in the target directory, for each commit; what
//! really ran is written to `docs/soak.md` when asked for.

mod report;
mod state;

use super::guest::{self, Guest};
use super::{Ran, gate_in_kernel, persistent_memory, tests};
use crate::{build, packages};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use mapdirect_testkit::contract::{GATE_VARIABLE, Gate};
use mapdirect_testkit::hammer::TRIES_VARIABLE;
use mapdirect_testkit::legal::{COUNTED, SECONDS_VARIABLE};
use mapdirect_testkit::{Kind, disk};
use state::{Done, State};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Arguments of `soak`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each piece runs in parts. What has run is kept in target/soak, for each commit, so a soak that was \
stopped goes on where it was. 10,000,000 hostile operations take many hours where processors are \
emulated.")]
pub(crate) struct SoakArgs {
    /// Only pieces whose names contain this
    #[arg(value_name = "PIECE")]
    piece: Option<String>,
    /// Begin no part of a piece after so many minutes
    #[arg(long, value_name = "MINUTES")]
    minutes: Option<u64>,
    /// How many virtual machines run at a time
    #[arg(long, value_name = "NUMBER", default_value = "2",
          value_parser = clap::value_parser!(u8).range(1..=64))]
    machines: u8,
    /// Run nothing: say how far it got
    #[arg(long, conflicts_with_all = ["report", "minutes"])]
    list: bool,
    /// Run nothing: write what ran to docs/soak.md
    #[arg(long, conflicts_with = "minutes")]
    report: bool,
}

/// What a piece is made of.
#[derive(Clone, Debug)]
enum Work {
    /// Random attacks on this machine.
    Here(Kind),
    /// Legal load on this machine.
    Load(Kind),
    /// Tests in a virtual machine.
    There {
        kernel: &'static str,
        parameters: &'static str,
        nvdimms: usize,
        filters: Vec<String>,
    },
    /// Every test of a guest, once: what it does is not counted in
    /// operations.
    Once(Box<Guest>),
}

/// A part of the soak with a goal of its own.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    name: String,
    work: Work,
    /// Operations to make, or seconds of legal load; 1 for what is done once.
    goal: u64,
}

impl Piece {
    /// Whether it is made of hostile operations.
    fn is_counted(&self) -> bool {
        !matches!(self.work, Work::Once(_)) && !self.is_legal()
    }

    /// Whether it is legal load.
    fn is_legal(&self) -> bool {
        match &self.work {
            Work::Load(_) => true,
            Work::There { filters, .. } => filters.iter().any(|filter| filter.starts_with(LEGAL)),
            Work::Here(_) | Work::Once(_) => false,
        }
    }

    /// Whether it runs on this machine.
    fn is_here(&self) -> bool {
        matches!(self.work, Work::Here(_) | Work::Load(_))
    }

    /// What its goal is a number of.
    fn unit(&self) -> &'static str {
        if self.is_legal() {
            "seconds"
        } else if self.is_counted() {
            "operations"
        } else {
            "once"
        }
    }
}

/// The tests that are legal load.
const LEGAL: &str = "legal::";
/// Seconds of it: an hour, and those of a part.
const HOUR: u64 = 3600;
const LEGAL_PART: u64 = 300;

/// Operations of one part of a piece.
const PART: u64 = 100_000;
/// Without `bpf`, and otherwise as Debian has it.
const WITHOUT_BPF: &str = "lsm=landlock,yama,apparmor";

/// How kernels are booted for the hammers, and how many tries they make. One
/// that preempts programs needs `bpf` in `lsm=`, which a test says.
const HAMMERED: [(&str, &str, &str); 8] = [
    ("7.3", "", ""),
    ("7.3", "preempt=full", ", preempt=full"),
    ("6.12", "", ""),
    ("6.12", "preempt=full", ", preempt=full"),
    ("6.12", WITHOUT_BPF, ", no bpf in lsm="),
    ("6.1", "", ""),
    ("6.1", "preempt=full", ", preempt=full"),
    ("6.1", WITHOUT_BPF, ", no bpf in lsm="),
];
const HAMMER_TRIES: u64 = 300_000;
/// Those that say that they are not supported: kernel and parameters.
const UNSUPPORTED: [(&str, &str); 3] = [
    ("7.3", WITHOUT_BPF),
    ("6.12", "preempt=full lsm=landlock,yama,apparmor"),
    ("6.1", "preempt=full lsm=landlock,yama,apparmor"),
];

/// All of them.
fn pieces() -> Vec<Piece> {
    let mut pieces = Vec::new();
    for kind in [Kind::XFS, Kind::XFS_PLAIN, Kind::EXT4] {
        pieces.push(Piece {
            name: format!("fanotify gate, this kernel, {kind}: random"),
            work: Work::Here(kind),
            goal: 1_800_000,
        });
    }
    for (kernel, parameters, how) in HAMMERED {
        pieces.push(Piece {
            name: format!("bpf gate, Linux {kernel}{how}, XFS and ext4: hammers"),
            work: Work::There {
                kernel,
                parameters,
                nvdimms: 0,
                filters: vec![String::from("hammer::")],
            },
            goal: HAMMER_TRIES,
        });
    }
    for kernel in super::KERNELS {
        for kind in [Kind::XFS, Kind::XFS_PLAIN, Kind::EXT4] {
            pieces.push(Piece {
                name: format!("bpf gate, Linux {kernel}, {kind}: random"),
                work: Work::There {
                    kernel,
                    parameters: "",
                    nvdimms: 0,
                    filters: vec![format!("random::{kind}")],
                },
                goal: 200_000,
            });
        }
    }
    for kind in [Kind::XFS, Kind::EXT4] {
        pieces.push(Piece {
            name: format!("fanotify gate, this kernel, {kind}: an hour of legal load"),
            work: Work::Load(kind),
            goal: HOUR,
        });
        pieces.push(Piece {
            name: format!("bpf gate, Linux 7.3, {kind}: an hour of legal load"),
            work: Work::There {
                kernel: "7.3",
                parameters: "",
                nvdimms: 0,
                filters: vec![format!("{LEGAL}{kind}")],
            },
            goal: HOUR,
        });
    }
    for (what, filter) in [("hammers", "hammer::"), ("random", "random::")] {
        pieces.push(Piece {
            name: format!("bpf gate, Linux 7.3, DAX: {what}"),
            work: Work::There {
                kernel: "7.3",
                parameters: "",
                nvdimms: 2 * Kind::DAX.len(),
                filters: vec![String::from(filter)],
            },
            goal: 300_000,
        });
    }
    for (kernel, parameters) in UNSUPPORTED {
        let filters = vec![String::from("gate::without-lsm")];
        let mut guest = gate_in_kernel(kernel, "", 0, filters);
        guest.parameters = parameters;
        guest.name = format!("Linux {kernel} with {parameters} is refused");
        pieces.push(once(guest));
    }
    pieces.extend(persistent_memory(false).into_iter().map(once));
    pieces.extend(super::conformance().into_iter().map(once));
    pieces
}

fn once(guest: Guest) -> Piece {
    Piece {
        name: format!("once: {}", guest.name),
        work: Work::Once(Box::new(guest)),
        goal: 1,
    }
}

/// Goes on with it.
pub(crate) fn run(args: &SoakArgs) -> Result<ExitCode> {
    let pieces = pieces();
    let place = build::target()?.join("soak");
    let mut state = State::load(&place)?;
    if args.report {
        let path = build::workspace().join("docs/soak.md");
        report::write(&path, &state, &pieces)?;
        println!("{}", path.display());
        return Ok(ExitCode::SUCCESS);
    }
    if args.list {
        list(&state, &pieces);
        return Ok(ExitCode::SUCCESS);
    }
    packages::require_root()?;
    packages::install_missing(&packages::FOR_TESTS)?;
    packages::install_for_bpf()?;
    disk::remove_stale();
    let wanted = |piece: &&Piece| match &args.piece {
        Some(part) => piece.name.contains(part.as_str()),
        None => true,
    };
    let wanted: Vec<&Piece> = pieces.iter().filter(wanted).collect();
    ensure!(!wanted.is_empty(), "there is no such piece; see --list");
    let started = Instant::now();
    let in_time = || {
        args.minutes
            .is_none_or(|minutes| started.elapsed() < Duration::from_secs(60 * minutes))
    };
    // What failed is not tried again by the same soak.
    let mut failed: Vec<String> = Vec::new();
    let mut all: Vec<Ran> = Vec::new();
    while in_time() {
        let next = next(&state, &wanted, &failed, args.machines.into());
        if next.is_empty() {
            break;
        }
        // What fits in no part any more would be counted for another commit.
        state.check_commit()?;
        for (piece, seed, ran) in part(&state, &next)? {
            let done = done(piece, seed, &ran);
            if !ran.ok {
                failed.push(piece.name.clone());
            }
            state.add(&piece.name, &done)?;
            progress(&state, &pieces, piece);
            all.push(ran);
        }
    }
    disk::remove_stale();
    list(&state, &pieces);
    Ok(super::report(&all))
}

/// The pieces to go on with: one on this machine, or so many in virtual ones.
/// Those that got least far come first, so that a soak that is stopped has
/// tried a little of everything.
fn next<'a>(
    state: &State,
    wanted: &[&'a Piece],
    failed: &[String],
    machines: usize,
) -> Vec<&'a Piece> {
    let mut left: Vec<&Piece> = wanted
        .iter()
        .copied()
        .filter(|piece| state.of(&piece.name).operations < piece.goal)
        .filter(|piece| !failed.contains(&piece.name))
        .collect();
    left.sort_by_key(|piece| state.of(&piece.name).operations * 100 / piece.goal);
    match left.first() {
        Some(first) if first.is_here() => vec![*first],
        _ => {
            let there = left.iter().filter(|piece| !piece.is_here());
            there.copied().take(machines).collect()
        }
    }
}

/// Runs a part of each piece.
fn part<'a>(state: &State, pieces: &[&'a Piece]) -> Result<Vec<(&'a Piece, u64, Ran)>> {
    let seeds: Vec<u64> = pieces
        .iter()
        .map(|piece| 20_171_109 + 1000 * state.of(&piece.name).parts)
        .collect();
    let left = |piece: &Piece| {
        let left = piece.goal.saturating_sub(state.of(&piece.name).operations);
        left.min(if piece.is_legal() { LEGAL_PART } else { PART })
    };
    if let [piece] = pieces
        && piece.is_here()
    {
        let ran = here(piece, seeds[0], left(piece))?;
        return Ok(vec![(*piece, seeds[0], ran)]);
    }
    let guests = pieces
        .iter()
        .zip(&seeds)
        .filter_map(|(piece, seed)| piece.guest(*seed, left(piece)));
    let ran = guest::run(&guests.collect::<Vec<_>>(), &[]);
    ensure!(ran.len() == pieces.len(), "a machine said nothing");
    let all = pieces.iter().zip(seeds).zip(ran);
    Ok(all
        .map(|((piece, seed), ran)| (*piece, seed, ran))
        .collect())
}

impl Piece {
    fn guest(&self, seed: u64, operations: u64) -> Option<Guest> {
        match &self.work {
            Work::Here(_) | Work::Load(_) => None,
            Work::Once(guest) => Some((**guest).clone()),
            Work::There {
                kernel,
                parameters,
                nvdimms,
                filters,
            } => {
                let mut guest = gate_in_kernel(kernel, "", *nvdimms, filters.clone());
                guest.name.clone_from(&self.name);
                guest.parameters = parameters;
                let amount = if self.is_legal() {
                    (SECONDS_VARIABLE, operations.to_string())
                } else {
                    // The operations of a part are divided among the tests:
                    // two filesystems, on one processor and on two.
                    (TRIES_VARIABLE, operations.div_ceil(4).max(1).to_string())
                };
                guest.environment = vec![
                    (GATE_VARIABLE, Gate::Bpf.name().to_owned()),
                    amount,
                    ("MAPDIRECT_SEED", seed.to_string()),
                ];
                Some(guest)
            }
        }
    }
}

/// The random attack, or the legal load, on a filesystem of this machine.
fn here(piece: &Piece, seed: u64, seconds: u64) -> Result<Ran> {
    let test = match &piece.work {
        Work::Load(kind) => format!("{LEGAL}{kind}"),
        Work::Here(kind) => format!("random::{kind}"),
        Work::There { .. } | Work::Once(_) => bail!("{} is not for this machine", piece.name),
    };
    let mut command = build::cargo(&[
        "test",
        "--quiet",
        "--package=mapdirect-cli",
        "--test=native",
        "--",
        "--include-ignored",
        "--exact",
        &test,
    ]);
    command.env("MAPDIRECT_SEED", seed.to_string());
    command.env(SECONDS_VARIABLE, seconds.to_string());
    tests(&piece.name, command)
}

/// What came of a part.
fn done(piece: &Piece, seed: u64, ran: &Ran) -> Done {
    let counted = |what: &str| -> u64 {
        let of = |note: &String| {
            let rest = note.strip_prefix("tried: ")?;
            let (number, said) = rest.split_once(' ')?;
            (said == what).then(|| number.parse::<u64>().ok()).flatten()
        };
        ran.notes.iter().filter_map(of).sum()
    };
    let operations = if piece.is_legal() {
        // What failed was not legal load throughout.
        if ran.ok { counted(COUNTED) } else { 0 }
    } else if piece.is_counted() {
        counted("hammer tries") + counted("random attacks")
    } else {
        u64::from(ran.ok)
    };
    let counts = ran.counts.unwrap_or_default();
    Done {
        operations,
        parts: 1,
        tests: counts.passed,
        failures: u64::from(!ran.ok),
        seed,
        seconds: ran.took.as_secs(),
        notes: if ran.ok {
            Vec::new()
        } else {
            ran.notes.clone()
        },
        ..Done::default()
    }
}

/// Says how far a piece and all of them are.
fn progress(state: &State, pieces: &[Piece], piece: &Piece) {
    let of = state.of(&piece.name);
    let (done, goal) = total(state, pieces);
    println!(
        "━━━ {}: {} of {}; all: {done} of {goal} operations, {}.{} %",
        piece.name,
        of.operations.min(piece.goal),
        piece.goal,
        done * 100 / goal,
        done * 1000 / goal % 10,
    );
}

/// Operations made, and to be made.
fn total(state: &State, pieces: &[Piece]) -> (u64, u64) {
    let counted = pieces.iter().filter(|piece| piece.is_counted());
    counted.fold((0, 0), |(done, goal), piece| {
        (done + state.of(&piece.name).operations, goal + piece.goal)
    })
}

fn list(state: &State, pieces: &[Piece]) {
    println!("━━━ the soak of {}", state.commit());
    for piece in pieces {
        let of = state.of(&piece.name);
        let failed = if of.failures > 0 {
            format!(", {} parts FAILED", of.failures)
        } else {
            String::new()
        };
        println!(
            "{:>10} of {:>9} {:<10}  {}{failed}",
            of.operations,
            piece.goal,
            piece.unit(),
            piece.name
        );
    }
    let (done, goal) = total(state, pieces);
    println!("{done:>10} of {goal:>9}  operations  of all pieces");
}

/// What git says.
fn git(arguments: &[&str]) -> Result<String> {
    let output = std::process::Command::new("git")
        .args(arguments)
        .current_dir(build::workspace())
        .output()
        .context("cannot run git")?;
    ensure!(
        output.status.success(),
        "git {} failed: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests_of_soak {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn ten_million_operations() {
        let pieces = pieces();
        let (_, goal) = total(&State::empty("c"), &pieces);
        assert!(goal >= 10_000_000, "{goal}");
        let hammers = pieces
            .iter()
            .filter(|piece| piece.name.ends_with("hammers"));
        let tries: u64 = hammers.map(|piece| piece.goal).sum();
        assert!(tries >= 2_000_000, "{tries}");
        let names: BTreeSet<_> = pieces.iter().map(|piece| &piece.name).collect();
        assert_eq!(names.len(), pieces.len());
    }

    #[test]
    fn an_hour_of_legal_load_is_no_hostile_operation() {
        let pieces = pieces();
        let legal: Vec<_> = pieces.iter().filter(|piece| piece.is_legal()).collect();
        assert_eq!(legal.len(), 4);
        assert!(legal.iter().all(|piece| piece.goal == HOUR));
        assert_eq!(legal.iter().filter(|piece| piece.is_here()).count(), 2);
        let mut state = State::empty("c");
        let (none, goal) = total(&state, &pieces);
        let part = |ok| Ran {
            name: String::new(),
            ok,
            counts: None,
            took: Duration::from_secs(400),
            notes: vec![format!("tried: {LEGAL_PART} {COUNTED}")],
        };
        state.merge(&legal[0].name, &done(legal[0], 1, &part(true)));
        assert_eq!(state.of(&legal[0].name).operations, LEGAL_PART);
        assert_eq!(total(&state, &pieces), (none, goal));
        state.merge(&legal[0].name, &done(legal[0], 1, &part(false)));
        let of = state.of(&legal[0].name);
        assert_eq!((of.operations, of.failures), (LEGAL_PART, 1));
    }

    #[test]
    fn what_got_least_far_comes_first() {
        let pieces = pieces();
        let wanted: Vec<&Piece> = pieces.iter().collect();
        let mut state = State::empty("c");
        let first = next(&state, &wanted, &[], 2);
        assert_eq!(first.len(), 1, "one on this machine");
        for piece in pieces.iter().filter(|piece| piece.is_here()) {
            let done = Done {
                operations: piece.goal / 2,
                ..Done::default()
            };
            state.merge(&piece.name, &done);
        }
        let second = next(&state, &wanted, &[], 2);
        assert_eq!(second.len(), 2);
        let failed = vec![second[0].name.clone()];
        let third = next(&state, &wanted, &failed, 1);
        assert_eq!(third[0].name, second[1].name);
    }
}
