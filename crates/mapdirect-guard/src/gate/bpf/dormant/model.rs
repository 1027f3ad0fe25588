//! All orders in which those can act who meet at a dormant inode.
//!
//! Every step is one access to what they share, as `prog/dormant.h`,
//! `prog/life.h` and `prog/judge.h` make it. All of these are atomic operations
//! that order what is around them, so a run is a sequence of steps. Each
//! sequence there can be is tried, and whatever is promised is looked at after
//! each step. Designs that were dropped are tried as well: the search must find
//! what is wrong with them.

use std::collections::HashSet;

const DEAD: u8 = 128;
const WAKING: u8 = 64;

/// How the programs do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Design {
    /// As they do.
    Real,
    /// The stamp is read anew with each life of the pin.
    StampAnew,
    /// The pin lives at once, and is taken back if something was noted.
    WithoutWaking,
    /// Whoever takes it up looks for notes first, and not again when the inode
    /// is WAKING.
    LooksOnlyFirst,
    /// Whoever takes it up looks for notes only when the inode is WAKING.
    WakesForNothing,
    /// Whoever passes makes a note, and does not look again.
    PassesBlindly,
    /// The guard takes things away without waiting for who is WAKING.
    GuardHurries,
    /// The guard says that it grants a pin only when that lives already.
    SaysSoLate,
    /// Whoever joins does not mind that a pin is being granted.
    JoinsEarly,
    /// Whoever joins does not look whether it was judged by what is there now.
    JoinsBlindly,
}

/// Somebody, what it has done so far, and what it has seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Actor {
    role: Role,
    step: u8,
    seen: u8,
    /// The version of the entry by which it was judged, or [`NOBODY`].
    judged: u8,
}

/// Nobody relied on the pin that this actor leaves.
const NOBODY: u8 = 255;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Role {
    /// Lets go of the pin, and takes it up again, so many times.
    Holder(u8),
    /// Takes it up, and lets go of it.
    Stranger,
    /// Joins it while it lives, and lets go of it.
    Joiner,
    /// Does what the entry refuses.
    Attacker,
    /// Exchanges blocks with a file that nobody knows.
    Exchanger,
    /// The guard takes the dormant inode away.
    Evicts,
    /// The guard grants another pin of the inode.
    Grants,
    /// The guard begins to grant another pin of the inode, and refuses it.
    Refuses,
}

const DONE: u8 = 100;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    lives: u8,
    disturbed: u8,
    upheavals: u8,
    devices: u8,
    stamp: u8,
    /// The pin ended last; else it cannot be taken up.
    is_last: bool,
    has_entry: bool,
    /// Of the entry.
    version: u8,
    /// The entry says that a pin is being granted.
    is_granting: bool,
    has_facts: bool,
    has_life: bool,
    /// Somebody did what the entry refuses, since the pin was granted.
    passed: bool,
    /// Pins that their holders rely on.
    relied_on: u8,
    actors: Vec<Actor>,
}

/// What is wrong.
type Fault = &'static str;

impl State {
    fn new(roles: &[Role]) -> Self {
        let holders = roles
            .iter()
            .filter(|role| matches!(role, Role::Holder(_)))
            .count();
        let actor = |role: &Role| Actor {
            role: *role,
            step: match role {
                Role::Holder(_) => LEAVE,
                Role::Stranger => TAKE_UP,
                _ => 0,
            },
            seen: 0,
            judged: 0,
        };
        let holders = u8::try_from(holders).unwrap();
        Self {
            lives: if holders == 0 { DEAD } else { holders },
            disturbed: 3,
            upheavals: 0,
            devices: holders,
            stamp: 3,
            is_last: holders == 0,
            has_entry: true,
            version: 0,
            is_granting: false,
            has_facts: true,
            has_life: true,
            passed: false,
            relied_on: holders,
            actors: roles.iter().map(actor).collect(),
        }
    }

    fn is_dead(&self) -> bool {
        self.lives & DEAD != 0
    }

    /// Somebody begins to rely on a pin.
    fn rely(&mut self) -> Result<(), Fault> {
        if self.passed {
            return Err("a pin lives whose blocks may have changed");
        }
        if !self.has_entry {
            return Err("a pin lives that nothing is refused for");
        }
        self.relied_on += 1;
        Ok(())
    }

    fn pass(&mut self) -> Result<(), Fault> {
        self.passed = true;
        if self.relied_on > 0 {
            return Err("somebody passes while a pin is relied on");
        }
        Ok(())
    }

    /// Nobody is between the note and the second look.
    fn nobody_is_passing(&self) -> bool {
        self.actors.iter().all(|actor| {
            !matches!(actor.role, Role::Attacker | Role::Exchanger)
                || actor.step == 0
                || actor.step == DONE
        })
    }
}

/// Steps of whoever lets go of a pin, and of whoever takes it up.
const LEAVE: u8 = 0;
const TAKE_UP: u8 = 10;

/// One step of an actor. Nothing if it waits, or is done.
fn step(design: Design, state: &State, number: usize) -> Option<Result<State, Fault>> {
    let mut next = state.clone();
    let actor = state.actors[number];
    let moved = match actor.role {
        Role::Holder(_) | Role::Stranger => hold(design, &mut next, actor),
        Role::Joiner => join(design, &mut next, actor),
        Role::Attacker => attack(design, &mut next, actor),
        Role::Exchanger => exchange(design, &mut next, actor),
        Role::Evicts => evict(design, &mut next, actor),
        Role::Grants | Role::Refuses => grant(design, &mut next, actor),
    };
    match moved {
        Ok(None) => None,
        Ok(Some(actor)) => {
            next.actors[number] = actor;
            Some(Ok(next))
        }
        Err(fault) => Some(Err(fault)),
    }
}

type Moved = Result<Option<Actor>, Fault>;

impl Actor {
    fn to(self, step: u8) -> Moved {
        Ok(Some(Self { step, ..self }))
    }

    /// Leaves a pin before anybody relies on it.
    fn gives_up(self) -> Moved {
        Ok(Some(Self {
            step: LEAVE,
            seen: DONE,
            judged: NOBODY,
            ..self
        }))
    }

    fn seeing(self, seen: u8, step: u8) -> Moved {
        Ok(Some(Self { step, seen, ..self }))
    }
}

/// `leave` and `uncount_pin`; the pin is nobody's from the first step on.
fn leave(design: Design, state: &mut State, actor: Actor, then: u8, is_pin: bool) -> Moved {
    match actor.step - LEAVE {
        0 => {
            if actor.judged != NOBODY {
                state.relied_on -= 1;
            }
            if design == Design::StampAnew && is_pin {
                state.stamp = state.disturbed + state.upheavals;
            }
            state.lives -= 1;
            actor.to(LEAVE + if state.lives == 0 { 1 } else { 3 })
        }
        1 => {
            state.is_last = is_pin;
            actor.to(LEAVE + 2)
        }
        2 => {
            if state.lives == 0 {
                state.lives = DEAD;
            }
            actor.to(LEAVE + 3)
        }
        _ => {
            state.devices -= 1;
            actor.to(then)
        }
    }
}

fn hold(design: Design, state: &mut State, actor: Actor) -> Moved {
    let left = match actor.role {
        Role::Holder(left) => left,
        _ => 0,
    };
    match actor.step {
        LEAVE..TAKE_UP => leave(
            design,
            state,
            actor,
            if left == 0 { DONE } else { TAKE_UP },
            true,
        ),
        TAKE_UP => {
            if !state.has_life || state.lives != DEAD {
                return actor.to(DONE);
            }
            // Whether it is too late already, for the check below.
            let noted = state.stamp != state.disturbed + state.upheavals;
            let step = if design == Design::WakesForNothing {
                1
            } else {
                8
            };
            actor.seeing(noted.into(), TAKE_UP + step)
        }
        18 if state.stamp != state.disturbed + state.upheavals => actor.to(DONE),
        18 => actor.to(TAKE_UP + 1),
        11 => {
            if state.lives != DEAD {
                return actor.to(DONE);
            }
            if actor.seen != 0 {
                return Err("an inode is WAKING for somebody who came too late");
            }
            state.lives = if design == Design::WithoutWaking {
                1
            } else {
                WAKING
            };
            actor.to(TAKE_UP + 2)
        }
        12 => {
            state.devices += 1;
            actor.to(TAKE_UP + 3)
        }
        13 => actor.seeing(state.disturbed, TAKE_UP + 4),
        14 => {
            let is_same =
                design == Design::LooksOnlyFirst || state.stamp == actor.seen + state.upheavals;
            let may = is_same && state.is_last && state.has_facts && state.has_entry;
            actor.to(TAKE_UP + if may { 5 } else { 6 })
        }
        15 => {
            if design != Design::WithoutWaking {
                state.lives = 1;
            }
            state.rely()?;
            let role = match actor.role {
                Role::Holder(left) => Role::Holder(left - 1),
                other => other,
            };
            Ok(Some(Actor {
                role,
                step: LEAVE,
                ..actor
            }))
        }
        16 => {
            state.lives = if state.lives == WAKING || state.lives == 1 {
                DEAD
            } else {
                // Somebody has joined what did not live.
                state.lives - 1
            };
            actor.to(TAKE_UP + 7)
        }
        17 => {
            state.devices -= 1;
            actor.to(DONE)
        }
        _ => Ok(None),
    }
}

fn join(design: Design, state: &mut State, actor: Actor) -> Moved {
    match actor.step {
        LEAVE..TAKE_UP if actor.seen == DONE => leave(design, state, actor, DONE, false),
        0 if !state.has_entry => actor.to(DONE),
        0 if state.is_granting && design != Design::JoinsEarly => actor.to(DONE),
        0 => Ok(Some(Actor {
            step: 1,
            judged: state.version,
            ..actor
        })),
        1 => {
            state.devices += 1;
            actor.to(TAKE_UP)
        }
        TAKE_UP => {
            if state.lives & (DEAD | WAKING) != 0 {
                return actor.to(TAKE_UP + 2);
            }
            actor.seeing(state.lives, TAKE_UP + 1)
        }
        11 => {
            if state.lives != actor.seen {
                return actor.to(TAKE_UP);
            }
            state.lives += 1;
            actor.to(TAKE_UP + 3)
        }
        // Whether the entry is the one it was judged by.
        13 if design != Design::JoinsBlindly
            && (!state.has_entry
                || state.version != actor.judged
                || state.is_granting && design != Design::JoinsEarly) =>
        {
            actor.gives_up()
        }
        13 if state.is_granting => Err("somebody has joined what is not granted yet"),
        13 => {
            state.rely()?;
            actor.seeing(DONE, LEAVE)
        }
        12 => {
            state.devices -= 1;
            actor.to(DONE)
        }
        _ => Ok(None),
    }
}

fn attack(design: Design, state: &mut State, actor: Actor) -> Moved {
    match actor.step {
        0 => {
            if !state.has_life || !state.has_entry {
                state.pass()?;
                return actor.to(DONE);
            }
            actor.to(if state.is_dead() { 1 } else { DONE })
        }
        1 => {
            state.disturbed += 1;
            actor.to(2)
        }
        2 => {
            if state.is_dead() || design == Design::PassesBlindly {
                state.pass()?;
            }
            actor.to(DONE)
        }
        _ => Ok(None),
    }
}

fn exchange(design: Design, state: &mut State, actor: Actor) -> Moved {
    match actor.step {
        0 => actor.to(if state.devices == 0 { 1 } else { DONE }),
        1 => {
            state.upheavals += 1;
            actor.to(2)
        }
        2 => {
            if state.devices == 0 || design == Design::PassesBlindly {
                state.pass()?;
            }
            actor.to(DONE)
        }
        _ => Ok(None),
    }
}

fn evict(design: Design, state: &mut State, actor: Actor) -> Moved {
    match actor.step {
        0 => {
            state.disturbed += 1;
            actor.to(1)
        }
        1 if state.lives == WAKING && design != Design::GuardHurries => Ok(None),
        1 => {
            let is_over = state.is_dead() || state.lives == WAKING;
            actor.to(if is_over { 2 } else { DONE })
        }
        2 => {
            state.has_entry = false;
            actor.to(3)
        }
        3 => {
            state.has_facts = false;
            actor.to(4)
        }
        4 => {
            state.has_life = false;
            actor.to(DONE)
        }
        _ => Ok(None),
    }
}

fn grant(design: Design, state: &mut State, actor: Actor) -> Moved {
    match actor.step {
        LEAVE..TAKE_UP if actor.seen == DONE => leave(design, state, actor, DONE, false),
        0 => {
            state.disturbed += 1;
            actor.to(1)
        }
        1 if state.lives == WAKING && design != Design::GuardHurries => Ok(None),
        1 => {
            let is_over = state.is_dead() || state.lives == WAKING;
            actor.to(if is_over { 2 } else { 3 })
        }
        2 => {
            state.has_entry = false;
            actor.to(3)
        }
        3 => {
            state.is_granting = design != Design::SaysSoLate;
            actor.to(8)
        }
        8 => {
            state.devices += 1;
            actor.to(4)
        }
        4 if state.lives == WAKING => Ok(None),
        4 => {
            state.lives = if state.is_dead() { 1 } else { state.lives + 1 };
            actor.to(5)
        }
        5 => {
            state.has_entry = true;
            state.version += 1;
            state.is_granting = true;
            actor.to(6)
        }
        6 if actor.role == Role::Refuses => {
            // If there are no others, what is there stays until the
            // description is gone, which nobody relied on.
            if state.lives > 1 {
                state.version += 1;
                state.is_granting = false;
            }
            actor.gives_up()
        }
        // The proof: whoever is in the middle of something is waited for, and
        // the block map is read after that.
        6 if !state.nobody_is_passing() => Ok(None),
        6 => {
            if state.relied_on == 0 {
                state.passed = false;
                // The pin of before is none that could be taken up.
                state.is_last = false;
            }
            actor.to(7)
        }
        7 => {
            state.is_granting = false;
            state.rely()?;
            actor.seeing(DONE, LEAVE)
        }
        _ => Ok(None),
    }
}

/// Tries all orders. Says how many states there are, or what is wrong.
fn search(design: Design, roles: &[Role]) -> Result<usize, Fault> {
    let first = State::new(roles);
    let mut known = HashSet::from([first.clone()]);
    let mut open = vec![first];
    while let Some(state) = open.pop() {
        for number in 0..state.actors.len() {
            let Some(next) = step(design, &state, number) else {
                continue;
            };
            let next = next?;
            if known.insert(next.clone()) {
                open.push(next);
            }
        }
    }
    Ok(known.len())
}

const SCENES: [&[Role]; 15] = [
    &[Role::Holder(3), Role::Attacker, Role::Attacker],
    &[
        Role::Holder(2),
        Role::Stranger,
        Role::Attacker,
        Role::Attacker,
    ],
    &[Role::Stranger, Role::Stranger, Role::Attacker, Role::Evicts],
    &[Role::Holder(2), Role::Exchanger, Role::Exchanger],
    &[
        Role::Holder(2),
        Role::Stranger,
        Role::Exchanger,
        Role::Attacker,
    ],
    &[
        Role::Holder(1),
        Role::Stranger,
        Role::Joiner,
        Role::Attacker,
    ],
    &[Role::Holder(2), Role::Evicts, Role::Attacker],
    &[Role::Holder(1), Role::Stranger, Role::Evicts, Role::Joiner],
    &[Role::Holder(1), Role::Grants, Role::Attacker],
    &[Role::Holder(1), Role::Stranger, Role::Grants, Role::Joiner],
    &[
        Role::Holder(1),
        Role::Holder(1),
        Role::Evicts,
        Role::Attacker,
    ],
    &[Role::Holder(1), Role::Joiner, Role::Grants, Role::Joiner],
    &[Role::Holder(1), Role::Joiner, Role::Refuses, Role::Joiner],
    &[Role::Holder(1), Role::Joiner, Role::Refuses, Role::Attacker],
    &[Role::Stranger, Role::Refuses, Role::Joiner, Role::Attacker],
];

#[test]
fn no_order_breaks_a_promise() {
    for scene in SCENES {
        let states = search(Design::Real, scene);
        assert!(
            states.is_ok_and(|states| states > 100),
            "{scene:?}: {states:?}"
        );
    }
}

#[test]
fn the_search_finds_what_is_wrong_with_other_designs() {
    for design in [
        Design::StampAnew,
        Design::WithoutWaking,
        Design::LooksOnlyFirst,
        Design::WakesForNothing,
        Design::PassesBlindly,
        Design::GuardHurries,
        Design::SaysSoLate,
        Design::JoinsEarly,
        Design::JoinsBlindly,
    ] {
        let faults: Vec<_> = SCENES
            .iter()
            .filter_map(|scene| search(design, scene).err())
            .collect();
        assert!(!faults.is_empty(), "{design:?}");
    }
}

/// Whether the guard is told of the end of a pin, or looks by itself: the
/// program says that the pin is over, and then looks whether there is quiet
/// (`file_free`); the guard asks for quiet, or for a word, and then looks
/// whether the pin is over (`Gate::send_to_sleep`, `Gate::wake`).
fn an_end_is_missed(program_looks_first: bool) -> bool {
    #[derive(Clone, Debug, PartialEq, Eq, Hash)]
    struct Ends {
        file: bool,
        quiet: bool,
        told: bool,
        /// The guard takes the pin for one that lives, and waits for a word.
        waits: bool,
        program: u8,
        saw_quiet: bool,
        guard: u8,
        rounds: u8,
    }
    let first = Ends {
        file: true,
        quiet: true,
        told: false,
        waits: false,
        program: 0,
        saw_quiet: false,
        guard: 0,
        rounds: 0,
    };
    let mut known = HashSet::from([first.clone()]);
    let mut open = vec![first];
    let mut is_missed = false;
    while let Some(state) = open.pop() {
        let mut nexts = Vec::new();
        if state.program < 3 {
            let mut next = state.clone();
            match (state.program, program_looks_first) {
                (0, false) | (1, true) => next.file = false,
                (1, false) | (0, true) => next.saw_quiet = state.quiet,
                _ => next.told |= !state.saw_quiet,
            }
            next.program += 1;
            nexts.push(next);
        }
        if state.rounds < 3 {
            let mut next = state.clone();
            match state.guard {
                // It asks for a word, and looks.
                0 => next.quiet = false,
                1 if state.file => next.waits = true,
                1 => {}
                // It asks for quiet, and looks.
                2 => next.quiet = true,
                _ => {}
            }
            next.guard += 1;
            let stays = state.guard == 1 && state.file;
            if stays || state.guard == 3 {
                next.rounds = if stays { 3 } else { state.rounds + 1 };
                next.guard = 0;
            }
            nexts.push(next);
        }
        if nexts.is_empty() {
            is_missed |= state.waits && !state.told;
        }
        for next in nexts {
            if known.insert(next.clone()) {
                open.push(next);
            }
        }
    }
    is_missed
}

#[test]
fn no_end_is_missed() {
    assert!(!an_end_is_missed(false));
    assert!(an_end_is_missed(true), "the search finds nothing");
}
