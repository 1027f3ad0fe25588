//! Ends the build with one line if something is missing that libbpf is built
//! with.

use std::io::Write as _;
use std::process::{Command, ExitCode, Stdio};

/// A command, and the Debian package that brings it.
const COMMANDS: [(&str, &str); 2] = [("make", "make"), ("pkg-config", "pkg-config")];
/// A header, and the Debian package that brings it.
const HEADERS: [(&str, &str); 2] = [("libelf.h", "libelf-dev"), ("zlib.h", "zlib1g-dev")];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=CC");
    println!("cargo::rerun-if-env-changed=PKG_CONFIG");
    // A compiler for another machine has headers of its own.
    let is_for_this_machine = std::env::var_os("HOST") == std::env::var_os("TARGET");
    let missing = if is_for_this_machine {
        missing()
    } else {
        Vec::new()
    };
    if missing.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!(
        "cargo::error=missing to build mapdirect's bpf gate: {missing}; install it (Debian: \
         apt install gcc make pkg-config libelf-dev zlib1g-dev), or build without that gate: \
         cargo build --release --no-default-features",
        missing = missing.join(", ")
    );
    ExitCode::FAILURE
}

fn missing() -> Vec<&'static str> {
    let mut missing = Vec::new();
    for (command, package) in COMMANDS {
        let named = (command == "pkg-config").then(|| std::env::var("PKG_CONFIG").ok());
        let command = named.flatten().unwrap_or_else(|| command.to_owned());
        if !runs(Command::new(command).arg("--version")) {
            missing.push(package);
        }
    }
    let compiler = std::env::var("CC").unwrap_or_else(|_| String::from("cc"));
    if !runs(Command::new(&compiler).arg("--version")) {
        missing.push("gcc");
        return missing;
    }
    for (header, package) in HEADERS {
        if !has(&compiler, header) {
            missing.push(package);
        }
    }
    missing
}

fn runs(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok()
}

/// Whether the compiler finds a header.
fn has(compiler: &str, header: &str) -> bool {
    let child = Command::new(compiler)
        .args(["-E", "-x", "c", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else {
        return false;
    };
    if let Some(mut input) = child.stdin.take() {
        let _ = writeln!(input, "#include <{header}>");
    }
    child.wait().is_ok_and(|status| status.success())
}
