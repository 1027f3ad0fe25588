//! Power cuts: a program in a machine stores to persistent memory and says
//! what is durable, the machine is gone in the middle of it, and another one
//! looks at what is left.

use super::machine::{Boot, Machine, Nvdimm, RunDirectory};
use super::program;
use anyhow::{Context, Result, bail, ensure};
use mapdirect_testkit::process::HELPER;
use mapdirect_testkit::random::Random;
use mapdirect_testkit::{Kind, disk};
use std::ffi::OsStr;
use std::path::Path;
use std::time::{Duration, Instant};
use xtask_init::wire::{Message, Program};

/// The only NVDIMM of such a machine, for whichever filesystem.
const PMEM: &str = "/dev/pmem0,/dev/pmem0,/dev/pmem0";
const SIZE: u64 = 512 << 20;
/// The writer has made its filesystem and begun by then.
const BEGINS: Duration = Duration::from_secs(60);
/// The power goes so much later at most.
const LATEST: u64 = 3_000_000;

/// What came of a power cut.
#[derive(Debug)]
pub(crate) struct Cut {
    /// How long records had been appended.
    pub(crate) after: Duration,
    /// How many were told to be durable.
    pub(crate) durable: u64,
    /// What was found afterwards.
    pub(crate) found: String,
}

/// Cuts the power while this program appends records to a log on a filesystem,
/// and fails if any that was told to be durable is gone, or anything else is
/// not as it should be.
pub(crate) fn cut(boot: &Boot, binary: &Path, kind: Kind) -> Result<Cut> {
    let own = crate::build::own()?;
    let scratch = RunDirectory::new()?;
    let file = scratch.path().join("nvdimm");
    let boot = boot.clone().nvdimm(Nvdimm { file, size: SIZE });
    let kind = kind.to_string();
    let role = |role: &str, more: &[&str]| -> Program {
        let mut words: Vec<&OsStr> = vec![own.as_os_str(), HELPER.as_ref(), role.as_ref()];
        words.extend([binary.as_os_str(), kind.as_ref()]);
        words.extend(more.iter().map(OsStr::new));
        program(&words, &[(disk::PMEM_VARIABLE, PMEM)])
    };
    let mut machine = boot.start()?;
    machine.begin(&role("append", &[]))?;
    let mut told = Told::default();
    let deadline = Instant::now() + BEGINS;
    while told.last.is_none() {
        ensure!(
            Instant::now() < deadline,
            "nothing is appended after {BEGINS:?}"
        );
        told.listen(&mut machine, deadline)?;
    }
    let began = Instant::now();
    let now = std::time::UNIX_EPOCH.elapsed()?.subsec_nanos();
    let moment = Random::new(now.into()).below(LATEST);
    let moment = began + Duration::from_micros(moment);
    while Instant::now() < moment {
        told.listen(&mut machine, moment)?;
    }
    let after = began.elapsed();
    for message in machine.cut_power()? {
        told.hear(message)?;
    }
    let last = told.last.context("nothing was told to be durable")?;

    let mut machine = boot.start()?;
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = machine.run(&role("verify", &[&last.to_string()]), &mut out, &mut err)?;
    let text = String::from_utf8_lossy(&out).trim().to_owned();
    ensure!(
        status == 0,
        "after a power cut on {kind}, {} ms after the first of {} records: {text} {}",
        after.as_millis(),
        last + 1,
        String::from_utf8_lossy(&err).trim()
    );
    machine.switch_off()?;
    Ok(Cut {
        after,
        durable: last + 1,
        found: text,
    })
}

/// What the writer has told.
#[derive(Default)]
struct Told {
    /// The number of the last record that is durable.
    last: Option<u64>,
    /// The beginning of a line.
    rest: Vec<u8>,
}

impl Told {
    fn listen(&mut self, machine: &mut Machine, until: Instant) -> Result<()> {
        let within = until.saturating_duration_since(Instant::now());
        match machine.next(within)? {
            Some(message) => self.hear(message),
            None => Ok(()),
        }
    }

    fn hear(&mut self, message: Message) -> Result<()> {
        match message {
            Message::Out(bytes) => self.rest.extend(bytes),
            Message::Err(bytes) => bail!("the writer: {}", String::from_utf8_lossy(&bytes)),
            other => bail!(
                "the writer: {other:?} {}",
                String::from_utf8_lossy(&self.rest)
            ),
        }
        let Some(end) = self.rest.iter().rposition(|byte| *byte == b'\n') else {
            return Ok(());
        };
        for line in String::from_utf8_lossy(&self.rest[..end]).lines() {
            match line.strip_prefix("durable ") {
                Some(number) => self.last = Some(number.parse()?),
                None => ensure!(line == "appending", "the writer said: {line}"),
            }
        }
        self.rest.drain(..=end);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_lines_are_heard() {
        let mut told = Told::default();
        let mut hear = |text: &str| {
            let result = told.hear(Message::Out(text.into()));
            result.map(|()| told.last)
        };
        assert_eq!(hear("appending\ndura").unwrap(), None);
        assert_eq!(hear("ble 1\ndurable 2\ndurable 3").unwrap(), Some(2));
        assert_eq!(hear("4\n").unwrap(), Some(34));
        assert!(hear("failed: no space\n").is_err());
        assert!(told.hear(Message::Exited(0)).is_err());
    }
}
