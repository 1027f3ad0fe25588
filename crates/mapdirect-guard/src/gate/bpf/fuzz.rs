//! The fuzz targets of the bpf gate.

use super::abi::{Event, FUNCTIONS, PinFacts};
use super::events::command_of;
use super::functions::Kernel;
use super::left::found;
use mapdirect_sys::fuzz::Target;
use zerocopy::FromBytes as _;

pub(crate) const TARGETS: [Target; 3] = [
    Target {
        name: "bpf-events",
        run: events,
        seeds: &[&[1; size_of::<Event>()], &[0; size_of::<Event>()]],
    },
    Target {
        name: "bpf-pins-left-behind",
        run: pins,
        seeds: &[&[0; size_of::<PinFacts>()], &[1; size_of::<PinFacts>()]],
    },
    Target {
        name: "kallsyms",
        run: kallsyms,
        seeds: &[
            b"ffffffff81000100 T vfs_read\nffffffff81000180 t vfs_fallocate\n\
              ffffffff81000200 T after\nffffffff82000000 D preempt_dynamic_mode\n\
              ffffffff81000090 t vfs_write.part.0\nffffffffc0000000 t vfs_reader\t[module]\n",
        ],
    },
];

fn events(bytes: &[u8]) {
    if let Ok(event) = Event::read_from_bytes(bytes) {
        let _ = event.key.inode();
        // The command is shown on terminals, and every process chooses its own
        // name.
        assert!(!command_of(&event).contains(char::is_control));
    }
}

fn pins(bytes: &[u8]) {
    if let Ok(facts) = PinFacts::read_from_bytes(bytes) {
        let found = found(&facts);
        assert!(found.handle.bytes.len() <= facts.handle.len());
        assert!(found.mapped.is_none_or(|mapped| !mapped.is_empty()));
    }
}

fn kallsyms(bytes: &[u8]) {
    let kernel = Kernel::parse(bytes);
    assert!(kernel.functions.len() <= FUNCTIONS);
    assert!(kernel.functions.iter().all(|one| one.start < one.end));
}
