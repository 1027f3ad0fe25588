//! What developers of mapdirect run: `cargo xtask --help` says what there is.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "a task tells what it does")]

mod arch;
mod bpf;
mod build;
mod capi;
mod cross;
mod demo;
mod dependencies;
mod dist;
mod man;
mod packages;
mod picture;
mod plot;
mod public_api;
mod svg;
mod table;
mod test;
mod vm;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Tasks of the mapdirect workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Show the main job on a real XFS and a real ext4: needs root
    Demo(demo::DemoArgs),
    /// Run every test but the soak, installing what they lack: needs root
    Test(test::TestArgs),
    /// Attack for longer than `test` does, in pieces that go on where they were stopped: needs root
    Soak(test::SoakArgs),
    /// Run a command on another kernel, in a virtual machine
    Vm(Box<vm::VmArgs>),
    /// Compile the programs of the bpf gate, or check what was compiled: needs clang
    Bpf(bpf::BpfArgs),
    /// List the public API of the library, or compare it with the list
    PublicApi(public_api::PublicApiArgs),
    /// Write the header of the C library, or compare it with the source
    Header(capi::HeaderArgs),
    /// Install the libraries for C, the command and the manual pages
    Install(capi::InstallArgs),
    /// Make the packages for Debian and the tarball
    Dist(dist::DistArgs),
    /// Write the manual pages of the command from its own description, or check all pages
    Man(man::ManArgs),
    /// Draw a terminal in which a file is shown, pinned and attacked: needs root
    Picture(picture::PictureArgs),
    /// Draw what the benchmarks have measured
    Plot(plot::PlotArgs),
}

fn main() -> ExitCode {
    if mapdirect_testkit::process::play_role(&demo::ROLES) {
        return ExitCode::SUCCESS;
    }
    let result = match Arguments::parse().task {
        Task::Demo(args) => demo::run(&args),
        Task::Test(args) => test::run(&args),
        Task::Soak(args) => test::soak(&args),
        Task::Vm(args) => vm::run(&args),
        Task::Bpf(args) => bpf::run(&args),
        Task::PublicApi(args) => public_api::run(&args),
        Task::Header(args) => capi::header(&args),
        Task::Install(args) => capi::install(&args),
        Task::Dist(args) => dist::run(&args),
        Task::Man(args) => man::run(&args),
        Task::Picture(args) => picture::run(&args),
        Task::Plot(args) => plot::run(&args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}
