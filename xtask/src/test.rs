//! Every test but the soak, tier by tier, and what ran at the end.

mod guest;
mod reach;
mod soak;
mod tally;

use crate::arch::Arch;
use crate::{bpf, build, capi, dependencies, dist, man, packages, plot, public_api, vm};
use anyhow::{Context, Result, ensure};
use clap::Args;
use guest::Guest;
use mapdirect_testkit::contract::{GATE_VARIABLE, Gate};
use mapdirect_testkit::{Kind, disk};
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use tally::Tally;

pub(crate) use reach::{ReachArgs, run as reach};
pub(crate) use soak::{SoakArgs, run as soak};

/// Arguments of `test`.
#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    /// Only the native tests whose names contain this
    #[arg(value_name = "FILTER")]
    filter: Option<String>,
    /// Only what runs in virtual machines, with another architecture; with FILTER,
    /// only what the summary calls so
    #[arg(long)]
    machines: bool,
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
    name: String,
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
    packages::install_missing(&packages::PROGRAMS)?;
    packages::install_missing(&packages::FOR_MANUAL)?;
    packages::lay_down_programs()?;
    packages::install_for_bpf()?;
    disk::remove_stale();
    let mut ran = Vec::new();
    if args.machines {
        let wanted = |name: &str| {
            args.filter
                .as_ref()
                .is_none_or(|filter| name.contains(filter))
        };
        if args.filter.is_none() {
            ran.push(machines());
        }
        let mut guests = guests();
        guests.push(other_architecture());
        guests.retain(|guest| wanted(&guest.name));
        let others = [
            DEMO_DAX,
            PACKAGES_IN_USE,
            ("units on aarch64", units_elsewhere as fn() -> Ran),
        ];
        let others: Vec<_> = others
            .into_iter()
            .filter_map(|(name, run)| wanted(name).then_some(run))
            .collect();
        ensure!(
            guests.len() + others.len() > 0,
            "nothing in machines is called so"
        );
        ran.extend(guest::run(&guests, &others));
        return Ok(report(&ran));
    }
    if args.filter.is_none() {
        ran.push(check("formatting", &["fmt", "--all", "--check"])?);
        ran.push(check(
            "clippy",
            &[
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ],
        )?);
        ran.push(check(
            "clippy, without the bpf gate",
            &[
                "clippy",
                "--quiet",
                "--workspace",
                "--exclude=mapdirect-fuzz",
                "--no-default-features",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ],
        )?);
        ran.push(told("what comes from elsewhere", dependencies::check));
        ran.push(told(
            "the oldest compiler that is promised",
            dependencies::oldest_compiler,
        ));
        ran.push(told("cargo install", installs));
        ran.push(told("Miri", dependencies::miri));
        ran.push(checked(
            "manual pages are those of the command line, and read well",
            man::check,
        ));
        ran.push(checked("plots show what the tables say", plot::check));
        ran.push(checked(
            "the object of the bpf gate is what its source says",
            bpf::check,
        ));
        ran.push(checked(
            "the public API is what its list says",
            public_api::check,
        ));
        ran.push(checked(
            "the header of the C library is what its source says",
            capi::check_header,
        ));
        ran.push(tests(
            "units and properties",
            build::cargo(&[
                "test",
                // Better to know of all at once.
                "--no-fail-fast",
                "--workspace",
                "--lib",
                "--bins",
                "--test=fuzz",
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
    // Tests that run programs in C and Python look for them.
    ran.push(told("the C library builds", || {
        capi::stage().map(|root| root.display().to_string())
    }));
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
        ran.push(machines());
        ran.extend(guest::run(&guests(), &[DEMO_DAX.1, PACKAGES_IN_USE.1]));
        ran.push(demo()?);
    }
    disk::remove_stale();
    Ok(report(&ran))
}

/// What is tried on other kernels.
fn guests() -> Vec<Guest> {
    // What takes longest comes first: the machines share the processors.
    let mut guests = Vec::from(OFTEN.map(|(kernel, name, often)| {
        let filters = often.iter().map(ToString::to_string).collect();
        let mut guest = gate_in_kernel(kernel, name, 0, filters);
        guest.environment.push((BRIEF.0, BRIEF.1.to_owned()));
        guest.time_limit = Duration::from_secs(1800);
        guest
    }));
    guests.extend(persistent_memory(true));
    // Storage targets are modules of these kernels, and not of this machine's.
    let mut guest = gate_in_kernel("7.3", "fanotify gate", 0, vec![String::from("writers::")]);
    guest.environment = vec![(GATE_VARIABLE, Gate::Fanotify.name().to_owned())];
    guest.time_limit = Duration::from_secs(900);
    guests.push(guest);
    let without_bpf = vec![String::from("gate::without-lsm")];
    let mut guest = gate_in_kernel("7.3", "no bpf in lsm=", 0, without_bpf);
    guest.parameters = "lsm=landlock,yama,apparmor";
    guest.time_limit = Duration::from_secs(600);
    guests.push(guest);
    // Nobody else may have XFS mounted there.
    let before_xfs = vec![String::from("gate::before-xfs")];
    guests.push(gate_in_kernel("7.3", "bpf gate before XFS", 0, before_xfs));
    guests
}

/// What is tried on another architecture; `reach` has more of it.
fn other_architecture() -> Guest {
    let filters = [
        "hammer::xfs",
        "hammer::ext4",
        "contract::xfs::fi",
        "contract::ext4::co",
    ];
    let filters = filters.map(String::from).into();
    let mut guest = gate_in_kernel("7.3", "aarch64, bpf gate", 0, filters);
    guest.arch = Arch::Aarch64;
    guest.environment.push((BRIEF.0, BRIEF.1.to_owned()));
    guest.time_limit = Duration::from_secs(1800);
    guest
}

/// Kernels that the gate in the kernel is for.
const KERNELS: [&str; 3] = ["7.3", "6.1", "6.12"];

/// What is tried with the gate in the kernel every time, each in a machine of
/// its own: most on the newest kernel, and on the others what depends on the
/// kernel most, on one filesystem. The soak has all of it on all of them.
const OFTEN: [(&str, &str, &[&str]); 4] = [
    (
        "7.3",
        "bpf gate, contract",
        &[
            "contract::xfs::",
            "stable::xfs::",
            "stable::ext4::",
            "family::",
            "run::xfs::",
            "unmodified::xfs::",
            // This machine's kernel may have neither.
            "extents::dm",
            "extents::realtime",
        ],
    ),
    (
        "7.3",
        "bpf gate",
        &[
            "in-kernel",
            "hammer::xfs",
            "tripwire::xfs::",
            "writers::",
            "policy::unpin",
            "policy::next-guard",
            "audit::operations",
            "audit::who",
        ],
    ),
    (
        "6.1",
        "bpf gate",
        &[
            "in-kernel::xfs",
            "audit::operations",
            "hammer::ext4",
            "contract::xfs::io_uring",
            "contract::xfs::i386",
            "contract::xfs::splice",
            "contract::xfs::fi",
            "contract::xfs::co",
        ],
    ),
    ("6.12", "bpf gate", &["in-kernel::ext4", "hammer::xfs"]),
];

/// Where time is short.
const BRIEF: (&str, &str) = ("MAPDIRECT_BRIEF", "1");

/// The tests that a precise gate can be put to.
const WITH_EITHER_GATE: [&str; 16] = [
    "contract::",
    "doors::",
    "writers::",
    "errors::",
    "grants::",
    "openers::",
    "lifetime::",
    "segments::",
    "beside::",
    "programs::",
    "abuse::",
    "cli::",
    "::pinned",
    "random::",
    "tripwire::",
    "policy::",
];

/// All of them on each kernel, on loop devices and on persistent memory.
fn conformance() -> Vec<Guest> {
    let on = |kernel| {
        let all = WITH_EITHER_GATE.map(String::from);
        let dax = ["contract::", "grants::", "random::", "in-kernel"].map(String::from);
        // One of each kind, and one for tests that want it for themselves.
        let nvdimms = 2 * Kind::DAX.len();
        [
            gate_in_kernel(kernel, "bpf gate", 0, all.into()),
            gate_in_kernel(kernel, "bpf gate, DAX", nvdimms, dax.into()),
        ]
    };
    KERNELS.into_iter().flat_map(on).collect()
}

/// Tests with the gate in a kernel.
fn gate_in_kernel(kernel: &'static str, name: &str, nvdimms: usize, filters: Vec<String>) -> Guest {
    Guest {
        name: format!("Linux {kernel}, {name}"),
        arch: Arch::X86_64,
        kernel,
        parameters: "",
        nvdimms,
        environment: vec![(GATE_VARIABLE, Gate::Bpf.name().to_owned())],
        filters,
        cuts: None,
        time_limit: Duration::from_secs(7200),
    }
}

/// What is tried on persistent memory: where that is emulated a second is
/// soon over, so `test` tries less than `soak`.
fn persistent_memory(brief: bool) -> Vec<Guest> {
    let on = |kind: Kind| {
        let filters = if brief {
            let often = ["pmem", "contract", "tripwire"];
            often.map(|tests| format!("{tests}::{kind}")).into()
        } else {
            let all = ["pmem", "contract", "segments", "tripwire"];
            all.map(|tests| format!("{tests}::{kind}")).into()
        };
        Guest {
            name: format!("Linux 7.3, {kind}"),
            arch: Arch::X86_64,
            kernel: "7.3",
            parameters: "",
            nvdimms: Kind::DAX.len(),
            environment: brief
                .then(|| (BRIEF.0, BRIEF.1.to_owned()))
                .into_iter()
                .collect(),
            filters,
            cuts: match (brief, kind.reflink()) {
                (true, true) => None,
                (true, false) => Some((kind, 1)),
                (false, _) => Some((kind, 7)),
            },
            time_limit: Duration::from_secs(if brief { 600 } else { 3600 }),
        }
    };
    Kind::DAX.map(on).into()
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
        name: name.to_owned(),
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
        name: name.to_owned(),
        ok: status.success(),
        counts: None,
        took: started.elapsed(),
        notes: Vec::new(),
    })
}

/// Something of the repository that must go with something else of it.
fn checked(name: &'static str, check: fn() -> Result<()>) -> Ran {
    let started = stage(name);
    let checked = check();
    Ran {
        name: name.to_owned(),
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

/// A check that says at the end how it was done.
fn told(name: &'static str, check: fn() -> Result<String>) -> Ran {
    let started = stage(name);
    let told = check();
    Ran {
        name: name.to_owned(),
        ok: told.is_ok(),
        counts: None,
        took: started.elapsed(),
        notes: vec![told.unwrap_or_else(|error| format!("{error:#}"))],
    }
}

/// What tests on other kernels stand on.
fn machines() -> Ran {
    let name = "virtual machines themselves";
    let started = stage(name);
    let checked = vm::self_test(vm::Scope::Newest);
    let mut notes = Vec::new();
    let mut counts = Counts::default();
    match &checked {
        Ok(checked) => {
            for one in checked {
                match &one.result {
                    Ok(_) => counts.passed += 1,
                    Err(error) => {
                        counts.failed += 1;
                        notes.push(format!("{}: {error}", one.name));
                    }
                }
            }
        }
        Err(error) => notes.push(format!("they could not run: {error:#}")),
    }
    Ran {
        name: name.to_owned(),
        ok: checked.is_ok() && counts.failed == 0,
        counts: Some(counts),
        took: started.elapsed(),
        notes,
    }
}

/// The demo fails when anything is not as it says.
fn demo() -> Result<Ran> {
    let name = "demo";
    let started = stage(name);
    // As a user runs it: another process, which cleans up after itself.
    let status = Command::new(build::own()?)
        .arg("demo")
        .stdin(Stdio::null())
        .status()?;
    Ok(Ran {
        name: name.to_owned(),
        ok: status.success(),
        counts: None,
        took: started.elapsed(),
        notes: Vec::new(),
    })
}

const DEMO_DAX: (&str, fn() -> Ran) = ("demo --dax", demo_dax);
const PACKAGES_IN_USE: (&str, fn() -> Ran) = ("packages in use", packages_in_use);

/// The demo on persistent memory, whose tables are shown if it fails.
fn demo_dax() -> Ran {
    let (name, _) = DEMO_DAX;
    let started = Instant::now();
    let output = build::own().and_then(|own| {
        Command::new(own)
            .args(["demo", "--dax"])
            .stdin(Stdio::null())
            .output()
    });
    let mut notes = Vec::new();
    match &output {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            for stream in [&output.stdout, &output.stderr] {
                println!("{}", String::from_utf8_lossy(stream));
            }
            notes.push(format!("it ended with {}", output.status));
        }
        Err(error) => notes.push(format!("it could not run: {error}")),
    }
    Ran {
        name: name.to_owned(),
        ok: notes.is_empty(),
        counts: None,
        took: started.elapsed(),
        notes,
    }
}

/// The command as somebody installs it who has a checkout and no packages.
fn installs() -> Result<String> {
    let target = build::target()?;
    let root = target.join("installed");
    let status = build::cargo(&["install", "--quiet", "--locked", "--debug", "--force"])
        .args(["--path", "crates/mapdirect-cli", "--root"])
        .arg(&root)
        // Built with what the tests are built with.
        .arg("--target-dir")
        .arg(&target)
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "it does not install");
    let mut installed = Command::new(root.join("bin/mapdirect"));
    let output = installed.arg("--version").output()?;
    ensure!(output.status.success(), "it does not run");
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The packages, installed, upgraded and removed.
fn packages_in_use() -> Ran {
    told(PACKAGES_IN_USE.0, dist::check)
}

/// What processors differ in is in the units as well: layouts, orders of memory,
/// registers.
fn units_elsewhere() -> Ran {
    guest::units(Arch::Aarch64, "7.3")
}

/// Runs tests, shows what they say but for those that pass, and counts.
fn tests(name: &str, mut command: Command) -> Result<Ran> {
    let started = stage(name);
    let mut child = command
        // A guard that meets a panic ends; what the panic said is enough.
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let stdout = child.stdout.take().context("no output")?;
    let mut tally = Tally::new();
    for line in BufReader::new(stdout).lines() {
        if let Some(line) = tally.hear(&line?) {
            println!("  {line}");
        }
    }
    let status = child.wait()?;
    Ok(tally.ran(name, status.success(), started))
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
