//! `mapdirect doctor`: what this machine offers, and how to mend what is
//! missing. Runs for everybody; what only root can find out says so.

mod holes;

use crate::args::DoctorArgs;
use crate::terminal::{self, Style};
use crate::{Exit, output};
use anyhow::Result;
use mapdirect::{Gate, Guard};
use mapdirect_guard::StartError;
use mapdirect_sys::fanotify::Group;
use mapdirect_sys::{Errno, capget, memfd, proc, proc_mountinfo, uname};
use serde_json::{Value, json};
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::path::PathBuf;

/// How a finding turned out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// As it should be.
    Good,
    /// Something works less well, or not for everybody.
    Note,
    /// Pins are not possible like this.
    Bad,
}

impl Outcome {
    fn key(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Note => "note",
            Self::Bad => "bad",
        }
    }

    fn mark(self) -> (Style, &'static str) {
        match self {
            Self::Good => (Style::Good, "ok  "),
            Self::Note => (Style::Note, "note"),
            Self::Bad => (Style::Bad, "BAD "),
        }
    }
}

/// One finding.
struct Finding {
    name: &'static str,
    outcome: Outcome,
    text: String,
    mend: String,
}

impl Finding {
    fn new(
        name: &'static str,
        outcome: Outcome,
        text: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self {
            name,
            outcome,
            text: text.into(),
            mend: mend.into(),
        }
    }

    fn good(name: &'static str, text: impl Into<String>) -> Self {
        Self::new(name, Outcome::Good, text, "")
    }
}

const AS_ROOT: &str = "run `mapdirect doctor` as root";

pub(crate) fn run(args: &DoctorArgs) -> Result<Exit> {
    let release = rustix::system::uname();
    let release = release.release().to_string_lossy();
    let mut findings = vec![Finding::good("kernel", format!("Linux {release}"))];
    let (in_kernel, first) = bpf();
    let by_events = fanotify();
    // One of them is enough.
    let has_bpf = in_kernel.outcome == Outcome::Good;
    let gate = if has_bpf {
        "bpf"
    } else if by_events.outcome == Outcome::Bad {
        "none"
    } else {
        "fanotify"
    };
    findings.extend(both(in_kernel, by_events));
    findings.push(tripwire());
    findings.push(holder_capability());
    findings.extend(guard_needs(first));
    let answering = Guard::from_env().gate();
    findings.push(running_guard(&answering));
    findings.extend(without_guard(&answering));
    findings.push(dax());
    findings.push(filesystems());
    let bad = findings
        .iter()
        .any(|finding| finding.outcome == Outcome::Bad);
    let first = first_remedy(&findings);
    let in_use = answering.as_ref().map_or(gate, |gate| gate.name());
    if args.json {
        let listed: Vec<Value> = findings.iter().map(Finding::as_json).collect();
        let all: serde_json::Map<String, Value> = holes::of_all(in_use)
            .into_iter()
            .map(|(gate, holes)| (gate.to_owned(), json!(holes)))
            .collect();
        output::json(&json!({
            "kernel": release,
            "gate": if bad || gate == "none" { Value::Null } else { json!(gate) },
            "first": first,
            "findings": listed,
            "holes": holes::of_all(in_use)[0].1,
            "holes_of_gates": all,
        }));
    } else {
        match &first {
            Some(first) => output::marked("", (Style::Strong, "first:"), &format!(" {first}"), 4),
            None => output::prose("files can be pinned here, by this process: nothing is missing"),
        }
        findings.iter().for_each(Finding::tell);
        for (name, holes) in holes::of_all(in_use) {
            output::prose(&format!("what the {name} gate cannot refuse:"));
            for hole in holes {
                output::prose(&format!("  - {hole}"));
            }
        }
    }
    Ok(if bad { Exit::FAILURE } else { Exit::SUCCESS })
}

/// What is missing of a gate matters as far as the other one does not serve.
fn both(mut in_kernel: Finding, mut by_events: Finding) -> [Finding; 2] {
    if by_events.outcome == Outcome::Bad {
        if in_kernel.outcome == Outcome::Good {
            by_events.outcome = Outcome::Note;
            by_events.mend =
                String::from("none is needed: the bpf gate serves here, and uses no fanotify");
        } else if in_kernel.mend == AS_ROOT {
            // Whether the other one serves is not known.
            by_events.outcome = Outcome::Note;
        } else {
            in_kernel.outcome = Outcome::Bad;
        }
    }
    [in_kernel, by_events]
}

impl Finding {
    fn as_json(&self) -> Value {
        json!({
            "name": self.name,
            "outcome": self.outcome.key(),
            "text": self.text,
            "mend": self.mend,
        })
    }

    fn tell(&self) {
        let text = format!("  {}: {}", self.name, self.text);
        output::marked("", self.outcome.mark(), &text, 6);
        if !self.mend.is_empty() {
            output::prose(&format!("      help: {}", self.mend));
        }
    }
}

/// What to do first, so that this process can pin files: of all that is missing
/// what everything else waits for.
fn first_remedy(findings: &[Finding]) -> Option<String> {
    let needed = ["guard", "to pin", "filesystems"];
    let with_help = |finding: &&Finding| !finding.mend.is_empty();
    let bad = findings
        .iter()
        .filter(with_help)
        .find(|finding| finding.outcome == Outcome::Bad);
    let missing = || {
        needed.iter().find_map(|name| {
            let finding = findings.iter().find(|finding| finding.name == *name)?;
            (finding.outcome != Outcome::Good && !finding.mend.is_empty()).then_some(finding)
        })
    };
    let finding = bad.or_else(missing)?;
    Some(format!("{} ({})", finding.mend, finding.text))
}

/// Fanotify pre-content events: Linux 6.14.
fn fanotify() -> Finding {
    const NAME: &str = "fanotify gate";
    let group = match Group::pre_content() {
        Ok(group) => group,
        Err(Errno::PERM) => {
            return if uname::version() >= (6, 14) {
                Finding::new(
                    NAME,
                    Outcome::Note,
                    "this kernel should have it (6.14 and later); only root can tell",
                    AS_ROOT,
                )
            } else {
                no_pre_content()
            };
        }
        Err(Errno::MFILE) => {
            return Finding::new(
                NAME,
                Outcome::Bad,
                "there are as many fanotify groups as one user may have",
                "end other watchers, or raise fs.fanotify.max_user_groups",
            );
        }
        Err(_) => return no_pre_content(),
    };
    // A mask the kernel knows is refused for the filesystem; one it does not
    // know is refused as such.
    let probe = memfd::sealed("mapdirect-probe", b"")
        .and_then(|file| group.add(mapdirect_sys::fanotify::Mask::PRE_ACCESS, file.as_fd()));
    match probe {
        Ok(()) | Err(Errno::OPNOTSUPP) => Finding::good(NAME, "available (pre-content events)"),
        Err(Errno::INVAL) => no_pre_content(),
        Err(other) => Finding::new(NAME, Outcome::Bad, format!("cannot be probed: {other}"), ""),
    }
}

fn no_pre_content() -> Finding {
    Finding::new(
        "fanotify gate",
        Outcome::Bad,
        "this kernel has no pre-content permission events",
        "boot Linux 6.14 or later with CONFIG_FANOTIFY_ACCESS_PERMISSIONS",
    )
}

/// BPF LSM programs: Linux 6.1 and later. Returns as well which gate a guard
/// would try first here, if it may choose.
fn bpf() -> (Finding, Gate) {
    const NAME: &str = "bpf gate";
    let lsm = std::fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
    let has_lsm = lsm.trim().split(',').any(|name| name == "bpf");
    let has_types = std::path::Path::new("/sys/kernel/btf/vmlinux").exists();
    let kernel = match (has_lsm, has_types) {
        (true, true) => "the kernel has BPF LSM and BTF",
        (false, true) => "the kernel has BTF but not bpf in its lsm= list",
        (true, false) => "the kernel has BPF LSM but no BTF",
        (false, false) => "the kernel shows neither BPF LSM nor BTF",
    };
    let (finding, first) = probe_bpf(NAME, kernel, has_lsm);
    if finding.outcome == Outcome::Note && finding.text.starts_with("not available") && !has_lsm {
        // That is why, whatever the kernel said of the programs.
        let text = format!("not available: {kernel}");
        return (Finding { text, ..finding }, first);
    }
    (finding, first)
}

#[cfg(feature = "bpf")]
fn probe_bpf(name: &'static str, kernel: &str, has_lsm: bool) -> (Finding, Gate) {
    use mapdirect_guard::LoadError;
    let probed = mapdirect_guard::probe_bpf();
    let first = match &probed {
        Err(error) if error.is_for_good() => Gate::Fanotify,
        _ => Gate::Bpf,
    };
    let finding = match probed {
        Ok(()) if has_lsm => Finding::good(name, "available: the programs load"),
        Ok(()) => Finding::good(
            name,
            "available: the programs load, and replace what security hooks return",
        ),
        Err(LoadError::NotPrivileged) => Finding::new(
            name,
            Outcome::Note,
            format!("{kernel}; only root can tell whether the programs load"),
            AS_ROOT,
        ),
        Err(error) => match error.help() {
            Some(help) => Finding::new(name, Outcome::Note, error.to_string(), help),
            None => Finding::new(
                name,
                Outcome::Note,
                format!(
                    "not available ({kernel}): {}",
                    error.to_string().lines().next().unwrap_or_default()
                ),
                "boot a kernel with CONFIG_BPF_LSM, CONFIG_DEBUG_INFO_BTF and lsm=...,bpf; or \
                 use the fanotify gate",
            ),
        },
    };
    (finding, first)
}

#[cfg(not(feature = "bpf"))]
fn probe_bpf(name: &'static str, kernel: &str, _has_lsm: bool) -> (Finding, Gate) {
    let finding = Finding::new(
        name,
        Outcome::Note,
        format!("not built into this program ({kernel})"),
        "build it with its default features (needs gcc, make, pkg-config, libelf-dev, zlib1g-dev)",
    );
    (finding, Gate::Fanotify)
}

/// What the gate cannot refuse is noticed, or not.
fn tripwire() -> Finding {
    const NAME: &str = "tripwire";
    match mapdirect_guard::probe_tripwire() {
        Ok(()) => Finding::good(
            NAME,
            "available: changes of pinned blocks that the gate cannot refuse are noticed",
        ),
        Err(_) if !capable(capget::CAP_SYS_ADMIN) => Finding::new(
            NAME,
            Outcome::Note,
            "only root can tell whether it is available",
            AS_ROOT,
        ),
        Err(missing) => Finding::new(
            NAME,
            Outcome::Note,
            format!("not available, so what the gate cannot refuse goes unnoticed: {missing}"),
            "boot a kernel with CONFIG_PERF_EVENTS and CONFIG_FTRACE, not locked down for \
             confidentiality",
        ),
    }
}

fn capable(capability: u32) -> bool {
    capget::effective(0).is_ok_and(|effective| capget::contains(effective, capability))
}

fn holder_capability() -> Finding {
    const NAME: &str = "to pin";
    const MEND: &str =
        "run as root, or give the program the capability: setcap cap_linux_immutable+ep PROGRAM";
    if !capable(capget::CAP_LINUX_IMMUTABLE) {
        return Finding::new(
            NAME,
            Outcome::Note,
            "this process lacks CAP_LINUX_IMMUTABLE",
            MEND,
        );
    }
    // PROC_USER_INIT_INO of include/linux/proc_ns.h.
    let own = std::process::id().cast_signed();
    if proc::in_initial_user_namespace(own) != Ok(true) {
        return Finding::new(
            NAME,
            Outcome::Note,
            "CAP_LINUX_IMMUTABLE counts only in the initial user namespace, and this is another",
            MEND,
        );
    }
    match memfd::prove_immutable_capability(b"doctor", memfd::By::Namespace) {
        Ok(_) => Finding::good(
            NAME,
            "this process has CAP_LINUX_IMMUTABLE and can prove it",
        ),
        Err(errno) => Finding::new(
            NAME,
            Outcome::Bad,
            format!("CAP_LINUX_IMMUTABLE cannot be proven: inode flags on tmpfs: {errno}"),
            "boot Linux 6.0 or later with CONFIG_TMPFS",
        ),
    }
}

/// What a guard with a gate could not do without, as it would say itself.
fn guard_needs(gate: Gate) -> Vec<Finding> {
    const NAME: &str = "to guard";
    let lacks = mapdirect_guard::probe_needs(gate);
    if lacks.is_empty() {
        let needed = mapdirect_guard::needed_capabilities(gate);
        return vec![Finding::good(
            NAME,
            format!("this process has all that a guard with the {gate} gate needs: {needed}"),
        )];
    }
    let finding = |lack: StartError| {
        // Another process may be the guard, but not on another machine.
        let outcome = match &lack {
            StartError::NotPrivileged { .. } | StartError::PidNamespace => Outcome::Note,
            _ => Outcome::Bad,
        };
        Finding::new(NAME, outcome, lack.obstacle(), lack.help())
    };
    lacks.into_iter().map(finding).collect()
}

fn running_guard(answering: &mapdirect::Result<Gate>) -> Finding {
    match answering {
        Ok(gate) => Finding::good(
            "guard",
            format!(
                "answers at {}, gate {}",
                terminal::name(Guard::from_env().socket()),
                gate.name()
            ),
        ),
        Err(error) => Finding::new("guard", Outcome::Note, error.obstacle(), error.help()),
    }
}

/// What becomes of pins when no guard runs: that depends on the gate, and on
/// what a guard has left in the kernel.
fn without_guard(answering: &mapdirect::Result<Gate>) -> Option<Finding> {
    const NAME: &str = "without a guard";
    match answering {
        Ok(Gate::Bpf) => {
            return Some(Finding::good(
                NAME,
                "if this guard ends, the gate in the kernel goes on refusing: pins stay, \
                 unattended, until their holders end, and the next guard takes them over; nothing \
                 new is pinned until then",
            ));
        }
        Ok(_) => {
            return Some(Finding::good(
                NAME,
                "if this guard ends, its pins are lost, and every holder is told",
            ));
        }
        Err(_) => {}
    }
    let directory = std::env::var_os("MAPDIRECT_BPF_DIRECTORY")
        .map_or_else(|| PathBuf::from("/sys/fs/bpf/mapdirect"), PathBuf::from);
    match std::fs::read_dir(&directory) {
        Ok(mut links) => links.next().is_some().then(|| {
            Finding::new(
                NAME,
                Outcome::Note,
                format!(
                    "a guard has left the bpf gate at {}: it goes on refusing, so pins stay, \
                     unattended, until their holders end; nothing new is pinned",
                    terminal::name(&directory)
                ),
                "mapdirect guard takes the pins over; mapdirect guard --unload ends them",
            )
        }),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Some(Finding::new(
            NAME,
            Outcome::Note,
            "only root can tell whether a guard has left its gate in the kernel",
            AS_ROOT,
        )),
        Err(_) => None,
    }
}

fn dax() -> Finding {
    const NAME: &str = "dax";
    let mounts = proc_mountinfo::read(None).unwrap_or_default();
    let mounted: Vec<_> = mounts
        .iter()
        .filter(|mount| {
            mount
                .option("dax")
                .is_some_and(|mode| mode != "never" && mode != "inode")
        })
        .map(|mount| format!("{} ({})", mount.mount_point, mount.fs_type))
        .collect();
    if !mounted.is_empty() {
        let mounted = format!("mounted with DAX: {}", mounted.join(", "));
        if uname::version() >= (7, 3) {
            return Finding::good(NAME, mounted);
        }
        return Finding::new(
            NAME,
            Outcome::Note,
            format!(
                "{mounted}; this kernel may give blocks to another file while a device still \
                 works on them by way of a mapping that is gone (7.3 waits)"
            ),
            "keep a mapping until devices have finished with it",
        );
    }
    let devices: Vec<_> = std::fs::read_dir("/sys/block")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            std::fs::read_to_string(entry.path().join("queue/dax"))
                .is_ok_and(|text| text.trim() == "1")
        })
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    if devices.is_empty() {
        return Finding::new(
            NAME,
            Outcome::Note,
            "no device with DAX: mappings need the page cache to be accepted",
            "MAPDIRECT_CACHED=1, or persistent memory in fsdax mode",
        );
    }
    Finding::new(
        NAME,
        Outcome::Note,
        format!(
            "devices with DAX ({}), none mounted with it",
            devices.join(", ")
        ),
        "mount -o dax=always (XFS with reflink needs Linux 6.0 or later)",
    )
}

fn filesystems() -> Finding {
    let mounts = proc_mountinfo::read(None).unwrap_or_default();
    let mut able: Vec<_> = mounts
        .iter()
        .filter(|mount| mount.fs_type == "xfs" || mount.fs_type == "ext4")
        .map(|mount| format!("{} ({})", mount.mount_point, mount.fs_type))
        .collect();
    able.dedup();
    if able.is_empty() {
        Finding::new(
            "filesystems",
            Outcome::Note,
            "neither XFS nor ext4 is mounted: no file here can be pinned",
            "put files to pin on XFS or ext4",
        )
    } else {
        able.truncate(8);
        Finding::good(
            "filesystems",
            format!("can be pinned on: {}", able.join(", ")),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bpf_is(outcome: Outcome, mend: &str) -> Finding {
        Finding::new("bpf gate", outcome, "bpf", mend)
    }

    #[test]
    fn one_gate_is_enough_and_bpf_is_the_one_to_have() {
        let outcomes = |findings: &[Finding; 2]| [findings[0].outcome, findings[1].outcome];
        let found = both(bpf_is(Outcome::Good, ""), no_pre_content());
        assert_eq!(outcomes(&found), [Outcome::Good, Outcome::Note]);
        assert_eq!(first_remedy(&found), None);
        // Neither serves.
        let found = both(bpf_is(Outcome::Note, "boot another"), no_pre_content());
        assert_eq!(outcomes(&found), [Outcome::Bad, Outcome::Bad]);
        assert_eq!(first_remedy(&found).unwrap(), "boot another (bpf)");
        // Nobody knows yet.
        let found = both(bpf_is(Outcome::Note, AS_ROOT), no_pre_content());
        assert_eq!(outcomes(&found), [Outcome::Note, Outcome::Note]);
        // The other one serves.
        let events = Finding::good("fanotify gate", "");
        let found = both(bpf_is(Outcome::Note, "boot another"), events);
        assert_eq!(outcomes(&found), [Outcome::Note, Outcome::Good]);
    }
}
