//! Whether the packages do what an administrator expects of them: in a virtual
//! machine with systemd they are installed, upgraded while a pin is held, removed
//! and purged.

use super::Release;
use crate::arch::Arch;
use crate::{build, packages, vm};
use anyhow::{Context, Result, ensure};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The kernel they are tried on.
const KERNEL: &str = "7.3";

/// A gate, and what it needs on the command line of that kernel.
struct Expected {
    gate: &'static str,
    parameters: &'static str,
}

const GATES: [Expected; 2] = [
    Expected {
        gate: "bpf",
        parameters: "",
    },
    Expected {
        gate: "fanotify",
        parameters: "lsm=landlock,yama,apparmor",
    },
];

/// Makes packages of two revisions and tries them with both gates; says what was
/// found.
pub(crate) fn run() -> Result<String> {
    packages::require_root()?;
    packages::install_missing(&packages::FOR_SYSTEMD)?;
    let target = build::target()?;
    let outputs = [1, 2].map(|revision| target.join(format!("dist-check/{revision}")));
    for (output, revision) in outputs.iter().zip([1, 2]) {
        let _ = fs::remove_dir_all(output);
        Release::new(Arch::OWN, revision)?.make(&target.join("dist-build"), output)?;
    }
    let mut told = Vec::new();
    for expected in GATES {
        let gate = expected.gate;
        println!("in a virtual machine with systemd, {gate} gate");
        let found = with_gate(&expected, &outputs).with_context(|| format!("{gate} gate"))?;
        told.push(format!("{gate}: {found}"));
    }
    Ok(told.join("; "))
}

/// Makes a tarball for another architecture, and has the command in it guard a file
/// there.
pub(super) fn elsewhere(arch: Arch) -> Result<String> {
    packages::require_root()?;
    let output = build::target()?.join("dist-check").join(arch.name());
    let _ = fs::remove_dir_all(&output);
    let made = Release::new(arch, 1)?.make(&build::target()?.join("dist-build"), &output)?;
    let tarball = made
        .iter()
        .find(|file| file.ends_with(".tar.xz"))
        .context("there is no tarball")?;
    // Here: that machine may have no xz.
    let status = Command::new("tar")
        .args(["--strip-components=1", "-xJf", tarball])
        .current_dir(&output)
        .status()?;
    ensure!(status.success(), "cannot unpack {tarball}: {status}");
    println!("in a virtual machine, {}", arch.name());
    let boot = vm::boot(arch, KERNEL)?
        .memory(2 << 30)
        .time_limit(Duration::from_secs(900));
    let mut trial = Trial {
        machine: boot.start()?,
        started: Instant::now(),
    };
    let version = trial.step(
        "the command",
        &format!(
            "mkdir -p /run/mapdirect
             ln -s {}/bin/mapdirect /usr/bin/mapdirect
             mapdirect --version",
            output.display()
        ),
    )?;
    trial.step("doctor", "mapdirect doctor")?;
    trial.step("a file on XFS", FILE)?;
    trial.step("a guard", GUARD)?;
    let status = trial.step("its gate", "mapdirect status --json")?;
    ensure!(
        status.contains("\"bpf\""),
        "the gate is another one: {status}"
    );
    trial.step("pin", HOLD)?;
    trial.step("the pin holds", REFUSED)?;
    trial.machine.switch_off()?;
    Ok(format!(
        "{} on {}, Linux {KERNEL}, bpf gate: a pin holds; {:.0} s in all",
        version.trim(),
        arch.name(),
        trial.started.elapsed().as_secs_f64()
    ))
}

/// A guard that nobody looks after.
const GUARD: &str = "\
mapdirect guard > /run/guard 2>&1 &
tries=0
until grep -q ready /run/guard; do
    tries=$((tries + 1)); test $tries -lt 300 || { cat /run/guard; exit 1; }; sleep 0.1
done";

/// One machine.
struct Trial {
    machine: vm::Machine,
    started: Instant,
}

impl Trial {
    /// Runs a script that must succeed and returns what it printed.
    fn step(&mut self, what: &str, script: &str) -> Result<String> {
        println!("  {:4.0} s: {what}", self.started.elapsed().as_secs_f64());
        let words: [&OsStr; 3] = ["sh".as_ref(), "-ec".as_ref(), script.as_ref()];
        let program = vm::program(&words, &[("DEBIAN_FRONTEND", "noninteractive")]);
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let status = self.machine.run(&program, &mut out, &mut err)?;
        let out = String::from_utf8_lossy(&out).into_owned();
        ensure!(
            status == 0,
            "{what}: `{}` ended with {status}: {out}{}{}",
            script.trim(),
            String::from_utf8_lossy(&err),
            self.journal()
        );
        Ok(out)
    }

    /// What the guard and systemd have said.
    fn journal(&mut self) -> String {
        let words: [&OsStr; 3] = ["sh".as_ref(), "-c".as_ref(), JOURNAL.as_ref()];
        let mut out = Vec::new();
        let program = vm::program(&words, &[]);
        match self.machine.run(&program, &mut out, std::io::sink()) {
            Ok(_) => String::from_utf8_lossy(&out).into_owned(),
            Err(error) => format!("{error:#}"),
        }
    }
}

const JOURNAL: &str = "systemctl --no-pager status mapdirect.socket mapdirect.service; \
                       journalctl --no-pager -n 40; cat /run/holder 2>/dev/null";

/// A file on XFS, without a hole.
const FILE: &str = "\
truncate -s 400M /run/disk
mkfs.xfs -q /run/disk
mkdir -p /mnt
mount -o loop /run/disk /mnt
head -c 4M /dev/urandom > /mnt/file
sync /mnt/file";

/// Containers keep packages from starting services. The index of all manual pages
/// takes an emulated processor minutes.
const OWN_MACHINE: &str = "rm -f /usr/sbin/policy-rc.d /var/lib/man-db/auto-update";

/// A holder whose end can be waited for, and that says what it is told.
const HOLD: &str = "\
(set +e; mapdirect pin /mnt/file > /run/holder 2>&1; echo $? > /run/held) &
tries=0
until mapdirect status --json | grep -q '/mnt/file'; do
    tries=$((tries + 1)); test $tries -lt 300; sleep 0.1
done";

/// Whether the pin holds.
const REFUSED: &str = "\
if truncate -s 1M /mnt/file 2> /run/refusal; then echo 'it was shortened' >&2; exit 1; fi
grep -q 'Text file busy' /run/refusal
test $(stat -c %s /mnt/file) = 4194304";

/// Somebody who goes on trying, with as many times as it was let through.
const ATTACK: &str = "\
cat > /run/attack <<'END'
tried=0 done=0
while [ ! -e /run/enough ]; do
    tried=$((tried + 1))
    if truncate -s 1M /mnt/file 2> /dev/null; then done=$((done + 1)); fi
done
echo \"$tried $done\" > /run/attacked
END
setsid sh /run/attack > /dev/null 2>&1 &";

/// Whether the holder has ended because its pin was lost.
const TOLD: &str = "\
tries=0
until [ -e /run/held ]; do tries=$((tries + 1)); test $tries -lt 300; sleep 0.1; done
test $(cat /run/held) = 4";

/// What a package leaves in the list of files, but for directories that others
/// share.
const LISTED: &str = "\
dpkg -L mapdirect libmapdirect0 libmapdirect-dev python3-mapdirect | grep mapdirect | sort -u";

/// A program in C, and one in Python, on the pinned file.
const LIBRARIES: &str = "\
cc -o /run/reader /usr/share/doc/libmapdirect-dev/examples/reader.c \\
    $(pkg-config --cflags --libs mapdirect)
/run/reader /mnt/file > /dev/null
cc -o /run/static /usr/share/doc/libmapdirect-dev/examples/reader.c \\
    $(pkg-config --static --libs mapdirect | sed 's/-lmapdirect/-l:libmapdirect.a/')
/run/static /mnt/file > /dev/null
/usr/bin/python3 -c '
import importlib.metadata, mapdirect
with open(\"/mnt/file\", \"rb\") as file, mapdirect.pin(file) as pin:
    assert sum(extent.length for extent in pin.extents()) == 4 << 20, pin.extents()
print(importlib.metadata.version(\"mapdirect\"))'
test -e /usr/lib/python3/dist-packages/mapdirect/__pycache__
man -w mapdirect 3 mapdirect > /dev/null 2>&1 || test -e /usr/share/man/man3/mapdirect.3.gz
ldconfig -p | grep -q 'libmapdirect.so.0 '";

fn with_gate(expected: &Expected, outputs: &[PathBuf; 2]) -> Result<String> {
    let started = Instant::now();
    let boot = vm::boot(Arch::OWN, KERNEL)?
        .systemd()
        .parameters(expected.parameters)
        .memory(3 << 30)
        .time_limit(Duration::from_secs(1500));
    let mut trial = Trial {
        machine: boot.start()?,
        started,
    };
    trial.step(
        "systemd is up",
        "until [ -S /run/systemd/private ]; do sleep 0.1; done
         test $(cat /proc/1/comm) = systemd
         systemctl is-system-running --wait > /dev/null || true
         systemctl is-active basic.target",
    )?;
    let booted = started.elapsed();
    trial.step("a file on XFS", FILE)?;
    trial.step("dpkg as on a machine of its own", OWN_MACHINE)?;
    let install = |output: &Path| {
        format!(
            "dpkg -i {}/*.deb > /run/dpkg 2>&1 || {{ cat /run/dpkg; exit 1; }}",
            output.display()
        )
    };
    trial.step("install", &install(&outputs[0]))?;
    trial.step(
        "the service runs",
        "systemctl is-active mapdirect.socket mapdirect.service > /dev/null
         systemctl is-enabled mapdirect.socket mapdirect.service > /dev/null
         mapdirect policy check > /dev/null
         bash -c '. /usr/share/bash-completion/completions/mapdirect; complete -p mapdirect' > /dev/null",
    )?;
    let status = trial.step("its gate", "mapdirect status --json")?;
    ensure!(
        status.contains(&format!("\"{}\"", expected.gate)),
        "the gate is another one: {status}"
    );
    trial.step("libraries", LIBRARIES)?;
    trial.step("pin", HOLD)?;
    trial.step("the pin holds", REFUSED)?;
    let before = trial.step(
        "the guard's process",
        "systemctl show -P MainPID mapdirect.service",
    )?;
    let upgraded = upgraded_with_pin(&mut trial, &before, &install(&outputs[1]))?;
    trial.step(
        "reload",
        "systemctl reload mapdirect.service; mapdirect status > /dev/null",
    )?;
    let listed = trial.step("what is installed", LISTED)?;
    ensure!(listed.lines().count() > 30, "dpkg lists {listed}");
    trial.step(
        "remove with the pin held",
        "dpkg -r python3-mapdirect libmapdirect-dev libmapdirect0 mapdirect > /run/dpkg 2>&1 || { cat /run/dpkg; exit 1; }",
    )?;
    trial.step(
        "the holder is told, and nobody is refused",
        &format!(
            "{TOLD}
         truncate -s 1M /mnt/file
         test ! -e /sys/fs/bpf/mapdirect
         test ! -e /run/mapdirect
         if pgrep -l mapdirect; then exit 1; fi
         units=$(systemctl list-units --plain --no-legend 'mapdirect*')
         test -z \"$units\" || {{ echo \"$units\"; exit 1; }}
         test -e /etc/mapdirect/policy.toml"
        ),
    )?;
    trial.step(
        "purge",
        "dpkg -P python3-mapdirect libmapdirect-dev libmapdirect0 mapdirect > /run/dpkg 2>&1 || { cat /run/dpkg; exit 1; }",
    )?;
    trial.step("nothing is left", &nothing_left(&listed))?;
    trial.machine.switch_off()?;
    Ok(format!(
        "systemd was up after {:.0} s; {upgraded}; {:.0} s in all",
        booted.as_secs_f64(),
        started.elapsed().as_secs_f64()
    ))
}

/// Upgrades while somebody attacks the pinned file all the time.
fn upgraded_with_pin(trial: &mut Trial, before: &str, install: &str) -> Result<String> {
    trial.step("attack", ATTACK)?;
    trial.step("upgrade with the pin held", install)?;
    trial.step("the new guard has the pin", &exchanged(before))?;
    trial.step(
        "the pin was kept",
        "mapdirect status --json | grep -q /mnt/file
         test ! -e /run/held
         if grep -i lost /run/holder; then exit 1; fi
         touch /run/enough
         tries=0
         until [ -e /run/attacked ]; do
             tries=$((tries + 1)); test $tries -lt 300; sleep 0.1
         done",
    )?;
    let attacked = trial.step("what the attack came to", "cat /run/attacked")?;
    let (tried, through) = attacked.trim().split_once(' ').context("no numbers")?;
    ensure!(
        through == "0" && tried.parse::<u32>()? > 0,
        "of {tried} attempts to shorten the file {through} were let through"
    );
    trial.step("the pin holds", REFUSED)?;
    Ok(format!(
        "{tried} attempts to shorten the file during the upgrade, none let through"
    ))
}

/// Whether the service is the one of the second package.
fn exchanged(before: &str) -> String {
    format!(
        "dpkg-query -W -f '${{Version}}' mapdirect | grep -q -- '-2$'
         systemctl is-active mapdirect.service > /dev/null
         test $(systemctl show -P MainPID mapdirect.service) != {}",
        before.trim()
    )
}

/// Looks for the files that were listed, and for others where services leave
/// some.
fn nothing_left(listed: &str) -> String {
    let files = listed.lines().collect::<Vec<_>>().join(" ");
    format!(
        "for file in {files}; do test ! -e $file || {{ echo $file; exit 1; }}; done
         left=$(find /etc /run /var/lib /sys/fs/bpf /usr/lib/systemd -xdev -name '*mapdirect*')
         test -z \"$left\" || {{ echo \"$left\"; exit 1; }}
         units=$(systemctl list-units --all --plain --no-legend 'mapdirect*')
         test -z \"$units\" || {{ echo \"$units\"; exit 1; }}
         if dpkg -l | grep mapdirect; then exit 1; fi
         if grep mapdirect /etc/passwd /etc/group; then exit 1; fi
         if ldconfig -p | grep mapdirect; then exit 1; fi
         umount /mnt"
    )
}
