//! Tests on real XFS and ext4, with a real guard and real attackers.
//!
//! They need root and loop devices. `cargo xtask test` runs them; a plain
//! `cargo test` counts them as ignored.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "this is a test throughout, though it brings its own main"
)]

mod abuse;
mod again;
mod api;
mod audit;
mod beside;
mod capi;
mod cli;
mod contract;
mod dax;
mod declared;
mod doors;
mod errors;
mod examples;
mod extents;
mod family;
mod grants;
mod hammer;
mod hang;
mod in_kernel;
mod killed;
mod legal;
mod lifetime;
mod neighbours;
mod openers;
#[cfg(feature = "bpf")]
mod oracle;
mod patience;
mod policy;
mod prepare;
mod programs;
mod random;
mod read_only;
mod segments;
mod service;
mod shortage;
mod stable;
mod states;
mod strangers;
mod stuck;
mod supervised;
mod together;
mod tripwire;
mod units;
mod unmodified;
mod unnoticed;
mod versions;
mod words;
mod world;
mod writers;

use libtest_mimic::{Arguments, Trial};
use rustix::process::{Resource, getrlimit, setrlimit};
use std::process::ExitCode;
use world::World;

fn main() -> ExitCode {
    if mapdirect_testkit::process::play_role(&world::roles()) {
        return ExitCode::SUCCESS;
    }
    mapdirect_testkit::raw::heed_signals();
    let mut arguments = Arguments::from_args();
    // Cases time themselves against the system's own clock (patience, close
    // events); twice as many as processors only disturb each other.
    arguments.test_threads = arguments.test_threads.or(Some(2));
    // Crowds of clients need more descriptors than programs are given.
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
    mapdirect_testkit::disk::remove_stale();
    let listing = arguments.list;
    let world = World::new();
    let mut trials: Vec<Trial> = Vec::new();
    trials.extend(contract::trials(&world));
    trials.extend(doors::trials(&world));
    trials.extend(writers::trials(&world));
    trials.extend(errors::trials(&world));
    trials.extend(grants::trials(&world));
    trials.extend(supervised::trials(&world));
    trials.extend(together::trials(&world));
    trials.extend(openers::trials(&world));
    trials.extend(lifetime::trials(&world));
    trials.extend(segments::trials(&world));
    trials.extend(read_only::trials(&world));
    trials.extend(api::trials(&world));
    trials.extend(audit::trials(&world));
    trials.extend(examples::trials(&world));
    trials.extend(extents::trials(&world));
    trials.extend(beside::trials(&world));
    trials.extend(programs::trials(&world));
    trials.extend(dax::trials(&world));
    trials.extend(abuse::trials(&world));
    trials.extend(versions::trials(&world));
    trials.extend(capi::trials(&world));
    trials.extend(cli::trials(&world));
    trials.extend(words::trials(&world));
    trials.extend(family::trials(&world));
    trials.extend(service::trials(&world));
    trials.extend(units::trials(&world));
    trials.extend(killed::trials(&world));
    trials.extend(declared::trials(&world));
    trials.extend(shortage::trials(&world));
    trials.extend(tripwire::trials(&world));
    trials.extend(states::trials(&world));
    trials.extend(prepare::trials(&world));
    trials.extend(random::trials(&world));
    trials.extend(legal::trials(&world));
    trials.extend(hammer::trials(&world));
    trials.extend(strangers::trials(&world));
    trials.extend(unnoticed::trials(&world));
    trials.extend(unmodified::trials(&world));
    trials.extend(stable::trials(&world));
    let conclusion = libtest_mimic::run(&arguments, trials);
    // A process that nobody can look at disturbs every guard of the system,
    // and so do crowds: these come alone, behind all others.
    // So do a second guard's programs, which judge by what it knows.
    let mut alone = stuck::trials(&world);
    alone.extend(strangers::alone(&world));
    alone.extend(shortage::alone(&world));
    alone.extend(patience::trials(&world));
    alone.extend(policy::trials(&world));
    arguments.test_threads = Some(1);
    if mapdirect_testkit::contract::Gate::under_test() == mapdirect_testkit::contract::Gate::Bpf {
        alone.extend(in_kernel::trials(&world));
        alone.extend(service::trials_in_kernel(&world));
    }
    let alone = libtest_mimic::run(&arguments, alone);
    if !listing {
        world.report();
    }
    drop(world);
    capi::clean();
    if conclusion.has_failed() {
        return conclusion.exit_code();
    }
    alone.exit_code()
}
