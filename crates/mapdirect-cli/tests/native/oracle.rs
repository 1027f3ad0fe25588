//! The programs of the bpf gate and the policy, asked the same questions.

use crate::world::World;
use mapdirect::{BlockMap, DeviceId, Extent, ExtentState};
use mapdirect_model::contract::{
    Apart, Beside, Geometry, Layers, Operation, OperationKind, Pinned, kinds,
};
use mapdirect_model::plan::Plan;
use mapdirect_testkit::random::Random;

/// Asks the programs and the policy the same questions.
pub fn judges_as_the_policy(world: &World) {
    const ROUNDS: u64 = 300;
    const QUESTIONS: u64 = 100;
    let seed = std::env::var("MAPDIRECT_SEED").map_or(7, |seed| seed.parse().unwrap());
    let mut random = Random::new(seed);
    let mut oracle = mapdirect_guard::Oracle::load().unwrap();
    let every: Vec<OperationKind> = kinds().collect();
    for round in 0..ROUNDS {
        let size = 1 + random.below(60 * BLOCK);
        // Many runs now and then: they are kept in a map of their own.
        let longest = if round % 10 == 0 { 200 } else { 12 };
        let file = random_file(&mut random);
        let each: Vec<Layers> = (0..1 + random.below(3))
            .map(|_| Layers::of(&random_pin(&mut random, &file, size, longest)))
            .collect();
        let layers = Layers::all(&each);
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
            operation.late = random.below(3) == 0;
            let now = 1 + random.below(70 * BLOCK);
            let told = oracle.refuses(&operation, now).unwrap();
            let expected = layers.refuses(&operation, now, 0);
            assert_eq!(told, expected, "{operation:?} of {now} bytes, {layers:?}");
            // And no less than any of the pins alone.
            let expected = each.iter().any(|pin| pin.refuses(&operation, now, 0));
            assert!(told || !expected, "{operation:?} of {now} bytes, {each:?}");
            world.count("questions to programs and policy", 1);
        }
    }
}

const BLOCK: u64 = 4096;

/// How a file is cut into pieces. The programs know one size of pages.
struct Pieces {
    block: u64,
    geometry: Geometry,
}

fn random_file(random: &mut Random) -> Pieces {
    let block = [BLOCK / 4, BLOCK, 4 * BLOCK][usize::try_from(random.below(3)).unwrap()];
    let geometry = Geometry::of_pages(BLOCK).coarse(random.below(4) == 0);
    let folio = match random.below(3) {
        0 => geometry.folio,
        _ => BLOCK.max(block) << random.below(4),
    };
    Pieces {
        block,
        geometry: Geometry { folio, ..geometry },
    }
}

fn random_pin(random: &mut Random, file: &Pieces, size: u64, longest: u64) -> Pinned {
    let (block, geometry) = (file.block, file.geometry);
    // A mapping begins where a page does.
    let first = random.below(40) / 4 * 4;
    let count = 1 + random.below(longest);
    let range = first * block..(first + count) * block;
    let around = range.start.saturating_sub(5 * block)..range.end + 5 * block;
    if random.below(3) == 0 {
        let end = if random.below(2) == 0 {
            u64::MAX
        } else {
            range.end
        };
        let window = (random.below(2) == 0).then_some(around);
        return Pinned::stable(range.start..end, window, block, geometry);
    }
    let extents = (0..count).map(|at| {
        let state = match random.below(6) {
            0 => ExtentState::Hole,
            1 => ExtentState::Unwritten,
            2 => ExtentState::Shared,
            _ => ExtentState::Written,
        };
        let offset = range.start + at * block;
        let physical = (state != ExtentState::Hole).then_some((1 << 30) + 7 * offset);
        Extent::new(offset, physical, block, state)
    });
    let device = DeviceId { major: 7, minor: 0 };
    let extents: Vec<_> = extents.collect();
    let map = BlockMap::new(
        device,
        u32::try_from(block).unwrap(),
        size,
        range.clone(),
        extents,
    );
    let mut pinned = Pinned::new(&map, random.below(10) == 0, geometry);
    if random.below(2) == 0 {
        let plan = Plan::new(&map, range.start, range.end - range.start, BLOCK);
        pinned = pinned.mapped(&plan, random.below(2) == 0);
    }
    let beside = Beside {
        frozen: (0..random.below(3))
            .map(|_| {
                let at = random.below(60) * block;
                at..at + block * (1 + random.below(3))
            })
            .collect(),
        window: (random.below(2) == 0).then_some(around),
        grows_into: random.below(3) == 0,
        failing_frees: random.below(3) == 0,
        edges: (0..random.below(2))
            .map(|_| range.end..range.end + block)
            .collect(),
    };
    pinned.with_beside(beside).apart(match random.below(3) {
        0 => Apart::No,
        1 => Apart::Without,
        _ => Apart::Held(vec![range.start, range.start + 2 * BLOCK].into()),
    })
}
