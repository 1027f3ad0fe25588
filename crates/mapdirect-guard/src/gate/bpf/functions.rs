//! Finds the address ranges of kernel functions that ask for permission.
//!
//! A hook that finds no proof in registers looks up in the kernel's stack which
//! function is at work. The stack has addresses; `/proc/kallsyms` has their
//! names.

use super::abi::{FUNCTIONS, Function};
use super::load::LoadError;
use std::collections::HashMap;

/// What a function does, as the programs know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Doing {
    Reading = 1,
    Writing = 2,
    Allocating = 3,
    Remapping = 4,
    Copying = 5,
    /// Writing through a kiocb.
    Asynchronous = 6,
}

/// Functions from which `security_file_permission` is called, sooner or later,
/// and what each does then. The innermost function decides, so a function may
/// be called by others in the table (`do_splice_direct` by
/// `vfs_copy_file_range`). Functions that ask for reading as well as for
/// writing (`do_sendfile`) are possible because the hook knows for which of the
/// two it is asked. From fs/read_write.c, fs/splice.c, fs/open.c,
/// fs/remap_range.c, fs/aio.c, `io_uring/rw.c`, fs/readdir.c; Linux 6.1 to 7.3.
const NAMES: [(&str, Doing); 38] = [
    ("vfs_read", Doing::Reading),
    ("vfs_readv", Doing::Reading),
    ("do_iter_read", Doing::Reading),
    ("vfs_iter_read", Doing::Reading),
    ("vfs_iocb_iter_read", Doing::Reading),
    ("kernel_read", Doing::Reading),
    ("__kernel_read", Doing::Reading),
    ("aio_read", Doing::Reading),
    ("io_read", Doing::Reading),
    ("__io_read", Doing::Reading),
    ("io_read_mshot", Doing::Reading),
    ("vfs_splice_read", Doing::Reading),
    ("do_splice_read", Doing::Reading),
    ("do_splice_to", Doing::Reading),
    ("splice_file_to_pipe", Doing::Reading),
    ("splice_direct_to_actor", Doing::Reading),
    ("iterate_dir", Doing::Reading),
    ("vfs_write", Doing::Writing),
    ("vfs_writev", Doing::Writing),
    ("do_iter_write", Doing::Writing),
    ("vfs_iter_write", Doing::Writing),
    ("vfs_iocb_iter_write", Doing::Asynchronous),
    ("kernel_write", Doing::Writing),
    ("aio_write", Doing::Asynchronous),
    ("io_write", Doing::Asynchronous),
    ("do_splice_from", Doing::Writing),
    ("do_splice_direct", Doing::Writing),
    ("do_splice_direct_actor", Doing::Writing),
    ("splice_file_range", Doing::Writing),
    ("do_splice", Doing::Writing),
    ("do_sendfile", Doing::Writing),
    ("vfs_fallocate", Doing::Allocating),
    ("remap_verify_area", Doing::Remapping),
    ("do_clone_file_range", Doing::Remapping),
    ("vfs_clone_file_range", Doing::Remapping),
    ("vfs_dedupe_file_range_one", Doing::Remapping),
    ("vfs_dedupe_file_range", Doing::Remapping),
    ("vfs_copy_file_range", Doing::Copying),
];

/// What is known of the running kernel's code.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Kernel {
    pub(super) functions: Vec<Function>,
    /// The address of `preempt_dynamic_mode` (kernel/sched/core.c), or 0.
    pub(super) preemption: u64,
}

impl Kernel {
    /// Reads the addresses from the running kernel.
    pub(super) fn read() -> Result<Self, LoadError> {
        let symbols = std::fs::read("/proc/kallsyms")
            .map_err(|error| LoadError::Failed(format!("reading /proc/kallsyms: {error}")))?;
        let kernel = Self::parse(&symbols);
        let has = |doing| kernel.functions.iter().any(|one| one.doing == doing as u64);
        if has(Doing::Reading) && has(Doing::Writing) && has(Doing::Allocating) {
            return Ok(kernel);
        }
        Err(LoadError::Failed(String::from(
            "/proc/kallsyms does not say where the kernel's functions are; reading their addresses \
             takes CAP_SYSLOG, and kernel.kptr_restrict below 2",
        )))
    }

    /// Parses `/proc/kallsyms`: each line has an address, a type, a name, and
    /// the name of a module if the symbol is in one. Other lines are skipped.
    pub(super) fn parse(symbols: &[u8]) -> Self {
        let wanted: HashMap<&[u8], Doing> = NAMES
            .iter()
            .map(|(name, doing)| (name.as_bytes(), *doing))
            .collect();
        let mut kernel = Self::default();
        let mut starts = Vec::new();
        let mut found = Vec::new();
        for line in symbols.split(|byte| *byte == b'\n') {
            let mut words = line.split(u8::is_ascii_whitespace);
            let (Some(address), Some(kind), Some(name)) =
                (words.next(), words.next(), words.next())
            else {
                continue;
            };
            let address = std::str::from_utf8(address).unwrap_or_default();
            let Ok(address) = u64::from_str_radix(address, 16) else {
                continue;
            };
            if address == 0 {
                continue;
            }
            if name == b"preempt_dynamic_mode" {
                kernel.preemption = address;
            }
            if !matches!(kind, b"t" | b"T" | b"w" | b"W") {
                continue;
            }
            starts.push(address);
            // Parts that the compiler has split off are called `name.part.0`,
            // `name.cold`, `name.constprop.0`.
            let stem = name.split(|byte| *byte == b'.').next().unwrap_or(name);
            if let Some(doing) = wanted.get(stem) {
                found.push((address, *doing));
            }
        }
        starts.sort_unstable();
        starts.dedup();
        for (start, doing) in found {
            let next = starts.partition_point(|other| *other <= start);
            // The last function of all has no known end.
            if let Some(end) = starts.get(next)
                && kernel.functions.len() < FUNCTIONS
            {
                kernel.functions.push(Function {
                    start,
                    end: *end,
                    doing: doing as u64,
                });
            }
        }
        kernel
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn functions_end_where_the_next_one_begins() {
        let symbols = b"ffffffff81000100 T vfs_read\n\
            ffffffff81000180 t vfs_fallocate\n\
            ffffffff81000200 T after\n\
            ffffffff82000000 D preempt_dynamic_mode\n\
            ffffffff81000090 t vfs_write.part.0\n\
            ffffffffc0000000 t vfs_reader\t[module]\n\
            nonsense\n\
            0000000000000000 T vfs_writev\n";
        let kernel = Kernel::parse(symbols);
        assert_eq!(kernel.preemption, 0xffff_ffff_8200_0000);
        let found: Vec<_> = kernel
            .functions
            .iter()
            .map(|one| (one.start & 0xfff, one.end & 0xfff, one.doing))
            .collect();
        assert_eq!(
            found,
            [(0x100, 0x180, 1), (0x180, 0x200, 3), (0x90, 0x100, 2)]
        );
    }

    proptest! {
        #[test]
        fn anything_can_be_read(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let _ = Kernel::parse(&bytes);
        }
    }
}
