//! The `mapdirect` command.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    mapdirect_cli::run(std::env::args_os()).into()
}
