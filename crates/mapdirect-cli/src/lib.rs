//! The `mapdirect` command, one file per verb.

#![forbid(unsafe_code)]

pub mod args;
pub mod columns;
mod draw;
mod exit;
mod extents;
mod journal;
mod json;
mod keeper;
mod metrics;
mod open;
mod output;
pub mod pages;
pub mod since;
pub mod size;
mod terminal;
mod uses;
mod verbs;

pub use exit::Exit;

use args::{Command, Mapdirect};
use clap::FromArgMatches;
use clap::error::ErrorKind;
use std::ffi::OsString;

/// Runs the command line `args`, the program's name first, and says how the
/// process shall end.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Exit {
    let matched = pages::command().try_get_matches_from(args);
    let parsed = match matched.and_then(|matched| Mapdirect::from_arg_matches(&matched)) {
        Ok(parsed) => parsed,
        Err(error) => return usage(&error),
    };
    let holds = matches!(
        parsed.command,
        Command::Guard(_) | Command::Pin(_) | Command::Run(_)
    );
    // What is executed shall find signals as they were.
    let executes = match &parsed.command {
        Command::Pin(args) => !args.command.is_empty(),
        command => matches!(command, Command::Run(_)),
    };
    if !executes {
        output::outlive_limits();
    }
    let result = match parsed.command {
        Command::Guard(args) => verbs::guard::run(&args),
        Command::Pin(args) => verbs::pin::run(&args),
        Command::Prepare(args) => verbs::prepare::run(&args),
        Command::Run(args) => verbs::run::run(&args),
        Command::Show(args) => verbs::show::run(&args),
        Command::Status(args) => verbs::status::run(&args),
        Command::Top(args) => verbs::top::run(&args),
        Command::Watch(args) => verbs::watch::run(&args),
        Command::Log(args) => verbs::log::run(&args),
        Command::Doctor(args) => verbs::doctor::run(&args),
        Command::Arm(args) => verbs::arm::arm(&args),
        Command::Disarm(args) => verbs::arm::disarm(&args),
        Command::Unpin(args) => verbs::unpin::run(&args),
        Command::Policy(args) => verbs::policy::run(&args),
    };
    let exit = result.unwrap_or_else(|error| exit::explain(&error));
    // What holds something ends by what became of that.
    let unwritten = if holds { None } else { output::finish() };
    unwritten.filter(|_| exit == Exit::SUCCESS).unwrap_or(exit)
}

/// Help and version go to stdout; everything else is one line on stderr.
fn usage(error: &clap::Error) -> Exit {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            output::outlive_limits();
            output::line(error.render().to_string().trim_end());
            output::finish().unwrap_or(Exit::SUCCESS)
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            output::complain("tell me what to do; `mapdirect --help` says what there is");
            Exit::USAGE
        }
        _ => {
            let text = error.render().to_string();
            // clap's first paragraph says what is wrong, the rest is advice.
            let wrong: Vec<&str> = text
                .lines()
                .take_while(|line| !line.is_empty())
                .map(str::trim)
                .collect();
            let wrong = wrong.join(" ");
            let wrong = wrong.strip_prefix("error: ").unwrap_or(&wrong);
            output::complain(&format!("{wrong}; see --help"));
            Exit::USAGE
        }
    }
}
