//! Every test but the soak, tier by tier, and what ran at the end.

use crate::{build, man, packages, vm};
use anyhow::{Context, Result};
use clap::Args;
use mapdirect_testkit::disk;
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Arguments of `test`.
#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    /// Only the native tests whose names contain this
    #[arg(value_name = "FILTER")]
    filter: Option<String>,
}

/// Arguments of `soak`.
#[derive(Debug, Args)]
pub(crate) struct SoakArgs {
    /// How many times as many attacks as `test` makes
    #[arg(long, default_value = "20")]
    times: u32,
    /// Seed of the first attacker
    #[arg(long)]
    seed: Option<u64>,
}

/// What a stage counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

/// A stage that has run.
struct Ran {
    name: &'static str,
    ok: bool,
    /// Nothing for a stage that is no test but a check.
    counts: Option<Counts>,
    took: Duration,
    /// What it said for the end.
    notes: Vec<String>,
}

/// Runs them.
pub(crate) fn run(args: &TestArgs) -> Result<ExitCode> {
    packages::require_root()?;
    packages::install_missing(&packages::FOR_TESTS)?;
    packages::install_for_bpf()?;
    disk::remove_stale();
    let mut ran = Vec::new();
    if args.filter.is_none() {
        ran.push(check("formatting", &["fmt", "--all", "--check"])?);
        ran.push(check(
            "clippy",
            &[
                "clippy",
                "--quiet",
                "--workspace",
                "--features=mapdirect-cli/bpf",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ],
        )?);
        ran.push(manual_pages());
        ran.push(tests(
            "units and properties",
            build::cargo(&[
                "test",
                "--workspace",
                "--features=mapdirect-cli/bpf",
                "--lib",
                "--bins",
                "--",
                "--include-ignored",
            ]),
        )?);
        ran.push(tests(
            "examples in the documentation",
            build::cargo(&["test", "--workspace", "--doc"]),
        )?);
        ran.push(documentation()?);
    }
    let mut native = build::cargo(&[
        "test",
        "--package=mapdirect-cli",
        "--test=native",
        "--",
        "--include-ignored",
    ]);
    native.args(&args.filter);
    ran.push(tests("native: XFS and ext4 on loop devices", native)?);
    if args.filter.is_none() {
        ran.push(machines()?);
        ran.push(demo()?);
    }
    disk::remove_stale();
    Ok(report(&ran))
}

/// The random attack, for longer.
pub(crate) fn soak(args: &SoakArgs) -> Result<ExitCode> {
    packages::require_root()?;
    packages::install_missing(&packages::FOR_TESTS)?;
    disk::remove_stale();
    let mut random = build::cargo(&[
        "test",
        "--package=mapdirect-cli",
        "--test=native",
        "--",
        "--include-ignored",
        "random::",
    ]);
    random.env("MAPDIRECT_SOAK", args.times.to_string());
    if let Some(seed) = args.seed {
        random.env("MAPDIRECT_SEED", seed.to_string());
    }
    let ran = [tests("soak", random)?];
    Ok(report(&ran))
}

fn stage(name: &str) -> Instant {
    println!("━━━ {name}");
    Instant::now()
}

/// Something that succeeds or fails as a whole.
fn check(name: &'static str, arguments: &[&str]) -> Result<Ran> {
    let started = stage(name);
    let status = build::cargo(arguments)
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo")?;
    Ok(Ran {
        name,
        ok: status.success(),
        counts: None,
        took: started.elapsed(),
        notes: Vec::new(),
    })
}

fn documentation() -> Result<Ran> {
    let name = "documentation builds without a warning";
    let started = stage(name);
    let status = build::cargo(&["doc", "--quiet", "--workspace", "--no-deps"])
        .env("RUSTDOCFLAGS", "-D warnings")
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo")?;
    Ok(Ran {
        name,
        ok: status.success(),
        counts: None,
        took: started.elapsed(),
        notes: Vec::new(),
    })
}

fn manual_pages() -> Ran {
    let name = "manual pages are those of the command line";
    let started = stage(name);
    let checked = man::check();
    Ran {
        name,
        ok: checked.is_ok(),
        counts: None,
        took: started.elapsed(),
        notes: checked
            .err()
            .map(|error| error.to_string())
            .into_iter()
            .collect(),
    }
}

/// What tests on other kernels stand on.
fn machines() -> Result<Ran> {
    let name = "virtual machines";
    let started = stage(name);
    let checked = vm::self_test(vm::Scope::Newest)?;
    let failed: Vec<_> = checked
        .iter()
        .filter_map(|one| Some((&one.name, one.result.as_ref().err()?)))
        .collect();
    Ok(Ran {
        name,
        ok: failed.is_empty(),
        counts: Some(Counts {
            passed: (checked.len() - failed.len()) as u64,
            failed: failed.len() as u64,
            ignored: 0,
        }),
        took: started.elapsed(),
        notes: failed
            .iter()
            .map(|(name, error)| format!("{name}: {error}"))
            .collect(),
    })
}

/// The demo fails when anything is not as it says.
fn demo() -> Result<Ran> {
    let name = "demo";
    let started = stage(name);
    // As a user runs it: another process, which cleans up after itself.
    let status = Command::new(std::env::current_exe()?)
        .arg("demo")
        .stdin(Stdio::null())
        .status()?;
    Ok(Ran {
        name,
        ok: status.success(),
        counts: None,
        took: started.elapsed(),
        notes: Vec::new(),
    })
}

/// Runs tests, shows what they say but for those that pass, and counts. A
/// test that is ignored should have run here, and fails the stage.
fn tests(name: &'static str, mut command: Command) -> Result<Ran> {
    let started = stage(name);
    let mut child = command
        // A guard that meets a panic ends; what the panic said is enough.
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let stdout = child.stdout.take().context("no output")?;
    let mut counts = Counts::default();
    let mut notes = Vec::new();
    let mut passed_since = 0u64;
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        if line.starts_with("test ") && line.ends_with(" ok") {
            passed_since += 1;
            if passed_since.is_multiple_of(100) {
                println!("  {passed_since} passed, {:.0?}", started.elapsed());
            }
            continue;
        }
        if let Some(found) = parse_result(&line) {
            counts.passed += found.passed;
            counts.failed += found.failed;
            counts.ignored += found.ignored;
            continue;
        }
        if line.starts_with("tried: ") || line.starts_with("not available here: ") {
            notes.push(line.clone());
        }
        if !line.is_empty() && !line.starts_with("running ") {
            println!("  {line}");
        }
    }
    let status = child.wait()?;
    let not_run = counts.ignored > 0;
    if not_run {
        notes.push(format!("{} tests should have run here", counts.ignored));
    }
    if counts.passed == 0 {
        notes.push(String::from("nothing ran"));
    }
    Ok(Ran {
        name,
        ok: status.success() && counts.failed == 0 && counts.passed > 0 && !not_run,
        counts: Some(counts),
        took: started.elapsed(),
        notes,
    })
}

/// Reads the line that sums up a test binary, as in `test result: ok. 3
/// passed; 0 failed; 0 ignored; ...`.
fn parse_result(line: &str) -> Option<Counts> {
    let rest = line.strip_prefix("test result: ")?;
    let (_, numbers) = rest.split_once(". ")?;
    let mut counts = Counts::default();
    for part in numbers.split(';') {
        let mut words = part.split_whitespace();
        let (Some(number), Some(what)) = (words.next(), words.next()) else {
            continue;
        };
        let place = match what {
            "passed" => &mut counts.passed,
            "failed" => &mut counts.failed,
            "ignored" => &mut counts.ignored,
            _ => continue,
        };
        *place = number.parse().ok()?;
    }
    Some(counts)
}

/// Says what ran, and whether all is well.
fn report(ran: &[Ran]) -> ExitCode {
    println!("\n━━━ what ran");
    for stage in ran {
        let verdict = if stage.ok { "ok    " } else { "FAILED" };
        let counts = stage.counts.map_or_else(String::new, |counts| {
            format!(
                ": {} passed, {} failed, {} ignored",
                counts.passed, counts.failed, counts.ignored
            )
        });
        let seconds = stage.took.as_secs();
        println!("{verdict}  {}{counts} ({seconds} s)", stage.name);
        for note in &stage.notes {
            println!("          {note}");
        }
    }
    println!(
        "not run by this: the soak (cargo xtask soak), benchmarks (cargo bench), \
         virtual machines with older kernels (cargo xtask vm --check)"
    );
    let failed = ran.iter().filter(|stage| !stage.ok).count();
    if failed == 0 {
        println!("all is well");
        ExitCode::SUCCESS
    } else {
        println!("{failed} of {} stages FAILED", ran.len());
        ExitCode::FAILURE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted() {
        let line = "test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 1 filtered out";
        assert_eq!(
            parse_result(line),
            Some(Counts {
                passed: 12,
                failed: 0,
                ignored: 3
            })
        );
        let line = "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured";
        assert_eq!(parse_result(line).map(|counts| counts.failed), Some(2));
        assert_eq!(parse_result("test a::b ... ok"), None);
    }
}
