//! Plots of what the benchmarks have measured: of their output, or of the tables
//! in docs/costs.md that hold such output.

use crate::build::workspace;
use crate::svg::Svg;
use anyhow::{Context, Result, ensure};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `plot`.
#[derive(Debug, Args)]
#[command(after_help = "\
Reads what `cargo bench` prints (pins and gate), or tables with the columns `ours` and `peer`, or \
`no gate` and others, as docs/costs.md has them.")]
pub(crate) struct PlotArgs {
    /// What to read
    #[arg(value_name = "RESULTS", default_value = "docs/costs.md")]
    results: PathBuf,
    /// Where to write the plots: costs.svg and gate.svg
    #[arg(long, value_name = "DIRECTORY", default_value = "docs/pictures")]
    output: PathBuf,
}

/// What something takes, and its peer, in nanoseconds.
#[derive(Clone, Debug, PartialEq)]
struct Pair {
    name: String,
    ours: f64,
    peer: f64,
}

/// What something takes with a gate, as many times what it takes without.
#[derive(Clone, Debug, PartialEq)]
struct Ratios {
    name: String,
    columns: Vec<(String, f64)>,
}

/// Draws them.
pub(crate) fn run(args: &PlotArgs) -> Result<ExitCode> {
    let path = workspace().join(&args.results);
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let plots = plots(&text);
    ensure!(
        !plots.is_empty(),
        "there is nothing to draw in {}",
        path.display()
    );
    let directory = workspace().join(&args.output);
    std::fs::create_dir_all(&directory)?;
    for (name, plot) in plots {
        let path = directory.join(name);
        std::fs::write(&path, plot)?;
        println!("{}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// The plots of a text, and their names.
fn plots(text: &str) -> Vec<(&'static str, String)> {
    let (pairs, ratios) = read(text);
    let mut plots = Vec::new();
    if !pairs.is_empty() {
        plots.push(("costs.svg", draw_pairs(&pairs)));
    }
    if !ratios.is_empty() {
        plots.push(("gate.svg", draw_ratios(&ratios)));
    }
    plots
}

/// Checks that the plots in the tree show what the page beside them says.
pub(crate) fn check() -> Result<()> {
    let docs = workspace().join("docs");
    let text = std::fs::read_to_string(docs.join("costs.md"))?;
    for (name, plot) in plots(&text) {
        let there = std::fs::read_to_string(docs.join("pictures").join(name)).unwrap_or_default();
        ensure!(
            there == plot,
            "docs/pictures/{name} does not show what docs/costs.md says; run `cargo xtask plot`"
        );
    }
    Ok(())
}

/// Everything in a text that is understood.
fn read(text: &str) -> (Vec<Pair>, Vec<Ratios>) {
    let mut pairs = Vec::new();
    let mut ratios: Vec<Ratios> = Vec::new();
    let mut heading: Vec<String> = Vec::new();
    let mut before = "";
    for line in text.lines() {
        if let Some(cells) = cells(line) {
            if cells.iter().any(|cell| cell == "ours" || cell == "no gate") {
                heading = cells;
            } else if heading.get(1).is_some_and(|name| name == "ours") {
                pairs.extend(pair_of_cells(&cells));
            } else if heading.get(1).is_some_and(|name| name == "no gate") {
                ratios.extend(ratios_of_cells(&heading, &cells));
            }
            continue;
        }
        heading.clear();
        if let Some((ours, peer)) = two_times(line) {
            // The name stands in the line itself, or alone in the one before.
            let own = line.split_once(": ").map(|(name, _)| name.trim());
            let own = own.filter(|name| !name.is_empty() && !name.contains(" / "));
            let name = own.unwrap_or(before.trim());
            pairs.push(Pair {
                name: name.to_owned(),
                ours,
                peer,
            });
        } else if let Some((name, rest)) = line.split_once(": no gate ")
            && time(rest).is_some()
        {
            ratios.push(Ratios {
                name: name.trim().to_owned(),
                columns: Vec::new(),
            });
        } else if let Some((column, rest)) = line.trim().split_once(": ")
            && let Some(column) = column.strip_prefix("gate, ")
            && let Some(last) = ratios.last_mut()
            && let Some(times) = rest
                .split(", ")
                .nth(1)
                .and_then(|rest| rest.split_once('x'))
            && let Ok(times) = times.0.parse()
        {
            last.columns.push((column.to_owned(), times));
        }
        before = line;
    }
    ratios.retain(|ratios| !ratios.columns.is_empty());
    (pairs, ratios)
}

/// The cells of a row of a table; nothing if it is none.
fn cells(line: &str) -> Option<Vec<String>> {
    let inner = line.trim().strip_prefix('|')?.strip_suffix('|')?;
    Some(
        inner
            .split('|')
            .map(|cell| cell.trim().to_owned())
            .collect(),
    )
}

fn pair_of_cells(cells: &[String]) -> Option<Pair> {
    Some(Pair {
        name: cells.first()?.replace('`', ""),
        ours: time(cells.get(1)?)?,
        peer: time(cells.get(2)?)?,
    })
}

fn ratios_of_cells(heading: &[String], cells: &[String]) -> Option<Ratios> {
    let ratio = |(name, cell): (&String, &String)| {
        let name = name.trim_start_matches("gate, ").to_owned();
        cell.parse().ok().map(|ratio: f64| (name, ratio))
    };
    let columns: Vec<_> = heading
        .iter()
        .zip(cells)
        .skip(2)
        .filter_map(ratio)
        .collect();
    cells.get(1)?.parse::<f64>().ok()?;
    (!columns.is_empty()).then(|| Ratios {
        name: cells[0].clone(),
        columns,
    })
}

/// A time in nanoseconds: `135 µs`, `3.5 ms`.
fn time(text: &str) -> Option<f64> {
    let mut words = text.split_whitespace();
    let number: f64 = words.next()?.parse().ok()?;
    let unit = match words.next()?.trim_end_matches([',', ';', ':']) {
        "ns" => 1.0,
        "\u{b5}s" | "us" => 1e3,
        "ms" => 1e6,
        "s" => 1e9,
        _ => return None,
    };
    (number.is_finite() && number > 0.0).then_some(number * unit)
}

/// `12 µs / 3 µs` in a line.
fn two_times(line: &str) -> Option<(f64, f64)> {
    let (before, behind) = line.split_once(" / ")?;
    let mut words: Vec<_> = before.split_whitespace().rev().take(2).collect();
    words.reverse();
    Some((time(&words.join(" "))?, time(behind)?))
}

/// A time in the unit that it is told in.
fn in_words(nanoseconds: f64) -> String {
    let (number, unit) = match nanoseconds {
        time if time < 1e3 => (time, "ns"),
        time if time < 1e6 => (time / 1e3, "\u{b5}s"),
        time if time < 1e9 => (time / 1e6, "ms"),
        time => (time / 1e9, "s"),
    };
    if number < 10.0 {
        format!("{number:.1} {unit}")
    } else {
        format!("{number:.0} {unit}")
    }
}

const SIZE: f64 = 12.0;
const MARGIN: f64 = 16.0;
/// Where bars begin, and how long the longest is.
const WIDTH: f64 = 420.0;

fn as_f64(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap_or(u32::MAX))
}

/// Bars on a scale where each step is ten times as long.
fn draw_pairs(pairs: &[Pair]) -> String {
    let all = || pairs.iter().flat_map(|pair| [pair.ours, pair.peer]);
    let least = all().fold(f64::INFINITY, f64::min).log10().floor();
    let most = all().fold(1.0, f64::max).log10().ceil().max(least + 1.0);
    let place = |time: f64| MARGIN + (time.log10() - least) / (most - least) * WIDTH;
    let row = 54.0;
    let height = 2.0 * MARGIN + 40.0 + as_f64(pairs.len()) * row;
    let mut svg = Svg::new(2.0 * MARGIN + WIDTH + 260.0, height);
    let top = MARGIN + 34.0;
    svg.bar((MARGIN, MARGIN - 4.0), (10.0, 10.0), "ours");
    svg.text((MARGIN + 16.0, MARGIN + 5.0), SIZE, "", "mapdirect");
    svg.bar((MARGIN + 110.0, MARGIN - 4.0), (10.0, 10.0), "peer");
    svg.text(
        (MARGIN + 126.0, MARGIN + 5.0),
        SIZE,
        "",
        "its peer, without a pin",
    );
    let mut decade = least;
    while decade <= most {
        let x = place(10f64.powf(decade));
        svg.line((x, top), (x, height - MARGIN));
        svg.text(
            (x + 2.0, top - 4.0),
            SIZE - 2.0,
            "faint",
            &in_words(10f64.powf(decade)),
        );
        decade += 1.0;
    }
    for (at, pair) in pairs.iter().enumerate() {
        let y = top + as_f64(at) * row + 18.0;
        svg.text((MARGIN + 4.0, y), SIZE, "", &pair.name);
        for (step, (time, class)) in [(pair.ours, "ours"), (pair.peer, "peer")]
            .iter()
            .enumerate()
        {
            let y = y + 5.0 + as_f64(step) * 13.0;
            let end = place(*time);
            svg.bar((MARGIN, y), (end - MARGIN, 10.0), class);
            svg.text((end + 5.0, y + 9.0), SIZE - 2.0, "faint", &in_words(*time));
        }
    }
    svg.finish(
        "What it costs",
        "Bars on a logarithmic scale: what pins and pinned files take, and what their peers take \
         without a pin.",
    )
}

/// Bars that begin at 1: what is more than that is the cost.
fn draw_ratios(ratios: &[Ratios]) -> String {
    let columns = ratios.iter().map(|ratios| ratios.columns.len()).max();
    let columns = columns.unwrap_or(0);
    let all = || ratios.iter().flat_map(|ratios| &ratios.columns);
    let most = all().map(|(_, ratio)| *ratio).fold(1.1, f64::max);
    let scale = |ratio: f64| (ratio - 1.0).max(0.0) / (most - 1.0) * WIDTH;
    let row = 22.0 + as_f64(columns) * 14.0;
    let height = 2.0 * MARGIN + 20.0 + as_f64(ratios.len()) * row;
    let mut svg = Svg::new(2.0 * MARGIN + WIDTH + 300.0, height);
    svg.text(
        (MARGIN, MARGIN + 4.0),
        SIZE,
        "faint",
        "what the bpf gate adds: 1.00 is the same without a gate",
    );
    for (at, ratios) in ratios.iter().enumerate() {
        let y = MARGIN + 28.0 + as_f64(at) * row;
        svg.text((MARGIN, y), SIZE, "strong", &ratios.name);
        for (step, (name, ratio)) in ratios.columns.iter().enumerate() {
            let y = y + 5.0 + as_f64(step) * 14.0;
            svg.bar((MARGIN, y), (scale(*ratio), 11.0), "ours");
            let told = format!("{ratio:.3}  {name}");
            svg.text(
                (MARGIN + scale(*ratio) + 6.0, y + 9.0),
                SIZE - 2.0,
                "faint",
                &told,
            );
        }
    }
    svg.finish(
        "What the bpf gate costs",
        "Bars: how many times as long a read or write of 4 KiB takes with the gate as without.",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_benchmarks_print_is_read() {
        let text = "\
pin + map + unmap + unpin of 2 MiB
    135.20 \u{b5}s / 3.00 \u{b5}s; ratio 45.00 (39.00 to 48.00), 40 turns; goal 12x: MISSED
pinned again, 1 threads:
  by the guard: 130000 ns / 2900 ns, 44.83x
pread 4 KiB: no gate 2328 ns
  gate, nothing pinned: 2328 ns, 1.000x (0.990 to 1.010)
  gate, pinned: 2614 ns, 1.123x (1.100 to 1.140)
";
        let (pairs, ratios) = read(text);
        let told: Vec<_> = pairs
            .iter()
            .map(|pair| (&*pair.name, pair.ours, pair.peer))
            .collect();
        assert_eq!(
            told,
            [
                ("pin + map + unmap + unpin of 2 MiB", 135_200.0, 3000.0),
                ("by the guard", 130_000.0, 2900.0),
            ]
        );
        assert_eq!(ratios.len(), 1);
        assert_eq!(ratios[0].columns[1], (String::from("pinned"), 1.123));
    }

    #[test]
    fn tables_are_read() {
        let text = "\
| | ours | peer | ratio | goal |
|---|---|---|---|---|
| a pin | 3.5 ms | 6.8 \u{b5}s | - | |
| no peer | 9.0 \u{b5}s | - | - | |

| | no gate | gate, nothing pinned | this file pinned | goal |
|---|---|---|---|---|
| pread 4 KiB, Linux 7.3 | 2328 | 1.000 | 1.123 | 1.11, met |
";
        let (pairs, ratios) = read(text);
        assert_eq!(pairs.len(), 1);
        assert_eq!((pairs[0].ours, pairs[0].peer), (3_500_000.0, 6800.0));
        assert_eq!(ratios[0].columns.len(), 2);
        for text in [draw_pairs(&pairs), draw_ratios(&ratios)] {
            assert!(text.starts_with("<svg ") && text.trim_end().ends_with("</svg>"));
        }
    }
}
