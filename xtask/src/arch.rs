//! Architectures of machines, and what everybody calls them.

use clap::ValueEnum;

/// A machine's architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Arch {
    /// 64-bit x86
    #[value(name = "x86_64", alias = "amd64")]
    X86_64,
    /// 64-bit ARM
    #[value(name = "aarch64", alias = "arm64")]
    Aarch64,
}

impl Arch {
    /// That of this machine.
    pub(crate) const OWN: Self = if cfg!(target_arch = "aarch64") {
        Self::Aarch64
    } else {
        Self::X86_64
    };

    /// As the kernel calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// As Debian calls it.
    pub(crate) fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    /// As GCC calls it, and directories of libraries.
    pub(crate) fn gnu(self) -> String {
        format!("{}-linux-gnu", self.name())
    }

    /// As Rust calls it.
    pub(crate) fn rust(self) -> String {
        format!("{}-unknown-linux-gnu", self.name())
    }

    /// A tool of GCC's or binutils': the machine's own, or one for another.
    pub(crate) fn tool(self, name: &str) -> String {
        if self == Self::OWN {
            name.to_owned()
        } else {
            format!("{}-{name}", self.gnu())
        }
    }

    /// What runs a machine of it.
    pub(crate) fn qemu(self) -> String {
        format!("qemu-system-{}", self.name())
    }

    /// The kernels of Debian's for ordinary machines: the one for clouds has no
    /// NVDIMMs.
    pub(crate) fn flavour(self) -> String {
        format!("-{}", self.debian())
    }
}
