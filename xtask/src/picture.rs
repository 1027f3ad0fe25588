//! A picture of a terminal: what the command really says, drawn.

use crate::svg::Svg;
use crate::{build, packages};
use anyhow::{Context, Result, ensure};
use clap::Args;
use mapdirect_testkit::process::GuardProcess;
use mapdirect_testkit::{Disk, Kind};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

/// Columns of the terminal. The real name of the directory has to fit.
const COLUMNS: usize = 88;
/// Where the file is, in the picture.
const PLACE: &str = "/data";
/// Size of the letters, height of a line, and room around all.
const SIZE: f64 = 14.0;
const LINE: f64 = 18.0;
const MARGIN: f64 = 16.0;

/// Arguments of `picture`.
#[derive(Debug, Args)]
pub(crate) struct PictureArgs {
    /// Where to write it
    #[arg(long, value_name = "FILE", default_value = "docs/pictures/session.svg")]
    output: PathBuf,
}

/// Lines of a terminal, each with its class.
type Lines = Vec<(&'static str, String)>;

/// Draws it.
pub(crate) fn run(args: &PictureArgs) -> Result<ExitCode> {
    packages::require_root()?;
    packages::install_missing(&packages::FOR_TESTS)?;
    println!("building mapdirect: a minute or two the first time ...");
    let binary = build::mapdirect()?;
    let lines = session(&binary)?;
    let path = build::workspace().join(&args.output);
    std::fs::create_dir_all(path.parent().context("no directory")?)?;
    std::fs::write(&path, drawn(&lines))?;
    for (_, line) in &lines {
        println!("{line}");
    }
    println!("{}", path.display());
    Ok(ExitCode::SUCCESS)
}

/// What a person sees who shows, pins and attacks a file.
fn session(binary: &Path) -> Result<Lines> {
    let guard = GuardProcess::start(binary)?;
    let disk = Disk::new(Kind::XFS, 400)?;
    let file = File::create_new(disk.path("app.db"))?;
    let bytes = vec![b'd'; 400 << 10];
    file.write_all_at(&bytes, 0)?;
    file.write_all_at(&bytes[..240 << 10], 528 << 10)?;
    file.sync_all()?;
    drop(file);
    let shell = Shell {
        binary,
        socket: guard.socket(),
        directory: disk.root(),
    };
    let mut lines = Lines::new();
    shell.say(&mut lines, "mapdirect show app.db", false)?;
    let mut pin = shell.pin(&mut lines)?;
    shell.say(&mut lines, "truncate -s 0 app.db", true)?;
    // What was refused is written down by another thread.
    std::thread::sleep(std::time::Duration::from_millis(300));
    shell.say(&mut lines, "mapdirect status app.db", false)?;
    pin.kill()?;
    pin.wait()?;
    let directory = disk.root().display().to_string();
    for (_, line) in &mut lines {
        *line = line.replace(&directory, PLACE);
    }
    Ok(lines)
}

/// Runs commands as a person's shell does.
struct Shell<'a> {
    binary: &'a Path,
    socket: &'a Path,
    directory: PathBuf,
}

impl Shell<'_> {
    fn command(&self, line: &str) -> Result<Command> {
        let mut words = line.split(' ');
        let program = words.next().context("no command")?;
        let program = if program == "mapdirect" {
            self.binary
        } else {
            Path::new(program)
        };
        let mut command = Command::new(program);
        command
            .args(words)
            .current_dir(&self.directory)
            .env("MAPDIRECT_SOCKET", self.socket)
            .env("MAPDIRECT_CACHED", "1")
            .env("COLUMNS", COLUMNS.to_string())
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::null());
        Ok(command)
    }

    fn say(&self, lines: &mut Lines, line: &str, fails: bool) -> Result<()> {
        lines.push(("strong", format!("$ {line}")));
        let said = self.command(line)?.output()?;
        ensure!(said.status.success() != fails, "{line}: {said:?}");
        let class = if fails { "bad" } else { "" };
        for text in [said.stdout, said.stderr] {
            let text = String::from_utf8(text)?;
            lines.extend(text.lines().map(|line| (class, line.to_owned())));
        }
        Ok(())
    }

    /// Pins the file in the background.
    fn pin(&self, lines: &mut Lines) -> Result<Child> {
        let line = "mapdirect pin app.db";
        lines.push(("strong", format!("$ {line} &")));
        let mut pin = self.command(line)?.stdout(Stdio::piped()).spawn()?;
        let said = BufReader::new(pin.stdout.take().context("no output")?);
        for said in said.lines() {
            let said = said?;
            let is_last = said.starts_with("held until");
            lines.push(("", said));
            if is_last {
                return Ok(pin);
            }
        }
        anyhow::bail!("the file could not be pinned: {:?}", pin.wait()?)
    }
}

fn drawn(lines: &Lines) -> String {
    let columns = lines.iter().map(|(_, line)| line.chars().count()).max();
    let widest = "m".repeat(columns.unwrap_or(0).max(COLUMNS));
    let rows = f64::from(u32::try_from(lines.len()).unwrap_or(0));
    let width = Svg::width_of(&widest, SIZE) + 2.0 * MARGIN;
    let mut svg = Svg::new(width, rows * LINE + 2.0 * MARGIN);
    let mut y = MARGIN + SIZE - 2.0;
    for (class, line) in lines {
        // Blanks in front need no letters.
        let indent: String = line.chars().take_while(|c| *c == ' ').collect();
        let x = MARGIN + Svg::width_of(&indent, SIZE);
        svg.text((x, y), SIZE, class, line.trim_start_matches(' '));
        y += LINE;
    }
    svg.finish(
        "mapdirect in a terminal",
        "A file is shown, pinned, and an attempt to truncate it is refused; the status says who \
         holds it and what was refused.",
    )
}
