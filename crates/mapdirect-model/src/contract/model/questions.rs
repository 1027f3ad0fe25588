//! Questions of all kinds, and that layers and model answer them alike.

use super::{Kept, Pin, Question};
use crate::contract::OperationKind as K;
use crate::contract::{Geometry, Layers, Operation, kinds};
use crate::extent::ExtentState;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use std::ops::Range;

fn state() -> impl Strategy<Value = ExtentState> {
    prop_oneof![
        3 => Just(ExtentState::Written),
        1 => Just(ExtentState::Unwritten),
        1 => Just(ExtentState::Hole),
        1 => Just(ExtentState::Shared),
    ]
}

/// Blocks and pages of different sizes, small folios and large ones.
fn sizes() -> impl Strategy<Value = (u64, Geometry)> {
    let block = select(vec![1 << 10, 4 << 10, 16 << 10]);
    let page = select(vec![4 << 10, 16 << 10]);
    (block, page, 0u32..4, any::<bool>()).prop_map(
        |(block, page, order, coarse): (u64, u64, _, _)| {
            let folio = page.max(block) << order;
            (
                block,
                Geometry {
                    page,
                    folio,
                    coarse,
                },
            )
        },
    )
}

/// Runs of blocks.
fn runs(most: usize) -> impl Strategy<Value = Vec<Range<u64>>> {
    let run = (0u64..60, 1u64..4).prop_map(|(start, length)| start..start + length);
    proptest::collection::vec(run, 0..most)
}

fn pin(block: u64, geometry: Geometry) -> impl Strategy<Value = Pin> {
    let apart = prop_oneof![
        Just(Kept::No),
        Just(Kept::Without),
        proptest::collection::btree_set(0u64..60, 0..5)
            .prop_map(|pages| Kept::Held(pages.into_iter().collect())),
    ];
    let states = prop_oneof![
        2 => proptest::collection::vec(state(), 1..20),
        // Nothing else to refuse for.
        1 => proptest::collection::vec(Just(ExtentState::Written), 1..20),
    ];
    let blocks = (0u64..40, states);
    // The end of the file somewhere in the pin, or anywhere.
    let size = (any::<bool>(), any::<Index>(), 1..60 * block);
    let mapped = proptest::option::of(any::<(Index, Index, bool)>());
    let window = proptest::option::of((0u64..12, 0u64..12));
    (
        blocks,
        proptest::bool::weighted(0.2),
        size,
        mapped,
        (runs(3), runs(2), runs(3)),
        window,
        (any::<bool>(), any::<bool>(), proptest::bool::weighted(0.3)),
        apart,
    )
        .prop_map(
            move |(
                (first, states),
                whole_file,
                size,
                mapped,
                (beside, edges, gives_way),
                window,
                flags,
                apart,
            )| {
                // Mappings begin where pages do.
                let per_page = (geometry.page / block).max(1);
                let first = match mapped {
                    Some(_) => first / per_page * per_page,
                    None => first,
                };
                let end = first + states.len() as u64;
                let mapped = mapped.map(|(from, length, cached)| {
                    let from = first + from.index(states.len()) as u64;
                    let from = from / per_page * per_page;
                    let length = 1 + length.index(usize::try_from(end - from).unwrap()) as u64;
                    (from..from + length, cached)
                });
                let (is_inside, at, anywhere) = size;
                let inside =
                    first * block + 1 + at.index(states.len() * 1024) as u64 * block / 1024;
                let size = if is_inside { inside } else { anywhere };
                Pin {
                    block,
                    geometry,
                    first,
                    states,
                    whole_file,
                    follows: flags.2,
                    gives_way,
                    size,
                    mapped,
                    beside,
                    window: window.map(|(left, right)| first.saturating_sub(left)..end + right),
                    grows_into: flags.0,
                    failing_frees: flags.1,
                    edges,
                    apart,
                }
            },
        )
}

/// Somewhere in a file: near something that matters, or anywhere.
type Place = (Index, i64);

fn place() -> impl Strategy<Value = Place> {
    let near = prop_oneof![2 => Just(0), 1 => -3i64..=3, 1 => -40_000i64..40_000];
    (any::<Index>(), near)
}

fn resolve(place: &Place, pins: &[Pin], size: u64) -> u64 {
    let mut places = vec![0, size, 20 * pins[0].block];
    for pin in pins {
        places.extend([pin.first * pin.block, pin.end() * pin.block]);
        places.extend([pin.size; 4]);
        let runs = pin.beside.iter().chain(&pin.edges).chain(&pin.window);
        places.extend(runs.flat_map(|run| [run.start * pin.block, run.end * pin.block]));
        if let Kept::Held(pages) = &pin.apart {
            places.extend(pages.iter().map(|page| page * pin.geometry.page));
        }
    }
    place.0.get(&places).saturating_add_signed(place.1)
}

prop_compose! {
    fn question()(sizes in sizes())(
        pins in proptest::collection::vec(pin(sizes.0, sizes.1), 1..4),
        size in 1..60 * sizes.0,
        is_then in any::<bool>(),
        kind in prop_oneof![
            2 => select(kinds().collect::<Vec<_>>()),
            // What depends on more than others do.
            1 => select(vec![K::Write, K::Truncate, K::Allocate, K::MapWrite]),
        ],
        places in (place(), place(), place()),
        length in prop_oneof![1..3u64, 1..6 * sizes.0],
        appends in any::<bool>(),
        direct in any::<bool>(),
        late in proptest::bool::weighted(0.3),
        is_known in any::<bool>(),
        brings_shared in proptest::bool::weighted(0.8),
        moved in prop_oneof![Just(0), 1..20 * sizes.0],
    ) -> Question {
        let size = if is_then { pins[0].size } else { size };
        let start = resolve(&places.0, &pins, size);
        // Up to another place that matters, now and then.
        let end = resolve(&places.1, &pins, size);
        let end = if end > start { end } else { start + length };
        let mut operation = Operation::new(kind, start..end);
        if kind == K::Truncate && is_known {
            operation.range = start..start;
        }
        // Only writes go to another place than they say.
        if kind == K::Write && appends {
            let start = resolve(&places.2, &pins, size);
            operation.or = Some(start..start + length);
        }
        operation.direct = direct;
        operation.late = late && kind == K::Truncate;
        operation.brings_shared &= brings_shared;
        Question { pins, operation, size, moved }
    }
}

/// Cases, or more if `PROPTEST_CASES` says so.
fn config() -> ProptestConfig {
    let default = ProptestConfig::default();
    ProptestConfig {
        cases: default.cases.max(3000),
        ..default
    }
}

proptest! {
    #![proptest_config(config())]

    /// Never less, so that nothing pinned changes, and never more, so that
    /// nobody is kept from what is none of a pin's business.
    #[test]
    fn layers_refuse_what_the_model_refuses_and_nothing_else(question in question()) {
        let Question { pins, operation, size, moved } = &question;
        let each: Vec<Layers> = pins.iter().map(|pin| Layers::of(&pin.facts())).collect();
        for (layers, pin) in each.iter().zip(pins) {
            let expected = question.is_refused_by(pin);
            let refused = layers.refuses(operation, *size, *moved);
            prop_assert_eq!(refused, expected, "{:#?}", pin);
        }
        let all = Layers::all(&each);
        let refused = all.refuses(operation, *size, *moved);
        prop_assert_eq!(refused, question.is_refused(), "{:#?}", all);
    }
}
