//! The programs of the bpf gate and the policy, asked the same questions.

use crate::world::World;
use mapdirect::{BlockMap, DeviceId, Extent, ExtentState};
use mapdirect_model::contract::layers::{Layers, kinds as operation_kinds};
use mapdirect_model::contract::{Apart, Beside, Operation, OperationKind, Pinned, judge};
use mapdirect_model::plan::Plan;
use mapdirect_testkit::random::Random;

/// Asks the programs and the policy the same questions.
pub fn judges_as_the_policy(world: &World) {
    const ROUNDS: u64 = 300;
    const QUESTIONS: u64 = 100;
    let seed = std::env::var("MAPDIRECT_SEED").map_or(7, |seed| seed.parse().unwrap());
    let mut random = Random::new(seed);
    let mut oracle = mapdirect_guard::Oracle::load().unwrap();
    let every: Vec<OperationKind> = operation_kinds().collect();
    for round in 0..ROUNDS {
        let size = 1 + random.below(60 * BLOCK);
        // Many runs now and then: they are kept in a map of their own.
        let longest = if round % 10 == 0 { 200 } else { 12 };
        let pins: Vec<Pinned> = (0..1 + random.below(3))
            .map(|_| random_pin(&mut random, size, longest))
            .collect();
        let layers = Layers::new(&pins, random.below(4) == 0);
        if oracle.put(&layers, true).unwrap() {
            world.count("pins judged from a map of their own", 1);
        }
        for _ in 0..QUESTIONS {
            let kind = every[usize::try_from(random.below(every.len() as u64)).unwrap()];
            let start = random.below(70 * BLOCK);
            let mut operation = Operation::new(kind, start..start + 1 + random.below(6 * BLOCK));
            if kind == OperationKind::Truncate {
                operation.range = start..start;
            }
            operation.direct = random.below(2) == 0;
            let now = 1 + random.below(70 * BLOCK);
            let told = oracle.refuses(&operation, now).unwrap();
            let expected = layers.refuses(&operation, now);
            assert_eq!(told, expected, "{operation:?} of {now} bytes, {layers:?}");
            // And no less than the policy says pin by pin.
            let minds =
                |pin: &Pinned| !judge(&operation, pin, now) || pin.minds_beside(&operation, now, 0);
            let expected = pins.iter().any(minds);
            assert!(told || !expected, "{operation:?} of {now} bytes, {pins:?}");
            world.count("questions to programs and policy", 1);
        }
    }
}

const BLOCK: u64 = 4096;

fn random_pin(random: &mut Random, size: u64, longest: u64) -> Pinned {
    let first = random.below(40);
    let count = 1 + random.below(longest);
    let range = first * BLOCK..(first + count) * BLOCK;
    let extents = (0..count).map(|at| {
        let state = match random.below(6) {
            0 => ExtentState::Hole,
            1 => ExtentState::Unwritten,
            2 => ExtentState::Shared,
            _ => ExtentState::Written,
        };
        let offset = range.start + at * BLOCK;
        let physical = (state != ExtentState::Hole).then_some((1 << 30) + 7 * offset);
        Extent::new(offset, physical, BLOCK, state)
    });
    let device = DeviceId { major: 7, minor: 0 };
    let extents: Vec<_> = extents.collect();
    let block = u32::try_from(BLOCK).unwrap();
    let map = BlockMap::new(device, block, size, range.clone(), extents);
    let mut pinned = Pinned::new(&map, random.below(10) == 0);
    if random.below(2) == 0 {
        let plan = Plan::new(&map, range.start, range.end - range.start, BLOCK);
        pinned = pinned.mapped(&plan, random.below(2) == 0);
    }
    let beside = Beside {
        frozen: (0..random.below(3))
            .map(|_| {
                let at = random.below(60) * BLOCK;
                at..at + BLOCK * (1 + random.below(3))
            })
            .collect(),
        window: (random.below(2) == 0)
            .then(|| range.start.saturating_sub(5 * BLOCK)..range.end + 5 * BLOCK),
        grows_into: random.below(3) == 0,
        failing_frees: random.below(3) == 0,
        edges: (0..random.below(2))
            .map(|_| range.end..range.end + BLOCK)
            .collect(),
    };
    pinned.with_beside(beside).apart(match random.below(3) {
        0 => Apart::No,
        1 => Apart::Without,
        _ => Apart::Held(vec![range.start, range.start + 2 * BLOCK].into()),
    })
}
