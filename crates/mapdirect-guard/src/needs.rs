//! Checks what a guard needs before it says that it is ready.
//!
//! Without this check a guard that lacks something would find that out with the
//! first pin, and refuse it to a holder who can do nothing about it. So the
//! guard ends at once, and says what it lacks.

use crate::StartError;
use mapdirect_proto::Gate;
use mapdirect_sys::capget::{
    CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_LEASE, CAP_SETUID, CAP_SYS_ADMIN, CAP_SYS_PTRACE,
    CAP_SYSLOG, contains, effective,
};
use mapdirect_sys::{kcmp, proc};

/// A capability that a gate needs.
struct Need {
    capability: u32,
    name: &'static str,
    /// What the capability is needed for.
    purpose: &'static str,
    fanotify: bool,
    bpf: bool,
}

/// Found by trying, on Linux 6.18 (fanotify) and 6.12 (bpf): a guard with these
/// capabilities does everything it should, and without any one of them
/// something fails.
///
/// A guard with the bpf gate uses no fanotify. It also runs on a kernel without
/// fanotify, and in a sandbox that denies it.
const NEEDS: [Need; 7] = [
    Need {
        capability: CAP_SYS_ADMIN,
        name: "CAP_SYS_ADMIN",
        purpose: "to watch files or load programs, and to see what threads are inside of",
        fanotify: true,
        bpf: true,
    },
    Need {
        capability: CAP_SYS_PTRACE,
        name: "CAP_SYS_PTRACE",
        purpose: "to see what processes of other users may do and have open",
        fanotify: true,
        bpf: true,
    },
    Need {
        capability: CAP_DAC_OVERRIDE,
        name: "CAP_DAC_OVERRIDE",
        purpose: "to open files of other users for the holder",
        fanotify: true,
        bpf: true,
    },
    Need {
        capability: CAP_DAC_READ_SEARCH,
        name: "CAP_DAC_READ_SEARCH",
        purpose: "to find the files of pins that an earlier guard has left",
        fanotify: false,
        bpf: true,
    },
    Need {
        capability: CAP_SYSLOG,
        name: "CAP_SYSLOG",
        purpose: "to know where the kernel's functions are",
        fanotify: false,
        bpf: true,
    },
    Need {
        capability: CAP_LEASE,
        name: "CAP_LEASE",
        purpose: "to prove that nobody else has a file of another user open",
        fanotify: true,
        bpf: false,
    },
    Need {
        capability: CAP_SETUID,
        name: "CAP_SETUID",
        purpose: "to allocate blocks on behalf of a holder",
        fanotify: true,
        bpf: true,
    },
];

impl Need {
    fn is_for(&self, gate: Gate) -> bool {
        match gate {
            Gate::Bpf => self.bpf,
            _ => self.fanotify,
        }
    }
}

/// The names of the capabilities that a gate needs.
pub(crate) fn names(gate: Gate) -> String {
    let names: Vec<_> = NEEDS
        .iter()
        .filter(|need| need.is_for(gate))
        .map(|need| need.name)
        .collect();
    names.join(", ")
}

/// Refuses to start a guard that could not keep a pin with this gate.
///
/// # Errors
///
/// The first thing that is missing.
pub(crate) fn require(gate: Gate) -> Result<(), StartError> {
    missing(gate).into_iter().next().map_or(Ok(()), Err)
}

/// Everything that this process lacks to be a guard with this gate.
pub(crate) fn missing(gate: Gate) -> Vec<StartError> {
    let has = match effective(0) {
        Ok(has) => has,
        Err(errno) => {
            return vec![StartError::System {
                call: "capget",
                errno,
            }];
        }
    };
    let mut lacks: Vec<_> = require_capabilities(gate, has).err().into_iter().collect();
    // In another user namespace the capabilities count for nothing outside.
    let own = std::process::id().cast_signed();
    if proc::in_initial_user_namespace(own) != Ok(true) {
        lacks.push(StartError::NotPrivileged {
            missing: String::from(
                "capabilities in the initial user namespace (this is another one)",
            ),
            gate,
            needed: names(gate),
        });
    }
    let is_privileged = lacks.is_empty();
    if !is_initial_pid_namespace() {
        lacks.push(StartError::PidNamespace);
    }
    for (path, option) in [
        ("/proc/self/stack", "CONFIG_STACKTRACE"),
        ("/proc/self/syscall", "CONFIG_HAVE_ARCH_TRACEHOOK"),
        ("/proc/self/schedstat", "CONFIG_SCHED_INFO"),
    ] {
        // A process without privileges may not be allowed to read a file that
        // exists.
        if let Err(error) = std::fs::read(path)
            && (is_privileged || error.kind() == std::io::ErrorKind::NotFound)
        {
            lacks.push(StartError::Missing {
                what: format!("{path} cannot be read ({error}), so nobody could be seen at work"),
                help: format!("mount proc(5) at /proc, on a kernel with {option}"),
            });
        }
    }
    if gate == Gate::Fanotify && !kcmp::same_descriptors(own, own) {
        lacks.push(StartError::Missing {
            what: String::from(
                "kcmp(2) does not work, so a holder's descriptor could not be told from others",
            ),
            help: String::from("boot a kernel with CONFIG_KCMP"),
        });
    }
    let leases = std::fs::read_to_string("/proc/sys/fs/leases-enable");
    if gate == Gate::Fanotify && leases.is_ok_and(|value| value.trim() == "0") {
        lacks.push(StartError::Missing {
            what: String::from(
                "leases are disabled, so it could not prove that nobody else has a file open",
            ),
            help: String::from("sysctl fs.leases-enable=1"),
        });
    }
    lacks
}

/// Whether this is the initial PID namespace. `/proc/<tid>` must exist for
/// every process that comes to the gate.
fn is_initial_pid_namespace() -> bool {
    // PROC_PID_INIT_INO of include/linux/proc_ns.h.
    const INITIAL: &str = "pid:[4026531836]";
    std::fs::read_link("/proc/self/ns/pid").is_ok_and(|link| link.as_os_str() == INITIAL)
}

fn require_capabilities(gate: Gate, has: u64) -> Result<(), StartError> {
    let lacking: Vec<_> = NEEDS
        .iter()
        .filter(|need| need.is_for(gate) && !contains(has, need.capability))
        .map(|need| format!("{} ({})", need.name, need.purpose))
        .collect();
    if lacking.is_empty() {
        return Ok(());
    }
    Err(StartError::NotPrivileged {
        missing: lacking.join(", "),
        gate,
        needed: names(gate),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_capability_that_is_missing_is_named() {
        for gate in [Gate::Fanotify, Gate::Bpf] {
            let all = u64::MAX;
            assert!(require_capabilities(gate, all).is_ok());
            for need in NEEDS.iter().filter(|need| need.is_for(gate)) {
                let without = all & !(1 << need.capability);
                let error = require_capabilities(gate, without).unwrap_err();
                let said = error.to_string();
                assert!(said.contains(&format!("lacks {} (", need.name)), "{said}");
                assert!(said.contains(&names(gate)), "{said}");
            }
        }
    }

    #[test]
    fn capabilities_that_do_not_matter_may_be_missing() {
        let has = NEEDS.iter().fold(0, |has, need| has | 1 << need.capability);
        assert!(require_capabilities(Gate::Fanotify, has).is_ok());
        assert!(require_capabilities(Gate::Bpf, has & !(1 << CAP_LEASE)).is_ok());
    }

    /// The service for systemd has what one gate or the other needs.
    #[test]
    fn the_service_has_these_capabilities() {
        let text = include_str!("../../../packaging/systemd/mapdirect.service");
        let mut lines = text.lines();
        let list = lines.find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
        let list: Vec<_> = list.unwrap().split(' ').collect();
        for need in &NEEDS {
            assert!(list.contains(&need.name), "{} is missing", need.name);
        }
        // For the policy, and for declared pins.
        let more = ["CAP_SETGID", "CAP_LINUX_IMMUTABLE"];
        assert!(more.iter().all(|name| list.contains(name)), "{list:?}");
        assert_eq!(list.len(), NEEDS.len() + more.len());
    }
}
