//! A reader that survives truncation: it sums up the bytes of a file, again with
//! each line of its input, whatever others try to do to the file meanwhile.
//!
//! ```sh
//! cargo run --example reader -- FILE
//! ```
//!
//! With an ordinary mapping, `truncate -s 0 FILE` by another process kills the
//! program with SIGBUS. Here the other process gets ETXTBSY. The file needs to be
//! open for reading only.

#![expect(clippy::print_stdout, reason = "this is what the program is for")]

use mapdirect::{Advice, DirectMap, MapOptions};
use std::error::Error;
use std::fs::File;

/// What a program that goes wrong returns.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Bytes copied out of the mapping at a time.
const PIECE: usize = 64 << 10;

/// The sum of all bytes of a mapping.
fn sum(map: &DirectMap) -> Result<u64> {
    let mut buffer = vec![0; PIECE];
    let mut sum = 0;
    for at in (0..map.len()).step_by(PIECE) {
        let piece = &mut buffer[..PIECE.min(map.len() - at)];
        map.read_exact_at(piece, at)?;
        sum += piece.iter().map(|byte| u64::from(*byte)).sum::<u64>();
    }
    Ok(sum)
}

/// Does what the command line says.
pub fn run(arguments: &[String]) -> Result<()> {
    let [path] = arguments else {
        return Err("usage: reader FILE".into());
    };
    let file = File::open(path)?;
    let map = MapOptions::new().read_only(true).map(&file)?;
    // The mapping keeps what it needs.
    drop(file);
    map.advise(Advice::Sequential)?;
    println!("{} bytes, sum {}", map.len(), sum(&map)?);
    for line in std::io::stdin().lines() {
        line?;
        // The guard may have gone, or blocks changed in a way that no gate
        // refuses: then the state says so.
        println!("{} bytes, sum {}, {}", map.len(), sum(&map)?, map.state());
    }
    map.unmap()?;
    Ok(())
}

fn main() -> Result<()> {
    run(&std::env::args().skip(1).collect::<Vec<_>>())
}
