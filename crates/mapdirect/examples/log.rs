//! A log on persistent memory: each record is durable when `append` returns, and
//! after a crash exactly the records that were appended are there.
//!
//! ```sh
//! cargo run --example log -- FILE append < lines    # prints each line that is durable
//! cargo run --example log -- FILE show
//! ```
//!
//! No record can be lost to SIGBUS: all blocks are prepared before they are
//! pinned, and nobody can take them away. On persistent memory an append is a few
//! stores and two fences, and no system call; without it the page cache is
//! accepted here, and each flush is an msync(2).

#![expect(clippy::print_stdout, reason = "this is what the program is for")]

use mapdirect::{DirectMap, MapOptions, PrepareOptions};
use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::Ordering::{Acquire, Release};

/// What a program that goes wrong returns.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Marks a file as a log, once everything else is in place.
const MAGIC: u64 = u64::from_be_bytes(*b"MAPDLOG1");
/// Where the magic number is.
const AT_MAGIC: usize = 0;
/// Where the end of the last record is: the one word that makes a record exist.
const AT_END: usize = 8;
/// Where records begin: in a cache line of their own.
const RECORDS: usize = 64;
/// How large a new log is, in bytes.
const SIZE: u64 = 1 << 20;

/// A log in a file.
#[derive(Debug)]
pub struct Log {
    map: DirectMap,
}

impl Log {
    /// Opens a log, or makes one.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        let size = file.metadata()?.len().max(SIZE);
        // Every block is allocated and written, so that no store needs one.
        PrepareOptions::new().size(size).prepare(&file)?;
        let map = MapOptions::new()
            .range(0..size)
            .prepare_first(true)
            .accept_page_cache(true)
            .map(&file)?;
        let log = Self { map };
        match log.map.load::<u64>(AT_MAGIC, Acquire)? {
            MAGIC => log.end().map(drop)?,
            0 => log.begin()?,
            _ => return Err("the file is not a log".into()),
        }
        Ok(log)
    }

    /// Makes an empty log. Until the magic number is there, there is none; so
    /// it comes last.
    fn begin(&self) -> Result<()> {
        self.map.store(RECORDS as u64, AT_END, Release)?;
        self.map.flush_range(AT_END..AT_END + 8)?;
        self.map.store(MAGIC, AT_MAGIC, Release)?;
        self.map.flush_range(AT_MAGIC..AT_MAGIC + 8)?;
        Ok(())
    }

    /// Where the next record goes.
    fn end(&self) -> Result<usize> {
        let end = usize::try_from(self.map.load::<u64>(AT_END, Acquire)?)?;
        if (RECORDS..=self.map.len()).contains(&end) {
            Ok(end)
        } else {
            Err("the log is damaged: it ends nowhere".into())
        }
    }

    /// Appends a record: a length and so many bytes, filled up to a multiple of
    /// eight.
    pub fn append(&self, record: &[u8]) -> Result<()> {
        let start = self.end()?;
        let bytes = start + 8;
        let end = bytes + record.len().next_multiple_of(8);
        if end > self.map.len() {
            return Err("the log is full".into());
        }
        self.map.store(record.len() as u64, start, Release)?;
        self.map.write_all_at(record, bytes)?;
        // First what the end refers to, then the end: a power cut in between
        // leaves a log that ends before the record.
        self.map.flush_range(start..end)?;
        self.map.store(end as u64, AT_END, Release)?;
        self.map.flush_range(AT_END..AT_END + 8)?;
        Ok(())
    }

    /// All records, from the first to the last.
    pub fn records(&self) -> Result<Vec<Vec<u8>>> {
        let end = self.end()?;
        let mut records = Vec::new();
        let mut at = RECORDS;
        while at < end {
            let length = usize::try_from(self.map.load::<u64>(at, Acquire)?)?;
            if length > end - at - 8 {
                return Err("the log is damaged: a record is longer than the log".into());
            }
            let mut record = vec![0; length];
            self.map.read_exact_at(&mut record, at + 8)?;
            records.push(record);
            at += 8 + length.next_multiple_of(8);
        }
        Ok(records)
    }
}

/// Does what the command line says.
pub fn run(arguments: &[String]) -> Result<()> {
    let [file, verb] = arguments else {
        return Err("usage: log FILE append|show".into());
    };
    let log = Log::open(Path::new(file))?;
    let mut output = std::io::stdout();
    match verb.as_str() {
        "append" => {
            for line in std::io::stdin().lines() {
                let line = line?;
                log.append(line.as_bytes())?;
                writeln!(output, "{line}")?;
            }
        }
        "show" => {
            for record in log.records()? {
                println!("{}", String::from_utf8_lossy(&record));
            }
        }
        other => return Err(format!("what is {other}?").into()),
    }
    Ok(())
}

fn main() -> Result<()> {
    run(&std::env::args().skip(1).collect::<Vec<_>>())
}
