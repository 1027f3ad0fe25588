use super::*;

/// What the kernel makes of a filter and a call.
fn interpret(filter: &[Instruction], call: &Call) -> u32 {
    let mut bytes = Vec::new();
    bytes.extend(call.number.to_ne_bytes());
    bytes.extend(call.convention.to_ne_bytes());
    bytes.extend(call.instruction_pointer.to_ne_bytes());
    bytes.extend(call.arguments.iter().flat_map(|word| word.to_ne_bytes()));
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let now = filter[at];
        at += 1;
        let is_true = match now.code {
            LOAD => {
                let from = now.constant as usize;
                assert!(from.is_multiple_of(4), "the kernel loads aligned words");
                accumulator = u32::from_ne_bytes(bytes[from..from + 4].try_into().unwrap());
                continue;
            }
            AND => {
                accumulator &= now.constant;
                continue;
            }
            RETURN => return now.constant,
            JUMP_IF_EQUAL => accumulator == now.constant,
            JUMP_IF_ANY_BIT => accumulator & now.constant != 0,
            other => panic!("no such instruction: {other:#x}"),
        };
        at += usize::from(if is_true { now.if_true } else { now.if_false });
    }
}

const ALL: Asked = Asked {
    private: true,
    opens: true,
    own: true,
};

fn call(convention: &Convention, number: u32, arguments: [u64; 6]) -> Call {
    Call {
        number: number.cast_signed(),
        convention: convention.audit,
        instruction_pointer: 0,
        arguments,
    }
}

fn asks(asked: Asked, convention: &Convention, number: u32, arguments: [u64; 6]) -> bool {
    match interpret(&assemble(asked), &call(convention, number, arguments)) {
        ASK => true,
        ALLOW => false,
        other => panic!("neither asked nor allowed: {other:#x}"),
    }
}

/// The arguments of a mapping with these flags.
fn mapping(flags: u32) -> [u64; 6] {
    // Whatever the upper half of a register holds does not matter.
    [0, 4096, 3, u64::from(flags) | 0xdead_beef_0000_0000, 7, 0]
}

#[test]
fn shared_mappings_of_files_are_asked_about() {
    for convention in CONVENTIONS {
        for asked in [Asked::default(), ALL] {
            let maps = |flags| asks(asked, convention, convention.mmap, mapping(flags));
            assert!(maps(MAP_SHARED));
            assert!(maps(MAP_SHARED_VALIDATE));
            // However it is placed, populated or locked.
            for more in [MAP_FIXED, 0x2000, 0x8000, 0x10_0000, 0x8_0000] {
                assert!(maps(MAP_SHARED | more), "{more:#x}");
            }
            assert!(!maps(MAP_SHARED | MAP_ANONYMOUS));
            assert!(!maps(MAP_PRIVATE | MAP_ANONYMOUS));
            assert_eq!(maps(MAP_PRIVATE), asked.private);
            assert!(!maps(MAP_PRIVATE | MAP_DENYWRITE));
            assert!(!maps(MAP_PRIVATE | MAP_FIXED));
        }
    }
}

#[test]
fn opens_are_asked_about_if_they_matter() {
    for convention in CONVENTIONS {
        let directory = convention.o_directory;
        let calls = [(Some(convention.openat), 2), (convention.open, 1)];
        for (number, argument) in calls {
            let Some(number) = number else { continue };
            let opens = |asked, flags: u32| {
                let mut arguments = [0; 6];
                arguments[argument] = u64::from(flags);
                asks(asked, convention, number, arguments)
            };
            for flags in [
                READ_ONLY,
                WRITE_ONLY,
                READ_WRITE,
                READ_WRITE | 0o100,
                0o2_000_000,
            ] {
                assert!(opens(ALL, flags), "{flags:o}");
                assert!(!opens(Asked::default(), flags), "{flags:o}");
            }
            // Nobody can map through these.
            for flags in [O_PATH, directory, O_PATH | READ_WRITE] {
                assert!(!opens(ALL, flags), "{flags:o}");
            }
        }
        // The flags are in memory.
        assert!(asks(ALL, convention, convention.openat2, [0; 6]));
        assert!(!asks(
            Asked::default(),
            convention,
            convention.openat2,
            [0; 6]
        ));
    }
}

#[test]
fn what_frees_blocks_is_asked_about() {
    for convention in CONVENTIONS {
        let (allocates, ..) = convention.fallocate;
        for (mode, frees) in [(0, false), (1, false), (3, true), (8, true), (0x11, true)] {
            let arguments = [7, mode, 0, 0, 4096, 0];
            assert_eq!(asks(ALL, convention, allocates, arguments), frees, "{mode}");
            assert!(!asks(Asked::default(), convention, allocates, arguments));
        }
        for (number, _) in convention.ftruncate {
            assert!(asks(ALL, convention, *number, [0; 6]));
            assert!(!asks(Asked::default(), convention, *number, [0; 6]));
        }
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn lengths_are_read_as_the_kernel_reads_them() {
    let told = |convention: &Convention, number, arguments| {
        subject(&call(convention, number, arguments)).unwrap().1
    };
    let [native, old] = CONVENTIONS else { panic!() };
    let long = [7, 0x1_0000_0002, 0, 0, 0, 0];
    assert_eq!(told(native, 77, long), Subject::Truncate(0x1_0000_0002));
    let negative = [7, 0xffff_ffff, 0, 0, 0, 0];
    assert_eq!(told(old, 93, negative), Subject::Truncate(-1));
    let halves = [7, 2, 1, 0, 0, 0];
    assert_eq!(told(old, 194, halves), Subject::Truncate(0x1_0000_0002));
    let four = [7, 3, 1, 2, 3, 4];
    let expected = Subject::Allocate(0x2_0000_0001, 0x4_0000_0003);
    assert_eq!(told(old, 324, four), expected);
    assert_eq!(told(native, 285, four), Subject::Allocate(1, 2));
}

#[test]
fn a_listener_of_its_own_is_asked_about() {
    for convention in CONVENTIONS {
        let installs = |flags| {
            let arguments = [1, flags, 0, 0, 0, 0];
            asks(Asked::default(), convention, convention.seccomp, arguments)
        };
        assert!(installs(u64::from(NEW_LISTENER)));
        assert!(installs(u64::from(NEW_LISTENER) | 1));
        assert!(!installs(1));
        assert!(!installs(0));
    }
}

#[test]
fn every_other_call_is_allowed_by_its_number() {
    for convention in CONVENTIONS {
        let known = [
            Some(convention.mmap),
            convention.old_mmap,
            convention.open,
            Some(convention.openat),
            Some(convention.openat2),
            Some(convention.seccomp),
            Some(convention.fallocate.0),
            Some(convention.ftruncate[0].0),
            convention.ftruncate.get(1).map(|(number, _)| *number),
        ];
        for number in 0..600 {
            let is_known = known.contains(&Some(number));
            let arguments = [[0; 6], [u64::MAX; 6], mapping(MAP_SHARED)];
            for arguments in arguments {
                let asks = asks(ALL, convention, number, arguments);
                assert!(is_known || !asks, "{number}");
            }
            let told = subject(&call(convention, number, [0; 6]));
            assert_eq!(told.is_some(), is_known, "{number}");
        }
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn x32_is_not_a_way_around() {
    let native = &CONVENTIONS[0];
    let number = native.mmap | 0x4000_0000;
    assert!(asks(Asked::default(), native, number, mapping(MAP_SHARED)));
    assert!(!asks(
        Asked::default(),
        native,
        number,
        mapping(MAP_PRIVATE)
    ));
    let told = subject(&call(native, number, [0; 6]));
    assert_eq!(told.unwrap().1, Subject::Map);
}

#[test]
fn the_old_call_is_always_asked_about() {
    for convention in CONVENTIONS {
        if let Some(number) = convention.old_mmap {
            assert!(asks(Asked::default(), convention, number, [0; 6]));
        }
    }
}

#[test]
fn an_unknown_convention_is_left_alone() {
    let unknown = Convention {
        audit: 0x1234,
        ..CONVENTIONS[0]
    };
    assert!(!asks(ALL, &unknown, unknown.mmap, mapping(MAP_SHARED)));
    assert!(subject(&call(&unknown, unknown.mmap, [0; 6])).is_none());
}

#[test]
fn the_kernel_takes_it() {
    // BPF_MAXINSNS
    assert!(assemble(ALL).len() < 4096);
}
